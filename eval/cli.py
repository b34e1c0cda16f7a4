"""The command `polarquant-eval`: a model to measure, or the name of another evaluation."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from vllm_polarquant.eval import distortion, run
from vllm_polarquant.eval.accuracy import command as report
from vllm_polarquant.eval.hard_keys import command as hard_keys


class _ModelOrCommand(TyperGroup):
    """`polarquant-eval MODEL ...` is `polarquant-eval run MODEL ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and not args[0].startswith("--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_ModelOrCommand,
    help="What a KV cache dtype does to accuracy: polarquant-eval MODEL --kv-cache-dtypes auto,...",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("run")(run.main)
app.command("distortion")(distortion.main)
app.command("hard-keys")(hard_keys.main)
app.command("report")(report.main)

if __name__ == "__main__":
    app()
