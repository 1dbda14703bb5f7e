"""LongPPL's score: what a long context adds to a token's log-probability over a short one, with one model alone.

    contrast_BL = contrast((config, params), tokens_BL, segment_ids_BL, logprob_BL, context=4096, stride=1024)

Fang et al. 2025 (arXiv 2410.23771): a token gains from the long context when its log-probability after the whole text
is above that after the last `context` to `context + stride` tokens. The scorer of two models (`scoring.py`) asks what
training changed; this one what the text far away is good for. LongCE weighs a token's loss by `long_ce_weights`.
"""

import functools

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from lrjax.errors import UserError
from lrjax.models.head import next_token_stats
from lrjax.models.llama import Llama


@functools.lru_cache(maxsize=8)
def make_logprobs(config):
    """`logprobs(params, tokens_BL, positions_BL, segment_ids_BL)`, jitted: float32 [B, L-1], never [B, L, V]."""

    @jax.jit
    def logprobs(params, tokens_BL, positions_BL, segment_ids_BL):
        x_BLD = Llama(config).apply({"params": params}, tokens_BL, positions_BL, segment_ids_BL)
        return next_token_stats(params, x_BLD, tokens_BL)["logprob"]

    return logprobs


def contrast(
    model,
    tokens_BL: Int[np.ndarray, "B L"],
    segment_ids_BL: Int[np.ndarray, "B L"],
    logprob_BL: Float[np.ndarray, "B L-1"],
    *,
    context: int,
    stride: int,
) -> Float[np.ndarray, "B L-1"]:
    """Log-probability after the whole text less that after a short context; index t - 1 is about token t.

    Args:
        model: (LlamaConfig, params).
        segment_ids_BL: 1 on the document, 0 on the padding at its end: one document a row.
        logprob_BL: of the same model after the whole text.
        context: tokens of the short context, at least.
        stride: tokens that share one short context.

    Returns:
        float32; 0 on padding and on the first `context` tokens, whose short context is the whole.

    Raises:
        UserError: a context or stride below 1, or a row with more than one document.
    """
    if context < 1 or stride < 1:
        raise UserError(f"contrast: context {context}, stride {stride}; allowed: 1 and more")
    if segment_ids_BL.max() > 1:
        raise UserError("contrast: a row has more than one document; allowed: one")
    config, params = model
    B, L = tokens_BL.shape
    width = context + stride
    starts = [(row, start) for row in range(B) for start in range(0, L - context, stride)]
    starts = [(row, start) for row, start in starts if segment_ids_BL[row, start + context]]
    # As many short texts at a time as make up one row, always the same number: one compiled program.
    together = max(1, L // width)
    logprobs = make_logprobs(config)
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), (together, width))
    result_BL = np.zeros((B, L - 1), np.float32)
    for first in range(0, len(starts), together):
        group = starts[first : first + together]
        tokens, segment_ids = np.zeros((2, together, width), np.int32)
        for index, (row, start) in enumerate(group):
            piece = tokens_BL[row, start : start + width]
            tokens[index, : len(piece)] = piece
            segment_ids[index, : len(piece)] = segment_ids_BL[row, start : start + width]
        short = np.asarray(logprobs(params, tokens, positions, segment_ids))
        for (row, start), told in zip(group, short, strict=False):
            span = slice(start + context - 1, min(start + width, L) - 1)
            gained = logprob_BL[row, span] - told[context - 1 :][: span.stop - span.start]
            result_BL[row, span] = np.where(segment_ids_BL[row, 1:][span] > 0, gained, 0.0)
    return result_BL


def key_tokens(
    contrast_L, logprob_L, *, gain: float = 2.0, floor: float = -2.0
) -> Bool[np.ndarray, "L"]:
    """LongPPL's key tokens: gained more than `gain` nats, and likely (above `floor`) after the long context."""
    return (np.asarray(contrast_L) > gain) & (np.asarray(logprob_L) > floor)


def long_ce_weights(contrast_L, most: float = 5.0) -> Float[np.ndarray, "L"]:
    """LongCE's weights of the loss: min(exp(CE_short - CE_long), most)."""
    return np.exp(np.minimum(contrast_L, np.log(most))).astype(np.float32)
