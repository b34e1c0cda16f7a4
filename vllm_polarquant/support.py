"""Every rule of what is refused and the way out, written once.

backend.py and layer.py raise by them with what vLLM knows of a layer, `polarquant check` with what it knows
of a model, and README's and docs/troubleshooting.md's tables are printed from them. A rule leaves this file
when what it refuses has come to work. Imports neither vLLM nor torch: what comes from vLLM is only read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_polarquant.format import HEAD_DIMS, Slot, UnsupportedFormat, is_polar_dtype
from vllm_polarquant.page import BLOCK_SIZE_MULTIPLE, Page

AUTO = "serve the model with --kv-cache-dtype auto"

DTYPES = ("bfloat16", "float16")
MIN_CAPABILITY = (8, 0)
CONNECTOR, PEER_CONNECTOR, MULTI_CONNECTOR = "OffloadingConnector", "NixlConnector", "MultiConnector"
PEER_OPTIONS = {"enforce_handshake_compat": True, "bidirectional_kv_xfer": False}
"""Of its extra config what has one value alone: peers are to compare what their bytes mean."""

OFFLOAD_SPECS, FILE_TIER = ("CPUOffloadingSpec", "TieringOffloadingSpec"), "fs"

Config = Mapping[str, Any]
TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")


@dataclass(frozen=True)
class Rule:
    """One thing that is refused.

    feature: a short name.
    what: the object of "does not support", with {named} values where the refusal has any.
    way_out: what to do instead, as an imperative.
    models: families that have it, for tables; empty for what a user sets.
    selector: the field of vLLM's AttentionSelectorConfig that is true.
    layer: the constructor argument of vLLM's AttentionImpl that is set.
    config: whether config.json shows it, from the language model's part and the whole.
    options: engine arguments that are the way out, where that keeps the dtype.
    """

    feature: str
    what: str
    way_out: str = AUTO
    models: str = ""
    selector: str = ""
    layer: str = ""
    config: Callable[[Config, Config], object] | None = field(default=None, compare=False)
    options: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Hit:
    """A rule with the values it was hit by."""

    rule: Rule
    values: Mapping[str, object] = field(default_factory=dict, hash=False)
    way_out: str = ""
    """Where the rule's own can be said more closely."""

    def sentence(self, preset: str) -> str:
        """As the engine and `polarquant check` say it."""
        what = self.rule.what.format(**self.values)
        return f"--kv-cache-dtype {preset} does not support {what}; {self.way_out or self.rule.way_out}."


class Refused(ValueError):
    """One sentence with the dtype's name, the feature and the way out."""

    def __init__(self, message: str, hit: Hit | None = None) -> None:
        super().__init__(message)
        self.hit = hit


def text_config(config: Config) -> Config:
    """The language model's part of a multimodal config; the config itself for others."""
    for name in TEXT_CONFIGS:
        if isinstance(config.get(name), dict):
            return text_config(config[name])
    return config


def _model_type(text: Config, config: Config) -> str:
    return str(text.get("model_type") or config.get("model_type") or "").lower()


def _architectures(config: Config) -> list[str]:
    names = config.get("architectures")
    return [str(name) for name in names] if isinstance(names, list) else []


def _is_mla(text: Config, config: Config) -> object:
    # MiniCPM3 projects its keys through a latent, but keeps them whole.
    return text.get("kv_lora_rank") and _model_type(text, config) != "minicpm3"


def _is_alibi(text: Config, config: Config) -> object:
    attention = text.get("attn_config")
    return (
        _model_type(text, config) == "bloom"
        or text.get("alibi")
        or text.get("position_embedding_type") == "alibi"
        or (isinstance(attention, dict) and attention.get("alibi"))
    )


def _sees_images_both_ways(text: Config, config: Config) -> object:
    # The list is vLLM's own. Some Gemma 4 do, as their configs say, and some do not.
    models = ("bagel", "gemma3", "molmo2", "moondream3", "paligemma")
    return text is not config and (
        str(config.get("model_type")).lower() in models or text.get("use_bidirectional_attention") == "vision"
    )


def _is_encoder(text: Config, config: Config) -> object:
    pattern = re.compile("bert|electra", re.IGNORECASE)
    return pattern.search(_model_type(text, config)) or any(map(pattern.search, _architectures(config)))


def _crosses(text: Config, config: Config) -> object:
    return (
        config.get("is_encoder_decoder")
        or _model_type(text, config) in ("bart", "mbart", "t5", "whisper")
        or text.get("cross_attention_layers")
    )


