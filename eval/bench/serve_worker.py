"""The child that starts one server and asks it, by vLLM's own benchmark of servers, what the plan says."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vllm_polarquant.eval import isolate

VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
UNKNOWN = "unknown-word"
"""Longer than other words with a space: vLLM refuses text of more characters a token than its longest has."""
FEWEST = 8
"""Requests of the shortest run."""
MEASURED = ("median_ttft_ms", "p95_ttft_ms", "median_tpot_ms", "p95_tpot_ms", "output_throughput")
"""What is taken of vLLM's findings."""


def with_tokenizer(model: Path, folder: Path) -> str:
    """A model's folder, or if it has no tokenizer `folder`, made its like with a word for each token.

    A server takes and gives text, also of dummy weights.
    """
    if (model / "tokenizer.json").exists():
        return str(model)
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    vocabulary = {UNKNOWN: 0} | {f"w{i}": i for i in range(1, config["vocab_size"])}
    words = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    words.pre_tokenizer = WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": UNKNOWN, "eos_token": "w1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    shutil.copy(model / "config.json", folder)
    return str(folder)


def flags(arguments: Mapping[str, Any]) -> list[str]:
    """EngineArgs as `vllm serve` takes them."""
    found = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            found.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            found += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return found


def next_rate(tried: Mapping[float, bool]) -> float:
    """The rate to try next for the highest that keeps a bound; tried: those so far, and whether they did."""
    kept = max((rate for rate, keeps in tried.items() if keeps), default=0.0)
    broke = min((rate for rate, keeps in tried.items() if not keeps and rate > kept), default=math.inf)
    if not kept:
        return min(tried) / 2
    return 2 * kept if broke == math.inf else math.sqrt(kept * broke)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Until the server answers; raises RuntimeError with its last words if it ends before."""
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if server.poll() is not None:
                lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                # The last error that is not about another's end.
                named = [line for line in lines if "Error: " in line and "See root cause" not in line]
                raise RuntimeError((named or lines or [f"exit status {server.returncode}"])[-1]) from None
            time.sleep(0.5)


def _bench(model: str, url: str, shape: tuple[int, int], rate: float, seconds: float, seed: int) -> Any:
    """Findings of `vllm bench serve`: Poisson arrivals, so many a second; 0 s: of the fewest requests."""
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    words = {
        "base-url": url, "model": model, "dataset-name": "random", "seed": seed, "request-rate": rate,
        "num-prompts": max(FEWEST, round(rate * seconds)) if seconds else FEWEST, "temperature": 0,
        "random-input-len": shape[0], "random-output-len": shape[1],
        "percentile-metrics": "ttft,tpot", "metric-percentiles": "95",
    }  # fmt: skip
    options = [f"--{name}={value}" for name, value in words.items()]
    return asyncio.run(
        main_async(parser.parse_args([*options, "--ignore-eos", "--disable-tqdm", "--save-detailed"]))
    )


def measure(dtype: str, plan: dict[str, Any], log: Path) -> Iterator[tuple[str, Any]]:
    """Start one server and yield (name, finding) for each load and rate."""
    with TemporaryDirectory() as scratch, open(log, "wb") as output:
        model = with_tokenizer(Path(plan["model"]), Path(scratch))
        port = _free_port()
        options = {
            "load_format": "dummy",
            "kv_cache_dtype": dtype,
            "max_model_len": max(sum(load["shape"]) for load in plan["loads"]) + 16,
            "uvicorn_log_level": "warning",
        }
        words = flags(options | plan["engine"])
        started = time.perf_counter()
        server = subprocess.Popen(
            [*VLLM, "serve", model, "--host=127.0.0.1", f"--port={port}", *words],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(server, url, log)
            yield "boot_s", time.perf_counter() - started
            # No two runs have the same prompts, which would be cached; every dtype has the same ones.
            seed = 0
            for load in plan["loads"]:
                name = "x".join(map(str, load["shape"]))
                # All at once: what a first request compiles must not be timed.
                seed += 1
                _bench(model, url, load["shape"], math.inf, 0, seed)
                tried: dict[float, bool] = {}
                for number in range(len(load["rates"]) + plan["search"]):
                    rates = load["rates"]
                    rate = rates[number] if number < len(rates) else next_rate(tried)
                    seed += 1
                    found = _bench(model, url, load["shape"], rate, plan["seconds"], seed)
                    if found["failed"]:
                        why = next(filter(None, found["errors"]), "")[-200:]
                        raise RuntimeError(f"{found['failed']} requests at {rate:.3g} a second failed: {why}")
                    tried[rate] = found["median_tpot_ms"] <= plan["tpot_ms"]
                    mine = {key: found[key] for key in MEASURED} | {"requests": found["completed"]}
                    yield f"{name} {rate:.3g}", mine
        finally:
            server.terminate()
            server.wait()


def work(job: dict[str, Any], report: isolate.Report) -> None:
    """`isolate.report_all` of what `measure` finds."""
    isolate.report_all(measure(job["dtype"], job["plan"], Path(job["log"])), report)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    isolate.serve(work)
