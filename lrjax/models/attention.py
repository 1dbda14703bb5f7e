"""Causal grouped-query attention over packed documents.

`attention(q_BLNH, k_BSKH, v_BSKH, q_segment_ids_BL, k_segment_ids_BS, q_offset)`: query i stands at index
q_offset + i among the keys and sees key j iff j <= q_offset + i and both carry the same segment id. Causality
is by index, never by the value of a position. Implementations, tested against each other:

* `reference`: scores written out, [L, S] for every head. For reading, for tests, for short sequences.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

IMPLEMENTATIONS = ("auto", "blockwise", "reference")


def attention(
    q_BLNH: Float[Array, "B L N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    q_segment_ids_BL: Int[Array, "B L"],
    k_segment_ids_BS: Int[Array, "B S"],
    q_offset: Int[Array, ""] | int = 0,
    *,
    implementation: str = "auto",
) -> Float[Array, "B L N H"]:
    """Attends from every query to the keys at or before its own index in the same segment.

    Args:
        q_BLNH: queries, already rotated; N is a multiple of K.
        k_BSKH: keys, already rotated.
        v_BSKH: values.
        q_segment_ids_BL: document of each query (0: padding, attends within 0).
        k_segment_ids_BS: document of each key.
        q_offset: index among the keys of the first query; may be traced.
        implementation: one of `IMPLEMENTATIONS`.
    """
    del implementation
    return reference(q_BLNH, k_BSKH, v_BSKH, q_segment_ids_BL, k_segment_ids_BS, q_offset)


def reference(q_BLNH, k_BSKH, v_BSKH, q_segment_ids_BL, k_segment_ids_BS, q_offset=0):
    """Plain attention: all scores at once, softmax in float32."""
    B, L, N, H = q_BLNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BLKGH = q_BLNH.reshape(B, L, K, N // K, H)
    scores_BKGLS = jnp.einsum(
        "BLKGH,BSKH->BKGLS", q_BLKGH, k_BSKH, preferred_element_type=jnp.float32
    ) / math.sqrt(H)
    causal_LS = jnp.arange(S) <= q_offset + jnp.arange(L)[:, None]
    same_BLS = q_segment_ids_BL[:, :, None] == k_segment_ids_BS[:, None, :]
    seen_BLS = causal_LS & same_BLS
    scores_BKGLS = jnp.where(seen_BLS[:, None, None], scores_BKGLS, -jnp.inf)
    weights_BKGLS = jax.nn.softmax(scores_BKGLS, axis=-1, where=seen_BLS[:, None, None])
    out_BLKGH = jnp.einsum(
        "BKGLS,BSKH->BLKGH",
        weights_BKGLS.astype(v_BSKH.dtype),
        v_BSKH,
        preferred_element_type=jnp.float32,
    )
    return out_BLKGH.astype(q_BLNH.dtype).reshape(B, L, N, H)
