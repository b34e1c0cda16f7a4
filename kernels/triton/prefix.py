"""Chunked prefill's plan: how the cached prefixes of a batch go through a workspace of fixed size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

WORKSPACE_BYTES = 32 << 20


def workspace_tokens(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Tokens whose keys and values fit the workspace."""
    return max(1024, WORKSPACE_BYTES // (2 * num_kv_heads * head_dim * dtype.itemsize))


@dataclass(frozen=True)
class Segment:
    """Prefix tokens that fit the workspace at once, of requests first .. last - 1 of the prefills.

    rows: their query tokens among those of the prefills. query_start_loc and key_start_loc: int32
    [last - first + 1], from 0. start: int32 [last - first], the first prefix position of each request in this
    segment.
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


@dataclass(frozen=True)
class PrefixPlan:
    """query_start_loc int32 [prefills + 1], from 0, and the prefix in segments."""

    query_start_loc: torch.Tensor
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


def cut_prefixes(context_lens: np.ndarray, capacity: int) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
    """Cut the prefixes, laid end to end, into segments of `capacity` tokens.

    Returns (first, last, start, lens) a segment: positions start .. start + lens of requests
    first .. last - 1, of which only those without any prefix have no token in it.
    """
    ends = np.cumsum(context_lens)
    begins = ends - context_lens
    segments = []
    for low in range(0, int(ends[-1]) if len(ends) else 0, capacity):
        start = np.clip(low - begins, 0, context_lens)
        lens = np.clip(low + capacity - begins, 0, context_lens) - start
        used = np.flatnonzero(lens)
        first, last = int(used[0]), int(used[-1]) + 1
        segments.append((first, last, start[first:last], lens[first:last]))
    return segments


def plan_prefixes(
    query_start_loc: np.ndarray, context_lens: np.ndarray, capacity: int, device: torch.device
) -> PrefixPlan:
    """Plan the prefills of a batch; one copy, which nobody waits for, carries its small arrays over.

    Args:
        query_start_loc: int [prefills + 1], rows of their chunks in the batch.
        context_lens: int [prefills], tokens before each chunk.
        capacity: tokens that the workspace holds.
        device: of the plan's tensors.
    """
    relative = query_start_loc - query_start_loc[0]
    cuts = cut_prefixes(context_lens.astype(np.int64), capacity)
    parts: list[np.ndarray] = [relative]
    for first, last, start, lens in cuts:
        parts += [
            relative[first : last + 1] - relative[first],
            np.concatenate([[0], np.cumsum(lens)]),
            start,
        ]
    flat = torch.from_numpy(np.concatenate(parts).astype(np.int32))
    if device.type == "cuda":
        flat = flat.pin_memory()
    arrays = list(flat.to(device, non_blocking=True).split([len(part) for part in parts]))
    segments = []
    for i, (first, last, _, lens) in enumerate(cuts):
        segments.append(
            Segment(
                first=first,
                last=last,
                rows=slice(int(relative[first]), int(relative[last])),
                query_start_loc=arrays[3 * i + 1],
                key_start_loc=arrays[3 * i + 2],
                start=arrays[3 * i + 3],
                tokens=int(lens.sum()),
                max_query_len=int(np.diff(relative[first : last + 1]).max()),
                max_key_len=int(lens.max()),
            )
        )
    return PrefixPlan(arrays[0], int(np.diff(relative).max()), tuple(segments))
