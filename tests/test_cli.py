"""The command line: what it prints, what it refuses by name, and its exit codes."""

import json
import math
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from vllm_polarquant import __version__, check, dry_run
from vllm_polarquant.check import Cache, ConfigError, Shape, check_config, read_shape
from vllm_polarquant.cli import app
from vllm_polarquant.format import DEFAULT_PRESET, PRESETS
from vllm_polarquant.plugin import register
from vllm_polarquant.support import refusals, table

GIB = 2**30

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
QWEN2 = LLAMA | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 28,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
QWEN3 = LLAMA | {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "head_dim": 128,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024}
FALCON = {
    "model_type": "falcon",
    "hidden_size": 4544,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "multi_query": True,
    "alibi": False,
}
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "text_config": LLAMA,
    "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024},
}
DEEPSEEK = LLAMA | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
GEMMA2 = LLAMA | {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "head_dim": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
}
GPT_OSS = LLAMA | {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "head_dim": 64,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
}
GEMMA3 = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": LLAMA | {"model_type": "gemma3_text", "sliding_window": 1024, "head_dim": 128},
}
QWEN3_NEXT = QWEN3 | {
    "model_type": "qwen3_next",
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
BLOOM = {"architectures": ["BloomForCausalLM"], "model_type": "bloom", "n_head": 16, "n_layer": 24}
MPT = {"model_type": "mpt", "d_model": 4096, "n_heads": 32, "attn_config": {"alibi": True}}
T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "is_encoder_decoder": True,
    "d_model": 512,
    "num_heads": 8,
}
WHISPER = {"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"}
BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 768,
    "num_attention_heads": 12,
}
LLAMA4 = {
    "model_type": "llama4",
    "text_config": LLAMA | {"model_type": "llama4_text", "attention_chunk_size": 8192},
}

SUPPORTED = {
    "llama": LLAMA,
    "llama in float32": LLAMA | {"torch_dtype": "float32"},
    "llama without a dtype": {k: v for k, v in LLAMA.items() if k != "torch_dtype"},
    "qwen2, window off": QWEN2,
    "qwen2, window unset": {k: v for k, v in QWEN2.items() if k != "use_sliding_window"},
    "qwen2, window from the last layer": QWEN2 | {"use_sliding_window": True},
    "qwen3": QWEN3,
    "qwen3, layers listed": QWEN3 | {"layer_types": ["full_attention"] * 32, "sliding_window": 1},
    "gemma2": GEMMA2,
    "gpt-oss": GPT_OSS,
    "mistral": MISTRAL | {"sliding_window": 4096},
    "mistral, window null": MISTRAL | {"sliding_window": None},
    "mistral, window 0": MISTRAL | {"sliding_window": 0},
    "gpt2": GPT2,
    "falcon": FALCON,
    "llava": LLAVA,
    "cap null": LLAMA | {"attn_logit_softcapping": None},
    # The engine serves the attention layers of hybrids.
    "qwen3-next": QWEN3_NEXT,
    "llama 4": LLAMA4,
}
# Features that the message names, in order, and a word of what to do. tests/test_support.py has what vLLM
# says of real layers.
REFUSED = {
    "deepseek": (DEEPSEEK, ["MLA"], "--kv-cache-dtype auto"),
    "gemma3": (GEMMA3, ["image prefix"], "--language-model-only"),
    "bloom": (BLOOM, ["ALiBi"], "--kv-cache-dtype auto"),
    "mpt": (MPT, ["ALiBi"], "--kv-cache-dtype auto"),
    "falcon": (FALCON | {"alibi": True}, ["ALiBi"], "--kv-cache-dtype auto"),
    "t5": (T5, ["encoder or cross attention"], "without --kv-cache-dtype"),
    "whisper": (WHISPER, ["encoder or cross attention"], "without --kv-cache-dtype"),
    "mllama": (LLAMA | {"cross_attention_layers": [3, 8]}, ["encoder or cross attention"], "without"),
    "bert": (BERT, ["encoder or cross attention"], "without"),
    "roberta": ({"architectures": ["XLMRobertaModel"]}, ["encoder or cross attention"], "without"),
    "head_dim 160": (LLAMA | {"head_dim": 160}, ["head_dim"], "64, 80, 96, 112, 128, 192, 256, 512"),
    "float64": (LLAMA | {"dtype": "float64"}, ["dtype"], "--dtype bfloat16"),
}

