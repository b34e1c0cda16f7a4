"""A trellis code of one byte a coordinate: what `PolarQuant(d, bits=8)` stores.

At 16 bits a pair of coordinates no table of points is small, so the coordinates are coded one by one and
their values come from a formula. Byte c[j] of a vector stands for

    value[j] = SCALE * log(u / (1 - u)),  u = (n + 1/2) / 4096,  n = c[j] >> 1 << 5 | label[j]
    label[j] = exclusive or of the TAPS[i] over those i = 0 .. 8 for which c[j - i] is odd

with c[-1], c[-2], ... the vector's last bytes. So seven bits of a byte place its coordinate among those of
its label, and the lowest goes into a feed-forward shift register that makes labels, of a trellis code in the
manner of Ungerboeck (IEEE Trans. Inf. Theory 28, 1982). A coordinate depends on its own byte and on the
lowest bits of the eight before it, and a decoder reads each on its own. A trellis that starts where it ends
(tail biting, Ma and Wolf, IEEE Trans. Commun. 34, 1986) treats a vector's first coordinates like the others.

Viterbi's search over the register's 256 states wins twice. Errors of neighbours are shaped together, as in
trellis coded quantisation (Marcellin and Fischer, IEEE Trans. Commun. 38, 1990), which needs twice as many
values as a byte can name. Here are 16 times as many: where they are sparse a rare large coordinate takes the
nearest of all 4,096, and its neighbours, where they are dense, pay for it. So bits move to where they are
needed, and the values may stand closer around zero than is best for a scalar code (Gersho, IEEE Trans. Inf.
Theory 25, 1979). The density of a logistic distribution keeps them from getting too sparse further out.
"""

from __future__ import annotations

from functools import cache

import torch

SCALE = 0.65
"""Of the logistic distribution that the values are spread by, for coordinates of unit variance."""

TAPS = (19, 26, 23, 25, 31, 23, 12, 9, 16)
"""What a byte's lowest bit adds to the labels of its own coordinate and of the eight after it, 5 bits each.
Found by trying changes at random on Gaussian vectors."""

_LABELS, _PLACES, _MEMORY = 32, 128, 8

_JUNCTION = 32
"""Coordinates on either side of a vector's start that the search for its state looks at."""

_VECTORS_AT_ONCE = 512


@cache
def levels() -> torch.Tensor:
    """All values that a coordinate can take, ascending: float32 [4096]."""
    count = _PLACES * _LABELS
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return (SCALE * torch.logit(share)).float()


def values(codes: torch.Tensor) -> torch.Tensor:
    """What the bytes of whole vectors stand for: uint8 [..., d] -> float32 [..., d]."""
    low = codes.int() & 1
    label = torch.zeros_like(low)
    for delay, tap in enumerate(TAPS):
        label ^= tap * low.roll(delay, -1)
    return levels().to(codes.device)[codes.int() >> 1 << 5 | label]


def search(y: torch.Tensor) -> torch.Tensor:
    """Bytes whose values are near to whole vectors, by sum of squares.

    They are the best of those with the same start state; with the best one the error would be 1 to 3 % less.
    y float32 [..., d], coordinates of about unit variance, d >= 8 -> uint8 [..., d].
    """
    parts = y.reshape(-1, y.shape[-1]).split(_VECTORS_AT_ONCE)
    return torch.cat([viterbi(part, start_states(part)) for part in parts]).view(y.shape)


def start_states(y: torch.Tensor) -> torch.Tensor:
    """States to start vectors from, which they must come back to: y float32 [n, d] -> int64 [n].

    They are those that the best codes of a vector's end followed by its beginning, as an open string, go
    through in between (wrap-around Viterbi: Shao, Lin and Fossorier, IEEE Trans. Commun. 51, 2003).
    """
    end = y[:, -_JUNCTION:]
    before = viterbi(torch.cat([end, y[:, :_JUNCTION]], -1))[:, : end.shape[-1]][:, -_MEMORY:]
    return ((before.long() & 1) << torch.arange(_MEMORY, device=y.device).flip(0)).sum(-1)


def viterbi(y: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
    """The best bytes of vectors that start from given states and end in them: uint8 [n, d].

    y float32 [n, d]; start int64 [n], or None for any start and any end. A state holds the lowest bits of the
    eight bytes before a coordinate, the last of them lowest.
    """
    n, d = y.shape
    states, device = 1 << _MEMORY, y.device
    level = levels().to(device)
    label = torch.arange(_LABELS, device=device)[:, None]
    # The label of a window: its bit i is the lowest bit of the byte i places before.
    window = torch.arange(2 * states, device=device)
    window_label = torch.zeros_like(window)
    for delay, tap in enumerate(TAPS):
        window_label ^= tap * (window >> delay & 1)
    row = torch.arange(n, device=device)
    cost = torch.zeros(states, n, device=device)
    if start is not None:
        cost.fill_(torch.inf)[start, row] = 0
    places = torch.empty(d, _LABELS, n, dtype=torch.uint8, device=device)
    oldest = torch.empty(d, states, n, dtype=torch.bool, device=device)
    for j, x in enumerate(y.T.contiguous()):
        # Of each label's values the two on either side of x, and the nearer one's place and distance.
        index = torch.sigmoid(x / SCALE) * len(level) - 0.5
        place = ((index - label) / _LABELS).floor().clamp(0, _PLACES - 2).long()
        below = (level[place * _LABELS + label] - x).square()
        above = (level[(place + 1) * _LABELS + label] - x).square()
        places[j] = place + (above < below)
        distance = torch.minimum(below, above)[window_label]
        # A window is the oldest bit, the seven that both states share, and the newest.
        both = distance.view(2, states // 2, 2, n) + cost.view(2, states // 2, 1, n)
        zero, one = both.flatten(1, 2)
        oldest[j] = one < zero
        cost = torch.minimum(zero, one)
    codes = torch.empty(n, d, dtype=torch.uint8, device=device)
    state = cost.argmin(0) if start is None else start
    for j in reversed(range(d)):
        at = oldest[j][state, row] * states + state
        codes[:, j] = places[j][window_label[at], row] << 1 | (at & 1).to(torch.uint8)
        state = at >> 1
    return codes
