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
    INTERPRETED,
    LAYOUTS,
    OUT_OF_RANGE_BLOCK,
    Batch,
    attention_tolerance,
    bits_of,
    cosines,
    empty_cache,
    make_batch,
    radius_for,
    relative_error,
    vectors,
)

from vllm_polarquant import reference
from vllm_polarquant.codec import (
    decode_radius,
    encode_radius,
    rotation,
    tables,
)
from vllm_polarquant.format import (
    HEAD_DIMS,
    KEY_PARTS,
    LOSSLESS,
    VALUE_PARTS,
    PolarFormat,
)
from vllm_polarquant.kernels import decode, page, store, tuning
from vllm_polarquant.kernels.decode import DecodeWorkspace, decode_attention, make_schedule
from vllm_polarquant.kernels.prefill import gather_prefix, merge_prefix
from vllm_polarquant.kernels.rotate import rotate
from vllm_polarquant.kernels.schedule import Schedule, plan
from vllm_polarquant.kernels.store import store_kv

NAN = float("nan")
K4V4 = "polarquant_k4v4"


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Small batches would be cut for a whole GPU, which takes the interpreter seconds."""
    monkeypatch.setattr(decode, "processors", lambda device: 8)


def workspace_for(batch: Batch, max_query_len: int) -> DecodeWorkspace:
    tokens, num_heads, head_dim = batch.query.shape
    workspace = DecodeWorkspace.allocate(
        tokens,
        num_heads,
        batch.cache.shape[1],
        head_dim,
        batch.query.dtype,
        batch.query.device,
        max_reqs=len(batch.seq_lens),
        max_query_len=max_query_len,
    )
    for buffer in (workspace.query, workspace.partial_out, workspace.partial_lse):
        buffer.fill_(NAN)
    return workspace


def schedule_for(batch: Batch, max_query_len: int, max_reqs: int | None = None) -> Schedule:
    """A schedule planned for the batch."""
    schedule = make_schedule(
        batch.fmt,
        batch.query.shape[1],
        batch.cache.shape[1],
        max_reqs or len(batch.seq_lens),
        batch.query.device,
        max_query_len,
    )
    schedule.first.fill_(-1)
    schedule.items.fill_(-1)
    schedule.begin.fill_(-1)
    plan(batch.seq_lens, batch.query_start_loc, schedule)
    return schedule


def run_decode(batch: Batch, max_query_len: int, schedule: Schedule | None = None) -> torch.Tensor:
    out = torch.full_like(batch.query, NAN)
    out[int(batch.query_start_loc[-1]) :] = 7
    workspace = workspace_for(batch, max_query_len)
    decode_attention(
        batch.query,
        batch.cache,
        batch.block_table,
        batch.seq_lens,
        batch.query_start_loc,
        max_query_len,
        batch.fmt,
        batch.tables,
        batch.scale,
        out,
        workspace,
        schedule or schedule_for(batch, max_query_len),
    )
    assert (workspace.arrived == 0).all(), "the next launch would merge too early"
    return out


def check_decode(batch: Batch, max_query_len: int) -> None:
    before = batch.cache.clone()
    out = run_decode(batch, max_query_len)
    want = reference.attention(
        batch.query,
        batch.cache,
        batch.block_table,
        batch.seq_lens,
        batch.query_start_loc,
        batch.fmt,
        batch.scale,
    )
    owned = int(batch.query_start_loc[-1])
    tolerance = attention_tolerance(batch.query.dtype, batch.query.device)
    assert relative_error(out[:owned], want[:owned]) < tolerance
    assert (out[owned:] == 7).all(), "rows of no request were written"
    assert torch.equal(batch.cache, before)


def check_store(
    key: torch.Tensor,
    value: torch.Tensor,
    have: torch.Tensor,
    want: torch.Tensor,
    slots: torch.Tensor,
    fmt: PolarFormat,
) -> None:
    """Compare a cache that store_kv wrote with the reference's; no slot may be padding."""
    ours, theirs = reference.page_views(have, fmt), reference.page_views(want, fmt)
    block, place = slots // fmt.block_size, slots % fmt.block_size
    for x, vector, kind in ((key, fmt.key, "key"), (value, fmt.value, "value")):
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
    if device.type == "cpu" and (preset, head_dim) not in INTERPRETED:
        pytest.skip("only a GPU is fast enough for every format")
    fmt = PolarFormat(preset, head_dim, 16)
    key, value = (vectors((7, 2, head_dim), torch.bfloat16, device) for _ in "kv")
    have, want = (empty_cache(fmt, 3, 2, device) for _ in "hw")
    slots = torch.tensor([16, 47, 3, 32, 0, 31, 17], device=device)
    store_kv(key, value, have, slots, fmt, tables(fmt, key.dtype, device))
    reference.store_kv(key, value, want, slots, fmt)
    check_store(key, value, have, want, slots, fmt)


