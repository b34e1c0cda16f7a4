"""What a quantised KV page is made of: every size, offset and shape, derived in one place.

A page is the run of bytes that one (block, kv head) owns. With N tokens a block it holds, in order,

    K codes [N, key.code_bytes]    V codes [N, value.code_bytes]    radii [N, 2] f16, K's and V's of a token

and every region is contiguous. Codes of 16 tokens, a chunk, lie in the order in which the lanes of a warp
take them (`code_places`), so that each loads 16 bytes at a time beside its neighbours'. The pages of one
block stand side by side, head after head, whatever the order of dims in which vLLM thinks of the block:
nobody else reads its inside. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, Protocol

FORMAT_VERSION = 3
"""Changes whenever the same bytes would decode to other vectors. Part of every cache identity."""

SEED = 42
"""Seed of the rotation that every page is written with."""

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
BITS = (2.0, 2.5, 3.0, 3.5, 4.0)
SCALAR_BITS = 8.0
RADIUS_BYTES = 2
RADIUS_STRIDE = 2 * RADIUS_BYTES
"""Bytes from the radius of one token's key, or value, to the next token's."""

BLOCK_SIZE_MULTIPLE = 16

KEY_PARTS, VALUE_PARTS = 4, 8
"""Lanes that share a key and a value in a tensor core's operands: quarters of a key, eighths of a value."""

MIN_FIT_GAIN = 0.981
"""A least-squares radius never shortens a vector by more than this factor."""

FP8_MAX = 448.0

RADIUS_MIN, RADIUS_MAX, RADIUS_POWER = 2.0**-13, 60000.0, 9
"""Radii outside [RADIUS_MIN, RADIUS_MAX] are stored as minus their ninth root: float16 then covers all
of float32's range within 1 %, and the radii of real keys and values keep all their 11 bits."""

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
    gain: what the radius makes of |x|, c being the cosine between x and its decoded direction.
        ``norm`` keeps |x|; ``unbiased`` is |x| / c, exact along x; ``fit`` is the least-squares |x| c,
        kept from losing more than 2 % of the norm.
    """

    kind: Kind
    bits: float
    gain: Gain = "norm"

    @property
    def rotated(self) -> bool:
        return self.kind != "raw"

    @property
    def runs(self) -> int:
        """Runs of a vector's codes: codes of pairs, or coordinates x of all pairs and then y."""
        return 2 if self.kind in ("fp8", "raw") else 1

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


