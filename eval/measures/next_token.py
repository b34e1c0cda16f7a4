"""Perplexity, and the next-token distribution against the baseline's on the same text.

How quantised pages get into it. A prompt's log-probabilities come from its prefill, and the first chunk of a
prefill attends to keys and values that were never stored. So every row is fed one token a step
(``long_prefill_token_threshold=1``, all rows in one batch and equally long): each step is a decode, which
reads every earlier key and value, and its own, off the pages, as generation does.

How the tail is handled. vLLM returns the log-probabilities of the `top` likeliest tokens, here and in the
baseline. Tokens in both lists count one by one, all others of the vocabulary as a single one, so that the KL
divergence is a lower bound, exact when `top` is the vocabulary; the mass of that rest is reported.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_polarquant.eval.measures.base import Measure, Outcome
from vllm_polarquant.eval.measures.text import HELDOUT, TEXT_FIELDS, read_text, token_rows
from vllm_polarquant.eval.statistics import Z

BLOCK = 64
"""Errors of neighbouring tokens are alike: standard errors are over the means of so many."""

MIN_MASS = 1e-9


@dataclass(frozen=True)
class Params:
    """rows of context tokens of a text (HELDOUT or a file), and the top log-probabilities to compare.

    fields: of a file of JSON Lines, those that hold text.
    """

    rows: int = 8
    context: int = 512
    top: int = 256
    text: str = HELDOUT
    fields: tuple[str, ...] = TEXT_FIELDS

    def __post_init__(self) -> None:
        if self.rows < 1 or self.context < BLOCK + 1 or self.top < 1:
            raise ValueError(f"rows and top must be positive, context more than {BLOCK}")


def _engine(params: Params) -> dict[str, Any]:
    return {
        "max_model_len": params.context + 1,
        "max_num_seqs": params.rows,
        "max_num_batched_tokens": params.rows,
        "long_prefill_token_threshold": 1,
        "enable_prefix_caching": False,
        "max_logprobs": -1,
    }


def _identity(params: Params) -> dict[str, Any]:
    if params.text == HELDOUT:
        return {}
    return {"text": hashlib.sha256(read_text(params.text, params.fields).encode()).hexdigest()[:16]}


def score(llm: Any, rows: list[list[int]], top: int) -> dict[str, np.ndarray]:
    """Log-probabilities of rows of equal length T: of the actual tokens, and of the likeliest.

    Returns:
        actual float32 [R, T - 1]; ids int32 and logprobs float32 [R, T - 1, top], likeliest first.
    """
    from vllm import SamplingParams

    top = min(top, llm.llm_engine.model_config.get_vocab_size())
    params = SamplingParams(
        temperature=0, max_tokens=1, prompt_logprobs=top, flat_logprobs=True, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": row} for row in rows], params, use_tqdm=False)
    ids, logprobs = [], []
    for row, output in zip(rows, outputs, strict=True):
        flat = output.prompt_logprobs
        # A position's entries are its actual token and then the likeliest in order.
        shape = (len(row) - 1, top + 1)
        ids.append(np.array(flat.token_ids, np.int32).reshape(shape))
        logprobs.append(np.array(flat.logprobs, np.float32).reshape(shape))
        if not np.array_equal(ids[-1][:, 0], row[1:]):
            raise RuntimeError("vLLM returned the log-probabilities of other tokens than the prompt's")
    every_id, every = np.stack(ids), np.stack(logprobs)
    return {"actual": every[..., 0], "ids": every_id[..., 1:], "logprobs": every[..., 1:]}


def divergence(base: dict[str, np.ndarray], have: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """KL of `have` from `base` in nats, and the base's mass outside the compared tokens, float64 [R, P].

    Both are results of `score`; P is the number of positions.
    """
    shape = base["actual"].shape
    top = base["ids"].shape[-1]
    base_ids = base["ids"].reshape(-1, top)
    have_ids = have["ids"].reshape(len(base_ids), -1)
    p_all = base["logprobs"].reshape(-1, top).astype(np.float64)
    q_all = have["logprobs"].reshape(len(base_ids), -1).astype(np.float64)
    kl, rest = np.empty(len(base_ids)), np.empty(len(base_ids))
    for i, (mine, theirs) in enumerate(zip(base_ids, have_ids, strict=True)):
        _, at, there = np.intersect1d(mine, theirs, assume_unique=True, return_indices=True)
        p, q = p_all[i, at], q_all[i, there]
        p_rest = max(1 - np.exp(p).sum(), MIN_MASS)
        q_rest = max(1 - np.exp(q).sum(), MIN_MASS)
        kl[i] = (np.exp(p) * (p - q)).sum() + p_rest * math.log(p_rest / q_rest)
        rest[i] = p_rest
    return kl.reshape(shape), rest.reshape(shape)


def block_error(values: np.ndarray) -> float:
    """Standard error of the mean of values [R, P], over means of BLOCK neighbours."""
    blocks = values[:, : values.shape[1] // BLOCK * BLOCK].reshape(-1, BLOCK).mean(-1)
    return float(blocks.std(ddof=1) / math.sqrt(len(blocks))) if len(blocks) > 1 else math.nan


def _edges(positions: int) -> list[int]:
    """0, 64, 128, 256, ... and the end."""
    edges = [0]
    while (edge := BLOCK if len(edges) == 1 else 2 * edges[-1]) < positions:
        edges.append(edge)
    return [*edges, positions]


def _run(llm: Any, params: Params, seed: int, baseline: Outcome | None) -> Outcome:
    rows = token_rows(llm.get_tokenizer(), params.text, params.rows, params.context, params.fields)
    scored = score(llm, rows, params.top)
    nll = -scored["actual"].astype(np.float64)
    summary: dict[str, Any] = {
        "tokens": int(nll.size),
        "perplexity": math.exp(nll.mean()),
    }
    by_position: list[dict[str, Any]] = []
    edges = _edges(nll.shape[1])
    for low, high in itertools.pairwise(edges):
        part = {"from": low, "to": high, "perplexity": math.exp(nll[:, low:high].mean())}
        by_position.append(part)
    if baseline is None:
        return Outcome(summary | {"by_position": by_position}, scored)

    base = baseline.arrays
    kl, rest = divergence(base, scored)
    same = base["ids"][..., 0] == scored["ids"][..., 0]
    more = nll + base["actual"].astype(np.float64)
    summary |= {
        "kl": float(kl.mean()),
        "kl_standard_error": block_error(kl),
        "kl_median": float(np.median(kl)),
        "kl_99th_percentile": float(np.quantile(kl, 0.99)),
        "top1_agreement": float(same.mean()),
        "mass_outside_top": float(rest.mean()),
        "nll_difference": float(more.mean()),
        "nll_difference_standard_error": block_error(more),
    }
    for part in by_position:
        where = slice(part["from"], part["to"])
        part |= {"kl": float(kl[:, where].mean()), "top1_agreement": float(same[:, where].mean())}
    arrays = {"kl": kl.astype(np.float32), "same": same, "actual": scored["actual"]}
    return Outcome(summary | {"by_position": by_position}, arrays)


def _columns(summary: dict[str, Any]) -> dict[str, str]:
    shown = {"perplexity": f"{summary['perplexity']:.3f}"}
    if "kl" in summary:
        error = Z * summary["nll_difference_standard_error"]
        shown |= {
            "NLL difference": f"{summary['nll_difference']:+.4f} ± {error:.4f}",
            "KL, nats": f"{summary['kl']:.4f} ± {Z * summary['kl_standard_error']:.4f}",
            "same top-1": f"{summary['top1_agreement']:.1%}",
        }
    return shown


def _ranges(name: str, digits: int) -> Callable[[dict[str, Any]], dict[str, str]]:
    def shown(summary: dict[str, Any]) -> dict[str, str]:
        parts = [part for part in summary["by_position"] if name in part]
        return {f"{part['from']}-{part['to'] - 1}": f"{part[name]:.{digits}f}" for part in parts}

    return shown


MEASURE = Measure(
    "next_token",
    Params,
    _engine,
    _run,
    _columns,
    {
        "KL by tokens of context": _ranges("kl", 4),
        "perplexity by tokens of context": _ranges("perplexity", 3),
    },
    identity=_identity,
)
