"""Engines on the probe that offload their pages to files, in a child process.

vLLM copies pages to memory on GPUs only. On a CPU torch makes the copies here, through vLLM's interface of
offloading workers; the scheduler, the tiers, their keys and their files are vLLM's own.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from engine_runs import EAGER, EXACT, MODEL, text_prompts
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.factory import OffloadingSpecFactory
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

PRESET, RAW = "polarquant_k4v4", "polarquant_lossless"
PROMPT_CHARS = 3 * 300


class Copies(OffloadingWorker):
    """Copies of blocks of one group, a chunk each, that are done when they return."""

    def __init__(self, kv_caches: Any, region: SharedOffloadRegion) -> None:
        (refs,) = kv_caches.group_data_refs
        self.region = region
        self.finished: list[TransferResult] = []
        self.pairs = []
        for ref in refs:
            cache = kv_caches.tensors[ref.tensor_idx]
            blocks = cache.tensor.view(torch.int8).view(-1, cache.page_size_bytes)
            self.pairs.append((blocks, region.create_next_worker_view(cache.page_size_bytes)))

    def _done(self, job_id: int) -> bool:
        self.finished.append(TransferResult(job_id, True, 1, 1e-3))
        return True

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        for blocks, chunks in self.pairs:
            chunks[dst_spec.block_ids.tolist()] = blocks[src_spec.block_ids.tolist()]
        return self._done(job_id)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        for blocks, chunks in self.pairs:
            blocks[dst_spec.block_ids.tolist()] = chunks[src_spec.block_ids.tolist()]
        return self._done(job_id)

    def get_finished(self) -> list[TransferResult]:
        found, self.finished = self.finished, []
        return found

    def wait(self, job_ids: set[int]) -> None:
        pass

    def shutdown(self) -> None:
        self.pairs.clear()
        self.region.cleanup()


class FileSpec(TieringOffloadingSpec):
    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        region = SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        return Copies(kv_caches, region)


def files(folder: Path) -> dict[str, Any]:
    tier = {"type": "fs", "root_dir": str(folder), "n_read_threads": 2, "n_write_threads": 2}
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "TieringOffloadingSpec",
            "cpu_bytes_to_use": 32 << 20,
            "secondary_tiers": [tier],
        },
    }


def behind_multi(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": [config]},
    }


def ask(dtype: str, transfer: dict[str, Any], asks: int = 1, **options: Any) -> dict[str, Any]:
    """Greedy tokens of the same prompts, asked in turn; between turns the GPU's prefix cache is emptied."""
    from vllm import SamplingParams

    from vllm_polarquant.eval.engine import engine

    prompts = [text[:PROMPT_CHARS] for text in text_prompts(3, PROMPT_CHARS)]
    found: dict[str, Any] = {"tokens": [], "hits": []}
    before = 0
    with engine(MODEL, dtype, **EAGER, **EXACT, kv_transfer_config=transfer, **options) as llm:
        for _ in range(asks):
            outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
            found["tokens"].append([list(output.outputs[0].token_ids) for output in outputs])
            hits = sum(
                metric.value
                for metric in llm.get_metrics()
                if metric.name == "vllm:external_prefix_cache_hits"
            )
            found["hits"].append(hits - before)
            before = hits
            # Files are written by threads.
            time.sleep(0.5)
            llm.reset_prefix_cache()
        config = llm.llm_engine.vllm_config.cache_config
        found["labels"] = {
            name: value for name, value in config.metrics_info().items() if name.startswith("polarquant_")
        }
    return found


def tiers(name: str) -> dict[str, Any]:
    """One folder, read by engines to which its files mean the same, and by others."""
    from vllm_polarquant.startup import OFF

    if not torch.cuda.is_available():
        OffloadingSpecFactory._registry["TieringOffloadingSpec"] = lambda: FileSpec
    folder = Path(name)
    found = {"raw": ask(RAW, files(folder), asks=2)}
    found["raw behind MultiConnector"] = ask(RAW, behind_multi(files(folder)))
    found["written"] = ask(PRESET, files(folder), asks=2)
    found["read"] = ask(PRESET, files(folder))
    found["not centred"] = ask(PRESET, files(folder), additional_config=json.loads(OFF))
    found["configs"] = sorted(json.loads(path.read_text())["dtype"] for path in folder.glob("*/config.json"))
    return found
