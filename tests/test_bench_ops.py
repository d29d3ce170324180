"""What the suites of ops share: cases, passes, counted costs, results that are checked."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from blnet.bench import ops
from blnet.bench.catalogue import SUITES, op_suites
from blnet.bench.measure import declare
from blnet.bench.ops import OpSuite, Pass, group_name
from blnet.bench.report.ops import COUNTED, op_notes
from blnet.bench.session import Session
from blnet.bench.settings import Settings, resolve
from blnet.bench.summary import op_rows
from blnet.kernels.catalogue import OPS

CPU = Settings(device="cpu", batch=2, repeat=2)


def suite_of(name: str) -> Any:
    return importlib.import_module(SUITES[name][0])


@dataclasses.dataclass(frozen=True)
class Place:
    label: str


def small(ours: Callable[[Tensor, Tensor], Tensor]) -> OpSuite[Place]:
    """Return a suite of x * y, of which ours is given."""
    return OpSuite(
        name="product",
        computes="x y",
        sites=(Place("a"), Place("b")),
        quick_sites=(Place("a"),),
        passes=tuple(
            Pass(kind, kind, lambda x, y: x * y, ours, lambda site, given: (30, 12))
            for kind in ("inference", "forward", "backward", "both")
        ),
        tensors=lambda site, settings: ([torch.randn(3, 4) for _ in range(3)], 2),
    )


def statuses(suite: OpSuite[Place]) -> dict[tuple[str, str], str]:
    session = Session(CPU)
    for case in suite.cases(session.settings):
        session.measured(SuiteModule(suite), case)
    return {(m.facts["pass"], m.implementation): m.status for m in session.results.measurements}


class SuiteModule:
    """A suite as a module holds it."""

    def __init__(self, suite: OpSuite[Place]) -> None:
        self.NAME, self.cases, self.build = suite.name, suite.cases, suite.build


@pytest.fixture(autouse=True)
def without_compiling_or_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "compiled", lambda function, example, **options: function)
    monkeypatch.setattr(ops, "measure_ceilings", lambda session: None)


def test_every_pass_runs_and_is_checked() -> None:
    found = statuses(small(lambda x, y: y * x))
    assert set(found.values()) == {"ok"}
    assert len(found) == 4 * 3  # a quick run: one site, no tuned compiling


def test_a_wrong_op_gets_no_time_in_any_pass() -> None:
    found = statuses(small(lambda x, y: -(x * y)))
    for (_, implementation), status in found.items():
        assert status == ("wrong" if implementation == "blnet" else "ok")


def test_a_wrong_gradient_fails_the_backward_passes_alone() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
            ctx.save_for_backward(x, y)
            return x * y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            _, y = ctx.saved_tensors
            return grad * y, grad * y

    found = statuses(small(Wrong.apply))
    passes = ("inference", "forward", "backward", "both")
    assert [found[what, "blnet"] for what in passes] == ["ok", "ok", "wrong", "wrong"]


def test_what_one_implementation_changes_in_place_another_does_not_see() -> None:
    # One implementation is called at most three times before its result is checked, all together
    # more often.
    def counting(x: Tensor, y: Tensor, count: Tensor) -> Tensor:
        count.add_(1)
        return x * y * (count <= 3)

    suite = dataclasses.replace(
        small(lambda x, y: x),
        passes=(Pass("both", "both", counting, counting, lambda site, given: (1, 1)),),
        tensors=lambda site, settings: (
            [torch.ones(3), torch.ones(3), torch.zeros(3), torch.ones(3)],
            2,
        ),
    )
    assert set(statuses(suite).values()) == {"ok"}


@pytest.mark.parametrize("name", op_suites())
def test_suites_of_ops_have_cases_and_sane_costs(name: str) -> None:
    module = suite_of(name)
    assert name in [op.name for op in OPS]
    session = Session(CPU)
    session.settings = dataclasses.replace(session.settings, full=True)
    ways = [way for way in ops.WAYS if "cpu" in way.devices]
    places = len(module.SUITE.sites) * len(module.SUITE.passes)
    assert len(module.cases(session.settings)) == places * len(ways)
    for site in module.SUITE.quick_sites:
        for what in module.SUITE.passes:
            group = module.build(group_name(site, what), session)
            out = group.references[site.label]()
            largest = max(t.numel() for t in (out if isinstance(out, list | tuple) else [out]))
            for implementation in group.implementations:
                facts = implementation.facts
                assert facts["bytes"] >= 4 * largest
                assert (facts["flops"] == 0) == (name == "merge")


def test_costs_of_expand_merge_are_those_of_the_limits() -> None:
    # 56x56x256 at alpha 2, batch 256, bf16: x 206 MB, big 103, out 411.
    module = suite_of("expand_merge")
    site = module.MERGES[1]
    with torch.device("meta"):
        maps = [torch.empty(256, c, s, s, dtype=torch.bfloat16) for c, s in
                ((128, 56), (256, 28), (256, 56))]  # fmt: skip
        weight, vector = torch.empty(256, 128, 1, 1, dtype=torch.bfloat16), torch.empty(256)
    given = [maps[0], weight, vector, vector, maps[1], vector, vector, maps[2]]
    inference, forward, backward = (what.cost(site, given) for what in module.SUITE.passes)
    assert inference[0] == pytest.approx(206e6 + 103e6 + 411e6, rel=5e-3)
    assert forward[0] == pytest.approx(2 * 206e6 + 103e6 + 411e6, rel=5e-3)
    assert backward[0] == pytest.approx(4 * 411e6 + 3 * 206e6 + 103e6, rel=5e-3)
    pixels = 256 * 56 * 56
    assert inference[1] == 2 * pixels * 128 * 256
    assert forward[1] == 2 * pixels * 128 * 256 + pixels * 128**2


def test_a_report_says_whose_costs_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, said in (("expand_merge", suite_of("expand_merge").COUNTED), ("merge", COUNTED)):
        session = Session(CPU)
        suite = suite_of(name).SUITE
        group = suite.build(group_name(suite.quick_sites[-1], suite.passes[-1]), session)
        session.results.measurements = declare(group)
        assert f"- GB/s and TFLOP/s count {said}." in op_notes(session.results, name)
    assert "reads x twice" in suite_of("expand_merge").COUNTED


def test_graphs_replay_every_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in: what is captured runs once without autograd, replays give what it gave."""
    captured = []

    class Replayed:
        def __init__(self, make: Callable[[], Callable[[], Any]]):
            run = make()
            with torch.no_grad():
                self.output = run()
            captured.append(self)

        def __call__(self) -> Any:
            return self.output

    monkeypatch.setattr(ops, "captured_where_made", Replayed)
    session = Session(CPU)
    session.settings = dataclasses.replace(session.settings, graphs=True)
    suite = small(lambda x, y: x * y)
    for case in suite.cases(session.settings):
        session.measured(SuiteModule(suite), case)
    found = session.results.measurements
    assert {m.status for m in found} == {"ok"}
    assert len(captured) == len(found) > 0
    assert all(m.note == "replayed as a CUDA graph" for m in found if m.facts["baseline"])


