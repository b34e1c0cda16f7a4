"""Inputs of the CPU kernels' tests, and what is expected of them, worked out from tables by hand.

``python tests/cpu_cases.py > tests/golden_rows.hex`` renews the page that test_cpu_kernels.py compares bytes
with; only a new page format is a reason to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kernel_cases import OUT_OF_RANGE_BLOCK, centred_keys, centred_tables, empty_cache, vectors

from vllm_polarquant import reference
from vllm_polarquant.attention import Attention
from vllm_polarquant.codec import Tables, decode_radius, decode_unit, encode_rotated, tables
from vllm_polarquant.format import SEGMENT, Slot, VectorFormat
from vllm_polarquant.kernels.ops import Batch, LayerShape
from vllm_polarquant.page import Page
from vllm_polarquant.reference import Attended, dense_attention

CPU = torch.device("cpu")
NAN = float("nan")
UNTOUCHED = 7.0
"""Fills rows of outputs that nobody is to write."""

GOLDEN_PAGE = Page(Slot("polarquant_k3v2", 64), 16)


def uneven_tables(slot: Slot, heads: int, dtype: torch.dtype) -> Tables:
    """Tables in which every kv head's keys have factors of their own, and values others; none is +-1."""
    plain = tables(slot, dtype, CPU)
    # Powers of two, so that raw vectors lose nothing.
    key = plain.key_factors * torch.randint(-2, 3, (heads, slot.head_dim)).float().exp2()
    value = plain.value_factors * torch.randint(-1, 2, (1, slot.head_dim)).float().exp2() * 4
    return plain._replace(
        key_factors=key, query_factors=1 / key, value_factors=value, output_factors=1 / value
    )


def rotated(x: torch.Tensor, factors: torch.Tensor, mixing: torch.Tensor) -> torch.Tensor:
    """What is stored of vectors [T, H, d], float64."""
    return (x.double() * factors.double()) @ mixing.double().T


def restored(y: torch.Tensor, inverse: torch.Tensor, mixing: torch.Tensor) -> torch.Tensor:
    """The inverse of `rotated`; inverse: one over the factors."""
    return (y.double() @ mixing.double()) * inverse.double()


