"""The comparison of layouts, on findings made by hand, and on two GPUs the command itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from vllm_polarquant.eval.bench.parallel import (
    ALONE,
    BASELINE,
    Arrays,
    failures,
    findings,
    kept,
    run,
    table_difference,
)
from vllm_polarquant.format import DEFAULT_PRESET, LOSSLESS

ROWS, POSITIONS, TOP = 4, 128, 8


def answers(noise: float = 0.0, changed_texts: int = 0) -> Arrays:
    """What an engine may say: the same distributions at every seed, with so much noise on their logits."""
    logits = np.random.default_rng(0).normal(size=(ROWS, POSITIONS, TOP))
    logits += noise * np.random.default_rng(1).normal(size=logits.shape)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    greedy = np.arange(ROWS * 6, dtype=np.int32).reshape(ROWS, 6)
    greedy[:changed_texts, -1] += 100
    ids = np.broadcast_to(np.arange(TOP, dtype=np.int32), logprobs.shape)
    return {"actual": logprobs[..., 0], "ids": ids, "logprobs": logprobs, "greedy": greedy}


def with_tables(found: Arrays, rank: int, heads: slice, shift: float = 0.0) -> Arrays:
    centres = np.random.default_rng(2).normal(size=(3, 4, 8)).astype(np.float32)[:, heads]
    factors = np.ones((1, 4, 8), np.float32)[:, heads]
    return found | {f"layer.0/centres/{rank}": centres + shift, f"layer.0/factors/{rank}": factors}


def test_equal_answers_fail_nothing() -> None:
    layout = {BASELINE: [answers()], LOSSLESS: [answers()], DEFAULT_PRESET: [answers(0.1)]}
    found = findings({ALONE: layout, "tp2": layout})
    assert found[f"tp2 {LOSSLESS}"]["from_auto"]["same_texts"] == ROWS
    assert failures(found) == []


def test_one_other_text_of_the_16_bit_page_is_named() -> None:
    found = findings({"tp2": {BASELINE: [answers()], LOSSLESS: [answers(changed_texts=1)]}})
    assert failures(found) == [f"tp2 {LOSSLESS}: only 3 of 4 texts are those of auto"]


def test_every_engine_of_a_layout_is_looked_at() -> None:
    second = [answers(), answers(changed_texts=2)]
    found = findings({"dp2": {BASELINE: [answers(), answers()], LOSSLESS: second}})
    assert found[f"dp2 {LOSSLESS}"]["from_auto"] == pytest.approx(
        {"texts": 8, "same_texts": 6, "kl": 0.0, "kl_error": 0.0}
    )


def test_a_preset_that_loses_more_than_on_one_device_is_named() -> None:
    runs = {
        ALONE: {BASELINE: [answers()], DEFAULT_PRESET: [answers(0.1)]},
        "tp2": {BASELINE: [answers()], DEFAULT_PRESET: [answers(0.5)]},
    }
    (line,) = failures(findings(runs))
    assert line.startswith(f"tp2 {DEFAULT_PRESET}: KL ")


def test_a_failed_engine_is_named_and_the_rest_compared() -> None:
    runs = {
        "pp2": {BASELINE: [answers()], LOSSLESS: "no memory", DEFAULT_PRESET: [answers()]},
        "tp2": {BASELINE: "no device", LOSSLESS: [answers()]},
    }
    found = findings(runs)
    assert failures(found) == [f"pp2 {LOSSLESS}: no memory", f"tp2 {BASELINE}: no device"]
    assert "from_auto" not in found[f"tp2 {LOSSLESS}"]


@pytest.mark.parametrize(
    "ranks",
    [
        [[(0, slice(0, 2)), (1, slice(2, 4))]],
        [[(0, slice(0, 4)), (1, slice(0, 4))]],
        [[(0, slice(0, 4))], [(0, slice(0, 4))]],
    ],
    ids=["heads dealt out", "heads shared", "engines beside each other"],
)
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_tables_of_ranks_are_those_of_one_device(ranks: list, shift: float) -> None:
    alone = [with_tables(answers(), 0, slice(0, 4))]
    engines = []
    for engine in ranks:
        found = answers()
        for rank, heads in engine:
            found = with_tables(found, rank, heads, shift * rank * len(engine))
        engines.append(found)
    difference = table_difference(engines, alone)
    assert difference is not None
    assert (difference > 0.2) == (shift > 0 and len(ranks) == 1)


def test_a_rank_without_its_layer_is_an_error() -> None:
    alone = [with_tables(answers(), 0, slice(0, 4))]
    with pytest.raises(ValueError, match=r"layer\.0"):
        table_difference([answers()], alone)
    runs = {ALONE: {DEFAULT_PRESET: alone}, "pp2": {BASELINE: [answers()], DEFAULT_PRESET: [answers()]}}
    (line,) = failures(findings({name: {BASELINE: [answers()]} | run for name, run in runs.items()}))
    assert line.startswith(f"pp2 {DEFAULT_PRESET}: layers ")


@pytest.mark.slow
def test_an_engine_that_does_not_start_says_why(tmp_path: Path) -> None:
    job = {
        "model": str(tmp_path / "nothing"), "dtype": BASELINE, "engine": {},
        "rows": 1, "context": 65, "tokens": 1,
    }  # fmt: skip
    found = run(job, ALONE, tmp_path, limit_s=120)
    assert isinstance(found, str) and "nothing" in found


def test_a_report_goes_on_behind_an_earlier_one_of_the_same_machine() -> None:
    old = {
        "environment": {"device": "H200", "date": "2026-11-24"}, "command": "first", "job": {"rows": 1},
        "layouts": {"one auto": {}}, "large": {"auto": {}},
    }  # fmt: skip
    new = {
        "environment": {"device": "H200", "date": "2026-11-25"}, "command": "second", "job": {"rows": 2},
        "layouts": {}, "large": {},
    }  # fmt: skip
    both = kept(old, new)
    days = {"date": "2026-11-24, 2026-11-25"}
    assert both == old | {
        "job": new["job"], "command": "first && second", "environment": old["environment"] | days,
    }  # fmt: skip
    with pytest.raises(typer.BadParameter, match="device: H200, now H100"):
        kept(old, new | {"environment": {"device": "H100", "date": "2026-11-25"}})


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_layouts_of_two_gpus_answer_as_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vllm_polarquant.eval.bench.parallel", "--layouts", "one,tp2,pp2,dp2"]
    command += [
        "--large",
        "",
        "--engine",
        '{"gpu_memory_utilization": 0.2}',
        "--out",
        str(tmp_path / "found"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    report = json.loads((tmp_path / "found.json").read_text())
    assert len(report["layouts"]) == 12
