"""Every way to store a vector that the distortion table compares: ours, its sources', and vLLM's others.

A peer turns vectors float32 [n, d] into what would be read back, and counts the bits it stores, scales,
zero points and norms included. Rotated peers share the codec's own rotation, so that the codes alone
differ. Peers are written from their papers or from vLLM's kernels and use nothing of our codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from vllm_polarquant.codec import PolarQuant, rotation
from vllm_polarquant.format import BITS, SCALAR_BITS

GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))
PAPER_BLOCK, PAPER_BITS = 16, (4, 2, 2, 2)
FLOAT16_BITS = 16
QJL_SEED = 7

Gain = Literal["norm", "fit"]


@dataclass(frozen=True)
class Peer:
    """One way to store a vector.

    name: as the table shows it.
    code_bits: bits of codes a coordinate, by d.
    vector_bits: bits of radii, norms, scales and zero points a vector, by d.
    roundtrip: vectors float32 [n, d] -> what is read back, float32 [n, d].
    supports: whether the layout exists for vectors of size d.
    """

    name: str
    code_bits: Callable[[int], float]
    vector_bits: Callable[[int], float]
    roundtrip: Callable[[torch.Tensor], torch.Tensor]
    supports: Callable[[int], bool] = lambda d: True

    def overhead(self, d: int) -> float:
        """Bits a coordinate that are not codes."""
        return self.vector_bits(d) / d

    def stored_bits(self, d: int) -> float:
        """All bits a coordinate."""
        return self.code_bits(d) + self.overhead(d)


def _rotated(roundtrip: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def through(x: torch.Tensor) -> torch.Tensor:
        turn = rotation(x.shape[-1]).to(x)
        return roundtrip(x @ turn.T) @ turn

    return through


def _half(x: torch.Tensor) -> torch.Tensor:
    return x.half().float()


def _restore_length(x: torch.Tensor, decoded: torch.Tensor, gain: Gain) -> torch.Tensor:
    """Scale decoded [n, d] by one float16 a vector, to the norm of x or to the least squared error."""
    square = decoded.square().sum(-1)
    radius = x.norm(dim=-1) / square.sqrt() if gain == "norm" else (x * decoded).sum(-1) / square
    return decoded * _half(radius)[:, None]


def _unit_variance(x: torch.Tensor) -> torch.Tensor:
    return x * (math.sqrt(x.shape[-1]) / x.norm(dim=-1, keepdim=True))


def _nearest_on_line(x: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    return points[torch.bucketize(x, (points[:-1] + points[1:]) / 2)]


@cache
def lloyd_max(bits: int) -> torch.Tensor:
    """The best 2**bits points for one standard Gaussian coordinate (Max 1960, Lloyd 1982), float32."""
    points = torch.special.ndtri((torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
    for _ in range(4000):
        edge = torch.cat(
            [points.new_tensor([-40.0]), (points[:-1] + points[1:]) / 2, points.new_tensor([40.0])]
        )
        density = (-edge.square() / 2).exp() / math.sqrt(2 * math.pi)
        mass = torch.special.ndtr(edge).diff()
        points = -density.diff() / mass
    return points.float()


def _lloyd_max(bits: int, gain: Gain) -> Callable[[torch.Tensor], torch.Tensor]:
    def roundtrip(x: torch.Tensor) -> torch.Tensor:
        return _restore_length(x, _nearest_on_line(_unit_variance(x), lloyd_max(bits)), gain)

    return _rotated(roundtrip)


def qjl(x: torch.Tensor, bits: int, seed: int = QJL_SEED) -> torch.Tensor:
    """Lloyd-Max of one bit less, and the signs of a Gaussian projection S of what is left, x [n, d].

    The residual is estimated by sqrt(pi/2) / d * |residual| * S^T sign(S residual), with which inner
    products are unbiased over S (Zandieh et al. 2024, arXiv 2406.03482).
    """
    d = x.shape[-1]
    project = torch.randn(d, d, generator=torch.Generator().manual_seed(seed))
    # No refit of the length: the residual is to carry what the first stage loses.
    norm = _half(x.norm(dim=-1, keepdim=True)) / math.sqrt(d)
    first = _nearest_on_line(_unit_variance(x), lloyd_max(bits - 1)) * norm
    residual = x - first
    length = _half(residual.norm(dim=-1, keepdim=True))
    return first + (residual @ project.T).sign() @ project * (length * math.sqrt(math.pi / 2) / d)


@cache
def spiral(pair_bits: int) -> torch.Tensor:
    """The memoryless golden-angle spiral code of two Gaussian coordinates, float32 [2**pair_bits, 2].

    Point t of n stands at angle t * GOLDEN_ANGLE. Its radius starts where a share (t + 1/2) / n of the
    best point density lies inside, and Lloyd's iteration moves it along its ray to its cell's centroid.
    """
    n, rings, phases = 2**pair_bits, 160, 161
    ring = torch.arange(rings, dtype=torch.float64)
    length = (-2 * torch.log(1 - (ring + 0.5) / rings)).sqrt()
    angle = torch.arange(phases) * (2 * math.pi / phases) + GOLDEN_ANGLE * ring[:, None]
    sample = torch.stack([length[:, None] * angle.cos(), length[:, None] * angle.sin()], -1).view(-1, 2)
    code = torch.arange(n, dtype=torch.float64)
    ray = torch.stack([(code * GOLDEN_ANGLE).cos(), (code * GOLDEN_ANGLE).sin()], -1)
    radius = 2 * (-torch.log(1 - (code + 0.5) / n)).sqrt()
    for _ in range(40):
        points = radius[:, None] * ray
        nearest = (sample @ points.T - points.square().sum(-1) / 2).argmax(-1)
        moment = torch.zeros(n, dtype=torch.float64).index_add(0, nearest, (sample * ray[nearest]).sum(-1))
        count = torch.bincount(nearest, minlength=n)
        radius = torch.where(count > 0, moment / count.clamp_min(1), radius)
    return (radius[:, None] * ray).float()


def _spiral(bits: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def roundtrip(x: torch.Tensor) -> torch.Tensor:
        points = spiral(int(2 * bits))
        pairs = torch.stack(_unit_variance(x).chunk(2, -1), -1)
        nearest = (pairs @ points.T - points.square().sum(-1) / 2).argmax(-1)
        return _restore_length(x, points[nearest].transpose(-1, -2).flatten(-2), "fit")

    return _rotated(roundtrip)


def naive_chain(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Hyperspherical angles one after the other, each rounded to a multiple of pi / 2**bits, x [n, d].

    The last angle is an arc cosine like the others, so that the sign of the last coordinate is lost.
    """
    step = math.pi / 2**bits
    rest = x.double().square().flip(-1).cumsum(-1).flip(-1).sqrt()
    theta = (x.double() / rest)[:, :-1].clamp(-1, 1).acos()
    angle = (theta / step).round().clamp(0, 2**bits - 1) * step
    ones = angle.new_ones(len(x), 1)
    sines = torch.cat([ones, angle.sin().cumprod(-1)], -1)
    return (rest[:, :1] * sines * torch.cat([angle.cos(), ones], -1)).float()


