"""Generate codebook.json: the points of the trellis codes, for independent unit-variance Gaussians.

    python -m vllm_polarquant.codebook > vllm_polarquant/codebook.json

A window (n, middle, s) of a trellis, s being the state it starts from and n the one it leads to, names a
point. The points start as a square lattice, cut into 2 x 2, 4 x 4 or 8 x 8 coarser ones: each pair (s, n)
gets one of them, so that its parallel branches lie far apart, and those that leave a state make a lattice
too, as do those that enter one (set partitioning, Ungerboeck, IEEE Trans. Inf. Theory 28, 1982). The disc
of the lattice is stretched so that its points get the density of a Gaussian, narrower than the source's, as
a trellis rarely takes what lies far out.

Then Lloyd's iteration (IEEE Trans. Inf. Theory 28, 1982): encode Gaussian vectors, move each point to the
mean of the pairs that chose it. Encoding with points that are moved about, less and less, keeps it out of
poor optima. The coordinates are rounded to bfloat16. Nothing is fitted to any model's data.
"""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import torch

from vllm_polarquant.codec import viterbi, windows
from vllm_polarquant.format import STATE_BITS

_WIDTH = 0.82
"""Radius of the lattice's disc after stretching, relative to the best for codes without a trellis."""

_HEAT = 0.2
"""How far points are moved at first, relative to the distance between neighbours."""


def lattice(pair_bits: int) -> np.ndarray:
    """The points before Lloyd's iteration, float64 [2**(pair_bits + state_bits), 2], by window."""
    states = STATE_BITS[pair_bits]
    parallel = 1 << (pair_bits - states)
    line = np.arange(-32, 32)
    i, j = (axis.ravel() for axis in np.meshgrid(line, line, indexing="ij"))
    place = np.stack([i, j], -1) + 0.5
    length = np.hypot(place[:, 0], place[:, 1])
    order = np.argsort(length, kind="stable")
    i0, i1, i2, j0, j1, j2 = (axis >> bit & 1 for axis in (i, j) for bit in range(3))
    if states == 1:
        start, end = i0 ^ j0, i0
    elif states == 2:
        start, end = 2 * i0 + j0, 2 * (i1 ^ j1 ^ j0) + (j1 ^ i0)
    else:
        mixed = i0 ^ j0 ^ i1
        start, end = 4 * i0 + 2 * j0 + (i1 ^ j1), 4 * mixed + 2 * (mixed ^ j1 ^ i2) + (j2 ^ i0)
    chosen = np.empty((1 << states, parallel, 1 << states), np.int64)
    for s in range(1 << states):
        for n in range(1 << states):
            chosen[n, :, s] = order[(start[order] == s) & (end[order] == n)][:parallel]
    at = chosen.ravel()
    # Of n points in a disc, a share length**2 * pi / n lies within `length`.
    share = np.minimum(length[at] ** 2 * math.pi / len(at), 1 - 0.3 / len(at))
    stretched = _WIDTH * 2 * np.sqrt(-np.log(1 - share))
    return place[at] * (stretched / length[at])[:, None]


def gaussian_vectors(vectors: int, seed: int) -> np.ndarray:
    """Gaussian vectors of 64 pairs, scaled to unit variance each: float32 [vectors, 64, 2]."""
    pairs = np.random.default_rng(seed).standard_normal((vectors, 64, 2)).astype(np.float32)
    return pairs * (math.sqrt(128) / np.sqrt((pairs**2).sum((1, 2), keepdims=True)))


def trellis_points(pair_bits: int, vectors: int = 384, iterations: int = 200) -> np.ndarray:
    """The points of the code, float64 [2**(pair_bits + state_bits), 2]."""
    points = lattice(pair_bits)
    rng = np.random.default_rng(pair_bits)
    for i in range(iterations):
        pairs = gaussian_vectors(vectors, 1000 + i)
        heat = _HEAT * max(0.0, 1 - i / (0.7 * iterations)) * 2 ** (1 - pair_bits / 2)
        moved = points + heat * rng.standard_normal(points.shape)
        codes = viterbi(torch.from_numpy(pairs), torch.from_numpy(moved).float(), STATE_BITS[pair_bits])
        window = windows(codes, pair_bits).numpy().ravel()
        flat = pairs.reshape(-1, 2)
        sums = np.stack([np.bincount(window, flat[:, k], len(points)) for k in (0, 1)], -1)
        # Half a sample more where the point is keeps points that few vectors choose from jumping.
        mass = np.bincount(window, minlength=len(points))
        points = (sums + 0.5 * points) / (mass + 0.5)[:, None]
    return points


def main() -> None:
    rounded = {w: torch.from_numpy(trellis_points(w)).bfloat16().tolist() for w in STATE_BITS}
    json.dump(rounded, sys.stdout, separators=(",", ":"))
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