def _per_head_scales(text: Config, config: Config) -> object:
    quantization = config.get("quantization_config") or text.get("quantization_config")
    scheme = quantization.get("kv_cache_scheme") if isinstance(quantization, dict) else None
    return isinstance(scheme, dict) and scheme.get("strategy") == "attn_head"


MLA = Rule(
    "MLA",
    "multi-head latent attention (MLA), whose cache is compressed already",
    models="DeepSeek V2, V3 and R1, Kimi K2",
    selector="use_mla",
    config=_is_mla,
)
SPARSE = Rule(
    "sparse attention",
    "sparse attention, which keeps an index beside its cache",
    models="DeepSeek V3.2",
    selector="use_sparse",
    config=lambda text, config: text.get("index_topk"),
)
ALIBI = Rule(
    "ALiBi",
    "ALiBi biases on the logits",
    models="BLOOM, Falcon with `alibi`",
    layer="alibi_slopes",
    config=_is_alibi,
)
PER_HEAD_SCALES = Rule(
    "per-head KV scales",
    "a checkpoint's KV scales per head (kv_cache_scheme)",
    models="checkpoints quantised with them",
    selector="use_per_head_quant_scales",
    config=_per_head_scales,
)
MM_PREFIX = Rule(
    "image prefix",
    "attention in both directions between the tokens of an image",
    "serve text alone with --language-model-only, or serve the model with --kv-cache-dtype auto",
    models="Gemma 3 and 4 with images, PaliGemma, Molmo 2",
    selector="use_mm_prefix",
    config=_sees_images_both_ways,
    options={"language_model_only": True},
)
ENCODER = Rule(
    "encoder or cross attention",
    "encoder or cross attention ({value})",
    "serve the model without --kv-cache-dtype",
    models="BERT, Whisper",
    layer="attn_type",
    config=lambda text, config: _is_encoder(text, config) or _crosses(text, config),
)
RSWA = Rule(
    "R-SWA",
    "reference sliding-window attention (R-SWA)",
    models="models with `rswa_window`",
    selector="use_rswa",
    config=lambda text, config: config.get("rswa_window"),
)
VALUE_SIZE = Rule(
    "values of another size",
    "values of another size ({value_size}) than keys ({key_size})",
    models="models whose v_head_dim is not their head_dim",
)
OWN_BACKEND = Rule(
    "an attention backend of the model's own",
    "layers for which vLLM's model brings an attention backend of its own ({value})",
    models="MiMo V2, openPangu",
)
NO_LAYER = Rule(
    "no layer takes the dtype",
    "this model: vLLM gives none of its layers the dtype",
    "serve the model with --kv-cache-dtype auto, as its cache would hold 16-bit floats anyway",
    models="Falcon with RoPE, models without attention",
)
HEAD_DIM = Rule(
    "head_dim",
    f"head_dim {{value}} (it has {', '.join(map(str, HEAD_DIMS))})",
    models="models with others",
)
DTYPE = Rule(
    "dtype",
    "a model in {value}",
    "pass --dtype bfloat16 or float16",
    options={"dtype": "bfloat16"},
)
NON_CAUSAL = Rule(
    "non-causal attention",
    "attention that is not causal",
    "if it is a draft's (DFlash), keep the draft in 16 bits with --speculative-config "
    """'{"kv_cache_dtype": "auto", ...}', else serve the model with --kv-cache-dtype auto""",
    selector="use_non_causal",
)
BATCH_INVARIANT = Rule(
    "batch-invariant mode",
    "batch-invariant mode",
    "unset VLLM_BATCH_INVARIANT",
    selector="use_batch_invariant",
)
PCP = Rule(
    "prefill context parallelism",
    "prefill context parallelism",
    "use --tensor-parallel-size instead",
    selector="use_pcp",
)
DCP = Rule(
    "decode context parallelism",
    "decode context parallelism (DCP)",
    "use --tensor-parallel-size alone",
    selector="use_dcp",
)
ADAPTIVE_VERIFICATION = Rule(
    "adaptive verification",
    "adaptive verification",
    'set "enable_adaptive_verification": false in --speculative-config',
    selector="use_adaptive_verification",
)
DRAFT_TOKENS = Rule(
    "many speculative tokens",
    "{value} speculative tokens (at most {most})",
    'lower "num_speculative_tokens" in --speculative-config',
)
KV_CONNECTOR = Rule(
    "KV connector",
    "the KV connector {value}",
    f"use {CONNECTOR} with {OFFLOAD_SPECS[0]}, or with {OFFLOAD_SPECS[1]} and tiers of type {FILE_TIER}; "
    f"between engines {PEER_CONNECTOR}, as vLLM sets it up",
)
BLOCK_SIZE = Rule(
    "block size",
    f"a block size of {{value}} (it must be a multiple of {BLOCK_SIZE_MULTIPLE})",
    f"pass --block-size {BLOCK_SIZE_MULTIPLE} or none",
)
OPTION = Rule(
    "another option of the attention",
    "the attention option {value!r}",
)
SKIPPED_CHUNKS = Rule(
    "skipping a layer with chunked attention",
    "skipping layers with chunked attention",
    "leave them out of --kv-cache-dtype-skip-layers",
)
SPLIT_SHARING = Rule(
    "skipping one of two layers that share a cache",
    "skipping one of two layers that share a KV cache",
    "name both in --kv-cache-dtype-skip-layers, or neither",
)
FAST_PREFILL = Rule(
    "fast prefill",
    "--kv-sharing-fast-prefill",
    "leave it out",
)
GPU = Rule(
    "older GPU",
    "GPUs before compute capability {value}",
    "use an A100 or a later GPU, or serve the model with --kv-cache-dtype auto",
)
PLATFORM = Rule(
    "other platform",
    "the platform {value}",
    "use an NVIDIA GPU or vLLM's CPU build, or serve the model with --kv-cache-dtype auto",
)

