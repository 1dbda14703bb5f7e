"""Generation with a key/value cache, and the log-probabilities of given answers from the same prefill.

    new = generate(config, params, [prompt_a, prompt_b], max_new_tokens=32, eos_id=2)     # token ids in and out

    filled = prefill(config, params, prompts, room=32)        # the prompts are read once, then
    filled.generate(max_new_tokens=32)                         # the model's own answers and
    filled.score(answers)                                      # how likely it holds the right ones

Prompts of different lengths are padded on the left with segment id 0 and carry their own positions, so a batch
gives what its prompts give alone. A prompt is read in chunks: memory holds the cache and one chunk's activations.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lrjax.errors import UserError
from lrjax.models.cache import init_cache
from lrjax.models.head import logits, token_stats
from lrjax.models.llama import Llama, LlamaConfig
from lrjax.sharding import constrain

PREFILL_CHUNK = 512
_GRANULE = 128  # lengths are rounded up to multiples of it, so that few shapes are compiled


def generate(
    config: LlamaConfig,
    params,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    eos_id: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    rng: jax.Array | None = None,
) -> list[np.ndarray]:
    """Continues each prompt by up to `max_new_tokens` tokens.

    Args:
      prompts: token ids, int32 [L_b] each, of any lengths; all form one batch.
      temperature: 0 takes the likeliest token, above it tokens are drawn from softmax(logits / temperature).
      eos_id: a row ends with this token, which is then its last one.
      prefill_chunk: tokens of the prompts read at a time.
      rng: a `jax.random.key`, needed when the temperature is not 0.

    Returns:
      The new tokens of each prompt, int32.

    Raises:
      UserError: an empty prompt, a token id beyond the vocabulary, a temperature below 0 or without rng.
    """
    if not len(prompts):
        return []
    filled = prefill(config, params, prompts, room=max_new_tokens, chunk=prefill_chunk)
    return filled.generate(max_new_tokens, temperature=temperature, eos_id=eos_id, rng=rng)


class AnswerScore(NamedTuple):
    """Of one answer: the negative log-probability of each token (nats) and the token the model held likeliest."""

    nll: np.ndarray  # float32 [A]
    argmax: np.ndarray  # int32 [A]


@dataclasses.dataclass(frozen=True)
class Prefilled:
    """Prompts that have been read: the cache behind them and the hidden state that predicts what comes next.

    Nothing here changes: `generate` and `score` may be called in any order, any number of times.
    """

    config: LlamaConfig
    params: dict
    cache: dict
    last_BD: jax.Array  # final hidden state of each prompt's last token
    lengths_B: np.ndarray  # tokens in each prompt
    room: int  # tokens that the cache has left

    def generate(
        self,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        eos_id: int | None = None,
        rng: jax.Array | None = None,
    ) -> list[np.ndarray]:
        """The prompts' continuations; see the function `generate`."""
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; allowed: 1 and more")
        if temperature < 0:
            raise UserError(f"temperature is {temperature}; allowed: 0 (greedy) and above")
        if temperature and rng is None:
            raise UserError(f"temperature is {temperature}: drawing tokens needs an rng")
        self._check_room(max_new_tokens)
        out_BT, counts_B = _decode(
            self.config,
            max_new_tokens,
            temperature > 0,
            self.params,
            self.cache,
            self.last_BD,
            jnp.asarray(self.lengths_B),
            jnp.float32(temperature),
            jnp.int32(-1 if eos_id is None else eos_id),
            jax.random.key(0) if rng is None else rng,
        )
        counts_B = np.asarray(counts_B)
        return [row[:count] for row, count in zip(np.asarray(out_BT), counts_B, strict=True)]

    def score(self, answers: Sequence[np.ndarray]) -> list[AnswerScore]:
        """How the model rates one given answer for each prompt, every token given those before it.

        Greedy generation gives exactly the answer if and only if its `argmax` equals it everywhere.
        """
        if len(answers) != len(self.lengths_B):
            raise UserError(f"{len(answers)} answers for {len(self.lengths_B)} prompts; one each")
        check_tokens(self.config, answers, "answer")
        lengths_B = np.array([len(answer) for answer in answers], np.int32)
        self._check_room(int(lengths_B.max()))
        # Padded on the right with segment id 0: what is there lies after all that counts.
        width = min(_round_up(int(lengths_B.max()), 8), self.room)
        targets_BA = np.zeros((len(answers), width), np.int32)
        for row, answer in zip(targets_BA, answers, strict=True):
            row[: len(answer)] = answer
        inside_BA = np.arange(width) < lengths_B[:, None]
        stats = _score(
            self.config,
            self.params,
            self.cache,
            self.last_BD,
            targets_BA,
            np.where(inside_BA, self.lengths_B[:, None] + np.arange(width), 0).astype(np.int32),
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
) -> Prefilled:
    """Reads prompts into a cache with space for at least `room` more tokens.

    Args:
      prompts: token ids, int32 [L_b] each; all form one batch.
      room: tokens that `generate` or `score` shall be able to add.
      chunk: tokens read at a time. Every chunk length compiles once per cache length.

    Raises:
      UserError: no prompt, an empty one, or a token id beyond the vocabulary.
    """
    if chunk < 1 or room < 1:
        raise UserError(f"prefill: chunk is {chunk}, room is {room}; allowed: 1 and more")
    check_tokens(config, prompts, "prompt")
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    width = _round_up(int(lengths_B.max()), min(chunk, _GRANULE))
    tokens_BL, positions_BL, segment_ids_BL = np.zeros((3, len(prompts), width), np.int32)
    for row, (prompt, length) in enumerate(zip(prompts, lengths_B, strict=True)):
        tokens_BL[row, width - length :] = prompt
        positions_BL[row, width - length :] = np.arange(length)
        segment_ids_BL[row, width - length :] = 1

    params = jax.tree.map(jnp.asarray, params)  # to the device once, not with every call
    cache_length = _round_up(width + room, min(chunk, _GRANULE))
    cache = init_cache(config, len(prompts), cache_length)
    last_BD = None
    # The short chunk comes first: it is the one that holds the padding.
    edges = [0, *range(width % chunk or chunk, width + 1, chunk)]
    for start, stop in itertools.pairwise(edges):
        inputs = (a[:, start:stop] for a in (tokens_BL, positions_BL, segment_ids_BL))
        last_BD, cache = _read(config, params, cache, *inputs)
    return Prefilled(config, params, cache, last_BD, lengths_B, cache_length - width)


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


