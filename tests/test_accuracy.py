"""The report: tables, verdicts and plots from result files that are written by hand, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_polarquant.check import Shape
from vllm_polarquant.eval import dtypes, results
from vllm_polarquant.eval.accuracy.collect import ReportError, collect, note_run
from vllm_polarquant.eval.cli import app
from vllm_polarquant.eval.measures import Outcome
from vllm_polarquant.eval.measures.retrieval import summarise
from vllm_polarquant.eval.plan import Plan
from vllm_polarquant.eval.probe.episodes import MODEL_DIR
from vllm_polarquant.eval.suites import load_suite
from vllm_polarquant.format import PRESETS

PEER = "int4_per_token_head"
KL = {"auto": None, "fp8": 0.004, PEER: 0.04, "polarquant_k4v4": 0.03, "polarquant_k2v2": 0.5}
RIGHT = {"auto": 6, "fp8": 6, PEER: 6, "polarquant_k4v4": 6, "polarquant_k2v2": 4}
# Of the probe, 5 layers x 2 kv heads x 128. In vLLM's pages an element of the key and one of the value take
# 4, 2 and 1 byte, the last with two float32 scales a slot; ours their names' bits and two float16 radii.
BYTES = {"auto": 5120, "fp8": 2560, PEER: 1360, "polarquant_k4v4": 1320, "polarquant_k2v2": 680}


def text(kl: float | None) -> dict[str, Any]:
    edges = ((0, 64), (64, 511))
    parts: list[dict[str, Any]] = [{"from": low, "to": high, "perplexity": 8.0} for low, high in edges]
    summary: dict[str, Any] = {"tokens": 4088, "perplexity": 8.0, "by_position": parts}
    if kl is None:
        return summary
    for part in parts:
        part |= {"kl": kl, "top1_agreement": 0.9}
    return summary | {
        "perplexity": 8 + kl,
        "kl": kl,
        "kl_standard_error": kl / 20,
        "top1_agreement": 0.9,
        "nll_difference": kl / 8,
        "nll_difference_standard_error": 0.001,
    }


def retrieval(right: int) -> dict[str, Any]:
    items = [{"depth": i / 6, "pairs": 15 + 10 * i, "right": i < right} for i in range(6)]
    return summarise(items)


def fill(folder: Path, **changes: Any) -> Plan:
    """Results of every dtype in KL; changes are of the plan."""
    about = {"seed": 0, "cells": [c for c in load_suite("text") if c.name in ("text", "retrieval")]} | changes
    made = Plan(str(MODEL_DIR), list(KL), "text", about["cells"], {}, about["seed"], folder)
    for dtype in made.dtypes:
        for cell in made.cells:
            summary = text(KL[dtype]) if cell.name == "text" else retrieval(RIGHT[dtype])
            results.write(folder, made.key(dtype, cell), Outcome(summary), 1.0)
    return made


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments), "--vectors", "0"])


def table(page: str, title: str) -> dict[str, dict[str, str]]:
    """Rows of the table under a title, by their first cell without its marks."""
    (part,) = [part for part in page.split("\n## ") if part.startswith(f"{title}\n")]
    lines = [[c.strip() for c in line.split(" | ")] for line in part.splitlines() if line.startswith("| ")]
    header, _, *rows = [[cell.strip("| ") for cell in line] for line in lines]
    return {row[0].strip("*`"): dict(zip(header, row, strict=True)) for row in rows}


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    fill(tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture
def page(filled: Path, tmp_path: Path) -> str:
    (tmp_path / "docs").mkdir()
    result = invoke(filled, "--out", tmp_path / "docs" / "accuracy")
    assert result.exit_code == 0, result.stderr
    return (tmp_path / "docs" / "accuracy.md").read_text()


def test_the_table_holds_every_number(page: str) -> None:
    rows = table(page, "Every dtype")
    assert list(rows) == list(BYTES)
    for dtype, row in rows.items():
        assert row["bytes a token"] == f"{BYTES[dtype]:,}"
        assert float(row["bits/element"]) == pytest.approx(BYTES[dtype] * 8 / (5 * 2 * 2 * 128), abs=5e-4)
        assert row["retrieval"] == f"{RIGHT[dtype]}/6"
    assert rows["auto"]["KL, nats"] == "-" and rows["auto"]["perplexity"] == "8.000"
    # 1.96 standard errors.
    assert rows["polarquant_k4v4"]["KL, nats"] == "0.0300 ± 0.0029"
    assert rows["polarquant_k2v2"]["NLL difference"] == "+0.0625 ± 0.0020"
    assert table(page, "text: KL by tokens of context")[PEER]["64-510"] == "0.0400"


def test_the_verdicts_follow_from_the_numbers(page: str) -> None:
    (said,) = [part for part in page.split("\n## ") if part.startswith("In short")]
    first = next(line for line in said.splitlines() if line.startswith("* "))
    # .03 of .04, each known to 5 %: exp(1.96 x sqrt(2) x .05) = 1.149.
    assert first == (
        f"* `polarquant_k4v4` (1,320 bytes a token): KL 0.0300, 0.75x (0.65-0.86) the 0.0400 of `{PEER}` "
        "(1,360 bytes): less."
    )
    assert (
        "`polarquant_k2v2` (680 bytes a token): KL 0.5000; no other dtype is within 10 % of its size; "
        in said
    )
    assert f"the smallest other one that loses no more is `{PEER}` (1,360 bytes)" in said
    assert f"beaten in both: `{PEER}`." in said
    assert "does not differ from auto's by more than its 95 % interval: `fp8`" in said
    assert "Retrieval: auto answers 6 of 6, and `polarquant_k4v4` is the smallest to do so; " in said
    assert "answers lost: `polarquant_k2v2` 2." in said


def test_plots_are_small_and_a_page_is_made_again_from_its_json_alone(
    page: str, filled: Path, tmp_path: Path
) -> None:
    docs = tmp_path / "docs"
    shown = re.findall(r"!\[\w+\]\((.*?)\)", page)
    assert shown == [f"accuracy-{kind}.png" for kind in ("bytes", "position", "retrieval")]
    for name in shown:
        data = (docs / name).read_bytes()
        assert data.startswith(b"\x89PNG") and 5_000 < len(data) < 150_000
    before = {path.name: path.read_bytes() for path in docs.iterdir()}
    assert set(before) == {"accuracy.json", "accuracy.md", *shown}
    kept = tmp_path / "kept.json"
    kept.write_bytes(before["accuracy.json"])
    for path in docs.iterdir():
        path.unlink()
    shutil.rmtree(filled)
    result = invoke("--render", kept, "--out", docs / "accuracy")
    assert result.exit_code == 0, result.stderr
    assert {path.name: path.read_bytes() for path in docs.iterdir()} == before


def test_other_models_versions_and_suites_are_set_aside_and_said(filled: Path, tmp_path: Path) -> None:
    fill(filled, seed=1, cells=load_suite("text")[:1])
    (cell,) = [cell for cell in load_suite("text") if cell.name == "retrieval"]
    fill(filled, cells=[replace(cell, params=replace(cell.params, episodes=3))])
    found = collect(filled)
    assert found["environment"]["seed"] == 0
    assert found["cells"]["retrieval"]["params"]["episodes"] == 3
    assert [note.split(" of ")[0] for note in found["notes"]] == [
        "Set aside: 5 results",
        "Set aside: 5 older results",
    ]
    assert "seed 1" in found["notes"][0]
    with pytest.raises(ReportError, match=r"no results of model 'other'; there are some of probe/model"):
        collect(filled, "other")


def test_what_failed_or_is_damaged_is_named_and_the_rest_is_shown(filled: Path, tmp_path: Path) -> None:
    gone = next(filled.glob(f"text--{PEER}--*.json"))
    gone.write_text(gone.read_text()[:100])
    note_run(filled, {"nvfp4": "no attention backend"}, {("turboquant_3bit_nc", "text"): "it broke"})
    result = invoke(filled, "--out", tmp_path / "accuracy")
    # The page is there, and lacks what the damaged file had.
    assert result.exit_code == 1
    page = (tmp_path / "accuracy.md").read_text()
    left = table(page, "Not in the tables")
    assert left["turboquant_3bit_nc, text"]["why"] == "it broke"
    assert left["nvfp4"]["why"] == "no attention backend"
    assert left[gone.name]["why"].startswith("damaged")
    assert table(page, "Every dtype")[PEER]["KL, nats"] == "-"
    assert f"not in the tables: {gone.name}: damaged" in result.stderr


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "no folder"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "no results in"),
        (lambda folder: [path.write_text("{") for path in folder.iterdir()], "is damaged: delete it"),
        (
            lambda folder: [path.unlink() for path in folder.glob("*--auto--*")],
            "no results of auto, the baseline",
        ),
    ],
)
def test_bad_input_is_named(filled: Path, tmp_path: Path, spoil: Any, words: str) -> None:
    spoil(filled)
    result = invoke(filled, "--out", tmp_path / "accuracy")
    assert result.exit_code == 2 and words in result.stderr
    assert not list(tmp_path.glob("accuracy*"))


def damage(folder: Path, pattern: str, **changes: Any) -> Path:
    """A result whose fields are others' now, or that ends in the middle if there are none."""
    path = next(iter(sorted(folder.glob(pattern))))
    whole = path.read_text()
    path.write_text(json.dumps(json.loads(whole) | changes) if changes else whole[:100])
    return path


