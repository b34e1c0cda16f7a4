"""The four operations on a GPU: Triton kernels for the pages, dense attention passed in for the rest.

Prefills of few tokens after a prefix are read off the pages like decodes; others go through prefill.py.
All memory is allocated beforehand, so that an engine's memory profile counts it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_polarquant.attention import Attention
from vllm_polarquant.codec import Tables
from vllm_polarquant.kernels.ops import Batch, DenseAttention, LayerShape, Limits, Operations, Plan, Planner
from vllm_polarquant.kernels.triton.decode import (
    MAX_QUERY_LEN,
    DecodeWorkspace,
    decode_attention,
    make_schedule,
)
from vllm_polarquant.kernels.triton.gather import gather_prefix
from vllm_polarquant.kernels.triton.launch import Gpu
from vllm_polarquant.kernels.triton.prefill import (
    PrefixWorkspace,
    give_to_sinks,
    merge_prefix,
    prefill_attention,
)
from vllm_polarquant.kernels.triton.prefix import (
    PrefixPlan,
    plan_prefixes,
    reads_like_decodes,
    workspace_tokens,
)
from vllm_polarquant.kernels.triton.rotate import MANY_ROWS, is_hadamard, rotate
from vllm_polarquant.kernels.triton.schedule import Schedule, plan
from vllm_polarquant.kernels.triton.segments import fill_segments
from vllm_polarquant.kernels.triton.store import MANY_VECTORS, store_kv
from vllm_polarquant.page import Page, page_of

MAX_DECODE_QUERY_LEN = 16
"""Query tokens of a decode at most: one, and those that were drafted."""

SHORT_QUERY_LENS = (MAX_DECODE_QUERY_LEN, 32, MAX_QUERY_LEN)
"""Chunks of up to so many tokens after a prefix may be read like decodes, with a schedule for each.

A draft model's chunks are among them, with a token more than a decode has: how long its prefixes are, only
the GPU may know, which unpacking would have to ask.
"""

MAX_LONGER_TOKENS = 512
"""Tokens of all prefills at most where one has more than 32: a batch of many is faster unpacked."""


@dataclass(frozen=True)
class ShortPrefills:
    """Prefills that are read like decodes: query_start_loc int32 [prefills + 1], from 0, and a schedule.

    max_query_len: of the schedule.
    """

    query_start_loc: torch.Tensor
    schedule: Schedule
    max_query_len: int


@dataclass
class TritonPlan(Plan):
    """For each window: the schedule of the decodes; how prefills' prefixes are read, nothing without any."""

    schedules: Mapping[int | None, Schedule]
    prefills: Mapping[int | None, ShortPrefills | PrefixPlan]


class TritonPlanner(Planner):
    """Schedules of decodes, and of prefills that are read like them, computed on the GPU, one a window."""

    def __init__(self, ops: TritonOperations, windows: Collection[int | None]) -> None:
        self.ops = ops
        limits = ops.limits
        # Captured graphs read these; steps with prefills, which are not captured, may need more.
        self.segments = torch.zeros(
            limits.max_reqs * limits.max_decode_query_len, dtype=torch.int32, device=ops.shape.device
        )
        self.decodes = {window: ops.schedule(limits.max_decode_query_len) for window in windows}
        self.short = {
            length: {window: ops.schedule(length) for window in windows} for length in SHORT_QUERY_LENS
        }

    def plan(self, batch: Batch) -> TritonPlan:
        decodes = batch.num_decodes
        if decodes:
            for window, schedule in self.decodes.items():
                plan(batch.seq_lens[:decodes], batch.query_start_loc[: decodes + 1], schedule, window)
        segments = self.segments
        if batch.num_tokens > len(segments):
            segments = segments.new_empty(batch.num_tokens)
        reqs = decodes + batch.num_prefills
        if reqs:
            fill_segments(batch.seq_lens[:reqs], batch.query_start_loc[: reqs + 1], segments)
        prefills = self._prefills(batch) if batch.num_prefills else {}
        return TritonPlan(batch, segments, self.decodes, prefills)

    def _prefills(self, batch: Batch) -> dict[int | None, ShortPrefills | PrefixPlan]:
        first, last = batch.num_decodes, batch.num_decodes + batch.num_prefills
        starts = batch.query_start_loc_cpu.numpy()[first : last + 1]
        contexts = batch.context_lens_cpu.numpy()
        ops = self.ops
        for length, schedules in self.short.items():
            most = MAX_LONGER_TOKENS if length == MAX_QUERY_LEN else ops.max_short_tokens
            if reads_like_decodes(starts, contexts, length, most):
                relative = batch.query_start_loc[first : last + 1] - batch.num_decode_tokens
                for window, schedule in schedules.items():
                    plan(batch.seq_lens[first:last], relative, schedule, window)
                return {
                    window: ShortPrefills(relative, schedule, length)
                    for window, schedule in schedules.items()
                }
        capacity = ops.prefix_workspace.tokens
        return {
            window: plan_prefixes(starts, contexts, capacity, ops.shape.device, window)
            for window in self.decodes
        }


