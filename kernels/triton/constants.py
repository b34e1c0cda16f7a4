"""What kernels know of a page, as one constant, and the checks of their launchers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from vllm_polarquant.format import STATE_BITS, VectorFormat
from vllm_polarquant.page import Page, dense_block_stride

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"

FP8 = tl.constexpr(1)
RAW = tl.constexpr(16)

KEY_PARTS = tl.constexpr(4)
"""Lanes that share a key in a tensor core's operand: each has a quarter."""

VALUE_PARTS = tl.constexpr(8)
"""Lanes that share a value: each has an eighth."""


@dataclass(frozen=True)
class VectorConstants:
    """How keys or values lie in a page.

    code: bits of a pair's code for polar vectors, FP8 or RAW for the others.
    row_bytes: of the codes of one vector.
    parts: KEY_PARTS or VALUE_PARTS.
    codes_offset, radius_offset: of the first vector's codes and radius in the page.
    gain: VectorFormat.gain.
    """

    code: int
    row_bytes: int
    parts: int
    codes_offset: int
    radius_offset: int
    gain: str


@dataclass(frozen=True)
class PageConstants:
    """A page as the one constexpr that every kernel over pages takes.

    Its text is part of a compiled kernel's key, so it spells every number out. A constexpr has attributes
    `value` and `type` of its own, hence `keys` and `values`. A kernel binds either to a constexpr of its own
    before it hands it on.
    """

    head_dim: int
    half_pad: int
    block_size: int
    nbytes: int
    keys: VectorConstants
    values: VectorConstants


def vector_code(vector: VectorFormat) -> int:
    """A vector's kind as kernels take it: its pair's code width, FP8 or RAW."""
    return {"polar": vector.pair_bits, "fp8": FP8.value, "raw": RAW.value}[vector.kind]


@cache
def page_constants(page: Page) -> PageConstants:
    """The constants of a page."""
    slot = page.slot
    return PageConstants(
        head_dim=slot.head_dim,
        half_pad=triton.next_power_of_2(slot.head_dim // 2),
        block_size=page.block_size,
        nbytes=page.nbytes,
        keys=VectorConstants(
            vector_code(slot.key),
            slot.key_bytes,
            KEY_PARTS.value,
            0,
            page.key_radius_offset,
            slot.key.gain,
        ),
        values=VectorConstants(
            vector_code(slot.value),
            slot.value_bytes,
            VALUE_PARTS.value,
            page.value_offset,
            page.value_radius_offset,
            slot.value.gain,
        ),
    )


@triton.constexpr_function
def state_bits(code):
    """Bits of the code before it that a pair's point depends on, by the width of the codes."""
    return STATE_BITS[code]


@triton.constexpr_function
def table_entries(code):
    """Points of a vector's table; 0 for the kinds that have none."""
    return 0 if code in (FP8.value, RAW.value) else 1 << (code + STATE_BITS[code])


def check(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless condition holds."""
    if not condition:
        raise ValueError(message)


def check_heads(name: str, x: torch.Tensor, head_dim: int) -> None:
    """Raise ValueError unless x is a 16-bit float [tokens, heads, head_dim], last dim dense."""
    check(
        x.dtype in (torch.bfloat16, torch.float16)
        and x.dim() == 3
        and x.shape[2] == head_dim
        and x.stride(2) == 1,
        f"{name} must be bfloat16 or float16 [tokens, heads, {head_dim}] with a dense last dim, "
        f"got {x.dtype} {list(x.shape)} with strides {list(x.stride())}",
    )


def check_int(name: str, x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ValueError unless x has this shape (-1: any size) and dtype and a dense last dim."""
    check(
        x.dtype == dtype
        and x.dim() == len(shape)
        and all(want in (-1, have) for want, have in zip(shape, x.shape, strict=True))
        and (x.shape[-1] <= 1 or x.stride(-1) == 1),
        f"{name} must be {dtype} {list(shape)} with a dense last dim, got {x.dtype} "
        f"{list(x.shape)} with strides {list(x.stride())}",
    )


def check_factors(name: str, factors: torch.Tensor, heads: int, head_dim: int) -> int:
    """Elements from one head's factors to the next's; ValueError unless float32 [1 or heads, head_dim]."""
    check(
        factors.dtype == torch.float32
        and factors.dim() == 2
        and factors.shape[0] in (1, heads)
        and factors.shape[1] == head_dim
        and factors.is_contiguous(),
        f"{name} must be a dense float32 [1 or {heads}, {head_dim}], got {factors.dtype} "
        f"{list(factors.shape)}",
    )
    return 0 if factors.shape[0] == 1 else head_dim


def check_sinks(sinks: torch.Tensor | None, num_heads: int) -> None:
    """Raise ValueError unless sinks are None or dense [num_heads]; Attention has checked their dtype."""
    check(
        sinks is None or (len(sinks) == num_heads and sinks.is_contiguous()),
        f"sinks must be dense float32 [{num_heads}]",
    )


def check_centres(centres: torch.Tensor, page: Page, heads: int) -> int:
    """Rows of a segment's centres, 0 where there are none.

    Raw keys have none, and a single row is that of codec.tables, of zeros. ValueError unless centres are a
    dense int32 [segments, 1 or heads, d / 2].
    """
    check(
        centres.dtype == torch.int32
        and centres.dim() == 3
        and centres.shape[0] > 0
        and centres.shape[1] in (1, heads)
        and centres.shape[2] == page.slot.head_dim // 2
        and centres.is_contiguous(),
        f"centres must be a dense int32 [segments, 1 or {heads}, {page.slot.head_dim // 2}], got "
        f"{centres.dtype} {list(centres.shape)}",
    )
    some = page.slot.key.rotated and centres.shape[0] * centres.shape[1] > 1
    return centres.shape[1] if some else 0


def check_cache(cache: torch.Tensor, page: Page) -> int:
    """Bytes from one block to the next; ValueError unless cache is uint8 with dense blocks."""
    check(
        cache.dtype == torch.uint8 and cache.dim() == 4,
        f"cache must be uint8 [B, H, N, slot.nbytes], got {cache.dtype} {list(cache.shape)}",
    )
    return dense_block_stride(cache, page)
