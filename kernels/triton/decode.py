"""Decode attention on the codes in place: one launch, an equal share of the batch's KV ranges a program.

A program works through its work items, splits of requests, which schedule.py deals out: attend.py reads,
merge.py joins and writes. The last split of a request to end merges them all. Where the rotation is a
Hadamard matrix, queries are rotated as they are read and outputs turned back as they are written; elsewhere
rotate.py does both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_polarquant.attention import Attention
from vllm_polarquant.codec import Tables
from vllm_polarquant.format import Slot
from vllm_polarquant.kernels.triton.attend import LOG2_E, read
from vllm_polarquant.kernels.triton.constants import (
    check,
    check_cache,
    check_centres,
    check_factors,
    check_heads,
    check_int,
    check_sinks,
    page_constants,
    table_entries,
)
from vllm_polarquant.kernels.triton.lanes import (
    bonus_bytes,
    exchange_bytes,
    fill_table,
    hold_loads,
    open_shared,
    recomputed,
    reserve_dynamic,
    words_bytes,
)
from vllm_polarquant.kernels.triton.launch import (
    DecodeLaunch,
    Gpu,
    RowTiles,
    registers_of_output,
    table_layout,
)
from vllm_polarquant.kernels.triton.merge import (
    merge,
    partial_row,
    sinks_of,
    store_rows,
    write,
)
from vllm_polarquant.kernels.triton.rotate import is_hadamard, rotate
from vllm_polarquant.kernels.triton.schedule import ITEM_WORDS, MAX_SPLITS, Schedule, first_seen_token
from vllm_polarquant.page import Page

MAX_QUERY_LEN = 64
"""Query tokens of a request at most. Each 32 rows, queries times heads of a KV head, read all its pages."""


def make_schedule(
    slot: Slot,
    num_heads: int,
    num_kv_heads: int,
    max_reqs: int,
    device: torch.device | str,
    max_query_len: int = MAX_QUERY_LEN,
    gpu: Gpu | None = None,
) -> Schedule:
    """A schedule for decode_attention of up to max_reqs requests of up to max_query_len, still to be planned.

    It has as many programs as run at once on `gpu`, by default the device's.
    """
    device = torch.device(device)
    gpu = gpu or Gpu.of(device)
    rows = RowTiles.of(slot, gpu, num_heads, num_kv_heads, max_query_len)
    launch = DecodeLaunch.of(slot, rows.sets, gpu)
    programs = gpu.num_sms * launch.programs_per_sm // (num_kv_heads * rows.blocks)
    return Schedule.allocate(max_reqs, max(1, programs), 16 * launch.warps, device)


@dataclass(frozen=True)
class DecodeWorkspace:
    """Buffers of decode_attention, sized once for every batch it will see.

    query: queries rotated beforehand, [max_tokens, num_heads, d] in the model's dtype; without rows where
        the kernel rotates them itself.
    partial_out: float32 [rows, d], the normalised outputs of splits of requests: of each program, that
        which it goes on with and the one that it begins.
    partial_lse: float32 [rows], their log2-sum-exp2.
    arrived: int32, how many splits of a request's rows are done; 0 between launches.
    """

    query: torch.Tensor
    partial_out: torch.Tensor
    partial_lse: torch.Tensor
    arrived: torch.Tensor

    @classmethod
    def allocate(
        cls,
        slot: Slot,
        max_tokens: int,
        num_heads: int,
        num_kv_heads: int,
        dtype: torch.dtype,
        device: torch.device | str,
        max_reqs: int,
        max_query_len: int = MAX_QUERY_LEN,
        gpu: Gpu | None = None,
    ) -> DecodeWorkspace:
        """Buffers for up to max_tokens queries of up to max_reqs requests of up to max_query_len.

        With one query a request, 32 heads, 8 KV heads and head_dim 128 they take 2 MB on `gpu`, by default
        the device's.
        """
        gpu = gpu or Gpu.of(torch.device(device))
        rows = RowTiles.of(slot, gpu, num_heads, num_kv_heads, max_query_len)
        columns = num_kv_heads * rows.blocks
        launch = DecodeLaunch.of(slot, rows.sets, gpu)
        programs = max(1, launch.programs_per_sm * gpu.num_sms // columns)
        partial_rows = 2 * programs * columns * 4 * rows.sets
        return cls(
            torch.empty(
                0 if is_hadamard(slot.head_dim) else max_tokens,
                num_heads,
                slot.head_dim,
                dtype=dtype,
                device=device,
            ),
            torch.empty(partial_rows, slot.head_dim, dtype=torch.float32, device=device),
            torch.empty(partial_rows, dtype=torch.float32, device=device),
            torch.zeros(max_reqs * columns, dtype=torch.int32, device=device),
        )

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.query, self.partial_out, self.partial_lse, self.arrived))


@triton.jit
def _fill_tables(
    thread, key_lut, value_lut, PAGE: tl.constexpr, COPIES: tl.constexpr, SETS: tl.constexpr
):  # fmt: skip
    KEYS: tl.constexpr = PAGE.keys
    VALUES: tl.constexpr = PAGE.values
    PLACES: tl.constexpr = table_layout(KEYS.code, VALUES.code, COPIES, SETS, PAGE.head_dim)
    fill_table(thread, key_lut, PLACES[0], table_entries(KEYS.code), COPIES)
    if VALUES.code != KEYS.code:
        fill_table(thread, value_lut, PLACES[1], table_entries(VALUES.code), COPIES)


@triton.jit
def _load_item(record, count_items, query_start_loc, seq_lens):
    """A work item's five words (schedule.ITEM_WORDS), its request's first query, their number, its tokens.

    Where there is no item, of some request.
    """
    request = tl.load(record)
    begin = tl.load(record + 1)
    finish = tl.load(record + 2)
    first_program = tl.load(record + 3)
    splits = tl.load(record + 4)
    request = tl.where(count_items > 0, request, 0)
    first_token = tl.load(query_start_loc + request)
    count = tl.load(query_start_loc + request + 1) - first_token
    return request, begin, finish, first_program, splits, first_token, count, tl.load(seq_lens + request)


# What differs from batch to batch must not compile another kernel in the middle of serving.
@triton.jit(
    do_not_specialize=["table_stride", "lse_stride_head", "num_segments", "window"],
    do_not_specialize_on_alignment=["block_table", "seq_lens", "query_start_loc", "sinks", "lse"],
)
def _decode_kernel(
    query,
    query_stride_token,
    query_stride_head,
    cache,
    block_stride,
    block_table,
    table_stride,
    seq_lens,
    query_start_loc,
    window,
    sinks,
    query_factors,
    query_factors_stride,
    output_factors,
    key_lut,
    value_lut,
    centres,
    num_segments,
    scale_log2,
    out,
    out_stride_token,
    out_stride_head,
    lse,
    lse_stride_head,
    lse_stride_token,
    partial_out,
    partial_lse,
    arrived,
    begin_words,
    items,
    GROUP: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    ITEM_WORDS: tl.constexpr,
    SETS: tl.constexpr,
    SHARED_TILES: tl.constexpr,
    JOINED: tl.constexpr,
    HOLD: tl.constexpr,
    WARPS: tl.constexpr,
    COPIES: tl.constexpr,
    ROTATE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    CENTRES_PER_SEGMENT: tl.constexpr,
    PAGE: tl.constexpr,
):
    KEYS: tl.constexpr = PAGE.keys
    VALUES: tl.constexpr = PAGE.values
    ROWS: tl.constexpr = 4 * SETS
    PLACES: tl.constexpr = table_layout(KEYS.code, VALUES.code, COPIES, SETS, PAGE.head_dim)
    STATIC_BYTES: tl.constexpr = PLACES[2]
    DYNAMIC_BYTES: tl.constexpr = PLACES[3]
    EXCHANGE: tl.constexpr = exchange_bytes(registers_of_output(PAGE.head_dim, WARPS), WARPS)
    kv_head = tl.program_id(0)
    row_block = tl.program_id(1)
    program = tl.program_id(2)
    thread = tl.arange(0, WARPS * 32)
    SHARED: tl.constexpr = EXCHANGE if DYNAMIC_BYTES == 0 and EXCHANGE > STATIC_BYTES else STATIC_BYTES
    QUERIES: tl.constexpr = words_bytes(SHARED_TILES, PAGE.head_dim // 8)
    BONUSES: tl.constexpr = bonus_bytes(WARPS, SETS) if CENTRES_PER_SEGMENT > 0 else 0
    open_shared(thread, SHARED + QUERIES + BONUSES)
    record = begin_words + program * ITEM_WORDS
    following = items + (tl.load(record + ITEM_WORDS - 2) + 1) * ITEM_WORDS
    count_items = tl.load(record + ITEM_WORDS - 1)
    reserve_dynamic(thread, DYNAMIC_BYTES, count_items < 0, arrived)

    column = row_block * tl.num_programs(0) + kv_head
    columns = tl.num_programs(1) * tl.num_programs(0)
    first_row = row_block * ROWS
    own_factors = query_factors + kv_head * query_factors_stride
    # What an item is comes while tables are filled.
    item = _load_item(record, count_items, query_start_loc, seq_lens)
    hold_loads(thread)
    _fill_tables(thread, key_lut, value_lut, PAGE, COPIES, SETS)
    for remaining in tl.range(count_items, 0, -1):
        request, begin, finish, first_program, splits, first_token, count, seq_len = item
        # A row is one query head of one of the request's queries.
        rows = count * GROUP
        # Warps take turns at chunks of 16 tokens, which no page cuts.
        start = begin * WARPS
        end = finish * WARPS
        if window is not None:
            first_chunk = first_seen_token(seq_len, count, window) // 16
            start += first_chunk
            end += first_chunk
        end = tl.minimum(end, tl.cdiv(seq_len, 16))
        own_split = partial_row(program, (begin == 0).to(tl.int32), column, columns, ROWS)
        if first_row < rows:
            if start < end:
                state = read(
                    recomputed(thread), query, query_stride_token, query_stride_head, own_factors, cache,
                    block_stride, block_table + request.to(tl.int64) * table_stride, seq_len, window,
                    first_token, count, first_row, start, end, kv_head, key_lut, value_lut, centres,
                    num_segments, scale_log2, GROUP, SETS, SHARED_TILES, JOINED, HOLD, COPIES, ROTATE,
                    SOFT_CAP, CENTRES_PER_SEGMENT, SHARED, PAGE,
                )  # fmt: skip
                write(
                    recomputed(thread), state, sinks, output_factors, out, out_stride_token, out_stride_head,
                    lse, lse_stride_head, lse_stride_token, partial_out, partial_lse, first_token, rows,
                    first_row, kv_head, own_split, splits == 1, GROUP, SETS, COPIES, ROTATE, PAGE,
                )  # fmt: skip
            elif splits == 1:
                nothing = tl.zeros([ROWS, 2 * PAGE.half_pad], tl.float32)
                unseen = tl.full([ROWS], float("-inf"), tl.float32)
                if sinks is not None:
                    unseen = sinks_of(sinks, first_row + tl.arange(0, ROWS), kv_head, GROUP)
                store_rows(
                    nothing, unseen, out, out_stride_token, out_stride_head, lse, lse_stride_head,
                    lse_stride_token, first_token, rows, first_row, kv_head, GROUP, PAGE.head_dim,
                )  # fmt: skip
            else:
                # Fewer tokens than when the schedule was made.
                unseen = tl.full([ROWS], float("-inf"), tl.float32)
                tl.store(partial_lse + own_split + tl.arange(0, ROWS), unseen)
            if splits > 1:
                # Whoever comes last finds all splits written. The counter is left as it was found.
                tl.debug_barrier()
                counter = arrived + request * columns + column
                if tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1:
                    tl.store(counter, 0)
                    merged, merged_lse = merge(
                        partial_out, partial_lse, sinks, first_program, splits, column, columns, first_row,
                        kv_head, MAX_SPLITS, ROWS, GROUP, PAGE,
                    )  # fmt: skip
                    store_rows(
                        merged, merged_lse, out, out_stride_token, out_stride_head, lse, lse_stride_head,
                        lse_stride_token, first_token, rows, first_row, kv_head, GROUP, PAGE.head_dim,
                    )  # fmt: skip
        if remaining > 1:
            # What was exchanged lies where the tables go.
            tl.debug_barrier()
            item = _load_item(following, remaining, query_start_loc, seq_lens)
            hold_loads(thread)
            _fill_tables(recomputed(thread), key_lut, value_lut, PAGE, COPIES, SETS)
        following += ITEM_WORDS


def decode_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    max_query_len: int,
    page: Page,
    attention: Attention,
    tables: Tables,
    out: torch.Tensor,
    workspace: DecodeWorkspace,
    schedule: Schedule,
    lse: torch.Tensor | None = None,
    gpu: Gpu | None = None,
) -> None:
    """Causal attention of each request's last queries over its pages, without unpacking them.

    Request r owns the rows query_start_loc[r]:query_start_loc[r + 1]; query i of its n sees
    positions up to seq_lens[r] - n + i. Rows past query_start_loc[R] are left alone. Allocates
    nothing and never waits for the device, so it can be captured in a CUDA graph and replayed with
    other lengths.

    Args:
        query: bfloat16 or float16 [T, num_heads, d], last dim dense, not rotated.
        cache: uint8 [B, num_kv_heads, N, slot.nbytes] with dense blocks, own tokens included.
        block_table: int32 [R, max_blocks], last dim dense.
        seq_lens: int32 [R]; 0 for a padded row, whose queries, if any, get zeros.
        query_start_loc: int32 [R + 1].
        max_query_len: the most queries of any request, up to MAX_QUERY_LEN.
        page: of the cache.
        attention: scale, window, soft cap and sinks. Pages of the blocks before a window are not read.
        tables: codec.tables(page.slot, query.dtype, query.device), or a layer's own.
        out: like query, other memory.
        workspace: DecodeWorkspace.allocate for at least this batch.
        schedule: of make_schedule with this max_query_len, and planned for this window and this batch's
            seq_lens and query_start_loc; a captured graph's, with those of each replay.
        lse: float32 [num_heads, T], written: log-sum-exps of the logits, natural, sinks included, -inf where
            there is nothing; or None.
        gpu: that the schedule was made for, by default the query's.

    Raises:
        ValueError: for other shapes, dtypes or strides, or a workspace or schedule that does not fit.
    """
    tokens, num_heads, head_dim = query.shape
    num_reqs = seq_lens.shape[0]
    num_kv_heads = cache.shape[1]
    check_heads("query", query, page.slot.head_dim)
    check_heads("out", out, page.slot.head_dim)
    check(
        query.data_ptr() % 4 == 0 and query.stride(0) % 2 == 0 and query.stride(1) % 2 == 0,
        f"rows of query must start at multiples of 4 bytes, got strides {list(query.stride())}",
    )
    check(
        out.shape == query.shape and out.dtype == query.dtype,
        f"out must be {query.dtype} {list(query.shape)}, got {out.dtype} {list(out.shape)}",
    )
    block_stride = check_cache(cache, page)
    check(
        num_heads % num_kv_heads == 0,
        f"{num_heads} query heads do not share {num_kv_heads} KV heads evenly",
    )
    check_int("seq_lens", seq_lens, (-1,), torch.int32)
    check_int("block_table", block_table, (num_reqs, -1), torch.int32)
    check_int("query_start_loc", query_start_loc, (num_reqs + 1,), torch.int32)
    check_sinks(attention.sinks, num_heads)
    check(
        lse is None or (lse.dtype == torch.float32 and lse.shape == (num_heads, tokens)),
        f"lse must be float32 [{num_heads}, {tokens}]",
    )
    factors_stride = check_factors("query_factors", tables.query_factors, num_kv_heads, head_dim)
    check(
        1 <= max_query_len <= MAX_QUERY_LEN,
        f"max_query_len must be 1 to {MAX_QUERY_LEN}, got {max_query_len}",
    )
    if not tokens or not num_reqs:
        return
    gpu = gpu or Gpu.of(query.device)
    rows = RowTiles.of(page.slot, gpu, num_heads, num_kv_heads, max_query_len)
    columns = num_kv_heads * rows.blocks
    partial_rows = 2 * schedule.programs * columns * 4 * rows.sets
    # A Hadamard matrix is applied where the queries are read and the outputs written.
    separate = page.slot.key.rotated and not is_hadamard(head_dim)
    check(
        workspace.query.dtype == query.dtype
        and (not separate or workspace.query[:tokens].shape == query.shape)
        and workspace.arrived.numel() >= num_reqs * columns
        and workspace.partial_lse.numel() >= partial_rows
        and workspace.partial_out.numel() >= partial_rows * head_dim,
        f"the workspace is too small, or not of {query.dtype}, for {tokens} queries of {num_reqs} "
        f"requests, {num_heads} heads of {head_dim}",
    )
    launch = DecodeLaunch.of(page.slot, rows.sets, gpu)
    tile = 16 * launch.warps
    check(
        schedule.tile == tile and schedule.max_reqs >= num_reqs,
        f"the schedule is for up to {schedule.max_reqs} requests in tiles of {schedule.tile} tokens, not for "
        f"{num_reqs} in tiles of {tile}",
    )
    if separate:
        rotate(query, workspace.query[:tokens], tables.mixing, tables.query_factors)
        query = workspace.query[:tokens]
    _decode_kernel[(num_kv_heads, rows.blocks, schedule.programs)](
        query,
        query.stride(0),
        query.stride(1),
        cache,
        block_stride,
        block_table,
        block_table.stride(0),
        seq_lens,
        query_start_loc,
        attention.window,
        attention.sinks,
        tables.query_factors,
        factors_stride,
        tables.output_factors,
        tables.key_lut,
        tables.value_lut,
        tables.centres,
        len(tables.centres),
        attention.scale * LOG2_E.value,
        out,
        out.stride(0),
        out.stride(1),
        lse,
        0 if lse is None else lse.stride(0),
        0 if lse is None else lse.stride(1),
        workspace.partial_out,
        workspace.partial_lse,
        workspace.arrived,
        schedule.begin,
        schedule.items,
        GROUP=num_heads // num_kv_heads,
        MAX_SPLITS=MAX_SPLITS,
        ITEM_WORDS=ITEM_WORDS,
        SETS=rows.sets,
        SHARED_TILES=launch.shared_tiles,
        JOINED=launch.joined,
        HOLD=launch.hold,
        WARPS=launch.warps,
        COPIES=gpu.table_copies,
        ROTATE=page.slot.key.rotated and not separate,
        SOFT_CAP=attention.soft_cap,
        CENTRES_PER_SEGMENT=check_centres(tables.centres, page, num_kv_heads),
        PAGE=page_constants(page),
        num_warps=launch.warps,
        maxnreg=launch.registers,
    )
    if separate:
        rotate(out, out, tables.mixing, tables.output_factors, inverse=True, query_start_loc=query_start_loc)
