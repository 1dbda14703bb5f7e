"""The language-model head: logits, the loss and per-token statistics, without holding [B, L, V].

All functions take the whole parameter tree (tied or untied head) and the model's final hidden states. Hidden
states at index t predict the token at t + 1; `targets_BL` are given by the caller, aligned with `x_BLD`.
`chunk` is the number of indices of L whose logits exist at a time, one at least; by default so many that a device's
part of them stays below `CHUNK_ELEMENTS` numbers, of statistics below `STATS_ELEMENTS` or `CACHED_ELEMENTS`.

    logits_BLV = logits(params, x_BLD)                                     # small models, generation
    total, weight = weighted_cross_entropy(params, x_BLD, targets_BL, weights_BL)
    stats = token_stats(params, x_BLD, targets_BL)                         # perplexity
    stats = next_token_stats(params, x_BLD, tokens_BL)                     # the scorer

On a mesh (`lrjax.sharding`) the head is split over its vocabulary. Where that split and the sequence share a mesh
axis, a chunk's hidden states are gathered along it: each device makes its own vocabulary's logits of all the tokens of
its group, and only sums over the vocabulary travel (`lrjax.models.vocab_split`).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lrjax.models.exponential import exp_to_one
from lrjax.models.linear import contract, outer_sum
from lrjax.models.vocab_split import on_devices
from lrjax.sharding import constrain, current

CHUNK_ELEMENTS = 2**25  # 128 MB of float32 logits
# Of statistics, of which the compiler keeps a few copies; with a tied head on a CPU 12 MB, which stay in its cache.
STATS_ELEMENTS, CACHED_ELEMENTS = 2**24, 3 * 2**20
_FEWEST_ROWS = 16


def logits(params, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
    """Logits, float32: products of compute-dtype operands, accumulated in float32."""
    w, vocab_axis = _head_of(params)
    return contract(x_BLD, w.astype(x_BLD.dtype), ((2,), (1 - vocab_axis,)))


def next_token_logits(params, x_BD: Float[Array, "B D"]) -> Float[Array, "B V"]:
    """`logits` of a few hidden states, as decoding has them.

    At least 16 rows, and a tied head on the left: of one bfloat16 row XLA's CPU backend makes a float32 product with a
    copy of the whole head, and of a tied head on the right a transposed copy.
    """
    w, vocab_axis = _head_of(params)
    B = x_BD.shape[0]
    x_RD = jnp.pad(x_BD, ((0, max(_FEWEST_ROWS - B, 0)), (0, 0)))
    w = w.astype(x_BD.dtype)
    if vocab_axis == 0:
        return contract(w, x_RD, ((1,), (1,))).T[:B]
    return contract(x_RD, w, ((1,), (0,)))[:B]


def token_stats(
    params, x_BLD: Float[Array, "B L D"], targets_BL: Int[Array, "B L"], chunk: int | None = None
) -> dict[str, Float[Array, "B L"]]:
    """Per index: the target's raw logit, the mean logit over the vocabulary, the target's log-probability
    (all float32), and the argmax (int32).

    With a tied head [V, D] a CPU makes logits [V, B, C]: with the vocabulary last XLA copies the whole head transposed
    first, and needs larger chunks of tokens for its product (docs/log.md, 27 November 2026, fifth part).
    """
    w, vocab_axis = _head_of(params)
    V = w.shape[vocab_axis]
    first = vocab_axis == 0 and current().platform == "cpu"
    axis = 0 if first else -1

    def local(split, w, x_BLD, targets_BL):
        w = split.whole_width(w.astype(x_BLD.dtype))

        def stats(x_BCD, targets_BC):
            x_BCD, targets_BC = split.gather_tokens(x_BCD), split.gather_tokens(targets_BC)
            if first:
                logits = contract(w, x_BCD, ((1,), (2,)))
            else:
                logits = contract(x_BCD, w, ((2,), (1 - vocab_axis,)))
            logit_BC = split.pick(logits, targets_BC, axis)
            return {
                "logit": split.own_tokens(logit_BC),
                "mean_logit": split.own_tokens(split.sum(logits.sum(axis=axis)) / V),
                "logprob": split.own_tokens(logit_BC - split.logsumexp(logits, axis)),
                "argmax": split.own_tokens(split.argmax(logits, axis)),
            }

        L = targets_BL.shape[1]
        most = CACHED_ELEMENTS if first else STATS_ELEMENTS
        chunks = _split(_chunk_size(split, targets_BL, w, chunk, most), x_BLD, targets_BL)
        stats_CBc = lax.map(lambda args: stats(*args), chunks)
        return jax.tree.map(lambda leaf: _join(leaf)[:, :L], stats_CBc)

    names = dict.fromkeys(("logit", "mean_logit", "logprob", "argmax"), "tokens")
    stats = on_devices(local, vocab_axis, w, x_BLD, targets_BL, outputs=names)
    # Numbers of tokens, not of states: whole on every device, so that every process can read them.
    return jax.tree.map(lambda a: constrain(a, (None, None)), stats)


def next_token_stats(
    params, x_BLD: Float[Array, "B L D"], tokens_BL: Int[Array, "B L"], chunk: int | None = None
) -> dict[str, Float[Array, "B L-1"]]:
    """`token_stats` of every token but the first, given those before it; `x_BLD` are the states of `tokens_BL`."""
    # The last state predicts nothing and comes along: L - 1 states do not divide over devices, and each would hold all.
    stats = token_stats(params, x_BLD, jnp.roll(tokens_BL, -1, axis=1), chunk)
    return jax.tree.map(lambda a: a[:, :-1], stats)


def kl_divergence(
    params_p, xp_BLD: Float[Array, "B L D"], params_q, xq_BLD: Float[Array, "B L E"], chunk: int
) -> Float[Array, "B L"]:
    """KL(p || q) of the next-token distributions of two models with one vocabulary, float32 in nats.

    `chunk` indices of L have logits at a time, of both models. On a mesh the compiler lays it out.
    """

    def divergence(xp_BCD, xq_BCD):
        p_BCV = jax.nn.log_softmax(logits(params_p, xp_BCD))
        q_BCV = jax.nn.log_softmax(logits(params_q, xq_BCD))
        return jnp.sum(jnp.exp(p_BCV) * (p_BCV - q_BCV), axis=-1)

    L = xp_BLD.shape[1]
    chunks = _split(-(-L // -(-L // min(chunk, L))), xp_BLD, xq_BLD)
    return _join(lax.map(lambda pair: divergence(*pair), chunks))[:, :L]


def weighted_cross_entropy(
    params,
    x_BLD: Float[Array, "B L D"],
    targets_BL: Int[Array, "B L"],
    weights_BL: Float[Array, "B L"],
    chunk: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of weight * cross-entropy, sum of weights), float32. Weight 0 leaves a target out."""
    weights_BL = weights_BL.astype(jnp.float32)
    w, vocab_axis = _head_of(params)
    return _sum_ce(w, x_BLD, targets_BL, weights_BL, vocab_axis, chunk), jnp.sum(weights_BL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _sum_ce(w, x_BLD, targets_BL, weights_BL, vocab_axis, chunk):
    """Sum of weight * cross-entropy; w is [V, D] (vocab_axis 0) or [D, V] (1)."""

    def local(split, w, x_BLD, targets_BL, weights_BL):
        w = split.whole_width(w.astype(x_BLD.dtype))

        def step(total, args):
            x_BCD, targets_BC, weights_BC = map(split.gather_tokens, args)
            logits_BCV = contract(x_BCD, w, ((2,), (1 - vocab_axis,)))
            ce_BC = split.logsumexp(logits_BCV) - split.pick(logits_BCV, targets_BC)
            return total + jnp.sum(weights_BC * ce_BC), None

        chunk_ = _chunk_size(split, targets_BL, w, chunk)
        chunks = _split(chunk_, x_BLD, targets_BL, weights_BL)
        return split.sum_tokens(lax.scan(step, jnp.zeros((), jnp.float32), chunks)[0])

    return on_devices(local, vocab_axis, w, x_BLD, targets_BL, weights_BL, outputs="scalar")


def _sum_ce_forward(w, x_BLD, targets_BL, weights_BL, vocab_axis, chunk):
    """The sum and, while a chunk's logits are there, its gradients: they are linear in the one cotangent that
    is still to come, so no logits have to be computed a second time (as in Hsu et al. 2024, Liger Kernel)."""

    def local(split, w, x_BLD, targets_BL, weights_BL):
        dtype = w.dtype
        w = split.whole_width(w.astype(x_BLD.dtype))

        def step(carry, args):
            total, w_bar = carry
            x_BCD, targets_BC, weights_BC = map(split.gather_tokens, args)
            logits_BCV = contract(x_BCD, w, ((2,), (1 - vocab_axis,)))
            lse_BC = split.logsumexp(logits_BCV)
            ce_BC = lse_BC - split.pick(logits_BCV, targets_BC)
            hit_BCV = split.vocabulary(logits_BCV) == targets_BC[..., None]
            logits_bar_BCV = exp_to_one(logits_BCV - lse_BC[..., None]) - hit_BCV
            logits_bar_BCV = (logits_bar_BCV * weights_BC[..., None]).astype(x_BCD.dtype)
            x_bar_BCD = contract(logits_bar_BCV, w, ((2,), (vocab_axis,)))
            x_TD = x_BCD.reshape(-1, x_BCD.shape[-1])
            logits_bar_TV = logits_bar_BCV.reshape(-1, logits_BCV.shape[-1])
            pair = (logits_bar_TV, x_TD) if vocab_axis == 0 else (x_TD, logits_bar_TV)
            carry = total + jnp.sum(weights_BC * ce_BC), w_bar + outer_sum(*pair)
            x_bar_BCD = split.sum_to_own_tokens(x_bar_BCD)
            return carry, (x_bar_BCD.astype(x_BCD.dtype), split.own_tokens(ce_BC))

        start = jnp.zeros((), jnp.float32), jnp.zeros(w.shape, jnp.float32)
        chunk_ = _chunk_size(split, targets_BL, w, chunk)
        chunks = _split(chunk_, x_BLD, targets_BL, weights_BL)
        (total, w_bar), (x_bar, ce) = lax.scan(step, start, chunks)
        L = targets_BL.shape[1]
        w_bar = split.sum_to_own_width(w_bar).astype(dtype)
        return split.sum_tokens(total), (w_bar, _join(x_bar)[:, :L], _join(ce)[:, :L])

    outputs = "scalar", ("head", "states", "tokens")
    return on_devices(local, vocab_axis, w, x_BLD, targets_BL, weights_BL, outputs=outputs)


def _sum_ce_backward(vocab_axis, chunk, residuals, g):
    w_bar, x_bar_BLD, ce_BL = residuals
    return (g * w_bar).astype(w_bar.dtype), (g * x_bar_BLD).astype(x_bar_BLD.dtype), None, g * ce_BL


_sum_ce.defvjp(_sum_ce_forward, _sum_ce_backward)


def _head_of(params):
    """The head's weight and the axis of its vocabulary: [D, V] and 1, or the tied embedding [V, D] and 0."""
    return (params["head"], 1) if "head" in params else (params["embedding"], 0)


def _chunk_size(split, targets_BL, w, chunk, most=CHUNK_ELEMENTS):
    """Indices of a device's own part of L in a chunk: `chunk` of the whole L, or those of `most` logits."""
    B, L = targets_BL.shape
    if chunk is None:
        logits_an_index = B * split.gathered * w.shape[split.vocab_axis]
        chunk = max(1, most // logits_an_index)
    else:
        chunk = max(1, chunk // split.length_size)
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
