"""What presets lose on keys that are hard to quantise, and what `polarquant check` saves of it.

Each edit writes a checkpoint whose logits in 16 bits are those of the original, or nearly, and whose keys in
a few layers are not: `uneven` scales RoPE channel pairs of the keys and unscales the queries', `bias` adds a
constant to the keys before RoPE, `first-token` makes the first token's key many times longer than others.
Presets are then measured against 16 bits on the edited checkpoint, by the driver and measures of the other
evaluations, with all layers quantised and with those in 16 bits that `polarquant check` names.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_polarquant.check import ConfigError, check_config, read_config, read_shape
from vllm_polarquant.eval import results
from vllm_polarquant.eval.measures.next_token import divergence
from vllm_polarquant.eval.probe.episodes import MODEL_DIR, load_episodes
from vllm_polarquant.eval.run import BAD_INPUT, BASELINE, FAILED, PROBE, Plan, run_dtype
from vllm_polarquant.eval.suites import Cell, SuiteError, load_suite
from vllm_polarquant.format import DEFAULT_PRESET, PRESETS
from vllm_polarquant.keys import KeyReport, judge_keys, ranges

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ALL = "all"
UNEVEN_SHARE = 16
"""One channel pair in so many is scaled."""

LOW_PAIRS = 6
"""Channel pairs of the lowest frequencies, which hardly turn over a few thousand tokens: what all keys have
in common there shifts all logits of a query alike, and the softmax takes no notice."""

CALIBRATION_PROMPTS, CALIBRATION_TOKENS = 8, 512
"""Text that tells the first token's hidden state from the others'; none of it is measured on."""

PROBE_ENGINE = {"dtype": "float16", "kv_cache_memory_bytes": 128 << 20, "enforce_eager": True}


class EditError(ValueError):
    """A model or a layer that an edit cannot be made on."""


class Checkpoint:
    """A Llama's config and tensors, to be edited in place.

    Args:
        folder: of config.json and safetensors.

    Raises:
        EditError: if it is no Llama or has no such tensors.
        ConfigError: if config.json is missing or broken.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import load_file

        self.folder = folder
        self.config = read_config(folder)
        if "LlamaForCausalLM" not in self.config.get("architectures", []):
            raise EditError(f"{folder} is no LlamaForCausalLM, the one architecture that is edited")
        shape = read_shape(self.config)
        self.layers, self.kv_heads, self.head_dim = shape.layers, shape.kv_heads, shape.head_dim
        self.group = shape.query_heads // shape.kv_heads
        self.tensors: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            if not path.name.startswith("consolidated"):
                self.tensors |= load_file(str(path))
        missing = [
            self.name(layer, f"{vector}_proj.weight")
            for layer in range(self.layers)
            for vector in "qk"
            if self.name(layer, f"{vector}_proj.weight") not in self.tensors
        ]
        if missing:
            raise EditError(f"{folder} has no tensor {missing[0]} in its *.safetensors")

    @staticmethod
    def name(layer: int, tensor: str) -> str:
        return f"model.layers.{layer}.self_attn.{tensor}"

    def heads(self, layer: int, vector: str, kind: str = "weight") -> Tensor | None:
        """A float32 copy [kv_heads, query heads of one or 1, head_dim, ...] of a projection, or None."""
        tensor = self.tensors.get(self.name(layer, f"{vector}_proj.{kind}"))
        if tensor is None:
            return None
        group = self.group if vector == "q" else 1
        return tensor.float().clone().unflatten(0, (self.kv_heads, group, self.head_dim))

    def put(self, layer: int, vector: str, kind: str, heads: Tensor) -> None:
        """Store what `heads` gave; it stays float32, so that an edit rounds nothing."""
        self.tensors[self.name(layer, f"{vector}_proj.{kind}")] = heads.flatten(0, 2).contiguous()

    def low_channels(self) -> Tensor:
        """Channels of the LOW_PAIRS slowest pairs, int64 [2 LOW_PAIRS]; a pair is (j, j + head_dim / 2)."""
        import torch

        half = self.head_dim // 2
        slow = torch.arange(half - LOW_PAIRS, half)
        return torch.cat([slow, slow + half])

    def write(self, folder: Path, about: dict[str, Any]) -> None:
        """Write a model folder, whole or not at all; config.json tells how it was made."""
        from safetensors.torch import save_file

        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            part = Path(scratch) / "model"
            part.mkdir()
            for path in self.folder.iterdir():
                if path.is_file() and path.suffix in (".json", ".model", ".txt", ".jinja"):
                    shutil.copyfile(path, part / path.name)
            (part / "model.safetensors.index.json").unlink(missing_ok=True)
            config = self.config | {"polarquant_edit": about}
            (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            save_file(self.tensors, str(part / "model.safetensors"), metadata={"format": "pt"})
            os.replace(part, folder)


def uneven(model: Checkpoint, layers: list[int], strength: float, generator: torch.Generator) -> None:
    """Scale random channel pairs of the keys by factors from strength^(2/3) to strength, 30: 9.7 to 30.

    Log-uniform, one a pair and kv head; the queries that read it are divided by the same. Both channels of a
    pair take one factor, so that RoPE, and with it every logit, stays as it was.
    """
    import torch

    half = model.head_dim // 2
    for layer in layers:
        scale = torch.ones(model.kv_heads, 1, model.head_dim)
        for head in range(model.kv_heads):
            pairs = torch.randperm(half, generator=generator)[: half // UNEVEN_SHARE]
            power = 2 / 3 + torch.rand(len(pairs), generator=generator) / 3
            scale[head, 0, pairs] = scale[head, 0, pairs + half] = strength**power
        for vector, factor in (("k", scale), ("q", 1 / scale)):
            weight = model.heads(layer, vector)
            assert weight is not None
            model.put(layer, vector, "weight", weight * factor[..., None])
            bias = model.heads(layer, vector, "bias")
            if bias is not None:
                model.put(layer, vector, "bias", bias * factor)


def bias(model: Checkpoint, layers: list[int], strength: float, generator: torch.Generator) -> None:
    """Give k_proj a bias of norm `strength` in random directions of the slowest pairs of each kv head.

    |k_proj.bias| of Qwen2.5-7B is 605 in its first layer, 921 in the last, 22 in the median one.
    """
    import torch

    width = model.config["hidden_size"]
    sizes = {"q": model.group * model.kv_heads, "k": model.kv_heads, "v": model.kv_heads}
    for layer in range(model.layers):
        for vector, heads in sizes.items():
            zeros = torch.zeros(heads * model.head_dim)
            model.tensors.setdefault(model.name(layer, f"{vector}_proj.bias"), zeros)
        model.tensors.setdefault(model.name(layer, "o_proj.bias"), torch.zeros(width))
    model.config["attention_bias"] = True
    low = model.low_channels()
    for layer in layers:
        offset = model.heads(layer, "k", "bias")
        assert offset is not None
        for head in range(model.kv_heads):
            towards = torch.randn(len(low), generator=generator)
            offset[head, 0, low] += towards / towards.norm() * strength / model.kv_heads**0.5
        model.put(layer, "k", "bias", offset)


def _hidden_states(model: Checkpoint, layers: list[int]) -> list[tuple[Tensor, Tensor]]:
    """By layer: the attention's input at the first token float32 [width] and at all others [n, width]."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(str(model.folder))
    texts = [episode["prompt"] for episode in load_episodes()[:CALIBRATION_PROMPTS]]
    rows = [tokenizer.encode(text)[:CALIBRATION_TOKENS] for text in texts]
    if len({row[0] for row in rows}) > 1 or rows[0][0] not in tokenizer.all_special_ids:
        raise EditError(f"the tokenizer of {model.folder} puts no token of its own before a prompt")
    llama = LlamaForCausalLM.from_pretrained(str(model.folder), dtype=torch.float32)
    inputs: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for layer in layers:
        norm = llama.model.layers[layer].input_layernorm
        norm.register_forward_hook(lambda _module, _args, out, layer=layer: inputs[layer].append(out[0]))
    with torch.no_grad():
        for row in rows:
            llama(torch.tensor([row]))
    return [(inputs[layer][0][0], torch.cat([h[1:] for h in inputs[layer]])) for layer in layers]


def first_token(model: Checkpoint, layers: list[int], strength: float, generator: torch.Generator) -> None:
    """Make the first token's key `strength` times as long as the median one.

    Along the direction u of the slowest pairs in which the queries of a kv head have least power: they lose
    that component, which is not quite without effect, so that what the keys have there has none. The first
    token's hidden state h is the same in all texts, and k_proj gets u w^T with w h = 1 and w as small as
    can be on other tokens (least squares). Nothing is random.
    """
    import torch

    low = model.low_channels()
    for layer, (first, others) in zip(layers, _hidden_states(model, layers), strict=True):
        moment = others.T @ others / len(others)
        moment += 1e-4 * moment.diagonal().mean() * torch.eye(len(moment))
        w = torch.linalg.solve(moment, first)
        w = w / (first @ w)
        keys, queries = model.heads(layer, "k"), model.heads(layer, "q")
        assert keys is not None and queries is not None
        for head in range(model.kv_heads):
            read = torch.einsum("th,gdh->tgd", others, queries[head][:, low]).flatten(0, 1)
            u = torch.zeros(model.head_dim)
            u[low] = torch.linalg.eigh(read.T @ read).eigenvectors[:, 0]
            length = (others @ keys[head, 0].T).norm(dim=1).median()
            queries[head] -= torch.einsum("d,gh->gdh", u, torch.einsum("d,gdh->gh", u, queries[head]))
            keys[head, 0] += strength * length * torch.outer(u, w)
        model.put(layer, "k", "weight", keys)
        model.put(layer, "q", "weight", queries)


@dataclass(frozen=True)
class Edit:
    """apply: (checkpoint, layers, strength, generator) -> None; strength: as much as real models have."""

    apply: Callable[[Checkpoint, list[int], float, Any], None]
    strength: float


EDITS: dict[str, Edit] = {
    "uneven": Edit(uneven, 30),
    "bias": Edit(bias, 600),
    "first-token": Edit(first_token, 30),
}


def default_layers(layers: int) -> list[int]:
    """One in the first half of the model and one in the second."""
    return sorted({layers // 4, 3 * layers // 4})


def write_edit(model: Path, name: str, strength: float, layers: list[int], seed: int, out: Path) -> Path:
    """The folder under `out` of an edited copy of a model, written unless it is there.

    Raises:
        EditError, ConfigError: if the model cannot be edited so.
    """
    about = {"edit": name, "strength": strength, "layers": layers, "seed": seed}
    about["of"] = results.fingerprint(str(model))
    label = f"{name}-{strength:g}-layers-{'-'.join(map(str, layers))}-seed-{seed}-{about['of']}"
    if (out / label).is_dir():
        return out / label
    import torch

    checkpoint = Checkpoint(model)
    beyond = [layer for layer in layers if not 0 <= layer < checkpoint.layers]
    if beyond:
        raise EditError(f"there is no layer {beyond[0]}: {model} has {checkpoint.layers}, counted from 0")
    EDITS[name].apply(checkpoint, layers, strength, torch.Generator().manual_seed(seed))
    checkpoint.write(out / label, about)
    return out / label


@dataclass(frozen=True)
class SkipPlan(Plan):
    """A plan whose engines keep layers in 16 bits, compared with the baseline of the plan without."""

    plain: Plan = field(kw_only=True)

    def key(self, dtype: str, cell: Cell) -> dict[str, Any]:
        (same,) = [other for other in self.plain.cells if other.name == cell.name]
        baseline = results.stem(self.plain.key(BASELINE, same))
        return results.cell_key(self.model, dtype, cell, self.seed, baseline)


def skip_plan(plain: Plan, layers: list[int]) -> SkipPlan:
    """The plan with `layers` in 16 bits."""
    engine = plain.engine | {"kv_cache_dtype_skip_layers": [str(layer) for layer in layers]}
    return SkipPlan(
        plain.model,
        [dtype for dtype in plain.dtypes if dtype != BASELINE],
        plain.suite,
        load_suite(plain.suite, engine, plain.changes),
        engine,
        plain.seed,
        plain.folder,
        plain.changes,
        plain=plain,
    )


@dataclass(frozen=True)
class Case:
    """A checkpoint, what `polarquant check` says of it, and its plans; skipped: by the layers skipped."""

    label: str
    keys: KeyReport
    plain: Plan
    skipped: dict[tuple[int, ...], SkipPlan]


def run_plan(plan: Plan, label: str, progress: Progress) -> dict[str, str]:
    """Run what is missing of a plan, one dtype after the other; why cells failed, by what failed."""
    failures: dict[str, str] = {}
    for dtype in plan.dtypes:
        todo = plan.missing(dtype)
        task = progress.add_task(f"{label}, {dtype}", total=len(plan.cells))
        progress.advance(task, len(plan.cells) - len(todo))
        if todo:
            found = run_dtype(plan, dtype, todo, progress, task)
            failures |= {f"{label}, {dtype}, {name}": why for name, why in found.items()}
        done = "failed" if plan.missing(dtype) else "done"
        progress.update(task, description=f"{label}, {dtype}: {done}")
        if dtype == BASELINE and plan.missing(dtype):
            failures |= {
                f"{label}, {other}": f"there is no result of {BASELINE} to compare with"
                for other in plan.dtypes[1:]
            }
            break
    return failures


def run_cases(cases: list[Case], progress: Progress) -> dict[str, str]:
    """Run every case's plans; a dtype that failed is not tried again with layers skipped."""
    failures: dict[str, str] = {}
    for case in cases:
        failures |= run_plan(case.plain, case.label, progress)
        for layers, plan in case.skipped.items():
            able = [dtype for dtype in plan.dtypes if not case.plain.missing(dtype)]
            label = f"{case.label}, layers {ranges(list(layers))} skipped"
            failures |= run_plan(replace(plan, dtypes=able), label, progress)
    return failures


def _edit_divergence(original: Plan, edited: Plan, cell: Cell) -> float | None:
    """Mean KL in nats of the edited model from the original, both in 16 bits; None if one is not there."""
    try:
        base, have = (
            results.outcome(plan.folder, results.stem(plan.key(BASELINE, cell))).arrays
            for plan in (original, edited)
        )
    except FileNotFoundError:
        return None
    return float(divergence(base, have)[0].mean())


def rows(cases: list[Case]) -> list[dict[str, Any]]:
    """One row a case and dtype, from the results that there are; the first case is the unedited model.

    kl: of a dtype from 16 bits on the same checkpoint; of auto, from the unedited model. skipped_kl: with
    the layers of `polarquant check` in 16 bits; unedited_skipped_kl: the same on the unedited model.
    """
    original = cases[0]
    found: list[dict[str, Any]] = []

    def summary(plan: Plan | None, dtype: str, cell: str) -> dict[str, Any]:
        cells = [c for c in plan.cells if c.name == cell] if plan else []
        have = plan.found(dtype, cells[0]) if plan and cells else None
        return have["summary"] if have else {}

    def retrieval(plan: Plan | None, dtype: str) -> str | None:
        have = summary(plan, dtype, "retrieval")
        return f"{have['right']}/{have['of']}" if have else None

    for case in cases:
        layers = tuple(case.keys.skip_layers)
        skipped = case.skipped.get(layers)
        for dtype in case.plain.dtypes:
            text = summary(case.plain, dtype, "text")
            row: dict[str, Any] = {"keys": case.label, "kv_cache_dtype": dtype, "skip_layers": list(layers)}
            row |= {"perplexity": text.get("perplexity"), "kl": text.get("kl")}
            row["kl_standard_error"] = text.get("kl_standard_error")
            if dtype == BASELINE and case is not original:
                row["kl"] = _edit_divergence(original.plain, case.plain, case.plain.cells[0])
            else:
                row["skipped_perplexity"] = summary(skipped, dtype, "text").get("perplexity")
                row["skipped_kl"] = summary(skipped, dtype, "text").get("kl")
                unedited = original.skipped.get(layers) if case is not original else None
                row["unedited_skipped_kl"] = summary(unedited, dtype, "text").get("kl")
            row["retrieval"] = retrieval(case.plain, dtype)
            row["skipped_retrieval"] = retrieval(skipped, dtype)
            found.append({name: value for name, value in row.items() if value is not None})
    return found


COLUMNS: dict[str, tuple[str, str]] = {
    "perplexity": ("perplexity", ".3f"),
    "kl": ("KL, nats", ".4f"),
    "skipped_perplexity": ("perplexity, layers skipped", ".3f"),
    "skipped_kl": ("KL, layers skipped", ".4f"),
    "unedited_skipped_kl": ("KL, unedited and skipped", ".4f"),
    "retrieval": ("retrieval", ""),
    "skipped_retrieval": ("retrieval, layers skipped", ""),
}


def table(found: list[dict[str, Any]]) -> Table:
    title = ", ".join(f"{name} {value}" for name, value in results.versions().items())
    shown = Table(title=title, box=box.MARKDOWN, title_justify="left")
    shown.add_column("keys", no_wrap=True)
    shown.add_column("kv-cache-dtype", no_wrap=True)
    columns = {name: how for name, how in COLUMNS.items() if any(name in row for row in found)}
    for head, _ in columns.values():
        shown.add_column(head, justify="right")
    for row in found:
        cells = (format(row[name], how) if name in row else "-" for name, (_, how) in columns.items())
        shown.add_row(row["keys"], row["kv_cache_dtype"], *cells)
    return shown


def _fail(message: object) -> NoReturn:
    typer.echo(f"polarquant-eval hard-keys: {message}", err=True)
    raise typer.Exit(BAD_INPUT)


def _edits(text: str) -> list[tuple[str, float]]:
    found = []
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, strength = part.partition(":")
        if name not in EDITS:
            _fail(f"unknown edit {name!r}; choose from {', '.join(EDITS)}, with :STRENGTH if you like")
        try:
            value = float(strength) if strength else EDITS[name].strength
        except ValueError:
            value = 0.0
        if not 0 < value < 1e4:
            _fail(f"--edits {part!r}: the strength must be a number above 0 and below 10,000")
        found.append((name, value))
    return list(dict.fromkeys(found))


def _dtypes(text: str) -> list[str]:
    names = list(PRESETS) if text == ALL else [part.strip() for part in text.split(",") if part.strip()]
    return list(dict.fromkeys([BASELINE, *names]))


def _layers(text: str, count: int) -> list[int]:
    if not text:
        return default_layers(count)
    try:
        layers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        _fail(f"--layers {text!r} is not like 1,3")
    if not 0 <= layers[0] <= layers[-1] < count:
        _fail(f"--layers {text!r}: the model has layers 0 to {count - 1}")
    return layers


def _suite(out: Path, rows: int, context: int, episodes: int, options: dict[str, Any]) -> Path:
    """A suite file of what is to be measured: the workers read it too."""
    cells: dict[str, Any] = {"text": {"measure": "next_token", "rows": rows, "context": context}}
    if episodes:
        cells["retrieval"] = {"measure": "retrieval", "lengths": ["1000"], "episodes": episodes}
    path = out / "suite.json"
    part = out / "suite.part.json"
    part.write_text(json.dumps({"engine": options, "cells": cells}, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
    return path.resolve()


def main(
    model: Annotated[str, typer.Argument(help=f"Folder of a Llama, or {PROBE!r}, the shipped one.")] = PROBE,
    edits: Annotated[
        str, typer.Option(help=f"Some of {', '.join(EDITS)}; uneven:10 is one of another strength.")
    ] = ",".join(EDITS),
    layers: Annotated[str, typer.Option(help="Layers to edit, such as 1,3; by default two.")] = "",
    kv_cache_dtypes: Annotated[
        str, typer.Option(help=f"Comma-separated, or {ALL!r} presets; {BASELINE} is always among them.")
    ] = DEFAULT_PRESET,
    rows_of_text: Annotated[int, typer.Option("--rows", help="Rows of held-out text.")] = 8,
    context: Annotated[int, typer.Option(help="Tokens of a row.")] = 256,
    episodes: Annotated[
        int, typer.Option(help="Retrieval episodes, five questions each; 0 leaves retrieval out.")
    ] = 0,
    out: Annotated[Path, typer.Option(help="Folder of models and results; what is there is kept.")] = Path(
        "hard-keys-results"
    ),
    seed: Annotated[int, typer.Option(help="Of the edits and the engine.")] = 0,
    engine: Annotated[str, typer.Option(help="More of vLLM's EngineArgs, a JSON object.")] = "{}",
) -> None:
    """Edit a model so that its keys are hard to quantise, and measure what presets lose and skipping saves.

    Exits with 0 if every cell has a result, 1 if some failed and 2 if the input is wrong.
    """
    folder = MODEL_DIR if model == PROBE else Path(model).resolve()
    chosen, dtypes = _edits(edits), _dtypes(kv_cache_dtypes)
    try:
        options = (PROBE_ENGINE if model == PROBE else {}) | dict(json.loads(engine))
    except (ValueError, TypeError):
        _fail(f"--engine {engine!r} is not a JSON object such as '{{\"tensor_parallel_size\": 2}}'")
    try:
        config = read_config(folder)
        problems = check_config(config)
        shape = read_shape(config)
        which = _layers(layers, shape.layers)
        if problems:
            raise EditError(problems[0].message)
        out.mkdir(parents=True, exist_ok=True)
        suite = str(_suite(out, rows_of_text, context, episodes, options))
        cells = load_suite(suite, options)
        models = {"none": folder}
        for name, strength in chosen:
            label = name if strength == EDITS[name].strength else f"{name}:{strength:g}"
            models[label] = write_edit(folder, name, strength, which, seed, out / "models")
    except (ConfigError, EditError, SuiteError, OSError) as problem:
        _fail(problem)

    cases = []
    for label, path in models.items():
        plan = Plan(str(path.resolve()), dtypes, suite, cells, options, seed, out / label.replace(":", "-"))
        cases.append(Case(label, judge_keys(path, read_config(path), shape), plan, {}))
    for case in cases:
        skip = tuple(case.keys.skip_layers)
        if skip:
            for other in (case, cases[0]):
                other.skipped[skip] = skip_plan(other.plain, list(skip))

    bars = (TextColumn("{task.description:58}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bars, console=Console(stderr=True)) as progress:
        failures = run_cases(cases, progress)

    for case in cases:
        lost = ", ".join(f"{layer.bits_lost:.2f}" for layer in case.keys.layers)
        typer.echo(f"{case.label}: bits lost by layer {lost}; {case.keys.flag or 'no layer to skip'}")
    found = rows(cases)
    Console(width=None if sys.stdout.isatty() else 200).print(table(found))
    summary = {"versions": results.versions(), "layers": which, "seed": seed, "rows": found}
    (out / "hard-keys.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    for what, why in failures.items():
        typer.echo(f"failed: {what}: {why}", err=True)
    if failures:
        raise typer.Exit(FAILED)
