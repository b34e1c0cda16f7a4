"""What an engine's cache is, in one line of its log; refusals that only all layers together can show.

The engine core asks each worker for its layers (`of_worker`), so that there is one line an engine, whatever
its ranks, groups of layers and draft models are. How many times the tokens of `auto` fit is counted as vLLM
counts: by the specs that the same layers would have, in vLLM's groups and block sizes, in the same memory.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from vllm_polarquant.format import is_polar_dtype
from vllm_polarquant.support import NO_LAYER, OWN_BACKEND, Hit, ranges, refuse, unknown_skips

logger = logging.getLogger("vllm.polarquant")

CPU_BLOCK_SIZE = 128
"""What vLLM's CPU platform takes where --block-size is not given."""

Kind = Literal["quantised", "native", "state", "shared"]


@dataclass(frozen=True)
class Layer:
    """One layer as one device holds it.

    kind: ``quantised``, ``native`` (16 bits), ``state`` (of fixed size) or ``shared`` (another's cache).
    dtype: as the layer has it. token_bytes: of one token, where there are tokens.
    own_backend: the class that the model brings, where that is to read our dtype.
    """

    kind: Kind
    dtype: str = ""
    token_bytes: int = 0
    own_backend: str = ""


@dataclass(frozen=True)
class Rank:
    """One worker's part.

    layers: by name. pages: ids of the page formats in use. nbytes: of its cache.
    auto: vLLM's specs of the layers with `auto`; none where they are not known.
    """

    layers: dict[str, Layer]
    pages: tuple[str, ...]
    nbytes: int
    auto: dict[str, Any]


def layers_of(worker: Any) -> dict[str, Layer]:
    """The layers of a worker whose model is there, by name."""
    config = worker.vllm_config
    return {name: _describe(layer, config) for name, layer in _attention(config).items()}


def of_worker(worker: Any) -> Rank:
    """The layers of a worker that has its cache."""
    from vllm_polarquant.page import page_of

    config, layers = worker.vllm_config, layers_of(worker)
    pages = set()
    for name, layer in _attention(config).items():
        if layers[name].kind == "quantised":
            pages.add(page_of(layer.kv_cache, layer.impl.shape.slot).cache_id(layer.impl.ops.order))
    sizes = [tensor.size for tensor in worker.model_runner.kv_cache_config.kv_cache_tensors]
    try:
        auto = specs_of(as_dtype(config, "auto"))
    except Exception as problem:
        logger.debug("what auto would have is unknown: %r", problem)
        auto = {}
    return Rank(layers, tuple(sorted(pages)), max(sizes, default=0), auto)


def check(executor: Any) -> None:
    """Refuse an engine whose layers would not take the dtype, before its memory is measured.

    Raises:
        support.Refused: if no layer takes it, or the model brings its own backend for one.
        ValueError: if --kv-cache-dtype-skip-layers names a layer that is not there.
    """
    config = executor.vllm_config
    layers = _joined(executor.collective_rpc(layers_of))
    dtype = config.cache_config.cache_dtype
    for layer in layers.values():
        if layer.own_backend:
            raise refuse(layer.dtype, Hit(OWN_BACKEND, {"value": layer.own_backend}))
    if is_polar_dtype(dtype) and not any(layer.dtype == dtype for layer in layers.values()):
        raise refuse(dtype, NO_LAYER)
    indices = {_place(name)[1] for name in layers}
    skips = config.cache_config.kv_cache_dtype_skip_layers or []
    if unknown := unknown_skips(skips, max(indices, default=-1) + 1):
        raise ValueError(
            f"--kv-cache-dtype-skip-layers {unknown[0]} names no layer of this model; give numbers below "
            f"{max(indices) + 1}, or sliding_window"
        )


def announce(config: Any, ranks: Sequence[Rank]) -> None:
    """Log the line of an engine whose workers have their caches."""
    logger.info("%s", line(config, ranks))


