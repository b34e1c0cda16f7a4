"""What every contender of the kernel benchmark is given, and how its output is checked.

A contender opens several layers' caches, all with the same content: a few hundred blocks that its own
store has written, repeated to the end. So every contender holds the same keys and values, quantised its
own way, and the attention of each can be checked against exact attention on the originals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_polarquant import reference
from vllm_polarquant.attention import Attention
from vllm_polarquant.eval.bench.grid import Case

DTYPE = torch.bfloat16
CHECKED_ROWS = 16
REFERENCE_CONTEXT = 1 << 15
"""Longest request that is compared with reference.attention, which decodes it whole in float64."""

_PATTERN_BLOCKS = 256


@dataclass
class Inputs:
    """Tensors of one case, the same for every contender.

    query [T, heads, d] and key, value [T, kv_heads, d], bfloat16: the new tokens, T of all requests.
    block_table int32 [batch, blocks of a request], seq_lens int32 [batch], query_start_loc int32
    [batch + 1], slots int64 [T]. pattern_key and pattern_value [P, kv_heads, d]: what the cache holds,
    again and again. attention: of the layer.
    """

    case: Case
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    slots: torch.Tensor
    pattern_key: torch.Tensor
    pattern_value: torch.Tensor
    attention: Attention

    @property
    def device(self) -> torch.device:
        return self.query.device


class Layer(Protocol):
    """One layer's cache, open for one case."""

    def store(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        """Write keys and values [T, kv_heads, d] to the slots int64 [T]."""
        ...

    def attend(self) -> torch.Tensor:
        """Attention [T, heads, d] of the case's queries."""
        ...


class Contender(Protocol):
    """A --kv-cache-dtype and its kernels."""

    name: str

    def slot_bytes(self, head_dim: int) -> int:
        """Bytes of one token in one KV head."""
        ...

    def open(self, inputs: Inputs, caches: Sequence[torch.Tensor]) -> Sequence[Layer]:
        """A layer over each cache, uint8 [blocks, block_size, kv_heads, slot_bytes]."""
        ...


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Gaussian queries, keys and values, and blocks in random order."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=DTYPE)

    blocks, size = case.blocks, case.block_size
    order = torch.randperm(blocks, generator=generator, device=device)
    table = torch.zeros(case.batch, max(case.request_blocks), dtype=torch.int64, device=device)
    for row, mine in zip(table, order.split(case.request_blocks), strict=True):
        row[: len(mine)] = mine
    pattern = [
        normal(min(blocks, _PATTERN_BLOCKS) * size, case.kv_heads, case.head_dim) for _ in ("key", "value")
    ]
    if case.op == "store":
        count = case.tokens
        # A decode step writes a token to each of many blocks, a prefill whole blocks.
        ends = order[:count] * size if count * size <= case.context else None
        whole = order[:, None] * size + torch.arange(size, device=device)
        slots = ends if ends is not None and count <= 256 else whole.flatten()[:count]
        new = [normal(count, case.kv_heads, case.head_dim) for _ in ("key", "value")]
    else:
        count = case.batch * case.tokens
        ends = torch.tensor(case.seq_lens, device=device)[:, None]
        position = ends - case.tokens + torch.arange(case.tokens, device=device)
        block = table.gather(1, position // size)
        slots = (block * size + position % size).flatten()
        new = [x[_pattern_rows(block, position, x, size)].flatten(0, 1) for x in pattern]
    return Inputs(
        case,
        normal(count, case.heads, case.head_dim),
        new[0],
        new[1],
        table.to(torch.int32),
        torch.tensor(case.seq_lens, dtype=torch.int32, device=device),
        torch.arange(0, count + 1, case.tokens, dtype=torch.int32, device=device),
        slots,
        pattern[0],
        pattern[1],
        Attention(case.scale, case.window, case.soft_cap, normal(case.heads).float() if case.sinks else None),
    )


def _pattern_rows(
    block: torch.Tensor, position: torch.Tensor, pattern: torch.Tensor, size: int
) -> torch.Tensor:
    """Rows of the pattern at these positions, which lie in these physical blocks."""
    return block % (len(pattern) // size) * size + position % size


def fill(layers: Sequence[Layer], caches: Sequence[torch.Tensor], inputs: Inputs) -> None:
    """Give every layer's cache the pattern, stored once by the first layer and then copied."""
    pattern = inputs.pattern_key, inputs.pattern_value
    slots = torch.arange(len(pattern[0]), device=inputs.device)
    for layer in layers[1:]:
        # Whatever a first store sets up must not overwrite what is copied below.
        layer.store(pattern[0][:1], pattern[1][:1], slots[:1])
    layers[0].store(*pattern, slots)
    done = len(slots) // inputs.case.block_size
    first = caches[0]
    while done < len(first):
        step = min(done, len(first) - done)
        first[done : done + step].copy_(first[:step])
        done += step
    for cache in caches[1:]:
        cache.copy_(first)


def checked_rows(case: Case) -> slice:
    """Rows of the first request's queries that are checked, its last ones."""
    return slice(max(0, case.tokens - CHECKED_ROWS), case.tokens)


def exact_attention(inputs: Inputs) -> torch.Tensor:
    """Attention of `checked_rows` on the keys and values as they were before storing, float64."""
    case, rows = inputs.case, checked_rows(inputs.case)
    position = torch.arange(case.seq_lens[0], device=inputs.device)
    block = inputs.block_table[0, position // case.block_size].long()
    own = _pattern_rows(block, position, inputs.pattern_key, case.block_size)
    key, value = inputs.pattern_key[own], inputs.pattern_value[own]
    last = position[-case.tokens :][rows]
    return reference.dense_attention(inputs.query[rows], key, value, last, inputs.attention).out


def relative_error(have: torch.Tensor, want: torch.Tensor) -> float:
    """|have - want| / |want| of all elements together."""
    return ((have.double() - want).norm() / want.norm()).item()
