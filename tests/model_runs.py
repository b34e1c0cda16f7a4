"""Tiny models of many architectures, each with `auto`, the 16-bit test page and `polarquant_k4v4`.

`python tests/model_runs.py RESULTS.json [NAME ...]` runs those named, or all that are not in the file yet,
and writes what came of each; a model that kills its process loses only itself. With `--page` it writes the
table of docs/models.md from such a file. Nothing here asserts anything.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import engine_runs
import tiny_models

LOSSLESS, PRESET = "polarquant_lossless", "polarquant_k4v4"
AT_ONCE = 4
"""Models a process, after which results are written."""

PROMPT_TOKENS, NEW_TOKENS = (5, 60, 130, 200), 16
ENGINE: dict[str, Any] = {
    "load_format": tiny_models.LOAD_FORMAT,
    "enforce_eager": True,
    "max_model_len": tiny_models.MAX_MODEL_LEN,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 128 << 20,
}

ENV = {
    "VLLM_POLARQUANT_LOSSLESS": "1",
    # Matrices this small are quicker on one core, and threads that wait for another keep one busy.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

Result = dict[str, Any]


def run(names: list[str]) -> dict[str, Result]:
    """What came of each model: see `_model`; {"problem": ...} for one that took its process along."""
    found: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.jsonl"
        while left := [name for name in names if name not in found][:AT_ONCE]:
            out.write_text("")
            status, log = engine_runs.child(
                __file__, "models", [str(out), left], Path(folder) / "ended.json", **ENV
            )
            done = dict(json.loads(line) for line in out.read_text().splitlines())
            found |= done
            for name in [name for name in left if name not in done][:1]:
                found[name] = {"problem": f"ended with {status}: {log[-2000:]}"}
    return found


def models(out: str, names: list[str]) -> dict[str, Any]:
    """A scenario: a line of a file for each model once it is done, so that a crash loses only one."""
    tiny_models.register_loader()
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            result = _model(name, tiny_models.write(name, Path(folder)))
            with open(out, "a") as file:
                file.write(json.dumps([name, result]) + "\n")
    return {}


def _model(name: str, path: Path) -> Result:
    """By dtype what an engine gave and said, and what `polarquant check` says of PRESET."""
    result = {}
    for dtype in ("auto", LOSSLESS, PRESET):
        with _listening() as said:
            result[dtype] = _try(lambda dtype=dtype: _engine(name, path, dtype)) | {"said": said}
    return result | {"check": _try(lambda: _check(name, path))}


@contextmanager
def _listening() -> Iterator[list[str]]:
    """What this package logs."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.polarquant")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def _try(ask: Callable[[], Result]) -> Result:
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        return ask()
    except Exception as problem:
        cleanup_dist_env_and_memory()
        return {"problem": str(problem), "kind": type(problem).__name__}


def _engine(name: str, path: Path, dtype: str) -> Result:
    from vllm_polarquant.eval.engine import engine

    model = tiny_models.MODELS[name]
    with engine(str(path), dtype, dtype=model.dtype, **(ENGINE | model.options)) as llm:
        cache = llm.llm_engine.vllm_config.cache_config
        text = "".join(engine_runs.text_prompts(4, 1000))
        ids = llm.get_tokenizer().encode(text)
        prompts = [{"prompt_token_ids": ids[100 * i :][:length]} for i, length in enumerate(PROMPT_TOKENS)]
        if model.options.get("runner") == "pooling":
            assert len(llm.embed(prompts, use_tqdm=False)) == len(prompts)
            return {"completions": [], "tokens": 0, "waste": 0.0}
        outputs = engine_runs._generate(llm, prompts, max_tokens=NEW_TOKENS, ignore_eos=True)
        return {
            "completions": engine_runs._completions(outputs),
            "tokens": cache.kv_cache_size_tokens,
            "waste": _waste(llm),
        }


def _waste(llm: Any) -> float:
    """The share of the cache's bytes that padding takes."""
    from vllm.v1.kv_cache_interface import AttentionSpec, MambaSpec

    def count(worker: Any) -> tuple[int, int]:
        used = size = 0
        for group in worker.model_runner.kv_cache_config.kv_cache_groups:
            spec = group.kv_cache_spec
            for each in getattr(spec, "kv_cache_specs", dict.fromkeys(group.layer_names, spec)).values():
                size += each.page_size_bytes
                if isinstance(each, AttentionSpec):
                    used += each.real_page_size_bytes
                elif isinstance(each, MambaSpec):
                    used += sum(
                        each_dtype.itemsize * _product(shape)
                        for shape, each_dtype in zip(each.shapes, each.dtypes, strict=True)
                    )
        return used, size

    used, size = llm.collective_rpc(count)[0]
    return 1 - used / max(size, 1)


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _check(name: str, path: Path) -> Result:
    """What the command `polarquant check` prints as JSON, without its child process."""
    from vllm.model_executor.layers import rotary_embedding

    from vllm_polarquant import check, dry_run

    dry_run.ask = dry_run.explore  # type: ignore[assignment]
    config = check.read_config(path)
    options = tiny_models.MODELS[name].options | {"max_model_len": tiny_models.MAX_MODEL_LEN}
    try:
        verdict = check.judge(path, config, PRESET, options)
    finally:
        # vLLM keeps these for the next model, and here they have no memory.
        rotary_embedding._ROPE_DICT.clear()
    shape = verdict.shape
    return {
        "supported": not verdict.problems,
        "by_vllm": verdict.by_vllm,
        "sentences": [problem.message for problem in verdict.problems],
        "token_bytes": None if shape is None else shape.token_bytes(PRESET),
        "times": None if shape is None else shape.times(PRESET),
        "notes": verdict.notes,
    }


