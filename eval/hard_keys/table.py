"""What the cases' results say, a row a checkpoint and dtype."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from vllm_polarquant.eval import results
from vllm_polarquant.eval.dtypes import BASELINE
from vllm_polarquant.eval.hard_keys.cases import Case
from vllm_polarquant.eval.measures.next_token import divergence
from vllm_polarquant.eval.plan import Plan
from vllm_polarquant.eval.suites import Cell


def _edit_divergence(original: Plan, edited: Plan, cell: Cell) -> float | None:
    """Mean KL in nats of the edited model from the original, both in 16 bits; None if one is not there."""
    try:
        base, have = (
            results.outcome(plan.folder, results.stem(plan.key(BASELINE, cell))).arrays
            for plan in (original, edited)
        )
    except FileNotFoundError:
        return None
    return float(divergence(base, have)[0].mean())


def rows(cases: list[Case]) -> list[dict[str, Any]]:
    """One row a case and dtype, from the results that there are; the first case is the unedited model.

    kl: of a dtype from 16 bits on the same checkpoint; of auto, from the unedited model. skipped_kl: with
    the layers of `polarquant check` in 16 bits; unedited_skipped_kl: the same on the unedited model.
    """
    original = cases[0]
    found: list[dict[str, Any]] = []

    def summary(plan: Plan | None, dtype: str, cell: str) -> dict[str, Any]:
        cells = [c for c in plan.cells if c.name == cell] if plan else []
        have = plan.found(dtype, cells[0]) if plan and cells else None
        return have["summary"] if have else {}

    def retrieval(plan: Plan | None, dtype: str) -> str | None:
        have = summary(plan, dtype, "retrieval")
        return f"{have['right']}/{have['of']}" if have else None

    for case in cases:
        layers = tuple(case.keys.skip_layers)
        skipped = case.skipped.get(layers)
        for dtype in case.plain.dtypes:
            text = summary(case.plain, dtype, "text")
            row: dict[str, Any] = {"keys": case.label, "kv_cache_dtype": dtype, "skip_layers": list(layers)}
            row |= {"perplexity": text.get("perplexity"), "kl": text.get("kl")}
            row["kl_standard_error"] = text.get("kl_standard_error")
            if dtype == BASELINE and case is not original:
                row["kl"] = _edit_divergence(original.plain, case.plain, case.plain.cells[0])
            else:
                row["skipped_perplexity"] = summary(skipped, dtype, "text").get("perplexity")
                row["skipped_kl"] = summary(skipped, dtype, "text").get("kl")
                unedited = original.skipped.get(layers) if case is not original else None
                row["unedited_skipped_kl"] = summary(unedited, dtype, "text").get("kl")
            row["retrieval"] = retrieval(case.plain, dtype)
            row["skipped_retrieval"] = retrieval(skipped, dtype)
            found.append({name: value for name, value in row.items() if value is not None})
    return found


COLUMNS: dict[str, tuple[str, str]] = {
    "perplexity": ("perplexity", ".3f"),
    "kl": ("KL, nats", ".4f"),
    "skipped_perplexity": ("perplexity, layers skipped", ".3f"),
    "skipped_kl": ("KL, layers skipped", ".4f"),
    "unedited_skipped_kl": ("KL, unedited and skipped", ".4f"),
    "retrieval": ("retrieval", ""),
    "skipped_retrieval": ("retrieval, layers skipped", ""),
}


def table(found: list[dict[str, Any]]) -> Table:
    title = ", ".join(f"{name} {value}" for name, value in results.versions().items())
    shown = Table(title=title, box=box.MARKDOWN, title_justify="left")
    shown.add_column("keys", no_wrap=True)
    shown.add_column("kv-cache-dtype", no_wrap=True)
    columns = {name: how for name, how in COLUMNS.items() if any(name in row for row in found)}
    for head, _ in columns.values():
        shown.add_column(head, justify="right")
    for row in found:
        cells = (format(row[name], how) if name in row else "-" for name, (_, how) in columns.items())
        shown.add_row(row["keys"], row["kv_cache_dtype"], *cells)
    return shown
