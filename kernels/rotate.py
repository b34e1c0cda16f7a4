"""The codec's rotation of rows: of queries on their way in, of outputs on their way out."""

from __future__ import annotations

from typing import Protocol

import torch
import triton
import triton.language as tl

from vllm_polarquant.kernels.page import check, check_heads, dot

BLOCK_COLUMNS = 32
MANY_ROWS = 1 << 15
"""From as many rows on, programs take more of them."""


class RotationTables(Protocol):
    """What rotating reads of codec.Tables: rotation, float32 [d, d]."""

    @property
    def rotation(self) -> torch.Tensor: ...


def row_tile(num_rows: int) -> dict[str, int]:
    """Rows a program and its warps: few where they must fill the GPU, else many, as each reads all of R."""
    if num_rows >= MANY_ROWS:
        return {"BLOCK_ROWS": 64, "num_warps": 8}
    return {"BLOCK_ROWS": 16, "num_warps": 4}


@triton.jit
def rotated_columns(x, rotation, column, INVERSE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Some columns of x @ R.T, or of x @ R if INVERSE, float32: x 16-bit [rows, padded d], 0 past HEAD_DIM.

    A column at a time of the padded R would not fit beside x for head_dim 256, so callers loop.
    """
    k = tl.arange(0, x.shape[1])
    if INVERSE:
        entry = rotation + k[:, None] * HEAD_DIM + column[None, :]
    else:
        entry = rotation + column[None, :] * HEAD_DIM + k[:, None]
    inside = (k < HEAD_DIM)[:, None] & (column < HEAD_DIM)[None, :]
    part = tl.load(entry, mask=inside, other=0.0)
    if x.shape[1] == HEAD_DIM:
        # R is a multiple of a matrix of +-1 (or, for raw vectors, the identity): exact in 16 bits.
        sign = tl.where(part > 0, 1.0, tl.where(part < 0, -1.0, 0.0)).to(x.dtype)
        return dot(x, sign) * tl.abs(tl.load(rotation))
    else:
        # Three tf32 products are as exact as float32 and run on tensor cores.
        return tl.dot(x.to(tl.float32), part, input_precision="tf32x3")


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["num_tokens"])
def _rotate_kernel(
    x,
    x_stride_token,
    x_stride_head,
    out,
    out_stride_token,
    out_stride_head,
    rotation,
    num_rows,
    num_tokens,
    INVERSE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    if num_tokens is not None:
        num_rows = tl.minimum(num_rows, tl.load(num_tokens) * NUM_HEADS)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = (row // NUM_HEADS).to(tl.int64)
    head = row % NUM_HEADS
    dim = tl.arange(0, DIM_PAD)
    keep = (row < num_rows)[:, None]
    source = x + token * x_stride_token + head * x_stride_head
    tile = tl.load(source[:, None] + dim[None, :], mask=keep & (dim < HEAD_DIM)[None, :], other=0.0)
    target = out + token * out_stride_token + head * out_stride_head
    for start in tl.range(0, HEAD_DIM, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        turned = rotated_columns(tile, rotation, column, INVERSE, HEAD_DIM)
        tl.store(
            target[:, None] + column[None, :],
            turned.to(out.dtype.element_ty),
            mask=keep & (column < HEAD_DIM)[None, :],
        )


def rotate(
    x: torch.Tensor,
    out: torch.Tensor,
    tables: RotationTables,
    inverse: bool = False,
    query_start_loc: torch.Tensor | None = None,
) -> None:
    """Write x @ R.T to out, as queries need it to meet rotated keys, or x @ R if inverse.

    Args:
        x: bfloat16 or float16 [T, heads, d], last dim dense.
        out: like x, other memory or x itself.
        tables: codec.tables of the format.
        inverse: whether to turn back.
        query_start_loc: int32 [R + 1]; rows past query_start_loc[R] are then left alone.

    Raises:
        ValueError: for other shapes, dtypes or strides.
    """
    head_dim = tables.rotation.shape[0]
    check_heads("x", x, head_dim)
    check_heads("out", out, head_dim)
    check(
        x.shape == out.shape and x.dtype == out.dtype,
        f"out must be {x.dtype} {list(x.shape)}, got {out.dtype} {list(out.shape)}",
    )
    num_rows = x.shape[0] * x.shape[1]
    if not num_rows:
        return
    tile = row_tile(num_rows)
    _rotate_kernel[(triton.cdiv(num_rows, tile["BLOCK_ROWS"]),)](
        x,
        x.stride(0),
        x.stride(1),
        out,
        out.stride(0),
        out.stride(1),
        tables.rotation,
        num_rows,
        None if query_start_loc is None else query_start_loc[-1:],
        INVERSE=inverse,
        NUM_HEADS=x.shape[1],
        HEAD_DIM=head_dim,
        DIM_PAD=triton.next_power_of_2(head_dim),
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        num_stages=1,
        **tile,
    )
