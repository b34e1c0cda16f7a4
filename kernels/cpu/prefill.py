"""Prefill attention: a chunk over itself, as given or off the pages, and over its prefix, off the pages."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_polarquant.attention import Attention
from vllm_polarquant.kernels.cpu.attend import NO_WINDOW
from vllm_polarquant.kernels.cpu.read import gather
from vllm_polarquant.kernels.cpu.threads import use_torch_threads
from vllm_polarquant.kernels.cpu.vectors import LoopTables, open_cache, regions
from vllm_polarquant.page import Page

SEGMENT_TOKENS = 4096
"""Tokens of a prefix that are decoded at a time."""
_QUERIES = 128
"""Queries that attend at a time where a window or a soft cap keeps torch from attending all at once."""
_STEP = 512
"""Stored tokens that _QUERIES queries attend to at a time where a chunk is read off the pages."""
_HIDDEN = -1e30
"""What is added to a hidden key's logit; finite, as a query may see no key of a step."""


def prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    context_len: int,
    page: Page,
    tables: LoopTables,
    attention: Attention,
    out: torch.Tensor,
    segment_tokens: int = SEGMENT_TOKENS,
) -> None:
    """One request's chunk: causal among its own tokens, and on the part of the prefix within its windows.

    A chunk that is read off the pages gives the same bits however the prompt was cut into chunks.

    Args:
        query: the chunk's, [T, num_heads, d].
        key, value: the chunk's, [T, kv heads, d], or None where they are to be read off the pages.
        cache: uint8 [B, kv heads, N, slot.nbytes].
        block_table: int32 [max_blocks], this request's row; blocks before all windows are not read.
        context_len: tokens of the prefix.
        page: of the cache.
        tables: of the layer.
        attention: of the layer.
        out: like query, written.
        segment_tokens: tokens of the prefix to decode at a time.
    """
    use_torch_threads()
    heads, window = cache.shape[1], attention.window or NO_WINDOW
    (memory, blocks), row = open_cache(cache, page), block_table.numpy()

    def read(start: int, end: int, into: torch.Tensor) -> None:
        """Decode positions [start, end) into keys and values [2, end - start, H, d]."""
        for rows, side, region in zip(into, (tables.key, tables.value), regions(page), strict=True):
            gather(row, start, memory, blocks, side.reader, region, side.centres, rows.numpy())

    if key is None or value is None:
        _attend_to_stored(query, read, context_len, heads, tables, attention, out)
        return
    rotated = query
    if context_len:
        rotated = tables.rotate_queries(query, heads).to(query.dtype)

    def on_pages(queries: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first queries on stored tokens [start, end), in the model's basis; see _attend."""
        stored = torch.empty(2, end - start, heads, page.slot.head_dim)
        read(start, end, stored)
        part, lse = _attend(rotated[:queries], stored[0], stored[1], context_len - start, attention)
        return tables.restore_outputs(part.float()), lse

    tokens = len(query)
    attended, lse = _attend(query, key, value, 0, attention)
    first = max(0, context_len - window + 1)
    # Backwards, so that whatever queries see of a segment, they have seen something before.
    for end in range(context_len, first, -segment_tokens):
        queries = min(tokens, end - 1 - context_len + window)
        part = on_pages(queries, max(first, end - segment_tokens), end)
        merged, lse[:queries] = _merge(attended[:queries], lse[:queries], *part)
        attended = torch.cat([merged, attended[queries:].float()])
    out.copy_(_less_sinks(attended, lse, attention))


def _attend_to_stored(
    query: torch.Tensor,
    read: Callable[[int, int, torch.Tensor], None],
    context_len: int,
    heads: int,
    tables: LoopTables,
    attention: Attention,
    out: torch.Tensor,
) -> None:
    """A chunk's attention where all of its keys and values are on the pages.

    Products of matrices are rounded by their sizes, and codes carry a rounding error on as an error of their
    own. So all sizes are fixed: _QUERIES queries on _STEP tokens from multiples of it.
    """
    window = attention.window or NO_WINDOW
    blocks = torch.nn.functional.pad(query, (0, 0, 0, 0, 0, -len(query) % _QUERIES)).split(_QUERIES)
    rotated = [tables.rotate_queries(block, heads).to(query.dtype) for block in blocks]
    outs = [torch.zeros(block.shape) for block in blocks]
    lses = [torch.full(block.shape[:2], -torch.inf) for block in blocks]
    first, total = max(0, context_len - window + 1), context_len + len(query)
    stored = torch.zeros(2, _STEP, heads, query.shape[-1])
    for start in range(first // _STEP * _STEP, total, _STEP):
        begin, end = max(start, first), min(start + _STEP, total)
        read(begin, end, stored[:, begin - start : end - start])
        token = torch.arange(start, start + _STEP)
        for i, block in enumerate(rotated):
            position = context_len + i * _QUERIES + torch.arange(_QUERIES)[:, None]
            if position[-1] < start or position[0] - window >= token[-1]:
                continue
            mask = torch.zeros(_QUERIES, _STEP)
            mask.masked_fill_((token > position) | (token <= position - window), _HIDDEN)
            if attention.soft_cap is None:
                part = _flash(block, stored[0], stored[1], attention.scale, mask=mask)
            else:
                part = _capped(block, stored[0], stored[1], attention.scale, attention.soft_cap, mask)
            outs[i], lses[i] = _merge(outs[i], lses[i], *part)
    for rows, attended, lse in zip(out.split(_QUERIES), outs, lses, strict=True):
        attended = _less_sinks(tables.restore_outputs(attended), lse, attention)
        rows.copy_(attended[: len(rows)])


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offset: int, attention: Attention
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention without sinks of queries of which each sees a key.

    Query [T, Hq, d] number t sees keys of [n, H, d] up to number t + offset, or the last `window` of those.
    out [T, Hq, d], log-sum-exp float32 [T, Hq].
    """
    tokens, length, window = len(query), len(key), attention.window or NO_WINDOW
    if attention.soft_cap is None and tokens + offset <= window:
        # In torch's causal attention the first query is aligned with the first key.
        return _flash(query, key, value, attention.scale, causal=offset == 0)
    outs, lses = [], []
    for begin in range(0, tokens, _QUERIES):
        end = min(begin + _QUERIES, tokens)
        near = slice(max(0, begin + offset - window + 1), min(end + offset, length))
        position = torch.arange(begin, end)[:, None] + offset
        token = torch.arange(near.start, near.stop)
        hidden = (token > position) | (token <= position - window)
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        x = query[begin:end], key[near], value[near]
        if attention.soft_cap is None:
            part = _flash(*x, attention.scale, mask=mask)
        else:
            part = _capped(*x, attention.scale, attention.soft_cap, mask)
        outs.append(part[0])
        lses.append(part[1])
    return torch.cat(outs), torch.cat(lses)


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Torch's CPU flash attention of one request, in query's dtype.

    query [T, Hq, d], key and value [n, H, d], mask [T, n], added to logits -> out [T, Hq, d], log-sum-exp
    float32 [T, Hq].
    """
    group = query.shape[1] // key.shape[1]
    q, k, v = (
        x.to(query.dtype).repeat_interleave(repeat, 1).transpose(0, 1)[None]
        for x, repeat in ((query, 1), (key, group), (value, group))
    )
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )
    return out[0].transpose(0, 1), lse[0].T


def _capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    soft_cap: float,
    mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As _flash, with soft-capped logits, in float32: torch has no such operator."""
    heads = key.shape[1]
    # [kv heads, queries of the group, d]
    q = query.float().unflatten(1, (heads, -1)).permute(1, 2, 0, 3)
    logits = (q * (scale / soft_cap)).flatten(1, 2) @ key.float().permute(1, 2, 0)
    logits = logits.tanh_().mul_(soft_cap).unflatten(1, q.shape[1:3]).add_(mask)
    top = logits.amax(-1, keepdim=True)
    weights = logits.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    out = (weights.flatten(1, 2) @ value.float().transpose(0, 1)).view(q.shape) / total
    lse = (top + total.log())[..., 0]
    return out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2)


def _less_sinks(attended: torch.Tensor, lse: torch.Tensor, attention: Attention) -> torch.Tensor:
    """Attention [T, Hq, d] without what sinks get of the softmax; lse [T, Hq], without them."""
    if attention.sinks is None:
        return attended
    return attended * torch.sigmoid(lse - attention.sinks)[..., None]


def _merge(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two sets of keys from attention over each: outs [T, Hq, d], log-sum-exps [T, Hq]."""
    total = torch.logaddexp(lse, other_lse)
    weight, other_weight = (lse - total).exp()[..., None], (other_lse - total).exp()[..., None]
    return out.float() * weight + other.float() * other_weight, total
