"""What every test runs under."""

import gc
import os

import hypothesis
import pytest
import torch

# The same examples in every run and on every machine: a red test is a change of the code. Triton's interpreter is too
# slow for as many.
examples = 6 if os.environ.get("TRITON_INTERPRET") == "1" else 20
hypothesis.settings.register_profile(
    "pytorch_ext", derandomize=True, deadline=None, database=None, max_examples=examples
)
hypothesis.settings.load_profile("pytorch_ext")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.full)


def pytest_collection_finish():
    """What was imported and collected stays: nobody has to look through it for garbage again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """A kernel that leaves part of its output unwritten finds zeros there most of the time, and passes.

    In this mode PyTorch fills what ``torch.empty`` and its C++ kin allocate with NaN, or with the largest integer, so
    that such a part shows.
    """
    mode, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(mode, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill
