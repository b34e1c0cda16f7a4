"""Edited checkpoints, measured with all layers quantised and with those in 16 bits that `check` names."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from rich.progress import Progress

from vllm_polarquant.eval import results
from vllm_polarquant.eval.dtypes import BASELINE
from vllm_polarquant.eval.plan import NO_BASELINE, Plan, run_dtype
from vllm_polarquant.eval.suites import Cell, load_suite
from vllm_polarquant.keys import KeyReport
from vllm_polarquant.support import ranges


@dataclass(frozen=True)
class SkipPlan(Plan):
    """A plan whose engines keep layers in 16 bits, compared with the baseline of the plan without."""

    plain: Plan = field(kw_only=True)

    def key(self, dtype: str, cell: Cell) -> dict[str, Any]:
        (same,) = [other for other in self.plain.cells if other.name == cell.name]
        baseline = results.stem(self.plain.key(BASELINE, same))
        return results.cell_key(self.model, dtype, cell, self.seed, baseline)


def skip_plan(plain: Plan, layers: list[int]) -> SkipPlan:
    """The plan with `layers` in 16 bits."""
    engine = plain.engine | {"kv_cache_dtype_skip_layers": [str(layer) for layer in layers]}
    return SkipPlan(
        plain.model,
        [dtype for dtype in plain.dtypes if dtype != BASELINE],
        plain.suite,
        load_suite(plain.suite, engine, plain.changes),
        engine,
        plain.seed,
        plain.folder,
        plain.changes,
        plain=plain,
    )


@dataclass(frozen=True)
class Case:
    """A checkpoint, what `polarquant check` says of it, and its plans; skipped: by the layers skipped."""

    label: str
    keys: KeyReport
    plain: Plan
    skipped: dict[tuple[int, ...], SkipPlan]


def run_plan(plan: Plan, label: str, progress: Progress) -> dict[str, str]:
    """Run what is missing of a plan, one dtype after the other; why cells failed, by what failed."""
    failures: dict[str, str] = {}
    for dtype in plan.dtypes:
        todo = plan.missing(dtype)
        task = progress.add_task(f"{label}, {dtype}", total=len(plan.cells))
        progress.advance(task, len(plan.cells) - len(todo))
        if todo:
            found = run_dtype(plan, dtype, todo, progress, task)
            failures |= {f"{label}, {dtype}, {name}": why for name, why in found.items()}
        done = "failed" if plan.missing(dtype) else "done"
        progress.update(task, description=f"{label}, {dtype}: {done}")
        if dtype == BASELINE and plan.missing(dtype):
            failures |= {f"{label}, {other}": NO_BASELINE for other in plan.dtypes[1:]}
            break
    return failures


def run_cases(cases: list[Case], progress: Progress) -> dict[str, str]:
    """Run every case's plans; a dtype that failed is not tried again with layers skipped."""
    failures: dict[str, str] = {}
    for case in cases:
        failures |= run_plan(case.plain, case.label, progress)
        for layers, plan in case.skipped.items():
            able = [dtype for dtype in plan.dtypes if not case.plain.missing(dtype)]
            label = f"{case.label}, layers {ranges(list(layers))} skipped"
            failures |= run_plan(replace(plan, dtypes=able), label, progress)
    return failures
