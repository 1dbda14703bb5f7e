"""LongPPL (Fang et al. 2025, arXiv 2410.23771): perplexity over the tokens that a long context makes the difference to.

    result = longppl(config, params, documents, context=4096)
    result = longppl(config, params, documents, context=4096, evaluator=(other_config, other_params))

A token is a key token when the evaluator gives it a log-probability that is more than `gain` higher after the whole
text than after the last `context` to `context + stride` tokens alone, and higher than `floor` after the whole text.
LongPPL is exp of the model's mean loss over the key tokens. What the tokenizer puts before a text (bos) stands before
the short contexts, too, within their length. The evaluator is the model itself (as the paper also does), or another
one with the same tokenizer: comparisons of checkpoints want one evaluator for all of them.
"""

import math
from collections.abc import Sequence

import numpy as np

from lrjax.errors import UserError
from lrjax.evaluation.perplexity import check_opening, reopened, token_losses


def longppl(
    config,
    params,
    documents: Sequence[np.ndarray],
    *,
    context: int = 4096,
    stride: int = 1024,
    gain: float = 2.0,
    floor: float = -2.0,
    evaluator=None,
    opening: Sequence[int] = (),
) -> dict:
    """LongPPL of documents that are longer than the short context.

    Args:
      documents: token ids, int32 [L] each.
      context: tokens of the short context, at least (published: 4096).
      stride: tokens that share one short context (published: 1024).
      gain, floor: nats (published: 2 and -2).
      evaluator: (LlamaConfig, params) of the model that chooses the key tokens.
      opening: what every document begins with (`opening_ids` of the tokenizer); never a key token.

    Returns:
      {"longppl" (None without a key token), "perplexity" (all tokens), "key_tokens", "tokens", "documents", "context",
      "evaluator" ("itself" or "another"), "bos" (whether there is an opening)}.

    Raises:
      UserError: no document is longer than the short context; a context or stride below 1; an id beyond the
        vocabulary of the model or the evaluator; a document that does not begin with the opening.
    """
    if context < 1 or stride < 1:
        raise UserError(f"longppl: context {context}, stride {stride}; allowed: 1 and more")
    long_enough = [document for document in documents if len(document) > context]
    if not long_enough:
        raise UserError(
            f"longppl: no document is longer than the short context of {context} tokens; the longest has "
            f"{max(map(len, documents), default=0)}"
        )
    check_opening(long_enough, opening)
    losses = [nll for nll, _ in token_losses(config, params, long_enough)]
    judge = (config, params) if evaluator is None else evaluator
    judged = losses if evaluator is None else [nll for nll, _ in token_losses(*judge, long_enough)]
    key = [
        key_tokens(*judge, document, nll, context, stride, gain, floor, opening)
        for document, nll in zip(long_enough, judged, strict=True)
    ]
    found = np.concatenate([nll[mask] for nll, mask in zip(losses, key, strict=True)])
    every = np.concatenate(losses)
    return {
        "longppl": math.exp(found.mean()) if len(found) else None,
        "perplexity": math.exp(every.mean()),
        "key_tokens": len(found),
        "tokens": len(every),
        "documents": len(long_enough),
        "context": context,
        "evaluator": "itself" if evaluator is None else "another",
        "bos": len(opening) > 0,
    }


def key_tokens(
    config, params, document, nll, context, stride, gain, floor, opening=()
) -> np.ndarray:
    """Which losses are of key tokens, bool [L - 1]; nll[t - 1], of the whole text, belongs to token t."""
    starts = range(0, len(document) - context, stride)
    pieces = [reopened(document[start : start + context + stride], opening) for start in starts]
    mask = np.zeros(len(nll), bool)
    short = token_losses(config, params, pieces, chunk=context + stride)
    for start, (short_nll, _) in zip(starts, short, strict=True):
        told = short_nll[context - 1 :]  # tokens start + context and on
        span = slice(start + context - 1, start + context - 1 + len(told))
        mask[span] = (told - nll[span] > gain) & (nll[span] < -floor)
    return mask
