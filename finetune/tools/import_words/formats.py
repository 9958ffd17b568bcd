"""Read transcripts of other programs: each format becomes a list of passages, with the times as they stand there."""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from finetune.cli import UserError
from finetune.files import regular


class Token(NamedTuple):
    """A word. A time is in seconds from the start of the recording, and None if the transcript does not have it."""

    text: str
    start: float | None = None
    end: float | None = None


class Passage(NamedTuple):
    """What a transcript has under one pair of times: a sentence, a cue or a single word."""

    speaker: str | None
    start: float | None
    end: float | None
    words: list[Token]
    recording: str | None = None  # if the file names it (CTM)


def read_passages(path: Path) -> list[Passage]:
    """Return the passages of a transcript. Raises UserError naming file and line if it is not one."""
    try:
        passages = list(READERS[path.suffix.lower()](_decode(regular(path).read_bytes())))
        for passage in passages:
            for word in (Token("", passage.start, passage.end), *passage.words):
                _check_times(word, passage)
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        reason = str(getattr(error, "strerror", error))
        place = f"{path}, " if reason.startswith("line ") else f"{path}: cannot be read as a transcript: "
        raise UserError(place + reason) from None
    return passages


def _decode(raw: bytes) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 with a mark, which Praat writes."""
    try:
        return raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8; convert it, e.g. with iconv -f LATIN1 -t UTF-8") from None


def _check_times(word: Token, passage: Passage) -> None:
    times = [time for time in word[1:] if time is not None]
    if not all(math.isfinite(time) and time >= 0 for time in times) or times != sorted(times):
        shown = word.text or " ".join(word.text for word in passage.words)[:40]
        raise ValueError(f"{shown!r} is said to last from {word.start} to {word.end} s")


_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\u3040-\u30ff\u3400-\u9fff]+")  # kana and Han, one by one
_WORD = re.compile(r"\[[^\[\]]*\]|\S+")  # also a tag of several words: [background noise]
LONGEST_UNSPACED = 8  # characters of a word in a script without spaces; more are a sentence


def _split(text: str, start: float | None, end: float | None, speaker: str | None = None) -> Passage:
    """Return a passage of the words in `text`. A single one has the times of the passage."""
    words = []
    for word in _WORD.findall(text):
        pieces = _UNSPACED.findall(word)
        words += pieces if len(pieces) > LONGEST_UNSPACED else [word]
    return Passage(speaker, start, end, [Token(words[0], start, end)] if len(words) == 1 else [*map(Token, words)])


# --- JSON: WhisperX, whisper, faster-whisper, whisper-timestamped, the OpenAI API, transformers, whisper.cpp ----------


_KEYS = ("segments", "words", "chunks", "transcription")


def _read_json(text: str) -> Iterator[Passage]:
    content = json.loads(text)
    if not isinstance(content, dict) or not content.keys() & {*_KEYS, "word_segments"}:
        raise ValueError(f"it has none of {', '.join(map(repr, _KEYS))}")
    segments, words, chunks, cues = (_dicts(content, key) for key in _KEYS)
    if words and not any(_dicts(segment, "words") for segment in segments):  # the OpenAI API has them apart
        segments = words
    for segment in segments or _dicts(content, "word_segments"):
        speaker = _text(segment, "speaker", None)
        inner = [
            (Token(_text(word, "word", _text(word, "text", "")).strip(), _time(word, "start"), _time(word, "end")),
             _text(word, "speaker", speaker))
            for word in _dicts(segment, "words")
        ]  # fmt: skip
        start, end = _time(segment, "start"), _time(segment, "end")
        if not inner:
            yield _split(_text(segment, "word", _text(segment, "text", "")), start, end, speaker)
        elif any(len(word.text.split()) > 1 for word, _ in inner):  # sentences that are called words
            yield from (_split(*word, name) for word, name in inner)
            continue
        for name in dict.fromkeys(name for _, name in inner):  # in a segment of several speakers each has a passage
            yield Passage(name, start, end, [word for word, speaks in inner if speaks == name and word.text])
    for chunk in chunks:
        start, end = chunk["timestamp"] if isinstance(chunk.get("timestamp"), list) else (None, None)
        times = {"start": start, "end": end}
        yield _split(_text(chunk, "text", ""), _time(times, "start"), _time(times, "end"))
    for cue in cues:
        offsets = (_time(cue.get("offsets") or {}, key) for key in ("from", "to"))  # milliseconds
        yield _split(_text(cue, "text", ""), *(None if time is None else time / 1000 for time in offsets))


def _dicts(content: dict, key: str) -> list[dict]:
    rows = content.get(key) or []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{key!r} is not a list of dicts")
    return rows


def _text(content: dict, key: str, default: str | None) -> str | None:
    value = content.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key!r} is {value!r}, not a string")
    return default if value is None else value


def _time(content: dict, key: str) -> float | None:
    value = content.get(key)
    if value is not None and type(value) not in (int, float):
        raise ValueError(f"{key!r} is {value!r}, not a number of seconds")
    return value


# --- Lines: CTM and Fisher's transcripts ------------------------------------------------------------------------------


def _numbered(text: str, comment: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        if line.strip() and not line.lstrip().startswith(comment):
            yield number, line.strip()


def _read_ctm(text: str) -> Iterator[Passage]:
    """`recording channel start duration word [confidence]`, as sclite and Kaldi write it. Channels are speakers."""
    for number, line in _numbered(text, ";;"):
        try:
            recording, channel, start, duration, word, *_ = line.split()
            if start == "*":  # marks of alternatives
                continue
            times = float(start), float(start) + float(duration)
        except ValueError:
            raise ValueError(
                f"line {number}: needs 'recording channel start duration word', found {line[:60]!r}"
            ) from None
        yield Passage(channel, *times, [Token(word, *times)], recording)


_FISHER = re.compile(r"([\d.]+)\s+([\d.]+)\s+([^\s:]+)\s*:\s*(.*)")
_NAMED = re.compile(r"([^\s:]+(?: [^\s:]+)?)\s*:\s+(.*)")  # a name of one or two words


def _read_fisher(text: str) -> Iterator[Passage]:
    """`start end speaker: text`, as the LDC's Fisher and CallHome have it; or no times at all, `speaker: text` or text,
    for a diarisation to give them."""
    lines = list(_numbered(text, "#"))
    if not any(_FISHER.match(line) for _, line in lines):
        for _, line in lines:
            match = _NAMED.fullmatch(line)
            yield _split(match[2] if match else line, None, None, match[1] if match else None)
        return
    for number, line in lines:
        match = _FISHER.fullmatch(line)
        if match is None:
            raise ValueError(f"line {number}: needs 'start end speaker: text', found {line[:60]!r}")
        yield _split(match[4], float(match[1]), float(match[2]), match[3])


# --- Subtitles --------------------------------------------------------------------------------------------------------

_CLOCK = r"(?:(\d+):)?(\d+):(\d+)[.,](\d+)"
_CUE = re.compile(rf"^[ \t]*{_CLOCK}[ \t]*-->[ \t]*{_CLOCK}.*\n((?:.*\S.*\n?)*)", re.MULTILINE)
_SPEAKS = re.compile(r"\s*(?:<v(?:\.[^ >]*)? ([^>]+)>|\[([^\]]+)\]:|([\w-]+):(?=\s))")  # of VTT, WhisperX, and others


def _read_subtitles(text: str) -> Iterator[Passage]:
    """SRT and WebVTT. A cue may begin with its speaker: `<v Ann>`, `[SPEAKER_00]:` or `Agent:`."""
    cues = list(_CUE.finditer(text.replace("\r\n", "\n").replace("\r", "\n")))
    if not cues and len(text.split()) > 1:
        raise ValueError("it has no line like 00:00:01,000 --> 00:00:02,500")
    for cue in cues:
        hours, minutes, seconds, fraction = ([cue[i], cue[i + 4]] for i in range(1, 5))
        start, end = (
            3600 * int(hours[i] or 0) + 60 * int(minutes[i]) + float(f"{seconds[i]}.{fraction[i]}") for i in (0, 1)
        )
        speaks = _SPEAKS.match(cue[9])
        said = cue[9][speaks.end() :] if speaks else cue[9]
        speaker = next(filter(None, speaks.groups())) if speaks else None
        yield _split(re.sub(r"<[^>]*>|\{\\[^}]*\}", "", said), start, end, speaker)


# --- Praat ------------------------------------------------------------------------------------------------------------

_PRAAT = re.compile(r'"((?:[^"]|"")*)"|(?<!\S)(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)(?!\S)')  # what is not a label
_NO_WORD = {"", "sil", "sp", "spn", "<eps>", "<p:>", "<sil>", "#"}  # silence, as forced aligners write it


def _read_textgrid(text: str) -> Iterator[Passage]:
    """Praat's long and short text format. A speaker is a tier: `Ann`, or `Ann - words` as the MFA writes it.

    If there are tiers called words, others (phones) are left out.
    """
    fields = iter([match[1] if match[2] is None else float(match[2]) for match in _PRAAT.finditer(text)])

    def take(kind: type):
        value = next(fields, None)
        if not isinstance(value, kind):
            raise ValueError("it is not a TextGrid in Praat's text format")
        return value

    tiers: list[tuple[str, list[tuple[float, float, str]]]] = []
    if (take(str), take(str)) != ("ooTextFile", "TextGrid"):
        raise ValueError("it is no TextGrid")
    take(float), take(float)
    for _ in range(int(take(float))):
        of_intervals, name = take(str) == "IntervalTier", take(str)
        take(float), take(float)
        count = int(take(float))
        if of_intervals:
            tiers.append((name, [(take(float), take(float), take(str).replace('""', '"')) for _ in range(count)]))
        else:  # points
            for _ in range(count):
                take(float), take(str)
    worded = [(name, rows) for name, rows in tiers if re.search(r"\bwords?$", name, re.IGNORECASE)]
    for name, rows in worded or tiers:
        speaker = re.sub(r"\W*\bwords?$", "", name, flags=re.IGNORECASE) or None
        for start, end, said in rows:
            if said.strip().lower() not in _NO_WORD:
                yield _split(said, start, end, speaker)


# By priority: of several transcripts of a recording the first is read. WhisperX, for one, writes .srt and .vtt as well.
READERS: dict[str, Callable[[str], Iterator[Passage]]] = {
    ".json": _read_json, ".ctm": _read_ctm, ".textgrid": _read_textgrid, ".vtt": _read_subtitles,
    ".srt": _read_subtitles, ".txt": _read_fisher,
}  # fmt: skip
