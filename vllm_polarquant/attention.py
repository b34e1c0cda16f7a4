"""What attention a layer computes: one value from vLLM's arguments to the reference and every kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Attention:
    """Causal attention of a layer.

    scale: what logits q . k are multiplied by.
    window: tokens that a query sees, itself included; None for all before it. vLLM's `sliding_window`.
    soft_cap: logits become soft_cap * tanh(logit / soft_cap); None for none (Gemma 2, arXiv 2408.00118).
    sinks: float32 [num_heads], a logit a head that takes part in the softmax without a value; None for none
        (gpt-oss, arXiv 2508.10925).

    Raises:
        ValueError: for a scale that is not finite, a window below 1, a soft cap not above 0 or sinks of
            another shape.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    sinks: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"the softmax scale must be finite, got {self.scale}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window holds at least the query itself, got {self.window} tokens")
        if self.soft_cap is not None and not 0 < self.soft_cap < math.inf:
            raise ValueError(f"a soft cap is a positive number, got {self.soft_cap}")
        if self.sinks is not None and (self.sinks.dim() != 1 or self.sinks.dtype != torch.float32):
            raise ValueError(
                f"sinks must be float32 [num_heads], got {self.sinks.dtype} {list(self.sinks.shape)}"
            )