def announced(result: Result) -> str | None:
    """The line at start-up of an engine with one of our dtypes."""
    return next((line for line in result["said"] if "(page format" in line), None)


def figures(line: str) -> tuple[int, int, float]:
    """Of the line at start-up: bytes a token, tokens that fit, times those of auto."""
    found = re.search(r": ([\d,]+) bytes a token, ([\d,]+) tokens fit, ([\d.]+) times", line)
    assert found is not None, line
    size, tokens, times = (float(number.replace(",", "")) for number in found.groups())
    return int(size), int(tokens), times


def parted(have: Result, want: Result) -> list[float]:
    """Of each request whose greedy tokens differ, how far apart the two likeliest were where they part."""
    gaps = []
    for mine, theirs in zip(have["completions"], want["completions"], strict=True):
        for token, other, gap in zip(mine["tokens"], theirs["tokens"], theirs["gaps"], strict=True):
            if token != other:
                gaps.append(gap)
                break
    return gaps


def _first_words(problem: str) -> str:
    lines = [line.strip() for line in problem.splitlines() if line.strip()]
    useful = [line for line in lines if "validation error for" not in line] or ["AssertionError"]
    return useful[0].removeprefix("Value error, ").split(" [type=")[0].split(". ")[0][:100].replace("|", "/")


def row(name: str, result: Result) -> str:
    """A model's line of the table."""
    model = tiny_models.MODELS[name]
    cells = [model.family, f"`{model.config['architectures'][0]}`"]
    auto, lossless, ours = (result.get(dtype) for dtype in ("auto", LOSSLESS, PRESET))
    if auto is None or "problem" in auto:
        reason = _first_words((auto or result)["problem"])
        verdict = result.get("check", {})
        refused = verdict.get("sentences") or []
        what = f"refused: {_feature(refused[0])}" if refused else "served, says `check`"
        cells += ["-", "-", "-", "-", what if verdict.get("by_vllm") else f"not built here: {reason}"]
    elif "problem" in ours:
        fit = f"{auto['tokens']:,}" if auto["tokens"] else "-"
        cells += [fit, "-", "-", "-", f"refused: {_feature(ours['problem'])}"]
    else:
        gaps = parted(lossless, auto) if "completions" in lossless else None
        asked = len(auto["completions"])
        same = "?" if gaps is None else f"{asked - len(gaps)} of {asked}"
        if gaps:
            same += f" (gap {max(gaps):.3f})"
        times = ours["tokens"] / auto["tokens"]
        cells += [f"{auto['tokens']:,}", f"{ours['tokens']:,}", f"{times:.2f}", same, "served"]
    return "| " + " | ".join(cells) + " |"


def _feature(sentence: str) -> str:
    found = re.search(r"does not support (.*?); ", sentence)
    return found.group(1) if found else _first_words(sentence)


def table(results: dict[str, Result]) -> str:
    """Markdown, one line a model."""
    head = ["model", "architecture", "tokens, `auto`", "tokens, `k4v4`", "times", "16-bit page as `auto`", ""]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + [row(name, results[name]) for name in tiny_models.MODELS if name in results])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--page", type=Path)
    asked = parser.parse_args()
    if asked.page:
        results = json.loads(asked.results.read_text())
        before, _, rest = asked.page.read_text().partition("<!-- models -->")
        after = rest.partition("<!-- /models -->")[2]
        asked.page.write_text(
            f"{before}<!-- models -->\n{table(results)}\n<!-- /models -->{after}", encoding="utf-8"
        )
    else:
        results = json.loads(asked.results.read_text()) if asked.results.exists() else {}
        names = asked.names or [name for name in tiny_models.MODELS if name not in results]
        asked.results.parent.mkdir(parents=True, exist_ok=True)
        for first in range(0, len(names), AT_ONCE):
            results |= run(names[first : first + AT_ONCE])
            asked.results.write_text(json.dumps(results))
        print(table(results))


if __name__ == "__main__":
    main()
