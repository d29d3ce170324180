"""The documents' commands, links and Python: what they tell people to type must be understood."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from blnet.cli import COMMANDS, Parser

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
STARTS = re.compile(r"(?:\.venv/bin/|.*-m )?(blnet(?:\.cli)?) (.*)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`]*`|^    .*?$", re.DOTALL | re.MULTILINE)


def lines_of_code(text: str) -> Iterator[str]:
    """Yield the lines of blocks of code, fenced or indented, those that go on joined."""
    fenced, begun = False, ""
    for line in text.split("\n"):
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            if line.endswith("\\"):
                begun += line[:-1]
                continue
            yield (begun + line).strip()
            begun = ""


def commands() -> Iterator[tuple[str, str]]:
    """Yield the documents' commands of `blnet` with the document each is from."""
    for document in DOCUMENTS:
        if document.name == "CHANGELOG.md":  # it tells what was
            continue
        text = document.read_text(encoding="utf-8")
        code = [part for line in lines_of_code(text) for part in line.split(" && ")]
        # Inside a sentence a command without flags may be a name only.
        code += [span for span in re.findall(r"`(blnet [^`]+)`", text) if " -" in span]
        for line in code:
            found = STARTS.fullmatch(re.split(" [#>] ", line)[0].strip())
            if found:
                yield document.name, found[2]


def python_blocks() -> Iterator[tuple[str, str]]:
    """Yield the documents' blocks of Python with the document each is from."""
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            yield document.name, block


@cache
def anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def parse(line: str) -> None:
    """Parse a command as `blnet` does, and run nothing."""
    words = shlex.split(line)
    if words[:2] == ["table", "--speech"]:
        name, rest = "table --speech", words[2:]
    else:
        length = 2 if " ".join(words[:2]) in COMMANDS else 1
        name, rest = " ".join(words[:length]), words[length:]
    assert name in COMMANDS, f"no command {name!r}"
    module = importlib.import_module(COMMANDS[name][0])
    if hasattr(module, "COMMAND"):
        module.COMMAND.parse(rest)
        return
    parser: argparse.ArgumentParser = Parser(prog=f"blnet {name}")
    module.configure(parser)
    parser.parse_args(rest)


@pytest.mark.parametrize(("document", "line"), sorted(set(commands())))
def test_a_command_is_understood(
    document: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("epochs: 2\n", encoding="utf-8")  # a recipe of the reader's own
    if line.endswith(("--help", "--print-config")):
        with pytest.raises(SystemExit, match="0"):
            parse(line)
    else:
        parse(line)


def test_commands_are_found_and_wrong_ones_refused() -> None:
    assert len(set(commands())) > 40
    with pytest.raises(SystemExit):
        parse("export RUN --output net.onnx --formt torch")
    with pytest.raises((SystemExit, ValueError)):
        parse("train vision --recipe cifar10 --data.pth data")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    missing = []
    for link in LINK.findall(CODE.sub("", document.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        place, _, anchor = link.partition("#")
        target = (document.parent / place).resolve() if place else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert not missing


@pytest.mark.parametrize(("document", "block"), list(python_blocks()))
def test_python_names_what_there_is(document: str, block: str) -> None:
    """Every import and every attribute of a module of ours exists."""
    tree = ast.parse(block)
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = importlib.import_module(alias.name)
                top = importlib.import_module(alias.name.partition(".")[0])
                modules[alias.asname or alias.name.partition(".")[0]] = (
                    module if alias.asname else top
                )
        elif isinstance(node, ast.ImportFrom):
            assert node.module
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            assert module is None or hasattr(module, node.attr), f"no {node.value.id}.{node.attr}"
