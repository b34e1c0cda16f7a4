"""The pass at start-up: its switch, its tokens, its request, what layers collect, and real engines."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch

pytest.importorskip("vllm")

from answers import centring_lines
from engine_runs import run
from vllm.v1.kv_cache_interface import (
    EncoderOnlyAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.worker.gpu.warmup import _reserved_block_count

from vllm_polarquant import reference, request, startup
from vllm_polarquant.attention import Attention
from vllm_polarquant.format import LOSSLESS, PRESETS, SEGMENT
from vllm_polarquant.kernels.ops import Batch
from vllm_polarquant.settings import Settings, option
from vllm_polarquant.startup import Sample, needs_pass, token_ids

PRESET = "polarquant_k4v4"


def config(
    cache_dtype: str = PRESET, additional: Any = None, draft_dtype: str | None = None, **hf: Any
) -> SimpleNamespace:
    """What the pass reads of a VllmConfig."""
    hf_config = SimpleNamespace(**hf)
    hf_config.to_dict = lambda: hf
    return SimpleNamespace(
        additional_config=additional or {},
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        speculative_config=SimpleNamespace(kv_cache_dtype=draft_dtype) if draft_dtype else None,
        model_config=SimpleNamespace(
            max_model_len=1000, get_vocab_size=lambda: 300, hf_config=hf_config, hf_text_config=hf_config
        ),
    )


@pytest.mark.parametrize(
    ("additional", "wanted"),
    [
        ({}, True),
        ({"another": {"centre_keys": False}}, True),
        ({"polarquant": {}}, True),
        ({"polarquant": {"centre_keys": True}}, True),
        ({"polarquant": {"centre_keys": False}}, False),
        ({"polarquant": {"prefill_from_pages": True}}, True),
        (json.loads(startup.OFF), False),
        (object(), True),
    ],
)
def test_the_switch(additional: Any, wanted: bool) -> None:
    assert Settings.of(additional).centre_keys is wanted
    assert needs_pass(config(additional=additional)) is wanted


@pytest.mark.parametrize(
    ("section", "part"),
    [
        ({"centre_keys": "false"}, "'false'"),
        ({"centre_keys": 0}, "true or false, got 0"),
        ({"centre_keys": None}, "None"),
        ({"center_keys": False}, "center_keys"),
        (False, "False"),
        (["centre_keys"], "centre_keys"),
        ({"prefill_from_pages": "yes"}, "prefill_from_pages must be true or false, got 'yes'"),
        ({"prefill_from_page": True}, "prefill_from_page'"),
    ],
)
def test_a_wrong_switch_is_refused(section: Any, part: str) -> None:
    with pytest.raises(ValueError, match="--additional-config: polarquant") as refusal:
        Settings.of({"polarquant": section})
    assert part in str(refusal.value)


def test_prefills_read_pages_only_if_asked() -> None:
    assert not Settings.of({}).prefill_from_pages
    assert Settings.of(json.loads(option("prefill_from_pages", True))) == Settings(True, True)


@pytest.mark.parametrize(
    ("dtype", "draft", "needed"),
    [
        *[(preset, None, True) for preset in PRESETS],
        ("auto", None, False),
        ("fp8", None, False),
        (LOSSLESS, None, False),
        ("auto", PRESET, True),
        ("auto", "auto", False),
    ],
)
def test_only_coded_keys_need_the_pass(dtype: str, draft: str | None, needed: bool) -> None:
    assert needs_pass(config(dtype, draft_dtype=draft)) is needed


def test_a_table_holds_the_longest_context() -> None:
    vllm_config = config()
    for tokens, segments in ((1, 1), (SEGMENT, 1), (SEGMENT + 1, 2), (131072, 512)):
        vllm_config.model_config.max_model_len = tokens
        assert startup.num_segments(vllm_config) == segments


def test_tokens_are_random_and_always_the_same() -> None:
    special = {"eos_token_id": [1, 2], "image_token_id": 7, "video_token_index": 8}
    found = token_ids(config(**special, bos_token_id=5), 2000)
    assert found == token_ids(config(**special, bos_token_id=5), 2000)
    assert found[0] == 5
    assert not {1, 2, 5, 7, 8} & set(found[1:])
    assert all(0 <= token < 300 for token in found)
    assert token_ids(config(), 9)[1:] == token_ids(config(bos_token_id=None), 9)[1:]


def test_tokens_are_as_frequent_as_a_texts() -> None:
    """Low ids come more often, but for those of single bytes, and runs of tokens come back."""
    vllm_config = config(bos_token_id=5)
    vllm_config.model_config.get_vocab_size = lambda: 64_000
    found = token_ids(vllm_config, 4000)
    assert len(found) == 4000 and found.count(5) == 1
    assert min(found[1:]) >= 255
    # Half of the draws are below the geometric mean of 256 and 64,000, a quarter below that of 256 and it.
    assert 0.44 < sum(token < 4048 for token in found) / 4000 < 0.56
    assert 0.19 < sum(token < 1018 for token in found) / 4000 < 0.31
    runs = [tuple(found[i : i + 8]) for i in range(len(found) - 7)]
    assert len(runs) - len(set(runs)) > 100


@pytest.mark.parametrize(("vocabulary", "special"), [(1, {}), (3, {"pad_token_id": [0, 1, 2]}), (300, {})])
def test_small_vocabularies_have_tokens_too(vocabulary: int, special: dict[str, Any]) -> None:
    vllm_config = config(bos_token_id=None, **special)
    vllm_config.model_config.get_vocab_size = lambda: vocabulary
    found = token_ids(vllm_config, 500)
    assert len(found) == 500 and set(found) <= set(range(vocabulary))
    assert len(set(found)) > 0.4 * vocabulary


def batch(before: int, tokens: int, decode: bool = False, requests: int = 1) -> Batch:
    starts = torch.tensor([0, tokens], dtype=torch.int32)
    return Batch(
        num_decodes=requests if decode else 0,
        num_decode_tokens=tokens if decode else 0,
        num_prefills=0 if decode else requests,
        num_tokens=tokens,
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([before + tokens], dtype=torch.int32),
        block_table=torch.zeros(1, 1, dtype=torch.int32),
        context_lens_cpu=torch.tensor([before], dtype=torch.int32),
    )


def power_of(query: torch.Tensor) -> torch.Tensor:
    """Of the queries [n, 4, d] of each of two kv heads."""
    return query.float().square().sum(0).view(2, 2, -1).sum(1)


@pytest.mark.parametrize("sizes", [[100], [40, 60], [1, 1, 98], [99, 1], [30, 80]])
def test_a_sample_collects_chunks_and_attends_exactly(sizes: list[int]) -> None:
    tokens, plain = sum(sizes), Attention(0.3, window=50)
    query, key, value = (torch.randn(tokens, heads, 64).bfloat16() for heads in (4, 2, 2))
    want = reference.dense_attention(query, key, value, torch.arange(tokens), plain).out
    finished: list[tuple[torch.Tensor, torch.Tensor]] = []
    sample = Sample(100, plain, lambda *given: finished.append(given))
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        # What leaves a gap, and a batch of several requests.
        assert not sample.attend(query, key, value, batch(start + 7, 1, decode=True), query)
        assert not sample.attend(query, key, value, batch(start, size, requests=2), query)
        out = torch.full((size + 3, 4, 64), torch.nan).bfloat16()
        padded = [
            torch.nn.functional.pad(x[rows], (0, 0, 0, 0, 0, 3), value=torch.nan) for x in (query, key, value)
        ]
        decode = size == 1
        written = sample.attend(*padded, batch(start, size, decode), out)
        # The kernels attend to a first chunk exactly.
        assert written is (start > 0 or decode)
        if written:
            torch.testing.assert_close(out[:size].double(), want[rows], rtol=2**-8, atol=1e-3)
            assert not out[size:].any()
        # What comes later in the same memory does not matter.
        padded[1].fill_(torch.nan)
        start += size
    ((keys, power),) = finished
    assert torch.equal(keys, key[:100])
    torch.testing.assert_close(power, power_of(query[:100]))
    assert sample.done
    assert not sample.attend(query, key, value, batch(start, 1, decode=True), query)


@pytest.mark.parametrize("sizes", [[100], [40, 60]])
def test_layers_without_keys_attend_to_those_of_another_exactly(sizes: list[int]) -> None:
    key, value = (torch.randn(100, 2, 64).bfloat16() for _ in range(2))
    queries = [torch.randn(100, 4, 64).bfloat16() for _ in range(3)]
    kinds = [Attention(0.3), Attention(0.2, window=30), Attention(0.3, soft_cap=5.0, sinks=torch.ones(4))]
    finished: list[tuple[torch.Tensor, torch.Tensor]] = []
    samples = [Sample(100, kinds[0], lambda *given: finished.append(given))]
    samples += [Sample(100, kind, lambda *given: pytest.fail("twice"), samples[0]) for kind in kinds[1:]]
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        assert not finished
        for sample, query, kind in zip(samples, queries, kinds, strict=True):
            out = torch.full((size, 4, 64), torch.nan).bfloat16()
            given = (key[rows], value[rows]) if sample is samples[0] else (None, None)
            written = sample.attend(query[rows], *given, batch(start, size), out)
            assert written is (start > 0 or sample is not samples[0])
            if written:
                want = reference.dense_attention(query, key, value, torch.arange(100), kind).out[rows]
                torch.testing.assert_close(out.double(), want, rtol=2**-8, atol=1e-3)
        start += size
    ((keys, power),) = finished
    assert torch.equal(keys, key)
    torch.testing.assert_close(power, sum(map(power_of, queries)))
    assert all(sample.done for sample in samples)


def test_a_draft_models_own_tokens_are_replaced_by_the_next_chunk() -> None:
    query, key, value = (torch.randn(60, heads, 64).bfloat16() for heads in (4, 2, 2))
    own = torch.randn(4, 2, 64).bfloat16()
    finished: list[tuple[torch.Tensor, torch.Tensor]] = []
    sample = Sample(50, Attention(0.3), lambda *given: finished.append(given))
    out = torch.empty(60, 4, 64).bfloat16()
    # A chunk of 30 and the sampled token, two more steps, and the next chunk.
    sample.attend(query[:31], torch.cat([key[:30], own[:1]]), value[:31], batch(0, 31), out[:31])
    for step in (1, 2):
        mine = slice(30 + step, 31 + step)
        sample.attend(query[mine], own[step : step + 1], value[mine], batch(30 + step, 1, True), out[mine])
    want = reference.dense_attention(query[30:60], key, value, torch.arange(30, 60), Attention(0.3)).out
    assert sample.attend(query[30:60], key[30:60], value[30:60], batch(30, 30), out[30:60])
    ((keys, power),) = finished
    assert torch.equal(keys, key[:50])
    torch.testing.assert_close(power, power_of(query[:50]))
    torch.testing.assert_close(out[30:60].double(), want, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize(
    ("batched", "scheduled", "lookahead", "slots", "chunk"),
    [
        (512, None, 0, 0, 512),
        (512, 512, 3, 4, 508),
        (512, 100, 3, 0, 100),
        (8, 8, 7, 7, 1),
        (1, None, 0, 0, 1),
    ],
)
def test_a_chunk_leaves_room_for_drafts(
    batched: int, scheduled: int | None, lookahead: int, slots: int, chunk: int
) -> None:
    vllm_config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=batched, max_num_scheduled_tokens=scheduled),
        speculative_config=SimpleNamespace(max_num_new_slots_for_drafting=slots) if slots else None,
        num_lookahead_tokens=lookahead,
    )
    assert request._chunk(vllm_config) == chunk


def test_blocks_are_those_that_vllm_would_give() -> None:
    attention = {"num_kv_heads": 1, "head_size": 64, "dtype": torch.uint8}
    state = {"shapes": ((1,),), "dtypes": (torch.float32,), "page_size_padded": None}
    full = FullAttentionSpec(block_size=16, **attention)
    specs = [
        full,
        SlidingWindowSpec(block_size=32, sliding_window=64, **attention),
        UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": full}),
        MambaSpec(block_size=4096, **state),
        MambaSpec(block_size=64, mamba_cache_mode="align", num_speculative_blocks=2, **state),
        MambaSpec(block_size=64, mamba_cache_mode="all", **state),
    ]
    for spec in specs:
        for tokens in (1, 16, 500, 512):
            want = _reserved_block_count(
                tokens, spec, num_lookahead_tokens=3, max_model_len=514, max_encoder_len=0
            )
            assert request._count(spec, tokens, 3, 514) == want
    assert request._count(EncoderOnlyAttentionSpec(block_size=16, **attention), 512, 0, 4096) == 0


def worker_with(max_model_len: int, num_blocks: int, groups: int = 1, lookahead: int = 0) -> SimpleNamespace:
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=64, dtype=torch.uint8)
    return SimpleNamespace(
        vllm_config=SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=max_model_len), num_lookahead_tokens=lookahead
        ),
        model_runner=SimpleNamespace(
            kv_cache_config=SimpleNamespace(
                num_blocks=num_blocks, kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)] * groups
            )
        ),
    )


@pytest.mark.parametrize(
    ("worker", "room"),
    [
        (worker_with(4096, 1000), 512),
        (worker_with(100, 1000), 99),
        (worker_with(100, 1000, lookahead=3), 96),
        (worker_with(4096, 33), 512),
        (worker_with(4096, 32), 256),
        (worker_with(4096, 33, groups=2), 256),
        (worker_with(4096, 2), 16),
        (worker_with(1, 1000), 0),
        (worker_with(4096, 1), 0),
    ],
)
def test_a_request_is_as_long_as_there_is_room(worker: Any, room: int) -> None:
    assert request.room(worker, 512) == room


def test_a_model_of_encoders_alone_has_no_room() -> None:
    worker = worker_with(4096, 1000)
    worker.vllm_config.is_mm_encoder_only = True
    assert request.room(worker, 512) == 0


class Rotary(torch.nn.Module):
    def __init__(self, base: float, is_neox_style: bool = True) -> None:
        super().__init__()
        angle = torch.arange(600.0)[:, None] * base ** -torch.linspace(0, 1, 8)
        self.register_buffer("cos_sin_cache", torch.cat([angle.cos(), angle.sin()], -1))
        self.is_neox_style = is_neox_style


class LongRotary(torch.nn.Module):
    """Phi-3's."""

    def __init__(self, use_long_rope: bool) -> None:
        super().__init__()
        self.use_long_rope, self.original_max_position_embeddings = use_long_rope, 100
        self.register_buffer("long_short_cos_sin_cache", torch.arange(300.0)[:, None] * torch.ones(1, 16))


