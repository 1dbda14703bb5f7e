"""Many prompts one after the other through one cache: what a prompt shares with the one before is not read again.

    for index, row in answers(config, params, prompts, max_new_tokens=128, batch_size=8, eos_id=2): ...

Prompts are taken in the order of their tokens, so that every stretch of text that several of them begin with is
read once: questions on one document, a needle at several depths of one haystack. Going back costs nothing: the
cache is written by index, and what stands behind its length is never looked at. Prompts that are read so are answered
together all the same: what the cache holds of each is copied into one row of a wider cache.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lrjax.errors import UserError
from lrjax.evaluation import decoding
from lrjax.evaluation.generate import (
    PREFILL_CHUNK,
    Prefilled,
    check_tokens,
    granule,
    new_cache,
    prefill,
)
from lrjax.models.bits import ready
from lrjax.models.llama import Llama, LlamaConfig
from lrjax.sharding import current

CHUNK = 1024  # of one row; 2,048 tokens of SmolLM2 took one core 3.0 s, in chunks of 512 it was 3.7 to 4.3
SHORT_CHUNK = 64  # what is left over is read in quarters of a chunk, then in short ones: three programs for all
# An accelerator reads a batch row by row where its prompts share so many tokens with the one before, on average, and
# that spares such a part of the reading.
FEWEST_SHARED, WORTH_SHARING = 256, 1 / 3
# A GPU launches a chunk's kernels one by one, which takes as long as multiplying a token with so many parameters: by an
# H100, which read 16,000 tokens of SmolLM2-135M in 0.22 s (16 chunks) and 32 x 8,000 in 0.69 (16 of all rows).
LAUNCHES = 8.2e11


class Reader:
    """One row of a cache that keeps what it has read.

    Args:
      max_length: tokens of the longest prompt and its answer.
      chunk: tokens read at a time.
    """

    def __init__(self, config: LlamaConfig, params, max_length: int, chunk: int = CHUNK):
        if chunk < 1:
            raise UserError(f"reader: chunk is {chunk}; allowed: 1 and more")
        self.config, self.params = config, ready(config, params)
        self.max_length = max_length
        self._widths = chunk, max(chunk // 4, SHORT_CHUNK), SHORT_CHUNK
        # The last chunk is written whole, less than a short one of padding too; or a chunk that is shorter than that.
        padding = min(chunk, SHORT_CHUNK)
        step = granule(config, chunk)
        size = math.ceil((max_length + padding) / step) * step
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
            width = next(width for width in self._widths if left > width - SHORT_CHUNK)
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
        """The prompt as `generate.prefill` gives it, to score or to continue; until the next call of the reader."""
        last_BD = self.read(tokens)
        cache = self._cache | {"length": jnp.int32(len(tokens))}
        room = self.max_length - len(tokens)
        return Prefilled(
            self.config, self.params, cache, last_BD, np.array([len(tokens)], np.int32), room
        )

    def side_by_side(self, prompts: Sequence[np.ndarray], room: int) -> Prefilled:
        """Reads one prompt after the other: a batch of all, a row each, with space for `room` more tokens."""
        check_tokens(self.config, prompts, "prompt")
        width = max(map(len, prompts))
        self._check_length(width + room)
        size = self._cache["k"].shape[2]
        # Encodings that go by the length of the cache have to find the one that the prompts were read into; and of
        # one that is split over a mesh no part is cut off.
        if not self.config.rope_scaling.by_length and decoding.mesh_of(self.params) is None:
            step = granule(self.config, PREFILL_CHUNK)
            size = min(size, math.ceil((width + room) / step) * step)
        rows = new_cache(self.config, self.params, len(prompts), size)
        windowed = self.config.sliding_window is not None
        last_BD = []
        for row, tokens in enumerate(prompts):
            last_BD.append(self.read(tokens))
            rows = _place(
                windowed, rows, self._cache, np.int32(row), np.int32(len(tokens)), np.int32(width)
            )
        next_positions_B = np.array([len(tokens) for tokens in prompts], np.int32)
        last_BD = jnp.concatenate(last_BD)
        return Prefilled(self.config, self.params, rows, last_BD, next_positions_B, size - width)

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


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _place(at_the_end, rows, cache, row, length, width):
    """Row `row` of `rows` becomes the first `length` tokens of the one row of `cache`; its next one is at `width`.

    They stand where they stood, and the gap behind them is in no segment; or (windows go by index, so there must be no
    gap) `at_the_end`. On a mesh that splits the length, moving them has every device gather the row.
    """
    size = rows["segment_ids"].shape[1]
    start = width - length if at_the_end else 0
    from_S = jnp.arange(size) - start
    inside_1S = ((from_S >= 0) & (from_S < length))[None].astype(jnp.int32)

    def placed(name):
        kept = cache[name][:, :, :size]
        if at_the_end:
            kept = jnp.roll(kept, start, axis=2)
        return jax.lax.dynamic_update_slice_in_dim(rows[name], kept, row, axis=1)

    segment_ids = jax.lax.dynamic_update_slice_in_dim(rows["segment_ids"], inside_1S, row, axis=0)
    return {"k": placed("k"), "v": placed("v"), "segment_ids": segment_ids, "length": width}


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
    chunk: int | None = None,
    rng: jax.Array | None = None,
    **options,
) -> Iterator[tuple[int, np.ndarray]]:
    """Continues every prompt: yields (its index, the new tokens) as they come, in an order of its own.

    Args:
      prompts: token ids, int32 [L] each.
      batch_size: prompts that are answered together: as many rows of cache, and one more where they are read row by
        row: on a CPU, and where that spares a third of the reading (`_worth_sharing`).
      chunk: tokens of a row that are read at a time; default: `CHUNK` row by row, else `generate.PREFILL_CHUNK`.
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
    params = ready(config, params)
    rng = None if rng is None else decoding.row_keys(rng, len(prompts))
    order = sorted(range(len(prompts)), key=lambda index: np.asarray(prompts[index]).tolist())
    longest = max(map(len, prompts)) + max_new_tokens
    in_chunks = {} if chunk is None else {"chunk": chunk}
    reader = None

    def continued(rows, rng):
        nonlocal reader
        if len(rows) > 1 and not _row_by_row(rows, params):
            filled = prefill(config, params, rows, max_new_tokens, **in_chunks)
        else:
            reader = reader or Reader(config, params, longest, **in_chunks)
            if len(rows) == 1:  # without a copy of the cache
                return [reader.answer(rows[0], max_new_tokens, rng=rng, **options)]
            filled = reader.side_by_side(rows, max_new_tokens)
        return filled.generate(max_new_tokens, rng=rng, keep=False, **options)

    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        rows = [np.asarray(prompts[index], np.int32) for index in members]
        found = continued(rows, None if rng is None else rng[np.asarray(members)])
        yield from zip(members, found, strict=True)


