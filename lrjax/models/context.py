"""Attention of a sequence that is split over devices, and kernels that XLA cannot split by itself.

`split_attention` runs a kernel under `shard_map`: each device has its part of the batch ("batch"), of the heads
("heads") and of the sequence ("length"), as the current layout says (`lrjax.sharding`). Along the sequence:

* gather: every device gathers all keys and values and attends with its own queries. So that all devices have the same
  work under a causal mask, the 2n chunks of a sequence lie in head-tail order: device d holds chunks d and 2n - 1 - d.
  The model brings its inputs into this order and its outputs back (`to_head_tail`, `from_head_tail`), with
  neighbours' exchanges; nothing outside the model sees it.
* ring: queries stay, keys and values go round (`lrjax.models.ring`): nobody holds all of them. In head-tail order too.
* ulysses: two all-to-alls turn a part of the sequence with all heads into the whole sequence with a part of the heads
  and back (Jacobs et al. 2023). Any kernel serves, key heads have to divide, and the order stays as it is.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from lrjax import sharding
from lrjax.errors import UserError
from lrjax.models.ring import Part, ring

CONTEXT_PARALLEL = ("gather", "ring", "ulysses")
HEAD_TAIL = ("gather", "ring")  # those that want the chunks in head-tail order

AXIS = "context"


def devices_along_length() -> int:
    """Over how many devices the current layout splits a sequence."""
    return sharding.current().size("length")


def own_keys(L: int, S: int, q_offset) -> bool:
    """Whether L queries have S keys that are their own: no cache goes before them."""
    return L == S and isinstance(q_offset, int) and q_offset == 0


def length_multiple(implementation: str, context_parallel: str) -> int:
    """What a length has to be a multiple of on the current layout: chunks of whole blocks."""
    n = devices_along_length()
    if n == 1:
        return 1
    kernels = implementation in ("splash", "triton", "cudnn")
    auto = implementation == "auto" and sharding.current().platform != "cpu"
    block = 128 if kernels or auto else 1
    return n * block * (2 if context_parallel in HEAD_TAIL else 1)


def check_length(length: int, implementation: str, context_parallel: str) -> None:
    """Raises `UserError` for a length that the context axis cannot share out."""
    multiple = length_multiple(implementation, context_parallel)
    if length % multiple:
        n = devices_along_length()
        raise UserError(
            f"length {length} does not divide by {multiple} (config.mesh.context {n} x "
            f"{multiple // n} tokens for {implementation} attention, {context_parallel}); "
            f"allowed: {length // multiple * multiple or multiple} or "
            f"{(length // multiple + 1) * multiple}"
        )


# ---------------------------------------------------------------------------------------------- attention


def heads_go_together(q_BLNH, k_BSKH) -> bool:
    """Whether the layout gives every device the key heads of its query heads, so that it can attend by itself."""
    here = sharding.current()
    q_spec = here.spec(("batch", None, "heads", None), q_BLNH.shape)
    return q_spec[2] == here.spec(("batch", None, "kv_heads", None), k_BSKH.shape)[2]


def split_attention(
    kernel,
    q_BLNH,
    k_BSKH,
    v_BSKH,
    q_seg_BL,
    k_seg_BS,
    q_offset=0,
    *,
    context_parallel,
    runs,
    window=None,
):
    """Runs `kernel(q, k, v, q_seg, k_seg, q_offset)` on every device's part.

    Args:
        kernel: an implementation of `lrjax.models.attention`, its keywords bound; for a ring, its `Part`.
        q_offset: as there; 0 where the sequence is split.
        context_parallel: one of `CONTEXT_PARALLEL`.
        runs: whether the kernel takes `q_index_L`, any index for every query. One that does not is called for each
            of a device's two chunks.
        window: of a ring; kernels have theirs bound.
    """
    here = sharding.current()
    n, tensor = here.size("length"), here.size("heads")
    N, K = q_BLNH.shape[2], k_BSKH.shape[2]
    if K % tensor or N % tensor:
        raise UserError(
            f"config.mesh.tensor {tensor} does not divide the {N} heads and {K} key heads of the model"
        )
    if not heads_go_together(q_BLNH, k_BSKH):
        raise UserError(
            f"config.rules: heads are split over {here.axes('heads')}, kv_heads over {here.axes('kv_heads')}; allowed "
            "for the kernels of attention: both over the same axes of the mesh"
        )
    length = "length" if own_keys(q_BLNH.shape[1], k_BSKH.shape[1], q_offset) else None
    if length and n > 1 and context_parallel == "ulysses" and (K // tensor) % n:
        raise UserError(
            f"model.context_parallel 'ulysses': config.mesh.context {n} does not divide the {K // tensor} key heads "
            "of a device; allowed: gather, ring"
        )
    q_spec = here.spec(("batch", length, "heads", None), q_BLNH.shape)
    k_spec = here.spec(("batch", length, "kv_heads", None), k_BSKH.shape)
    q_seg_spec = here.spec(("batch", length), q_seg_BL.shape)
    k_seg_spec = here.spec(("batch", length), k_seg_BS.shape)

    def local(q, k, v, q_seg, k_seg, q_offset):
        if isinstance(kernel, Part):
            return ring(kernel, AXIS, n, q, k, v, q_seg, window)
        if not length:
            return kernel(q, k, v, q_seg, k_seg, q_offset)
        if n == 1:  # a plain 0, which says that the keys are the queries' own
            return kernel(q, k, v, q_seg, k_seg, 0)
        if context_parallel == "ulysses":
            return _ulysses(kernel, q, k, v, q_seg)
        return _gather(kernel, q, k, v, q_seg, n, runs)

    # check_vma: Pallas kernels do not say over which axes what they make varies.
    mapped = jax.shard_map(
        local,
        mesh=here.mesh,
        in_specs=(q_spec, k_spec, k_spec, q_seg_spec, k_seg_spec, P()),
        out_specs=q_spec,
        check_vma=False,
    )
    return mapped(q_BLNH, k_BSKH, v_BSKH, q_seg_BL, k_seg_BS, jnp.asarray(q_offset, jnp.int32))


def _gather(kernel, q, k, v, seg, n, runs):
    """q, k, v: this device's two chunks. Keys and values of all of them, in the order of the document."""

    def whole(x):
        chunks = lax.all_gather(x, AXIS, axis=1, tiled=True)
        chunks = chunks.reshape(x.shape[0], 2 * n, -1, *x.shape[2:])
        heads, tails = chunks[:, 0::2], chunks[:, 1::2]
        return jnp.concatenate([heads, tails[:, ::-1]], axis=1).reshape(
            x.shape[0], -1, *x.shape[2:]
        )

    k, v, k_seg = whole(k), whole(v), whole(seg)
    half = q.shape[1] // 2
    d = lax.axis_index(AXIS)
    starts = (d * half, (2 * n - 1 - d) * half)
    if runs:
        q_index_L = jnp.concatenate([start + jnp.arange(half) for start in starts])
        return kernel(q, k, v, seg, k_seg, q_index_L=q_index_L)
    parts = [
        kernel(q[:, part], k, v, seg[:, part], k_seg, start)
        for part, start in zip((slice(0, half), slice(half, None)), starts, strict=True)
    ]
    return jnp.concatenate(parts, axis=1)


