"""The Long Dependency Score of a text: how much its parts help to read each other, and from how far.

    found = long_dependency((config, params), tokens_L, chunk=128)
    found["lds"], found["delta_CC"]

ProLong (Chen et al. 2024, arXiv 2405.17915). The text is cut into n chunks; PPL(i) is the perplexity of chunk i alone,
PPL(i|j) after chunk j, and

    delta_ij = (PPL(i) - PPL(i|j)) / PPL(i)                         how much of the perplexity chunk j takes away
    DSpec_i  = 1 - entropy(softmax_j(delta_ij)) / ln(number of j)   whether it is one chunk that does, or any
    LDS      = sum over i > j with delta_ij > 0.1 of (delta_ij + (i - j)/(n - 1)) * DSpec_i

DSpec has no meaning where only one chunk stands before; it is 0 there.
"""

import math

import numpy as np
from jaxtyping import Float, Int32

from lrjax.errors import UserError
from lrjax.longrecipe.contrast import make_logprobs

THRESHOLD = 0.1


def long_dependency(
    model, tokens_L: Int32[np.ndarray, "L"], *, chunk: int = 128, rows: int = 16
) -> dict:
    """The score of one text.

    Args:
        model: (LlamaConfig, params) that reads the chunks.
        chunk: tokens; what is left at the end is not used. A chunk's first token has no prediction when it stands
            alone, so no perplexity counts it.
        rows: pairs of chunks that are read together.

    Returns:
        {"lds", "chunks", "dependent": pairs above the threshold, "delta_CC": float64, 0 where j >= i}.

    Raises:
        UserError: fewer than two chunks.
    """
    count = len(tokens_L) // chunk
    if chunk < 2 or count < 2:
        raise UserError(
            f"long_dependency: {len(tokens_L)} tokens in chunks of {chunk}; needed: two chunks of at least 2"
        )
    tokens_CK = np.asarray(tokens_L[: count * chunk], np.int32).reshape(count, chunk)
    alone_C = np.exp(_losses(model, tokens_CK, chunk - 1, rows))
    later, earlier = np.tril_indices(count, -1)
    pairs = np.concatenate([tokens_CK[earlier], tokens_CK[later]], axis=1)
    delta_CC = np.zeros((count, count))
    after = np.exp(_losses(model, pairs, chunk - 1, rows))
    delta_CC[later, earlier] = (alone_C[later] - after) / alone_C[later]
    return {
        "lds": score(delta_CC),
        "chunks": count,
        "dependent": int(np.count_nonzero(delta_CC > THRESHOLD)),
        "delta_CC": delta_CC,
    }


def score(delta_CC: Float[np.ndarray, "C C"]) -> float:
    """LDS from the table of delta_ij (row i, column j < i)."""
    count = len(delta_CC)
    total = 0.0
    for i in range(2, count):
        delta = delta_CC[i, :i]
        share = np.exp(delta - delta.max())
        share /= share.sum()
        specific = 1 + float(np.sum(share * np.log(share))) / math.log(i)
        strong = delta > THRESHOLD
        distance = (i - np.arange(i)) / (count - 1)
        total += specific * float(np.sum((delta + distance)[strong]))
    return total


def kept_pairs(delta_CC, token_index: Int32[np.ndarray, "budget"], chunk: int) -> dict:
    """What a selection keeps of the dependent pairs of chunks, in pairs; a chunk kept in part counts as that part.

    Returns:
        {"pairs", "kept": of the later chunks, "with_source": of later and earlier chunk together}.
    """
    count = len(delta_CC)
    kept_C = np.bincount(np.asarray(token_index) // chunk, minlength=count)[:count] / chunk
    later, earlier = np.nonzero(delta_CC > THRESHOLD)
    return {
        "pairs": len(later),
        "kept": float(kept_C[later].sum()),
        "with_source": float((kept_C[later] * kept_C[earlier]).sum()),
    }


def _losses(model, tokens_RL, count: int, rows: int) -> Float[np.ndarray, "R"]:
    """Mean loss of the last `count` tokens of each row, nats."""
    config, params = model
    logprobs = make_logprobs(config)
    length = tokens_RL.shape[1]
    shape = min(rows, len(tokens_RL)), length
    positions, segment_ids = np.broadcast_to(np.arange(length), shape), np.ones(shape, np.int32)
    losses = []
    for first in range(0, len(tokens_RL), shape[0]):
        batch = np.zeros(shape, np.int32)
        part = tokens_RL[first : first + shape[0]]
        batch[: len(part)] = part
        told = logprobs(params, batch, positions.astype(np.int32), segment_ids)
        losses.append(-np.asarray(told, np.float64)[: len(part), -count:].mean(axis=1))
    return np.concatenate(losses)
