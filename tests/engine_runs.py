"""Real engines in a child process: `run(name)` calls a scenario below, or of another script like this one.

A child boots several engines and answers with one JSON object, to which `run` adds what the child
logged. Nothing here asserts anything; tests compare what came back.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch

from vllm_polarquant.eval.probe import episodes

MODEL = str(episodes.MODEL_DIR)
PROBE_LAYERS, PROBE_KV_HEADS = 5, 2

LIMIT_S = 560
"""Of a child."""

# bfloat16 logits of the probe are multiples of 1/8, so that two of them often tie; float16's seldom do.
EXACT: dict[str, Any] = {"dtype": "float16"}
EAGER: dict[str, Any] = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "disable_log_stats": False}
if torch.cuda.is_available():
    # Of several engines on one GPU each sees only what the others leave free.
    EAGER["gpu_memory_utilization"] = 0.05


def child_env(**env: str) -> dict[str, str]:
    """An environment for a vLLM process: no Triton interpreter, no hub, and INFO logs."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    defaults = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "INFO",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if not torch.cuda.is_available():
        # Every process that tells logprobs would compile how they are counted, for five seconds.
        defaults["TORCH_COMPILE_DISABLE"] = "1"
    return inherited | defaults | env


class _Server:
    """A process that has imported vLLM, and forks a child for each job: importing takes ten seconds.

    A job is the arguments of `_answer`, and the environment and log of the child that is to answer.
    """

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=child_env(),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def ask(self, job: dict[str, Any]) -> int:
        """The exit status of the job's child."""
        assert self.process.stdin and self.process.stdout
        try:
            print(json.dumps(job), file=self.process.stdin, flush=True)
            return int(self.process.stdout.readline())
        except BaseException:
            # The next job is not to get this one's answer.
            _server.cache_clear()
            os.killpg(self.process.pid, signal.SIGKILL)
            raise


@functools.cache
def _server() -> _Server:
    return _Server()


def child(script: str, scenario: str, arguments: list[Any], out: Path, **env: str) -> tuple[int, str]:
    """Let a scenario write what it returns to a file, in a process of its own: its status and its log."""
    job = [script, scenario, json.dumps(arguments), str(out)]
    variables = child_env(**env)
    if torch.cuda.is_available():
        # CUDA does not outlive a fork.
        done = subprocess.run(
            [sys.executable, __file__, *job],
            env=variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=LIMIT_S,
        )
        return done.returncode, done.stdout
    log = out.with_suffix(".log")
    return _server().ask({"answer": job, "env": variables, "log": str(log)}), log.read_text()


