"""Engines and NixlConnector: one stores a prompt, the other reads its pages and answers.

NIXL also reads the memory of CPU engines, so all but what offloads runs without a GPU.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from engine_runs import EXACT, _completions, _counter, _engine, _generate, text_prompts

PRODUCER, CONSUMER = "kv_producer", "kv_consumer"
PROMPT_CHARS, NEW_TOKENS = (60, 300, 900, 1800), 24

SETTINGS = {"polarquant": {"prefill_from_pages": True}}
"""A prompt that was read is answered off the pages, and one that was computed is to be, too."""


def prompts() -> list[str]:
    texts = text_prompts(len(PROMPT_CHARS), max(PROMPT_CHARS))
    return [text[:chars] for text, chars in zip(texts, PROMPT_CHARS, strict=True)]


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return int(listening.getsockname()[1])


def _peer(dtype: str, role: str, offloads: bool = False, **options: Any) -> Any:
    """offloads: to memory as well, behind a MultiConnector."""
    # Where an engine listens for peers.
    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(_free_port())
    transfer: dict[str, Any] = {"kv_connector": "NixlConnector", "kv_role": role}
    if offloads:
        memory = {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": 64 << 20},
        }
        transfer = {
            "kv_connector": "MultiConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"connectors": [transfer, memory]},
        }
    more = EXACT | {"additional_config": SETTINGS, "max_num_batched_tokens": 8192} | options
    return _engine(dtype, **more, kv_transfer_config=transfer)


def _handed_over(producer: Any, consumer: Any) -> dict[str, Any]:
    """What the consumer makes of prompts that the producer has stored."""
    from vllm import SamplingParams

    stored = _generate(
        producer, prompts(), max_tokens=1, extra_args={"kv_transfer_params": {"do_remote_decode": True}}
    )
    params = [
        SamplingParams(
            temperature=0,
            logprobs=2,
            max_tokens=NEW_TOKENS,
            ignore_eos=True,
            extra_args={"kv_transfer_params": output.kv_transfer_params},
        )
        for output in stored
    ]
    answered = consumer.generate(prompts(), params, use_tqdm=False)
    return {
        "completions": _completions(answered),
        "reasons": [output.outputs[0].finish_reason for output in answered],
        "prompt tokens": [len(output.prompt_token_ids) for output in answered],
        "read": _counter(consumer, "external_prefix_cache_hits"),
    }


def handed_over(dtype: str, options: dict[str, Any]) -> dict[str, Any]:
    """Answers of an engine alone, and of one that reads the pages of another.

    options: of all three, more of vLLM's EngineArgs.
    """
    with _engine(dtype, **EXACT, additional_config=SETTINGS, max_num_batched_tokens=8192, **options) as llm:
        alone = _completions(_generate(llm, prompts(), max_tokens=NEW_TOKENS, ignore_eos=True))
    with _peer(dtype, PRODUCER, **options) as producer, _peer(dtype, CONSUMER, **options) as consumer:
        return _handed_over(producer, consumer) | {"alone": alone}


def offloaded_too(dtype: str) -> dict[str, Any]:
    """Answers as with `handed_over`, of engines that also offload; the consumer's twice."""
    with _peer(dtype, PRODUCER, True) as producer, _peer(dtype, CONSUMER, True) as consumer:
        first = _handed_over(producer, consumer)
        # Copies are made beside the steps.
        time.sleep(1)
        consumer.reset_prefix_cache()
        again = _generate(consumer, prompts(), max_tokens=NEW_TOKENS, ignore_eos=True)
        read = _counter(consumer, "external_prefix_cache_hits") - first["read"]
        return first | {"again": _completions(again), "read again": read}


def strangers(options: dict[str, list[Any]]) -> dict[str, Any]:
    """What engines make of the pages of one of polarquant_k4v4; by name their dtype, and other options."""
    found: dict[str, Any] = {}
    with _peer("polarquant_k4v4", PRODUCER) as producer:
        for name, (dtype, more) in options.items():
            with _peer(dtype, CONSUMER, **more) as consumer:
                found[name] = _handed_over(producer, consumer)
    return found