@pytest.mark.parametrize(
    "changes",
    [{}, {"key": []}, {"key": {"model": 3}}, {"summary": {"perplexity": "eight"}}, {"summary": {"kl": None}}],
    ids=str,
)
def test_a_damaged_result_is_left_out_and_said(filled: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    path = damage(filled, "text--fp8--*.json", **changes)
    result = invoke(filled, "--out", tmp_path / "accuracy")
    assert result.exit_code == 1, result.exception
    assert f"not in the tables: {path.name}: damaged" in result.stderr


def test_a_damaged_baseline_is_named(filled: Path, tmp_path: Path) -> None:
    gone = [damage(filled, "text--auto--*.json"), damage(filled, "retrieval--auto--*.json")]
    result = invoke(filled, "--out", tmp_path / "accuracy")
    assert result.exit_code == 2 and "no results of auto, the baseline" in result.stderr
    for path in gone:
        assert f"{path.name} is damaged: delete it" in result.stderr


@pytest.mark.parametrize("text", ["", "{", "[]", '{"failed": [{"dtype": "fp8"}]}', '{"left_out": 3}'])
def test_a_half_written_note_of_the_run_is_said(filled: Path, tmp_path: Path, text: str) -> None:
    (filled / "run.json").write_text(text)
    result = invoke(filled, "--out", tmp_path / "accuracy")
    assert result.exit_code == 1, result.exception
    assert "not in the tables: run.json: damaged" in result.stderr


def test_a_report_goes_only_where_there_is_a_folder(filled: Path, tmp_path: Path) -> None:
    result = invoke(filled, "--out", tmp_path / "no" / "dir" / "x")
    assert result.exit_code == 2 and "there is no folder" in result.stderr
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "changes", [{"cells": 3}, {"shape": []}, {"dtypes": 4}, {"cells": {"a": 3}}, {"missing": [1]}], ids=str
)
def test_a_report_of_wrong_types_is_not_drawn_again(
    filled: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert invoke(filled, "--out", tmp_path / "accuracy").exit_code == 0
    spoilt = tmp_path / "spoilt.json"
    spoilt.write_text(json.dumps(json.loads((tmp_path / "accuracy.json").read_text()) | changes))
    result = invoke("--render", spoilt, "--out", tmp_path / "again")
    assert result.exit_code == 2, result.exception
    assert str(spoilt) in result.stderr and len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("again*"))


