"""vLLM's own KV caches as contenders, through the attention classes and metadata of its engine.

Written for vLLM 0.32 and 0.33. Layout LBNHC, the engine's default. What the engine prepares once a step
for all layers (FlashAttention's schedule, as ours) is prepared outside of the timed calls, and fp8's queries
come quantised, as torch.compile fuses that into the operation before.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from vllm_polarquant.eval.bench.inputs import Inputs, Layer


class _EngineLayer:
    """One layer through an AttentionImpl: `forward` and `do_kv_cache_update`, as the engine calls them."""

    def __init__(self, impl: Any, owner: Any, cache: torch.Tensor, metadata: Any, inputs: Inputs) -> None:
        self.impl, self.owner, self.metadata, self.inputs = impl, owner, metadata, inputs
        # The logical order of vLLM's caches: [blocks, kv_heads, block_size, content].
        self.cache = cache.transpose(1, 2)
        self.query = inputs.query
        self.out = torch.empty_like(inputs.query)

    def store(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        self.impl.do_kv_cache_update(self.owner, key, value, self.cache, slots)

    def attend(self) -> torch.Tensor:
        new = self.inputs.key, self.inputs.value
        self.impl.forward(self.owner, self.query, *new, self.cache, self.metadata, self.out)
        return self.out


def _impl_arguments(inputs: Inputs, dtype: str) -> dict[str, Any]:
    case = inputs.case
    return {
        "num_heads": case.heads,
        "head_size": case.head_dim,
        "scale": case.scale,
        "num_kv_heads": case.kv_heads,
        "alibi_slopes": None,
        "sliding_window": case.window,
        "kv_cache_dtype": dtype,
        "logits_soft_cap": case.soft_cap,
        "sinks": None if inputs.attention.sinks is None else inputs.attention.sinks.to(inputs.query.dtype),
    }


def _common_metadata(inputs: Inputs) -> dict[str, Any]:
    return {
        "num_actual_tokens": len(inputs.query),
        "max_query_len": inputs.case.tokens,
        "query_start_loc": inputs.query_start_loc,
        "max_seq_len": max(inputs.case.seq_lens),
        "seq_lens": inputs.seq_lens,
        "block_table": inputs.block_table,
        "slot_mapping": inputs.slots,
    }


def _unit_scales(device: torch.device) -> SimpleNamespace:
    """What an attention layer holds for an uncalibrated fp8 cache."""
    one = torch.ones((), dtype=torch.float32, device=device)
    return SimpleNamespace(_q_scale=one, _k_scale=one, _v_scale=one)


class FlashAttention:
    """FlashAttention (3 on Hopper) on bfloat16 pages (`auto`) or fp8 ones."""

    def __init__(self, name: str) -> None:
        self.name = name

    def slot_bytes(self, head_dim: int) -> int:
        return 2 * head_dim * (1 if self.name == "fp8" else 2)

    def open(self, inputs: Inputs, caches: Sequence[torch.Tensor]) -> Sequence[Layer]:
        from vllm.config.attention import AttentionConfig
        from vllm.v1.attention.backends.fa_utils import get_scheduler_metadata
        from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadata

        case, fp8 = inputs.case, self.name == "fp8"
        impl = FlashAttentionImpl(**_impl_arguments(inputs, self.name))
        # Captured decodes bound the splits, other batches leave them to the kernel.
        decode = case.op == "decode"
        splits = AttentionConfig().flash_attn_max_num_splits_for_cuda_graph if decode else 0
        schedule = None
        if impl.vllm_flash_attn_version == 3 and case.op != "store":
            schedule = get_scheduler_metadata(
                batch_size=case.batch,
                max_seqlen_q=case.tokens,
                max_seqlen_k=max(case.seq_lens),
                num_heads_q=case.heads,
                num_heads_kv=case.kv_heads,
                headdim=case.head_dim,
                cache_seqlens=inputs.seq_lens,
                qkv_dtype=torch.float8_e4m3fn if fp8 else inputs.query.dtype,
                cu_seqlens_q=inputs.query_start_loc,
                page_size=case.block_size,
                causal=True,
                window_size=impl.sliding_window,
                has_softcap=case.soft_cap is not None,
                num_splits=splits,
            )
        metadata = FlashAttentionMetadata(
            **_common_metadata(inputs), scheduler_metadata=schedule, max_num_splits=splits
        )
        owner = _unit_scales(inputs.device)
        layers = []
        for cache in caches:
            pages = cache if fp8 else cache.view(inputs.query.dtype)
            layer = _EngineLayer(impl, owner, pages, metadata, inputs)
            if fp8:
                layer.query = inputs.query.to(torch.float8_e4m3fn)
            layers.append(layer)
        return layers


class TurboQuant:
    """vLLM's TurboQuant kernels, their prefill on the FlashAttention that the GPU prefers.

    The engine forces that to version 2 beside this cache.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def slot_bytes(self, head_dim: int) -> int:
        from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

        return int(TurboQuantConfig.from_cache_dtype(self.name, head_dim).slot_size_aligned)

    def open(self, inputs: Inputs, caches: Sequence[torch.Tensor]) -> Sequence[Layer]:
        from vllm.config.attention import AttentionConfig
        from vllm.v1.attention.backends import turboquant_attn
        from vllm.v1.worker.workspace import init_workspace_manager, is_workspace_manager_initialized

        case = inputs.case
        if not is_workspace_manager_initialized():
            init_workspace_manager(inputs.device)
        # All that the class reads of an engine's configuration.
        config = SimpleNamespace(
            attention_config=AttentionConfig(),
            model_config=SimpleNamespace(max_model_len=max(case.seq_lens) + 1),
        )
        with mock.patch.object(turboquant_attn, "get_current_vllm_config", lambda: config):
            impl = turboquant_attn.TurboQuantAttentionImpl(**_impl_arguments(inputs, self.name))
        decode = case.op == "decode"
        metadata = turboquant_attn.TurboQuantMetadata(
            **_common_metadata(inputs),
            is_prefill=not decode,
            num_decodes=case.batch if decode else 0,
            num_decode_tokens=case.batch if decode else 0,
            query_start_loc_cpu=inputs.query_start_loc.cpu(),
            seq_lens_cpu=inputs.seq_lens.cpu(),
        )
        owner = SimpleNamespace()
        return [_EngineLayer(impl, owner, cache, metadata, inputs) for cache in caches]


