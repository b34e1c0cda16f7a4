"""Files that are whole or not there, and a folder that one run at a time writes into."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"


def write_text(path: Path, text: str) -> None:
    """Replace a file's text as a whole: cut short, the earlier one is still there."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only one that writes into a folder, which is made if it is not there.

    Raises:
        OSError: if another process is, or if this one may not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError("another run writes into it; wait for its end or take another folder") from None
        yield