@functools.cache
def _run(script: str, scenario: str, arguments: str, env: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        status, log = child(script, scenario, json.loads(arguments), out, **dict(env))
        if status:
            raise RuntimeError(f"{scenario} ended with {status}:\n{log[-4000:]}")
        return json.loads(out.read_text()) | {"log": log}


def run(scenario: str, *arguments: Any, script: str = __file__, **env: str) -> dict[str, Any]:
    """What a scenario returned in a process of its own, and its `log`; run once for all tests.

    arguments: of the scenario, as JSON carries them.
    script: the file that has it.
    """
    return _run(script, scenario, json.dumps(arguments), tuple(sorted(env.items())))


def _answer(script: str, scenario: str, arguments: str, out: str) -> None:
    from vllm_polarquant.dry_run import inspecting_here

    chosen = getattr(importlib.import_module(Path(script).stem), scenario)
    with inspecting_here():
        found = chosen(*json.loads(arguments))
    Path(out).write_text(json.dumps(found))


IMPORTED = (
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "vllm.tokenizers.hf",
    "vllm_polarquant.dry_run",
)
"""By every engine on a CPU; the plugin is not among them."""


def _serve() -> None:
    """Be a _Server's process, until its stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    # vLLM thaws what is imported and looks through it three times an engine: two seconds.
    gc.freeze = gc.unfreeze = lambda: None
    for line in sys.stdin:
        job = json.loads(line)
        forked = os.fork()
        if not forked:
            _be_child(job)
        print(os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]), file=answers, flush=True)
    # Triton complains of all that an interpreter leaves behind.
    os._exit(0)


def _be_child(job: dict[str, Any]) -> NoReturn:
    status = 1
    try:
        signal.alarm(LIMIT_S)
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.clear()
        os.environ.update(job["env"])
        _answer(*job["answer"])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def text_prompts(count: int, chars: int) -> list[str]:
    """Pieces of held-out source files, no two from the same file."""
    return [row["text"][200 : 200 + chars] for row in episodes.load_heldout()[:count]]


def questions(tokens: int, count: int) -> list[tuple[str, str]]:
    """Prompts and answers of episodes of about so many tokens, five questions an episode in a row."""
    rows = [row for row in episodes.load_episodes() if row["id"].startswith(f"{tokens}-")]
    items = [item for row in rows for item in episodes.episode_prompts(row)]
    return [(prompt, answer) for prompt, answer, _ in items[:count]]


def _engine(cache_dtype: str, **options: Any) -> Any:
    from vllm_polarquant.eval.engine import engine

    return engine(options.pop("model", MODEL), cache_dtype, **(EAGER | options))


def _generate(llm: Any, prompts: list[str], **sampling: Any) -> list[Any]:
    from vllm import SamplingParams

    params = SamplingParams(**({"temperature": 0.0, "logprobs": 2} | sampling))
    return llm.generate(prompts, params, use_tqdm=False)


def _completions(outputs: list[Any]) -> list[dict[str, list[Any]]]:
    """Every completion: its tokens, their logprobs, and how far the two likeliest were apart."""
    found = []
    for choice in (choice for output in outputs for choice in output.outputs):
        tokens = list(choice.token_ids)
        ranked = [sorted((p.logprob for p in top.values()), reverse=True) for top in choice.logprobs]
        found.append(
            {
                "tokens": tokens,
                "logprobs": [top[t].logprob for t, top in zip(tokens, choice.logprobs, strict=True)],
                "gaps": [first - second for first, second, *_ in ranked],
            }
        )
    return found


def _counter(llm: Any, name: str) -> int:
    return sum(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")


def _drafted(llm: Any, prompts: list[str], **sampling: Any) -> dict[str, Any]:
    """Completions, and how many tokens were drafted for them and taken."""
    return {
        "completions": _completions(_generate(llm, prompts, **sampling)),
        "accepted": _counter(llm, "spec_decode_num_accepted_tokens"),
        "drafted": _counter(llm, "spec_decode_num_draft_tokens"),
    }


def _ask(llm: Any, tokens: int, count: int) -> dict[str, Any]:
    """Ask questions one episode after the other; which answers are right, tokens that hit the cache."""
    items = questions(tokens, count)
    outputs = _generate(llm, [prompt for prompt, _ in items], max_tokens=episodes.PROBE_ANSWER_TOKENS)
    return {
        "right": [
            episodes.score_answer(output.outputs[0].text, answer)
            for output, (_, answer) in zip(outputs, items, strict=True)
        ],
        "cached": [output.num_cached_tokens for output in outputs],
    }


def _capacity(llm: Any) -> dict[str, int]:
    from vllm_polarquant.eval.engine import kv_tokens

    config = llm.llm_engine.vllm_config.cache_config
    return {"kv_tokens": kv_tokens(llm), "block_size": config.block_size}


def lossless() -> dict[str, Any]:
    """16-bit vectors in our pages against vLLM's own cache, each in the same schedules."""
    import torch

    greedy = text_prompts(5, 2500) + [prompt for prompt, _ in questions(1000, 3)]
    found: dict[str, Any] = {}
    for dtype in ("auto", "polarquant_lossless"):
        mine = found[dtype] = {}
        with _engine(
            dtype, **EXACT, num_gpu_blocks_override=160, block_size=128, max_num_batched_tokens=192
        ) as llm:
            mine["chunked"] = _completions(_generate(llm, greedy, max_tokens=48))
            again = _generate(llm, greedy, max_tokens=48)
            mine["cached"] = _completions(again)
            mine["cached_tokens"] = [output.num_cached_tokens for output in again]
            mine["prompt_tokens"] = [len(output.prompt_token_ids) for output in again]
            # A request's own seed makes vLLM 0.32 fail on CPU; without one it draws from torch's.
            torch.manual_seed(7)
            mine["several"] = _completions(_generate(llm, greedy[2:6], max_tokens=24, n=3, temperature=0.8))
        with _engine(
            dtype,
            **EXACT,
            num_gpu_blocks_override=40,
            block_size=32,
            max_model_len=1024,
            max_num_seqs=8,
        ) as llm:
            crowd = text_prompts(8, 700)
            mine["preempted"] = _completions(_generate(llm, crowd, max_tokens=100, ignore_eos=True))
            mine["preemptions"] = _counter(llm, "num_preemptions")
    return found


def presets() -> dict[str, Any]:
    """Questions to several presets, and what fits the same memory."""
    found: dict[str, Any] = {}
    with _engine("auto", max_num_batched_tokens=512) as llm:
        found["auto"] = _capacity(llm)
    with _engine("polarquant_k4v4", max_num_batched_tokens=512) as llm:
        found["polarquant_k4v4"] = _capacity(llm) | _ask(llm, 2000, 20)
    for preset in ("polarquant_k8v4", "polarquant_k2v2"):
        with _engine(preset, max_num_batched_tokens=512) as llm:
            found[preset] = _capacity(llm) | _ask(llm, 1000, 20)
    return found


def skipped_layers() -> dict[str, Any]:
    """The first and the last layer native, the others quantised."""
    with _engine("polarquant_k4v4", kv_cache_dtype_skip_layers=["0", "4"], max_num_batched_tokens=512) as llm:
        return _capacity(llm) | _ask(llm, 2000, 20)


def hard_keys() -> dict[str, Any]:
    """KL from the unedited model in 16 bits, with a key bias or without, layers skipped or centred."""
    from vllm_polarquant.check import read_config, read_shape
    from vllm_polarquant.eval.hard_keys import write_edit
    from vllm_polarquant.eval.measures.next_token import MEASURE, Params
    from vllm_polarquant.keys import judge_keys

    params = Params(rows=4, context=160)
    options = EXACT | MEASURE.engine(params)
    with tempfile.TemporaryDirectory() as folder:
        edited = write_edit(episodes.MODEL_DIR, "bias", 600, [1, 3], 0, Path(folder))
        config = read_config(edited)
        skip = [str(layer) for layer in judge_keys(edited, config, read_shape(config)).skip_layers]
        with _engine("auto", **options) as llm:
            baseline = MEASURE.run(llm, params, 0, None)
        found: dict[str, Any] = {"skip_layers": skip}
        for name, model, layers in (
            ("edited", str(edited), []),
            ("edited, skipped", str(edited), skip),
            ("unedited, skipped", MODEL, skip),
            ("edited, centred", str(edited), []),
        ):
            mixed = options | {"model": model, "kv_cache_dtype_skip_layers": layers}
            mixed["additional_config"] = {"polarquant": {"centre_keys": name.endswith("centred")}}
            with _engine("polarquant_k4v4", **mixed) as llm:
                found[name] = MEASURE.run(llm, params, 0, baseline).summary["kl"]
    return found


def speculation() -> dict[str, Any]:
    """Greedy tokens with and without speculation: n-grams on 16-bit pages, the probe's own drafts on codes.

    Verification adds up in other orders than single steps do, and what differs in the last bit may be stored
    as another code: only 16-bit pages can be asked for the very same tokens.
    """
    prompts = text_prompts(4, 1500) + [prompt for prompt, _ in questions(1000, 3)]
    ngram = {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2, "num_speculative_tokens": 3}
    draft = {"method": "draft_model", "model": MODEL, "num_speculative_tokens": 3}
    # What a chunk reads of earlier chunks is quantised, and a draft model takes from each batch's tokens:
    # with smaller batches the prompts would be cut, and so quantised, elsewhere.
    one_chunk = {"max_num_batched_tokens": 16384}
    found: dict[str, Any] = {}
    for name, dtype, config in (
        ("ngram", "polarquant_lossless", ngram),
        ("draft", "polarquant_k4v4", draft),
    ):
        for way, chosen in (("without", None), ("with", config)):
            with _engine(dtype, **EXACT, **one_chunk, speculative_config=chosen) as llm:
                found.setdefault(name, {})[way] = _drafted(llm, prompts, max_tokens=40)
    return found


ATTENTIONS: dict[str, dict[str, Any]] = {
    # A router that picks other experts for a rounding error would hide what attention does.
    "gpt-oss": {"dtype": "float16", "hf_overrides": {"num_local_experts": 1, "num_experts_per_tok": 1}},
    "gemma2": {},
    "gemma3n": {},
    "exaone4": {},
    "gemma3": {},
    # Without experts, whose kernels not every build of vLLM has.
    "llama4": {"hf_overrides": {"interleave_moe_layer_step": 0}, "num_gpu_blocks_override": 72},
    "granite": {
        "hf_overrides": {
            "attention_multiplier": 0.125,
            "attention_sinks": True,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 64,
        }
    },
    "llama-head-256": {},
    # FlashAttention 4, which vLLM would take for its two head_dims, needs a package that not every host has.
    "gemma4": {"attention_backend": "TRITON_ATTN"},
}
"""Of tests/tiny_models.py, and options: sinks, soft caps, shared caches, chunks, windows of 64 tokens."""

ATTENTIONS_ON_CPU = ["gpt-oss", "gemma2", "gemma3n", "exaone4"]
"""One of each kind."""


def dtype_of(model: str) -> str:
    """Of a model of ATTENTIONS; FlashAttention takes sinks beside bfloat16 alone."""
    import tiny_models

    if torch.cuda.is_available() and model in ("gpt-oss", "granite"):
        return "bfloat16"
    return ATTENTIONS[model].get("dtype") or tiny_models.MODELS[model].dtype


def attentions(names: list[str]) -> dict[str, Any]:
    """Tiny models of ATTENTIONS in pages of 16-bit floats and of codes, beside vLLM's own.

    Contexts are several times the windows of 64 tokens. Prompts come in chunks; the pool is so small that
    requests are preempted.
    """
    import tiny_models

    tiny_models.register_loader()
    small: dict[str, Any] = {
        "load_format": tiny_models.LOAD_FORMAT,
        "max_model_len": 448,
        "max_num_batched_tokens": 128,
        "max_num_seqs": 8,
        "block_size": 32,
        "num_gpu_blocks_override": 34,
    }
    ngram = {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1, "num_speculative_tokens": 3}
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "auto": ("auto", {}),
        "lossless": ("polarquant_lossless", {}),
        "coded": ("polarquant_k4v4", {}),
    }
    more: dict[str, tuple[str, dict[str, Any]]] = {
        "speculating": ("polarquant_lossless", {"speculative_config": ngram}),
        "one group": ("polarquant_lossless", {"disable_hybrid_kv_cache_manager": True}),
    }
    crowd, long = text_prompts(8, 250), text_prompts(2, 800)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            model = str(tiny_models.write(name, Path(folder)))
            options = small | ATTENTIONS[name] | {"dtype": dtype_of(name)}
            mine = found[name] = {}
            for way, (dtype, special) in (ways | (more if name == "exaone4" else {})).items():
                with _engine(dtype, model=model, **options, **special) as llm:
                    some = _completions(_generate(llm, crowd, max_tokens=64, ignore_eos=True))
                    preemptions = _counter(llm, "num_preemptions")
                    first = _completions(_generate(llm, long, max_tokens=16, ignore_eos=True))
                    again = _generate(llm, long, max_tokens=16, ignore_eos=True)
                    scored = _generate(llm, long, max_tokens=1, prompt_logprobs=0)
                    mine[way] = {
                        "crowd": some,
                        "preemptions": preemptions,
                        "first": first,
                        "cached": _completions(again),
                        "cached tokens": [output.num_cached_tokens for output in again],
                        "prompt tokens": [len(output.prompt_token_ids) for output in again],
                        "accepted": _counter(llm, "spec_decode_num_accepted_tokens"),
                        "logprobs": [
                            next(iter(position.values())).logprob
                            for output in scored
                            for position in output.prompt_logprobs[1:]
                        ],
                    }
    return found


