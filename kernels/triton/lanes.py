"""Kernels written lane by lane: every tensor is 1-D and holds one element a thread.

A tensor-core product wants its operands in registers of certain lanes. A kernel that decodes operands in
the very lanes that multiply them needs no layout change, no shared memory and no barrier on the way. With
one element a thread, Triton's layouts have nothing to decide, so the lane that an element lives in is the
kernel's choice; what Triton has no operation for is a line of PTX here. Under the interpreter each
function is the same computation in plain tensor operations.

Lanes of a warp are numbered 0 to 31; lane = 4 * g + t, with g the group and t the place in its quad, as
PTX's matrix fragments count them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_polarquant.kernels.triton.constants import INTERPRET

_INTERPRET = tl.constexpr(INTERPRET)

SHARED_BYTES = tl.constexpr(48 << 10)
"""Static shared memory that a kernel may have."""

DYNAMIC = tl.constexpr(1 << 20)
"""Where dynamic shared memory starts; places below are bytes of static memory."""


@triton.constexpr_function
def _load_asm(count, vector, early):
    """PTX that loads `count` words from [$count] on, `vector` at a time.

    Loads of one warp share sectors. L1 has little room left beside tables, but should keep those.
    """
    path = "" if early else ".nc"
    lines = []
    for first in range(0, count, vector):
        outputs = ", ".join(f"${first + i}" for i in range(vector))
        width = f".v{vector}" if vector > 1 else ""
        operand = f"{{{outputs}}}" if vector > 1 else outputs
        lines.append(f"ld.global{path}.L1::evict_last{width}.b32 {operand}, [${count} + {4 * first}];")
    return "\n".join(lines)


@triton.jit
def recomputed(x):
    """x, int32, of which the compiler knows nothing.

    Whatever is computed from it in a loop stays there, instead of waiting outside in registers that the
    loop inside has no room for.
    """
    if _INTERPRET:
        return x
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1
        )  # fmt: skip


@triton.constexpr_function
def _outputs(kind, count):
    return ",".join([f"={kind}"] * count)


@triton.constexpr_function
def dtypes(dtype, count):
    """The result type of an inline assembly with `count` outputs of a dtype."""
    return (dtype,) * count


@triton.jit
def load_words(pointers, COUNT: tl.constexpr, ALIGN: tl.constexpr, EARLY: tl.constexpr = False):
    """COUNT 32-bit words from each thread's pointer on, uint32, as a tuple; for memory nobody writes.

    ALIGN: bytes that every pointer is a multiple of, at least 4. EARLY: not to be moved past the next
    `hold_loads`.
    """
    VECTOR: tl.constexpr = (
        4 if COUNT % 4 == 0 and ALIGN >= 16 else (2 if COUNT % 2 == 0 and ALIGN >= 8 else 1)
    )
    if _INTERPRET:
        words = ()
        for i in tl.static_range(COUNT):
            words = words + (tl.load(pointers.to(tl.pointer_type(tl.uint32)) + i),)
    elif COUNT == 1:
        words = (
            tl.inline_asm_elementwise(
                _load_asm(1, 1, EARLY),
                "=r,l",
                [pointers.to(tl.int64)],
                dtype=tl.uint32,
                is_pure=not EARLY,
                pack=1,
            ),
        )
    else:
        words = tl.inline_asm_elementwise(
            _load_asm(COUNT, VECTOR, EARLY),
            _outputs("r", COUNT) + ",l",
            [pointers.to(tl.int64)],
            dtype=dtypes(tl.uint32, COUNT),
            is_pure=not EARLY,
            pack=1,
        )
    return words


@triton.jit
def hold_loads(thread):
    """Have the EARLY loads before this issued before it.

    ptxas else moves loads down to where they cost fewest registers, and what uses them waits for memory. A
    load may not pass a barrier of its warp, behind which others might write, unless it is of the path (.nc)
    for what nobody writes.
    """
    if not _INTERPRET:
        tl.inline_asm_elementwise(
            "bar.warp.sync 0xffffffff; mov.b32 $0, $1;",
            "=r,r",
            [thread],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.constexpr_function
def _store_asm(count, vector):
    """PTX that stores `count` words, $3 and on, to [$1] and on, `vector` at a time, where $2 is not 0."""
    lines = ["{.reg .pred kept;\nsetp.ne.b32 kept, $2, 0;"]
    for first in range(0, count, vector):
        words = ", ".join(f"${3 + first + i}" for i in range(vector))
        width = f".v{vector}" if vector > 1 else ""
        operand = f"{{{words}}}" if vector > 1 else words
        lines.append(f"@kept st.global{width}.b32 [$1 + {4 * first}], {operand};")
    return "\n".join([*lines, "mov.u32 $0, 0;\n}"])


@triton.constexpr_function
def _inputs(kind, count):
    return f",{kind}" * count


@triton.jit
def store_words(pointers, words, kept, ALIGN: tl.constexpr):
    """Store a tuple of 32-bit words, uint32, from each thread's pointer on, where `kept`.

    ALIGN: bytes that every pointer is a multiple of, at least 4.
    """
    COUNT: tl.constexpr = len(words)
    if _INTERPRET:
        for i in tl.static_range(COUNT):
            tl.store(pointers.to(tl.pointer_type(tl.uint32)) + i, words[i], mask=kept)
    else:
        VECTOR: tl.constexpr = (
            4 if COUNT % 4 == 0 and ALIGN >= 16 else (2 if COUNT % 2 == 0 and ALIGN >= 8 else 1)
        )
        tl.inline_asm_elementwise(
            _store_asm(COUNT, VECTOR),
            "=r,l,r" + _inputs("r", COUNT),
            (pointers.to(tl.int64), kept.to(tl.int32)) + words,
            dtype=tl.uint32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def store_half(pointers, value, kept):
    """Store value, float32, rounded to nearest even, where each thread's pointer to a 16-bit float points.

    kept: of which threads.
    """
    DTYPE: tl.constexpr = pointers.dtype.element_ty
    word = pack_halves(value, value, DTYPE)
    if _INTERPRET:
        tl.store(pointers.to(tl.pointer_type(tl.uint16)), word.to(tl.uint16), mask=kept)
    else:
        tl.inline_asm_elementwise(
            "{.reg .pred kept;\n.reg .b16 half;\nsetp.ne.b32 kept, $2, 0;\ncvt.u16.u32 half, $3;\n"
            "@kept st.global.b16 [$1], half;\nmov.u32 $0, 0;\n}",
            "=r,l,r,r",
            [pointers.to(tl.int64), kept.to(tl.int32), word],
            dtype=tl.uint32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def shuffle_xor(x, MASK: tl.constexpr):
    """x, float32, of the lane whose number differs in the bits of MASK."""
    if _INTERPRET:
        return tl.gather(x, tl.arange(0, x.shape[0]) ^ MASK, 0)
    else:
        return tl.inline_asm_elementwise(
            _shuffle_asm("bfly", MASK), "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1
        )


@triton.constexpr_function
def _shuffle_asm(mode, operand):
    return f"shfl.sync.{mode}.b32 $0, $1, {operand}, 0x1f, 0xffffffff;"


@triton.jit
def shuffle_up(x, DELTA: tl.constexpr):
    """x, uint32, of the lane DELTA before; the lane's own in a warp's first DELTA lanes."""
    if _INTERPRET:
        thread = tl.arange(0, x.shape[0])
        return tl.gather(x, tl.where(thread % 32 >= DELTA, thread - DELTA, thread), 0)
    else:
        return tl.inline_asm_elementwise(
            f"shfl.sync.up.b32 $0, $1, {DELTA}, 0, 0xffffffff;",
            "=r,r", [x], dtype=tl.uint32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def shuffle_from(x, lane):
    """x, float32, of the given lane, int32, of each thread's warp."""
    if _INTERPRET:
        return tl.gather(x, tl.arange(0, x.shape[0]) // 32 * 32 + lane, 0)
    else:
        return tl.inline_asm_elementwise(
            _shuffle_asm("idx", "$2"), "=f,f,r", [x, lane], dtype=tl.float32, is_pure=False, pack=1
        )


@triton.jit
def shuffle_int(x, lane):
    """x, int32, of one lane, the same for all threads, of each thread's warp."""
    return shuffle_from(x.to(tl.float32, bitcast=True), x * 0 + lane).to(tl.int32, bitcast=True)


@triton.jit
def for_maximum(x):
    """x, float32, of which tl.maximum shall leave NaN out, as PTX's max does.

    The interpreter of Triton 3.6 and 3.7 would pass NaN on, so there it is -inf.
    """
    if _INTERPRET:
        return tl.where(x == x, x, float("-inf"))
    else:
        return x


@triton.jit
def max_over_groups(x):
    """The maximum over the eight lanes of each place."""
    x = tl.maximum(x, shuffle_xor(x, 4))
    x = tl.maximum(x, shuffle_xor(x, 8))
    return tl.maximum(x, shuffle_xor(x, 16))


@triton.jit
def sum_over_groups(x):
    """The sum over the eight lanes of each place."""
    x += shuffle_xor(x, 4)
    x += shuffle_xor(x, 8)
    return x + shuffle_xor(x, 16)


@triton.jit
def follow_maximum(outs, totals, peaks, tops, MARGIN: tl.constexpr):
    """Let running maxima of a warp's queries follow what they see, and rescale what these have summed up.

    outs: for each set of queries, one a place, as many tuples of four float32, outputs of the lane's query.
    totals, peaks, for each set: float32, the sum of weights that this lane has seen, and the maximum, in
    powers of two, that they are relative to, the same for the query's eight lanes. tops, likewise: the
    largest logit that this lane has now seen. Returns the first three. Nothing changes while no logit of the
    warp is 2**MARGIN times above its query's maximum; so weights may be that large (FlashAttention 4 does
    so).
    """
    SETS: tl.constexpr = len(peaks)
    COUNT: tl.constexpr = 4 * len(outs) // SETS
    if _INTERPRET:
        WARPS: tl.constexpr = tops[0].shape[0] // 32
        over = tops[0] > peaks[0] + MARGIN
        for k in tl.static_range(1, SETS):
            over = over | (tops[k] > peaks[k] + MARGIN)
        over = tl.reshape(over.to(tl.int32), [WARPS, 32])
        over = tl.reshape(tl.broadcast_to(tl.max(over, axis=1)[:, None], [WARPS, 32]), tops[0].shape) > 0
        scaled = ()
        new_totals = ()
        new_peaks = ()
        for k in tl.static_range(SETS):
            peak = tl.where(over, tl.maximum(peaks[k], max_over_groups(tops[k])), peaks[k])
            decay = tl.where(peak == peaks[k], 1.0, tl.exp2(peaks[k] - peak))
            for i in tl.static_range(COUNT // 4):
                out = outs[k * (COUNT // 4) + i]
                scaled = scaled + ((out[0] * decay, out[1] * decay, out[2] * decay, out[3] * decay),)
            new_totals = new_totals + (totals[k] * decay,)
            new_peaks = new_peaks + (peak,)
        return scaled, new_totals, new_peaks
    else:
        flat = ()
        for i in tl.static_range(len(outs)):
            flat = flat + outs[i]
        STATE: tl.constexpr = SETS * (COUNT + 2)
        done = tl.inline_asm_elementwise(
            _follow_asm(SETS, COUNT, MARGIN),
            _outputs("f", STATE) + _tied(STATE) + _inputs("f", SETS),
            flat + totals + peaks + tops,
            dtype=dtypes(tl.float32, STATE),
            is_pure=True,
            pack=1,
        )
        scaled = ()
        for i in tl.static_range(len(outs)):
            scaled = scaled + (done[4 * i : 4 * i + 4],)
        return scaled, done[SETS * COUNT : SETS * COUNT + SETS], done[SETS * COUNT + SETS : STATE]


@triton.constexpr_function
def _tied(count):
    return "".join(f",{i}" for i in range(count))


@triton.constexpr_function
def _follow_asm(sets, count, margin):
    totals, peaks = sets * count, sets * count + sets
    tops = 2 * (peaks + sets)
    lines = ["{.reg .pred over, same;\n.reg .f32 limit, high, other, decay;"]
    for k in range(sets):
        lines.append(f"add.f32 limit, ${peaks + k}, {float(margin)};")
        lines.append(f"setp.gt{'.or' if k else ''}.f32 over, ${tops + k}, limit{', over' if k else ''};")
    lines.append("vote.sync.any.pred over, over, 0xffffffff;\n@!over bra DONE;")
    for k in range(sets):
        peak = f"${peaks + k}"
        lines.append(f"max.f32 high, {peak}, ${tops + k};")
        for mask in (4, 8, 16):
            lines.append(
                f"shfl.sync.bfly.b32 other, high, {mask}, 0x1f, 0xffffffff;\nmax.f32 high, high, other;"
            )
        lines += [
            # A query that has seen nothing yet would subtract infinities.
            f"setp.eq.f32 same, {peak}, high;\nsub.f32 decay, {peak}, high;",
            "ex2.approx.ftz.f32 decay, decay;",
            f"@same mov.f32 decay, 0f3F800000;\nmov.f32 {peak}, high;",
        ]
        lines += [f"mul.f32 ${i}, ${i}, decay;" for i in (*range(k * count, (k + 1) * count), totals + k)]
    return "\n".join([*lines, "DONE:\n}"])


@triton.jit
def hadamard(values, lane, FIRST_MASK: tl.constexpr, LAST_MASK: tl.constexpr):
    """A vector times Sylvester's matrix of +-1, its 2**k elements spread over registers and lanes.

    values: a tuple of float32, the registers, which are the index's lower bits in any order; the lane
    bits FIRST_MASK to LAST_MASK are its other bits.
    """
    COUNT: tl.constexpr = len(values)
    for stage in tl.static_range(0, 7):
        if 1 << stage < COUNT:
            mixed = ()
            for i in tl.static_range(COUNT):
                other = values[i ^ (1 << stage)]
                mixed = mixed + (other - values[i] if i & (1 << stage) else values[i] + other,)
            values = mixed
    for stage in tl.static_range(0, 5):
        if 1 << stage >= FIRST_MASK and 1 << stage <= LAST_MASK:
            sign = tl.where((lane & (1 << stage)) == 0, 1.0, -1.0)
            mixed = ()
            for i in tl.static_range(COUNT):
                mixed = mixed + (values[i] * sign + shuffle_xor(values[i], 1 << stage),)
            values = mixed
    return values


@triton.jit
def funnel(low, high, shift):
    """32 bits, from bit `shift` (0 to 31) on, of two words, uint32."""
    if _INTERPRET:
        return (low >> shift) | ((high << 1) << (31 - shift))
    else:
        return tl.inline_asm_elementwise(
            "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, shift],
            dtype=tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def unpack_halves(word, DTYPE: tl.constexpr):
    """The two 16-bit floats of a 32-bit word, low one first, in float32."""
    low = (word & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
    high = (word >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _half(x, DTYPE: tl.constexpr):
    """x, float32, as a 16-bit float in the low bits of a uint32, rounded to nearest even."""
    if tl.bfloat16 == DTYPE:
        # The interpreter's own conversion cuts off.
        bits = x.to(tl.uint32, bitcast=True)
        return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    else:
        return x.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def pack_halves(low, high, DTYPE: tl.constexpr):
    """Two float32 rounded to 16-bit floats in one uint32, the first in the low half."""
    if _INTERPRET:
        return _half(low, DTYPE) | (_half(high, DTYPE) << 16)
    else:
        return tl.inline_asm_elementwise(
            f"cvt.rn.{_short_name(DTYPE)}x2.f32 $0, $2, $1;",
            "=r,f,f",
            [low, high],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def transpose_halves(word):
    """The transpose of each warp's 8 x 8 matrix of halves: a lane has columns 2t and 2t + 1 of row g."""
    if _INTERPRET:
        WARPS: tl.constexpr = word.shape[0] // 32
        matrix = tl.reshape(tl.join(word & 0xFFFF, word >> 16), [WARPS, 8, 8])
        low, high = tl.split(tl.reshape(tl.permute(matrix, (0, 2, 1)), [WARPS * 32, 2]))
        return low | (high << 16)
    else:
        return tl.inline_asm_elementwise(
            "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [word],
            dtype=tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def place_half(word, HALF: tl.constexpr, upper):
    """Half HALF, 0 or 1, of a word, uint32, as its upper or lower half; the other is 0."""
    if _INTERPRET:
        half = (word >> (16 * HALF)) & 0xFFFF
        return tl.where(upper, half << 16, half)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, $2;", "=r,r,r",
            [word, tl.where(upper, 0x3244 if HALF else 0x1044, 0x4432 if HALF else 0x4410)],
            dtype=tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def join_halves(first, second, HALF: tl.constexpr):
    """Half HALF, 0 or 1, of each of two words, uint32, as the lower and the upper half of one."""
    if _INTERPRET:
        return ((first >> (16 * HALF)) & 0xFFFF) | (((second >> (16 * HALF)) & 0xFFFF) << 16)
    else:
        return _permute(first, second, 0x7632 if HALF else 0x5410)


@triton.jit
def scale_halves(word, EXPONENT: tl.constexpr, DTYPE: tl.constexpr):
    """The two 16-bit floats of a 32-bit word, subnormal ones too, times 2**EXPONENT."""
    if _INTERPRET:
        low, high = unpack_halves(word, DTYPE)
        factor: tl.constexpr = 2.0**EXPONENT
        return pack_halves(low * factor, high * factor, DTYPE)
    else:
        return tl.inline_asm_elementwise(
            _scale_asm(EXPONENT, DTYPE), "=r,r", [word], dtype=tl.uint32, is_pure=True, pack=1
        )


@triton.constexpr_function
def _scale_asm(exponent, dtype):
    bits = (exponent + 127) << 7 if dtype == tl.bfloat16 else (exponent + 15) << 10
    # SM 80 multiplies two bfloat16 at once only where it also adds: -0, which changes no product.
    return (
        f"{{.reg .b32 factor, zero;\nmov.b32 factor, {bits << 16 | bits};\nmov.b32 zero, 0x80008000;\n"
        f"fma.rn.{_short_name(dtype)}x2 $0, $1, factor, zero;}}"
    )


@triton.jit
def spread_bytes(low, LOW_BYTE: tl.constexpr, high, HIGH_BYTE: tl.constexpr):
    """A byte of each of two words, uint32, as the upper bytes of the halves of one.

    The lower bytes are of no use.
    """
    if _INTERPRET:
        return (((low >> (8 * LOW_BYTE)) & 0xFF) << 8) | (((high >> (8 * HIGH_BYTE)) & 0xFF) << 24)
    else:
        return _permute(low, high, 0x4400 + 0x0011 * LOW_BYTE + 0x1100 * HIGH_BYTE)


@triton.jit
def upper_bytes(words):
    """The uppermost bytes of 2 or 4 words, uint32, as the upper bytes of one, the first word's lowest."""
    COUNT: tl.constexpr = len(words)
    if _INTERPRET:
        both = words[0] & 0
        for i in tl.static_range(COUNT):
            both |= (words[i] >> 24) << (8 * (4 - COUNT + i))
        return both
    elif COUNT == 2:
        return _permute(words[0], words[1], 0x7300)
    else:
        low = _permute(words[0], words[1], 0x0073)
        return _permute(low, _permute(words[2], words[3], 0x7300), 0x7610)


@triton.jit
def _permute(low, high, SELECTOR: tl.constexpr):
    return tl.inline_asm_elementwise(
        f"prmt.b32 $0, $1, $2, {SELECTOR};", "=r,r,r", [low, high], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.constexpr_function
def _short_name(dtype):
    return "bf16" if dtype == tl.bfloat16 else "f16"


@triton.jit
def _fragment(low, high, DTYPE: tl.constexpr):
    """float32 [warps, 8, 16] of the two registers that hold columns 0-7 and 8-15 of eight rows."""
    WARPS: tl.constexpr = low.shape[0] // 32
    first, second = unpack_halves(low, DTYPE)
    left = tl.reshape(tl.join(first, second), [WARPS, 8, 8])
    first, second = unpack_halves(high, DTYPE)
    right = tl.reshape(tl.join(first, second), [WARPS, 8, 8])
    return tl.reshape(tl.permute(tl.join(left, right), (0, 1, 3, 2)), [WARPS, 8, 16])


@triton.jit
def _product(rows, columns):
    """Registers (columns 2t and 2t + 1 of row g) of rows [warps, 8, 16] times columns [warps, 8, 16]."""
    WARPS: tl.constexpr = rows.shape[0]
    product = tl.sum(rows[:, :, None, :] * columns[:, None, :, :], axis=3)
    even, odd = tl.split(tl.reshape(product, [WARPS, 8, 4, 2]))
    return tl.reshape(even, [WARPS * 32]), tl.reshape(odd, [WARPS * 32])


@triton.jit
def mma(c, a, b, DTYPE: tl.constexpr):
    """A warp's matrix product c + a @ b: [16, 16] by [16, 8], as PTX's mma.m16n8k16 lays it out.

    c: four float32, columns 2t and 2t + 1 of rows g and g + 8. a: four uint32 of two DTYPE each, columns
    2t, 2t + 1 of rows g and g + 8, then columns 2t + 8, 2t + 9 of both. b: two, rows 2t, 2t + 1 and
    2t + 8, 2t + 9 of column g.
    """
    if _INTERPRET:
        columns = _fragment(b[0], b[1], DTYPE)
        upper = _product(_fragment(a[0], a[2], DTYPE), columns)
        lower = _product(_fragment(a[1], a[3], DTYPE), columns)
        return (c[0] + upper[0], c[1] + upper[1], c[2] + lower[0], c[3] + lower[1])
    else:
        return tl.inline_asm_elementwise(
            _mma_asm(_short_name(DTYPE)),
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], c[2], c[3]],
            dtype=dtypes(tl.float32, 4),
            is_pure=True,
            pack=1,
        )


@triton.constexpr_function
def _mma_asm(kind):
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )


@triton.constexpr_function
def _exchanged_at_once(registers, warps):
    """How many of so many registers `sum_over_warps` exchanges at once."""
    return min(registers, max(32, warps))


@triton.constexpr_function
def exchange_bytes(registers, warps):
    """Shared memory that `of_all_warps` and `sum_over_warps` of so many registers take."""
    return _exchanged_at_once(registers, warps) * warps * 128


@triton.constexpr_function
def _open_asm(size):
    return f".shared .align 128 .b8 lane_table[{size}];\nmov.u32 $0, lane_table;"


@triton.constexpr_function
def _at(instruction, first, operand=1):
    """PTX of an instruction on shared memory; `[at]` in it stands for $operand bytes after `first`."""
    dynamic = first >= DYNAMIC.value
    memory = "global_smem" if dynamic else "lane_table"
    instruction = instruction.replace("[at]", f"[at + {first - DYNAMIC.value if dynamic else first}]")
    return f"{{.reg .b32 at;\nmov.u32 at, {memory};\nadd.u32 at, at, ${operand};\n{instruction}}}"


@triton.jit
def open_shared(threads, BYTES: tl.constexpr):
    """Static shared memory, for tables and for exchanges between warps; once a kernel."""
    if BYTES > 0 and not _INTERPRET:
        tl.static_assert(BYTES <= SHARED_BYTES)
        tl.inline_asm_elementwise(_open_asm(BYTES), "=r,r", [threads], dtype=tl.uint32, is_pure=False, pack=1)


@triton.jit
def reserve_dynamic(threads, BYTES: tl.constexpr, never, nowhere):
    """Dynamic shared memory of BYTES, a power of two, for a table.

    Triton asks for as much as its own operations need, and this one, where `never` is false, needs it
    without being run. What Triton then does in it must come after the table's last use and a barrier.
    nowhere: a pointer to int32.
    """
    if BYTES > 0 and not _INTERPRET:
        if never:
            tl.store(nowhere + threads, tl.gather(tl.arange(0, BYTES // 4), threads, 0))


@triton.constexpr_function
def entry_place(copies):
    """The bit that a table's index starts from in the `field` of `look_up`."""
    return (4 * copies).bit_length() - 1


@triton.jit
def fill_table(threads, words, FIRST: tl.constexpr, COUNT: tl.constexpr, COPIES: tl.constexpr):
    """Copy COUNT words from global memory to a table, each COPIES times in a row.

    FIRST: a place in shared memory. With 32 copies every lane of a warp reads a bank of its own; with 16,
    two share one. A tl.debug_barrier() must follow before a look_up.
    """
    if not _INTERPRET:
        THREADS: tl.constexpr = threads.shape[0]
        # Threads write 16 bytes each.
        PARTS: tl.constexpr = COPIES // 4
        for start in tl.static_range(0, COUNT * PARTS, THREADS):
            entry = tl.minimum((start + threads) // PARTS, COUNT - 1)
            word = load_words(words + entry, 1, 4)[0]
            address = entry * (4 * COPIES) + threads % PARTS * 16
            tl.inline_asm_elementwise(
                _at("st.shared.v4.b32 [at], {$2, $2, $2, $2};\nmov.u32 $0, 0;", FIRST),
                "=r,r,r",
                [address, word],
                dtype=tl.uint32,
                is_pure=False,
                pack=1,
            )


@triton.jit
def look_up(words, FIRST: tl.constexpr, COPIES: tl.constexpr, field, lane):
    """An entry of the table that fill_table(_, words, FIRST, _, COPIES) wrote, as uint32.

    field: uint32, the index times 4 * COPIES, which bits of codes need one shift and one mask to become.
    """
    if _INTERPRET:
        return tl.load(words + (field >> entry_place(COPIES)).to(tl.int32)).to(tl.uint32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            _at("ld.shared.b32 $0, [at];", FIRST), "=r,r",
            [field | (lane % COPIES * 4).to(tl.uint32)],
            dtype=tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _put(address, value, FIRST: tl.constexpr):
    tl.inline_asm_elementwise(
        _at("st.shared.f32 [at], $2;\nmov.u32 $0, 0;", FIRST),
        "=r,r,f",
        [address, value],
        dtype=tl.uint32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _get(address, FIRST: tl.constexpr):
    return tl.inline_asm_elementwise(
        _at("ld.shared.f32 $0, [at];", FIRST),
        "=f,r",
        [address],
        dtype=tl.float32,
        is_pure=False,
        pack=1,
    )


@triton.constexpr_function
def words_bytes(tiles, count):
    """Shared memory that `put_words` of so many tiles of `count` words takes."""
    return tiles * count * 128


@triton.constexpr_function
def words_at_once(count):
    """How many of `count` words, an even number, `get_words` loads."""
    return 4 if count % 4 == 0 else 2


@triton.jit
def put_words(words, thread, tile, FIRST: tl.constexpr):
    """Keep, in shared memory from FIRST on, a tuple of words, uint32, of each lane of a tile.

    tile: int32, each warp's; of equal ones, any may be kept. A tl.debug_barrier() must follow before a
    get_words.
    """
    if not _INTERPRET:
        COUNT: tl.constexpr = len(words)
        VECTOR: tl.constexpr = words_at_once(COUNT)
        place = tile * (COUNT * 128) + thread % 32 * (4 * VECTOR)
        for i in tl.static_range(COUNT // VECTOR):
            tl.inline_asm_elementwise(
                _at(_shared_asm("st", VECTOR), FIRST + 128 * VECTOR * i),
                "=r,r" + _inputs("r", VECTOR),
                (place,) + words[i * VECTOR : (i + 1) * VECTOR],
                dtype=tl.uint32,
                is_pure=False,
                pack=1,
            )


@triton.constexpr_function
def _shared_asm(operation, vector):
    """PTX that stores words $2 and on at [at], or loads words $0 and on from there."""
    if operation == "st":
        words = ", ".join(f"${2 + i}" for i in range(vector))
        return f"st.shared.v{vector}.b32 [at], {{{words}}};\nmov.u32 $0, 0;"
    words = ", ".join(f"${i}" for i in range(vector))
    return f"ld.shared.v{vector}.b32 {{{words}}}, [at];"


@triton.jit
def get_words(words, lane, TILE: tl.constexpr, PART: tl.constexpr, COUNT: tl.constexpr, FIRST: tl.constexpr):
    """The PART-th `words_at_once(COUNT)` of the COUNT words that put_words(words, ...) kept of a tile's lane.

    Warp TILE has put them.
    """
    VECTOR: tl.constexpr = words_at_once(COUNT)
    if _INTERPRET:
        found = ()
        for i in tl.static_range(VECTOR):
            found = found + (tl.gather(words[PART * VECTOR + i], TILE * 32 + lane, 0),)
        return found
    else:
        return tl.inline_asm_elementwise(
            _at(_shared_asm("ld", VECTOR), FIRST + 128 * (TILE * COUNT + VECTOR * PART), VECTOR),
            _outputs("r", VECTOR) + ",r",
            [lane * (4 * VECTOR)],
            dtype=dtypes(tl.uint32, VECTOR),
            is_pure=False,
            pack=1,
        )


@triton.constexpr_function
def bonus_bytes(warps, sets):
    """Shared memory that `put_bonuses` takes."""
    return warps * 16 * sets * 16


@triton.jit
def put_bonuses(values, thread, SETS: tl.constexpr, FIRST: tl.constexpr):
    """Keep, in shared memory from FIRST on, 16 rows a warp of numbers for queries.

    values: float32, for each two sets two of row 16 * warp + g and two of 8 more, as `mma` has them, of
    queries `member`. A tl.debug_barrier() must follow before a get_bonus.
    """
    if not _INTERPRET:
        lane = thread % 32
        place = (thread // 32 * (16 * SETS) + lane // 4 * SETS) * 16 + lane % 4 * 4
        for half in tl.static_range(2):
            for k in tl.static_range(SETS):
                _put(place, values[k // 2][2 * half + k % 2], FIRST + (8 * SETS * half + k) * 16)


@triton.jit
def get_bonus(values, row, thread, SET: tl.constexpr, SETS: tl.constexpr, FIRST: tl.constexpr):
    """What put_bonuses(values, ...) kept in each thread's row for query `member` of a set."""
    if _INTERPRET:
        source = row // 16 * 32 + row % 8 * 4 + thread % 4
        own = values[SET // 2]
        upper, lower = tl.gather(own[SET % 2], source, 0), tl.gather(own[2 + SET % 2], source, 0)
        return tl.where(row % 16 < 8, upper, lower)
    else:
        return _get(row * (SETS * 16) + thread % 4 * 4, FIRST + SET * 16)


@triton.jit
def of_all_warps(x, thread, FIRST: tl.constexpr):
    """x, float32, of the same lane of each warp, as a tuple; shared memory from FIRST on must be free."""
    WARPS: tl.constexpr = thread.shape[0] // 32
    values = ()
    if _INTERPRET:
        table = tl.reshape(x, [WARPS, 32])
        warp = tl.arange(0, WARPS)[:, None]
        for i in tl.static_range(WARPS):
            own = tl.sum(tl.where(warp == i, table, 0.0), axis=0)
            values = values + (tl.reshape(tl.broadcast_to(own[None, :], [WARPS, 32]), [WARPS * 32]),)
    else:
        tl.debug_barrier()
        _put(thread * 4, x, FIRST)
        tl.debug_barrier()
        for i in tl.static_range(WARPS):
            values = values + (_get(i * 128 + thread % 32 * 4, FIRST),)
    return values


@triton.jit
def sum_over_warps(values, thread, FIRST: tl.constexpr):
    """The sums over warps of a tuple of float32, of the same lanes; shared memory from FIRST on must be free.

    Register i of thread (warp, lane) of the result, a tuple, is the sum of value i * warps + warp.
    """
    WARPS: tl.constexpr = thread.shape[0] // 32
    COUNT: tl.constexpr = len(values)
    tl.static_assert(COUNT // WARPS * WARPS == COUNT)
    warp = thread // 32
    if _INTERPRET:
        sums = ()
        for i in tl.static_range(COUNT // WARPS):
            register = tl.zeros(thread.shape, tl.float32)
            for w in tl.static_range(WARPS):
                own = tl.sum(tl.reshape(values[i * WARPS + w], [WARPS, 32]), axis=0)
                own = tl.reshape(tl.broadcast_to(own[None, :], [WARPS, 32]), [WARPS * 32])
                register = tl.where(warp == w, own, register)
            sums = sums + (register,)
    else:
        AT_ONCE: tl.constexpr = _exchanged_at_once(COUNT, WARPS)
        sums = ()
        for first in tl.static_range(0, COUNT, AT_ONCE):
            tl.debug_barrier()
            for i in tl.static_range(AT_ONCE):
                _put(i * (WARPS * 128) + thread * 4, values[first + i], FIRST)
            tl.debug_barrier()
            for i in tl.static_range(AT_ONCE // WARPS):
                place = (i * WARPS + warp) * (WARPS * 128) + thread % 32 * 4
                register = _get(place, FIRST)
                for w in tl.static_range(1, WARPS):
                    register += _get(place + w * 128, FIRST)
                sums = sums + (register,)
    return sums
