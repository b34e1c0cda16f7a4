"""Where and with what a report was measured, and whether another may be added to it."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

import vllm_polarquant
from vllm_polarquant.eval.report.page import Report, Section, check_stem, path_of, write
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


def begun(module: str) -> Report:
    """What every report begins with: where it is measured, and the command, `python -m module` as called."""
    return {"environment": environment(), "command": f"python -m {module} {shlex.join(sys.argv[1:])}".strip()}


def _read(path: Path, option: str) -> Report:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise typer.BadParameter(f"{option}: {path} cannot be read: {problem}") from None
    if not isinstance(found, dict) or not isinstance(found.get("environment"), dict):
        raise typer.BadParameter(f"{option}: {path} is no report")
    return found


def earlier(stem: Path) -> Report:
    """The JSON report that --keep is to add to; raises typer.BadParameter if there is none."""
    return _read(path_of(stem, "json"), "--keep")


def numbers(option: str, text: str) -> list[int]:
    """Positive numbers from "1024,16384", none from ""; raises typer.BadParameter for anything else."""
    parts = [part for part in text.split(",") if part]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"{option} {text!r} is not a list of positive numbers such as 1024,16384")
    return [int(part) for part in parts]


def check_out(stem: Path) -> None:
    """Raise typer.BadParameter if no report can be written there."""
    try:
        check_stem(stem)
    except OSError as problem:
        raise typer.BadParameter(str(problem)) from None


def redrawn(
    console: Console,
    stem: Path,
    path: Path | None,
    title: str,
    sections: Callable[[Report], Sequence[Section]],
) -> bool:
    """Do what --render asks: `page.write` of a JSON report as it is. False without --render.

    Raises:
        typer.BadParameter: if no report can be written there, or that one is of another command.
    """
    check_out(stem)
    if path is None:
        return False
    found = _read(path, "--render")
    try:
        made = sections(found)
        found["command"]
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as problem:
        raise typer.BadParameter(f"--render: {path} is no report of this command: {problem!r}") from None
    console.print(*write(stem, title, found, made), sep="\n")
    return True


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


def continued(before: Report, now: Report) -> Report:
    """How a report begins that goes on with an earlier one: our version now, days and commands of both."""
    days = [*before["environment"]["date"].split(", "), now["environment"]["date"]]
    version = {name: value for name, value in now["environment"].items() if name == OURS}
    return {
        "environment": before["environment"] | version | {"date": ", ".join(dict.fromkeys(days))},
        "command": f"{before['command']} && {now['command']}",
    }


def check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise typer.BadParameter naming what differs, if anything does."""
    if other := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
        what = "; ".join(f"{name}: {before.get(name)}, now {now.get(name)}" for name in other)
        raise typer.BadParameter(f"--keep: the earlier report was made with another {what}")
