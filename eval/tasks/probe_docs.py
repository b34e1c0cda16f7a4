"""Documents of the shipped tasks, for their YAML files; found beside the package, whatever the folder."""

from __future__ import annotations

import random
from typing import Any

import datasets

from vllm_polarquant.eval.probe.episodes import load_episodes, load_heldout, query_prompt

PIECE = 2000
DEPTHS = 5


def _split(rows: list[dict[str, Any]]) -> dict[str, datasets.Dataset]:
    return {"test": datasets.Dataset.from_list(rows)}


def retrieval(**kwargs: Any) -> dict[str, datasets.Dataset]:
    """A document a query of every episode, the shortest episodes first.

    Choices are the right value, at a place drawn by the episode and key, and three others of the context.
    """
    rows = []
    for episode in sorted(load_episodes(), key=lambda row: len(row["prompt"])):
        values = dict(episode["pairs"])
        for query in episode["queries"]:
            draw = random.Random(f"{episode['id']} {query['key']}")
            others = sorted(set(values.values()) - {query["answer"]})
            choices = [*draw.sample(others, 3), query["answer"]]
            draw.shuffle(choices)
            rows.append(
                {
                    "episode": episode["id"],
                    "prompt": query_prompt(episode, query),
                    "answer": query["answer"],
                    "depth": query["depth"],
                    "choices": [f"{choice}'" for choice in choices],
                    "label": choices.index(query["answer"]),
                }
            )
    return _split(rows)


def _depth(band: int, docs: datasets.Dataset) -> datasets.Dataset:
    bands = [min(int(depth * DEPTHS), DEPTHS - 1) for depth in docs["depth"]]
    return docs.select([i for i, found in enumerate(bands) if found == band])


def depth_0(docs: datasets.Dataset) -> datasets.Dataset:
    """Queries of values in the first fifth of the context."""
    return _depth(0, docs)


def depth_1(docs: datasets.Dataset) -> datasets.Dataset:
    return _depth(1, docs)


def depth_2(docs: datasets.Dataset) -> datasets.Dataset:
    return _depth(2, docs)


def depth_3(docs: datasets.Dataset) -> datasets.Dataset:
    return _depth(3, docs)


def depth_4(docs: datasets.Dataset) -> datasets.Dataset:
    return _depth(4, docs)


def text(**kwargs: Any) -> dict[str, datasets.Dataset]:
    """Pieces of about PIECE characters of the held-out source files, cut at lines; of each file in turn."""
    pieces: list[list[dict[str, Any]]] = []
    for row in load_heldout():
        found, piece = [], ""
        for line in row["text"].splitlines(keepends=True):
            piece += line
            if len(piece) >= PIECE:
                found.append({"source": row["source"], "text": piece})
                piece = ""
        pieces.append(found)
    longest = max(map(len, pieces))
    return _split([found[i] for i in range(longest) for found in pieces if i < len(found)])
