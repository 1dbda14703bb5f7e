"""Positions: what every transform promises, that Algorithm 1 is uniform, and the distances known from simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrjax.errors import UserError
from lrjax.longrecipe import positions
from lrjax.longrecipe.positions import TRANSFORMS

GAPS = [name for name in TRANSFORMS if name != "full"]


@st.composite
def layouts(draw):
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=12))
    slack = draw(st.one_of(st.integers(0, 3), st.integers(0, 500)))
    return lengths, sum(lengths) + slack, draw(st.integers(0, 2**32 - 1))


@pytest.mark.parametrize("name", GAPS)
@settings(max_examples=60, deadline=None)
@given(layout=layouts())
def test_properties(name, layout):
    lengths, target, seed = layout
    drawn = TRANSFORMS[name](lengths, target, np.random.default_rng(seed))
    assert drawn.dtype == np.int32 and drawn.shape == (sum(lengths),)
    assert np.all(np.diff(drawn) >= 1)
    assert drawn[0] >= 0 and drawn[-1] < target
    # RPES as published is a sample of the whole window; the released code's PoSE may move the whole text.
    assert drawn[0] == 0 or name in ("rpes", "pose_code")
    again = TRANSFORMS[name](lengths, target, np.random.default_rng(seed))
    np.testing.assert_array_equal(drawn, again)


@settings(max_examples=60, deadline=None)
@given(layout=layouts())
def test_runs_of_one_inside_a_segment(layout):
    lengths, target, seed = layout
    inside = np.ones(sum(lengths), bool)
    inside[np.cumsum([0, *lengths[:-1]])] = False
    plain = positions.longrecipe(lengths, target, np.random.default_rng(seed))
    assert np.all(np.diff(plain)[inside[1:]] == 1)
    # The right point may cut one segment, nothing else; behind it the positions are those of Algorithm 1.
    cut = positions.longrecipe_code(lengths, target, np.random.default_rng(seed))
    broken = np.flatnonzero((np.diff(cut) != 1) & inside[1:])
    assert len(broken) <= 1
    assert np.all(broken + 1 <= (sum(lengths) + 1) // 2)
    half = (sum(lengths) + 1) // 2
    np.testing.assert_array_equal(cut[half:], plain[half:])
    pose = positions.pose(lengths, target, np.random.default_rng(seed))
    assert np.count_nonzero(np.diff(pose) != 1) <= 1


@settings(max_examples=60, deadline=None)
@given(layout=layouts())
def test_where_gaps_may_stand(layout):
    """Behind a sentence, or as often as the transform says."""
    lengths, target, seed = layout
    ends = np.cumsum(lengths)[:-1]

    def gaps(name):
        drawn = TRANSFORMS[name](lengths, target, np.random.default_rng(seed))
        return 1 + np.flatnonzero(np.diff(drawn) != 1)

    for name in ("uniform_slots", "power_law", "geometric", "few_gaps", "paragraphs"):
        assert np.isin(gaps(name), ends).all(), name
    assert len(gaps("few_gaps")) <= 4
    count = np.searchsorted(ends, gaps("paragraphs"))
    assert np.all(np.diff(count) % 5 == 0)
    starts = np.arange(1, len(lengths)) * sum(lengths) // len(lengths)
    assert np.isin(gaps("fixed_segments"), starts).all()
    inside = np.setdiff1d(gaps("inside_gaps"), ends)
    assert len(set(np.searchsorted(ends, inside, side="right"))) == len(inside)
    assert len(gaps("pose_code")) <= 1 and len(gaps("cream")) <= 2


@settings(max_examples=60, deadline=None)
@given(length=st.integers(2, 300), slack=st.integers(0, 9000), seed=st.integers(0, 2**32 - 1))
def test_cream_holds_both_ends_of_the_window(length, slack, seed):
    drawn = positions.cream([length], length + slack, np.random.default_rng(seed))
    assert drawn[0] == 0 and drawn[-1] == length + slack - 1
    for end in {max(1, length // 3), min(max(1, length // 3), 32)}:
        if np.all(np.diff(drawn[:end]) == 1) and np.all(np.diff(drawn[length - end :]) == 1):
            break
    else:
        raise AssertionError("neither short ends nor thirds")


def test_pose_of_the_released_code_skips_nothing_in_57_percent():
    rng = np.random.default_rng(0)
    plain = [positions.pose_code([24_000], 80_000, rng)[-1] == 23_999 for _ in range(1000)]
    assert np.mean(plain) == pytest.approx(1 - 24_000 / 56_001, abs=0.05)


def test_largest_gaps_by_how_the_slack_is_shared():
    """Of near-equal gaps, of Algorithm 1 and of the heavy tails: what makes them different distributions."""
    lengths, target = [40] * 250, 50_000
    rng = np.random.default_rng(0)
    largest = {
        name: np.mean([np.diff(TRANSFORMS[name](lengths, target, rng)).max() for _ in range(40)])
        for name in ("uniform_slots", "longrecipe", "power_law", "geometric")
    }
    # The mean gap is 160: Poisson; exponential, whose largest of 250 is ln(250) + 0.58 means; half the slack.
    assert largest["uniform_slots"] < 1.5 * 160
    assert largest["longrecipe"] == pytest.approx(160 * (np.log(250) + 0.58), rel=0.15)
    assert largest["power_law"] > 2 * largest["longrecipe"]
    assert largest["geometric"] == pytest.approx(20_000, rel=0.05)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9), seed=st.integers(0, 999))
def test_no_slack_leaves_no_choice(lengths, seed):
    for transform in TRANSFORMS.values():
        drawn = transform(lengths, sum(lengths), np.random.default_rng(seed))
        np.testing.assert_array_equal(drawn, np.arange(sum(lengths)))


def test_algorithm_1_is_uniform_over_the_arrangements():
    lengths, target = [2, 1, 3, 1], 7 + 4
    rng = np.random.default_rng(0)
    starts = np.cumsum([0, *lengths[:-1]])
    counts = {}
    draws = 7000
    for _ in range(draws):
        key = tuple((positions.longrecipe(lengths, target, rng)[starts] - starts).tolist())
        counts[key] = counts.get(key, 0) + 1
    expected = set(itertools.combinations_with_replacement(range(5), 3))
    assert len(expected) == math.comb(4 + 3, 3) == 35
    assert {key[1:] for key in counts} == expected
    mean = draws / 35
    chi_square = sum((count - mean) ** 2 / mean for count in counts.values())
    assert chi_square < 65.2  # 34 degrees of freedom, p = 0.001


def test_right_point_is_uniform_over_the_first_half():
    # PoSE has at most one gap, and it stands at rt.
    rng = np.random.default_rng(0)
    counts = np.zeros(6, int)
    for _ in range(3000):
        drawn = positions.pose([9], 10_000, rng)
        gap = np.flatnonzero(np.diff(drawn) != 1)
        counts[gap[0] + 1 if len(gap) else 0] += 1
    assert counts[0] < 10  # u = 0: one in 9,992
    assert np.all(np.abs(counts[1:] - 600) < 5 * math.sqrt(600))


@pytest.fixture(scope="module")
def reference():
    """Each transform at T = 80k, L = 24k with sentences of 88 tokens on average: the paper's first setting."""
    rng = np.random.default_rng(0)

    def drawn(transform):
        for _ in range(300):
            cuts = np.sort(rng.choice(np.arange(1, 24_000), 24_000 // 88 - 1, replace=False))
            yield transform(np.diff([0, *cuts, 24_000]), 80_000, rng)

    return {
        name: positions.describe(drawn(TRANSFORMS[name]))
        for name in ("longrecipe", "longrecipe_code", "rpes", "pose")
    }


@pytest.mark.parametrize(
    ("name", "distance", "run"),
    [
        ("rpes", 26_694, 1.43),
        ("longrecipe", 26_627, 88),
        ("longrecipe_code", 28_970, None),
        ("pose", (80_000 + 24_000) / 6, None),
    ],
)
def test_reference_figures(reference, name, distance, run):
    assert reference[name]["mean_distance"] == pytest.approx(distance, rel=0.03)
    if run is not None:
        assert reference[name]["mean_run"] == pytest.approx(run, rel=0.03)


def test_far_half_of_the_window_is_used(reference):
    # The released code computes positions before its filter: its mean maximum is 45k of 80k.
    assert reference["longrecipe"]["mean_max"] > 79_000
    assert reference["longrecipe_code"]["mean_max"] > 79_000
    assert reference["rpes"]["mean_max"] > 79_000


def test_describe_by_brute_force():
    rows = [np.array([0, 1, 2, 7, 8], np.int32), np.array([3], np.int32)]
    pairs = [b - a for a, b in itertools.combinations(rows[0].tolist(), 2)]
    described = positions.describe(rows)
    assert described["mean_distance"] == pytest.approx((np.mean(pairs) + 0) / 2)
    assert described["mean_run"] == pytest.approx((5 / 2 + 1) / 2)
    assert described["mean_max"] == pytest.approx((8 + 3) / 2)


def test_coverage_by_brute_force():
    rows = [np.array([0, 1, 9], np.int32), np.array([0, 5], np.int32)]
    covered = positions.coverage(rows, 10, bins=2)
    assert covered["positions"] == pytest.approx([3 / 5, 2 / 5])
    assert covered["distances"] == pytest.approx([1 / 4, 3 / 4])  # 1, 9, 8 and 5
    with pytest.raises(UserError, match="no positions"):
        positions.coverage([], 10)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize(
    ("lengths", "target", "message"),
    [
        ([], 10, "at least one token count"),
        ([[1, 2]], 10, "shape"),
        ([3, 0, 2], 10, r"segment_lengths\[1\] is 0"),
        ([3, -1], 10, r"segment_lengths\[1\] is -1"),
        ([1.5, 2.0], 10, "integers"),
        ([6, 5], 10, "11 tokens, more than target_length 10"),
        ([1], 0, "target_length is 0"),
        ([1], 2**31, "target_length is 2147483648"),
    ],
)
def test_bad_input_is_named(name, lengths, target, message):
    with pytest.raises(UserError, match=message) as error:
        TRANSFORMS[name](lengths, target, np.random.default_rng(0))
    assert "\n" not in str(error.value)


def test_full_needs_the_whole_window():
    with pytest.raises(UserError, match=r"9 tokens.*target_length 10"):
        positions.full([4, 5], 10, np.random.default_rng(0))