class TritonOperations(Operations):
    """The operations on CUDA, or under Triton's interpreter on a CPU.

    Args:
        shape: of the layers.
        limits: of their batches.
        dense_attention: for prefills.
        gpu: to divide work for, by default the device's.
        prefix_tokens: tokens of a prefix that are unpacked at once, by default as many as 32 MiB hold.

    Raises:
        ValueError: if decodes may have more than MAX_DECODE_QUERY_LEN query tokens.
    """

    order: ClassVar[str] = "lanes"
    max_decode_query_len: ClassVar[int | None] = MAX_DECODE_QUERY_LEN

    def __init__(
        self,
        shape: LayerShape,
        limits: Limits,
        dense_attention: DenseAttention,
        gpu: Gpu | None = None,
        prefix_tokens: int | None = None,
    ) -> None:
        if limits.max_decode_query_len > MAX_DECODE_QUERY_LEN:
            raise ValueError(
                f"a decode has at most {MAX_DECODE_QUERY_LEN} query tokens, not {limits.max_decode_query_len}"
            )
        head_dim = shape.slot.head_dim
        self.shape, self.limits, self.dense_attention = shape, limits, dense_attention
        self.gpu = gpu or Gpu.of(shape.device)
        # Where the kernel does not rotate queries itself, they take memory.
        self.max_short_tokens = 4096 if is_hadamard(head_dim) else 1024
        self.decode_workspace = self._workspace(
            limits.max_reqs * limits.max_decode_query_len, limits.max_decode_query_len
        )
        self.short_workspace = self._workspace(self.max_short_tokens, MAX_QUERY_LEN)
        self.prefix_workspace = PrefixWorkspace.allocate(
            prefix_tokens or workspace_tokens(shape.num_kv_heads, head_dim, shape.dtype),
            shape.num_kv_heads,
            head_dim,
            shape.dtype,
            shape.device,
        )

    def _workspace(self, max_tokens: int, max_query_len: int) -> DecodeWorkspace:
        shape = self.shape
        return DecodeWorkspace.allocate(
            slot=shape.slot,
            max_tokens=max_tokens,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            dtype=shape.dtype,
            device=shape.device,
            max_reqs=self.limits.max_reqs,
            max_query_len=max_query_len,
            gpu=self.gpu,
        )

    def schedule(self, max_query_len: int) -> Schedule:
        """A schedule for requests of up to max_query_len query tokens, still to be planned."""
        shape = self.shape
        return make_schedule(
            shape.slot,
            shape.num_heads,
            shape.num_kv_heads,
            self.limits.max_reqs,
            shape.device,
            max_query_len,
            self.gpu,
        )

    @property
    def nbytes(self) -> int:
        return self.decode_workspace.nbytes + self.short_workspace.nbytes + self.prefix_workspace.nbytes

    def planner(self, windows: Collection[int | None] = (None,)) -> TritonPlanner:
        return TritonPlanner(self, windows)

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        tables: Tables,
        segments: torch.Tensor,
    ) -> None:
        # What a batch is padded with, for other ranks or a captured graph, has slots but no plan.
        slots = slot_mapping[: len(segments)]
        store_kv(key, value, cache, slots, page_of(cache, self.shape.slot), tables, segments)

    def decode(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        plan: Plan,
        attention: Attention,
        tables: Tables,
        out: torch.Tensor,
    ) -> None:
        assert isinstance(plan, TritonPlan)
        batch = plan.batch
        requests, tokens = batch.num_decodes, batch.num_decode_tokens
        decode_attention(
            query[:tokens],
            cache,
            batch.block_table[:requests],
            batch.seq_lens[:requests],
            batch.query_start_loc[: requests + 1],
            self.limits.max_decode_query_len,
            page_of(cache, self.shape.slot),
            attention,
            tables,
            out[:tokens],
            self.decode_workspace,
            plan.schedules[attention.window],
            gpu=self.gpu,
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
        assert isinstance(plan, TritonPlan)
        prefills = plan.prefills[attention.window]
        batch, rows = plan.batch, plan.batch.prefill_rows
        requests = slice(batch.num_decodes, batch.num_decodes + batch.num_prefills)
        page = page_of(cache, self.shape.slot)
        if isinstance(prefills, ShortPrefills):
            decode_attention(
                query[rows],
                cache,
                batch.block_table[requests],
                batch.seq_lens[requests],
                prefills.query_start_loc,
                prefills.max_query_len,
                page,
                attention,
                tables,
                out[rows],
                self.short_workspace,
                prefills.schedule,
                gpu=self.gpu,
            )
            return
        assert isinstance(prefills, PrefixPlan)
        prefill_attention(
            query[rows],
            None if key is None else key[rows],
            None if value is None else value[rows],
            cache,
            batch.block_table[requests],
            prefills,
            page,
            attention,
            tables,
            out[rows],
            self.prefix_workspace,
            self.dense_attention,
        )

    def reset(self) -> None:
        # Everything else is written before it is read.
        for workspace in (self.decode_workspace, self.short_workspace):
            workspace.arrived.zero_()

    def reserve(self, num_tokens: int) -> None:
        # A prefill holds at most: the rotated queries and one prefix output, with two log-sum-exps.
        shape = self.shape
        sizes = [(shape.slot.head_dim, shape.dtype)] * 2 + [(1, torch.float32)] * 2
        scratch = [
            torch.empty(num_tokens, shape.num_heads, width, dtype=dtype, device=shape.device)
            for width, dtype in sizes
        ]
        del scratch

    def reserve_chunks(self, num_tokens: int) -> None:
        shape, workspace = self.shape, self.prefix_workspace
        if num_tokens > workspace.tokens:
            self.prefix_workspace = PrefixWorkspace.allocate(
                num_tokens, shape.num_kv_heads, shape.slot.head_dim, shape.dtype, shape.device
            )

    def warm_up(self, page: Page, tables: Tables, attention: Attention, from_pages: bool) -> None:
        shape, limits = self.shape, self.limits
        device, head_dim = shape.device, shape.slot.head_dim

        def ones(tokens: int, heads: int) -> torch.Tensor:
            return torch.ones(tokens, heads, head_dim, dtype=shape.dtype, device=device)

        def ints(*numbers: int) -> torch.Tensor:
            return torch.tensor(numbers, dtype=torch.int32, device=device)

        pages = torch.zeros(
            2, shape.num_kv_heads, page.block_size, page.slot.nbytes, dtype=torch.uint8, device=device
        )
        # Storing, rotating and merging have one variant for few and one for many rows.
        few = max(MAX_DECODE_QUERY_LEN, page.block_size)
        many = max(MANY_VECTORS // shape.num_kv_heads, MANY_ROWS // shape.num_heads) + 1
        for tokens in (few, many):
            x, query = ones(tokens, shape.num_kv_heads), ones(tokens, shape.num_heads)
            out = torch.empty_like(query)
            lse = torch.zeros(shape.num_heads, tokens, device=device, dtype=torch.float32)
            slots = torch.full((tokens,), -1, dtype=torch.int64, device=device)
            slots[: page.block_size] = torch.arange(page.block_size, device=device)
            segments = torch.zeros(tokens, dtype=torch.int32, device=device)
            store_kv(x, x, pages, slots, page, tables, segments)
            rotate(query, out, tables.mixing, tables.query_factors)
            merge_prefix(query, lse, out, lse.clone(), tables)
            if from_pages:
                merge_prefix(query, lse, out, lse.clone(), None)
                rotate(out, out, tables.mixing, tables.output_factors, inverse=True)
            if attention.sinks is not None:
                give_to_sinks(out, lse, attention.sinks)
        table = torch.zeros(1, 16, dtype=torch.int32, device=device)
        for length, workspace in (
            (limits.max_decode_query_len, self.decode_workspace),
            *((length, self.short_workspace) for length in SHORT_QUERY_LENS),
        ):
            query, starts = ones(length, shape.num_heads), ints(0, length)
            schedule = self.schedule(length)
            plan(starts[1:], starts, schedule, attention.window)
            decode_attention(
                query,
                pages,
                table,
                starts[1:],
                starts,
                length,
                page,
                attention,
                tables,
                torch.empty_like(query),
                workspace,
                schedule,
                gpu=self.gpu,
            )
        gather_prefix(
            pages,
            table,
            ints(0),
            ints(0, page.block_size),
            page.block_size,
            page,
            tables,
            self.prefix_workspace.key,
            self.prefix_workspace.value,
        )
        # Not all of dense attention comes compiled.
        x, query, starts = ones(few, shape.num_kv_heads), ones(few, shape.num_heads), ints(0, few)
        left = None if attention.window is None else attention.window - 1
        for causal in (True, False):
            self.dense_attention(
                query, x, x, starts, few, starts, few, attention.scale, causal, None, left, attention.soft_cap
            )
