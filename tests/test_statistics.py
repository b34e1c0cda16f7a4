"""Intervals and verdicts of paired differences, against a search for the likelihood and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("scipy")
from scipy.optimize import minimize_scalar

from vllm_polarquant.eval.statistics import Difference, Z, paired, score_interval, standard_error, verdict

RNG = np.random.default_rng(1)


def outcomes(values: np.ndarray) -> np.ndarray:
    """Documents of weight 1."""
    return np.stack([values.astype(float), np.ones(len(values))], 1)


def score(gained: int, lost: int, n: int, delta: float) -> float:
    """The score statistic with the nuisance parameter found by search instead of in closed form."""

    def minus_log_likelihood(share: float) -> float:
        counts, shares = (gained, lost, n - gained - lost), (share + delta, share, 1 - 2 * share - delta)
        return -sum(k * math.log(max(p, 1e-300)) for k, p in zip(counts, shares, strict=True) if k)

    bounds = (max(0.0, -delta), (1 - delta) / 2)
    share = minimize_scalar(minus_log_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    return (gained - lost - n * delta) / math.sqrt(n * (2 * share + delta - delta**2))


@pytest.mark.parametrize(
    ("gained", "lost", "n"), [(3, 5, 40), (12, 2, 54), (1, 9, 1319), (7, 7, 30), (4, 1, 9)]
)
def test_score_interval_ends_where_the_test_rejects(gained: int, lost: int, n: int) -> None:
    low, high = score_interval(gained, lost, n)
    assert low < (gained - lost) / n < high
    assert score(gained, lost, n, low) == pytest.approx(Z, abs=1e-3)
    assert score(gained, lost, n, high) == pytest.approx(-Z, abs=1e-3)
    assert score_interval(lost, gained, n) == pytest.approx((-high, -low))


@pytest.mark.parametrize("n", [1, 8, 1319])
def test_no_change_is_not_certainty(n: int) -> None:
    low, high = score_interval(0, 0, n)
    assert (-low, high) == pytest.approx((Z**2 / (n + Z**2),) * 2, abs=1e-6)
    found = paired(outcomes(np.ones(n)), outcomes(np.ones(n)))
    assert (found.low, found.high, found.changed) == (low, high, 0)


def test_every_document_lost_is_worse() -> None:
    low, high = score_interval(0, 20, 20)
    assert low == -1 and -1 < high < -0.6


@pytest.mark.parametrize(("n", "gain", "loss"), [(30, 0.03, 0.1), (200, 0.01, 0.02), (60, 0.2, 0.2)])
def test_score_interval_covers_the_truth(n: int, gain: float, loss: float) -> None:
    hits = 0
    for gained, lost, _ in RNG.multinomial(n, [gain, loss, 1 - gain - loss], 1500):
        low, high = score_interval(int(gained), int(lost), n)
        hits += low <= gain - loss <= high
    assert 0.93 <= hits / 1500 <= 0.985


def test_interval_of_weighted_documents_covers_the_truth() -> None:
    """Nats over words, few documents of unequal length: as with texts."""
    hits = 0
    for _ in range(1500):
        words = RNG.integers(50, 400, 15).astype(float)
        base = np.stack([RNG.normal(4, 1, 15) * words, words], 1)
        have = base + np.stack([RNG.normal(0.1 * words, np.sqrt(words)), np.zeros(15)], 1)
        found = paired(base, have)
        hits += found.low <= 0.1 <= found.high
    assert 0.93 <= hits / 1500 <= 0.98


def test_plain_numbers_get_the_paired_t_interval() -> None:
    from scipy.stats import ttest_rel

    base, have = RNG.normal(size=25), RNG.normal(0.2, 1, 25)
    want = ttest_rel(have, base).confidence_interval(0.95)
    found = paired(outcomes(base), outcomes(have))
    assert (found.low, found.high) == pytest.approx((want.low, want.high))
    assert standard_error(outcomes(base)) == pytest.approx(base.std(ddof=1) / 5)


def test_shares_that_do_not_change_are_not_certain_either() -> None:
    """Means over repeats: 30 problems, none changed, or one by a quarter."""
    base = outcomes(np.repeat([0.25, 0.5, 1.0], 10))
    none = paired(base, base)
    assert none.high == -none.low == pytest.approx(Z**2 / (30 + Z**2))
    have = base.copy()
    have[0, 0] += 0.25
    one = paired(base, have)
    assert one.changed == 1 and one.low < 0 and one.high - one.mean >= 0.25 * Z**2 / (30 + Z**2) - 1e-9


def test_documents_that_a_metric_leaves_out_do_not_count() -> None:
    base, have = outcomes(np.array([1, 0, 1])), outcomes(np.array([1, 1, 1]))
    base[2] = have[2] = 0
    assert (paired(base, have).documents, paired(base, have).mean) == (2, 0.5)
    with pytest.raises(ValueError, match="no document has"):
        paired(base[2:], have[2:])
    with pytest.raises(ValueError, match="not of the same documents"):
        paired(base, have[:2])


@pytest.mark.parametrize(
    ("low", "high", "higher", "words"),
    [
        (-0.0123, 0.0041, True, "no difference seen above 1.3 points (n = 50)"),
        (-0.034, -0.012, True, "worse by 1.2-3.4 points (n = 50)"),
        (0.012, 0.034, True, "better by 1.2-3.4 points (n = 50)"),
        (0.012, 0.034, False, "worse by 1.2-3.4 points (n = 50)"),
        (-0.5, 0.3241, True, "no difference seen above 50 points (n = 50)"),
        (-math.inf, math.inf, True, "too few documents to tell (n = 50)"),
        (0.0, 0.0, True, "the same on every document (n = 50)"),
    ],
)
def test_verdicts(low: float, high: float, higher: bool, words: str) -> None:
    assert verdict(Difference((low + high) / 2, low, high, 50, 3), higher) == words


def test_one_document_of_nats_tells_nothing() -> None:
    found = paired(np.array([[300.0, 90.0]]), np.array([[310.0, 90.0]]))
    assert verdict(found, False).startswith("too few documents")