def _row_shards(params, rows: int) -> int:
    """Over how many parts of the parameters' mesh the rows of a batch are split."""
    mesh = decoding.mesh_of(params)
    shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    return 1 if rows % shards else shards


def _row_by_row(ordered: Sequence[np.ndarray], params) -> bool:
    """Whether to read a batch row by row: on a CPU, which a row alone keeps busy, and where that is worth it."""
    shards = _row_shards(params, len(ordered))
    platform = current().platform
    if platform == "cpu" and shards == 1:
        return True
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return _worth_sharing(ordered, shards, LAUNCHES / size if platform == "gpu" else 0)


def _worth_sharing(ordered: Sequence[np.ndarray], shards: int, launch: float) -> bool:
    """Whether to read a batch row by row, each of `shards` parts of a mesh every row, where it could share them.

    A chunk of any number of rows costs `launch` tokens beside its own. Not for a few tokens: a batch that is read at
    once keeps an accelerator busier.
    """
    total = sum(map(len, ordered))
    again = sum(shared_length(a, b) for a, b in itertools.pairwise(ordered))
    enough = again >= FEWEST_SHARED * (len(ordered) - 1)
    own = total - again
    row_by_row = (own / CHUNK + len(ordered)) * launch + own * shards
    at_once = max(map(len, ordered)) / PREFILL_CHUNK * launch + total
    return enough and row_by_row <= (1 - WORTH_SHARING) * at_once
