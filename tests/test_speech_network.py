"""bL-ResNet-22: its plan, its lengths, and that padding changes nothing."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import blnet
from blnet import registry
from blnet.speech import SpeechNet, SpeechNetConfig, bl_resnet22, resnet22
from blnet.speech.masking import FrameMask, halved, reduced

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"branches": 1},
    "two branches": {},
    "three branches": {"branches": 3, "alpha": 2},
    "pyramid": {"pyramid": True},
    "plain pyramid": {"branches": 1, "pyramid": True},
}


def tiny(**options: Any) -> SpeechNet:
    """Return a narrow network whose every parameter and statistic has its effect, in float64."""
    torch.manual_seed(0)
    model = bl_resnet22(**{"width": 0.25, "bins": 20, "num_classes": 3, **options})
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms start as nothing, or as the identity
            nn.init.normal_(parameter, std=0.3)
    nn.init.normal_(model.fc.weight, std=0.1)  # starts at zero
    model.train()
    with torch.no_grad():
        model(torch.randn(4, model.config.in_channels, model.config.bins, 33))
    return model.eval().double()


def convolutions(model: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1) for m in model.modules())


def test_the_plan_has_22_layers() -> None:
    model = resnet22()
    assert convolutions(model) == 1 + 2 * 10
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 1
    # One convolution, ten blocks of two and one linear layer: 22.
    assert sum(model.config.depths) == 10


def test_parameters_and_macs_are_those_that_follow_from_the_plan() -> None:
    # Counted by hand from the plan: 9 in out weights a 3x3 convolution, 2 out a norm.
    def conv(inner: int, out: int, kernel: int = 3) -> int:
        return kernel * kernel * inner * out + 2 * out

    plain = conv(3, 64) + 4 * conv(64, 64)
    plain += conv(64, 128) + conv(64, 128, 1) + 11 * conv(128, 128)
    plain += conv(128, 192) + conv(128, 192, 1) + 3 * conv(192, 192)
    model = resnet22(in_channels=3, num_classes=7)
    found = blnet.profile(model, (1, 3, 64, 100))
    assert found.parameters == plain + 192 * 8 * 7 + 7
    assert abs(plain / 3.02e6 - 1) < 0.05  # what the paper reports, within 5 %
    # Bands 64 -> 32 -> 16 -> 8, 100 frames.
    macs = 3200 * 9 * 3 * 64 + 3200 * 4 * 9 * 64 * 64
    macs += 1600 * (9 * 64 * 128 + 64 * 128 + 11 * 9 * 128 * 128)
    macs += 800 * (9 * 128 * 192 + 128 * 192 + 3 * 9 * 192 * 192)
    assert found.macs == macs + 192 * 8 * 7


def test_big_little_saves_more_than_a_third_of_the_macs() -> None:
    plain = blnet.profile(resnet22(), (1, 1, 64, 100)).macs
    for alpha, beta in ((4, 1), (4, 2), (4, 3), (2, 3)):
        assert blnet.profile(bl_resnet22(alpha, beta), (1, 1, 64, 100)).macs < 0.6 * plain


@pytest.mark.parametrize("bins", [8, 63, 64, 80, 20])
def test_a_pyramid_is_brought_to_the_last_bands_by_their_means(bins: int) -> None:
    model = tiny(pyramid=True, bins=bins)
    x = torch.randn(2, 1, bins, 9, dtype=torch.float64)
    fine: list[torch.Tensor] = []
    assert model.pyramid is not None
    model.pyramid.register_forward_hook(lambda _, __, out: fine.append(out))
    found = model.forward_features(x).unflatten(1, (-1, model.config.bands))
    expected = nn.functional.adaptive_avg_pool2d(fine[0], (model.config.bands, None))
    torch.testing.assert_close(found[:, -expected.shape[1] :], expected, rtol=1e-12, atol=1e-14)
    # On a GPU the gradient of an adaptive pool is refused where all is to be deterministic.
    assert ("AdaptiveAvgPool2DBackward0" in gradient_steps(found)) == (bins == 20)


def gradient_steps(out: torch.Tensor) -> set[str]:
    seen: set[Any] = set()
    new = [out.grad_fn]
    while new:
        step = new.pop()
        if step is not None and step not in seen:
            seen.add(step)
            new += [before for before, _ in step.next_functions]
    return {step.name() for step in seen}


def test_settings_make_different_networks() -> None:
    counts = {
        blnet.profile(bl_resnet22(alpha, beta, pyramid=pyramid), (1, 1, 64, 40)).parameters
        for alpha, beta, pyramid in ((4, 1, 0), (4, 2, 0), (4, 3, 0), (2, 3, 0), (4, 1, 1))
    }
    assert len(counts) == 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", [1, 2, 4])
@pytest.mark.parametrize("head", ["keyword", "ctc"])
def test_padding_changes_nothing(kind: str, reduction: int, head: str) -> None:
    model = tiny(**KINDS[kind], time_reduction=reduction, head=head)
    lengths = [29, 1, 2, 3, 7, 16, 24]
    alone = [torch.randn(1, 1, 20, length, dtype=torch.float64) for length in lengths]
    padded = 100 * torch.randn(len(lengths), 1, 20, 34, dtype=torch.float64)  # any rubbish
    for row, x in zip(padded, alone, strict=True):
        row[..., : x.shape[-1]] = x[0]
    with torch.no_grad():
        together = model(padded, torch.tensor(lengths))
        for row, x in zip(together, alone, strict=True):
            expected = model(x)[0]
            found = row if head == "keyword" else row[: len(expected)]
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    more=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_padding_changes_nothing_whatever_the_batch(
    lengths: list[int], more: int, seed: int
) -> None:
    model = MODELS.setdefault("one", tiny(time_reduction=2, head="ctc"))
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + more
    x = torch.randn(len(lengths), 1, 20, width, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        together = model(x, torch.tensor(lengths))
        for place, length in enumerate(lengths):
            expected = model(x[place : place + 1, ..., :length])[0]
            assert len(expected) == int(model.output_lengths(torch.tensor(length)))
            torch.testing.assert_close(together[place, : len(expected)], expected)


MODELS: dict[str, SpeechNet] = {}


@pytest.mark.parametrize("reduction", [1, 2, 4])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 9, 40])
def test_lengths_are_those_of_the_answer(reduction: int, frames: int) -> None:
    model = bl_resnet22(time_reduction=reduction, head="frame", width=0.25, num_classes=5).eval()
    out = model(torch.zeros(2, 1, 64, frames))
    assert out.shape == (2, -(-frames // reduction), 5)
    assert model.output_lengths(torch.tensor([frames])).tolist() == [out.shape[1]]


def test_halving_rounds_up() -> None:
    lengths = torch.tensor([1, 2, 3, 4, 5, 8, 9])
    assert halved(lengths).tolist() == [1, 1, 2, 2, 3, 4, 5]
    assert reduced(lengths, 4).tolist() == [1, 1, 1, 1, 2, 2, 3]
    assert reduced(lengths, 1) is lengths


def test_no_mask_outlives_a_batch() -> None:
    model = tiny(head="ctc")
    x = torch.randn(1, 1, 20, 12, dtype=torch.float64)
    before = model(x)
    model(x, torch.tensor([3]))
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    with pytest.raises(RuntimeError):
        model(x.float(), torch.tensor([3]))  # fails inside: weights are float64
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_a_mask_of_their_own(twin: Any) -> None:
    model = tiny(head="ctc")
    other = twin(model)
    x = torch.randn(2, 1, 20, 12, dtype=torch.float64)
    lengths = torch.tensor([12, 5])
    expected = model(x, lengths)
    torch.testing.assert_close(other(x, lengths), expected, rtol=0, atol=0)
    model._mask.set(torch.tensor([1, 1]), 12, 1)  # of the first alone
    torch.testing.assert_close(other(x, lengths), expected, rtol=0, atol=0)


def test_layers_of_one_frame_are_not_watched() -> None:
    watched = nn.Sequential(
        nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, (3, 1)), nn.Conv2d(1, 1, (1, 3)), nn.AvgPool2d(3)
    )
    FrameMask().watch(watched)
    assert [len(layer._forward_pre_hooks) for layer in watched] == [0, 0, 1, 1]


def test_the_first_answers_are_even() -> None:
    out = bl_resnet22(width=0.25, head="ctc", num_classes=5)(torch.randn(2, 1, 64, 9))
    assert not out.any()


def test_it_trains_in_a_padded_batch() -> None:
    model = bl_resnet22(width=0.25, num_classes=2, time_reduction=4).train()
    x = torch.randn(8, 1, 64, 50)
    x[:4, :, 10:20] += 2
    lengths = torch.tensor([50, 40, 30, 20] * 2)
    labels = torch.tensor([0] * 4 + [1] * 4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(x, lengths), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(p.grad is not None for p in model.parameters())


def test_fused_training_ops_are_found_in_it() -> None:
    model = tiny(head="ctc")
    fused = blnet.fuse(model)
    merges = [site for site in blnet.fusions(fused) if site.merge and not site.reason]
    assert len(merges) == 2  # the little branch's end in both Big-Little modules
    x = torch.randn(2, 1, 20, 12, dtype=torch.float64)
    lengths = torch.tensor([12, 5])
    expected = model(x, lengths)
    found = fused(x, lengths)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1, :5], expected[1, :5])


@pytest.mark.parametrize("channels_last", [False, True])
def test_compiled_it_computes_the_same(channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = tiny(time_reduction=2).to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(2, 1, 20, 12, dtype=torch.float64)
    lengths = torch.tensor([12, 5])
    fast = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(fast(x, lengths), model(x, lengths))
        torch.testing.assert_close(fast(x), model(x))


def test_networks_are_known_by_name() -> None:
    assert registry.is_big_little("bl_resnet22")
    assert not registry.is_big_little("resnet22")
    model = registry.build("bl_resnet22", alpha=2, beta=3, num_classes=4, width=0.5)
    assert isinstance(model, SpeechNet)
    assert model.config.widths == (32, 64, 96)
    assert model.config.alpha == 2
    plain = registry.build("resnet22", num_classes=4)
    assert isinstance(plain, SpeechNet)
    assert plain.config.branches == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"alpha": 3}, "alpha 3 with 2 branches divides a width of 64"),
        ({"beta": 0}, "beta must be a whole number of at least 1"),
        ({"branches": True}, "branches must be a whole number"),
        ({"time_reduction": 3}, "time_reduction must be one of 1, 2, 4, got 3"),
        ({"head": "words"}, "head must be one of keyword, ctc, frame, got 'words'"),
        ({"num_classes": 0}, "num_classes must be a whole number of at least 1"),
        ({"bins": 0}, "bins must be a whole number of at least 1"),
        ({"width": 0}, "width must be above 0"),
    ],
)
def test_settings_that_make_no_network(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        bl_resnet22(**options)


def test_a_plan_of_unequal_length() -> None:
    with pytest.raises(ValueError, match="depths and widths must name the same two or more"):
        SpeechNetConfig(depths=(2, 2), widths=(8, 8, 8))


@pytest.mark.parametrize("shape", [(2, 1, 63, 9), (2, 3, 64, 9), (1, 64, 9)])
def test_maps_of_other_features(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x must be \(N, 1, 64, frames\), got shape"):
        resnet22(width=0.25)(torch.zeros(shape))


def test_lengths_of_another_batch() -> None:
    with pytest.raises(ValueError, match="lengths must be one number for each of 2 recordings"):
        resnet22(width=0.25)(torch.zeros(2, 1, 64, 9), torch.tensor([9]))
