"""Encode recordings with Mimi, many at once, and save their codes."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
from moshi.models import MimiModel

from finetune.audio.codec import encode_streams
from finetune.audio.codes import audio_fingerprint, open_audio, save_codes
from finetune.audio.files import SAMPLE_RATE, probe_audio
from finetune.audio.memory import default_slots, keep_freed_memory
from finetune.audio.stream import stream_audio
from finetune.cli import UserError
from finetune.jobs.bars import HoursBar
from finetune.jobs.failures import Failures, forget_error
from finetune.prompts.same_speaker import same_speaker_file

CHANNELS = 2  # agent, user


class EncodeTask(NamedTuple):
    """One audio file. Paths are strings, which take a third of the memory of Path: there may be a million files."""

    path: str
    codes: str  # path of the file of codes
    duration: float | None  # seconds, from the manifest
    words: str | None  # path of the .json of words if the manifest names it; None: it is next to the audio
    folder: str  # of the manifest


def audio_stamp(path: Path) -> dict[str, str | int]:
    """Return the date (ns) of a file and a digest of all of it, to be saved with its codes.

    Raises UserError if the file cannot be read.
    """
    with open_audio(path) as file:
        date = os.fstat(file.fileno()).st_mtime_ns  # before reading: a file that changes meanwhile gets a later date
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
        return {"audio_mtime_ns": date, "audio_sha256": digest.hexdigest()}


class PieceReader:
    """The audio of one file in pieces; a thread decodes the next piece while this one is encoded.

    Attributes:
        samples: number of samples per channel read so far, at 24 kHz.
        fingerprint, stamp: of the file, taken before it is decoded.
    """

    def __init__(self, task: EncodeTask, pool: ThreadPoolExecutor, bar: HoursBar):
        self.task = task
        self.samples = 0
        self.fingerprint, self.stamp = "", {}
        self._pool, self._bar = pool, bar
        self._pieces = self._decode()
        self._next = pool.submit(next, self._pieces, None)

    def _decode(self) -> Iterator[np.ndarray]:
        path = Path(self.task.path)
        self.fingerprint, self.stamp = audio_fingerprint(path), audio_stamp(path)
        channels = probe_audio(path).channels
        if channels != CHANNELS:
            raise UserError(f"{path}: has {channels} channel(s); training needs agent left, user right")
        yield from stream_audio(path)

    def __iter__(self) -> Iterator[np.ndarray]:
        while (piece := self._next.result()) is not None:
            self._next = self._pool.submit(next, self._pieces, None)
            self.samples += piece.shape[1]
            self._bar.update(piece.shape[1] / SAMPLE_RATE)
            yield piece


def encode_files(
    tasks: Sequence[EncodeTask], mimi: MimiModel, fingerprint: str, pool: ThreadPoolExecutor, threads: int,
    slots: int | None = None, exact: bool = False,
) -> tuple[dict[str, float], Failures]:  # fmt: skip
    """Encode files and save their codes.

    Args:
        fingerprint: of the codec.
        threads: of the `pool`, which decode ahead.
        slots: channels encoded at once; None: as many as suit the device.
        exact: see finetune.audio.codec.
    Returns:
        {file of codes: seconds of its audio}, and the files of codes that could not be made.
    """
    device = next(mimi.parameters()).device
    if device.type == "cpu":
        keep_freed_memory()
    slots = min(slots or default_slots(device), CHANNELS * max(1, len(tasks)))
    durations, failures = {}, Failures()
    readers: dict[int, PieceReader] = {}
    with HoursBar([task.duration for task in tasks], "encoding") as bar:

        def start_readers() -> Iterator[PieceReader]:
            ahead = threads - 1  # readers that have started and not been taken
            for number in range(len(tasks) + ahead):
                if number < len(tasks):
                    readers[number] = PieceReader(tasks[number], pool, bar)
                if number >= ahead:
                    yield readers[number - ahead]

        with closing(encode_streams(mimi, start_readers(), slots, exact)) as results:
            for number, result in results:
                reader = readers.pop(number)
                codes, seconds = Path(reader.task.codes), reader.samples / SAMPLE_RATE
                codes.parent.mkdir(parents=True, exist_ok=True)
                try:
                    if isinstance(result, UserError):
                        raise result
                    same_speaker_file(codes).unlink(missing_ok=True)  # it belongs to the previous audio
                    save_codes(codes, result, seconds, fingerprint, reader.fingerprint, reader.stamp, exact)
                except (UserError, OSError) as error:
                    failures.add(codes, reader.task.path, error)
                    bar.set_postfix_str(f"{len(failures)} failed")
                else:
                    forget_error(codes)
                    durations[reader.task.codes] = seconds
    return durations, failures
