"""A batch of vLLM's as kernels take it: decodes first, then prefills, planned once for all layers."""

from __future__ import annotations

from typing import ClassVar

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_polarquant.kernels.ops import Batch, Plan
from vllm_polarquant.layer import PolarQuantImpl
from vllm_polarquant.page import Page
from vllm_polarquant.support import SPLIT_SHARING, refuse


class PolarMetadataBuilder(AttentionMetadataBuilder[Plan]):
    """Splits a batch into decodes (few query tokens, read off the pages) and prefills, and plans it."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        impls = _share_caches(vllm_config, layer_names)
        impl = impls[0]
        page = Page(impl.shape.slot, kv_cache_spec.block_size)
        # Captured graphs read what it plans into, so it stays.
        self.planner = impl.ops.planner({each.attention.window for each in impls})
        kinds = {_kind(each): each for each in impls}
        for each in kinds.values():
            impl.ops.warm_up(page, each.tables, each.attention, each.from_pages)

    def build_for_drafting(self, common_attn_metadata: CommonAttentionMetadata, draft_index: int) -> Plan:
        """A draft model's batch, which vLLM lengthens by its own tokens, except on the host."""
        batch = common_attn_metadata
        speculative = self.vllm_config.speculative_config
        bounds = batch.seq_lens_cpu_upper_bound
        if draft_index == 0 and bounds is not None and speculative.uses_draft_model():
            bounds = bounds + speculative.max_num_new_slots_for_drafting
        return self.build(0, batch.replace(seq_lens_cpu_upper_bound=bounds), fast_build=True)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Plan:
        batch = common_attn_metadata
        threshold = self.reorder_batch_threshold
        assert threshold is not None
        decodes, prefills, decode_tokens, _ = split_decodes_and_prefills(batch, decode_threshold=threshold)
        starts_cpu = batch.query_start_loc_cpu
        context_lens = torch.zeros(0, dtype=torch.int32)
        if prefills:
            assert batch.seq_lens_cpu_upper_bound is not None  # exact for prefills
            chunk_lens = starts_cpu[decodes + 1 :] - starts_cpu[decodes:-1]
            context_lens = batch.seq_lens_cpu_upper_bound[decodes : batch.num_reqs] - chunk_lens
        return self.planner.plan(
            Batch(
                num_decodes=decodes,
                num_decode_tokens=decode_tokens,
                num_prefills=prefills,
                num_tokens=batch.num_actual_tokens,
                query_start_loc=batch.query_start_loc,
                query_start_loc_cpu=starts_cpu,
                seq_lens=batch.seq_lens,
                block_table=batch.block_table_tensor,
                context_lens_cpu=context_lens,
            )
        )


def _share_caches(vllm_config: VllmConfig, layer_names: list[str]) -> list[PolarQuantImpl]:
    """The implementations of a group's layers, each with the layer whose cache it reads.

    That of a draft's layers is known only after they are made.

    Raises:
        support.Refused: if layers of two dtypes share a cache.
    """
    every = get_layers_from_vllm_config(vllm_config, Attention)
    for layer in every.values():
        target = layer.kv_sharing_target_layer_name
        if target in layer_names and not isinstance(layer.impl, PolarQuantImpl):
            raise refuse(every[target].kv_cache_dtype, SPLIT_SHARING)
    impls = []
    for name in layer_names:
        layer = every[name]
        if layer.kv_sharing_target_layer_name is not None:
            layer.impl.share(every.get(layer.kv_sharing_target_layer_name))
        impls.append(layer.impl)
    return impls


def _kind(impl: PolarQuantImpl) -> tuple[object, ...]:
    """What makes kernels differ between layers of one shape."""
    attention = impl.attention
    return attention.window, attention.soft_cap, attention.sinks is None, impl.from_pages
