"""What vLLM's own layers of a model would ask of the backend: the model is built on torch's meta device.

Building takes a tenth of a second and no memory, whatever the model's size; what takes seconds is to import
vLLM. So the answer for a model is the engine's own: no list of architectures can go out of date. `build` is
for a process of its own, `ask` starts one: `python -m vllm_polarquant.dry_run REQUEST ANSWER`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_polarquant.format import PRESETS
from vllm_polarquant.support import (
    AUTO,
    MLA,
    MM_PREFIX,
    NO_LAYER,
    OWN_BACKEND,
    RULES,
    SPLIT_SHARING,
    Hit,
    layer_hits,
    selector_hits,
    spec_hits,
    text_config,
)

logger = logging.getLogger("vllm.polarquant")

MEMORY = 1 << 40
"""Bytes in which requests are counted: so many that a block more or less is nothing."""

SECONDS = 180
"""After which a child is given up: vLLM's import and one model, on a slow disk."""

QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


class NotBuilt(RuntimeError):
    """vLLM could not build the model here; the message says why, in one line."""


@dataclass(frozen=True)
class Layer:
    """One attention layer with a cache of its own, as a single device holds it.

    quantised: whether it takes the preset.
    token_bytes: of one token in 16 bits, all KV heads.
    """

    index: int
    quantised: bool
    query_heads: int
    kv_heads: int
    head_dim: int
    token_bytes: int


@dataclass(frozen=True)
class Found:
    """A hit rule, its place in RULES, and the layers that hit it."""

    rule: int
    values: dict[str, Any]
    way_out: str
    layers: list[int]

    @property
    def hit(self) -> Hit:
        return Hit(RULES[self.rule], self.values, self.way_out)


@dataclass(frozen=True)
class DryRun:
    """What came of building a model.

    layers: those with a KV cache; states: how many hold a state of fixed size instead.
    request_bytes: by dtype, what a request of max_model_len tokens takes of the cache as vLLM counts it, with
        windows, states and padding; empty where that is not known.
    found: what the engine would refuse, the first first; notes: what could not be looked at.
    """

    layers: list[Layer] = field(default_factory=list)
    states: int = 0
    max_model_len: int = 0
    request_bytes: dict[str, int] = field(default_factory=dict)
    window: int | None = None
    found: list[Found] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def quantised(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.quantised]

    @staticmethod
    def load(data: Mapping[str, Any]) -> DryRun:
        parts = {
            "layers": [Layer(**layer) for layer in data["layers"]],
            "found": [Found(**found) for found in data["found"]],
        }
        return DryRun(**{**data, **parts})


class _Stop(Exception):
    """The rest of the model cannot be built with the stand-in, and need not be."""


class _Recorder:
    """Stands in for the backend: takes every layer, and notes which rules it hits."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.asked: list[Hit] = []
        self.by_layer: list[tuple[Any, list[Hit]]] = []

    def choose(self, selector: Any) -> None:
        from vllm.platforms import current_platform

        self.asked += selector_hits(selector, self.config, current_platform)
        if any(hit.rule is MLA for hit in self.asked):
            raise _Stop

    def layer(self, impl: Any, arguments: Mapping[str, Any]) -> None:
        hits = [*self.asked, *layer_hits(**arguments)]
        self.asked = []
        self.by_layer.append((impl, hits))


_recorder: _Recorder | None = None


def _stand_in(preset: str) -> Any:
    """The backend's class of a preset, with layers that are only noted."""
    import torch
    from vllm.v1.attention.backend import AttentionImpl

    from vllm_polarquant.backend import PolarQuantBackend

    names = (
        *("num_heads", "head_size", "scale", "num_kv_heads", "alibi_slopes", "sliding_window"),
        *("kv_cache_dtype", "logits_soft_cap", "attn_type", "kv_sharing_target_layer_name"),
    )

    class Impl(AttentionImpl[Any]):
        supports_quant_query_input = False

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            assert _recorder is not None
            arguments = dict(zip(names, args, strict=False)) | kwargs
            for name in ("num_heads", "head_size", "scale", "num_kv_heads"):
                arguments.pop(name)
            _recorder.layer(self, arguments)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

    class Backend(PolarQuantBackend):
        supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]  # noqa: RUF012

        @staticmethod
        def get_impl_cls() -> Any:
            return Impl

        @classmethod
        def supports_alibi_sqrt(cls) -> bool:
            return True

    Backend.preset = preset
    return Backend


