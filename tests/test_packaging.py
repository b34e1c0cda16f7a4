"""The wheel and the sdist: built, installed and imported as a user would, without the network."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest

import vllm_polarquant

ROOT = Path(__file__).parents[1]
# Folder in the checkout -> folder once installed.
PACKAGES = {
    "vllm_polarquant": "vllm_polarquant",
    "kernels": "vllm_polarquant/kernels",
    "eval": "vllm_polarquant/eval",
}
DATA = ("*.json", "tasks/*.py", "tasks/*yaml", "py.typed", "probe/data/*", "probe/model/*")
# How the probe was trained: for readers of the checkout, and of no use without the corpus.
LEFT_OUT = "vllm_polarquant/eval/training/"
SKIPPED = (".*", "__pycache__", "build", "dist", "*.egg-info")


def shell(*command: object, cwd: Path, **env: str) -> str:
    arguments = [str(part) for part in command]
    result = subprocess.run(
        arguments,
        cwd=cwd,
        env=env or None,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, f"{' '.join(arguments)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def build_wheel(source: Path, out: Path) -> Path:
    out.mkdir()
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index")
    shell(*pip, "--wheel-dir", out, source, cwd=out)
    (wheel,) = out.glob("*.whl")
    return wheel


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout, as builds write into theirs."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*SKIPPED))
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build_wheel(source, tmp_path_factory.mktemp("wheel") / "out")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet")
    shell(*pip, "--target", target, wheel, cwd=target)
    return target


@pytest.fixture(scope="module")
def distribution(installed) -> Distribution:
    (found,) = distributions(name="vllm-polarquant", path=[str(installed)])
    return found


def test_wheel_holds_every_module_and_data_file_but_the_training(source, wheel):
    expected = set()
    for folder, package in PACKAGES.items():
        for pattern in ("**/*.py", *(f"**/{data}" for data in DATA)):
            found = [path for path in (source / folder).glob(pattern) if path.is_file()]
            expected |= {f"{package}/{path.relative_to(source / folder)}" for path in found}
    left_out = {name for name in expected if name.startswith(LEFT_OUT)}
    assert f"{LEFT_OUT}train.py" in left_out
    expected -= left_out
    assert {"vllm_polarquant/codebook.json", "vllm_polarquant/py.typed"} <= expected
    packed = {name for name in files_of(wheel) if ".dist-info/" not in name}
    assert packed == expected


def test_sdist_builds_the_same_wheel(source, wheel, tmp_path):
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    shell(sys.executable, "-c", code, tmp_path, cwd=source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        # Python 3.11 has filters since 3.11.4.
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert (unpacked / "LICENSE").is_file()
    assert files_of(build_wheel(unpacked, tmp_path / "out")) == files_of(wheel)


def test_wheel_imports_where_it_is_installed(installed, tmp_path):
    code = (
        "import vllm_polarquant.kernels as k, vllm_polarquant.eval.probe as p; "
        "from vllm_polarquant.codec import PolarQuant; "
        "print(k.__file__, p.__file__, PolarQuant(128, 4).code_bytes, sep='\\n')"
    )
    out = shell(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    kernels, probe, size = out.split()
    package = installed / "vllm_polarquant"
    assert Path(kernels) == package / "kernels" / "__init__.py"
    assert Path(probe) == package / "eval" / "probe" / "__init__.py"
    assert size == "64"


def test_command_line_is_installed(installed, tmp_path):
    out = shell(installed / "bin" / "polarquant", "--version", cwd=tmp_path, PYTHONPATH=str(installed))
    assert out == f"polarquant {vllm_polarquant.__version__}\n"


def test_entry_points(distribution, installed):
    points = {(point.group, point.name): point.value for point in distribution.entry_points}
    assert points == {
        ("console_scripts", "polarquant"): "vllm_polarquant.cli:app",
        ("console_scripts", "polarquant-eval"): "vllm_polarquant.eval.cli:app",
        ("vllm.general_plugins", "polarquant"): "vllm_polarquant.plugin:register",
    }
    plugin = (installed / "vllm_polarquant" / "plugin.py").read_text()
    assert "\ndef register(" in plugin


def test_metadata(distribution):
    metadata = distribution.metadata
    assert distribution.version == vllm_polarquant.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata["Requires-Python"].split(",")) == {">=3.11", "<3.14"}
    assert set(metadata.get_all("Provides-Extra") or []) == {"dev", "eval"}
    required = [line.replace(" ", "") for line in distribution.requires or []]
    assert any(line in ("vllm<0.34,>=0.32", "vllm>=0.32,<0.34") for line in required)
    assert any("licenses/LICENSE" in str(path) for path in distribution.files or [])


def test_the_checkout_is_what_the_tests_import():
    assert Path(vllm_polarquant.__file__) == ROOT / "vllm_polarquant" / "__init__.py"
