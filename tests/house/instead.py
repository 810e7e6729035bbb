"""Runs tests on another compiled `_cpu` than the installed one: pytest -p tests.house.instead --library FILE."""

import importlib.util
import sys
from types import ModuleType

from pytorch_ext.backends import cpu


def load(file: str) -> ModuleType:
    """From now on ``pytorch_ext._cpu`` is this file."""
    spec = importlib.util.spec_from_file_location(cpu.LIBRARY, file)
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
    return sys.modules[spec.name]


def pytest_addoption(parser) -> None:
    parser.addoption("--library", help="the compiled _cpu to test")


def pytest_configure(config) -> None:
    load(config.getoption("--library"))


def pytest_report_header() -> str:
    return f"instruction set: {cpu.isa()}"