_NAMES = {preset.replace(".", "_"): preset for preset in PRESETS}
"""Presets by names without a dot, which vLLM takes for the end of a module's."""


def __getattr__(name: str) -> Any:
    # vLLM finds a backend by its module and name.
    if name not in _NAMES:
        raise AttributeError(name)
    globals()[name] = backend = _stand_in(_NAMES[name])
    return backend


@contextlib.contextmanager
def _recording(config: Any) -> Iterator[_Recorder]:
    """Give every layer of our dtype the stand-in, whatever backend vLLM has kept for one like it."""
    global _recorder
    from vllm.platforms import current_platform
    from vllm.v1.attention import selector

    from vllm_polarquant.format import is_polar_dtype

    platform = type(current_platform)
    before = platform.__dict__.get("get_attn_backend_cls")
    chooser, kept = platform.get_attn_backend_cls, selector._cached_get_attn_backend

    def choose(cls: type, backend: Any, attn_selector_config: Any, num_heads: int | None = None) -> str:
        if not is_polar_dtype(attn_selector_config.kv_cache_dtype):
            return chooser(backend, attn_selector_config, num_heads)
        assert _recorder is not None
        _recorder.choose(attn_selector_config)
        return f"{__name__}.{attn_selector_config.kv_cache_dtype.replace('.', '_')}"

    _recorder = _Recorder(config)
    platform.get_attn_backend_cls = classmethod(choose)
    selector._cached_get_attn_backend = kept.__wrapped__
    try:
        yield _recorder
    finally:
        selector._cached_get_attn_backend = kept
        if before is None:
            del platform.get_attn_backend_cls
        else:
            platform.get_attn_backend_cls = before
        _recorder = None


@contextlib.contextmanager
def inspecting_here() -> Iterator[None]:
    """Let vLLM look at a model's class in this process: a child of its own for each takes ten seconds."""
    from vllm.model_executor.models import registry

    kept = registry._run_in_subprocess
    registry._run_in_subprocess = lambda inspect: inspect()
    try:
        yield
    finally:
        registry._run_in_subprocess = kept


