"""The CPU kernels against float64 attention on the same pages, and their speed against vLLM's own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu_cases import (
    CPU,
    GOLDEN_PAGE,
    NAN,
    UNTOUCHED,
    Case,
    centres_of,
    golden_page,
    golden_vectors,
    make_case,
    restored,
    rotated,
    shorter,
    uneven_tables,
    unit_vectors,
    write,
)
from kernel_cases import (
    ALL_PRESETS,
    DTYPES,
    LAYOUTS,
    OUT_OF_RANGE_BLOCK,
    bits_of,
    centred_keys,
    centred_tables,
    empty_cache,
    page_for,
    relative_error,
    vectors,
)

from vllm_polarquant import reference
from vllm_polarquant.attention import Attention
from vllm_polarquant.codec import Tables, decode_radius, encode_radius, pack_centres, tables
from vllm_polarquant.eval.bench import cpu as bench_cpu
from vllm_polarquant.format import LOSSLESS, SEGMENT, Slot, VectorFormat
from vllm_polarquant.kernels.ops import Batch, LayerShape, Limits, operations

pytest.importorskip("numba")

from vllm_polarquant.kernels.cpu.attend import decode_attention
from vllm_polarquant.kernels.cpu.ops import CpuOperations
from vllm_polarquant.kernels.cpu.prefill import prefill_attention
from vllm_polarquant.kernels.cpu.vectors import LoopTables

K4V4 = "polarquant_k4v4"
DIMS = (64, 80, 128, 256)
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 2.5e-3}
"""Relative error: points are bfloat16 whatever the model is, query and output the model's dtype."""
GROUP = 3
SINKS = torch.tensor([-80.0, -2.0, 0.0, 1.0, 5.0, 90.0])
"""Of 2 * GROUP query heads: from one that takes no part to one that leaves nothing to values."""
AT_EDGES = [(255, 1), (256, 1), (257, 2), (515, 4), (40, 1)]
"""Decodes that end about the edges of segments."""
GOLDEN = bytes.fromhex((Path(__file__).parent / "golden_rows.hex").read_text())


def decode(case: Case) -> torch.Tensor:
    out = case.out()
    ops = CpuOperations(case.shape)
    plan = ops.planner((case.attention.window,)).plan(case.batch)
    ops.decode(case.query, case.cache, plan, case.attention, case.tables, out)
    return out


