"""Compile kernels for GPUs that are not here; run as a script, as the tests interpret Triton.

    python compile_kernels.py '[[90, "polarquant_k4v4", 128, 1], ...]'

takes rows of (compute capability, preset, head_dim, sets of four queries; 0 for the store kernel with few
tokens, -1 with many, -2 for gathering a prefix; 10 more for sets with a window, a soft cap, sinks and
log-sum-exps, 20 more with centred keys, 30 more with all of these) and prints, as JSON, the bytes of static
and of dynamic shared memory, the registers a thread and how many programs an H200 would run on a
multiprocessor at once, of each.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_polarquant.format import Slot
from vllm_polarquant.kernels.triton import decode, gather, store
from vllm_polarquant.kernels.triton.constants import page_constants
from vllm_polarquant.kernels.triton.launch import DecodeLaunch, Gpu, config
from vllm_polarquant.kernels.triton.rotate import is_hadamard
from vllm_polarquant.kernels.triton.search import scratch_words
from vllm_polarquant.page import Page

H200 = Gpu.of(torch.device("cpu"))
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS = {
    "query": "*bf16", "out": "*bf16", "cache": "*u8", "block_table": "*i32", "seq_lens": "*i32",
    "query_start_loc": "*i32", "starts": "*i32", "sinks": "*fp32", "lse": "*fp32", "mixing": "*fp32",
    "query_factors": "*fp32", "output_factors": "*fp32", "key_factors": "*fp32", "value_factors": "*fp32",
    "key_lut": "*i32", "value_lut": "*i32", "partial_out": "*fp32", "partial_lse": "*fp32", "arrived": "*i32",
    "key": "*bf16", "value": "*bf16", "slot_mapping": "*i64", "key_cells": "*i32", "value_cells": "*i32",
    "scratch": "*i32", "begin_words": "*i32", "items": "*i32", "centres": "*i32", "segments": "*i32",
    "lengths_cu": "*i32", "key_out": "*bf16", "value_out": "*bf16",
}  # fmt: skip
SCALARS = {"block_stride": "i64", "table_stride": "i32", "scale_log2": "fp32"}

Kernel = tuple[Any, dict[str, Any], dict[str, Any]]


def decode_kernel(capability: int, page: Page, sets: int, plain: bool, centred: bool) -> Kernel:
    """The kernel of decode attention, its constants and its launch options."""
    launch = DecodeLaunch.of(page.slot, sets, H200)
    constants: dict[str, Any] = {
        "GROUP": 4 * sets, "MAX_SPLITS": decode.MAX_SPLITS, "ITEM_WORDS": decode.ITEM_WORDS,
        "SETS": sets, "SHARED_TILES": launch.shared_tiles, "JOINED": launch.joined, "HOLD": launch.hold,
        "WARPS": launch.warps, "COPIES": 32 if capability in (80, 90) else 16,
        "ROTATE": is_hadamard(page.slot.head_dim), "CENTRES_PER_SEGMENT": 8 if centred else 0,
        "SOFT_CAP": None if plain else 50.0, "PAGE": page_constants(page),
    }  # fmt: skip
    if plain:
        constants |= {"window": None, "sinks": None, "lse": None}
    return decode._decode_kernel, constants, {"num_warps": launch.warps, "maxnreg": launch.registers}


def gather_kernel(page: Page) -> Kernel:
    """The kernel of gather_prefix, its constants and its launch options."""
    launch = config("gather", page.slot, H200)
    constants = {
        "CHUNKS": launch["chunks"], "WARPS": launch["num_warps"], "CENTRES_PER_SEGMENT": 8,
        "PAGE": page_constants(page),
    }  # fmt: skip
    return gather._gather_kernel, constants, {"num_warps": launch["num_warps"]}


def store_kernel(page: Page, op: str) -> Kernel:
    """The kernel of store_kv, its constants and its launch options; op: store or store_few."""
    launch = config(op, page.slot, H200)
    constants = {
        "NUM_HEADS": 8, "KEY_FACTORS_PER_HEAD": True, "CENTRES_PER_SEGMENT": 8,
        "BLOCK_VECTORS": launch["block_vectors"],
        "BLOCK_K": launch["block_k"], "PARALLEL_STATES": launch["parallel_states"],
        "SCRATCH_WORDS": scratch_words(page.slot, launch["block_vectors"], launch["parallel_states"]),
        "PAGE": page_constants(page),
    }  # fmt: skip
    options = {name: launch[name] for name in ("num_warps", "num_stages", "maxnreg")}
    return store._store_kernel, constants, options


def compile_one(capability: int, preset: str, head_dim: int, which: int) -> tuple[int, int, int, int]:
    """Static and dynamic shared memory in bytes, registers a thread, programs together on an H200."""
    page = Page(Slot(preset, head_dim), 16)
    sets = which % 10
    if which > 0:
        plain, centred = which // 10 in (0, 2), which > 20
        kernel, constants, options = decode_kernel(capability, page, sets, plain, centred)
    elif which == -2:
        kernel, constants, options = gather_kernel(page)
    else:
        kernel, constants, options = store_kernel(page, "store" if which else "store_few")
    signature = {
        name: "constexpr" if name in constants else POINTERS.get(name) or SCALARS.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in POINTERS}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, GPUTarget("cuda", capability, 32), options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|SHARED):(\d+)", usage)}
    together = DecodeLaunch.of(page.slot, sets, H200).programs_per_sm if which > 0 else 1
    return found["SHARED"], compiled.metadata.shared, found["REG"], together


if __name__ == "__main__":
    print(json.dumps([compile_one(*row) for row in json.loads(sys.argv[1])]))
