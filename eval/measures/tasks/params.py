"""What a suite may say of a task."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DATA_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Kinds of files with documents, by suffix, as the datasets library names them."""


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
    data: files by split, such as {"test": "test.jsonl", "train": "train.jsonl"}, that take the place of the
        task's data set on the hub.
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
    data: dict[str, str] = field(default_factory=dict)

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
        kinds = {DATA_FORMATS.get(Path(file).suffix) for file in self.data.values()}
        if None in kinds or len(kinds) > 1:
            raise ValueError(f"data: files must all be of one kind of {', '.join(DATA_FORMATS)}")
        for file in self.data.values():
            if not Path(file).is_file():
                raise ValueError(f"data: no file {file}")

    @property
    def data_format(self) -> str:
        """What lm-eval is to read the files of data as."""
        return DATA_FORMATS[Path(next(iter(self.data.values()))).suffix]
