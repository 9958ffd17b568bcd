"""The header of a file: which library decodes it, and whether a wav is as long as it says."""

import os
import struct
from typing import BinaryIO, NamedTuple

_PLAIN_WAV = (b"\1\0", b"\3\0", b"\6\0", b"\7\0")  # formats with samples of one size: PCM, float, A-law, mu-law
_EXTENSIBLE_WAV = b"\xfe\xff"  # a later field holds the format


class Header(NamedTuple):
    """`stated_sec` and `held_sec` differ, and are None where a wav's length is right and in all other formats.

    A length is wrong in files that were written to a pipe (0xFFFFFFFF or 0), are truncated, or have more than 4 GB.
    """

    plain: bool  # sphn decodes it and seeks to the exact sample: wav that is no longer than it says, flac, aiff
    stated_sec: float | None = None
    held_sec: float | None = None  # of the samples that are there


def read_audio_header(path: str | os.PathLike) -> Header:
    """Return what the first bytes of a file say. Raises OSError if it cannot be read.

    Formats whose frames depend on earlier ones (mp3, Vorbis, AAC) are not plain, because sphn seeks past the exact
    sample by milliseconds, and ADPCM is not, because sphn finds nothing in it.
    """
    with open(path, "rb") as file:
        head = file.read(12)
        if head.startswith(b"RIFF"):
            return _read_wav(file, os.fstat(file.fileno()).st_size)
        return Header(head.startswith((b"fLaC", b"FORM")))


def _read_wav(file: BinaryIO, size: int) -> Header:
    form, chunk = b"", _read_chunk(file, 12, size)
    while chunk and chunk[0] != b"data":
        name, start, length = chunk
        if name == b"fmt ":
            form = file.read(26)
        chunk = _read_chunk(file, start + length + length % 2, size)
    plain = (form[24:26] if form[:2] == _EXTENSIBLE_WAV else form[:2]) in _PLAIN_WAV
    if not plain or not chunk or len(form) < 16:
        return Header(plain)
    _, start, length = chunk
    rate, _, block = struct.unpack("<IIH", form[4:14])
    held, per_sec = size - start, max(1, rate * block)
    if length > held:
        return Header(True, length / per_sec, held / per_sec)
    following = _read_chunk(file, start + length + length % 2, size)
    is_chunk = following and all(32 <= byte < 127 for byte in following[0]) and sum(following[1:]) <= size
    if is_chunk or held - length <= per_sec / 10:
        return Header(True)
    return Header(False, length / per_sec, held / per_sec)


def _read_chunk(file: BinaryIO, position: int, size: int) -> tuple[bytes, int, int] | None:
    """Return (name, start of the content, length) of the chunk at `position`; None if the file ends before."""
    if position + 8 > size:
        return None
    file.seek(position)
    name, length = struct.unpack("<4sI", file.read(8))
    return name, position + 8, length
