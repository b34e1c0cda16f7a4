"""Encode new keys and values into their slots: rotate, search, pack, all in one launch.

The search is codec.viterbi. Each state of a vector's trellis has a lane, which holds the cost of the best
path that leads there and, as bits, the path's last states.
"""

from __future__ import annotations

from typing import Protocol

import torch
import triton
import triton.language as tl

from vllm_polarquant.format import (
    CELL_CANDIDATES,
    CELL_GRID,
    CELLS_PER_UNIT,
    FAR_CELL,
    FP8_MAX,
    MIN_FIT_GAIN,
    RADIUS_MAX,
    RADIUS_MIN,
    RADIUS_POWER,
    STATE_BITS,
    PolarFormat,
)
from vllm_polarquant.kernels import tuning
from vllm_polarquant.kernels.lanes import unpack_halves
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
    state_bits,
)

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
# The same for costs, as integers of 2**-14: below 256, as a point is at most 6 and a pair 16 long.
_COST_ROUNDER = tl.constexpr(1.5 * 2.0**9)
_COST_ROUNDER_BITS = tl.constexpr(0x44400000)
# More than any path's cost, which 2**-14 and a state number below it make at most 2**26: a path costs half
# its squared distance less half the squared length, which is head_dim.
_UNREACHED = tl.constexpr(1 << 28)
_WINDOW = tl.constexpr(8)
"""Pairs whose states a lane keeps in one word. It divides every head_dim / 2, and nine states have 27
bits."""


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
def _read(pointers):
    """Words of memory that this kernel has written, before a barrier, in the layout of the pointers."""
    if _INTERPRET:
        return tl.load(pointers)
    else:
        return tl.inline_asm_elementwise(
            "ld.global.b32 $0, [$1];", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.constexpr_function
def _states(code):
    return 1 << STATE_BITS[code]


@triton.constexpr_function
def _tries_all(code):
    """Whether all of a set of parallel branches are tried: up to four cost less than looking up which."""
    return code - STATE_BITS[code] <= 2


@triton.constexpr_function
def _tried(code):
    """How many of each set of parallel branches are tried."""
    return 1 << (code - STATE_BITS[code]) if _tries_all(code) else CELL_CANDIDATES[code]


@triton.jit
def _row(cells, x, y, new, CODE: tl.constexpr):
    """Which branches into state `new` to try for each (x, y), int32."""
    if _tries_all(CODE):
        return new
    else:
        return _look_up(cells, _cell(x, y) * _states(CODE) + new)


@triton.jit
def _point(lut, row, new, old, INDEX: tl.constexpr, CODE: tl.constexpr):
    """Candidate INDEX of the branches from state `old` to `new`: its middle bits, and the packed point."""
    MIDDLE_BITS: tl.constexpr = CODE - state_bits(CODE)
    if _tries_all(CODE):
        middle = INDEX
    else:
        middle = (row >> ((old * _tried(CODE) + INDEX) * MIDDLE_BITS)) & ((1 << MIDDLE_BITS) - 1)
    window = (((new << MIDDLE_BITS) | middle) << state_bits(CODE)) | old
    return middle, _look_up(lut, window)


@triton.jit
def _cost(point, x, y, DTYPE: tl.constexpr):
    """Half the squared distance, without |(x, y)|^2 / 2, plus _COST_ROUNDER."""
    px, py = unpack_halves(point, DTYPE)
    return px * (0.5 * px - x) + (py * (0.5 * py - y) + _COST_ROUNDER)


@triton.jit
def _points(lut, row, new, CODE: tl.constexpr):
    """The points of all branches to try into state `new`, packed, by old state and candidate: a tuple."""
    points = ()
    for old in tl.static_range(_states(CODE)):
        for i in tl.static_range(_tried(CODE)):
            _, point = _point(lut, row, new, old, i, CODE)
            points = points + (point,)
    return points


@triton.jit
def _search(
    pairs,
    words,
    path,
    lut,
    cells,
    VECTORS: tl.constexpr,
    HALF: tl.constexpr,
    CODE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Viterbi's algorithm on coordinates that lie in scratch memory.

    pairs: packed float16 (x, y), int32 [HALF, VECTORS]. words: int32 [HALF / 8, VECTORS, states], scratch.
    path: int32 [VECTORS, HALF / 8], written: the state before eight pairs and those after each, the last
    one lowest.
    """
    STATES: tl.constexpr = _states(CODE)
    BITS: tl.constexpr = state_bits(CODE)
    TRIED: tl.constexpr = _tried(CODE)
    WINDOWS: tl.constexpr = HALF // _WINDOW
    new = tl.arange(0, STATES)[None, :] + tl.zeros([VECTORS, 1], tl.int32)
    vector = tl.arange(0, VECTORS)[:, None] + tl.zeros([1, STATES], tl.int32)
    from_state = ()
    for old in tl.static_range(STATES):
        from_state = from_state + (new * 0 + old,)
    # The low bits of a cost are its state.
    cost = tl.where(new == 0, 0, _UNREACHED) + new
    settle = new - (tl.full([VECTORS, STATES], _COST_ROUNDER_BITS, tl.int32) << BITS)

    # Loads are issued pairs ahead: the points' of the next, the cells' of the one after, and its
    # coordinates'.
    source = pairs + vector
    this, next, third = _read(source), _read(source + VECTORS), _read(source + 2 * VECTORS)
    x, y = unpack_halves(this, tl.float16)
    points = _points(lut, _row(cells, x, y, new, CODE), new, CODE)
    x, y = unpack_halves(next, tl.float16)
    row = _row(cells, x, y, new, CODE)
    for k in tl.range(WINDOWS):
        states = new
        for i in tl.range(_WINDOW):
            x, y = unpack_halves(this, tl.float16)
            best = new
            for old in tl.static_range(STATES):
                branch = _cost(points[old * TRIED], x, y, DTYPE)
                for t in tl.static_range(1, TRIED):
                    branch = tl.minimum(branch, _cost(points[old * TRIED + t], x, y, DTYPE))
                total = (branch.to(tl.int32, bitcast=True) << BITS) + tl.gather(cost, from_state[old], 1)
                best = total if old == 0 else tl.minimum(best, total)
            if not _tries_all(CODE):
                points = _points(lut, row, new, CODE)
                x, y = unpack_halves(third, tl.float16)
                row = _row(cells, x, y, new, CODE)
            this, next = next, third
            third = _read(source + tl.minimum(k * _WINDOW + i + 3, HALF - 1) * VECTORS)
            before = best & (STATES - 1)
            states = (tl.gather(states, before, 1) << BITS) | new
            cost = (best - before) + settle
        tl.store(words + (k * VECTORS + vector) * STATES + new, states)

    # Each lane reads what it wrote itself; what the others of its vector hold comes from them.
    last = tl.broadcast_to(tl.min(cost, axis=1)[:, None], [VECTORS, STATES]) & (STATES - 1)
    for i in tl.range(WINDOWS):
        k = WINDOWS - 1 - i
        states = tl.gather(tl.load(words + (k * VECTORS + vector) * STATES + new), last, 1)
        tl.store(path + vector * WINDOWS + k, states, mask=new == 0)
        last = (states >> (_WINDOW * BITS)) & (STATES - 1)


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
            y1 *= unit
            y2 *= unit
            DTYPE: tl.constexpr = x.dtype.element_ty
            BITS: tl.constexpr = state_bits(CODE)
            WINDOWS: tl.constexpr = HALF // _WINDOW
            packed = y1.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            packed |= y2.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16
            row = tl.arange(0, BLOCK_VECTORS)[:, None]
            words = scratch + BLOCK_VECTORS * HALF_PAD
            path = words + BLOCK_VECTORS * WINDOWS * _states(CODE)
            # Other threads may still read what they kept of the program's last block.
            tl.debug_barrier()
            tl.store(scratch + pair[None, :] * BLOCK_VECTORS + row, packed)
            tl.debug_barrier()
            _search(scratch, words, path, lut, cells, BLOCK_VECTORS, HALF, CODE, DTYPE)
            tl.debug_barrier()

            inside = (pair < HALF)[None, :]
            states = tl.load(path + row * WINDOWS + (pair // _WINDOW)[None, :], mask=inside, other=0)
            states = states >> ((pair % _WINDOW ^ (_WINDOW - 1)) * BITS)[None, :]
            new, old = states & ((1 << BITS) - 1), (states >> BITS) & ((1 << BITS) - 1)
            tried = _row(cells, y1, y2, new, CODE)
            middle, point = _point(lut, tried, new, old, 0, CODE)
            least = _cost(point, y1, y2, DTYPE)
            for i in tl.static_range(1, _tried(CODE)):
                other_middle, other = _point(lut, tried, new, old, i, CODE)
                cost = _cost(other, y1, y2, DTYPE)
                middle = tl.where(cost < least, other_middle, middle)
                point = tl.where(cost < least, other, point)
                least = tl.minimum(cost, least)
            codes = (new << (CODE - BITS)) | middle
            px, py = unpack_halves(point, DTYPE)
            length = tl.sqrt(tl.sum(tl.where(inside, px * px + py * py, 0.0), axis=1))
            product = tl.sum(tl.where(inside, y1 * px + y2 * py, 0.0), axis=1)
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
    scratch,
    NUM_HEADS: tl.constexpr,
    KEY_GAIN: tl.constexpr,
    VALUE_GAIN: tl.constexpr,
    BLOCK_VECTORS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCRATCH_WORDS: tl.constexpr,
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
    scratch += program.to(tl.int64) * SCRATCH_WORDS
    for block in tl.range(tl.program_id(0), tl.cdiv(num_vectors, BLOCK_VECTORS), tl.num_programs(0)):
        if tl.program_id(1) == 0:
            _encode(
                key, key_stride_token, key_stride_head, cache, block_stride, slot_mapping, num_vectors,
                rotation, key_lut, key_cells, scratch, block, NUM_HEADS, HEAD_DIM, HALF_PAD, BLOCK_SIZE,
                PAGE_BYTES, KEY_CODE, KEY_BYTES, 0, KEY_RADIUS_OFFSET, KEY_GAIN, BLOCK_VECTORS, BLOCK_K,
            )  # fmt: skip
        else:
            _encode(
                value, value_stride_token, value_stride_head, cache, block_stride, slot_mapping,
                num_vectors, rotation, value_lut, value_cells, scratch, block, NUM_HEADS, HEAD_DIM,
                HALF_PAD, BLOCK_SIZE, PAGE_BYTES, VALUE_CODE, VALUE_BYTES, VALUE_OFFSET,
                VALUE_RADIUS_OFFSET, VALUE_GAIN, BLOCK_VECTORS, BLOCK_K,
            )  # fmt: skip


def _scratch_words(fmt: PolarFormat, vectors: int) -> int:
    """Words that the search of so many vectors keeps: coordinates, each state's path, and the best one."""
    half = fmt.head_dim // 2
    states = max(1 << v.state_bits if v.kind == "polar" else 0 for v in (fmt.key, fmt.value))
    return vectors * (triton.next_power_of_2(half) + half // _WINDOW.value * (states + 1))


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
    programs = min(triton.cdiv(num_vectors, config["block_vectors"]), config["programs"])
    scratch_words = _scratch_words(fmt, config["block_vectors"])
    scratch = torch.empty(2 * programs * scratch_words, dtype=torch.int32, device=key.device)
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
        tables.key_lut,
        tables.value_lut,
        tables.key_cells,
        tables.value_cells,
        scratch,
        NUM_HEADS=key.shape[1],
        KEY_GAIN=fmt.key.gain,
        VALUE_GAIN=fmt.value.gain,
        BLOCK_VECTORS=config["block_vectors"],
        BLOCK_K=config["block_k"],
        SCRATCH_WORDS=scratch_words,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        **page_constants(fmt),
    )
