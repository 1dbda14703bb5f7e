"""Documents come alike from every kind of source, and what cannot be read is named in one line."""

import gzip
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from lrjax.data.records import write_records
from lrjax.data.sources import Document, open_source
from lrjax.errors import UserError

ROWS = [
    {"id": f"d{i}", "text": f"Héllo {i}. Bye.", "marks": [[0, 5], [6, 7]] if i % 2 else []}
    for i in range(6)
]
DOCUMENTS = [Document(row["id"], row["text"], tuple(map(tuple, row["marks"]))) for row in ROWS]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write(path):
    if path.name.endswith(".jsonl"):
        jsonl(path, ROWS)
    elif path.name.endswith(".jsonl.gz"):
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in ROWS)
    elif path.name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        write_records(path, ROWS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.array_record"])
def test_formats_give_the_same_documents(tmp_path, name):
    write(tmp_path / name)
    documents = open_source(tmp_path / name)
    assert len(documents) == 6
    assert list(documents) == DOCUMENTS
    assert documents[-1] == DOCUMENTS[-1]
    assert documents[1:3] == DOCUMENTS[1:3]
    with pytest.raises(IndexError):
        documents[6]


def test_directories_and_globs(tmp_path):
    jsonl(tmp_path / "b.jsonl", [{"text": "B."}, {"text": "C."}])
    (tmp_path / "a.txt").write_text("A.\n")
    write(tmp_path / "c.array_record")
    (tmp_path / "notes.md").write_text("not a source")
    documents = open_source(tmp_path)
    assert [document.id for document in documents[:3]] == ["a#0", "b#0", "b#1"]
    assert documents[0].text == "A.\n"
    assert documents[3:] == DOCUMENTS
    assert len(open_source(tmp_path / "*.jsonl")) == 2
    assert len(open_source(tmp_path / "[ab].*")) == 3


def test_longdocs_builds_once_for_each_content(tmp_path):
    path = jsonl(tmp_path / "long.jsonl", ROWS)
    spec = f"longdocs:{path}@{tmp_path}/tfds"
    assert list(open_source(spec)) == DOCUMENTS

    (built,) = (tmp_path / "tfds/longdocs").iterdir()
    before = {file: file.stat().st_mtime_ns for file in built.rglob("*")}
    assert open_source(spec)[2] == DOCUMENTS[2]
    assert {file: file.stat().st_mtime_ns for file in built.rglob("*")} == before

    # Any other reader of TFDS finds it too.
    assert open_source(f"tfds:longdocs/{built.name}:train@{tmp_path}/tfds")[1] == DOCUMENTS[1]
    assert len(open_source(f"tfds:longdocs/{built.name}:train[:50%]@{tmp_path}/tfds")) == 3

    jsonl(path, [{"text": "Changed."}])
    assert list(open_source(spec)) == [Document("long#0", "Changed.")]


def test_a_damaged_longdocs_shard_is_named(tmp_path):
    path = jsonl(tmp_path / "long.jsonl", ROWS)
    spec = f"longdocs:{path}@{tmp_path}/tfds"
    open_source(spec)
    (shard,) = (tmp_path / "tfds").rglob("*.array_record-*")
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="row 0: damaged"):
        open_source(spec)[0]


def test_longdocs_needs_no_tensorflow(tmp_path):
    path = jsonl(tmp_path / "long.jsonl", ROWS)
    code = (
        "import sys\n"
        "from lrjax.data.sources import open_source\n"
        f"assert open_source('longdocs:{path}@{tmp_path}/tfds')[5].id == 'd5'\n"
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.jsonl", '{"id": "a", "text": "A."}\n' * 2, "2 documents have the id 'a'"),
        ("a.jsonl", '{"text": "A."}\n{"id": "b"}', "a.jsonl, row 1: has no 'text'; it has: id"),
        ("a.jsonl", '{"text": null}', "row 0: has no 'text'"),
        ("a.jsonl", '"A."', "row 0: has no 'text'; it has: str"),
        ("a.jsonl", '{"text": 3}', "row 0: its 'text' is int"),
        ("a.jsonl", '{"text": " \\n"}', "row 0: the document is empty"),
        ("a.jsonl", '{"text": "A.", "id": 1.5}', "row 0: its 'id' is 1.5"),
        ("a.jsonl", '{"text": "A.", "marks": [[1, 9]]}', r"mark \(1, 9\); allowed: inside its 2"),
        ("a.jsonl", '{"text": "A.", "marks": [3]}', "'marks' are not pairs"),
        ("a.jsonl", '{"text": "A."}\n\n{"text"', "a.jsonl, line 3: not JSON"),
        ("a.jsonl", "\n", "a.jsonl: has no documents"),
        ("a.jsonl.gz", '{"text": "A."}', "a.jsonl.gz: unreadable"),
        ("a.txt", "", "a.txt, row 0: the document is empty"),
        ("a.txt", b"\xff\xfe", "a.txt: unreadable .*utf-8"),
        ("a.parquet", "PAR1", "a.parquet: unreadable"),
        ("a.array_record", "", "a.array_record: not a whole ArrayRecord file"),
        ("a.csv", "text\n", r"a.csv: unknown suffix; allowed: .txt, .jsonl"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, line):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=line) as error:
        open_source(tmp_path / name)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_rows_of_records_are_named_when_read(tmp_path):
    write_records(
        tmp_path / "a.array_record", [{"id": "a", "text": "A."}, {"id": "b", "tokens": 1}]
    )
    documents = open_source(tmp_path / "a.array_record")
    assert documents[0] == Document("a", "A.")
    with pytest.raises(
        UserError, match=r"a.array_record, row 1: has no 'text'; it has: id, tokens"
    ):
        documents[1]


def test_a_gzip_file_that_breaks_off_is_named(tmp_path):
    write(tmp_path / "a.jsonl.gz")
    content = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"a.jsonl.gz: unreadable"):
        open_source(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("{dir}/nothing.jsonl", "no such file"),
        ("{dir}/*.jsonl", "no such file"),
        ("{dir}", "has no files of a known kind"),
        ("longdocs:{dir}/x.jsonl", "allowed: longdocs:PATH@DATA_DIR"),
        ("longdocs:{dir}/x.jsonl@{dir}", "x.jsonl: no such file"),
        ("tfds:longdocs:train", r"allowed: tfds:NAME\[/CONFIG\]:SPLIT@DATA_DIR"),
        ("tfds:no_such_dataset:train@{dir}", "TFDS knows no dataset 'no_such_dataset'"),
    ],
)
def test_bad_sources_are_named(tmp_path, spec, line):
    with pytest.raises(UserError, match=line) as error:
        open_source(spec.format(dir=tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([{"id": "a", "text": "A."}] * 2, "two documents have the id 'a'"),
        ([{"text": ""}], "row 0: the document is empty"),
        ([], "no documents"),
    ],
)
def test_bad_documents_stop_the_build_and_leave_nothing_prepared(tmp_path, rows, line):
    path = jsonl(tmp_path / "long.jsonl", rows)
    spec = f"longdocs:{path}@{tmp_path}/tfds"
    for _ in range(2):
        with pytest.raises(UserError, match=line):
            open_source(spec)
