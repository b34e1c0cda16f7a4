"""Decode attention on the codes in place: one launch, an equal share of the batch's KV ranges a program.

Written lane by lane (lanes.py). Scores are products of unit-radius points, the left operand, with rotated
queries, so a key costs a table lookup a pair and one multiplication by its radius; the values' radii go into
the weights, which one transpose of a small matrix brings to the lanes that add values up.
A program works through its items, parts of requests, of which schedule.py says which they are. The last
part of a request to end merges them all. Where the rotation is a Hadamard matrix, queries are
rotated as they are read and outputs turned back as they are written; elsewhere rotate.py does both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
import triton
import triton.language as tl

from vllm_polarquant.format import PolarFormat
from vllm_polarquant.kernels import tuning
from vllm_polarquant.kernels.lane_page import link, load_share, radii, unit
from vllm_polarquant.kernels.lanes import (
    DYNAMIC,
    exchange_bytes,
    fill_table,
    follow_maximum,
    for_maximum,
    hadamard,
    load_words,
    mma,
    of_all_warps,
    open_shared,
    pack_halves,
    place_half,
    recomputed,
    reserve_dynamic,
    shuffle_int,
    sum_over_groups,
    sum_over_warps,
    transpose_halves,
    unpack_halves,
)
from vllm_polarquant.kernels.page import (
    KEY_PARTS,
    RADIUS_STRIDE,
    RAW,
    VALUE_PARTS,
    check,
    check_cache,
    check_heads,
    check_int,
    page_constants,
    table_entries,
    vector_code,
)
from vllm_polarquant.kernels.rotate import rotate
from vllm_polarquant.kernels.schedule import ITEM_WORDS, MAX_PARTS, Schedule

MAX_QUERY_LEN = 16

_STATIC_TABLES = 40 << 10
"""Bytes of tables that lie in static shared memory; of more, the keys' table goes to dynamic memory."""

_ALL_COPIES = 160 << 10
"""Shared memory of a multiprocessor from which on each lane has its own copy of a table; else two lanes
share."""

_REGISTERS = 65536
"""Registers of a multiprocessor, of every GPU that Triton compiles for."""

_MAX_TOGETHER = 4
"""Programs at most that run on a multiprocessor at once; the workspace has room for them."""

_MARGIN = tl.constexpr(8.0)
"""Powers of two by which a logit may be above its row's maximum without rescaling what the row has summed."""

_LOG2_E = 1.4426950408889634


class DecoderTables(Protocol):
    """What decoding reads of codec.Tables: rotation float32 [d, d], the luts int32 [n]."""

    @property
    def rotation(self) -> torch.Tensor: ...
    @property
    def key_lut(self) -> torch.Tensor: ...
    @property
    def value_lut(self) -> torch.Tensor: ...


