"""Keys and values to their slots."""

from __future__ import annotations

import numpy as np
import torch

from vllm_polarquant.codec import by_largest, encode_rotated
from vllm_polarquant.kernels.cpu.threads import use_torch_threads
from vllm_polarquant.kernels.cpu.vectors import LoopTables, VectorTables, open_cache, regions
from vllm_polarquant.kernels.cpu.write import store_codes, store_polar, take_away
from vllm_polarquant.page import Page


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    page: Page,
    tables: LoopTables,
    segments: torch.Tensor,
) -> None:
    """Encode key and value [T', H, d] and write them to the slots of slot_mapping int64 [T], T <= T'.

    Slots < 0 are dropped. cache: uint8 [B, H, N, slot.nbytes]. segments: int32 [at least T].
    """
    use_torch_threads()
    memory, blocks = open_cache(cache, page)
    slots = slot_mapping.numpy()
    segments = segments[: len(slots)]
    for x, side, region in zip((key, value), (tables.key, tables.value), regions(page), strict=True):
        x = x[: len(slots)]
        if side.encoder is None:
            codes, radii, centred = _encode(x, side, tables.tables.mixing, segments)
            store_codes(codes.numpy(), radii.numpy(), centred, slots, memory, blocks, region)
        else:
            unit, largest = by_largest(x)
            rotated = (unit * side.factors) @ tables.tables.mixing.T
            store_polar(
                rotated.numpy(), largest.numpy(), segments.numpy(), side.centres, slots, side.encoder,
                side.reader.code_bytes, memory, blocks, region,
            )  # fmt: skip


def _encode(
    x: torch.Tensor, side: VectorTables, mixing: torch.Tensor, segments: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Codes without a trellis uint8 [T, H, bytes], radii's bytes uint8 [T, H, 2], signs, bool [T, H]."""
    centred = np.zeros(x.shape[:-1], np.bool_)
    if side.vector.kind == "raw":
        # Not mixed, as a sum of NaN would reach every coordinate; the mixing of raw vectors is the identity.
        codes = (x * side.factors).to(x.dtype).view(torch.uint8)
        radius = torch.ones(x.shape[:-1], dtype=torch.bfloat16)
    else:
        unit, largest = by_largest(x)
        rotated = (unit * side.factors) @ mixing.T
        take_away(rotated.numpy(), largest.numpy(), segments.numpy(), side.centres, centred)
        radius, codes = encode_rotated(rotated, largest, side.vector)
    return codes, radius.contiguous().view(torch.uint8).unflatten(-1, (-1, 2)), centred
