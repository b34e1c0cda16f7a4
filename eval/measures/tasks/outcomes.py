"""What lm-eval found of each document, as (sum, weight), float64 [D, 2], one array a metric and filter.

With them are kept the documents' hashes, so that another dtype is compared on the same documents.
"""

from __future__ import annotations

from typing import Any

import numpy as np

NATS = {"word_perplexity", "byte_perplexity", "perplexity", "bits_per_byte"}
"""Metrics that lm-eval makes of summed log-likelihoods: kept as nats, shown as lm-eval shows them."""

RIGHT_CHOICE = "logprob of the right choice"


def document_outcome(metric: str, value: Any) -> tuple[float, float] | None:
    """(sum, weight) of what a task reports of a document; None if it is not of a kind that adds up.

    Log-likelihoods become nats to predict the text, so that less is better.
    """
    if metric in NATS:
        if isinstance(value, tuple | list) and len(value) == 2:
            return -float(value[0]), float(value[1])
        return (-float(value), 1.0) if isinstance(value, int | float) else None
    if isinstance(value, bool | int | float | np.number):
        # RULER has a metric a length and reports -1 for those that a document has not.
        return (0.0, 0.0) if metric.isdigit() and value == -1 else (float(value), 1.0)
    if isinstance(value, list) and value and all(isinstance(v, bool | int | float) for v in value):
        return float(sum(value)), float(len(value))
    return None


def _right_choice(sample: dict[str, Any]) -> float | None:
    """Log-probability of the right one among a multiple-choice document's choices, in nats."""
    try:
        scores = np.array([float(score) for score, _ in sample["filtered_resps"]])
        target = int(sample["target"])
    except (TypeError, ValueError):
        return None
    if not 0 <= target < len(scores) or len(scores) < 2:
        return None
    return float(scores[target] - np.logaddexp.reduce(scores))


def collect(samples: dict[str, list[dict[str, Any]]]) -> dict[str, np.ndarray]:
    """lm-eval's samples by task as arrays of documents.

    Returns:
        "documents" str [D] (task, id and hash of each document), "tasks" str [D], and by metric and filter
        float64 [D, 2], whose rows are (0, 0) for documents that have not that metric.
    """
    documents: dict[str, str] = {}
    outcomes: dict[str, dict[str, tuple[float, float]]] = {}
    for task, rows in samples.items():
        for row in rows:
            name = f"{task}/{row['doc_id']}/{row['doc_hash'][:12]}"
            documents[name] = task
            for metric in row["metrics"]:
                found = document_outcome(metric, row[metric])
                if found is not None:
                    outcomes.setdefault(f"{metric},{row['filter']}", {})[name] = found
            if "acc" in row["metrics"] and (choice := _right_choice(row)) is not None:
                outcomes.setdefault(f"{RIGHT_CHOICE},{row['filter']}", {})[name] = (choice, 1.0)
    names = sorted(documents)
    arrays = {
        metric: np.array([by_name.get(name, (0.0, 0.0)) for name in names])
        for metric, by_name in outcomes.items()
    }
    arrays["documents"] = np.array(names)
    arrays["tasks"] = np.array([documents[name] for name in names])
    return arrays
