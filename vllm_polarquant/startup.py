"""A forward pass at start-up, from which each layer gets its centres and scales of keys (centring.py).

One request of random token ids goes through the model as loaded, on every rank, before the first request
and before graphs are captured. No data is needed: a model's keys share their mean whatever the text.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_polarquant import reference, request
from vllm_polarquant.attention import Attention
from vllm_polarquant.centring import Rope, centre_keys, fill, fingerprint
from vllm_polarquant.codec import Tables
from vllm_polarquant.format import PRESETS, SEGMENT
from vllm_polarquant.kernels.ops import Batch
from vllm_polarquant.settings import Settings, option

logger = init_logger("vllm.polarquant")

OFF = option("centre_keys", False)
"""What `--additional-config` turns centring off with."""

TOKENS = 512
"""Of the request."""

LEAST_TOKENS = 16
"""Fewer say nothing of a mean."""

_QUERIES_AT_ONCE = 64

_BYTES = 256
"""Tokens of lower ids are single bytes and the like, not the most frequent ones."""

_RUN, _REPEATED = 8, 0.1
"""Length of a run of tokens that comes back, and how likely one is to do so where a token is drawn."""


def needs_pass(config: VllmConfig) -> bool:
    """Whether any layer's keys are to be centred; the same on all ranks of an engine."""
    speculative = config.speculative_config
    dtypes = [config.cache_config.cache_dtype, getattr(speculative, "kv_cache_dtype", None)]
    return Settings.of(config.additional_config).centre_keys and any(
        dtype in PRESETS and PRESETS[dtype][0].kind != "raw" for dtype in dtypes
    )


def num_segments(config: VllmConfig) -> int:
    """Segments of a layer's table."""
    return -(-config.model_config.max_model_len // SEGMENT)


class Sample:
    """What the request brings to one layer: keys, and the power of queries.

    Where the request comes in chunks it also computes the layer's attention, exactly, as pages hold codes
    without centres meanwhile: what later chunks and layers see does not depend on them.

    Args:
        length: tokens to collect.
        attention: of the layer.
        finish: called once with keys [length, kv heads, d] and the power of the queries that read them,
            float32 [kv heads, d].
        source: of the layer whose keys and values this one reads, if it has none of its own: its queries
            count among that one's, which then calls its own finish when the last of its readers is done.
    """

    def __init__(
        self,
        length: int,
        attention: Attention,
        finish: Callable[[torch.Tensor, torch.Tensor], None],
        source: Sample | None = None,
    ) -> None:
        self.length, self.attention, self.finish = length, attention, finish
        self.done = False
        self._source = source or self
        self._collected = 0
        self._key: torch.Tensor | None = None
        self._value: torch.Tensor | None = None
        self._power: torch.Tensor | None = None
        self._readers = 0
        self._source._readers += 1

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        batch: Batch,
        output: torch.Tensor,
    ) -> bool:
        """Take the next chunk, if it is that. Whether its attention was written to output."""
        tokens, source = batch.num_tokens, self._source
        if self.done or batch.num_decodes + batch.num_prefills != 1:
            return False
        start = int(batch.seq_lens[0]) - tokens
        if not 0 <= start <= self._collected:
            return False
        query = query[:tokens]
        if source is self:
            assert key is not None and value is not None
            # A model may write its next layer's over keys that are kept.
            self._key = _after(self._key, start, key[:tokens])
            self._value = _after(self._value, start, value[:tokens])
        assert source._key is not None and source._value is not None
        # A draft model goes beyond each chunk with tokens of its own, and comes back for the next one. Powers
        # of queries are summed once a position, in 32 bits.
        power = query[self._collected - start : self.length - start].float().square().sum(0)
        power = power.unflatten(0, (source._key.shape[1], -1)).sum(1)
        source._power = power if source._power is None else source._power + power
        self._collected = max(self._collected, start + tokens)
        # A first chunk attends to its own keys as they are, unless it passes for a decode.
        written = bool(start or batch.num_decodes or source is not self)
        if written:
            position = torch.arange(start, start + tokens, device=query.device)
            for first in range(0, tokens, _QUERIES_AT_ONCE):
                rows = slice(first, first + _QUERIES_AT_ONCE)
                attended = reference.dense_attention(
                    query[rows], source._key, source._value, position[rows], self.attention
                )
                output[:tokens][rows] = attended.out.to(output.dtype)
            output[tokens:] = 0
        if self._collected >= self.length:
            self.done = True
            source._read()
        return written

    def _read(self) -> None:
        """One layer that reads the keys has all it needs of them."""
        self._readers -= 1
        if not self._readers:
            assert self._key is not None and self._power is not None
            self.finish(self._key[: self.length], self._power)
            self._key = self._value = self._power = None


