"""How one token of one kv head is stored: the presets, and every size that follows from them.

A slot is what one token takes in one kv head: the codes of its key, those of its value, and a radius of
each. Where slots lie in a page is page.py's matter. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FORMAT_VERSION = 4
"""Changes whenever the same bytes would decode to other vectors. Part of every cache identity."""

SEED = 42
"""Seed of the rotation that every page is written with."""

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256, 512)
BITS = (2.0, 2.5, 3.0, 3.5, 4.0)
SCALAR_BITS = 8.0
RADIUS_BYTES = 2
"""A bfloat16, which covers float32's range. The sign bit of a key's says that the key is stored less its
centre; that of a value's is free: written as 0, and no reader looks at it."""

SEGMENT = 256
"""Positions that share a centre of keys (codec.Tables.centres)."""

MIN_FIT_GAIN = 0.981
"""A least-squares radius never shortens a vector by more than this factor."""

FP8_MAX = 448.0

STATE_BITS = {4: 3, 5: 3, 6: 2, 7: 2, 8: 1}
"""How many bits of the code before a point depends on, by the bits of a pair's code (codec.py). More bits
lower the distortion, and each doubles the table of 2**(pair_bits + state_bits) points that decoding reads: up
to 512 points a multiprocessor still runs two programs at a time, which short contexts need
(docs/kernels.md)."""

CELL_CANDIDATES = {4: 1, 5: 1, 6: 1, 7: 1, 8: 2}
"""Points of each set of parallel branches that codec.search_cells names: many make for small cells."""

CELL_GRID, CELLS_PER_UNIT, FAR_CELL = 64, 8, 8
"""The encoders' kernels look up which points to try (codec.search_cells): CELL_GRID**2 square cells around
the origin, CELLS_PER_UNIT to a unit of length, and as many FAR_CELL times as wide for what lies outside."""

Kind = Literal["polar", "scalar", "fp8", "raw"]
Gain = Literal["norm", "unbiased", "fit"]


class UnsupportedFormat(ValueError):
    """A head_dim, bit width, block size or preset that no page exists for."""


@dataclass(frozen=True)
class VectorFormat:
    """How one vector (a key or a value of one head) is stored.

    kind: ``polar`` (a trellis code for each pair of coordinates j, j + d/2), ``scalar`` (one for each
        coordinate, at SCALAR_BITS; in no preset, as it has no kernels), ``fp8`` (e4m3 with the radius as
        scale) or ``raw`` (the model's own 16-bit floats; only tests use it).
    bits: stored bits a coordinate, the radius not counted.
    gain: what the radius makes of a polar vector's |x|, c being the cosine between x and its decoded
        direction. ``norm`` keeps |x|; ``unbiased`` is |x| / c, exact along x; ``fit`` is the least-squares
        |x| c, kept from losing more than 2 % of the norm.
    """

    kind: Kind
    bits: float
    gain: Gain = "norm"

    @property
    def rotated(self) -> bool:
        return self.kind != "raw"

    @property
    def pair_bits(self) -> int:
        """Bits of the code of one pair of coordinates."""
        return int(2 * self.bits)

    @property
    def state_bits(self) -> int:
        """Bits of the code before it that a pair's point depends on."""
        return STATE_BITS[self.pair_bits]

    def code_bytes(self, head_dim: int) -> int:
        """Bytes of the codes of one vector; raises UnsupportedFormat where they do not come out whole."""
        half_bits = int(2 * self.bits) * head_dim
        if half_bits % 16:
            raise UnsupportedFormat(
                f"{self.bits:g} bits x head_dim {head_dim} is not a whole number of bytes"
            )
        return half_bits // 16


def _polar(bits: float, gain: Gain = "norm") -> VectorFormat:
    return VectorFormat("polar", bits, gain)


_FP8 = VectorFormat("fp8", 8)
_RAW = VectorFormat("raw", 16)

# Keys keep their norm: a gain error moves every logit of a token. Values are averaged over many tokens,
# so at 2 bits, where a norm-preserving radius would shrink the average, they are unbiased.
PRESETS: dict[str, tuple[VectorFormat, VectorFormat]] = {
    "polarquant_k8v4": (_FP8, _polar(4)),
    "polarquant_k4v4": (_polar(4), _polar(4)),
    "polarquant_k4v3": (_polar(4), _polar(3)),
    "polarquant_k3.5v3.5": (_polar(3.5), _polar(3.5)),
    "polarquant_k3v3": (_polar(3), _polar(3)),
    "polarquant_k2.5v2.5": (_polar(2.5), _polar(2.5, "unbiased")),
    "polarquant_k3v2": (_polar(3), _polar(2, "unbiased")),
    "polarquant_k2v2": (_polar(2), _polar(2, "unbiased")),
}
DEFAULT_PRESET = "polarquant_k4v4"

LOSSLESS = "polarquant_lossless"
"""Test-only preset: 16-bit vectors in the same pages. Registered when VLLM_POLARQUANT_LOSSLESS=1."""


@dataclass(frozen=True)
class Slot:
    """What one token takes in one kv head, in a page of any size.

    Args:
        preset: a key of PRESETS, or LOSSLESS.
        head_dim: size of one head's key and value.

    Raises:
        UnsupportedFormat: naming the argument and the values that work.
    """

    preset: str
    head_dim: int
    key: VectorFormat = field(init=False)
    value: VectorFormat = field(init=False)

    def __post_init__(self) -> None:
        vectors = PRESETS.get(self.preset) or ((_RAW, _RAW) if self.preset == LOSSLESS else None)
        if vectors is None:
            raise UnsupportedFormat(f"unknown preset {self.preset!r}; choose one of {', '.join(PRESETS)}")
        if self.head_dim not in HEAD_DIMS:
            raise UnsupportedFormat(
                f"head_dim {self.head_dim} is not supported by {self.preset}; "
                f"supported: {', '.join(map(str, HEAD_DIMS))}"
            )
        object.__setattr__(self, "key", vectors[0])
        object.__setattr__(self, "value", vectors[1])

    @property
    def key_bytes(self) -> int:
        """Bytes of the codes of one key."""
        return self.key.code_bytes(self.head_dim)

    @property
    def value_bytes(self) -> int:
        """Bytes of the codes of one value."""
        return self.value.code_bytes(self.head_dim)

    @property
    def padding(self) -> int:
        """Bytes of a slot that hold nothing: of head_dim 512 as many as make it twice that of 256.

        Models have both. vLLM makes their pages equal by larger blocks of the smaller slots, which takes a
        multiple; of other sizes it leaves a part of each smaller page empty.
        """
        return 2 * RADIUS_BYTES if self.head_dim == 512 else 0

    @property
    def nbytes(self) -> int:
        """Bytes of a slot, radii and padding included."""
        return self.key_bytes + self.value_bytes + 2 * RADIUS_BYTES + self.padding

    @property
    def bits_per_element(self) -> float:
        """Stored bits a coordinate, K and V averaged, radii counted."""
        return self.nbytes * 8 / (2 * self.head_dim)

    @property
    def ratio(self) -> float:
        """How many times more tokens fit than with 16-bit floats."""
        return 16 / self.bits_per_element


def is_polar_dtype(kv_cache_dtype: str | None) -> bool:
    """Whether a ``--kv-cache-dtype`` name is one of ours."""
    return kv_cache_dtype in PRESETS or kv_cache_dtype == LOSSLESS
