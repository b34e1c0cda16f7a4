"""`make demo`: a model in a real vLLM engine, with 16-bit and with polar-coded KV pages, side by side.

Each dtype gets the same memory for its cache and reads the same held-out text, a token a step: every step is
a decode, which reads every earlier key and value, and its own, off the pages, as generation does. So what the
text's next tokens would be is what the cache makes of them. The shipped model is also asked for values that
are scattered through 2,000 tokens, in chunks: what it answers from was read off the pages too.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_polarquant.check import read_config
from vllm_polarquant.eval.command import FAILED, end_on_sigterm, fail
from vllm_polarquant.eval.dtypes import check_names
from vllm_polarquant.eval.engine import engine, kv_tokens, use_in_process_engine
from vllm_polarquant.eval.measures import next_token
from vllm_polarquant.eval.measures.text import HELDOUT, read_text, token_rows
from vllm_polarquant.eval.plan import PROBE
from vllm_polarquant.eval.probe.episodes import (
    MODEL_DIR,
    PROBE_ANSWER_TOKENS,
    episode_prompts,
    load_episodes,
    load_heldout,
    score_answer,
)
from vllm_polarquant.eval.report.environment import query_gpu
from vllm_polarquant.eval.report.panels import colours
from vllm_polarquant.eval.worker import reason
from vllm_polarquant.format import DEFAULT_PRESET

COMMAND = "demo"
PROBE_MIB, MODEL_MIB = 64, 1024
"""Default memory of a cache: of the shipped model's, of another one's."""

COMPLETIONS, COMPLETION_TOKENS, COMPLETION_CHARS = 2, 40, 400
SIZE, CPU_SIZE = (16, 256), (8, 128)
"""Rows of text and tokens of each; of those that a CPU reads with another model than the shipped one."""

EPISODES_AT_A_TIME, CHUNK = 4, 128
"""Contexts of 2,000 tokens that 64 MiB hold in 16 bits beside their questions, and tokens a step of each."""

Question = tuple[str, str, float]
"""A prompt, its right answer, and the depth in the prompt where it stands."""


@dataclass
class Run:
    """What one dtype did. likeliest: int32 [rows, context - 1], the most likely token after each position."""

    dtype: str
    tokens: int
    bytes_per_token: float
    perplexity: float
    likeliest: np.ndarray
    completions: list[str]
    right: list[bool] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)

    def agreement(self, base: Run) -> float:
        """Share of positions where the likeliest next token is that of `base`."""
        return float((self.likeliest == base.likeliest).mean())


def completion_prompts() -> list[str]:
    """Ends of held-out source files, cut after the colon of a function's signature."""
    prompts = []
    for row in load_heldout():
        signature = re.compile(r"\n +def \w+\([^()\n]*\):\n").search(row["text"], 2000, 6000)
        if signature:
            end = signature.end() - 1
            begin = row["text"].index("\n", end - COMPLETION_CHARS) + 1
            prompts.append(row["text"][begin:end])
    return prompts[:COMPLETIONS]


def questions(count: int) -> list[Question]:
    """Every query of the episodes of about 2,000 tokens, the first `count`."""
    episodes = [row for row in load_episodes() if row["id"].startswith("2000")]
    return [item for row in episodes for item in episode_prompts(row)][:count]


def feed(llm: Any, dtype: str, memory: int, params: next_token.Params) -> Run:
    """What an engine that is fed a token a step says of the text."""
    from vllm import SamplingParams

    rows = token_rows(llm.get_tokenizer(), params.text, params.rows, params.context)
    scored = next_token.score(llm, rows, top=params.top)
    greedy = SamplingParams(temperature=0, max_tokens=COMPLETION_TOKENS, ignore_eos=True)
    outputs = llm.generate(completion_prompts(), greedy, use_tqdm=False)
    tokens = kv_tokens(llm)
    return Run(
        dtype,
        tokens,
        memory / tokens,
        float(np.exp(-scored["actual"].astype(np.float64).mean())),
        scored["ids"][..., 0],
        [output.outputs[0].text for output in outputs],
    )


