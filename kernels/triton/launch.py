"""Launch parameters: what a GPU is, what was measured on it, and how many decode programs it runs.

configs/default.json holds what is safe everywhere, configs/sm<compute capability>.json what was measured on a
generation, and configs/<device name>.json what one GPU takes otherwise. Each maps an operation to entries, of
which the most specific wins: ``<preset>-d<head_dim>``, ``<preset>``, ``d<head_dim>``, ``*``. An entry need
only name what differs from the less specific ones. Nothing is tuned while serving.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch
import triton

from vllm_polarquant.format import Slot
from vllm_polarquant.kernels.triton.constants import table_entries, vector_code
from vllm_polarquant.kernels.triton.lanes import DYNAMIC, bonus_bytes, exchange_bytes, words_bytes

Config = dict[str, int]

_STATIC_TABLES = 40 << 10
"""Bytes of tables that lie in static shared memory, beside what one or two sets need; of more, the keys'
table goes to dynamic memory."""

_ALL_COPIES = 160 << 10
"""Shared memory of an SM from which on each lane has its own copy of a table; else two lanes share."""

_REGISTERS = 65536
"""Registers of an SM, of every GPU that Triton compiles for."""

_SHARED_REGISTERS = 128
"""Registers of a thread with which an SM runs 16 warps."""

MAX_PROGRAMS_PER_SM = 4
"""Programs of decode attention at most that an SM runs at once."""


@dataclass(frozen=True)
class Gpu:
    """What launches depend on.

    name: as in configs/, without spaces. capability: 90 for compute capability 9.0. shared_bytes: shared
    memory of an SM.
    """

    name: str
    capability: int
    num_sms: int
    shared_bytes: int

    @classmethod
    @cache
    def of(cls, device: torch.device) -> Gpu:
        """The GPU behind a device; an H200 where it is none, as under the interpreter."""
        if device.type != "cuda":
            return cls("NVIDIA_H200", 90, 132, 228 << 10)
        found = torch.cuda.get_device_properties(device)
        return cls(
            found.name.replace(" ", "_").replace("/", "_"),
            10 * found.major + found.minor,
            found.multi_processor_count,
            found.shared_memory_per_multiprocessor,
        )

    @property
    def table_copies(self) -> int:
        """How often a table lies in shared memory: 32 times, once a lane, where there is room, or 16."""
        return 32 if self.shared_bytes >= _ALL_COPIES else 16


def _load(name: str) -> dict[str, dict[str, Config]]:
    path = files("vllm_polarquant.kernels.triton") / "configs" / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


@cache
def config(op: str, slot: Slot, gpu: Gpu) -> Config:
    """Parameters of `op` for one slot on one GPU; see the module's docstring.

    Raises:
        KeyError: for an unknown op.
    """
    return resolve(op, slot, _load("default"), _load(f"sm{gpu.capability}"), _load(gpu.name))


def resolve(op: str, slot: Slot, *sources: dict[str, dict[str, Config]]) -> Config:
    """Merge the entries of `sources` that apply to a slot, later and more specific ones last."""
    dim = f"d{slot.head_dim}"
    merged: Config = {}
    for source in sources:
        for name in ("*", dim, slot.preset, f"{slot.preset}-{dim}"):
            merged.update(source.get(op, {}).get(name, {}))
    if not merged:
        raise KeyError(f"no launch parameters for {op!r}")
    return merged


@triton.constexpr_function
def table_layout(key_code, value_code, copies, sets, head_dim):
    """Where decode's tables lie in shared memory: the keys', the values', static and dynamic bytes.

    Static memory is for no more than 48 KB, some of which Triton's own operations take as dynamic memory: up
    to 16 KB where a program has eight sets, or two of head_dim 512. Its launcher asks the driver for more
    only where the dynamic part alone is more than that.
    """
    keys, values = (table_entries(code) * copies * 4 for code in (key_code, value_code))
    if value_code == key_code:
        values = 0
    first = 0 if value_code == key_code else keys
    if keys + values <= (_STATIC_TABLES if sets <= 2 and head_dim <= 256 else 0):
        return 0, first, keys + values, 0
    if keys + values <= 64 << 10:
        return DYNAMIC.value, DYNAMIC.value + first, 0, 64 << 10
    return DYNAMIC.value, 0, values, max(keys, 64 << 10)


@triton.constexpr_function
def registers_of_output(head_dim, warps):
    """Values x, then values y, that a lane holds of a query's output, padded for the exchange."""
    return max(triton.next_power_of_2(head_dim // 2) // 4, warps)


@dataclass(frozen=True)
class RowTiles:
    """How a request's rows, its queries' heads that share a KV head, are dealt to programs.

    sets: of four rows, that a program takes: 1, 2, 4 or 8. blocks: programs for all rows, each of which reads
    all pages.
    """

    sets: int
    blocks: int

    @classmethod
    def of(cls, slot: Slot, gpu: Gpu, num_heads: int, num_kv_heads: int, max_query_len: int) -> RowTiles:
        rows = max_query_len * (num_heads // num_kv_heads)
        most = config("decode", slot, gpu)["max_sets"]
        sets = min(most, triton.next_power_of_2(triton.cdiv(rows, 4)))
        return cls(sets, triton.cdiv(rows, 4 * sets))


@dataclass(frozen=True)
class DecodeLaunch:
    """Launch parameters of decode attention.

    warps: of a program. registers: that a thread may have. shared_tiles: tiles of eight queries whose
    operands lie in shared memory instead of registers. joined: whether values are multiplied over tokens, of
    two sets at once, or over (token, coordinate). programs_per_sm: that an SM runs at once.
    """

    warps: int
    registers: int
    shared_tiles: int
    joined: bool
    programs_per_sm: int

    @property
    def hold(self) -> bool:
        """Whether the next tile's loads are held where a tile begins (`lanes.hold_loads`).

        Few warps with many registers wait for memory otherwise; where 16 warps share an SM, the registers
        that it takes cost more.
        """
        return self.registers > _SHARED_REGISTERS

    @classmethod
    @cache
    def of(cls, slot: Slot, sets: int, gpu: Gpu) -> DecodeLaunch:
        """sets: of RowTiles."""
        chosen = config(f"decode_{4 * sets}", slot, gpu)
        warps, registers, shared_tiles = (chosen[name] for name in ("num_warps", "maxnreg", "shared_tiles"))
        codes = vector_code(slot.key), vector_code(slot.value)
        *_, static, dynamic = table_layout(*codes, gpu.table_copies, sets, slot.head_dim)
        if not dynamic:
            static = max(static, exchange_bytes(registers_of_output(slot.head_dim, warps), warps))
        static += words_bytes(shared_tiles, slot.head_dim // 8) + bonus_bytes(warps, sets)
        # CUDA keeps 1 KB of shared memory a program.
        fit = min(_REGISTERS // (32 * warps * registers), gpu.shared_bytes // (static + dynamic + 1024))
        joined = sets > 1 and bool(chosen["joined"])
        return cls(warps, registers, shared_tiles, joined, min(max(1, fit), MAX_PROGRAMS_PER_SM))
