"""Merging parameter trees in memory, wherever their shards lie: for trying weights out, and for soups.

params = merge_trees([(0.5, params_base), (0.5, params_extended)])
params = merge_trees([(1.0, params_a), (1.0, params_b)], method="ties", base=params_base, density=0.3)
"""

from collections.abc import Sequence

import jax
import numpy as np

from lrjax.errors import UserError
from lrjax.longrecipe.merge_methods import METHODS
from lrjax.longrecipe.merge_settings import MergeRecipe

# Methods that look at every element by itself, which shards can be merged with where they lie.
_ELEMENTWISE = ("linear", "task_arithmetic")


def merge_trees(
    weighted: Sequence[tuple[float, dict]],
    names: Sequence[str] | None = None,
    method: str = "linear",
    *,
    base: dict | None = None,
    **settings,
) -> dict:
    """Merges parameter trees, each leaf to the dtype (and the sharding) of the first tree's.

    Args:
        weighted: (weight, params) pairs. slerp takes two with weights 1 - t and t.
        names: what errors call the trees; default "source 0", "source 1", ...
        method: one of `merge_methods.METHODS`.
        base: the tree that differences are taken to, for methods that have one.
        **settings: density, scale, normalize, strict_sum, rescale, seed, as for `merging.merge`.

    Raises:
        UserError: leaves that are missing or of another shape, values that are not finite, bad weights; a method
            that needs whole tensors on parameters spread over several processes.
    """
    names = list(names or (f"source {index}" for index in range(len(weighted))))
    recipe = MergeRecipe(
        method, dict(zip(names, [weight for weight, _ in weighted], strict=True)),
        base=None if base is None else "base", **settings,
    )  # fmt: skip
    trees = dict(zip(names, [params for _, params in weighted], strict=True))
    trees = {name: trees.get(name, base) for name in recipe.sources}
    leaves = [
        {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
        for flat in (jax.tree.leaves_with_path(tree) for tree in trees.values())
    ]
    _check_leaves(leaves, list(trees))
    merged = [
        _merge_leaf(recipe, leaf, [tree[leaf] for tree in leaves], list(trees))
        for leaf in leaves[0]
    ]
    return jax.tree.unflatten(jax.tree.structure(next(iter(trees.values()))), merged)


def _merge_leaf(recipe, leaf, values, names):
    first = values[0]
    if not isinstance(first, jax.Array):
        return _merge_arrays(recipe, leaf, values, names, 0)
    if all(value.is_fully_addressable for value in values):
        merged = _merge_arrays(recipe, leaf, [np.asarray(value) for value in values], names, 0)
        return jax.device_put(merged, first.sharding)
    if recipe.method not in _ELEMENTWISE:
        raise UserError(
            f"merge method {recipe.method!r} needs whole tensors, but {leaf} lies on several processes; "
            f"allowed there: {', '.join(_ELEMENTWISE)}"
        )
    parts = [
        {str(shard.index): shard.data for shard in value.addressable_shards} for value in values
    ]

    def merged_part(index):
        arrays = [np.asarray(part[str(index)]) for part in parts]
        layer = index[0].start or 0 if leaf.startswith("layers/") else 0
        return _merge_arrays(recipe, leaf, arrays, names, layer, first.shape[0])

    return jax.make_array_from_callback(first.shape, first.sharding, merged_part)


def _merge_arrays(recipe, leaf, arrays, names, first_layer, num_layers=None):
    """Layer by layer: a layer of a stacked leaf is a tensor of its own."""
    for array, name in zip(arrays, names, strict=True):
        if not np.isfinite(array).all():
            raise UserError(f"{name}: {leaf} holds NaN or infinite values; it cannot be merged")
    merged = np.empty_like(arrays[0])
    if not leaf.startswith("layers/"):
        merged[...] = _merge_tensor(recipe, leaf, arrays, 1)
        return merged
    for layer in range(len(merged)):
        name = leaf.replace("layers/", f"layers/{first_layer + layer}/", 1)
        merged[layer] = _merge_tensor(
            recipe, name, [array[layer] for array in arrays], num_layers or len(merged)
        )
    return merged


def _merge_tensor(recipe, name, arrays, num_layers):
    method = METHODS[recipe.method]
    parameters = recipe.parameters(name, num_layers)
    flat = [np.asarray(array, np.float32).reshape(-1) for array in arrays]
    prepared = method.prepare(lambda sample=False: iter([(0, flat)]), parameters, name)
    return method.combine((0, flat), parameters, prepared, name).reshape(arrays[0].shape)


def _check_leaves(leaves, names) -> None:
    first = leaves[0]
    problems = []
    for tree, name in zip(leaves[1:], names[1:], strict=True):
        problems += [f"{leaf} is only in {names[0]}" for leaf in first.keys() - tree.keys()]
        problems += [f"{leaf} is only in {name}" for leaf in tree.keys() - first.keys()]
        problems += [
            f"{leaf} is {tuple(first[leaf].shape)} in {names[0]}, {tuple(tree[leaf].shape)} in {name}"
            for leaf in first.keys() & tree.keys()
            if first[leaf].shape != tree[leaf].shape
        ]
    if problems:
        raise UserError(f"the sources are not of one shape: {'; '.join(sorted(problems))}")
