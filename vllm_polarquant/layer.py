"""One layer of vLLM: its arguments become one Attention, and its calls those of kernels.ops.Operations.

A key's way in is `do_kv_cache_update -> Operations.store -> kernel`; a query's way out is
`forward -> Operations.decode`, or `forward -> Operations.prefill`. No arithmetic happens here.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionType, max_decode_query_len

from vllm_polarquant import support
from vllm_polarquant.attention import Attention
from vllm_polarquant.centring import layer_tables
from vllm_polarquant.codec import Tables, tables
from vllm_polarquant.compat import hide_numba
from vllm_polarquant.flash import flash_attention
from vllm_polarquant.format import Slot
from vllm_polarquant.kernels.ops import DenseAttention, LayerShape, Limits, Operations, Plan, operations
from vllm_polarquant.settings import Settings
from vllm_polarquant.startup import Sample, num_segments


def _limits(config: VllmConfig) -> Limits:
    # A batch of decodes is padded to the size of a captured graph.
    graph = config.compilation_config.max_cudagraph_capture_size or 0
    return Limits(max(config.scheduler_config.max_num_seqs, graph), max_decode_query_len(config))


def _window(sliding_window: int | None, max_model_len: int) -> int | None:
    """A layer's window; one that no request can leave is none."""
    return sliding_window if sliding_window is not None and sliding_window < max_model_len else None


def _plan_of(layer: torch.nn.Module) -> Plan | None:
    """The plan of the step that runs, as vLLM's own layers look theirs up."""
    metadata = get_forward_context().attn_metadata
    if isinstance(metadata, list):
        metadata = metadata[0]
    return metadata[layer.layer_name] if isinstance(metadata, dict) else metadata


def _no_dense_attention(*_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    raise AssertionError("the operations on a CPU bring their own")


def _dense_attention(device: torch.device, head_dim: int) -> DenseAttention:
    return flash_attention(head_dim) if device.type == "cuda" else _no_dense_attention


class PolarQuantImpl(AttentionImpl[Plan]):
    """One layer on any device.

    Raises:
        support.Refused: from the constructor, naming a feature of the layer that is not supported.
    """

    supports_quant_query_input = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **extra: Any,
    ) -> None:
        support.check_layer(
            kv_cache_dtype,
            alibi_slopes=alibi_slopes,
            attn_type=attn_type,
            **extra,
        )
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        config = get_current_vllm_config()
        device = torch.device(current_platform.device_type)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        # Weights are loaded into the model's own later, and again.
        self.loaded_sinks = sinks
        self.attention = Attention(
            self.scale,
            _window(sliding_window, config.model_config.max_model_len),
            logits_soft_cap or None,
            None if sinks is None else torch.zeros(num_heads, dtype=torch.float32, device=device),
        )
        self.shape = LayerShape(
            Slot(kv_cache_dtype, head_size),
            num_heads,
            self.num_kv_heads,
            config.model_config.dtype,
            device,
        )
        self.limits = _limits(config)
        self.ops, self.constants = self._shared(config) or self._own()
        settings = Settings.of(config.additional_config)
        self.centred = self.shape.slot.key.kind != "raw" and settings.centre_keys
        self.max_batched_tokens = config.scheduler_config.max_num_batched_tokens
        self.source: PolarQuantImpl | None = None
        self.from_pages = False
        self.sample: Sample | None = None
        self.energy_removed: float | None = None
        if settings.prefill_from_pages:
            self._read_chunks_off_pages()
        self.tables = self.constants
        if kv_sharing_target_layer_name is not None:
            self.share(config.compilation_config.static_forward_context.get(kv_sharing_target_layer_name))
        elif self.centred:
            self.tables = layer_tables(self.constants, self.num_kv_heads, num_segments(config))

    def _shared(self, config: VllmConfig) -> tuple[Operations, Tables] | None:
        """Those of an earlier layer of this engine: all of a shape share workspaces and constants."""
        for layer in config.compilation_config.static_forward_context.values():
            other = getattr(layer, "impl", None)
            if isinstance(other, PolarQuantImpl) and (other.shape, other.limits) == (self.shape, self.limits):
                return other.ops, other.constants
        return None

    def _own(self) -> tuple[Operations, Tables]:
        shape = self.shape
        if shape.device.type == "cpu":
            hide_numba()
        ops = operations(shape, self.limits, _dense_attention(shape.device, self.head_size))
        if ops.max_decode_query_len is not None:
            support.check_draft_tokens(
                self.kv_cache_dtype, self.limits.max_decode_query_len, ops.max_decode_query_len
            )
        return ops, tables(shape.slot, shape.dtype, shape.device)

    def _read_chunks_off_pages(self) -> None:
        if not self.from_pages:
            self.from_pages = True
            self.ops.reserve_chunks(self.max_batched_tokens)

    def share(self, target: Any) -> None:
        """Read the cache of another layer of vLLM's, made before this one, with what it was written by.

        Raises:
            support.Refused: if that is no layer of the same dtype.
        """
        source = getattr(target, "impl", None)
        if not isinstance(source, PolarQuantImpl):
            raise support.refuse(self.kv_cache_dtype, support.SPLIT_SHARING)
        self.source, self.tables = source, source.tables
        self._read_chunks_off_pages()

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Take sinks over from the model's weights; vLLM calls it after each time these are loaded."""
        if self.loaded_sinks is not None:
            assert self.attention.sinks is not None
            self.attention.sinks.copy_(self.loaded_sinks.detach())

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        plan = _plan_of(layer)
        # Without a plan it is a memory profile, or a step without requests.
        if plan is not None and kv_cache.numel():
            self.ops.store(key, value, kv_cache, slot_mapping, self.tables, plan.segments)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: Plan | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query [T, num_heads, d], key and value [T, kv heads, d] -> output [T, num_heads, d], written.

        A layer that shares another one's cache comes without key and value.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantisation is not supported")
        if attn_metadata is None:
            # A memory profile, or a step without requests.
            self.ops.reserve(len(query))
            return output.zero_()
        batch = attn_metadata.batch
        if self.sample is not None and self.sample.attend(query, key, value, batch, output):
            return output
        if batch.num_decodes:
            self.ops.decode(query, kv_cache, attn_metadata, self.attention, self.tables, output)
        if batch.num_prefills:
            # The pass at start-up is exact in any case.
            if self.from_pages and self.sample is None:
                key = value = None
            self.ops.prefill(query, key, value, kv_cache, attn_metadata, self.attention, self.tables, output)
        return output
