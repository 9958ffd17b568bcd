"""`same_speaker` voices: the agent's own speech from elsewhere in the recording."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from moshi.models import MimiModel

from finetune.audio.codec import encode_audio
from finetune.audio.codes import save_tensors
from finetune.audio.files import probe_audio, read_audio
from finetune.audio.words import MAIN_SPEAKER, Word, read_alignments, sidecar
from finetune.cli import UserError, no_room
from finetune.prompts.recordings import normalise

SAME_SPEAKER = "same_speaker"  # in place of a file: the agent's own words from elsewhere in the recording
VOICE_SEC = 10.0  # longest `same_speaker` stretch
VOICE_MIN_SEC = 1.0
VOICE_SPEECH_SHARE = 0.5  # share of a stretch that its words must fill


def voice_segments(words: list[tuple[str, float, float]], duration_sec: float) -> list[tuple[float, float]]:
    """Up to two stretches (start, end in seconds) of the agent's own speech, for `same_speaker`; the best first.

    Two that do not touch, each at most a third of the recording, so that most windows have one outside of them. They
    begin with a word and hold at least STRETCH_SPEECH of speech.
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
        if all(end <= s or start >= e for s, e in chosen):
            chosen.append((start, end))
            if len(chosen) == 2:
                break
    return chosen


def segment_audio(path: Path, start: float, end: float) -> np.ndarray | None:
    """The agent's sound from `start` to `end` (seconds), normalised, float32 [samples] at 24 kHz; None where there is
    none to speak of: words do not always stand where the sound is. Raises UserError if it cannot be read."""
    pcm = read_audio(path, start, end - start, channel=0)[0]
    try:
        return normalise(pcm, str(path))
    except UserError:
        return None


def same_speaker_file(codes: Path) -> Path:
    """Where the `same_speaker` stretches of a file of codes are kept."""
    return codes.with_name(codes.name + ".voices")


def save_same_speaker(
    files: Sequence[tuple[Path, Path]],
    mimi: MimiModel,
    fingerprint: str,
    speakers: Sequence[str] = (MAIN_SPEAKER,),
    exact: bool = False,
) -> dict[Path, str]:
    """Encodes the `same_speaker` stretches of recordings beside their codes.

    Args:
        files: (recording, its file of codes) of each.
        fingerprint: of the codec.
        speakers: whose words show where the agent speaks.
        exact: see finetune.data.codec.
    Returns:
        {recording: why it has none} of those that could not be read. One without enough speech, or whose words stand
        where it is silent, has an empty list.
    """
    problems: dict[Path, str] = {}
    for i in range(0, len(files), 16):
        found: list[tuple[Path, str, list[tuple[float, float, np.ndarray]]]] = []
        for recording, codes in files[i : i + 16]:
            target = same_speaker_file(codes)
            try:
                words = _words(recording, speakers)
                spans = voice_segments(words, probe_audio(recording).duration_sec)
                heard = [(*span, segment_audio(recording, *span)) for span in spans]
                found.append((target, _digest(words), [stretch for stretch in heard if stretch[2] is not None]))
            except (UserError, OSError, ValueError, KeyError, TypeError) as error:
                if no_room(error):
                    raise
                problems[recording] = str(error)
        encoded = iter(encode_audio(mimi, [sound for *_, heard in found for *_, sound in heard], exact))
        for target, words, heard in found:
            stretches = [
                {"start": start, "end": end, "codes": next(encoded).to(torch.int16)} for start, end, _ in heard
            ]
            kept = {"mimi": fingerprint, "speakers": list(speakers), "words": words, "stretches": stretches,
                    "exact": exact}  # fmt: skip
            save_tensors(target, kept)
    return problems


def _words(recording: Path, speakers: Sequence[str]) -> list[Word]:
    rows = json.loads(sidecar(recording).read_text(encoding="utf-8"))["alignments"]
    return read_alignments(rows, speakers)


def _digest(words: list[Word]) -> str:
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


def load_same_speaker(path: Path, fingerprint: str | None, speakers: Sequence[str]) -> list[dict]:
    """What `save_same_speaker` wrote: [{"start", "end" (sec), "codes": [8, N] int16}].

    Raises UserError if the file is missing or damaged, if another codec made it (unless `fingerprint` is None), or if
    it holds the speech of others than `speakers`.
    """
    again = "run precompute_codes.py with --same-speaker"
    try:
        raw = torch.load(path, weights_only=True)
        stretches, mimi, whose = raw["stretches"], raw["mimi"], raw["speakers"]
    except FileNotFoundError:
        raise UserError(f"{path}: missing; {again}") from None
    except Exception:  # torch raises nearly anything on nearly a zip file
        raise UserError(f"{path}: damaged; {again}") from None
    if fingerprint not in (None, mimi):
        raise UserError(f"{path}: made by another Mimi; {again} again")
    if set(whose) != set(speakers):
        raise UserError(
            f"{path}: holds the speech of {', '.join(whose)}, and data.speakers is {', '.join(speakers)}; "
            f"{again} --speakers {' '.join(speakers)}"
        )
    return stretches


def has_same_speaker(
    recording: Path, codes: Path, fingerprint: str, speakers: Sequence[str], exact: bool = False
) -> bool:
    """Whether the stretches of a file of codes are there (and exact, if so wanted), and of the words that stand beside
    the recording now."""
    path = same_speaker_file(codes)
    try:
        load_same_speaker(path, fingerprint, speakers)
        raw = torch.load(path, weights_only=True)
        return raw.get("words") == _digest(_words(recording, speakers)) and (bool(raw.get("exact")) or not exact)
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return False
