"""Selection: exactly the budget, in the order of the text, by the sentences each method asks for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrjax.errors import UserError
from lrjax.longrecipe.selection import METHODS, select


@st.composite
def documents(draw):
    lengths = draw(st.lists(st.integers(1, 9), min_size=2, max_size=15))
    total = sum(lengths)
    return {
        "segment_lengths_S": np.array(lengths, np.int32),
        "budget": draw(st.integers(1, total)),
        "anchor_mask_L": np.array(draw(st.lists(st.booleans(), min_size=total, max_size=total))),
        "digit_mask_L": np.array(draw(st.lists(st.booleans(), min_size=total, max_size=total))),
        "delta_L": np.array(
            draw(st.lists(st.floats(-9, 9, width=32), min_size=total, max_size=total)), np.float32
        ),
        # Any earlier token, or -1.
        "source_L": np.array([draw(st.integers(-1, index - 1)) for index in range(total)]),
    }


def sentence_of(document):
    lengths = document["segment_lengths_S"]
    return np.repeat(np.arange(len(lengths)), lengths)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=60, deadline=None)
@given(document=documents(), seed=st.integers(0, 2**32 - 1))
def test_properties(method, document, seed):
    kept = select(method, **document, rng=np.random.default_rng(seed))
    budget, lengths = document["budget"], document["segment_lengths_S"]
    assert kept.token_index.dtype == kept.segment_lengths.dtype == np.int32
    assert len(kept.token_index) == kept.segment_lengths.sum() == budget
    assert np.all(kept.segment_lengths > 0)
    assert np.all(np.diff(kept.token_index) > 0)
    assert kept.token_index[0] >= 0 and kept.token_index[-1] < lengths.sum()
    # The kept lengths are those of the sentences that the kept tokens come from; all whole, from
    # their first token on, but for the one that was cut.
    sentences, counts = np.unique(sentence_of(document)[kept.token_index], return_counts=True)
    np.testing.assert_array_equal(counts, kept.segment_lengths)
    starts = (np.cumsum(lengths) - lengths)[sentences]
    firsts = kept.token_index[np.cumsum(counts) - counts]
    np.testing.assert_array_equal(firsts, starts)
    assert np.count_nonzero(counts != lengths[sentences]) <= 1
    assert 0 <= kept.filled <= budget

    again = select(method, **document, rng=np.random.default_rng(seed))
    np.testing.assert_array_equal(kept.token_index, again.token_index)


@settings(max_examples=60, deadline=None)
@given(document=documents(), seed=st.integers(0, 999))
def test_anchor_takes_anchored_sentences_first(document, seed):
    kept, spread = (
        select(method, **document, rng=np.random.default_rng(seed))
        for method in ("anchor", "anchor_spread")
    )
    assert spread.filled == kept.filled
    anchored = np.zeros(len(document["segment_lengths_S"]), bool)
    anchored[sentence_of(document)[document["anchor_mask_L"]]] = True
    wanted = np.flatnonzero(anchored[sentence_of(document)])
    if len(wanted) >= document["budget"]:  # too much: in order from the start
        np.testing.assert_array_equal(kept.token_index, wanted[: document["budget"]])
        assert kept.filled == 0
    else:  # too little: all of it, the rest of the budget from other sentences
        assert np.isin(wanted, kept.token_index).all()
        assert kept.filled == document["budget"] - len(wanted)


@settings(max_examples=40, deadline=None)
@given(document=documents(), seed=st.integers(0, 999))
def test_digits_drops_no_digit_sentence_before_a_plain_one_that_fills_up(document, seed):
    kept = select("digits", **document, rng=np.random.default_rng(seed))
    if kept.filled:
        with_digit = np.unique(sentence_of(document)[document["digit_mask_L"]])
        wanted = np.flatnonzero(np.isin(sentence_of(document), with_digit))
        assert np.isin(wanted, kept.token_index).all()


def test_digits_keeps_half_of_the_plain_sentences():
    kept = [
        select(
            "digits",
            [1] * 1000,
            1000,
            rng=np.random.default_rng(seed),
            digit_mask_L=np.arange(1000) < 200,
        )
        for seed in range(20)
    ]
    # All 1,000 tokens are asked for: 200 with digits, half of 800 kept by the rule, the others fill up.
    filled = np.mean([selection.filled for selection in kept])
    assert filled == pytest.approx(400, abs=5 * np.sqrt(200 / 20))


@settings(max_examples=40, deadline=None)
@given(document=documents(), seed=st.integers(0, 999))
def test_score_takes_the_largest_change(document, seed):
    kept = select("score", **document, rng=np.random.default_rng(seed))
    inside = np.isin(np.arange(len(sentence_of(document))), kept.token_index)
    best = [
        document["delta_L"][sentence_of(document) == s].max()
        for s in range(len(document["segment_lengths_S"]))
    ]
    kept_sentences = np.unique(sentence_of(document)[inside])
    left_out = np.setdiff1d(np.arange(len(best)), kept_sentences)
    if len(left_out):
        assert min(best[s] for s in kept_sentences) >= max(best[s] for s in left_out)


@settings(max_examples=40, deadline=None)
@given(document=documents(), seed=st.integers(0, 999))
def test_linked_brings_the_sources_along(document, seed):
    """A whole sentence that is kept has all its sources kept, but for those that the budget cuts off at the end."""
    lengths, sentences = document["segment_lengths_S"], sentence_of(document)
    kept = select("linked", **document, rng=np.random.default_rng(seed))
    best = [document["delta_L"][sentences == s].max() for s in range(len(lengths))]
    order = []
    for s in sorted(range(len(lengths)), key=lambda s: -best[s]):
        sources = document["source_L"][sentences == s]
        for wanted in (s, *sentences[sources[sources >= 0]]):
            if wanted not in order:
                order.append(wanted)
    left, expected = document["budget"], {}
    for s in order:
        if left:
            expected[s] = min(left, lengths[s])
            left -= expected[s]
    np.testing.assert_array_equal(kept.segment_lengths, [expected[s] for s in sorted(expected)])


def test_weighted_draws_in_proportion_to_the_rise():
    delta_L = np.repeat([3.0, 1.0, -5.0, 0.0], 2)
    counts = np.zeros(4)
    for seed in range(800):
        rng = np.random.default_rng(seed)
        counts[select("weighted", [2] * 4, 2, rng=rng, delta_L=delta_L).token_index[0] // 2] += 1
    assert counts[2] == counts[3] == 0
    assert counts[0] == pytest.approx(600, abs=5 * np.sqrt(800 * 3 / 16))


def test_first_is_the_start_of_the_text():
    kept = select("first", [4, 3, 5], 6, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(kept.token_index, np.arange(6))
    np.testing.assert_array_equal(kept.segment_lengths, [4, 2])


def test_random_and_spread_anchors_reach_every_sentence():
    counts, spread = np.zeros(10), np.zeros(10)
    for seed in range(400):
        rng = np.random.default_rng(seed)
        counts[select("random", [2] * 10, 8, rng=rng).token_index[::2] // 2] += 1
        kept = select("anchor_spread", [2] * 10, 8, rng=rng, anchor_mask_L=np.ones(20, bool))
        spread[kept.token_index[::2] // 2] += 1
    for drawn in (counts, spread):
        assert np.all(np.abs(drawn - 160) < 5 * np.sqrt(400 * 0.4 * 0.6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segment_lengths_S": []}, "essay#3: the document is empty"),
        ({"segment_lengths_S": [12]}, "essay#3: no sentence ends inside the document's 12 tokens"),
        ({"budget": 13}, "essay#3: the document has 12 tokens, fewer than the budget of 13"),
        (
            {"segment_lengths_S": [7, 0, 5]},
            "essay#3: sentence lengths must be positive integers, got 0",
        ),
        ({"budget": 0}, "budget is 0"),
        (
            {"method": "best"},
            "method 'best'; allowed: anchor, anchor_spread, digits, score, linked, weighted, random, first",
        ),
        ({"anchor_mask_L": None}, "essay#3: selection 'anchor' needs anchor_mask_L"),
        ({"anchor_mask_L": np.ones(11, bool)}, r"anchor_mask_L has shape \(11,\), .* 12 tokens"),
        ({"method": "digits"}, "'digits' needs digit_mask_L"),
        ({"method": "score"}, "'score' needs delta_L"),
        ({"method": "weighted"}, "'weighted' needs delta_L"),
        ({"method": "linked", "delta_L": np.zeros(12)}, "'linked' needs source_L"),
        (
            {"method": "score", "delta_L": np.where(np.arange(12) == 4, np.nan, 0.0)},
            "essay#3: delta_L is NaN at token 4",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "method": "anchor",
        "segment_lengths_S": [7, 5],
        "budget": 5,
        "anchor_mask_L": np.ones(12, bool),
        "rng": np.random.default_rng(0),
        "document_id": "essay#3",
    }
    with pytest.raises(UserError, match=message) as error:
        select(**arguments | change)
    assert "\n" not in str(error.value)
