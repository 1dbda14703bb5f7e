"""Documents from where they lie: text, jsonl, parquet, ArrayRecord, or any prepared TFDS dataset.

    documents = open_source("corpus/*.jsonl")
    len(documents), documents[0].id, documents[0].text

A source is one of

    PATH                                   a .txt (one document), .jsonl, .jsonl.gz, .parquet or
                                           .array_record file (lrjax.data.records), a directory or
                                           a glob of them
    longdocs:PATH@DATA_DIR                 the same text files, built into ArrayRecord by the TFDS
                                           builder in lrjax.data.longdocs, once for each content
    tfds:NAME[/CONFIG]:SPLIT@DATA_DIR      any TFDS dataset prepared as ArrayRecord

Rows have a `text`, and may have an `id` and `marks`. ArrayRecord and TFDS sources are read document by
document when asked; the others are read when opened, so large ones are better opened as longdocs.
"""

import bisect
import glob
import gzip
import itertools
import json
import os
import pathlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lrjax.data.records import SUFFIX, RecordFile
from lrjax.errors import UserError

TEXT_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
SUFFIXES = (*TEXT_SUFFIXES, SUFFIX)


class Document(NamedTuple):
    """A text with an id of its own.

    Attributes:
        id: the row's `id`, or the file's stem and the row number: "corpus#17".
        text: not empty.
        marks: character spans (start, end) of known long-range answers, for checking the scorer.
    """

    id: str
    text: str
    marks: tuple[tuple[int, int], ...] = ()


def open_source(spec: str | os.PathLike) -> Sequence[Document]:
    """Opens a source; see the module's first lines for what `spec` may be.

    Raises:
        UserError: nothing there, unreadable, of an unknown suffix, without documents, a row without a
            text or with an empty one, two documents of one id. Rows of ArrayRecord and TFDS sources
            are checked when they are read.
    """
    spec = os.fspath(spec)
    if spec.startswith("tfds:"):
        parts = [_open_tfds(spec)]
    elif spec.startswith("longdocs:"):
        parts = [_open_longdocs(spec)]
    else:
        parts = [_open_file(path) for path in find_files(spec, SUFFIXES)]
        ids = Counter(itertools.chain.from_iterable(part.ids for part in parts))
        if repeated := [id_ for id_, count in ids.items() if count > 1]:
            raise UserError(f"{spec}: {ids[repeated[0]]} documents have the id {repeated[0]!r}")
    documents = _Joined(parts)
    if not len(documents):
        raise UserError(f"{spec}: has no documents")
    return documents


def find_files(spec: str, suffixes: Sequence[str]) -> list[pathlib.Path]:
    """The files of a path, a directory (its own files of these suffixes) or a glob, sorted."""
    path = pathlib.Path(spec)
    if path.is_dir():
        paths = [file for file in path.iterdir() if file.name.endswith(tuple(suffixes))]
    elif path.exists():
        paths = [path]
    else:
        paths = [pathlib.Path(name) for name in glob.glob(spec, recursive=True)]
    if not paths:
        there = "has no files of a known kind" if path.is_dir() else "no such file"
        raise UserError(f"{spec}: {there}; allowed: a file, directory or glob of {_or(suffixes)}")
    for path in paths:
        if not path.name.endswith(tuple(suffixes)):
            raise UserError(f"{path}: unknown suffix; allowed: {_or(suffixes)}")
    return sorted(paths)


def read_documents(path: pathlib.Path) -> Iterator[Document]:
    """The documents of one text file (a suffix of `TEXT_SUFFIXES`), one after the other."""
    stem = path.name.removesuffix(next(s for s in TEXT_SUFFIXES[::-1] if path.name.endswith(s)))
    for row, values in enumerate(_read_rows(path)):
        yield _document(values, f"{stem}#{row}", f"{path}, row {row}")


