"""Whether a preset can serve a model, and in what size: from config.json, and from vLLM where it can tell.

vLLM builds the model's layers without weights (dry_run.py) and each says which rule it hits (support.py), so
that the answer is the engine's. Where vLLM cannot, config.json alone is judged by the same rules. No weights
(keys.py reads some), no network, no code from the model's folder. Imports neither vLLM nor torch.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_polarquant import dry_run, support
from vllm_polarquant.format import DEFAULT_PRESET, Slot, UnsupportedFormat
from vllm_polarquant.support import text_config

# The names that configs use for one number, the usual one first.
HIDDEN_SIZE = ("hidden_size", "n_embd", "d_model")
NUM_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
NUM_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
NUM_KV_HEADS = (
    "num_key_value_heads",
    "n_head_kv",
    "num_kv_heads",
    "multi_query_group_num",
    "num_attention_groups",
)
HEAD_DIM = ("head_dim", "hidden_size_per_head", "attention_head_dim", "kv_channels")
DTYPE = ("dtype", "torch_dtype")
MAX_MODEL_LEN = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_sequence_length",
)
MOST = 1 << 31
"""No size of a real model is as large, and vLLM's own integers are of 32 bits."""


class ConfigError(ValueError):
    """A model's file that is missing, broken or does not say what is needed; one line."""


@dataclass(frozen=True)
class Problem:
    """One reason why a model is refused.

    feature: a short name, such as ``sliding window``.
    message: the engine's own sentence, which names the feature and says what to do.
    layers: which layers, where that is known.
    """

    feature: str
    message: str
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cache:
    """The KV cache of one layer; quantised: whether it takes the preset."""

    index: int
    query_heads: int
    kv_heads: int
    head_dim: int
    quantised: bool = True


@dataclass(frozen=True)
class Shape:
    """What decides the size of a model's KV cache, and how many heads read it.

    layers: those with a KV cache. caches: these layers, where vLLM has told them; else all are alike.
    requests: by dtype, the bytes that a request of max_model_len tokens takes of the whole cache, states and
        padding included, where vLLM has counted them.
    """

    layers: int
    kv_heads: int
    head_dim: int
    max_model_len: int | None
    query_heads: int
    caches: tuple[Cache, ...] = ()
    requests: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def indices(self) -> list[int]:
        """Numbers of the layers with a KV cache of the preset."""
        return [c.index for c in self.caches if c.quantised] if self.caches else list(range(self.layers))

    def at(self, index: int) -> Shape:
        """The shape of one layer, where they differ."""
        for c in self.caches:
            if c.index == index:
                return replace(
                    self, kv_heads=c.kv_heads, head_dim=c.head_dim, query_heads=c.query_heads, caches=()
                )
        return self

    def token_bytes(self, kv_cache_dtype: str) -> int:
        """Bytes of one token's keys and values in all layers: ``auto`` (16 bits), ``fp8`` or a preset."""
        if not self.caches:
            return self.layers * self.kv_heads * _head_bytes(kv_cache_dtype, self.head_dim)
        return sum(
            cache.kv_heads * _head_bytes(kv_cache_dtype if cache.quantised else "auto", cache.head_dim)
            for cache in self.caches
        )

    def times(self, kv_cache_dtype: str) -> float:
        """How many times the tokens of ``auto`` fit: as vLLM counts, else by the bytes of a token."""
        if self.requests:
            return self.requests["auto"] / self.requests[kv_cache_dtype]
        return self.token_bytes("auto") / self.token_bytes(kv_cache_dtype)


def _head_bytes(kv_cache_dtype: str, head_dim: int) -> int:
    if kv_cache_dtype == "auto":
        return 4 * head_dim
    if kv_cache_dtype == "fp8":
        return 2 * head_dim
    return Slot(kv_cache_dtype, head_dim).nbytes


@dataclass(frozen=True)
class WayOut:
    """Flags that were tried in a dry run and with which nothing is refused.

    quantised: how many layers then take the preset, of how many. times: how many times auto's tokens fit.
    max_model_len: the longest request then, if it is shorter than without.
    """

    flags: str
    quantised: int
    layers: int
    times: float
    max_model_len: int | None = None

    def __str__(self) -> str:
        what = f"{self.times:.2f} times the tokens of auto fit"
        if self.quantised < self.layers:
            what = f"{self.quantised} of {self.layers} layers take the preset, {what}"
        cut = f"; requests have at most {self.max_model_len:,} tokens" if self.max_model_len else ""
        return f"{self.flags}: {what}{cut}"


