"""Attention on NVIDIA GPUs: cuDNN through `jax.nn`, Pallas-Triton kernels: JAX's to train, one of ours to read prompts.

cuDNN and JAX's kernel want the sequence whole (context parallelism: ulysses), and queries that are the keys' own;
`after_cache` is for queries that a cache goes before, has windows and soft caps too, and no gradients.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lrjax.errors import UserError
from lrjax.models.context import own_keys

# Queries and keys at a time, on an H100 the fastest of those tried: with gradients 0.62 ms for 9 heads of 64 and 4,992
# tokens, 1.08 with the blocks that JAX's kernel has by itself (128, backwards 32).
TRITON_BLOCK = 64
# Of `after_cache`: 0.58 ms for 1,024 queries of 16,384 keys, other blocks 0.54 to 0.99.
CACHE_BLOCKS = 64, 64
WIDEST = 512  # bytes of a head; with 1,024 an H100 has too little shared memory for its blocks
_LOG2_E = math.log2(math.e)
_LOW = -1e30  # below every score, yet finite: where nothing is seen nothing is NaN


def triton(
    q_BLNH, k_BSKH, v_BSKH, q_seg_BL, k_seg_BS, q_offset=0, *,
    window=None, soft_cap=None, scale=None, interpret=False,
):  # fmt: skip
    """Packed documents; key heads are repeated for their group. Arguments as `lrjax.models.attention.attention`.

    With queries that a cache goes before, `after_cache`.
    """
    L, N, H = q_BLNH.shape[1:]
    if not serves_width(H, q_BLNH.dtype):
        raise UserError(
            f"model.attention 'triton': head_dim {H} in {q_BLNH.dtype}; allowed: powers of two, 16 and more, to "
            f"{WIDEST} bytes"
        )
    if not own_keys(L, k_BSKH.shape[1], q_offset):
        return after_cache(
            q_BLNH, k_BSKH, v_BSKH, q_seg_BL, k_seg_BS, q_offset,
            window=window, soft_cap=soft_cap, scale=scale, interpret=interpret,
        )  # fmt: skip
    _check("triton", q_BLNH, k_BSKH, q_offset, window=window, soft_cap=soft_cap)
    from jax.experimental.pallas.ops.gpu import attention as kernel_lib

    padding = -L % TRITON_BLOCK

    def padded(x, value=0):
        widths = [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths, constant_values=value)

    group = N // k_BSKH.shape[2]
    out_BLNH = kernel_lib.mha(
        padded(q_BLNH),
        *(jnp.repeat(padded(x), group, axis=2) for x in (k_BSKH, v_BSKH)),
        segment_ids=padded(q_seg_BL.astype(jnp.int32), -1),
        sm_scale=H**-0.5 if scale is None else scale,
        causal=True,
        block_sizes=kernel_lib.BlockSizes(*[TRITON_BLOCK] * 6),
        interpret=interpret,
    )
    return out_BLNH[:, :L].astype(q_BLNH.dtype)


def serves_width(head_dim: int, dtype) -> bool:
    """Whether the Triton kernels have heads so wide: in whole tiles, and blocks of them in an H100's shared memory."""
    fits = head_dim * jnp.dtype(dtype).itemsize <= WIDEST
    return head_dim >= 16 and not head_dim & (head_dim - 1) and fits


