"""Text that measures read, cut into rows of tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_polarquant.eval.probe.episodes import load_heldout

HELDOUT = "heldout"


def read_text(source: str) -> str:
    """The shipped held-out source files, or a file: plain text, or JSON Lines with a field `text`.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    if source == HELDOUT:
        return "\n".join(row["text"] for row in load_heldout())
    path = Path(source)
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            content = "\n".join(json.loads(line)["text"] for line in content.splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"text {source!r} cannot be read: {problem}") from None
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"text {source!r}: every line must be a JSON object with a field 'text'") from None
    return content


def encode(tokenizer: Any, text: str) -> list[int]:
    """A prompt's tokens. Some tokenizers of converted models ask for a BOS that their files do not add."""
    ids = list(tokenizer.encode(text))
    bos = getattr(tokenizer, "bos_token_id", None)
    if getattr(tokenizer, "add_bos_token", False) and bos is not None and ids[:1] != [bos]:
        ids = [bos, *ids]
    return ids


def token_rows(tokenizer: Any, source: str, rows: int, tokens: int) -> list[list[int]]:
    """Rows of exactly `tokens` tokens that start at lines spread evenly over the text.

    Each is tokenised as a prompt of its own, with the tokens that the tokenizer puts before a prompt.

    Raises:
        ValueError: if the text is too short for as many rows without overlap.
    """
    text = read_text(source)
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
