"""How decode attention joins what warps, and then splits of a request, have seen, and writes it."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from vllm_polarquant.kernels.triton.attend import LOG2_E, load_factors, row_index
from vllm_polarquant.kernels.triton.lanes import (
    DYNAMIC,
    hadamard,
    load_words,
    of_all_warps,
    store_half,
    store_words,
    sum_over_groups,
    sum_over_warps,
)
from vllm_polarquant.kernels.triton.launch import registers_of_output, table_layout

_LN_2 = tl.constexpr(math.log(2))


@triton.jit
def partial_row(program, begins, column, columns, ROWS: tl.constexpr):
    """The first row, among partial outputs, of a program's split of a request.

    begins: 1 if the request begins with it, else 0; a program has at most one of either that is not a whole
    request.
    """
    return ((2 * program + begins) * columns + column) * ROWS


@triton.jit
def sinks_of(sinks, row, kv_head, GROUP: tl.constexpr):
    """The sinks of a request's rows, float32, as powers of two."""
    words = load_words(sinks + kv_head * GROUP + row % GROUP, 1, 4)
    return words[0].to(tl.float32, bitcast=True) * LOG2_E


@triton.jit
def _store_float(pointers, value, kept):
    # As for loads, Triton takes seconds to look for a layout for each tl.store.
    store_words(pointers, (value.to(tl.uint32, bitcast=True),), kept, 4)


