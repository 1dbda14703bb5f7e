"""The analysis on arrays whose answer is known: the top, the classes, what stands out and what does not."""

import itertools
import json

import numpy as np
import pytest

from lrjax.errors import UserError
from lrjax.longrecipe import impact
from lrjax.longrecipe.impact import CLASS_NAMES

NUMBER, WORD = CLASS_NAMES.index("number"), CLASS_NAMES.index("word")


def classes_of(texts):
    return [CLASS_NAMES[index] for index in impact.token_classes(texts)]


def test_significance_is_the_signed_sum_over_samples():
    delta_NL = np.array([[1.0, -2.0, np.nan], [0.5, -1.0, 3.0]], np.float32)
    np.testing.assert_allclose(impact.significance(delta_NL), [1.5, -3.0, 3.0])


def test_other_statistics_of_the_change():
    delta_NL = np.array([[1.0, -2.0, np.nan], [0.5, 1.0, 3.0]], np.float32)
    np.testing.assert_allclose(impact.significance(delta_NL, "mean"), [0.75, -0.5, 3.0])
    np.testing.assert_allclose(impact.significance(delta_NL, "absolute"), [0.75, 1.5, 3.0])
    record = {"id": "a", "delta_logit": np.float32([-1, 2]), "delta_centred": np.float32([3, 4])}
    assert impact.score_of(record, "absolute").tolist() == [1, 2]
    assert impact.score_of(record, "centred").tolist() == [3, 4]
    with pytest.raises(UserError, match=r"'a' was scored without it; set config.score.kl=True"):
        impact.score_of(record, "kl")
    with pytest.raises(UserError, match=r"analyse\.score 'best': allowed: logit, absolute"):
        impact.score_of(record, "best")


def test_top_fraction_of_all_tokens():
    delta_NL = np.array([[5, 4, 1], [3, 0, 9]], np.float32)
    valid_NL = np.array([[True, True, True], [True, True, False]])
    top_NL = impact.top_fraction_overall(delta_NL, 0.4, valid_NL)
    np.testing.assert_array_equal(top_NL, [[True, True, False], [False, False, False]])


@pytest.mark.parametrize(
    ("samples", "fraction", "count"),
    [(5, 0.2, 1), (6, 0.2, 2), (1, 0.2, 1), (10, 0.3, 3), (100, 0.07, 7)],
)
def test_top_count_at_every_position(samples, fraction, count):
    delta_NL = np.random.default_rng(0).normal(size=(samples, 8)).astype(np.float32)
    top_NL = impact.top_fraction_per_position(delta_NL, fraction)
    assert np.all(top_NL.sum(axis=0) == count)
    for position in range(8):
        inside = delta_NL[top_NL[:, position], position]
        outside = delta_NL[~top_NL[:, position], position]
        assert not len(outside) or inside.min() >= outside.max()


def test_top_breaks_ties_by_order_and_leaves_out_what_is_not_there():
    ties_NL = np.zeros((10, 1), np.float32)
    assert np.flatnonzero(impact.top_fraction_per_position(ties_NL)).tolist() == [0, 1]
    delta_NL = np.array([[9, 9], [1, np.nan], [2, 5], [3, np.nan], [4, 1]], np.float32)
    valid_NL = ~np.isnan(delta_NL)
    valid_NL[0] = False
    top_NL = impact.top_fraction_per_position(delta_NL, 0.5, valid_NL)
    np.testing.assert_array_equal(
        top_NL, [[False, False], [False, False], [False, True], [True, False], [True, False]]
    )
    assert not impact.top_fraction_per_position(delta_NL, 0.5, np.zeros((5, 2), bool)).any()


def test_token_classes_by_text():
    texts = {
        " 12": "number", "7": "number", " n3x": "number",
        " Paul": "capitalised", "The": "capitalised", " \u00c9t\u00e9": "capitalised",
        " the": "word", " na\u00efve": "word", " (see": "word", "\u4e2d\u6587": "word",
        "ing": "continuation",
        ".": "punctuation", '."': "punctuation", " \u2014": "punctuation",
        "$": "symbol", " +=": "symbol", "\u2192": "symbol",
        " ": "space", "\n\n": "space",
        "<|im_end|>": "other", "<s>": "other", "[PAD]": "other", "\ufffd": "other", "": "other", "\x00": "other",
    }  # fmt: skip
    assert dict(zip(texts, classes_of(list(texts)), strict=True)) == texts