RULES = tuple(rule for rule in list(globals().values()) if isinstance(rule, Rule))
"""In the order in which they are looked at: what has no way out that keeps the dtype comes first."""

SERVED = (
    (
        "decoder attention, with any number of KV heads",
        "Llama, Qwen2, Qwen3, Mistral, Mixtral, GLM-4, Phi, Granite 3, OLMo 2, MiniMax-M2, ERNIE 4.5, "
        "Hunyuan",
    ),
    (
        "some layers with a state instead of a cache",
        "Qwen3-Next, Qwen3.5, Nemotron-H, Falcon-H1, Granite 4, LFM2",
    ),
    ("chunked attention", "Llama 4"),
    (
        "sliding windows",
        "Gemma 2, 3 and 4, Mistral 7B v0.1, Phi-3, OLMo 3, EXAONE 4, Command A, Step 3.5, Trinity, "
        "Qwen2 with `use_sliding_window`",
    ),
    ("soft-capped logits", "Gemma 2"),
    (
        "attention sinks",
        "gpt-oss, which public reports find sensitive to any quantised key: measure it",
    ),
    ("shared KV layers", "Gemma 3n, Gemma 4 E2B and E4B"),
    ("several head_dims in a model", "Gemma 4, and others where all are among these:"),
)
"""What is served, and whose it is."""


SERVED_ARGUMENTS = ("sliding_window", "logits_soft_cap", "kv_sharing_target_layer_name", "sinks")
"""Arguments of vLLM's AttentionImpl, beside sizes and the scale, that layers take as they come."""


def refuse(preset: str, what: Hit | Rule | str, way_out: str = AUTO) -> Refused:
    """The error for a rule, a hit one, or a feature in words; to be raised by the caller."""
    if isinstance(what, str):
        return Refused(f"--kv-cache-dtype {preset} does not support {what}; {way_out}.")
    hit = what if isinstance(what, Hit) else Hit(what)
    return Refused(hit.sentence(preset), hit)


def _raise_first(preset: str, hits: Iterable[Hit]) -> None:
    for hit in hits:
        raise refuse(preset, hit)


def _attn_type(attn_type: object) -> str:
    # vLLM's AttentionType is an enum of strings.
    return str(getattr(attn_type, "value", attn_type))


def _dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _format_hits(preset: str, head_size: int, block_size: int | None) -> Iterator[Hit]:
    try:
        slot = Slot(preset, head_size)
    except UnsupportedFormat:
        yield Hit(HEAD_DIM, {"value": head_size})
        return
    try:
        Page(slot, block_size or BLOCK_SIZE_MULTIPLE)
    except UnsupportedFormat:
        yield Hit(BLOCK_SIZE, {"value": block_size})


def connector_hits(transfer: Any) -> Iterator[Hit]:
    """Every KV connector that was not tried, or whose keys do not hold what identity.py names.

    Pages that outlive the process, or reach another one, must never be read by an engine to which the same
    bytes mean something else.

    Args:
        transfer: vLLM's KVTransferConfig.
    """
    yield from _connector_hits(
        transfer.kv_connector, transfer.kv_connector_module_path, transfer.kv_connector_extra_config
    )