def _ulysses(kernel, q, k, v, seg):
    to_heads = functools.partial(
        lax.all_to_all, axis_name=AXIS, split_axis=2, concat_axis=1, tiled=True
    )
    seg = lax.all_gather(seg, AXIS, axis=1, tiled=True)
    out = kernel(to_heads(q), to_heads(k), to_heads(v), seg, seg, 0)
    return lax.all_to_all(out, AXIS, split_axis=1, concat_axis=2, tiled=True)


# ---------------------------------------------------------------------------------------------- order


def to_head_tail(x):
    """[B, L, ...] in the order of the document -> device d holds chunks d and 2n - 1 - d."""
    return _exchange(x, forward=True)


def from_head_tail(x):
    """The inverse of `to_head_tail`."""
    return _exchange(x, forward=False)


def _exchange(x, forward: bool):
    here = sharding.current()
    n = here.size("length")
    if n == 1:
        return x
    spec = here.spec(("batch", "length", *(None for _ in x.shape[2:])), x.shape)

    def holder(chunk):
        return chunk if chunk < n else 2 * n - 1 - chunk

    # In document order device d has chunks 2d and 2d + 1; in head-tail order it has one even and one odd chunk too.
    evens = [(d, holder(2 * d)) for d in range(n)]
    odds = [(d, holder(2 * d + 1)) for d in range(n)]

    def local(x):
        half = x.shape[1] // 2
        first, second = x[:, :half], x[:, half:]
        even_device = (
            lax.axis_index(AXIS) % 2 == 0
        )  # its head, chunk d, is even, and so its tail is odd
        if forward:
            even, odd = lax.ppermute(first, AXIS, evens), lax.ppermute(second, AXIS, odds)
            first, second = jnp.where(even_device, even, odd), jnp.where(even_device, odd, even)
        else:
            even, odd = jnp.where(even_device, first, second), jnp.where(even_device, second, first)
            first = lax.ppermute(even, AXIS, [(to, d) for d, to in evens])
            second = lax.ppermute(odd, AXIS, [(to, d) for d, to in odds])
        return jnp.concatenate([first, second], axis=1)

    return jax.shard_map(local, mesh=here.mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)
