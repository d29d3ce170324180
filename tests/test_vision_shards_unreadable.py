"""Shards of which something cannot be read, packed shards, and commands that print them."""

import pytest

from blnet.training.loading import CorruptSample, Loader
from helpers.shards import (
    all_of,
    collate,
    first,
    green,
    number_of,
    pairs,
    stream,
    write_shard,
    write_shards,
)

pytest.importorskip("webdataset", reason="webdataset is not installed")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"x.png": b"no picture", "x.cls": b"1"}, "not a picture"),
        ({"x.png": green(1)[:60], "x.cls": b"1"}, ""),
        ({"x.png": b"", "x.cls": b"1"}, "empty"),
        ({"x.cls": b"1"}, "has no picture"),
        ({"x.png": green(1)}, "not a class from 0 to 6"),
        ({"x.png": green(1), "x.cls": b"7"}, "'7', not a class from 0 to 6"),
        ({"x.png": green(1), "x.cls": b"-1"}, "'-1', not a class"),
        ({"x.png": green(1), "x.cls": b"cat\xff"}, "not a class"),
        ({"x.png": green(1), "x.cls": b"9" * 5000}, "not a class"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_a_sample_that_cannot_be_read_is_told(tmp_path, files, words, training):
    path = write_shard(tmp_path / "a.tar", [*files.items(), *pairs([1, 2])])
    found = first(stream(str(path), training=training, buffer=1), 3)
    corrupt = [sample for sample in found if isinstance(sample, CorruptSample)]
    assert [(sample.name, words in sample.reason) for sample in corrupt] == [(f"{path}/x", True)]
    assert sorted(number_of(sample) for sample in found if sample not in corrupt) == [1, 2]


def test_other_files_and_endings(tmp_path):
    files = [
        ("a/1.JPG", green(0, "JPEG")), ("a/1.cls", b" 3\n"), ("a/1.json", b"{}"),
        ("a/2.jpeg", green(0, "JPEG")), ("a/2.cls", b"4"),
        ("b/1.webp", green(0, "WEBP")), ("b/1.cls", b"5"),
    ]  # fmt: skip
    path = write_shard(tmp_path / "a.tar", files)
    assert [label for _, label in all_of(stream(str(path), training=False))] == [3, 4, 5]


CUTS = [0, 100, 512, 700, 3 * 1024, 3 * 1024 + 200, 4 * 1024]


@pytest.mark.parametrize("left", CUTS)
def test_a_shard_that_breaks_off_is_told_once(tmp_path, left):
    """A pair takes four blocks of 512 bytes; the cuts are in files, headers and between them.

    The last sample before the break is left out, since another of its files may have followed.
    """
    pattern = write_shards(tmp_path, [5, 5])
    broken = tmp_path / "part-0.tar"
    broken.write_bytes(broken.read_bytes()[:left])
    before = max(0, (left - 1) // 2048)
    found = first(stream(pattern, buffer=1), before + 6)  # a pass
    corrupt = [sample for sample in found if isinstance(sample, CorruptSample)]
    assert [sample.name for sample in corrupt] == [str(broken)]
    assert "breaks off or cannot be opened" in corrupt[0].reason
    assert "0x" not in corrupt[0].reason
    assert str(broken) not in corrupt[0].reason  # once is enough
    whole = {number_of(sample) for sample in found if sample not in corrupt}
    assert whole == {*range(before), *range(5, 10)}


@pytest.mark.parametrize("left", CUTS)
@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluation_without_the_rest_of_a_shard_is_none(tmp_path, left, workers):
    """A figure would be of nobody knows how many samples."""
    pattern = write_shards(tmp_path, [5, 5])
    broken = tmp_path / "part-1.tar"
    broken.write_bytes(broken.read_bytes()[:left])
    loader = Loader(stream(pattern, training=False), collate, workers=workers)
    with pytest.raises(ValueError, match=r"part-1.tar: the shard breaks off or") as error:
        list(loader.stream(3, epoch=0))
    assert "\n" not in str(error.value)


def test_a_damaged_header_in_the_midst_is_told(tmp_path):
    """Python's tarfile takes it for the end."""
    path = write_shard(tmp_path / "a.tar", pairs(range(20)))
    content = bytearray(path.read_bytes())
    content[4096 + 2 : 4096 + 5] = b"xyz"
    path.write_bytes(content)
    found = first(stream(str(path), buffer=1), 3)
    (damaged,) = {sample.reason for sample in found if isinstance(sample, CorruptSample)}
    assert "damaged header" in damaged
    with pytest.raises(ValueError, match="damaged header"):
        all_of(stream(str(path), training=False))


def test_a_shard_that_is_gone_meanwhile_is_told(tmp_path):
    part = stream(write_shards(tmp_path, [2, 2]), training=False)
    (tmp_path / "part-0.tar").unlink()
    with pytest.raises(ValueError, match=r"part-0.tar: .*No such file"):
        all_of(part)


@pytest.mark.parametrize("command", ["cat {}; exit 3", "head -c 3000 {}", "false"])
def test_a_command_that_fails_is_told(tmp_path, command):
    write_shards(tmp_path, [3])
    url = "pipe:" + command.format(tmp_path / "part-0.tar")
    part = stream(url, training=False).read(0, 0, 1)
    good = []
    with pytest.raises(ValueError, match="the shard breaks off or cannot be opened") as error:  # noqa: PT012 - it fails after some
        for sample in part:
            good.append(number_of(sample))
    assert str(error.value).startswith(f"--data.path: {url}: ")
    if command.endswith("exit 3"):  # how much is read before the failure is seen, is a race
        assert good == [0, 1, 2][: len(good)]
    else:
        assert good == ([0] if command.startswith("head") else [])


def test_what_a_command_prints_is_read(tmp_path):
    write_shards(tmp_path, [3])
    found = all_of(stream(f"pipe:cat {tmp_path / 'part-0.tar'}", training=False))
    assert [number_of(sample) for sample in found] == [0, 1, 2]


def test_a_command_may_print_more_than_is_needed(tmp_path):
    """Zeros follow the end marker; a command whose output nobody reads would fail."""
    path = write_shard(tmp_path / "a.tar", pairs([1]))
    path.write_bytes(path.read_bytes() + bytes(1_000_000))
    assert [number_of(sample) for sample in all_of(stream(f"pipe:cat {path}", training=False))] == [
        1
    ]


def test_leaving_a_command_early_is_quiet(tmp_path):
    write_shard(tmp_path / "a.tar", pairs(range(200)))
    part = stream(f"pipe:cat {tmp_path / 'a.tar'}", training=False).read(0, 0, 1)
    assert number_of(next(part)) == 0
    part.close()


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_shards(tmp_path, kind):
    path = write_shard(tmp_path / f"a.tar.{kind}", pairs(range(100)), mode=f"w:{kind}")
    assert [number_of(sample) for sample in all_of(stream(str(path), training=False))] == list(
        range(100)
    )
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="the shard breaks off"):
        all_of(stream(str(path), training=False))


@pytest.mark.parametrize("counts", [[0], [0, 0, 0]])
def test_shards_without_samples_do_not_turn_for_ever(tmp_path, counts):
    with pytest.raises(ValueError, match="shards hold too few samples"):
        first(stream(write_shards(tmp_path, counts)), 1)
