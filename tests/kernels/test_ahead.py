"""Every kernel compiled for every architecture, and what is known about them without compiling."""

import itertools
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("in the interpreter nothing is compiled", allow_module_level=True)
import triton

from pytorch_ext.kernels.triton import ahead, gelu
from pytorch_ext.kernels.triton.ahead import Compiled, Version
from pytorch_ext.kernels.triton.configs import ARCHITECTURES, for_architecture
from pytorch_ext.kernels.triton.launch import Launch, recorded
from pytorch_ext.kernels.triton.sizes import Sizes

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "triton-kernels.md"
STEMS = list(ahead.modules())
# Of each manner one, where the compiler is quick: a matrix product, a row that stays in registers, numbers one by one.
SOON = [(stem, "sm_90") for stem in ("varlen_attention", "layer_norm", "bias_gelu")]


@pytest.mark.full
@pytest.mark.parametrize(
    ("stem", "architecture"),
    [
        pytest.param(stem, architecture, marks=[] if (stem, architecture) in SOON else pytest.mark.long)
        for stem, architecture in itertools.product(STEMS, ARCHITECTURES)
    ],
)
def test_what_is_shipped_compiles_as_it_should(stem, architecture, monkeypatch, tmp_path):
    """No spills in forward kernels, shared memory and registers that are there, and the matrix instruction."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = ahead.versions(ahead.modules()[stem], architecture)
    assert found
    problems = [line for version in found for line in ahead.failures(version, ahead.compiled(version))]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("stem", STEMS)
def test_every_configuration_is_compiled_ahead(stem):
    module = ahead.modules()[stem]
    for architecture in ARCHITECTURES:
        ahead.versions(module, architecture)
    assert not ahead.unreached(module)


def test_the_document_is_current():
    """Its sections name the sources that they were made from."""
    written = {stem: digest for stem, (digest, _) in ahead.sections(DOCUMENT.read_text()).items()}
    now = {stem: ahead.digest(stem) for stem in STEMS}
    assert written == now, "run python -m pytorch_ext.kernels.triton.ahead"


def test_the_document_has_all_versions():
    sections = ahead.sections(DOCUMENT.read_text())
    for stem, module in ahead.modules().items():
        rows = [line for line in sections[stem][1].splitlines() if line.startswith("| ") and " sm_" in line]
        expected = [v for name in ARCHITECTURES for v in ahead.versions(module, name)]
        assert len(rows) == len(expected), stem
        for row, version in zip(rows, expected, strict=True):
            assert version.described() in row and version.architecture in row


@triton.jit(do_not_specialize=["free"])
def _kernel(x_ptr, none_ptr, one, sixteen, odd, large, free, scale, FLAG: triton.language.constexpr):
    pass


def test_versions_are_specialised_as_triton_does_it():
    x = torch.empty(4, dtype=torch.bfloat16, device="meta")
    args = (x, None, 1, 32, 7, 2**31, 16, 0.5)
    version = ahead.version_of(Launch(_kernel, (1,), args, {"FLAG": True, "num_warps": 2}), "sm_90")
    kinds = ["*bf16", "constexpr", "constexpr", "i32", "i32", "i64", "i32", "fp32", "constexpr"]
    assert [kind for _, kind in version.signature] == kinds
    assert dict(version.constants) == {"none_ptr": None, "one": 1, "FLAG": True}
    assert version.divisible == (0, 3, 5)
    assert version.options == (("num_warps", 2),) and version.dtype == "bf16"
    assert str(version) == "_kernel sm_90 bf16 FLAG=True num_warps=2"


def test_versions_that_are_equal_are_compiled_once():
    module = type("Module", (), {"calls": staticmethod(gelu.calls), "AHEAD": [Sizes(), Sizes(batch=8)]})
    assert len(ahead.versions(module, "sm_80")) == 4  # forward and backward, both forms


GOOD = Compiled(128, 0, 1024, ("wgmma.mma_async",), ((64, "bf16"),))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("_op_fwd_kernel", {}, None),
        ("_op_fwd_kernel", {"spilled": 8}, "8 bytes of local memory in a forward kernel"),
        ("_op_bwd_kernel", {"spilled": 8}, None),
        ("_op_fwd_kernel", {"registers": 255}, "255 registers for each of 512 threads do not fit"),
        ("_op_fwd_kernel", {"shared": 227 * 1024 + 1}, "232449 bytes of shared memory do not fit"),
        ("_op_fwd_kernel", {"matrix": ()}, "a product of 64 rows wants wgmma.mma_async, and there is none"),
        ("_op_fwd_kernel", {"matrix": ("mma.sync",)}, "wants wgmma.mma_async, and there is mma.sync"),
        ("_op_fwd_kernel", {"matrix": ("mma.sync",), "dots": ((32, "f16"),)}, None),
        ("_op_fwd_kernel", {"matrix": (), "dots": ((64, "f32"),)}, None),
    ],
)
def test_what_is_not_as_it_should_be_is_said(name, changes, message):
    kernel = type("Kernel", (), {"__name__": name})()
    kernel.__name__ = name
    version = Version(kernel, "sm_90", (), (), (), (("num_warps", 16),))
    found = ahead.failures(version, Compiled(**{**vars(GOOD), **changes}))
    assert found == [] if message is None else len(found) == 1 and message in found[0]


def test_nothing_is_launched_while_versions_are_collected():
    x = torch.empty(3, 5, device="meta")
    with for_architecture("sm_100"), recorded() as launches:
        out = gelu.gelu_fwd(x, "none")
    assert out.is_meta and [one.kernel for one in launches] == [gelu._gelu_fwd_kernel]