def test_without_word_starts_in_the_vocabulary_nothing_is_a_continuation():
    assert classes_of(["key", "ada", "7", "."]) == ["word", "word", "number", "punctuation"]
    assert classes_of(["key", " ada"]) == ["continuation", "word"]


def test_class_lift_against_counts():
    # Two classes, half of the tokens each; numbers are 3 of 4 in the top.
    classes_NL = np.tile(np.array([NUMBER, WORD, NUMBER, WORD], np.int8), (20, 5))
    top_NL = np.zeros((20, 20), bool)
    top_NL[:, [0, 2, 4, 1]] = True
    by_name = {lift.name: lift for lift in impact.class_lift(classes_NL, top_NL)}
    assert set(by_name) == {"number", "word"}
    number, word = by_name["number"], by_name["word"]
    assert (number.count, number.share_all, number.share_top) == (200, 0.5, 0.75)
    assert (number.lift, word.lift) == (1.5, 0.5)
    assert 1 < number.low < 1.5 < number.high
    assert word.low < 0.5 < word.high < 1


def make(rng, samples, length, number_share, shift):
    classes_NL = np.where(rng.random((samples, length)) < number_share, NUMBER, WORD).astype(
        np.int8
    )
    delta_NL = rng.normal(size=(samples, length)) + shift * (classes_NL == NUMBER)
    return delta_NL.astype(np.float32), classes_NL


def test_analyse_finds_the_class_that_was_lifted():
    delta_NL, classes_NL = make(np.random.default_rng(0), 30, 60, 0.2, 1.5)
    analysis = impact.analyse(delta_NL, classes_NL, classes_NL == NUMBER, buckets=6)
    assert analysis["anchors"] == ["number"] and analysis["flat"] is None
    assert analysis["samples"] == 30 and analysis["tokens"] == 1800
    rows = {row["name"]: row for row in analysis["classes"]}
    assert rows["number"]["anchor"] and not rows["word"]["anchor"]
    assert rows["number"]["interval"][0] < rows["number"]["lift"] < rows["number"]["interval"][1]
    assert analysis["validation"]["auc"] == pytest.approx(0.856, abs=0.03)  # Phi(1.5 / sqrt 2)
    assert analysis["validation"]["marks"] == np.count_nonzero(classes_NL == NUMBER)
    assert analysis["significance"]["start"] == [1, 11, 21, 31, 41, 51]
    np.testing.assert_allclose(
        np.mean(analysis["significance"]["mean"]), delta_NL.sum() / 60, rtol=1e-4
    )
    assert json.loads(json.dumps(analysis, allow_nan=False)) == analysis


def test_a_flat_change_has_no_anchors_and_says_so():
    for seed in range(20):
        delta_NL, classes_NL = make(np.random.default_rng(seed), 12, 40, 0.03, 0.0)
        analysis = impact.analyse(delta_NL, classes_NL, min_lift=0.0)
        assert analysis["anchors"] == []
        assert "no token class is over-represented" in analysis["flat"]
        assert "\n" not in analysis["flat"]
    same = impact.analyse(np.ones((8, 30), np.float32), np.full((8, 30), WORD, np.int8))
    assert same["anchors"] == [] and "largest lift is 1.00 ('word'" in same["flat"]


def test_a_class_in_every_sentence_is_no_anchor_beside_one_that_tells_them_apart():
    """Two documents of three and two sentences: words in all, numbers in two of the five."""
    names = ("number", "word", "punctuation")
    classes = [np.array([1, 2, 0, 1, 2, 1, 2]), np.array([0, 1, 1, 2])]
    shares_C = impact.sentence_shares(classes, [[2, 3, 2], [2, 2]], names)
    np.testing.assert_allclose(shares_C, [2 / 5, 1, 4 / 5])

    def lift(name, sentences):
        return impact.ClassLift(name, 9, 0.1, 0.2, 2.0, 1.5, 2.5, sentences)

    everywhere, telling = lift("punctuation", 0.95), lift("number", 0.2)
    assert impact.anchor_classes([everywhere, telling]) == ["number"]
    assert impact.anchor_classes([everywhere]) == ["punctuation"]  # the best there is
    unknown = lift("punctuation", None)
    assert impact.anchor_classes([unknown, telling]) == ["punctuation", "number"]