def decode_with_lse(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """out, and log-sum-exp of all rows."""
    out, lse = case.out(), torch.full(case.query.shape[1::-1], UNTOUCHED)
    batch = case.batch
    decode_attention(
        case.query,
        case.cache,
        batch.block_table,
        batch.seq_lens,
        batch.query_start_loc,
        case.page,
        LoopTables.of(case.page.slot, case.tables, case.query.dtype),
        case.attention,
        out,
        lse,
    )
    return out, lse


def check_decode(case: Case) -> None:
    before = case.cache.clone()
    out = decode(case)
    want, owned = case.expected_decode().out, case.batch.num_decode_tokens
    assert relative_error(out[:owned], want[:owned]) < TOLERANCE[case.query.dtype]
    assert (out[owned:] == UNTOUCHED).all(), "rows of no decode were written"
    assert torch.equal(case.cache, before)


def check_lse(case: Case) -> None:
    (out, lse), want = decode_with_lse(case), case.expected_decode()
    owned = case.batch.num_decode_tokens
    assert relative_error(out[:owned], want.out[:owned]) < TOLERANCE[case.query.dtype]
    nothing = torch.isneginf(want.lse)
    assert torch.equal(torch.isneginf(lse)[:, :owned], nothing[:, :owned])
    assert (lse - want.lse)[~nothing].abs().max() < 0.01
    assert not out[:owned][nothing.T[:owned]].any()
    assert (out[owned:] == UNTOUCHED).all() and (lse[:, owned:] == UNTOUCHED).all()


@pytest.mark.sampled
@pytest.mark.parametrize("preset", ALL_PRESETS)
@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_of_every_format(preset: str, head_dim: int, dtype: torch.dtype) -> None:
    check_decode(
        make_case(page_for(preset, head_dim, 32), [(1, 1), (75, 1), (33, 1)], dtype=dtype, padding=2)
    )


@pytest.mark.parametrize("centred", [False, True])
def test_what_is_expected_is_the_reference(centred: bool) -> None:
    case = make_case(page_for("polarquant_k3v2", 96, 32), [(270, 2), (5, 1)], centred=centred)
    order, table = reference.rows(case.page), case.batch.block_table[0]
    read = reference.read_kv(case.cache, table, 270, case.page, order, case.query.dtype, case.tables)
    for have, want in zip(case.stored(0, 270), read, strict=True):
        assert relative_error(have, want) < 1e-6
    batch = case.batch
    want = reference.attention(
        case.query, case.cache, batch.block_table, batch.seq_lens, batch.query_start_loc, case.page, order,
        case.attention, case.tables,
    )  # fmt: skip
    have = case.expected_decode()
    assert relative_error(have.out, want.out) < 1e-6
    assert (have.lse - want.lse).abs().max() < 1e-5


@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_decode_with_factors_of_every_head(preset: str) -> None:
    case = make_case(page_for(preset, 128, 16), [(75, 1), (33, 2)], heads=3, uneven=True)
    assert len({tuple(row) for row in case.tables.key_factors.tolist()}) == 3
    check_decode(case)


@pytest.mark.sampled
@pytest.mark.parametrize("preset", ALL_PRESETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_with_centres(preset: str, dtype: torch.dtype) -> None:
    """The segment after the last one's is poisoned."""
    at = page_for(preset, 128, 48)
    case = make_case(at, AT_EDGES, dtype=dtype, heads=3, padding=1, centred=True)
    signs = reference.page_views(case.cache, at, reference.rows(at)).key_radius.signbit()
    assert signs[case.batch.block_table[3, 1:10].long()].all() == (preset != LOSSLESS)
    check_decode(case)
    check_lse(case)


def test_decode_past_the_last_centre() -> None:
    """Positions past the tables' share their last centre; and heads may share centres."""
    case = make_case(page_for(K4V4, 64), [(700, 1)], centred=True)
    apart = [decode(case)]
    for segments, heads in ((1, 2), (2, 1)):
        few = case.tables._replace(centres=case.tables.centres[:segments, :heads].contiguous())
        case.tables = few
        check_decode(case)
        apart.append(decode(case))
    assert len({out.sum().item() for out in apart}) == 3


@pytest.mark.sampled
@pytest.mark.parametrize("layout", [layout for layout, _ in LAYOUTS])
@pytest.mark.parametrize("block_size", [16, 32, 48, 128])
def test_decode_of_every_layout_and_block_size(layout: str, block_size: int) -> None:
    at = page_for("polarquant_k3v2", 128, block_size)
    check_decode(make_case(at, [(257, 1), (5, 1), (129, 1)], layout=layout))


@pytest.mark.sampled
@pytest.mark.parametrize("query_len", range(1, 9))
@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_decode_of_several_query_tokens_is_causal(query_len: int, group: int) -> None:
    # The last request is nothing but its queries: the first of them sees one key.
    decodes = [(61, query_len), (17, 1), (query_len, query_len)]
    check_lse(make_case(page_for(K4V4, 64), decodes, dtype=torch.float16, group=group, padding=3))


@pytest.mark.parametrize("threads", [1, 2])
def test_decode_gives_the_same_whatever_the_number_of_threads(threads: int) -> None:
    case = make_case(page_for(K4V4, 128, 128), [(1000, 2), (3, 1)])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_decode(case)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("block_size", [16, 48, 128])
@pytest.mark.parametrize("window", [1, 5, 16, 33, 100, 1000])
def test_decode_sees_its_window_alone(window: int, block_size: int) -> None:
    """One query or several, each with a window of its own; blocks before all of them are out of range."""
    decodes = [(257, 1), (5, 1), (0, 0), (129, 3), (64, 8), (3, 3)]
    case = make_case(page_for(K4V4, 64, block_size), decodes, group=GROUP, padding=2, window=window)
    gone = case.batch.block_table[0] == OUT_OF_RANGE_BLOCK
    assert gone[: 257 // block_size].sum() == max(0, 257 - window) // block_size
    check_decode(case)
    check_lse(case)


@pytest.mark.sampled
@pytest.mark.parametrize("preset", ALL_PRESETS)
@pytest.mark.parametrize("kind", [{"soft_cap": 1.0}, {"sinks": SINKS}, {"window": 30}], ids="-".join)
def test_decode_of_every_format_and_kind(preset: str, kind: dict[str, Any]) -> None:
    """A soft cap is of the whole logit, the centre's part included."""
    case = make_case(page_for(preset, 64), [(300, 2), (40, 1)], group=GROUP, padding=1, centred=True, **kind)
    check_decode(case)
    check_lse(case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_of_all_kinds_at_once(dtype: torch.dtype) -> None:
    case = make_case(
        page_for("polarquant_k3v2", 128, 32), AT_EDGES, dtype=dtype, group=GROUP, centred=True,
        window=70, soft_cap=2.0, sinks=SINKS,
    )  # fmt: skip
    check_lse(case)


def test_a_sink_is_all_that_a_query_without_keys_has() -> None:
    case = make_case(page_for(K4V4, 64), [(40, 1), (0, 1), (9, 3)], group=GROUP, sinks=SINKS)
    check_lse(case)
    out, lse = decode_with_lse(case)
    assert not out[1].any() and out[2:5, :5].any(dim=-1).all()
    assert torch.equal(lse[:, 1], SINKS)


def test_exponentials_of_logits_below_the_largest() -> None:
    from vllm_polarquant.kernels.cpu.read import exp

    x = np.concatenate([np.linspace(-87, 0, 4001), [-1e-9, -87.1, -500, -2e30]]).astype(np.float32)
    have = np.array([exp(number) for number in x])
    assert np.abs(have - np.exp(x.astype(np.float64))).max() < 3e-7
    assert have[x == 0] == 1 and not have[-3:].any()


def test_parts_of_a_context_merge_by_their_lse() -> None:
    case = make_case(page_for(K4V4, 128, 32), [(200, 1)])
    whole, whole_lse = decode_with_lse(case)
    after, after_lse = decode_with_lse(replace(case, attention=replace(case.attention, window=200 - 75)))
    key, value = (x.double() for x in case.stored(0, 75))
    first = reference.dense_attention(case.query, key, value, torch.tensor([74]), case.attention)
    assert (torch.logaddexp(first.lse, after_lse.double()) - whole_lse).abs().max() < 0.01
    merged = sum(
        out.double() * (lse.double() - whole_lse).exp().T[..., None]
        for out, lse in ((first.out, first.lse), (after, after_lse))
    )
    assert relative_error(whole, merged) < 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("centred", [False, True])
def test_sign_bits_say_nothing_of_values_and_of_keys_without_centres(centred: bool) -> None:
    case = make_case(page_for(K4V4, 128), [(50, 1)], [(20, 3)], centred=centred)
    plain = decode(case), prefill(case)
    radii = reference.page_views(case.cache, case.page, reference.rows(case.page))
    for radius in (radii.value_radius,) if centred else (radii.key_radius, radii.value_radius):
        radius.view(torch.int16).bitwise_or_(-(1 << 15))
    assert torch.equal(decode(case), plain[0])
    assert torch.equal(prefill(case), plain[1])


def test_torch_keeps_the_number_of_threads_it_was_given() -> None:
    code = (
        "import torch; from vllm_polarquant.kernels.cpu.threads import use_torch_threads; "
        "before = torch.get_num_threads(); print(before, use_torch_threads(), torch.get_num_threads())"
    )
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert child.stdout.split() == ["1", "1", "1"]


def test_a_batch_without_requests_writes_nothing() -> None:
    case = make_case(page_for(K4V4, 128), [], padding=4)
    assert (decode(case) == UNTOUCHED).all()
    assert (prefill(case) == UNTOUCHED).all()


def test_requests_without_queries_are_left_out() -> None:
    """As in a padded batch: no tokens, no keys, a block table of garbage."""
    check_decode(make_case(page_for(K4V4, 128), [(40, 1), (0, 0), (21, 1), (0, 0)]))


def test_queries_of_a_request_without_tokens_see_nothing() -> None:
    check_lse(make_case(page_for(K4V4, 128), [(40, 1), (0, 1)]))


def test_large_logits_do_not_overflow() -> None:
    case = make_case(page_for(K4V4, 128, 64), [(300, 1)])
    case.query *= 500
    assert torch.isfinite(decode(case)).all()
    check_lse(case)


def plain_tables(slot: Slot, heads: int, dtype: torch.dtype) -> Tables:
    return tables(slot, dtype, CPU)


def real_tables(slot: Slot, heads: int, dtype: torch.dtype) -> Tables:
    return centred_tables(slot, heads, dtype, CPU, 3 * SEGMENT)


def stored_cosines(
    y: torch.Tensor, codes: torch.Tensor, vector: VectorFormat, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cosines [T, H] of what is to be stored, y [T, H, d], with its codes, and lengths of both, float64."""
    unit = unit_vectors(codes, vector, dtype)
    return torch.nn.functional.cosine_similarity(y, unit, dim=-1), y.norm(dim=-1), unit.norm(dim=-1)


@pytest.mark.sampled
@pytest.mark.parametrize(
    "tables_of", [plain_tables, uneven_tables, real_tables], ids=["codec", "uneven", "centred"]
)
@pytest.mark.parametrize("preset", ALL_PRESETS)
@pytest.mark.parametrize("head_dim", DIMS)
def test_store_writes_what_the_codec_would(
    preset: str, head_dim: int, tables_of: Callable[[Slot, int, torch.dtype], Tables]
) -> None:
    layout, block_size = LAYOUTS[DIMS.index(head_dim)]
    at = page_for(preset, head_dim, block_size)
    slot, order = at.slot, reference.rows(at)
    held = tables_of(slot, 2, torch.bfloat16)
    key, value = (vectors((83, 2, head_dim), torch.bfloat16, CPU) for _ in "kv")
    position = torch.randint(3 * SEGMENT, (83,))
    segments = (position // SEGMENT).int()
    if tables_of is real_tables:
        key[5:] = centred_keys(held, position, torch.bfloat16)[5:]
    slots = torch.randperm(6 * block_size)[:83]
    slots[::7] = -1
    kept = slots >= 0
    have, want = (empty_cache(at, 6, 2, CPU, layout) for _ in range(2))
    # vLLM may pass more rows than slots.
    extra = torch.full((3, 2, head_dim), NAN, dtype=torch.bfloat16)
    ops = CpuOperations(LayerShape(slot, 4, 2, torch.bfloat16, CPU))
    ops.store(
        torch.cat([key, extra]), torch.cat([value, extra]), have, slots, held, torch.cat([segments, segments])
    )
    if tables_of is plain_tables:
        reference.store_kv(key, value, want, slots, at, order)
    else:
        write(want, at, slots[kept], key[kept], value[kept], held, segments[kept])
    centre = centres_of(held, segments[kept].long(), torch.bfloat16)
    block, place = slots[kept] // block_size, slots[kept] % block_size
    ours, theirs = reference.page_views(have, at, order), reference.page_views(want, at, order)
    for x, vector, kind in ((key, slot.key, "key"), (value, slot.value, "value")):
        codes, expected = (getattr(views, f"{kind}_codes")[block, :, place] for views in (ours, theirs))
        y = rotated(x[kept], getattr(held, f"{kind}_factors"), held.mixing)
        y, centred = shorter(y, centre * (kind == "key" and vector.kind != "raw"))
        best, _, _ = stored_cosines(y, expected, vector, torch.bfloat16)
        cosine, length, unit_length = stored_cosines(y, codes, vector, torch.bfloat16)
        lost = best - cosine
        radius = getattr(ours, f"{kind}_radius")[block, :, place]
        assert torch.equal(radius.signbit(), centred)
        radius = radius.abs()
        if vector.kind == "polar":
            # Cells may name the farther of two points that are about as near.
            assert lost.mean() < 0.01 * (1 - best).mean()
            assert lost.max() < 0.004
            gain = 1 / cosine if vector.gain == "unbiased" else 1
            wanted = encode_radius((length * gain / unit_length).float())
        else:
            assert (codes != expected).double().mean() < 0.01
            assert lost.max() < 1e-5
            wanted = getattr(theirs, f"{kind}_radius")[block, :, place].abs()
        # Where a radius lies about half-way between two numbers, either will do.
        assert (bits_of(radius) - bits_of(wanted)).abs().max() <= 1
        assert (radius != wanted).double().mean() < 0.02
    # Nothing but the slots was written, in no layer.
    for views in (ours, theirs):
        for view in views:
            view[block, :, place] = 0
    assert torch.equal(have, want)
    assert torch.equal(have._base, want._base)


def test_plans_count_positions() -> None:
    case = make_case(page_for(K4V4, 64), [(257, 3), (0, 0), (1, 1), (0, 1)], [(0, 2), (255, 3), (600, 1)])
    plan = CpuOperations(case.shape).planner().plan(case.batch)
    assert plan.segments.dtype == torch.int32
    assert plan.segments.tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("preset", [K4V4, "polarquant_k8v4"])
def test_chunks_and_prefix_hits_store_what_whole_prompts_do(preset: str) -> None:
    """A request in chunks that start inside segments, and one that finds another's blocks."""
    case = make_case(page_for(preset, 64), [(600, 1), (600, 1)], centred=True)
    ops = CpuOperations(case.shape)
    position = torch.arange(600)
    key, value = centred_keys(case.tables, position, torch.bfloat16), torch.randn(600, 2, 64).bfloat16()
    whole, parts = case.cache, torch.zeros_like(case.cache)
    table = case.batch.block_table.clone()
    table[1, :18] = table[0, :18]

    def step(cache: torch.Tensor, request: int, start: int, end: int) -> None:
        starts = torch.tensor([0, end - start], dtype=torch.int32)
        batch = Batch(
            num_decodes=0,
            num_decode_tokens=0,
            num_prefills=1,
            num_tokens=end - start,
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor([end], dtype=torch.int32),
            block_table=table[request : request + 1],
            context_lens_cpu=torch.tensor([start], dtype=torch.int32),
        )
        at = position[start:end]
        slots = table[request, at // 16].long() * 16 + at % 16
        segments = ops.planner().plan(batch).segments
        ops.store(key[start:end], value[start:end], cache, slots, case.tables, segments)

    step(whole, 0, 0, 600)
    for start, end in ((0, 100), (100, 255), (255, 258), (258, 600)):
        step(parts, 0, start, end)
    step(parts, 1, 288, 600)
    for request in (0, 1):
        have, want = (
            reference.read_kv(
                cache, table[row], 600, case.page, reference.rows(case.page), torch.bfloat16, case.tables
            )
            for cache, row in ((parts, request), (whole, 0))
        )
        for x, y in zip(have, want, strict=True):
            assert torch.equal(x, y)
    assert relative_error(want[0], key) < 0.06


@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_zeros_and_what_is_not_finite_never_are_centres(preset: str) -> None:
    case = make_case(page_for(preset, 64), [(32, 1)])
    key, value = (vectors((32, 2, 64), torch.bfloat16, CPU) for _ in "kv")
    slots = torch.cat([case.batch.block_table[0, block].long() * 16 + torch.arange(16) for block in (0, 1)])
    pages = []
    for words in (None, 0, -1, 0x7F807F80):
        held = case.tables
        if words is not None:
            held = held._replace(centres=torch.full((3, 2, 32), words, dtype=torch.int32))
        cache = torch.zeros_like(case.cache)
        CpuOperations(case.shape).store(key, value, cache, slots, held, torch.arange(32).int())
        pages.append(cache)
    assert all(torch.equal(page, pages[0]) for page in pages[1:])


def test_tables_may_be_filled_in_place() -> None:
    """As a layer's are when its model has run for the first time."""
    case = make_case(page_for(K4V4, 64), [(300, 1)], centred=True)
    ops, filled = CpuOperations(case.shape), case.tables
    plan = ops.planner().plan(case.batch)
    held = tables(case.page.slot, torch.bfloat16, CPU, 2, len(filled.centres))
    outs = []
    for _ in range(2):
        outs.append(case.out())
        ops.decode(case.query, case.cache, plan, case.attention, held, outs[-1])
        for name in ("key_factors", "query_factors", "centres"):
            getattr(held, name).copy_(getattr(filled, name))
    want = case.expected_decode().out
    assert relative_error(outs[0], want) > 0.1
    assert relative_error(outs[1], want) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_what_is_stored_with_factors_comes_back(preset: str) -> None:
    case = make_case(page_for(preset, 128, 32), [(64, 1)], heads=3, uneven=True)
    key, value = (vectors((64, 3, 128), torch.bfloat16, CPU) for _ in "kv")
    table = case.batch.block_table[0, :2].long()
    slots = (table[:, None] * 32 + torch.arange(32)).flatten()
    segments = torch.zeros(64, dtype=torch.int32)
    CpuOperations(case.shape).store(key, value, case.cache, slots, case.tables, segments)
    slot = case.page.slot
    for x, back, vector, kind in zip(
        (key, value), case.stored(0, 64), (slot.key, slot.value), ("key", "value"), strict=True
    ):
        factors = getattr(case.tables, f"{kind}_factors")
        # Errors are as large as the codec's where it looks, which is at vectors times factors.
        error = relative_error(back * factors, x * factors)
        assert error < {2: 0.33, 2.5: 0.23, 3: 0.17, 3.5: 0.12, 4: 0.09, 8: 0.04, 16: 1e-6}[vector.bits]


def largest_radii(scale: float) -> torch.Tensor:
    at = page_for(K4V4, 64)
    cache = empty_cache(at, 1, 1, CPU)
    x = (torch.randn(16, 1, 64).sign() * scale).bfloat16()
    held = tables(at.slot, torch.bfloat16, CPU)
    held = held._replace(key_factors=held.key_factors * 64, query_factors=held.query_factors / 64)
    ops = CpuOperations(LayerShape(at.slot, 1, 1, torch.bfloat16, CPU))
    ops.store(x, x, cache, torch.arange(16), held, torch.zeros(16, dtype=torch.int32))
    return reference.page_views(cache, at, reference.rows(at)).key_radius


def test_radii_are_never_infinite() -> None:
    largest = torch.finfo(torch.bfloat16).max
    assert (largest_radii(largest) == largest).all()
    assert (largest_radii(largest / 256) < largest).all()


def test_raw_vectors_are_stored_whatever_they_hold() -> None:
    at = page_for("polarquant_lossless", 64)
    x = torch.randn(16, 1, 64).bfloat16()
    x[3, 0, 5], x[4, 0, 6], x[5] = NAN, float("-inf"), 0
    cache = empty_cache(at, 1, 1, CPU)
    ops = CpuOperations(LayerShape(at.slot, 1, 1, torch.bfloat16, CPU))
    # Raw keys are never centred.
    held = plain_tables(at.slot, 1, torch.bfloat16)
    held = held._replace(centres=pack_centres(x[:1].float(), torch.bfloat16))
    ops.store(x, x, cache, torch.arange(16), held, torch.zeros(16, dtype=torch.int32))
    views = reference.page_views(cache, at, reference.rows(at))
    for codes in (views.key_codes, views.value_codes):
        back = codes[0, 0].view(torch.bfloat16)
        assert torch.equal(back.nan_to_num(9), x[:, 0].nan_to_num(9))
        assert back.isnan().sum() == 1


@pytest.mark.parametrize("centred", [False, True])
def test_vectors_with_nan_are_stored_as_zero_and_disturb_nobody(centred: bool) -> None:
    case = make_case(page_for(K4V4, 128), [(40, 1)], centred=centred)
    key, value = (vectors((40, 2, 128), torch.bfloat16, CPU) for _ in "kv")
    key[3, 0, 5], value[7, 1, 0], key[9, 1] = NAN, float("inf"), 0
    slots = (case.batch.block_table[0, :3].long()[:, None] * 16 + torch.arange(16)).flatten()[:40]
    segments = torch.zeros(40, dtype=torch.int32)
    CpuOperations(case.shape).store(key, value, case.cache, slots, case.tables, segments)
    views = reference.page_views(case.cache, case.page, reference.rows(case.page))
    for views_of, token, head in (("key", 3, 0), ("value", 7, 1), ("key", 9, 1)):
        block, place = slots[token] // 16, slots[token] % 16
        radius = getattr(views, f"{views_of}_radius")[block, head, place]
        assert radius == 0 and not radius.signbit()
        codes = getattr(views, f"{views_of}_codes")[block, :, place]
        assert not codes[head].any() and codes[1 - head].any()
    check_decode(case)


def prefill(case: Case) -> torch.Tensor:
    out = case.out()
    ops = CpuOperations(case.shape)
    plan = ops.planner((case.attention.window,)).plan(case.batch)
    ops.prefill(case.query, case.key, case.value, case.cache, plan, case.attention, case.tables, out)
    return out


def prefill_in(case: Case, segment_tokens: int) -> torch.Tensor:
    """Of a single prefill, so many tokens of its prefix at a time."""
    out = case.out()
    prefill_attention(
        case.query,
        case.key,
        case.value,
        case.cache,
        case.batch.block_table[0],
        int(case.batch.context_lens_cpu),
        case.page,
        LoopTables.of(case.page.slot, case.tables, case.query.dtype),
        case.attention,
        out,
        segment_tokens,
    )
    return out


def check_prefill(case: Case) -> None:
    """Against float64 attention over the decoded prefix and the fresh keys and values as they are."""
    out, want, rows = prefill(case), case.expected_prefill(), case.batch.prefill_rows
    assert relative_error(out[rows], want[rows]) < 2 * TOLERANCE[case.query.dtype]
    out[rows] = UNTOUCHED
    assert (out == UNTOUCHED).all(), "rows of no prefill were written"


@pytest.mark.sampled
@pytest.mark.parametrize("preset", ALL_PRESETS)
@pytest.mark.parametrize("chunk", [(0, 33), (1, 1), (37, 20), (1000, 3)], ids=str)
def test_prefill_attends_to_the_prefix_and_causally_to_itself(preset: str, chunk: tuple[int, int]) -> None:
    check_prefill(make_case(page_for(preset, 128, 48), [], [chunk], group=3))


@pytest.mark.parametrize("head_dim", DIMS)
def test_prefill_of_every_head_dim(head_dim: int) -> None:
    check_prefill(make_case(page_for(K4V4, head_dim), [], [(50, 31)], dtype=torch.float16))


@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_prefill_with_factors_of_every_head(preset: str) -> None:
    check_prefill(make_case(page_for(preset, 64), [], [(50, 9), (0, 4)], heads=3, uneven=True))


@pytest.mark.sampled
@pytest.mark.parametrize("preset", ALL_PRESETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_with_centres(preset: str, dtype: torch.dtype) -> None:
    """The segment after the prefixes' last one is poisoned."""
    chunks = [(255, 3), (256, 4), (511, 2), (0, 5)]
    check_prefill(make_case(page_for(preset, 128), [], chunks, dtype=dtype, heads=3, centred=True))


@pytest.mark.parametrize("segment_tokens", [16, 50, 100, 1000])
@pytest.mark.parametrize("kind", ["codec", "uneven", "centred"])
def test_prefill_merges_the_segments_of_a_prefix(segment_tokens: int, kind: str) -> None:
    case = make_case(
        page_for("polarquant_k3v3", 64, 32),
        [],
        [(300, 9)],
        dtype=torch.float16,
        uneven=kind == "uneven",
        centred=kind == "centred",
    )
    out = prefill_in(case, segment_tokens)
    assert relative_error(out, case.expected_prefill()) < 2 * TOLERANCE[torch.float16]


@pytest.mark.parametrize("from_pages", [False, True])
@pytest.mark.parametrize("window", [1, 16, 40, 130, 1000])
def test_prefill_sees_its_windows_alone(window: int, from_pages: bool) -> None:
    """Blocks before all windows are out of range."""
    chunks = [(0, 33), (1, 1), (37, 20), (150, 3), (60, 290)]
    check_prefill(
        make_case(page_for(K4V4, 64), [], chunks, group=GROUP, from_pages=from_pages, window=window)
    )


@pytest.mark.parametrize("segment_tokens", [16, 50, 1000])
@pytest.mark.parametrize("window", [20, 120])
def test_prefill_merges_the_segments_of_a_window(segment_tokens: int, window: int) -> None:
    """Later queries see fewer of a prefix's segments, or none."""
    case = make_case(page_for(K4V4, 64), [], [(300, 90)], window=window)
    assert relative_error(prefill_in(case, segment_tokens), case.expected_prefill()) < 8e-3


@pytest.mark.sampled
@pytest.mark.parametrize("preset", ALL_PRESETS)
@pytest.mark.parametrize(
    "kind",
    [{}, {"soft_cap": 1.0}, {"sinks": SINKS}, {"window": 30, "soft_cap": 2.0, "sinks": SINKS}],
    ids=lambda kind: "-".join(kind) or "plain",
)
def test_prefill_off_the_pages_of_every_format_and_kind(preset: str, kind: dict[str, Any]) -> None:
    chunks = [(250, 9), (0, 140), (0, 1)]
    check_prefill(
        make_case(page_for(preset, 64), [], chunks, group=GROUP, centred=True, from_pages=True, **kind)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind",
    [{"soft_cap": 1.0}, {"sinks": SINKS}, {"window": 30, "soft_cap": 2.0, "sinks": SINKS}],
    ids="-".join,
)
def test_prefill_of_every_kind(kind: dict[str, Any], dtype: torch.dtype) -> None:
    chunks = [(250, 9), (0, 140), (0, 1), (70, 40)]
    check_prefill(
        make_case(page_for(K4V4, 64), [], chunks, dtype=dtype, group=GROUP, centred=True, padding=1, **kind)
    )


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("preset", [K4V4, "polarquant_k8v4"])
def test_a_batch_of_decodes_and_prefills(preset: str, centred: bool) -> None:
    """A step as a layer runs it: store everything, then both attentions into one output."""
    case = make_case(
        page_for(preset, 128, 32),
        [(75, 1), (33, 3), (0, 0), (4, 4)],
        [(40, 7), (0, 33), (65, 1)],
        padding=2,
        uneven=not centred,
        centred=centred,
    )
    check_decode(case)
    check_prefill(case)
    ops = operations(case.shape, Limits(8), no_dense_attention)
    plan, out = ops.planner().plan(case.batch), case.out()
    assert ops.order == "rows" and ops.nbytes == 0
    ops.decode(case.query, case.cache, plan, case.attention, case.tables, out)
    ops.prefill(case.query, case.key, case.value, case.cache, plan, case.attention, case.tables, out)
    want = case.expected_decode().out + case.expected_prefill()
    rows = case.batch.num_tokens
    assert relative_error(out[:rows], want[:rows]) < 2 * TOLERANCE[torch.bfloat16]
    assert (out[rows:] == UNTOUCHED).all()


def no_dense_attention(*args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
    raise AssertionError("a CPU has its own")


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_scale_is_used(scale: float) -> None:
    case = make_case(page_for(K4V4, 64), [(20, 1)])
    case.attention = Attention(scale)
    check_decode(case)


def test_layers_with_other_tables_share_operations() -> None:
    """Also where new tables take the memory of ones that are gone."""
    case = make_case(page_for(K4V4, 64), [(40, 1)])
    ops = CpuOperations(case.shape)
    plan = ops.planner().plan(case.batch)
    for turn in range(6):
        fresh = make_case(page_for(K4V4, 64), [(40, 1)], uneven=turn % 2 == 1)
        out = fresh.out()
        ops.decode(
            fresh.query, fresh.cache, ops.planner().plan(fresh.batch), fresh.attention, fresh.tables, out
        )
        assert relative_error(out, fresh.expected_decode().out) < TOLERANCE[torch.bfloat16]
    out = case.out()
    ops.decode(case.query, case.cache, plan, case.attention, case.tables, out)
    assert relative_error(out, case.expected_decode().out) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("preset", [K4V4, "polarquant_k8v4", "polarquant_lossless"])
@pytest.mark.parametrize("from_pages", [False, True])
def test_warm_up_compiles_everything(preset: str, from_pages: bool) -> None:
    from vllm_polarquant.kernels.cpu import read, write

    case = make_case(page_for(preset, 96, 48), [(40, 2)], [(40, 7)])
    ops = CpuOperations(case.shape)
    ops.warm_up(case.page, case.tables, Attention(1.0), from_pages)
    loops = (read.attend, read.gather, write.store_polar, write.store_codes, write.take_away)
    compiled = [len(loop.signatures) for loop in loops]
    plan = ops.planner().plan(case.batch)
    ops.store(case.key, case.value, case.cache, torch.arange(9), case.tables, plan.segments)
    case.attention = Attention(1.0, 30, 2.0, torch.zeros(4))
    decode(case)
    prefill(case)
    assert [len(loop.signatures) for loop in loops] == compiled


def test_golden_page() -> None:
    """The bytes that this page format stands for on a CPU; cpu_cases.py says how to renew them."""
    assert bytes(golden_page().flatten().tolist()) == GOLDEN
    cache = torch.zeros(1, 1, 16, GOLDEN_PAGE.slot.nbytes, dtype=torch.uint8)
    held = tables(GOLDEN_PAGE.slot, torch.bfloat16, CPU)
    ops = CpuOperations(LayerShape(GOLDEN_PAGE.slot, 1, 1, torch.bfloat16, CPU))
    ops.store(*golden_vectors(), cache, torch.arange(16), held, torch.zeros(16, dtype=torch.int32))
    # Cells name the nearest points of these vectors, so the search finds what the reference finds.
    assert bytes(cache.flatten().tolist()) == GOLDEN


def test_golden_page_lies_in_rows() -> None:
    """Read without the package: of the last token, codes and radii."""
    key, value = (x[15, 0].double() for x in golden_vectors())
    key_codes, value_codes = GOLDEN[15 * 24 : 16 * 24], GOLDEN[16 * 24 + 15 * 16 : 16 * 40]
    radii = torch.frombuffer(bytearray(GOLDEN[16 * 40 + 15 * 4 :]), dtype=torch.bfloat16)
    held, slot = tables(GOLDEN_PAGE.slot, torch.bfloat16, CPU), GOLDEN_PAGE.slot
    for x, codes, radius, vector, error in (
        (key, key_codes, radii[0], slot.key, 0.2),
        (value, value_codes, radii[1], slot.value, 0.36),
    ):
        unit = unit_vectors(torch.tensor(list(codes), dtype=torch.uint8), vector, torch.bfloat16)
        back = restored(unit * decode_radius(radius).double(), held.query_factors[0], held.mixing)
        assert relative_error(back, x) < error


def test_numbas_threads_leave_nested_parallel_regions_forbidden() -> None:
    """Numba allows them, and torch's bfloat16 attention then takes five times as long."""
    omp_get_max_active_levels = getattr(ctypes.CDLL(None), "omp_get_max_active_levels", None)
    if omp_get_max_active_levels is None:
        pytest.skip("torch does not use OpenMP here")
    decode(make_case(page_for(K4V4, 128), [(9, 1)]))
    assert omp_get_max_active_levels() == 1


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
def test_decode_takes_at_most_twice_as_long_as_vllms_own(batch: int) -> None:
    """The best of several rounds counts: other work on the machine only ever makes a ratio worse."""
    pytest.importorskip("vllm")
    rounds = []
    while len(rounds) < 8 and (not rounds or min(rounds) > 2):
        rounds.append(bench_cpu.measure(K4V4, batch, context=4096, turns=15).ratio)
    assert min(rounds) <= 2, rounds
