"""The reference's attention against loops over single tokens and against torch's own with masks.

Pages hold 16-bit vectors as they are, so that what is attended to is known without the codec; but for the
last tests, of tables with centres and with factors of every head.
"""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import ALL_PRESETS, DTYPES, centred_keys, centred_tables, relative_error

from vllm_polarquant import reference
from vllm_polarquant.attention import Attention
from vllm_polarquant.codec import tables
from vllm_polarquant.format import LOSSLESS, SEGMENT, Slot
from vllm_polarquant.page import Page
from vllm_polarquant.reference import Attended

PAGE = Page(Slot("polarquant_lossless", 64), 16)
HEADS, KV_HEADS = 6, 2
SEQ_LENS, QUERY_LENS = [37, 1, 0, 20, 5], [3, 1, 0, 20, 1]
SINKS = torch.tensor([-30.0, -1.0, 0.0, 0.5, 2.0, 30.0])
ATTENTIONS = {
    "plain": Attention(0.125),
    "window": Attention(0.125, window=5),
    "window of one": Attention(0.3, window=1),
    "wide window": Attention(0.125, window=1000),
    "soft cap": Attention(0.5, soft_cap=2.0),
    "sinks": Attention(0.125, sinks=SINKS),
    "all": Attention(0.5, window=7, soft_cap=3.0, sinks=SINKS),
}


