"""Compile the store kernel for GPUs that are not here; run as a script, as the tests interpret Triton.

    python compile_store.py '[[90, "polarquant_k4v4", 128, "store"], ...]'

takes rows of (compute capability, preset, head_dim, the configuration's name) and prints, as JSON, the bytes
of static and of dynamic shared memory and the registers a thread of each.
"""

from __future__ import annotations

import json
import sys

import torch
import triton
from compile_decode import resources
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_polarquant.format import PolarFormat
from vllm_polarquant.kernels import store, tuning
from vllm_polarquant.kernels.page import page_constants

POINTERS = {
    "key": "*bf16", "value": "*bf16", "cache": "*u8", "slot_mapping": "*i64", "rotation": "*fp32",
    "key_lut": "*i32", "value_lut": "*i32", "key_cells": "*i32", "value_cells": "*i32",
}  # fmt: skip


def compile_one(capability: int, preset: str, head_dim: int, op: str) -> tuple[int, int, int]:
    """Static and dynamic shared memory in bytes, registers a thread."""
    fmt = PolarFormat(preset, head_dim, 16)
    # Of no device that has its own file.
    config = tuning.config(op, fmt, torch.device("cpu"))
    kernel = store._store_kernel
    constants = {
        "NUM_HEADS": 8, "KEY_GAIN": fmt.key.gain, "VALUE_GAIN": fmt.value.gain, "scratch": None,
        "BLOCK_VECTORS": config["block_vectors"], "BLOCK_K": config["block_k"],
        **store._search_constants(fmt, config["block_vectors"]), **page_constants(fmt),
    }  # fmt: skip
    signature = {
        name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in kernel.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in POINTERS}
    options = {name: config[name] for name in ("num_warps", "num_stages", "maxnreg")}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned), GPUTarget("cuda", capability, 32), options
    )
    return resources(compiled)


if __name__ == "__main__":
    print(json.dumps([compile_one(*row) for row in json.loads(sys.argv[1])]))
