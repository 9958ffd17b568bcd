"""Word times -> the text stream (Moshi's inner monologue), and audio or codes -> samples."""

import abc
import bisect
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from moshi.models import MimiModel
from pydantic_core import from_json
from torch import Tensor

from finetune.audio.codec import encode_audio
from finetune.audio.codes import check_codes, load_codes
from finetune.audio.files import FRAME_RATE, FRAME_SIZE, read_audio
from finetune.audio.words import MAIN_SPEAKER, PROMPT_FIELDS, Word, read_alignments, sidecar
from finetune.cli import UserError
from finetune.data.batch import Sample, TextStats
from finetune.data.cache import LRUCache
from finetune.data.manifest import Line, resolve_path
from finetune.data.prompter import Prompter, PromptParts, parts_to_voice
from finetune.prompts.hybrid import build_prompt
from finetune.prompts.same_speaker import load_same_speaker, same_speaker_file
from finetune.streams import CODEBOOKS, TEXT_EPAD, TEXT_PAD, stack_streams

LONGEST_WORD_SEC = 60.0  # what claims to last longer is a mistake, and is not said again in later windows
_start = operator.itemgetter(1)
_ROUNDING = 5e-7  # of a frame: a word at 0.08 s is due in frame 1, whatever 0.08 is in binary


@dataclass
class Interleaver:
    """Places the tokens of words on frames.

    A word is due in the first frame t with `start * 12.5 < t + 1`; its tokens follow one per frame; the padding frame
    before it becomes EPAD. Each word is stripped and encoded alone, without BOS or EOS.

    Args:
        keep_and_shift: a word due before the last one's tokens are out waits (nothing is lost, but text may be late).
            False, moshi-finetune's default, cuts the earlier word short.
    """

    tokenizer: sentencepiece.SentencePieceProcessor
    keep_and_shift: bool = True
    frame_rate: float = FRAME_RATE
    _cache: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def encode(self, text: str) -> list[int]:
        """The token ids of one word."""
        ids = self._cache.get(text)
        if ids is None:
            if len(self._cache) > 100_000:  # a corpus has some 1e5 distinct words; beyond, they are rare
                self._cache.clear()
            ids = self._cache[text] = self.tokenizer.encode(text.strip(), add_bos=False, add_eos=False)
        return ids

    def __call__(self, words: Sequence[Word], start_sec: float, frames: int) -> tuple[Tensor, TextStats]:
        """The text of the window of `frames` frames that begins at `start_sec`.

        Args:
            words: in the order of their starts, in seconds of the file; those outside the window are left out.
        Returns:
            ids: [frames] int64, PAD where nothing is said; and what became of the words.
        """
        out = [TEXT_PAD] * frames
        found = self._in_window(words, start_sec, frames)
        limits = [due for _, due, _ in found[1:]]
        limits.append(frames)  # where the next word is due
        cursor = 0  # the first frame that no token has taken
        tokens = placed = late = late_frames = 0
        for (ids, due, room), limit in zip(found, limits):
            count = len(ids)
            tokens += count
            if due < 0:
                # It began before the window and was said there in full; here it is repeated only if all of it fits
                # into what is left of its sound, before the next word.
                if count > min(room, max(limit, 0), frames) or cursor > 0:
                    continue
                due = 0
            first = due
            if self.keep_and_shift:
                limit = frames
                if cursor > due:
                    first = cursor
                    late += 1
                    late_frames += first - due
            if first + count > limit:
                count = max(0, limit - first)
            if count:
                if first > 0 and out[first - 1] == TEXT_PAD:
                    out[first - 1] = TEXT_EPAD
                cursor = first + count
                out[first:cursor] = ids[:count]
                placed += count
        stats = TextStats(len(found), placed, tokens - placed, late, late_frames)
        return torch.from_numpy(np.array(out, dtype=np.int64)), stats

    def _in_window(self, words: Sequence[Word], start_sec: float, frames: int) -> list[tuple[list[int], int, int]]:
        """(token ids, due frame, frames until its end) of the words that touch the window, counted from its start."""
        found = []
        # An hour has 10,000 words, a window some hundred.
        first = bisect.bisect_left(words, start_sec - LONGEST_WORD_SEC, key=_start)
        last = bisect.bisect_right(words, start_sec + (frames + 1) / self.frame_rate, lo=first, key=_start)
        for text, start, end in words[first:last]:
            due = math.floor((start - start_sec) * self.frame_rate + _ROUNDING)
            room = math.ceil((end - start_sec) * self.frame_rate - _ROUNDING) if due < 0 else frames
            if due < frames and room > 0:
                ids = self._cache.get(text) or self.encode(text)
                if ids:
                    found.append((ids, due, room))
        return found


