"""numba loops that write pages."""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from vllm_polarquant.format import CELL_GRID, CELLS_PER_UNIT, FAR_CELL
from vllm_polarquant.page import RADIUS_STRIDE

_LARGEST_RADIUS = np.uint32(0x7F7F)


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
def _viterbi(y, scale, encoder, back, codes):
    """`codec.viterbi` of one vector y [d] times scale, over the points that cells name -> codes [d / 2].

    back: uint8 [d / 2, states], scratch.
    """
    points, cells = encoder.points, encoder.cells
    half, states = len(y) // 2, cells.shape[1]
    bits = 0
    while 1 << bits < states:
        bits += 1
    width = np.uint32(encoder.pair_bits - bits)
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
                for _ in range(encoder.candidates):
                    branch = ((row & mask) << np.uint32(bits)) | np.uint32(old)
                    row >>= width
                    at = np.uint64((np.uint32(new) << np.uint32(encoder.pair_bits)) | branch)
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
def _encode(y, encoder, back, codes):
    """Codes of one rotated vector y [d] into codes [d / 2]; returns what their points are to be times."""
    d = len(y)
    half = d // 2
    square = np.float32(0)
    for j in range(d):
        square += y[j] * y[j]
    if square == 0:
        return np.float32(0)
    norm = math.sqrt(square)
    _viterbi(y, np.float32(math.sqrt(d) / norm), encoder, back, codes)
    points, states = encoder.points, encoder.cells.shape[1]
    dot, length2 = np.float32(0), np.float32(0)
    before = 0
    for j in range(half):
        window = codes[j] * states + before * states // (1 << encoder.pair_bits)
        px, py = points[window, 0], points[window, 1]
        dot += y[j] * px + y[j + half] * py
        length2 += px * px + py * py
        before = codes[j]
    length = math.sqrt(length2)
    if encoder.unbiased:
        # |y| / length over the cosine, which is dot / (length |y|).
        return np.float32(norm * norm / dot)
    return np.float32(norm / length)


@njit(cache=True)
def _pack(codes, pair_bits, out):
    """codec.pack."""
    word, filled, at = np.int64(0), 0, 0
    for code in codes:
        word |= np.int64(code) << filled
        filled += pair_bits
        while filled >= 8:
            out[at] = word & 0xFF
            at += 1
            word >>= 8
            filled -= 8


@njit(cache=True)
def _take_away(y, scale, centres, segment, head, left):
    """y less its centre times scale, into left [d]; whether that is shorter (codec.encode_centred)."""
    half = len(y) // 2
    words = centres.words[min(segment, len(centres.words) - 1), min(head, centres.words.shape[1] - 1)]
    square, left_square = np.float32(0), np.float32(0)
    for j in range(half):
        word = np.uint64(words[j])
        left[j] = y[j] - scale * centres.lut[word & np.uint64(0xFFFF)]
        left[j + half] = y[j + half] - scale * centres.lut[word >> np.uint64(16)]
    for j in range(2 * half):
        square += y[j] * y[j]
        left_square += left[j] * left[j]
    return left_square < square


@njit(cache=True)
def _put_radius(radius, centred, out):
    """codec.encode_radius of one number >= 0, and the bit, into two bytes: to even, never infinite."""
    bits = np.array([radius], np.float32).view(np.uint32)[0]
    bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    bits = min(bits, _LARGEST_RADIUS)
    out[0] = bits & np.uint32(0xFF)
    out[1] = bits >> np.uint32(8) | np.uint32(centred) << np.uint32(7)


@njit(cache=True, parallel=True)
def store_polar(
    rotated, largest, segments, centres, slots, encoder, code_bytes, memory, blocks, region
):  # fmt: skip
    """Encode rotated f32 [T, H, d] times largest f32 [T, H] into the slots int64 [T] that are >= 0.

    segments: int32 [T], of the centres.
    """
    tokens, heads, d = rotated.shape
    half, states = d // 2, encoder.cells.shape[1]
    for task in prange(tokens * heads):
        token, head = task // heads, task % heads
        slot = slots[token]
        if slot >= 0:
            inside = slot % blocks.tokens
            page = slot // blocks.tokens * blocks.stride + head * blocks.page_bytes
            codes = np.zeros(half, np.uint8)
            radius, centred = np.float32(0), False
            if largest[token, head] > 0:
                back = np.empty((half, states), np.uint8)
                y, left = rotated[token, head], np.empty(d, np.float32)
                scale = np.float32(1) / largest[token, head]
                centred = _take_away(y, scale, centres, segments[token], head, left)
                if centred:
                    y = left
                radius = largest[token, head] * _encode(y, encoder, back, codes)
            start = page + region.codes + inside * code_bytes
            _pack(codes, encoder.pair_bits, memory[start : start + code_bytes])
            start = page + region.radii + inside * RADIUS_STRIDE
            _put_radius(radius, centred, memory[start : start + 2])


@njit(cache=True, parallel=True)
def take_away(rotated, largest, segments, centres, centred):
    """Take centres from the vectors that are shorter without, in place, and say which: bool [T, H].

    The other arguments are those of `store_polar`.
    """
    tokens, heads, d = rotated.shape
    for task in prange(tokens * heads):
        token, head = task // heads, task % heads
        centred[token, head] = False
        if largest[token, head] > 0:
            left = np.empty(d, np.float32)
            scale = np.float32(1) / largest[token, head]
            if _take_away(rotated[token, head], scale, centres, segments[token], head, left):
                rotated[token, head] = left
                centred[token, head] = True


@njit(cache=True, parallel=True)
def store_codes(codes, radii, centred, slots, memory, blocks, region):
    """Codes u8 [T, H, bytes], bytes of radii u8 [T, H, 2] and bool [T, H] to the slots int64 [T] >= 0."""
    tokens, heads, code_bytes = codes.shape
    for token in prange(tokens):
        slot = slots[token]
        if slot >= 0:
            inside = slot % blocks.tokens
            for head in range(heads):
                page = slot // blocks.tokens * blocks.stride + head * blocks.page_bytes
                start = page + region.codes + inside * code_bytes
                memory[start : start + code_bytes] = codes[token, head]
                start = page + region.radii + inside * RADIUS_STRIDE
                memory[start] = radii[token, head, 0]
                memory[start + 1] = radii[token, head, 1] | np.uint8(centred[token, head]) << np.uint8(7)
