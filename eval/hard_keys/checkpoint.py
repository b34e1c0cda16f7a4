"""A Llama's checkpoint, read, changed and written again."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_polarquant.check import read_config, read_shape

if TYPE_CHECKING:
    from torch import Tensor

LOW_PAIRS = 6
"""Channel pairs of the lowest frequencies, which hardly turn over a few thousand tokens: what all keys have
in common there shifts all logits of a query alike, and the softmax takes no notice."""


class EditError(ValueError):
    """A model or a layer that an edit cannot be made on."""


class Checkpoint:
    """A Llama's config and tensors, to be edited in place.

    Args:
        folder: of config.json and safetensors.

    Raises:
        EditError: if it is no Llama or has no such tensors.
        ConfigError: if config.json is missing or broken.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import load_file

        self.folder = folder
        self.config = read_config(folder)
        if "LlamaForCausalLM" not in self.config.get("architectures", []):
            raise EditError(f"{folder} is no LlamaForCausalLM, the one architecture that is edited")
        shape = read_shape(self.config)
        self.layers, self.kv_heads, self.head_dim = shape.layers, shape.kv_heads, shape.head_dim
        self.group = shape.query_heads // shape.kv_heads
        self.tensors: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            if not path.name.startswith("consolidated"):
                self.tensors |= load_file(str(path))
        missing = [
            self.name(layer, f"{vector}_proj.weight")
            for layer in range(self.layers)
            for vector in "qk"
            if self.name(layer, f"{vector}_proj.weight") not in self.tensors
        ]
        if missing:
            raise EditError(f"{folder} has no tensor {missing[0]} in its *.safetensors")

    @staticmethod
    def name(layer: int, tensor: str) -> str:
        return f"model.layers.{layer}.self_attn.{tensor}"

    def heads(self, layer: int, vector: str, kind: str = "weight") -> Tensor | None:
        """A float32 copy [kv_heads, query heads of one or 1, head_dim, ...] of a projection, or None."""
        tensor = self.tensors.get(self.name(layer, f"{vector}_proj.{kind}"))
        if tensor is None:
            return None
        group = self.group if vector == "q" else 1
        return tensor.float().clone().unflatten(0, (self.kv_heads, group, self.head_dim))

    def put(self, layer: int, vector: str, kind: str, heads: Tensor) -> None:
        """Store what `heads` gave; it stays float32, so that an edit rounds nothing."""
        self.tensors[self.name(layer, f"{vector}_proj.{kind}")] = heads.flatten(0, 2).contiguous()

    def low_channels(self) -> Tensor:
        """Channels of the LOW_PAIRS slowest pairs, int64 [2 LOW_PAIRS]; a pair is (j, j + head_dim / 2)."""
        import torch

        half = self.head_dim // 2
        slow = torch.arange(half - LOW_PAIRS, half)
        return torch.cat([slow, slow + half])

    def write(self, folder: Path, about: dict[str, Any]) -> None:
        """Write a model folder, whole or not at all; config.json tells how it was made."""
        from safetensors.torch import save_file

        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            part = Path(scratch) / "model"
            part.mkdir()
            for path in self.folder.iterdir():
                if path.is_file() and path.suffix in (".json", ".model", ".txt", ".jinja"):
                    shutil.copyfile(path, part / path.name)
            (part / "model.safetensors.index.json").unlink(missing_ok=True)
            config = self.config | {"polarquant_edit": about}
            (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            save_file(self.tensors, str(part / "model.safetensors"), metadata={"format": "pt"})
            os.replace(part, folder)