# What is charged for a file of codes, which is mapped from disk: Linux allows a process 65,530 maps (vm.max_map_count),
# and this makes 16 of a MB.
_MAPPED_BYTES = 64 * 2**10


class Draft(NamedTuple):
    """A window between its reading (in a worker) and its encoding: all of a sample but what Mimi makes."""

    text: Tensor  # [T] int64
    pcm: np.ndarray | None  # [2, samples] float32 at 24 kHz, where codes are made in training
    codes: Tensor | None  # [16, T], where they were made before
    prompt: PromptParts | None
    name: str
    stats: TextStats


class Tokenizer(abc.ABC):
    """What both tokenizers share: word times, text stream, prompt, and the assembly of a sample.

    Args:
        window_frames: longest dialogue of a sample.
        speakers: whose words make the text.
        prompter: chooses prompts; None: samples are dialogue only.
        cache_mb: memory for what is read of files, in MB.
    """

    def __init__(
        self,
        interleaver: Interleaver,
        window_frames: int,
        speakers: Sequence[str] = (MAIN_SPEAKER,),
        prompter: Prompter | None = None,
        cache_mb: float = 256,
    ):
        self.interleaver = interleaver
        self.window_frames = window_frames
        self.speakers = list(speakers)
        self.prompter = prompter
        self.cache = LRUCache(cache_mb)

    def read(self, line: Line, index: int, generator: np.random.Generator | None = None) -> Draft:
        """The `index`-th window of a file, as far as it can be had without Mimi.

        Args:
            generator: draws prompt drop-out; None: prompts are never dropped.
        Raises:
            UserError: the window cannot be had; says why and names the file.
        """
        start = index * self.window_frames
        start_sec = start / FRAME_RATE
        codes, pcm = self._sound(line, start)
        frames = codes.shape[1] if pcm is None else math.ceil(pcm.shape[1] / FRAME_SIZE)
        if frames == 0:
            raise UserError(
                f"{line.path}: ends before {start_sec:.2f} s, where the manifest (line {line.number}) says it lasts "
                f"{line.fields.get('duration')} s"
            )
        words, extra = self.cache.get(line.path, lambda: self.sidecar(line.path))
        text, stats = self.interleaver(words, start_sec, frames)
        prompt = None
        if self.prompter is not None:
            window = (start_sec, (start + frames) / FRAME_RATE)
            prompt = self.prompter(line, extra, words, window, generator, self._stretches(line))
        return Draft(text, pcm, codes, prompt, f"{line.path} at {start_sec:.2f} s", stats)

    @abc.abstractmethod
    def _sound(self, line: Line, start: int) -> tuple[Tensor | None, np.ndarray | None]:
        """(codes, pcm) of the window that begins at frame `start`; one of them is None."""

    def _stretches(self, line: Line) -> Callable[[], list[dict]] | None:
        """Gives a file's `same_speaker` stretches; None where they are taken from the recording."""
        return None

    @abc.abstractmethod
    def encode(self, drafts: list[Draft]) -> list[Sample]:
        """Samples of drafts, in their order."""

    def sidecar(self, path: Path) -> tuple[tuple[list[Word], dict], int]:
        """((words, prompt fields) of the `.json` beside an audio file, their rough size in bytes)."""
        file = sidecar(path)
        try:
            raw = from_json(file.read_bytes())  # in less than half of json's time
        except FileNotFoundError:
            raise UserError(f"{file}: missing; run annotate.py to make it") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: not readable as JSON ({error}); remove it and run annotate.py again") from None
        if not isinstance(raw, dict) or "alignments" not in raw:
            raise UserError(f'{file}: has no "alignments"; run annotate.py to make them')
        try:
            words = read_alignments(raw["alignments"], self.speakers)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        extra = {key: raw[key] for key in PROMPT_FIELDS if key in raw}
        return (words, extra), 200 + 150 * len(words)

    def _assemble(self, draft: Draft, codes: Tensor, voice_codes: Tensor | None) -> Sample:
        """A sample out of a draft, its dialogue's codes [16, T] and those of a voice encoded just now [8, N]."""
        frames = codes.shape[1]
        sequence = stack_streams(draft.text, codes[:CODEBOOKS], codes[CODEBOOKS:])
        mask = torch.ones(frames, dtype=torch.bool)
        embeddings, ids, voice, voiceless = None, [], None, False
        if draft.prompt is not None:
            voice, ids = parts_to_voice(draft.prompt, voice_codes), draft.prompt.text_ids
            voiceless = draft.prompt.voiceless
            prompt = build_prompt(voice, ids)
            sequence = torch.cat([prompt.frames, sequence], dim=1)
            mask = torch.cat([torch.zeros(prompt.frames.shape[1], dtype=torch.bool), mask])
            embeddings = prompt.embeddings
        return Sample(sequence, mask, embeddings, draft.name, draft.stats, ids, voice and voice.name, voiceless)


