"""Token by token after a prefill: greedy or drawn, until a row's end, a stop or the budget.

    rows, cache = decode(config, params, cache, last_BD, positions_B, 128, eos_id=2, stop=lambda ids: ...)

Tokens come in segments of `SEGMENT`: one compiled loop for each, between which the host looks at what has been
written. So every budget and every stop shares one program, and a row that runs into a stop does not fill its budget.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lrjax.errors import UserError
from lrjax.models.head import next_token_logits
from lrjax.models.llama import Llama, LlamaConfig
from lrjax.sharding import constrain

SEGMENT = 16
_MAX_EOS = 8  # end tokens of one model


def decode(
    config: LlamaConfig,
    params,
    cache: dict,
    last_BD: jax.Array,
    positions_B: np.ndarray,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_id: int | Sequence[int] | None = None,
    stop: Callable[[np.ndarray], bool] | None = None,
    rng: jax.Array | None = None,
) -> tuple[list[np.ndarray], dict]:
    """Continues what the cache holds; arguments as in `generate.generate`.

    Args:
      cache: is given away; it needs room for `max_new_tokens`.
      last_BD: hidden state of each row's last token.
      positions_B: position of the first new token of each row.

    Returns:
      (new tokens of each row, the cache after them).
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; allowed: 1 and more")
    if temperature < 0:
        raise UserError(f"temperature is {temperature}; allowed: 0 (greedy) and above")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; allowed: above 0, up to 1")
    if temperature and rng is None:
        raise UserError(f"temperature is {temperature}: drawing tokens needs an rng")
    ends = [] if eos_id is None else np.atleast_1d(np.asarray(eos_id, np.int32)).tolist()
    if len(ends) > _MAX_EOS:
        raise UserError(f"eos_id: {len(ends)} end tokens; allowed: up to {_MAX_EOS}")
    eos_ids = np.full(_MAX_EOS, -1, np.int32)
    eos_ids[: len(ends)] = ends
    way = "greedy" if not temperature else "draw" if top_p == 1 else "nucleus"
    sampling = (jnp.float32(temperature or 1.0), jnp.float32(top_p), eos_ids)
    key_B = row_keys(jax.random.key(0) if rng is None else rng, len(last_BD))
    positions_B = jnp.asarray(positions_B, jnp.int32)
    token_B, done_B = _first(way, params, last_BD, sampling, key_B)
    rows = [[token] for token in np.asarray(token_B).tolist()]
    for start in range(1, max_new_tokens, SEGMENT):
        if stop is not None:
            done_B = np.asarray(done_B) | [stop(np.asarray(row, np.int32)) for row in rows]
        if np.all(done_B):
            break
        count = min(SEGMENT, max_new_tokens - start)
        state = _segment(
            config, way, params, cache, token_B, positions_B, done_B, start, count, sampling, key_B
        )
        token_B, done_B, cache = state.token_B, state.done_B, state.cache
        kept_B = np.asarray(state.counts_B)
        for row, new, kept in zip(rows, np.asarray(state.out_BT), kept_B, strict=True):
            row.extend(new[:kept].tolist())
    return [np.asarray(row, np.int32) for row in rows], cache


def row_keys(rng: jax.Array, count: int) -> jax.Array:
    """A key for each of `count` rows: those given, or made of one. Raises `UserError` for another number of them."""
    if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) or rng.shape not in ((), (count,)):
        raise UserError(
            f"rng: {rng.dtype} of shape {rng.shape}; allowed: one jax.random.key, or {count}"
        )
    if rng.ndim:
        return rng
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(count))


class _State(NamedTuple):
    count: jax.Array  # tokens chosen in this segment, int32 scalar
    token_B: jax.Array  # the last of them
    out_BT: jax.Array
    counts_B: jax.Array  # tokens of each row up to its end
    done_B: jax.Array
    cache: dict


def _choose(way, params, x_BD, sampling, key_B, number):
    """Token `number` of each row, and whether it ends the row."""
    temperature, top_p, eos_ids = sampling
    logits_BV = next_token_logits(params, x_BD)
    if way == "greedy":
        token_B = jnp.argmax(logits_BV, axis=-1)
    else:
        logits_BV = logits_BV / temperature
        if way == "nucleus":
            logits_BV = nucleus(logits_BV, top_p)
        of_number_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, number)
        token_B = jax.vmap(jax.random.categorical)(of_number_B, logits_BV)
    token_B = token_B.astype(jnp.int32)
    return token_B, (token_B[:, None] == eos_ids).any(axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _first(way, params, x_BD, sampling, key_B):
    return _everywhere(_choose(way, params, x_BD, sampling, key_B, 0))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _segment(
    config, way, params, cache, token_B, positions_B, done_B, start, count, sampling, key_B
) -> _State:
    """Tokens number `start` to `start + count - 1`, fewer when every row has ended."""
    B = positions_B.shape[0]

    def step(state):
        number = start + state.count
        x_BLD, cache = Llama(config).apply(
            {"params": params},
            state.token_B[:, None],
            (positions_B + number - 1)[:, None],
            jnp.ones((B, 1), jnp.int32),
            state.cache,
        )
        token_B, ended_B = _choose(way, params, x_BLD[:, 0], sampling, key_B, number)
        return _State(
            count=state.count + 1,
            token_B=token_B,
            out_BT=lax.dynamic_update_slice(state.out_BT, token_B[:, None], (0, state.count)),
            counts_B=state.counts_B + ~state.done_B,
            done_B=state.done_B | ended_B,
            cache=cache,
        )

    out_BT, zeros_B = jnp.zeros((B, SEGMENT), jnp.int32), jnp.zeros(B, jnp.int32)
    first = _State(jnp.int32(0), token_B, out_BT, zeros_B, jnp.asarray(done_B), cache)
    last = lax.while_loop(lambda state: (state.count < count) & ~jnp.all(state.done_B), step, first)
    return _State(*_everywhere(last[:-1]), last.cache)


def _everywhere(tree):
    """The same arrays whole on every process: each of them goes on with the texts."""
    return jax.tree.map(lambda x: constrain(x, (None,) * x.ndim), tree)


def nucleus(logits_BV: jax.Array, top_p) -> jax.Array:
    """Logits with all but the likeliest tokens, the fewest of probability `top_p` in all, at -inf.

    Source: Holtzman et al. 2020, The Curious Case of Neural Text Degeneration.
    """
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(jax.nn.softmax(logits_BV), order_BV, axis=-1)
    before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    kept_BV = jnp.take_along_axis(before_BV < top_p, jnp.argsort(order_BV, axis=-1), axis=-1)
    return jnp.where(kept_BV, logits_BV, -jnp.inf)


def mesh_of(params):
    """The mesh of several devices that the parameters lie on, or None."""
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, jax.sharding.NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None
