"""Hard keys: the edits against the plain reference, what `check` says of them, what skipping saves."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_runs
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from vllm_polarquant import cli
from vllm_polarquant.check import read_config, read_shape
from vllm_polarquant.codec import decode, encode
from vllm_polarquant.eval import plan as plans
from vllm_polarquant.eval import results
from vllm_polarquant.eval.cli import app
from vllm_polarquant.eval.hard_keys.cases import Case, SkipPlan, skip_plan
from vllm_polarquant.eval.hard_keys.checkpoint import EditError
from vllm_polarquant.eval.hard_keys.command import PROBE_ENGINE, dtypes_of, write_suite
from vllm_polarquant.eval.hard_keys.edits import EDITS, write_edit
from vllm_polarquant.eval.hard_keys.table import rows
from vllm_polarquant.eval.measures import Outcome
from vllm_polarquant.eval.measures.text import HELDOUT, token_rows
from vllm_polarquant.eval.probe.episodes import MODEL_DIR
from vllm_polarquant.eval.probe.forward import forward
from vllm_polarquant.eval.suites import load_suite
from vllm_polarquant.format import PRESETS, VectorFormat
from vllm_polarquant.keys import MAX_BITS_LOST, KeyReport, judge_keys

LAYERS, KV_HEADS, GROUP, HEAD_DIM = 5, 2, 2, 128
HALF = HEAD_DIM // 2
EDITED = [1, 3]

runner = CliRunner()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The probe and its edits at their own strengths."""
    out = tmp_path_factory.mktemp("models")
    edited = {name: write_edit(MODEL_DIR, name, EDITS[name].strength, EDITED, 0, out) for name in EDITS}
    return {"none": MODEL_DIR} | edited


@pytest.fixture(scope="module")
def text() -> list[int]:
    return token_rows(AutoTokenizer.from_pretrained(str(MODEL_DIR)), HELDOUT, 3, 300)[1]


@pytest.fixture(scope="module")
def forwards(models: dict[str, Path], text: list[int]) -> dict[str, tuple[torch.Tensor, list[torch.Tensor]]]:
    """Log-probabilities and keys by edit, computed by the reference in float32."""
    return {name: forward(text, model=path) for name, path in models.items()}


def judge(folder: Path) -> KeyReport:
    config = read_config(folder)
    return judge_keys(folder, config, read_shape(config))


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(("name", "bound"), [("uneven", 1e-7), ("bias", 5e-4), ("first-token", 5e-3)])
def test_edits_keep_the_function(name: str, bound: float, forwards: dict[str, Any]) -> None:
    """k4v4 alone is a KL of .03."""
    assert kl(forwards["none"][0], forwards[name][0]) < bound


def test_uneven_scales_whole_rope_pairs(forwards: dict[str, Any]) -> None:
    for layer in range(LAYERS):
        before, after = forwards["none"][1][layer], forwards["uneven"][1][layer]
        factor = (after.square().sum(0) / before.square().sum(0)).sqrt()
        if layer not in EDITED:
            torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
            continue
        torch.testing.assert_close(factor[:, :HALF], factor[:, HALF:], rtol=1e-3, atol=0)
        for head in factor[:, :HALF]:
            scaled = head[(head - 1).abs() > 1e-3]
            assert len(scaled) == 4
            assert 30 ** (2 / 3) * 0.999 < scaled.min() <= scaled.max() < 30 * 1.001


def test_bias_adds_as_much_to_every_key(forwards: dict[str, Any]) -> None:
    for layer in range(LAYERS):
        added = forwards["bias"][1][layer] - forwards["none"][1][layer]
        length = added.flatten(1).norm(dim=1)
        # Beside it the little that the change of earlier layers does, where they are edited.
        want = 600.0 if layer in EDITED else 0.0
        torch.testing.assert_close(length, torch.full_like(length, want), rtol=2e-3, atol=0.5)


def test_first_key_alone_is_long(forwards: dict[str, Any]) -> None:
    for layer in range(LAYERS):
        before, after = (forwards[name][1][layer].norm(dim=-1) for name in ("none", "first-token"))
        ratio = after[0] / after[1:].median(0).values
        if layer in EDITED:
            assert (ratio > 15).all() and (after[1:].median(0).values < 2 * before[1:].median(0).values).all()
            lengths = after[0] / before[1:].median(0).values
            torch.testing.assert_close(lengths, torch.full((KV_HEADS,), 30.0), rtol=0.2, atol=0)
        else:
            assert (ratio < 1.5).all()


