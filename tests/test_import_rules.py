"""The folders may import each other only as the design allows; read from the code itself."""

from __future__ import annotations

import ast
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Folder -> (its import name, which of our packages it may import).
FOLDERS = {
    "kernels": ("blnet.kernels", {"blnet.kernels"}),
    "blnet": ("blnet", {"blnet", "blnet.kernels"}),
    "vision": ("blnet.vision", {"blnet", "blnet.kernels", "blnet.vision"}),
    "speech": ("blnet.speech", {"blnet", "blnet.kernels", "blnet.speech"}),
    "bench": (
        "blnet.bench",
        {"blnet", "blnet.kernels", "blnet.vision", "blnet.speech", "blnet.bench"},
    ),
}
PARTS = ("blnet.kernels", "blnet.vision", "blnet.speech", "blnet.bench")


@cache
def imported_modules(path: Path) -> set[str]:
    """Every module a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def owner(module: str) -> str | None:
    """The package of ours that a module belongs to."""
    for part in PARTS:
        if module == part or module.startswith(part + "."):
            return part
    return "blnet" if module == "blnet" or module.startswith("blnet.") else None


def source_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_imports_only_what_it_may(folder: str) -> None:
    _, allowed = FOLDERS[folder]
    files = source_files(folder)
    assert files
    for path in files:
        if path == ROOT / "blnet" / "cli.py":
            continue  # the one place that knows all
        owners = {owner(module) for module in imported_modules(path)} - {None}
        assert owners <= allowed, f"{path.relative_to(ROOT)} imports {owners - allowed}"


def package_of(module: str) -> str:
    """The package below blnet that a module is in; a file of blnet/ stands for itself."""
    return ".".join(module.split(".")[:2])


def package_imports() -> dict[str, set[str]]:
    """Package -> those that it imports, in functions as well; without what knows all of them."""
    found: dict[str, set[str]] = {}
    for folder, (root, _) in FOLDERS.items():
        for path in source_files(folder):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = package_of(".".join([root, *(part for part in parts if part != "__init__")]))
            if name not in ("blnet", "blnet.cli"):
                found.setdefault(name, set()).update(map(package_of, imported_modules(path)))
    return {name: (others & found.keys()) - {name} for name, others in found.items()}


def test_no_imports_run_in_a_circle() -> None:
    imports = package_imports()
    assert "blnet.conversion" in imports["blnet.checkpoint"]  # imported in a function
    TopologicalSorter(imports).prepare()  # a CycleError names the circle


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("blnet.conversion", "blnet.checkpoint"),
        ("blnet.exporting", "blnet.commands"),
        ("blnet.exporting", "blnet.optimizing"),
        ("blnet.optimizing", "blnet.training"),
        ("blnet.trained", "blnet.training"),
        ("blnet.training", "blnet.commands"),
        ("blnet.kernels", "blnet.expand_merge"),
    ],
)
def test_a_circle_of_imports_is_seen(importer: str, imported: str) -> None:
    imports = package_imports()
    imports[importer].add(imported)
    with pytest.raises(CycleError, match=rf"'{importer}'.*'{imported}'|'{imported}'.*'{importer}'"):
        TopologicalSorter(imports).prepare()


def test_kernels_import_torch_and_triton_only() -> None:
    allowed = {"torch", "triton", "blnet", *sys.stdlib_module_names}
    for path in source_files("kernels"):
        roots = {module.split(".")[0] for module in imported_modules(path)}
        if path.name == "triton_shim.py":
            roots -= {"numpy"}  # Triton's interpreter computes with its arrays
        assert roots <= allowed, f"{path.relative_to(ROOT)} imports {roots - allowed}"


def test_nobody_imports_the_tests() -> None:
    for folder in FOLDERS:
        for path in source_files(folder):
            roots = {module.split(".")[0] for module in imported_modules(path)}
            assert not roots & {"tests", "helpers"}, path


def test_the_command_line_imports_lazily() -> None:
    modules = imported_modules(ROOT / "blnet" / "cli.py")
    assert {module.split(".")[0] for module in modules} <= {
        "__future__",
        *sys.stdlib_module_names,
    }


def test_the_package_itself_imports_nothing_at_once() -> None:
    tree = ast.parse((ROOT / "blnet" / "__init__.py").read_text())
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name.name for node in top if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module for node in top if isinstance(node, ast.ImportFrom)}
    assert names <= {"__future__", "importlib", "typing"}


def test_a_forbidden_import_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "file.py"
    path.write_text("def f():\n    from blnet.bench import runner\n")
    assert "blnet.bench" in {owner(module) for module in imported_modules(path)}
