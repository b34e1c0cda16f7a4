"""Compile decode attention for GPUs that are not here; run as a script, as the tests interpret Triton.

    python compile_decode.py '[[90, "polarquant_k4v4", 128, 1], ...]'

takes rows of (compute capability, preset, head_dim, sets of four queries) and prints, as JSON, the bytes of
static and of dynamic shared memory and the registers a thread of each.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_polarquant.format import PolarFormat
from vllm_polarquant.kernels import decode
from vllm_polarquant.kernels.page import page_constants

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
WARPS = 8
POINTERS = {
    "query": "*bf16", "out": "*bf16", "cache": "*u8", "block_table": "*i32", "seq_lens": "*i32",
    "query_start_loc": "*i32", "rotation": "*fp32", "key_lut": "*i32", "value_lut": "*i32",
    "partial_out": "*fp32", "partial_lse": "*fp32", "arrived": "*i32",
}  # fmt: skip
SCALARS = {"block_stride": "i64", "table_stride": "i32", "splits": "i32", "scale_log2": "fp32"}


def resources(compiled: triton.compiler.CompiledKernel) -> tuple[int, int, int]:
    """Static and dynamic shared memory in bytes, registers a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|SHARED):(\d+)", usage)}
    return found["SHARED"], compiled.metadata.shared, found["REG"]


def compile_one(capability: int, preset: str, head_dim: int, sets: int) -> tuple[int, int, int]:
    """Static and dynamic shared memory in bytes, registers a thread."""
    fmt = PolarFormat(preset, head_dim, 16)
    constants = {
        "NUM_HEADS": 8 * sets, "GROUP": 4 * sets, "MAX_SPLITS": decode.MAX_SPLITS, "ROW_BLOCKS": 1,
        "SETS": sets, "WARPS": WARPS, "ROTATE": head_dim & (head_dim - 1) == 0, **page_constants(fmt),
    }  # fmt: skip
    kernel = decode._split_kernel
    signature = {
        name: "constexpr" if name in constants else POINTERS.get(name) or SCALARS.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in POINTERS}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": WARPS})
    return resources(compiled)


if __name__ == "__main__":
    print(json.dumps([compile_one(*row) for row in json.loads(sys.argv[1])]))
