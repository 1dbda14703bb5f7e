"""Documents into rows of one length: which piece goes where, and the arrays of a row.

    for row in pack([len(tokens) for tokens in documents], row_length=4096):
        example = fill_row([documents[index][start:stop] for index, start, stop in row], 4096)

Every token is placed once. Documents longer than a row are cut; documents never share attention,
because each piece has a segment id of its own and positions that begin at 0.
"""

import bisect
from collections.abc import Sequence

import numpy as np

from lrjax.errors import UserError

Piece = tuple[int, int, int]
"""(index of the document, its first token, the token after its last)"""


def pack(lengths: Sequence[int], row_length: int) -> list[list[Piece]]:
    """Places documents of these lengths in rows, each piece in the fullest row that still holds it.

    Longest pieces first (best fit decreasing), so the rows are nearly full; equal lengths keep
    their order, so the same lengths always give the same rows. Within a row, pieces stand in the
    order of the documents.

    Raises:
        UserError: a row length below 1 or an empty document.
    """
    if row_length < 1:
        raise UserError(f"row length {row_length}: allowed: 1 or more tokens")
    pieces = []
    for index, length in enumerate(lengths):
        if length < 1:
            raise UserError(f"document {index} has {length} tokens; allowed: 1 or more")
        for start in range(0, length, row_length):
            pieces.append((index, start, min(start + row_length, int(length))))
    pieces.sort(key=lambda piece: piece[1] - piece[2])
    rows: list[list[Piece]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for piece in pieces:
        length = piece[2] - piece[1]
        place = bisect.bisect_left(room, (length, 0))
        if place < len(room):
            free, row = room.pop(place)
        else:
            free, row = row_length, len(rows)
            rows.append([])
        rows[row].append(piece)
        if free > length:
            bisect.insort(room, (free - length, row))
    return [sorted(row) for row in rows]


def fill_row(
    pieces: Sequence[np.ndarray], row_length: int, pad_id: int = 0
) -> dict[str, np.ndarray]:
    """The arrays of a row, each [row_length], from the tokens of its pieces.

    Returns:
        tokens: int32, `pad_id` behind the last piece.
        positions: int32, from 0 in each piece and in the padding.
        segment_ids: int32, 1, 2, ... for the pieces, 0 for the padding.
        weights: float32, of the loss of predicting each token: 0 for the first token of a piece,
            which nothing predicts, and for padding; 1 elsewhere.

    Raises:
        UserError: the pieces are longer than the row, or one is empty.
    """
    lengths = np.asarray([len(piece) for piece in pieces], np.int32)
    padding = row_length - lengths.sum()
    if padding < 0 or (lengths < 1).any():
        raise UserError(f"pieces of {lengths.tolist()} tokens do not make a row of {row_length}")
    runs = np.append(lengths, padding)
    starts = np.repeat(np.cumsum(runs) - runs, runs)
    positions = (np.arange(row_length) - starts).astype(np.int32)
    segment_ids = np.repeat(np.append(np.arange(1, len(lengths) + 1), 0), runs).astype(np.int32)
    tokens = np.concatenate([*pieces, np.full(padding, pad_id)]).astype(np.int32)
    weights = ((segment_ids > 0) & (positions > 0)).astype(np.float32)
    return {
        "tokens": tokens,
        "positions": positions,
        "segment_ids": segment_ids,
        "weights": weights,
    }
