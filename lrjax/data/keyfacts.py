"""The language of the tiny demonstration: facts to remember among filler, one word a token, generated on the spot.

A document is sentences of words. A fact `key NAME NUMBER .` occurs twice: once as the fact and once, later, as
the query of the same form, whose NUMBER can only be known from the fact. Each such number is a mark, so a scorer
of long-range dependency can be checked against what is true by construction. Around the facts stand filler
sentences of a Markov chain. Documents of a second chain (the dialect) and of copying sentences serve to see
what an extension forgets, and periodic random words teach a new model to look back at all.

    write_tokenizer("tokenizer")                                   # a directory with tokenizer.json
    for row in documents("facts", 10, 512, np.random.default_rng(0)):
        row["id"], row["text"], row["marks"]
    paths = prepare("data", seed=0, window=64, target=512)         # {"facts": "data/facts.jsonl", ...}
"""

import itertools
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from lrjax.errors import UserError

EOS = "<eos>"
UNKNOWN = "<unk>"
_NAMES_TEXT = """
    Ada Alan Alma Amir Anna Anton Astrid Basil Bela Bruno Carla Cecil Chloe Clara Cyrus Dana Daria
    Denis Dora Edgar Edith Elias Elsa Emil Enzo Erik Esther Eva Felix Fiona Flora Frida Gina Greta Hana
    Hugo Ida Igor Ines Ivan Jana Jonas Julia Karl Kira Lars Lena Leo Lina Luis Mara Marta Milo Nadia
    Nils Nora Olga Oscar Paula Rosa Simon Tara Vera Viktor
"""
NUMBERS = tuple(str(number) for number in range(10, 50))
_FILLER_TEXT = """
    a about above after again all along always an and any around as at away back before behind below
    between but by came child cold dark day deep door down early earth every far field fire for from
    garden gave grass green hand he high hill home house in into it kept lake late leaf light little
    long made moon more morning near never night of old on once over path quiet rain river road sea she
    slow small snow stone the then they tree walked
"""
NAMES = tuple(_NAMES_TEXT.split())
FILLER = tuple(_FILLER_TEXT.split())

MIN_LENGTH = 10  # words: one fact, its query, and room for a filler sentence
_FACT_WORDS = 4  # key NAME NUMBER .
_SUCCESSOR_PERCENT = (40, 25, 15, 10, 6, 4)  # how likely each of a word's six successors is


def vocabulary() -> list[str]:
    """Every word of the language; a word's index is its token id."""
    return [EOS, UNKNOWN, "key", "copy", "=", ".", *NAMES, *NUMBERS, *FILLER]


