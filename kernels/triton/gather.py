"""Unpack cached prefixes into dense keys and values for FlashAttention, still rotated.

Lane by lane like decode attention, with the same reading of a page: a warp unpacks 16 tokens at a time, and
each lane stores what it has decoded.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm_polarquant.codec import Tables
from vllm_polarquant.format import SEGMENT as _SEGMENT
from vllm_polarquant.kernels.triton.constants import (
    check,
    check_cache,
    check_centres,
    check_heads,
    check_int,
    page_constants,
    table_entries,
)
from vllm_polarquant.kernels.triton.lanes import (
    fill_table,
    load_words,
    open_shared,
    pack_halves,
    store_words,
    unpack_halves,
)
from vllm_polarquant.kernels.triton.launch import Gpu, config
from vllm_polarquant.kernels.triton.page_io import (
    decode_radius,
    link,
    load_share,
    page_pointer,
    part_pairs,
    point,
    radius_pointer,
    segment_centres,
)
from vllm_polarquant.page import Page

SEGMENT = tl.constexpr(_SEGMENT)

_TABLE_BYTES = 40 << 10


@triton.constexpr_function
def _copies(key_code, value_code):
    """How often tables lie in shared memory: more copies have fewer bank conflicts."""
    entries = table_entries(key_code) + (0 if value_code == key_code else table_entries(value_code))
    return 16 if entries * 64 <= _TABLE_BYTES else 8


@triton.constexpr_function
def _run_align(pairs):
    """Bytes that each lane's run of so many 16-bit floats starts at a multiple of, in a row of them."""
    return math.gcd(2 * pairs, 16)


