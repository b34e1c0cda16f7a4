"""The accuracy page: tables, verdicts and plots of what was collected."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_polarquant.eval import dtypes
from vllm_polarquant.eval.accuracy.plots import CAPTION, draw
from vllm_polarquant.eval.accuracy.verdicts import verdicts
from vllm_polarquant.eval.dtypes import BASELINE
from vllm_polarquant.eval.files import write_text
from vllm_polarquant.eval.measures import MEASURES
from vllm_polarquant.eval.report.page import Report, Section, markdown, path_of, save

TITLE = "Accuracy"


def bits(found: Report, name: str) -> float | None:
    shape, size = found["shape"], found["dtypes"][name]["bytes"]
    return size and size * 8 / (2 * shape["layers"] * shape["kv_heads"] * shape["head_dim"])


def distortion_of(head_dim: int, vectors: int) -> dict[str, Any]:
    """What `polarquant-eval distortion` measures at one head size."""
    from vllm_polarquant.eval import distortion

    rows = distortion.rows(head_dim, vectors, seed=0, progress=sys.stderr.isatty())
    return {"head_dim": head_dim, "vectors": vectors, "seed": 0, "rows": rows}


def _label(found: Report, name: str) -> str:
    return f"**`{name}`**" if found["dtypes"][name]["ours"] else f"`{name}`"


def _main_table(found: Report) -> Section:
    rows: dict[str, dict[str, str]] = {}
    for name, about in found["dtypes"].items():
        size, each = about["bytes"], bits(found, name)
        rows[name] = {
            "bytes a token": f"{size:,}" if size else "unknown",
            "bits/element": f"{each:.3f}" if each else "-",
            "16-bit layers": str(about["native_layers"]) if name != BASELINE else "all",
        }
    taken: set[str] = set()
    for cell, part in found["cells"].items():
        shown = {name: MEASURES[part["measure"]].columns(s) for name, s in part["summaries"].items()}
        titles = dict.fromkeys(title for row in shown.values() for title in row)
        # Two cells of one measure have the same columns.
        named = {title: f"{cell}: {title}" if title in taken else title for title in titles}
        taken |= set(titles)
        for name, row in shown.items():
            rows[name] |= {named[title]: text for title, text in row.items()}
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    shape = found["shape"]
    note = (
        f"Bytes of one token's keys and values in {shape['layers']} layers x {shape['kv_heads']} kv heads, "
        f"head_dim {shape['head_dim']}, as vLLM's page specification and ours give them. Differences and KL "
        f"are from `{BASELINE}` on the same text, intervals of 95 %."
    )
    if any(dtypes.is_turboquant(name) for name in found["dtypes"]):
        note += (
            f" vLLM keeps the first and last two layers in 16 bits beside `turboquant_*`; with "
            f"`{dtypes.EVERY_LAYER}`, which vLLM does not offer, every layer is quantised, as elsewhere."
        )
    return Section(
        "Every dtype",
        ["kv-cache-dtype", *columns],
        [[_label(found, name), *(row.get(c, "-") for c in columns)] for name, row in rows.items()],
        note,
    )


def _details(found: Report) -> list[Section]:
    made = []
    for cell, part in found["cells"].items():
        for title, show in MEASURES[part["measure"]].details.items():
            rows = {
                name: row
                for name in found["dtypes"]
                if (s := part["summaries"].get(name)) and (row := show(s))
            }
            columns = list(dict.fromkeys(column for row in rows.values() for column in row))
            body = [[_label(found, n), *(row.get(c, "-") for c in columns)] for n, row in rows.items()]
            if body:
                made.append(Section(f"{cell}: {title}", ["kv-cache-dtype", *columns], body))
    return made


def _distortion(found: Report) -> list[Section]:
    if not (part := found.get("distortion")):
        return []
    from vllm_polarquant.eval import distortion

    rows = []
    for row in part["rows"]:
        line = distortion.cells(row)
        rows.append([f"**{line[0]}**" if "this package" in line[0] else line[0], *line[1:]])
    note = (
        f"`polarquant-eval distortion --head-dims {part['head_dim']} --vectors {part['vectors']} "
        f"--seed {part['seed']}`: each codec alone on Gaussian vectors, and on uneven ones, of which one "
        "channel pair in sixteen is 10 to 30 times as large. Errors relative to the power; limit: Shannon's."
    )
    header = distortion.columns(part["rows"])
    return [Section(f"Distortion at head_dim {part['head_dim']}", header, rows, note)]


def _rest(found: Report) -> list[Section]:
    made = []
    left = found["missing"] | found["problems"]
    if left:
        rows = [[f"`{name}`", why] for name, why in left.items()]
        made.append(Section("Not in the tables", ["what", "why"], rows))
    options: Callable[[dict[str, Any]], str] = lambda some: ", ".join(f"{k} {v}" for k, v in some.items())  # noqa: E731
    rows = [[n, p["measure"], options(p["params"]), options(p["engine"])] for n, p in found["cells"].items()]
    note = "\n\n".join(found["notes"])
    made.append(Section("What was measured", ["cell", "measure", "parameters", "engine"], rows, note))
    return made


def sections(found: Report, plots: dict[str, str]) -> list[Section]:
    """The page; plots are file names by kind."""
    image = {kind: f"![{kind}]({name})" for kind, name in plots.items()}
    made = []
    if said := verdicts(found):
        made.append(Section("In short", (), (), "\n".join(f"* {line}" for line in said)))
    made.append(_main_table(found))
    if "bytes" in image:
        made.append(Section("Accuracy against bytes", (), (), f"{image['bytes']}\n\n{CAPTION}"))
    if "position" in image:
        made.append(Section("KL by position", (), (), image["position"]))
    if "retrieval" in image:
        made.append(Section("Retrieval by depth and number of pairs", (), (), image["retrieval"]))
    return [*made, *_details(found), *_distortion(found), *_rest(found)]


def write(stem: Path, found: Report) -> list[str]:
    """Write STEM.json, STEM.md and STEM-*.png; their paths."""
    # What no page can be made of fails before anything is written.
    sections(found, {})
    saved = save(stem, found)
    drawn = draw(stem, found)
    page = path_of(stem, "md")
    names = {kind: path.name for kind, path in drawn.items()}
    write_text(page, markdown(TITLE, found, sections(found, names)))
    return [str(path) for path in (saved, page, *drawn.values())]
