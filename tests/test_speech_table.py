"""The table of acoustic models: its facts, its recount, its formats and its file."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

import blnet
from blnet.cli import main
from blnet.speech import bl_resnet22, resnet22, table

# The paper's table, once more and by hand: (network, alpha, beta, WER, GMACs, parameters in M).
PAPER = [
    ("ResNet-22", None, None, 14.67, 1.11, 3.02),
    ("bL-ResNet-22", 4, 1, 14.72, 0.68, 3.15),
    ("bL-ResNet-22", 4, 2, 14.47, 0.66, 3.11),
    ("bL-ResNet-22", 4, 3, 14.66, 0.65, 3.10),
    ("bL-ResNet-22", 2, 3, 14.46, 0.77, 3.07),
    ("bL-PYR-ResNet-22", 4, 1, 14.50, 0.98, 3.32),
]


@pytest.fixture(scope="module")
def rows() -> list[table.Row]:
    return table.recount()


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["table", *words]) == 0
    return capsys.readouterr().out


def plain_by_hand(frames: int, halvings: tuple[int, int]) -> tuple[int, int]:
    """Return parameters and MACs of the plain network without its last layer.

    Args:
        frames: of the map.
        halvings: of the time by the first convolution, and before the second stage.
    """
    parameters = macs = 0
    channels = 3
    # Layer: width, kernel, bands, how many alike. A 1x1 convolution is a strided block's shortcut.
    first, later = frames >> halvings[0], frames >> sum(halvings)
    for width, kernel, positions, count in (
        (64, 3, 32 * first, 5),
        (128, 3, 16 * later, 12),
        (192, 3, 8 * later, 4),
    ):
        if channels != 3:
            parameters += channels * width + 2 * width
            macs += channels * width * positions
        for _ in range(count):
            parameters += kernel * kernel * channels * width + 2 * width
            macs += kernel * kernel * channels * width * positions
            channels = width
    return parameters, macs


def test_facts_are_those_of_the_paper(rows: list[table.Row]) -> None:
    facts = [
        (r.network, r.alpha, r.beta, r.reported_wer_percent, r.reported_gmacs,
         r.reported_parameters_millions)
        for r in rows
    ]  # fmt: skip
    assert facts == PAPER
    shares = [round(gmacs / 1.11, 3) for *_, gmacs, _ in PAPER]
    assert [row.reported_share for row in rows] == shares


@pytest.mark.parametrize(
    ("frames", "reduction", "halvings"), [(100, 1, (0, 0)), (200, 2, (1, 0)), (64, 4, (1, 1))]
)
def test_the_plain_network_s_recount_is_that_by_hand(
    frames: int, reduction: int, halvings: tuple[int, int]
) -> None:
    row = table.recount(frames, reduction)[0]
    assert (row.parameters, row.macs) == plain_by_hand(frames, halvings)
    assert abs(row.parameters / 3.02e6 - 1) < 0.05
    assert row.difference_percent == pytest.approx(100 * (row.parameters / 3.02e6 - 1), abs=0.06)


def test_recount_is_a_count_of_our_networks(rows: list[table.Row]) -> None:
    for row in rows:
        options: dict[str, Any] = {"in_channels": 3, "num_classes": 7}
        if row.alpha is None:
            model = resnet22(**options)
        else:
            model = bl_resnet22(row.alpha, row.beta, pyramid="PYR" in row.network, **options)
        counted = blnet.profile(model, (1, 3, 64, 100))
        last = model.fc.weight.numel()
        assert (row.parameters, row.macs) == (counted.parameters - last - 7, counted.macs - last)
        assert row.gmacs == round(row.macs / 1e9, 3)
        assert row.parameters_millions == round(row.parameters / 1e6, 3)
        assert row.share == round(row.macs / rows[0].macs, 3)


def test_text(capsys: pytest.CaptureFixture[str], rows: list[table.Row]) -> None:
    lines = printed(capsys, "--speech").splitlines()
    shown = [line for line in lines if line.startswith(("ResNet", "bL-"))]
    assert [line.split()[:6] for line in shown] == [
        [name, str(alpha or "-"), str(beta or "-"), f"{wer:.2f}", f"{gmacs:.2f}",
         f"{gmacs / 1.11:.2f}"]
        for name, alpha, beta, wer, gmacs, _ in PAPER
    ]  # fmt: skip
    assert [line.split()[6:8] for line in shown] == [
        [f"{r.gmacs:.3f}", f"{r.share:.2f}"] for r in rows
    ]
    assert {line.index(" %") for line in shown} == {len(shown[0]) - 2}, "columns are aligned"
    text = " ".join(lines)
    assert "ICLR 2019" in text
    assert "at 100 frames (1 s) of 64 bands in three channels, time reduction 1" in text


def test_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    piped = [
        line
        for line in printed(capsys, "--speech", "--format=markdown").splitlines()
        if line.startswith("|")
    ]
    assert len(piped) == 2 + 6
    assert {line.count("|") for line in piped} == {12}
    assert piped[1].startswith("| --- | ---: |")


def test_json_and_csv(capsys: pytest.CaptureFixture[str], rows: list[table.Row]) -> None:
    read = json.loads(printed(capsys, "--speech", "--format", "json"))
    assert read["rows"] == [vars(row) for row in rows]
    assert "ICLR 2019" in read["source"]
    lines = list(csv.DictReader(io.StringIO(printed(capsys, "--speech", "--format", "csv"))))
    assert lines == [
        {name: "" if value is None else str(value) for name, value in vars(row).items()}
        for row in rows
    ]


def test_frames_and_time_reduction(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--speech", "--frames=300", "--time-reduction", "4", "--format=json"]
    read = json.loads(printed(capsys, *words))
    assert read["rows"] == [vars(row) for row in table.recount(300, 4)]
    assert "at 300 frames (3 s) of 64 bands in three channels, time reduction 4" in read["source"]
    # The time is halved twice: so are the costs, but for the first convolution and stage.
    assert read["rows"][0]["macs"] < table.recount(300, 1)[0].macs / 3


@pytest.mark.parametrize("form", table.FORMATS)
def test_output_file_holds_what_would_be_printed(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table"
    path.write_text("old")
    expected = printed(capsys, "--speech", f"--format={form}")
    assert printed(capsys, "--speech", f"--format={form}", f"--output={path}") == ""
    assert path.read_text() == expected
    assert os.listdir(tmp_path) == ["table"]


def test_speech_may_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        printed(capsys, *words)
        for words in (
            ("--speech", "--format", "csv"),
            ("--format", "csv", "--speech"),
            ("--format=csv", "--speech", "--frames=100"),
        )
    }
    assert len(found) == 1
    assert found.pop().startswith("network,alpha,beta,reported_wer_percent")


def test_without_speech_it_is_the_table_of_images(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    text = printed(capsys)
    assert "bL-ResNet-101" in text
    assert "ResNet-22" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--format", "xml"), "invalid choice: 'xml'"),
        (("--frames", "0"), "--frames"),
        (("--time-reduction", "3"), "(choose from 1, 2, 4)"),
        (("--output", "no/such/folder/table.txt"), "does not exist; create it first"),
        (("--output", "/"), "is a folder; give the name of a file to write"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    words: tuple[str, ...], message: str, capsys: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status: Any = main(["table", *words, "--speech"])
    except SystemExit as exit_:
        status = exit_.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("blnet table --speech: error: ")
    assert message in captured.err
    assert not list(tmp_path.iterdir())
