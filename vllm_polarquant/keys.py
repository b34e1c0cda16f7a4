"""Layers whose keys are hard to quantise, found in a checkpoint's safetensors without loading the model.

A rotated code spreads its error evenly over all directions, in proportion to the key's power: the logits of
a query get noise of power ~ E|q|^2 E|k|^2, whatever share of the key that query looks at. Scaling a RoPE
channel pair of the keys up and of the queries down leaves every logit as it was, and so does, nearly, a
constant added to the keys; both raise that product. Of all keys and queries that give the same logits, those
with evenly shared power have the least, (sum over pairs of sqrt(Sq Sk))^2, where Sq and Sk are a pair's mean
powers. The ratio of the two is the layer's `excess`: by how much its logits are noisier than they need be.
Noise power is about 4^-bits, so that log4(excess) is how many bits of every code are lost.

Powers come from the weights alone: rows of k_proj and q_proj on inputs of unit power a channel (times the
weight of the norm before them), the weights of k_norm and q_norm where there are some, and k_proj.bias. Large
keys that stem from a particular token's activations, such as a first token's, are not seen.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_polarquant.check import Shape
from vllm_polarquant.support import ranges, text_config

if TYPE_CHECKING:
    from torch import Tensor

MAX_BITS_LOST = 0.5
"""From here on a layer is named. Half a bit is an excess of 2; docs/hard-keys.md has what that costs."""

ASSUMED_POWER = 1.0
"""Of a key's channel without its bias, where k_proj.weight itself is quantised and cannot be judged."""

FLOATS = {"F64", "F32", "F16", "BF16"}
OTHER_WEIGHTS = ("*.bin", "*.gguf", "*.pt", "*.pth", "*.npz")

_TENSOR = re.compile(
    r"(?P<before>.*?\b)(?:layers|layer|h|blocks)\.(?P<layer>\d+)\.(?P<outer>.*\.|)"
    r"(?P<module>\w+)\.(?P<kind>weight|bias)"
)
# Towers of multimodal models, draft heads and attention to another sequence.
_ELSEWHERE = re.compile("vis|image|audio|speech|mtp|draft|cross", re.IGNORECASE)
_MODULES = {
    **dict.fromkeys(("k_proj", "wk"), "k"),
    **dict.fromkeys(("q_proj", "wq"), "q"),
    **dict.fromkeys(("qkv_proj", "c_attn", "query_key_value", "Wqkv", "wqkv", "W_pack"), "qkv"),
    **dict.fromkeys(("k_norm", "k_layernorm", "key_layernorm"), "k_norm"),
    **dict.fromkeys(("q_norm", "q_layernorm", "query_layernorm"), "q_norm"),
    **dict.fromkeys(("input_layernorm", "ln_1", "attention_norm", "ln_attn"), "norm"),
}
_KEY_TENSORS = {"k.weight", "k.bias", "qkv.weight", "qkv.bias", "k_norm.weight"}
# Fused rows come by group, [query heads of a kv head, its key, its value], and not as [all q, all k, all v].
_GROUPED = {"bloom", "falcon", "gpt_neox", "internlm2"}
# A rotary pair is (2j, 2j + 1) and not (j, j + d/2).
_INTERLEAVED = {"chatglm", "codegen", "cohere", "cohere2", "glm", "glm4", "gptj"}
# Linear weights [in, out].
_TRANSPOSED = {"gpt2"}


