"""What the engine benchmark asks of engines that speculate: the time of a verified step.

A step verifies the k drafted tokens of each request and one more, whether or not they are accepted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import typer

from vllm_polarquant.check import read_shape
from vllm_polarquant.eval.dtypes import token_bytes
from vllm_polarquant.eval.report.cells import spread
from vllm_polarquant.support import text_config

METHODS = ("ngram", "draft")
MOST = 15
"""Tokens drafted a step that presets are served with."""
WORDS = 32
"""Tokens that prompts and answers are made of: each has come before, so an n-gram is always found."""
DRAFT_LAYERS = 2

_ROOM = 128
"""Tokens that a request's blocks are rounded up to, those of the largest block among dtypes."""


class Speculation(NamedTuple):
    """How an engine drafts, and how many tokens a step."""

    method: str
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.method}:{self.tokens}"


class Step(NamedTuple):
    """A step of the engine: when it ended, in seconds, and how many tokens each request got."""

    at: float
    tokens: Sequence[int]


def parse_speculations(text: str) -> list[Speculation | None]:
    """From "none,ngram:3,draft:7"; None is an engine that does not speculate.

    Raises:
        typer.BadParameter: naming what is none of them.
    """
    found: list[Speculation | None] = []
    for part in filter(None, text.split(",")):
        method, _, tokens = part.partition(":")
        if part == "none":
            found.append(None)
        elif method in METHODS and tokens.isdecimal() and 1 <= int(tokens) <= MOST:
            found.append(Speculation(method, int(tokens)))
        else:
            ways = " or ".join(f"{each}:1 to {each}:{MOST}" for each in METHODS)
            raise typer.BadParameter(f"{part!r} is neither none nor {ways}")
    return list(dict.fromkeys(found))


def draft_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of a small model with a model's vocabulary and, so that blocks are alike, its heads."""
    text = text_config(config)
    return config | {
        "num_hidden_layers": DRAFT_LAYERS,
        "hidden_size": text["hidden_size"] // 4,
        "intermediate_size": text["intermediate_size"] // 4,
        "head_dim": read_shape(config).head_dim,
    }


