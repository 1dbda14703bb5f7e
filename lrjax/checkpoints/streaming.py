"""Checkpoints read a piece at a time, so that memory does not depend on their size.

    source = open_source("dir")                        # HF directory of safetensors, lrjax model, or a run's step
    source.tensors["model.norm.weight"]                # Tensor(shape, dtype)
    source.read("model.norm.weight", 0, 1000)          # elements 0 to 1000 in C order, in the dtype they have there

A tensor is what methods of merging look at as one: a safetensors tensor, or one layer of a stacked Orbax leaf
("layers/3/q" is row 3 of layers/q). Several threads may read at once. No jax here: a merge of two HF directories
needs neither its start-up time nor its memory. Writing is in `streamed_output.py`.
"""

import hashlib
import json
import math
import os
import pathlib
import struct
import threading
from typing import NamedTuple

import ml_dtypes
import numpy as np

from lrjax.errors import UserError

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODES = {dtype.name: code for code, dtype in DTYPES.items()}
# What old versions of transformers saved with the weights though it is computed.
_NO_WEIGHT = "rotary_emb.inv_freq"
_READ_BYTES = 16 << 20  # of an Orbax leaf at a time, where its chunks allow


class Tensor(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


def open_source(path) -> "SafetensorsSource | OrbaxSource":
    """The checkpoint at `path`.

    Raises:
        UserError: nothing there that can be read tensor by tensor, or something half written.
    """
    path = pathlib.Path(path)
    if (path / "model.json").is_file():
        return OrbaxSource(path)
    if path.name.isdigit() and (path / "state").is_dir():
        return OrbaxSource(path, step=True)
    if (path / "params").is_dir():
        raise UserError(
            f"{path}: an lrjax model without its model.json, which is written last; it is not whole (being "
            "written, or its writer was stopped)"
        )
    if (path / "config.json").is_file():
        return SafetensorsSource(path)
    raise UserError(
        f"{path}: no checkpoint there; allowed: a Hugging Face directory with safetensors, an lrjax model, "
        "a step below checkpoints/STAGE/steps"
    )


class _Source:
    """What both kinds of source share: `path`, `config` (plain values), `tensors`, `read`, and their files."""

    path: pathlib.Path
    config: dict
    tensors: dict[
        str, Tensor
    ]  # `read(name, start, stop)` gives elements of one, until the thread's next call
    weight_files: list[pathlib.Path]

    def fingerprint(self) -> dict[str, list[int]]:
        """Size and time of change of every file with weights: what says that nobody writes to them meanwhile."""
        found = {}
        for file in self.weight_files:
            try:
                stat = file.stat()
            except FileNotFoundError as error:
                raise UserError(f"{file}: has gone while the source was being read") from error
            found[str(file.relative_to(self.path))] = [stat.st_size, stat.st_mtime_ns]
        return found

    def sha256(self) -> dict[str, str]:
        """File -> sha256 of its bytes, for every file with weights."""
        hashes = {}
        for file in self.weight_files:
            with open(file, "rb") as stream:
                hashes[str(file.relative_to(self.path))] = hashlib.file_digest(
                    stream, "sha256"
                ).hexdigest()
        return hashes


# ------------------------------------------------------------------------------------------- safetensors


class SafetensorsSource(_Source):
    """An HF directory. `read` reads the files, for mapped pages would count as memory; `mapped` maps them."""

    kind = "safetensors"

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.config = read_json(path / "config.json")
        self.weight_files = _weight_files(path)
        self.tensors, self.places = {}, {}
        self._descriptors, self._maps = {}, {}
        self._local = threading.local()
        for file in self.weight_files:
            for name, (tensor, offset) in _read_header(file).items():
                if name in self.tensors:
                    raise UserError(
                        f"{path}: {name} is in {self.places[name][0].name} and {file.name}"
                    )
                self.tensors[name], self.places[name] = tensor, (file, offset)
            self._descriptors[file] = os.open(file, os.O_RDONLY)
        if absent := sorted(set(_weight_map(path)) - set(self.tensors)):
            absent = [name for name in absent if not name.endswith(_NO_WEIGHT)]
            if absent:
                raise UserError(
                    f"{path}: the index names tensors that its files do not hold: {', '.join(absent[:5])}"
                    f"{' ...' if len(absent) > 5 else ''}; is it being written?"
                )

    def mapped(self, name: str) -> np.ndarray:
        """A tensor as a view of its file's pages, of which the next ones are asked for: no copy, and no memory kept."""
        file, offset = self.places[name]
        shape, dtype = self.tensors[name]
        if not self.tensors[name].size:
            return np.empty(shape, dtype)
        os.posix_fadvise(
            self._descriptors[file], offset, 2 * self.tensors[name].nbytes, os.POSIX_FADV_WILLNEED
        )
        if file not in self._maps:
            self._maps[file] = np.memmap(file, np.uint8, mode="r")
        return (
            self._maps[file][offset : offset + self.tensors[name].nbytes].view(dtype).reshape(shape)
        )

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Into a buffer of this thread, which the next call uses again: fresh memory would cost more than the copy."""
        file, offset = self.places[name]
        dtype = self.tensors[name].dtype
        count = (stop - start) * dtype.itemsize
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < count:
            buffer = self._local.buffer = np.empty(count, np.uint8)
        block = buffer[:count].view(dtype)
        view, at = memoryview(block.view(np.uint8)), offset + start * dtype.itemsize
        while view:
            count = os.preadv(self._descriptors[file], [view], at)
            if not count:
                raise UserError(f"{file}: ends in the middle of {name}; is it being written?")
            view, at = view[count:], at + count
        return block

    def close(self) -> None:
        self._maps.clear()
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


def _weight_files(path: pathlib.Path) -> list[pathlib.Path]:
    single = path / "model.safetensors"
    if single.is_file():
        return [single]
    files = sorted({path / name for name in _weight_map(path).values()})
    if not files:
        raise UserError(
            f"{path}: neither model.safetensors nor model.safetensors.index.json in this directory"
        )
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(
            f"{path}: the index names files that are not there: {', '.join(missing)}; is it being written?"
        )
    return files


def _weight_map(path: pathlib.Path) -> dict[str, str]:
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file() or not index.is_file():
        return {}
    return read_json(index).get("weight_map", {})


def _read_header(file: pathlib.Path) -> dict[str, tuple[Tensor, int]]:
    """Tensor and offset in the file by name; an UserError for a file that is cut short or no safetensors."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if length > size - 8:
                raise UserError(
                    f"{file}: cut short in its header ({size} bytes); is it being written?"
                )
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        entries = {}
        for name, entry in header.items():
            first, last = map(int, entry["data_offsets"])
            entries[name] = entry["dtype"], tuple(map(int, entry["shape"])), first, last
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__} {error}"
        raise UserError(f"{file}: cannot be read as safetensors: {reason}") from error
    end = max((last for *_, last in entries.values()), default=0)
    if 8 + length + end != size:
        raise UserError(
            f"{file}: {size} bytes, its header says {8 + length + end}; is it being written?"
        )
    tensors = {}
    for name, (code, shape, first, last) in entries.items():
        if name.endswith(_NO_WEIGHT):
            continue
        if code not in DTYPES:
            raise UserError(f"{file}: {name} is stored as {code}; known are {', '.join(DTYPES)}")
        tensor = Tensor(shape, DTYPES[code])
        if not 0 <= first <= last <= end or last - first != tensor.nbytes:
            raise UserError(
                f"{file}: cannot be read as safetensors: {name} has {tensor.nbytes} bytes by its shape, and lies "
                f"at {first} to {last}"
            )
        tensors[name] = tensor, 8 + length + first
    return tensors


