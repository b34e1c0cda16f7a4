"""What the benchmarks share: where numbers were taken, their spread, and JSON, markdown and a plot of them.

A benchmark makes one JSON object, renders it into `Section`s, and `write` puts all three files side by
side. A cell that holds no number holds the words that say why, and keeps its place in every table.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import typer

import vllm_polarquant
from vllm_polarquant.format import FORMAT_VERSION

Report = dict[str, Any]

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

_REASON = 80
"""Characters of an error that a table shows; the JSON has all."""

_CROWDED = 6
"""Groups of bars from which a panel takes the figure's whole width."""

_LETTERS = 50
"""Letters of a panel's labels from which they are tilted."""


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
    found["vllm-polarquant"] = f"{vllm_polarquant.__version__} (page format {FORMAT_VERSION})"
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


def dates(before: Report, now: Report) -> dict[str, str]:
    """The days on which a report was made that goes on with an earlier one, as a part of its environment."""
    days = [*before["environment"]["date"].split(", "), now["environment"]["date"]]
    return {"date": ", ".join(dict.fromkeys(days))}


def check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise typer.BadParameter naming what differs, if anything does."""
    if other := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
        what = "; ".join(f"{name}: {before.get(name)}, now {now.get(name)}" for name in other)
        raise typer.BadParameter(f"--keep: the earlier report was made with another {what}")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, min, max and number of the repeats of one measurement."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "repeats": len(values),
    }


def value(cell: Any) -> float | None:
    """The median of a measured cell, a plain number as it is, None for a cell that failed."""
    if isinstance(cell, Mapping):
        cell = cell.get("median")
    return cell if isinstance(cell, int | float) and math.isfinite(cell) else None


def ratio(cell: Any, base: Any) -> float | None:
    """cell / base, or None if one of them was not measured or base is zero."""
    above, below = value(cell), value(base)
    return above / below if above is not None and below else None


def number(x: float | None, digits: int = 3) -> str:
    """A number with so many significant digits (an int with all), thousands separated; a dash for None."""
    if x is None:
        return "-"
    if isinstance(x, int):
        return f"{x:,}"
    if x == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(x))))
    return f"{x:,.{places}f}"


def shown(cell: Any, digits: int = 4) -> str:
    """A cell as text: "median (min-max)", a plain number, or why there is none."""
    if isinstance(cell, Mapping) and "error" in cell:
        reason = str(cell["error"])
        return reason if len(reason) <= _REASON else f"{reason[:_REASON]}..."
    middle = value(cell)
    if middle is None:
        return cell if isinstance(cell, str) else "-"
    text = number(middle, digits)
    if isinstance(cell, Mapping) and cell.get("repeats", 1) > 1:
        text += f" ({number(cell['min'], digits)}-{number(cell['max'], digits)})"
    return text


def times(x: float | None) -> str:
    """A ratio as text."""
    return "-" if x is None else f"{x:.2f}x"


@dataclass(frozen=True)
class Panel:
    """Grouped bars: a group of bars for every label, a bar for every series (None: no bar)."""

    title: str
    ylabel: str
    labels: Sequence[str]
    series: Mapping[str, Sequence[float | None]]
    line: float | None = None


@dataclass(frozen=True)
class Section:
    """A titled table (none without a header), what must be known to read it, and panels drawn from it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    panels: Sequence[Panel] = field(default_factory=tuple)


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, its first column left-aligned and the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines)


def markdown(title: str, report: Report, sections: Sequence[Section]) -> str:
    """A page of tables under the facts of where they were measured."""
    facts = ", ".join(f"{name} {fact}" for name, fact in report["environment"].items())
    parts = [f"# {title}", facts, f"`{report['command']}`"]
    for section in sections:
        parts += [f"## {section.title}"]
        parts += [markdown_table(section.header, section.rows)] if section.header else []
        parts += [section.note] if section.note else []
    return "\n\n".join(parts) + "\n"


def draw(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Draw the panels, two in a row where none has many groups."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    crowded = max(len(panel.labels) for panel in panels) > _CROWDED
    columns = 1 if crowded or len(panels) == 1 else 2
    lines = -(-len(panels) // columns)
    figure, places = plt.subplots(
        lines, columns, figsize=(12, 0.6 + 3.2 * lines), layout="constrained", squeeze=False
    )
    figure.suptitle(title)
    for axes in places.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(places.flat, panels, strict=False):
        series = {name: bars for name, bars in panel.series.items() if any(y is not None for y in bars)}
        width = 0.8 / max(1, len(series))
        for i, (name, heights) in enumerate(series.items()):
            at = [x + (i + 0.5) * width - 0.4 for x in range(len(panel.labels))]
            drawn = [(x, y) for x, y in zip(at, heights, strict=True) if y is not None]
            axes.bar([x for x, _ in drawn], [y for _, y in drawn], width, label=name)
        if panel.line is not None:
            axes.axhline(panel.line, color="black", linewidth=0.8, linestyle="--")
        long = len(panel.labels) > _CROWDED or sum(map(len, panel.labels)) > _LETTERS
        tilt = {"rotation": 20, "ha": "right"} if long else {}
        axes.set_xticks(range(len(panel.labels)), panel.labels, fontsize=8, **tilt)
        axes.set_ylabel(panel.ylabel)
        axes.set_title(panel.title, fontsize=10)
        if len(series) > 1:
            axes.legend(fontsize=7, ncols=2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def path_of(stem: Path, kind: str) -> Path:
    """STEM.KIND, whatever dots the stem has."""
    return stem.with_name(f"{stem.name}.{kind}")


def save(stem: Path, report: Report) -> Path:
    """Write STEM.json, over what an earlier state of the report wrote, and return its path."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    path = path_of(stem, "json")
    path.write_text(json.dumps(report, indent=1))
    return path


def write(stem: Path, title: str, report: Report, sections: Sequence[Section]) -> list[str]:
    """Write STEM.json, STEM.md and STEM.png; one line for each that says where it is, or why it is not."""
    paths = [save(stem, report), path_of(stem, "md"), path_of(stem, "png")]
    paths[1].write_text(markdown(title, report, sections))
    panels = [panel for section in sections for panel in section.panels]
    if not panels:
        return [*map(str, paths[:2]), "no plot: nothing to draw"]
    try:
        draw(paths[2], title, panels)
    except ImportError as problem:
        return [*map(str, paths[:2]), f"no plot ({problem}); draw it elsewhere with --render {paths[0]}"]
    return [str(path) for path in paths]
