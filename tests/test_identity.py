"""Bytes of one meaning are never read as another: keys of offloaded blocks, and what metrics say of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_runs import run

pytest.importorskip("vllm")

from vllm.config import KVTransferConfig

import vllm_polarquant.page
from vllm_polarquant import support
from vllm_polarquant.codec import tables
from vllm_polarquant.format import Slot
from vllm_polarquant.identity import Identity, joined, of_worker
from vllm_polarquant.kernels.ops import LayerShape
from vllm_polarquant.layer import PolarQuantImpl

CPU = torch.device("cpu")


def worker(
    preset: str = "polarquant_k4v4",
    dtype: torch.dtype = torch.bfloat16,
    block_size: int = 16,
    order: str = "rows",
    names: tuple[str, ...] = ("0", "1"),
    **polarquant: bool,
) -> Any:
    """What a worker has of its layers once it is ready."""
    slot = Slot(preset, 64)
    layers: dict[str, Any] = {}
    for name in names:
        impl = object.__new__(PolarQuantImpl)
        impl.shape = LayerShape(slot, 4, 2, dtype, CPU)
        impl.ops = SimpleNamespace(order=order)
        impl.tables = tables(slot, dtype, CPU)
        impl.energy_removed = 0.25 * (1 + int(name))
        cache = torch.zeros(3, 2, block_size, slot.nbytes, dtype=torch.uint8)
        layers[name] = SimpleNamespace(impl=impl, kv_cache=cache)
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=layers | {"native": SimpleNamespace()}),
        additional_config={"polarquant": polarquant},
    )
    return SimpleNamespace(vllm_config=config)


def identity(**changes: Any) -> Identity:
    found = of_worker(worker(**changes))
    assert found is not None
    return found


def test_an_identity_is_the_same_twice_and_says_what_it_names() -> None:
    found = identity()
    assert found == identity()
    assert found.labels() == {
        "page_format": "polarquant_k4v4-v4-rows-d64-b16-s42",
        "cache_identity": found.name,
        "key_energy_removed": "0.375",
    }


@pytest.mark.parametrize(
    "change",
    [
        {"preset": "polarquant_k3v3"},
        {"dtype": torch.float16},
        {"block_size": 32},
        {"order": "lanes"},
        {"names": ("1",)},
        {"prefill_from_pages": True},
    ],
    ids=str,
)
def test_whatever_decides_what_bytes_mean_changes_it(change: dict[str, Any]) -> None:
    assert identity(**change).name != identity().name


@pytest.mark.parametrize("constant", ["FORMAT_VERSION", "SEED"])
def test_so_do_the_page_format_and_the_seed(constant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity()
    monkeypatch.setattr(vllm_polarquant.page, constant, 1 + getattr(vllm_polarquant.page, constant))
    assert identity().name != before.name


def test_so_does_one_value_of_one_layers_tables() -> None:
    changed = worker()
    impl = changed.vllm_config.compilation_config.static_forward_context["1"].impl
    impl.tables = impl.tables._replace(key_factors=impl.tables.key_factors.clone())
    impl.tables.key_factors[0, 5] *= -1
    found = of_worker(changed)
    assert found is not None and found.name != identity().name


def test_ranks_are_told_apart_by_their_order() -> None:
    first, second = identity(), identity(names=("0",))
    assert joined([first]) == joined([None, first]) == first
    both, swapped = joined([first, second]), joined([second, first])
    assert both is not None and swapped is not None
    assert len({both.name, swapped.name, first.name, second.name}) == 4
    assert both.labels()["key_energy_removed"] == "0.333"
    assert joined([None]) is None


def test_a_worker_without_a_layer_of_ours_has_none() -> None:
    assert of_worker(worker(names=())) is None


def refused(connector: str | None, extra: dict[str, Any], module: str | None = None) -> list[str]:
    transfer = KVTransferConfig(
        kv_connector=connector,
        kv_role="kv_both",
        kv_connector_module_path=module,
        kv_connector_extra_config=extra,
    )
    return [str(hit.values["value"]) for hit in support.connector_hits(transfer)]


FILES = {"spec_name": "TieringOffloadingSpec", "secondary_tiers": [{"type": "fs", "root_dir": "/tmp"}]}


def child(name: str = "OffloadingConnector", **extra: Any) -> dict[str, Any]:
    return {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": extra}


@pytest.mark.parametrize(
    ("connector", "extra"),
    [
        ("OffloadingConnector", {}),
        ("OffloadingConnector", {"spec_name": "CPUOffloadingSpec"}),
        ("OffloadingConnector", FILES),
        ("MultiConnector", {"connectors": [child()]}),
        ("MultiConnector", {"connectors": [child(**FILES)]}),
        ("NixlConnector", {}),
        ("NixlConnector", {"backends": ["UCX"], "enforce_handshake_compat": True}),
        ("MultiConnector", {"connectors": [child("NixlConnector"), child()]}),
    ],
)
def test_tiers_that_were_tried_are_served(connector: str, extra: dict[str, Any]) -> None:
    assert refused(connector, extra) == []


@pytest.mark.parametrize(
    ("connector", "extra", "named"),
    [
        ("NixlPushConnector", {}, "NixlPushConnector"),
        ("NixlConnector", {"enforce_handshake_compat": False}, "enforce_handshake_compat"),
        ("NixlConnector", {"bidirectional_kv_xfer": True}, "bidirectional_kv_xfer"),
        ("LMCacheConnectorV1", {}, "LMCacheConnectorV1"),
        ("ExampleConnector", {}, "ExampleConnector"),
        ("OffloadingConnector", {"spec_name": "TheirSpec"}, "TheirSpec"),
        ("OffloadingConnector", FILES | {"secondary_tiers": [{"type": "p2p"}]}, "p2p"),
        ("OffloadingConnector", FILES | {"secondary_tiers": [{"type": "fs"}, {"type": "obj"}]}, "obj"),
        ("OffloadingConnector", FILES | {"secondary_tiers": ["fs"]}, "None"),
        ("OffloadingConnector", FILES | {"canonical_layout": True}, "canonical_layout"),
        ("MultiConnector", {"connectors": [child("NixlConnector")] * 2}, "more than one NixlConnector"),
        (
            "MultiConnector",
            {"connectors": [child("NixlConnector", enforce_handshake_compat=False)]},
            "enforce_handshake_compat",
        ),
        ("MultiConnector", {"connectors": [child(spec_name="TheirSpec")]}, "TheirSpec"),
        ("MultiConnector", {"connectors": [child(), child()]}, "more than one OffloadingConnector"),
    ],
)
def test_others_are_refused_by_name(connector: str, extra: dict[str, Any], named: str) -> None:
    assert any(named in value for value in refused(connector, extra))


@pytest.mark.parametrize("name", ["OffloadingConnector", "NixlConnector"])
def test_a_class_of_somebody_elses_by_a_known_name_is_refused(name: str) -> None:
    assert refused(name, {}, module="somebody.elses") == [name]
    other = child(name) | {"kv_connector_module_path": "somebody.elses"}
    assert refused("MultiConnector", {"connectors": [other]}) == [name]


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize(
    ("sleeps", "buffer", "named"),
    [(False, "cuda", []), (True, "cuda", ["sleep mode"]), (False, "cpu", ["kv_buffer_device"])],
)
def test_peers_neither_sleep_nor_go_through_the_host(
    sleeps: bool, buffer: str, named: list[str], multi: bool
) -> None:
    peer = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": buffer}
    if multi:
        extra = {"connectors": [peer]}
        peer = {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_buffer_device": "cuda"}
        peer["kv_connector_extra_config"] = extra
    config = SimpleNamespace(
        kv_transfer_config=KVTransferConfig(**peer), model_config=SimpleNamespace(enable_sleep_mode=sleeps)
    )
    hits = list(support._peer_hits(config, SimpleNamespace(is_cuda=lambda: True)))
    assert len(hits) == len(named)
    assert all(word in str(hit.values["value"]) for hit, word in zip(hits, named, strict=True))


@pytest.fixture(scope="module")
def tiers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    script = str(Path(__file__).with_name("offload_runs.py"))
    return run("tiers", str(tmp_path_factory.mktemp("files")), script=script, VLLM_POLARQUANT_LOSSLESS="1")


def boots_engines(test: Any) -> Any:
    return pytest.mark.slow(pytest.mark.timeout(600)(test))


@boots_engines
def test_an_engine_reads_the_files_that_one_like_it_wrote(tiers: dict[str, Any]) -> None:
    written, read = tiers["written"], tiers["read"]
    assert written["hits"][0] == 0
    # The writer's second answers come from pages, as the reader's do.
    assert read["hits"][0] == written["hits"][1] > 0
    assert read["tokens"][0] == written["tokens"][1]
    assert read["labels"] == written["labels"]


@boots_engines
def test_one_to_which_they_mean_something_else_does_not(tiers: dict[str, Any]) -> None:
    other = tiers["not centred"]
    assert other["hits"] == [0]
    assert other["labels"]["polarquant_page_format"] == tiers["read"]["labels"]["polarquant_page_format"]
    assert (
        other["labels"]["polarquant_cache_identity"] != tiers["read"]["labels"]["polarquant_cache_identity"]
    )


@boots_engines
def test_16_bit_pages_come_back_from_files_as_they_were(tiers: dict[str, Any]) -> None:
    exact, again = tiers["raw"]["tokens"]
    assert tiers["raw"]["hits"][1] == tiers["raw behind MultiConnector"]["hits"][0] > 0
    assert again == exact
    assert tiers["raw behind MultiConnector"]["tokens"][0] == exact


@boots_engines
def test_the_folders_say_whose_they_are(tiers: dict[str, Any]) -> None:
    names = {
        f"{dtype}-{tiers[run]['labels']['polarquant_cache_identity']}"
        for dtype, run in (
            ("polarquant_lossless", "raw"),
            ("polarquant_k4v4", "read"),
            ("polarquant_k4v4", "not centred"),
        )
    }
    assert set(tiers["configs"]) == names
