"""Decode attention on the codes in place: one launch, a split of a request's KV range a program.

Written lane by lane (lanes.py). Scores are products of rotated queries with unit-radius points, so a key
costs a table lookup a pair and one multiplication by its radius; the values' radii go into the weights.
The last split of a request to end merges them all. Where the rotation is a Hadamard matrix, queries are
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
from vllm_polarquant.kernels.lane_page import link, load_part, radii, unit
from vllm_polarquant.kernels.lanes import (
    DYNAMIC,
    exchange_bytes,
    fill_table,
    for_maximum,
    hadamard,
    load_words,
    mma,
    of_all_warps,
    open_shared,
    pack_halves,
    quad_max,
    quad_sum,
    reserve_dynamic,
    shuffle_from,
    sum_over_warps,
    unpack_halves,
)
from vllm_polarquant.kernels.page import (
    RAW,
    check,
    check_cache,
    check_heads,
    check_int,
    page_constants,
    table_entries,
)
from vllm_polarquant.kernels.rotate import rotate

MAX_QUERY_LEN = 16
MAX_SPLITS = 64
PROGRAMS = 264
"""Programs that run at once: two on each of the 132 multiprocessors of an H100 or H200."""

_STATIC_TABLES = 40 << 10
"""Bytes of tables that lie in static shared memory; of more, the keys' table goes to dynamic memory."""

_ALL_COPIES = 160 << 10
"""Shared memory of a multiprocessor from which on each lane has its own copy of a table; else two lanes
share."""

_SPLIT_COST = 0.04
"""What a program costs before and after its keys, as a share of a request of 8k tokens."""

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
    """Parts of each request's KV range, decided by the launch's shape alone.

    It must not depend on sequence lengths, which a CUDA graph's replay cannot see. Rounds of PROGRAMS
    programs run one after the other, so the best number fills whole rounds with few parts.
    """
    return _fewest_rounds(max(1, num_reqs * num_kv_heads), PROGRAMS)


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
def table_copies(device: torch.device) -> int:
    """How often a table lies in shared memory: 32 times, once a lane, where there is room, or 16 times."""
    if device.type != "cuda":
        return 32
    room = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    return 32 if room >= _ALL_COPIES else 16


