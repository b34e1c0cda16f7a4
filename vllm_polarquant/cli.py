"""The command `polarquant`: what the formats cost, and whether a model can use them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from vllm_polarquant import __version__
from vllm_polarquant.check import (
    MOST,
    ConfigError,
    Shape,
    Verdict,
    check_weights,
    judge,
    layer_count,
    read_config,
    weight_bytes,
)
from vllm_polarquant.format import DEFAULT_PRESET, PRESETS, Slot, UnsupportedFormat, VectorFormat
from vllm_polarquant.keys import MAX_BITS_LOST, KeyReport, judge_keys
from vllm_polarquant.page import BLOCK_SIZE_MULTIPLE
from vllm_polarquant.support import ranges, refusals, table, unknown_skips

GIB = 1 << 30
SAMPLE_VECTORS = 2048
MOST_HARD_LAYERS = 8
"""Shown without --all."""
NOT_SUPPORTED, BAD_INPUT = 1, 2

app = typer.Typer(
    help="Polar-coded KV cache for vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Usage errors as plain lines, like the others.
    rich_markup_mode=None,
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def fail(command: str, message: object, status: int = BAD_INPUT) -> NoReturn:
    """Say on stderr, in one line, what is wrong, and exit."""
    typer.echo(f"{command}: {' '.join(str(message).split())}", err=True)
    raise typer.Exit(status)


def _table(first: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"polarquant {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Polar-coded KV cache for vLLM."""


def measure_distortion(vector: VectorFormat, head_dim: int) -> float:
    """E|x - x_hat|^2 / E|x|^2 of a format on Gaussian vectors of a fixed seed."""
    # torch takes seconds to import, and only this command needs it.
    import torch

    from vllm_polarquant.codec import decode, encode

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLE_VECTORS, head_dim, generator=generator)
    error = decode(*encode(x, vector), vector) - x
    return float(error.square().sum() / x.square().sum())


def format_rows(head_dim: int) -> list[dict[str, Any]]:
    """One row for auto, for fp8 and for each preset, as `polarquant formats --json` prints them.

    Raises:
        UnsupportedFormat: if no page exists for head_dim.
    """
    slots = {preset: Slot(preset, head_dim) for preset in PRESETS}
    vectors = {v for slot in slots.values() for v in (slot.key, slot.value)}
    distortion = {v: measure_distortion(v, head_dim) for v in vectors}
    # fp8 here is e4m3 with a scale a vector, as k8v4 stores keys; vLLM's fp8 has one a tensor.
    fp8 = distortion[PRESETS["polarquant_k8v4"][0]]

    def row(name: str, size: int, key: float, value: float) -> dict[str, Any]:
        return {
            "kv_cache_dtype": name,
            "default": name == DEFAULT_PRESET,
            "bytes_per_token_head": size,
            "bits_per_element": size * 8 / (2 * head_dim),
            "ratio": 4 * head_dim / size,
            "key_distortion": key,
            "value_distortion": value,
        }

    return [
        row("auto", 4 * head_dim, 0.0, 0.0),
        row("fp8", 2 * head_dim, fp8, fp8),
        *(
            row(preset, slot.nbytes, distortion[slot.key], distortion[slot.value])
            for preset, slot in slots.items()
        ),
    ]