@triton.jit
def write(
    thread,
    state,
    sinks,
    output_factors,
    out,
    out_stride_token,
    out_stride_head,
    lse,
    lse_stride_head,
    lse_stride_token,
    partial_out,
    partial_lse,
    first_token,
    rows,
    first_row,
    kv_head,
    own_split,
    whole,
    GROUP: tl.constexpr,
    SETS: tl.constexpr,
    COPIES: tl.constexpr,
    ROTATE: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Join what the warps have seen and write it to `out`, or, unless the split is whole, for `merge`.

    own_split: index of the split's first row among the partial outputs. sinks: float32 [num_heads] or None; a
    split that is whole joins them.
    """
    KEYS: tl.constexpr = PAGE.keys
    VALUES: tl.constexpr = PAGE.values
    HEAD_DIM: tl.constexpr = PAGE.head_dim
    HALF: tl.constexpr = HEAD_DIM // 2
    WARPS: tl.constexpr = thread.shape[0] // 32
    TILES: tl.constexpr = (HALF + 15) // 16
    REGISTERS: tl.constexpr = registers_of_output(HEAD_DIM, WARPS)
    # After the last look-up, warps exchange results where a table was.
    PLACES: tl.constexpr = table_layout(KEYS.code, VALUES.code, COPIES, SETS, HEAD_DIM)
    EXCHANGE_FIRST: tl.constexpr = DYNAMIC if PLACES[3] > 0 else 0
    zero = tl.zeros([WARPS * 32], tl.float32)
    lane = thread % 32
    warp = thread // 32
    group = lane // 4
    member = lane % 4
    PAIRS: tl.constexpr = HEAD_DIM // 16
    peaks, totals, outs = state
    for k in tl.static_range(SETS):
        # The warps have seen different tokens: one log-sum-exp over them, as over the splits in merge.
        total = sum_over_groups(totals[k])
        warp_peaks = of_all_warps(peaks[k], thread, EXCHANGE_FIRST)
        warp_totals = of_all_warps(total, thread, EXCHANGE_FIRST)
        peak = warp_peaks[0]
        for i in tl.static_range(1, WARPS):
            peak = tl.maximum(peak, warp_peaks[i])
        if sinks is not None:
            sink = sinks_of(sinks, first_row + 4 * k + member, kv_head, GROUP)
            sink = tl.where(whole, sink, float("-inf"))
            peak = tl.maximum(peak, sink)
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        total = zero
        for i in tl.static_range(WARPS):
            total += warp_totals[i] * tl.exp2(warp_peaks[i] - shift)
        if sinks is not None:
            total += tl.exp2(sink - shift)
        some = total > 0
        own_lse = tl.where(some, peak + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
        share = tl.where(some, tl.exp2(peaks[k] - shift) / tl.where(some, total, 1.0), 0.0)
        xs = ()
        ys = ()
        for i in tl.static_range(TILES):
            o = outs[k * TILES + i]
            xs = xs + (o[0] * share, o[2] * share)
            ys = ys + (o[1] * share, o[3] * share)
        if ROTATE:
            values = hadamard(xs + ys, lane, 4, 16)
            factors = load_factors(output_factors, group * PAIRS, PAIRS, HEAD_DIM)
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

        own = first_row + 4 * k + member
        own_token, own_head = row_index(first_token, own, kv_head, GROUP)
        split = own_split + 4 * k + member
        for i in tl.static_range(REGISTERS // WARPS):
            register = i * WARPS + warp
            inner = register % (REGISTERS // 2)
            own_dim = group * PAIRS + inner + register // (REGISTERS // 2) * HALF
            own_kept = (own < rows) & (inner < PAIRS)
            if whole:
                own_out = out + own_token * out_stride_token + own_head * out_stride_head
                store_half(own_out + own_dim, sums[i], own_kept)
            else:
                _store_float(partial_out + split * HEAD_DIM + own_dim, sums[i], own_kept)
        if not whole:
            _store_float(partial_lse + split, own_lse, thread < 4)
        elif lse is not None:
            target = lse + own_head * lse_stride_head + own_token * lse_stride_token
            _store_float(target, own_lse * _LN_2, (thread < 4) & (own < rows))


@triton.jit
def merge(
    partial_out,
    partial_lse,
    sinks,
    first_program,
    splits,
    column,
    columns,
    first_row,
    kv_head,
    MAX_SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
):
    """A request's outputs, float32 [ROWS, 2 * half_pad], and log2-sum-exp2 [ROWS], of what `write` left.

    sinks: as of `write`. first_row: the first of the request's rows that the program takes.
    """
    HEAD_DIM: tl.constexpr = PAGE.head_dim
    HALF_PAD: tl.constexpr = PAGE.half_pad
    # Outputs of splits that are asked for together, as many as registers hold.
    AT_ONCE: tl.constexpr = 6 if ROWS <= 8 else (3 if ROWS <= 16 else 2)
    row = tl.arange(0, ROWS)
    number = tl.arange(0, MAX_SPLITS)
    first = partial_row(first_program + number, (number == 0).to(tl.int32), column, columns, ROWS)
    lse = tl.load(
        partial_lse + row[:, None] + first[None, :],
        mask=(number < splits)[None, :],
        other=float("-inf"),
        cache_modifier=".cg",
    )
    peak = tl.max(lse, axis=1)
    if sinks is not None:
        sink = sinks_of(sinks, first_row + row, kv_head, GROUP)
        peak = tl.maximum(peak, sink)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2(lse - peak[:, None]), axis=1)
    if sinks is not None:
        total += tl.exp2(sink - peak)
    dim = tl.arange(0, 2 * HALF_PAD)
    merged = tl.zeros([ROWS, 2 * HALF_PAD], tl.float32)
    for begin in tl.range(0, splits, AT_ONCE):
        # All loads first, so that they wait together.
        lses = ()
        pieces = ()
        for i in tl.static_range(AT_ONCE):
            split = begin + i
            own = partial_row(first_program + split, (split == 0).to(tl.int32), column, columns, ROWS) + row
            there = row * 0 + split < splits
            lses = lses + (tl.load(partial_lse + own, mask=there, other=float("-inf"), cache_modifier=".cg"),)
            pieces = pieces + (
                tl.load(
                    partial_out + (own * HEAD_DIM)[:, None] + dim[None, :],
                    mask=(dim < HEAD_DIM)[None, :] & tl.expand_dims(there, 1),
                    other=0.0,
                    cache_modifier=".cg",
                ),
            )
        for i in tl.static_range(AT_ONCE):
            # A split without tokens has written no output.
            piece = tl.where(tl.expand_dims(lses[i] > float("-inf"), 1), pieces[i], 0.0)
            merged += tl.exp2(lses[i] - peak)[:, None] * piece
    some = total > 0
    total = tl.where(some, total, 1.0)
    return merged * tl.where(some, 1.0 / total, 0.0)[:, None], tl.where(
        some, peak + tl.log2(total), float("-inf")
    )


@triton.jit
def store_rows(
    values,
    own_lse,
    out,
    out_stride_token,
    out_stride_head,
    lse,
    lse_stride_head,
    lse_stride_token,
    first_token,
    rows,
    first_row,
    kv_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Write values, float32 [rows of a program, padded head_dim], to the rows of `out` from first_row on.

    own_lse: their log2-sum-exp2, for `lse`, if that is not None.
    """
    row = first_row + tl.arange(0, values.shape[0])
    token, head = row_index(first_token, row, kv_head, GROUP)
    target = out + token * out_stride_token + head * out_stride_head
    dim = tl.arange(0, values.shape[1])
    kept = (row < rows)[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(target[:, None] + dim[None, :], values.to(out.dtype.element_ty), mask=kept)
    if lse is not None:
        target = lse + head * lse_stride_head + token * lse_stride_token
        tl.store(target, own_lse * _LN_2, mask=row < rows)
