"""Records come back as they were written, a file is whole or named as broken, and ids are unique."""

import concurrent.futures

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lrjax.data.records import RecordFile, write_records
from lrjax.errors import UserError

VALUES = st.one_of(
    st.text(),
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=False),
    st.booleans(),
    st.none(),
    st.lists(st.integers(0, 9), max_size=3),
    hnp.arrays(
        st.sampled_from([np.int32, np.float32, np.int8, np.bool_]), hnp.array_shapes(min_side=0)
    ),
)


@given(st.lists(st.dictionaries(st.text(), VALUES, max_size=4), max_size=4))
def test_records_come_back_as_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("records") / "rows.array_record"
    rows = [{**row, "id": f"document {i}"} for i, row in enumerate(rows)]
    write_records(path, iter(rows))
    records = RecordFile(path)
    assert len(records) == len(rows)
    assert records.ids == [row["id"] for row in rows]
    for row, read in zip(rows, records, strict=True):
        assert list(read) == list(row)
        for name, value in row.items():
            if isinstance(value, np.ndarray):
                assert read[name].dtype == value.dtype
                np.testing.assert_array_equal(read[name], value, strict=True)
            else:
                assert read[name] == value


@pytest.fixture
def path(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "rows.array_record"
    write_records(
        path,
        (
            {"id": f"d{i}", "n": np.int32(i), "x": rng.random(500).astype(np.float32)}
            for i in range(300)
        ),
    )
    return path


def test_reading_by_id_index_and_slice(path):
    records = RecordFile(path)
    assert records.by_id("d7")["n"] == records[7]["n"] == 7
    assert records[-1]["n"] == 299
    assert [record["n"] for record in records[2:5]] == [2, 3, 4]
    with pytest.raises(IndexError):
        records[300]
    with pytest.raises(KeyError, match="d300"):
        records.by_id("d300")


def test_threads_share_a_file(path):
    records = RecordFile(path)
    indices = np.random.default_rng(1).integers(0, 300, 2000)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda index: records[int(index)]["n"], indices))
    np.testing.assert_array_equal(read, indices)


def test_a_writer_that_fails_leaves_the_old_file(path):
    before = path.read_bytes()

    def rows():
        yield {"id": "a"}
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_records(path, rows())
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([{"id": "a"}, {"id": "a"}], "record 1 has the id 'a' of an earlier record"),
        ([{"n": 1}], "record 0 has the id None"),
        ([{"id": ""}], "record 0 has the id ''"),
    ],
)
def test_ids_are_there_and_unique(tmp_path, rows, line):
    with pytest.raises(UserError, match=line):
        write_records(tmp_path / "rows.array_record", rows)
    assert not list(tmp_path.iterdir())


def test_only_plain_data_is_written(tmp_path):
    with pytest.raises(TypeError, match="object"):
        write_records(tmp_path / "rows.array_record", [{"id": "a", "x": object()}])
    with pytest.raises(TypeError, match="ndarray"):
        write_records(tmp_path / "rows.array_record", [{"id": "a", "x": np.array([object()])}])


def broken(path, kind):
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "half":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "text":
        path.write_text("not an ArrayRecord file")
    elif kind == "foreign":
        writer = ArrayRecordWriter(str(path), "group_size:1")
        writer.write(b"\x01")
        writer.close()


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("missing", "no such file"),
        ("empty", "not a whole ArrayRecord file"),
        ("half", "not a whole ArrayRecord file"),
        ("text", "not a whole ArrayRecord file"),
        ("foreign", "not one of lrjax's"),
    ],
)
def test_a_broken_file_is_named(path, kind, line):
    broken(path, kind)
    with pytest.raises(UserError, match=line) as error:
        RecordFile(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_record_is_named(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)
    records = RecordFile(path)
    with pytest.raises(UserError, match=r"rows.array_record: record \d+ is damaged"):
        list(records)