@cache
def _fewest_rounds(pairs: int, programs: int) -> int:
    return min(
        range(1, MAX_SPLITS + 1),
        key=lambda splits: -(-pairs * splits // programs) * (1 / splits + _SPLIT_COST),
    )


@dataclass(frozen=True)
class DecodeWorkspace:
    """Buffers of decode_attention, sized once for every batch it will see.

    query: queries rotated beforehand, [max_tokens, num_heads, d] in the model's dtype.
    partial_out: float32, flat, each split's normalised output [tokens, num_heads, splits, d].
    partial_lse: float32, flat, its log2-sum-exp2 [tokens, num_heads, splits].
    arrived: int32, how many splits of a program's rows are done; 0 between launches.
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

        With one query a request, 32 heads, 8 KV heads and head_dim 128 they take 10 MB for 256
        requests and 25 MB for 1024.
        """
        rows = num_heads * max(
            min(reqs * max_query_len, max_tokens) * num_splits(reqs, num_kv_heads)
            for reqs in range(1, max_reqs + 1)
        )
        row_blocks = -(-max_query_len * num_heads // (4 * num_kv_heads))
        return cls(
            torch.empty(max_tokens, num_heads, head_dim, dtype=dtype, device=device),
            torch.empty(rows * head_dim, dtype=torch.float32, device=device),
            torch.empty(rows, dtype=torch.float32, device=device),
            torch.zeros(max_reqs * row_blocks * num_kv_heads, dtype=torch.int32, device=device),
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
    VALUE_RADIUS_OFFSET: tl.constexpr,
):
    """A lane's part of the 16 tokens from `slot` of a page on, as words.

    For either half of eight tokens: quarter t of key g, then eighth g of values 2t and 2t + 1. Last the
    radii of keys 2t and 2t + 1 of both halves, and those of the same values.
    """
    keys = page + (slot + group) * KEY_BYTES
    values = page + VALUE_OFFSET + (slot + 2 * place) * VALUE_BYTES
    radius = page + (slot + 2 * place) * 2
    fetched = ()
    for half in tl.static_range(2):
        even = values + 8 * half * VALUE_BYTES
        odd = even + VALUE_BYTES
        fetched = fetched + (
            load_part(keys + 8 * half * KEY_BYTES, place, HEAD_DIM // 8, KEY_CODE, KEY_BYTES),
            load_part(even, group, HEAD_DIM // 16, VALUE_CODE, VALUE_BYTES),
            load_part(odd, group, HEAD_DIM // 16, VALUE_CODE, VALUE_BYTES),
        )
    key_radius = radius + KEY_RADIUS_OFFSET
    value_radius = radius + VALUE_RADIUS_OFFSET
    return fetched + (
        load_words(key_radius, 1, 4)
        + load_words(key_radius + 16, 1, 4)
        + load_words(value_radius, 1, 4)
        + load_words(value_radius + 16, 1, 4),
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
    KEY_FIRST: tl.constexpr,
    VALUE_CODE: tl.constexpr,
    VALUE_FIRST: tl.constexpr,
    COPIES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Let a warp's queries see 16 more tokens.

    query: `SETS` sets of four queries as the left operands of `mma`, each query in two rows.
    state: for each set the largest logit so far, the sum of weights that this lane has seen, and the
    outputs of query t, four registers for each two pairs (x and y of pair 2i, then of 2i + 1).
    limits: for each set the tokens that the query of row g may see, then those that are stored.
    """
    KEY_PAIRS: tl.constexpr = HEAD_DIM // 8
    peaks, totals, outs = state
    radius = radii(fetched[6])
    zero = tl.zeros(lane.shape, tl.float32)
    products = ()
    for half in tl.static_range(2):
        # Two sums: a product waits for the one before it.
        even = (zero, zero, zero, zero)
        odd = even
        keys = link(fetched[3 * half], KEY_PAIRS, KEY_CODE, lane % 4 == 0, 1)
        for step in tl.static_range(HEAD_DIM // 16):
            first = unit(keys, 2 * step, KEY_PAIRS, KEY_CODE, key_lut, KEY_FIRST, COPIES, lane, DTYPE)
            second = unit(keys, 2 * step + 1, KEY_PAIRS, KEY_CODE, key_lut, KEY_FIRST, COPIES, lane, DTYPE)
            if step % 2 == 0:
                even = mma(even, query[4 * step : 4 * step + 4], (first, second), DTYPE)
            else:
                odd = mma(odd, query[4 * step : 4 * step + 4], (first, second), DTYPE)
        products = products + ((even[0] + odd[0], even[1] + odd[1], even[2] + odd[2], even[3] + odd[3]),)

    own_half = tl.where((lane & 4) == 0, 0xFFFF, 0xFFFF0000).to(tl.uint32)
    new_peaks = ()
    new_totals = ()
    decays = ()
    weights = ()
    for k in tl.static_range(SETS):
        scores = ()
        for i in tl.static_range(4):
            score = products[i // 2][2 * k + i % 2] * (radius[i] * scale_log2)
            if MASKED:
                score = tl.where(token + (8 * (i // 2) + i % 2) < limits[k], score, float("-inf"))
            scores = scores + (score,)
        if tl.float16 == DTYPE:
            # Weights times radii, which float16 must hold, are kept under 1, not the weights. Unwritten slots
            # may hold any radius, so their heights are -inf or NaN.
            heights = ()
            for i in tl.static_range(4):
                height = scores[i] + tl.maximum(tl.log2(radius[4 + i]), -60.0)
                heights = heights + (for_maximum(height),)
        else:
            heights = scores
        tile = tl.maximum(tl.maximum(heights[0], heights[1]), tl.maximum(heights[2], heights[3]))
        peak = tl.maximum(peaks[k], quad_max(tile))
        shift = peak
        if MASKED:
            # A row that has seen nothing yet would subtract infinities.
            shift = tl.where(peak == float("-inf"), 0.0, peak)
        decay = tl.exp2(peaks[k] - shift)
        total = totals[k] * decay
        for i in tl.static_range(4):
            weight = tl.exp2(scores[i] - shift)
            total += weight
            value_radius = radius[4 + i]
            if MASKED:
                stored = token + (8 * (i // 2) + i % 2) < limits[SETS]
                value_radius = tl.where(stored, value_radius, 0.0)
            scaled = weight * value_radius
            # Even rows weigh the xs of a pair, odd rows the ys.
            weights = weights + (pack_halves(scaled, scaled, DTYPE) & own_half,)
        new_peaks = new_peaks + (peak,)
        new_totals = new_totals + (total,)
        decays = decays + (shuffle_from(decay, lane % 4 * 8),)

    PAIRS: tl.constexpr = HEAD_DIM // 16
    TILES: tl.constexpr = (HEAD_DIM // 2 + 15) // 16
    new_outs = ()
    for i in tl.static_range(SETS * TILES):
        out = outs[i]
        decay = decays[i // TILES]
        new_outs = new_outs + ((out[0] * decay, out[1] * decay, out[2] * decay, out[3] * decay),)
    for half in tl.static_range(2):
        outs = new_outs
        new_outs = ()
        a = ()
        evens = link(fetched[3 * half + 1], PAIRS, VALUE_CODE, lane < 4, 4)
        odds = link(fetched[3 * half + 2], PAIRS, VALUE_CODE, lane < 4, 4)
        for i in tl.static_range(2 * TILES):
            even = unit(evens, i, PAIRS, VALUE_CODE, value_lut, VALUE_FIRST, COPIES, lane, DTYPE)
            odd = unit(odds, i, PAIRS, VALUE_CODE, value_lut, VALUE_FIRST, COPIES, lane, DTYPE)
            if MASKED and VALUE_CODE == RAW:
                # Unwritten raw slots may hold NaN, and 0 * NaN is not 0.
                even = tl.where(token + 8 * half < limits[SETS], even, 0)
                odd = tl.where(token + (8 * half + 1) < limits[SETS], odd, 0)
            a = a + ((even, odd),)
        for k in tl.static_range(SETS):
            b = (weights[4 * k + 2 * half], weights[4 * k + 2 * half + 1])
            for i in tl.static_range(TILES):
                pair, next_pair = a[2 * i], a[2 * i + 1]
                left = (pair[0], next_pair[0], pair[1], next_pair[1])
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


# What differs from batch to batch must not compile another kernel in the middle of serving.
@triton.jit(
    do_not_specialize=["table_stride", "splits"],
    do_not_specialize_on_alignment=["block_table", "seq_lens", "query_start_loc"],
)
def _split_kernel(
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
    splits,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
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
    HALF: tl.constexpr = HEAD_DIM // 2
    DTYPE: tl.constexpr = query.dtype.element_ty
    ROWS: tl.constexpr = 4 * SETS
    TILES: tl.constexpr = (HALF + 15) // 16
    PLACES: tl.constexpr = table_places(KEY_CODE, VALUE_CODE, COPIES)
    KEY_FIRST: tl.constexpr = PLACES[0]
    VALUE_FIRST: tl.constexpr = PLACES[1]
    STATIC_BYTES: tl.constexpr = PLACES[2]
    DYNAMIC_BYTES: tl.constexpr = PLACES[3]
    request = tl.program_id(0) // ROW_BLOCKS
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    thread = tl.arange(0, WARPS * 32)
    lane = thread % 32
    warp = thread // 32
    group = lane // 4
    place = lane % 4
    # Values x, then values y, that a lane holds of a query's output, padded for the exchange.
    REGISTERS: tl.constexpr = HALF_PAD // 4 if HALF_PAD // 4 > WARPS else WARPS
    EXCHANGE: tl.constexpr = exchange_bytes(REGISTERS, WARPS)
    # After the last look-up, warps exchange results where a table was.
    EXCHANGE_FIRST: tl.constexpr = DYNAMIC if DYNAMIC_BYTES > 0 else 0
    open_shared(thread, EXCHANGE if DYNAMIC_BYTES == 0 and EXCHANGE > STATIC_BYTES else STATIC_BYTES)
    reserve_dynamic(thread, DYNAMIC_BYTES, splits < 0, arrived)

    # A row is one query head of one of the request's queries.
    first_token = tl.load(query_start_loc + request)
    count = tl.load(query_start_loc + request + 1) - first_token
    rows = count * GROUP
    first_row = tl.program_id(0) % ROW_BLOCKS * ROWS
    if first_row >= rows:
        return
    seq_len = tl.load(seq_lens + request)
    # Warps take turns at chunks of 16 tokens, which no page cuts.
    chunks = tl.cdiv(seq_len, 16)
    turns = tl.cdiv(chunks, splits * WARPS)
    used_splits = tl.cdiv(chunks, tl.maximum(turns, 1) * WARPS)
    start = split * turns * WARPS
    end = tl.minimum(start + turns * WARPS, chunks)
    row = first_row + tl.arange(0, ROWS)
    token, head = _row_index(first_token, row, kv_head, NUM_HEADS, GROUP)
    target = out + token * out_stride_token + head * out_stride_head
    dim = tl.arange(0, 2 * HALF_PAD)
    kept = (row < rows)[:, None] & (dim < HEAD_DIM)[None, :]
    if start >= end:
        if split == 0:
            nothing = tl.zeros([ROWS, 2 * HALF_PAD], DTYPE)
            tl.store(target[:, None] + dim[None, :], nothing, mask=kept)
        return

    fill_table(thread, key_lut, KEY_FIRST, table_entries(KEY_CODE), COPIES)
    if VALUE_CODE != KEY_CODE:
        fill_table(thread, value_lut, VALUE_FIRST, table_entries(VALUE_CODE), COPIES)

    zero = tl.zeros([WARPS * 32], tl.float32)
    none = tl.zeros([WARPS * 32], tl.uint32)
    sets = ()
    limits = ()
    for k in tl.static_range(SETS):
        own = first_row + 4 * k + group // 2
        own_token, own_head = _row_index(first_token, own, kv_head, NUM_HEADS, GROUP)
        source = query + own_token * query_stride_token + own_head * query_stride_head
        sets = sets + (_load_queries(source, rotation, own < rows, place, lane, ROTATE, HEAD_DIM, DTYPE),)
        limits = limits + (tl.minimum(seq_len - count + own // GROUP + 1, seq_len),)
    limits = limits + (tl.zeros([WARPS * 32], tl.int32) + seq_len,)
    operands = ()
    for step in tl.static_range(HEAD_DIM // 16):
        low, high = sets[0][2 * step], sets[0][2 * step + 1]
        if SETS == 2:
            operands = operands + (low, sets[1][2 * step], high, sets[1][2 * step + 1])
        else:
            operands = operands + (low, none, high, none)

    table = block_table + request.to(tl.int64) * table_stride
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
    chunk = start + warp
    last = end - 1
    here = tl.minimum(chunk, last) * 16
    block = tl.load(table + here // BLOCK_SIZE)
    page = cache + block.to(tl.int64) * block_stride + head_offset
    fetched = _fetch(
        page, here % BLOCK_SIZE, group, place, HEAD_DIM, KEY_CODE, KEY_BYTES, KEY_RADIUS_OFFSET,
        VALUE_CODE, VALUE_BYTES, VALUE_OFFSET, VALUE_RADIUS_OFFSET,
    )  # fmt: skip
    there = tl.minimum(chunk + WARPS, last) * 16
    block = tl.load(table + there // BLOCK_SIZE)
    tl.debug_barrier()

    # Every row sees all of these; what is left, and what other warps are short of, is masked.
    whole = tl.maximum(tl.minimum(end, (seq_len - count + 1) // 16) - start, 0) // WARPS
    total_turns = tl.cdiv(end - start, WARPS)
    for MASKED in tl.static_range(2):
        for _ in tl.range(whole if MASKED else 0, total_turns if MASKED else whole):
            page = cache + block.to(tl.int64) * block_stride + head_offset
            coming = _fetch(
                page, there % BLOCK_SIZE, group, place, HEAD_DIM, KEY_CODE, KEY_BYTES,
                KEY_RADIUS_OFFSET, VALUE_CODE, VALUE_BYTES, VALUE_OFFSET, VALUE_RADIUS_OFFSET,
            )  # fmt: skip
            there = tl.minimum(chunk + 2 * WARPS, last) * 16
            block = tl.load(table + there // BLOCK_SIZE)
            seen = ()
            for k in tl.static_range(SETS + 1):
                seen = seen + (tl.where(chunk < end, limits[k], 0),)
            state = _attend(
                fetched, operands, state, seen, chunk * 16 + 2 * place, scale_log2, key_lut, value_lut,
                lane, SETS, MASKED, HEAD_DIM, KEY_CODE, KEY_FIRST, VALUE_CODE, VALUE_FIRST, COPIES, DTYPE,
            )  # fmt: skip
            fetched = coming
            chunk += WARPS

    PAIRS: tl.constexpr = HEAD_DIM // 16
    peaks, totals, outs = state
    for k in tl.static_range(SETS):
        # The warps have seen different tokens: one log-sum-exp over them, as over the splits below.
        total = quad_sum(totals[k])
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
        share = shuffle_from(share, place * 8)
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
        part = (own_token * NUM_HEADS + own_head) * splits + split
        for i in tl.static_range(REGISTERS // WARPS):
            register = i * WARPS + warp
            inner = register % (REGISTERS // 2)
            own_dim = group * PAIRS + inner + register // (REGISTERS // 2) * HALF
            own_kept = (own < rows) & (inner < PAIRS)
            if used_splits == 1:
                own_out = out + own_token * out_stride_token + own_head * out_stride_head
                tl.store(own_out + own_dim, sums[i].to(DTYPE), mask=own_kept)
            else:
                tl.store(partial_out + part * HEAD_DIM + own_dim, sums[i], mask=own_kept)
        if used_splits > 1:
            own = first_row + 4 * k + group // 2
            own_token, own_head = _row_index(first_token, own, kv_head, NUM_HEADS, GROUP)
            part = (own_token * NUM_HEADS + own_head) * splits + split
            tl.store(partial_lse + part, lse, mask=(own < rows) & (thread % 8 == 0) & (warp == 0))
    if used_splits == 1:
        return

    # Whoever comes last finds all parts written. The counter is left as it was found.
    tl.debug_barrier()
    counter = arrived + tl.program_id(0) * tl.num_programs(1) + kv_head
    if tl.atomic_add(counter, 1, sem="acq_rel") < used_splits - 1:
        return
    tl.store(counter, 0)
    parts = (token * NUM_HEADS + head) * splits
    number = tl.arange(0, MAX_SPLITS)
    lse = tl.load(
        partial_lse + parts[:, None] + number[None, :],
        mask=(row < rows)[:, None] & (number < used_splits)[None, :],
        other=float("-inf"),
        cache_modifier=".cg",
    )
    peak = tl.max(lse, axis=1)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2(lse - peak[:, None]), axis=1)
    merged = tl.zeros([ROWS, 2 * HALF_PAD], tl.float32)
    for i in tl.range(0, used_splits):
        own_lse = tl.load(partial_lse + parts + i, mask=row < rows, other=float("-inf"), cache_modifier=".cg")
        piece = tl.load(
            partial_out + ((parts + i) * HEAD_DIM)[:, None] + dim[None, :],
            mask=kept,
            other=0.0,
            cache_modifier=".cg",
        )
        merged += tl.exp2(own_lse - peak)[:, None] * piece
    merged *= tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)[:, None]
    tl.store(target[:, None] + dim[None, :], merged.to(DTYPE), mask=kept)


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
    group = num_heads // num_kv_heads
    sets = 1 if max_query_len * group <= 4 else 2
    row_blocks = triton.cdiv(max_query_len * group, 4 * sets)
    splits = num_splits(num_reqs, num_kv_heads)
    rows = tokens * num_heads
    check(
        workspace.query.dtype == query.dtype
        and workspace.query[:tokens].shape == query.shape
        and workspace.arrived.numel() >= num_reqs * row_blocks * num_kv_heads
        and workspace.partial_lse.numel() >= rows * splits
        and workspace.partial_out.numel() >= rows * splits * head_dim,
        f"the workspace is too small, or not of {query.dtype}, for {tokens} queries of {num_reqs} "
        f"requests, {num_heads} heads of {head_dim}",
    )
    # A Hadamard matrix is applied where the queries are read and the outputs written.
    fused = head_dim & (head_dim - 1) == 0
    apart = fmt.key.rotated and not fused
    if apart:
        rotate(query, workspace.query[:tokens], tables)
        query = workspace.query[:tokens]
    config = tuning.config("decode", fmt, query.device)
    _split_kernel[(num_reqs * row_blocks, num_kv_heads, splits)](
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
        splits,
        NUM_HEADS=num_heads,
        GROUP=group,
        MAX_SPLITS=MAX_SPLITS,
        ROW_BLOCKS=row_blocks,
        SETS=sets,
        WARPS=config["num_warps"],
        COPIES=table_copies(query.device),
        ROTATE=fmt.key.rotated and fused,
        num_warps=config["num_warps"],
        # Two programs share a multiprocessor's 65,536 registers where that costs no spills in the loop.
        maxnreg=128 if sets == 1 and head_dim <= 128 else None,
        **page_constants(fmt),
    )
    if apart:
        rotate(out, out, tables, inverse=True, query_start_loc=query_start_loc)
