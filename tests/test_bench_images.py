"""Pictures as input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from blnet.bench.images import folder_pictures, load_pictures, make_batch, sample_pictures


def save(path, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> None:
    Image.new(mode, size, 200).save(path)


def test_sample_photographs_make_a_varied_normalised_batch() -> None:
    pictures = sample_pictures()
    assert [p.size for p in pictures] == [(640, 427), (640, 427)]
    batch = make_batch(pictures, 6, 48, seed=3)
    assert batch.shape == (6, 3, 48, 48)
    assert batch.dtype == torch.float32
    assert batch.is_contiguous()
    assert -2.2 < batch.min() < -0.5 < 0.5 < batch.max() < 2.7
    for i in range(6):
        for j in range(i):
            assert not torch.equal(batch[i], batch[j])


def test_a_crop_depends_on_seed_and_place_only() -> None:
    pictures = sample_pictures()
    batch = make_batch(pictures, 4, 32, seed=5)
    assert torch.equal(make_batch(pictures, 2, 32, seed=5), batch[:2])
    assert not torch.equal(make_batch(pictures, 4, 32, seed=6), batch)


def test_a_folder_is_read_by_name_with_sub_folders_and_grey_pictures(tmp_path) -> None:
    save(tmp_path / "b.png", "L")
    save(tmp_path / "a.JPG", size=(20, 50))
    (tmp_path / "more").mkdir()
    save(tmp_path / "more" / "c.png", "RGBA")
    (tmp_path / "notes.txt").write_text("not a picture")
    pictures = folder_pictures(tmp_path)
    assert [p.size for p in pictures] == [(20, 50), (40, 30), (40, 30)]
    assert {p.mode for p in pictures} == {"RGB"}
    assert make_batch(load_pictures(tmp_path), 5, 16).shape == (5, 3, 16, 16)


def test_pixels_are_normalised_with_imagenets_statistics() -> None:
    grey = Image.fromarray(np.full((8, 8, 3), 128, dtype=np.uint8))
    red = make_batch([grey], 1, 8)[0, 0]
    assert red.unique().item() == pytest.approx((128 / 255 - 0.485) / 0.229, rel=1e-5)


def test_an_unreadable_picture_is_named(tmp_path) -> None:
    save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with pytest.warns(UserWarning, match=r"1 of 2 pictures .* bad\.png"):
        assert len(folder_pictures(tmp_path)) == 1


def test_bad_folders(tmp_path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        folder_pictures(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no pictures"):
        folder_pictures(tmp_path)
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"cannot be read: bad\.png"):
        folder_pictures(tmp_path)


def test_bad_batches() -> None:
    with pytest.raises(ValueError, match="one picture"):
        make_batch([], 1)
    with pytest.raises(ValueError, match="at least 1"):
        make_batch(sample_pictures(), 0)
