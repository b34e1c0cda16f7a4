"""The plugin inside real vLLM engines on CPU: schedules, presets, speculation, processes."""

from __future__ import annotations

import os
import re
from typing import Any

import engine_runs
import pytest
import tiny_models
import torch
from answers import (
    CODED,
    NEAR_TIE,
    assert_attention_is_that_of_auto,
    assert_same_greedy_tokens,
    centring_lines,
    first_difference,
    share_right,
)
from engine_runs import PROBE_KV_HEADS, PROBE_LAYERS, run

from vllm_polarquant.format import Slot
from vllm_polarquant.page import Page

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lossless() -> dict[str, Any]:
    return run("lossless", VLLM_POLARQUANT_LOSSLESS="1")


@pytest.mark.parametrize("schedule", ["chunked", "cached", "preempted"])
def test_lossless_pages_give_the_greedy_tokens_of_auto(lossless: dict[str, Any], schedule: str) -> None:
    want, have = lossless["auto"][schedule], lossless["polarquant_lossless"][schedule]
    assert sum(len(completion["tokens"]) for completion in want) > 380
    assert_same_greedy_tokens(have, want, ties=1)


def test_the_schedules_were_what_they_are_called(lossless: dict[str, Any]) -> None:
    for dtype in ("auto", "polarquant_lossless"):
        mine = lossless[dtype]
        # Chunked: several times the 192 tokens of a batch. Cached: all but the last block.
        assert min(mine["prompt_tokens"]) > 3 * 192
        assert all(
            cached == tokens // 128 * 128
            for cached, tokens in zip(mine["cached_tokens"], mine["prompt_tokens"], strict=True)
        )
        assert mine["preemptions"] >= 1
    assert lossless["auto"]["preemptions"] == lossless["polarquant_lossless"]["preemptions"]


def test_lossless_pages_give_the_samples_of_auto(lossless: dict[str, Any]) -> None:
    """Three samples a prompt share its pages. A draw may fall between two dtypes' probabilities."""
    want, have = lossless["auto"]["several"], lossless["polarquant_lossless"]["several"]
    assert len(want) == len(have) == 12
    assert len({tuple(sample["tokens"]) for sample in want}) >= 9
    same = 0
    for mine, theirs in zip(have, want, strict=True):
        at = first_difference(mine["tokens"], theirs["tokens"])
        same += at is None
        assert mine["logprobs"][:at] == pytest.approx(theirs["logprobs"][:at], abs=NEAR_TIE)
    assert same >= 10


@pytest.fixture(scope="module")
def presets() -> dict[str, Any]:
    return run("presets")


def test_k4v4_answers_from_quantised_pages(presets: dict[str, Any]) -> None:
    answers = presets["polarquant_k4v4"]
    assert len(answers["right"]) == 20
    assert share_right(answers) >= 0.95
    # Four of the five questions of an episode find all its blocks quantised in the prefix cache.
    hits = [right for right, cached in zip(answers["right"], answers["cached"], strict=True) if cached]
    assert len(hits) >= 16
    assert sum(hits) / len(hits) >= 0.95
    assert min(cached for cached in answers["cached"] if cached) > 1500


@pytest.mark.parametrize(("preset", "least"), [("polarquant_k8v4", 0.95), ("polarquant_k2v2", 0.5)])
def test_other_presets_answer(presets: dict[str, Any], preset: str, least: float) -> None:
    assert len(presets[preset]["right"]) == 20
    assert share_right(presets[preset]) >= least


def logged_capacities(log: str) -> list[int]:
    """The tokens of every line "KV cache size: 50,816 tokens" that vLLM logged."""
    return [int(n.replace(",", "")) for n in re.findall(r"KV cache size: ([\d,]+) tokens", log)]


@pytest.mark.parametrize("preset", ["polarquant_k4v4", "polarquant_k8v4", "polarquant_k2v2"])
def test_vllm_counts_as_many_tokens_as_the_pages_hold(presets: dict[str, Any], preset: str) -> None:
    block = presets[preset]["block_size"]
    page = Page(Slot(preset, 128), block).nbytes
    blocks = engine_runs.EAGER["kv_cache_memory_bytes"] // (page * PROBE_KV_HEADS * PROBE_LAYERS)
    assert presets[preset]["kv_tokens"] == blocks * block
    assert presets[preset]["kv_tokens"] in logged_capacities(presets["log"])
    ratio = presets[preset]["kv_tokens"] / presets["auto"]["kv_tokens"]
    assert ratio == pytest.approx(Slot(preset, 128).ratio, rel=0.02)


def test_k4v4_holds_more_than_3_8_times_the_tokens_of_auto(presets: dict[str, Any]) -> None:
    assert Slot("polarquant_k4v4", 128).nbytes == 132
    assert presets["polarquant_k4v4"]["kv_tokens"] > 3.8 * presets["auto"]["kv_tokens"]