def stored_prompts(dtype: str) -> dict[str, Any]:
    """Prompts that attend to what they stored, in one chunk and in several, alone and together."""
    prompts = text_prompts(4, 1800)
    found: dict[str, Any] = {}
    # Centres come from a pass in chunks of the engine's own size, which rounds otherwise.
    settings = {"polarquant": {"prefill_from_pages": True, "centre_keys": False}}
    for name, options in (
        ("whole", {"max_num_batched_tokens": 16384, "max_num_seqs": 1}),
        ("cut", {"max_num_batched_tokens": 192, "max_num_seqs": 4}),
    ):
        with _engine(dtype, **EXACT, **options, additional_config=settings) as llm:
            first = _generate(llm, prompts, max_tokens=1)
            again = _generate(llm, prompts, max_tokens=1)
            found[name] = {
                "first": _completions(first),
                "cached": _completions(again),
                "cached tokens": [output.num_cached_tokens for output in again],
                "prompt tokens": [len(output.prompt_token_ids) for output in again],
            }
    return found


def soak(dtype: str, requests: int) -> dict[str, Any]:
    """What the command prints, and its exit status."""
    import typer
    from typer.testing import CliRunner

    from vllm_polarquant.eval import soak

    app = typer.Typer()
    app.command()(soak.main)
    result = CliRunner().invoke(app, ["--kv-cache-dtype", dtype, "--requests", str(requests)])
    print(result.output)
    return json.loads(result.stdout[result.stdout.index("{\n") :]) | {"status": result.exit_code}


