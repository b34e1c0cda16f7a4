"""Chunked prefill's plan: how the cached prefixes of a batch go through a workspace of fixed size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

WORKSPACE_BYTES = 32 << 20


def workspace_tokens(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Tokens whose keys and values fit the workspace."""
    return max(1024, WORKSPACE_BYTES // (2 * num_kv_heads * head_dim * dtype.itemsize))


@dataclass(frozen=True)
class Segment:
    """Prefix tokens that fit the workspace at once, of requests first .. last - 1 of the prefills.

    rows: query tokens that see them, among those of the prefills. query_start_loc and key_start_loc: int32
    [last - first + 1], from 0. start: int32 [last - first], the first prefix position of each request in this
    segment. left: of DenseAttention, not causal; None where every query sees all of its request's tokens.
    """

    first: int
    last: int
    rows: slice
    query_start_loc: torch.Tensor
    key_start_loc: torch.Tensor
    start: torch.Tensor
    tokens: int
    max_query_len: int
    max_key_len: int
    left: int | None


@dataclass(frozen=True)
class PrefixPlan:
    """query_start_loc int32 [prefills + 1], from 0, context_lens int32 [prefills], the prefix in segments."""

    query_start_loc: torch.Tensor
    context_lens: torch.Tensor
    max_query_len: int
    segments: tuple[Segment, ...]


def reads_like_decodes(
    query_start_loc: np.ndarray, context_lens: np.ndarray, max_query_len: int, max_tokens: int
) -> bool:
    """Whether all prefills of a batch are few tokens after cached ones.

    Their prefixes are then better read off the pages, as decodes read them, than unpacked.

    Args:
        query_start_loc: int [prefills + 1], rows of their chunks in the batch.
        context_lens: int [prefills], tokens before each chunk.
        max_query_len: the most tokens of a chunk.
        max_tokens: the most tokens of all.
    """
    return (
        int(np.diff(query_start_loc).max()) <= max_query_len
        and int(query_start_loc[-1] - query_start_loc[0]) <= max_tokens
        and int(context_lens.min()) > 0
    )


class Cut(NamedTuple):
    """A segment on the host: positions start .. start + lens of the requests from `first` on.

    rows: query tokens from .. to among those of the prefills. queries: their query_start_loc, from 0.
    """

    first: int
    start: np.ndarray
    lens: np.ndarray
    rows: tuple[int, int]
    queries: np.ndarray
    left: int | None


def cut_prefixes(query_start_loc: np.ndarray, context_lens: np.ndarray, capacity: int) -> Iterator[Cut]:
    """Cut the prefixes, laid end to end, into segments of `capacity` tokens.

    Of a segment's requests, only those without any prefix have no token in it.
    """
    ends = np.cumsum(context_lens)
    begins = ends - context_lens
    for low in range(0, int(ends[-1]) if len(ends) else 0, capacity):
        start = np.clip(low - begins, 0, context_lens)
        lens = np.clip(low + capacity - begins, 0, context_lens) - start
        used = np.flatnonzero(lens)
        first, last = int(used[0]), int(used[-1]) + 1
        queries = query_start_loc[first : last + 1]
        rows = int(queries[0]), int(queries[-1])
        yield Cut(first, start[first:last], lens[first:last], rows, queries - rows[0], None)


def cut_windows(
    query_start_loc: np.ndarray, context_lens: np.ndarray, capacity: int, window: int
) -> Iterator[Cut]:
    """Cut what windows leave of each request's prefix into segments of `capacity` tokens.

    A segment goes to the queries that see any of it, the first ones of the chunk.
    """
    for request, context in enumerate(context_lens.tolist()):
        first_row, end_row = query_start_loc[request : request + 2].tolist()
        for start in range(max(context - window + 1, 0), context, capacity):
            end = min(start + capacity, context)
            # The queries that see the first token, so all, and those that see the last, so any.
            see_all, see_any = (
                min(end_row - first_row, token - context + window) for token in (start, end - 1)
            )
            # The last of them is aligned with the segment's last token.
            left = end - 1 - context + window - see_any
            parts: list[tuple[int, int, int | None]] = [(0, see_any, left)]
            if see_all == see_any:
                parts = [(0, see_any, None)]
            elif see_any > end - start:
                # With more queries than keys, FlashAttention 2 hides the last keys from the first queries.
                parts = [(0, see_all, None), (see_all, see_any, left)]
            for begin, stop, part_left in parts:
                yield Cut(
                    request,
                    np.array([start]),
                    np.array([end - start]),
                    (first_row + begin, first_row + stop),
                    np.array([0, stop - begin]),
                    part_left,
                )


def plan_prefixes(
    query_start_loc: np.ndarray,
    context_lens: np.ndarray,
    capacity: int,
    device: torch.device,
    window: int | None = None,
) -> PrefixPlan:
    """Plan the prefills of a batch; one copy, which nobody waits for, carries its small arrays over.

    Args:
        query_start_loc: int [prefills + 1], rows of their chunks in the batch.
        context_lens: int [prefills], tokens before each chunk.
        capacity: tokens that the workspace holds.
        device: of the plan's tensors.
        window: Attention.window of the layers that the plan is for.
    """
    relative = query_start_loc - query_start_loc[0]
    contexts = context_lens.astype(np.int64)
    if window is None:
        cuts = list(cut_prefixes(relative, contexts, capacity))
    else:
        cuts = list(cut_windows(relative, contexts, capacity, window))
    parts: list[np.ndarray] = [relative, contexts]
    for cut in cuts:
        parts += [cut.queries, np.concatenate([[0], np.cumsum(cut.lens)]), cut.start]
    flat = torch.from_numpy(np.concatenate(parts).astype(np.int32))
    if device.type == "cuda":
        flat = flat.pin_memory()
    arrays = list(flat.to(device, non_blocking=True).split([len(part) for part in parts]))
    segments = []
    for i, cut in enumerate(cuts):
        queries, keys, start = arrays[3 * i + 2 : 3 * i + 5]
        segments.append(
            Segment(
                first=cut.first,
                last=cut.first + len(cut.start),
                rows=slice(*cut.rows),
                query_start_loc=queries,
                key_start_loc=keys,
                start=start,
                tokens=int(cut.lens.sum()),
                max_query_len=int(np.diff(cut.queries).max()),
                max_key_len=int(cut.lens.max()),
                left=cut.left,
            )
        )
    return PrefixPlan(arrays[0], arrays[1], int(np.diff(relative).max()), tuple(segments))
