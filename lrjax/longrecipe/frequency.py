"""How often each class of tokens is among the most changed, position by position, and whether the change is flat.

    class_frequency(classes_NL, top_NL, names)       # the paper's curves: NUM at about 0.4 at every position
    flatness(delta_NL, classes_NL, top_NL)           # is there anything for selection to hold on to?

`classes_NL` and `top_NL` are those of `impact.py`: N samples, L positions, class -1 where there is no token. Index
t - 1 is about token t.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int8

_REPLICATES = 500
_SHIFTS = 199
_MOST_TOKENS = 2**20  # that the test of flatness looks at


def class_frequency(
    classes_NL: Int8[np.ndarray, "N L"],
    top_NL: Bool[np.ndarray, "N L"],
    names: Sequence[str],
    *,
    buckets: int = 32,
    smoothing: float = 1.0,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict:
    """The share of each class among the top tokens by range of positions (arXiv 2409.00509, figure of section 3).

    Args:
        buckets: ranges of positions.
        smoothing: deviation of a Gaussian over neighbouring ranges, in ranges, that counts are summed with; 0: none.
        confidence: of the interval, a bootstrap over samples, for each value alone.

    Returns:
        {"start": [the first token of each range], "classes": {name: {"share", "low", "high": a value for each range}}},
        of the classes that are in the top at all; None where a range has no top token.
    """
    samples, length = classes_NL.shape
    borders = np.unique(np.linspace(0, length, min(buckets, length) + 1).astype(int))
    present = [index for index in range(len(names)) if (top_NL & (classes_NL == index)).any()]
    counts_CNP = np.stack(
        [
            np.add.reduceat((top_NL & (classes_NL == index)).astype(np.int64), borders[:-1], axis=1)
            for index in present
        ]
    )
    ranges = np.arange(len(borders) - 1)
    if smoothing:
        kernel_PP = np.exp(-0.5 * ((ranges[:, None] - ranges) / smoothing) ** 2)
        counts_CNP = counts_CNP @ kernel_PP
    draws_RN = np.random.default_rng(seed).multinomial(
        samples, np.full(samples, 1 / samples), _REPLICATES
    )
    draws_RN[0] = 1  # the samples as they are
    counts_CRP = draws_RN @ counts_CNP
    total_RP = counts_CRP.sum(axis=0)
    share_CRP = np.where(total_RP > 0, counts_CRP / np.maximum(total_RP, 1e-12), np.nan)
    there_P = total_RP[0] > 0
    tail = (1 - confidence) / 2

    def values(row_P) -> list:
        return [float(v) if there else None for v, there in zip(row_P, there_P, strict=True)]

    classes = {}
    for share_RP, index in zip(share_CRP, present, strict=True):
        low_P, high_P = np.full((2, len(ranges)), np.nan)
        low_P[there_P], high_P[there_P] = np.nanquantile(
            share_RP[:, there_P], [tail, 1 - tail], axis=0
        )
        classes[names[index]] = {
            "share": values(share_RP[0]), "low": values(low_P), "high": values(high_P),
        }  # fmt: skip
    return {"start": (borders[:-1] + 1).tolist(), "classes": classes}


def flatness(
    delta_NL: Float[np.ndarray, "N L"],
    classes_NL: Int8[np.ndarray, "N L"],
    top_NL: Bool[np.ndarray, "N L"],
    *,
    seed: int = 0,
) -> dict:
    """Whether the most changed tokens are spread over the classes as if by chance.

    The statistic is chi-squared of class against top. What it is by chance is found by moving the classes of every
    sample round by a random number of tokens: neighbours stay neighbours, so that tokens that change together do
    not count as independent, and only the link between class and change is lost.

    Returns:
        {"p_value", "concentration": the part of all rises that the top tokens hold (equal rises: the top fraction;
        None where nothing rises), "warning": None, or the line that says that selection has little to hold on to}.
    """
    valid_NL = classes_NL >= 0
    fraction = (top_NL & valid_NL).sum() / max(valid_NL.sum(), 1)
    rises_NL = np.where(valid_NL, np.maximum(delta_NL, 0), 0)
    total = float(rises_NL.sum(dtype=np.float64))
    held = float(rises_NL[top_NL].sum(dtype=np.float64)) / total if total else None

    rng = np.random.default_rng(seed)
    rows = [
        (classes[valid].astype(np.int64), top[valid])
        for classes, top, valid in zip(classes_NL, top_NL, valid_NL, strict=True)
        if valid.any()
    ]
    rows = rows[: max(1, _MOST_TOKENS // classes_NL.shape[1])]
    size = int(classes_NL.max()) + 1

    def statistic(shifts) -> float:
        counts = np.zeros((size, 2))
        for (classes, top), shift in zip(rows, shifts, strict=True):
            moved = np.roll(classes, shift)
            counts += np.bincount(2 * moved + top, minlength=2 * size).reshape(size, 2)
        expected = counts.sum(1, keepdims=True) * counts.sum(0) / counts.sum()
        return float(np.sum((counts - expected) ** 2 / np.maximum(expected, 1e-12)))

    found = statistic(np.zeros(len(rows), int))
    lengths = np.array([len(classes) for classes, _ in rows])
    by_chance = [statistic(rng.integers(lengths)) for _ in range(_SHIFTS)]
    # A tie counts against a finding; the small number is for sums in another order.
    p_value = (1 + sum(value >= found - 1e-9 for value in by_chance)) / (1 + _SHIFTS)
    warning = None
    if p_value > 0.05:
        warning = (
            f"the change is flat: the most changed {fraction:.0%} of tokens are of no class more than by chance "
            f"(p = {p_value:.2f}); a selection by class or by score has little to hold on to"
        )
    elif held is not None and held < 1.1 * fraction:
        warning = (
            f"the change is nearly uniform: the top {fraction:.0%} of tokens hold {held:.0%} of all rises; "
            "a selection by score has little to hold on to"
        )
    return {"p_value": float(p_value), "concentration": held, "warning": warning}
