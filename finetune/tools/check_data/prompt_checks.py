"""Check the text and voice prompts of a file, and choose the prompt of each window as training does."""

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch

from finetune.args import TrainArgs
from finetune.audio.files import FRAME_RATE, to_frames
from finetune.audio.speech import voice_activity
from finetune.audio.words import Word
from finetune.cli import UserError
from finetune.data.manifest import resolve_path
from finetune.data.prompter import Prompter, longest_prompt
from finetune.data.voice_supply import another_call, describe_shortage, group_speakers, voice_source
from finetune.model.pretrained import Pretrained
from finetune.prompts.hybrid import VoicePrompt, prompt_length
from finetune.prompts.recordings import check_speech, load_recording, why_not_served
from finetune.prompts.same_speaker import find_segments, load_same_speaker, same_speaker_file
from finetune.prompts.text import SYSTEM_TAG, wrap_system_prompt
from finetune.prompts.voices import VoiceBook, load_voices
from finetune.streams import CODEBOOKS
from finetune.tools.check_data.findings import FileFacts, Problem


class PromptChecker:
    """Checks prompts with the Prompter of training. Nothing is encoded: the codes of voices are zeros.

    Args:
        kwargs: of LMModel.
        window_frames: longest dialogue of a window.
    """

    def __init__(self, args: TrainArgs, checkpoint: Pretrained, kwargs: dict, window_frames: int):
        self.args, self.kwargs, self.window_frames = args, kwargs, window_frames
        folder = Path(args.prompt.voices_dir) if args.prompt.voices_dir else None
        book = VoiceBook(folder, _remember(checkpoint.voices_archive))
        self.prompter = Prompter(args.prompt, checkpoint.tokenizer(), book)
        self.load_voice = _remember(self._load_voice)

    def check(self, facts: FileFacts, extra: dict, words: list[Word], entry: dict | None) -> None:
        """Check the prompts of a file and set its `prompt_frames`.

        Args:
            extra, words: prompt fields and words of the .json.
            entry: the pre-computed codes, if any.
        """
        line, segments = facts.line, []
        text, voice = self.prompter.names(line, extra)
        self._check_text(facts, text, voice)
        if voice is None:
            facts.add("no voice prompt", "has no voice prompt")
        try:
            path = self.prompter.find_voice(voice, line)
            if path is not None:
                self.prompter.voices[path] = self.load_voice(path)
                if os.path.exists(line.path) and path.samefile(line.path):
                    facts.add("own voice", f"its voice prompt is {voice}")
                elif path.suffix != ".pt" and (why := why_not_served(path)):
                    facts.add("unserved voice", f"its voice prompt {voice} is of {why}")
            elif voice is not None:
                segments = self._same_speaker(facts, words, entry)
                facts.voices = voice_source(line, line.number, [(each["start"], each["end"]) for each in segments])
            facts.voice = voice if path is None else str(path)
            if facts.has("prompt"):
                return
            for i, frames in enumerate(facts.windows):
                start = i * self.window_frames
                window = (start / FRAME_RATE, (start + frames) / FRAME_RATE)
                parts = self.prompter(line, extra, window, None, lambda _: segments)
                facts.prompt_frames[i] = prompt_length(parts.voice.frames if parts.voice else 0, len(parts.text_ids))
                if facts.voices is None or facts.voices.speaker is None:  # else another call may lend its voice
                    facts.windows[i] = max(0, frames - parts.head - parts.tail)
                facts.voiceless[i] = parts.voiceless and frames > 0
        except UserError as error:
            facts.add("voice", f"{line.path}: {error}")

    def _check_text(self, facts: FileFacts, text: object, voice: object) -> None:
        try:
            self.prompter.check_text(text, voice)
        except UserError as error:
            facts.add("prompt", str(error))
        if text is None or (isinstance(text, str) and not text.strip()):
            facts.add("no text prompt", "has no text prompt")
        elif isinstance(text, str):
            facts.prompt = text
            bare = wrap_system_prompt(text).removeprefix(SYSTEM_TAG).removesuffix(SYSTEM_TAG)
            if SYSTEM_TAG in bare or "</system>" in bare:
                facts.add("half wrapped", repr(text if len(text) < 100 else f"{text[:60]} ... {text[-30:]}"))
            elif not text.strip().startswith(SYSTEM_TAG):
                facts.add("unwrapped", repr(text[:60]))

    def _same_speaker(self, facts: FileFacts, words: list[Word], entry: dict | None) -> list[dict]:
        """Return the segments that training would take, in the form of `load_same_speaker`."""
        if entry is not None:
            path = same_speaker_file(resolve_path(facts.line.manifest, facts.line.fields["codes_path"]))
            return load_same_speaker(path, entry["mimi"], self.args.data.speakers)
        segments = []
        for start, end in find_segments(facts.line.path, words):
            codes = torch.zeros(CODEBOOKS, math.ceil((end - start) * FRAME_RATE), dtype=torch.int16)
            segments.append({"start": start, "end": end, "codes": codes})
        return segments

    def _load_voice(self, path: Path) -> VoicePrompt:
        if path.suffix != ".pt":
            speech = voice_activity(load_recording(path))
            check_speech(speech, self.prompter.room([]), str(path))
            frames = len(speech)
            return VoicePrompt(path.name, codes=torch.zeros(CODEBOOKS, frames, dtype=torch.int64))

        def embed(_: torch.Tensor) -> torch.Tensor:
            # The tables of the model are not loaded, so that the file is compared with itself, except for its width.
            row = torch.load(path, map_location="cpu", weights_only=True)["embeddings"][-1, 0, 0].float()
            return row if len(row) == self.kwargs["dim"] else torch.zeros(self.kwargs["dim"])

        no_codec = None  # is not needed for a .pt
        delays, trains_embeddings = self.kwargs["delays"], self.args.trains_embeddings
        return load_voices([path], no_codec, no_codec, embed, delays, trains_embeddings)[path]


def find_voiceless(facts: list[FileFacts], args: TrainArgs) -> list[Problem]:
    """Return which files of a data source have windows without a `same_speaker` voice, after calls of one speaker have
    lent each other theirs; and the sentence with which training would end."""
    sources = [own.voices for own in facts if own.voices is not None]
    known, problems = group_speakers(sources), []
    for own in (own for own in facts if own.voices is not None and any(own.voiceless)):
        lender = another_call(known, own.voices)
        if lender is None:
            detail = f"{own.line.path}: {sum(own.voiceless)} of its {len(own.windows)} windows have no voice"
            problems.append(Problem("no segment", own.place, detail))
            continue
        start, end = lender.spans[0]
        for i in (i for i, lacks in enumerate(own.voiceless) if lacks):
            own.voiceless[i] = False
            own.prompt_frames[i] = min(longest_prompt(args.prompt), own.prompt_frames[i] + to_frames(end - start))
    if problems and not args.prompt.allow_voiceless:
        windows = sum(len(own.windows) for own in facts)
        sentence = describe_shortage(sources, windows, args.duration_sec, args.prompt.reserve_sec)
        problems.append(Problem("no voice", str(facts[0].line.manifest), sentence))
    return problems


def _remember(function: Callable) -> Callable:
    """Cache results and also errors: without a network each attempt takes until its time-out."""

    @functools.cache
    def outcome(*args):
        try:
            return function(*args)
        except UserError as error:
            return error

    def call(*args):
        result = outcome(*args)
        if isinstance(result, UserError):
            raise UserError(str(result))  # the kept one would grow by a traceback each time it is raised
        return result

    return call
