"""Generation with a key/value cache, and the log-probabilities of given answers from the same prefill.

    new = generate(config, params, [prompt_a, prompt_b], max_new_tokens=32, eos_id=2)     # token ids in and out

    filled = prefill(config, params, prompts, room=32)        # the prompts are read once, then
    filled.generate(max_new_tokens=32)                         # the model's own answers and
    filled.score(answers)                                      # how likely it holds the right ones

Prompts of different lengths are padded on the left with segment id 0 and carry their own positions, so a batch
gives what its prompts give alone. A prompt is read in chunks: memory holds the cache and one chunk's activations.
The cache is in the compute dtype and, where the parameters lie on a mesh, split over it (`lrjax.evaluation.reader`
reads prompts one after the other and keeps what they share).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lrjax.errors import UserError
from lrjax.evaluation import decoding
from lrjax.models.bits import ready
from lrjax.models.cache import init_cache
from lrjax.models.head import token_stats
from lrjax.models.llama import Llama, LlamaConfig
from lrjax.sharding import current

PREFILL_CHUNK = 512
# Lengths are rounded up to multiples of it, so that few shapes are compiled; on an accelerator, where a program takes
# seconds to compile, to the larger one.
GRANULE, ACCELERATOR_GRANULE = 128, 512


def generate(
    config: LlamaConfig,
    params,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_id: int | Sequence[int] | None = None,
    stop: Callable[[np.ndarray], bool] | None = None,
    positions: Sequence[np.ndarray] | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    rng: jax.Array | None = None,
) -> list[np.ndarray]:
    """Continues each prompt by up to `max_new_tokens` tokens.

    Args:
      prompts: token ids, int32 [L_b] each, of any lengths; all form one batch.
      temperature: 0 takes the likeliest token, above it tokens are drawn from softmax(logits / temperature).
      top_p: draw from the likeliest tokens only, the fewest whose probability is `top_p` in all (Holtzman et
        al. 2020, nucleus sampling).
      eos_id: a row ends with this token (one of these), which is then its last one.
      stop: whether a row, by its tokens so far, may end. Asked every `decoding.SEGMENT` tokens: what comes after
        the place that it was waiting for is the caller's to cut off.
      positions: rotary positions of each prompt, int [L_b]; default 0, 1, ... The answer counts on from the last.
      prefill_chunk: tokens of the prompts read at a time.
      rng: a `jax.random.key`, or one for each prompt, needed when the temperature is not 0.

    Returns:
      The new tokens of each prompt, int32.

    Raises:
      UserError: an empty prompt, a token id beyond the vocabulary, a temperature below 0 or without rng, a top_p
        that is not in (0, 1].
    """
    if not len(prompts):
        return []
    filled = prefill(
        config, params, prompts, room=max_new_tokens, chunk=prefill_chunk, positions=positions
    )
    return filled.generate(
        max_new_tokens, temperature=temperature, top_p=top_p, eos_id=eos_id, stop=stop, rng=rng,
        keep=False,
    )  # fmt: skip


class AnswerScore(NamedTuple):
    """Of one answer: the negative log-probability of each token (nats) and the token the model held likeliest."""

    nll: np.ndarray  # float32 [A]
    argmax: np.ndarray  # int32 [A]


@dataclasses.dataclass(frozen=True)
class Prefilled:
    """Prompts that have been read: the cache behind them and the hidden state that predicts what comes next.

    Nothing here changes: `generate` and `score` may be called in any order, any number of times (after
    `generate(keep=False)`, which gives the cache away, no more).
    """

    config: LlamaConfig
    params: dict
    cache: dict
    last_BD: jax.Array  # final hidden state of each prompt's last token
    next_positions_B: np.ndarray  # int32: of the first token that comes after each prompt
    room: int  # tokens that the cache has left

    def generate(
        self,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        eos_id: int | Sequence[int] | None = None,
        stop: Callable[[np.ndarray], bool] | None = None,
        rng: jax.Array | None = None,
        keep: bool = True,
    ) -> list[np.ndarray]:
        """The prompts' continuations; see the function `generate`. `keep=False` spares a copy of the cache."""
        self._check_room(max_new_tokens)
        cache = jax.tree.map(jnp.copy, self.cache) if keep else self.cache
        rows, _ = decoding.decode(
            self.config, self.params, cache, self.last_BD, self.next_positions_B, max_new_tokens,
            temperature=temperature, top_p=top_p, eos_id=eos_id, stop=stop, rng=rng,
        )  # fmt: skip
        return rows

    def score(self, answers: Sequence[np.ndarray]) -> list[AnswerScore]:
        """How the model rates one given answer for each prompt, every token given those before it.

        Greedy generation gives exactly the answer if and only if its `argmax` equals it everywhere.
        """
        if len(answers) != len(self.next_positions_B):
            raise UserError(
                f"{len(answers)} answers for {len(self.next_positions_B)} prompts; one each"
            )
        check_tokens(self.config, answers, "answer")
        lengths_B = np.array([len(answer) for answer in answers], np.int32)
        self._check_room(int(lengths_B.max()))
        # Padded on the right with segment id 0: what is there lies after all that counts.
        width = min(_round_up(int(lengths_B.max()), 8), self.room)
        targets_BA = np.zeros((len(answers), width), np.int32)
        for row, answer in zip(targets_BA, answers, strict=True):
            row[: len(answer)] = answer
        inside_BA = np.arange(width) < lengths_B[:, None]
        positions_BA = self.next_positions_B[:, None] + np.arange(width)
        stats = _score(
            self.config,
            self.params,
            self.cache,
            self.last_BD,
            targets_BA,
            np.where(inside_BA, positions_BA, 0).astype(np.int32),
            inside_BA.astype(np.int32),
        )
        logprob_BA, argmax_BA = np.asarray(stats["logprob"]), np.asarray(stats["argmax"])
        return [
            AnswerScore(-logprob_A[:count], argmax_A[:count])
            for logprob_A, argmax_A, count in zip(logprob_BA, argmax_BA, lengths_B, strict=True)
        ]

    def _check_room(self, tokens: int) -> None:
        if tokens > self.room:
            raise UserError(
                f"{tokens} tokens after the prompt, but prefill left room for {self.room}"
            )


