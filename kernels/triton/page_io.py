"""The order of bytes in a GPU's page, for those who write it and those who read it.

Codes of 16 tokens, a chunk, lie as the lanes of a warp take them for tensor-core products (PTX ISA, fragments
of mma.m16n8k16): lane 4 * group + member has, one after the other, its part of each of its tokens, of keys
quarter `member` of tokens group and group + 8, of values eighth `group` of tokens 2 member, 2 member + 1,
2 member + 8 and 2 member + 9. These shares of row_bytes / 2 lie in planes, each with 16 bytes of every lane;
what then remains, in planes of 8 and of 4 bytes. So a warp's loads are of neighbouring bytes. Where shares
are no whole words, the 16 vectors lie one after the other instead. Polar vectors are one run of codes; others
are two, coordinates x of all pairs and then y, of which a part has a piece each.

`code_offset` says it byte by byte, for stores and, on the host, for the reference; `load_share` takes a
lane's whole share, for every kernel that reads.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm_polarquant.kernels.triton.constants import (
    FP8,
    KEY_PARTS,
    RAW,
    VectorConstants,
    page_constants,
    state_bits,
)
from vllm_polarquant.kernels.triton.lanes import (
    entry_place,
    funnel,
    load_words,
    look_up,
    scale_halves,
    shuffle_up,
    spread_bytes,
    upper_bytes,
)
from vllm_polarquant.page import BLOCK_SIZE_MULTIPLE, Page
from vllm_polarquant.page import RADIUS_STRIDE as _RADIUS_STRIDE
from vllm_polarquant.reference import Order

RADIUS_STRIDE = tl.constexpr(_RADIUS_STRIDE)


@triton.constexpr_function
def code_runs(code):
    """Runs of a vector's codes: codes of pairs, or coordinates x of all pairs and then y."""
    return 2 if code in (FP8.value, RAW.value) else 1


