"""Capacity and speed of KV cache dtypes in the whole engine, one process a dtype, on dummy weights.

    python -m vllm_polarquant.eval.bench_engine --out bench-engine

Prompts are random tokens, so no two share a block unless they are meant to. Prefill and time to first
token are taken from prompts that nobody has sent before. TPOT comes from runs off the prefix cache: the
engine stamps each request's first and last token, and once all of a batch decode together,
(last - first) / (tokens - 1) is the time of a step.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_polarquant.eval import report
from vllm_polarquant.eval.report import Panel, Report, Section
from vllm_polarquant.format import DEFAULT_PRESET, PRESETS

MODEL = Path(__file__).parent / "models" / "llama-3.1-8b"
TITLE = "The engine"
DTYPES = ("auto", "fp8", DEFAULT_PRESET, "turboquant_4bit_nc", "int4_per_token_head")

Shape = tuple[int, int]


def parse_shapes(text: str) -> list[Shape]:
    """Pairs from "8x1024,32x16384"; none from "".

    Raises:
        typer.BadParameter: naming what is not two positive numbers.
    """
    shapes = []
    for part in filter(None, text.split(",")):
        first, _, second = part.partition("x")
        if not (first.isdecimal() and second.isdecimal() and int(first) and int(second)):
            raise typer.BadParameter(f"{part!r} is not two positive numbers like 8x1024")
        shapes.append((int(first), int(second)))
    return shapes


# One dtype, in a process of its own.


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


def _worker_memory(worker: Any) -> dict[str, int]:
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
        held = llm.collective_rpc(_worker_memory)[0]
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
    rates = [report.value(x) for name, x in found.items() if name.startswith("prefill_tokens_per_s ")]
    # A long batch's step is in proportion to its tokens.
    per_token = [
        (report.value(x) or 0) / math.prod(map(int, name.split(" ")[1].split("x")))
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
        yield f"ttft_ms {context}", report.spread([_ttft_ms(run[0]) for run in runs])

    for batch, context in plan["prefill"]:
        times = [_seconds(llm, prompts(f"prefill {i}", batch, context)) for i in range(1 + repeats)]
        yield (
            f"prefill_tokens_per_s {batch}x{context}",
            report.spread([batch * context / t for t in times[1:]]),
        )

    for batch, context in plan["cells"]:
        batchful = prompts(f"cell {context}", batch, context)
        # The first run fills the pages; what the second, off the cache, compiles must not be timed.
        _generate(llm, batchful, 2)
        _generate(llm, batchful, 2)
        steps = [step_ms(_generate(llm, batchful, tokens)) for _ in range(repeats)]
        yield f"tpot_ms {batch}x{context}", report.spread(steps)

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
        yield f"ttft_prefix_ms {prefix}x{chunk}", report.spread(chunks[1:])

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
                "tokens_per_s": report.spread(rates),
                "with_scheduling_tokens_per_s": report.spread(total),
                "fill_s": filled,
                "preemptions": sum(output.metrics.num_preemptions for output in outputs),
            },
        )
    yield "memory_mib after", memory_mib(llm)


def _one(dtype: str, plan: dict[str, Any], part: Path) -> None:
    """Write what was found so far after every finding, so that a killed process loses only one."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Lets memory_mib send its function to the engine's process, which this process started.
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    found: dict[str, Any] = {}
    started = time.perf_counter()
    try:
        for name, finding in measure(dtype, plan, found):
            found[name] = finding
            part.write_text(json.dumps(found))
            seconds = time.perf_counter() - started
            print(f"[{seconds:5.0f} s] {dtype} {name}: {report.shown(finding)}", flush=True)
    except Exception as problem:
        found["error"] = f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:500]
        part.write_text(json.dumps(found))
        raise


# All dtypes.


def _run(dtype: str, plan: dict[str, Any], part: Path, limit_s: float) -> dict[str, Any]:
    """Findings of one dtype, with "error" if it ended early."""
    part.unlink(missing_ok=True)
    command = [sys.executable, "-m", __spec__.name, "--one", json.dumps(plan)]
    command += ["--dtypes", dtype, "--out", str(part)]
    # A session of its own, as the engine starts processes that must end with it.
    child = subprocess.Popen(command, start_new_session=True)
    ends = time.monotonic() + limit_s
    states = []
    error = None
    try:
        while (code := _wait(child, min(20.0, ends - time.monotonic()))) is None:
            states.append(report.query_gpu())
            if time.monotonic() >= ends:
                error = f"exceeded {limit_s:.0f} s"
                break
        if code:
            error = f"ended with {code}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    found: dict[str, Any] = json.loads(part.read_text()) if part.exists() else {}
    part.unlink(missing_ok=True)
    if clocks := [state["SM clock"] for state in states if "SM clock" in state]:
        found["sm_clocks"] = clocks
    # What the process itself said is worth more than its exit status.
    return ({"error": error} if error else {}) | found