@cache
def polar_angles(level: int, bits: int) -> torch.Tensor:
    """PolarQuant's codebook of a level's angles: float32 [2**bits], ascending.

    Angles of pairs of coordinates (level 1) are uniform over the circle. One of a higher level lies in
    [0, pi/2] between the lengths of two Gaussian vectors of 2**(level - 1) coordinates, where its density
    is proportional to sin(2 angle)**(2**(level - 1) - 1); its codebook is Lloyd's for that density
    (Han et al. 2025, arXiv 2502.02617).
    """
    if level == 1:
        return ((torch.arange(2**bits, dtype=torch.float64) + 0.5) * (2 * math.pi / 2**bits)).float()
    grid = (torch.arange(40_000, dtype=torch.float64) + 0.5) * (math.pi / 2 / 40_000)
    density = (2 * grid).sin().pow(2 ** (level - 1) - 1)
    mass, moment = density.cumsum(0), (density * grid).cumsum(0)
    share = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    points = grid[torch.searchsorted(mass, share * mass[-1])]
    for _ in range(2000):
        edge = torch.searchsorted(grid, (points[:-1] + points[1:]) / 2) - 1
        edge = torch.cat([edge, torch.tensor([len(grid) - 1])])
        inside = torch.cat([mass[edge[:1]], mass[edge].diff()])
        points = torch.cat([moment[edge[:1]], moment[edge].diff()]) / inside
    return points.float()


def polar_tree(x: torch.Tensor, level_bits: Sequence[int]) -> torch.Tensor:
    """PolarQuant's recursion on blocks of 2**len(level_bits) coordinates, one float16 radius a block."""
    block = x.unflatten(-1, (-1, 2 ** len(level_bits)))
    angles = []
    radius = block
    for level, bits in enumerate(level_bits, 1):
        left, right = radius.unflatten(-1, (-1, 2)).unbind(-1)
        angle = torch.atan2(right, left)
        points = polar_angles(level, bits)
        angles.append(_nearest_on_line(angle.remainder(2 * math.pi) if level == 1 else angle, points))
        radius = torch.hypot(left, right)
    decoded = _half(radius)
    for angle in reversed(angles):
        decoded = torch.stack([decoded * angle.cos(), decoded * angle.sin()], -1).flatten(-2)
    return decoded.flatten(-2)


def _full_tree_peer(bits: int) -> Peer:
    """The recursion down to one radius a vector, where the best level 1 has two bits more than the rest."""
    first, rest = bits + 1, bits - 1

    def roundtrip(x: torch.Tensor) -> torch.Tensor:
        return polar_tree(x, (first, *[rest] * (x.shape[-1].bit_length() - 2)))

    return Peer(
        f"polar tree, full depth, {first} {rest} {rest} {rest} ... bits",
        lambda d: (first * d / 2 + rest * (d / 2 - 1)) / d,
        _constant(FLOAT16_BITS),
        _rotated(roundtrip),
        _is_power_of_two,
    )


