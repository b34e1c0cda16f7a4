"""Exact retrieval of values defined once in a prompt, by depth and by the number of pairs.

The context is prefilled first and stays in the prefix cache; the question then comes in chunks of at most
CHUNK tokens, so that its last tokens and the answer read the context off quantised pages. In one chunk with
the context, the first token of the answer would come from keys and values that were never stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_polarquant.eval.measures.base import Measure, Outcome, chunked_engine
from vllm_polarquant.eval.probe.episodes import (
    load_episodes,
    query_prompt,
    score_answer,
)

DEPTHS = 5
PAIRS = (20, 30, 40, 60)
ANSWER_TOKENS = 12
"""Four hex characters and a quote with any tokenizer, with room to go wrong; the quote ends an answer."""

LENGTHS = ("1000", "2000", "3500")


@dataclass(frozen=True)
class Params:
    """episodes of each of the lengths (about so many of the probe's tokens), every query of each."""

    lengths: tuple[str, ...] = LENGTHS
    episodes: int = 4
    max_model_len: int = 4096

    def __post_init__(self) -> None:
        unknown = [length for length in self.lengths if length not in LENGTHS]
        if unknown or not self.lengths:
            raise ValueError(f"lengths must be some of {', '.join(LENGTHS)}, not {list(self.lengths)}")
        if not 1 <= self.episodes <= 20:
            raise ValueError("episodes must be 1 to 20, of each length")


def _engine(params: Params) -> dict[str, Any]:
    return chunked_engine(params.max_model_len)


def _share(items: list[dict[str, Any]]) -> dict[str, int]:
    return {"right": sum(item["right"] for item in items), "of": len(items)}


def summarise(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of right answers: all, by depth, by number of pairs, and by both."""

    def depth(item: dict[str, Any]) -> int:
        return min(int(item["depth"] * DEPTHS), DEPTHS - 1)

    def group(item: dict[str, Any]) -> int:
        return sum(item["pairs"] >= edge for edge in PAIRS)

    edges = [0, *PAIRS, None]
    grid = [
        {
            "pairs": edges[column : column + 2],
            "depth": [row / DEPTHS, (row + 1) / DEPTHS],
            **_share([item for item in items if depth(item) == row and group(item) == column]),
        }
        for column in range(len(edges) - 1)
        for row in range(DEPTHS)
    ]
    return {
        **_share(items),
        "by_depth": [
            {"depth": [row / DEPTHS, (row + 1) / DEPTHS], **_share([i for i in items if depth(i) == row])}
            for row in range(DEPTHS)
        ],
        "by_pairs": [
            {"pairs": edges[column : column + 2], **_share([i for i in items if group(i) == column])}
            for column in range(len(edges) - 1)
        ],
        "by_both": [cell for cell in grid if cell["of"]],
        "items": items,
    }


def _run(llm: Any, params: Params, seed: int, baseline: Outcome | None) -> Outcome:
    from vllm import SamplingParams

    rows = [
        row
        for length in params.lengths
        for row in [row for row in load_episodes() if row["id"].startswith(length)][: params.episodes]
    ]
    asked = [(row, query) for row in rows for query in row["queries"]]
    one = SamplingParams(temperature=0, max_tokens=1)
    contexts = llm.generate([row["prompt"] for row in rows], one, use_tqdm=False)
    tokens = {row["id"]: len(out.prompt_token_ids) for row, out in zip(rows, contexts, strict=True)}
    answer = SamplingParams(
        temperature=0, max_tokens=ANSWER_TOKENS, stop=["'"], include_stop_str_in_output=True
    )
    outputs = llm.generate([query_prompt(row, query) for row, query in asked], answer, use_tqdm=False)
    items = [
        {
            "episode": row["id"],
            "tokens": tokens[row["id"]],
            "pairs": len(row["pairs"]),
            "depth": query["depth"],
            "right": score_answer(output.outputs[0].text, query["answer"]),
        }
        for (row, query), output in zip(asked, outputs, strict=True)
    ]
    return Outcome(summarise(items))


def _columns(summary: dict[str, Any]) -> dict[str, str]:
    return {"retrieval": f"{summary['right']}/{summary['of']}"}


def _by_depth(summary: dict[str, Any]) -> dict[str, str]:
    return {
        f"{part['depth'][0]:.0%}-{part['depth'][1]:.0%}": f"{part['right']}/{part['of']}"
        for part in summary["by_depth"]
    }


def _by_pairs(summary: dict[str, Any]) -> dict[str, str]:
    def label(low: int, high: int | None) -> str:
        return f"{low}+" if high is None else f"{low}-{high - 1}"

    parts = [part for part in summary["by_pairs"] if part["of"]]
    return {label(*part["pairs"]): f"{part['right']}/{part['of']}" for part in parts}


MEASURE = Measure(
    "retrieval",
    Params,
    _engine,
    _run,
    _columns,
    {"retrieval by depth": _by_depth, "retrieval by pairs in the context": _by_pairs},
)
