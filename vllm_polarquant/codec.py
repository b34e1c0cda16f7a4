"""The codec in plain torch: the ground truth that every kernel is tested against.

x [d] is rotated by a seeded orthogonal matrix and scaled to unit variance, so that its coordinates are
close to independent Gaussians whatever x was. Coordinates j and j + d/2 make a point of the plane, which
becomes one code. One radius a vector brings back its length.

The codes of a vector are a walk through a trellis (for quantisation Marcellin and Fischer 1990; read off a
window of the bit stream as in QTIP, Tseng et al. 2024): what code c[j] of w bits stands for depends on the
top b bits of the code before it, so that the codes of a vector choose among 2**b times as many points as one
code could name. With c[-1] = 0

    point[j] = codebook(w)[c[j] << b | c[j-1] >> (w - b)]

which is a window of w + b bits of the stream of codes, so a decoder reads each point on its own. The best
codes of a vector are found by Viterbi's algorithm (1967) over 2**b states. At 8 bits a coordinate,
in no preset, a trellis of scalars takes the place of all this (scalar.py).
"""

from __future__ import annotations

import json
import math
import random
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import torch

from vllm_polarquant import scalar
from vllm_polarquant.format import (
    BITS,
    CELL_CANDIDATES,
    CELL_GRID,
    CELLS_PER_UNIT,
    FAR_CELL,
    FP8_MAX,
    HEAD_DIMS,
    MIN_FIT_GAIN,
    RADIUS_BYTES,
    SCALAR_BITS,
    SEED,
    STATE_BITS,
    Slot,
    UnsupportedFormat,
    VectorFormat,
)

_ENCODE_SCRATCH = 1 << 24


class Rotation(NamedTuple):
    """The orthogonal matrix R = mixing @ diag(signs), by which a vector is rotated: ``x @ R.T``.

    mixing: H kron Q, float64 [d, d], orthogonal: H the Hadamard matrix of the largest power of two that
        divides d, Q a seeded orthogonal matrix of the odd rest (1 for powers of two).
    signs: float64 [d] of +-1.
    """

    mixing: torch.Tensor
    signs: torch.Tensor


