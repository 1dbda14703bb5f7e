"""Causal grouped-query attention over packed documents.

`attention(q_BLNH, k_BSKH, v_BSKH, q_segment_ids_BL, k_segment_ids_BS, q_offset)`: query i stands at index
q_offset + i among the keys and sees key j iff j <= q_offset + i and both carry the same segment id; with a
sliding `window`, only if j is also among the last `window` keys up to the query. Causality and window are
by index, never by the value of a position. Two implementations, tested against each other:

* `reference`: scores written out, [L, S] for every head. For reading, for tests, for short sequences.
* `blockwise` (`lrjax.models.blockwise`): memory linear in L, work only where something is seen.

`auto` takes `reference` where the scores are few and `blockwise` elsewhere, and logs the choice once.
"""

import functools
import math

import jax
import jax.numpy as jnp
from absl import logging
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from lrjax.models.blockwise import blockwise

IMPLEMENTATIONS = ("auto", "blockwise", "reference")

# Up to so many scores per head and row, or so few queries (decoding), one pass over all of them is quicker.
SHORT_SCORES = 256 * 256
FEW_QUERIES = 16

_LOW = -1e30  # finite: a query that sees nothing gets 0, not NaN


def attention(
    q_BLNH: Float[Array, "B L N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    q_segment_ids_BL: Int[Array, "B L"],
    k_segment_ids_BS: Int[Array, "B S"],
    q_offset: Int[Array, ""] | int = 0,
    *,
    implementation: str = "auto",
    window: Int[Array, ""] | int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
) -> Float[Array, "B L N H"]:
    """Attends from every query to the keys at or before its own index in the same segment.

    Args:
        q_BLNH: queries, already rotated; N is a multiple of K, queries nG..nG+G-1 share key head n.
        k_BSKH: keys, already rotated.
        v_BSKH: values.
        q_segment_ids_BL: document of each query (>= 0; 0 is padding, which attends within 0).
        k_segment_ids_BS: document of each key.
        q_offset: index among the keys of the first query; may be traced.
        implementation: one of `IMPLEMENTATIONS`.
        window: keys that a query sees, itself among them; may be traced. None: all before it.
        soft_cap: scores are squeezed into (-soft_cap, soft_cap) by soft_cap * tanh(score / soft_cap).
        scale: of the products of queries and keys; default 1 / sqrt(H).

    Returns:
        The attended values in the dtype of q, under the remat name "attention".
    """
    if implementation == "auto":
        implementation = _choose(q_BLNH.shape[1], k_BSKH.shape[1])
    kernel = {"blockwise": blockwise, "reference": reference}[implementation]
    out_BLNH = kernel(
        q_BLNH,
        k_BSKH,
        v_BSKH,
        q_segment_ids_BL,
        k_segment_ids_BS,
        q_offset,
        window=window,
        soft_cap=soft_cap,
        scale=scale,
    )
    return checkpoint_name(out_BLNH, "attention")


def reference(
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
    """Plain attention: all scores at once, softmax in float32. Arguments as in `attention`."""
    B, L, N, H = q_BLNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BLKGH = q_BLNH.reshape(B, L, K, N // K, H)
    scores_BKGLS = jnp.einsum(
        "BLKGH,BSKH->BKGLS", q_BLKGH, k_BSKH, preferred_element_type=jnp.float32
    ) * (1 / math.sqrt(H) if scale is None else scale)
    if soft_cap is not None:
        scores_BKGLS = soft_cap * jnp.tanh(scores_BKGLS / soft_cap)
    q_index_L1 = q_offset + jnp.arange(L)[:, None]
    causal_LS = jnp.arange(S) <= q_index_L1
    if window is not None:
        causal_LS &= jnp.arange(S) > q_index_L1 - window
    same_BLS = q_segment_ids_BL[:, :, None] == k_segment_ids_BS[:, None, :]
    seen_BKGLS = (causal_LS & same_BLS)[:, None, None]
    weights_BKGLS = jax.nn.softmax(jnp.where(seen_BKGLS, scores_BKGLS, _LOW), axis=-1)
    weights_BKGLS = jnp.where(seen_BKGLS, weights_BKGLS, 0.0)
    out_BLKGH = jnp.einsum(
        "BKGLS,BSKH->BLKGH",
        weights_BKGLS.astype(v_BSKH.dtype),
        v_BSKH,
        preferred_element_type=jnp.float32,
    )
    return out_BLKGH.astype(q_BLNH.dtype).reshape(B, L, N, H)


def _choose(queries: int, keys: int) -> str:
    few = queries <= FEW_QUERIES or queries * keys <= SHORT_SCORES
    choice = "reference" if few else "blockwise"
    _log_choice(choice, jax.default_backend())
    return choice


@functools.cache
def _log_choice(choice: str, platform: str) -> None:
    logging.info("attention=auto: %s on %s", choice, platform)
