"""Capacity and speed of KV cache dtypes in the whole engine, one child a dtype, on dummy weights.

    python -m vllm_polarquant.eval.bench.engine --out bench-engine

Prompts are random tokens, so no two share a block unless they are meant to. Prefill and time to first
token are taken from prompts that nobody has sent before. TPOT comes from runs off the prefix cache: the
engine stamps each request's first and last token, and once all of a batch decode together,
(last - first) / (tokens - 1) is the time of a step. With `--speculate ngram:3` another engine drafts three
tokens a step: prompts and answers are then made of few words, so that an n-gram is always found.
"""

from __future__ import annotations

import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_polarquant.eval import isolate
from vllm_polarquant.eval.bench.engine_page import TITLE, sections
from vllm_polarquant.eval.bench.engine_speculation import Speculation, parse_speculations
from vllm_polarquant.eval.command import end_on_sigterm
from vllm_polarquant.eval.report.cells import shown
from vllm_polarquant.eval.report.environment import (
    begun,
    check_same,
    continued,
    earlier,
    machine,
    numbers,
    query_gpu,
    redrawn,
    same_version,
    without_ours,
)
from vllm_polarquant.eval.report.page import Report, publish, save
from vllm_polarquant.format import DEFAULT_PRESET, PRESETS

MODEL = Path(__file__).parents[1] / "models" / "llama-3.1-8b"
DTYPES = ("auto", "fp8", DEFAULT_PRESET, "turboquant_4bit_nc", "int4_per_token_head")

WORKER = isolate.module("vllm_polarquant.eval.bench.engine_worker")
CLOCK_EVERY_S = 20.0
"""Between two looks at the clock of a busy GPU."""

Shape = tuple[int, int]


def parse_shapes(text: str) -> list[Shape]:
    """Pairs from "8x1024,32x16384"; none from "".

    Raises:
        typer.BadParameter: naming what is not two positive numbers.
    """
    shapes = []
    for part in filter(None, text.split(",")):
        first, _, second = part.partition("x")
        if not (first.isdecimal() and second.isdecimal() and int(first) and int(second)):
            raise typer.BadParameter(f"{part!r} is not two positive numbers like 8x1024")
        shapes.append((int(first), int(second)))
    return shapes


