"""The registry of measures: what can be asked of a running engine, by the name that suites use."""

from __future__ import annotations

from vllm_polarquant.eval.measures import greedy, next_token, retrieval
from vllm_polarquant.eval.measures.base import Measure, Outcome
from vllm_polarquant.eval.measures.tasks import measure as tasks

MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (next_token.MEASURE, retrieval.MEASURE, greedy.MEASURE, tasks.MEASURE)
}

__all__ = ["MEASURES", "Measure", "Outcome"]
