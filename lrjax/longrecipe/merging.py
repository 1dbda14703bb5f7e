"""Merging: the weighted average of models of one shape (LongRecipe: half the base, half the replayed model).

    merge({"base": 0.5, "extended": 0.5}, out="merged", rope_from="extended")
    params = merge_trees([(0.5, params_base), (0.5, params_extended)])
    python -m lrjax.merge base extended --weights=.5,.5 --rope_from=extended --out=merged

Leaves are averaged in float32, one after the other, and cast at the end to the dtype of the first source; a weight
of 1 gives that source bit for bit.
"""

import dataclasses
import math
import pathlib
import shutil
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from lrjax.checkpoints import orbax
from lrjax.errors import UserError
from lrjax.models.llama import LlamaConfig

METHODS = ("linear",)
# What extension changes of a config: the result carries these from one source, which the caller names.
_WINDOW_FIELDS = ("rope_theta", "rope_scaling", "max_position_embeddings")
# How a model is computed, not what it is.
_FREE_FIELDS = ("dtype", "remat", "attention")


def merge(sources: Mapping, out, method: str = "linear", *, rope_from=None) -> None:
    """Merges Orbax models and writes the result as one.

    Args:
        sources: path of a model directory -> its weight, from 0 to 1 and 1 in all.
        out: directory to write; none of the sources.
        method: one of `METHODS`.
        rope_from: the source (path as in `sources`) whose RoPE base and window the result carries; needed when
            they differ. The result has that source's config and tokenizer, or else the first one's.

    Raises:
        UserError: a source that is no model or does not fit the others (every difference named), values that
            are not finite, weights that do not sum to 1, an unknown method or rope_from.
    """
    if method not in METHODS:
        raise UserError(f"merge method {method!r}; allowed: {', '.join(METHODS)}")
    weights = {pathlib.Path(path): weight for path, weight in sources.items()}
    names = [str(path) for path in weights]
    if len(weights) < len(sources):
        raise UserError(f"merge sources {', '.join(map(str, sources))}: one of them is there twice")
    _check_weights(names, list(weights.values()))
    if rope_from is not None and pathlib.Path(rope_from) not in weights:
        raise UserError(
            f"rope_from {str(rope_from)!r} is not a source; allowed: {', '.join(names)}"
        )
    if pathlib.Path(out).absolute() in [path.absolute() for path in weights]:
        raise UserError(f"merge out {str(out)!r} is one of the sources; choose another directory")
    carrier = next(iter(weights)) if rope_from is None else pathlib.Path(rope_from)

    configs = {path: orbax.load_config(path) for path in weights}
    _check_configs(configs, rope_from)
    trees = [(weight, orbax.load_model(path)[1]) for path, weight in weights.items()]
    params = merge_trees(trees, names)
    orbax.save_model(
        out,
        configs[carrier],
        params,
        about={
            "merged": dict(zip(names, weights.values(), strict=True)),
            "rope_from": str(carrier),
        },
    )
    if (carrier / "tokenizer").is_dir():
        shutil.copytree(carrier / "tokenizer", pathlib.Path(out) / "tokenizer", dirs_exist_ok=True)


def merge_trees(weighted: Sequence[tuple[float, dict]], names: Sequence[str] | None = None) -> dict:
    """The weighted average of parameter trees.

    Args:
        weighted: (weight, params) pairs; the weights from 0 to 1 and 1 in all.
        names: what errors call the trees; default "source 0", "source 1", ...

    Raises:
        UserError: leaves that are missing or of another shape, values that are not finite, bad weights.
    """
    names = names or [f"source {index}" for index in range(len(weighted))]
    weights = [weight for weight, _ in weighted]
    _check_weights(names, weights)
    leaves = [
        {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
        for flat in (jax.tree.leaves_with_path(params) for _, params in weighted)
    ]
    _check_leaves(leaves, names)
    merged = [_average(weights, [tree[leaf] for tree in leaves], leaf, names) for leaf in leaves[0]]
    return jax.tree.unflatten(jax.tree.structure(weighted[0][1]), merged)


def _average(weights, values, leaf, names):
    for value, name in zip(values, names, strict=True):
        if not bool(jnp.isfinite(value).all()):
            raise UserError(f"{name}: {leaf} holds NaN or infinite values; it cannot be merged")
    # Terms of weight 0 are left out: even -0.0 + 0.0 would change a bit.
    terms = [
        weight * jnp.asarray(value, jnp.float32)
        for weight, value in zip(weights, values, strict=True)
        if weight
    ]
    return sum(terms[1:], start=terms[0]).astype(values[0].dtype)


def _check_weights(names, weights) -> None:
    if not weights:
        raise UserError("merge: no sources; at least one is needed")
    for name, weight in zip(names, weights, strict=True):
        if not 0 <= weight <= 1:  # NaN too
            raise UserError(f"merge weight of {name} is {weight}; allowed is 0 to 1")
    if not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise UserError(
            f"merge weights {list(weights)} sum to {sum(weights):g}; they must sum to 1"
        )


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


def _check_configs(configs: Mapping[pathlib.Path, LlamaConfig], rope_from) -> None:
    (first_path, first), *others = configs.items()
    problems = []
    for path, config in others:
        for field in dataclasses.fields(LlamaConfig):
            ours, theirs = getattr(first, field.name), getattr(config, field.name)
            if ours == theirs or field.name in _FREE_FIELDS:
                continue
            if field.name not in _WINDOW_FIELDS:
                remedy = ""
            elif rope_from is None:
                remedy = " (name the source to take it from with rope_from)"
            else:
                continue
            problems.append(f"{field.name} is {ours} in {first_path}, {theirs} in {path}{remedy}")
    if problems:
        raise UserError(f"the sources cannot be merged: {'; '.join(problems)}")
