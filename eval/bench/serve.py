"""Latencies of a server under load, one server a dtype, on dummy weights, by vLLM's own `vllm bench serve`.

    python -m vllm_polarquant.eval.bench.serve --out bench-serve

Requests arrive at random, so many a second, whether or not those before are done. After the rates asked for,
more are tried for the highest at which the median time per output token keeps a bound.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_polarquant.eval import isolate
from vllm_polarquant.eval.bench.engine import (
    MODEL,
    engine_arguments,
    kept_runs,
    parse_shapes,
    watch,
    without_clocks,
)
from vllm_polarquant.eval.bench.grid import short
from vllm_polarquant.eval.command import end_on_sigterm
from vllm_polarquant.eval.report.cells import number, ratio, shown, times
from vllm_polarquant.eval.report.environment import (
    begun,
    continued,
    earlier,
    redrawn,
)
from vllm_polarquant.eval.report.page import Report, Section, publish, save
from vllm_polarquant.eval.report.panels import Panel
from vllm_polarquant.format import DEFAULT_PRESET

TITLE = "Serving"
WORKER = isolate.module("vllm_polarquant.eval.bench.serve_worker")
LOADS = "1024x256@8,16,24 16384x256@0.5,1,1.5"


def parse_loads(text: str) -> list[dict[str, Any]]:
    """Shapes (tokens of a prompt, of an answer) and rates in requests a second from "1024x256@8,16".

    Raises:
        typer.BadParameter: naming what is not of this form, or if there are none.
    """
    loads = []
    for part in text.split():
        shape, _, rates = part.partition("@")
        try:
            found = [float(rate) for rate in rates.split(",")]
        except ValueError:
            found = []
        if not found or not all(0 < rate < float("inf") for rate in found) or "," in shape:
            raise typer.BadParameter(f"{part!r} is no load such as 1024x256@8,16,24")
        loads.append({"shape": parse_shapes(shape)[0], "rates": found})
    if not loads:
        raise typer.BadParameter("give --loads, such as 1024x256@8,16,24")
    return loads


def kept(old: Report, new: Report) -> Report:
    """`new`, still without runs, behind those of an earlier report that it may go on with.

    Raises:
        typer.BadParameter: as `engine.kept_runs`.
    """
    return old | continued(old, new) | {"runs": kept_runs(old["runs"], old, new)}


def _words(shape: list[int]) -> str:
    return f"prompts of {short(shape[0])} tokens, answers of {shape[1]}"


def highest(run: dict[str, Any], name: str, tpot_ms: float) -> tuple[float | None, float | None]:
    """The highest rate tried that kept the bound on the median TPOT, and the lowest above it that did not."""
    cells = {float(key.split(" ")[1]): cell for key, cell in run.items() if key.startswith(f"{name} ")}
    good = max((rate for rate, cell in cells.items() if cell["median_tpot_ms"] <= tpot_ms), default=None)
    bad = (rate for rate, cell in cells.items() if cell["median_tpot_ms"] > tpot_ms and rate > (good or 0))
    return good, min(bad, default=None)


def sections(found: Report) -> list[Section]:
    """A table a load, a row a rate and dtype, and one of the highest rates."""
    runs, plan = found["runs"], found["plan"]
    first = next(iter(runs), "")
    made, peaks = [], []
    rates_of: dict[str, list[float | None]] = {dtype: [] for dtype in runs}
    for load in plan["loads"]:
        name, words = "x".join(map(str, load["shape"])), _words(load["shape"])
        body = []
        labels = [f"{rate:.3g} a second" for rate in load["rates"]]
        series: dict[str, list[float | None]] = {dtype: [] for dtype in runs}
        for rate in load["rates"]:
            key = f"{name} {rate:.3g}"
            base = runs[first].get(key, {}) if first else {}
            for dtype, run in runs.items():
                cell = run.get(key, {})
                series[dtype].append(cell.get("median_tpot_ms"))
                ttft = cell.get("median_ttft_ms", run if "error" in run else "not measured")
                body.append(
                    [
                        f"{rate:.3g}",
                        dtype,
                        shown(ttft),
                        number(cell.get("p95_ttft_ms")),
                        shown(cell.get("median_tpot_ms")),
                        times(ratio(cell.get("median_tpot_ms"), base.get("median_tpot_ms"))),
                        number(cell.get("p95_tpot_ms")),
                        number(cell.get("output_throughput")),
                    ]
                )
        header = ["requests a second", "dtype", "TTFT, ms", "95 %", "TPOT, ms", f"of {first}", "95 %"]
        made.append(
            Section(
                title=words.capitalize(),
                header=[*header, "output tokens/s"],
                rows=body,
                note=f"Medians and 95th percentiles of the requests of {plan['seconds']:.0f} s.",
                panels=[Panel(f"TPOT: {words}", "ms", labels, series, "lower")],
            )
        )
        base_rate = highest(runs[first], name, plan["tpot_ms"])[0] if first else None
        for dtype, run in runs.items():
            good, bad = highest(run, name, plan["tpot_ms"])
            rates_of[dtype].append(good)
            peaks.append([words, dtype, number(good), number(bad), times(ratio(good, base_rate))])
    made.append(
        Section(
            title=f"Highest rate with a median TPOT of at most {plan['tpot_ms']:.0f} ms",
            header=["load", "dtype", "requests a second", "too many", f"of {first}"],
            rows=peaks,
            note="Of the rates tried: those above, and then the geometric mean of the highest that kept the "
            "bound and the lowest that did not, or its double. Too many: the lowest tried that did not.",
            panels=[
                Panel(
                    "Highest rate", "requests a second", [_words(x["shape"]) for x in plan["loads"]], rates_of
                )
            ],
        )
    )
    return made


def main(
    dtypes: Annotated[
        str, typer.Option(help="--kv-cache-dtype names, comma-separated; the first is the baseline.")
    ] = f"auto,fp8,{DEFAULT_PRESET}",
    model: Annotated[str, typer.Option(help="Folder with a config.json.")] = str(MODEL),
    loads: Annotated[
        str, typer.Option(help="PROMPTxANSWER@RATES, tokens and requests a second, separated by spaces.")
    ] = LOADS,
    seconds: Annotated[float, typer.Option(help="So long requests arrive at each rate.", min=0)] = 20.0,
    tpot: Annotated[float, typer.Option(help="Bound on the median TPOT, in ms.", min=0)] = 50.0,
    search: Annotated[int, typer.Option(help="More rates tried for the highest within it.", min=0)] = 2,
    engine: Annotated[str, typer.Option(help="More engine arguments, a JSON object.")] = (
        '{"gpu_memory_utilization": 0.9}'
    ),
    limit: Annotated[float, typer.Option(help="Seconds that one dtype may take.", min=0)] = 600.0,
    out: Annotated[Path, typer.Option(help="Stem of the .json, .md and .png files.")] = Path("bench-serve"),
    keep: Annotated[
        bool, typer.Option("--keep", help="Go on with the report at --out, made here with the same plan.")
    ] = False,
    render: Annotated[Path | None, typer.Option(help="Only redraw this JSON report to --out.")] = None,
) -> None:
    """Measure every dtype; one that fails or takes too long keeps what it found, the rest are finished."""
    console = Console()
    if redrawn(console, out, render, TITLE, sections):
        return
    end_on_sigterm(f"python -m {__spec__.name}")
    plan = {
        "model": model,
        "loads": parse_loads(loads),
        "seconds": seconds,
        "tpot_ms": tpot,
        "search": search,
        "limit_s": limit,
        "engine": engine_arguments(engine),
    }
    found = begun(__spec__.name) | {"plan": plan, "runs": {}}
    if keep:
        found = kept(earlier(out), found)
    logs = out.with_name(f"{out.name}-logs")
    logs.mkdir(parents=True, exist_ok=True)
    for dtype in dtypes.split(","):
        if "error" in found["runs"].get(dtype, {"error": ""}):
            job = {"dtype": dtype, "plan": plan, "log": str(logs / f"{dtype}.log")}
            measured = watch(WORKER, job, dtype, limit, console)
            found["runs"][dtype] = without_clocks(measured, found)
            save(out, found)
    publish(console, out, TITLE, found, sections(found))
    if all("error" in measured for measured in found["runs"].values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
