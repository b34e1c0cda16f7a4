"""Encode new keys and values into their slots: rotate, search, pack, all in one launch.

The search is codec.viterbi over the points that codec.search_cells names. Four lanes work on a vector, one
for each value of the top two bits of the code before, and hold the costs of the four codes before that.
"""

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
# The same for costs, as integers of 2**-14: below 256, as a point is at most 5 and a pair 16 long.
_COST_ROUNDER = tl.constexpr(1.5 * 2.0**9)
_COST_ROUNDER_BITS = tl.constexpr(0x44400000)
# Costs have two more low bits, which name the branch; the costs of a vector sum up to less than 2**25.
_UNREACHED = tl.constexpr(1 << 28)
# Bytes that the search keeps of a pair: its coordinates, the branches into 16 states, and four times (each
# lane writes for itself) the branch taken.
_SCRATCH_BYTES = 4 + 4 + 4


class SearchCells(Protocol):
    """codec.SearchCells: points int32 [cells, 4] and codes int32 [cells]."""

    @property
    def points(self) -> torch.Tensor: ...
    @property
    def codes(self) -> torch.Tensor: ...


class EncoderTables(Protocol):
    """What store_kv reads of codec.Tables: rotation float32 [d, d] and the cells."""

    @property
    def rotation(self) -> torch.Tensor: ...
    @property
    def key_cells(self) -> SearchCells: ...
    @property
    def value_cells(self) -> SearchCells: ...


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
def _look_up_four(table, index):
    """The four entries of each row of a table of int32 [rows, 4] that nobody writes."""
    if _INTERPRET:
        first = table + index * 4
        return tl.load(first), tl.load(first + 1), tl.load(first + 2), tl.load(first + 3)
    else:
        address = table.to(tl.int64) + index.to(tl.int64) * 16
        return tl.inline_asm_elementwise(
            "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l",
            [address],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def _flips(before):
    """Sign bits of a packed (x, y), x in the low half, by the top two bits of the code before."""
    return ((before & 2) << 14) | (before << 31)


@triton.jit
def _low_half(packed, DTYPE: tl.constexpr):
    return (packed & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _high_half(packed, DTYPE: tl.constexpr):
    return (packed >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _cost(point, x, y):
    """Half the squared distance, without |(x, y)|^2 / 2, as a multiple of 4."""
    px, py = _low_half(point, tl.bfloat16), _high_half(point, tl.bfloat16)
    cost = px * (0.5 * px - x) + py * (0.5 * py - y)
    return ((cost + _COST_ROUNDER).to(tl.int32, bitcast=True) - _COST_ROUNDER_BITS) << 2


@triton.jit
def _branches(pairs, flips, points):
    """Costs int32 [V, 4] of the nearest point of each quarter of the codebook, for each code before."""
    flipped = pairs[:, None] ^ flips
    x, y = _low_half(flipped, tl.float16), _high_half(flipped, tl.float16)
    p0, p1, p2, p3 = _look_up_four(points, _cell(x, y))
    return _cost(p0, x, y), _cost(p1, x, y), _cost(p2, x, y), _cost(p3, x, y)


@triton.jit
def _least(a, b, c, d):
    return tl.minimum(tl.minimum(a, b), tl.minimum(c, d))


@triton.jit
def _search(
    pairs,
    back,
    taken,
    points,
    VECTORS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Viterbi's algorithm on coordinates that lie in scratch memory, and its trace back.

    pairs: packed float16 (x, y), int32 [HALF, VECTORS]. back: bytes [HALF, VECTORS, 4], scratch. taken:
    bytes [HALF, VECTORS, 4], written, four alike: bits 0-1 are the top two of the code, 2-3 those of the
    code before, and 4-5 the quarter of the codebook.

    Lane b of a vector holds in cost_x the cost of the state that the codes' top bits b, and before them
    x ^ b, lead to: then the branch that takes new bits n reads quarter n ^ x in every lane.
    """
    vector = tl.arange(0, VECTORS)
    before = tl.arange(0, 4)[None, :] + tl.zeros([VECTORS, 1], tl.int32)
    flips = _flips(before)
    odd, high = (before & 1) != 0, (before & 2) != 0
    cost0 = tl.where(before == 0, 0, _UNREACHED)
    cost1 = tl.full([VECTORS, 4], _UNREACHED, tl.int32) + 1
    cost2 = cost1 + 1
    cost3 = cost1 + 2
    back_row = back + vector[:, None] * 4 + before
    b0, b1, b2, b3 = _branches(tl.load(pairs + vector), flips, points)
    for j in tl.range(HALF):
        n0 = _least(cost0 + b0, cost1 + b1, cost2 + b2, cost3 + b3)
        n1 = _least(cost0 + b1, cost1 + b0, cost2 + b3, cost3 + b2)
        n2 = _least(cost0 + b2, cost1 + b3, cost2 + b0, cost3 + b1)
        n3 = _least(cost0 + b3, cost1 + b2, cost2 + b1, cost3 + b0)
        # The next pair's points are on their way while this one's branches are compared.
        b0, b1, b2, b3 = _branches(tl.load(pairs + min(j + 1, HALF - 1) * VECTORS + vector), flips, points)
        branch = (n0 & 3) | ((n1 & 3) << 2) | ((n2 & 3) << 4) | ((n3 & 3) << 6)
        tl.store(back_row + j * (VECTORS * 4), branch.to(tl.uint8))
        # n_new of lane `before` belongs in lane `new`, as its cost_x with x = new ^ before.
        s0, s1 = tl.where(odd, n1, n0), tl.where(odd, n0, n1)
        s2, s3 = tl.where(odd, n3, n2), tl.where(odd, n2, n3)
        u0, u2 = tl.where(high, s2, s0), tl.where(high, s0, s2)
        u1, u3 = tl.where(high, s3, s1), tl.where(high, s1, s3)
        cost0 = u0 & -4
        cost1 = (tl.gather(u1, before ^ 1, 1) & -4) | 1
        cost2 = (tl.gather(u2, before ^ 2, 1) & -4) | 2
        cost3 = (tl.gather(u3, before ^ 3, 1) & -4) | 3
    tl.debug_barrier()

    # The two low bits of the least cost name x; the lane is found by comparing.
    least = _least(cost0, cost1, cost2, cost3)
    least = (least & -4) * 4 + before * 4 + (least & 3)
    # All four lanes walk back alike: what one lane knows would have to pass through shared memory.
    end = tl.broadcast_to(tl.min(least, axis=1)[:, None], [VECTORS, 4])
    new = (end >> 2) & 3
    old = new ^ (end & 3)
    for i in tl.range(HALF):
        j = HALF - 1 - i
        branch = tl.load(back + (j * VECTORS + vector[:, None]) * 4 + old).to(tl.int32)
        x = (branch >> (new * 2)) & 3
        step = new | (old << 2) | ((new ^ x) << 4)
        tl.store(taken + (j * VECTORS + vector[:, None]) * 4 + before, step.to(tl.uint8))
        new, old = old, old ^ x
    tl.debug_barrier()


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
    cell_points,
    cell_codes,
    scratch,
    block,
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
    BLOCK_VECTORS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    vector = block * BLOCK_VECTORS + tl.arange(0, BLOCK_VECTORS)
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
            x1, x2 = (y1 * unit).to(tl.float16), (y2 * unit).to(tl.float16)
            pairs = x1.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            pairs |= x2.to(tl.int16, bitcast=True).to(tl.int32) << 16
            SIZE: tl.constexpr = HALF_PAD * BLOCK_VECTORS
            place = pair[None, :] * BLOCK_VECTORS + tl.arange(0, BLOCK_VECTORS)[:, None]
            kept_pairs = scratch.to(tl.pointer_type(tl.int32))
            # Other threads may still read what they kept of the program's last block.
            tl.debug_barrier()
            tl.store(kept_pairs + place, pairs)
            tl.debug_barrier()
            taken = scratch + 8 * SIZE
            _search(kept_pairs, scratch + 4 * SIZE, taken, cell_points, BLOCK_VECTORS, HALF)

            inside = (pair < HALF)[None, :]
            branch = tl.load(taken + place * 4, mask=inside, other=0).to(tl.int32)
            pairs ^= _flips((branch >> 2) & 3)
            x1, x2 = _low_half(pairs, tl.float16), _high_half(pairs, tl.float16)
            cell = _cell(x1, x2)
            quarter = branch >> 4
            point = _look_up(cell_points, cell * 4 + quarter)
            low = (_look_up(cell_codes, cell) >> (quarter * 8)) & 0xFF
            codes = ((branch & 3) << (CODE - 2)) | low
            px, py = _low_half(point, tl.bfloat16), _high_half(point, tl.bfloat16)
            length = tl.sqrt(tl.sum(tl.where(inside, px * px + py * py, 0.0), axis=1))
            product = tl.sum(tl.where(inside, x1 * px + x2 * py, 0.0), axis=1)
            cos = product / (length * tl.sqrt(float(HEAD_DIM)))
            gain = tl.full([BLOCK_VECTORS], 1.0, tl.float32)
            if GAIN == "fit":
                gain = tl.maximum(cos, _MIN_FIT_GAIN)
            elif GAIN == "unbiased":
                gain = 1.0 / cos
            radius = _encode_radius(amax * (norm * gain / length))
            codes = tl.where(usable[:, None], codes, 0)
            _store_codes(codes, rows, keep, CODE, HALF)
        tl.store(radius_pointer, tl.where(usable, radius, 0.0), mask=keep)


@triton.jit
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
    key_cell_points,
    key_cell_codes,
    value_cell_points,
    value_cell_codes,
    scratch,
    NUM_HEADS: tl.constexpr,
    KEY_GAIN: tl.constexpr,
    VALUE_GAIN: tl.constexpr,
    BLOCK_VECTORS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCRATCH_BYTES: tl.constexpr,
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
    program = tl.program_id(0) * 2 + tl.program_id(1)
    scratch += program.to(tl.int64) * SCRATCH_BYTES
    for block in tl.range(tl.program_id(0), tl.cdiv(num_vectors, BLOCK_VECTORS), tl.num_programs(0)):
        if tl.program_id(1) == 0:
            _encode(
                key, key_stride_token, key_stride_head, cache, block_stride, slot_mapping, num_vectors,
                rotation, key_cell_points, key_cell_codes, scratch, block, NUM_HEADS, HEAD_DIM, HALF_PAD,
                BLOCK_SIZE, PAGE_BYTES, KEY_CODE, KEY_BYTES, 0, KEY_RADIUS_OFFSET, KEY_GAIN,
                BLOCK_VECTORS, BLOCK_K,
            )  # fmt: skip
        else:
            _encode(
                value, value_stride_token, value_stride_head, cache, block_stride, slot_mapping,
                num_vectors, rotation, value_cell_points, value_cell_codes, scratch, block, NUM_HEADS,
                HEAD_DIM, HALF_PAD, BLOCK_SIZE, PAGE_BYTES, VALUE_CODE, VALUE_BYTES, VALUE_OFFSET,
                VALUE_RADIUS_OFFSET, VALUE_GAIN, BLOCK_VECTORS, BLOCK_K,
            )  # fmt: skip


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
    op = "store" if num_vectors >= 1 << 12 else "store_few"
    config = tuning.config(op, fmt, key.device)
    constants = page_constants(fmt)
    programs = min(triton.cdiv(num_vectors, config["block_vectors"]), config["programs"])
    scratch_bytes = _SCRATCH_BYTES * config["block_vectors"] * constants["HALF_PAD"]
    scratch = torch.empty(2 * programs * scratch_bytes, dtype=torch.uint8, device=key.device)
    _store_kernel[(programs, 2)](
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
        tables.key_cells.points,
        tables.key_cells.codes,
        tables.value_cells.points,
        tables.value_cells.codes,
        scratch,
        NUM_HEADS=key.shape[1],
        KEY_GAIN=fmt.key.gain,
        VALUE_GAIN=fmt.value.gain,
        BLOCK_VECTORS=config["block_vectors"],
        BLOCK_K=config["block_k"],
        SCRATCH_BYTES=scratch_bytes,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        **constants,
    )
