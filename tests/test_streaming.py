"""Checkpoints read in pieces: the same numbers as read at once, whatever the chunks."""

import concurrent.futures
import itertools

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lrjax.checkpoints import orbax, streaming
from lrjax.models.llama import LlamaConfig, init_params

CONFIG = LlamaConfig(
    vocab_size=40, num_layers=5, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=16
)


@pytest.mark.parametrize("chunk_bytes", [None, 300])
def test_orbax_in_pieces(tmp_path, monkeypatch, chunk_bytes):
    """As Orbax writes it, a leaf a chunk, and in chunks that cut leaves across layers and rows."""
    params = jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0))
    orbax.save_model(tmp_path / "model", CONFIG, params)
    if chunk_bytes:
        args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunk_bytes), params)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "model" / "params", params, save_args=args, force=True)
    monkeypatch.setattr(streaming, "_READ_BYTES", 500)
    source = streaming.open_source(tmp_path / "model")
    assert source.tensors["layers/4/q"] == ((8, 2, 4), np.float32)
    assert source.tensors["embedding"].shape == (40, 8)

    def pieces(name):
        size = source.tensors[name].size
        bounds = [0, size // 3, size // 2, size]
        return [source.read(name, a, b).copy() for a, b in itertools.pairwise(bounds)]

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = dict(zip(source.tensors, pool.map(pieces, source.tensors), strict=True))
    for name, parts in found.items():
        keys = name.split("/")
        leaf = params[keys[0]] if len(keys) == 1 else params["layers"][keys[2]][int(keys[1])]
        np.testing.assert_array_equal(np.concatenate(parts), np.ravel(leaf), err_msg=name)
    source.close()
