"""Orbax checkpoints: finished models, and the state of a run that goes on.

A model is a directory: `params/` (Orbax), `model.json` (the `LlamaConfig` and where it came from; written last,
so its presence says that the model is whole) and, where known, `tokenizer/`.

    save_model("run/checkpoints/base", config, params)
    config, params = load_model("run/checkpoints/base")

The state of a training stage is kept by `StepCheckpoints`: parameters, optimizer state and the global example
counter, saved in the background, the newest readable one restored.
"""

import dataclasses
import json
import os
import pathlib
import shutil

import jax
import orbax.checkpoint as ocp
from absl import logging

from lrjax import sharding
from lrjax.errors import UserError
from lrjax.models.bits import dtype_for_reading
from lrjax.models.llama import LlamaConfig, abstract_params

MODEL_FILE = "model.json"
CHUNK_BYTES = 16 << 20


def is_model(path) -> bool:
    """Whether `path` holds a whole lrjax model."""
    return (pathlib.Path(path) / MODEL_FILE).is_file()


def save_model(path, config: LlamaConfig, params, *, about: dict | None = None) -> None:
    """Writes a model directory; a half-written one at `path` is replaced, a whole one too."""
    path = pathlib.Path(path).absolute()
    if jax.process_index() == 0:
        (path / MODEL_FILE).unlink(missing_ok=True)
        path.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        chunks = jax.tree.map_with_path(_chunks, params)
        checkpointer.save(path / "params", params, save_args=chunks, force=True)
    if jax.process_index() == 0:
        content = {"format": "lrjax", "config": dataclasses.asdict(config), "about": about or {}}
        temporary = path / (MODEL_FILE + ".tmp")
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(temporary, path / MODEL_FILE)
    sharding.barrier(f"saved {path}")


def _chunks(path, leaf) -> ocp.SaveArgs:
    """Chunks of one layer, or of `CHUNK_BYTES` where there are no layers: what a merge has to hold of a leaf."""
    layers = path[0] == jax.tree_util.DictKey("layers")
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if layers else ())


def load_config(path) -> LlamaConfig:
    """The `LlamaConfig` of a model directory."""
    file = pathlib.Path(path) / MODEL_FILE
    if not file.is_file():
        raise UserError(f"{path}: not an lrjax model: it has no {MODEL_FILE}")
    try:
        return LlamaConfig(**json.loads(file.read_text())["config"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a readable model description: {error}") from error


def load_model(path, shardings=None, reading: str | None = None):
    """Reads a model directory: `(LlamaConfig, params)`.

    Args:
        path: a directory written by `save_model`.
        shardings: a tree of shardings for the parameters, or None for the first local device.
        reading: as in `tensors.gather`; without it every array keeps its dtype.

    Raises:
        UserError: no model there, or its arrays are missing, extra or misshapen (all of them named).
    """
    path = pathlib.Path(path).absolute()
    config = load_config(path)
    if shardings is None:
        single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: single, abstract_params(config))
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            metadata = checkpointer.metadata(path / "params").item_metadata
        except (FileNotFoundError, ValueError) as error:
            raise UserError(
                f"{path}/params: unreadable checkpoint: {_first_line(error)}"
            ) from error
        if metadata is None:
            raise UserError(f"{path}/params: unreadable checkpoint: it says nothing of its arrays")
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            _checked(metadata.tree, config, path, reading),
            shardings,
        )
        try:
            return config, checkpointer.restore(path / "params", target)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(
                f"{path}/params: unreadable checkpoint: {_first_line(error)}"
            ) from error


def _checked(stored, config, path, reading):
    """The stored shapes and the dtypes to read as a tree, compared with what the config says."""
    expected = {_name(p): leaf for p, leaf in jax.tree.leaves_with_path(abstract_params(config))}
    found = {
        _name(p): leaf
        for p, leaf in jax.tree.leaves_with_path(stored, is_leaf=lambda x: hasattr(x, "shape"))
    }
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not part of the model" for name in found if name not in expected]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, the config says {tuple(leaf.shape)}"
        for name, leaf in expected.items()
        if name in found and tuple(found[name].shape) != tuple(leaf.shape)
    ]
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")

    def wanted(path, leaf):
        dtype = leaf.dtype
        if reading:
            dtype = dtype_for_reading(path[-1].key, len(leaf.shape), dtype, reading)
        return jax.ShapeDtypeStruct(leaf.shape, dtype)

    return jax.tree.map_with_path(wanted, stored, is_leaf=lambda x: hasattr(x, "shape"))


def _name(path) -> str:
    return "/".join(str(getattr(key, "key", key)) for key in path)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


class StepCheckpoints:
    """The state of a training stage, saved in the background every so many steps.

    Orbax writes into a temporary folder and renames it, so a kill leaves the older steps whole. A newest step
    that is nevertheless unreadable (a full disk, a copy cut short) is passed over, and the log says so.
    """

    def __init__(self, path, keep: int = 2):
        self._path = pathlib.Path(path).absolute()
        self._manager = ocp.CheckpointManager(
            self._path,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True),
        )

    def save(self, step: int, state, next_example: int) -> None:
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave({"next_example": next_example}),
            ),
        )

    def restore_latest(self, abstract_state):
        """`(step, state, next_example)` of the newest readable step, or None when there is none.

        Raises `UserError` when there are steps and none of them can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore()
                    ),
                )
                return step, restored["state"], restored["data"]["next_example"]
            except (FileNotFoundError, ValueError, KeyError, OSError) as error:
                logging.warning(
                    "%s: the checkpoint of step %d is not whole (%s); falling back to the one before",
                    self._path, step, _first_line(error),
                )  # fmt: skip
                self._put_aside(step)
        if steps:
            raise UserError(
                f"{self._path}: none of the checkpoints of steps {sorted(steps)} can be read; "
                "remove the directory to start the stage anew"
            )
        return None

    def _put_aside(self, step: int) -> None:
        """Moves an unreadable step out of the way, to be looked at; the stage will write that step again."""
        if jax.process_index() == 0:
            shutil.move(self._path / str(step), self._path.parent / f"unreadable-step-{step}")
        sharding.barrier(f"put aside {step}")
        self._manager.reload()

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def remove_steps(path) -> None:
    """Deletes the step checkpoints of a stage whose model is saved."""
    if jax.process_index() == 0:
        shutil.rmtree(pathlib.Path(path) / "steps", ignore_errors=True)
    sharding.barrier(f"removed steps of {path}")