class TritonInt4:
    """int4_per_token_head: vLLM's unified Triton attention on packed 4-bit pages."""

    name = "int4_per_token_head"

    def slot_bytes(self, head_dim: int) -> int:
        # Two packed vectors, each with a float32 scale.
        return head_dim + 8

    def open(self, inputs: Inputs, caches: Sequence[torch.Tensor]) -> Sequence[Layer]:
        from vllm.v1.attention.backends.triton_attn import (
            MIN_LAUNCH_GRID_SIZE_2D,
            NUM_PAR_SOFTMAX_SEGMENTS,
            TritonAttentionImpl,
            TritonAttentionMetadata,
        )

        case, device = inputs.case, inputs.device
        # As TritonAttentionMetadataBuilder: batches up to the threshold split their contexts.
        threshold = max(1, MIN_LAUNCH_GRID_SIZE_2D // case.kv_heads)
        segments = threshold, case.heads, NUM_PAR_SOFTMAX_SEGMENTS
        padded = 1 << (case.head_dim - 1).bit_length()
        metadata = TritonAttentionMetadata(
            **_common_metadata(inputs),
            causal=True,
            seq_threshold_3D=threshold,
            num_par_softmax_segments=NUM_PAR_SOFTMAX_SEGMENTS,
            softmax_segm_output=torch.empty(*segments, padded, dtype=torch.float32, device=device),
            softmax_segm_max=torch.empty(segments, dtype=torch.float32, device=device),
            softmax_segm_expsum=torch.empty(segments, dtype=torch.float32, device=device),
        )
        owner = _unit_scales(device)
        # An instance keeps views of the scales inside its layer's cache.
        return [
            _EngineLayer(
                TritonAttentionImpl(**_impl_arguments(inputs, self.name)), owner, cache, metadata, inputs
            )
            for cache in caches
        ]


def peer(name: str) -> FlashAttention | TurboQuant | TritonInt4:
    """The contender of one of vLLM's --kv-cache-dtype names.

    Raises:
        ValueError: for a name that none of the classes above serves.
    """
    if name in ("auto", "fp8"):
        return FlashAttention(name)
    if name.startswith("turboquant_"):
        return TurboQuant(name)
    if name == TritonInt4.name:
        return TritonInt4()
    raise ValueError(f"no kernels are known for {name!r}")
