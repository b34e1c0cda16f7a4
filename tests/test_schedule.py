"""The schedule of decode attention: every turn of every request exactly once, in about equal shares."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from vllm_polarquant.kernels.schedule import ITEM_COST, MAX_PARTS, Schedule, plan

TURN = 128


def turns_of(length: int) -> int:
    return max(1, -(-length // TURN))


def shares(lengths: list[int], queries: list[int], programs: int, device: torch.device) -> list[int]:
    """What each program has to do, in turns, of a schedule that covers all requests once."""
    # Room for more requests than there are, as in an engine.
    schedule = Schedule.allocate(len(lengths) + 3, programs, TURN, device)
    schedule.first.fill_(-7)
    schedule.items.fill_(-7)
    schedule.begin.fill_(-7)
    starts = torch.tensor([0, *queries], device=device).cumsum(0).to(torch.int32)
    plan(torch.tensor(lengths, dtype=torch.int32, device=device), starts, schedule)
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
        for request, begin, end, first_program, parts, *_ in items[first[program] : first[program + 1]]:
            mine = found.setdefault(request, [])
            assert program == first_program + len(mine), "parts are not in consecutive programs"
            mine.append((begin, end))
            total = turns_of(lengths[request])
            if len(mine) == parts:
                assert end >= total
                end = total
            assert begin < end, "a part without tokens"
            assert parts <= MAX_PARTS
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
def test_every_turn_is_read_once(reqs, programs, device):
    rng = random.Random(f"{reqs} {programs}")
    for longest in (300, 200_000):
        edges = [0, 1, TURN - 1, TURN, TURN + 1]
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
    least = sum(turns_of(length) + ITEM_COST for length in lengths) / 33
    assert max(shares(lengths, [1] * 32, 33, device)) <= least + 3 * ITEM_COST


def test_few_short_requests_get_one_part_a_program(device):
    work = shares([1024] * 8, [1] * 8, 33, device)
    assert sorted(work) == [0] + [2 + ITEM_COST] * 32


def test_requests_without_queries_cost_nothing(device):
    """A captured graph's padding."""
    work = shares([16384] * 4 + [0] * 60, [1] * 4 + [0] * 60, 33, device)
    assert max(work) == 16 + ITEM_COST
