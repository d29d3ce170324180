"""The ceilings of a device, and the bound that follows from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blnet.bench import roofline
from blnet.bench.layers import BETWEEN
from blnet.bench.results import Layer
from blnet.bench.roofline import (
    cache_bytes,
    convolution_rate,
    copy_bandwidth,
    cpu_copy_bytes,
    cpu_matmul_rate,
    least_seconds,
    matmul_rate,
    measure_ceilings,
    measure_ceilings_again,
)
from blnet.bench.session import Session
from blnet.bench.settings import Settings
from blnet.bench.suites import test_merge as merge

RATES = {"copy_bandwidth": 1e9, "matmul_rate": 1e12}


def fixed(seconds: float):
    """A clock on which every call takes as long."""

    def clock(call) -> float:
        call()
        return seconds

    return clock


def test_a_ceiling_is_the_best_that_was_measured() -> None:
    times = iter([0.5, 0.25, 1.0, 4.0] * 3)

    def clock(call) -> float:
        call()
        return next(times)

    assert copy_bandwidth(clock, 800, "cpu", 4) == pytest.approx(2 * 800 / 0.25)
    assert matmul_rate(clock, torch.float32, 10, "cpu", 4) == pytest.approx(2 * 1000 / 0.25)
    rate = convolution_rate(clock, torch.float32, (2, 4, 5, 6), 4)
    assert rate == pytest.approx(2 * (2 * 4 * 5 * 6) * (4 * 9) / 0.25)


@pytest.mark.parametrize(("after", "noted"), [(41e9, False), (39e9, False), (82e9, True),
                                              (20e9, True)])  # fmt: skip
def test_rates_are_measured_again_at_the_end(
    after: float, noted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([40e9, after])
    monkeypatch.setattr(roofline, "_copies", lambda session: {"copy_bandwidth": next(rates)})
    monkeypatch.setattr(roofline, "cpu_matmul_rate", lambda clock, dtype: 1e12)
    session = Session(Settings(device="cpu"))
    measure_ceilings_again(session)
    assert session.results.ceilings == {}, "a run that needs none measures none"
    measure_ceilings(session)
    layer = Layer("conv", "Conv2d", (1,), 0, 10**9, 10**9 / 40e9)
    session.results.layers = {"models, batch 8": {"resnet18": [layer]}}
    measure_ceilings_again(session)
    best = max(40e9, after)
    assert session.results.ceilings["copy_bandwidth"] == best
    assert session.results.layers["models, batch 8"]["resnet18"][0].bound == 10**9 / best
    said = [note for note in session.results.notes if note.startswith("copy bandwidth was 40 GB/s")]
    assert len(said) == noted


def test_what_lies_between_layers_has_no_bound_where_caches_are_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU: adding and the like counts no bytes."""
    monkeypatch.setattr(roofline, "_copies", lambda session: {"copy_bandwidth": 40e9})
    monkeypatch.setattr(roofline, "cpu_matmul_rate", lambda clock, dtype: 1e12)
    session = Session(Settings(device="cpu"))
    measure_ceilings(session)
    session.results.layers = {"models, batch 8": {"resnet18": [BETWEEN]}}
    measure_ceilings_again(session)
    assert session.results.layers == {"models, batch 8": {"resnet18": [BETWEEN]}}


