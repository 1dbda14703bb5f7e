"""Class frequencies against counts, and a test of flatness that is neither blind nor jumpy."""

import json

import numpy as np
import pytest

from lrjax.longrecipe import frequency

NAMES = ("a", "b", "c")


def test_shares_against_counts():
    rng = np.random.default_rng(0)
    classes_NL = rng.integers(-1, 2, (9, 40)).astype(np.int8)  # "c" does not occur
    top_NL = (rng.random((9, 40)) < 0.4) & (classes_NL >= 0)
    top_NL[:, 10:20] = False
    found = frequency.class_frequency(classes_NL, top_NL, NAMES, buckets=4, smoothing=0)
    assert found["start"] == [1, 11, 21, 31] and set(found["classes"]) == {"a", "b"}
    for index, name in enumerate(("a", "b")):
        row = found["classes"][name]
        assert row["share"][1] is row["low"][1] is row["high"][1] is None
        for bucket in (0, 2, 3):
            part = slice(10 * bucket, 10 * bucket + 10)
            inside = top_NL[:, part]
            share = (inside & (classes_NL[:, part] == index)).sum() / inside.sum()
            assert row["share"][bucket] == pytest.approx(share)
            assert row["low"][bucket] < share < row["high"][bucket]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_smoothing_joins_neighbours_and_narrows_the_interval():
    rng = np.random.default_rng(1)
    classes_NL = (rng.random((12, 64)) < 0.3).astype(np.int8)
    top_NL = rng.random((12, 64)) < 0.3

    def row(smoothing):
        found = frequency.class_frequency(
            classes_NL, top_NL, NAMES, buckets=16, smoothing=smoothing
        )
        return {key: np.array(values) for key, values in found["classes"]["b"].items()}

    plain, smooth = row(0), row(2.0)
    assert np.std(smooth["share"]) < np.std(plain["share"])
    assert np.mean(smooth["high"] - smooth["low"]) < np.mean(plain["high"] - plain["low"])


def documents(seed, lift):
    """Changes and classes that both come in runs, as in texts; class 1 is lifted."""
    rng = np.random.default_rng(seed)
    classes_NL = np.repeat(rng.integers(0, 2, (20, 15)), 4, axis=1).astype(np.int8)
    delta_NL = np.repeat(rng.normal(size=(20, 15)), 4, axis=1) + lift * (classes_NL == 1)
    top_NL = delta_NL > np.quantile(delta_NL, 0.8)
    return delta_NL, classes_NL, top_NL


def test_flatness_sees_a_lift():
    found = frequency.flatness(*documents(0, 1.0))
    assert found["p_value"] == pytest.approx(1 / 200)
    assert found["warning"] is None and found["concentration"] > 0.2


def test_flatness_is_right_by_chance():
    """At 5 % no more than about 5 % of flat changes pass, though neighbours change together."""
    p = np.array([frequency.flatness(*documents(seed, 0.0))["p_value"] for seed in range(24)])
    assert np.count_nonzero(p <= 0.05) <= 4  # P(more) = 0.6 % for 24 draws at 5 %
    assert p.std() > 0.15


def test_a_uniform_change_warns():
    classes_NL = np.tile(np.array([0, 1], np.int8), (8, 10))
    top_NL = np.zeros((8, 20), bool)
    top_NL[:2] = True
    found = frequency.flatness(np.ones((8, 20)), classes_NL, top_NL)
    assert "the change is flat" in found["warning"] and found["concentration"] == 0.25
    # Class and top go together, but every token rises alike.
    found = frequency.flatness(np.ones((8, 20)), classes_NL, classes_NL == 1)
    assert "nearly uniform" in found["warning"]
