"""Checkpoints written a piece at a time, in the formats that `streaming.py` reads.

    layout = safetensors_layout({"model.safetensors": {"model.norm.weight": Tensor((64,), bfloat16)}})
    output = Output("new.partial", layout)             # every byte of it is reserved before the first is written
    output.write("model.norm.weight", 0, block)

Several threads, and several processes, may write at once, each its own blocks.
"""

import contextlib
import json
import os
import pathlib
import shutil
import struct
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lrjax.checkpoints.streaming import CODES, Tensor
from lrjax.errors import UserError


class Layout(NamedTuple):
    """Files to come: their sizes and first bytes, and where in them each tensor lies (file, offset)."""

    files: Mapping[str, tuple[int, bytes]]
    places: Mapping[str, tuple[str, int]]
    dtypes: Mapping[str, np.dtype]


def safetensors_layout(files: Mapping[str, Mapping[str, Tensor]]) -> Layout:
    """The safetensors files that hold `files`: name of the file -> its tensors in order."""
    sizes, places, dtypes = {}, {}, {}
    for file, tensors in files.items():
        # transformers refuses files that do not say what wrote them.
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name, tensor in tensors.items():
            header[name] = {
                "dtype": CODES[tensor.dtype.name],
                "shape": list(tensor.shape),
                "data_offsets": [end, end + tensor.nbytes],
            }
            end += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = struct.pack("<Q", len(text)) + text
        sizes[file] = len(start) + end, start
        for name, tensor in tensors.items():
            places[name] = file, len(start) + header[name]["data_offsets"][0]
            dtypes[name] = tensor.dtype
    return Layout(sizes, places, dtypes)


def orbax_layout(tensors: Mapping[str, Tensor]) -> Layout:
    """The zarr arrays of an Orbax checkpoint (without OCDBT) below params/, a file for each layer of a leaf.

    An uncompressed chunk of zarr is the plain bytes of its elements, so it can be written like any other file.
    """
    leaves: dict[str, list[Tensor]] = {}
    files, places = {}, {}
    for name, tensor in tensors.items():
        leaf, layer = split_layer(name)
        folder = f"params/{leaf.replace('/', '.')}"
        leaves.setdefault(leaf, []).append(tensor)
        index = [0] * len(tensor.shape) if layer is None else [layer, *[0] * len(tensor.shape)]
        file = f"{folder}/{'.'.join(map(str, index))}"
        files[file], places[name] = (tensor.nbytes, b""), (file, 0)
    for leaf, layers in leaves.items():
        stacked = leaf.startswith("layers/")
        shape = [*([len(layers)] if stacked else []), *layers[0].shape]
        dtype = layers[0].dtype
        array = {
            "zarr_format": 2,
            "shape": shape,
            "chunks": [*([1] if stacked else []), *layers[0].shape],
            "dtype": "bfloat16" if dtype.name == "bfloat16" else dtype.str,
            "compressor": None,
            "fill_value": None,
            "filters": None,
            "order": "C",
            "dimension_separator": ".",
        }
        text = json.dumps(array).encode()
        files[f"params/{leaf.replace('/', '.')}/.zarray"] = len(text), text
    return Layout(files, places, {name: tensor.dtype for name, tensor in tensors.items()})


def split_layer(name: str) -> tuple[str, int | None]:
    """("layers/q", 3) of "layers/3/q"; ("embedding", None) of "embedding"."""
    parts = name.split("/")
    if parts[0] == "layers":
        return "/".join(["layers", *parts[2:]]), int(parts[1])
    return name, None


class Output:
    """The files of a layout below a directory, all of their bytes reserved at once.

    Raises:
        UserError: the disk has no room for them; nothing has been written then.
    """

    def __init__(self, directory: pathlib.Path, layout: Layout):
        self._layout = layout
        missing = sum(
            size - ((directory / file).stat().st_blocks * 512 if (directory / file).exists() else 0)
            for file, (size, _) in layout.files.items()
        )
        free = shutil.disk_usage(directory).free
        if missing > free:
            raise UserError(
                f"{directory.parent}: {missing / 1e9:.2f} GB are needed, the disk has {free / 1e9:.2f} GB left"
            )
        self._directory = directory
        for file, (size, first) in layout.files.items():
            path = directory / file
            path.parent.mkdir(parents=True, exist_ok=True)
            # Opened for each write anew: a deep Orbax model has more files than a process may hold open.
            with _descriptor(path) as descriptor:
                try:
                    _reserve(descriptor, size)
                except OSError as error:
                    raise UserError(
                        f"{path}: no room for {size / 1e9:.2f} GB: {error.strerror}"
                    ) from error
                os.pwrite(descriptor, first, 0)

    def write(self, name: str, start: int, block: np.ndarray) -> None:
        """Elements from `start` on of a tensor, in its dtype."""
        file, offset = self._layout.places[name]
        dtype = self._layout.dtypes[name]
        if block.dtype != dtype:
            raise TypeError(f"{name}: a block of {block.dtype} for a tensor of {dtype}")
        view, at = memoryview(block.view(np.uint8)), offset + start * dtype.itemsize
        with _descriptor(self._directory / file) as descriptor:
            while view:
                count = os.pwrite(descriptor, view, at)
                view, at = view[count:], at + count

    def sync(self) -> None:
        """Waits until the disk has it all, so that not even a power failure can take it away."""
        for file in self._layout.files:
            with _descriptor(self._directory / file) as descriptor:
                os.fsync(descriptor)


@contextlib.contextmanager
def _descriptor(path: pathlib.Path):
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _reserve(descriptor: int, size: int) -> None:
    if size and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    os.ftruncate(descriptor, size)
