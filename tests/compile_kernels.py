"""Compile kernels for GPUs that are not here; run as a script, as the tests interpret Triton.

    python compile_kernels.py '[[90, "polarquant_k4v4", 128, 1], ...]'

takes rows of (compute capability, preset, head_dim, sets of four queries; 0 for the store kernel with few
tokens, -1 with many) and prints, as JSON, the bytes of static and of dynamic shared memory, the registers a
thread and how many programs an H200 would run on a multiprocessor at once, of each.
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

from vllm_polarquant.format import PolarFormat
from vllm_polarquant.kernels import decode, store, tuning
from vllm_polarquant.kernels.page import page_constants

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS = {
    "query": "*bf16", "out": "*bf16", "cache": "*u8", "block_table": "*i32", "seq_lens": "*i32",
    "query_start_loc": "*i32", "rotation": "*fp32", "key_lut": "*i32", "value_lut": "*i32",
    "partial_out": "*fp32", "partial_lse": "*fp32", "arrived": "*i32", "key": "*bf16", "value": "*bf16",
    "slot_mapping": "*i64", "key_cells": "*i32", "value_cells": "*i32", "scratch": "*i32",
    "begin_words": "*i32", "items": "*i32",
}  # fmt: skip
SCALARS = {"block_stride": "i64", "table_stride": "i32", "scale_log2": "fp32"}


def launch_of(fmt: PolarFormat, sets: int) -> Any:
    """How decode attention would be launched on an H200, where it is no GPU."""
    return decode._Launch.of(fmt, decode._Rows(sets, 1), torch.device("cpu"))


def decode_kernel(capability: int, fmt: PolarFormat, sets: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The kernel of decode attention, its constants and its launch options."""
    head_dim = fmt.head_dim
    launch = launch_of(fmt, sets)
    constants = {
        "NUM_HEADS": 8 * sets, "GROUP": 4 * sets, "MAX_PARTS": decode.MAX_PARTS,
        "ITEM_WORDS": decode.ITEM_WORDS, "ROW_BLOCKS": 1,
        "SETS": sets, "WARPS": launch.warps, "COPIES": 32 if capability in (80, 90) else 16,
        "ROTATE": head_dim & (head_dim - 1) == 0, **page_constants(fmt),
    }  # fmt: skip
    return decode._decode_kernel, constants, {"num_warps": launch.warps, "maxnreg": launch.registers}


def store_kernel(fmt: PolarFormat, op: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The kernel of store_kv, its constants and its launch options; op: store or store_few."""
    config = tuning.config(op, fmt, torch.device("cpu"))
    constants = {
        "NUM_HEADS": 8, "KEY_GAIN": fmt.key.gain, "VALUE_GAIN": fmt.value.gain,
        "BLOCK_VECTORS": config["block_vectors"], "BLOCK_K": config["block_k"],
        "PARALLEL_STATES": config["parallel_states"],
        "SCRATCH_WORDS": store.scratch_words(fmt, config["block_vectors"], config["parallel_states"]),
        **page_constants(fmt),
    }  # fmt: skip
    return store._store_kernel, constants, {"num_warps": config["num_warps"], "maxnreg": config["maxnreg"]}


def compile_one(capability: int, preset: str, head_dim: int, sets: int) -> tuple[int, int, int, int]:
    """Static and dynamic shared memory in bytes, registers a thread, programs together on an H200."""
    fmt = PolarFormat(preset, head_dim, 16)
    if sets > 0:
        kernel, constants, options = decode_kernel(capability, fmt, sets)
    else:
        kernel, constants, options = store_kernel(fmt, "store" if sets else "store_few")
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
    together = launch_of(fmt, sets).together if sets > 0 else 1
    return found["SHARED"], compiled.metadata.shared, found["REG"], together


if __name__ == "__main__":
    print(json.dumps([compile_one(*row) for row in json.loads(sys.argv[1])]))
