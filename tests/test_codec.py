"""The codec against float64 geometry and integer arithmetic of its own; they share codebook.json."""

import itertools
import json
import math
from importlib.resources import files

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vllm_polarquant
from vllm_polarquant import scalar
from vllm_polarquant.codebook import lattice, trellis_points
from vllm_polarquant.codec import (
    PolarQuant,
    by_largest,
    codebook,
    decode,
    decode_centred,
    decode_radius,
    decode_unit,
    encode,
    encode_centred,
    encode_radius,
    encode_rotated,
    pack,
    pack_centres,
    rotation,
    rotation_parts,
    search_cells,
    tables,
    unpack,
    unpack_centres,
    viterbi,
    windows,
)
from vllm_polarquant.format import (
    BITS,
    CELL_CANDIDATES,
    CELL_GRID,
    CELLS_PER_UNIT,
    FAR_CELL,
    HEAD_DIMS,
    MIN_FIT_GAIN,
    PRESETS,
    SCALAR_BITS,
    STATE_BITS,
    Slot,
    UnsupportedFormat,
    VectorFormat,
)

# At d = 128, by the bits stored a coordinate with the radius counted: what the format promises.
DISTORTION = {2.125: 0.083, 2.625: 0.042, 3.125: 0.0224, 3.625: 0.0114, 4.125: 0.0065}
SCALAR_DISTORTION = 1.9e-5
"""Of 8 bits a coordinate, at any d."""
LIBRARY_BITS = (*BITS, SCALAR_BITS)
GAINS = ("norm", "unbiased", "fit")
# bfloat16 keeps eight bits of a radius, and its denormals lie 2**-133 apart.
RADIUS_ERROR, DENORMAL_RADIUS_ERROR = 2**-8, 2**-134
FLOAT32_MAX, BFLOAT16_MAX = torch.finfo(torch.float32).max, torch.finfo(torch.bfloat16).max

CODEBOOK = json.loads((files(vllm_polarquant) / "codebook.json").read_text())


VECTORS = dict.fromkeys([*(v for pair in PRESETS.values() for v in pair), PolarQuant(64, 8).vector])


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def any_vectors(d: int) -> torch.Tensor:
    """Gaussian ones, those of one coordinate, one of equal ones, and of positive ones; of d = 512 few."""
    count, step = (64, 1) if d <= 256 else (16, 32)
    return torch.cat([gaussian(count, d), torch.eye(d)[::step], torch.ones(1, d), gaussian(count, d).exp()])