def _after(before: torch.Tensor | None, start: int, chunk: torch.Tensor) -> torch.Tensor:
    """A copy of a chunk behind the first `start` rows of those before it."""
    return chunk.clone() if before is None else torch.cat([before[:start], chunk])


class _Report(NamedTuple):
    """What one rank has to say.

    removed: by layer, the share of its keys' energy that centres take away; None where the pass did not go.
    tables: names their contents.
    """

    removed: dict[str, float | None]
    tables: str


def run(worker: Any) -> None:
    """What a worker that has its KV cache does before it serves; all ranks of an engine at once.

    Raises:
        RuntimeError: naming the switch, if the model cannot run the request that centres keys.
    """
    config = worker.vllm_config
    if needs_pass(config):
        _centre_keys(worker)
    if impls := [layer.impl for _, layer in own_layers(config)]:
        _restore_on_wake_up(worker, impls)


def _centre_keys(worker: Any) -> None:
    """Centre the keys of every layer, and say so in one log line."""
    config = worker.vllm_config
    began = time.perf_counter()
    layers = {name: layer for name, layer in own_layers(config) if layer.impl.centred}
    length = request.room(worker, TOKENS)
    if length < LEAST_TOKENS:
        logger.warning("keys are not centred: there is no room for a pass of %d tokens", LEAST_TOKENS)
        return
    removed: dict[str, float | None] = {}
    try:
        ropes = _Ropes(worker, num_segments(config))
        for name, layer in layers.items():
            source = layer.impl.source
            if source is None:
                removed[name] = None
            # A layer comes after the one whose cache it reads.
            layer.impl.sample = Sample(
                length,
                layer.impl.attention,
                _finisher(name, layer, ropes, removed),
                source and source.sample,
            )
        request.run(worker, token_ids(config, length))
    except Exception as problem:
        raise RuntimeError(
            f"the pass that centres keys failed; without it: --additional-config '{OFF}'"
        ) from problem
    finally:
        for layer in layers.values():
            layer.impl.sample = None
    impls = [layers[name].impl for name in sorted(removed)]
    reports = request.gather(_Report(removed, fingerprint(impl.tables for impl in impls)))
    if reports:
        _log(reports, length, time.perf_counter() - began)


def own_layers(config: VllmConfig) -> Iterator[tuple[str, Any]]:
    """The attention layers that are ours, and their names."""
    from vllm_polarquant.layer import PolarQuantImpl

    for name, layer in config.compilation_config.static_forward_context.items():
        impl = getattr(layer, "impl", None)
        if isinstance(impl, PolarQuantImpl):
            yield name, layer


def _log(reports: list[_Report], length: int, seconds: float) -> None:
    shares: dict[str, list[float]] = {}
    missed = set()
    for report in reports:
        for name, share in report.removed.items():
            if share is None:
                missed.add(name)
            else:
                shares.setdefault(name, []).append(share)
    removed = sum(sum(found) / len(found) for found in shares.values()) / max(len(shares), 1)
    names = [report.tables for report in reports]
    identity = names[0] if len(names) == 1 else hashlib.sha256("".join(names).encode()).hexdigest()[:12]
    line = (
        f"keys of {len(shares)} layers centred by a pass over {length} random tokens in {seconds:.1f} s: "
        f"{removed:.1%} of their energy removed; tables {identity}"
    )
    if missed:
        line += f"; not centred, as the pass did not reach them: {', '.join(sorted(missed))}"
    logger.info("%s", line)


def _restore_on_wake_up(worker: Any, impls: list[Any]) -> None:
    """Bring tables, sinks and workspaces back after sleep of level 2, which discards the memory they lie in.

    After new weights tables stay as they are: what is in pages was written with them.
    """
    if not worker.vllm_config.model_config.enable_sleep_mode:
        return
    parts = [part for impl in impls for part in (*impl.tables, impl.attention.sinks) if part is not None]
    kept = {id(part): (part, part.cpu()) for part in parts}
    ops = {id(impl.ops): impl.ops for impl in impls}
    wake_up = worker.wake_up

    def restoring(tags: list[str] | None = None) -> None:
        wake_up(tags)
        if tags is None or "weights" in tags:
            for part, copy in kept.values():
                part.copy_(copy)
            for own in ops.values():
                own.reset()

    worker.wake_up = restoring