def centres_of(held: Tables, segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Of each segment, read by hand: float64 [n, 1 or H, d]."""
    words = held.centres[segments.clamp_max(len(held.centres) - 1)]
    halves = torch.cat([words & 0xFFFF, words >> 16 & 0xFFFF], -1)
    return halves.to(torch.uint16).view(dtype).double()


def shorter(y: torch.Tensor, centre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """y [..., d], or y less its centre where that is shorter; and where."""
    centred = (y - centre).norm(dim=-1) < y.norm(dim=-1)
    return torch.where(centred[..., None], y - centre, y), centred


def write(
    cache: torch.Tensor,
    page: Page,
    slots: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    held: Tables,
    segments: torch.Tensor,
) -> None:
    """Store keys and values [T, H, d] of segments int [T] with the codec under any tables."""
    views = reference.page_views(cache, page, reference.rows(page))
    block, token = slots // page.block_size, slots % page.block_size
    centre = centres_of(held, segments.long(), key.dtype)
    for x, vector, factors, minus, codes_view, radius_view in (
        (key, page.slot.key, held.key_factors, centre, views.key_codes, views.key_radius),
        (value, page.slot.value, held.value_factors, 0 * centre, views.value_codes, views.value_radius),
    ):
        y = rotated(x, factors, held.mixing)
        if vector.kind == "raw":
            radius, codes = torch.ones(y.shape[:-1]).bfloat16(), y.to(x.dtype).view(torch.uint8)
        else:
            y, centred = shorter(y, minus)
            largest = y.abs().amax(-1)
            radius, codes = encode_rotated((y / largest[..., None]).float(), largest.float(), vector)
            radius = torch.where(centred, -radius, radius)
        codes_view[block, :, token] = codes
        radius_view[block, :, token] = radius


def unit_vectors(codes: torch.Tensor, vector: VectorFormat, dtype: torch.dtype) -> torch.Tensor:
    return decode_unit(codes, vector, dtype).double()


@dataclass
class Case:
    """A batch, its pages and what its tokens bring."""

    page: Page
    tables: Tables
    shape: LayerShape
    cache: torch.Tensor
    batch: Batch
    query: torch.Tensor
    key: torch.Tensor | None
    value: torch.Tensor | None
    attention: Attention

    def out(self) -> torch.Tensor:
        """An output that no kernel has written to."""
        return torch.full_like(self.query, UNTOUCHED)

    def stored(self, request: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A request's first tokens off its pages, by hand: K and V float64 [length, H, d].

        Of blocks that are gone keys are NaN and values zeros.
        """
        views = reference.page_views(self.cache, self.page, reference.rows(self.page))
        position = torch.arange(length)
        block = self.batch.block_table[request, position // self.page.block_size].long()
        gone = block == OUT_OF_RANGE_BLOCK
        block[gone] = 0
        token = position % self.page.block_size
        held, slot, dtype = self.tables, self.page.slot, self.query.dtype
        key = unit_vectors(views.key_codes[block, :, token], slot.key, dtype)
        radius = views.key_radius[block, :, token]
        key = key * decode_radius(radius).double()[..., None]
        centre = centres_of(held, position // SEGMENT, dtype)
        key = torch.where(radius.signbit()[..., None], key + centre, key)
        key[gone] = NAN
        value = unit_vectors(views.value_codes[block, :, token], slot.value, dtype)
        value = value * decode_radius(views.value_radius[block, :, token]).double()[..., None]
        value[gone] = 0
        return (
            restored(key, held.query_factors, held.mixing),
            restored(value, held.output_factors, held.mixing),
        )

    def rows(self, request: int) -> slice:
        """Of a request's query tokens."""
        starts = self.batch.query_start_loc_cpu.tolist()
        return slice(starts[request], starts[request + 1])

    def expected_decode(self) -> Attended:
        """Attention of the decodes, zeros and -inf in all other rows."""
        out = torch.zeros(self.query.shape, dtype=torch.float64)
        lse = torch.full(self.query.shape[1::-1], -torch.inf, dtype=torch.float64)
        for request in range(self.batch.num_decodes):
            rows, length = self.rows(request), int(self.batch.seq_lens[request])
            count = rows.stop - rows.start
            if count:
                out[rows], lse[:, rows] = dense_attention(
                    self.query[rows],
                    *self.stored(request, length),
                    torch.arange(length - count, length),
                    self.attention,
                )
        return Attended(out, lse)

    def expected_prefill(self) -> torch.Tensor:
        """Outputs of the prefills, zeros in all other rows."""
        out = torch.zeros(self.query.shape, dtype=torch.float64)
        for i, context in enumerate(self.batch.context_lens_cpu.tolist()):
            request = self.batch.num_decodes + i
            rows = self.rows(request)
            count = rows.stop - rows.start
            if self.key is None or self.value is None:
                key, value = self.stored(request, context + count)
            else:
                key, value = (
                    torch.cat([stored, fresh[rows].double()])
                    for stored, fresh in zip(
                        self.stored(request, context), (self.key, self.value), strict=True
                    )
                )
            position = context + torch.arange(count)
            out[rows] = dense_attention(self.query[rows], key, value, position, self.attention).out
        return out


def make_case(
    page: Page,
    decodes: list[tuple[int, int]],
    prefills: list[tuple[int, int]] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    heads: int = 2,
    group: int = 2,
    layout: str = "LBHNC",
    padding: int = 0,
    uneven: bool = False,
    centred: bool = False,
    from_pages: bool = False,
    **attention: Any,
) -> Case:
    """Store tokens in scattered blocks, with garbage around them; blocks before all windows are gone.

    Args:
        page: of the cache.
        decodes: of each, its tokens, queries included, and how many of them are queries; (0, 0) is padding.
        prefills: of each, the tokens before its chunk, which are stored, and those of the chunk.
        dtype: the model's.
        heads: kv heads.
        group: query heads to a kv head.
        layout: vLLM's.
        padding: rows of queries beyond the requests'.
        uneven: with factors that are not those of the codec.
        centred: with kernel_cases' centred_tables and centred_keys.
        from_pages: chunks are stored too, and keys and values are None.
        attention: Attention's, beside its scale.
    """
    prefills = prefills or []
    slot = page.slot
    kind = Attention(slot.head_dim**-0.5, **attention)
    stored = [length for length, _ in decodes]
    stored += [context + from_pages * count for context, count in prefills]
    held = uneven_tables(slot, heads, dtype) if uneven else tables(slot, dtype, CPU)
    if centred:
        held = centred_tables(slot, heads, dtype, CPU, max(stored))
    seq_lens = [length for length, _ in decodes] + [sum(prefill) for prefill in prefills]
    chunks = [count for _, count in (*decodes, *prefills)]
    needed = [-(-length // page.block_size) for length in stored]
    cache = empty_cache(page, 1 + sum(needed), heads, CPU, layout)
    shuffled = (torch.randperm(sum(needed)) + 1).tolist()
    wide = torch.full((len(stored), max(needed, default=0) + 5), OUT_OF_RANGE_BLOCK, dtype=torch.int32)
    block_table = wide[:, :-3]
    for request, length in enumerate(stored):
        mine = torch.tensor([shuffled.pop() for _ in range(needed[request])], dtype=torch.int32)
        block_table[request, : len(mine)] = mine
        position = torch.arange(length)
        slots = block_table[request, position // page.block_size].long() * page.block_size
        key, value = (vectors((length, heads, slot.head_dim), dtype, CPU) for _ in "kv")
        if centred:
            key = centred_keys(held, position, dtype)
        write(cache, page, slots + position % page.block_size, key, value, held, position // SEGMENT)
    for request, (length, (_, count)) in enumerate(zip(seq_lens, (*decodes, *prefills), strict=True)):
        if kind.window is not None:
            seen = max(0, length - count - kind.window + 1)
            block_table[request, : seen // page.block_size] = OUT_OF_RANGE_BLOCK
    starts = torch.tensor([0, *chunks]).cumsum(0).to(torch.int32)
    decode_tokens, tokens = int(starts[len(decodes)]), int(starts[-1])
    contexts = [context for context, _ in prefills]
    return Case(
        page,
        held,
        LayerShape(slot, heads * group, heads, dtype, CPU),
        cache,
        Batch(
            num_decodes=len(decodes),
            num_decode_tokens=decode_tokens,
            num_prefills=len(prefills),
            num_tokens=tokens,
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            block_table=block_table,
            context_lens_cpu=torch.tensor(contexts, dtype=torch.int32),
        ),
        torch.randn(tokens + padding, heads * group, slot.head_dim).to(dtype),
        *(
            None if from_pages else vectors((tokens + padding, heads, slot.head_dim), dtype, CPU)
            for _ in "kv"
        ),
        kind,
    )


def golden_vectors() -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values bfloat16 [16, 1, 64] of the golden page, whole and half numbers without a pattern."""
    token, j = torch.arange(16)[:, None, None], torch.arange(64)
    key = (37 * j + 11 * token * token + 5 * token * j) % 64 - 31.5
    value = (29 * j + 7 * token * token + 3 * token * j) % 61 - 30.0
    return key.bfloat16(), value.bfloat16()


def golden_page() -> torch.Tensor:
    """What the reference makes of `golden_vectors`: a cache uint8 [1, 1, 16, slot.nbytes]."""
    cache = torch.zeros(1, 1, 16, GOLDEN_PAGE.slot.nbytes, dtype=torch.uint8)
    order = reference.rows(GOLDEN_PAGE)
    reference.store_kv(*golden_vectors(), cache, torch.arange(16), GOLDEN_PAGE, order)
    return cache


if __name__ == "__main__":
    digits = bytes(golden_page().flatten().tolist()).hex()
    print("\n".join(digits[i : i + 64] for i in range(0, len(digits), 64)))
