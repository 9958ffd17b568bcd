"""Encode `same_speaker` segments ahead of training, for precompute_codes.py."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from moshi.models import MimiModel

from finetune.audio.codec import encode_audio
from finetune.audio.codes import save_tensors
from finetune.audio.words import MAIN_SPEAKER, Word, read_words, sidecar
from finetune.cli import UserError
from finetune.prompts.same_speaker import find_segments, load_same_speaker, same_speaker_file, segment_audio

VERSION = 2  # of `find_segments`; files of an earlier one can be used, and are made again


def save_same_speaker(
    files: Sequence[tuple[Path, Path]], mimi: MimiModel, fingerprint: str,
    speakers: Sequence[str] = (MAIN_SPEAKER,), exact: bool = False, words_of: Callable[[Path], Path] = sidecar,
) -> dict[Path, str]:  # fmt: skip
    """Encode the `same_speaker` segments of recordings, and save them next to their codes.

    A recording without enough speech gets an empty list of segments.

    Args:
        files: (recording, its file of codes) pairs.
        fingerprint: of the codec; `exact`: see finetune.audio.codec.
        speakers: whose words show where the agent speaks.
        words_of: returns the .json of words of a recording.
    Returns:
        {recording: reason} for recordings that could not be read.
    """
    problems: dict[Path, str] = {}
    for i in range(0, len(files), 16):
        found = []  # (file to write, digest of the words, [(start, end, sound)]) for each recording
        for recording, codes in files[i : i + 16]:
            try:
                words, _ = read_words(words_of(recording), speakers)
                audio = [(*span, segment_audio(recording, *span)) for span in find_segments(recording, words)]
                found.append((same_speaker_file(codes), _digest(words), [a for a in audio if a[2] is not None]))
            except UserError as error:
                problems[recording] = str(error)
        encoded = iter(encode_audio(mimi, [pcm for *_, audio in found for *_, pcm in audio], exact))
        for target, words, audio in found:
            segments = [{"start": a, "end": b, "codes": next(encoded).to(torch.int16)} for a, b, _ in audio]
            entry = {"mimi": fingerprint, "speakers": list(speakers), "words": words, "exact": exact}
            # "stretches" is the name that existing files have.
            save_tensors(target, entry | {"stretches": segments, "version": VERSION})
    return problems


def has_same_speaker(
    recording: Path, codes: Path, fingerprint: str, speakers: Sequence[str], exact: bool,
    words_of: Callable[[Path], Path] = sidecar,
) -> bool:  # fmt: skip
    """Return whether valid segments of the recording's present words exist; if `exact`, exactly encoded ones."""
    path = same_speaker_file(codes)
    try:
        load_same_speaker(path, fingerprint, speakers)
        entry = torch.load(path, weights_only=True)
        current = entry.get("words") == _digest(read_words(words_of(recording), speakers)[0])
        return current and entry.get("version") == VERSION and (bool(entry.get("exact")) or not exact)
    except UserError:
        return False


def _digest(words: list[Word]) -> str:
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]
