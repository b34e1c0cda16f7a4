"""The codec's rotation of rows: of queries on their way in, of outputs on their way out."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_polarquant.kernels.triton.constants import INTERPRET, check, check_factors, check_heads

BLOCK_COLUMNS = 32
MANY_ROWS = 1 << 15
"""From as many rows on, programs take more of them."""

# The interpreter multiplies bfloat16 as if its bits were integers.
_UPCAST = tl.constexpr(INTERPRET)


def row_tile(num_rows: int) -> dict[str, int]:
    """Rows a program and its warps: few where they must fill the GPU, else many, as each reads the matrix."""
    if num_rows >= MANY_ROWS:
        return {"BLOCK_ROWS": 64, "num_warps": 8}
    return {"BLOCK_ROWS": 16, "num_warps": 4}


def is_hadamard(head_dim: int) -> bool:
    """Whether mixing is a Hadamard matrix, which decode attention applies by itself."""
    return head_dim & (head_dim - 1) == 0


@triton.jit
def dot(a, b):
    """The product in float32 of operands in a 16-bit type."""
    if _UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b)


@triton.jit
def mixed_columns(x, mixing, column, INVERSE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Some columns of x @ mixing.T, or of x @ mixing if INVERSE, float32.

    x: 16-bit [rows, padded d], 0 past HEAD_DIM. A column at a time of the padded matrix would not fit beside
    x for head_dim 256, so callers loop.
    """
    k = tl.arange(0, x.shape[1])
    if INVERSE:
        entry = mixing + k[:, None] * HEAD_DIM + column[None, :]
    else:
        entry = mixing + column[None, :] * HEAD_DIM + k[:, None]
    inside = (k < HEAD_DIM)[:, None] & (column < HEAD_DIM)[None, :]
    part = tl.load(entry, mask=inside, other=0.0)
    if x.shape[1] == HEAD_DIM:
        # A multiple of a matrix of +-1 (or, for raw vectors, the identity): exact in 16 bits.
        sign = tl.where(part > 0, 1.0, tl.where(part < 0, -1.0, 0.0)).to(x.dtype)
        return dot(x, sign) * tl.load(mixing)
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
    mixing,
    factors,
    factors_stride,
    num_rows,
    num_tokens,
    INVERSE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
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
    own = factors + head // GROUP * factors_stride
    inside = keep & (dim < HEAD_DIM)[None, :]
    tile = tl.load(source[:, None] + dim[None, :], mask=inside, other=0.0)
    if not INVERSE:
        factor = tl.load(own[:, None] + dim[None, :], mask=inside, other=0.0)
        tile = (tile.to(tl.float32) * factor).to(x.dtype.element_ty)
    target = out + token * out_stride_token + head * out_stride_head
    for start in tl.range(0, HEAD_DIM, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        stored = keep & (column < HEAD_DIM)[None, :]
        turned = mixed_columns(tile, mixing, column, INVERSE, HEAD_DIM)
        if INVERSE:
            turned *= tl.load(own[:, None] + column[None, :], mask=stored, other=0.0)
        tl.store(target[:, None] + column[None, :], turned.to(out.dtype.element_ty), mask=stored)


def rotate(
    x: torch.Tensor,
    out: torch.Tensor,
    mixing: torch.Tensor,
    factors: torch.Tensor,
    inverse: bool = False,
    query_start_loc: torch.Tensor | None = None,
) -> None:
    """Write (x * factors) @ mixing.T to out, or (x @ mixing) * factors if inverse; codec.Tables says of what.

    Args:
        x: bfloat16 or float16 [T, heads, d], last dim dense.
        out: like x, other memory or x itself.
        mixing: float32 [d, d].
        factors: float32 [1 or n, d], n a divisor of heads: of heads that share one, heads / n a row.
        inverse: whether to turn back.
        query_start_loc: int32 [R + 1]; rows past query_start_loc[R] are then left alone.

    Raises:
        ValueError: for other shapes, dtypes or strides.
    """
    head_dim = mixing.shape[0]
    check_heads("x", x, head_dim)
    check_heads("out", out, head_dim)
    check(
        x.shape == out.shape and x.dtype == out.dtype,
        f"out must be {x.dtype} {list(x.shape)}, got {out.dtype} {list(out.shape)}",
    )
    heads = x.shape[1]
    stride = check_factors("factors", factors, factors.shape[0], head_dim)
    check(heads % factors.shape[0] == 0, f"{heads} heads do not share {factors.shape[0]} factors evenly")
    num_rows = x.shape[0] * heads
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
        mixing,
        factors,
        stride,
        num_rows,
        None if query_start_loc is None else query_start_loc[-1:],
        INVERSE=inverse,
        NUM_HEADS=heads,
        GROUP=heads // factors.shape[0],
        HEAD_DIM=head_dim,
        DIM_PAD=triton.next_power_of_2(head_dim),
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        num_stages=1,
        **tile,
    )