def token_ids(config: VllmConfig, count: int) -> list[int]:
    """Random tokens that stand for text, after the model's BOS if it has one; the same ones every time.

    Keys are the more like a text's, the more its tokens are: frequent ones have low ids, as tokenizers are
    built from the most frequent on, and what was said comes back.
    """
    vocabulary = config.model_config.get_vocab_size()
    hf_config = config.model_config.hf_config
    texts = config.model_config.hf_text_config
    special = set()
    for values in (hf_config.to_dict(), texts.to_dict()):
        for name, value in values.items():
            if name.endswith(("_token_id", "_token_index")):
                special.update(value if isinstance(value, list) else [value])
    # Placeholders of images and the like are none of a text's.
    usable = [token for token in range(vocabulary) if token not in special] or list(range(vocabulary))
    first = max(1, min(_BYTES, len(usable) // 4))
    rng = random.Random("polarquant keys")
    ids: list[int] = []
    bos = getattr(texts, "bos_token_id", None)
    if isinstance(bos, int) and 0 <= bos < vocabulary:
        ids.append(bos)
    while len(ids) < count:
        if len(ids) > 2 * _RUN and rng.random() < _REPEATED:
            start = rng.randrange(1, len(ids) - _RUN)
            ids += ids[start : start + _RUN]
        else:
            # Log-uniform, as words' frequencies fall with their rank.
            at = int(first * (len(usable) / first) ** rng.random())
            ids.append(usable[min(at, len(usable) - 1)])
    return ids[:count]


class _Ropes:
    """Finds what turns a layer's keys, in the modules of the model."""

    def __init__(self, worker: Any, segments: int) -> None:
        self._segments = segments
        self._parents: dict[int, torch.nn.Module] = {}
        self._all: list[torch.nn.Module] = []
        self._known: dict[int, Rope] = {}
        for root in request.models(worker):
            for module in root.modules():
                if _cos_sin(module) is not None:
                    self._all.append(module)
                for child in module.children():
                    self._parents.setdefault(id(child), module)

    def of(self, layer: torch.nn.Module) -> list[Rope]:
        """Those beside the layer, or else beside a module around it, or else all of the model."""
        module = self._parents.get(id(layer))
        while module is not None:
            found = [child for child in module.children() if _cos_sin(child) is not None]
            if found:
                return [self._rope(child) for child in found]
            module = self._parents.get(id(module))
        return [self._rope(child) for child in self._all]

    def _rope(self, module: torch.nn.Module) -> Rope:
        if id(module) not in self._known:
            table = _cos_sin(module)
            assert table is not None
            interleaved = not getattr(module, "is_neox_style", True)
            self._known[id(module)] = Rope.of(table, interleaved, self._segments)
        return self._known[id(module)]


def _cos_sin(module: torch.nn.Module) -> torch.Tensor | None:
    """A module's cosines and sines [positions, 2 * pairs] if it is one of vLLM's rotary embeddings."""
    table = getattr(module, "cos_sin_cache", None)
    if table is None:
        # Phi-3's: those of short contexts, and then those of long ones, of which one model uses either.
        table = getattr(module, "long_short_cos_sin_cache", None)
        if isinstance(table, torch.Tensor):
            short = module.original_max_position_embeddings
            table = table[short:] if module.use_long_rope else table[:short]
    if not isinstance(table, torch.Tensor) or table.dim() != 2 or table.shape[1] % 2 or not len(table):
        return None
    return table


def _finisher(
    name: str, layer: Any, ropes: _Ropes, removed: dict[str, float | None]
) -> Callable[[torch.Tensor, torch.Tensor], None]:
    def finish(key: torch.Tensor, query_power: torch.Tensor) -> None:
        tables: Tables = layer.impl.tables
        found = centre_keys(key, query_power, ropes.of(layer), len(tables.centres))
        fill(tables, found, layer.impl.shape.dtype)
        layer.impl.energy_removed = removed[name] = float(found.removed.mean())

    return finish
