"""Prefill attention: a chunk over itself, as given, and over its prefix, off the pages."""

from __future__ import annotations

import torch

from vllm_polarquant.attention import Attention
from vllm_polarquant.kernels.cpu.read import gather
from vllm_polarquant.kernels.cpu.threads import use_torch_threads
from vllm_polarquant.kernels.cpu.vectors import LoopTables, open_cache, regions
from vllm_polarquant.page import Page

SEGMENT_TOKENS = 4096
"""Tokens of a prefix that are decoded at a time."""


def prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    context_len: int,
    page: Page,
    tables: LoopTables,
    attention: Attention,
    out: torch.Tensor,
    segment_tokens: int = SEGMENT_TOKENS,
) -> None:
    """One request's chunk: causal among its own fresh tokens, and all of them on the quantised prefix.

    The prefix's segments are merged by log-sum-exp as they come, and rotated back once.

    Args:
        query, key, value: the chunk's, [T, num_heads or kv heads, d].
        cache: uint8 [B, kv heads, N, slot.nbytes].
        block_table: int32 [max_blocks], this request's row.
        context_len: tokens of the prefix.
        page: of the cache.
        tables: of the layer.
        attention: of the layer.
        out: like query, written.
        segment_tokens: tokens of the prefix to decode at a time.

    Raises:
        UnsupportedAttention: for all but a scale.
    """
    attention.require_plain()
    use_torch_threads()
    fresh, fresh_lse = _dense(query, key, value, attention.scale, causal=True)
    if not context_len:
        out.copy_(fresh)
        return
    heads = cache.shape[1]
    rotated = tables.rotate_queries(query, heads).to(query.dtype)
    (memory, blocks), row = open_cache(cache, page), block_table.numpy()
    merged: tuple[torch.Tensor, torch.Tensor] | None = None
    for start in range(0, context_len, segment_tokens):
        n = min(segment_tokens, context_len - start)
        segment = torch.empty(2, n, heads, page.slot.head_dim)
        for into, side, region in zip(segment, (tables.key, tables.value), regions(page), strict=True):
            gather(row, start, memory, blocks, side.reader, region, side.centres, into.numpy())
        part = _dense(rotated, segment[0], segment[1], attention.scale, causal=False)
        merged = part if merged is None else _merge(*merged, *part)
    assert merged is not None
    prefix, prefix_lse = merged
    out.copy_(_merge(fresh, fresh_lse, tables.restore_outputs(prefix.float()), prefix_lse)[0])


def _dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Torch's CPU flash attention of one request, in query's dtype.

    query [T, Hq, d], key and value [n, H, d] -> out [T, Hq, d], log-sum-exp float32 [T, Hq].
    """
    group = query.shape[1] // key.shape[1]
    q, k, v = (
        x.to(query.dtype).repeat_interleave(repeat, 1).transpose(0, 1)[None]
        for x, repeat in ((query, 1), (key, group), (value, group))
    )
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out[0].transpose(0, 1), lse[0].T


def _merge(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two sets of keys from attention over each: outs [T, Hq, d], log-sum-exps [T, Hq]."""
    total = torch.logaddexp(lse, other_lse)
    weight, other_weight = (lse - total).exp()[..., None], (other_lse - total).exp()[..., None]
    return out.float() * weight + other.float() * other_weight, total
