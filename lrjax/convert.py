"""Converts a checkpoint: `python -m lrjax.convert SOURCE DEST [--to=hf|orbax] [--dtype=stored|float32|...]`.

SOURCE is what `lrjax.load` takes. A Hugging Face directory or GGUF file becomes a Hugging Face directory tensor by
tensor, and a call that was stopped goes on after the shards it finished; an Orbax model is written in one go, and a
call that was stopped begins anew. DEST appears whole or not at all: until then the work is in DEST.partial. A mistake
ends with one line on standard error and exit code 2.
"""

import contextlib
import os
import pathlib
import shutil

import jax.numpy as jnp
from rich import progress as rich_progress

from lrjax.checkpoints import families, gguf, huggingface, loading, orbax
from lrjax.checkpoints.card import model_card
from lrjax.checkpoints.tensors import Stored, scatter
from lrjax.command import ProgramFlags, run_program
from lrjax.data.generation import read_generation
from lrjax.data.tokenizers import load_tokenizer
from lrjax.errors import UserError

DTYPES = ("stored", "float32", "bfloat16", "float16")

_FLAGS = ProgramFlags()
_TO = _FLAGS.DEFINE_enum("to", "hf", ("hf", "orbax"), "What to write.")
_DTYPE = _FLAGS.DEFINE_enum("dtype", "stored", DTYPES, "Of the tensors; stored: as they are.")


def convert(source, dest, to: str = "hf", dtype: str = "stored", progress=None) -> None:
    """Writes the checkpoint `source` as `dest`.

    Args:
        to: "hf" or "orbax".
        dtype: of the tensors, or "stored" (a GGUF's are float32 then).
        progress: called with (bytes done, bytes in all).

    Raises:
        UserError: nothing readable at the source, something at the destination, a config that the family's
            config.json cannot express.
    """
    dest = pathlib.Path(dest)
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise UserError(f"{dest}: exists and is not empty; convert to a new directory")
    if str(source) == "smollm2":
        source = gguf.packaged_smollm2()
    partial = dest.with_name(dest.name + ".partial")
    if to == "orbax":
        config, params, tokenizer = loading.load(source, dtype=dtype, progress=progress)
        shutil.rmtree(partial, ignore_errors=True)
        orbax.save_model(partial, config, params, about={"converted_from": str(source)})
        if tokenizer is not None:
            load_tokenizer(tokenizer).save(partial / "tokenizer")
        os.replace(partial, dest)
        return
    with _open(pathlib.Path(source)) as (config, stored, tokenizer):
        if dtype != "stored":
            stored = {slot: _cast(tensor, jnp.dtype(dtype)) for slot, tensor in stored.items()}
        kinds = {str(tensor.dtype) for tensor in stored.values() if len(tensor.shape) == 2}
        raw = families.write_config(config, sorted(kinds)[0])
        path = pathlib.Path(source)
        huggingface.write_model(
            dest, config, raw, stored, tokenizer, card=_card(config, path), progress=progress,
            generation=read_generation(path) if _is_hf(path) else None,
            source={"files": _fingerprint(path), "dtype": dtype},
        )  # fmt: skip


def _is_hf(path: pathlib.Path) -> bool:
    return (path / "config.json").is_file() and not (path / "checkpoints").is_dir()


def _card(config, path: pathlib.Path) -> str:
    """A model's own card goes along with it; one without gets one."""
    own = path / "README.md"
    if _is_hf(path) and own.is_file():
        return own.read_text(encoding="utf-8")
    return model_card(config, path)


@contextlib.contextmanager
def _open(path: pathlib.Path):
    """(config, stored tensors, tokenizer) of any source, read when asked for where the format lets it."""
    if path.suffix == ".gguf":
        yield (*gguf.open_model(path), path)
    elif _is_hf(path):
        with huggingface.open_model(path) as (config, stored):
            has = any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
            yield config, stored, path if has else None
    else:
        config, params, tokenizer = loading.load(path, dtype="stored")
        yield config, scatter(config, params), tokenizer


def _cast(tensor: Stored, dtype) -> Stored:
    return Stored(tensor.shape, dtype, lambda index: tensor.read(index).astype(dtype))


def _fingerprint(source) -> list:
    """Names, sizes and times of the source's files: shards of another source are not gone on with."""
    path = pathlib.Path(source).absolute()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def main(argv) -> None:
    if len(argv) != 3:
        raise UserError("needed: SOURCE DEST; see --help")
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns) as bar:
        task = bar.add_task(pathlib.Path(argv[2]).name, total=None)
        convert(
            argv[1], argv[2], _TO.value, _DTYPE.value,
            lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip


if __name__ == "__main__":
    run_program(main, _FLAGS)
