"""The Triton kernels against reference.py, on the same pages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import (
    ALL_FORMATS,
    ALL_PRESETS,
    DTYPES,
    LAYOUTS,
    OUT_OF_RANGE_BLOCK,
    Batch,
    attention_tolerance,
    bits_of,
    cosines,
    empty_cache,
    make_batch,
    on_gpu,
    page_for,
    radius_for,
    relative_error,
    vectors,
)

from vllm_polarquant import reference
from vllm_polarquant.attention import Attention
from vllm_polarquant.codec import (
    decode_radius,
    encode_radius,
    rotation,
    tables,
)
from vllm_polarquant.format import HEAD_DIMS, LOSSLESS
from vllm_polarquant.kernels.triton import launch as launches
from vllm_polarquant.kernels.triton import page_io, store
from vllm_polarquant.kernels.triton.constants import page_constants
from vllm_polarquant.kernels.triton.decode import DecodeWorkspace, decode_attention, make_schedule
from vllm_polarquant.kernels.triton.gather import gather_prefix
from vllm_polarquant.kernels.triton.lanes import bonus_bytes, exchange_bytes, words_bytes
from vllm_polarquant.kernels.triton.launch import Gpu
from vllm_polarquant.kernels.triton.page_io import lane_order
from vllm_polarquant.kernels.triton.prefill import merge_prefix
from vllm_polarquant.kernels.triton.rotate import rotate
from vllm_polarquant.kernels.triton.schedule import Schedule, plan
from vllm_polarquant.kernels.triton.store import store_kv
from vllm_polarquant.page import Page

NAN = float("nan")
K4V4 = "polarquant_k4v4"


def gpu_of(device: torch.device, num_sms: int = 8) -> Gpu:
    """The device's, with few SMs: small batches cut for all of them would take the interpreter seconds."""
    return replace(Gpu.of(device), num_sms=num_sms)


def workspace_for(batch: Batch, max_query_len: int, num_sms: int = 8) -> DecodeWorkspace:
    tokens, num_heads, _ = batch.query.shape
    workspace = DecodeWorkspace.allocate(
        batch.page.slot,
        tokens,
        num_heads,
        batch.cache.shape[1],
        batch.query.dtype,
        batch.query.device,
        max_reqs=len(batch.seq_lens),
        max_query_len=max_query_len,
        gpu=gpu_of(batch.query.device, num_sms),
    )
    for buffer in (workspace.query, workspace.partial_out, workspace.partial_lse):
        buffer.fill_(NAN)
    return workspace


def schedule_for(batch: Batch, max_query_len: int, num_sms: int = 8) -> Schedule:
    """A schedule planned for the batch."""
    schedule = make_schedule(
        batch.page.slot,
        batch.query.shape[1],
        batch.cache.shape[1],
        len(batch.seq_lens),
        batch.query.device,
        max_query_len,
        gpu_of(batch.query.device, num_sms),
    )
    schedule.first.fill_(-1)
    schedule.items.fill_(-1)
    schedule.begin.fill_(-1)
    plan(batch.seq_lens, batch.query_start_loc, schedule, batch.attention.window)
    return schedule


