"""How a lane reads its part of a vector off a page: codes as words, words as points of pairs."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from vllm_polarquant.kernels.lanes import (
    dtypes,
    entry_place,
    funnel,
    load_words,
    look_up,
    scale_halves,
    shuffle_up,
    spread_bytes,
    unpack_halves,
    upper_bytes,
)
from vllm_polarquant.kernels.page import FP8, INTERPRET, KEY_PARTS, RAW, code_runs, decode_radius, state_bits

_INTERPRET = tl.constexpr(INTERPRET)


@triton.constexpr_function
def _gcd(*numbers):
    return math.gcd(*numbers)


@triton.constexpr_function
def _part_bits(code, pairs):
    """Bits of a lane's part of a vector in one of its runs: a polar vector has one, others x and y."""
    return pairs * (8 if code == FP8.value else code)


@triton.constexpr_function
def _part_words(code, pairs):
    """Words that a part of a vector takes where vectors lie one after the other."""
    return (_part_bits(code, pairs) + 31) // 32


@triton.constexpr_function
def _part_stride(code, pairs, row_bytes):
    """Bits from a lane's part of one vector to its part of the next, in the words of `load_share`."""
    return 32 * _part_words(code, pairs) if row_bytes % 8 else _part_bits(code, pairs) * code_runs(code)


