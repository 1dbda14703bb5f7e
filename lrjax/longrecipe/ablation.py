"""Which part of a text a model goes by: what every token loses when a part further up cannot be seen.

    part_L   = parts(segment_lengths, 128)                    # the part that each token lies in: whole sentences
    lost_PL  = lost_without((config, params), tokens_L, part_L, window=1024)
    source_L = source_parts(lost_PL)                          # of each token: the part it goes by, or -1
    kept     = count_kept(selection.token_index, source_L, part_L)

`references.copies` finds what a text repeats; this finds what a model makes use of. A hidden part is a document of its
own between the two halves of the text: no other token attends to it, and all keep their places. The source of a token
is the part at least a window before it without which its log-probability falls most, if that is `LEAST` nats or more.
"""

import numpy as np
from jaxtyping import Float32, Int32

from lrjax.errors import UserError
from lrjax.longrecipe.contrast import make_logprobs

LEAST = 1.0  # nats: without its source a token is at most 1/e as likely
# A model parks attention that it has no use for on the first tokens (Xiao et al., arXiv 2309.17453): without them it
# reads nothing well, whatever they say. They are never hidden.
SINK = 4


def parts(segment_lengths: Int32[np.ndarray, "S"], size: int) -> Int32[np.ndarray, "L"]:
    """The number of the part of every token: whole sentences, one after the other until they have `size` tokens."""
    part_L, part, filled = [], 0, 0
    for length in segment_lengths:
        part_L.append(np.full(length, part, np.int32))
        filled += length
        if filled >= size:
            part, filled = part + 1, 0
    return np.concatenate(part_L)


def lost_without(
    model, tokens_L: Int32[np.ndarray, "L"], part_L: Int32[np.ndarray, "L"], *, window: int
) -> Float32[np.ndarray, "P L"]:
    """What the log-probability of token t falls by when part p is hidden, at [p, t], in nats.

    Args:
        model: (LlamaConfig, params) that reads the text, one pass for every part.
        part_L: rising numbers, as `parts` makes them.
        window: tokens nearer than this to the end of a part are not asked.

    Returns:
        0 where part p does not end at least `window` tokens before token t.

    Raises:
        UserError: a text longer than the model's window, an attention that takes one document in a row only.
    """
    config, params = model
    if len(tokens_L) > config.max_position_embeddings:
        raise UserError(
            f"ablation: a text of {len(tokens_L)} tokens, the window of the model is {config.max_position_embeddings}; "
            "allowed: a model that reads so far (--model=probe)"
        )
    logprobs = make_logprobs(config)
    positions = np.arange(len(tokens_L), dtype=np.int32)[None]
    tokens = np.asarray(tokens_L, np.int32)[None]

    def read(hidden_L):
        segment_ids = np.where(hidden_L, 2, 1).astype(np.int32)[None]
        told = np.asarray(logprobs(params, tokens, positions, segment_ids), np.float32)[0]
        if not np.isfinite(told).all():
            raise UserError(
                f"ablation: a reading with a hidden part has no log-probabilities with attention {config.attention!r}; "
                "allowed: one that takes several documents in a row (blockwise, splash, triton)"
            )
        return told

    whole = read(np.zeros(len(tokens_L), bool))
    lost_PL = np.zeros((int(part_L[-1]) + 1, len(tokens_L)), np.float32)
    for part in range(len(lost_PL)):
        hidden_L = part_L == part
        hidden_L[:SINK] = False
        first = int(np.searchsorted(part_L, part, "right")) - 1 + window
        if hidden_L.any() and first < len(tokens_L):
            lost_PL[part, first:] = (whole - read(hidden_L))[first - 1 :]
    return lost_PL


def source_parts(
    lost_PL: Float32[np.ndarray, "P L"], least: float = LEAST
) -> Int32[np.ndarray, "L"]:
    """Of every token the part that it loses most without, -1 where that is less than `least` nats."""
    best_L = lost_PL.argmax(axis=0).astype(np.int32)
    return np.where(lost_PL.max(axis=0) >= least, best_L, -1)


def count_kept(token_index: Int32[np.ndarray, "budget"], source_L, part_L) -> dict[str, float]:
    """What a selection keeps of a document's references; a source that is kept in part counts as that part.

    Args:
        token_index: the kept tokens.
        source_L: the part that each token goes by, -1 for none.
        part_L: the part that each token lies in.

    Returns:
        {"references", "kept": those whose token is kept, "with_source": and whose source is, "source_only"}.
    """
    if len(source_L) != len(part_L):
        raise UserError(
            f"count_kept: {len(source_L)} sources and {len(part_L)} parts; needed: one of each for a token"
        )
    kept_L = np.zeros(len(source_L), bool)
    kept_L[token_index] = True
    kept_P = np.bincount(part_L, weights=kept_L) / np.maximum(np.bincount(part_L), 1)
    ends = np.flatnonzero(source_L >= 0)
    end, source = kept_L[ends], kept_P[source_L[ends]]
    return {
        "references": len(ends),
        "kept": int(end.sum()),
        "with_source": float(source[end].sum()),
        "source_only": float(source[~end].sum()),
    }
