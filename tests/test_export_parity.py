"""How far a file is from its network, and of which networks that can be measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import blnet
from blnet.exporting.formats import FORMATS
from blnet.exporting.parity import _relative_error
from blnet.optimizing.choosing import difference


def test_zero_outputs_must_be_exactly_zero() -> None:
    zero, tiny = torch.zeros(2, 3), torch.full((2, 3), 1e-9)
    assert _relative_error((zero,), (zero,)) == 0
    assert _relative_error((tiny,), (zero,)) > 1


def test_values_that_are_not_finite_must_be_the_same() -> None:
    right = torch.tensor([1.0, -torch.inf, torch.nan])
    assert _relative_error((right.clone(),), (right,)) == 0
    for index, value in ((0, torch.nan), (1, torch.inf), (1, 0.0), (2, 0.0)):
        wrong = right.clone()
        wrong[index] = value
        assert not _relative_error((wrong,), (right,)) < 1


@pytest.mark.parametrize("part", [1, 1j])
def test_complex_results_are_compared_by_both_parts(part: complex) -> None:
    right = torch.randn(5, dtype=torch.complex64)
    assert _relative_error((right.clone(),), (right,)) == difference(right.clone(), right) == 0
    for wrong in (right + part, right.conj() * part, right.real, right.imag):
        assert _relative_error((wrong,), (right,)) > 0.1
        assert difference(wrong, right) > 0.1
    right[0] = complex(torch.nan, torch.inf)
    assert _relative_error((right.clone(),), (right,)) == 0
    wrong = right.clone()
    wrong[0] = complex(torch.nan, -torch.inf)
    assert _relative_error((wrong,), (right,)) == torch.inf


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [([20001], [20000]), ([2**53 + 1], [2**53]), ([True, True], [True, False])],
)
def test_integers_must_be_the_same(ours: list[int], theirs: list[int]) -> None:
    right = torch.tensor(theirs)
    assert _relative_error((torch.tensor(theirs),), (right,)) == 0
    assert _relative_error((torch.tensor(ours),), (right,)) == torch.inf


def test_zeros_of_either_sign_and_empty_results_are_equal() -> None:
    assert _relative_error((torch.tensor([-0.0]),), (torch.tensor([0.0]),)) == 0
    for kind in (torch.float32, torch.complex64, torch.int64):
        empty: Tensor = torch.empty(2, 0, dtype=kind)
        assert _relative_error((empty,), (empty.clone(),)) == 0
        assert _relative_error((empty,), (torch.empty(3, 0, dtype=kind),)) == torch.inf


class Asserting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.shape[2] == 64, "64 x 64 pixels")
        return 2 * x


class Shifting(nn.Module):
    """A network that normalises its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        return x.mean((2, 3))


def test_a_network_that_asserts_its_size_is_said_to_be_fixed(tmp_path: Path) -> None:
    done = blnet.export(Asserting(), tmp_path / "n.pt", "torch", torch.empty(1, 3, 64, 64))
    assert not done.dynamic


@pytest.mark.parametrize("format", FORMATS)
def test_a_network_that_changes_its_input(tmp_path: Path, format: str) -> None:
    for package in FORMATS[format].packages:
        pytest.importorskip(package)
    path = tmp_path / f"n{FORMATS[format].suffix}"
    done = blnet.export(Shifting(), path, format, torch.empty(1, 3, 32, 32))
    assert len(done.parity.shapes) == 4
