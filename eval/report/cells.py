"""A measured cell: its spread, and as text. One without a number holds the words that say why."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

_REASON = 80
"""Characters of an error that a table shows; the JSON has all."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, min, max and number of the repeats of one measurement."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "repeats": len(values),
    }


def value(cell: Any) -> float | None:
    """The median of a measured cell, a plain number as it is, None for a cell that failed."""
    if isinstance(cell, Mapping):
        cell = cell.get("median")
    return cell if isinstance(cell, int | float) and math.isfinite(cell) else None


def ratio(cell: Any, base: Any) -> float | None:
    """cell / base, or None if one of them was not measured or base is zero."""
    above, below = value(cell), value(base)
    return above / below if above is not None and below else None


def number(x: float | None, digits: int = 3) -> str:
    """A number with so many significant digits (an int with all), thousands separated; a dash for None."""
    if x is None:
        return "-"
    if isinstance(x, int):
        return f"{x:,}"
    if x == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(x))))
    return f"{x:,.{places}f}"


def shown(cell: Any, digits: int = 4) -> str:
    """A cell as text: "median (min-max)", a plain number, or why there is none."""
    if isinstance(cell, Mapping) and "error" in cell:
        reason = str(cell["error"])
        return reason if len(reason) <= _REASON else f"{reason[:_REASON]}..."
    middle = value(cell)
    if middle is None:
        return cell if isinstance(cell, str) else "-"
    text = number(middle, digits)
    if isinstance(cell, Mapping) and cell.get("repeats", 1) > 1:
        text += f" ({number(cell['min'], digits)}-{number(cell['max'], digits)})"
    return text


def times(x: float | None) -> str:
    """A ratio as text."""
    return "-" if x is None else f"{x:.2f}x"


def percent(x: float | None) -> str:
    """A share as text."""
    return "-" if x is None else f"{x:.0%}"
