"""Tile sizes and launch parameters, from data measured offline; nothing is tuned while serving.

configs/<device name>.json holds what was measured on one GPU and configs/default.json what is safe
on all of them. Both map an operation to entries, of which the most specific wins:
``<preset>-d<head_dim>``, ``<preset>``, ``d<head_dim>``, ``*``. An entry need only name what differs
from the less specific ones.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

import torch

from vllm_polarquant.format import PolarFormat

Config = dict[str, int]


def _load(name: str) -> dict[str, dict[str, Config]]:
    path = files("vllm_polarquant.kernels") / "configs" / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


@cache
def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return torch.cuda.get_device_name(device).replace(" ", "_").replace("/", "_")


@cache
def config(op: str, fmt: PolarFormat, device: torch.device) -> Config:
    """Parameters of `op` for one format on one device; see the module's docstring.

    Raises:
        KeyError: for an unknown op.
    """
    return resolve(op, fmt, _load("default"), _load(_device_name(device)))


def resolve(op: str, fmt: PolarFormat, *sources: dict[str, dict[str, Config]]) -> Config:
    """Merge the entries of `sources` that apply to a format, later and more specific ones last."""
    dim = f"d{fmt.head_dim}"
    merged: Config = {}
    for source in sources:
        for name in ("*", dim, fmt.preset, f"{fmt.preset}-{dim}"):
            merged.update(source.get(op, {}).get(name, {}))
    if not merged:
        raise KeyError(f"no launch parameters for {op!r}")
    return merged