def write_tokenizer(directory: str | os.PathLike) -> str:
    """Writes `tokenizer.json` (one token per word, split at white space) and its config; returns the directory."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {word: index for index, word in enumerate(vocabulary())}, unk_token=UNKNOWN
        )
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([EOS, UNKNOWN])
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return str(directory)


def documents(
    kind: str,
    count: int,
    length_in_words: int,
    rng: np.random.Generator,
    facts_share: tuple[float, float] = (0.05, 0.5),
    pairing: str = "uniform",
    name: str | None = None,
) -> Iterator[dict]:
    """Yields `count` documents of exactly `length_in_words` words (= tokens).

    Args:
      kind: "facts"; "filler" (the first chain alone); "dialect" (the second chain); "copy" (sentences
        `copy a b c = a b c .`); "periodic" (a run of random words repeated to the end).
      rng: the only source of chance: the same state gives the same documents.
      facts_share: bounds of the share of words that belong to facts and queries, drawn per document.
      pairing: how far back a query's fact lies. "uniform": all distances up to the whole document are equally
        likely. "random": the two stand at two random places, so short distances are more frequent.
      name: prefix of the ids, by default the kind.

    Returns:
      Rows {"id", "text", "marks"}; marks are character spans [start, stop) of words that follow from what
      stands before: the numbers of queries, the second half of a copy, all periods after the first.

    Raises:
      UserError: an unknown kind or pairing, a length below MIN_LENGTH, or bounds that are no shares.
    """
    makers = {
        "facts": lambda: _facts(length_in_words, rng, facts_share, pairing),
        "filler": lambda: _plain(length_in_words, rng, _CHAIN),
        "dialect": lambda: _plain(length_in_words, rng, _DIALECT_CHAIN),
        "copy": lambda: _copies(length_in_words, rng),
        "periodic": lambda: _periodic(length_in_words, rng),
    }
    if kind not in makers:
        raise UserError(f"keyfacts: kind {kind!r} is unknown; allowed: {', '.join(makers)}")
    if pairing not in ("uniform", "random"):
        raise UserError(f"keyfacts: pairing {pairing!r} is unknown; allowed: uniform, random")
    if length_in_words < MIN_LENGTH:
        raise UserError(
            f"keyfacts: length_in_words is {length_in_words}; at least {MIN_LENGTH} is needed"
        )
    if not 0 <= facts_share[0] <= facts_share[1] <= 1:
        raise UserError(
            f"keyfacts: facts_share is {facts_share}; two rising shares in [0, 1] are needed"
        )
    # A generator of its own, so that the checks above speak at the call and not at the first document.
    return (_row(f"{name or kind}-{index:06d}", makers[kind]()) for index in range(count))


# What `prepare` writes: name -> (kind, which of the two lengths, number of documents).
SPLITS = {
    "periodic": ("periodic", "window", 4000),
    "facts": ("facts", "window", 8000),
    "dialect": ("dialect", "window", 2000),
    "copy": ("copy", "window", 2000),
    "sources": ("facts", "target", 2400),
    "replay_facts": ("facts", "window", 1000),
    "replay_dialect": ("dialect", "window", 1000),
    "replay_copy": ("copy", "window", 1000),
    "haystack": ("filler", "target", 200),
    "test_sources": ("facts", "target", 200),
    "test_facts": ("facts", "window", 200),
    "test_dialect": ("dialect", "window", 200),
    "test_copy": ("copy", "window", 200),
}


def prepare(
    out_dir: str | os.PathLike,
    *,
    seed: int = 0,
    window: int = 64,
    target: int = 512,
    counts: Mapping[str, int] | None = None,
    facts_share: tuple[float, float] = (0.05, 0.5),
    pairing: str = "uniform",
    long_facts_share: tuple[float, float] = (0.05, 0.3),
    long_pairing: str = "random",
) -> dict[str, str]:
    """Writes every split of `SPLITS` as `out_dir/SPLIT.jsonl`, and the tokenizer; returns the paths by name.

    A split depends on (seed, its name) alone: changing the size of one leaves the others as they were.

    Args:
      seed: of the documents; the language itself (words, chains) is the same for every seed.
      window, target: lengths in words of the short and the long documents.
      counts: number of documents of the splits that shall differ from `SPLITS`; 0 leaves a split out.
      facts_share, pairing: of the short documents, as in `documents`.
      long_facts_share, long_pairing: of the long ones. With up to 30 % all facts fit into 30 % of the tokens, and
        what stands beside them in a selection is filler, as in the documents.

    Raises:
      UserError: a split in `counts` that does not exist, or what `documents` refuses.
    """
    counts = dict(counts or {})
    if unknown := sorted(set(counts) - set(SPLITS)):
        raise UserError(f"keyfacts: counts names {unknown[0]!r}; allowed: {', '.join(SPLITS)}")
    directory = Path(out_dir)
    directory.mkdir(parents=True, exist_ok=True)
    paths = {"tokenizer": write_tokenizer(directory / "tokenizer")}
    for split, (kind, length, default_count) in SPLITS.items():
        count = counts.get(split, default_count)
        if not count:
            continue
        rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
        if length == "window":
            rows = documents(kind, count, window, rng, facts_share, pairing, name=split)
        else:
            rows = documents(kind, count, target, rng, long_facts_share, long_pairing, name=split)
        path = directory / f"{split}.jsonl"
        partial = path.with_suffix(".partial")
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        partial.replace(path)
        paths[split] = str(path)
    return paths


def _chain(seed: int) -> list[list[str]]:
    """A Markov chain as a table: for each filler word 100 next words, each as often as its per cent."""
    rng = np.random.default_rng(seed)
    return [
        np.repeat(
            rng.choice(FILLER, len(_SUCCESSOR_PERCENT), replace=False), _SUCCESSOR_PERCENT
        ).tolist()
        for _ in FILLER
    ]


# The language is fixed: these seeds are part of it and have nothing to do with the seed of a run.
_CHAIN = _chain(1)
_DIALECT_CHAIN = _chain(2)
_FILLER_INDEX = {word: index for index, word in enumerate(FILLER)}


def _filler_sentence(length: int, rng: np.random.Generator, chain: list[list[str]]) -> list[str]:
    """`length` words of the chain, the full stop among them."""
    words = [FILLER[rng.integers(len(FILLER))]]
    for draw in rng.integers(100, size=length - 2).tolist():
        words.append(chain[_FILLER_INDEX[words[-1]]][draw])
    return [*words, "."]


def _filler_sentences(
    length: int, rng: np.random.Generator, chain: list[list[str]]
) -> list[list[str]]:
    """Filler sentences of 4 to 9 words, `length` words in all (any length but 1)."""
    sentences = []
    while length:
        size = int(rng.integers(4, 10))
        if length - size < 4:  # what is left could not be a sentence
            size = length if length <= 9 else length - 4
        sentences.append(_filler_sentence(size, rng, chain))
        length -= size
    return sentences


def _joined(sentences: list[list[str]]) -> list[str]:
    return list(itertools.chain.from_iterable(sentences))


# The makers return a document's words and the indices of the words that follow from what stands before.
def _facts(
    length: int, rng: np.random.Generator, share: tuple[float, float], pairing: str
) -> tuple[list[str], list[int]]:
    pair_words = 2 * _FACT_WORDS
    pairs = round(rng.uniform(*share) * length / pair_words)
    pairs = min(max(pairs, 1), len(NAMES), length // pair_words)
    if length - pairs * pair_words == 1:  # a full stop alone is no sentence
        pairs -= 1
    names = rng.permutation(NAMES)[:pairs].tolist()
    numbers = rng.choice(NUMBERS, pairs).tolist()
    fillers = _filler_sentences(length - pairs * pair_words, rng, _CHAIN)

    # Every sentence gets a time in [0, 1]; the document is the sentences in the order of their times.
    if pairing == "uniform":
        gap = rng.uniform(size=pairs)
        fact_times = rng.uniform(size=pairs) * (1 - gap)
        query_times = fact_times + gap
    else:
        fact_times, query_times = np.sort(rng.uniform(size=(2, pairs)), axis=0)
    times = np.concatenate([fact_times, query_times, rng.uniform(size=len(fillers))])
    facts = [["key", name, number, "."] for name, number in zip(names, numbers, strict=True)]
    sentences = [*facts, *facts, *fillers]
    words, marks = [], []
    for index in np.argsort(times, kind="stable").tolist():
        if pairs <= index < 2 * pairs:
            marks.append(len(words) + 2)
        words += sentences[index]
    return words, marks


def _plain(
    length: int, rng: np.random.Generator, chain: list[list[str]]
) -> tuple[list[str], list[int]]:
    return _joined(_filler_sentences(length, rng, chain)), []


def _copies(length: int, rng: np.random.Generator) -> tuple[list[str], list[int]]:
    words, marks = [], []
    # 3 to 8 words twice and three signs: at most 19, so at least three words are left for the last sentence.
    while length - len(words) > 21:
        original = rng.choice(FILLER, rng.integers(3, 9)).tolist()
        words += ["copy", *original, "=", *original, "."]
        marks += range(len(words) - 1 - len(original), len(words) - 1)
    return words + _joined(_filler_sentences(length - len(words), rng, _CHAIN)), marks


def _periodic(length: int, rng: np.random.Generator) -> tuple[list[str], list[int]]:
    period = int(rng.integers(2, length // 2 + 1))
    words = rng.choice(vocabulary()[2:], period).tolist()  # all but the two special tokens
    return (words * (length // period + 1))[:length], list(range(period, length))


def _row(identifier: str, document: tuple[list[str], list[int]]) -> dict:
    """The words joined by spaces; marked words that touch become one span."""
    words, marked = document
    starts = np.cumsum([0, *(len(word) + 1 for word in words)]).tolist()
    marks: list[list[int]] = []
    for index in marked:
        start, stop = starts[index], starts[index] + len(words[index])
        if marks and marks[-1][1] + 1 == start:
            marks[-1][1] = stop
        else:
            marks.append([start, stop])
    return {"id": identifier, "text": " ".join(words), "marks": marks}