# ------------------------------------------------------------------------------------------- Orbax


class OrbaxSource(_Source):
    """An lrjax model, or (`step`) the parameters in one step of a training stage.

    Memory is that of the chunks the arrays were written in: of a model a layer, of a step the whole leaf.
    """

    kind = "orbax"

    def __init__(self, path: pathlib.Path, step: bool = False):
        import tensorstore

        self.path = path
        # A step is CHECKPOINT/steps/100, and what model it is of is written in CHECKPOINT when the stage ends.
        self.described_by = path.parent.parent if step else path
        self.config = read_json(self.described_by / "model.json").get("config", {})
        store = path / ("state" if step else "params")
        metadata = store / "_METADATA"
        if not metadata.is_file():
            raise UserError(f"{store}: no _METADATA in it; it is not whole, or being written")
        content = read_json(metadata)
        self.tensors, self._stores = {}, {}
        for entry in content["tree_metadata"].values():
            keys = [str(key["key"]) for key in entry["key_metadata"]]
            if step and keys[0] != "params":
                continue
            kvstore = {"driver": "file", "path": str(store / ".".join(keys)) + "/"}
            if content.get("use_ocdbt"):
                base = f"file://{store.absolute()}"
                kvstore = {"driver": "ocdbt", "base": base, "path": ".".join(keys) + "/"}
            driver = "zarr3" if content.get("use_zarr3") else "zarr"
            try:
                array = tensorstore.open({"driver": driver, "kvstore": kvstore}, open=True).result()
            except ValueError as error:
                reason = str(error).splitlines()[0][:200]
                raise UserError(f"{store}: {'.'.join(keys)} cannot be read: {reason}") from error
            self._add("/".join(keys[step:]), array)
        self.weight_files = sorted(file for file in store.rglob("*") if file.is_file())
        self._local, self._lock, self._shared = threading.local(), threading.Lock(), None

    def _add(self, leaf: str, array) -> None:
        dtype = np.dtype(array.dtype.numpy_dtype)
        if dtype.name not in CODES:
            raise UserError(
                f"{self.path}: {leaf} is stored as {dtype.name}; known are {', '.join(CODES)}"
            )
        stacked = leaf.startswith("layers/")
        for layer in range(array.shape[0]) if stacked else [None]:
            name = leaf if layer is None else leaf.replace("layers/", f"layers/{layer}/", 1)
            self.tensors[name] = Tensor(tuple(array.shape[stacked:]), dtype)
            self._stores[name] = array, layer

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Reads whole chunks and keeps the last ones, since the next block will want them."""
        array, layer = self._stores[name]
        if layer is None:
            return self._rows(name, array, start, stop)
        return self._layers(array, layer)[start:stop]

    def _rows(self, name, array, start, stop) -> np.ndarray:
        """From a leaf without layers: as many rows as make `_READ_BYTES`, or one row of chunks."""
        row = math.prod(array.shape[1:])
        held, first, rows = getattr(self._local, "rows", (None, 0, np.empty((0, 1))))
        if held != name or not first * row <= start <= stop <= (first + len(rows)) * row:
            self._local.rows = None, 0, np.empty((0, 1))
            chunk = array.chunk_layout.read_chunk.shape[0]
            count = max(_READ_BYTES // (row * array.dtype.numpy_dtype.itemsize) // chunk, 1) * chunk
            first = start // row // chunk * chunk
            last = min(max(first + count, -(-stop // row)), array.shape[0])
            rows = array[first:last].read().result()
            self._local.rows = name, first, rows
        return rows.reshape(-1)[start - first * row : stop - first * row]

    def _layers(self, array, layer: int) -> np.ndarray:
        """A layer, flat, out of the layers that share its chunks; threads share them too."""
        chunk = array.chunk_layout.read_chunk.shape[0]
        first = layer // chunk * chunk
        mine = getattr(self._local, "layers", None)
        if mine is None or mine[0] != (id(array), first):
            self._local.layers = mine = None
            with self._lock:
                if self._shared is None or self._shared[0] != (id(array), first):
                    self._shared = None
                    self._shared = (
                        (id(array), first),
                        array[first : min(first + chunk, array.shape[0])].read().result(),
                    )
                self._local.layers = mine = self._shared
        return mine[1][layer - first].reshape(-1)

    def close(self) -> None:
        self._stores.clear()


def read_json(path: pathlib.Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object is expected")
    return content


def write_json(path: pathlib.Path, content: dict) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
