"""Which prompt a window gets: its own, the default of the settings, or none."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch

from finetune.args import PromptArgs
from finetune.audio.files import FRAME_RATE, FRAME_SIZE, probe_audio
from finetune.audio.words import Word
from finetune.cli import UserError
from finetune.data.manifest import Line
from finetune.prompts.hybrid import VoicePrompt, prompt_length
from finetune.prompts.same_speaker import SAME_SPEAKER, segment_audio, voice_segments
from finetune.prompts.text import wrap_system_prompt
from finetune.prompts.voices import VoiceBook


class PromptParts(NamedTuple):
    """A prompt before it is built: the voice, or the sound of it where it is still to be encoded, and the text."""

    voice: VoicePrompt | None
    pcm: np.ndarray | None  # [samples] float32 at 24 kHz, normalised
    text_ids: list[int]
    voiceless: bool = False  # a voice was wanted, and there is none


MIN_VOICE_FRAMES = 12  # 1 s: of less nobody knows a voice
_TEXTS_KEPT = 10_000  # token ids of texts


class Prompter:
    """Chooses and checks prompts.

    A window's text and voice are those of its manifest line, else of the `.json` beside the audio, else the settings'.

    Before it is used, and handed to workers, the files that `check` returns have to be loaded into `voices`.
    """

    def __init__(
        self,
        args: PromptArgs,
        tokenizer: sentencepiece.SentencePieceProcessor,
        book: VoiceBook,
    ):
        self.args = args
        self.tokenizer = tokenizer
        self.book = book
        self.max_frames = int(args.max_sec * FRAME_RATE)
        self.voices: dict[Path, VoicePrompt] = {}
        self._texts: dict[str, list[int]] = {}

    def names(self, line: Line, extra: dict) -> tuple[str | None, str | None]:
        """(text, voice) of a file, as they are written; None: without."""
        text = line.fields.get("text_prompt") or extra.get("text_prompt") or self.args.text
        voice = line.fields.get("voice_prompt") or extra.get("voice_prompt") or self.args.voice
        return text, voice

    def scan(self, files: Iterable[tuple[Line, dict]]) -> tuple[list[Path], dict[str, str]]:
        """The files of the voices that recordings name, each once, and a sentence for each prompt that cannot be used.

        Args:
            files: (manifest line, prompt fields of the .json) of each.
        """
        problems: dict[str, str] = {}
        wanted: dict[Path, None] = {}
        checked: set[tuple[int, bool]] = set()
        for line, extra in files:
            text, voice = self.names(line, extra)
            for key, value in (("text_prompt", text), ("voice_prompt", voice)):
                if value is not None and not isinstance(value, str):
                    problems.setdefault(f"{key}{value!r}", f"{line.path}: {key} is {value!r}, not a string")
            if isinstance(text, str) and (hash(text), voice is None) not in checked:
                checked.add((hash(text), voice is None))
                count = len(self.encode(text))
                least = 0 if voice is None else MIN_VOICE_FRAMES
                if prompt_length(least, count) > self.max_frames:
                    beside = f" beside {MIN_VOICE_FRAMES} frames of voice" if least else ""
                    problems[text] = (
                        f"{line.path}: its text prompt has {count} tokens, and prompt.max_sec {self.args.max_sec:g} "
                        f"has room for {max(0, self.max_frames - prompt_length(least, 0))}{beside}: {text[:60]!r}"
                    )
            if isinstance(voice, str) and voice != SAME_SPEAKER:
                try:
                    wanted[self.book.find(voice, line.path.parent)] = None
                except UserError as error:
                    problems.setdefault(voice, f"{line.path}: {error}")
        return list(wanted), problems

    @staticmethod
    def check(scans: Iterable[tuple[list[Path], dict[str, str]]]) -> list[Path]:
        """The voices of several `scan`s together. Raises UserError listing the prompts that cannot be used."""
        scans = list(scans)
        problems = {key: sentence for _, found in scans for key, sentence in found.items()}
        if problems:
            listed = "".join(f"\n  - {p}" for p in list(problems.values())[:20])
            more = f"\n  - and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise UserError(f"prompts cannot be used:{listed}{more}")
        return list(dict.fromkeys(path for wanted, _ in scans for path in wanted))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text prompt, wrapped once; an empty text gives none."""
        if text not in self._texts:
            if len(self._texts) == _TEXTS_KEPT:
                self._texts.clear()
            ids = self.tokenizer.encode(wrap_system_prompt(text), add_bos=False, add_eos=False)
            self._texts[text] = ids
        return self._texts[text]

    def __call__(
        self,
        line: Line,
        extra: dict,
        words: list[Word],
        window: tuple[float, float],
        generator: np.random.Generator | None,
        stretches: Callable[[], list[dict]] | None,
    ) -> PromptParts:
        """The prompt of a window.

        Args:
            window: (start, end) of it in seconds of the file.
            generator: draws the drop-out; None: nothing is dropped.
            stretches: gives the file's encoded `same_speaker` stretches, where codes are pre-computed; None: the
                sound is taken from the recording.
        """
        text, name = self.names(line, extra)
        if generator is not None:
            drops = generator.random(2)
            text = None if drops[0] < self.args.drop_text else text
            name = None if drops[1] < self.args.drop_voice else name
        ids = self.encode(text) if text else []
        room = self.max_frames - prompt_length(0, len(ids))
        if room < 0:
            raise UserError(f"{line.path}: its text prompt of {len(ids)} tokens does not fit prompt.max_sec")
        if name == SAME_SPEAKER:
            voice, pcm = self._same_speaker(line, words, window, stretches)
            voice, pcm = _cut_voice(voice, room), None if pcm is None or room == 0 else pcm[: room * FRAME_SIZE]
            return PromptParts(voice, pcm, ids, voiceless=voice is None and pcm is None)
        voice = None
        if name:
            path = self.book.find(name, line.path.parent)
            if path not in self.voices:
                raise UserError(f"{line.path}: its voice {name!r} was not there when the run began; start it again")
            voice = self.voices[path]
        return PromptParts(_cut_voice(voice, room), None, ids)

    def _same_speaker(
        self, line: Line, words: list[Word], window: tuple[float, float], stretches: Callable[[], list[dict]] | None
    ) -> tuple[VoicePrompt | None, np.ndarray | None]:
        """The first stretch of the agent's speech outside the window; without one, no voice prompt."""
        if stretches is not None:
            for stretch in stretches():
                if stretch["end"] <= window[0] or stretch["start"] >= window[1]:
                    return VoicePrompt(SAME_SPEAKER, codes=stretch["codes"].long()), None
            return None, None
        for start, end in voice_segments(words, probe_audio(line.path).duration_sec):
            if end <= window[0] or start >= window[1]:
                pcm = segment_audio(line.path, start, end)
                if pcm is not None:
                    return None, pcm
        return None, None


def _cut_voice(voice: VoicePrompt | None, room: int) -> VoicePrompt | None:
    """A voice of at most `room` frames: a recording loses its end; embeddings cannot be cut."""
    if voice is None or voice.frames <= room:
        return voice
    if voice.embeddings is not None:
        raise UserError(
            f"{voice.name}: {voice.frames} frames do not fit beside the text; raise prompt.max_sec "
            f"(a .pt voice cannot be cut)"
        )
    return voice._replace(codes=voice.codes[:, :room]) if room > 0 else None


def parts_to_voice(parts: PromptParts, codes: torch.Tensor | None) -> VoicePrompt | None:
    """The voice of a prompt, with `codes` of its sound if that was encoded just now."""
    return parts.voice if codes is None else VoicePrompt(SAME_SPEAKER, codes=codes)
