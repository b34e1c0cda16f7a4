"""Suites are data: JSON files that name cells, each a measure with its parameters, and engine options."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vllm_polarquant.eval.measures import MEASURES, Measure

FOLDER = Path(__file__).parent


class SuiteError(ValueError):
    """A suite that does not exist or does not say what it must."""


@dataclass(frozen=True)
class Cell:
    """One row of results for each dtype: a measure and what it is to measure."""

    name: str
    measure: Measure
    params: Any
    engine: dict[str, Any]
    """All engine options, the suite's own among them; the measure's win."""


def suite_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def _params(where: str, measure: Measure, given: dict[str, Any]) -> Any:
    known = {field.name: field for field in fields(measure.params)}
    unknown = [name for name in given if name not in known]
    if unknown:
        raise SuiteError(
            f"{where}: {measure.name} has no parameter {unknown[0]!r}; it has {', '.join(known)}"
        )
    try:
        return measure.params(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    except (TypeError, ValueError) as problem:
        raise SuiteError(f"{where}: {problem}") from None


def load_suite(
    name: str,
    engine: dict[str, Any] | None = None,
    changes: dict[str, Any] | None = None,
    only: Collection[str] = (),
) -> list[Cell]:
    """The cells of a shipped suite, or of a JSON file of the same form.

    Args:
        name: of the suite, or a path that ends in .json.
        engine: options added to the suite's own.
        changes: parameters that replace those of every cell whose measure has them; those of one cell are
            named CELL.PARAMETER.
        only: names of the cells to take; all if there are none.

    Raises:
        SuiteError: naming the file, the cell and what is wrong.
    """
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file():
        raise SuiteError(
            f"no suite {name!r}; shipped are {', '.join(suite_names())}, and a path to a .json file works too"
        )
    try:
        suite = json.loads(path.read_text(encoding="utf-8"))
        cells, options = suite["cells"], suite.get("engine", {}) | (engine or {})
        pairs = [(label, dict(cell)) for label, cell in cells.items()]
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise SuiteError(f"{path} is not JSON: {problem}") from None
    except (KeyError, TypeError, AttributeError, ValueError):
        raise SuiteError(
            f'{path} must be like {{"engine": {{}}, "cells": {{"NAME": {{"measure": ...}}}}}}'
        ) from None
    everywhere: dict[str, Any] = {}
    of_cell: dict[str, dict[str, Any]] = {label: {} for label, _ in pairs}
    for key, value in (changes or {}).items():
        label, dot, parameter = key.rpartition(".")
        if dot and label not in of_cell:
            raise SuiteError(f"{key}: {path.name} has no cell {label!r}; it has {', '.join(of_cell)}")
        (of_cell[label] if dot else everywhere)[parameter] = value
    unknown = [label for label in only if label not in dict(pairs)]
    if unknown:
        raise SuiteError(f"{path.name} has no cell {unknown[0]!r}; it has {', '.join(dict(pairs))}")
    found = []
    for label, cell in [pair for pair in pairs if not only or pair[0] in only]:
        where = f"{path.name}, cell {label!r}"
        measure = MEASURES.get(cell.pop("measure", ""))
        if measure is None:
            raise SuiteError(f"{where}: 'measure' must be one of {', '.join(MEASURES)}")
        known = {field.name for field in fields(measure.params)}
        changed = {key: value for key, value in everywhere.items() if key in known}
        params = _params(where, measure, cell | changed | of_cell[label])
        found.append(Cell(label, measure, params, options | measure.engine(params)))
    if not found:
        raise SuiteError(f"{path} has no cells")
    return found
