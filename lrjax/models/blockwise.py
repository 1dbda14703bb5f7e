"""Causal attention block by block: memory linear in the length, its own backward pass, any platform.

Queries and keys come in blocks (`_block_sizes`). The softmax is accumulated online over the key blocks (Milakov &
Gimelshein 2018; Dao et al. 2022), the backward pass computes the weights again from the saved log-sum-exp. A pair of
blocks is visited only if the causal order and the segment ids let anything be seen in it. The G query heads that share
a key head are folded into the rows of one product, [G * queries, H] x [H, keys], and all products have their operands
in the compute dtype, their sums in float32.

The core below treats one row of the batch and one key head; `_over_heads_and_rows` maps it over both.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lrjax.models.bits import rounded
from lrjax.models.exponential import exp_to_one
from lrjax.sharding import current

KEY_BLOCK = 512  # at most
QUERY_BLOCKS = (32, 512)  # smallest, largest
# Scores in flight over all heads and rows, 16 MB; on a CPU of one key head at a time, and of all rows up to 4 MB.
BLOCK_SCORES = 2**22
TOGETHER = 2**20

_LOW = -1e30  # below every score, yet finite: exp(-inf - _LOW) is 0 where exp(-inf + inf) is NaN


def blockwise(
    q_BLNH,
    k_BSKH,
    v_BSKH,
    q_segment_ids_BL,
    k_segment_ids_BS,
    q_offset=0,
    *,
    window=None,
    soft_cap=None,
    scale=None,
):
    """Causal attention within segments; arguments and result as in `lrjax.models.attention.attention`."""
    inputs, static = _folded(
        q_BLNH,
        k_BSKH,
        v_BSKH,
        q_segment_ids_BL,
        k_segment_ids_BS,
        q_offset,
        window,
        soft_cap,
        scale,
    )
    return _unfold(_blockwise(*inputs, static), q_BLNH.shape)


def part_forward(q, k, v, q_seg, k_seg, q_offset, window, *, soft_cap=None, scale=None):
    """Of a ring (`lrjax.models.ring.Part`): output, and log-sum-exp [B, L, N]; 0 and -1e30 where nothing is seen."""
    inputs, static = _folded(q, k, v, q_seg, k_seg, q_offset, window, soft_cap, scale)
    out_BKRH, lse_BKR = _attend(*inputs, static)
    return _unfold(out_BKRH, q.shape), _unfold(lse_BKR[..., None], (*q.shape[:3], 1))[..., 0]


def part_backward(
    q, k, v, q_seg, k_seg, q_offset, window, out, lse_BLN, g, *, soft_cap=None, scale=None
):
    """Of a ring: cotangents of q, k, v."""
    inputs, static = _folded(q, k, v, q_seg, k_seg, q_offset, window, soft_cap, scale)
    out, lse, g = (_fold_queries(x, k.shape[2], static.bq) for x in (out, lse_BLN[..., None], g))
    q_bar, k_bar, v_bar, *_ = _backward(static, (*inputs, out, lse[..., 0]), g)
    S = k.shape[1]
    return _unfold(q_bar, q.shape), k_bar.swapaxes(1, 2)[:, :S], v_bar.swapaxes(1, 2)[:, :S]


def _folded(q_BLNH, k_BSKH, v_BSKH, q_seg_BL, k_seg_BS, q_offset, window, soft_cap, scale):
    """The arguments of `_attend`, whole blocks of each, and what is fixed when it is compiled."""
    B, L, N, H = q_BLNH.shape
    at_once = N // k_BSKH.shape[2] if current().platform == "cpu" else B * N
    bq, bk = _block_sizes(at_once, L, k_BSKH.shape[1])
    # Padding belongs to segments of its own, so that nothing sees it and it sees nothing.
    inputs = (
        _fold_queries(q_BLNH, k_BSKH.shape[2], bq),
        _pad(k_BSKH, bk, 0).swapaxes(1, 2),
        _pad(v_BSKH, bk, 0).swapaxes(1, 2),
        _pad(q_seg_BL.astype(jnp.int32), bq, -1),
        _pad(k_seg_BS.astype(jnp.int32), bk, -2),
        jnp.asarray(q_offset, jnp.int32),
        None if window is None else jnp.asarray(window, jnp.int32),
    )
    return inputs, _Static(bq, bk, soft_cap, 1 / math.sqrt(H) if scale is None else scale)


def _fold_queries(x_BLNX, key_heads: int, bq: int):
    """[B, L, N, X] -> [B, K, R, X]: rows are (query, head of the group), the group innermost."""
    B, _, N, X = x_BLNX.shape
    x = _pad(x_BLNX, bq, 0).reshape(B, -1, key_heads, N // key_heads, X)
    return x.swapaxes(1, 2).reshape(B, key_heads, -1, X)


def _unfold(x_BKRX, shape):
    """The inverse of `_fold_queries`."""
    B, L, N, X = shape
    K = x_BKRX.shape[1]
    return x_BKRX.reshape(B, K, -1, N // K, X).swapaxes(1, 2).reshape(B, -1, N, X)[:, :L]


class _Static(NamedTuple):
    """What is fixed when the kernel is compiled: block sizes, and how scores are made of products."""

    bq: int
    bk: int
    soft_cap: float | None
    scale: float


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _blockwise(q_BKRH, k_BKSH, v_BKSH, q_seg_BL, k_seg_BS, q_offset, window, static):
    return _forward(q_BKRH, k_BKSH, v_BKSH, q_seg_BL, k_seg_BS, q_offset, window, static)[0]


def _forward(q_BKRH, k_BKSH, v_BKSH, q_seg_BL, k_seg_BS, q_offset, window, static):
    inputs = (q_BKRH, k_BKSH, v_BKSH, q_seg_BL, k_seg_BS, q_offset, window)
    out_BKRH, lse_BKR = (checkpoint_name(x, "attention") for x in _attend(*inputs, static))
    return out_BKRH, (*inputs, out_BKRH, lse_BKR)


def _attend(q_BKRH, k_BKSH, v_BKSH, q_seg_BL, k_seg_BS, q_offset, window, static):
    """(output [B, K, R, H], log-sum-exp [B, K, R])"""
    visible_ij = _visible(q_seg_BL, k_seg_BS, q_offset, window, static)
    same_BX, same = (q_seg_BL, k_seg_BS), (q_offset, window, _ranges(visible_ij))
    core = functools.partial(_forward_core, static=static)
    return _over_heads_and_rows(core, (q_BKRH, k_BKSH, v_BKSH), same_BX, same, static)


def _backward(static, residuals, g_BKRH):
    q_BKRH, k_BKSH, v_BKSH, q_seg_BL, k_seg_BS, q_offset, window, out_BKRH, lse_BKR = residuals
    delta_BKR = jnp.sum(out_BKRH.astype(jnp.float32) * g_BKRH.astype(jnp.float32), axis=-1)
    visible_ij = _visible(q_seg_BL, k_seg_BS, q_offset, window, static)
    heads_BKX = q_BKRH, k_BKSH, v_BKSH, g_BKRH.astype(q_BKRH.dtype), lse_BKR, delta_BKR
    same_BX, same = (q_seg_BL, k_seg_BS), (q_offset, window, _ranges(visible_ij.T))
    core = functools.partial(_backward_core, static=static)
    bars = _over_heads_and_rows(core, heads_BKX, same_BX, same, static)
    return *bars, None, None, None, None


_blockwise.defvjp(_forward, _backward)


def _over_heads_and_rows(core, heads_BKX, same_BX, same, static):
    """`core(*heads, *same)` of every row of the batch and key head; `same_BX` are arrays that all heads share."""
    # On a CPU one after the other, so that the scores of a pair of blocks stay in its cache; but short rows together.
    rows, heads = jax.vmap, jax.vmap
    if current().platform == "cpu":
        heads = _one_by_one
        B, _, R, _ = heads_BKX[0].shape
        queries = same_BX[0].shape[1]
        if B * (R // queries) * static.bq * static.bk > TOGETHER:
            rows = _one_by_one

    def row(row):
        heads_KX, same_X = row
        return heads(lambda head: core(*head, *same_X, *same))(heads_KX)

    return rows(row)((heads_BKX, same_BX))


def _one_by_one(f):
    return functools.partial(lax.map, f)


def _forward_core(q_RH, k_SH, v_SH, q_seg_L, k_seg_S, q_offset, window, key_ranges, *, static):
    """One key head: (output [R, H], log-sum-exp [R]); key_ranges[i] are the key blocks query block i visits."""
    bq, bk = static.bq, static.bk
    H, rows = q_RH.shape[1], bq * (q_RH.shape[0] // q_seg_L.shape[0])
    q_index_R, q_seg_R = _row_masks(q_seg_L, q_offset, q_RH.shape[0])
    # A column of ones has the product sum the weights too, which saves a pass over them; whole tiles of 16.
    ones_SX = jnp.pad(jnp.ones_like(v_SH[:, :1]), ((0, 0), (0, -(H + 1) % 16)))
    v_SX = jnp.concatenate([v_SH, ones_SX], axis=1)

    def query_block(block):
        i, (first, stop) = block
        q = _block(q_RH, i, rows)
        q_index, q_seg = _block(q_index_R, i, rows)[:, None], _block(q_seg_R, i, rows)[:, None]

        def key_block(j, carry):
            top, acc_RX = carry
            k_index = j * bk + jnp.arange(bk)
            seen = _in_reach(q_index, k_index, window) & (_block(k_seg_S, j, bk) == q_seg)
            scores = _scores(_dot(q, _block(k_SH, j, bk), 1, 1), static)
            scores = jnp.where(seen, scores, -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(scores, axis=1))
            weights = rounded(exp_to_one(scores - new_top[:, None]), v_SX.dtype)
            product_RX = _dot(weights, _block(v_SX, j, bk), 1, 0)
            return new_top, acc_RX * jnp.exp(top - new_top)[:, None] + product_RX

        start = (jnp.full(rows, _LOW), jnp.zeros((rows, v_SX.shape[1])))
        top, acc_RX = lax.fori_loop(first, stop, key_block, start)
        total = jnp.where(acc_RX[:, H] == 0, 1.0, acc_RX[:, H])  # rows of padding see nothing
        return (acc_RX[:, :H] / total[:, None]).astype(q.dtype), top + jnp.log(total)

    blocks = jnp.arange(q_seg_L.shape[0] // bq)
    out, lse = lax.map(query_block, (blocks, key_ranges))
    return out.reshape(q_RH.shape), lse.reshape(-1)


def _backward_core(
    q_RH,
    k_SH,
    v_SH,
    g_RH,
    lse_R,
    delta_R,
    q_seg_L,
    k_seg_S,
    q_offset,
    window,
    query_ranges,
    *,
    static,
):
    """One key head: cotangents of q, k, v. Scores are held transposed, [keys, rows], and so is q's cotangent:
    then no product contracts the first axis of its left operand, which a CPU does slowly."""
    bq, bk, soft_cap, scale = static
    H, rows = q_RH.shape[1], bq * (q_RH.shape[0] // q_seg_L.shape[0])
    q_index_R, q_seg_R = _row_masks(q_seg_L, q_offset, q_RH.shape[0])

    def key_block(q_bar_iHR, block):
        j, (first, stop) = block
        k, v = _block(k_SH, j, bk), _block(v_SH, j, bk)
        k_index, k_seg = (j * bk + jnp.arange(bk))[:, None], _block(k_seg_S, j, bk)[:, None]

        def query_block(i, carry):
            k_bar, v_bar, q_bar_iHR = carry
            q, g = _block(q_RH, i, rows), _block(g_RH, i, rows)
            in_reach = _in_reach(_block(q_index_R, i, rows), k_index, window)
            seen = in_reach & (k_seg == _block(q_seg_R, i, rows))
            scores = _scores(_dot(k, q, 1, 1), static)
            weights = exp_to_one(jnp.where(seen, scores, -jnp.inf) - _block(lse_R, i, rows))
            scores_bar = weights * (_dot(v, g, 1, 1) - _block(delta_R, i, rows)) * scale
            if soft_cap is not None:  # d tanh(x) = 1 - tanh(x)^2
                scores_bar *= 1 - jnp.square(scores / soft_cap)
            # Each is read by two products or more: the barrier keeps XLA from computing it for each.
            weights, scores_bar = lax.optimization_barrier(
                (rounded(weights, q.dtype), rounded(scores_bar, q.dtype))
            )
            v_bar += _dot(weights, g, 1, 0)
            k_bar += _dot(scores_bar, q, 1, 0)
            q_bar = _block(q_bar_iHR, i, 1) + _dot(k.T, scores_bar, 1, 0)
            q_bar_iHR = lax.dynamic_update_slice_in_dim(q_bar_iHR, q_bar, i, axis=0)
            return k_bar, v_bar, q_bar_iHR

        start = (jnp.zeros((bk, H)), jnp.zeros((bk, H)), q_bar_iHR)
        k_bar, v_bar, q_bar_iHR = lax.fori_loop(first, stop, query_block, start)
        return q_bar_iHR, (k_bar.astype(k.dtype), v_bar.astype(v.dtype))

    q_bar_iHR = jnp.zeros((q_seg_L.shape[0] // bq, H, rows))
    blocks = jnp.arange(k_seg_S.shape[0] // bk)
    q_bar_iHR, (k_bar, v_bar) = lax.scan(key_block, q_bar_iHR, (blocks, query_ranges))
    q_bar_RH = q_bar_iHR.swapaxes(1, 2).reshape(q_RH.shape).astype(q_RH.dtype)
    return q_bar_RH, k_bar.reshape(k_SH.shape), v_bar.reshape(v_SH.shape)


def _scores(products, static):
    """q k^T as it enters the softmax: scaled, and held within the soft cap where there is one (Gemma 2)."""
    scores = products * static.scale
    if static.soft_cap is None:
        return scores
    return static.soft_cap * jnp.tanh(scores / static.soft_cap)


def _in_reach(q_index, k_index, window):
    """Whether the key stands at or before the query, and among the last `window` up to it."""
    reach = k_index <= q_index
    return reach if window is None else reach & (k_index > q_index - window)


def _visible(q_seg_BL, k_seg_BS, q_offset, window, static):
    """bool [query blocks, key blocks]: whether any row of the batch may see anything in this pair of blocks.

    Segment ids are compared by their ranges in the blocks: never too few pairs, and few too many where the
    ids of packed documents rise.
    """
    B, bq, bk = q_seg_BL.shape[0], static.bq, static.bk
    q_seg, k_seg = q_seg_BL.reshape(B, -1, 1, bq), k_seg_BS.reshape(B, 1, -1, bk)
    overlap = (q_seg.min(-1) <= k_seg.max(-1)) & (k_seg.min(-1) <= q_seg.max(-1))
    last_query_i = q_offset + (jnp.arange(q_seg.shape[1]) + 1) * bq - 1
    first_key_j = jnp.arange(k_seg.shape[2]) * bk
    visible_ij = overlap.any(axis=0) & (first_key_j <= last_query_i[:, None])
    if window is None:
        return visible_ij
    return visible_ij & (first_key_j + bk - 1 > last_query_i[:, None] - (bq - 1) - window)


def _ranges(visible_ij):
    """For each i the range [first, stop) that holds all visible j; empty if there is none."""
    stop = visible_ij.shape[1] - jnp.argmax(visible_ij[:, ::-1], axis=1)
    return jnp.argmax(visible_ij, axis=1), jnp.where(visible_ij.any(axis=1), stop, 0)


def _row_masks(q_seg_L, q_offset, rows):
    """Index among the keys and segment id of each row (query, head of the group)."""
    group = rows // q_seg_L.shape[0]
    return q_offset + jnp.arange(rows) // group, jnp.repeat(q_seg_L, group)


def _block_sizes(heads: int, queries: int, keys: int) -> tuple[int, int]:
    """Queries and keys to a block: fewer queries the more heads (of all rows) are worked on at once, and the
    blocks of one length about even, so that little is padded."""
    # A cache that is read in whole blocks has whole ones too: those of queries and keys end together on the diagonal.
    whole = keys > queries and queries % KEY_BLOCK == 0
    bk = KEY_BLOCK if whole else _even(keys, KEY_BLOCK)
    low, high = QUERY_BLOCKS
    return _even(queries, min(max(BLOCK_SCORES // (heads * bk) // 16 * 16, low), high)), bk


def _even(length: int, largest: int) -> int:
    """The length of the fewest blocks of at most `largest` that hold `length`, of several a multiple of 16: a CPU's
    matrix units take 16 rows."""
    blocks = -(-length // largest)
    return length if blocks == 1 else min(largest, -(-length // (16 * blocks)) * 16)


def _pad(x, multiple, value):
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, -x.shape[1] % multiple)
    return jnp.pad(x, widths, constant_values=value)


def _block(x, index, size):
    return lax.dynamic_slice_in_dim(x, index * size, size)


def _dot(a, b, a_axis, b_axis):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