def ask(llm: Any, asked: list[Question], run: Run) -> None:
    """Put the questions: one of each episode first, in whose cached context the others find theirs."""
    from vllm import SamplingParams

    short = SamplingParams(temperature=0, max_tokens=PROBE_ANSWER_TOKENS)
    # Five of an episode stand one after the other.
    step = 5 * EPISODES_AT_A_TIME
    for start in range(0, len(asked), step):
        part = asked[start : start + step]
        texts: dict[int, str] = {}
        for turn in ([i for i in range(len(part)) if not i % 5], [i for i in range(len(part)) if i % 5]):
            outputs = llm.generate([part[i][0] for i in turn], short, use_tqdm=False)
            texts |= {i: output.outputs[0].text for i, output in zip(turn, outputs, strict=True)}
        run.answers += [texts[i] for i in range(len(part))]
        run.right += [score_answer(texts[i], answer) for i, (_, answer, _) in enumerate(part)]


def measure(
    model: str,
    dtype: str,
    memory: int,
    params: next_token.Params,
    asked: list[Question],
    progress: Progress,
) -> Run:
    """Put the text, and the questions if there are any, through engines with this dtype."""
    options = {"kv_cache_memory_bytes": memory, "enforce_eager": True, "seed": 0}
    task = progress.add_task(f"{dtype}: starting the engine", total=2 + 2 * bool(asked))
    # One token a step of each request: every step reads the pages.
    longest = max(params.context, COMPLETION_CHARS) + COMPLETION_TOKENS
    feeding = next_token.MEASURE.engine(params) | {"max_model_len": longest}
    with engine(model, dtype, **options, **feeding) as llm:
        progress.update(task, advance=1, description=f"{dtype}: reading text off the cache")
        run = feed(llm, dtype, memory, params)
        progress.advance(task)
    if asked:
        progress.update(task, description=f"{dtype}: starting the engine again")
        chunks = {
            "max_model_len": 4096,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 16 * CHUNK,
            "long_prefill_token_threshold": CHUNK,
            "enable_prefix_caching": True,
        }
        with engine(model, dtype, **options, **chunks) as llm:
            progress.update(task, advance=1, description=f"{dtype}: answering questions")
            ask(llm, asked, run)
            progress.advance(task)
    progress.update(task, description=f"{dtype}: done")
    return run


def show(console: Console, runs: list[Run], asked: list[Question], name: str, memory: int) -> None:
    """Completions and answers side by side, then the table of what the user gains and pays."""
    base = runs[0]
    for i, prompt in enumerate(completion_prompts()):
        last = prompt.rstrip().rsplit("\n", 1)[-1].strip()
        table = Table(title=f"Completion {i + 1}, after `{last}`", show_lines=True)
        for run in runs:
            table.add_column(run.dtype, overflow="fold")
        table.add_row(*[run.completions[i] for run in runs])
        console.print(table)

    if asked:
        table = Table(title="The first questions: the value of a key defined once, earlier in the prompt")
        table.add_column("depth", justify="right")
        table.add_column("right answer")
        for run in runs:
            table.add_column(run.dtype)
        for i, (_, answer, depth) in enumerate(asked[:6]):
            marks = [f"[{'green' if run.right[i] else 'red'}]{run.answers[i][:6]!r}[/]" for run in runs]
            table.add_row(f"{depth:.0%}", repr(answer), *marks)
        console.print(table)

    positions = base.likeliest.size
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=f"{name}: what fits in {memory >> 20} MiB of KV cache, and what it says",
        caption=f"Top-1 agreement: share of {positions:,} positions of held-out text where the most likely "
        f"next token is that of {base.dtype}. The text is fed a token a step, so that every key and value is "
        "read off the cache, as in generation.",
        caption_justify="left",
    )
    table.add_column("dtype", no_wrap=True)
    columns = ["tokens", "ratio", "bytes a token", *(["retrieval"] if asked else []), "perplexity"]
    for column in (*columns, "top-1 agreement"):
        head = column.replace(" ", "\n", 1)
        table.add_column(head, justify="right", no_wrap=True, vertical="bottom")
    for run in runs:
        retrieval = [f"{sum(run.right)}/{len(run.right)}"] if asked else []
        table.add_row(
            run.dtype,
            f"{run.tokens:,}",
            f"{run.tokens / base.tokens:.2f}x",
            f"{run.bytes_per_token:,.0f}",
            *retrieval,
            f"{run.perplexity:.3f}",
            f"{run.agreement(base):.1%}" if run is not base else "-",
        )
    console.print(table)


