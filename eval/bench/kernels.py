"""Store, decode attention and prefix attention on one layer's pages: ours and vLLM's own, in one run.

    python -m vllm_polarquant.eval.bench.kernels --out bench-kernels

Needs torch and Triton; without vLLM its kernels are reported as not installed. A child measures one contender
on one shape at a time and is replaced when it dies or takes too long, so that a kernel that faults or hangs
costs its own cell only. Off the GPU (--device cpu) tiny shapes run under Triton's interpreter, to try the
command; those times mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_polarquant.eval import isolate
from vllm_polarquant.eval.bench.grid import (
    OPERATIONS,
    PEERS,
    Case,
    default_cases,
    full_cases,
    jobs,
    parse_decode,
    tiny_cases,
)
from vllm_polarquant.eval.bench.kernel_page import TITLE, sections
from vllm_polarquant.eval.command import end_on_sigterm
from vllm_polarquant.eval.report.cells import shown, value
from vllm_polarquant.eval.report.environment import (
    begun,
    check_same,
    continued,
    earlier,
    machine,
    query_gpu,
    redrawn,
    same_version,
    without_ours,
)
from vllm_polarquant.eval.report.page import Report, publish, save
from vllm_polarquant.format import PRESETS

START_LIMIT_S = 180.0
"""For a worker to import torch and vLLM and to measure the memory's bandwidth."""

WORKER = isolate.module("vllm_polarquant.eval.bench.kernel_worker")

Job = tuple[Case, str]


def measure(
    todo: Sequence[Job], device: str, budget_ms: float, limit_s: float
) -> Iterator[tuple[str, Any, Any]]:
    """Yield ("limits", None, bandwidths) and then ("cell", job, result) for every job, in order.

    Raises:
        RuntimeError: if a worker ended before it could measure anything.
    """
    # Triton decides when it is first imported.
    env = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    done = 0
    greeted = False
    while done < len(todo):
        job = {
            "device": device,
            "budget_ms": budget_ms,
            "first": not greeted,
            "cells": [[asdict(case), name] for case, name in todo[done:]],
        }
        lost = None
        running = False
        before = done
        with isolate.Child(WORKER, job, env={"VLLM_LOGGING_LEVEL": "ERROR"} | env) as worker:
            while lost is None and done < len(todo):
                wait = limit_s if running else START_LIMIT_S
                try:
                    found = worker.report(wait)
                except isolate.Ended as ended:
                    lost = f"the worker ended with {ended.status}"
                except TimeoutError:
                    lost = f"exceeded {wait:.0f} s"
                else:
                    if "limits" in found:
                        if not greeted:
                            yield "limits", None, found["limits"]
                        greeted = True
                    elif "start" in found:
                        running = True
                    else:
                        running = False
                        yield "cell", todo[done], found["done"]
                        done += 1
        if not greeted:
            raise RuntimeError(f"no cell could be measured: {lost}")
        if lost is not None and (running or done == before):
            yield "cell", todo[done], {"error": lost}
            done += 1


def resumed(old: Report, new: Report, todo: Sequence[Job]) -> tuple[Report, list[Job]]:
    """`new`, still without cells, behind what an earlier report has measured, and the jobs that it lacks.

    Where our version or page format has changed, only peers' cells stay.

    Raises:
        typer.BadParameter: naming what differs, if they cannot stand in one table.
    """
    check_same(without_ours(machine(old)), without_ours(machine(new)))
    cells = [cell for cell in old["cells"] if "median" in cell["result"]]
    if not same_version(old, new):
        cells = [cell for cell in cells if cell["name"] not in PRESETS]
    measured = {(cell["op"], cell["label"], cell["name"]) for cell in cells}
    names = old["contenders"] + [name for name in new["contenders"] if name not in old["contenders"]]
    both = old | continued(old, new) | {"contenders": names, "cells": cells}
    return both, [job for job in todo if (job[0].op, job[0].label, job[1]) not in measured]


def main(
    out: Annotated[Path, typer.Option(help="Stem of the .json, .md and .png files.")] = Path("bench-kernels"),
    device: Annotated[str, typer.Option(help="cuda, or cpu for a dry run on tiny shapes.")] = "cuda",
    full: Annotated[bool, typer.Option("--full", help="The whole product of shapes and presets.")] = False,
    decode: Annotated[
        str,
        typer.Option(
            help="These decodes only, comma-separated: BATCHxCONTEXT, ...xGROUP or ...xGROUPxHEAD_DIM."
        ),
    ] = "",
    ops: Annotated[str, typer.Option(help="Operations, comma-separated.")] = ",".join(OPERATIONS),
    dtypes: Annotated[str, typer.Option(help="--kv-cache-dtype names, comma-separated.")] = ",".join(
        (*PEERS, *PRESETS)
    ),
    budget_ms: Annotated[float, typer.Option(help="Time of the repeats of one cell.", min=0)] = 40.0,
    limit: Annotated[
        float, typer.Option(help="Seconds a cell may take, compilation included.", min=0)
    ] = 40.0,
    keep: Annotated[
        bool, typer.Option("--keep", help="Go on with the report at --out: measure only what it lacks.")
    ] = False,
    render: Annotated[Path | None, typer.Option(help="Only redraw this JSON report to --out.")] = None,
) -> None:
    """Measure the grid; a cell that fails is reported in its place, and the rest are finished."""
    console = Console()
    if redrawn(console, out, render, TITLE, sections):
        return
    end_on_sigterm(f"python -m {__spec__.name}")
    names = [name for name in dtypes.split(",") if name]
    known = (*PEERS, *PRESETS)
    if unknown := [name for name in names if name not in known] or [
        o for o in ops.split(",") if o not in OPERATIONS
    ]:
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}; dtypes: {', '.join(known)}")
    if device not in ("cuda", "cpu"):
        raise typer.BadParameter(f"--device is cuda or cpu, not {device!r}")
    if device == "cuda" and not query_gpu():
        console.print("No NVIDIA GPU: there is nothing to measure. --device cpu tries the command out.")
        raise typer.Exit(2)
    try:
        cases = parse_decode(decode) if decode else full_cases() if full else default_cases()
    except ValueError as problem:
        raise typer.BadParameter(str(problem)) from None
    if device == "cpu" and not decode:
        cases = tiny_cases()
    todo = jobs((case for case in cases if case.op in ops.split(",")), names, everywhere=full)
    found = begun(__spec__.name) | {"contenders": names, "bandwidth": {}, "cells": []}
    if keep:
        found, todo = resumed(earlier(out), found, todo)
    for kind, what, result in measure(todo, device, budget_ms, limit):
        if kind == "limits":
            found["environment"] |= result.pop("state", {})
            found["bandwidth"] = result
            continue
        case, name = what
        found["cells"].append(asdict(case) | {"label": case.label, "name": name, "result": result})
        console.print(f"{case.op} {case.label} {name}: {shown(result)}", markup=False, soft_wrap=True)
        save(out, found)
    for name, speed in found["bandwidth"].items():
        found["environment"][f"{name} bandwidth"] = f"{(value(speed) or 0) / 1e12:.2f} TB/s"
    publish(console, out, TITLE, found, sections(found))
    if not any("median" in cell["result"] for cell in found["cells"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
