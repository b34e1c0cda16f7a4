"""The entry point that vLLM calls in every process, before it reads its command line."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from vllm_polarquant import compat
from vllm_polarquant.format import LOSSLESS, PRESETS

LOSSLESS_SWITCH = "VLLM_POLARQUANT_LOSSLESS"


def register() -> None:
    """Make the presets known to vLLM as KV cache dtypes. Idempotent; imports no kernels.

    With an unsupported vLLM it registers nothing and logs why: the plugin must not stop a server that
    does not use it, and vLLM itself then refuses the names.
    """
    try:
        compat.check_version()
    except compat.UnsupportedVllm as problem:
        logging.getLogger("vllm.polarquant").error("%s", problem)
        return
    names = [*PRESETS, *([LOSSLESS] if os.environ.get(LOSSLESS_SWITCH) == "1" else [])]
    compat.register_dtypes(names)
    compat.register_backend("vllm_polarquant.backend.PolarQuantBackend")
    compat.route_backends(_choose)
    compat.after_kv_cache(_prepare)
    compat.before_kv_cache(_check)
    compat.before_scheduler(_publish)
    compat.send_labels()


def _choose(selector: object) -> str:
    from vllm_polarquant.backend import backend_path

    return backend_path(selector)


def _prepare(worker: object) -> None:
    # A server that does not use the plugin has not asked for a layer of it.
    if "vllm_polarquant.layer" in sys.modules:
        from vllm_polarquant import startup

        startup.run(worker)


def _check(executor: object) -> None:
    from vllm_polarquant import announce

    announce.check(executor)


def _publish(executor: Any) -> None:
    from vllm_polarquant import announce, identity

    config = executor.vllm_config
    identities, ranks = zip(*executor.collective_rpc(_of_worker), strict=True)
    identity.publish(config, identities)
    announce.announce(config, ranks)


def _of_worker(worker: object) -> tuple[object, object]:
    from vllm_polarquant import announce, identity

    found = identity.of_worker(worker)
    identity.tell_peers(worker, found)
    return found, announce.of_worker(worker)
