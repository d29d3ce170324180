"""What `blnet.optimize` does not take, and what its result does not follow: one sentence each."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import blnet
from blnet.optimizing.choosing import difference
from blnet.vision.models import bl_resnet18


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return bl_resnet18(alpha=2, beta=4, num_classes=10).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 33, 47, generator=torch.Generator().manual_seed(0))


REFUSED = {
    "given other weights": lambda fast: nn.Sequential(fast).load_state_dict(
        nn.Sequential(fast).state_dict()
    ),
    "trained": lambda fast: fast.train(),
    "moved": lambda fast: fast.double(),
    "copied": copy.deepcopy,
    "pickled": pickle.dumps,
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_an_engine_cannot_follow_is_refused(what, model) -> None:
    fast = blnet.optimize(model)
    assert fast.eval() is fast
    with pytest.raises(ValueError, match=what):
        REFUSED[what](fast)


IMAGE = torch.randn(1, 3, 32, 32)
BAD = [
    ({"mode": "fast"}, "mode must be one of inference, train"),
    (
        {"engine": "tvm", "example_input": IMAGE},
        "engine must be one of 'auto', 'pytorch', .*'compile', 'kernels, compile', got 'tvm'",
    ),
    ({"precision": "int8"}, "precision must be one of float32, float16, bfloat16"),
    ({"graph": "yes"}, "graph must be one of"),
    ({"other_inputs": "guess"}, "other_inputs must be one of"),
    ({"example_input": "x"}, "example_input must be a tensor"),
    ({"example_input": 5}, "example_input must be a tensor or several, got 5; give"),
    ({"example_input": torch.randn(1, 4, 32, 32)}, "does not take the example_input of shape"),
    ({"example_input": IMAGE.to("meta")}, "put both on the device"),
    ({"engine": "pytorch"}, "give example_input"),
    ({"graph": True, "example_input": IMAGE}, "needs a CUDA device"),
    ({"recompute": True}, "are for mode='train'"),
    ({"seconds": 0}, "seconds must be a number above 0"),
    ({"seconds": "60"}, "seconds must be a number above 0"),
    ({"mode": "train", "graph": True}, "are for mode='inference'"),
    ({"mode": "train", "other_inputs": "error"}, "are for mode='inference'"),
    ({"mode": "train", "seconds": 5}, "are for mode='inference'"),
    ({"mode": "train", "say": print}, "are for mode='inference'"),
    ({"mode": "train", "without": 5}, "without must be names"),
    ({"mode": "train", "precision": "bfloat16"}, "are for mode='inference'"),
    ({"engine": "tensorrt", "example_input": IMAGE}, "does not run on cpu"),
    (
        {"engine": "native", "example_input": IMAGE, "precision": "bfloat16"},
        "computes in float32 only",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments_are_one_sentence(arguments, message, model) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        blnet.optimize(model, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", [
    blnet.optimize, lambda net: blnet.optimize(net, mode="train"), blnet.fuse, blnet.unfuse,
    lambda net: blnet.optimize(net, example_input=torch.randn(1, 3, 8, 8)),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_network_that_cannot_be_copied_is_refused(call) -> None:
    net = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)))
    with pytest.raises(ValueError, match=r"^Sequential cannot be copied \(.*give a network that"):
        call(net)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_refused_whole_and_left_inside(images) -> None:
    parts = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())).eval()
    scripted = torch.jit.script(parts)
    with pytest.raises(ValueError, match="is of TorchScript, whose layers cannot be exchanged"):
        blnet.optimize(scripted)
    network = nn.Sequential(scripted, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).eval()
    fast = blnet.optimize(network)
    assert difference(fast(images), network(images).detach()) < 1e-5


@pytest.mark.parametrize("mode", ["inference", "train"])
def test_what_is_no_network_is_refused(mode) -> None:
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Module, got NoneType"):
        blnet.optimize(None, mode=mode)


def test_a_network_that_returns_no_tensor_is_refused(images) -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(ValueError, match="returns a tuple"):
        blnet.optimize(Pair(), example_input=images)
