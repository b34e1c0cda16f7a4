"""One way to run a part of an evaluation in a process of its own.

A child is `python -m` one of this package's modules. It reads one JSON job from stdin and reports JSON
objects, a line each, on stdout; whatever else it prints goes to stderr. It leads a session of its own, so
that the processes which an engine starts end with it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Report = Callable[[Any], None]

_CHECK_S = 1.0
"""How often a child that says nothing is looked at: one that died may have left its pipe to others."""

_running: set[Child] = set()


def module(name: str) -> list[str]:
    """The command that runs a module of this package as a child."""
    return [sys.executable, "-m", name]


class Ended(Exception):
    """A child that will report no more; status: its exit status, negative if a signal ended it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the process ended with exit status {status}")
        self.status = status


class Child:
    """A running child, ended with all that it started when its `with` block is left.

    Args:
        command: `module` of what it runs.
        job: what it is to do, as JSON.
        env: variables beside this process's own.
        log: file that its stderr goes to; None for this process's stderr.
    """

    def __init__(
        self, command: Sequence[str], job: Any, env: Mapping[str, str] | None = None, log: Path | None = None
    ) -> None:
        with contextlib.ExitStack() as files:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=files.enter_context(open(log, "w", encoding="utf-8")) if log else None,
                text=True,
                env=os.environ | dict(env or {}),
                start_new_session=True,
            )
        _running.add(self)
        self._reports: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        assert self._process.stdin
        # One that died at once is told of by `report`.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job))
            self._process.stdin.close()

    def _read(self) -> None:
        assert self._process.stdout
        with contextlib.suppress(ValueError):
            for line in self._process.stdout:
                self._reports.put(line)
        self._reports.put(None)

    def report(self, timeout_s: float | None = None) -> Any:
        """The next report, in order.

        Raises:
            TimeoutError: if there was none in so many seconds.
            Ended: if there will be none.
        """
        ends = time.monotonic() + timeout_s if timeout_s is not None else float("inf")
        while True:
            dead = self._process.poll() is not None
            try:
                line = self._reports.get(timeout=max(0.0, min(_CHECK_S, ends - time.monotonic())))
            except queue.Empty:
                if dead:
                    raise Ended(self._process.returncode) from None
                if time.monotonic() >= ends:
                    raise TimeoutError(f"no report in {timeout_s:.0f} s") from None
                continue
            if line is None:
                raise Ended(self._process.wait())
            return json.loads(line)

    def reports(self) -> Iterator[Any]:
        """Every report until the child ends."""
        with contextlib.suppress(Ended):
            while True:
                yield self.report()

    @property
    def status(self) -> int | None:
        """Exit status, or None while it runs."""
        return self._process.poll()

    def end(self) -> None:
        """Kill it with all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        _running.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, where: TracebackType | None
    ) -> None:
        self.end()


def end_all() -> None:
    """End every child of this process: an interrupted one waits for the threads that read theirs."""
    for child in list(_running):
        child.end()


def why(problem: Exception) -> str:
    """An error in a line."""
    return f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:500]


def report_all(findings: Iterable[tuple[str, Any]], report: Report) -> None:
    """Report [name, finding] as each is found, and why the rest is not as ["error", ...]."""
    try:
        for name, finding in findings:
            report([name, finding])
    except Exception as problem:
        report(["error", why(problem)])
        raise


def serve(work: Callable[[Any, Report], None]) -> None:
    """Be a child: read the job and do it, `work(job, report)`."""
    job = json.load(sys.stdin)
    # Libraries and their processes print where they like: the reports' channel is kept from them.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)
        # A child that is killed leaves what it had printed.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)

        def report(found: Any) -> None:
            channel.write(json.dumps(found) + "\n")
            channel.flush()

        work(job, report)
