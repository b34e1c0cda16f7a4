"""The rules of support: each is hit by what vLLM says of a layer or a model, and its way out is sound."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import KVTransferConfig, VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_polarquant import dry_run, support
from vllm_polarquant.format import HEAD_DIMS, PRESETS
from vllm_polarquant.page import BLOCK_SIZE_MULTIPLE
from vllm_polarquant.plugin import register
from vllm_polarquant.support import RULES, Hit, Refused

PRESET = "polarquant_k4v4"
ROOT = Path(__file__).parents[1]

# What a test of this file has seen refused, and with what is advised instead, served.
seen: set[str] = set()
tried: set[str] = set()


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register()


def selector(**changes: Any) -> AttentionSelectorConfig:
    layer = {"head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": PRESET, "block_size": None}
    return AttentionSelectorConfig(**(layer | changes))


def refusal(check: Callable[..., None], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(Refused) as refused:
        check(*args, **kwargs)
    assert refused.value.hit is not None
    seen.add(refused.value.hit.rule.feature)
    sentence = str(refused.value)
    assert sentence.startswith(f"--kv-cache-dtype {PRESET} does not support ")
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert "; " in sentence
    assert "{" not in sentence.replace('{"kv_cache_dtype"', "")
    return sentence


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("head_size", HEAD_DIMS)
def test_an_ordinary_layer_is_served(preset: str, head_size: int) -> None:
    config = VllmConfig()
    support.check_selector(
        selector(kv_cache_dtype=preset, head_size=head_size, block_size=32), config, current_platform
    )
    support.check_layer(
        preset,
        alibi_slopes=None,
        logits_soft_cap=50.0,
        sliding_window=128,
        kv_sharing_target_layer_name="model.layers.0",
        chunk_lookback=-1,
        sinks=torch.zeros(4),
    )
    support.check_spec(preset, head_size, head_size)
    support.check_draft_tokens(preset, 16, 16)


SELECTED = [rule for rule in RULES if rule.selector]
SERVED_FLAGS = ("has_sliding_window", "has_sink")


@pytest.mark.parametrize("flag", SERVED_FLAGS)
def test_windows_and_sinks_are_served(flag: str) -> None:
    support.check_selector(selector(**{flag: True}), VllmConfig())


@pytest.mark.parametrize("rule", SELECTED, ids=lambda rule: rule.feature)
def test_a_field_of_vllms_selector_is_refused_by_its_rule(rule: support.Rule) -> None:
    sentence = refusal(support.check_selector, selector(**{rule.selector: True}))
    assert rule.what in sentence
    assert rule.way_out in sentence


def test_every_flag_of_vllms_selector_is_refused_or_known_to_be_harmless() -> None:
    flags = {name for name, default in AttentionSelectorConfig._field_defaults.items() if default is False}
    assert flags - {rule.selector for rule in SELECTED} == {"use_kv_connector", *SERVED_FLAGS}


def test_fast_prefill_is_refused() -> None:
    """Its batches hold a request's last tokens alone."""
    config = VllmConfig()
    config.cache_config.kv_sharing_fast_prefill = True
    assert "leave it out" in refusal(support.check_selector, selector(), config)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"attn_type": "encoder_only"}, ["encoder or cross attention (encoder_only)"]),
        ({"dtype": torch.float32}, ["a model in float32", "--dtype bfloat16 or float16"]),
        ({"head_size": 48}, ["head_dim 48", "64, 80, 96, 112, 128, 192, 256, 512"]),
        ({"block_size": 24}, ["block size of 24", "pass --block-size 16"]),
    ],
)
def test_values_of_vllms_selector_are_refused_with_what_works(
    changes: dict[str, Any], parts: list[str]
) -> None:
    sentence = refusal(support.check_selector, selector(**changes))
    for part in parts:
        assert part in sentence


class Elsewhere:
    """A platform of which only what the rules ask is known."""

    device_name = "xpu"

    def __init__(self, capability: tuple[int, int] | None) -> None:
        self.capability = capability

    def is_cuda(self) -> bool:
        return self.capability is not None

    def is_cpu(self) -> bool:
        return False

    def get_device_capability(self) -> tuple[int, int] | None:
        return self.capability


