"""Attention over keys and values that are not paged, for head_dims that FlashAttention 2 and 3 do not take.

FlashAttention's loop (Dao, 2023) in plain Triton: a program has a tile of one head's queries and walks over
the tiles of keys that any of them sees.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm_polarquant.format import DEFAULT_PRESET, Slot
from vllm_polarquant.kernels.triton.attend import LOG2_E, soft_capped
from vllm_polarquant.kernels.triton.constants import check, check_heads, check_int
from vllm_polarquant.kernels.triton.launch import Gpu, config
from vllm_polarquant.kernels.triton.rotate import dot

_LN_2 = tl.constexpr(math.log(2))

_ALL = 1 << 30
"""More keys than any request has, but not so many that sums of positions pass 32 bits."""


# What differs from batch to batch must not compile another kernel in the middle of serving.
@triton.jit(
    do_not_specialize=["lse_stride_head", "left", "right"],
    do_not_specialize_on_alignment=["query_start_loc", "key_start_loc", "lse"],
)
def _dense_kernel(
    query,
    query_stride_token,
    query_stride_head,
    key,
    key_stride_token,
    key_stride_head,
    value,
    value_stride_token,
    value_stride_head,
    query_start_loc,
    key_start_loc,
    out,
    out_stride_token,
    out_stride_head,
    lse,
    lse_stride_head,
    left,
    right,
    scale_log2,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    head = tl.program_id(1)
    request = tl.program_id(2)
    first_query = tl.load(query_start_loc + request).to(tl.int64)
    count = (tl.load(query_start_loc + request + 1) - first_query).to(tl.int32)
    first_key = tl.load(key_start_loc + request).to(tl.int64)
    length = (tl.load(key_start_loc + request + 1) - first_key).to(tl.int32)
    # Where attention is causal the last tiles have the most to do, so they begin.
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_QUERIES
    if begin >= count:
        return
    row = begin + tl.arange(0, BLOCK_QUERIES)
    dim = tl.arange(0, HEAD_DIM)
    kept = row < count
    rows = first_query + row
    queries = query + rows[:, None] * query_stride_token + head * query_stride_head + dim[None, :]
    q = tl.load(queries, mask=kept[:, None], other=0.0)
    # The key that each query is aligned with.
    aligned = row + (length - count)
    low = tl.maximum(begin + (length - count) - left, 0) // BLOCK_KEYS * BLOCK_KEYS
    last = tl.minimum(begin + BLOCK_QUERIES, count) - 1 + (length - count)
    high = tl.minimum(last + right + 1, length)
    kv_head = head // GROUP
    keys = key + kv_head * key_stride_head
    values = value + kv_head * value_stride_head
    # Of a tile, in 32 bits.
    inner = tl.arange(0, BLOCK_KEYS)
    key_offset = inner[:, None] * key_stride_token + dim[None, :]
    value_offset = inner[:, None] * value_stride_token + dim[None, :]
    peak = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    summed = tl.zeros([BLOCK_QUERIES, HEAD_DIM], tl.float32)
    for start in tl.range(low, high, BLOCK_KEYS):
        token = start + inner
        there = (token < length)[:, None]
        k = tl.load(keys + (first_key + start) * key_stride_token + key_offset, mask=there, other=0.0)
        score = dot(q, tl.trans(k)) * scale_log2
        if SOFT_CAP is not None:
            score = soft_capped(score, SOFT_CAP)
        distance = token[None, :] - aligned[:, None]
        seen = (token < length)[None, :] & (distance >= -left) & (distance <= right)
        score = tl.where(seen, score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, axis=1))
        # A row that has seen nothing yet would subtract infinities.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(score - shift[:, None])
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.sum(weight, axis=1)
        v = tl.load(values + (first_key + start) * value_stride_token + value_offset, mask=there, other=0.0)
        summed = summed * decay[:, None] + dot(weight.to(v.dtype), v)
        peak = new_peak
    some = total > 0
    total = tl.where(some, total, 1.0)
    targets = out + rows[:, None] * out_stride_token + head * out_stride_head + dim[None, :]
    tl.store(targets, (summed / total[:, None]).to(out.dtype.element_ty), mask=kept[:, None])
    own_lse = tl.where(some, (peak + tl.log2(total)) * _LN_2, float("-inf"))
    tl.store(lse + head * lse_stride_head + rows, own_lse, mask=kept)


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_start_loc: torch.Tensor,
    max_query_len: int,
    key_start_loc: torch.Tensor,
    max_key_len: int,
    scale: float,
    causal: bool,
    out: torch.Tensor | None = None,
    left: int | None = None,
    soft_cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See kernels.ops.DenseAttention; for bfloat16 and float16, and head_dims that are powers of two.

    A request may have more queries than keys; log-sum-exps of queries that see no key are -inf, and their
    outputs 0.

    Raises:
        ValueError: for other shapes, dtypes or strides.
    """
    tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    check(head_dim & (head_dim - 1) == 0, f"head_dim {head_dim} is not a power of two")
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_heads(name, x, head_dim)
    check(
        key.shape == value.shape and query.dtype == key.dtype == value.dtype,
        f"key and value must be {query.dtype} and of one shape, got {key.dtype} {list(key.shape)} and "
        f"{value.dtype} {list(value.shape)}",
    )
    check(
        num_heads % num_kv_heads == 0,
        f"{num_heads} query heads do not share {num_kv_heads} KV heads evenly",
    )
    num_reqs = query_start_loc.shape[0] - 1
    check_int("query_start_loc", query_start_loc, (-1,), torch.int32)
    check_int("key_start_loc", key_start_loc, (num_reqs + 1,), torch.int32)
    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    check_heads("out", out, head_dim)
    check(
        out.shape == query.shape and out.dtype == query.dtype,
        f"out must be {query.dtype} {list(query.shape)}, got {out.dtype} {list(out.shape)}",
    )
    lse = torch.empty(num_heads, tokens, dtype=torch.float32, device=query.device)
    if not tokens or max_query_len <= 0:
        return out, lse
    launch = config("dense", Slot(DEFAULT_PRESET, head_dim), Gpu.of(query.device))
    block = launch["block_queries"]
    _dense_kernel[(triton.cdiv(max_query_len, block), num_heads, num_reqs)](
        query,
        query.stride(0),
        query.stride(1),
        key,
        key.stride(0),
        key.stride(1),
        value,
        value.stride(0),
        value.stride(1),
        query_start_loc,
        key_start_loc,
        out,
        out.stride(0),
        out.stride(1),
        lse,
        lse.stride(0),
        _ALL if left is None else left,
        0 if causal else _ALL,
        scale * LOG2_E.value,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        SOFT_CAP=soft_cap,
        BLOCK_QUERIES=block,
        BLOCK_KEYS=launch["block_keys"],
        num_warps=launch["num_warps"],
        num_stages=launch["num_stages"],
    )
    return out, lse
