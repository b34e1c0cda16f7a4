"""Decode attention on CPU: packed pages against vLLM's own operator on 16-bit pages.

    python -m vllm_polarquant.eval.bench.cpu --context 4096

The two take turns, and the ratio is the median over the turns, so that other work on the machine
disturbs both alike. Each call reads the pages of the next of many layers, as serving does: pages that
were read a moment ago would still lie in the processor's cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import cycle
from statistics import median
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table

from vllm_polarquant import reference
from vllm_polarquant.attention import Attention
from vllm_polarquant.codec import tables
from vllm_polarquant.eval.bench.ours import dense_torch
from vllm_polarquant.eval.report.environment import numbers
from vllm_polarquant.format import DEFAULT_PRESET, PRESETS, Slot
from vllm_polarquant.kernels.ops import Batch, LayerShape, Limits, operations
from vllm_polarquant.page import Page

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 4, 2, 128, 128
NATIVE_BYTES = 256 << 20
"""What the 16-bit pages of all layers take together: more than a processor caches."""


class Timing(NamedTuple):
    """Milliseconds a call, and the median over turns of ours / theirs."""

    native_ms: float
    ours_ms: float
    ratio: float


def _layers(blocks: torch.Tensor) -> int:
    return max(2, NATIVE_BYTES // (blocks.numel() * KV_HEADS * BLOCK_SIZE * HEAD_DIM * 4))


def _native(query: torch.Tensor, blocks: torch.Tensor, lens: torch.Tensor) -> Callable[[], None]:
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    # vLLM has one library an instruction set, and only the right one runs on this processor.
    current_platform.import_kernels()

    batch = len(lens)
    pages = torch.randn(blocks.numel(), KV_HEADS, 2 * BLOCK_SIZE, HEAD_DIM).bfloat16()
    layers = cycle(pages.clone().chunk(2, dim=2) for _ in range(_layers(blocks)))
    starts = torch.arange(batch + 1, dtype=torch.int32)
    out = torch.empty_like(query)

    def call() -> None:
        key, value = next(layers)
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=batch, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, seq_lens=lens,
            dtype=query.dtype, query_start_loc=starts, causal=True, sliding_window_size=-1, isa="vec",
            enable_kv_split=True, dynamic_causal=None, kv_cache_dtype="auto",
        )  # fmt: skip
        ops.cpu_attention_with_kv_cache(
            query=query, key_cache=key, value_cache=value, output=out, query_start_loc=starts,
            seq_lens=lens, scale=HEAD_DIM**-0.5, causal=True, alibi_slopes=None, sliding_window=-1,
            block_table=blocks, softcap=0.0, scheduler_metadata=schedule, s_aux=None,
            dynamic_causal=None, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto",
        )  # fmt: skip

    return call


def _ours(preset: str, query: torch.Tensor, blocks: torch.Tensor, lens: torch.Tensor) -> Callable[[], None]:
    slot, batch = Slot(preset, HEAD_DIM), len(lens)
    ops = operations(LayerShape(slot, HEADS, KV_HEADS, query.dtype, query.device), Limits(batch), dense_torch)
    constants, attention = tables(slot, query.dtype, query.device), Attention(HEAD_DIM**-0.5)
    pages = torch.randint(256, (blocks.numel(), KV_HEADS, BLOCK_SIZE, slot.nbytes), dtype=torch.uint8)
    page = Page(slot, BLOCK_SIZE)
    views = reference.page_views(pages, page, reference.rows(page))
    views.key_radius.fill_(0.1)
    views.value_radius.fill_(0.1)
    layers = cycle(pages.clone() for _ in range(_layers(blocks)))
    starts = torch.arange(batch + 1, dtype=torch.int32)
    plan = ops.planner().plan(
        Batch(batch, batch, 0, batch, starts, starts, lens, blocks, torch.empty(0, dtype=torch.int32))
    )
    out = torch.empty_like(query)

    def call() -> None:
        ops.decode(query, next(layers), plan, attention, constants, out)

    return call


def _milliseconds(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1000


def measure(preset: str, batch: int, context: int, turns: int) -> Timing:
    """Time one token of every request of a batch, all with the same context."""
    per_request = -(-context // BLOCK_SIZE)
    blocks = torch.randperm(batch * per_request).to(torch.int32).view(batch, -1)
    lens = torch.full((batch,), context, dtype=torch.int32)
    query = torch.randn(batch, HEADS, HEAD_DIM).bfloat16()
    calls = _native(query, blocks, lens), _ours(preset, query, blocks, lens)
    for call in calls * 3:
        call()
    times = [[_milliseconds(call) for call in calls] for _ in range(turns)]
    native, ours = (median(column) for column in zip(*times, strict=True))
    return Timing(native, ours, median(mine / theirs for theirs, mine in times))


def main(
    preset: Annotated[str, typer.Option(help="A polarquant dtype.")] = DEFAULT_PRESET,
    batches: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,4,16",
    context: Annotated[int, typer.Option(help="Tokens every request has.", min=1)] = 4096,
    turns: Annotated[int, typer.Option(help="Calls of each operator.", min=1)] = 50,
) -> None:
    """Print the time of one layer's decode attention and its ratio to vLLM's own."""
    if preset not in PRESETS:
        raise typer.BadParameter(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    shown = Table(title=f"{preset}, context {context}, {torch.get_num_threads()} threads")
    for name in ("batch", "vLLM 16-bit ms", "polarquant ms", "ratio"):
        shown.add_column(name, justify="right")
    for batch in numbers("--batches", batches):
        timing = measure(preset, batch, context, turns)
        shown.add_row(str(batch), f"{timing.native_ms:.3f}", f"{timing.ours_ms:.3f}", f"{timing.ratio:.2f}")
    Console().print(shown)


if __name__ == "__main__":
    typer.run(main)