def test_devices_are_refused_by_name() -> None:
    assert "capability 8.0" in refusal(support.check_selector, selector(), None, Elsewhere((7, 5)))
    assert "platform xpu" in refusal(support.check_selector, selector(), None, Elsewhere(None))
    support.check_selector(selector(), None, Elsewhere((8, 0)))
    support.check_selector(selector(), None, current_platform)
    tried.update((support.GPU.feature, support.PLATFORM.feature))


def with_connector(connector: str, **extra: str) -> VllmConfig:
    config = VllmConfig()
    config.kv_transfer_config = KVTransferConfig(
        kv_connector=connector, kv_role="kv_both", kv_connector_extra_config=extra
    )
    return config


def test_connectors_that_were_not_tried_are_refused() -> None:
    asked = selector(use_kv_connector=True)
    support.check_selector(asked, with_connector("OffloadingConnector"))
    support.check_selector(asked, with_connector("OffloadingConnector", spec_name="CPUOffloadingSpec"))
    for config in (
        with_connector("ExampleConnector"),
        with_connector("OffloadingConnector", spec_name="TieringSpec"),
    ):
        sentence = refusal(support.check_selector, asked, config)
        assert config.kv_transfer_config.kv_connector in sentence
        assert "use OffloadingConnector with CPUOffloadingSpec" in sentence


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"attn_type": "encoder_decoder"}, "cross attention (encoder_decoder)"),
        ({"chunk_lookback": 2}, "'chunk_lookback'"),
        ({"invented": torch.ones(2)}, "'invented'"),
    ],
)
def test_arguments_of_a_layer_are_refused(arguments: dict[str, Any], part: str) -> None:
    assert part in refusal(support.check_layer, PRESET, **arguments)


def test_a_skipped_layer_that_still_gets_the_backend_is_refused() -> None:
    with pytest.raises(Refused, match="leave them out of --kv-cache-dtype-skip-layers"):
        support.check_layer("auto")
    seen.add(support.SKIPPED_CHUNKS.feature)


def test_sizes_are_refused_with_their_numbers() -> None:
    assert "values of another size (64) than keys (128)" in refusal(support.check_spec, PRESET, 128, 64)
    sentence = refusal(support.check_draft_tokens, PRESET, 18, 16)
    assert "17 speculative tokens (at most 15)" in sentence
    support.check_draft_tokens(PRESET, 16, 16)
    tried.add(support.DRAFT_TOKENS.feature)


def test_the_draft_of_a_refused_model_can_stay_in_16_bits() -> None:
    """The advice of the rule for non-causal attention is JSON that vLLM's own field takes."""
    from vllm.config import SpeculativeConfig

    (advice,) = re.findall(r"'(\{.*?\})'", support.NON_CAUSAL.way_out)
    settings = json.loads(advice.replace(", ...", ""))
    assert set(settings) <= set(SpeculativeConfig.__dataclass_fields__)


def test_refusals_of_any_kind_are_one_sentence() -> None:
    for rule in RULES:
        values = dict.fromkeys(("value", "most", "key_size", "value_size"), 7)
        assert "{" not in str(support.refuse(PRESET, Hit(rule, values))).replace('{"kv_cache_dtype"', "")
    assert str(support.refuse(PRESET, "time travel", "wait")) == (
        f"--kv-cache-dtype {PRESET} does not support time travel; wait."
    )


@pytest.mark.parametrize(
    ("indices", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5], "0-2, 5"), ([7, 5, 6, 9], "5-7, 9")]
)
def test_ranges(indices: list[int], text: str) -> None:
    assert support.ranges(indices) == text


def test_skips_that_name_no_layer() -> None:
    assert support.unknown_skips(["0", "3", "sliding_window"], 4) == []
    assert support.unknown_skips(["4", "-1", "first", "0-1", "03"], 4) == ["4", "-1", "first", "0-1", "03"]


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 4,
    "max_position_embeddings": 512,
    "vocab_size": 128,
    "dtype": "bfloat16",
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
GEMMA = LLAMA | {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 64}
GEMMA3 = GEMMA | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "sliding_window": 64,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
}
# The last two layers read the caches of the first two.
GEMMA3N = LLAMA | {
    "architectures": ["Gemma3nForCausalLM"],
    "model_type": "gemma3n_text",
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "activation_sparsity_pattern": [0.0] * 4,
}
MLA = LLAMA | {
    "kv_lora_rank": 512,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
}
MAMBA = {
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}

