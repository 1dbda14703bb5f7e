"""The state of training: what is stored, in which precision, where, and how it is split over the mesh.

State is {"params", "opt_state"}. With `state_dtype="bfloat16"` both are stored in bfloat16 (6 bytes a parameter with
AdamW in place of 12): the update is computed in float32 and rounded stochastically, up or down by chance with the right
mean. Plain rounding would lose every step smaller than 0.4 % of a weight, and Adam's second moment would stand still
(its relative change per step is 1 - b2, 0.1 %). With `offload=True` the optimizer's state lies in the host's
memory and is on the device only while it is used.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lrjax import sharding
from lrjax.errors import UserError
from lrjax.models.llama import logical_axes

STATE_DTYPES = ("float32", "bfloat16")


def shardings_of(params, mesh, rules=None):
    """Shardings for a parameter tree by the logical axes of its leaves."""
    return sharding.tree_shardings(logical_axes(params), params, mesh, rules)


def state_shardings(optimizer, params, mesh, offload: bool = False):
    """Shardings of the whole state. An optimizer's moments lie as their parameters do; counters are everywhere.

    Args:
        params: the parameters, or their shapes and dtypes.
        offload: keep the moments in the host's memory.
    """
    param_shardings = shardings_of(params, mesh)
    known = {
        _names(path): (leaf.shape, where)
        for (path, leaf), where in zip(
            jax.tree.leaves_with_path(params), jax.tree.leaves(param_shardings), strict=True
        )
    }

    def of(path, leaf):
        shape, where = known.get(_names(path), (None, None))
        if shape != leaf.shape:
            return sharding.replicated(mesh)
        return where.with_memory_kind("pinned_host") if offload else where

    opt_state = jax.eval_shape(optimizer.init, params)
    return {"params": param_shardings, "opt_state": jax.tree.map_with_path(of, opt_state)}


def _names(path):
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def check_dtype(name: str) -> None:
    if name not in STATE_DTYPES:
        raise UserError(f"state_dtype {name!r}: allowed: {', '.join(STATE_DTYPES)}")


def place(params, shardings, dtype):
    """Parameters from anywhere (host arrays, another layout) in `dtype`, each leaf straight to its devices."""

    def leaf(x, where):
        if isinstance(x, jax.Array) and x.is_fully_addressable and not where.is_fully_addressable:
            x = np.asarray(x)  # every process has it whole, and gives its part
        return jax.device_put(x if x.dtype == dtype else x.astype(dtype), where)

    return jax.tree.map(leaf, params, shardings)


def apply_update(optimizer, grads, state, device_shardings=None):
    """One step of the optimizer: the new state, in the dtypes of the old one.

    Args:
        device_shardings: of the optimizer's state on the device, when it is kept elsewhere.
    """
    params, opt_state = state["params"], state["opt_state"]
    if device_shardings is not None:
        opt_state = jax.device_put(opt_state, device_shardings)
    if all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params)):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return {"params": optax.apply_updates(params, updates), "opt_state": opt_state}
    old = {"params": params, "opt_state": opt_state}
    grads, params, opt_state = _widened((grads, params, opt_state))
    updates, opt_state = optimizer.update(grads, opt_state, params)
    new = {"params": optax.apply_updates(params, updates), "opt_state": opt_state}
    step = next(  # an optimizer counts in several places, alike
        leaf
        for path, leaf in jax.tree.leaves_with_path(opt_state)
        if getattr(path[-1], "name", None) == "count"
    )
    leaves, tree = jax.tree.flatten(new)
    rounded = [
        stochastic_round(leaf, step * len(leaves) + index) if was.dtype == jnp.bfloat16 else leaf
        for index, (leaf, was) in enumerate(zip(leaves, jax.tree.leaves(old), strict=True))
    ]
    return jax.tree.unflatten(tree, rounded)


def _widened(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


def stochastic_round(x, seed):
    """float32 -> bfloat16, up or down by chance, so that the mean is x (finite x).

    The chance is a hash of the place and the seed, which costs no memory: a random generator's bits would be as large
    as the array.
    """
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        place = place * jnp.uint32(x.shape[axis]) + jax.lax.broadcasted_iota(
            jnp.uint32, x.shape, axis
        )
    mixed = place + jnp.asarray(seed).astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):  # a 32-bit mix (C. Wellons, 2018)
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    mixed ^= mixed >> 15
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (mixed & 0xFFFF)
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(
        jnp.bfloat16
    )
