"""Hidden parts: what is hidden changes nothing further down, and what a selection keeps of both ends."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrjax.errors import UserError
from lrjax.longrecipe import ablation
from lrjax.longrecipe.contrast import make_logprobs
from lrjax.models.llama import LlamaConfig, init_params

CONFIG = LlamaConfig(
    vocab_size=61, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16,
    rope_theta=100.0, dtype="float32",
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


def test_what_is_hidden_changes_nothing():
    params = init_params(CONFIG, jax.random.key(0))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 61, 40).astype(np.int32)
    part_L = ablation.parts(np.full(5, 8), 8)
    lost_PL = ablation.lost_without((CONFIG, params), tokens, part_L, window=3)
    for part in range(5):
        first = 8 * part + 7 + 3
        assert not lost_PL[part, :first].any()
        if part == 4:
            continue
        assert np.abs(lost_PL[part, first:]).max() > 1e-3  # something is hidden
        other = tokens.copy()
        inside = part_L == part
        inside[: ablation.SINK] = False
        other[inside] = rng.integers(0, 61, inside.sum())
        lost_of_other = ablation.lost_without((CONFIG, params), other, part_L, window=3)[part]
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
