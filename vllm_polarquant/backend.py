"""What vLLM asks of an attention backend: which layers it takes, how large a page is, who does the work."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vllm_polarquant import support
from vllm_polarquant.compat import BACKEND_NAME
from vllm_polarquant.format import LOSSLESS, PRESETS, Slot
from vllm_polarquant.page import BLOCK_SIZE_MULTIPLE

if TYPE_CHECKING:
    from vllm_polarquant.layer import PolarQuantImpl
    from vllm_polarquant.metadata import PolarMetadataBuilder


def backend_path(selector: Any) -> str:
    """Class path of the backend for a layer, given vLLM's AttentionSelectorConfig.

    Raises:
        support.Refused: one sentence that names the first feature that is not supported and the way out.
    """
    support.check_selector(selector, get_current_vllm_config_or_none(), current_platform)
    backend = _BACKENDS[selector.kv_cache_dtype]
    return f"{backend.__module__}.{backend.__qualname__}"


class PolarQuantBackend(AttentionBackend):
    """The backend of every preset; one subclass a preset, as vLLM asks the class for the page's size."""

    preset: ClassVar[str]
    accept_output_buffer: ClassVar[bool] = True
    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [getattr(torch, name) for name in support.DTYPES]

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[PolarQuantImpl]:
        from vllm_polarquant.layer import PolarQuantImpl

        return PolarQuantImpl

    @staticmethod
    def get_builder_cls() -> type[PolarMetadataBuilder]:
        from vllm_polarquant.metadata import PolarMetadataBuilder

        return PolarMetadataBuilder

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
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Give the spec its page: head_dim becomes the preset's bytes a token a kv head."""
        if spec.dtype != torch.uint8 or spec.state_content_bytes is not None:
            return spec
        support.check_spec(cls.preset, spec.head_size, spec.head_size_v)
        return replace(spec, state_content_bytes=Slot(cls.preset, spec.head_size).nbytes)


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
