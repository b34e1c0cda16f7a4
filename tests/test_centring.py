"""Centres and scales against keys that are turned by complex numbers, whose mean is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from vllm_polarquant import centring, codec, reference
from vllm_polarquant.attention import Attention
from vllm_polarquant.centring import Rope, centre_keys, fill, fingerprint, layer_tables
from vllm_polarquant.format import SEGMENT, Slot
from vllm_polarquant.page import Page

TOKENS, HEADS, DIM, SEGMENTS = 512, 3, 64, 5


@dataclass(frozen=True)
class Turn:
    """A model's RoPE, by complex numbers: pairs turn by angles of position / base ** (pair / pairs)."""

    interleaved: bool = False
    turning: int = DIM
    factor: float = 1.0
    base: float = 10_000.0

    @property
    def angles(self) -> torch.Tensor:
        pairs = self.turning // 2
        return self.base ** -(torch.arange(pairs, dtype=torch.float64) / pairs)

    @property
    def first(self) -> slice:
        return slice(0, self.turning, 2) if self.interleaved else slice(0, self.turning // 2)

    @property
    def second(self) -> slice:
        return slice(1, self.turning, 2) if self.interleaved else slice(self.turning // 2, self.turning)

    def table(self, positions: int) -> torch.Tensor:
        """As vLLM's `cos_sin_cache`."""
        angle = torch.arange(positions, dtype=torch.float64)[:, None] * self.angles
        return torch.cat([angle.cos(), angle.sin()], -1) * self.factor

    def rope(self, positions: int = SEGMENTS * SEGMENT, segments: int = SEGMENTS) -> Rope:
        return Rope.of(self.table(positions), self.interleaved, segments)

    def times(self, x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Pairs of x [..., d], as complex numbers, times factors [..., pairs]."""
        turned = torch.complex(x[..., self.first], x[..., self.second]) * factors
        out = x.expand(*turned.shape[:-1], -1).clone()
        out[..., self.first], out[..., self.second] = turned.real, turned.imag
        return out

    def phases(self, positions: torch.Tensor) -> torch.Tensor:
        return torch.polar(torch.tensor(self.factor).double(), positions[:, None] * self.angles)

    def keys(self, mean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """mean [H, d] and noise [n, H, d] before RoPE -> keys [n, H, d]."""
        return self.times(mean + noise, self.phases(torch.arange(len(noise)).double())[:, None])

    def centres(self, mean: torch.Tensor, segments: int = SEGMENTS) -> torch.Tensor:
        """Averages [segments, H, d] of the mean over each segment's positions."""
        positions = torch.arange(segments * SEGMENT).double()
        return self.times(mean, self.phases(positions).unflatten(0, (segments, SEGMENT)).mean(1)[:, None])


TURNS = {
    "halves": Turn(),
    "neighbours": Turn(interleaved=True),
    "half turning": Turn(turning=DIM // 2),
    "neighbours, half turning": Turn(interleaved=True, turning=DIM // 2),
    "scaled": Turn(factor=1.3),
    "far base": Turn(base=1e6),
}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def queries() -> torch.Tensor:
    return normal(TOKENS, HEADS, DIM).square().sum(0)


@pytest.fixture(params=TURNS.values(), ids=TURNS)
def turn(request: pytest.FixtureRequest) -> Turn:
    return request.param


def test_centres_are_the_mean_turned_through_a_segment(turn: Turn) -> None:
    mean = normal(HEADS, DIM)
    key = turn.keys(mean, torch.zeros(TOKENS, HEADS, DIM, dtype=torch.float64))
    found = centre_keys(key, queries(), [turn.rope()], SEGMENTS)
    torch.testing.assert_close(found.centres, turn.centres(mean))


def test_short_keys_take_no_part(turn: Turn) -> None:
    mean = normal(HEADS, DIM)
    key = turn.keys(mean, torch.zeros(TOKENS, HEADS, DIM, dtype=torch.float64))
    key[0] *= -30
    key[[1, 7, 300]] = 0.05 * normal(3, HEADS, DIM)
    found = centre_keys(key, queries(), [turn.rope()], SEGMENTS)
    torch.testing.assert_close(found.centres, turn.centres(mean))


def test_noise_moves_centres_by_its_mean(turn: Turn) -> None:
    mean, noise = normal(HEADS, DIM), 0.3 * normal(TOKENS, HEADS, DIM)
    found = centre_keys(turn.keys(mean, noise), queries(), [turn.rope()], SEGMENTS)
    error = (found.centres - turn.centres(mean)).square().mean().sqrt() / turn.factor
    assert error < 2 * 0.3 / math.sqrt(TOKENS)
    # What stays is the noise, where no pair with a mean turns within a segment.
    mean[:, :2] = 0
    static = Turn(turning=2).keys(mean, noise)
    slow = centre_keys(static, queries(), [Turn(turning=2).rope()], SEGMENTS)
    share = 0.09 * DIM / (0.09 * DIM + mean.square().sum(-1))
    torch.testing.assert_close(1 - slow.removed, share, rtol=0.1, atol=0)


@pytest.mark.parametrize("other", ["halves", "neighbours", None])
def test_the_rope_that_turns_keys_is_found(other: str | None) -> None:
    ropes = [Turn().rope(), Turn(interleaved=True).rope(), Turn(base=1e6).rope()]
    mean, noise = normal(HEADS, DIM), 0.5 * normal(TOKENS, HEADS, DIM)
    key = TURNS[other].keys(mean, noise) if other else mean + noise
    want = TURNS[other].centres(mean) if other else mean.expand(SEGMENTS, -1, -1)
    found = centre_keys(key, queries(), ropes, SEGMENTS).centres
    assert (found - want).square().mean().sqrt() < 0.06


def test_without_rope_the_centre_is_the_mean() -> None:
    mean = normal(HEADS, DIM)
    found = centre_keys(mean + 0.1 * normal(TOKENS, HEADS, DIM), queries(), [], SEGMENTS)
    assert (found.centres - mean).abs().max() < 0.03
    assert (found.removed > 0.95).all()


@pytest.mark.parametrize("name", ["halves", "neighbours", "neighbours, half turning"])
def test_scales_balance_noise_of_keys_and_power_of_queries(name: str) -> None:
    turn = TURNS[name]
    mean = 4 * normal(HEADS, DIM)
    mean[:, : turn.turning] = 0
    mean[:, turn.first][:, -1] = 8  # the slowest pair, which a segment's mean holds
    uneven, power = normal(HEADS, DIM).mul(0.7).exp(), normal(HEADS, DIM).mul(0.7).exp()
    for x in (uneven, power):
        x[:, turn.second] = x[:, turn.first]
    tokens = 8 * SEGMENT
    key = turn.keys(mean, uneven * normal(tokens, HEADS, DIM))
    query = power * normal(tokens, HEADS, DIM)
    found = centre_keys(key, query.square().sum(0), [turn.rope(tokens, 8)], 8)
    want = (power / uneven).sqrt()
    want = want / want.log().mean(-1, keepdim=True).exp()
    slow = torch.zeros(DIM, dtype=torch.bool)
    slow[turn.first][-1] = slow[turn.second][-1] = True
    ratio = found.scales / want
    assert 0.93 < ratio[:, ~slow].min() < ratio[:, ~slow].max() < 1.07
    torch.testing.assert_close(found.scales[:, turn.first], found.scales[:, turn.second])
    torch.testing.assert_close(found.scales.log().mean(-1), torch.zeros(HEADS, dtype=torch.float64))


def test_unused_pairs_have_finite_scales() -> None:
    key, power = normal(TOKENS, HEADS, DIM), queries()
    power[:, [3, 3 + DIM // 2]] = 0
    key[..., [5, 5 + DIM // 2]] = 0
    scales = centre_keys(key, power, [Turn().rope()], SEGMENTS).scales
    assert scales.isfinite().all()
    assert (scales > 0).all()
    ratio = scales[:, 5] / scales[:, 3]
    torch.testing.assert_close(ratio, torch.full_like(ratio, centring.FLOOR**-0.5), rtol=0.3, atol=0)


def test_unknown_turns_are_scaled_as_halves() -> None:
    key = normal(TOKENS, HEADS, DIM)
    key[..., : DIM // 4] *= 5
    scales = centre_keys(key, queries(), [], SEGMENTS).scales
    torch.testing.assert_close(scales[:, : DIM // 2], scales[:, DIM // 2 :])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["key", "query"])
def test_a_head_that_is_not_finite_gets_nothing(value: float, where: str) -> None:
    key, power = Turn().keys(normal(HEADS, DIM), 0.1 * normal(TOKENS, HEADS, DIM)), queries()
    want = centre_keys(key, power, [Turn().rope()], SEGMENTS)
    if where == "key":
        key[9, 1, 4] = value
    else:
        power[1, 4] = value
    found = centre_keys(key, power, [Turn().rope()], SEGMENTS)
    assert not found.centres[:, 1].any()
    assert (found.scales[1] == 1).all()
    assert found.removed[1] == 0
    for have, before in zip(found, want, strict=True):
        heads = [0, 2]
        at = (slice(None), heads) if have.dim() == 3 else heads
        torch.testing.assert_close(have[at], before[at])


def test_a_centre_that_does_not_help_is_zero() -> None:
    """Over 20 positions the only pair of head 1 stays where it is; over a segment it turns away."""
    turn = Turn(turning=2)
    rope = Rope.of(torch.tensor([[math.cos(0.02 * p), math.sin(0.02 * p)] for p in range(SEGMENT)]), False, 1)
    mean = normal(2, DIM)
    mean[1] = 0
    mean[1, 0] = 3
    phases = torch.polar(torch.ones(20, 1).double(), 0.02 * torch.arange(20.0).double()[:, None])
    key = turn.times(mean.expand(20, -1, -1), phases[:, None])
    found = centre_keys(key, queries()[:2], [rope], 1)
    assert found.centres[:, 0].any()
    assert found.removed[0] > 0.5
    assert not found.centres[:, 1].any()
    assert found.removed[1] == 0
    # It is balanced all the same.
    assert found.scales[1, 0] < 0.5 * found.scales[1, 2:].min()


def test_segments_past_the_table_are_like_its_last() -> None:
    rope = Turn().rope(2 * SEGMENT + 100, 5)
    torch.testing.assert_close(rope.means[:2], Turn().rope().means[:2])
    torch.testing.assert_close(rope.means[2], Turn().table(2 * SEGMENT + 100)[2 * SEGMENT :].mean(0))
    assert (rope.means[3:] == rope.means[2]).all()
    assert Turn().rope(100, 3).means.shape == (3, DIM)
    assert Turn().rope(100 * SEGMENT, 3).means.shape == (3, DIM)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_filled_tables_hold_rotated_centres_and_change_no_logit(dtype: torch.dtype) -> None:
    shared = codec.tables(Slot("polarquant_k4v4", DIM), dtype, torch.device("cpu"))
    tables = layer_tables(shared, HEADS, SEGMENTS)
    assert tables.mixing is shared.mixing
    before = [part.data_ptr() for part in tables]
    key = Turn().keys(4 * normal(HEADS, DIM), normal(TOKENS, HEADS, DIM) * normal(DIM).exp())
    found = centre_keys(key, queries(), [Turn().rope()], SEGMENTS)
    fill(tables, found, dtype)
    assert [part.data_ptr() for part in tables] == before
    torch.testing.assert_close(tables.key_factors * tables.query_factors, torch.ones(HEADS, DIM))
    want = (found.centres * found.scales) @ codec.rotation(DIM).T
    have = codec.unpack_centres(tables.centres, dtype).double()
    torch.testing.assert_close(have, want, rtol=2**-8, atol=1e-2)
    # A second time gives what the first gave.
    once = fingerprint([tables])
    fill(tables, found, dtype)
    assert fingerprint([tables]) == once
    assert fingerprint([layer_tables(shared, HEADS, SEGMENTS)]) != once


def test_pages_lose_less_with_centres() -> None:
    slot, turn = Slot("polarquant_k4v4", DIM), Turn(base=1e6)
    page, plain = Page(slot, 16), Attention(DIM**-0.5)
    mean = torch.zeros(HEADS, DIM, dtype=torch.float64)
    mean[:, DIM // 4 : DIM // 2] = 6  # pairs that turn slowly
    noise = normal(TOKENS, HEADS, DIM) * normal(HEADS, DIM).mul(0.5).exp()
    key = turn.keys(mean, noise)
    key[0] *= 0.02
    query, value = normal(TOKENS, HEADS, DIM), normal(TOKENS, HEADS, DIM).bfloat16()
    tables = layer_tables(codec.tables(slot, torch.bfloat16, torch.device("cpu")), HEADS, 2)
    power = query.square().sum(0)
    fill(tables, centre_keys(key, power, [turn.rope(2 * SEGMENT, 2)], 2), torch.bfloat16)
    key, query = key.bfloat16(), query.bfloat16()
    position = torch.arange(TOKENS)
    exact = reference.dense_attention(query, key, value, position, plain)
    errors = []
    for mine in (None, tables):
        cache = torch.zeros(TOKENS // 16, HEADS, 16, slot.nbytes, dtype=torch.uint8)
        order = reference.rows(page)
        reference.store_kv(key, value, cache, position, page, order, mine, (position // SEGMENT).int())
        blocks = torch.arange(TOKENS // 16, dtype=torch.int32)
        keys, _ = reference.read_kv(cache, blocks, TOKENS, page, order, torch.bfloat16, mine)
        out = reference.dense_attention(query, keys, value, position, plain)
        errors.append(float((out.lse - exact.lse).square().mean()))
    assert errors[1] < 0.4 * errors[0]
