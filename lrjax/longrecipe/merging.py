"""Merging: several checkpoints of one shape become one (LongRecipe: half the base, half the replayed model).

    merge({"base": 0.5, "extended": 0.5}, out="merged", rope_from="extended")
    merge({"math": 1.0, "code": 1.0}, out="merged", method="ties", base="base", density=0.3)

Hugging Face directories and lrjax models are read, merged and written block by block: memory does not depend on
their size. The result is built beside its place and renamed, so a kill at any moment leaves the old or the new; the
same call goes on with what a stopped one has done. The methods are in `merge_methods.py`, settings and mergekit's
YAML in `merge_settings.py`, what makes checkpoints fit in `merge_checks.py`; trees in memory are merged by
`merge_trees.py`.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from absl import logging

import lrjax
from lrjax.checkpoints import streaming
from lrjax.checkpoints.streaming import DTYPES, Tensor
from lrjax.errors import UserError
from lrjax.longrecipe import merge_checks
from lrjax.longrecipe.atomic import replace_directory
from lrjax.longrecipe.merge_methods import METHODS
from lrjax.longrecipe.merge_settings import MergeRecipe, layer_of

BLOCK = 1 << 17  # elements: what a method works on stays in the processor's cache
RECORD = "merge.json"  # in the result: where it comes from
_PLAN, _DONE, _LOCK = "merge-plan.json", "merge-done", "merge-lock"  # in the directory being built


class Share(NamedTuple):
    """Which part of the tensors this process merges, and how it waits for the others. One process: all of them."""

    index: int = 0
    count: int = 1
    barrier: Callable[[str], None] = lambda name: None


def merge(
    sources: Mapping,
    out,
    method: str = "linear",
    *,
    base=None,
    density=1.0,
    scale=1.0,
    normalize: bool | None = None,
    strict_sum: bool = True,
    rescale: bool = True,
    seed: int = 0,
    dtype: str | None = None,
    rope_from=None,
    tokenizer_from=None,
    **how,
) -> dict:
    """Merges checkpoints and writes the result in their format.

    Args:
        sources: path of a Hugging Face directory or lrjax model -> its weight. A weight, like density and scale,
            may be a list over the layers or filters with values (see `merge_settings`).
        out: directory to write.
        method: one of `merge_methods.METHODS`. slerp takes two sources with weights 1 - t and t.
        base: the model that task arithmetic, TIES and DARE take differences to.
        density, scale, normalize, strict_sum, rescale, seed, dtype: see `merge_settings.MergeRecipe`.
        rope_from: the source whose RoPE and window the result carries; needed when they differ. The result has that
            source's config, or else the first one's.
        tokenizer_from: the same for the tokenizer.
        **how: overwrite, threads, hashes, sync, share; see `run`.

    Returns:
        The record that lies in the result as merge.json.

    Raises:
        UserError: sources that are no models, not whole or do not fit (every difference named), values that are not
            finite, bad weights, an output that exists, a full disk.
    """

    def path(value):
        return None if value is None else str(value)

    if isinstance(density, Mapping):
        density = {str(source): value for source, value in density.items()}
    recipe = MergeRecipe(
        method, dict(sources), base=path(base), density=density, scale=scale, normalize=normalize,
        strict_sum=strict_sum, rescale=rescale, seed=seed, dtype=dtype, rope_from=path(rope_from),
        tokenizer_from=path(tokenizer_from),
    )  # fmt: skip
    return run(recipe, out, **how)


def run(
    recipe: MergeRecipe,
    out,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    hashes: bool = True,
    sync: bool = False,
    share: Share = Share(),
) -> dict:
    """Merges as a recipe says; returns the record of the merge.

    Args:
        overwrite: replace what is at `out`, in one step, once the new is whole.
        threads: tensors merged at once; default the processors there are, at most 8.
        hashes: record the sha256 of every source file (they are read once more for it, at the same time).
        sync: wait for the disk, so that the result outlives a power failure right after.
        share: on several processes with one file system, this one's share of the tensors.

    Raises: as `merge`.
    """
    out = pathlib.Path(out).absolute()
    _check_out(out, recipe.sources, overwrite)
    with contextlib.ExitStack() as stack:
        sources = []
        for path in recipe.sources:
            sources.append(streaming.open_source(path))
            stack.callback(sources[-1].close)
        notes = merge_checks.check(sources, recipe.rope_from, recipe.tokenizer_from)
        for note in notes:
            logging.info("merge: %s", note)
        names = merge_checks.tensor_names(sources)
        _warn_of_sums(recipe, names)
        job = _Job(recipe, sources, names, threads or min(os.cpu_count() or 1, 8), share)
        plan = job.plan()
        partial = out.with_name(out.name + ".partial")
        if share.index == 0:
            stack.enter_context(_locked(partial))
            stack.enter_context(_removed_on_mistake(partial))
            _claim(partial, plan)
            job.open_output(partial)
        share.barrier("merge-begin")
        if share.index:
            job.open_output(partial)
        hashing = _Hashing(sources if hashes and share.index == 0 else [])
        stack.callback(hashing.stop)
        job.merge_tensors(partial)
        if sync:
            job.output.sync()
        share.barrier("merge-end")
        record = {
            "format": "lrjax merge", "lrjax": lrjax.__version__, **plan["recipe"],
            "sources": [
                {"path": str(source.path.absolute()), "files": files}
                for source, files in zip(sources, plan["files"], strict=True)
            ],
            "differences": notes,
        }  # fmt: skip
        if share.index == 0:
            for entry, found in zip(record["sources"], hashing.result(), strict=False):
                entry["sha256"] = found
            for source, before in zip(sources, plan["files"], strict=True):
                if source.fingerprint() != before:
                    raise UserError(
                        f"{source.path}: was written to while it was merged; merge again"
                    )
            _finish(partial, out, recipe, sources, job, record)
        share.barrier("merge-done")
    return record


def _check_out(out: pathlib.Path, sources, overwrite: bool) -> None:
    if out in [pathlib.Path(path).absolute() for path in sources]:
        raise UserError(f"merge out {str(out)!r} is one of the sources; choose another directory")
    if not out.parent.is_dir() and out.parent.exists():
        raise UserError(f"merge out {out}: {out.parent} is no directory")
    if out.exists() and not out.is_dir():
        raise UserError(f"merge out {out}: a file is there; choose another directory")
    if out.exists() and not overwrite and any(out.iterdir()):
        raise UserError(f"merge out {out}: exists; choose another directory, or overwrite it")


def _warn_of_sums(recipe: MergeRecipe, names) -> None:
    if recipe.method == "linear" and not recipe.strict_sum and not recipe.normalize:
        sums = {round(sum(recipe.parameters(name, _num_layers(names)).weight), 6) for name in names}
        if sums != {1.0}:
            logging.warning("merge: the weights sum to %s, not to 1", sorted(sums))


def _num_layers(names) -> int:
    return 1 + max((layer for name in names if (layer := layer_of(name)) is not None), default=0)


# ------------------------------------------------------------------------------------------- tensors


class _Job:
    """One merge: what is read, what is written, and the tensors in between."""

    def __init__(self, recipe, sources, names, threads, share):
        self.recipe, self.sources, self.threads, self.share = recipe, sources, threads, share
        layers = _num_layers(names)
        # All settings are read before the first byte is written.
        self.parameters = {name: recipe.parameters(name, layers) for name in names}
        first = sources[0].tensors
        dtype = next((d for d in DTYPES.values() if d.name == recipe.dtype), None)
        self.tensors = {
            name: Tensor(first[name].shape, dtype or first[name].dtype) for name in names
        }
        if sources[0].kind == "orbax":
            # A leaf has one dtype, and its layers lie side by side.
            self.layout = streaming.orbax_layout(self.tensors)
        else:
            self.layout = streaming.safetensors_layout(self._files())

    def _files(self) -> dict[str, dict[str, Tensor]]:
        """The result lies in files as its first source does, so that both are read and written in order."""
        files: dict[str, dict[str, Tensor]] = {}
        places = self.sources[0].places
        for name in sorted(self.tensors, key=lambda name: (str(places[name][0]), places[name][1])):
            files.setdefault(places[name][0].name, {})[name] = self.tensors[name]
        return files

    def plan(self) -> dict:
        """What identifies a merge: its work may be gone on with where all of this is the same."""
        recipe = dataclasses.asdict(self.recipe)
        files = [source.fingerprint() for source in self.sources]
        content = {"recipe": recipe, "files": files, "boot": _boot(), "tensors": len(self.tensors)}
        return json.loads(json.dumps(content))

    def open_output(self, partial: pathlib.Path) -> None:
        self.output = streaming.Output(partial, self.layout)

    def merge_tensors(self, partial: pathlib.Path) -> None:
        """Merges this process's share of what is not done yet; the journal says what is."""
        done = set()
        for journal in partial.glob(f"{_DONE}-*"):
            # A line without its end was being written when the process was stopped.
            done |= {line for line in journal.read_text().split("\n")[:-1]}
        mine = list(self.layout.places)[self.share.index :: self.share.count]
        todo = [name for name in mine if name not in done]
        if len(todo) < len(mine):
            logging.info(
                "merge: going on, %d of %d tensors are done", len(mine) - len(todo), len(mine)
            )
        waiting, lock, stopped = collections.deque(todo), threading.Lock(), threading.Event()
        with open(partial / f"{_DONE}-{self.share.index}", "a", buffering=1) as journal:

            def work():
                while not stopped.is_set():
                    with lock:
                        if not waiting:
                            return
                        name = waiting.popleft()
                    try:
                        self._merge_tensor(name)
                    except BaseException:
                        stopped.set()
                        raise
                    with lock:
                        journal.write(name + "\n")

            with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
                for future in [pool.submit(work) for _ in range(self.threads)]:
                    future.result()

    def _merge_tensor(self, name: str) -> None:
        method, parameters = METHODS[self.recipe.method], self.parameters[name]
        size, dtype = self.tensors[name].size, self.tensors[name].dtype

        def blocks():
            for start in range(0, size, BLOCK):
                stop = min(start + BLOCK, size)
                yield start, [self._read(source, name, start, stop) for source in self.sources]

        prepared = method.prepare(blocks, parameters, name)
        for block in blocks():
            with np.errstate(over="ignore"):
                merged = method.combine(block, parameters, prepared, name).astype(dtype)
            if not np.isfinite(merged).all():
                raise UserError(
                    f"{name}: the merged values are too large for {dtype.name}; set dtype"
                )
            self.output.write(name, block[0], merged)

    def _read(self, source, name, start, stop) -> np.ndarray:
        block = source.read(name, start, stop).astype(np.float32, copy=False)
        if not np.isfinite(block).all():
            raise UserError(
                f"{source.path}: {name} holds NaN or infinite values; it cannot be merged"
            )
        return block