def _is_power_of_two(d: int) -> bool:
    return d & (d - 1) == 0


def min_max(x: torch.Tensor, bits: int, block: int | None) -> torch.Tensor:
    """Uniform steps between a block's least and largest coordinate, stored as float16 scale and zero.

    vLLM's turboquant_* stores values so, one block a vector (block None).
    """
    y = x.unflatten(-1, (-1, block or x.shape[-1]))
    low, high = y.aminmax(dim=-1, keepdim=True)
    zero, scale = _half(low), _half(((high - low) / (2**bits - 1)).clamp_min(1e-8))
    codes = ((y - zero) / scale).round().clamp(0, 2**bits - 1)
    return (codes * scale + zero).flatten(-2)


def int4_per_token_head(x: torch.Tensor) -> torch.Tensor:
    """vLLM's int4_per_token_head: a float32 scale that hides a 4-bit integer zero point, a vector."""
    low, high = x.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-6)
    zero = (-low / scale).round().clamp(0, 15)
    codes = (x / scale + zero).round().clamp(0, 15)
    kept = ((scale.view(torch.int32) & -16) | zero.int()).view(torch.float32)
    return (codes - zero) * kept


def fp8_e4m3(x: torch.Tensor) -> torch.Tensor:
    """vLLM's fp8 with its default scale, 1."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def _polarquant(bits: float) -> Peer:
    def roundtrip(x: torch.Tensor) -> torch.Tensor:
        codec = PolarQuant(x.shape[-1], bits)
        return codec.decompress(*codec.compress(x))

    def vector_bits(d: int) -> float:
        return (PolarQuant(d, bits).bits_per_element() - bits) * d

    return Peer(f"PolarQuant, {bits:g} bits (this package)", lambda d: bits, vector_bits, roundtrip)


def _constant(value: float) -> Callable[[int], float]:
    return lambda d: value


def _min_max_peers(bits: int) -> list[Peer]:
    peers = []
    for block in (16, 64, 128, None):
        where = f"blocks of {block}" if block else "one block"

        def vector_bits(d: int, block: int | None = block) -> float:
            return 2 * FLOAT16_BITS * d / (block or d)

        def supports(d: int, block: int | None = block) -> bool:
            # A block as long as the vector is the last row.
            return block is None or (d % block == 0 and block < d)

        def plain(x: torch.Tensor, block: int | None = block) -> torch.Tensor:
            return min_max(x, bits, block)

        for name, roundtrip in (("", plain), (" + Hadamard", _rotated(plain))):
            peers.append(
                Peer(f"min-max int{bits}{name}, {where}", _constant(bits), vector_bits, roundtrip, supports)
            )
    return peers


def _naive_chain_peer(bits: int) -> Peer:
    return Peer(
        f"naive chain of angles, {bits} bits",
        lambda d: bits * (d - 1) / d,
        _constant(32),
        _rotated(lambda x: naive_chain(x, bits)),
    )


def _lloyd_max_peers(bits: int) -> list[Peer]:
    radius, code = _constant(FLOAT16_BITS), _constant(bits)
    sketch = _rotated(lambda x: qjl(x, bits))
    return [
        Peer(f"Lloyd-Max {bits} bits, norm kept (TurboQuant)", code, radius, _lloyd_max(bits, "norm")),
        Peer(f"Lloyd-Max {bits} bits, least-squares norm", code, radius, _lloyd_max(bits, "fit")),
        Peer(f"Lloyd-Max {bits - 1} bits + QJL sign", code, _constant(2 * FLOAT16_BITS), sketch),
    ]


def all_peers() -> list[Peer]:
    """Every row of the table."""
    radius = _constant(FLOAT16_BITS)
    peers = [_polarquant(bits) for bits in (*BITS, SCALAR_BITS)]
    peers += [
        Peer(f"golden-angle spiral, {bits:g} bits, memoryless", _constant(bits), radius, _spiral(bits))
        for bits in (2, 2.5, 3, 3.5, 4)
    ]
    for bits in (2, 3, 4):
        peers += [*_lloyd_max_peers(bits), _full_tree_peer(bits), *_min_max_peers(bits)]
    peers += [_naive_chain_peer(bits) for bits in (2, 3, 4, 8)]
    peers += [
        Peer(
            "polar tree, blocks of 16, 4 2 2 2 bits (PolarQuant paper)",
            _constant(sum(bits / 2**level for level, bits in enumerate(PAPER_BITS, 1))),
            lambda d: FLOAT16_BITS * d / PAPER_BLOCK,
            _rotated(lambda x: polar_tree(x, PAPER_BITS)),
        ),
        Peer(
            "int4 + Hadamard (int4_per_token_head)",
            _constant(4),
            _constant(32),
            _rotated(int4_per_token_head),
        ),
        Peer("fp8 e4m3, scale 1", _constant(8), _constant(0), fp8_e4m3),
    ]
    return peers