def draw(path: Path, runs: list[Run], name: str, memory: int) -> None:
    """Bars a dtype: tokens that fit, top-1 agreement, and the retrieval score if questions were asked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    base, names = runs[0], [run.dtype for run in runs]
    panels: list[tuple[str, str, list[float], list[str]]] = [
        (
            f"Tokens in {memory >> 20} MiB of KV cache",
            "thousand tokens",
            [run.tokens / 1000 for run in runs],
            [f"{run.tokens:,}\n{run.tokens / base.tokens:.2f}x" for run in runs],
        ),
        (
            f"Most likely next token is that of {base.dtype}",
            f"% of {base.likeliest.size:,} positions",
            [100 * run.agreement(base) for run in runs],
            [f"{run.agreement(base):.1%}" if run is not base else "100%" for run in runs],
        ),
    ]
    if base.right:
        panels.append(
            (
                f"Values found in 2,000 tokens, of {len(base.right)}",
                "exact answers",
                [float(sum(run.right)) for run in runs],
                [str(sum(run.right)) for run in runs],
            )
        )
    colour = colours(names)
    figure, places = plt.subplots(1, len(panels), figsize=(4.1 * len(panels), 3.7), layout="constrained")
    figure.suptitle(name, fontsize=12)
    for axes, (title, unit, heights, labels) in zip(places, panels, strict=True):
        bars = axes.bar(names, heights, 0.6, color=[colour[n] for n in names])
        axes.bar_label(bars, labels, padding=3, fontsize=9)
        axes.set_title(title, fontsize=10)
        axes.set_ylabel(unit)
        axes.margins(y=0.18)
        axes.tick_params(axis="x", length=0, labelsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _check_model(model: str) -> None:
    """Look at a folder, or let vLLM ask the hub for a name.

    Raises:
        ValueError: for a folder that is not there, or without a config.json that can be read.
    """
    if model and Path(model).is_dir():
        read_config(Path(model))
    elif not model or model.startswith((".", "/", "~")) or Path(model).exists():
        raise ValueError(f"no folder {model or repr(model)}")
    else:
        os.environ.setdefault("HF_HUB_OFFLINE", "0")


def main(
    model: Annotated[
        str, typer.Option(help=f"Folder or hub name of a model, or {PROBE!r}, the shipped one.")
    ] = PROBE,
    dtypes: Annotated[
        str, typer.Option(help="Comma-separated --kv-cache-dtype values; the first is the baseline.")
    ] = f"auto,{DEFAULT_PRESET}",
    memory_mib: Annotated[
        int,
        typer.Option(
            help=f"MiB of each cache; 0: {PROBE_MIB} for the shipped model, else {MODEL_MIB}.", min=0
        ),
    ] = 0,
    text: Annotated[str, typer.Option(help="Text to read: a file, or 'heldout', Python source.")] = HELDOUT,
    picture: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("demo.png"),
    count: Annotated[int, typer.Option(help="Questions to the shipped model.", min=1, max=100)] = 60,
) -> None:
    """Run a model with each dtype and show what fits, and how far what it says changes."""
    end_on_sigterm(COMMAND)
    shipped = model == PROBE
    names = [dtype for dtype in map(str.strip, dtypes.split(",")) if dtype]
    try:
        if not names:
            raise ValueError("no --dtypes")
        check_names(names)
        read_text(text)
        if not shipped:
            _check_model(model)
        elif not (MODEL_DIR / "model.safetensors").exists():
            raise ValueError(f"no model in {MODEL_DIR}; eval/training/README.md says how to train one")
        # It is drawn minutes later.
        if picture.is_dir() or not os.access(picture if picture.exists() else picture.parent, os.W_OK):
            raise ValueError(f"cannot write a picture to {picture}")
    except ValueError as problem:
        fail(COMMAND, problem)
    use_in_process_engine()
    memory = (memory_mib or (PROBE_MIB if shipped else MODEL_MIB)) << 20
    asked = questions(count) if shipped else []
    rows, context = SIZE if shipped or query_gpu() else CPU_SIZE
    params = next_token.Params(rows=rows, context=context, top=1, text=text)
    title = "The shipped model" if shipped else Path(model).name
    console = Console()
    columns: tuple[Any, ...] = (
        TextColumn("{task.description:44}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    runs: list[Run] = []
    with Progress(*columns, console=console) as progress:
        for dtype in names:
            try:
                folder = str(MODEL_DIR) if shipped else model
                runs.append(measure(folder, dtype, memory, params, asked, progress))
            except Exception as problem:
                progress.stop()
                fail(COMMAND, f"{dtype}: {reason(problem)}", FAILED)
    show(console, runs, asked, title, memory)
    draw(picture, runs, title, memory)
    console.print(f"Picture: {picture}")


if __name__ == "__main__":
    typer.run(main)
