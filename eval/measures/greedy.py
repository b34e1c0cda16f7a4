"""How long greedy completions stay those of the baseline.

Prompts are prefilled in chunks of at most CHUNK tokens, so that nearly all of them is read off the pages
before the first token is generated. Two runs that part never meet again, so tokens count up to the first
that differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_polarquant.eval.measures.base import Measure, Outcome, chunked_engine
from vllm_polarquant.eval.measures.text import HELDOUT, token_rows


@dataclass(frozen=True)
class Params:
    """prompts of prompt_tokens tokens of a text (HELDOUT or a file), and the tokens to generate."""

    prompts: int = 8
    prompt_tokens: int = 512
    tokens: int = 64
    text: str = HELDOUT
    max_model_len: int = 4096

    def __post_init__(self) -> None:
        if min(self.prompts, self.prompt_tokens, self.tokens) < 1:
            raise ValueError("prompts, prompt_tokens and tokens must be positive")
        if self.prompt_tokens + self.tokens > self.max_model_len:
            raise ValueError("prompt_tokens and tokens together exceed max_model_len")


def _engine(params: Params) -> dict[str, Any]:
    return chunked_engine(params.max_model_len)


def same_until(have: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Tokens before the first that differs, int64 [R], of completions int [R, T]."""
    return np.asarray(np.logical_and.accumulate(have == want, axis=1).sum(1))


def _run(llm: Any, params: Params, seed: int, baseline: Outcome | None) -> Outcome:
    from vllm import SamplingParams

    rows = token_rows(llm.get_tokenizer(), params.text, params.prompts, params.prompt_tokens)
    greedy = SamplingParams(temperature=0, max_tokens=params.tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": row} for row in rows], greedy, use_tqdm=False)
    tokens = np.array([output.outputs[0].token_ids for output in outputs], np.int32)
    if baseline is None:
        return Outcome({"completions": len(rows), "tokens_each": params.tokens}, {"tokens": tokens})
    same = same_until(tokens, baseline.arrays["tokens"])
    summary = {
        "completions": len(rows),
        "tokens_each": params.tokens,
        "same_share": float(same.mean() / params.tokens),
        "identical": int((same == params.tokens).sum()),
        "same_tokens": same.tolist(),
    }
    return Outcome(summary, {"tokens": tokens})


def _columns(summary: dict[str, Any]) -> dict[str, str]:
    if "same_share" not in summary:
        return {}
    return {"same greedy tokens": f"{summary['same_share']:.0%}"}


MEASURE = Measure("greedy", Params, _engine, _run, _columns)
