"""Measure KV cache dtypes on one model: `polarquant-eval MODEL --kv-cache-dtypes auto,... --suite NAME`."""

from __future__ import annotations

import json
import queue
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_polarquant.check import ConfigError
from vllm_polarquant.eval import dtypes, isolate, results
from vllm_polarquant.eval.accuracy.collect import model_shape, note_run
from vllm_polarquant.eval.command import FAILED, end_on_sigterm, fail
from vllm_polarquant.eval.dtypes import BASELINE
from vllm_polarquant.eval.files import locked
from vllm_polarquant.eval.plan import NO_BASELINE, PROBE, Plan, run_dtype
from vllm_polarquant.eval.probe.episodes import MODEL_DIR
from vllm_polarquant.eval.suites import load_suite, suite_names
from vllm_polarquant.format import DEFAULT_PRESET

COMMAND = "polarquant-eval"
CUT_SHORT = "the run was cut short before it was done"
Show = Callable[[dict[str, Any]], dict[str, str]]


def _rows_table(title: str, rows: dict[str, dict[str, str]]) -> Table:
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    shown = Table(title=title, box=box.MARKDOWN, title_justify="left")
    shown.add_column("kv-cache-dtype", no_wrap=True)
    for column in columns:
        shown.add_column(column, justify="right")
    for dtype, row in rows.items():
        shown.add_row(dtype, *(row.get(column, "-") for column in columns))
    return shown


def tables(plan: Plan) -> list[Table]:
    """A row a dtype, from the results that there are: all cells in one table, then each one's details."""
    summaries = {
        (dtype, cell.name): found["summary"]
        for dtype in plan.dtypes
        for cell in plan.cells
        if (found := plan.found(dtype, cell))
    }

    def rows(shows: dict[str, Show]) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        for dtype in plan.dtypes:
            row = found.setdefault(dtype, {})
            for name, show in shows.items():
                if (dtype, name) in summaries:
                    row |= show(summaries[dtype, name])
        return found

    title = ", ".join(f"{name} {value}" for name, value in results.versions().items())
    overview = rows({cell.name: cell.measure.columns for cell in plan.cells})
    shown = [_rows_table(title, overview)] if any(overview.values()) or not summaries else []
    for cell in plan.cells:
        for name, show in cell.measure.details.items():
            part = {dtype: row for dtype, row in rows({cell.name: show}).items() if row}
            if part:
                shown.append(_rows_table(f"{cell.name}: {name}", part))
    return shown


def _engine_options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except json.JSONDecodeError as problem:
        fail(COMMAND, f"--engine {text!r} is not JSON: {problem}")
    if not isinstance(options, dict):
        fail(COMMAND, f"--engine {text!r} is not a JSON object such as '{{\"tensor_parallel_size\": 2}}'")
    return options


