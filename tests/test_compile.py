"""Decode attention, PTX and all, and the store kernel, compiled for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RESERVED = 1024
"""Static shared memory that the driver keeps for itself from compute capability 9.0 on."""
UNASKED = 48 << 10
"""Static and dynamic shared memory that a launch gets without asking for more, which Triton's launcher does
only where the dynamic part alone is more."""
MULTIPROCESSOR = {80: 164 << 10, 89: 100 << 10, 90: 228 << 10, 120: 100 << 10}
"""Shared memory of a multiprocessor."""

CASES = [
    (80, "polarquant_k4v4", 128, 1),
    (89, "polarquant_k8v4", 64, 1),
    (90, "polarquant_k4v4", 128, 1),
    (120, "polarquant_k4v3", 128, 1),
    (90, "polarquant_k3v3", 128, 34),
    (80, "polarquant_k2.5v2.5", 80, 0),
    (90, "polarquant_k3.5v3.5", 128, -1),
    (90, "polarquant_k8v4", 128, -2),
]
"""Every generation, every kernel, one row a tile and several, plain and with all there is."""
MORE_CASES = [
    (90, "polarquant_k4v4", 128, 2),
    (90, "polarquant_k4v3", 256, 2),
    (89, "polarquant_k2v2", 192, -1),
    (90, "polarquant_k4v3", 128, 0),
    (90, "polarquant_k2v2", 256, -1),
    (80, "polarquant_k4v3", 80, -2),
    (90, "polarquant_k4v4", 128, 12),
    (90, "polarquant_k4v4", 128, 31),
    (90, "polarquant_k3.5v3.5", 128, 22),
    (90, "polarquant_k4v3", 128, 28),
    (90, "polarquant_k8v4", 512, 1),
    (90, "polarquant_k4v4", 512, 32),
    (90, "polarquant_k2v2", 512, -1),
    (90, "polarquant_k4v4", 512, 0),
    (89, "polarquant_k4v4", 512, 2),
]
"""Each takes 4 to 20 seconds."""


@pytest.mark.slow
def test_kernels_compile_for_every_generation_and_can_be_launched(request: pytest.FixtureRequest) -> None:
    cases = CASES + (MORE_CASES if request.config.getoption("every_case") else [])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, script, json.dumps(cases)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for case, (static, dynamic, registers, together) in zip(cases, json.loads(done.stdout), strict=True):
        reserved = RESERVED if case[0] >= 90 else 0
        programs = {80: 2, 90: max(2, together)}.get(case[0], 1)
        assert static > reserved or dynamic > 0
        assert static - reserved + dynamic <= UNASKED or dynamic > UNASKED, case
        assert programs * (max(static, static - reserved + 1024) + dynamic) <= MULTIPROCESSOR[case[0]], case
        # So many that as many programs run together as kernels/triton/configs counts on.
        few = case[3] > 0 and case[3] % 10 <= 4 and case[2] <= 128
        assert registers <= (128 if few else 255), case