runner = CliRunner()


def run(*args: object):
    return runner.invoke(app, [str(arg) for arg in args], catch_exceptions=False)


def check_file(*args: object):
    """`polarquant check` without vLLM, which takes seconds to import."""
    return run("check", *args, "--config-only")


@pytest.fixture
def model(tmp_path):
    def write(config: object):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def write_weights(path, size=4096):
    """A safetensors file of `size` bytes in all, with one tensor."""
    tensor = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    length = len(json.dumps({"w": tensor})) + 20
    data = size - 8 - length
    header = json.dumps({"w": tensor | {"shape": [data], "data_offsets": [0, data]}}).ljust(length)
    path.write_bytes(length.to_bytes(8, "little") + header.encode() + b"w" * data)
    assert path.stat().st_size == size


@pytest.mark.parametrize("name", SUPPORTED)
def test_supported(name, model):
    result = check_file(model(SUPPORTED[name]))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{DEFAULT_PRESET} is supported")
    assert "config.json alone" in result.stdout


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name, model):
    config, features, advice = REFUSED[name]
    result = check_file(model(config), "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["supported"] is False
    assert report["judged_by"] == "config.json"
    assert [problem["feature"] for problem in report["problems"]] == features
    messages = [problem["message"] for problem in report["problems"]]
    assert all(message.endswith(".") and "; " in message for message in messages)
    assert any(advice in message for message in messages)
    plain = check_file(model(config))
    assert plain.exit_code == 1
    assert all(message in plain.stdout for message in messages)


@pytest.mark.slow
def test_layers_that_vllm_builds_are_counted(model, monkeypatch):
    pytest.importorskip("vllm")
    # Here: a child would import vLLM once more.
    register()
    monkeypatch.setattr(dry_run, "ask", dry_run.explore)
    tiny = LLAMA | {"num_hidden_layers": 4, "vocab_size": 128, "intermediate_size": 64}
    shown = run("check", model(tiny), "--kv-cache-dtype-skip-layers", "0, 3", "--json").stdout
    # What vLLM logs stands before it.
    report = json.loads(shown[shown.rindex("\n{\n") if "\n{\n" in shown else 0 :])
    assert report["supported"] is True
    assert report["judged_by"] == "vllm"
    assert report["quantised_layers"] == [1, 2]
    assert report["capacity"][-1]["bytes_per_token"] == 8 * (2 * 512 + 2 * 132)
    assert report["times"] == pytest.approx(4 * 512 / (2 * 512 + 2 * 132), rel=0.01)


@pytest.mark.slow
def test_vllm_is_asked_in_a_child(model):
    pytest.importorskip("vllm")
    windows = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2}
    gemma = GEMMA2 | windows | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
    gemma |= {"num_hidden_layers": 4, "vocab_size": 128, "intermediate_size": 64}
    gemma |= {"attn_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh"}
    result = run("check", model(gemma), "--json", "--max-model-len", 8192, "--gpu-memory", 1)
    assert result.exit_code == 0, result.stdout
    report = json.loads(result.stdout)
    assert report["judged_by"] == "vllm"
    assert report["quantised_layers"] == [0, 1, 2, 3]
    assert report["max_model_len"] == 8192
    rows = {row["kv_cache_dtype"]: row for row in report["capacity"]}
    # Two layers of windows keep less than a request has.
    assert rows["auto"]["bytes_per_request"] < 8192 * rows["auto"]["bytes_per_token"]
    assert report["times"] == pytest.approx(1024 / 260, rel=0.01)
    assert rows["auto"]["tokens"] * report["times"] == pytest.approx(rows[DEFAULT_PRESET]["tokens"], rel=0.01)


