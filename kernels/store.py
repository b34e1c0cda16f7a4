"""Encode new keys and values into their slots: rotate, search, pack, all in one launch.

The search is codec.viterbi. Each state of a vector's trellis has a lane, which holds the cost of the best
path that leads there and, as bits, the path's last states. Wide codes try the branches that
codec.search_cells names, narrow ones all.
"""

from __future__ import annotations

import math
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
    KEY_PARTS,
    RADII,
    RAW,
    VALUE_PARTS,
    check,
    check_cache,
    check_heads,
    check_int,
    code_place,
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
# More than a path can cost: half its squared distance, less half the vector's squared length, is below 512,
# which with a state in the low bits makes 2**26.
_UNREACHED = tl.constexpr(1 << 28)
_WINDOW = tl.constexpr(8)
"""Pairs whose states a lane keeps in one word: nine states have up to 27 bits."""


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


@triton.constexpr_function
def _open_asm(words):
    return f".shared .align 4 .b8 search_scratch[{4 * words}];\nmov.u32 $0, search_scratch;"


@triton.constexpr_function
def _at(instruction):
    """PTX of an instruction on shared memory; `[at` in it stands for word $1 of the kernel's."""
    return f"{{.reg .b32 at;\nmov.u32 at, search_scratch;\nmad.lo.u32 at, $1, 4, at;\n{instruction}}}"


