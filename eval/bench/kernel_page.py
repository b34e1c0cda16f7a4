"""The tables and panels of the kernel benchmark's report."""

from __future__ import annotations

from typing import Any

from vllm_polarquant.eval.bench.grid import CENTRE, OPERATIONS
from vllm_polarquant.eval.report.cells import number, percent, ratio, shown, times, value
from vllm_polarquant.eval.report.page import Report, Section
from vllm_polarquant.eval.report.panels import LIMIT, Panel
from vllm_polarquant.format import DEFAULT_PRESET, PRESETS

TITLE = "Kernels of one layer"


def _rows(cells: list[dict[str, Any]], op: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Results of one operation by shape and contender."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in cells:
        if cell["op"] == op:
            found.setdefault(cell["label"], {})[cell["name"]] = cell["result"]
    return found


def sections(found: Report) -> list[Section]:
    """A table of every operation, and one of the rows where all presets were measured."""
    bandwidth = max((value(b) or 0 for b in found["bandwidth"].values()), default=0)
    names = found["contenders"]
    mine = DEFAULT_PRESET if DEFAULT_PRESET in names else names[-1]
    main = [name for name in names if name not in PRESETS or name == mine]
    made = []
    for op in OPERATIONS:
        rows = _rows(found["cells"], op)
        if not rows:
            continue
        made.append(_times(op, rows, main, mine, bandwidth))
        compared = [label for label, row in rows.items() if len(row) > len(main)]
        if compared and op != "prefix":
            label = CENTRE.label if CENTRE.label in compared else compared[-1]
            made.append(_presets(op, label, rows[label], names, bandwidth))
    return made


def _floor(result: dict[str, Any] | None, bandwidth: float) -> float | None:
    """Microseconds that the bytes of a result take at least."""
    return result["bytes"] * 1e6 / bandwidth if result and "bytes" in result and bandwidth else None


def _times(
    op: str, rows: dict[str, dict[str, dict[str, Any]]], names: list[str], mine: str, bandwidth: float
) -> Section:
    body = []
    speed: dict[str, list[float | None]] = {name: [] for name in names if name != "auto"}
    if op == "decode":
        speed[LIMIT] = []
    for label, row in rows.items():
        ours, base = row.get(mine), row.get("auto")
        least = _floor(ours, bandwidth)
        body.append(
            [label, *(shown(row.get(name)) for name in names), number(least)]
            + [times(ratio(row.get(peer), ours)) for peer in ("auto", "fp8")]
            + [percent(ratio(least, ours))]
        )
        for name, bars in speed.items():
            bars.append(ratio(base, least if name == LIMIT else row.get(name)))
    drawn = any(x is not None for bars in speed.values() for x in bars)
    return Section(
        title=f"{op.capitalize()}, us a layer",
        header=["shape", *names, "limit", f"{mine} vs auto", "vs fp8", "of limit"],
        rows=body,
        note=_NOTES[op],
        panels=[
            Panel(_PANELS[op], "times as fast as auto", [*map(_short, rows)], speed, line=1.0, sort_by=mine)
        ]
        if drawn
        else (),
    )


def _short(label: str) -> str:
    """A shape's label without what nearly all have in common."""
    return label.replace(f", GQA {CENTRE.group}", "").replace(f", d {CENTRE.head_dim}", "")


def _presets(
    op: str, label: str, row: dict[str, dict[str, Any]], names: list[str], bandwidth: float
) -> Section:
    body = []
    for name in names:
        result = row.get(name, {})
        least = _floor(result, bandwidth)
        errors = result.get("errors", {})
        body.append(
            [
                name,
                number(result.get("slot_bytes")),
                shown(result),
                number(least),
                percent(ratio(least, result)),
                *(times(ratio(row.get(peer), result)) for peer in ("auto", "fp8")),
                *(number(errors.get(kind)) for kind in ("exact", "reference")),
            ]
        )
    return Section(
        title=f"{op.capitalize()}, {label}: every format",
        header=["dtype", "bytes", "us", "limit", "of limit", "vs auto", "vs fp8", "error", "kernel error"],
        rows=body,
        note="Bytes of a token in one KV head. Error: of the output against exact attention on the values "
        "before quantisation, relative; kernel error: against `reference.attention` on the same pages.",
    )


_NOTES = {
    "decode": "One token a request; rotation and the merge of a request's parts included, not what is "
    "planned once a step for all layers, of ours or FlashAttention's. CUDA-graph replays over several "
    "layers' caches, 256 MiB or more together. Median (min-max). Limit: the pages of our dtype at the "
    "measured bandwidth. Each output is compared once with exact attention, ours up to 32k tokens also with "
    "the reference on the same pages.",
    "store": "Keys and values into pages, quantisation included. CUDA-graph replays. Limit: keys and values "
    "read and pages written at the measured bandwidth. Outputs are checked by the decode table.",
    "prefix": "A chunk's attention on its cached prefix and on itself, not captured, as in vLLM. The limit "
    "counts memory only; long chunks are bound by arithmetic.",
}

_PANELS = {
    "decode": f"Decode, requests x tokens of context; GQA {CENTRE.group} and d {CENTRE.head_dim} if not said",
    "store": "Storing new tokens",
    "prefix": "Attention of new tokens on a cached prefix",
}
