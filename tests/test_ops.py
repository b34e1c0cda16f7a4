"""The four operations of Triton's kernels, as a layer calls them: whole batches, decodes and prefills."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from kernel_cases import (
    OUT_OF_RANGE_BLOCK,
    attention_tolerance,
    empty_cache,
    on_gpu,
    page_for,
    relative_error,
    vectors,
)

from vllm_polarquant import reference
from vllm_polarquant.attention import Attention
from vllm_polarquant.codec import tables
from vllm_polarquant.format import LOSSLESS
from vllm_polarquant.kernels.ops import Batch, DenseAttention, LayerShape, Limits
from vllm_polarquant.kernels.triton import dense as triton_dense
from vllm_polarquant.kernels.triton.launch import Gpu
from vllm_polarquant.kernels.triton.ops import ShortPrefills, TritonOperations, TritonPlan
from vllm_polarquant.kernels.triton.page_io import lane_order
from vllm_polarquant.kernels.triton.prefix import PrefixPlan
from vllm_polarquant.page import Page

K4V4 = "polarquant_k4v4"
HEADS, GROUP = 2, 2
GOLDEN = Path(__file__).with_name("golden_lanes.hex")


def dense_attention(
    query,
    key,
    value,
    query_start_loc,
    max_query_len,
    key_start_loc,
    max_key_len,
    scale,
    causal,
    out=None,
    left=None,
    soft_cap=None,
):
    """kernels.ops.DenseAttention in float64; its bounds are checked, as FlashAttention trusts them."""
    result = torch.full_like(query, float("nan")) if out is None else out
    lse = torch.full(query.shape[1::-1], float("inf"), device=query.device)
    queries, keys = query_start_loc.tolist(), key_start_loc.tolist()
    assert queries[-1] == len(query)
    assert keys[-1] == len(key)
    for i in range(len(queries) - 1):
        rows, tokens = slice(*queries[i : i + 2]), slice(*keys[i : i + 2])
        count, length = rows.stop - rows.start, tokens.stop - tokens.start
        assert count <= max_query_len
        assert length <= max_key_len
        if not count or not length:
            continue
        # FlashAttention 2 hides the last keys from the first of more queries than keys.
        assert causal or left is None or count <= length
        for i in range(count) if left is not None else [slice(None)]:
            aligned = torch.arange(length - count, length, device=query.device)[i].reshape(-1)
            last = aligned if causal else torch.full_like(aligned, length)
            window = None if left is None else int(last) - max(int(aligned) - left, 0) + 1
            attended = reference.dense_attention(
                query[rows][i].reshape(-1, *query.shape[1:]),
                key[tokens],
                value[tokens],
                last,
                Attention(scale, window, soft_cap),
            )
            result[rows][i] = attended.out.to(query.dtype).view(result[rows][i].shape)
            lse[:, rows][:, i] = attended.lse.float().view(lse[:, rows][:, i].shape)
    return result, lse


@dataclass
class Case:
    """A batch, its new keys and values, and what attention to stored prefixes and given chunks should be.

    from_pages: whether chunks, too, are read as they are stored.
    """

    ops: TritonOperations
    page: Page
    cache: torch.Tensor
    batch: Batch
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    want: torch.Tensor
    attention: Attention
    from_pages: bool

    def run(self) -> tuple[TritonPlan, torch.Tensor]:
        planner = self.ops.planner([None, self.attention.window])
        plan = planner.plan(self.batch)
        constants = tables(self.page.slot, self.query.dtype, self.query.device)
        out = torch.full_like(self.query, float("nan"))
        if self.batch.num_decodes:
            self.ops.decode(self.query, self.cache, plan, self.attention, constants, out)
        if self.batch.num_prefills:
            key, value = (None, None) if self.from_pages else (self.key, self.value)
            self.ops.prefill(self.query, key, value, self.cache, plan, self.attention, constants, out)
        return plan, out

    def prefills(self, plan: TritonPlan) -> ShortPrefills | PrefixPlan:
        return plan.prefills[self.attention.window]


def make_case(
    page: Page,
    decodes: list[tuple[int, int]],
    prefills: list[tuple[int, int]],
    device: torch.device,
    dtype: torch.dtype = torch.float16,
    prefix_tokens: int = 48,
    attention: Attention | None = None,
    from_pages: bool = False,
    dense: DenseAttention = dense_attention,
) -> Case:
    """Requests of (context, query) tokens; what is new is in the pages too, as store has written it.

    Blocks before a window are out of range. dense: of the chunks and prefixes.
    """
    requests = decodes + prefills
    short = all(context and count <= 64 for context, count in prefills)
    order, slot = lane_order(page), page.slot
    dim = slot.head_dim
    lens = [context + count for context, count in requests]
    needed = [-(-length // page.block_size) for length in lens]
    cache = empty_cache(page, 1 + sum(needed), HEADS, device)
    shuffled = (torch.randperm(sum(needed)) + 1).tolist()
    table = torch.full((len(requests), max(needed) + 1), OUT_OF_RANGE_BLOCK, dtype=torch.int32, device=device)
    attention = attention or Attention(dim**-0.5)
    queries, keys, values, wants = [], [], [], []
    for row, ((context, count), blocks) in enumerate(zip(requests, needed, strict=True)):
        mine = torch.tensor([shuffled.pop() for _ in range(blocks)], device=device)
        table[row, :blocks] = mine
        position = torch.arange(context + count, device=device)
        slots = mine[position // page.block_size] * page.block_size + position % page.block_size
        key, value = (vectors((context + count, HEADS, dim), dtype, device) for _ in "kv")
        query = torch.randn(count, HEADS * GROUP, dim, device=device).to(dtype)
        reference.store_kv(key, value, cache, slots, page, order)
        stored = reference.read_kv(cache, table[row], context + count, page, order, dtype)
        if attention.window is not None:
            table[row, : max(context - attention.window + 1, 0) // page.block_size] = OUT_OF_RANGE_BLOCK
        if row >= len(decodes) and not (from_pages or short):
            # Longer prefills read their own chunk as it was given.
            stored = [
                torch.cat([old[:context], x[context:]]) for old, x in zip(stored, (key, value), strict=True)
            ]
        wants.append(reference.dense_attention(query, *stored, position[context:], attention).out)
        queries.append(query)
        keys.append(key[context:])
        values.append(value[context:])
    starts = torch.tensor([0, *(count for _, count in requests)]).cumsum(0).to(torch.int32)
    decode_len = max((count for _, count in decodes), default=1)
    batch = Batch(
        num_decodes=len(decodes),
        num_decode_tokens=sum(count for _, count in decodes),
        num_prefills=len(prefills),
        num_tokens=int(starts[-1]),
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(lens, dtype=torch.int32, device=device),
        block_table=table,
        context_lens_cpu=torch.tensor([context for context, _ in prefills], dtype=torch.int32),
    )
    ops = TritonOperations(
        LayerShape(slot, HEADS * GROUP, HEADS, dtype, device),
        Limits(len(requests) + 1, decode_len),
        dense,
        replace(Gpu.of(device), num_sms=4),
        prefix_tokens,
    )
    if from_pages:
        ops.reserve_chunks(sum(count for _, count in prefills))
    given = map(torch.cat, (queries, keys, values, wants))
    return Case(ops, page, cache, batch, *given, attention, from_pages)


def check(case: Case) -> TritonPlan:
    before = case.cache.clone()
    plan, out = case.run()
    # Rotated queries, unpacked keys and values, and each merged part are rounded.
    tolerance = 2 * attention_tolerance(case.query.dtype, case.query.device)
    assert relative_error(out, case.want) < tolerance
    assert torch.equal(case.cache, before)
    return plan


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("preset", "head_dim"), [(K4V4, 64), ("polarquant_k3v2", 80)])
def test_prefill_of_prefixes_in_segments(preset, head_dim, dtype, device):
    """Prefixes that end inside segments, one that spans four of them, one that there is none of."""
    prefills = [(37, 20), (0, 5), (150, 33), (1, 18)]
    case = make_case(page_for(preset, head_dim), [], prefills, device, dtype)
    plan = check(case)
    assert isinstance(case.prefills(plan), PrefixPlan)
    assert len(case.prefills(plan).segments) == 4


def test_prefill_without_prefixes_reads_no_pages(device):
    case = make_case(page_for(K4V4, 64), [], [(0, 17), (0, 40)], device)
    case.cache.fill_(0xFF)
    check(case)


def test_a_mixed_batch(device):
    """Decodes with several queries, then prefills with and without a prefix."""
    case = make_case(page_for(K4V4, 64, 32), [(70, 3), (20, 3)], [(33, 21), (0, 9)], device)
    assert isinstance(case.prefills(check(case)), PrefixPlan)


@pytest.mark.parametrize(
    ("prefills", "planned_for"),
    [
        ([(65, 16), (3, 2)], 16),
        ([(65, 17), (30, 2), (1, 32)], 32),
        ([(150, 33), (3, 2)], 64),
        ([(70, 64)], 64),
    ],
)
def test_short_chunks_are_read_like_decodes(prefills, planned_for, device):
    case = make_case(page_for(K4V4, 64), [(40, 1)], prefills, device)
    read = case.prefills(check(case))
    assert isinstance(read, ShortPrefills)
    assert read.max_query_len == planned_for


def test_many_tokens_in_longer_chunks_are_unpacked(device):
    """And so are chunks that are longer still, or after no prefix."""
    for prefills in ([(3, 64)] * 9, [(3, 65)], [(3, 33), (0, 1)]):
        case = make_case(page_for(K4V4, 64), [], prefills, device)
        plan = case.ops.planner().plan(case.batch)
        assert isinstance(case.prefills(plan), PrefixPlan)


def attention_of(kind: str, device: torch.device, head_dim: int = 64) -> Attention:
    sinks = torch.tensor([8.0, 2.0, -1.0, -60.0], device=device)
    return {
        "plain": Attention(head_dim**-0.5),
        "window": Attention(head_dim**-0.5, window=40),
        "all": Attention(head_dim**-0.5, window=40, soft_cap=5.0, sinks=sinks),
        "narrow": Attention(head_dim**-0.5, window=1, sinks=sinks),
        "wide": Attention(head_dim**-0.5, window=1000, soft_cap=5.0),
    }[kind]


PREFILLS = [(22, 60), (0, 20), (150, 33)]
"""Contexts shorter than a window and longer, chunks that leave it and one that does not."""


@pytest.mark.parametrize(
    ("kind", "from_pages"),
    [("all", False), ("all", True), on_gpu("narrow", False), on_gpu("wide", False)],
)
def test_prefill_of_every_kind(kind, from_pages, device):
    page, attention = page_for(K4V4, 64), attention_of(kind, device)
    case = make_case(page, [(70, 1)], PREFILLS, device, torch.float16, 32, attention, from_pages)
    check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("from_pages", [False, True])
@pytest.mark.parametrize("kind", ["all", "plain"])
@pytest.mark.parametrize("preset", [K4V4, "polarquant_k8v4", LOSSLESS])
def test_prefill_past_the_head_dims_of_flash_attention(preset, kind, from_pages, device):
    page, attention = page_for(preset, 512), attention_of(kind, device, 512)
    prefills = [(150, 133), (0, 70), (700, 40)]
    dense = triton_dense.dense_attention
    check(make_case(page, [(70, 1)], prefills, device, torch.bfloat16, 256, attention, from_pages, dense))


@pytest.mark.parametrize("kind", ["all", on_gpu("plain")])
@pytest.mark.parametrize(
    ("preset", "head_dim", "dtype"),
    [
        ("polarquant_k3v2", 80, torch.float16),
        on_gpu(LOSSLESS, 64, torch.float16),
        (LOSSLESS, 80, torch.bfloat16),
        on_gpu("polarquant_k8v4", 128, torch.bfloat16),
    ],
)
def test_chunks_are_read_off_the_pages(preset, head_dim, dtype, kind, device):
    attention = attention_of(kind, device, head_dim)
    case = make_case(
        page_for(preset, head_dim, 32), [], PREFILLS[:2], device, dtype, attention=attention, from_pages=True
    )
    case.key.fill_(float("nan"))
    check(case)


def test_short_chunks_of_every_kind_are_read_like_decodes(device):
    attention = attention_of("all", device)
    case = make_case(page_for(K4V4, 64), [(40, 1)], [(65, 16), (3, 35)], device, attention=attention)
    assert isinstance(case.prefills(check(case)), ShortPrefills)


def test_chunks_need_room_to_be_read_off_the_pages(device):
    case = make_case(page_for(K4V4, 64), [], [(0, 20)], device, prefix_tokens=19)
    case.from_pages = True
    with pytest.raises(ValueError, match="the workspace is for 19 tokens, but chunks of 20"):
        case.run()
    case.ops.reserve_chunks(20)
    assert case.ops.prefix_workspace.tokens == 20


def test_slots_that_a_batch_is_padded_with_are_dropped(device):
    case = make_case(page_for(K4V4, 64), [(20, 1)], [], device)
    plan = case.ops.planner().plan(case.batch)
    count = len(plan.segments) + 3
    key = case.key[:1].repeat(count, 1, 1)
    slots = torch.full((count,), -1, dtype=torch.int64, device=device)
    before = case.cache.clone()
    constants = tables(case.page.slot, key.dtype, device, HEADS, 2)
    case.ops.store(key, key, case.cache, slots, constants, plan.segments)
    assert torch.equal(case.cache, before)


def test_rows_of_no_request_are_left_alone(device):
    case = make_case(page_for(K4V4, 64), [(40, 1)], [(50, 20)], device)
    padded = replace(
        case, query=torch.cat([case.query, case.query[:3]]), key=torch.cat([case.key, case.key[:3]])
    )
    padded.value = torch.cat([case.value, case.value[:3]])
    _, out = padded.run()
    assert relative_error(out[:21], case.want) < 2e-3
    assert out[21:].isnan().all()


def test_what_serving_calls_can_be_compiled_beforehand(device):
    if device.type == "cpu":
        pytest.skip("the interpreter has nothing to compile, and many rows take it minutes")
    for kind, from_pages in (("plain", False), ("all", True)):
        attention = attention_of(kind, device)
        case = make_case(
            page_for(K4V4, 64), [(20, 1)], [(30, 20)], device, attention=attention, from_pages=from_pages
        )
        constants = tables(case.page.slot, case.query.dtype, device)
        case.ops.warm_up(case.page, constants, attention, from_pages)
        check(case)


def test_more_query_tokens_a_decode_than_kernels_take_are_refused(device):
    shape = LayerShape(page_for(K4V4, 64).slot, 4, 2, torch.float16, device)
    with pytest.raises(ValueError, match="at most 16 query tokens, not 17"):
        TritonOperations(shape, Limits(1, 17), dense_attention)


def golden_page(device: torch.device) -> torch.Tensor:
    """A stored page of the two kinds of order: keys in planes of 16 and 8 bytes, values in planes of 8."""
    page = page_for("polarquant_k3v2", 64)
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(16, 1, 64, generator=generator).bfloat16().to(device) for _ in "kv")
    cache = torch.zeros(1, 1, 16, page.slot.nbytes, dtype=torch.uint8, device=device)
    shape = LayerShape(page.slot, 1, 1, torch.bfloat16, device)
    ops = TritonOperations(shape, Limits(1), dense_attention)
    slots = torch.arange(16, device=device)
    ops.store(key, value, cache, slots, tables(page.slot, torch.bfloat16, device), slots.int() * 0)
    return cache.flatten().cpu()


def test_the_bytes_of_a_page_are_those_of_this_format(device):
    """They change only with FORMAT_VERSION; written by reference.store_kv, `python tests/test_ops.py`."""
    want = torch.frombuffer(bytearray.fromhex(GOLDEN.read_text()), dtype=torch.uint8)
    have = golden_page(device)
    # Cells may name the farther of two points that are about as near, and a radius be rounded otherwise.
    assert len(have) == len(want)
    assert (have != want).sum() <= len(want) // 50


if __name__ == "__main__":
    page = page_for("polarquant_k3v2", 64)
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(16, 1, 64, generator=generator).bfloat16() for _ in "kv")
    cache = torch.zeros(1, 1, 16, page.slot.nbytes, dtype=torch.uint8)
    reference.store_kv(key, value, cache, torch.arange(16), page, lane_order(page))
    GOLDEN.write_text(
        "\n".join(cache.flatten().view(-1, 32)[i].numpy().tobytes().hex() for i in range(cache.numel() // 32))
        + "\n"
    )
