"""Models of many architectures: engine, `polarquant check` and the line at start-up say the same.

A few by default; `make models` runs all of tests/tiny_models.py, and MODELS names a file of its results.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import model_runs
import tiny_models
from model_runs import LOSSLESS, PRESET, announced, figures, parted

RESULTS = os.environ.get("MODELS")
USUAL = [
    *("llama-skips", "gemma2", "llama4", "falcon-h1"),
    *("llama-skips-all", "deepseek-v2", "mimo-v2", "bloom"),
]
"""Those that are refused cost an engine at most, the others three."""
NAMES = list(json.loads(Path(RESULTS).read_text())) if RESULTS else USUAL
NEAR_TIE = {"float16": 0.04, "bfloat16": 0.15}
"""Logits are of the model's dtype; these are a few steps of theirs."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return json.loads(Path(RESULTS).read_text()) if RESULTS else model_runs.run(NAMES)


def model(results: dict[str, Any], name: str, boots: bool = True) -> dict[str, Any]:
    """A model's results; skips where vLLM cannot build it here, and where ours does not boot if it is to."""
    result = results[name]
    refused = not boots and result.get(PRESET, {}).get("kind") == "Refused"
    if "problem" in result.get("auto", result) and not refused:
        pytest.skip(f"auto does not boot: {result.get('auto', result)['problem'][:300]}")
    if boots and "problem" in result[PRESET]:
        pytest.skip(f"refused: {result[PRESET]['problem'][:300]}")
    return result


@pytest.mark.parametrize("name", NAMES)
def test_it_is_served_or_refused_in_one_sentence_and_check_says_the_same(
    results: dict[str, Any], name: str
) -> None:
    result = model(results, name, boots=False)
    verdict = result["check"]
    assert verdict["by_vllm"], verdict
    assert verdict["supported"] == ("problem" not in result[PRESET]), (verdict, result[PRESET])
    for dtype in (LOSSLESS, PRESET):
        assert ("problem" in result[dtype]) == ("problem" in result[PRESET]), result[dtype]
    if not verdict["supported"]:
        problem = result[PRESET]
        assert problem["kind"] == "Refused", problem
        assert problem["problem"] in verdict["sentences"]
        assert problem["problem"].count("\n") == 0
        # What the sentence advises. MiMo's backend is one of Triton's kernels.
        assert "problem" not in result["auto"] or name == "mimo-v2", result["auto"]


@pytest.mark.parametrize("name", NAMES)
def test_the_16_bit_page_gives_the_greedy_tokens_of_auto(results: dict[str, Any], name: str) -> None:
    result = model(results, name)
    have, want = result[LOSSLESS], result["auto"]
    near = NEAR_TIE[tiny_models.MODELS[name].dtype]
    gaps = parted(have, want)
    assert all(gap < near for gap in gaps), gaps
    apart = 0
    for mine, theirs in zip(have["completions"], want["completions"], strict=True):
        for token, other, p, q in zip(
            mine["tokens"], theirs["tokens"], mine["logprobs"], theirs["logprobs"], strict=True
        ):
            if token != other:
                break
            apart += abs(p - q) >= near
    assert apart <= 1, apart


@pytest.mark.parametrize("name", NAMES)
def test_the_line_at_start_up_is_true(results: dict[str, Any], name: str) -> None:
    result = model(results, name)
    for dtype in (LOSSLESS, PRESET):
        assert sum("(page format" in said for said in result[dtype]["said"]) == 1
        line = announced(result[dtype])
        assert line is not None and line.startswith(dtype)
        _, tokens, times = figures(line)
        assert tokens == result[dtype]["tokens"]
        assert times == pytest.approx(tokens / result["auto"]["tokens"], rel=0.02)
    size, _, times = figures(announced(result[PRESET]))
    assert size == result["check"]["token_bytes"]
    assert result["check"]["times"] == pytest.approx(times, rel=0.02)
    native = ", ".join(tiny_models.MODELS[name].options.get("kv_cache_dtype_skip_layers", ["none"]))
    assert f"native layers: {native}" in announced(result[PRESET])


def test_pages_match_states_without_wasting_a_twentieth(results: dict[str, Any]) -> None:
    """Unless a state is smaller than the smallest block, so that `auto` wastes as much."""
    waste = {}
    for name in NAMES:
        ours, auto = results[name].get(PRESET, {}), results[name].get("auto", {})
        if "waste" in ours and "layers with a state" in announced(ours) and ours["waste"] > auto["waste"]:
            waste[name] = ours["waste"]
    assert max(waste.values(), default=0) < 0.05, waste
