"""vLLM's attention backend: what is refused, how a batch is split, and which kernel gets which part.

No arithmetic happens here. A key's way in is `do_kv_cache_update -> store_kv -> page`; a query's way out
is `forward -> decode_attention`, or `forward -> prefill`, with the kernels of a GPU (gpu.py) or a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vllm_polarquant.codec import Tables, tables
from vllm_polarquant.compat import BACKEND_NAME, hide_numba
from vllm_polarquant.format import (
    BLOCK_SIZE_MULTIPLE,
    LOSSLESS,
    PRESETS,
    PolarFormat,
    UnsupportedFormat,
)

logger = init_logger("vllm.polarquant")

_FP8 = "serve this model with --kv-cache-dtype fp8 or auto"

_REFUSED = {
    "use_mla": f"multi-head latent attention (MLA), whose cache is already compressed; {_FP8}",
    "has_sink": f"attention sinks; {_FP8}",
    "use_sparse": f"sparse attention; {_FP8}",
    "use_mm_prefix": f"bidirectional attention over multimodal tokens; {_FP8}",
    "use_per_head_quant_scales": f"a checkpoint's per-head KV scales; {_FP8}",
    "has_sliding_window": "sliding-window layers; keep them native with "
    "--kv-cache-dtype-skip-layers sliding_window",
    "use_non_causal": f"non-causal attention; {_FP8}",
    "use_batch_invariant": "batch-invariant mode; unset VLLM_BATCH_INVARIANT",
    "use_pcp": "prefill context parallelism; use tensor parallelism instead",
    "use_dcp": "decode context parallelism (DCP); use tensor parallelism instead",
    "use_rswa": f"reference sliding-window attention; {_FP8}",
    "use_adaptive_verification": "adaptive verification; turn it off in --speculative-config",
}

_CONNECTOR, _OFFLOAD_SPEC = "OffloadingConnector", "CPUOffloadingSpec"


def _refuse(preset: str, what: str) -> ValueError:
    return ValueError(f"--kv-cache-dtype {preset} does not support {what}.")


def _check_connector(preset: str, transfer: Any) -> None:
    """Refuse every KV connector but offloading to this process's memory.

    Pages that outlive the process, or reach another one, would need `PolarFormat.cache_id` in their keys,
    and vLLM's keys hold no more than the dtype's name.
    """
    spec = (transfer.kv_connector_extra_config or {}).get("spec_name", _OFFLOAD_SPEC)
    if transfer.kv_connector != _CONNECTOR or spec != _OFFLOAD_SPEC:
        raise _refuse(
            preset,
            f"the KV connector {transfer.kv_connector} ({spec}); use {_CONNECTOR} with {_OFFLOAD_SPEC}",
        )


def backend_path(selector: Any) -> str:
    """Class path of the backend for a layer, given vLLM's AttentionSelectorConfig.

    Raises:
        ValueError: one sentence that names the first feature that is not supported and the way out.
    """
    preset = selector.kv_cache_dtype
    for field, what in _REFUSED.items():
        if getattr(selector, field, False):
            raise _refuse(preset, what)
    if selector.attn_type != AttentionType.DECODER:
        raise _refuse(preset, f"encoder or cross attention ({selector.attn_type}); {_FP8}")
    if selector.dtype not in PolarQuantBackend.supported_dtypes:
        raise _refuse(preset, f"a model in {selector.dtype}; pass --dtype bfloat16 or float16")
    if selector.use_kv_connector:
        _check_connector(preset, get_current_vllm_config().kv_transfer_config)
    try:
        PolarFormat(preset, selector.head_size, selector.block_size or BLOCK_SIZE_MULTIPLE)
    except UnsupportedFormat as problem:
        raise ValueError(f"--kv-cache-dtype {preset}: {problem}; {_FP8}.") from None
    if current_platform.is_cuda():
        capability = current_platform.get_device_capability()
        if capability is None or capability < (8, 0):
            raise _refuse(preset, "GPUs before compute capability 8.0 (A100)")
    elif not current_platform.is_cpu():
        raise _refuse(preset, f"the platform {current_platform.device_name}; use CUDA or the CPU build")
    backend = _BACKENDS[preset]
    return f"{backend.__module__}.{backend.__qualname__}"


class PolarQuantBackend(AttentionBackend):
    """The backend of every preset; one subclass a preset, as vLLM asks the class for the page's size."""

    preset: ClassVar[str]
    accept_output_buffer: ClassVar[bool] = True
    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[PolarQuantImpl]:
        if current_platform.is_cpu():
            return CpuImpl
        from vllm_polarquant.gpu import GpuImpl

        return GpuImpl

    @staticmethod
    def get_builder_cls() -> type[PolarMetadataBuilder]:
        if current_platform.is_cpu():
            return PolarMetadataBuilder
        from vllm_polarquant.gpu import GpuMetadataBuilder

        return GpuMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK_SIZE_MULTIPLE)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Every layout in which a block's bytes lie side by side; its inside is ours to arrange.
        return (
            KVCacheLayout.LBHNC,
            KVCacheLayout.LBNHC,
            KVCacheLayout.BLHNC,
            KVCacheLayout.BLNHC,
        )

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        return kv_cache_dtype == cls.preset

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Give the spec its page: head_dim becomes the preset's bytes a token a kv head."""
        if spec.dtype != torch.uint8 or spec.state_content_bytes is not None:
            return spec
        if spec.head_size_v != spec.head_size:
            raise _refuse(
                cls.preset,
                f"values of another size ({spec.head_size_v}) than keys ({spec.head_size}); {_FP8}",
            )
        fmt = PolarFormat(cls.preset, spec.head_size, BLOCK_SIZE_MULTIPLE)
        return replace(spec, state_content_bytes=fmt.slot_bytes)


