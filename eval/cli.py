"""The command `polarquant-eval`: one subcommand an evaluation."""

from __future__ import annotations

import typer

from vllm_polarquant.eval import distortion

app = typer.Typer(
    help="What a KV cache dtype does to accuracy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def main() -> None:
    """What a KV cache dtype does to accuracy."""


app.command("distortion")(distortion.main)
