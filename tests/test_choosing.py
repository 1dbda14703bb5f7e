"""Scores are written in parts: a stage that was stopped goes on behind the last whole one. Selections warn."""

import numpy as np
import pytest

from lrjax import choosing, config
from lrjax.data.records import RecordFile, write_records
from lrjax.longrecipe.selection import Selection


def test_parts_are_made_once_and_joined(tmp_path):
    path, made = tmp_path / "scores" / "long.array_record", []

    def rows(first, last, stop_at=None):
        for index in range(first, last):
            if index == stop_at:
                raise KeyboardInterrupt
            made.append(index)
            yield {"id": f"document {index}", "score": np.float32([index])}

    with pytest.raises(KeyboardInterrupt):
        choosing._write_in_parts(path, 10, 4, lambda *part: rows(*part, stop_at=6))
    assert not path.exists() and made == [0, 1, 2, 3, 4, 5]
    choosing._write_in_parts(path, 10, 4, rows)
    assert made[6:] == [4, 5, 6, 7, 8, 9]  # the first part was whole
    records = RecordFile(path)
    assert [record["score"].item() for record in records] == list(range(10))
    assert [child.name for child in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(("kept", "warned"), [(range(30), True), (range(0, 90, 3), False)])
def test_a_selection_of_little_but_the_start_is_told(tmp_path, monkeypatch, kept, warned):
    """On real text an anchor class may be in nearly every sentence: the budget is full early."""
    document = {"id": "a", "tokens": np.arange(100), "marks": np.zeros(100, bool)}
    write_records(tmp_path / "documents" / "long.array_record", [document])
    chosen = Selection(np.array(kept, np.int32), np.array([30], np.int32), 0)
    monkeypatch.setattr(choosing, "make_selector", lambda *_: lambda record: chosen)
    told = []
    monkeypatch.setattr(
        choosing.logging, "warning", lambda text, *values: told.append(text % values)
    )
    method = config.method("anchor", "longrecipe")
    choosing.write_selection(None, tmp_path, "longrecipe", method, {"anchors": ["word"]})
    assert len(RecordFile(tmp_path / "selected" / "longrecipe.array_record")[0]["tokens"]) == 30
    assert [("its 30 % of the tokens from the first 30 %" in text) for text in told] == [
        True
    ] * warned
