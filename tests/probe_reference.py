"""What the probe should say when the codec stores every key and value."""

from __future__ import annotations

from functools import partial

import torch

from vllm_polarquant.codec import decode, encode
from vllm_polarquant.eval.probe.forward import forward
from vllm_polarquant.format import VectorFormat


def _stored(x: torch.Tensor, vector: VectorFormat | None, mirrored: bool) -> torch.Tensor:
    if vector is None:
        return x
    return -decode(*encode(-x, vector), vector) if mirrored else decode(*encode(x, vector), vector)


def logprobs(
    tokens: list[int], key: VectorFormat | None, value: VectorFormat | None, mirrored: bool = False
) -> torch.Tensor:
    """Next-token log-probabilities float32 [T, vocabulary], attention over quantised keys and values.

    mirrored: store every vector as what is stored of its opposite, whose errors are other ones, as large.
    """
    stores = (partial(_stored, vector=vector, mirrored=mirrored) for vector in (key, value))
    return forward(tokens, *stores)[0]