def _read_rows(path: pathlib.Path) -> Iterator[Any]:
    """The rows of a text file; whatever makes it unreadable becomes one line that names the file."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet  # an extra of this format

            try:
                with pyarrow.parquet.ParquetFile(path) as file:
                    for batch in file.iter_batches(batch_size=64):
                        yield from batch.to_pylist()
            except pyarrow.ArrowException as error:
                raise UserError(f"{path}: unreadable ({_line(error)})") from error
        elif path.suffix == ".txt":
            yield {"text": path.read_text(encoding="utf-8")}
        else:
            opener = gzip.open if path.suffix == ".gz" else open
            with opener(path, "rt", encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if not line.isspace():
                        yield _parse(line, f"{path}, line {number}")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: unreadable ({_line(error)})") from error


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error


def _document(row: Any, default_id: str, where: str) -> Document:
    """A checked document of a row; texts may be UTF-8 bytes, as TFDS gives them."""
    if not isinstance(row, Mapping) or row.get("text") is None:
        has = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise UserError(f"{where}: has no 'text'; it has: {has or 'nothing'}")
    text, id_ = _decoded(row["text"]), _decoded(row.get("id"))
    if not isinstance(text, str):
        raise UserError(f"{where}: its 'text' is {type(text).__name__}; allowed: a text")
    if not text.strip():
        raise UserError(f"{where}: the document is empty")
    if id_ is None:
        id_ = default_id
    elif isinstance(id_, bool | float | list | dict) or not str(id_):
        raise UserError(f"{where}: its 'id' is {id_!r}; allowed: a text or a whole number")
    given = row.get("marks")
    try:
        marks = tuple((int(start), int(end)) for start, end in ([] if given is None else given))
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: its 'marks' are not pairs (start, end)") from error
    for start, end in marks:
        if not 0 <= start < end <= len(text):
            raise UserError(
                f"{where}: mark {(start, end)}; allowed: inside its {len(text)} characters"
            )
    return Document(str(id_), text, marks)


class _Rows(Sequence):
    """Documents of rows that are read when asked for; `ids` where they are known beforehand."""

    def __init__(self, rows: Sequence, ids: Sequence[str], read: Callable[[int], Document]):
        self.rows, self.ids, self.read = rows, ids, read

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Document:
        return self.read(index)


class _Joined(Sequence):
    """Sequences of documents, one behind the other."""

    def __init__(self, parts: Sequence[_Rows]):
        self._parts = parts
        self._ends = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part][index - self._ends[part] + len(self._parts[part])]


def _open_file(path: pathlib.Path) -> _Rows:
    if path.name.endswith(SUFFIX):
        records = RecordFile(path)

        def read(row: int) -> Document:
            return _document(records[row], "", f"{path}, row {row}")

        return _Rows(records, records.ids, read)
    documents = list(read_documents(path))
    return _Rows(documents, [document.id for document in documents], documents.__getitem__)


def _open_longdocs(spec: str) -> _Rows:
    path, _, data_dir = spec.removeprefix("longdocs:").rpartition("@")
    if not path or not data_dir:
        raise UserError(f"{spec}: allowed: longdocs:PATH@DATA_DIR")
    from lrjax.data.longdocs import build  # TFDS takes a second to import

    builder = build(find_files(path, TEXT_SUFFIXES), data_dir)
    return _tfds_rows(builder.as_data_source("train"), spec)


def _open_tfds(spec: str) -> _Rows:
    rest, _, data_dir = spec.removeprefix("tfds:").rpartition("@")
    name, _, split = rest.partition(":")
    if not (name and split and data_dir):
        raise UserError(f"{spec}: allowed: tfds:NAME[/CONFIG]:SPLIT@DATA_DIR")
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
        if "text" not in builder.info.features:
            has = ", ".join(builder.info.features)
            raise UserError(f"{spec}: the dataset has no feature 'text'; it has: {has}")
        rows = builder.as_data_source(split)
    except UserError:
        raise
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(
            f"{spec}: TFDS knows no dataset {name!r}, nor is it in {data_dir}"
        ) from error
    except (AssertionError, NotImplementedError, OSError, ValueError) as error:
        raise UserError(f"{spec}: not prepared there as array_record ({_line(error)})") from error
    return _tfds_rows(rows, spec)


def _tfds_rows(rows: Sequence, spec: str) -> _Rows:
    def read(row: int) -> Document:
        where = f"{spec}, row {row}"
        try:
            values = rows[row]
        except RuntimeError as error:  # of the ArrayRecord reader
            raise UserError(f"{where}: damaged ({_line(error)})") from error
        if values["text"] is None:  # what a file that breaks off reads as
            raise UserError(f"{where}: damaged (its file is not whole); prepare the dataset again")
        return _document(values, f"{spec}#{row}", where)

    return _Rows(rows, (), read)


def _decoded(value: Any) -> Any:
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _or(suffixes: Sequence[str]) -> str:
    return ", ".join(suffixes)