def settings(speculation: Speculation, config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """vLLM's speculative_config; a draft model is put into the folder."""
    count = {"num_speculative_tokens": speculation.tokens}
    if speculation.method == "ngram":
        return {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3} | count
    (folder / "config.json").write_text(json.dumps(draft_config(config)), encoding="utf-8")
    return {"method": "draft_model", "model": str(folder)} | count


def cache_bytes(
    dtype: str,
    config: dict[str, Any],
    cells: Sequence[tuple[int, int]],
    tokens: int,
    speculation: Speculation,
) -> int:
    """Bytes of pages, a draft model's among them, that the largest cell needs.

    tokens: of a request's answer.

    Raises:
        ValueError: if it is not known how vLLM packs the dtype.
    """
    shape = read_shape(config)
    each = token_bytes(dtype, shape)
    if each is None:
        raise ValueError(f"{dtype}: the size of its pages is not known")
    # Blocks are taken for the drafts of the next step, too.
    longest = [(batch, context + tokens + 2 * (speculation.tokens + 1)) for batch, context in cells]
    held = max(batch * -(-length // _ROOM) * _ROOM for batch, length in longest)
    layers = shape.layers + (DRAFT_LAYERS if speculation.method == "draft" else 0)
    return (held + held // 100 + 2 * _ROOM) * each * layers // shape.layers


def verified(steps: Sequence[Step], batch: int) -> tuple[float, float, int]:
    """Of the steps that have the whole batch in them: their time in ms, tokens a request, how many.

    The first such step may have prefilled, so time counts from its end.

    Raises:
        ValueError: if there are fewer than two, or others between them.
    """
    whole = [number for number, step in enumerate(steps) if len(step.tokens) == batch]
    if len(whole) < 2 or whole[-1] - whole[0] != len(whole) - 1:
        raise ValueError(
            f"{len(whole)} of {len(steps)} steps, not one after the other, had all {batch} requests"
        )
    first, *rest = (steps[number] for number in whole)
    made = sum(sum(step.tokens) for step in rest)
    return 1000 * (rest[-1].at - first.at) / len(rest), made / (batch * len(rest)), len(rest)


def _steps(llm: Any, prompts: list[list[int]], tokens: int) -> list[Step]:
    """The engine's steps until all requests have their tokens."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    params = SamplingParams(
        temperature=0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        allowed_token_ids=list(range(WORDS)),
        output_kind=RequestOutputKind.DELTA,
    )
    for prompt in prompts:
        engine.add_request(str(next(llm.request_counter)), tokens_input(prompt), params)
    steps = []
    while engine.has_unfinished_requests():
        outputs = engine.step()
        if outputs:
            made = [len(output.outputs[0].token_ids) for output in outputs]
            steps.append(Step(time.perf_counter(), made))
    return steps


def _drafted(llm: Any) -> int:
    """Tokens drafted so far."""
    counters = {metric.name: metric for metric in llm.get_metrics()}
    return int(counters["vllm:spec_decode_num_draft_tokens"].value)


def measure(
    dtype: str, plan: dict[str, Any], speculation: Speculation, turn: Callable[[], None]
) -> Iterator[tuple[str, Any]]:
    """Boot one engine that speculates and yield (name, finding) of each of the plan's cells.

    turn: called when the engine stands; returns when nothing else runs on the device.
    """
    import numpy as np
    from vllm import LLM

    tokens, repeats, cells = plan["tokens"], plan["repeats"], plan["cells"]
    config = json.loads((Path(plan["model"]) / "config.json").read_text(encoding="utf-8"))
    # A step of the draft model has one token a request.
    sizes = sorted({batch * queries for batch, _ in cells for queries in (1, speculation.tokens + 1)})
    booted = time.perf_counter()
    with TemporaryDirectory() as folder:
        options = {
            # Room beside other engines: the pages' size is given.
            "gpu_memory_utilization": 0.05,
            "kv_cache_memory_bytes": cache_bytes(dtype, config, cells, tokens, speculation),
            "compilation_config": {"cudagraph_capture_sizes": sizes},
        }
        given = {name: value for name, value in plan["engine"].items() if name != "gpu_memory_utilization"}
        given["compilation_config"] = options["compilation_config"] | given.get("compilation_config", {})
        llm = LLM(
            plan["model"],
            load_format="dummy",
            skip_tokenizer_init=True,
            kv_cache_dtype=dtype,
            max_model_len=max(context for _, context in cells) + tokens + speculation.tokens + 1,
            max_num_seqs=max(batch for batch, _ in cells),
            seed=0,
            disable_log_stats=False,
            speculative_config=settings(speculation, config, Path(folder)),
            **options | given,
        )
    yield "boot_s", time.perf_counter() - booted
    turn()
    for batch, context in cells:
        random = np.random.default_rng(context)
        prompts = random.integers(0, WORDS, (batch, context)).tolist()
        # The first run fills the pages; what the second, off the cache, compiles must not be timed.
        _steps(llm, prompts, 2)
        _steps(llm, prompts, 2 * (speculation.tokens + 1))
        before = _drafted(llm)
        runs = [_steps(llm, prompts, tokens) for _ in range(repeats)]
        found = [verified(steps, batch) for steps in runs]
        # Each request's first step is of its prompt.
        asked = sum(len(step.tokens) for steps in runs for step in steps) - repeats * batch
        yield (
            f"{batch}x{context}",
            {
                "step_ms": spread([ms for ms, _, _ in found]),
                "tokens": spread([made for _, made, _ in found]),
                "drafted": (_drafted(llm) - before) / asked,
                "steps": sum(count for _, _, count in found),
            },
        )
