"""Retrieval episodes and held-out text of the probe model; standard library only.

An episode is a piece of Python source in which assignments ``table['3fa0'] = '91bc'`` are
scattered between ordinary lines of code. A query is the episode followed by
``assert table['3fa0'] == '``; the right continuation is the four hex characters and the closing
quote.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

DATA_DIR = Path(__file__).resolve().parent / "data"
MODEL_DIR = Path(__file__).resolve().parent / "model"

HEADER = "table = {}\n"
PROBE_ANSWER_TOKENS = 4
"""Of the probe's tokenizer: two for four hex characters, one for the closing quote, and a spare one."""


def pair_line(key: str, value: str) -> str:
    """The line that defines one pair."""
    return f"table['{key}'] = '{value}'\n"


def query_stem(key: str) -> str:
    """The text that ends right before the value of ``key``."""
    return f"assert table['{key}'] == '"


def query_line(key: str, value: str) -> str:
    """A full query line, as the model saw it in training."""
    return f"{query_stem(key)}{value}'\n"


def query_prompt(episode: dict[str, Any], query: dict[str, Any]) -> str:
    """The prompt that asks one query of an episode, independent of its other queries."""
    return episode["prompt"] + query_stem(query["key"])


def episode_prompts(episode: dict[str, Any]) -> list[tuple[str, str, float]]:
    """``(prompt, answer, depth)`` of every query of an episode; depth 0 is the context's start."""
    return [(query_prompt(episode, q), q["answer"], q["depth"]) for q in episode["queries"]]


def score_answer(continuation: str, answer: str) -> bool:
    """Whether a continuation of a query prompt is the answer: the exact value, then the quote."""
    return continuation.startswith(answer + "'")


def load_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a JSON Lines file."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def load_episodes(path: str | Path | None = None) -> list[dict[str, Any]]:
    """The held-out episodes, by default those shipped beside this module."""
    return load_jsonl(path or DATA_DIR / "episodes.jsonl")


def load_heldout(path: str | Path | None = None) -> list[dict[str, Any]]:
    """The held-out source files: rows with ``source``, ``licence`` and ``text``."""
    return load_jsonl(path or DATA_DIR / "heldout.jsonl")


class Context(NamedTuple):
    """An episode before its queries: text, pairs in order, where each pair's line starts."""

    text: str
    pairs: list[tuple[str, str]]
    offsets: list[int]


def hex_strings(rng: random.Random, count: int, distinct: bool) -> list[str]:
    """Random four-character lower-case hex strings."""
    if distinct:
        return [f"{n:04x}" for n in rng.sample(range(1 << 16), count)]
    return [f"{rng.randrange(1 << 16):04x}" for _ in range(count)]


def filler_lines(rng: random.Random, docs: Sequence[Sequence[str]], chars: int) -> list[str]:
    """Short runs of consecutive lines from random files, about ``chars`` characters in all."""
    lines: list[str] = []
    used = 0
    while used < chars:
        doc = docs[rng.randrange(len(docs))]
        start = rng.randrange(len(doc))
        for line in doc[start : start + rng.randint(1, 10)]:
            lines.append(line)
            used += len(line)
            if used >= chars:
                break
    return lines


def usable_lines(text: str) -> list[str]:
    """The lines of a source file that may serve as filler, newline kept."""
    return [
        line + "\n"
        for line in text.split("\n")
        if len(line) <= 160 and "table[" not in line and "table = " not in line
    ]


def build_context(
    rng: random.Random, docs: Sequence[Sequence[str]], filler_chars: int, n_pairs: int
) -> Context:
    """Scatter ``n_pairs`` definitions between lines of code (dense if there is no filler)."""
    keys = hex_strings(rng, n_pairs, distinct=True)
    pairs = list(zip(keys, hex_strings(rng, n_pairs, distinct=False), strict=True))
    lines = filler_lines(rng, docs, filler_chars) if filler_chars > 0 else []
    slots = sorted(rng.randint(0, len(lines)) for _ in range(n_pairs))
    pieces = [HEADER]
    length = len(HEADER)
    offsets: list[int] = []
    done = 0
    for slot, pair in zip(slots, pairs, strict=True):
        chunk = lines[done:slot]
        done = slot
        pieces.extend(chunk)
        length += sum(map(len, chunk))
        offsets.append(length)
        line = pair_line(*pair)
        pieces.append(line)
        length += len(line)
    pieces.extend(lines[done:])
    return Context("".join(pieces), pairs, offsets)


def evaluation_episode(
    rng: random.Random,
    docs: Sequence[Sequence[str]],
    name: str,
    filler_chars: int,
    n_pairs: int,
    n_queries: int,
) -> dict[str, Any]:
    """One row of ``episodes.jsonl``; its queries are spread evenly over the depths."""
    context = build_context(rng, docs, filler_chars, n_pairs)
    depths = [round(offset / len(context.text), 4) for offset in context.offsets]
    queries = []
    for i in range(n_queries):
        low, high = i * n_pairs // n_queries, (i + 1) * n_pairs // n_queries
        index = rng.randrange(low, max(high, low + 1))
        key, answer = context.pairs[index]
        queries.append({"key": key, "answer": answer, "depth": depths[index]})
    return {
        "id": name,
        "prompt": context.text,
        "pairs": [list(pair) for pair in context.pairs],
        "depths": depths,
        "queries": queries,
    }