def test_an_edit_is_made_once_and_named_by_all_that_it_depends_on(tmp_path: Path) -> None:
    folder = write_edit(MODEL_DIR, "uneven", 10, [2], 0, tmp_path)
    weights = folder / "model.safetensors"
    first, tensors = weights.stat().st_mtime_ns, load_file(str(weights))
    assert write_edit(MODEL_DIR, "uneven", 10, [2], 0, tmp_path) == folder
    assert weights.stat().st_mtime_ns == first
    others = {write_edit(MODEL_DIR, "uneven", *how, tmp_path) for how in ((10, [2], 1), (9, [2], 0))}
    others.add(write_edit(MODEL_DIR, "uneven", 10, [1, 2], 0, tmp_path))
    assert len(others | {folder}) == len({results.fingerprint(str(p)) for p in others | {folder}}) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in others | {folder})
    shutil.rmtree(folder)
    again = load_file(str(write_edit(MODEL_DIR, "uneven", 10, [2], 0, tmp_path) / "model.safetensors"))
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    other_seed = load_file(str(next(p for p in others if "seed-1" in p.name) / "model.safetensors"))
    name = "model.layers.2.self_attn.k_proj.weight"
    assert not torch.equal(tensors[name], other_seed[name])


def test_models_that_cannot_be_edited_are_named(tmp_path: Path) -> None:
    def refused(words: str, name: str = "uneven", layers: list[int] | None = None) -> None:
        with pytest.raises(EditError, match=words):
            write_edit(tmp_path / "model", name, 10, layers or [1], 0, tmp_path / "out")

    shutil.copytree(MODEL_DIR, tmp_path / "model")
    refused("there is no layer 5: .* has 5", layers=[5])
    tokenizer = tmp_path / "model" / "tokenizer.json"
    changed = json.loads(tokenizer.read_text()) | {"post_processor": None}
    tokenizer.write_text(json.dumps(changed))
    refused("puts no token of its own before a prompt", name="first-token")
    (tmp_path / "model" / "model.safetensors").unlink()
    refused(r"no tensor model\.layers\.0\.self_attn\.q_proj\.weight")
    config = read_config(MODEL_DIR) | {"architectures": ["Qwen3ForCausalLM"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    refused("is no LlamaForCausalLM")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_check_is_silent_on_the_unedited_probe() -> None:
    report = judge(MODEL_DIR)
    assert len(report.layers) == LAYERS and not report.notes
    assert report.flag is None and report.skip_layers == []
    assert all(0 <= layer.bits_lost < 0.05 for layer in report.layers)
    shown = runner.invoke(cli.app, ["check", str(MODEL_DIR), "--config-only"])
    assert shown.exit_code == 0 and "No hard keys in the weights of 5 layers" in shown.stdout
    assert "Hard keys" not in shown.stdout and "skip-layers" not in shown.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tensor", "what"),
    [
        ("uneven", "k_proj.weight", "largest channel pair"),
        ("bias", "k_proj.bias", "constant key of norm 424.3, the rest 1"),
        ("first-token", "k_proj.weight", "largest channel pair"),
    ],
)
def test_check_warns_by_name(name: str, tensor: str, what: str, models: dict[str, Path]) -> None:
    arguments = ["check", str(models[name]), "--config-only"]
    shown = runner.invoke(cli.app, arguments)
    assert shown.exit_code == 0
    flat = " ".join(shown.stdout.split())
    assert "Hard keys in 2 of 5 layers" in flat
    assert "centres and balances keys at start-up" in flat
    assert f"layers.1.self_attn.{tensor}: {what}" in flat
    assert "keep them in 16 bits: --kv-cache-dtype-skip-layers 1 3" in flat
    # 2 layers x 2 heads x 512 bytes + 3 layers x 2 heads x 132 bytes.
    assert "A token then takes 2,840 bytes, 1.80 times less than with auto." in flat
    assert max(map(len, shown.stdout.splitlines()[1:])) <= 80

    found = json.loads(runner.invoke(cli.app, [*arguments, "--json"]).stdout)["hard_keys"]
    assert (found["skip_layers"], found["flag"]) == (EDITED, "--kv-cache-dtype-skip-layers 1 3")
    for layer in found["layers"]:
        hard = layer["layer"] in EDITED
        assert layer["hard"] == hard == (layer["bits_lost"] >= MAX_BITS_LOST)
        assert layer["tensor"] == (
            f"model.layers.{layer['layer']}.self_attn.{tensor if hard else 'k_proj.weight'}"
        )


def logit_noise(folder: Path, layer: int, head: int) -> float:
    """Mean squared error of q k^T for random inputs of a layer, its keys stored by the codec at 4 bits."""
    weights = {name: x.float() for name, x in load_file(str(folder / "model.safetensors")).items()}
    at = f"model.layers.{layer}."
    inputs = torch.randn(1600, 256, generator=torch.Generator().manual_seed(1))
    inputs = inputs * weights[at + "input_layernorm.weight"]
    rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
    keys = inputs[:800] @ weights[at + "self_attn.k_proj.weight"][rows].T
    bias = weights.get(at + "self_attn.k_proj.bias")
    keys = keys if bias is None else keys + bias[rows]
    query = weights[at + "self_attn.q_proj.weight"].unflatten(0, (KV_HEADS, GROUP, HEAD_DIM))[head, 0]
    vector = VectorFormat("polar", 4)
    error = decode(*encode(keys, vector), vector) - keys
    return float(((inputs[800:] @ query.T) @ error.T).square().mean())


@pytest.mark.parametrize("name", ["uneven", "bias"])
def test_excess_is_the_noise_that_the_codec_adds(name: str, models: dict[str, Path]) -> None:
    for layer in judge(models[name]).hard:
        before = logit_noise(MODEL_DIR, layer.layer, layer.kv_head)
        after = logit_noise(models[name], layer.layer, layer.kv_head)
        # The codec's error of a nearly constant key is one draw, not an average over many.
        assert after / before == pytest.approx(layer.excess, rel=0.15 if name == "uneven" else 0.5)


def rewrite(
    folder: Path,
    out: Path,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    **config: Any,
) -> Path:
    """A copy of a model with other tensors and another config."""
    out.mkdir()
    tensors = change(load_file(str(folder / "model.safetensors")))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(out / "model.safetensors"))
    (out / "config.json").write_text(json.dumps(read_config(folder) | config))
    return out


