"""The dense attention that kernels take on a GPU: vLLM's FlashAttention, or Triton's past its head_dims."""

from __future__ import annotations

import torch

from vllm_polarquant.kernels.ops import DenseAttention

FLASH_HEAD_DIM = 256
"""The largest head_dim of FlashAttention 2 and 3. Version 4 takes 512, on Hopper alone."""


def flash_attention(head_dim: int) -> DenseAttention:
    """FlashAttention of the version that vLLM picks for a head_dim; see kernels.ops.DenseAttention.

    Past FLASH_HEAD_DIM it is the Triton kernel of kernels/triton/dense.py, on every GPU.
    """
    if head_dim > FLASH_HEAD_DIM:
        from vllm_polarquant.kernels.triton.dense import dense_attention

        return dense_attention
    from vllm.v1.attention.backends.fa_utils import (
        flash_attn_varlen_func,
        get_flash_attn_version,
        is_fa_version_supported,
    )

    version = get_flash_attn_version(head_size=head_dim)
    if version == 4 and is_fa_version_supported(3):
        # On Hopper vLLM sets 4, which compiles its kernels while it serves, for all of Gemma 4's layers.
        version = 3

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_start_loc: torch.Tensor,
        max_query_len: int,
        key_start_loc: torch.Tensor,
        max_key_len: int,
        scale: float,
        causal: bool,
        out: torch.Tensor | None = None,
        left: int | None = None,
        soft_cap: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attended: tuple[torch.Tensor, torch.Tensor] = flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            max_seqlen_q=max_query_len,
            cu_seqlens_q=query_start_loc,
            max_seqlen_k=max_key_len,
            cu_seqlens_k=key_start_loc,
            softmax_scale=scale,
            causal=causal,
            window_size=None if left is None else [left, 0 if causal else -1],
            softcap=soft_cap or 0.0,
            return_softmax_lse=True,
            out=out,
            fa_version=version,
        )
        return attended

    return attend