# Layers that take the preset, of how many with a cache, beside how many states.
SERVED: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "Llama": (LLAMA, (4, 4, 0)),
    "Qwen2 with its window off": (
        LLAMA
        | {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "sliding_window": 128,
            "use_sliding_window": False,
        },
        (4, 4, 0),
    ),
    "Qwen2 whose window begins after the last layer": (
        LLAMA
        | {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "sliding_window": 128,
            "use_sliding_window": True,
            "max_window_layers": 4,
        },
        (4, 4, 0),
    ),
    "Mistral without a window": (MISTRAL | {"sliding_window": None}, (4, 4, 0)),
    "MiniCPM3, which keeps whole keys": (
        MLA
        | {
            "architectures": ["MiniCPM3ForCausalLM"],
            "model_type": "minicpm3",
            "num_key_value_heads": 4,
            "scale_emb": 1,
            "scale_depth": 1.0,
            "dim_model_base": 256,
        },
        (4, 4, 0),
    ),
    "Apertus, whose layers read numbers on being built": (
        LLAMA | {"architectures": ["ApertusForCausalLM"], "model_type": "apertus", "hidden_act": "xielu"},
        (4, 4, 0),
    ),
    "MiniMax M2": (
        LLAMA
        | {
            "architectures": ["MiniMaxM2ForCausalLM"],
            "model_type": "minimax_m2",
            "attn_type_list": [1] * 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rotary_dim": 32,
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
            "use_qk_norm": True,
        },
        (4, 4, 0),
    ),
    "Llama 4, chunked": (
        LLAMA
        | {
            "architectures": ["Llama4ForCausalLM"],
            "model_type": "llama4_text",
            "attention_chunk_size": 256,
            "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
            "num_local_experts": 2,
            "intermediate_size_mlp": 64,
            "interleave_moe_layer_step": 2,
        },
        (4, 4, 0),
    ),
    "Qwen3-Next": (
        LLAMA
        | {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
        (1, 1, 3),
    ),
    "Granite hybrid": (
        LLAMA
        | MAMBA
        | {
            "architectures": ["GraniteMoeHybridForCausalLM"],
            "model_type": "granitemoehybrid",
            "layer_types": ["mamba", "attention"] * 2,
            "num_local_experts": 0,
            "shared_intermediate_size": 64,
            "position_embedding_type": "rope",
        },
        (2, 2, 2),
    ),
    "Falcon-H1": (
        LLAMA
        | MAMBA
        | {"architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1", "mamba_d_ssm": 512},
        (4, 4, 4),
    ),
    "LFM2": (
        LLAMA
        | {
            "architectures": ["Lfm2ForCausalLM"],
            "model_type": "lfm2",
            "layer_types": ["conv", "conv", "full_attention", "conv"],
            "block_dim": 256,
            "conv_dim": 256,
            "block_ff_dim": 64,
        },
        (1, 1, 3),
    ),
    "gpt-oss, with sinks and windows": (
        LLAMA
        | {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        (4, 4, 0),
    ),
    "Gemma 2, with soft caps and windows": (
        GEMMA
        | {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 64,
        },
        (4, 4, 0),
    ),
    "Gemma 3 text": (GEMMA3, (4, 4, 0)),
    "Gemma 3n, two of whose layers have no cache": (GEMMA3N, (2, 2, 0)),
    "Mistral with a window in every layer": (MISTRAL | {"sliding_window": 64}, (4, 4, 0)),
    "Phi-3 with a window that no request reaches": (
        LLAMA
        | {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "sliding_window": 1024,
            "pad_token_id": 0,
        },
        (4, 4, 0),
    ),
    "Gemma 4 with two head_dims": (
        GEMMA
        | {
            "architectures": ["Gemma4ForCausalLM"],
            "model_type": "gemma4_text",
            "head_dim": 64,
            "global_head_dim": 128,
            "layer_types": ["full_attention"] * 4,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
        },
        (4, 4, 0),
    ),
}
# Features in the order of RULES, and the flags with which nothing is refused.
REFUSED: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "DeepSeek V2": (
        MLA
        | {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 4,
        },
        ["MLA"],
        [],
    ),
    "Falcon, whose layers vLLM gives no dtype": (
        {
            "architectures": ["FalconForCausalLM"],
            "model_type": "falcon",
            "hidden_size": 256,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "multi_query": True,
            "alibi": False,
            "vocab_size": 128,
            "dtype": "bfloat16",
        },
        ["no layer takes the dtype"],
        [],
    ),
    "BLOOM": (
        {
            "architectures": ["BloomForCausalLM"],
            "model_type": "bloom",
            "hidden_size": 256,
            "n_head": 4,
            "n_layer": 2,
            "vocab_size": 128,
            "dtype": "bfloat16",
        },
        ["ALiBi"],
        [],
    ),
    "an encoder": (
        LLAMA | {"architectures": ["BertModel"], "model_type": "bert", "type_vocab_size": 2},
        ["encoder or cross attention"],
        [],
    ),
    "head_dim 48": (LLAMA | {"head_dim": 48}, ["head_dim"], []),
    "MiMo V2, which brings a backend": (
        LLAMA
        | {
            "architectures": ["MiMoV2FlashForCausalLM"],
            "model_type": "mimo_v2_flash",
            "v_head_dim": 128,
            "hybrid_layer_pattern": [0] * 4,
            "moe_layer_freq": [0] * 4,
            "add_full_attention_sink_bias": True,
            "partial_rotary_factor": 0.5,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 64,
            "swa_v_head_dim": 128,
            "sliding_window_size": 64,
            "swa_rope_theta": 10000,
            "rope_theta": 10000,
            "layernorm_epsilon": 1e-5,
            "n_routed_experts": 4,
        },
        ["an attention backend of the model's own"],
        [],
    ),
    "PaliGemma": (
        {
            "architectures": ["PaliGemmaForConditionalGeneration"],
            "model_type": "paligemma",
            "dtype": "bfloat16",
            "hidden_size": 256,
            "image_token_index": 100,
            "text_config": {
                **{name: value for name, value in LLAMA.items() if name not in ("architectures", "dtype")},
                "model_type": "gemma",
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_attention_heads": 4,
                "num_hidden_layers": 1,
                "image_size": 28,
                "patch_size": 14,
                "projection_dim": 256,
            },
        },
        ["image prefix"],
        ["--language-model-only"],
    ),
    "R-SWA": (LLAMA | {"rswa_window": 64}, ["R-SWA"], []),
    "scales per head": (
        LLAMA
        | {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": {},
                "ignore": [],
                "kv_cache_scheme": {
                    "num_bits": 8,
                    "type": "float",
                    "strategy": "attn_head",
                    "symmetric": True,
                    "dynamic": False,
                },
            }
        },
        ["per-head KV scales"],
        [],
    ),
}


