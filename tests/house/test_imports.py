"""Imports point down, and `import pytorch_ext` costs torch alone."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

# From the bottom to the top; a part may import its own layer and those before it. A new part of pytorch_ext
# gets its place here. "" is `import pytorch_ext` itself.
LAYERS = [
    {"_version", "kernels", "_cpu", "_cuda"},
    {"backends"},
    {"ops"},
    {"testing", "info"},
    {"nn", "models"},
    {"dropin"},
    {"export", "huggingface", "training"},
    {""},
    {"benchmarks"},
    {"demo", "tune"},
    {"finetune"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
RANKS = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}

# Folders that are installed under another name than the one they have in the repository: setup.py.
PLACES = {
    "pytorch_ext": "pytorch_ext",
    "kernels/reference": "pytorch_ext.kernels.reference",
    "kernels/triton": "pytorch_ext.kernels.triton",
    "benchmarks": "pytorch_ext.benchmarks",
}

# What may import more than torch at module level, because it is itself imported only when it is asked for.
ON_DEMAND = (
    *(
        "pytorch_ext.cli",
        "pytorch_ext.commands",
        "pytorch_ext.demo",
        "pytorch_ext.benchmarks",
        "pytorch_ext.finetune",
        "pytorch_ext.tune",
    ),
    *("pytorch_ext.dropin.rules", "pytorch_ext.dropin.standins", "pytorch_ext.huggingface"),
)
OPTIONAL = {
    *("transformers", "tokenizers", "safetensors", "accelerate", "peft", "triton"),
    *("rich", "typer", "matplotlib", "onnx", "onnxruntime", "onnxscript", "netron"),
}


class Module(NamedTuple):
    name: str
    file: Path
    is_package: bool


class Import(NamedTuple):
    target: str
    line: int
    at_module_level: bool


def modules(root: Path) -> list[Module]:
    found = []
    for folder, place in PLACES.items():
        for file in sorted((root / folder).rglob("*.py")):
            parts = [place, *file.relative_to(root / folder).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            found.append(Module(".".join(parts[:-1] if is_package else parts), file, is_package))
    return found


def imports(module: Module) -> Iterator[Import]:
    """Every import in the file, also inside functions; what is for type checkers alone does not count."""

    def visit(node: ast.AST, at_module_level: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                for name in child.names:
                    yield Import(name.name, child.lineno, at_module_level)
            elif isinstance(child, ast.ImportFrom):
                for name in child.names:
                    yield Import(f"{origin(module, child)}.{name.name}", child.lineno, at_module_level)
            inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from visit(child, at_module_level and not inner)

    yield from visit(ast.parse(module.file.read_text()), True)


def origin(module: Module, node: ast.ImportFrom) -> str:
    """What stands between `from` and `import`, without dots in front."""
    if node.level == 0:
        return node.module or ""
    package = module.name.split(".")
    up = node.level - (1 if module.is_package else 0)
    return ".".join([*package[: len(package) - up], *([node.module] if node.module else [])])


def part(name: str) -> str:
    """`ops` of `pytorch_ext.ops.gelu`, "" of `pytorch_ext`."""
    return name.split(".")[1] if "." in name else ""


def rank(name: str) -> int:
    """Of a module, or of a name that `import pytorch_ext` itself gives, such as `pytorch_ext.optimize`."""
    return RANKS.get(part(name), RANKS[""])


@pytest.fixture(scope="module")
def parsed(root) -> list[tuple[Module, list[Import]]]:
    return [(module, list(imports(module))) for module in modules(root)]


def test_every_part_has_a_place(parsed):
    parts = {part(module.name) for module, _ in parsed}
    assert parts <= set(RANKS), "give new parts of pytorch_ext their place in LAYERS"


def test_imports_point_down(parsed):
    wrong = [
        f"{module.file}:{found.line}: {module.name} imports {found.target}"
        for module, all_imports in parsed
        for found in all_imports
        if found.target.split(".")[0] == "pytorch_ext" and rank(found.target) > rank(module.name)
    ]
    assert not wrong, "\n".join(wrong)


def test_testing_is_a_leaf(parsed):
    """Tests and benchmarks share it; what users run does not lean on it."""
    wrong = [
        f"{module.file}:{found.line}"
        for module, all_imports in parsed
        for found in all_imports
        if found.target.startswith("pytorch_ext.testing") and rank(module.name) < RANKS["benchmarks"]
    ]
    assert not wrong, "\n".join(wrong)


def test_mapped_folders_are_imported_by_their_installed_name(parsed):
    """`kernels` at the top is Hugging Face's, and `benchmarks` exists in a checkout alone."""
    wrong = [
        f"{module.file}:{found.line}: {found.target}"
        for module, all_imports in parsed
        for found in all_imports
        if found.target.split(".")[0] in {"kernels", "benchmarks"}
    ]
    assert not wrong, "\n".join(wrong)


def test_the_core_imports_torch_alone(parsed):
    wrong = []
    for module, all_imports in parsed:
        if module.name.startswith(ON_DEMAND):
            continue
        allowed = {"torch", "pytorch_ext", *sys.stdlib_module_names}
        if module.name.startswith("pytorch_ext.kernels.triton"):
            allowed.add("triton")
        for found in all_imports:
            if found.at_module_level and found.target.split(".")[0] not in allowed:
                wrong.append(f"{module.file}:{found.line}: {found.target}")
    assert not wrong, "\n".join(wrong)


def test_importing_it_imports_nothing_optional(run_python, tmp_path):
    code = (
        "import sys, torch\n"
        "import torch._dynamo\n"  # which imports triton by itself, where it is installed
        "before = set(sys.modules)\n"
        "import pytorch_ext\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    done = run_python(tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split())
    assert "pytorch_ext" in imported
    assert not imported & OPTIONAL