@triton.jit
def _open_scratch(WORDS: tl.constexpr):
    """Static shared memory for the search; once a kernel. Tensors in it need no layout of their own."""
    if not _INTERPRET:
        tl.inline_asm_elementwise(
            _open_asm(WORDS), "=r,r", [tl.arange(0, 32)], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _put(scratch, index, value):
    """Write int32 to shared memory. A tl.debug_barrier() must follow before another thread's _get."""
    if _INTERPRET:
        tl.store(scratch + index, value)
    else:
        tl.inline_asm_elementwise(
            _at("st.shared.b32 [at], $2;\nmov.u32 $0, 0;"), "=r,r,r", [index, value],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _get(scratch, index):
    """Read int32 from shared memory."""
    if _INTERPRET:
        return tl.load(scratch + index)
    else:
        return tl.inline_asm_elementwise(
            _at("ld.shared.b32 $0, [at];"), "=r,r", [index], dtype=tl.int32, is_pure=False, pack=1
        )


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
    """Which branches into state `new` to try for each (x, y), int32; see codec.search_cells."""
    if _tries_all(CODE):
        return new
    else:
        return _look_up(cells, (_cell(x, y) << state_bits(CODE)) + new)


@triton.jit
def _branch(row, new, old, INDEX: tl.constexpr, CODE: tl.constexpr):
    """Window of the INDEX-th branch to try from state `old` to `new`."""
    BITS: tl.constexpr = state_bits(CODE)
    MIDDLE_BITS: tl.constexpr = CODE - BITS
    if _tries_all(CODE):
        middle = INDEX
    else:
        middle = (row >> ((old * _tried(CODE) + INDEX) * MIDDLE_BITS)) & ((1 << MIDDLE_BITS) - 1)
    return (new << CODE) | (middle << BITS) | old


@triton.jit
def _unpack(point, DTYPE: tl.constexpr):
    """A packed point's coordinates, and half its squared length plus _COST_ROUNDER."""
    px, py = unpack_halves(point, DTYPE)
    return px, py, 0.5 * (px * px + py * py) + _COST_ROUNDER


@triton.jit
def _cost(point, x, y, PACKED: tl.constexpr, DTYPE: tl.constexpr):
    """Half the squared distance, without |(x, y)|^2 / 2, plus _COST_ROUNDER; point: packed, or of _unpack."""
    if PACKED:
        px, py = unpack_halves(point, DTYPE)
        return px * (0.5 * px - x) + (py * (0.5 * py - y) + _COST_ROUNDER)
    else:
        px, py, half_norm = point
        return (half_norm - px * x) - py * y


@triton.constexpr_function
def _places(code, vectors, half, at_once):
    """Where the search's parts lie in its scratch memory, in words; points are first.

    Coordinates, the best path, all paths, and their costs if windows are searched AT_ONCE; then the end.
    """
    states = 1 << STATE_BITS[code]
    windows = half // _WINDOW.value
    paths = windows * vectors * states * (states if at_once else 1)
    coordinates = states << code
    best = coordinates + triton.next_power_of_2(half) * vectors
    first_path = best + windows * vectors
    costs = first_path + paths
    return coordinates, best, first_path, costs, costs + (paths if at_once else 0)


@triton.jit
def _search_windows(
    scratch,
    cells,
    VECTORS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    CODE: tl.constexpr,
    DTYPE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The best paths through windows of eight pairs.

    A path is one int32: the state before the eight and those after each, the last one lowest. Written, from
    PATHS on, [HALF / 8, VECTORS, starts, states], one for each state after the eight: either AT_ONCE, windows
    side by side and for each state before them, and then their costs from COSTS on; or one after the other,
    for the best state before them alone, so that starts is 1. Returns the last costs.
    """
    BITS: tl.constexpr = state_bits(CODE)
    TRIED: tl.constexpr = _tried(CODE)
    TRY_ALL: tl.constexpr = _tries_all(CODE)
    STATES: tl.constexpr = 1 << BITS
    STARTS: tl.constexpr = STATES if AT_ONCE else 1
    BRANCHES: tl.constexpr = STATES * TRIED
    WINDOWS: tl.constexpr = HALF // _WINDOW
    ROWS: tl.constexpr = VECTORS * (HALF_PAD // _WINDOW if AT_ONCE else 1)
    PLACES: tl.constexpr = _places(CODE, VECTORS, HALF, AT_ONCE)
    COORDINATES: tl.constexpr = PLACES[0]
    PATHS: tl.constexpr = PLACES[2]
    COSTS: tl.constexpr = PLACES[3]
    new = tl.arange(0, STATES)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    row_of = tl.arange(0, ROWS)[:, None] + tl.zeros([1, STATES], tl.int32)
    vector = row_of % VECTORS
    # Where head_dim is not a power of two, some rows do the last window once more.
    window = tl.minimum(row_of // VECTORS, WINDOWS - 1)
    source = COORDINATES + window * (_WINDOW * VECTORS) + vector
    costs = ()
    for start in tl.static_range(STARTS):
        # The low bits of a cost are its state.
        costs = costs + (tl.where(new == start, 0, _UNREACHED) + new,)
    settle = new - (tl.full([ROWS, STATES], _COST_ROUNDER_BITS, tl.int32) << BITS)

    this = _get(scratch, source)
    points = ()
    if TRY_ALL:
        for b in tl.static_range(BRANCHES):
            index = _branch(0, tl.arange(0, STATES)[None, :], b // TRIED, b % TRIED, CODE)
            points = points + (_unpack(_get(scratch, index), DTYPE),)
    else:
        # Points are loaded one pair ahead, and which points, from a table too large for L1, four.
        rows = ()
        for first in tl.static_range(4):
            x, y = unpack_halves(_get(scratch, source + first * VECTORS), tl.float16)
            rows = rows + (_row(cells, x, y, new, CODE),)
        for b in tl.static_range(BRANCHES):
            index = _branch(rows[0], new, b // TRIED, b % TRIED, CODE)
            points = points + (_get(scratch, index),)
        row, row1, row2 = rows[1], rows[2], rows[3]
        ahead = _get(scratch, source + 4 * VECTORS)
    for k in tl.range(1 if AT_ONCE else WINDOWS):
        paths = (new,) * STARTS
        for i in tl.range(_WINDOW):
            # Counted from the first pair of the row's window.
            j = k * _WINDOW + i
            last: tl.constexpr = (_WINDOW if AT_ONCE else HALF) - 1
            x, y = unpack_halves(this, tl.float16)
            this = _get(scratch, source + tl.minimum(j + 1, last) * VECTORS)
            branches = ()
            for old in tl.static_range(STATES):
                branch = _cost(points[old * TRIED], x, y, not TRY_ALL, DTYPE)
                for other in tl.static_range(1, TRIED):
                    branch = tl.minimum(branch, _cost(points[old * TRIED + other], x, y, not TRY_ALL, DTYPE))
                branches = branches + (branch.to(tl.int32, bitcast=True) << BITS,)
            if not TRY_ALL:
                points = ()
                for b in tl.static_range(BRANCHES):
                    index = _branch(row, new, b // TRIED, b % TRIED, CODE)
                    points = points + (_get(scratch, index),)
                row, row1 = row1, row2
                x, y = unpack_halves(ahead, tl.float16)
                row2 = _row(cells, x, y, new, CODE)
                ahead = _get(scratch, source + tl.minimum(j + 5, last) * VECTORS)
            next_costs, next_paths = (), ()
            for start in tl.static_range(STARTS):
                best = new
                for old in tl.static_range(STATES):
                    total = branches[old] + tl.gather(costs[start], new * 0 + old, 1)
                    best = total if old == 0 else tl.minimum(best, total)
                before = best & (STATES - 1)
                next_costs = next_costs + ((best - before) + settle,)
                next_paths = next_paths + ((tl.gather(paths[start], before, 1) << BITS) | new,)
            costs, paths = next_costs, next_paths
        for start in tl.static_range(STARTS):
            place = (((window + k) * VECTORS + vector) * STARTS + start) * STATES + new
            _put(scratch, PATHS + place, paths[start])
            if AT_ONCE:
                _put(scratch, COSTS + place, costs[start])
    return costs[0]


@triton.jit
def _search(
    scratch,
    cells,
    VECTORS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    CODE: tl.constexpr,
    DTYPE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Viterbi's algorithm on vectors in scratch.

    scratch: packed points of the model's type, int32 [2**(CODE + BITS)], and from COORDINATES on the vectors'
    pairs as float16, [HALF_PAD, VECTORS]. Written: from BEST on the best path, [HALF / 8, VECTORS], as in
    _search_windows.

    AT_ONCE: the best path's cost is a product of matrices over (min, +), one a window, so that windows can be
    searched side by side and joined after. That is more work, but 64 steps in a row are the time of a search
    that has the GPU to itself.
    """
    BITS: tl.constexpr = state_bits(CODE)
    STATES: tl.constexpr = 1 << BITS
    STARTS: tl.constexpr = STATES if AT_ONCE else 1
    WINDOWS: tl.constexpr = HALF // _WINDOW
    PLACES: tl.constexpr = _places(CODE, VECTORS, HALF, AT_ONCE)
    BEST: tl.constexpr = PLACES[1]
    PATHS: tl.constexpr = PLACES[2]
    COSTS: tl.constexpr = PLACES[3]
    cost = _search_windows(scratch, cells, VECTORS, HALF, HALF_PAD, CODE, DTYPE, AT_ONCE)
    tl.debug_barrier()
    new = tl.arange(0, STATES)[None, :] + tl.zeros([VECTORS, 1], tl.int32)
    vector = tl.arange(0, VECTORS)[:, None] + tl.zeros([1, STATES], tl.int32)
    if AT_ONCE:
        cost = tl.where(new == 0, 0, _UNREACHED) + new
        for k in tl.range(WINDOWS):
            place = (k * VECTORS + vector) * (STARTS * STATES) + new
            best = new
            for start in tl.static_range(STATES):
                total = _get(scratch, COSTS + place + start * STATES) - new
                total += tl.gather(cost, new * 0 + start, 1)
                best = total if start == 0 else tl.minimum(best, total)
            before = best & (STATES - 1)
            cost = (best - before) + new
            # The best path to each state takes the place of the one from state 0.
            _put(scratch, PATHS + place, _get(scratch, PATHS + place + before * STATES))
        tl.debug_barrier()

    last = tl.broadcast_to(tl.min(cost, axis=1)[:, None], [VECTORS, STATES]) & (STATES - 1)
    for i in tl.range(WINDOWS):
        k = WINDOWS - 1 - i
        path = _get(scratch, PATHS + (k * VECTORS + vector) * (STARTS * STATES) + new)
        path = tl.gather(path, last, 1)
        _put(scratch, BEST + k * VECTORS + vector, path)
        last = (path >> (_WINDOW * BITS)) & (STATES - 1)


@triton.jit
def _hadamard(rows, SIZE: tl.constexpr):
    """Those rows of Sylvester's matrix, float32 [rows, SIZE] of +-1, SIZE a power of two up to 256."""
    both = rows[:, None] & tl.arange(0, SIZE)[None, :]
    parity = both ^ (both >> 4)
    parity ^= parity >> 2
    parity ^= parity >> 1
    return tl.where((parity & 1) == 0, 1.0, -1.0)


@triton.jit
def _shifted(code, LEFT: tl.constexpr):
    return code << LEFT if LEFT >= 0 else code >> -LEFT


@triton.constexpr_function
def _integer(size):
    """The integer type of 1, 2, 4 or 8 bytes."""
    return {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}[size]


@triton.constexpr_function
def _unit_bytes(width, row_bytes, parts):
    """Bytes of a vector's codes that are stored at once: a divisor of the `width` bytes of eight codes.

    A lane's part of a vector (format.code_places) is whole units, so that none is cut.
    """
    whole = row_bytes if row_bytes % 8 else row_bytes // parts
    return math.gcd(width, whole, 8)


@triton.jit
def _store_codes(
    codes,
    region,
    slot,
    group,
    keep,
    WIDTH: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Store eight codes, int32 [rows, groups] each, as WIDTH bytes of a little-endian bit stream.

    They go to byte group * WIDTH and on of the rows' slots. region: pointers to the codes of the rows' pages,
    [rows, 1]. slot: [rows, 1]. group: [1, groups].
    """
    UNIT: tl.constexpr = _unit_bytes(WIDTH, ROW_BYTES, PARTS)
    BITS: tl.constexpr = 8 * UNIT
    dtype: tl.constexpr = tl.int64 if UNIT == 8 else tl.int32
    stored: tl.constexpr = _integer(UNIT)
    for unit in tl.static_range(WIDTH // UNIT):
        word = tl.zeros(codes[0].shape, dtype)
        for i in tl.static_range(8):
            if WIDTH * (i + 1) > BITS * unit and WIDTH * i < BITS * (unit + 1):
                word |= _shifted(codes[i].to(dtype), WIDTH * i - BITS * unit)
        place = code_place(slot, group * WIDTH + unit * UNIT, WIDTH, ROW_BYTES, PARTS)
        tl.store((region + place).to(tl.pointer_type(stored)), word.to(stored), mask=keep)


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
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    CODE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    PARTS: tl.constexpr,
    CODES_OFFSET: tl.constexpr,
    RADIUS_OFFSET: tl.constexpr,
    GAIN: tl.constexpr,
    BLOCK_VECTORS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARALLEL_STATES: tl.constexpr,
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
    inside_page = (slot % BLOCK_SIZE).to(tl.int32)
    region = page + CODES_OFFSET
    radius_pointer = (page + RADIUS_OFFSET).to(tl.pointer_type(tl.float16)) + inside_page * RADII

    pair = tl.arange(0, HALF_PAD)
    mask = keep[:, None] & (pair < HALF)[None, :]
    first = tl.load(source[:, None] + pair[None, :], mask=mask, other=0.0)
    second = tl.load(source[:, None] + HALF + pair[None, :], mask=mask, other=0.0)
    if CODE == RAW:
        place = code_place(inside_page[:, None], 2 * pair[None, :], CODE, ROW_BYTES, PARTS)
        tl.store((region[:, None] + place).to(tl.pointer_type(x.dtype.element_ty)), first, mask=mask)
        place = code_place(inside_page[:, None], 2 * (pair + HALF)[None, :], CODE, ROW_BYTES, PARTS)
        tl.store((region[:, None] + place).to(tl.pointer_type(x.dtype.element_ty)), second, mask=mask)
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

        # Dividing by the largest coordinate first keeps denormals and 3e38 inside float32's range.
        HADAMARD: tl.constexpr = HALF == HALF_PAD
        if HADAMARD:
            # R is a Hadamard matrix times a sign a column, which R's first row has, over sqrt(d). Dividing
            # by a power of two keeps x exact in its 16 bits, so that one product on tensor cores does what
            # otherwise takes three in tf32. The matrix's four quarters are the smaller one, with signs.
            exponent = tl.minimum(tl.maximum(amax_bits >> 23, 6), 250)
            inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
            amax = (exponent << 23).to(tl.float32, bitcast=True) / tl.sqrt(float(HEAD_DIM))
            amax = tl.where(usable, amax, 0.0)
            left = tl.zeros([BLOCK_VECTORS, HALF], tl.float32)
            right = tl.zeros([BLOCK_VECTORS, HALF], tl.float32)
            STEP: tl.constexpr = BLOCK_K if BLOCK_K < HALF else HALF
            for start in tl.static_range(0, HALF, STEP):
                k = start + tl.arange(0, STEP)
                matrix = _hadamard(k, HALF).to(x.dtype.element_ty)
                part = source[:, None] + k[None, :]
                mine = (keep & usable)[:, None]
                factor = tl.where(tl.load(rotation + k) > 0, inverse, -inverse)
                scaled = tl.load(part, mask=mine, other=0.0).to(tl.float32) * factor
                left += dot(scaled.to(x.dtype.element_ty), matrix)
                factor = tl.where(tl.load(rotation + HALF + k) > 0, inverse, -inverse)
                scaled = tl.load(part + HALF, mask=mine, other=0.0).to(tl.float32) * factor
                right += dot(scaled.to(x.dtype.element_ty), matrix)
            y1, y2 = left + right, left - right
        else:
            divisor = tl.where(usable, amax, 1.0)
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
            place = code_place(inside_page[:, None], pair[None, :], CODE, ROW_BYTES, PARTS)
            codes = tl.where(zero, _encode_fp8(x1), 0).to(tl.uint8)
            tl.store(region[:, None] + place, codes, mask=mask)
            place = code_place(inside_page[:, None], (pair + HALF)[None, :], CODE, ROW_BYTES, PARTS)
            codes = tl.where(zero, _encode_fp8(x2), 0).to(tl.uint8)
            tl.store(region[:, None] + place, codes, mask=mask)
        else:
            norm = tl.maximum(tl.sqrt(tl.sum(y1 * y1 + y2 * y2, axis=1)), 1e-30)
            unit = (tl.sqrt(float(HEAD_DIM)) / norm)[:, None]
            y1 *= unit
            y2 *= unit
            DTYPE: tl.constexpr = x.dtype.element_ty
            BITS: tl.constexpr = state_bits(CODE)
            TRIED: tl.constexpr = _tried(CODE)
            WINDOWS: tl.constexpr = HALF // _WINDOW
            packed = y1.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            packed |= y2.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16
            AT_ONCE: tl.constexpr = PARALLEL_STATES >= 1 << BITS
            PLACES: tl.constexpr = _places(CODE, BLOCK_VECTORS, HALF, AT_ONCE)
            POINTS: tl.constexpr = 1 << (CODE + BITS)
            row = tl.arange(0, BLOCK_VECTORS)[:, None]
            place = PLACES[0] + pair[None, :] * BLOCK_VECTORS + row
            _put(scratch, tl.arange(0, POINTS), tl.load(lut + tl.arange(0, POINTS)))
            _put(scratch, place, packed)
            tl.debug_barrier()
            _search(scratch, cells, BLOCK_VECTORS, HALF, HALF_PAD, CODE, DTYPE, AT_ONCE)
            tl.debug_barrier()

            # Eight pairs a lane, one after the other, so that it has whole bytes of codes. Coordinates are
            # read back, as those in registers would leave few for the search.
            group = tl.arange(0, HALF_PAD // _WINDOW)[None, :]
            inside = group < WINDOWS
            states = _get(scratch, PLACES[1] + tl.minimum(group, WINDOWS - 1) * BLOCK_VECTORS + row)
            square = tl.zeros([BLOCK_VECTORS, HALF_PAD // _WINDOW], tl.float32)
            product = square
            codes = ()
            for i in tl.static_range(_WINDOW):
                own = _get(scratch, PLACES[0] + (group * _WINDOW + i) * BLOCK_VECTORS + row)
                x1, x2 = unpack_halves(own, tl.float16)
                new = (states >> ((_WINDOW - 1 - i) * BITS)) & ((1 << BITS) - 1)
                old = (states >> ((_WINDOW - i) * BITS)) & ((1 << BITS) - 1)
                tried = _row(cells, x1, x2, new, CODE)
                window = _branch(tried, new, old, 0, CODE)
                point = _get(scratch, window)
                least = _cost(point, x1, x2, True, DTYPE)
                for other in tl.static_range(1, TRIED):
                    other_window = _branch(tried, new, old, other, CODE)
                    other_point = _get(scratch, other_window)
                    cost = _cost(other_point, x1, x2, True, DTYPE)
                    window = tl.where(cost < least, other_window, window)
                    point = tl.where(cost < least, other_point, point)
                    least = tl.minimum(cost, least)
                px, py = unpack_halves(point, DTYPE)
                square += px * px + py * py
                product += x1 * px + x2 * py
                codes = codes + (tl.where(usable[:, None], window >> BITS, 0),)
            length = tl.sqrt(tl.sum(tl.where(inside, square, 0.0), axis=1))
            product = tl.sum(tl.where(inside, product, 0.0), axis=1)
            cos = product / (length * tl.sqrt(float(HEAD_DIM)))
            gain = tl.full([BLOCK_VECTORS], 1.0, tl.float32)
            if GAIN == "fit":
                gain = tl.maximum(cos, _MIN_FIT_GAIN)
            elif GAIN == "unbiased":
                gain = 1.0 / cos
            radius = _encode_radius(amax * (norm * gain / length))
            _store_codes(
                codes, region[:, None], inside_page[:, None], group, keep[:, None] & inside,
                CODE, ROW_BYTES, PARTS,
            )  # fmt: skip
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
    PARALLEL_STATES: tl.constexpr,
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
    if SCRATCH_WORDS:
        _open_scratch(SCRATCH_WORDS)
    if tl.program_id(1) == 0:
        _encode(
            key, key_stride_token, key_stride_head, cache, block_stride, slot_mapping, num_vectors,
            rotation, key_lut, key_cells, scratch, NUM_HEADS, HEAD_DIM, HALF_PAD, BLOCK_SIZE, PAGE_BYTES,
            KEY_CODE, KEY_BYTES, KEY_PARTS, 0,
            KEY_RADIUS_OFFSET, KEY_GAIN, BLOCK_VECTORS, BLOCK_K, PARALLEL_STATES,
        )  # fmt: skip
    else:
        _encode(
            value, value_stride_token, value_stride_head, cache, block_stride, slot_mapping, num_vectors,
            rotation, value_lut, value_cells, scratch, NUM_HEADS, HEAD_DIM, HALF_PAD, BLOCK_SIZE,
            PAGE_BYTES, VALUE_CODE, VALUE_BYTES, VALUE_PARTS, VALUE_OFFSET,
            VALUE_RADIUS_OFFSET, VALUE_GAIN, BLOCK_VECTORS, BLOCK_K, PARALLEL_STATES,
        )  # fmt: skip


def scratch_words(fmt: PolarFormat, vectors: int, parallel_states: int) -> int:
    """Words of shared memory for the search of so many vectors: points, coordinates and paths.

    parallel_states: windows of trellises of at most so many states are searched side by side.
    """
    words = [0]
    for vector in (fmt.key, fmt.value):
        if vector.kind == "polar":
            at_once = 1 << vector.state_bits <= parallel_states
            words.append(_places(vector.pair_bits, vectors, fmt.head_dim // 2, at_once)[-1])
    return max(words)


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
    words = scratch_words(fmt, config["block_vectors"], config["parallel_states"])
    # The interpreter has no shared memory of ours.
    scratch = torch.empty(words, dtype=torch.int32) if INTERPRET else None
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
        scratch,
        NUM_HEADS=key.shape[1],
        KEY_GAIN=fmt.key.gain,
        VALUE_GAIN=fmt.value.gain,
        BLOCK_VECTORS=config["block_vectors"],
        BLOCK_K=config["block_k"],
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        maxnreg=config["maxnreg"],
        PARALLEL_STATES=config["parallel_states"],
        SCRATCH_WORDS=words,
        **page_constants(fmt),
    )
