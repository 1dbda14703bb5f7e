"""Position index transforms: which positions of a long window the tokens of a short document get.

Every transform has the same form,

    positions_L = transform(segment_lengths, target_length, rng)    # int32 [L], L = sum(segment_lengths)

`segment_lengths` are the token counts of the document's sentences in order, after selection; `target_length`
is the window T the positions are spread over; `rng` a `numpy.random.Generator`, drawn anew for every epoch.
The result is strictly increasing, non-negative and below T; the order of the tokens never changes, and
the causal mask comes from their order, not from these numbers.

    positions.longrecipe([88, 91, 70], 80_000, np.random.default_rng(0))
    positions.TRANSFORMS["pose"](...)

| name            | gaps                                            | source                                         |
|-----------------|-------------------------------------------------|------------------------------------------------|
| full            | none, L == T                                    | full-length training                           |
| contiguous      | none                                            | the control without a transform                |
| longrecipe      | between sentences                               | arXiv 2409.00509, Algorithm 1                  |
| longrecipe_code | the same, but the head of the text has none     | the authors' released code                     |
| rpes            | anywhere                                        | Ruoss et al. 2023, arXiv 2305.16843            |
| pose            | one, in the first half of the text              | Zhu et al. 2023, arXiv 2309.10400, their code  |
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Int32

from lrjax.errors import UserError

Transform = Callable[[Sequence[int], int, np.random.Generator], Int32[np.ndarray, "L"]]

_MAX_TARGET = np.iinfo(np.int32).max


def full(segment_lengths, target_length, rng) -> Int32[np.ndarray, "L"]:
    """0..T-1: training at the full target length. Raises `UserError` unless L == T."""
    positions = contiguous(segment_lengths, target_length, rng)
    if len(positions) != target_length:
        raise UserError(
            f"positions 'full': the document has {len(positions)} tokens; "
            f"full-length training takes exactly target_length {target_length}"
        )
    return positions


def contiguous(segment_lengths, target_length, rng) -> Int32[np.ndarray, "L"]:
    """0..L-1: the tokens stay where they are."""
    del rng
    lengths = _checked(segment_lengths, target_length)
    return np.arange(lengths.sum(), dtype=np.int32)


def longrecipe(segment_lengths, target_length, rng) -> Int32[np.ndarray, "L"]:
    """Spreads the slack T - L over the gaps between segments (LongRecipe, Algorithm 1).

    The N segments and the T - L unused positions are laid out in a random order that keeps the first segment
    at 0. Choosing the N-1 places of the other segments among T - L + N - 1 makes each of the
    C(T-L+N-1, N-1) arrangements equally likely; a segment's shift is the number of unused positions
    before it: its place less its rank.
    """
    lengths = _checked(segment_lengths, target_length)
    length, others = int(lengths.sum()), len(lengths) - 1
    places = _distinct(target_length - length + others, others, rng)
    shift = np.concatenate([[0], places - np.arange(others)])
    return (np.arange(length) + np.repeat(shift, lengths)).astype(np.int32)


def longrecipe_code(segment_lengths, target_length, rng) -> Int32[np.ndarray, "L"]:
    """Algorithm 1 as the released code has it: the first `rt` tokens are at 0..rt-1, rt ~ U{1..(L+1)//2}.

    All others keep what Algorithm 1 gave them for the whole text, so the slack in front of the right
    point `rt` becomes one gap at it, also where it cuts a segment.
    """
    positions = longrecipe(segment_lengths, target_length, rng)
    right_point = _right_point(len(positions), rng)
    positions[:right_point] = np.arange(right_point)
    return positions


def rpes(segment_lengths, target_length, rng) -> Int32[np.ndarray, "L"]:
    """A sorted sample without replacement of range(T). As published, it need not start at 0."""
    lengths = _checked(segment_lengths, target_length)
    return _distinct(target_length, int(lengths.sum()), rng).astype(np.int32)


def pose(segment_lengths, target_length, rng) -> Int32[np.ndarray, "L"]:
    """Two chunks split at rt ~ U{1..(L+1)//2}, the second one shifted by u ~ U{0..T-L} (official PoSE).

    The official code also takes the text of the second chunk from further on; here the text is given.
    """
    positions = contiguous(segment_lengths, target_length, rng)
    right_point = _right_point(len(positions), rng)
    positions[right_point:] += rng.integers(
        target_length - len(positions), endpoint=True, dtype=np.int32
    )
    return positions


TRANSFORMS: dict[str, Transform] = {
    transform.__name__: transform
    for transform in (full, contiguous, longrecipe, longrecipe_code, rpes, pose)
}


def describe(positions: Iterable[Int32[np.ndarray, "L"]]) -> dict[str, float]:
    """How a transform covers its window, averaged over drawn positions (each strictly increasing).

    Returns:
        `mean_distance`: of two different tokens of one text; `mean_run`: tokens in a row whose positions rise by
        1; `mean_max`: the largest position.
    """
    rows = []
    for drawn_L in positions:
        length = len(drawn_L)
        rank = np.arange(length)
        # Sum of |p_i - p_j| over pairs, from the sorted order alone: p_i is added i times, subtracted L-1-i times.
        pair_sum = np.dot(2 * rank - length + 1, drawn_L.astype(np.int64))
        pairs = max(length * (length - 1) / 2, 1)
        runs = 1 + np.count_nonzero(np.diff(drawn_L) != 1)
        rows.append((pair_sum / pairs, length / runs, drawn_L[-1]))
    if not rows:
        raise UserError("describe: no positions were given; at least one array is needed")
    means = np.mean(np.array(rows, dtype=np.float64), axis=0)
    return dict(zip(("mean_distance", "mean_run", "mean_max"), map(float, means), strict=True))


def _right_point(length: int, rng) -> int:
    return int(rng.integers(1, (length + 1) // 2, endpoint=True))


def _distinct(population: int, count: int, rng) -> np.ndarray:
    """`count` distinct members of range(population), ascending, int64, every set equally likely.

    `Generator.choice` uses Floyd's method (memory for `count` only) where `count` is a small share, so sentences
    in a window of a million cost what the sentences cost.
    """
    return np.sort(rng.choice(population, count, replace=False, shuffle=False))


def _checked(segment_lengths, target_length) -> np.ndarray:
    """`segment_lengths` as int64 [N], or `UserError`."""
    lengths = np.asarray(segment_lengths)
    if lengths.ndim != 1 or lengths.size == 0:
        raise UserError(
            f"segment_lengths: got shape {lengths.shape}; a list of at least one token count is needed"
        )
    if not np.issubdtype(lengths.dtype, np.integer):
        raise UserError(f"segment_lengths: got {lengths.dtype} values; token counts are integers")
    if lengths.min() < 1:
        first = int(np.argmax(lengths < 1))
        raise UserError(
            f"segment_lengths[{first}] is {lengths[first]}; every segment has at least 1 token"
        )
    if not 1 <= target_length <= _MAX_TARGET:
        raise UserError(f"target_length is {target_length}; allowed is 1 to {_MAX_TARGET}")
    lengths = lengths.astype(np.int64)
    if lengths.sum() > target_length:
        raise UserError(
            f"the document has {lengths.sum()} tokens, more than target_length {target_length}; "
            "select fewer tokens or raise the target"
        )
    return lengths
