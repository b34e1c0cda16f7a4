"""lm-evaluation-harness on the probe with a polarquant cache: its own vLLM adapter, local data."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_runs import MODEL, child_env, questions, text_prompts

pytest.importorskip("lm_eval")


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

TASKS = {
    "probe_retrieval": """
task: probe_retrieval
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["'"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "probe_text": """
task: probe_text
dataset_path: json
dataset_kwargs: {data_files: {test: TEXTS}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
""",
}

EVALUATE = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

folder, model, tasks = sys.argv[1:4]
results = simple_evaluate(
    model="vllm",
    model_args={
        "pretrained": model,
        "kv_cache_dtype": "polarquant_k4v4",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 64 << 20,
        "max_model_len": 2048,
    },
    tasks=tasks.split(","),
    task_manager=TaskManager(include_path=folder, include_defaults=False),
    batch_size="auto",
    bootstrap_iters=0,
)
with open(folder + "/results.json", "w") as out:
    json.dump(results["results"], out)
"""


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("lm_eval")
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in questions(1000, 10)]
    write_rows(folder / "questions.jsonl", rows)
    write_rows(folder / "texts.jsonl", [{"text": text} for text in text_prompts(4, 2000)])
    for name, task in TASKS.items():
        task = task.replace("QUESTIONS", str(folder / "questions.jsonl"))
        (folder / f"{name}.yaml").write_text(task.replace("TEXTS", str(folder / "texts.jsonl")))
    child = subprocess.run(
        [sys.executable, "-c", EVALUATE, str(folder), MODEL, ",".join(TASKS)],
        env=child_env(HF_DATASETS_OFFLINE="1", HF_HOME=str(folder / "hf"))
        | {"HF_DATASETS_CACHE": os.fspath(folder / "cache")},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=220,
        check=False,
    )
    assert child.returncode == 0, child.stdout[-4000:]
    assert "polarquant_k4v4 (page format" in child.stdout
    return json.loads((folder / "results.json").read_text())


def test_generation_scores_the_answers(results: dict[str, Any]) -> None:
    assert results["probe_retrieval"]["exact_match,none"] >= 0.9


def test_rolling_likelihood_is_that_of_a_trained_model(results: dict[str, Any]) -> None:
    # Bytes at random have 8 bits, and those of the probe's tokens at random about 3.
    assert 0.5 < results["probe_text"]["bits_per_byte,none"] < 2
