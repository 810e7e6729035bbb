"""The build: what it says, what it refuses, and that it compiles what it must and no more."""

import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

MODULE = """
#include <pybind11/pybind11.h>
int answer();
namespace pytorch_ext {
namespace plain { int width(); }
namespace avx2 { int width(); }
namespace avx512 { int width(); }
}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("answer", &answer);
  m.attr("plain") = pytorch_ext::plain::width();
#ifndef PYTORCH_EXT_ONLY_PLAIN
  m.attr("avx2") = pytorch_ext::avx2::width();
  m.attr("avx512") = pytorch_ext::avx512::width();
#endif
  m.attr("torch_version") = PYTORCH_EXT_TORCH_VERSION;
}
"""
# With a name of its own for every instruction set. A header of torch is not to be found from here.
WIDTH = """
#if __has_include(<torch/version.h>) || __has_include(<pybind11/pybind11.h>)
#error
#endif
namespace pytorch_ext::PYTORCH_EXT_ISA {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
int width() { return 512; }
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
int width() { return 256; }
#else
int width() { return 128; }
#endif
}
"""
WIDTHS = {"plain": 128, "avx2": 256, "avx512": 512} if platform.machine() == "x86_64" else {"plain": 128}
ANSWER = '#include "answer.h"\nint answer() { return 42; }\n'

CUDA_OP = """
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
__global__ void twice_kernel(float* out, const float* in) { out[threadIdx.x] = 2 * in[threadIdx.x]; }
torch::stable::Tensor twice(torch::stable::Tensor x) {
  auto out = torch::stable::empty_like(x);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  twice_kernel<<<1, x.numel(), 0, (cudaStream_t)stream>>>((float*)out.data_ptr(), (const float*)x.data_ptr());
  return out;
}
STABLE_TORCH_LIBRARY_IMPL(test_build, CUDA, m) { m.impl("twice", TORCH_BOX(&twice)); }
"""
CUDA_MODULE = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&definition); }
"""

# setup.py in a process where torch is not to be found, as in the environment that pip builds in by default.
WITHOUT_TORCH = """
import importlib.util, runpy, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find_spec(name, *rest)
sys.argv = ["setup.py", "-q", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""


def compiled_files(done: subprocess.CompletedProcess) -> set[str]:
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "] compile " in line]
    return {line.rpartition("/")[2] for line in lines}


def assert_one_clear_error(done: subprocess.CompletedProcess, *expected: str) -> None:
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    for text in (*expected, "pip install torch==", "&& pip install . --no-build-isolation"):
        assert text in done.stderr


@pytest.fixture(scope="module")
def empty_tree(bare_tree) -> Path:
    return bare_tree()


@pytest.fixture(scope="module")
def tree_with_sources(bare_tree) -> Path:
    tree = bare_tree()
    (tree / "csrc/cpu/answer.h").write_text("#pragma once\nint answer();\n")
    (tree / "csrc/cpu/answer.cpp").write_text(ANSWER)
    (tree / "csrc/cpu/module.cpp").write_text(MODULE)
    (tree / "csrc/cpu/isa").mkdir()
    (tree / "csrc/cpu/isa/width.cpp").write_text(WIDTH)
    return tree


class TestWithoutSources:
    @pytest.fixture
    def tree(self, empty_tree):
        return empty_tree

    def test_plan_says_what_would_be_built_and_why_it_is_not(self, tree, run_python):
        done = run_python(tree, "setup.py", "-q", "plan")
        assert done.returncode == 0, done.stderr
        assert "pytorch_ext._cpu: not built, because csrc/cpu holds no .cpp file." in done.stdout
        assert "csrc/cuda holds no .cu or .cpp file" in done.stdout
        assert "It would be compiled by" in done.stdout

    def test_nothing_is_needed_to_build_nothing(self, tree, run_python):
        done = run_python(tree, "-c", WITHOUT_TORCH, PATH="")
        assert done.returncode == 0, done.stderr
        assert "holds no .cpp file" in done.stdout

    def test_cuda_asked_for_without_nvcc(self, tree, run_python):
        done = run_python(tree, "setup.py", "-q", "build_ext", PATH="", PYTORCH_EXT_CUDA="1")
        assert_one_clear_error(done, "_cuda cannot be built", "nvcc (not on PATH", "PYTORCH_EXT_CUDA=0")

    def test_cuda_home_without_nvcc(self, tree, run_python):
        done = run_python(tree, "setup.py", "-q", "build_ext", CUDA_HOME="/nowhere", PYTORCH_EXT_CUDA="1")
        assert_one_clear_error(done, "nvcc (/nowhere/bin has none)")

    def test_a_switch_takes_only_its_values(self, tree, run_python):
        done = run_python(tree, "setup.py", "-q", "plan", PYTORCH_EXT_CPU="yes")
        assert done.returncode != 0
        assert done.stderr.strip() == "error: PYTORCH_EXT_CPU=yes: it takes 1, 0."


