"""The CPU kernels against reference.py, on the same pages, and their speed against vLLM's own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from kernel_cases import (
    ALL_PRESETS,
    DTYPES,
    LAYOUTS,
    Batch,
    bits_of,
    cosines,
    empty_cache,
    make_batch,
    radius_for,
    relative_error,
    vectors,
)

from vllm_polarquant import reference
from vllm_polarquant.codec import tables
from vllm_polarquant.eval import bench_cpu
from vllm_polarquant.format import PolarFormat
from vllm_polarquant.kernels import cpu

pytest.importorskip("numba")

CPU = torch.device("cpu")
NAN = float("nan")
K4V4 = "polarquant_k4v4"
DIMS = (64, 80, 128, 256)
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 2.5e-3}
"""Relative error: points are bfloat16 whatever the model is, query and output the model's dtype."""


def decode(batch: Batch, max_query_len: int) -> torch.Tensor:
    out = torch.full_like(batch.query, NAN)
    out[int(batch.query_start_loc[-1]) :] = 7
    cpu.decode_attention(
        batch.query,
        batch.cache,
        batch.block_table,
        batch.seq_lens,
        batch.query_start_loc,
        max_query_len,
        batch.fmt,
        batch.tables,
        batch.scale,
        out,
    )
    return out


def check_decode(batch: Batch, max_query_len: int) -> None:
    before = batch.cache.clone()
    out = decode(batch, max_query_len)
    want = reference.attention(
        batch.query,
        batch.cache,
        batch.block_table,
        batch.seq_lens,
        batch.query_start_loc,
        batch.fmt,
        batch.scale,
    )
    owned = int(batch.query_start_loc[-1])
    assert relative_error(out[:owned], want[:owned]) < TOLERANCE[batch.query.dtype]
    assert (out[owned:] == 7).all(), "rows of no request were written"
    assert torch.equal(batch.cache, before)


@pytest.mark.parametrize("preset", ALL_PRESETS)
@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_of_every_format(preset: str, head_dim: int, dtype: torch.dtype) -> None:
    fmt = PolarFormat(preset, head_dim, 32)
    check_decode(make_batch(fmt, [1, 75, 33], [1, 1, 1], dtype, CPU, padding=2), 1)


@pytest.mark.parametrize("layout", [layout for layout, _ in LAYOUTS])
@pytest.mark.parametrize("block_size", [16, 32, 48, 128])
def test_decode_of_every_layout_and_block_size(layout: str, block_size: int) -> None:
    fmt = PolarFormat("polarquant_k3v2", 128, block_size)
    batch = make_batch(fmt, [257, 5, 129], [1, 1, 1], torch.bfloat16, CPU, layout=layout)
    check_decode(batch, 1)


@pytest.mark.parametrize("query_len", range(1, 9))
@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_decode_of_several_query_tokens_is_causal(query_len: int, group: int) -> None:
    fmt = PolarFormat(K4V4, 64, 16)
    lens = [query_len, 1, query_len]
    # The last request is nothing but its queries: the first of them sees one key.
    seq_lens = [61, 17, query_len]
    check_decode(make_batch(fmt, seq_lens, lens, torch.float16, CPU, group=group, padding=3), query_len)


@pytest.mark.parametrize("threads", [1, 2])
def test_decode_gives_the_same_whatever_the_number_of_threads(threads: int) -> None:
    batch = make_batch(PolarFormat(K4V4, 128, 128), [1000, 3], [2, 1], torch.bfloat16, CPU)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_decode(batch, 2)
    finally:
        torch.set_num_threads(before)


def test_torch_keeps_the_number_of_threads_it_was_given() -> None:
    code = (
        "import torch; from vllm_polarquant.kernels import cpu; before = torch.get_num_threads(); "
        "used = cpu._use_torch_threads(); print(before, used, torch.get_num_threads())"
    )
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert child.stdout.split() == ["1", "1", "1"]


