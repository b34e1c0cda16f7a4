"""The schedule of decode attention: every tile of every request exactly once, in about equal shares."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from vllm_polarquant.kernels.triton.schedule import ITEM_COST, MAX_SPLITS, Schedule, plan

TILE = 128


def tiles_of(length: int) -> int:
    return max(1, -(-length // TILE))


def shares(
    lengths: list[int],
    queries: list[int],
    programs: int,
    device: torch.device,
    window: int | None = None,
) -> list[int]:
    """What each program has to do, in tiles, of a schedule that covers all requests once."""
    # Room for more requests than there are, as in an engine.
    schedule = Schedule.allocate(len(lengths) + 3, programs, TILE, device)
    schedule.first.fill_(-7)
    schedule.items.fill_(-7)
    schedule.begin.fill_(-7)
    starts = torch.tensor([0, *queries], device=device).cumsum(0).to(torch.int32)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    plan(seq_lens, starts, schedule, window)
    if window is not None:
        first_seen = [max(0, n - count - window + 1) for n, count in zip(lengths, queries, strict=True)]
        lengths = [n - first // 16 * 16 for n, first in zip(lengths, first_seen, strict=True)]
    first, items = schedule.first.tolist(), schedule.items.tolist()
    assert first[0] == 0
    for program, words in enumerate(schedule.begin.tolist()):
        count = first[program + 1] - first[program]
        assert words[-1] == count
        assert not count or words[:5] == items[first[program]][:5]
        assert not count or words[-2] == first[program]
    found: dict[int, list[tuple[int, int]]] = {}
    work = []
    for program in range(programs):
        cost = 0
        for request, begin, end, first_program, splits, *_ in items[first[program] : first[program + 1]]:
            mine = found.setdefault(request, [])
            assert program == first_program + len(mine), "splits are not in consecutive programs"
            mine.append((begin, end))
            total = tiles_of(lengths[request])
            if len(mine) == splits:
                assert end >= total
                end = total
            assert begin < end, "a split without tokens"
            assert splits <= MAX_SPLITS
            cost += end - begin + ITEM_COST
        work.append(cost)
    assert sorted(found) == [r for r, count in enumerate(queries) if count]
    for request, mine in found.items():
        own = [item[4] for item in items[: first[-1]] if item[0] == request]
        assert own == [len(mine)] * len(mine)
        assert mine[0][0] == 0
        assert all(before[1] == after[0] for before, after in pairwise(mine))
    return work


@pytest.mark.parametrize("programs", [1, 2, 33, 264])
@pytest.mark.parametrize("reqs", [1, 2, 8, 40])
def test_every_tile_is_read_once(reqs, programs, device):
    rng = random.Random(f"{reqs} {programs}")
    for longest in (300, 200_000):
        edges = [0, 1, TILE - 1, TILE, TILE + 1]
        lengths = [rng.choice([*edges, rng.randrange(longest), rng.randrange(1500)]) for _ in range(reqs)]
        queries = [rng.choice([0, 1, 1, 3]) for _ in range(reqs)]
        shares(lengths, queries, programs, device)


@pytest.mark.parametrize("reqs", [1, 4, 8, 20, 32, 33, 34, 48, 64, 200])
def test_equal_requests_fill_the_gpu(reqs, device):
    work = shares([16384] * reqs, [1] * reqs, 33, device)
    least = reqs * (128 + ITEM_COST) / 33
    # Beside its share a program has the rest of a request that is not worth a cut, and a cut's cost.
    assert max(work) <= least + 3 * ITEM_COST


def test_one_long_request_among_short_ones_does_not_end_last(device):
    lengths = [1024] * 16 + [131072] + [1024] * 15
    least = sum(tiles_of(length) + ITEM_COST for length in lengths) / 33
    assert max(shares(lengths, [1] * 32, 33, device)) <= least + 3 * ITEM_COST


def test_few_short_requests_get_one_split_a_program(device):
    work = shares([1024] * 8, [1] * 8, 33, device)
    assert sorted(work) == [0] + [2 + ITEM_COST] * 32


def test_requests_without_queries_cost_nothing(device):
    """A captured graph's padding."""
    work = shares([16384] * 4 + [0] * 60, [1] * 4 + [0] * 60, 33, device)
    assert max(work) == 16 + ITEM_COST


def test_what_lies_before_a_window_costs_nothing(device):
    work = shares([16384] * 8, [1] * 8, 33, device, 1024 + 5)
    assert max(work) == 3 + ITEM_COST
    shares([50, 700, 16384, 0, 40], [1, 1, 16, 1, 0], 33, device, 300)
