"""The page on a CPU: numba loops over the same bytes that the Triton kernels read and write.

Functions take and return torch tensors. Rotations and dense attention are torch's; numba does what torch
has no fast operator for: Viterbi searches, bit streams, and attention straight off packed pages.
Threads are torch's own: numba's OpenMP layer shares the libgomp that torch has loaded, and so the cores
that vLLM has bound it to.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
import torch
from numba import njit, prange

from vllm_polarquant.codec import Tables, by_largest, encode
from vllm_polarquant.format import (
    BLOCK_SIZE_MULTIPLE,
    CELL_CANDIDATES,
    CELL_GRID,
    CELLS_PER_UNIT,
    FAR_CELL,
    KEY_PARTS,
    MIN_FIT_GAIN,
    RADIUS_MAX,
    RADIUS_MIN,
    RADIUS_POWER,
    RADIUS_STRIDE,
    VALUE_PARTS,
    PolarFormat,
    VectorFormat,
    code_places,
    dense_block_stride,
)


def _share_torch_openmp() -> None:
    """Let numba's loops run on torch's OpenMP threads.

    numba asks for the system's libgomp and torch brings its own. Two pools on the same cores wait for each
    other's spinning threads, tens of milliseconds a call; with torch's symbols global, numba finds those.
    """
    packages = Path(torch.__file__).parent
    for folder in (packages / "lib", packages.parent / "torch.libs"):
        for library in sorted(folder.glob("libgomp*.so*")):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


_share_torch_openmp()
# OpenMP's layer is not to be had where the system has no libgomp of its own.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "workqueue", "tbb"]

POLAR, FP8, RAW = 0, 1, 2
_KINDS = {"polar": POLAR, "fp8": FP8, "raw": RAW}
_GAINS = {"norm": 0, "unbiased": 1, "fit": 2}
_CHUNK = BLOCK_SIZE_MULTIPLE
_TILE = 64
_PREFIX_TOKENS = 4096
_NO_MASS = np.float32(-1e30)


@cache
def _start_threads() -> None:
    """Start numba's threads, and undo what this does to torch's, which are the same.

    It allows nested OpenMP regions, with which torch's bfloat16 attention takes five times as long, and lets
    torch use every core, whatever OMP_NUM_THREADS says.
    """
    threads = torch.get_num_threads()
    numba.set_num_threads(numba.get_num_threads())
    for name, value in (("omp_set_max_active_levels", 1), ("omp_set_num_threads", threads)):
        function = getattr(ctypes.CDLL(None), name, None)
        if function is not None:
            function(value)


def _use_torch_threads() -> int:
    _start_threads()
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    return threads


class _Vector(NamedTuple):
    """What the loops need of one vector format; see `_vector`.

    unit: bytes that lie side by side, and aligned, in a chunk of 16 tokens as in a row of codes: 1 to 8, or
        code_bytes where a chunk is nothing but rows.
    places: where the units of each row lie, in units: uint32 [16 * code_bytes / unit].
    """

    kind: int
    pair_bits: int
    state_bits: int
    code_bytes: int
    gain: int
    points: np.ndarray
    lut: np.ndarray
    cells: np.ndarray
    unit: int
    places: np.ndarray


def _units(code_bytes: int, parts: int, runs: int) -> tuple[int, np.ndarray]:
    """_Vector's unit and places."""
    places = np.array(code_places(code_bytes, parts, runs), np.uint32).ravel()
    moved = places - np.arange(len(places))
    jumps = np.flatnonzero(np.diff(moved)) + 1
    unit = int(np.gcd.reduce([8, code_bytes, *jumps, *moved])) if len(jumps) else code_bytes
    return unit, places[::unit] // np.uint32(unit)


@cache
def _vector(
    vector: VectorFormat, head_dim: int, parts: int, points: torch.Tensor, cells: torch.Tensor
) -> _Vector:
    state_bits = 0
    lut = np.zeros(1, np.uint32)
    if vector.kind == "polar":
        state_bits = vector.state_bits
        # bfloat16 points, x in the low half: one gather a pair, whatever the model's dtype.
        lut = points.bfloat16().contiguous().view(torch.int32).flatten().numpy().view(np.uint32)
    elif vector.kind == "fp8":
        byte = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
        lut = byte.float().nan_to_num(0).numpy().view(np.uint32)
    code_bytes = vector.code_bytes(head_dim)
    return _Vector(
        _KINDS[vector.kind],
        vector.pair_bits,
        state_bits,
        code_bytes,
        _GAINS[vector.gain],
        points.numpy(),
        lut,
        cells.numpy().view(np.uint32),
        *_units(code_bytes, parts, vector.runs),
    )


