"""The plugin inside vLLM engines on a GPU: what engines on a CPU cannot show. One process a test.

They fit one GPU side by side, `pytest -m gpu -n 10 -k "not sleep" tests/test_gpu_engine.py`, but for those of
sleep: vLLM asserts that the GPU has no less free memory afterwards, which it has while others start.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import engine_runs
import pytest
import tiny_models
import torch
from answers import CODED, NEAR_TIE, assert_attention_is_that_of_auto, assert_same_greedy_tokens, share_right
from engine_runs import child_env

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

LOSSLESS_SWITCH = {"VLLM_POLARQUANT_LOSSLESS": "1"}
run = functools.partial(
    engine_runs.run, script=str(Path(__file__).with_name("gpu_runs.py")), **LOSSLESS_SWITCH
)


@pytest.mark.parametrize(
    ("dtype", "model", "captured"),
    [
        ("auto", "probe", True),
        ("polarquant_lossless", "probe", True),
        ("polarquant_k4v4", "probe", True),
        ("polarquant_k4v4", "probe", False),
        ("polarquant_k4v4", "sinks", False),
    ],
)
def test_sleep_changes_no_greedy_token(dtype: str, model: str, captured: bool) -> None:
    found = run("sleep", dtype, model, captured)
    before, levels = found["before"], [found["level 1"], found["level 2"]]
    for after in levels:
        assert after["tables"] == before["tables"]
        assert_same_greedy_tokens(after["completions"], before["completions"], ties=2)
    if model == "sinks":
        assert before["sinks"] == found["level 2"]["sinks"] == 4


@pytest.mark.parametrize("dtype", ["polarquant_k4v4", "polarquant_lossless"])
def test_captured_graphs_give_the_greedy_tokens_of_eager_decoding(dtype: str) -> None:
    found = run("graphs", dtype)
    assert "Graph capturing finished" in found["log"]
    assert len(found["captured"]) == 8
    assert_same_greedy_tokens(found["captured"], found["eager"], ties=1)


@pytest.mark.parametrize("name", engine_runs.ATTENTIONS)
def test_every_kind_of_attention_gives_what_auto_gives(name: str) -> None:
    try:
        found = engine_runs.run("attentions", [name], **LOSSLESS_SWITCH)
    except RuntimeError as problem:
        if "_moe_C" not in str(problem):
            raise
        pytest.skip("this build of vLLM has no kernels of experts")
    assert_attention_is_that_of_auto(found[name], engine_runs.dtype_of(name), tiny_models.WINDOW)


def test_the_probe_in_16_bit_pages_gives_what_auto_gives() -> None:
    found = engine_runs.run("lossless", **LOSSLESS_SWITCH)
    auto, mine = found["auto"], found["polarquant_lossless"]
    for schedule in ("chunked", "cached", "preempted"):
        assert_same_greedy_tokens(mine[schedule], auto[schedule], ties=1)
    assert min(mine["cached_tokens"]) > 3 * 192
    assert mine["cached_tokens"] == auto["cached_tokens"]
    assert mine["preemptions"] == auto["preemptions"] > 0


NGRAM: dict[str, Any] = {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2}
DRAFT: dict[str, Any] = {"method": "draft_model"}
RUNNERS = {"V1": {"VLLM_USE_V2_MODEL_RUNNER": "0"}, "V2": {"VLLM_USE_V2_MODEL_RUNNER": "1"}}
WAYS = [["auto", None], ["polarquant_lossless", None], ["polarquant_k4v4", None]]


@pytest.mark.parametrize(
    ("config", "count", "runner", "captured"),
    [
        (NGRAM, 1, "V2", True),
        (NGRAM, 5, "V1", False),
        (NGRAM, 15, "V2", True),
        (DRAFT, 1, "V1", True),
        (DRAFT, 3, "V1", False),
        (DRAFT, 3, "V2", False),
        (DRAFT, 3, "V2", True),
        (DRAFT, 15, "V2", True),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else str(value),
)
def test_as_many_drafts_are_taken_as_with_auto(
    config: dict[str, Any], count: int, runner: str, captured: bool
) -> None:
    found = run("drafts", config | {"num_speculative_tokens": count}, WAYS, captured, **RUNNERS[runner])
    auto, exact, coded = found["ways"]
    assert_same_greedy_tokens(exact["completions"], auto["completions"], ties=1)
    assert auto["accepted"] > 20
    shares = [each["accepted"] / each["drafted"] for each in (auto, exact, coded)]
    if config is DRAFT:
        # The target drafts for itself, so all but near-ties are taken.
        assert shares[1] > shares[0] - 0.01, shares
        assert shares[2] > shares[0] - 0.04, shares
    else:
        # How many n-grams are right depends on the text alone.
        assert shares[1] == pytest.approx(shares[0], abs=0.02)
        assert coded["accepted"] > 20


@pytest.mark.parametrize("runner", RUNNERS)
def test_target_and_draft_may_have_caches_of_different_dtypes(runner: str) -> None:
    ways = [["auto", None], ["polarquant_lossless", "auto"], ["auto", "polarquant_lossless"]]
    found = run("drafts", DRAFT | {"num_speculative_tokens": 3}, ways, False, **RUNNERS[runner])
    auto, *mixed = found["ways"]
    for each in mixed:
        assert_same_greedy_tokens(each["completions"], auto["completions"], ties=1)
        assert each["accepted"] / each["drafted"] > auto["accepted"] / auto["drafted"] - 0.01


@pytest.mark.parametrize(("dtype", "near"), [("polarquant_lossless", NEAR_TIE), ("polarquant_k4v4", CODED)])
def test_prompts_that_attend_to_what_they_stored_give_the_same_however_they_are_cut(
    dtype: str, near: float
) -> None:
    found = engine_runs.run("stored_prompts", dtype, **LOSSLESS_SWITCH)
    whole, cut = found["whole"], found["cut"]
    assert min(whole["cached tokens"]) > 192
    for other in (whole["cached"], cut["first"], cut["cached"]):
        assert_same_greedy_tokens(other, whole["first"], ties=1, near=near)
        for mine, theirs in zip(other, whole["first"], strict=True):
            assert mine["logprobs"] == pytest.approx(theirs["logprobs"], abs=near)


@pytest.mark.parametrize("runner", RUNNERS)
def test_two_starts_give_the_same_tables(runner: str) -> None:
    first, second = (run("tables", start, **RUNNERS[runner]) for start in (1, 2))
    assert first["tables"] == second["tables"]
    for found in (first, second):
        assert found["v2"] == (runner == "V2")
        assert found["layers"] == found["reached"] == found["centred"] == engine_runs.PROBE_LAYERS
        assert found["requests"] == found["samples"] == 0
        assert share_right(found) >= 0.9


def test_pages_come_back_from_memory_as_they_were() -> None:
    found = run("offloaded")
    for dtype in ("auto", "polarquant_lossless", "polarquant_k4v4"):
        mine = found[dtype]
        first, second = mine["hits"][1], mine["hits"][2]
        assert mine["hits"][0] == 0
        assert second > first > 6 * 300
        computed, *again = mine["completions"]
        # From pages both times.
        assert_same_greedy_tokens(again[1], again[0], ties=0)
        if dtype != "polarquant_k4v4":
            assert_same_greedy_tokens(again[0], computed, ties=1)
    assert_same_greedy_tokens(
        found["polarquant_lossless"]["completions"][0], found["auto"]["completions"][0], ties=1
    )


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize(("dtype", "near"), [("polarquant_lossless", NEAR_TIE), ("polarquant_k4v4", CODED)])
def test_random_serving_gives_each_request_what_it_gets_alone(
    dtype: str, near: float, captured: bool
) -> None:
    import gpu_runs

    options = {"gpu_memory_utilization": 0.05} | (gpu_runs.CAPTURED if captured else {})
    command = [sys.executable, "-m", "vllm_polarquant.eval.soak", "--kv-cache-dtype", dtype]
    done = subprocess.run(
        [*command, "--requests", "250", "--engine", json.dumps(options), "--near", str(near)],
        env=child_env(**LOSSLESS_SWITCH, VLLM_LOGGING_LEVEL="ERROR"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert not done.returncode, done.stdout[-4000:]
    found = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert found["wrong"] == []
    for name in ("aborted", "num_preemptions", "prefix_cache_hits", "spec_decode_num_accepted_tokens"):
        assert found[name], found
