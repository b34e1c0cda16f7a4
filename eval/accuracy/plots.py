"""The plots of the accuracy report. Ours are warm, vLLM's own dtypes cold, the baseline black."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from vllm_polarquant.eval.dtypes import BASELINE
from vllm_polarquant.eval.measures.retrieval import DEPTHS
from vllm_polarquant.eval.report.page import Report, path_of
from vllm_polarquant.eval.statistics import Z

CAPTION = "In the plots `k4v4` is `polarquant_k4v4`, `tq` is `turboquant` and `@every` is `@every-layer`."
DPI = 100
_MARKERS = "os^vDPX*"
_AROUND = [
    (far * dx, far * dy)
    for far in (7, 16, 27, 40)
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
]
"""Where a label may stand, in points from its own, nearest first."""


def _short(name: str) -> str:
    return name.removeprefix("polarquant_").replace("turboquant_", "tq_").removesuffix("-layer")


def _colours(found: Report, names: list[str]) -> dict[str, Any]:
    """A colour a dtype, darker the more bytes."""
    import matplotlib

    colours: dict[str, Any] = {name: "black" for name in names if name == BASELINE}
    for ours, ramp in ((True, "YlOrRd"), (False, "GnBu")):
        some = [n for n in names if found["dtypes"][n]["ours"] is ours and n != BASELINE]
        for i, name in enumerate(some):
            share = 0.95 - 0.45 * i / max(1, len(some) - 1)
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
    """KL, and how much the perplexity rises, against bytes a token."""
    import matplotlib.pyplot as plt

    cells = _summaries(found, "next_token")
    if not cells:
        return False
    cell, scored = cells[0]
    sizes = {name: size for name in scored if (size := found["dtypes"][name]["bytes"])}
    figure, places = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
    kl = {
        name: (s["kl"], Z * s["kl_standard_error"]) for name in sizes if (s := scored[name]).get("kl", 0) > 0
    }
    rise = {
        name: (math.expm1(s["nll_difference"]), Z * s["nll_difference_standard_error"])
        for name in sizes
        if "nll_difference" in (s := scored[name])
    }
    places[0].set_yscale("log")
    # The differences of small models fall on either side of zero.
    places[1].set_yscale("symlog", linthresh=0.01, linscale=0.6)
    if BASELINE in sizes:
        places[1].plot([sizes[BASELINE]], [0], "k*", markersize=10)
        places[1].axhline(0, color="black", linewidth=0.6, linestyle=":")
    for axes, values in zip(places, (kl, rise), strict=True):
        axes.set_xscale("log")
        points: list[tuple[float, float, str, Any]] = []
        for ours, colour, marker, label in (
            (True, "#c8401a", "o", "polarquant"),
            (False, "#1f6fa8", "s", "vLLM's own"),
        ):
            some = [name for name in values if found["dtypes"][name]["ours"] is ours]
            if not some:
                continue
            x, y, error = [sizes[n] for n in some], [values[n][0] for n in some], [values[n][1] for n in some]
            # A logarithmic axis has no place for the lower end of a wide interval.
            low = [min(e, 0.9 * value) for e, value in zip(error, y, strict=True)] if values is kl else error
            bars = {"color": colour, "fmt": "none", "linewidth": 0.9, "alpha": 0.6}
            axes.plot(x, y, marker, color=colour, label=label, markersize=6)
            axes.errorbar(x, y, [low, error], **bars)
            points += [(sizes[n], values[n][0], _short(n), colour) for n in some]
        if values is rise and BASELINE in sizes:
            points.append((sizes[BASELINE], 0, BASELINE, "black"))
        axes.margins(0.14)
        _plain_ticks(axes, list(sizes.values()), percent=values is rise)
        axes.set_xlabel("bytes of keys and values a token")
        axes.grid(alpha=0.25, which="both", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        if points:
            axes.legend(fontsize=9, loc="upper right")
        _place_labels(axes, points)
    places[0].set_ylabel(f"KL from {BASELINE}, nats a token")
    places[1].set_ylabel(f"perplexity above {BASELINE}'s (linear below 1 %)")
    model = found["environment"]["model"]
    places[0].set_title(f"{model}, {cell}: down and to the left is better", fontsize=10)
    if BASELINE in scored:
        places[1].set_title(f"star: {BASELINE}, perplexity {scored[BASELINE]['perplexity']:.3f}", fontsize=10)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return True


def _plain_ticks(axes: Any, sizes: list[float], percent: bool) -> None:
    """Numbers in full on both axes, where decades alone would leave a short axis without any."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

    largest = max(sizes)
    ticks = [largest / 2**i for i in range(int(math.log2(largest / min(sizes))) + 2)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    if percent:
        steps = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
        axes.yaxis.set_major_locator(FixedLocator([-0.02, -0.01, -0.005, 0, 0.005, *steps]))
        axes.yaxis.set_minor_locator(FixedLocator([]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:+g} %" if y else "0"))
    else:
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
        labels: list[str] = []
        ranked = sorted(scored.items(), key=lambda item: -item[1]["by_position"][-1]["kl"])
        for i, (name, summary) in enumerate(ranked):
            parts = summary["by_position"]
            labels = [f"{part['from']}-{part['to'] - 1}" for part in parts]
            heights = [part["kl"] if part["kl"] > 0 else math.nan for part in parts]
            style = {"marker": _MARKERS[i % len(_MARKERS)], "markersize": 5, "linewidth": 1.3}
            dashed = "-" if found["dtypes"][name]["ours"] else "--"
            axes.plot(range(len(parts)), heights, dashed, color=colours[name], label=_short(name), **style)
        axes.set_yscale("log")
        axes.set_xticks(range(len(labels)), labels)
        axes.margins(x=0.03)
        axes.set_xlabel("tokens of context")
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
        figsize=(2.4 * columns + 0.8, 1.9 * lines + 0.4),
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
            dark = abs(shares[row][column] - 0.5) > 0.35
            text = f"{part['right']}/{part['of']}"
            axes.text(
                column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black"
            )
        drawn = axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlBu", aspect="auto")
        axes.set_title(f"{_short(name)}  {summary['right']}/{summary['of']}", fontsize=8.5)
        labels = [f"{low}+" if high is None else f"{low}-{high - 1}" for low, high in pairs]
        axes.set_xticks(range(len(pairs)), labels, fontsize=8)
        depths = [f"{row / DEPTHS:.0%}-{(row + 1) / DEPTHS:.0%}" for row in range(DEPTHS)]
        axes.set_yticks(range(DEPTHS), depths, fontsize=7)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.supxlabel("pairs in the context", fontsize=9)
    figure.supylabel("depth of the pair that is asked for", fontsize=9)
    if drawn is not None:
        figure.colorbar(drawn, ax=places, shrink=0.7, label="right answers", aspect=30)
    figure.savefig(path, dpi=0.85 * DPI)
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
