"""Generate spiral.json: the radii of the golden-angle spiral codes.

    python -m vllm_polarquant.codebook > vllm_polarquant/spiral.json

Code t of n stands at angle t * GOLDEN_ANGLE. A quantiser of a two-dimensional Gaussian is best when its
points are as dense as the square root of the Gaussian (Panter and Dite 1951, Gersho 1979), so the spiral
starts with radius 2 sqrt(-ln(1 - (t + 1/2) / n)), where a share (t + 1/2) / n of that density lies
inside. For small n the formula is 5-10 % off the optimum, so Lloyd's iteration (Lloyd 1982) then moves
each point along its ray to the centroid of its cell. Nothing is fitted to any model's data.
"""

from __future__ import annotations

import json
import math
import sys

import numpy as np

GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))


def gaussian_grid(rings: int = 400, phases: int = 401) -> tuple[np.ndarray, np.ndarray]:
    """Equally likely points [rings * phases, 2] of a standard two-dimensional Gaussian."""
    radius = np.sqrt(-2 * np.log(1 - (np.arange(rings) + 0.5) / rings))
    angle = np.arange(phases) * (2 * math.pi / phases)
    # Each ring is turned by the golden angle, so that no ray of grid points favours a code.
    turned = angle[None, :] + GOLDEN_ANGLE * np.arange(rings)[:, None]
    points = np.stack([radius[:, None] * np.cos(turned), radius[:, None] * np.sin(turned)], -1)
    return points.reshape(-1, 2), np.full(rings * phases, 1 / (rings * phases))


def spiral_radii(n: int, iterations: int = 100) -> np.ndarray:
    """Radii float64 [n] of the n-point spiral, for coordinates of unit variance."""
    code = np.arange(n)
    ray = np.stack([np.cos(code * GOLDEN_ANGLE), np.sin(code * GOLDEN_ANGLE)], -1)
    radius = 2 * np.sqrt(-np.log(1 - (code + 0.5) / n))
    grid, weight = gaussian_grid()
    for _ in range(iterations):
        points = radius[:, None] * ray
        nearest = np.empty(len(grid), np.int64)
        for start in range(0, len(grid), 16384):
            part = grid[start : start + 16384]
            nearest[start : start + 16384] = (part @ points.T - (points**2).sum(-1) / 2).argmax(-1)
        along = (grid * ray[nearest]).sum(-1)
        mass = np.bincount(nearest, weight, n)
        moment = np.bincount(nearest, weight * along, n)
        radius = np.where(mass > 0, moment / np.maximum(mass, 1e-300), radius)
    return radius


def main() -> None:
    table = {str(2**w): [round(float(r), 5) for r in spiral_radii(2**w)] for w in range(4, 9)}
    json.dump(table, sys.stdout, separators=(",", ":"))
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
