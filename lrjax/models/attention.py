"""Causal grouped-query attention over packed documents.

`attention(q_BLNH, k_BSKH, v_BSKH, q_segment_ids_BL, k_segment_ids_BS, q_offset)`: query i stands at index
q_offset + i among the keys and sees key j iff j <= q_offset + i and both carry the same segment id; with a
sliding `window`, only if j is also among the last `window` keys up to the query. Causality and window are
by index, never by the value of a position. The implementations are tested against each other:

* `splash` (`lrjax.models.splash`): Pallas on TPUs.
* `triton`, `cudnn` (`lrjax.models.gpu_attention`): NVIDIA GPUs; packed documents and queries that a cache goes
  before, rows of one document.
* `blockwise` (`lrjax.models.blockwise`): any platform, memory linear in L, work only where something is seen.
* `reference`: scores written out, [L, S] for every head. For reading, for tests, for short sequences; decoding has it
  in another form on GPUs (`wide`) and CPUs (`few_queries`).

One that cannot serve a request raises `UserError`. `auto` takes `reference` where the scores are few, else what suits
the platform that the program is for, and logs the choice. On several devices (`lrjax.sharding`) every device attends
with its part of the batch, heads and sequence (`lrjax.models.context`).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from lrjax import sharding
from lrjax.errors import UserError
from lrjax.models import context, gpu_attention
from lrjax.models.bits import from_bits
from lrjax.models.blockwise import blockwise
from lrjax.models.ring import Part

LANES = 128  # block sizes of splash are multiples of it
MAX_BLOCK = 1024  # 2,048 is over the vector memory of a v5p
IMPLEMENTATIONS = ("auto", "splash", "cudnn", "triton", "blockwise", "reference")

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
    block: int = MAX_BLOCK,
    context_parallel: str = "gather",
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
        block: of splash: at most so many queries and keys at a time, a multiple of `LANES`. Smaller ones compute fewer
            masked pairs and start more often.
        context_parallel: one of `context.CONTEXT_PARALLEL`: how a sequence is shared where the layout splits it. With
            "gather" and "ring", queries, keys and values come in head-tail order.
        window: keys that a query sees, itself among them; may be traced. None: all before it.
        soft_cap: scores are squeezed into (-soft_cap, soft_cap) by soft_cap * tanh(score / soft_cap).
        scale: of the products of queries and keys; default 1 / sqrt(H).

    Returns:
        The attended values in the dtype of q, under the remat name "attention".

    Raises:
        UserError: the implementation cannot serve this, or heads or length do not divide over the devices.
    """
    L, S = q_BLNH.shape[1], k_BSKH.shape[1]
    if implementation == "auto":
        implementation = choose(
            L,
            S,
            q_offset,
            context_parallel,
            window=window,
            soft_cap=soft_cap,
            head_dim=q_BLNH.shape[3],
            dtype=q_BLNH.dtype,
        )
    here = sharding.current()
    own_keys = context.own_keys(L, S, q_offset)  # no cache: the sequence is split, if it is
    shared = own_keys and here.size("length") > 1
    if shared:
        context.check_length(L, implementation, context_parallel)
    if shared and implementation in ("triton", "cudnn") and context_parallel != "ulysses":
        raise UserError(
            f"model.attention {implementation!r}: wants the sequence whole, model.context_parallel is "
            f"{context_parallel!r}; allowed: blockwise, or model.context_parallel=ulysses"
        )
    by_xla = implementation == "reference" and not shared
    kernel = _kernel(implementation, here.platform, block)
    if by_xla and not own_keys and _wants_wide(q_BLNH, k_BSKH):
        kernel, by_xla = wide, False
    kernel = functools.partial(kernel, window=window, soft_cap=soft_cap, scale=scale)
    if shared and context_parallel == "ring":
        kernel = _part(implementation, here.platform, block, soft_cap, scale)
    inputs = (q_BLNH, k_BSKH, v_BSKH, q_segment_ids_BL, k_segment_ids_BS, q_offset)
    # XLA splits plain products by itself, over heads and over the keys of a cache; of a kernel it knows nothing.
    if not here.split or by_xla:
        out_BLNH = kernel(*inputs)
    else:
        out_BLNH = context.split_attention(
            kernel,
            *inputs,
            context_parallel=context_parallel,
            runs=implementation == "splash",
            window=window,
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
    K = k_BSKH.shape[2]
    seen_BLS = _seen(q_segment_ids_BL, k_segment_ids_BS, q_offset, window)
    q_BLKGH = q_BLNH.reshape(B, L, K, N // K, H)
    scores_BKGLS = jnp.einsum(
        "BLKGH,BSKH->BKGLS", q_BLKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    weights_BKGLS = _weights(scores_BKGLS, seen_BLS[:, None, None], H, soft_cap, scale)
    out_BLKGH = jnp.einsum(
        "BKGLS,BSKH->BLKGH",
        weights_BKGLS.astype(v_BSKH.dtype),
        v_BSKH,
        preferred_element_type=jnp.float32,
    )
    return out_BLKGH.astype(q_BLNH.dtype).reshape(B, L, N, H)


def wide(
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
    """`reference` for a token or a few of each row (decoding) on a GPU. Arguments as in `attention`.

    All key heads are in one product, X = K * H wide, so that keys and values are multiplied as they lie: with heads as
    a batch axis XLA keeps a transposed copy of the whole cache. So each query has zeros where the other key heads
    stand; of the sums its own part is taken.
    """
    B, S, K, H = k_BSKH.shape
    seen_BLS = _seen(q_segment_ids_BL, k_segment_ids_BS, q_offset, window)
    row = functools.partial(_wide_row, K=K, soft_cap=soft_cap, scale=scale)
    return jax.vmap(row)(q_BLNH, k_BSKH.reshape(B, S, K * H), v_BSKH.reshape(B, S, K * H), seen_BLS)


def few_queries(
    q_BLNH,
    k_nBSKH,
    v_nBSKH,
    layer,
    q_segment_ids_BL,
    k_segment_ids_BS,
    q_offset=0,
    *,
    window=None,
    soft_cap=None,
    scale=None,
):
    """`wide` for a CPU, straight from one layer of a cache.

    Row by row, so that a row's keys and values stay in the processor's cache from being cut out to being multiplied: 32
    rows of 1,152 tokens take half as long as all of them at once. What heads as a batch axis cost here is transposed
    copies of what is multiplied, which take longer than all else.

    Args:
        k_nBSKH, v_nBSKH: keys and values of all layers as a cache holds them (`lrjax.models.bits`).
        layer: index of the one that is attended to; may be traced.
        others: as in `attention`.
    """
    S, K, H = k_nBSKH.shape[2:]
    seen_BLS = _seen(q_segment_ids_BL, k_segment_ids_BS, q_offset, window)

    def row_of(x_nBSKH, b):
        return from_bits(lax.dynamic_slice(x_nBSKH, (layer, b, 0, 0, 0), (1, 1, S, K, H))).reshape(
            S, K * H
        )

    def row(b):
        k_SX, v_SX = row_of(k_nBSKH, b), row_of(v_nBSKH, b)
        return _wide_row(q_BLNH[b], k_SX, v_SX, seen_BLS[b], K=K, soft_cap=soft_cap, scale=scale)

    return lax.map(row, jnp.arange(len(q_BLNH)))


def _wide_row(q_LNH, k_SX, v_SX, seen_LS, *, K, soft_cap, scale):
    """One row of `wide`."""
    L, N, H = q_LNH.shape
    own_NK1 = jnp.repeat(jnp.eye(K, dtype=q_LNH.dtype), N // K, axis=0)[..., None]
    q_LNX = (q_LNH[:, :, None] * own_NK1).reshape(L, N, K * H)
    scores_LNS = jnp.einsum("LNX,SX->LNS", q_LNX, k_SX, preferred_element_type=jnp.float32)
    weights_LNS = _weights(scores_LNS, seen_LS[:, None], H, soft_cap, scale)
    out_LNX = jnp.einsum(
        "LNS,SX->LNX", weights_LNS.astype(v_SX.dtype), v_SX, preferred_element_type=jnp.float32
    )
    out_LNH = jnp.sum(out_LNX.reshape(L, N, K, H) * own_NK1, axis=2)
    return out_LNH.astype(q_LNH.dtype)


def takes_few_queries(L: int, implementation: str) -> bool:
    """Whether `few_queries` serves L new tokens of each row that a cache goes before."""
    here = sharding.current()
    return (
        L <= FEW_QUERIES
        and here.platform == "cpu"
        and not here.split
        and implementation in ("auto", "reference")
    )


def _wants_wide(q_BLNH, k_BSKH) -> bool:
    """Whether `wide` is the better `reference` behind a cache: a GPU's, whole along the length, and few queries."""
    here = sharding.current()
    if here.platform != "gpu" or q_BLNH.shape[1] > FEW_QUERIES:
        return False
    by_device = here.size("length") == 1 and k_BSKH.shape[2] % here.size("heads") == 0
    return not here.split or (by_device and context.heads_go_together(q_BLNH, k_BSKH))


def _seen(q_segment_ids_BL, k_segment_ids_BS, q_offset, window):
    """bool [B, L, S]: which keys a query sees."""
    L, S = q_segment_ids_BL.shape[1], k_segment_ids_BS.shape[1]
    q_index_L1 = q_offset + jnp.arange(L)[:, None]
    causal_LS = jnp.arange(S) <= q_index_L1
    if window is not None:
        causal_LS &= jnp.arange(S) > q_index_L1 - window
    return causal_LS & (q_segment_ids_BL[:, :, None] == k_segment_ids_BS[:, None, :])


def _weights(products, seen, head_dim, soft_cap, scale):
    """Softmax over the last axis of scaled products, 0 where nothing is seen."""
    scores = products * (1 / math.sqrt(head_dim) if scale is None else scale)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    weights = jax.nn.softmax(jnp.where(seen, scores, _LOW), axis=-1)
    return jnp.where(seen, weights, 0.0)


def choose(
    L: int,
    S: int,
    q_offset=0,
    context_parallel="gather",
    *,
    head_dim: int,
    dtype=jnp.bfloat16,
    window=None,
    soft_cap=None,
) -> str:
    """What `auto` stands for: an implementation that serves the request on the current layout's platform."""
    platform = sharding.current().platform
    n = context.devices_along_length()
    own_keys = context.own_keys(L, S, q_offset)
    ring = n > 1 and own_keys and context_parallel == "ring"
    if (L <= FEW_QUERIES or L * S <= SHORT_SCORES or (n > 1 and not own_keys)) and not ring:
        choice = "reference"
    elif platform == "tpu" and not isinstance(window, jax.Array):
        choice = "splash"
    elif platform == "gpu" and gpu_attention.serves_width(head_dim, dtype):
        whole = n == 1 or (own_keys and context_parallel == "ulysses")
        trains = window is None and soft_cap is None
        choice = "triton" if whole and (trains or not own_keys) else "blockwise"
    else:
        choice = "blockwise"
    sharding.log_once("attention=auto: %s on %s", choice, platform)
    return choice


def _part(implementation: str, platform: str, block: int, soft_cap, scale) -> Part:
    """What a ring is made of: an implementation that gives its log-sum-exp."""
    if implementation not in ("blockwise", "splash"):
        raise UserError(
            f"model.context_parallel 'ring': attention {implementation!r} gives no log-sum-exp to join its parts by; "
            "allowed: auto, blockwise, splash, or another model.context_parallel"
        )
    if implementation == "blockwise":
        from lrjax.models import blockwise as kernels

        settings = {}
    else:
        from lrjax.models import splash as kernels

        settings = {"max_block": block, "interpret": platform == "cpu"}
    settings |= {"soft_cap": soft_cap, "scale": scale}
    return Part(
        *(functools.partial(f, **settings) for f in (kernels.part_forward, kernels.part_backward))
    )


def _kernel(implementation: str, platform: str, block: int):
    if implementation == "reference":
        return reference
    if implementation == "blockwise":
        return blockwise
    wanted = "tpu" if implementation == "splash" else "gpu"
    if platform not in (wanted, "cpu"):
        raise UserError(
            f"model.attention {implementation!r}: a kernel for {wanted}, this run is on {platform}; allowed: auto, "
            "blockwise"
        )
    # On a CPU the kernels are interpreted: the same program, for tests.
    interpret = platform == "cpu"
    if interpret:
        sharding.log_once(
            "attention=%s on cpu is interpreted: right, and very slow", implementation
        )
    if implementation == "splash":
        from lrjax.models.splash import splash

        return functools.partial(splash, max_block=block, interpret=interpret)
    if implementation == "triton":
        return functools.partial(gpu_attention.triton, interpret=interpret)
    return functools.partial(gpu_attention.cudnn, implementation="xla" if interpret else "cudnn")