@triton.jit
def code_offset(slot, byte, VECTOR: tl.constexpr):
    """Where byte `byte` of the codes of token `slot` lies in its region of a page, int32.

    Plain arithmetic, so that `lane_order` can call it on the host.
    """
    ROW_BYTES: tl.constexpr = VECTOR.row_bytes
    if ROW_BYTES % 8 != 0:
        return slot * ROW_BYTES + byte
    else:
        RUNS: tl.constexpr = code_runs(VECTOR.code)
        RUN_BYTES: tl.constexpr = ROW_BYTES // RUNS
        PIECE: tl.constexpr = RUN_BYTES // VECTOR.parts
        TOKEN_BYTES: tl.constexpr = RUNS * PIECE
        PLANES: tl.constexpr = ROW_BYTES // 32
        REST: tl.constexpr = ROW_BYTES // 8 % 4
        part = byte % RUN_BYTES // PIECE
        half = slot % 16 // 8
        eighth = slot % 8
        if VECTOR.parts == KEY_PARTS:
            lane_of_slot = 4 * eighth
            lane_of_byte = part
            token = half
        else:
            lane_of_slot = eighth // 2
            lane_of_byte = 4 * part
            token = 2 * half + eighth % 2
        chunk = slot // 16 * (16 * ROW_BYTES)
        at_of_slot = token * TOKEN_BYTES
        at_of_byte = byte // RUN_BYTES * PIECE + byte % PIECE
        if REST == 0 and (TOKEN_BYTES % 16 == 0 or TOKEN_BYTES == 8 or TOKEN_BYTES == 4):
            # Tokens begin or end with planes: a sum of what the slot says and what the byte says.
            return (chunk + at_of_slot + at_of_slot // 16 * 496 + lane_of_slot * 16) + (
                at_of_byte + at_of_byte // 16 * 496 + lane_of_byte * 16
            )
        else:
            at = at_of_slot + at_of_byte
            lane = lane_of_slot + lane_of_byte
            start = at // 16 * 4
            stride = 16
            if REST > 0:
                # 1 in the planes of 8 and of 4 bytes, which are the last ones, else 0.
                narrow = at // (16 * PLANES) if PLANES > 0 else 1
                stride = 16 - narrow * (8 if REST >= 2 else 12)
                if REST == 3:
                    narrowest = narrow * ((at + 8 - 16 * PLANES) // 16)
                    start = start + 2 * narrowest
                    stride = stride - 4 * narrowest
            return chunk + at + start * 124 + lane * stride


def lane_order(page: Page) -> Order:
    """The order as a table, for the reference."""
    constants = page_constants(page)

    def places(vector: VectorConstants) -> torch.Tensor:
        slot = torch.arange(BLOCK_SIZE_MULTIPLE)[:, None]
        return code_offset.fn(slot, torch.arange(vector.row_bytes)[None, :], vector)

    return Order(places(constants.keys), places(constants.values))


@triton.jit
def page_pointer(cache, block, head, block_stride, PAGE: tl.constexpr):
    """The page of kv head `head` in block `block`, int32."""
    return cache + block.to(tl.int64) * block_stride + head.to(tl.int64) * PAGE.nbytes


@triton.jit
def segment_centres(centres, segment, num_segments, head, PER_HEAD: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Pointers to the first pairs of kv heads' centres; what lies past the last segment has its centre."""
    row = tl.minimum(segment, num_segments - 1)
    if PER_HEAD > 1:
        row = row * PER_HEAD + head
    return centres + row.to(tl.int64) * (HEAD_DIM // 2)


@triton.jit
def encode_radius(radius):
    """Radii float32 >= 0 as the bits of bfloat16, int16, rounded to nearest even; none becomes infinite."""
    bits = radius.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.minimum(rounded, 0x7F7F).to(tl.int16)


@triton.jit
def decode_radius(stored):
    """Radii float32 of the bits of stored ones, int16, whatever the sign bit says."""
    return ((stored.to(tl.int32) & 0x7FFF) << 16).to(tl.float32, bitcast=True)


@triton.jit
def radii(words):
    """Radii float32 of words, uint32, of a key's and a value's radius each: for each word the two.

    The lower sign bit, a key's, says whether a centre was taken away (`is_centred`).
    """
    decoded = ()
    for i in tl.static_range(len(words)):
        decoded = decoded + (
            ((words[i] << 16) & 0x7FFF0000).to(tl.float32, bitcast=True),
            (words[i] & 0x7FFF0000).to(tl.float32, bitcast=True),
        )
    return decoded


@triton.jit
def is_centred(word):
    """Whether the key of a word of radii, uint32, is stored less its centre."""
    return (word & 0x8000) != 0


@triton.jit
def radius_pointer(page, slot, VECTOR: tl.constexpr):
    """Pointers, int16, to the radii of tokens `slot`."""
    return (page + VECTOR.radius_offset + slot * RADIUS_STRIDE).to(tl.pointer_type(tl.int16))


@triton.constexpr_function
def _gcd(*numbers):
    return math.gcd(*numbers)


@triton.constexpr_function
def part_pairs(vector):
    """Pairs of coordinates in a lane's part of a vector."""
    bits = {FP8.value: 16, RAW.value: 32}.get(vector.code, vector.code)
    return 8 * vector.row_bytes // bits // vector.parts


@triton.constexpr_function
def _part_bits(vector):
    """Bits of a lane's part of a vector in one of its runs."""
    return 8 * vector.row_bytes // vector.parts // code_runs(vector.code)


@triton.constexpr_function
def _part_stride(vector):
    """Bits from a lane's part of one vector to its part of the next, in the words of `load_share`."""
    bits = _part_bits(vector)
    return (bits + 31) // 32 * 32 if vector.row_bytes % 8 else bits * code_runs(vector.code)


@triton.constexpr_function
def _planes(words):
    """Widths and first words of the planes of shares of so many words."""
    widths = [4] * (words // 4) + [width for width in (2, 1) if words % 4 & width]
    return tuple((width, sum(widths[:i])) for i, width in enumerate(widths))


@triton.jit
def _load_bits(page, row, part, BITS: tl.constexpr, ROW_BYTES: tl.constexpr, EARLY: tl.constexpr):
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
    raw = load_words(page + (row + bit // 32 * 4), (BITS + 63 - GRAIN) // 32, 4, EARLY)
    shift = (bit % 32).to(tl.uint32)
    words = ()
    for i in tl.static_range(COUNT):
        words = words + (funnel(raw[i], raw[i + 1], shift) if i + 1 < len(raw) else raw[i] >> shift,)
    return words


@triton.jit
def load_share(page, slot, group, member, VECTOR: tl.constexpr, EARLY: tl.constexpr = False):
    """A lane's parts of the 16 vectors from token `slot` on, as words for `link` and `point`.

    page: a pointer to the page. slot: int32, a multiple of 16. Lane 4 * group + member. EARLY: as of
    `load_words`.
    """
    ROW_BYTES: tl.constexpr = VECTOR.row_bytes
    codes = page + VECTOR.codes_offset
    words = ()
    if ROW_BYTES % 8 == 0:
        lane = 4 * group + member
        PLANES: tl.constexpr = _planes(ROW_BYTES // 8)
        for i in tl.static_range(len(PLANES)):
            # One sum in 32 bits, so that the address is one addition.
            own = slot * ROW_BYTES + lane * (4 * PLANES[i][0])
            place = codes + 128 * PLANES[i][1] + own
            words = words + load_words(place, PLANES[i][0], 4 * PLANES[i][0], EARLY)
    else:
        for token in tl.static_range(16 * VECTOR.parts // 32):
            if VECTOR.parts == KEY_PARTS:
                row = (slot + group + 8 * token) * ROW_BYTES
                part = member
            else:
                row = (slot + 2 * member + token % 2 + token // 2 * 8) * ROW_BYTES
                part = group
            words = words + _load_bits(codes, row, part, _part_bits(VECTOR), ROW_BYTES, EARLY)
    return words


@triton.jit
def link(words, lane, VECTOR: tl.constexpr):
    """For each of a lane's parts, 2 of keys or 4 of values, a word that ends in the codes before the part.

    Before a vector's first part there are none, and the codes are 0.
    """
    before = ()
    if VECTOR.code == FP8 or VECTOR.code == RAW:
        return before
    else:
        TOKENS: tl.constexpr = VECTOR.parts // 2
        # A key's parts lie in the lanes of a quad, a value's in those of eight quads.
        DELTA: tl.constexpr = 1 if VECTOR.parts == KEY_PARTS else 4
        first = lane % 4 == 0 if VECTOR.parts == KEY_PARTS else lane < 4
        last = ()
        for token in tl.static_range(TOKENS):
            last = last + (_word_before(words, token * _part_stride(VECTOR) + _part_bits(VECTOR)),)
        # A byte of each is enough, and one shuffle for all.
        bytes_before = tl.where(first, 0, shuffle_up(upper_bytes(last), DELTA))
        for token in tl.static_range(TOKENS):
            before = before + (bytes_before << (8 * (TOKENS - 1 - token)),)
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
def point(
    words,
    before,
    TOKEN: tl.constexpr,
    PAIR: tl.constexpr,
    VECTOR: tl.constexpr,
    lut,
    TABLE: tl.constexpr,
    COPIES: tl.constexpr,
    lane,
    DTYPE: tl.constexpr,
):
    """Pair PAIR of a lane's part of its TOKEN-th vector, before radius and rotation.

    uint32, DTYPE's bits of x in the low half and of y in the high; 0 past the part's last pair.

    words, before: of `load_share` and `link`. lut, TABLE, COPIES: as in `lanes.look_up`.
    """
    PAIRS: tl.constexpr = part_pairs(VECTOR)
    BASE: tl.constexpr = TOKEN * _part_stride(VECTOR)
    CODE: tl.constexpr = VECTOR.code
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
            linked = (before[TOKEN], _word_at(words, BASE))
            window = _field(linked, 32 - STATES, CODE + STATES, entry_place(COPIES))
        else:
            window = _field(words, BASE + CODE * PAIR - STATES, CODE + STATES, entry_place(COPIES))
        return look_up(lut, TABLE, COPIES, window, lane)
