"""What a picture becomes before a network sees it: torchvision's own result, to the byte."""

import io
import json
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms as torchvision_transforms
from torchvision.transforms import v2

from blnet.vision.preprocessing import IMAGENET, LARGEST_SIDE, Preprocessing

GREY = Preprocessing(8, 1.0, 1, (0.3,), (0.4,))


def picture(width, height, mode="RGB", seed=0):
    """Return a picture of noise: every pixel shows where it went."""
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    pixels = np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image, kind, **options):
    """Return what a file gives back."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


# Against torchvision ---------------------------------------------------------------------------


# A photograph, upright, too small, nothing to crop on one side, exact, a strip.
@pytest.mark.parametrize(
    "shape", [(500, 375), (375, 500), (100, 90), (257, 1000), (256, 256), (3, 700)]
)
def test_the_paper_evaluates_as_torchvision_does(shape):
    reference = torchvision_transforms.Compose(
        [
            torchvision_transforms.Resize(256),
            torchvision_transforms.CenterCrop(224),
            torchvision_transforms.PILToTensor(),
        ]
    )
    image = picture(*shape)
    assert IMAGENET.resized == 256
    found = IMAGENET(image)
    assert found.dtype == torch.uint8
    assert torch.equal(found, reference(image))


def test_normalized_as_torchvision_does():
    images = torch.stack([IMAGENET(picture(300, 280, seed=seed)) for seed in range(2)])
    reference = v2.functional.normalize(images.float() / 255, IMAGENET.mean, IMAGENET.std)
    found = IMAGENET.normalize(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, reference, rtol=0, atol=1e-6)


def test_mean_and_deviation_go_to_their_channels():
    own = Preprocessing(1, 1.0, 3, (0.0, 0.5, 1.0), (1.0, 0.5, 0.25))
    white = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    assert own.normalize(white).flatten().tolist() == [1.0, 1.0, 0.0]


@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    size=st.integers(1, 40),
    ratio=st.floats(0.5, 1.0),
    channels=st.sampled_from([1, 3]),
)
def test_any_picture_gets_the_size_wanted(width, height, size, ratio, channels):
    own = Preprocessing(size, ratio, channels, (0.5,) * channels, (0.5,) * channels)
    assert own(picture(width, height)).shape == (channels, size, size)


def test_a_picture_of_the_right_size_stays_as_it_is():
    image = picture(32, 32)
    own = Preprocessing(32, 1.0, 3, IMAGENET.mean, IMAGENET.std)
    assert torch.equal(own(image), torch.from_numpy(np.array(image)).permute(2, 0, 1))


# Modes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
@pytest.mark.parametrize("own", [IMAGENET, GREY], ids=["colour", "grey"])
def test_every_mode_shows_what_was_in_it(mode, own):
    """A picture, dark on the left and bright on the right, still is."""
    grey = np.zeros((64, 64), np.uint8)
    grey[:, 32:] = 255
    image = Image.fromarray(grey)
    image = (
        image.convert("LA").convert("PA") if mode == "PA" else image.convert("RGB").convert(mode)
    )
    assert image.mode == mode
    found = own(image).float()
    assert found[..., : own.size // 4].max() < 20
    assert found[..., -own.size // 4 :].min() > 235


@pytest.mark.parametrize("own", [IMAGENET, GREY], ids=["colour", "grey"])
def test_16_bit_grey_keeps_its_upper_8_bits(own):
    """PIL alone makes everything above 255 white."""
    levels = np.array([[0x0012, 0x1234], [0x8000, 0xFFFF]], np.uint16)
    image = encoded(Image.fromarray(levels), "PNG")
    assert image.mode.startswith("I")
    found = np.asarray(own.convert(image))
    expected = np.array([[0x00, 0x12], [0x80, 0xFF]])
    assert np.array_equal(found if found.ndim == 2 else found[..., 2], expected)
    wide = Image.fromarray(levels.astype(np.int32))  # mode I, as older versions of PIL open it
    assert np.array_equal(np.asarray(own.convert(wide)), found)


def test_transparency_is_dropped_without_a_warning():
    colours = [(200, 100, 50), (10, 20, 30), (40, 50, 60)]
    striped = Image.new("P", (3, 3))
    striped.putpalette([value for colour in colours for value in colour])
    striped.putdata([0, 1, 2] * 3)
    clear = encoded(striped, "PNG", transparency=bytes([10, 128, 255]))
    assert (clear.mode, type(clear.info["transparency"])) == ("P", bytes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = IMAGENET.convert(clear)
    assert [found.getpixel((x, 0)) for x in range(3)] == colours
    clear = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    assert IMAGENET.convert(clear).getpixel((0, 0)) == (200, 100, 50)


def test_exif_orientation_is_ignored_as_torchvision_ignores_it():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image = encoded(picture(60, 40), "JPEG", exif=exif.tobytes())
    assert IMAGENET.convert(image).size == (60, 40)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.new("F", (9, 9)), "floating-point"),
        (Image.new("RGB", (0, 5)), "no pixels"),
        (Image.new("L", (1, 30_000)), "1 x 30000 pixels is too narrow"),
    ],
    ids=["float", "empty", "strip"],
)
def test_what_cannot_be_converted_is_refused(image, words):
    with pytest.raises(ValueError, match=words):
        IMAGENET(image)


# Stored ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [IMAGENET, GREY], ids=["colour", "grey"])
def test_settings_survive_json_and_pickle(own):
    assert Preprocessing.from_dict(json.loads(json.dumps(own.as_dict()))) == own
    assert pickle.loads(pickle.dumps(own)) == own


@pytest.mark.parametrize("name", list(IMAGENET.as_dict()))
def test_a_missing_setting_is_named(name):
    values = IMAGENET.as_dict()
    del values[name]
    with pytest.raises(ValueError, match=f"preprocessing.{name} is missing"):
        Preprocessing.from_dict(values)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", 0), ("size", 1.5), ("size", "224"), ("size", True), ("size", LARGEST_SIDE + 1),
        ("size", 10**400), ("crop_ratio", 0), ("crop_ratio", 1.5), ("crop_ratio", float("nan")),
        ("crop_ratio", "all"), ("channels", 2), ("channels", True), ("channels", None),
        ("mean", [0.5]), ("mean", 0.5), ("mean", ["a", 1, 1]), ("std", [1, 1, 0]),
        ("std", [1, 1, float("inf")]), ("interpolation", "bicubic"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named(name, value):
    with pytest.raises(ValueError, match=f"preprocessing.{name} must be") as error:
        Preprocessing.from_dict({**IMAGENET.as_dict(), name: value})
    assert "\n" not in str(error.value)


def test_a_tiny_crop_cannot_take_all_memory():
    with pytest.raises(ValueError, match="once divided by crop_ratio"):
        replace(IMAGENET, crop_ratio=1e-6)


@pytest.mark.parametrize(
    ("values", "words"),
    [({**IMAGENET.as_dict(), "colour": 1}, "colour is unknown"), ([1], "must be a table")],
)
def test_other_things_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        Preprocessing.from_dict(values)