def explore(config: dict[str, Any], folder: Path, **options: Any) -> dry_run.Answer:
    (folder / "config.json").write_text(json.dumps(config))
    return dry_run.explore(folder, config, PRESET, options)


@pytest.mark.parametrize("name", SERVED)
def test_a_model_that_the_engine_serves_is_not_refused(name: str, tmp_path: Path) -> None:
    config, counts = SERVED[name]
    run = explore(config, tmp_path).run
    assert [found.hit.rule.feature for found in run.found] == []
    assert (len(run.quantised), len(run.layers), run.states) == counts
    assert not run.notes
    # Nor is it by config.json alone.
    assert list(support.config_hits(config, config)) == []


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_is_refused_for_all_its_reasons_and_the_ways_out_are_tried(name: str, tmp_path: Path) -> None:
    from vllm_polarquant.check import _flags

    config, features, flags = REFUSED[name]
    answer = explore(config, tmp_path)
    assert [found.hit.rule.feature for found in answer.run.found] == features
    assert [_flags(options) for options, _ in answer.ways_out] == flags
    seen.update(features)
    for _, run in answer.ways_out:
        assert run.quantised
    if not flags:
        # What is advised then is auto, of which no layer is this package's.
        run = dry_run.build(str(tmp_path), "auto", {})
        assert [found.hit.rule for found in run.found] == [support.NO_LAYER]
        assert not run.quantised and not run.notes
    tried.update(features)