def _connector_hits(name: object, module: object, extra: Any) -> Iterator[Hit]:
    extra = extra if isinstance(extra, Mapping) else {}
    if name == MULTI_CONNECTOR and not module:
        children = extra.get("connectors") or []
        names = [child.get("kv_connector") for child in children]
        for each in sorted({str(each) for each in names if names.count(each) > 1}):
            # vLLM gives them one engine's name, and memory or a port under that name.
            yield Hit(KV_CONNECTOR, {"value": f"{name} with more than one {each}"})
        for child in children:
            yield from _connector_hits(
                child.get("kv_connector"),
                child.get("kv_connector_module_path"),
                child.get("kv_connector_extra_config"),
            )
        return
    if name == PEER_CONNECTOR and not module:
        for option, value in PEER_OPTIONS.items():
            if extra.get(option, value) != value:
                yield Hit(KV_CONNECTOR, {"value": f"{name} with {option}"})
        return
    if name != CONNECTOR or module:
        yield Hit(KV_CONNECTOR, {"value": name})
        return
    spec = extra.get("spec_name", OFFLOAD_SPECS[0])
    if spec not in OFFLOAD_SPECS:
        yield Hit(KV_CONNECTOR, {"value": f"{name} ({spec})"})
    for tier in extra.get("secondary_tiers") or []:
        kind = tier.get("type") if isinstance(tier, Mapping) else None
        if kind != FILE_TIER:
            yield Hit(KV_CONNECTOR, {"value": f"{name} with a tier of type {kind}"})
    if extra.get("canonical_layout"):
        yield Hit(KV_CONNECTOR, {"value": f"{name} with canonical_layout"})


def _peer_hits(config: Any, platform: Any) -> Iterator[Hit]:
    """What an engine that reads its peers' pages has besides, and was not tried."""
    transfer = config.kv_transfer_config
    children = (transfer.kv_connector_extra_config or {}).get("connectors") or []
    every = [vars(transfer), *children]
    if not any(each.get("kv_connector") == PEER_CONNECTOR for each in every):
        return
    if config.model_config is not None and config.model_config.enable_sleep_mode:
        # Waking up, vLLM 0.33 forgets what it was told to compare.
        yield Hit(KV_CONNECTOR, {"value": f"{PEER_CONNECTOR} with sleep mode"})
    on_gpu = platform is not None and platform.is_cuda()
    if on_gpu and any(each.get("kv_buffer_device", "cuda") != "cuda" for each in every):
        yield Hit(KV_CONNECTOR, {"value": f"{PEER_CONNECTOR} with another kv_buffer_device than cuda"})


def _platform_hits(platform: Any) -> Iterator[Hit]:
    if platform.is_cuda():
        capability = platform.get_device_capability()
        if capability is None or tuple(capability) < MIN_CAPABILITY:
            yield Hit(GPU, {"value": ".".join(map(str, MIN_CAPABILITY))})
    elif not platform.is_cpu():
        yield Hit(PLATFORM, {"value": platform.device_name})


def selector_hits(selector: Any, config: Any = None, platform: Any = None) -> Iterator[Hit]:
    """Every rule that a layer hits, by what vLLM asks of its backend.

    Args:
        selector: vLLM's AttentionSelectorConfig.
        config: the VllmConfig in force; without it connectors and options of the cache are not judged.
        platform: vLLM's current_platform; without it the device is not judged.
    """
    for rule in RULES:
        if rule.selector and getattr(selector, rule.selector, False):
            yield Hit(rule)
    if selector.use_mla:
        return
    if _attn_type(selector.attn_type) != "decoder":
        yield Hit(ENCODER, {"value": _attn_type(selector.attn_type)})
    if _dtype_name(selector.dtype) not in DTYPES:
        yield Hit(DTYPE, {"value": _dtype_name(selector.dtype)})
    if config is not None:
        if selector.use_kv_connector:
            yield from connector_hits(config.kv_transfer_config)
            yield from _peer_hits(config, platform)
        if config.cache_config.kv_sharing_fast_prefill:
            yield Hit(FAST_PREFILL)
    yield from _format_hits(selector.kv_cache_dtype, selector.head_size, selector.block_size)
    if platform is not None:
        yield from _platform_hits(platform)


