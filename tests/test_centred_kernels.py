"""Triton's kernels with centred keys, against the reference on the same pages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import OUT_OF_RANGE_BLOCK, attention_tolerance, empty_cache, page_for, relative_error

from vllm_polarquant import reference
from vllm_polarquant.attention import Attention
from vllm_polarquant.codec import Tables, pack_centres, tables
from vllm_polarquant.format import LOSSLESS, SEGMENT
from vllm_polarquant.kernels.triton.decode import DecodeWorkspace, decode_attention, make_schedule
from vllm_polarquant.kernels.triton.gather import gather_prefix
from vllm_polarquant.kernels.triton.launch import Gpu
from vllm_polarquant.kernels.triton.page_io import lane_order
from vllm_polarquant.kernels.triton.schedule import plan
from vllm_polarquant.kernels.triton.segments import fill_segments
from vllm_polarquant.kernels.triton.store import store_kv
from vllm_polarquant.page import Page

NAN = float("nan")
K4V4 = "polarquant_k4v4"


def keys_with_a_mean(positions: torch.Tensor, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Keys [T, heads, d] of which most is a mean that turns with the segment; the first token's are short."""
    generator = torch.Generator().manual_seed(5)
    mean = 6 * torch.randn(8, heads, dim, generator=generator)
    mean[..., : dim // 8] *= 4
    keys = torch.randn(len(positions), heads, dim) + mean[positions.cpu() // SEGMENT % 8]
    keys[positions.cpu() == 0] = torch.randn(heads, dim) * 0.2
    return keys.to(positions.device, dtype)


def tables_of(page: Page, heads: int, segments: int, dtype: torch.dtype, device: torch.device) -> Tables:
    """Factors of each head's own, and the centres of keys_with_a_mean; those past `segments` are NaN."""
    constants = tables(page.slot, dtype, device, heads, segments + 2)
    dim = page.slot.head_dim
    if page.slot.preset == LOSSLESS:
        return constants
    scale = torch.empty(heads, dim, device=device).uniform_(0.4, 2.5)
    key_factors, query_factors = constants.key_factors * scale, constants.query_factors / scale
    positions = torch.arange(segments, device=device).repeat_interleave(64) * SEGMENT + 1
    mean = keys_with_a_mean(positions, heads, dim, torch.float32).view(segments, 64, heads, dim).mean(1)
    centres = pack_centres((mean * key_factors) @ constants.mixing.T, dtype)
    poison = torch.full((2, heads, dim // 2), 0x7FC07FC0, dtype=torch.int32, device=device)
    return constants._replace(
        key_factors=key_factors, query_factors=query_factors, centres=torch.cat([centres, poison])
    )


class Case:
    """Requests of seq_lens tokens whose last query_lens are queries, stored by the reference."""

    def __init__(
        self,
        page: Page,
        seq_lens: list[int],
        query_lens: list[int],
        device: torch.device,
        heads: int = 2,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        self.page, self.heads, self.dtype, self.device = page, heads, dtype, device
        dim = page.slot.head_dim
        needed = [-(-length // page.block_size) for length in seq_lens]
        self.tables = tables_of(page, heads, -(-max(seq_lens) // SEGMENT), dtype, device)
        self.cache = empty_cache(page, 1 + sum(needed), heads, device)
        shuffled = (torch.randperm(sum(needed)) + 1).tolist()
        shape = (len(seq_lens), max(needed) + 2)
        self.block_table = torch.full(shape, OUT_OF_RANGE_BLOCK, dtype=torch.int32, device=device)
        self.order = lane_order(page)
        for row, (length, blocks) in enumerate(zip(seq_lens, needed, strict=True)):
            mine = torch.tensor([shuffled.pop() for _ in range(blocks)], device=device)
            self.block_table[row, :blocks] = mine
            position = torch.arange(length, device=device)
            slots = mine[position // page.block_size] * page.block_size + position % page.block_size
            key = keys_with_a_mean(position, heads, dim, dtype)
            value = torch.randn(length, heads, dim, device=device).to(dtype)
            reference.store_kv(
                key, value, self.cache, slots, page, self.order, self.tables, position // SEGMENT
            )
        self.seq_lens = torch.tensor(seq_lens, dtype=torch.int32, device=device)
        self.query_start_loc = torch.tensor([0, *query_lens], device=device).cumsum(0).to(torch.int32)
        # Short, so that the mean's share of logits does not leave all weight to one token.
        self.query = 0.1 * torch.randn(sum(query_lens), 2 * heads, dim, device=device).to(dtype)
        self.attention = Attention(dim**-0.5)

    def decode(self, max_query_len: int, num_sms: int) -> torch.Tensor:
        gpu = replace(Gpu.of(self.device), num_sms=num_sms)
        reqs, (tokens, heads, _) = len(self.seq_lens), self.query.shape
        schedule = make_schedule(self.page.slot, heads, self.heads, reqs, self.device, max_query_len, gpu)
        plan(self.seq_lens, self.query_start_loc, schedule, self.attention.window)
        workspace = DecodeWorkspace.allocate(
            self.page.slot, tokens, heads, self.heads, self.dtype, self.device, reqs, max_query_len, gpu
        )
        out = torch.full_like(self.query, NAN)
        decode_attention(
            self.query,
            self.cache,
            self.block_table,
            self.seq_lens,
            self.query_start_loc,
            max_query_len,
            self.page,
            self.attention,
            self.tables,
            out,
            workspace,
            schedule,
            gpu=gpu,
        )
        return out

    def want(self) -> torch.Tensor:
        return reference.attention(
            self.query,
            self.cache,
            self.block_table,
            self.seq_lens,
            self.query_start_loc,
            self.page,
            self.order,
            self.attention,
            tables=self.tables,
        ).out

    def check(self, max_query_len: int, num_sms: int = 8) -> None:
        error = relative_error(self.decode(max_query_len, num_sms), self.want())
        # Logits are sums of two products of rounded queries.
        assert error < 2 * attention_tolerance(self.dtype, self.device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("preset", "head_dim"),
    [(K4V4, 64), ("polarquant_k8v4", 64), ("polarquant_k3v2", 80), ("polarquant_k3.5v3.5", 128)],
)
def test_decode_adds_what_the_centre_takes_away(preset, head_dim, dtype, device):
    page = page_for(preset, head_dim)
    Case(page, [257, 255, 30, 1], [1, 1, 1, 1], device, dtype=dtype).check(1)


@pytest.mark.slow
@pytest.mark.parametrize("num_sms", [1, 3])
def test_decode_over_many_segments(num_sms, device):
    """More tiles than whose segments' products a warp keeps at a time, from inside a segment on."""
    case = Case(page_for(K4V4, 64), [4700, 300], [1, 1], device, heads=1)
    case.check(1, num_sms)
    case.attention = replace(case.attention, window=4309)
    case.check(1, num_sms)


def test_several_queries_of_two_sets(device):
    Case(page_for(K4V4, 64), [515, 20], [4, 3], device).check(4)


def test_lossless_keys_are_not_centred(device):
    case = Case(page_for(LOSSLESS, 64), [300], [1], device)
    views = reference.page_views(case.cache, case.page, case.order)
    assert not views.key_radius.view(torch.int16)[case.block_table[0, :18].long()].lt(0).any()
    case.check(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("preset", "head_dim"), [(K4V4, 64), ("polarquant_k8v4", 64), ("polarquant_k3v2", 80)]
)
def test_store_centres_what_gets_shorter(preset, head_dim, dtype, device):
    page = page_for(preset, head_dim)
    constants = tables_of(page, 2, 2, dtype, device)
    # From the first token on, over a segment's edge, and past the tables' last finite centre.
    position = torch.tensor([0, 1, 254, 255, 256, 257, 300, 511, 600], device=device)
    key = keys_with_a_mean(position, 2, head_dim, dtype)
    value = torch.randn(9, 2, head_dim, device=device).to(dtype)
    slots = torch.randperm(48)[:9].to(device)
    have, want = (empty_cache(page, 3, 2, device) for _ in "hw")
    segments = (position // SEGMENT).int()
    store_kv(key, value, have, slots, page, constants, segments)
    reference.store_kv(key, value, want, slots, page, lane_order(page), constants, segments)
    ours, theirs = (reference.page_views(cache, page, lane_order(page)) for cache in (have, want))
    block, token = slots // 16, slots % 16
    signs = ours.key_radius[block, :, token].signbit()
    assert torch.equal(signs, theirs.key_radius[block, :, token].signbit())
    assert signs[1:8].all()
    assert not signs[0].any(), "the first token's key is shorter than what is left of it"
    assert not signs[8].any(), "a centre that is not finite is taken away from nothing"
    assert not ours.value_radius[block, :, token].signbit().any()
    radius, expected = (v.key_radius[block, :, token].float() for v in (ours, theirs))
    # Of a key with ten times the length of what is left, bfloat16 rounds as much as a 25th of that.
    rtol = 0.02 if dtype == torch.float16 else 0.06
    torch.testing.assert_close(radius, expected, rtol=rtol, atol=0)
    read = [
        reference.decode_centred(
            v.key_radius[block, :, token],
            v.key_codes[block, :, token],
            reference.unpack_centres(constants.centres, dtype)[segments.long()].nan_to_num(0),
            page.slot.key,
            dtype,
        )
        for v in (ours, theirs)
    ]
    exact = (key.double() * constants.key_factors) @ constants.mixing.double().T
    left = exact - torch.where(
        signs[..., None], reference.unpack_centres(constants.centres, dtype)[segments.long()].double(), 0
    )
    lost = [(x - exact).square().sum() / left.square().sum() for x in read]
    # The kernel rounds key times factor, mean and all, to 16 bits; the interpreter cuts off.
    rounding = torch.finfo(dtype).eps ** 2 * exact.square().sum() / left.square().sum()
    assert lost[0] < 1.03 * lost[1] + 1e-4 + rounding


@pytest.mark.parametrize("preset", [K4V4, "polarquant_k8v4"])
def test_gather_gives_keys_back_their_centres(preset, device):
    case = Case(page_for(preset, 64), [600, 40], [1, 1], device)
    lengths = torch.tensor([0, 350, 380], dtype=torch.int32, device=device)
    start = torch.tensor([250, 3], dtype=torch.int32, device=device)
    key, value = (torch.full((380, 2, 64), NAN, dtype=case.dtype, device=device) for _ in "kv")
    gather_prefix(case.cache, case.block_table, start, lengths, 350, case.page, case.tables, key, value)
    for row, (first, count) in enumerate(((250, 350), (3, 30))):
        full, _ = reference.read_kv(
            case.cache, case.block_table[row], first + count, case.page, case.order, case.dtype, case.tables
        )
        want = (full[first:] * case.tables.key_factors) @ case.tables.mixing.double().T
        rows = slice(int(lengths[row]), int(lengths[row + 1]))
        torch.testing.assert_close(key[rows].double(), want, rtol=2e-3, atol=2e-2)


def test_segments_follow_positions(device):
    seq_lens = torch.tensor([1, 256, 257, 1000, 0, 40], dtype=torch.int32, device=device)
    queries = [1, 1, 2, 700, 1, 0]
    starts = torch.tensor([0, *queries], device=device).cumsum(0).to(torch.int32)
    segments = torch.full((710,), -7, dtype=torch.int32, device=device)
    fill_segments(seq_lens, starts, segments)
    want = [0, 255, 255, 256, *range(300, 1000), 0]
    assert segments[:705].tolist() == [position // SEGMENT for position in want]
    assert (segments[705:] == -7).all()


def test_centres_need_segments_and_a_fitting_shape(device):
    page = page_for(K4V4, 64)
    constants = tables_of(page, 2, 1, torch.float16, device)
    key = torch.zeros(3, 2, 64, dtype=torch.float16, device=device)
    slots = torch.arange(3, device=device)
    cache = empty_cache(page, 1, 2, device)
    with pytest.raises(ValueError, match="segments must be a dense int32 of at least 3 tokens"):
        store_kv(key, key, cache, slots, page, constants)
    with pytest.raises(ValueError, match="segments must be a dense int32"):
        store_kv(key, key, cache, slots, page, constants, slots[:2].int())
    wrong = constants._replace(centres=constants.centres[:, :, 1:].contiguous())
    with pytest.raises(ValueError, match=r"centres must be a dense int32 \[segments, 1 or 2, 32\]"):
        store_kv(key, key, cache, slots, page, wrong, slots.int())