class TestWithSources:
    @pytest.fixture
    def tree(self, tree_with_sources):
        return tree_with_sources

    def test_without_a_compiler(self, tree, run_python):
        done = run_python(tree, "setup.py", "-q", "build_ext", PATH="")
        assert_one_clear_error(done, "pytorch_ext._cpu cannot be built", "neither g++ nor c++ is on PATH")

    def test_with_a_compiler_that_is_none(self, tree, run_python):
        done = run_python(tree, "setup.py", "-q", "build_ext", CXX="no-such-compiler")
        assert_one_clear_error(done, "CXX=no-such-compiler is no program")

    def test_without_torch(self, tree, run_python):
        done = run_python(tree, "-c", WITHOUT_TORCH)
        assert_one_clear_error(done, "torch, where this build runs", "PYTORCH_EXT_CPU=0 pip install .")

    def test_switched_off(self, tree, run_python):
        done = run_python(tree, "-c", WITHOUT_TORCH, PYTORCH_EXT_CPU="0", PATH="")
        assert done.returncode == 0, done.stderr
        assert "pytorch_ext._cpu: not built, because PYTORCH_EXT_CPU=0 switches it off." in done.stdout

    def test_instruction_sets(self, tree, run_python):
        done = run_python(tree, "setup.py", "-q", "plan")
        assert "pytorch_ext._cpu: 3 source files, compiled by" in done.stdout
        assert f"those of csrc/cpu/isa once for each of {', '.join(WIDTHS)}." in done.stdout

    def test_another_architecture_has_plain_code_alone(self, tree, run_python):
        code = (
            "import platform, sys\n"
            "platform.machine = lambda: 'aarch64'\n"
            "sys.path.insert(0, 'build_tools')\n"
            "from build_plan import plan\n"
            "objects = plan()[0].objects\n"
            "print(*(made.name for made in objects))\n"
            "print({'-DPYTORCH_EXT_ONLY_PLAIN' in made.flags for made in objects})"
        )
        done = run_python(tree, "-c", code)
        names, only_plain = done.stdout.splitlines()
        assert names.split() == ["answer.cpp.o", "module.cpp.o", "isa/width.cpp.plain.o"], done.stderr
        assert only_plain == "{True}"

    def test_architectures(self, tree, run_python):
        if shutil.which("nvcc") is None:
            pytest.skip("nvcc is not on PATH")
        (tree / "csrc/cuda/op.cu").write_text(CUDA_OP)
        try:
            plan = ["setup.py", "-q", "plan"]
            done = run_python(tree, *plan, PYTORCH_EXT_CUDA="1")
            assert "for sm_80, sm_90, " in done.stdout
            assert "PTX of" in done.stdout
            done = run_python(tree, *plan, PYTORCH_EXT_CUDA="1", TORCH_CUDA_ARCH_LIST="8.6 9.0a;12.0+PTX")
            assert "for sm_86, sm_90a, sm_120, PTX of 120, against" in done.stdout
            done = run_python(tree, *plan, PYTORCH_EXT_CUDA="1", TORCH_CUDA_ARCH_LIST="Hopper;1.0")
            assert 'in place of "Hopper"' in done.stdout
            assert "an nvcc that knows compute capability 1.0" in done.stdout
        finally:
            (tree / "csrc/cuda/op.cu").unlink()

    # One test, because each step starts from what the one before left in build/.
    @pytest.mark.full
    def test_compiles_only_what_changed(self, tree, run_python):
        import torch

        build = ["setup.py", "-q", "build_ext", "--inplace"]
        everything = {"answer.cpp", "module.cpp", *(f"width.cpp for {isa}" for isa in WIDTHS)}
        assert compiled_files(run_python(tree, *build)) == everything
        assert compiled_files(run_python(tree, *build)) == set()

        (library,) = (tree / "pytorch_ext").glob("_cpu.*.so")
        code = (
            "import importlib.util, sys, torch\n"
            "spec = importlib.util.spec_from_file_location('_cpu', sys.argv[1])\n"
            "module = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(module)\n"
            "print(module.answer(), module.torch_version)\n"
            f"print(*(getattr(module, isa) for isa in {list(WIDTHS)}))"
        )
        done = run_python(tree, "-c", code, str(library))
        assert done.stdout.split() == ["42", torch.__version__, *map(str, WIDTHS.values())], done.stderr

        (tree / "csrc/cpu/answer.cpp").write_text(ANSWER.replace("42", "43"))
        assert compiled_files(run_python(tree, *build)) == {"answer.cpp"}
        assert run_python(tree, "-c", code, str(library)).stdout.split()[0] == "43"

        (tree / "csrc/cpu/answer.h").write_text("#pragma once\nint answer();  // a header counts too\n")
        assert compiled_files(run_python(tree, *build)) == {"answer.cpp"}
        assert compiled_files(run_python(tree, *build, CXX="g++ -g0")) == everything

        wheel = ["setup.py", "-q", "bdist_wheel", "--dist-dir", "dist"]
        done = run_python(tree, *wheel, CXX="g++ -g0")
        assert compiled_files(done) == set()
        (found,) = (tree / "dist").glob("*.whl")
        assert "-cp3" in found.name
        assert "none-any" not in found.name

        done = run_python(tree, *build, PYTORCH_EXT_CPU="0")
        assert done.returncode == 0, done.stderr
        assert not library.exists(), "a library that is switched off must not go on being loaded"