@pytest.mark.parametrize(("preset", "head_dim"), [(K4V4, 64), ("polarquant_k3v2", 80)])
def test_store_of_many_tokens_finds_the_codes_of_few(preset, head_dim, device, monkeypatch):
    """Windows of the search go side by side for few tokens, one after the other for many."""
    fmt = PolarFormat(preset, head_dim, 16)
    key, value = (vectors((9, 2, head_dim), torch.bfloat16, device) for _ in "kv")
    few, many, want = (empty_cache(fmt, 2, 2, device) for _ in "fmw")
    slots = torch.arange(9, device=device)
    store_kv(key, value, few, slots, fmt, tables(fmt, key.dtype, device))
    monkeypatch.setattr(store, "MANY_VECTORS", 1)
    store_kv(key, value, many, slots, fmt, tables(fmt, key.dtype, device))
    # Paths of equal cost may be chosen differently.
    assert (few != many).double().mean() < 0.01
    reference.store_kv(key, value, want, slots, fmt)
    check_store(key, value, many, want, slots, fmt)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layout", "block_size"), LAYOUTS)
def test_store_in_every_layout(layout, block_size, dtype, device):
    fmt = PolarFormat("polarquant_k3v2", 64, block_size)
    # As vLLM passes them: views into the output of one projection.
    packed = vectors((9, 8, 64), dtype, device)
    key, value = packed[:, 2:5], packed[:, 5:8]
    have, want = (empty_cache(fmt, 3, 3, device, layout) for _ in "hw")
    slots = torch.randperm(3 * block_size)[:9].to(device)
    store_kv(key, value, have, slots, fmt, tables(fmt, dtype, device))
    reference.store_kv(key, value, want, slots, fmt)
    check_store(key, value, have, want, slots, fmt)


def test_store_drops_padding(device):
    fmt = PolarFormat(K4V4, 64, 16)
    key, value = (vectors((20, 2, 64), torch.float16, device) for _ in "kv")
    key[19:] = NAN
    have, want = (empty_cache(fmt, 2, 2, device) for _ in "hw")
    slots = torch.arange(18, device=device)
    slots[::3] = -1
    store_kv(key, value, have, slots, fmt, tables(fmt, key.dtype, device))
    kept = slots >= 0
    reference.store_kv(key[:18][kept], value[:18][kept], want, slots[kept], fmt)
    check_store(key[:18][kept], value[:18][kept], have, want, slots[kept], fmt)


def test_store_of_nothing(device):
    fmt = PolarFormat(K4V4, 64, 16)
    cache = empty_cache(fmt, 1, 2, device)
    key = torch.empty(0, 2, 64, dtype=torch.bfloat16, device=device)
    slots = torch.empty(0, dtype=torch.int64, device=device)
    store_kv(key, key, cache, slots, fmt, tables(fmt, key.dtype, device))
    assert (cache == 0xFF).all()


