"""Selection: which sentences of a long document make up a training sample of exactly the budget.

    kept = select("anchor", segment_lengths_S, budget, rng=rng, anchor_mask_L=mask_L, document_id="essay#3")
    tokens_L[kept.token_index], kept.segment_lengths       # positions are drawn from these lengths afterwards

Every method is an order in which sentences are admitted; whatever the order, the admitted sentences stay in
the order of the text, and the last one admitted is cut so that the budget is met exactly.

| method        | order of admission                                                                                |
|---------------|---------------------------------------------------------------------------------------------------|
| anchor        | sentences that hold an anchor token, from the start of the text; then the others at random        |
| anchor_spread | the same sentences first, but at random                                                           |
| digits        | the released code's: sentences with a digit and half of the others, from the start; then the rest |
| score         | by the largest change of logit in the sentence                                                    |
| linked        | the same, each with the sentences that its tokens are repeated from (`references.copies`)         |
| weighted      | drawn one by one, with a probability in proportion to the sentence's mean rise of logit           |
| random        | at random                                                                                         |
| first         | from the start                                                                                    |

The paper (arXiv 2409.00509, section 3) removes sentences without an anchor type, keeps the order and takes
the budget; which ones go when more remain is not stated: the last ones with `anchor`, any with `anchor_spread`.
Shapes: S sentences, L tokens of the document.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int32

from lrjax.errors import UserError

METHODS = ("anchor", "anchor_spread", "digits", "score", "linked", "weighted", "random", "first")
KEEP_PLAIN = (
    0.5  # the released code keeps a sentence without a digit with this probability (its r = 0.6)
)


class Selection(NamedTuple):
    """Kept tokens, increasing; the kept lengths of their sentences; how many tokens only fill up the budget."""

    token_index: Int32[np.ndarray, "budget"]
    segment_lengths: Int32[np.ndarray, "S_kept"]
    filled: int

    @property
    def reach(self) -> int:
        """Tokens of the document up to the last kept one."""
        return int(self.token_index[-1]) + 1


def select(
    method: str,
    segment_lengths_S: Int32[np.ndarray, "S"],
    budget: int,
    *,
    rng: np.random.Generator,
    anchor_mask_L: Bool[np.ndarray, "L"] | None = None,
    digit_mask_L: Bool[np.ndarray, "L"] | None = None,
    delta_L: Float[np.ndarray, "L"] | None = None,
    source_L: Int32[np.ndarray, "L"] | None = None,
    document_id: str = "document",
) -> Selection:
    """Keeps exactly `budget` tokens of a document.

    Args:
        method: one of `METHODS`; anchor and anchor_spread need `anchor_mask_L`, digits `digit_mask_L`, score, linked
            and weighted `delta_L`, linked also `source_L`.
        segment_lengths_S: tokens of each sentence, with sum L.
        anchor_mask_L, digit_mask_L: which tokens are of an anchor class, hold a digit.
        delta_L: change of logit of each token (any low value for the first, which nothing predicts).
        source_L: the earlier token that each token repeats; -1 for none.
        document_id: names the document in errors.

    Raises:
        UserError: an empty document, one without a sentence end, one shorter than the budget, an unknown method,
            or an array that the method needs and that is missing, of another length or NaN.
    """
    lengths_S = _checked_lengths(segment_lengths_S, budget, document_id)
    if method not in METHODS:
        raise UserError(f"selection method {method!r}; allowed: {', '.join(METHODS)}")
    starts_S = np.cumsum(lengths_S) - lengths_S
    count, total = len(lengths_S), lengths_S.sum()

    def checked(values_L, name):
        if values_L is None:
            raise UserError(f"{document_id}: selection '{method}' needs {name}")
        values_L = np.asarray(values_L)
        if values_L.shape != (total,):
            raise UserError(
                f"{document_id}: {name} has shape {values_L.shape}, the sentences have {total} tokens"
            )
        if values_L.dtype.kind == "f" and np.isnan(values_L).any():
            raise UserError(
                f"{document_id}: {name} is NaN at token {np.argmax(np.isnan(values_L))}"
            )
        return values_L

    def largest(values_L, name):
        """The largest value in each sentence."""
        return np.maximum.reduceat(checked(values_L, name), starts_S)

    def holds_any(mask_L, name):
        """Whether a token of the sentence is marked. Few marks are looked up: faster than to reduce all tokens."""
        marks = np.flatnonzero(checked(mask_L, name))
        if len(marks) > count:
            return np.logical_or.reduceat(mask_L, starts_S)
        found_S = np.zeros(count, bool)
        found_S[np.searchsorted(starts_S, marks, side="right") - 1] = True
        return found_S

    wanted_total = total
    if method.startswith("anchor") or method == "digits":
        if method == "digits":
            wanted_S = holds_any(digit_mask_L, "digit_mask_L")
            wanted_S |= rng.random(count) < KEEP_PLAIN
        else:
            wanted_S = holds_any(anchor_mask_L, "anchor_mask_L")
        order = np.flatnonzero(wanted_S)
        wanted_total = lengths_S[order].sum()
        if method == "anchor_spread":
            order = rng.permutation(order)
        if wanted_total < budget:
            order = np.concatenate([order, rng.permutation(np.flatnonzero(~wanted_S))])
    elif method in ("score", "linked"):
        order = np.argsort(-largest(delta_L, "delta_L"), kind="stable")
        if method == "linked":
            sentence_L = np.repeat(np.arange(count), lengths_S)
            order = _with_sources(order, sentence_L, checked(source_L, "source_L"))
    elif method == "weighted":
        rise_L = np.maximum(checked(delta_L, "delta_L"), 0.0)
        rise_S = np.add.reduceat(rise_L, starts_S) / lengths_S
        # Sorting u^(1/w) draws without replacement in proportion to w (Efraimidis and Spirakis 2006).
        with np.errstate(divide="ignore"):
            order = np.argsort(-np.log(rng.random(count)) / rise_S, kind="stable")
    elif method == "random":
        order = rng.permutation(count)
    else:
        order = np.arange(count)
    sentences, kept = _admitted(lengths_S, order, budget)

    moved = (starts_S[sentences] - (np.cumsum(kept) - kept)).astype(np.int32)
    token_index = np.arange(budget, dtype=np.int32) + np.repeat(moved, kept)
    return Selection(token_index, kept.astype(np.int32), max(budget - int(wanted_total), 0))


def _with_sources(order, sentence_L, source_L) -> np.ndarray:
    """An order of sentences, with those that a sentence's tokens are repeated from moved up right behind it,
    in the order of the tokens that repeat them."""
    rank_S = np.empty_like(order)
    rank_S[order] = np.arange(len(order))
    linked = np.flatnonzero(np.asarray(source_L) >= 0)
    owner, source = sentence_L[linked], sentence_L[np.asarray(source_L)[linked]]
    # (rank of the owner, itself before its sources); of a sentence that comes twice the first place counts.
    rank = np.concatenate([rank_S[order], rank_S[owner]])
    sentences = np.concatenate([order, source])
    is_source = np.arange(len(sentences)) >= len(order)
    sentences = sentences[np.lexsort((is_source, rank))]
    _, first = np.unique(sentences, return_index=True)
    return sentences[np.sort(first)]


def _admitted(lengths_S, order, budget) -> tuple[np.ndarray, np.ndarray]:
    """(sentences, in the order of the text; tokens kept of each): whole ones in `order` until the budget is full."""
    total = np.cumsum(lengths_S[order])
    last = np.searchsorted(total, budget)  # the place in the order at which the budget is met
    sentences = order[: last + 1]
    kept = lengths_S[sentences]
    kept[-1] -= total[last] - budget
    by_text = np.argsort(sentences, kind="stable")
    return sentences[by_text], kept[by_text]


def _checked_lengths(segment_lengths_S, budget, document_id) -> np.ndarray:
    lengths_S = np.asarray(segment_lengths_S)
    if lengths_S.ndim != 1 or lengths_S.size == 0:
        raise UserError(f"{document_id}: the document is empty; it must have sentences")
    if lengths_S.dtype.kind not in "iu" or lengths_S.min() < 1:
        raise UserError(
            f"{document_id}: sentence lengths must be positive integers, got {lengths_S.min()}"
        )
    if budget < 1:
        raise UserError(f"selection budget is {budget}; it must be at least 1 token")
    lengths_S = lengths_S.astype(np.int64)
    if lengths_S.sum() < budget:
        raise UserError(
            f"{document_id}: the document has {lengths_S.sum()} tokens, fewer than the budget of {budget}"
        )
    if len(lengths_S) == 1:
        raise UserError(
            f"{document_id}: no sentence ends inside the document's {lengths_S[0]} tokens; "
            "selection needs at least two sentences"
        )
    return lengths_S
