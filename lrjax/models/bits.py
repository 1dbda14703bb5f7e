"""bfloat16 by its bits: arrays that layers are cut out of, held as integers; rounding; and parameters for reading.

XLA's CPU backend moves bfloat16 element by element: cutting a layer out of a stack of weights or out of the cache takes
about ten times as long as with the same bytes as integers (`python -m benchmarks.bits`). On other platforms the two
are one.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from lrjax.sharding import current


def to_bits(x):
    """bfloat16 as uint16, anything else as it is."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def from_bits(x):
    """The inverse of `to_bits`."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def rounded(x, dtype):
    """float32 `x.astype(dtype)`. To bfloat16 by its bits on a CPU: XLA looks for NaN at every element there, which
    in a fusion with an exponential is a quarter of the time (docs/log.md, 27 November 2026). NaN stays NaN but for bits
    that no operation here makes.
    """
    if dtype != jnp.bfloat16 or x.dtype != jnp.float32 or current().platform != "cpu":
        return x.astype(dtype)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)  # to the nearest, halves to the even one
    return from_bits((bits >> 16).astype(jnp.uint16))


@rounded.defjvp
def _rounded_jvp(dtype, primals, tangents):
    return rounded(*primals, dtype), tangents[0].astype(dtype)


def ready(config, params):
    """Parameters for reading, on the device: matrices in the compute dtype of `config`, those of layers as `to_bits`.

    The model rounds them the same way at every use, so nothing changes but time, and memory: half of float32's. Norm
    scales and biases stay. `checkpoints.loading.load_for_reading` makes the same while it reads.
    """
    return jax.tree.map_with_path(
        lambda path, value: _ready(config, [key.key for key in path], value), params
    )


def ready_leaf_by_leaf(config, params: dict) -> dict:
    """`ready` of a tree that is emptied on the way, so that only of one leaf there are two."""

    def taken(tree, path):
        found = {}
        for name in list(tree):
            value, here = tree.pop(name), [*path, name]
            made = taken(value, here) if isinstance(value, dict) else _ready(config, here, value)
            found[name] = jax.block_until_ready(made)
        return found

    return taken(params, [])


def dtype_for_reading(name: str, ndim: int, dtype, computing):
    """The dtype that `ready` gives a leaf of `dtype`, by its name and rank, where the model computes in `computing`."""
    return jnp.dtype(computing if _is_matrix(name, ndim) and dtype == jnp.float32 else dtype)


def _ready(config, path, value):
    value, name = jnp.asarray(value), path[-1]
    value = value.astype(dtype_for_reading(name, value.ndim, value.dtype, config.dtype))
    return to_bits(value) if path[0] == "layers" and _is_matrix(name, value.ndim) else value


def _is_matrix(name, ndim):
    return ndim > 1 and "norm" not in name and "bias" not in name
