"""Checking one line of a manifest and the files behind it: audio, word times, prompts, codes."""

import bisect
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from finetune.args import TrainArgs
from finetune.audio.codes import check_codes, fingerprint_file, load_codes
from finetune.audio.files import FRAME_RATE, FRAME_SIZE, HEADER_TOLERANCE_SEC, decodable_sec, probe_audio, to_frames
from finetune.audio.speech import LEVEL_SEC, StereoSound, hear_stereo, louder_side, response_gaps, talking
from finetune.audio.words import Word, sidecar
from finetune.cli import UserError
from finetune.data.batch import TextStats
from finetune.data.interleaver import InterleavedTokenizer, Interleaver
from finetune.data.manifest import Line, resolve_path
from finetune.data.prompter import MIN_VOICE_FRAMES, Prompter
from finetune.model.pretrained import Pretrained
from finetune.prompts.embedded import load_embedded
from finetune.prompts.hybrid import prompt_length
from finetune.prompts.recordings import load_recording
from finetune.prompts.same_speaker import SAME_SPEAKER, load_same_speaker, same_speaker_file, voice_segments
from finetune.prompts.text import SYSTEM_TAG, wrap_system_prompt
from finetune.prompts.voices import VoiceBook
from finetune.tools.check_data.kinds import ERROR, KINDS, SKIPPED, Problem
from finetune.tools.make_manifest.recordings import ALIKE

QUIET_DB = -60.0  # of full scale; a channel that is never louder is silent
CLIPPED_SHARE = 1e-4  # of the samples of a channel
BLEEDING = 0.7  # correlation of the channels; own microphones give about 0, a stereo microphone 0.8 and more
SWAPPED_WORDS = 3  # at least, and more than half of the words heard
LOST_SEC = 1.0  # what may be missing of a file's end
LOST_TOKENS, LOST_SHARE = 5, 0.01  # of a file; a late word that a window's end catches is the price of windows
LATE_SEC = 1.0  # mean lateness of a window's late words
BROKEN_UP = 0.2  # byte or unknown pieces per letter
LETTERS = 20  # so many are needed to judge a file's script


@dataclass
class FileFacts:
    """What is known about one line of a manifest."""

    held_out: bool
    source: int  # which manifest of the training or of the held-out data
    line: Line
    said_sec: float
    problems: list[Problem] = field(default_factory=list)
    real_sec: float | None = None  # that can be decoded; None: nothing can
    windows: list[int] = field(default_factory=list)  # frames of dialogue of each; 0: training would skip it
    prompt_frames: list[int] = field(default_factory=list)  # of each window
    words: int = 0  # of the agent
    tokens: int = 0  # of them
    labels: set[str] = field(default_factory=set)  # of all speakers
    text: TextStats = field(default_factory=TextStats)  # over the windows
    busiest: float = 0.0  # tokens a second in the fullest window
    heard_sec: float = 0.0
    talk_sec: tuple[float, float, float] = (0.0, 0.0, 0.0)  # agent, user, both at once
    gaps: list[float] = field(default_factory=list)  # seconds, see response_gaps
    digest: str | None = None  # of what was heard: equal for equal sound, whatever the container
    mimi: str | None = None  # fingerprint of the codec that made its codes
    prompt: str | None = None
    voice: str | None = None

    @property
    def place(self) -> str:
        return f"{self.line.manifest}:{self.line.number}"

    def add(self, kind: str, detail: str) -> None:
        """Notes a problem; the file is named in front if the sentence does not."""
        if os.path.splitext(self.line.path)[0] not in detail:
            detail = f"{self.line.path}: {detail}"
        self.problems.append(Problem(kind, self.place, " ".join(detail.split())))


class CheckTask(NamedTuple):
    held_out: bool
    source: int
    line: Line

    def facts(self) -> FileFacts:
        return FileFacts(*self, said_sec=float(self.line.fields["duration"]))


class _TablesNeeded(Exception):
    """Raised where a voice file could only be checked further with the model's weights: it is sound as such."""


