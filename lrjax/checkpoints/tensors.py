"""Between the tensors of other people's files and our parameter tree, one tensor at a time.

A Hugging Face or GGUF file stores one matrix per layer and kind as [out, in], heads not told apart; the tree
stacks the layers of a kind and splits the heads: q is [layers, D, N, H] (see `models.llama`). A format gives its
tensors by `Slot` (leaf and layer) as `Stored`, in the layout of Hugging Face's Llama; this module makes the tree of
them and the other way round, without ever holding the model on the host.
"""

import collections
import concurrent.futures
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from lrjax.errors import UserError
from lrjax.models import llama
from lrjax.models.bits import dtype_for_reading

_KEPT = {"embedding"}  # stored as [V, D] everywhere, for it is looked up, not multiplied
_INPUT_AXES = {"layers/o": 2}  # o takes heads and head width; every other matrix has one input axis
_READERS = 2
_VECTORS = {"layers/q_bias", "layers/k_bias", "layers/v_bias"}  # [N, H] here, [N * H] there


class Stored(NamedTuple):
    """A tensor in a file: its shape and dtype as stored, and how to read a part of it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple[slice, ...]], np.ndarray]

    def all(self) -> np.ndarray:
        return self.read((slice(None),) * len(self.shape))


class Slot(NamedTuple):
    """Where a stored tensor goes: a leaf ("layers/q") and the layer, None for a leaf without layers."""

    leaf: str
    layer: int | None


def slots(config: llama.LlamaConfig) -> dict[Slot, tuple[int, ...]]:
    """Every tensor of a model, with its shape as stored."""
    found = {}
    for leaf, shape in leaf_shapes(config).items():
        if leaf.startswith("layers/"):
            found |= {Slot(leaf, i): stored_shape(leaf, shape[1:]) for i in range(shape[0])}
        else:
            found[Slot(leaf, None)] = stored_shape(leaf, shape)
    return found


def stored_shape(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A tensor's shape in a file, from its shape in the tree (without layers)."""
    if leaf in _VECTORS:
        return (math.prod(shape),)
    if len(shape) == 1 or leaf in _KEPT:
        return shape
    inputs = _INPUT_AXES.get(leaf, 1)
    return math.prod(shape[inputs:]), math.prod(shape[:inputs])


def gather(
    config: llama.LlamaConfig,
    stored: Mapping[Slot, Stored],
    *,
    dtype: str = "float32",
    reading: str | None = None,
    shardings=None,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """The parameter tree on the devices, read tensor by tensor.

    On the host there is one tensor, and the next two, at a time; each process reads the parts that its devices hold.

    Args:
        stored: all tensors of the model.
        dtype: of the leaves, or "stored": each as it is in the file (layers that differ: what holds them all).
        reading: the dtype that a model which is only read computes in: then float32 matrices are in it
            (`models.bits.dtype_for_reading`).
        shardings: a tree like the parameters, or a function from the config to one; None: the first device.
        progress: called with (bytes read, bytes in all) after each tensor.
    """
    if callable(shardings):
        shardings = shardings(config)
    single = SingleDeviceSharding(jax.local_devices()[0])
    of_leaf = {} if shardings is None else flatten(shardings)
    shapes = leaf_shapes(config)
    dtypes: dict[str, np.dtype] = {}
    for slot, tensor in stored.items():
        known = dtypes.get(slot.leaf, tensor.dtype)
        dtypes[slot.leaf] = jnp.promote_types(known, tensor.dtype)
    if dtype != "stored":
        dtypes = dict.fromkeys(dtypes, np.dtype(dtype))
    if reading:
        dtypes = {
            leaf: dtype_for_reading(leaf.rsplit("/", 1)[-1], len(shapes[leaf]), kind, reading)
            for leaf, kind in dtypes.items()
        }

    def read(slot: Slot, tensor: Stored) -> jax.Array:
        sharding = _part_sharding(slot, of_leaf.get(slot.leaf, single))
        transposed = len(tensor.shape) == 2 and slot.leaf not in _KEPT

        def part(index):
            # Of files the values are often a view of mapped pages; those that jax would take as they are have to be
            # copied, or the parameters change with the file. A transposed view it copies itself, and faster than numpy.
            values = tensor.read(index[::-1]).T if transposed else tensor.read(index)
            return values.copy() if values.flags.c_contiguous else values

        shape = tensor.shape[::-1] if transposed else tensor.shape
        return jax.make_array_from_callback(shape, sharding, part)

    flat, done = {}, 0
    total = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in stored.values())
    for (slot, tensor), part in _ahead(read, stored.items()):
        leaf, sharding = slot.leaf, of_leaf.get(slot.leaf, single)
        if slot.layer is None:
            flat[leaf] = _caster(shapes[leaf], dtypes[leaf], sharding)(part)
        else:
            if leaf not in flat:
                flat[leaf] = _zeros(shapes[leaf], dtypes[leaf], sharding)
            flat[leaf] = _placer(sharding)(flat[leaf], part, np.int32(slot.layer))
        # The device works behind the host: without waiting, every tensor would be in memory at the same time.
        jax.block_until_ready(flat[leaf])
        done += math.prod(tensor.shape) * tensor.dtype.itemsize
        if progress:
            progress(done, total)
    return nest({leaf: flat[leaf] for leaf in shapes})


