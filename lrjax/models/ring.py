"""Ring attention (Liu et al., arXiv 2310.01889): no device ever holds the keys and values of the whole sequence.

Device d keeps the queries of its two chunks in head-tail order (`lrjax.models.context`). Keys and values go round: at
step s it has those of device d - s, attends to them, and passes them on while it does. What a query gathered from two
sets of keys is joined by their log-sum-exps; the backward pass goes round once more, the gradients of keys and values
with their keys, with the log-sum-exp of all keys in every step.

A chunk of queries sees nothing, all or the lower triangle of a chunk of keys. Two of the four pairs of chunks that meet
at a step see anything (three at step 0), as many on every device.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

_LOW = -1e30  # finite: exp(_LOW - _LOW) is not NaN


class Part(NamedTuple):
    """Attention of some queries to some keys, of which the softmax goes over more.

    forward: (q_BLNH, k_BSKH, v_BSKH, q_seg_BL, k_seg_BS, q_offset, window) -> the output as if these were all keys, and
        the log-sum-exp of the scores, float32 [B, L, N].
    backward: (the same seven, out_BLNH, lse_BLN, g_BLNH) -> cotangents of q, k, v; output and log-sum-exp of all keys.
    """

    forward: Callable
    backward: Callable


def ring(part: Part, axis: str, n: int, q, k, v, seg, window=None):
    """Attends with this device's chunks; to be called under `shard_map`.

    Args:
        axis: the mesh axis of n devices that the sequence is split over.
        q, k, v, seg: [B, l, N, H], [B, l, K, H] twice and [B, l]: this device's two chunks.
        window: keys that a query sees, itself among them; None: all before it.
    """

    # A kernel's mask may be made of a fixed window, which as an argument of `attend` would arrive traced.
    fixed = None if isinstance(window, jax.Array) else window

    @jax.custom_vjp
    def attend(q, k, v, seg, traced):
        return forward(q, k, v, seg, traced)[0]

    def forward(q, k, v, seg, traced):
        window = fixed if traced is None else traced
        out, lse = _round_of_outputs(part, axis, n, q, k, v, seg, window)
        out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
        return out, (q, k, v, seg, traced, out, lse)

    def backward(residuals, g):
        q, k, v, seg, traced, out, lse = residuals
        window = fixed if traced is None else traced
        return *_round_of_gradients(part, axis, n, q, k, v, seg, window, out, lse, g), None, None

    attend.defvjp(forward, backward)
    return attend(q, k, v, seg, window if fixed is None else None)


def _round_of_outputs(part, axis, n, q, k, v, seg, window):
    qs, segs = _chunks(q), _chunks(seg)
    half = qs[0].shape[1]

    def step(carry):
        s, found, held = carry
        passed_on = _pass_on(held, axis, n)
        ks, vs, k_segs = held
        for a, b, offset in _pairs(axis, n, s, half):

            def attended(found=found, a=a, b=b, offset=offset):
                out, lse = part.forward(qs[a], ks[b], vs[b], segs[a], k_segs[b], offset, window)
                return _join(found[a], out, lse)

            joined = lax.cond(_sees(offset, half, window), attended, lambda one=found[a]: one)
            found = tuple(joined if index == a else one for index, one in enumerate(found))
        return s + 1, found, passed_on

    nothing = jnp.zeros(qs[0].shape, jnp.float32), jnp.full(qs[0].shape[:3], _LOW)
    start = jnp.int32(0), (nothing, nothing), (_chunks(k), _chunks(v), segs)
    # No scan: under remat JAX would keep what every step of a scan finds.
    _, found, _ = lax.while_loop(lambda carry: carry[0] < n, step, start)
    out, lse = (jnp.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    return out.astype(q.dtype), lse


def _join(found, out, lse):
    """Output and log-sum-exp of two sets of keys together."""
    so_far, lse_so_far = found
    both = jnp.logaddexp(lse_so_far, lse)
    weight = jnp.exp(lse - both)[..., None]
    # A query that sees none of the new keys: its output there may be NaN.
    new = jnp.where(weight > 0, weight * out.astype(jnp.float32), 0.0)
    return jnp.exp(lse_so_far - both)[..., None] * so_far + new, both


def _round_of_gradients(part, axis, n, q, k, v, seg, window, out, lse, g):
    qs, segs, outs, lses, gs = map(_chunks, (q, seg, out, lse, g))
    half = qs[0].shape[1]

    def zeros(x):
        return tuple(jnp.zeros(chunk.shape, jnp.float32) for chunk in _chunks(x))

    def step(carry, s):
        q_bars, held, k_bars, v_bars = carry
        passed_on = _pass_on(held, axis, n)
        ks, vs, k_segs = held
        bars = q_bars, k_bars, v_bars
        for a, b, offset in _pairs(axis, n, s, half):

            def added(bars=bars, a=a, b=b, offset=offset):
                new = part.backward(
                    qs[a], ks[b], vs[b], segs[a], k_segs[b], offset, window, outs[a], lses[a], gs[a]
                )
                return tuple(
                    bar[index] + x for bar, x, index in zip(bars, new, (a, b, b), strict=True)
                )

            def kept(bars=bars, a=a, b=b):
                return bars[0][a], bars[1][b], bars[2][b]

            new = lax.cond(_sees(offset, half, window), added, kept)
            bars = tuple(
                tuple(x if i == index else one for i, one in enumerate(bar))
                for bar, x, index in zip(bars, new, (a, b, b), strict=True)
            )
        q_bars, k_bars, v_bars = bars
        return (q_bars, passed_on, *_pass_on((k_bars, v_bars), axis, n)), None

    start = zeros(q), (_chunks(k), _chunks(v), segs), zeros(k), zeros(v)
    # After n steps keys, values and their gradients are back where they belong.
    (q_bars, _, k_bars, v_bars), _ = lax.scan(step, start, jnp.arange(n))
    return tuple(
        jnp.concatenate(bars, axis=1).astype(x.dtype)
        for bars, x in ((q_bars, q), (k_bars, k), (v_bars, v))
    )


def _chunks(x):
    half = x.shape[1] // 2
    return x[:, :half], x[:, half:]


# Once more than is needed in a round: the last one brings all home, and every step is the same.
def _pass_on(x, axis, n):
    return lax.ppermute(x, axis, [(d, (d + 1) % n) for d in range(n)])


def _pairs(axis, n, step, half):
    """(chunk of queries, chunk of keys, index of the first query among the keys) of what meets at a step."""
    here = lax.axis_index(axis)
    there = (here - step) % n
    q_chunks, k_chunks = (here, 2 * n - 1 - here), (there, 2 * n - 1 - there)
    # The queries of a head come before the keys of every tail.
    for a, b in ((0, 0), (1, 0), (1, 1)):
        yield a, b, (q_chunks[a] - k_chunks[b]) * half


def _sees(offset, half, window):
    """Whether the first query of a chunk, `offset` behind the first key, sees a key; with a window, the last key."""
    sees = offset >= 0
    return sees if window is None else sees & (offset - half + 1 < window)