def lm_eval(folder: str, include: str, tasks: list[str]) -> dict[str, Any]:
    """Results of lm-eval's own adapter of vLLM, in a folder that is not the checkout."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    os.chdir(folder)
    results = simple_evaluate(
        model="vllm",
        model_args={
            "pretrained": MODEL,
            "kv_cache_dtype": "polarquant_k4v4",
            "enforce_eager": True,
            "kv_cache_memory_bytes": 64 << 20,
            "max_model_len": 4096,
            # Of long prompts, all but the last chunk is read off the pages.
            "max_num_seqs": 8,
            "max_num_batched_tokens": 256,
            "long_prefill_token_threshold": 32,
        },
        tasks=tasks,
        task_manager=TaskManager(include_path=include, include_defaults=False),
        batch_size="auto",
        limit=8,
        bootstrap_iters=0,
    )
    return {name: dict(found) for name, found in results["results"].items()}


def other_dtypes() -> dict[str, Any]:
    """Tokens of vLLM's own dtypes, and vLLM's words about dtypes that nobody has."""
    prompts = text_prompts(2, 1500) + [prompt for prompt, _ in questions(1000, 2)]
    found: dict[str, Any] = {}
    for dtype in ("auto", "fp8"):
        try:
            with _engine(dtype) as llm:
                outputs = _generate(llm, prompts, max_tokens=32)
                found[dtype] = [list(output.outputs[0].token_ids) for output in outputs]
        except (NotImplementedError, RuntimeError, ValueError) as problem:
            found[dtype] = str(problem)
    for dtype in ("polarquant_k9v9", "foo"):
        try:
            with _engine(dtype):
                found[dtype] = "booted"
        except Exception as problem:
            found[dtype] = f"{type(problem).__name__}: {problem}"
    found["plugin"] = "vllm_polarquant.plugin" in sys.modules
    return found


def tensor_parallel() -> dict[str, Any]:
    """Questions to two tensor-parallel workers behind an engine core, each in a process of its own."""
    with _engine("polarquant_k4v4", tensor_parallel_size=2, max_num_batched_tokens=512) as llm:
        return _capacity(llm) | _ask(llm, 1000, 5)


def _centring(llm: Any) -> dict[str, Any]:
    """What a worker's layers have after the pass at start-up, and what is left of its request."""

    def look(worker: Any) -> dict[str, Any]:
        from vllm_polarquant.centring import fingerprint
        from vllm_polarquant.layer import PolarQuantImpl

        runner = worker.model_runner
        layers = worker.vllm_config.compilation_config.static_forward_context
        impls = [getattr(layer, "impl", None) for layer in layers.values()]
        impls = [impl for impl in impls if isinstance(impl, PolarQuantImpl)]
        tables = [impl.tables for impl in impls]
        states = getattr(runner, "requests", None)
        return {
            "layers": len(impls),
            "reached": sum(bool((each.key_factors.abs() != 1).any()) for each in tables),
            "centred": sum(bool(each.centres.any()) for each in tables),
            "own tables": sum(impl.tables is not impl.constants for impl in impls),
            "tables": fingerprint(tables),
            "requests": len(runner.req_states.req_id_to_index if states is None else states),
            "samples": sum(impl.sample is not None for impl in impls),
            "shared": sum(impl.source is not None and impl.tables is impl.source.tables for impl in impls),
            "sinks": sum(
                impl.loaded_sinks is not None and impl.attention.sinks.equal(impl.loaded_sinks.float())
                for impl in impls
            ),
            "centres": [each.centres[0].clone() for each in tables],
        }

    return llm.collective_rpc(look)[0]


