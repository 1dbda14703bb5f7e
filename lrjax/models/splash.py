"""JAX's Pallas splash attention for TPUs, behind lrjax's interface: GQA, packed documents, window, soft cap.

The kernel skips pairs of blocks in which nothing is seen. The library finds those by building the mask in Python (20
to 50 s at 131,072 tokens). Here they are computed inside the program, from the first and last index of every block of
queries: that takes no time at any length, works for queries that start anywhere (a key/value cache) and for the two
runs of queries that a device holds under context parallelism, and leaves no constants in the program.

The backward pass is the split one: the fused one writes a dq for every block of keys (16 GiB at 131,072).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask_info as mask_info_lib,
)

from lrjax.errors import UserError
from lrjax.models.attention import LANES, MAX_BLOCK


def splash(
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
    q_index_L=None,
    max_block=MAX_BLOCK,
    interpret=False,
):
    """Causal attention within segments; arguments and result as in `lrjax.models.attention.attention`.

    Args:
        q_index_L: index among the keys of every query, in place of q_offset + 0, 1, ...
        max_block: at most so many queries and keys at a time.
        interpret: run the kernel's Python on any platform, slowly: for tests.

    Raises:
        UserError: a window that differs between layers (a traced one): the kernel's mask is fixed.
    """
    if q_index_L is None:
        q_index_L = q_offset + jnp.arange(q_BLNH.shape[1], dtype=jnp.int32)
    inputs, kernel_of = _prepared(
        q_BLNH, k_BSKH, v_BSKH, q_segment_ids_BL, k_segment_ids_BS, q_index_L, window, soft_cap, scale,
        max_block, interpret,
    )  # fmt: skip
    kernel = kernel_of(save_residuals=False, residual_checkpoint_name="attention")
    out_BNLH = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids))(*inputs)
    return out_BNLH.swapaxes(1, 2)[:, : q_BLNH.shape[1]]


def part_forward(q, k, v, q_seg, k_seg, q_offset, window, **settings):
    """Of a ring (`lrjax.models.ring.Part`): output, NaN for a query that sees nothing, and log-sum-exp [B, L, N]."""
    L = q.shape[1]
    inputs, kernel_of = _prepared(
        q, k, v, q_seg, k_seg, q_offset + jnp.arange(L), window, **settings
    )
    kernel = kernel_of(save_residuals=True, residual_checkpoint_name=None)
    out_BNLH, (lse_BNL,) = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids))(*inputs)
    return out_BNLH.swapaxes(1, 2)[:, :L], lse_BNL.swapaxes(1, 2)[:, :L]


def part_backward(q, k, v, q_seg, k_seg, q_offset, window, out, lse_BLN, g, **settings):
    """Of a ring: cotangents of q, k, v.

    The library's own backward pass, called with output and log-sum-exp of all keys in place of those of these keys; it
    has no public name for it.
    """
    L, S = q.shape[1], k.shape[1]
    inputs, kernel_of = _prepared(
        q, k, v, q_seg, k_seg, q_offset + jnp.arange(L), window, **settings
    )
    kernel = kernel_of(save_residuals=False, residual_checkpoint_name=None)
    padded = inputs[0].shape[2]
    out, g = (_pad_to(x, padded).swapaxes(1, 2) for x in (out, g))
    # Rows of padding see nothing, and exp(anything - inf) is 0.
    lse_BNL = _pad_to(lse_BLN, padded, jnp.inf).swapaxes(1, 2)

    def backward(q, k, v, ids, out, lse, g):
        residuals = (q, k, v, ids, None, out, lse, kernel.dq_mask_info, kernel.dkv_mask_info)
        cotangents = kernel_lib._splash_attention_bwd(**kernel.kwargs, res=residuals, do=g)
        return cotangents[3:6]

    q_bar, k_bar, v_bar = jax.vmap(backward)(*inputs, out, lse_BNL, g.astype(q.dtype))
    q_bar = q_bar * _scale_of(q, settings["scale"])
    bars = ((q_bar, L), (k_bar, S), (v_bar, S))
    return tuple(x.swapaxes(1, 2)[:, :length] for x, length in bars)


def _prepared(
    q_BLNH,
    k_BSKH,
    v_BSKH,
    q_seg_BL,
    k_seg_BS,
    q_index_L,
    window,
    soft_cap,
    scale,
    max_block,
    interpret,
):
    """(q, k, v, segment ids) in whole blocks, heads first, and a function that makes the kernel for them."""
    if isinstance(window, jax.Array):
        raise UserError(
            "model.attention 'splash': its window is fixed when it is compiled, and this model's layers have "
            "different ones; allowed: blockwise"
        )
    bq, bk = block_size(q_BLNH.shape[1], max_block), block_size(k_BSKH.shape[1], max_block)
    q_index_L = _pad(q_index_L.astype(jnp.int32), bq, 0, "edge")
    # Padding belongs to segments of its own. What a query of padding attends to is cut off.
    segment_ids = kernel_lib.SegmentIds(
        _pad(q_seg_BL.astype(jnp.int32), bq, 1, -1), _pad(k_seg_BS.astype(jnp.int32), bk, 1, -2)
    )
    q_BNLH = _pad(q_BLNH * _scale_of(q_BLNH, scale), bq, 1).swapaxes(1, 2)
    k_BKSH, v_BKSH = (_pad(x, bk, 1).swapaxes(1, 2) for x in (k_BSKH, v_BSKH))
    state_ij = block_states(q_index_L, k_BKSH.shape[2], bq, bk, window)
    by_queries = _mask_info(state_ij, q_index_L, by_keys=False)
    sizes = kernel_lib.BlockSizes(
        block_q=bq, block_kv=bk, block_kv_compute=bk, block_q_dkv=bq, block_kv_dkv=bk,
        block_kv_dkv_compute=bk, block_q_dq=bq, block_kv_dq=bk,
    )  # fmt: skip
    kernel_of = functools.partial(
        kernel_lib.SplashAttentionKernel,
        by_queries,
        by_queries,
        _mask_info(state_ij, q_index_L, by_keys=True),
        block_sizes=sizes,
        is_mqa=False,
        mask_value=kernel_lib.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=soft_cap,
        mask_function=_mask_function(window),
        interpret=interpret,
    )
    return (q_BNLH, k_BKSH, v_BKSH, segment_ids), kernel_of


def _scale_of(q_BLNH, scale):
    return q_BLNH.shape[-1] ** -0.5 if scale is None else scale


def block_size(length: int, max_block: int = MAX_BLOCK) -> int:
    """The largest multiple of `LANES`, at most `max_block`, that pads `length` by no more than 2 % over what `LANES`
    alone would."""
    least = -(-length // LANES) * LANES
    blocks = range(max_block, LANES, -LANES)
    return next((b for b in blocks if -(-length // b) * b <= 1.02 * least), LANES)


def block_states(q_index_L, keys: int, bq: int, bk: int, window: int | None = None):
    """int8 [query blocks, key blocks]: 0 nothing is seen, 1 some pairs are, 2 all of them (segments left aside)."""
    q_ib = q_index_L.reshape(-1, bq)
    first_q, last_q = q_ib.min(axis=1)[:, None], q_ib.max(axis=1)[:, None]
    first_k = bk * jnp.arange(keys // bk)
    last_k = first_k + bk - 1
    some, every = first_k <= last_q, last_k <= first_q
    if window is not None:
        some &= last_k > first_q - window
        every &= first_k > last_q - window
    return jnp.where(every, 2, some.astype(jnp.int8)).astype(jnp.int8)


def _mask_info(state_ij, q_index_L, *, by_keys: bool):
    """What the kernel prefetches: for every pair of blocks, whether it runs and which block it needs next.

    The forward and the dq kernels go through key blocks for each query block and load key blocks; the dk, dv kernel
    (`by_keys`) goes through query blocks for each key block and loads query blocks.
    """
    order = state_ij.T if by_keys else state_ij
    rows, columns = order.shape
    visit = jnp.arange(rows * columns, dtype=jnp.int32)
    # The visited pair at or after each pair: its own where it is visited. Past the last one: the first column.
    following = lax.cummin(
        jnp.where(order.reshape(-1) > 0, visit, rows * columns), axis=0, reverse=True
    )
    column = jnp.where(following < rows * columns, following % columns, 0).reshape(rows, columns)
    dtype = jnp.int8 if columns <= 128 else jnp.int16 if columns <= 2**15 else jnp.int32
    column_ij = (column.T if by_keys else column).astype(dtype)
    return mask_info_lib.MaskInfo(
        data_next=column_ij[None],
        mask_next=None,
        block_mask=state_ij[None],
        partial_mask_blocks=None,
        q_sequence=q_index_L,
    )


@functools.cache
def _mask_function(window: int | None):
    """The mask inside a block; cached, since kernels are told apart by the function's identity."""
    if window is None:
        return lambda q_index, k_index: q_index >= k_index
    return lambda q_index, k_index: (q_index >= k_index) & (k_index > q_index - window)


def _pad(x, multiple, axis, value=0):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    if value == "edge":
        return jnp.pad(x, widths, mode="edge")
    return jnp.pad(x, widths, constant_values=value)


def _pad_to(x_BLN, length: int, value=0):
    widths = [(0, 0), (0, length - x_BLN.shape[1])] + [(0, 0)] * (x_BLN.ndim - 2)
    return jnp.pad(x_BLN, widths, constant_values=value)
