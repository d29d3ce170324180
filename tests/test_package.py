"""What a user gets by installing: names, speed of import, a wheel that works by itself."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import time
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import blnet

ROOT = Path(__file__).resolve().parents[1]


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, **environment},
        check=False,
    )


def test_every_public_name_resolves() -> None:
    for name in blnet.__all__:
        assert getattr(blnet, name).__name__ == name
    assert sorted(blnet._HOMES) == sorted(blnet.__all__)
    assert blnet.__version__[0].isdigit()
    assert set(blnet.__all__) <= set(dir(blnet))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        blnet.nothing  # noqa: B018


def test_import_is_quick() -> None:
    def seconds(code: str) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            assert run_python("-c", code).returncode == 0
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds("import blnet") - seconds("pass") < 0.1


def test_import_brings_nothing_heavy() -> None:
    code = (
        "import sys, blnet, blnet.cli; "
        "heavy = {'torch', 'triton', 'numpy', 'torchvision', 'timm', 'librosa'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_no_generic_name_is_installed() -> None:
    code = (
        "import importlib.util as u, sys; "
        "names = ('kernels', 'bench', 'speech', 'vision', 'tests', 'helpers'); "
        "found = [n for n in names if u.find_spec(n)]; sys.exit(str(found) if found else 0)"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_kernels_and_speed_suites_import_without_the_optional_packages() -> None:
    # The machines with a GPU that the kernels are tuned on have none of these.
    code = (
        "import sys\n"
        "absent = 'librosa jsonargparse soundfile plotly espeakng_loader timm'.split()\n"
        "sys.modules.update(dict.fromkeys(absent))\n"
        "import blnet.kernels, blnet.network, blnet.conversion, blnet.vision, blnet.speech\n"
        "import blnet.bench.command\n"
        "from blnet.bench.suites import test_models, test_merge\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from a copy so that no build folder is left behind."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not in a git checkout, so what belongs to the project is not known")
    for name in listed.stdout.split("\n"):
        if name and (ROOT / name).is_file():
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    (folder / "source" / "kernels" / "tables" / "a-device.json").write_text("{}")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*command, str(folder / "source")], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_module(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    homes = {"kernels": "blnet/kernels", "bench": "blnet/bench", "vision": "blnet/vision",
             "speech": "blnet/speech", "blnet": "blnet"}  # fmt: skip
    for folder, home in homes.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".typed", ".yaml"}:
                assert f"{home}/{path.relative_to(ROOT / folder)}" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"blnet"}


def test_the_wheel_holds_the_tables_of_measured_block_sizes(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"blnet/kernels/tables/{name}" for name in ("README.md", "a-device.json")} <= names


def metadata(wheel: Path, name: str) -> str:
    archive = zipfile.ZipFile(wheel)
    (path,) = (entry for entry in archive.namelist() if entry.endswith(f".dist-info/{name}"))
    return archive.read(path).decode()


def test_the_wheel_declares_what_it_needs(wheel: Path) -> None:
    found = Parser().parsestr(metadata(wheel, "METADATA"))
    extras = {"train", "vision", "speech", "export", "bench", "dev", "all"}
    assert set(found.get_all("Provides-Extra")) == extras
    needs: dict[str, set[str]] = {name: set() for name in ("", *extras)}
    for line in found.get_all("Requires-Dist"):
        need, _, marker = line.partition(";")
        extra = marker.partition("extra == ")[2].strip(" \"'")
        needs[extra].add(re.split(r"[<>=!~ ]", need.strip())[0])
    assert needs[""] == {"torch", "numpy", "safetensors"}
    assert needs["train"] >= {"accelerate", "jsonargparse[signatures]", "timm", "torchmetrics"}
    assert needs["vision"] >= {"blnet[train]", "torchvision", "pillow"}
    assert needs["speech"] >= {"torchaudio", "librosa", "soundfile", "espeakng-loader"}
    assert needs["export"] == {"onnx", "onnxscript", "onnxruntime"}
    assert needs["bench"] >= {"blnet[export,vision]", "pytest", "pytest-benchmark", "rich"}
    assert needs["dev"] >= {"pytest", "ruff", "mypy", "hypothesis"}
    assert {"vision", "speech", "bench"} <= set(re.findall(r"\w+", " ".join(needs["all"])))
    assert "blnet = blnet.cli:main" in metadata(wheel, "entry_points.txt")


def test_the_wheel_works_on_its_own(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), wheel],
        check=True,
        capture_output=True,
    )
    # The wheel first, then what it depends on; -S and no editable install in between.
    packages = os.pathsep.join([str(target), sysconfig.get_paths()["purelib"]])
    code = (
        "import torch, blnet, blnet.vision; "
        f"assert blnet.__file__.startswith({str(target)!r}), blnet.__file__; "
        "net = blnet.vision.bl_resnet18(num_classes=3, stem='small'); "
        "print(net(torch.zeros(2, 3, 16, 16)).shape)"
    )
    done = run_python("-S", "-c", code, PYTHONPATH=packages)
    assert done.returncode == 0, done.stderr
    assert "[2, 3]" in done.stdout
    done = run_python("-S", "-m", "blnet.cli", "--version", PYTHONPATH=packages)
    assert done.stdout.strip() == blnet.__version__
    script = target / "bin" / "blnet"
    assert os.access(script, os.X_OK)
    done = run_python("-S", str(script), "--version", PYTHONPATH=packages)
    assert (done.returncode, done.stdout.strip()) == (0, blnet.__version__), done.stderr


def test_the_package_is_found_where_it_is_installed() -> None:
    for name in ("blnet.kernels", "blnet.vision", "blnet.speech", "blnet.bench.suites"):
        assert importlib.util.find_spec(name) is not None
