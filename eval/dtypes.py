"""Which --kv-cache-dtype names this machine can compare, and what a token takes with each.

vLLM is asked, not copied: its `CacheDType` lists the names, its platform says which attention backend serves
one here, and that backend's page specification says how many bytes it takes.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vllm_polarquant.check import Shape
from vllm_polarquant.eval import isolate
from vllm_polarquant.format import PRESETS, is_polar_dtype
from vllm_polarquant.page import BLOCK_SIZE_MULTIPLE

BASELINE = "auto"
"""What every dtype is compared with: keys and values in the model's own 16 bits."""

ALL = "all"
"""Stands for every name that this machine can run: `--kv-cache-dtypes all`."""

EVERY_LAYER = "@every-layer"
"""Suffix of TurboQuant's names. vLLM keeps the first and the last two layers of a model in 16 bits beside
them (`TurboQuantConfig.get_boundary_skip_layers`), four of the probe's five, and no engine option
changes it: `kv_cache_dtype_skip_layers` only adds to these. With the suffix every layer is quantised."""

_SAME = {"float16": "auto", "bfloat16": "auto", "fp8_e4m3": "fp8"}
_PACKED = ("turboquant_", "ultraquant_")


def is_turboquant(name: str) -> bool:
    return name.startswith("turboquant_")


def bare(name: str) -> str:
    """The name as vLLM knows it."""
    return name.removesuffix(EVERY_LAYER)


def vllm_names() -> list[str]:
    """vLLM's own names, in its order."""
    from vllm.config.cache import CacheDType

    return [name for name in typing.get_args(CacheDType) if not is_polar_dtype(name)]


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError for the first name that neither this package nor vLLM has."""
    known = [BASELINE, *PRESETS]
    for name in names:
        if is_polar_dtype(name) or name == BASELINE:
            continue
        # vLLM takes seconds to import: it is asked only about names that could be its own.
        if not name.startswith("polarquant"):
            known = [*vllm_names(), *PRESETS]
        if bare(name) not in known or (bare(name) != name and not is_turboquant(name)):
            close = difflib.get_close_matches(name, known, 1, 0.4)
            raise ValueError(
                f"no --kv-cache-dtype {name!r}; did you mean {close[0]}?"
                if close
                else f"no --kv-cache-dtype {name!r}; there are {', '.join(known)}"
            )


def _backend(name: str, head_dim: int) -> Any:
    """The attention backend that serves a name here, as an engine would find it.

    Raises:
        ValueError: with vLLM's reason, if none does.
    """
    import torch
    from vllm.platforms import current_platform
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.selector import AttentionSelectorConfig

    wanted = AttentionSelectorConfig(head_dim, torch.float16, name, None)
    path = current_platform.get_attn_backend_cls(None, wanted)
    backend = resolve_obj_by_qualname(path)
    # The CPU platform has one backend for every name, and that one would not notice.
    if not backend.supports_kv_cache_dtype(name):
        raise ValueError(f"{backend.get_name()}, the only backend of this platform, does not support it")
    if current_platform.is_cpu() and name.startswith("fp8"):
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        try:
            _get_attn_isa(torch.float16, BLOCK_SIZE_MULTIPLE, head_dim, name)
        except NotImplementedError as problem:
            raise ValueError(str(problem)) from None
    return backend


def _reason(problem: Exception) -> str:
    """vLLM's refusal without the long list of its arguments."""
    words = " ".join(str(problem).split())
    _, found, reasons = words.partition("Reasons: ")
    return f"no attention backend: {reasons.strip('{}.')}" if found else words


def runnable(head_dim: int) -> tuple[list[str], dict[str, str]]:
    """Names that can be compared on this machine, auto first and ours last, and why each other cannot."""
    names, left_out = [], {}
    for name in vllm_names():
        if name in _SAME:
            left_out[name] = f"the same as {_SAME[name]}"
            continue
        try:
            _backend(name, head_dim)
        except Exception as problem:
            left_out[name] = _reason(problem)
            continue
        names.append(name)
        if is_turboquant(name):
            names.append(name + EVERY_LAYER)
    return [*names, *PRESETS], left_out


