"""Random serving of the shipped model, and every answer compared with the same request alone.

    python -m vllm_polarquant.eval.soak --kv-cache-dtype polarquant_k4v4 --requests 1000
    python -m vllm_polarquant.eval.soak --requests 1000 --seconds 500 --compare-every 20

Requests arrive and are aborted at random, share prefixes, are preempted as the cache is small, stop at
strings, draft by n-grams and draw several samples, in an order that the seed decides. Afterwards greedy ones
are asked again alone, in an empty cache: their tokens must be the same up to a near-tie, their logprobs
close. No logprob may be infinite or NaN, every block is free again at the end, and memory does not grow. With
--seconds that is repeated with other requests until the time is over.

Prompts attend to what they stored (`prefill_from_pages`), as else a cached prefix gives other text by design.
"""

from __future__ import annotations

import functools
import json
import math
import os
import random
import resource
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer

from vllm_polarquant.eval.command import FAILED, end_on_sigterm, fail
from vllm_polarquant.eval.dtypes import check_names
from vllm_polarquant.eval.engine import engine, use_in_process_engine
from vllm_polarquant.eval.probe.episodes import MODEL_DIR, load_heldout
from vllm_polarquant.format import DEFAULT_PRESET, PRESETS
from vllm_polarquant.settings import SECTION

COMMAND = "python -m vllm_polarquant.eval.soak"
MAX_LEN, BLOCK_SIZE, BLOCKS, SEQS = 256, 32, 16, 8
"""A pool that holds fewer tokens than eight requests may have, so that some are preempted."""

NEAR_TIE, CODED_NEAR_TIE = 0.04, 0.2
"""Logprobs that are nearer may change their order with the order of additions, in float16; the second where
what differs in the last bit may be stored as another code."""

GROWTH_MIB = 64
"""Of memory in the second half of a run: allocators keep some, a leak keeps more the longer it runs."""

MOST_WRONG = 100
"""Lines that are kept of what is wrong; a run that has more ends."""


@dataclass
class Asked:
    """A request, and what came of it.

    tokens, logprobs: of its first sample; of each token the logprobs of the likeliest two, in order.
    """

    name: str
    prompt: list[int]
    params: dict[str, Any]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    aborted: bool = False
    finite: bool = True

    @property
    def greedy(self) -> bool:
        return self.params["temperature"] == 0

    def take(self, output: Any) -> None:
        for sample in output.outputs:
            ranked = [
                sorted((p.logprob for p in top.values()), reverse=True) for top in sample.logprobs or ()
            ]
            self.finite &= all(map(math.isfinite, (logprob for top in ranked for logprob in top)))
            if sample.index == 0:
                self.tokens, self.logprobs = list(sample.token_ids), ranked


@functools.cache
def _texts() -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(MODEL_DIR))
    return [tokenizer.encode(row["text"])[: MAX_LEN - 32] for row in load_heldout()[:6]]


def requests(count: int, seed: int, sampled: bool) -> list[Asked]:
    """Requests of the shipped model, many with the beginning of others.

    sampled: whether some are not greedy.
    """
    rng = random.Random(f"soak {seed}")
    texts = _texts()
    found = []
    for number in range(count):
        text = rng.choice(texts)
        prompt = text[: rng.randint(1, len(text) - 1)] if rng.random() < 0.8 else text[-rng.randint(1, 40) :]
        params: dict[str, Any] = {
            "temperature": 0.0,
            "max_tokens": rng.randint(1, 16),
            "logprobs": 2,
            "ignore_eos": rng.random() < 0.5,
        }
        if sampled and rng.random() < 0.2:
            params |= {"temperature": 0.8, "n": rng.randint(1, 3)}
        if rng.random() < 0.3:
            params["stop"] = rng.choice(["\n", ")", " = ", "return"])
        found.append(Asked(str(number), prompt, params))
    return found


def _add(running: Any, asked: Asked, name: str) -> None:
    from vllm import SamplingParams

    running.add_request(name, {"prompt_token_ids": asked.prompt}, SamplingParams(**asked.params))


