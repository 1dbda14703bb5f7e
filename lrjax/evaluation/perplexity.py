"""How well a model predicts text: by the position in long documents, and in short ones to see what it forgot.

    result = perplexity_by_position(config, params, documents, buckets=(2048, 4096, 8192, 16384))
    result["buckets"][0]        # {"start": 0, "stop": 2048, "nll", "perplexity", "interval", "documents", "tokens"}
    short_loss(config, params, documents, window=2048)["nll"]

Documents are arrays of token ids, each with what the tokenizer puts before a text (`opened`): the first token, before
which there is nothing, is not predicted. A long one is read through the key/value cache in chunks, so that memory
holds the cache and one chunk's activations; what fits into a chunk is read in one pass. Logits never exist for more
than a few tokens at a time (`lrjax.models.head`).
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from lrjax.errors import UserError
from lrjax.evaluation.generate import PREFILL_CHUNK, check_tokens
from lrjax.evaluation.statistics import mean_interval
from lrjax.models.cache import init_cache
from lrjax.models.head import token_stats
from lrjax.models.llama import Llama, LlamaConfig


def perplexity_by_position(
    config: LlamaConfig,
    params,
    documents: Sequence[np.ndarray],
    buckets: Sequence[int],
    *,
    batch_size: int = 1,
    chunk: int = PREFILL_CHUNK,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Negative log-probability per token, by how far into its document the token stands.

    Args:
      documents: token ids, int32 [L] each; what lies beyond the last bucket is not read.
      buckets: rising ends of the buckets; the first begins at 0. A document's first token is not predicted.
      batch_size: documents that are read together.
      chunk: tokens read at a time.
      progress: called with (documents done, documents in all).

    Returns:
      {"buckets": [{"start", "stop", "nll" (nats), "perplexity", "interval" (95 %, of the perplexity, over
      documents; None for a single one), "documents", "tokens"}], "tokens"}. A bucket that no document reaches
      has nll, perplexity and interval None.

    Raises:
      UserError: no document, one with fewer than 2 tokens or with an id beyond the vocabulary, buckets that do
        not rise.
    """
    edges = [0, *buckets]
    if not buckets or any(low >= high for low, high in itertools.pairwise(edges)):
        raise UserError(f"perplexity.buckets: {tuple(buckets)}; allowed: rising positive ends")
    scored = []
    for nll, _ in token_losses(
        config, params, [d[: edges[-1]] for d in documents], batch_size=batch_size, chunk=chunk
    ):
        scored.append(nll)
        if progress:
            progress(len(scored), len(documents))
    rows = []
    for start, stop in itertools.pairwise(edges):
        # nll[t - 1] belongs to the token at position t.
        parts = [nll[max(start - 1, 0) : stop - 1] for nll in scored]
        parts = [part for part in parts if len(part)]
        row = {"start": start, "stop": stop, "nll": None, "perplexity": None, "interval": None}
        if parts:
            mean, interval = mean_interval([p.sum() for p in parts], [len(p) for p in parts])
            row |= {"nll": mean, "perplexity": math.exp(mean)}
            row["interval"] = interval and [math.exp(end) for end in interval]
        rows.append(row | {"documents": len(parts), "tokens": sum(map(len, parts))})
    return {"buckets": rows, "tokens": sum(len(nll) + 1 for nll in scored)}


def short_loss(
    config: LlamaConfig,
    params,
    documents: Sequence[np.ndarray],
    window: int,
    *,
    batch_size: int = 1,
    chunk: int = PREFILL_CHUNK,
) -> dict:
    """Loss in the original window: what an extension must not make worse.

    Args:
      documents: token ids, int32 [L] each; cut to their first `window` tokens.

    Returns:
      {"nll" (nats), "interval" (95 %, over documents), "perplexity", "accuracy" (share of tokens that are the
      likeliest one), "accuracy_interval", "documents", "tokens" (predicted)}.

    Raises:
      UserError: as `perplexity_by_position`; a window below 2.
    """
    if window < 2:
        raise UserError(f"short_loss: window is {window}; allowed: 2 and more")
    cut = [document[:window] for document in documents]
    scored = list(token_losses(config, params, cut, batch_size=batch_size, chunk=chunk))
    counts = [len(nll) for nll, _ in scored]
    nll, interval = mean_interval([nll.sum() for nll, _ in scored], counts)
    accuracy, accuracy_interval = mean_interval([right.sum() for _, right in scored], counts)
    return {
        "nll": nll,
        "interval": interval,
        "perplexity": math.exp(nll),
        "accuracy": accuracy,
        "accuracy_interval": accuracy_interval,
        "documents": len(scored),
        "tokens": sum(counts),
    }


