"""The layers of networks: bytes and FLOPs by hand, times, and the report on them."""

from __future__ import annotations

import io
import itertools
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import blnet
from blnet.bench import report
from blnet.bench.ladder import fold_batch_norm
from blnet.bench.layers import layers_of, record
from blnet.bench.networks import Built, Spec
from blnet.bench.report import layers as texts
from blnet.bench.results import Check, Layer, Measurement, Results, read_json, write_json
from blnet.bench.session import Case, Session
from blnet.bench.settings import Settings
from blnet.bench.suites import test_models as suite
from blnet.vision import bl_resnet50

RATES = {"copy_bandwidth": 1e9, "matmul_rate": 1e10}
BATCH, SIDE = 2, 10
PIXELS = BATCH * SIDE**2


def found(model: nn.Module, example: Tensor, **rates: float) -> list[Layer]:
    """The layers of a network, without what is between them."""
    return layers_of(model.eval(), example, {**RATES, **rates}, seconds=0.0)[:-1]


@pytest.mark.parametrize(
    ("layer", "flops", "elements"),
    [
        (nn.Conv2d(8, 16, 3, padding=1, bias=False), 2 * PIXELS * 16 * 8 * 9,
         PIXELS * (8 + 16) + 16 * 8 * 9),
        (nn.Conv2d(8, 16, 1), 2 * PIXELS * 16 * 8, PIXELS * (8 + 16) + 16 * 8 + 16),
        (nn.Conv2d(8, 16, 3, padding=1, groups=4, bias=False), 2 * PIXELS * 16 * 2 * 9,
         PIXELS * (8 + 16) + 16 * 2 * 9),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), 2 * PIXELS * 8 * 9,
         PIXELS * (8 + 8) + 8 * 9),
        (nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), 2 * PIXELS // 4 * 16 * 8 * 9,
         PIXELS * 8 + PIXELS // 4 * 16 + 16 * 8 * 9),
        # With a stride of 2 a 1x1 convolution reads a quarter of its input.
        (nn.Conv2d(8, 16, 1, stride=2, bias=False), 2 * PIXELS // 4 * 16 * 8,
         PIXELS // 4 * (8 + 16) + 16 * 8),
        (nn.MaxPool2d(2), 0, PIXELS * 8 + PIXELS // 4 * 8),
        (nn.MaxPool2d(3, 2, 1), 0, PIXELS * 8 + PIXELS // 4 * 8),
        # So does a pool of single positions, which some shortcuts are.
        (nn.MaxPool2d(1, 2), 0, PIXELS // 4 * (8 + 8)),
        (nn.AvgPool2d((1, 2), (2, 2)), 0, PIXELS // 2 * 8 + PIXELS // 4 * 8),
        (nn.BatchNorm2d(8), 0, 2 * PIXELS * 8 + 4 * 8),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_costs_by_hand(layer: nn.Module, flops: int, elements: int, dtype: torch.dtype) -> None:
    (cost,) = found(layer.to(dtype), torch.randn(BATCH, 8, SIDE, SIDE).to(dtype))
    assert (cost.flops, cost.bytes) == (flops, elements * dtype.itemsize)
    assert cost.name == "(network)"
    assert cost.kind == type(layer).__name__
    assert cost.shape[0] == BATCH


def test_costs_of_a_linear_layer_by_hand() -> None:
    (cost,) = found(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), torch.randn(3, 8))
    assert (cost.name, cost.kind, cost.shape) == ("0", "Linear", (3, 16))
    assert cost.flops == 2 * 3 * 8 * 16
    assert cost.bytes == 4 * (3 * 8 + 8 * 16 + 16 + 3 * 16)


def test_the_bound_is_the_longer_of_moving_and_multiplying() -> None:
    layer, x = nn.Linear(8, 16, bias=False), torch.randn(3, 8)
    moved, flops = 4 * (3 * 8 + 8 * 16 + 3 * 16), 2 * 3 * 8 * 16
    assert found(layer, x, copy_bandwidth=1.0)[0].bound == pytest.approx(moved)
    assert found(layer, x, matmul_rate=1.0)[0].bound == pytest.approx(flops)


def plain_resnet50() -> nn.Module:
    return Spec("resnet50", None, None, "resnet50").build()


@pytest.mark.parametrize("build", [plain_resnet50, lambda: bl_resnet50(alpha=2, beta=4)])
def test_flops_of_whole_networks_are_twice_the_macs_of_profile(build: Any) -> None:
    model = build().eval()
    x = torch.randn(1, 3, 64, 64)
    folded = fold_batch_norm(model, x)
    every = found(folded, x)
    assert sum(layer.flops for layer in every) == 2 * blnet.profile(model, (1, 3, 64, 64)).macs
    convolutions = [m for m in folded.modules() if isinstance(m, nn.Conv2d)]
    assert sum(layer.kind == "Conv2d" for layer in every) == len(convolutions)
    assert not any(layer.kind in ("ReLU", "Identity", "Flatten") for layer in every)
    assert all(layer.seconds is not None and layer.seconds > 0 for layer in every)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.relu(self.layer(x)))


def test_a_layer_that_runs_twice_is_there_twice() -> None:
    once, twice = found(Twice(), torch.randn(3, 4))
    assert (once.name, twice.name) == ("layer", "layer, call 2")
    assert once.flops == twice.flops == 2 * 3 * 4 * 4


class Around(nn.Module):
    """A layer that multiplies itself and calls another."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4))
        self.inner = nn.Linear(8, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(F.linear(x, self.weight))


def test_what_a_layer_calls_is_not_counted_twice() -> None:
    outer, inner = found(nn.Sequential(Around()), torch.randn(3, 4))
    assert (outer.name, outer.flops) == ("0", 2 * 3 * 4 * 8)
    assert (inner.name, inner.flops) == ("0.inner", 2 * 3 * 8 * 2)


def test_layers_with_several_outputs_and_layers_that_they_do_not_call() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 8, batch_first=True)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y, _ = self.lstm(x)
            return self.attention(y, y, y)[0]

    lstm, attention = found(Attention(), torch.randn(2, 5, 8))
    assert lstm.kind == "LSTM"
    assert lstm.bytes == 4 * (4 * 8 * (8 + 8 + 2) + 2 * 5 * (8 + 8) + 2 * 2 * 8)
    assert attention.kind == "MultiheadAttention"
    # It holds a layer and does not call it: those weights are moved all the same.
    assert attention.bytes >= 4 * 4 * (8 * 8 + 8)


class Sleeping(nn.Linear):
    def __init__(self, seconds: float) -> None:
        super().__init__(2, 2)
        self.sleep = seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.sleep)
        return super().forward(x)


class Slow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Sleeping(0.02), Sleeping(0.05)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.03)
        return self.second(self.first(x))


def test_times_are_those_of_the_layers_and_of_what_is_between() -> None:
    first, second, between = layers_of(Slow(), torch.randn(1, 2), RATES, seconds=0.0)
    assert [layer.name for layer in (first, second)] == ["first", "second"]
    for layer, seconds in ((first, 0.02), (second, 0.05), (between, 0.03)):
        assert seconds <= layer.seconds < seconds + 0.045
    assert (between.name, between.bound, between.bytes) == ("between layers", 0.0, 0)


def test_the_sum_of_the_times_is_that_of_a_pass() -> None:
    x = torch.randn(2, 3, 96, 96)
    model = fold_batch_norm(bl_resnet50(alpha=2, beta=4).eval(), x)
    every = layers_of(model, x, RATES, seconds=0.5)
    with torch.inference_mode():
        model(x)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            model(x)
            times.append(time.perf_counter() - start)
    whole = sorted(times)[2]
    assert whole / 4 < sum(layer.seconds for layer in every) < 4 * whole


# ---------------------------------------------------------------------------- in a run


class Odd(nn.Module):
    """Runs another number of layers every time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.count = nn.Conv2d(3, 3, 1), itertools.count(1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(next(self.count)):
            x = self.layer(x)
        return x


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("this one is broken")


@pytest.fixture
def session() -> Session:
    made = Session(Settings(device="cpu", batch=2, size=32, repeat=2, models=("resnet18",)))
    made.results.ceilings |= RATES
    return made


def test_a_network_that_cannot_be_timed_is_a_note(session: Session) -> None:
    models = {"odd": Odd(), "broken": Broken(), "fine": nn.Conv2d(3, 3, 1)}
    built = Built({Spec(n, None, None, n): m.eval() for n, m in models.items()}, {})
    before = len(session.results.notes)
    record(session, "models, batch 2", built, torch.randn(2, 3, 8, 8))
    assert list(session.results.layers["models, batch 2"]) == ["fine"]
    odd, broken = session.results.notes[before:]
    assert "layers of odd" in odd
    assert "same layers every time" in odd
    assert "layers of broken" in broken
    assert "this one is broken" in broken


def test_the_models_suite_times_layers_at_the_throughput_batch_alone(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = suite.rungs("cpu")[:1]
    monkeypatch.setattr(suite, "rungs", lambda *_: eager)
    for case in suite.cases(session.settings):
        session.measured(suite, case)
    assert set(session.results.layers) == {"models, batch 2"}
    every = session.results.layers["models, batch 2"]["resnet18"]
    (network,) = session.results.networks
    assert sum(layer.flops for layer in every) == 2 * 2 * network.macs
    assert not session.results.failures


def test_a_suite_whose_closer_look_fails_does_not_fail_the_run(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(group: str, session: Session) -> None:
        raise RuntimeError("no look at this")

    monkeypatch.setattr(suite, "rungs", lambda *_: [])
    monkeypatch.setattr(suite, "after", fail)
    with pytest.raises(KeyError):  # there is no rung
        session.measured(suite, Case("batch 2", "resnet18", "eager"))
    assert "models, batch 2: RuntimeError: no look at this" in session.results.notes
    assert "models, batch 2" in session.results.finished


# ---------------------------------------------------------------------------- the report


@pytest.fixture
def results(session: Session) -> Results:
    made = session.results
    made.ceilings |= {"cache_bandwidth": 2e11, "cache_bytes": 32e6}
    made.layers["models, batch 2"] = {
        "resnet18": [
            *(Layer(f"c{n}", "Conv2d", (2, 8, 4, 4), 10**9, 10**7, 0.01, 0.02) for n in range(11)),
            Layer("worst", "Conv2d", (2, 64, 4, 4), 5 * 10**9, 2 * 10**7, 0.05, 0.16),
            Layer("quick", "Linear", (2, 10), 10**6, 10**3, 0.002, 0.001),
            Layer("between layers", "add, ReLU, upsampling", (), 0, 0, 0.0, 0.04),
        ]
    }
    facts = {"batch": 2, "network": "resnet18", "alpha": None}
    for rung, seconds in (("eager", 0.5), ("folded", 0.324)):
        made.measurements.append(
            Measurement(
                "models", "batch 2", "resnet18", rung, facts=facts, status="ok",
                samples=[seconds] * 3, check=Check(1e-6, 1e-3, "float64"),
            )
        )  # fmt: skip
    return made


SAID = "bound 162.0 ms, fastest rung (folded) 324.0 ms: 50% of the bound, layer by layer 421.0 ms."


def test_those_that_lose_most_stand_first(results: Results) -> None:
    found = results.layers["models, batch 2"]["resnet18"]
    rows = texts.rows(found, 99)
    assert [row[0] for row in rows[:3]] == ["worst", "between layers", "c0"]
    assert rows[0][:5] == ["worst", "Conv2d", "2x64x4x4", "5.000", "20.0"]
    assert rows[0][5:] == ["50.00", "160.0", "110.0", "31%"]
    assert rows[1][2:] == ["-", "-", "-", "0.0000", "40.00", "40.00", "-"]
    assert rows[-1][0] == "quick"
    assert rows[-1][-1] == "200%"
    assert len(texts.rows(found, 5)) == 5
    assert all(len(row) == len(texts.HEADER) for row in rows)


def test_markdown_shows_them(results: Results) -> None:
    text = report.markdown(results)
    section = text.partition("## Where the time goes")[2].partition("\n## ")[0]
    assert "### resnet18: models, batch 2" in section
    assert f"resnet18: {SAID}" in section
    assert "| worst | Conv2d | 2x64x4x4 | 5.000 | 20.0 | 50.00 | 160.0 | 110.0 | 31% |" in section
    assert sum(line.startswith("| c") for line in section.splitlines()) == 8
    assert "Copy bandwidth measured in this run: 1 GB/s" in section
    assert "200 GB/s, the bound of what moves at most the 32 MB" in section
    assert "Rate of a matrix product in this run: 0.01 TFLOP/s" in section
    assert "share can pass 100 %" in section


def test_the_terminal_shows_five(results: Results) -> None:
    console = Console(width=132, record=True, file=io.StringIO())
    report.print_tables(results, console)
    text = console.export_text()
    section = text.partition("where the time goes: resnet18, models, batch 2")[2]
    assert SAID in section.replace("\n", " ")
    assert "worst" in section
    assert sum(line.lstrip().startswith("c") for line in section.splitlines()) == 3


def test_a_network_without_a_rung_has_its_bound(results: Results) -> None:
    results.measurements.clear()
    said = texts.reading(results, "models, batch 2", "resnet18")
    assert said == "resnet18: bound 162.0 ms, layer by layer 421.0 ms."


def test_results_without_layers_can_be_read(results: Results, tmp_path: Any) -> None:
    write_json(tmp_path / "results.json", results)
    assert read_json(tmp_path / "results.json").layers == results.layers
    values = results.as_dict()
    del values["layers"]
    old = Results.from_dict(values)
    assert old.layers == {}
    assert "Where the time goes" not in report.markdown(old)
    report.print_tables(old, Console(file=io.StringIO()))
