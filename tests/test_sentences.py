"""Sentence spans cover any text in order, and every token of any tokenizer is counted in one sentence."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrjax.data.sentences import segment_lengths, sentence_spans

# Text with many stops, digits, quotes, line breaks and characters of 1 to 4 bytes.
TEXT = st.text(alphabet=st.sampled_from(".?!\n\r 09aZé\u3002\u201d\"')]=\U0001f600"), max_size=60)


def sentences(text):
    return [text[start:end] for start, end in sentence_spans(text)]


def byte_offsets(text):
    """Offsets of a byte tokenizer: each byte spans the character it is a part of."""
    rows = [(i, i + 1) for i, character in enumerate(text) for _ in character.encode()]
    return np.asarray(rows, np.int32).reshape(-1, 2)


@given(st.one_of(TEXT, st.text()))
def test_spans_cover_the_text_in_order(text):
    spans = sentence_spans(text)
    assert spans.dtype == np.int32
    assert spans.shape[1:] == (2,)
    assert (spans[:, 0] < spans[:, 1]).all()
    assert "".join(sentences(text)) == text


@given(TEXT)
def test_no_sentence_is_only_white_space_in_a_text_that_is_not(text):
    if text.strip():
        assert all(sentence.strip() for sentence in sentences(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("no stop", ["no stop"]),
        ("One. Two? Three! Four", ["One. ", "Two? ", "Three! ", "Four"]),
        ("key Ada 17 . rain fell .", ["key Ada 17 . ", "rain fell ."]),
        ("Pi is 3.14, a != b in os.path.", ["Pi is 3.14, a != b in os.path."]),
        ('"Yes!" (He left.) So', ['"Yes!" ', "(He left.) ", "So"]),
        ("line\nline\r\n\n last", ["line\n", "line\r\n\n ", "last"]),
        ("\n \nA. B", ["\n \nA. ", "B"]),
        ("Wait... what?! No", ["Wait... ", "what?! ", "No"]),
        ("\u4f60\u597d\u3002\u518d\u89c1\u3002", ["\u4f60\u597d\u3002", "\u518d\u89c1\u3002"]),
        (" \n ", [" \n "]),
    ],
)
def test_where_sentences_end(text, expected):
    assert sentences(text) == expected


@given(TEXT, st.data())
def test_lengths_count_every_token_once(text, data):
    """Tokens of any cut: of single bytes, or of several characters across sentence borders."""
    if data.draw(st.booleans(), label="bytes"):
        offsets = byte_offsets(text)
    else:
        cuts = data.draw(st.sets(st.integers(1, max(1, len(text) - 1))), label="cuts")
        edges = sorted({0, *(cut for cut in cuts if cut < len(text)), len(text)})
        offsets = np.asarray(list(itertools.pairwise(edges)), np.int32).reshape(-1, 2)
    spans = sentence_spans(text)
    lengths = segment_lengths(offsets, spans)
    assert lengths.dtype == np.int32
    assert lengths.sum() == len(offsets)
    assert (lengths > 0).all()
    owners = np.repeat(np.arange(len(lengths)), lengths)
    expected = [next(s for s, (a, b) in enumerate(spans) if a <= start < b) for start, _ in offsets]
    np.testing.assert_array_equal(np.unique(expected, return_inverse=True)[1], owners)


def test_a_token_across_a_border_belongs_to_the_sentence_in_which_it_starts():
    spans = sentence_spans("One. Two. Three.")
    offsets = np.array([[0, 3], [3, 6], [6, 9], [9, 16]], np.int32)  # ". T" starts in the first
    np.testing.assert_array_equal(
        segment_lengths(offsets, spans), [2, 2]
    )  # none starts in "Three."


def test_special_tokens_without_a_span_stay_where_they_stand():
    spans = sentence_spans("One. Two.")
    offsets = np.array([[0, 0], [0, 4], [5, 9], [0, 0], [9, 9]], np.int32)
    np.testing.assert_array_equal(segment_lengths(offsets, spans), [2, 3])


@pytest.mark.parametrize("unit", ["The quick fox, 3.14. ", ".", ".a", "\n", '."', "?! "])
def test_time_is_linear_in_the_text(unit):
    text = unit * (1_000_000 // len(unit)) + "a"
    start = time.process_time()
    spans = sentence_spans(text)
    segment_lengths(spans, spans)
    assert time.process_time() - start < 5  # 0.1 s on an idle core; quadratic would be hours
