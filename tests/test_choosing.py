"""Scores are written in parts: a stage that was stopped goes on behind the last whole one."""

import numpy as np
import pytest

from lrjax import choosing
from lrjax.data.records import RecordFile


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
