"""How long a recording's file is by its own bytes, where libsndfile passes over what is missing."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Literal, NamedTuple

# Programs that write into a pipe do not know the samples' length and put one of these in its place:
# the largest numbers there are, or those less a header of some kilobytes; SoX 0x7F000000 for AIFF.
_UNKNOWN_LENGTHS = (range(0x7EFF0000, 0x80000001), range(0xFFFF0000, 0x100000000))
_UNKNOWN_LONG = (1 << 64) - 1  # the same of lengths of eight bytes
_SAMPLES = (b"data", b"SSND", b"BODY")  # chunks of the samples, the last of Amiga's 8SVX
_NIST_COUNTS = (b"sample_count", b"channel_count", b"sample_n_bytes")

# The head of an Ogg page: name, version, marks, time of its end (0: the stream's headers), stream,
# number, checksum, and how many bytes follow that each have the length of a segment (RFC 3533).
_PAGE = struct.Struct("<4sBBq4sI4sB")
_FIRST = 2  # the mark of a stream's first page
_DAMAGED = "it is damaged, and what is spoilt would be left out; fetch or copy it again"
_CHAINED = (
    "it holds several recordings one behind another, of which only the first would be read; write "
    "them into one stream, or each into a file of its own"
)
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))

# The two bits of an MPEG header that tell the version, as they stand: 2.5, 2 and 1.
_MPEG_RATES = {
    0: (11025, 12000, 8000),
    2: (22050, 24000, 16000),
    3: (44100, 48000, 32000),
}  # samples a second
_MPEG_1_KILOBITS = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_MPEG_2_KILOBITS = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_TAGGED = 64  # first bytes of a frame, within which a tag with the number of frames may be


class _Chunks(NamedTuple):
    """How a file of chunks is laid out: each has a name, a length and as many bytes.

    Attributes:
        first: where the first chunk begins.
        name: bytes of a name.
        length: bytes of a length.
        order: of the bytes of a length.
        counted: bytes of name and length that the length counts as well.
        step: chunks begin at multiples of so many bytes.
    """

    first: int
    name: int
    length: int
    order: Literal["little", "big"]
    counted: int
    step: int


# Microsoft and IBM, Multimedia Programming Interface and Data Specifications 1.0, 1991.
_WAV = _Chunks(12, 4, 4, "little", 0, 2)
# Sony Pictures Digital, Sony Wave64 1.0: the name and length of the whole, then "wave".
_W64 = _Chunks(40, 16, 8, "little", 24, 8)
# Apple, Audio Interchange File Format 1.3, 1989, after Electronic Arts' IFF 85.
_AIFF = _Chunks(12, 4, 4, "big", 0, 2)
# Apple, Core Audio Format Specification 1.0.
_CAF = _Chunks(8, 4, 8, "big", 0, 1)


def missing_bytes(data: BinaryIO, size: int) -> int:
    """Return how many bytes of a file's samples are not there; 0 where its header does not say.

    Args:
        data: a file, of which WAV, RF64, Wave64, AIFF, 8SVX, CAF, AU and NIST SPHERE are looked
            into; it is left anywhere.
        size: its bytes.
    """
    data.seek(0)
    head = data.read(12)
    if head[:4] in (b".snd", b"dns."):
        return _missing_of_au(head, size)
    if head[:7] == b"NIST_1A":
        return _missing_of_nist(data, size)
    layouts = {b"RIFF": _WAV, b"RF64": _WAV, b"riff": _W64, b"FORM": _AIFF, b"caff": _CAF}
    return _missing_of_chunks(data, size, layouts[head[:4]]) if head[:4] in layouts else 0


def _missing_of_chunks(data: BinaryIO, size: int, chunks: _Chunks) -> int:
    """Return how many bytes are missing of the chunk of samples.

    Where WAV files of 4 GB and more, which begin with RF64, have -1 for the samples' length, the
    chunk ds64 has it in its second eight bytes (EBU Tech 3306).
    """
    place, long = chunks.first, None
    while place + chunks.name + chunks.length <= size:
        data.seek(place)
        head = data.read(chunks.name + chunks.length)
        length = int.from_bytes(head[chunks.name :], chunks.order) - chunks.counted
        place += len(head)
        if head[:4] == b"ds64":
            long = int.from_bytes(data.read(16)[8:], "little")
        if head[:4] in _SAMPLES:
            if length == 0xFFFFFFFF and long is not None:
                length = long
            elif _is_unknown(length + chunks.counted, chunks.length):
                return 0
            return max(0, place + length - size)
        if length < 0:  # it leads nowhere
            break
        place += length
        place += -place % chunks.step
    return 0


def _is_unknown(length: int, size: int) -> bool:
    """Tell whether a length, of so many bytes itself, stands for one that was not known."""
    if size == 8:
        return length == _UNKNOWN_LONG
    return any(length in unknown for unknown in _UNKNOWN_LENGTHS)


def _missing_of_au(head: bytes, size: int) -> int:
    """Return how many bytes of an AU file's samples are not there.

    After the name come where the samples begin and their length, four bytes each (Sun, audio(5)).
    """
    order: Literal["little", "big"] = "big" if head[:4] == b".snd" else "little"
    first, length = (int.from_bytes(part, order) for part in (head[4:8], head[8:]))
    return 0 if _is_unknown(length, len(head[8:])) else max(0, first + length - size)


def _missing_of_nist(data: BinaryIO, size: int) -> int:
    """Return how many bytes of a NIST SPHERE file's samples are not there.

    Its header is text: a name, its own length, and a line for each fact, as in "sample_count -i
    16000", which counts the samples of one channel (NIST, SPHERE 2.6). Packed samples, which
    libsndfile does not read, are said to be shorten.
    """
    data.seek(0)
    header = data.read(1024)
    found = {key: int(number) for key, number in re.findall(rb"(\w+) -i (\d+)", header)}
    first = re.match(rb"NIST_1A\s+(\d+)", header)
    if first is None or b"shorten" in header or not all(key in found for key in _NIST_COUNTS):
        return 0
    count, channels, width = (found[key] for key in _NIST_COUNTS)
    return max(0, int(first[1]) + count * channels * width - size)


def ogg_fault(data: BinaryIO) -> str | None:
    """Return what is wrong with the pages of an Ogg file that libsndfile would pass over.

    The mark of a last page is not asked for: what FFmpeg cuts into segments has none. What follows
    the last page, as taggers append it, does not count.

    Args:
        data: the file; it is left anywhere.
    """
    data.seek(0)
    expected: dict[bytes, int] = {}  # number of each stream's next page
    begun = False
    while (head := data.read(_PAGE.size))[:4] == b"OggS":
        lengths = data.read(head[26]) if len(head) == _PAGE.size else b""
        body = data.read(sum(lengths))
        if len(head) < _PAGE.size or len(lengths) < head[26] or len(body) < sum(lengths):
            return "it is cut off in the midst of a page"
        _, _, marks, granule, stream, number, checksum, _ = _PAGE.unpack(head)
        if checksum != _ogg_checksum(head[:22] + bytes(4) + head[26:] + lengths + body):
            return _DAMAGED
        if begun and marks & _FIRST:
            return _CHAINED
        if number != expected.pop(stream, number):
            return _DAMAGED
        begun = begun or not marks & _FIRST
        if granule:  # behind the headers, a recorded broadcast goes on with any number
            expected[stream] = number + 1
    return _DAMAGED if b"OggS\0" in head + data.read() else None


def _ogg_checksum(page: bytes) -> bytes:
    """Return the checksum of a page, its own four bytes 0: zlib's, of the bits in other order."""
    mirrored = zlib.crc32(page.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return mirrored.to_bytes(4, "big").translate(_MIRRORED)


def mp3_samples(data: BinaryIO) -> tuple[int, int]:
    """Return how many samples an MP3 file holds at least, and how many it says; 0 for none.

    Frames are counted from the first up to what is neither one nor a tag.

    Args:
        data: the file; it is left anywhere.
    """
    frames = _mpeg_frames(data)
    first, samples = next(frames, (b"", 0))
    counted = sum(more for _, more in frames)
    said = _said_frames(first)
    return (counted, said * samples) if said else (counted + samples, 0)


def _said_frames(first: bytes) -> int:
    """Return how many others there are by the first frame of an MP3 file; 0 if it says nothing.

    After "Xing" or "Info" come four bytes of flags, of which the last bit says that the number is
    there, and its four bytes, which are 0 where the program could not go back to write it. "VBRI",
    which Fraunhofer's programs write, libsndfile does not look at.
    """
    for name in (b"Xing", b"Info"):
        if name in first:
            tag = first[first.index(name) + 4 :]
            flags, number = (int.from_bytes(part, "big") for part in (tag[:4], tag[4:8]))
            return number if flags & 1 else 0
    return 0


def _mpeg_frames(data: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yield the first bytes of each frame of an MP3 file, and its samples.

    A frame is a header of four bytes (11 bits of 1, two of the version, two of the layer, four of
    the bit rate, two of the sample rate, one for a byte more) and what fits into its bit rate
    (ISO/IEC 11172-3 and 13818-3).
    """
    place = 0
    while True:
        data.seek(place)
        head = data.read(_TAGGED)
        if head[:3] in (b"ID3", b"TAG"):
            place += _tag_length(head)
            continue
        if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:  # layer III
            return
        version, kilobits, rate = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
        if version == 1 or kilobits in (0, 15) or rate == 3:
            return
        newest = version == 3
        bits = (_MPEG_1_KILOBITS if newest else _MPEG_2_KILOBITS)[kilobits]
        samples = 1152 if newest else 576
        length = samples // 8 * 1000 * bits // _MPEG_RATES[version][rate] + (head[2] >> 1 & 1)
        yield head[:length], samples
        place += length


def _tag_length(tag: bytes) -> int:
    """Return the bytes of a tag, before or behind the frames; between them where files were joined.

    One that begins with ID3 has the length of what follows its ten first bytes in the last four of
    them, seven bits in each (ID3 2.4.0); one with TAG is always the same (ID3 1.1).
    """
    if tag[:3] == b"TAG":
        return 128
    length = 0
    for byte in tag[6:10]:
        length = length << 7 | byte
    return 10 + length
