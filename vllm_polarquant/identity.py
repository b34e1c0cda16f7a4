"""What names the contents of a KV cache, so that bytes of one meaning are never read as another's.

vLLM's keys of blocks that leave the GPU hold the dtype's name, and so does what peers compare; it says
neither a page's format nor the tables that its keys were centred with. Workers know both once the pass at
start-up is over. The engine core asks them before it makes its scheduler, and so before anything looks for
blocks or listens for peers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from vllm_polarquant import compat

NAME = "cache_identity"
"""The label that keys of offloaded blocks hold."""


class Identity(NamedTuple):
    """Of the pages of one worker, or of all.

    pages: ids of the page formats in use, sorted (`Page.cache_id`).
    name: changes with whatever decides what the bytes of pages mean (formats, layers, tables, dtype), and
        with the option that decides which of two ways they are computed.
    energy_removed: by layer, the share of its keys' energy that centres take away; none for layers whose
        keys are not centred.
    """

    pages: tuple[str, ...]
    name: str
    energy_removed: tuple[float, ...] = ()

    def labels(self) -> dict[str, str]:
        """What stands, each behind polarquant_, beside vLLM's own in the metric vllm:cache_config_info."""
        removed = self.energy_removed
        return {
            "page_format": ",".join(self.pages),
            NAME: self.name,
            "key_energy_removed": f"{sum(removed) / len(removed):.3f}" if removed else "",
        }


def of_worker(worker: Any) -> Identity | None:
    """What a worker's pages are, once its keys are centred; None if no layer of it is ours."""
    from vllm_polarquant.centring import fingerprint
    from vllm_polarquant.page import page_of
    from vllm_polarquant.settings import Settings
    from vllm_polarquant.startup import own_layers

    layers = sorted(own_layers(worker.vllm_config))
    if not layers:
        return None
    pages, removed = {}, []
    for name, layer in layers:
        impl = layer.impl
        pages[name] = page_of(layer.kv_cache, impl.shape.slot).cache_id(impl.ops.order)
        if impl.energy_removed is not None:
            removed.append(impl.energy_removed)
    # What a layer stores depends on what the layers before it attended to.
    from_pages = Settings.of(worker.vllm_config.additional_config).prefill_from_pages
    dtypes = [str(layer.impl.shape.dtype) for _, layer in layers]
    tables = fingerprint(layer.impl.tables for _, layer in layers)
    name = _name(json.dumps([pages, dtypes, tables, from_pages]))
    return Identity(tuple(sorted(set(pages.values()))), name, tuple(removed))


def joined(ranks: Iterable[Identity | None]) -> Identity | None:
    """One identity of all ranks, in their order; None if no rank has a layer of ours."""
    found = [rank for rank in ranks if rank is not None]
    if len(found) < 2:
        return found[0] if found else None
    return Identity(
        tuple(sorted({page for rank in found for page in rank.pages})),
        _name(json.dumps([rank.name for rank in found])),
        tuple(share for rank in found for share in rank.energy_removed),
    )


def tell_peers(worker: Any, identity: Identity | None) -> None:
    """Let a worker's peers, those of its rank in other engines of as many ranks, compare its identity."""
    if identity is not None:
        ranks = worker.vllm_config.parallel_config.world_size
        compat.name_to_peers(f"{identity.name}-{ranks}")


def _name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def publish(config: Any, ranks: Iterable[Identity | None]) -> None:
    """Put the identity of an engine's pages into its metrics and into the keys of what it offloads.

    config: the engine core's VllmConfig; ranks: of its workers.
    """
    identity = joined(ranks)
    if identity is None:
        return
    for label, value in identity.labels().items():
        setattr(config.cache_config, compat.LABEL_PREFIX + label, value)
    if config.kv_transfer_config is not None:
        compat.name_offloaded(NAME)
