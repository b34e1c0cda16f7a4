"""Comparisons of what engines answered, as engine_runs.py returns it."""

from __future__ import annotations

import re
from typing import Any

Completions = list[dict[str, list[Any]]]

NEAR_TIE = 0.04
"""Float16 logits between 16 and 32 are multiples of 1/64: two of them, off by one each, swap."""

CODED = 1.0
"""For pages of codes, where what differs in the last bit may be stored as another one: with 4 bits that moved
the probe's logprobs by up to .47 on an H200, and two tokens by .61 against each other on a CPU."""

NEAR_TIES = {"float16": NEAR_TIE, "bfloat16": 0.13}
"""Of logits below 16: two of them, off by one each, swap."""

ROUNDING = {"float16": 0.008, "bfloat16": 0.03}
"""More than this the mean difference of log-probabilities is not for two orders of the same additions."""


def first_difference(have: list[int], want: list[int]) -> int | None:
    """Where two token sequences part, if they do."""
    assert len(have) == len(want)
    return next((i for i, (a, b) in enumerate(zip(have, want, strict=True)) if a != b), None)


def assert_same_greedy_tokens(
    have: Completions, want: Completions, ties: int, near: float = NEAR_TIE
) -> None:
    """Identical, except from where `want` itself had two tokens as good as equal, in `ties` requests."""
    assert len(have) == len(want)
    parted = {}
    for request, (mine, theirs) in enumerate(zip(have, want, strict=True)):
        at = first_difference(mine["tokens"], theirs["tokens"])
        if at is not None:
            parted[request] = (at, theirs["gaps"][at])
    assert all(gap < near for _, gap in parted.values()), parted
    assert len(parted) <= ties, parted


def share_right(answers: dict[str, Any]) -> float:
    """Of questions."""
    return sum(answers["right"]) / len(answers["right"])


def error(found: dict[str, Any], auto: dict[str, Any]) -> float:
    """The mean difference of log-probabilities of the prompts' tokens."""
    pairs = list(zip(found["logprobs"], auto["logprobs"], strict=True))
    assert len(pairs) > 400
    return sum(abs(mine - theirs) for mine, theirs in pairs) / len(pairs)


def assert_attention_is_that_of_auto(ways: dict[str, dict[str, Any]], dtype: str, window: int) -> None:
    """Of a scenario `attentions`: 16-bit pages give auto's tokens up to ties; codes stay near.

    In chunks, after preemption, from cached prefixes, speculating, in one group. Weights are random, whose
    attention is as sensitive as any.
    """
    auto = ways["auto"]
    exact = {way: found for way, found in ways.items() if way not in ("auto", "coded")}
    assert "lossless" in exact
    for way, found in exact.items():
        for schedule in ("crowd", "first", "cached"):
            for mine, theirs in zip(found[schedule], auto[schedule], strict=True):
                at = first_difference(mine["tokens"], theirs["tokens"])
                assert at is None or theirs["gaps"][at] < NEAR_TIES[dtype], (way, schedule, at)
        assert error(found, auto) < ROUNDING[dtype], way
        assert found["cached tokens"] == auto["cached tokens"]
        assert min(found["cached tokens"]) > 2 * window
        assert found["preemptions"] > 0
    if "speculating" in ways:
        assert ways["speculating"]["accepted"] > 20
    coded = ways["coded"]
    assert ROUNDING[dtype] / 2 < error(coded, auto) < 0.4
    assert coded["cached tokens"] == auto["cached tokens"]


_CENTRED = re.compile(
    r"keys of (\d+) layers centred by a pass over (\d+) random tokens in ([\d.]+) s: "
    r"([\d.]+)% of their energy removed; tables ([0-9a-f]{12})(?:; not centred[^:]*: (.*))?"
)


def centring_lines(log: str) -> list[tuple[str, ...]]:
    """Of every such line: layers, tokens, seconds, percent, tables, and what was not reached."""
    return _CENTRED.findall(log)
