"""The child that measures jobs of the kernel benchmark, one after the other, on one device."""

from __future__ import annotations

import subprocess
from functools import partial
from typing import Any

import torch

from vllm_polarquant.eval import isolate
from vllm_polarquant.eval.bench import inputs as given
from vllm_polarquant.eval.bench import ours, theirs
from vllm_polarquant.eval.bench.grid import Case
from vllm_polarquant.eval.bench.timer import Call, time_calls
from vllm_polarquant.eval.report.cells import spread
from vllm_polarquant.eval.report.environment import NVIDIA_SMI, gpu_state
from vllm_polarquant.format import PRESETS

WRONG = {"reference": 0.02, "exact": 0.7}
"""Relative errors from which a cell counts as failed: against reference.attention on the same pages, and
against exact attention on the values before quantisation (2 bits reach 0.5, unrelated output 1)."""

_MEMORY_SHARE = 0.8
_FATAL = ("CUDA error", "illegal", "unspecified launch")
"""In the words of errors after which no call of a process can succeed."""


def bandwidth() -> dict[str, Any]:
    """Bytes a second that torch copies (reads and writes) and reads, and the GPU's state meanwhile."""
    device = torch.device("cuda")
    source = torch.ones(1 << 30, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copied = time_calls([lambda: target.copy_(source)], device, 40)
    read = time_calls([source.sum], device, 40)
    asked = subprocess.Popen(
        [*NVIDIA_SMI, "--id=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    while asked.poll() is None:
        for _ in range(20):
            target.copy_(source)
        torch.cuda.synchronize()
    line = asked.stdout.readline() if asked.stdout else ""
    return {
        "copy": spread([2 * source.nbytes * 1e6 / t for t in copied]),
        "read": spread([source.nbytes * 1e6 / t for t in read]),
        "state": gpu_state(line) if line.count(",") else {},
    }


class Bench:
    """Measures jobs on one device; all caches are cut from one allocation, which only grows.

    Args:
        device: "cuda", or "cpu" for tiny shapes.
        budget_ms: time of the repeats of one job.
        contender: what a preset's name stands for.
    """

    def __init__(self, device: str, budget_ms: float, contender: Any = ours.Polar) -> None:
        self.device, self.budget_ms, self.contender = torch.device(device), budget_ms, contender
        self.pool = torch.empty(0, dtype=torch.uint8, device=self.device)
        cuda = self.device.type == "cuda"
        total = torch.cuda.mem_get_info()[1] if cuda else 1 << 30
        self.limit = int(_MEMORY_SHARE * total)

    def caches(self, case: Case, slot_bytes: int) -> torch.Tensor:
        """uint8 [layers, blocks, block_size, kv_heads, slot_bytes]; MemoryError if they do not fit."""
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
        contender = self.contender(name) if name in PRESETS else theirs.peer(name)
        if name not in PRESETS and self.device.type != "cuda":
            raise RuntimeError("needs a GPU")
        slot_bytes = contender.slot_bytes(case.head_dim)
        caches = self.caches(case, slot_bytes)
        inputs = given.make_inputs(case, self.device)
        layers = contender.open(inputs, list(caches))
        result: dict[str, Any] = {"slot_bytes": slot_bytes, "bytes": case.moved_bytes(slot_bytes)}
        if case.op == "store":
            new = inputs.key, inputs.value, inputs.slots
            calls: list[Call] = [partial(layer.store, *new) for layer in layers]
        else:
            given.fill(layers, list(caches), inputs)
            out = layers[0].attend()[given.checked_rows(case)]
            errors = {"exact": given.relative_error(out, given.exact_attention(inputs))}
            if case.op == "decode" and isinstance(layers[0], ours.PolarLayer):
                if case.seq_lens[0] <= given.REFERENCE_CONTEXT:
                    errors["reference"] = given.relative_error(out, layers[0].reference())
                else:
                    result["reference"] = "not compared: too long"
            result["errors"] = errors
            wrong = [f"{kind} {e:.3f}" for kind, e in errors.items() if not e < WRONG[kind]]
            if wrong:
                raise ArithmeticError(f"wrong output, relative error {', '.join(wrong)}")
            calls = [layer.attend for layer in layers]
        # vLLM captures decoding in CUDA graphs, and launches a prefill's attention one by one.
        taken = time_calls(calls, self.device, self.budget_ms, capture=case.op != "prefix")
        return result | spread(taken) | {"layers": len(layers)}


def explain(problem: Exception) -> str:
    """Why a job failed, in a line."""
    if isinstance(problem, ModuleNotFoundError) and (problem.name or "").split(".")[0] == "vllm":
        return "not installed"
    return isolate.why(problem)[:300]


def work(job: dict[str, Any], report: isolate.Report) -> None:
    """Report {"limits": ...}, and {"start": i} and {"done": result} for each of the job's cells."""
    bench = Bench(job["device"], job["budget_ms"])
    report({"limits": bandwidth() if job["device"] == "cuda" and job["first"] else {}})
    for i, (case, name) in enumerate(job["cells"]):
        report({"start": i})
        fatal = False
        try:
            with torch.inference_mode():
                result = bench.run(Case(**case), name)
        except Exception as problem:
            result = {"error": explain(problem)}
            fatal = any(sign in result["error"] for sign in _FATAL)
        report({"done": result})
        if fatal:
            return


if __name__ == "__main__":
    isolate.serve(work)