def scatter(config: llama.LlamaConfig, params: Mapping) -> dict[Slot, Stored]:
    """The inverse of `gather`: every tensor, read off the tree (in its dtypes) when it is asked for.

    Raises:
        UserError: naming the leaves that the config has and the tree has not, the other way round, or
            in another shape.
    """
    flat = flatten(params)
    expected = leaf_shapes(config)
    found = {leaf: tuple(value.shape) for leaf, value in flat.items()}
    if found != expected:
        wrong = sorted(leaf for leaf in found | expected if found.get(leaf) != expected.get(leaf))
        raise UserError(
            "the parameters do not fit the config: "
            + "; ".join(f"{leaf} is {found.get(leaf)}, not {expected.get(leaf)}" for leaf in wrong)
        )

    def read(slot, shape, index):
        value = flat[slot.leaf]
        if slot.layer is not None:
            value = value[slot.layer]
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            from jax.experimental import multihost_utils

            value = multihost_utils.process_allgather(value, tiled=True)
        value = np.asarray(value)
        if value.shape != shape:
            value = value.reshape(shape) if len(shape) == 1 else value.reshape(shape[::-1]).T
        elif len(shape) == 2 and slot.leaf not in _KEPT:  # a square matrix
            value = value.T
        return np.ascontiguousarray(value[index])

    return {
        slot: Stored(shape, np.dtype(flat[slot.leaf].dtype), functools.partial(read, slot, shape))
        for slot, shape in slots(config).items()
    }


def check(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Raises one `UserError` that names every tensor that is missing, misshapen or not part of the model.

    Args:
        expected, found: name in the file -> shape.
        where: the file or directory, for the message.
    """
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not part of the model" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if problems:
        raise UserError(f"{where}: the tensors do not fit the config: {'; '.join(problems)}")


def leaf_shapes(config: llama.LlamaConfig) -> dict[str, tuple[int, ...]]:
    return {leaf: spec.shape for leaf, spec in flatten(llama.abstract_params(config)).items()}


def flatten(tree: Mapping) -> dict:
    """Leaves by their path, "layers/q"."""
    return dict(_walk(tree, ()))


def nest(flat: Mapping) -> dict:
    """The inverse of `flatten`."""
    tree = {}
    for leaf, value in flat.items():
        *parents, last = leaf.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _walk(tree, path) -> Iterator:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _walk(value, (*path, name))
        else:
            yield "/".join((*path, name)), value


def _part_sharding(slot: Slot, sharding):
    """How a tensor whose heads are not told apart yet is split, so that it lies where its part of the leaf does."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    axes = tuple(sharding.spec) + (None,) * 4
    axes = axes[1:] if slot.layer is not None else axes
    if slot.leaf in _VECTORS or slot.leaf.endswith("norm"):
        axes = axes[:1]  # heads, or the norm's width
    elif slot.leaf == "layers/o":
        axes = axes[0], axes[2]  # [N, H, D] as [N * H, D]
    else:
        axes = axes[:2]  # [D, N, H] as [D, N * H]; [in, out]
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))


def _ahead(function: Callable, items: Iterable[tuple]) -> Iterator:
    """(item, function(*item)) of each item in order; the next two are computed in threads meanwhile."""
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        coming = collections.deque()
        for item in items:
            coming.append((item, pool.submit(function, *item)))
            if len(coming) > _READERS:
                before, result = coming.popleft()
                yield before, result.result()
        for before, result in coming:
            yield before, result.result()


@functools.lru_cache(maxsize=64)
def _caster(shape: tuple, dtype: np.dtype, sharding):
    """The jitted step from a part to a leaf without layers."""
    return jax.jit(lambda part: part.reshape(shape).astype(dtype), out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _placer(sharding):
    """The jitted step from a part to its row of a stacked leaf, which is changed in place."""

    def place(leaf_value, part, layer):
        dtype, bits = leaf_value.dtype, f"uint{8 * leaf_value.dtype.itemsize}"
        part = part.reshape(leaf_value.shape[1:]).astype(dtype)
        # As integers: bfloat16 XLA's CPU backend copies element by element (see lrjax.models.bits).
        leaf_value, part = (lax.bitcast_convert_type(x, bits) for x in (leaf_value, part))
        placed = lax.dynamic_update_index_in_dim(leaf_value, part, layer, axis=0)
        return lax.bitcast_convert_type(placed, dtype)

    return jax.jit(place, donate_argnums=0, out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _zeros_maker(shape, dtype, sharding):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


def _zeros(shape, dtype, sharding):
    return _zeros_maker(shape, np.dtype(dtype), sharding)()
