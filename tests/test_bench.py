"""The benchmarks: their grid, limits, checks and reports on a CPU; the peers' kernels on a GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from engine_runs import MODEL, child_env
from typer.testing import CliRunner

from vllm_polarquant.eval.bench import (
    cpu,
    engine,
    engine_page,
    engine_speculation,
    engine_worker,
    grid,
    inputs,
    kernel_page,
    kernel_worker,
    kernels,
    ours,
    parallel,
    serve,
    serve_worker,
)
from vllm_polarquant.eval.bench.grid import CENTRE, PEERS, Case, default_cases, jobs, parse_decode, tiny_cases
from vllm_polarquant.eval.bench.kernel_worker import Bench
from vllm_polarquant.eval.bench.timer import MIN_ROUNDS, time_calls
from vllm_polarquant.eval.report import cells, environment, page, panels
from vllm_polarquant.format import LOSSLESS, PRESETS
from vllm_polarquant.kernels.ops import LayerShape, Limits, Operations

K4V4 = "polarquant_k4v4"
TINY = {case.op: case for case in tiny_cases()}
CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here")


# Reports.


def test_a_spread_keeps_the_median_and_both_ends() -> None:
    assert cells.spread([3.0, 1.0, 10.0]) == {"median": 3.0, "min": 1.0, "max": 10.0, "repeats": 3}


def test_a_ratio_needs_both_measurements() -> None:
    assert cells.ratio({"median": 3.0}, 2) == 1.5
    failed = {"error": "RuntimeError: no"}
    for cell, base in ((failed, 1.0), (1.0, failed), (None, 1.0), (1.0, None), (1.0, 0), (float("nan"), 1.0)):
        assert cells.ratio(cell, base) is None
        assert cells.times(cells.ratio(cell, base)) == "-"


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ({"median": 489.24, "min": 480.0, "max": 500.0, "repeats": 5}, "489.2 (480.0-500.0)"),
        ({"median": 2, "min": 2, "max": 2, "repeats": 1}, "2"),
        ({"error": "ValueError: bad | worse"}, "ValueError: bad | worse"),
        (3448656, "3,448,656"),
        (0.001234, "0.001234"),
        (None, "-"),
    ],
)
def test_a_cell_shows_its_number_or_why_there_is_none(cell: Any, text: str) -> None:
    assert cells.shown(cell) == text


def test_a_table_has_one_line_a_row_whatever_a_cell_holds() -> None:
    table = page.markdown_table(["a", "b"], [["1", "two\nlines"], ["x|y", ""]]).splitlines()
    assert table == ["| a | b |", "| --- | ---: |", "| 1 | two lines |", "| x\\|y |  |"]


def test_write_makes_all_three_files(tmp_path: Path) -> None:
    panel = panels.Panel("speed", "x", ["one", "two"], {"ours": [1.0, None], "lost": [None, None]}, line=1.0)
    section = page.Section("Decode", ["shape", "us"], [["8 x 1k", "5"]], note="A note.", panels=[panel])
    found = {"environment": {"device": "GPU 1"}, "command": "run --this"}
    lines = page.write(tmp_path / "v1.2", "Title", found, [section])
    assert [Path(line).name for line in lines] == ["v1.2.json", "v1.2.md", "v1.2.png"]
    assert json.loads(Path(lines[0]).read_text()) == found
    text = Path(lines[1]).read_text()
    for part in ("# Title", "device GPU 1", "`run --this`", "## Decode", "| 8 x 1k | 5 |", "A note."):
        assert part in text
    assert Path(lines[2]).read_bytes().startswith(b"\x89PNG")


def test_write_says_how_to_draw_later_without_matplotlib(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    panel = panels.Panel("speed", "x", ["one"], {"ours": [1.0]})
    section = page.Section("Decode", ["shape"], [["8 x 1k"]], panels=[panel])
    lines = page.write(tmp_path / "r", "Title", {"environment": {}, "command": ""}, [section])
    assert "--render" in lines[2]
    assert (tmp_path / "r.md").exists() and not (tmp_path / "r.png").exists()


def invoke(command: Any, *arguments: object) -> Any:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [*map(str, arguments)])


def unboxed(text: str) -> str:
    """What a box around a message has wrapped, in one piece."""
    return re.sub(r"[\s│]", "", text)


@pytest.mark.parametrize("command", [engine.main, kernels.main])
def test_a_report_that_is_none_is_not_drawn(command: Any, tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    for text in ("", "{", "[]", "{}", '{"environment": {}, "command": "", "runs": 3, "cells": 3, "plan": 1}'):
        file.write_text(text)
        result = invoke(command, "--render", file, "--out", tmp_path / "new")
        assert result.exit_code == 2 and "old.json" in unboxed(result.stderr), result.exception
    result = invoke(command, "--render", tmp_path / "none.json", "--out", tmp_path / "new")
    assert result.exit_code == 2 and "none.json" in unboxed(result.stderr)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("command", [engine.main, kernels.main, parallel.main])
def test_a_folder_that_is_missing_is_named_before_anything_is_measured(
    command: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(command, "--out", "no/dir")
    assert result.exit_code == 2 and "there is no folder" in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (engine.main, ["--ttft", "abc"]),
        (engine.main, ["--full-memory", "-1"]),
        (engine.main, ["--max-seqs", "-1"]),
        (engine.main, ["--limit", "-1"]),
        (engine.main, ["--keep"]),
        (kernels.main, ["--device", "cpu", "--budget-ms", "-1"]),
        (kernels.main, ["--device", "cpu", "--keep"]),
        (cpu.main, ["--batches", "a"]),
        (cpu.main, ["--context", "0"]),
        (cpu.main, ["--preset", "polarquant_k9v9"]),
    ],
    ids=lambda value: value.__module__ if callable(value) else " ".join(value),
)
def test_benchmarks_name_bad_input(
    command: Any, arguments: list[str], monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(command, *arguments)
    assert result.exit_code == 2 and result.stderr, result.exception
    assert not list(tmp_path.iterdir())


def test_gpu_state_reads_a_line_of_nvidia_smi() -> None:
    state = environment.gpu_state("NVIDIA H200, 580.159, 1980 MHz, 3201 MHz, 1980 MHz, 700.00 W\n")
    assert state["device"] == "NVIDIA H200"
    assert state["SM clock"] == "1980 MHz"
    assert state["power limit"] == "700.00 W"


# The grid.


def test_the_default_grid_varies_one_thing_at_a_time_and_has_the_judged_shapes() -> None:
    decodes = [
        case for case in default_cases() if case.op == "decode" and case.lengths == "equal" and case.plain
    ]
    assert len(set(decodes)) == len(decodes)
    corners = {(1, 131072), (8, 1024), (128, 1024)}
    axes = {"batch": set(), "context": set(), "group": set(), "head_dim": set()}
    for case in decodes:
        differs = [axis for axis in axes if getattr(case, axis) != getattr(CENTRE, axis)]
        assert len(differs) <= 1 or (case.batch, case.context) in corners
        for axis in differs:
            axes[axis].add(getattr(case, axis))
    assert axes["batch"] == {1, 8, 20, 128}
    assert axes["context"] == {1024, 8192, 32768, 131072}
    assert axes["group"] == {1, 8}
    assert axes["head_dim"] == {64, 256, 512}
    assert (CENTRE.batch, CENTRE.context, CENTRE.group, CENTRE.head_dim) == (32, 16384, 4, 128)


def test_what_is_not_plain_is_measured_beside_flash_attention() -> None:
    special = [case for case in default_cases() if not case.plain]
    assert {(case.group, case.tokens) for case in special if case.tokens > 1} == {
        (group, tokens) for group in (4, 8) for tokens in (2, 4, 8, 16)
    }
    alone = [replace(case, window=None, soft_cap=None, sinks=False) for case in special if case.tokens == 1]
    assert alone == [CENTRE] * 4
    assert {name for case, name in jobs(special, [*PEERS, K4V4], everywhere=False)} == {"auto", "fp8", K4V4}
    labels = [case.label for case in special]
    assert "32 x 16k, 4 queries, GQA 8, d 128" in labels
    assert "32 x 16k, window 1k, soft cap 50, sinks, GQA 4, d 128" in labels


def test_only_a_window_s_bytes_are_moved() -> None:
    page_bytes = 32 * 8 * 132
    assert replace(CENTRE, window=1024).moved_bytes(132) == page_bytes * 1024
    assert replace(CENTRE, window=1024, tokens=4).moved_bytes(132) == page_bytes * 1027
    assert replace(CENTRE, window=1 << 20).moved_bytes(132) == CENTRE.moved_bytes(132)


def test_the_full_grid_is_the_whole_product() -> None:
    decodes = {c for c in grid.full_cases() if c.op == "decode" and c.plain}
    shapes = {(c.batch, c.context, c.group, c.head_dim) for c in decodes}
    assert len(shapes) == len(decodes) == 3 * 3 * (4 * 4 + 1)
    assert {(128, 131072, 8, 256), (1, 1024, 1, 64), (32, 16384, 4, 128)} <= shapes
    assert set(default_cases()) - grid_extras() <= set(grid.full_cases())


def grid_extras() -> set[Case]:
    """Batches other than 32 at 16k, unequal lengths and head_dim 512, which only the default grid has."""
    unequal = {case for case in default_cases() if case.lengths != "equal"}
    assert {case.lengths for case in unequal} == {"mixed", "one long"}
    return (
        {replace(CENTRE, batch=batch) for batch in (1, 8, 20, 128)}
        | unequal
        | {replace(CENTRE, head_dim=512)}
    )


def test_lengths_of_a_mixed_batch_spread_evenly_around_the_context() -> None:
    mixed = replace(CENTRE, lengths="mixed")
    lens = sorted(mixed.seq_lens)
    assert sum(lens) / 32 == pytest.approx(16384, rel=1e-3)
    assert lens[0] < 1000 and lens[-1] > 31000
    assert mixed.moved_bytes(132) == pytest.approx(CENTRE.moved_bytes(132), rel=1e-3)
    assert mixed.label == "32 x 16k on average, GQA 4, d 128"
    long = replace(CENTRE, context=131072, lengths="one long")
    assert sorted(long.seq_lens) == [1024] * 31 + [131072]
    assert long.label == "31 x 1k and 1 x 128k, GQA 4, d 128"


def test_every_preset_is_measured_at_the_centre_and_peers_everywhere() -> None:
    todo = jobs(default_cases(), [*PEERS, *PRESETS], everywhere=False)
    assert {name for case, name in todo if case == CENTRE} == {*PEERS, *PRESETS}
    for case in default_cases():
        assert {"auto", "fp8", K4V4} <= {name for mine, name in todo if mine == case}
        assert not case.plain or {*PEERS} <= {name for mine, name in todo if mine == case}
    assert len(jobs(default_cases(), [*PRESETS], everywhere=True)) == len(default_cases()) * len(PRESETS)


def test_bytes_of_the_centre_are_those_of_the_pages() -> None:
    # 32 x 16,384 tokens, 8 heads, 132 bytes: the 126 us of docs/kernels.md at 4.4 TB/s.
    assert CENTRE.moved_bytes(132) == CENTRE.layer_bytes(132) == 553_648_128
    store = Case("store", 1, 65536, tokens=512)
    assert store.moved_bytes(132) == 512 * 8 * (2 * 2 * 128 + 132)


def test_layers_together_exceed_the_l2_cache() -> None:
    small = replace(CENTRE, batch=8, context=1024)
    assert CENTRE.layers(132) == 1
    assert small.layers(132) * small.layer_bytes(132) >= 4 * (60 << 20)
    assert replace(CENTRE, batch=1, context=16).layers(132) == grid.MAX_LAYERS


def test_parse_decode() -> None:
    assert parse_decode("32x16384,8x1024x8x256") == [CENTRE, Case("decode", 8, 1024, group=8, head_dim=256)]
    assert parse_decode("32x16384:tokens=4:window=1024,32x16384:soft_cap=2.5:sinks") == [
        replace(CENTRE, tokens=4, window=1024),
        replace(CENTRE, soft_cap=2.5, sinks=True),
    ]
    for bad in ("32", "32x", "0x16", "ax16", "1x2x3x4x5", "32x-1", "8x8:", "8x8:window", "8x8:tokens=-1"):
        with pytest.raises(ValueError, match="BATCHxCONTEXT"):
            parse_decode(bad)


# Timing and measuring.


def test_time_calls_makes_every_call_equally_often_and_times_one() -> None:
    made: list[int] = []

    def call(i: int) -> None:
        made.append(i)
        time.sleep(0.002)

    times = time_calls([lambda: call(0), lambda: call(1)], CPU, budget_ms=1)
    assert len(times) == MIN_ROUNDS
    assert all(2000 <= t < 20000 for t in times)
    # The first is called once more, to see how long a call takes.
    assert made.count(0) == made.count(1) + 1
    quick = time_calls([lambda: None], CPU, budget_ms=1000)
    assert len(quick) > MIN_ROUNDS


def interpreted_ops(shape: LayerShape, limits: Limits, **options: Any) -> Operations:
    """Triton's operations for a GPU of four SMs: splits for a whole one take the interpreter minutes."""
    from vllm_polarquant.kernels.triton.launch import Gpu
    from vllm_polarquant.kernels.triton.ops import TritonOperations

    gpu = replace(Gpu.of(shape.device), num_sms=4)
    return TritonOperations(shape, limits, ours.dense_torch, gpu=gpu, **options)


