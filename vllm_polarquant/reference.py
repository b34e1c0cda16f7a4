"""The paged cache in plain torch, on the codec: what the Triton and CPU kernels must agree with.

Written to be read and believed, not to be fast: it loops over requests. Nothing serves from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vllm_polarquant import codec
from vllm_polarquant.attention import Attention
from vllm_polarquant.codec import Tables, by_largest, decode_centred, encode_centred, unpack_centres
from vllm_polarquant.format import SEGMENT, VectorFormat
from vllm_polarquant.page import BLOCK_SIZE_MULTIPLE, RADIUS_STRIDE, Page, dense_block_stride


class Order(NamedTuple):
    """Where the bytes of 16 tokens' codes lie, from the first byte of the 16 on.

    key: int64 [16, key_bytes]. value: int64 [16, value_bytes].
    """

    key: torch.Tensor
    value: torch.Tensor


def rows(page: Page) -> Order:
    """Token after token, as on a CPU."""
    return Order(
        *(
            torch.arange(BLOCK_SIZE_MULTIPLE * size).view(BLOCK_SIZE_MULTIPLE, size)
            for size in (page.slot.key_bytes, page.slot.value_bytes)
        )
    )


@dataclass(frozen=True)
class Codes:
    """A region of codes, read and written as if it were uint8 [B, H, N, code_bytes], never copied whole.

    region: uint8 [B, H, N * code_bytes]. places: int64 [N, code_bytes], where in it each token's bytes lie.
    """

    region: torch.Tensor
    places: torch.Tensor

    @classmethod
    def of(cls, region: torch.Tensor, order: torch.Tensor) -> Codes:
        """order: Order.key or value."""
        order = order.to(region.device)
        chunks = region.shape[-1] // order.numel()
        starts = torch.arange(chunks, device=region.device) * order.numel()
        return cls(region, (starts[:, None, None] + order).flatten(0, 1))

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
    key_radius and value_radius bfloat16 [B, H, N].
    """

    key_codes: Codes
    value_codes: Codes
    key_radius: torch.Tensor
    value_radius: torch.Tensor


def page_views(cache: torch.Tensor, page: Page, order: Order) -> PageViews:
    """Split a cache uint8 [B, H, N, slot.nbytes] into its regions without copying.

    The cache may have any strides in which one block's H * N * slot.nbytes bytes lie side by side; the
    order of H and N inside makes no difference to where a page is.

    Raises:
        ValueError: if the shape or dtype is not the page's or a block is not dense.
    """
    block_stride = dense_block_stride(cache, page)
    blocks, heads, tokens, _ = cache.shape
    pages = cache.as_strided((blocks, heads, page.nbytes), (block_stride, page.nbytes, 1))

    def region(start: int, width: int) -> torch.Tensor:
        return pages[..., start : start + tokens * width]

    radii = region(page.key_radius_offset, RADIUS_STRIDE).view(torch.bfloat16).unflatten(-1, (tokens, 2))
    return PageViews(
        Codes.of(region(0, page.slot.key_bytes), order.key),
        Codes.of(region(page.value_offset, page.slot.value_bytes), order.value),
        radii[..., 0],
        radii[..., 1],
    )


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    page: Page,
    order: Order,
    tables: Tables | None = None,
    segments: torch.Tensor | None = None,
) -> None:
    """Write key and value [T, H, d] to their slots.

    Args:
        key, value: of a 16-bit float type where tables are None.
        cache: uint8 [B, H, N, slot.nbytes].
        slot_mapping: int64 [T'], T' <= T; slots < 0 are dropped.
        page: of the cache.
        order: of the bytes of its codes.
        tables: of the layer; None for codec.tables, without centres.
        segments: int [T'], of each token's position; None for the first one.
    """
    tables = tables or codec.tables(page.slot, key.dtype, key.device)
    views = page_views(cache, page, order)
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    block, token = slots // page.block_size, slots % page.block_size
    centres = unpack_centres(tables.centres, key.dtype)
    segment = torch.zeros_like(slots) if segments is None else segments[: len(kept)][kept].long()
    centre = centres[segment.clamp_max(len(centres) - 1)]
    for x, vector, factors, minus, codes_view, radius_view in (
        (key, page.slot.key, tables.key_factors, centre, views.key_codes, views.key_radius),
        (
            value,
            page.slot.value,
            tables.value_factors,
            torch.zeros_like(centre),
            views.value_codes,
            views.value_radius,
        ),
    ):
        radius, codes = _encode(x[: len(kept)][kept], vector, factors, tables.mixing, minus)
        codes_view[block, :, token] = codes
        radius_view[block, :, token] = radius


