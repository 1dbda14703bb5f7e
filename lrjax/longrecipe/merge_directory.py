"""The directory that a merge builds beside its place, and how it takes that place: whole, or not at all."""

import contextlib
import ctypes
import errno
import json
import os
import pathlib
import shutil

import numpy as np

from lrjax.checkpoints.streamed_output import split_layer
from lrjax.checkpoints.streaming import write_json
from lrjax.errors import UserError
from lrjax.longrecipe import merge_checks

RECORD = "merge.json"  # in the result: where it comes from
JOURNAL = "merge-done"  # while it is built: the tensors that are whole, a file for each process
_PLAN, _LOCK = "merge-plan.json", "merge-lock"
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100


@contextlib.contextmanager
def locked(partial: pathlib.Path):
    """One merge at a time may build a directory."""
    import fcntl

    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / _LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{partial}: another merge is writing there") from error
        yield


@contextlib.contextmanager
def removed_on_mistake(partial: pathlib.Path):
    """What cannot be merged leaves nothing behind; what is stopped does, to go on with."""
    try:
        yield
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def boot() -> str:
    """What changes when the machine starts anew: work that only its memory held is not gone on with."""
    file = pathlib.Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.is_file() else f"process {os.getpid()}"


def claim(partial: pathlib.Path, plan: dict) -> None:
    """Keeps what an earlier call of the same merge left there, and removes everything else."""
    file = partial / _PLAN
    if file.is_file() and file.read_text() == json.dumps(plan, indent=2) + "\n":
        return
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()
    write_json(file, plan)


def finish(partial, out, recipe, sources, tensors, layout, record) -> None:
    """Config, tokenizer and record into the directory; then it takes its place."""
    paths = recipe.sources
    carrier = sources[paths.index(recipe.rope_from) if recipe.rope_from else 0]
    tokenizer = sources[paths.index(recipe.tokenizer_from)] if recipe.tokenizer_from else carrier
    dtype = next(iter(tensors.values())).dtype.name
    if carrier.kind == "orbax":
        _orbax_metadata(partial, tensors)
        if tokenizer_folder := _own_tokenizer(tokenizer, out):
            shutil.copytree(tokenizer_folder, partial / "tokenizer", dirs_exist_ok=True)
        content = {"format": "lrjax", "config": carrier.config, "about": {"merged": recipe.weight}}
        content["about"] |= {"method": recipe.method, "rope_from": str(carrier.path)}
        write_json(partial / "model.json", content)
    else:
        config = {**carrier.config}
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = dtype
        write_json(partial / "config.json", config)
        _copy_beside(carrier.path, tokenizer.path, partial)
        if len(layout.files) > 1:
            index = {
                "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
                "weight_map": {name: file for name, (file, _) in layout.places.items()},
            }
            write_json(partial / "model.safetensors.index.json", index)
    write_json(partial / RECORD, record)
    for path in [partial / _PLAN, *partial.glob(f"{JOURNAL}-*"), partial / _LOCK]:
        path.unlink(missing_ok=True)
    _replace(partial, out)


def _orbax_metadata(partial: pathlib.Path, tensors) -> None:
    """Orbax's own description of the arrays, which it writes for a tree of the same names.

    One process writes it; Orbax is told, or it would wait for the others of the run.
    """
    import jax
    import orbax.checkpoint as ocp

    tree: dict = {}
    for name, tensor in tensors.items():
        leaf, layer = split_layer(name)
        *parents, last = leaf.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = np.zeros([1] * (len(tensor.shape) + (layer is not None)), tensor.dtype)
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix="merge"
    )
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        checkpointer.save(partial / "names", args=ocp.args.PyTreeSave(tree), force=True)
    for file in (partial / "names").iterdir():
        if file.is_file():
            os.replace(file, partial / "params" / file.name)
    shutil.rmtree(partial / "names")


def _own_tokenizer(source, out: pathlib.Path):
    """The folder to copy, unless the result lies in a run that has the tokenizer already."""
    folder = merge_checks.tokenizer_folder(source)
    return None if folder == out.parent.parent / "tokenizer" else folder


def _copy_beside(carrier: pathlib.Path, tokenizer: pathlib.Path, partial: pathlib.Path) -> None:
    """The small files of a Hugging Face directory: generation settings of one source, tokenizer of another."""
    names = (
        "tokenizer",
        "special_tokens_map",
        "added_tokens",
        "vocab",
        "merges",
        "chat_template",
        "spiece",
    )
    for file in sorted(tokenizer.iterdir()):
        if file.is_file() and file.name.startswith(names):
            shutil.copyfile(file, partial / file.name)
    if (carrier / "generation_config.json").is_file():
        shutil.copyfile(carrier / "generation_config.json", partial / "generation_config.json")


def _replace(new: pathlib.Path, place: pathlib.Path) -> None:
    """`new` becomes `place`; a directory that is there is exchanged with it and then removed.

    Raises:
        UserError: something is at `place` and this system cannot exchange directories.
    """
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        os.replace(new, place)
        return
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    code = errno.ENOSYS
    if rename is not None:
        arguments = (_AT_FDCWD, bytes(new), _AT_FDCWD, bytes(place), _RENAME_EXCHANGE)
        code = 0 if rename(*arguments) == 0 else ctypes.get_errno()
    if code:
        raise UserError(
            f"{place}: cannot be replaced in one step here ({os.strerror(code)}); remove it and run again"
        )
    shutil.rmtree(new)
