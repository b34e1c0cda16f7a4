"""How kernels read a page: the same device functions for every preset, and the launchers' checks.

A page (format.py) holds the codes and radii of one (block, kv head). Kernels see a vector's kind as
one constexpr: the width of a pair's code for polar vectors, FP8 or RAW for the others.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from vllm_polarquant import format as page_format
from vllm_polarquant.format import (
    RADIUS_POWER,
    STATE_BITS,
    PolarFormat,
    VectorFormat,
    dense_block_stride,
)

# decode_radius spells this power out.
assert RADIUS_POWER == 9

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"

FP8 = tl.constexpr(1)
RAW = tl.constexpr(16)
KEY_PARTS = tl.constexpr(page_format.KEY_PARTS)
VALUE_PARTS = tl.constexpr(page_format.VALUE_PARTS)
RADIUS_STRIDE = tl.constexpr(page_format.RADIUS_STRIDE)
RADII = tl.constexpr(page_format.RADIUS_STRIDE // page_format.RADIUS_BYTES)
FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
# The interpreter multiplies bfloat16 as if its bits were integers.
_UPCAST = tl.constexpr(INTERPRET)


def vector_code(vector: VectorFormat) -> int:
    """A vector's kind as kernels take it: its pair's code width, FP8 or RAW."""
    return {"polar": vector.pair_bits, "fp8": FP8.value, "raw": RAW.value}[vector.kind]


def page_constants(fmt: PolarFormat) -> dict[str, int]:
    """A format as the constexpr arguments that every kernel over pages takes."""
    return {
        "HEAD_DIM": fmt.head_dim,
        "HALF_PAD": triton.next_power_of_2(fmt.head_dim // 2),
        "BLOCK_SIZE": fmt.block_size,
        "PAGE_BYTES": fmt.page_bytes,
        "KEY_CODE": vector_code(fmt.key),
        "KEY_BYTES": fmt.key_bytes,
        "KEY_RADIUS_OFFSET": fmt.key_radius_offset,
        "VALUE_CODE": vector_code(fmt.value),
        "VALUE_BYTES": fmt.value_bytes,
        "VALUE_OFFSET": fmt.value_offset,
        "VALUE_RADIUS_OFFSET": fmt.value_radius_offset,
    }


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


def check_cache(cache: torch.Tensor, fmt: PolarFormat) -> int:
    """Bytes from one block to the next; ValueError unless cache is uint8 with dense blocks."""
    check(
        cache.dtype == torch.uint8 and cache.dim() == 4,
        f"cache must be uint8 [B, H, N, slot_bytes], got {cache.dtype} {list(cache.shape)}",
    )
    return dense_block_stride(cache, fmt)


@triton.jit
def page_pointers(
    cache,
    block_table,
    tokens,
    valid,
    head,
    block_stride,
    BLOCK_SIZE: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
):
    """Pointers to the pages of int32 positions `tokens`, in a request's row of the block table.

    An invalid position gets the page of block 0, so that its codes can be loaded without a mask.
    """
    block = tl.load(block_table + tokens // BLOCK_SIZE, mask=valid, other=0)
    return cache + block.to(tl.int64) * block_stride + head.to(tl.int64) * PAGE_BYTES


@triton.jit
def decode_radius(stored):
    """Radii float32 of stored float16: a negative one is minus the root of what it stands for."""
    radius = stored.to(tl.float32)
    power = radius * radius
    power *= power
    power *= power * -radius
    # Rounding the root up can carry its power past float32's range.
    return tl.where(radius >= 0, radius, tl.minimum(power, FLOAT32_MAX))


@triton.jit
def load_radius(pages, slots, valid, OFFSET: tl.constexpr):
    """Radii float32 of `slots` of their pages; 0 where not valid."""
    radii = (pages + OFFSET).to(tl.pointer_type(tl.float16))
    return decode_radius(tl.load(radii + slots * RADII, mask=valid, other=0.0))


@triton.jit
def _decode_fp8(code, DTYPE: tl.constexpr):
    # e4m3's bits are a float16's, seven places up, of a number 256 times smaller.
    code = code.to(tl.int16)
    bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    return (bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0).to(DTYPE)


@triton.jit
def _load(pointers, inside, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside, other=0)


@triton.constexpr_function
def state_bits(code):
    """Bits of the code before it that a pair's point depends on, by the width of the codes."""
    return STATE_BITS[code]


@triton.constexpr_function
def table_entries(code):
    """Points of a vector's table; 0 for the kinds that have none."""
    return 0 if code in (FP8.value, RAW.value) else 1 << (code + STATE_BITS[code])


@triton.constexpr_function
def code_runs(code):
    """Runs of a vector's codes: codes of pairs, or coordinates x of all pairs and then y."""
    return 2 if code in (FP8.value, RAW.value) else 1


