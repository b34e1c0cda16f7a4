"""Chunked prefill: attention to the chunk, as given or as stored, and to its cached prefix in segments.

Of each segment `gather_prefix` unpacks as many tokens as the workspace holds, dense attention runs on them
with rotated queries, and `merge_prefix` turns the result back, one product a query and a segment instead of
one a key, and merges it by log-sum-exp. A stored chunk is unpacked in the same way, and everything is turned
back at the end. Dense attention is passed in: FlashAttention when serving. It knows windows and soft caps;
sinks take their share of its results.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_polarquant.attention import Attention
from vllm_polarquant.codec import Tables
from vllm_polarquant.kernels.ops import DenseAttention
from vllm_polarquant.kernels.triton.constants import check, check_heads, check_sinks
from vllm_polarquant.kernels.triton.gather import gather_prefix
from vllm_polarquant.kernels.triton.prefix import PrefixPlan
from vllm_polarquant.kernels.triton.rotate import BLOCK_COLUMNS, mixed_columns, rotate, row_tile
from vllm_polarquant.page import Page


@dataclass(frozen=True)
class PrefixWorkspace:
    """Room for a segment's keys and values: [tokens, kv heads, d] in the model's dtype."""

    key: torch.Tensor
    value: torch.Tensor

    @classmethod
    def allocate(
        cls, tokens: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> PrefixWorkspace:
        """Room for so many tokens."""
        return cls(*torch.empty(2, tokens, num_kv_heads, head_dim, dtype=dtype, device=device))

    @property
    def tokens(self) -> int:
        return len(self.key)

    @property
    def nbytes(self) -> int:
        return self.key.nbytes + self.value.nbytes


def prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    plan: PrefixPlan,
    page: Page,
    attention: Attention,
    tables: Tables,
    out: torch.Tensor,
    workspace: PrefixWorkspace,
    dense_attention: DenseAttention,
) -> None:
    """Causal attention of requests' chunks over themselves and over their prefixes.

    Args:
        query: bfloat16 or float16 [T, num_heads, d], last dim dense, not rotated: the chunks' tokens.
        key, value: [T, kv heads, d], as they are before they are stored; both None to read them off the
            pages, for which the workspace must hold T tokens.
        cache: uint8 [B, kv heads, N, slot.nbytes] with dense blocks.
        block_table: int32 [R, max_blocks], last dim dense.
        plan: of the requests' chunks and prefixes, for this window; its segments fit the workspace.
        page: of the cache.
        attention: scale, window, soft cap and sinks.
        tables: codec.tables(page.slot, query.dtype, query.device), or a layer's own.
        out: like query, other memory; written.
        workspace: of a segment's keys and values.
        dense_attention: attention over keys and values that are not paged.

    Raises:
        ValueError: for other shapes, dtypes or strides, or a workspace that does not hold a stored chunk.
    """
    check_sinks(attention.sinks, query.shape[1])
    stored = key is None or value is None
    scale, soft_cap, window = attention.scale, attention.soft_cap, attention.window
    tokens, starts, longest = len(query), plan.query_start_loc, plan.max_query_len
    rotated = query
    if stored or plan.segments:
        rotated = torch.empty_like(query, memory_format=torch.contiguous_format)
        rotate(query, rotated, tables.mixing, tables.query_factors)
    if key is None or value is None:
        check(
            tokens <= workspace.tokens,
            f"the workspace is for {workspace.tokens} tokens, but chunks of {tokens} are read off the pages",
        )
        gather_prefix(
            cache,
            block_table,
            plan.context_lens,
            starts,
            longest,
            page,
            tables,
            workspace.key,
            workspace.value,
        )
        key, value = workspace.key[:tokens], workspace.value[:tokens]
    _, lse = dense_attention(
        rotated if stored else query,
        key,
        value,
        starts,
        longest,
        starts,
        longest,
        scale,
        True,
        out,
        None if window is None else window - 1,
        soft_cap,
    )
    for segment in plan.segments:
        requests = slice(segment.first, segment.last)
        gather_prefix(
            cache,
            block_table[requests],
            segment.start,
            segment.key_start_loc,
            segment.max_key_len,
            page,
            tables,
            workspace.key,
            workspace.value,
        )
        part, part_lse = dense_attention(
            rotated[segment.rows],
            workspace.key[: segment.tokens],
            workspace.value[: segment.tokens],
            segment.query_start_loc,
            segment.max_query_len,
            segment.key_start_loc,
            segment.max_key_len,
            scale,
            False,
            None,
            segment.left,
            soft_cap,
        )
        merge_prefix(out[segment.rows], lse[:, segment.rows], part, part_lse, None if stored else tables)
    if stored:
        rotate(out, out, tables.mixing, tables.output_factors, inverse=True)
    if attention.sinks is not None:
        give_to_sinks(out, lse, attention.sinks)


@triton.jit(
    do_not_specialize=["lse_stride_head", "prefix_lse_stride_head", "num_rows"],
    do_not_specialize_on_alignment=["lse", "prefix_lse"],
)
def _merge_kernel(
    out,
    out_stride_token,
    out_stride_head,
    lse,
    lse_stride_head,
    lse_stride_token,
    prefix_out,
    prefix_stride_token,
    prefix_stride_head,
    prefix_lse,
    prefix_lse_stride_head,
    prefix_lse_stride_token,
    mixing,
    output_factors,
    num_rows,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    keep = row < num_rows
    token = (row // NUM_HEADS).to(tl.int64)
    head = (row % NUM_HEADS).to(tl.int64)

    # FlashAttention writes +inf or -inf for a query that sees no key; both mean weight 0.
    lse_pointer = lse + head * lse_stride_head + token * lse_stride_token
    own = tl.load(lse_pointer, mask=keep, other=float("-inf"))
    other = tl.load(
        prefix_lse + head * prefix_lse_stride_head + token * prefix_lse_stride_token,
        mask=keep,
        other=float("-inf"),
    )
    own = tl.where(own == float("inf"), float("-inf"), own)
    other = tl.where(other == float("inf"), float("-inf"), other)
    peak = tl.maximum(own, other)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    own = tl.exp(own - peak)
    other = tl.exp(other - peak)
    total = own + other
    some = total > 0
    share = tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)
    merged = tl.where(some, peak + tl.log(tl.where(some, total, 1.0)), float("-inf"))
    tl.store(lse_pointer, merged, mask=keep)

    # An empty part's output may be anything, so it is not read.
    own_keep = (keep & (own > 0))[:, None]
    other_keep = (keep & (other > 0))[:, None]
    own = (own * share)[:, None]
    other = (other * share)[:, None]
    target = out + token * out_stride_token + head * out_stride_head
    source = prefix_out + token * prefix_stride_token + head * prefix_stride_head
    if mixing is not None:
        dim = tl.arange(0, DIM_PAD)
        prefix = tl.load(
            source[:, None] + dim[None, :], mask=other_keep & (dim < HEAD_DIM)[None, :], other=0.0
        )
    for start in tl.range(0, HEAD_DIM, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        inside = (column < HEAD_DIM)[None, :]
        if mixing is not None:
            part = mixed_columns(prefix, mixing, column, True, HEAD_DIM)
            part *= tl.load(output_factors + column, mask=column < HEAD_DIM, other=0.0)[None, :]
        else:
            part = tl.load(source[:, None] + column[None, :], mask=other_keep & inside, other=0.0)
            part = part.to(tl.float32)
        columns = target[:, None] + column[None, :]
        kept = tl.load(columns, mask=own_keep & inside, other=0.0).to(tl.float32)
        mixed = kept * own + part * other
        tl.store(columns, mixed.to(out.dtype.element_ty), mask=keep[:, None] & inside)


def merge_prefix(
    out: torch.Tensor,
    lse: torch.Tensor,
    prefix_out: torch.Tensor,
    prefix_lse: torch.Tensor,
    tables: Tables | None,
) -> None:
    """Merge attention over a rotated prefix into attention over other keys, in place, by log-sum-exp.

    A part whose lse is +inf or -inf is empty and its output is not read; where both are empty, out becomes 0
    and lse -inf.

    Args:
        out: bfloat16 or float16 [T, num_heads, d], last dim dense; overwritten.
        lse: float32 [num_heads, T], natural logarithms; becomes that of the merged attention.
        prefix_out: like out, other memory; rotated, as it comes of the keys and values of `gather_prefix`.
        prefix_lse: like lse.
        tables: codec.tables of the slot, or a layer's own; None where `out` is rotated too, and stays it.

    Raises:
        ValueError: for other shapes, dtypes or strides.
    """
    head_dim = out.shape[2] if tables is None else tables.mixing.shape[0]
    check_heads("out", out, head_dim)
    check_heads("prefix_out", prefix_out, head_dim)
    check(
        out.shape == prefix_out.shape and out.dtype == prefix_out.dtype,
        f"prefix_out must be {out.dtype} {list(out.shape)}, got {prefix_out.dtype} {list(prefix_out.shape)}",
    )
    tokens, num_heads, _ = out.shape
    for name, x in (("lse", lse), ("prefix_lse", prefix_lse)):
        check(
            x.dtype == torch.float32 and x.shape == (num_heads, tokens),
            f"{name} must be float32 [{num_heads}, {tokens}], got {x.dtype} {list(x.shape)}",
        )
    num_rows = tokens * num_heads
    if not num_rows:
        return
    tile = row_tile(num_rows)
    _merge_kernel[(triton.cdiv(num_rows, tile["BLOCK_ROWS"]),)](
        out,
        out.stride(0),
        out.stride(1),
        lse,
        lse.stride(0),
        lse.stride(1),
        prefix_out,
        prefix_out.stride(0),
        prefix_out.stride(1),
        prefix_lse,
        prefix_lse.stride(0),
        prefix_lse.stride(1),
        None if tables is None else tables.mixing,
        None if tables is None else tables.output_factors,
        num_rows,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        DIM_PAD=triton.next_power_of_2(head_dim),
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        num_stages=1,
        **tile,
    )


@triton.jit(
    do_not_specialize=["lse_stride_head", "num_rows"],
    do_not_specialize_on_alignment=["lse", "sinks"],
)
def _sinks_kernel(
    out,
    out_stride_token,
    out_stride_head,
    lse,
    lse_stride_head,
    lse_stride_token,
    sinks,
    num_rows,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    keep = row < num_rows
    token = (row // NUM_HEADS).to(tl.int64)
    head = (row % NUM_HEADS).to(tl.int64)
    own = tl.load(lse + head * lse_stride_head + token * lse_stride_token, mask=keep, other=0.0)
    share = 1.0 / (1.0 + tl.exp(tl.load(sinks + head) - own))
    dim = tl.arange(0, DIM_PAD)
    target = (out + token * out_stride_token + head * out_stride_head)[:, None] + dim[None, :]
    inside = keep[:, None] & (dim < HEAD_DIM)[None, :]
    given = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, (given * share[:, None]).to(out.dtype.element_ty), mask=inside)


def give_to_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> None:
    """Take from attention, in place, what sinks get of the softmax: out *= 1 / (1 + exp(sink - lse)).

    Args:
        out: bfloat16 or float16 [T, num_heads, d], last dim dense; overwritten.
        lse: float32 [num_heads, T], natural logarithms, without sinks.
        sinks: float32 [num_heads], Attention.sinks.
    """
    tokens, num_heads, head_dim = out.shape
    num_rows = tokens * num_heads
    if not num_rows:
        return
    tile = row_tile(num_rows)
    _sinks_kernel[(triton.cdiv(num_rows, tile["BLOCK_ROWS"]),)](
        out,
        out.stride(0),
        out.stride(1),
        lse,
        lse.stride(0),
        lse.stride(1),
        sinks,
        num_rows,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        DIM_PAD=triton.next_power_of_2(head_dim),
        **tile,
    )
