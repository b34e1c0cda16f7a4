"""Which shapes the kernel benchmark measures. Standard library only."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, get_args

from vllm_polarquant.format import DEFAULT_PRESET, PRESETS

Operation = Literal["decode", "store", "prefix"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)

Lengths = Literal["equal", "mixed", "one long"]

PEERS = ("auto", "fp8", "turboquant_4bit_nc", "int4_per_token_head")
"""The --kv-cache-dtype names of vLLM's own caches that ours are measured beside; `auto` is bfloat16."""

FLASH = ("auto", "fp8")
"""Those that FlashAttention reads."""

FLUSH_BYTES = 4 << 26
"""What the layers of one measurement read together: four times 64 MiB, more than a GPU's L2 cache."""

MAX_LAYERS = 64

SHORT = 1024
"""Tokens of the short requests beside one long one."""

STORE_POOL = 1 << 16


@dataclass(frozen=True)
class Case:
    """One operation on one shape.

    decode: `tokens` queries each of `batch` requests that have `context` tokens, their own included; of
    "mixed" lengths, spread evenly from near 0 to near twice that, in random order; or of which all but one
    have only SHORT; with a window, a soft cap or a sink a head, if these are given. prefix: a chunk of
    `tokens` tokens of each request, after `context` cached ones. store: `tokens` tokens go to slots of a
    cache of `context` tokens.
    """

    op: Operation
    batch: int
    context: int
    tokens: int = 1
    group: int = 4
    head_dim: int = 128
    kv_heads: int = 8
    block_size: int = 16
    lengths: Lengths = "equal"
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False

    @property
    def plain(self) -> bool:
        """Whether a query of each request sees all of its tokens, and their logits as they are."""
        return self.op != "decode" or (
            self.tokens == 1 and self.window is None and self.soft_cap is None and not self.sinks
        )

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.group * self.kv_heads

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def seq_lens(self) -> list[int]:
        """Tokens of each request after the operation."""
        if self.lengths == "one long":
            return [SHORT] * (self.batch // 2) + [self.context] + [SHORT] * ((self.batch - 1) // 2)
        if self.lengths == "mixed":
            lens = [2 * self.context * (i + 1) // (self.batch + 1) for i in range(self.batch)]
            random.Random(0).shuffle(lens)
            return lens
        return [self.context + (self.tokens if self.op == "prefix" else 0)] * self.batch

    @property
    def blocks(self) -> int:
        """Blocks of one layer's cache."""
        return sum(self.request_blocks)

    @property
    def request_blocks(self) -> list[int]:
        """Blocks of each request."""
        return [-(-length // self.block_size) for length in self.seq_lens]

    def layer_bytes(self, slot_bytes: int) -> int:
        """Bytes of one layer's cache, at so many bytes a token a KV head."""
        return self.blocks * self.block_size * self.kv_heads * slot_bytes

    def layers(self, slot_bytes: int, flush_bytes: int = FLUSH_BYTES) -> int:
        """Caches to take turns with, so that none is still in the GPU's L2 cache when it is read again."""
        return max(1, min(MAX_LAYERS, -(-flush_bytes // self.layer_bytes(slot_bytes))))

    def moved_bytes(self, slot_bytes: int) -> int:
        """Bytes that the operation cannot avoid to read and write: pages, and new keys and values."""
        vector = self.kv_heads * self.head_dim * 2
        if self.op == "store":
            return self.tokens * (2 * vector + self.kv_heads * slot_bytes)
        seen = self.seq_lens
        if self.window is not None:
            seen = [min(length, self.window + self.tokens - 1) for length in seen]
        cached = self.batch * self.context if self.op == "prefix" else sum(seen)
        return cached * self.kv_heads * slot_bytes + (
            2 * self.batch * self.tokens * vector if self.op == "prefix" else 0
        )

    @property
    def label(self) -> str:
        """Short name of the shape."""
        shape = {
            "decode": f"{self.batch} x {short(self.context)}"
            if self.lengths != "one long"
            else f"{self.batch - 1} x {short(SHORT)} and 1 x {short(self.context)}",
            "store": f"{short(self.tokens)} tokens",
            "prefix": f"{short(self.tokens)} on {short(self.context)}",
        }[self.op]
        if self.lengths == "mixed":
            shape += " on average"
        if self.op == "decode":
            shape += f", {self.tokens} queries" if self.tokens > 1 else ""
            shape += f", window {short(self.window)}" if self.window is not None else ""
            shape += f", soft cap {self.soft_cap:g}" if self.soft_cap is not None else ""
            shape += ", sinks" if self.sinks else ""
        return f"{shape}, GQA {self.group}, d {self.head_dim}" if self.op != "store" else (
            f"{shape}, d {self.head_dim}"
        )  # fmt: skip


def short(count: int) -> str:
    """16384 as 16k."""
    return f"{count >> 10}k" if count >= 1024 and count % 1024 == 0 else str(count)


CENTRE = Case("decode", 32, 16384)
"""The shape around which the default grid varies one thing at a time."""

QUERIES = (2, 4, 8, 16)
"""Query tokens a request of the default grid, as speculation verifies them."""

_VARIANTS = (
    [replace(CENTRE, tokens=tokens, group=group) for group in (4, 8) for tokens in QUERIES]
    + [replace(CENTRE, window=1024), replace(CENTRE, soft_cap=50.0), replace(CENTRE, sinks=True)]
    + [replace(CENTRE, window=1024, soft_cap=50.0, sinks=True)]
)
_STORES = [Case("store", 1, STORE_POOL, tokens=n) for n in (32, 512, 8192)]
_PREFIXES = [
    Case("prefix", 1, context, tokens=tokens)
    for tokens, context in ((64, 32768), (2048, 16384), (8192, 32768), (8192, 102400))
]


def default_cases() -> list[Case]:
    """Every axis around CENTRE, the corners that small and long batches are judged by, store and prefix."""
    decodes = [CENTRE]
    decodes += [replace(CENTRE, batch=batch) for batch in (1, 8, 128)]
    decodes += [replace(CENTRE, context=context) for context in (1024, 8192, 32768)]
    decodes += [replace(CENTRE, batch=b, context=c) for b, c in ((1, 131072), (8, 1024), (128, 1024))]
    decodes += [replace(CENTRE, group=group) for group in (1, 8)]
    decodes += [replace(CENTRE, head_dim=head_dim) for head_dim in (64, 256, 512)]
    decodes += [replace(CENTRE, batch=batch, lengths="mixed") for batch in (8, 32)]
    decodes += [replace(CENTRE, batch=20), replace(CENTRE, context=131072, lengths="one long")]
    return [*decodes, *_VARIANTS, *_STORES, *_PREFIXES]


def full_cases() -> list[Case]:
    """The whole product of batches, contexts, group sizes and head sizes, store and prefix at each head."""
    dims = (128, 64, 256)
    decodes = [
        Case("decode", batch, context, group=group, head_dim=head_dim)
        for head_dim, group, batch, context in product(
            dims, (4, 1, 8), (1, 8, 32, 128), (1024, 8192, 16384, 32768, 131072)
        )
        if context != 16384 or batch == 32
    ]
    rest = [*_VARIANTS] + [
        replace(case, head_dim=head_dim) for head_dim in dims for case in _STORES + _PREFIXES
    ]
    return decodes + rest


def tiny_cases() -> list[Case]:
    """Shapes that Triton's interpreter takes seconds for."""
    small = Case("decode", 2, 80, group=2, head_dim=64, kv_heads=1)
    return [
        replace(small, tokens=3, window=40, soft_cap=5.0, sinks=True),
        replace(small, op="store", batch=1, context=128, tokens=5),
        replace(small, op="prefix", batch=1, context=48, tokens=16),
    ]


def jobs(cases: Iterable[Case], contenders: Sequence[str], everywhere: bool) -> list[tuple[Case, str]]:
    """Pairs to measure. Presets other than the default one run everywhere, or where a row compares them.

    Those rows are CENTRE, the largest store, and every case where no such row is in the grid. Where a decode
    is not plain, only FlashAttention is a peer: others know no windows, or read no two queries at once.
    """
    cases = list(cases)
    compared = {CENTRE, _STORES[-1]} & set(cases) or set(cases)
    return [
        (case, name)
        for case in cases
        for name in contenders
        if (name in (*PRESETS, *FLASH) or case.plain)
        and (everywhere or name not in PRESETS or name == DEFAULT_PRESET or case in compared)
    ]


_OPTIONS: dict[str, Callable[[str], Any]] = {"tokens": int, "window": int, "soft_cap": float}


def parse_decode(text: str) -> list[Case]:
    """Decode cases from "32x16384,8x1024x8x256:tokens=4:window=1024:soft_cap=50:sinks".

    Batch, context, and group and head size if not 4, 128; then what a plain decode of one token has not.

    Raises:
        ValueError: naming what could not be read.
    """
    cases = []
    for part in text.split(","):
        shape, *options = part.split(":")
        numbers = [int(n) for n in shape.split("x") if n.isdecimal()]
        given: dict[str, Any] = {"sinks": True} if "sinks" in options else {}
        for name, _, number in (option.partition("=") for option in options if option != "sinks"):
            try:
                given[name] = _OPTIONS[name](number)
            except (KeyError, ValueError):
                given[name] = 0
        if (
            len(numbers) != shape.count("x") + 1
            or not 2 <= len(numbers) <= 4
            or not all(n > 0 for n in [*numbers, *given.values()])
        ):
            raise ValueError(
                f"{part!r} is not BATCHxCONTEXT, BATCHxCONTEXTxGROUP or ...xHEAD_DIM, with or without "
                ":tokens=N, :window=N, :soft_cap=X and :sinks"
            )
        batch, context, group, head_dim = [*numbers, *(4, 128)[len(numbers) - 2 :]]
        cases.append(Case("decode", batch, context, group=group, head_dim=head_dim, **given))
    return cases
