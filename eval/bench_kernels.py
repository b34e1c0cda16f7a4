"""Store, decode attention and prefix attention on one layer's pages: ours and vLLM's own, in one run.

    python -m vllm_polarquant.eval.bench_kernels --out bench-kernels

Needs torch and Triton; without vLLM its kernels are reported as not installed. A worker process measures
one contender on one shape at a time and is replaced when it dies or takes too long, so that a kernel that
faults or hangs costs its own cell only. Off the GPU (--device cpu) tiny shapes run under Triton's
interpreter, to try the command; those times mean nothing.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_polarquant.eval import report
from vllm_polarquant.eval.grid import (
    CENTRE,
    PEERS,
    Case,
    default_cases,
    full_cases,
    jobs,
    parse_decode,
    tiny_cases,
)
from vllm_polarquant.eval.report import Panel, Report, Section
from vllm_polarquant.format import DEFAULT_PRESET, PRESETS

TITLE = "Kernels of one layer"
START_LIMIT_S = 180.0
"""For a worker to import torch and vLLM and to measure the memory's bandwidth."""

WRONG = {"reference": 0.02, "exact": 0.7}
"""Relative errors from which a cell counts as failed: against reference.attention on the same pages, and
against exact attention on the values before quantisation (2 bits reach 0.5, unrelated output 1)."""

_MEMORY_SHARE = 0.8
_OPERATIONS = ("decode", "store", "prefix")

Job = tuple[Case, str]


# The worker.


