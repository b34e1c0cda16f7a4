"""Whether the polar-coded cache can hold a model's keys and values, judged by its config.json.

Only the file is read: no weights (keys.py reads some), no network, no model code. The engine refuses the
same models by itself, with what vLLM knows of each layer; this module answers before anything is loaded.
Standard library only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_polarquant.format import (
    BLOCK_SIZE_MULTIPLE,
    DEFAULT_PRESET,
    PolarFormat,
    UnsupportedFormat,
)

USE_FP8 = "serve it with `--kv-cache-dtype fp8`"
USE_AUTO = "serve it with `--kv-cache-dtype auto`"

ENCODER = re.compile("bert|electra", re.IGNORECASE)
ENCODER_DECODER = {"bart", "cohere_asr", "mbart", "nemotron_parse", "t5", "whisper"}
ALIBI = {"bloom", "mpt", "step1"}
SINKS = {"gpt_oss", "openai_privacy_filter"}
RECURRENT = {
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "jamba",
    "kimi_linear",
    "mamba",
    "mamba2",
    "minimax",
    "minimax_text_01",
    "nemotron_h",
    "plamo2",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
    "zamba2",
}
SLIDING_ATTENTION = {"sliding_attention", "sliding_window", "sliding"}
# These two ignore `sliding_window` unless `use_sliding_window` is true.
OPT_IN_SLIDING = re.compile(r"qwen[23]")
# Attention in both directions between the tokens of an image.
IMAGE_PREFIX = {"bagel", "gemma3", "molmo2", "moondream3", "paligemma"}
TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")

# The names that configs use for one number, the usual one first.
HIDDEN_SIZE = ("hidden_size", "n_embd", "d_model")
NUM_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
NUM_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
NUM_KV_HEADS = (
    "num_key_value_heads",
    "n_head_kv",
    "num_kv_heads",
    "multi_query_group_num",
    "num_attention_groups",
)
HEAD_DIM = ("head_dim", "hidden_size_per_head", "attention_head_dim", "kv_channels")
DTYPE = ("dtype", "torch_dtype")
MAX_MODEL_LEN = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_sequence_length",
)


class ConfigError(ValueError):
    """A config.json that is missing, broken or does not say what is needed."""


@dataclass(frozen=True)
class Problem:
    """One reason why a model is refused.

    feature: a short name, such as ``sliding-window``.
    message: a sentence that names the feature and says what to do.
    """

    feature: str
    message: str


@dataclass(frozen=True)
class Shape:
    """What decides the size of a model's KV cache, and how many heads read it."""

    layers: int
    kv_heads: int
    head_dim: int
    max_model_len: int | None
    query_heads: int

    def token_bytes(self, kv_cache_dtype: str) -> int:
        """Bytes that one token takes in all layers: ``auto`` (16 bits), ``fp8`` or a preset."""
        if kv_cache_dtype == "auto":
            head = 4 * self.head_dim
        elif kv_cache_dtype == "fp8":
            head = 2 * self.head_dim
        else:
            head = PolarFormat(kv_cache_dtype, self.head_dim, BLOCK_SIZE_MULTIPLE).slot_bytes
        return self.layers * self.kv_heads * head


