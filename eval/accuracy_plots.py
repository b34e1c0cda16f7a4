"""The plots of the accuracy report. Ours are warm, vLLM's own dtypes cold, the baseline black."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from vllm_polarquant.eval.measures.retrieval import DEPTHS
from vllm_polarquant.eval.report import Report, path_of

BASELINE = "auto"
DPI = 110
_AROUND = [
    (far * dx, far * dy)
    for far in (7, 16, 27, 40)
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
]
"""Where a label may stand, in points from its own, nearest first."""


def _short(name: str) -> str:
    return name.removeprefix("polarquant_").replace("turboquant_", "tq_").replace("_per_token_head", "_pth")


def _colours(found: Report, names: list[str]) -> dict[str, Any]:
    """A colour a dtype, darker the more bytes."""
    import matplotlib

    colours: dict[str, Any] = {name: "black" for name in names if name == BASELINE}
    for ours, ramp in ((True, "YlOrRd"), (False, "GnBu")):
        some = [n for n in names if found["dtypes"][n]["ours"] is ours and n != BASELINE]
        for i, name in enumerate(some):
            share = 0.95 - 0.5 * i / max(1, len(some) - 1)
            colours[name] = matplotlib.colormaps[ramp](share)
    return colours


def _place_labels(axes: Any, points: list[tuple[float, float, str, Any]]) -> None:
    """Write a label beside each point, the first place where it covers neither points nor labels."""
    figure = axes.figure
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    from matplotlib.transforms import Bbox

    at = [axes.transData.transform((x, y)) for x, y, *_ in points]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in at]
    frame = axes.get_window_extent(renderer)
    for x, y, label, colour in points:
        text = axes.annotate(
            label, (x, y), fontsize=8, color=colour, textcoords="offset points", xytext=(0, 0)
        )
        best = None
        for dx, dy in _AROUND:
            text.set_ha("left" if dx > 0 else "right" if dx < 0 else "center")
            text.set_va("bottom" if dy > 0 else "top" if dy < 0 else "center")
            text.xyann = dx, dy
            box = text.get_window_extent(renderer)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            hits = sum(box.overlaps(other) for other in taken) + (not inside)
            if best is None or hits < best[0]:
                best = hits, dx, dy
            if not hits:
                break
        assert best is not None
        _, dx, dy = best
        text.set_ha("left" if dx > 0 else "right" if dx < 0 else "center")
        text.set_va("bottom" if dy > 0 else "top" if dy < 0 else "center")
        text.xyann = dx, dy
        if max(abs(dx), abs(dy)) > 7:
            axes.annotate(
                "", (x, y), xytext=(dx, dy), textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6},
            )  # fmt: skip
        taken.append(text.get_window_extent(renderer))


def _summaries(found: Report, measure: str) -> list[tuple[str, dict[str, Any]]]:
    """Cells of a measure with their summaries by dtype, in the page's order."""
    return [
        (cell, {name: part["summaries"][name] for name in found["dtypes"] if name in part["summaries"]})
        for cell, part in found["cells"].items()
        if part["measure"] == measure
    ]


def _bytes(path: Path, found: Report) -> bool:
    """KL and perplexity against bytes a token."""
    import matplotlib.pyplot as plt

    cells = _summaries(found, "next_token")
    if not cells:
        return False
    cell, scored = cells[0]
    sizes = {name: found["dtypes"][name]["bytes"] for name in scored if found["dtypes"][name]["bytes"]}
    kl = {name: scored[name]["kl"] for name in sizes if scored[name].get("kl", 0) > 0}
    perplexity = {name: scored[name]["perplexity"] for name in sizes}
    figure, places = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
    errors = {name: 1.96 * scored[name]["kl_standard_error"] for name in kl}
    panels = (
        (places[0], kl, errors, f"KL from {BASELINE}, nats a token"),
        (places[1], perplexity, {}, "perplexity"),
    )
    for axes, values, error, label in panels:
        axes.set_xscale("log")
        axes.set_yscale("log")
        points = []
        for ours, colour, marker, name in (
            (True, "#c8401a", "o", "polarquant"),
            (False, "#1f6fa8", "s", "vLLM's own"),
        ):
            some = [n for n in values if found["dtypes"][n]["ours"] is ours and n != BASELINE]
            if some:
                x, y = [sizes[n] for n in some], [values[n] for n in some]
                axes.plot(x, y, marker, color=colour, label=name, markersize=6)
                if error:
                    low = [min(error[n], values[n] * 0.9) for n in some]
                    axes.errorbar(
                        x,
                        y,
                        [low, [error[n] for n in some]],
                        color=colour,
                        fmt="none",
                        linewidth=0.9,
                        alpha=0.6,
                    )
            points += [(sizes[n], values[n], _short(n), colour) for n in some]
        if BASELINE in values:
            axes.plot([sizes[BASELINE]], [values[BASELINE]], "k*", markersize=10)
            axes.axhline(values[BASELINE], color="black", linewidth=0.6, linestyle=":")
            points.append((sizes[BASELINE], values[BASELINE], BASELINE, "black"))
        axes.margins(0.14)
        axes.set_xlabel("bytes of keys and values a token")
        axes.set_ylabel(label)
        _plain_ticks(axes, list(sizes.values()))
        axes.grid(alpha=0.25, which="both", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=9, loc="upper right")
        _place_labels(axes, points)
    places[0].set_title(
        f"down and to the left is better ({found['environment']['model']}, {cell})", fontsize=10
    )
    places[1].set_title("dotted: the 16-bit cache", fontsize=10)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return True


