"""The paged cache in plain torch, on the codec: what the Triton and CPU kernels must agree with.

Written to be read and believed, not to be fast: it loops over requests. Nothing serves from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vllm_polarquant.codec import decode, encode
from vllm_polarquant.format import RADIUS_STRIDE, PolarFormat, dense_block_stride


@dataclass(frozen=True)
class Codes:
    """A region of codes, read and written as if it were uint8 [B, H, N, code_bytes], never copied whole.

    region: uint8 [B, H, N * code_bytes]. places: int64 [N, code_bytes], where in it each token's bytes lie.
    """

    region: torch.Tensor
    places: torch.Tensor

    @classmethod
    def of(cls, region: torch.Tensor, chunk: tuple[tuple[int, ...], ...]) -> Codes:
        """chunk: PolarFormat.key_places or value_places."""
        places = torch.tensor(chunk, device=region.device)
        chunks = region.shape[-1] // places.numel()
        starts = torch.arange(chunks, device=region.device) * places.numel()
        return cls(region, (starts[:, None, None] + places).flatten(0, 1))

    def _bytes(self, index: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        blocks, heads, _ = self.region.shape
        tokens = len(self.places)
        number = torch.arange(blocks * heads * tokens, device=self.region.device)
        chosen = number.view(blocks, heads, tokens)[index][..., None]
        head = chosen // tokens % heads
        return chosen // (heads * tokens), head, self.places[chosen[..., 0] % tokens]

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.region[self._bytes(index)]

    def __setitem__(self, index: Any, codes: torch.Tensor | int) -> None:
        self.region[self._bytes(index)] = codes


class PageViews(NamedTuple):
    """Views of a cache, B blocks, H kv heads, N tokens a block; writing to them writes pages.

    key_codes as uint8 [B, H, N, key_bytes], value_codes as uint8 [B, H, N, value_bytes],
    key_radius and value_radius float16 [B, H, N].
    """

    key_codes: Codes
    value_codes: Codes
    key_radius: torch.Tensor
    value_radius: torch.Tensor


def page_views(cache: torch.Tensor, fmt: PolarFormat) -> PageViews:
    """Split a cache uint8 [B, H, N, slot_bytes] into its regions without copying.

    The cache may have any strides in which one block's H * N * slot_bytes bytes lie side by side; the
    order of H and N inside makes no difference to where a page is.

    Raises:
        ValueError: if the shape or dtype is not the format's or a block is not dense.
    """
    block_stride = dense_block_stride(cache, fmt)
    blocks, heads, tokens, _ = cache.shape
    pages = cache.as_strided((blocks, heads, fmt.page_bytes), (block_stride, fmt.page_bytes, 1))

    def region(start: int, width: int) -> torch.Tensor:
        return pages[..., start : start + tokens * width]

    radii = region(fmt.key_radius_offset, RADIUS_STRIDE).view(torch.float16).unflatten(-1, (tokens, 2))
    return PageViews(
        Codes.of(region(0, fmt.key_bytes), fmt.key_places),
        Codes.of(region(fmt.value_offset, fmt.value_bytes), fmt.value_places),
        radii[..., 0],
        radii[..., 1],
    )


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    fmt: PolarFormat,
) -> None:
    """Write key and value [T, H, d] to the slots of slot_mapping int64 [T]; slots < 0 are dropped."""
    views = page_views(cache, fmt)
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    block, token = slots // fmt.block_size, slots % fmt.block_size
    for x, vector, codes_view, radius_view in (
        (key, fmt.key, views.key_codes, views.key_radius),
        (value, fmt.value, views.value_codes, views.value_radius),
    ):
        radius, codes = encode(x[: len(kept)][kept], vector)
        codes_view[block, :, token] = codes
        radius_view[block, :, token] = radius


def read_kv(
    cache: torch.Tensor, block_table: torch.Tensor, length: int, fmt: PolarFormat, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode one request's first tokens: block_table int32 [blocks] -> K and V float32 [length, H, d]."""
    views = page_views(cache, fmt)
    position = torch.arange(length, device=cache.device)
    block = block_table[position // fmt.block_size].long()
    token = position % fmt.block_size
    return (
        decode(views.key_radius[block, :, token], views.key_codes[block, :, token], fmt.key, dtype),
        decode(views.value_radius[block, :, token], views.value_codes[block, :, token], fmt.value, dtype),
    )


def attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    fmt: PolarFormat,
    scale: float,
) -> torch.Tensor:
    """Causal paged attention in float64.

    Args:
        query: [T, num_heads, d], the requests' tokens one after the other.
        cache: uint8 [B, H, N, slot_bytes]; the queries' own tokens are already in it.
        block_table: int32 [R, max_blocks].
        seq_lens: int32 [R], tokens of each request, its queries included; 0 for a padded row.
        query_start_loc: int32 [R + 1].
        scale: softmax scale.

    Returns:
        float64 [T, num_heads, d]; rows of no request are zero.
    """
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    starts, lens = query_start_loc.tolist(), seq_lens.tolist()
    for request, length in enumerate(lens):
        rows = slice(starts[request], starts[request + 1])
        count = rows.stop - rows.start
        if not count or not length:
            continue
        key, value = read_kv(cache, block_table[request], length, fmt, query.dtype)
        group = query.shape[1] // key.shape[1]
        key = key.double().repeat_interleave(group, 1)
        value = value.double().repeat_interleave(group, 1)
        logits = torch.einsum("qhd,khd->hqk", query[rows].double(), key) * scale
        position = torch.arange(length, device=query.device)
        visible = position[None, :] <= position[length - count :, None]
        logits = logits.masked_fill(~visible, float("-inf"))
        out[rows] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), value)
    return out
