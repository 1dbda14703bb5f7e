"""Hidden parts: what is hidden changes nothing further down, and what a selection keeps of both ends."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrjax.errors import UserError
from lrjax.longrecipe import ablation, references
from lrjax.longrecipe.contrast import make_logprobs
from lrjax.models.llama import LlamaConfig, init_params

CONFIG = LlamaConfig(
    vocab_size=61, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16,
    rope_theta=100.0, dtype="float32", max_position_embeddings=2048,
)  # fmt: skip


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30), size=st.integers(1, 20))
def test_parts_are_whole_sentences(lengths, size):
    part_L = ablation.parts(np.array(lengths), size)
    assert len(part_L) == sum(lengths)
    assert part_L[0] == 0 and set(np.diff(part_L)) <= {0, 1}
    ends = np.cumsum(lengths)
    assert {0, *ends} >= set(np.flatnonzero(np.diff(part_L)) + 1)
    sizes = np.bincount(part_L)
    assert (sizes[:-1] >= size).all()
    # A part with its last sentence left off is too small.
    last = np.array(lengths)[np.searchsorted(ends, np.cumsum(sizes))]
    assert (sizes - last < size).all()


def whole(params, tokens):
    positions, segment_ids = np.arange(len(tokens))[None], np.ones((1, len(tokens)), np.int32)
    return np.asarray(make_logprobs(CONFIG)(params, tokens[None], positions, segment_ids))[0]


@pytest.mark.parametrize(("attention", "size"), [("reference", 8), ("blockwise", 300)])
def test_what_is_hidden_changes_nothing(attention, size):
    config = dataclasses.replace(CONFIG, attention=attention)
    params = init_params(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 61, 5 * size).astype(np.int32)
    part_L = ablation.parts(np.full(5, size), size)
    lost_PL = ablation.lost_without((config, params), tokens, part_L, window=3)
    for part in range(5):
        first = size * (part + 1) - 1 + 3
        assert not lost_PL[part, :first].any()
        if part == 4:
            continue
        assert np.abs(lost_PL[part, first:]).max() > 1e-3  # something is hidden
        other = tokens.copy()
        inside = part_L == part
        inside[: ablation.SINK] = False
        other[inside] = rng.integers(0, 61, inside.sum())
        lost_of_other = ablation.lost_without((config, params), other, part_L, window=3)[part]
        np.testing.assert_allclose(
            whole(params, tokens)[first - 1 :] - lost_PL[part, first:],
            whole(params, other)[first - 1 :] - lost_of_other[first:],
            atol=1e-5,
        )
        # And it is not the whole text again.
        assert np.abs(lost_of_other[first:] - lost_PL[part, first:]).max() > 1e-3


def test_the_first_tokens_are_never_hidden():
    params = init_params(CONFIG, jax.random.key(0))
    tokens = np.arange(12, dtype=np.int32)
    part_L = np.repeat([0, 1], [ablation.SINK, 12 - ablation.SINK]).astype(np.int32)
    assert not ablation.lost_without((CONFIG, params), tokens, part_L, window=1).any()


def copier(params, tokens, positions, segment_ids):
    """Log-probabilities of a model that goes on as the two tokens before it once went on, in what it can see."""
    (tokens,), (seen,) = tokens, segment_ids
    found = []
    for t in range(1, len(tokens)):
        pair = tokens[t - 2 : t].tolist() if t > 1 else None
        places = [
            p for p in range(2, t) if seen[p] == seen[t] and tokens[p - 2 : p].tolist() == pair
        ]
        found.append(-0.1 if any(tokens[p] == tokens[t] for p in places) else -4.0)
    return np.array([found], np.float32)


def test_the_source_of_a_copy_is_found(monkeypatch):
    monkeypatch.setattr(ablation, "make_logprobs", lambda config: copier)
    rng = np.random.default_rng(0)
    tokens = rng.permutation(1000)[:120].astype(np.int32)  # nothing stands twice, but
    tokens[100:104] = tokens[42:46]
    tokens[80:83] = tokens[70:73]  # too near
    part_L = ablation.parts(np.full(12, 10), 1)
    lost_PL = ablation.lost_without((CONFIG, None), tokens, part_L, window=20)
    source_L = ablation.source_parts(lost_PL)
    assert {int(t): int(source_L[t]) for t in np.flatnonzero(source_L >= 0)} == {102: 4, 103: 4}
    copied_L = references.copies(tokens)
    far = np.flatnonzero(references.is_far(copied_L, 20))
    assert [part_L[copied_L[t]] for t in far] == [source_L[t] for t in far] == [4, 4]


def test_what_cannot_be_read_is_refused(monkeypatch):
    tokens, part_L = np.zeros(3000, np.int32), np.zeros(3000, np.int32)
    with pytest.raises(
        UserError, match=r"3000 tokens, the window of the model is 2048; .*--model=probe"
    ):
        ablation.lost_without((CONFIG, None), tokens, part_L, window=8)
    monkeypatch.setattr(
        ablation, "make_logprobs", lambda config: lambda *rows: np.full((1, 39), np.nan)
    )
    with pytest.raises(UserError, match="attention 'auto'; allowed: one that takes several"):
        ablation.lost_without((CONFIG, None), tokens[:40], part_L[:40], window=8)


def test_sources_and_what_is_kept_of_them_by_hand():
    lost_PL = np.array([[0, 0, 1.5, 0.2, 2.0, 0], [0, 0, 0, 0, 3.0, 0.9], [0] * 6])
    source_L = ablation.source_parts(lost_PL)
    np.testing.assert_array_equal(source_L, [-1, -1, 0, -1, 1, -1])
    part_L = np.array([0, 0, 1, 1, 2, 2])
    kept = ablation.count_kept(np.array([0, 2, 3]), source_L, part_L)
    # Token 2 is kept with half of its source, token 4 is not kept but all of its source is.
    assert kept == {"references": 2, "kept": 1, "with_source": 0.5, "source_only": 1.0}
    with pytest.raises(UserError, match="3 sources and 6 parts"):
        ablation.count_kept(np.array([0]), source_L[:3], part_L)
