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
MAPS = 3
"""Dtypes that lost most answers, of which the plot of retrieval shows where."""

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


def _map(axes: Any, summary: dict[str, Any], pairs: list[tuple[int, int | None]]) -> None:
    """Right answers of one dtype by depth (down) and pairs (across)."""
    shares = [[math.nan] * len(pairs) for _ in range(DEPTHS)]
    for part in summary["by_both"]:
        low, high = part["pairs"]
        row, column = round(part["depth"][0] * DEPTHS), pairs.index((low, high))
        shares[row][column] = part["right"] / part["of"]
        text = f"{part['right']}/{part['of']}"
        weight = "bold" if part["right"] < part["of"] else "normal"
        axes.text(column, row, text, ha="center", va="center", fontsize=9, fontweight=weight)
    axes.imshow(shares, vmin=0, vmax=1, cmap="OrRd_r", aspect="auto")
    axes.set_facecolor("#e4e4e4")
    labels = [f"{low}+" if high is None else f"{low}-{high - 1}" for low, high in pairs]
    axes.set_xticks(range(len(pairs)), labels, fontsize=8.5)
    depths = [f"{row / DEPTHS:.0%}-{(row + 1) / DEPTHS:.0%}" for row in range(DEPTHS)]
    axes.set_yticks(range(DEPTHS), depths, fontsize=8.5)
    axes.set_xlabel("pairs in the context", fontsize=9)
    axes.set_ylabel("depth of the pair that is asked for", fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _retrieval(path: Path, found: Report) -> bool:
    """Right answers of every dtype, and where the answers that most were lost by were."""
    import matplotlib.pyplot as plt

    scored = next((s for _, s in _summaries(found, "retrieval") if s), None)
    if scored is None:
        return False
    of = max(s["of"] for s in scored.values())
    base = scored[BASELINE]["right"] if BASELINE in scored else of
    losers = [name for name, s in scored.items() if s["right"] < base and s.get("by_both")]
    shown = sorted(losers, key=lambda name: scored[name]["right"])[:MAPS]
    height = max(2.8, 0.8 + 0.22 * len(scored))
    widths = [6.0, *[3.6] * len(shown)]
    figure, places = plt.subplots(
        1,
        len(widths),
        figsize=(sum(widths), height),
        layout="constrained",
        squeeze=False,
        width_ratios=widths,
    )
    bars, *maps = places.flat
    names = list(reversed(scored))
    sizes = {name: found["dtypes"][name]["bytes"] for name in names}
    colours = [
        "#333333" if name == BASELINE else "#c8401a" if found["dtypes"][name]["ours"] else "#1f6fa8"
        for name in names
    ]
    drawn = bars.barh(range(len(names)), [scored[name]["right"] for name in names], 0.7, color=colours)
    bars.bar_label(drawn, [f"{scored[n]['right']}" for n in names], fontsize=8, padding=2)
    bars.set_yticks(
        range(len(names)),
        [f"{_short(n)}, {sizes[n]:,} bytes" if sizes[n] else _short(n) for n in names],
        fontsize=8.5,
    )
    bars.axvline(base, color="black", linewidth=0.7, linestyle="--", zorder=0)
    bars.set_ylim(-0.6, len(names) - 0.4)
    bars.set_xlabel(f"right answers of {of} (higher is better)", fontsize=9)
    lost = (
        f"{len(losers)} of {len(scored) - (BASELINE in scored)} lose answers" if losers else "none loses one"
    )
    bars.set_title(f"Retrieval by dtype, most bytes a token first: {lost}", fontsize=10, loc="left")
    bars.spines[["top", "right"]].set_visible(False)
    bars.tick_params(axis="y", length=0)
    grids = [scored[name]["by_both"] for name in shown]
    pairs = sorted(
        {(low, high) for grid in grids for low, high in (p["pairs"] for p in grid)}, key=lambda p: p[0]
    )
    for axes, name in zip(maps, shown, strict=True):
        _map(axes, scored[name], pairs)
        axes.set_title(f"{_short(name)}: {scored[name]['right']} of {scored[name]['of']}", fontsize=10)
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