@dataclass(frozen=True)
class Verdict:
    """What is known of a preset on a model.

    shape: None if refused. states: layers that hold a state of fixed size, which stays as it is.
    by_vllm: whether vLLM's own layers were asked, or config.json alone. notes: sentences.
    """

    problems: list[Problem]
    shape: Shape | None = None
    states: int = 0
    ways_out: list[WayOut] = field(default_factory=list)
    by_vllm: bool = False
    notes: list[str] = field(default_factory=list)


def read_config(model: Path) -> dict[str, Any]:
    """The config.json of a model folder, or the file itself.

    Raises:
        ConfigError: if there is none or it is not a JSON object.
    """
    path = model
    try:
        path = model / "config.json" if model.is_dir() else model
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; pass the folder of a downloaded model or its config.json"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a JSON {type(config).__name__}, not an object")
    return config


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """The first of the fields that is set; every one that is set must be a size."""
    found = None
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ConfigError(f"config.json has {name} = {value!r}, not a positive whole number")
        if value >= MOST and names is not MAX_MODEL_LEN:
            raise ConfigError(f"config.json has {name} = {value:.3g}, more than any model's")
        found = found or value
    return found


def _needed(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    value = _first(config, names)
    if value is None:
        raise ConfigError(
            f"config.json does not say {names[0]}; write it out in full with transformers: "
            "AutoConfig.from_pretrained(model).to_json_file(path, use_diff=False)"
        )
    return value


def _strings(config: Mapping[str, Any], name: str) -> None:
    value = config.get(name)
    if value is not None and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
        raise ConfigError(f"config.json has {name} = {value!r}, not a list of names")


def _head_dim(text: Mapping[str, Any]) -> int:
    _first(text, HIDDEN_SIZE)
    return _first(text, HEAD_DIM) or _needed(text, HIDDEN_SIZE) // _needed(text, NUM_HEADS)


def _kv_heads(text: Mapping[str, Any]) -> int:
    attention = text.get("attn_config")
    if isinstance(attention, dict) and attention.get("kv_n_heads"):  # DBRX
        return _needed(attention, ("kv_n_heads",))
    if text.get("multi_query") and not text.get("new_decoder_architecture"):  # Falcon, StarCoder
        return 1
    return _first(text, NUM_KV_HEADS) or _needed(text, NUM_HEADS)


def layer_count(config: Mapping[str, Any]) -> int:
    """Layers of the language model; raises ConfigError if config.json does not say."""
    return _needed(text_config(config), NUM_LAYERS)


def read_shape(config: Mapping[str, Any]) -> Shape:
    """Layers, heads and sizes of a config.

    Raises:
        ConfigError: if one is missing or not a size.
    """
    text = text_config(config)
    layers = layer_count(config)
    shared = text.get("num_kv_shared_layers")
    if isinstance(shared, int) and 0 < shared < layers:
        # Layers that share another layer's cache have none of their own (Gemma 3n).
        layers -= shared
    _first(text, MAX_MODEL_LEN)
    lengths = [length for name in MAX_MODEL_LEN if (length := text.get(name)) and length < MOST]
    kv_heads = _kv_heads(text)
    query_heads = _first(text, NUM_HEADS) or kv_heads
    return Shape(layers, kv_heads, _head_dim(text), min(lengths, default=None), query_heads)


def _dtype(config: Mapping[str, Any]) -> str:
    named = [part.get(name) for part in (text_config(config), config) for name in DTYPE]
    return next((str(dtype).removeprefix("torch.") for dtype in named if dtype), "auto")


def _problem(hit: support.Hit, preset: str, layers: list[int] | None = None) -> Problem:
    return Problem(hit.rule.feature, hit.sentence(preset), tuple(sorted(layers or ())))


def check_config(config: Mapping[str, Any], preset: str = DEFAULT_PRESET) -> list[Problem]:
    """Why a model cannot be served with `preset`, as far as config.json shows it.

    Args:
        config: the object in config.json.
        preset: a key of format.PRESETS.

    Raises:
        ConfigError: if a field that decides is not of its type.
    """
    _strings(config, "architectures")
    text = text_config(config)
    _strings(text, "layer_types")
    hits = list(support.config_hits(text, config))
    # vLLM casts float32 checkpoints to 16 bits on its own.
    if _dtype(config) not in ("auto", "bfloat16", "float16", "half", "float32", "float"):
        hits.append(support.Hit(support.DTYPE, {"value": _dtype(config)}))
    if not hits:
        try:
            Slot(preset, _head_dim(text))
        except UnsupportedFormat:
            hits.append(support.Hit(support.HEAD_DIM, {"value": _head_dim(text)}))
    return [_problem(hit, preset) for hit in hits]


def _from_config(config: Mapping[str, Any], preset: str, note: str) -> Verdict:
    problems = check_config(config, preset)
    shape = None if problems else read_shape(config)
    return Verdict(problems, shape, notes=[note])


def _shape(run: dry_run.DryRun) -> Shape:
    caches = [Cache(x.index, x.query_heads, x.kv_heads, x.head_dim, x.quantised) for x in run.layers]
    first = (run.quantised or run.layers)[0]
    alike = {(c.kv_heads, c.head_dim, c.quantised) for c in caches} == {
        (first.kv_heads, first.head_dim, True)
    }
    # Where all layers of a model are alike, its numbers say it all.
    all_there = alike and [c.index for c in caches] == list(range(len(caches)))
    return Shape(
        len(caches),
        first.kv_heads,
        first.head_dim,
        run.max_model_len,
        first.query_heads,
        () if all_there else tuple(caches),
        run.request_bytes,
    )


def _flags(options: Mapping[str, Any]) -> str:
    """Options of vLLM's EngineArgs as its command line has them."""
    flags = []
    for name, value in options.items():
        words = value if isinstance(value, list) else [] if value is True else [str(value)]
        flags.append(" ".join(["--" + name.replace("_", "-"), *words]))
    return " ".join(flags)


def _way_out(options: Mapping[str, Any], run: dry_run.DryRun, before: dry_run.DryRun, preset: str) -> WayOut:
    shape = _shape(run)
    cut = run.max_model_len if run.max_model_len < before.max_model_len else None
    return WayOut(_flags(options), len(run.quantised), len(run.layers), shape.times(preset), cut)


def judge(
    model: Path,
    config: Mapping[str, Any],
    preset: str = DEFAULT_PRESET,
    options: Mapping[str, Any] | None = None,
    ask_vllm: bool = True,
) -> Verdict:
    """Whether a preset can serve a model, with the ways out tried.

    Args:
        model: the folder or its config.json.
        config: what read_config gave.
        preset: a key of format.PRESETS.
        options: arguments of vLLM's EngineArgs that serving will have.
        ask_vllm: whether to build vLLM's layers, which takes ten seconds or more.

    Raises:
        ConfigError: if a field that decides is not of its type.
    """
    _strings(config, "architectures")
    text = text_config(config)
    for names in (HIDDEN_SIZE, NUM_HEADS, NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, MAX_MODEL_LEN):
        _first(text, names)
    if not ask_vllm:
        return _from_config(config, preset, "Judged by config.json alone, as asked: vLLM may know more.")
    if importlib.util.find_spec("vllm") is None:
        note = "vLLM is not installed here: judged by config.json alone, the engine may know more."
        return _from_config(config, preset, note)
    try:
        answer = dry_run.ask(model, config, preset, options or {})
    except dry_run.NotBuilt as problem:
        note = f"vLLM could not build this model here ({problem}): judged by config.json alone."
        return _from_config(config, preset, note)
    run, notes = answer.run, list(answer.run.notes)
    problems = [_problem(found.hit, preset, found.layers) for found in run.found]
    ways = [_way_out(way, result, run, preset) for way, result in answer.ways_out]
    shape = None if problems else _shape(run)
    return Verdict(problems, shape, run.states, ways, by_vllm=True, notes=notes)


def weight_bytes(model: Path, config: Mapping[str, Any]) -> int | None:
    """Bytes that a model folder's safetensors take once loaded; None if it holds none."""
    size = sum(path.stat().st_size for path in weight_files(model))
    # vLLM loads float32 weights as 16-bit floats.
    return (size // 2 if _dtype(config) in ("float32", "float") else size) or None


def weight_files(model: Path) -> list[Path]:
    """A model's safetensors, of the folder or beside its config.json.

    Raises:
        ConfigError: if the folder cannot be read.
    """
    folder = model if model.is_dir() else model.parent
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    except OSError as error:
        raise ConfigError(f"cannot read {folder}: {error.strerror}") from None
    # Mistral's repositories hold the weights twice.
    return [path for path in found if not path.name.startswith("consolidated")] or found


def check_weights(model: Path) -> None:
    """Raise ConfigError for the first weight file that is damaged or missing; only headers are read."""
    folder = model if model.is_dir() else model.parent
    for path in weight_files(model):
        _check_header(path)
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({str(name) for name in names.values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{index} is damaged ({type(error).__name__}: {error}): download it again"
        ) from None
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"{len(missing)} of the {len(files)} files that {index} names are not there, such as "
            f"{missing[0]}: download them"
        )


def _check_header(path: Path) -> None:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("no header of safetensors" if size else "it is empty")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if 8 + length + max(ends, default=0) != size:
            raise ValueError(f"it should have {8 + length + max(ends, default=0):,} bytes and has {size:,}")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = (
            "its header is no JSON" if isinstance(error, UnicodeDecodeError | json.JSONDecodeError) else error
        )
        raise ConfigError(f"{path} is damaged ({why}): download it again") from None
