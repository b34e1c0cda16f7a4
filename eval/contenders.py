"""What the kernel benchmark times: our own pages, behind the interface that its peers share.

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
from vllm_polarquant.codec import tables
from vllm_polarquant.eval.grid import Case
from vllm_polarquant.format import PolarFormat
from vllm_polarquant.kernels.decode import DecodeWorkspace, decode_attention, make_schedule
from vllm_polarquant.kernels.prefill import gather_prefix, merge_prefix
from vllm_polarquant.kernels.rotate import rotate
from vllm_polarquant.kernels.schedule import plan
from vllm_polarquant.kernels.store import store_kv
from vllm_polarquant.prefix import workspace_tokens

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
    again and again.
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

    def open(self, inputs: Inputs, caches: Sequence[torch.Tensor]) -> list[Layer]:
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
    key, value = inputs.pattern_key[own].double(), inputs.pattern_value[own].double()
    query = inputs.query[rows].double().unflatten(1, (case.kv_heads, case.group))
    logits = torch.einsum("nhgd,shd->nhgs", query, key) * case.scale
    last = position[-case.tokens :][rows]
    logits = logits.masked_fill((position > last[:, None])[:, None, None], float("-inf"))
    return torch.einsum("nhgs,shd->nhgd", logits.softmax(-1), value).flatten(1, 2)


def relative_error(have: torch.Tensor, want: torch.Tensor) -> float:
    """|have - want| / |want| of all elements together."""
    return ((have.double() - want).norm() / want.norm()).item()


class Polar:
    """One of our presets; needs torch and Triton, and vLLM's FlashAttention for the chunk of a prefix."""

    def __init__(self, preset: str) -> None:
        self.name = preset

    def slot_bytes(self, head_dim: int) -> int:
        return PolarFormat(self.name, head_dim, 16).slot_bytes

    def open(self, inputs: Inputs, caches: Sequence[torch.Tensor]) -> list[Layer]:
        case = inputs.case
        fmt = PolarFormat(self.name, case.head_dim, case.block_size)
        kind = PolarPrefix if case.op == "prefix" else PolarLayer
        scratch = kind.allocate(inputs, fmt)
        return [kind(inputs, fmt, cache.transpose(1, 2), scratch) for cache in caches]


class PolarLayer:
    """Store and decode."""

    def __init__(self, inputs: Inputs, fmt: PolarFormat, cache: torch.Tensor, scratch: object) -> None:
        self.inputs, self.fmt, self.cache, self.scratch = inputs, fmt, cache, scratch
        self.tables = tables(fmt, DTYPE, cache.device)
        self.out = torch.empty_like(inputs.query)

    @staticmethod
    def allocate(inputs: Inputs, fmt: PolarFormat) -> object:
        """What all layers share; the schedule is planned once a step, so outside of the timed calls."""
        case = inputs.case
        schedule = make_schedule(fmt, case.heads, case.kv_heads, case.batch, inputs.device, 1)
        if case.op == "decode":
            plan(inputs.seq_lens, inputs.query_start_loc, schedule)
        return schedule, DecodeWorkspace.allocate(
            max_tokens=case.batch,
            num_heads=case.heads,
            num_kv_heads=case.kv_heads,
            head_dim=case.head_dim,
            dtype=DTYPE,
            device=inputs.device,
            max_reqs=case.batch,
            max_query_len=1,
        )

    def store(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        store_kv(key, value, self.cache, slots, self.fmt, self.tables)

    def attend(self) -> torch.Tensor:
        inputs = self.inputs
        assert isinstance(self.scratch, tuple)
        schedule, workspace = self.scratch
        decode_attention(
            inputs.query,
            self.cache,
            inputs.block_table,
            inputs.seq_lens,
            inputs.query_start_loc,
            1,
            self.fmt,
            self.tables,
            inputs.case.scale,
            self.out,
            workspace,
            schedule,
        )
        return self.out

    def reference(self) -> torch.Tensor:
        """The first request's attention on the same pages, by reference.attention, float64."""
        inputs = self.inputs
        return reference.attention(
            inputs.query[:1],
            self.cache,
            inputs.block_table[:1],
            inputs.seq_lens[:1],
            inputs.query_start_loc[:2],
            self.fmt,
            inputs.case.scale,
        )


class PolarPrefix(PolarLayer):
    """A chunk of one request on its quantised prefix, in the steps of gpu.py's prefill and one copy more."""

    @staticmethod
    def allocate(inputs: Inputs, fmt: PolarFormat) -> object:
        case = inputs.case
        tokens = workspace_tokens(case.kv_heads, case.head_dim, DTYPE)
        return torch.empty(2, tokens, case.kv_heads, case.head_dim, dtype=DTYPE, device=inputs.device)

    def attend(self) -> torch.Tensor:
        inputs, case = self.inputs, self.inputs.case
        assert isinstance(self.scratch, torch.Tensor)
        key, value = self.scratch
        starts = inputs.query_start_loc
        fresh, lse = flash_attention(
            inputs.query, inputs.key, inputs.value, starts, starts, case.scale, causal=True
        )
        self.out.copy_(fresh)
        rotated = torch.empty_like(inputs.query)
        rotate(inputs.query, rotated, self.tables)
        for start in range(0, case.context, len(key)):
            count = min(len(key), case.context - start)
            # Filled on the device, so that nothing waits for a copy from the host.
            first = torch.full((1,), start, dtype=torch.int32, device=key.device)
            ends = torch.arange(2, dtype=torch.int32, device=key.device) * count
            gather_prefix(
                self.cache, inputs.block_table, first, ends, count, self.fmt, self.tables, key, value
            )
            part, part_lse = flash_attention(
                rotated, key[:count], value[:count], starts, ends, case.scale, causal=False
            )
            merge_prefix(self.out, lse, part, part_lse, self.tables, rotate_back=True, update_lse=True)
        return self.out


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one request on dense keys, and its log-sum-exp: vLLM's, or plain torch off the GPU.

    Args:
        query: [T, heads, d]; key and value [S, kv_heads, d].
        query_starts: int32 [2], 0 and T; key_starts: int32 [2], 0 and S.
        scale: softmax scale.
        causal: whether the queries are the last of the keys' tokens.
    """
    if query.is_cuda:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

        out, lse = flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            max_seqlen_q=len(query),
            cu_seqlens_q=query_starts,
            max_seqlen_k=len(key),
            cu_seqlens_k=key_starts,
            softmax_scale=scale,
            causal=causal,
            return_softmax_lse=True,
            fa_version=get_flash_attn_version(head_size=query.shape[2]),
        )
        return out, lse
    heads, kv_heads = query.shape[1], key.shape[1]
    grouped = query.float().unflatten(1, (kv_heads, heads // kv_heads))
    logits = torch.einsum("nhgd,shd->hgns", grouped, key.float()).flatten(0, 1) * scale
    if causal:
        hidden = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1 + len(key) - len(query))
        logits = logits.masked_fill(hidden, float("-inf"))
    weights = logits.softmax(-1).unflatten(0, (kv_heads, -1))
    out = torch.einsum("hgns,shd->nhgd", weights, value.float()).flatten(1, 2)
    return out.to(query.dtype), logits.logsumexp(-1)
