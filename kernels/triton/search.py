"""The encoder's search: codec.viterbi in the lanes of a GPU.

Each state of a vector's trellis has a lane, which holds the cost of the best path that leads there and, as
bits, the path's last states. Wide codes try the branches that codec.search_cells names, narrow ones all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_polarquant.format import (
    CELL_CANDIDATES,
    CELL_GRID,
    CELLS_PER_UNIT,
    FAR_CELL,
    STATE_BITS,
    Slot,
)
from vllm_polarquant.kernels.triton.constants import INTERPRET, state_bits
from vllm_polarquant.kernels.triton.lanes import unpack_halves

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
WINDOW = tl.constexpr(8)
"""Pairs whose states a lane keeps in one word: nine states have up to 27 bits."""


@triton.jit
def _cell(x, y):
    """Index int32 into codec.search_cells of the cell that each (x, y) lies in."""
    far = tl.maximum(tl.abs(x), tl.abs(y)) >= _NEAR_EXTENT
    per_unit = tl.where(far, _FAR_PER_UNIT, _CELLS_PER_UNIT)
    column = (x * per_unit + _ROUNDER).to(tl.int32, bitcast=True) & (_CELL_GRID - 1)
    row = (y * per_unit + _ROUNDER).to(tl.int32, bitcast=True) & (_CELL_GRID - 1)
    return (row << _CELL_BITS) + column + tl.where(far, _CELL_GRID * _CELL_GRID, 0)


@triton.jit
def load_in_layout(table, index):
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
def open_scratch(WORDS: tl.constexpr):
    """Static shared memory for the search; once a kernel. Tensors in it need no layout of their own."""
    if not _INTERPRET:
        tl.inline_asm_elementwise(
            _open_asm(WORDS), "=r,r", [tl.arange(0, 32)], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def put(scratch, index, value):
    """Write int32 to shared memory. A tl.debug_barrier() must follow before another thread's get."""
    if _INTERPRET:
        tl.store(scratch + index, value)
    else:
        tl.inline_asm_elementwise(
            _at("st.shared.b32 [at], $2;\nmov.u32 $0, 0;"), "=r,r,r", [index, value],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def get(scratch, index):
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
def tried_branches(code):
    """How many of each set of parallel branches are tried."""
    return 1 << (code - STATE_BITS[code]) if _tries_all(code) else CELL_CANDIDATES[code]


@triton.jit
def branches_to_try(cells, x, y, new, CODE: tl.constexpr):
    """Which branches into state `new` to try for each (x, y), int32; see codec.search_cells."""
    if _tries_all(CODE):
        return new
    else:
        return load_in_layout(cells, (_cell(x, y) << state_bits(CODE)) + new)


@triton.jit
def branch_window(row, new, old, INDEX: tl.constexpr, CODE: tl.constexpr):
    """Window of the INDEX-th branch to try from state `old` to `new`."""
    BITS: tl.constexpr = state_bits(CODE)
    MIDDLE_BITS: tl.constexpr = CODE - BITS
    if _tries_all(CODE):
        middle = INDEX
    else:
        middle = (row >> ((old * tried_branches(CODE) + INDEX) * MIDDLE_BITS)) & ((1 << MIDDLE_BITS) - 1)
    return (new << CODE) | (middle << BITS) | old


@triton.jit
def _unpack(point, DTYPE: tl.constexpr):
    """A packed point's coordinates, and half its squared length plus _COST_ROUNDER."""
    px, py = unpack_halves(point, DTYPE)
    return px, py, 0.5 * (px * px + py * py) + _COST_ROUNDER


@triton.jit
def branch_cost(point, x, y, PACKED: tl.constexpr, DTYPE: tl.constexpr):
    """Half the squared distance, without |(x, y)|^2 / 2, plus _COST_ROUNDER; point: packed, or of _unpack."""
    if PACKED:
        px, py = unpack_halves(point, DTYPE)
        return px * (0.5 * px - x) + (py * (0.5 * py - y) + _COST_ROUNDER)
    else:
        px, py, half_norm = point
        return (half_norm - px * x) - py * y


@triton.constexpr_function
def scratch_places(code, vectors, half, at_once):
    """Where the search's parts lie in its scratch memory, in words; points are first.

    Coordinates, the best path, all paths, and their costs if windows are searched AT_ONCE; then the end.
    """
    states = 1 << STATE_BITS[code]
    windows = half // WINDOW.value
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
    TRIED: tl.constexpr = tried_branches(CODE)
    TRY_ALL: tl.constexpr = _tries_all(CODE)
    STATES: tl.constexpr = 1 << BITS
    STARTS: tl.constexpr = STATES if AT_ONCE else 1
    BRANCHES: tl.constexpr = STATES * TRIED
    WINDOWS: tl.constexpr = HALF // WINDOW
    ROWS: tl.constexpr = VECTORS * (HALF_PAD // WINDOW if AT_ONCE else 1)
    PLACES: tl.constexpr = scratch_places(CODE, VECTORS, HALF, AT_ONCE)
    COORDINATES: tl.constexpr = PLACES[0]
    PATHS: tl.constexpr = PLACES[2]
    COSTS: tl.constexpr = PLACES[3]
    new = tl.arange(0, STATES)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    row_of = tl.arange(0, ROWS)[:, None] + tl.zeros([1, STATES], tl.int32)
    vector = row_of % VECTORS
    # Where head_dim is not a power of two, some rows do the last window once more.
    window = tl.minimum(row_of // VECTORS, WINDOWS - 1)
    source = COORDINATES + window * (WINDOW * VECTORS) + vector
    costs = ()
    for start in tl.static_range(STARTS):
        # The low bits of a cost are its state.
        costs = costs + (tl.where(new == start, 0, _UNREACHED) + new,)
    settle = new - (tl.full([ROWS, STATES], _COST_ROUNDER_BITS, tl.int32) << BITS)

    this = get(scratch, source)
    points = ()
    if TRY_ALL:
        for b in tl.static_range(BRANCHES):
            index = branch_window(0, tl.arange(0, STATES)[None, :], b // TRIED, b % TRIED, CODE)
            points = points + (_unpack(get(scratch, index), DTYPE),)
    else:
        # Points are loaded one pair ahead, and which points, from a table too large for L1, four.
        rows = ()
        for first in tl.static_range(4):
            x, y = unpack_halves(get(scratch, source + first * VECTORS), tl.float16)
            rows = rows + (branches_to_try(cells, x, y, new, CODE),)
        for b in tl.static_range(BRANCHES):
            index = branch_window(rows[0], new, b // TRIED, b % TRIED, CODE)
            points = points + (get(scratch, index),)
        row, row1, row2 = rows[1], rows[2], rows[3]
        ahead = get(scratch, source + 4 * VECTORS)
    for k in tl.range(1 if AT_ONCE else WINDOWS):
        paths = (new,) * STARTS
        for i in tl.range(WINDOW):
            # Counted from the first pair of the row's window.
            j = k * WINDOW + i
            last: tl.constexpr = (WINDOW if AT_ONCE else HALF) - 1
            x, y = unpack_halves(this, tl.float16)
            this = get(scratch, source + tl.minimum(j + 1, last) * VECTORS)
            branches = ()
            for old in tl.static_range(STATES):
                branch = branch_cost(points[old * TRIED], x, y, not TRY_ALL, DTYPE)
                for other in tl.static_range(1, TRIED):
                    branch = tl.minimum(
                        branch, branch_cost(points[old * TRIED + other], x, y, not TRY_ALL, DTYPE)
                    )
                branches = branches + (branch.to(tl.int32, bitcast=True) << BITS,)
            if not TRY_ALL:
                points = ()
                for b in tl.static_range(BRANCHES):
                    index = branch_window(row, new, b // TRIED, b % TRIED, CODE)
                    points = points + (get(scratch, index),)
                row, row1 = row1, row2
                x, y = unpack_halves(ahead, tl.float16)
                row2 = branches_to_try(cells, x, y, new, CODE)
                ahead = get(scratch, source + tl.minimum(j + 5, last) * VECTORS)
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
            put(scratch, PATHS + place, paths[start])
            if AT_ONCE:
                put(scratch, COSTS + place, costs[start])
    return costs[0]


@triton.jit
def search(
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
    WINDOWS: tl.constexpr = HALF // WINDOW
    PLACES: tl.constexpr = scratch_places(CODE, VECTORS, HALF, AT_ONCE)
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
                total = get(scratch, COSTS + place + start * STATES) - new
                total += tl.gather(cost, new * 0 + start, 1)
                best = total if start == 0 else tl.minimum(best, total)
            before = best & (STATES - 1)
            cost = (best - before) + new
            # The best path to each state takes the place of the one from state 0.
            put(scratch, PATHS + place, get(scratch, PATHS + place + before * STATES))
        tl.debug_barrier()

    last = tl.broadcast_to(tl.min(cost, axis=1)[:, None], [VECTORS, STATES]) & (STATES - 1)
    for i in tl.range(WINDOWS):
        k = WINDOWS - 1 - i
        path = get(scratch, PATHS + (k * VECTORS + vector) * (STARTS * STATES) + new)
        path = tl.gather(path, last, 1)
        put(scratch, BEST + k * VECTORS + vector, path)
        last = (path >> (WINDOW * BITS)) & (STATES - 1)


def scratch_words(slot: Slot, vectors: int, parallel_states: int) -> int:
    """Words of shared memory for the search of so many vectors: points, coordinates and paths.

    parallel_states: windows of trellises of at most so many states are searched side by side.
    """
    words = [0]
    for vector in (slot.key, slot.value):
        if vector.kind == "polar":
            at_once = 1 << vector.state_bits <= parallel_states
            words.append(scratch_places(vector.pair_bits, vectors, slot.head_dim // 2, at_once)[-1])
    return max(words)
