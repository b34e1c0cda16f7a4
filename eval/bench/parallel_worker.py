"""The child that boots one engine over several devices and says what it answers and what its ranks hold."""

from __future__ import annotations

import asyncio
import contextlib
import os
from types import SimpleNamespace
from typing import Any

import numpy as np

from vllm_polarquant.eval import isolate

Packed = tuple[list[int], bytes]


def _packed(array: Any) -> Packed:
    """Shape and bytes of a tensor in float32, which an engine in another process can send as they are."""
    plain = array.detach().float().cpu().contiguous()
    return list(plain.shape), plain.numpy().tobytes()


def layer_tables(worker: Any) -> dict[str, tuple[Packed, Packed]]:
    """Centres and keys' factors of a rank's layers, [segments or 1, kv heads, d]; runs inside it."""
    from vllm_polarquant.codec import unpack_centres
    from vllm_polarquant.layer import PolarQuantImpl

    found = {}
    for name, layer in worker.vllm_config.compilation_config.static_forward_context.items():
        impl = getattr(layer, "impl", None)
        if isinstance(impl, PolarQuantImpl):
            centres = unpack_centres(impl.tables.centres, impl.shape.dtype)
            found[name] = (_packed(centres), _packed(impl.tables.key_factors[None]))
    return found


def _unpacked(ranks: list[dict[str, tuple[Packed, Packed]]]) -> dict[str, np.ndarray]:
    """Tables of all ranks as LAYER/KIND/RANK."""
    return {
        f"{name}/{kind}/{rank}": np.frombuffer(data, np.float32).reshape(shape)
        for rank, layers in enumerate(ranks)
        for name, tables in layers.items()
        for kind, (shape, data) in zip(("centres", "factors"), tables, strict=True)
    }


class _DataParallel:
    """One engine of several that vLLM starts together, used as an LLM is.

    vLLM's LLM knows no data parallelism of dense models; its server's AsyncLLM does.
    """

    def __init__(self, model: str, dtype: str, options: dict[str, Any]) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.rank, self.size = 0, options["data_parallel_size"]
        self.loop = asyncio.Runner()
        arguments = AsyncEngineArgs(model=model, kv_cache_dtype=dtype, **options)

        async def start() -> Any:
            return AsyncLLM.from_engine_args(arguments)

        self.engine = self.loop.run(start())
        self.llm_engine = SimpleNamespace(model_config=self.engine.model_config)

    def get_tokenizer(self) -> Any:
        return self.engine.get_tokenizer()

    def generate(self, prompts: list[Any], params: Any, use_tqdm: bool = False) -> list[Any]:
        async def one(number: int, prompt: Any) -> Any:
            name = f"{self.rank}-{id(prompts)}-{number}"
            async for output in self.engine.generate(prompt, params, name, data_parallel_rank=self.rank):
                last = output
            return last

        async def every() -> list[Any]:
            return await asyncio.gather(*(one(*each) for each in enumerate(prompts)))

        return self.loop.run(every())

    def collective_rpc(self, method: Any) -> list[Any]:
        """Of the first engine: vLLM gives no other's."""
        return list(self.loop.run(self.engine.collective_rpc(method)))

    def close(self) -> None:
        self.engine.shutdown()
        self.loop.close()


def _answers(llm: Any, job: dict[str, Any], params: Any) -> dict[str, np.ndarray]:
    """Greedy tokens and next-token scores of a text."""
    from vllm import SamplingParams

    from vllm_polarquant.eval.measures import next_token
    from vllm_polarquant.eval.measures.text import HELDOUT, token_rows

    rows = token_rows(llm.get_tokenizer(), HELDOUT, params.rows, params.context)
    found = next_token.score(llm, rows, params.top)
    greedy = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": row} for row in rows], greedy, use_tqdm=False)
    return found | {"greedy": np.array([output.outputs[0].token_ids for output in outputs], np.int32)}


def measure(job: dict[str, Any]) -> list[dict[str, np.ndarray]]:
    """Of each engine beside others what it answers and, with the first, the tables of its ranks."""
    from vllm_polarquant.eval.engine import engine
    from vllm_polarquant.eval.measures import next_token

    params = next_token.Params(rows=job["rows"], context=job["context"])
    # Fed a token a step, so that all that is read comes off the pages.
    options = next_token.MEASURE.engine(params) | {"max_model_len": job["context"] + job["tokens"] + 1}
    options |= {"seed": 0} | job["engine"]
    if options.get("data_parallel_size", 1) == 1:
        with engine(job["model"], job["dtype"], **options) as llm:
            return [_answers(llm, job, params) | _unpacked(llm.collective_rpc(layer_tables))]
    with contextlib.closing(_DataParallel(job["model"], job["dtype"], options)) as together:
        found = []
        for rank in range(together.size):
            together.rank = rank
            found.append(_answers(together, job, params))
        found[0] |= _unpacked(together.collective_rpc(layer_tables))
    return found


def work(job: dict[str, Any], report: isolate.Report) -> None:
    """Write what was measured to files and report them, or report why there is nothing."""
    try:
        found = measure(job)
    except Exception as problem:
        report({"error": isolate.why(problem)})
        raise
    files = [f"{job['files']}-{number}.npz" for number in range(len(found))]
    for file, arrays in zip(files, found, strict=True):
        np.savez(file, allow_pickle=False, **arrays)
    report({"files": files})


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Lets collective_rpc send layer_tables to the ranks, which this process started.
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    isolate.serve(work)
