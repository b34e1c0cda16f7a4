"""lm-eval's own vLLM backend on an engine that is there already.

lm-eval's `VLLM` makes an `LLM` of its own from its arguments. A second engine would not fit beside the
worker's, and would not be the one whose options the result is named by; so while a `VLLM` is built, the name
`LLM` in its module stands for the worker's engine, and all else of it is lm-eval's own: tokenizer, chat
template, truncation, sampling parameters. The other way round, the worker taking its engine from a `VLLM`,
every measure would need lm-eval.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm_polarquant.eval.measures.tasks.params import Params


@contextmanager
def count_cut_prompts() -> Iterator[list[str]]:
    """lm-eval's warnings that a prompt was longer than the engine's context and was cut."""
    found: list[str] = []

    class Cuts(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if "truncat" in message.lower():
                found.append(message)

    loggers = [logging.getLogger(name) for name in ("lm_eval.models.vllm_causallms", "lm_eval.models.utils")]
    handler = Cuts(logging.WARNING)
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield found
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def backend(llm: Any, params: Params) -> Any:
    """lm-eval's VLLM whose `.model` is llm."""
    from lm_eval.models import vllm_causallms

    config = llm.llm_engine.model_config
    original = vllm_causallms.LLM
    vllm_causallms.LLM = lambda **arguments: llm
    try:
        lm = vllm_causallms.VLLM(
            pretrained=config.model,
            tokenizer=config.tokenizer,
            tokenizer_mode=config.tokenizer_mode,
            trust_remote_code=config.trust_remote_code,
            revision=config.revision,
            tokenizer_revision=config.tokenizer_revision,
            max_model_len=config.max_model_len,
            batch_size="auto",
            think_end_token=params.think_end or None,
        )
    finally:
        vllm_causallms.LLM = original
    if lm.model is not llm:
        raise RuntimeError("lm-eval's VLLM made an engine of its own; this lm-eval is not supported")
    return lm
