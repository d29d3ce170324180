"""A trained network in 16 bits says of real pictures what it says in float32; what is right."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import blnet
from blnet.modes import exact_products
from blnet.optimizing import choosing, engines
from blnet.optimizing.choosing import TOLERANCES, difference, is_rounded, tolerance
from blnet.optimizing.engines import Engine
from blnet.optimizing.report import Change

datasets = pytest.importorskip("sklearn.datasets")
PICTURES = 1000
CONFIG = blnet.BigLittleConfig(
    block="basic", depths=(2, 2), widths=(16, 32), alpha=2, beta=2, stem="small", stem_width=16,
    in_channels=1, num_classes=10,
)  # fmt: skip


@pytest.fixture(scope="module")
def pictures() -> tuple[Tensor, Tensor]:
    digits = datasets.load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    maps = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 8 - 1
    return maps, torch.tensor(digits.target)[order]


@pytest.fixture(scope="module")
def trained(pictures) -> nn.Module:
    """Train on the pictures that the test does not ask about."""
    torch.manual_seed(0)
    maps, labels = (part[PICTURES:] for part in pictures)
    model = blnet.BigLittleNet(CONFIG).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for step in range(100):
        chosen = torch.arange(64) * 7 + 64 * step
        index = chosen % len(maps)
        loss = F.cross_entropy(model(maps[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def test_the_network_has_learned(trained, pictures) -> None:
    maps, labels = (part[:PICTURES] for part in pictures)
    assert (trained(maps).argmax(1) == labels).float().mean() > 0.9


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@torch.no_grad()
def test_16_bits_agree_on_real_pictures(precision, trained, pictures) -> None:
    maps = pictures[0][:PICTURES]
    fast = blnet.optimize(trained, precision=precision)
    exact = trained(maps)
    agreement = (fast(maps).argmax(1) == exact.argmax(1)).float().mean()
    assert agreement >= 0.995
    dtype = getattr(torch, precision)
    double = copy.deepcopy(trained).double()(maps.double())
    eager = copy.deepcopy(trained).to(dtype)(maps.to(dtype))
    assert difference(fast(maps), double) <= 1.25 * difference(eager, double)


@contextlib.contextmanager
def multiplying(device: str, **precisions: str) -> Iterator[None]:
    """Set how PyTorch's convolutions and products of matrices multiply in float32."""
    backends = torch.backends
    units: dict[str, Any] = {
        "cpu": {"conv": backends.mkldnn.conv, "matmul": backends.mkldnn.matmul},
        "cuda": {"conv": backends.cudnn.conv, "matmul": backends.cuda.matmul},
    }[device]
    before = {name: units[name].fp32_precision for name in precisions}
    try:
        for name, precision in precisions.items():
            units[name].fp32_precision = precision
        yield
    finally:
        for name, precision in before.items():
            units[name].fp32_precision = precision


@pytest.mark.parametrize(
    ("device", "precisions", "as_in"),
    [
        ("cpu", {}, torch.float32),
        ("cpu", {"matmul": "tf32"}, torch.float16),
        ("cpu", {"conv": "tf32", "matmul": "bf16"}, torch.bfloat16),
        ("cuda", {}, torch.float16),  # PyTorch's default
        ("cuda", {"conv": "ieee"}, torch.float32),
        ("cuda", {"conv": "ieee", "matmul": "tf32"}, torch.float16),
    ],
)
def test_float32_is_held_to_what_its_products_keep(
    device: str, precisions: dict[str, str], as_in: torch.dtype
) -> None:
    with multiplying(device, **precisions):
        assert tolerance(torch.float32, torch.device(device)) == TOLERANCES[as_in]
        assert is_rounded(torch.float32, torch.device(device)) is (as_in is not torch.float32)
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            assert tolerance(dtype, torch.device(device)) == TOLERANCES[dtype]


def test_engines_may_differ_by_tf32_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where folding changes the factors that TF32 rounds, and engines the order."""
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)]
    network = nn.Sequential(*layers).eval()
    near = Engine("pytorch", "", lambda net, _: lambda x: net(x) * 1.001)
    for module in (choosing, engines):
        monkeypatch.setattr(module, "ENGINES", [near])
    images = torch.randn(2, 3, 9, 9)
    with pytest.raises(ValueError, match="its result is wrong"):
        blnet.optimize(network, example_input=images)
    with multiplying("cpu", conv="tf32"):
        assert blnet.optimize(network, example_input=images).report.engine == "pytorch"


class Apart(nn.Module):
    """Uses a convolution's output beside its BatchNorm, in code that cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        nn.init.normal_(self.part[1].running_mean)
        nn.init.uniform_(self.part[1].running_var, 0.2, 3)

    def forward(self, x: Tensor) -> Tensor:
        raw = self.part[0](x)
        normed = self.part[1](raw)
        if float(x.mean()) > -1e9:
            normed = normed + 0.01 * raw
        return self.part[2](normed)


@pytest.mark.parametrize("allowed", ["ieee", "tf32", "bf16"])
def test_folding_is_held_to_float32_whatever_is_allowed(allowed: str) -> None:
    torch.manual_seed(0)
    network, images = Apart().eval(), torch.randn(2, 3, 16, 16)
    before = torch.get_float32_matmul_precision(), torch.backends.mkldnn.conv.fp32_precision
    with multiplying("cpu", conv=allowed):
        fast = blnet.optimize(network, example_input=images, engine="pytorch")
    assert any(isinstance(part, nn.BatchNorm2d) for part in fast.modules()), "it is not folded"
    after = torch.get_float32_matmul_precision(), torch.backends.mkldnn.conv.fp32_precision
    assert after == before


