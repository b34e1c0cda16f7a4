"""Tiny models of many architectures: config.json, the probe's tokenizer, and weights that vLLM makes itself.

`write(name, folder)` makes a folder that vLLM and `polarquant check` read. Its weights come from a loader
(`register_loader`, load_format LOAD_FORMAT) that draws every parameter by its name, so that they are the same
in each engine and no checkpoint's names need be known. They are of such a size that attention decides which
token comes next.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_polarquant.eval.probe import episodes

LOAD_FORMAT = "tiny"
WINDOW = 64
MAX_MODEL_LEN = 256
VOCABULARY = 4096

Config = dict[str, Any]


@dataclass(frozen=True)
class Tiny:
    """One model.

    family: as people call it.
    config: the object of config.json.
    dtype: float16, whose logits seldom tie, where vLLM serves the family in it.
    options: more of vLLM's EngineArgs that it needs.
    """

    family: str
    config: Config
    dtype: str = "float16"
    options: dict[str, Any] = field(default_factory=dict)


_LLAMA: Config = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
_FULL_AND_WINDOWS = ["sliding_attention", "full_attention"] * 2
_EXPERTS: Config = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
_LATENT: Config = {
    "q_lora_rank": 64,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
}
_GPT: Config = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
_LINEAR_ATTENTION: Config = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_MAMBA2: Config = {
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_d_state": 64,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 64,
}


def _of(architecture: str, model_type: str, base: Config = _LLAMA, /, **changes: Any) -> Config:
    config = base | {"architectures": [architecture], "model_type": model_type} | changes
    return {name: value for name, value in config.items() if value is not ...}


MODELS: dict[str, Tiny] = {
    "llama": Tiny("Llama", _of("LlamaForCausalLM", "llama")),
    "llama-head-256": Tiny("Llama, head_dim 256", _of("LlamaForCausalLM", "llama", head_dim=256)),
    "llama-head-160": Tiny("Llama, head_dim 160", _of("LlamaForCausalLM", "llama", head_dim=160)),
    "llama-head-scales": Tiny(
        "Llama with KV scales per head",
        _of(
            "LlamaForCausalLM",
            "llama",
            quantization_config={
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
            },
        ),
    ),
    "llama-skips": Tiny(
        "Llama, --kv-cache-dtype-skip-layers 0",
        _of("LlamaForCausalLM", "llama"),
        options={"kv_cache_dtype_skip_layers": ["0"]},
    ),
    "llama-skips-all": Tiny(
        "Llama, --kv-cache-dtype-skip-layers 0 1 2 3",
        _of("LlamaForCausalLM", "llama"),
        options={"kv_cache_dtype_skip_layers": ["0", "1", "2", "3"]},
    ),
    "llama4": Tiny(
        "Llama 4 (text)",
        _of(
            "Llama4ForCausalLM",
            "llama4_text",
            intermediate_size_mlp=256,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=2,
            attention_chunk_size=128,
            no_rope_layers=[1, 1, 1, 0],
            layer_types=["chunked_attention"] * 3 + ["full_attention"],
            use_qk_norm=True,
        ),
    ),
    "mistral": Tiny("Mistral (window)", _of("MistralForCausalLM", "mistral", sliding_window=WINDOW)),
    "mistral-idle-window": Tiny(
        "Mistral (window longer than requests)", _of("MistralForCausalLM", "mistral", sliding_window=4096)
    ),
    "ministral3": Tiny("Ministral 3", _of("MistralForCausalLM", "ministral3", sliding_window=None)),
    "mixtral": Tiny(
        "Mixtral", _of("MixtralForCausalLM", "mixtral", num_local_experts=4, sliding_window=None)
    ),
    "qwen2": Tiny("Qwen2, Qwen2.5", _of("Qwen2ForCausalLM", "qwen2")),
    "qwen2-window": Tiny(
        "Qwen2 with use_sliding_window",
        _of(
            "Qwen2ForCausalLM",
            "qwen2",
            use_sliding_window=True,
            sliding_window=WINDOW,
            max_window_layers=0,
        ),
    ),
    "qwen2-moe": Tiny(
        "Qwen2-MoE",
        _of(
            "Qwen2MoeForCausalLM",
            "qwen2_moe",
            **_EXPERTS,
            shared_expert_intermediate_size=128,
            decoder_sparse_step=1,
            mlp_only_layers=[],
        ),
    ),
    "qwen3": Tiny("Qwen3", _of("Qwen3ForCausalLM", "qwen3")),
    "qwen3-moe": Tiny(
        "Qwen3-MoE",
        _of("Qwen3MoeForCausalLM", "qwen3_moe", **_EXPERTS, decoder_sparse_step=1, mlp_only_layers=[]),
    ),
    "qwen3-next": Tiny(
        "Qwen3-Next",
        _of(
            "Qwen3NextForCausalLM",
            "qwen3_next",
            **_EXPERTS,
            **_LINEAR_ATTENTION,
            shared_expert_intermediate_size=128,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            layer_types=["linear_attention"] * 3 + ["full_attention"],
            partial_rotary_factor=0.5,
        ),
        "bfloat16",
    ),
    "qwen3.5": Tiny(
        "Qwen3.5",
        _of(
            "Qwen3_5ForCausalLM",
            "qwen3_5_text",
            **_LINEAR_ATTENTION,
            layer_types=["linear_attention"] * 3 + ["full_attention"],
        ),
        "bfloat16",
    ),
    "gemma": Tiny("Gemma", _of("GemmaForCausalLM", "gemma", hidden_act="gelu_pytorch_tanh")),
    "gemma2": Tiny(
        "Gemma 2",
        _of(
            "Gemma2ForCausalLM",
            "gemma2",
            sliding_window=WINDOW,
            layer_types=_FULL_AND_WINDOWS,
            query_pre_attn_scalar=64,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=30.0,
            hidden_activation="gelu_pytorch_tanh",
        ),
        "bfloat16",
    ),
    "gemma3": Tiny(
        "Gemma 3 (text)",
        _of(
            "Gemma3ForCausalLM",
            "gemma3_text",
            sliding_window=WINDOW,
            layer_types=_FULL_AND_WINDOWS,
            query_pre_attn_scalar=64,
            hidden_activation="gelu_pytorch_tanh",
        ),
        "bfloat16",
    ),
    "gemma3n": Tiny(
        "Gemma 3n (text)",
        _of(
            "Gemma3nForCausalLM",
            "gemma3n_text",
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"] * 3,
            num_hidden_layers=6,
            num_kv_shared_layers=2,
            intermediate_size=[256] * 6,
            activation_sparsity_pattern=[0.0] * 6,
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=32,
            altup_num_inputs=2,
            laurel_rank=16,
            hidden_activation="gelu_pytorch_tanh",
        ),
    ),
    "gemma4": Tiny(
        "Gemma 4 (text)",
        _of(
            "Gemma4ForCausalLM",
            "gemma4_text",
            sliding_window=WINDOW,
            layer_types=_FULL_AND_WINDOWS,
            head_dim=256,
            global_head_dim=512,
            num_kv_shared_layers=0,
            hidden_size_per_layer_input=0,
            vocab_size_per_layer_input=VOCABULARY,
            hidden_activation="gelu_pytorch_tanh",
        ),
    ),
    "phi": Tiny(
        "Phi 1 and 2",
        _of("PhiForCausalLM", "phi", partial_rotary_factor=0.5, hidden_act="gelu_new", num_key_value_heads=4),
    ),
    "phi3": Tiny("Phi-3 (window)", _of("Phi3ForCausalLM", "phi3", sliding_window=WINDOW)),
    "phimoe": Tiny(
        "Phi-3.5-MoE",
        _of("PhiMoEForCausalLM", "phimoe", num_local_experts=4, attention_bias=True, lm_head_bias=True),
    ),
    "glm": Tiny("GLM-4 9B", _of("GlmForCausalLM", "glm", attention_bias=True, partial_rotary_factor=0.5)),
    "glm4": Tiny(
        "GLM-4 0414",
        _of("Glm4ForCausalLM", "glm4", attention_bias=True, partial_rotary_factor=0.5),
        "bfloat16",
    ),
    "glm4-moe": Tiny(
        "GLM-4.5",
        _of(
            "Glm4MoeForCausalLM",
            "glm4_moe",
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=128,
            n_shared_experts=1,
            first_k_dense_replace=1,
            partial_rotary_factor=0.5,
            use_qk_norm=True,
        ),
    ),
    "olmo": Tiny("OLMo", _of("OlmoForCausalLM", "olmo")),
    "olmo2": Tiny("OLMo 2", _of("Olmo2ForCausalLM", "olmo2")),
    "olmo3": Tiny(
        "OLMo 3",
        _of("Olmo3ForCausalLM", "olmo3", sliding_window=WINDOW, layer_types=_FULL_AND_WINDOWS),
    ),
    "olmoe": Tiny("OLMoE", _of("OlmoeForCausalLM", "olmoe", num_experts=4, num_experts_per_tok=2)),
    "exaone4": Tiny(
        "EXAONE 4",
        _of(
            "Exaone4ForCausalLM",
            "exaone4",
            sliding_window=WINDOW,
            sliding_window_pattern=2,
            layer_types=_FULL_AND_WINDOWS,
        ),
    ),
    "cohere": Tiny("Command R", _of("CohereForCausalLM", "cohere", logit_scale=1.0, layer_norm_eps=1e-5)),
    "cohere2": Tiny(
        "Command A, R7B",
        _of(
            "Cohere2ForCausalLM",
            "cohere2",
            logit_scale=1.0,
            layer_norm_eps=1e-5,
            sliding_window=WINDOW,
            layer_types=_FULL_AND_WINDOWS,
        ),
    ),
    "granite": Tiny("Granite 3", _of("GraniteForCausalLM", "granite", attention_multiplier=0.125)),
    "granite-moe": Tiny(
        "Granite 3 MoE",
        _of(
            "GraniteMoeForCausalLM",
            "granitemoe",
            attention_multiplier=0.125,
            num_local_experts=4,
            num_experts_per_tok=4,  # as DBRX's
        ),
    ),
    "granite-hybrid": Tiny(
        "Granite 4",
        _of(
            "GraniteMoeHybridForCausalLM",
            "granitemoehybrid",
            **_MAMBA2,
            attention_multiplier=0.125,
            layer_types=["mamba", "mamba", "mamba", "attention"],
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=128,
        ),
    ),
    "nemotron": Tiny("Nemotron", _of("NemotronForCausalLM", "nemotron", hidden_act="relu2", norm_eps=1e-5)),
    "nemotron-h": Tiny(
        "Nemotron-H",
        _of(
            "NemotronHForCausalLM",
            "nemotron_h",
            hybrid_override_pattern="M*M-",
            attention_head_dim=64,
            mamba_num_heads=8,
            mamba_head_dim=64,
            ssm_state_size=64,
            n_groups=1,
            conv_kernel=4,
            chunk_size=64,
            mlp_hidden_act="relu2",
        ),
    ),
    "falcon-h1": Tiny(
        "Falcon-H1",
        _of("FalconH1ForCausalLM", "falcon_h1", **_MAMBA2, mamba_d_ssm=512, mamba_rms_norm=False),
    ),
    "lfm2": Tiny(
        "LFM2",
        _of(
            "Lfm2ForCausalLM",
            "lfm2",
            layer_types=["conv", "conv", "full_attention", "conv"],
            conv_L_cache=3,
            conv_bias=False,
            conv_dim=256,
            conv_dim_out=256,
            block_dim=256,
            block_ff_dim=256,
            block_multiple_of=64,
            block_ffn_dim_multiplier=1.0,
            norm_eps=1e-5,
            block_auto_adjust_ff_dim=False,
        ),
    ),
    "jamba": Tiny(
        "Jamba",
        _of(
            "JambaForCausalLM",
            "jamba",
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=4,
            num_experts_per_tok=2,
            mamba_d_state=16,
            mamba_d_conv=4,
            mamba_expand=2,
            mamba_dt_rank=16,
        ),
    ),
    "mamba2": Tiny(
        "Mamba 2",
        _of(
            "Mamba2ForCausalLM",
            "mamba2",
            state_size=64,
            num_heads=4,
            head_dim=64,
            n_groups=1,
            chunk_size=64,
            expand=1,
            conv_kernel=4,
        ),
    ),
    "stablelm": Tiny(
        "StableLM", _of("StableLmForCausalLM", "stablelm", partial_rotary_factor=0.25, layer_norm_eps=1e-5)
    ),
    "starcoder2": Tiny(
        "StarCoder2 (window)",
        _of("Starcoder2ForCausalLM", "starcoder2", sliding_window=WINDOW, hidden_act="gelu_pytorch_tanh"),
    ),
    "gpt2": Tiny(
        "GPT-2",
        _of("GPT2LMHeadModel", "gpt2", _GPT, n_embd=256, n_head=4, n_layer=4, n_positions=512, n_inner=256),
    ),
    "gpt-neox": Tiny(
        "GPT-NeoX, Pythia",
        _of(
            "GPTNeoXForCausalLM",
            "gpt_neox",
            head_dim=...,
            num_key_value_heads=...,
            rotary_pct=0.25,
            hidden_act="gelu",
        ),
    ),
    "gpt-j": Tiny(
        "GPT-J",
        _of("GPTJForCausalLM", "gptj", _GPT, n_embd=256, n_head=4, n_layer=4, n_positions=512, rotary_dim=32),
    ),
    "opt": Tiny(
        "OPT",
        _of(
            "OPTForCausalLM",
            "opt",
            _GPT,
            hidden_size=256,
            word_embed_proj_dim=256,
            ffn_dim=256,
            num_attention_heads=4,
            num_hidden_layers=4,
            max_position_embeddings=512,
        ),
    ),
    "bloom": Tiny("BLOOM", _of("BloomForCausalLM", "bloom", _GPT, hidden_size=256, n_head=4, n_layer=4)),
    "falcon": Tiny(
        "Falcon",
        _of(
            "FalconForCausalLM",
            "falcon",
            _GPT,
            hidden_size=256,
            num_attention_heads=4,
            num_hidden_layers=4,
            num_kv_heads=2,
            new_decoder_architecture=True,
            max_position_embeddings=512,
        ),
    ),
    "dbrx": Tiny(
        "DBRX",
        _of(
            "DbrxForCausalLM",
            "dbrx",
            _GPT,
            d_model=256,
            n_heads=4,
            n_layers=4,
            max_seq_len=512,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
            # All experts, as near-ties between them would decide tokens too.
            ffn_config={"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 4},
        ),
    ),
    "minicpm3": Tiny(
        "MiniCPM3",
        _of(
            "MiniCPM3ForCausalLM",
            "minicpm3",
            **_LATENT | {"qk_nope_head_dim": 32, "qk_rope_head_dim": 32},
            scale_emb=1,
            dim_model_base=256,
            scale_depth=1.4,
            num_key_value_heads=4,
        ),
    ),
    "minimax-m2": Tiny(
        "MiniMax-M2",
        _of(
            "MiniMaxM2ForCausalLM",
            "minimax_m2",
            num_local_experts=4,
            num_experts_per_tok=2,
            rotary_dim=32,
            use_qk_norm=True,
            qk_norm_type="per_layer",
            scoring_func="softmax",
        ),
    ),
    "deepseek-v2": Tiny(
        "DeepSeek V2 (MLA)",
        _of(
            "DeepseekV2ForCausalLM",
            "deepseek_v2",
            **_LATENT | {"kv_lora_rank": 512},
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            topk_method="greedy",
            num_experts_per_tok=2,
            moe_intermediate_size=128,
            n_shared_experts=1,
            first_k_dense_replace=1,
            num_key_value_heads=4,
            head_dim=...,
        ),
    ),
    "gpt-oss": Tiny(
        "gpt-oss",
        _of(
            "GptOssForCausalLM",
            "gpt_oss",
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=WINDOW,
            layer_types=_FULL_AND_WINDOWS,
            quantization_config=...,
        ),
    ),
    "mimo": Tiny("MiMo", _of("MiMoForCausalLM", "qwen2")),
    "mimo-v2": Tiny(
        "MiMo V2",
        _of(
            "MiMoV2FlashForCausalLM",
            "mimo_v2_flash",
            head_dim=192,
            v_head_dim=128,
            swa_head_dim=192,
            swa_v_head_dim=128,
            swa_num_attention_heads=4,
            swa_num_key_value_heads=2,
            sliding_window=WINDOW,
            hybrid_layer_pattern=[0, 1, 0, 1],
            layer_types=["full_attention", "sliding_attention"] * 2,
            moe_layer_freq=[0, 0, 0, 0],
            add_swa_attention_sink_bias=True,
            partial_rotary_factor=0.334,
            layernorm_epsilon=1e-5,
            sliding_window_size=WINDOW,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=128,
        ),
        "bfloat16",
    ),
    "ernie": Tiny("ERNIE 4.5", _of("Ernie4_5ForCausalLM", "ernie4_5", use_bias=False)),
    "ernie-moe": Tiny(
        "ERNIE 4.5 MoE",
        _of(
            "Ernie4_5_MoeForCausalLM",
            "ernie4_5_moe",
            moe_num_experts=4,
            moe_k=2,
            moe_intermediate_size=128,
            moe_num_shared_experts=1,
            moe_layer_start_index=1,
            moe_layer_interval=1,
            use_bias=False,
        ),
    ),
    "hunyuan": Tiny("Hunyuan", _of("HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense", use_qk_norm=True)),
    "hunyuan-moe": Tiny(
        "Hunyuan MoE",
        _of(
            "HunYuanMoEV1ForCausalLM",
            "hunyuan_v1_moe",
            num_experts=4,
            moe_topk=2,
            moe_intermediate_size=128,
            use_qk_norm=True,
        ),
    ),
    "seed-oss": Tiny("Seed-OSS", _of("SeedOssForCausalLM", "seed_oss")),
    "smollm3": Tiny("SmolLM3", _of("SmolLM3ForCausalLM", "smollm3", no_rope_layers=[1, 1, 1, 0])),
    "arcee": Tiny("Arcee", _of("ArceeForCausalLM", "arcee", hidden_act="relu2")),
    "apertus": Tiny("Apertus", _of("ApertusForCausalLM", "apertus", hidden_act="xielu"), "bfloat16"),
    "step3.5": Tiny(
        "Step 3.5",
        _of(
            "Step3p5ForCausalLM",
            "step3p5",
            num_attention_groups=2,
            sliding_window=WINDOW,
            layer_types=_FULL_AND_WINDOWS,
            moe_layers_enum="3",
            moe_num_experts=4,
            moe_top_k=2,
            moe_intermediate_size=128,
            share_expert_dim=128,
        ),
    ),
    "afmoe": Tiny(
        "AFM (Trinity)",
        _of(
            "AfmoeForCausalLM",
            "afmoe",
            **_EXPERTS,
            num_shared_experts=1,
            score_func="sigmoid",
            route_norm=True,
            route_scale=1.0,
            mup_enabled=False,
            n_group=1,
            topk_group=1,
            num_dense_layers=1,
            sliding_window=WINDOW,
            global_attn_every_n_layers=2,
            layer_types=_FULL_AND_WINDOWS,
        ),
    ),
    "lfm2-moe": Tiny(
        "LFM2-MoE",
        _of(
            "Lfm2MoeForCausalLM",
            "lfm2_moe",
            **_EXPERTS,
            num_dense_layers=1,
            layer_types=["conv", "conv", "full_attention", "conv"],
            conv_L_cache=3,
            conv_bias=False,
        ),
    ),
    "bert": Tiny(
        "BERT",
        _of(
            "BertModel",
            "bert",
            _GPT,
            hidden_size=256,
            intermediate_size=256,
            num_attention_heads=4,
            num_hidden_layers=4,
            max_position_embeddings=512,
            type_vocab_size=2,
        ),
        options={"runner": "pooling"},
    ),
    "olmo-hybrid": Tiny(
        "OLMo Hybrid",
        _of(
            "OlmoHybridForCausalLM",
            "olmo_hybrid",
            **_LINEAR_ATTENTION,
            layer_types=["linear_attention"] * 3 + ["full_attention"],
        ),
        "bfloat16",
    ),
}


def write(name: str, folder: Path) -> Path:
    """Write a model's folder below `folder` and return its path."""
    model = folder / name
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(MODELS[name].config, indent=2))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(episodes.MODEL_DIR / file, model / file)
    return model


