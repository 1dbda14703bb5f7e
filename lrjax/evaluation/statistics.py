"""Intervals for the figures of an evaluation: how far off a share or a mean of few samples may be.

low, high = wilson_interval(successes=47, count=50)
mean, (low, high) = mean_interval(sums, counts)        # one sum and one count for each document
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit


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
