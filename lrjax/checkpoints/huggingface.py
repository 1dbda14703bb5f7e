"""Hugging Face model directories: config.json, safetensors, tokenizer.

    config, params = huggingface.load("dir")
    huggingface.save("new-dir", config, params, tokenizer="dir")    # transformers loads it

Directories on this machine only, and no pickles: weights have to be safetensors. What the architectures are
is in `checkpoints.families`.
"""

import contextlib
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from lrjax.checkpoints import families
from lrjax.checkpoints.streamed_output import Output, safetensors_layout
from lrjax.checkpoints.streaming import SafetensorsSource, Tensor, read_json, write_json
from lrjax.checkpoints.tensors import Slot, Stored, check, gather, scatter, slots
from lrjax.data.generation import GENERATION_FILE
from lrjax.data.tokenizers import load_tokenizer
from lrjax.errors import UserError
from lrjax.models.llama import LlamaConfig

_SHARD_BYTES = 5 * 10**9
_COMPARED_ROWS = 4096
_SOURCE_FILE = "source.json"  # in NAME.partial: what its shards were made of
_TOKENS = ("bos_token_id", "eos_token_id")  # also in config.json


def load(directory: str | Path, **how) -> tuple[LlamaConfig, dict]:
    """A model from a directory with config.json and safetensors, one file or several with an index.

    Args:
        how: dtype, reading, shardings and progress as `tensors.gather` takes them; by default float32 on one device.

    Returns:
        Its config and its parameter tree (see `models.llama`).

    Raises:
        UserError: nothing readable there, an architecture or a setting that is not known (never ignored),
            or tensors that do not fit the config (all of them named).
    """
    with open_model(directory) as (config, stored):
        return config, gather(config, stored, **how)


@contextlib.contextmanager
def open_model(directory: str | Path):
    """(config, every tensor by `Slot`, to be read while the context is open); errors as in `load`."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; models are loaded from local directories")
    raw = read_json(directory / "config.json")
    try:
        config = families.read_config(raw)
    except UserError as error:
        raise UserError(f"{directory / 'config.json'}: {error}") from error
    names, shapes = families.tensor_names(config), slots(config)
    with contextlib.closing(SafetensorsSource(directory)) as source:
        found = {
            name: Stored(*tensor, functools.partial(_mapped, source, name))
            for name, tensor in source.tensors.items()
        }
        expected = {
            name: _joined_shape([shapes[s] for s in parts]) for name, parts in names.items()
        }
        if config.tie_embeddings:
            _drop_tied_head(found, directory)
        check(expected, {name: tensor.shape for name, tensor in found.items()}, str(directory))
        stored = {}
        for name, parts in names.items():
            start = 0
            for slot in parts:
                stored[slot] = _rows(found[name], start, shapes[slot])
                start += shapes[slot][0]
        yield config, stored


def _mapped(source: SafetensorsSource, name: str, index) -> np.ndarray:
    return source.mapped(name)[index]


def _drop_tied_head(found: dict[str, Stored], directory: Path) -> None:
    """A tied model may have its head in the file once more, but no other head: one of the two would be lost."""
    head, embedding = (found.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if head is None or embedding is None or embedding.shape != head.shape:
        return  # what does not fit is named by `check`
    count = head.shape[0]
    for start in range(0, count, _COMPARED_ROWS):
        rows = (slice(start, min(start + _COMPARED_ROWS, count)), slice(None))
        if not np.array_equal(head.read(rows), embedding.read(rows)):
            raise UserError(
                f"{directory}: tie_word_embeddings is true, but lm_head.weight differs from "
                "model.embed_tokens.weight; set it to false in config.json to keep the head, or remove the tensor"
            )
    del found["lm_head.weight"]


def _joined_shape(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _rows(tensor: Stored, start: int, shape: tuple[int, ...]) -> Stored:
    """Some rows of a stored tensor: what one slot has of a fused matrix."""
    if tensor.shape == shape:
        return tensor

    def read(index):
        first, last, _ = index[0].indices(shape[0])
        return tensor.read((slice(start + first, start + last), *index[1:]))

    return Stored(shape, tensor.dtype, read)


def save(
    directory: str | Path,
    config: LlamaConfig,
    params: Mapping,
    tokenizer=None,
    *,
    card: str | None = None,
) -> None:
    """Write a directory that `transformers`, vLLM and `load` read, whole or not at all.

    Args:
        directory: a new or an empty directory.
        config: the model's.
        params: its parameter tree; each tensor is stored in the dtype it has there.
        tokenizer: what `load_tokenizer` takes, or a tokenizer, written along.
        card: the model card (README.md), if any.

    Raises:
        UserError: the directory holds something, the tree does not fit the config, the family has no word for a
            field of the config, or the tokenizer cannot be loaded.
    """
    directory = _new(directory)
    raw, stored = (
        families.write_config(config, str(params["embedding"].dtype)),
        scatter(config, params),
    )
    write_model(directory, config, raw, stored, tokenizer, card=card)


def write_model(
    directory: Path,
    config: LlamaConfig,
    raw: dict,
    stored: Mapping[Slot, Stored],
    tokenizer=None,
    *,
    generation: Mapping | None = None,
    card: str | None = None,
    source: dict | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes config.json `raw`, the tensors and the rest beside `directory`, then renames it to that.

    Args:
        generation: the content of generation_config.json; None: what the tokenizer brings.
        source: what identifies the tensors (plain values). Shards that an earlier, interrupted call finished
            from the same source are kept; None: nothing is.
        progress: called with (bytes done, bytes in all) after each tensor.
    """
    # Built beside its place and then renamed, so that nobody meets half of it.
    directory = _new(directory)
    partial = directory.with_name(directory.name + ".partial")
    _claim(partial, source)
    if tokenizer is not None:
        loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
        loaded.save(partial)
        own = {"bos_token_id": loaded.bos_id, "eos_token_id": loaded.eos_id}
        generation = own | dict(loaded.generation if generation is None else generation)
    if generation:
        raw = raw | {name: generation[name] for name in generation if name in _TOKENS}
        write_json(partial / GENERATION_FILE, dict(generation))
    if card is not None:
        (partial / "README.md").write_text(card, encoding="utf-8")
    write_json(partial / "config.json", raw)
    _write_weights(partial, families.tensor_names(config), stored, progress)
    # Gone before the rename: whoever is stopped between the two begins anew, and no trace of it is ever in a result.
    (partial / _SOURCE_FILE).unlink(missing_ok=True)
    os.replace(partial, directory)