def register_loader() -> None:
    """Make LOAD_FORMAT known to vLLM in this process."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class Loader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            pass

        def load_weights(self, model: Any, model_config: Any) -> None:
            done = set()
            for prefix, module in model.named_modules():
                for name, parameter in module.named_parameters(recurse=False):
                    if id(parameter) not in done:  # embeddings may be tied
                        _fill(f"{prefix}.{name}", type(module).__name__, type(model).__name__, parameter.data)
                    done.add(id(parameter))

    register_model_loader(LOAD_FORMAT)(Loader)


def _fill(name: str, module: str, model: str, parameter: Any) -> None:
    """Draw a parameter, seeded by its name."""
    import torch

    if not parameter.is_floating_point():
        return
    seed = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(parameter.shape, generator=seed)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "A":  # of Mamba's states, as vLLM keeps it
        value = -(1 + noise.abs())
    elif leaf == "A_log":
        value = noise.abs()
    elif parameter.dim() > 1:
        gain = 2 if "LMHead" in module else 0.5 if "Embed" in module else 1.4
        value = gain * noise / math.sqrt(parameter.shape[-1])
    elif leaf == "bias" or leaf == "sinks" or leaf == "dt_bias" or "Gemma" in module:
        value = 0.1 * noise
    else:
        value = 1 + 0.1 * noise
        if "Gemma4" in model and name.endswith(("q_norm.weight", "k_norm.weight")):
            value *= 0.3  # these alone scale its logits
    parameter.copy_(value)
