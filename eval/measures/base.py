"""What a measure is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from vllm import LLM

CHUNK = 32
REQUESTS = 16


def chunked_engine(max_model_len: int) -> dict[str, Any]:
    """Engine options with which prompts are prefilled CHUNK tokens at a time, and so read off the pages."""
    return {
        "max_model_len": max_model_len,
        "max_num_seqs": REQUESTS,
        "max_num_batched_tokens": CHUNK,
        "enable_prefix_caching": True,
    }


@dataclass(frozen=True)
class Outcome:
    """What a measure found with one dtype: a summary for JSON, and arrays that another dtype may need."""

    summary: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Measure:
    """One way to look at a dtype.

    name: as suites call it.
    params: dataclass of what a suite may set.
    engine: engine options (vLLM's EngineArgs) that the measure needs, from params.
    run: (engine, params, seed, outcome of the baseline or None) -> Outcome.
    columns: summary -> what the table shows, by column.
    details: the same for further tables, by title.
    identity: params -> what a result depends on beside them; ValueError if they name what is not there.
    prepare: (model, params) -> None, before an engine is started: loads what can be missing.
    """

    name: str
    params: type[Any]
    engine: Callable[[Any], dict[str, Any]]
    run: Callable[[LLM, Any, int, Outcome | None], Outcome]
    columns: Callable[[dict[str, Any]], dict[str, str]]
    details: dict[str, Callable[[dict[str, Any]], dict[str, str]]] = field(default_factory=dict)
    identity: Callable[[Any], dict[str, Any]] = lambda params: {}
    prepare: Callable[[str, Any], None] = lambda model, params: None
