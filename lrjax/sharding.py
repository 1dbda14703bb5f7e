"""Device mesh, and the one table from logical axis names to mesh axes.

A parameter names its axes by what they mean ("embed", "heads", ...; `lrjax.models.llama.LOGICAL_AXES`); the
table `RULES` says which mesh axis each is split over. Nothing else in lrjax knows how an array is laid out:

    mesh = make_mesh({"fsdp": -1})
    shardings = tree_shardings(LOGICAL_AXES_tree, mesh)
    params = jax.jit(init, out_shardings=shardings)(rng)
"""

import math
from collections.abc import Mapping

import jax
import numpy as np
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lrjax.errors import UserError

MESH_AXES = ("data", "fsdp", "context", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
}


def make_mesh(sizes: Mapping[str, int] | None = None) -> Mesh:
    """The mesh with the axes of `MESH_AXES`; an axis not named has size 1, one axis may be -1 (the rest).

    Raises `UserError` for an unknown axis, or sizes that the devices cannot fill. With fewer places than
    devices (and no -1) the first devices are used.
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
    devices = jax.devices()
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
        np.asarray(devices[:known]).reshape(shape),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
    )


def spec(logical_axes: tuple[str | None, ...]) -> PartitionSpec:
    """The partition of an array whose axes carry these logical names (None: replicated)."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in logical_axes))


def tree_shardings(logical_tree, mesh: Mesh):
    """A tree of `NamedSharding`, one for each tuple of logical axis names in `logical_tree`."""
    return jax.tree.map(
        lambda axes: NamedSharding(mesh, spec(axes)),
        logical_tree,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays [B, L]: examples over the data axes, a sequence in one piece."""
    return NamedSharding(mesh, spec(("batch", None)))


def batch_shards(mesh: Mesh) -> int:
    """Over how many devices a batch is split: the global batch size must divide by it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