def test_analyse_leaves_out_a_class_that_is_everywhere():
    delta_NL, classes_NL = make(np.random.default_rng(0), 30, 60, 0.2, 1.5)
    punctuation = impact.CLASS_NAMES.index("punctuation")
    classes_NL[:, ::6] = punctuation
    delta_NL[:, ::6] += 1.5
    assert impact.analyse(delta_NL, classes_NL, top="overall")["anchors"] == [
        "number",
        "punctuation",
    ]
    sentences_C = np.zeros(len(impact.CLASS_NAMES))
    sentences_C[punctuation] = 1.0
    analysis = impact.analyse(delta_NL, classes_NL, top="overall", sentences_C=sentences_C)
    assert analysis["anchors"] == ["number"]
    rows = {row["name"]: row for row in analysis["classes"]}
    assert rows["punctuation"]["lift"] > 1.2 and not rows["punctuation"]["anchor"]
    assert (rows["number"]["sentences"], rows["punctuation"]["sentences"]) == (0.0, 1.0)


def test_changes_that_say_nothing_are_in_no_figure():
    """The contrast of contexts is 0 on the first tokens, where ties would make the first samples top."""
    delta_NL, classes_NL = make(np.random.default_rng(0), 30, 60, 0.2, 1.5)
    delta_NL[:, :9] = 0.0
    unscored = impact.unscored("contrast", 10)
    assert unscored == 9 and impact.unscored("logit", 10) == impact.unscored("contrast", 0) == 0
    analysis = impact.analyse(delta_NL, classes_NL, unscored=unscored)
    alone = impact.analyse(delta_NL[:, 9:], classes_NL[:, 9:])
    assert analysis["tokens"] == alone["tokens"]
    assert analysis["classes"] == alone["classes"]
    assert analysis["flatness"] == alone["flatness"]


def test_the_share_of_the_top_is_told_where_it_is_rounded_up():
    delta_NL, classes_NL = make(np.random.default_rng(0), 30, 60, 0.2, 1.5)
    assert impact.analyse(delta_NL[:4], classes_NL[:4])["top_share"] == 0.25
    assert impact.analyse(delta_NL[:4], classes_NL[:4], top="overall")["top_share"] == 0.2


def test_one_document_alone_does_not_make_an_anchor():
    """All of a class in one of many documents: its tokens are not independent witnesses of the class."""
    delta_NL, classes_NL = make(np.random.default_rng(0), 12, 200, 0.0, 0.0)
    classes_NL[3, :3] = NUMBER
    delta_NL[3, :3] += 9
    assert impact.analyse(delta_NL, classes_NL)["anchors"] == []


def test_stacking_samples_of_different_lengths():
    delta_NL = impact.stack([np.float32([1, 2, 3]), np.float32([4])], 3)
    np.testing.assert_array_equal(delta_NL, np.float32([[1, 2, 3], [4, np.nan, np.nan]]))
    marks_NL = impact.stack([np.array([True]), np.array([False, True])], 2)
    np.testing.assert_array_equal(marks_NL, [[True, False], [False, True]])
    classes_NL = impact.stack_classes([np.array([0, 1, 0]), np.array([1])], ["7", "word"], 3)
    np.testing.assert_array_equal(classes_NL, [[NUMBER, WORD, NUMBER], [WORD, -1, -1]])
    analysis = impact.analyse(delta_NL, classes_NL)
    assert analysis["tokens"] == 4
    assert sum(row["count"] for row in analysis["classes"]) == 4


def test_auc_by_brute_force():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 6, 40), rng.random(40) < 0.3
    pairs = itertools.product(scores[labels], scores[~labels])
    expected = np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs])
    assert impact.auc(scores, labels) == pytest.approx(expected)
    assert impact.auc([0, 1, 2], [False, False, True]) == 1


def test_recall_in_top():
    assert impact.recall_in_top(
        [True, False, True, False], [True, True, True, False]
    ) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: impact.top_fraction_per_position(np.zeros((2, 2)), 0), "fraction is 0"),
        (
            lambda: impact.top_fraction_per_position(np.array([[0, np.nan]])),
            r"NaN at index \(0, 1\)",
        ),
        (lambda: impact.stack([np.float32([0, 1]), np.float32([np.nan])], 2), "sample 1: NaN"),
        (lambda: impact.stack_classes([np.array([0, 5])], ["a", "b"], 2), "token id 5; .* 0 to 1"),
        (lambda: impact.auc([1.0, 2.0], [True, True]), "2 of 2 labels"),
        (lambda: impact.recall_in_top([True], [False]), "no label"),
        (
            lambda: impact.class_lift(np.full((1, 2), -1, np.int8), np.ones((1, 2), bool)),
            "no scored tokens",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
