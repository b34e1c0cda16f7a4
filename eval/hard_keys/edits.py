"""Edits that make a model's keys hard to quantise and leave what it computes in 16 bits as it was, or nearly.

`uneven` scales RoPE channel pairs of the keys and unscales the queries', `bias` adds a constant to the keys
before RoPE, `first-token` makes the first token's key many times longer than others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_polarquant.eval import results
from vllm_polarquant.eval.hard_keys.checkpoint import Checkpoint, EditError
from vllm_polarquant.eval.probe.episodes import load_episodes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

UNEVEN_SHARE = 16
"""One channel pair in so many is scaled."""

CALIBRATION_PROMPTS, CALIBRATION_TOKENS = 8, 512
"""Text that tells the first token's hidden state from the others'; none of it is measured on."""


def uneven(model: Checkpoint, layers: list[int], strength: float, generator: torch.Generator) -> None:
    """Scale random channel pairs of the keys by factors from strength^(2/3) to strength, 30: 9.7 to 30.

    Log-uniform, one a pair and kv head; the queries that read it are divided by the same. Both channels of a
    pair take one factor, so that RoPE, and with it every logit, stays as it was.
    """
    import torch

    half = model.head_dim // 2
    for layer in layers:
        scale = torch.ones(model.kv_heads, 1, model.head_dim)
        for head in range(model.kv_heads):
            pairs = torch.randperm(half, generator=generator)[: half // UNEVEN_SHARE]
            power = 2 / 3 + torch.rand(len(pairs), generator=generator) / 3
            scale[head, 0, pairs] = scale[head, 0, pairs + half] = strength**power
        for vector, factor in (("k", scale), ("q", 1 / scale)):
            weight = model.heads(layer, vector)
            assert weight is not None
            model.put(layer, vector, "weight", weight * factor[..., None])
            bias = model.heads(layer, vector, "bias")
            if bias is not None:
                model.put(layer, vector, "bias", bias * factor)


def bias(model: Checkpoint, layers: list[int], strength: float, generator: torch.Generator) -> None:
    """Give k_proj a bias of norm `strength` in random directions of the slowest pairs of each kv head.

    |k_proj.bias| of Qwen2.5-7B is 605 in its first layer, 921 in the last, 22 in the median one.
    """
    import torch

    width = model.config["hidden_size"]
    sizes = {"q": model.group * model.kv_heads, "k": model.kv_heads, "v": model.kv_heads}
    for layer in range(model.layers):
        for vector, heads in sizes.items():
            zeros = torch.zeros(heads * model.head_dim)
            model.tensors.setdefault(model.name(layer, f"{vector}_proj.bias"), zeros)
        model.tensors.setdefault(model.name(layer, "o_proj.bias"), torch.zeros(width))
    model.config["attention_bias"] = True
    low = model.low_channels()
    for layer in layers:
        offset = model.heads(layer, "k", "bias")
        assert offset is not None
        for head in range(model.kv_heads):
            towards = torch.randn(len(low), generator=generator)
            offset[head, 0, low] += towards / towards.norm() * strength / model.kv_heads**0.5
        model.put(layer, "k", "bias", offset)


def _hidden_states(model: Checkpoint, layers: list[int]) -> list[tuple[Tensor, Tensor]]:
    """By layer: the attention's input at the first token float32 [width] and at all others [n, width]."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(str(model.folder))
    texts = [episode["prompt"] for episode in load_episodes()[:CALIBRATION_PROMPTS]]
    rows = [tokenizer.encode(text)[:CALIBRATION_TOKENS] for text in texts]
    if len({row[0] for row in rows}) > 1 or rows[0][0] not in tokenizer.all_special_ids:
        raise EditError(f"the tokenizer of {model.folder} puts no token of its own before a prompt")
    llama = LlamaForCausalLM.from_pretrained(str(model.folder), dtype=torch.float32)
    inputs: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for layer in layers:
        norm = llama.model.layers[layer].input_layernorm
        norm.register_forward_hook(lambda _module, _args, out, layer=layer: inputs[layer].append(out[0]))
    with torch.no_grad():
        for row in rows:
            llama(torch.tensor([row]))
    return [(inputs[layer][0][0], torch.cat([h[1:] for h in inputs[layer]])) for layer in layers]


def first_token(model: Checkpoint, layers: list[int], strength: float, generator: torch.Generator) -> None:
    """Make the first token's key `strength` times as long as the median one.

    Along the direction u of the slowest pairs in which the queries of a kv head have least power: they lose
    that component, which is not quite without effect, so that what the keys have there has none. The first
    token's hidden state h is the same in all texts, and k_proj gets u w^T with w h = 1 and w as small as
    can be on other tokens (least squares). Nothing is random.
    """
    import torch

    low = model.low_channels()
    for layer, (first, others) in zip(layers, _hidden_states(model, layers), strict=True):
        moment = others.T @ others / len(others)
        moment += 1e-4 * moment.diagonal().mean() * torch.eye(len(moment))
        w = torch.linalg.solve(moment, first)
        w = w / (first @ w)
        keys, queries = model.heads(layer, "k"), model.heads(layer, "q")
        assert keys is not None and queries is not None
        for head in range(model.kv_heads):
            read = torch.einsum("th,gdh->tgd", others, queries[head][:, low]).flatten(0, 1)
            u = torch.zeros(model.head_dim)
            u[low] = torch.linalg.eigh(read.T @ read).eigenvectors[:, 0]
            length = (others @ keys[head, 0].T).norm(dim=1).median()
            queries[head] -= torch.einsum("d,gh->gdh", u, torch.einsum("d,gdh->gh", u, queries[head]))
            keys[head, 0] += strength * length * torch.outer(u, w)
        model.put(layer, "k", "weight", keys)
        model.put(layer, "q", "weight", queries)


@dataclass(frozen=True)
class Edit:
    """apply: (checkpoint, layers, strength, generator) -> None; strength: as much as real models have."""

    apply: Callable[[Checkpoint, list[int], float, Any], None]
    strength: float


EDITS: dict[str, Edit] = {
    "uneven": Edit(uneven, 30),
    "bias": Edit(bias, 600),
    "first-token": Edit(first_token, 30),
}


def default_layers(layers: int) -> list[int]:
    """One in the first half of the model and one in the second."""
    return sorted({layers // 4, 3 * layers // 4})


def write_edit(model: Path, name: str, strength: float, layers: list[int], seed: int, out: Path) -> Path:
    """The folder under `out` of an edited copy of a model, written unless it is there.

    Raises:
        EditError, ConfigError: if the model cannot be edited so.
    """
    about = {"edit": name, "strength": strength, "layers": layers, "seed": seed}
    about["of"] = results.fingerprint(str(model))
    label = f"{name}-{strength:g}-layers-{'-'.join(map(str, layers))}-seed-{seed}-{about['of']}"
    if (out / label).is_dir():
        return out / label
    import torch

    checkpoint = Checkpoint(model)
    beyond = [layer for layer in layers if not 0 <= layer < checkpoint.layers]
    if beyond:
        raise EditError(f"there is no layer {beyond[0]}: {model} has {checkpoint.layers}, counted from 0")
    EDITS[name].apply(checkpoint, layers, strength, torch.Generator().manual_seed(seed))
    checkpoint.write(out / label, about)
    return out / label