@pytest.mark.full
def test_cuda_library_beside_any_torch(bare_tree, run_python):
    """nvcc, no GPU, and a torch that may be without CUDA: it compiles, links, loads and registers."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    tree = bare_tree()
    (tree / "csrc/cuda/op.cu").write_text(CUDA_OP)
    (tree / "csrc/cuda/module.cpp").write_text(CUDA_MODULE)
    asked = {"PYTORCH_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0"}
    done = run_python(tree, "setup.py", "-q", "bdist_wheel", "--dist-dir", "dist", **asked)
    assert compiled_files(done) == {"op.cu", "module.cpp"}
    (wheel,) = (tree / "dist").glob("*.whl")
    assert "-cp311-abi3-" in wheel.name

    done = run_python(tree, "setup.py", "-q", "build_ext", "--inplace", **asked)
    assert compiled_files(done) == set()
    code = (
        "import importlib.util, sys, torch\n"
        "torch.library.define('test_build::twice', '(Tensor x) -> Tensor')\n"
        "spec = importlib.util.spec_from_file_location('_cuda', sys.argv[1])\n"
        "importlib.util.module_from_spec(spec)\n"
        "print(torch._C._dispatch_has_kernel_for_dispatch_key('test_build::twice', 'CUDA'))"
    )
    (library,) = (tree / "pytorch_ext").glob("_cuda.*")
    done = run_python(tree, "-c", code, str(library))
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.long
def test_the_wheel_of_a_cuda_library(copy_repository, run_python, tmp_path):
    """Kernels alone: one file for every later Python and PyTorch, as the audit of its symbols shows."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    tree = copy_repository(tmp_path / "tree")
    for source in (tree / "csrc/cuda").glob("*.cu"):
        if source.stem != "layer_norm":  # all of them take minutes
            source.unlink()
    asked = {"PYTORCH_EXT_CPU": "0", "PYTORCH_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0"}
    wheel = ["-m", "pip", "wheel", ".", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", "dist"]
    done = run_python(tree, *wheel, **asked)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (tree / "dist").glob("*.whl")
    assert "-cp311-abi3-linux" in made.name
    with zipfile.ZipFile(made) as file:
        library = file.extract("pytorch_ext/_cuda.abi3.so", tmp_path)
    audit = Path(sys.executable).with_name("torch-abi-audit")
    done = run_python(tmp_path, str(audit), "--check", "both", library)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2.11.0" in done.stdout
    code = (
        "import importlib.util, sys, torch\n"
        "spec = importlib.util.spec_from_file_location('_cuda', sys.argv[1])\n"
        "print(importlib.util.module_from_spec(spec).__doc__)\n"
        "print(torch._C._dispatch_has_kernel_for_dispatch_key('pytorch_ext_cuda::layer_norm_fwd', 'CUDA'))"
    )
    done = run_python(tmp_path, "-c", code, library)
    assert done.stdout.splitlines() == ["pytorch_ext::_cuda was built for sm_80", "True"], done.stderr
