"""Which configuration a kernel gets: the table's, or what was measured and written to a file."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")
import triton

from pytorch_ext.kernels.triton import configs as module
from pytorch_ext.kernels.triton.configs import Configs, for_architecture, size_class

SMALL, LARGE, TUNED = {"BLOCK": 1}, {"BLOCK": 2}, {"BLOCK": 4, "num_warps": 8}
GPU = torch.device("cuda", 0)
X = SimpleNamespace(device=GPU, get_device=lambda: 0)


@pytest.fixture
def configs(monkeypatch, tmp_path):
    monkeypatch.setattr(Configs, "every", {})
    monkeypatch.setenv(module.CACHE, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A GPU (80 GB)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(module, "INTERPRETED", False)
    module.measured.cache_clear()
    module.architecture_of.cache_clear()
    rows = [((16, None), SMALL), ((None, 2), LARGE), ((None, None), {"BLOCK": 3})]
    yield Configs(
        "op_fwd",
        by=("cols", "itemsize"),
        table={"sm_80": [((None, None), {"BLOCK": 80})], "sm_90": rows, "sm_100": rows},
        wider={"BLOCK": (1, 2, 4), "num_warps": (4, 8)},
        kernels=lambda: [SimpleNamespace(cache_key="source")],
        fits=lambda constants, sizes: constants["BLOCK"] <= sizes[0],
    )
    module.measured.cache_clear()
    module.architecture_of.cache_clear()


def test_the_first_row_that_holds_the_sizes(configs):
    assert configs.of(X, 16, 4) is SMALL
    assert configs.of(X, 32, 2) is LARGE
    assert configs.of(X, 32, 4) == {"BLOCK": 3}


def test_a_size_that_no_row_holds(configs):
    configs.table = {"sm_90": [((16, None), SMALL)]}
    with pytest.raises(LookupError, match=r"op_fwd: the table for sm_90 has no row for \(32, 4\)"):
        configs.of(X, 32, 4)


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        *(((8, 0), "sm_80"), ((8, 6), "sm_80"), ((8, 9), "sm_80"), ((12, 0), "sm_80")),
        *(((9, 0), "sm_90"), ((10, 0), "sm_100"), ((10, 3), "sm_100"), ((11, 0), "sm_100")),
    ],
)
def test_which_table_a_gpu_gets(configs, monkeypatch, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert module.architecture_of(GPU) == name


def test_a_named_architecture_and_a_forced_configuration(configs):
    configs.of(X, 32, 4)  # which is remembered, and must not come out below
    with for_architecture("sm_80"):
        assert configs.of(X, 32, 4) == {"BLOCK": 80}
    assert configs.used == {("sm_80", 0)}
    with configs.forced(TUNED):
        assert configs.of(X, 32, 4) is TUNED
    assert configs.of(X, 32, 4) == {"BLOCK": 3}


def test_what_was_measured_goes_before_the_table(configs, tmp_path):
    assert configs.of(X, 32, 4) == {"BLOCK": 3}
    file = module.save("A GPU (80 GB)", {configs: {(32, 4): TUNED}})
    assert file == tmp_path / f"triton-{triton.__version__}-a-gpu-80-gb.json"
    assert list(tmp_path.iterdir()) == [file]
    assert configs.of(X, 32, 4) == TUNED
    assert configs.of(X, 32, 2) is LARGE  # sizes that were not measured


def test_what_was_measured_is_added_to(configs):
    module.save("A GPU (80 GB)", {configs: {(32, 4): TUNED, (64, 4): SMALL}})
    module.save("A GPU (80 GB)", {configs: {(32, 4): LARGE}})
    assert configs.of(X, 32, 4) == LARGE and configs.of(X, 64, 4) == SMALL


def test_a_changed_kernel_forgets_what_was_measured(configs):
    module.save("A GPU (80 GB)", {configs: {(32, 4): TUNED}})
    configs._kernels = lambda: [SimpleNamespace(cache_key="other source")]
    del configs.source
    configs.forget()
    assert configs.of(X, 32, 4) == {"BLOCK": 3}
    module.save("A GPU (80 GB)", {configs: {(64, 4): TUNED}})
    assert configs.of(X, 32, 4) == {"BLOCK": 3} and configs.of(X, 64, 4) == TUNED


@pytest.mark.parametrize("name", ["another GPU", "A GPU (40 GB)"])
def test_another_gpu_has_another_file(configs, name):
    module.save(name, {configs: {(32, 4): TUNED}})
    assert configs.of(X, 32, 4) == {"BLOCK": 3}


def test_another_triton_has_another_file(configs, monkeypatch):
    module.save("A GPU (80 GB)", {configs: {(32, 4): TUNED}})
    monkeypatch.setattr(module.triton, "__version__", "3.99.0")
    configs.forget()
    assert configs.of(X, 32, 4) == {"BLOCK": 3}


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", '{"kernels": 3}', '{"kernels": {"op_fwd": 3}}'),
        '{"kernels": {"op_fwd": {"configs": {"32,4": {"BLOCK": "4"}}}}}',
        '{"kernels": {"op_fwd": {"configs": [1]}}}',
    ],
)
def test_a_broken_file_is_named_once_and_not_used(configs, content):
    module.file_for("A GPU (80 GB)").write_text(content)
    with pytest.warns(UserWarning, match=r"triton-.*-a-gpu-80-gb.json is not used: .*expected|Expecting"):
        assert configs.of(X, 32, 4) == {"BLOCK": 3}
    assert configs.of(X, 32, 2) is LARGE
    module.save("A GPU (80 GB)", {configs: {(32, 4): TUNED}})
    assert json.loads(module.file_for("A GPU (80 GB)").read_text())["device"] == "A GPU (80 GB)"
    assert configs.of(X, 32, 4) == TUNED


def test_the_place_of_the_file(configs, monkeypatch, tmp_path):
    monkeypatch.delenv(module.CACHE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert module.file_for("B").parent == tmp_path / "cache" / "pytorch_ext"


def test_candidates_are_those_that_fit(configs):
    assert configs.candidates((2, 4)) == [{"BLOCK": b, "num_warps": w} for b in (1, 2) for w in (4, 8)]


def test_classes_of_sizes():
    assert [size_class(n) for n in (0, 1, 16, 17, 768, 2**20)] == [16, 16, 16, 32, 1024, 65536]
    assert size_class(3, least=1) == 4