def _difference(have: dict[str, Any], want: dict[str, Any]) -> float:
    """Of the first segment's centres, in their energy."""
    import torch

    from vllm_polarquant.codec import unpack_centres

    mine, theirs = (
        torch.stack([unpack_centres(words, torch.bfloat16) for words in each["centres"]])
        for each in (have, want)
    )
    return float((mine - theirs).square().sum() / theirs.square().sum())


def centred() -> dict[str, Any]:
    """Engines with small batches and contexts, two at once, and with the switch off."""
    from vllm_polarquant.startup import OFF

    found: dict[str, Any] = {}
    preset = "polarquant_k4v4"
    options: dict[str, Any] = {"max_num_batched_tokens": 512}
    for name, more in (
        ("first", {}),
        ("chunks", {"max_num_batched_tokens": 96}),
        ("short", {"max_model_len": 100}),
    ):
        with _engine(preset, **(options | more)) as llm:
            found[name] = _centring(llm)
    for name in ("chunks", "short"):
        found[name]["difference"] = _difference(found[name], found["first"])
    with _engine(preset, **options) as llm, _engine("polarquant_k2v2", **options) as other:
        found["together"] = _centring(llm) | {"apart": _centring(other)["tables"]}
        found["together"]["right"] = _ask(llm, 1000, 5)["right"]
    print("engine off", flush=True)
    with _engine(preset, **options, additional_config=json.loads(OFF)) as llm:
        found["off"] = _centring(llm)
    try:
        with _engine(preset, **options, additional_config={"polarquant": {"centre_keys": "no"}}):
            found["wrong"] = "booted"
    except Exception as problem:
        found["wrong"] = str(problem)
    for result in found.values():
        if isinstance(result, dict):
            del result["centres"]
    found["off"] = {key: found["off"][key] for key in ("reached", "centred", "own tables", "requests")}
    return found


