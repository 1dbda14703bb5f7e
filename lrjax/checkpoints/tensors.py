"""Between the tensors of other people's files and our parameter tree.

A Hugging Face or GGUF file stores one matrix per layer and kind as [out, in], heads not told apart; the
tree stacks the layers of a kind and splits the heads: q is [layers, D, N, H] (see `models.llama`). A format is
a table from leaf ("layers/q") to name in the file ("model.layers.{}.self_attn.q_proj.weight"); this module
does the rest, in both directions and for every format.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from lrjax.errors import UserError
from lrjax.models import llama

_KEPT = {"embedding"}  # stored as [V, D] everywhere, for it is looked up, not multiplied
_INPUT_AXES = {"layers/o": 2}  # o takes heads and head width; every other matrix has one input axis


class Stored(NamedTuple):
    """A tensor in a file: its shape as stored, and how to read it (any float dtype)."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class _Slot(NamedTuple):
    """Where a stored tensor goes: a leaf, its layer (None for a leaf without layers), the layer's shape."""

    leaf: str
    layer: int | None
    shape: tuple[int, ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        if len(self.shape) == 1 or self.leaf in _KEPT:
            return self.shape
        inputs = _INPUT_AXES.get(self.leaf, 1)
        return math.prod(self.shape[inputs:]), math.prod(self.shape[:inputs])


def gather(
    config: llama.LlamaConfig, names: Mapping[str, str], stored: Mapping[str, Stored], where: str
) -> dict:
    """The parameter tree, float32 numpy, read tensor by tensor.

    Args:
        config: the model the file says it holds.
        names: leaf -> name in the file, with {} for the layer.
        stored: the file's tensors by name.
        where: the file or directory, for the message.

    Raises:
        UserError: naming every tensor that is missing, misshapen or not part of the model.
    """
    slots = _slots(config, names)
    problems = [f"{name} is missing" for name in slots if name not in stored]
    problems += [f"{name} is not part of the model" for name in stored if name not in slots]
    problems += [
        f"{name} has shape {list(stored[name].shape)} instead of {list(slot.stored_shape)}"
        for name, slot in slots.items()
        if name in stored and tuple(stored[name].shape) != slot.stored_shape
    ]
    if problems:
        raise UserError(f"{where}: the tensors do not fit the config: {'; '.join(problems)}")

    flat = {leaf: np.empty(shape, np.float32) for leaf, shape in _leaf_shapes(config).items()}
    for name, slot in slots.items():
        value = stored[name].read()
        if slot.stored_shape != slot.shape:
            value = value.T.reshape(slot.shape)
        flat[slot.leaf][... if slot.layer is None else slot.layer] = value
    return _nest(flat)


def scatter(
    config: llama.LlamaConfig, names: Mapping[str, str], params: Mapping
) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of `gather`: (name, tensor as stored) one by one, in the dtypes of the tree.

    Raises:
        UserError: naming the leaves that the config has and the tree has not, the other way round, or
            in another shape.
    """
    flat = {leaf: np.asarray(value) for leaf, value in _flatten(params).items()}
    expected = _leaf_shapes(config)
    found = {leaf: value.shape for leaf, value in flat.items()}
    if found != expected:
        wrong = sorted(leaf for leaf in found | expected if found.get(leaf) != expected.get(leaf))
        raise UserError(
            "the parameters do not fit the config: "
            + "; ".join(f"{leaf} is {found.get(leaf)}, not {expected.get(leaf)}" for leaf in wrong)
        )
    for name, slot in _slots(config, names).items():
        value = flat[slot.leaf] if slot.layer is None else flat[slot.leaf][slot.layer]
        if slot.stored_shape != slot.shape:
            value = value.reshape(slot.stored_shape[::-1]).T
        yield name, np.ascontiguousarray(value)


def _slots(config: llama.LlamaConfig, names: Mapping[str, str]) -> dict[str, _Slot]:
    slots = {}
    for leaf, shape in _leaf_shapes(config).items():
        if leaf.startswith("layers/"):
            for layer in range(shape[0]):
                slots[names[leaf].format(layer)] = _Slot(leaf, layer, shape[1:])
        else:
            slots[names[leaf]] = _Slot(leaf, None, shape)
    return slots


def _leaf_shapes(config: llama.LlamaConfig) -> dict[str, tuple[int, ...]]:
    return {leaf: spec.shape for leaf, spec in _flatten(llama.abstract_params(config)).items()}


def _flatten(tree: Mapping) -> dict:
    leaves = jax.tree.leaves_with_path(tree)
    return {"/".join(key.key for key in path): value for path, value in leaves}


def _nest(flat: Mapping) -> dict:
    tree = {}
    for leaf, value in flat.items():
        *parents, last = leaf.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree
