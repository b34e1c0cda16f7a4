"""The backend on CUDA: Triton kernels for the pages, FlashAttention for whatever is dense.

A prefill attends to its own chunk with FlashAttention on the fresh keys and values, and to its prefix in
segments: `gather_prefix` unpacks as many tokens as the workspace holds, of as many requests as have any,
FlashAttention runs on them with rotated queries, and `merge_prefix` turns the result back and merges it.
Where all prefills of a batch are few tokens after a prefix, they are read off the pages like decodes.
All memory is allocated when the model is loaded, so that vLLM's profile counts it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    CommonAttentionMetadata,
    max_decode_query_len,
)
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_polarquant.backend import PolarMetadata, PolarMetadataBuilder, PolarQuantImpl
from vllm_polarquant.format import PolarFormat
from vllm_polarquant.kernels.decode import (
    MAX_QUERY_LEN,
    DecodeWorkspace,
    decode_attention,
    fused,
    make_schedule,
)
from vllm_polarquant.kernels.prefill import gather_prefix, merge_prefix
from vllm_polarquant.kernels.rotate import MANY_ROWS, rotate
from vllm_polarquant.kernels.schedule import Schedule, plan
from vllm_polarquant.kernels.store import MANY_VECTORS, store_kv
from vllm_polarquant.prefix import PrefillPlan, plan_prefill, reads_like_decodes, workspace_tokens


def _short_tokens(head_dim: int) -> int:
    """Tokens at most of all the chunks of a batch that are read like decodes.

    Where the kernel does not rotate queries itself, they take memory.
    """
    return 4096 if fused(head_dim) else 1024


class GpuMetadataBuilder(PolarMetadataBuilder):
    """Adds the decodes' schedule, computed on the GPU, and the prefill's segments, computed on the CPU."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        assert isinstance(self.impl, GpuImpl)
        # Captured graphs read it, so it stays where it is.
        self.schedule = self.impl.make_schedule(self.fmt)
        self.short_schedule = self.impl.make_schedule(self.fmt, short=True)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> PolarMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if metadata.num_decodes:
            decodes = metadata.num_decodes
            plan(metadata.seq_lens[:decodes], metadata.query_start_loc[: decodes + 1], self.schedule)
            metadata.schedule = self.schedule
        if metadata.num_prefills:
            assert isinstance(self.impl, GpuImpl)
            first = metadata.num_decodes
            last = first + metadata.num_prefills
            starts = metadata.query_start_loc_cpu.numpy()[first : last + 1]
            contexts = metadata.context_lens_cpu.numpy()
            if reads_like_decodes(starts, contexts, MAX_QUERY_LEN, _short_tokens(self.impl.head_size)):
                relative = metadata.query_start_loc[first : last + 1] - metadata.num_decode_tokens
                plan(metadata.seq_lens[first:last], relative, self.short_schedule)
                metadata.prefill = ShortPrefill(relative, self.short_schedule)
            else:
                metadata.prefill = plan_prefill(
                    starts, contexts, self.impl.buffers.prefix_tokens, self.device
                )
        return metadata


@dataclass(frozen=True)
class ShortPrefill:
    """Prefills that are read like decodes: query_start_loc int32 [prefills + 1], from 0, and a schedule."""

    query_start_loc: torch.Tensor
    schedule: Schedule


