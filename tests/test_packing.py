"""Packing places every token once and keeps documents apart."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrjax.data.packing import fill_row, pack
from lrjax.errors import UserError

LENGTHS = st.lists(st.integers(1, 40), max_size=30)
ROW_LENGTH = st.integers(1, 20)


@given(LENGTHS, ROW_LENGTH)
def test_every_token_is_placed_once(lengths, row_length):
    rows = pack(lengths, row_length)
    placed = [(index, t) for row in rows for index, start, stop in row for t in range(start, stop)]
    assert sorted(placed) == [(i, t) for i, length in enumerate(lengths) for t in range(length)]
    assert all(0 < sum(stop - start for _, start, stop in row) <= row_length for row in rows)
    assert rows == pack(lengths, row_length)


@given(LENGTHS, ROW_LENGTH)
def test_rows_are_more_than_half_full(lengths, row_length):
    rows = pack(lengths, row_length)
    filled = sorted(sum(stop - start for _, start, stop in row) for row in rows)
    assert len(filled) < 2 or filled[0] + filled[1] > row_length  # else the two would be one row


@given(LENGTHS, ROW_LENGTH)
def test_rows_hold_their_pieces(lengths, row_length):
    documents = [
        1000 * i + np.arange(length, dtype=np.int32) for i, length in enumerate(lengths, 1)
    ]
    for row in pack(lengths, row_length):
        example = fill_row(
            [documents[i][start:stop] for i, start, stop in row], row_length, pad_id=-1
        )
        assert {name: array.dtype.name for name, array in example.items()} == {
            "tokens": "int32",
            "positions": "int32",
            "segment_ids": "int32",
            "weights": "float32",
        }
        assert all(array.shape == (row_length,) for array in example.values())
        at = 0
        for segment, (index, start, stop) in enumerate(row, 1):
            part = {name: array[at : at + stop - start] for name, array in example.items()}
            np.testing.assert_array_equal(part["tokens"], documents[index][start:stop])
            np.testing.assert_array_equal(part["positions"], np.arange(stop - start))
            assert (part["segment_ids"] == segment).all()
            np.testing.assert_array_equal(part["weights"], np.arange(stop - start) > 0)
            at += stop - start
        assert (example["tokens"][at:] == -1).all()
        assert not example["segment_ids"][at:].any()
        assert not example["weights"][at:].any()


def test_best_fit():
    assert pack([3, 9, 1, 25], 10) == [
        [(3, 0, 10)],
        [(3, 10, 20)],
        [(1, 0, 9), (2, 0, 1)],
        [(0, 0, 3), (3, 20, 25)],
    ]


def test_bad_input_is_named():
    with pytest.raises(UserError, match="document 1 has 0 tokens"):
        pack([3, 0], 10)
    with pytest.raises(UserError, match="row length 0"):
        pack([3], 0)
    with pytest.raises(UserError, match=r"\[6, 5\] tokens do not make a row of 10"):
        fill_row([np.arange(6), np.arange(5)], 10)
