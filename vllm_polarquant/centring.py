"""What a layer's keys have in common, and how uneven their pairs are, from one request's keys and queries.

Half to all of a key's energy is its mean over tokens, which attention does not need: adding one vector to
all keys moves all logits of a query alike. RoPE turns the mean with the position, so the keys are turned
back, averaged, and the mean is turned forth again, averaged over each segment of positions. The first
tokens' keys are short (attention sinks), so that taking the mean away would lengthen them: they are left
out of it, and the codec stores them as they are.

Pairs of coordinates that RoPE turns together are then scaled so that keys' noise falls where queries have
little power. Scales commute with RoPE, and no logit changes: keys are multiplied, queries divided.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from vllm_polarquant.codec import Tables, pack_centres
from vllm_polarquant.format import SEGMENT

FLOOR = 0.001
"""The least power of a pair, of the mean one's: a pair that is never used has no finite scale."""

_ROUNDS = 3
_CHUNK = 64


class Rope(NamedTuple):
    """How keys turn with their position.

    cos_sin: float [positions, 2 * pairs], cosines and then sines of each pair's angle, perhaps both times
        one factor.
    means: float64 [segments, 2 * pairs], their means over each segment's positions.
    pairs: int64 [2, pairs], the two coordinates of each pair; the others do not turn.
    """

    cos_sin: torch.Tensor
    means: torch.Tensor
    pairs: torch.Tensor

    @classmethod
    def of(cls, cos_sin: torch.Tensor, interleaved: bool, segments: int) -> Rope:
        """From a model's own table.

        cos_sin: float [positions, 2 * pairs]. Segments past its last position are like the last one that has
            any.
        interleaved: whether pairs are neighbours, and not half of the turning coordinates apart.
        """
        width = cos_sin.shape[1]
        turning = torch.arange(width, device=cos_sin.device)
        pairs = turning.unflatten(0, (-1, 2)).T if interleaved else turning.unflatten(0, (2, -1))
        full = min(segments, len(cos_sin) // SEGMENT)
        whole = cos_sin[: full * SEGMENT].unflatten(0, (full, SEGMENT))
        # In parts, as a long table in 64 bits is larger than what it was made for.
        means = torch.cat([part.double().mean(1) for part in whole.split(_CHUNK)])
        rest = cos_sin[full * SEGMENT : (full + 1) * SEGMENT]
        if full < segments and len(rest):
            means = torch.cat([means, rest.double().mean(0, keepdim=True)])
        return cls(cos_sin, torch.cat([means, means[-1:].expand(segments - len(means), -1)]), pairs)

    def undo(self, x: torch.Tensor) -> torch.Tensor:
        """x float64 [n, H, d] of positions 0 .. n - 1, turned back to position 0."""
        cos, sin = self.cos_sin[: len(x), None].to(x.dtype).chunk(2, -1)
        norm = cos.square() + sin.square()
        return self._turned(x, cos / norm, -sin / norm)

    def segment_means(self, x: torch.Tensor) -> torch.Tensor:
        """x float64 [H, d] at position 0 -> [segments, H, d], averages of x at a segment's positions."""
        cos, sin = self.means[:, None].chunk(2, -1)
        return self._turned(x.expand(len(cos), -1, -1), cos, sin)

    def _turned(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = self.pairs
        out = x.clone()
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., second] * cos + x[..., first] * sin
        return out


class Centring(NamedTuple):
    """Of one layer, on its keys' device.

    centres: float64 [segments, kv heads, d], in the model's basis; zeros for a head without.
    scales: float64 [kv heads, d], > 0, geometric mean 1.
    removed: float64 [kv heads], the share of the keys' energy that centres take away, 0 to 1.
    """

    centres: torch.Tensor
    scales: torch.Tensor
    removed: torch.Tensor


def centre_keys(
    key: torch.Tensor, query_power: torch.Tensor, ropes: Sequence[Rope], segments: int
) -> Centring:
    """Work out a layer's centres and scales.

    Args:
        key: [n, kv heads, d], RoPE applied, of the request's positions 0 .. n - 1; n > 1.
        query_power: float [kv heads, d], sums of squares of the queries that read each head.
        ropes: what may turn this layer's keys. They turn by whichever makes keys most alike, or not at all
            if none does.
        segments: of the layer's table and of ropes.

    A head whose keys or queries hold a NaN or an infinity gets neither centre nor scales; one whose keys'
    energy its centre does not lower, no centre.
    """
    key = key.double()
    finite = (key.isfinite().all(-1).all(0) & query_power.isfinite().all(-1))[:, None]
    key = torch.where(finite, key, 0.0)
    energy = key.square().sum(-1)
    rope, mean, usual = _turning(key, energy, ropes)
    centres = rope.segment_means(mean) if rope else mean.expand(segments, -1, -1)
    at = (torch.arange(len(key), device=key.device) // SEGMENT).clamp_max(segments - 1)
    left = key - centres[at]
    shorter = left.square().sum(-1)
    lowered = ((shorter - energy) * usual).sum(0) < 0
    centres = torch.where(lowered[:, None], centres, 0.0)
    centred = usual & (shorter < energy) & lowered
    left = torch.where(centred[..., None], left, key)
    total = energy.sum(0)
    removed = 1 - torch.where(total > 0, left.square().sum((0, -1)) / total, 1.0)

    # A key that keeps its mean lies among none that does: it is no part of the noise to be balanced.
    counted = torch.where(lowered, centred, usual).to(key.dtype)
    key_power = torch.einsum("nh,nhd->hd", counted, left.square())
    scales = (_power(query_power.double(), rope, ropes) / _power(key_power, rope, ropes)) ** 0.25
    scales = scales / scales.log().mean(-1, keepdim=True).exp()
    return Centring(centres, torch.where(finite, scales, 1.0), removed)


def _mean(key: torch.Tensor, energy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mean of keys [n, H, d] but the first and those that are nearer to 0 than to it.

    energy: [n, H], of the keys. Returns the mean [H, d], which keys are the others [n, H], and what energy is
    left when the mean is taken from every key [n, H].
    """
    usual = torch.ones_like(energy, dtype=torch.bool)
    usual[0] = False
    for _ in range(_ROUNDS):
        weight = usual.to(key.dtype)
        mean = torch.einsum("nh,nhd->hd", weight, key) / weight.sum(0).clamp_min(1)[:, None]
        left = energy - 2 * torch.einsum("nhd,hd->nh", key, mean) + mean.square().sum(-1)
        usual = left < energy
        usual[0] = False
    return mean, usual, left


def _turning(
    key: torch.Tensor, energy: torch.Tensor, ropes: Iterable[Rope]
) -> tuple[Rope | None, torch.Tensor, torch.Tensor]:
    """By what keys turn: what leaves least of their energy where their mean makes them shorter.

    Returns that, and `_mean` of the keys turned back: the mean and which keys it is of.
    """
    best: tuple[Rope | None, torch.Tensor, torch.Tensor] | None = None
    least = math.inf
    # RoPE first: where keys have no mean, any will do.
    for rope in (*ropes, None):
        if rope and (len(rope.cos_sin) < len(key) or rope.cos_sin.shape[1] > key.shape[-1]):
            continue
        back = rope.undo(key) if rope else key
        # Where a table is another's, turning back need not keep lengths.
        length = back.square().sum(-1)
        mean, usual, left = _mean(back, length)
        share = torch.minimum(left, length).sum(0) / length.sum(0).clamp_min(1e-300)
        spread = float(share.mean()) * (1 + 1e-9)
        if spread < least:
            best, least = (rope, mean, usual), float(share.mean())
    assert best is not None
    return best


def _power(power: torch.Tensor, rope: Rope | None, ropes: Sequence[Rope]) -> torch.Tensor:
    """Powers [H, d] of coordinates as those of what may be scaled apart, no lower than FLOOR of the mean."""
    d = power.shape[-1]
    pairs = rope.pairs if rope else None
    if rope is None and not ropes:
        # Nothing is known of how they turn: as most models do.
        pairs = torch.arange(d, device=power.device).view(2, -1)
    if pairs is not None:
        power = power.clone()
        power[:, pairs] = power[:, pairs].mean(1, keepdim=True)
    mean = power.mean(-1, keepdim=True)
    return torch.where(mean > 0, torch.maximum(power, FLOOR * mean), 1.0)


def fill(tables: Tables, centring: Centring, dtype: torch.dtype) -> None:
    """Write a layer's centring to its tables, in place: captured graphs hold their addresses.

    tables: with centres [segments, kv heads, d / 2] and factors of keys and queries [kv heads, d], as made
        by `layer_tables`.
    dtype: the model's 16-bit float type.
    """
    signs = tables.key_factors.sign()
    factors = centring.scales.to(signs)
    tables.key_factors.copy_(signs * factors)
    tables.query_factors.copy_(signs / factors)
    centres = (centring.centres * tables.key_factors.double()) @ tables.mixing.double().T
    tables.centres.copy_(pack_centres(centres, dtype))


def layer_tables(shared: Tables, num_kv_heads: int, segments: int) -> Tables:
    """Tables of one layer, centres zero and factors even: those and no others are its own.

    shared: of codec.tables, whose constants all layers of a shape read.
    """
    head_dim = shared.mixing.shape[0]
    return shared._replace(
        key_factors=shared.key_factors.expand(num_kv_heads, -1).clone(),
        query_factors=shared.query_factors.expand(num_kv_heads, -1).clone(),
        centres=torch.zeros(
            segments, num_kv_heads, head_dim // 2, dtype=torch.int32, device=shared.mixing.device
        ),
    )


def fingerprint(tables: Iterable[Tables]) -> str:
    """Names what pages written with these tables of several layers mean, beside their format."""
    digest = hashlib.sha256()
    for layer in tables:
        for part in (layer.centres, layer.key_factors, layer.query_factors):
            digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
