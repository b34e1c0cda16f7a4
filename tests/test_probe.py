"""The probe model's helpers, and the files shipped with it."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from vllm_polarquant.eval.probe import episodes as ep

CODE = [[f"    value_{i} = compute({i})\n" for i in range(40)]]

needs_model = pytest.mark.skipif(
    not (ep.MODEL_DIR / "model.safetensors").exists(), reason="the probe model is not in this tree"
)


def test_context_holds_every_pair_at_its_offset() -> None:
    context = ep.build_context(random.Random(3), CODE, 2000, 12)
    assert len(context.pairs) == len(context.offsets) == len(dict(context.pairs)) == 12
    assert context.text.startswith(ep.HEADER)
    for (key, value), offset in zip(context.pairs, context.offsets, strict=True):
        line = ep.pair_line(key, value)
        assert context.text[offset : offset + len(line)] == line
        assert context.text.count(line) == 1


def test_dense_context_is_only_pairs() -> None:
    context = ep.build_context(random.Random(4), [], 0, 5)
    assert context.text == ep.HEADER + "".join(ep.pair_line(*pair) for pair in context.pairs)


def test_evaluation_episode_asks_for_pairs_it_defines() -> None:
    episode = ep.evaluation_episode(random.Random(5), CODE, "x", 3000, 20, 5)
    table: dict[str, Any] = {}
    lines = [line for line in episode["prompt"].splitlines() if line.startswith("table['")]
    exec("\n".join(lines), {"table": table})
    assert table == dict(episode["pairs"])
    assert len(episode["queries"]) == 5
    for (prompt, answer, depth), query in zip(ep.episode_prompts(episode), episode["queries"], strict=True):
        assert prompt.endswith(f"assert table['{query['key']}'] == '")
        assert table[query["key"]] == answer
        assert 0 <= depth <= 1


def test_same_seed_same_episode() -> None:
    first, second = (ep.evaluation_episode(random.Random(9), CODE, "x", 1500, 9, 3) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("91bc'", True),
        ("91bc'\nassert", True),
        ("91bc", False),
        ("91bd'", False),
        (" 91bc'", False),
    ],
)
def test_score_answer(text: str, right: bool) -> None:
    assert ep.score_answer(text, "91bc") is right


@needs_model
def test_shipped_model_is_a_small_llama() -> None:
    config = json.loads((ep.MODEL_DIR / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["head_dim"] == 128
    assert config["num_attention_heads"] == 2 * config["num_key_value_heads"]
    assert config["max_position_embeddings"] >= 4096
    assert (ep.MODEL_DIR / "model.safetensors").stat().st_size <= 12_000_000


@needs_model
def test_shipped_tokenizer_is_exact_and_splits_hex_alike() -> None:
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(ep.MODEL_DIR / "tokenizer.json"))
    texts = [row["text"] for row in ep.load_heldout()] + ["naïve → 世界 🎉\r\n\tx\n", "  \n a"]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    rng = random.Random(0)
    for _ in range(300):
        key, value = ep.hex_strings(rng, 2, distinct=False)
        halves = [key[:2], key[2:]]
        stem = tokenizer.encode("x\n" + ep.query_stem(key)).tokens
        assert stem[-3:-1] == halves
        full = tokenizer.encode("x\n" + ep.query_line(key, value)).tokens
        assert full[: len(stem)] == stem
        assert full[len(stem) : len(stem) + 3] == [value[:2], value[2:], "'"]
        pair = tokenizer.encode("x\n" + ep.pair_line(key, value)).tokens
        assert [t for t in pair if t in halves][:2] == halves


@needs_model
def test_shipped_episodes_fit_the_model() -> None:
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(ep.MODEL_DIR / "tokenizer.json"))
    rows = ep.load_episodes()
    assert len({row["id"] for row in rows}) == len(rows) > 0
    for row in rows:
        pairs = dict(row["pairs"])
        assert len(pairs) == len(row["pairs"]) == len(row["depths"])
        assert len(tokenizer.encode(row["prompt"]).ids) == row["tokens"] <= 3800
        for query in row["queries"]:
            assert pairs[query["key"]] == query["answer"]


@needs_model
def test_heldout_text_names_its_source() -> None:
    rows = ep.load_heldout()
    assert rows
    for row in rows:
        assert row["source"].startswith("CPython 3.")
        assert row["licence"] == "PSF-2.0"
        assert row["text"].isascii()