class Interpreted(ours.Polar):
    """A preset under Triton's interpreter."""

    def __init__(self, preset: str, layer: type[ours.PolarLayer] = ours.PolarLayer, **options: Any) -> None:
        super().__init__(preset, partial(interpreted_ops, **options), layer)


class OffBy5Percent(ours.PolarLayer):
    def attend(self) -> torch.Tensor:
        return super().attend().mul_(1.05)


class OtherHeads(ours.PolarLayer):
    def attend(self) -> torch.Tensor:
        return super().attend().flip(1)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [*TINY.values(), replace(TINY["decode"], lengths="mixed", context=20, tokens=1)], ids=str
)
def test_ours_is_measured_and_checked(case: Case) -> None:
    result = Bench("cpu", budget_ms=1, contender=Interpreted).run(case, K4V4)
    assert result["min"] > 0
    assert result["slot_bytes"] == 68
    assert result["layers"] == 2
    if case.op != "store":
        # Two 4-bit vectors: sqrt(.0079) each on the values and, through the softmax, on the keys.
        assert 0.05 < result["errors"]["exact"] < 0.2
    if case.op == "decode":
        assert result["errors"]["reference"] < kernel_worker.WRONG["reference"]


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layer"), [("reference", OffBy5Percent), ("exact", OtherHeads)])
def test_wrong_output_fails_the_cell(kind: str, layer: type[ours.PolarLayer]) -> None:
    """5 % off shows against the reference; another head's output against both."""
    contender = partial(Interpreted, layer=layer)
    case = replace(TINY["decode"], batch=1, context=32, tokens=1)
    with pytest.raises(ArithmeticError, match=kind):
        Bench("cpu", budget_ms=1, contender=contender).run(case, K4V4)


