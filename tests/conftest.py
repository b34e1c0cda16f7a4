"""Kernel tests run compiled on an NVIDIA GPU and under Triton's interpreter elsewhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path

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


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow all cases but the first of each interpreted kernel test, and begin with slow files.

    Each interpreted case takes seconds. A slow file that came last would leave a core idle.
    """
    seen = set()
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and callspec.params.get("device") == "interpreter":
            test = (item.path, getattr(item, "originalname", item.name))
            if test in seen:
                item.add_marker(pytest.mark.slow)
            seen.add(test)
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
