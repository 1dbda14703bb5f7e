"""The language-model head: logits, the loss and per-token statistics, without holding [B, L, V].

All functions take the whole parameter tree (tied or untied head) and the model's final hidden states. Hidden
states at index t predict the token at t + 1; `targets_BL` are given by the caller, aligned with `x_BLD`.
`chunk` is the number of indices of L whose logits exist at a time; by default so many that they stay below
`CHUNK_ELEMENTS` numbers.

    logits_BLV = logits(params, x_BLD)                                     # small models, generation
    total, weight = weighted_cross_entropy(params, x_BLD, targets_BL, weights_BL)
    stats = token_stats(params, x_BLD, targets_BL)                         # the scorer, perplexity
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lrjax.models.linear import contract, outer_sum

CHUNK_ELEMENTS = 2**25  # 128 MB of float32 logits


def logits(params, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
    """Logits, float32: products of compute-dtype operands, accumulated in float32."""
    if "head" in params:
        return contract(x_BLD, params["head"].astype(x_BLD.dtype), ((2,), (0,)))
    return contract(x_BLD, params["embedding"].astype(x_BLD.dtype), ((2,), (1,)))


def token_stats(
    params, x_BLD: Float[Array, "B L D"], targets_BL: Int[Array, "B L"], chunk: int | None = None
) -> dict[str, Float[Array, "B L"]]:
    """Per index: the target's raw logit, the mean logit over the vocabulary, the target's log-probability
    (all float32), and the argmax (int32)."""

    def stats(x_BCD, targets_BC):
        logits_BCV = logits(params, x_BCD)
        logit_BC = _pick(logits_BCV, targets_BC)
        return {
            "logit": logit_BC,
            "mean_logit": logits_BCV.mean(axis=-1),
            "logprob": logit_BC - jax.nn.logsumexp(logits_BCV, axis=-1),
            "argmax": jnp.argmax(logits_BCV, axis=-1).astype(jnp.int32),
        }

    L = targets_BL.shape[1]
    chunks = _split(_chunk_size(params, targets_BL, chunk), x_BLD, targets_BL)
    stats_CBc = lax.map(lambda args: stats(*args), chunks)
    return jax.tree.map(lambda leaf: _join(leaf)[:, :L], stats_CBc)


def weighted_cross_entropy(
    params,
    x_BLD: Float[Array, "B L D"],
    targets_BL: Int[Array, "B L"],
    weights_BL: Float[Array, "B L"],
    chunk: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of weight * cross-entropy, sum of weights), float32. Weight 0 leaves a target out."""
    weights_BL = weights_BL.astype(jnp.float32)
    if "head" in params:
        w, vocab_axis = params["head"], 1
    else:
        w, vocab_axis = params["embedding"], 0
    chunk = _chunk_size(params, targets_BL, chunk)
    return _sum_ce(w, x_BLD, targets_BL, weights_BL, vocab_axis, chunk), jnp.sum(weights_BL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _sum_ce(w, x_BLD, targets_BL, weights_BL, vocab_axis, chunk):
    """Sum of weight * cross-entropy; w is [V, D] (vocab_axis 0) or [D, V] (1)."""

    def step(total, args):
        x_BCD, targets_BC, weights_BC = args
        logits_BCV = contract(x_BCD, w.astype(x_BCD.dtype), ((2,), (1 - vocab_axis,)))
        ce_BC = jax.nn.logsumexp(logits_BCV, axis=-1) - _pick(logits_BCV, targets_BC)
        return total + jnp.sum(weights_BC * ce_BC), None

    chunks = _split(chunk, x_BLD, targets_BL, weights_BL)
    return lax.scan(step, jnp.zeros((), jnp.float32), chunks)[0]


def _sum_ce_forward(w, x_BLD, targets_BL, weights_BL, vocab_axis, chunk):
    """The sum and, while a chunk's logits are there, its gradients: they are linear in the one cotangent that
    is still to come, so no logits have to be computed a second time (as in Hsu et al. 2024, Liger Kernel)."""

    def step(carry, args):
        total, w_bar = carry
        x_BCD, targets_BC, weights_BC = args
        logits_BCV = contract(x_BCD, w.astype(x_BCD.dtype), ((2,), (1 - vocab_axis,)))
        lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        ce_BC = lse_BC - _pick(logits_BCV, targets_BC)
        hit_BCV = jnp.arange(logits_BCV.shape[-1]) == targets_BC[..., None]
        logits_bar_BCV = (jnp.exp(logits_BCV - lse_BC[..., None]) - hit_BCV) * weights_BC[..., None]
        logits_bar_BCV = logits_bar_BCV.astype(x_BCD.dtype)
        x_bar_BCD = contract(logits_bar_BCV, w.astype(x_BCD.dtype), ((2,), (vocab_axis,)))
        x_TD = x_BCD.reshape(-1, x_BCD.shape[-1])
        logits_bar_TV = logits_bar_BCV.reshape(-1, logits_BCV.shape[-1])
        pair = (logits_bar_TV, x_TD) if vocab_axis == 0 else (x_TD, logits_bar_TV)
        carry = total + jnp.sum(weights_BC * ce_BC), w_bar + outer_sum(*pair)
        return carry, (x_bar_BCD.astype(x_BCD.dtype), ce_BC)

    start = jnp.zeros((), jnp.float32), jnp.zeros(w.shape, jnp.float32)
    chunks = _split(chunk, x_BLD, targets_BL, weights_BL)
    (total, w_bar), (x_bar, ce) = lax.scan(step, start, chunks)
    L = targets_BL.shape[1]
    return total, (w_bar.astype(w.dtype), _join(x_bar)[:, :L], _join(ce)[:, :L])


def _sum_ce_backward(vocab_axis, chunk, residuals, g):
    w_bar, x_bar_BLD, ce_BL = residuals
    return (g * w_bar).astype(w_bar.dtype), (g * x_bar_BLD).astype(x_bar_BLD.dtype), None, g * ce_BL


_sum_ce.defvjp(_sum_ce_forward, _sum_ce_backward)


def _chunk_size(params, targets_BL, chunk):
    B, L = targets_BL.shape
    if chunk is None:
        chunk = max(1, CHUNK_ELEMENTS // (B * params["embedding"].shape[0]))
    count = -(-L // min(chunk, L))
    return -(-L // count)  # as even as they come: little padding


def _split(chunk, *arrays_BL):
    """Arrays [B, L, ...] as [chunks, B, chunk, ...], padded with zeros (weight 0)."""

    def split(a):
        B, L = a.shape[:2]
        a = jnp.pad(a, [(0, 0), (0, -L % chunk)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(B, -1, chunk, *a.shape[2:]), 1, 0)

    return tuple(split(a) for a in arrays_BL)


def _join(a):
    """The inverse of `_split`, padding still there."""
    a = jnp.moveaxis(a, 0, 1)
    return a.reshape(a.shape[0], -1, *a.shape[3:])


def _pick(logits_BCV, targets_BC):
    return jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
