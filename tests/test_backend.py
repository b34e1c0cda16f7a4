"""Registration with vLLM, and what is refused at start-up before any KV memory is allocated."""

from __future__ import annotations

import argparse
import json
import logging
from typing import Any

import engine_runs
import pytest
import torch

pytest.importorskip("vllm")

import vllm
from vllm.config import KVTransferConfig, VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_polarquant import compat, support
from vllm_polarquant.compat import BACKEND_NAME
from vllm_polarquant.format import HEAD_DIMS, LOSSLESS, PRESETS
from vllm_polarquant.plugin import LOSSLESS_SWITCH, register

PRESET = "polarquant_k4v4"


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


def choose(**changes: Any) -> str:
    """The class path that the platform gives for a layer."""
    config = {
        "head_size": 128,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": PRESET,
        "block_size": None,
    }
    selector = AttentionSelectorConfig(**(config | changes))
    return current_platform.get_attn_backend_cls(None, selector)


def assert_one_sentence(refusal: object, *parts: str) -> None:
    text = str(refusal)
    assert PRESET in text
    assert text.endswith(".")
    assert "\n" not in text
    assert ". " not in text.replace("0. ", "")
    for part in parts:
        assert part in text


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("head_size", HEAD_DIMS)
def test_every_preset_has_a_backend_for_every_head_size(preset: str, head_size: int) -> None:
    path = choose(kv_cache_dtype=preset, head_size=head_size)
    module, name = path.rsplit(".", 1)
    backend = getattr(__import__(module, fromlist=[name]), name)
    assert backend.supports_kv_cache_dtype(preset)
    assert not backend.supports_kv_cache_dtype("auto")
    assert backend.get_name() == BACKEND_NAME


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "fp8", "fp8_e5m2", None])
def test_other_dtypes_get_the_backend_that_vllm_chooses(dtype: str | None) -> None:
    assert "polarquant" not in choose(kv_cache_dtype=dtype)


WAYS_OUT = ("--kv-cache-dtype", "unset", "use ", "set ")


OF_SELECTOR = {rule.selector: rule for rule in support.RULES if rule.selector}


@pytest.mark.parametrize("field", OF_SELECTOR)
def test_a_refusal_names_the_feature_and_the_way_out(field: str) -> None:
    with pytest.raises(ValueError) as refused:
        choose(**{field: True})
    rule = OF_SELECTOR[field]
    assert any(way in rule.way_out for way in WAYS_OUT)
    assert_one_sentence(refused.value, rule.what, rule.way_out)


@pytest.mark.parametrize("kind", ["encoder", "encoder_only", "encoder_decoder"])
def test_attention_other_than_a_decoders_is_refused(kind: str) -> None:
    with pytest.raises(ValueError) as refused:
        choose(attn_type=kind)
    assert_one_sentence(refused.value, kind, "without --kv-cache-dtype")


@pytest.mark.parametrize("head_size", [32, 48, 120, 1024])
def test_an_unsupported_head_size_is_refused(head_size: int) -> None:
    with pytest.raises(ValueError) as refused:
        choose(head_size=head_size)
    assert_one_sentence(refused.value, f"head_dim {head_size}", "128", "--kv-cache-dtype auto")


def choose_with_connector(connector: str, **extra: str) -> str:
    transfer = KVTransferConfig(kv_connector=connector, kv_role="kv_both", kv_connector_extra_config=extra)
    config = VllmConfig()
    config.kv_transfer_config = transfer
    with set_current_vllm_config(config):
        return choose(use_kv_connector=True)


def test_connectors_whose_keys_name_the_page_format_work() -> None:
    assert "polarquant" in choose_with_connector("NixlConnector")
    assert "polarquant" in choose_with_connector("OffloadingConnector")
    assert "polarquant" in choose_with_connector("OffloadingConnector", spec_name="CPUOffloadingSpec")


@pytest.mark.parametrize(
    ("connector", "spec"),
    [("LMCacheConnectorV1", None), ("MooncakeConnector", None), ("OffloadingConnector", "TieringSpec")],
)
def test_connectors_whose_keys_do_not_name_the_page_format_are_refused(
    connector: str, spec: str | None
) -> None:
    with pytest.raises(ValueError) as refused:
        choose_with_connector(connector, **({"spec_name": spec} if spec else {}))
    assert_one_sentence(refused.value, connector, "OffloadingConnector")


def test_a_float32_model_is_refused() -> None:
    with pytest.raises(ValueError) as refused:
        choose(dtype=torch.float32)
    assert_one_sentence(refused.value, "float32", "--dtype bfloat16 or float16")


@pytest.mark.parametrize("block_size", [8, 24, 100])
def test_a_block_size_that_is_no_multiple_of_16_is_refused(block_size: int) -> None:
    with pytest.raises(ValueError) as refused:
        choose(block_size=block_size)
    assert_one_sentence(refused.value, f"block size of {block_size}", "--block-size 16")