@dataclass(frozen=True)
class HardKeys:
    """How a layer's keys look to a rotated code; of its kv heads the one that loses most.

    tensor: the one that most of the excess comes from.
    excess: noise power on the logits, relative to the least for the same logits.
    bias_norm, key_norm: lengths of the constant part of a key and, root mean square, of the rest; the
        latter is nan where it is not known.
    pair_ratio, query_pair_ratio: the largest channel pair's root-mean-square size to the median one's, of
        keys, without the bias, and of queries.
    """

    layer: int
    kv_head: int
    tensor: str
    excess: float
    bias_norm: float
    key_norm: float
    pair_ratio: float
    query_pair_ratio: float

    @property
    def bits_lost(self) -> float:
        return math.log(self.excess, 4)

    @property
    def hard(self) -> bool:
        return self.bits_lost >= MAX_BITS_LOST

    @property
    def what(self) -> str:
        """What the tensor holds, in words and figures."""
        if not self.tensor.endswith(".bias"):
            return (
                f"largest channel pair {self.pair_ratio:.1f} x the median one in keys, "
                f"{self.query_pair_ratio:.1f} x in queries"
            )
        rest = "unknown, taken to be 1 a channel" if math.isnan(self.key_norm) else f"{self.key_norm:.1f}"
        return f"constant key of norm {self.bias_norm:.1f}, the rest {rest}"


@dataclass(frozen=True)
class KeyReport:
    """Every layer that could be judged, and what could not be, in sentences."""

    layers: list[HardKeys] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def hard(self) -> list[HardKeys]:
        return [layer for layer in self.layers if layer.hard]

    @property
    def skip_layers(self) -> list[int]:
        return [layer.layer for layer in self.hard]

    @property
    def flag(self) -> str | None:
        """What to give to vLLM so that these layers stay in 16 bits; None if there is none."""
        return skip_flag(self.skip_layers) if self.hard else None


def skip_flag(layers: list[int]) -> str:
    return "--kv-cache-dtype-skip-layers " + " ".join(map(str, layers))


class _Checkpoint:
    """The tensors of a folder's safetensors by name, read one at a time."""

    def __init__(self, folder: Path) -> None:
        # safetensors reads bfloat16 only with torch, which takes a second or two to import.
        from safetensors import safe_open

        self._open: Any = safe_open
        self._files: dict[Path, Any] = {}
        self._where: dict[str, Path] = {}
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self._where = {name: folder / file for name, file in names.items()}
            return
        # Mistral's repositories hold the weights twice.
        found = sorted(folder.glob("*.safetensors"))
        for path in [p for p in found if not p.name.startswith("consolidated")] or found:
            self._where |= dict.fromkeys(self._file(path).keys(), path)

    def _file(self, path: Path) -> Any:
        if path not in self._files:
            self._files[path] = self._open(path, framework="pt")
        return self._files[path]

    def names(self) -> list[str]:
        return list(self._where)

    def slice(self, name: str) -> Any:
        return self._file(self._where[name]).get_slice(name)


class _Unjudged(ValueError):
    """Why a layer cannot be judged, in words that are the same for every layer."""


def _short(name: str) -> str:
    return ".".join(name.split(".")[-2:])