@triton.constexpr_function
def _planes(words):
    """Widths and first words of the planes of format.code_places, for shares of so many words."""
    widths = [4] * (words // 4) + [width for width in (2, 1) if words % 4 & width]
    return tuple((width, sum(widths[:i])) for i, width in enumerate(widths))


@triton.jit
def _load_bits(page, row, part, BITS: tl.constexpr, ROW_BYTES: tl.constexpr):
    """The bits part * BITS .. + BITS - 1 of each thread's row, as words with the first bit lowest.

    page: a multiple of 16. row: int32, where each thread's row starts, in bytes from there on.
    """
    COUNT: tl.constexpr = (BITS + 31) // 32
    GRAIN: tl.constexpr = _gcd(BITS, 8 * ROW_BYTES, 32)
    bit = part * BITS
    if ROW_BYTES % 4 != 0:
        odd = row & 3
        row -= odd
        bit += odd * 8
    raw = load_words(page + (row + bit // 32 * 4), (BITS + 63 - GRAIN) // 32, 4)
    shift = (bit % 32).to(tl.uint32)
    words = ()
    for i in tl.static_range(COUNT):
        words = words + (funnel(raw[i], raw[i + 1], shift) if i + 1 < len(raw) else raw[i] >> shift,)
    return words


@triton.jit
def load_share(
    codes,
    slot,
    group,
    place,
    PAIRS: tl.constexpr,
    CODE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """A lane's parts of the 16 vectors from `slot` on, as format.code_places says, as words for `unit`.

    codes: a pointer to the first vector of the page. slot: int32, a multiple of 16. PAIRS: of a part.
    """
    words = ()
    if ROW_BYTES % 8 == 0:
        lane = 4 * group + place
        PLANES: tl.constexpr = _planes(ROW_BYTES // 8)
        for i in tl.static_range(len(PLANES)):
            # One sum in 32 bits, so that the address is one addition.
            own = slot * ROW_BYTES + lane * (4 * PLANES[i][0])
            words = words + load_words(codes + 128 * PLANES[i][1] + own, PLANES[i][0], 4 * PLANES[i][0])
    else:
        for turn in tl.static_range(16 * PARTS // 32):
            if PARTS == KEY_PARTS:
                row = (slot + group + 8 * turn) * ROW_BYTES
                part = place
            else:
                row = (slot + 2 * place + turn % 2 + turn // 2 * 8) * ROW_BYTES
                part = group
            words = words + _load_bits(codes, row, part, _part_bits(CODE, PAIRS), ROW_BYTES)
    return words


@triton.jit
def link(
    words,
    TURNS: tl.constexpr,
    PAIRS: tl.constexpr,
    CODE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    first,
    DELTA: tl.constexpr,
):
    """For each of a lane's TURNS parts of vectors, 2 or 4, a word that ends in the codes before it.

    The part before lies DELTA lanes before; where `first`, there is none, and the codes are 0.
    """
    before = ()
    if CODE == FP8 or CODE == RAW:
        return before
    else:
        last = ()
        for turn in tl.static_range(TURNS):
            last = last + (
                _word_before(words, turn * _part_stride(CODE, PAIRS, ROW_BYTES) + _part_bits(CODE, PAIRS)),
            )
        # A byte of each is enough, and one shuffle for all.
        bytes_before = tl.where(first, 0, shuffle_up(upper_bytes(last), DELTA))
        for turn in tl.static_range(TURNS):
            before = before + (bytes_before << (8 * (TURNS - 1 - turn)),)
        return before


@triton.jit
def _word_at(words, FIRST: tl.constexpr):
    """The 32 bits from bit FIRST of the words on; what is past the last word is 0."""
    word = words[FIRST // 32]
    if FIRST % 32 == 0:
        return word
    elif FIRST // 32 + 1 < len(words):
        return funnel(word, words[FIRST // 32 + 1], tl.full(word.shape, FIRST % 32, tl.uint32))
    else:
        return word >> (FIRST % 32)


@triton.jit
def _word_before(words, END: tl.constexpr):
    """The 32 bits before bit END of the words."""
    return _word_at(words, END - 32) if END >= 32 else words[0] << (32 - END)


@triton.jit
def _field(words, FIRST: tl.constexpr, WIDTH: tl.constexpr, PLACE: tl.constexpr):
    """The WIDTH bits from bit FIRST of the words on, moved to bit PLACE; FIRST % 32 + WIDTH may pass 32."""
    SHIFT: tl.constexpr = FIRST % 32 - PLACE
    word = words[FIRST // 32]
    if FIRST % 32 + WIDTH > 32:
        word = funnel(word, words[FIRST // 32 + 1], tl.full(word.shape, SHIFT, tl.uint32))
    elif SHIFT >= 0:
        word = word >> SHIFT
    else:
        word = word << -SHIFT
    return word & (((1 << WIDTH) - 1) << PLACE)


@triton.jit
def unit(
    words,
    before,
    TURN: tl.constexpr,
    PAIR: tl.constexpr,
    PAIRS: tl.constexpr,
    CODE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    lut,
    FIRST: tl.constexpr,
    COPIES: tl.constexpr,
    lane,
    DTYPE: tl.constexpr,
):
    """Pair PAIR of a lane's part TURN before radius and rotation: uint32, x in the low half, y in the high.

    words, before: of `load_share` and `link`, with PAIRS pairs a part. lut, FIRST, COPIES: as in
    `lanes.look_up`. 0 where PAIR >= PAIRS.
    """
    BASE: tl.constexpr = TURN * _part_stride(CODE, PAIRS, ROW_BYTES)
    if PAIR >= PAIRS:
        return tl.zeros(lane.shape, tl.uint32)
    elif CODE == FP8:
        # e4m3's bits are, a few places up, those of a 16-bit float that is a power of two smaller.
        UP: tl.constexpr = 4 if tl.bfloat16 == DTYPE else 1
        SMALLER: tl.constexpr = 120 if tl.bfloat16 == DTYPE else 8
        X: tl.constexpr = BASE // 8 + PAIR
        Y: tl.constexpr = X + PAIRS
        both = spread_bytes(words[X // 4], X % 4, words[Y // 4], Y % 4)
        bits = (both & 0x80008000) | ((both >> UP) & (0x7F007F00 >> UP))
        return scale_halves(bits, SMALLER, DTYPE)
    elif CODE == RAW:
        x = _field(words, BASE + 16 * PAIR, 16, 0)
        y = _field(words, BASE + 16 * (PAIRS + PAIR), 16, 0)
        return x | (y << 16)
    else:
        STATES: tl.constexpr = state_bits(CODE)
        if PAIR == 0:
            linked = (before[TURN], _word_at(words, BASE))
            window = _field(linked, 32 - STATES, CODE + STATES, entry_place(COPIES))
        else:
            window = _field(words, BASE + CODE * PAIR - STATES, CODE + STATES, entry_place(COPIES))
        return look_up(lut, FIRST, COPIES, window, lane)


@triton.jit
def radii(words):
    """Radii float32 of two words of two stored ones each, low half first, as four tensors."""
    low, high = unpack_halves(words[0], tl.float16)
    next_low, next_high = unpack_halves(words[1], tl.float16)
    stored = (low, high, next_low, next_high)
    if _INTERPRET:
        decoded = ()
        for i in tl.static_range(4):
            decoded = decoded + (decode_radius(stored[i]),)
        return decoded
    else:
        # Radii of real keys and values are plain; the others are worth a branch, not four powers.
        return tl.inline_asm_elementwise(
            _radii_asm(),
            "=f,=f,=f,=f,0,1,2,3,r",
            [low, high, next_low, next_high, words[0] | words[1]],
            dtype=dtypes(tl.float32, 4),
            is_pure=True,
            pack=1,
        )


@triton.constexpr_function
def _radii_asm():
    """Replace each negative one of $0 to $3 by minus its ninth power, at most float32's largest."""
    lines = ["{.reg .pred plain, negative;\n.reg .b32 signs;\n.reg .f32 square, power;"]
    lines.append("and.b32 signs, $8, 0x80008000;\nsetp.eq.b32 plain, signs, 0;\n@plain bra DONE;")
    for i in range(4):
        lines.append(
            f"setp.lt.f32 negative, ${i}, 0f00000000;\nmul.f32 square, ${i}, ${i};\n"
            f"mul.f32 power, square, square;\nmul.f32 power, power, power;\n"
            f"mul.f32 power, power, ${i};\nneg.f32 power, power;\nmin.f32 power, power, 0f7F7FFFFF;\n"
            f"@negative mov.f32 ${i}, power;"
        )
    lines.append("DONE:\n}")
    return "\n".join(lines)
