"""Copies against a plain search, and what a selection keeps of both ends of a reference."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrjax.data import keyfacts
from lrjax.errors import UserError
from lrjax.longrecipe import classing, references


@settings(max_examples=80, deadline=None)
@given(tokens=st.lists(st.integers(0, 3), max_size=40), ngram=st.integers(1, 4))
def test_copies_against_a_search(tokens, ngram):
    found = references.copies(np.array(tokens, np.int32), ngram)
    grams = {}
    for end in range(len(tokens)):
        gram = tuple(tokens[end - ngram + 1 : end + 1]) if end >= ngram - 1 else None
        assert found[end] == (grams.get(gram, -1) if gram else -1)
        grams[gram] = end


def test_answers_of_keyfacts_have_their_fact_as_source():
    vocabulary = {word: index for index, word in enumerate(keyfacts.vocabulary())}
    for row in keyfacts.documents("facts", 5, 200, np.random.default_rng(0)):
        words = row["text"].split(" ")
        source_L = references.copies(np.array([vocabulary[word] for word in words]))
        starts = np.cumsum([0, *(len(word) + 1 for word in words)])
        for start, _ in row["marks"]:
            answer = int(np.searchsorted(starts, start))
            source = source_L[answer]
            assert 0 <= source < answer
            assert words[source - 2 : source + 1] == words[answer - 2 : answer + 1]


def test_count_kept():
    source_L = np.array([-1, -1, 0, 1, -1, 0])
    kept = references.count_kept(np.array([0, 2, 3]), source_L, source_L >= 0)
    assert kept == {"references": 3, "kept": 2, "with_source": 1, "source_only": 1}
    with pytest.raises(UserError, match="no source"):
        references.count_kept(np.array([0]), source_L, np.ones(6, bool))


def test_classing_by_copies():
    made = classing.make_classing("copied", [], window=4)
    tokens = np.array([5, 6, 7, 5, 6, 7, 1, 2, 5, 6, 7])
    names = [made.names[index] for index in made.of(tokens)]
    assert names == ["new"] * 5 + ["copied_near"] + ["new"] * 4 + ["copied_far"]
    with pytest.raises(UserError, match="window is 0"):
        classing.make_classing("copied", [])
    with pytest.raises(UserError, match="classes 'best': allowed: text, copied, upos"):
        classing.make_classing("best", [])
