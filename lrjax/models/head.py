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

from lrjax.models.linear import contract

CHUNK_ELEMENTS = 2**26


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

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk_sum(total, args):
        x_BCD, targets_BC, weights_BC = args
        logits_BCV = logits(params, x_BCD)
        ce_BC = jax.nn.logsumexp(logits_BCV, axis=-1) - _pick(logits_BCV, targets_BC)
        return total + jnp.sum(weights_BC * ce_BC), None

    chunks = _split(_chunk_size(params, targets_BL, chunk), x_BLD, targets_BL, weights_BL)
    total, _ = lax.scan(chunk_sum, jnp.zeros((), jnp.float32), chunks)
    return total, jnp.sum(weights_BL)


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
    return jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1)


def _pick(logits_BCV, targets_BC):
    return jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
