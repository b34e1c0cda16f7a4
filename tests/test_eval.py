"""What is around the measures: divergence of lists, rows of text, suites, results on disk, the command."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from vllm_polarquant.eval import demo, files, isolate, results, run
from vllm_polarquant.eval import plan as plans
from vllm_polarquant.eval.cli import app
from vllm_polarquant.eval.measures import MEASURES, Outcome
from vllm_polarquant.eval.measures.greedy import same_until
from vllm_polarquant.eval.measures.next_token import block_error, divergence
from vllm_polarquant.eval.measures.retrieval import summarise
from vllm_polarquant.eval.measures.text import encode, read_text, token_rows
from vllm_polarquant.eval.probe.episodes import MODEL_DIR
from vllm_polarquant.eval.suites import SuiteError, load_suite, suite_names
from vllm_polarquant.eval.worker import reason

RNG = np.random.default_rng(0)


def scored(logits: np.ndarray, top: int) -> dict[str, np.ndarray]:
    """What `score` would return for distributions [R, P, V]."""
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argsort(-logprobs, -1)[..., :top]
    return {
        "actual": logprobs[..., 0].astype(np.float32),
        "ids": ids.astype(np.int32),
        "logprobs": np.take_along_axis(logprobs, ids, -1).astype(np.float32),
    }


@pytest.fixture
def distributions() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of a baseline and of another [2, 5, 300], and the exact KL [2, 5]."""
    base = RNG.normal(0, 3, (2, 5, 300))
    other = base + RNG.normal(0, 0.3, base.shape)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (base, other))
    return base, other, (p * np.log(p / q)).sum(-1)


