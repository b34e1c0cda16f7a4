"""The backend on CUDA: Triton kernels for the pages, FlashAttention for whatever is dense.

A prefill attends to its own chunk with FlashAttention on the fresh keys and values, and to its prefix in
segments: `gather_prefix` unpacks as many tokens as the workspace holds, of as many requests as have any,
FlashAttention runs on them with rotated queries, and `merge_prefix` turns the result back and merges it.
All memory is allocated when the model is loaded, so that vLLM's profile counts it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    CommonAttentionMetadata,
    max_decode_query_len,
)
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

from vllm_polarquant.backend import PolarMetadata, PolarMetadataBuilder, PolarQuantImpl
from vllm_polarquant.format import PolarFormat
from vllm_polarquant.kernels.decode import MAX_QUERY_LEN, DecodeWorkspace, decode_attention
from vllm_polarquant.kernels.prefill import gather_prefix, merge_prefix
from vllm_polarquant.kernels.rotate import rotate
from vllm_polarquant.kernels.store import store_kv

PREFIX_WORKSPACE_BYTES = 32 << 20


@dataclass(frozen=True)
class Segment:
    """Prefix tokens that fit the workspace at once, of requests first .. last - 1 of the prefills.

    rows: their query tokens in the batch. query_start_loc and key_start_loc: int32 [last - first + 1],
    from 0. start: int32 [last - first], the first prefix position of each request in this segment.
    """

    first: int
    last: int
    rows: slice
    query_start_loc: torch.Tensor
    key_start_loc: torch.Tensor
    start: torch.Tensor
    tokens: int
    max_query_len: int
    max_key_len: int


@dataclass(frozen=True)
class PrefillPlan:
    """query_start_loc int32 [prefills + 1], from 0, and the prefix in segments."""

    query_start_loc: torch.Tensor
    max_query_len: int
    segments: tuple[Segment, ...]


def plan_prefix(
    context_lens: np.ndarray, query_start_loc: np.ndarray, capacity: int
) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
    """Cut the prefixes, laid end to end, into segments of `capacity` tokens.

    Returns (first, last, start, lens) a segment: positions start .. start + lens of requests
    first .. last - 1, all of which have at least one token in it.
    """
    ends = np.cumsum(context_lens)
    begins = ends - context_lens
    segments = []
    for low in range(0, int(ends[-1]) if len(ends) else 0, capacity):
        start = np.clip(low - begins, 0, context_lens)
        lens = np.clip(low + capacity - begins, 0, context_lens) - start
        used = np.flatnonzero(lens)
        first, last = int(used[0]), int(used[-1]) + 1
        segments.append((first, last, start[first:last], lens[first:last]))
    return segments


class GpuMetadataBuilder(PolarMetadataBuilder):
    """Adds the prefill's segments, computed on the CPU and copied over in one go."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> PolarMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if metadata.num_prefills:
            metadata.prefill = self._plan(metadata)
        return metadata

    def _plan(self, m: PolarMetadata) -> PrefillPlan:
        starts = m.query_start_loc_cpu.numpy()[m.num_decodes : m.num_decodes + m.num_prefills + 1]
        relative = (starts - starts[0]).astype(np.int32)
        contexts = m.context_lens_cpu.numpy().astype(np.int64)
        assert isinstance(self.impl, GpuImpl)
        cuts = plan_prefix(contexts, relative, self.impl.buffers.prefix_tokens)

        # One pinned copy carries every small array of the plan.
        parts: list[np.ndarray] = [relative]
        for first, last, start, lens in cuts:
            parts += [
                relative[first : last + 1] - relative[first],
                np.concatenate([[0], np.cumsum(lens)]),
                start,
            ]
        flat = torch.from_numpy(np.concatenate(parts).astype(np.int32)).pin_memory()
        device = list(flat.to(self.device, non_blocking=True).split([len(p) for p in parts]))

        segments = []
        for i, (first, last, _, lens) in enumerate(cuts):
            queries = np.diff(relative[first : last + 1])
            segments.append(
                Segment(
                    first=first,
                    last=last,
                    rows=slice(int(starts[first]), int(starts[last])),
                    query_start_loc=device[3 * i + 1],
                    key_start_loc=device[3 * i + 2],
                    start=device[3 * i + 3],
                    tokens=int(lens.sum()),
                    max_query_len=int(queries.max()),
                    max_key_len=int(lens.max()),
                )
            )
        return PrefillPlan(device[0], int(np.diff(relative).max()), tuple(segments))


@dataclass(frozen=True)
class Buffers:
    """What every layer of one shape shares: the decode workspace and room for unpacked prefixes.

    prefix_key and prefix_value: the model's dtype, [prefix_tokens, kv heads, d].
    """

    decode: DecodeWorkspace
    prefix_key: torch.Tensor
    prefix_value: torch.Tensor

    @property
    def prefix_tokens(self) -> int:
        return len(self.prefix_key)

    @property
    def nbytes(self) -> int:
        return self.decode.nbytes + self.prefix_key.nbytes + self.prefix_value.nbytes


