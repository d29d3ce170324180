"""Variation in training: what each setting does, drawn from torch's generator and nothing else."""

import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from blnet.vision.augment import Mix, training_transform
from blnet.vision.config import AugmentConfig
from blnet.vision.preprocessing import IMAGENET, Preprocessing

SMALL = Preprocessing(16, 1.0, 3, (0.5, 0.25, 0.75), (0.2, 0.2, 0.2))
GREY = Preprocessing(8, 1.0, 1, (0.3,), (0.4,))
EVERYTHING = AugmentConfig(
    crop="resized", flip=0.5, rotation=10, color_jitter=0.4, randaugment_ops=2, erasing=0.5
)


def picture(width=16, height=16, seed=0):
    pixels = np.random.RandomState(seed).randint(1, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def drawn(augment, image, own=SMALL, count=40):
    """Return what some seeds make of a picture."""
    transform = training_transform(augment, own)
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        found.append(transform(image))
    return found


# One by one ------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["none", "padded", "resized"])
@pytest.mark.parametrize("own", [SMALL, GREY, IMAGENET], ids=["small", "grey", "imagenet"])
@pytest.mark.parametrize("size", [(16, 16), (70, 40), (9, 30)])
def test_any_picture_gets_the_size_wanted(crop, own, size):
    found = training_transform(replace(EVERYTHING, crop=crop), own)(picture(*size))
    assert found.shape == (own.channels, own.size, own.size)
    assert found.dtype == torch.uint8
    assert type(found) is torch.Tensor


def test_without_settings_training_sees_what_evaluation_sees():
    image = picture(300, 280)
    assert torch.equal(training_transform(AugmentConfig(), IMAGENET)(image), IMAGENET(image))


@pytest.mark.parametrize("kind", ["RGBA", "P", "L", "CMYK"])
def test_any_mode_is_taken(kind):
    found = training_transform(EVERYTHING, SMALL)(picture().convert(kind))
    assert found.shape == (3, 16, 16)


def test_draws_come_from_torch_alone():
    transform = training_transform(EVERYTHING, SMALL)
    found = []
    for other in (1, 2):
        random.seed(other)
        np.random.seed(other)
        torch.manual_seed(7)
        found.append(transform(picture()))
    assert torch.equal(*found)
    assert len({tuple(x.flatten().tolist()) for x in drawn(EVERYTHING, picture())}) == 40


def test_it_survives_pickling():
    transform = training_transform(EVERYTHING, SMALL)
    again = pickle.loads(pickle.dumps(transform))
    torch.manual_seed(3)
    expected = transform(picture())
    torch.manual_seed(3)
    assert torch.equal(again(picture()), expected)


def test_padded_crops_move_the_picture_by_an_eighth_at_most():
    image = picture()
    whole = SMALL(image)
    shifts = set()
    for found in drawn(AugmentConfig(crop="padded"), image, count=200):
        padded = torch.nn.functional.pad(whole, (2, 2, 2, 2))
        fits = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if torch.equal(padded[:, y : y + 16, x : x + 16], found)
        ]
        assert len(fits) == 1, "neither a shift nor black at the edge"
        shifts.add(fits[0])
    assert len(shifts) == 25


def test_flips_as_often_as_asked():
    image = picture()
    plain = SMALL(image)
    assert all(torch.equal(x, plain.flip(-1)) for x in drawn(AugmentConfig(flip=1), image))
    flipped = sum(torch.equal(x, plain.flip(-1)) for x in drawn(AugmentConfig(flip=0.5), image))
    assert 10 < flipped < 30


def test_resized_crops_keep_to_their_smallest_share():
    """On a ramp from left to right the range of values tells how wide the crop was."""
    ramp = np.tile(np.arange(0, 256, dtype=np.uint8), (256, 1))
    spans = {}
    for least in (0.08, 0.9):
        settings = AugmentConfig(crop="resized", scale_min=least)
        crops = drawn(settings, Image.fromarray(ramp), own=GREY)
        spans[least] = [int(x.max()) - int(x.min()) for x in crops]
    assert min(spans[0.08]) < 128  # half the width; a quarter of the area
    assert min(spans[0.9]) > 180


@pytest.mark.parametrize(
    "augment",
    [AugmentConfig(rotation=10), AugmentConfig(color_jitter=0.4), AugmentConfig(randaugment_ops=2)],
    ids=["rotation", "jitter", "randaugment"],
)
def test_each_setting_changes_pictures(augment):
    image = picture(20, 20)
    same = sum(torch.equal(x, SMALL(image)) for x in drawn(augment, image))
    assert same < 10


def test_rotation_turns_by_as_much_as_asked():
    """A bright line through the middle ends where the angle says."""
    line = np.zeros((101, 101, 3), np.uint8)
    line[49:52] = 255
    own = Preprocessing(101, 1.0, 3, IMAGENET.mean, IMAGENET.std)
    heights = []
    for x in drawn(AugmentConfig(rotation=10), Image.fromarray(line), own=own):
        heights.append(abs(int(x[0, :, 95].argmax()) - 50))
    assert 4 < max(heights) <= round(46 * np.tan(np.radians(10))) + 2