def test_divergence_of_whole_distributions_is_exact(
    distributions: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    base, other, exact = distributions
    kl, rest = divergence(scored(base, 300), scored(other, 300))
    assert kl == pytest.approx(exact, rel=1e-3)
    assert rest.max() < 1e-6
    assert divergence(scored(base, 300), scored(base, 300))[0] == pytest.approx(np.zeros((2, 5)), abs=1e-6)


def test_divergence_of_lists_is_a_lower_bound_that_says_what_it_left_out(
    distributions: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    base, other, exact = distributions
    previous = np.zeros_like(exact)
    for top in (20, 60, 150):
        kl, rest = divergence(scored(base, top), scored(other, top))
        assert (kl <= exact + 1e-5).all() and kl.mean() > previous.mean()
        listed = scored(base, top)
        assert (rest >= 1 - np.exp(listed["logprobs"]).sum(-1) - 1e-5).all()
        previous = kl
    # Two outcomes: the token in both lists, and all others.
    kl, _ = divergence(
        {"actual": np.zeros((1, 1)), "ids": np.array([[[7]]]), "logprobs": np.log([[[0.8]]])},
        {"actual": np.zeros((1, 1)), "ids": np.array([[[7]]]), "logprobs": np.log([[[0.6]]])},
    )
    assert kl.item() == pytest.approx(0.8 * math.log(0.8 / 0.6) + 0.2 * math.log(0.2 / 0.4))
    # No token in both lists: one outcome, nothing known.
    kl, rest = divergence(
        {"actual": np.zeros((1, 1)), "ids": np.array([[[7]]]), "logprobs": np.log([[[0.8]]])},
        {"actual": np.zeros((1, 1)), "ids": np.array([[[8]]]), "logprobs": np.log([[[0.8]]])},
    )
    assert (kl.item(), rest.item()) == (0, 1)


def test_standard_error_is_over_blocks() -> None:
    """Tokens that repeat 64 times tell no more than one of them."""
    blocks = RNG.normal(size=(6, 4))
    values = np.repeat(blocks, 64, axis=1)
    assert block_error(values) == pytest.approx(blocks.std(ddof=1) / math.sqrt(24))
    assert math.isnan(block_error(values[:1, :64]))


def test_greedy_tokens_count_up_to_the_first_that_differs() -> None:
    want = np.array([[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    have = np.array([[1, 2, 3], [1, 9, 3], [9, 2, 3]])
    assert same_until(have, want).tolist() == [3, 1, 0]


def test_retrieval_is_counted_by_depth_and_pairs() -> None:
    items = [
        {"depth": 0.0, "pairs": 14, "right": True},
        {"depth": 0.39, "pairs": 20, "right": False},
        {"depth": 1.0, "pairs": 82, "right": True},
    ]
    summary = summarise(items)
    assert (summary["right"], summary["of"]) == (2, 3)
    assert [part["of"] for part in summary["by_depth"]] == [1, 1, 0, 0, 1]
    assert [part["of"] for part in summary["by_pairs"]] == [1, 1, 0, 0, 1]
    assert [(c["pairs"], c["right"]) for c in summary["by_both"]] == [
        ([0, 20], 1),
        ([20, 30], 0),
        ([60, None], 1),
    ]


@pytest.mark.parametrize(
    ("adds", "asked_for", "want"), [(True, True, [7, 97]), (False, True, [7, 97]), (False, False, [97])]
)
def test_a_bos_that_a_tokenizer_asks_for_stands_once(adds: bool, asked_for: bool, want: list[int]) -> None:
    tokenizer = SimpleNamespace(
        encode=lambda text: [*([7] if adds else []), *map(ord, text)], bos_token_id=7, add_bos_token=asked_for
    )
    assert encode(tokenizer, "a") == want


class Characters:
    """A token a character, and one before each prompt."""

    def encode(self, text: str) -> list[int]:
        return [1, *map(ord, text)]


def test_rows_start_at_lines_and_do_not_overlap(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i:04d}\n" for i in range(300)))
    rows = token_rows(Characters(), str(path), 3, 500)
    assert [len(row) for row in rows] == [500] * 3
    heads = ["".join(map(chr, row[1:10])) for row in rows]
    assert heads == ["line 0000", "line 0100", "line 0200"]
    with pytest.raises(ValueError, match="too short for 3 rows of 2000 tokens: one has only"):
        token_rows(Characters(), str(path), 3, 2000)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, "cannot be read"),
        ("rows.jsonl", '{"text": "a"}\n{"words": "b"}\n', "a field 'text'"),
        ("rows.jsonl", "[1]\n", "a field 'text'"),
    ],
)
def test_text_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: str | None, words: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=words):
        token_rows(Characters(), str(path), 1, 10)


def test_fields_of_json_lines_are_a_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"q": "a", "a": "b", "x": 1}\n\n{"q": "c", "a": "d"}\n')
    assert read_text(str(path), ["q", "a"]) == "a\nb\nc\nd"
    with pytest.raises(ValueError, match="a field 'q', 'x'"):
        read_text(str(path), ["q", "x"])


def test_one_cell_can_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    text = {"measure": "next_token", "rows": 4}
    path.write_text(json.dumps({"cells": {"a": text, "b.1": text}}))
    changes = {"rows": 3, "top": 5, "limit": 7, "a.rows": 2, "b.1.fields": ["q"]}
    first, second = load_suite(str(path), changes=changes)
    assert (first.params.rows, first.params.top, first.params.fields) == (2, 5, ("text",))
    assert (second.params.rows, second.params.top, second.params.fields) == (3, 5, ("q",))
    with pytest.raises(SuiteError, match=r"^c\.rows: mine\.json has no cell 'c'; it has a, b\.1$"):
        load_suite(str(path), changes={"c.rows": 1})
    with pytest.raises(SuiteError, match=r"cell 'a': next_token has no parameter 'limit'"):
        load_suite(str(path), changes={"a.limit": 1})


def test_settings_are_json_or_text(tmp_path: Path) -> None:
    found = run._settings(["text.rows=4", "text.text=a=b.txt", 'a.b.fields=["q"]'])
    assert found == {"text.rows": 4, "text.text": "a=b.txt", "a.b.fields": ["q"]}
    for wrong in ("rows=4", "text.rows", ".rows=4", "text.=4"):
        result = CliRunner().invoke(app, ["probe", "--set", wrong, "--out", str(tmp_path / "out")])
        assert result.exit_code == 2 and "CELL.PARAMETER=VALUE" in result.stderr


