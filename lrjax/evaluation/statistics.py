"""Intervals for the figures of an evaluation: how far off a share or a mean of few samples may be.

low, high = wilson_interval(successes=47, count=50)
mean, (low, high) = mean_interval(sums, counts)        # one sum and one count for each document
mean, (low, high) = t_interval([.94, .97, .91])        # of runs with different seeds
paired(with_it, without)                               # the same seeds with and without something
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtr, stdtrit


def wilson_interval(successes: float, count: int, z: float = 1.96) -> list[float]:
    """Wilson's score interval [low, high] of a share; z = 1.96 gives 95 %. Of nothing it is [0, 1].

    `successes` may be a sum of scores from 0 to 1: their variance is at most that of a share with the same mean, so
    the interval is wide enough.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference (1927).
    """
    if not 0 <= successes <= count:
        raise ValueError(f"{successes} successes of {count}: must be between 0 and the count")
    if not count:
        return [0.0, 1.0]
    share = successes / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return [max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)]


def mean_interval(
    sums: Sequence[float], counts: Sequence[int], level: float = 0.95
) -> tuple[float, list[float] | None]:
    """The mean sum(sums) / sum(counts) and its interval, documents being what was drawn at random.

    Tokens of one document are alike, so the spread is taken between documents: the ratio estimator's
    linearised standard error with Student's t.

    Args:
      sums: of each document, the sum over its tokens.
      counts: of each document, the number of its tokens, positive.

    Returns:
      (mean, [low, high]); the interval is None for a single document, which says nothing of others.
    """
    sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    documents, total = len(sums), counts.sum()
    mean = float(sums.sum() / total)
    if documents < 2:
        return mean, None
    residuals = sums - mean * counts
    error = math.sqrt(documents / (documents - 1) * float(np.sum(residuals**2))) / total
    reach = float(stdtrit(documents - 1, (1 + level) / 2)) * error
    return mean, [mean - reach, mean + reach]


def t_interval(
    values: Sequence[float], level: float = 0.95
) -> tuple[float, tuple[float, float] | None]:
    """The mean of a few independent figures and Student's interval for it; None for a single one."""
    values = np.asarray(values, np.float64)
    if not len(values):
        raise ValueError("t_interval: no values; one or more are needed")
    mean = float(values.mean())
    if len(values) < 2:
        return mean, None
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    reach = float(stdtrit(len(values) - 1, (1 + level) / 2)) * error
    return mean, (mean - reach, mean + reach)


def paired(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> dict:
    """Of pairs (the same seed, two methods): the mean of first - second, its interval and two tests against 0.

    Returns:
        {"count", "mean", "interval" (None for one pair), "p_t": Student's paired test, "p_sign": the share of all
        2^n ways to swap within pairs that give a mean as far from 0 as this one (exact; at five pairs it cannot
        be below 2/32)}. Both are two-sided; of one pair they are 1.

    Raises:
        ValueError: lists of different lengths, none, or over 20 pairs (2^20 swaps).
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape or not 1 <= len(first) <= 20:
        raise ValueError(f"paired: {len(first)} and {len(second)} values; 1 to 20 pairs are needed")
    difference = first - second
    count = len(difference)
    mean, interval = t_interval(difference, level)
    p_t = 1.0
    if count > 1 and mean:
        error = float(difference.std(ddof=1)) / math.sqrt(count)
        p_t = 2 * float(stdtr(count - 1, -abs(mean) / error)) if error else 0.0
    signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
    swapped = np.abs(signs @ difference) / count
    p_sign = float(np.mean(swapped >= abs(mean) * (1 - 1e-12)))
    return {"count": count, "mean": mean, "interval": interval, "p_t": p_t, "p_sign": p_sign}