@pytest.mark.parametrize("preset", ["polarquant_k8v4", "polarquant_k2v2"])
def test_store_of_extreme_vectors(preset, device):
    fmt = PolarFormat(preset, 64, 16)
    x = torch.randn(8, 1, 64, device=device)
    x[0, 0, 5] = NAN
    x[1, 0, 6] = float("inf")
    x[2, 0, 63] = -float("inf")
    x[3] = 0
    # The interpreter reads subnormal bfloat16 wrongly.
    x[4] *= 1e-36 if device.type == "cpu" else 1e-39
    x[5] *= 5e37
    x[6] *= 1e36
    x[6, 0, 9] = -3e38
    x[7] *= 1e-12
    x = x.bfloat16()
    everything, have, want = (empty_cache(fmt, 1, 1, device) for _ in "ehw")
    constants = tables(fmt, x.dtype, device)
    slots = torch.arange(8, device=device)
    store_kv(x, x, everything, slots, fmt, constants)
    views = reference.page_views(everything, fmt)
    for codes, radius in (
        (views.key_codes, views.key_radius),
        (views.value_codes, views.value_radius),
    ):
        assert (codes[0, 0, :4] == 0).all()
        assert (radius[0, 0, :4] == 0).all()
        assert (radius[0, 0, 4:8] != 0).all()
    store_kv(x[4:], x[4:], have, slots[4:], fmt, constants)
    reference.store_kv(x[4:], x[4:], want, slots[4:], fmt)
    check_store(x[4:], x[4:], have, want, slots[4:], fmt)