def block(**parts: torch.nn.Module | None) -> torch.nn.Module:
    module = torch.nn.Module()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def test_ropes_are_looked_for_beside_the_layer_then_around_it_then_everywhere() -> None:
    layers = [torch.nn.Identity() for _ in range(5)]
    beside, around, other = Rotary(1e4), Rotary(1e5, is_neox_style=False), LongRotary(True)
    first = block(self_attn=block(attn=layers[0], rotary_emb=beside))
    second = block(self_attn=block(attn=layers[1], rotary_emb=None), rotary=around)
    both = block(self_attn=block(attn=layers[2], rotary_emb=beside, rotary_local=around))
    model = block(layers=torch.nn.ModuleList([first, second, both]), elsewhere=block(rope=other))
    draft = block(attn=layers[3])
    worker = SimpleNamespace(
        model_runner=SimpleNamespace(get_model=lambda: model, get_draft_model=lambda: draft)
    )
    ropes = startup._Ropes(worker, 2)
    assert [rope.cos_sin is beside.cos_sin_cache for rope in ropes.of(layers[0])] == [True]
    (found,) = ropes.of(layers[1])
    assert found.cos_sin is around.cos_sin_cache
    assert found.pairs[:, 1].tolist() == [2, 3]
    assert ropes.of(layers[0])[0].pairs[:, 1].tolist() == [1, 9]
    assert len(ropes.of(layers[2])) == 2
    # Of one that is in no model, such as a draft's that has none, all are tried.
    assert len(ropes.of(layers[3])) == len(ropes.of(layers[4])) == 3
    assert ropes.of(layers[0])[0] is ropes.of(layers[2])[0]


