"""One request through a worker's model, outside of serving, as vLLM's own warm-ups send theirs.

A SchedulerOutput is built by hand and every rank executes it, so that all layers run as they will: native
ones, state-space ones, experts, and those of a draft model. Works with vLLM's model runners V1 and V2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from vllm import PoolingParams, SamplingParams
from vllm.distributed import parallel_state
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import (
    CrossAttentionSpec,
    EncoderOnlyAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    UniformTypeKVCacheSpecs,
)

T = TypeVar("T")

REQUEST = "_polarquant_keys_"


def models(worker: Any) -> list[torch.nn.Module]:
    """The model of a worker, and its draft model if that is one of vLLM's."""
    runner = worker.model_runner
    found = [runner.get_model()]
    draft = runner.get_draft_model() if hasattr(runner, "get_draft_model") else None
    return [*found, draft] if isinstance(draft, torch.nn.Module) else found


def gather(mine: T) -> list[T] | None:
    """What every rank of the engine has, on its first one; None on the others."""
    world = parallel_state.get_world_group()
    if world.world_size == 1:
        return [mine]
    every: list[Any] = [None] * world.world_size
    torch.distributed.all_gather_object(every, mine, group=world.cpu_group)
    return every if world.rank_in_group == 0 else None


def room(worker: Any, tokens: int) -> int:
    """How long a request may be, at most `tokens`; the same on all ranks. 0 for a model without text."""
    config = worker.vllm_config
    if getattr(config, "is_mm_encoder_only", False):
        return 0
    # The token after the request's is sampled, and a draft model goes on from there.
    tokens = min(tokens, config.model_config.max_model_len - _lookahead(config) - 1)
    free = worker.model_runner.kv_cache_config.num_blocks - 1  # the first is vLLM's null block
    while tokens > 0 and sum(_blocks(worker, tokens)) > free:
        tokens //= 2
    return max(tokens, 0)


def run(worker: Any, token_ids: list[int]) -> None:
    """Prefill a request of `room` tokens at most, in as many chunks as a batch asks for, and forget it."""
    chunk = _chunk(worker.vllm_config)
    _make_buffers(worker.model_runner)
    with _undisturbed(worker):
        for start in range(0, len(token_ids), chunk):
            count = min(chunk, len(token_ids) - start)
            step = _step(worker)
            if start:
                step.scheduled_cached_reqs = _continued(start)
            else:
                step.scheduled_new_reqs = [_new(worker, token_ids)]
            step.num_scheduled_tokens = {REQUEST: count}
            step.total_num_scheduled_tokens = count
            worker.execute_model(step)
            if not worker.model_runner.is_pooling_model:
                worker.sample_tokens(None)
        last = _step(worker)
        last.finished_req_ids = {REQUEST}
        worker.execute_model(last)


def _make_buffers(runner: Any) -> None:
    """Make what a stage of a pipeline receives into, as the V1 runner's dummy runs do: a CPU has none."""
    first = parallel_state.get_pp_group().is_first_rank
    if not first and getattr(runner, "intermediate_tensors", runner) is None:
        runner.intermediate_tensors = runner.get_model().make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )


def _lookahead(config: Any) -> int:
    return config.num_lookahead_tokens


def _chunk(config: Any) -> int:
    """Tokens of a batch, less those that a draft model adds to it."""
    limits = config.scheduler_config
    added = max(_lookahead(config), getattr(config.speculative_config, "max_num_new_slots_for_drafting", 0))
    scheduled = getattr(limits, "max_num_scheduled_tokens", None) or limits.max_num_batched_tokens
    return max(1, min(limits.max_num_batched_tokens - added, scheduled))


def _blocks(worker: Any, tokens: int) -> list[int]:
    """Blocks that the scheduler would give the request, for each group of layers."""
    config = worker.vllm_config
    groups = worker.model_runner.kv_cache_config.kv_cache_groups
    longest = config.model_config.max_model_len
    return [_count(group.kv_cache_spec, tokens, _lookahead(config), longest) for group in groups]


def _count(spec: KVCacheSpec, tokens: int, lookahead: int, longest: int) -> int:
    if isinstance(spec, UniformTypeKVCacheSpecs):
        spec = next(iter(spec.kv_cache_specs.values()))
    if isinstance(spec, CrossAttentionSpec | EncoderOnlyAttentionSpec):
        return 0
    speculative = spec.num_speculative_blocks if isinstance(spec, MambaSpec) else 0
    if not (isinstance(spec, MambaSpec) and spec.mamba_cache_mode == "align"):
        tokens = min(tokens + lookahead, longest)
    return -(-tokens // spec.block_size) + speculative


def _step(worker: Any) -> SchedulerOutput:
    step = SchedulerOutput.make_empty()
    drafts = getattr(worker.model_runner, "num_speculative_steps", None)
    if drafts is not None and hasattr(step, "num_spec_tokens_to_schedule"):
        step.num_spec_tokens_to_schedule = drafts
    return step


def _new(worker: Any, token_ids: list[int]) -> NewRequestData:
    runner = worker.model_runner
    sampling = pooling = None
    if runner.is_pooling_model:
        model = runner.model_config
        pooling = PoolingParams(task=model.get_pooling_task(runner.get_supported_tasks()))
        pooling.verify(model)
    else:
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
    free, block_ids = 1, []
    for count in _blocks(worker, len(token_ids)):
        block_ids.append(list(range(free, free + count)))
        free += count
    return NewRequestData(
        req_id=REQUEST,
        prompt_token_ids=token_ids,
        mm_features=[],
        sampling_params=sampling,
        pooling_params=pooling,
        block_ids=tuple(block_ids),
        num_computed_tokens=0,
        lora_request=None,
        prefill_token_ids=token_ids,
    )


def _continued(start: int) -> CachedRequestData:
    request = CachedRequestData.make_empty()
    request.req_ids = [REQUEST]
    request.num_computed_tokens = [start]
    request.num_output_tokens = [0]
    request.new_block_ids = [None]
    return request


@contextmanager
def _undisturbed(worker: Any) -> Iterator[None]:
    """Without CUDA graphs, which are not captured yet, without KV connectors, and without calibrations."""
    runner = worker.model_runner
    connector = getattr(runner, "kv_connector", None)
    drafter = getattr(runner, "drafter", None)
    with ExitStack() as stack:
        for owner, name, value in (
            # Without keys a dispatcher of the V1 runner runs everything as it is.
            (getattr(runner, "cudagraph_dispatcher", None), "keys_initialized", False),
            (getattr(drafter, "cudagraph_dispatcher", None), "keys_initialized", False),
            (kv_transfer_state, "_KV_CONNECTOR_AGENT", None),
            (runner, "adaptive_verification", None),
            (getattr(runner, "rejection_sampler", None), "enable_adaptive_verification", False),
        ):
            if hasattr(owner, name):
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, value)
        if connector is not None:
            stack.callback(connector.set_disabled, False)
            connector.set_disabled(True)
        yield
