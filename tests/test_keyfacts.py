"""The demonstration's language: what is true by construction must be true of every document."""

import itertools
import json
import pathlib
import re

import numpy as np
import pytest
import tokenizers

from lrjax.data import keyfacts
from lrjax.errors import UserError

KINDS = ["facts", "filler", "dialect", "copy", "periodic"]


def rows(kind, count=20, length=64, seed=0, **options):
    return list(keyfacts.documents(kind, count, length, np.random.default_rng(seed), **options))


def facts_of(row):
    """[(name, number, character span of the number)] in the order of the text."""
    return [
        (match[1], match[2], match.span(2))
        for match in re.finditer(r"key (\S+) (\S+) \.", row["text"])
    ]


def test_vocabulary_is_small_enough_for_a_model_of_99k_parameters():
    words = keyfacts.vocabulary()
    assert len(words) == len(set(words)) < 200
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    assert 95_000 < 2 * layer + 64 + 2 * 64 * len(words) < 103_000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [keyfacts.MIN_LENGTH, 11, 17, 64, 333])
def test_length_is_exact_with_the_word_level_tokenizer(kind, length, tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(
        keyfacts.write_tokenizer(tmp_path) + "/tokenizer.json"
    )
    for row in rows(kind, length=length):
        encoding = tokenizer.encode(row["text"])
        assert len(encoding.ids) == length
        assert tokenizer.decode(encoding.ids) == row["text"]
        assert keyfacts.UNKNOWN not in encoding.tokens
        starts, stops = zip(*encoding.offsets, strict=True)
        assert all(mark[0] in starts and mark[1] in stops for mark in row["marks"])


@pytest.mark.parametrize("length", [64, 512])
@pytest.mark.parametrize("pairing", ["uniform", "random"])
def test_each_query_is_answered_by_its_fact_and_marked(length, pairing):
    for row in rows("facts", length=length, pairing=pairing):
        known, queries = {}, []
        for name, number, span in facts_of(row):
            if name in known:
                assert number == known[name]
                queries.append(list(span))
            known[name] = number
        assert queries == row["marks"]
        assert len(facts_of(row)) == 2 * len(known) == 2 * len(queries) > 0


def test_share_of_facts_stays_within_its_bounds():
    shares = [8 * len(row["marks"]) / 512 for row in rows("facts", 100, 512)]
    assert 0.04 < min(shares) < 0.1 < 0.45 < max(shares) < 0.51


def test_distances_are_uniform_up_to_the_whole_document():
    distances = []
    for row in rows("facts", 200, 512, facts_share=(0.05, 0.2)):
        words, first = row["text"].split(), {}
        for index in (i for i, word in enumerate(words) if word == "key"):
            if (name := words[index + 1]) in first:
                distances.append(index - first[name])
            first.setdefault(name, index)
    quarters = np.histogram(distances, 4, (0, 512))[0] / len(distances)
    assert np.all(np.abs(quarters - 0.25) < 0.04)
    assert max(distances) > 480


def test_copies_and_periods_repeat_where_they_are_marked():
    for row in rows("copy", length=200):
        halves = re.findall(r"copy ([^.]*) = ([^.]*) \.", row["text"])
        assert halves and all(first == second for first, second in halves)
        assert [row["text"][a:b] for a, b in row["marks"]] == [second for _, second in halves]
    for row in rows("periodic"):
        [[start, stop]] = row["marks"]
        words, period = row["text"].split(), len(row["text"][:start].split())
        assert stop == len(row["text"])
        assert words[period:] == words[:-period]


def test_the_dialect_differs_from_the_filler():
    def pairs(kind):
        words = " ".join(row["text"] for row in rows(kind, 200)).split()
        return {pair for pair in itertools.pairwise(words) if "." not in pair}

    assert len(pairs("filler") & pairs("dialect")) < 0.25 * len(pairs("filler"))


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_deterministic(kind):
    assert rows(kind, seed=3) == rows(kind, seed=3) != rows(kind, seed=4)


def test_prepare_writes_each_split_independently_of_the_others(tmp_path):
    none = dict.fromkeys(keyfacts.SPLITS, 0)
    first = keyfacts.prepare(tmp_path / "a", seed=1, counts=none | {"facts": 5, "sources": 2})
    second = keyfacts.prepare(tmp_path / "b", seed=1, counts=none | {"sources": 3})
    assert set(first) == {"tokenizer", "facts", "sources"}
    assert set(second) == {"tokenizer", "sources"}
    lines = [pathlib.Path(paths["sources"]).read_text().splitlines() for paths in (first, second)]
    assert lines[0] == lines[1][:2] and len(lines[1]) == 3
    row = json.loads(lines[0][0])
    assert row["id"] == "sources-000000" and len(row["text"].split()) == 512
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "facts.jsonl",
        "sources.jsonl",
        "tokenizer",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "prose"}, "'prose'"),
        ({"kind": "facts", "pairing": "near"}, "'near'"),
        ({"kind": "facts", "length": 9}, "length_in_words is 9"),
        ({"kind": "facts", "facts_share": (0.5, 2)}, "facts_share"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        rows(**arguments)


def test_prepare_refuses_an_unknown_split(tmp_path):
    with pytest.raises(UserError, match="'fact'"):
        keyfacts.prepare(tmp_path, counts={"fact": 1})
