"""Encode new keys and values into their slots: rotate, search, pack, all in one launch."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm_polarquant.codec import Tables
from vllm_polarquant.format import FP8_MAX
from vllm_polarquant.kernels.triton.constants import (
    FP8,
    INTERPRET,
    RAW,
    check,
    check_cache,
    check_centres,
    check_factors,
    check_heads,
    check_int,
    page_constants,
    state_bits,
)
from vllm_polarquant.kernels.triton.lanes import unpack_halves
from vllm_polarquant.kernels.triton.launch import Config, Gpu, config
from vllm_polarquant.kernels.triton.page_io import (
    code_offset,
    decode_radius,
    encode_radius,
    page_pointer,
    radius_pointer,
    segment_centres,
)
from vllm_polarquant.kernels.triton.rotate import dot
from vllm_polarquant.kernels.triton.search import (
    WINDOW,
    branch_cost,
    branch_window,
    branches_to_try,
    get,
    load_in_layout,
    open_scratch,
    put,
    scratch_places,
    scratch_words,
    search,
    tried_branches,
)
from vllm_polarquant.page import Page

MANY_VECTORS = 1 << 12
"""From as many vectors on, programs take more of them."""

_FP8_MAX = tl.constexpr(FP8_MAX)
_INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def encode_fp8(x):
    """Float32 within +-448 as the bits of e4m3, rounded to nearest even."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Adding 2**14, whose last place is e4m3's smallest step, makes the float unit do the rounding.
    subnormal = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(tl.abs(x) < 0.015625, subnormal, normal)
    return code | ((bits >> 24) & 0x80)


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

    A lane's part of a vector is whole units, so that none is cut.
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
    VECTOR: tl.constexpr,
):
    """Store eight codes, int32 [rows, groups] each, as bytes of a little-endian bit stream.

    Eight codes of w bits are w bytes, which go to byte group * w and on of the rows' slots. region: pointers
    to the codes of the rows' pages, [rows, 1]. slot: [rows, 1]. group: [1, groups].
    """
    WIDTH: tl.constexpr = VECTOR.code
    UNIT: tl.constexpr = _unit_bytes(WIDTH, VECTOR.row_bytes, VECTOR.parts)
    BITS: tl.constexpr = 8 * UNIT
    dtype: tl.constexpr = tl.int64 if UNIT == 8 else tl.int32
    stored: tl.constexpr = _integer(UNIT)
    for unit in tl.static_range(WIDTH // UNIT):
        word = tl.zeros(codes[0].shape, dtype)
        for i in tl.static_range(8):
            if WIDTH * (i + 1) > BITS * unit and WIDTH * i < BITS * (unit + 1):
                word |= _shifted(codes[i].to(dtype), WIDTH * i - BITS * unit)
        place = code_offset(slot, group * WIDTH + unit * UNIT, VECTOR)
        tl.store((region + place).to(tl.pointer_type(stored)), word.to(stored), mask=keep)


@triton.jit
def _load_factors(factors, head, dim, PER_HEAD: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Factors of dims of each vector's head, float32 [vectors, dims], or [1, dims] of all."""
    if PER_HEAD:
        return tl.load(
            factors + head[:, None] * HEAD_DIM + dim[None, :], mask=(dim < HEAD_DIM)[None, :], other=0.0
        )
    else:
        return tl.load(factors + dim, mask=dim < HEAD_DIM, other=0.0)[None, :]


@triton.jit
def _encode(
    x,
    x_stride_token,
    x_stride_head,
    cache,
    block_stride,
    slot_mapping,
    num_vectors,
    mixing,
    factors,
    lut,
    cells,
    centres,
    segments,
    num_segments,
    scratch,
    NUM_HEADS: tl.constexpr,
    FACTORS_PER_HEAD: tl.constexpr,
    CENTRES_PER_SEGMENT: tl.constexpr,
    PAGE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_VECTORS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARALLEL_STATES: tl.constexpr,
):
    HEAD_DIM: tl.constexpr = PAGE.head_dim
    HALF_PAD: tl.constexpr = PAGE.half_pad
    BLOCK_SIZE: tl.constexpr = PAGE.block_size
    CODE: tl.constexpr = VECTOR.code
    HALF: tl.constexpr = HEAD_DIM // 2
    vector = tl.program_id(0) * BLOCK_VECTORS + tl.arange(0, BLOCK_VECTORS)
    token = (vector // NUM_HEADS).to(tl.int64)
    head = (vector % NUM_HEADS).to(tl.int64)
    slot = tl.load(slot_mapping + token, mask=vector < num_vectors, other=-1)
    keep = slot >= 0
    slot = tl.where(keep, slot, 0)
    source = x + token * x_stride_token + head * x_stride_head
    page = page_pointer(cache, slot // BLOCK_SIZE, head, block_stride, PAGE)
    inside_page = (slot % BLOCK_SIZE).to(tl.int32)
    region = page + VECTOR.codes_offset
    radius_target = radius_pointer(page, inside_page, VECTOR)
    CENTRED: tl.constexpr = CENTRES_PER_SEGMENT > 0
    if CENTRED:
        # Asked for early: what it leads to is waited for.
        segment = tl.load(segments + token, mask=keep, other=0)

    pair = tl.arange(0, HALF_PAD)
    mask = keep[:, None] & (pair < HALF)[None, :]
    first = tl.load(source[:, None] + pair[None, :], mask=mask, other=0.0)
    second = tl.load(source[:, None] + HALF + pair[None, :], mask=mask, other=0.0)
    if CODE == RAW:
        place = code_offset(inside_page[:, None], 2 * pair[None, :], VECTOR)
        tl.store((region[:, None] + place).to(tl.pointer_type(x.dtype.element_ty)), first, mask=mask)
        place = code_offset(inside_page[:, None], 2 * (pair + HALF)[None, :], VECTOR)
        tl.store((region[:, None] + place).to(tl.pointer_type(x.dtype.element_ty)), second, mask=mask)
        tl.store(radius_target, encode_radius(tl.full([BLOCK_VECTORS], 1.0, tl.float32)), mask=keep)
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
            # The matrix is one of +-1, over sqrt(d). Dividing by a power of two keeps x exact in its 16 bits,
            # and factors of +-1 do too, so that one product on tensor cores does what otherwise takes three
            # in tf32. Other factors round x once more: of a key whose mean has a hundred times the energy of
            # the rest, a 50th of what its codes lose. The matrix's four quarters are the smaller one, with
            # signs.
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
                factor = _load_factors(factors, head, k, FACTORS_PER_HEAD, HEAD_DIM) * inverse
                scaled = tl.load(part, mask=mine, other=0.0).to(tl.float32) * factor
                left += dot(scaled.to(x.dtype.element_ty), matrix)
                factor = _load_factors(factors, head, HALF + k, FACTORS_PER_HEAD, HEAD_DIM) * inverse
                scaled = tl.load(part + HALF, mask=mine, other=0.0).to(tl.float32) * factor
                right += dot(scaled.to(x.dtype.element_ty), matrix)
            y1, y2 = left + right, left - right
        else:
            divisor = tl.where(usable, amax, 1.0)
            y1 = tl.zeros([BLOCK_VECTORS, HALF_PAD], tl.float32)
            y2 = tl.zeros([BLOCK_VECTORS, HALF_PAD], tl.float32)
            for start in tl.range(0, HEAD_DIM, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                mine = (keep & usable)[:, None] & (k < HEAD_DIM)[None, :]
                part = tl.load(source[:, None] + k[None, :], mask=mine, other=0.0)
                factor = _load_factors(factors, head, k, FACTORS_PER_HEAD, HEAD_DIM)
                entry = mixing + pair[:, None] * HEAD_DIM + k[None, :]
                inside = (pair < HALF)[:, None] & (k < HEAD_DIM)[None, :]
                upper = tl.load(entry, mask=inside, other=0.0)
                lower = tl.load(entry + HALF * HEAD_DIM, mask=inside, other=0.0)
                part = tl.div_rn(part.to(tl.float32), tl.broadcast_to(divisor[:, None], part.shape)) * factor
                y1 = tl.dot(part, tl.trans(upper), acc=y1, input_precision="tf32x3")
                y2 = tl.dot(part, tl.trans(lower), acc=y2, input_precision="tf32x3")

        if CENTRED:
            centre = segment_centres(centres, segment, num_segments, head, CENTRES_PER_SEGMENT, HEAD_DIM)
            words = load_in_layout(centre[:, None], tl.minimum(pair, HALF - 1)[None, :])
            if HALF < HALF_PAD:
                words = tl.where((pair < HALF)[None, :], words, 0)
            c1, c2 = unpack_halves(words.to(tl.uint32, bitcast=True), x.dtype.element_ty)
            per_amax = tl.where(usable, 1.0 / tl.where(usable, amax, 1.0), 0.0)[:, None]
            c1 *= per_amax
            c2 *= per_amax
            # Where |y - c| < |y|, in one sum; not where that is not finite.
            nearer = tl.sum(c1 * (2 * y1 - c1) + c2 * (2 * y2 - c2), axis=1)
            centred = (nearer > 0) & (nearer < float("inf"))
            y1 = tl.where(centred[:, None], y1 - c1, y1)
            y2 = tl.where(centred[:, None], y2 - c2, y2)

        if CODE == FP8:
            peak = tl.max(tl.maximum(tl.abs(y1), tl.abs(y2)), axis=1)
            radius = encode_radius(amax * (peak / _FP8_MAX))
            # Codes are taken against the stored radius, so that its rounding adds no error.
            # A bare 1e-38, subnormal in float32, would become a float64.
            least = tl.full([BLOCK_VECTORS], 1e-38, tl.float32)
            factor = tl.div_rn(amax, tl.maximum(decode_radius(radius), least))
            factor = tl.where(usable, factor, 0.0)[:, None]
            x1 = tl.clamp(y1 * factor, -_FP8_MAX, _FP8_MAX)
            x2 = tl.clamp(y2 * factor, -_FP8_MAX, _FP8_MAX)
            zero = usable[:, None]
            place = code_offset(inside_page[:, None], pair[None, :], VECTOR)
            codes = tl.where(zero, encode_fp8(x1), 0).to(tl.uint8)
            tl.store(region[:, None] + place, codes, mask=mask)
            place = code_offset(inside_page[:, None], (pair + HALF)[None, :], VECTOR)
            codes = tl.where(zero, encode_fp8(x2), 0).to(tl.uint8)
            tl.store(region[:, None] + place, codes, mask=mask)
        else:
            norm = tl.maximum(tl.sqrt(tl.sum(y1 * y1 + y2 * y2, axis=1)), 1e-30)
            unit = (tl.sqrt(float(HEAD_DIM)) / norm)[:, None]
            y1 *= unit
            y2 *= unit
            DTYPE: tl.constexpr = x.dtype.element_ty
            BITS: tl.constexpr = state_bits(CODE)
            TRIED: tl.constexpr = tried_branches(CODE)
            WINDOWS: tl.constexpr = HALF // WINDOW
            packed = y1.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            packed |= y2.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16
            AT_ONCE: tl.constexpr = PARALLEL_STATES >= 1 << BITS
            PLACES: tl.constexpr = scratch_places(CODE, BLOCK_VECTORS, HALF, AT_ONCE)
            POINTS: tl.constexpr = 1 << (CODE + BITS)
            row = tl.arange(0, BLOCK_VECTORS)[:, None]
            place = PLACES[0] + pair[None, :] * BLOCK_VECTORS + row
            put(scratch, tl.arange(0, POINTS), tl.load(lut + tl.arange(0, POINTS)))
            put(scratch, place, packed)
            tl.debug_barrier()
            search(scratch, cells, BLOCK_VECTORS, HALF, HALF_PAD, CODE, DTYPE, AT_ONCE)
            tl.debug_barrier()

            # Eight pairs a lane, one after the other, so that it has whole bytes of codes. Coordinates are
            # read back, as those in registers would leave few for the search.
            group = tl.arange(0, HALF_PAD // WINDOW)[None, :]
            inside = group < WINDOWS
            states = get(scratch, PLACES[1] + tl.minimum(group, WINDOWS - 1) * BLOCK_VECTORS + row)
            square = tl.zeros([BLOCK_VECTORS, HALF_PAD // WINDOW], tl.float32)
            product = square
            codes = ()
            for i in tl.static_range(WINDOW):
                own = get(scratch, PLACES[0] + (group * WINDOW + i) * BLOCK_VECTORS + row)
                x1, x2 = unpack_halves(own, tl.float16)
                new = (states >> ((WINDOW - 1 - i) * BITS)) & ((1 << BITS) - 1)
                old = (states >> ((WINDOW - i) * BITS)) & ((1 << BITS) - 1)
                tried = branches_to_try(cells, x1, x2, new, CODE)
                window = branch_window(tried, new, old, 0, CODE)
                point = get(scratch, window)
                least = branch_cost(point, x1, x2, True, DTYPE)
                for other in tl.static_range(1, TRIED):
                    other_window = branch_window(tried, new, old, other, CODE)
                    other_point = get(scratch, other_window)
                    cost = branch_cost(other_point, x1, x2, True, DTYPE)
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
            if VECTOR.gain == "unbiased":
                gain = 1.0 / cos
            radius = encode_radius(amax * (norm * gain / length))
            _store_codes(codes, region[:, None], inside_page[:, None], group, keep[:, None] & inside, VECTOR)
        if CENTRED:
            radius |= tl.where(centred, -0x8000, 0).to(tl.int16)
        tl.store(radius_target, tl.where(usable, radius, 0), mask=keep)


@triton.jit(
    do_not_specialize=["num_vectors", "num_segments"],
    do_not_specialize_on_alignment=["slot_mapping", "segments"],
)
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
    mixing,
    key_factors,
    value_factors,
    key_lut,
    value_lut,
    key_cells,
    value_cells,
    centres,
    segments,
    num_segments,
    scratch,
    NUM_HEADS: tl.constexpr,
    KEY_FACTORS_PER_HEAD: tl.constexpr,
    CENTRES_PER_SEGMENT: tl.constexpr,
    BLOCK_VECTORS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARALLEL_STATES: tl.constexpr,
    SCRATCH_WORDS: tl.constexpr,
    PAGE: tl.constexpr,
):
    KEYS: tl.constexpr = PAGE.keys
    VALUES: tl.constexpr = PAGE.values
    if SCRATCH_WORDS:
        open_scratch(SCRATCH_WORDS)
    if tl.program_id(1) == 0:
        _encode(
            key, key_stride_token, key_stride_head, cache, block_stride, slot_mapping, num_vectors, mixing,
            key_factors, key_lut, key_cells, centres, segments, num_segments, scratch, NUM_HEADS,
            KEY_FACTORS_PER_HEAD, CENTRES_PER_SEGMENT, PAGE, KEYS, BLOCK_VECTORS, BLOCK_K, PARALLEL_STATES,
        )  # fmt: skip
    else:
        _encode(
            value, value_stride_token, value_stride_head, cache, block_stride, slot_mapping, num_vectors,
            mixing, value_factors, value_lut, value_cells, centres, segments, num_segments, scratch,
            NUM_HEADS, False, 0, PAGE, VALUES, BLOCK_VECTORS, BLOCK_K, PARALLEL_STATES,
        )  # fmt: skip


def launch_config(num_vectors: int, page: Page, gpu: Gpu) -> Config:
    """Launch parameters for so many keys. Few leave most of a GPU idle: small programs have less latency."""
    return config("store" if num_vectors >= MANY_VECTORS else "store_few", page.slot, gpu)


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    page: Page,
    tables: Tables,
    segments: torch.Tensor | None = None,
    launch: Config | None = None,
) -> None:
    """Write keys and values to their slots, one launch for both.

    A zero vector, or one that holds a NaN or an infinity, is stored as radius 0 and codes 0.

    Args:
        key: bfloat16 or float16 [T, H, d], last dim dense, any other strides.
        value: as key.
        cache: uint8 [B, H, N, slot.nbytes] with dense blocks.
        slot_mapping: int64 [T'], T' <= T, of slots block * N + token; those below 0 are dropped, as
            are the rows of key and value past T'.
        page: of the cache.
        tables: codec.tables(page.slot, key.dtype, key.device), or a layer's own.
        segments: int32 [at least T'], of each token's position, by which keys are centred; those past the
            tables' last are that one. None where the tables have no centres.
        launch: by default `launch_config` of as many vectors.

    Raises:
        ValueError: for other shapes, dtypes or strides.
    """
    head_dim = page.slot.head_dim
    check_heads("key", key, head_dim)
    check_heads("value", value, head_dim)
    check_int("slot_mapping", slot_mapping, (-1,), torch.int64)
    block_stride = check_cache(cache, page)
    check(
        key.shape == value.shape and key.dtype == value.dtype and key.shape[1] == cache.shape[1],
        f"key and value must agree with each other and with the cache's {cache.shape[1]} heads, "
        f"got {key.dtype} {list(key.shape)} and {value.dtype} {list(value.shape)}",
    )
    check(
        len(slot_mapping) <= len(key),
        f"slot_mapping has {len(slot_mapping)} slots for {len(key)} tokens",
    )
    factors_stride = check_factors("key_factors", tables.key_factors, key.shape[1], head_dim)
    centres_per_segment = check_centres(tables.centres, page, key.shape[1])
    if centres_per_segment:
        check(
            segments is not None
            and segments.dtype == torch.int32
            and segments.dim() == 1
            and len(segments) >= len(slot_mapping)
            and (len(segments) <= 1 or segments.stride(0) == 1),
            f"segments must be a dense int32 of at least {len(slot_mapping)} tokens where keys are centred",
        )
    num_vectors = len(slot_mapping) * key.shape[1]
    if not num_vectors:
        return
    launch = launch or launch_config(num_vectors, page, Gpu.of(key.device))
    words = scratch_words(page.slot, launch["block_vectors"], launch["parallel_states"])
    # The interpreter has no shared memory of ours.
    scratch = torch.empty(words, dtype=torch.int32) if INTERPRET else None
    _store_kernel[(triton.cdiv(num_vectors, launch["block_vectors"]), 2)](
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
        tables.mixing,
        tables.key_factors,
        tables.value_factors,
        tables.key_lut,
        tables.value_lut,
        tables.key_cells,
        tables.value_cells,
        tables.centres,
        segments if centres_per_segment else None,
        len(tables.centres),
        scratch,
        NUM_HEADS=key.shape[1],
        KEY_FACTORS_PER_HEAD=factors_stride > 0,
        CENTRES_PER_SEGMENT=centres_per_segment,
        BLOCK_VECTORS=launch["block_vectors"],
        BLOCK_K=launch["block_k"],
        num_warps=launch["num_warps"],
        num_stages=launch["num_stages"],
        maxnreg=launch["maxnreg"],
        PARALLEL_STATES=launch["parallel_states"],
        SCRATCH_WORDS=words,
        PAGE=page_constants(page),
    )