@cache
def code_places(code_bytes: int, parts: int, runs: int) -> tuple[tuple[int, ...], ...]:
    """Where each byte of 16 vectors' codes lies, from the first byte of the 16 on: [token][byte].

    A lane (group g of eight, place t of four) has, one after the other, its part of each of its tokens: of
    keys, quarter t of tokens g and g + 8; of values, eighth g of tokens 2t, 2t + 1, 2t + 8 and 2t + 9.
    These shares of code_bytes / 2 lie in planes, each with 16 bytes of every lane; what then remains, in
    planes of 8 and of 4 bytes. So a warp's loads are of neighbouring bytes, in the registers that its
    tensor-core products take (PTX ISA, fragments of mma.m16n8k16). Where shares are no whole words, the 16
    vectors lie one after the other instead.

    Args:
        code_bytes: of one vector.
        parts: KEY_PARTS or VALUE_PARTS.
        runs: into how many runs a part is cut: 1, or 2 where coordinates x and y of pairs lie apart.
    """
    if code_bytes % 8:
        return tuple(tuple(range(s * code_bytes, (s + 1) * code_bytes)) for s in range(16))
    words = code_bytes // 8
    planes = [4] * (words // 4) + [width for width in (2, 1) if words % 4 & width]
    starts = [sum(planes[:i]) for i in range(len(planes))]
    plane_of = [i for i, width in enumerate(planes) for _ in range(width)]
    run_bytes = code_bytes // runs
    piece = run_bytes // parts

    def place(token: int, byte: int) -> int:
        run, inside = divmod(byte, run_bytes)
        part, rest = divmod(inside, piece)
        half, eighth = divmod(token, 8)
        if parts == KEY_PARTS:
            lane, turn = 4 * eighth + part, half
        else:
            lane, turn = 4 * part + eighth // 2, 2 * half + eighth % 2
        word, odd = divmod((turn * runs + run) * piece + rest, 4)
        plane = plane_of[word]
        return 4 * (32 * starts[plane] + lane * planes[plane] + word - starts[plane]) + odd

    return tuple(tuple(place(s, b) for b in range(code_bytes)) for s in range(16))


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
class PolarFormat:
    """Every size, offset and shape of a page. It travels whole, never as separate integers.

    Args:
        preset: a key of PRESETS, or LOSSLESS.
        head_dim: size of one head's key and value.
        block_size: tokens a page holds, a multiple of 16.

    Raises:
        UnsupportedFormat: naming the argument and the values that work.
    """

    preset: str
    head_dim: int
    block_size: int
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
        if self.block_size <= 0 or self.block_size % BLOCK_SIZE_MULTIPLE:
            raise UnsupportedFormat(
                f"block size {self.block_size} is not a multiple of {BLOCK_SIZE_MULTIPLE}"
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
    def key_places(self) -> tuple[tuple[int, ...], ...]:
        """Where bytes of keys lie in a chunk of 16 tokens: `code_places`."""
        return code_places(self.key_bytes, KEY_PARTS, self.key.runs)

    @property
    def value_places(self) -> tuple[tuple[int, ...], ...]:
        """Where bytes of values lie in a chunk of 16 tokens: `code_places`."""
        return code_places(self.value_bytes, VALUE_PARTS, self.value.runs)

    @property
    def slot_bytes(self) -> int:
        """Bytes one token takes in one kv head, radii included; there is no padding."""
        return self.key_bytes + self.value_bytes + 2 * RADIUS_BYTES

    @property
    def page_bytes(self) -> int:
        """Bytes of one (block, kv head)."""
        return self.slot_bytes * self.block_size

    @property
    def value_offset(self) -> int:
        """Offset of the V codes in a page, as the next two: of the first radii of K and of V."""
        return self.block_size * self.key_bytes

    @property
    def key_radius_offset(self) -> int:
        return self.value_offset + self.block_size * self.value_bytes

    @property
    def value_radius_offset(self) -> int:
        return self.key_radius_offset + RADIUS_BYTES

    @property
    def bits_per_element(self) -> float:
        """Stored bits a coordinate, K and V averaged, radii counted."""
        return self.slot_bytes * 8 / (2 * self.head_dim)

    @property
    def ratio(self) -> float:
        """How many times more tokens fit than with 16-bit floats."""
        return 16 / self.bits_per_element

    @property
    def cache_id(self) -> str:
        """Names everything that decides what the bytes of a page mean."""
        return f"{self.preset}-v{FORMAT_VERSION}-d{self.head_dim}-b{self.block_size}-s{SEED}"


class CacheTensor(Protocol):
    """The part of a tensor that a layout check reads."""

    @property
    def shape(self) -> Sequence[int]: ...
    def stride(self) -> Sequence[int]: ...
    def element_size(self) -> int: ...


def dense_block_stride(cache: CacheTensor, fmt: PolarFormat) -> int:
    """Bytes from one block of a cache uint8 [B, H, N, slot_bytes] to the next.

    Raises:
        ValueError: if the shape is not the format's or a block's bytes do not lie side by side.
    """
    _, heads, tokens, slot = cache.shape
    if cache.element_size() != 1 or (tokens, slot) != (fmt.block_size, fmt.slot_bytes):
        raise ValueError(
            f"expected a cache uint8 [B, H, {fmt.block_size}, {fmt.slot_bytes}] for {fmt.cache_id}, "
            f"got {list(cache.shape)} of {cache.element_size()}-byte elements"
        )
    block, *inner = cache.stride()
    heads_first, tokens_first = [tokens * slot, slot, 1], [slot, heads * slot, 1]
    # A dim of size 1 may have any stride.
    sizes = (heads, tokens, slot)
    if not any(
        all(size == 1 or have == want for size, have, want in zip(sizes, inner, order, strict=True))
        for order in (heads_first, tokens_first)
    ):
        raise ValueError(
            f"the bytes of a block are not contiguous (strides {list(cache.stride())}); use one of the "
            "KV cache layouts LBHNC, LBNHC, BLHNC, BLNHC"
        )
    return block


def is_polar_dtype(kv_cache_dtype: str | None) -> bool:
    """Whether a ``--kv-cache-dtype`` name is one of ours."""
    return kv_cache_dtype in PRESETS or kv_cache_dtype == LOSSLESS
