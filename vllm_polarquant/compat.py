"""The only file that knows vLLM's versions: how a dtype's name and its backend are made known.

0.33 has `register_kv_cache_dtype`. 0.32 has a closed Literal, which is extended in place: pydantic then
rebuilds the two configs that hold it, and every other name is accepted or refused as before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from vllm_polarquant.format import is_polar_dtype

SUPPORTED = SpecifierSet(">=0.32,<0.34")
BACKEND_NAME = "POLARQUANT"
LABEL_PREFIX = "polarquant_"
"""Of what identity.py adds to an engine's CacheConfig, whose fields are labels of vllm:cache_config_info."""


class UnsupportedVllm(RuntimeError):
    """The installed vLLM is none that this plugin was tried with."""


def check_version() -> None:
    """Raise UnsupportedVllm, naming both versions, unless the installed vLLM is supported."""
    from vllm import __version__ as found

    if not SUPPORTED.contains(Version(found).base_version, prereleases=True):
        raise UnsupportedVllm(
            f"vllm-polarquant works with vLLM {SUPPORTED}, but {found} is installed, so the polarquant "
            "KV cache dtypes are not available: install a supported vLLM or another vllm-polarquant"
        )


def register_dtypes(names: Iterable[str]) -> None:
    """Make vLLM accept each name as a ``--kv-cache-dtype`` stored in bytes. Idempotent."""
    from vllm.config import cache

    if hasattr(cache, "register_kv_cache_dtype"):
        for name in names:
            if not cache.is_known_kv_cache_dtype(name):
                cache.register_kv_cache_dtype(name)(_handler(name))
        return
    _extend_literal(cache, list(names))


def _handler(name: str) -> type:
    from vllm.v1.kv_cache_interface import KVQuantMode

    class Handler:
        def torch_dtype(self) -> torch.dtype:
            return torch.uint8

        def quant_mode(self) -> Any:
            # Any other mode makes FlashAttention's scheduler take the native layers of a mixed
            # model for fp8, and CUSTOM has the value of an in-tree mode.
            return KVQuantMode.NONE

    Handler.name = name  # type: ignore[attr-defined]
    return Handler


def _extend_literal(cache: Any, names: list[str]) -> None:
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.config import speculative
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    known = cache.CacheDType.__args__
    missing = tuple(name for name in names if name not in known)
    if not missing:
        return
    cache.CacheDType.__args__ = known + missing
    for name in missing:
        STR_DTYPE_TO_TORCH_DTYPE[name] = torch.uint8
    rebuild_dataclass(cache.CacheConfig, force=True)
    rebuild_dataclass(speculative.SpeculativeConfig, force=True)
    arg_utils = sys.modules.get("vllm.engine.arg_utils")
    if arg_utils is not None:
        arg_utils._compute_kwargs.cache_clear()


def register_backend(class_path: str) -> None:
    """Add the backend's name to vLLM's enum, which a layer looks it up in. Idempotent."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        register_backend(BACKEND_NAME, class_path)


def route_backends(choose: Callable[[Any], str]) -> None:
    """Ask `choose` for the backend's class path where a layer's dtype is ours, else vLLM as before.

    `choose` takes vLLM's AttentionSelectorConfig and raises ValueError for what it cannot serve. The
    platform is asked because nothing above it looks at an unknown dtype: the CPU platform would run its
    own kernels on our bytes. Idempotent.
    """
    from vllm.platforms import current_platform

    platform = type(current_platform)
    original = platform.get_attn_backend_cls
    if getattr(original, "routes_polarquant", False):
        return

    def get_attn_backend_cls(
        cls: type, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if is_polar_dtype(attn_selector_config.kv_cache_dtype):
            return choose(attn_selector_config)
        return original(selected_backend, attn_selector_config, num_heads)

    get_attn_backend_cls.routes_polarquant = True  # type: ignore[attr-defined]
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def after_kv_cache(call: Callable[[Any], None]) -> None:
    """Call `call(worker)` in each worker, on all ranks, once its KV cache is there.

    That is before kernels are warmed up and graphs captured. Idempotent.
    """
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    original = WorkerWrapperBase.initialize_from_config
    if getattr(original, "calls_polarquant", False):
        return

    def initialize_from_config(self: Any, kv_cache_configs: list[Any]) -> None:
        original(self, kv_cache_configs)
        call(self.worker)

    initialize_from_config.calls_polarquant = True  # type: ignore[attr-defined]
    WorkerWrapperBase.initialize_from_config = initialize_from_config


def before_kv_cache(call: Callable[[Any], None]) -> None:
    """Call `call(executor)` in an engine core of ours once all workers have their model.

    That is before memory is measured. Idempotent.
    """
    from vllm.v1.executor.abstract import Executor

    original = Executor.get_kv_cache_specs
    if getattr(original, "calls_polarquant", False):
        return

    def get_kv_cache_specs(self: Any) -> Any:
        if asks_for_ours(self.vllm_config):
            call(self)
        return original(self)

    get_kv_cache_specs.calls_polarquant = True  # type: ignore[attr-defined]
    Executor.get_kv_cache_specs = get_kv_cache_specs


def before_scheduler(call: Callable[[Any], None]) -> None:
    """Call `call(executor)` in an engine core of ours once all workers have their KV cache.

    That is before its scheduler, and so its side of a KV connector, is made. Idempotent.
    """
    from vllm.v1.executor.abstract import Executor

    original = Executor.initialize_from_config
    if getattr(original, "calls_polarquant", False):
        return

    def initialize_from_config(self: Any, kv_cache_configs: list[Any]) -> None:
        original(self, kv_cache_configs)
        if asks_for_ours(self.vllm_config):
            call(self)

    initialize_from_config.calls_polarquant = True  # type: ignore[attr-defined]
    Executor.initialize_from_config = initialize_from_config


def cache_planning() -> ModuleType:
    """vLLM's module that groups layers and says how many blocks of each group fit."""
    try:
        from vllm.v1.core import kv_cache_planning
    except ImportError:
        from vllm.v1.core import kv_cache_utils

        return kv_cache_utils
    return kv_cache_planning


