"""The tables and panels of the engine benchmark's report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from vllm_polarquant.eval.bench.engine_speculation import DRAFT_LAYERS, WORDS
from vllm_polarquant.eval.bench.grid import short
from vllm_polarquant.eval.report.cells import number, ratio, shown, times, value
from vllm_polarquant.eval.report.page import Report, Section
from vllm_polarquant.eval.report.panels import Panel

TITLE = "The engine"


def _requests(shape: str) -> str:
    count, _, tokens = shape.partition("x")
    return f"{count} {'request' if count == '1' else 'requests'} of {short(int(tokens))} tokens"


def _prompt(tokens: str) -> str:
    return f"a prompt of {short(int(tokens))} tokens"


def _prefix(shape: str) -> str:
    prefix, _, new = shape.partition("x")
    return f"{short(int(new))} new after {int(prefix):,} cached tokens"


class Kind(NamedTuple):
    """A kind of finding: its name, its unit, which values are better, and its shape in words."""

    name: str
    unit: str
    better: Literal["higher", "lower"]
    words: Callable[[str], str]


KINDS = {
    "prefill_tokens_per_s": Kind("Prefill", "tokens/s", "higher", _requests),
    "ttft_ms": Kind("Time to first token", "ms", "lower", _prompt),
    "ttft_prefix_ms": Kind("Time to first token on a cached prefix", "ms", "lower", _prefix),
    "tpot_ms": Kind("Time per output token", "ms", "lower", _requests),
}


def sections(found: Report) -> list[Section]:
    """Capacity and prefill, latencies, and the full memory, a row a dtype, with ratios to the first."""
    runs = found["runs"]
    base: dict[str, Any] = next(iter(runs.values()), {})
    made = [_capacity(runs, base)] if runs else []
    for kind in KINDS:
        names = _named(runs, kind)
        if names:
            made.append(_measured(runs, base, names, KINDS[kind]))
    for name in _named(runs, "full_memory"):
        made.append(_full(runs, base, name))
    if speculated := found.get("speculation"):
        made.append(_speculated(speculated))
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
                times(ratio(run.get("kv_tokens"), base.get("kv_tokens"))),
                number(run.get("boot_s")),
                *(number(held.get("extra")) for held in memory),
                number(memory[1].get("peak")),
                run.get("error", "complete"),
            ]
        )
    header = ["dtype", "KV tokens", "ratio", "boot s", "extra MiB", "after", "peak", "run"]
    tokens = {name: [value(run.get("kv_tokens"))] for name, run in runs.items()}
    return Section(
        title="What fits",
        header=header,
        rows=body,
        note="Extra MiB: what torch holds on the GPU beside weights and pages after the start, after all "
        "runs, and at its peak (activations of the largest batch included). It contains CUDA graphs.",
        panels=[Panel("KV tokens that fit", "tokens", ["in the memory left of one GPU"], tokens)],
    )


def _measured(runs: dict[str, Any], base: dict[str, Any], names: list[str], kind: Kind) -> Section:
    labels = [kind.words(name.split(" ", 1)[1]) for name in names]
    body = []
    for dtype, run in runs.items():
        line = [dtype]
        for name in names:
            line.append(shown(_cell(run, run.get(name))))
            line.append(times(ratio(run.get(name), base.get(name))))
        body.append(line)
    header = ["dtype"]
    for label in labels:
        header += [label, f"of {next(iter(runs))}"]
    series = {dtype: [ratio(run.get(name), base.get(name)) for name in names] for dtype, run in runs.items()}
    return Section(
        title=f"{kind.name}, {kind.unit}",
        header=header,
        rows=body,
        note="Median (min-max).",
        panels=[Panel(kind.name, f"times that of {next(iter(runs))}", labels, series, kind.better, line=1.0)],
    )


def _full(runs: dict[str, Any], base: dict[str, Any], name: str) -> Section:
    context = short(int(name.split(" ", 1)[1]))
    first = base.get(name, {}).get("tokens_per_s")
    body = []
    for dtype, run in runs.items():
        full = run.get(name, {})
        rate = full.get("tokens_per_s")
        body.append(
            [
                dtype,
                number(full.get("requests")),
                shown(_cell(run, full if "error" in full else rate)),
                times(ratio(rate, first)),
                shown(full.get("with_scheduling_tokens_per_s")),
                number(full.get("fill_s")),
                number(full.get("preemptions")),
            ]
        )
    rates = {dtype: [value(run.get(name, {}).get("tokens_per_s"))] for dtype, run in runs.items()}
    return Section(
        title=f"Full memory: as many requests of {context} tokens as fit",
        header=["dtype", "requests", "tokens/s", "ratio", "of a whole run", "fill s", "preempted"],
        rows=body,
        note="Output tokens a second of all requests together: requests / time of a step, and of a whole run "
        "off the prefix cache, its host work included.",
        panels=[Panel("Output of a full memory", "tokens/s", [f"requests of {context} tokens"], rates)],
    )


def _speculated(found: dict[str, dict[str, Any]]) -> Section:
    """A row for each way to draft, cell and dtype; ratios to the first dtype of the same way and cell."""
    body: list[list[str]] = []
    labels: list[str] = []
    series: dict[str, list[float | None]] = {name: [] for runs in found.values() for name in runs}
    first = next(iter(series))
    for name, runs in found.items():
        method, _, tokens = name.partition(":")
        # A run that failed has no cells, but a row in each table of the others.
        cells = dict.fromkeys(cell for run in runs.values() for cell in run if cell[0].isdigit())
        for cell in cells:
            labels.append(f"{method}, {tokens}: {_requests(cell)}")
            base = runs.get(first, {}).get(cell, {}).get("step_ms")
            for dtype in series:
                mine = runs.get(dtype, {}).get(cell, {})
                step = mine.get("step_ms")
                of_base = ratio(step, base)
                series[dtype].append(of_base)
                if dtype not in runs:
                    continue
                made = value(mine.get("tokens"))
                body.append(
                    [
                        f"{method}, {tokens}",
                        _requests(cell),
                        dtype,
                        shown(_cell(runs[dtype], step)),
                        times(of_base),
                        number(mine.get("drafted")),
                        number(made),
                        number(ratio(step, made)),
                    ]
                )
        if not cells:
            body += [[f"{method}, {tokens}", "-", dtype, shown(run), *"----"] for dtype, run in runs.items()]
    header = [
        "drafts",
        "requests",
        "dtype",
        "verified step, ms",
        f"of {first}",
        "drafted",
        "tokens",
        "ms a token",
    ]
    return Section(
        title="Speculation",
        header=header,
        rows=body,
        note="A step of the engine that verifies the drafts of all requests, median (min-max); with a draft "
        "model it contains that one's forward passes. Drafted and tokens are those of a request in a step: "
        "drafts asked for, tokens gained. Dummy weights accept few drafts, whatever the dtype, and a step "
        "verifies all of them either way: compare its time. Prompts and answers are made of "
        f"{WORDS} words, so that an n-gram is always found; the draft model is a dummy of {DRAFT_LAYERS} "
        "layers and a quarter of the width, with the model's heads and the same dtype of cache.",
        panels=[Panel("A verified step", f"times that of {first}", labels, series, "lower", line=1.0)]
        if labels
        else (),
    )
