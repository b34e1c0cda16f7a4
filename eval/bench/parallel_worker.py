"""The child that boots one engine over several devices and says what it answers and what its ranks hold."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from vllm_polarquant.eval import isolate


def layer_tables(worker: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Centres and keys' factors of a rank's layers, float32 [segments or 1, kv heads, d]; runs inside it."""
    from vllm_polarquant.codec import unpack_centres
    from vllm_polarquant.layer import PolarQuantImpl

    found = {}
    for name, layer in worker.vllm_config.compilation_config.static_forward_context.items():
        impl = getattr(layer, "impl", None)
        if isinstance(impl, PolarQuantImpl):
            centres = unpack_centres(impl.tables.centres, impl.shape.dtype)
            factors = impl.tables.key_factors.float()[None]
            found[name] = (centres.cpu().numpy(), factors.cpu().numpy())
    return found


def measure(job: dict[str, Any]) -> dict[str, np.ndarray]:
    """Greedy tokens, next-token scores of a text and, as LAYER/KIND/RANK, the tables of every rank."""
    from vllm import SamplingParams

    from vllm_polarquant.eval.engine import engine
    from vllm_polarquant.eval.measures import next_token
    from vllm_polarquant.eval.measures.text import HELDOUT, token_rows

    params = next_token.Params(rows=job["rows"], context=job["context"])
    # Fed a token a step, so that all that is read comes off the pages.
    options = next_token.MEASURE.engine(params) | {"max_model_len": job["context"] + job["tokens"] + 1}
    with engine(job["model"], job["dtype"], seed=0, **options, **job["engine"]) as llm:
        rows = token_rows(llm.get_tokenizer(), HELDOUT, params.rows, params.context)
        found = next_token.score(llm, rows, params.top)
        greedy = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": row} for row in rows], greedy, use_tqdm=False)
        found["greedy"] = np.array([output.outputs[0].token_ids for output in outputs], np.int32)
        for rank, layers in enumerate(llm.collective_rpc(layer_tables)):
            for name, (centres, factors) in layers.items():
                found[f"{name}/centres/{rank}"], found[f"{name}/factors/{rank}"] = centres, factors
    return found


def work(job: dict[str, Any], report: isolate.Report) -> None:
    """Write what was measured to the job's file and report it, or report why there is nothing."""
    try:
        found = measure(job)
    except Exception as problem:
        report({"error": f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:500]})
        raise
    np.savez(job["file"], allow_pickle=False, **found)
    report({"file": job["file"]})


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Lets collective_rpc send layer_tables to the ranks, which this process started.
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    isolate.serve(work)
