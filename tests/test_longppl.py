"""LongPPL's key tokens and the sliding window, against losses of windows computed one by one."""

import jax
import numpy as np
import pytest

from lrjax.errors import UserError
from lrjax.evaluation.longppl import longppl
from lrjax.evaluation.perplexity import opened, sliding_window, token_losses
from lrjax.models.llama import LlamaConfig, init_params

CONFIG = LlamaConfig(
    vocab_size=31, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16,
    dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(
        lambda leaf: 3 * leaf, jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0))
    )


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 31, n).astype(np.int32) for n in (50, 64)]


def losses(params, tokens):
    ((nll, _),) = token_losses(CONFIG, params, [tokens], chunk=64)
    return nll


def test_key_tokens_are_those_that_a_long_context_helps(params, documents):
    context, stride, gain, floor = 16, 8, 0.01, -9.0
    result = longppl(
        CONFIG, params, documents, context=context, stride=stride, gain=gain, floor=floor
    )
    key = []
    for document in documents:
        whole = losses(params, document)
        for start in range(0, len(document) - context, stride):
            short = losses(params, document[start : start + context + stride])
            for token in range(start + context, min(start + context + stride, len(document))):
                before, after = short[token - start - 1], whole[token - 1]
                if before - after > gain and -after > floor:
                    key.append(after)
    assert 5 < len(key) < 60
    assert result["key_tokens"] == len(key) and result["tokens"] == 49 + 63
    assert result["longppl"] == pytest.approx(np.exp(np.mean(key)), rel=1e-4)
    judged = longppl(
        CONFIG, params, documents, context=context, stride=stride, gain=gain, floor=floor,
        evaluator=(CONFIG, params),
    )  # fmt: skip
    assert (
        judged["longppl"] == pytest.approx(result["longppl"]) and judged["evaluator"] == "another"
    )
    nothing = longppl(CONFIG, params, documents, context=16, stride=8, gain=100.0)
    assert nothing["longppl"] is None and nothing["key_tokens"] == 0


def test_a_sliding_window_tells_every_token_once(params, documents):
    window, stride = 16, 4
    result = sliding_window(CONFIG, params, documents, window, stride)
    told = []
    for document in documents:
        for token in range(1, len(document)):
            # The first window that reaches the token.
            start = 0 if token < window else -(-(token - window + 1) // stride) * stride
            told.append(losses(params, document[start : start + window])[token - start - 1])
    assert result["tokens"] == len(told) == 49 + 63
    assert result["nll"] == pytest.approx(np.mean(told), rel=1e-4)
    whole = sliding_window(CONFIG, params, documents, 64, 1)
    assert whole["nll"] == pytest.approx(
        np.mean(np.concatenate([losses(params, d) for d in documents])), rel=1e-4
    )


def test_mistakes_are_named(params, documents):
    with pytest.raises(UserError, match="the longest has 64"):
        longppl(CONFIG, params, documents, context=64)
    with pytest.raises(UserError, match="stride 16, window 16"):
        sliding_window(CONFIG, params, documents, 16, 16)
    with pytest.raises(UserError, match="document 0 has fewer"):
        sliding_window(CONFIG, params, [documents[0][:1]], 16, 4)


def test_short_windows_begin_with_bos_within_their_length(params, documents):
    bos = 7
    opened_documents = [opened(document, [bos]) for document in documents]
    context, stride, gain, floor = 16, 8, 0.01, -9.0
    result = longppl(
        CONFIG, params, opened_documents, context=context, stride=stride, gain=gain, floor=floor, opening=[bos],
    )  # fmt: skip
    key = []
    for document in opened_documents:
        whole = losses(params, document)
        for start in range(0, len(document) - context, stride):
            window = [bos, *document[start + 1 : start + context + stride]]
            short = losses(params, np.array(window, np.int32))
            for token in range(start + context, min(start + context + stride, len(document))):
                before, after = short[token - start - 1], whole[token - 1]
                if before - after > gain and -after > floor:
                    key.append(after)
    assert result["key_tokens"] == len(key) > 5 and result["bos"]
    assert result["tokens"] == 50 + 64  # every token of the text, and never bos
    assert result["longppl"] == pytest.approx(np.exp(np.mean(key)), rel=1e-4)

    window, stride = 16, 15  # the widest stride: of a window, all but bos is told
    result = sliding_window(CONFIG, params, opened_documents, window, stride, opening=[bos])
    told = [
        losses(params, np.array([bos, *document[start + 1 : start + window]], np.int32))
        for document in opened_documents
        for start in range(0, len(document) - 1, stride)
    ]
    assert result["tokens"] == sum(map(len, told)) == 50 + 64
    assert result["nll"] == pytest.approx(np.mean(np.concatenate(told)), rel=1e-4)
    for function in (
        lambda: longppl(CONFIG, params, documents, context=16, opening=[bos]),
        lambda: sliding_window(CONFIG, params, documents, 16, 4, opening=[bos]),
    ):
        with pytest.raises(UserError, match=r"allowed: with the opening, \[7\]"):
            function()