@dataclass(frozen=True)
class Buffers:
    """What every layer of one shape shares: workspaces and room for unpacked prefixes.

    decode and short: workspaces of decodes and of prefills that are read like them. prefix_key and
    prefix_value: the model's dtype, [prefix_tokens, kv heads, d].
    """

    decode: DecodeWorkspace
    short: DecodeWorkspace
    prefix_key: torch.Tensor
    prefix_value: torch.Tensor

    @property
    def prefix_tokens(self) -> int:
        return len(self.prefix_key)

    @property
    def nbytes(self) -> int:
        return self.decode.nbytes + self.short.nbytes + self.prefix_key.nbytes + self.prefix_value.nbytes


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
    decode, short = (
        DecodeWorkspace.allocate(
            max_tokens=max_tokens,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
            max_reqs=max_reqs,
            max_query_len=max_query_len,
        )
        for max_tokens, max_query_len in (
            (max_reqs * max_decode_len, max_decode_len),
            (_short_tokens(head_dim), MAX_QUERY_LEN),
        )
    )
    tokens = workspace_tokens(num_kv_heads, head_dim, dtype)
    prefix = torch.empty(2, tokens, num_kv_heads, head_dim, dtype=dtype, device=device)
    return Buffers(decode, short, prefix[0], prefix[1])


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
        self.max_reqs = _max_requests(config)
        self.fa_version = get_flash_attn_version(head_size=self.head_size)
        self.buffers = _buffers(
            self.num_heads,
            self.num_kv_heads,
            self.head_size,
            self.dtype,
            torch.device("cuda", torch.cuda.current_device()),
            self.max_reqs,
            decode_len,
        )

    def make_schedule(self, fmt: PolarFormat, short: bool = False) -> Schedule:
        """A schedule for all decodes that a batch may have, or for prefills that are read like them."""
        return make_schedule(
            fmt,
            self.num_heads,
            self.num_kv_heads,
            self.max_reqs,
            self.tables.rotation.device,
            MAX_QUERY_LEN if short else self.decode_len,
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
            m.schedule,
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
        rows = slice(m.num_decode_tokens, m.num_actual_tokens)
        if isinstance(m.prefill, ShortPrefill):
            requests = slice(m.num_decodes, m.num_decodes + m.num_prefills)
            decode_attention(
                query[rows],
                kv_cache,
                m.block_table[requests],
                m.seq_lens[requests],
                m.prefill.query_start_loc,
                MAX_QUERY_LEN,
                fmt,
                self.tables,
                self.scale,
                output[rows],
                self.buffers.short,
                m.prefill.schedule,
            )
            return
        plan: PrefillPlan = m.prefill
        starts, longest = plan.query_start_loc, plan.max_query_len
        _, lse = self._flash(
            query[rows], key[rows], value[rows], starts, longest, starts, longest, True, output[rows]
        )
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
                False,
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
        out: torch.Tensor | None = None,
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
            out=out,
            fa_version=self.fa_version,
        )
        return out, lse

    def profile(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        # A prefill holds at most: the rotated queries and one prefix output, with two log-sum-exps.
        scratch = [torch.empty_like(query) for _ in range(2)]
        scratch += [query.new_empty(query.shape[:2], dtype=torch.float32) for _ in range(2)]
        del scratch

    def warm_up(self, fmt: PolarFormat) -> None:
        device = self.tables.rotation.device
        pages = torch.zeros(
            2, self.num_kv_heads, fmt.block_size, fmt.slot_bytes, dtype=torch.uint8, device=device
        )
        # Storing, rotating and merging have one variant for few and one for many rows.
        few = max(self.decode_len, fmt.block_size)
        many = max(MANY_VECTORS // self.num_kv_heads, MANY_ROWS // self.num_heads) + 1
        for tokens in (few, many):
            x = torch.ones(tokens, self.num_kv_heads, self.head_size, dtype=self.dtype, device=device)
            query = torch.ones(tokens, self.num_heads, self.head_size, dtype=self.dtype, device=device)
            out = torch.empty_like(query)
            lse = torch.zeros(self.num_heads, tokens, device=device, dtype=torch.float32)
            slots = torch.full((tokens,), -1, dtype=torch.int64, device=device)
            slots[: fmt.block_size] = torch.arange(fmt.block_size, device=device)
            store_kv(x, x, pages, slots, fmt, self.tables)
            rotate(query, out, self.tables)
            merge_prefix(query, lse, out, lse.clone(), self.tables, rotate_back=True, update_lse=True)
        table = torch.zeros(1, 16, dtype=torch.int32, device=device)
        for length, workspace, short in (
            (self.decode_len, self.buffers.decode, False),
            (MAX_QUERY_LEN, self.buffers.short, True),
        ):
            starts = torch.tensor([0, length], dtype=torch.int32, device=device)
            schedule = self.make_schedule(fmt, short)
            plan(starts[1:], starts, schedule)
            decode_attention(
                query[:length],
                pages,
                table,
                starts[1:],
                starts,
                length,
                fmt,
                self.tables,
                self.scale,
                out[:length],
                workspace,
                schedule,
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