def check_selector(selector: Any, config: Any = None, platform: Any = None) -> None:
    """Raise Refused for the first of `selector_hits`."""
    _raise_first(selector.kv_cache_dtype, selector_hits(selector, config, platform))


def layer_hits(
    kv_cache_dtype: str,
    *,
    alibi_slopes: object = None,
    attn_type: str = "decoder",
    **extra: Any,
) -> Iterator[Hit]:
    """Every rule that the arguments of vLLM's AttentionImpl hit; extra are those that are not named."""
    if not is_polar_dtype(kv_cache_dtype):
        # vLLM takes the backend of a chunked layer from the engine's dtype, and skips the layer after.
        yield Hit(SKIPPED_CHUNKS)
    if alibi_slopes is not None:
        yield Hit(ALIBI)
    if _attn_type(attn_type) != "decoder":
        yield Hit(ENCODER, {"value": _attn_type(attn_type)})
    for name, setting in extra.items():
        # What means that an option is off.
        off = setting is None or (isinstance(setting, int) and setting in (0, -1))
        if not off and name not in SERVED_ARGUMENTS:
            yield Hit(OPTION, {"value": name})


def check_layer(kv_cache_dtype: str, **arguments: Any) -> None:
    """Raise Refused for the first of `layer_hits`, whose arguments these are."""
    _raise_first(kv_cache_dtype, layer_hits(kv_cache_dtype, **arguments))


def spec_hits(head_size: int, head_size_v: int) -> Iterator[Hit]:
    """What vLLM's AttentionSpec of a layer hits."""
    if head_size_v != head_size:
        yield Hit(VALUE_SIZE, {"value_size": head_size_v, "key_size": head_size})


def check_spec(preset: str, head_size: int, head_size_v: int) -> None:
    """Raise Refused for the first of `spec_hits`."""
    _raise_first(preset, spec_hits(head_size, head_size_v))


def check_draft_tokens(preset: str, decode_len: int, most: int) -> None:
    """Raise Refused if a decode's query tokens, one more than the drafted ones, exceed what kernels take."""
    if decode_len > most:
        raise refuse(preset, Hit(DRAFT_TOKENS, {"value": decode_len - 1, "most": most - 1}))


def _shows(rule: Rule, text: Config, config: Config) -> bool:
    return rule.config is not None and bool(rule.config(text, config))


def config_hits(text: Config, config: Config) -> Iterator[Hit]:
    """Every rule that config.json alone shows; the engine sees more, and is never less strict.

    Args:
        text: the language model's part of the file.
        config: the whole of it.
    """
    for rule in RULES:
        if _shows(rule, text, config):
            yield Hit(rule, {"value": _model_type(text, config)} if "{value}" in rule.what else {})


def unknown_skips(skips: Iterable[str], layers: int) -> list[str]:
    """Words of --kv-cache-dtype-skip-layers that vLLM takes and that name no layer."""
    return [
        word for word in skips if word != "sliding_window" and word not in {str(i) for i in range(layers)}
    ]


def ranges(indices: Iterable[int]) -> str:
    """Numbers as text: [0, 1, 2, 5] as "0-2, 5"."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(f"{a}-{b}" if a != b else f"{a}" for a, b in runs)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _in_code(text: str) -> str:
    """Flags and their values as Markdown code."""
    value = r"(?: (?:auto|bfloat16|sliding_window|\d+|'\{[^']*\}'))?"
    return re.sub(rf"--[a-z][a-z-]*{value}|VLLM_\w+", lambda found: f"`{found[0]}`", text)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def table() -> str:
    """README's table of what is served and what not, in Markdown."""
    rows = [_row("attention", "models", "served?"), _row("---", "---", "---")]
    rows += [_row(what, models, "yes") for what, models in SERVED]
    rows.append(_row("head_dim " + ", ".join(map(str, HEAD_DIMS)), "", "yes, in bfloat16 or float16"))
    rows += [
        _row(
            rule.feature, rule.models, "no: " + _in_code(rule.way_out.replace(AUTO, "--kv-cache-dtype auto"))
        )
        for rule in RULES
        if rule.models
    ]
    return "\n".join(rows)


def refusals() -> str:
    """docs/troubleshooting.md's table: every refusal as it is printed, and what to do, in Markdown."""
    rows = [_row("`--kv-cache-dtype ... does not support`", "what to do"), _row("---", "---")]
    for rule in RULES:
        what = re.sub(r"\{\w+(!r)?\}", "...", rule.what)
        rows.append(_row(what, _in_code(_capital(rule.way_out))))
    return "\n".join(rows)