def _settings(given: list[str]) -> dict[str, Any]:
    """Parameters by CELL.PARAMETER."""
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not all(name.rpartition(".")):
            fail(COMMAND, f"--set {text!r} is not of the form CELL.PARAMETER=VALUE, such as text.rows=4")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def _gpus(text: str) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each dtype that runs at a time; of one that inherits it, if none are named."""
    groups = [group.strip().replace("+", ",") for group in text.split(",") if group.strip()]
    if any(name[:1] in ("", "-") for group in groups for name in group.split(",")):
        fail(COMMAND, f"--gpus {text}: name GPUs as in 0,1,2,3 or 0+1,2+3")
    numbers = [int(name) for group in groups for name in group.split(",") if name.isdecimal()]
    if numbers:
        import torch

        if max(numbers) >= (count := torch.cuda.device_count()):
            fail(COMMAND, f"--gpus {text}: this machine has {count} NVIDIA GPUs, the first named 0")
    return groups or [""]


def _model(model: str) -> str:
    if model == PROBE:
        return str(MODEL_DIR)
    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        fail(COMMAND, f"{model} has no config.json; give a model's folder, a name on the hub, or {PROBE!r}")
    if not folder.is_dir() and (model.startswith((".", "/", "~")) or model.count("/") != 1):
        fail(COMMAND, f"no folder {model}; give a model's folder, a name on the hub, or {PROBE!r}")
    return str(folder.resolve()) if folder.is_dir() else model


def main(
    model: Annotated[
        str, typer.Argument(help=f"Folder or hub name of a model, or {PROBE!r}, the shipped one.")
    ],
    kv_cache_dtypes: Annotated[
        str,
        typer.Option(
            help=f"Comma-separated; {BASELINE}, the baseline, is always among them. {dtypes.ALL!r} stands "
            "for every one that this machine can run, vLLM's own too."
        ),
    ] = f"{BASELINE},{DEFAULT_PRESET}",
    suite: Annotated[
        str, typer.Option(help=f"{', '.join(suite_names())}, or a .json file of that form.")
    ] = "local",
    out: Annotated[Path, typer.Option(help="Folder of results; what is finished there is kept.")] = Path(
        "eval-results"
    ),
    seed: Annotated[int, typer.Option(help="Of the engine.", min=0)] = 0,
    engine: Annotated[str, typer.Option(help="More of vLLM's EngineArgs, a JSON object.")] = "{}",
    gpus: Annotated[
        str,
        typer.Option(
            help="GPUs to spread dtypes over, such as 0,1,2,3: one each at a time, or 0+1,2+3: two each. "
            "One named twice runs two dtypes, if --engine leaves memory for both."
        ),
    ] = "",
    only: Annotated[str, typer.Option(help="Cells of the suite to run, comma-separated; else all.")] = "",
    limit: Annotated[
        int | None,
        typer.Option(help="Documents of each lm-eval task, in place of the suite's number.", min=1),
    ] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Apply the chat template in lm-eval's tasks.")
    ] = None,
    think_end: Annotated[
        str | None, typer.Option(help="Text that ends a reasoning model's thinking, such as '</think>'.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="CELL.PARAMETER=VALUE",
            help="In place of the suite's own; the value is JSON, or text as it stands. Can be repeated.",
        ),
    ] = None,
) -> None:
    """Measure what KV cache dtypes do to a model: KL, perplexity, retrieval, tasks of lm-eval.

    Exits with 0 if every cell has a result, 1 if some failed and 2 if the input is wrong.
    """
    end_on_sigterm(COMMAND)
    asked = [*filter(None, map(str.strip, kv_cache_dtypes.split(",")))]
    if not asked:
        fail(COMMAND, f"--kv-cache-dtypes {kv_cache_dtypes!r} names no dtype")
    names = list(dict.fromkeys([BASELINE, *asked]))
    left_out: dict[str, str] = {}
    if dtypes.ALL in names:
        try:
            found_here, left_out = dtypes.ask_runnable(model_shape(_model(model)).head_dim)
        except (ConfigError, RuntimeError) as problem:
            fail(COMMAND, problem)
        names = [name for name in dict.fromkeys([*names, *found_here]) if name != dtypes.ALL]
    try:
        dtypes.check_names(names)
    except ValueError as problem:
        fail(COMMAND, problem)
    options = _engine_options(engine)
    given = {"limit": limit, "chat": chat, "think_end": think_end}
    changes = {name: value for name, value in given.items() if value is not None} | _settings(setting or [])
    try:
        cells = load_suite(suite, options, changes, [*filter(None, map(str.strip, only.split(",")))])
        for cell in cells:
            cell.measure.identity(cell.params)
    except ValueError as problem:
        fail(COMMAND, problem)
    places = _gpus(gpus)
    plan = Plan(_model(model), names, suite, cells, options, seed, out, changes)
    try:
        with locked(out):
            failures = _measure(plan, places, left_out)
    except OSError as problem:
        fail(COMMAND, f"--out {out}: {problem}")
    for name, why in left_out.items():
        typer.echo(f"left out: {name}: {why}", err=True)
    for (dtype, name), why in failures.items():
        typer.echo(f"failed: {dtype}, {name}: {why}", err=True)
    if failures:
        raise typer.Exit(FAILED)


def _measure(plan: Plan, places: list[str], left_out: dict[str, str]) -> dict[tuple[str, str], str]:
    """Run every cell that has no result yet, print the tables, and say why cells have none."""
    names, cells = plan.dtypes, plan.cells
    console = Console(width=None if sys.stdout.isatty() else 160)
    failures: dict[tuple[str, str], str] = {}
    bars: tuple[Any, ...] = (
        TextColumn("{task.description:44}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for group in places:
        free.put(group)

    def measure(dtype: str) -> dict[tuple[str, str], str]:
        todo = plan.missing(dtype)
        task = progress.add_task(dtype, total=len(cells), completed=len(cells) - len(todo))
        without = {cell.name for cell in plan.missing(BASELINE)} if dtype != BASELINE else set()
        failed = {cell.name: NO_BASELINE for cell in todo if cell.name in without}
        progress.advance(task, len(failed))
        if todo := [cell for cell in todo if cell.name not in without]:
            group = free.get()
            try:
                failed |= run_dtype(plan, dtype, todo, progress, task, group)
            finally:
                free.put(group)
        progress.update(task, description=f"{dtype}: {'done' if not plan.missing(dtype) else 'failed'}")
        return {(dtype, name): why for name, why in failed.items()}

    # What a report says of cells without results, should this run not come to its end.
    unfinished = {(dtype, cell.name): CUT_SHORT for dtype in names for cell in plan.missing(dtype)}
    note_run(plan.folder, left_out, unfinished)
    with Progress(*bars, console=Console(stderr=True)) as progress, ThreadPoolExecutor(len(places)) as pool:
        try:
            # The others are compared with the baseline while they run.
            failures |= measure(BASELINE)
            for failed in pool.map(measure, names[1:]):
                failures |= failed
        except BaseException:
            isolate.end_all()
            raise
    for shown in tables(plan):
        console.print(shown)
    note_run(plan.folder, left_out, failures)
    return failures
