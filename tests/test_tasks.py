"""Tasks of lm-eval as cells: what is kept of them, and bad input; test_measures.py runs the shipped tasks."""

from __future__ import annotations

import json
import math
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("lm_eval")

from vllm_polarquant.eval.cli import app
from vllm_polarquant.eval.measures import Outcome
from vllm_polarquant.eval.measures.tasks import lookup, measure
from vllm_polarquant.eval.measures.tasks.outcomes import RIGHT_CHOICE, collect
from vllm_polarquant.eval.measures.tasks.params import Params
from vllm_polarquant.eval.measures.tasks.summary import summarise
from vllm_polarquant.eval.probe.episodes import MODEL_DIR
from vllm_polarquant.eval.suites import load_suite, suite_names

CHOICE = f"{RIGHT_CHOICE},none"


def sample(doc: int, **metrics: Any) -> dict[str, Any]:
    row = {"doc_id": doc, "doc_hash": f"{doc:064d}", "filter": "none", "filtered_resps": ["x"], "target": "y"}
    return row | {"metrics": [*metrics], **metrics}


def test_outcomes_are_kept_by_document() -> None:
    choice = {"filtered_resps": [(-1.0, False), (-3.0, False)], "target": "1"}
    arrays = collect(
        {
            "a": [sample(1, acc=0.0) | choice, sample(0, acc=1.0) | choice | {"target": 0}],
            "b": [sample(0, word_perplexity=(-30.0, 10), inst_level=[True, False, True])],
            "c": [sample(0, **{"4096": -1, "8192": 0.5})],
        }
    )
    assert [name.split("/")[:2] for name in arrays["documents"]] == [
        ["a", "0"],
        ["a", "1"],
        ["b", "0"],
        ["c", "0"],
    ]
    assert arrays["acc,none"].tolist() == [[1, 1], [0, 1], [0, 0], [0, 0]]
    assert arrays["word_perplexity,none"][2].tolist() == [30, 10]
    assert arrays["inst_level,none"][2].tolist() == [2, 3]
    assert arrays["4096,none"][3].tolist() == [0, 0] and arrays["8192,none"][3].tolist() == [0.5, 1]
    right = [-math.log(1 + math.exp(-2)), -math.log(1 + math.exp(2))]
    assert arrays[CHOICE][:2, 0] == pytest.approx(right)


def test_a_summary_compares_the_same_documents_only() -> None:
    def run(right: list[int]) -> dict[str, np.ndarray]:
        return collect({"t": [sample(i, acc=float(r)) for i, r in enumerate(right)]})

    params = Params("t")
    results = {
        "all": {"t": {"acc,none": 0.5, "acc_stderr,none": 0.125}},
        "higher_is_better": {"t": {"acc": True}},
    }
    base, have = run([1] * 8), run([0] * 7 + [1])
    summary = summarise(params, have, results, Outcome({}, base))
    assert summary["metrics"]["acc,none"]["value"] == 0.125
    assert summary["metrics"]["acc,none"]["standard_error"] == 0.125
    found = summary["against_baseline"]["acc,none"]
    assert (found["changed"], found["difference"]) == (7, -0.875)
    assert found["verdict"].startswith("worse by ") and found["verdict"].endswith("(n = 8)")
    other = run([1] * 8)
    other["documents"][3] = "t/3/changed"
    with pytest.raises(RuntimeError, match="other documents"):
        summarise(params, have, results, Outcome({}, other))
    with pytest.raises(ValueError, match=r"no metric 'f1,none' by document; it has acc,none"):
        summarise(Params("t", metric="f1,none"), have, results, None)