@cache
def rotation_parts(head_dim: int, seed: int = SEED) -> Rotation:
    """The rotation of vectors of head_dim.

    Python's generator draws the numbers, as its sequence is fixed by the language and not by a library's
    version.
    """
    rng = random.Random(f"polarquant {head_dim} {seed}")
    odd = head_dim
    while odd % 2 == 0:
        odd //= 2
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] < head_dim // odd:
        hadamard = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.float64), hadamard)
    signs = torch.tensor([rng.choice((-1.0, 1.0)) for _ in range(head_dim)], dtype=torch.float64)
    normal = torch.tensor([[rng.gauss(0, 1) for _ in range(odd)] for _ in range(odd)], dtype=torch.float64)
    q, upper = torch.linalg.qr(normal)
    q = (q * upper.diagonal().sign()).contiguous()
    if odd == 1:
        signs, q = signs * q[0, 0], q.abs()
    return Rotation(torch.kron(hadamard / math.sqrt(head_dim // odd), q), signs)


def rotation(head_dim: int, seed: int = SEED) -> torch.Tensor:
    """The orthogonal matrix R, float64 [d, d]; a vector is rotated by ``x @ R.T``."""
    mixing, signs = rotation_parts(head_dim, seed)
    return mixing * signs


@cache
def codebook(pair_bits: int) -> torch.Tensor:
    """The points of a trellis, float32 [2**(w + b), 2] for w-bit codes, for coordinates of unit variance.

    Their coordinates are bfloat16 numbers, so that kernels that multiply in 16 bits lose nothing.
    codebook.py derives them.
    """
    points = json.loads((files(__package__) / "codebook.json").read_text())[str(pair_bits)]
    return torch.tensor(points, dtype=torch.float64).bfloat16().float()


def pack(codes: torch.Tensor, pair_bits: int) -> torch.Tensor:
    """Codes int [..., m] (m a multiple of 8) as a little-endian bit stream, uint8 [..., m*pair_bits/8]."""
    groups = codes.long().unflatten(-1, (-1, 8))
    shifts = torch.arange(8, device=codes.device) * pair_bits
    words = (groups << shifts).sum(-1, keepdim=True)
    out = words >> (torch.arange(pair_bits, device=codes.device) * 8)
    return (out & 0xFF).to(torch.uint8).flatten(-2)


def unpack(packed: torch.Tensor, pair_bits: int) -> torch.Tensor:
    """The inverse of `pack`: int64 [..., m]."""
    groups = packed.long().unflatten(-1, (-1, pair_bits))
    words = (groups << (torch.arange(pair_bits, device=packed.device) * 8)).sum(-1, keepdim=True)
    codes = words >> (torch.arange(8, device=packed.device) * pair_bits)
    return (codes & (2**pair_bits - 1)).flatten(-2)


def encode_radius(radius: torch.Tensor) -> torch.Tensor:
    """Radii float32 >= 0 as bfloat16 of the same shape; none becomes infinite."""
    return radius.clamp_max(torch.finfo(torch.bfloat16).max).bfloat16()


def decode_radius(radius: torch.Tensor) -> torch.Tensor:
    """The inverse of `encode_radius`, float32; whatever the sign bit says."""
    return radius.float().abs()


def windows(codes: torch.Tensor, pair_bits: int) -> torch.Tensor:
    """The place in the codebook of each code of whole vectors: int64 [..., m] of both."""
    states = STATE_BITS[pair_bits]
    before = torch.nn.functional.pad(codes, (1, 0))[..., :-1]
    return codes << states | before >> (pair_bits - states)


def viterbi(pairs: torch.Tensor, points: torch.Tensor, states: int) -> torch.Tensor:
    """The codes whose points are nearest to whole vectors, by sum of squared distances.

    pairs float32 [n, m, 2], points float32 [2**(w + b), 2], states b -> codes int64 [n, m].
    """
    step = max(1, _ENCODE_SCRATCH // (4 * len(points)))
    parts = [_viterbi(part, points, states) for part in pairs.split(step)]
    return torch.cat(parts)


def _viterbi(pairs: torch.Tensor, points: torch.Tensor, states: int) -> torch.Tensor:
    n, m, _ = pairs.shape
    half_norm = points.square().sum(-1) / 2
    row = torch.arange(n, device=pairs.device)
    # Scores are minus half the squared distance, without what all points share.
    score = torch.full((n, 1 << states), -torch.inf, device=pairs.device)
    score[:, 0] = 0
    middle, back = [], []
    for j in range(m):
        # A window is the code's top bits, its other bits, and the top bits of the code before.
        gain = (pairs[:, j] @ points.T - half_norm).unflatten(-1, (1 << states, -1, 1 << states))
        best, at = gain.max(2)
        score, before = (best + score[:, None]).max(-1)
        middle.append(at.gather(-1, before[..., None])[..., 0])
        back.append(before)
    codes = torch.empty(n, m, dtype=torch.int64, device=pairs.device)
    rest = len(points) >> (2 * states)
    state = score.argmax(-1)
    for j in reversed(range(m)):
        codes[:, j] = state * rest + middle[j][row, state]
        state = back[j][row, state]
    return codes


def _encode_polar(
    y: torch.Tensor, amax: torch.Tensor, vector: VectorFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    d = y.shape[-1]
    norm = y.norm(dim=-1).clamp_min(1e-30)
    pairs = torch.stack((y * (math.sqrt(d) / norm)[..., None]).chunk(2, -1), -1)
    points = codebook(vector.pair_bits).to(y.device)
    codes = viterbi(pairs.reshape(-1, d // 2, 2), points, vector.state_bits).view(pairs.shape[:-1])
    decoded = points[windows(codes, vector.pair_bits)]
    length = decoded.square().sum((-1, -2)).sqrt()
    cos = (decoded * pairs).sum((-1, -2)) / (length * math.sqrt(d))
    gain = torch.ones_like(norm)
    if vector.gain == "fit":
        gain = cos.clamp_min(MIN_FIT_GAIN)
    elif vector.gain == "unbiased":
        gain = 1 / cos
    return encode_radius(amax * (norm * gain / length)), pack(codes, vector.pair_bits)


def _encode_scaled(
    y: torch.Tensor, amax: torch.Tensor, vector: VectorFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of what is left over a stored radius, so that its rounding adds no error."""
    fp8 = vector.kind == "fp8"
    scale = y.abs().amax(-1) / FP8_MAX if fp8 else y.norm(dim=-1) / math.sqrt(y.shape[-1])
    radius = encode_radius(amax * scale)
    left = y * torch.where(radius > 0, amax / decode_radius(radius), 0.0)[..., None]
    if not fp8:
        return radius, scalar.search(left)
    return radius, left.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def by_largest(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., d] over its largest magnitude, and that: float32 [..., d] and [...].

    Dividing first keeps denormals and 3e38 inside float32's range. Both are 0 for a vector of zeros, and
    for one that holds a NaN or an infinity.
    """
    x = x.float()
    amax = x.abs().amax(-1)
    amax = torch.where(torch.isfinite(amax), amax, 0.0)
    usable = amax > 0
    return torch.where(usable[..., None], x / torch.where(usable, amax, 1.0)[..., None], 0.0), amax


def encode_rotated(
    y: torch.Tensor, amax: torch.Tensor, vector: VectorFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """Store vectors amax * y that are rotated already: radii bfloat16 [...], codes uint8 [..., bytes].

    y: float32 [..., d]. amax: float32 [...], finite; where it or y is 0, the zero vector is stored.
    vector: of any kind but raw.
    """
    usable = (amax > 0) & (y != 0).any(-1)
    encoder = _encode_polar if vector.kind == "polar" else _encode_scaled
    radius, codes = encoder(y, amax, vector)
    return torch.where(usable, radius, 0), torch.where(usable[..., None], codes, 0)


def encode_centred(
    y: torch.Tensor, amax: torch.Tensor, centre: torch.Tensor, vector: VectorFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """`encode_rotated` of what is shorter: amax * y, or that less its centre.

    A key mostly is its mean, which is better left out of its codes; but the first tokens' keys are short,
    and lie far from the mean. The sign bit of the radius is set where the centre was taken away.

    y, amax, vector: as for `encode_rotated`. centre: float32 [..., d], rotated; one of zeros, or one that is
        not finite, is never taken away.
    """
    # Infinite where amax is tiny: then the difference is not shorter.
    left = y - torch.where(amax > 0, 1 / amax, 0.0)[..., None] * centre
    centred = left.square().sum(-1) < y.square().sum(-1)
    radius, codes = encode_rotated(torch.where(centred[..., None], left, y), amax, vector)
    return torch.where(centred, -radius, radius), codes


def encode(x: torch.Tensor, vector: VectorFormat, seed: int = SEED) -> tuple[torch.Tensor, torch.Tensor]:
    """Store vectors: x float [..., d] -> radii bfloat16 [...], codes uint8 [..., vector.code_bytes(d)].

    A vector that holds a NaN or an infinity is stored as the zero vector: its logit is 0, its value adds
    nothing, and no other token sees it. A raw vector is stored as it is, radius 1, whatever it holds.
    """
    if vector.kind == "raw":
        return torch.ones(x.shape[:-1], dtype=torch.bfloat16, device=x.device), x.contiguous().view(
            torch.uint8
        )
    unit, amax = by_largest(x)
    return encode_rotated(unit @ rotation(x.shape[-1], seed).to(unit).T, amax, vector)


def decode_unit(codes: torch.Tensor, vector: VectorFormat, dtype: torch.dtype) -> torch.Tensor:
    """What kernels multiply: the codes' vectors before radius and rotation, float32 [..., d].

    dtype: the 16-bit float type that raw vectors were stored in; the others ignore it.
    """
    if vector.kind == "raw":
        return codes.view(dtype).float()
    if vector.kind == "fp8":
        return codes.view(torch.float8_e4m3fn).float()
    if vector.kind == "scalar":
        return scalar.values(codes)
    window = windows(unpack(codes, vector.pair_bits), vector.pair_bits)
    points = codebook(vector.pair_bits).to(codes.device)[window]
    return points.transpose(-1, -2).flatten(-2)


def decode_centred(
    radius: torch.Tensor,
    codes: torch.Tensor,
    centre: torch.Tensor,
    vector: VectorFormat,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Read what `encode_centred` stored, rotated as it is: float64 [..., d].

    centre: float [..., d], read where the radius's sign bit is set. dtype: as for `decode_unit`.
    """
    y = decode_unit(codes, vector, dtype).double() * decode_radius(radius).double()[..., None]
    return torch.where(radius.signbit()[..., None], y + centre, y)


def decode(
    radius: torch.Tensor,
    codes: torch.Tensor,
    vector: VectorFormat,
    dtype: torch.dtype = torch.float32,
    seed: int = SEED,
) -> torch.Tensor:
    """Read vectors back in their own basis: float32 [..., d]; the arguments are `encode`'s results."""
    unit = decode_unit(codes, vector, dtype)
    if vector.rotated:
        unit = unit @ rotation(unit.shape[-1], seed).to(unit)
    limit = torch.finfo(torch.float32).max
    return (unit * decode_radius(radius)[..., None]).clamp(-limit, limit)


class PolarQuant:
    """Radius and trellis codes of single vectors, as a library.

    Args:
        d: vector size, one of 64, 80, 96, 112, 128, 192, 256.
        bits: code bits a coordinate: 2, 2.5, 3, 3.5 or 4, as in the presets, or 8 (scalar.py).
        seed: of the rotation.

    Raises:
        UnsupportedFormat: for any other d or bits.
    """

    def __init__(self, d: int, bits: float, seed: int = SEED) -> None:
        if d not in HEAD_DIMS:
            raise UnsupportedFormat(f"d = {d} is not one of {', '.join(map(str, HEAD_DIMS))}")
        known = (*BITS, SCALAR_BITS)
        if bits not in known:
            raise UnsupportedFormat(f"bits = {bits} is not one of {', '.join(f'{b:g}' for b in known)}")
        self.d, self.bits, self.seed = d, float(bits), seed
        self.vector = VectorFormat("scalar" if bits == SCALAR_BITS else "polar", self.bits, "fit")
        self.code_bytes = self.vector.code_bytes(d)

    def compress(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x float [..., d] -> r bfloat16 [...], codes uint8 [..., d*bits/8]; float32 inside.

        A vector that holds a NaN or an infinity is stored as the zero vector.

        Raises:
            ValueError: if x is not floating point or its last dim is not d.
        """
        if not x.is_floating_point() or x.shape[-1:] != (self.d,):
            raise ValueError(f"expected floats [..., {self.d}], got {x.dtype} {list(x.shape)}")
        return encode(x, self.vector, self.seed)

    def decompress(self, r: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """r bfloat16 [...], codes uint8 [..., d*bits/8] -> x_hat float32 [..., d].

        Raises:
            ValueError: if the shapes or dtypes are not those that `compress` returns.
        """
        if codes.dtype != torch.uint8 or codes.shape != (*r.shape, self.code_bytes):
            raise ValueError(
                f"expected codes uint8 [..., {self.code_bytes}] and r [...], "
                f"got {codes.dtype} {list(codes.shape)} and {list(r.shape)}"
            )
        return decode(r, codes, self.vector, seed=self.seed)

    def bits_per_element(self) -> float:
        """Stored bits a coordinate, the radius counted."""
        return self.bits + 8 * RADIUS_BYTES / self.d


@cache
def search_cells(pair_bits: int) -> torch.Tensor:
    """Which of a trellis's parallel branches to try, by cell of the plane: int32 [2 * CELL_GRID**2, 2**b].

    Cell (row, column) of a grid is centred on (column, row) - CELL_GRID / 2, in cells; the grid of small
    cells is first. Field s of a cell's column n holds CELL_CANDIDATES[w] numbers of w - b bits: the middles
    of the windows (n, middle, s) whose points are nearest to the cell's centre, the nearest one lowest. Near
    a border between two points a cell may name the farther one: the codes that a search over cells finds are
    up to 1 % worse than those of `viterbi`.
    """
    states, candidates = STATE_BITS[pair_bits], CELL_CANDIDATES[pair_bits]
    points = codebook(pair_bits).double()
    line = torch.arange(CELL_GRID, dtype=torch.float64) - CELL_GRID // 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    centre = torch.stack([x, y], -1).view(-1, 2)
    centre = torch.cat([centre / CELLS_PER_UNIT, centre * (FAR_CELL / CELLS_PER_UNIT)])
    gain = centre @ points.T - points.square().sum(-1) / 2
    middle = gain.unflatten(-1, (1 << states, -1, 1 << states)).topk(candidates, dim=2).indices
    width = pair_bits - states
    shifts = torch.arange(1 << states) * candidates + torch.arange(candidates)[:, None]
    # Through uint32, as the highest bit may be set.
    return (middle << (shifts * width)).sum((-1, -2)).to(torch.uint32).view(torch.int32)


class Tables(NamedTuple):
    """The codec's constants on a device, as kernels take them.

    A key of kv head h is stored as the codes of ``(k * key_factors[h]) @ mixing.T``, and a query that reads
    it becomes ``(q * query_factors[h]) @ mixing.T``; values likewise with value_factors, and outputs
    ``(o @ mixing) * output_factors``. Keys' and queries' factors multiply to 1, as do values' and outputs'.

    From a key at position p the centre of segment ``min(p // SEGMENT, segments - 1)`` is taken away where
    that makes it shorter (`encode_centred`), and readers add it: to its logit, the product of query and
    centre. Raw keys have none.

    mixing: float32 [d, d], orthogonal: of the codec's rotation, or the identity for raw vectors.
    key_factors, query_factors: float32 [1 or kv heads, d].
    value_factors, output_factors: float32 [1, d].
    key_points, value_points: float32 [n, 2], the codebooks; [1, 2] of zeros where unused.
    key_lut, value_lut: int32 [n], the same points in the model's 16-bit float type, x in the low half
        and y in the high half, so that one load brings both coordinates of a pair.
    key_cells, value_cells: int32 [cells, states], the encoders' search_cells; [1, 1] of zeros where unused.
    centres: int32 [segments, 1 or kv heads, d / 2], rotated like keys: coordinates j in the low half and
        j + d / 2 in the high half, in the model's 16-bit float type. Zeros take nothing away.
    """

    mixing: torch.Tensor
    key_factors: torch.Tensor
    query_factors: torch.Tensor
    value_factors: torch.Tensor
    output_factors: torch.Tensor
    key_points: torch.Tensor
    value_points: torch.Tensor
    key_lut: torch.Tensor
    value_lut: torch.Tensor
    key_cells: torch.Tensor
    value_cells: torch.Tensor
    centres: torch.Tensor


def pack_centres(centres: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Tables.centres int32 [..., d / 2] of rotated centres float [..., d].

    A centre that `dtype` cannot hold, or that is not finite, becomes zeros.
    """
    rounded = centres.to(dtype)
    rounded = torch.where(rounded.isfinite().all(-1, keepdim=True), rounded, 0)
    return torch.stack(rounded.chunk(2, -1), -1).view(torch.int32)[..., 0]


def unpack_centres(words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `pack_centres`: float32 [..., d]."""
    return words[..., None].view(dtype).float().transpose(-1, -2).flatten(-2)


def tables(
    slot: Slot, dtype: torch.dtype, device: torch.device, num_kv_heads: int = 1, segments: int = 1
) -> Tables:
    """Constants of a slot for a model of `dtype` (bfloat16 or float16), new tensors on `device`.

    Factors are those of the codec's rotation, the same for all kv heads, and centres are zeros.

    num_kv_heads: rows of keys' and queries' factors, and of centres; 1 serves any number of kv heads, but
        then all factors are one tensor, which is not to be written to.
    segments: of centres.
    """
    polar = [vector.kind == "polar" for vector in (slot.key, slot.value)]
    points = [
        codebook(vector.pair_bits) if some else torch.zeros(1, 2)
        for vector, some in zip((slot.key, slot.value), polar, strict=True)
    ]
    luts = [p.to(dtype).contiguous().view(torch.int32).flatten() for p in points]
    cells = [
        search_cells(vector.pair_bits) if some else torch.zeros(1, 1, dtype=torch.int32)
        for vector, some in zip((slot.key, slot.value), polar, strict=True)
    ]
    mixing, signs = (
        rotation_parts(slot.head_dim)
        if slot.key.rotated
        else (torch.eye(slot.head_dim), torch.ones(slot.head_dim))
    )
    # One tensor of all four where heads share it: what a kernel has read of it for queries is at hand for
    # outputs.
    shared = signs.float()[None].to(device, copy=True)
    own = [shared if num_kv_heads == 1 else shared.repeat(num_kv_heads, 1) for _ in ("key", "query")]
    centres = torch.zeros(segments, num_kv_heads, slot.head_dim // 2, dtype=torch.int32, device=device)
    rest = [part.to(device, copy=True) for part in (*points, *luts, *cells)]
    mixing = mixing.float().contiguous().to(device, copy=True)
    return Tables(*[mixing, *own, shared, shared, *rest, centres])
