"""The page's arithmetic, against numbers written by hand."""

import itertools

import pytest
import torch

from vllm_polarquant.format import (
    BITS,
    DEFAULT_PRESET,
    HEAD_DIMS,
    LOSSLESS,
    PRESETS,
    Slot,
    UnsupportedFormat,
    VectorFormat,
    is_polar_dtype,
)
from vllm_polarquant.kernels.triton.page_io import lane_order
from vllm_polarquant.page import Page, dense_block_stride, page_of
from vllm_polarquant.reference import rows

# Bytes of one token in one kv head. A vector of d coordinates takes d/4 bytes at 2 bits, 3d/8 at 3,
# d/2 at 4 and d at 8; the two radii take 4. A slot of 512 is as large as two of 256.
SLOT_BYTES = {
    #                   64   80   96  112  128  192  256  512
    "polarquant_k8v4": (100, 124, 148, 172, 196, 292, 388, 776),
    "polarquant_k4v4": (68, 84, 100, 116, 132, 196, 260, 520),
    "polarquant_k4v3": (60, 74, 88, 102, 116, 172, 228, 456),
    "polarquant_k3.5v3.5": (60, 74, 88, 102, 116, 172, 228, 456),
    "polarquant_k3v3": (52, 64, 76, 88, 100, 148, 196, 392),
    "polarquant_k2.5v2.5": (44, 54, 64, 74, 84, 124, 164, 328),
    "polarquant_k3v2": (44, 54, 64, 74, 84, 124, 164, 328),
    "polarquant_k2v2": (36, 44, 52, 60, 68, 100, 132, 264),
    LOSSLESS: (260, 324, 388, 452, 516, 772, 1028, 2056),
}
EVERY_PAGE = [
    Page(Slot(preset, head_dim), block_size)
    for preset, head_dim, block_size in itertools.product(SLOT_BYTES, HEAD_DIMS, (16, 48))
]


def test_every_preset_has_pinned_bytes():
    assert set(SLOT_BYTES) == {*PRESETS, LOSSLESS}
    assert HEAD_DIMS == (64, 80, 96, 112, 128, 192, 256, 512)
    assert DEFAULT_PRESET in PRESETS


@pytest.mark.parametrize("preset", SLOT_BYTES)
def test_slot_bytes(preset):
    assert tuple(Slot(preset, d).nbytes for d in HEAD_DIMS) == SLOT_BYTES[preset]


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.cache_id("rows"))
def test_page_has_no_gaps(page):
    tokens, slot = page.block_size, page.slot
    end = 0
    for start, size in (
        (0, tokens * slot.key_bytes),
        (page.value_offset, tokens * slot.value_bytes),
        (page.key_radius_offset, tokens * 4),
    ):
        assert start == end
        assert start % 16 == 0
        end = start + size
    assert page.value_radius_offset == page.key_radius_offset + 2
    assert end == page.nbytes - tokens * slot.padding
    assert page.nbytes == tokens * slot.nbytes
    assert page.nbytes % 16 == 0


def test_default_page_in_numbers():
    slot = Slot("polarquant_k4v3", 128)
    assert (slot.key_bytes, slot.value_bytes, slot.nbytes) == (64, 48, 116)
    assert slot.bits_per_element == 3.625
    assert Slot("polarquant_k4v4", 128).ratio == pytest.approx(512 / 132)
    page = Page(slot, 32)
    assert page.value_offset == 2048
    assert page.key_radius_offset == 3584
    assert page.value_radius_offset == 3586
    assert page.nbytes == 3712


def lanes_shares(code_bytes, parts, runs):
    """(token, byte) pairs of each lane, in order: what the operands of its tensor-core products hold."""
    piece = code_bytes // runs // parts
    for group, place in itertools.product(range(8), range(4)):
        tokens = (group, group + 8)
        part = place
        if parts == 8:
            tokens = (2 * place, 2 * place + 1, 2 * place + 8, 2 * place + 9)
            part = group
        starts = [run * code_bytes // runs + part * piece for run in range(runs)]
        yield [(t, b) for t in tokens for start in starts for b in range(start, start + piece)]


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.cache_id("lanes"))
def test_codes_lie_as_lanes_read_them(page):
    slot, order = page.slot, lane_order(page)
    for vector, size, parts, places in (
        (slot.key, slot.key_bytes, 4, order.key),
        (slot.value, slot.value_bytes, 8, order.value),
    ):
        if size % 8:
            memory = list(itertools.product(range(16), range(size)))
        else:
            shares = list(lanes_shares(size, parts, 1 if vector.kind == "polar" else 2))
            memory = []
            while shares[0]:
                width = next(w for w in (16, 8, 4) if len(shares[0]) >= w)
                for share in shares:
                    memory += share[:width]
                    del share[:width]
        assert places.dtype == torch.int64 and places.shape == (16, size)
        assert [int(places[token, byte]) for token, byte in memory] == list(range(16 * size))


