"""What the commands share with `polarquant`: exit statuses, and the one line that says what is wrong."""

from __future__ import annotations

import signal
import threading
from typing import Any

import typer

from vllm_polarquant.cli import BAD_INPUT, fail

__all__ = ["BAD_INPUT", "FAILED", "end_on_sigterm", "fail"]

FAILED = 1


def end_on_sigterm(command: str) -> None:
    """Let SIGTERM end a command as an error does, so that it takes its child processes with it."""

    def end(*_: Any) -> None:
        typer.echo(f"{command}: ended by SIGTERM; what is finished is kept", err=True)
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)
