"""What the documents name exists, and the sizes they print are those of the code."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from vllm_polarquant.format import DEFAULT_PRESET, PRESETS, Slot

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    gone = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not gone


@pytest.mark.parametrize("page", [*PAGES, ROOT / "Makefile"], ids=[*NAMES, "Makefile"])
def test_modules_that_commands_run_exist(page: Path) -> None:
    if page.with_suffix(".json").exists():
        pytest.skip("a report quotes the commands of its day")
    modules = set(re.findall(r"-m (vllm_polarquant[\w.]*\w)", page.read_text()))
    assert not [name for name in sorted(modules) if importlib.util.find_spec(name) is None]


def test_links_into_pages_lead_to_a_heading() -> None:
    def anchors(page: Path) -> set[str]:
        headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
        return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}

    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", page.read_text()):
            there = (page.parent / target).resolve() if target else page
            assert anchor in anchors(there), f"{page.name}: {target}#{anchor}"


def test_what_documents_import_exists() -> None:
    imports = {
        found
        for page in PAGES
        for found in re.findall(r"from (vllm_polarquant[\w.]*) import (\w+)", page.read_text())
    }
    assert imports
    for module, name in imports:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_every_make_target_is_helped_and_no_other_is_named() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    helped = re.findall(r'@echo "make ([\w-]+)', makefile)
    assert {"help", *helped} == set(phony.split())
    named = {name for page in PAGES for name in re.findall(r"`make ([a-z-]+)", page.read_text())}
    assert named <= set(phony.split())


def test_sizes_of_presets() -> None:
    rows = dict(
        re.findall(r"^\| \**`(polarquant_[\w.]+)`.*?\| (.*) \|$", (ROOT / "docs/codec.md").read_text(), re.M)
    )
    assert list(rows) == list(PRESETS)
    for preset, row in rows.items():
        slot = Slot(preset, 128)
        want = [str(slot.nbytes), f"{slot.bits_per_element:.3f}", f"{slot.ratio:.2f}x"]
        assert [cell.strip() for cell in row.split("|")][:3] == want
    readme = (ROOT / "README.md").read_text()
    assert f"| **`{DEFAULT_PRESET}`** | {Slot(DEFAULT_PRESET, 128).ratio:.2f} |" in readme
    assert set(re.findall(r"`(polarquant_k[\w.]+)`", readme)) == set(PRESETS)


@pytest.mark.parametrize("folder", ["vllm_polarquant", "kernels", "kernels/triton", "kernels/cpu", "eval"])
def test_the_design_names_every_module(folder: str) -> None:
    named = set(re.findall(r"(\w+)\.py", (ROOT / "docs/design.md").read_text()))
    modules = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    assert not sorted(modules - named)


def test_the_design_names_no_other_module() -> None:
    folders = ("vllm_polarquant", "kernels", "eval")
    modules = {path.name for folder in folders for path in (ROOT / folder).rglob("*.py")}
    assert not sorted(set(re.findall(r"\w+\.py", (ROOT / "docs/design.md").read_text())) - modules)