class _Hashing:
    """sha256 of the sources in a thread of its own, while they are merged."""

    def __init__(self, sources):
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._futures = [self._pool.submit(source.sha256) for source in sources]

    def result(self) -> list[dict]:
        return [future.result() for future in self._futures]

    def stop(self) -> None:
        self._pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------- the directory


@contextlib.contextmanager
def _locked(partial: pathlib.Path):
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
def _removed_on_mistake(partial: pathlib.Path):
    """What cannot be merged leaves nothing behind; what is stopped does, to go on with."""
    try:
        yield
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _boot() -> str:
    """What changes when the machine starts anew: work that only its memory held is not gone on with."""
    file = pathlib.Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.is_file() else f"process {os.getpid()}"


def _claim(partial: pathlib.Path, plan: dict) -> None:
    """Keeps what an earlier call of the same merge left there, and removes everything else."""
    file = partial / _PLAN
    if file.is_file() and file.read_text() == json.dumps(plan, indent=2) + "\n":
        return
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()
    streaming.write_json(file, plan)


def _finish(partial, out, recipe, sources, job, record) -> None:
    """Config, tokenizer and record into the directory; then it takes its place."""
    paths = recipe.sources
    carrier = sources[paths.index(recipe.rope_from) if recipe.rope_from else 0]
    tokenizer = sources[paths.index(recipe.tokenizer_from)] if recipe.tokenizer_from else carrier
    dtype = next(iter(job.tensors.values())).dtype.name
    if carrier.kind == "orbax":
        _orbax_metadata(partial, job.tensors)
        if tokenizer_folder := _own_tokenizer(tokenizer, out):
            shutil.copytree(tokenizer_folder, partial / "tokenizer", dirs_exist_ok=True)
        content = {"format": "lrjax", "config": carrier.config, "about": {"merged": recipe.weight}}
        content["about"] |= {"method": recipe.method, "rope_from": str(carrier.path)}
        streaming.write_json(partial / "model.json", content)
    else:
        config = {**carrier.config}
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = dtype
        streaming.write_json(partial / "config.json", config)
        _copy_beside(carrier.path, tokenizer.path, partial)
        if len(job.layout.files) > 1:
            index = {
                "metadata": {"total_size": sum(tensor.nbytes for tensor in job.tensors.values())},
                "weight_map": {name: file for name, (file, _) in job.layout.places.items()},
            }
            streaming.write_json(partial / "model.safetensors.index.json", index)
    streaming.write_json(partial / RECORD, record)
    for path in [partial / _PLAN, *partial.glob(f"{_DONE}-*"), partial / _LOCK]:
        path.unlink(missing_ok=True)
    replace_directory(partial, out)


def _orbax_metadata(partial: pathlib.Path, tensors) -> None:
    """Orbax's own description of the arrays, which it writes for a tree of the same names."""
    import orbax.checkpoint as ocp

    tree: dict = {}
    for name, tensor in tensors.items():
        leaf, layer = streaming.split_layer(name)
        *parents, last = leaf.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = np.zeros([1] * (len(tensor.shape) + (layer is not None)), tensor.dtype)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
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
