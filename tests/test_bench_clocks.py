"""Clocks before and after a run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from blnet.bench import clocks
from blnet.bench.clocks import cpu_clock, gpu_clocks, read_clocks
from blnet.bench.session import Session
from blnet.bench.settings import Settings


def test_an_answer_of_nvidia_smi_is_read() -> None:
    assert gpu_clocks("1980, 2619, 41, 123.45\n") == {
        "sm_mhz": 1980.0,
        "memory_mhz": 2619.0,
        "temperature_c": 41.0,
        "power_w": 123.45,
    }


def test_what_a_gpu_does_not_tell_is_left_out() -> None:
    assert gpu_clocks("1980, [N/A], 41, [Not Supported]") == {"sm_mhz": 1980.0, "temperature_c": 41}
    assert gpu_clocks("") == gpu_clocks("No devices were found\n") == {}


def test_nvidia_smi_is_asked_once_of_the_gpu_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "1980, 2619, 41, 123.45\n")

    class Properties:
        uuid = "1234-abcd"

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: Properties)
    assert read_clocks("cuda")["sm_mhz"] == 1980.0
    assert len(asked) == 1
    assert "--id=GPU-1234-abcd" in asked[0]

    def fail(command: list[str], **options: object) -> None:
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", fail)
    assert "sm_mhz" not in read_clocks("cuda")


def test_the_frequency_of_a_cpu(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    assert cpu_clock(tmp_path, cpuinfo) == {}
    cpuinfo.write_text(
        "processor\t: 0\ncpu MHz\t\t: 2596.122\n\nprocessor\t: 1\ncpu MHz\t\t: 2600\n"
    )
    assert cpu_clock(tmp_path, cpuinfo) == {"cpu_mhz": 2598}
    for core, khz in enumerate((3_000_000, 3_200_000, 3_100_000)):
        folder = tmp_path / f"cpu{core}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_cur_freq").write_text(f"{khz}\n")
    assert cpu_clock(tmp_path, cpuinfo) == {"cpu_mhz": 3100}


def test_a_session_notes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "cpu_clock", lambda: {"cpu_mhz": 2600})
    before = Session(Settings(device="cpu")).results.environment["clocks_before"]
    assert before["cpu_mhz"] == 2600
    assert before["load"] >= 0
