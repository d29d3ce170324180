"""Pictures in shards, tar files read from one end to the other: sets that no machine holds all of.

A shard holds files such as 000123.jpg and 000123.cls, the second the class as a decimal number, one
pair after the other: the layout of the package webdataset, which opens and reads them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from blnet.checks import flag_of
from blnet.files import reason
from blnet.training.loading import CorruptSample, mixed_seed
from blnet.vision.config import DataConfig
from blnet.vision.sources import Convert, Transform, decode, read

PICTURES = ("jpg", "jpeg", "png", "webp")
# Encoded samples among which the next one is drawn: some 100 MB of ImageNet in each process.
BUFFER = 1000
# What files of gzip, bzip2, xz and zstandard begin with.
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
Sample = tuple[Tensor, int]
# What webdataset makes of the files of a sample: ending -> bytes, and __key__, its name.
Entry = Mapping[str, Any]


class ShardStream:
    """The samples of some shards, shared out over readers: a `blnet.training.loading.Stream`.

    Training reads the shards again and again, each pass in another order, and draws samples from a
    buffer; it never ends, an epoch is a number of samples. Every reader takes other shards; where
    there are fewer shards than readers, all read all of them and take turns sample by sample.
    Evaluation reads every shard once, to its end, in order, each by one reader.

    A sample that cannot be read is yielded as a `CorruptSample`. So is in training a shard, once,
    that cannot be opened or that breaks off: what came before the break is used. In evaluation
    that is an error, as nobody knows how many samples were lost.

    Args:
        pattern: path or URL of the shards, with braces for several: 'train-{000..099}.tar'; with
            'pipe:COMMAND', what the command prints.
        samples: samples in an epoch, of all readers together; of evaluation 0, as nobody knows.
        classes: number of classes.
        convert: gives any picture the mode that the network takes.
        transform: makes a uint8 tensor (channels, height, width) of it.
        training: whether to shuffle and never to end.
        seed: of the order.
        buffer: encoded samples to draw from.
        flag: the setting that named the shards, for errors.

    Raises:
        ValueError: if a shard is missing.
        ImportError: if webdataset is not installed.
    """

    def __init__(
        self, pattern: str, samples: int, classes: int, convert: Convert, transform: Transform, *,
        training: bool, seed: int = 0, buffer: int = BUFFER, flag: str = "--data.path",
    ) -> None:  # fmt: skip
        self.urls = expand(pattern, flag)
        self.samples = samples
        self.classes = classes
        self.convert = convert
        self.transform = transform
        self.training = training
        self.seed = seed
        self.buffer = buffer
        self.flag = flag

    def read(
        self, epoch: int, reader: int, readers: int, skip: int = 0
    ) -> Iterator[Sample | CorruptSample]:
        """Yield (uint8 tensor (channels, height, width), label), and `CorruptSample` objects.

        The order depends on the seed and these numbers alone; what is drawn for a sample, on
        torch's global random state.

        Args:
            epoch: counted from 0.
            reader: which reader, from 0 to readers - 1.
            readers: how many there are.
            skip: items to leave out, corrupt ones counted; they are read but not decoded.

        Raises:
            ValueError: in training, if the shards hold no samples for this reader; in evaluation,
                if a shard cannot be opened or breaks off.
        """
        if self.training:
            entries = self._shuffled(epoch, reader, readers)
        else:
            entries = itertools.chain.from_iterable(map(self._whole, self.urls[reader::readers]))
        yield from map(self._sample, itertools.islice(entries, skip, None))

    def _whole(self, url: str) -> Iterator[Entry]:
        for entry in _entries(url):
            if isinstance(entry, CorruptSample):
                raise ValueError(
                    f"{self.flag}: {entry.name}: {entry.reason}, and what was evaluated would not "
                    "be the whole set; fetch or write it again"
                )
            yield entry

    def _shuffled(self, epoch: int, reader: int, readers: int) -> Iterator[Entry | CorruptSample]:
        from webdataset.filters import _shuffle as shuffle

        draw = random.Random(mixed_seed(self.seed, epoch, reader))
        entries = self._endless(epoch, reader, readers)
        shuffled: Iterator[Entry | CorruptSample] = shuffle(
            entries, bufsize=self.buffer, initial=min(100, self.buffer), rng=draw
        )
        return shuffled

    def _endless(self, epoch: int, reader: int, readers: int) -> Iterator[Entry | CorruptSample]:
        for turn in itertools.count():
            urls = list(self.urls)
            random.Random(mixed_seed(self.seed, epoch, -1, turn)).shuffle(urls)  # all alike
            entries: Iterator[Entry | CorruptSample]
            if len(urls) >= readers:
                entries = itertools.chain.from_iterable(map(_entries, urls[reader::readers]))
            else:
                entries = itertools.chain.from_iterable(map(_entries, urls))
                entries = itertools.islice(entries, reader, None, readers)
            first = next(entries, None)
            if first is None:
                raise ValueError(
                    f"{self.flag}: {len(urls)} shards hold too few samples for {readers} readers; "
                    "name shards with pairs of files such as 000123.jpg and 000123.cls"
                )
            yield first
            yield from entries

    def _sample(self, entry: Entry | CorruptSample) -> Sample | CorruptSample:
        if isinstance(entry, CorruptSample):
            return entry
        try:
            label = self._label(entry)
            name, encoded = _name(entry), _encoded(entry)
            picture = read(name, lambda: decode(encoded), self.convert)
        except CorruptSample as error:
            return error
        return self.transform(picture), label

    def _label(self, entry: Entry) -> int:
        text = entry.get("cls", b"").decode("ascii", "replace").strip()
        if not (text.isdecimal() and len(text) < 10 and int(text) < self.classes):
            raise CorruptSample(
                _name(entry), f"its .cls is {text[:40]!r}, not a class from 0 to {self.classes - 1}"
            )
        return int(text)


def expand(pattern: str, flag: str) -> list[str]:
    """Return the shards that a pattern with braces stands for.

    Raises:
        ValueError: naming the first that is a file of this machine and missing.
        ImportError: if webdataset is not installed.
    """
    from webdataset.shardlists import expand_urls

    try:
        urls: list[str] = expand_urls(pattern)
    except ValueError as error:
        raise ValueError(f"{flag} {pattern!r} is no pattern of shards ({reason(error)})") from error
    for url in urls:
        path = url.removeprefix("file://").removeprefix("file:")
        if not _is_remote(url) and not os.path.isfile(path):
            raise ValueError(
                f"{flag}: shard {path} does not exist; name the tar files, as in "
                "'train-{000..099}.tar'"
            )
    return urls


def check_stream(data: DataConfig, evaluation_only: bool) -> None:
    """Raise a ValueError that names the first setting that shards need, or cannot be had with."""
    needed = {
        "classes": "the number of classes",
        "eval_path": "the shards of the evaluation part",
    }
    if not evaluation_only:
        needed["path"] = "the shards to train on"
        needed["train_images"] = "the number of images in an epoch, which a stream does not know"
    for field, meaning in needed.items():
        if getattr(data, field) is None:
            flag = flag_of(f"data.{field}")
            raise ValueError(f"{flag} is missing; webdataset needs it: {meaning}")
    if data.limit is not None:
        raise ValueError(
            "--data.limit cannot be had with webdataset, whose shards are read as they come; give "
            "a lower --data.train-images and fewer shards"
        )
    if data.eval_images is not None:
        raise ValueError(
            "--data.eval-images cannot be had with webdataset, which evaluates every image of "
            "--data.eval-path; leave it out, and name fewer shards there for fewer images"
        )


def _is_remote(url: str) -> bool:
    return "://" in url.removeprefix("file://") or url.startswith("pipe:")


class _Watched:
    """A stream of bytes that remembers how it began and ended; shown as what it reads.

    Args:
        url: what to read, with webdataset's gopen.
    """

    def __init__(self, url: str) -> None:
        from webdataset.gopen import gopen

        self.url = url
        self.begin = self.end = b""
        self._stream = gopen(url)
        self.close = self._stream.close

    def __str__(self) -> str:
        return self.url

    def read(self, size: int = -1) -> bytes:
        found: bytes = self._stream.read(size)
        self.begin = self.begin or found[:6]
        self.end = found[-512:] or self.end
        return found

    def finish(self) -> None:
        """Read the rest and close; raise an error if the shard or its command broke off.

        tarfile stops without a word at a file that ends between two entries or in a header, and at
        a damaged header; zeros alone may follow the last entry.
        """
        only_zeros = True
        while rest := self.read(1 << 16):
            only_zeros = only_zeros and not rest.strip(b"\0")
        self.close()
        whole = only_zeros and not self.end.strip(b"\0")
        if not whole and not self.begin.startswith(_COMPRESSED):
            raise ValueError("no end marker" if only_zeros else "a damaged header")


def _files(stream: _Watched) -> Iterator[Entry]:
    from webdataset.tariterators import tar_file_expander

    # No mark at the end: the last sample is whole only if the shard turns out to be.
    yield from tar_file_expander([{"url": stream.url, "stream": stream}], eof_value=None)
    stream.finish()


def _entries(url: str) -> Iterator[Entry | CorruptSample]:
    """Yield the samples of a shard, undecoded, and where it cannot be read, what is wrong."""
    from webdataset.tariterators import group_by_keys

    stream = None
    try:
        stream = _Watched(url)
        yield from group_by_keys(_files(stream))
    except Exception as error:  # tarfile, zlib, curl, the network: nearly anything
        # webdataset appends the stream and the name to an error's arguments.
        text = next((part for part in error.args if isinstance(part, str)), reason(error))
        text = text.removesuffix(f" @ {url}")
        yield CorruptSample(url, f"the shard breaks off or cannot be opened ({text})")
    finally:
        if stream is not None:  # whoever leaves early does not care how the command ends
            with contextlib.suppress(Exception):
                stream.close()


def _name(entry: Entry) -> str:
    return f"{entry['__url__']}/{entry['__key__']}"


def _encoded(entry: Entry) -> bytes:
    for ending in PICTURES:
        if ending in entry:
            encoded: bytes = entry[ending]
            return encoded
    raise CorruptSample(_name(entry), f"it has no picture ({', '.join(PICTURES)})")
