"""The codec's constants as numba's loops and torch's rotations on a CPU take them."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from vllm_polarquant.codec import Tables
from vllm_polarquant.format import CELL_CANDIDATES, Slot, VectorFormat
from vllm_polarquant.page import Page, dense_block_stride

POLAR, FP8, RAW = 0, 1, 2
_KINDS = {"polar": POLAR, "fp8": FP8, "raw": RAW}


class Reader(NamedTuple):
    """How loops read codes of one vector format.

    kind: POLAR, FP8 or RAW.
    lut: uint32. Of polar vectors, the codebook's points in bfloat16, x in the low half: one gather a pair,
        whatever the model's dtype. Otherwise the bits of the float32 that each byte or 16-bit float is.
    """

    kind: int
    pair_bits: int
    state_bits: int
    code_bytes: int
    lut: np.ndarray


class Encoder(NamedTuple):
    """How loops find codes of polar vectors.

    points: float32 [n, 2]. cells: uint32 [cells, states], codec.search_cells.
    candidates: points that a cell names for each pair of states. unbiased: whether the radius is |x| / c.
    """

    pair_bits: int
    points: np.ndarray
    cells: np.ndarray
    candidates: int
    unbiased: bool


class Centres(NamedTuple):
    """What the sign bits of radii speak of; values have one of zeros.

    words: uint32 [segments, 1 or kv heads, d / 2], Tables.centres' own memory.
    lut: float32 [65536], what each 16-bit float is.
    """

    words: np.ndarray
    lut: np.ndarray


class VectorTables(NamedTuple):
    """Of keys or of values. encoder: of polar vectors only. factors: float32 [1 or kv heads, d]."""

    vector: VectorFormat
    reader: Reader
    encoder: Encoder | None
    factors: torch.Tensor
    centres: Centres


class Bases(NamedTuple):
    """How loops take queries to the basis of what is stored, and sums of stored values back.

    query_factors: float32 [1 or kv heads, d], Tables' own memory. mixing: float32 [d, d], Tables'.
    restoring: float32 [d, d], by which sums of stored values are multiplied for outputs.
    """

    query_factors: np.ndarray
    mixing: np.ndarray
    restoring: np.ndarray


class LoopTables(NamedTuple):
    """Tables and what loops need besides; keys' and queries' factors and centres may be written to."""

    tables: Tables
    key: VectorTables
    value: VectorTables
    bases: Bases

    @classmethod
    def of(cls, slot: Slot, tables: Tables, dtype: torch.dtype) -> LoopTables:
        """dtype: the model's, in which raw vectors are stored."""
        head_dim = slot.head_dim
        return cls(
            tables,
            VectorTables(
                slot.key,
                _reader(slot.key, head_dim, tables.key_points, dtype),
                _encoder(slot.key, tables.key_points, tables.key_cells),
                tables.key_factors,
                Centres(tables.centres.numpy().view(np.uint32), sixteen_bits(dtype)),
            ),
            VectorTables(
                slot.value,
                _reader(slot.value, head_dim, tables.value_points, dtype),
                _encoder(slot.value, tables.value_points, tables.value_cells),
                tables.value_factors,
                Centres(np.zeros((1, 1, head_dim // 2), np.uint32), sixteen_bits(dtype)),
            ),
            Bases(
                tables.query_factors.numpy(),
                tables.mixing.numpy(),
                (tables.mixing * tables.output_factors).numpy(),
            ),
        )

    def rotate_queries(self, query: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """Queries [T, num_heads, d] as stored keys take them: float32, the same shape."""
        factors = self.tables.query_factors
        if len(factors) > 1:
            factors = factors.repeat_interleave(query.shape[1] // kv_heads, 0)
        return (query * factors) @ self.tables.mixing.T

    def restore_outputs(self, out: torch.Tensor) -> torch.Tensor:
        """Outputs float32 [..., d], sums of stored values, in the model's basis."""
        return out @ torch.from_numpy(self.bases.restoring)


@cache
def sixteen_bits(dtype: torch.dtype) -> np.ndarray:
    """What each 16-bit float of a dtype is, float32 [65536]."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype).float().numpy()


def _reader(vector: VectorFormat, head_dim: int, points: torch.Tensor, dtype: torch.dtype) -> Reader:
    if vector.kind == "polar":
        lut = points.bfloat16().contiguous().view(torch.int32).flatten()
    elif vector.kind == "fp8":
        lut = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0)
    else:
        lut = torch.from_numpy(sixteen_bits(dtype))
    return Reader(
        _KINDS[vector.kind],
        vector.pair_bits,
        vector.state_bits if vector.kind == "polar" else 0,
        vector.code_bytes(head_dim),
        lut.numpy().view(np.uint32),
    )


def _encoder(vector: VectorFormat, points: torch.Tensor, cells: torch.Tensor) -> Encoder | None:
    if vector.kind != "polar":
        return None
    return Encoder(
        vector.pair_bits,
        points.numpy(),
        cells.numpy().view(np.uint32),
        CELL_CANDIDATES[vector.pair_bits],
        vector.gain == "unbiased",
    )


class Blocks(NamedTuple):
    """Where pages lie in a cache's memory.

    stride: bytes from a block to the next. page_bytes: from a kv head's page in a block to the next head's.
    tokens: that a page holds.
    """

    stride: int
    page_bytes: int
    tokens: int


def open_cache(cache: torch.Tensor, page: Page) -> tuple[np.ndarray, Blocks]:
    """The memory of a cache uint8 [B, H, N, slot.nbytes] from its first block on, uint8, and its blocks.

    Apart from each other: numba takes what a parallel loop assigns to an array inside a tuple for dead.
    """
    stride = dense_block_stride(cache, page)
    blocks, heads = cache.shape[:2]
    length = (blocks - 1) * stride + heads * page.nbytes if blocks else 0
    return cache.as_strided((length,), (1,)).numpy(), Blocks(stride, page.nbytes, page.block_size)


class Region(NamedTuple):
    """Where keys, or values, lie in a page: offsets of codes and of the first radius."""

    codes: int
    radii: int


def regions(page: Page) -> tuple[Region, Region]:
    """Of keys and of values."""
    return (
        Region(0, page.key_radius_offset),
        Region(page.value_offset, page.value_radius_offset),
    )