def after_cache(
    q_BLNH, k_BSKH, v_BSKH, q_seg_BL, k_seg_BS, q_offset=0, *,
    window=None, soft_cap=None, scale=None, interpret=False,
):  # fmt: skip
    """Queries that stand anywhere among the keys; a window may be traced. Forward alone.

    FlashAttention-2's forward pass (Dao 2023, algorithm 1): a program has a block of queries of one head, and goes over
    the key blocks from the first that its window reaches to the one that its last query stands in.
    """
    B, L, N, H = q_BLNH.shape
    S, K = k_BSKH.shape[1:3]
    bq, bk = CACHE_BLOCKS
    q_padding, k_padding = -L % bq, -S % bk

    def padded(x, padding, value=0):
        if not padding:
            return x
        widths = [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths, constant_values=value)

    # Padding of the keys is in a segment of its own.
    q_seg_BL = padded(q_seg_BL.astype(jnp.int32), q_padding)
    k_seg_BS = padded(k_seg_BS.astype(jnp.int32), k_padding, -1)
    places = jnp.stack(
        [jnp.asarray(q_offset, jnp.int32), jnp.asarray(S if window is None else window, jnp.int32)]
    )
    length = S + k_padding
    q_spec = pl.BlockSpec((None, bq, None, H), lambda i, b, n: (b, i, n, 0))
    k_spec = pl.BlockSpec((None, length, None, H), lambda i, b, n: (b, 0, n // (N // K), 0))
    out_BLNH = pl.pallas_call(
        functools.partial(
            _after_cache_kernel,
            key_blocks=length // bk,
            scale=H**-0.5 if scale is None else scale,
            soft_cap=soft_cap,
        ),
        grid=((L + q_padding) // bq, B, N),
        in_specs=[
            pl.BlockSpec((2,), lambda i, b, n: (0,)),
            q_spec,
            k_spec,
            k_spec,
            pl.BlockSpec((None, bq), lambda i, b, n: (b, i)),
            pl.BlockSpec((None, length), lambda i, b, n: (b, 0)),
        ],
        out_specs=q_spec,
        out_shape=jax.ShapeDtypeStruct((B, L + q_padding, N, H), q_BLNH.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4 if H <= 64 else 8, num_stages=2),
        interpret=interpret,
        name="attention_after_cache",
    )(
        places,
        padded(q_BLNH, q_padding),
        padded(k_BSKH, k_padding),
        padded(v_BSKH, k_padding),
        q_seg_BL,
        k_seg_BS,
    )
    return out_BLNH[:, :L]


def _after_cache_kernel(
    places_ref, q_ref, k_ref, v_ref, q_seg_ref, k_seg_ref, out_ref, *, key_blocks, scale, soft_cap
):
    bq, bk = CACHE_BLOCKS
    H = q_ref.shape[-1]
    offset, window = places_ref[0], places_ref[1]
    first = offset + pl.program_id(0) * bq  # index among the keys of the first query
    q_QH, q_seg_Q = q_ref[...], q_seg_ref[...]
    q_index_Q = first + jnp.arange(bq)
    # Of float32 all bits count; of tf32, the default, 11.
    precision = lax.Precision.HIGHEST if q_QH.dtype == jnp.float32 else None

    def key_block(j, carry):
        out_QH, sum_Q, top_Q = carry
        block = pl.ds(j * bk, bk)
        k_KH, v_KH, k_seg_K = k_ref[block, :], v_ref[block, :], k_seg_ref[block]
        scores_QK = jnp.dot(q_QH, k_KH.T, precision=precision, preferred_element_type=jnp.float32)
        scores_QK *= scale
        if soft_cap is not None:  # tanh, of what every GPU has: 2^x
            halves_QK = jnp.exp2(scores_QK * (-2 * _LOG2_E / soft_cap))
            scores_QK = soft_cap * (2 / (1 + halves_QK) - 1)
        k_index_K = j * bk + jnp.arange(bk)
        behind_QK = q_index_Q[:, None] - k_index_K[None, :]
        seen_QK = (behind_QK >= 0) & (behind_QK < window) & (q_seg_Q[:, None] == k_seg_K[None, :])
        scores_QK = jnp.where(seen_QK, scores_QK * _LOG2_E, _LOW)
        new_top_Q = jnp.maximum(top_Q, jnp.max(scores_QK, axis=-1))
        # Where a row has seen nothing so far its top is _LOW, and 2^0 is no weight.
        weights_QK = jnp.where(seen_QK, jnp.exp2(scores_QK - new_top_Q[:, None]), 0.0)
        shrink_Q = jnp.exp2(top_Q - new_top_Q)
        out_QH = out_QH * shrink_Q[:, None] + jnp.dot(
            weights_QK.astype(v_KH.dtype), v_KH,
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        return out_QH, sum_Q * shrink_Q + jnp.sum(weights_QK, axis=-1), new_top_Q

    start = jnp.zeros((bq, H), jnp.float32), jnp.zeros(bq), jnp.full(bq, _LOW)
    low = lax.div(jnp.maximum(first - window + 1, 0), jnp.int32(bk))
    high = jnp.minimum(lax.div(first + bq - 1, jnp.int32(bk)) + 1, key_blocks)
    out_QH, sum_Q, _ = lax.fori_loop(low, high, key_block, start)
    out_ref[...] = (out_QH / jnp.where(sum_Q > 0, sum_Q, 1.0)[:, None]).astype(out_ref.dtype)


def cudnn(
    q_BLNH, k_BSKH, v_BSKH, q_seg_BL, k_seg_BS, q_offset=0, *,
    window=None, soft_cap=None, scale=None, implementation="cudnn",
):  # fmt: skip
    """Rows of one document, padding (segment 0) at their end. A row of more comes out as NaN, never wrong.

    Arguments as `lrjax.models.attention.attention`; `implementation="xla"` computes the same without a GPU.
    """
    static = window is None or isinstance(window, int)
    _check("cudnn", q_BLNH, k_BSKH, q_offset, window=None if static else window, soft_cap=soft_cap)
    if implementation == "cudnn" and q_BLNH.dtype not in (jnp.bfloat16, jnp.float16):
        raise UserError(
            f"model.attention 'cudnn': computes in bfloat16, model.dtype is {q_BLNH.dtype}; allowed: bfloat16"
        )
    L = q_BLNH.shape[1]
    even = [(0, 0), (0, L % 2), (0, 0), (0, 0)]  # its backward pass takes no odd length
    out_BLNH = jax.nn.dot_product_attention(
        *(jnp.pad(x, even) for x in (q_BLNH, k_BSKH, v_BSKH)),
        scale=scale, is_causal=True, implementation=implementation,
        local_window_size=None if window is None else (window - 1, 0),
    )[:, :L]  # fmt: skip
    # One document: every id is that of the first token, or 0 with nothing but 0 after it.
    first_B1 = q_seg_BL[:, :1]
    steps_BL = q_seg_BL[:, 1:] != q_seg_BL[:, :-1]
    one = jnp.all((q_seg_BL == first_B1) | (q_seg_BL == 0), axis=1) & (steps_BL.sum(axis=1) <= 1)
    return jnp.where(one[:, None, None, None], out_BLNH, jnp.nan)


def _check(name, q_BLNH, k_BSKH, q_offset, **unserved) -> None:
    if not own_keys(q_BLNH.shape[1], k_BSKH.shape[1], q_offset):
        raise UserError(
            f"model.attention {name!r}: {q_BLNH.shape[1]} queries of {k_BSKH.shape[1]} keys (a cache, or a gathered "
            "context); allowed: blockwise, or model.context_parallel=ulysses"
        )
    for keyword, value in unserved.items():
        if value is not None:
            raise UserError(
                f"model.attention {name!r}: this model has a {keyword}; allowed: blockwise"
            )
