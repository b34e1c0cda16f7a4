"""Scenarios of engines on a GPU, as those of engine_runs.py, one or a few boots each.

Each takes seconds and little memory, so that a machine runs many side by side.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import engine_runs
import tiny_models
import torch
from engine_runs import (
    EXACT,
    MODEL,
    _ask,
    _centring,
    _completions,
    _counter,
    _drafted,
    _engine,
    _generate,
)
from safetensors.torch import save_file

CAPTURED: dict[str, Any] = {
    "enforce_eager": False,
    # Without torch.compile, so that both run the same operations.
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
}


def prompts() -> list[str]:
    """Of several lengths, from one token to thousands."""
    texts = engine_runs.text_prompts(6, 8000)
    return [
        "x",
        "def",
        *(text[:chars] for text, chars in zip(texts, (40, 300, 900, 2000, 4500, 8000), strict=True)),
    ]


def write_sinks(folder: Path) -> str:
    """A checkpoint of random weights with sinks, windows and a dense MLP, that vLLM loads and reloads."""
    tiny = tiny_models.MODELS["granite"].config | engine_runs.ATTENTIONS["granite"]["hf_overrides"]
    hidden, heads, kv_heads, dim = (
        tiny[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    seed = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int, gain: float = 1.4) -> torch.Tensor:
        return (gain * torch.randn(rows, columns, generator=seed) / columns**0.5).half()

    weights = {
        "model.embed_tokens.weight": matrix(tiny["vocab_size"], hidden, 8),
        "lm_head.weight": matrix(tiny["vocab_size"], hidden, 2),
        "model.norm.weight": torch.ones(hidden).half(),
    }
    for layer in range(tiny["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, shape in {
            "self_attn.q_proj": (heads * dim, hidden),
            "self_attn.k_proj": (kv_heads * dim, hidden),
            "self_attn.v_proj": (kv_heads * dim, hidden),
            "self_attn.o_proj": (hidden, heads * dim),
            "mlp.gate_proj": (tiny["intermediate_size"], hidden),
            "mlp.up_proj": (tiny["intermediate_size"], hidden),
            "mlp.down_proj": (hidden, tiny["intermediate_size"]),
        }.items():
            weights[f"{prefix}.{name}.weight"] = matrix(*shape)
        weights[f"{prefix}.self_attn.sinks"] = torch.randn(heads, generator=seed).half()
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}.{name}.weight"] = torch.ones(hidden).half()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(tiny))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(MODEL) / file, folder / file)
    return str(folder)


def sleep(dtype: str, model: str, captured: bool) -> dict[str, Any]:
    """Greedy tokens before sleep and after it, of level 1 and of level 2 with weights loaded again.

    model: "probe" or "sinks".
    """
    texts = engine_runs.text_prompts(8, 900)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"max_num_batched_tokens": 512}
        if model == "sinks":
            options |= {"model": write_sinks(Path(folder)), "max_model_len": 512}
        if captured:
            options |= CAPTURED
        with _engine(dtype, **EXACT, **options, enable_sleep_mode=True) as llm:

            def answers() -> dict[str, Any]:
                llm.reset_prefix_cache()
                fresh = _completions(_generate(llm, texts, max_tokens=48, ignore_eos=True))
                cached = _completions(_generate(llm, texts, max_tokens=48, ignore_eos=True))
                state = _centring(llm)
                return {"completions": fresh + cached, **{name: state[name] for name in ("tables", "sinks")}}

            found["before"] = answers()
            llm.sleep(level=1)
            llm.wake_up()
            found["level 1"] = answers()
            llm.sleep(level=2)
            llm.wake_up(tags=["weights"])
            llm.collective_rpc("reload_weights")
            llm.wake_up(tags=["kv_cache"])
            found["level 2"] = answers()
    return found


def graphs(dtype: str) -> dict[str, Any]:
    """Greedy tokens of requests of several lengths, decoded eagerly and by captured CUDA graphs."""
    found: dict[str, Any] = {}
    for name, options in (("eager", {}), ("captured", CAPTURED)):
        with _engine(dtype, **EXACT, **options) as llm:
            found[name] = _completions(_generate(llm, prompts(), max_tokens=96, ignore_eos=True))
    return found


def drafts(config: dict[str, Any], ways: list[list[str]], captured: bool) -> dict[str, Any]:
    """Greedy tokens while speculating, and how many drafts were taken.

    ways: dtypes of the target's cache and, if it has one of its own, of the draft's.
    """
    if config["method"] == "draft_model":
        config = config | {"model": MODEL}
    options = {"max_num_batched_tokens": 16384} | (CAPTURED if captured else {})
    found = []
    for dtype, draft_dtype in ways:
        mine = config | ({"kv_cache_dtype": draft_dtype} if draft_dtype else {})
        with _engine(dtype, **EXACT, **options, speculative_config=mine) as llm:
            found.append(_drafted(llm, prompts(), max_tokens=64, ignore_eos=True))
    return {"ways": found}


def tables(start: int) -> dict[str, Any]:
    """What the pass at start-up leaves, and answers; start: a number that tells two starts apart."""
    with _engine("polarquant_k4v4", max_num_batched_tokens=512) as llm:
        found = _centring(llm) | _ask(llm, 2000, 10)
        config = llm.llm_engine.vllm_config
        found["v2"] = config.use_v2_model_runner
    del found["centres"]
    return found | {"start": start}


def offloaded() -> dict[str, Any]:
    """Greedy tokens of the same prompts, computed and twice found in the memory that pages went to."""
    transfer = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 256 << 20},
    }
    texts = engine_runs.text_prompts(6, 2500)
    found: dict[str, Any] = {}
    for dtype in ("auto", "polarquant_lossless", "polarquant_k4v4"):
        mine = found[dtype] = {"completions": [], "hits": []}
        with _engine(dtype, **EXACT, kv_transfer_config=transfer) as llm:
            for _ in range(3):
                mine["completions"].append(
                    _completions(_generate(llm, texts, max_tokens=32, ignore_eos=True))
                )
                mine["hits"].append(_counter(llm, "external_prefix_cache_hits"))
                # Copies are made beside the steps.
                time.sleep(1)
                llm.reset_prefix_cache()
    return found