@cache
def _buffers(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    max_reqs: int,
    max_decode_len: int,
) -> Buffers:
    decode = DecodeWorkspace.allocate(
        max_tokens=max_reqs * max_decode_len,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        max_reqs=max_reqs,
        max_query_len=max_decode_len,
    )
    tokens = max(1024, PREFIX_WORKSPACE_BYTES // (2 * num_kv_heads * head_dim * dtype.itemsize))
    prefix = torch.empty(2, tokens, num_kv_heads, head_dim, dtype=dtype, device=device)
    return Buffers(decode, prefix[0], prefix[1])


def _max_requests(config: VllmConfig) -> int:
    """Rows of the largest decode batch, CUDA graphs' padding included."""
    graph = config.compilation_config.max_cudagraph_capture_size or 0
    return max(config.scheduler_config.max_num_seqs, graph)


class GpuImpl(PolarQuantImpl):
    """The layer on CUDA."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        decode_len = max_decode_query_len(config)
        if decode_len > MAX_QUERY_LEN:
            raise ValueError(
                f"--kv-cache-dtype {self.kv_cache_dtype} supports at most {MAX_QUERY_LEN - 1} "
                f"speculative tokens, not {decode_len - 1}; lower num_speculative_tokens."
            )
        self.decode_len = decode_len
        self.fa_version = get_flash_attn_version(head_size=self.head_size)
        self.buffers = _buffers(
            self.num_heads,
            self.num_kv_heads,
            self.head_size,
            self.dtype,
            torch.device("cuda", torch.cuda.current_device()),
            _max_requests(config),
            decode_len,
        )

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        fmt: PolarFormat,
    ) -> None:
        store_kv(key, value, kv_cache, slot_mapping, fmt, self.tables)

    def decode(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        m: PolarMetadata,
        fmt: PolarFormat,
        output: torch.Tensor,
    ) -> None:
        requests, tokens = m.num_decodes, m.num_decode_tokens
        decode_attention(
            query[:tokens],
            kv_cache,
            m.block_table[:requests],
            m.seq_lens[:requests],
            m.query_start_loc[: requests + 1],
            m.max_decode_len,
            fmt,
            self.tables,
            self.scale,
            output[:tokens],
            self.buffers.decode,
        )

    def prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        m: PolarMetadata,
        fmt: PolarFormat,
        output: torch.Tensor,
    ) -> None:
        plan: PrefillPlan = m.prefill
        rows = slice(m.num_decode_tokens, m.num_actual_tokens)
        starts, longest = plan.query_start_loc, plan.max_query_len
        fresh, lse = self._flash(
            query[rows], key[rows], value[rows], starts, longest, starts, longest, causal=True
        )
        output[rows].copy_(fresh)
        if not plan.segments:
            return
        rotated = torch.empty_like(query[rows], memory_format=torch.contiguous_format)
        rotate(query[rows], rotated, self.tables)
        buffers = self.buffers
        for s in plan.segments:
            requests = slice(m.num_decodes + s.first, m.num_decodes + s.last)
            gather_prefix(
                kv_cache,
                m.block_table[requests],
                s.start,
                s.key_start_loc,
                s.max_key_len,
                fmt,
                self.tables,
                buffers.prefix_key,
                buffers.prefix_value,
            )
            mine = slice(s.rows.start - rows.start, s.rows.stop - rows.start)
            part, part_lse = self._flash(
                rotated[mine],
                buffers.prefix_key[: s.tokens],
                buffers.prefix_value[: s.tokens],
                s.query_start_loc,
                s.max_query_len,
                s.key_start_loc,
                s.max_key_len,
                causal=False,
            )
            merge_prefix(
                output[s.rows],
                lse[:, mine],
                part,
                part_lse,
                self.tables,
                rotate_back=True,
                update_lse=True,
            )

    def _flash(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_starts: torch.Tensor,
        max_query_len: int,
        key_starts: torch.Tensor,
        max_key_len: int,
        causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            max_seqlen_q=max_query_len,
            cu_seqlens_q=query_starts,
            max_seqlen_k=max_key_len,
            cu_seqlens_k=key_starts,
            softmax_scale=self.scale,
            causal=causal,
            return_softmax_lse=True,
            fa_version=self.fa_version,
        )
        return out, lse

    def profile(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        # A prefill holds at most: the fresh output, the rotated queries and one prefix output, with
        # their log-sum-exps.
        scratch = [torch.empty_like(query) for _ in range(3)]
        scratch += [query.new_empty(query.shape[:2], dtype=torch.float32) for _ in range(2)]
        del scratch

    def warm_up(self, fmt: PolarFormat) -> None:
        device = self.tables.rotation.device
        decode_len = self.decode_len
        pages = torch.zeros(
            2, self.num_kv_heads, fmt.block_size, fmt.slot_bytes, dtype=torch.uint8, device=device
        )
        table = torch.zeros(1, 16, dtype=torch.int32, device=device)
        tokens = max(decode_len, fmt.block_size)
        x = torch.ones(tokens, self.num_kv_heads, self.head_size, dtype=self.dtype, device=device)
        query = torch.ones(tokens, self.num_heads, self.head_size, dtype=self.dtype, device=device)
        store_kv(x, x, pages, torch.arange(tokens, device=device) % fmt.block_size, fmt, self.tables)
        starts = torch.tensor([0, decode_len], dtype=torch.int32, device=device)
        out = torch.empty_like(query)
        decode_attention(
            query[:decode_len],
            pages,
            table,
            starts[1:],
            starts,
            decode_len,
            fmt,
            self.tables,
            self.scale,
            out[:decode_len],
            self.buffers.decode,
        )
        cut = torch.tensor([0, fmt.block_size], dtype=torch.int32, device=device)
        gather_prefix(
            pages,
            table,
            cut[:1],
            cut,
            fmt.block_size,
            fmt,
            self.tables,
            self.buffers.prefix_key,
            self.buffers.prefix_value,
        )
        lse = torch.zeros(self.num_heads, tokens, device=device, dtype=torch.float32)
        rotate(query, out, self.tables)
        merge_prefix(query, lse, out, lse.clone(), self.tables, rotate_back=True, update_lse=True)
