"""Dense attention of prefills in Triton, against plain float64."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DTYPES, attention_tolerance, on_gpu, relative_error

from vllm_polarquant.kernels.triton.dense import dense_attention

NAN = float("nan")


def exact(query, key, value, counts, lengths, scale, causal, left, soft_cap):
    """kernels.ops.DenseAttention in float64: outputs and log-sum-exps, 0 and -inf where nothing is seen."""
    group = query.shape[1] // key.shape[1]
    outs, lses = [], []
    parts = zip(query.split(counts), key.split(lengths), value.split(lengths), strict=True)
    for q, k, v in parts:
        k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
        logits = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
        if soft_cap is not None:
            logits = soft_cap * (logits / soft_cap).tanh()
        distance = torch.arange(len(k))[None, :] - torch.arange(len(k) - len(q), len(k))[:, None]
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if causal:
            hidden |= distance > 0
        if left is not None:
            hidden |= distance < -left
        logits = logits.masked_fill(hidden.to(logits.device), float("-inf"))
        lses.append(logits.logsumexp(-1))
        outs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1).nan_to_num(), v))
    return torch.cat(outs), torch.cat(lses, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("causal", "left", "soft_cap"),
    [(True, None, None), (False, None, 2.0), (True, 40, None), (False, 9, None)],
)
@pytest.mark.parametrize(
    ("head_dim", "counts", "lengths"),
    [
        (64, [70, 1, 3, 5], [70, 130, 33, 0]),
        (512, [65, 7], [66, 40]),
        on_gpu(512, [1000, 1, 300], [1000, 2000, 555]),
    ],
)
def test_dense_attention(head_dim, counts, lengths, causal, left, soft_cap, dtype, device):
    """Empty requests, one query, more keys than queries, tiles that end inside a request."""
    heads, group, tokens = 2, 2, sum(counts)
    # As vLLM passes them: views into the output of one projection, and room for a segment of a prefix.
    query = torch.randn(tokens, heads * group + 1, head_dim, device=device).to(dtype)[:, :-1]
    key, value = (torch.randn(sum(lengths), heads, head_dim, device=device).to(dtype) for _ in "kv")
    starts = [torch.tensor([0, *lens], device=device).cumsum(0).int() for lens in (counts, lengths)]
    out = torch.full_like(query, NAN)
    # FlashAttention's bounds may be too large.
    have, lse = dense_attention(
        query, key, value, starts[0], max(counts) + 1, starts[1], max(lengths) + 1, 0.1, causal, out, left,
        soft_cap,
    )  # fmt: skip
    want, want_lse = exact(query, key, value, counts, lengths, 0.1, causal, left, soft_cap)
    assert have is out
    assert relative_error(out, want) < attention_tolerance(dtype, device)
    torch.testing.assert_close(lse.double(), want_lse, atol=3e-3, rtol=1e-3)
    empty = (want_lse == float("-inf")).T
    assert (out[empty] == 0).all()


def test_dense_attention_names_what_is_wrong(device):
    x = torch.zeros(4, 2, 64, dtype=torch.float16, device=device)
    starts = torch.tensor([0, 4], dtype=torch.int32, device=device)
    good = dict(
        query=x, key=x, value=x, query_start_loc=starts, max_query_len=4, key_start_loc=starts, max_key_len=4,
        scale=1.0, causal=True,
    )  # fmt: skip
    for change, message in (
        (dict(query=x[..., :48]), "head_dim 48 is not a power of two"),
        (dict(query=x.float()), "query must be bfloat16 or float16"),
        (dict(value=x[:3]), "key and value must be torch.float16 and of one shape"),
        (dict(key=x.bfloat16()), "key and value must be torch.float16"),
        (dict(query=x.repeat(1, 2, 1)[:, :3]), "3 query heads do not share 2 KV heads"),
        (dict(key_start_loc=starts[:1]), r"key_start_loc must be torch.int32 \[2\]"),
        (dict(out=x[:3]), "out must be torch.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            dense_attention(**good | change)