@app.command()
def formats(
    head_dim: Annotated[int, typer.Option(help="Size of one head's key and value.")] = 128,
    as_json: Json = False,
) -> None:
    """List the --kv-cache-dtype names with their size and their distortion, measured now."""
    try:
        rows = format_rows(head_dim)
    except UnsupportedFormat as error:
        fail("polarquant", error)
    if as_json:
        typer.echo(json.dumps({"head_dim": head_dim, "formats": rows}, indent=2))
        return
    table = _table(
        "--kv-cache-dtype",
        "bytes per\nKV head",
        "bits per\nelement",
        "times\nsmaller",
        "measured\nK error",
        "measured\nV error",
    )
    for row in rows:
        exact = row["kv_cache_dtype"] == "auto"
        table.add_row(
            row["kv_cache_dtype"] + (" (default)" if row["default"] else ""),
            str(row["bytes_per_token_head"]),
            f"{row['bits_per_element']:.3f}",
            f"{row['ratio']:.2f}",
            "-" if exact else f"{row['key_distortion']:.4f}",
            "-" if exact else f"{row['value_distortion']:.4f}",
        )
    typer.echo(f"Sizes of one token's key and value at head_dim {head_dim}; auto is bf16 or fp16.")
    Console().print(table)
    typer.echo(
        f"Errors: |x - x_hat|^2 / |x|^2, measured now on {SAMPLE_VECTORS} Gaussian vectors;\n"
        "fp8 with one scale a vector. Values of 2 bits have an unbiased radius: the error\n"
        "of one is larger than that of a key, that of an average over many smaller."
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _local(model: Path) -> Path:
    """Where a hub name's files lie in the Hugging Face cache; other paths as given.

    Raises:
        ConfigError: for a hub name that is not in the cache.
    """
    try:
        there = model.exists()
    except OSError as error:
        raise ConfigError(f"cannot read {model}: {error.strerror}") from None
    if there or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(model)):
        return model
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        raise ConfigError(
            f"there is no folder {model}, and as a model of the hub it is not in the local cache; "
            f"`hf download {model}` puts it there (with `config.json` after it: that file alone)"
        ) from None


def _keys_json(keys: KeyReport) -> dict[str, Any]:
    return {
        "max_bits_lost": MAX_BITS_LOST,
        "layers": [
            {
                "layer": layer.layer,
                "kv_head": layer.kv_head,
                "tensor": layer.tensor,
                "excess": round(layer.excess, 4),
                "bits_lost": round(layer.bits_lost, 4),
                "bias_norm": round(layer.bias_norm, 4),
                "key_norm": None if math.isnan(layer.key_norm) else round(layer.key_norm, 4),
                "pair_ratio": round(layer.pair_ratio, 4),
                "query_pair_ratio": round(layer.query_pair_ratio, 4),
                "hard": layer.hard,
            }
            for layer in keys.layers
        ],
        "skip_layers": keys.skip_layers,
        "flag": keys.flag,
        "notes": keys.notes,
    }


def _keys_line(keys: KeyReport, shape: Shape, kv_cache_dtype: str) -> str:
    """What to do about hard keys, in a line or two."""
    layers = len(shape.indices)
    if not keys.hard:
        worst = max((layer.bits_lost for layer in keys.layers), default=0.0)
        return (
            f"No hard keys in the weights of {len(keys.layers)} layers: at most {worst:.2f} bits of a code "
            f"are lost, {MAX_BITS_LOST:g} would be told."
        )
    worst = max(layer.bits_lost for layer in keys.hard)
    line = (
        f"Hard keys in {len(keys.hard)} of {layers} layers: as they are, codes lose up to {worst:.1f} bits.\n"
        "The engine centres and balances keys at start-up, which takes most of that away;\n"
        "polarquant-eval MODEL --suite text measures what is left.\n"
    )
    if 2 * len(keys.hard) > layers:
        return line + "With that switched off, serve with fp8: these are too many layers to skip."
    auto = shape.token_bytes("auto") * len(keys.hard) // layers
    mixed = auto + shape.token_bytes(kv_cache_dtype) * (layers - len(keys.hard)) // layers
    ratio = shape.token_bytes("auto") / mixed
    return line + (
        f"With that switched off, keep them in 16 bits: {keys.flag}\n"
        f"A token then takes {mixed:,} bytes, {ratio:.2f} times less than with auto."
    )


def _show_hard_layers(keys: KeyReport, every: bool) -> None:
    worst = sorted(keys.hard, key=lambda layer: -layer.bits_lost)
    shown = worst if every else worst[:MOST_HARD_LAYERS]
    if shown:
        rows = _table("hard layer", "KV head", "bits lost", "noise power")
        rows.add_column("cause", overflow="fold")
        for layer in shown:
            rows.add_row(
                str(layer.layer),
                str(layer.kv_head),
                f"{layer.bits_lost:.1f}",
                f"x {layer.excess:,.1f}",
                f"{layer.tensor.removeprefix('model.')}: {layer.what}",
            )
        Console().print(rows)
    if len(shown) < len(worst):
        typer.echo(f"The worst {len(shown)} of {len(worst)} hard layers; --all shows all.")