def prefill(
    config: LlamaConfig,
    params,
    prompts: Sequence[np.ndarray],
    room: int,
    chunk: int = PREFILL_CHUNK,
    positions: Sequence[np.ndarray] | None = None,
) -> Prefilled:
    """Reads prompts into a cache with space for at least `room` more tokens.

    Args:
      prompts: token ids, int32 [L_b] each; all form one batch.
      room: tokens that `generate` or `score` shall be able to add.
      chunk: tokens read at a time. Every chunk length compiles once per cache length.
      positions: rotary positions of each prompt, int [L_b]; default 0, 1, ...

    Raises:
      UserError: no prompt, an empty one, a token id beyond the vocabulary, positions of another length.
    """
    if chunk < 1 or room < 1:
        raise UserError(f"prefill: chunk is {chunk}, room is {room}; allowed: 1 and more")
    rows, width = _padded(config, prompts, "prompt", chunk, positions)
    params = ready(config, params)
    cache_length = _round_up(width + room, granule(config, chunk))
    cache = new_cache(config, params, len(prompts), cache_length)
    last_BD, cache = _read_all(config, params, cache, rows, chunk)
    return Prefilled(config, params, cache, last_BD, rows[1][:, -1] + 1, cache_length - width)


def new_cache(config: LlamaConfig, params, batch: int, length: int) -> dict:
    """An empty cache that lies as the parameters do: rows over the data axes of their mesh, key heads over its
    tensor axis, and the sequence over its context axis, each where it divides."""
    mesh = decoding.mesh_of(params)
    if mesh is None:
        return init_cache(config, batch, length)

    def axes(names, size):
        shards = int(np.prod([mesh.shape[name] for name in names]))
        return names if shards > 1 and size % shards == 0 else None

    rows, sequence = axes(("data", "fsdp"), batch), axes(("context",), length)
    heads = axes(("tensor",), config.num_kv_heads)
    spec = jax.sharding.PartitionSpec
    specs = {
        "k": spec(None, rows, sequence, heads, None),
        "v": spec(None, rows, sequence, heads, None),
        "segment_ids": spec(rows, sequence),
        "length": spec(),
    }
    shardings = {name: jax.sharding.NamedSharding(mesh, each) for name, each in specs.items()}
    return jax.jit(lambda: init_cache(config, batch, length), out_shardings=shardings)()


