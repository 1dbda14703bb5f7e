"""Conversion: bit-identical, resumed after a stop, nothing half under the final name."""

import jax
import numpy as np
import pytest
from test_huggingface import TINY, random_params

from lrjax import convert
from lrjax.checkpoints import huggingface, orbax
from lrjax.errors import UserError


def test_there_and_back_is_bit_identical_and_goes_on_after_a_stop(tmp_path, monkeypatch):
    params = random_params(TINY)
    huggingface.save(tmp_path / "a", TINY, params, tokenizer="bytes")
    monkeypatch.setattr(huggingface, "_SHARD_BYTES", 20_000)

    class Stop(Exception):
        pass

    def stop(done, total):
        raise Stop

    with pytest.raises(Stop):
        convert.convert(tmp_path / "a", tmp_path / "b", progress=stop)
    assert not (tmp_path / "b").exists()
    shard = next((tmp_path / "b.partial").glob("model-00001-*.safetensors"))
    written = shard.stat().st_mtime_ns
    convert.convert(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / shard.name).stat().st_mtime_ns == written
    assert not (tmp_path / "b.partial").exists()
    convert.convert(tmp_path / "b", tmp_path / "c", to="orbax")
    config, again = orbax.load_model(tmp_path / "c")
    assert config == TINY
    jax.tree.map(np.testing.assert_array_equal, again, params)
    with pytest.raises(UserError, match="exists and is not empty"):
        convert.convert(tmp_path / "a", tmp_path / "b")