@pytest.mark.parametrize(("use_long_rope", "first"), [(False, 0), (True, 100)])
def test_phi3_has_two_tables(use_long_rope: bool, first: int) -> None:
    table = startup._cos_sin(LongRotary(use_long_rope))
    assert table is not None
    assert table[0, 0] == first
    assert len(table) == (200 if use_long_rope else 100)


@pytest.fixture(scope="module")
def centred() -> dict[str, Any]:
    return run("centred")


@pytest.mark.slow
def test_two_starts_give_the_same_tables(centred: dict[str, Any]) -> None:
    first, second = centred["first"], centred["together"]
    assert first["tables"] == second["tables"]
    assert first["centred"] == second["centred"] == 5
    one = centring_lines(centred["log"])[0]
    assert one[:2] == ("5", "512")
    assert one[4] == first["tables"]
    assert float(one[2]) < 10
    assert 20 < float(one[3]) < 100
    assert not one[5]


@pytest.mark.slow
def test_the_pass_leaves_no_request_behind(centred: dict[str, Any]) -> None:
    for name in ("first", "chunks", "short", "together"):
        assert centred[name]["requests"] == 0
        assert centred[name]["samples"] == 0


@pytest.mark.slow
def test_small_batches_and_contexts_are_centred_too(centred: dict[str, Any]) -> None:
    assert centred["chunks"]["centred"] == 5
    # The same sample in chunks of 96 tokens, but for the rounding of other matrix sizes.
    assert centred["chunks"]["difference"] < 0.02
    assert centred["short"]["centred"] == 5
    assert centred["short"]["difference"] < 0.5
    passed = [line[1] for line in centring_lines(centred["log"])]
    assert passed[1:3] == ["512", "99"]