def _vectors(fmt: PolarFormat, tables: Tables) -> tuple[_Vector, _Vector]:
    """Of keys and of values."""
    return (
        _vector(fmt.key, fmt.head_dim, KEY_PARTS, tables.key_points, tables.key_cells),
        _vector(fmt.value, fmt.head_dim, VALUE_PARTS, tables.value_points, tables.value_cells),
    )


@njit(cache=True)
def _load_radii(cache_bytes, start, count, bits, radii):
    """float16 radii at `start` as float32 in radii [count]; bits is radii's memory seen as uint32."""
    for t in range(count):
        half = np.uint32(cache_bytes[start + RADIUS_STRIDE * t]) | (
            np.uint32(cache_bytes[start + RADIUS_STRIDE * t + 1]) << np.uint32(8)
        )
        # Shifting exponent and mantissa into place leaves float32's larger bias, 2**112, to multiply by.
        bits[t] = (half & np.uint32(0x7FFF)) << np.uint32(13)
        radii[t] *= np.float32(2.0**112)
        if half & np.uint32(0x8000):
            radii[t] = radii[t] ** RADIUS_POWER


@njit(cache=True)
def _stored_radius(radius):
    """What `encode_radius` makes of a radius, still float32."""
    if radius == 0 or (radius >= RADIUS_MIN and radius <= RADIUS_MAX):
        return np.float32(radius)
    return np.float32(-(radius ** (1.0 / RADIUS_POWER)))


