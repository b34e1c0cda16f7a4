"""The plan by which cached prefixes go through a workspace of fixed size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_polarquant.kernels.triton.prefix import plan_prefixes, reads_like_decodes

CPU = torch.device("cpu")


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 9)), min_size=1, max_size=9),
    decode_tokens=st.integers(0, 5),
    capacity=st.integers(1, 40),
)
def test_every_prefix_token_is_unpacked_once(
    requests: list[tuple[int, int]], decode_tokens: int, capacity: int
) -> None:
    contexts, queries = (np.array(column, np.int32) for column in zip(*requests, strict=True))
    starts = decode_tokens + np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    plan = plan_prefixes(starts, contexts, capacity, CPU)
    assert plan.query_start_loc.tolist() == (starts - decode_tokens).tolist()
    assert plan.max_query_len == queries.max()

    seen: list[list[int]] = [[] for _ in requests]
    for segment in plan.segments:
        assert 0 < segment.tokens <= capacity
        lens = segment.key_start_loc.diff().tolist()
        assert segment.key_start_loc[0] == 0
        assert len(lens) == len(segment.start) == segment.last - segment.first
        assert sum(lens) == segment.tokens
        assert max(lens) == segment.max_key_len
        mine = slice(segment.first, segment.last)
        assert segment.query_start_loc.diff().tolist() == queries[mine].tolist()
        assert segment.max_query_len == queries[mine].max()
        own = starts[segment.first] - decode_tokens, starts[segment.last] - decode_tokens
        assert (segment.rows.start, segment.rows.stop) == own
        for request, start, length in zip(
            range(segment.first, segment.last), segment.start.tolist(), lens, strict=True
        ):
            assert length > 0 or contexts[request] == 0
            seen[request] += range(start, start + length)
    assert seen == [list(range(context)) for context in contexts]


@pytest.mark.parametrize("contexts", [[0], [0, 0, 0]])
def test_first_chunks_have_no_segments(contexts: list[int]) -> None:
    starts = np.arange(len(contexts) + 1, dtype=np.int32) * 4
    assert plan_prefixes(starts, np.array(contexts, np.int32), 8, CPU).segments == ()


@pytest.mark.parametrize(
    ("starts", "contexts", "expected"),
    [
        ([5, 21, 22], [100, 1], True),
        ([0, 16], [1], True),
        ([0, 17], [100], False),
        ([0, 3, 6], [100, 0], False),
        ([7, 23, 39, 55], [9, 9, 9], False),
    ],
)
def test_few_tokens_after_prefixes_are_read_like_decodes(
    starts: list[int], contexts: list[int], expected: bool
) -> None:
    assert reads_like_decodes(np.array(starts), np.array(contexts), 16, 40) is expected


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 40)), min_size=1, max_size=4),
    capacity=st.integers(1, 40),
    window=st.integers(1, 80),
)
def test_every_query_sees_its_window_of_the_prefix_once(
    requests: list[tuple[int, int]], capacity: int, window: int
) -> None:
    contexts, queries = (np.array(column, np.int32) for column in zip(*requests, strict=True))
    starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    plan = plan_prefixes(starts, contexts, capacity, CPU, window)
    assert plan.context_lens.tolist() == contexts.tolist()
    seen: list[list[int]] = [[] for _ in range(int(starts[-1]))]
    for segment in plan.segments:
        assert segment.last == segment.first + 1
        count, tokens = segment.max_query_len, segment.tokens
        assert segment.query_start_loc.tolist() == [0, count]
        assert segment.key_start_loc.tolist() == [0, tokens]
        assert segment.max_key_len == tokens <= capacity
        assert segment.left is None or count <= tokens
        assert int(starts[segment.first]) <= segment.rows.start
        assert segment.rows.stop - segment.rows.start == count
        for i, row in enumerate(range(segment.rows.start, segment.rows.stop)):
            first = 0 if segment.left is None else max(i + tokens - count - segment.left, 0)
            start = int(segment.start[0])
            seen[row] += range(start + first, start + tokens)
    want = [
        list(range(max(context + i - window + 1, 0), context))
        for context, count in requests
        for i in range(count)
    ]
    assert seen == want