def engine_arguments(text: str) -> dict[str, Any]:
    """vLLM's EngineArgs from a JSON object.

    Raises:
        typer.BadParameter: for anything else.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as problem:
        raise typer.BadParameter(f"{text!r} is not JSON: {problem}") from None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{text!r} is not a JSON object such as '{{\"tensor_parallel_size\": 2}}'")
    return found


def plan_of(
    model: str,
    cells: list[Shape],
    *,
    prefill: list[Shape],
    ttft: list[int],
    ttft_prefix: list[Shape],
    full_memory: list[int],
    tokens: int,
    repeats: int,
    max_seqs: int,
    limit_s: float,
    engine: dict[str, Any],
) -> dict[str, Any]:
    """What the child of `run` measures; arguments as `main`'s.

    Raises:
        typer.BadParameter: if there is nothing to measure.
    """
    contexts = [context for _, context in cells + prefill] + [sum(shape) for shape in ttft_prefix]
    contexts += ttft + full_memory
    if not contexts:
        raise typer.BadParameter("nothing to measure: give --cells, --prefill, --ttft or --full-memory")
    batches = [batch for batch, _ in cells + prefill]
    return {
        "model": model,
        "cells": cells,
        "prefill": prefill,
        "ttft": ttft,
        "ttft_prefix": ttft_prefix,
        "full_memory": full_memory,
        "tokens": tokens,
        "repeats": repeats,
        "max_model_len": max(contexts) + tokens + 16,
        "max_num_seqs": max_seqs or max([*batches, 256 if full_memory else 1]),
        "limit_s": limit_s,
        "engine": engine,
    }


def watch(
    worker_command: list[str], job: dict[str, Any], title: str, limit_s: float, console: Console
) -> dict[str, Any]:
    """What a child reports as [name, finding], with "error" if it ended early, and the clocks of the GPU."""
    found: dict[str, Any] = {}
    clocks: list[str] = []
    started = time.monotonic()
    ends, look = started + limit_s, started + CLOCK_EVERY_S
    error = ""
    with isolate.Child(worker_command, job) as worker:
        while (now := time.monotonic()) < ends:
            try:
                name, finding = worker.report(max(0.0, min(ends, look) - now))
            except isolate.Ended as ended:
                error = f"ended with {ended.status}" if ended.status else ""
                break
            except TimeoutError:
                clocks += [state["SM clock"]] if "SM clock" in (state := query_gpu()) else []
                look += CLOCK_EVERY_S
            else:
                found[name] = finding
                console.print(f"[{now - started:5.0f} s] {title} {name}: {shown(finding)}", markup=False)
        else:
            error = f"exceeded {limit_s:.0f} s"
    if clocks:
        found["sm_clocks"] = clocks
    # What the process itself said is worth more than its exit status.
    return ({"error": error} if error else {}) | found


def run(
    dtype: str,
    plan: dict[str, Any],
    console: Console,
    speculation: Speculation | None = None,
    turn: Path | None = None,
) -> dict[str, Any]:
    """What `watch` finds of one dtype.

    turn: with a speculation, the file that the engines beside it lock to measure one after the other.
    """
    title = dtype if speculation is None else f"{dtype} {speculation.name}"
    job = {"dtype": dtype, "plan": plan, "speculation": speculation, "turn": str(turn)}
    return watch(WORKER, job, title, plan["limit_s"], console)


def without_clocks(measured: dict[str, Any], found: Report) -> dict[str, Any]:
    """What `run` found but the clocks, the highest of which the report's environment takes."""
    # The clock of a busy GPU; an idle one's says nothing.
    busy = max(measured.pop("sm_clocks", []), key=lambda clock: float(clock.split()[0]), default=None)
    if busy is not None:
        found["environment"]["SM clock"] = busy
    return measured


def _tables(found: Report) -> dict[str, dict[str, Any]]:
    """Runs by name of a speculation, under "" those of engines without one."""
    return {"": found["runs"]} | found.get("speculation", {})


def _conditions(found: Report) -> dict[str, Any]:
    # As JSON gives it back.
    plan = json.loads(json.dumps(found["plan"]))
    # The shipped model lies elsewhere in a wheel and in a checkout.
    model = {"model": Path(plan["model"]).name}
    return without_ours(machine(found)) | {k: v for k, v in plan.items() if k != "limit_s"} | model


def kept_runs(runs: dict[str, Any], old: Report, new: Report) -> dict[str, Any]:
    """Runs by dtype of an old report that a new one may go on with: not ours, if of another version.

    Raises:
        typer.BadParameter: naming what differs, if they cannot stand in one table.
    """
    check_same(_conditions(old), _conditions(new))
    return {name: run for name, run in runs.items() if same_version(old, new) or name not in PRESETS}


def kept(old: Report, new: Report) -> Report:
    """`new`, still without runs, behind those of an earlier report that it may go on with.

    Raises:
        typer.BadParameter: as `kept_runs`.
    """
    tables = {name: kept_runs(runs, old, new) for name, runs in _tables(old).items()}
    return old | continued(old, new) | {"runs": tables.pop(""), "speculation": tables}


def speculate(
    todo: list[tuple[Speculation, str]],
    plan: dict[str, Any],
    jobs: int,
    found: Report,
    out: Path,
    console: Console,
) -> None:
    """Measure speculations of dtypes, so many engines started side by side, and save them as they end."""
    for start in range(0, len(todo), jobs):
        group = todo[start : start + jobs]
        # Who waits for its turn does so within its limit.
        own = plan | {"limit_s": plan["limit_s"] * len(group)}
        with tempfile.NamedTemporaryFile() as turn, ThreadPoolExecutor(jobs) as pool:
            started = [
                pool.submit(run, dtype, own, console, speculation, Path(turn.name))
                for speculation, dtype in group
            ]
            for (speculation, dtype), done in zip(group, started, strict=True):
                runs = found["speculation"].setdefault(speculation.name, {})
                runs[dtype] = without_clocks(done.result(), found)
                save(out, found)