class Checker:
    """Checks lines of manifests, one at a time: no line can end it.

    Args:
        prompts: whether windows begin with a system prompt.
        share_sec: how much of each file is heard.
    """

    def __init__(self, args: TrainArgs, checkpoint: Pretrained, kwargs: dict, prompts: bool, share_sec: float):
        self.args, self.kwargs, self.prompts, self.share_sec = args, kwargs, prompts, share_sec
        self.window_frames = window_frames(args)
        self.spm = checkpoint.tokenizer()
        self.interleaver = Interleaver(self.spm, args.data.keep_and_shift)
        self.archive = functools.cache(lambda: _outcome(checkpoint.voices_archive))
        book = VoiceBook(Path(args.prompt.voices_dir) if args.prompt.voices_dir else None, self._voices_archive)
        self.prompter = Prompter(args.prompt, self.spm, book)
        self.reader = InterleavedTokenizer(self.interleaver, self.window_frames, args.data.speakers, self.prompter)
        # None where the codec cannot be reached: training will say so.
        self.mimi = functools.cache(lambda: _outcome(lambda: fingerprint_file(checkpoint.mimi_weights())))
        self.voice_frames = functools.cache(lambda path: _outcome(functools.partial(self._voice_frames, path)))

    def __call__(self, task: CheckTask) -> FileFacts:
        facts, line = task.facts(), task.line
        try:
            self._check(line, facts)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic inside the decoder is no Exception
            facts.add("failed", f"{type(error).__name__}: {error}")
            facts.windows = [0] * count_windows(facts.said_sec, self.window_frames)
        return facts

    def _check(self, line: Line, facts: FileFacts) -> None:
        entry = self._codes(line, facts)
        sound = self._sound(line, facts, entry)
        said = count_windows(facts.said_sec, self.window_frames)
        facts.windows = facts.prompt_frames = [0] * said
        words, extra = self._words(line, facts)
        if facts.real_sec is not None:
            frames = to_frames(facts.real_sec) if entry is None else entry["codes"].shape[2]
            self._duration(facts, frames, said)
            if words is not None:
                facts.windows = [max(0, min(self.window_frames, frames - i * self.window_frames)) for i in range(said)]
                self._text(facts, words, frames)
        if sound is not None and words:
            heard, left, right = louder_side(sound.parts, words)
            if right >= SWAPPED_WORDS and right > heard / 2 and right > left:
                facts.add("swapped", f"{right} of {heard} of the agent's words are louder on the right")
        if self.prompts:
            self._prompt(line, extra, words or [], facts, entry)
        if any(KINDS[problem.kind].level == ERROR and problem.kind in SKIPPED for problem in facts.problems):
            facts.windows, facts.text = [0] * said, TextStats()

    def _codes(self, line: Line, facts: FileFacts) -> dict | None:
        """The pre-computed codes of a line, if it names some that can be used."""
        if "codes_path" not in line.fields:
            return None
        try:
            path = resolve_path(line.manifest, line.fields["codes_path"])
            entry = load_codes(path)
            check_codes(entry, path=path, mimi_fingerprint=self.mimi()[0], audio_path=line.path)
            if entry["codes"].shape[0] != 2:
                raise UserError(f"{path}: holds {entry['codes'].shape[0]} channel(s); training needs agent and user")
        except (UserError, TypeError) as error:
            facts.add("codes", str(error))
            return None
        facts.real_sec, facts.mimi = entry["duration"], entry["mimi"]
        facts.digest = hashlib.sha256(entry["codes"].numpy().tobytes()).hexdigest()
        return entry

    def _sound(self, line: Line, facts: FileFacts, entry: dict | None) -> StereoSound | None:
        path = line.path
        if not os.path.exists(path):
            facts.add("missing" if entry is None else "unheard", "no such file")
            return None
        try:
            if not os.path.isfile(path):
                raise UserError(f"{path}: is not a file")
            info = probe_audio(path)
            real_sec = decodable_sec(path, info)
            if info.channels != 2:
                facts.add("channels", f"has {info.channels} channel(s)")
                return None
            sound = hear_stereo(path, info, real_sec, self.share_sec)
        except UserError as error:
            facts.add("unreadable" if entry is None else "unheard", str(error))
            return None
        if entry is None:
            facts.real_sec = real_sec
        if sound.seconds:
            self._levels(sound, facts)
        return sound

    def _levels(self, sound: StereoSound, facts: FileFacts) -> None:
        heard = "" if sound.seconds >= (facts.real_sec or 0) - 1 else f" in the {sound.seconds:.0f} s heard"
        silent = sound.levels.max(axis=1) < QUIET_DB
        for i, name in enumerate(("agent", "user")):
            if silent[i]:
                facts.add(f"silent {name}", f"nothing over {QUIET_DB:g} dB{heard}")
            elif sound.clipped[i] > CLIPPED_SHARE * sound.samples:
                facts.add("clipping", f"{sound.clipped[i] / sound.samples:.2%} of the {name}'s samples{heard}")
        if not silent.any() and abs(sound.correlation) > BLEEDING:
            kind = "same channels" if sound.correlation > ALIKE else "bleeding"
            facts.add(kind, f"correlation {sound.correlation:.2f}{heard}")
        if not silent.all():
            facts.digest = hashlib.sha256(sound.levels.tobytes()).hexdigest()
        parts = talking(sound.parts)
        facts.heard_sec = sound.seconds
        facts.talk_sec = tuple(
            sum(int(choose(active).sum()) for active in parts) * LEVEL_SEC
            for choose in (lambda a: a[0], lambda a: a[1], lambda a: a[0] & a[1])
        )
        facts.gaps = [gap for active in parts for gap in response_gaps(active)]

    def _duration(self, facts: FileFacts, frames: int, said: int) -> None:
        real = max(1, math.ceil(frames / self.window_frames)) if frames else 0
        tail = facts.real_sec - facts.said_sec
        numbers = f"the manifest says {facts.said_sec:.2f} s, it holds {facts.real_sec:.2f} s"
        if real < said:
            facts.add("duration", f"{numbers}: {said - real} of its {said} windows do not exist and are skipped")
        elif real > said and tail > LOST_SEC:
            facts.add("duration", f"{numbers}: the last {tail:.1f} s are never trained on")
        elif abs(tail) > HEADER_TOLERANCE_SEC:
            facts.add("off", numbers)

    def _words(self, line: Line, facts: FileFacts) -> tuple[list[Word] | None, dict]:
        """(words of the agent, None if they cannot be had; prompt fields of the .json)."""
        try:
            (words, extra), _ = self.reader.sidecar(line.path)
        except UserError as error:
            kind = "no words file" if not os.path.exists(sidecar(line.path)) else "bad words file"
            facts.add(kind, str(error))
            return None, {}
        rows = json.loads(sidecar(line.path).read_text(encoding="utf-8"))["alignments"]
        facts.labels = {str(row[2]) for row in rows if len(row) > 2}
        facts.words = len(words)
        if not words:
            others = f", only of {', '.join(sorted(facts.labels))}" if facts.labels else ""
            spoken = f"; the agent speaks for {facts.talk_sec[0]:.0f} s" if facts.talk_sec[0] >= 1 else ""
            facts.add("no words", f"no words of {', '.join(self.args.data.speakers)}{others}{spoken}")
        own = [float(row[1][0]) for row in rows if len(row) < 3 or row[2] in self.args.data.speakers]
        backward = sum(b < a for a, b in itertools.pairwise(own))
        if backward:
            facts.add("unsorted", f"{backward} of {len(own)} words start before the one in front of them")
        return words, extra

    def _text(self, facts: FileFacts, words: list[Word], frames: int) -> None:
        """Lays the words out, window by window, as training does."""
        end_sec = facts.real_sec
        after = [word for word in words if word[1] * FRAME_RATE >= frames]
        if after:
            facts.add("past the end", f"{len(after)} of {len(words)} words start after the audio's {end_sec:.2f} s, "
                      f"the last at {after[-1][1]:.2f} s")  # fmt: skip
        odd = sum(s < 0 or e < s or (e > end_sec + 0.5 and s * FRAME_RATE < frames) for _, s, e in words)
        if odd:
            facts.add("odd times", f"{odd} of {len(words)} words")
        ids = [i for word in words for i in self.interleaver.encode(word[0])]
        facts.tokens = len(ids)
        letters = sum(len("".join(word[0].split())) for word in words)
        broken = sum(self.spm.is_byte(i) or self.spm.is_unknown(i) for i in ids)
        if letters >= LETTERS and broken > BROKEN_UP * letters:
            example = max((word[0] for word in words), key=lambda text: len(self.interleaver.encode(text)))
            facts.add("script", f"{broken} byte or unknown pieces for {letters} letters, such as "
                      f"{len(self.interleaver.encode(example))} tokens for {example!r}")  # fmt: skip

        starts = [start for _, start, _ in words]
        longest = max((end - start for _, start, end in words), default=0.0)
        lost = most = late = 0
        worst = where = latest = 0.0
        for i, count in enumerate(facts.windows):
            if count == 0:
                continue
            begin = i * self.window_frames / FRAME_RATE
            near = words[bisect.bisect_left(starts, begin - longest - 0.1) :
                         bisect.bisect_left(starts, begin + count / FRAME_RATE + 0.1)]  # fmt: skip
            _, stats = self.interleaver(near, begin, count)
            facts.text.add(stats)
            facts.busiest = max(facts.busiest, (stats.placed + stats.dropped) * FRAME_RATE / count)
            if stats.late and stats.late_frames / stats.late > max(LATE_SEC * FRAME_RATE, latest):
                late, latest = stats.late, stats.late_frames / stats.late
                where = begin
            if stats.dropped:
                here = self._crowded(near, begin, count)
                lost += here
                if here > most:
                    most, worst = here, begin
        if lost >= LOST_TOKENS and lost > LOST_SHARE * facts.tokens:
            kind = "crowded" if self.args.data.keep_and_shift else "cut"
            facts.add(kind, f"{lost} of {facts.tokens} tokens find no frame, {most} of them in the window at "
                      f"{worst:.1f} s")  # fmt: skip
        elif late:
            facts.add("late", f"in the window at {where:.1f} s {late} words come {latest / FRAME_RATE:.1f} s late on "
                      "average")  # fmt: skip

    def _crowded(self, words: list[Word], begin: float, count: int) -> int:
        """Tokens lost in a window for want of room, not at its ends: of words that would fit into it if alone.

        The word that a window's end cuts is lost at every cut; it says nothing about the data.
        """
        inside = []
        for word in words:
            due = math.floor(round((word[1] - begin) * FRAME_RATE, 6))
            if due >= 0 and due + len(self.interleaver.encode(word[0])) <= count:
                inside.append(word)
        return self.interleaver(inside, begin, count)[1].dropped

    def _prompt(self, line: Line, extra: dict, words: list[Word], facts: FileFacts, entry: dict | None) -> None:
        text, voice = self.prompter.names(line, extra)
        for key, value in (("text_prompt", text), ("voice_prompt", voice)):
            if value is not None and not isinstance(value, str):
                facts.add("prompt", f"{key} is {value!r}, not a string")
        ids: list[int] = []
        if text is None or (isinstance(text, str) and not text.strip()):
            facts.add("no text prompt", "has no text prompt")
        elif isinstance(text, str):
            facts.prompt = text
            ids = self.prompter.encode(text)
            least = 0 if voice is None else MIN_VOICE_FRAMES
            room = max(0, self.prompter.max_frames - prompt_length(least, 0))
            if len(ids) > room:
                beside = f" beside {least} frames of voice" if least else ""
                facts.add("prompt", f"its text prompt has {len(ids)} tokens; {room}{beside} fit in prompt.max_sec = "
                          f"{self.args.prompt.max_sec:g} s: {text[:60]!r}")  # fmt: skip
            bare = wrap_system_prompt(text).removeprefix(SYSTEM_TAG).removesuffix(SYSTEM_TAG)
            if SYSTEM_TAG in bare or "</system>" in bare:
                facts.add("half wrapped", repr(text if len(text) < 100 else f"{text[:60]} ... {text[-30:]}"))
            elif not text.strip().startswith(SYSTEM_TAG):
                facts.add("unwrapped", repr(text[:60]))
        room = self.prompter.max_frames - prompt_length(0, len(ids))
        voices = [0] * len(facts.windows)
        if voice is None:
            facts.add("no voice prompt", "has no voice prompt")
        elif voice == SAME_SPEAKER:
            facts.voice = SAME_SPEAKER
            voices = self._same_speaker(line, facts, words, entry)
        elif isinstance(voice, str):
            try:
                path = self.prompter.book.find(voice, line.path.parent)
                frames = _result(self.voice_frames(path))
                if path.suffix == ".pt" and frames > room:
                    raise UserError(f"{path}: {frames} frames do not fit beside the text; raise prompt.max_sec")
                if path.exists() and os.path.exists(line.path) and path.samefile(line.path):
                    facts.add("own voice", f"its voice prompt is {voice}")
                facts.voice = str(path)
                voices = [frames] * len(facts.windows)
            except UserError as error:
                facts.add("voice", f"{line.path}: {error}")
        facts.prompt_frames = [prompt_length(min(frames, max(0, room)), len(ids)) for frames in voices]

    def _same_speaker(self, line: Line, facts: FileFacts, words: list[Word], entry: dict | None) -> list[int]:
        """Frames of the voice of each window: the first stretch of the agent outside of it, as training takes it."""
        if entry is None:
            found = voice_segments(words, facts.said_sec)
        else:
            path = same_speaker_file(resolve_path(line.manifest, line.fields["codes_path"]))
            try:
                stretches = load_same_speaker(path, entry["mimi"], self.args.data.speakers)
            except UserError as error:
                facts.add("voice", f"{line.path}: {error}")
                return [0] * len(facts.windows)
            found = [(stretch["start"], stretch["end"]) for stretch in stretches]
        out = []
        for i, count in enumerate(facts.windows):
            begin = i * self.window_frames / FRAME_RATE
            end = begin + count / FRAME_RATE
            frames = (math.ceil((b - a) * FRAME_RATE) for a, b in found if b <= begin or a >= end)
            out.append(next(frames, 0))
        without = sum(not frames for frames, count in zip(out, facts.windows) if count)
        if without:
            facts.add("no stretch", f"{without} of its {len(out)} windows go without a voice")
        return out

    def _voice_frames(self, path: Path) -> int:
        if path.suffix != ".pt":
            return math.ceil(len(load_recording(path)) / FRAME_SIZE)
        if self.args.trains_embeddings:
            raise UserError(
                f"{path}: holds embeddings of the tables as they were, and this run trains the tables; use the "
                "recording itself"
            )

        def embed(_: torch.Tensor) -> torch.Tensor:
            raise _TablesNeeded

        with contextlib.suppress(_TablesNeeded):
            load_embedded(path, self.kwargs["delays"], embed)
        embeddings = torch.load(path, map_location="cpu", weights_only=True)["embeddings"]
        if embeddings.shape[-1] != self.kwargs["dim"]:
            raise UserError(
                f"{path}: made for a model of dimension {embeddings.shape[-1]}; this one has {self.kwargs['dim']}"
            )
        return embeddings.shape[0] + 1

    def _voices_archive(self) -> Path | None:
        # Asked once, also where the answer is an error: without a network each question costs a time-out.
        return _result(self.archive())


def _outcome(function: Callable) -> tuple[object, UserError | None]:
    """(result, error): errors are worth remembering like results."""
    try:
        return function(), None
    except UserError as error:
        return None, error


def _result(outcome: tuple[object, UserError | None]) -> object:
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def window_frames(args: TrainArgs) -> int:
    return to_frames(args.duration_sec)


def count_windows(duration_sec: float, window_frames: int) -> int:
    """Windows of a file, as finetune.data.dataset.ManifestIndex counts them."""
    return max(1, math.ceil(to_frames(duration_sec) / window_frames))