def opened(case: Case, layers: int, **options: Any) -> tuple[inputs.Inputs, list[ours.PolarLayer]]:
    """Layers of lossless pages, filled."""
    given = inputs.make_inputs(case, CPU)
    contender = Interpreted(LOSSLESS, **options)
    shape = (layers, case.blocks, case.block_size, case.kv_heads, contender.slot_bytes(case.head_dim))
    caches = list(torch.full(shape, 0xFF, dtype=torch.uint8))
    made = contender.open(given, caches)
    inputs.fill(made, caches, given)
    return given, made


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("op", ["decode", "prefix"])
def test_exact_attention_is_that_of_lossless_pages(op: str) -> None:
    """`fill` puts the pattern where `exact_attention` looks for it, in every layer, request and block."""
    # More blocks than the pattern has, so that it repeats.
    case = replace(
        TINY[op], batch=2 if op == "decode" else 1, context=16 * 150 + (16 if op == "decode" else 0)
    )
    given, layers = opened(case, 2)
    want = inputs.exact_attention(given)
    for layer in layers:
        assert inputs.relative_error(layer.reference()[inputs.checked_rows(case)], want) < 1e-9


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("tokens", [16, 40])
def test_the_prefix_runs_over_several_workspaces(tokens: int) -> None:
    """16 tokens are read off the pages like decodes, 40 attend to unpacked parts of the prefix."""
    case = replace(TINY["prefix"], context=600, tokens=tokens)
    given, layers = opened(case, 1, prefix_tokens=256)
    out = layers[0].attend()[inputs.checked_rows(case)]
    assert inputs.relative_error(out, inputs.exact_attention(given)) < 0.015


