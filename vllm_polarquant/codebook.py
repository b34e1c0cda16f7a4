"""Generate codebook.json: the points of the trellis codes, for independent unit-variance Gaussians.

    python -m vllm_polarquant.codebook > vllm_polarquant/codebook.json

The points of a w-bit code start as a lattice: the 2**w points of Z^2 + (1/4, 1/4) nearest to the origin.
Flipping their signs gives the three other cosets of Z^2 in (Z/2 + 1/4)^2, so what a trellis with both flips
chooses from is a square lattice four times as dense. Two steps of Ungerboeck's set partition (IEEE Trans.
Inf. Theory 28, 1982) split Z^2 into the codebook's quarters, each of them a square lattice twice as wide;
within a quarter, points are in order of length. The lattice's disc is stretched so that its points get the
density of a Gaussian, narrower than the source's, as a trellis rarely takes what lies far out.

Then Lloyd's iteration (IEEE Trans. Inf. Theory 28, 1982): encode Gaussian vectors, move each point to the
mean of what chose it, signs undone. The coordinates are rounded to bfloat16.
"""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import torch

from vllm_polarquant.codec import _FLIPS, viterbi

_WIDTH = {4: 0.78, 5: 0.80, 6: 0.82, 7: 0.85, 8: 0.85}
"""Radius of the lattice's disc after stretching, relative to the best for codes without a trellis."""


def lattice(pair_bits: int) -> np.ndarray:
    """The points before Lloyd's iteration, float64 [2**pair_bits, 2]."""
    n = 1 << pair_bits
    line = np.arange(-32, 32)
    i, j = (axis.ravel() for axis in np.meshgrid(line, line, indexing="ij"))
    place = np.stack([i, j], -1) + 0.25
    first = (i + j) & 1
    # The sublattice of even i + j is Z^2 turned by 45 degrees.
    second = ((i - first + j) >> 1) + ((i - first - j) >> 1) & 1
    quarter = first + 2 * second
    length = np.hypot(place[:, 0], place[:, 1])
    order = np.argsort(length, kind="stable")
    chosen = np.concatenate([order[quarter[order] == q][: n // 4] for q in range(4)])
    # Of n points in a disc, a share length**2 * pi / n lies within `length`.
    share = np.minimum(length[chosen] ** 2 * math.pi / n, 1 - 0.3 / n)
    stretched = _WIDTH[pair_bits] * 2 * np.sqrt(-np.log(1 - share))
    return place[chosen] * (stretched / length[chosen])[:, None]


def trellis_points(pair_bits: int, vectors: int = 4096, iterations: int = 20) -> np.ndarray:
    """The points of the code, float64 [2**pair_bits, 2], trained on vectors of 64 pairs."""
    pairs = np.random.default_rng(pair_bits).standard_normal((vectors, 64, 2)).astype(np.float32)
    pairs *= math.sqrt(128) / np.sqrt((pairs**2).sum((1, 2), keepdims=True))
    points = lattice(pair_bits)
    n, shift = len(points), pair_bits - 2
    for _ in range(iterations):
        codes = viterbi(torch.from_numpy(pairs), torch.from_numpy(points).float()).numpy()
        top = np.pad(codes >> shift, ((0, 0), (2, 0)))
        index = (codes ^ ((top[:, 1:-1] ^ top[:, :-2]) << shift)).ravel()
        unflipped = (pairs * _FLIPS.numpy()[top[:, 1:-1]]).reshape(-1, 2)
        # One more sample where the point is keeps points that few vectors choose from jumping.
        mass = np.bincount(index, minlength=n) + 1
        points = np.stack([np.bincount(index, unflipped[:, k], n) + points[:, k] for k in (0, 1)], -1)
        points /= mass[:, None]
    return points


def main() -> None:
    rounded = {w: torch.from_numpy(trellis_points(w)).bfloat16().tolist() for w in range(4, 9)}
    json.dump(rounded, sys.stdout, separators=(",", ":"))
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
