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

# Triton decides when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# pytest's importlib mode leaves the helpers beside the tests unimportable.
sys.path.append(str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-case",
        action="store_true",
        help="interpret every case of the kernel tests, not a sample that has each value of each parameter",
    )


def sample(cases: list[pytest.Item]) -> list[pytest.Item]:
    """Few of a test's cases that together have each value of each of its parameters."""
    missing = [
        (item, {(name, repr(value)) for name, value in item.callspec.params.items()}) for item in cases
    ]
    chosen = []
    while missing and (best := max(missing, key=lambda case: len(case[1])))[1]:
        chosen.append(best[0])
        missing = [(item, values - best[1]) for item, values in missing if item is not best[0]]
    return chosen


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of each interpreted kernel test leave a sample, all but the first case of it slow; slow files begin.

    Each interpreted case takes seconds, and all of them run compiled on a GPU. A slow file that came last
    would leave a core idle.
    """
    interpreted: dict[Any, list[pytest.Item]] = {}
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and callspec.params.get("device") == "interpreter":
            interpreted.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    left_out = set()
    for cases in interpreted.values():
        for item in cases[1:]:
            item.add_marker(pytest.mark.slow)
        if not config.getoption("every_case"):
            left_out |= set(cases) - set(sample(cases))
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
