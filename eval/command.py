"""What the commands share: exit statuses, and the one line that says what is wrong with their input."""

from __future__ import annotations

from typing import NoReturn

import typer

FAILED, BAD_INPUT = 1, 2


def fail(command: str, message: object, status: int = BAD_INPUT) -> NoReturn:
    """Say on stderr, in one line, what is wrong, and exit."""
    typer.echo(f"{command}: {' '.join(str(message).split())}", err=True)
    raise typer.Exit(status)
