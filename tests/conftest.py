"""Kernel tests run compiled on an NVIDIA GPU and under Triton's interpreter elsewhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

# Test files that run side by side, and their engines, get a core each: pools of threads that spin for the
# same cores take several times as long.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch

from vllm_polarquant.format import Slot

# Triton decides when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def patch_language_once_a_launch() -> None:
    """Spare Triton's interpreter a quarter of its time.

    At each call of a device function it looks through triton.language for what it has replaced already.
    """
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(function: Any) -> Any:
        names = id(function.__globals__)
        if names in patched:
            return None
        patched.add(names)
        return patch(function)

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_afresh


if os.environ.get("TRITON_INTERPRET") == "1":
    patch_language_once_a_launch()

# pytest's importlib mode leaves the helpers beside the tests unimportable.
sys.path.append(str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-case",
        action="store_true",
        help="run every case of tests whose cases are sampled: those of interpreted kernels, and marked ones",
    )


def values_of(item: pytest.Item) -> set[Any]:
    """Of a case's parameters; of a preset its codes, of keys and of values alike."""
    params = dict(item.callspec.params)
    preset = params.pop("preset", None)
    codes = {Slot(preset, 64).key, Slot(preset, 64).value} if preset else set()
    return codes | {(name, repr(value)) for name, value in params.items()}


def sample(cases: list[pytest.Item]) -> list[pytest.Item]:
    """Few of a test's cases that together have each value of each of its parameters."""
    missing = [(item, values_of(item)) for item in cases]
    chosen = []
    while missing and (best := max(missing, key=lambda case: len(case[1])))[1]:
        chosen.append(best[0])
        missing = [(item, values - best[1]) for item, values in missing if item is not best[0]]
    return chosen


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of each interpreted and each `sampled` test leave a sample; slow files begin.

    Interpreted cases are slow: each takes seconds, and all of them run compiled on a GPU.
    What has a value marked `gpu` is not interpreted. A slow file that came last would leave a core idle.
    """
    left_out: set[pytest.Item] = set()
    sampled: dict[Any, list[pytest.Item]] = {}
    for item in items:
        callspec = getattr(item, "callspec", None)
        interpreted = callspec is not None and callspec.params.get("device") == "interpreter"
        if interpreted and item.get_closest_marker("gpu"):
            left_out.add(item)
        elif interpreted or item.get_closest_marker("sampled"):
            cases = sampled.setdefault((item.path, item.originalname), [])
            if interpreted:
                item.add_marker(pytest.mark.slow)
            cases.append(item)
    if not config.getoption("every_case"):
        left_out |= {item for cases in sampled.values() for item in set(cases) - set(sample(cases))}
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a kernel test runs: on the CPU, interpreted, or compiled on a GPU."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if request.param == "interpreter":
        if not interpreted:
            pytest.skip("the kernels are compiled here, set TRITON_INTERPRET=1 to interpret them")
        return torch.device("cpu")
    if interpreted or not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU and compiled kernels")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
