"""Which segment each new token's position lies in: what keys are centred by as they are stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_polarquant.format import SEGMENT
from vllm_polarquant.kernels.triton.constants import check, check_int

_BLOCK = 256


@triton.jit(
    do_not_specialize=["num_reqs"],
    do_not_specialize_on_alignment=["seq_lens", "query_start_loc"],
)
def _segments_kernel(
    seq_lens,
    query_start_loc,
    num_reqs,
    segments,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    first = tl.load(query_start_loc + request)
    count = tl.load(query_start_loc + request + 1) - first
    context = tl.load(seq_lens + request) - count
    for start in tl.range(tl.program_id(1) * BLOCK, count, tl.num_programs(1) * BLOCK):
        token = start + tl.arange(0, BLOCK)
        tl.store(segments + first + token, tl.maximum(context + token, 0) // SEGMENT, mask=token < count)


def fill_segments(seq_lens: torch.Tensor, query_start_loc: torch.Tensor, segments: torch.Tensor) -> None:
    """Write the segment of each query token of a batch; one small launch, which never waits for the device.

    Args:
        seq_lens: int32 [R], query tokens included; 0 for a padded row.
        query_start_loc: int32 [R + 1].
        segments: int32 [at least query_start_loc[R]]; those past it are left alone.

    Raises:
        ValueError: for other shapes or dtypes.
    """
    num_reqs = seq_lens.shape[0]
    check_int("seq_lens", seq_lens, (-1,), torch.int32)
    check_int("query_start_loc", query_start_loc, (num_reqs + 1,), torch.int32)
    check_int("segments", segments, (-1,), torch.int32)
    check(num_reqs > 0, "there must be a request")
    # Few long chunks get several programs each, and many requests of one token one.
    programs = max(1, min(32, triton.cdiv(len(segments), _BLOCK * num_reqs)))
    _segments_kernel[(num_reqs, programs)](
        seq_lens, query_start_loc, num_reqs, segments, SEGMENT=SEGMENT, BLOCK=_BLOCK, num_warps=4
    )