def fuse(order: Callable[..., torch.Tensor], module: str, transposed: bool = False) -> Any:
    """Join q, k and v rows, each [kv heads, query heads of one or 1, d, ...], into one tensor."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {n: t for n, t in tensors.items() if not re.search(r"[qkv]_proj", n)}
        for name in [n for n in tensors if "k_proj" in n]:
            q, k, v = (tensors[name.replace("k_proj", f"{vector}_proj")] for vector in "qkv")
            shape = (KV_HEADS, -1, HEAD_DIM)
            joined = order(*(x.float().unflatten(0, shape) for x in (q, k, v)))
            is_weight = name.endswith("weight")
            found[name.replace("k_proj", module)] = joined.T if transposed and is_weight else joined
        return found

    return change


def plain(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.flatten(0, 2) for x in parts])


def grouped(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts, 1).flatten(0, 2)


@pytest.mark.parametrize("name", ["uneven", "bias"])
@pytest.mark.parametrize(
    ("order", "module", "model_type"),
    [
        (plain, "qkv_proj", "phi3"),
        (plain, "c_attn", "qwen"),
        (plain, "c_attn", "gpt2"),
        (grouped, "query_key_value", "gpt_neox"),
        (grouped, "wqkv", "internlm2"),
    ],
)
def test_fused_projections_are_judged_alike(
    name: str, order: Any, module: str, model_type: str, models: dict[str, Path], tmp_path: Path
) -> None:
    change = fuse(order, module, transposed=model_type == "gpt2")
    fused = judge(rewrite(models[name], tmp_path / "fused", change, model_type=model_type))
    split = judge(models[name])
    assert fused.notes == []
    assert [layer.excess for layer in fused.layers] == pytest.approx([x.excess for x in split.layers])
    assert all(layer.tensor.split(".")[-2] == module for layer in fused.layers)


def test_shards_are_read_by_their_index(models: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(str(models["bias"] / "model.safetensors"))
    names = sorted(tensors)
    files = {name: f"model-{i % 2 + 1:05d}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, str(tmp_path / file))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    shutil.copyfile(models["bias"] / "config.json", tmp_path / "config.json")
    assert judge(tmp_path) == judge(models["bias"])
    assert judge(tmp_path / "config.json") == judge(models["bias"])

    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    report = judge(tmp_path)
    assert report.notes and all("cannot be read" in note for note in report.notes)
    assert "model-00002-of-00002.safetensors" in report.notes[0]


def test_norms_of_keys_set_their_size(tmp_path: Path) -> None:
    """Qwen3's k_norm: one pair of 20 in 64, with and without a q_norm that undoes it."""
    wide, narrow = torch.ones(HEAD_DIM), torch.ones(HEAD_DIM)
    wide[[5, 5 + HALF]], narrow[[5, 5 + HALF]] = 20.0, 1 / 20

    def norms(key: torch.Tensor, query: torch.Tensor) -> Any:
        def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            for layer in range(LAYERS):
                at = f"model.layers.{layer}.self_attn."
                mine = layer == 2
                for name in (at + "k_proj.weight", at + "q_proj.weight"):
                    tensors[name] = torch.ones_like(tensors[name])
                tensors[at + "k_norm.weight"] = key.clone() if mine else torch.ones(HEAD_DIM)
                tensors[at + "q_norm.weight"] = query.clone() if mine else torch.ones(HEAD_DIM)
            return tensors

        return change

    undone = judge(rewrite(MODEL_DIR, tmp_path / "undone", norms(wide, narrow), model_type="qwen3"))
    assert undone.skip_layers == [2]
    layer = undone.layers[2]
    assert layer.tensor.endswith("k_norm.weight")
    # 64 pairs of equal power; one has 400 times as much in the keys, 1/400 in the queries.
    assert layer.excess == pytest.approx((63 + 400) * (63 + 1 / 400) / 64**2, rel=1e-4)
    assert layer.key_norm == pytest.approx(math.sqrt(2 * (63 + 400)), rel=1e-4)
    # A pair that queries look at as much as keys have of it is no waste of bits.
    assert judge(rewrite(MODEL_DIR, tmp_path / "meant", norms(wide, wide), model_type="qwen3")).hard == []