def _claim(partial: Path, source: dict | None) -> None:
    """Keeps what was made there of the same source, removes everything else."""
    file = partial / _SOURCE_FILE
    if source is not None and file.is_file() and file.read_text() == json.dumps(source):
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if source is not None:
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(source))
        os.replace(temporary, file)


def _new(directory: str | Path) -> Path:
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: exists and is not empty; save to a new directory")
    return directory


def _write_weights(directory: Path, names, stored: Mapping[Slot, Stored], progress) -> None:
    """safetensors of at most `_SHARD_BYTES` each, a tensor in memory at a time."""
    sizes = {
        name: sum(math.prod(stored[s].shape) * stored[s].dtype.itemsize for s in parts)
        for name, parts in names.items()
    }
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > _SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    total, done, weight_map = sum(sizes.values()), 0, {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        path = directory / ("model.safetensors" if len(shards) == 1 else file)
        whole = path.exists()
        if not whole:
            unfinished = path.with_suffix(".unfinished")
            layout = safetensors_layout(
                {unfinished.name: {name: _described([stored[s] for s in names[name]]) for name in shard}}
            )  # fmt: skip
            output = Output(directory, layout)
        for name in shard:
            if not whole:
                start = 0
                for slot in names[name]:
                    part = np.ascontiguousarray(stored[slot].all()).reshape(-1)
                    output.write(name, start, part)
                    start += part.size
            done += sizes[name]
            if progress:
                progress(done, total)
        if not whole:
            output.sync()  # a shard under its own name is on the disk, whatever happens then
            os.replace(unfinished, path)
        weight_map |= dict.fromkeys(shard, path.name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)


def _described(parts: list[Stored]) -> Tensor:
    """The tensor that parts make one after the other along their rows."""
    return Tensor(_joined_shape([part.shape for part in parts]), parts[0].dtype)