def test_what_does_not_fit_into_memory_is_halved() -> None:
    fits = 3

    def ours(x: Tensor, y: Tensor) -> Tensor:
        if len(x) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return x * y

    suite = dataclasses.replace(
        small(ours),
        passes=small(ours).passes[:1],
        tensors=lambda site, settings: (
            [torch.randn(settings.throughput_batch, 4) for _ in range(3)], 2
        ),
    )  # fmt: skip
    session = Session(dataclasses.replace(CPU, batch=8))
    for case in suite.cases(session.settings):
        session.measured(SuiteModule(suite), case)
    assert {(m.status, m.facts["batch"]) for m in session.results.measurements} == {("ok", 2)}
    assert "product, a, inference: batch 8 does not fit" in " ".join(session.results.notes)


def test_recordings_that_do_not_fit_into_memory_are_halved(monkeypatch: Any) -> None:
    features = suite_of("features")
    monkeypatch.setattr(
        features,
        "measure_ceilings",
        lambda session: session.results.ceilings.update(copy_bandwidth=1e9),
    )
    blnet = features._blnet

    def small_memory(samples: Tensor, device: str = "cpu") -> Any:
        if len(samples) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return blnet(samples, device)

    monkeypatch.setattr(features, "_blnet", small_memory)
    monkeypatch.setattr(features, "_librosa", small_memory)
    session = Session(CPU)
    case = next(c for c in features.cases(session.settings) if c.group == "16 x 1 s")
    found = session.measured(features, case)
    assert (found.status, found.facts["batch"]) == ("ok", 4)
    assert op_rows(session.results, "features")[0].share is not None, "a bound, whoever ran before"


def test_graphs_are_refused_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="--graphs needs a GPU"):
        resolve(dataclasses.replace(CPU, graphs=True))
