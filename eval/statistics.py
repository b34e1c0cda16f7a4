"""What a difference between two dtypes on the same documents says, and what it leaves open.

Every document is scored with the baseline and with another dtype, so that only what changed counts. The
interval depends on what a document's outcome is:

* right or wrong: Tango's score interval for paired proportions, which inverts a test instead of estimating a
  variance. With no document changed it is +- z^2 / (n + z^2) and not a point: nothing changed among 10
  documents says little about the next one.
* any other number (a log-likelihood with its number of words, a share of instructions followed, a mean over
  repeats): Student's t on the documents' differences, weighted as the metric weighs them. For scores between
  0 and 1 it is never narrower than the interval of no change times the largest change seen.

Documents are taken as independent. Intervals hold 95 times in 100: of twenty comparisons one may miss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

LEVEL = 0.95
"""How often an interval holds; every one that is shown."""

Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
"""Standard errors on either side of an estimate, 1.96."""


@dataclass(frozen=True)
class Difference:
    """A metric's mean with a dtype minus that with the baseline, and its 95 % confidence interval.

    documents: how many count in it; changed: on how many the outcomes differ.
    """

    mean: float
    low: float
    high: float
    documents: int
    changed: int


def score_interval(gained: int, lost: int, documents: int) -> tuple[float, float]:
    """Tango's interval for a difference of paired proportions (Statistics in Medicine 17, 1998).

    Args:
        gained: documents wrong before and right after.
        lost: documents right before and wrong after.
        documents: all of them, at least one.
    """
    n, estimate = documents, (gained - lost) / documents

    def statistic(delta: float) -> float:
        """The score test of a true difference of delta; falls as delta grows."""
        # The share of `lost` that is likeliest if the difference is delta.
        a, b, c = 2 * n, -gained - lost + (2 * n - gained + lost) * delta, -lost * delta * (1 - delta)
        share = max((math.sqrt(max(b * b - 4 * a * c, 0)) - b) / (2 * a), 0)
        variance = n * (2 * share + delta * (1 - delta))
        distance = gained - lost - n * delta
        return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)

    def solve(inside: float, outside: float, target: float) -> float:
        for _ in range(60):
            middle = (inside + outside) / 2
            if abs(statistic(middle)) < target:
                inside = middle
            else:
                outside = middle
        return outside

    low = -1.0 if estimate == -1 else solve(estimate, -1.0, Z)
    high = 1.0 if estimate == 1 else solve(estimate, 1.0, Z)
    return low, high


def standard_error(values: np.ndarray) -> float:
    """Standard error of sum / weight over documents' (sum, weight) [D, 2]; NaN for fewer than two."""
    n, weight = len(values), values[:, 1].sum()
    if n < 2:
        return math.nan
    residual = values[:, 0] - values[:, 0].sum() / weight * values[:, 1]
    return float(math.sqrt(n / (n - 1) * (residual**2).sum()) / weight)


def paired(base: np.ndarray, have: np.ndarray) -> Difference:
    """Compare documents' (sum, weight) float64 [D, 2]; the metric is the quotient of the columns' totals.

    Documents of weight 0 do not count.

    Raises:
        ValueError: if the weights differ, so that these are not the same documents, or none counts.
    """
    if base.shape != have.shape or not np.array_equal(base[:, 1], have[:, 1]):
        raise ValueError("the two results are not of the same documents")
    counts = base[:, 1] > 0
    base, have = base[counts], have[counts]
    n = len(base)
    if not n:
        raise ValueError("no document has this metric")
    weights, change = base[:, 1], have[:, 0] - base[:, 0]
    changed = int((change != 0).sum())
    mean = float(change.sum() / weights.sum())
    both = np.concatenate([base[:, 0], have[:, 0]])
    if (weights == 1).all() and np.isin(both, (0, 1)).all():
        low, high = score_interval(int((change > 0).sum()), int((change < 0).sum()), n)
        return Difference(mean, low, high, n, changed)
    half = math.inf
    if n > 1:
        from scipy.stats import t

        half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * standard_error(np.stack([change, weights], 1))
    if (both >= 0).all() and (both <= np.tile(weights, 2)).all():
        largest = float(np.abs(change / weights).max()) or 1.0
        half = min(max(half, largest * Z**2 / (n + Z**2)), 1.0)
    return Difference(mean, mean - half, mean + half, n, changed)


def _up(value: float) -> str:
    """Two significant digits, rounded away from zero: a limit must not look tighter than it is."""
    if value == 0:
        return "0"
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / step - 1e-9) * step:.2g}" if value < 10 else f"{math.ceil(value - 1e-9)}"


def verdict(found: Difference, higher_is_better: bool = True, unit: str = "points", scale: Any = None) -> str:
    """The interval in words: worse, better, or no difference seen above so much.

    Args:
        found: the difference.
        higher_is_better: of the metric.
        unit: of what scale returns.
        scale: difference -> number to print; by default a share in points of 100.
    """
    scale = scale or (lambda share: 100 * share)
    n = f"(n = {found.documents})"
    if not math.isfinite(found.low + found.high):
        return f"too few documents to tell {n}"
    if found.low == found.high == 0:
        return f"the same on every document {n}"
    ends = sorted(abs(scale(end)) for end in (found.low, found.high))
    if found.low <= 0 <= found.high:
        return f"no difference seen above {_up(ends[1])} {unit} {n}"
    word = "better" if (found.low > 0) == higher_is_better else "worse"
    return f"{word} by {ends[0]:.2g}-{_up(ends[1])} {unit} {n}"
