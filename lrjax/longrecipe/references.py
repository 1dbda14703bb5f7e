"""Which tokens repeat what stands further up, where from, and what a selection keeps of both ends.

    source_L = copies(tokens_L, ngram=3)                  # -1, or the index of the token that this one repeats
    far_L    = is_far(source_L, window)
    kept     = count_kept(selection.token_index, source_L, far_L)

A logit that rises marks the token that is retrieved, not the sentence it is retrieved from. A selection that keeps
the one and drops the other trains the model to answer from nothing; `count_kept` tells how often that happens.
"""

import numpy as np
from jaxtyping import Bool, Int8, Int32

from lrjax.errors import UserError

COPY_NAMES = ("copied_far", "copied_near", "new")


def copies(tokens_L: Int32[np.ndarray, "L"], ngram: int = 3) -> Int32[np.ndarray, "L"]:
    """For each token the end of the latest earlier occurrence of the `ngram` tokens that end with it; -1 for none.

    Raises `UserError` for an `ngram` below 1.
    """
    if ngram < 1:
        raise UserError(f"copies: ngram is {ngram}; allowed: 1 and more")
    tokens_L = np.asarray(tokens_L)
    source_L = np.full(len(tokens_L), -1, np.int32)
    if len(tokens_L) <= ngram:
        return source_L
    # An id for each n-gram: pairs of the id so far and the next token, numbered anew each time.
    gram_G = np.unique(tokens_L, return_inverse=True)[1].astype(np.int64)
    token_L, kinds = gram_G, int(gram_G.max()) + 1
    for step in range(1, ngram):
        pair_G = gram_G[:-1] * kinds + token_L[step:]
        gram_G = np.unique(pair_G, return_inverse=True)[1].astype(np.int64)
    order = np.argsort(gram_G, kind="stable")
    same = gram_G[order[1:]] == gram_G[order[:-1]]
    source_L[order[1:][same] + ngram - 1] = order[:-1][same] + ngram - 1
    return source_L


def is_far(source_L: Int32[np.ndarray, "L"], window: int) -> Bool[np.ndarray, "L"]:
    """Which tokens have a source at least `window` tokens back."""
    return (source_L >= 0) & (np.arange(len(source_L)) - source_L >= window)


def copy_classes(tokens_L, window: int, ngram: int = 3) -> Int8[np.ndarray, "L"]:
    """The class (an index into `COPY_NAMES`) of every token: repeated from afar, from near, or new."""
    source_L = copies(tokens_L, ngram)
    return np.where(source_L < 0, 2, np.where(is_far(source_L, window), 0, 1)).astype(np.int8)


def count_kept(
    token_index: Int32[np.ndarray, "budget"], source_L, reference_L: Bool[np.ndarray, "L"]
) -> dict[str, int]:
    """What a selection keeps of a document's references.

    Args:
        token_index: the kept tokens.
        source_L: as `copies` gives it, -1 for none.
        reference_L: the tokens to look at; each needs a source.

    Returns:
        {"references", "kept": those whose token is kept, "with_source": and whose source is, "source_only"}.
    """
    kept_L = np.zeros(len(source_L), bool)
    kept_L[token_index] = True
    ends = np.flatnonzero(reference_L)
    if (source_L[ends] < 0).any():
        raise UserError("count_kept: a reference has no source; allowed: tokens with a source")
    end, source = kept_L[ends], kept_L[source_L[ends]]
    return {
        "references": len(ends),
        "kept": int(end.sum()),
        "with_source": int((end & source).sum()),
        "source_only": int((~end & source).sum()),
    }
