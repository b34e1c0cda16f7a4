"""The four operations that serving asks of a device: plan a batch, store, decode and prefill.

A layer of vLLM calls them and nothing else of the kernels; so do the benchmarks. Triton (triton/ops.py)
and numba (cpu/ops.py) implement them. Kernels know nothing of vLLM.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from vllm_polarquant.attention import Attention
from vllm_polarquant.codec import Tables
from vllm_polarquant.format import Slot
from vllm_polarquant.page import Page


@dataclass(frozen=True)
class LayerShape:
    """What layers that share workspaces have in common.

    dtype: of queries, keys and values, bfloat16 or float16.
    """

    slot: Slot
    num_heads: int
    num_kv_heads: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Limits:
    """The most that a batch will hold.

    max_reqs: requests, the padding of captured graphs included.
    max_decode_query_len: query tokens of a decode: 1, and one for each speculative token.
    """

    max_reqs: int
    max_decode_query_len: int = 1


@dataclass(frozen=True)
class Batch:
    """One step's requests: decodes, which have few query tokens, and then prefills.

    num_tokens: query tokens of all of them.
    query_start_loc: int32 [R + 1]. query_start_loc_cpu: the same, on the host.
    seq_lens: int32 [R], query tokens included; 0 for a padded row.
    block_table: int32 [R, max_blocks].
    context_lens_cpu: int32 [num_prefills] on the host, the tokens before each prefill's chunk.
    """

    num_decodes: int
    num_decode_tokens: int
    num_prefills: int
    num_tokens: int
    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    context_lens_cpu: torch.Tensor

    @property
    def prefill_rows(self) -> slice:
        """Rows of the prefills' query tokens."""
        return slice(self.num_decode_tokens, self.num_tokens)


class DenseAttention(Protocol):
    """Attention over keys and values that are not paged, as FlashAttention's varlen function computes it."""

    def __call__(
        self,
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
        """Attend within each of R requests, whose last query is aligned with its last key.

        Args:
            query: [T, num_heads, d]; request r's are query_start_loc[r]:query_start_loc[r + 1].
            key, value: [S, kv heads, d]; request r's likewise.
            query_start_loc, key_start_loc: int32 [R + 1].
            max_query_len, max_key_len: of any request.
            scale: softmax scale.
            causal: whether a query sees no key after the one it is aligned with.
            out: like query, to be written, or None.
            left: how many keys before the one it is aligned with a query sees; None for all. If given where
                not causal, no request has more queries than keys.
            soft_cap: as Attention's.

        Returns:
            out and its log-sum-exp, float32 [num_heads, T], natural; +inf or -inf where no key is seen.
        """
        ...


@dataclass
class Plan:
    """A batch and what a device has worked out for all layers; made by `Planner.plan`.

    Not frozen: vLLM's chunked attention hangs an attribute of its own on it.

    segments: int32 [at least num_tokens], by which keys of a batch's tokens are centred: position // SEGMENT.
        A planner's own buffer, so that captured graphs read it.
    """

    batch: Batch
    segments: torch.Tensor


class Planner(ABC):
    """Plans the batches of one group of layers into buffers of its own, which captured graphs read."""

    @abstractmethod
    def plan(self, batch: Batch) -> Plan:
        """Work out what every layer's decode and prefill need; never waits for the device.

        The plan is good until the next one.
        """


class Operations(ABC):
    """The operations on one device, for all layers of one shape, with the workspaces that these share.

    Caches are uint8 [B, kv heads, N, slot.nbytes] with dense blocks (page.dense_block_stride). Tables are
    codec.tables of the slot, or a layer's own, on the device. Queries, keys and values are of the shape's
    dtype, [T, heads, head_dim], last dim dense.
    """

    order: ClassVar[str]
    """Names the order of bytes in a region of codes, for Page.cache_id."""

    max_decode_query_len: ClassVar[int | None] = None
    """The most query tokens that a decode may have; None for any number."""

    shape: LayerShape

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the workspaces."""

    @abstractmethod
    def planner(self, windows: Collection[int | None] = (None,)) -> Planner:
        """A new planner for layers with these windows (Attention.window)."""

    @abstractmethod
    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        tables: Tables,
        segments: torch.Tensor,
    ) -> None:
        """Write keys and values to their slots.

        Args:
            key, value: [T, kv heads, head_dim].
            slot_mapping: int64 [T'], T' <= T, of slots block * N + token; those below 0 are dropped, as are
                the rows of key and value past T'.
            segments: int32, Plan.segments; those past the tables' last are that one. Slots past them, of what
                a batch is padded with, are dropped.
        """

    @abstractmethod
    def decode(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        plan: Plan,
        attention: Attention,
        tables: Tables,
        out: torch.Tensor,
    ) -> None:
        """Attention of the batch's decodes over the pages, their own tokens included.

        query, out: [T, num_heads, head_dim], all of the batch's; rows of decodes are read and written.
        """

    @abstractmethod
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
        """Attention of the batch's prefills over their chunks, as given, and their prefixes, off the pages.

        query, out: [T, num_heads, head_dim], key and value [T, kv heads, head_dim], all of the batch's; rows
        of prefills are read and written. Without key and value the chunks are read off the pages too, where
        they are already stored; `reserve_chunks` has made room.
        """

    @abstractmethod
    def reserve_chunks(self, num_tokens: int) -> None:
        """Make room for a step whose prefills, of so many query tokens at most, are read off the pages."""

    @abstractmethod
    def warm_up(self, page: Page, tables: Tables, attention: Attention, from_pages: bool) -> None:
        """Compile what serving will call for such attention; from_pages: prefills come without key, value."""

    @abstractmethod
    def reset(self) -> None:
        """Make workspaces as new, after their memory has been discarded and given back with any content."""

    @abstractmethod
    def reserve(self, num_tokens: int) -> None:
        """Allocate once, and free, what a step of so many query tokens allocates, for a memory profile."""


def operations(shape: LayerShape, limits: Limits, dense_attention: DenseAttention) -> Operations:
    """The operations on shape.device: Triton's on a GPU, numba's on a CPU.

    Under Triton's interpreter a test makes TritonOperations itself.

    Args:
        shape: of the layers.
        limits: of their batches.
        dense_attention: for prefills on a GPU; torch's own on a CPU.
    """
    if shape.device.type == "cpu":
        from vllm_polarquant.kernels.cpu.ops import CpuOperations

        return CpuOperations(shape)
    from vllm_polarquant.kernels.triton.ops import TritonOperations

    return TritonOperations(shape, limits, dense_attention)
