"""`make demo`: the shipped model in a real vLLM engine, with 16-bit and with polar-coded KV pages.

The same prompts run twice, with the same memory for the KV cache: completions of held-out code, and
questions about values scattered through 2,000 tokens, which only the cached keys and values can answer.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_polarquant.eval.engine import engine, kv_tokens, use_in_process_engine
from vllm_polarquant.eval.probe.episodes import (
    MAX_ANSWER_TOKENS,
    MODEL_DIR,
    episode_prompts,
    load_episodes,
    load_heldout,
    score_answer,
)
from vllm_polarquant.format import DEFAULT_PRESET

KV_CACHE_BYTES = 64 << 20
COMPLETIONS = 8
SHOWN = 2
COMPLETION_TOKENS = 40
MAX_MODEL_LEN = 4096


@dataclass
class Run:
    """What one dtype did."""

    dtype: str
    tokens: int
    bytes_per_token: float
    completions: list[str] = field(default_factory=list)
    completion_ids: list[list[int]] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def score(self) -> float:
        return sum(self.right) / len(self.right)


def completion_prompts() -> list[str]:
    """Beginnings of held-out source files, up to the colon of a function's signature."""
    prompts = []
    for row in load_heldout():
        signature = re.compile(r"\n +def \w+\([^()\n]*\):\n").search(row["text"], 2000, 6000)
        if signature:
            prompts.append(row["text"][: signature.end() - 1])
    return prompts[:COMPLETIONS]


def questions(count: int) -> list[tuple[str, str, float]]:
    """(prompt, answer, depth): every query of the episodes of about 2,000 tokens, the first `count`."""
    episodes = [row for row in load_episodes() if 4000 <= len(row["prompt"]) <= 9000]
    return [item for row in episodes for item in episode_prompts(row)][:count]


def measure(dtype: str, asked: list[tuple[str, str, float]], progress: Progress) -> Run:
    """Boot an engine with this dtype and put every prompt through it."""
    from vllm import SamplingParams

    started = time.perf_counter()
    task = progress.add_task(f"{dtype}: starting the engine", total=len(completion_prompts()) + len(asked))
    with engine(
        str(MODEL_DIR),
        dtype,
        max_model_len=MAX_MODEL_LEN,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        max_num_batched_tokens=MAX_MODEL_LEN,
        max_num_seqs=16,
        enforce_eager=True,
        seed=0,
    ) as llm:
        tokens = kv_tokens(llm)
        run = Run(dtype, tokens, KV_CACHE_BYTES / tokens)
        progress.update(task, description=f"{dtype}: completing code")
        greedy = SamplingParams(temperature=0, max_tokens=COMPLETION_TOKENS, ignore_eos=True)
        for output in llm.generate(completion_prompts(), greedy, use_tqdm=False):
            run.completions.append(output.outputs[0].text)
            run.completion_ids.append(list(output.outputs[0].token_ids))
            progress.advance(task)
        progress.update(task, description=f"{dtype}: answering questions")
        short = SamplingParams(temperature=0, max_tokens=MAX_ANSWER_TOKENS)
        for start in range(0, len(asked), 16):
            part = asked[start : start + 16]
            outputs = llm.generate([prompt for prompt, _, _ in part], short, use_tqdm=False)
            for (_, answer, _), output in zip(part, outputs, strict=True):
                text = output.outputs[0].text
                run.answers.append(text)
                run.right.append(score_answer(text, answer))
                progress.advance(task)
    run.seconds = time.perf_counter() - started
    progress.update(task, description=f"{dtype}: done")
    return run


def agreement(run: Run, other: Run) -> float:
    """Greedy completion tokens before the first that differs, as a share of all."""
    same = total = 0
    for left, right in zip(run.completion_ids, other.completion_ids, strict=True):
        equal = [a == b for a, b in zip(left, right, strict=True)]
        same += equal.index(False) if False in equal else len(equal)
        total += len(equal)
    return same / total


def show(console: Console, runs: list[Run], asked: list[tuple[str, str, float]]) -> None:
    """Completions and answers side by side, then the table of what the user gains."""
    base = runs[0]
    for i, prompt in enumerate(completion_prompts()[:SHOWN]):
        last = prompt.rstrip().rsplit("\n", 1)[-1].strip()
        table = Table(title=f"Completion {i + 1}, after `{last}`", show_lines=True)
        for run in runs:
            table.add_column(run.dtype, overflow="fold")
        table.add_row(*[run.completions[i] for run in runs])
        console.print(table)

    table = Table(title="The first questions: the value of a key defined once, earlier in the prompt")
    table.add_column("depth", justify="right")
    table.add_column("right answer")
    for run in runs:
        table.add_column(run.dtype)
    for i, (_, answer, depth) in enumerate(asked[:6]):
        marks = [f"[{'green' if run.right[i] else 'red'}]{run.answers[i][:6]!r}[/]" for run in runs]
        table.add_row(f"{depth:.0%}", repr(answer), *marks)
    console.print(table)

    table = Table(title=f"What fits in {KV_CACHE_BYTES >> 20} MiB of KV cache, and what it answers")
    table.add_column("kv-cache-dtype", no_wrap=True)
    for name in ("tokens", "ratio", "bytes a token", "retrieval", "same tokens", "seconds"):
        table.add_column(name, justify="right")
    for run in runs:
        table.add_row(
            run.dtype,
            f"{run.tokens:,}",
            f"{run.tokens / base.tokens:.2f}x",
            f"{run.bytes_per_token:.0f}",
            f"{sum(run.right)}/{len(run.right)}",
            f"{agreement(run, base):.0%}",
            f"{run.seconds:.0f}",
        )
    console.print(table)


def draw(path: Path, runs: list[Run]) -> None:
    """Tokens that fit and the retrieval score, a pair of bars a dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [run.dtype for run in runs]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    bars = left.bar(names, [run.tokens / 1000 for run in runs], color="#4477aa")
    left.bar_label(bars, [f"{run.tokens / runs[0].tokens:.2f}x" for run in runs], padding=2)
    left.set_ylabel("thousand tokens")
    left.set_title(f"KV tokens in {KV_CACHE_BYTES >> 20} MiB")
    bars = right.bar(names, [100 * run.score for run in runs], color="#228833")
    right.bar_label(bars, [f"{run.score:.0%}" for run in runs], padding=2)
    right.set_ylim(0, 110)
    right.set_ylabel("exact answers, %")
    right.set_title(f"Retrieval over 2,000 tokens, {len(runs[0].right)} questions")
    for axes in (left, right):
        axes.margins(y=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(
    dtypes: Annotated[
        str, typer.Option(help="Comma-separated --kv-cache-dtype values; the first is the baseline.")
    ] = f"auto,{DEFAULT_PRESET}",
    picture: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("demo.png"),
    count: Annotated[int, typer.Option(help="Retrieval questions.", min=1)] = 60,
) -> None:
    """Run the shipped model with each dtype and show what fits and what it answers."""
    console = Console()
    if not (MODEL_DIR / "model.safetensors").exists():
        console.print(f"[red]No model in {MODEL_DIR}; train one with eval/probe/train.py.[/]")
        raise typer.Exit(2)
    use_in_process_engine()
    asked = questions(count)
    runs: list[Run] = []
    columns: tuple[Any, ...] = (
        TextColumn("{task.description:40}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for dtype in dtypes.split(","):
            runs.append(measure(dtype, asked, progress))
    show(console, runs, asked)
    draw(picture, runs)
    console.print(f"Picture: {picture}")


if __name__ == "__main__":
    typer.run(main)