def test_a_model_without_a_config_and_a_bad_json_are_named(filled: Path, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    result = invoke(filled, "--out", tmp_path / "accuracy", "--config", tmp_path / "config")
    assert result.exit_code == 2 and "config.json does not exist" in result.stderr
    for content, words in (("{", "Expecting"), ("{}", "is not what polarquant-eval report writes")):
        (tmp_path / "old.json").write_text(content)
        result = invoke("--render", tmp_path / "old.json", "--out", tmp_path / "accuracy")
        assert result.exit_code == 2 and words in result.stderr
    assert json.loads((MODEL_DIR / "config.json").read_text())["num_hidden_layers"] == 5


@pytest.mark.parametrize(
    ("name", "slots"),
    [
        ("turboquant_4bit_nc", 28 * 134 + 4 * 512),
        ("turboquant_3bit_nc", 28 * 102 + 4 * 512),
        ("turboquant_4bit_nc@every-layer", 32 * 134),
        ("fp8_per_token_head", 32 * 264),
        ("polarquant_k4v4", 32 * 132),
    ],
)
def test_bytes_of_llama_are_those_that_vllm_lays_out(name: str, slots: int) -> None:
    """TurboQuant: codes and a norm, codes, scale and zero point, and 16 bits in four layers."""
    assert dtypes.token_bytes(name, Shape(32, 8, 128, None, 32)) == 8 * slots
    if name in PRESETS:
        assert dtypes.token_bytes(name, Shape(32, 8, 128, None, 32), skipped=2) == 8 * (30 * 132 + 2 * 512)


def test_boundary_layers_are_vllms() -> None:
    from types import SimpleNamespace

    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

    for layers in (1, 3, 5, 32):
        model = SimpleNamespace(is_hybrid=False, hf_text_config=SimpleNamespace(num_hidden_layers=layers))
        skipped = TurboQuantConfig.get_boundary_skip_layers(model)
        assert dtypes.native_layers("turboquant_4bit_nc", Shape(layers, 8, 128, None, 32)) == len(skipped)


@pytest.mark.slow
def test_all_runs_every_preset_and_says_why_others_do_not() -> None:
    names, left_out = dtypes.ask_runnable(128)
    assert names[0] == "auto" and names[-len(PRESETS) :] == list(PRESETS)
    assert {*names, *left_out} >= {*dtypes.vllm_names(), *PRESETS}
    assert not set(names) & set(left_out) and all(left_out.values())
    assert left_out["bfloat16"] == "the same as auto"
