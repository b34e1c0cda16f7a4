"""The measures on real engines, beside a forward pass in plain torch that quantises every key and value."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import probe_reference
import pytest
import torch
from engine_runs import child_env
from tokenizers import Tokenizer

from vllm_polarquant.eval.measures.text import token_rows
from vllm_polarquant.eval.probe.episodes import MODEL_DIR
from vllm_polarquant.format import LOSSLESS, PRESETS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROWS, CONTEXT = 4, 193
PRESET = "polarquant_k3v3"
SUITE = {
    "engine": {"dtype": "float16", "kv_cache_memory_bytes": 64 << 20, "enforce_eager": True},
    "cells": {
        # The probe's whole vocabulary, so that nothing is left out of the divergence.
        "text": {"measure": "next_token", "rows": ROWS, "context": CONTEXT, "top": 4096},
        "retrieval": {
            "measure": "retrieval",
            "lengths": ["1000"],
            "episodes": 2,
            "max_model_len": 2048,
        },
        "greedy": {
            "measure": "greedy",
            "prompts": 2,
            "prompt_tokens": 128,
            "tokens": 16,
            "max_model_len": 2048,
        },
    },
}


class _Tokens:
    """The probe's tokenizer as vLLM's looks to `token_rows`."""

    def encode(self, text: str) -> list[int]:
        return list(Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json")).encode(text).ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def ran(folder: Path) -> subprocess.CompletedProcess[str]:
    """The command on auto, a preset, and the test page, which no engine has unless it is registered."""
    suite = folder / "small.json"
    suite.write_text(json.dumps(SUITE))
    command = [sys.executable, "-m", "vllm_polarquant.eval.cli", "probe", "--suite", str(suite)]
    command += ["--kv-cache-dtypes", f"{LOSSLESS},{PRESET}", "--out", str(folder / "out")]
    # The reference knows no centres.
    command += ["--engine", json.dumps({"additional_config": {"polarquant": {"centre_keys": False}}})]
    return subprocess.run(command, env=child_env(), capture_output=True, text=True, timeout=560, check=False)


@pytest.fixture(scope="module")
def cells(ran: subprocess.CompletedProcess[str], folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in (folder / "out").glob("*--*.json")]
    return {(cell["key"]["kv_cache_dtype"], cell["key"]["cell"]): cell for cell in found}


@pytest.fixture(scope="module")
def reference() -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """Log-probabilities of the rows' next tokens [R, T - 1, vocabulary]: exact, quantised; and the rows."""
    rows = token_rows(_Tokens(), "heldout", ROWS, CONTEXT)
    exact, quantised = (
        torch.stack([probe_reference.logprobs(row, *vectors)[:-1] for row in rows])
        for vectors in ((None, None), PRESETS[PRESET])
    )
    return exact, quantised, rows


def test_every_cell_but_those_of_an_engine_that_does_not_start_has_a_result(
    ran: subprocess.CompletedProcess[str], cells: dict[tuple[str, str], dict[str, Any]]
) -> None:
    assert set(cells) == {(dtype, name) for dtype in ("auto", PRESET) for name in SUITE["cells"]}
    assert ran.returncode == 1
    failed = [line for line in ran.stderr.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 3
    assert all(line.startswith(f"failed: {LOSSLESS}, ") and f"{LOSSLESS}.log" in line for line in failed)
    table = next(line for line in ran.stdout.splitlines() if line.startswith(f"| {PRESET}"))
    assert "10/10" in table and f"{cells[PRESET, 'text']['summary']['kl']:.4f}" in table


def test_perplexity_is_that_of_the_forward_pass(
    cells: dict[tuple[str, str], dict[str, Any]],
    reference: tuple[torch.Tensor, torch.Tensor, list[list[int]]],
) -> None:
    exact, quantised, rows = reference
    actual = torch.tensor([row[1:] for row in rows])[..., None]
    for dtype, distribution in (("auto", exact), (PRESET, quantised)):
        summary = cells[dtype, "text"]["summary"]
        want = math.exp(-distribution.gather(-1, actual).mean())
        assert summary["perplexity"] == pytest.approx(want, rel=0.003 if dtype == "auto" else 0.02)
        assert summary["tokens"] == ROWS * (CONTEXT - 1)


def test_divergence_is_that_of_a_forward_pass_over_quantised_keys_and_values(
    cells: dict[tuple[str, str], dict[str, Any]],
    reference: tuple[torch.Tensor, torch.Tensor, list[list[int]]],
    folder: Path,
) -> None:
    """It would be 0 where a prefill attends to its own fresh keys, and smaller where it does in part."""
    exact, quantised, rows = reference
    summary = cells[PRESET, "text"]["summary"]
    kl = (exact.exp() * (exact - quantised)).sum(-1)
    assert kl.mean() > 0.05
    # Noise of 3e-4 on the keys moves the forward pass's own mean from 0.087 to 0.098.
    assert summary["kl"] == pytest.approx(kl.mean().item(), rel=0.12)
    (path,) = (folder / "out").glob(f"text--{PRESET}--*.npz")
    with np.load(path) as arrays:
        measured = torch.from_numpy(arrays["kl"])
    # Position by position, the first tokens included. A search over codes turns the rounding of float16 into
    # other codes, so the two differ; codes of the mirrored vectors, whose errors are as large, differ more.
    mirrored = torch.stack(
        [probe_reference.logprobs(row, *PRESETS[PRESET], mirrored=True)[:-1] for row in rows]
    )
    near, far = (
        torch.corrcoef(torch.stack([measured.flatten(), other.flatten()]))[0, 1]
        for other in (kl, (exact.exp() * (exact - mirrored)).sum(-1))
    )
    assert near > 0.6 and near > far + 0.1
    same = (exact.argmax(-1) == quantised.argmax(-1)).float().mean().item()
    assert summary["top1_agreement"] == pytest.approx(same, abs=0.03)
    assert summary["mass_outside_top"] < 1e-6


def test_retrieval_counts_every_question_once(cells: dict[tuple[str, str], dict[str, Any]]) -> None:
    for dtype in ("auto", PRESET):
        summary = cells[dtype, "retrieval"]["summary"]
        assert (summary["right"], summary["of"]) == (10, 10)
        for parts in ("by_depth", "by_pairs", "by_both"):
            assert sum(part["of"] for part in summary[parts]) == 10
        assert {item["pairs"] for item in summary["items"]} == {14, 15}


def test_greedy_tokens_part_somewhere(cells: dict[tuple[str, str], dict[str, Any]]) -> None:
    summary = cells[PRESET, "greedy"]["summary"]
    assert len(summary["same_tokens"]) == 2
    assert summary["same_share"] == sum(summary["same_tokens"]) / 32 < 1
