"""The measures and the shipped tasks of lm-eval on real engines, in one run of the command.

Beside them, a forward pass in plain torch that quantises every key and value.
"""

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

pytest.importorskip("lm_eval")

from vllm_polarquant.eval.measures.tasks import lookup
from vllm_polarquant.eval.measures.tasks.outcomes import RIGHT_CHOICE
from vllm_polarquant.eval.measures.text import token_rows
from vllm_polarquant.eval.probe.episodes import MODEL_DIR
from vllm_polarquant.format import LOSSLESS, PRESETS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROWS, CONTEXT = 4, 193
TEXTS, CHOICES = 2, 2
CHOICE = f"{RIGHT_CHOICE},none"
PRESET = "polarquant_k3v3"

Cells = dict[tuple[str, str], dict[str, Any]]

HUB_TASK = """
task: on_the_hub
dataset_path: nobody/no-such-data
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: [a, b]
doc_to_target: 0
"""


def suite_of(folder: Path) -> dict[str, Any]:
    """Cells with the same options share an engine."""
    cell = {"measure": "lm_eval", "requests": 8, "max_model_len": 2048}
    documents = cell | {"task": "probe_text", "metric": "word_perplexity,none", "limit": TEXTS}
    return {
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
            "documents": documents | {"chunk": 1},
            "documents in one chunk": documents | {"chunk": 2048},
            "answers": cell | {"task": "probe_retrieval_by_depth", "limit": 1, "chunk": 2048},
            "choices": cell | {"task": "probe_choice_depth_2", "limit": CHOICES, "chunk": 32},
            "missing": cell | {"task": "on_the_hub", "include": str(folder)},
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
    """The command, outside the checkout, on auto, a preset and the test page.

    No engine has the test page unless it is registered.
    """
    (folder / "hub.yaml").write_text(HUB_TASK)
    (folder / "suite.json").write_text(json.dumps(suite_of(folder)))
    command = [sys.executable, "-m", "vllm_polarquant.eval.cli", "probe", "--suite", "suite.json"]
    command += ["--kv-cache-dtypes", f"{LOSSLESS},{PRESET}", "--out", "out"]
    # The reference knows no centres.
    command += ["--engine", json.dumps({"additional_config": {"polarquant": {"centre_keys": False}}})]
    env = child_env(HF_HOME=str(folder / "hf"))
    return subprocess.run(
        command, env=env, cwd=folder, capture_output=True, text=True, timeout=840, check=False
    )


@pytest.fixture(scope="module")
def cells(ran: subprocess.CompletedProcess[str], folder: Path) -> Cells:
    """What was kept, by dtype and cell: the summary, and the arrays beside it."""
    found: Cells = {}
    for path in (folder / "out").glob("*--*.json"):
        cell = json.loads(path.read_text())
        summary = found[cell["key"]["kv_cache_dtype"], cell["key"]["cell"]] = cell["summary"]
        if (beside := path.with_suffix(".npz")).exists():
            with np.load(beside) as arrays:
                summary["arrays"] = dict(arrays)
    return found


@pytest.fixture(scope="module")
def reference() -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """Log-probabilities of the rows' next tokens [R, T - 1, vocabulary]: exact, quantised; and the rows."""
    rows = token_rows(_Tokens(), "heldout", ROWS, CONTEXT)
    exact, quantised = (
        torch.stack([probe_reference.logprobs(row, *vectors)[:-1] for row in rows])
        for vectors in ((None, None), PRESETS[PRESET])
    )
    return exact, quantised, rows


def test_every_cell_but_those_without_an_engine_or_data_has_a_result(
    ran: subprocess.CompletedProcess[str], cells: Cells, folder: Path
) -> None:
    names = set(suite_of(folder)["cells"])
    assert set(cells) == {(dtype, name) for dtype in ("auto", PRESET) for name in names - {"missing"}}
    assert ran.returncode == 1
    failed = [line for line in ran.stderr.splitlines() if line.startswith("failed: ")]
    assert len(failed) == len(names) + 2
    (why,) = [line for line in failed if line.startswith("failed: auto")]
    assert "nobody/no-such-data" in why and "needs the network" in why
    refused = [line for line in failed if line.startswith(f"failed: {LOSSLESS}, ")]
    assert sum(f"{LOSSLESS}.log" in line for line in refused) == len(names) - 1
    table = next(line for line in ran.stdout.splitlines() if line.startswith(f"| {PRESET}"))
    assert "10/10" in table and f"{cells[PRESET, 'text']['kl']:.4f}" in table
    assert f"{PRESET} " in ran.stdout and "(n = 5)" in ran.stdout


def test_perplexity_is_that_of_the_forward_pass(
    cells: Cells,
    reference: tuple[torch.Tensor, torch.Tensor, list[list[int]]],
) -> None:
    exact, quantised, rows = reference
    actual = torch.tensor([row[1:] for row in rows])[..., None]
    for dtype, distribution in (("auto", exact), (PRESET, quantised)):
        summary = cells[dtype, "text"]
        want = math.exp(-distribution.gather(-1, actual).mean())
        assert summary["perplexity"] == pytest.approx(want, rel=0.003 if dtype == "auto" else 0.02)
        assert summary["tokens"] == ROWS * (CONTEXT - 1)


def test_divergence_is_that_of_a_forward_pass_over_quantised_keys_and_values(
    cells: Cells,
    reference: tuple[torch.Tensor, torch.Tensor, list[list[int]]],
) -> None:
    """It would be 0 where a prefill attends to its own fresh keys, and smaller where it does in part."""
    exact, quantised, rows = reference
    summary = cells[PRESET, "text"]
    kl = (exact.exp() * (exact - quantised)).sum(-1)
    assert kl.mean() > 0.05
    # Noise of 3e-4 on the keys moves the forward pass's own mean from 0.087 to 0.098.
    assert summary["kl"] == pytest.approx(kl.mean().item(), rel=0.12)
    measured = torch.from_numpy(summary["arrays"]["kl"])
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


def test_retrieval_counts_every_question_once(cells: Cells) -> None:
    for dtype in ("auto", PRESET):
        summary = cells[dtype, "retrieval"]
        assert (summary["right"], summary["of"]) == (10, 10)
        for parts in ("by_depth", "by_pairs", "by_both"):
            assert sum(part["of"] for part in summary[parts]) == 10
        assert {item["pairs"] for item in summary["items"]} == {14, 15}


def test_greedy_tokens_part_somewhere(cells: Cells) -> None:
    summary = cells[PRESET, "greedy"]
    assert len(summary["same_tokens"]) == 2
    assert summary["same_share"] == sum(summary["same_tokens"]) / 32 < 1


def test_text_is_scored_off_the_pages(cells: Cells) -> None:
    """Nats of all documents are those of a forward pass over codes; in one chunk no code shows."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(lookup.FOLDER), include_defaults=False)
    docs = manager.load(["probe_text"])["tasks"]["probe_text"].dataset["test"]
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    for dtype, vectors, tolerance in (("auto", (None, None), 0.002), (PRESET, PRESETS[PRESET], 0.03)):
        want = []
        for text in docs["text"][:TEXTS]:
            # lm-eval asks for the text's own first token too, after one that stands before all texts.
            ids = [0, *tokenizer.encode(text).ids]
            logprobs = probe_reference.logprobs(ids, *vectors)[:-1]
            want.append(-logprobs.gather(-1, torch.tensor(ids[1:])[:, None]).sum().item())
        nats = cells[dtype, "documents"]["arrays"]["word_perplexity,none"][:, 0]
        assert nats.sum() == pytest.approx(sum(want), rel=tolerance)
    found = {
        name: cells[PRESET, name]["against_baseline"]["word_perplexity,none"]["difference"]
        for name in ("documents", "documents in one chunk")
    }
    assert found["documents"] > 0.05 > 20 * abs(found["documents in one chunk"])


def test_auto_is_the_same_in_chunks_and_in_one(cells: Cells) -> None:
    chunked, whole = (
        cells["auto", name]["arrays"]["word_perplexity,none"][:, 0]
        for name in ("documents", "documents in one chunk")
    )
    assert chunked == pytest.approx(whole, rel=0.002)


def test_choices_show_three_bits(cells: Cells) -> None:
    """Accuracy may hide what the log-probability of the right choice shows."""
    base, coarse = (cells[dtype, "choices"]["arrays"][CHOICE][:, 0] for dtype in ("auto", PRESET))
    assert len(base) == CHOICES and (base > math.log(0.9)).all()
    assert (coarse < 1.2 * base).all()
    found = cells[PRESET, "choices"]["against_baseline"]
    assert found["acc,none"]["changed"] == 0 and found[CHOICE]["changed"] == CHOICES


def test_answers_are_generated_by_depth(cells: Cells) -> None:
    summary = cells["auto", "answers"]
    assert summary["metrics"]["exact_match,none"]["value"] == 1
    assert list(summary["by_task"]) == [f"probe_retrieval_depth_{i}" for i in range(5)]
    found = cells[PRESET, "answers"]["against_baseline"]["exact_match,none"]
    assert found["verdict"].endswith("(n = 5)") and found["low"] < 0 < found["high"]