class Requests:
    """Keys and values of every request, and their pages."""

    def __init__(self) -> None:
        blocks = [-(-length // 16) for length in SEQ_LENS]
        self.cache = torch.full((sum(blocks) + 1, KV_HEADS, 16, PAGE.slot.nbytes), 0xFF, dtype=torch.uint8)
        self.block_table = torch.full((len(blocks), max(blocks)), 1 << 30, dtype=torch.int32)
        order = (torch.randperm(sum(blocks)) + 1).tolist()
        self.keys, self.values = [], []
        for request, length in enumerate(SEQ_LENS):
            mine = [order.pop() for _ in range(blocks[request])]
            self.block_table[request, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
            key, value = torch.randn(2, length, KV_HEADS, 64).half()
            slots = torch.tensor([mine[i // 16] * 16 + i % 16 for i in range(length)], dtype=torch.int64)
            reference.store_kv(key, value, self.cache, slots, PAGE, reference.rows(PAGE))
            self.keys.append(key)
            self.values.append(value)
        self.starts = torch.tensor([0, *QUERY_LENS]).cumsum(0).to(torch.int32)
        # Two rows of no request.
        self.query = torch.randn(int(self.starts[-1]) + 2, HEADS, 64).half()

    def attend(self, attention: Attention) -> Attended:
        return reference.attention(
            self.query,
            self.cache,
            self.block_table,
            torch.tensor(SEQ_LENS, dtype=torch.int32),
            self.starts,
            PAGE,
            reference.rows(PAGE),
            attention,
        )


def one_query(
    query: list[float],
    keys: list[list[float]],
    values: list[list[float]],
    seen: range,
    attention: Attention,
    sink: float | None,
) -> tuple[list[float], float]:
    """Output and log-sum-exp of one query in one head, straight from the definition."""
    logits = {}
    for token in seen:
        logit = attention.scale * math.fsum(a * b for a, b in zip(query, keys[token], strict=True))
        if attention.soft_cap is not None:
            logit = attention.soft_cap * math.tanh(logit / attention.soft_cap)
        logits[token] = logit
    total = math.fsum(map(math.exp, logits.values())) + (0 if sink is None else math.exp(sink))
    out = [math.fsum(math.exp(logits[t]) / total * values[t][j] for t in seen) for j in range(len(query))]
    return out, math.log(total) if total else -math.inf


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention_token_by_token(attention: Attention) -> None:
    requests = Requests()
    have = requests.attend(attention)
    row = 0
    for request, (length, count) in enumerate(zip(SEQ_LENS, QUERY_LENS, strict=True)):
        for position in range(length - count, length):
            first = 0 if attention.window is None else max(0, position - attention.window + 1)
            for head in (0, 2, 3, 5):
                kv_head = head * KV_HEADS // HEADS
                out, lse = one_query(
                    requests.query[row, head].tolist(),
                    requests.keys[request][:, kv_head].tolist(),
                    requests.values[request][:, kv_head].tolist(),
                    range(first, position + 1),
                    attention,
                    None if attention.sinks is None else float(attention.sinks[head]),
                )
                assert have.out[row, head].tolist() == pytest.approx(out, abs=1e-12)
                assert float(have.lse[head, row]) == pytest.approx(lse, abs=1e-12)
            row += 1
    assert not have.out[row:].any()
    assert torch.isneginf(have.lse[:, row:]).all()


@pytest.mark.parametrize("window", [None, 1, 5, 36])
def test_attention_is_torchs_with_a_mask(window: int | None) -> None:
    requests = Requests()
    have = requests.attend(Attention(0.125, window=window))
    for request, (length, count) in enumerate(zip(SEQ_LENS, QUERY_LENS, strict=True)):
        if not count:
            continue
        rows = slice(int(requests.starts[request]), int(requests.starts[request + 1]))
        mask = torch.ones(count, length, dtype=torch.bool).tril(length - count)
        if window is not None:
            mask &= ~torch.ones_like(mask).tril(length - count - window)
        query, key, value = (
            x.double().transpose(0, 1)[None]
            for x in (requests.query[rows], requests.keys[request], requests.values[request])
        )
        want = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=0.125, enable_gqa=True
        )
        assert (have.out[rows] - want[0].transpose(0, 1)).abs().max() < 1e-12


def test_a_sink_is_a_token_without_a_value() -> None:
    """Which torch can compute: one more key, whose logit is the sink's, and a value of zeros."""
    query, key, value = torch.randn(3, 9, 2, 8, dtype=torch.float64)
    sinks = torch.tensor([0.7, -2.0])
    have = reference.dense_attention(query, key, value, torch.arange(9), Attention(1.0, sinks=sinks))
    key, value = (torch.cat([torch.zeros(1, 2, 8, dtype=torch.float64), x]) for x in (key, value))
    bias = torch.zeros(2, 9, 10, dtype=torch.float64)
    bias[:, :, 0] = sinks[:, None]
    bias.masked_fill_(torch.ones(9, 10, dtype=torch.bool).triu(2), -torch.inf)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (query, key, value)), attn_mask=bias[None], scale=1.0
    )
    assert (have.out - want[0].transpose(0, 1)).abs().max() < 1e-12


def test_parts_merge_by_their_lse() -> None:
    """Tokens before a window and those in it make the whole."""
    requests = Requests()
    whole = requests.attend(Attention(0.125))
    for request, row, first in ((0, 2, 20), (4, 24, 3)):
        # The request's last query.
        after = requests.attend(Attention(0.125, window=SEQ_LENS[request] - first))
        query = requests.query[row : row + 1]
        before = reference.dense_attention(
            query,
            requests.keys[request][:first],
            requests.values[request][:first],
            torch.tensor([first - 1]),
            Attention(0.125),
        )
        lse = torch.logaddexp(before.lse[:, 0], after.lse[:, row])
        assert (lse - whole.lse[:, row]).abs().max() < 1e-12
        merged = before.out[0] * (before.lse[:, 0] - lse).exp()[:, None]
        merged += after.out[row] * (after.lse[:, row] - lse).exp()[:, None]
        assert (merged - whole.out[row]).abs().max() < 1e-12


def test_nothing_seen_is_zeros_and_no_mass() -> None:
    requests = Requests()
    none, position = requests.keys[0][:0], torch.zeros(2, dtype=torch.int64)
    have = reference.dense_attention(requests.query[:2], none, none, position, Attention(0.125))
    assert not have.out.any() and torch.isneginf(have.lse).all()
    sinks = reference.dense_attention(requests.query[:2], none, none, position, Attention(0.125, sinks=SINKS))
    assert not sinks.out.any()
    assert torch.equal(sinks.lse, SINKS.double()[:, None].expand(6, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": math.inf}, "scale must be finite"),
        ({"window": 0}, "at least the query itself"),
        ({"soft_cap": 0.0}, "positive number"),
        ({"soft_cap": math.nan}, "positive number"),
        ({"sinks": torch.zeros(4).half()}, r"float32 \[num_heads\]"),
        ({"sinks": torch.zeros(4, 1)}, r"float32 \[num_heads\]"),
    ],
)
def test_attentions_that_make_no_sense(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(**{"scale": 0.1, **change})


ERROR = {2: 0.36, 2.5: 0.25, 3: 0.17, 3.5: 0.12, 4: 0.09, 8: 0.04, 16: 1e-6}
"""Of a vector relative to its length, by the bits of a coordinate."""


@pytest.mark.parametrize("preset", ALL_PRESETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_with_a_mean_and_sinks_come_back(preset: str, dtype: torch.dtype) -> None:
    """True keys, with an error of what is left of them without their centres, as attention sees it."""
    cpu, page = torch.device("cpu"), Page(Slot(preset, 64), 16)
    held = centred_tables(page.slot, 2, dtype, cpu, 600)
    position = torch.arange(600)
    key, value = centred_keys(held, position, dtype), torch.randn(600, 2, 64).to(dtype)
    cache = torch.zeros(40, 2, 16, page.slot.nbytes, dtype=torch.uint8)
    blocks, order = torch.randperm(40).int(), reference.rows(page)
    slots = blocks[position // 16].long() * 16 + position % 16
    reference.store_kv(key, value, cache, slots, page, order, held, position // SEGMENT)
    signs = reference.page_views(cache, page, order).key_radius[blocks.long()].transpose(1, 2).flatten(0, 1)
    assert signs.signbit()[2:600].all() == (preset != LOSSLESS)
    assert not signs.signbit()[:2].any()
    back = reference.read_kv(cache, blocks, 600, page, order, dtype, held)
    # Keys less their means are of length 4 in the basis of the codes, and sinks of length 1.
    scaled = (back[0] - key) * held.key_factors
    bits = ERROR[page.slot.key.bits]
    assert scaled[2:].norm(dim=-1).square().mean().sqrt() < 4.1 * bits + (dtype == torch.bfloat16) * 0.02
    assert scaled[:2].norm(dim=-1).max() < 1.3 * 1.3 * bits
    assert relative_error(back[1], value) < ERROR[page.slot.value.bits]

    query = torch.randn(3, 4, 64).to(dtype)
    attended = reference.attention(
        query, cache, blocks[None], torch.tensor([600]), torch.tensor([0, 3]), page, order,
        Attention(0.125), held,
    )  # fmt: skip
    want = reference.dense_attention(query, *back, torch.arange(597, 600), Attention(0.125))
    assert torch.equal(attended.out, want.out) and torch.equal(attended.lse, want.lse)


@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_tables_without_centres_are_the_codecs(preset: str) -> None:
    page = Page(Slot(preset, 64), 16)
    key, value = torch.randn(2, 30, 2, 64).bfloat16()
    order, slots = reference.rows(page), torch.arange(30)
    plain, given = torch.zeros(2, 2, 2, 16, page.slot.nbytes, dtype=torch.uint8)
    reference.store_kv(key, value, plain, slots, page, order)
    held = tables(page.slot, torch.bfloat16, torch.device("cpu"), 2, 3)
    reference.store_kv(key, value, given, slots, page, order, held, torch.arange(30))
    assert torch.equal(plain, given)
    blocks = torch.arange(2, dtype=torch.int32)
    for x, y in zip(
        reference.read_kv(plain, blocks, 30, page, order, torch.bfloat16),
        reference.read_kv(plain, blocks, 30, page, order, torch.bfloat16, held),
        strict=True,
    ):
        assert torch.equal(x, y)


def test_positions_past_the_tables_share_the_last_centre() -> None:
    cpu, page = torch.device("cpu"), Page(Slot("polarquant_k4v4", 64), 16)
    held = centred_tables(page.slot, 2, torch.bfloat16, cpu, 600)
    held = held._replace(centres=held.centres[:2].contiguous())
    position = torch.arange(1024)
    key = centred_keys(held, position, torch.bfloat16)
    cache = torch.zeros(64, 2, 16, page.slot.nbytes, dtype=torch.uint8)
    order = reference.rows(page)
    reference.store_kv(key, key, cache, position, page, order, held, position // SEGMENT)
    back, _ = reference.read_kv(cache, torch.arange(64).int(), 1024, page, order, torch.bfloat16, held)
    assert relative_error(back[768:], key[768:]) < 0.03
