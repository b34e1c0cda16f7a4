"""Where and with what a report was measured, and whether another may be added to it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import typer

import vllm_polarquant
from vllm_polarquant.eval.report.page import Report, path_of
from vllm_polarquant.format import FORMAT_VERSION

_GPU_FIELDS = {
    "device": "name",
    "driver": "driver_version",
    "SM clock": "clocks.sm",
    "memory clock": "clocks.mem",
    "max SM clock": "clocks.max.sm",
    "power limit": "power.limit",
}
NVIDIA_SMI = [
    "nvidia-smi",
    f"--query-gpu={','.join(_GPU_FIELDS.values())}",
    "--format=csv,noheader",
]
"""Reads and changes nothing."""


def gpu_state(line: str) -> dict[str, str]:
    """One line of NVIDIA_SMI's output, by name."""
    return dict(zip(_GPU_FIELDS, (value.strip() for value in line.split(",")), strict=True))


def query_gpu() -> dict[str, str]:
    """Name, driver, clocks and power limit of the first visible GPU; empty where there is none to ask."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    try:
        asked = subprocess.run(
            [*NVIDIA_SMI, f"--id={chosen}"], capture_output=True, text=True, timeout=20, check=True
        )
        return gpu_state(asked.stdout.splitlines()[0])
    except (OSError, IndexError, ValueError, subprocess.SubprocessError):
        return {}


def environment() -> dict[str, str]:
    """The device, versions of what a measurement depends on ("not installed" if missing), and the date.

    Asks nvidia-smi and not torch, which would take memory on the GPU for this process.
    """
    found = query_gpu() or {"device": f"CPU ({platform.machine()})"}
    found[OURS] = f"{vllm_polarquant.__version__} (page format {FORMAT_VERSION})"
    for name in ("vllm", "torch", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found | {"date": date.today().isoformat()}


def earlier(stem: Path) -> Report:
    """The JSON report that --keep is to add to; raises typer.BadParameter if there is none."""
    path = path_of(stem, "json")
    if not path.is_file():
        raise typer.BadParameter(f"--keep: there is no {path}")
    return json.loads(path.read_text())


def machine(found: Report) -> dict[str, Any]:
    """What of a report's environment must be the same for measurements to stand in one table."""
    moving = ("date", "clock", "bandwidth")
    return {k: v for k, v in found["environment"].items() if not any(word in k for word in moving)}


OURS = "vllm-polarquant"
"""What of an environment decides over our own measurements only."""


def without_ours(found: Mapping[str, Any]) -> dict[str, Any]:
    """`machine` but for our version: what peers' measurements depend on."""
    return {name: value for name, value in found.items() if name != OURS}


def same_version(before: Report, now: Report) -> bool:
    """Whether both reports were made with this package's version and page format."""
    return bool(before["environment"].get(OURS) == now["environment"].get(OURS))


def continued(before: Report, now: Report) -> dict[str, Any]:
    """The environment of a report that goes on with an earlier one: our version now, and the days of both."""
    days = [*before["environment"]["date"].split(", "), now["environment"]["date"]]
    version = {name: value for name, value in now["environment"].items() if name == OURS}
    return before["environment"] | version | {"date": ", ".join(dict.fromkeys(days))}


def check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise typer.BadParameter naming what differs, if anything does."""
    if other := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
        what = "; ".join(f"{name}: {before.get(name)}, now {now.get(name)}" for name in other)
        raise typer.BadParameter(f"--keep: the earlier report was made with another {what}")