# What a user sets that is refused, and what the refusal says to set instead.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], support.Rule, dict[str, Any]]] = {
    "float32": (LLAMA, {"dtype": "float32"}, support.DTYPE, {"dtype": "bfloat16"}),
    "blocks of 24": (LLAMA, {"block_size": 24}, support.BLOCK_SIZE, {"block_size": BLOCK_SIZE_MULTIPLE}),
    "decode context parallelism": (
        LLAMA,
        {"decode_context_parallel_size": 2, "tensor_parallel_size": 4},
        support.DCP,
        {"tensor_parallel_size": 4},
    ),
    "another connector": (
        LLAMA,
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        support.KV_CONNECTOR,
        {
            "kv_transfer_config": {
                "kv_connector": support.CONNECTOR,
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 20},
            }
        },
    ),
    "a skipped layer of chunks": (
        SERVED["Llama 4, chunked"][0],
        {"kv_cache_dtype_skip_layers": ["0"]},
        support.SKIPPED_CHUNKS,
        {},
    ),
    "one skipped layer of two": (
        GEMMA3N,
        {"kv_cache_dtype_skip_layers": ["1"]},
        support.SPLIT_SHARING,
        {"kv_cache_dtype_skip_layers": ["1", "3"]},
    ),
    "fast prefill": (GEMMA3N, {"kv_sharing_fast_prefill": True}, support.FAST_PREFILL, {}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_is_refused_and_what_is_advised_is_not(name: str, tmp_path: Path) -> None:
    config, options, rule, advised = OPTIONS[name]
    answer = explore(config, tmp_path, **options)
    assert [found.hit.rule for found in answer.run.found] == [rule]
    assert not explore(config, tmp_path, **advised).run.found
    seen.add(rule.feature)
    tried.add(rule.feature)
    if rule.options:
        assert [options for options, _ in answer.ways_out] == [advised]


def test_batch_invariant_mode_is_refused_and_without_it_nothing_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not explore(LLAMA, tmp_path).run.found
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert [found.hit.rule for found in explore(LLAMA, tmp_path).run.found] == [support.BATCH_INVARIANT]
    tried.add(support.BATCH_INVARIANT.feature)


def test_what_is_advised_for_options_of_other_devices_is_served(tmp_path: Path) -> None:
    """vLLM on a CPU has neither prefill context parallelism nor adaptive verification."""
    assert not explore(LLAMA, tmp_path, tensor_parallel_size=2).run.found
    tried.add(support.PCP.feature)
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    off = ngram | {"enable_adaptive_verification": False}
    assert not explore(LLAMA, tmp_path, speculative_config=off).run.found
    tried.add(support.ADAPTIVE_VERIFICATION.feature)


def test_a_model_that_is_not_causal_is_served_in_16_bits(tmp_path: Path) -> None:
    options = {"attention_config": {"use_non_causal": True}}
    assert [found.hit.rule for found in explore(LLAMA, tmp_path, **options).run.found] == [support.NON_CAUSAL]
    (found,) = dry_run.build(str(tmp_path), "auto", options).found
    assert found.hit.rule is support.NO_LAYER
    tried.add(support.NON_CAUSAL.feature)


def test_what_a_request_takes_is_counted_as_vllm_counts_it(tmp_path: Path) -> None:
    """Tests of models have the same of engines."""
    tokens, heads = 512, 2
    run = explore(LLAMA, tmp_path).run
    slots = {"auto": 256, "fp8": 128, PRESET: 68}
    assert run.request_bytes == {dtype: 4 * heads * tokens * slot for dtype, slot in slots.items()}
    # Pages of layers that differ are padded to the largest.
    skipped = explore(SERVED["Llama 4, chunked"][0], tmp_path, kv_cache_dtype_skip_layers=["3"]).run
    assert len(skipped.quantised) == 3
    assert skipped.request_bytes[PRESET] > 4 * heads * tokens * slots[PRESET]
    assert not explore(LLAMA | {"head_dim": 48}, tmp_path).run.request_bytes


def test_what_cannot_help_is_not_advised(tmp_path: Path) -> None:
    run = explore(LLAMA | {"head_dim": 48}, tmp_path, dtype="float32").run
    assert [found.hit.rule for found in run.found] == [support.HEAD_DIM, support.DTYPE]
    for found in run.found:
        assert "--dtype" not in found.hit.sentence(PRESET)


@pytest.mark.parametrize("skipped", [1, 3])
def test_layers_that_share_a_cache_are_skipped_together_or_not_at_all(skipped: int, tmp_path: Path) -> None:
    (found,) = explore(GEMMA3N, tmp_path, kv_cache_dtype_skip_layers=[str(skipped)]).run.found
    assert found.hit.rule is support.SPLIT_SHARING
    assert found.layers == [3]
    seen.add(found.hit.rule.feature)
    run = explore(GEMMA3N, tmp_path, kv_cache_dtype_skip_layers=["1", "3"]).run
    assert not run.found
    assert [layer.index for layer in run.quantised] == [0]


def test_layers_are_told_by_number(tmp_path: Path) -> None:
    (found,) = explore(LLAMA | {"head_dim": 48}, tmp_path).run.found
    assert found.layers == [0, 1, 2, 3]
    run = explore(GEMMA3, tmp_path, kv_cache_dtype_skip_layers=["sliding_window"]).run
    assert not run.found
    assert [layer.index for layer in run.quantised] == [3]
    run = explore(LLAMA, tmp_path, kv_cache_dtype_skip_layers=["0", "1", "2", "3"]).run
    assert [found.hit.rule for found in run.found] == [support.NO_LAYER]


def test_the_language_model_is_judged_where_the_whole_cannot_be_built(tmp_path: Path) -> None:
    text = {name: value for name, value in GEMMA3.items() if name not in ("architectures", "dtype")}
    config = {
        "architectures": ["NoSuchModelForConditionalGeneration"],
        "model_type": "gemma3",
        "dtype": "bfloat16",
        "text_config": text,
    }
    answer = explore(config, tmp_path)
    assert [found.hit.rule for found in answer.run.found] == [support.MM_PREFIX]
    assert any("only the language model" in note for note in answer.run.notes)
    assert [options for options, _ in answer.ways_out] == [{"language_model_only": True}]


def test_what_vllm_does_not_know_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(dry_run.NotBuilt) as why:
        explore(LLAMA | {"architectures": ["NoSuchModel"], "model_type": "no_such_model"}, tmp_path)
    assert "\n" not in str(why.value)
    assert "no_such_model" in str(why.value) or "NoSuchModel" in str(why.value)


def test_building_leaves_vllm_as_it_was(tmp_path: Path) -> None:
    from vllm.v1.attention import selector as module

    before = (module._cached_get_attn_backend, type(current_platform).get_attn_backend_cls)
    explore(LLAMA, tmp_path)
    assert (module._cached_get_attn_backend, type(current_platform).get_attn_backend_cls) == before


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"alibi": True}, "ALiBi"),
        ({"model_type": "bloom"}, "ALiBi"),
        ({"attn_config": {"alibi": True}}, "ALiBi"),
        ({"rswa_window": 128}, "R-SWA"),
        ({"index_topk": 2048}, "sparse attention"),
        ({"kv_lora_rank": 512}, "MLA"),
        ({"cross_attention_layers": [3]}, "encoder or cross attention"),
        ({"is_encoder_decoder": True}, "encoder or cross attention"),
    ],
)
def test_what_one_field_of_a_config_shows(changes: dict[str, Any], feature: str) -> None:
    config = LLAMA | changes
    (hit,) = support.config_hits(config, config)
    assert hit.rule.feature == feature
    assert hit.sentence(PRESET).endswith(".")
    seen.add(feature)