def test_what_does_not_fit_says_so() -> None:
    with pytest.raises(MemoryError, match="does not fit"):
        Bench("cpu", 1).caches(replace(CENTRE, batch=128, context=131072), 512)


def test_a_missing_vllm_is_called_not_installed() -> None:
    assert kernel_worker.explain(ModuleNotFoundError("No module", name="vllm.config")) == "not installed"
    assert kernel_worker.explain(ModuleNotFoundError("No module", name="other")).startswith("ModuleNotFound")


SLOW_WORKER = """
import os, time
from vllm_polarquant.eval import isolate
from vllm_polarquant.eval.bench import kernel_worker

measured = kernel_worker.Bench.run

def run(self, case, name):
    if case.op == "decode":
        time.sleep(600)
    ours = name.startswith("polarquant")
    return {"interpreted": os.environ["TRITON_INTERPRET"]} if ours else measured(self, case, name)

kernel_worker.Bench.run = run
isolate.serve(kernel_worker.work)
"""


@pytest.mark.slow
def test_a_cell_that_takes_too_long_costs_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WORKER", [sys.executable, "-c", SLOW_WORKER])
    endless, short = TINY["decode"], TINY["store"]
    todo = [(short, K4V4), (endless, K4V4), (short, "auto"), (short, K4V4)]
    found = list(kernels.measure(todo, "cpu", budget_ms=1, limit_s=5))
    assert [kind for kind, *_ in found] == ["limits", *["cell"] * 4]
    assert [job for _, job, _ in found[1:]] == todo
    first, late, peer, last = (result for *_, result in found[1:])
    assert late == {"error": "exceeded 5 s"}
    assert "needs a GPU" in peer["error"]
    assert first == last == {"interpreted": "1"}


def kernel_report() -> dict[str, Any]:
    found = []
    speeds = {"auto": 480.0, "fp8": 240.0, K4V4: 160.0}
    for case in (CENTRE, replace(CENTRE, batch=1)):
        for name in ("auto", "fp8", "int4_per_token_head", K4V4):
            result: dict[str, Any] = {"error": "ValueError: its words"}
            if name in speeds:
                taken = speeds[name]
                result = {"bytes": 440_000_000, "slot_bytes": 132, **cells.spread([taken])}
            found.append({"op": "decode", "label": case.label, "name": name, "result": result})
    bandwidth = {"copy": {"median": 4.0e12}, "read": {"median": 4.4e12}}
    names = ["auto", "fp8", "int4_per_token_head", K4V4]
    environment = {"date": "2026-11-25"}
    return {
        "environment": environment, "command": "", "contenders": names, "bandwidth": bandwidth, "cells": found
    }  # fmt: skip


