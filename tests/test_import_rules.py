"""The folders may import each other only as the design allows; read from the code itself."""

from __future__ import annotations

import ast
import sys
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
            assert not any(m.split(".")[0] == "tests" for m in imported_modules(path)), path


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