def test_a_model_that_vllm_cannot_build_is_judged_by_its_config(model, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    result = run("check", model(LLAMA))
    assert result.exit_code == 0
    assert "vLLM could not build this model here (no child process: " in result.stdout
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    result = run("check", model(LLAMA))
    assert result.exit_code == 0
    assert "vLLM is not installed here: judged by config.json alone" in result.stdout


def test_shapes():
    assert read_shape(LLAMA).head_dim == 128
    assert read_shape(QWEN3).head_dim == 128
    assert read_shape(LLAVA) == read_shape(LLAMA)
    assert read_shape(FALCON).kv_heads == 1
    assert read_shape(FALCON | {"new_decoder_architecture": True, "num_kv_heads": 8}).kv_heads == 8
    gpt2 = read_shape(GPT2)
    assert (gpt2.layers, gpt2.kv_heads, gpt2.head_dim, gpt2.max_model_len) == (12, 12, 64, 1024)
    assert read_shape(LLAMA | {"num_kv_shared_layers": 12}).layers == 20
    dbrx = {"d_model": 6144, "n_heads": 48, "n_layers": 40, "attn_config": {"kv_n_heads": 8}}
    assert read_shape(dbrx).kv_heads == 8
    # A length without meaning, as some tokenizers write it, limits nothing.
    assert read_shape(LLAMA | {"max_position_embeddings": 10**30}).max_model_len is None


def test_a_shape_whose_layers_differ():
    caches = (Cache(1, 16, 8, 64), Cache(3, 16, 2, 128), Cache(5, 16, 2, 128, quantised=False))
    mixed = Shape(3, 8, 64, 4096, 16, caches)
    assert mixed.indices == [1, 3]
    assert mixed.token_bytes("auto") == 8 * 256 + 2 * 2 * 512
    assert mixed.token_bytes(DEFAULT_PRESET) == 8 * 68 + 2 * 132 + 2 * 512
    assert (mixed.at(3).kv_heads, mixed.at(3).head_dim, mixed.at(3).query_heads) == (2, 128, 16)
    alike = read_shape(LLAMA)
    assert alike.at(3) == alike
    assert alike.indices == list(range(32))


def test_capacity_in_numbers(model):
    folder = model(LLAMA)
    write_weights(folder / "model-00001-of-00002.safetensors", 3000)
    write_weights(folder / "model-00002-of-00002.safetensors", 1096)
    write_weights(folder / "consolidated.safetensors", 4096)
    result = check_file(folder, "--gpu-memory", 16, "--max-model-len", 8190, "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["weight_bytes"] == 4096
    assert report["kv_bytes"] == 16 * GIB - 4096
    rows = {row["kv_cache_dtype"]: row for row in report["capacity"]}
    # 32 layers x 8 heads x 2 vectors x 128 coordinates x 2 bytes; 132 bytes of the preset's.
    for name, token in (("auto", 131072), ("fp8", 65536), ("polarquant_k4v4", 33792)):
        assert rows[name]["bytes_per_token"] == token
        # A request of 8190 tokens takes whole blocks of 16.
        assert rows[name]["bytes_per_request"] == 8192 * token
        assert rows[name]["tokens"] == (16 * GIB - 4096) // token // 16 * 16
        assert rows[name]["requests"] == round(rows[name]["tokens"] / 8192, 2)
    assert rows["auto"]["tokens"] == 131056
    assert rows["polarquant_k4v4"]["tokens"] == 508400


def test_capacity_table(model):
    folder = model(LLAMA)
    result = check_file(folder, "--gpu-memory", 16, "--kv-cache-dtype", "polarquant_k2v2")
    assert result.exit_code == 0
    assert "32 layers, 8 KV heads, head_dim 128" in result.stdout
    assert "131,072" in result.stdout
    assert "17,408" in result.stdout
    assert "no *.safetensors there" in result.stdout
    without = check_file(folder).stdout
    assert "tokens that fit" not in without
    # The file itself will do.
    assert check_file(folder / "config.json").exit_code == 0


def test_float32_weights_are_loaded_in_16_bits(model):
    folder = model(LLAMA | {"torch_dtype": "float32"})
    write_weights(folder / "model.safetensors")
    report = json.loads(check_file(folder, "--gpu-memory", 1, "--json").stdout)
    assert report["weight_bytes"] == 2048


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--kv-cache-dtype", "fp8"], "unknown --kv-cache-dtype 'fp8'; choose one of"),
        (["--kv-cache-dtype", "polarquant"], "polarquant_k4v4"),
        (["--max-model-len", "0"], "--max-model-len 0 is not a positive number of tokens"),
        (["--max-model-len", "-5"], "--max-model-len -5 is not"),
        (["--max-model-len", "many"], "--max-model-len"),
        (["--max-model-len", str(10**20)], "is not a positive number of tokens below 2,147,483,648"),
        (["--kv-cache-dtype-skip-layers", "32"], "32 names no layer of this model; give numbers below 32"),
        (["--kv-cache-dtype-skip-layers", "0-1"], "0-1 names no layer"),
        (["--gpu-memory", "0"], "--gpu-memory 0 is not a positive number of GiB"),
        (["--gpu-memory", "nan"], "--gpu-memory nan is not"),
        (["--gpu-memory", "inf"], "--gpu-memory inf is not"),
        (["--gpu-memory", "1e-6"], "the weights (0.00 GiB) leave nothing of --gpu-memory 1e-06"),
    ],
)
def test_bad_options(args, message, model):
    folder = model(LLAMA)
    write_weights(folder / "model.safetensors")
    result = check_file(folder, *args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not result.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[]", "holds a JSON list, not an object"),
        ('{"model_type": "llama"}', "does not say hidden_size"),
        (json.dumps(LLAMA | {"hidden_size": "4096"}), "has hidden_size = '4096', not a positive"),
        (json.dumps(LLAMA | {"num_hidden_layers": -1}), "has num_hidden_layers = -1"),
        (json.dumps(LLAMA | {"num_key_value_heads": True}), "has num_key_value_heads = True"),
        (json.dumps(LLAMA | {"num_key_value_heads": 0}), "has num_key_value_heads = 0, not a positive"),
        (json.dumps(QWEN3 | {"hidden_size": []}), "has hidden_size = [], not a positive"),
        (json.dumps(LLAMA | {"architectures": [3]}), "has architectures = [3], not a list of names"),
        (json.dumps(LLAMA | {"num_hidden_layers": 10**20}), "has num_hidden_layers = 1e+20, more than any"),
    ],
)
def test_bad_config(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    result = check_file(tmp_path)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_config_that_is_not_there(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        result = check_file(path)
        assert result.exit_code == 2
        assert "does not exist; pass the folder" in result.stderr
    result = check_file("some-org/some-model")
    assert result.exit_code == 2
    assert "not in the local cache; `hf download some-org/some-model`" in result.stderr
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    assert check_file(tmp_path).exit_code == 2


def test_a_config_that_may_not_be_read(tmp_path):
    config = tmp_path / "config.json"
    config.mkdir()
    result = check_file(tmp_path)
    assert result.exit_code == 2
    assert "cannot read" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def damage(folder, name):
    weights = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    write_weights(weights)
    if name == "empty":
        weights.write_bytes(b"")
    elif name == "garbage":
        weights.write_bytes(b"not a tensor in sight, whatever the name says")
    elif name == "truncated":
        weights.write_bytes(weights.read_bytes()[:3000])
    elif name == "header":
        weights.write_bytes((40).to_bytes(8, "little") + b"x" * 40)
    elif name == "index":
        index.write_text("{")
    elif name == "index without a map":
        index.write_text("{}")
    elif name == "missing":
        index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "more.safetensors"}}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "model.safetensors is damaged (it is empty): download it again"),
        ("garbage", "is damaged (no header of safetensors)"),
        ("truncated", "is damaged (it should have 4,096 bytes and has 3,000)"),
        ("header", "is damaged (its header is no JSON)"),
        ("index", "index.json is damaged (JSONDecodeError"),
        ("index without a map", "index.json is damaged (KeyError: 'weight_map')"),
        ("missing", "1 of the 2 files that"),
    ],
)
def test_damaged_weights(name, message, model):
    folder = model(LLAMA)
    damage(folder, name)
    result = check_file(folder)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not result.stdout


