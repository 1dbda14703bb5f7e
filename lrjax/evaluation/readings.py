"""Perplexity and LongPPL of any texts: what a checkpoint is not asked but reads.

    found = read(("perplexity", "longppl"), config, params, tokenizer, texts, lengths=(2048, 8192), documents=8)
    found["perplexity"]["buckets"], found["longppl"]["longppl"]

The texts are joined and cut into documents of the longest length, each of which begins with what the tokenizer puts
before a text (bos, or nothing), as prompts do.
"""

from collections.abc import Sequence

import numpy as np

from lrjax.errors import UserError
from lrjax.evaluation.longppl import longppl
from lrjax.evaluation.perplexity import opened, perplexity_by_position, sliding_window

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
    evaluator=None,
) -> dict:
    """{name: result} of the readings that are named; "bos" in a result says whether documents begin with it.

    Args:
      texts: read in order.
      lengths: ends of the buckets of positions; the largest is a document's length.
      documents: most documents.
      window, stride: also perplexity with a sliding window; 0: not.
      key_context: short context of LongPPL, in tokens.
      evaluator: (LlamaConfig, params, tokenizer) of the model that chooses LongPPL's key tokens; None: this one.

    Raises:
      UserError: no text of the longest length; an evaluator with another vocabulary; see `perplexity_by_position`,
        `sliding_window` and `longppl`.
    """
    edges = sorted(set(lengths))
    opening = tokenizer.opening_ids()
    pieces = joined(tokenizer, texts, edges[-1], documents)
    found: dict[str, dict] = {}
    if "longppl" in names and evaluator is not None:
        texts_alone = [piece[len(opening) :] for piece in pieces]
        _check_vocabulary(tokenizer, evaluator[2], texts_alone)
    if "perplexity" in names:
        found["perplexity"] = perplexity_by_position(config, params, pieces, edges)
        found["perplexity"]["bos"] = len(opening) > 0
        if window:
            found["perplexity"]["sliding_window"] = sliding_window(
                config, params, pieces, window, stride, opening=opening
            )
    if "longppl" in names:
        found["longppl"] = longppl(
            config, params, pieces, context=key_context, opening=opening, evaluator=evaluator and evaluator[:2]
        )  # fmt: skip
    return found


def _check_vocabulary(tokenizer, other, pieces: Sequence[np.ndarray]) -> None:
    """Raises `UserError` where the ids of a document are another text to the other tokenizer, or none."""
    for index, piece in enumerate(pieces):
        known = piece.max(initial=0) < other.vocab_size
        if not known or other.decode(piece) != tokenizer.decode(piece):
            raise UserError(
                f"longppl: the evaluator has another vocabulary: the tokens of document {index} are another text "
                "to it; allowed: an evaluator with the model's vocabulary"
            )


def joined(tokenizer, texts: Sequence[str], length: int, count: int) -> list[np.ndarray]:
    """Up to `count` documents of exactly `length` tokens; a text that is too short is followed by the next.

    Each begins with the tokenizer's opening, within the length.
    """
    opening = tokenizer.opening_ids()
    whole: list[np.ndarray] = []
    parts: list[np.ndarray] = []
    room = length - len(opening)
    for text in texts:
        ids = tokenizer.encode(text)
        while len(ids) and len(whole) < count:
            parts.append(ids[:room])
            room -= len(parts[-1])
            ids = ids[len(parts[-1]) :]
            if not room:
                whole.append(opened(np.concatenate(parts), opening))
                parts, room = [], length - len(opening)
        if len(whole) == count:
            break
    if not whole:
        raise UserError(f"texts: {length - room} tokens in all; {length} are needed")
    return whole
