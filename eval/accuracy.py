"""`polarquant-eval report`: one page and plots of what every KV cache dtype loses, from a folder of results.

The JSON file that lies beside the page holds all that it shows, so that `--render` needs neither results nor
vLLM. A page is of one model with the same versions, device and seed; the newest such set is taken, and what
was set aside is said. Verdicts are computed from the numbers.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from vllm_polarquant.check import ConfigError, Shape, read_config, read_shape
from vllm_polarquant.eval import dtypes, report, results
from vllm_polarquant.eval.accuracy_plots import BASELINE, CAPTION, Z95, draw
from vllm_polarquant.eval.measures import MEASURES
from vllm_polarquant.eval.probe.episodes import MODEL_DIR
from vllm_polarquant.eval.report import Report, Section
from vllm_polarquant.format import DEFAULT_PRESET, is_polar_dtype

TITLE = "Accuracy"
RUN_FILE = "run.json"
BAD_INPUT = 2

NEAR = 0.1
"""Dtypes whose bytes differ by no more than this share are compared as equally large."""

_IDENTITY = ("model", "model_fingerprint", "versions", "seed")
_PER_ITEM = ("items", "same_tokens")
"""Lists with an entry a question, which no page shows."""


class ReportError(ValueError):
    """Results that no page can be made of, and what to do."""


def _fail(message: object) -> NoReturn:
    typer.echo(f"polarquant-eval report: {message}", err=True)
    raise typer.Exit(BAD_INPUT)


def note_run(folder: Path, left_out: dict[str, str], failures: dict[tuple[str, str], str]) -> None:
    """Keep with the results what the run's command was, and why a dtype or a cell has none."""
    run = {
        "command": shlex.join(["polarquant-eval", *sys.argv[1:]]),
        "left_out": left_out,
        "failed": [{"dtype": dtype, "cell": cell, "reason": why} for (dtype, cell), why in failures.items()],
    }
    (folder / RUN_FILE).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


def model_shape(model: str, config: Path | None = None) -> Shape:
    """Layers, heads and head size of a model: a folder, a name on the hub, or that of results.

    Raises:
        ConfigError: if there is no config.json to read them from.
    """
    folder = Path(model)
    if config is not None:
        return read_shape(read_config(config))
    if folder.is_dir():
        return read_shape(read_config(folder))
    if model == "/".join(MODEL_DIR.parts[-2:]):
        return read_shape(read_config(MODEL_DIR))
    from huggingface_hub import hf_hub_download

    try:
        return read_shape(read_config(Path(hf_hub_download(model, "config.json"))))
    except Exception:
        raise ConfigError(f"no config.json of {model} here; name its folder with --config") from None


# Collecting.


