"""Time a rotation of calls: CUDA-graph replays or a stream's events on a GPU, the wall clock elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice

import torch

MIN_CALLS = 8
"""Calls that a timed round makes, so that its events' own time does not count; fewer if they are slow."""

MIN_ROUNDS, MAX_ROUNDS = 3, 20

Call = Callable[[], object]


def time_calls(
    calls: Sequence[Call], device: torch.device, budget_ms: float, capture: bool = True
) -> list[float]:
    """Microseconds a call of several rounds; each round makes every call, in turn.

    Args:
        calls: one for each layer's memory. Each is called once first, so that it compiles.
        device: where they run.
        budget_ms: time to spend on the rounds, of which there are MIN_ROUNDS at least.
        capture: whether a round is one CUDA graph, as decoding is in vLLM, or plain launches.
    """
    for call in calls:
        call()
    run = _event_round if device.type == "cuda" else _wall_round
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wanted = min(MIN_CALLS, 1 + int(budget_ms / max(run(calls[0]), 1e-3)))
    repeated = list(islice(cycle(calls), max(len(calls), wanted)))
    play = _graph(repeated, device) if capture and device.type == "cuda" else partial(_all, repeated)
    first = run(play)
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget_ms / max(first, 1e-3))))
    return [1000 * run(play) / len(repeated) for _ in range(rounds)]


def _all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _graph(calls: Sequence[Call], device: torch.device) -> Call:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    # Libraries set themselves up per stream on a first call, which must not be recorded.
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        _all(calls)
    return graph.replay


def _event_round(play: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    play()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _wall_round(play: Call) -> float:
    started = time.perf_counter()
    play()
    return 1000 * (time.perf_counter() - started)