@triton.constexpr_function
def table_places(key_code, value_code, copies):
    """Where tables lie in shared memory: first bytes of the keys' and the values', static and dynamic size.

    Static memory is for no more than 48 KB, some of which Triton's own operations take as dynamic memory. Its
    launcher asks the driver for more only where the dynamic part alone is more than that.
    """
    keys, values = (table_entries(code) * copies * 4 for code in (key_code, value_code))
    if value_code == key_code:
        values = 0
    first = 0 if value_code == key_code else keys
    if keys + values <= _STATIC_TABLES:
        return 0, first, keys + values, 0
    if keys + values <= 64 << 10:
        return DYNAMIC.value, DYNAMIC.value + first, 0, 64 << 10
    return DYNAMIC.value, 0, values, max(keys, 64 << 10)


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of a multiprocessor; those of an H100 or H200 where the device is no GPU."""
    if device.type != "cuda":
        return 228 << 10
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


def table_copies(device: torch.device) -> int:
    """How often a table lies in shared memory: 32 times, once a lane, where there is room, or 16 times."""
    return 32 if _shared_memory(device) >= _ALL_COPIES else 16


def processors(device: torch.device | str) -> int:
    """Multiprocessors of a device; those of an H100 or H200 where it is no GPU."""
    device = torch.device(device)
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def fused(head_dim: int) -> bool:
    """Whether the kernel rotates queries and turns outputs back: where the rotation is a Hadamard matrix."""
    return head_dim & (head_dim - 1) == 0


@dataclass(frozen=True)
class _Rows:
    """How the rows of a request, its queries' heads that share a KV head, are dealt to programs.

    sets: of four rows, that a program takes. blocks: programs for all rows.
    """

    sets: int
    blocks: int

    @classmethod
    def of(cls, num_heads: int, num_kv_heads: int, max_query_len: int) -> _Rows:
        rows = max_query_len * (num_heads // num_kv_heads)
        sets = 1 if rows <= 4 else 2
        return cls(sets, triton.cdiv(rows, 4 * sets))


@dataclass(frozen=True)
class _Launch:
    """warps of a program, registers that a thread may have, programs that run on a multiprocessor at once."""

    warps: int
    registers: int
    together: int

    @classmethod
    @cache
    def of(cls, fmt: PolarFormat, rows: _Rows, device: torch.device) -> _Launch:
        config = tuning.config("decode" if rows.sets == 1 else "decode_wide", fmt, device)
        warps, registers = config["num_warps"], config["maxnreg"]
        copies = table_copies(device)
        _, _, static, dynamic = table_places(vector_code(fmt.key), vector_code(fmt.value), copies)
        # CUDA keeps 1 KB of shared memory a program, and exchanges take as much.
        fit = min(_REGISTERS // (32 * warps * registers), _shared_memory(device) // (static + dynamic + 2048))
        return cls(warps, registers, min(max(1, fit), _MAX_TOGETHER))


def make_schedule(
    fmt: PolarFormat,
    num_heads: int,
    num_kv_heads: int,
    max_reqs: int,
    device: torch.device | str,
    max_query_len: int = MAX_QUERY_LEN,
) -> Schedule:
    """A schedule for decode_attention of up to max_reqs requests of up to max_query_len, still to be planned.

    It has as many programs as run at once.
    """
    device = torch.device(device)
    rows = _Rows.of(num_heads, num_kv_heads, max_query_len)
    launch = _Launch.of(fmt, rows, device)
    programs = processors(device) * launch.together // (num_kv_heads * rows.blocks)
    return Schedule.allocate(max_reqs, max(1, programs), 16 * launch.warps, device)


@dataclass(frozen=True)
class DecodeWorkspace:
    """Buffers of decode_attention, sized once for every batch it will see.

    query: queries rotated beforehand, [max_tokens, num_heads, d] in the model's dtype; without rows where
        the kernel rotates them itself.
    partial_out: float32 [rows, d], the normalised outputs of parts of requests: of each program, the part
        that it goes on with and the one that it begins.
    partial_lse: float32 [rows], their log2-sum-exp2.
    arrived: int32, how many parts of a request's rows are done; 0 between launches.
    """

    query: torch.Tensor
    partial_out: torch.Tensor
    partial_lse: torch.Tensor
    arrived: torch.Tensor

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

        With one query a request, 32 heads, 8 KV heads and head_dim 128 they take 2 MB.
        """
        rows = _Rows.of(num_heads, num_kv_heads, max_query_len)
        columns = num_kv_heads * rows.blocks
        parts = 2 * max(1, _MAX_TOGETHER * processors(device) // columns) * columns * 4 * rows.sets
        return cls(
            torch.empty(
                0 if fused(head_dim) else max_tokens, num_heads, head_dim, dtype=dtype, device=device
            ),
            torch.empty(parts, head_dim, dtype=torch.float32, device=device),
            torch.empty(parts, dtype=torch.float32, device=device),
            torch.zeros(max_reqs * columns, dtype=torch.int32, device=device),
        )

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.query, self.partial_out, self.partial_lse, self.arrived))


