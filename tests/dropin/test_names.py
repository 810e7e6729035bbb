"""Tools that look modules up by the name of their class find the stand-ins."""

import pickle
import subprocess
import sys

import pytest
import torch

# In a process where no rule has been loaded.
NAMES_AFTER_LOADING = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
print(*sorted({type(m).__name__ for m in model.modules()}))
"""


def names(model):
    return {path: type(module).__name__ for path, module in model.named_modules()}


@pytest.mark.parametrize("name", ["hf.BertForMaskedLM", "px.BertForMaskedLM"])
def test_the_names_of_classes_stay(make_pair, name):
    original, fast = make_pair(name)
    assert names(fast) == names(original)
    assert [type(m).__qualname__ for m in fast.modules()] != [
        type(m).__qualname__ for m in original.modules()
    ]
    assert str(fast) == str(original)
    assert names(pickle.loads(pickle.dumps(fast))) == names(original)


@pytest.mark.full
def test_the_names_in_another_process(make_pair, tmp_path):
    original, fast = make_pair("hf.BertModel")
    torch.save(fast, tmp_path / "model.pt")
    command = [sys.executable, "-c", NAMES_AFTER_LOADING, tmp_path / "model.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == sorted(set(names(original).values()))


@pytest.mark.parametrize("layers", [["BertLayer"], None], ids=["by name", "those of the model"])
def test_the_layers_that_accelerate_shards(make_pair, layers):
    accelerate = pytest.importorskip("accelerate", reason="looks layers up as accelerate does")
    _, fast = make_pair("hf.BertForSequenceClassification")
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=layers
    )
    shards = accelerate.utils.fsdp_utils.fsdp2_prepare_auto_wrap_policy(plugin, fast)
    found = [m for m in fast.modules() if shards(m)]
    assert found == [*([] if layers else [fast.bert.embeddings]), *fast.bert.encoder.layer]


def test_device_maps_keep_layers_whole(make_pair):
    """``device_map="auto"`` splits no module whose class a model names in ``_no_split_modules``."""
    accelerate = pytest.importorskip("accelerate", reason="device maps are accelerate's")
    original, fast = make_pair("hf.BertModel")
    assert fast._no_split_modules == original._no_split_modules
    assert "BertLayer" in fast._no_split_modules
    layer = sum(p.nbytes for p in fast.encoder.layer[0].parameters())
    whole = sum(p.nbytes for p in fast.parameters())
    memory = {0: whole - layer - 1, "cpu": whole}
    maps = [
        accelerate.infer_auto_device_map(m, memory, no_split_module_classes=m._no_split_modules)
        for m in (original, fast)
    ]
    assert maps[0] == maps[1]
    assert len(set(maps[1].values())) == 2
    assert not any(path.startswith("encoder.layer.1.") for path in maps[1])
