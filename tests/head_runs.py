"""Engines whose drafts come from a head on the target's hidden states: EAGLE, and MTP as MiMo has it.

The checkpoints are made here, of random weights, and so that a head drafts what its target would say: it has
the target's own layers, and takes of its input the token alone. Embeddings have RMS 1 and norms before and
after the layers have weight 1, so that it does not matter which of these a head leaves out. Only the first
tokens of a prompt are hidden from it, and attention prefers the last ones: what all embeddings have in common
is the same in keys and queries, and turned by RoPE. So most drafts are taken if the head's attention is
right, and not if it misses a token.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from engine_runs import EXACT, MODEL, _completions, _drafted, _engine, _generate, text_prompts
from gpu_runs import CAPTURED
from safetensors.torch import save_file
from tiny_models import VOCABULARY

from vllm_polarquant.format import LOSSLESS

HIDDEN, INNER, HEADS, KV_HEADS, DIM = 256, 256, 4, 2, 64
COMMON = 0.7
"""Of each element of an embedding, what all have."""

NEAREST, PAIRS = 8.0, 8
"""The logit of a token and itself, by as many pairs of RoPE, those that turn fastest."""

PRESET = "polarquant_k4v4"

Weights = dict[str, torch.Tensor]


def _config(architecture: str, model_type: str, layers: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "torch_dtype": "float16",
    } | more


def _matrix(rows: int, columns: int, gain: float, seed: torch.Generator) -> torch.Tensor:
    return gain * torch.randn(rows, columns, generator=seed) / columns**0.5


def _outside(seed: torch.Generator) -> Weights:
    """Embeddings, the last norm, and the matrix of logits."""
    embedding = torch.randn(VOCABULARY, HIDDEN, generator=seed)
    embedding -= embedding.mean(1, keepdim=True)
    embedding *= ((1 - COMMON**2) / embedding.square().mean(1, keepdim=True)).sqrt()
    embedding += COMMON
    return {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": _matrix(VOCABULARY, HIDDEN, 4, seed),
    }


def _layers(count: int, seed: torch.Generator) -> Weights:
    weights = {}
    one_head = torch.zeros(DIM)
    one_head[:PAIRS] = (NEAREST / PAIRS * DIM**0.5) ** 0.5
    for layer in range(count):
        for name, rows, columns, gain in (
            ("self_attn.q_proj", HEADS * DIM, HIDDEN, 1.0),
            ("self_attn.k_proj", KV_HEADS * DIM, HIDDEN, 1.0),
            ("self_attn.v_proj", KV_HEADS * DIM, HIDDEN, 1.4),
            ("self_attn.o_proj", HIDDEN, HEADS * DIM, 1.4),
            ("mlp.gate_proj", INNER, HIDDEN, 1.4),
            ("mlp.up_proj", INNER, HIDDEN, 1.4),
            ("mlp.down_proj", HIDDEN, INNER, 1.4),
        ):
            weights[f"layers.{layer}.{name}.weight"] = _matrix(rows, columns, gain, seed)
        for name, copies in (("q", HEADS), ("k", KV_HEADS)):
            weight = weights[f"layers.{layer}.self_attn.{name}_proj.weight"]
            weight += one_head.repeat(copies)[:, None] / (COMMON * HIDDEN)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"layers.{layer}.{name}.weight"] = torch.ones(HIDDEN)
    return weights


def _write(folder: Path, config: dict[str, Any], weights: Weights) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    halves = {name: tensor.half().contiguous() for name, tensor in weights.items()}
    save_file(halves, folder / "model.safetensors", {"format": "pt"})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(MODEL) / file, folder / file)
    return str(folder)


def _token_alone(token: slice) -> torch.Tensor:
    """Of a token's embedding and a hidden state, side by side, the embedding; token: where it stands."""
    weight = torch.zeros(HIDDEN, 2 * HIDDEN)
    weight[:, token] = torch.eye(HIDDEN)
    return weight


def eagle(folder: Path) -> tuple[str, dict[str, Any]]:
    """A Llama of two layers, and vLLM's speculative_config with a head of its layers."""
    seed = torch.Generator().manual_seed(0)
    layers = _layers(2, seed)
    target = _outside(seed) | {f"model.{name}": tensor for name, tensor in layers.items()}
    config = _config("LlamaForCausalLM", "llama", 2)
    # A head has no norm before its first layer.
    del layers["layers.0.input_layernorm.weight"]
    head = layers | {"fc.weight": _token_alone(slice(0, HIDDEN))}
    return (
        _write(folder / "target", config, target),
        {"method": "eagle", "model": _write(folder / "head", config, head)},
    )


def mtp(folder: Path) -> tuple[str, dict[str, Any]]:
    """A MiMo of one layer, which also predicts the token after the next, and its speculative_config."""
    seed = torch.Generator().manual_seed(0)
    layer = _layers(1, seed)
    for name, size in (("q", HEADS * DIM), ("k", KV_HEADS * DIM), ("v", KV_HEADS * DIM)):
        layer[f"layers.0.self_attn.{name}_proj.bias"] = 0.1 * torch.randn(size, generator=seed)
    weights = _outside(seed)
    for name, tensor in layer.items():
        weights[f"model.{name}"] = tensor
        weights[f"model.mtp_{name}"] = tensor.clone()
    head = "model.mtp_layers.0"
    weights[f"{head}.input_proj.weight"] = _token_alone(slice(HIDDEN, None))
    for name in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        weights[f"{head}.{name}.weight"] = torch.ones(HIDDEN)
    config = _config("MiMoForCausalLM", "qwen2", 1, num_nextn_predict_layers=1)
    return _write(folder / "target", config, weights), {"method": "mtp"}


HEADS_OF = {"eagle": eagle, "mtp": mtp}


def heads(method: str, count: int, captured: bool) -> dict[str, Any]:
    """Greedy tokens and drafts, `count` a step, of `auto`, 16-bit pages and codes; tokens of codes alone."""
    chars = (2, 150, 300, 900, 1700, 2500)
    prompts = [text[:length] for text, length in zip(text_prompts(6, 2500), chars, strict=True)]
    options = EXACT | {"max_model_len": 2048, **(CAPTURED if captured else {})}
    # A prompt in one chunk, as what a chunk reads of earlier ones is coded.
    options["max_num_batched_tokens"] = 8192
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model, speculative = HEADS_OF[method](Path(folder))
        speculative["num_speculative_tokens"] = count
        for dtype in ("auto", LOSSLESS, PRESET):
            with _engine(dtype, model=model, **options, speculative_config=speculative) as llm:
                found[dtype] = _drafted(llm, prompts, max_tokens=48, ignore_eos=True)
        with _engine(PRESET, model=model, **options) as llm:
            found["alone"] = _completions(_generate(llm, prompts, max_tokens=48, ignore_eos=True))
    return found
