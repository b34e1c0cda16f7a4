"""Several GPUs: the same answers in every layout of vLLM's, and what a model that needs two of them gains.

    python -m vllm_polarquant.eval.bench.parallel --out bench-parallel

A layout is a way in which vLLM spreads an engine: `one` device, tensor, pipeline or data parallel on two, and
tensor parallel over Ray. In each, the 16-bit test page must answer as `auto` does; a preset must lose as
little as it loses on one device; and every rank must have centred its keys as one device does.
"""

from __future__ import annotations

import math
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from vllm_polarquant.eval import isolate
from vllm_polarquant.eval.bench import engine as engine_bench
from vllm_polarquant.eval.bench import engine_page
from vllm_polarquant.eval.command import end_on_sigterm
from vllm_polarquant.eval.measures.greedy import same_until
from vllm_polarquant.eval.measures.next_token import block_error, divergence
from vllm_polarquant.eval.plan import PROBE
from vllm_polarquant.eval.probe.episodes import MODEL_DIR
from vllm_polarquant.eval.report.cells import shown
from vllm_polarquant.eval.report.environment import begun, check_out, check_same, continued, earlier, machine
from vllm_polarquant.eval.report.page import Report, Section, publish, save
from vllm_polarquant.eval.statistics import Z
from vllm_polarquant.format import DEFAULT_PRESET, LOSSLESS

