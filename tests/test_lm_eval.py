"""lm-evaluation-harness on the probe with a polarquant cache: its own vLLM adapter, local data."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
from engine_runs import run

pytest.importorskip("lm_eval")

from vllm_polarquant.eval.measures.tasks.lookup import FOLDER


def has_vllm_metadata() -> bool:
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not has_vllm_metadata(),
        reason="lm_eval asks for a distribution named vllm: pip install ./.ci/vllm-cpu-metadata",
    ),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The shipped tasks, from a folder that is not the checkout."""
    folder = tmp_path_factory.mktemp("lm_eval")
    tasks = ["probe_retrieval", "probe_text"]
    found = run("lm_eval", str(folder), str(FOLDER), tasks, HF_HOME=str(folder / "hf"))
    assert "polarquant_k4v4 (page format" in found["log"]
    return found


def test_generation_scores_the_answers(results: dict[str, Any]) -> None:
    assert results["probe_retrieval"]["exact_match,none"] >= 0.9


def test_rolling_likelihood_is_that_of_a_trained_model(results: dict[str, Any]) -> None:
    # Bytes at random have 8 bits, and those of the probe's tokens at random about 3.
    assert 0.5 < results["probe_text"]["bits_per_byte,none"] < 2