@triton.jit
def _fetch(
    page,
    slot,
    group,
    place,
    HEAD_DIM: tl.constexpr,
    KEY_CODE: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    KEY_RADIUS_OFFSET: tl.constexpr,
    VALUE_CODE: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    VALUE_OFFSET: tl.constexpr,
):
    """A lane's shares of the 16 tokens from `slot` of a page on, then radii of tokens g and g + 8."""
    both_radii = page + KEY_RADIUS_OFFSET + (slot + group) * RADIUS_STRIDE
    return (
        load_share(page, slot, group, place, HEAD_DIM // 8, KEY_CODE, KEY_BYTES, KEY_PARTS),
        load_share(
            page + VALUE_OFFSET, slot, group, place, HEAD_DIM // 16, VALUE_CODE, VALUE_BYTES, VALUE_PARTS
        ),
        load_words(both_radii, 1, 4) + load_words(both_radii + 8 * RADIUS_STRIDE, 1, 4),
    )


@triton.jit
def _attend(
    fetched,
    query,
    state,
    limits,
    token,
    scale_log2,
    key_lut,
    value_lut,
    lane,
    SETS: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KEY_CODE: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    KEY_FIRST: tl.constexpr,
    VALUE_CODE: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    VALUE_FIRST: tl.constexpr,
    COPIES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Let a warp's queries see 16 more tokens.

    query: the right operands of `mma`, two words a step; column 2t is query t, column 2t + 1 that of the
    second set of four, if there is one.
    state: for each set the largest logit so far of query t, the sum of its weights that this lane has seen,
    and its outputs, four registers for each two pairs (x and y of pair 2i, then of 2i + 1).
    limits: for each set the tokens that query t may see, then those that are stored.
    token: the first of the 16, counted from the request's first one.
    """
    KEY_PAIRS: tl.constexpr = HEAD_DIM // 8
    TILES: tl.constexpr = (HEAD_DIM // 2 + 15) // 16
    peaks, totals, outs = state
    keys, values, stored = fetched
    radius = radii(stored)
    key_token = token + lane // 4
    zero = tl.zeros(lane.shape, tl.float32)
    # Two sums: a product waits for the one before it.
    even = (zero, zero, zero, zero)
    odd = even
    before = link(keys, 2, KEY_PAIRS, KEY_CODE, KEY_BYTES, lane % 4 == 0, 1)
    for step in tl.static_range(HEAD_DIM // 16):
        left = ()
        for i in tl.static_range(4):
            left = left + (
                unit(
                    keys, before, i % 2, 2 * step + i // 2, KEY_PAIRS, KEY_CODE, KEY_BYTES,
                    key_lut, KEY_FIRST, COPIES, lane, DTYPE,
                ),
            )  # fmt: skip
        if step % 2 == 0:
            even = mma(even, left, query[2 * step : 2 * step + 2], DTYPE)
        else:
            odd = mma(odd, left, query[2 * step : 2 * step + 2], DTYPE)

    new_peaks = ()
    new_totals = ()
    new_outs = ()
    weights = ()
    for k in tl.static_range(SETS):
        scores = ()
        for half in tl.static_range(2):
            score = (even[2 * half + k] + odd[2 * half + k]) * (radius[2 * half] * scale_log2)
            if MASKED:
                score = tl.where(key_token + 8 * half < limits[k], score, float("-inf"))
            scores = scores + (score,)
        if tl.float16 == DTYPE:
            # Weights times radii, which float16 must hold, are kept under 1, not the weights. Unwritten slots
            # may hold any radius, so their heights are -inf or NaN.
            heights = ()
            for half in tl.static_range(2):
                height = scores[half] + tl.maximum(tl.log2(radius[2 * half + 1]), -60.0)
                heights = heights + (for_maximum(height),)
        else:
            heights = scores
        top = tl.maximum(heights[0], heights[1])
        scaled, total, peak = follow_maximum(
            outs[k * TILES : (k + 1) * TILES], totals[k], peaks[k], top, _MARGIN
        )
        shift = peak
        if MASKED:
            # A row that has seen nothing yet would subtract infinities.
            shift = tl.where(peak == float("-inf"), 0.0, peak)
        for half in tl.static_range(2):
            weight = tl.exp2(scores[half] - shift)
            total += weight
            value_radius = radius[2 * half + 1]
            if MASKED:
                value_radius = tl.where(key_token + 8 * half < limits[SETS], value_radius, 0.0)
            scaled_weight = weight * value_radius
            # From a token's lanes to a query's. Even columns weigh the xs of pairs, odd ones the ys.
            both = transpose_halves(pack_halves(scaled_weight, scaled_weight, DTYPE))
            weights = weights + (
                place_half(both, 0, (lane & 4) != 0),
                place_half(both, 1, (lane & 4) != 0),
            )
        new_peaks = new_peaks + (peak,)
        new_totals = new_totals + (total,)
        new_outs = new_outs + scaled

    PAIRS: tl.constexpr = HEAD_DIM // 16
    before = link(values, 4, PAIRS, VALUE_CODE, VALUE_BYTES, lane < 4, 4)
    for half in tl.static_range(2):
        outs = new_outs
        new_outs = ()
        a = ()
        for i in tl.static_range(4 * TILES):
            point = unit(
                values, before, 2 * half + i % 2, i // 2, PAIRS, VALUE_CODE, VALUE_BYTES,
                value_lut, VALUE_FIRST, COPIES, lane, DTYPE,
            )  # fmt: skip
            if MASKED and VALUE_CODE == RAW:
                # Unwritten raw slots may hold NaN, and 0 * NaN is not 0.
                own_token = token + 2 * (lane % 4) + (8 * half + i % 2)
                point = tl.where(own_token < limits[SETS], point, 0)
            a = a + (point,)
        for k in tl.static_range(SETS):
            b = (weights[4 * k + 2 * half], weights[4 * k + 2 * half + 1])
            for i in tl.static_range(TILES):
                # Rows g and g + 8 are two pairs, columns the coordinates of two tokens.
                left = (a[4 * i], a[4 * i + 2], a[4 * i + 1], a[4 * i + 3])
                new_outs = new_outs + (mma(outs[k * TILES + i], left, b, DTYPE),)
    return (new_peaks, new_totals, new_outs)


@triton.jit
def _rotation_signs(rotation, first, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The factors of dims first .. + COUNT - 1 and of those HEAD_DIM / 2 further on, as a tuple.

    A Hadamard rotation is H diag(f), and the first row of H is all ones.
    """
    words = load_words(rotation + first, COUNT, 16) + load_words(
        rotation + (first + HEAD_DIM // 2), COUNT, 16
    )
    signs = ()
    for i in tl.static_range(2 * COUNT):
        signs = signs + (words[i].to(tl.float32, bitcast=True),)
    return signs


@triton.jit
def _load_queries(
    query, rotation, active, place, lane, ROTATE: tl.constexpr, HEAD_DIM: tl.constexpr, DTYPE: tl.constexpr
):
    """Words (x, y) of each thread's quarter of its query's pairs, rotated, in the order of keys' pairs.

    query: each thread's row of d elements.
    """
    PAIRS: tl.constexpr = HEAD_DIM // 8
    halves = query.to(tl.pointer_type(tl.uint32)) + place * (PAIRS // 2)
    xs = ()
    ys = ()
    for i in tl.static_range(PAIRS // 2):
        xs = xs + (tl.load(halves + i, mask=active, other=0),)
        ys = ys + (tl.load(halves + HEAD_DIM // 4 + i, mask=active, other=0),)
    words = ()
    if ROTATE:
        factors = _rotation_signs(rotation, place * PAIRS, PAIRS, HEAD_DIM)
        values = ()
        for word in tl.static_range(PAIRS):
            low, high = unpack_halves((xs + ys)[word], DTYPE)
            values = values + (low * factors[2 * word], high * factors[2 * word + 1])
        values = hadamard(values, lane, 1, 2)
        for i in tl.static_range(PAIRS):
            words = words + (pack_halves(values[i], values[PAIRS + i], DTYPE),)
    else:
        for i in tl.static_range(PAIRS // 2):
            x, y = xs[i], ys[i]
            words = words + ((x & 0xFFFF) | (y << 16), (x >> 16) | (y & 0xFFFF0000))
    return words


@triton.jit
def _row_index(first_token, row, kv_head, NUM_HEADS: tl.constexpr, GROUP: tl.constexpr):
    """Where the request's row, a query head of one of its queries, stands among [tokens, num_heads]."""
    token = (first_token + row // GROUP).to(tl.int64)
    return token, kv_head * GROUP + row % GROUP


@triton.jit
def _blocks(table, chunk, turn, lane, last, WARPS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Each lane's block number: where its warp, now at `chunk`, will be `turn` + lane turns from now."""
    there = tl.minimum(chunk + (turn + lane) * WARPS, last) * 16
    return tl.load(table + there // BLOCK_SIZE)


@triton.jit
def _fill_tables(
    thread,
    key_lut,
    value_lut,
    KEY_CODE: tl.constexpr,
    VALUE_CODE: tl.constexpr,
    COPIES: tl.constexpr,
):
    PLACES: tl.constexpr = table_places(KEY_CODE, VALUE_CODE, COPIES)
    fill_table(thread, key_lut, PLACES[0], table_entries(KEY_CODE), COPIES)
    if VALUE_CODE != KEY_CODE:
        fill_table(thread, value_lut, PLACES[1], table_entries(VALUE_CODE), COPIES)


@triton.jit
def _read(
    thread,
    query,
    query_stride_token,
    query_stride_head,
    cache,
    block_stride,
    table,
    seq_len,
    first_token,
    count,
    first_row,
    start,
    end,
    kv_head,
    rotation,
    key_lut,
    value_lut,
    scale_log2,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SETS: tl.constexpr,
    COPIES: tl.constexpr,
    ROTATE: tl.constexpr,
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
):
    """What each warp's queries have seen of the chunks start .. end - 1 of a request: the state of `_attend`.

    table: the request's row of the block table. first_token, count: its queries. first_row: the first of
    the rows that this program takes.
    """
    DTYPE: tl.constexpr = query.dtype.element_ty
    WARPS: tl.constexpr = thread.shape[0] // 32
    TILES: tl.constexpr = (HEAD_DIM // 2 + 15) // 16
    PLACES: tl.constexpr = table_places(KEY_CODE, VALUE_CODE, COPIES)
    KEY_FIRST: tl.constexpr = PLACES[0]
    VALUE_FIRST: tl.constexpr = PLACES[1]
    lane = thread % 32
    group = lane // 4
    place = lane % 4
    zero = tl.zeros([WARPS * 32], tl.float32)
    head_offset = kv_head.to(tl.int64) * PAGE_BYTES
    peaks = ()
    totals = ()
    outs = ()
    for _ in tl.static_range(SETS):
        peaks = peaks + (zero - float("inf"),)
        totals = totals + (zero,)
        for _ in tl.static_range(TILES):
            outs = outs + ((zero, zero, zero, zero),)
    state = (peaks, totals, outs)
    warp = thread // 32
    last = end - 1
    total_turns = tl.cdiv(end - start, WARPS)
    # Every row sees all of these; what is left, and what other warps are short of, is masked.
    whole = tl.maximum(tl.minimum(end, (seq_len - count + 1) // 16) - start, 0) // WARPS
    # The first page is asked for before the queries, so that they wait together.
    here = tl.minimum(start + warp, last) * 16
    block = tl.load(table + here // BLOCK_SIZE)
    # A page waits for its number: each lane loads that of another turn, long before.
    coming_blocks = _blocks(table, start + warp, 1, lane, last, WARPS, BLOCK_SIZE)
    page = cache + block.to(tl.int64) * block_stride + head_offset
    fetched = _fetch(
        page, here % BLOCK_SIZE, group, place, HEAD_DIM, KEY_CODE, KEY_BYTES, KEY_RADIUS_OFFSET,
        VALUE_CODE, VALUE_BYTES, VALUE_OFFSET,
    )  # fmt: skip
    column = group // 2
    if SETS == 2:
        column += 4 * (group % 2)
    own = first_row + column
    own_token, own_head = _row_index(first_token, own, kv_head, NUM_HEADS, GROUP)
    source = query + own_token * query_stride_token + own_head * query_stride_head
    operands = _load_queries(source, rotation, own < count * GROUP, place, lane, ROTATE, HEAD_DIM, DTYPE)
    limits = ()
    for k in tl.static_range(SETS):
        row = first_row + 4 * k + place
        limits = limits + (tl.minimum(seq_len - count + row // GROUP + 1, seq_len),)
    limits = limits + (tl.zeros([WARPS * 32], tl.int32) + seq_len,)
    tl.debug_barrier()

    for first in tl.range(0, total_turns, 32):
        blocks = coming_blocks
        coming_blocks = _blocks(table, start + warp, first + 33, lane, last, WARPS, BLOCK_SIZE)
        for MASKED in tl.static_range(2):
            begin = tl.maximum(whole, first) if MASKED else first
            stop = tl.minimum(total_turns if MASKED else whole, first + 32)
            for turn in tl.range(begin, stop):
                chunk = start + warp + turn * WARPS
                block = shuffle_int(blocks, turn - first)
                page = cache + block.to(tl.int64) * block_stride + head_offset
                there = tl.minimum(chunk + WARPS, last) * 16
                coming = _fetch(
                    page, there % BLOCK_SIZE, group, place, HEAD_DIM, KEY_CODE, KEY_BYTES,
                    KEY_RADIUS_OFFSET, VALUE_CODE, VALUE_BYTES, VALUE_OFFSET,
                )  # fmt: skip
                seen = ()
                for k in tl.static_range(SETS + 1):
                    seen = seen + (tl.where(chunk < end, limits[k], 0),)
                state = _attend(
                    fetched, operands, state, seen, chunk * 16, scale_log2, key_lut, value_lut, lane, SETS,
                    MASKED, HEAD_DIM, KEY_CODE, KEY_BYTES, KEY_FIRST, VALUE_CODE, VALUE_BYTES, VALUE_FIRST,
                    COPIES, DTYPE,
                )  # fmt: skip
                fetched = coming
    return state


@triton.jit
def _write(
    thread,
    state,
    rotation,
    out,
    out_stride_token,
    out_stride_head,
    partial_out,
    partial_lse,
    first_token,
    rows,
    first_row,
    kv_head,
    own_part,
    whole,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SETS: tl.constexpr,
    COPIES: tl.constexpr,
    ROTATE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    KEY_CODE: tl.constexpr,
    VALUE_CODE: tl.constexpr,
):
    """Join what the warps have seen and write it to `out`, or, unless the part is whole, for `_merge`.

    own_part: index of the part's first row among the partial outputs.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    DTYPE: tl.constexpr = out.dtype.element_ty
    WARPS: tl.constexpr = thread.shape[0] // 32
    TILES: tl.constexpr = (HALF + 15) // 16
    REGISTERS: tl.constexpr = _registers_of_output(HALF_PAD, WARPS)
    # After the last look-up, warps exchange results where a table was.
    EXCHANGE_FIRST: tl.constexpr = DYNAMIC if table_places(KEY_CODE, VALUE_CODE, COPIES)[3] > 0 else 0
    zero = tl.zeros([WARPS * 32], tl.float32)
    lane = thread % 32
    warp = thread // 32
    group = lane // 4
    place = lane % 4
    PAIRS: tl.constexpr = HEAD_DIM // 16
    peaks, totals, outs = state
    for k in tl.static_range(SETS):
        # The warps have seen different tokens: one log-sum-exp over them, as over the parts in _merge.
        total = sum_over_groups(totals[k])
        warp_peaks = of_all_warps(peaks[k], thread, EXCHANGE_FIRST)
        warp_totals = of_all_warps(total, thread, EXCHANGE_FIRST)
        peak = warp_peaks[0]
        for i in tl.static_range(1, WARPS):
            peak = tl.maximum(peak, warp_peaks[i])
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        total = zero
        for i in tl.static_range(WARPS):
            total += warp_totals[i] * tl.exp2(warp_peaks[i] - shift)
        some = total > 0
        lse = tl.where(some, peak + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
        share = tl.where(some, tl.exp2(peaks[k] - shift) / tl.where(some, total, 1.0), 0.0)
        xs = ()
        ys = ()
        for i in tl.static_range(TILES):
            o = outs[k * TILES + i]
            xs = xs + (o[0] * share, o[2] * share)
            ys = ys + (o[1] * share, o[3] * share)
        if ROTATE:
            values = hadamard(xs + ys, lane, 4, 16)
            factors = _rotation_signs(rotation, group * PAIRS, PAIRS, HEAD_DIM)
            xs = ()
            ys = ()
            for i in tl.static_range(PAIRS):
                xs = xs + (values[i] * factors[i],)
                ys = ys + (values[PAIRS + i] * factors[PAIRS + i],)
        padding = ()
        for _ in tl.static_range(REGISTERS // 2 - 2 * TILES):
            padding = padding + (zero,)
        values = xs + padding + ys + padding
        sums = sum_over_warps(values, thread, EXCHANGE_FIRST)

        own = first_row + 4 * k + place
        own_token, own_head = _row_index(first_token, own, kv_head, NUM_HEADS, GROUP)
        part = own_part + 4 * k + place
        for i in tl.static_range(REGISTERS // WARPS):
            register = i * WARPS + warp
            inner = register % (REGISTERS // 2)
            own_dim = group * PAIRS + inner + register // (REGISTERS // 2) * HALF
            own_kept = (own < rows) & (inner < PAIRS)
            if whole:
                own_out = out + own_token * out_stride_token + own_head * out_stride_head
                tl.store(own_out + own_dim, sums[i].to(DTYPE), mask=own_kept)
            else:
                tl.store(partial_out + part * HEAD_DIM + own_dim, sums[i], mask=own_kept)
        if not whole:
            tl.store(partial_lse + part, lse, mask=thread < 4)


@triton.jit
def _merge(
    partial_out,
    partial_lse,
    first_program,
    parts,
    column,
    columns,
    MAX_PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    TOGETHER: tl.constexpr = 6,
):
    """The output float32 [ROWS, 2 * HALF_PAD] of a request, from what `_write` left of its parts."""
    row = tl.arange(0, ROWS)
    number = tl.arange(0, MAX_PARTS)
    first = _partial_row(first_program + number, (number == 0).to(tl.int32), column, columns, ROWS)
    lse = tl.load(
        partial_lse + row[:, None] + first[None, :],
        mask=(number < parts)[None, :],
        other=float("-inf"),
        cache_modifier=".cg",
    )
    peak = tl.max(lse, axis=1)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2(lse - peak[:, None]), axis=1)
    dim = tl.arange(0, 2 * HALF_PAD)
    merged = tl.zeros([ROWS, 2 * HALF_PAD], tl.float32)
    for begin in tl.range(0, parts, TOGETHER):
        # All loads first, so that they wait together.
        lses = ()
        pieces = ()
        for i in tl.static_range(TOGETHER):
            part = begin + i
            own = _partial_row(first_program + part, (part == 0).to(tl.int32), column, columns, ROWS) + row
            there = row * 0 + part < parts
            lses = lses + (tl.load(partial_lse + own, mask=there, other=float("-inf"), cache_modifier=".cg"),)
            pieces = pieces + (
                tl.load(
                    partial_out + (own * HEAD_DIM)[:, None] + dim[None, :],
                    mask=(dim < HEAD_DIM)[None, :] & tl.expand_dims(there, 1),
                    other=0.0,
                    cache_modifier=".cg",
                ),
            )
        for i in tl.static_range(TOGETHER):
            # A part without tokens has written no output.
            piece = tl.where(tl.expand_dims(lses[i] > float("-inf"), 1), pieces[i], 0.0)
            merged += tl.exp2(lses[i] - peak)[:, None] * piece
    return merged * tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)[:, None]


@triton.jit
def _store_rows(
    values,
    out,
    out_stride_token,
    out_stride_head,
    first_token,
    rows,
    first_row,
    kv_head,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Write values, float32 [rows of a program, padded head_dim], to the rows of `out` from first_row on."""
    row = first_row + tl.arange(0, values.shape[0])
    token, head = _row_index(first_token, row, kv_head, NUM_HEADS, GROUP)
    target = out + token * out_stride_token + head * out_stride_head
    dim = tl.arange(0, values.shape[1])
    kept = (row < rows)[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(target[:, None] + dim[None, :], values.to(out.dtype.element_ty), mask=kept)


@triton.jit
def _partial_row(program, begins, column, columns, ROWS: tl.constexpr):
    """The first row, among partial outputs, of a program's part of a request.

    begins: 1 if the request begins with it, else 0; a program has at most one of either that is not a whole
    request.
    """
    return ((2 * program + begins) * columns + column) * ROWS


@triton.constexpr_function
def _registers_of_output(half_pad, warps):
    """Values x, then values y, that a lane holds of a query's output, padded for the exchange."""
    return max(half_pad // 4, warps)


# What differs from batch to batch must not compile another kernel in the middle of serving.
@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["block_table", "seq_lens", "query_start_loc"],
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
    rotation,
    key_lut,
    value_lut,
    scale_log2,
    out,
    out_stride_token,
    out_stride_head,
    partial_out,
    partial_lse,
    arrived,
    begin_words,
    items,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    ITEM_WORDS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    SETS: tl.constexpr,
    WARPS: tl.constexpr,
    COPIES: tl.constexpr,
    ROTATE: tl.constexpr,
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
    ROWS: tl.constexpr = 4 * SETS
    PLACES: tl.constexpr = table_places(KEY_CODE, VALUE_CODE, COPIES)
    STATIC_BYTES: tl.constexpr = PLACES[2]
    DYNAMIC_BYTES: tl.constexpr = PLACES[3]
    EXCHANGE: tl.constexpr = exchange_bytes(_registers_of_output(HALF_PAD, WARPS), WARPS)
    kv_head = tl.program_id(0)
    row_block = tl.program_id(1)
    program = tl.program_id(2)
    thread = tl.arange(0, WARPS * 32)
    open_shared(thread, EXCHANGE if DYNAMIC_BYTES == 0 and EXCHANGE > STATIC_BYTES else STATIC_BYTES)
    record = begin_words + program * ITEM_WORDS
    following = items + (tl.load(record + ITEM_WORDS - 2) + 1) * ITEM_WORDS
    count_items = tl.load(record + ITEM_WORDS - 1)
    reserve_dynamic(thread, DYNAMIC_BYTES, count_items < 0, arrived)

    column = row_block * tl.num_programs(0) + kv_head
    columns = ROW_BLOCKS * tl.num_programs(0)
    first_row = row_block * ROWS
    _fill_tables(thread, key_lut, value_lut, KEY_CODE, VALUE_CODE, COPIES)
    for remaining in tl.range(count_items, 0, -1):
        request = tl.load(record)
        begin = tl.load(record + 1)
        finish = tl.load(record + 2)
        first_program = tl.load(record + 3)
        parts = tl.load(record + 4)
        # A row is one query head of one of the request's queries.
        first_token = tl.load(query_start_loc + request)
        count = tl.load(query_start_loc + request + 1) - first_token
        rows = count * GROUP
        seq_len = tl.load(seq_lens + request)
        # Warps take turns at chunks of 16 tokens, which no page cuts.
        start = begin * WARPS
        end = tl.minimum(finish * WARPS, tl.cdiv(seq_len, 16))
        own_part = _partial_row(program, (begin == 0).to(tl.int32), column, columns, ROWS)
        if first_row < rows:
            if start < end:
                state = _read(
                    recomputed(thread), query, query_stride_token, query_stride_head, cache, block_stride,
                    block_table + request.to(tl.int64) * table_stride, seq_len, first_token, count, first_row,
                    start, end, kv_head, rotation, key_lut, value_lut, scale_log2,
                    NUM_HEADS, GROUP, SETS, COPIES, ROTATE, HEAD_DIM, HALF_PAD, BLOCK_SIZE, PAGE_BYTES,
                    KEY_CODE, KEY_BYTES, KEY_RADIUS_OFFSET, VALUE_CODE, VALUE_BYTES, VALUE_OFFSET,
                )  # fmt: skip
                _write(
                    recomputed(thread), state, rotation, out, out_stride_token, out_stride_head,
                    partial_out, partial_lse, first_token, rows, first_row, kv_head, own_part, parts == 1,
                    NUM_HEADS, GROUP, SETS, COPIES, ROTATE, HEAD_DIM, HALF_PAD, KEY_CODE, VALUE_CODE,
                )  # fmt: skip
            elif parts == 1:
                _store_rows(
                    tl.zeros([ROWS, 2 * HALF_PAD], tl.float32), out, out_stride_token, out_stride_head,
                    first_token, rows, first_row, kv_head, NUM_HEADS, GROUP, HEAD_DIM,
                )  # fmt: skip
            else:
                # Fewer tokens than when the schedule was made.
                unseen = tl.full([ROWS], float("-inf"), tl.float32)
                tl.store(partial_lse + own_part + tl.arange(0, ROWS), unseen)
            if parts > 1:
                # Whoever comes last finds all parts written. The counter is left as it was found.
                tl.debug_barrier()
                counter = arrived + request * columns + column
                if tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1:
                    tl.store(counter, 0)
                    merged = _merge(
                        partial_out, partial_lse, first_program, parts, column, columns,
                        MAX_PARTS, ROWS, HEAD_DIM, HALF_PAD,
                    )  # fmt: skip
                    _store_rows(
                        merged, out, out_stride_token, out_stride_head,
                        first_token, rows, first_row, kv_head, NUM_HEADS, GROUP, HEAD_DIM,
                    )  # fmt: skip
        if remaining > 1:
            # What was exchanged lies where the tables go.
            tl.debug_barrier()
            _fill_tables(recomputed(thread), key_lut, value_lut, KEY_CODE, VALUE_CODE, COPIES)
        record = following
        following += ITEM_WORDS


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
    schedule: Schedule,
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
        schedule: of make_schedule with this max_query_len, and planned for this batch's seq_lens and
            query_start_loc; a captured graph's, with those of each replay.

    Raises:
        ValueError: for other shapes, dtypes or strides, or a workspace or schedule that does not fit.
    """
    tokens, num_heads, head_dim = query.shape
    num_reqs = seq_lens.shape[0]
    num_kv_heads = cache.shape[1]
    check_heads("query", query, fmt.head_dim)
    check_heads("out", out, fmt.head_dim)
    check(
        query.data_ptr() % 4 == 0 and query.stride(0) % 2 == 0 and query.stride(1) % 2 == 0,
        f"rows of query must start at multiples of 4 bytes, got strides {list(query.stride())}",
    )
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
    rows = _Rows.of(num_heads, num_kv_heads, max_query_len)
    columns = num_kv_heads * rows.blocks
    parts = 2 * schedule.programs * columns * 4 * rows.sets
    # A Hadamard matrix is applied where the queries are read and the outputs written.
    apart = fmt.key.rotated and not fused(head_dim)
    check(
        workspace.query.dtype == query.dtype
        and (not apart or workspace.query[:tokens].shape == query.shape)
        and workspace.arrived.numel() >= num_reqs * columns
        and workspace.partial_lse.numel() >= parts
        and workspace.partial_out.numel() >= parts * head_dim,
        f"the workspace is too small, or not of {query.dtype}, for {tokens} queries of {num_reqs} "
        f"requests, {num_heads} heads of {head_dim}",
    )
    launch = _Launch.of(fmt, rows, query.device)
    turn = 16 * launch.warps
    check(
        schedule.turn == turn and schedule.max_reqs >= num_reqs,
        f"the schedule is for up to {schedule.max_reqs} requests in turns of {schedule.turn} tokens, not for "
        f"{num_reqs} in turns of {turn}",
    )
    if apart:
        rotate(query, workspace.query[:tokens], tables)
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
        tables.rotation,
        tables.key_lut,
        tables.value_lut,
        scale * _LOG2_E,
        out,
        out.stride(0),
        out.stride(1),
        workspace.partial_out,
        workspace.partial_lse,
        workspace.arrived,
        schedule.begin,
        schedule.items,
        NUM_HEADS=num_heads,
        GROUP=num_heads // num_kv_heads,
        MAX_PARTS=MAX_PARTS,
        ITEM_WORDS=ITEM_WORDS,
        ROW_BLOCKS=rows.blocks,
        SETS=rows.sets,
        WARPS=launch.warps,
        COPIES=table_copies(query.device),
        ROTATE=fmt.key.rotated and not apart,
        num_warps=launch.warps,
        maxnreg=launch.registers,
        **page_constants(fmt),
    )
    if apart:
        rotate(out, out, tables, inverse=True, query_start_loc=query_start_loc)
