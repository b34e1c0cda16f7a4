"""Inputs of the kernel tests: caches of every layout, and batches with garbage around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from vllm_polarquant import reference
from vllm_polarquant.attention import Attention
from vllm_polarquant.codec import (
    Tables,
    decode_unit,
    encode,
    encode_radius,
    pack_centres,
    rotation,
    tables,
    unpack_centres,
)
from vllm_polarquant.format import HEAD_DIMS, LOSSLESS, PRESETS, SEGMENT, Slot, VectorFormat
from vllm_polarquant.kernels.triton.page_io import lane_order
from vllm_polarquant.page import Page

ALL_PRESETS = (*PRESETS, LOSSLESS)
ALL_FORMATS = [(preset, dim) for preset in ALL_PRESETS for dim in HEAD_DIMS]
LAYOUTS = [("LBHNC", 16), ("LBNHC", 32), ("BLHNC", 48), ("BLNHC", 128)]
"""vLLM's KV cache layouts, each with another block size."""
DTYPES = (torch.bfloat16, torch.float16)

OUT_OF_RANGE_BLOCK = 1 << 30
"""Fills the unused part of block tables: a kernel that follows it crashes."""


def on_gpu(*values: Any) -> Any:
    """Values of a test's parameters that are not interpreted, as that takes too long."""
    return pytest.param(*values, marks=pytest.mark.gpu)


def attention_tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """Relative error of attention whose operands and result are rounded to `dtype`.

    Query, points, probabilities and output are each off by up to 2**-9 (bfloat16) or 2**-12
    (float16), about a third of that in the mean square. Triton's interpreter truncates to bfloat16.
    """
    if dtype == torch.float16:
        return 1e-3
    return 1.2e-2 if device.type == "cpu" else 6e-3


def relative_error(have: torch.Tensor, want: torch.Tensor) -> float:
    """|have - want| / |want| of all elements together; NaN if have holds any."""
    have, want = have.double(), want.double()
    return ((have - want).norm() / want.norm()).item()


