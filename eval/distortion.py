"""What every way to store a vector loses, at the bits it stores: one table, ours and its peers side by side.

    polarquant-eval distortion --head-dims 128 --markdown

Two kinds of vectors are stored. *Gaussian* ones, with Gaussian queries. And *uneven* ones, like keys whose
channel pairs differ: one RoPE pair (j, j + d/2) in sixteen is 10 to 30 times as large, and the queries are as
many times smaller there, so that the exact logits are distributed as before. Three errors:

* squared: E|x - x_hat|^2 / E|x|^2;
* logit: E<q, x - x_hat>^2 / E<q, x>^2;
* bias: the slope of <q, x_hat> over <q, x>, less 1.

For Gaussian vectors the first two agree but for sampling. For uneven ones the logit error is what attention
feels. The limit is Shannon's for a Gaussian source, D = 2^(-2R) at the R bits that are stored, overhead
included; for a squared error on Gaussian vectors nothing gets below it.

With `--probe-rows` also the keys and values of a trained model: the shipped probe reads held-out text, every
vector stored by the codec, and the KL of its next token from the exact model's is taken, in nats.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_polarquant.eval.codecs import Peer, all_peers
from vllm_polarquant.eval.measures.text import HELDOUT, token_rows
from vllm_polarquant.eval.probe.episodes import MODEL_DIR
from vllm_polarquant.eval.probe.forward import forward
from vllm_polarquant.format import HEAD_DIMS

QUERIES = 1024
UNEVEN_SHARE, UNEVEN_LOW, UNEVEN_HIGH = 16, 10.0, 30.0
PROBE_HEAD_DIM, PROBE_CONTEXT = 128, 512
WIDTH, MIN_WIDTH = 170, 125
"""Letters of a line of the table in a file; and those it needs, wrapped by terminals that are narrower."""


class Sample(NamedTuple):
    """Vectors x float32 [n, d] and queries q float32 [QUERIES, d]."""

    x: torch.Tensor
    q: torch.Tensor


def gaussian_sample(d: int, vectors: int, seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    return Sample(torch.randn(vectors, d, generator=generator), torch.randn(QUERIES, d, generator=generator))


def uneven_sample(d: int, vectors: int, seed: int) -> Sample:
    """One channel pair in UNEVEN_SHARE scaled by UNEVEN_LOW to UNEVEN_HIGH in x, by its inverse in q."""
    x, q = gaussian_sample(d, vectors, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    chosen = torch.randperm(d // 2, generator=generator)[: d // 2 // UNEVEN_SHARE]
    spread = torch.rand(len(chosen), generator=generator) * math.log(UNEVEN_HIGH / UNEVEN_LOW)
    scale = torch.ones(d // 2)
    scale[chosen] = UNEVEN_LOW * spread.exp()
    both = torch.cat([scale, scale])
    return Sample(x * both, q / both)


def errors(sample: Sample, decoded: torch.Tensor) -> dict[str, float]:
    """Squared error, logit error and bias of what was read back, float32 [n, d]."""
    x, got, q = sample.x.double(), decoded.double(), sample.q.double()
    exact, have = x @ q.T, got @ q.T
    power = exact.square().sum()
    return {
        "squared": float((got - x).square().sum() / x.square().sum()),
        "logit": float((have - exact).square().sum() / power),
        "bias": float((have * exact).sum() / power - 1),
    }


class ProbeText:
    """Rows of held-out text and what the probe says of them with exact keys and values."""

    def __init__(self, rows: int, context: int = PROBE_CONTEXT) -> None:
        from transformers import AutoTokenizer

        self.rows = token_rows(AutoTokenizer.from_pretrained(str(MODEL_DIR)), HELDOUT, rows, context)
        self.exact = [forward(row)[0] for row in self.rows]

    def divergence(self, peer: Peer) -> tuple[float, float]:
        """KL of the next tokens in nats, mean and standard error over rows, vectors stored by the peer."""

        def store(x: torch.Tensor) -> torch.Tensor:
            return peer.roundtrip(x.flatten(0, 1)).view_as(x)

        found = torch.stack(
            [
                (exact.exp() * (exact - forward(row, store, store)[0])).sum(-1).mean()
                for row, exact in zip(self.rows, self.exact, strict=True)
            ]
        )
        return found.mean().item(), found.std().item() / len(found) ** 0.5


def measure(peer: Peer, d: int, samples: dict[str, Sample], probe: ProbeText | None = None) -> dict[str, Any]:
    """One row of the table."""
    stored = peer.stored_bits(d)
    divergence = {} if probe is None else {"probe_kl": probe.divergence(peer)}
    return {
        "codec": peer.name,
        "head_dim": d,
        "code_bits": peer.code_bits(d),
        "overhead_bits": peer.overhead(d),
        "stored_bits": stored,
        "limit": 2 ** (-2 * stored),
        **{name: errors(sample, peer.roundtrip(sample.x)) for name, sample in samples.items()},
        **divergence,
    }


def rows(
    d: int, vectors: int, seed: int, probe: ProbeText | None = None, progress: bool = False
) -> list[dict[str, Any]]:
    """Every peer that can store vectors of size d, fewest stored bits first."""
    probe = probe if d == PROBE_HEAD_DIM else None
    samples = {
        "gaussian": gaussian_sample(d, vectors, seed),
        "uneven": uneven_sample(d, vectors, seed),
    }
    peers = [peer for peer in all_peers() if peer.supports(d)]
    console = Console(stderr=True)
    shown = track(peers, f"d = {d}", console=console, transient=True, disable=not progress)
    return sorted((measure(peer, d, samples, probe) for peer in shown), key=lambda row: row["stored_bits"])


COLUMNS = (
    "codec", "code bits", "overhead", "stored bits", "limit", "squared error", "x limit",
    "logit error", "bias", "uneven: squared", "uneven: logit",
)  # fmt: skip
PROBE_COLUMN = "KL on the probe"


def columns(found: list[dict[str, Any]]) -> list[str]:
    """What stands over the cells of rows of one size."""
    return [*COLUMNS, *([PROBE_COLUMN] if found and "probe_kl" in found[0] else [])]


def _number(value: float) -> str:
    """Three significant digits without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def cells(row: dict[str, Any]) -> list[str]:
    """A row under `columns`."""
    plain, uneven = row["gaussian"], row["uneven"]
    shown = [
        row["codec"],
        f"{row['code_bits']:.2f}",
        f"{row['overhead_bits']:.3f}",
        f"{row['stored_bits']:.3f}",
        _number(row["limit"]),
        _number(plain["squared"]),
        f"{plain['squared'] / row['limit']:.2f}",
        _number(plain["logit"]),
        f"{100 * plain['bias']:+.1f} %",
        _number(uneven["squared"]),
        _number(uneven["logit"]),
    ]
    return [*shown, " ± ".join(map(_number, row["probe_kl"]))] if "probe_kl" in row else shown


