"""A CPU's prefills that attend to what they stored: the same bits however a prompt is cut into chunks."""

from __future__ import annotations

import pytest
import torch

from vllm_polarquant.attention import Attention
from vllm_polarquant.codec import tables
from vllm_polarquant.format import Slot
from vllm_polarquant.kernels.cpu.prefill import prefill_attention
from vllm_polarquant.kernels.cpu.store import store_kv
from vllm_polarquant.kernels.cpu.vectors import LoopTables
from vllm_polarquant.page import Page

TOKENS, HEADS, KV_HEADS = 700, 4, 2


@pytest.mark.parametrize(
    ("preset", "head_dim", "dtype", "attention"),
    [
        ("polarquant_k4v4", 128, torch.float16, Attention(0.09)),
        ("polarquant_k8v4", 80, torch.bfloat16, Attention(0.11, window=90)),
        ("polarquant_k2v2", 64, torch.bfloat16, Attention(0.12, 300, 5.0, torch.linspace(-1, 2, HEADS))),
    ],
)
def test_chunks_change_no_bit(preset: str, head_dim: int, dtype: torch.dtype, attention: Attention) -> None:
    page = Page(Slot(preset, head_dim), 32)
    loop_tables = LoopTables.of(page.slot, tables(page.slot, dtype, torch.device("cpu")), dtype)
    query, key, value = (torch.randn(TOKENS, n, head_dim).to(dtype) for n in (HEADS, KV_HEADS, KV_HEADS))
    blocks = -(-TOKENS // page.block_size)
    cache = torch.zeros(blocks, KV_HEADS, page.block_size, page.slot.nbytes, dtype=torch.uint8)
    block_table = torch.randperm(blocks).int()
    position = torch.arange(TOKENS)
    slots = block_table[position // page.block_size].long() * page.block_size + position % page.block_size
    store_kv(key, value, cache, slots, page, loop_tables, torch.zeros(TOKENS, dtype=torch.int32))

    def attended(*sizes: int) -> torch.Tensor:
        out, start = torch.full_like(query, torch.nan), 0
        for size in sizes:
            rows = slice(start, start + size)
            prefill_attention(
                query[rows],
                None,
                None,
                cache,
                block_table,
                start,
                page,
                loop_tables,
                attention,
                out[rows],
            )
            start += size
        assert start == TOKENS
        return out

    whole = attended(TOKENS)
    assert whole.isfinite().all()
    for sizes in ((699, 1), (128, 512, 60), (33, 1, 300, 2, 364)):
        assert torch.equal(attended(*sizes), whole)
