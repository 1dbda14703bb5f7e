"""Perplexity and LongPPL of any texts: what a checkpoint is not asked but reads.

    found = read(("perplexity", "longppl"), config, params, tokenizer, texts, lengths=(2048, 8192), documents=8)
    found["perplexity"]["buckets"], found["longppl"]["longppl"]

The texts are joined and cut into documents of the longest length.
"""

from collections.abc import Sequence

import numpy as np

from lrjax.errors import UserError
from lrjax.evaluation.longppl import longppl
from lrjax.evaluation.perplexity import perplexity_by_position, sliding_window

NAMES = ("perplexity", "longppl")


def read(
    names: Sequence[str],
    config,
    params,
    tokenizer,
    texts: Sequence[str],
    *,
    lengths: Sequence[int],
    documents: int,
    window: int = 0,
    stride: int = 512,
    key_context: int = 4096,
) -> dict:
    """{name: result} of the readings that are named.

    Args:
      texts: read in order.
      lengths: ends of the buckets of positions; the largest is a document's length.
      documents: most documents.
      window, stride: also perplexity with a sliding window; 0: not.
      key_context: short context of LongPPL, in tokens.

    Raises:
      UserError: no text of the longest length; see `perplexity_by_position`, `sliding_window` and `longppl`.
    """
    edges = sorted(set(lengths))
    pieces = joined(tokenizer, texts, edges[-1], documents)
    found: dict[str, dict] = {}
    if "perplexity" in names:
        found["perplexity"] = perplexity_by_position(config, params, pieces, edges)
        if window:
            found["perplexity"]["sliding_window"] = sliding_window(
                config, params, pieces, window, stride
            )
    if "longppl" in names:
        found["longppl"] = longppl(config, params, pieces, context=key_context)
    return found


def joined(tokenizer, texts: Sequence[str], length: int, count: int) -> list[np.ndarray]:
    """Up to `count` documents of exactly `length` tokens; a text that is too short is followed by the next."""
    whole: list[np.ndarray] = []
    parts: list[np.ndarray] = []
    room = length
    for text in texts:
        ids = tokenizer.encode(text)
        while len(ids) and len(whole) < count:
            parts.append(ids[:room])
            room -= len(parts[-1])
            ids = ids[len(parts[-1]) :]
            if not room:
                whole.append(np.concatenate(parts))
                parts, room = [], length
        if len(whole) == count:
            break
    if not whole:
        raise UserError(f"texts: {length - room} tokens in all; {length} are needed")
    return whole