def _first_line(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    # pydantic's errors begin with a count.
    useful = [line for line in lines if not re.search(r"validation errors? for \w+$", line)]
    line = (useful or [type(problem).__name__])[0].removeprefix("Value error, ")
    return re.split(r" \[type=|\. (?:Please|To) ", line)[0].rstrip(".:")


@contextlib.contextmanager
def _one_rank() -> Iterator[None]:
    from vllm.distributed import parallel_state

    with tempfile.TemporaryDirectory() as folder:
        parallel_state.init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        try:
            parallel_state.ensure_model_parallel_initialized(1, 1)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()


@contextlib.contextmanager
def _without_numbers() -> Iterator[None]:
    """Let layers read numbers from tensors that have none: a few do so on being built."""
    import torch

    kept = {name: getattr(torch.Tensor, name) for name in ("cpu", "item", "tolist")}

    def reading(name: str) -> Callable[..., Any]:
        def read(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            there = torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor
            return kept[name](there, *args, **kwargs)

        return read

    for name in kept:
        setattr(torch.Tensor, name, reading(name))
    try:
        yield
    finally:
        for name, read in kept.items():
            setattr(torch.Tensor, name, read)


def build(model: str, preset: str, options: Mapping[str, Any]) -> DryRun:
    """Build a model without weights and say what its layers hit.

    Args:
        model: a folder with a config.json.
        preset: the dtype.
        options: more arguments of vLLM's EngineArgs.

    Raises:
        NotBuilt: if vLLM cannot, for reasons that are not this package's.
    """
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    arguments = {"tokenizer": model, "skip_tokenizer_init": True, "load_format": "dummy"} | dict(options)
    try:
        with inspecting_here():
            config = EngineArgs(
                model=model, kv_cache_dtype=preset, enforce_eager=True, **arguments
            ).create_engine_config()
    except Exception as problem:
        raise NotBuilt(_first_line(problem)) from problem
    dtype = config.model_config.dtype
    with _recording(config) as recorder, set_current_vllm_config(config), _one_rank():
        stopped: Exception | None = None
        try:
            with set_default_torch_dtype(dtype), torch.device("meta"), _without_numbers():
                initialize_model(config)
        except _Stop:
            recorder.by_layer.append((None, recorder.asked))
        except Exception as problem:
            if not any(hits for _, hits in recorder.by_layer):
                raise NotBuilt(_first_line(problem)) from problem
            stopped = problem
        return _read(config, recorder, stopped)


def _read(config: Any, recorder: _Recorder, stopped: Exception | None) -> DryRun:
    """The layers that vLLM knows of after building, with what they hit."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.models.utils import extract_layer_index
    from vllm.v1.kv_cache_interface import AttentionSpec, MambaSpec

    from vllm_polarquant.compat import BACKEND_NAME
    from vllm_polarquant.format import is_polar_dtype

    context = config.compilation_config.static_forward_context
    places: dict[int, int] = {}
    layers: list[Layer] = []
    states = 0
    all_hits: list[tuple[int, Hit]] = []
    for name, layer in context.items():
        if not isinstance(layer, AttentionLayerBase):
            continue
        try:
            index = extract_layer_index(name)
        except (AssertionError, ValueError):
            index = -1
        places[id(getattr(layer, "impl", None))] = index
        ours = is_polar_dtype(getattr(layer, "kv_cache_dtype", None))
        own = ours and layer.get_attn_backend().get_name() != BACKEND_NAME
        if own:
            all_hits.append((index, Hit(OWN_BACKEND, {"value": layer.get_attn_backend().__name__})))
        if target := getattr(layer, "kv_sharing_target_layer_name", None):
            if ours != is_polar_dtype(context[target].kv_cache_dtype):
                all_hits.append((index, Hit(SPLIT_SHARING)))
            continue
        try:
            spec = layer.get_kv_cache_spec(config)
        except Exception:
            # Only after a refusal: vLLM has no spec for such a layer.
            continue
        if isinstance(spec, MambaSpec):
            states += 1
        elif isinstance(spec, AttentionSpec):
            value_size = getattr(spec, "head_size_v", None) or spec.head_size
            all_hits += [(index, hit) for hit in spec_hits(spec.head_size, value_size) if ours and not own]
            heads = getattr(layer, "num_heads", spec.num_kv_heads)
            per_token = 2 * spec.num_kv_heads * (spec.head_size + value_size)
            layers.append(Layer(index, ours, heads, spec.num_kv_heads, spec.head_size, per_token))
    for impl, hits in recorder.by_layer:
        all_hits += [(places.get(id(impl), -1), hit) for hit in hits]
    if not all_hits and not any(layer.quantised for layer in layers):
        all_hits.append((-1, Hit(NO_LAYER)))

    model_config = config.model_config
    hopeless = any(not hit.rule.options for _, hit in all_hits)
    found: dict[tuple[int, str], Found] = {}
    for index, hit in all_hits:
        if hopeless and hit.rule.options:
            # What keeps the dtype is no help beside what does not.
            hit = replace(hit, way_out=AUTO)
        place = RULES.index(hit.rule)
        key = (place, json.dumps(dict(hit.values), sort_keys=True))
        entry = found.setdefault(key, Found(place, dict(hit.values), hit.way_out, []))
        if index >= 0 and index not in entry.layers:
            entry.layers.append(index)
    notes = []
    if stopped is not None:
        notes.append(f"vLLM could not build the rest of the model here ({_first_line(stopped)}).")
    return DryRun(
        layers=layers,
        states=states,
        max_model_len=model_config.max_model_len,
        request_bytes={} if all_hits else _request_bytes(config),
        window=model_config.get_sliding_window(),
        found=sorted(found.values(), key=lambda f: f.rule),
        notes=notes,
    )


def _request_bytes(config: Any) -> dict[str, int]:
    """Bytes that a request of max_model_len tokens takes, by dtype, counted in MEMORY."""
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout

    from vllm_polarquant.announce import as_dtype, specs_of, tokens_that_fit

    try:
        type(current_platform).update_block_size_for_backend(config)
        specs = specs_of(config)
        layouts = get_supported_kv_cache_layouts(get_current_attn_backends(config))
        resolve_kv_cache_layout(config, [[layout.name for layout in layouts]], specs.values())
        fit = {config.cache_config.cache_dtype: tokens_that_fit(config, [(specs, MEMORY)])}
        for dtype in ("auto", "fp8"):
            other = as_dtype(config, dtype)
            fit[dtype] = tokens_that_fit(other, [(specs_of(other), MEMORY)])
    except Exception as problem:
        # That a model is served must not be lost for want of its size.
        logger.debug("what fits is unknown: %r", problem)
        return {}
    length = config.model_config.max_model_len
    return {dtype: round(MEMORY * length / tokens) for dtype, tokens in fit.items()}


@dataclass(frozen=True)
class Answer:
    """What a child found.

    run: the model as it would be served. ways_out: options with which nothing is refused, if it is.
    """

    run: DryRun
    ways_out: list[tuple[dict[str, Any], DryRun]] = field(default_factory=list)


def _candidates(run: DryRun, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Options that might serve what `run` found to be refused."""
    if not run.found or any(not found.hit.rule.options for found in run.found):
        return []
    every: dict[str, Any] = dict(options)
    for found in run.found:
        every |= found.hit.rule.options
    return [every]


def _language_model(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The language model's config with its architecture's name, of a multimodal model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text = text_config(config)
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(text.get("model_type")))
    if text is config or name is None:
        return None
    return {"dtype": config.get("dtype") or config.get("torch_dtype"), **text, "architectures": [name]}


def explore(model: Path, config: Mapping[str, Any], preset: str, options: Mapping[str, Any]) -> Answer:
    """Build a model, and where it is refused, with each way out.

    Args:
        model: a folder or its config.json.
        config: what that file holds.
        preset: the dtype.
        options: more arguments of vLLM's EngineArgs.

    Raises:
        NotBuilt: if vLLM cannot build it.
    """
    with contextlib.ExitStack() as stack:
        folder, text_only = model, False
        if not model.is_dir():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (folder / "config.json").write_text(json.dumps(config))
        try:
            run = build(str(folder), preset, options)
        except NotBuilt as problem:
            text = _language_model(config)
            if text is None:
                raise
            folder, text_only = Path(stack.enter_context(tempfile.TemporaryDirectory())), True
            (folder / "config.json").write_text(json.dumps(text))
            run = build(str(folder), preset, options)
            note = f"vLLM could build only the language model here ({problem}): the rest was not judged."
            run = replace(run, notes=[*run.notes, note])
            if MM_PREFIX.config is not None and MM_PREFIX.config(text_config(config), config):
                run = replace(run, found=[Found(RULES.index(MM_PREFIX), {}, "", []), *run.found])
        ways = []
        for way in _candidates(run, options):
            with contextlib.suppress(NotBuilt):
                # A language model by itself knows no images to leave out.
                kept = {k: v for k, v in way.items() if not (text_only and k == "language_model_only")}
                result = build(str(folder), preset, kept)
                if not result.found:
                    ways.append(({k: v for k, v in way.items() if options.get(k) != v}, result))
                    if result.max_model_len == run.max_model_len:
                        break
        return Answer(run, ways)


def ask(model: Path, config: Mapping[str, Any], preset: str, options: Mapping[str, Any]) -> Answer:
    """`explore` in a child process.

    Raises:
        NotBuilt: if vLLM cannot build the model, is not installed, or gives no answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        asked = {"model": str(model), "config": dict(config), "preset": preset, "options": dict(options)}
        request.write_text(json.dumps(asked))
        try:
            child = subprocess.run(
                [sys.executable, "-m", "vllm_polarquant.dry_run", str(request), str(answer)],
                env=os.environ | QUIET,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise NotBuilt(f"it took more than {SECONDS} s") from None
        except OSError as problem:
            raise NotBuilt(f"no child process: {problem.strerror}") from None
        if not answer.is_file():
            last = ([line for line in child.stderr.splitlines() if line.strip()] or ["no reason given"])[-1]
            raise NotBuilt(last.strip())
        data = json.loads(answer.read_text())
    if "problem" in data:
        raise NotBuilt(data["problem"])
    ways = [(way, DryRun.load(run)) for way, run in data["ways_out"]]
    return Answer(DryRun.load(data["run"]), ways)


def main(request: str, answer: str) -> None:
    """Answer a request file of `ask`."""
    asked = json.loads(Path(request).read_text())
    try:
        found: dict[str, Any] = asdict(explore(Path(asked.pop("model")), **asked))
    except NotBuilt as problem:
        found = {"problem": str(problem)}
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    # Under the name by which vLLM will import it.
    from vllm_polarquant import dry_run

    dry_run.main(*sys.argv[1:])
