"""Encode new keys and values into their slots: rotate, search, pack, all in one launch."""

from __future__ import annotations

from typing import Protocol

import torch
import triton
import triton.language as tl

from vllm_polarquant.format import (
    CELL_GRID,
    CELLS_PER_UNIT,
    FAR_CELL,
    FP8_MAX,
    MIN_FIT_GAIN,
    RADIUS_MAX,
    RADIUS_MIN,
    RADIUS_POWER,
    PolarFormat,
    VectorFormat,
)
from vllm_polarquant.kernels import tuning
from vllm_polarquant.kernels.page import (
    FP8,
    INTERPRET,
    RAW,
    check,
    check_cache,
    check_heads,
    check_int,
    decode_radius,
    dot,
    page_constants,
)

SCALES: dict = {}
MANY_VECTORS = 1 << 12
"""From as many vectors on, programs take more of them."""

_FP8_MAX = tl.constexpr(FP8_MAX)
_MIN_FIT_GAIN = tl.constexpr(MIN_FIT_GAIN)
_RADIUS_MIN = tl.constexpr(RADIUS_MIN)
_RADIUS_MAX = tl.constexpr(RADIUS_MAX)
_RADIUS_POWER = tl.constexpr(RADIUS_POWER)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_INTERPRET = tl.constexpr(INTERPRET)
_CELL_GRID = tl.constexpr(CELL_GRID)
_CELL_BITS = tl.constexpr(CELL_GRID.bit_length() - 1)
_CELLS_PER_UNIT = tl.constexpr(float(CELLS_PER_UNIT))
_FAR_PER_UNIT = tl.constexpr(CELLS_PER_UNIT / FAR_CELL)
_NEAR_EXTENT = tl.constexpr((CELL_GRID - 1) / (2 * CELLS_PER_UNIT))
# Added to a small float, 1.5 * 2**23 leaves the number, rounded, in the low bits.
_ROUNDER = tl.constexpr(1.5 * 2.0**23 + CELL_GRID // 2)


class EncoderTables(Protocol):
    """What store_kv reads of codec.Tables: rotation float32 [d, d], luts and cells int32."""

    @property
    def rotation(self) -> torch.Tensor: ...
    @property
    def key_lut(self) -> torch.Tensor: ...
    @property
    def value_lut(self) -> torch.Tensor: ...
    @property
    def key_cells(self) -> torch.Tensor: ...
    @property
    def value_cells(self) -> torch.Tensor: ...


@triton.jit
def _encode_radius(radius):
    plain = ((radius >= _RADIUS_MIN) & (radius <= _RADIUS_MAX)) | (radius == 0)
    root = tl.exp2(tl.log2(radius) / _RADIUS_POWER)
    return tl.where(plain, radius, -root).to(tl.float16)


@triton.jit
def _encode_fp8(x):
    """Float32 within +-448 as the bits of e4m3, rounded to nearest even."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Adding 2**14, whose last place is e4m3's smallest step, makes the float unit do the rounding.
    subnormal = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(tl.abs(x) < 0.015625, subnormal, normal)
    return code | ((bits >> 24) & 0x80)


@triton.jit
def _cell(x, y):
    """Index int32 into codec.search_cells of the cell that each (x, y) lies in."""
    far = tl.maximum(tl.abs(x), tl.abs(y)) >= _NEAR_EXTENT
    per_unit = tl.where(far, _FAR_PER_UNIT, _CELLS_PER_UNIT)
    column = (x * per_unit + _ROUNDER).to(tl.int32, bitcast=True) & (_CELL_GRID - 1)
    row = (y * per_unit + _ROUNDER).to(tl.int32, bitcast=True) & (_CELL_GRID - 1)
    return (row << _CELL_BITS) + column + tl.where(far, _CELL_GRID * _CELL_GRID, 0)


@triton.jit
def _look_up(table, index):
    """Entries of a table of int32 that nobody writes, in the layout of the index.

    For tl.load the compiler would pick a layout of its own and move every index and every entry
    through shared memory.
    """
    if _INTERPRET:
        return tl.load(table + index)
    else:
        address = table.to(tl.int64) + index.to(tl.int64) * 4
        return tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=r,l", [address], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _candidate(x, y, codes, lut, INDEX: tl.constexpr, DTYPE: tl.constexpr):
    """Of a cell's four codes the one of byte INDEX, its point's product with (x, y), and |p|^2 / 2."""
    code = (codes >> (8 * INDEX)) & 0xFF
    point = _look_up(lut, code)
    px = (point & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    py = (point >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return code, x * px + y * py, 0.5 * (px * px + py * py)


@triton.jit
def _closer(score, code, product, other_code, other_product, other_half, SCALE: tl.constexpr):
    """The better of two candidates, the first if they are equally near."""
    other_score = other_product * SCALE - other_half
    closer = other_score > score
    code = tl.where(closer, other_code, code)
    product = tl.where(closer, other_product, product)
    return tl.where(closer, other_score, score), code, product


@triton.jit
def _store_codes(codes, rows, keep, WIDTH: tl.constexpr, HALF: tl.constexpr):
    """Pack codes int32 [rows, HALF_PAD] as a little-endian bit stream at the row pointers."""
    HALF_PAD: tl.constexpr = codes.shape[1]
    GROUP: tl.constexpr = 1 if WIDTH == 8 else (2 if WIDTH == 4 else (4 if WIDTH == 6 else 8))
    GROUP_BYTES: tl.constexpr = GROUP * WIDTH // 8
    group = tl.arange(0, HALF_PAD // GROUP)
    if GROUP == 1:
        word = codes
    else:
        shifts = (tl.arange(0, GROUP) * WIDTH).to(tl.int64 if GROUP == 8 else tl.int32)
        groups = tl.reshape(codes, [codes.shape[0], HALF_PAD // GROUP, GROUP])
        word = tl.sum(groups.to(shifts.dtype) << shifts[None, None, :], axis=2)
    mask = keep[:, None] & (group < HALF // GROUP)[None, :]
    for i in tl.static_range(GROUP_BYTES):
        pointers = rows[:, None] + group[None, :] * GROUP_BYTES + i
        tl.store(pointers, ((word >> (8 * i)) & 0xFF).to(tl.uint8), mask=mask)


@triton.jit
def _encode(
    x,
    x_stride_token,
    x_stride_head,
    cache,
    block_stride,
    slot_mapping,
    num_vectors,
    rotation,
    lut,
    cells,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    CODE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    CODES_OFFSET: tl.constexpr,
    RADIUS_OFFSET: tl.constexpr,
    GAIN: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_VECTORS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    vector = tl.program_id(0) * BLOCK_VECTORS + tl.arange(0, BLOCK_VECTORS)
    token = (vector // NUM_HEADS).to(tl.int64)
    head = (vector % NUM_HEADS).to(tl.int64)
    slot = tl.load(slot_mapping + token, mask=vector < num_vectors, other=-1)
    keep = slot >= 0
    slot = tl.where(keep, slot, 0)
    source = x + token * x_stride_token + head * x_stride_head
    page = cache + (slot // BLOCK_SIZE) * block_stride + head * PAGE_BYTES
    place = slot % BLOCK_SIZE
    rows = page + CODES_OFFSET + place * ROW_BYTES
    radius_pointer = (page + RADIUS_OFFSET).to(tl.pointer_type(tl.float16)) + place

    pair = tl.arange(0, HALF_PAD)
    mask = keep[:, None] & (pair < HALF)[None, :]
    first = tl.load(source[:, None] + pair[None, :], mask=mask, other=0.0)
    second = tl.load(source[:, None] + HALF + pair[None, :], mask=mask, other=0.0)
    if CODE == RAW:
        raw_rows = rows.to(tl.pointer_type(x.dtype.element_ty))[:, None] + pair[None, :]
        tl.store(raw_rows, first, mask=mask)
        tl.store(raw_rows + HALF, second, mask=mask)
        tl.store(radius_pointer, tl.full([BLOCK_VECTORS], 1.0, tl.float16), mask=keep)
    else:
        # As integers, magnitudes sort like the floats, with infinity and NaN above all others.
        bits = tl.maximum(
            first.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF,
            second.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF,
        )
        amax_bits = tl.max(bits, axis=1)
        usable = (amax_bits > 0) & (amax_bits < _INFINITY_BITS)
        amax = tl.where(usable, amax_bits, 0).to(tl.float32, bitcast=True)
        divisor = tl.where(usable, amax, 1.0)

        # Dividing by the largest coordinate first keeps denormals and 3e38 inside float32's range.
        # Where R is a Hadamard matrix of +-1 / sqrt(d), dividing by a power of two instead keeps x
        # exact in its 16 bits: one product on tensor cores then does what else takes three in tf32.
        HADAMARD: tl.constexpr = HALF == HALF_PAD
        if HADAMARD:
            exponent = tl.minimum(tl.maximum(amax_bits >> 23, 6), 250)
            inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
            amax = (exponent << 23).to(tl.float32, bitcast=True) / tl.sqrt(float(HEAD_DIM))
            amax = tl.where(usable, amax, 0.0)
        y1 = tl.zeros([BLOCK_VECTORS, HALF_PAD], tl.float32)
        y2 = tl.zeros([BLOCK_VECTORS, HALF_PAD], tl.float32)
        for start in tl.range(0, HEAD_DIM, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            part = tl.load(
                source[:, None] + k[None, :],
                mask=(keep & usable)[:, None] & (k < HEAD_DIM)[None, :],
                other=0.0,
            )
            entry = rotation + pair[:, None] * HEAD_DIM + k[None, :]
            inside = (pair < HALF)[:, None] & (k < HEAD_DIM)[None, :]
            upper = tl.load(entry, mask=inside, other=0.0)
            lower = tl.load(entry + HALF * HEAD_DIM, mask=inside, other=0.0)
            if HADAMARD:
                part = (part.to(tl.float32) * inverse[:, None]).to(x.dtype.element_ty)
                upper = tl.where(upper > 0, 1.0, -1.0).to(x.dtype.element_ty)
                lower = tl.where(lower > 0, 1.0, -1.0).to(x.dtype.element_ty)
                y1 += dot(part, tl.trans(upper))
                y2 += dot(part, tl.trans(lower))
            else:
                part = tl.div_rn(part.to(tl.float32), tl.broadcast_to(divisor[:, None], part.shape))
                y1 = tl.dot(part, tl.trans(upper), acc=y1, input_precision="tf32x3")
                y2 = tl.dot(part, tl.trans(lower), acc=y2, input_precision="tf32x3")

        if CODE == FP8:
            peak = tl.max(tl.maximum(tl.abs(y1), tl.abs(y2)), axis=1)
            radius = _encode_radius(amax * (peak / _FP8_MAX))
            # Codes are taken against the stored radius, so that its rounding adds no error.
            # A bare 1e-38, subnormal in float32, would become a float64.
            least = tl.full([BLOCK_VECTORS], 1e-38, tl.float32)
            factor = tl.div_rn(amax, tl.maximum(decode_radius(radius), least))
            factor = tl.where(usable, factor, 0.0)[:, None]
            x1 = tl.clamp(y1 * factor, -_FP8_MAX, _FP8_MAX)
            x2 = tl.clamp(y2 * factor, -_FP8_MAX, _FP8_MAX)
            zero = usable[:, None]
            code_rows = rows[:, None] + pair[None, :]
            tl.store(code_rows, tl.where(zero, _encode_fp8(x1), 0).to(tl.uint8), mask=mask)
            tl.store(code_rows + HALF, tl.where(zero, _encode_fp8(x2), 0).to(tl.uint8), mask=mask)
        else:
            norm = tl.maximum(tl.sqrt(tl.sum(y1 * y1 + y2 * y2, axis=1)), 1e-30)
            unit = (tl.sqrt(float(HEAD_DIM)) / norm)[:, None]
            y1 *= unit
            y2 *= unit
            DTYPE: tl.constexpr = x.dtype.element_ty
            near = _look_up(cells, _cell(y1, y2))
            code0, product0, half0 = _candidate(y1, y2, near, lut, 0, DTYPE)
            code1, product1, half1 = _candidate(y1, y2, near, lut, 1, DTYPE)
            code2, product2, half2 = _candidate(y1, y2, near, lut, 2, DTYPE)
            code3, product3, half3 = _candidate(y1, y2, near, lut, 3, DTYPE)
            for i in tl.static_range(len(SCALES)):
                score, codes, product = product0 * SCALES[i] - half0, code0, product0
                score, codes, product = _closer(score, codes, product, code1, product1, half1, SCALES[i])
                score, codes, product = _closer(score, codes, product, code2, product2, half2, SCALES[i])
                score, codes, product = _closer(score, codes, product, code3, product3, half3, SCALES[i])
                half = product * SCALES[i] - score
                if HALF != HALF_PAD:
                    half = tl.where((pair < HALF)[None, :], half, 0.0)
                length = tl.sqrt(2.0 * tl.sum(half, axis=1))
                cos = tl.sum(product, axis=1) / (length * tl.sqrt(float(HEAD_DIM)))
                if i == 0:
                    best_cos, best_length, best_codes = cos, length, codes
                else:
                    better = cos > best_cos
                    best_cos = tl.where(better, cos, best_cos)
                    best_length = tl.where(better, length, best_length)
                    best_codes = tl.where(better[:, None], codes, best_codes)
            gain = tl.full([BLOCK_VECTORS], 1.0, tl.float32)
            if GAIN == "fit":
                gain = tl.maximum(best_cos, _MIN_FIT_GAIN)
            elif GAIN == "unbiased":
                gain = 1.0 / best_cos
            radius = _encode_radius(amax * (norm * gain / best_length))
            best_codes = tl.where(usable[:, None], best_codes, 0)
            _store_codes(best_codes, rows, keep, CODE, HALF)
        tl.store(radius_pointer, tl.where(usable, radius, 0.0), mask=keep)


@triton.jit(do_not_specialize=["num_vectors"], do_not_specialize_on_alignment=["slot_mapping"])
def _store_kernel(
    key,
    key_stride_token,
    key_stride_head,
    value,
    value_stride_token,
    value_stride_head,
    cache,
    block_stride,
    slot_mapping,
    num_vectors,
    rotation,
    key_lut,
    value_lut,
    key_cells,
    value_cells,
    NUM_HEADS: tl.constexpr,
    KEY_GAIN: tl.constexpr,
    KEY_SCALES: tl.constexpr,
    VALUE_GAIN: tl.constexpr,
    VALUE_SCALES: tl.constexpr,
    BLOCK_VECTORS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    KEY_CODE: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    KEY_RADIUS_OFFSET: tl.constexpr,
    VALUE_CODE: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    VALUE_OFFSET: tl.constexpr,
    VALUE_RADIUS_OFFSET: tl.constexpr,
):
    if tl.program_id(1) == 0:
        _encode(
            key, key_stride_token, key_stride_head, cache, block_stride, slot_mapping, num_vectors,
            rotation, key_lut, key_cells, NUM_HEADS, HEAD_DIM, HALF_PAD, BLOCK_SIZE, PAGE_BYTES,
            KEY_CODE, KEY_BYTES, 0, KEY_RADIUS_OFFSET, KEY_GAIN, KEY_SCALES, BLOCK_VECTORS, BLOCK_K,
        )  # fmt: skip
    else:
        _encode(
            value, value_stride_token, value_stride_head, cache, block_stride, slot_mapping,
            num_vectors, rotation, value_lut, value_cells, NUM_HEADS, HEAD_DIM, HALF_PAD, BLOCK_SIZE,
            PAGE_BYTES, VALUE_CODE, VALUE_BYTES, VALUE_OFFSET, VALUE_RADIUS_OFFSET, VALUE_GAIN,
            VALUE_SCALES, BLOCK_VECTORS, BLOCK_K,
        )  # fmt: skip


def _scales(vector: VectorFormat) -> tuple[float, ...]:
    return SCALES.get(vector.bits, (1.0,)) if vector.kind == "polar" else (1.0,)


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    fmt: PolarFormat,
    tables: EncoderTables,
) -> None:
    """Write keys and values to their slots, one launch for both.

    A zero vector, or one that holds a NaN or an infinity, is stored as radius 0 and codes 0.

    Args:
        key: bfloat16 or float16 [T, H, d], last dim dense, any other strides.
        value: as key.
        cache: uint8 [B, H, N, slot_bytes] with dense blocks.
        slot_mapping: int64 [T'], T' <= T, of slots block * N + token; those below 0 are dropped, as
            are the rows of key and value past T'.
        fmt: the cache's format.
        tables: codec.tables(fmt, key.dtype, key.device).

    Raises:
        ValueError: for other shapes, dtypes or strides.
    """
    check_heads("key", key, fmt.head_dim)
    check_heads("value", value, fmt.head_dim)
    check_int("slot_mapping", slot_mapping, (-1,), torch.int64)
    block_stride = check_cache(cache, fmt)
    check(
        key.shape == value.shape and key.dtype == value.dtype and key.shape[1] == cache.shape[1],
        f"key and value must agree with each other and with the cache's {cache.shape[1]} heads, "
        f"got {key.dtype} {list(key.shape)} and {value.dtype} {list(value.shape)}",
    )
    check(
        len(slot_mapping) <= len(key),
        f"slot_mapping has {len(slot_mapping)} slots for {len(key)} tokens",
    )
    num_vectors = len(slot_mapping) * key.shape[1]
    if not num_vectors:
        return
    # Few vectors leave most of the GPU idle: small programs then have the least latency.
    op = "store" if num_vectors >= MANY_VECTORS else "store_few"
    config = tuning.config(op, fmt, key.device)
    _store_kernel[(triton.cdiv(num_vectors, config["block_vectors"]), 2)](
        key,
        key.stride(0),
        key.stride(1),
        value,
        value.stride(0),
        value.stride(1),
        cache,
        block_stride,
        slot_mapping,
        num_vectors,
        tables.rotation,
        tables.key_lut,
        tables.value_lut,
        tables.key_cells,
        tables.value_cells,
        NUM_HEADS=key.shape[1],
        KEY_GAIN=fmt.key.gain,
        KEY_SCALES=_scales(fmt.key),
        VALUE_GAIN=fmt.value.gain,
        VALUE_SCALES=_scales(fmt.value),
        BLOCK_VECTORS=config["block_vectors"],
        BLOCK_K=config["block_k"],
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        **page_constants(fmt),
    )