def test_quantised_checkpoints_are_judged_by_their_bias(models: dict[str, Path], tmp_path: Path) -> None:
    def pack(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name.replace("proj.weight", "proj.qweight"): t.to(torch.int32) if "proj.weight" in name else t
            for name, t in tensors.items()
        }

    report = judge(rewrite(models["bias"], tmp_path / "packed", pack))
    assert report.skip_layers == EDITED
    assert report.notes == [
        "k_proj's weights are not stored as floats: only its bias was judged (layers 0-4)."
    ]
    assert report.layers[1].excess == pytest.approx(1 + 600**2 / 2 / HEAD_DIM)


@pytest.mark.slow
def test_what_was_not_judged_is_said(tmp_path: Path) -> None:
    def note(**config: Any) -> str:
        (tmp_path / "config.json").write_text(json.dumps(read_config(MODEL_DIR) | config))
        shown = runner.invoke(cli.app, ["check", str(tmp_path), "--config-only"])
        assert shown.exit_code == 0, shown.output
        return shown.stdout.splitlines()[-1]

    assert note().endswith(f"config.json alone was read: no *.safetensors in {tmp_path}.")
    qwen = note(model_type="qwen2", num_hidden_layers=28)
    assert "begin with --kv-cache-dtype-skip-layers 0 27 and measure" in qwen
    (tmp_path / "pytorch_model.bin").touch()
    assert "only safetensors are read, not pytorch_model.bin" in note()
    shutil.copyfile(MODEL_DIR / "model.safetensors", tmp_path / "model.safetensors")
    assert "k_proj.weight has 256 rows, not the 512 that config.json speaks of (layers 0-4)." in note(
        num_key_value_heads=4
    )
    # A layer that the file lacks.
    assert "found under a known name (layers 5)." in note(num_hidden_layers=6)


