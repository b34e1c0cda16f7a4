"""Tasks of lm-evaluation-harness as a measure, run by its own vLLM backend on the worker's engine.

How quantised pages get into it. The first chunk of a prefill attends to keys and values that were never
stored: a prompt that is scored in one chunk shows nothing of the cache. So prompts come in chunks of `chunk`
tokens, `requests` of them at a time, and a token reads off the pages all but the at most `chunk` - 1 tokens
before it. With a chunk of 1 it reads all of them as in generation; scores of choices and texts are to use
that. Answers that are generated read their whole prompt off the pages, whatever the chunk, except that the
prompt's last chunk, from which the first token comes, is fresh to itself. Chunks are part of a suite, and of
the results' names. vLLM computes a prompt anew when it is asked for its log-probabilities, so prefix caching
changes nothing there; lm-eval's cache of answers and its cache of requests stay off.

Repeats are runs of their own with seeds of their own (lm-eval's `repeats` keeps only the first answer), and a
document's outcome is their mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_polarquant.eval.measures.base import Measure, Outcome
from vllm_polarquant.eval.measures.tasks.backend import backend, count_cut_prompts
from vllm_polarquant.eval.measures.tasks.lookup import identify, lookup, metadata, objects, prepare
from vllm_polarquant.eval.measures.tasks.outcomes import NATS, RIGHT_CHOICE, collect
from vllm_polarquant.eval.measures.tasks.params import Params
from vllm_polarquant.eval.measures.tasks.summary import summarise


def _engine(params: Params) -> dict[str, Any]:
    return {
        "max_model_len": params.max_model_len,
        "max_num_seqs": params.requests,
        "max_num_batched_tokens": params.chunk * params.requests,
        "long_prefill_token_threshold": params.chunk,
    }


def _run(llm: Any, params: Params, seed: int, baseline: Outcome | None) -> Outcome:
    import lm_eval

    model = llm.llm_engine.model_config.model
    tasks = objects(model, params)
    lm = backend(llm, params)
    runs = []
    with count_cut_prompts() as cut:
        for repeat in range(params.repeats):
            found = lm_eval.simple_evaluate(
                model=lm,
                tasks=tasks,
                # Without it lm-eval reads the index of all its tasks again.
                task_manager=lookup(params.task, params.include, metadata(model, params)),
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
    identity=identify,
    prepare=prepare,
)
