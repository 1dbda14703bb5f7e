"""Many prompts one after the other through one cache: what a prompt shares with the one before is not read again.

    for index, row in answers(config, params, prompts, max_new_tokens=128, eos_id=2): ...

Prompts are taken in the order of their tokens, so that every stretch of text that several of them begin with is
read once: questions on one document, a needle at several depths of one haystack. Going back costs nothing: the
cache is written by index, and what stands behind its length is never looked at.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lrjax.errors import UserError
from lrjax.evaluation import decoding
from lrjax.evaluation.generate import PREFILL_CHUNK, Prefilled, check_tokens, new_cache, prefill
from lrjax.models.llama import Llama, LlamaConfig

SHORT_CHUNK = 64  # what is left over is read in chunks of it: two programs for all lengths
SHARED = 256  # tokens that prompts of a batch have in common before it pays to read them apart


class Reader:
    """One row of a cache that keeps what it has read.

    Args:
      max_length: tokens of the longest prompt and its answer.
      chunk: tokens read at a time.
    """

    def __init__(self, config: LlamaConfig, params, max_length: int, chunk: int = PREFILL_CHUNK):
        self.config, self.params = config, decoding.ready(config, params)
        self.max_length, self._chunk = max_length, chunk
        # A chunk is written whole, its padding too, so there has to be room for one more.
        size = math.ceil(max_length / chunk) * chunk + SHORT_CHUNK
        self._cache = new_cache(config, self.params, 1, size)
        self._tokens = np.zeros(0, np.int32)  # what the cache holds
        self.tokens_read = 0  # by the model, in all: what sharing saves is the rest

    def read(self, tokens: np.ndarray) -> jax.Array:
        """Makes the cache hold exactly `tokens`; returns the hidden state [1, D] of the last one."""
        check_tokens(self.config, [tokens], "prompt")
        self._check_length(len(tokens))
        # The last token is read in any case: its hidden state predicts the answer.
        start = min(shared_length(self._tokens, tokens), len(tokens) - 1)
        self.tokens_read += len(tokens) - start
        while start < len(tokens):
            left = len(tokens) - start
            width = self._chunk if left > self._chunk - SHORT_CHUNK else SHORT_CHUNK
            piece = np.zeros((1, width), np.int32)
            count = min(width, left)
            piece[0, :count] = tokens[start : start + count]
            last_BD, self._cache = _read(
                self.config, self.params, self._cache, piece, np.int32(start), np.int32(count)
            )
            start += count
        self._tokens = np.asarray(tokens, np.int32)
        return last_BD

    def answer(self, tokens: np.ndarray, max_new_tokens: int, **options) -> np.ndarray:
        """Reads a prompt and continues it; options as in `decoding.decode`."""
        self._check_length(len(tokens) + max_new_tokens)
        last_BD = self.read(tokens)
        rows, self._cache = decoding.decode(
            self.config, self.params, self._cache, last_BD, np.array([len(tokens)]), max_new_tokens,
            **options,
        )  # fmt: skip
        return rows[0]

    def filled(self, tokens: np.ndarray) -> Prefilled:
        """The prompt as `generate.prefill` gives it, to score or to fork; until the next call of the reader."""
        last_BD = self.read(tokens)
        cache = self._cache | {"length": jnp.int32(len(tokens))}
        room = self.max_length - len(tokens)
        return Prefilled(
            self.config, self.params, cache, last_BD, np.array([len(tokens)], np.int32), room
        )

    def _check_length(self, length: int) -> None:
        if length > self.max_length:
            raise UserError(
                f"{length} tokens with the answer; the reader was made for {self.max_length}"
            )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(config, params, cache, tokens_1L, start, count):
    """The first `count` tokens of a chunk, written from index `start` on: (hidden state of the last, cache)."""
    index_1L = jnp.arange(tokens_1L.shape[1])[None]
    inside_1L = (index_1L < count).astype(jnp.int32)
    x_1LD, cache = Llama(config).apply(
        {"params": params}, tokens_1L, start + index_1L, inside_1L, cache | {"length": start}
    )
    last_1D = jax.lax.dynamic_index_in_dim(x_1LD, count - 1, axis=1, keepdims=False)
    return last_1D, cache | {"length": start + count}


def shared_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences have in common at their beginning."""
    size = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:size]) != np.asarray(b[:size]))
    return int(different[0]) if len(different) else size


def answers(
    config: LlamaConfig,
    params,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    *,
    batch_size: int = 1,
    chunk: int = PREFILL_CHUNK,
    rng: jax.Array | None = None,
    **options,
) -> Iterator[tuple[int, np.ndarray]]:
    """Continues every prompt: yields (its index, the new tokens) as they come, in an order of its own.

    Args:
      prompts: token ids, int32 [L] each.
      batch_size: prompts that are answered together. What prompts share at their beginning is read once when they
        are alone or when they share at least `SHARED` tokens and most of their length.
      rng: for a temperature above 0, a key for each prompt; or one, from which each prompt has its own by its index.
      options: of `generate.generate`: temperature, top_p, eos_id, stop.

    Raises:
      UserError: as `generate`; max_new_tokens or batch_size below 1.
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise UserError(
            f"batch_size is {batch_size}, max_new_tokens {max_new_tokens}; allowed: 1 and more"
        )
    if not len(prompts):
        return
    check_tokens(config, prompts, "prompt")
    params = decoding.ready(config, params)
    order = sorted(range(len(prompts)), key=lambda index: np.asarray(prompts[index]).tolist())
    longest = max(map(len, prompts)) + max_new_tokens
    reader = None

    rng = None if rng is None else decoding.row_keys(rng, len(prompts))

    def keys(indices):
        return None if rng is None else rng[np.asarray(indices)]

    for family in _families([prompts[index] for index in order], batch_size):
        members = [order[at] for at in family]
        if len(members) > 1:
            rows = [np.asarray(prompts[index], np.int32) for index in members]
            shared = shared_length(rows[0], rows[-1])  # the rows are in order
            shared = min(shared, min(map(len, rows)) - 1)
            if shared >= SHARED:
                room = max(map(len, rows)) - shared + 2 * chunk + max_new_tokens
                document = prefill(config, params, [rows[0][:shared]], room, chunk)
                filled = document.fork([row[shared:] for row in rows], max_new_tokens, chunk)
            else:
                filled = prefill(config, params, rows, max_new_tokens, chunk)
            found = filled.generate(max_new_tokens, rng=keys(members), keep=False, **options)
            yield from zip(members, found, strict=True)
            continue
        if reader is None:
            reader = Reader(config, params, longest, chunk)
        yield (
            members[0],
            reader.answer(prompts[members[0]], max_new_tokens, rng=keys(members), **options),
        )


def _families(ordered: list[np.ndarray], batch_size: int) -> Iterator[list[int]]:
    """Runs of prompts, at most `batch_size` long, that are alike: they share most of their tokens or nothing."""
    family: list[int] = []
    for index, prompt in enumerate(ordered):
        if family:
            first = ordered[family[0]]
            shared = shared_length(first, prompt)
            most = shared >= SHARED and 2 * shared > max(len(first), len(prompt))
            before = shared_length(first, ordered[family[-1]])
            # A batch reads the shared part once or everything by itself; the two do not mix.
            kind_changes = len(family) > 1 and (before >= SHARED) != most
            if len(family) == batch_size or (shared >= SHARED and not most) or kind_changes:
                yield family
                family = []
        family.append(index)
    if family:
        yield family