def kinds() -> dict[str, Any]:
    """What the pass reaches in engines on random weights for every folder under MODELS."""
    found: dict[str, Any] = {}
    options: dict[str, Any] = {
        "load_format": "dummy",
        "tokenizer": MODEL,
        "max_model_len": 512,
        "max_num_batched_tokens": 300,
    }
    for folder in sorted(Path(os.environ["MODELS"]).iterdir()):
        more = json.loads((folder / "options").read_text())
        try:
            with _engine("polarquant_k4v4", model=str(folder), **(options | more)) as llm:
                found[folder.name] = _centring(llm) | {"error": None}
                del found[folder.name]["centres"]
        except Exception as problem:
            found[folder.name] = {"error": str(problem)}
    return found


def boots() -> dict[str, Any]:
    """Engines on dummy weights for every folder under MODELS: the error that ended each boot, if any."""
    found: dict[str, Any] = {}
    for folder in sorted(Path(os.environ["MODELS"]).iterdir()):
        found[folder.name] = None
        print(f"\nbooting {folder.name}", flush=True)
        try:
            with _engine(
                "polarquant_k4v4",
                model=str(folder),
                dtype=(folder / "dtype").read_text(),
                load_format="dummy",
                skip_tokenizer_init=True,
                max_model_len=128,
            ):
                pass
        except Exception as problem:
            found[folder.name] = str(problem)
    return found


if __name__ == "__main__":
    if sys.argv[1:]:
        _answer(*sys.argv[1:])
    else:
        _serve()
