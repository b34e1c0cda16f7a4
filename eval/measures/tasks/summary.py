"""A cell's summary: every metric with its standard error, by task, and against the baseline."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vllm_polarquant.eval import statistics
from vllm_polarquant.eval.measures.base import Outcome
from vllm_polarquant.eval.measures.tasks.outcomes import NATS, RIGHT_CHOICE
from vllm_polarquant.eval.measures.tasks.params import Params


def _shown(metric: str, mean: float) -> float:
    """A mean of nats as lm-eval shows the metric."""
    name = metric.split(",")[0]
    if name not in NATS:
        return mean
    return mean / math.log(2) if name == "bits_per_byte" else math.exp(min(mean, 700))


def _primary(params: Params, arrays: dict[str, np.ndarray], results: dict[str, Any]) -> str:
    metrics = [name for name in arrays if name not in ("documents", "tasks")]
    wanted = params.metric
    if not wanted:
        listed = [name for found in results["all"].values() for name in found if name in metrics]
        wanted = listed[0] if listed else metrics[0] if metrics else ""
    if wanted not in metrics:
        raise ValueError(
            f"{params.task} has no metric {wanted!r} by document; it has {', '.join(metrics) or 'none'}"
        )
    return wanted


def _against(metric: str, higher: bool, base: Outcome, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    found = statistics.paired(base.arrays[metric], arrays[metric])
    name = metric.split(",")[0]
    unit, scale = "points", None
    if name in NATS:
        unit, scale = "%", lambda nats: 100 * math.expm1(nats)
    if name == "bits_per_byte":
        unit, scale = "bits per byte", lambda nats: nats / math.log(2)
    if name == RIGHT_CHOICE:
        unit, scale = "nats", lambda nats: nats
    return {
        "difference": found.mean,
        "low": found.low,
        "high": found.high,
        "changed": found.changed,
        "documents": found.documents,
        "verdict": statistics.verdict(found, higher, unit, scale),
    }


def summarise(
    params: Params, arrays: dict[str, np.ndarray], results: dict[str, Any], baseline: Outcome | None
) -> dict[str, Any]:
    """The summary of a cell: every metric with its standard error, by task, and against the baseline.

    results: lm-eval's of one run, "all" by task and group and "higher_is_better" by task; its standard error
    is taken where it has one of the whole, else that of the documents. Errors and differences of perplexities
    are of the mean of nats.
    """
    primary = _primary(params, arrays, results)
    better = {
        name: bool(value)
        for found in results.get("higher_is_better", {}).values()
        for name, value in found.items()
        if value is not None
    }
    whole = results["all"].get(params.task, {})
    metrics: dict[str, Any] = {}
    for metric in (name for name in arrays if name not in ("documents", "tasks")):
        values = arrays[metric]
        total, weight = values.sum(0)
        if not weight:
            continue
        name, _, filtered = metric.partition(",")
        theirs = whole.get(f"{name}_stderr,{filtered}")
        used = params.repeats == 1 and name not in NATS and isinstance(theirs, float)
        metrics[metric] = {
            "value": _shown(metric, float(total / weight)),
            "standard_error": theirs if used else statistics.standard_error(values[values[:, 1] > 0]),
            "documents": int((values[:, 1] > 0).sum()),
        }
    by_task = {
        str(task): _shown(primary, float(part[:, 0].sum() / part[:, 1].sum()))
        for task in dict.fromkeys(arrays["tasks"])
        if (part := arrays[primary][arrays["tasks"] == task])[:, 1].sum()
    }
    summary: dict[str, Any] = {"task": params.task, "metric": primary, "metrics": metrics, "by_task": by_task}
    if baseline is not None:
        if not np.array_equal(baseline.arrays["documents"], arrays["documents"]):
            raise RuntimeError("the baseline's result is of other documents; delete it and run again")
        summary["against_baseline"] = {
            metric: _against(
                metric,
                metric.split(",")[0] not in NATS and better.get(metric.split(",")[0], True),
                baseline,
                arrays,
            )
            for metric in metrics
            if metric in baseline.arrays
        }
    return summary
