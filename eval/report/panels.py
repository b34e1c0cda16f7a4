"""Panels of a benchmark's plot: bars where a few shapes are compared, rows of dots where there are many.

A name has the same colour in every panel and in every plot: the baseline is black, ours are warm, vLLM's
own cold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vllm_polarquant.format import DEFAULT_PRESET, is_polar_dtype

LIMIT = "memory limit"
"""The series of what the memory's bandwidth would allow."""

_FIXED = {
    "auto": "#333333",
    "fp8": "#4477aa",
    "turboquant_4bit_nc": "#77b5d9",
    "int4_per_token_head": "#5aae9a",
    DEFAULT_PRESET: "#d1481f",
    LIMIT: "#bbbbbb",
}
_WARM = ("#8c2d04", "#e08214", "#b35806", "#fdb863", "#a50026", "#f46d43", "#7f3b08")
_COLD = ("#2166ac", "#92c5de", "#01665e", "#80cdc1", "#542788", "#8073ac")
_MARKERS = "osD^vPX*"

_CROWDED = 6
"""Groups from which a panel is rows of dots and takes the figure's whole width."""


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour a name, fixed for those that every plot has."""
    found = {name: _FIXED[name] for name in names if name in _FIXED}
    for ours, ramp in ((True, _WARM), (False, _COLD)):
        rest = [name for name in names if name not in found and is_polar_dtype(name) is ours]
        found |= {name: ramp[i % len(ramp)] for i, name in enumerate(rest)}
    return found


@dataclass(frozen=True)
class Panel:
    """Values of every series (None: not measured) at every label.

    unit: what the axis counts, in words.
    better: which values are.
    line: where to draw the baseline's line.
    sort_by: the series that orders the rows of a panel with many labels, highest first.
    """

    title: str
    unit: str
    labels: Sequence[str]
    series: Mapping[str, Sequence[float | None]]
    better: Literal["higher", "lower"] = "higher"
    line: float | None = None
    sort_by: str = ""

    @property
    def crowded(self) -> bool:
        return len(self.labels) > _CROWDED

    @property
    def drawn(self) -> dict[str, Sequence[float | None]]:
        """The series that have a value."""
        return {name: ys for name, ys in self.series.items() if any(y is not None for y in ys)}


def _value(y: float) -> str:
    return f"{y:,.0f}" if y >= 100 else f"{y:.2f}"


def _bars(axes: Any, panel: Panel, colour: Mapping[str, str]) -> None:
    series = panel.drawn
    width = 0.84 / max(1, len(series))
    for i, (name, heights) in enumerate(series.items()):
        at = [x + (i + 0.5) * width - 0.42 for x in range(len(panel.labels))]
        places = [(x, y) for x, y in zip(at, heights, strict=True) if y is not None]
        xs, ys = [x for x, _ in places], [y for _, y in places]
        bars = axes.bar(xs, ys, 0.92 * width, color=colour[name])
        above = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.bar_label(bars, [_value(y) for y in ys], fontsize=7.5, padding=2.5, bbox=above)
    if panel.line is not None:
        axes.axhline(panel.line, color="black", linewidth=0.8, linestyle="--", zorder=0)
    axes.set_xticks(range(len(panel.labels)), panel.labels, fontsize=9)
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.12)
    axes.set_ylabel(panel.unit)
    axes.yaxis.set_major_formatter("{x:,.10g}")


def _dots(axes: Any, panel: Panel, colour: Mapping[str, str], marker: Mapping[str, str]) -> None:
    order = list(range(len(panel.labels)))
    if panel.sort_by in panel.series:
        order.sort(key=lambda i: panel.series[panel.sort_by][i] or 0)
    for name, values in panel.drawn.items():
        places = [(values[i], row) for row, i in enumerate(order) if values[i] is not None]
        style = {"color": colour[name], "markersize": 9 if name == LIMIT else 6.5}
        axes.plot([x for x, _ in places], [y for _, y in places], marker[name], linestyle="none",
                  markeredgewidth=2 if name == LIMIT else 0, **style)  # fmt: skip
    if panel.line is not None:
        axes.axvline(panel.line, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(order)), [panel.labels[i] for i in order], fontsize=9)
    axes.set_ylim(-0.7, len(order) - 0.3)
    axes.set_xlim(left=0)
    axes.set_xlabel(panel.unit)
    axes.grid(axis="y", alpha=0.3, linewidth=0.6)
    axes.tick_params(axis="y", length=0)


def _height(panel: Panel) -> float:
    return 0.8 + 0.27 * len(panel.labels) if panel.crowded else 3.0


def draw(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Draw the panels, two in a row of those with few labels, under one legend."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    lines: list[list[Panel]] = []
    for panel in panels:
        if panel.crowded or not lines or len(lines[-1]) == 2 or lines[-1][0].crowded:
            lines.append([panel])
        else:
            lines[-1].append(panel)
    heights = [_height(line[0]) for line in lines]
    figure = plt.figure(figsize=(12, 1.1 + sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(lines), 2, height_ratios=heights)
    names = list(dict.fromkeys(name for panel in panels for name in panel.drawn))
    colour = colours(names)
    marker = dict(zip(names, _MARKERS * len(names), strict=False)) | {LIMIT: "|"}
    for row, line in enumerate(lines):
        for column, panel in enumerate(line):
            axes = figure.add_subplot(grid[row, :] if len(line) == 1 else grid[row, column])
            if panel.crowded:
                _dots(axes, panel, colour, marker)
            else:
                _bars(axes, panel, colour)
            axes.set_title(f"{panel.title} ({panel.better} is better)", fontsize=10.5, loc="left")
            if lacking := [n for n in panel.series if n not in panel.drawn]:
                said = f"not measured: {', '.join(lacking)}"
                if panel.crowded:
                    axes.set_xlabel(f"{panel.unit}; {said}")
                else:
                    axes.set_xlabel(said, fontsize=8, color="#666666")
            axes.spines[["top", "right"]].set_visible(False)
    handles = [
        Line2D([], [], linestyle="none", color=colour[name], markersize=9, label=name,
               marker=marker[name], markeredgewidth=2 if name == LIMIT else 0)
        for name in names
    ]  # fmt: skip
    figure.legend(
        handles=handles, loc="outside upper center", ncols=len(names), frameon=False, fontsize=9.5,
        title=title, title_fontsize=13, handletextpad=0.2, columnspacing=1.6,
    )  # fmt: skip
    figure.savefig(path, dpi=110)
    plt.close(figure)