class InterleavedTokenizer(Tokenizer):
    """Samples out of audio: Mimi runs in the training process, on whole batches.

    Args:
        mimi: on the training device; None where only `read` is called (in workers).
    """

    def __init__(self, *args, mimi: MimiModel | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.mimi = mimi

    def _sound(self, line: Line, start: int):
        pcm = read_audio(line.path, start / FRAME_RATE, self.window_frames / FRAME_RATE)
        if pcm.shape[0] != 2:
            raise UserError(f"{line.path}: has {pcm.shape[0]} channel(s); it must be stereo, agent left, user right")
        return None, pcm[:, : self.window_frames * FRAME_SIZE]

    def encode(self, drafts: list[Draft]) -> list[Sample]:
        streams = [torch.from_numpy(channel) for draft in drafts for channel in draft.pcm]
        voiced = [i for i, draft in enumerate(drafts) if draft.prompt is not None and draft.prompt.pcm is not None]
        streams += [torch.from_numpy(drafts[i].prompt.pcm) for i in voiced]
        codes = [c.cpu().long() for c in encode_audio(self.mimi, streams)]
        voices = dict(zip(voiced, codes[2 * len(drafts) :]))
        return [
            self._assemble(draft, torch.cat(codes[2 * i : 2 * i + 2]), voices.get(i)) for i, draft in enumerate(drafts)
        ]


class PrecomputedTokenizer(Tokenizer):
    """Samples out of the codes that precompute_codes.py wrote; Mimi is never loaded.

    A window after the first of its file differs from one encoded in training: its codes have heard what came before,
    as they have in a running server.

    Args:
        mimi_fingerprint: of the codec that the model belongs to; codes of another are refused.
    """

    def __init__(self, *args, mimi_fingerprint: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.mimi_fingerprint = mimi_fingerprint

    def _sound(self, line: Line, start: int):
        if not isinstance(line.fields.get("codes_path"), str):
            raise UserError(f"{line.path}: line {line.number} has no codes_path; run precompute_codes.py")
        entry = self.cache.get(("codes", line.path), lambda: self._codes(line))
        codes = entry["codes"][:, :, start : start + self.window_frames].long().flatten(0, 1)
        return codes, None

    def _stretches(self, line: Line) -> Callable[[], list[dict]]:
        path = same_speaker_file(resolve_path(line.manifest, line.fields["codes_path"]))

        def load() -> tuple[list[dict], int]:
            stretches = load_same_speaker(path, self.mimi_fingerprint, self.speakers)
            return stretches, 500 + sum(2 * s["codes"].numel() for s in stretches)

        return lambda: self.cache.get(("voices", line.path), load)

    def _codes(self, line: Line) -> tuple[dict, int]:
        path = resolve_path(line.manifest, line.fields["codes_path"])
        entry = load_codes(path)
        check_codes(entry, path=path, mimi_fingerprint=self.mimi_fingerprint, audio_path=line.path)
        if entry["codes"].shape[0] != 2:
            raise UserError(f"{path}: holds {entry['codes'].shape[0]} channel(s); training needs agent and user")
        return entry, _MAPPED_BYTES

    def encode(self, drafts: list[Draft]) -> list[Sample]:
        return [self._assemble(draft, draft.codes, None) for draft in drafts]