@triton.jit
def _store_part(
    words,
    before,
    lane,
    TOKEN: tl.constexpr,
    part,
    radius,
    centre,
    centred,
    target,
    valid,
    lut,
    TABLE: tl.constexpr,
    COPIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CENTRED: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Store a lane's part `part` of its TOKEN-th vector, radius and centre applied, to the row at `target`.

    centre: pointers to the part of the centre that is added where `centred`, if CENTRED.

    words, before: of `load_share` and `link`.
    """
    DTYPE: tl.constexpr = target.dtype.element_ty
    PAIRS: tl.constexpr = part_pairs(VECTOR)
    xs = ()
    ys = ()
    for pair in tl.static_range(PAIRS):
        both = point(words, before, TOKEN, pair, VECTOR, lut, TABLE, COPIES, lane, DTYPE)
        x, y = unpack_halves(both, DTYPE)
        x *= radius
        y *= radius
        if CENTRED:
            (word,) = load_words(centre + pair, 1, 4)
            cx, cy = unpack_halves(word, DTYPE)
            x = tl.where(centred, x + cx, x)
            y = tl.where(centred, y + cy, y)
        xs = xs + (x,)
        ys = ys + (y,)
    run = target + part * PAIRS
    if PAIRS % 2 == 0:
        x_words = ()
        y_words = ()
        for i in tl.static_range(PAIRS // 2):
            x_words = x_words + (pack_halves(xs[2 * i], xs[2 * i + 1], DTYPE),)
            y_words = y_words + (pack_halves(ys[2 * i], ys[2 * i + 1], DTYPE),)
        store_words(run, x_words, valid, _run_align(PAIRS))
        store_words(run + HEAD_DIM // 2, y_words, valid, _run_align(PAIRS))
    else:
        for i in tl.static_range(PAIRS):
            both = pack_halves(xs[i], ys[i], DTYPE)
            x = (both & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
            y = (both >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
            tl.store(run + i, x, mask=valid)
            tl.store(run + HEAD_DIM // 2 + i, y, mask=valid)


# What differs from batch to batch must not compile another kernel in the middle of serving.
@triton.jit(
    do_not_specialize=["table_stride", "num_segments"],
    do_not_specialize_on_alignment=["block_table", "starts", "lengths_cu"],
)
def _gather_kernel(
    cache,
    block_stride,
    block_table,
    table_stride,
    starts,
    lengths_cu,
    key_lut,
    value_lut,
    centres,
    num_segments,
    key_out,
    key_stride_token,
    key_stride_head,
    value_out,
    value_stride_token,
    value_stride_head,
    CHUNKS: tl.constexpr,
    WARPS: tl.constexpr,
    CENTRES_PER_SEGMENT: tl.constexpr,
    PAGE: tl.constexpr,
):
    CENTRED: tl.constexpr = CENTRES_PER_SEGMENT > 0
    KEYS: tl.constexpr = PAGE.keys
    VALUES: tl.constexpr = PAGE.values
    COPIES: tl.constexpr = _copies(KEYS.code, VALUES.code)
    KEY_TABLE_BYTES: tl.constexpr = table_entries(KEYS.code) * COPIES * 4
    VALUE_TABLE: tl.constexpr = 0 if VALUES.code == KEYS.code else KEY_TABLE_BYTES
    request = tl.program_id(1)
    head = tl.program_id(2)
    first_row = tl.load(lengths_cu + request)
    count = tl.load(lengths_cu + request + 1) - first_row
    start = tl.load(starts + request)
    first_chunk = start // 16 + tl.program_id(0) * (CHUNKS * WARPS)
    if first_chunk * 16 >= start + count or count <= 0:
        return
    thread = tl.arange(0, WARPS * 32)
    open_shared(thread, VALUE_TABLE + table_entries(VALUES.code) * COPIES * 4)
    fill_table(thread, key_lut, 0, table_entries(KEYS.code), COPIES)
    if VALUES.code != KEYS.code:
        fill_table(thread, value_lut, VALUE_TABLE, table_entries(VALUES.code), COPIES)
    tl.debug_barrier()
    lane = thread % 32
    group = lane // 4
    member = lane % 4
    table = block_table + request.to(tl.int64) * table_stride
    last_chunk = (start + count - 1) // 16
    for step in tl.range(0, CHUNKS):
        chunk = first_chunk + step * WARPS + thread // 32
        position = tl.minimum(chunk, last_chunk) * 16
        block = tl.load(table + position // PAGE.block_size)
        page = page_pointer(cache, block, head, block_stride, PAGE)
        slot = position % PAGE.block_size
        centre = segment_centres(
            centres, position // SEGMENT, num_segments, head, CENTRES_PER_SEGMENT, PAGE.head_dim
        )
        centre += member * part_pairs(KEYS)
        for KIND in tl.static_range(2):
            if KIND == 0:
                words = load_share(page, slot, group, member, KEYS)
                before = link(words, lane, KEYS)
            else:
                words = load_share(page, slot, group, member, VALUES)
                before = link(words, lane, VALUES)
            for TOKEN in tl.static_range(2 if KIND == 0 else 4):
                if KIND == 0:
                    inside = group + 8 * TOKEN
                    stored = tl.load(radius_pointer(page, slot + inside, KEYS))
                else:
                    inside = 2 * member + (TOKEN % 2 + TOKEN // 2 * 8)
                    stored = tl.load(radius_pointer(page, slot + inside, VALUES))
                radius = decode_radius(stored)
                own = position + inside
                valid = (chunk <= last_chunk) & (own >= start) & (own < start + count)
                row = (first_row + own - start).to(tl.int64)
                if KIND == 0:
                    _store_part(
                        words, before, lane, TOKEN, member, radius, centre, stored < 0,
                        key_out + row * key_stride_token + head * key_stride_head, valid,
                        key_lut, 0, COPIES, PAGE.head_dim, CENTRED, KEYS,
                    )  # fmt: skip
                else:
                    _store_part(
                        words, before, lane, TOKEN, group, radius, centre, stored < 0,
                        value_out + row * value_stride_token + head * value_stride_head, valid,
                        value_lut, VALUE_TABLE, COPIES, PAGE.head_dim, False, VALUES,
                    )  # fmt: skip


def gather_prefix(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    start: torch.Tensor,
    lengths_cu: torch.Tensor,
    max_len: int,
    page: Page,
    tables: Tables,
    key_out: torch.Tensor,
    value_out: torch.Tensor,
) -> None:
    """Unpack positions [start_r, start_r + len_r) of each request into dense rows, still rotated.

    Request r's keys and values, radii applied, go to the rows lengths_cu[r]:lengths_cu[r + 1]; rows
    past lengths_cu[R] are left alone.

    Args:
        cache: uint8 [B, H, N, slot.nbytes] with dense blocks.
        block_table: int32 [R, max_blocks], last dim dense.
        start: int32 [R], the first position to unpack.
        lengths_cu: int32 [R + 1], cumulative lengths, from 0.
        max_len: an upper bound of the lengths, which decides the grid.
        page: of the cache.
        tables: codec.tables(page.slot, key_out.dtype, key_out.device), or a layer's own.
        key_out: bfloat16 or float16 [W, H, d], last dim dense, W >= lengths_cu[R]; every row of a head starts
            at a multiple of 16 bytes.
        value_out: as key_out.

    Raises:
        ValueError: for other shapes, dtypes or strides.
    """
    check_heads("key_out", key_out, page.slot.head_dim)
    check_heads("value_out", value_out, page.slot.head_dim)
    check(
        key_out.shape == value_out.shape
        and key_out.dtype == value_out.dtype
        and key_out.shape[1] == cache.shape[1],
        "key_out and value_out must agree with each other and with the cache's "
        f"{cache.shape[1]} heads, got {key_out.dtype} {list(key_out.shape)} and {value_out.dtype} "
        f"{list(value_out.shape)}",
    )
    for name, rows in (("key_out", key_out), ("value_out", value_out)):
        check(
            rows.data_ptr() % 16 == 0 and rows.stride(0) % 8 == 0 and rows.stride(1) % 8 == 0,
            f"rows of {name} must start at multiples of 16 bytes, got strides {list(rows.stride())}",
        )
    block_stride = check_cache(cache, page)
    num_reqs = start.shape[0]
    check_int("start", start, (-1,), torch.int32)
    check_int("block_table", block_table, (num_reqs, -1), torch.int32)
    check_int("lengths_cu", lengths_cu, (num_reqs + 1,), torch.int32)
    if max_len <= 0 or not num_reqs:
        return
    launch = config("gather", page.slot, Gpu.of(cache.device))
    tokens = 16 * launch["num_warps"] * launch["chunks"]
    # A request whose first position lies inside a chunk of 16 touches one chunk more.
    _gather_kernel[(triton.cdiv(max_len + 15, tokens), num_reqs, cache.shape[1])](
        cache,
        block_stride,
        block_table,
        block_table.stride(0),
        start,
        lengths_cu,
        tables.key_lut,
        tables.value_lut,
        tables.centres,
        len(tables.centres),
        key_out,
        key_out.stride(0),
        key_out.stride(1),
        value_out,
        value_out.stride(0),
        value_out.stride(1),
        CHUNKS=launch["chunks"],
        WARPS=launch["num_warps"],
        CENTRES_PER_SEGMENT=check_centres(tables.centres, page, cache.shape[1]),
        PAGE=page_constants(page),
        num_warps=launch["num_warps"],
    )