def test_the_kernel_table_holds_ratios_the_limit_and_failures_by_name() -> None:
    (decodes,) = kernel_page.sections(kernel_report())
    assert decodes.header[:5] == ["shape", "auto", "fp8", "int4_per_token_head", K4V4]
    shape, *times, limit, to_auto, to_fp8, share = decodes.rows[0]
    assert shape == CENTRE.label
    assert times == ["480.0", "240.0", "ValueError: its words", "160.0"]
    # 440 MB at the better bandwidth, 4.4 TB/s, are 100 us.
    assert (limit, to_auto, to_fp8, share) == ("100", "3.00x", "1.50x", "62%")
    (panel,) = decodes.panels
    assert panel.series[K4V4] == [3.0, 3.0]
    assert panel.series["int4_per_token_head"] == [None, None]
    assert panel.series[panels.LIMIT] == pytest.approx([4.8, 4.8])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("op", ["decode", "prefix"])
@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("auto", 0.01),
        ("fp8", 0.08),
        ("turboquant_4bit_nc", 0.2),
        ("int4_per_token_head", 0.2),
        (K4V4, 0.2),
    ],
)
def test_peers_and_ours_compute_attention(op: str, name: str, most: float) -> None:
    case = Case("decode", 4, 1024) if op == "decode" else Case("prefix", 1, 2048, tokens=512)
    result = Bench("cuda", budget_ms=5).run(case, name)
    assert 0 < result["errors"]["exact"] < most
    assert result["median"] > 0


# The engine.


def test_parse_shapes() -> None:
    assert engine.parse_shapes("8x1024,32x16384") == [(8, 1024), (32, 16384)]
    assert engine.parse_shapes("") == []
    for bad in ("8", "8x", "x8", "0x8", "8x1x2"):
        with pytest.raises(typer.BadParameter):
            engine.parse_shapes(bad)


def test_a_step_is_that_of_the_request_which_started_last() -> None:
    def output(first: float, last: float) -> Any:
        stats = SimpleNamespace(first_token_ts=first, last_token_ts=last, num_generation_tokens=11)
        return SimpleNamespace(metrics=stats)

    # The first request's tokens waited for the second's prefill.
    assert engine_worker.step_ms([output(1.0, 9.0), output(5.0, 5.2)]) == pytest.approx(20)


def test_the_time_of_a_full_memory_is_that_of_its_prefill_and_steps() -> None:
    found = {
        "prefill_tokens_per_s 4x16384": cells.spread([32768.0]),
        "tpot_ms 8x1024": cells.spread([5.0]),
        "tpot_ms 32x16384": cells.spread([16.0]),
    }
    # 64 prompts of half a second each but for those cached, and 100 steps of twice 16 ms.
    assert engine_worker.full_memory_s(found, 64, 8, 16384, 100) == pytest.approx(28 + 3.2)
    assert engine_worker.full_memory_s({"kv_tokens": 10}, 64, 8, 16384, 100) == 0


def test_the_engine_tables_compare_with_the_first_dtype_and_keep_what_a_failure_left() -> None:
    full = {"requests": 54, "tokens_per_s": cells.spread([1000.0]), "fill_s": 1.0, "preemptions": 0}
    runs = {
        "auto": {"kv_tokens": 1000, "tpot_ms 32x16384": cells.spread([20.0]), "full_memory 16384": full},
        K4V4: {
            "kv_tokens": 3900,
            "tpot_ms 32x16384": cells.spread([10.0]),
            "full_memory 16384": full | {"requests": 210, "tokens_per_s": cells.spread([2500.0])},
        },
        "int4_per_token_head": {"kv_tokens": 3800, "error": "exceeded 300 s"},
        "turboquant_4bit_nc": {"kv_tokens": 3400, "full_memory 16384": {"error": "90 s are left"}},
    }
    fits, steps, memory = engine_page.sections({"environment": {}, "command": "", "runs": runs})
    assert [row[:3] for row in fits.rows] == [
        ["auto", "1,000", "1.00x"],
        [K4V4, "3,900", "3.90x"],
        ["int4_per_token_head", "3,800", "3.80x"],
        ["turboquant_4bit_nc", "3,400", "3.40x"],
    ]
    assert fits.rows[2][-1] == "exceeded 300 s"
    assert steps.rows == [
        ["auto", "20.00", "1.00x"],
        [K4V4, "10.00", "0.50x"],
        ["int4_per_token_head", "exceeded 300 s", "-"],
        ["turboquant_4bit_nc", "not measured", "-"],
    ]
    assert [row[1:4] for row in memory.rows[:2]] == [["54", "1,000", "1.00x"], ["210", "2,500", "2.50x"]]
    assert [row[2] for row in memory.rows[2:]] == ["exceeded 300 s", "90 s are left"]


def test_parse_speculations() -> None:
    found = engine_speculation.parse_speculations("none,ngram:3,draft:15,ngram:3")
    assert found == [None, ("ngram", 3), ("draft", 15)]
    assert found[1] is not None and found[1].name == "ngram:3"
    for bad in ("ngram", "ngram:0", "draft:16", "eagle:3", "ngram:x"):
        with pytest.raises(typer.BadParameter, match=f"'{bad}' is neither none nor ngram:1"):
            engine_speculation.parse_speculations(f"none,{bad}")


