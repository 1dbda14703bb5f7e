"""The score of long dependency against its formula and with a model that copies; the contrast of contexts."""

import math

import jax
import numpy as np
import pytest

from lrjax.errors import UserError
from lrjax.longrecipe import contrast, dependency
from lrjax.models.llama import LlamaConfig, init_params

CONFIG = LlamaConfig(
    vocab_size=61, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16,
    rope_theta=100.0, dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return CONFIG, init_params(CONFIG, jax.random.key(0))


def losses(model, *pieces):
    """Mean loss of the last piece but its first token, after the others."""
    row = np.concatenate(pieces)[None]
    logprobs = contrast.make_logprobs(CONFIG)(
        model[1], row, np.arange(row.shape[1])[None], np.ones_like(row)
    )
    return -float(np.asarray(logprobs)[0, 1 - len(pieces[-1]) :].mean())


def test_table_against_single_readings(model):
    tokens = np.random.default_rng(0).integers(0, 61, 4 * 6 + 3).astype(np.int32)
    found = dependency.long_dependency(model, tokens, chunk=6, rows=4)
    chunks = tokens[:24].reshape(4, 6)
    for i in range(4):
        alone = math.exp(losses(model, chunks[i]))
        for j in range(4):
            after = math.exp(losses(model, chunks[j], chunks[i])) if j < i else alone
            assert found["delta_CC"][i, j] == pytest.approx((alone - after) / alone, abs=1e-5)
    assert found["chunks"] == 4
    with pytest.raises(UserError, match="11 tokens in chunks of 6"):
        dependency.long_dependency(model, tokens[:11], chunk=6)


def test_formula_by_hand():
    delta_CC = np.zeros((3, 3))
    delta_CC[1, 0] = 0.5  # one chunk before: no specificity
    delta_CC[2, :2] = 0.4, 0.05  # the second is under the threshold
    p = np.exp([0.4, 0.05]) / np.exp([0.4, 0.05]).sum()
    specific = 1 + float(p @ np.log(p)) / math.log(2)
    assert dependency.score(delta_CC) == pytest.approx((0.4 + 2 / 2) * specific)
    assert dependency.score(np.zeros((5, 5))) == 0
    kept = dependency.kept_pairs(delta_CC, np.array([0, 1, 8, 9, 10]), 4)
    # Chunk 0 kept by half, chunk 1 not, chunk 2 by three quarters; pairs 1 <- 0 and 2 <- 0.
    assert kept == {"pairs": 2, "kept": 0.75, "with_source": 0.375}


def test_contrast_against_single_readings(model):
    context, stride, lengths = 5, 3, (17, 11)
    rng = np.random.default_rng(0)
    tokens, segment_ids = np.zeros((2, 2, 17), np.int32)
    for row, length in enumerate(lengths):
        tokens[row, :length], segment_ids[row, :length] = rng.integers(0, 61, length), 1
    positions = np.broadcast_to(np.arange(17), tokens.shape)
    logprobs = contrast.make_logprobs(CONFIG)
    long_BL = np.asarray(logprobs(model[1], tokens, positions, segment_ids))
    found = contrast.contrast(model, tokens, segment_ids, long_BL, context=context, stride=stride)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(found[row, : context - 1], 0)
        np.testing.assert_array_equal(found[row, length - 1 :], 0)
        for token in range(context, length):
            start = (token - context) // stride * stride
            # What stands behind the token does not matter; one length is one compiled program.
            piece = np.zeros((1, context + stride), np.int32)
            piece[0, : token + 1 - start] = tokens[row, start : token + 1]
            read = logprobs(model[1], piece, np.arange(8)[None], np.ones_like(piece))
            short = np.asarray(read)[0, token - 1 - start]
            assert found[row, token - 1] == pytest.approx(long_BL[row, token - 1] - short, abs=1e-5)
    with pytest.raises(UserError, match="context 0"):
        contrast.contrast(model, tokens, segment_ids, long_BL, context=0, stride=1)


def test_key_tokens_and_weights_of_longce():
    gained, logprob = np.array([2.5, 2.5, 1.0, -1.0]), np.array([-1.0, -3.0, -1.0, -1.0])
    assert contrast.key_tokens(gained, logprob).tolist() == [True, False, False, False]
    np.testing.assert_allclose(
        contrast.long_ce_weights(np.array([0.0, 1.0, 9.0, -1.0])),
        [1, math.e, 5, math.exp(-1)],
        rtol=1e-6,
    )
