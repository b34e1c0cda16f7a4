"""Drafts of heads on the target's hidden states, EAGLE and MTP: as many are taken as with `auto`."""

from __future__ import annotations

from pathlib import Path

import engine_runs
import pytest
import torch
from answers import CODED, NEAR_TIE, assert_same_greedy_tokens, centring_lines

pytest.importorskip("vllm")

SCRIPT = str(Path(__file__).with_name("head_runs.py"))
LAYERS = {"eagle": 4, "mtp": 2}
"""Of the target and of its head."""


def check(method: str, count: int, captured: bool = False, **env: str) -> None:
    found = engine_runs.run(
        "heads", method, count, captured, script=SCRIPT, VLLM_POLARQUANT_LOSSLESS="1", **env
    )
    auto, exact, coded = (found[way] for way in ("auto", "polarquant_lossless", "polarquant_k4v4"))
    assert_same_greedy_tokens(exact["completions"], auto["completions"], ties=1, near=NEAR_TIE)
    # Speculation changes no text but at ties, which two codes of one key may be.
    assert_same_greedy_tokens(coded["completions"], found["alone"], ties=2, near=CODED)
    shares = [each["accepted"] / each["drafted"] for each in (auto, exact, coded)]
    assert shares[0] > 0.9, shares
    assert shares[1] == pytest.approx(shares[0], abs=0.02), shares
    # A head's keys and its target's are coded apart, and random weights have many near-ties.
    assert shares[2] > shares[0] - 0.15, shares
    with_head, alone = centring_lines(found["log"])
    assert int(with_head[0]) == LAYERS[method] == 2 * int(alone[0])
    assert not with_head[5]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="more of them run on the GPU")
@pytest.mark.parametrize(("method", "count"), [("eagle", 3), ("mtp", 1)])
def test_as_many_drafts_of_a_head_are_taken_as_with_auto(method: str, count: int) -> None:
    check(method, count)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    ("method", "count", "runner", "captured"),
    [
        ("eagle", 1, "V2", True),
        ("eagle", 3, "V1", False),
        ("eagle", 3, "V1", True),
        ("eagle", 3, "V2", False),
        ("eagle", 3, "V2", True),
        ("mtp", 1, "V1", False),
        ("mtp", 1, "V2", True),
        ("mtp", 3, "V2", True),
    ],
)
def test_as_many_are_taken_on_a_gpu_by_both_runners(
    method: str, count: int, runner: str, captured: bool
) -> None:
    check(method, count, captured, VLLM_USE_V2_MODEL_RUNNER=str(int(runner == "V2")))