def test_erased_pixels_have_the_mean():
    white = Image.new("RGB", (16, 16), (255, 255, 255))
    for found in drawn(AugmentConfig(erasing=1), white, count=10):
        erased = (found != 255).any(0)
        assert 0 < erased.sum() < 16 * 16 / 2
        assert found[:, erased].unique(dim=1).flatten().tolist() == [128, 64, 191]


def test_strips_are_refused_before_they_fill_the_memory():
    transform = training_transform(AugmentConfig(crop="padded"), IMAGENET)
    with pytest.raises(ValueError, match="too narrow"):
        transform(Image.new("RGB", (1, 30_000)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop", "big"), ("scale_min", 0), ("scale_min", float("nan")), ("flip", 1.5),
        ("rotation", -1), ("rotation", 181), ("color_jitter", float("inf")), ("erasing", 2),
        ("randaugment_ops", -1), ("randaugment_magnitude", 31), ("mixup", -0.1),
        ("cutmix", float("nan")), ("mix_probability", 1.01),
    ],
)  # fmt: skip
def test_a_setting_without_meaning_is_named(field, value):
    flag = f"--augment.{field.replace('_', '-')}"
    with pytest.raises(ValueError, match=flag) as error:
        training_transform(AugmentConfig(**{field: value}), SMALL)
    assert "\n" not in str(error.value)


# Mixed within a batch --------------------------------------------------------------------------


def batch(count=6, classes=4):
    """Return images of which each has its own constant value, so that shares can be read off."""
    values = torch.arange(count, dtype=torch.float32) + 1
    return values[:, None, None, None].expand(count, 3, 8, 8).clone(), torch.arange(count) % classes


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 1, "cutmix": 1}])
def test_the_labels_say_what_is_in_the_images(settings):
    images, labels = batch()
    mix = Mix(AugmentConfig(**settings), 4)
    torch.manual_seed(0)
    for _ in range(20):
        mixed, shares = mix(images.clone(), labels)
        assert mixed.shape == images.shape
        assert shares.shape == (6, 4)
        assert shares.dtype == torch.float32
        torch.testing.assert_close(shares.sum(1), torch.ones(6))
        # Each image is mixed with the one before it; the mean tells how much of it there is.
        other = images.roll(1, 0)
        share = ((mixed - other) / (images - other)).mean((1, 2, 3))
        expected = torch.zeros(6, 4)
        expected[torch.arange(6), labels] += share
        expected[torch.arange(6), labels.roll(1)] += 1 - share
        torch.testing.assert_close(shares, expected, rtol=0, atol=1e-5)


def test_mixup_blends_and_cutmix_pastes():
    images, labels = batch()
    torch.manual_seed(1)
    blended, _ = Mix(AugmentConfig(mixup=1.0), 4)(images, labels)
    assert all(len(image.unique()) == 1 for image in blended)
    assert not torch.equal(blended, images)
    counts = set()
    for _ in range(20):
        pasted, _ = Mix(AugmentConfig(cutmix=1.0), 4)(images, labels)
        counts |= {len(image.unique()) for image in pasted}
        assert set(pasted.unique().tolist()) <= set(images.unique().tolist())
    assert 2 in counts


def test_with_both_on_each_batch_gets_one():
    images, labels = batch()
    torch.manual_seed(0)
    mix = Mix(AugmentConfig(mixup=1.0, cutmix=1.0), 4)
    kinds = {len(mix(images, labels)[0][0].unique()) for _ in range(40)}
    new = {float(mix(images, labels)[0][0, 0, 0, 0]) % 1 == 0 for _ in range(40)}
    assert kinds == {1, 2}
    assert new == {True, False}


@pytest.mark.parametrize(("probability", "low", "high"), [(0, 0, 0), (0.5, 20, 60), (1, 80, 80)])
def test_as_many_batches_are_mixed_as_asked(probability, low, high):
    images, labels = batch()
    mix = Mix(AugmentConfig(mixup=1.0, mix_probability=probability), 4)
    torch.manual_seed(0)
    mixed = sum(not torch.equal(mix(images, labels)[0], images) for _ in range(80))
    assert low <= mixed <= high


def test_without_mixing_labels_are_whole():
    images, labels = batch()
    found, shares = Mix(AugmentConfig(), 5)(images, labels)
    assert torch.equal(found, images)
    assert torch.equal(shares.argmax(1), labels)
    assert shares.shape == (6, 5)
    assert shares.max(1).values.tolist() == [1.0] * 6


def test_mixing_is_governed_by_torchs_seed_alone():
    images, labels = batch()
    mix = Mix(AugmentConfig(mixup=1.0, cutmix=1.0, mix_probability=0.8), 4)
    found = []
    for other in (1, 2):
        random.seed(other)
        np.random.seed(other)
        torch.manual_seed(5)
        found.append([mix(images, labels)[0] for _ in range(5)])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