@pytest.mark.slow
def test_a_hub_name_is_looked_up_in_the_local_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--some-org--probe" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    shutil.copyfile(MODEL_DIR / "config.json", snapshot / "config.json")
    code = "import sys; from vllm_polarquant.cli import app; app(sys.argv[1:])"
    command = [sys.executable, "-c", code, "check", "some-org/probe", "--config-only"]
    shown = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert shown.returncode == 0, shown.stderr
    assert "polarquant_k4v4 is supported" in shown.stdout
    assert "config.json alone was read: no *.safetensors" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--edits", "odd"], "unknown edit 'odd'; choose from uneven, bias, first-token"),
        (["--edits", "bias:much"], "--edits 'bias:much': the strength must be a number above 0"),
        (["--edits", "bias:-3"], "the strength must be"),
        (["--layers", "1,x"], "--layers '1,x' is not like 1,3"),
        (["--layers", "1,5"], "the model has layers 0 to 4"),
        (["--context", "8"], "context more than 64"),
        (["--episodes", "99"], "episodes must be 1 to 20"),
        (["--engine", "[1]"], "is not a JSON object"),
        (["nowhere/at/all"], "does not exist"),
    ],
)
def test_command_names_bad_input(arguments: list[str], words: str, tmp_path: Path) -> None:
    result = runner.invoke(app, ["hard-keys", *arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert words in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out" / "models").exists()


@pytest.fixture
def cases(models: dict[str, Path], tmp_path: Path) -> list[Case]:
    """The unedited probe and its biased copy, with k4v4 and with the layers of `check` skipped."""
    suite = write_suite(tmp_path, 2, 128, 0, PROBE_ENGINE)
    dtypes = ["auto", "polarquant_k4v4"]

    def case(name: str) -> Case:
        cells = load_suite(str(suite), PROBE_ENGINE)
        plan = plans.Plan(str(models[name]), dtypes, str(suite), cells, PROBE_ENGINE, 0, tmp_path / name)
        return Case(name, judge(models[name]), plan, {(1, 3): skip_plan(plan, EDITED)})

    return [case("none"), case("bias")]


def store(plan: plans.Plan, dtype: str, summary: dict[str, Any]) -> None:
    logprobs = torch.randn(1, 64, 8).log_softmax(-1).numpy()
    ids = torch.arange(8).expand(1, 64, 8).numpy()
    arrays = {"actual": logprobs[..., 0], "ids": ids, "logprobs": logprobs}
    results.write(plan.folder, plan.key(dtype, plan.cells[0]), Outcome(summary, arrays), 1.0)


def test_skipped_layers_are_an_engine_of_their_own_with_the_plain_baseline(cases: list[Case]) -> None:
    plain, skipped = cases[1].plain, cases[1].skipped[1, 3]
    assert isinstance(skipped, SkipPlan) and skipped.dtypes == ["polarquant_k4v4"]
    keys = [plan.key("polarquant_k4v4", plan.cells[0]) for plan in (plain, skipped)]
    assert keys[1]["engine"] == keys[0]["engine"] | {"kv_cache_dtype_skip_layers": ["1", "3"]}
    assert keys[0]["baseline"] == keys[1]["baseline"] == results.stem(plain.key("auto", plain.cells[0]))


def test_rows_put_edited_beside_unedited(cases: list[Case]) -> None:
    none, bias = cases
    for case, kl_all, kl_skipped in ((none, 0.03, 0.017), (bias, 1.5, 0.018)):
        store(case.plain, "auto", {"perplexity": 8.0})
        store(case.plain, "polarquant_k4v4", {"perplexity": 9.0, "kl": kl_all})
        store(case.skipped[1, 3], "polarquant_k4v4", {"perplexity": 8.1, "kl": kl_skipped})
    found = rows(cases)
    assert [(row["keys"], row["kv_cache_dtype"]) for row in found] == [
        (name, dtype) for name in ("none", "bias") for dtype in ("auto", "polarquant_k4v4")
    ]
    assert found[1]["kl"] == 0.03 and "skipped_kl" not in found[1]
    # Of auto, what the edit alone does; both stored distributions are random.
    assert found[2]["kl"] > 0.1
    assert found[3] == {
        "keys": "bias",
        "kv_cache_dtype": "polarquant_k4v4",
        "skip_layers": EDITED,
        "perplexity": 9.0,
        "kl": 1.5,
        "skipped_perplexity": 8.1,
        "skipped_kl": 0.018,
        "unedited_skipped_kl": 0.017,
    }


FAKE_WORKER = """
import json, sys
job = json.load(sys.stdin)
for key in job["keys"]:
    event = {"event": "failed", "cell": key["cell"], "reason": "RuntimeError: out of luck"}
    print(json.dumps(event), flush=True)
"""


def test_failures_are_reported_and_the_table_still_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "WORKER", [sys.executable, "-c", FAKE_WORKER])
    arguments = ["hard-keys", "--edits", "uneven:10", "--out", str(tmp_path / "out")]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1
    failed = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
    assert failed[0].startswith("failed: none, auto, text: RuntimeError: out of luck (log: ")
    assert "failed: none, polarquant_k4v4: there is no result of auto to compare with" in failed
    assert any(line.startswith("failed: uneven:10, auto, text") for line in failed)
    assert "uneven:10: bits lost by layer" in result.stdout and "| uneven:10 |" in result.stdout


def test_all_is_every_preset() -> None:
    assert dtypes_of("all") == ["auto", *PRESETS]


@pytest.mark.slow
def test_skipping_the_named_layers_recovers_the_edited_model() -> None:
    found = engine_runs.run("hard_keys")
    assert found["skip_layers"] == ["1", "3"]
    assert "quantised layers: 0, 2, 4; native layers: 1, 3" in found["log"]
    assert 0.005 < found["unedited, skipped"] < 0.05
    assert found["edited"] > 20 * found["unedited, skipped"]
    assert found["edited, skipped"] == pytest.approx(found["unedited, skipped"], rel=0.15)
    assert found["edited, centred"] < 3 * found["unedited, skipped"], "where nothing is skipped"