def read_config(model: Path) -> dict[str, Any]:
    """The config.json of a model folder, or the file itself.

    Raises:
        ConfigError: if there is none or it is not a JSON object.
    """
    path = model / "config.json" if model.is_dir() else model
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; pass the folder of a downloaded model or its config.json"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a JSON {type(config).__name__}, not an object")
    return config


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a multimodal config; the config itself for others."""
    for name in TEXT_CONFIGS:
        if isinstance(config.get(name), dict):
            return text_config(config[name])
    return config


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"config.json has {name} = {value!r}, not a positive whole number")
        if value:
            return value
    return None


def _needed(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    value = _first(config, names)
    if value is None:
        raise ConfigError(
            f"config.json does not say {names[0]}; write it out in full with transformers: "
            "AutoConfig.from_pretrained(model).to_json_file(path, use_diff=False)"
        )
    return value


def _list(config: Mapping[str, Any], name: str) -> list[Any]:
    value = config.get(name)
    if value is not None and not isinstance(value, list):
        raise ConfigError(f"config.json has {name} = {value!r}, not a list")
    return value or []


def _head_dim(text: Mapping[str, Any]) -> int:
    return _first(text, HEAD_DIM) or _needed(text, HIDDEN_SIZE) // _needed(text, NUM_HEADS)


def _kv_heads(text: Mapping[str, Any]) -> int:
    attention = text.get("attn_config")
    if isinstance(attention, dict) and attention.get("kv_n_heads"):  # DBRX
        return _needed(attention, ("kv_n_heads",))
    if text.get("multi_query") and not text.get("new_decoder_architecture"):  # Falcon, StarCoder
        return 1
    return _first(text, NUM_KV_HEADS) or _needed(text, NUM_HEADS)


def read_shape(config: Mapping[str, Any]) -> Shape:
    """Layers, heads and sizes of a config.

    Raises:
        ConfigError: if one is missing or not a number.
    """
    text = text_config(config)
    # Layers that share another layer's cache have none of their own (Gemma 3n).
    layers = _needed(text, NUM_LAYERS) - (_first(text, ("num_kv_shared_layers",)) or 0)
    lengths = [length for name in MAX_MODEL_LEN if (length := _first(text, (name,)))]
    kv_heads = _kv_heads(text)
    query_heads = _first(text, NUM_HEADS) or kv_heads
    return Shape(layers, kv_heads, _head_dim(text), min(lengths, default=None), query_heads)


def _sliding_layers(text: Mapping[str, Any], model_type: str) -> str | None:
    """Which layers attend to a window only, in words; None if none does."""
    if layer_types := _list(text, "layer_types"):
        sliding = sum(kind in SLIDING_ATTENTION for kind in layer_types)
        return f"{sliding} of {len(layer_types)} layers" if sliding else None
    window = text.get("sliding_window") or text.get("sliding_window_size")
    enabled = text.get("use_sliding_window", not OPT_IN_SLIDING.match(model_type))
    if not window or not enabled:
        return None
    if OPT_IN_SLIDING.match(model_type):
        # In Qwen's configs the window starts at layer max_window_layers.
        layers = _first(text, NUM_LAYERS) or 0
        full = _first(text, ("max_window_layers",)) or 0
        return f"{layers - full} of {layers} layers" if full < layers else None
    return "its layers"


def _recurrent(text: Mapping[str, Any], model_type: str) -> bool:
    kinds = _list(text, "layer_types") + _list(text, "layers_block_type")
    return (
        model_type in RECURRENT
        or any(re.search("mamba|linear|conv|recurrent", str(kind)) for kind in kinds)
        or any(text.get(name) for name in ("hybrid_override_pattern", "attn_type_list"))
        or any(text.get(name) for name in ("full_attn_idxs", "linear_attn_config", "ssm_cfg"))
    )


def check_config(config: Mapping[str, Any], preset: str = DEFAULT_PRESET) -> list[Problem]:
    """Why a model cannot be served with `preset`; empty if it can.

    Args:
        config: the object in config.json.
        preset: a key of format.PRESETS.

    Raises:
        ConfigError: if a field that decides is not of its type.
    """
    text = text_config(config)
    model_type = str(text.get("model_type") or config.get("model_type") or "").lower()
    outer_type = str(config.get("model_type") or "").lower()
    architectures = [str(name) for name in _list(config, "architectures")]
    problems: list[Problem] = []

    def refuse(feature: str, what: str, remedy: str = USE_FP8) -> None:
        problems.append(Problem(feature, f"{what}; {remedy}."))

    if ENCODER.search(model_type) or any(ENCODER.search(name) for name in architectures):
        refuse(
            "encoder-only",
            f"{', '.join(architectures) or model_type} is an encoder and keeps no KV cache",
            "serve it without a `--kv-cache-dtype`",
        )
        return problems
    if config.get("is_encoder_decoder") or ENCODER_DECODER & {model_type, outer_type}:
        refuse("encoder-decoder", "Encoder-decoder models need cross-attention", USE_AUTO)
    elif text.get("cross_attention_layers"):
        refuse("cross-attention", "Some layers use cross-attention to the image", USE_AUTO)
    elif text.get("use_bidirectional_attention") or text.get("is_causal") is False:
        refuse("bidirectional", "The model's attention is not causal", USE_AUTO)
    elif outer_type in IMAGE_PREFIX and "text_config" in config:
        refuse("image-prefix", "Image tokens attend to each other in both directions (mm-prefix)")

    if text.get("kv_lora_rank") or text.get("compress_ratios"):
        refuse("MLA", "The model uses multi-head latent attention (MLA), which has its own cache")
    elif text.get("v_head_dim") not in (None, text.get("head_dim")):
        refuse("v_head_dim", "Keys and values have different head sizes (v_head_dim)", USE_AUTO)
    if text.get("global_head_dim") not in (None, text.get("head_dim")):
        refuse("global_head_dim", "The layers have different head sizes (global_head_dim)")
    if text.get("index_topk"):
        refuse("sparse", "The model uses sparse attention (index_topk), which has its own cache")

    sinks = ("attention_sinks", "add_swa_attention_sink_bias", "add_full_attention_sink_bias")
    if (
        model_type in SINKS
        or any(text.get(name) for name in (*sinks, "swa_attention_sink_enabled"))
        or text.get("param_sink_number")
        # Granite's sliding checkpoints have sinks that no field names.
        or (model_type == "granite" and text.get("layer_types") and "attention_sinks" not in text)
    ):
        refuse("attention sinks", "The model uses attention sinks")

    attention = text.get("attn_config")
    if (
        model_type in ALIBI
        or text.get("alibi")
        or text.get("position_embedding_type") == "alibi"
        or (isinstance(attention, dict) and attention.get("alibi"))
    ):
        refuse("ALiBi", "The model adds ALiBi biases to its logits")
    if text.get("attn_logit_softcapping"):
        refuse(
            "soft-capped logits",
            f"Attention logits are soft-capped at {text['attn_logit_softcapping']}",
        )

    if layers := _sliding_layers(text, model_type):
        refuse(
            "sliding-window",
            f"Sliding-window attention in {layers} is not supported",
            f"{USE_FP8} or keep these layers in 16 bits with `--kv-cache-dtype-skip-layers sliding_window`",
        )
    if text.get("rswa_window"):
        refuse("R-SWA", "The model uses R-SWA attention windows")
    if text.get("attention_chunk_size") or "chunked_attention" in _list(text, "layer_types"):
        refuse("chunked attention", "Some layers attend within chunks (attention_chunk_size)")
    if _recurrent(text, model_type):
        refuse(
            "hybrid",
            "Some layers (Mamba, linear attention or convolution) hold a state and no KV cache, "
            "and hybrid models are not supported",
        )

    dtype = _dtype(config)
    # vLLM casts float32 checkpoints to 16 bits on its own.
    if dtype not in ("auto", "bfloat16", "float16", "half", "float32", "float"):
        refuse(
            "dtype",
            f"The model computes in {dtype}, not bfloat16 or float16",
            "pass `--dtype bfloat16`",
        )
    if not problems:
        try:
            PolarFormat(preset, _head_dim(text), BLOCK_SIZE_MULTIPLE)
        except UnsupportedFormat as error:
            message = str(error)
            refuse("head_dim", message[0].upper() + message[1:])
    return problems


def _dtype(config: Mapping[str, Any]) -> str:
    named = [part.get(name) for part in (text_config(config), config) for name in DTYPE]
    return next((str(dtype).removeprefix("torch.") for dtype in named if dtype), "auto")


def weight_bytes(model: Path, config: Mapping[str, Any]) -> int | None:
    """Bytes that a model folder's safetensors take once loaded; None if it holds none."""
    folder = model if model.is_dir() else model.parent
    found = list(folder.glob("*.safetensors"))
    # Mistral's repositories hold the weights twice.
    once = [path for path in found if not path.name.startswith("consolidated")] or found
    size = sum(path.stat().st_size for path in once)
    # vLLM loads float32 weights as 16-bit floats.
    return (size // 2 if _dtype(config) in ("float32", "float") else size) or None


def tokens_that_fit(shape: Shape, kv_cache_dtype: str, kv_bytes: int) -> int:
    """Tokens of whole blocks that fit in `kv_bytes`."""
    tokens = kv_bytes // shape.token_bytes(kv_cache_dtype)
    return tokens - tokens % BLOCK_SIZE_MULTIPLE