@triton.jit
def encode_fp8_kernel(x, out, N: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(out + index, store._encode_fp8(tl.load(x + index)).to(tl.uint8))


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
    fmt = PolarFormat(LOSSLESS, 96, 16)
    key, value = (vectors((5, 2, 96), torch.bfloat16, device) for _ in "kv")
    value[2, 1, 7] = NAN
    cache = empty_cache(fmt, 1, 2, device)
    store_kv(key, value, cache, torch.arange(5, device=device), fmt, tables(fmt, key.dtype, device))
    views = reference.page_views(cache, fmt)
    for x, codes in ((key, views.key_codes), (value, views.value_codes)):
        stored = codes[0, :, :5].transpose(0, 1).contiguous().view(torch.int16)
        assert torch.equal(stored, x.view(torch.int16))


@triton.jit
def code_place_kernel(
    out, TOKENS: tl.constexpr, PAD: tl.constexpr, CODE: tl.constexpr, ROW: tl.constexpr, PARTS: tl.constexpr
):
    slot, byte = tl.arange(0, TOKENS)[:, None], tl.arange(0, PAD)[None, :]
    place = page.code_place(slot, byte, CODE, ROW, PARTS)
    tl.store(out + slot * ROW + byte, place, mask=byte < ROW)


@pytest.mark.parametrize("preset", ALL_PRESETS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_code_places(preset, head_dim, device):
    fmt = PolarFormat(preset, head_dim, 32)
    for vector, size, parts, places in (
        (fmt.key, fmt.key_bytes, KEY_PARTS, fmt.key_places),
        (fmt.value, fmt.value_bytes, VALUE_PARTS, fmt.value_places),
    ):
        have = torch.empty(32, size, dtype=torch.int32, device=device)
        pad = triton.next_power_of_2(size)
        code_place_kernel[(1,)](have, 32, pad, page.vector_code(vector), size, parts)
        want = torch.tensor(places, dtype=torch.int32, device=device)
        assert torch.equal(have, torch.cat([want, want + 16 * size]))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotate(head_dim, device):
    fmt = PolarFormat(K4V4, head_dim, 16)
    x = torch.randn(5, 9, head_dim, device=device).half()[:, 2:]
    out = torch.full_like(x, NAN)
    rotate(x, out, tables(fmt, x.dtype, device))
    want = x.double() @ rotation(head_dim).T.to(x.device)
    torch.testing.assert_close(out.double(), want, rtol=2**-10, atol=1e-5)


@pytest.mark.parametrize(("preset", "head_dim"), ALL_FORMATS)
def test_decode_of_every_format(preset, head_dim, device):
    if device.type == "cpu" and (preset, head_dim) not in INTERPRETED:
        pytest.skip("only a GPU is fast enough for every format")
    fmt = PolarFormat(preset, head_dim, 16)
    check_decode(make_batch(fmt, [37], [1], torch.bfloat16, device), 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layout", "block_size"), LAYOUTS)
def test_decode_in_every_layout(layout, block_size, dtype, device):
    fmt = PolarFormat(K4V4, 64, block_size)
    check_decode(make_batch(fmt, [1, 133, 16], [1, 1, 1], dtype, device, layout=layout), 1)


@pytest.mark.parametrize("group", range(1, 9))
def test_decode_shares_kv_heads(group, device):
    fmt = PolarFormat("polarquant_k3v2", 64, 16)
    check_decode(make_batch(fmt, [40, 3], [1, 1], torch.float16, device, 2, group), 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_where_maxima_keep_growing(dtype, device, monkeypatch):
    """Logits hundreds apart, which neither a rotation nor codes make inexact, and ten turns a warp."""
    monkeypatch.setattr(decode, "processors", lambda device: 1)
    batch = make_batch(PolarFormat(LOSSLESS, 64, 16), [1300], [1], dtype, device, 1, 8)
    check_decode(replace(batch, query=64 * batch.query), 1)


@pytest.mark.parametrize("processors", [1, 2, 32])
@pytest.mark.parametrize("preset", [K4V4, LOSSLESS])
def test_decode_with_few_and_many_programs(preset, processors, device, monkeypatch):
    monkeypatch.setattr(decode, "processors", lambda device: processors)
    fmt = PolarFormat(preset, 64, 16)
    check_decode(make_batch(fmt, [300, 129, 64], [1, 1, 1], torch.float16, device, 1), 1)


def test_a_program_ends_one_request_and_begins_the_next(device, monkeypatch):
    monkeypatch.setattr(decode, "processors", lambda device: 1)
    batch = make_batch(PolarFormat(K4V4, 64, 16), [1000, 2500, 64], [1] * 3, torch.float16, device, 1)
    schedule = schedule_for(batch, 1)
    assert schedule.first.tolist() == [0, 2, 4]
    assert schedule.items[:4, 0].tolist() == [0, 1, 1, 2], "no request is cut between the programs"
    check_decode(batch, 1)


@pytest.mark.parametrize("planned", [[40, 20, 900], [900, 400, 17]])
def test_decode_stays_right_where_lengths_changed_after_planning(planned, device):
    batch = make_batch(PolarFormat(K4V4, 64, 16), [300, 129, 64], [1, 1, 1], torch.float16, device, 1)
    want = run_decode(batch, 1)
    stale = replace(batch, seq_lens=torch.tensor(planned, dtype=torch.int32, device=device))
    assert relative_error(run_decode(batch, 1, schedule_for(stale, 1)), want) < 1e-3


@pytest.mark.parametrize("query_len", [2, 3, 5, 8])
def test_decode_of_several_queries_is_causal(query_len, device, monkeypatch):
    monkeypatch.setattr(decode, "processors", lambda device: 2)
    fmt = PolarFormat(K4V4, 64, 16)
    lens = [query_len, 66, 130]
    check_decode(make_batch(fmt, lens, [query_len] * 3, torch.float16, device, 1, 3), query_len)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_of_a_mixed_batch(dtype, device):
    """Lengths that differ, requests with no query, padded requests and padded rows."""
    fmt = PolarFormat("polarquant_k2v2", 80, 16)
    batch = make_batch(
        fmt, [20, 5, 33, 0, 17, 0], [3, 5, 0, 1, 1, 0], dtype, device, heads=1, group=2, padding=3
    )
    check_decode(batch, 5)
    assert (run_decode(batch, 5)[8] == 0).all(), "a query of an empty request is not zero"


def test_decode_of_more_rows_than_a_program_takes(device):
    fmt = PolarFormat(K4V4, 64, 16)
    batch = make_batch(fmt, [40, 16, 70], [16, 2, 9], torch.float16, device, heads=1, group=8)
    check_decode(batch, 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-5, 1e5])
def test_decode_of_tiny_and_huge_values(size, dtype, device):
    fmt = PolarFormat("polarquant_k8v4", 64, 16)
    batch = make_batch(fmt, [70], [1], dtype, device, heads=1)
    # Their radii lie outside what a plain float16 holds, as some of the tiny ones' values do.
    radius = reference.page_views(batch.cache, fmt).value_radius
    radius.copy_(encode_radius(decode_radius(radius) * size))
    want = reference.attention(
        batch.query,
        batch.cache,
        batch.block_table,
        batch.seq_lens,
        batch.query_start_loc,
        fmt,
        batch.scale,
    )
    out = run_decode(batch, 1)
    # A decoded value may pass float16's largest number, which no fp16 model's own values do.
    largest = torch.finfo(dtype).max
    out, want = out.double().clamp(-largest, largest), want.clamp(-largest, largest)
    # What float16 cannot represent any better is allowed for.
    slack = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * want.numel() ** 0.5
    error = (out - want).norm()
    assert error < attention_tolerance(dtype, device) * want.norm() + slack


def test_decode_ignores_other_tokens_radii(device):
    """A stored zero vector has logit 0 and adds nothing; slots past the end may hold anything."""
    fmt = PolarFormat(K4V4, 64, 16)
    batch = make_batch(fmt, [21], [1], torch.float16, device, heads=1)
    views = reference.page_views(batch.cache, fmt)
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
@pytest.mark.parametrize(("preset", "head_dim"), [(p, 64) for p in ALL_PRESETS] + [(K4V4, 80)])
def test_gather_unpacks_a_prefix(preset, head_dim, dtype, device):
    fmt = PolarFormat(preset, head_dim, 16)
    batch = make_batch(fmt, [50, 9, 33], [1, 1, 1], dtype, device, layout="BLNHC")
    start, length = [16, 0, 3], [34, 0, 30]
    lengths_cu = torch.tensor([0, *length]).cumsum(0).to(torch.int32).to(device)
    key, value = (torch.full((70, 3, head_dim), NAN, dtype=dtype, device=device)[:, :2] for _ in "kv")
    gather_prefix(
        batch.cache,
        batch.block_table,
        torch.tensor(start, dtype=torch.int32, device=device),
        lengths_cu,
        40,
        fmt,
        batch.tables,
        key,
        value,
    )
    for request, (first, count) in enumerate(zip(start, length, strict=True)):
        rows = slice(int(lengths_cu[request]), int(lengths_cu[request + 1]))
        want = reference.read_kv(batch.cache, batch.block_table[request], first + count, fmt, dtype)
        for have, full in zip((key, value), want, strict=True):
            turned = full[first:] @ batch.tables.rotation.T
            # The points and the product are rounded; the interpreter truncates bfloat16.
            rounding = 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(have[rows].float(), turned, rtol=rounding, atol=1e-4)
    assert key[64:].isnan().all()
    assert value[64:].isnan().all()


@pytest.mark.parametrize("head_dim", [64, 80, 192, 256])
@pytest.mark.parametrize("update_lse", [False, True])
@pytest.mark.parametrize("rotate_back", [False, True])
def test_merge_weighs_by_log_sum_exp(rotate_back, update_lse, head_dim, device):
    fmt = PolarFormat(K4V4, head_dim, 16)
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
    turned = prefix.double()
    if rotate_back:
        turned = turned @ rotation(head_dim).to(device)
    parts = (out.double(), turned)
    want = sum(torch.where(w > 0, p * w, 0.0) for p, w in zip(parts, weights, strict=True))
    before = lse.clone()
    merge_prefix(out, lse, prefix, prefix_lse, tables(fmt, out.dtype, device), rotate_back, update_lse)
    torch.testing.assert_close(out.double(), want, rtol=2**-10, atol=1e-5)
    want_lse = total[..., 0].T.float() if update_lse else before
    torch.testing.assert_close(lse, want_lse)


def test_decode_equals_gather_and_merge(device):
    """The two ways to the same attention: decode in place, or unpack, attend twice and merge."""
    fmt = PolarFormat(K4V4, 128, 16)
    batch = make_batch(fmt, [60], [4], torch.float16, device, heads=1, group=2)
    query = torch.empty_like(batch.query)
    rotate(batch.query, query, batch.tables)
    key, value = (torch.empty(60, 1, 128, dtype=torch.float16, device=device) for _ in "kv")
    zero, cu = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0], [0, 60]))
    gather_prefix(batch.cache, batch.block_table, zero, cu, 60, fmt, batch.tables, key, value)

    def attend(q, k, v, visible):
        logits = torch.einsum("qhd,kd->hqk", q.float(), k[:, 0].float()) * batch.scale
        logits = logits.masked_fill(~visible, float("-inf"))
        attended = torch.einsum("hqk,kd->qhd", logits.softmax(-1), v[:, 0].float())
        return attended.half(), logits.logsumexp(-1)

    position = torch.arange(60, device=device)
    visible = position[None] <= position[-4:, None]
    parts = [
        attend(query, key[part], value[part], visible[:, part])
        for part in (slice(0, 30), slice(30, 50), slice(50, 60))
    ]
    (first, first_lse), (second, second_lse), (fresh, fresh_lse) = parts
    merge_prefix(first, first_lse, second, second_lse, batch.tables, False, update_lse=True)
    fresh = (fresh.float() @ batch.tables.rotation).half()
    merge_prefix(fresh, fresh_lse, first, first_lse, batch.tables, True)
    assert relative_error(fresh, run_decode(batch, 4)) < 2e-3


