"""`same_speaker` voices: the agent's own speech from elsewhere in the recording."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from finetune.audio.files import read_audio
from finetune.audio.words import Word
from finetune.cli import UserError
from finetune.files import regular
from finetune.prompts.recordings import normalise

SAME_SPEAKER = "same_speaker"  # given in place of a file name
VOICE_SEC = 10.0  # longest segment
VOICE_MIN_SEC = 1.0
VOICE_SPEECH_SHARE = 0.5  # least share of a segment that words fill


def voice_segments(words: list[Word], duration_sec: float) -> list[tuple[float, float]]:
    """Return up to two segments (start, end in seconds) of the agent's own speech, the one with most speech first.

    They do not overlap and are at most a third of the recording each, so that most windows have one outside of them.
    """
    candidates = []
    for i, (_, start, _) in enumerate(words):
        end = min(start + min(VOICE_SEC, duration_sec / 3), duration_sec)
        speech = sum(max(0.0, min(e, end) - s) for _, s, e in words[i : i + 200] if s < end)
        if end - start >= VOICE_MIN_SEC and speech >= VOICE_SPEECH_SHARE * (end - start):
            candidates.append((speech, start, end))
    candidates.sort(key=lambda c: (-c[0], c[1]))
    chosen: list[tuple[float, float]] = []
    for _, start, end in candidates:
        if len(chosen) < 2 and all(end <= s or start >= e for s, e in chosen):
            chosen.append((start, end))
    return chosen


def segment_audio(path: Path, start: float, end: float) -> np.ndarray | None:
    """Return the agent's channel between two times (seconds), float32 [samples] at 24 kHz and -24 LUFS.

    Returns None where it is silent: word times may be wrong. Raises UserError if the file cannot be read.
    """
    pcm = read_audio(path, start, end - start, channel=0)[0]
    try:
        return normalise(pcm, str(path))
    except UserError:
        return None


def same_speaker_file(codes: Path) -> Path:
    """Return the path of the `same_speaker` segments that belong to a file of codes."""
    return codes.with_name(codes.name + ".voices")


def load_same_speaker(path: Path, fingerprint: str | None, speakers: Sequence[str]) -> list[dict]:
    """Return the segments that `save_same_speaker` wrote: [{"start", "end" (sec), "codes": [8, N] int16}].

    Raises UserError if the file is missing or damaged, or belongs to another codec (unless `fingerprint` is None) or to
    other speakers.
    """
    remedy = "run precompute_codes.py with --same-speaker"
    try:
        entry = torch.load(regular(path), weights_only=True)
        segments, mimi, found = entry["stretches"], entry["mimi"], entry["speakers"]
    except Exception as error:  # torch raises nearly anything on nearly a zip file
        state = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise UserError(f"{path}: {state}; {remedy}") from None
    if fingerprint not in (None, mimi):
        raise UserError(f"{path}: made by another Mimi; {remedy} again")
    if set(found) != set(speakers):
        difference = f"holds the speech of {', '.join(found)}, and data.speakers is {', '.join(speakers)}"
        raise UserError(f"{path}: {difference}; {remedy} --speakers {' '.join(speakers)}")
    return segments
