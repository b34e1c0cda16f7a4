"""Random serving through vLLM's engine, and random pages through the readers of a CPU."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from engine_runs import run
from kernel_cases import page_for, relative_error

pytest.importorskip("numba")

import cpu_cases
from cpu_cases import Case, make_case

from vllm_polarquant import reference
from vllm_polarquant.eval.soak import NEAR_TIE, Asked, difference
from vllm_polarquant.format import LOSSLESS
from vllm_polarquant.kernels.cpu.ops import CpuOperations

# Serving.


@pytest.mark.slow
def test_random_serving_gives_each_request_what_it_gets_alone() -> None:
    pytest.importorskip("vllm")
    found = run("soak", LOSSLESS, 24, VLLM_POLARQUANT_LOSSLESS="1")
    assert found["status"] == 0, found["log"][-4000:]
    assert found["wrong"] == []
    # What the answers stand for.
    for name in ("aborted", "num_preemptions", "prefix_cache_hits", "spec_decode_num_accepted_tokens"):
        assert found[name], found
    assert found["compared"] > 15 and found["tokens"] > 100


def answer(tokens: list[int], *logprobs: list[float], aborted: bool = False) -> Asked:
    ranked = list(logprobs) or [[-0.1, -3.0] for _ in tokens]
    return Asked("1", [0], {}, tokens, ranked, aborted)


@pytest.mark.parametrize(
    ("asked", "again", "words"),
    [
        (answer([1, 2, 3]), answer([1, 2, 3]), ""),
        (answer([1, 2, 3]), answer([1, 9, 3]), "token 1 is 2, alone 9"),
        (answer([1, 2]), answer([1, 9], [-0.1, -3.0], [-0.70, -0.71]), ""),
        (answer([1, 2]), answer([1, 2], [-0.1, -3.0], [-0.5, -3.0]), "token 1 has logprob"),
        (answer([1, 2]), answer([1, 2, 3]), "2 tokens, alone 3"),
        (answer([1, 2, 3]), answer([1, 2]), "3 tokens, alone 2"),
        (answer([1, 2], aborted=True), answer([1, 2, 3]), ""),
        (answer([1, 5], aborted=True), answer([1, 2, 3]), "token 1 is 5, alone 2"),
    ],
)
def test_answers_differ_only_at_ties(asked: Asked, again: Asked, words: str) -> None:
    found = difference(asked, again, NEAR_TIE)
    assert found.startswith(words) and bool(found) == bool(words)


# Readers.


@pytest.fixture
def unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are filled with random bytes later: searching for codes would take most of the time."""
    monkeypatch.setattr(cpu_cases, "write", lambda *_: None)


def random_case(rng: random.Random, preset: str) -> Case:
    """Any batch: decodes of any length and padding, chunks after any context, any kind of attention."""
    page = page_for(preset, 64, 16)
    decodes = [(0, 0) if rng.random() < 0.2 else (rng.randint(2, 300), rng.randint(1, 2)) for _ in range(3)]
    prefills = [(rng.choice((0, rng.randint(1, 290))), rng.randint(3, 40)) for _ in range(2)]
    kind: dict[str, Any] = {}
    # Of all or none: each kind is compiled, which takes longer than all that is tried here.
    if rng.random() < 0.5:
        kind = {"window": rng.randint(1, 300), "soft_cap": 20.0, "sinks": torch.randn(4)}
    return make_case(
        page,
        decodes,
        prefills,
        layout=rng.choice(("LBHNC", "BLHNC", "LBNHC")),
        padding=rng.randint(0, 3),
        centred=rng.random() < 0.5,
        from_pages=rng.random() < 0.5,
        **kind,
    )


def blocks_of(case: Case, request: int) -> torch.Tensor:
    mine = case.batch.block_table[request].long()
    return mine[mine < len(case.cache)]


def scramble(case: Case, request: int, radius: float) -> None:
    """Random bytes for the codes of a request's pages; radii up to `radius`, of either sign."""
    views = reference.page_views(case.cache, case.page, reference.rows(case.page))
    for block in blocks_of(case, request).tolist():
        for codes in (views.key_codes, views.value_codes):
            codes.region[block].random_(0, 256)
        for radii in (views.key_radius, views.value_radius):
            radii[block] = ((2 * torch.rand(radii[block].shape) - 1) * radius).bfloat16()


def attended(case: Case) -> torch.Tensor:
    """Outputs of every request."""
    out = case.out()
    ops = CpuOperations(case.shape)
    plan = ops.planner((case.attention.window,)).plan(case.batch)
    ops.decode(case.query, case.cache, plan, case.attention, case.tables, out)
    ops.prefill(case.query, case.key, case.value, case.cache, plan, case.attention, case.tables, out)
    return out


@pytest.mark.usefixtures("unwritten")
def test_random_pages_are_read_as_the_reference_reads_them() -> None:
    """Whatever lies around the cache, and in blocks of nobody, is NaN."""
    for seed in range(25):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        case = random_case(rng, "polarquant_k4v4")
        requests = len(case.batch.seq_lens)
        broken = rng.randrange(requests)
        for request in range(requests):
            scramble(case, request, float("nan") if request == broken else 3.0)
        before = case.cache.clone()
        out = attended(case)
        assert torch.equal(case.cache, before), seed
        wanted = case.expected_decode().out + case.expected_prefill()
        for request in range(requests):
            rows = case.rows(request)
            if rows.stop > rows.start and request != broken:
                assert out[rows].isfinite().all(), (seed, request)
                assert relative_error(out[rows], wanted[rows]) < 2e-2, (seed, request)


@pytest.mark.usefixtures("unwritten")
def test_the_reference_keeps_nan_to_the_request_that_has_it() -> None:
    for seed in range(12):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        case = random_case(rng, "polarquant_k4v4")
        batch, decodes = case.batch, case.batch.num_decodes
        broken = rng.randrange(decodes)
        for request in range(decodes):
            scramble(case, request, float("nan") if request == broken else 3.0)
        if case.attention.window is not None:
            # It reads keys that no query sees, too, and those of blocks that were freed are nobody's.
            continue
        out = reference.attention(
            case.query[: batch.num_decode_tokens],
            case.cache,
            batch.block_table[:decodes],
            batch.seq_lens[:decodes],
            batch.query_start_loc[: decodes + 1],
            case.page,
            reference.rows(case.page),
            case.attention,
            tables=case.tables,
        ).out
        for request in range(decodes):
            rows = case.rows(request)
            if request != broken:
                assert out[rows].isfinite().all(), (seed, request)