def line(config: Any, ranks: Sequence[Rank]) -> str:
    """Dtype, bytes, tokens that fit, how many times those of `auto` they are, which layers are which."""
    layers = _joined(rank.layers for rank in ranks)
    mine = [layer for layer in layers.values() if layer.kind == "quantised"]
    cached = [layer for layer in layers.values() if layer.kind in ("quantised", "native")]
    pages = sorted({page for rank in ranks for page in rank.pages})
    tokens = config.cache_config.kv_cache_size_tokens
    fit = f"{tokens:,} tokens fit"
    try:
        fit += f", {tokens / auto_tokens(config, ranks):.2f} times those of auto"
    except Exception as problem:
        # A server must not stop for want of a comparison.
        logger.debug("auto's tokens are unknown: %r", problem)
    told = {
        "quantised layers": _named(layers, "quantised"),
        "native layers": _named(layers, "native") or "none",
        "layers with a state": _named(layers, "state"),
        "layers that share another's cache": _named(layers, "shared"),
    }
    return (
        f"{', '.join(sorted({layer.dtype for layer in mine}))} (page format {', '.join(pages)}): "
        f"{sum(layer.token_bytes for layer in cached):,} bytes a token, {fit}; "
        + "; ".join(f"{kind}: {which}" for kind, which in told.items() if which)
    )


def auto_tokens(config: Any, ranks: Sequence[Rank]) -> int:
    """Tokens that would fit in the same memory with `auto`, as vLLM would say at start-up."""
    specs = [(rank.auto, rank.nbytes) for rank in ranks if rank.auto]
    return tokens_that_fit(as_dtype(config, "auto"), specs)


def tokens_that_fit(config: Any, ranks: list[tuple[dict[str, Any], int]]) -> int:
    """Tokens that fit, as vLLM says at start-up.

    Args:
        config: vLLM's, whose cache_config knows the layout of the cache.
        ranks: of each worker the specs of its layers, by name, and the bytes of its cache.
    """
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

    from vllm_polarquant.compat import cache_planning

    vllm = cache_planning()
    config = copy.copy(config)
    config.cache_config = copy.copy(config.cache_config)
    merged = {name: spec for specs, _ in ranks for name, spec in specs.items()}
    config.cache_config.block_size = _block_size(merged) or config.cache_config.block_size
    with _quiet():
        groups = vllm.get_kv_cache_groups(config, merged)
        caches = [
            vllm.get_kv_cache_config_from_groups(
                config, vllm._project_kv_cache_groups_to_worker(groups, specs), nbytes
            )
            for specs, nbytes in ranks
        ]
        least = min(caches, key=lambda cache: cache.num_blocks)
        return int(get_kv_cache_capacity(config, least)[0])


def _block_size(specs: dict[str, Any]) -> int | None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return next((spec.block_size for spec in specs.values() if isinstance(spec, FullAttentionSpec)), None)


def _attention(config: Any) -> dict[str, Any]:
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    return get_layers_from_vllm_config(config, AttentionLayerBase)