def _memory_mib() -> float:
    """Of this process, on the host and on a GPU."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    on_gpu = torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
    return (pages * resource.getpagesize() + on_gpu) / 2**20


def serve(running: Any, asked: list[Asked], seed: int, memory: list[float]) -> int:
    """Ask all of them in a random order of arrivals and aborts: the number of steps.

    memory: gets four values, MiB, while they are served.
    """
    rng = random.Random(f"arrivals {seed}")
    waiting, now, steps = list(asked), dict[str, Asked](), 0
    marks = [len(asked) * (3 - quarter) // 4 for quarter in range(4)]
    while waiting or now:
        # Bursts, and between them pauses in which the engine runs dry.
        for _ in range(rng.choice((0, 0, 0, 1, 2, 8)) if waiting else 0):
            if waiting:
                new = waiting.pop(0)
                now[new.name] = new
                _add(running, new, new.name)
        if now and rng.random() < 0.03:
            name = rng.choice(sorted(now))
            now.pop(name).aborted = True
            running.abort_request([name])
        steps += 1
        for output in running.step():
            if output.request_id in now:
                now[output.request_id].take(output)
                if output.finished:
                    del now[output.request_id]
        while marks and len(waiting) <= marks[0] and (waiting or not now):
            marks.pop(0)
            memory.append(_memory_mib())
    return steps


def alone(llm: Any, asked: Asked) -> Asked:
    """The same request in an empty cache."""
    running = llm.llm_engine
    assert llm.reset_prefix_cache()
    again = Asked(asked.name, asked.prompt, asked.params)
    _add(running, again, f"alone {asked.name}")
    while running.has_unfinished_requests():
        for output in running.step():
            again.take(output)
    return again


def difference(asked: Asked, again: Asked, near: float) -> str:
    """Why two answers are not the same; "" if they are, up to ties of logprobs that are so near."""
    have, want = asked.tokens, again.tokens
    same = next((i for i, (a, b) in enumerate(zip(have, want, strict=False)) if a != b), None)
    for i, (mine, theirs) in enumerate(zip(asked.logprobs[:same], again.logprobs[:same], strict=False)):
        if abs(mine[0] - theirs[0]) > near:
            return f"token {i} has logprob {mine[0]:.3f}, alone {theirs[0]:.3f}"
    if same is not None:
        first, second = again.logprobs[same][:2]
        return "" if first - second < near else f"token {same} is {have[same]}, alone {want[same]}"
    if len(have) > len(want) or (len(have) < len(want) and not asked.aborted):
        return f"{len(have)} tokens, alone {len(want)}"
    return ""


def _counters(llm: Any) -> dict[str, int]:
    names = ("num_preemptions", "prefix_cache_hits", "spec_decode_num_accepted_tokens")
    return {
        name: sum(int(metric.value) for metric in llm.get_metrics() if metric.name == f"vllm:{name}")
        for name in names
    }


def soak(
    dtype: str,
    count: int,
    seed: int,
    options: dict[str, Any],
    near: float | None = None,
    seconds: float = 0,
    every: int = 1,
) -> dict[str, Any]:
    """Serve and compare; counts of what happened, and a line for everything that is wrong.

    count: requests a round; there is one round at least, and others while `seconds` are not over.
    every: of so many greedy requests one is asked again alone.
    """
    settings = {
        "dtype": "float16",
        "enforce_eager": True,
        "max_model_len": MAX_LEN,
        "block_size": BLOCK_SIZE,
        "num_gpu_blocks_override": BLOCKS,
        "kv_cache_memory_bytes": 64 << 20,
        "max_num_seqs": SEQS,
        "max_num_batched_tokens": 192,
        "disable_log_stats": False,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
        "additional_config": {SECTION: {"prefill_from_pages": True}},
    }
    settings |= options
    if near is None:
        near = CODED_NEAR_TIE if dtype in PRESETS else NEAR_TIE
    # vLLM's CPU build drafts wrong tokens for greedy requests beside others, with any dtype.
    sampled = settings["speculative_config"] is None or torch.cuda.is_available()
    total: Counter[str] = Counter()
    wrong: list[str] = []
    memory: list[float] = []
    with engine(str(MODEL_DIR), dtype, **settings) as llm:
        began, rounds = time.monotonic(), 0
        while not rounds or (time.monotonic() - began < seconds and len(wrong) < MOST_WRONG):
            asked = requests(count, seed + rounds, sampled)
            before = _counters(llm)
            total["steps"] += serve(llm.llm_engine, asked, seed + rounds, memory)
            total.update(_counters(llm))
            total.subtract(before)
            if not llm.reset_prefix_cache():
                wrong.append("blocks are still in use after the last request")
            greedy = [one for one in asked if one.greedy and one.tokens][::every]
            compared = [(one, alone(llm, one)) for one in greedy]
            problems = [(one, difference(one, again, near)) for one, again in compared]
            problems += [(one, "a logprob is not finite") for one in asked if not one.finite]
            problems += [(one, "no tokens") for one in asked if not (one.tokens or one.aborted)]
            wrong += [f"seed {seed + rounds}, request {one.name}: {why}" for one, why in problems if why]
            total.update(
                {
                    "requests": len(asked),
                    "aborted": sum(one.aborted for one in asked),
                    "samples": sum(one.params.get("n", 1) for one in asked),
                    "tokens": sum(len(one.tokens) for one in asked),
                    "compared": len(compared),
                    "the same to the last token": sum(one.tokens == again.tokens for one, again in compared),
                }
            )
            rounds += 1
    quarters = [memory[len(memory) * quarter // 4 - 1] for quarter in range(1, 5)]
    if quarters[3] - quarters[1] > GROWTH_MIB:
        wrong.append(f"memory grew by {quarters[3] - quarters[1]:.0f} MiB in the second half")
    return {
        **total,
        "seconds": round(time.monotonic() - began, 1),
        "memory after each quarter, MiB": [round(found) for found in quarters],
        "wrong": wrong,
    }


def main(
    kv_cache_dtype: Annotated[str, typer.Option(help="A --kv-cache-dtype.")] = DEFAULT_PRESET,
    count: Annotated[int, typer.Option("--requests", help="How many.", min=2)] = 200,
    seed: Annotated[int, typer.Option(help="Of requests, arrivals and aborts.", min=0)] = 0,
    options: Annotated[
        str, typer.Option("--engine", help="More of vLLM's EngineArgs, a JSON object.")
    ] = "{}",
    near: Annotated[
        float | None, typer.Option(help="Logprobs nearer than this count as the same.", min=0)
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="Go on with other requests, as many at a time, for so long.", min=0)
    ] = 0,
    every: Annotated[
        int, typer.Option("--compare-every", help="Of so many greedy requests ask one again alone.", min=1)
    ] = 1,
) -> None:
    """Print what happened as JSON; exits with 1 if an answer is another than alone."""
    end_on_sigterm(COMMAND)
    try:
        check_names([kv_cache_dtype])
        more = dict(json.loads(options))
    except (TypeError, ValueError) as problem:
        fail(COMMAND, problem)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    use_in_process_engine()
    found = soak(kv_cache_dtype, count, seed, more, near, seconds, every)
    typer.echo(json.dumps(found, indent=1))
    if found["wrong"]:
        raise typer.Exit(FAILED)


if __name__ == "__main__":
    typer.run(main)
