"""Perplexity against a plain forward pass, and the intervals against their definitions."""

import json
import math

import jax
import numpy as np
import pytest

from lrjax.errors import UserError
from lrjax.evaluation.perplexity import perplexity_by_position, short_loss, token_losses
from lrjax.evaluation.statistics import mean_interval, wilson_interval
from lrjax.models.head import logits
from lrjax.models.llama import Llama, LlamaConfig, init_params

CONFIG = LlamaConfig(
    vocab_size=31,
    num_layers=2,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=24,
    dtype="float32",
)


@pytest.fixture(scope="module")
def params():
    return jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 31, length).astype(np.int32) for length in (40, 12, 33)]


@pytest.fixture(scope="module")
def expected(params, documents):
    """(NLL, whether likeliest) of each token after the first, in one pass over each document alone."""

    @jax.jit
    def whole(tokens_1L):
        return logits(params, Llama(CONFIG).apply({"params": params}, tokens_1L))[0]

    scored = []
    for document in documents:
        padded = np.zeros((1, 40), np.int32)
        padded[0, : len(document)] = document
        logits_LV = whole(padded)[: len(document) - 1]
        targets = document[1:]
        logprob_LV = np.asarray(jax.nn.log_softmax(logits_LV))
        nll = -logprob_LV[np.arange(len(targets)), targets]
        scored.append((nll, np.asarray(logits_LV).argmax(-1) == targets))
    return scored


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 512), (2, 16), (3, 7)])
def test_losses_do_not_depend_on_batch_and_chunk(params, documents, expected, batch_size, chunk):
    scored = list(token_losses(CONFIG, params, documents, batch_size=batch_size, chunk=chunk))
    for (nll, right), (expected_nll, expected_right) in zip(scored, expected, strict=True):
        np.testing.assert_allclose(nll, expected_nll, rtol=2e-5, atol=2e-5)
        np.testing.assert_array_equal(right, expected_right)


def test_buckets_hold_the_tokens_of_their_positions(params, documents, expected):
    seen = []
    result = perplexity_by_position(
        CONFIG,
        params,
        documents,
        (8, 32, 64, 80),
        batch_size=3,
        progress=lambda *at: seen.append(at),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert json.loads(json.dumps(result)) == result
    rows = result["buckets"]
    assert [(row["start"], row["stop"]) for row in rows] == [(0, 8), (8, 32), (32, 64), (64, 80)]
    assert [row["documents"] for row in rows] == [3, 3, 2, 0]
    assert [row["tokens"] for row in rows] == [3 * 7, 24 + 4 + 24, 8 + 1, 0]
    for row, (start, stop) in zip(rows, [(0, 7), (7, 31), (31, 63)], strict=False):
        parts = [nll[start:stop] for nll, _ in expected]
        assert row["nll"] == pytest.approx(np.concatenate(parts).mean(), rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(row["nll"]))
        assert row["interval"][0] < row["perplexity"] < row["interval"][1]
    assert rows[3]["nll"] is rows[3]["interval"] is None
    assert result["tokens"] == 40 + 12 + 33


def test_what_lies_beyond_the_last_bucket_is_not_read(params, documents):
    cut = [document[:10] for document in documents]
    assert perplexity_by_position(CONFIG, params, documents, (10,)) == perplexity_by_position(
        CONFIG, params, cut, (10,)
    )


def test_short_loss_is_that_of_the_window(params, documents, expected):
    result = short_loss(CONFIG, params, documents, 16, batch_size=2)
    nll = np.concatenate([nll[:15] for nll, _ in expected])
    right = np.concatenate([right[:15] for _, right in expected])
    assert result["nll"] == pytest.approx(nll.mean(), rel=1e-5)
    assert result["accuracy"] == pytest.approx(right.mean())
    assert (result["documents"], result["tokens"]) == (3, 15 + 11 + 15)
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize(
    ("documents", "buckets", "message"),
    [
        ([], (8,), "no document"),
        ([[1]], (8,), "document 0 has 1 token"),
        ([[1, 2], [1, 99]], (8,), "document 1: token id 99"),
        ([[1, 2]], (8, 8), "perplexity.buckets"),
        ([[1, 2]], (), "perplexity.buckets"),
    ],
)
def test_mistakes_are_named(params, documents, buckets, message):
    with pytest.raises(UserError, match=message):
        perplexity_by_position(CONFIG, params, [np.array(d, np.int32) for d in documents], buckets)


def test_wilson_interval_agrees_with_its_definition():
    # Its ends are the shares p at which the observed share is 1.96 standard errors of p away.
    for successes, count in [(0, 10), (3, 10), (10, 10), (47, 50)]:
        share = successes / count
        for end in wilson_interval(successes, count):
            if 0 < end < 1:
                assert abs(share - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / count))
    assert wilson_interval(0, 10)[0] == 0 and wilson_interval(10, 10)[1] == 1
    assert wilson_interval(0, 0) == [0, 1]


def test_mean_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(500):
        counts = rng.integers(5, 50, 8)
        level = rng.normal(3, 1, 8)  # documents differ; their tokens are alike
        _, (low, high) = mean_interval(level * counts, counts)
        hits += low <= 3 <= high
    assert 0.91 < hits / 500 < 0.98


def test_mean_interval_of_one_document_is_unknown():
    assert mean_interval([6.0], [3]) == (2.0, None)