class _State(NamedTuple):
    count: jax.Array  # tokens chosen so far, int32 scalar
    token_B: jax.Array  # the last of them
    out_BT: jax.Array
    counts_B: jax.Array  # tokens of each row up to its end
    done_B: jax.Array
    cache: dict


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(
    config, max_new_tokens, draw, params, cache, last_BD, lengths_B, temperature, eos_id, rng
):
    """Chooses and reads one token at a time until every row has ended: (out_BT, counts_B)."""
    B = lengths_B.shape[0]

    def choose(state, x_BD):
        logits_BV = logits(params, x_BD[:, None])[:, 0]
        if draw:
            key = jax.random.fold_in(rng, state.count)
            token_B = jax.random.categorical(key, logits_BV / temperature)
        else:
            token_B = jnp.argmax(logits_BV, axis=-1)
        token_B = token_B.astype(jnp.int32)
        return state._replace(
            count=state.count + 1,
            token_B=token_B,
            out_BT=lax.dynamic_update_slice(state.out_BT, token_B[:, None], (0, state.count)),
            counts_B=state.counts_B + ~state.done_B,
            done_B=state.done_B | (token_B == eos_id),
        )

    def step(state):
        x_BLD, cache = Llama(config).apply(
            {"params": params},
            state.token_B[:, None],
            (lengths_B + state.count - 1)[:, None],
            jnp.ones((B, 1), jnp.int32),
            state.cache,
        )
        return choose(state._replace(cache=cache), x_BLD[:, 0])

    zeros_B = jnp.zeros(B, jnp.int32)
    out_BT = jnp.zeros((B, max_new_tokens), jnp.int32)
    start = _State(jnp.int32(0), zeros_B, out_BT, zeros_B, jnp.zeros(B, bool), cache)
    state = lax.while_loop(
        lambda state: (state.count < max_new_tokens) & ~jnp.all(state.done_B),
        step,
        choose(start, last_BD),
    )
    # Whole on every process: each of them goes on with the texts.
    return constrain(state.out_BT, (None, None)), constrain(state.counts_B, (None,))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
