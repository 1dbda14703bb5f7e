"""Attention on NVIDIA GPUs: cuDNN through `jax.nn`, and the Pallas-Triton kernel that JAX ships.

Both want the sequence whole (context parallelism: ulysses) and queries that are the keys' own (no cache).
"""

import jax
import jax.numpy as jnp

from lrjax.errors import UserError

TRITON_BLOCK = 128  # the largest of the kernel's default blocks


def triton(
    q_BLNH, k_BSKH, v_BSKH, q_seg_BL, k_seg_BS, q_offset=0, *,
    window=None, soft_cap=None, scale=None, interpret=False,
):  # fmt: skip
    """Packed documents; key heads are repeated for their group. Arguments as `lrjax.models.attention.attention`."""
    from jax.experimental.pallas.ops.gpu import attention as kernel_lib

    _check("triton", q_BLNH, k_BSKH, q_offset, window=window, soft_cap=soft_cap)
    L, N, H = q_BLNH.shape[1:]
    if H & (H - 1) or H < 16:
        raise UserError(
            f"model.attention 'triton': head_dim {H}; allowed: powers of two, 16 and more"
        )
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
        interpret=interpret,
    )
    return out_BLNH[:, :L].astype(q_BLNH.dtype)


def cudnn(
    q_BLNH, k_BSKH, v_BSKH, q_seg_BL, k_seg_BS, q_offset=0, *,
    window=None, soft_cap=None, scale=None, implementation="cudnn",
):  # fmt: skip
    """Rows of one document, padding (segment 0) at their end. A row of more comes out as NaN, never wrong.

    Arguments as `lrjax.models.attention.attention`; `implementation="xla"` computes the same without a GPU.
    """
    static = window is None or isinstance(window, int)
    _check("cudnn", q_BLNH, k_BSKH, q_offset, window=None if static else window, soft_cap=soft_cap)
    out_BLNH = jax.nn.dot_product_attention(
        q_BLNH, k_BSKH, v_BSKH,
        scale=scale, is_causal=True, implementation=implementation,
        local_window_size=None if window is None else (window - 1, 0),
    )  # fmt: skip
    # One document: every id is that of the first token, or 0 with nothing but 0 after it.
    first_B1 = q_seg_BL[:, :1]
    steps_BL = q_seg_BL[:, 1:] != q_seg_BL[:, :-1]
    one = jnp.all((q_seg_BL == first_B1) | (q_seg_BL == 0), axis=1) & (steps_BL.sum(axis=1) <= 1)
    return jnp.where(one[:, None, None, None], out_BLNH, jnp.nan)


def _check(name, q_BLNH, k_BSKH, q_offset, **unserved) -> None:
    if q_BLNH.shape[1] != k_BSKH.shape[1] or not isinstance(q_offset, int):
        raise UserError(
            f"model.attention {name!r}: {q_BLNH.shape[1]} queries of {k_BSKH.shape[1]} keys (a cache, or a gathered "
            "context); allowed: blockwise, or model.context_parallel=ulysses"
        )
    for keyword, value in unserved.items():
        if value is not None:
            raise UserError(
                f"model.attention {name!r}: this model has a {keyword}; allowed: blockwise"
            )
