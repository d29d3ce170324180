"""The training suite: both rungs compute a network's gradients, and a wrong one gets no time."""

from __future__ import annotations

import csv
import dataclasses

import pytest
import torch

from blnet.bench import measure
from blnet.bench.report import csv_text, markdown
from blnet.bench.session import Session
from blnet.bench.settings import Settings
from blnet.bench.suites import test_training as suite
from blnet.bench.summary import model_rows

SMALL = Settings(device="cpu", batch=2, size=64, models=("bl_resnet18",), branchings=((2, 2),),
                 baseline="resnet18", repeat=4)  # fmt: skip


@pytest.fixture
def fused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    rungs = [dataclasses.replace(r, devices=("cpu",)) for r in suite.RUNGS if not r.compiles]
    monkeypatch.setattr(suite, "RUNGS", tuple(rungs))


def run(session: Session) -> list[measure.Measurement]:
    for case in suite.cases(session.settings):
        session.measured(suite, case)
    return session.results.measurements


def test_fused_and_plain_networks_are_timed(fused_on_a_cpu: None) -> None:
    session = Session(SMALL)
    found = run(session)
    assert [(m.family, m.implementation, m.status) for m in found] == [
        (family, rung, "ok")
        for family in ("resnet18", "bl_resnet18 a2 b2")
        for rung in ("channels-last", "fused")
    ]
    plain, ours = model_rows(session.results, "training")
    assert plain.batches[2].speedup is None
    assert ours.batches[2].speedup is not None
    assert model_rows(session.results) == []
    text = markdown(session.results)
    assert "## Training: training, forward and backward pass" in text
    assert "## Models" not in text
    lines = list(csv.DictReader(csv_text(session.results).splitlines()))
    assert len(lines) == len(found)
    gains = [line["implementation"] for line in lines if line["speedup"]]
    assert gains == [ours.batches[2].rung]


def test_a_wrong_gradient_gets_no_time(
    fused_on_a_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse = suite.blnet.fuse

    def broken(model: torch.nn.Module) -> torch.nn.Module:
        fused = fuse(model)
        parameter = next(p for name, p in fused.named_parameters() if "conv2" in name)
        parameter.register_hook(torch.zeros_like)
        return fused

    monkeypatch.setattr(suite.blnet, "fuse", broken)
    statuses = {(m.family, m.implementation): m.status for m in run(Session(SMALL))}
    assert statuses["resnet18", "channels-last"] == "ok"
    assert statuses["resnet18", "fused"] == "wrong"


def test_a_cpu_has_no_fused_rung() -> None:
    names = [rung.name for rung in suite.rungs(dataclasses.replace(SMALL, full=True))]
    assert names == ["channels-last", "compile"]
    names = [rung.name for rung in suite.rungs(dataclasses.replace(SMALL, device="cuda"))]
    assert names == ["channels-last", "compile", "fused", "fused, compile"]
