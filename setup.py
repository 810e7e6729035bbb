"""Maps the folders of the repository to packages and compiles csrc/ with ninja. The rest: pyproject.toml.

    python setup.py plan                  what a build would compile here, with what and for what, or why not
    python setup.py build_ext --inplace   compiles what changed, into pytorch_ext/
    python setup.py build_ext --sanitize  compiles a slow _cpu that stops at the first access out of bounds

Read from the environment:
    PYTORCH_EXT_CPU=1|0         csrc/cpu  -> pytorch_ext/_cpu  (default: 1)
    PYTORCH_EXT_CUDA=auto|1|0   csrc/cuda -> pytorch_ext/_cuda (auto, the default: if nvcc is there and torch
                                has CUDA)
    TORCH_CUDA_ARCH_LIST        such as "8.0;9.0a;10.0+PTX" (default: 8.0, 9.0 and, where nvcc knows it, 10.0;
                                with PTX of the last)
    MAX_JOBS                    how many compilers at once (default: one per core)
    CXX, CUDA_HOME              which compilers (default: g++ and nvcc on PATH)

`_cpu` is pybind11 and ATen: it fits the torch and the Python that it was compiled with. Its vector code in
csrc/cpu/isa is compiled once for each instruction set, and the best is chosen when it runs. `_cuda` uses the
stable ABI of LibTorch alone, so that nvcc can compile it beside a torch without CUDA; CUDAExtension of
torch.utils.cpp_extension refuses that, so nvcc is called here directly. Whether the build machine has a GPU
is never asked. A build that was asked for and cannot be made is one error that says what is missing.
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import setuptools
from setuptools import Command, Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_tools"))  # under PEP 517 the folder of setup.py is not on sys.path

from build_plan import Library, in_words, plan, refuse_what_cannot_be_built  # noqa: E402
from toolchain import find_compiler, find_ninja, find_nvcc  # noqa: E402

# Folders that are installed under another name than they have here. `kernels` itself has no __init__.py: as
# a regular top-level package it would hide Hugging Face's `kernels`, and transformers would fail to import.
MAPPED = {
    "pytorch_ext.kernels.reference": "kernels/reference",
    "pytorch_ext.kernels.triton": "kernels/triton",
    "pytorch_ext.benchmarks": "benchmarks",
}

# ninja compiles a file again when it, a header it includes or the command changed: flags are part of the key.
RULES = """\
ninja_required_version = 1.5
rule cxx
  command = {cxx} $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $in$for
rule nvcc
  command = {nvcc} $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $in
rule link
  command = {cxx} $in $flags -o $out
  description = link $out
