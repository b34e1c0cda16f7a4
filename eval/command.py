"""What the commands share with `polarquant`: exit statuses, and the one line that says what is wrong."""

from __future__ import annotations

from vllm_polarquant.cli import BAD_INPUT, fail

__all__ = ["BAD_INPUT", "FAILED", "fail"]

FAILED = 1