def vectors(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random vectors that are as uneven as keys: one large channel and lengths that differ."""
    x = torch.randn(shape, device=device)
    x[..., 3] *= 8
    return (x * torch.rand(*shape[:-1], 1, device=device).add(0.1)).to(dtype)


def centred_tables(
    slot: Slot, heads: int, dtype: torch.dtype, device: torch.device, positions: int
) -> Tables:
    """Tables as a real model's layer has them: factors of every head and pair, and centres.

    After the segments of so many positions comes one of NaN, which nobody is to read.
    """
    segments = -(-positions // SEGMENT)
    held = tables(slot, dtype, device, heads, segments + 1)
    # Powers of two for raw vectors, so that they lose nothing.
    scale = torch.rand(heads, slot.head_dim // 2, device=device) * 4 - 2
    scale = (scale.round() if slot.preset == LOSSLESS else scale).exp2().repeat(1, 2)
    centres = 2 * torch.randn(segments, heads, slot.head_dim, device=device)
    held.centres[:segments] = pack_centres(centres, dtype)
    held.centres[segments:] = -1
    return held._replace(key_factors=held.key_factors * scale, query_factors=held.query_factors / scale)


def centred_keys(held: Tables, position: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys [T, H, d] of these positions as real models have them: mostly their mean, but for two sinks."""
    segment = (position // SEGMENT).clamp_max(len(held.centres) - 1)
    mean = (unpack_centres(held.centres, dtype)[segment] @ held.mixing) * held.query_factors
    noise = 0.5 * torch.randn_like(mean) * held.query_factors
    return torch.where((position < 2)[:, None, None], noise / 4, mean + noise).to(dtype)


def cosines(x: torch.Tensor, codes: torch.Tensor, vector: VectorFormat, dtype: torch.dtype) -> torch.Tensor:
    """Cosine between vectors [T, H, d] and the directions of their codes [T, H, bytes]."""
    unit = decode_unit(codes, vector, dtype).double()
    if vector.rotated:
        unit = unit @ rotation(x.shape[-1]).to(unit)
    # Scaled first, as torch takes the norms of tiny vectors to be 1e-8.
    x = x.double()
    return torch.nn.functional.cosine_similarity(x / x.abs().amax(-1, keepdim=True), unit, dim=-1)


def radius_for(
    x: torch.Tensor, codes: torch.Tensor, vector: VectorFormat, dtype: torch.dtype
) -> torch.Tensor:
    """The radii bfloat16 [T, H] that belong to codes of vectors [T, H, d], in float64."""
    if vector.kind != "polar":
        return encode(x, vector)[0]
    cos = cosines(x, codes, vector, dtype)
    gain = {"norm": torch.ones_like(cos), "unbiased": 1 / cos}
    length = decode_unit(codes, vector, dtype).double().norm(dim=-1)
    return encode_radius((x.double().norm(dim=-1) * gain[vector.gain] / length).float())


def bits_of(x: torch.Tensor) -> torch.Tensor:
    """The bits of 16-bit floats as integers, int32."""
    return x.contiguous().view(torch.int16).int()


def page_for(preset: str, head_dim: int, block_size: int = 16) -> Page:
    return Page(Slot(preset, head_dim), block_size)


def empty_cache(
    page: Page, blocks: int, heads: int, device: torch.device, layout: str = "LBHNC"
) -> torch.Tensor:
    """A cache [B, H, N, slot.nbytes] of 0xFF, the middle one of three layers' in vLLM's `layout`."""
    sizes = {"L": 3, "B": blocks, "H": heads, "N": page.block_size, "C": page.slot.nbytes}
    memory = torch.full([sizes[dim] for dim in layout], 0xFF, dtype=torch.uint8, device=device)
    return memory.permute([layout.index(dim) for dim in "LBHNC"])[1]


@dataclass
class Batch:
    """Requests whose keys and values the reference has stored."""

    page: Page
    tables: Tables
    cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    query: torch.Tensor
    attention: Attention

    def reference(self) -> reference.Attended:
        """What decode attention should compute."""
        return reference.attention(
            self.query,
            self.cache,
            self.block_table,
            self.seq_lens,
            self.query_start_loc,
            self.page,
            lane_order(self.page),
            self.attention,
            tables=self.tables,
        )


def make_batch(
    page: Page,
    seq_lens: list[int],
    query_lens: list[int],
    dtype: torch.dtype,
    device: torch.device,
    heads: int = 2,
    group: int = 2,
    layout: str = "LBHNC",
    padding: int = 0,
    centred: bool = False,
    attention: Attention | None = None,
) -> Batch:
    """Store seq_lens[r] tokens for each request in scattered blocks; `padding` more query rows.

    centred: with centred_tables and centred_keys. attention: by default plain.
    """
    held = tables(page.slot, dtype, device)
    if centred:
        held = centred_tables(page.slot, heads, dtype, device, max(seq_lens))
    needed = [-(-length // page.block_size) for length in seq_lens]
    blocks = 1 + sum(needed)
    cache = empty_cache(page, blocks, heads, device, layout)
    order = lane_order(page)
    shuffled = (torch.randperm(blocks - 1) + 1).tolist()
    wide = torch.full((len(seq_lens), max(needed) + 5), OUT_OF_RANGE_BLOCK, dtype=torch.int32, device=device)
    block_table = wide[:, : max(needed) + 2]
    for request, length in enumerate(seq_lens):
        mine = torch.tensor([shuffled.pop() for _ in range(needed[request])], device=device)
        block_table[request, : len(mine)] = mine
        position = torch.arange(length, device=device)
        slots = mine[position // page.block_size].long() * page.block_size if length else position
        key, value = (vectors((length, heads, page.slot.head_dim), dtype, device) for _ in "kv")
        if centred:
            key = centred_keys(held, position, dtype)
        slots = slots + position % page.block_size
        reference.store_kv(key, value, cache, slots, page, order, held, position // SEGMENT)
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    tokens = int(starts[-1]) + padding
    return Batch(
        page,
        held,
        cache,
        block_table,
        torch.tensor(seq_lens, dtype=torch.int32, device=device),
        starts.to(device),
        torch.randn(tokens, heads * group, page.slot.head_dim, device=device).to(dtype),
        attention or Attention(page.slot.head_dim**-0.5),
    )