def test_every_rule_was_hit() -> None:
    if not seen:
        pytest.skip("of use after the other tests of this file alone")
    assert {rule.feature for rule in RULES} - seen == set()


UNTRIED = {
    "sparse attention": "vLLM's CPU build has none",
    "values of another size": "vLLM has no such model that does not bring a backend of its own",
    "another option of the attention": "RNJ-1 has one, and needs vLLM's Triton backend",
}


def test_every_way_out_was_tried() -> None:
    """As far as layers are built; engines boot in test_models.py and offload_runs.py."""
    if not tried:
        pytest.skip("of use after the other tests of this file alone")
    assert {rule.feature for rule in RULES} - tried == set(UNTRIED)


def between(path: Path, mark: str) -> str:
    text = path.read_text(encoding="utf-8")
    found = re.findall(rf"<!-- {mark} -->\n(.*?)\n<!-- /{mark} -->", text, re.DOTALL)
    assert len(found) == 1, f"{path.name} needs one <!-- {mark} --> ... <!-- /{mark} -->"
    return found[0].strip()


def test_readmes_table_is_printed_from_the_rules() -> None:
    """`polarquant support` prints it."""
    assert between(ROOT / "README.md", "support") == support.table()


def test_the_table_of_refusals_is_printed_from_the_rules() -> None:
    """`polarquant support --refused` prints it."""
    assert between(ROOT / "docs" / "troubleshooting.md", "refusals") == support.refusals()
