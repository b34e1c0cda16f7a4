"""lm-evaluation-harness on the probe with a polarquant cache: its own vLLM adapter, local data."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from typing import Any

import pytest
from engine_runs import MODEL, child_env

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
    pytest.mark.timeout(240),
    pytest.mark.skipif(
        not has_vllm_metadata(),
        reason="lm_eval asks for a distribution named vllm: pip install ./.ci/vllm-cpu-metadata",
    ),
]

EVALUATE = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

out, folder, model, tasks = sys.argv[1:]
results = simple_evaluate(
    model="vllm",
    model_args={
        "pretrained": model,
        "kv_cache_dtype": "polarquant_k4v4",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 64 << 20,
        "max_model_len": 4096,
        # Of long prompts, all but the last chunk is read off the pages.
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "long_prefill_token_threshold": 32,
    },
    tasks=tasks.split(","),
    task_manager=TaskManager(include_path=folder, include_defaults=False),
    batch_size="auto",
    limit=8,
    bootstrap_iters=0,
)
with open(out, "w") as file:
    json.dump(results["results"], file)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The shipped tasks, from a folder that is not the checkout."""
    folder = tmp_path_factory.mktemp("lm_eval")
    out = folder / "results.json"
    child = subprocess.run(
        [sys.executable, "-c", EVALUATE, str(out), str(FOLDER), MODEL, "probe_retrieval,probe_text"],
        env=child_env(HF_HOME=str(folder / "hf")),
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=440,
        check=False,
    )
    assert child.returncode == 0, child.stdout[-4000:]
    assert "polarquant_k4v4 (page format" in child.stdout
    return json.loads(out.read_text())


def test_generation_scores_the_answers(results: dict[str, Any]) -> None:
    assert results["probe_retrieval"]["exact_match,none"] >= 0.9


def test_rolling_likelihood_is_that_of_a_trained_model(results: dict[str, Any]) -> None:
    # Bytes at random have 8 bits, and those of the probe's tokens at random about 3.
    assert 0.5 < results["probe_text"]["bits_per_byte,none"] < 2