def _skips(text: str | None, config: dict[str, Any]) -> dict[str, Any]:
    """The option as vLLM's EngineArgs takes it; vLLM itself says nothing of what names no layer."""
    words = (text or "").replace(",", " ").split()
    if not words:
        return {}
    layers = layer_count(config)
    if unknown := unknown_skips(words, layers):
        raise ConfigError(
            f"--kv-cache-dtype-skip-layers {unknown[0]} names no layer of this model; give numbers below "
            f"{layers}, or sliding_window"
        )
    return {"kv_cache_dtype_skip_layers": words}


def _show_refusal(model: Path, kv_cache_dtype: str, verdict: Verdict) -> None:
    typer.echo(f"{kv_cache_dtype} is not supported for {model}:")
    for problem in verdict.problems:
        where = f" (layers {ranges(problem.layers)})" if problem.layers else ""
        typer.echo(f"- {problem.feature}{where}: {problem.message}")
    for way in verdict.ways_out:
        typer.echo(f"Tried, and not refused with {way}.")


def _capacity(
    shape: Shape, kv_cache_dtype: str, length: int | None, kv_bytes: int | None
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name in ("auto", "fp8", kv_cache_dtype):
        token = shape.token_bytes(name)
        row: dict[str, Any] = {"kv_cache_dtype": name, "bytes_per_token": token}
        if length:
            # Whole blocks, where vLLM has not counted.
            blocks = -(-length // BLOCK_SIZE_MULTIPLE)
            row["bytes_per_request"] = shape.requests.get(name, blocks * BLOCK_SIZE_MULTIPLE * token)
        if kv_bytes is not None:
            tokens = kv_bytes // token
            if length and shape.requests:
                tokens = kv_bytes * length // shape.requests[name]
            row["tokens"] = tokens - tokens % BLOCK_SIZE_MULTIPLE
            if length:
                row["requests"] = round(kv_bytes / row["bytes_per_request"], 2)
        rows.append(row)
    return rows


def _show_capacity(rows: list[dict[str, Any]], length: int | None) -> None:
    headers = {
        "bytes_per_token": "bytes per\ntoken",
        "bytes_per_request": f"request of\n{length:,} tokens" if length else "",
        "tokens": "tokens\nthat fit",
        "requests": "requests\nthat fit",
    }
    show: dict[str, Callable[[float], str]] = {
        "bytes_per_token": "{:,}".format,
        "bytes_per_request": _gib,
        "tokens": "{:,}".format,
        "requests": "{:,.2f}".format,
    }
    columns = [key for key in headers if key in rows[0]]
    cells = _table("--kv-cache-dtype", *(headers[key] for key in columns))
    for row in rows:
        cells.add_row(row["kv_cache_dtype"], *(show[key](row[key]) for key in columns))
    Console().print(cells)


def _sizes(shape: Shape, verdict: Verdict) -> str:
    shapes = sorted({(c.kv_heads, c.head_dim) for c in shape.caches} or {(shape.kv_heads, shape.head_dim)})
    text = f"{shape.layers} layers, " + " or ".join(f"{n} KV heads, head_dim {d}" for n, d in shapes)
    native = shape.layers - len(shape.indices)
    if native:
        text += f", {native} of them in 16 bits"
    if verdict.states:
        text += f", beside {verdict.states} states of fixed size"
    return text


@app.command()
def check(
    model: Annotated[
        Path, typer.Argument(help="Folder of a model, its config.json, or a hub name in the local cache.")
    ],
    kv_cache_dtype: Annotated[str, typer.Option(help="The preset to check.")] = DEFAULT_PRESET,
    skip_layers: Annotated[
        str | None,
        typer.Option(
            "--kv-cache-dtype-skip-layers", help="As for vLLM, in one word: '0 31' or sliding_window."
        ),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of a request; the config's own limit by default.")
    ] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(help="GiB that vLLM may use: GPU memory x --gpu-memory-utilization."),
    ] = None,
    config_only: Annotated[
        bool, typer.Option("--config-only", help="Judge by config.json, at once, without vLLM.")
    ] = False,
    show_all: Annotated[bool, typer.Option("--all", help="Show every layer with hard keys.")] = False,
    as_json: Json = False,
) -> None:
    """Say whether a model can use a preset, why not, what to do, how much fits, and which keys are hard.

    vLLM builds the model's layers without weights, in ten seconds or more. Exits with 0 if the preset can be
    used, 1 if it cannot and 2 if the input is wrong. Of the weights only the biases, norms and projections
    that make the keys are read, from safetensors, a tensor at a time.
    """
    if kv_cache_dtype not in PRESETS:
        fail("polarquant", f"unknown --kv-cache-dtype {kv_cache_dtype!r}; choose one of {', '.join(PRESETS)}")
    if max_model_len is not None and not 0 < max_model_len < MOST:
        fail(
            "polarquant", f"--max-model-len {max_model_len} is not a positive number of tokens below {MOST:,}"
        )
    # Written so that NaN fails too.
    if gpu_memory is not None and not 0 < gpu_memory < 1 << 20:
        fail("polarquant", f"--gpu-memory {gpu_memory:g} is not a positive number of GiB")
    try:
        model = _local(model)
        config = read_config(model)
        check_weights(model)
        weights = weight_bytes(model, config)
        options = _skips(skip_layers, config) | ({"max_model_len": max_model_len} if max_model_len else {})
        verdict = judge(model, config, kv_cache_dtype, options, not config_only)
    except ConfigError as error:
        fail("polarquant", error)

    report: dict[str, Any] = {
        "model": str(model),
        "kv_cache_dtype": kv_cache_dtype,
        "supported": not verdict.problems,
        "judged_by": "vllm" if verdict.by_vllm else "config.json",
        "problems": [
            {"feature": p.feature, "message": p.message, "layers": list(p.layers)} for p in verdict.problems
        ],
        "ways_out": [vars(way) for way in verdict.ways_out],
        "notes": verdict.notes,
    }
    shape = verdict.shape
    if shape is None:
        if as_json:
            typer.echo(json.dumps(report, indent=2))
        else:
            _show_refusal(model, kv_cache_dtype, verdict)
            for note in verdict.notes:
                typer.echo(note)
        raise typer.Exit(NOT_SUPPORTED)

    length = max_model_len or shape.max_model_len
    kv_bytes = None if gpu_memory is None else int(gpu_memory * GIB) - (weights or 0)
    if kv_bytes is not None and kv_bytes <= 0:
        fail(
            "polarquant",
            f"the weights ({_gib(weights or 0)}) leave nothing of --gpu-memory {gpu_memory:g} for "
            "the KV cache; give more, or check one GPU's share of a tensor-parallel model",
        )
    rows = _capacity(shape, kv_cache_dtype, length, kv_bytes)
    keys = judge_keys(model, config, shape)
    report |= {
        "layers": shape.layers,
        "quantised_layers": shape.indices,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_model_len": length,
        "times": round(shape.times(kv_cache_dtype), 4),
        "weight_bytes": None if gpu_memory is None else weights,
        "kv_bytes": kv_bytes,
        "capacity": rows,
        "hard_keys": _keys_json(keys),
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return

    typer.echo(
        f"{kv_cache_dtype} is supported for {model}: {_sizes(shape, verdict)}; "
        f"{shape.times(kv_cache_dtype):.2f} times the tokens of auto fit."
    )
    if keys.layers:
        typer.echo(_keys_line(keys, shape, kv_cache_dtype))
    for note in verdict.notes:
        typer.echo(note)
    _show_capacity(rows, length)
    if kv_bytes is not None and weights is not None:
        typer.echo(
            f"{_gib(kv_bytes)} for the KV cache: --gpu-memory less {_gib(weights)} of weights; "
            "activations are not subtracted."
        )
    elif kv_bytes is not None:
        typer.echo(
            f"{_gib(kv_bytes)} for the KV cache: neither weights (no *.safetensors there) nor "
            "activations are subtracted."
        )
    _show_hard_layers(keys, show_all)
    for note in keys.notes:
        typer.echo(note)


@app.command()
def support(
    refused: Annotated[
        bool, typer.Option("--refused", help="Every refusal instead, as it is printed, and what to do.")
    ] = False,
) -> None:
    """Print the table of what is served and what not, in Markdown."""
    typer.echo(refusals() if refused else table())
