"""Which windows find a `same_speaker` voice: choose its segment, and say what a data source lacks."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from finetune.audio.files import FRAME_RATE, to_frames
from finetune.data.manifest import Line
from finetune.data.windows import count_windows
from finetune.prompts.same_speaker import Span

_SHORTER_SEC = (100, 80, 60, 50, 40, 30, 20, 15, 10, 8, 6, 5, 4, 3, 2)  # values of duration_sec that are suggested


class VoiceSource(NamedTuple):
    """The segments of one file that can be a voice (`find_segments`)."""

    manifest: Path
    file: int  # index of its line
    call: str  # files of one call are no voice for each other
    speaker: str | None  # only within its manifest is the same name the same speaker
    duration_sec: float
    spans: list[Span]


class VoiceChoice(NamedTuple):
    """A segment, and how many frames of dialogue the window gives up for it at its start or at its end."""

    segment: int  # index
    head: int = 0
    tail: int = 0


SpeakerCalls = dict[tuple[Path, str | None], list[VoiceSource]]  # (manifest, speaker) -> files with a voice


def voice_source(line: Line, file: int, spans: Sequence[Span]) -> VoiceSource:
    """Return the source that a line of a manifest is; its fields "speaker" and "call" are optional."""
    speaker, call = (line.fields.get(key) for key in ("speaker", "call"))
    speaker = None if speaker in (None, "") else str(speaker)
    return VoiceSource(line.manifest, file, str(call or line.path), speaker, line.duration, list(spans))


def group_speakers(sources: Iterable[VoiceSource]) -> SpeakerCalls:
    """Return the files that can lend their voice to other calls of their speaker."""
    known: SpeakerCalls = {}
    for source in sources:
        if source.speaker is not None and source.spans:
            known.setdefault((source.manifest, source.speaker), []).append(source)
    return known


def another_call(known: SpeakerCalls, source: VoiceSource, first: int = 0) -> VoiceSource | None:
    """Return a file of another call of the same speaker: the one at `first`, cyclic, or the next after it."""
    files = known.get((source.manifest, source.speaker), [])
    cyclic = (files[(first + i) % len(files)] for i in range(len(files)))
    return next((other for other in cyclic if other.call != source.call), None)


def choose_segment(spans: Sequence[Span], window: Span, reserve_sec: float = 0.0) -> VoiceChoice | None:
    """Return the first segment outside of a window, or None.

    If there is none, the window gives up its dialogue up to the end, or from the start, of the segment for which that
    is least; at most `reserve_sec`, and half of the window.
    """
    start, end = window
    cuts = []
    for i, (first, last) in enumerate(spans):
        if last <= start or first >= end:
            return VoiceChoice(i)
        cuts += [VoiceChoice(i, head=to_frames(last - start)), VoiceChoice(i, tail=to_frames(end - first))]
    best = min(cuts, key=lambda cut: cut.head + cut.tail, default=None)
    return best if best and best.head + best.tail <= to_frames(min(reserve_sec, (end - start) / 2)) else None


def choose_all(source: VoiceSource, window_frames: int, reserve_sec: float) -> list[VoiceChoice | None]:
    """Return `choose_segment` of each window of a file."""
    frames, windows = to_frames(source.duration_sec), []
    for start in range(0, count_windows(source.duration_sec, window_frames) * window_frames, window_frames):
        windows.append((start / FRAME_RATE, min(start + window_frames, frames) / FRAME_RATE))
    return [choose_segment(source.spans, window, reserve_sec) for window in windows]


def find_shortage(sources: Sequence[VoiceSource], window_frames: int, reserve_sec: float) -> dict[Path, int]:
    """Return {manifest: windows without a voice} of files whose voice is `same_speaker`, if there are any."""
    known, lacking = group_speakers(sources), {}
    for source in sources:
        if another_call(known, source) is None:
            count = choose_all(source, window_frames, reserve_sec).count(None)
            if count:
                lacking[source.manifest] = lacking.get(source.manifest, 0) + count
    return lacking


def describe_shortage(sources: Sequence[VoiceSource], windows: int, duration_sec: float, reserve_sec: float) -> str:
    """Return a sentence: how many of all `windows` have no voice, and what would give them one."""
    known = group_speakers(sources)
    alone = [source for source in sources if another_call(known, source) is None]
    choices = lambda seconds, reserve, some: [c for s in some for c in choose_all(s, to_frames(seconds), reserve)]
    silent, speaking = ([source for source in alone if bool(source.spans) == heard] for heard in (False, True))
    lost, lacking = (choices(duration_sec, reserve_sec, some).count(None) for some in (silent, speaking))
    out = f"same_speaker finds no voice for {lost + lacking:,} of {windows:,} windows"
    out += f", {lost:,} of them in {len(silent):,} files in which the agent hardly speaks" if silent else ""
    remedies, least = [], lacking
    for seconds in (seconds for seconds in _SHORTER_SEC if seconds < duration_sec and least):
        found = choices(seconds, reserve_sec, speaking)
        if (left := found.count(None)) < least:
            rest = f"all but {left:,} of the then {len(found):,} windows" if left else "every window"
            least, remedies = left, [f"duration_sec={seconds} gives {rest} one from elsewhere in the call"]
    if lacking and not remedies:
        remedies.append("a shorter duration_sec alone helps none of them")
    within = [choice for choice in choices(duration_sec, math.inf, speaking) if choice]
    needed = max((choice.head + choice.tail for choice in within), default=0) / FRAME_RATE
    if needed > reserve_sec:
        remedies.append(f"prompt.reserve_sec={needed:g} takes it from the window, which becomes shorter")
    remedies += [
        'calls of one agent lend each other a voice if their lines in the manifest have the same "speaker"',
        "prompt.allow_voiceless=true trains without",
    ]
    return f"{out}; choose one of these: {'; '.join(remedies)}"
