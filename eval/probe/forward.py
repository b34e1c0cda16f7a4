"""The probe's forward pass in plain torch, its keys and values stored in any way: no engine, no pages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from vllm_polarquant.eval.probe.episodes import MODEL_DIR

Store = Callable[[torch.Tensor], torch.Tensor]
"""What is read back for keys or values float32 [T, kv heads, d], in that shape."""


def _exact(x: torch.Tensor) -> torch.Tensor:
    return x


def forward(
    tokens: list[int], key: Store = _exact, value: Store = _exact, model: Path = MODEL_DIR
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run tokens, every one of which attends to stored keys and values, its own among them.

    Args:
        key, value: how those of each layer are stored; keys with their rotary embedding.
        model: a folder of the probe's shape, with biases or not.

    Returns:
        Next-token log-probabilities float32 [T, vocabulary], and each layer's exact keys [T, kv heads, d].
    """
    config = json.loads((model / "config.json").read_text())
    weights = {name: tensor.float() for name, tensor in load_file(str(model / "model.safetensors")).items()}
    keys: list[torch.Tensor] = []
    heads, kv_heads, d = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]) * weight

    turn = config["rope_theta"] ** (-torch.arange(0, d, 2) / d) * torch.arange(len(tokens))[:, None]
    cos, sin = turn.cos()[:, None], turn.sin()[:, None]

    def rope(x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, -1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)

    x = weights["model.embed_tokens.weight"][tokens]
    causal = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    for layer in range(config["num_hidden_layers"]):

        def project(name: str, y: torch.Tensor, layer: int = layer) -> torch.Tensor:
            out = y @ weights[f"model.layers.{layer}.{name}.weight"].T
            return out + weights.get(f"model.layers.{layer}.{name}.bias", 0)

        h = norm(x, weights[f"model.layers.{layer}.input_layernorm.weight"])
        q = rope(project("self_attn.q_proj", h).unflatten(-1, (heads, d)))
        k = rope(project("self_attn.k_proj", h).unflatten(-1, (kv_heads, d)))
        v = project("self_attn.v_proj", h).unflatten(-1, (kv_heads, d))
        keys.append(k)
        k, v = (read.repeat_interleave(heads // kv_heads, 1) for read in (key(k), value(v)))
        logits = torch.einsum("qhd,khd->hqk", q, k) * d**-0.5
        mixed = torch.einsum("hqk,khd->qhd", logits.masked_fill(~causal, -torch.inf).softmax(-1), v)
        x = x + project("self_attn.o_proj", mixed.flatten(1))
        h = norm(x, weights[f"model.layers.{layer}.post_attention_layernorm.weight"])
        gated = torch.nn.functional.silu(project("mlp.gate_proj", h)) * project("mlp.up_proj", h)
        x = x + project("mlp.down_proj", gated)
    logits = norm(x, weights["model.norm.weight"]) @ weights["model.embed_tokens.weight"].T
    return logits.log_softmax(-1), keys
