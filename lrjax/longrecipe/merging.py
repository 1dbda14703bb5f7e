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
import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from absl import logging

import lrjax
from lrjax.checkpoints import streamed_output, streaming
from lrjax.checkpoints.streaming import DTYPES, Tensor
from lrjax.errors import UserError
from lrjax.longrecipe import merge_checks, merge_directory
from lrjax.longrecipe.merge_methods import METHODS
from lrjax.longrecipe.merge_settings import MergeRecipe, layer_of

# Elements that are read and written at a time, and those that a method works on: they stay in the processor's cache,
# and arrays of 64 kB are below what malloc asks the system for anew, whose clearing costs ten times the arithmetic.
CHUNK, BLOCK = 1 << 18, 1 << 14


class Share(NamedTuple):
    """Which part of the tensors this process merges, and how it waits for the others. One process: all of them."""

    index: int = 0
    count: int = 1
    barrier: Callable[[str], None] = lambda name: None


_ALONE = Share()


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
    share: Share = _ALONE,
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
            stack.enter_context(merge_directory.locked(partial))
            stack.enter_context(merge_directory.removed_on_mistake(partial))
            merge_directory.claim(partial, plan)
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
            merge_directory.finish(partial, out, recipe, sources, job.tensors, job.layout, record)
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
            self.layout = streamed_output.orbax_layout(self.tensors)
        else:
            self.layout = streamed_output.safetensors_layout(self._files())

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
        content = {
            "recipe": recipe,
            "files": files,
            "boot": merge_directory.boot(),
            "lrjax": lrjax.__version__,
            "tensors": len(self.tensors),
        }
        return json.loads(json.dumps(content))

    def open_output(self, partial: pathlib.Path) -> None:
        self.output = streamed_output.Output(partial, self.layout)

    def merge_tensors(self, partial: pathlib.Path) -> None:
        """Merges this process's share of what is not done yet; the journal says what is."""
        done = set()
        for journal in partial.glob(f"{merge_directory.JOURNAL}-*"):
            # A line without its end was being written when the process was stopped.
            done |= {line for line in journal.read_text().split("\n")[:-1]}
        mine = list(self.layout.places)[self.share.index :: self.share.count]
        todo = [name for name in mine if name not in done]
        if len(todo) < len(mine):
            logging.info(
                "merge: going on, %d of %d tensors are done", len(mine) - len(todo), len(mine)
            )
        waiting, lock, stopped = collections.deque(todo), threading.Lock(), threading.Event()
        with open(
            partial / f"{merge_directory.JOURNAL}-{self.share.index}", "a", buffering=1
        ) as journal:

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

        def blocks(sample=False):
            for start in range(0, size, CHUNK):
                stop = min(start + (BLOCK if sample else CHUNK), size)
                arrays = [source.read(name, start, stop) for source in self.sources]
                for at in range(0, stop - start, BLOCK):
                    yield (
                        start + at,
                        [x[at : at + BLOCK].astype(np.float32, copy=False) for x in arrays],
                    )

        prepared = method.prepare(blocks, parameters, name)
        written = np.empty(min(CHUNK, size), dtype)
        for start, block in blocks():
            self._check_finite(name, block)
            exact = method.combine((start, block), parameters, prepared, name)
            at = start % CHUNK
            merged = written[at : at + len(exact)]
            with np.errstate(over="ignore"):
                merged[:] = exact
            if not np.isfinite(merged if dtype == np.float16 else exact).all():
                raise UserError(
                    f"{name}: the merged values are too large for {dtype.name}; set dtype"
                )
            if start + len(exact) in (size, start - at + CHUNK):
                self.output.write(name, start - at, written[: at + len(exact)])

    def _check_finite(self, name, block) -> None:
        for source, array in zip(self.sources, block, strict=True):
            if not np.isfinite(array).all():
                raise UserError(
                    f"{source.path}: {name} holds NaN or infinite values; it cannot be merged"
                )


class _Hashing:
    """sha256 of the sources in a thread of its own, while they are merged."""

    def __init__(self, sources):
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._futures = [self._pool.submit(source.sha256) for source in sources]

    def result(self) -> list[dict]:
        return [future.result() for future in self._futures]

    def stop(self) -> None:
        self._pool.shutdown(cancel_futures=True)