def asks_for_ours(config: Any) -> bool:
    """Whether an engine, or its draft model, is to have one of our dtypes; config: its VllmConfig."""
    dtypes = (config.cache_config.cache_dtype, getattr(config.speculative_config, "kv_cache_dtype", None))
    return any(map(is_polar_dtype, dtypes))


def _labels(cache_config: Any) -> dict[str, str]:
    return {name: value for name, value in vars(cache_config).items() if name.startswith(LABEL_PREFIX)}


def send_labels() -> None:
    """Carry labels of a CacheConfig from an engine core to the process that serves metrics.

    They travel in the message in which the core sends what it has found of the cache's size. Idempotent.
    """
    import msgspec
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.engine.core_client import MPClient

    make, apply = EngineCoreProc._make_ready_response, MPClient._apply_ready_response
    if getattr(make, "sends_polarquant", False):
        return

    def _make_ready_response(self: Any) -> Any:
        response = make(self)
        labels = _labels(self.vllm_config.cache_config)
        # A dict is encoded as the dataclass is, whose decoder passes over what it does not know.
        return vars(response) | labels if labels else response

    def _apply_ready_response(self: Any, payload: bytes) -> None:
        apply(self, payload)
        for name, value in (msgspec.msgpack.decode(payload) if payload else {}).items():
            if name.startswith(LABEL_PREFIX):
                setattr(self.vllm_config.cache_config, name, value)

    _make_ready_response.sends_polarquant = True  # type: ignore[attr-defined]
    EngineCoreProc._make_ready_response = _make_ready_response
    MPClient._apply_ready_response = _apply_ready_response


def name_offloaded(label: str) -> None:
    """Add a label of the CacheConfig to the dtype's name in the keys of every tier of OffloadingConnector.

    Its scheduler hashes that name into the folder or prefix under which it looks for blocks. Idempotent.
    """
    from vllm.distributed.kv_transfer.kv_connector.v1 import offloading_connector

    original = offloading_connector.build_offloading_config
    if getattr(original, "names_polarquant", False):
        return

    def build_offloading_config(vllm_config: Any, kv_cache_config: Any) -> Any:
        built = original(vllm_config, kv_cache_config)
        name = _labels(vllm_config.cache_config).get(LABEL_PREFIX + label)
        if name is None:
            return built
        return replace(built, model=replace(built.model, dtype=f"{built.model.dtype}-{name}"))

    build_offloading_config.names_polarquant = True  # type: ignore[attr-defined]
    offloading_connector.build_offloading_config = build_offloading_config


def name_to_peers(name: str) -> None:
    """Add a name to what NixlConnector compares with a peer's before it reads the other's blocks.

    Called in a worker, once, before it is asked for what it tells its peers. Without that connector it does
    nothing.
    """
    from vllm.distributed import kv_transfer

    if not kv_transfer.has_kv_transfer_group():
        return
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlConnector

    group = kv_transfer.get_kv_transfer_group()
    # Of a MultiConnector each.
    for connector in getattr(group, "_connectors", [group]):
        if isinstance(connector, NixlConnector):
            worker = connector.connector_worker
            worker.compat_hash = f"{worker.compat_hash}-{name}"
            worker.xfer_handshake_metadata.compatibility_hash = worker.compat_hash


def hide_numba() -> None:
    """Let another engine start in this process after numba has been imported.

    At the start of a CPU engine vLLM 0.32 reads the `__dict__` of every module's attributes. llvmlite's
    library object makes up whatever attribute it is asked for, and vLLM fails on what it gets. Idempotent.
    """
    from llvmlite.binding import ffi

    library = type(ffi.lib)
    original = library.__getattr__
    if getattr(original, "hides_dict", False):
        return

    def __getattr__(self: Any, name: str) -> Any:
        if name == "__dict__":
            raise AttributeError(name)
        return original(self, name)

    __getattr__.hides_dict = True  # type: ignore[attr-defined]
    library.__getattr__ = __getattr__