"""


def ninja_file(libraries: list[Library], targets: dict[str, Path], folder: Path) -> str:
    def escaped(path: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    def command(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    nvcc = find_nvcc()
    text = RULES.format(cxx=command(find_compiler() or []), nvcc=command([nvcc.path]) if nvcc else "nvcc")
    for library in libraries:
        place = folder / library.name
        for made in library.objects:
            needs = f" | {escaped(place / made.header)}" if made.header else ""
            text += f"build {escaped(place / made.name)}: {made.rule} {escaped(made.source)}{needs}\n"
            text += f"  flags = {command(made.flags)}\n"
            text += f"  for = $ for {made.isa}\n" if made.isa else ""
        objects = [escaped(place / made.name) for made in library.objects if made.name.endswith(".o")]
        text += f"build {escaped(targets[library.name])}: link {' '.join(objects)}\n"
        text += f"  flags = {command(library.link_flags)}\n"
    return text


@contextlib.contextmanager
def only_one_build_in(folder: Path) -> Iterator[None]:
    """ninja has no lock of its own, and two of them would write into the same objects."""
    import fcntl  # Windows has none, and compiles nothing

    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class BuildExt(build_ext):
    user_options = [
        *build_ext.user_options,
        ("sanitize", None, "compile _cpu with AddressSanitizer and UndefinedBehaviorSanitizer"),
    ]
    boolean_options = [*build_ext.boolean_options, "sanitize"]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.sanitize = False

    def run(self) -> None:
        libraries = plan(self.sanitize)
        print(in_words(libraries), flush=True)
        refuse_what_cannot_be_built(libraries)
        if self.inplace:
            self.remove_leftovers(libraries)
        super().run()

    def remove_leftovers(self, libraries: list[Library]) -> None:
        """A library of an earlier build that this build leaves out would go on being loaded from the tree."""
        for library in libraries:
            if not library.is_built:
                for leftover in (ROOT / "pytorch_ext").glob(f"{library.name}.*so"):
                    print(f"removing {leftover}, which an earlier build left")
                    leftover.unlink()

    def build_extensions(self) -> None:
        libraries = [library for library in plan(self.sanitize) if library.is_built]
        kind = "-sanitize" if self.sanitize else ""
        folder = ROOT / "build" / "ninja" / f"{sysconfig.get_config_var('SOABI')}{kind}"
        folder.mkdir(parents=True, exist_ok=True)
        wanted = {ext.name.split(".")[-1]: Path(self.get_ext_fullpath(ext.name)) for ext in self.extensions}
        targets = {name: folder / path.name for name, path in wanted.items()}
        with only_one_build_in(folder):
            self.compile(libraries, targets, folder)
            self.put_in_place(targets, wanted)

    def compile(self, libraries: list[Library], targets: dict[str, Path], folder: Path) -> None:
        (folder / "build.ninja").write_text(ninja_file(libraries, targets, folder))
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        done = subprocess.run([find_ninja() or "ninja", "-C", str(folder), "-j", jobs], check=False)
        if done.returncode:
            raise SystemExit("error: compiling csrc/ failed; the compiler's own messages are above.")

    def put_in_place(self, targets: dict[str, Path], wanted: dict[str, Path]) -> None:
        for name, path in wanted.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(targets[name]), str(path))


class Build(build):
    # build_ext runs also when there is nothing to compile: it says why.
    sub_commands = [(name, None if name == "build_ext" else needed) for name, needed in build.sub_commands]

    def run(self) -> None:
        refuse_what_cannot_be_built(plan())  # before the log fills with copied files
        # setuptools only ever adds to this folder: a wheel would hold modules that the tree no longer has.
        if ROOT / "build" in Path(self.build_lib).resolve().parents:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class Plan(Command):
    description = "say what a build would compile here, with what and for what, or why not"
    user_options = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        print(in_words(plan()))


def extension(library: Library) -> Extension:
    sources = [str(path.relative_to(ROOT)) for path in library.sources]
    return Extension(f"pytorch_ext.{library.name}", sources, py_limited_api=library.name == "_cuda")


def main() -> None:
    if int(setuptools.__version__.split(".")[0]) < 77:
        # A build without isolation uses what the environment has, and older ones choke on pyproject.toml.
        raise SystemExit("error: setuptools is too old. Run: pip install 'setuptools>=77' wheel ninja")
    packages = find_packages(str(ROOT), include=["pytorch_ext", "pytorch_ext.*"])
    for package, folder in MAPPED.items():
        packages += [package, *(f"{package}.{inner}" for inner in find_packages(str(ROOT / folder)))]
    libraries = [library for library in plan() if library.is_built]
    # Without _cpu nothing in the wheel depends on the version of Python.
    abi3 = [library.name for library in libraries] == ["_cuda"]
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        abi3 = False  # a free-threaded Python has no limited API
    setup(
        packages=packages,
        package_dir=MAPPED,
        ext_modules=[extension(library) for library in libraries],
        cmdclass={"build": Build, "build_ext": BuildExt, "plan": Plan},
        options={"bdist_wheel": {"py_limited_api": "cp311"}} if abi3 else {},
    )


main()
