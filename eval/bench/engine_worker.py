"""The child that boots one engine and measures all that the engine benchmark's plan asks of it."""

from __future__ import annotations

import fcntl
import math
import os
import time
from collections.abc import Iterator
from typing import Any

from vllm_polarquant.eval import isolate
from vllm_polarquant.eval.bench import engine_speculation
from vllm_polarquant.eval.report.cells import spread, value


class Prompts:
    """Random prompts; the same (name, index) is always the same tokens, other names share nothing."""

    def __init__(self, words: int) -> None:
        self.words = words

    def __call__(self, name: str, count: int, tokens: int) -> list[dict[str, list[int]]]:
        import random

        import numpy as np

        def one(index: int) -> list[int]:
            seed = random.Random(f"{name} {index}").getrandbits(64)
            return list(np.random.default_rng(seed).integers(0, self.words, tokens).tolist())

        return [{"prompt_token_ids": one(index)} for index in range(count)]


def _generate(llm: Any, prompts: list[dict[str, list[int]]], tokens: int) -> list[Any]:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    return list(llm.generate(prompts, greedy, use_tqdm=False))


def step_ms(outputs: list[Any]) -> float:
    """Time of a decode step with the whole batch in it, in ms.

    That of the request which got its first token last: by then no other still prefills.
    """
    stats = max((output.metrics for output in outputs), key=lambda s: s.first_token_ts)
    return 1000 * (stats.last_token_ts - stats.first_token_ts) / (stats.num_generation_tokens - 1)


def _seconds(llm: Any, prompts: list[dict[str, list[int]]], tokens: int = 1) -> float:
    started = time.perf_counter()
    _generate(llm, prompts, tokens)
    return time.perf_counter() - started


def _ttft_ms(output: Any) -> float:
    return 1000 * float(output.metrics.first_token_latency)