def sliding_window(
    config: LlamaConfig,
    params,
    documents: Sequence[np.ndarray],
    window: int,
    stride: int,
    *,
    batch_size: int = 1,
    opening: Sequence[int] = (),
) -> dict:
    """Perplexity when every token is told from the `window - stride` to `window` tokens before it.

    A window of tokens moves on by `stride`; of each only the tokens that no earlier window told count. With stride 1
    every token has its full window; the larger the stride, the cheaper and the less context.

    Args:
      documents: token ids, int32 [L] each.
      window: tokens that the model sees at a time.
      stride: tokens between the starts of two windows, less than the window.
      opening: what every document begins with (`opening_ids`); every window begins with it, too, within its length.

    Returns:
      {"nll" (nats), "perplexity", "interval" (95 %, of the perplexity, over documents; None for a single one),
      "window", "stride", "documents", "tokens" (told)}.

    Raises:
      UserError: as `perplexity_by_position`; a stride below 1 or not below the window; a document that
        does not begin with the opening.
    """
    if not 1 <= stride < window:
        raise UserError(
            f"sliding_window: stride {stride}, window {window}; allowed: 1 <= stride < window"
        )
    if short := [index for index, document in enumerate(documents) if len(document) < 2]:
        raise UserError(f"document {short[0]} has fewer than 2 tokens; allowed: 2 and more")
    check_opening(documents, opening)
    pieces, owners, new = [], [], []
    for index, document in enumerate(documents):
        told = 1  # the first token is told by nothing
        for start in range(0, len(document), stride):
            stop = min(start + window, len(document))
            if stop <= told:
                break
            pieces.append(reopened(document[start:stop], opening))
            owners.append(index)
            new.append(stop - told)
            told = stop
    sums, counts = np.zeros(len(documents)), np.zeros(len(documents))
    losses = token_losses(config, params, pieces, batch_size=batch_size, chunk=window)
    for (nll, _), owner, count in zip(losses, owners, new, strict=True):
        sums[owner] += nll[-count:].sum()
        counts[owner] += count
    mean, interval = mean_interval(sums, counts)
    return {
        "nll": mean,
        "perplexity": math.exp(mean),
        "interval": interval and [math.exp(end) for end in interval],
        "window": window,
        "stride": stride,
        "documents": len(documents),
        "tokens": int(counts.sum()),
    }


def opened(ids: np.ndarray, opening: Sequence[int]) -> np.ndarray:
    """The tokenizer's opening (`opening_ids`: bos, or nothing), then the ids; int32 [len(opening) + L]."""
    return np.concatenate([np.asarray(opening, np.int32), np.asarray(ids, np.int32)])


def reopened(window: np.ndarray, opening: Sequence[int]) -> np.ndarray:
    """A window of a document with the opening in place of its first tokens; int32, as long as before."""
    return opened(window[len(opening) :], opening)


def check_opening(documents: Sequence[np.ndarray], opening: Sequence[int]) -> None:
    """Raises `UserError` for an opening of more than one token, and for a document that does not begin with it."""
    if len(opening) > 1:
        raise UserError(f"opening: {list(opening)}; allowed: one token (bos) or none")
    for index, document in enumerate(documents):
        if not np.array_equal(document[: len(opening)], opening):
            raise UserError(
                f"document {index} begins with token {document[0]}; allowed: with the opening, {list(opening)}"
            )


def token_losses(
    config: LlamaConfig,
    params,
    documents: Sequence[np.ndarray],
    *,
    batch_size: int = 1,
    chunk: int = PREFILL_CHUNK,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each document, in order: the negative log-probability (nats, float64 [L - 1]) of every token after the
    first, and whether it was the likeliest (bool [L - 1]).

    All batches have the shape of the longest document, so that one program is compiled.
    """
    if batch_size < 1 or chunk < 1:
        raise UserError(f"batch_size is {batch_size}, chunk is {chunk}; allowed: 1 and more")
    check_tokens(config, documents, "document")
    for index, document in enumerate(documents):
        if len(document) < 2:
            raise UserError(f"document {index} has 1 token; allowed: 2 and more")
    params = jax.tree.map(jax.numpy.asarray, params)
    # Inputs are all tokens but the last, in whole chunks; the rest is padding with segment id 0.
    longest = max(map(len, documents)) - 1
    chunks = -(-longest // chunk)
    size = -(-longest // chunks)
    batch_size = min(batch_size, len(documents))
    for first in range(0, len(documents), batch_size):
        batch = documents[first : first + batch_size]
        tokens_BL = np.zeros((batch_size, chunks * size + 1), np.int32)
        lengths_B = np.zeros(batch_size, np.int32)
        for row, document in enumerate(batch):
            tokens_BL[row, : len(document)] = document
            lengths_B[row] = len(document) - 1
        segment_ids_BL = (np.arange(chunks * size) < lengths_B[:, None]).astype(np.int32)
        # Chunks in which no document of the batch has a token left are not read.
        used = -(-int(lengths_B.max()) // size)
        cache = init_cache(config, batch_size, chunks * size) if chunks > 1 else None
        parts = []
        for start in range(0, used * size, size):
            span = slice(start, start + size)
            inputs, targets = tokens_BL[:, span], tokens_BL[:, start + 1 : start + size + 1]
            stats, cache = _read(config, params, cache, inputs, targets, segment_ids_BL[:, span])
            parts.append(jax.tree.map(np.asarray, stats))
        logprob_BL, right_BL = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
        for row in range(len(batch)):
            length = lengths_B[row]
            yield -logprob_BL[row, :length].astype(np.float64), right_BL[row, :length]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(config, params, cache, tokens_BL, targets_BL, segment_ids_BL):
    """One chunk: ((log-probability, whether likeliest) of its targets, the longer cache)."""
    model = Llama(config)
    if cache is None:
        x_BLD = model.apply({"params": params}, tokens_BL, None, segment_ids_BL)
    else:
        x_BLD, cache = model.apply({"params": params}, tokens_BL, None, segment_ids_BL, cache)
    stats = token_stats(params, x_BLD, targets_BL)
    return (stats["logprob"], stats["argmax"] == targets_BL), cache