def _load(folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Finished cells of a folder, oldest first, and what is wrong with the other files."""
    found, problems = [], {}
    for path in folder.glob("*--*.json"):
        if ".part." in path.name:
            continue
        cell = results.read(folder, path.name.removesuffix(".json"))
        key = cell.get("key") if cell else None
        if not isinstance(key, dict) or not {*_IDENTITY, "kv_cache_dtype", "cell", "measure"} <= set(key):
            problems[path.name] = "damaged: delete it and run again"
        elif key["measure"] not in MEASURES:
            problems[path.name] = f"of a measure {key['measure']!r} that this version does not have"
        else:
            assert cell is not None
            found.append(cell | {"stem": path.name.removesuffix(".json"), "time": path.stat().st_mtime})
    return sorted(found, key=lambda cell: (cell["time"], cell["stem"])), problems


def _identity(key: dict[str, Any], names: Iterable[str]) -> str:
    return json.dumps([key.get(name) for name in names], sort_keys=True)


def _named(key: dict[str, Any]) -> str:
    """A set of results in words."""
    facts = ", ".join(f"{name} {value}" for name, value in key["versions"].items())
    return f"{key['model']} ({facts}, seed {key['seed']})"


def _one_set(cells: list[dict[str, Any]], model: str | None) -> tuple[list[dict[str, Any]], list[str]]:
    """The newest results that belong together, and what was set aside."""
    wanted = [cell for cell in cells if model in (None, cell["key"]["model"])]
    if not wanted:
        names = ", ".join(sorted({cell["key"]["model"] for cell in cells}))
        raise ReportError(f"no results of model {model!r}; there are some of {names}")
    newest = _identity(wanted[-1]["key"], _IDENTITY)
    others: dict[str, int] = {}
    kept: dict[str, list[dict[str, Any]]] = {}
    for cell in wanted:
        if _identity(cell["key"], _IDENTITY) == newest:
            kept.setdefault(cell["key"]["cell"], []).append(cell)
        else:
            others[_named(cell["key"])] = others.get(_named(cell["key"]), 0) + 1
    notes = [f"Set aside: {count} results of {name}." for name, count in others.items()]
    chosen = []
    for name, same in kept.items():
        # One cell's name with other parameters, of another suite, is another measurement.
        last = _identity(same[-1]["key"], ("params", "engine", "identity"))
        current = [cell for cell in same if _identity(cell["key"], ("params", "engine", "identity")) == last]
        if len(current) < len(same):
            notes.append(f"Set aside: {len(same) - len(current)} older results of {name}, other parameters.")
        chosen += current
    return chosen, notes


def _skipped_layers(engine: dict[str, Any]) -> int:
    return len({str(layer) for layer in engine.get("kv_cache_dtype_skip_layers", ()) if str(layer).isdigit()})


def collect(folder: Path, model: str | None = None, config: Path | None = None) -> Report:
    """All that the page shows but the distortion table, as JSON.

    Raises:
        ReportError: if there are no results, or none of the baseline.
        ConfigError: if the model's config.json is not found.
    """
    if not folder.is_dir():
        raise ReportError(f"no folder {folder}; run polarquant-eval MODEL --out {folder} first")
    loaded, problems = _load(folder)
    if not loaded:
        damaged = "".join(f"; {name} is {why}" for name, why in problems.items())
        raise ReportError(f"no results in {folder}{damaged}; run polarquant-eval MODEL --out {folder} first")
    cells, notes = _one_set(loaded, model)
    stems = {cell["stem"] for cell in cells}
    if not any(cell["key"]["kv_cache_dtype"] == BASELINE for cell in cells):
        raise ReportError(
            f"no results of {BASELINE}, the baseline, among the newest in {folder}: "
            f"{_named(cells[-1]['key'])}; run polarquant-eval with these versions again"
        )
    key = cells[-1]["key"]
    shape = model_shape(key["model"], config)
    parts: dict[str, Any] = {}
    skipped: dict[str, int] = {}
    for cell in cells:
        name, dtype = cell["key"]["cell"], cell["key"]["kv_cache_dtype"]
        if cell["key"].get("baseline") and cell["key"]["baseline"] not in stems:
            problems[f"{cell['stem']}.json"] = f"compared with a result of {BASELINE} that is not here"
            continue
        about = {field: cell["key"].get(field, {}) for field in ("measure", "params", "engine")}
        part = parts.setdefault(name, about | {"summaries": {}})
        part["summaries"][dtype] = {k: v for k, v in cell["summary"].items() if k not in _PER_ITEM}
        skipped[dtype] = _skipped_layers(about["engine"]) if dtype != BASELINE else 0
    names = {
        dtype: {
            "ours": is_polar_dtype(dtype),
            "bytes": dtypes.token_bytes(dtype, shape, skipped[dtype]),
            "native_layers": max(dtypes.native_layers(dtype, shape), skipped[dtype]),
        }
        for dtype in skipped
    }
    ranked = sorted(names, key=lambda n: (n != BASELINE, -(names[n]["bytes"] or math.inf), n))
    day = datetime.fromtimestamp(max(cell["time"] for cell in cells), UTC).date()
    run = _read_run(folder)
    have = {(dtype, name) for name, part in parts.items() for dtype in part["summaries"]}
    missing = {
        f"{failure['dtype']}, {failure['cell']}": failure["reason"]
        for failure in run.get("failed", ())
        if (failure["dtype"], failure["cell"]) not in have
    }
    return {
        "environment": {"model": key["model"], **key["versions"], "seed": key["seed"], "date": str(day)},
        "command": run.get("command", f"polarquant-eval {key['model']} --kv-cache-dtypes {','.join(ranked)}"),
        "shape": {"layers": shape.layers, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim},
        "dtypes": {name: names[name] for name in ranked},
        "cells": parts,
        "missing": missing | run.get("left_out", {}),
        "problems": problems,
        "notes": notes,
    }


def _read_run(folder: Path) -> dict[str, Any]:
    try:
        run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        return run if isinstance(run, dict) else {}
    except (OSError, ValueError):
        return {}


def distortion_of(head_dim: int, vectors: int) -> dict[str, Any]:
    """What `polarquant-eval distortion` measures at one head size."""
    from vllm_polarquant.eval import distortion

    rows = distortion.rows(head_dim, vectors, seed=0, progress=sys.stderr.isatty())
    return {"head_dim": head_dim, "vectors": vectors, "seed": 0, "rows": rows}


# Reading what was collected.


def _of(found: Report, measure: str) -> dict[str, dict[str, Any]]:
    """Summaries by dtype of the first cell of a measure."""
    for part in found["cells"].values():
        if part["measure"] == measure:
            return {name: part["summaries"][name] for name in found["dtypes"] if name in part["summaries"]}
    return {}


def _bits(found: Report, name: str) -> float | None:
    shape, size = found["shape"], found["dtypes"][name]["bytes"]
    return size and size * 8 / (2 * shape["layers"] * shape["kv_heads"] * shape["head_dim"])


def kl_ratio(mine: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float, float] | None:
    """KL of one summary over another's with a 95 % interval, the two errors taken as independent."""
    if min(mine["kl"], theirs["kl"]) <= 0:
        return None
    relative = [s["kl_standard_error"] / s["kl"] for s in (mine, theirs)]
    middle, spread = mine["kl"] / theirs["kl"], math.exp(Z95 * math.hypot(*relative))
    return middle, middle / spread, middle * spread


def _kl_verdicts(found: Report) -> list[str]:
    """Each of our dtypes beside the best other dtype of its size, or what else loses no more."""
    scored = {name: s for name, s in _of(found, "next_token").items() if "kl" in s}
    sizes = {name: found["dtypes"][name]["bytes"] for name in scored}
    others = [name for name in scored if not found["dtypes"][name]["ours"] and sizes[name]]
    said = []
    for name in [name for name in scored if found["dtypes"][name]["ours"] and sizes[name]]:
        near = [other for other in others if abs(sizes[other] / sizes[name] - 1) <= NEAR]
        kl = f"`{name}` ({sizes[name]:,} bytes a token): KL {scored[name]['kl']:.4f}"
        if near:
            best = min(near, key=lambda other: scored[other]["kl"])
            ratio = kl_ratio(scored[name], scored[best])
            against = f"{scored[best]['kl']:.4f} of `{best}` ({sizes[best]:,} bytes)"
            if ratio is None:
                said.append(f"{kl} beside {against}.")
                continue
            middle, low, high = ratio
            verdict = "less" if high < 1 else "more" if low > 1 else "no difference seen"
            said.append(f"{kl}, {middle:.2f}x ({low:.2f}-{high:.2f}) the {against}: {verdict}.")
        elif good := [other for other in others if scored[other]["kl"] <= scored[name]["kl"]]:
            best = min(good, key=lambda other: sizes[other])
            said.append(
                f"{kl}; no other dtype is within {100 * NEAR:g} % of its size; the smallest other one that "
                f"loses no more is `{best}` ({sizes[best]:,} bytes)."
            )
        elif others:
            said.append(f"{kl}; no other dtype is within {100 * NEAR:g} % of its size, and none loses less.")
    return said


def _front_verdict(found: Report) -> list[str]:
    scored = {name: s["kl"] for name, s in _of(found, "next_token").items() if "kl" in s}
    sizes = {name: found["dtypes"][name]["bytes"] for name in scored if found["dtypes"][name]["bytes"]}
    front = [
        name
        for name in sizes
        if not any(
            sizes[o] <= sizes[name]
            and scored[o] <= scored[name]
            and (sizes[o], scored[o]) != (sizes[name], scored[name])
            for o in sizes
        )
    ]
    beaten = [name for name in sizes if name not in front]
    if not sizes or not beaten:
        return []
    names: Callable[[list[str]], str] = lambda some: ", ".join(f"`{name}`" for name in some)  # noqa: E731
    return [
        f"No measured dtype has both fewer bytes and less KL than {names(front)}; beaten in both: "
        f"{names(beaten)}."
    ]


def _perplexity_verdicts(found: Report) -> list[str]:
    scored = {name: s for name, s in _of(found, "next_token").items() if "nll_difference" in s}
    unseen = [
        name
        for name, s in scored.items()
        if abs(s["nll_difference"]) <= Z95 * s["nll_difference_standard_error"]
    ]
    sized = [name for name in unseen if found["dtypes"][name]["bytes"]]
    if not sized:
        return (
            [f"Every dtype but {BASELINE} changes the perplexity by more than its 95 % interval."]
            if scored
            else []
        )
    least = min(sized, key=lambda name: found["dtypes"][name]["bytes"])
    bound = max(
        math.expm1(scored[least]["nll_difference"] + Z95 * scored[least]["nll_difference_standard_error"]), 0
    )
    return [
        f"The smallest dtype whose perplexity does not differ from {BASELINE}'s by more than its 95 % "
        f"interval: `{least}` (no rise above {bound:.1%})."
    ]


def _retrieval_verdicts(found: Report) -> list[str]:
    scored = _of(found, "retrieval")
    if BASELINE not in scored or len(scored) < 2:
        return []
    base = scored[BASELINE]["right"], scored[BASELINE]["of"]
    lost = {name: base[0] - s["right"] for name, s in scored.items() if s["right"] < base[0]}
    kept = [name for name in scored if name not in lost and found["dtypes"][name]["bytes"]]
    least = min(kept, key=lambda name: found["dtypes"][name]["bytes"])
    said = f"Retrieval: {BASELINE} answers {base[0]} of {base[1]}, and `{least}` is the smallest to do so"
    fewer = ", ".join(f"`{name}` {count}" for name, count in lost.items())
    return [f"{said}; answers lost: {fewer}." if lost else f"{said}; no dtype answers fewer."]


def verdicts(found: Report) -> list[str]:
    """Sentences that follow from the numbers."""
    said = _kl_verdicts(found)
    said.sort(key=lambda line: not line.startswith(f"`{DEFAULT_PRESET}`"))
    return [*said, *_front_verdict(found), *_perplexity_verdicts(found), *_retrieval_verdicts(found)]


# Showing.


def _label(found: Report, name: str) -> str:
    return f"**`{name}`**" if found["dtypes"][name]["ours"] else f"`{name}`"


def _main_table(found: Report) -> Section:
    rows: dict[str, dict[str, str]] = {}
    for name, about in found["dtypes"].items():
        size, bits = about["bytes"], _bits(found, name)
        rows[name] = {
            "bytes a token": f"{size:,}" if size else "unknown",
            "bits/element": f"{bits:.3f}" if bits else "-",
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
    saved = report.save(stem, found)
    drawn = draw(stem, found)
    page = report.path_of(stem, "md")
    names = {kind: path.name for kind, path in drawn.items()}
    page.write_text(report.markdown(TITLE, found, sections(found, names)), encoding="utf-8")
    return [str(path) for path in (saved, page, *drawn.values())]


def _read_report(path: Path) -> Report:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ReportError(f"--render {path}: {problem}") from None
    needed = {"environment", "command", "shape", "dtypes", "cells", "missing", "problems", "notes"}
    if not isinstance(found, dict) or not needed <= set(found):
        raise ReportError(f"--render {path} is not what polarquant-eval report writes")
    unknown = {part["measure"] for part in found["cells"].values()} - set(MEASURES)
    if unknown:
        raise ReportError(f"--render {path}: this version has no measure {', '.join(sorted(unknown))}")
    return found


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of results.")] = Path("eval-results"),
    out: Annotated[Path, typer.Option(help="Stem of the .json, .md and -*.png files.")] = Path("accuracy"),
    model: Annotated[
        str | None, typer.Option(help="Of several models in the folder, this one, named as in its results.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="The model's folder or config.json, if it is not where it was.")
    ] = None,
    vectors: Annotated[int, typer.Option(help="Of the distortion table; 0 leaves it out.", min=0)] = 2048,
    render: Annotated[Path | None, typer.Option(help="Only make the page of this JSON file again.")] = None,
) -> None:
    """Make one page and plots of a folder of results: accuracy against bytes a token for every dtype.

    Exits with 2 if there is nothing to show.
    """
    try:
        if render is not None:
            found = _read_report(render)
        else:
            found = collect(folder, model, config)
            if vectors:
                found["distortion"] = distortion_of(found["shape"]["head_dim"], vectors)
        paths = write(out, found)
    except (ReportError, ConfigError, OSError) as problem:
        _fail(problem)
    for name, why in (found["missing"] | found["problems"]).items():
        typer.echo(f"not in the tables: {name}: {why}", err=True)
    for note in found["notes"]:
        typer.echo(note, err=True)
    for path in paths:
        typer.echo(path)
