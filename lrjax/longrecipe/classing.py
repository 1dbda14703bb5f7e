"""The ways to sort tokens into classes, for the analysis and for selection by class.

    classing = make_classing("text", tokenizer.token_texts())
    classing.names, classing.of(tokens_L)                    # int8 [L], indices into the names

| kind   | classes                                                                   | from                         |
|--------|---------------------------------------------------------------------------|------------------------------|
| text   | digits, capitals, words and what goes on with them, punctuation, symbols  | the token alone (`impact`)   |
| copied | repeated from at least a window back, from nearer, or new                 | the document (`references`)  |
| upos   | Universal parts of speech                                                 | a tagger (`tagging`)         |
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lrjax.errors import UserError
from lrjax.longrecipe import impact, references, tagging

KINDS = ("text", "copied", "upos")


class Classing(NamedTuple):
    """The classes' names, and the function from a document's tokens [L] to their classes, int8 [L]."""

    names: tuple[str, ...]
    of: Callable[[np.ndarray], np.ndarray]


def make_classing(
    kind: str, token_texts: Sequence[str], *, window: int = 0, tagger: tagging.Tagger | None = None
) -> Classing:
    """The classing of a kind in `KINDS`.

    Args:
        token_texts: of every token id (`Tokenizer.token_texts`).
        window: copied: tokens back that count as far.
        tagger: upos: by default spaCy's.

    Raises:
        UserError: an unknown kind, no window for "copied", no tagger installed.
    """
    if kind == "text":
        table_V = impact.token_classes(token_texts)
        return Classing(impact.CLASS_NAMES, lambda tokens_L: table_V[tokens_L])
    if kind == "copied":
        if window < 1:
            raise UserError(f"classes 'copied': window is {window}; allowed: 1 and more")
        return Classing(
            references.COPY_NAMES, lambda tokens_L: references.copy_classes(tokens_L, window)
        )
    if kind == "upos":
        tagger = tagger or tagging.spacy_tagger()

        def parts_of_speech(tokens_L):
            text, offsets_L2 = tagging.surface(token_texts, tokens_L)
            return tagging.align(offsets_L2, tagger(text))

        return Classing(tagging.UPOS, parts_of_speech)
    raise UserError(f"analyse.classes {kind!r}: allowed: {', '.join(KINDS)}")