@pytest.mark.slow
def test_two_engines_at_once_have_tables_of_their_own(centred: dict[str, Any]) -> None:
    # k2v2's keys are scaled and centred alike, as the pass does not go through codes.
    assert centred["together"]["apart"] == centred["first"]["tables"]
    assert all(centred["together"]["right"])


@pytest.mark.slow
def test_the_switch_leaves_keys_as_they_are(centred: dict[str, Any]) -> None:
    assert centred["off"] == {"reached": 0, "centred": 0, "own tables": 0, "requests": 0}
    assert len(centring_lines(centred["log"].split("engine off")[1])) == 0
    assert "--additional-config: polarquant.centre_keys must be true or false, got 'no'" in centred["wrong"]


LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 1024,
    "vocab_size": 256,
    "torch_dtype": "bfloat16",
}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "experts": (
        LLAMA
        | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        {},
    ),
    "neighbours": (
        LLAMA | {"architectures": ["GlmForCausalLM"], "model_type": "glm", "pad_token_id": 0},
        {},
    ),
    "without rope": (
        {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_embd": 128,
            "n_head": 2,
            "n_layer": 2,
            "n_positions": 1024,
            "vocab_size": 256,
            "torch_dtype": "bfloat16",
        },
        {},
    ),
    "sinks": (tiny_models.MODELS["gpt-oss"].config, {}),
    "shared caches": (tiny_models.MODELS["gemma3n"].config, {}),
    "pooling": (LLAMA, {"runner": "pooling", "convert": "embed"}),
    "skipped": (LLAMA, {"kv_cache_dtype_skip_layers": ["0"]}),
    "hybrid": (
        LLAMA
        | {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "linear_conv_kernel_dim": 4,
            "partial_rotary_factor": 0.25,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        },
        {},
    ),
}
"""Tiny models by what is special in them, and options of their engines."""


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    models = tmp_path_factory.mktemp("models")
    for name, (model, options) in KINDS.items():
        folder = models / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(model))
        (folder / "options").write_text(json.dumps(options))
    return run("kinds", MODELS=str(models))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_the_pass_reaches_every_layer(kinds: dict[str, Any], name: str) -> None:
    assert kinds[name]["error"] is None
    assert kinds[name]["reached"] == kinds[name]["layers"] > 0
    assert kinds[name]["requests"] == kinds[name]["samples"] == 0


@pytest.mark.slow
def test_shared_caches_are_read_with_the_tables_they_were_written_with(kinds: dict[str, Any]) -> None:
    found = kinds["shared caches"]
    assert (found["layers"], found["shared"]) == (6, 2)
    # Those two have no keys of their own to be centred.
    assert any(line[0] == "4" for line in centring_lines(kinds["log"]))


@pytest.mark.slow
def test_sinks_are_those_of_the_weights(kinds: dict[str, Any]) -> None:
    assert kinds["sinks"]["sinks"] == kinds["sinks"]["layers"] == 4
