"""The operations on a CPU, one request at a time where they prefill."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

import torch

from vllm_polarquant.attention import Attention
from vllm_polarquant.codec import Tables
from vllm_polarquant.format import SEGMENT
from vllm_polarquant.kernels.cpu.attend import decode_attention
from vllm_polarquant.kernels.cpu.prefill import prefill_attention
from vllm_polarquant.kernels.cpu.store import store_kv
from vllm_polarquant.kernels.cpu.vectors import LoopTables
from vllm_polarquant.kernels.ops import Batch, LayerShape, Operations, Plan, Planner
from vllm_polarquant.page import Page, page_of


class CpuPlanner(Planner):
    """Works out positions; nothing else needs planning where the host computes."""

    def plan(self, batch: Batch) -> Plan:
        ends = batch.query_start_loc_cpu[1:]
        token = torch.arange(batch.num_tokens, dtype=torch.int32)
        request = torch.searchsorted(ends, token, right=True).clamp_max_(len(ends) - 1)
        position = (batch.seq_lens - ends)[request] + token
        # Padded rows have no positions.
        return Plan(batch, position.clamp_min_(0) // SEGMENT)


class CpuOperations(Operations):
    """Operations.

    Args:
        shape: of the layers.
    """

    order: ClassVar[str] = "rows"

    def __init__(self, shape: LayerShape) -> None:
        self.shape = shape
        # By identity, and beside the tables themselves, whose identity nothing else can take meanwhile.
        self._loop_tables: dict[int, LoopTables] = {}

    @property
    def nbytes(self) -> int:
        return 0

    def planner(self, windows: Collection[int | None] = (None,)) -> CpuPlanner:
        return CpuPlanner()

    def _of(self, tables: Tables) -> LoopTables:
        found = self._loop_tables.get(id(tables))
        if found is None:
            found = self._loop_tables[id(tables)] = LoopTables.of(self.shape.slot, tables, self.shape.dtype)
        return found

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        tables: Tables,
        segments: torch.Tensor,
    ) -> None:
        page = page_of(cache, self.shape.slot)
        store_kv(key, value, cache, slot_mapping, page, self._of(tables), segments)

    def decode(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        plan: Plan,
        attention: Attention,
        tables: Tables,
        out: torch.Tensor,
    ) -> None:
        batch = plan.batch
        requests = batch.num_decodes
        decode_attention(
            query,
            cache,
            batch.block_table[:requests],
            batch.seq_lens[:requests],
            batch.query_start_loc[: requests + 1],
            page_of(cache, self.shape.slot),
            self._of(tables),
            attention,
            out,
        )

    def prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        cache: torch.Tensor,
        plan: Plan,
        attention: Attention,
        tables: Tables,
        out: torch.Tensor,
    ) -> None:
        batch = plan.batch
        page, loop_tables = page_of(cache, self.shape.slot), self._of(tables)
        starts = batch.query_start_loc_cpu[batch.num_decodes :].tolist()
        for i, context_len in enumerate(batch.context_lens_cpu.tolist()):
            rows = slice(starts[i], starts[i + 1])
            if rows.start < rows.stop:
                prefill_attention(
                    query[rows],
                    None if key is None else key[rows],
                    None if value is None else value[rows],
                    cache,
                    batch.block_table[batch.num_decodes + i],
                    context_len,
                    page,
                    loop_tables,
                    attention,
                    out[rows],
                )

    def reserve_chunks(self, num_tokens: int) -> None:
        """Nothing: what is read off the pages is made anew for each call."""

    def warm_up(self, page: Page, tables: Tables, attention: Attention, from_pages: bool) -> None:
        shape = self.shape
        # A decode of one token, and a prefill of two on a prefix of one.
        starts = torch.tensor([0, 1, 3], dtype=torch.int32)
        batch = Batch(
            num_decodes=1,
            num_decode_tokens=1,
            num_prefills=1,
            num_tokens=3,
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor([1, 3], dtype=torch.int32),
            block_table=torch.tensor([[0], [1]], dtype=torch.int32),
            context_lens_cpu=torch.tensor([1], dtype=torch.int32),
        )
        cache = torch.zeros(2, shape.num_kv_heads, page.block_size, page.slot.nbytes, dtype=torch.uint8)
        x = torch.ones(3, shape.num_kv_heads, page.slot.head_dim, dtype=shape.dtype)
        query = torch.ones(3, shape.num_heads, page.slot.head_dim, dtype=shape.dtype)
        out = torch.empty_like(query)
        plan = self.planner().plan(batch)
        self.store(x, x, cache, torch.arange(3), tables, plan.segments)
        self.decode(query, cache, plan, attention, tables, out)
        chunk = None if from_pages else x
        self.prefill(query, chunk, chunk, cache, plan, attention, tables, out)

    def reset(self) -> None:
        """Nothing: workspaces are made anew for each call."""

    def reserve(self, num_tokens: int) -> None:
        """Nothing: vLLM does not profile a CPU's memory."""
