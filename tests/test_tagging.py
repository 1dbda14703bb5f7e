"""Tags of words on sub-word tokens, with a plain tagger, and with spaCy where it is installed."""

import importlib.util
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrjax.errors import UserError
from lrjax.longrecipe import classing, tagging
from lrjax.longrecipe.tagging import UPOS

NUM, NOUN, PUNCT = map(UPOS.index, ("NUM", "NOUN", "PUNCT"))


def plain_tagger(text):
    """Numbers, words, signs."""
    kinds = {"number": NUM, "word": NOUN, "sign": PUNCT}
    found = re.finditer(r"(?P<number>\d+)|(?P<word>[a-z]+)|(?P<sign>[^\w\s])", text)
    return [(match.start(), match.end(), kinds[match.lastgroup]) for match in found]


def test_sub_words_take_the_tag_of_their_word():
    texts = [" un", "usual", " 12", "34", ".\n", "\n", " a1", ""]
    made = classing.make_classing("upos", texts, tagger=plain_tagger)
    tags = [UPOS[tag] for tag in made.of(np.arange(8))]
    # " a1" lies half in each word: the first counts. White space and nothing at all are in no word.
    assert tags == ["NOUN", "NOUN", "NUM", "NUM", "PUNCT", "SPACE", "NOUN", "SPACE"]


def test_whole_word_vocabularies_are_read_with_spaces():
    text, offsets = tagging.surface(["key", "7", "."], [0, 1, 2, 0])
    assert text == "key 7 . key"
    assert [text[a:b] for a, b in offsets] == ["key", "7", ".", "key"]


@settings(max_examples=80, deadline=None)
@given(
    words=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=8),
    cuts=st.lists(st.integers(0, 40), max_size=12),
)
def test_alignment_against_a_plain_count(words, cuts):
    spans, at = [], 0
    for index, (gap, length) in enumerate(words):
        spans.append((at + gap, at + gap + length, index))
        at += gap + length
    borders = sorted({0, 41, *cuts})
    offsets = np.stack([borders[:-1], borders[1:]], axis=1)
    tags = tagging.align(offsets, spans)
    for (start, end), tag in zip(offsets, tags, strict=True):
        shared = [max(0, min(end, b) - max(start, a)) for a, b, _ in spans]
        best = int(np.argmax(shared)) if any(shared) else tagging.SPACE
        assert tag == best


def test_long_texts_are_cut_at_sentences():
    text = "One two. " * 50 + "x" * 300 + " end"
    parts = list(tagging.pieces(text, 100))
    assert "".join(part for _, part in parts) == text
    assert [start for start, _ in parts] == np.cumsum([0, *(len(p) for _, p in parts)])[
        :-1
    ].tolist()
    assert all(len(part) <= 100 for _, part in parts[:-1])


def test_without_spacy_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "spacy", None)
    tagging.spacy_tagger.cache_clear()
    with pytest.raises(UserError, match=r"pip install -r requirements-analysis\.txt"):
        tagging.spacy_tagger()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec(tagging.SPACY_MODEL) is None, reason="requirements-analysis.txt"
)
def test_spacy_on_sub_words():
    tagging.spacy_tagger.cache_clear()
    texts = [
        "He",
        " has",
        " been",
        " run",
        "ning",
        " since",
        " 19",
        "99",
        ",",
        " for",
        " $",
        "5",
        ".",
    ]
    made = classing.make_classing("upos", texts)
    tags = [UPOS[tag] for tag in made.of(np.arange(len(texts)))]
    assert tags == [
        "PRON", "AUX", "AUX", "VERB", "VERB", "SCONJ", "NUM", "NUM", "PUNCT", "ADP", "SYM", "NUM", "PUNCT",
    ]  # fmt: skip
