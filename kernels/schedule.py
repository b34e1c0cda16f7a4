"""Which program of decode attention reads which tokens: equal shares of a batch of unequal lengths.

A batch's work is a line: each request's tokens in turns, which a program's warps take together, behind
a stretch for what every item costs beside its tokens. Programs get equal pieces of the line: a program may
end one request and begin the next, and an item is a program's part of one request. Where one part a
program, of about equal parts of each request, is no longer than those pieces, it gets that instead. The
schedule is computed on the device, once a step, for all layers.

Sharing a line out among programs is what FlashMLA's tile scheduler does
(https://github.com/deepseek-ai/FlashMLA, get_mla_metadata), and Stream-K for matrix products (Osama et
al., PPoPP 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_polarquant.kernels.page import check, check_int

MAX_PARTS = 64
"""Parts that a request is cut into at most."""

ITEM_COST = 4
"""What an item costs a program beside its tokens, in turns. As much as a cut costs, so no part is shorter."""

ITEM_WORDS = 8
"""int32 an item: its request, first and last (exclusive) turn, the program that has the request's first
part, and the number of parts. Consecutive programs have the parts of a request, and the last one reads to
the request's end, whatever its last turn says.

A program's words are those of its first item, so that it need not look further for that, then that item's
index and how many items the program has."""

_TO_THE_END = tl.constexpr(1 << 24)


@dataclass(frozen=True)
class Schedule:
    """Buffers of one schedule; filled by `plan`, read by decode_attention.

    turn: tokens a turn. first: int32 [programs + 1], each program's first item and, last, the number of
    items. items: int32 [max_reqs + programs, ITEM_WORDS]. begin: int32 [programs, ITEM_WORDS], each
    program's words.
    """

    turn: int
    first: torch.Tensor
    items: torch.Tensor
    begin: torch.Tensor

    @classmethod
    def allocate(cls, max_reqs: int, programs: int, turn: int, device: torch.device | str) -> Schedule:
        """Buffers for batches of up to max_reqs requests and for so many programs a KV head."""
        return cls(
            turn,
            torch.zeros(programs + 1, dtype=torch.int32, device=device),
            torch.zeros(max_reqs + programs, ITEM_WORDS, dtype=torch.int32, device=device),
            torch.zeros(programs, ITEM_WORDS, dtype=torch.int32, device=device),
        )

    @property
    def programs(self) -> int:
        return self.first.numel() - 1

    @property
    def max_reqs(self) -> int:
        return self.items.shape[0] - self.programs


@triton.jit(do_not_specialize=["num_reqs"], do_not_specialize_on_alignment=["seq_lens", "query_start_loc"])
def _plan_kernel(
    seq_lens,
    query_start_loc,
    num_reqs,
    first,
    items,
    begin_words,
    PROGRAMS: tl.constexpr,
    TURN: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    ITEM_COST: tl.constexpr,
    ITEM_WORDS: tl.constexpr,
    REQUESTS: tl.constexpr,
    FIRST: tl.constexpr,
):
    request = tl.arange(0, REQUESTS)
    valid = request < num_reqs
    start = tl.load(query_start_loc + request, mask=valid, other=0)
    queries = tl.load(query_start_loc + request + 1, mask=valid, other=0) - start
    seq_len = tl.load(seq_lens + request, mask=valid, other=0)
    # A request with queries and no tokens has an item, which writes zeros; one without queries has none.
    turns = tl.where(queries > 0, tl.maximum(tl.cdiv(seq_len, TURN), 1), 0)
    cost = tl.where(turns > 0, turns + ITEM_COST, 0)
    longest = tl.max(turns)

    # Pieces of the line.
    line = tl.sum(cost)
    share = tl.maximum(tl.cdiv(line, PROGRAMS), tl.cdiv(longest, MAX_PARTS - 2))
    share = tl.maximum(share, ITEM_COST + 1)
    # The shortest parts of which there are no more than programs.
    low = tl.maximum(tl.cdiv(longest, MAX_PARTS), 1)
    high = tl.maximum(longest, low)
    while low < high:
        middle = (low + high) // 2
        if tl.sum(tl.cdiv(turns, middle)) <= PROGRAMS:
            high = middle
        else:
            low = middle + 1
    apart = (tl.sum(tl.cdiv(turns, low)) <= PROGRAMS) & (low <= share)

    place = tl.cumsum(cost) - turns
    program = place // share
    last_program = (place + turns - 1) // share
    # The neighbour takes what is too short to be cut off. No program is left without an item, as its piece
    # is longer than two such parts and what lies between them; without them, it is longer than that.
    least = tl.where(share > 3 * ITEM_COST, ITEM_COST, 0)
    program += ((program < last_program) & ((program + 1) * share - place < least)).to(tl.int32)
    last_program -= ((program < last_program) & (place + turns - last_program * share < least)).to(tl.int32)
    parts = tl.where(apart, tl.cdiv(turns, low), last_program - program + 1)
    parts = tl.where(turns > 0, parts, 0)
    size = tl.cdiv(turns, tl.maximum(parts, 1))
    first_item = tl.cumsum(parts) - parts
    count = tl.sum(parts)
    number = tl.arange(0, FIRST)
    tl.store(first + number, number * 0 + count, mask=number <= PROGRAMS)
    tl.debug_barrier()
    for part in range(0, tl.max(parts)):
        item = first_item + part
        own = part < parts
        begin = tl.where(apart, part * size, tl.where(part == 0, 0, (program + part) * share - place))
        end = tl.where(apart, begin + size, (program + part + 1) * share - place)
        record = items + item * ITEM_WORDS
        tl.store(record, request, mask=own)
        tl.store(record + 1, begin, mask=own)
        tl.store(record + 2, tl.where(part == parts - 1, _TO_THE_END, end), mask=own)
        tl.store(record + 3, tl.where(apart, first_item, program), mask=own)
        tl.store(record + 4, parts, mask=own)
        tl.atomic_min(first + tl.where(apart, item, program + part), item, mask=own)
    tl.debug_barrier()
    own = number < PROGRAMS
    item = tl.load(first + number, mask=own, other=0, cache_modifier=".cg")
    following = tl.load(first + number + 1, mask=own, other=0, cache_modifier=".cg")
    own &= following > item
    record = items + item * ITEM_WORDS
    target = begin_words + number * ITEM_WORDS
    for word in tl.static_range(ITEM_WORDS - 3):
        tl.store(target + word, tl.load(record + word, mask=own, other=0, cache_modifier=".cg"), mask=own)
    tl.store(target + ITEM_WORDS - 2, item, mask=own)
    tl.store(target + ITEM_WORDS - 1, following - item, mask=number < PROGRAMS)


def plan(seq_lens: torch.Tensor, query_start_loc: torch.Tensor, schedule: Schedule) -> None:
    """Fill a schedule for a batch; one small launch, which never waits for the device.

    Args:
        seq_lens: int32 [R]. If they change before decode_attention reads them, results stay right; only
            the shares are no longer equal.
        query_start_loc: int32 [R + 1]. Requests without queries get no items, so these must not change.
        schedule: of Schedule.allocate for at least R requests.

    Raises:
        ValueError: for other shapes or dtypes, or more requests than the schedule has room for.
    """
    num_reqs = seq_lens.shape[0]
    check_int("seq_lens", seq_lens, (-1,), torch.int32)
    check_int("query_start_loc", query_start_loc, (num_reqs + 1,), torch.int32)
    check(
        num_reqs <= schedule.max_reqs,
        f"a schedule for up to {schedule.max_reqs} requests cannot hold {num_reqs}",
    )
    _plan_kernel[(1,)](
        seq_lens,
        query_start_loc,
        num_reqs,
        schedule.first,
        schedule.items,
        schedule.begin,
        PROGRAMS=schedule.programs,
        TURN=schedule.turn,
        MAX_PARTS=MAX_PARTS,
        ITEM_COST=ITEM_COST,
        ITEM_WORDS=ITEM_WORDS,
        REQUESTS=max(32, triton.next_power_of_2(schedule.max_reqs)),
        FIRST=triton.next_power_of_2(schedule.programs + 1),
        num_warps=4,
    )