def states() -> dict[str, str]:
    backends: Any = torch.backends
    units = {"cudnn.conv": backends.cudnn.conv, "cudnn.rnn": backends.cudnn.rnn,
             "matmul": backends.cuda.matmul, "mkldnn.conv": backends.mkldnn.conv,
             "mkldnn.matmul": backends.mkldnn.matmul}  # fmt: skip
    return {name: unit.fp32_precision for name, unit in units.items()}


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_exact_products_leave_settings_as_they_were(precision: str) -> None:
    first = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        before, convolutions = states(), torch.backends.cudnn.allow_tf32
        with exact_products():
            assert not torch.backends.cudnn.allow_tf32
            assert set(states().values()) == {"ieee"}
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32, "PyTorch's two settings agree"
        assert states() == before
        assert torch.backends.cudnn.allow_tf32 is convolutions is True
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(first)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_pytorchs_newer_settings_are_taken_as_they_are(precision: str) -> None:
    """Where they say otherwise than the older one, PyTorch refuses to tell that."""
    images = torch.randn(2, 3, 9, 9)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(392, 3))
    with multiplying("cuda", matmul=precision, conv="ieee"):
        before = states()
        fast = blnet.optimize(network.eval(), example_input=images, engine="pytorch")
        assert states() == before
    assert difference(fast(images), network(images).detach()) < 1e-5


class Cancelling(nn.Module):
    """Digits that 16 bits do not keep are all that is left."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(self.conv(x)) + 40) - 40


def test_an_engine_may_be_as_far_off_in_16_bits_as_pytorch(monkeypatch) -> None:
    x, factor = torch.rand(2, 3, 9, 9), [1.0]

    def build(network: nn.Module, inputs: Any) -> Any:
        return lambda given: factor[0] * network(given)

    fake = Engine("fake", "", build, dtypes=(torch.float32, torch.bfloat16))
    monkeypatch.setattr(engines, "ENGINES", (fake,))
    monkeypatch.setattr(choosing, "ENGINES", (fake,))
    torch.manual_seed(0)
    model = Cancelling().eval()
    with torch.no_grad():
        own = difference(copy.deepcopy(model).bfloat16()(x.bfloat16()), model(x))
    assert TOLERANCES[torch.bfloat16] < own < 0.25
    fast = blnet.optimize(model, example_input=x, precision="bfloat16")
    assert fast.report.engine == "fake"
    factor[0] = 3.0
    with pytest.raises(ValueError, match="fake: dropped, its result is wrong"):
        blnet.optimize(model, example_input=x, precision="bfloat16")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_in_16_bits_is_folded_in_float32(dtype: torch.dtype) -> None:
    """Folded weights are rounded once, and only once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    with torch.no_grad():
        model[1].running_var.uniform_(0.01, 2)
        model[1].weight.uniform_(0.5, 2)
    narrow = model.to(dtype)
    x = torch.randn(2, 3, 9, 9)
    ours = blnet.optimize(narrow, example_input=x.to(dtype), engine="pytorch")
    wide = blnet.optimize(copy.deepcopy(narrow).float(), example_input=x, engine="pytorch")
    folded, exact = (dict(net.network.named_parameters()) for net in (ours, wide))
    assert folded.keys() == exact.keys()
    assert all(torch.equal(folded[name], exact[name].to(dtype)) for name in exact)
    assert not any("norm" in name or name.startswith("1.") for name in folded)


def test_rounding_to_16_bits_takes_no_folding_back(monkeypatch) -> None:
    monkeypatch.setitem(TOLERANCES, torch.bfloat16, 1e-6)  # as where many layers' rounding adds up
    torch.manual_seed(0)
    model = Cancelling().eval()
    model.norm.running_var.uniform_(0.5, 2)
    x = torch.rand(2, 3, 9, 9).bfloat16()
    fast = blnet.optimize(model.bfloat16(), example_input=x, engine="pytorch")
    assert [(change.layer, change.reason) for change in fast.report.changes] == [("norm", "")]


def test_a_folding_that_is_a_little_wrong_is_taken_back_in_16_bits(monkeypatch) -> None:
    def fold(network: nn.Module, checked: bool = True) -> list[Change]:
        with torch.no_grad():
            network[0].weight *= 1.01
        return [Change("1", "BatchNorm2d", "0")]

    module = importlib.import_module("blnet.optimizing.optimize")
    monkeypatch.setattr(module, "fold_batch_norms", fold)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval().bfloat16()
    x = torch.randn(2, 3, 9, 9).bfloat16()
    fast = blnet.optimize(model, example_input=x, engine="pytorch")
    (change,) = fast.report.changes
    assert change.reason.startswith("folding changed the result")
    assert torch.equal(fast.network[0].weight, model[0].weight)


def test_layers_in_float32_of_a_network_in_16_bits_stay_so() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3).bfloat16(), nn.BatchNorm2d(8).bfloat16()
            self.gain = nn.Parameter(torch.ones(8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return (self.norm(self.conv(x)) * self.gain).bfloat16()

    x = torch.randn(2, 3, 9, 9).bfloat16()
    fast = blnet.optimize(Mixed().eval(), example_input=x, engine="pytorch")
    assert fast.network.gain.dtype is torch.float32