def check_tokens(config: LlamaConfig, sequences: Sequence[np.ndarray], what: str) -> None:
    """Raises `UserError` where there is no sequence, an empty one, or an id that the model has no embedding for."""
    if not len(sequences):
        raise UserError(f"no {what} is given; allowed: one and more")
    for index, sequence in enumerate(sequences):
        ids = np.asarray(sequence)
        if ids.ndim != 1 or not len(ids):
            raise UserError(
                f"{what} {index} has shape {ids.shape}; allowed: [L] with L of 1 and more"
            )
        bad = np.flatnonzero((ids < 0) | (ids >= config.vocab_size))
        if len(bad):
            raise UserError(
                f"{what} {index}: token id {ids[bad[0]]} at position {bad[0]} is outside of the vocabulary, "
                f"0 to {config.vocab_size - 1}"
            )


def _padded(config, sequences, what, chunk, positions):
    """((tokens, positions, segment ids), each int32 [B, width] padded on the left, width)."""
    check_tokens(config, sequences, what)
    lengths = [len(sequence) for sequence in sequences]
    if positions is None:
        positions = [np.arange(length) for length in lengths]
    elif [len(each) for each in positions] != lengths:
        raise UserError(f"positions: lengths {[len(p) for p in positions]}, {what}s {lengths}")
    width = _round_up(max(lengths), granule(config, chunk))
    rows = np.zeros((3, len(sequences), width), np.int32)
    for row, (tokens, places) in enumerate(zip(sequences, positions, strict=True)):
        rows[0, row, width - len(tokens) :] = tokens
        rows[1, row, width - len(tokens) :] = places
        rows[2, row, width - len(tokens) :] = 1
    return tuple(rows), width


def _read_all(config, params, cache, rows, chunk):
    """Reads [B, L] rows chunk by chunk: (hidden state of the last token, the longer cache)."""
    width = rows[0].shape[1]
    # The short chunk comes first: it is the one that holds the padding.
    edges = [0, *range(width % chunk or chunk, width + 1, chunk)]
    for start, stop in itertools.pairwise(edges):
        last_BD, cache = _read(config, params, cache, *(a[:, start:stop] for a in rows))
    return last_BD, cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(config, params, cache, tokens_BL, positions_BL, segment_ids_BL):
    """One chunk of the prompts: (hidden state of its last token, the longer cache)."""
    x_BLD, cache = Llama(config).apply(
        {"params": params}, tokens_BL, positions_BL, segment_ids_BL, cache
    )
    return x_BLD[:, -1], cache


@functools.partial(jax.jit, static_argnums=0)
def _score(config, params, cache, last_BD, targets_BA, positions_BA, segment_ids_BA):
    """`token_stats` of the answers. The prompt's last state predicts the first token, so the last is not read."""
    x_BAD = last_BD[:, None]
    if targets_BA.shape[1] > 1:
        inputs = (a[:, :-1] for a in (targets_BA, positions_BA, segment_ids_BA))
        answer_BAD, _ = Llama(config).apply({"params": params}, *inputs, cache)
        x_BAD = jnp.concatenate([x_BAD, answer_BAD], axis=1)
    return token_stats(params, x_BAD, targets_BA)


def granule(config: LlamaConfig, chunk: int) -> int:
    """What lengths of prompts and caches are rounded up to multiples of. Where the encoding goes by a cache's length it
    is the same on every platform, and so are the answers."""
    coarse = current().platform != "cpu" and not config.rope_scaling.by_length
    return min(chunk, ACCELERATOR_GRANULE if coarse else GRANULE)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
