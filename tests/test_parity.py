"""Every architecture with every position encoding: transformers' logits, and exact round trips of its directory."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from benchmarks import parity
from lrjax.checkpoints import huggingface


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "encoding"), parity.cells())
def test_logits_are_those_of_transformers(tmp_path, architecture, encoding):
    cell = parity.compare(architecture, encoding, tmp_path / "theirs")
    assert max(cell["difference"].values()) <= parity.TOLERANCE, cell
    assert cell["top1"]
    # What is written again has the same tensors, bit for bit, and the same encoding.
    config, params = huggingface.load(tmp_path / "theirs")
    huggingface.save(tmp_path / "ours", config, params)
    theirs, ours = (
        safetensors.numpy.load_file(tmp_path / name / "model.safetensors")
        for name in ("theirs", "ours")
    )
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)
    again, params_again = huggingface.load(tmp_path / "ours")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, params_again, params)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["model_type"] == config.family
