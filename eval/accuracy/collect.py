"""Finished results of a folder as one JSON object: the newest set that belongs together."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeGuard

from vllm_polarquant.check import ConfigError, Shape, read_config, read_shape
from vllm_polarquant.eval import dtypes, results
from vllm_polarquant.eval.dtypes import BASELINE
from vllm_polarquant.eval.files import write_text
from vllm_polarquant.eval.measures import MEASURES
from vllm_polarquant.eval.probe.episodes import MODEL_DIR
from vllm_polarquant.eval.report.page import Report
from vllm_polarquant.format import is_polar_dtype

RUN_FILE = "run.json"
DAMAGED = "damaged: delete it and run again"

_IDENTITY = ("model", "model_fingerprint", "versions", "seed")
_PER_ITEM = ("items", "same_tokens")
"""Lists with an entry a question, which no page shows."""


class ReportError(ValueError):
    """Results that no page can be made of, and what to do."""


def note_run(folder: Path, left_out: dict[str, str], failures: dict[tuple[str, str], str]) -> None:
    """Keep with the results what the run's command was, and why a dtype or a cell has none."""
    run = {
        "command": shlex.join(["polarquant-eval", *sys.argv[1:]]),
        "left_out": left_out,
        "failed": [{"dtype": dtype, "cell": cell, "reason": why} for (dtype, cell), why in failures.items()],
    }
    write_text(folder / RUN_FILE, json.dumps(run, indent=1) + "\n")


def model_shape(model: str, config: Path | None = None) -> Shape:
    """Layers, heads and head size of a model: a folder, a name on the hub, or that of results.

    Raises:
        ConfigError: if there is no config.json to read them from.
    """
    folder = Path(model)
    if config is not None:
        return read_shape(read_config(config))
    if folder.is_dir():
        return read_shape(read_config(folder))
    if model == "/".join(MODEL_DIR.parts[-2:]):
        return read_shape(read_config(MODEL_DIR))
    from huggingface_hub import hf_hub_download

    try:
        return read_shape(read_config(Path(hf_hub_download(model, "config.json"))))
    except Exception:
        raise ConfigError(f"no config.json of {model} here; name its folder with --config") from None


def _is_key(key: Any) -> TypeGuard[dict[str, Any]]:
    """Whether it says of a result what a report needs."""
    if not isinstance(key, dict) or not isinstance(key.get("versions"), dict):
        return False
    texts = [key.get(name) for name in ("model", "kv_cache_dtype", "cell", "measure")]
    return set(_IDENTITY) <= set(key) and all(isinstance(text, str) for text in texts)


def _can_be_shown(measure: str, cell: dict[str, Any]) -> bool:
    try:
        MEASURES[measure].columns(cell["summary"])
    except (KeyError, TypeError, AttributeError, ValueError):
        return False
    return True