def test_decode_without_requests_writes_nothing() -> None:
    batch = make_batch(PolarFormat(K4V4, 128, 16), [9], [1], torch.bfloat16, CPU)
    batch.seq_lens, batch.block_table = batch.seq_lens[:0], batch.block_table[:0]
    batch.query_start_loc = batch.query_start_loc[:1]
    assert (decode(batch, 1) == 7).all()


def test_a_request_without_queries_is_left_out() -> None:
    """As in a padded batch: no tokens, no keys, a block table of garbage."""
    fmt = PolarFormat(K4V4, 128, 16)
    check_decode(make_batch(fmt, [40, 0, 21], [1, 0, 1], torch.bfloat16, CPU), 1)


def test_large_logits_do_not_overflow() -> None:
    batch = make_batch(PolarFormat(K4V4, 128, 64), [300], [1], torch.bfloat16, CPU)
    batch.query *= 500
    out = decode(batch, 1)
    assert torch.isfinite(out).all()
    check_decode(batch, 1)


@pytest.mark.parametrize("preset", ALL_PRESETS)
@pytest.mark.parametrize("head_dim", DIMS)
def test_store_writes_the_bytes_of_the_reference(preset: str, head_dim: int) -> None:
    layout, block_size = LAYOUTS[DIMS.index(head_dim)]
    fmt = PolarFormat(preset, head_dim, block_size)
    key, value = (vectors((83, 2, head_dim), torch.bfloat16, CPU) for _ in "kv")
    slots = torch.randperm(6 * block_size)[:83]
    slots[::7] = -1
    have, want = (empty_cache(fmt, 6, 2, CPU, layout) for _ in range(2))
    # vLLM may pass more rows than slots.
    extra = torch.full((3, 2, head_dim), NAN, dtype=torch.bfloat16)
    cpu.store_kv(
        torch.cat([key, extra]),
        torch.cat([value, extra]),
        have,
        slots,
        fmt,
        tables(fmt, torch.bfloat16, CPU),
    )
    reference.store_kv(key, value, want, slots, fmt)
    kept = slots >= 0
    block, place = slots[kept] // block_size, slots[kept] % block_size
    ours, theirs = reference.page_views(have, fmt), reference.page_views(want, fmt)
    for x, vector, kind in ((key, fmt.key, "key"), (value, fmt.value, "value")):
        codes, expected = (getattr(views, f"{kind}_codes")[block, :, place] for views in (ours, theirs))
        best = cosines(x[kept], expected, vector, x.dtype)
        lost = best - cosines(x[kept], codes, vector, x.dtype)
        if vector.kind == "polar":
            # Cells may name the farther of two points that are about as near.
            assert lost.mean() < 0.01 * (1 - best).mean()
            assert lost.max() < 0.004
        else:
            assert (codes != expected).double().mean() < 0.01
            assert lost.max() < 1e-5
        radius = getattr(ours, f"{kind}_radius")[block, :, place]
        wanted = radius_for(x[kept], codes, vector, x.dtype)
        assert (bits_of(radius) - bits_of(wanted)).abs().max() <= 1
    # Nothing but the slots was written, in no layer.
    for views in (ours, theirs):
        for view in views:
            view[block, :, place] = 0
    assert torch.equal(have, want)
    assert torch.equal(have._base, want._base)