@pytest.mark.slow
@pytest.mark.parametrize("suite", suite_names())
def test_tasks_and_metrics_of_shipped_suites_exist(suite: str) -> None:
    """In the installed lm-eval, and prompts are longer than a chunk."""
    for cell in load_suite(suite):
        if cell.measure is not measure.MEASURE:
            continue
        known = lookup.describe(cell.params.task)
        assert known["tasks"] >= 1 and known["lm_eval"]
        assert bool(known["hub"]) is not (suite == "local" or cell.params.task == "ruler")
        assert cell.params.chunk <= 512 and cell.engine["long_prefill_token_threshold"] == cell.params.chunk
        assert cell.engine["max_num_batched_tokens"] == cell.params.chunk * cell.params.requests


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"limit": 0}, "limit must be a positive number of documents, not 0"),
        ({"repeats": 4}, "repeats of greedy answers are alike"),
        ({"chunk": 0}, "must be positive"),
        ({"include": "/nowhere"}, "no folder /nowhere"),
        ({"data": {"test": "/nowhere.jsonl"}}, "no file /nowhere.jsonl"),
        ({"data": {"test": "/nowhere.txt"}}, "must all be of one kind of .jsonl"),
        ({"data": {"test": "/nowhere.jsonl", "train": "/nowhere.csv"}}, "must all be of one kind"),
    ],
)
def test_bad_parameters_are_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Params("gsm8k", **given)


def command(tmp_path: Path, cell: dict[str, Any], *arguments: str) -> Any:
    suite = tmp_path / "mine.json"
    suite.write_text(json.dumps({"cells": {"mine": {"measure": "lm_eval", **cell}}}))
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["probe", "--suite", str(suite), "--out", str(out), *arguments])
    assert result.exit_code == 2 and not out.exists()
    return result.stderr


@pytest.mark.slow
def test_the_command_names_unknown_tasks_and_wrong_limits(tmp_path: Path) -> None:
    assert "has no task 'gsm9k'" in command(tmp_path, {"task": "gsm9k"})
    wrong = command(tmp_path, {"task": "probe_text"}, "--limit", "-3")
    assert "'--limit'" in wrong and "greater than or equal to 1" in wrong


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test see files as they are now; others keep what took seconds to read."""
    for name in ("describe", "manager"):
        monkeypatch.setattr(lookup, name, cache(getattr(lookup, name).__wrapped__))


def test_the_command_says_how_to_install_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert "pip install 'lm-eval" in command(tmp_path, {"task": "probe_text"})


def test_results_are_named_by_the_task_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed file beside a user's task, or another limit, is another result."""

    def write(template: str) -> None:
        (tmp_path / "mine.yaml").write_text(
            f"task: mine\ndataset_path: json\noutput_type: generate_until\ndoc_to_text: '{template}'\n"
        )
        forget(monkeypatch)

    write("{{a}}")
    first = lookup.describe("mine", str(tmp_path))
    write("{{b}}")
    assert lookup.describe("mine", str(tmp_path))["config"] != first["config"]
    assert first["hub"] == []


@pytest.mark.slow
def test_files_take_the_place_of_a_data_set_on_the_hub(tmp_path: Path) -> None:
    """lm-eval's own task otherwise: its prompt, its answers, its metrics."""
    test, train = tmp_path / "test.jsonl", tmp_path / "train.jsonl"
    train.write_text(json.dumps({"question": "How many?", "answer": "Six.\n#### 6"}))

    def known(answer: str) -> tuple[Params, dict[str, Any]]:
        test.write_text(json.dumps({"question": "How old?", "answer": answer}))
        params = Params("gsm8k", num_fewshot=0, data={"test": str(test), "train": str(train)})
        return params, lookup.identify(params)

    _, before = known("Five.\n#### 5")
    params, after = known("Four.\n#### 4")
    assert before["data"] != after["data"] and after["hub"] == []
    assert after["config"] == lookup.describe("gsm8k")["config"]
    (task,) = lookup.objects(str(MODEL_DIR), params)
    (document,) = task.test_docs()
    assert task.doc_to_text(document) == "Question: How old?\nAnswer:"
    assert task.process_results(document, ["so #### 4"]) == {"exact_match": 1.0}
    assert next(iter(task.fewshot_docs()))["question"] == "How many?"
    with pytest.raises(ValueError, match="probe_retrieval_by_depth is several tasks"):
        lookup.identify(Params("probe_retrieval_by_depth", data={"test": str(test)}))
