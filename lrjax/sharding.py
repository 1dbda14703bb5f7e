"""Device mesh, and the one table from logical axis names to mesh axes.

An array names its axes by what they mean: a parameter in `lrjax.models.llama.LOGICAL_AXES` ("embed", "heads", ...),
an activation where it is made ("batch", "length", ...). The table `RULES` (or `config.rules`) says which mesh axes
each is split over. Nothing else in lrjax knows how an array is laid out:

    mesh = make_mesh({"fsdp": 2, "context": 4})
    with layout(mesh):                                   # what is traced in here is laid out on this mesh
        params = jax.jit(init, out_shardings=tree_shardings(LOGICAL_AXES, params, mesh))(rng)
        x_BLD = constrain(x_BLD, ("batch", "length", None))

The layout is part of jit's cache key. Without one, and on a mesh of one device, nothing is constrained.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lrjax.errors import UserError

# data: copies of the model, across slices (DCN); fsdp: parameters and examples are split; context: parameters and
# the sequence are split; tensor: heads, feed-forward and vocabulary are split.
MESH_AXES = ("data", "fsdp", "context", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # Activations.
    "batch": ("data", "fsdp"),
    "length": "context",
    # Parameters. Every matrix is split over fsdp and context: context alone has to hold an 8B model.
    "layers": None,
    "embed": ("fsdp", "context"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "table_embed": (
        "fsdp",
        "context",
        "tensor",
    ),  # width of the embedding (`lrjax.models.embedding`)
    # The head is split over its vocabulary: each device then makes its own part of the logits of all the tokens
    # of a context group, and hidden states travel instead of the larger head (`lrjax.models.head`).
    "head_embed": "fsdp",
    "vocab": ("tensor", "context"),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and its table of rules; hashable, so that jit keys its programs on it."""

    mesh: Mesh | None = None
    rules: tuple = tuple(RULES.items())

    def axes(self, logical: str | None) -> tuple[str, ...]:
        """The mesh axes that a logical axis is split over."""
        axes = None if logical is None else dict(self.rules)[logical]
        return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)

    def size(self, logical: str) -> int:
        """Over how many devices a logical axis is split."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[a] for a in self.axes(logical))

    def spec(self, logical_axes: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """The partition of an array of this shape whose axes carry these logical names (None: whole).

        A mesh axis that an earlier axis of the array has taken, or that does not divide the size, splits nothing:
        one prompt on a mesh for many, an odd vocabulary.
        """
        taken, entries = set(), []
        for name, size in zip(logical_axes, shape, strict=True):
            kept = []
            for axis in self.axes(name):
                split = math.prod(self.mesh.shape[a] for a in [*kept, axis])
                if axis not in taken and size % split == 0:
                    kept.append(axis)
                    taken.add(axis)
            entries.append(tuple(kept) if len(kept) > 1 else kept[0] if kept else None)
        return PartitionSpec(*entries)

    def sharding(self, logical_axes, shape) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(logical_axes, shape))

    @property
    def split(self) -> bool:
        """Whether there is more than one device."""
        return self.mesh is not None and self.mesh.size > 1

    @property
    def platform(self) -> str:
        """Of the devices the program is for, which need not be there: cpu, gpu, tpu."""
        if self.mesh is None:
            return jax.default_backend()
        platform = self.mesh.devices.flat[0].platform
        return "gpu" if platform in ("cuda", "rocm") else platform


_LAYOUT = jax.make_user_context(Layout())


def layout(mesh: Mesh | None, rules: Mapping | None = None):
    """A context manager: what is traced inside is laid out on `mesh` by `rules` (see `check_rules`)."""
    return _LAYOUT(Layout(mesh, tuple(check_rules(rules or {}).items())))


def current() -> Layout:
    return _LAYOUT.value


def constrain(x, logical_axes: tuple[str | None, ...]):
    """x, laid out by the logical names of its axes; x itself where there is nothing to split."""
    here = current()
    if not here.split:
        return x
    return jax.lax.with_sharding_constraint(x, here.sharding(logical_axes, x.shape))


def check_rules(changes: Mapping) -> dict:
    """`RULES` with changes, values being mesh axes by name, comma-separated, or "" for none.

    Raises `UserError` for a logical or a mesh axis that there is not.
    """
    rules = dict(RULES)
    for name, axes in changes.items():
        if name not in RULES:
            raise UserError(f"config.rules: unknown axis {name!r}; allowed: {', '.join(RULES)}")
        axes = tuple(axes.split(",")) if isinstance(axes, str) and axes else tuple(axes or ())
        for axis in axes:
            if axis not in MESH_AXES:
                raise UserError(
                    f"config.rules.{name}: unknown mesh axis {axis!r}; allowed: {', '.join(MESH_AXES)}"
                )
        rules[name] = axes or None
    return rules


# ---------------------------------------------------------------------------------------------- mesh


def make_mesh(sizes: Mapping[str, int] | None = None, devices=None) -> Mesh:
    """The mesh with the axes of `MESH_AXES`; an axis not named has size 1, one axis may be -1 (the rest).

    Neighbours on the mesh are neighbours on the interconnect, as far as JAX can tell. Devices of several slices or
    hosts without a common interconnect are split by `data`, so that only gradients cross the slow network.

    Args:
        sizes: mesh axis -> size; default: all of them to fsdp.
        devices: default: all that there are. With fewer places than devices (and no -1) the first are used.

    Raises:
        UserError: an unknown axis, or sizes that the devices cannot fill.
    """
    sizes = dict(sizes or {"fsdp": -1})
    unknown = sorted(set(sizes) - set(MESH_AXES))
    if unknown:
        raise UserError(
            f"config.mesh: unknown axis {unknown[0]!r}; allowed: {', '.join(MESH_AXES)}"
        )
    shape = [int(sizes.get(axis, 1)) for axis in MESH_AXES]
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UserError(f"config.mesh: {sizes}: sizes are positive, and at most one of them is -1")
    devices = list(jax.devices() if devices is None else devices)
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape:
        if len(devices) % known:
            raise UserError(
                f"config.mesh: {sizes}: {len(devices)} devices do not divide by {known}"
            )
        shape[shape.index(-1)] = len(devices) // known
        known = len(devices)
    if known > len(devices):
        raise UserError(f"config.mesh: {sizes} needs {known} devices, this run has {len(devices)}")
    if known < len(devices):
        logging.info("mesh %s uses %d of %d devices", sizes, known, len(devices))
    return Mesh(
        _arrange(devices[:known], shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )


def _arrange(devices, shape) -> np.ndarray:
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        if shape[0] % slices:
            raise UserError(
                f"config.mesh.data: {shape[0]} does not divide by the {slices} slices of this run; "
                "slices are split by data"
            )
        within = (shape[0] // slices, *shape[1:])
        across = (slices, *(1 for _ in shape[1:]))
        return mesh_utils.create_hybrid_device_mesh(within, across, devices=devices)
    if devices[0].platform == "tpu":
        return mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    return np.asarray(devices).reshape(shape)


# ---------------------------------------------------------------------------------------------- shardings


def tree_shardings(logical_tree, shapes, mesh: Mesh, rules: Mapping | None = None):
    """A tree of `NamedSharding`: for each tuple of logical axis names in `logical_tree`, that of the leaf at the
    same place in `shapes` (arrays, or what has their shape)."""
    here = Layout(mesh, current().rules if rules is None else tuple(check_rules(rules).items()))
    return jax.tree.map(
        lambda axes, leaf: here.sharding(axes, leaf.shape),
        logical_tree,
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def batch_sharding(mesh: Mesh, shape: tuple[int, int] | None = None) -> NamedSharding:
    """Arrays [B, L]: examples over the data axes, the sequence over the context axis."""
    here = Layout(mesh, current().rules)
    if shape is None:
        return NamedSharding(mesh, PartitionSpec(here.axes("batch"), here.axes("length")))
    return here.sharding(("batch", "length"), shape)


def batch_shards(mesh: Mesh) -> int:
    """Over how many devices a batch is split: the global batch size must divide by it."""
    return Layout(mesh, current().rules).size("batch")


def own_rows(where: NamedSharding, shape: tuple[int, int]) -> tuple[list[int], int, int]:
    """Which examples of a batch [B, L] this process has to provide.

    Returns:
        `(rows, groups, group)`: the rows of the batch that its devices hold, how many different sets of rows the
        processes hold, and the number of its own. Processes that split the sequence hold the same rows.

    Raises:
        UserError: processes hold rows in common and not all of them.
    """
    of_process: dict[int, set[int]] = {}
    for device, index in where.devices_indices_map(shape).items():
        of_process.setdefault(device.process_index, set()).update(
            range(*index[0].indices(shape[0]))
        )
    sets = sorted({tuple(sorted(rows)) for rows in of_process.values()})
    if sum(map(len, sets)) != shape[0]:
        raise UserError(
            f"config.mesh: {dict(where.mesh.shape)}: the examples of a batch lie across processes in parts; allowed: "
            "batch axes that split processes evenly"
        )
    mine = tuple(sorted(of_process[jax.process_index()]))
    return list(mine), len(sets), sets.index(mine)


def barrier(name: str) -> None:
    """Waits for the other processes of the run."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


@functools.cache
def log_once(message: str, *args) -> None:
    """Logs what is decided while a program is traced, once for each decision."""
    logging.info(message, *args)