@dataclass
class PolarMetadata:
    """One batch: decodes first, then prefills. Device tensors unless named _cpu.

    max_decode_len is the most query tokens a decode may have, a constant of the engine, so that a
    captured graph serves every batch. context_lens_cpu counts the tokens before each prefill's chunk.
    schedule and prefill are what a device's kernels need beside that.
    """

    num_actual_tokens: int
    num_decodes: int
    num_decode_tokens: int
    num_prefills: int
    max_decode_len: int
    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    context_lens_cpu: torch.Tensor
    schedule: Any = None
    prefill: Any = None


class PolarMetadataBuilder(AttentionMetadataBuilder[PolarMetadata]):
    """Splits a batch into decodes (few query tokens, read off the pages) and prefills."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.layers: dict[str, Attention] = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        self.impl: PolarQuantImpl = next(iter(self.layers.values())).impl
        self.fmt = self.impl.format(kv_cache_spec.block_size)
        _log_layers(vllm_config, self.fmt, kv_cache_spec.num_kv_heads, layer_names)
        self.impl.warm_up(self.fmt)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> PolarMetadata:
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
        return PolarMetadata(
            num_actual_tokens=batch.num_actual_tokens,
            num_decodes=decodes,
            num_decode_tokens=decode_tokens,
            num_prefills=prefills,
            max_decode_len=threshold,
            query_start_loc=batch.query_start_loc,
            query_start_loc_cpu=starts_cpu,
            seq_lens=batch.seq_lens,
            block_table=batch.block_table_tensor,
            context_lens_cpu=context_lens,
        )


class PolarQuantImpl(AttentionImpl[PolarMetadata]):
    """One layer. Subclasses bring the kernels of a device: store, decode and prefill.

    Raises:
        ValueError: from the constructor, naming a feature of the layer that is not supported.
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
        **extra: Any,
    ) -> None:
        if alibi_slopes is not None:
            raise _refuse(kv_cache_dtype, f"ALiBi; {_FP8}")
        if logits_soft_cap:
            raise _refuse(kv_cache_dtype, f"soft-capped attention logits; {_FP8}")
        if sliding_window is not None:
            raise _refuse(kv_cache_dtype, _REFUSED["has_sliding_window"])
        if attn_type != AttentionType.DECODER:
            raise _refuse(kv_cache_dtype, f"encoder or cross attention ({attn_type}); {_FP8}")
        if kv_sharing_target_layer_name is not None:
            raise _refuse(kv_cache_dtype, f"layers that share another layer's KV cache; {_FP8}")
        for name, setting in extra.items():
            if setting is not None and setting is not False and setting != -1:
                raise _refuse(kv_cache_dtype, f"the attention option {name!r}; {_FP8}")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        config = get_current_vllm_config()
        self.dtype: torch.dtype = config.model_config.dtype
        device = torch.device(current_platform.device_type)
        # The constants do not depend on the block size, which is not known yet.
        self.tables: Tables = tables(self.format(BLOCK_SIZE_MULTIPLE), self.dtype, device)

    def format(self, block_size: int) -> PolarFormat:
        return _format(self.kv_cache_dtype, self.head_size, block_size)

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        if kv_cache.numel():
            self.store(key, value, kv_cache, slot_mapping, self.format(kv_cache.shape[2]))

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: PolarMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query [T, num_heads, d], key and value [T, kv heads, d] -> output [T, num_heads, d], written."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantisation is not supported")
        if attn_metadata is None:
            self.profile(query, key, value)
            return output
        m = attn_metadata
        fmt = self.format(kv_cache.shape[2])
        if m.num_decodes:
            self.decode(query, kv_cache, m, fmt, output)
        if m.num_prefills:
            self.prefill(query, key, value, kv_cache, m, fmt, output)
        return output

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        fmt: PolarFormat,
    ) -> None:
        raise NotImplementedError

    def decode(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        m: PolarMetadata,
        fmt: PolarFormat,
        output: torch.Tensor,
    ) -> None:
        raise NotImplementedError

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
        raise NotImplementedError

    def profile(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Allocate once what `prefill` will allocate, so that vLLM's memory profile counts it."""

    def warm_up(self, fmt: PolarFormat) -> None:
        """Compile what serving will call."""
        raise NotImplementedError


class CpuImpl(PolarQuantImpl):
    """The layer on vLLM's CPU build."""

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        fmt: PolarFormat,
    ) -> None:
        from vllm_polarquant.kernels import cpu

        cpu.store_kv(key, value, kv_cache, slot_mapping, fmt, self.tables)

    def decode(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        m: PolarMetadata,
        fmt: PolarFormat,
        output: torch.Tensor,
    ) -> None:
        from vllm_polarquant.kernels import cpu

        requests, tokens = m.num_decodes, m.num_decode_tokens
        cpu.decode_attention(
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
        from vllm_polarquant.kernels import cpu

        starts = m.query_start_loc_cpu.tolist()
        for i, context_len in enumerate(m.context_lens_cpu.tolist()):
            request = m.num_decodes + i
            rows = slice(starts[request], starts[request + 1])
            cpu.prefill_attention(
                query[rows],
                key[rows],
                value[rows],
                kv_cache,
                m.block_table[request],
                context_len,
                fmt,
                self.tables,
                self.scale,
                output[rows],
            )

    def warm_up(self, fmt: PolarFormat) -> None:
        from vllm_polarquant.kernels import cpu

        hide_numba()
        cpu.warm_up(fmt, self.tables, self.num_heads, self.num_kv_heads, self.dtype)


@cache
def _format(preset: str, head_dim: int, block_size: int) -> PolarFormat:
    return PolarFormat(preset, head_dim, block_size)


def _ranges(indices: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(f"{a}-{b}" if a != b else f"{a}" for a, b in runs)


def _log_layers(vllm_config: VllmConfig, fmt: PolarFormat, num_kv_heads: int, layer_names: list[str]) -> None:
    """One line at start-up: preset, bytes a token, ratio, and which layers are which."""
    from vllm.model_executor.models.utils import extract_layer_index

    every = get_layers_from_vllm_config(vllm_config, Attention)
    native = [name for name, layer in every.items() if layer.kv_cache_dtype == "auto"]
    line = (
        f"{fmt.preset} (page format {fmt.cache_id}): {fmt.slot_bytes} bytes a token a kv head, "
        f"{fmt.slot_bytes * num_kv_heads * len(layer_names)} bytes a token in {len(layer_names)} "
        f"layers x {num_kv_heads} kv heads, {fmt.ratio:.2f}x the tokens of 16-bit floats; "
        f"quantised layers: {_ranges([extract_layer_index(n) for n in layer_names])}; "
        f"native layers: {_ranges([extract_layer_index(n) for n in native]) or 'none'}"
    )
    logger.info_once("%s", line)


def _backend_of(preset: str) -> type[PolarQuantBackend]:
    # vLLM takes the last dot of the path for the end of the module's name.
    name = "Backend_" + preset.replace(".", "_")
    # vLLM finds a backend by its module and name, so each subclass is an attribute of this module.
    backend = type(
        name,
        (PolarQuantBackend,),
        {"preset": preset, "supported_kv_cache_dtypes": [preset], "__module__": __name__},
    )
    globals()[name] = backend
    return backend


_BACKENDS = {preset: _backend_of(preset) for preset in (*PRESETS, LOSSLESS)}
