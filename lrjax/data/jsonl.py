"""Files of JSON objects, one to a line: read, written whole, or appended to as work is done.

for number, row in read_jsonl(path): ...
write_jsonl(path, rows)
with appender(path) as append: append(row)             # on disk at once: a stopped run finds it again
done = {row["id"] for _, row in read_appended(path)}
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator

import jax
from absl import logging

from lrjax.errors import UserError


def read_jsonl(path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of every line that is not empty; `UserError` names the file and the broken line."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with open(path, encoding="utf-8") as file:
        lines = enumerate(file, start=1)
        while True:
            try:
                number, line = next(lines)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: not UTF-8 text ({error.reason})") from error
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: {type(row).__name__}, not an object")
            yield number, row


def read_appended(path) -> Iterator[tuple[int, dict]]:
    """The rows of a file that `appender` writes, none if it is not there yet.

    A last line that a stop left unfinished is taken off the file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        logging.warning("%s: the last line is unfinished and is made again", path)
        with open(path, "r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
    yield from read_jsonl(path)


@contextlib.contextmanager
def appender(path) -> Iterator[Callable[[dict], None]]:
    """A function that appends a row to a file, on disk before it returns; process 0 does, and only with a path."""
    if not path or jax.process_index():
        yield lambda row: None
        return
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:

        def append(row: dict) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

        yield append


def write_jsonl(path, rows: Iterable[dict]) -> None:
    """Writes the rows under a temporary name and renames it: whole or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    os.replace(partial, path)