@njit(cache=True)
def _cell(x, y):
    """Row of codec.search_cells for a point."""
    base, per_unit = 0, np.float32(CELLS_PER_UNIT)
    if max(abs(x), abs(y)) >= np.float32((CELL_GRID - 1) / 2 / CELLS_PER_UNIT):
        base, per_unit = CELL_GRID * CELL_GRID, np.float32(CELLS_PER_UNIT / FAR_CELL)
    column = math.floor(x * per_unit + np.float32(CELL_GRID // 2 + 0.5))
    row = math.floor(y * per_unit + np.float32(CELL_GRID // 2 + 0.5))
    return base + row * CELL_GRID + column


@njit(cache=True)
def _viterbi(y, scale, pair_bits, points, cells, tried, back, codes):
    """`codec.viterbi` of one vector y [d] times scale, over the points that `cells` names -> codes [d / 2].

    tried: format.CELL_CANDIDATES. back: uint8 [d / 2, states], scratch.
    """
    half, states = len(y) // 2, cells.shape[1]
    bits = 0
    while 1 << bits < states:
        bits += 1
    width = np.uint32(pair_bits - bits)
    mask = np.uint32((1 << width) - 1)
    cost = np.full(states, np.float32(1e30))
    cost[0] = 0
    fresh = np.empty(states, np.float32)
    for j in range(half):
        a, b = y[j] * scale, y[j + half] * scale
        cell = _cell(a, b)
        for new in range(states):
            row = cells[cell, new]
            least = np.float32(2e30)
            taken = np.uint32(0)
            for old in range(states):
                for _ in range(tried):
                    branch = ((row & mask) << np.uint32(bits)) | np.uint32(old)
                    row >>= width
                    at = np.uint64((np.uint32(new) << np.uint32(pair_bits)) | branch)
                    px, py = points[at, 0], points[at, 1]
                    total = cost[old] + (px * (np.float32(0.5) * px - a) + py * (np.float32(0.5) * py - b))
                    if total < least:
                        least, taken = total, branch
            fresh[new] = least
            back[j, new] = taken
        cost, fresh = fresh, cost
    state = np.argmin(cost)
    for j in range(half - 1, -1, -1):
        branch = back[j, state]
        codes[j] = (state << width) | (branch >> bits)
        state = branch & (states - 1)


@njit(cache=True)
def _encode_polar(y, pair_bits, points, cells, tried, gain, back, codes):
    """Codes of one rotated vector y [d] into codes [d / 2]; returns radius / largest coordinate."""
    d = len(y)
    half = d // 2
    norm2 = np.float32(0)
    for j in range(d):
        norm2 += y[j] * y[j]
    norm = math.sqrt(norm2)
    _viterbi(y, np.float32(math.sqrt(d) / norm), pair_bits, points, cells, tried, back, codes)
    states = cells.shape[1]
    dot, length2 = np.float32(0), np.float32(0)
    before = 0
    for j in range(half):
        window = codes[j] * states + before * states // (1 << pair_bits)
        px, py = points[window, 0], points[window, 1]
        dot += y[j] * px + y[j + half] * py
        length2 += px * px + py * py
        before = codes[j]
    length = math.sqrt(length2)
    cos = dot / (length * norm)
    if gain == 1:
        return np.float32(norm / length / cos)
    if gain == 2:
        return np.float32(norm / length * max(float(cos), MIN_FIT_GAIN))
    return np.float32(norm / length)


@njit(cache=True)
def _pack(codes, pair_bits, out):
    word, filled, at = np.int64(0), 0, 0
    for code in codes:
        word |= np.int64(code) << filled
        filled += pair_bits
        while filled >= 8:
            out[at] = word & 0xFF
            at += 1
            word >>= 8
            filled -= 8


@njit(cache=True, parallel=True)
def _encode(rotated, amax, pair_bits, points, cells, tried, gain, packed, radius):
    """Rotated f32 [n, d] / amax [n] -> packed codes u8 [n, bytes], radius f32 [n] as it is stored."""
    n, d = rotated.shape
    for i in prange(n):
        codes = np.zeros(d // 2, np.uint8)
        radius[i] = 0
        if amax[i] > 0:
            back = np.empty((d // 2, cells.shape[1]), np.uint8)
            factor = _encode_polar(rotated[i], pair_bits, points, cells, tried, gain, back, codes)
            radius[i] = _stored_radius(amax[i] * factor)
        _pack(codes, pair_bits, packed[i])


@njit(cache=True, parallel=True)
def _scatter(
    codes, radii, slots, cache_bytes, stride, page_bytes, block_size, unit, places, code_at, radius_at,
):  # fmt: skip
    """Codes u8 [T, H, bytes] and radii u8 [T, H, 2] to the pages of slots [T]; slots < 0 are dropped."""
    tokens, heads, width = codes.shape
    for token in prange(tokens):
        slot = slots[token]
        if slot >= 0:
            inside = slot % block_size
            row = inside % _CHUNK
            for head in range(heads):
                page = slot // block_size * stride + head * page_bytes
                chunk = page + code_at + (inside - row) * width
                for j in range(width):
                    place = places[(row * width + j) // unit] * unit + j % unit
                    cache_bytes[chunk + place] = codes[token, head, j]
                start = page + radius_at + inside * RADIUS_STRIDE
                cache_bytes[start : start + 2] = radii[token, head]


def _bytes_of(cache_tensor: torch.Tensor, fmt: PolarFormat) -> tuple[np.ndarray, int]:
    """The cache's storage from its first block on, as flat uint8, and the stride of its blocks."""
    stride = dense_block_stride(cache_tensor, fmt)
    blocks, heads = cache_tensor.shape[:2]
    length = (blocks - 1) * stride + heads * fmt.page_bytes if blocks else 0
    return cache_tensor.as_strided((length,), (1,)).numpy(), stride


def _encode_vectors(
    x: torch.Tensor, spec: _Vector, rotation: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`codec.encode` of polar vectors [T, H, d]: radius float16 [T, H], codes uint8 [T, H, bytes]."""
    unit, amax = by_largest(x)
    codes = torch.empty(*amax.shape, spec.code_bytes, dtype=torch.uint8)
    radius = torch.empty_like(amax)
    _encode(
        (unit @ rotation.T).flatten(0, 1).numpy(), amax.flatten().numpy(), spec.pair_bits,
        spec.points, spec.cells, CELL_CANDIDATES[spec.pair_bits], spec.gain, codes.flatten(0, 1).numpy(),
        radius.flatten().numpy(),
    )  # fmt: skip
    return radius.half(), codes


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    cache_tensor: torch.Tensor,
    slot_mapping: torch.Tensor,
    fmt: PolarFormat,
    tables: Tables,
) -> None:
    """Encode key and value [T', H, d] and scatter them to the slots of slot_mapping int64 [T], T <= T'.

    Slots < 0 are dropped. cache_tensor: uint8 [B, H, N, slot_bytes].
    """
    _use_torch_threads()
    cache_bytes, stride = _bytes_of(cache_tensor, fmt)
    key_spec, value_spec = _vectors(fmt, tables)
    for x, vector, spec, code_at, radius_at in (
        (key, fmt.key, key_spec, 0, fmt.key_radius_offset),
        (value, fmt.value, value_spec, fmt.value_offset, fmt.value_radius_offset),
    ):
        x = x[: len(slot_mapping)]
        if vector.kind == "polar":
            radius, codes = _encode_vectors(x, spec, tables.rotation)
        else:
            radius, codes = encode(x, vector)
        radii = radius.contiguous().view(torch.uint8).unflatten(-1, (-1, 2))
        _scatter(
            codes.numpy(), radii.numpy(), slot_mapping.numpy(), cache_bytes, stride,
            fmt.page_bytes, fmt.block_size, spec.unit, spec.places, code_at, radius_at,
        )  # fmt: skip


@njit(cache=True)
def _copy_rows(region, inside, count, places, rows):
    """Rows of `count` tokens of a region's chunks, from token `inside` on; region and rows are of units."""
    width = np.uint64(len(places) // _CHUNK)
    for t in range(0, count, _CHUNK):
        first = np.uint64((inside + t) % _CHUNK) * width
        chunk = np.uint64(inside + t) * width - first
        into = np.uint64(t) * width
        for j in range(np.uint64(min(_CHUNK, count - t)) * width):
            rows[into + j] = region[chunk + np.uint64(places[first + j])]


@njit(cache=True)
def _load_rows(region, inside, count, code_bytes, unit, places, rows):
    """Codes of tokens [inside, inside + count) of a region, row after row: in `rows`, or where they lie.

    inside is a multiple of 16, or count is 1.
    """
    if unit == code_bytes:
        return region[inside * code_bytes :]
    if unit == 8:
        _copy_rows(region.view(np.uint64), inside, count, places, rows.view(np.uint64))
    elif unit == 4:
        _copy_rows(region.view(np.uint32), inside, count, places, rows.view(np.uint32))
    elif unit == 2:
        _copy_rows(region.view(np.uint16), inside, count, places, rows.view(np.uint16))
    else:
        _copy_rows(region, inside, count, places, rows)
    return rows


@njit(cache=True, fastmath=True)
def _load_tile(region, inside, count, side, rows, points, tile):
    """Unit vectors of tokens [inside, inside + count) of a region of codes, as float32 bits: u32 tile [:, d].

    side: of `_sides`. rows u8 and points u32 [d / 2] are scratch. See `_load_rows`.
    """
    kind, pair_bits, state_bits, code_bytes, lut, unit, places = side
    codes = _load_rows(region, inside, count, code_bytes, unit, places, rows)
    d = tile.shape[1]
    half = d // 2
    if kind == RAW:
        for t in range(count):
            at = t * code_bytes
            for j in range(d):
                low, high = np.uint64(codes[at + 2 * j]), np.uint64(codes[at + 2 * j + 1])
                tile[t, j] = lut[low | (high << np.uint64(8))]
        return
    if kind == FP8:
        for t in range(count):
            at = t * code_bytes
            for j in range(d):
                tile[t, j] = lut[np.uint64(codes[at + j])]
        return
    before = np.uint64(pair_bits - state_bits)
    for t in range(count):
        at = t * code_bytes
        # Unsigned indices spare the loops Python's test for negative ones: three times faster.
        if pair_bits == 8:
            last = np.uint64(0)
            for j in range(half):
                code = np.uint64(codes[at + j])
                points[j] = lut[(code << np.uint64(state_bits)) | (last >> before)]
                last = code
        else:
            mask = np.uint64((1 << (pair_bits + state_bits)) - 1)
            word = np.uint64(0)
            for group in range(half // 8):
                # The top bits of the last code stay, below those of the next eight.
                word >>= np.uint64(8 * pair_bits)
                for b in range(pair_bits):
                    byte = np.uint64(codes[at + group * pair_bits + b])
                    word |= byte << np.uint64(8 * b + state_bits)
                for j in range(8):
                    points[group * 8 + j] = lut[(word >> np.uint64(pair_bits * j)) & mask]
        for j in range(half):
            tile[t, j] = points[j] << np.uint32(16)
        for j in range(half):
            tile[t, j + half] = points[j] & np.uint32(0xFFFF0000)


@njit(cache=True, parallel=True, fastmath=True)
def _attend(
    query, query_start, seq_lens, block_table, cache_bytes, stride, heads, page_bytes, block_size,
    key, value, value_at, key_radius_at, value_radius_at, splits, part_out, part_max, part_sum,
):  # fmt: skip
    """Flash attention of one (request, kv head, split) a task, on rotated and scaled queries.

    query f32 [T, Hq, d]; part_out f32 [R, heads, splits, rows, d], part_max and part_sum [R, heads,
    splits, rows], where row = query token * group + query head of the group.
    """
    requests = len(seq_lens)
    d = query.shape[2]
    group = query.shape[1] // heads
    code_bytes = max(value_at, key_radius_at - value_at) // block_size
    for task in prange(requests * heads * splits):
        split = task % splits
        head = task // splits % heads
        request = task // (splits * heads)
        length = seq_lens[request]
        first = query_start[request]
        count = query_start[request + 1] - first
        rows = count * group
        out = part_out[request, head, split]
        row_max = part_max[request, head, split]
        row_sum = part_sum[request, head, split]
        row_max[:] = _NO_MASS
        row_sum[:] = 0
        out[:] = 0
        # Splits are whole tiles and a tile never leaves its page.
        share = ((length + splits - 1) // splits + block_size - 1) // block_size * block_size
        begin, end = split * share, min((split + 1) * share, length)
        code_rows = np.empty(_TILE * code_bytes, np.uint8)
        points = np.empty(d // 2, np.uint32)
        bits = np.empty((_TILE, d), np.uint32)
        tile = bits.view(np.float32)
        radius_bits = np.empty(_TILE, np.uint32)
        radii = radius_bits.view(np.float32)
        weights = np.empty((max(rows, 1), _TILE), np.float32)
        for start in range(begin, end, _TILE if block_size % _TILE == 0 else _CHUNK):
            step = min(_TILE if block_size % _TILE == 0 else _CHUNK, end - start)
            block = np.int64(block_table[request, start // block_size])
            page = block * stride + head * page_bytes
            inside = start % block_size
            codes = cache_bytes[page : page + value_at]
            _load_tile(codes, inside, step, key, code_rows, points, bits)
            _load_radii(cache_bytes, page + key_radius_at + inside * RADIUS_STRIDE, step, radius_bits, radii)
            for row in range(rows):
                token, member = row // group, row % group
                q = query[first + token, head * group + member]
                for t in range(step):
                    dot = np.float32(0)
                    for j in range(d):
                        dot += q[j] * tile[t, j]
                    weights[row, t] = dot * radii[t]
                for t in range(max(0, length - count + token + 1 - start), step):
                    weights[row, t] = _NO_MASS
                top = row_max[row]
                for t in range(step):
                    top = max(top, weights[row, t])
                shrink = np.float32(math.exp(row_max[row] - top))
                total = np.float32(0)
                for t in range(step):
                    # A masked logit must weigh nothing even where every logit so far is masked.
                    weight = np.float32(0)
                    if weights[row, t] > _NO_MASS / 2:
                        weight = np.float32(math.exp(weights[row, t] - top))
                    weights[row, t] = weight
                    total += weight
                row_sum[row] = row_sum[row] * shrink + total
                row_max[row] = top
                if shrink != 1:
                    for j in range(d):
                        out[row, j] *= shrink
            codes = cache_bytes[page + value_at : page + key_radius_at]
            _load_tile(codes, inside, step, value, code_rows, points, bits)
            _load_radii(
                cache_bytes, page + value_radius_at + inside * RADIUS_STRIDE, step, radius_bits, radii
            )
            for row in range(rows):
                for t in range(step):
                    weights[row, t] *= radii[t]
                # Four tokens a sweep: the accumulator is read and written a quarter as often.
                for t in range(0, step - 3, 4):
                    w0, w1 = weights[row, t], weights[row, t + 1]
                    w2, w3 = weights[row, t + 2], weights[row, t + 3]
                    for j in range(d):
                        out[row, j] += (w0 * tile[t, j] + w1 * tile[t + 1, j]) + (
                            w2 * tile[t + 2, j] + w3 * tile[t + 3, j]
                        )
                for t in range(step // 4 * 4, step):
                    for j in range(d):
                        out[row, j] += weights[row, t] * tile[t, j]


@njit(cache=True, parallel=True, fastmath=True)
def _merge(part_out, part_max, part_sum, query_start, out):
    """What `_attend` left of each split, weighted by its share of the softmax -> out f32 [T, Hq, d]."""
    requests, heads, splits, _, d = part_out.shape
    group = out.shape[1] // heads
    for task in prange(requests * heads):
        request, head = task // heads, task % heads
        first = query_start[request]
        for row in range((query_start[request + 1] - first) * group):
            merged = out[first + row // group, head * group + row % group]
            merged[:] = 0
            top, total = part_max[request, head, 0, row], np.float32(0)
            for split in range(1, splits):
                top = max(top, part_max[request, head, split, row])
            for split in range(splits):
                share = np.float32(math.exp(part_max[request, head, split, row] - top))
                total += share * part_sum[request, head, split, row]
                for j in range(d):
                    merged[j] += share * part_out[request, head, split, row, j]
            scale = np.float32(1) / max(total, np.float32(1e-30))
            for j in range(d):
                merged[j] *= scale


@njit(cache=True, parallel=True)
def _gather(
    cache_bytes, stride, heads, page_bytes, block_size, block_table, start, side, code_at,
    radius_at, out,
):  # fmt: skip
    """Tokens [start, start + n) of one request: radius times unit vectors, f32 [n, heads, d], rotated."""
    n, _, d = out.shape
    code_bytes = side[3]
    for i in prange(n):
        code_row = np.empty(code_bytes, np.uint8)
        points = np.empty(d // 2, np.uint32)
        bits = np.empty((1, d), np.uint32)
        unit = bits.view(np.float32)
        radius_bits = np.empty(1, np.uint32)
        radius = radius_bits.view(np.float32)
        position = start + i
        block = np.int64(block_table[position // block_size])
        inside = position % block_size
        for head in range(heads):
            page = block * stride + head * page_bytes
            at = page + code_at
            codes = cache_bytes[at : at + block_size * code_bytes]
            _load_tile(codes, inside, 1, side, code_row, points, bits)
            _load_radii(cache_bytes, page + radius_at + inside * RADIUS_STRIDE, 1, radius_bits, radius)
            for j in range(d):
                out[i, head, j] = unit[0, j] * radius[0]


@cache
def _raw_lut(dtype: torch.dtype) -> np.ndarray:
    """Bits of the float32 that each 16-bit float of `dtype` is: uint32 [65536]."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    return every.float().numpy().view(np.uint32)


def _sides(fmt: PolarFormat, tables: Tables, dtype: torch.dtype) -> tuple[tuple, tuple]:
    """(kind, pair bits, state bits, code bytes, lut, unit, places) of keys and of values, for the loops."""
    key, value = (
        (
            s.kind, s.pair_bits, s.state_bits, s.code_bytes, _raw_lut(dtype) if s.kind == RAW else s.lut,
            s.unit, s.places,
        )
        for s in _vectors(fmt, tables)
    )  # fmt: skip
    return key, value


def decode_attention(
    query: torch.Tensor,
    cache_tensor: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    max_query_len: int,
    fmt: PolarFormat,
    tables: Tables,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Causal attention of few query tokens a request, straight off the pages.

    The shapes are those of `kernels.decode.decode_attention`. Scratch memory grows with the number of
    queries, not with the context.
    """
    threads = _use_torch_threads()
    cache_bytes, stride = _bytes_of(cache_tensor, fmt)
    requests, heads = len(seq_lens), cache_tensor.shape[1]
    tokens = int(query_start_loc[requests])
    rotated = (query[:tokens].float() @ tables.rotation.T) * scale
    group = query.shape[1] // heads
    rows = max_query_len * group
    splits = max(1, -(-2 * threads // max(1, requests * heads)))
    part_out = torch.empty(requests, heads, splits, rows, fmt.head_dim, dtype=torch.float32)
    part_max = torch.empty(requests, heads, splits, rows, dtype=torch.float32)
    part_sum = torch.empty(requests, heads, splits, rows, dtype=torch.float32)
    key, value = _sides(fmt, tables, query.dtype)
    _attend(
        rotated.numpy(), query_start_loc.numpy(), seq_lens.numpy(), block_table.contiguous().numpy(),
        cache_bytes, stride, heads, fmt.page_bytes, fmt.block_size, key, value, fmt.value_offset,
        fmt.key_radius_offset, fmt.value_radius_offset, splits, part_out.numpy(), part_max.numpy(),
        part_sum.numpy(),
    )  # fmt: skip
    merged = torch.empty_like(rotated)
    _merge(part_out.numpy(), part_max.numpy(), part_sum.numpy(), query_start_loc.numpy(), merged.numpy())
    out[:tokens] = merged @ tables.rotation


def _dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Torch's CPU flash attention of one request, in query's dtype.

    query [T, Hq, d], key and value [n, H, d] -> out [T, Hq, d], log-sum-exp float32 [T, Hq].
    """
    group = query.shape[1] // key.shape[1]
    q, k, v = (
        x.to(query.dtype).repeat_interleave(repeat, 1).transpose(0, 1)[None]
        for x, repeat in ((query, 1), (key, group), (value, group))
    )
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out[0].transpose(0, 1), lse[0].T


def prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache_tensor: torch.Tensor,
    block_table: torch.Tensor,
    context_len: int,
    fmt: PolarFormat,
    tables: Tables,
    scale: float,
    out: torch.Tensor,
) -> None:
    """One request's chunk: causal among its own fresh tokens, and all of them on the quantised prefix.

    Args:
        query, key, value: the chunk's, [T, Hq or H, d].
        block_table: int32 [max_blocks], this request's row.
        context_len: tokens of the prefix.
        out: [T, Hq, d], written.

    The prefix is decoded 4,096 tokens at a time, and the parts are merged by log-sum-exp.
    """
    _use_torch_threads()
    merged, merged_lse = _dense_attention(query, key, value, scale, causal=True)
    if context_len:
        merged = merged.float()
        rotated = (query.float() @ tables.rotation.T).to(query.dtype)
        cache_bytes, stride = _bytes_of(cache_tensor, fmt)
        heads = cache_tensor.shape[1]
        sides = _sides(fmt, tables, query.dtype)
        offsets = (
            (0, fmt.key_radius_offset),
            (fmt.value_offset, fmt.value_radius_offset),
        )
        for start in range(0, context_len, _PREFIX_TOKENS):
            n = min(_PREFIX_TOKENS, context_len - start)
            prefix = torch.empty(2, n, heads, fmt.head_dim, dtype=torch.float32)
            for into, side, (code_at, radius_at) in zip(prefix, sides, offsets, strict=True):
                _gather(
                    cache_bytes, stride, heads, fmt.page_bytes, fmt.block_size, block_table.numpy(),
                    start, side, code_at, radius_at, into.numpy(),
                )  # fmt: skip
            part, lse = _dense_attention(rotated, prefix[0], prefix[1], scale, causal=False)
            part = part.float() @ tables.rotation
            total = torch.logaddexp(merged_lse, lse)
            merged = merged * (merged_lse - total).exp()[..., None] + part * (lse - total).exp()[..., None]
            merged_lse = total
    out.copy_(merged)


def warm_up(fmt: PolarFormat, tables: Tables, num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> None:
    """Compile every loop that serving will call, so that no request waits for it."""
    cache_tensor = torch.zeros(2, num_kv_heads, fmt.block_size, fmt.slot_bytes, dtype=torch.uint8)
    x = torch.ones(2, num_kv_heads, fmt.head_dim, dtype=dtype)
    query = torch.ones(2, num_heads, fmt.head_dim, dtype=dtype)
    table = torch.zeros(1, 1, dtype=torch.int32)
    store_kv(x, x, cache_tensor, torch.arange(2), fmt, tables)
    lens, starts = torch.tensor([2], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    out = torch.empty_like(query)
    decode_attention(query, cache_tensor, table, lens, starts, 2, fmt, tables, 1.0, out)
    prefill_attention(query, x, x, cache_tensor, table[0], 2, fmt, tables, 1.0, out)