def _describe(layer: Any, config: Any) -> Layer:
    from vllm.v1.kv_cache_interface import AttentionSpec
    from vllm.v1.worker.utils import customize_attention_spec

    from vllm_polarquant.compat import BACKEND_NAME

    dtype = str(getattr(layer, "kv_cache_dtype", ""))
    backend = layer.get_attn_backend()
    ours = is_polar_dtype(dtype)
    if ours and backend.get_name() != BACKEND_NAME:
        return Layer("native", dtype, own_backend=backend.__name__)
    if getattr(layer, "kv_sharing_target_layer_name", None):
        return Layer("shared", dtype)
    spec = layer.get_kv_cache_spec(config)
    if not isinstance(spec, AttentionSpec):
        return Layer("state")
    spec = customize_attention_spec(backend, spec)
    return Layer("quantised" if ours else "native", dtype, spec.real_page_size_bytes // spec.block_size)


def as_dtype(config: Any, dtype: str) -> Any:
    """The config as it would be with one of vLLM's dtypes, its layers with vLLM's own backends.

    The config itself and its layers stay as they are. With `auto` no layer is skipped.
    """
    from vllm.config import set_current_vllm_config
    from vllm.platforms import current_platform

    other = copy.copy(config)
    other.cache_config = cache = copy.copy(config.cache_config)
    cache.cache_dtype = dtype
    if dtype == "auto":
        cache.kv_cache_dtype_skip_layers = []
    cache.mamba_page_size_padded = cache.skip_page_size_padded = cache.num_gpu_blocks_override = None
    if not cache.user_specified_block_size:
        cache.block_size = CPU_BLOCK_SIZE if current_platform.is_cpu() else type(cache).DEFAULT_BLOCK_SIZE
    other.compilation_config = copy.copy(config.compilation_config)
    with _quiet(), set_current_vllm_config(other):
        layers = config.compilation_config.static_forward_context
        other.compilation_config.static_forward_context = {
            name: _layer_as(layer, dtype, config.model_config.dtype) for name, layer in layers.items()
        }
        type(current_platform).update_block_size_for_backend(other)
    return other


def _layer_as(layer: Any, dtype: str, model_dtype: Any) -> Any:
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
    from vllm.v1.attention.selector import get_attn_backend

    if not is_polar_dtype(getattr(layer, "kv_cache_dtype", None)):
        return layer
    other = copy.copy(layer)
    other.kv_cache_dtype = dtype
    other.kv_cache_torch_dtype = model_dtype if dtype == "auto" else STR_DTYPE_TO_TORCH_DTYPE[dtype]
    # Not every platform has a backend for every dtype, but all of them have pages of the same size.
    other.attn_backend = get_attn_backend(
        layer.head_size,
        model_dtype,
        "auto",
        has_sink=layer.has_sink,
        use_mm_prefix=layer.use_mm_prefix,
        attn_type=layer.attn_type,
        has_sliding_window=layer.sliding_window is not None,
    )
    return other


def specs_of(config: Any) -> dict[str, Any]:
    """vLLM's specs of the layers that have a cache or a state, by name."""
    from vllm.v1.kv_cache_interface import AttentionSpec
    from vllm.v1.worker.utils import customize_attention_spec

    specs = {}
    for name, layer in _attention(config).items():
        if getattr(layer, "kv_sharing_target_layer_name", None):
            continue
        if spec := layer.get_kv_cache_spec(config):
            paged = isinstance(spec, AttentionSpec)
            specs[name] = customize_attention_spec(layer.get_attn_backend(), spec) if paged else spec
    return specs


def _joined(ranks: Iterable[dict[str, Layer]]) -> dict[str, Layer]:
    """The layers of all ranks; those of tensor-parallel ranks have the same names."""
    return {name: layer for rank in ranks for name, layer in rank.items()}


def _place(name: str) -> tuple[str, int]:
    """Whose layer it is (what stands before its number) and its number."""
    before: list[str] = []
    for part in name.split("."):
        if part.isdigit():
            return ".".join(before), int(part)
        before.append(part)
    return "", -1


def _named(layers: dict[str, Layer], kind: Kind) -> str:
    """Numbers of the layers of a kind; those of a draft model, which counts from 0 again, apart."""
    owners = dict.fromkeys(_place(name)[0] for name in layers)
    numbers = {owner: {index for who, index in map(_place, layers) if who == owner} for owner in owners}
    main = next(iter(owners), "")
    found: dict[str, set[int]] = {}
    for name, layer in layers.items():
        if layer.kind == kind:
            owner, index = _place(name)
            again = owner != main and numbers[owner] & numbers[main]
            found.setdefault(f"{owner}." if again else "", set()).add(index)
    return ", ".join(owner + ranges(indices) for owner, indices in found.items())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without vLLM's log of what is only a comparison."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