@pytest.mark.parametrize(
    ("field", "feature"),
    [
        ({"index_topk": 2048}, "sparse attention"),
        ({"rswa_window": 128}, "R-SWA"),
        ({"position_embedding_type": "alibi"}, "ALiBi"),
    ],
)
def test_one_field_is_refused_for_one_reason(field, feature):
    assert [problem.feature for problem in check_config(LLAMA | field)] == [feature]


def test_a_field_of_the_wrong_type():
    with pytest.raises(ConfigError, match="head_dim = 'wide', not a positive whole number"):
        check_config(LLAMA | {"head_dim": "wide"})
    with pytest.raises(ConfigError, match="layer_types = 3, not a list"):
        check_config(LLAMA | {"layer_types": 3})
    with pytest.raises(ConfigError, match=r"architectures = \[3\], not a list of names"):
        check_config(LLAMA | {"architectures": [3]})


@pytest.mark.parametrize("value", [None, True, -1, 0, 1.5, 10**30, "x", [], ["x"], {}, {"x": 1}])
def test_any_value_of_any_field_ends_in_an_answer(value, model):
    every = {field for config, *_ in REFUSED.values() for field in config} | set(QWEN2)
    for field in sorted(every):
        result = check_file(model(LLAMA | {field: value}), "--gpu-memory", 16)
        assert result.exit_code in (0, 1, 2), field


