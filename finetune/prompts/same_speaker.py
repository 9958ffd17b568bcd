"""`same_speaker` voices: the agent's own speech from elsewhere in the recording, or from another of its recordings."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from finetune.audio.agreement import detect_speakers, match_words
from finetune.audio.files import AudioFile, read_audio
from finetune.audio.speech import frame_levels
from finetune.audio.stream import PIECE_SEC
from finetune.audio.words import Word
from finetune.cli import UserError
from finetune.files import regular
from finetune.prompts.recordings import normalise

SAME_SPEAKER = "same_speaker"  # given in place of a file name
LENGTHS_SEC = (10.0, 7.0, 5.0, 3.0, 2.0)  # of a segment, tried in this order; it is at most a third of the recording
EDGE_SEC = 5.0  # longest of the first and the last segment
VOICE_MIN_SEC = 1.0
VOICE_SPEECH_SHARE = 0.5  # least share of a segment that is speech
LEVEL_SEC = 0.02  # resolution of the detection of speech
Span = tuple[float, float]  # start and end in seconds


def find_segments(path: Path, words: Sequence[Word]) -> list[Span]:
    """Return the segments of a recording that can be a voice, the best ones first.

    They begin with a word and hold speech that is heard in the agent's channel where it has words. If there are none,
    because words are late or missing, all speech in it counts that is louder than the user, whom it may echo.
    Raises UserError if the file cannot be read.
    """
    audio, pieces, samples = AudioFile(path), [], 0
    rate = audio.info.sample_rate
    for second in itertools.count(0, PIECE_SEC):
        pcm = audio.decode(second, PIECE_SEC)
        samples += pcm.shape[1]
        sides = np.stack([frame_levels(pcm[side], round(rate * LEVEL_SEC)) for side in (0, -1)])
        pieces.append(sides[:, : round(PIECE_SEC / LEVEL_SEC)])
        if pcm.shape[1] < PIECE_SEC * rate:
            break
    levels = np.concatenate(pieces, axis=1)  # dBFS [2, n]
    heard = detect_speakers(levels, LEVEL_SEC)[0]
    _, near = match_words(heard, LEVEL_SEC, words)
    begun = np.array([start for _, start, _ in words if start >= 0])
    found = voice_segments(heard & near, begun, samples / rate)
    louder = heard & (levels[0] > levels[1])
    return found or voice_segments(louder, np.flatnonzero(louder) * LEVEL_SEC, samples / rate)


def voice_segments(speech: np.ndarray, starts: np.ndarray, duration_sec: float) -> list[Span]:
    """Return up to four segments: the two with most speech, which do not overlap, then the first and the last one.

    Longer segments are preferred: shorter ones are taken if there are not two. All are at most a third of the
    recording, so that most windows have one outside of them.

    Args:
        speech: bool [n], for each LEVEL_SEC of the recording.
        starts: seconds [m], where segments may begin.
    """
    before = np.concatenate([[0], np.cumsum(speech)])  # [n + 1] levels of speech
    levels = lambda seconds: np.round(seconds / LEVEL_SEC).astype(int).clip(0, len(speech))

    def candidates(length: float, whole: bool = False) -> list[Span]:
        wanted = min(length, duration_sec / 3)
        ends = np.minimum(starts + wanted, duration_sec)
        first, last = levels(starts), levels(ends)
        spoken = before[last] - before[first]
        good = (ends - starts >= (wanted - LEVEL_SEC if whole else 0)) & (ends - starts >= VOICE_MIN_SEC)
        good &= spoken >= VOICE_SPEECH_SHARE * (last - first)
        order = np.flatnonzero(good) if whole else np.lexsort((starts, -spoken))
        return [(float(starts[i]), float(ends[i])) for i in order if good[i]]

    chosen: list[Span] = []
    for length in LENGTHS_SEC:
        for start, end in candidates(length):
            if len(chosen) < 2 and all(end <= s or start >= e for s, e in chosen):
                chosen.append((start, end))
    edges = next(filter(None, (candidates(length, whole=True) for length in LENGTHS_SEC if length <= EDGE_SEC)), [])
    return list(dict.fromkeys(chosen + edges[:1] + edges[-1:]))


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