@pytest.mark.parametrize(("after", "noted"), [(1.05e12, False), (1.11e12, True), (0.8e12, True)])
def test_products_are_measured_again_at_the_end(
    after: float, noted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of a CPU may rise in between, and a bound of then would be passed."""
    rates = iter([1e12, after])
    monkeypatch.setattr(roofline, "_copies", lambda session: {"copy_bandwidth": 40e9})
    monkeypatch.setattr(roofline, "cpu_matmul_rate", lambda clock, dtype: next(rates))
    session = Session(Settings(device="cpu"))
    measure_ceilings(session)
    layer = Layer("conv", "Conv2d", (1,), 10**12, 10, 1.0)
    session.results.layers = {"models, batch 8": {"resnet18": [layer]}}
    measure_ceilings_again(session)
    assert session.results.ceilings["matmul_rate"] == max(1e12, after)
    bound = session.results.layers["models, batch 8"]["resnet18"][0].bound
    assert bound == pytest.approx(1e12 / max(1e12, after))
    said = f"matmul rate was 1 TFLOP/s at first and {after / 1e12:.3g} TFLOP/s at the end"
    assert any(note.startswith(said) for note in session.results.notes) is noted


def test_a_copy_counts_what_is_read_and_written() -> None:
    assert copy_bandwidth(fixed(0.5), 800, "cpu", 4) == pytest.approx(2 * 800 / 0.5)


def test_a_product_counts_two_flops_a_multiply_add() -> None:
    rate = matmul_rate(fixed(0.25), torch.float32, 10, "cpu", 4)
    assert rate == pytest.approx(2 * 1000 / 0.25)


def test_products_that_take_long_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def rate(clock, dtype, size, device, products) -> float:
        tried.append(size)
        return 1e9

    monkeypatch.setattr(roofline, "matmul_rate", rate)
    monkeypatch.setattr(roofline, "convolution_rate", lambda *_: 1e15)  # of 4 s: not tried either
    assert cpu_matmul_rate(fixed(1.0), torch.float32) == 1e9
    assert tried == [256]  # 512 would take 0.27 s


def test_the_best_of_the_sizes_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {256: 1e12, 512: 3e12, 1024: 2e12, 2048: 1e12}
    monkeypatch.setattr(roofline, "matmul_rate", lambda clock, dtype, size, *_: rates[size])
    monkeypatch.setattr(roofline, "convolution_rate", lambda *_: 2e12)
    assert cpu_matmul_rate(fixed(1.0), torch.float32) == 3e12
    monkeypatch.setattr(roofline, "convolution_rate", lambda *_: 4e12)
    assert cpu_matmul_rate(fixed(1.0), torch.float32) == 4e12


def test_a_convolution_counts_two_flops_a_multiply_add() -> None:
    rate = convolution_rate(fixed(0.25), torch.float32, (2, 4, 5, 6), 4)
    assert rate == pytest.approx(2 * (2 * 4 * 5 * 6) * (4 * 9) / 0.25)


@pytest.mark.parametrize(
    ("held", "memory", "copied"),
    [
        (None, None, 256 << 20),
        (32 << 20, 64 << 30, 256 << 20),
        (128 << 20, 64 << 30, 512 << 20),
        (1 << 30, 256 << 30, 1 << 30),
        (32 << 20, 1 << 30, 64 << 20),
    ],
)
def test_the_copy_fits_the_machine(held: int | None, memory: int | None, copied: int) -> None:
    assert cpu_copy_bytes(held, memory) == copied


def sysfs(folder: Path, shared: dict[int, str]) -> Path:
    """Describe cores with a small cache each and a large one of 1024 KB that some share."""
    for core, cores in shared.items():
        for index, (level, size, who) in enumerate(
            (("2", "64K", str(core)), ("3", "1024K", cores))
        ):
            cache = folder / f"cpu{core}" / "cache" / f"index{index}"
            cache.mkdir(parents=True)
            for name, text in (("level", level), ("size", size), ("shared_cpu_list", who)):
                (cache / name).write_text(f"{text}\n")
    return folder


def test_a_shared_cache_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert cache_bytes(sysfs(tmp_path, {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"})) == 2 << 20


def test_unknown_caches_are_none(tmp_path: Path) -> None:
    assert cache_bytes(tmp_path) is None


def test_the_bound_is_the_longer_of_the_two() -> None:
    assert least_seconds(10**9, 10**11, RATES) == pytest.approx(1.0)
    assert least_seconds(10**8, 10**12, RATES) == pytest.approx(1.0)
    assert least_seconds(10**9, 10**15, {"copy_bandwidth": 1e9}) == pytest.approx(1.0)


def test_what_the_caches_hold_has_their_rate() -> None:
    rates = {**RATES, "cache_bandwidth": 1e10, "cache_bytes": 1e6}
    assert least_seconds(10**6, 0, rates) == pytest.approx(1e-4)
    assert least_seconds(10**6 + 1, 0, rates) == pytest.approx(1e-3, rel=1e-3)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "CPU_COPY_BYTES", 8 << 20)
    monkeypatch.setattr(roofline, "CPU_CACHES", 0)
    monkeypatch.setattr(roofline, "CPU_MATRIX_SIZES", (128, 256))
    monkeypatch.setattr(roofline, "cache_bytes", lambda: 1 << 20)


@pytest.mark.usefixtures("small")
def test_ceilings_of_this_cpu_are_plausible_and_measured_once() -> None:
    session = Session(Settings(device="cpu"))
    measure_ceilings(session)
    found = dict(session.results.ceilings)
    assert set(found) == {"copy_bandwidth", "cache_bandwidth", "cache_bytes", "matmul_rate"}
    assert 1e8 < found["copy_bandwidth"] < 1e13
    assert 1e8 < found["matmul_rate"] < 1e15
    measure_ceilings(session)
    assert session.results.ceilings == found


@pytest.mark.usefixtures("small")
def test_16_bits_are_never_held_to_be_slower_than_32(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {torch.float16: 1e9, torch.float32: 1e11}
    monkeypatch.setattr(roofline, "cpu_matmul_rate", lambda clock, dtype: rates[dtype])
    session = Session(Settings(device="cpu", dtype="float16"))
    measure_ceilings(session)
    assert session.results.ceilings["matmul_rate"] == 1e11


@pytest.mark.usefixtures("small")
def test_a_suite_of_an_op_has_a_bound_on_a_cpu() -> None:
    session = Session(Settings(device="cpu", batch=1, repeat=2))
    case = next(c for c in merge.SUITE.cases(session.settings) if c.implementation == "eager")
    merge.SUITE.build(case.group, session)
    assert session.results.ceilings["copy_bandwidth"] > 0
