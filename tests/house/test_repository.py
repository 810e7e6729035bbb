"""Rules of the house that no tool checks."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

import pytorch_ext

CODE = {".py", ".cpp", ".cu", ".cuh", ".h"}
LONGEST = 450


def test_no_file_is_long(root, repository_files):
    code = [file for file in repository_files if file.suffix in CODE]
    lengths = {str(file): len((root / file).read_text().splitlines()) for file in code}
    too_long = {name: length for name, length in lengths.items() if length > LONGEST}
    assert not too_long, f"split these: {too_long}"


def test_kernels_is_no_package(root):
    """It would hide Hugging Face's `kernels`, and then transformers fails to import from the root."""
    assert not (root / "kernels/__init__.py").exists()


def test_nothing_that_a_build_or_a_run_leaves_is_kept(repository_files):
    folders = {"__pycache__", "build", "dist", ".venv", "demo-output", ".pytest_cache", ".ruff_cache"}
    suffixes = {".so", ".pyc", ".o"}
    kept = [file for file in repository_files if folders & set(file.parts) or file.suffix in suffixes]
    assert not kept


def test_the_makefile_has_its_targets(root):
    text = (root / "Makefile").read_text()
    for target in ("help", "demo", "test", "test-full", "lint", "clean"):
        assert re.search(rf"^{target}:.*## \S", text, re.MULTILINE), target
    for variable in ("VENV", "PYTHON", "TORCH_INDEX"):
        assert re.search(rf"^{variable} \?=", text, re.MULTILINE), variable


def test_one_version(root):
    assert importlib.metadata.version("pytorch-ext") == pytorch_ext.__version__
    assert pytorch_ext.__version__ in (root / "CHANGELOG.md").read_text()


def test_torch_is_the_only_core_dependency(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert [Requirement(text).name for text in project["dependencies"]] == ["torch"]
    assert set(project["optional-dependencies"]) == {"demo", "bench", "export", "train", "dev"}


def test_every_dependency_is_pinned_within_its_bounds(root):
    pins = {}
    for line in (root / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", line).groups()
            pins[normal(name)] = version
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    asked = [project["dependencies"], *project["optional-dependencies"].values()]
    assert "triton" not in pins, "a CUDA build of torch asks for one version of triton alone, its own"
    for requirement in (Requirement(text) for texts in asked for text in texts):
        if requirement.name == "triton":
            assert not requirement.specifier
            continue
        pin = pins.get(normal(requirement.name))
        assert pin, f"constraints.txt lacks {requirement.name}"
        assert requirement.specifier.contains(pin), f"{requirement} is pinned to {pin}"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_links_between_documents_lead_somewhere(root, repository_files):
    for file in (file for file in repository_files if file.suffix == ".md"):
        text = (root / file).read_text()
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if "://" not in target:
                assert (root / file.parent / Path(target)).exists(), f"{file} links to {target}"
