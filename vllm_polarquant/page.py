"""Where slots lie in a page, the run of bytes that one (block, kv head) owns.

With N tokens a block it holds, in order and without gaps,

    K codes [N, key_bytes]    V codes [N, value_bytes]    radii [N, 2] bfloat16, K's and V's of a token

and then, of head_dim 512, Slot.padding for each token.
In which order the bytes of codes lie is the device's choice: a CPU has rows, token after token, and a GPU
what its lanes load (kernels/triton/page_io.py). The pages of one block stand side by side, head after head,
whatever the order of dims in which vLLM thinks of the block: nobody else reads its inside.
Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vllm_polarquant.format import FORMAT_VERSION, RADIUS_BYTES, SEED, Slot, UnsupportedFormat

BLOCK_SIZE_MULTIPLE = 16
"""Tokens that a GPU's warp reads at once."""

RADIUS_STRIDE = 2 * RADIUS_BYTES
"""Bytes from the radius of one token's key, or value, to the next token's."""


@dataclass(frozen=True)
class Page:
    """Every offset in a page.

    Args:
        slot: what a token takes.
        block_size: tokens a page holds, a multiple of 16.

    Raises:
        UnsupportedFormat: for another block size.
    """

    slot: Slot
    block_size: int

    def __post_init__(self) -> None:
        if self.block_size <= 0 or self.block_size % BLOCK_SIZE_MULTIPLE:
            raise UnsupportedFormat(
                f"block size {self.block_size} is not a multiple of {BLOCK_SIZE_MULTIPLE}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of one (block, kv head)."""
        return self.slot.nbytes * self.block_size

    @property
    def value_offset(self) -> int:
        """Offset of the V codes."""
        return self.block_size * self.slot.key_bytes

    @property
    def key_radius_offset(self) -> int:
        """Offset of the first token's key's radius."""
        return self.value_offset + self.block_size * self.slot.value_bytes

    @property
    def value_radius_offset(self) -> int:
        """Offset of the first token's value's radius."""
        return self.key_radius_offset + RADIUS_BYTES

    def cache_id(self, order: str) -> str:
        """Names everything that decides what the bytes of a page mean; order: of the device's codes."""
        slot = self.slot
        return f"{slot.preset}-v{FORMAT_VERSION}-{order}-d{slot.head_dim}-b{self.block_size}-s{SEED}"


class CacheTensor(Protocol):
    """The part of a tensor that a layout check reads."""

    @property
    def shape(self) -> Sequence[int]: ...
    def stride(self) -> Sequence[int]: ...
    def element_size(self) -> int: ...


def page_of(cache: CacheTensor, slot: Slot) -> Page:
    """The page of a cache uint8 [B, H, N, slot.nbytes]; raises UnsupportedFormat for its block size."""
    return Page(slot, cache.shape[2])


def dense_block_stride(cache: CacheTensor, page: Page) -> int:
    """Bytes from one block of a cache uint8 [B, H, N, slot.nbytes] to the next.

    Raises:
        ValueError: if the shape is not the page's or a block's bytes do not lie side by side.
    """
    size = page.slot.nbytes
    _, heads, tokens, found = cache.shape
    if cache.element_size() != 1 or (tokens, found) != (page.block_size, size):
        raise ValueError(
            f"expected a cache uint8 [B, H, {page.block_size}, {size}] for {page.slot.preset} with head_dim "
            f"{page.slot.head_dim}, got {list(cache.shape)} of {cache.element_size()}-byte elements"
        )
    block, *inner = cache.stride()
    heads_first, tokens_first = [tokens * size, size, 1], [size, heads * size, 1]
    # A dim of size 1 may have any stride.
    sizes = (heads, tokens, size)
    if not any(
        all(extent == 1 or have == want for extent, have, want in zip(sizes, inner, order, strict=True))
        for order in (heads_first, tokens_first)
    ):
        raise ValueError(
            f"the bytes of a block are not contiguous (strides {list(cache.stride())}); use one of the "
            "KV cache layouts LBHNC, LBNHC, BLHNC, BLNHC"
        )
    return block
