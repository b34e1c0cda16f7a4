"""numba loops that read pages."""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange, types
from numba.extending import intrinsic

from vllm_polarquant.format import SEGMENT
from vllm_polarquant.kernels.cpu.vectors import FP8, RAW
from vllm_polarquant.page import BLOCK_SIZE_MULTIPLE, RADIUS_STRIDE

_TILE = 64
_NO_MASS = np.float32(-1e30)
_MASKED = np.float32(-2e30)
"""A logit that weighs nothing even where every logit so far is masked."""


@intrinsic
def _load(typingcontext, memory, at, dtype):
    """The number of a dtype at byte `at` of memory uint8 [n], whether aligned or not, or past its end."""
    result = dtype.dtype

    def generate(context, builder, signature, args):
        array = context.make_array(signature.args[0])(context, builder, args[0])
        pointer = context.get_value_type(result).as_pointer()
        number = builder.load(builder.bitcast(builder.gep(array.data, [args[1]]), pointer))
        number.align = 1
        return number

    return result(memory, at, dtype), generate


@intrinsic
def _float_of_bits(typingcontext, bits):
    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return types.float32(types.uint32), generate


@njit(cache=True)
def exp(x):
    """e^x of a float32 x <= 0 within 3e-7, and 0 below e^-87; unlike libm's, loops of it become vectors."""
    power = x * np.float32(math.log2(math.e))
    whole = np.float32(math.floor(power + np.float32(0.5)))
    part = power - whole
    # 2^part, of -.5 to .5, by its Taylor series.
    y = np.float32(1.5403530e-4)
    y = y * part + np.float32(1.3333558e-3)
    y = y * part + np.float32(9.6181291e-3)
    y = y * part + np.float32(5.5504109e-2)
    y = y * part + np.float32(2.4022651e-1)
    y = y * part + np.float32(6.9314718e-1)
    y = y * part + np.float32(1)
    exponent = np.int32(max(whole, np.float32(-126))) + np.int32(127)
    scale = _float_of_bits(np.uint32(exponent) << np.uint32(23))
    return y * scale if x > np.float32(-87) else np.float32(0)


@njit(cache=True)
def _load_radii(memory, start, count, bits, centred):
    """bfloat16 radii at `start` as bits of float32, uint32 [count]; returns whether any sign bit is set.

    centred: uint32 [count], not 0 where one is.
    """
    some = np.uint32(0)
    for t in range(count):
        radius = np.uint32(_load(memory, start + RADIUS_STRIDE * t, np.uint16))
        bits[t] = (radius & np.uint32(0x7FFF)) << np.uint32(16)
        centred[t] = radius & np.uint32(0x8000)
        some |= centred[t]
    return some != 0


@njit(cache=True)
def _load_centre(centres, segment, head, centre):
    """The centre of a segment within the table, f32 [d]."""
    half = len(centre) // 2
    words = centres.words[segment, min(head, centres.words.shape[1] - 1)]
    for j in range(half):
        word = np.uint64(words[j])
        centre[j] = centres.lut[word & np.uint64(0xFFFF)]
        centre[j + half] = centres.lut[word >> np.uint64(16)]


