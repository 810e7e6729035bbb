"""The code of one instruction set stays in the namespace of that set.

The linker keeps one copy of a template or an inline function for the whole library. Were it one that was compiled with
AVX-512, the library would end with SIGILL on a processor without.
"""

import importlib.util
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

ALLOWED = {"cstddef", "cstdint", "immintrin.h"}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)


def sources(root: Path) -> list[Path]:
    return sorted((root / "csrc/cpu/isa").glob("*.cpp"))


def with_its_headers(file: Path, folder: Path) -> set[Path]:
    """The file and what it includes of ours, directly or not."""
    found, new = set(), {file}
    while new:
        found |= new
        names = [name for path in new for quote, name in INCLUDE.findall(path.read_text()) if quote == '"']
        new = {
            path for name in names for path in (folder / name, file.parent / name) if path.is_file()
        } - found
    return found


def foreign_symbols(compiled: Path, isa: str) -> list[str]:
    """What the object offers to others, its weak symbols included, outside of its namespace."""
    command = ["nm", "--defined-only", "--extern-only", "--format=just-symbols", str(compiled)]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    # Z: something inside a function; GV: the guard of a static; TV, TT, TI, TS: tables of a class; K: a const method.
    own = re.compile(rf"_Z(GV|T[VTIS])?Z*NK?11pytorch_ext{len(isa)}{isa}")
    foreign = [name for name in names if not own.match(name)]
    return (
        subprocess.run(["c++filt", *foreign], capture_output=True, text=True).stdout.split("\n")
        if foreign
        else []
    )


def test_no_header_that_others_share(root):
    files = {path for source in sources(root) for path in with_its_headers(source, root / "csrc/cpu")}
    included = {(path.name, name) for path in files for _, name in INCLUDE.findall(path.read_text())}
    ours = {path.name for path in files}
    wrong = [f"{file} includes {name}" for file, name in included if name not in ALLOWED | ours]
    assert not wrong, f"allowed are {', '.join(sorted(ALLOWED))} and headers of csrc/cpu"


def test_no_symbol_that_others_share(root):
    if importlib.util.find_spec("pytorch_ext._cpu") is None:
        pytest.skip("pytorch_ext._cpu is not built")
    folder = root / "build/ninja" / sysconfig.get_config_var("SOABI") / "_cpu/isa"
    found = {source: sorted(folder.glob(f"{source.name}.*.o")) for source in sources(root)}
    assert all(found.values()), "make compiles csrc/cpu in build/ninja"
    foreign = {
        path.name: names
        for paths in found.values()
        for path in paths
        if (names := foreign_symbols(path, path.name.split(".")[-2]))
    }
    assert not foreign


def test_a_shared_symbol_is_found(tmp_path):
    (tmp_path / "leak.cpp").write_text(
        "namespace pytorch_ext { template <class T> [[gnu::noinline]] T twice(T x) { return x + x; } }\n"
        "namespace pytorch_ext::avx2 {\n"
        "template <class T> [[gnu::noinline]] T thrice(T x) { return x + twice(x); }\n"
        "float run(float x) { return thrice(x); } }\n"
    )
    command = ["g++", "-std=c++20", "-c", str(tmp_path / "leak.cpp"), "-o", str(tmp_path / "leak.o")]
    subprocess.run(command, check=True)
    [name, _] = foreign_symbols(tmp_path / "leak.o", "avx2")
    assert name == "float pytorch_ext::twice<float>(float)"
