"""Which program of decode attention reads which tokens: equal shares of a batch of unequal lengths.

The batch is laid out on a line: each request's tokens in tiles, which a program's warps take together, behind
a stretch for what every work item costs beside its tokens. Programs get equal stretches of the line: a
program may end one request and begin the next, and a work item is a program's part, a split, of one request.
Where every program can have one split, and splits of equal length are then no longer than those stretches,
it gets that instead. The schedule is computed on the device, once a step, for all layers.

Sharing a line out among programs is what FlashMLA's tile scheduler does
(https://github.com/deepseek-ai/FlashMLA, get_mla_metadata), and Stream-K for matrix products (Osama et
al., PPoPP 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_polarquant.kernels.triton.constants import check, check_int

MAX_SPLITS = 64
"""Splits that a request is cut into at most."""

ITEM_COST = 4
"""What a work item costs beside its tokens, in tiles. As much as a cut costs, so no split is shorter."""

ITEM_WORDS = 8
"""int32 a work item: its request, first and last (exclusive) tile, the program that has the request's first
split, and the number of splits. Consecutive programs have the splits of a request, and the last one reads to
the request's end, whatever its last tile says.

A program's words are those of its first work item, so that it need not look further for that, then that
item's index and how many the program has."""

_TO_THE_END = tl.constexpr(1 << 24)


@dataclass(frozen=True)
class Schedule:
    """Buffers of one schedule; filled by `plan`, read by decode_attention.

    tile: tokens a tile. first: int32 [programs + 1], each program's first work item and, last, the number of
    them. items: int32 [max_reqs + programs, ITEM_WORDS]. begin: int32 [programs, ITEM_WORDS], each
    program's words.
    """

    tile: int
    first: torch.Tensor
    items: torch.Tensor
    begin: torch.Tensor

    @classmethod
    def allocate(cls, max_reqs: int, programs: int, tile: int, device: torch.device | str) -> Schedule:
        """Buffers for batches of up to max_reqs requests and for so many programs a KV head."""
        return cls(
            tile,
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


@triton.jit
def first_seen_token(seq_len, count, window):
    """The first position that the first of a request's last `count` tokens sees within a window."""
    return tl.maximum(seq_len - count - window + 1, 0)


@triton.jit(
    do_not_specialize=["num_reqs", "window"],
    do_not_specialize_on_alignment=["seq_lens", "query_start_loc"],
)
def _plan_kernel(
    seq_lens,
    query_start_loc,
    window,
    num_reqs,
    first,
    items,
    begin_words,
    PROGRAMS: tl.constexpr,
    TILE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    ITEM_COST: tl.constexpr,
    ITEM_WORDS: tl.constexpr,
    REQUESTS: tl.constexpr,
    FIRST: tl.constexpr,
):
    request = tl.arange(0, REQUESTS)
    valid = request < num_reqs
    row = tl.load(query_start_loc + request, mask=valid, other=0)
    queries = tl.load(query_start_loc + request + 1, mask=valid, other=0) - row
    length = tl.load(seq_lens + request, mask=valid, other=0)
    if window is not None:
        # Warps read from the chunk of 16 on that holds the first token seen.
        length -= first_seen_token(length, queries, window) // 16 * 16
    # A request with queries and no tokens has an item, which writes zeros; one without queries has none.
    tiles = tl.where(queries > 0, tl.maximum(tl.cdiv(length, TILE), 1), 0)
    cost = tl.where(tiles > 0, tiles + ITEM_COST, 0)
    longest = tl.max(tiles)

    # Stretches of the line.
    line = tl.sum(cost)
    share = tl.maximum(tl.cdiv(line, PROGRAMS), tl.cdiv(longest, MAX_SPLITS - 2))
    share = tl.maximum(share, ITEM_COST + 1)
    # The shortest splits of which there are no more than programs.
    low = tl.maximum(tl.cdiv(longest, MAX_SPLITS), 1)
    high = tl.maximum(longest, low)
    while low < high:
        middle = (low + high) // 2
        if tl.sum(tl.cdiv(tiles, middle)) <= PROGRAMS:
            high = middle
        else:
            low = middle + 1
    one_each = (tl.sum(tl.cdiv(tiles, low)) <= PROGRAMS) & (low <= share)

    place = tl.cumsum(cost) - tiles
    program = place // share
    last_program = (place + tiles - 1) // share
    # The neighbour takes what is too short to be cut off. No program is left without an item, as its stretch
    # is longer than two such splits and what lies between them; without them, it is longer than that.
    least = tl.where(share > 3 * ITEM_COST, ITEM_COST, 0)
    program += ((program < last_program) & ((program + 1) * share - place < least)).to(tl.int32)
    last_program -= ((program < last_program) & (place + tiles - last_program * share < least)).to(tl.int32)
    splits = tl.where(one_each, tl.cdiv(tiles, low), last_program - program + 1)
    splits = tl.where(tiles > 0, splits, 0)
    size = tl.cdiv(tiles, tl.maximum(splits, 1))
    first_item = tl.cumsum(splits) - splits
    count = tl.sum(splits)
    number = tl.arange(0, FIRST)
    tl.store(first + number, number * 0 + count, mask=number <= PROGRAMS)
    tl.debug_barrier()
    for split in range(0, tl.max(splits)):
        item = first_item + split
        own = split < splits
        begin = tl.where(one_each, split * size, tl.where(split == 0, 0, (program + split) * share - place))
        end = tl.where(one_each, begin + size, (program + split + 1) * share - place)
        record = items + item * ITEM_WORDS
        tl.store(record, request, mask=own)
        tl.store(record + 1, begin, mask=own)
        tl.store(record + 2, tl.where(split == splits - 1, _TO_THE_END, end), mask=own)
        tl.store(record + 3, tl.where(one_each, first_item, program), mask=own)
        tl.store(record + 4, splits, mask=own)
        tl.atomic_min(first + tl.where(one_each, item, program + split), item, mask=own)
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


def plan(
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    schedule: Schedule,
    window: int | None = None,
) -> None:
    """Fill a schedule for a batch; one small launch, which never waits for the device.

    Args:
        seq_lens: int32 [R]. If they change before decode_attention reads them, results stay right; only
            the shares are no longer equal.
        query_start_loc: int32 [R + 1]. Requests without queries get no items, so these must not change.
        schedule: of Schedule.allocate for at least R requests.
        window: Attention.window of the layers that the schedule is for.

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
        window,
        num_reqs,
        schedule.first,
        schedule.items,
        schedule.begin,
        PROGRAMS=schedule.programs,
        TILE=schedule.tile,
        MAX_SPLITS=MAX_SPLITS,
        ITEM_COST=ITEM_COST,
        ITEM_WORDS=ITEM_WORDS,
        REQUESTS=max(32, triton.next_power_of_2(schedule.max_reqs)),
        FIRST=triton.next_power_of_2(schedule.programs + 1),
        num_warps=4,
    )