def _load(folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Finished cells of a folder, oldest first, and what is wrong with the other files."""
    found, problems = [], {}
    for path in folder.glob("*--*.json"):
        if ".part." in path.name:
            continue
        cell = results.read(folder, path.name.removesuffix(".json"))
        key = cell and cell.get("key")
        if cell is None or not _is_key(key):
            problems[path.name] = DAMAGED
        elif key["measure"] not in MEASURES:
            problems[path.name] = f"of a measure {key['measure']!r} that this version does not have"
        elif not _can_be_shown(key["measure"], cell):
            problems[path.name] = DAMAGED
        else:
            found.append(cell | {"stem": path.name.removesuffix(".json"), "time": path.stat().st_mtime})
    return sorted(found, key=lambda cell: (cell["time"], cell["stem"])), problems


def _identity(key: dict[str, Any], names: Iterable[str]) -> str:
    return json.dumps([key.get(name) for name in names], sort_keys=True)


def _named(key: dict[str, Any]) -> str:
    """A set of results in words."""
    facts = ", ".join(f"{name} {value}" for name, value in key["versions"].items())
    return f"{key['model']} ({facts}, seed {key['seed']})"


def _one_set(cells: list[dict[str, Any]], model: str | None) -> tuple[list[dict[str, Any]], list[str]]:
    """The newest results that belong together, and what was set aside."""
    wanted = [cell for cell in cells if model in (None, cell["key"]["model"])]
    if not wanted:
        names = ", ".join(sorted({cell["key"]["model"] for cell in cells}))
        raise ReportError(f"no results of model {model!r}; there are some of {names}")
    newest = _identity(wanted[-1]["key"], _IDENTITY)
    others: dict[str, int] = {}
    kept: dict[str, list[dict[str, Any]]] = {}
    for cell in wanted:
        if _identity(cell["key"], _IDENTITY) == newest:
            kept.setdefault(cell["key"]["cell"], []).append(cell)
        else:
            others[_named(cell["key"])] = others.get(_named(cell["key"]), 0) + 1
    notes = [f"Set aside: {count} results of {name}." for name, count in others.items()]
    chosen = []
    for name, same in kept.items():
        # One cell's name with other parameters, of another suite, is another measurement.
        last = _identity(same[-1]["key"], ("params", "engine", "identity"))
        current = [cell for cell in same if _identity(cell["key"], ("params", "engine", "identity")) == last]
        if len(current) < len(same):
            notes.append(f"Set aside: {len(same) - len(current)} older results of {name}, other parameters.")
        chosen += current
    return chosen, notes


def _skipped_layers(engine: dict[str, Any]) -> int:
    return len({str(layer) for layer in engine.get("kv_cache_dtype_skip_layers", ()) if str(layer).isdigit()})


def collect(folder: Path, model: str | None = None, config: Path | None = None) -> Report:
    """All that the page shows but the distortion table, as JSON.

    Raises:
        ReportError: if there are no results, or none of the baseline.
        ConfigError: if the model's config.json is not found.
    """
    if not folder.is_dir():
        raise ReportError(f"no folder {folder}; run polarquant-eval MODEL --out {folder} first")
    loaded, problems = _load(folder)
    if not loaded:
        damaged = "".join(f"; {name} is {why}" for name, why in problems.items())
        raise ReportError(f"no results in {folder}{damaged}; run polarquant-eval MODEL --out {folder} first")
    cells, notes = _one_set(loaded, model)
    stems = {cell["stem"] for cell in cells}
    if not any(cell["key"]["kv_cache_dtype"] == BASELINE for cell in cells):
        damaged = "".join(f"; {name} is {why}" for name, why in problems.items())
        raise ReportError(
            f"no results of {BASELINE}, the baseline, among the newest in {folder}: "
            f"{_named(cells[-1]['key'])}{damaged}; run polarquant-eval with these versions again"
        )
    key = cells[-1]["key"]
    shape = model_shape(key["model"], config)
    parts: dict[str, Any] = {}
    skipped: dict[str, int] = {}
    for cell in cells:
        name, dtype = cell["key"]["cell"], cell["key"]["kv_cache_dtype"]
        if cell["key"].get("baseline") and cell["key"]["baseline"] not in stems:
            problems[f"{cell['stem']}.json"] = f"compared with a result of {BASELINE} that is not here"
            continue
        about = {field: cell["key"].get(field, {}) for field in ("measure", "params", "engine")}
        part = parts.setdefault(name, about | {"summaries": {}})
        part["summaries"][dtype] = {k: v for k, v in cell["summary"].items() if k not in _PER_ITEM}
        skipped[dtype] = _skipped_layers(about["engine"]) if dtype != BASELINE else 0
    names = {
        dtype: {
            "ours": is_polar_dtype(dtype),
            "bytes": dtypes.token_bytes(dtype, shape, skipped[dtype]),
            "native_layers": max(dtypes.native_layers(dtype, shape), skipped[dtype]),
        }
        for dtype in skipped
    }
    ranked = sorted(names, key=lambda n: (n != BASELINE, -(names[n]["bytes"] or math.inf), n))
    day = datetime.fromtimestamp(max(cell["time"] for cell in cells), UTC).date()
    run = _read_run(folder)
    if run is None:
        problems[RUN_FILE] = DAMAGED
        run = {}
    have = {(dtype, name) for name, part in parts.items() for dtype in part["summaries"]}
    missing = {
        f"{failure['dtype']}, {failure['cell']}": failure["reason"]
        for failure in run.get("failed", ())
        if (failure["dtype"], failure["cell"]) not in have
    }
    return {
        "environment": {"model": key["model"], **key["versions"], "seed": key["seed"], "date": str(day)},
        "command": run.get("command", f"polarquant-eval {key['model']} --kv-cache-dtypes {','.join(ranked)}"),
        "shape": {"layers": shape.layers, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim},
        "dtypes": {name: names[name] for name in ranked},
        "cells": parts,
        "missing": missing | run.get("left_out", {}),
        "problems": problems,
        "notes": notes,
    }


def _read_run(folder: Path) -> dict[str, Any] | None:
    """What `note_run` kept: nothing where it was not called, None where the file is damaged."""
    try:
        run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        for failure in run.get("failed", ()):
            failure["dtype"], failure["cell"], failure["reason"]
        dict(run.get("left_out", {}))
        return dict(run)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None


def read_report(path: Path) -> Report:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ReportError(f"--render {path}: {problem}") from None
    needed = {"environment", "command", "shape", "dtypes", "cells", "missing", "problems", "notes"}
    if not isinstance(found, dict) or not needed <= set(found):
        raise ReportError(f"--render {path} is not what polarquant-eval report writes")
    try:
        unknown = {part["measure"] for part in found["cells"].values()} - set(MEASURES)
    except (AttributeError, KeyError, TypeError):
        raise ReportError(f"--render {path} is not what polarquant-eval report writes") from None
    if unknown:
        raise ReportError(f"--render {path}: this version has no measure {', '.join(sorted(unknown))}")
    return found