def _plain_ticks(axes: Any, sizes: list[float]) -> None:
    """Numbers in full on both axes, where decades alone would leave a short axis without any."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

    low, high = math.log2(min(sizes)), math.log2(max(sizes))
    base = max(sizes)
    ticks = [base / 2**i for i in range(int(high - low) + 2)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _position(path: Path, found: Report) -> bool:
    """KL by tokens of context, a line a dtype."""
    import matplotlib.pyplot as plt

    cells = [
        (cell, {name: s for name, s in scored.items() if s.get("kl", 0) > 0})
        for cell, scored in _summaries(found, "next_token")
    ]
    cells = [(cell, scored) for cell, scored in cells if scored]
    if not cells:
        return False
    figure, places = plt.subplots(
        1, len(cells), figsize=(2.5 + 7.5 * len(cells), 5), layout="constrained", squeeze=False
    )
    for axes, (cell, scored) in zip(places.flat, cells, strict=True):
        colours = _colours(found, list(scored))
        edges: list[int] = []
        for name, summary in sorted(scored.items(), key=lambda item: -item[1]["by_position"][-1]["kl"]):
            parts = [part for part in summary["by_position"] if part.get("kl", 0) > 0]
            edges = [part["to"] for part in summary["by_position"]]
            dashed = "-" if found["dtypes"][name]["ours"] else "--"
            middle = [math.sqrt(max(part["from"], 1) * part["to"]) for part in parts]
            heights = [part["kl"] for part in parts]
            axes.plot(
                middle, heights, dashed, marker="o", markersize=4, color=colours[name], label=_short(name)
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(edges, [str(edge) for edge in edges])
        axes.minorticks_off()
        axes.set_xlabel("tokens of context (each point: one stretch, at its geometric middle)")
        axes.set_ylabel(f"KL from {BASELINE}, nats a token")
        axes.set_title(cell, fontsize=10)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return True


def _retrieval(path: Path, found: Report) -> bool:
    """Share of right answers by depth (down) and pairs (across), a small map a dtype."""
    import matplotlib.pyplot as plt

    maps = [
        (name if not i else f"{cell}: {name}", summary["by_both"], summary)
        for i, (cell, scored) in enumerate(_summaries(found, "retrieval"))
        for name, summary in scored.items()
        if summary.get("by_both")
    ]
    if not maps:
        return False
    pairs = sorted({tuple(part["pairs"]) for _, grid, _ in maps for part in grid}, key=lambda pair: pair[0])
    columns = min(5, len(maps))
    lines = -(-len(maps) // columns)
    figure, places = plt.subplots(
        lines,
        columns,
        figsize=(2.6 * columns + 0.8, 2.35 * lines + 0.4),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    for axes in places.flat[len(maps) :]:
        axes.set_visible(False)
    drawn = None
    for axes, (name, grid, summary) in zip(places.flat, maps, strict=False):
        shares = [[math.nan] * len(pairs) for _ in range(DEPTHS)]
        for part in grid:
            row, column = round(part["depth"][0] * DEPTHS), pairs.index(tuple(part["pairs"]))
            shares[row][column] = part["right"] / part["of"]
            dark = shares[row][column] < 0.35
            text = f"{part['right']}/{part['of']}"
            axes.text(
                column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black"
            )
        drawn = axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_title(f"{_short(name)}  {summary['right']}/{summary['of']}", fontsize=9)
        labels = [f"{low}+" if high is None else f"{low}-{high - 1}" for low, high in pairs]
        axes.set_xticks(range(len(pairs)), labels, fontsize=7)
        depths = [f"{row / DEPTHS:.0%}-{(row + 1) / DEPTHS:.0%}" for row in range(DEPTHS)]
        axes.set_yticks(range(DEPTHS), depths, fontsize=7)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.supxlabel("pairs in the context", fontsize=9)
    figure.supylabel("depth of the pair that is asked for", fontsize=9)
    if drawn is not None:
        figure.colorbar(drawn, ax=places, shrink=0.7, label="right answers", aspect=30)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return True


def draw(stem: Path, found: Report) -> dict[str, Path]:
    """Draw what the report has numbers for: STEM-KIND.png by kind."""
    import matplotlib

    matplotlib.use("Agg")
    kinds = {"bytes": _bytes, "position": _position, "retrieval": _retrieval}
    drawn = {}
    for kind, plot in kinds.items():
        path = path_of(stem.with_name(f"{stem.name}-{kind}"), "png")
        if plot(path, found):
            drawn[kind] = path
    return drawn