def test_a_workspace_fits_every_batch_and_stays_small(monkeypatch):
    monkeypatch.undo()
    fmt = PolarFormat(K4V4, 128, 16)
    for heads, kv_heads, queries in ((32, 8, 1), (32, 8, 16), (64, 8, 4), (28, 4, 1), (32, 32, 1)):
        workspace = DecodeWorkspace.allocate(
            1024, heads, kv_heads, 128, torch.bfloat16, "meta", max_reqs=1024, max_query_len=queries
        )
        schedule = make_schedule(fmt, heads, kv_heads, 1024, "meta", queries)
        # A part that is not a whole request has a row for each head of each query, of a program at most two.
        rows = 2 * schedule.programs * heads * queries
        assert rows <= workspace.partial_lse.numel()
        assert rows * 128 <= workspace.partial_out.numel()
        assert workspace.nbytes < 14e6 * heads / 32


def test_specific_launch_parameters_win():
    fmt = PolarFormat(K4V4, 128, 16)
    default = {"op": {"*": {"a": 1, "b": 1, "c": 1}, "d128": {"b": 2}, K4V4: {"c": 3}}}
    measured = {"op": {"*": {"a": 4}, f"{K4V4}-d64": {"a": 5}, f"{K4V4}-d128": {"c": 6}}}
    assert tuning.resolve("op", fmt, default) == {"a": 1, "b": 2, "c": 3}
    assert tuning.resolve("op", fmt, default, measured) == {"a": 4, "b": 2, "c": 6}
    with pytest.raises(KeyError, match="no launch parameters for 'other'"):
        tuning.resolve("other", fmt, default)


