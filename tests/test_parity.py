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


@pytest.mark.slow
@pytest.mark.parametrize("architecture", parity.GRADIENTS)
def test_gradients_of_the_loss_are_those_of_torch(tmp_path, architecture):
    """Every tensor's, at plain, at random increasing positions and on packed segments."""
    for name, errors in parity.compare_gradients(architecture, tmp_path).items():
        worst = max(errors, key=errors.get)
        assert errors[worst] <= parity.GRADIENT_TOLERANCE, (name, worst, errors[worst])