def worker_memory(worker: Any) -> dict[str, int]:
    """Bytes that the engine's process holds on the GPU, by what for; runs inside of it."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("no GPU")

    def held(tensors: Any) -> int:
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        return sum(storages.values())

    model = worker.get_model()
    return {
        "pages": held(worker.model_runner.kv_caches),
        "weights": held([*model.parameters(), *model.buffers()]),
        "allocated": torch.cuda.memory_allocated(),
        "peak": torch.cuda.max_memory_allocated(),
    }


def memory_mib(llm: Any) -> dict[str, Any]:
    """MiB on the GPU that torch holds beside weights and pages, now and at the highest so far."""
    try:
        held = llm.collective_rpc(worker_memory)[0]
    except Exception as problem:
        return {"error": f"{type(problem).__name__}: {problem}"[:200]}
    rest = held["weights"] + held["pages"]
    return {
        "pages": held["pages"] / 2**20,
        "extra": (held["allocated"] - rest) / 2**20,
        "peak": (held["peak"] - rest) / 2**20,
    }


def fitting(llm: Any, tokens: int) -> int:
    """Requests of so many tokens that the pages hold at once; one block is vLLM's own."""
    config = llm.llm_engine.vllm_config.cache_config
    return int((config.num_gpu_blocks - 1) // -(-tokens // config.block_size))


def full_memory_s(found: dict[str, Any], requests: int, cached: int, context: int, steps: int) -> float:
    """Seconds that so many requests' prefill and decode steps will take, judged by what was found before.

    found: findings of `measure`. Without a prefill rate and a step's time among them, 0.
    cached: requests whose prompts are in the prefix cache.
    """
    rates = [value(x) for name, x in found.items() if name.startswith("prefill_tokens_per_s ")]
    # A long batch's step is in proportion to its tokens.
    per_token = [
        (value(x) or 0) / math.prod(map(int, name.split(" ")[1].split("x")))
        for name, x in found.items()
        if name.startswith("tpot_ms ")
    ]
    if not rates or not rates[-1] or not per_token:
        return 0.0
    return context * ((requests - cached) / rates[-1] + requests * steps * min(per_token) / 1000)


def measure(dtype: str, plan: dict[str, Any], found: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Boot one engine and yield (name, finding) for all that the plan asks, the cheapest first.

    found: what was yielded so far, kept by the caller. By it a full memory that would take longer than is
        left of the plan's limit is not begun.
    """
    from vllm import LLM

    from vllm_polarquant.eval.engine import kv_tokens

    tokens, repeats = plan["tokens"], plan["repeats"]
    booted = time.perf_counter()
    llm = LLM(
        plan["model"],
        load_format="dummy",
        skip_tokenizer_init=True,
        kv_cache_dtype=dtype,
        max_model_len=plan["max_model_len"],
        max_num_seqs=plan["max_num_seqs"],
        seed=0,
        disable_log_stats=False,
        **plan["engine"],
    )
    yield "boot_s", time.perf_counter() - booted
    yield "kv_tokens", kv_tokens(llm)
    yield "memory_mib", memory_mib(llm)
    prompts = Prompts(llm.llm_engine.model_config.get_vocab_size())

    for context in plan["ttft"]:
        _generate(llm, prompts(f"warm {context}", 1, context), 2)
        runs = [_generate(llm, prompts(f"ttft {context} {i}", 1, context), 1) for i in range(repeats)]
        yield f"ttft_ms {context}", spread([_ttft_ms(run[0]) for run in runs])

    for batch, context in plan["prefill"]:
        times = [_seconds(llm, prompts(f"prefill {i}", batch, context)) for i in range(1 + repeats)]
        yield (
            f"prefill_tokens_per_s {batch}x{context}",
            spread([batch * context / t for t in times[1:]]),
        )

    for batch, context in plan["cells"]:
        batchful = prompts(f"cell {context}", batch, context)
        # The first run fills the pages; what the second, off the cache, compiles must not be timed.
        _generate(llm, batchful, 2)
        _generate(llm, batchful, 2)
        steps = [step_ms(_generate(llm, batchful, tokens)) for _ in range(repeats)]
        yield f"tpot_ms {batch}x{context}", spread(steps)

    for prefix, chunk in plan["ttft_prefix"]:
        start = prompts("prefix", 1, prefix)[0]["prompt_token_ids"]
        _generate(llm, [{"prompt_token_ids": start}], 1)
        chunks = []
        for i in range(1 + repeats):
            rest = prompts(f"chunk {i}", 1, chunk)[0]["prompt_token_ids"]
            output = _generate(llm, [{"prompt_token_ids": start + rest}], 1)[0]
            if output.num_cached_tokens < prefix - 256:
                raise RuntimeError(f"only {output.num_cached_tokens} of {prefix} tokens were cached")
            chunks.append(_ttft_ms(output))
        yield f"ttft_prefix_ms {prefix}x{chunk}", spread(chunks[1:])

    for context in plan["full_memory"]:
        requests = min(fitting(llm, context + tokens), plan["max_num_seqs"])
        cached = max((batch for batch, length in plan["cells"] if length == context), default=0)
        takes = full_memory_s(found, requests, min(cached, requests), context, (1 + repeats) * tokens)
        if takes > (left := plan["limit_s"] - (time.perf_counter() - booted)):
            error = f"{requests} requests would take {takes:.0f} s, {left:.0f} s are left of the limit"
            yield f"full_memory {context}", {"error": error}
            continue
        batchful = prompts(f"cell {context}", requests, context)
        filled = _seconds(llm, batchful, 2)
        rates, total = [], []
        for _ in range(repeats):
            started = time.perf_counter()
            outputs = _generate(llm, batchful, tokens)
            total.append(requests * tokens / (time.perf_counter() - started))
            rates.append(1000 * requests / step_ms(outputs))
        yield (
            f"full_memory {context}",
            {
                "requests": requests,
                "tokens_per_s": spread(rates),
                "with_scheduling_tokens_per_s": spread(total),
                "fill_s": filled,
                "preemptions": sum(output.metrics.num_preemptions for output in outputs),
            },
        )
    yield "memory_mib after", memory_mib(llm)


def measure_in_turn(job: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """`engine_speculation.measure`, booting beside others' boots and measuring while nobody else does either.

    job: with the file "turn", locked for it.
    """
    speculation = engine_speculation.Speculation(*job["speculation"])
    with open(job["turn"], "a", encoding="utf-8") as turn:
        fcntl.flock(turn, fcntl.LOCK_SH)

        def alone() -> None:
            fcntl.flock(turn, fcntl.LOCK_UN)
            fcntl.flock(turn, fcntl.LOCK_EX)

        try:
            yield from engine_speculation.measure(job["dtype"], job["plan"], speculation, alone)
        finally:
            # The engine's process may have inherited the file.
            fcntl.flock(turn, fcntl.LOCK_UN)


def work(job: dict[str, Any], report: isolate.Report) -> None:
    """`isolate.report_all` of what `measure` or `measure_in_turn` finds."""
    found: dict[str, Any] = {}

    def keep(finding: Any) -> None:
        found[finding[0]] = finding[1]
        report(finding)

    measured = measure_in_turn(job) if job["speculation"] else measure(job["dtype"], job["plan"], found)
    isolate.report_all(measured, keep)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Lets memory_mib send its function to the engine's process, which this process started.
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    isolate.serve(work)
