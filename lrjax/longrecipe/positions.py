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
| pose_code       | one, or (57 % at 24k of 80k) none               | the PoSE inside LongRecipe's released code     |
| cream           | two: head, middle, tail                         | Wu et al. 2024, arXiv 2406.07138               |

Algorithm 1 with one thing changed, to see what it hangs on. Its own gaps are those of independent geometric draws that
happen to add up to the slack: both make every arrangement equally likely.

| name            | the change                                                                                       |
|-----------------|--------------------------------------------------------------------------------------------------|
| uniform_slots   | every unused position falls behind a sentence of its own choice: gaps of about one size           |
| power_law       | sizes with a heavy tail, P(size > s) ~ 1/s: most gaps small, some very large                      |
| geometric       | sizes in a geometric series, slack/2, slack/4, ...: one gap of every scale                        |
| few_gaps        | between 5 runs of sentences only                                                                  |
| paragraphs      | between runs of 5 sentences only                                                                  |
| fixed_segments  | between as many segments as there are sentences, but all of one length, wherever that cuts        |
| inside_gaps     | between sentences, and once inside each                                                           |
"""

import statistics
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Int32

from lrjax.errors import UserError

Transform = Callable[[Sequence[int], int, np.random.Generator], Int32[np.ndarray, "L"]]

_MAX_TARGET = np.iinfo(np.int32).max
_RUNS_BETWEEN_FEW_GAPS = 5
_SENTENCES_OF_A_PARAGRAPH = 5
# Settings of CREAM, as remembered of the paper: head and tail when the middle is to be long, and the spread of the
# middle's place in units of the training length.
_CREAM_SHORT_ENDS = 32
_CREAM_SIGMA = 3.0


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
    others = len(lengths) - 1
    places = _distinct(_slack(lengths, target_length) + others, others, rng)
    return _shifted(lengths, np.concatenate([[0], places - np.arange(others)]))


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


def pose_code(segment_lengths, target_length, rng) -> Int32[np.ndarray, "L"]:
    """PoSE as LongRecipe's released code has it (`utils/preprocess_data.py`, setting "pose").

    The split is drawn as lt ~ U{0..T-L} instead of from the text, and the skip as u ~ U{lt..T-L}. Where lt >= L,
    nothing is skipped; with lt = 0, all of the text is moved, so it need not start at 0.
    """
    positions = contiguous(segment_lengths, target_length, rng)
    slack = target_length - len(positions)
    split = rng.integers(slack, endpoint=True)
    positions[split:] += rng.integers(split, slack, endpoint=True, dtype=np.int32)
    return positions


def cream(segment_lengths, target_length, rng) -> Int32[np.ndarray, "L"]:
    """Head at the start of the window, tail at its end, middle around its middle (Wu et al. 2024).

    Half of the draws have a short head and tail (32 tokens: long runs, "continuity"), half three parts of one length
    (all distances, "relativity"). The middle ends at P_e ~ U{L_h + a L_m .. a L - 1 - L_t}, where `a` is rounded from a
    Gaussian of mean (1 + T/L) / 2 and deviation 3, truncated to [1, T/L].
    """
    lengths = _checked(segment_lengths, target_length)
    length = int(lengths.sum())
    end = max(1, length // 3)
    if rng.random() < 0.5:
        end = min(end, _CREAM_SHORT_ENDS)
    tail = min(end, length - end)
    middle = length - end - tail

    stretch = target_length / length
    place = statistics.NormalDist((1 + stretch) / 2, _CREAM_SIGMA)
    drawn = place.inv_cdf(max(rng.uniform(place.cdf(1), place.cdf(stretch)), 1e-300))
    times = round(min(max(drawn, 1), stretch))
    highest = min(times * length, target_length) - 1 - tail
    last = rng.integers(min(end + times * middle, highest), highest, endpoint=True)
    return _shifted(
        np.array([end, middle, tail]),
        np.array([0, last + 1 - middle - end, target_length - length]),
    )


def uniform_slots(segment_lengths, target_length, rng) -> Int32[np.ndarray, "L"]:
    """Each of the T - L unused positions goes behind a segment drawn for it alone, all equally likely."""
    lengths = _checked(segment_lengths, target_length)
    count = len(lengths)
    gaps = rng.multinomial(_slack(lengths, target_length), np.full(count, 1 / count))
    return _shifted(lengths, np.cumsum(gaps) - gaps)


def power_law(segment_lengths, target_length, rng) -> Int32[np.ndarray, "L"]:
    """Gaps behind the segments in the proportion of draws from a Pareto distribution of exponent 1."""
    lengths = _checked(segment_lengths, target_length)
    return _in_proportion(lengths, target_length, 1 + rng.pareto(1.0, len(lengths)))


def geometric(segment_lengths, target_length, rng) -> Int32[np.ndarray, "L"]:
    """Gaps of half the slack, a quarter of it, ..., behind segments in a random order."""
    lengths = _checked(segment_lengths, target_length)
    return _in_proportion(lengths, target_length, rng.permutation(0.5 ** np.arange(len(lengths))))


def few_gaps(segment_lengths, target_length, rng) -> Int32[np.ndarray, "L"]:
    """Algorithm 1 over 5 runs of whole segments (all of them, where there are fewer), cut at random."""
    lengths = _checked(segment_lengths, target_length)
    cuts = min(_RUNS_BETWEEN_FEW_GAPS, len(lengths)) - 1
    starts = 1 + _distinct(len(lengths) - 1, cuts, rng)
    return longrecipe(_runs(lengths, starts), target_length, rng)


def paragraphs(segment_lengths, target_length, rng) -> Int32[np.ndarray, "L"]:
    """Algorithm 1 over runs of 5 segments, of which the first is shorter at random, so that every end is used."""
    lengths = _checked(segment_lengths, target_length)
    first = rng.integers(1, _SENTENCES_OF_A_PARAGRAPH, endpoint=True)
    starts = np.arange(first, len(lengths), _SENTENCES_OF_A_PARAGRAPH)
    return longrecipe(_runs(lengths, starts), target_length, rng)


def fixed_segments(segment_lengths, target_length, rng) -> Int32[np.ndarray, "L"]:
    """Algorithm 1 with as many segments, all of one length (to a token), instead of those of the text."""
    lengths = _checked(segment_lengths, target_length)
    count = len(lengths)
    ends = np.arange(count + 1) * lengths.sum() // count
    return longrecipe(np.diff(ends), target_length, rng)


def inside_gaps(segment_lengths, target_length, rng) -> Int32[np.ndarray, "L"]:
    """Algorithm 1 with every segment of two tokens and more cut once, at a random place."""
    lengths = _checked(segment_lengths, target_length)
    heads = rng.integers(1, np.maximum(lengths, 2))
    pieces = np.stack([heads, lengths - heads], axis=1).ravel()
    return longrecipe(pieces[pieces > 0], target_length, rng)


TRANSFORMS: dict[str, Transform] = {
    transform.__name__: transform
    for transform in (
        full, contiguous, longrecipe, longrecipe_code, rpes, pose, pose_code, cream,
        uniform_slots, power_law, geometric, few_gaps, paragraphs, fixed_segments, inside_gaps,
    )
}  # fmt: skip


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


def coverage(
    positions: Iterable[Int32[np.ndarray, "L"]], target_length: int, bins: int = 40
) -> dict[str, list[float]]:
    """Which positions of the window, and which distances between two tokens of a text, drawn samples reach.

    Returns:
        `positions`, `distances`: shares over `bins` equal parts of the window, each with sum 1. Distances are of all
        pairs among at most 400 evenly spaced tokens of each sample.
    """
    edges = np.linspace(0, target_length, bins + 1)
    used, reached = np.zeros((2, bins))
    for drawn_L in positions:
        used += np.histogram(drawn_L, edges)[0]
        few = drawn_L[np.unique(np.linspace(0, len(drawn_L) - 1, 400).astype(int))]
        first, second = np.triu_indices(len(few), 1)
        reached += np.histogram(few[second] - few[first], edges)[0]
    if not used.sum():
        raise UserError("coverage: no positions were given; at least one array is needed")
    return {
        "positions": (used / used.sum()).tolist(),
        "distances": (reached / max(reached.sum(), 1)).tolist(),
    }


def _slack(lengths, target_length: int) -> int:
    """T - L: the positions of the window that no token gets."""
    return target_length - int(lengths.sum())


def _shifted(lengths, shift) -> Int32[np.ndarray, "L"]:
    """0..L-1 with each segment moved on by its shift."""
    shift = np.asarray(shift, np.int32)
    return np.arange(lengths.sum(), dtype=np.int32) + np.repeat(shift, lengths)


def _in_proportion(lengths, target_length: int, weights) -> Int32[np.ndarray, "L"]:
    """The slack laid behind the segments in proportion to their weights, the last one's behind the text."""
    share = np.concatenate([[0.0], np.cumsum(weights)[:-1]]) / weights.sum()
    return _shifted(lengths, (share * _slack(lengths, target_length)).astype(np.int64))


def _runs(lengths, starts) -> np.ndarray:
    """The lengths of runs of segments; a new run begins at each of `starts` (ascending, above 0)."""
    return np.add.reduceat(lengths, np.concatenate([[0], starts]).astype(np.int64))


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