def test_a_verified_step_is_one_of_those_that_have_all_requests() -> None:
    def step(at: float, *tokens: int) -> engine_speculation.Step:
        return engine_speculation.Step(at, tokens)

    # The first request alone, the end of the second's prefill, two steps of both, one without the first.
    steps = [step(0, 1), step(5, 2, 1), step(5.2, 4, 1), step(5.6, 2, 3), step(9, 4)]
    assert engine_speculation.verified(steps, 2) == (pytest.approx(300), 2.5, 2)
    for bad in (steps[:2], [steps[1], steps[0], steps[2]]):
        with pytest.raises(ValueError, match="had all 2 requests"):
            engine_speculation.verified(bad, 2)


def test_a_speculating_engine_has_room_for_its_largest_cell() -> None:
    config = json.loads((engine.MODEL / "config.json").read_text())
    draft = engine_speculation.draft_config(config)
    assert (draft["num_hidden_layers"], draft["hidden_size"]) == (2, 1024)
    assert draft["vocab_size"] == config["vocab_size"] and draft["head_dim"] == 128
    shapes = [(32, 16384), (64, 1024)]
    tokens = 32 * (16384 + 64)
    for method, layers in (("ngram", 32), ("draft", 34)):
        speculation = engine_speculation.Speculation(method, 7)
        for name, slot in (("auto", 512), ("fp8", 256), (K4V4, 132)):
            most = engine_speculation.cache_bytes(name, config, shapes, 64, speculation)
            assert tokens < most / (layers * 8 * slot) < 1.02 * tokens
    with pytest.raises(ValueError, match="nonsense"):
        engine_speculation.cache_bytes("nonsense", config, shapes, 64, speculation)


def test_the_speculation_table_compares_within_a_way_to_draft() -> None:
    def cell(ms: float) -> dict[str, Any]:
        return {"step_ms": cells.spread([ms]), "tokens": cells.spread([1.25]), "drafted": 3.0, "steps": 9}

    found = {
        "ngram:3": {
            "auto": {"boot_s": 1.0, "32x16384": cell(20.0)},
            K4V4: {"boot_s": 1.0, "32x16384": cell(11.0)},
        },
        "draft:7": {"auto": {"32x16384": cell(30.0)}, K4V4: {"error": "exceeded 300 s"}},
        "draft:3": {K4V4: {"error": "no room"}},
    }
    (table,) = engine_page.sections({"runs": {}, "speculation": found})
    assert [row[0:1] + row[2:] for row in table.rows] == [
        ["ngram, 3", "auto", "20.00", "1.00x", "3.00", "1.25", "16.0"],
        ["ngram, 3", K4V4, "11.00", "0.55x", "3.00", "1.25", "8.80"],
        ["draft, 7", "auto", "30.00", "1.00x", "3.00", "1.25", "24.0"],
        ["draft, 7", K4V4, "exceeded 300 s", "-", "-", "-", "-"],
        ["draft, 3", K4V4, "no room", "-", "-", "-", "-"],
    ]
    assert table.rows[0][1] == "32 requests of 16k tokens"
    assert table.panels[0].series == {"auto": [1.0, 1.0], K4V4: [0.55, None]}


def test_speculations_go_on_where_they_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def run(dtype: str, plan: dict[str, Any], console: Any, speculation: Any, turn: Path) -> dict[str, Any]:
        asked.append((speculation.name, dtype, plan["limit_s"]))
        return {"error": "no room"} if len(asked) == 2 else {"2x64": {"steps": 1}, "sm_clocks": ["1980 MHz"]}

    monkeypatch.setattr(engine, "run", run)
    options = [f"--dtypes=auto,fp8,{K4V4}", "--cells=2x64", "--jobs=2", "--limit=50"]
    options += ["--speculate=ngram:3", f"--out={tmp_path / 'run'}"]
    assert invoke(engine.main, *options).exit_code == 0
    assert sorted(asked) == [("ngram:3", "auto", 100), ("ngram:3", "fp8", 100), ("ngram:3", K4V4, 50)]
    failed = asked[1][1]
    asked.clear()
    assert invoke(engine.main, *options, "--keep").exit_code == 0
    assert asked == [("ngram:3", failed, 50)]
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["speculation"]["ngram:3"].keys() == {"auto", "fp8", K4V4}
    assert found["runs"] == {} and found["environment"]["SM clock"] == "1980 MHz"
    nothing = invoke(engine.main, "--cells=", "--ttft=64", "--speculate=draft:3", f"--out={tmp_path / 'x'}")
    assert nothing.exit_code == 2 and "--cells" in nothing.output


