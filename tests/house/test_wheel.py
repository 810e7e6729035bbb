"""What is installed: one top-level package, the same from the tree and from the sdist."""

import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

PLAIN = {"PYTORCH_EXT_CPU": "0", "PYTORCH_EXT_CUDA": "0"}  # contents, not compilation: test_build.py


@pytest.fixture(scope="module")
def built(copy_repository, run_python, tmp_path_factory):
    """The wheel and the sdist of the tree, and the wheel of the sdist."""
    folder = tmp_path_factory.mktemp("built")
    tree = copy_repository(folder / "tree")
    (tree / "csrc/cpu/isa").mkdir(exist_ok=True)
    (tree / "csrc/cpu/isa/only_in_this_test.h").write_text("// headers must be in the sdist\n")

    def build(source: Path, *what: str, into: Path) -> None:
        command = ["-m", "build", "--no-isolation", *what, "--outdir", str(into), str(source)]
        done = run_python(folder, *command, **PLAIN)
        assert done.returncode == 0, done.stdout + done.stderr

    # An earlier build's copy of a module that the tree does not have.
    (tree / "build/lib/pytorch_ext").mkdir(parents=True)
    (tree / "build/lib/pytorch_ext/gone.py").touch()
    build(tree, "--wheel", "--sdist", into=folder / "dist")
    (wheel,) = (folder / "dist").glob("*.whl")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    build(unpacked, "--wheel", into=folder / "again")
    (again,) = (folder / "again").glob("*.whl")
    return SimpleNamespace(tree=tree, wheel=wheel, sdist=sdist, unpacked=unpacked, again=again)


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_one_top_level_package(built):
    files = contents(built.wheel)
    (top_level,) = (text for name, text in files.items() if name.endswith("top_level.txt"))
    assert top_level.decode().split() == ["pytorch_ext"]
    assert {name.split("/")[0].split("-")[0] for name in files} == {"pytorch_ext"}


def test_without_compiled_code_it_fits_every_python(built):
    assert built.wheel.name.endswith("-py3-none-any.whl")


def test_every_module_of_the_tree_is_in_the_wheel(built):
    """Also those in folders that a new sub-package forgot to give an __init__.py."""
    wheel = set(contents(built.wheel))
    places = {
        "pytorch_ext": "pytorch_ext",
        "kernels/reference": "pytorch_ext/kernels/reference",
        "kernels/triton": "pytorch_ext/kernels/triton",
        "benchmarks": "pytorch_ext/benchmarks",
    }
    for folder, place in places.items():
        for path in (built.tree / folder).rglob("*.py"):
            assert f"{place}/{path.relative_to(built.tree / folder)}" in wheel
    assert not [name for name in wheel if name.endswith("gone.py")]


def test_the_wheel_of_the_sdist_is_the_wheel_of_the_tree(built):
    assert built.again.name == built.wheel.name
    assert contents(built.again) == contents(built.wheel)


def test_the_sdist_can_build_and_test(built):
    for name in ("constraints.txt", "Makefile", "LICENSE", "build_tools", "tests/house/test_wheel.py"):
        assert (built.unpacked / name).exists(), name
    assert (built.unpacked / "csrc/cpu/isa/only_in_this_test.h").exists()


@pytest.mark.full
def test_it_installs_and_imports_from_another_folder(built, run_python, tmp_path):
    site = tmp_path / "site"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    done = run_python(tmp_path, *install, str(built.wheel))
    assert done.returncode == 0, done.stderr
    assert {path.name.split("-")[0] for path in site.iterdir()} <= {"pytorch_ext", "bin"}

    # -S: no .pth files, so that an editable installation of this checkout cannot help out.
    paths = [str(site), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    modules = ["pytorch_ext", "pytorch_ext.kernels.reference", "pytorch_ext.kernels.triton"]
    modules += ["pytorch_ext.benchmarks", "pytorch_ext.testing"]
    code = (
        "import importlib, importlib.metadata, sys\n"
        f"sys.path[1:1] = {paths!r}\n"
        f"for name in {modules!r}:\n"
        "    print(importlib.import_module(name).__file__)\n"
        "print(importlib.metadata.version('pytorch-ext'), sys.modules['pytorch_ext'].__version__)"
    )
    done = run_python(tmp_path, "-S", "-c", code)
    assert done.returncode == 0, done.stderr
    *files, versions = done.stdout.splitlines()
    assert all(Path(file).is_relative_to(site) for file in files), files
    assert len(set(versions.split())) == 1


@pytest.mark.full
@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_an_editable_installation_finds_every_part(copy_repository, run_python, tmp_path, mode):
    tree = copy_repository(tmp_path / "tree")
    environment = tmp_path / "environment"
    done = run_python(tmp_path, "-m", "venv", "--without-pip", str(environment))
    assert done.returncode == 0, done.stderr
    (site,) = environment.glob("lib/python*/site-packages")
    # torch, pip and setuptools of this environment, but not its .pth files.
    (site / "base.pth").write_text(f"{sysconfig.get_path('purelib')}\n")

    def run(cwd: Path, *arguments: str) -> None:
        done = run_python(cwd, *arguments, python=environment / "bin/python", **PLAIN)
        assert done.returncode == 0, done.stdout + done.stderr

    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", str(tree)]
    run(tmp_path, *install, *(["-C", "editable_mode=strict"] if mode == "strict" else []))
    parts = "pytorch_ext.kernels.reference.layer_norm, pytorch_ext.kernels.triton, pytorch_ext.benchmarks"
    run(tmp_path, "-c", f"import {parts}; assert pytorch_ext.__file__.startswith({str(tree)!r})")
    run(tree, "-c", "import benchmarks.timing")
