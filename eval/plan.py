"""What is to be measured of a model, and running it: a child a dtype, that keeps each result as it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from vllm_polarquant.eval import isolate, results
from vllm_polarquant.eval.dtypes import BASELINE
from vllm_polarquant.eval.suites import Cell

PROBE = "probe"
"""Names the shipped model."""

NO_BASELINE = f"there is no result of {BASELINE} to compare with"
WORKER = isolate.module("vllm_polarquant.eval.worker")


@dataclass(frozen=True)
class Plan:
    """What is to be measured: every cell of a suite with every dtype, the baseline first."""

    model: str
    dtypes: list[str]
    suite: str
    cells: list[Cell]
    engine: dict[str, Any]
    seed: int
    folder: Path
    changes: dict[str, Any] = field(default_factory=dict)

    def key(self, dtype: str, cell: Cell) -> dict[str, Any]:
        baseline = "" if dtype == BASELINE else results.stem(self.key(BASELINE, cell))
        return results.cell_key(self.model, dtype, cell, self.seed, baseline)

    def missing(self, dtype: str) -> list[Cell]:
        """Cells that have no finished result yet."""
        names = ((cell, results.stem(self.key(dtype, cell))) for cell in self.cells)
        return [cell for cell, name in names if results.read(self.folder, name) is None]

    def found(self, dtype: str, cell: Cell) -> dict[str, Any] | None:
        return results.read(self.folder, results.stem(self.key(dtype, cell)))


def run_dtype(
    plan: Plan, dtype: str, cells: list[Cell], progress: Progress, task: Any, gpus: str = ""
) -> dict[str, str]:
    """Run cells in a worker process; why each that failed did, by cell.

    gpus: the worker's CUDA_VISIBLE_DEVICES, if not this process's own.
    """
    job = {
        "model": plan.model,
        "dtype": dtype,
        "suite": plan.suite,
        "engine": plan.engine,
        "changes": plan.changes,
        "seed": plan.seed,
        "folder": str(plan.folder),
        "keys": [plan.key(dtype, cell) for cell in cells],
    }
    log = plan.folder / "logs" / f"{dtype}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    pending = {cell.name for cell in cells}
    failures: dict[str, str] = {}
    env = {"CUDA_VISIBLE_DEVICES": gpus} if gpus else {}
    with isolate.Child(WORKER, job, env, log) as worker:
        for event in worker.reports():
            if event["event"] == "boot":
                progress.update(task, description=f"{dtype}: starting an engine")
            elif event["event"] == "prepare":
                progress.update(task, description=f"{dtype}: loading {event['cell']}")
            elif event["event"] == "start":
                progress.update(task, description=f"{dtype}: {event['cell']}")
            else:
                pending.discard(event["cell"])
                progress.advance(task)
                if event["event"] == "failed":
                    failures[event["cell"]] = event["reason"]
        status = worker.status
    for name in pending:
        failures[name] = f"the worker process ended with exit status {status}"
        progress.advance(task)
    return {name: f"{why} (log: {log})" for name, why in failures.items()}
