"""Records on disk: dicts of text, numbers and arrays in one ArrayRecord file, found again by id.

    write_records("documents/kjv.array_record", ({"id": "Ruth", "tokens": tokens_L} for ...))
    records = RecordFile("documents/kjv.array_record")
    len(records), records[3]["tokens"], records.ids, records.by_id("Ruth")

Each record is one MessagePack message, arrays with their dtype and shape; nothing on disk is a
pickle. The last record of a file is an index of the ids, so a file is opened without reading its
records. A file appears under its name only when it is whole. Threads may share a `RecordFile`.
"""

import functools
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from lrjax.errors import UserError

SUFFIX = ".array_record"

_FORMAT = "lrjax records 1"
# Records are long and read in random order: one a group, and nothing read ahead.
_WRITER_OPTIONS = "group_size:1,zstd:3"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_ARRAY = 1  # MessagePack extension type of an array


def write_records(path: str | os.PathLike, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes records to `path`; the file is there when all of them are, or not at all.

    Args:
        path: where the file goes; its directory is made if need be, an older file is replaced.
        records: mappings from names to text, bytes, numbers, bools, None, lists, dicts or numpy
            arrays of numbers. Each has a text `id` that no other record of the file has. Tuples
            come back as lists.

    Raises:
        UserError: a record without an id, or with the id of an earlier one.
        TypeError: a value of another kind.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        writer = ArrayRecordWriter(str(partial), _WRITER_OPTIONS)
        try:
            ids = []
            for record in records:
                ids.append(record.get("id"))
                writer.write(msgpack.packb(dict(record), default=_encode))
            _check_ids(path, ids)
            writer.write(msgpack.packb({"format": _FORMAT, "ids": ids}))
        finally:
            writer.close()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class RecordFile(Sequence):
    """The records of a file that `write_records` wrote, each read when asked for; arrays read-only.

    Raises:
        UserError: the file is missing, half-written, damaged, or was written by something else.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such file")
        # A reader of a broken file holds 0 records; a whole file holds at least its index.
        self._reader = ArrayRecordReader(str(self.path), _READER_OPTIONS)
        count = self._reader.num_records()
        if not count:
            raise UserError(f"{path}: not a whole ArrayRecord file; remove it and write it again")
        index = self._read(count - 1)
        if not isinstance(index, dict) or index.get("format") != _FORMAT:
            raise UserError(f"{path}: an ArrayRecord file, but not one of lrjax's ({_FORMAT!r})")
        self.ids: list[str] = index["ids"]
        if len(self.ids) != count - 1:
            raise UserError(f"{path}: has {count - 1} records, its index says {len(self.ids)}")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return self._read(range(len(self))[index])

    def __repr__(self) -> str:
        return f"RecordFile({str(self.path)!r}, {len(self)} records)"

    @functools.cached_property
    def _index_of_id(self) -> dict[str, int]:
        return {id_: index for index, id_ in enumerate(self.ids)}

    def by_id(self, id_: str) -> dict[str, Any]:
        """The record with that id; KeyError where there is none."""
        if id_ not in self._index_of_id:
            raise KeyError(f"{self.path}: no record {id_!r}")
        return self[self._index_of_id[id_]]

    def _read(self, index: int) -> Any:
        try:
            (message,) = self._reader.read([index])
            return msgpack.unpackb(message, ext_hook=_decode, strict_map_key=False)
        except (RuntimeError, ValueError, msgpack.UnpackException) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{self.path}: record {index} is damaged ({reason})") from error


def _check_ids(path: pathlib.Path, ids: list) -> None:
    seen = set()
    for row, id_ in enumerate(ids):
        if not isinstance(id_, str) or not id_:
            raise UserError(f"{path}: record {row} has the id {id_!r}; allowed: a text, not empty")
        if id_ in seen:
            raise UserError(f"{path}: record {row} has the id {id_!r} of an earlier record")
        seen.add(id_)


def _encode(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        body = msgpack.packb([value.dtype.str, list(value.shape)])
        return msgpack.ExtType(_ARRAY, body + value.tobytes())
    raise TypeError(f"a record cannot hold {type(value).__name__} {value!r:.80}")


def _decode(code: int, data: bytes) -> Any:
    if code != _ARRAY:
        raise ValueError(f"unknown extension type {code}")
    unpacker = msgpack.Unpacker()
    unpacker.feed(data)
    dtype, shape = unpacker.unpack()
    return np.frombuffer(data, np.dtype(dtype), offset=unpacker.tell()).reshape(shape)
