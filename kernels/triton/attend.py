"""A program's reading loop of decode attention: what its queries see of a run of chunks of 16 tokens.

Written lane by lane (lanes.py). Scores are products of unit-radius points, the left operand, with rotated
queries, so a key costs a table lookup a pair and one multiplication by its radius; the values' radii go into
the weights, which one transpose of a small matrix brings to the lanes that add values up.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from vllm_polarquant.format import SEGMENT
from vllm_polarquant.kernels.triton.constants import RAW
from vllm_polarquant.kernels.triton.lanes import (
    follow_maximum,
    for_maximum,
    get_bonus,
    get_words,
    hadamard,
    hold_loads,
    join_halves,
    load_words,
    mma,
    pack_halves,
    place_half,
    put_bonuses,
    put_words,
    shuffle_int,
    transpose_halves,
    unpack_halves,
    words_at_once,
    words_bytes,
)
from vllm_polarquant.kernels.triton.launch import table_layout
from vllm_polarquant.kernels.triton.page_io import (
    RADIUS_STRIDE,
    is_centred,
    link,
    load_share,
    page_pointer,
    point,
    radii,
    segment_centres,
)

SEGMENT_CHUNKS = tl.constexpr(SEGMENT // 16)
"""Chunks of 16 tokens in a segment."""

LOG2_E = tl.constexpr(math.log2(math.e))

_MARGIN = tl.constexpr(8.0)
"""Powers of two by which a logit may be above its row's maximum without rescaling what the row has summed."""


@triton.jit
def _fetch(page, slot, group, member, LATE_VALUES: tl.constexpr, PAGE: tl.constexpr):
    """A lane's shares of the 16 tokens from `slot` of a page on, then radii of tokens g and g + 8.

    LATE_VALUES: without the values' shares. A `hold_loads` may follow.
    """
    KEYS: tl.constexpr = PAGE.keys
    VALUES: tl.constexpr = PAGE.values
    both_radii = page + KEYS.radius_offset + (slot + group) * RADIUS_STRIDE
    keys = load_share(page, slot, group, member, KEYS, True)
    stored = load_words(both_radii, 1, 4, True) + load_words(both_radii + 8 * RADIUS_STRIDE, 1, 4, True)
    if LATE_VALUES:
        return keys, stored
    else:
        return keys, load_share(page, slot, group, member, VALUES, True), stored


@triton.jit
def _inside(token, end, span, BOUNDED: tl.constexpr):
    """Whether token < end, and, if BOUNDED, one of the last `span` before it."""
    if BOUNDED:
        return (token < end) & (token >= end - span)
    else:
        return token < end


@triton.jit
def soft_capped(score, CAP: tl.constexpr):
    """CAP * tanh(x / CAP) of logits x, both as powers of two: as exp2 gives tanh, it ends at -CAP and CAP."""
    TOP: tl.constexpr = CAP * LOG2_E
    return TOP - (2 * TOP) / (tl.exp2(score * (2 / CAP)) + 1)


@triton.jit
def _query_words(
    query, lane, TILE: tl.constexpr, STEP: tl.constexpr, SHARED: tl.constexpr, PAGE: tl.constexpr
):
    """Words of a tile of queries from a step of their products on, two a step; `query` as of `_attend`.

    All words where the tile lies in registers, else `words_at_once` of them.
    """
    PAIRS: tl.constexpr = PAGE.head_dim // 8
    IN_REGISTERS: tl.constexpr = len(query[0]) // PAIRS
    if TILE < IN_REGISTERS:
        return query[0][TILE * PAIRS + 2 * STEP : (TILE + 1) * PAIRS]
    else:
        PART: tl.constexpr = 2 * STEP // words_at_once(PAIRS)
        return get_words(query[1], lane, TILE - IN_REGISTERS, PART, PAIRS, SHARED)


@triton.constexpr_function
def _loads_anew(tile, step, in_registers, pairs):
    """Whether words of a tile of queries are to be loaded at a step."""
    return step == 0 if tile < in_registers else 2 * step % words_at_once(pairs) == 0