def ask_runnable(head_dim: int) -> tuple[list[str], dict[str, str]]:
    """`runnable`, in a process of its own, as vLLM's backends may take memory on the GPU to answer.

    Raises:
        RuntimeError: with the last line of what it printed, if it failed.
    """
    with TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        env = {"VLLM_LOGGING_LEVEL": "ERROR"}
        with isolate.Child(isolate.module(__name__), head_dim, env=env, log=log) as child:
            try:
                names, left_out = child.report()
            except isolate.Ended as ended:
                lines = log.read_text(encoding="utf-8").strip().splitlines() or [str(ended)]
                raise RuntimeError(f"vLLM's dtypes cannot be listed: {lines[-1]}") from None
    return names, left_out


def prepare(name: str) -> str:
    """Change this process so that an engine can run `name`; returns what vLLM calls it.

    Two things no engine option reaches. Which layers TurboQuant leaves in 16 bits: see EVERY_LAYER. And the
    version of FlashAttention beside a packed cache: `EngineArgs.create_engine_config` sets
    `attention_config.flash_attn_version` to 2, over an explicit 3 too. Builds for Hopper alone have only 3,
    which works: vLLM's own reason for 2, an assertion on the layers in 16 bits, is gone since 0.32.
    """
    dtype = bare(name)
    if dtype.startswith(_PACKED):
        from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

        if dtype != name:
            TurboQuantConfig.get_boundary_skip_layers = staticmethod(lambda model_config, n=2: [])
        _use_flash_attention_3_where_2_is_missing()
    return dtype


def _use_flash_attention_3_where_2_is_missing() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported

    if is_fa_version_supported(2) or not is_fa_version_supported(3):
        return
    original = EngineArgs.create_engine_config

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        config.attention_config.flash_attn_version = 3
        return config

    EngineArgs.create_engine_config = create_engine_config


def native_layers(name: str, shape: Shape) -> int:
    """Layers that vLLM keeps in 16 bits beside a name, without being asked to."""
    if not name.startswith(_PACKED) or name.endswith(EVERY_LAYER):
        return 0
    # get_boundary_skip_layers: two at each end, at most half of the model.
    end = min(2, shape.layers // 2)
    return min(shape.layers, 2 * end)


def _slot_bytes(name: str, head_dim: int) -> int | None:
    """Bytes of a token's key and value in one kv head; None where vLLM's packing is not known here."""
    if name == "auto" or is_polar_dtype(name):
        return Shape(1, 1, head_dim, None, 1).token_bytes(name)
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

    mode = get_kv_quant_mode(name)
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE_MULTIPLE,
        num_kv_heads=1,
        head_size=head_dim,
        dtype=STR_DTYPE_TO_TORCH_DTYPE[name],
        kv_quant_mode=mode,
    )
    # Backends that pack a slot in a way of their own.
    for packs, backend in (
        (mode.is_per_token_head, AttentionBackendEnum.TRITON_ATTN),
        (mode.is_turboquant, AttentionBackendEnum.TURBOQUANT),
        (mode.is_nvfp4, AttentionBackendEnum.FLASHINFER),
        (mode.is_ultraquant, AttentionBackendEnum.__members__.get("ULTRAQUANT")),
    ):
        if packs and backend is not None:
            spec = backend.get_class().customize_spec(spec)
    return int(spec.real_page_size_bytes) // BLOCK_SIZE_MULTIPLE


def token_bytes(name: str, shape: Shape, skipped: int = 0) -> int | None:
    """Bytes of a token in all layers, `skipped` ones and those that vLLM skips itself in 16 bits.

    The content of pages; vLLM pads some where layers differ. None if vLLM does not know the name here.
    """
    try:
        slot = _slot_bytes(bare(name), shape.head_dim)
    except Exception:
        return None
    if slot is None:
        return None
    native = max(native_layers(name, shape), skipped)
    return shape.kv_heads * ((shape.layers - native) * slot + native * 4 * shape.head_dim)


if __name__ == "__main__":
    isolate.serve(lambda head_dim, report: report(runnable(head_dim)))
