"""Generation's cache: a prompt in chunks and then token by token is the full forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrjax.models.cache import init_cache
from lrjax.models.llama import Llama, LlamaConfig, init_params

CONFIG = LlamaConfig(
    vocab_size=31, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24,
    dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


def run_in_pieces(config, params, tokens_BL, positions_BL, segment_ids_BL, pieces, max_length):
    step = jax.jit(lambda *args: Llama(config).apply({"params": params}, *args))
    cache, outputs, start = init_cache(config, tokens_BL.shape[0], max_length), [], 0
    for length in pieces:
        part = slice(start, start + length)
        given = [None if a is None else a[:, part] for a in (positions_BL, segment_ids_BL)]
        x_BLD, cache = step(tokens_BL[:, part], *given, cache)
        outputs.append(x_BLD)
        start += length
    return jnp.concatenate(outputs, axis=1), cache


@pytest.mark.parametrize("attention", ["blockwise", "reference", "auto"])
def test_chunked_prefill_and_decode_is_the_full_forward(params, attention):
    config = CONFIG.__class__(**{**CONFIG.__dict__, "attention": attention})
    tokens_BL = jax.random.randint(jax.random.key(1), (3, 15), 0, config.vocab_size)
    # Rows of different lengths, padded on the left; positions with a gap.
    segment_ids_BL = jnp.ones_like(tokens_BL).at[1, :4].set(0).at[2, :9].set(0)
    positions_BL = jnp.cumsum(segment_ids_BL, axis=1) - 1 + 7 * (jnp.arange(15) > 11)
    full = Llama(config).apply({"params": params}, tokens_BL, positions_BL, segment_ids_BL)
    pieces, cache = run_in_pieces(
        config, params, tokens_BL, positions_BL, segment_ids_BL, [6, 6, 1, 1, 1], 20
    )
    real = np.asarray(segment_ids_BL) > 0
    np.testing.assert_allclose(pieces[real], full[real], atol=1e-5)
    assert cache["length"] == 15
    np.testing.assert_array_equal(cache["segment_ids"][:, :15], segment_ids_BL)
    assert not cache["segment_ids"][:, 15:].any()


def test_default_positions_count_on_from_the_cache(params):
    tokens_BL = jax.random.randint(jax.random.key(2), (1, 8), 0, CONFIG.vocab_size)
    pieces, _ = run_in_pieces(CONFIG, params, tokens_BL, None, None, [5, 3], 8)
    full = Llama(CONFIG).apply({"params": params}, tokens_BL)
    np.testing.assert_allclose(pieces, full, atol=1e-5)


def test_shapes_and_dtype():
    cache = init_cache(CONFIG, batch=3, max_length=10, dtype="bfloat16")
    assert cache["k"].shape == cache["v"].shape == (2, 3, 10, 2, 4)
    assert cache["k"].dtype == jnp.uint16
    assert init_cache(CONFIG, 1, 4)["v"].dtype == jnp.float32