def _bandwidth() -> dict[str, Any]:
    """Bytes a second that torch copies (reads and writes) and reads, and the GPU's state meanwhile."""
    import torch

    from vllm_polarquant.eval.timer import time_calls

    device = torch.device("cuda")
    source = torch.ones(1 << 30, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copied = time_calls([lambda: target.copy_(source)], device, 40)
    read = time_calls([source.sum], device, 40)
    asked = subprocess.Popen(
        [*report.NVIDIA_SMI, "--id=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    while asked.poll() is None:
        for _ in range(20):
            target.copy_(source)
        torch.cuda.synchronize()
    line = asked.stdout.readline() if asked.stdout else ""
    return {
        "copy": report.spread([2 * source.nbytes * 1e6 / t for t in copied]),
        "read": report.spread([source.nbytes * 1e6 / t for t in read]),
        "state": report.gpu_state(line) if line.count(",") else {},
    }


class Bench:
    """Measures jobs on one device; all caches are cut from one allocation, which only grows."""

    def __init__(self, device: str, budget_ms: float) -> None:
        import torch

        self.device, self.budget_ms = torch.device(device), budget_ms
        self.pool = torch.empty(0, dtype=torch.uint8, device=self.device)
        cuda = self.device.type == "cuda"
        total = torch.cuda.mem_get_info()[1] if cuda else 1 << 30
        self.limit = int(_MEMORY_SHARE * total)

    def _caches(self, case: Case, slot_bytes: int) -> Any:
        import torch

        layers = case.layers(slot_bytes) if self.device.type == "cuda" else 2
        size = layers * case.layer_bytes(slot_bytes)
        if size > self.limit:
            raise MemoryError(f"does not fit: {size / 2**30:.0f} of {self.limit / 2**30:.0f} GiB")
        if len(self.pool) < size:
            self.pool = torch.empty(0, dtype=torch.uint8, device=self.device)
            self.pool = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self.pool[:size].view(layers, case.blocks, case.block_size, case.kv_heads, slot_bytes)

    def run(self, case: Case, name: str) -> dict[str, Any]:
        """Microseconds a call, the errors of what the calls computed, and the bytes that had to move."""
        from vllm_polarquant.eval import contenders, peers
        from vllm_polarquant.eval.timer import Call, time_calls

        contender = contenders.Polar(name) if name in PRESETS else peers.peer(name)
        if name not in PRESETS and self.device.type != "cuda":
            raise RuntimeError("needs a GPU")
        slot_bytes = contender.slot_bytes(case.head_dim)
        caches = self._caches(case, slot_bytes)
        inputs = contenders.make_inputs(case, self.device)
        layers = contender.open(inputs, list(caches))
        result: dict[str, Any] = {"slot_bytes": slot_bytes, "bytes": case.moved_bytes(slot_bytes)}
        if case.op == "store":
            new = inputs.key, inputs.value, inputs.slots
            calls: list[Call] = [partial(layer.store, *new) for layer in layers]
        else:
            contenders.fill(layers, list(caches), inputs)
            out = layers[0].attend()[contenders.checked_rows(case)]
            errors = {"exact": contenders.relative_error(out, contenders.exact_attention(inputs))}
            if case.op == "decode" and isinstance(layers[0], contenders.PolarLayer):
                if case.seq_lens[0] <= contenders.REFERENCE_CONTEXT:
                    want = layers[0].reference()
                    errors["reference"] = contenders.relative_error(out, want)
                else:
                    result["reference"] = "not compared: too long"
            result["errors"] = errors
            wrong = [f"{kind} {e:.3f}" for kind, e in errors.items() if not e < WRONG[kind]]
            if wrong:
                raise ArithmeticError(f"wrong output, relative error {', '.join(wrong)}")
            calls = [layer.attend for layer in layers]
        # vLLM captures decoding in CUDA graphs, and launches a prefill's attention one by one.
        taken = time_calls(calls, self.device, self.budget_ms, capture=case.op != "prefix")
        return result | report.spread(taken) | {"layers": len(layers)}


def _explain(problem: Exception) -> str:
    if isinstance(problem, ModuleNotFoundError) and (problem.name or "").split(".")[0] == "vllm":
        return "not installed"
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text}"[:300]


def work(pipe: Connection, todo: Sequence[Job], device: str, budget_ms: float, first: bool) -> None:
    """Send ("start", i) and ("done", result) for each job; runs in a process of its own."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if device == "cpu":
        # Triton decides when it is first imported.
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    # Loaded now, so that no cell's time pays for it.
    from vllm_polarquant.eval import contenders, peers  # noqa: F401

    bench = Bench(device, budget_ms)
    pipe.send(("limits", None, _bandwidth() if device == "cuda" and first else {}))
    for i, (case, name) in enumerate(todo):
        pipe.send(("start", i))
        fatal = False
        try:
            with torch.inference_mode():
                result = bench.run(case, name)
        except Exception as problem:
            result = {"error": _explain(problem)}
            fatal = any(sign in result["error"] for sign in ("CUDA error", "illegal", "unspecified launch"))
        pipe.send(("done", result))
        if fatal:
            # After a device-side fault no call of this process can succeed.
            return
    pipe.close()


# The parent.


def measure(
    todo: Sequence[Job], device: str, budget_ms: float, limit_s: float
) -> Iterator[tuple[str, Any, Any]]:
    """Yield ("limits", None, bandwidths) and then ("cell", job, result) for every job, in order."""
    context = multiprocessing.get_context("spawn")
    done = 0
    greeted = False
    while done < len(todo):
        ours, theirs = context.Pipe()
        worker = context.Process(
            target=work, args=(theirs, todo[done:], device, budget_ms, not greeted), daemon=True
        )
        worker.start()
        theirs.close()
        lost = None
        running = False
        before = done
        while lost is None and done < len(todo):
            wait = limit_s if running else START_LIMIT_S
            try:
                message = ours.recv() if ours.poll(wait) else None
            except EOFError:
                worker.join()
                lost = f"the worker ended with {worker.exitcode}"
                break
            if message is None:
                lost = f"exceeded {wait:.0f} s"
            elif message[0] == "limits":
                if not greeted:
                    yield message
                greeted = True
            elif message[0] == "start":
                running = True
            else:
                running = False
                yield "cell", todo[done], message[1]
                done += 1
        worker.kill()
        worker.join()
        if not greeted:
            raise RuntimeError(f"no cell could be measured: {lost}")
        if lost is not None and (running or done == before):
            yield "cell", todo[done], {"error": lost}
            done += 1


def _rows(cells: list[dict[str, Any]], op: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Results of one operation by shape and contender."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in cells:
        if cell["op"] == op:
            found.setdefault(cell["label"], {})[cell["name"]] = cell["result"]
    return found


def sections(found: Report) -> list[Section]:
    """A table of every operation, and one of the rows where all presets were measured."""
    bandwidth = max((report.value(b) or 0 for b in found["bandwidth"].values()), default=0)
    names = found["contenders"]
    mine = DEFAULT_PRESET if DEFAULT_PRESET in names else names[-1]
    main = [name for name in names if name not in PRESETS or name == mine]
    made = []
    for op in _OPERATIONS:
        rows = _rows(found["cells"], op)
        if not rows:
            continue
        made.append(_times(op, rows, main, mine, bandwidth))
        compared = [label for label, row in rows.items() if len(row) > len(main)]
        if compared and op != "prefix":
            label = CENTRE.label if CENTRE.label in compared else compared[-1]
            made.append(_presets(op, label, rows[label], names, bandwidth))
    return made


def _floor(result: dict[str, Any] | None, bandwidth: float) -> float | None:
    """Microseconds that the bytes of a result take at least."""
    return result["bytes"] * 1e6 / bandwidth if result and "bytes" in result and bandwidth else None


def _times(
    op: str, rows: dict[str, dict[str, dict[str, Any]]], names: list[str], mine: str, bandwidth: float
) -> Section:
    body = []
    speed: dict[str, list[float | None]] = {name: [] for name in names if name != "auto"}
    if op == "decode":
        speed["HBM limit"] = []
    for label, row in rows.items():
        ours, base = row.get(mine), row.get("auto")
        least = _floor(ours, bandwidth)
        body.append(
            [label, *(report.shown(row.get(name)) for name in names), report.number(least)]
            + [report.times(report.ratio(row.get(peer), ours)) for peer in ("auto", "fp8")]
            + [_percent(report.ratio(least, ours))]
        )
        for name, bars in speed.items():
            bars.append(report.ratio(base, least if name == "HBM limit" else row.get(name)))
    drawn = any(x is not None for bars in speed.values() for x in bars)
    return Section(
        title=f"{op.capitalize()}, us a layer",
        header=["shape", *names, "limit", f"{mine} vs auto", "vs fp8", "of limit"],
        rows=body,
        note=_NOTES[op],
        panels=[
            Panel(f"{op}: speed relative to bfloat16 (higher is faster)", "x", list(rows), speed, line=1.0)
        ]
        if drawn
        else (),
    )


def _presets(
    op: str, label: str, row: dict[str, dict[str, Any]], names: list[str], bandwidth: float
) -> Section:
    body = []
    for name in names:
        result = row.get(name, {})
        least = _floor(result, bandwidth)
        errors = result.get("errors", {})
        body.append(
            [
                name,
                report.number(result.get("slot_bytes")),
                report.shown(result),
                report.number(least),
                _percent(report.ratio(least, result)),
                *(report.times(report.ratio(row.get(peer), result)) for peer in ("auto", "fp8")),
                *(report.number(errors.get(kind)) for kind in ("exact", "reference")),
            ]
        )
    return Section(
        title=f"{op.capitalize()}, {label}: every format",
        header=["dtype", "bytes", "us", "limit", "of limit", "vs auto", "vs fp8", "error", "kernel error"],
        rows=body,
        note="Bytes of a token in one KV head. Error: of the output against exact attention on the values "
        "before quantisation, relative; kernel error: against `reference.attention` on the same pages.",
    )


def _percent(x: float | None) -> str:
    return "-" if x is None else f"{x:.0%}"


_NOTES = {
    "decode": "One token a request; rotation and the merge of a request's parts included, not what is "
    "planned once a step for all layers, of ours or FlashAttention's. CUDA-graph replays over several "
    "layers' caches, 256 MiB or more together. Median (min-max). Limit: the pages of our dtype at the "
    "measured bandwidth. Each output is compared once with exact attention, ours up to 32k tokens also with "
    "the reference on the same pages.",
    "store": "Keys and values into pages, quantisation included. CUDA-graph replays. Limit: keys and values "
    "read and pages written at the measured bandwidth. Outputs are checked by the decode table.",
    "prefix": "A chunk's attention on its cached prefix and on itself, not captured, as in vLLM. The limit "
    "counts memory only; long chunks are bound by arithmetic.",
}


def _print(console: Console, found: Report) -> None:
    for section in sections(found):
        console.print(f"\n{section.title}")
        console.print(report.markdown_table(section.header, section.rows), markup=False, soft_wrap=True)


def resumed(old: Report, new: Report, todo: Sequence[Job]) -> tuple[Report, list[Job]]:
    """`new`, still without cells, behind what an earlier report has measured, and the jobs that it lacks.

    Raises:
        typer.BadParameter: naming what differs, if they cannot stand in one table.
    """
    report.check_same(report.machine(old), report.machine(new))
    cells = [cell for cell in old["cells"] if "median" in cell["result"]]
    measured = {(cell["op"], cell["label"], cell["name"]) for cell in cells}
    names = old["contenders"] + [name for name in new["contenders"] if name not in old["contenders"]]
    both = {
        **old,
        "environment": old["environment"] | report.dates(old, new),
        "contenders": names,
        "cells": cells,
        "command": f"{old['command']} && {new['command']}",
    }
    return both, [job for job in todo if (job[0].op, job[0].label, job[1]) not in measured]


def main(
    out: Annotated[Path, typer.Option(help="Stem of the .json, .md and .png files.")] = Path("bench-kernels"),
    device: Annotated[str, typer.Option(help="cuda, or cpu for a dry run on tiny shapes.")] = "cuda",
    full: Annotated[bool, typer.Option("--full", help="The whole product of shapes and presets.")] = False,
    decode: Annotated[
        str,
        typer.Option(
            help="These decodes only, comma-separated: BATCHxCONTEXT, ...xGROUP or ...xGROUPxHEAD_DIM."
        ),
    ] = "",
    ops: Annotated[str, typer.Option(help="Operations, comma-separated.")] = ",".join(_OPERATIONS),
    dtypes: Annotated[str, typer.Option(help="--kv-cache-dtype names, comma-separated.")] = ",".join(
        (*PEERS, *PRESETS)
    ),
    budget_ms: Annotated[float, typer.Option(help="Time of the repeats of one cell.")] = 40.0,
    limit: Annotated[float, typer.Option(help="Seconds a cell may take, compilation included.")] = 40.0,
    keep: Annotated[
        bool, typer.Option("--keep", help="Go on with the report at --out: measure only what it lacks.")
    ] = False,
    render: Annotated[Path | None, typer.Option(help="Only redraw this JSON report to --out.")] = None,
) -> None:
    """Measure the grid; a cell that fails is reported in its place, and the rest are finished."""
    console = Console()
    if render is not None:
        old = json.loads(render.read_text())
        console.print(*report.write(out, TITLE, old, sections(old)), sep="\n")
        return
    names = [name for name in dtypes.split(",") if name]
    known = (*PEERS, *PRESETS)
    if unknown := [name for name in names if name not in known] or [
        o for o in ops.split(",") if o not in _OPERATIONS
    ]:
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}; dtypes: {', '.join(known)}")
    if device not in ("cuda", "cpu"):
        raise typer.BadParameter(f"--device is cuda or cpu, not {device!r}")
    if device == "cuda" and not report.query_gpu():
        console.print("No NVIDIA GPU: there is nothing to measure. --device cpu tries the command out.")
        raise typer.Exit(2)
    try:
        cases = parse_decode(decode) if decode else full_cases() if full else default_cases()
    except ValueError as problem:
        raise typer.BadParameter(str(problem)) from None
    if device == "cpu" and not decode:
        cases = tiny_cases()
    todo = jobs((case for case in cases if case.op in ops.split(",")), names, everywhere=full)
    found: Report = {
        "environment": report.environment(),
        "command": f"python -m {__spec__.name} {shlex.join(sys.argv[1:])}".strip(),
        "contenders": names,
        "bandwidth": {},
        "cells": [],
    }
    if keep:
        found, todo = resumed(report.earlier(out), found, todo)
    for kind, what, result in measure(todo, device, budget_ms, limit):
        if kind == "limits":
            found["environment"] |= result.pop("state", {})
            found["bandwidth"] = result
            continue
        case, name = what
        found["cells"].append(asdict(case) | {"label": case.label, "name": name, "result": result})
        console.print(f"{case.op} {case.label} {name}: {report.shown(result)}", markup=False, soft_wrap=True)
        report.save(out, found)
    for name, speed in found["bandwidth"].items():
        found["environment"][f"{name} bandwidth"] = f"{(report.value(speed) or 0) / 1e12:.2f} TB/s"
    _print(console, found)
    console.print(*report.write(out, TITLE, found, sections(found)), sep="\n")
    if not any("median" in cell["result"] for cell in found["cells"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