def distortion(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    return float((x_hat - x).double().square().sum() / x.double().square().sum())


def to_bfloat16(value: float) -> float:
    """Rounded to eight significant bits, ties to even."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 256), exponent - 8)


def walk(codes: list[int], width: int) -> list[tuple[float, float]]:
    """The points of one vector's codes, straight from the definition, one after the other."""
    table, states, points, before = CODEBOOK[str(width)], 2 ** STATE_BITS[width], [], 0
    for code in codes:
        x, y = table[code * states + before * states // 2**width]
        points.append((x, y))
        before = code
    return points


def walks(codes: torch.Tensor, width: int) -> torch.Tensor:
    """`walk` of every row of codes [n, m]: float64 [n, m, 2]."""
    return torch.tensor([walk(row, width) for row in codes.tolist()], dtype=torch.float64)


def scalar_walk(codes: list[int]) -> list[float]:
    """The values of one vector's bytes, straight from the definition, one after the other."""
    values = []
    for j, code in enumerate(codes):
        label = 0
        for i, tap in enumerate(scalar.TAPS):
            if codes[(j - i) % len(codes)] % 2:
                label ^= tap
        u = (code // 2 * 32 + label + 0.5) / 4096
        values.append(scalar.SCALE * math.log(u / (1 - u)))
    return values


def bit_stream(codes: list[int], width: int) -> bytes:
    """The codes as one little-endian integer of len(codes) * width bits."""
    number = sum(code << (i * width) for i, code in enumerate(codes))
    return number.to_bytes(len(codes) * width // 8, "little")


@pytest.mark.parametrize("d", HEAD_DIMS)
def test_rotation_is_orthogonal(d):
    identity = torch.eye(d, dtype=torch.float64)
    for seed in (42, 7):
        matrix = rotation(d, seed)
        assert matrix.dtype == torch.float64
        assert (matrix @ matrix.T - identity).abs().max() < 1e-6
    assert not torch.equal(rotation(d, 42), rotation(d, 7))


@pytest.mark.parametrize(
    ("d", "row", "corner", "total"),
    [
        (64, [-0.125, 0.125, 0.125, 0.125], -0.125, -8.0),
        (
            96,
            [0.0779744856, 0.1266647082, 0.0955302638, 0.0779744856],
            0.0518982290,
            9.8205426236,
        ),
        (
            80,
            [0.1418214009, -0.0664272758, 0.1441350208, 0.0793116736],
            0.1441350208,
            -7.2623716454,
        ),
    ],
)
def test_rotation_is_the_one_that_pages_were_written_with(d, row, corner, total):
    matrix = rotation(d)
    assert matrix[0, :4].tolist() == pytest.approx(row, abs=1e-9)
    assert matrix[5, 7].item() == pytest.approx(corner, abs=1e-9)
    assert matrix.sum().item() == pytest.approx(total, abs=1e-7)


def test_rotation_spreads_every_coordinate():
    for d in HEAD_DIMS:
        assert rotation(d).abs().max() < 0.36


@pytest.mark.parametrize("pair_bits", range(4, 9))
def test_codebook_is_the_files_in_bfloat16(pair_bits):
    points = CODEBOOK[str(pair_bits)]
    assert len(points) == 2 ** (pair_bits + STATE_BITS[pair_bits])
    assert codebook(pair_bits).tolist() == points
    assert all(to_bfloat16(value) == value for point in points for value in point)


@pytest.mark.slow
def test_codebook_file_is_what_the_generator_makes():
    ours, theirs = trellis_points(4), torch.tensor(CODEBOOK["4"]).double().numpy()
    assert abs(ours - theirs).max() < 0.02


@pytest.mark.parametrize("pair_bits", range(4, 9))
def test_lattice_has_no_point_twice(pair_bits):
    points = {(round(x, 9), round(y, 9)) for x, y in lattice(pair_bits)}
    assert len(points) == 2 ** (pair_bits + STATE_BITS[pair_bits])


@pytest.mark.parametrize("length", [1, 2, 3])
def test_viterbi_finds_the_best_of_all_streams(length):
    pairs = gaussian(30, length, 2, seed=3)
    streams = torch.tensor(list(itertools.product(range(16), repeat=length)))
    points = walks(streams, 4)
    cost = (pairs.double()[:, None] - points).square().sum((2, 3))
    found = viterbi(pairs, codebook(4), STATE_BITS[4])
    reached = (walks(found, 4) - pairs.double()).square().sum((1, 2))
    assert (reached - cost.amin(1)).abs().max() < 1e-5


@pytest.mark.parametrize("bits", BITS)
def test_no_change_of_two_neighbouring_codes_is_better(bits):
    """Where not every stream can be tried: 8,000 streams around the one that was found."""
    width = int(2 * bits)
    pairs = gaussian(1, 24, 2, seed=7)
    found = viterbi(pairs, codebook(width), STATE_BITS[width])
    best = float((walks(found, width) - pairs).square().sum())
    change = torch.randint(1 << width, (8000, 2), generator=torch.Generator().manual_seed(3))
    place = torch.randint(23, (8000,), generator=torch.Generator().manual_seed(4))
    tried = found.repeat(8000, 1)
    tried[torch.arange(8000), place] = change[:, 0]
    tried[torch.arange(8000), place + 1] = change[:, 1]
    cost = (codebook(width)[windows(tried, width)] - pairs).square().sum((1, 2))
    assert float(cost.min()) >= best - 1e-4


@pytest.mark.parametrize("bits", BITS)
def test_points_follow_the_definition(bits):
    width = int(2 * bits)
    codes = torch.randint(1 << width, (2, 3, 16), generator=torch.Generator().manual_seed(5))
    points = codebook(width)[windows(codes, width)].double()
    assert torch.equal(points.flatten(0, 1), walks(codes.flatten(0, 1), width))


def test_viterbi_in_parts_is_viterbi_at_once(monkeypatch):
    pairs, points = gaussian(7, 11, 2), codebook(6)
    whole = viterbi(pairs, points, STATE_BITS[6])
    assert whole.shape == (7, 11)
    monkeypatch.setattr("vllm_polarquant.codec._ENCODE_SCRATCH", 3 * 4 * 256)
    assert torch.equal(viterbi(pairs, points, STATE_BITS[6]), whole)


@pytest.mark.parametrize("bits", BITS)
def test_cells_name_the_nearest_points_to_their_centre(bits):
    width = int(2 * bits)
    states, candidates = 2 ** STATE_BITS[width], CELL_CANDIDATES[width]
    middle_bits = width - STATE_BITS[width]
    cells = search_cells(width)
    points = torch.tensor(CODEBOOK[str(width)], dtype=torch.float64)
    for index in (0, 77, 2080, 2100, 4095, 4096, 6200, 8191):
        cell = FAR_CELL / CELLS_PER_UNIT if index >= CELL_GRID**2 else 1 / CELLS_PER_UNIT
        row, column = index % CELL_GRID**2 // CELL_GRID, index % CELL_GRID
        centre = torch.tensor([column - CELL_GRID / 2, row - CELL_GRID / 2], dtype=torch.float64) * cell
        for new, old in itertools.product(range(states), repeat=2):
            window = torch.arange(2**middle_bits) * states + new * 2**width + old
            distance = (points[window] - centre).norm(dim=-1)
            best = distance.sort().values
            for i in range(candidates):
                field = int(cells[index, new]) >> (old * candidates + i) * middle_bits
                assert distance[field & (2**middle_bits - 1)] <= best[i] + 1e-9


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("bits", BITS)
def test_decode_in_float64(bits, d):
    vector = VectorFormat("polar", bits)
    codes = torch.randint(2**vector.pair_bits, (3, d // 2), generator=torch.Generator().manual_seed(1))
    packed = torch.tensor([list(bit_stream(row, vector.pair_bits)) for row in codes.tolist()])
    radius = torch.tensor([1.0, 0.5, 12.0]).bfloat16()
    pairs = walks(codes, vector.pair_bits)
    expected = torch.cat([pairs[..., 0], pairs[..., 1]], -1) @ rotation(d) * radius.double()[:, None]
    x_hat = decode(radius, packed.to(torch.uint8), vector)
    assert x_hat.dtype == torch.float32
    assert (x_hat - expected).abs().max() < 1e-4


@pytest.mark.parametrize("bits", BITS)
def test_distortion_at_128(bits):
    codec = PolarQuant(128, bits)
    x = gaussian(4096, 128, seed=1)
    assert distortion(x, codec.decompress(*codec.compress(x))) <= DISTORTION[codec.bits_per_element()]


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("bits", BITS)
def test_distortion_of_any_vector(bits, d):
    """After the rotation, a vector of one coordinate or of equal ones is as good as another."""
    codec = PolarQuant(d, bits)
    x = any_vectors(d)
    x_hat = codec.decompress(*codec.compress(x))
    assert distortion(x, x_hat) < 1.1 * DISTORTION[bits + 0.125]


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("seed", [1, 2])
def test_distortion_of_8_bits(d, seed):
    codec = PolarQuant(d, 8)
    x = gaussian(4096 * 64 // d, d, seed=seed)
    assert distortion(x, codec.decompress(*codec.compress(x))) <= SCALAR_DISTORTION


@pytest.mark.parametrize("d", HEAD_DIMS)
def test_distortion_of_any_vector_with_8_bits(d):
    codec = PolarQuant(d, 8)
    x = any_vectors(d)
    x_hat = codec.decompress(*codec.compress(x))
    assert distortion(x, x_hat) < 1.1 * SCALAR_DISTORTION
    # A vector that starts with a large coordinate is no exception.
    assert max(distortion(*pair) for pair in zip(x, x_hat, strict=True)) < 5 * SCALAR_DISTORTION


def test_scalar_values_follow_the_definition():
    codes = torch.randint(256, (2, 3, 40), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    expected = torch.tensor([scalar_walk(row) for row in codes.flatten(0, 1).tolist()])
    assert (scalar.values(codes).flatten(0, 1) - expected).abs().max() < 1e-6
    # What stored bytes mean.
    known = [-3.2722, -1.2272, -0.6919, -0.3142, 0.0168, 0.3500, 0.7367, 1.3042]
    assert scalar.values(torch.arange(1, 256, 32, dtype=torch.uint8)).tolist() == pytest.approx(
        known, abs=1e-4
    )
    assert scalar.levels().shape == (4096,) and (scalar.levels().diff() > 0).all()


@pytest.mark.parametrize("d", [8, 10])
def test_scalar_viterbi_finds_the_best_of_all_bytes(d):
    """All strings of lowest bits are tried; with those fixed, each coordinate's place is its own."""
    y = gaussian(2, d, seed=3) * 1.3
    y[0, 0], y[1, -1] = 5, -9
    best = torch.full((2, 256), torch.inf)
    for low in itertools.product(range(2), repeat=d):
        values = torch.tensor([scalar_walk([2 * place + bit for bit in low]) for place in range(128)])
        state = int("".join(map(str, low[-8:])), 2)
        cost = (values - y[:, None]).square().amin(1).sum(-1)
        best[:, state] = torch.minimum(best[:, state], cost)
    codes = scalar.viterbi(y.repeat_interleave(256, 0), torch.arange(256).repeat(2))
    assert codes.dtype == torch.uint8
    reached = torch.tensor([scalar_walk(row) for row in codes.tolist()]).view(2, 256, d) - y[:, None]
    assert (reached.square().sum(-1) / best - 1).abs().max() < 1e-4


def test_scalar_search_starts_where_little_is_lost():
    y = gaussian(4, 64, seed=6)
    y[0, 0] = 4.5

    def cost(codes: torch.Tensor) -> torch.Tensor:
        return (scalar.values(codes) - y.repeat_interleave(len(codes) // 4, 0)).square().sum(-1)

    every = scalar.viterbi(y.repeat_interleave(256, 0), torch.arange(256).repeat(4))
    best = cost(every).view(4, 256).amin(1)
    assert cost(scalar.search(y)).sum() < 1.05 * best.sum()


def test_scalar_search_in_parts_is_the_search_at_once(monkeypatch):
    y = gaussian(7, 16)
    whole = scalar.search(y)
    assert torch.equal(scalar.search(y), whole)
    monkeypatch.setattr("vllm_polarquant.scalar._VECTORS_AT_ONCE", 3)
    assert torch.equal(scalar.search(y), whole)


def test_decode_of_8_bits_in_float64():
    codes = torch.randint(256, (3, 96), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    radius = torch.tensor([1.0, 0.5, 12.0]).bfloat16()
    unit = torch.tensor([scalar_walk(row) for row in codes.tolist()], dtype=torch.float64)
    expected = unit @ rotation(96) * radius.double()[:, None]
    assert (PolarQuant(96, 8).decompress(radius, codes) - expected).abs().max() < 1e-4


def test_distortion_of_fp8_and_raw():
    x = gaussian(256, 128)
    fp8 = VectorFormat("fp8", 8)
    assert distortion(x, decode(*encode(x, fp8), fp8)) < 0.001
    raw = VectorFormat("raw", 16)
    for dtype in (torch.bfloat16, torch.float16):
        stored = x.to(dtype)
        stored[0, 0] = math.nan
        x_hat = decode(*encode(stored, raw), raw, dtype)
        assert torch.equal(x_hat[1:], stored[1:].float())
        assert x_hat[0].isnan().sum() == 1


@pytest.mark.parametrize("shape", [(), (1,), (0,), (5,), (2, 3), (2, 0, 3), (2, 1, 3, 4)])
@pytest.mark.parametrize("bits", LIBRARY_BITS)
def test_leading_dims(bits, shape):
    codec = PolarQuant(80, bits)
    x = gaussian(*shape, 80)
    radius, codes = codec.compress(x)
    assert (radius.shape, radius.dtype) == (shape, torch.bfloat16)
    assert (codes.shape, codes.dtype) == ((*shape, codec.code_bytes), torch.uint8)
    x_hat = codec.decompress(radius, codes)
    assert (x_hat.shape, x_hat.dtype) == (x.shape, torch.float32)
    # A vector is stored alike alone and in a batch.
    alone = codec.compress(x.reshape(-1, 80)[:1])
    assert torch.equal(alone[1], codes.reshape(-1, codec.code_bytes)[:1])
    assert torch.equal(alone[0], radius.reshape(-1)[:1])


def test_strided_input():
    codec = PolarQuant(64, 4)
    x = gaussian(6, 128)[::2, 64:]
    radius, codes = codec.compress(x)
    expected = codec.compress(x.contiguous())
    assert torch.equal(radius, expected[0])
    assert torch.equal(codes, expected[1])


@pytest.mark.parametrize("vector", VECTORS, ids=str)
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_zero_is_zero(vector, d):
    radius, codes = encode(torch.zeros(3, d), vector)
    assert not radius.any()
    assert not codes.any()
    assert not decode(radius, codes, vector).any()


def hard_vectors(d: int) -> dict[str, torch.Tensor]:
    vectors = {
        "float32 denormals": gaussian(d) * 1e-39,
        "smallest float32": torch.full((d,), 1e-44),
        "one huge coordinate": gaussian(d).index_fill(0, torch.tensor(3), 3e38),
        "only one coordinate": torch.zeros(d).index_fill(0, torch.tensor(3), -5.0),
        "60,000 and 6e-8": torch.tensor([60000.0, 6e-8]).repeat(d // 2).half(),
        "large": gaussian(d).clamp(-3, 3) * 1e38,
    }
    for dtype in (torch.bfloat16, torch.float16):
        limits = torch.finfo(dtype)
        vectors[f"smallest {dtype}"] = torch.full((d,), limits.smallest_normal, dtype=dtype)
        vectors[f"half the largest {dtype}"] = torch.full((d,), limits.max / 2).to(dtype)
    return vectors


@pytest.mark.parametrize("vector", [*(VectorFormat("polar", b) for b in BITS), VectorFormat("fp8", 8)])
@pytest.mark.parametrize("name", hard_vectors(64))
def test_hard_vectors_keep_their_norm(vector, name):
    for d in (64, 112):
        x = hard_vectors(d)[name]
        x_hat = decode(*encode(x, vector), vector)
        assert x_hat.isfinite().all()
        # e4m3 keeps four bits of each coordinate, and a constant vector errs the same way in all.
        rel = 2**-4 if vector.kind == "fp8" else 0.02
        denormal = 1.1 * math.sqrt(d) * DENORMAL_RADIUS_ERROR * (448 if vector.kind == "fp8" else 1)
        assert float(x_hat.double().norm()) == pytest.approx(float(x.double().norm()), rel=rel, abs=denormal)


@pytest.mark.parametrize("value", [FLOAT32_MAX, torch.finfo(torch.bfloat16).max, 65504.0])
def test_largest_vectors_stay_finite(value):
    for d in HEAD_DIMS:
        x = torch.full((d,), value) * gaussian(d).sign()
        for vector in (
            VectorFormat("polar", 2, "unbiased"),
            VectorFormat("polar", 4),
            VectorFormat("scalar", 8),
            VectorFormat("fp8", 8),
        ):
            x_hat = decode(*encode(x, vector), vector)
            assert x_hat.isfinite().all()
            assert torch.nn.functional.cosine_similarity(x_hat / value, x / value, dim=0) > 0.9


@pytest.mark.parametrize("vector", VECTORS, ids=str)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_become_zero(vector, poison):
    clean = gaussian(4, 3, 128)
    expected = encode(clean, vector)
    x = clean.clone()
    x[1, 2, 77] = poison
    x[3, 0] = poison
    radius, codes = encode(x, vector)
    untouched = torch.ones(4, 3, dtype=torch.bool)
    for hit in ((1, 2), (3, 0)):
        assert radius[hit] == 0
        assert not codes[hit].any()
        assert not decode(radius, codes, vector)[hit].any()
        untouched[hit] = False
    assert torch.equal(radius[untouched], expected[0][untouched])
    assert torch.equal(codes[untouched], expected[1][untouched])


@pytest.mark.parametrize("bits", LIBRARY_BITS)
def test_gains(bits):
    """At 8 bits a coordinate a cosine is 1 within the rounding of a radius."""
    x = gaussian(200, 128).double()
    square = x.square().sum(-1)
    x_hat = {}
    for gain in GAINS:
        vector = VectorFormat("scalar" if bits == SCALAR_BITS else "polar", bits, gain)
        x_hat[gain] = decode(*encode(x, vector), vector).double()
    # Gains share the codes, so the decoded directions are the same.
    cosine = (x * x_hat["norm"]).sum(-1) / square.sqrt() / x_hat["norm"].norm(dim=-1)

    def kept(gain: str) -> torch.Tensor:
        return x_hat[gain].norm(dim=-1) / square.sqrt()

    assert (kept("norm") - 1).abs().max() < 1.1 * RADIUS_ERROR
    assert ((x * x_hat["unbiased"]).sum(-1) / square - 1).abs().max() < 1.1 * RADIUS_ERROR
    assert (kept("fit") / cosine.clamp_min(MIN_FIT_GAIN) - 1).abs().max() < 1.1 * RADIUS_ERROR
    assert MIN_FIT_GAIN == 0.981


def test_radius_over_the_whole_range():
    radius = torch.logspace(-37.9, 38.53, 20000, dtype=torch.float64).float()
    radius = radius[radius < BFLOAT16_MAX]
    stored = encode_radius(radius)
    assert stored.dtype == torch.bfloat16
    assert (decode_radius(stored).double() / radius.double() - 1).abs().max() <= RADIUS_ERROR
    assert stored.tolist()[::100] == [to_bfloat16(r) for r in radius.tolist()[::100]]
    assert not encode_radius(torch.zeros(1)).any()
    assert not decode_radius(torch.zeros(1).bfloat16()).any()


def test_radius_is_never_infinite():
    radius = torch.tensor([FLOAT32_MAX, math.inf, math.nextafter(BFLOAT16_MAX, math.inf)])
    assert encode_radius(radius).tolist() == [BFLOAT16_MAX] * 3


def test_radius_of_denormals():
    radius = torch.logspace(-44, -38, 500, dtype=torch.float64).float()
    decoded = decode_radius(encode_radius(radius)).double()
    error = (decoded - radius).abs()
    assert (error <= torch.clamp_min(RADIUS_ERROR * radius.double(), DENORMAL_RADIUS_ERROR)).all()


def test_the_sign_bit_of_a_radius_is_free():
    radius = encode_radius(torch.tensor([0.0, 1e-40, 0.37, 1e30, FLOAT32_MAX]))
    assert not radius.signbit().any()
    assert torch.equal(decode_radius(-radius), decode_radius(radius))
    x = gaussian(5, 64)
    for vector in VECTORS:
        if vector.kind != "scalar":
            stored, codes = encode(x, vector)
            assert torch.equal(decode(-stored, codes, vector), decode(stored, codes, vector))


@st.composite
def code_streams(draw: st.DrawFn) -> tuple[list[int], int]:
    width = draw(st.integers(4, 8))
    count = 8 * draw(st.integers(1, 16))
    codes = st.integers(0, 2**width - 1)
    return draw(st.lists(codes, min_size=count, max_size=count)), width


@given(code_streams())
@settings(max_examples=200, deadline=None)
def test_pack_is_a_little_endian_bit_stream(stream):
    codes, width = stream
    packed = pack(torch.tensor(codes), width)
    assert packed.dtype == torch.uint8
    assert bytes(packed.tolist()) == bit_stream(codes, width)
    assert unpack(packed, width).tolist() == codes


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_unpack_reads_any_bytes(data):
    width = data.draw(st.integers(4, 8))
    groups = data.draw(st.integers(1, 8))
    raw = data.draw(st.binary(min_size=width * groups, max_size=width * groups))
    number = int.from_bytes(raw, "little")
    codes = unpack(torch.tensor(list(raw), dtype=torch.uint8), width)
    assert codes.tolist() == [number >> (i * width) & (2**width - 1) for i in range(8 * groups)]


@given(
    st.lists(st.floats(width=32), min_size=64, max_size=64),
    st.sampled_from(LIBRARY_BITS),
)
@settings(max_examples=200, deadline=None)
def test_any_floats_come_back_finite(values, bits):
    codec = PolarQuant(64, bits)
    x = torch.tensor(values)
    x_hat = codec.decompress(*codec.compress(x))
    assert x_hat.isfinite().all()
    if not x.isfinite().all():
        assert not x_hat.any()


def test_seed_changes_the_codes_and_is_needed_to_read_them():
    x = gaussian(16, 128)
    one, two = PolarQuant(128, 4, seed=1), PolarQuant(128, 4, seed=2)
    assert not torch.equal(one.compress(x)[1], two.compress(x)[1])
    assert torch.equal(one.compress(x)[1], PolarQuant(128, 4, seed=1).compress(x)[1])
    assert distortion(x, two.decompress(*one.compress(x))) > 0.5


def test_bytes_are_stable():
    """The bytes that FORMAT_VERSION 4 stands for."""
    x = torch.tensor([(37 * i) % 64 - 31.5 for i in range(64)])
    for bits, stored in (
        (2, "17.5 d3474574e87f89013cdc59da3a321372"),
        (3, "17.875 a5dd49c37424304c618a9882c1d3a70435950a1fa065a634"),
        (4, "18.625 b41c5299a19a28d7008313b9d0193e8a0c6cc3d8162d954ac3c701ac4a5b3d64"),
    ):
        radius, codes = PolarQuant(64, bits).compress(x)
        assert f"{radius.item()} {bytes(codes.tolist()).hex()}" == stored


@pytest.mark.parametrize("d", [0, 63, 100, 1024])
def test_unknown_d(d):
    with pytest.raises(UnsupportedFormat, match=rf"d = {d} is not one of 64, 80, 96"):
        PolarQuant(d, 4)


@pytest.mark.parametrize("bits", [0, 1, 2.25, 5, 7, 16])
def test_unknown_bits(bits):
    with pytest.raises(UnsupportedFormat, match=rf"bits = {bits} is not one of 2, 2\.5, 3, 3\.5, 4, 8$"):
        PolarQuant(64, bits)


def test_wrong_arguments():
    codec = PolarQuant(64, 4)
    for x in (torch.zeros(64, dtype=torch.int32), torch.zeros(3, 65), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"expected floats \[\.\.\., 64\], got"):
            codec.compress(x)
    radius, codes = codec.compress(gaussian(3, 64))
    for r, c in ((radius[:2], codes), (radius, codes[:, :-1]), (radius, codes.int())):
        with pytest.raises(ValueError, match=r"expected codes uint8 \[\.\.\., 32\]"):
            codec.decompress(r, c)


@pytest.mark.parametrize(
    ("d", "bits", "stored"), [(128, 2, 2.125), (64, 3.5, 3.75), (256, 4, 4.0625), (128, 8, 8.125)]
)
def test_bits_per_element(d, bits, stored):
    codec = PolarQuant(d, bits)
    assert codec.bits_per_element() == stored
    radius, codes = codec.compress(gaussian(5, d))
    assert (radius.nbytes + codes.nbytes) * 8 / (5 * d) == stored


def test_library_is_reachable_from_the_package():
    assert vllm_polarquant.PolarQuant is PolarQuant
    with pytest.raises(AttributeError, match="no attribute 'polar'"):
        _ = vllm_polarquant.polar


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_hold_the_codec(dtype):
    slot = Slot("polarquant_k4v3", 96)
    held = tables(slot, dtype, torch.device("cpu"))
    assert (held.mixing.double() - rotation_parts(96).mixing).abs().max() < 1e-6
    for factors, back in ((held.key_factors, held.query_factors), (held.value_factors, held.output_factors)):
        assert factors.shape == (1, 96)
        assert torch.equal(factors * back, torch.ones(1, 96))
        assert ((held.mixing * factors).double() - rotation(96)).abs().max() < 1e-6
    for points, lut, vector in (
        (held.key_points, held.key_lut, slot.key),
        (held.value_points, held.value_lut, slot.value),
    ):
        assert torch.equal(points, codebook(vector.pair_bits))
        low, high = lut & 0xFFFF, lut >> 16 & 0xFFFF
        pairs = torch.stack([low, high], -1).to(torch.uint16).view(dtype)
        assert torch.equal(pairs, points.to(dtype))


def test_tables_of_slots_without_codes():
    held = tables(Slot("polarquant_k8v4", 64), torch.bfloat16, torch.device("cpu"))
    assert held.key_points.shape == (1, 2)
    lossless = tables(Slot("polarquant_lossless", 64), torch.bfloat16, torch.device("cpu"))
    assert torch.equal(lossless.mixing, torch.eye(64))
    assert torch.equal(lossless.key_factors, torch.ones(1, 64))


@pytest.mark.parametrize("vector", [v for v in VECTORS if v.kind != "scalar"], ids=str)
def test_encode_rotated_is_encode_after_the_rotation(vector):
    x = gaussian(6, 96)
    x[2] = 0
    scale = torch.tensor([1.0, 3e30, 1.0, 1e-30, 2.0, 0.5])
    radius, codes = encode_rotated(x @ rotation(96).float().T, scale, vector)
    rebuilt = decode(radius, codes, vector) / scale[:, None]
    assert distortion(x, rebuilt) < 0.1
    assert radius[2] == 0 and not codes[2].any()
    radius, codes = encode_rotated(x @ rotation(96).float().T, torch.zeros(6), vector)
    assert not radius.any() and not codes.any()


def test_decode_unit_is_decode_before_radius_and_rotation():
    x = gaussian(9, 128)
    for vector in (VectorFormat("polar", 3), VectorFormat("fp8", 8)):
        radius, codes = encode(x, vector)
        unit = decode_unit(codes, vector, torch.bfloat16)
        rebuilt = unit.double() @ rotation(128) * decode_radius(radius).double()[:, None]
        assert (decode(radius, codes, vector) - rebuilt).abs().max() < 1e-5


def real_keys(n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated keys [n, 2, d] as real models have them: a mean, [2, d], uneven pairs, and two sinks first."""
    uneven = torch.logspace(-1, 1, d // 2).repeat(2)
    mean = gaussian(2, d, seed=1) * 4
    x = mean + 0.3 * gaussian(n, 2, d, seed=2) * uneven
    x[:2] *= 0.1
    matrix = rotation(d).float()
    return x @ matrix.T, mean @ matrix.T


CODED = [v for v in VECTORS if v.kind not in ("scalar", "raw")]


@pytest.mark.parametrize("vector", CODED, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-36, 1e30])
def test_centred_vectors_come_back(vector, scale):
    """Less their centres where that is shorter, with an error of what is left."""
    x, centre = real_keys(40, 64)
    amax = x.abs().amax(-1) * scale
    radius, codes = encode_centred(x / x.abs().amax(-1, keepdim=True), amax, centre * scale, vector)
    left = (x.double() - centre).norm(dim=-1)
    short = torch.minimum(left, x.double().norm(dim=-1))
    assert torch.equal(radius.signbit(), left < x.double().norm(dim=-1))
    assert radius.signbit()[2:].all() and not radius.signbit()[:2].any()
    rebuilt = decode_centred(radius, codes, centre * scale, vector, torch.bfloat16) / scale
    assert rebuilt.dtype == torch.float64
    error = (rebuilt - x).norm(dim=-1) / short
    bound = {2: 0.36, 2.5: 0.25, 3: 0.17, 3.5: 0.12, 4: 0.09, 8: 0.04}[vector.bits]
    assert error.square().mean().sqrt() < bound


@pytest.mark.parametrize("vector", CODED, ids=str)
@pytest.mark.parametrize("centre", [0.0, math.nan, math.inf])
def test_some_centres_change_nothing(vector, centre):
    x = gaussian(9, 64)
    x[3] = 0
    amax = torch.logspace(-44, 30, 9)
    amax[5] = 0
    expected = encode_rotated(x, amax, vector)
    radius, codes = encode_centred(x, amax, torch.full((64,), centre), vector)
    assert torch.equal(radius, expected[0]) and torch.equal(codes, expected[1])
    assert not radius.signbit().any()
    # What is not centred reads no centre.
    assert decode_centred(radius, codes, torch.full((64,), centre), vector, torch.bfloat16).isfinite().all()


@pytest.mark.parametrize("vector", CODED, ids=str)
def test_a_vector_that_is_its_centre_comes_back(vector):
    centre = gaussian(3, 64)
    amax = centre.abs().amax(-1)
    y = (centre / amax[:, None]).double()
    # The difference may be of rounding.
    radius, codes = encode_centred(y.float(), amax, centre, vector)
    assert radius.signbit().all()
    back = decode_centred(radius, codes, centre, vector, torch.bfloat16)
    assert (back - centre).abs().max() < 1e-6
    radius, codes = encode_centred(torch.ones(64), torch.tensor(2.0), torch.full((64,), 2.0), vector)
    assert radius == 0 and radius.signbit() and not codes.any()


@pytest.mark.parametrize("vector", CODED, ids=str)
def test_vectors_of_no_length_are_not_centred(vector):
    """Also those that by_largest made of a NaN or an infinity."""
    centre = gaussian(64)
    for y, amax in ((torch.zeros(64), 0.0), (torch.zeros(64), 1.0), (gaussian(64), 0.0)):
        radius, codes = encode_centred(y, torch.tensor(amax), centre, vector)
        assert radius == 0 and not radius.signbit() and not codes.any()
    for poison in (math.nan, math.inf):
        unit, largest = by_largest(gaussian(64).index_fill(0, torch.tensor(5), poison))
        radius, codes = encode_centred(unit, largest, centre, vector)
        assert radius == 0 and not radius.signbit() and not codes.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_centres_are_pairs_of_16_bit_floats(dtype):
    centres = gaussian(3, 2, 96)
    words = pack_centres(centres, dtype)
    assert words.dtype == torch.int32 and words.shape == (3, 2, 48)
    low, high = words & 0xFFFF, words >> 16 & 0xFFFF
    halves = torch.cat([low, high], -1).to(torch.uint16).view(dtype)
    assert torch.equal(halves, centres.to(dtype))
    assert torch.equal(unpack_centres(words, dtype), centres.to(dtype).float())
    # As points are in a lut.
    x, y = centres[..., :48], centres[..., 48:]
    assert torch.equal(words, torch.stack([x, y], -1).to(dtype).contiguous().view(torch.int32)[..., 0])


def test_packed_centres_are_finite():
    centres = gaussian(4, 2, 64)
    centres[0, 1, 3], centres[2, 0, 9], centres[3, 1, 63] = math.nan, 7e4, -math.inf
    words = pack_centres(centres, torch.float16)
    for lost in ((0, 1), (2, 0), (3, 1)):
        assert not words[lost].any()
        centres[lost] = 0
    assert torch.equal(unpack_centres(words, torch.float16), centres.half().float())
    assert pack_centres(torch.full((1, 1, 64), 7e4), torch.bfloat16).all()


def test_tables_begin_without_centres():
    slot = Slot("polarquant_k4v4", 96)
    held = tables(slot, torch.bfloat16, torch.device("cpu"))
    assert held.centres.shape == (1, 1, 48)
    held = tables(slot, torch.bfloat16, torch.device("cpu"), num_kv_heads=3, segments=5)
    assert held.centres.shape == (5, 3, 48) and held.centres.dtype == torch.int32
    assert not held.centres.any()
    for factors, rows in (
        (held.key_factors, 3), (held.query_factors, 3), (held.value_factors, 1), (held.output_factors, 1)
    ):  # fmt: skip
        assert torch.equal(factors, rotation_parts(96).signs.float().expand(rows, 96))
        # Written to in place.
        assert factors.is_contiguous()