def test_a_kernel_report_goes_on_where_it_stopped() -> None:
    old = kernel_report()
    case = Case("decode", 32, 16384)
    todo = [(case, name) for name in ("auto", K4V4)] + [(replace(case, batch=3), "auto")]
    old["cells"] = [
        {"op": "decode", "label": case.label, "name": "auto", "result": {"median": 1.0}},
        {"op": "decode", "label": case.label, "name": K4V4, "result": {"error": "slow"}},
    ]
    new = {**old, "command": "again", "contenders": ["auto", "polarquant_k3v3"], "cells": []}
    both, left = kernels.resumed(old, new, todo)
    assert left == todo[1:]
    assert both["cells"] == old["cells"][:1]
    assert both["contenders"] == [*old["contenders"], "polarquant_k3v3"]
    assert both["command"] == f"{old['command']} && again"
    assert both["environment"] == old["environment"]
    with pytest.raises(typer.BadParameter, match="torch: "):
        kernels.resumed(old, {**new, "environment": {**new["environment"], "torch": "9"}}, todo)
    ours = {**new["environment"], "vllm-polarquant": "another page format"}
    old["cells"][1]["result"] = {"median": 1.0}
    assert kernels.resumed(old, new, todo)[1] == todo[2:]
    both, left = kernels.resumed(old, {**new, "environment": ours}, todo)
    assert both["cells"] == old["cells"][:1], "ours were of another format"
    assert left == todo[1:]
    assert both["environment"]["vllm-polarquant"] == "another page format"


def test_an_engine_report_is_only_added_to_under_the_same_conditions() -> None:
    old: dict[str, Any] = {
        "environment": {"device": "H200", "SM clock": "1980 MHz", "date": "2026-11-24"},
        "command": "first",
        "plan": {"model": "eval/models/llama-3.1-8b", "cells": [[2, 64]], "limit_s": 300.0},
        "runs": {"auto": {}},
        "speculation": {},
    }
    new: dict[str, Any] = {
        "environment": {"device": "H200", "SM clock": "345 MHz", "date": "2026-11-25"},
        "command": "second",
        "plan": {"model": "/elsewhere/llama-3.1-8b", "cells": [(2, 64)], "limit_s": 200.0},
        "runs": {},
    }
    both = engine.kept(old, new)
    days = {"date": "2026-11-24, 2026-11-25"}
    assert both == old | {"command": "first && second", "environment": old["environment"] | days}
    assert engine.kept(both, new)["environment"] == both["environment"]
    versions = [{"vllm-polarquant": version} for version in ("0.1", "0.2")]
    both_dtypes = {K4V4: {"error": "slow"}, "auto": {"boot_s": 1.0}}
    ran = old | {"runs": both_dtypes, "speculation": {"ngram:3": both_dtypes}}
    ran, again = (
        {**x, "environment": x["environment"] | v} for x, v in zip((ran, new), versions, strict=True)
    )
    both = engine.kept(ran, again)
    assert both["runs"] == both["speculation"]["ngram:3"] == {"auto": {"boot_s": 1.0}}
    assert both["environment"]["vllm-polarquant"] == "0.2"
    assert engine.kept(ran, again | {"environment": ran["environment"]})["runs"] == ran["runs"]
    for change, words in (
        ({"environment": new["environment"] | {"device": "H100"}}, "device: H200, now H100"),
        (
            {"plan": new["plan"] | {"model": "/elsewhere/llama-3.2-1b"}},
            "model: llama-3.1-8b, now llama-3.2-1b",
        ),
        ({"plan": new["plan"] | {"cells": [(2, 65)]}}, "cells: "),
        ({"plan": new["plan"] | {"repeats": 2}}, "repeats: None, now 2"),
    ):
        with pytest.raises(typer.BadParameter, match=words):
            engine.kept(old, new | change)


@pytest.mark.slow
def test_the_engine_benchmark_measures_all_and_survives_a_failing_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"enforce_eager": True, "kv_cache_memory_bytes": 4 << 20, "max_num_batched_tokens": 512}
    options = {
        "dtypes": f"{K4V4},nonsense", "model": MODEL, "cells": "2x64", "prefill": "2x96", "ttft": "64",
        "ttft-prefix": "256x32", "full-memory": "128", "tokens": "4", "repeats": "2", "max-seqs": "8",
        "engine": json.dumps(arguments), "out": str(tmp_path / "run"), "limit": "240",
        "speculate": "none,ngram:3", "jobs": "2",
    }  # fmt: skip
    child = subprocess.run(
        [sys.executable, "-m", engine.__name__, *(f"--{k}={v}" for k, v in options.items())],
        env=child_env(),
        text=True,
        capture_output=True,
        timeout=560,
    )
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-2000:]
    # One more dtype for the same report, whose engine is none.
    monkeypatch.setattr(engine, "run", lambda *_: {"kv_tokens": 64})
    more = {"dtypes": "auto", "speculate": "none"}
    again = invoke(engine.main, *(f"--{k}={v}" for k, v in (options | more).items()), "--keep")
    assert again.exit_code == 0, again.output
    found = json.loads((tmp_path / "run.json").read_text())
    assert " && " in found["command"]
    runs = found["runs"]
    assert list(runs) == [K4V4, "nonsense", "auto"] and runs["auto"] == {"kv_tokens": 64}
    ours = runs[K4V4]
    assert "error" not in ours
    names = ("ttft_ms 64", "prefill_tokens_per_s 2x96", "tpot_ms 2x64", "ttft_prefix_ms 256x32")
    for name in names:
        assert ours[name]["repeats"] == 2
        assert 0 < ours[name]["min"] <= ours[name]["median"] <= ours[name]["max"]
    assert ours["full_memory 128"]["requests"] == 8
    assert ours["full_memory 128"]["preemptions"] == 0
    assert "CacheConfig" in runs["nonsense"]["error"]
    drafted = found["speculation"]["ngram:3"]
    assert "nonsense" in drafted["nonsense"]["error"]
    cell = drafted[K4V4]["2x64"]
    # Of a request's four tokens two or three come from the one step that has drafts.
    assert cell["step_ms"]["min"] > 0 and 1 <= cell["tokens"]["median"] <= 4
    assert 0 < cell["drafted"] <= 3 and cell["steps"] >= 2
    assert (tmp_path / "run.png").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "run.md", "run.png"}