def test_rows_lie_one_after_the_other():
    order = rows(Page(Slot("polarquant_k3v2", 80), 32))
    assert [tuple(places.shape) for places in order] == [(16, 30), (16, 20)]
    assert all(places.flatten().tolist() == list(range(places.numel())) for places in order)


def test_cache_id_tells_pages_apart():
    ids = {page.cache_id(order) for page in EVERY_PAGE for order in ("rows", "lanes")}
    assert len(ids) == 2 * len(EVERY_PAGE)
    page = Page(Slot("polarquant_k4v4", 128), 16)
    assert page.cache_id("rows") == "polarquant_k4v4-v4-rows-d128-b16-s42"


@pytest.mark.parametrize(
    ("preset", "head_dim", "block_size", "message"),
    [
        ("polarquant_k5v5", 128, 16, r"unknown preset 'polarquant_k5v5'; choose one of .*k4v4"),
        ("polarquant_k4v4", 72, 16, r"head_dim 72 is not supported.*64, 80, 96, 112, 128"),
        ("polarquant_k4v4", 0, 16, r"head_dim 0 is not supported"),
        ("polarquant_k4v4", 128, 8, r"block size 8 is not a multiple of 16"),
        ("polarquant_k4v4", 128, 0, r"block size 0 is not a multiple of 16"),
        ("polarquant_k4v4", 128, -16, r"block size -16 is not a multiple of 16"),
    ],
)
def test_errors_name_the_cause(preset, head_dim, block_size, message):
    with pytest.raises(UnsupportedFormat, match=message):
        Page(Slot(preset, head_dim), block_size)


def test_codes_are_whole_bytes():
    for bits, head_dim in itertools.product(BITS, HEAD_DIMS):
        assert VectorFormat("polar", bits).code_bytes(head_dim) * 8 == bits * head_dim
    with pytest.raises(UnsupportedFormat, match=r"2\.5 bits x head_dim 6"):
        VectorFormat("polar", 2.5).code_bytes(6)


def test_pair_bits():
    assert [VectorFormat("polar", bits).pair_bits for bits in BITS] == [4, 5, 6, 7, 8]


K4V4 = Page(Slot("polarquant_k4v4", 128), 16)


def layer_view(layout: str, page: Page, heads: int) -> torch.Tensor:
    """One layer's cache [B, H, N, C] out of a tensor whose dims lie in the order of `layout`."""
    size = {"L": 3, "B": 5, "H": heads, "N": page.block_size, "C": page.slot.nbytes}
    cache = torch.empty([size[dim] for dim in layout], dtype=torch.uint8)
    return cache.permute([layout.index(dim) for dim in "LBHNC"])[1]


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(("layout", "layers"), [("LBHNC", 1), ("LBNHC", 1), ("BLHNC", 3), ("BLNHC", 3)])
def test_dense_layouts(layout, layers, heads):
    cache = layer_view(layout, K4V4, heads)
    assert cache.shape == (5, heads, 16, 132)
    assert page_of(cache, K4V4.slot) == K4V4
    assert dense_block_stride(cache, K4V4) == layers * heads * 16 * 132


@pytest.mark.parametrize("layout", ["LHBNC", "BHLNC"])
def test_scattered_layouts_are_refused(layout):
    with pytest.raises(ValueError, match=r"not contiguous.*LBHNC, LBNHC, BLHNC, BLNHC"):
        dense_block_stride(layer_view(layout, K4V4, 2), K4V4)


def test_one_head_is_dense_in_any_order():
    page = Page(Slot("polarquant_k3v2", 64), 16)
    assert dense_block_stride(layer_view("LHBNC", page, 1), page) == 16 * 44


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((5, 2, 16, 133), torch.uint8),
        ((5, 2, 32, 132), torch.uint8),
        ((5, 2, 16, 132), torch.bfloat16),
    ],
)
def test_wrong_caches_are_refused(shape, dtype):
    with pytest.raises(ValueError, match=r"expected a cache uint8 \[B, H, 16, 132\]"):
        dense_block_stride(torch.empty(shape, dtype=dtype), K4V4)


def test_padded_slots_are_refused():
    padded = torch.empty(5, 2, 16, 144, dtype=torch.uint8)[..., :132]
    with pytest.raises(ValueError, match="not contiguous"):
        dense_block_stride(padded, K4V4)


def test_is_polar_dtype():
    assert all(is_polar_dtype(preset) for preset in SLOT_BYTES)
    assert not any(is_polar_dtype(name) for name in (None, "", "auto", "fp8", "polarquant"))
