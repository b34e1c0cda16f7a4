"""The child that runs one dtype's cells.

A dtype that crashes its process takes nobody with it. Cells with the same engine options share an engine.
The job is JSON: model, dtype, seed, folder, the suite with what was changed of it, and the cells' keys, each
with the baseline's stem.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from pathlib import Path
from typing import Any

from vllm_polarquant.eval import dtypes, isolate, results
from vllm_polarquant.eval.engine import engine, use_in_process_engine
from vllm_polarquant.eval.suites import Cell, load_suite


def reason(problem: BaseException) -> str:
    """An exception as one line; of one without words, where it was raised."""
    words = " ".join(str(problem).split())
    if not words and (frames := traceback.extract_tb(problem.__traceback__)):
        last = frames[-1]
        words = f"{'/'.join(Path(last.filename).parts[-3:])}, line {last.lineno}: {last.line}"
    return f"{type(problem).__name__}: {words}" if words else type(problem).__name__


def run_cells(job: dict[str, Any], report: isolate.Report) -> None:
    """Run the job's cells, grouped by engine, and report each as it ends."""
    folder = Path(job["folder"])
    cells = {cell.name: cell for cell in load_suite(job["suite"], job["engine"], job["changes"])}
    groups: dict[str, list[tuple[Cell, dict[str, Any]]]] = {}
    for key in job["keys"]:
        cell = cells[key["cell"]]
        try:
            report({"event": "prepare", "cell": cell.name})
            cell.measure.prepare(job["model"], cell.params)
        except Exception as problem:
            traceback.print_exc()
            report({"event": "failed", "cell": cell.name, "reason": reason(problem)})
            continue
        groups.setdefault(json.dumps(cell.engine, sort_keys=True), []).append((cell, key))
    for group in groups.values():
        waiting = [cell.name for cell, _ in group]
        try:
            report({"event": "boot", "cells": waiting})
            dtype = dtypes.prepare(job["dtype"])
            with engine(job["model"], dtype, seed=job["seed"], **group[0][0].engine) as llm:
                for cell, key in group:
                    report({"event": "start", "cell": cell.name})
                    started = time.perf_counter()
                    try:
                        baseline = results.outcome(folder, key["baseline"]) if key["baseline"] else None
                        found = cell.measure.run(llm, cell.params, job["seed"], baseline)
                        results.write(folder, key, found, time.perf_counter() - started)
                        report({"event": "done", "cell": cell.name})
                    except Exception as problem:
                        traceback.print_exc()
                        report({"event": "failed", "cell": cell.name, "reason": reason(problem)})
                    waiting.remove(cell.name)
        except Exception as problem:
            traceback.print_exc()
            for name in waiting:
                report({"event": "failed", "cell": name, "reason": reason(problem)})


def work(job: dict[str, Any], report: isolate.Report) -> None:
    """Run the job's cells on engines of this process."""
    if not Path(job["model"]).is_dir() or any(key.get("identity", {}).get("hub") for key in job["keys"]):
        os.environ.setdefault("HF_HUB_OFFLINE", "0")
    use_in_process_engine()
    run_cells(job, report)


if __name__ == "__main__":
    isolate.serve(work)
