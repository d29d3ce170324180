"""How long a recording's file is by its own bytes, where libsndfile passes over what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

_PAGE = 65_307  # bytes of the largest page of an Ogg file
# Programs that write WAV into a pipe do not know its length and put one of these in its place:
# the largest numbers there are, or those less a header of some kilobytes.
_UNKNOWN_LENGTHS = (range(0x7FFF0000, 0x80000001), range(0xFFFF0000, 0x100000000))
_UNKNOWN_LONG = (1 << 64) - 1  # the same of lengths of eight bytes
_W64_HEAD = 24  # bytes of a name and a length

# The two bits of an MPEG header that tell the version, as they stand: 2.5, 2 and 1.
_MPEG_RATES = {
    0: (11025, 12000, 8000),
    2: (22050, 24000, 16000),
    3: (44100, 48000, 32000),
}  # samples a second
_MPEG_1_KILOBITS = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_MPEG_2_KILOBITS = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_TAGGED = 64  # first bytes of a frame, within which a tag with the number of frames may be


def missing_bytes(data: BinaryIO, size: int) -> int:
    """Return how many bytes of a file's samples are not there; 0 where its format does not say.

    Args:
        data: a file, of which WAV, RF64 and Wave64 are looked into; it is left anywhere.
        size: its bytes.
    """
    data.seek(0)
    head = data.read(12)
    if head[:4] in (b"RIFF", b"RF64") and head[8:] == b"WAVE":
        return _missing_of_wav(data, size)
    return _missing_of_w64(data, size) if head[:4] == b"riff" else 0


def _missing_of_wav(data: BinaryIO, size: int) -> int:
    """Return how many bytes of a WAV file's samples are not there.

    A RIFF file is a list of chunks: a name of four letters, a length of four bytes, little-endian,
    and as many bytes, and one more where that is odd (Microsoft and IBM, Multimedia Programming
    Interface and Data Specifications 1.0, 1991). Where files of 4 GB and more, which begin with
    RF64, have -1 for the samples' length, the chunk ds64 has it in its second eight bytes (EBU
    Tech 3306).
    """
    place, long = 12, None
    while place + 8 <= size:
        data.seek(place)
        head = data.read(8)
        length = int.from_bytes(head[4:], "little")
        place += 8
        if head[:4] == b"ds64":
            long = int.from_bytes(data.read(16)[8:], "little")
        if head[:4] == b"data":
            if length == 0xFFFFFFFF and long is not None:
                length = long
            elif any(length in unknown for unknown in _UNKNOWN_LENGTHS):
                return 0
            return max(0, place + length - size)
        place += length + length % 2
    return 0


def _missing_of_w64(data: BinaryIO, size: int) -> int:
    """Return how many bytes of a Wave64 file's samples are not there.

    Chunks begin at multiples of eight bytes with a name of sixteen, of which the first four are
    those of WAV, and a length of eight, little-endian, that counts itself and the name (Sony
    Pictures Digital, Sony Wave64 1.0). After the name and length of the whole comes "wave".
    """
    place = _W64_HEAD + 16
    while place + _W64_HEAD <= size:
        data.seek(place)
        head = data.read(_W64_HEAD)
        length = int.from_bytes(head[16:], "little")
        if head[:4] == b"data":
            return 0 if length == _UNKNOWN_LONG else max(0, place + length - size)
        if length < _W64_HEAD:
            break
        place += length + -length % 8
    return 0


def has_whole_pages(data: BinaryIO, size: int) -> bool:
    """Return whether the last page of an Ogg file is whole.

    A page begins with OggS; byte 26 has the number of segments, and so many bytes follow with the
    length of each (RFC 3533). The mark of a last page, in byte 5, is not asked for: what FFmpeg
    cuts into segments has none.

    Args:
        data: the file; it is left anywhere.
        size: its bytes.
    """
    data.seek(max(0, size - 2 * _PAGE))
    rest = data.read()
    page = rest[rest.rfind(b"OggS") :]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return False
    return len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])


def unsaid_mp3_samples(data: BinaryIO) -> int:
    """Return how many samples an MP3 file holds at least that does not say it; 0 where it does.

    Frames are counted from the first up to what is none.

    Args:
        data: the file; it is left anywhere.
    """
    frames = _mpeg_frames(data)
    first, count = next(frames, (b"", 0))
    if _says_length(first):
        return 0
    return count + sum(more for _, more in frames)


def _says_length(first: bytes) -> bool:
    """Return whether the first frame of an MP3 file holds the number of the others.

    After "Xing" or "Info" come four bytes of flags, of which the last bit says that the number is
    there, and its four bytes, which are 0 where the program could not go back to write it; after
    "VBRI" it is always there.
    """
    for name in (b"Xing", b"Info"):
        if name in first:
            tag = first[first.index(name) + 4 :]
            return bool(int.from_bytes(tag[:4], "big") & 1) and any(tag[4:8])
    return b"VBRI" in first


def _mpeg_frames(data: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yield the first bytes of each frame of an MP3 file, and its samples.

    A frame is a header of four bytes (11 bits of 1, two of the version, two of the layer, four of
    the bit rate, two of the sample rate, one for a byte more) and what fits into its bit rate
    (ISO/IEC 11172-3 and 13818-3).
    """
    place = _after_tags(data)
    while True:
        data.seek(place)
        head = data.read(_TAGGED)
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


def _after_tags(data: BinaryIO) -> int:
    """Return where the frames of an MP3 file begin, after any number of tags.

    A tag begins with ID3 and has its length in bytes 6 to 9, seven bits in each (ID3 2.4.0).
    """
    place = 0
    while True:
        data.seek(place)
        tag = data.read(10)
        if len(tag) < 10 or tag[:3] != b"ID3":
            return place
        length = 0
        for byte in tag[6:]:
            length = length << 7 | byte
        place += len(tag) + length