def test_results_are_named_by_their_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    names = []
    for content in ("one", "two"):
        path.write_text(content)
        (cell,) = load_suite("text", changes={"text.text": str(path)}, only=["text"])
        names.append(results.stem(results.cell_key(str(MODEL_DIR), "auto", cell, 0, "")))
    assert len(set(names)) == 2


@pytest.mark.parametrize("name", suite_names())
def test_shipped_suites_load(name: str) -> None:
    cells = load_suite(name, {"seed": 3})
    assert {cell.measure.name for cell in cells} <= set(MEASURES)
    assert all(cell.engine["seed"] == 3 for cell in cells)


def test_text_is_scored_a_token_a_step() -> None:
    """A step of the batch is one token of each row: what a prefill attends to was all stored before."""
    (cell,) = [cell for cell in load_suite("local") if cell.measure.name == "next_token"]
    assert cell.engine["long_prefill_token_threshold"] == 1
    assert cell.engine["max_num_batched_tokens"] == cell.engine["max_num_seqs"] == cell.params.rows


@pytest.mark.parametrize(
    ("suite", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "must be like"),
        ('{"cells": {"a": 3}}', "must be like"),
        ('{"cells": {}}', "has no cells"),
        ('{"cells": {"a": {"measure": "gsm8k"}}}', "cell 'a': 'measure' must be one of next_token"),
        ('{"cells": {"a": {"measure": "next_token", "row": 2}}}', "no parameter 'row'; it has rows"),
        ('{"cells": {"a": {"measure": "next_token", "context": 8}}}', "context more than 64"),
        ('{"cells": {"a": {"measure": "retrieval", "lengths": ["9"]}}}', "lengths must be some of"),
    ],
)
def test_suites_that_are_wrong_say_where(tmp_path: Path, suite: str, words: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(suite)
    with pytest.raises(SuiteError, match=r"mine\.json") as raised:
        load_suite(str(path))
    assert words in str(raised.value)


@pytest.fixture
def plan(tmp_path: Path) -> plans.Plan:
    dtypes = ["auto", "polarquant_k4v4"]
    return plans.Plan(str(MODEL_DIR), dtypes, "text", load_suite("text"), {}, 0, tmp_path / "out")


def store(plan: plans.Plan, dtype: str, name: str, summary: dict[str, Any]) -> Path:
    (cell,) = [cell for cell in plan.cells if cell.name == name]
    key = plan.key(dtype, cell)
    results.write(plan.folder, key, Outcome(summary, {"x": np.arange(3)}), 1.0)
    return plan.folder / f"{results.stem(key)}.json"


def test_results_are_kept_whole_or_not_at_all(plan: plans.Plan) -> None:
    assert [cell.name for cell in plan.missing("auto")] == ["text", "retrieval", "greedy"]
    path = store(plan, "auto", "text", {"perplexity": 2.0})
    assert [cell.name for cell in plan.missing("auto")] == ["retrieval", "greedy"]
    assert results.outcome(plan.folder, path.stem).arrays["x"].tolist() == [0, 1, 2]
    assert not [p for p in plan.folder.iterdir() if ".part" in p.name]
    whole = path.read_text()
    for damaged in (whole[: len(whole) // 2], "", "[]", '{"key": {}}'):
        path.write_text(damaged)
        assert [cell.name for cell in plan.missing("auto")] == ["text", "retrieval", "greedy"]
    path.write_text(whole)
    path.with_suffix(".npz").write_bytes(b"PK")
    with pytest.raises(FileNotFoundError, match="damaged"):
        results.outcome(plan.folder, path.stem)


def test_a_result_is_only_that_of_its_own_conditions(
    plan: plans.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model, dtype, parameters, engine, seed and versions are all in its name; folders above it are not."""
    cell = plan.cells[0]
    name = results.stem(plan.key("polarquant_k4v4", cell))
    others = {
        results.stem(plan.key("polarquant_k3v3", cell)),
        results.stem(replace(plan, seed=1).key("polarquant_k4v4", cell)),
        results.stem(replace(plan, model="org/other").key("polarquant_k4v4", cell)),
        results.stem(plan.key("polarquant_k4v4", replace(cell, engine={"dtype": "bfloat16"}))),
        results.stem(plan.key("polarquant_k4v4", replace(cell, params=replace(cell.params, rows=9)))),
    }
    monkeypatch.setattr(results, "FORMAT_VERSION", 99)
    others.add(results.stem(plan.key("polarquant_k4v4", cell)))
    assert len(others | {name}) == 7


NOISY_CHILD = """
import subprocess, sys, time
from vllm_polarquant.eval import isolate

def work(job, report):
    print("not a report")
    report({"got": job})
    held = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    report({"pid": held.pid})
    if job == "die":
        sys.exit(7)
    time.sleep(600)

isolate.serve(work)
"""


def ended(pid: int) -> bool:
    """Whether a process is gone, or waits for somebody to take note of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("job", ["die", {"wait": 1}])
def test_a_child_reports_and_ends_with_all_that_it_started(job: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with isolate.Child([sys.executable, "-c", NOISY_CHILD], job, log=log) as child:
        assert child.report(60) == {"got": job}
        held = child.report(60)["pid"]
        assert not ended(held)
        if job == "die":
            with pytest.raises(isolate.Ended) as last:
                child.report(60)
            assert last.value.status == child.status == 7
        else:
            with pytest.raises(TimeoutError, match="no report in 0 s"):
                child.report(0.1)
            assert child.status is None
    deadline = time.monotonic() + 10
    while not ended(held) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ended(held)
    assert "not a report" in log.read_text()


def test_the_demo_counts_the_positions_where_the_likeliest_token_is_the_same() -> None:
    def run(likeliest: list[list[int]]) -> demo.Run:
        return demo.Run("x", 1, 1.0, 1.0, np.array(likeliest), [])

    assert run([[1, 2], [3, 4]]).agreement(run([[1, 2], [3, 5]])) == 0.75


def test_the_demo_asks_about_whole_episodes_and_completes_signatures() -> None:
    asked = demo.questions(60)
    assert len(asked) == 60
    contexts = [prompt.rsplit("assert table", 1)[0] for prompt, _, _ in asked]
    assert [len(set(contexts[i : i + 5])) for i in range(0, 60, 5)] == [1] * 12
    for prompt in demo.completion_prompts():
        assert prompt.endswith(":") and prompt.rsplit("\n", 1)[1].lstrip().startswith("def ")
        assert len(prompt) <= demo.COMPLETION_CHARS


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "./nowhere"], "no folder ./nowhere"),
        (["--model", ""], "no folder ''"),
        (["--model", __file__], "no folder"),
        (["--model", str(Path(__file__).parent)], "config.json does not exist"),
        (["--text", "nowhere.txt"], "cannot be read"),
        (["--dtypes", " ,"], "no --dtypes"),
        (["--dtypes", "auto,polarquant_k4v5"], "did you mean polarquant_k4v4?"),
        (["--picture", "nowhere/x.png"], "cannot write a picture to nowhere/x.png"),
        (["--picture", "/"], "cannot write a picture to /"),
    ],
)
def test_the_demo_names_bad_input(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(demo.main)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and words in result.stderr
    assert result.stderr.count("\n") == 1


FAKE_WORKER = """
import json, os, sys
job = json.load(sys.stdin)
def report(**event):
    print(json.dumps(event), flush=True)
report(event="boot", cells=[])
names = [key["cell"] for key in job["keys"]]
for i, name in enumerate(names):
    report(event="start", cell=name)
    if i == 1:
        report(event="failed", cell=name, reason="ValueError: no such thing")
    elif i == 2:
        os._exit(7)
    else:
        report(event="done", cell=name)
"""


def test_cells_that_fail_or_die_are_reported_and_block_only_what_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "WORKER", [sys.executable, "-c", FAKE_WORKER])
    result = CliRunner().invoke(app, ["probe", "--suite", "text", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
    assert lines[0].startswith("failed: auto, retrieval: ValueError: no such thing (log: ")
    assert lines[1].startswith("failed: auto, greedy: the worker process ended with exit status 7")
    # The fake says that it finished `text` but stores nothing.
    assert [line.split(": ", 2)[1] for line in lines[2:]] == [
        f"polarquant_k4v4, {name}" for name in ("text", "retrieval", "greedy")
    ]
    assert "there is no result of auto to compare with" in lines[2]


def test_an_error_without_words_says_where_it_was_raised(tmp_path: Path) -> None:
    source = tmp_path / "layers" / "attention.py"
    source.parent.mkdir()
    source.write_text("x = 1\nassert x > 2\n")
    with pytest.raises(AssertionError) as wordless:
        exec(compile(source.read_text(), str(source), "exec"))
    place = f"{tmp_path.name}/layers/attention.py"
    assert reason(wordless.value) == f"AssertionError: {place}, line 2: assert x > 2"
    assert reason(ValueError("no\n such thing")) == "ValueError: no such thing"


def test_finished_cells_are_not_run_again(plan: plans.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def summary(name: str) -> dict[str, Any]:
        if name == "text":
            return {"perplexity": 2.0, "by_position": [{"from": 0, "to": 64, "perplexity": 2.0}]}
        return summarise([{"depth": 0.1, "pairs": 3, "right": True}]) if name == "retrieval" else {}

    for cell in plan.cells:
        store(plan, "auto", cell.name, summary(cell.name))
    monkeypatch.setattr(plans, "WORKER", ["must-not-be-started"])
    command = ["probe", "--suite", "text", "--kv-cache-dtypes", "auto", "--out", str(plan.folder)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    row = next(line for line in result.stdout.splitlines() if line.startswith("| auto"))
    assert [cell.strip() for cell in row.split("|")[1:4]] == ["auto", "2.000", "1/1"]


def test_only_the_cells_that_were_asked_for_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(
        run, "run_dtype", lambda plan, dtype, todo, *_: asked.append([c.name for c in todo]) or {}
    )
    CliRunner().invoke(app, ["probe", "--only", "greedy, text", "--out", str(tmp_path)])
    assert asked == [["text", "greedy"]]


def test_a_run_that_is_cut_short_leaves_what_it_lacks(
    plan: plans.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(plan: plans.Plan, dtype: str, *_: Any) -> dict[str, str]:
        if dtype != "auto":
            raise KeyboardInterrupt
        store(plan, dtype, "text", {})
        return {}

    monkeypatch.setattr(run, "run_dtype", stop)
    command = ["probe", "--only", "text", "--kv-cache-dtypes", "polarquant_k4v4", "--out", str(plan.folder)]
    assert CliRunner().invoke(app, command).exit_code != 0
    left = json.loads((plan.folder / "run.json").read_text())["failed"]
    assert {"dtype": "polarquant_k4v4", "cell": "text", "reason": run.CUT_SHORT} in left


def test_dtypes_are_spread_over_gpus_after_the_baseline(
    plan: plans.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[str, str]] = []
    both = threading.Barrier(2)

    def record(
        plan: plans.Plan, dtype: str, cells: Any, progress: Any, task: Any, gpus: str
    ) -> dict[str, str]:
        if dtype != "auto":
            # Ends only if two run at a time.
            both.wait(timeout=60)
        started.append((dtype, gpus))
        for cell in cells:
            store(plan, dtype, cell.name, {})
        return {}

    monkeypatch.setattr(run, "run_dtype", record)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    names = ["polarquant_k4v4", "polarquant_k3v3", "polarquant_k2v2", "fp8"]
    command = ["probe", "--suite", "text", "--kv-cache-dtypes", ",".join(names), "--gpus", "0+1,2+3"]
    CliRunner().invoke(app, [*command, "--out", str(plan.folder)])
    assert started[0][0] == "auto"
    assert sorted(dtype for dtype, _ in started[1:]) == sorted(names)
    assert {gpus for _, gpus in started[1:3]} == {gpus for _, gpus in started[3:]} == {"0,1", "2,3"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["probe", "--gpus", "0,64"], "NVIDIA GPUs, the first named 0"),
        (
            ["probe", "--suite", "gsm9k"],
            "no suite 'gsm9k'; shipped are local, long, quick, real, reasoning, standard",
        ),
        (["./nowhere"], "no folder ./nowhere"),
        (["probe", "--only", "text,texts"], "local.json has no cell 'texts'; it has text, retrieval, greedy"),
        (["probe", "--engine", "{"], "is not JSON"),
        (["probe", "--engine", "3"], "is not a JSON object"),
        (["probe", "--kv-cache-dtypes", ""], "names no dtype"),
        (["probe", "--kv-cache-dtypes", "auto,polarquant_k4v5"], "did you mean polarquant_k4v4?"),
        (["probe", "--kv-cache-dtypes", "polarquant_k4v4@every-layer"], "no --kv-cache-dtype"),
        (["probe", "--limit", "-1"], "--limit"),
        (["probe", "--limit", "0"], "--limit"),
        (["probe", "--seed", "-1"], "--seed"),
        (["probe", "--gpus", "-1"], "name GPUs as in"),
        (["hard-keys", "--edits", ""], "--edits '' names none"),
        (["hard-keys", "--kv-cache-dtypes", ""], "--kv-cache-dtypes '' names none"),
        (["hard-keys", "--kv-cache-dtypes", "polarquant"], "no --kv-cache-dtype"),
        (["hard-keys", "--rows", "-1"], "--rows"),
        (["hard-keys", "--episodes", "-1"], "--episodes"),
        (["hard-keys", "--layers", "9"], "layers 0 to 4"),
    ],
)
def test_command_names_bad_input(arguments: list[str], words: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert words in result.stderr
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("command", [["probe"], ["hard-keys", "--edits", "bias"]])
def test_two_runs_do_not_write_into_one_folder(command: list[str], tmp_path: Path) -> None:
    with files.locked(tmp_path / "out"):
        result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "another run writes into it" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == [files.LOCK]


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    result = CliRunner().invoke(app, ["probe", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "--out" in result.stderr


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.md"
    files.write_text(path, "one")

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        files.write_text(path, "two")
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


# A run whose worker starts a process of its own and then says nothing more.
STUCK_RUN = """
import sys
from vllm_polarquant.eval import plan
from vllm_polarquant.eval.cli import app
worker = '''
import subprocess, time
sleeper = subprocess.Popen(["sleep", "600"])
open(PIDS, "w").write(str(sleeper.pid))
time.sleep(600)
'''
plan.WORKER[:] = [sys.executable, "-c", worker.replace("PIDS", repr(sys.argv[1]))]
app(["probe", "--only", "greedy", "--out", sys.argv[2]])
"""


def test_sigterm_ends_a_run_with_its_workers_and_leaves_whole_files(tmp_path: Path) -> None:
    pids, out = tmp_path / "pids", tmp_path / "out"
    run_ = subprocess.Popen(
        [sys.executable, "-c", STUCK_RUN, str(pids), str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for _ in range(1200):
            if pids.exists() and pids.read_text():
                break
            assert run_.poll() is None
            time.sleep(0.1)
        run_.send_signal(signal.SIGTERM)
        _, said = run_.communicate(timeout=60)
    finally:
        run_.kill()
    assert run_.returncode == 128 + signal.SIGTERM
    assert "polarquant-eval: ended by SIGTERM" in said and "Traceback" not in said
    for _ in range(100):
        try:
            os.kill(int(pids.read_text()), 0)
        except ProcessLookupError:
            break
        # Its parent has gone, and whoever takes orphans on reaps it.
        if Path(f"/proc/{pids.read_text()}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the worker's process lives on")
    left = json.loads((out / "run.json").read_text())["failed"]
    assert {"dtype": "auto", "cell": "greedy", "reason": run.CUT_SHORT} in left
    assert not [path for path in out.rglob("*") if ".part" in path.name]


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "has no config.json" in result.stderr


def test_help_names_both_forms() -> None:
    text = CliRunner().invoke(app, ["--help"]).stdout
    assert "run" in text and "distortion" in text
    shown: Callable[[str], str] = lambda command: CliRunner().invoke(app, [command, "--help"]).stdout  # noqa: E731
    assert "--kv-cache-dtypes" in shown("run") and "--head-dims" in shown("distortion")
    assert suite_names() == [
        "local",
        "long",
        "quick",
        "real",
        "reasoning",
        "standard",
        "text",
    ]