class _Layer:
    """The attention tensors of one layer."""

    def __init__(
        self, names: Mapping[str, str], checkpoint: _Checkpoint, shape: Shape, model_type: str
    ) -> None:
        self.names, self.checkpoint, self.model_type = names, checkpoint, model_type
        self.kv_heads, self.head_dim = shape.kv_heads, shape.head_dim
        self.group = shape.query_heads // shape.kv_heads
        fused = "qkv.weight" in names or "qkv.bias" in names
        self.module = {"k": "qkv", "q": "qkv"} if fused else {"k": "k", "q": "q"}

    def _begin(self, vector: str, kv_head: int) -> int:
        """The first row of a kv head's key, or of the first query head that reads it."""
        d, group = self.head_dim, self.group
        if self.module[vector] != "qkv":
            return kv_head * d * (group if vector == "q" else 1)
        if self.model_type in _GROUPED:
            return (kv_head * (group + 2) + (group if vector == "k" else 0)) * d
        return (kv_head * group if vector == "q" else self.kv_heads * group + kv_head) * d

    def _rows(self, vector: str, kind: str) -> tuple[str, Any, int] | None:
        """Name, slice and the dim that counts the rows, checked against the config's heads."""
        name = self.names.get(f"{self.module[vector]}.{kind}")
        if name is None:
            return None
        part = self.checkpoint.slice(name)
        if part.get_dtype() not in FLOATS:
            return None
        dim = 1 if kind == "weight" and self.model_type in _TRANSPOSED else 0
        heads = {"k": 1, "q": self.group, "qkv": self.group + 2}[self.module[vector]]
        rows, want = part.get_shape()[dim], heads * self.kv_heads * self.head_dim
        if rows != want:
            raise _Unjudged(f"{_short(name)} has {rows} rows, not the {want} that config.json speaks of")
        return name, part, dim

    def power(self, vector: str, kv_head: int, gain: Tensor | float) -> Tensor | None:
        """Mean power float32 [head_dim] of `k`, or of the head's first query `q`; None if not known."""
        found = self._rows(vector, "weight")
        if found is None:
            return None
        _, part, dim = found
        begin = self._begin(vector, kv_head)
        end = begin + self.head_dim
        weight = (part[:, begin:end].T if dim else part[begin:end]).float()
        return (weight * gain).square().sum(1)

    def bias(self, vector: str, kv_head: int) -> Tensor:
        """The constant part float32 [head_dim], zeros where there is none."""
        import torch

        found = self._rows(vector, "bias")
        if found is None:
            return torch.zeros(self.head_dim)
        begin = self._begin(vector, kv_head)
        return found[1][begin : begin + self.head_dim].float()

    def norm(self, vector: str, kv_head: int) -> Tensor | None:
        """The weight float32 [head_dim] of the norm of `k` or `q` after its projection."""
        name = self.names.get(f"{vector}_norm.weight")
        if name is None:
            return None
        weight = self.checkpoint.slice(name)[:].float() + self.model_type.startswith("gemma")
        if weight.numel() == self.head_dim:
            return weight
        heads = self.kv_heads * (self.group if vector == "q" else 1)
        if weight.numel() != heads * self.head_dim:
            raise _Unjudged(f"{_short(name)} has {weight.numel()} entries, which fit no head")
        return weight.view(heads, -1)[kv_head * (heads // self.kv_heads)]

    def gain(self) -> Tensor | float:
        name = self.names.get("norm.weight")
        if name is None:
            return 1.0
        return self.checkpoint.slice(name)[:].float() + self.model_type.startswith("gemma")


def _unevenness(power: Tensor) -> float:
    return math.sqrt(float(power.max() / power.median().clamp(min=1e-30)))


def _judge_head(layer: _Layer, index: int, kv_head: int) -> HardKeys:
    import torch

    gain, known = layer.gain(), True
    power: dict[str, Tensor] = {}
    for vector in ("k", "q"):
        rows, norm = layer.power(vector, kv_head, gain), layer.norm(vector, kv_head)
        if rows is None:
            known = known and (vector == "q" or norm is not None)
            rows = torch.full((layer.head_dim,), ASSUMED_POWER)
        # A norm after the projection leaves the rows' proportions and sets their size.
        power[vector] = rows if norm is None else rows / rows.mean().clamp(min=1e-30) * norm.square()
    # Such a norm takes a bias before it for a part of what it normalises.
    normed = layer.norm("k", kv_head) is not None
    constant = torch.zeros(layer.head_dim) if normed else layer.bias("k", kv_head)
    power["q"] = power["q"] + layer.bias("q", kv_head).square() * (not normed)

    half = layer.head_dim // 2
    pairs = {
        vector: p.view(half, 2).sum(1) if layer.model_type in _INTERLEAVED else p[:half] + p[half:]
        for vector, p in power.items()
    }
    keys, queries, extra = (float(x) for x in (pairs["k"].sum(), pairs["q"].sum(), constant.square().sum()))
    least = float((pairs["k"] * pairs["q"]).sqrt().sum()) ** 2
    if not 0 < least < math.inf or not math.isfinite(extra):
        raise _Unjudged("keys or queries are zero, infinite or not a number")
    uneven, biased = max(1.0, keys * queries / least), 1 + extra / keys
    role = layer.module["k"]
    if biased > uneven or (f"{role}.weight" not in layer.names and not normed):
        tensor = layer.names.get(f"{role}.bias", "")
    else:
        tensor = layer.names["k_norm.weight" if normed else f"{role}.weight"]
    return HardKeys(
        layer=index,
        kv_head=kv_head,
        tensor=tensor,
        excess=uneven * biased,
        bias_norm=math.sqrt(extra),
        key_norm=math.sqrt(keys) if known else math.nan,
        pair_ratio=_unevenness(pairs["k"]),
        query_pair_ratio=_unevenness(pairs["q"]),
    )


def _find(names: list[str]) -> dict[int, dict[str, str]]:
    """Names of attention tensors by layer and by what they are, such as `k.bias`."""
    found: dict[int, dict[str, str]] = {}
    for name in names:
        part = _TENSOR.fullmatch(name)
        what = _MODULES.get(part["module"]) if part else None
        if part is None or what is None or _ELSEWHERE.search(part["before"] + part["outer"]):
            continue
        if what == "norm" or "att" in part["outer"]:
            found.setdefault(int(part["layer"]), {}).setdefault(f"{what}.{part['kind']}", name)
    return found


def judge_keys(model: Path, config: Mapping[str, Any], shape: Shape) -> KeyReport:
    """Judge the keys of every layer of a model folder, or of the folder that its config.json lies in.

    Reads headers, norms, biases and, a tensor at a time, k_proj with one query head a kv head. What cannot be
    read is told in the report's notes; nothing is raised for it.
    """
    folder = model if model.is_dir() else model.parent
    text = text_config(config)
    model_type = str(text.get("model_type") or config.get("model_type") or "").lower()
    if not any(folder.glob("*.safetensors")):
        return KeyReport(notes=[_without_weights(folder, text, model_type, shape)])
    try:
        checkpoint = _Checkpoint(folder)
        tensors = _find(checkpoint.names())
    except Exception as problem:  # safetensors' own error is no subclass of anything narrower
        return KeyReport(notes=[_unread(folder, problem)])

    layers: list[HardKeys] = []
    notes: dict[str, list[int]] = {}
    for index in shape.indices:
        names, mine = tensors.get(index, {}), shape.at(index)
        layer = _Layer(names, checkpoint, mine, model_type)
        try:
            if not _KEY_TENSORS & names.keys():
                raise _Unjudged("no k_proj, k_norm or fused projection was found under a known name")
            judged = [_judge_head(layer, index, head) for head in range(mine.kv_heads)]
        except _Unjudged as problem:
            notes.setdefault(f"Keys not judged: {problem}", []).append(index)
        except Exception as problem:
            notes.setdefault(_unread(folder, problem).rstrip("."), []).append(index)
        else:
            layers.append(max(judged, key=lambda head: head.excess))
            if math.isnan(layers[-1].key_norm):
                message = "k_proj's weights are not stored as floats: only its bias was judged"
                notes.setdefault(message, []).append(index)
    said = [f"{why} (layers {ranges(where)})." for why, where in notes.items()]
    return KeyReport(layers, said)


def _unread(folder: Path, problem: Exception) -> str:
    words = " ".join(str(problem).split())
    return f"Keys not judged: the safetensors in {folder} cannot be read ({words})."


def _without_weights(folder: Path, text: Mapping[str, Any], model_type: str, shape: Shape) -> str:
    other = sorted(path.name for pattern in OTHER_WEIGHTS for path in folder.glob(pattern))
    why = f"only safetensors are read, not {other[0]}" if other else f"no *.safetensors in {folder}"
    note = f"Keys not judged, config.json alone was read: {why}."
    if re.match(r"qwen2", model_type) or text.get("attention_bias") or text.get("qkv_bias"):
        flag = skip_flag(sorted({shape.indices[0], shape.indices[-1]}))
        note += (
            " The model adds a bias to its keys, very large in the first and last layers of some Qwen2.5 "
            "models, which the engine takes out at start-up; with that switched off, "
            f"begin with {flag} and measure."
        )
    return note
