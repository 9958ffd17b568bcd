"""Choose the prompt of each window, and check the prompts of all files before a run."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

from finetune.args import PromptArgs, TrainArgs
from finetune.audio.files import FRAME_RATE, FRAME_SIZE, to_frames
from finetune.cli import UserError
from finetune.data.manifest import Line
from finetune.data.voice_supply import SpeakerCalls, VoiceSource, another_call, choose_segment, voice_source
from finetune.prompts.hybrid import VoicePrompt, prompt_length
from finetune.prompts.same_speaker import SAME_SPEAKER, segment_audio
from finetune.prompts.text import wrap_system_prompt
from finetune.prompts.voices import VoiceBook

MIN_VOICE_FRAMES = 12  # 1 s; a shorter voice prompt hardly conveys a voice
_MAX_TEXTS = 10_000  # texts whose token ids are kept


class PromptParts(NamedTuple):
    """A prompt whose voice may still have to be encoded."""

    voice: VoicePrompt | None
    pcm: np.ndarray | None  # the voice as audio, [samples] float32 at 24 kHz
    text_ids: list[int]
    voiceless: bool = False  # without a voice, for whatever reason
    head: int = 0  # frames of dialogue that the window gives up for its voice, at its start
    tail: int = 0  # and at its end


def bullet_list(sentences: list[str], shown: int = 20) -> str:
    """Return the first sentences as a list, one per line, for the end of an error message."""
    more = [f"and {len(sentences) - shown} more"] if len(sentences) > shown else []
    return "".join(f"\n  - {sentence}" for sentence in sentences[:shown] + more)


def longest_prompt(args: PromptArgs) -> int:
    """Return the number of frames that prompt.max_sec allows."""
    return int(args.max_sec * FRAME_RATE)


def check_context(args: TrainArgs, context: int | None) -> None:
    """Raise UserError if a window and its prompt exceed the context of the model (in frames; None: unlimited)."""
    if context and to_frames(args.duration_sec) + longest_prompt(args.prompt) > context:
        found = f"duration_sec {args.duration_sec:g} and prompt.max_sec {args.prompt.max_sec:g}"
        limit = f"{context / FRAME_RATE:g} s that the model attends to, so that it would forget its prompt"
        raise UserError(f"{found} together exceed the {limit}; shorten one of them")


class Prompter:
    """Chooses prompts: those of the manifest line, else of the `.json` next to the audio, else of the settings.

    Load the files that `check` returns into `voices` before the first call. `speakers` are the files that lend their
    voice to other calls, and `line_of` returns the line of one.
    """

    def __init__(self, args: PromptArgs, tokenizer: sentencepiece.SentencePieceProcessor, book: VoiceBook):
        self.args, self.tokenizer, self.book = args, tokenizer, book
        self.max_frames = longest_prompt(args)
        self.voices: dict[Path, VoicePrompt] = {}
        self.speakers: SpeakerCalls = {}
        self.line_of: Callable[[VoiceSource], Line] | None = None
        self._texts: dict[str, list[int]] = {}

    def names(self, line: Line, extra: dict) -> tuple[str | None, str | None]:
        """Return (text, voice) of a file, unchanged; None if it has none, or opts out with an empty one.

        `extra`: the prompt fields of its .json.
        """

        def given(key: str, default: str | None) -> str | None:
            value = next((found for found in (line.fields.get(key), extra.get(key)) if found is not None), default)
            return None if isinstance(value, str) and not value.strip() else value

        return given("text_prompt", self.args.text), given("voice_prompt", self.args.voice)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text prompt, wrapped once."""
        if text not in self._texts:
            if len(self._texts) == _MAX_TEXTS:
                self._texts.clear()
            self._texts[text] = self.tokenizer.encode(wrap_system_prompt(text), add_bos=False, add_eos=False)
        return self._texts[text]

    def room(self, text_ids: list[int]) -> int:
        """Return the number of frames that a text leaves for the voice; negative if the text alone is too long."""
        return self.max_frames - prompt_length(0, len(text_ids))

    def check_text(self, text: object, voice: object) -> None:
        """Raise UserError if a text prompt cannot be used, or leaves no room for `voice` (None: no voice)."""
        if text is None:
            return
        if not isinstance(text, str):
            raise UserError(f"text_prompt is {text!r}, not a string")
        ids, least = self.encode(text), 0 if voice is None else MIN_VOICE_FRAMES
        if self.room(ids) < least:
            room, and_voice = max(0, self.room([]) - least), f" next to {least} frames of voice" if least else ""
            limit = f"prompt.max_sec {self.args.max_sec:g} has room for {room}{and_voice}"
            raise UserError(f"its text prompt has {len(ids)} tokens, and {limit}: {text[:60]!r}")

    def find_voice(self, voice: object, line: Line) -> Path | None:
        """Return the file of the voice of a line, None for no voice or `same_speaker`. Raises UserError."""
        if voice is None or voice == SAME_SPEAKER:
            return None
        if not isinstance(voice, str):
            raise UserError(f"voice_prompt is {voice!r}, not a string")
        return self.book.find(voice, line.path.parent, line.manifest.parent)

    def scan(self, files: Iterable[tuple[Line, dict]]) -> tuple[list[Path], dict[str, str]]:
        """Check the prompts of files, given as (manifest line, prompt fields of the .json).

        Returns (voice files, a sentence for each prompt that cannot be used), without repetitions.
        """
        voices: dict[Path, None] = {}
        problems: dict[str, str] = {}
        for line, extra in files:
            text, voice = self.names(line, extra)
            for check, *prompt in ((self.check_text, text, voice), (self.find_voice, voice, line)):
                try:
                    path = check(*prompt)
                except UserError as error:
                    problems.setdefault(f"{check.__name__} {prompt[0]!r}", f"{line.path}: {error}")
                else:
                    voices |= {} if path is None else {path: None}
        return list(voices), problems

    @staticmethod
    def check(scans: Iterable[tuple[list[Path], dict[str, str]]]) -> list[Path]:
        """Return the voice files of several `scan`s. Raises UserError listing the prompts that cannot be used."""
        scans = list(scans)
        problems = {prompt: sentence for _, found in scans for prompt, sentence in found.items()}
        if problems:
            raise UserError(f"prompts cannot be used:{bullet_list(list(problems.values()))}")
        return list(dict.fromkeys(path for voices, _ in scans for path in voices))

    def __call__(
        self, line: Line, extra: dict, window: tuple[float, float], generator: np.random.Generator | None,
        segments: Callable[[Line], list[dict]],
    ) -> PromptParts:  # fmt: skip
        """Return the prompt of a window. Raises UserError if it does not fit or has an unknown voice.

        Args:
            extra: prompt fields of the .json.
            window: (start, end) in seconds of the file.
            generator: draws the prompt dropout and the call of the same speaker; None: nothing is dropped.
            segments: returns the `same_speaker` segments of a file (`load_same_speaker`); those without codes are read
                from the audio.
        """
        text, name = self.names(line, extra)
        if generator is not None:
            drops = generator.random(2)
            text = None if drops[0] < self.args.drop_text else text
            name = None if drops[1] < self.args.drop_voice else name
        ids = self.encode(text) if text else []
        room = self.room(ids)
        if room < 0:
            raise UserError(f"{line.path}: its text prompt of {len(ids)} tokens does not fit prompt.max_sec")
        if name == SAME_SPEAKER:
            voice, pcm, head, tail = self._same_speaker(line, window, generator, segments)
            voice, pcm = _fit_voice(voice, room), None if pcm is None or room == 0 else pcm[: room * FRAME_SIZE]
            return PromptParts(voice, pcm, ids, voice is None and pcm is None, head, tail)
        path = self.find_voice(name, line)
        if path is not None and path not in self.voices:
            raise UserError(f"{line.path}: its voice {name!r} was not there when the run began; start it again")
        voice = _fit_voice(self.voices.get(path), room)
        return PromptParts(voice, None, ids, voiceless=voice is None)

    def _same_speaker(
        self, line: Line, window: tuple[float, float], generator: np.random.Generator | None,
        segments: Callable[[Line], list[dict]],
    ) -> tuple[VoicePrompt | None, np.ndarray | None, int, int]:  # fmt: skip
        """Return (voice as codes, or as audio, frames that the window gives up at its start, and at its end).

        It is the agent's speech outside of the window; else the best of another call of the same speaker; else, with
        prompt.reserve_sec, a part of the window. (None, None, 0, 0) if there is none of these.
        """
        found = segments(line)
        spans = [(segment["start"], segment["end"]) for segment in found]
        choice, lender = choose_segment(spans, window), None
        if choice is None:
            source = voice_source(line, 0, spans)
            files = len(self.speakers.get((line.manifest, source.speaker), ()))
            first = line.number if generator is None or not files else int(generator.integers(files))
            lender = another_call(self.speakers, source, first)
        if lender is not None:
            line = self.line_of(lender)
            segment, head, tail = segments(line)[0], 0, 0
        elif choice := choice or choose_segment(spans, window, self.args.reserve_sec):
            segment, head, tail = found[choice.segment], choice.head, choice.tail
        else:
            return None, None, 0, 0
        if "codes" in segment:
            return VoicePrompt(SAME_SPEAKER, segment["codes"].long()), None, head, tail
        return None, segment_audio(line.path, segment["start"], segment["end"]), head, tail


def _fit_voice(voice: VoicePrompt | None, room: int) -> VoicePrompt | None:
    """Shorten a voice to `room` frames by its end. Raises UserError for embeddings, which have only one length."""
    if voice is None or voice.frames <= room:
        return voice
    if voice.embeddings is not None:
        remedy = "raise prompt.max_sec (a .pt voice cannot be shortened)"
        raise UserError(f"{voice.name}: {voice.frames} frames do not fit next to the text; {remedy}")
    return voice._replace(codes=voice.codes[:, :room]) if room > 0 else None