def markdown(d: int, found: list[dict[str, Any]]) -> str:
    lines = [
        f"d = {d}",
        "",
        "| " + " | ".join(columns(found)) + " |",
        "|" + "---|" * len(columns(found)),
    ]
    for row in found:
        line = cells(row)
        if "this package" in row["codec"]:
            line[0] = f"**{line[0]}**"
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines) + "\n"


def table(d: int, found: list[dict[str, Any]]) -> Table:
    """The rows for a terminal: numbers and words of the header whole, long names of codecs folded."""
    shown = Table(title=f"d = {d}", box=box.SIMPLE_HEAD)
    for i, name in enumerate(columns(found)):
        head = name.replace(" ", "\n") if i else name
        shown.add_column(head, justify="right" if i else "left", no_wrap=bool(i), vertical="bottom")
    for row in found:
        shown.add_row(*cells(row), style="bold" if "this package" in row["codec"] else None)
    return shown


def main(
    head_dims: Annotated[str, typer.Option(help="Vector sizes, comma-separated.")] = "64,96,128,256",
    vectors: Annotated[int, typer.Option(help="Vectors of each kind.", min=16)] = 2048,
    seed: Annotated[int, typer.Option(help="Of the vectors and queries.")] = 0,
    probe_rows: Annotated[
        int,
        typer.Option(
            help=f"Rows of {PROBE_CONTEXT} tokens that the shipped model reads with each codec at d = "
            f"{PROBE_HEAD_DIM}, half a minute a row; 0 leaves its KL out.",
            min=0,
        ),
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print markdown.")] = False,
) -> None:
    """Measure what every codec loses at the bits it stores, ours and its peers."""
    try:
        dims = [int(d) for d in head_dims.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--head-dims {head_dims!r} is not a list of sizes such as 64,128") from None
    unknown = [d for d in dims if d not in HEAD_DIMS]
    if unknown:
        raise typer.BadParameter(f"--head-dims: {unknown[0]} is not one of {', '.join(map(str, HEAD_DIMS))}")
    if as_json and as_markdown:
        raise typer.BadParameter("--json and --markdown exclude each other")
    if probe_rows == 1:
        raise typer.BadParameter("--probe-rows 1 has no standard error; take 0, or 2 and more")
    if probe_rows and PROBE_HEAD_DIM not in dims:
        raise typer.BadParameter(
            f"--probe-rows needs {PROBE_HEAD_DIM}, the shipped model's head_dim, among --head-dims"
        )
    probe = ProbeText(probe_rows) if probe_rows else None
    found = {d: rows(d, vectors, seed, probe, progress=sys.stderr.isatty()) for d in dims}
    if as_json:
        report = {
            "vectors": vectors,
            "seed": seed,
            "probe_rows": probe_rows,
            "rows": [row for part in found.values() for row in part],
        }
        typer.echo(json.dumps(report, indent=1))
        return
    for d, part in found.items():
        if as_markdown:
            typer.echo(markdown(d, part))
        else:
            width = Console().width if sys.stdout.isatty() else WIDTH
            Console(width=max(width, MIN_WIDTH)).print(table(d, part))


if __name__ == "__main__":
    typer.run(main)