def cli_choices() -> list[str]:
    parser = EngineArgs.add_cli_args(vllm.utils.argparse_utils.FlexibleArgumentParser())
    (action,) = [a for a in parser._actions if "--kv-cache-dtype" in a.option_strings]
    return list(action.choices)


def test_registering_again_changes_nothing() -> None:
    before = cli_choices()
    chooser = type(current_platform).get_attn_backend_cls
    for _ in range(3):
        register()
    assert cli_choices() == before
    assert type(current_platform).get_attn_backend_cls == chooser
    assert len(set(before)) == len(before)
    assert BACKEND_NAME in AttentionBackendEnum.__members__


def test_the_command_line_knows_the_presets_and_nothing_else() -> None:
    assert set(PRESETS) < set(cli_choices())
    parser = EngineArgs.add_cli_args(vllm.utils.argparse_utils.FlexibleArgumentParser())
    for preset in PRESETS:
        assert parser.parse_args(["--kv-cache-dtype", preset]).kv_cache_dtype == preset
    for name in ("polarquant_k9v9", "foo"):
        with pytest.raises((SystemExit, argparse.ArgumentError)):
            parser.parse_args(["--kv-cache-dtype", name])


def test_a_cache_config_takes_the_presets_and_refuses_what_nobody_has() -> None:
    from vllm.config import CacheConfig

    for preset in PRESETS:
        assert CacheConfig(cache_dtype=preset).cache_dtype == preset
    for name in ("polarquant_k9v9", "foo"):
        with pytest.raises(ValueError, match="cache_dtype"):
            CacheConfig(cache_dtype=name)


def test_the_lossless_preset_is_known_only_with_its_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LOSSLESS not in cli_choices()
    asked: list[list[str]] = []
    monkeypatch.setattr(compat, "register_dtypes", asked.append)
    register()
    monkeypatch.setenv(LOSSLESS_SWITCH, "1")
    register()
    assert asked == [[*PRESETS], [*PRESETS, LOSSLESS]]


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "0.29.0rc1"])
def test_an_unsupported_vllm_is_logged_and_left_alone(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    touched: list[object] = []
    for step in ("register_dtypes", "register_backend", "route_backends"):
        monkeypatch.setattr(compat, step, touched.append)
    monkeypatch.setattr(vllm, "__version__", version)
    # vLLM's loggers may not propagate to the root, where caplog listens.
    logger = logging.getLogger("vllm.polarquant")
    logger.addHandler(caplog.handler)
    try:
        register()
    finally:
        logger.removeHandler(caplog.handler)
    assert not touched
    assert {record.levelno for record in caplog.records} == {logging.ERROR}
    (message,) = {record.getMessage() for record in caplog.records}
    for part in (version, ">=0.32", "<0.34", "install a supported vLLM"):
        assert part in message


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0", "0.33.0rc2"])
def test_supported_versions_pass(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    compat.check_version()


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "vocab_size": 128,
    "torch_dtype": "bfloat16",
}
TINY_MODELS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "alibi": (
        {
            "architectures": ["BloomForCausalLM"],
            "model_type": "bloom",
            "hidden_size": 256,
            "n_head": 2,
            "n_layer": 2,
            "seq_length": 256,
            "vocab_size": 128,
            "torch_dtype": "bfloat16",
        },
        ("ALiBi", "--kv-cache-dtype auto"),
    ),
    "MLA": (
        LLAMA
        | {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 2,
            "moe_layer_freq": 1,
        },
        ("MLA", "--kv-cache-dtype auto"),
    ),
    "head size": (
        LLAMA | {"head_dim": 48, "hidden_size": 96},
        ("head_dim 48", "--kv-cache-dtype auto"),
    ),
    "float32": (LLAMA | {"torch_dtype": "float32"}, ("float32", "--dtype bfloat16 or float16")),
}


@pytest.fixture(scope="module")
def boots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of an engine on each tiny model, and of one that is supported."""
    models = tmp_path_factory.mktemp("models")
    configs = {name: config for name, (config, _) in TINY_MODELS.items()} | {"supported": LLAMA}
    for name, config in configs.items():
        folder = models / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        # Left to itself, vLLM serves a float32 checkpoint in bfloat16.
        (folder / "dtype").write_text(config["torch_dtype"])
    return engine_runs.run("boots", MODELS=str(models))


def log_of(boots: dict[str, Any], name: str) -> str:
    return boots["log"].split(f"booting {name}\n")[1].split("\nbooting ")[0]


@pytest.mark.slow
def test_a_supported_tiny_model_boots(boots: dict[str, Any]) -> None:
    assert boots["supported"] is None
    assert "KV cache size" in log_of(boots, "supported")


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY_MODELS)
def test_an_engine_refuses_the_model_before_it_allocates(boots: dict[str, Any], name: str) -> None:
    assert boots[name] is not None
    (sentence,) = [line for line in boots[name].splitlines() if "--kv-cache-dtype" in line]
    assert_one_sentence(sentence, *TINY_MODELS[name][1])
    assert "KV cache size" not in log_of(boots, name)
