"""What can be wrong with a line of a manifest and the files behind it: audio, word times, prompts, codes.

Nothing is tried out that needs a model's weights; all else is done by the very functions that training calls.
"""

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

from finetune import model
from finetune.args import TrainArgs
from finetune.cli import UserError
from finetune.data import audio, codec, dataset
from finetune.data.audio import FRAME_RATE, FRAME_SIZE, to_frames
from finetune.data.interleaver import Interleaver, TextStats, Word
from finetune.data.manifest import Line, resolve, sidecar
from finetune.data.prompts import MIN_VOICE_FRAMES, Prompter
from finetune.data.talk import LEVEL_SEC, Sound, hear, louder_side, response_gaps, talking
from finetune.make_manifest import ALIKE, TOLERANCE_SEC, decodable_sec
from finetune.personaplex import prompt_length
from finetune.prompt_text import TAG, wrap_system_prompt
from finetune.voices import (
    SAME_SPEAKER,
    VoiceBook,
    load_embedded,
    load_recording,
    load_same_speaker,
    same_speaker_file,
    speech_stretches,
)

# --- 1. What can be wrong ------------------------------------------------------------------------------------------

ERROR, WARNING, NOTE = "error", "warning", "note"


class Kind(NamedTuple):
    level: str
    title: str
    remedy: str


KINDS = {
    "line": Kind(ERROR, "broken manifest line", 'write {"path": ..., "duration": seconds} on each line, as '
                 "finetune.make_manifest does"),
    "mixed": Kind(ERROR, "lines with and without codes", "run precompute_codes.py on all files, or use none"),
    "missing": Kind(ERROR, "missing audio", "put the file there, or take the line out of the manifest"),
    "unreadable": Kind(ERROR, "unreadable audio", "export it again as wav or flac, or take the line out"),
    "channels": Kind(ERROR, "not stereo", "left is the agent, right the user: finetune.make_manifest joins two mono "
                     "files; one mixed recording needs a diarisation tool first (pyannote.audio, NVIDIA NeMo)"),
    "same channels": Kind(ERROR, "the same sound in both channels", "it is a mono recording: get both sides apart, or "
                          "separate the speakers with a diarisation tool (pyannote.audio, NVIDIA NeMo)"),
    "swapped": Kind(ERROR, "channels swapped: the agent's words are loud on the right", "training takes the left one "
                    "as the agent: swap them (sox in.wav out.wav remix 2 1); if left is the agent already, these words "
                    "are the user's: annotate the left channel (annotate.py --channel 0)"),
    "duration": Kind(ERROR, "duration that costs windows", "write the duration that finetune.make_manifest finds"),
    "no words file": Kind(ERROR, "missing word times", "run annotate.py on the manifest"),
    "bad words file": Kind(ERROR, "word times that cannot be read", "remove the .json and run annotate.py again"),
    "past the end": Kind(ERROR, "words after the end of the audio", "the .json belongs to another version of the "
                         "file: remove it and run annotate.py again"),
    "crowded": Kind(ERROR, "tokens dropped: words come faster than 12.5 tokens a second", "look at these word times "
                    "(often Whisper squeezed words together); annotate again, or take the words out"),
    "no agent": Kind(ERROR, "no words of the agent in any file", "set data.speakers to the label of the agent's words"),
    "prompt": Kind(ERROR, "prompt that cannot be used", "write a string that fits: shorten it, or raise "
                   "prompt.max_sec (for train.py, which reads no prompts, check with --no-personaplex)"),
    "voice": Kind(ERROR, "voice that cannot be used", "put the file there, set prompt.voices_dir, or, for "
                  "same_speaker, run precompute_codes.py --same-speaker (for train.py, which reads no prompts, check "
                  "with --no-personaplex)"),
    "codes": Kind(ERROR, "codes that cannot be used", "run precompute_codes.py again"),
    "failed": Kind(ERROR, "file that could not be checked", "look at it; training may stop there"),
    "off": Kind(WARNING, "duration that is not quite true", "write the duration that finetune.make_manifest finds"),
    "clipping": Kind(WARNING, "clipped audio", "record or export with a lower level; Mimi hears the distortion"),
    "silent agent": Kind(WARNING, "agent (left) silent", "teaches the agent to say nothing; is the channel right?"),
    "silent user": Kind(WARNING, "user (right) silent", "teaches the agent to talk alone; is the channel right?"),
    "bleeding": Kind(WARNING, "one speaker is heard in both channels", "training wants them apart: is it one stereo "
                     "microphone, or loudspeakers beside an open one?"),
    "no words": Kind(WARNING, "no words of the agent", "the text stream would be padding; if the agent speaks there, "
                     "annotate again or check data.speakers"),
    "unsorted": Kind(WARNING, "word times out of order", "nothing: they are sorted when read"),
    "odd times": Kind(WARNING, "odd word times", "before the start, ending before they begin, or ending after the "
                      "audio; annotate again if there are many"),
    "late": Kind(WARNING, "text late: words come faster than 12.5 tokens a second", "the text trails the voice there; "
                 "look at these word times"),
    "cut": Kind(WARNING, "words cut short, because data.keep_and_shift is off", "set data.keep_and_shift to true"),
    "script": Kind(WARNING, "text that the tokenizer breaks up", "its letters are outside of the tokenizer's "
                   "vocabulary and cost several tokens each; transliterate, or expect late text"),
    "no text prompt": Kind(WARNING, "no text prompt", "give one (annotate.py --personaplex --text-prompt ...) or set "
                           "prompt.text for all"),
    "no voice prompt": Kind(WARNING, "no voice prompt", "give one (annotate.py --personaplex --voice-prompt ...) or "
                            "set prompt.voice for all, e.g. to same_speaker"),
    "half wrapped": Kind(WARNING, f"text prompt with stray {TAG} tags", f"take the tags out, or write {TAG} at both "
                         "ends; the closing tag has no slash"),
    "own voice": Kind(WARNING, "the recording itself is its voice prompt", "the model can copy: same_speaker takes a "
                      "stretch outside of the window"),
    "no stretch": Kind(WARNING, "same_speaker finds no speech", "it needs a second of the agent outside of the window; "
                       "give a voice file"),
    "duplicate": Kind(WARNING, "the same audio twice", "take one line out, unless it shall count twice"),
    "shared json": Kind(WARNING, "two files share one .json", "rename one of them"),
    "leak": Kind(WARNING, "held-out audio is in the training data", "take it out of one of them: the evaluation would "
                 "measure memory"),
    "unheard": Kind(NOTE, "codes whose audio cannot be heard", "nothing: training needs the codes only; levels were "
                    "not checked"),
    "unwrapped": Kind(NOTE, f"text prompt without {TAG} tags", "nothing: it is wrapped automatically"),
}  # fmt: skip


