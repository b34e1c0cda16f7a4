"""Text that measures read, cut into rows of tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_polarquant.eval.probe.episodes import load_heldout

HELDOUT = "heldout"


TEXT_FIELDS = ("text",)
"""Of a JSON object a line, those that are its text unless others are named."""


def read_text(source: str, fields: Sequence[str] = TEXT_FIELDS) -> str:
    """The shipped held-out source files, or a file: plain text, or JSON Lines whose fields hold it.

    Fields and lines are joined by line breaks.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    if source == HELDOUT:
        return "\n".join(row["text"] for row in load_heldout())
    path = Path(source)
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            objects = [json.loads(line) for line in content.splitlines() if line.strip()]
            content = "\n".join(found[field] for found in objects for field in fields)
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"text {source!r} cannot be read: {problem}") from None
    except (json.JSONDecodeError, KeyError, TypeError):
        names = ", ".join(map(repr, fields))
        raise ValueError(f"text {source!r}: every line must be a JSON object with a field {names}") from None
    return content


def encode(tokenizer: Any, text: str) -> list[int]:
    """A prompt's tokens. Some tokenizers of converted models ask for a BOS that their files do not add."""
    ids = list(tokenizer.encode(text))
    bos = getattr(tokenizer, "bos_token_id", None)
    if getattr(tokenizer, "add_bos_token", False) and bos is not None and ids[:1] != [bos]:
        ids = [bos, *ids]
    return ids


def token_rows(
    tokenizer: Any, source: str, rows: int, tokens: int, fields: Sequence[str] = TEXT_FIELDS
) -> list[list[int]]:
    """Rows of exactly `tokens` tokens that start at lines spread evenly over the text (`read_text`).

    Each is tokenised as a prompt of its own, with the tokens that the tokenizer puts before a prompt.

    Raises:
        ValueError: if the text is too short for as many rows without overlap.
    """
    text = read_text(source, fields)
    starts = [0] + [i + 1 for i, char in enumerate(text) if char == "\n"]
    found: list[list[int]] = []
    for row in range(rows):
        begin = min(starts, key=lambda start: abs(start - row * len(text) // rows))
        # No tokenizer's tokens are 20 characters long on average.
        end = min((row + 1) * len(text) // rows, begin + 20 * tokens)
        ids = encode(tokenizer, text[begin:end])[:tokens]
        if len(ids) < tokens:
            raise ValueError(
                f"text {source!r} is too short for {rows} rows of {tokens} tokens: one has only "
                f"{len(ids)}; ask for fewer rows or a shorter context, or give a longer text"
            )
        found.append(ids)
    return found