def test_one_log_line_states_preset_bytes_capacity_and_layers(presets: dict[str, Any]) -> None:
    lines = [line for line in presets["log"].splitlines() if "polarquant_k4v4 (page format" in line]
    assert len(lines) == 1
    tokens = presets["polarquant_k4v4"]["kv_tokens"]
    for part in (
        "1,320 bytes a token",
        f"{tokens:,} tokens fit",
        "quantised layers: 0-4",
        "native layers: none",
    ):
        assert part in lines[0]
    times = re.search(r"tokens fit, ([\d.]+) times those of auto", lines[0])
    assert times is not None
    assert float(times[1]) == pytest.approx(tokens / presets["auto"]["kv_tokens"], rel=0.02)


def test_skipped_layers_stay_native() -> None:
    found = run("skipped_layers")
    assert share_right(found) >= 0.95
    assert "quantised layers: 1-3; native layers: 0, 4" in found["log"]
    # A token takes 512 values of 2 bytes in each native layer and 2 x 132 bytes in the others.
    ideal = engine_runs.EAGER["kv_cache_memory_bytes"] / (2 * 1024 + 3 * 264)
    assert 0.9 * ideal < found["kv_tokens"] <= ideal


@pytest.fixture(scope="module")
def speculation() -> dict[str, Any]:
    return run("speculation", VLLM_POLARQUANT_LOSSLESS="1")


@pytest.mark.parametrize("method", ["ngram", "draft"])
def test_speculation_changes_no_greedy_token(speculation: dict[str, Any], method: str) -> None:
    found, want = speculation[method]["with"], speculation[method]["without"]
    assert want["drafted"] == 0
    assert found["accepted"] > 60
    assert found["drafted"] > found["accepted"]
    near = NEAR_TIE if method == "ngram" else CODED
    assert_same_greedy_tokens(found["completions"], want["completions"], ties=1, near=near)


def test_a_draft_model_is_centred_with_its_target(speculation: dict[str, Any]) -> None:
    plain, draft = centring_lines(speculation["log"])
    assert (plain[0], draft[0]) == ("5", "10")
    assert not draft[5]


@pytest.fixture(scope="module")
def attentions() -> dict[str, Any]:
    return run("attentions", engine_runs.ATTENTIONS_ON_CPU, VLLM_POLARQUANT_LOSSLESS="1")


@pytest.mark.parametrize("name", engine_runs.ATTENTIONS_ON_CPU)
def test_windows_caps_sinks_and_shared_caches_give_what_auto_gives(
    attentions: dict[str, Any], name: str
) -> None:
    assert_attention_is_that_of_auto(attentions[name], engine_runs.dtype_of(name), tiny_models.WINDOW)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU's products of matrices are rounded by their sizes"
)
def test_prompts_that_attend_to_what_they_stored_do_not_depend_on_chunks_and_hits() -> None:
    found = run("stored_prompts", "polarquant_k4v4")
    whole, cut = found["whole"], found["cut"]
    assert min(whole["prompt tokens"]) > 2 * 192
    assert min(whole["cached tokens"]) > 192
    for other in (whole["cached"], cut["first"], cut["cached"]):
        assert [each["tokens"] for each in other] == [each["tokens"] for each in whole["first"]]
        assert [each["logprobs"] for each in other] == [each["logprobs"] for each in whole["first"]]


def test_other_dtypes_do_not_notice_the_plugin() -> None:
    loaded, absent = run("other_dtypes"), run("other_dtypes", VLLM_PLUGINS="")
    assert loaded["plugin"]
    assert not absent["plugin"]
    assert loaded["auto"] == absent["auto"]
    assert isinstance(loaded["auto"], list)
    assert loaded["fp8"] == absent["fp8"]
    for name in ("polarquant_k9v9", "foo"):
        assert "ValidationError" in loaded[name]
        assert "cache_dtype" in loaded[name]
        assert "polarquant_k4v4" in loaded[name]
        assert "polarquant_k4v4" not in absent[name]
    if isinstance(loaded["fp8"], str):
        pytest.skip(f"fp8 is refused here, with and without the plugin: {loaded['fp8'][:200]}")


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers want two cores")
def test_two_tensor_parallel_workers_answer_and_write_one_line() -> None:
    found = run(
        "tensor_parallel",
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_CPU_OMP_THREADS_BIND="0|1",
    )
    assert share_right(found) >= 0.95
    # Each worker has one of the two kv heads.
    assert "660 bytes a token, " in found["log"]
    (line,) = centring_lines(found["log"])
    assert line[:2] == ("5", "512")