def _encode(
    x: torch.Tensor,
    vector: VectorFormat,
    factors: torch.Tensor,
    mixing: torch.Tensor,
    centre: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Radii [T, H] and codes [T, H, bytes] of vectors [T, H, d]."""
    if vector.kind == "raw":
        # Not mixed, as a sum of NaN would reach every coordinate; the mixing of raw vectors is the identity.
        return codec.encode((x * factors).to(x.dtype), vector)
    unit, amax = by_largest(x)
    return encode_centred((unit * factors) @ mixing.T, amax, centre, vector)


def read_kv(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    length: int,
    page: Page,
    order: Order,
    dtype: torch.dtype,
    tables: Tables | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode one request's first tokens: block_table int32 [blocks] -> K and V float64 [length, H, d].

    Keys are whole: their centres are added. dtype: the model's, in which raw vectors are stored. tables: of
    the layer; None for codec.tables.
    """
    tables = tables or codec.tables(page.slot, dtype, cache.device)
    views = page_views(cache, page, order)
    slot = page.slot
    position = torch.arange(length, device=cache.device)
    block = block_table[position // page.block_size].long()
    token = position % page.block_size
    centres = unpack_centres(tables.centres, dtype).double()
    key = decode_centred(
        views.key_radius[block, :, token],
        views.key_codes[block, :, token],
        centres[(position // SEGMENT).clamp_max(len(centres) - 1)],
        slot.key,
        dtype,
    )
    value = decode_centred(
        views.value_radius[block, :, token].abs(),
        views.value_codes[block, :, token],
        torch.zeros(slot.head_dim, dtype=torch.float64, device=cache.device),
        slot.value,
        dtype,
    )
    if slot.key.rotated:
        mixing = tables.mixing.double()
        key, value = key @ mixing, value @ mixing
    return key * tables.query_factors, value * tables.output_factors


class Attended(NamedTuple):
    """out float64 [T, num_heads, d]; lse float64 [num_heads, T], the natural logarithm of the sum of exp."""

    out: torch.Tensor
    lse: torch.Tensor


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position: torch.Tensor,
    attention: Attention,
) -> Attended:
    """Attention in float64 of one request's queries on its keys.

    Args:
        query: [n, num_heads, d].
        key, value: [length, kv heads, d], of positions 0 .. length - 1.
        position: int64 [n], of each query: it sees keys up to its own, or the last `window` of those.
        attention: scale, window, soft cap and sinks.

    Returns:
        Outputs, zeros where a query sees nothing; log-sum-exps, in which sinks take part.
    """
    group = query.shape[1] // key.shape[1]
    keys = key.double().repeat_interleave(group, 1)
    logits = torch.einsum("qhd,khd->hqk", query.double(), keys) * attention.scale
    if attention.soft_cap is not None:
        logits = attention.soft_cap * (logits / attention.soft_cap).tanh()
    token = torch.arange(len(key), device=query.device)
    visible = token <= position[:, None]
    if attention.window is not None:
        visible &= token > position[:, None] - attention.window
    logits = logits.masked_fill(~visible, float("-inf"))
    lse = logits.logsumexp(-1)
    if attention.sinks is not None:
        lse = torch.logaddexp(lse, attention.sinks.double()[:, None])
    weights = torch.where(visible, (logits - lse[..., None]).exp(), 0.0)
    values = value.double().repeat_interleave(group, 1)
    return Attended(torch.einsum("hqk,khd->qhd", weights, values), lse)


def attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    page: Page,
    order: Order,
    attention: Attention,
    tables: Tables | None = None,
) -> Attended:
    """Causal paged attention in float64.

    Args:
        query: [T, num_heads, d], the requests' tokens one after the other.
        cache: uint8 [B, H, N, slot.nbytes]; the queries' own tokens are already in it.
        block_table: int32 [R, max_blocks].
        seq_lens: int32 [R], tokens of each request, its queries included; 0 for a padded row.
        query_start_loc: int32 [R + 1].
        page: of the cache.
        order: of the bytes of its codes.
        attention: scale, window, soft cap and sinks.
        tables: of the layer; None for codec.tables, without centres.

    Returns:
        out and lse; rows of no request are zero and -inf.
    """
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    lse = torch.full(query.shape[1::-1], float("-inf"), dtype=torch.float64, device=query.device)
    ends = query_start_loc.tolist()
    for request, length in enumerate(seq_lens.tolist()):
        mine = slice(ends[request], ends[request + 1])
        count = mine.stop - mine.start
        if not count or not length:
            continue
        key, value = read_kv(cache, block_table[request], length, page, order, query.dtype, tables)
        position = torch.arange(length - count, length, device=query.device)
        out[mine], lse[:, mine] = dense_attention(query[mine], key, value, position, attention)
    return Attended(out, lse)
