"""`polarquant-eval report`: one page and plots of what every KV cache dtype loses, from a folder of results.

The JSON file that lies beside the page holds all that it shows, so that `--render` needs neither results nor
vLLM. A page is of one model with the same versions, device and seed; the newest such set is taken, and what
was set aside is said. Verdicts are computed from the numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_polarquant.check import ConfigError
from vllm_polarquant.eval.accuracy.collect import ReportError, collect, read_report
from vllm_polarquant.eval.accuracy.page import distortion_of, write
from vllm_polarquant.eval.command import FAILED, fail
from vllm_polarquant.eval.report.page import Report, check_stem


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of results.")] = Path("eval-results"),
    out: Annotated[Path, typer.Option(help="Stem of the .json, .md and -*.png files.")] = Path("accuracy"),
    model: Annotated[
        str | None, typer.Option(help="Of several models in the folder, this one, named as in its results.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="The model's folder or config.json, if it is not where it was.")
    ] = None,
    vectors: Annotated[int, typer.Option(help="Of the distortion table; 0 leaves it out.", min=0)] = 2048,
    render: Annotated[Path | None, typer.Option(help="Only make the page of this JSON file again.")] = None,
) -> None:
    """Make one page and plots of a folder of results: accuracy against bytes a token for every dtype.

    Exits with 1 if what is shown lacks a damaged file's, and with 2 if there is nothing to show.
    """
    try:
        check_stem(out)
        if render is not None:
            found = read_report(render)
        else:
            found = collect(folder, model, config)
            if vectors:
                found["distortion"] = distortion_of(found["shape"]["head_dim"], vectors)
        paths = _written(out, found, render or folder)
    except (ReportError, ConfigError, OSError) as problem:
        fail("polarquant-eval report", problem)
    for name, why in (found["missing"] | found["problems"]).items():
        typer.echo(f"not in the tables: {name}: {why}", err=True)
    for note in found["notes"]:
        typer.echo(note, err=True)
    for path in paths:
        typer.echo(path)
    if found["problems"]:
        raise typer.Exit(FAILED)


def _written(out: Path, found: Report, source: Path) -> list[str]:
    try:
        return write(out, found)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as problem:
        raise ReportError(f"{source} is not what polarquant-eval writes: {problem!r}") from None
