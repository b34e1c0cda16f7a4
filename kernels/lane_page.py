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
)
from vllm_polarquant.kernels.page import FP8, INTERPRET, RAW, decode_radius, state_bits

_INTERPRET = tl.constexpr(INTERPRET)


@triton.constexpr_function
def _part_bits(code, pairs):
    """Bits of a lane's part of a vector in one of its runs: a polar vector has one, others x and y."""
    return pairs * (8 if code == FP8.value else code)


@triton.constexpr_function
def _gcd(*numbers):
    return math.gcd(*numbers)


@triton.jit
def _load_bits(page, row, part, BITS: tl.constexpr, ROW_BYTES: tl.constexpr):
    """The bits part * BITS .. + BITS - 1 of each thread's row, as words with the first bit lowest.

    page: a multiple of 4. row: int32, where each thread's row starts, in bytes from there on. Rows lie
    ROW_BYTES apart, from a multiple of 16 on.
    """
    COUNT: tl.constexpr = (BITS + 31) // 32
    GRAIN: tl.constexpr = _gcd(BITS, 8 * ROW_BYTES, 32)
    if GRAIN == 32:
        # One sum in 32 bits, so that the address is one addition.
        return load_words(page + (row + part * (BITS // 8)), COUNT, _gcd(BITS // 8, ROW_BYTES, 16))
    else:
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
def load_part(page, row, part, PAIRS: tl.constexpr, CODE: tl.constexpr, ROW_BYTES: tl.constexpr):
    """Codes of the pairs part * PAIRS .. + PAIRS - 1 of each thread's vector, as `unit` takes them.

    page: a pointer. row: int32, how many bytes further on each thread's vector starts. part: int32, not the
    same for all threads.
    """
    BITS: tl.constexpr = _part_bits(CODE, PAIRS)
    if CODE == FP8 or CODE == RAW:
        second = row + ROW_BYTES // 2
        return _load_bits(page, row, part, BITS, ROW_BYTES // 2) + _load_bits(
            page, second, part, BITS, ROW_BYTES // 2
        )
    else:
        return _load_bits(page, row, part, BITS, ROW_BYTES)


@triton.jit
def link(words, PAIRS: tl.constexpr, CODE: tl.constexpr, first, DELTA: tl.constexpr):
    """The words of `load_part` as `unit` takes them: polar codes behind a word of the codes before them.

    The part before lies DELTA lanes before; where `first`, there is none, and the codes are 0.
    """
    if CODE == FP8 or CODE == RAW:
        return words
    else:
        BITS: tl.constexpr = _part_bits(CODE, PAIRS)
        LAST: tl.constexpr = (BITS - 1) // 32
        USED: tl.constexpr = (BITS - 1) % 32 + 1
        last = words[LAST]
        if USED < 32:
            last = last << (32 - USED)
        if USED < state_bits(CODE):
            last = last | (words[LAST - 1] >> USED)
        return (tl.where(first, 0, shuffle_up(last, DELTA)),) + words


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
    PAIR: tl.constexpr,
    PAIRS: tl.constexpr,
    CODE: tl.constexpr,
    lut,
    FIRST: tl.constexpr,
    COPIES: tl.constexpr,
    lane,
    DTYPE: tl.constexpr,
):
    """Pair PAIR of a part before radius and rotation: uint32, x in the low half and y in the high one.

    words: of `link`, with PAIRS pairs. lut, FIRST, COPIES: as in `lanes.look_up`. 0 where PAIR >= PAIRS.
    """
    if PAIR >= PAIRS:
        return tl.zeros(lane.shape, tl.uint32)
    elif CODE == FP8:
        RUN: tl.constexpr = len(words) // 2
        # e4m3's bits are, a few places up, those of a 16-bit float that is a power of two smaller.
        UP: tl.constexpr = 4 if tl.bfloat16 == DTYPE else 1
        SMALLER: tl.constexpr = 120 if tl.bfloat16 == DTYPE else 8
        both = spread_bytes(words[PAIR // 4], words[RUN + PAIR // 4], PAIR % 4)
        bits = (both & 0x80008000) | ((both >> UP) & (0x7F007F00 >> UP))
        return scale_halves(bits, SMALLER, DTYPE)
    elif CODE == RAW:
        HALVES: tl.constexpr = len(words) // 2
        x = _field(words[:HALVES], 16 * PAIR, 16, 0)
        y = _field(words[HALVES:], 16 * PAIR, 16, 0)
        return x | (y << 16)
    else:
        STATES: tl.constexpr = state_bits(CODE)
        window = _field(words, 32 + CODE * PAIR - STATES, CODE + STATES, entry_place(COPIES))
        return look_up(lut, FIRST, COPIES, window, lane)


@triton.jit
def radii(stored):
    """Radii float32 of four stored ones, uint16, as four tensors."""
    halves = ()
    for i in tl.static_range(4):
        halves = halves + (stored[i].to(tl.float16, bitcast=True),)
    decoded = ()
    if _INTERPRET:
        for i in tl.static_range(4):
            decoded = decoded + (decode_radius(halves[i]),)
        return decoded
    else:
        for i in tl.static_range(4):
            decoded = decoded + (halves[i].to(tl.float32),)
        # Radii of real keys and values are plain; the others are worth a branch, not four powers.
        return tl.inline_asm_elementwise(
            _radii_asm(),
            "=f,=f,=f,=f,0,1,2,3,r",
            decoded + ((stored[0] | stored[1] | stored[2] | stored[3]).to(tl.uint32),),
            dtype=dtypes(tl.float32, 4),
            is_pure=True,
            pack=1,
        )


@triton.constexpr_function
def _radii_asm():
    """Replace each negative one of $0 to $3 by minus its ninth power, at most float32's largest."""
    lines = ["{.reg .pred plain, negative;\n.reg .b32 signs;\n.reg .f32 square, power;"]
    lines.append("and.b32 signs, $8, 0x8000;\nsetp.eq.b32 plain, signs, 0;\n@plain bra DONE;")
    for i in range(4):
        lines.append(
            f"setp.lt.f32 negative, ${i}, 0f00000000;\nmul.f32 square, ${i}, ${i};\n"
            f"mul.f32 power, square, square;\nmul.f32 power, power, power;\n"
            f"mul.f32 power, power, ${i};\nneg.f32 power, power;\nmin.f32 power, power, 0f7F7FFFFF;\n"
            f"@negative mov.f32 ${i}, power;"
        )
    lines.append("DONE:\n}")
    return "\n".join(lines)