@njit(cache=True)
def _load_tile(codes, count, reader, points, tile):
    """Unit vectors of `count` rows of codes, as bits of float32: u32 tile [:, d].

    points: u32 [d / 2], scratch.
    """
    d = tile.shape[1]
    half = d // 2
    lut = reader.lut
    # Unsigned indices spare the loops Python's test for negative ones.
    if reader.kind == RAW:
        for t in range(count):
            for j in range(d):
                tile[t, j] = lut[np.uint64(_load(codes, t * reader.code_bytes + 2 * j, np.uint16))]
        return
    if reader.kind == FP8:
        for t in range(count):
            for j in range(d):
                tile[t, j] = lut[np.uint64(_load(codes, t * reader.code_bytes + j, np.uint8))]
        return
    pair_bits, state_bits = np.uint64(reader.pair_bits), np.uint64(reader.state_bits)
    state_mask = (np.uint64(1) << state_bits) - np.uint64(1)
    mask = (np.uint64(1) << (pair_bits + state_bits)) - np.uint64(1)
    for t in range(count):
        # The top bits of the code before.
        state = np.uint64(0)
        for group in range(half // 8):
            # Eight codes. What else the word holds, the next bytes of the page, is masked out.
            word = _load(codes, t * reader.code_bytes + group * reader.pair_bits, np.uint64)
            first = np.uint64(8 * group)
            points[first] = lut[(word << state_bits | state) & mask]
            for j in range(np.uint64(1), np.uint64(8)):
                points[first + j] = lut[(word >> (pair_bits * j - state_bits)) & mask]
            state = word >> (pair_bits * np.uint64(8) - state_bits) & state_mask
        for j in range(half):
            tile[t, j] = points[j] << np.uint32(16)
        for j in range(half):
            tile[t, j + half] = points[j] & np.uint32(0xFFFF0000)


@njit(cache=True, fastmath=True)
def _rotate(x, factors, mixing, scale, y):
    """A query f32 [d] as stored keys take it, times scale -> y."""
    for i in range(len(x)):
        dot = np.float32(0)
        for j in range(len(x)):
            dot += x[j] * factors[j] * mixing[i, j]
        y[i] = dot * scale


@njit(cache=True)
def _join(split_out, split_max, split_sum, sink, restoring, token, head, out):
    """Splits and sink of a row, each by its share, in the model's basis -> out; returns the log-sum-exp.

    split_out is scratch.
    """
    splits, _, _, d = split_out.shape
    top = max(_NO_MASS, sink)
    for split in range(splits):
        top = max(top, split_max[split, token, head])
    total = np.float32(math.exp(sink - top))
    merged, row = split_out[0, token, head], out[token, head]
    for split in range(splits):
        share = np.float32(math.exp(split_max[split, token, head] - top))
        total += share * split_sum[split, token, head]
        if split == 0:
            for j in range(d):
                merged[j] *= share
        else:
            for j in range(d):
                merged[j] += share * split_out[split, token, head, j]
    row[:] = 0
    if total <= 0:
        return np.float32(-np.inf)
    for i in range(d):
        weight = merged[i] / total
        for j in range(d):
            row[j] += weight * restoring[i, j]
    return np.float32(top + math.log(total))


@njit(cache=True, parallel=True, fastmath=True)
def attend(
    query, query_start, seq_lens, scale, window, soft_cap, sinks, block_table, heads, memory, blocks, bases,
    key, key_region, centres, value, value_region, split_out, split_max, split_sum, out, lse,
):  # fmt: skip
    """Flash attention of one (request, kv head, split) a task.

    query f32 [T, Hq, d], window int, soft_cap f32, 0 for none, sinks f32 [Hq], -inf for none. split_out
    f32 [splits, T, Hq, d], split_max and split_sum [splits, T, Hq] are scratch. out f32 [T, Hq, d] and lse
    f32 [Hq, T] are written for every query of every request.

    All in one parallel loop: where others want the same cores, each loop waits for them once more.
    """
    requests = len(seq_lens)
    splits, _, query_heads, d = split_out.shape
    group = query_heads // heads
    block_size = blocks.tokens
    # Tiles that never leave a page.
    width = _TILE if block_size % _TILE == 0 else BLOCK_SIZE_MULTIPLE
    for task in prange(requests * heads * splits):
        split = task % splits
        head = task // splits % heads
        request = task // (splits * heads)
        length = seq_lens[request]
        first = query_start[request]
        count = query_start[request + 1] - first
        # The earliest query's window. Blocks before it may be gone.
        visible = max(length - count + 1 - window, 0)
        rows = count * group
        rotated = np.empty((max(rows, 1), d), np.float32)
        for row in range(rows):
            token, member = first + row // group, head * group + row % group
            factors = bases.query_factors[min(head, len(bases.query_factors) - 1)]
            _rotate(query[token, member], factors, bases.mixing, scale, rotated[row])
            split_max[split, token, member] = _NO_MASS
            split_sum[split, token, member] = 0
            split_out[split, token, member] = 0
        origin = visible // width * width
        share = ((length - origin + splits - 1) // splits + width - 1) // width * width
        begin, end = origin + split * share, min(origin + (split + 1) * share, length)
        points = np.empty(d // 2, np.uint32)
        bits = np.empty((_TILE, d), np.uint32)
        tile = bits.view(np.float32)
        radius_bits = np.empty(_TILE, np.uint32)
        radii = radius_bits.view(np.float32)
        weights = np.empty((max(rows, 1), _TILE), np.float32)
        centred = np.empty(_TILE, np.uint32)
        centre = np.empty(d, np.float32)
        # What a row's logits of centred keys lack.
        missing = np.empty(max(rows, 1), np.float32)
        segment = -1
        for start in range(begin, end, width):
            step = min(width, end - start)
            block = np.int64(block_table[request, start // block_size])
            page = block * blocks.stride + head * blocks.page_bytes
            inside = start % block_size
            # Segments are a whole number of tiles.
            own_segment = min(start // SEGMENT, len(centres.words) - 1)
            if own_segment != segment:
                segment = own_segment
                _load_centre(centres, segment, head, centre)
                for row in range(rows):
                    q = rotated[row]
                    dot = np.float32(0)
                    for j in range(d):
                        dot += q[j] * centre[j]
                    missing[row] = dot
            at = page + key_region.codes + inside * key.code_bytes
            _load_tile(memory[at : at + step * key.code_bytes], step, key, points, bits)
            some = _load_radii(
                memory, page + key_region.radii + inside * RADIUS_STRIDE, step, radius_bits, centred
            )
            for row in range(rows):
                token, member = row // group, row % group
                q = rotated[row]
                for t in range(step):
                    dot = np.float32(0)
                    for j in range(d):
                        dot += q[j] * tile[t, j]
                    weights[row, t] = dot * radii[t]
                if some:
                    for t in range(step):
                        weights[row, t] += missing[row] if centred[t] else np.float32(0)
                if soft_cap > 0:
                    for t in range(step):
                        weights[row, t] = soft_cap * math.tanh(weights[row, t] / soft_cap)
                past = length - count + token + 1
                for t in range(min(past - window - start, step)):
                    weights[row, t] = _MASKED
                for t in range(max(0, past - start), step):
                    weights[row, t] = _MASKED
                before = split_max[split, first + token, head * group + member]
                top = before
                for t in range(step):
                    top = max(top, weights[row, t])
                shrink = np.float32(math.exp(before - top))
                total = np.float32(0)
                for t in range(step):
                    weight = exp(weights[row, t] - top)
                    weights[row, t] = weight
                    total += weight
                sum_before = split_sum[split, first + token, head * group + member]
                split_sum[split, first + token, head * group + member] = sum_before * shrink + total
                split_max[split, first + token, head * group + member] = top
                if shrink != 1:
                    part = split_out[split, first + token, head * group + member]
                    for j in range(d):
                        part[j] *= shrink
            at = page + value_region.codes + inside * value.code_bytes
            _load_tile(memory[at : at + step * value.code_bytes], step, value, points, bits)
            _load_radii(
                memory, page + value_region.radii + inside * RADIUS_STRIDE, step, radius_bits, centred
            )
            for row in range(rows):
                part = split_out[split, first + row // group, head * group + row % group]
                for t in range(step):
                    weights[row, t] *= radii[t]
                # Four tokens a sweep: the accumulator is read and written a quarter as often.
                for t in range(0, step - 3, 4):
                    w0, w1 = weights[row, t], weights[row, t + 1]
                    w2, w3 = weights[row, t + 2], weights[row, t + 3]
                    for j in range(d):
                        part[j] += (w0 * tile[t, j] + w1 * tile[t + 1, j]) + (
                            w2 * tile[t + 2, j] + w3 * tile[t + 3, j]
                        )
                for t in range(step // 4 * 4, step):
                    for j in range(d):
                        part[j] += weights[row, t] * tile[t, j]
        if splits == 1:
            for row in range(rows):
                token, member = first + row // group, head * group + row % group
                lse[member, token] = _join(
                    split_out, split_max, split_sum, sinks[member], bases.restoring, token, member, out
                )
    if splits > 1:
        for token in range(len(out)):
            for member in range(query_heads):
                lse[member, token] = _join(
                    split_out, split_max, split_sum, sinks[member], bases.restoring, token, member, out
                )


@njit(cache=True, parallel=True)
def gather(block_table, start, memory, blocks, reader, region, centres, out):
    """Tokens [start, start + n) of one request, f32 [n, heads, d], rotated: centres are added."""
    n, heads, d = out.shape
    for i in prange(n):
        points = np.empty(d // 2, np.uint32)
        bits = np.empty((1, d), np.uint32)
        unit = bits.view(np.float32)
        radius_bits = np.empty(1, np.uint32)
        radius = radius_bits.view(np.float32)
        centred = np.empty(1, np.uint32)
        centre = np.empty(d, np.float32)
        position = start + i
        block = np.int64(block_table[position // blocks.tokens])
        inside = position % blocks.tokens
        for head in range(heads):
            page = block * blocks.stride + head * blocks.page_bytes
            at = page + region.codes + inside * reader.code_bytes
            _load_tile(memory[at : at + reader.code_bytes], 1, reader, points, bits)
            some = _load_radii(memory, page + region.radii + inside * RADIUS_STRIDE, 1, radius_bits, centred)
            for j in range(d):
                out[i, head, j] = unit[0, j] * radius[0]
            if some:
                _load_centre(centres, min(position // SEGMENT, len(centres.words) - 1), head, centre)
                for j in range(d):
                    out[i, head, j] += centre[j]