def run_decode(
    batch: Batch,
    max_query_len: int,
    schedule: Schedule | None = None,
    num_sms: int = 8,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.full_like(batch.query, NAN)
    out[int(batch.query_start_loc[-1]) :] = 7
    workspace = workspace_for(batch, max_query_len, num_sms)
    decode_attention(
        batch.query,
        batch.cache,
        batch.block_table,
        batch.seq_lens,
        batch.query_start_loc,
        max_query_len,
        batch.page,
        batch.attention,
        batch.tables,
        out,
        workspace,
        schedule or schedule_for(batch, max_query_len, num_sms),
        lse,
    )
    assert (workspace.arrived == 0).all(), "the next launch would merge too early"
    return out


def check_decode(batch: Batch, max_query_len: int, num_sms: int = 8) -> None:
    before = batch.cache.clone()
    out = run_decode(batch, max_query_len, num_sms=num_sms)
    want = batch.reference().out
    owned = int(batch.query_start_loc[-1])
    tolerance = attention_tolerance(batch.query.dtype, batch.query.device)
    assert relative_error(out[:owned], want[:owned]) < tolerance
    assert (out[owned:] == 7).all(), "rows of no request were written"
    assert torch.equal(batch.cache, before)


def store_reference(key, value, cache, slots, page: Page) -> None:
    reference.store_kv(key, value, cache, slots, page, lane_order(page))


def views_of(cache: torch.Tensor, page: Page) -> reference.PageViews:
    return reference.page_views(cache, page, lane_order(page))


def check_store(
    key: torch.Tensor,
    value: torch.Tensor,
    have: torch.Tensor,
    want: torch.Tensor,
    slots: torch.Tensor,
    page: Page,
) -> None:
    """Compare a cache that store_kv wrote with the reference's; no slot may be padding."""
    order = lane_order(page)
    ours, theirs = reference.page_views(have, page, order), reference.page_views(want, page, order)
    block, place = slots // page.block_size, slots % page.block_size
    for x, vector, kind in ((key, page.slot.key, "key"), (value, page.slot.value, "value")):
        codes, expected = (getattr(views, f"{kind}_codes")[block, :, place] for views in (ours, theirs))
        lost = cosines(x, expected, vector, x.dtype) - cosines(x, codes, vector, x.dtype)
        if vector.kind == "polar":
            # Cells may name the farther of two points that are about as near.
            assert lost.mean() < 0.02 * (1 - cosines(x, expected, vector, x.dtype)).mean()
            assert lost.max() < 0.004
        else:
            assert (codes != expected).double().mean() < 0.01
            assert lost.max() < 1e-5
        radius = getattr(ours, f"{kind}_radius")[block, :, place]
        wanted = radius_for(x, codes, vector, x.dtype)
        assert (bits_of(radius) - bits_of(wanted)).abs().max() <= 1
        for views, fill in ((ours, theirs), (theirs, ours)):
            getattr(views, f"{kind}_codes")[block, :, place] = 0
            getattr(fill, f"{kind}_radius")[block, :, place] = 0
    # With the written slots wiped, nothing else may differ.
    assert torch.equal(have, want)


@pytest.mark.parametrize(("preset", "head_dim"), ALL_FORMATS)
def test_store_agrees_with_the_reference(preset, head_dim, device):
    page = page_for(preset, head_dim)
    key, value = (vectors((7, 2, head_dim), torch.bfloat16, device) for _ in "kv")
    have, want = (empty_cache(page, 3, 2, device) for _ in "hw")
    slots = torch.tensor([16, 47, 3, 32, 0, 31, 17], device=device)
    store_kv(key, value, have, slots, page, tables(page.slot, key.dtype, device))
    store_reference(key, value, want, slots, page)
    check_store(key, value, have, want, slots, page)


@pytest.mark.parametrize(("preset", "head_dim"), [(K4V4, 64), ("polarquant_k3v2", 80), on_gpu(K4V4, 512)])
def test_store_of_many_tokens_finds_the_codes_of_few(preset, head_dim, device):
    """Windows of the search go side by side for few tokens, one after the other for many."""
    page = page_for(preset, head_dim)
    key, value = (vectors((9, 2, head_dim), torch.bfloat16, device) for _ in "kv")
    few, many, want = (empty_cache(page, 2, 2, device) for _ in "fmw")
    slots = torch.arange(9, device=device)
    store_kv(key, value, few, slots, page, tables(page.slot, key.dtype, device))
    launch = store.launch_config(store.MANY_VECTORS, page, Gpu.of(device))
    store_kv(key, value, many, slots, page, tables(page.slot, key.dtype, device), launch)
    # Paths of equal cost may be chosen differently.
    assert (few != many).double().mean() < 0.01
    store_reference(key, value, want, slots, page)
    check_store(key, value, many, want, slots, page)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layout", "block_size"), LAYOUTS)
def test_store_in_every_layout(layout, block_size, dtype, device):
    page = page_for("polarquant_k3v2", 64, block_size)
    # As vLLM passes them: views into the output of one projection.
    packed = vectors((9, 8, 64), dtype, device)
    key, value = packed[:, 2:5], packed[:, 5:8]
    have, want = (empty_cache(page, 3, 3, device, layout) for _ in "hw")
    slots = torch.randperm(3 * block_size)[:9].to(device)
    store_kv(key, value, have, slots, page, tables(page.slot, dtype, device))
    store_reference(key, value, want, slots, page)
    check_store(key, value, have, want, slots, page)


def test_store_drops_padding(device):
    page = page_for(K4V4, 64)
    key, value = (vectors((20, 2, 64), torch.float16, device) for _ in "kv")
    key[19:] = NAN
    have, want = (empty_cache(page, 2, 2, device) for _ in "hw")
    slots = torch.arange(18, device=device)
    slots[::3] = -1
    store_kv(key, value, have, slots, page, tables(page.slot, key.dtype, device))
    kept = slots >= 0
    store_reference(key[:18][kept], value[:18][kept], want, slots[kept], page)
    check_store(key[:18][kept], value[:18][kept], have, want, slots[kept], page)


def test_store_of_nothing(device):
    page = page_for(K4V4, 64)
    cache = empty_cache(page, 1, 2, device)
    key = torch.empty(0, 2, 64, dtype=torch.bfloat16, device=device)
    slots = torch.empty(0, dtype=torch.int64, device=device)
    store_kv(key, key, cache, slots, page, tables(page.slot, key.dtype, device))
    assert (cache == 0xFF).all()


@pytest.mark.parametrize("preset", ["polarquant_k8v4", "polarquant_k2v2"])
def test_store_of_extreme_vectors(preset, device):
    page = page_for(preset, 64)
    x = torch.randn(8, 1, 64, device=device)
    x[0, 0, 5] = NAN
    x[1, 0, 6] = float("inf")
    x[2, 0, 63] = -float("inf")
    x[3] = 0
    # Where an fp8 key's radius is not yet subnormal.
    x[4] *= 1e-34
    x[5] *= 5e37
    x[6] *= 1e36
    x[6, 0, 9] = -3e38
    x[7] *= 1e-12
    x = x.bfloat16()
    everything, have, want = (empty_cache(page, 1, 1, device) for _ in "ehw")
    constants = tables(page.slot, x.dtype, device)
    slots = torch.arange(8, device=device)
    store_kv(x, x, everything, slots, page, constants)
    views = views_of(everything, page)
    for codes, radius in (
        (views.key_codes, views.key_radius),
        (views.value_codes, views.value_radius),
    ):
        assert (codes[0, 0, :4] == 0).all()
        assert (radius[0, 0, :4] == 0).all()
        assert (radius[0, 0, 4:8] != 0).all()
    store_kv(x[4:], x[4:], have, slots[4:], page, constants)
    store_reference(x[4:], x[4:], want, slots[4:], page)
    check_store(x[4:], x[4:], have, want, slots[4:], page)


@triton.jit
def encode_fp8_kernel(x, out, N: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(out + index, store.encode_fp8(tl.load(x + index)).to(tl.uint8))


def test_fp8_codes_round_as_torch_does(device):
    """All magnitudes of 12 leading bits, so every code and every tie between two."""
    bits = torch.arange(1 << 15, dtype=torch.int32, device=device) << 16
    x = bits.view(torch.float32)
    x = torch.where(x <= 448, x, 0.0)
    x = torch.cat([x, -x])
    have = torch.empty(len(x), dtype=torch.uint8, device=device)
    encode_fp8_kernel[(1,)](x, have, len(x))
    want = x.to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(have, want)


def test_a_lossless_page_holds_the_bits(device):
    page = page_for(LOSSLESS, 96)
    key, value = (vectors((5, 2, 96), torch.bfloat16, device) for _ in "kv")
    value[2, 1, 7] = NAN
    cache = empty_cache(page, 1, 2, device)
    store_kv(key, value, cache, torch.arange(5, device=device), page, tables(page.slot, key.dtype, device))
    views = views_of(cache, page)
    for x, codes in ((key, views.key_codes), (value, views.value_codes)):
        stored = codes[0, :, :5].transpose(0, 1).contiguous().view(torch.int16)
        assert torch.equal(stored, x.view(torch.int16))


@triton.jit
def code_offset_kernel(out, TOKENS: tl.constexpr, PAD: tl.constexpr, VECTOR: tl.constexpr):
    slot, byte = tl.arange(0, TOKENS)[:, None], tl.arange(0, PAD)[None, :]
    offset = page_io.code_offset(slot, byte, VECTOR)
    tl.store(out + slot * VECTOR.row_bytes + byte, offset, mask=byte < VECTOR.row_bytes)


@pytest.mark.parametrize("preset", ALL_PRESETS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_code_offsets_are_the_host_table_s(preset, head_dim, device):
    page = page_for(preset, head_dim, 32)
    constants, order = page_constants(page), lane_order(page)
    for vector, want in ((constants.keys, order.key), (constants.values, order.value)):
        have = torch.empty(32, vector.row_bytes, dtype=torch.int32, device=device)
        code_offset_kernel[(1,)](have, 32, triton.next_power_of_2(vector.row_bytes), vector)
        assert torch.equal(have.cpu(), torch.cat([want, want + 16 * vector.row_bytes]).int())


def uneven_factors(heads: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """Factors that differ from head to head, and are no powers of two."""
    return torch.randn(heads, head_dim, device=device).sign() * torch.empty(
        heads, head_dim, device=device
    ).uniform_(0.3, 3)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotate(head_dim, inverse, device):
    page = page_for(K4V4, head_dim)
    x = torch.randn(5, 9, head_dim, device=device).half()[:, 1:]
    out = torch.full_like(x, NAN)
    constants = tables(page.slot, x.dtype, device)
    rotate(x, out, constants.mixing, constants.query_factors, inverse)
    turn = rotation(head_dim).to(x.device)
    want = x.double() @ (turn if inverse else turn.T)
    torch.testing.assert_close(out.double(), want, rtol=2**-10, atol=1e-5)

    factors = uneven_factors(2, head_dim, device)
    own = factors.double().repeat_interleave(4, 0)
    rotate(x, out, constants.mixing, factors, inverse)
    mixing = constants.mixing.double()
    want = (x.double() @ mixing) * own if inverse else (x.double() * own).half().double() @ mixing.T
    torch.testing.assert_close(out.double(), want, rtol=2**-9, atol=2e-3)


@pytest.mark.parametrize(
    ("preset", "head_dim"), [(K4V4, 64), ("polarquant_k8v4", 64), ("polarquant_k3v3", 80)]
)
def test_keys_and_queries_have_factors_of_their_own(preset, head_dim, device):
    """Factors that cancel leave attention as it is, but for the codes' error, which they move about."""
    page = page_for(preset, head_dim)
    batch = make_batch(page, [30, 20], [1, 3], torch.float16, device)
    factors = uneven_factors(2, head_dim, device)
    own = batch.tables._replace(key_factors=factors, query_factors=1 / factors)
    key, value = (vectors((32, 2, head_dim), torch.float16, device) for _ in "kv")
    slots = torch.arange(32, device=device)
    plain, scaled, by_hand = (empty_cache(page, 2, 2, device) for _ in "psh")
    store_kv(key, value, plain, slots, page, batch.tables)
    store_kv(key, value, scaled, slots, page, own)
    signs = batch.tables.key_factors
    store_reference((key.float() * factors * signs).half(), value, by_hand, slots, page)
    order = lane_order(page)
    have, want = (reference.page_views(cache, page, order) for cache in (scaled, by_hand))
    assert (have.key_codes[:] != want.key_codes[:]).double().mean() < 0.03
    assert (have.value_codes[:] != want.value_codes[:]).double().mean() < 0.03
    table = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32, device=device)
    exact = replace(batch, cache=scaled, block_table=table, tables=own)
    by_query = replace(
        exact,
        query=(batch.query.float() * (signs / factors).repeat_interleave(2, 0)).half(),
        tables=batch.tables,
    )
    want = by_query.reference().out
    assert relative_error(run_decode(exact, 3), want) < attention_tolerance(torch.float16, device) * 2


@pytest.mark.parametrize(("preset", "head_dim"), ALL_FORMATS)
def test_decode_of_every_format(preset, head_dim, device):
    page = page_for(preset, head_dim)
    check_decode(make_batch(page, [37], [1], torch.bfloat16, device), 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layout", "block_size"), LAYOUTS)
def test_decode_in_every_layout(layout, block_size, dtype, device):
    page = page_for(K4V4, 64, block_size)
    check_decode(make_batch(page, [1, 133, 16], [1, 1, 1], dtype, device, layout=layout), 1)


@pytest.mark.parametrize("group", range(1, 9))
def test_decode_shares_kv_heads(group, device):
    page = page_for("polarquant_k3v2", 64)
    check_decode(make_batch(page, [40, 3], [1, 1], torch.float16, device, 2, group), 1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_where_maxima_keep_growing(dtype, device):
    """Logits hundreds apart, which neither a rotation nor codes make inexact, and ten tiles a warp."""
    batch = make_batch(page_for(LOSSLESS, 64), [1300], [1], dtype, device, 1, 8)
    check_decode(replace(batch, query=64 * batch.query), 1, num_sms=1)


@pytest.mark.parametrize("num_sms", [1, 2, 32])
@pytest.mark.parametrize("preset", [K4V4, LOSSLESS])
def test_decode_with_few_and_many_programs(preset, num_sms, device):
    page = page_for(preset, 64)
    check_decode(make_batch(page, [300, 129, 64], [1, 1, 1], torch.float16, device, 1), 1, num_sms)


@pytest.mark.slow
def test_a_program_ends_one_request_and_begins_the_next(device):
    batch = make_batch(page_for(K4V4, 64), [1000, 2500, 64], [1] * 3, torch.float16, device, 1)
    schedule = schedule_for(batch, 1, num_sms=1)
    assert schedule.first.tolist() == [0, 2, 4]
    assert schedule.items[:4, 0].tolist() == [0, 1, 1, 2], "no request is cut between the programs"
    check_decode(batch, 1, num_sms=1)


@pytest.mark.parametrize("planned", [[40, 20, 900], [900, 400, 17]])
def test_decode_stays_right_where_lengths_changed_after_planning(planned, device):
    batch = make_batch(page_for(K4V4, 64), [300, 129, 64], [1, 1, 1], torch.float16, device, 1)
    want = run_decode(batch, 1)
    stale = replace(batch, seq_lens=torch.tensor(planned, dtype=torch.int32, device=device))
    assert relative_error(run_decode(batch, 1, schedule_for(stale, 1)), want) < 1e-3


@pytest.mark.parametrize("query_len", [2, 3, 5, 8])
def test_decode_of_several_queries_is_causal(query_len, device):
    page = page_for(K4V4, 64)
    lens = [query_len, 66, 130]
    check_decode(make_batch(page, lens, [query_len] * 3, torch.float16, device, 1, 3), query_len, num_sms=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_of_a_mixed_batch(dtype, device):
    """Lengths that differ, requests with no query, padded requests and padded rows."""
    page = page_for("polarquant_k2v2", 80)
    batch = make_batch(
        page, [20, 5, 33, 0, 17, 0], [3, 5, 0, 1, 1, 0], dtype, device, heads=1, group=2, padding=3
    )
    check_decode(batch, 5)
    assert (run_decode(batch, 5)[8] == 0).all(), "a query of an empty request is not zero"


@pytest.mark.slow
def test_decode_of_more_rows_than_a_program_takes(device):
    page = page_for(K4V4, 64)
    batch = make_batch(page, [40, 16, 70], [16, 2, 9], torch.float16, device, heads=1, group=8)
    check_decode(batch, 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-5, 1e5])
def test_decode_of_tiny_and_huge_values(size, dtype, device):
    page = page_for("polarquant_k8v4", 64)
    batch = make_batch(page, [70], [1], dtype, device, heads=1)
    # Their radii lie outside what a float16 holds, as some of the tiny ones' values do.
    radius = views_of(batch.cache, page).value_radius
    radius.copy_(encode_radius(decode_radius(radius) * size))
    want = batch.reference().out
    out = run_decode(batch, 1)
    # A decoded value may pass float16's largest number, which no fp16 model's own values do.
    largest = torch.finfo(dtype).max
    out, want = out.double().clamp(-largest, largest), want.clamp(-largest, largest)
    # What float16 cannot represent any better is allowed for.
    slack = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * want.numel() ** 0.5
    error = (out - want).norm()
    assert error < attention_tolerance(dtype, device) * want.norm() + slack


def sinks_for(heads: int, device: torch.device) -> torch.Tensor:
    """Sinks with more, about as much and less weight than everything else, and one without any."""
    return torch.tensor([12.0, 3.0, -2.0, -60.0], device=device).repeat(heads)[:heads]


KINDS = {
    "plain": {},
    "all": dict(window=37, soft_cap=20.0, sinks=True),
    "window": dict(window=37),
    "cap": dict(soft_cap=1.5),
    "sinks": dict(sinks=True),
}
"""Of attention. The soft cap of 1.5 takes half of what most logits are."""


def attention_of(kind: str, head_dim: int, num_heads: int, device: torch.device) -> Attention:
    chosen = dict(KINDS[kind])
    if chosen.get("sinks"):
        chosen["sinks"] = sinks_for(num_heads, device)
    return Attention(head_dim**-0.5, **chosen)


def check_kind(batch: Batch, max_query_len: int, num_sms: int = 8) -> None:
    """Outputs and log-sum-exps against the reference; blocks that nobody sees are out of range."""
    want, window = batch.reference(), batch.attention.window
    counts = batch.query_start_loc.diff().tolist()
    if window is not None:
        for row, (length, count) in enumerate(zip(batch.seq_lens.tolist(), counts, strict=True)):
            unseen = max(length - count - window + 1, 0) // batch.page.block_size
            batch.block_table[row, :unseen] = OUT_OF_RANGE_BLOCK
    lse = torch.full(batch.query.shape[1::-1], NAN, device=batch.query.device)
    out = run_decode(batch, max_query_len, num_sms=num_sms, lse=lse)
    owned = sum(counts)
    # With centres, logits are sums of two products of rounded queries.
    slack = 2 if len(batch.tables.centres) > 1 else 1
    tolerance = slack * attention_tolerance(batch.query.dtype, batch.query.device)
    assert relative_error(out[:owned], want.out[:owned]) < tolerance
    assert (out[owned:] == 7).all()
    assert lse[:, owned:].isnan().all()
    some = torch.cat([length.expand(count) > 0 for length, count in zip(batch.seq_lens, counts, strict=True)])
    lse_atol = 3e-3 if batch.query.dtype == torch.float16 else 3e-2
    have, expected = lse[:, :owned].double(), want.lse[:, :owned]
    torch.testing.assert_close(have[:, some], expected[:, some], atol=slack * lse_atol, rtol=1e-3)
    sinks = batch.attention.sinks
    empty = torch.full((len(lse),), -float("inf")) if sinks is None else sinks.cpu()
    assert (
        (have[:, ~some].cpu() == empty.double()[:, None])
        .logical_or((have[:, ~some].cpu() - empty.double()[:, None]).abs() < 1e-5)
        .all()
    ), "where nothing is seen, the sinks are all there is"
    assert (out[:owned][~some] == 0).all()


@pytest.mark.parametrize(
    ("kind", "num_sms"),
    [("all", 8), ("all", 1), on_gpu("window", 8), on_gpu("cap", 8), on_gpu("sinks", 8)],
)
def test_decode_of_every_kind(kind, num_sms, device):
    """Windows that begin inside a chunk and at its edge, that cover a request, and an empty request."""
    attention = attention_of(kind, 64, 4, device)
    batch = make_batch(
        page_for(K4V4, 64), [150, 53, 0, 140], [1, 2, 1, 3], torch.float16, device, 1, 4, padding=2,
        attention=attention,
    )  # fmt: skip
    check_kind(batch, 3, num_sms)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["all", on_gpu("window"), on_gpu("cap"), on_gpu("sinks")])
@pytest.mark.parametrize(
    ("preset", "head_dim", "block_size", "dtype", "centred"),
    [
        ("polarquant_k3.5v3.5", 64, 48, torch.bfloat16, True),
        ("polarquant_k8v4", 64, 16, torch.bfloat16, False),
        ("polarquant_k3v2", 80, 32, torch.float16, False),
        (LOSSLESS, 64, 16, torch.float16, False),
        on_gpu(K4V4, 128, 16, torch.bfloat16, True),
        on_gpu(K4V4, 256, 16, torch.float16, True),
        on_gpu(K4V4, 512, 32, torch.bfloat16, True),
        on_gpu("polarquant_k8v4", 512, 16, torch.float16, False),
        on_gpu("polarquant_k2v2", 512, 16, torch.bfloat16, True),
        on_gpu(LOSSLESS, 512, 16, torch.bfloat16, False),
    ],
)
def test_decode_of_every_kind_and_format(preset, head_dim, block_size, dtype, centred, kind, device):
    attention = attention_of(kind, head_dim, 4, device)
    page = page_for(preset, head_dim, block_size)
    batch = make_batch(
        page, [140, 17], [2, 1], dtype, device, 2, 2, "BLNHC", centred=centred, attention=attention
    )
    check_kind(batch, 2)


def check_rows(preset, head_dim, queries, group, length, device, num_sms=8):
    """With all there is besides, fewer tokens than queries, an empty request, and splits to merge."""
    attention = attention_of("all", head_dim, 2 * group, device)
    batch = make_batch(
        page_for(preset, head_dim),
        [length, max(1, queries - 2), 0, 50],
        [queries, queries, 1, 1],
        torch.float16,
        device,
        2,
        group,
        centred=preset != LOSSLESS,
        attention=attention,
    )
    check_kind(batch, queries, num_sms)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize(
    ("preset", "head_dim", "queries", "group"),
    [(p, 128, queries, 4) for p in ALL_PRESETS for queries in (1, 2, 4, 7)]
    + [(K4V4, d, queries, 4) for d in HEAD_DIMS if d != 128 for queries in (1, 2, 4, 7)]
    + [(K4V4, 128, *rows) for rows in ((5, 1), (5, 3), (16, 1), (4, 8), (16, 8))],
)
def test_decode_of_every_number_of_rows(preset, head_dim, queries, group, device):
    """4, 8, 16 or 32 rows a program, all or some of them used, and more rows than a program takes."""
    check_rows(preset, head_dim, queries, group, 700, device)


@pytest.mark.parametrize(
    ("preset", "queries", "group"), [(K4V4, 7, 4), (LOSSLESS, 5, 3), ("polarquant_k2v2", 8, 1)]
)
def test_decode_of_several_tiles_of_rows(preset, queries, group, device):
    check_rows(preset, 64, queries, group, 60, device, num_sms=2)


def test_decode_of_values_that_come_late(device):
    """Of head_dim 512 registers hold the next chunk's keys, not its values."""
    batch = make_batch(page_for(K4V4, 512), [100], [1], torch.float16, device, 1, 4, centred=True)
    check_decode(batch, 1, num_sms=1)


@pytest.mark.slow
@pytest.mark.parametrize(("window", "queries"), [(1, 4), (2, 16), (129, 9), (5000, 4)])
def test_decode_of_windows_of_any_size(window, queries, device):
    """Narrower than a request's queries, wider than a tile of all warps, never biting."""
    attention = Attention(0.125, window=window)
    lens = [queries, 180 + queries]
    batch = make_batch(
        page_for(K4V4, 64), lens, [queries] * 2, torch.float16, device, 1, 2, attention=attention
    )
    check_kind(batch, queries, num_sms=1)


@pytest.mark.parametrize("planned", [[40, 20, 900], [900, 400, 17]])
def test_windows_stay_right_where_lengths_changed_after_planning(planned, device):
    attention = Attention(0.125, window=70)
    batch = make_batch(
        page_for(K4V4, 64), [300, 129, 64], [1, 1, 1], torch.float16, device, 1, attention=attention
    )
    stale = replace(batch, seq_lens=torch.tensor(planned, dtype=torch.int32, device=device))
    out = run_decode(batch, 1, schedule_for(stale, 1))
    assert relative_error(out, batch.reference().out) < attention_tolerance(torch.float16, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_caps_of_huge_logits(dtype, device):
    """Logits of some hundreds either way, all of which the cap takes to its ends."""
    attention = Attention(4.0, soft_cap=2.0)
    batch = make_batch(page_for(LOSSLESS, 64), [90], [1], dtype, device, 1, 8, attention=attention)
    check_decode(replace(batch, query=16 * batch.query), 1)


@pytest.mark.parametrize("num_sms", [1, 8])
def test_decode_tells_its_log_sum_exp(num_sms, device):
    batch = make_batch(page_for(K4V4, 64), [300, 17, 0], [2, 1, 1], torch.float16, device, 2, 3)
    lse = torch.full((6, 4), NAN, device=device)
    run_decode(batch, 2, num_sms=num_sms, lse=lse)
    torch.testing.assert_close(lse.double(), batch.reference().lse, atol=3e-3, rtol=1e-3)


def test_readers_ignore_the_sign_of_a_radius(device):
    batch = make_batch(page_for(K4V4, 64), [40], [1], torch.float16, device)
    before = run_decode(batch, 1)
    views = views_of(batch.cache, batch.page)
    for radius in (views.key_radius, views.value_radius):
        radius.copy_(-radius.abs())
    assert torch.equal(run_decode(batch, 1), before)


def test_decode_ignores_other_tokens_radii(device):
    """A stored zero vector has logit 0 and adds nothing; slots past the end may hold anything."""
    page = page_for(K4V4, 64)
    batch = make_batch(page, [21], [1], torch.float16, device, heads=1)
    views = views_of(batch.cache, page)
    block = int(batch.block_table[0, 0])
    views.key_radius[block, 0, 4] = 0
    views.value_radius[block, 0, 4] = 0
    last = int(batch.block_table[0, 1])
    assert views.key_radius[last, 0, 5:].isnan().all()
    check_decode(batch, 1)
    views.key_radius[last, 0, 5:] = float("inf")
    views.value_radius[last, 0, 5:] = float("inf")
    check_decode(batch, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("preset", "head_dim"), [(p, 64) for p in ALL_PRESETS] + [(K4V4, 80), on_gpu(K4V4, 512)]
)
def test_gather_unpacks_a_prefix(preset, head_dim, dtype, device):
    page = page_for(preset, head_dim)
    batch = make_batch(page, [50, 9, 33], [1, 1, 1], dtype, device, layout="BLNHC")
    start, length = [16, 0, 3], [34, 0, 30]
    lengths_cu = torch.tensor([0, *length]).cumsum(0).to(torch.int32).to(device)
    key, value = (torch.full((70, 3, head_dim), NAN, dtype=dtype, device=device)[:, :2] for _ in "kv")
    gather_prefix(
        batch.cache,
        batch.block_table,
        torch.tensor(start, dtype=torch.int32, device=device),
        lengths_cu,
        40,
        page,
        batch.tables,
        key,
        value,
    )
    for request, (first, count) in enumerate(zip(start, length, strict=True)):
        rows = slice(int(lengths_cu[request]), int(lengths_cu[request + 1]))
        want = reference.read_kv(
            batch.cache, batch.block_table[request], first + count, page, lane_order(page), dtype
        )
        for have, full in zip((key, value), want, strict=True):
            turned = (full[first:] * batch.tables.key_factors) @ batch.tables.mixing.double().T
            turned = turned.float()
            # The points and the product are rounded; the interpreter truncates bfloat16.
            rounding = 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(have[rows].float(), turned, rtol=rounding, atol=1e-4)
    assert key[64:].isnan().all()
    assert value[64:].isnan().all()


@pytest.mark.parametrize("head_dim", [64, 80, 192, 256, 512])
def test_merge_weighs_by_log_sum_exp(head_dim, device):
    page = page_for(K4V4, head_dim)
    out = torch.randn(7, 6, head_dim, device=device).half()[:, 1:5]
    prefix = torch.randn(7, 4, head_dim, device=device).half()
    lse, prefix_lse = (torch.randn(4, 9, device=device)[:, :7] * 3 for _ in "op")
    inf = float("inf")
    lse[0, 0], prefix_lse[0, 1], lse[1, 2], prefix_lse[1, 3] = inf, inf, -inf, -inf
    lse[2, 4], prefix_lse[2, 4] = inf, -inf
    out[0, 0] = prefix[1, 0] = out[4, 2] = prefix[4, 2] = NAN

    own, other = (x.where(x != inf, -inf).double().T[..., None] for x in (lse, prefix_lse))
    total = torch.logaddexp(own, other)
    weights = [torch.where(x > -inf, (x - total).exp(), 0.0) for x in (own, other)]
    turned = prefix.double() @ rotation(head_dim).to(device)
    parts = (out.double(), turned)
    want = sum(torch.where(w > 0, p * w, 0.0) for p, w in zip(parts, weights, strict=True))
    merge_prefix(out, lse, prefix, prefix_lse, tables(page.slot, out.dtype, device))
    torch.testing.assert_close(out.double(), want, rtol=2**-10, atol=1e-5)
    torch.testing.assert_close(lse, total[..., 0].T.float())


@pytest.mark.parametrize("preset", ALL_PRESETS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("copies", [16, 32])
def test_shared_memory_of_decode_can_be_had_by_a_launch(preset, head_dim, copies):
    """Static memory is 48 KB, less what Triton takes for rows to be merged where it asks for no more."""
    gpu = replace(Gpu.of(torch.device("cpu")), shared_bytes=(228 if copies == 32 else 100) << 10)
    assert gpu.table_copies == copies
    page = page_for(preset, head_dim)
    constants = page_constants(page)
    for sets in (1, 2, 4, 8):
        if sets > launches.config("decode", page.slot, gpu)["max_sets"]:
            continue
        chosen = launches.DecodeLaunch.of(page.slot, sets, gpu)
        layout = launches.table_layout(constants.keys.code, constants.values.code, copies, sets, head_dim)
        static, dynamic = layout[2:]
        if not dynamic:
            registers = launches.registers_of_output(head_dim, chosen.warps)
            static = max(static, exchange_bytes(registers, chosen.warps))
        static += words_bytes(chosen.shared_tiles, head_dim // 8) + bonus_bytes(chosen.warps, sets)
        merged = 4 * sets * 2 * constants.half_pad * 4
        assert static + (0 if dynamic else merged) <= 48 << 10
        assert dynamic == 0 or dynamic > 48 << 10
        assert not chosen.joined or sets > 1


def test_a_workspace_fits_every_batch_and_stays_small():
    page = page_for(K4V4, 128)
    for heads, kv_heads, queries in ((32, 8, 1), (32, 8, 16), (64, 8, 4), (28, 4, 1), (32, 32, 1)):
        workspace = DecodeWorkspace.allocate(
            page.slot, 1024, heads, kv_heads, torch.bfloat16, "meta", max_reqs=1024, max_query_len=queries
        )
        schedule = make_schedule(page.slot, heads, kv_heads, 1024, "meta", queries)
        # A split that is not a whole request has a row for each head of each query, of a program at most two.
        rows = 2 * schedule.programs * heads * queries
        assert rows <= workspace.partial_lse.numel()
        assert rows * 128 <= workspace.partial_out.numel()
        assert workspace.nbytes < 14e6 * heads / 32


def test_specific_launch_parameters_win():
    page = page_for(K4V4, 128)
    default = {"op": {"*": {"a": 1, "b": 1, "c": 1}, "d128": {"b": 2}, K4V4: {"c": 3}}}
    measured = {"op": {"*": {"a": 4}, f"{K4V4}-d64": {"a": 5}, f"{K4V4}-d128": {"c": 6}}}
    assert launches.resolve("op", page.slot, default) == {"a": 1, "b": 2, "c": 3}
    assert launches.resolve("op", page.slot, default, measured) == {"a": 4, "b": 2, "c": 6}
    with pytest.raises(KeyError, match="no launch parameters for 'other'"):
        launches.resolve("other", page.slot, default)


def test_launchers_name_what_is_wrong(device):
    page = page_for(K4V4, 64)
    batch = make_batch(page, [20], [1], torch.float16, device)
    key = torch.zeros(1, 2, 64, dtype=torch.float16, device=device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    wrong = [
        (dict(key=key.float()), "key must be bfloat16 or float16"),
        (dict(key=key[..., ::2]), r"\[tokens, heads, 64\]"),
        (dict(value=key.bfloat16()), "must agree"),
        (dict(slot_mapping=slots.int()), "slot_mapping must be torch.int64"),
        (dict(slot_mapping=slots.repeat(2)), "2 slots for 1 tokens"),
        (dict(cache=batch.cache[:, :1]), "not contiguous|agree"),
        (dict(cache=batch.cache[..., 1:]), "expected a cache"),
    ]
    good = dict(key=key, value=key, cache=batch.cache, slot_mapping=slots)
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            store_kv(**good | change, page=page, tables=batch.tables)

    def decode_with(max_query_len=1, workspace=None, schedule=None, lse=None, **change):
        changed = replace(batch, **change)
        decode_attention(
            changed.query,
            changed.cache,
            changed.block_table,
            changed.seq_lens,
            changed.query_start_loc,
            max_query_len,
            page,
            changed.attention,
            changed.tables,
            torch.empty_like(batch.query),
            workspace or workspace_for(batch, 1),
            schedule or schedule_for(batch, 1),
            lse,
        )

    small = workspace_for(batch, 1)
    small_schedule = schedule_for(batch, 1)
    many = torch.ones(2, dtype=torch.int32, device=device), torch.zeros(3, dtype=torch.int32, device=device)
    for call, message in (
        (lambda: decode_with(max_query_len=65), "max_query_len must be 1 to 64"),
        (lambda: decode_with(seq_lens=batch.seq_lens.long()), "seq_lens must be torch.int32"),
        (lambda: decode_with(block_table=batch.block_table.long()), "block_table must be"),
        (lambda: decode_with(query_start_loc=batch.seq_lens), "query_start_loc must be"),
        (lambda: decode_with(query=batch.query[:, :3]), "out must be"),
        (
            lambda: decode_with(attention=Attention(1.0, sinks=torch.zeros(3, device=device))),
            r"sinks must be dense float32 \[4\]",
        ),
        (lambda: decode_with(lse=torch.zeros(1, 4, device=device)), r"lse must be float32 \[4, 1\]"),
        (
            lambda: decode_with(tables=batch.tables._replace(query_factors=torch.ones(3, 64, device=device))),
            r"query_factors must be a dense float32 \[1 or 2, 64\]",
        ),
        (
            lambda: decode_with(workspace=replace(small, partial_lse=small.partial_lse[:1])),
            "workspace is too small",
        ),
        (lambda: decode_with(schedule=Schedule.allocate(1, 8, 64, device)), "in tiles of 64 tokens"),
        (lambda: decode_with(schedule=Schedule.allocate(0, 8, 128, device)), "is for up to 0 requests"),
        (lambda: plan(slots, slots, small_schedule), "seq_lens must be torch.int32"),
        (lambda: plan(batch.seq_lens, batch.seq_lens, small_schedule), "query_start_loc must be"),
        (lambda: plan(*many, small_schedule), "for up to 1 requests cannot hold 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_offsets_past_two_gigabytes(device):
    """The request's blocks lie at the end of a 3 GiB cache, past what an int32 offset reaches."""
    page = page_for(K4V4, 128)
    heads = 8
    blocks = 3 * 2**30 // (heads * page.nbytes)
    cache = torch.full((blocks, heads, 16, page.slot.nbytes), 0xFF, dtype=torch.uint8, device=device)
    small = empty_cache(page, 4, heads, device)
    key, value = (vectors((64, heads, 128), torch.bfloat16, device) for _ in "kv")
    slots = torch.arange(64, device=device)
    far = slots + (blocks - 4) * 16
    constants = tables(page.slot, key.dtype, device)
    store_kv(key, value, cache, far, page, constants)
    store_kv(key, value, small, slots, page, constants)
    assert torch.equal(cache[-4:], small)
    query = torch.randn(1, 32, 128, device=device).bfloat16()
    batch = Batch(
        page,
        constants,
        cache,
        torch.arange(blocks - 4, blocks, dtype=torch.int32, device=device)[None],
        torch.tensor([64], dtype=torch.int32, device=device),
        torch.tensor([0, 1], dtype=torch.int32, device=device),
        query,
        Attention(128**-0.5),
    )
    near = replace(batch, cache=small, block_table=batch.block_table - (blocks - 4))
    assert torch.equal(run_decode(batch, 1), run_decode(near, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("kind", ["plain", "all"])
def test_a_captured_graph_follows_the_lengths(kind, device):
    """One capture serves other lengths, other blocks and a padded request."""
    page, attention = page_for(K4V4, 128), attention_of(kind, 128, 32, device)
    first, second = (
        make_batch(page, lens, [1, 1, 1], torch.bfloat16, device, 8, 4, attention=attention)
        for lens in ([70, 500, 33], [900, 1, 64])
    )
    static = replace(
        first,
        cache=torch.cat([first.cache, second.cache]),
        block_table=torch.full((3, 64), OUT_OF_RANGE_BLOCK, dtype=torch.int32, device=device),
        seq_lens=first.seq_lens.clone(),
        query_start_loc=first.query_start_loc.clone(),
        query=first.query.clone(),
    )
    width = first.block_table.shape[1]
    static.block_table[:, :width] = first.block_table
    workspace = workspace_for(static, 1)
    schedule = schedule_for(static, 1)
    out = torch.full_like(static.query, NAN)
    lse = torch.full((32, 3), NAN, device=device)
    slots = torch.full((3,), -1, dtype=torch.int64, device=device)
    fresh = vectors((3, 8, 128), torch.bfloat16, device)

    def step():
        store_kv(fresh, fresh, static.cache, slots, page, static.tables)
        decode_attention(
            static.query,
            static.cache,
            static.block_table,
            static.seq_lens,
            static.query_start_loc,
            1,
            page,
            static.attention,
            static.tables,
            out,
            workspace,
            schedule,
            lse=lse,
        )

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    shifted = second.block_table + len(first.cache)
    for batch, table in ((second, shifted), (first, first.block_table)):
        static.block_table.fill_(OUT_OF_RANGE_BLOCK)
        static.block_table[:, : table.shape[1]] = table
        static.seq_lens.copy_(batch.seq_lens)
        static.query.copy_(batch.query)
        plan(static.seq_lens, static.query_start_loc, schedule, attention.window)
        out.fill_(NAN)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, run_decode(replace(static), 1))
        assert relative_error(out, run_decode(batch, 1)) < 1e-6
    static.seq_lens[1] = 0
    graph.replay()
    torch.cuda.synchronize()
    assert (out[1] == 0).all()
    assert not out.isnan().any()
