"""Capacity and speed of KV cache dtypes in the whole engine, one subprocess a dtype, on dummy weights.

    python -m vllm_polarquant.eval.bench_engine --dtypes auto,fp8,polarquant_k4v4 --out bench.json

Prompts are random tokens, so no two share a block. The prefill's rate comes from the first run of a
batch, TPOT from further runs off the prefix cache: the engine stamps each request's first and last token,
and once all of a batch decode together, (last - first) / (tokens - 1) is the time of a step.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

MODEL = Path(__file__).parent / "models" / "llama-3.1-8b"


def _generate(llm: Any, prompts: list[dict[str, list[int]]], tokens: int) -> list[Any]:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    return list(llm.generate(prompts, greedy, use_tqdm=False))


def _tpot_ms(outputs: list[Any]) -> float:
    """Time of a decode step with the whole batch in it, in ms.

    That of the request which got its first token last: by then no other still prefills.
    """
    stats = max((output.metrics for output in outputs), key=lambda s: s.first_token_ts)
    return 1000 * (stats.last_token_ts - stats.first_token_ts) / (stats.num_generation_tokens - 1)


def measure(
    model: str, dtype: str, cells: list[tuple[int, int]], tokens: int, repeats: int, memory: float
) -> dict[str, Any]:
    """Boot one engine and run every (batch, context) cell; times in seconds unless named _ms."""
    from vllm import LLM

    from vllm_polarquant.eval.engine import kv_tokens

    longest = max(context for _, context in cells) + tokens + 16
    booted = time.perf_counter()
    llm = LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        kv_cache_dtype=dtype,
        max_model_len=longest,
        gpu_memory_utilization=memory,
        max_num_seqs=max(batch for batch, _ in cells),
        seed=0,
        disable_log_stats=False,
    )
    result: dict[str, Any] = {
        "dtype": dtype,
        "boot_s": time.perf_counter() - booted,
        "kv_tokens": kv_tokens(llm),
        "cells": [],
    }
    rng, words = random.Random(0), llm.llm_engine.model_config.get_vocab_size()
    for batch, context in cells:
        prompts = [{"prompt_token_ids": [rng.randrange(words) for _ in range(context)]} for _ in range(batch)]
        started = time.perf_counter()
        _generate(llm, prompts, 1)
        prefill = time.perf_counter() - started
        # What the cached prompts' first run compiles must not end up in a decode time.
        _generate(llm, prompts, 2)
        tpots = [_tpot_ms(_generate(llm, prompts, tokens)) for _ in range(repeats)]
        result["cells"].append(
            {
                "batch": batch,
                "context": context,
                "prefill_tokens_per_s": batch * context / prefill,
                "tpot_ms": statistics.median(tpots),
                "tpot_ms_all": tpots,
            }
        )
    return result


def _versions() -> dict[str, str]:
    import torch
    import triton
    import vllm

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "device": device,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": date.today().isoformat(),
    }


def table(report: dict[str, Any]) -> Table:
    """Rows of dtypes, with ratios to the first."""
    shown = Table(title=", ".join(f"{k} {v}" for k, v in report["versions"].items()))
    for name in ("dtype", "KV tokens", "ratio", "batch x context", "prefill tok/s", "TPOT ms", "ratio"):
        shown.add_column(name, justify="right")
    base = report["runs"][0]
    for run in report["runs"]:
        for i, cell in enumerate(run["cells"]):
            shown.add_row(
                run["dtype"],
                f"{run['kv_tokens']:,}",
                f"{run['kv_tokens'] / base['kv_tokens']:.2f}",
                f"{cell['batch']} x {cell['context']}",
                f"{cell['prefill_tokens_per_s']:,.0f}",
                f"{cell['tpot_ms']:.2f}",
                f"{cell['tpot_ms'] / base['cells'][i]['tpot_ms']:.2f}",
            )
    return shown


def main(
    dtypes: Annotated[str, typer.Option(help="Comma-separated; the first is the baseline.")] = (
        "auto,fp8,polarquant_k4v4"
    ),
    model: Annotated[str, typer.Option(help="Folder with a config.json.")] = str(MODEL),
    cells: Annotated[str, typer.Option(help="batchxcontext, comma-separated.")] = "32x16384",
    tokens: Annotated[int, typer.Option(help="Tokens decoded a request.")] = 64,
    repeats: Annotated[int, typer.Option(help="Decode runs a cell; the median counts.")] = 3,
    memory: Annotated[float, typer.Option(help="gpu_memory_utilization.")] = 0.9,
    out: Annotated[Path, typer.Option(help="JSON report.")] = Path("bench.json"),
    one: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Measure every dtype; a dtype that fails is reported, and the rest are finished."""
    grid = [(int(b), int(c)) for b, c in (cell.split("x") for cell in cells.split(","))]
    if one:
        result = measure(model, dtypes, grid, tokens, repeats, memory)
        out.write_text(json.dumps({"run": result, "versions": _versions()}))
        return
    console = Console(width=140)
    report: dict[str, Any] = {"model": model, "tokens": tokens, "runs": []}
    for dtype in dtypes.split(","):
        part = out.with_suffix(f".{dtype}.json")
        command = [sys.executable, "-m", __spec__.name, "--one", "--dtypes", dtype, "--model", model]
        command += ["--cells", cells, "--tokens", str(tokens), "--repeats", str(repeats)]
        command += ["--memory", str(memory), "--out", str(part)]
        if subprocess.run(command, check=False).returncode or not part.exists():
            console.print(f"[red]{dtype} failed; its output is above.[/]")
            continue
        found = json.loads(part.read_text())
        part.unlink()
        report["versions"] = found["versions"]
        report["runs"].append(found["run"])
        out.write_text(json.dumps(report, indent=1))
    if not report["runs"]:
        raise typer.Exit(1)
    console.print(table(report))


if __name__ == "__main__":
    typer.run(main)
