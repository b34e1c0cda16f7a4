"""Chunked prefill: unpack the cached prefix for FlashAttention, then merge its result.

The prefix stays rotated, and so must its queries be; turning its output back is left to the last
merge, where it costs one product a query instead of one a key.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_polarquant.format import PolarFormat
from vllm_polarquant.kernels import tuning
from vllm_polarquant.kernels.decode import DecoderTables
from vllm_polarquant.kernels.page import (
    KEY_PARTS,
    VALUE_PARTS,
    check,
    check_cache,
    check_heads,
    check_int,
    load_lut,
    load_radius,
    load_unit,
    page_constants,
    page_pointers,
)
from vllm_polarquant.kernels.rotate import BLOCK_COLUMNS, RotationTables, rotated_columns, row_tile


# What differs from batch to batch must not compile another kernel in the middle of serving.
@triton.jit(
    do_not_specialize=["table_stride"],
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
    key_out,
    key_stride_token,
    key_stride_head,
    value_out,
    value_stride_token,
    value_stride_head,
    BLOCK_N: tl.constexpr,
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
    HALF: tl.constexpr = HEAD_DIM // 2
    DTYPE: tl.constexpr = key_out.dtype.element_ty
    request = tl.program_id(1)
    head = tl.program_id(2)
    first_row = tl.load(lengths_cu + request)
    count = tl.load(lengths_cu + request + 1) - first_row
    if tl.program_id(0) * BLOCK_N >= count:
        return
    offset = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = offset < count
    position = tl.load(starts + request) + offset
    table = block_table + request.to(tl.int64) * table_stride
    page = page_pointers(cache, table, position, valid, head, block_stride, BLOCK_SIZE, PAGE_BYTES)
    slot = position % BLOCK_SIZE
    row = (first_row + offset).to(tl.int64)
    pair = tl.arange(0, HALF_PAD)
    inside = valid[:, None] & (pair < HALF)[None, :]

    key_points = load_lut(key_lut, KEY_CODE)
    x, y = load_unit(page, slot, valid, key_points, KEY_CODE, KEY_BYTES, KEY_PARTS, HEAD_DIM, HALF_PAD, DTYPE)
    radius = load_radius(page, slot, valid, KEY_RADIUS_OFFSET)[:, None]
    target = key_out + (row * key_stride_token + head * key_stride_head)[:, None] + pair[None, :]
    tl.store(target, (x.to(tl.float32) * radius).to(DTYPE), mask=inside)
    tl.store(target + HALF, (y.to(tl.float32) * radius).to(DTYPE), mask=inside)

    value_points = load_lut(value_lut, VALUE_CODE)
    x, y = load_unit(
        page + VALUE_OFFSET, slot, valid, value_points, VALUE_CODE, VALUE_BYTES, VALUE_PARTS,
        HEAD_DIM, HALF_PAD, DTYPE,
    )  # fmt: skip
    radius = load_radius(page, slot, valid, VALUE_RADIUS_OFFSET)[:, None]
    target = value_out + (row * value_stride_token + head * value_stride_head)[:, None]
    target += pair[None, :]
    tl.store(target, (x.to(tl.float32) * radius).to(DTYPE), mask=inside)
    tl.store(target + HALF, (y.to(tl.float32) * radius).to(DTYPE), mask=inside)


def gather_prefix(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    start: torch.Tensor,
    lengths_cu: torch.Tensor,
    max_len: int,
    fmt: PolarFormat,
    tables: DecoderTables,
    key_out: torch.Tensor,
    value_out: torch.Tensor,
) -> None:
    """Unpack positions [start_r, start_r + len_r) of each request into dense rows, still rotated.

    Request r's keys and values, radii applied, go to the rows lengths_cu[r]:lengths_cu[r + 1]; rows
    past lengths_cu[R] are left alone.

    Args:
        cache: uint8 [B, H, N, slot_bytes] with dense blocks.
        block_table: int32 [R, max_blocks], last dim dense.
        start: int32 [R], the first position to unpack.
        lengths_cu: int32 [R + 1], cumulative lengths, from 0.
        max_len: an upper bound of the lengths, which decides the grid.
        fmt: the cache's format.
        tables: codec.tables(fmt, key_out.dtype, key_out.device).
        key_out: bfloat16 or float16 [W, H, d], last dim dense, W >= lengths_cu[R].
        value_out: as key_out.

    Raises:
        ValueError: for other shapes, dtypes or strides.
    """
    check_heads("key_out", key_out, fmt.head_dim)
    check_heads("value_out", value_out, fmt.head_dim)
    check(
        key_out.shape == value_out.shape
        and key_out.dtype == value_out.dtype
        and key_out.shape[1] == cache.shape[1],
        "key_out and value_out must agree with each other and with the cache's "
        f"{cache.shape[1]} heads, got {key_out.dtype} {list(key_out.shape)} and {value_out.dtype} "
        f"{list(value_out.shape)}",
    )
    block_stride = check_cache(cache, fmt)
    num_reqs = start.shape[0]
    check_int("start", start, (-1,), torch.int32)
    check_int("block_table", block_table, (num_reqs, -1), torch.int32)
    check_int("lengths_cu", lengths_cu, (num_reqs + 1,), torch.int32)
    if max_len <= 0 or not num_reqs:
        return
    config = tuning.config("gather", fmt, cache.device)
    _gather_kernel[(triton.cdiv(max_len, config["block_n"]), num_reqs, cache.shape[1])](
        cache,
        block_stride,
        block_table,
        block_table.stride(0),
        start,
        lengths_cu,
        tables.key_lut,
        tables.value_lut,
        key_out,
        key_out.stride(0),
        key_out.stride(1),
        value_out,
        value_out.stride(0),
        value_out.stride(1),
        BLOCK_N=config["block_n"],
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        **page_constants(fmt),
    )


@triton.jit(
    do_not_specialize=["lse_stride_head", "prefix_lse_stride_head", "num_rows"],
    do_not_specialize_on_alignment=["lse", "prefix_lse"],
)
def _merge_kernel(
    out,
    out_stride_token,
    out_stride_head,
    lse,
    lse_stride_head,
    lse_stride_token,
    prefix_out,
    prefix_stride_token,
    prefix_stride_head,
    prefix_lse,
    prefix_lse_stride_head,
    prefix_lse_stride_token,
    rotation,
    num_rows,
    ROTATE_BACK: tl.constexpr,
    UPDATE_LSE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    keep = row < num_rows
    token = (row // NUM_HEADS).to(tl.int64)
    head = (row % NUM_HEADS).to(tl.int64)

    # FlashAttention writes +inf or -inf for a query that sees no key; both mean weight 0.
    lse_pointer = lse + head * lse_stride_head + token * lse_stride_token
    own = tl.load(lse_pointer, mask=keep, other=float("-inf"))
    other = tl.load(
        prefix_lse + head * prefix_lse_stride_head + token * prefix_lse_stride_token,
        mask=keep,
        other=float("-inf"),
    )
    own = tl.where(own == float("inf"), float("-inf"), own)
    other = tl.where(other == float("inf"), float("-inf"), other)
    peak = tl.maximum(own, other)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    own = tl.exp(own - peak)
    other = tl.exp(other - peak)
    total = own + other
    some = total > 0
    share = tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)
    if UPDATE_LSE:
        merged = tl.where(some, peak + tl.log(tl.where(some, total, 1.0)), float("-inf"))
        tl.store(lse_pointer, merged, mask=keep)

    # An empty part's output may be anything, so it is not read.
    own_keep = (keep & (own > 0))[:, None]
    other_keep = (keep & (other > 0))[:, None]
    own = (own * share)[:, None]
    other = (other * share)[:, None]
    target = out + token * out_stride_token + head * out_stride_head
    source = prefix_out + token * prefix_stride_token + head * prefix_stride_head
    if ROTATE_BACK:
        dim = tl.arange(0, DIM_PAD)
        prefix = tl.load(
            source[:, None] + dim[None, :], mask=other_keep & (dim < HEAD_DIM)[None, :], other=0.0
        )
    for start in tl.range(0, HEAD_DIM, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        inside = (column < HEAD_DIM)[None, :]
        if ROTATE_BACK:
            part = rotated_columns(prefix, rotation, column, True, HEAD_DIM)
        else:
            part = tl.load(source[:, None] + column[None, :], mask=other_keep & inside, other=0.0).to(
                tl.float32
            )
        columns = target[:, None] + column[None, :]
        kept = tl.load(columns, mask=own_keep & inside, other=0.0).to(tl.float32)
        mixed = kept * own + part * other
        tl.store(columns, mixed.to(out.dtype.element_ty), mask=keep[:, None] & inside)


def merge_prefix(
    out: torch.Tensor,
    lse: torch.Tensor,
    prefix_out: torch.Tensor,
    prefix_lse: torch.Tensor,
    tables: RotationTables,
    rotate_back: bool,
    update_lse: bool = False,
) -> None:
    """Merge attention over a prefix into attention over other keys, in place, by log-sum-exp.

    Several prefix chunks are first merged with each other, all rotated, with rotate_back False and
    update_lse True; the result goes into the fresh part with rotate_back True. A part whose lse is
    +inf or -inf is empty and its output is not read; where both are empty, out becomes 0 and lse
    -inf.

    Args:
        out: bfloat16 or float16 [T, num_heads, d], last dim dense; overwritten.
        lse: float32 [num_heads, T], natural logarithms; overwritten if update_lse.
        prefix_out: like out, other memory.
        prefix_lse: like lse.
        tables: codec.tables of the format.
        rotate_back: whether prefix_out is rotated and out is not.
        update_lse: whether lse becomes that of the merged attention.

    Raises:
        ValueError: for other shapes, dtypes or strides.
    """
    head_dim = tables.rotation.shape[0]
    check_heads("out", out, head_dim)
    check_heads("prefix_out", prefix_out, head_dim)
    check(
        out.shape == prefix_out.shape and out.dtype == prefix_out.dtype,
        f"prefix_out must be {out.dtype} {list(out.shape)}, got {prefix_out.dtype} {list(prefix_out.shape)}",
    )
    tokens, num_heads, _ = out.shape
    for name, x in (("lse", lse), ("prefix_lse", prefix_lse)):
        check(
            x.dtype == torch.float32 and x.shape == (num_heads, tokens),
            f"{name} must be float32 [{num_heads}, {tokens}], got {x.dtype} {list(x.shape)}",
        )
    num_rows = tokens * num_heads
    if not num_rows:
        return
    tile = row_tile(num_rows)
    _merge_kernel[(triton.cdiv(num_rows, tile["BLOCK_ROWS"]),)](
        out,
        out.stride(0),
        out.stride(1),
        lse,
        lse.stride(0),
        lse.stride(1),
        prefix_out,
        prefix_out.stride(0),
        prefix_out.stride(1),
        prefix_lse,
        prefix_lse.stride(0),
        prefix_lse.stride(1),
        tables.rotation,
        num_rows,
        ROTATE_BACK=rotate_back,
        UPDATE_LSE=update_lse,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        DIM_PAD=triton.next_power_of_2(head_dim),
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        num_stages=1,
        **tile,
    )