def main(
    dtypes: Annotated[
        str, typer.Option(help="--kv-cache-dtype names, comma-separated; the first is the baseline.")
    ] = ",".join(DTYPES),
    model: Annotated[str, typer.Option(help="Folder with a config.json.")] = str(MODEL),
    cells: Annotated[str, typer.Option(help="TPOT at BATCHxCONTEXT, comma-separated.")] = (
        "1x1024,8x1024,32x1024,8x16384,32x16384"
    ),
    prefill: Annotated[str, typer.Option(help="Prefill rate of PROMPTSxTOKENS.")] = "4x16384",
    ttft: Annotated[str, typer.Option(help="TTFT of one prompt of so many tokens.")] = "1024,16384",
    ttft_prefix: Annotated[str, typer.Option(help="TTFT of PREFIXxNEW tokens, prefix cached.")] = "",
    full_memory: Annotated[str, typer.Option(help="Throughput with as many such contexts as fit.")] = "",
    tokens: Annotated[int, typer.Option(help="Tokens decoded a request.", min=2)] = 64,
    repeats: Annotated[int, typer.Option(help="Timed runs of everything.", min=1)] = 3,
    max_seqs: Annotated[int, typer.Option(help="max_num_seqs; 0: the largest batch asked for.", min=0)] = 0,
    engine: Annotated[str, typer.Option(help="More engine arguments, a JSON object.")] = (
        '{"gpu_memory_utilization": 0.9}'
    ),
    speculate_by: Annotated[
        str,
        typer.Option(
            "--speculate",
            help="Engines that draft, METHOD:TOKENS a step by ngram or draft (a small dummy model): the time "
            "of a verified step at --cells. none is the engine that all else is measured of.",
        ),
    ] = "none",
    jobs: Annotated[
        int, typer.Option(help="Engines that draft started side by side, measured in turn.", min=1)
    ] = 1,
    limit: Annotated[float, typer.Option(help="Seconds that one engine may take.", min=0)] = 300.0,
    out: Annotated[Path, typer.Option(help="Stem of the .json, .md and .png files.")] = Path("bench-engine"),
    keep: Annotated[
        bool, typer.Option("--keep", help="Add to the report at --out, made here with the same plan.")
    ] = False,
    render: Annotated[Path | None, typer.Option(help="Only redraw this JSON report to --out.")] = None,
) -> None:
    """Measure every dtype; one that fails or takes too long keeps what it found, the rest are finished."""
    console = Console()
    if redrawn(console, out, render, TITLE, sections):
        return
    end_on_sigterm(f"python -m {__spec__.name}")
    plan = plan_of(
        model,
        parse_shapes(cells),
        prefill=parse_shapes(prefill),
        ttft=numbers("--ttft", ttft),
        ttft_prefix=parse_shapes(ttft_prefix),
        full_memory=numbers("--full-memory", full_memory),
        tokens=tokens,
        repeats=repeats,
        max_seqs=max_seqs,
        limit_s=limit,
        engine=engine_arguments(engine),
    )
    asked = parse_speculations(speculate_by)
    speculations = [each for each in asked if each is not None]
    if speculations and not plan["cells"]:
        raise typer.BadParameter("--speculate is measured at --cells: give some")
    found = begun(__spec__.name) | {"plan": plan, "runs": {}, "speculation": {}}
    if keep:
        found = kept(earlier(out), found)
    names = dtypes.split(",")
    for dtype in names if None in asked else []:
        console.print(f"[bold]{dtype}[/]")
        found["runs"][dtype] = without_clocks(run(dtype, plan, console), found)
        save(out, found)

    def missing(speculation: Speculation, dtype: str) -> bool:
        before = found["speculation"].get(speculation.name, {}).get(dtype)
        return before is None or "error" in before

    todo = [(each, dtype) for each in speculations for dtype in names if missing(each, dtype)]
    speculate(todo, plan, jobs, found, out, console)
    publish(console, out, TITLE, found, sections(found))
    if all("error" in measured for runs in _tables(found).values() for measured in runs.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
