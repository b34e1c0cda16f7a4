"""Sentences of the accuracy page that follow from its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from vllm_polarquant.eval.dtypes import BASELINE
from vllm_polarquant.eval.report.page import Report
from vllm_polarquant.eval.statistics import Z
from vllm_polarquant.format import DEFAULT_PRESET

NEAR = 0.1
"""Dtypes whose bytes differ by no more than this share are compared as equally large."""


def of_measure(found: Report, measure: str) -> dict[str, dict[str, Any]]:
    """Summaries by dtype of the first cell of a measure."""
    for part in found["cells"].values():
        if part["measure"] == measure:
            return {name: part["summaries"][name] for name in found["dtypes"] if name in part["summaries"]}
    return {}


def kl_ratio(mine: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float, float] | None:
    """KL of one summary over another's with a 95 % interval, the two errors taken as independent."""
    if min(mine["kl"], theirs["kl"]) <= 0:
        return None
    relative = [s["kl_standard_error"] / s["kl"] for s in (mine, theirs)]
    middle, spread = mine["kl"] / theirs["kl"], math.exp(Z * math.hypot(*relative))
    return middle, middle / spread, middle * spread


def _kl_verdicts(found: Report) -> list[str]:
    """Each of our dtypes beside the best other dtype of its size, or what else loses no more."""
    scored = {name: s for name, s in of_measure(found, "next_token").items() if "kl" in s}
    sizes = {name: found["dtypes"][name]["bytes"] for name in scored}
    others = [name for name in scored if not found["dtypes"][name]["ours"] and sizes[name]]
    said = []
    for name in [name for name in scored if found["dtypes"][name]["ours"] and sizes[name]]:
        near = [other for other in others if abs(sizes[other] / sizes[name] - 1) <= NEAR]
        kl = f"`{name}` ({sizes[name]:,} bytes a token): KL {scored[name]['kl']:.4f}"
        if near:
            best = min(near, key=lambda other: scored[other]["kl"])
            ratio = kl_ratio(scored[name], scored[best])
            against = f"{scored[best]['kl']:.4f} of `{best}` ({sizes[best]:,} bytes)"
            if ratio is None:
                said.append(f"{kl} beside {against}.")
                continue
            middle, low, high = ratio
            verdict = "less" if high < 1 else "more" if low > 1 else "no difference seen"
            said.append(f"{kl}, {middle:.2f}x ({low:.2f}-{high:.2f}) the {against}: {verdict}.")
        elif good := [other for other in others if scored[other]["kl"] <= scored[name]["kl"]]:
            best = min(good, key=lambda other: sizes[other])
            said.append(
                f"{kl}; no other dtype is within {100 * NEAR:g} % of its size; the smallest other one that "
                f"loses no more is `{best}` ({sizes[best]:,} bytes)."
            )
        elif others:
            said.append(f"{kl}; no other dtype is within {100 * NEAR:g} % of its size, and none loses less.")
    return said


def _front_verdict(found: Report) -> list[str]:
    scored = {name: s["kl"] for name, s in of_measure(found, "next_token").items() if "kl" in s}
    sizes = {name: found["dtypes"][name]["bytes"] for name in scored if found["dtypes"][name]["bytes"]}
    front = [
        name
        for name in sizes
        if not any(
            sizes[o] <= sizes[name]
            and scored[o] <= scored[name]
            and (sizes[o], scored[o]) != (sizes[name], scored[name])
            for o in sizes
        )
    ]
    beaten = [name for name in sizes if name not in front]
    if not sizes or not beaten:
        return []
    names: Callable[[list[str]], str] = lambda some: ", ".join(f"`{name}`" for name in some)  # noqa: E731
    return [
        f"No measured dtype has both fewer bytes and less KL than {names(front)}; beaten in both: "
        f"{names(beaten)}."
    ]


def _perplexity_verdicts(found: Report) -> list[str]:
    scored = {name: s for name, s in of_measure(found, "next_token").items() if "nll_difference" in s}
    unseen = [
        name
        for name, s in scored.items()
        if abs(s["nll_difference"]) <= Z * s["nll_difference_standard_error"]
    ]
    sized = [name for name in unseen if found["dtypes"][name]["bytes"]]
    if not sized:
        return (
            [f"Every dtype but {BASELINE} changes the perplexity by more than its 95 % interval."]
            if scored
            else []
        )
    least = min(sized, key=lambda name: found["dtypes"][name]["bytes"])
    bound = max(
        math.expm1(scored[least]["nll_difference"] + Z * scored[least]["nll_difference_standard_error"]), 0
    )
    return [
        f"The smallest dtype whose perplexity does not differ from {BASELINE}'s by more than its 95 % "
        f"interval: `{least}` (no rise above {bound:.1%})."
    ]


def _retrieval_verdicts(found: Report) -> list[str]:
    scored = of_measure(found, "retrieval")
    if BASELINE not in scored or len(scored) < 2:
        return []
    base = scored[BASELINE]["right"], scored[BASELINE]["of"]
    lost = {name: base[0] - s["right"] for name, s in scored.items() if s["right"] < base[0]}
    kept = [name for name in scored if name not in lost and found["dtypes"][name]["bytes"]]
    least = min(kept, key=lambda name: found["dtypes"][name]["bytes"])
    said = f"Retrieval: {BASELINE} answers {base[0]} of {base[1]}, and `{least}` is the smallest to do so"
    fewer = ", ".join(f"`{name}` {count}" for name, count in lost.items())
    return [f"{said}; answers lost: {fewer}." if lost else f"{said}; no dtype answers fewer."]


def verdicts(found: Report) -> list[str]:
    """Sentences that follow from the numbers."""
    said = _kl_verdicts(found)
    said.sort(key=lambda line: not line.startswith(f"`{DEFAULT_PRESET}`"))
    return [*said, *_front_verdict(found), *_perplexity_verdicts(found), *_retrieval_verdicts(found)]