# The server.


def test_parse_loads() -> None:
    assert serve.parse_loads("1024x256@8,16 16384x256@.5") == [
        {"shape": (1024, 256), "rates": [8.0, 16.0]},
        {"shape": (16384, 256), "rates": [0.5]},
    ]
    for bad in ("", "1024x256", "1024x256@", "1024@8", "1024x256@0", "1024x256@x", "1x2,3x4@5", "1x2@inf"):
        with pytest.raises(typer.BadParameter):
            serve.parse_loads(bad)


def test_the_highest_rate_is_searched_between_those_that_kept_and_broke_the_bound() -> None:
    assert serve_worker.next_rate({8.0: False, 16.0: False}) == 4
    assert serve_worker.next_rate({4.0: True, 8.0: True}) == 16
    assert serve_worker.next_rate({4.0: True, 9.0: False, 16.0: False}) == 6
    # A rate that broke it by chance, below one that kept it, is none to search under.
    assert serve_worker.next_rate({4.0: False, 8.0: True}) == 16


def test_engine_arguments_become_flags_of_the_server() -> None:
    arguments = {
        "max_num_seqs": 8,
        "enforce_eager": True,
        "async_scheduling": False,
        "compilation_config": {"mode": 0},
    }
    want = [
        "--max-num-seqs",
        "8",
        "--enforce-eager",
        "--no-async-scheduling",
        "--compilation-config",
        '{"mode": 0}',
    ]
    assert serve_worker.flags(arguments) == want


def test_a_model_without_tokenizer_gets_a_word_a_token(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model, made = tmp_path / "model", tmp_path / "made"
    model.mkdir()
    made.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300}))
    assert serve_worker.with_tokenizer(model, made) == str(made)
    tokenizer = AutoTokenizer.from_pretrained(str(made))
    tokens = [2, 299, 41, 2]
    assert tokenizer(tokenizer.decode(tokens)).input_ids == tokens
    assert max(map(len, tokenizer.get_vocab())) > len("w299 ")
    assert serve_worker.with_tokenizer(made, tmp_path) == str(made), "it has one"


def test_the_serving_tables_have_each_rate_and_the_highest_within_the_bound() -> None:
    def cell(tpot: float) -> dict[str, float]:
        return dict.fromkeys(serve_worker.MEASURED, 100.0) | {"median_tpot_ms": tpot, "requests": 8}

    load = {"shape": [1024, 256], "rates": [8.0, 16.0]}
    runs = {
        "auto": {
            "boot_s": 1.0,
            "1024x256 8": cell(20.0),
            "1024x256 16": cell(60.0),
            "1024x256 11.3": cell(40.0),
        },
        K4V4: {"1024x256 8": cell(10.0), "1024x256 16": cell(30.0), "1024x256 32": cell(70.0)},
        "fp8": {"error": "exceeded 600 s"},
    }
    plan = {"loads": [load], "seconds": 20.0, "tpot_ms": 50.0}
    rates, peaks = serve.sections({"plan": plan, "runs": runs})
    assert [row[:3] + row[4:6] for row in rates.rows] == [
        ["8", "auto", "100.0", "20.00", "1.00x"],
        ["8", K4V4, "100.0", "10.00", "0.50x"],
        ["8", "fp8", "exceeded 600 s", "-", "-"],
        ["16", "auto", "100.0", "60.00", "1.00x"],
        ["16", K4V4, "100.0", "30.00", "0.50x"],
        ["16", "fp8", "exceeded 600 s", "-", "-"],
    ]
    assert [row[1:] for row in peaks.rows] == [
        ["auto", "11.3", "16.0", "1.00x"],
        [K4V4, "16.0", "32.0", "1.42x"],
        ["fp8", "-", "-", "-"],
    ]


def test_a_served_dtype_that_is_there_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def watch(command: list[str], job: dict[str, Any], title: str, *_: Any) -> dict[str, Any]:
        asked.append(title)
        return {"error": "no"} if title == "fp8" else {"boot_s": 1.0}

    monkeypatch.setattr(serve, "watch", watch)
    options = ["--dtypes=auto,fp8", "--loads=64x8@4", f"--out={tmp_path / 'run'}"]
    for want in (["auto", "fp8"], ["fp8"]):
        asked.clear()
        found = invoke(serve.main, *options, *(["--keep"] if want == ["fp8"] else []))
        assert found.exit_code == 0, found.output
        assert asked == want