def test_vectors_with_nan_are_stored_as_zero_and_disturb_nobody() -> None:
    fmt = PolarFormat(K4V4, 128, 16)
    constants = tables(fmt, torch.bfloat16, CPU)
    key, value = (vectors((40, 2, 128), torch.bfloat16, CPU) for _ in "kv")
    key[3, 0, 5], value[7, 1, 0], key[9, 1] = NAN, float("inf"), 0
    slots = torch.arange(40)
    have, want = (empty_cache(fmt, 3, 2, CPU) for _ in range(2))
    cpu.store_kv(key, value, have, slots, fmt, constants)
    reference.store_kv(key, value, want, slots, fmt)
    radii = [reference.page_views(cache, fmt).key_radius.flatten(1) for cache in (have, want)]
    assert torch.equal(radii[0][0, [3, 25]], torch.zeros(2, dtype=torch.float16))
    query = torch.randn(1, 4, 128).bfloat16()
    out = torch.full_like(query, NAN)
    table = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    lens, starts = torch.tensor([40], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    cpu.decode_attention(query, have, table, lens, starts, 1, fmt, constants, 0.09, out)
    exact = reference.attention(query, have, table, lens, starts, fmt, 0.09)
    assert relative_error(out, exact) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("preset", ALL_PRESETS)
@pytest.mark.parametrize(("context", "fresh"), [(0, 33), (1, 1), (37, 20), (1000, 3)], ids=lambda n: str(n))
def test_prefill_attends_to_the_prefix_and_causally_to_itself(preset: str, context: int, fresh: int) -> None:
    check_prefill(PolarFormat(preset, 128, 48), context, fresh, torch.bfloat16)


@pytest.mark.parametrize("head_dim", DIMS)
def test_prefill_of_every_head_dim(head_dim: int) -> None:
    check_prefill(PolarFormat(K4V4, head_dim, 16), 50, 31, torch.float16)


def test_prefill_merges_prefixes_longer_than_one_part() -> None:
    check_prefill(PolarFormat(K4V4, 64, 128), 2 * cpu._PREFIX_TOKENS + 5, 9, torch.float16)


def check_prefill(fmt: PolarFormat, context: int, fresh: int, dtype: torch.dtype) -> None:
    """Against float64 attention over the decoded prefix and the fresh keys and values as they are."""
    heads, group = 2, 3
    # Blocks are written in another order than they are read.
    batch = make_batch(fmt, [max(context, 1)], [1], dtype, CPU, heads=heads, group=group)
    key, value = (vectors((fresh, heads, fmt.head_dim), dtype, CPU) for _ in "kv")
    query = torch.randn(fresh, heads * group, fmt.head_dim).to(dtype)
    out = torch.full_like(query, NAN)
    cpu.prefill_attention(
        query,
        key,
        value,
        batch.cache,
        batch.block_table[0],
        context,
        fmt,
        batch.tables,
        batch.scale,
        out,
    )
    before = reference.read_kv(batch.cache, batch.block_table[0], context, fmt, dtype)
    keys, values = (
        torch.cat([old.double(), new.double()]).repeat_interleave(group, 1)
        for old, new in zip(before, (key, value), strict=True)
    )
    logits = torch.einsum("qhd,khd->hqk", query.double(), keys) * batch.scale
    visible = torch.arange(len(keys)) <= context + torch.arange(fresh)[:, None]
    weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)
    want = torch.einsum("hqk,khd->qhd", weights, values)
    assert relative_error(out, want) < 2 * TOLERANCE[dtype]


def test_numbas_threads_leave_nested_parallel_regions_forbidden() -> None:
    """Numba allows them, and torch's bfloat16 attention then takes five times as long."""
    omp_get_max_active_levels = getattr(ctypes.CDLL(None), "omp_get_max_active_levels", None)
    if omp_get_max_active_levels is None:
        pytest.skip("torch does not use OpenMP here")
    decode(make_batch(PolarFormat(K4V4, 128, 16), [9], [1], torch.bfloat16, CPU), 1)
    assert omp_get_max_active_levels() == 1


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
def test_decode_takes_at_most_three_times_as_long_as_vllms_own(batch: int) -> None:
    """The best of several rounds counts: other work on the machine only ever makes a ratio worse."""
    pytest.importorskip("vllm")
    rounds = []
    while len(rounds) < 8 and (not rounds or min(rounds) > 3):
        rounds.append(bench_cpu.measure(K4V4, batch, context=4096, turns=15).ratio)
    assert min(rounds) <= 3, rounds