class Problem(NamedTuple):
    kind: str  # of KINDS
    place: str  # manifest:line
    detail: str  # one sentence that names the file


# --- 2. One file ---------------------------------------------------------------------------------------------------

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
class Facts:
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


class Task(NamedTuple):
    held_out: bool
    source: int
    line: Line

    def facts(self) -> Facts:
        return Facts(*self, said_sec=float(self.line.fields["duration"]))


class _TablesNeeded(Exception):
    """Raised where a voice file could only be checked further with the model's weights: it is sound as such."""


class Checker:
    """Checks lines of manifests, one at a time: no line can end it.

    Args:
        prompts: whether windows begin with a system prompt.
        share_sec: how much of each file is heard.
    """

    def __init__(self, args: TrainArgs, checkpoint: model.Checkpoint, kwargs: dict, prompts: bool, share_sec: float):
        self.args, self.kwargs, self.prompts, self.share_sec = args, kwargs, prompts, share_sec
        self.window_frames = window_frames(args)
        self.spm = checkpoint.tokenizer()
        self.interleaver = Interleaver(self.spm, args.data.keep_and_shift)
        self.archive = functools.cache(lambda: _outcome(checkpoint.voices_archive))
        book = VoiceBook(Path(args.prompt.voices_dir) if args.prompt.voices_dir else None, self._voices_archive)
        self.prompter = Prompter(args.prompt, self.spm, book)
        self.reader = dataset.InterleavedTokenizer(
            self.interleaver, self.window_frames, args.data.speakers, self.prompter
        )
        # None where the codec cannot be reached: training will say so.
        self.mimi = functools.cache(lambda: _outcome(lambda: codec.fingerprint_file(checkpoint.mimi_weights())))
        self.voice_frames = functools.cache(lambda path: _outcome(functools.partial(self._voice_frames, path)))

    def __call__(self, task: Task) -> Facts:
        facts, line = task.facts(), task.line
        try:
            self._check(line, facts)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic inside the decoder is no Exception
            facts.add("failed", f"{type(error).__name__}: {error}")
            facts.windows = [0] * count_windows(facts.said_sec, self.window_frames)
        return facts

    def _check(self, line: Line, facts: Facts) -> None:
        entry = self._codes(line, facts)
        sound = self._sound(line, facts, entry)
        said = count_windows(facts.said_sec, self.window_frames)
        facts.windows = facts.prompt_frames = [0] * said
        words, extra = self._words(line, facts)
        if facts.real_sec is not None:
            frames = to_frames(facts.real_sec) if entry is None else entry["codes"].shape[2]
            self._duration(facts, frames, said)
            if words is not None:
                facts.windows = [
                    max(0, min(self.window_frames, frames - i * self.window_frames)) for i in range(said)
                ]
                self._text(facts, words, frames)
        if sound is not None and words:
            heard, left, right = louder_side(sound.parts, words)
            if right >= SWAPPED_WORDS and right > heard / 2 and right > left:
                facts.add("swapped", f"{right} of {heard} of the agent's words are louder on the right")
        if self.prompts:
            self._prompt(line, extra, words or [], facts, entry)
        if any(KINDS[problem.kind].level == ERROR and problem.kind in SKIPPED for problem in facts.problems):
            facts.windows, facts.text = [0] * said, TextStats()

    def _codes(self, line: Line, facts: Facts) -> dict | None:
        """The pre-computed codes of a line, if it names some that can be used."""
        if "codes_path" not in line.fields:
            return None
        try:
            path = resolve(line.manifest, line.fields["codes_path"])
            entry = codec.load_codes(path)
            codec.check(entry, path=path, mimi_fingerprint=self.mimi()[0], audio_path=line.path)
            if entry["codes"].shape[0] != 2:
                raise UserError(f"{path}: holds {entry['codes'].shape[0]} channel(s); training needs agent and user")
        except (UserError, TypeError) as error:
            facts.add("codes", str(error))
            return None
        facts.real_sec, facts.mimi = entry["duration"], entry["mimi"]
        facts.digest = hashlib.sha256(entry["codes"].numpy().tobytes()).hexdigest()
        return entry

    def _sound(self, line: Line, facts: Facts, entry: dict | None) -> Sound | None:
        path = line.path
        if not os.path.exists(path):
            facts.add("missing" if entry is None else "unheard", "no such file")
            return None
        try:
            if not os.path.isfile(path):
                raise UserError(f"{path}: is not a file")
            info = audio.probe(path)
            real_sec = decodable_sec(path, info)
            if info.channels != 2:
                facts.add("channels", f"has {info.channels} channel(s)")
                return None
            sound = hear(path, info, real_sec, self.share_sec)
        except UserError as error:
            facts.add("unreadable" if entry is None else "unheard", str(error))
            return None
        if entry is None:
            facts.real_sec = real_sec
        if sound.seconds:
            self._levels(sound, facts)
        return sound

    def _levels(self, sound: Sound, facts: Facts) -> None:
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

    def _duration(self, facts: Facts, frames: int, said: int) -> None:
        real = max(1, math.ceil(frames / self.window_frames)) if frames else 0
        tail = facts.real_sec - facts.said_sec
        numbers = f"the manifest says {facts.said_sec:.2f} s, it holds {facts.real_sec:.2f} s"
        if real < said:
            facts.add("duration", f"{numbers}: {said - real} of its {said} windows do not exist and are skipped")
        elif real > said and tail > LOST_SEC:
            facts.add("duration", f"{numbers}: the last {tail:.1f} s are never trained on")
        elif abs(tail) > TOLERANCE_SEC:
            facts.add("off", numbers)

    def _words(self, line: Line, facts: Facts) -> tuple[list[Word] | None, dict]:
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

    def _text(self, facts: Facts, words: list[Word], frames: int) -> None:
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

    def _prompt(self, line: Line, extra: dict, words: list[Word], facts: Facts, entry: dict | None) -> None:
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
            bare = wrap_system_prompt(text).removeprefix(TAG).removesuffix(TAG)
            if TAG in bare or "</system>" in bare:
                facts.add("half wrapped", repr(text if len(text) < 100 else f"{text[:60]} ... {text[-30:]}"))
            elif not text.strip().startswith(TAG):
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

    def _same_speaker(self, line: Line, facts: Facts, words: list[Word], entry: dict | None) -> list[int]:
        """Frames of the voice of each window: the first stretch of the agent outside of it, as training takes it."""
        if entry is None:
            found = speech_stretches(words, facts.said_sec)
        else:
            path = same_speaker_file(resolve(line.manifest, line.fields["codes_path"]))
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


# Kinds for which a file's windows cannot be read in training, so that they are skipped, or never counted.
SKIPPED = {
    "missing", "unreadable", "channels", "no words file", "bad words file", "codes", "prompt", "voice", "failed",
}  # fmt: skip


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
