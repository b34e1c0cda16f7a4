"""Our presets as contenders: the operations that a layer of vLLM calls, and nothing beside them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from vllm_polarquant import reference
from vllm_polarquant.codec import tables
from vllm_polarquant.eval.bench.inputs import DTYPE, Inputs
from vllm_polarquant.format import SEGMENT, Slot
from vllm_polarquant.kernels.ops import (
    Batch,
    DenseAttention,
    LayerShape,
    Limits,
    Operations,
    Plan,
    operations,
)
from vllm_polarquant.page import Page, page_of


def dense_torch(
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
    """`DenseAttention` in plain torch, in float32."""
    out = torch.empty_like(query) if out is None else out
    lse = torch.empty(query.shape[1], len(query), dtype=torch.float32, device=query.device)
    group = query.shape[1] // key.shape[1]
    queries, keys = query_start_loc.tolist(), key_start_loc.tolist()
    for r in range(len(queries) - 1):
        mine, theirs = slice(*queries[r : r + 2]), slice(*keys[r : r + 2])
        logits = torch.einsum(
            "qhd,khd->hqk", query[mine].float(), key[theirs].float().repeat_interleave(group, 1)
        )
        logits = logits * scale
        if soft_cap is not None:
            logits = soft_cap * (logits / soft_cap).tanh()
        count, length = logits.shape[1:]
        token = torch.arange(length, device=query.device)
        aligned = torch.arange(length - count, length, device=query.device)[:, None]
        if causal:
            logits = logits.masked_fill(token > aligned, float("-inf"))
        if left is not None:
            logits = logits.masked_fill(token < aligned - left, float("-inf"))
        lse[:, mine] = logits.logsumexp(-1)
        seen = value[theirs].float().repeat_interleave(group, 1)
        out[mine] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), seen).to(out.dtype)
    return out, lse


@cache
def _flash_of(head_dim: int) -> DenseAttention:
    from vllm_polarquant.flash import flash_attention

    return flash_attention(head_dim)


def _flash(query: torch.Tensor, *given: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """vLLM's FlashAttention, which only prefills need vLLM for."""
    return _flash_of(query.shape[-1])(query, *given, **named)


def of_device(shape: LayerShape, limits: Limits) -> Operations:
    """The operations that serve on a GPU; off it, the same kernels under Triton's interpreter if it is on."""
    dense: DenseAttention = dense_torch
    if shape.device.type != "cpu":
        dense = _flash
    elif os.environ.get("TRITON_INTERPRET") == "1":
        from vllm_polarquant.kernels.triton.ops import TritonOperations

        return TritonOperations(shape, limits, dense)
    return operations(shape, limits, dense)


def byte_order(ops: Operations, page: Page) -> reference.Order:
    """Where the operations put the bytes of codes, for the reference."""
    if ops.order == "rows":
        return reference.rows(page)
    from vllm_polarquant.kernels.triton.page_io import lane_order

    return lane_order(page)


Maker = Callable[[LayerShape, Limits], Operations]


def batch_of(inputs: Inputs) -> Batch:
    """One step of the case: its decodes, or its prefills."""
    case = inputs.case
    decodes = case.batch if case.op == "decode" else 0
    prefills = case.batch if case.op == "prefix" else 0
    return Batch(
        num_decodes=decodes,
        num_decode_tokens=decodes * case.tokens,
        num_prefills=prefills,
        num_tokens=len(inputs.query),
        query_start_loc=inputs.query_start_loc,
        query_start_loc_cpu=inputs.query_start_loc.cpu(),
        seq_lens=inputs.seq_lens,
        block_table=inputs.block_table,
        context_lens_cpu=torch.full((prefills,), case.context, dtype=torch.int32),
    )


class Polar:
    """One of our presets.

    Args:
        preset: its name.
        make: the operations of a layer's shape.
        layer: what `open` opens.
    """

    def __init__(self, preset: str, make: Maker = of_device, layer: type[PolarLayer] | None = None) -> None:
        self.name, self.make, self.layer = preset, make, layer or PolarLayer

    def slot_bytes(self, head_dim: int) -> int:
        return Slot(self.name, head_dim).nbytes

    def open(self, inputs: Inputs, caches: Sequence[torch.Tensor]) -> list[PolarLayer]:
        case = inputs.case
        slot = Slot(self.name, case.head_dim)
        shape = LayerShape(slot, case.heads, case.kv_heads, DTYPE, inputs.device)
        ops = self.make(shape, Limits(case.batch, case.tokens if case.op == "decode" else 1))
        # Planned once a step for all layers, so outside of the timed calls.
        plan = ops.planner((case.window,)).plan(batch_of(inputs)) if case.op != "store" else None
        return [self.layer(inputs, ops, plan, cache.transpose(1, 2)) for cache in caches]


class PolarLayer:
    """One layer's pages, uint8 [B, kv heads, N, slot.nbytes]."""

    def __init__(self, inputs: Inputs, ops: Operations, plan: Plan | None, cache: torch.Tensor) -> None:
        self.inputs, self.ops, self.plan, self.cache = inputs, ops, plan, cache
        self.slot = ops.shape.slot
        # As many centres as serving has; which they are makes no difference to time.
        longest = max(inputs.case.seq_lens)
        heads, segments = inputs.case.kv_heads, -(-longest // SEGMENT)
        self.tables = tables(self.slot, DTYPE, cache.device, heads, segments)
        count = max(len(inputs.slots), len(inputs.pattern_key))
        self.segments = torch.zeros(count, dtype=torch.int32, device=cache.device)
        self.out = torch.empty_like(inputs.query)

    def store(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        self.ops.store(key, value, self.cache, slots, self.tables, self.segments)

    def attend(self) -> torch.Tensor:
        given, plan = self.inputs, self.plan
        assert plan is not None
        if given.case.op == "decode":
            self.ops.decode(given.query, self.cache, plan, given.attention, self.tables, self.out)
        else:
            self.ops.prefill(
                given.query, given.key, given.value, self.cache, plan, given.attention, self.tables, self.out
            )
        return self.out

    def reference(self) -> torch.Tensor:
        """The first request's attention on the same pages, all its tokens read off them, float64."""
        given, page = self.inputs, page_of(self.cache, self.slot)
        tokens = given.case.tokens
        return reference.attention(
            given.query[:tokens],
            self.cache,
            given.block_table[:1],
            given.seq_lens[:1],
            given.query_start_loc[:2],
            page,
            byte_order(self.ops, page),
            given.attention,
        ).out
