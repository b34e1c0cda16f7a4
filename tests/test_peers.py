"""Engines that read each other's pages through NIXL, where its package is; a CPU will do, too.

One that stores a prompt and one that answers it give what one alone gives; engines to which the same bytes
mean something else read nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine_runs
import pytest
import torch
from answers import CODED, NEAR_TIE, assert_same_greedy_tokens

pytest.importorskip("vllm")
pytest.importorskip("nixl", reason="needs the package nixl", exc_type=ImportError)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

SCRIPT = str(Path(__file__).with_name("peer_runs.py"))


def run(scenario: str, *arguments: Any) -> dict[str, Any]:
    return engine_runs.run(
        scenario,
        *arguments,
        script=SCRIPT,
        VLLM_POLARQUANT_LOSSLESS="1",
        # A process has one connector.
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
    )


def handed_over(dtype: str, **options: Any) -> dict[str, Any]:
    found = run("handed_over", dtype, options)
    # All of the prompts.
    assert found["read"] == sum(found["prompt tokens"]) > 800
    return found


def test_16_bit_pages_of_a_peer_give_what_auto_gives() -> None:
    exact, auto = handed_over("polarquant_lossless"), handed_over("auto")
    assert_same_greedy_tokens(exact["completions"], auto["completions"], ties=1, near=NEAR_TIE)
    assert_same_greedy_tokens(exact["completions"], auto["alone"], ties=1, near=NEAR_TIE)


@pytest.mark.parametrize("skipped", [[], ["0", "3"]], ids=["all layers", "some layers in 16 bits"])
def test_coded_pages_of_a_peer_give_what_own_ones_give(skipped: list[str]) -> None:
    found = handed_over("polarquant_k4v4", kv_cache_dtype_skip_layers=skipped)
    assert_same_greedy_tokens(found["completions"], found["alone"], ties=1, near=CODED)
    assert "NIXL compatibility check passed" in found["log"]


STRANGERS = {
    "itself": ["polarquant_k4v4", {}],
    "another preset": ["polarquant_k8v4", {}],
    "other tables": [
        "polarquant_k4v4",
        {"additional_config": {"polarquant": {"prefill_from_pages": True, "centre_keys": False}}},
    ],
    "other blocks": ["polarquant_k4v4", {"block_size": 64}],
}


def test_pages_that_mean_something_else_are_not_read() -> None:
    found = run("strangers", STRANGERS)
    assert set(found.pop("itself")["reasons"]) == {"length"}
    log = found.pop("log")
    assert log.count("NIXL compatibility hash mismatch") >= len(found) == 3
    for name, other in found.items():
        assert set(other["reasons"]) == {"error"}, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM offloads from NVIDIA GPUs alone")
def test_pages_of_a_peer_are_offloaded_as_own_ones() -> None:
    found = run("offloaded_too", "polarquant_lossless")
    assert found["read"] == sum(found["prompt tokens"])
    assert found["read again"] > 600
    assert_same_greedy_tokens(found["again"], found["completions"], ties=1, near=NEAR_TIE)