@triton.jit
def _scores(
    keys,
    query,
    lane,
    key_lut,
    SETS: tl.constexpr,
    SHARED: tl.constexpr,
    PAGE: tl.constexpr,
    COPIES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Products of 16 keys with the tiles of queries, two sets a tile, as `mma` has them, a tuple for each."""
    TILES: tl.constexpr = (SETS + 1) // 2
    KEYS: tl.constexpr = PAGE.keys
    VALUES: tl.constexpr = PAGE.values
    PLACES: tl.constexpr = table_layout(KEYS.code, VALUES.code, COPIES, SETS, PAGE.head_dim)
    PAIRS: tl.constexpr = PAGE.head_dim // 8
    IN_REGISTERS: tl.constexpr = len(query[0]) // PAIRS
    # A product waits for the one before it, so there are at least two sums.
    SUMS: tl.constexpr = 2 if TILES == 1 else TILES
    zero = tl.zeros(lane.shape, tl.float32)
    sums = ()
    for _ in tl.static_range(SUMS):
        sums = sums + ((zero, zero, zero, zero),)
    before = link(keys, lane, KEYS)
    words = ()
    for _ in tl.static_range(TILES):
        words = words + ((),)
    for step in tl.static_range(PAGE.head_dim // 16):
        left = ()
        for i in tl.static_range(4):
            left = left + (
                point(keys, before, i % 2, 2 * step + i // 2, KEYS, key_lut, PLACES[0], COPIES, lane, DTYPE),
            )
        new_sums = ()
        new_words = ()
        for j in tl.static_range(TILES):
            if _loads_anew(j, step, IN_REGISTERS, PAIRS):
                right = _query_words(query, lane, j, step, SHARED, PAGE)
            else:
                right = words[j]
            new_words = new_words + (right[2:],)
            if TILES > 1:
                new_sums = new_sums + (mma(sums[j], left, right[:2], DTYPE),)
            elif step % 2 == 0:
                new_sums = (mma(sums[0], left, right[:2], DTYPE), sums[1])
            else:
                new_sums = (sums[0], mma(sums[1], left, right[:2], DTYPE))
        sums = new_sums
        words = new_words
    if TILES == 1:
        even, odd = sums
        sums = ((even[0] + odd[0], even[1] + odd[1], even[2] + odd[2], even[3] + odd[3]),)
    return sums


@triton.jit
def _attend(
    fetched,
    query,
    state,
    limits,
    spans,
    token,
    scale_log2,
    bonuses,
    key_lut,
    value_lut,
    lane,
    SETS: tl.constexpr,
    SHARED: tl.constexpr,
    JOINED: tl.constexpr,
    CENTRED: tl.constexpr,
    MASKED: tl.constexpr,
    BOUNDED: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PAGE: tl.constexpr,
    COPIES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Let a warp's queries see 16 more tokens.

    query: the right operands of `mma`, two words a step, a tile of eight queries after the other: the first
    tiles' in registers, then what `put_words` has kept of the others in shared memory from SHARED on. Column
    2t + k % 2 of tile k // 2 is query t of set k.
    state: for each set the largest logit so far of query t, the sum of its weights that this lane has seen,
    and its outputs, four registers for each two pairs (x and y of pair 2i, then of 2i + 1).
    limits: for each set the position before which query t may see tokens, then that before which tokens are
    stored; only if MASKED. spans: how many before it, of a query and of any query, if BOUNDED too.
    bonuses: for each set what a key's centre adds to its logit for query t, in powers of two, if CENTRED.
    token: position of the first of the 16.
    """
    peaks, totals, outs = state
    keys, values, stored = fetched
    radius = radii(stored)
    key_token = token + lane // 4
    products = _scores(keys, query, lane, key_lut, SETS, SHARED, PAGE, COPIES, DTYPE)
    key_scales = (radius[0] * scale_log2, radius[2] * scale_log2)

    # Of each set, of tokens g and g + 8.
    scores = ()
    tops = ()
    for k in tl.static_range(SETS):
        heights = ()
        for half in tl.static_range(2):
            score = products[k // 2][2 * half + k % 2] * key_scales[half]
            if CENTRED:
                score += tl.where(is_centred(stored[half]), bonuses[k], 0.0)
            if SOFT_CAP is not None:
                score = soft_capped(score, SOFT_CAP)
            if MASKED:
                seen = _inside(key_token + 8 * half, limits[k], spans[0], BOUNDED)
                score = tl.where(seen, score, float("-inf"))
            scores = scores + (score,)
            if tl.float16 == DTYPE:
                # Weights times radii, which float16 must hold, are kept under 1, not the weights. Unwritten
                # slots may hold any radius, so their heights are -inf or NaN.
                height = score + tl.maximum(tl.log2(radius[2 * half + 1]), -60.0)
                heights = heights + (for_maximum(height),)
            else:
                heights = heights + (score,)
        tops = tops + (tl.maximum(heights[0], heights[1]),)
    outs, totals, peaks = follow_maximum(outs, totals, peaks, tops, _MARGIN)
    value_radii = ()
    for half in tl.static_range(2):
        value_radius = radius[2 * half + 1]
        if MASKED:
            stays = _inside(key_token + 8 * half, limits[SETS], spans[1], BOUNDED)
            value_radius = tl.where(stays, value_radius, 0.0)
        value_radii = value_radii + (value_radius,)
    new_totals = ()
    weights = ()
    for k in tl.static_range(SETS):
        shift = peaks[k]
        if MASKED:
            # A row that has seen nothing yet would subtract infinities.
            shift = tl.where(shift == float("-inf"), 0.0, shift)
        total = totals[k]
        for half in tl.static_range(2):
            weight = tl.exp2(scores[2 * k + half] - shift)
            total += weight
            weights = weights + (weight * value_radii[half],)
        new_totals = new_totals + (total,)

    known = (token, limits[SETS], spans[1]) if MASKED else ()
    if JOINED:
        outs = _add_joined(values, weights, outs, known, value_lut, lane, SETS, BOUNDED, PAGE, COPIES, DTYPE)
    else:
        outs = _add_spread(values, weights, outs, known, value_lut, lane, SETS, BOUNDED, PAGE, COPIES, DTYPE)
    return (peaks, new_totals, outs)


@triton.jit
def _value_points(
    values,
    before,
    known,
    value_lut,
    lane,
    TOKEN: tl.constexpr,
    PAIR: tl.constexpr,
    SETS: tl.constexpr,
    BOUNDED: tl.constexpr,
    PAGE: tl.constexpr,
    COPIES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Pair PAIR of a lane's TOKEN-th value.

    known: position of the first of the 16 tokens, that before which they are known, and how many before it,
    where there may be others; else ().
    """
    KEYS: tl.constexpr = PAGE.keys
    VALUES: tl.constexpr = PAGE.values
    PLACES: tl.constexpr = table_layout(KEYS.code, VALUES.code, COPIES, SETS, PAGE.head_dim)
    both = point(values, before, TOKEN, PAIR, VALUES, value_lut, PLACES[1], COPIES, lane, DTYPE)
    if len(known) > 0 and VALUES.code == RAW:
        # Unwritten raw slots may hold NaN, and 0 * NaN is not 0.
        own_token = known[0] + 2 * (lane % 4) + (TOKEN // 2 * 8 + TOKEN % 2)
        both = tl.where(_inside(own_token, known[1], known[2], BOUNDED), both, 0)
    return both


@triton.jit
def _add_spread(
    values,
    weights,
    outs,
    known,
    value_lut,
    lane,
    SETS: tl.constexpr,
    BOUNDED: tl.constexpr,
    PAGE: tl.constexpr,
    COPIES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Add values times weights to the outputs of `_attend`'s state, in products over (token, coordinate).

    known: as of `_value_points`. Half of what is multiplied is 0, but points need no moves.
    """
    VALUES: tl.constexpr = PAGE.values
    TILES: tl.constexpr = (PAGE.head_dim // 2 + 15) // 16
    # From a token's lanes to a query's. Even columns weigh the xs of pairs, odd ones the ys.
    placed = ()
    for i in tl.static_range(2 * SETS):
        both = transpose_halves(pack_halves(weights[i], weights[i], DTYPE))
        placed = placed + (
            place_half(both, 0, (lane & 4) != 0),
            place_half(both, 1, (lane & 4) != 0),
        )
    before = link(values, lane, VALUES)
    for half in tl.static_range(2):
        a = ()
        for i in tl.static_range(4 * TILES):
            a = a + (
                _value_points(
                    values, before, known, value_lut, lane, 2 * half + i % 2, i // 2, SETS, BOUNDED, PAGE,
                    COPIES, DTYPE,
                ),
            )  # fmt: skip
        new_outs = ()
        for k in tl.static_range(SETS):
            b = (placed[4 * k + 2 * half], placed[4 * k + 2 * half + 1])
            for i in tl.static_range(TILES):
                # Rows g and g + 8 are two pairs, columns the coordinates of two tokens.
                left = (a[4 * i], a[4 * i + 2], a[4 * i + 1], a[4 * i + 3])
                new_outs = new_outs + (mma(outs[k * TILES + i], left, b, DTYPE),)
        outs = new_outs
    return outs


@triton.jit
def _add_joined(
    values,
    weights,
    outs,
    known,
    value_lut,
    lane,
    SETS: tl.constexpr,
    BOUNDED: tl.constexpr,
    PAGE: tl.constexpr,
    COPIES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Add values times weights to the outputs of `_attend`'s state, in products over tokens.

    known: as of `_value_points`. Two points, of two tokens, become a word of their xs and one of their ys.
    """
    VALUES: tl.constexpr = PAGE.values
    TILES: tl.constexpr = (PAGE.head_dim // 2 + 15) // 16
    # From a token's lanes to a query's, of two sets at once.
    right = ()
    for j in tl.static_range(SETS // 2):
        for half in tl.static_range(2):
            both = pack_halves(weights[4 * j + half], weights[4 * j + 2 + half], DTYPE)
            right = right + (transpose_halves(both),)
    before = link(values, lane, VALUES)
    added = ()
    for i in tl.static_range(TILES):
        p = ()
        for token_of_pair in tl.static_range(8):
            p = p + (
                _value_points(
                    values, before, known, value_lut, lane, token_of_pair % 4, 2 * i + token_of_pair // 4,
                    SETS, BOUNDED, PAGE, COPIES, DTYPE,
                ),
            )  # fmt: skip
        # Rows g and g + 8 are two pairs.
        left = ()
        for half in tl.static_range(2):
            left = left + (
                (
                    join_halves(p[0], p[1], half),
                    join_halves(p[4], p[5], half),
                    join_halves(p[2], p[3], half),
                    join_halves(p[6], p[7], half),
                ),
            )
        for j in tl.static_range(SETS // 2):
            b = (right[2 * j], right[2 * j + 1])
            first, second = outs[2 * j * TILES + i], outs[(2 * j + 1) * TILES + i]
            x = mma((first[0], second[0], first[2], second[2]), left[0], b, DTYPE)
            y = mma((first[1], second[1], first[3], second[3]), left[1], b, DTYPE)
            added = added + ((x[0], y[0], x[2], y[2]), (x[1], y[1], x[3], y[3]))
    # In the order of sets.
    new_outs = ()
    for k in tl.static_range(SETS):
        for i in tl.static_range(TILES):
            new_outs = new_outs + (added[i * SETS + k],)
    return new_outs


@triton.jit
def load_factors(factors, first, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Factors of dims first .. + COUNT - 1 and of those HEAD_DIM / 2 further on, float32, as a tuple.

    They come with 1 / sqrt(HEAD_DIM), which makes the matrix of +-1 that `lanes.hadamard` applies orthogonal.
    """
    NORM: tl.constexpr = HEAD_DIM**-0.5
    words = load_words(factors + first, COUNT, 16) + load_words(factors + (first + HEAD_DIM // 2), COUNT, 16)
    scaled = ()
    for i in tl.static_range(2 * COUNT):
        scaled = scaled + (words[i].to(tl.float32, bitcast=True) * NORM,)
    return scaled


@triton.jit
def _load_query(query, member, HEAD_DIM: tl.constexpr):
    """Words of each thread's quarter of both halves of its query, at `query`; a `hold_loads` must follow."""
    PAIRS: tl.constexpr = HEAD_DIM // 8
    halves = query.to(tl.pointer_type(tl.uint32)) + member * (PAIRS // 2)
    return (
        load_words(halves, PAIRS // 2, 4, True),
        load_words(halves + HEAD_DIM // 4, PAIRS // 2, 4, True),
    )


@triton.jit
def _rotate_query(
    halves, factors, member, lane, ROTATE: tl.constexpr, HEAD_DIM: tl.constexpr, DTYPE: tl.constexpr
):
    """Words (x, y) of `_load_query`'s pairs, rotated, in the order of keys' pairs.

    factors: of the queries' kv head.
    """
    PAIRS: tl.constexpr = HEAD_DIM // 8
    xs, ys = halves
    words = ()
    if ROTATE:
        scaled = load_factors(factors, member * PAIRS, PAIRS, HEAD_DIM)
        values = ()
        for word in tl.static_range(PAIRS):
            low, high = unpack_halves((xs + ys)[word], DTYPE)
            values = values + (low * scaled[2 * word], high * scaled[2 * word + 1])
        values = hadamard(values, lane, 1, 2)
        for i in tl.static_range(PAIRS):
            words = words + (pack_halves(values[i], values[PAIRS + i], DTYPE),)
    else:
        for i in tl.static_range(PAIRS // 2):
            x, y = xs[i], ys[i]
            words = words + ((x & 0xFFFF) | (y << 16), (x >> 16) | (y & 0xFFFF0000))
    return words


@triton.jit
def row_index(first_token, row, kv_head, GROUP: tl.constexpr):
    """Where the request's row, a query head of one of its queries, stands among [tokens, num_heads]."""
    token = (first_token + row // GROUP).to(tl.int64)
    return token, kv_head * GROUP + row % GROUP


@triton.jit
def _blocks(table, chunk, tile, lane, last, WARPS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Each lane's block number: where its warp, now at `chunk`, will be `tile` + lane tiles from now."""
    there = tl.minimum(chunk + (tile + lane) * WARPS, last) * 16
    return tl.load(table + there // BLOCK_SIZE)


@triton.constexpr_function
def _tiles_of_round(warps):
    """Tiles, a multiple of 32, that surely lie in the 16 segments a warp whose bonuses are kept at a time."""
    chunks = (16 * warps - 1) * SEGMENT_CHUNKS.value + 1
    return chunks // warps // 32 * 32


@triton.jit
def _load_centres(
    centres,
    segment,
    num_segments,
    kv_head,
    member,
    CENTRES_PER_SEGMENT: tl.constexpr,
    PAGE: tl.constexpr,
    EARLY: tl.constexpr = False,
):
    """A lane's quarters of two centres, of `segment`, int32 [threads], and of the eighth after, as words.

    EARLY: as of `load_words`.
    """
    PAIRS: tl.constexpr = PAGE.head_dim // 8
    ALIGN: tl.constexpr = 16 if PAIRS % 4 == 0 else 8
    words = ()
    for half in tl.static_range(2):
        own = segment_centres(
            centres, segment + 8 * half, num_segments, kv_head, CENTRES_PER_SEGMENT, PAGE.head_dim
        )
        words = words + load_words(own + member * PAIRS, PAIRS, ALIGN, EARLY)
    return words


@triton.jit
def _centre_products(
    query, words, lane, scale_log2, TILES: tl.constexpr, SHARED: tl.constexpr, PAGE: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Logits, in powers of two, of a warp's 16 centres of `_load_centres`: a tile's as `mma` has them."""
    PAIRS: tl.constexpr = PAGE.head_dim // 8
    IN_REGISTERS: tl.constexpr = len(query[0]) // PAIRS
    zero = tl.zeros(words[0].shape, tl.float32)
    products = ()
    for j in tl.static_range(TILES):
        product = (zero, zero, zero, zero)
        right = ()
        for step in tl.static_range(PAGE.head_dim // 16):
            left = (
                words[2 * step], words[PAIRS + 2 * step], words[2 * step + 1], words[PAIRS + 2 * step + 1],
            )  # fmt: skip
            if _loads_anew(j, step, IN_REGISTERS, PAIRS):
                right = _query_words(query, lane, j, step, SHARED, PAGE)
            product = mma(product, left, right[:2], DTYPE)
            right = right[2:]
        products = products + (
            (
                product[0] * scale_log2,
                product[1] * scale_log2,
                product[2] * scale_log2,
                product[3] * scale_log2,
            ),
        )
    return products


@triton.jit
def read(
    thread,
    query,
    query_stride_token,
    query_stride_head,
    query_factors,
    cache,
    block_stride,
    table,
    seq_len,
    window,
    first_token,
    count,
    first_row,
    start,
    end,
    kv_head,
    key_lut,
    value_lut,
    centres,
    num_segments,
    scale_log2,
    GROUP: tl.constexpr,
    SETS: tl.constexpr,
    SHARED_TILES: tl.constexpr,
    JOINED: tl.constexpr,
    HOLD: tl.constexpr,
    COPIES: tl.constexpr,
    ROTATE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    CENTRES_PER_SEGMENT: tl.constexpr,
    SHARED: tl.constexpr,
    PAGE: tl.constexpr,
):
    """What each warp's queries have seen of the chunks start .. end - 1 of a request: the state of `_attend`.

    table: the request's row of the block table. window: how many tokens a query sees, or None for all.
    first_token, count: the request's queries. first_row: the first of the rows that this program takes.
    SHARED_TILES: of eight queries whose operands lie in shared memory, from SHARED on, before the centres'
    bonuses. HOLD: of DecodeLaunch.
    """
    DTYPE: tl.constexpr = query.dtype.element_ty
    WARPS: tl.constexpr = thread.shape[0] // 32
    TILES: tl.constexpr = (PAGE.head_dim // 2 + 15) // 16
    QUERY_TILES: tl.constexpr = (SETS + 1) // 2
    IN_REGISTERS: tl.constexpr = QUERY_TILES - SHARED_TILES
    BONUSES: tl.constexpr = SHARED + words_bytes(SHARED_TILES, PAGE.head_dim // 8)
    # Registers have no room for the values of two chunks of long vectors; those wait only for their scores.
    LATE_VALUES: tl.constexpr = PAGE.head_dim > 256
    VALUES: tl.constexpr = PAGE.values
    lane = thread % 32
    group = lane // 4
    member = lane % 4
    zero = tl.zeros([WARPS * 32], tl.float32)
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
    total_tiles = tl.cdiv(end - start, WARPS)
    # Every row sees all of the tiles from `head` to `whole`; in others, and where other warps have a chunk
    # more, there are tokens to mask: up to `head` those before a row's window, from `whole` on those after.
    whole = tl.maximum(tl.minimum(end, (seq_len - count + 1) // 16) - start, 0) // WARPS
    head = 0
    spans = (seq_len, seq_len)
    if window is not None:
        head = tl.cdiv(tl.maximum(seq_len - window - start * 16, 0), 16 * WARPS)
        spans = (window, window + count - 1)
    # All that the first tile needs is asked for before any of it is used: the page's number, queries while it
    # comes, then the page, which comes from farthest, and centres.
    here = tl.minimum(start + warp, last) * 16
    block = tl.load(table + here // PAGE.block_size)
    hold_loads(thread)
    # Each lane loads the number of another tile's page, long before.
    coming_blocks = _blocks(table, start + warp, 1, lane, last, WARPS, PAGE.block_size)
    column = group // 2
    if SETS > 1:
        column += 4 * (group % 2)
    halves = ()
    for j in tl.static_range(IN_REGISTERS + (1 if SHARED_TILES > 0 else 0)):
        own = first_row + 8 * j + column
        if j == IN_REGISTERS:
            # Each warp loads one for all.
            own += 8 * (warp % SHARED_TILES)
        # What there is no query for is read as the last one, and never written.
        own_token, own_head = row_index(first_token, tl.minimum(own, count * GROUP - 1), kv_head, GROUP)
        source = query + own_token * query_stride_token + own_head * query_stride_head
        halves = halves + (_load_query(source, member, PAGE.head_dim),)
    CENTRED: tl.constexpr = CENTRES_PER_SEGMENT > 0
    # Each warp works out what 16 segments' centres add to logits, for all; after so many tiles the next ones.
    ROUND: tl.constexpr = _tiles_of_round(WARPS)
    first_segment = start // SEGMENT_CHUNKS
    # Past the split's last segment there is that one again: a short split fetches few centres.
    num_segments = tl.minimum(num_segments, last // SEGMENT_CHUNKS + 1)
    page = page_pointer(cache, block, kv_head, block_stride, PAGE)
    slot = here % PAGE.block_size
    fetched = _fetch(page, slot, group, member, LATE_VALUES, PAGE)
    hold_loads(thread)
    centre_words = ()
    if CENTRED:
        centre_words = _load_centres(
            centres, first_segment + 16 * warp + group, num_segments, kv_head, member, CENTRES_PER_SEGMENT,
            PAGE, not LATE_VALUES,
        )  # fmt: skip
    hold_loads(thread)
    in_registers = ()
    in_shared = ()
    for j in tl.static_range(len(halves)):
        words = _rotate_query(halves[j], query_factors, member, lane, ROTATE, PAGE.head_dim, DTYPE)
        if j < IN_REGISTERS:
            in_registers = in_registers + words
        else:
            in_shared = words
            put_words(words, thread, warp % SHARED_TILES, SHARED)
            tl.debug_barrier()
    operands = (in_registers, in_shared)
    limits = ()
    for k in tl.static_range(SETS):
        row = first_row + 4 * k + member
        limits = limits + (tl.minimum(seq_len - count + row // GROUP + 1, seq_len),)
    limits = limits + (tl.zeros([WARPS * 32], tl.int32) + seq_len,)
    products = ()
    if CENTRED:
        products = _centre_products(
            operands, centre_words, lane, scale_log2, QUERY_TILES, SHARED, PAGE, DTYPE
        )
        put_bonuses(products, thread, SETS, BONUSES)
    tl.debug_barrier()

    for first in tl.range(0, total_tiles, 32):
        blocks = coming_blocks
        coming_blocks = _blocks(table, start + warp, first + 33, lane, last, WARPS, PAGE.block_size)
        if CENTRED:
            if (first > 0) & (first % ROUND == 0):
                tl.debug_barrier()
                first_segment = (start + first * WARPS) // SEGMENT_CHUNKS
                centre_words = _load_centres(
                    centres, first_segment + 16 * warp + group, num_segments, kv_head, member,
                    CENTRES_PER_SEGMENT, PAGE,
                )  # fmt: skip
                products = _centre_products(
                    operands, centre_words, lane, scale_log2, QUERY_TILES, SHARED, PAGE, DTYPE
                )
                put_bonuses(products, thread, SETS, BONUSES)
                tl.debug_barrier()
        for PHASE in tl.static_range(1 if window is None else 0, 3):
            begin = tl.maximum(first, 0 if PHASE == 0 else (head if PHASE == 1 else tl.maximum(whole, head)))
            stop = tl.minimum(first + 32, head if PHASE == 0 else (whole if PHASE == 1 else total_tiles))
            for tile in tl.range(begin, stop):
                chunk = start + warp + tile * WARPS
                if LATE_VALUES:
                    fetched = (fetched[0], load_share(page, slot, group, member, VALUES, True), fetched[1])
                block = shuffle_int(blocks, tile - first)
                page = page_pointer(cache, block, kv_head, block_stride, PAGE)
                slot = tl.minimum(chunk + WARPS, last) * 16 % PAGE.block_size
                coming = _fetch(page, slot, group, member, LATE_VALUES, PAGE)
                # A short request is masked tiles.
                if HOLD or PHASE != 1:
                    hold_loads(thread)
                bounds = ()
                for k in tl.static_range(SETS + 1):
                    bounds = bounds + (tl.where(chunk < end, limits[k], 0),)
                bonuses = ()
                if CENTRED:
                    for k in tl.static_range(SETS):
                        segment = chunk // SEGMENT_CHUNKS - first_segment
                        bonuses = bonuses + (get_bonus(products, segment, thread, k, SETS, BONUSES),)
                state = _attend(
                    fetched, operands, state, bounds, spans, chunk * 16, scale_log2, bonuses, key_lut,
                    value_lut, lane, SETS, SHARED, JOINED, CENTRED, PHASE != 1, PHASE == 0, SOFT_CAP, PAGE,
                    COPIES, DTYPE,
                )  # fmt: skip
                fetched = coming
    return state
