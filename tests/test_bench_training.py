"""The training suite: both rungs compute a network's gradients, and a wrong one gets no time."""

from __future__ import annotations

import csv
import dataclasses
from typing import Any

import pytest
import torch

from blnet.bench import kept, measure
from blnet.bench.intervals import LEAST_ROUNDS
from blnet.bench.report import csv_text, markdown
from blnet.bench.session import Session
from blnet.bench.settings import Settings
from blnet.bench.suites import test_training as suite
from blnet.bench.summary import model_rows

SMALL = Settings(device="cpu", batch=2, size=64, models=("bl_resnet18",), branchings=((2, 2),),
                 baseline="resnet18", repeat=4)  # fmt: skip


@pytest.fixture
def fused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    rungs = [
        dataclasses.replace(r, devices=("cpu",), quick=("cpu",))
        for r in suite.RUNGS
        if not r.compiles
    ]
    monkeypatch.setattr(suite, "RUNGS", tuple(rungs))


def run(session: Session) -> list[measure.Measurement]:
    for case in suite.cases(session.settings):
        session.measured(suite, case)
    return session.results.measurements


def check_what_is_kept(session: Session) -> None:
    counts = {m.family: m.facts[kept.FACT] for m in session.results.measurements}
    for ways in counts.values():
        assert list(ways) == list(kept.WAYS)
        # Basic blocks have no convolution to fuse but in the Big-Little merges.
        assert ways["fused, recompute"] <= ways["recompute"] < ways["plain"]
        assert ways["fused"] <= ways["plain"]
    ours = counts["bl_resnet18 a2 b2"]
    assert ours["fused"] < ours["plain"]
    first, second = kept.rows(session.results)
    assert first[0] == "resnet18"
    assert first[1].endswith("(1.00x)")
    share = ours["plain"] / counts["resnet18"]["plain"]
    assert second[1] == f"{ours['plain'] / 1e6:.1f} ({share:.2f}x)"
    assert kept.TITLE in markdown(session.results)
    # Results of earlier versions have no such fact.
    for m in session.results.measurements:
        del m.facts[kept.FACT]
    assert kept.rows(session.results) == []
    assert kept.TITLE not in markdown(session.results)


def test_fused_and_plain_networks_are_timed(fused_on_a_cpu: None) -> None:
    session = Session(SMALL)
    found = run(session)
    assert [(m.family, m.implementation, m.status) for m in found] == [
        (family, rung, "ok")
        for family in ("resnet18", "bl_resnet18 a2 b2")
        for rung in ("channels-last", "recompute", "fused", "fused, recompute")
    ]
    assert {len(m.samples) for m in found} == {SMALL.repeat}
    plain, ours = model_rows(session.results, "training")
    assert plain.batches[2].architecture is None
    # Over its own fastest rung that is not ours, where ours is faster still.
    on_ours = plain.batches[2].rung != plain.batches[2].baseline_rung
    assert (plain.batches[2].speedup is not None) == on_ours
    assert ours.batches[2].speedup is not None
    assert model_rows(session.results) == []
    text = markdown(session.results)
    assert "## Training: training, forward and backward pass" in text
    assert "## Models" not in text
    lines = list(csv.DictReader(csv_text(session.results).splitlines()))
    assert len(lines) == len(found)
    gains = [(line["family"], line["implementation"]) for line in lines if line["speedup"]]
    with_gain = [row for row in (plain, ours) if row.batches[2].speedup is not None]
    assert gains == [(row.network.label, row.batches[2].rung) for row in with_gain]
    check_what_is_kept(session)


def test_a_wrong_gradient_gets_no_time(
    fused_on_a_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimize = suite.optimize_training

    def broken(model: torch.nn.Module, **options: Any) -> torch.nn.Module:
        fused = optimize(model, **options)
        parameter = next(p for name, p in fused.named_parameters() if "conv2" in name)
        parameter.register_hook(torch.zeros_like)
        return fused

    monkeypatch.setattr(suite, "optimize_training", broken)
    statuses = {(m.family, m.implementation): m.status for m in run(Session(SMALL))}
    assert statuses["resnet18", "channels-last"] == "ok"
    assert statuses["resnet18", "fused"] == "wrong"


@pytest.mark.parametrize(("batch", "values"), [(1, "1 value"), (2, "2 values")])
def test_sizes_at_which_gradients_are_rounding_are_refused(batch: int, values: str) -> None:
    small = dataclasses.replace(SMALL, size=32, models=("resnet18",), batch=batch)
    found = run(Session(small))
    assert {m.status for m in found} == {"error"}
    assert {m.note for m in found} == {
        f"ValueError: a batch norm has {values} of each channel, whose gradients are rounding "
        "and cannot be checked; train with a larger --batch or --size"
    }
    suite._check_values(torch.nn.BatchNorm2d(3), (torch.ones(4, 3, 1, 1),))


def test_a_gate_can_tell_the_default_rounds() -> None:
    for device in ("cpu", "cuda"):
        settings = dataclasses.replace(SMALL, device=device, repeat=None)
        assert suite.rounds(settings) > LEAST_ROUNDS
        assert suite.rounds(dataclasses.replace(settings, full=True)) > LEAST_ROUNDS


def test_a_cpu_has_no_fused_rung() -> None:
    names = [rung.name for rung in suite.rungs(dataclasses.replace(SMALL, full=True))]
    assert names == ["channels-last", "compile", "recompute"]
    names = [rung.name for rung in suite.rungs(dataclasses.replace(SMALL, device="cuda"))]
    assert names == ["channels-last", "compile", "fused", "fused, compile", "fused, recompute"]