def test_launchers_name_what_is_wrong(device):
    fmt = PolarFormat(K4V4, 64, 16)
    batch = make_batch(fmt, [20], [1], torch.float16, device)
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
            store_kv(**good | change, fmt=fmt, tables=batch.tables)

    def decode_with(max_query_len=1, workspace=None, schedule=None, **change):
        changed = replace(batch, **change)
        decode_attention(
            changed.query,
            changed.cache,
            changed.block_table,
            changed.seq_lens,
            changed.query_start_loc,
            max_query_len,
            fmt,
            batch.tables,
            1.0,
            torch.empty_like(batch.query),
            workspace or workspace_for(batch, 1),
            schedule or schedule_for(batch, 1),
        )

    small = workspace_for(batch, 1)
    small_schedule = schedule_for(batch, 1)
    many = torch.ones(2, dtype=torch.int32, device=device), torch.zeros(3, dtype=torch.int32, device=device)
    for call, message in (
        (lambda: decode_with(max_query_len=17), "max_query_len must be 1 to 16"),
        (lambda: decode_with(seq_lens=batch.seq_lens.long()), "seq_lens must be torch.int32"),
        (lambda: decode_with(block_table=batch.block_table.long()), "block_table must be"),
        (lambda: decode_with(query_start_loc=batch.seq_lens), "query_start_loc must be"),
        (lambda: decode_with(query=batch.query[:, :3]), "out must be"),
        (
            lambda: decode_with(workspace=replace(small, partial_lse=small.partial_lse[:1])),
            "workspace is too small",
        ),
        (lambda: decode_with(schedule=Schedule.allocate(1, 8, 64, device)), "in turns of 64 tokens"),
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
    fmt = PolarFormat(K4V4, 128, 16)
    heads = 8
    blocks = 3 * 2**30 // (heads * fmt.page_bytes)
    cache = torch.full((blocks, heads, 16, fmt.slot_bytes), 0xFF, dtype=torch.uint8, device=device)
    small = empty_cache(fmt, 4, heads, device)
    key, value = (vectors((64, heads, 128), torch.bfloat16, device) for _ in "kv")
    slots = torch.arange(64, device=device)
    far = slots + (blocks - 4) * 16
    constants = tables(fmt, key.dtype, device)
    store_kv(key, value, cache, far, fmt, constants)
    store_kv(key, value, small, slots, fmt, constants)
    assert torch.equal(cache[-4:], small)
    query = torch.randn(1, 32, 128, device=device).bfloat16()
    batch = Batch(
        fmt,
        constants,
        cache,
        torch.arange(blocks - 4, blocks, dtype=torch.int32, device=device)[None],
        torch.tensor([64], dtype=torch.int32, device=device),
        torch.tensor([0, 1], dtype=torch.int32, device=device),
        query,
    )
    near = replace(batch, cache=small, block_table=batch.block_table - (blocks - 4))
    assert torch.equal(run_decode(batch, 1), run_decode(near, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_a_captured_graph_follows_the_lengths(device):
    """One capture serves other lengths, other blocks and a padded request."""
    fmt = PolarFormat(K4V4, 128, 16)
    first = make_batch(fmt, [70, 500, 33], [1, 1, 1], torch.bfloat16, device, 8, 4)
    second = make_batch(fmt, [900, 1, 64], [1, 1, 1], torch.bfloat16, device, 8, 4)
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
    slots = torch.full((3,), -1, dtype=torch.int64, device=device)
    fresh = vectors((3, 8, 128), torch.bfloat16, device)

    def step():
        store_kv(fresh, fresh, static.cache, slots, fmt, static.tables)
        decode_attention(
            static.query,
            static.cache,
            static.block_table,
            static.seq_lens,
            static.query_start_loc,
            1,
            fmt,
            static.tables,
            static.scale,
            out,
            workspace,
            schedule,
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
        plan(static.seq_lens, static.query_start_loc, schedule)
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
