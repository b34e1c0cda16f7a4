"""Boot a vLLM engine on a model, run it, and take it down again, several times in one process."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM


def use_in_process_engine() -> None:
    """Run engine and scheduler in this process; must be called before vllm is imported."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # No model here comes from a hub, and looking for one delays a start without a network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


@contextmanager
def engine(model: str, kv_cache_dtype: str, **options: Any) -> Iterator[LLM]:
    """An offline engine, shut down on leaving; options are vLLM's EngineArgs."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    # vLLM collects garbage several times a start, and to look through what is imported takes a second.
    gc.freeze()
    try:
        llm = LLM(model, kv_cache_dtype=kv_cache_dtype, **options)
    except BaseException:
        gc.unfreeze()
        raise
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        # Collects garbage, too.
        cleanup_dist_env_and_memory()


def kv_tokens(llm: LLM) -> int:
    """Tokens that fit the engine's KV cache, as its start-up log says."""
    config = llm.llm_engine.vllm_config.cache_config
    return int(config.num_gpu_blocks) * int(config.block_size)
