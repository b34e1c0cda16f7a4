"""Decode attention: few query tokens a request, straight off the pages."""

from __future__ import annotations

import numpy as np
import torch

from vllm_polarquant.attention import Attention
from vllm_polarquant.kernels.cpu import read
from vllm_polarquant.kernels.cpu.threads import use_torch_threads
from vllm_polarquant.kernels.cpu.vectors import LoopTables, open_cache, regions
from vllm_polarquant.page import Page

NO_WINDOW = 1 << 30
"""Longer than any context."""


def decode_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    page: Page,
    tables: LoopTables,
    attention: Attention,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
) -> None:
    """Causal attention of R requests; scratch memory grows with their queries, not with their contexts.

    Args:
        query: [T, num_heads, d], the requests' tokens one after the other.
        cache: uint8 [B, kv heads, N, slot.nbytes]; the queries' own tokens are already in it.
        block_table: int32 [R, max_blocks]; entries of blocks before all windows of a request are not read.
        seq_lens: int32 [R], tokens of each request, its queries included; 0 for a padded row.
        query_start_loc: int32 [R + 1].
        page: of the cache.
        tables: of the layer.
        attention: of the layer.
        out: like query, written; rows of no request are left alone.
        lse: float32 [num_heads, T], written likewise: the natural logarithm of the sum of exp, sinks
            included, -inf where there is nothing. Outputs of queries that see no key are zeros.
    """
    threads = use_torch_threads()
    requests, heads = len(seq_lens), cache.shape[1]
    tokens = int(query_start_loc[requests])
    query = query[:tokens].float().contiguous()
    splits = max(1, -(-2 * threads // max(1, requests * heads)))
    split_out = torch.empty(splits, *query.shape).numpy()
    split_max, split_sum = torch.empty(2, splits, *query.shape[:2]).numpy()
    sinks = attention.sinks
    if sinks is None:
        sinks = torch.full(query.shape[1:2], -torch.inf)
    merged, merged_lse = torch.empty_like(query), torch.empty(query.shape[1], tokens)
    key_region, value_region = regions(page)
    read.attend(
        query.numpy(), query_start_loc.numpy(), seq_lens.numpy(), np.float32(attention.scale),
        attention.window or NO_WINDOW, np.float32(attention.soft_cap or 0), sinks.numpy(),
        block_table.contiguous().numpy(), heads, *open_cache(cache, page), tables.bases, tables.key.reader,
        key_region, tables.key.centres, tables.value.reader, value_region, split_out, split_max, split_sum,
        merged.numpy(), merged_lse.numpy(),
    )  # fmt: skip
    out[:tokens] = merged
    if lse is not None:
        lse[:, :tokens] = merged_lse