def _wait(child: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return child.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None


def sections(found: Report) -> list[Section]:
    """Capacity and prefill, latencies, and the full memory, a row a dtype, with ratios to the first."""
    runs = found["runs"]
    base: dict[str, Any] = next(iter(runs.values()), {})
    made = [_capacity(runs, base)]
    kinds = (
        ("prefill_tokens_per_s", "Prefill, tokens/s", "prompts x tokens"),
        ("ttft_ms", "Time to first token, ms", "one prompt of so many tokens"),
        ("ttft_prefix_ms", "Time to first token on a cached prefix, ms", "prefix x new tokens"),
        ("tpot_ms", "Time per output token, ms", "batch x context"),
    )
    for kind, title, meaning in kinds:
        names = _named(runs, kind)
        if names:
            made.append(_measured(runs, base, names, title, meaning))
    for name in _named(runs, "full_memory"):
        made.append(_full(runs, base, name))
    return made


def _named(runs: dict[str, Any], kind: str) -> list[str]:
    names = dict.fromkeys(name for run in runs.values() for name in run if name.split(" ")[0] == kind)
    return list(names)


def _cell(run: dict[str, Any], finding: Any) -> Any:
    """What a table shows of a finding; of one that is missing, why."""
    return finding if finding is not None else run.get("error", "not measured")


def _capacity(runs: dict[str, Any], base: dict[str, Any]) -> Section:
    body = []
    for dtype, run in runs.items():
        memory = [run.get(name, {}) for name in ("memory_mib", "memory_mib after")]
        body.append(
            [
                dtype,
                f"{run['kv_tokens']:,}" if "kv_tokens" in run else _cell(run, None),
                report.times(report.ratio(run.get("kv_tokens"), base.get("kv_tokens"))),
                report.number(run.get("boot_s")),
                *(report.number(held.get("extra")) for held in memory),
                report.number(memory[1].get("peak")),
                run.get("error", "complete"),
            ]
        )
    header = ["dtype", "KV tokens", "ratio", "boot s", "extra MiB", "after", "peak", "run"]
    tokens = [report.value(run.get("kv_tokens")) for run in runs.values()]
    return Section(
        title="What fits",
        header=header,
        rows=body,
        note="Extra MiB: what torch holds on the GPU beside weights and pages after the start, after all "
        "runs, and at its peak (activations of the largest batch included). It contains CUDA graphs.",
        panels=[Panel("KV tokens that fit", "tokens", list(runs), {"KV tokens": tokens})],
    )


def _measured(
    runs: dict[str, Any], base: dict[str, Any], names: list[str], title: str, meaning: str
) -> Section:
    labels = [name.split(" ", 1)[1] for name in names]
    body = []
    for dtype, run in runs.items():
        line = [dtype]
        for name in names:
            line.append(report.shown(_cell(run, run.get(name))))
            line.append(report.times(report.ratio(run.get(name), base.get(name))))
        body.append(line)
    header = ["dtype"]
    for label in labels:
        header += [label, f"of {next(iter(runs))}"]
    series = {
        dtype: [report.ratio(run.get(name), base.get(name)) for name in names] for dtype, run in runs.items()
    }
    return Section(
        title=title,
        header=header,
        rows=body,
        note=f"Columns: {meaning}. Median (min-max).",
        panels=[Panel(f"{title}: relative to {next(iter(runs))}", "x", labels, series, line=1.0)],
    )


def _full(runs: dict[str, Any], base: dict[str, Any], name: str) -> Section:
    context = name.split(" ", 1)[1]
    first = base.get(name, {}).get("tokens_per_s")
    body = []
    for dtype, run in runs.items():
        full = run.get(name, {})
        rate = full.get("tokens_per_s")
        body.append(
            [
                dtype,
                report.number(full.get("requests")),
                report.shown(_cell(run, full if "error" in full else rate)),
                report.times(report.ratio(rate, first)),
                report.shown(full.get("with_scheduling_tokens_per_s")),
                report.number(full.get("fill_s")),
                report.number(full.get("preemptions")),
            ]
        )
    rates = [report.value(run.get(name, {}).get("tokens_per_s")) for run in runs.values()]
    return Section(
        title=f"Full memory: as many requests of {context} tokens as fit",
        header=["dtype", "requests", "tokens/s", "ratio", "of a whole run", "fill s", "preempted"],
        rows=body,
        note="Output tokens a second of all requests together: requests / time of a step, and of a whole run "
        "off the prefix cache, its host work included.",
        panels=[Panel(f"Output tokens/s, memory full of {context}", "tokens/s", list(runs), {"rate": rates})],
    )


def kept(old: Report, new: Report) -> Report:
    """`new`, still without runs, behind the runs of an earlier report; not ours, if of another version.

    Raises:
        typer.BadParameter: naming what differs, if they cannot stand in one table.
    """
    ours = "vllm-polarquant"

    def conditions(found: Report) -> dict[str, Any]:
        # As JSON gives it back.
        plan = json.loads(json.dumps(found["plan"]))
        # The shipped model lies elsewhere in a wheel and in a checkout.
        model = {"model": Path(plan["model"]).name}
        machine = report.machine(found)
        machine.pop(ours, None)
        return machine | {k: v for k, v in plan.items() if k != "limit_s"} | model

    report.check_same(conditions(old), conditions(new))
    runs = old["runs"]
    if old["environment"].get(ours) != new["environment"].get(ours):
        runs = {name: run for name, run in runs.items() if name not in PRESETS}
    version = {k: v for k, v in new["environment"].items() if k == ours}
    return {
        **old,
        "environment": old["environment"] | version | report.dates(old, new),
        "runs": runs,
        "command": f"{old['command']} && {new['command']}",
    }


def main(
    dtypes: Annotated[
        str, typer.Option(help="--kv-cache-dtype names, comma-separated; the first is the baseline.")
    ] = ",".join(DTYPES),
    model: Annotated[str, typer.Option(help="Folder with a config.json.")] = str(MODEL),
    cells: Annotated[str, typer.Option(help="TPOT at BATCHxCONTEXT, comma-separated.")] = (
        "1x1024,8x1024,32x1024,8x16384,32x16384"
    ),
    prefill: Annotated[str, typer.Option(help="Prefill rate of PROMPTSxTOKENS.")] = "4x16384",
    ttft: Annotated[str, typer.Option(help="TTFT of one prompt of so many tokens.")] = "1024,16384",
    ttft_prefix: Annotated[str, typer.Option(help="TTFT of PREFIXxNEW tokens, prefix cached.")] = "",
    full_memory: Annotated[str, typer.Option(help="Throughput with as many such contexts as fit.")] = "",
    tokens: Annotated[int, typer.Option(help="Tokens decoded a request.", min=2)] = 64,
    repeats: Annotated[int, typer.Option(help="Timed runs of everything.", min=1)] = 3,
    max_seqs: Annotated[int, typer.Option(help="max_num_seqs; 0: the largest batch asked for.")] = 0,
    engine: Annotated[str, typer.Option(help="More engine arguments, a JSON object.")] = (
        '{"gpu_memory_utilization": 0.9}'
    ),
    limit: Annotated[float, typer.Option(help="Seconds that one dtype may take.")] = 300.0,
    out: Annotated[Path, typer.Option(help="Stem of the .json, .md and .png files.")] = Path("bench-engine"),
    keep: Annotated[
        bool, typer.Option("--keep", help="Add to the report at --out, made here with the same plan.")
    ] = False,
    render: Annotated[Path | None, typer.Option(help="Only redraw this JSON report to --out.")] = None,
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure every dtype; one that fails or takes too long keeps what it found, the rest are finished."""
    if one:
        _one(dtypes, json.loads(one), out)
        return
    console = Console()
    if render is not None:
        old = json.loads(render.read_text())
        console.print(*report.write(out, TITLE, old, sections(old)), sep="\n")
        return
    grid, prefills, prefixes = (parse_shapes(text) for text in (cells, prefill, ttft_prefix))
    alone, full = ([int(n) for n in filter(None, text.split(","))] for text in (ttft, full_memory))
    contexts = [context for _, context in grid + prefills] + [sum(shape) for shape in prefixes] + alone + full
    if not contexts:
        raise typer.BadParameter("nothing to measure: give --cells, --prefill, --ttft or --full-memory")
    batches = [batch for batch, _ in grid + prefills]
    plan = {
        "model": model,
        "cells": grid,
        "prefill": prefills,
        "ttft": alone,
        "ttft_prefix": prefixes,
        "full_memory": full,
        "tokens": tokens,
        "repeats": repeats,
        "max_model_len": max(contexts) + tokens + 16,
        "max_num_seqs": max_seqs or max([*batches, 256 if full else 1]),
        "limit_s": limit,
        "engine": json.loads(engine),
    }
    asked = shlex.join(sys.argv[1:])
    found: Report = {
        "environment": report.environment(),
        "command": f"python -m {__spec__.name} {asked}".strip(),
        "plan": plan,
        "runs": {},
    }
    if keep:
        found = kept(report.earlier(out), found)
    for dtype in dtypes.split(","):
        console.print(f"[bold]{dtype}[/]")
        run = _run(dtype, plan, report.path_of(out, f"{dtype}.part"), limit)
        found["runs"][dtype] = run
        # The clock of a busy GPU; an idle one's says nothing.
        busy = max(run.pop("sm_clocks", []), key=lambda clock: float(clock.split()[0]), default=None)
        if busy is not None:
            found["environment"]["SM clock"] = busy
        report.save(out, found)
    for section in sections(found):
        console.print(f"\n{section.title}")
        console.print(report.markdown_table(section.header, section.rows), markup=False, soft_wrap=True)
    console.print(*report.write(out, TITLE, found, sections(found)), sep="\n")
    if all("error" in run for run in found["runs"].values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
