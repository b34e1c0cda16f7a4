"""A report's files: JSON, markdown and a plot of one object, side by side.

What measures makes one JSON object and renders it into `Section`s; `write` puts the three files there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_polarquant.eval.files import write_text
from vllm_polarquant.eval.report.panels import Panel, draw

Report = dict[str, Any]


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


def path_of(stem: Path, kind: str) -> Path:
    """STEM.KIND, whatever dots the stem has."""
    return stem.with_name(f"{stem.name}.{kind}")


def check_stem(stem: Path) -> None:
    """Raise OSError if a report's files cannot lie there: before hours of measuring, not after."""
    if not stem.name or not stem.parent.is_dir():
        raise NotADirectoryError(f"--out {stem}: there is no folder {stem.parent}")
    if not os.access(stem.parent, os.W_OK):
        raise PermissionError(f"--out {stem}: no right to write into {stem.parent}")


def save(stem: Path, report: Report) -> Path:
    """Write STEM.json, over what an earlier state of the report wrote, and return its path."""
    path = path_of(stem, "json")
    write_text(path, json.dumps(report, indent=1))
    return path


def write(stem: Path, title: str, report: Report, sections: Sequence[Section]) -> list[str]:
    """Write STEM.json, STEM.md and STEM.png; one line for each that says where it is, or why it is not."""
    paths = [save(stem, report), path_of(stem, "md"), path_of(stem, "png")]
    write_text(paths[1], markdown(title, report, sections))
    panels = [panel for section in sections for panel in section.panels]
    if not panels:
        return [*map(str, paths[:2]), "no plot: nothing to draw"]
    try:
        draw(paths[2], title, panels)
    except ImportError as problem:
        return [*map(str, paths[:2]), f"no plot ({problem}); draw it elsewhere with --render {paths[0]}"]
    return [str(path) for path in paths]


def publish(console: Console, stem: Path, title: str, report: Report, sections: Sequence[Section]) -> None:
    """Print the tables as `markdown` has them, without the notes, and then what `write` says."""
    for section in sections:
        console.print(f"\n{section.title}")
        console.print(markdown_table(section.header, section.rows), markup=False, soft_wrap=True)
    console.print(*write(stem, title, report, sections), sep="\n")