@triton.jit
def code_place(slot, byte, CODE: tl.constexpr, ROW_BYTES: tl.constexpr, PARTS: tl.constexpr):
    """Where bytes of tokens' codes lie in their region of a page, int32: format.code_places as a formula."""
    if ROW_BYTES % 8 != 0:
        return slot * ROW_BYTES + byte
    else:
        RUNS: tl.constexpr = code_runs(CODE)
        RUN_BYTES: tl.constexpr = ROW_BYTES // RUNS
        PIECE: tl.constexpr = RUN_BYTES // PARTS
        TURN: tl.constexpr = RUNS * PIECE
        PLANES: tl.constexpr = ROW_BYTES // 32
        REST: tl.constexpr = ROW_BYTES // 8 % 4
        part = byte % RUN_BYTES // PIECE
        half = slot % 16 // 8
        eighth = slot % 8
        if PARTS == KEY_PARTS:
            lane_of_slot, lane_of_byte = 4 * eighth, part
            turn = half
        else:
            lane_of_slot, lane_of_byte = eighth // 2, 4 * part
            turn = 2 * half + eighth % 2
        chunk = slot // 16 * (16 * ROW_BYTES)
        at_of_slot = turn * TURN
        at_of_byte = byte // RUN_BYTES * PIECE + byte % PIECE
        if REST == 0 and (TURN % 16 == 0 or TURN == 8 or TURN == 4):
            # Turns begin or end with planes: a sum of what the slot says and what the byte says.
            return (chunk + at_of_slot + at_of_slot // 16 * 496 + lane_of_slot * 16) + (
                at_of_byte + at_of_byte // 16 * 496 + lane_of_byte * 16
            )
        else:
            at = at_of_slot + at_of_byte
            lane = lane_of_slot + lane_of_byte
            start = at // 16 * 4
            stride = 16
            if REST > 0:
                # Planes of 8 and of 4 bytes.
                stride = tl.where(at >= 16 * PLANES, 8 if REST >= 2 else 4, 16)
            if REST == 3:
                last = at >= 16 * PLANES + 8
                start = tl.where(last, 4 * PLANES + 2, start)
                stride = tl.where(last, 4, stride)
            return chunk + at + start * 124 + lane * stride


@triton.constexpr_function
def _window_bytes(code):
    """Bytes that a window of a code and its state may touch, wherever it starts."""
    width = code + STATE_BITS[code]
    return max((code * pair - STATE_BITS[code]) % 8 + width + 7 for pair in range(8)) // 8


@triton.jit
def _load_windows(
    codes,
    slot,
    CODE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    PARTS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
):
    """Each pair's place in its table, int32 [rows, HALF_PAD], off a little-endian bit stream; 0 past HALF."""
    STATES: tl.constexpr = state_bits(CODE)
    pair = tl.arange(0, HALF_PAD)
    bit = pair * CODE - STATES
    byte = bit >> 3
    word = tl.zeros([slot.shape[0], HALF_PAD], tl.int32)
    for i in tl.static_range(_window_bytes(CODE)):
        inside = (byte + i >= 0) & (byte + i < ROW_BYTES)
        place = code_place(slot[:, None], (byte + i)[None, :], CODE, ROW_BYTES, PARTS)
        part = tl.load(codes[:, None] + place, mask=inside[None, :], other=0)
        word |= part.to(tl.int32) << (8 * i)
    window = (word >> (bit & 7)[None, :]) & ((1 << (CODE + STATES)) - 1)
    return tl.where((pair < HALF)[None, :], window, 0)


@triton.jit
def load_lut(lut, CODE: tl.constexpr):
    """A vector's table as the registers that load_unit takes."""
    if CODE != RAW and CODE != FP8:
        return tl.load(lut + tl.arange(0, table_entries(CODE)))
    else:
        return tl.zeros([1], tl.int32)


@triton.jit
def load_unit(
    codes,
    slot,
    valid,
    lut,
    CODE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Decode vectors before radius and rotation -> x, y [rows, HALF_PAD].

    codes: pointers to the region of each row's page. slot: int32, each row's token in it. x holds dims j
    and y dims j + HEAD_DIM / 2, in DTYPE. Past HEAD_DIM / 2 polar vectors hold some point, so the other
    operand must be 0 there or the result unused. Rows not valid hold finite numbers.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    if CODE != RAW and CODE != FP8:
        # A lookup in shared memory takes two instructions, one in global memory five or more.
        windows = _load_windows(codes, slot, CODE, ROW_BYTES, PARTS, HALF, HALF_PAD)
        flat = tl.reshape(windows, [slot.shape[0] * HALF_PAD])
        point = tl.reshape(tl.gather(lut, flat, 0), [slot.shape[0], HALF_PAD])
        x = (point & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
        y = (point >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        pair = tl.arange(0, HALF_PAD)
        inside = (pair < HALF)[None, :]
        if CODE == RAW:
            # Unwritten raw slots may hold NaN, and 0 * NaN is not 0.
            first = code_place(slot[:, None], 2 * pair[None, :], CODE, ROW_BYTES, PARTS)
            second = code_place(slot[:, None], 2 * (pair + HALF)[None, :], CODE, ROW_BYTES, PARTS)
            values = (codes[:, None] + first).to(tl.pointer_type(DTYPE))
            x = tl.load(values, mask=inside & valid[:, None], other=0.0)
            values = (codes[:, None] + second).to(tl.pointer_type(DTYPE))
            y = tl.load(values, mask=inside & valid[:, None], other=0.0)
        else:
            first = code_place(slot[:, None], pair[None, :], CODE, ROW_BYTES, PARTS)
            second = code_place(slot[:, None], (pair + HALF)[None, :], CODE, ROW_BYTES, PARTS)
            x = _decode_fp8(_load(codes[:, None] + first, inside, HALF == HALF_PAD), DTYPE)
            y = _decode_fp8(_load(codes[:, None] + second, inside, HALF == HALF_PAD), DTYPE)
    return x, y


@triton.jit
def dot(a, b):
    """The product in float32 of operands in a 16-bit type."""
    if _UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b)