TITLE = "Several GPUs"
BASELINE, ALONE = "auto", "one"
LAYOUTS: dict[str, dict[str, Any]] = {
    ALONE: {},
    "tp2": {"tensor_parallel_size": 2},
    "pp2": {"pipeline_parallel_size": 2},
    "dp2": {"data_parallel_size": 2},
    "ray": {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"},
}
"""Engine arguments of each."""

LARGE = Path(__file__).parents[1] / "models" / "llama-3.1-70b"
WORKER = isolate.module("vllm_polarquant.eval.bench.parallel_worker")

Arrays = dict[str, np.ndarray]


def run(job: dict[str, Any], layout: str, logs: Path, limit_s: float) -> list[Arrays] | str:
    """What each engine of a layout found, or why one of them found nothing, and its log."""
    logs.mkdir(parents=True, exist_ok=True)
    name = f"{layout}-{job['dtype']}"
    log = logs / f"{name}.log"
    with tempfile.TemporaryDirectory() as folder:
        own = job | {"engine": job["engine"] | LAYOUTS[layout], "files": f"{folder}/{name}"}
        with isolate.Child(WORKER, own, {"VLLM_POLARQUANT_LOSSLESS": "1"}, log) as child:
            try:
                report = child.report(limit_s)
            except (TimeoutError, isolate.Ended) as problem:
                report = {"error": str(problem)}
            if "error" in report:
                return f"{report['error']} (log: {log})"
            found = []
            for file in report["files"]:
                with np.load(file) as arrays:
                    found.append(dict(arrays))
    return found


def _whole(engines: list[Arrays]) -> Arrays:
    """Tables LAYER/KIND of all ranks of all engines, kv heads side by side."""
    parts: dict[str, list[np.ndarray]] = {}
    for arrays in engines:
        for name in sorted(name for name in arrays if name.count("/") == 2):
            parts.setdefault(name.rsplit("/", 1)[0], []).append(arrays[name])
    return {name: np.concatenate(part, axis=-2) for name, part in parts.items()}


def table_difference(engines: list[Arrays], alone: list[Arrays]) -> float | None:
    """The largest difference of any rank's tables from one device's, of their RMS; None without tables.

    Raises:
        ValueError: if ranks lack a layer, or have one too many.
    """
    have, want = _whole(engines), _whole(alone)
    if have.keys() != want.keys():
        raise ValueError(f"layers {sorted(have.keys() ^ want.keys())} differ")
    worst = None
    for name, mine in have.items():
        theirs = want[name]
        # Ranks that share a head, and engines beside each other, have the same one.
        theirs = np.tile(theirs, (1, mine.shape[-2] // theirs.shape[-2], 1))
        scale = math.sqrt(float(np.square(theirs.astype(np.float64)).mean())) or 1.0
        worst = max(worst or 0.0, float(np.abs(mine - theirs).max()) / scale)
    return worst


def compare(engines: list[Arrays], base: list[Arrays]) -> dict[str, Any]:
    """Greedy texts that are the same and KL of every engine's answers from those of the first of `base`."""
    kls = [divergence(base[0], arrays)[0] for arrays in engines]
    want = base[0]["greedy"]
    same = [same_until(arrays["greedy"], want) == want.shape[1] for arrays in engines]
    return {
        "texts": sum(len(each) for each in same),
        "same_texts": int(sum(each.sum() for each in same)),
        "kl": float(np.mean(kls)),
        "kl_error": block_error(np.concatenate(kls)),
    }


def findings(runs: dict[str, dict[str, list[Arrays] | str]]) -> dict[str, dict[str, Any]]:
    """Of each layout's dtypes, compared with `auto` in the layout and with themselves on one device."""
    found: dict[str, dict[str, Any]] = {}
    for layout, dtypes in runs.items():
        for dtype, engines in dtypes.items():
            row: dict[str, Any] = {}
            if isinstance(engines, str):
                row["error"] = engines
            else:
                base, alone = dtypes[BASELINE], runs.get(ALONE, {}).get(dtype, "")
                if not isinstance(base, str):
                    row["from_auto"] = compare(engines, base)
                if not isinstance(alone, str):
                    row["from_one"] = compare(engines, alone)
                    try:
                        row["tables"] = table_difference(engines, alone)
                    except ValueError as problem:
                        row["error"] = str(problem)
            found[f"{layout} {dtype}"] = row
    return found


def failures(found: dict[str, dict[str, Any]]) -> list[str]:
    """What is not as it must be, a line each."""
    wrong = []
    for name, row in found.items():
        layout, dtype = name.split(" ")
        if "error" in row:
            wrong.append(f"{name}: {row['error']}")
            continue
        near = row.get("from_auto")
        if dtype == LOSSLESS and near and near["same_texts"] < near["texts"]:
            wrong.append(f"{name}: only {near['same_texts']} of {near['texts']} texts are those of auto")
        alone = found.get(f"{ALONE} {dtype}", {}).get("from_auto")
        if dtype != LOSSLESS and near and alone:
            room = Z * math.hypot(near["kl_error"], alone["kl_error"])
            if near["kl"] > alone["kl"] + room:
                wrong.append(f"{name}: KL {near['kl']:.4f}, on one device {alone['kl']:.4f}, +- {room:.4f}")
        if layout in ("dp2", "pp2") and row.get("tables"):
            wrong.append(f"{name}: tables differ from those of one device")
    return wrong


def kept(old: Report, new: Report) -> Report:
    """`new`, still without findings, behind those of an earlier report.

    Raises:
        typer.BadParameter: naming what differs, if they cannot stand in one table.
    """
    check_same(machine(old), machine(new))
    return new | continued(old, new) | {"layouts": old["layouts"], "large": old["large"]}


def sections(report: Report) -> list[Section]:
    """The table of layouts, and those of the large model."""
    rows = []
    for name, row in report["layouts"].items():
        layout, dtype = name.split(" ")
        near, alone, tables = row.get("from_auto"), row.get("from_one"), row.get("tables")
        rows.append(
            [
                layout,
                dtype,
                f"{near['same_texts']}/{near['texts']}" if near else "-",
                f"{near['kl']:.4f} ± {Z * near['kl_error']:.4f}" if near else "-",
                f"{alone['same_texts']}/{alone['texts']}" if alone else "-",
                f"{alone['kl']:.4f}" if alone else "-",
                "-" if tables is None else ("equal" if tables == 0 else f"{tables:.1e}"),
                shown(row, 80) if "error" in row else "complete",
            ]
        )
    note = (
        "Greedy texts that are the same and KL in nats from `auto` in the same layout and from the same "
        "dtype on one device; tables of keys: the largest difference of any rank's from one device's, of "
        "their RMS."
    )
    header = ["layout", "dtype", "texts of auto", "KL", "texts of one", "KL from one", "tables", "run"]
    made = [Section("The same answers", header, rows, note)] if rows else []
    if report["large"]:
        made += engine_page.sections({"runs": report["large"]})
    return made


def main(
    layouts: Annotated[str, typer.Option(help=f"Some of {', '.join(LAYOUTS)}.")] = ",".join(LAYOUTS),
    dtypes: Annotated[str, typer.Option(help=f"--kv-cache-dtype names; {BASELINE} is always first.")] = (
        f"{LOSSLESS},{DEFAULT_PRESET}"
    ),
    model: Annotated[str, typer.Option(help=f"A model's folder, or {PROBE!r}, the shipped one.")] = PROBE,
    rows: Annotated[int, typer.Option(help="Rows of text that each layout reads.", min=1)] = 8,
    context: Annotated[int, typer.Option(help="Tokens of each.", min=65)] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens decoded after each.", min=1)] = 32,
    engine: Annotated[str, typer.Option(help="More engine arguments, a JSON object.")] = "{}",
    jobs: Annotated[
        int, typer.Option(help="Layouts' runs side by side; their engines share the GPUs' memory.", min=1)
    ] = 1,
    large: Annotated[str, typer.Option(help="Folder of a config.json that takes two GPUs; '' for none.")] = (
        str(LARGE)
    ),
    large_dtypes: Annotated[str, typer.Option(help="Of the large model.")] = f"auto,fp8,{DEFAULT_PRESET}",
    cells: Annotated[str, typer.Option(help="TPOT of the large model at BATCHxCONTEXT.")] = "32x16384",
    large_engine: Annotated[str, typer.Option(help="Its engine arguments, a JSON object.")] = (
        '{"tensor_parallel_size": 2, "gpu_memory_utilization": 0.9}'
    ),
    limit: Annotated[float, typer.Option(help="Seconds that one engine may take.", min=0)] = 300.0,
    out: Annotated[Path, typer.Option(help="Stem of the .json and .md files.")] = Path("bench-parallel"),
    keep: Annotated[bool, typer.Option("--keep", help="Add to the report at --out, made here.")] = False,
) -> None:
    """Try every layout; exits with 1 if an answer is not what it must be."""
    console = Console()
    check_out(out)
    end_on_sigterm(f"python -m {__spec__.name}")
    asked = [name for name in layouts.split(",") if name]
    unknown = [name for name in asked if name not in LAYOUTS]
    if unknown or not (asked or large):
        raise typer.BadParameter(f"layouts are {', '.join(LAYOUTS)}, not {', '.join(unknown) or 'none'}")
    names = list(dict.fromkeys([BASELINE, *filter(None, dtypes.split(","))]))
    job = {
        "model": str(MODEL_DIR) if model == PROBE else model,
        "rows": rows,
        "context": context,
        "tokens": tokens,
        "engine": engine_bench.engine_arguments(engine),
    }
    large_arguments = engine_bench.engine_arguments(large_engine)
    shapes = engine_bench.parse_shapes(cells)
    if large and not shapes:
        raise typer.BadParameter("give --cells of the large model, or --large ''")
    report = begun(__spec__.name) | {"job": job, "layouts": {}, "large": {}}
    if keep:
        report = kept(earlier(out), report)
    runs: dict[str, dict[str, list[Arrays] | str]] = {layout: {} for layout in asked}
    logs = out.with_name(f"{out.name}-logs")
    with ThreadPoolExecutor(jobs) as pool:
        started = {
            (layout, dtype): pool.submit(run, job | {"dtype": dtype}, layout, logs, limit)
            for layout in asked
            for dtype in names
        }
        for (layout, dtype), done in started.items():
            runs[layout][dtype] = done.result()
            console.print(f"{layout} {dtype}", markup=False)
    report["layouts"] |= findings(runs)
    save(out, report)
    if large:
        plan = engine_bench.plan_of(
            large,
            shapes,
            prefill=[(4, shapes[-1][1])],
            ttft=[],
            ttft_prefix=[],
            full_memory=[],
            tokens=64,
            repeats=3,
            max_seqs=0,
            limit_s=limit,
            engine=large_arguments,
        )
        for dtype in large_dtypes.split(","):
            report["large"][dtype] = engine_bench.run(dtype, plan, console)
            save(out, report)
    publish(console, out, TITLE, report, sections(report))
    wrong = failures(report["layouts"])
    console.print(*wrong, sep="\n", markup=False)
    if wrong or any("error" in found for found in report["large"].values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    typer.run(main)
