"""The distortion table against published figures, integrals and plain loops of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from vllm_polarquant import PolarQuant
from vllm_polarquant.eval import codecs, distortion
from vllm_polarquant.eval.cli import app
from vllm_polarquant.eval.probe.episodes import MODEL_DIR
from vllm_polarquant.format import BITS, SCALAR_BITS

# E|x - x_hat|^2 / E|x|^2 on Gaussian vectors of 128, by codec: a study of the same codecs in numpy.
STUDIED = {
    "golden-angle spiral, 2 bits, memoryless": 0.1134,
    "golden-angle spiral, 2.5 bits, memoryless": 0.0594,
    "golden-angle spiral, 3 bits, memoryless": 0.0306,
    "golden-angle spiral, 3.5 bits, memoryless": 0.0156,
    "golden-angle spiral, 4 bits, memoryless": 0.0079,
    "Lloyd-Max 2 bits, norm kept (TurboQuant)": 0.1159,
    "Lloyd-Max 3 bits, norm kept (TurboQuant)": 0.0340,
    "Lloyd-Max 4 bits, norm kept (TurboQuant)": 0.0093,
    "Lloyd-Max 2 bits, least-squares norm": 0.1151,
    "Lloyd-Max 3 bits, least-squares norm": 0.0335,
    "Lloyd-Max 4 bits, least-squares norm": 0.0092,
    "Lloyd-Max 1 bits + QJL sign": 0.56,
    "Lloyd-Max 2 bits + QJL sign": 0.18,
    "Lloyd-Max 3 bits + QJL sign": 0.054,
    "polar tree, full depth, 3 1 1 1 ... bits": 0.119,
    "polar tree, full depth, 4 2 2 2 ... bits": 0.0341,
    "polar tree, full depth, 5 3 3 3 ... bits": 0.0091,
    "polar tree, blocks of 16, 4 2 2 2 bits (PolarQuant paper)": 0.032,
    "min-max int3 + Hadamard, one block": 0.046,
    "min-max int4 + Hadamard, one block": 0.0101,
    "int4 + Hadamard (int4_per_token_head)": 0.0101,
    "naive chain of angles, 2 bits": 1.31,
    "naive chain of angles, 3 bits": 0.641,
    "naive chain of angles, 4 bits": 0.207,
    "naive chain of angles, 8 bits": 0.0164,
    "fp8 e4m3, scale 1": 0.0007,
}
STUDY_ROUNDING = 0.05


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    return {row["codec"]: row for row in distortion.rows(128, 1024, 0)}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distortion_of(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    return float((x - x_hat).double().square().sum() / x.double().square().sum())


@pytest.mark.slow
@pytest.mark.parametrize("codec", STUDIED)
def test_errors_are_those_of_the_study(found: dict[str, dict[str, Any]], codec: str) -> None:
    row = found[codec]["gaussian"]
    assert row["squared"] == pytest.approx(STUDIED[codec], rel=STUDY_ROUNDING)
    # Queries have no direction of their own, so that a logit's error is a coordinate's.
    assert row["logit"] == pytest.approx(row["squared"], rel=0.08)


@pytest.mark.slow
def test_nothing_beats_shannon(found: dict[str, dict[str, Any]]) -> None:
    assert len(found) > 35
    for row in found.values():
        assert row["limit"] == pytest.approx(4.0 ** -row["stored_bits"])
        assert row["gaussian"]["squared"] > row["limit"]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [*BITS, SCALAR_BITS])
def test_our_rows_are_what_the_public_class_does(found: dict[str, dict[str, Any]], bits: float) -> None:
    codec = PolarQuant(128, bits)
    x = gaussian(1024, 128)
    row = found[f"PolarQuant, {bits:g} bits (this package)"]
    want = distortion_of(x, codec.decompress(*codec.compress(x)))
    assert row["gaussian"]["squared"] == pytest.approx(want, rel=1e-9)
    assert row["stored_bits"] == codec.bits_per_element()


# Max 1960, table I: outer points and errors of the best quantisers of a Gaussian.
@pytest.mark.parametrize(
    ("bits", "error", "largest"),
    [(1, 0.3634, 0.7980), (2, 0.1175, 1.510), (3, 0.03454, 2.152), (4, 0.009497, 2.733)],
)
def test_lloyd_max_has_the_points_and_error_of_max_1960(bits: int, error: float, largest: float) -> None:
    points = codecs.lloyd_max(bits).double()
    assert points[-1].item() == pytest.approx(largest, abs=1e-3)
    assert torch.allclose(points, -points.flip(0), atol=1e-6)
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    density = (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
    squared = (x[:, None] - points).square().amin(-1)
    assert torch.trapezoid(squared * density, x).item() == pytest.approx(error, rel=1e-3)


def test_qjl_is_unbiased_over_projections_and_its_residual_grows_by_half_pi() -> None:
    x, q = gaussian(1, 64), gaussian(1, 64, seed=1)
    estimates = torch.stack([(codecs.qjl(x, 2, seed) * q).sum() for seed in range(3000)]).double()
    exact = (x * q).sum().item()
    standard_error = estimates.std().item() / math.sqrt(len(estimates))
    assert abs(estimates.mean().item() - exact) < 4 * standard_error
    assert standard_error < 0.02 * 8  # a fiftieth of the logits' own spread, sqrt(64)
    vectors = gaussian(512, 128)
    assert distortion_of(vectors, codecs.qjl(vectors, 3)) == pytest.approx(math.pi / 2 * 0.1175, rel=0.05)


def test_spiral_is_near_the_best_code_of_as_many_points() -> None:
    for bits, best in {2: 0.1092, 3: 0.0298, 4: 0.0078}.items():
        points = codecs.spiral(2 * bits)
        pairs = gaussian(20_000, 2)
        error = torch.cdist(pairs, points).amin(-1).square().mean().item() / 2
        assert 0.97 * best < error < 1.06 * best


def test_naive_chain_is_the_loop_that_it_is_called() -> None:
    bits, x = 3, gaussian(100, 16)
    for vector, have in zip(x.tolist(), codecs.naive_chain(x, bits).tolist(), strict=True):
        step = math.pi / 2**bits
        angles = []
        for i in range(len(vector) - 1):
            theta = math.acos(vector[i] / math.sqrt(sum(v * v for v in vector[i:])))
            angles.append(min(round(theta / step), 2**bits - 1) * step)
        want, length = [], math.sqrt(sum(v * v for v in vector))
        for angle in angles:
            want.append(length * math.cos(angle))
            length *= math.sin(angle)
        assert have == pytest.approx([*want, length], abs=1e-5)


@pytest.mark.parametrize("level", [2, 3, 4, 6])
def test_tree_codebooks_are_centroids_of_sampled_angles(level: int) -> None:
    """Angles between the lengths of Gaussian vectors, drawn rather than integrated."""
    left, right = gaussian(2, 60_000, 2 ** (level - 1)).norm(dim=-1)
    angle = torch.atan2(right, left)
    points = codecs.polar_angles(level, 2)
    cell = (angle[:, None] - points).abs().argmin(-1)
    for code, point in enumerate(points.tolist()):
        assert angle[cell == code].mean().item() == pytest.approx(point, abs=0.006)


def test_tree_with_many_bits_brings_the_vector_back() -> None:
    x = gaussian(64, 64)
    for levels in ((8,) * 4, (8,) * 6):
        assert distortion_of(x, codecs.polar_tree(x, levels)) < 2e-4


def test_int4_is_the_kernel_of_vllm_in_a_loop() -> None:
    def away(value: float) -> int:
        return int(value + math.copysign(0.5, value))

    x = gaussian(20, 128)
    have = codecs.int4_per_token_head(x)
    for vector, row in zip(x.tolist(), have.tolist(), strict=True):
        scale = (max(vector) - min(vector)) / 15
        zero = min(max(away(-min(vector) / scale), 0), 15)
        codes = [min(max(away(v / scale + zero), 0), 15) for v in vector]
        # The zero point takes the scale's lowest four bits.
        assert row == pytest.approx([(code - zero) * scale for code in codes], rel=2e-6, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("block", "overhead"), [(16, 2.0), (64, 0.5), (None, 0.25)])
def test_scale_and_zero_point_cost_32_bits_a_block(
    found: dict[str, dict[str, Any]], block: int | None, overhead: float
) -> None:
    where = f"blocks of {block}" if block else "one block"
    for bits in (2, 3, 4):
        row = found[f"min-max int{bits} + Hadamard, {where}"]
        assert (row["overhead_bits"], row["stored_bits"]) == (overhead, bits + overhead)
    assert codecs.min_max(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 2, None).tolist() == [[1, 2, 3, 4]]


@pytest.mark.slow
def test_stored_bits_of_the_layouts_of_others(found: dict[str, dict[str, Any]]) -> None:
    stored = {name: row["stored_bits"] for name, row in found.items()}
    # K and V of int4_per_token_head are 136 bytes at d = 128, those of fp8 are 256.
    assert stored["int4 + Hadamard (int4_per_token_head)"] == 136 * 8 / 256
    assert stored["fp8 e4m3, scale 1"] == 8
    assert stored["polar tree, blocks of 16, 4 2 2 2 bits (PolarQuant paper)"] == 3.875
    # Key of turboquant_4bit_nc: 64 bytes and a float16.
    assert stored["Lloyd-Max 4 bits, norm kept (TurboQuant)"] == 66 * 8 / 128
    # 127 angles and a float32 radius.
    assert stored["naive chain of angles, 2 bits"] == (127 * 2 + 32) / 128


def test_uneven_vectors_have_the_logits_of_even_ones() -> None:
    plain, uneven = distortion.gaussian_sample(128, 64, 3), distortion.uneven_sample(128, 64, 3)
    assert torch.allclose(plain.x @ plain.q.T, uneven.x @ uneven.q.T, atol=1e-4)
    scale = (uneven.x / plain.x).mean(0)
    assert torch.allclose(scale[:64], scale[64:], rtol=1e-5)  # a RoPE pair is (j, j + d/2)
    large = scale[:64][scale[:64] > 1.01]
    assert len(large) == 4 and large.min() >= 10 and large.max() <= 30


def test_sizes_without_a_full_tree_leave_it_out() -> None:
    names = {peer.name for peer in codecs.all_peers() if peer.supports(96)}
    assert not any("full depth" in name for name in names)
    assert any("blocks of 16, 4 2 2 2" in name for name in names)


def test_command_prints_the_same_twice_and_in_three_forms() -> None:
    small = ["distortion", "--head-dims", "64", "--vectors", "32"]
    runs = [CliRunner().invoke(app, [*small, "--json"]) for _ in range(2)]
    assert runs[0].exit_code == 0 and runs[0].stdout == runs[1].stdout
    rows = json.loads(runs[0].stdout)["rows"]
    assert [row["stored_bits"] for row in rows] == sorted(row["stored_bits"] for row in rows)
    page = CliRunner().invoke(app, [*small, "--markdown"]).stdout
    assert page.count("\n| ") == len(rows) + 1
    assert "PolarQuant, 4 bits" in CliRunner().invoke(app, small).stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--head-dims", "100"], "100 is not one of 64, 80"),
        (["--head-dims", "big"], "not a list of sizes"),
        (["--json", "--markdown"], "exclude each other"),
        (["--probe-rows", "1"], "no standard error"),
        (["--probe-rows", "2", "--head-dims", "64"], "needs 128, the shipped model's head_dim"),
    ],
)
def test_command_names_bad_input(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["distortion", *arguments])
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def probe_text() -> distortion.ProbeText:
    return distortion.ProbeText(2, 40)


def peer_of(roundtrip: Callable[[torch.Tensor], torch.Tensor]) -> codecs.Peer:
    return codecs.Peer("", lambda d: 0, lambda d: 0, roundtrip)


def test_exact_vectors_cost_the_probe_nothing(probe_text: distortion.ProbeText) -> None:
    assert probe_text.divergence(peer_of(lambda x: x)) == (0, 0)


def test_zero_vectors_cost_the_probe_its_attention(probe_text: distortion.ProbeText) -> None:
    exact, blind = (LlamaForCausalLM.from_pretrained(str(MODEL_DIR), dtype=torch.float32) for _ in range(2))
    kls = []
    with torch.no_grad():
        for layer in blind.model.layers:
            layer.self_attn.o_proj.weight.zero_()
        for row in probe_text.rows:
            p, q = (model(torch.tensor([row])).logits[0].log_softmax(-1) for model in (exact, blind))
            kls.append((p.exp() * (p - q)).sum(-1).mean().item())
    found, error = probe_text.divergence(peer_of(torch.zeros_like))
    assert found == pytest.approx(sum(kls) / 2, rel=1e-3) and found > 1
    assert error == pytest.approx(abs(kls[0] - kls[1]) / 2, rel=1e-3)


def test_fewer_bits_cost_the_probe_more(probe_text: distortion.ProbeText) -> None:
    peers = {peer.name: peer for peer in codecs.all_peers()}
    names = "PolarQuant, 4 bits (this package)", "Lloyd-Max 3 bits, norm kept (TurboQuant)"
    fine, coarse = (probe_text.divergence(peers[name])[0] for name in names)
    assert 0 < 2 * fine < coarse


def test_the_probe_stands_in_the_table_where_it_was_read(probe_text: distortion.ProbeText) -> None:
    samples = {name: distortion.gaussian_sample(128, 16, 0) for name in ("gaussian", "uneven")}
    peer = codecs.all_peers()[0]
    read, unread = (distortion.measure(peer, 128, samples, probe) for probe in (probe_text, None))
    mean, error = (distortion._number(value) for value in read["probe_kl"])
    assert distortion.cells(read) == [*distortion.cells(unread), f"{mean} ± {error}"]
    assert distortion.columns([read]) == [*distortion.columns([unread]), "KL on the probe"]
    assert distortion.markdown(128, [read]).splitlines()[2].endswith("| KL on the probe |")
