"""`polarquant-eval hard-keys`: presets on checkpoints whose keys were made hard to quantise.

Presets are measured against 16 bits on each edited checkpoint, by the driver and measures of the other
evaluations, with all layers quantised and with those in 16 bits that `polarquant check` names.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_polarquant.check import ConfigError, check_config, read_config, read_shape
from vllm_polarquant.eval import results
from vllm_polarquant.eval.command import FAILED, end_on_sigterm, fail
from vllm_polarquant.eval.dtypes import ALL, BASELINE, check_names
from vllm_polarquant.eval.files import locked, write_text
from vllm_polarquant.eval.hard_keys.cases import Case, run_cases, skip_plan
from vllm_polarquant.eval.hard_keys.checkpoint import EditError
from vllm_polarquant.eval.hard_keys.edits import EDITS, default_layers, write_edit
from vllm_polarquant.eval.hard_keys.table import rows, table
from vllm_polarquant.eval.plan import PROBE, Plan
from vllm_polarquant.eval.probe.episodes import MODEL_DIR
from vllm_polarquant.eval.suites import SuiteError, load_suite
from vllm_polarquant.format import DEFAULT_PRESET, PRESETS
from vllm_polarquant.keys import judge_keys

COMMAND = "polarquant-eval hard-keys"
PROBE_ENGINE = {"dtype": "float16", "kv_cache_memory_bytes": 128 << 20, "enforce_eager": True}


def _edits(text: str) -> list[tuple[str, float]]:
    found = []
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, strength = part.partition(":")
        if name not in EDITS:
            known = ", ".join(EDITS)
            fail(COMMAND, f"unknown edit {name!r}; choose from {known}, with :STRENGTH if you like")
        try:
            value = float(strength) if strength else EDITS[name].strength
        except ValueError:
            value = 0.0
        if not 0 < value < 1e4:
            fail(COMMAND, f"--edits {part!r}: the strength must be a number above 0 and below 10,000")
        found.append((name, value))
    return list(dict.fromkeys(found))


def dtypes_of(text: str) -> list[str]:
    names = list(PRESETS) if text == ALL else [part.strip() for part in text.split(",") if part.strip()]
    return list(dict.fromkeys([BASELINE, *names]))


def _layers(text: str, count: int) -> list[int]:
    if not text:
        return default_layers(count)
    try:
        layers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        fail(COMMAND, f"--layers {text!r} is not like 1,3")
    if not 0 <= layers[0] <= layers[-1] < count:
        fail(COMMAND, f"--layers {text!r}: the model has layers 0 to {count - 1}")
    return layers


def write_suite(out: Path, rows: int, context: int, episodes: int, options: dict[str, Any]) -> Path:
    """A suite file of what is to be measured: the workers read it too."""
    cells: dict[str, Any] = {"text": {"measure": "next_token", "rows": rows, "context": context}}
    if episodes:
        cells["retrieval"] = {"measure": "retrieval", "lengths": ["1000"], "episodes": episodes}
    path = out / "suite.json"
    write_text(path, json.dumps({"engine": options, "cells": cells}, indent=1) + "\n")
    return path.resolve()


def main(
    model: Annotated[str, typer.Argument(help=f"Folder of a Llama, or {PROBE!r}, the shipped one.")] = PROBE,
    edits: Annotated[
        str, typer.Option(help=f"Some of {', '.join(EDITS)}; uneven:10 is one of another strength.")
    ] = ",".join(EDITS),
    layers: Annotated[str, typer.Option(help="Layers to edit, such as 1,3; by default two.")] = "",
    kv_cache_dtypes: Annotated[
        str, typer.Option(help=f"Comma-separated, or {ALL!r} presets; {BASELINE} is always among them.")
    ] = DEFAULT_PRESET,
    rows_of_text: Annotated[int, typer.Option("--rows", help="Rows of held-out text.", min=1)] = 8,
    context: Annotated[int, typer.Option(help="Tokens of a row.", min=2)] = 256,
    episodes: Annotated[
        int, typer.Option(help="Retrieval episodes, five questions each; 0 leaves retrieval out.", min=0)
    ] = 0,
    out: Annotated[Path, typer.Option(help="Folder of models and results; what is there is kept.")] = Path(
        "hard-keys-results"
    ),
    seed: Annotated[int, typer.Option(help="Of the edits and the engine.", min=0)] = 0,
    engine: Annotated[str, typer.Option(help="More of vLLM's EngineArgs, a JSON object.")] = "{}",
) -> None:
    """Edit a model so that its keys are hard to quantise, and measure what presets lose and skipping saves.

    Exits with 0 if every cell has a result, 1 if some failed and 2 if the input is wrong.
    """
    end_on_sigterm(COMMAND)
    folder = MODEL_DIR if model == PROBE else Path(model).resolve()
    chosen, dtypes = _edits(edits), dtypes_of(kv_cache_dtypes)
    for option, text, found in (
        ("--edits", edits, chosen),
        ("--kv-cache-dtypes", kv_cache_dtypes, dtypes[1:]),
    ):
        if not found:
            fail(COMMAND, f"{option} {text!r} names none")
    try:
        options = (PROBE_ENGINE if model == PROBE else {}) | dict(json.loads(engine))
    except (ValueError, TypeError):
        fail(COMMAND, f"--engine {engine!r} is not a JSON object such as '{{\"tensor_parallel_size\": 2}}'")
    try:
        check_names(dtypes)
    except ValueError as problem:
        fail(COMMAND, problem)
    try:
        config = read_config(folder)
        problems = check_config(config)
        which = _layers(layers, read_shape(config).layers)
        if problems:
            raise EditError(problems[0].message)
        with locked(out):
            suite = write_suite(out, rows_of_text, context, episodes, options)
            failures = _measure(folder, chosen, which, Plan("", dtypes, str(suite), [], options, seed, out))
    except (ConfigError, EditError, SuiteError, OSError) as problem:
        fail(COMMAND, problem)
    for what, why in failures.items():
        typer.echo(f"failed: {what}: {why}", err=True)
    if failures:
        raise typer.Exit(FAILED)


def _measure(
    folder: Path, chosen: list[tuple[str, float]], layers: list[int], common: Plan
) -> dict[str, str]:
    """Edit, measure and print; why each cell that has no result has none. common: all but model and cells."""
    out, seed = common.folder, common.seed
    shape = read_shape(read_config(folder))
    cells = load_suite(common.suite, common.engine)
    models = {"none": folder}
    for name, strength in chosen:
        label = name if strength == EDITS[name].strength else f"{name}:{strength:g}"
        models[label] = write_edit(folder, name, strength, layers, seed, out / "models")

    cases = []
    for label, path in models.items():
        plan = replace(common, model=str(path.resolve()), cells=cells, folder=out / label.replace(":", "-"))
        cases.append(Case(label, judge_keys(path, read_config(path), shape), plan, {}))
    for case in cases:
        skip = tuple(case.keys.skip_layers)
        if skip:
            for other in (case, cases[0]):
                other.skipped[skip] = skip_plan(other.plain, list(skip))

    bars = (TextColumn("{task.description:58}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bars, console=Console(stderr=True)) as progress:
        failures = run_cases(cases, progress)

    for case in cases:
        lost = ", ".join(f"{layer.bits_lost:.2f}" for layer in case.keys.layers)
        typer.echo(f"{case.label}: bits lost by layer {lost}; {case.keys.flag or 'no layer to skip'}")
    found = rows(cases)
    Console(width=None if sys.stdout.isatty() else 200).print(table(found))
    summary = {"versions": results.versions(), "layers": layers, "seed": seed, "rows": found}
    write_text(out / "hard-keys.json", json.dumps(summary, indent=1) + "\n")
    return failures