def test_dtype_beside_the_text_config():
    text = {key: value for key, value in LLAMA.items() if key != "torch_dtype"}
    config = LLAVA | {"text_config": text, "torch_dtype": "float64"}
    assert [problem.feature for problem in check_config(config)] == ["dtype"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_checked(preset, model):
    assert check_file(model(LLAMA), "--kv-cache-dtype", preset).exit_code == 0


def test_formats_json():
    result = run("formats", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["head_dim"] == 128
    rows = {row["kv_cache_dtype"]: row for row in report["formats"]}
    assert list(rows) == ["auto", "fp8", *PRESETS]
    assert [name for name, row in rows.items() if row["default"]] == [DEFAULT_PRESET]
    sizes = [row["bytes_per_token_head"] for row in rows.values()]
    assert sizes == [512, 256, 196, 132, 116, 116, 100, 84, 84, 68]
    assert rows["polarquant_k4v4"]["bits_per_element"] == 4.125
    assert rows["polarquant_k4v4"]["ratio"] == pytest.approx(512 / 132)
    assert rows["auto"]["key_distortion"] == 0
    for name, row in rows.items():
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
        if name != "auto":
            assert row["key_distortion"] > 0
    assert rows["fp8"]["key_distortion"] < 0.001
    assert 0.005 < rows["polarquant_k4v4"]["value_distortion"] <= 0.0066
    assert 0.019 < rows["polarquant_k3v3"]["key_distortion"] <= 0.0226


def test_formats_table():
    result = run("formats", "--head-dim", 64)
    assert result.exit_code == 0
    assert all(preset in result.stdout for preset in PRESETS)
    assert f"{DEFAULT_PRESET} (default)" in result.stdout
    assert "measured now" in result.stdout
    assert max(len(line) for line in result.stdout.splitlines()) <= 80


def test_formats_of_an_unknown_head_dim():
    result = run("formats", "--head-dim", 100)
    assert result.exit_code == 2
    assert "head_dim 100 is not supported" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_support_prints_the_tables():
    assert run("support").stdout == table() + "\n"
    assert run("support", "--refused").stdout == refusals() + "\n"


def test_version_and_help():
    assert run("--version").stdout == f"polarquant {__version__}\n"
    for command in ([], ["check"], ["formats"]):
        assert "Usage: " in run(*command, "--help").stdout
    assert run("serve").exit_code == 2


def test_check_imports_neither_torch_nor_vllm(model):
    code = (
        "import sys; from vllm_polarquant.cli import app; "
        "app(sys.argv[1:], standalone_mode=False); "
        "sys.exit(bool({'torch', 'vllm'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "check", str(model(LLAMA)), "--config-only"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert "is supported" in result.stdout
