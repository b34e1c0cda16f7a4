"""Decode attention on the codes in place: a split of the KV range a program, then one merge.

Scores are taken between rotated queries and unit-radius points, so a key costs a table lookup a
pair and one multiplication by its radius; the values' radii go into the probabilities. The output
is turned back once a query, in the kernel that merges the splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import triton
import triton.language as tl

from vllm_polarquant.format import PolarFormat
from vllm_polarquant.kernels import tuning
from vllm_polarquant.kernels.page import (
    check,
    check_cache,
    check_heads,
    check_int,
    dot,
    load_lut,
    load_radius,
    load_unit,
    page_constants,
    page_pointers,
)
from vllm_polarquant.kernels.rotate import BLOCK_COLUMNS, rotate, rotated_columns

MAX_QUERY_LEN = 16
MAX_SPLITS = 64
TARGET_PROGRAMS = 1024
"""Programs that a launch aims for: enough to fill a large GPU evenly with unequal requests."""

_MAX_BLOCK_M = 64
_MERGE_ROWS = 16
_LOG2_E = 1.4426950408889634


class DecoderTables(Protocol):
    """What decoding reads of codec.Tables: rotation float32 [d, d], the luts int32 [n]."""

    @property
    def rotation(self) -> torch.Tensor: ...
    @property
    def key_lut(self) -> torch.Tensor: ...
    @property
    def value_lut(self) -> torch.Tensor: ...


def num_splits(num_reqs: int, num_kv_heads: int) -> int:
    """Parts of each request's KV range: a power of two, decided by the launch's shape alone.

    It must not depend on sequence lengths, which a CUDA graph's replay cannot see.
    """
    wanted = TARGET_PROGRAMS // max(1, num_reqs * num_kv_heads)
    return max(1, min(MAX_SPLITS, 1 << max(0, wanted.bit_length() - 1)))


@dataclass(frozen=True)
class DecodeWorkspace:
    """Buffers of decode_attention, sized once for every batch it will see.

    query: the rotated queries, [max_tokens, num_heads, d] in the model's dtype.
    partial_out: float32, flat, each split's normalised output [tokens, num_heads, splits, d].
    partial_lse: float32, flat, its log2-sum-exp2 [tokens, num_heads, splits].
    """

    query: torch.Tensor
    partial_out: torch.Tensor
    partial_lse: torch.Tensor

    @classmethod
    def allocate(
        cls,
        max_tokens: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        max_reqs: int,
        max_query_len: int = MAX_QUERY_LEN,
    ) -> DecodeWorkspace:
        """Buffers for up to max_tokens queries of up to max_reqs requests of up to max_query_len.

        With one query a request, 32 heads, 8 KV heads and head_dim 128 they take 6 MB for 256
        requests and 25 MB for 1024.
        """
        rows = num_heads * max(
            min(reqs * max_query_len, max_tokens) * num_splits(reqs, num_kv_heads)
            for reqs in range(1, max_reqs + 1)
        )
        return cls(
            torch.empty(max_tokens, num_heads, head_dim, dtype=dtype, device=device),
            torch.empty(rows * head_dim, dtype=torch.float32, device=device),
            torch.empty(rows, dtype=torch.float32, device=device),
        )

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.query, self.partial_out, self.partial_lse))


@triton.jit
def _split_kernel(
    query,
    cache,
    block_stride,
    block_table,
    table_stride,
    seq_lens,
    query_start_loc,
    key_lut,
    value_lut,
    scale_log2,
    partial_out,
    partial_lse,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LUT_COPIES: tl.constexpr,
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
    DTYPE: tl.constexpr = query.dtype.element_ty
    request = tl.program_id(0) // ROW_BLOCKS
    kv_head = tl.program_id(1)
    split = tl.program_id(2)

    # A row is one query head of one of the request's queries.
    first_token = tl.load(query_start_loc + request)
    count = tl.load(query_start_loc + request + 1) - first_token
    row = tl.program_id(0) % ROW_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(0) % ROW_BLOCKS * BLOCK_M >= count * GROUP:
        return
    active = row < count * GROUP
    token = first_token + row // GROUP
    index = token.to(tl.int64) * NUM_HEADS + kv_head * GROUP + row % GROUP
    lse_pointer = partial_lse + index * SPLITS + split

    seq_len = tl.load(seq_lens + request)
    tiles = tl.cdiv(tl.cdiv(seq_len, BLOCK_N), SPLITS)
    start = split * tiles * BLOCK_N
    end = tl.minimum(start + tiles * BLOCK_N, seq_len)
    if start >= end:
        tl.store(lse_pointer, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=active)
        return

    pair = tl.arange(0, HALF_PAD)
    inside = active[:, None] & (pair < HALF)[None, :]
    source = query + index[:, None] * HEAD_DIM + pair[None, :]
    q1 = tl.load(source, mask=inside, other=0.0)
    q2 = tl.load(source + HALF, mask=inside, other=0.0)
    visible = seq_len - count + row // GROUP + 1

    table = block_table + request.to(tl.int64) * table_stride
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out1 = tl.zeros([BLOCK_M, HALF_PAD], tl.float32)
    out2 = tl.zeros([BLOCK_M, HALF_PAD], tl.float32)
    unit = 0.0
    key_points = load_lut(key_lut, KEY_CODE, LUT_COPIES)
    value_points = load_lut(value_lut, VALUE_CODE, LUT_COPIES)
    for base in tl.range(start, end, BLOCK_N):
        position = base + tl.arange(0, BLOCK_N)
        valid = position < end
        page = page_pointers(cache, table, position, valid, kv_head, block_stride, BLOCK_SIZE, PAGE_BYTES)
        slot = position % BLOCK_SIZE

        x, y = load_unit(
            page + slot * KEY_BYTES,
            valid,
            key_points,
            KEY_CODE,
            LUT_COPIES,
            HEAD_DIM,
            HALF_PAD,
            DTYPE,
        )
        score = dot(q1, tl.trans(x)) + dot(q2, tl.trans(y))
        score *= (load_radius(page, slot, valid, KEY_RADIUS_OFFSET) * scale_log2)[None, :]
        score = tl.where(position[None, :] < visible[:, None], score, float("-inf"))

        new_peak = tl.maximum(peak, tl.max(score, axis=1))
        # A row that has seen nothing yet would subtract infinities.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(score - shift[:, None])
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.sum(weight, axis=1)
        peak = new_peak

        radius = load_radius(page, slot, valid, VALUE_RADIUS_OFFSET)
        if tl.float16 == DTYPE:
            # Relative to the largest radius so far, the products stay inside float16's range.
            new_unit = tl.maximum(unit, tl.max(radius, axis=0))
            safe = tl.where(new_unit > 0, new_unit, 1.0)
            radius /= safe
            decay *= unit / safe
            unit = new_unit
        weight = (weight * radius[None, :]).to(DTYPE)
        x, y = load_unit(
            page + VALUE_OFFSET + slot * VALUE_BYTES,
            valid,
            value_points,
            VALUE_CODE,
            LUT_COPIES,
            HEAD_DIM,
            HALF_PAD,
            DTYPE,
        )
        out1 = out1 * decay[:, None] + dot(weight, x)
        out2 = out2 * decay[:, None] + dot(weight, y)

    seen = total > 0
    factor = tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0)
    if tl.float16 == DTYPE:
        factor *= unit
    target = partial_out + (index[:, None] * SPLITS + split) * HEAD_DIM + pair[None, :]
    tl.store(target, out1 * factor[:, None], mask=inside)
    tl.store(target + HALF, out2 * factor[:, None], mask=inside)
    lse = tl.where(seen, peak + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
    tl.store(lse_pointer, lse, mask=active)


@triton.jit
def _merge_kernel(
    partial_out,
    partial_lse,
    query_start_loc,
    num_reqs,
    rotation,
    out,
    out_stride_token,
    out_stride_head,
    NUM_HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    # tl.dot needs BLOCK_ROWS rows; a program may own fewer, so that small batches fill more SMs.
    lane = tl.arange(0, BLOCK_ROWS)
    row = tl.program_id(0) * ROWS + lane
    num_rows = tl.load(query_start_loc + num_reqs) * NUM_HEADS
    keep = (lane < ROWS) & (row < num_rows)
    index = row.to(tl.int64) * SPLITS
    dim = tl.arange(0, DIM_PAD)

    split = tl.arange(0, SPLITS)
    lse = tl.load(partial_lse + index[:, None] + split[None, :], mask=keep[:, None], other=float("-inf"))
    peak = tl.max(lse, axis=1)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2(lse - peak[:, None]), axis=1)
    share = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)

    merged = tl.zeros([BLOCK_ROWS, DIM_PAD], tl.float32)
    for i in tl.range(0, SPLITS, loop_unroll_factor=4 if SPLITS >= 4 else 1):
        weight = tl.exp2(tl.load(partial_lse + index + i, mask=keep, other=float("-inf")) - peak)
        # An empty split has written no output.
        part = tl.load(
            partial_out + ((index + i) * HEAD_DIM)[:, None] + dim[None, :],
            mask=(weight > 0)[:, None] & (dim < HEAD_DIM)[None, :],
            other=0.0,
        )
        merged += weight[:, None] * part
    merged *= share[:, None]

    target = out + (row // NUM_HEADS).to(tl.int64) * out_stride_token
    target += row % NUM_HEADS * out_stride_head
    for start in tl.range(0, HEAD_DIM, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        turned = rotated_columns(merged, rotation, column, True, HEAD_DIM)
        tl.store(
            target[:, None] + column[None, :],
            turned.to(out.dtype.element_ty),
            mask=keep[:, None] & (column < HEAD_DIM)[None, :],
        )


def decode_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    max_query_len: int,
    fmt: PolarFormat,
    tables: DecoderTables,
    scale: float,
    out: torch.Tensor,
    workspace: DecodeWorkspace,
) -> None:
    """Causal attention of each request's last queries over its pages, without unpacking them.

    Request r owns the rows query_start_loc[r]:query_start_loc[r + 1]; query i of its n sees
    positions up to seq_lens[r] - n + i. Rows past query_start_loc[R] are left alone. Allocates
    nothing and never waits for the device, so it can be captured in a CUDA graph and replayed with
    other lengths.

    Args:
        query: bfloat16 or float16 [T, num_heads, d], last dim dense, not rotated.
        cache: uint8 [B, num_kv_heads, N, slot_bytes] with dense blocks, own tokens included.
        block_table: int32 [R, max_blocks], last dim dense.
        seq_lens: int32 [R]; 0 for a padded row, whose queries, if any, get zeros.
        query_start_loc: int32 [R + 1].
        max_query_len: the most queries of any request, up to MAX_QUERY_LEN.
        fmt: the cache's format.
        tables: codec.tables(fmt, query.dtype, query.device).
        scale: softmax scale.
        out: like query, other memory.
        workspace: DecodeWorkspace.allocate for at least this batch.

    Raises:
        ValueError: for other shapes, dtypes or strides, or a workspace too small.
    """
    tokens, num_heads, head_dim = query.shape
    num_reqs = seq_lens.shape[0]
    num_kv_heads = cache.shape[1]
    check_heads("query", query, fmt.head_dim)
    check_heads("out", out, fmt.head_dim)
    check(
        out.shape == query.shape and out.dtype == query.dtype,
        f"out must be {query.dtype} {list(query.shape)}, got {out.dtype} {list(out.shape)}",
    )
    block_stride = check_cache(cache, fmt)
    check(
        num_heads % num_kv_heads == 0,
        f"{num_heads} query heads do not share {num_kv_heads} KV heads evenly",
    )
    check_int("seq_lens", seq_lens, (-1,), torch.int32)
    check_int("block_table", block_table, (num_reqs, -1), torch.int32)
    check_int("query_start_loc", query_start_loc, (num_reqs + 1,), torch.int32)
    check(
        1 <= max_query_len <= MAX_QUERY_LEN,
        f"max_query_len must be 1 to {MAX_QUERY_LEN}, got {max_query_len}",
    )
    if not tokens or not num_reqs:
        return
    splits = num_splits(num_reqs, num_kv_heads)
    rows = tokens * num_heads
    rotated = workspace.query[:tokens]
    check(
        rotated.shape == query.shape
        and rotated.dtype == query.dtype
        and workspace.partial_lse.numel() >= rows * splits
        and workspace.partial_out.numel() >= rows * splits * head_dim,
        f"the workspace is too small, or not of {query.dtype}, for {tokens} queries of {num_reqs} "
        f"requests, {num_heads} heads of {head_dim}",
    )

    rotate(query, rotated, tables)
    group = num_heads // num_kv_heads
    config = tuning.config("decode", fmt, query.device)
    block_m = max(16, min(_MAX_BLOCK_M, triton.next_power_of_2(max_query_len * group)))
    row_blocks = triton.cdiv(max_query_len * group, block_m)
    _split_kernel[(num_reqs * row_blocks, num_kv_heads, splits)](
        rotated,
        cache,
        block_stride,
        block_table,
        block_table.stride(0),
        seq_lens,
        query_start_loc,
        tables.key_lut,
        tables.value_lut,
        scale * _LOG2_E,
        workspace.partial_out,
        workspace.partial_lse,
        NUM_HEADS=num_heads,
        GROUP=group,
        SPLITS=splits,
        ROW_BLOCKS=row_blocks,
        BLOCK_M=block_m,
        BLOCK_N=config["block_n"],
        LUT_COPIES=config["lut_copies"],
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        **page_constants(fmt),
    )
    owned = min(_MERGE_ROWS, max(1, triton.next_power_of_2(rows) // 128))
    _merge_kernel[(triton.cdiv(rows, owned),)](
        workspace.partial_out,
        workspace.partial_lse,
        query_start_loc,
        num_reqs,
        tables.rotation,
        out,
        out.stride(0),
        out.stride(1),
        NUM_HEADS=num_heads,
        SPLITS=splits,
        ROWS=owned,
        BLOCK_ROWS=_MERGE_ROWS,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        HEAD_DIM=head_dim,
        DIM_PAD=triton.next_power_of_2(head_dim),
        num_warps=4,
        num_stages=1,
    )
