"""Word times -> the text stream (the inner monologue of Moshi); audio or stored codes -> samples."""

import abc
import bisect
import logging
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from moshi.models import MimiModel
from torch import Tensor

from finetune.audio.codec import encode_audio
from finetune.audio.codes import check_codes, in_range, load_codes
from finetune.audio.files import FRAME_RATE, FRAME_SIZE, read_audio, to_frames
from finetune.audio.words import MAIN_SPEAKER, Word, read_words
from finetune.cli import UserError
from finetune.data.batch import Sample, TextStats
from finetune.data.cache import LRUCache
from finetune.data.manifest import Line, resolve_path
from finetune.data.prompter import Prompter, PromptParts
from finetune.prompts.hybrid import VoicePrompt, build_prompt
from finetune.prompts.same_speaker import SAME_SPEAKER, find_segments, load_same_speaker, same_speaker_file
from finetune.streams import CODEBOOKS, TEXT_EPAD, TEXT_PAD, stack_streams

logger = logging.getLogger(__name__)
SHORT_SEC, SHORT_TOLD = 1.0, 3  # how much of a file may be missing without a warning; files that a process warns of
LONGEST_WORD_SEC = 60.0  # a word that claims to last longer is a mistake, and is not repeated in later windows
_start = operator.itemgetter(1)
_ROUNDING = 5e-7  # of a frame: a word at 0.08 s is due in frame 1, although 0.08 * 12.5 may be a little less than 1
_MAX_WORDS = 100_000  # words whose token ids are kept; a corpus has about 1e5 frequent ones


@dataclass
class Interleaver:
    """Places the tokens of words on frames.

    A word is due in the first frame t with `start * 12.5 < t + 1`; its tokens follow one per frame; the padding frame
    before it becomes EPAD. Each word is stripped and encoded alone, without BOS or EOS. With `keep_and_shift` it waits
    until the previous one is out; without, as is moshi-finetune's default, the previous one is truncated.
    """

    tokenizer: sentencepiece.SentencePieceProcessor
    keep_and_shift: bool = True
    frame_rate: float = FRAME_RATE
    _cache: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of one word."""
        ids = self._cache.get(text)
        if ids is None:
            if len(self._cache) > _MAX_WORDS:
                self._cache.clear()
            ids = self._cache[text] = self.tokenizer.encode(text.strip(), add_bos=False, add_eos=False)
        return ids

    def __call__(self, words: Sequence[Word], start_sec: float, frames: int) -> tuple[Tensor, TextStats]:
        """Return the text of a window of `frames` frames that begins at `start_sec`: ([frames] int64, statistics).

        `words` are all of the file, in the order of their starts.
        """
        out = [TEXT_PAD] * frames
        found = self._in_window(words, start_sec, frames)
        next_due = [due for _, due, _ in found[1:]] + [frames]
        cursor = 0  # the first frame after all placed tokens
        tokens = placed = late = late_frames = 0
        for (ids, due, room), limit in zip(found, next_due):
            count = len(ids)
            tokens += count
            if due < 0:
                # The previous window has this word in full. Here it is repeated only if all of its tokens fit into the
                # rest of its sound and before the next word.
                if count > min(room, limit):
                    continue
                due = 0
            first = due
            if self.keep_and_shift:
                first, limit = max(due, cursor), frames
                late += first > due
                late_frames += first - due
            count = min(count, limit - first)
            if count > 0:
                if first > 0 and out[first - 1] == TEXT_PAD:
                    out[first - 1] = TEXT_EPAD
                cursor = first + count
                out[first:cursor] = ids[:count]
                placed += count
        stats = TextStats(len(found), placed, tokens - placed, late, late_frames)
        return torch.from_numpy(np.array(out, dtype=np.int64)), stats

    def _in_window(self, words: Sequence[Word], start_sec: float, frames: int) -> list[tuple[list[int], int, int]]:
        """Return (ids, due frame, frames until its end), from the window's start, of the words that overlap it."""
        found = []  # binary search, because an hour has 10,000 words, and a window a hundred
        first = bisect.bisect_left(words, start_sec - LONGEST_WORD_SEC, key=_start)
        last = bisect.bisect_right(words, start_sec + (frames + 1) / self.frame_rate, lo=first, key=_start)
        for text, start, end in words[first:last]:
            due = math.floor((start - start_sec) * self.frame_rate + _ROUNDING)
            room = math.ceil((end - start_sec) * self.frame_rate - _ROUNDING) if due < 0 else frames
            if due < frames and room > 0 and (ids := self.encode(text)):
                found.append((ids, due, room))
        return found


# The cache charges this for a file of codes, which is mapped from disk: 16 files per MB, because Linux allows a process
# 65,530 maps (vm.max_map_count).
_MAPPED_BYTES = 64 * 2**10


class Draft(NamedTuple):
    """A window as a worker reads it: a sample whose audio, if any, has yet to be encoded."""

    text: Tensor  # [T] int64
    pcm: np.ndarray | None  # [2, samples] float32 at 24 kHz, if codes are made in training
    codes: Tensor | None  # [16, T] int64, if they are pre-computed
    prompt: PromptParts | None
    name: str
    stats: TextStats


class Tokenizer(abc.ABC):
    """Reads windows and makes samples of them; a subclass knows where the codes come from.

    Args:
        window_frames: longest dialogue of a sample.
        speakers: whose words make the text.
        prompter: chooses prompts; None: samples are dialogue only.
        cache_mb: memory for the contents of files, in MB.
        drop_tags: leave out the tags of transcribers, such as [laughter].
    """

    def __init__(
        self, interleaver: Interleaver, window_frames: int, speakers: Sequence[str] = (MAIN_SPEAKER,),
        prompter: Prompter | None = None, cache_mb: float = 256, drop_tags: bool = True,
    ):  # fmt: skip
        self.interleaver, self.window_frames, self.speakers = interleaver, window_frames, list(speakers)
        self.prompter, self.cache, self.drop_tags = prompter, LRUCache(cache_mb), drop_tags
        self._short: set[Path] = set()  # files whose last window is shorter than the manifest says

    def read(self, line: Line, index: int, generator: np.random.Generator | None = None) -> Draft:
        """Read the `index`-th window of a file, without Mimi. `generator` draws the prompt dropout, None drops nothing.

        Raises UserError if the window cannot be read.
        """
        start = index * self.window_frames
        start_sec = start / FRAME_RATE
        codes, pcm = self._load(line, start)
        frames = codes.shape[1] if pcm is None else math.ceil(pcm.shape[1] / FRAME_SIZE)
        if frames == 0:
            stated = f"the manifest (line {line.number}) says it lasts {line.fields.get('duration')} s"
            raise UserError(f"{line.path}: ends before {start_sec:.2f} s, and {stated}")
        missing_sec = min(self.window_frames / FRAME_RATE, (line.duration or 0.0) - start_sec) - frames / FRAME_RATE
        if missing_sec > SHORT_SEC and len(self._short) < SHORT_TOLD and line.path not in self._short:
            self._short.add(line.path)
            logger.warning("WARNING: %s: ends %.1f s before the %.2f s that the manifest (line %d) says; what is there "
                           "is trained on; make_manifest finds its real duration", line.path, missing_sec,
                           line.duration, line.number)  # fmt: skip
        words, extra = self._words(line)
        prompt = None
        if self.prompter is not None:
            window = (start_sec, (start + frames) / FRAME_RATE)
            prompt = self.prompter(line, extra, window, generator, self.segments)
            head, stop = prompt.head, frames - prompt.tail
            codes = None if codes is None else codes[:, head:stop]
            pcm = None if pcm is None else pcm[:, head * FRAME_SIZE : stop * FRAME_SIZE]
            start_sec, frames = start_sec + head / FRAME_RATE, stop - head
        text, stats = self.interleaver(words, start_sec, frames)
        return Draft(text, pcm, codes, prompt, f"{line.path} at {start_sec:.2f} s", stats)

    def _words(self, line: Line) -> tuple[list[Word], dict]:
        """Return (words, prompt fields) of the .json of a file."""

        def load() -> tuple[tuple[list[Word], dict], int]:
            words, extra = read_words(line.words_path, self.speakers, self.drop_tags)
            return (words, extra), 200 + 150 * len(words)

        return self.cache.get(line.words_path, load)

    def segments(self, line: Line) -> list[dict]:
        """Return the `same_speaker` segments of a file: [{"start", "end" (sec), "codes": [8, N], if pre-computed}]."""
        words, _ = self._words(line)
        spans = self.cache.get(("voices", line.path), lambda: (find_segments(line.path, words), 1000))
        return [{"start": start, "end": end} for start, end in spans]

    @abc.abstractmethod
    def _load(self, line: Line, start: int) -> tuple[Tensor | None, np.ndarray | None]:
        """Return (codes, pcm) of the window that begins at frame `start`; one of them is None."""

    @abc.abstractmethod
    def encode(self, drafts: list[Draft]) -> list[Sample]:
        """Return the samples of drafts, in order."""

    def _assemble(self, draft: Draft, codes: Tensor, voice_codes: Tensor | None) -> Sample:
        """Return the sample of a draft with these codes [16, T]; `voice_codes` [8, N]: of `prompt.pcm`, if any."""
        frames = codes.shape[1]
        sequence = stack_streams(draft.text, codes[:CODEBOOKS], codes[CODEBOOKS:])
        mask = torch.ones(frames, dtype=torch.bool)
        embeddings, ids, voice, voiceless = None, [], None, False
        if draft.prompt is not None:
            voice, _, ids, voiceless, *_ = draft.prompt
            if voice_codes is not None:
                voice = VoicePrompt(SAME_SPEAKER, voice_codes)
            prompt = build_prompt(voice, ids)
            sequence = torch.cat([prompt.frames, sequence], dim=1)
            mask = torch.cat([torch.zeros(prompt.frames.shape[1], dtype=torch.bool), mask])
            embeddings = prompt.embeddings
        return Sample(sequence, mask, embeddings, draft.name, draft.stats, ids, voice and voice.name, voiceless)


class InterleavedTokenizer(Tokenizer):
    """Makes samples of audio: `mimi` runs in the training process, on whole batches. None: only `read` is called."""

    def __init__(self, *args, mimi: MimiModel | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.mimi = mimi

    def _load(self, line: Line, start: int) -> tuple[None, np.ndarray]:
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
    """Makes samples of the codes that precompute_codes.py wrote, unless with another Mimi than `mimi_fingerprint`.

    Except in the first window of a file, the codes differ from those made in training: they depend on the audio before
    the window, as in a running server.
    """

    def __init__(self, *args, mimi_fingerprint: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.mimi_fingerprint = mimi_fingerprint

    def _load(self, line: Line, start: int) -> tuple[Tensor, None]:
        load = lambda: (load_dialogue_codes(line, self.mimi_fingerprint), _MAPPED_BYTES)
        codes = self.cache.get(("codes", line.path), load)["codes"][:, :, start : start + self.window_frames]
        if not in_range(codes):
            path, where = line.fields["codes_path"], f"between {start / FRAME_RATE:.2f} s and the end of its window"
            raise UserError(f"{path}: holds codes that Mimi does not have, {where}; run precompute_codes.py again")
        return codes.long().flatten(0, 1), None

    def segments(self, line: Line) -> list[dict]:
        path = same_speaker_file(resolve_path(line.manifest, line.fields["codes_path"]))

        def load() -> tuple[list[dict], int]:
            segments = load_same_speaker(path, self.mimi_fingerprint, self.speakers)
            return segments, 500 + sum(2 * segment["codes"].numel() for segment in segments)

        return self.cache.get(("voices", line.path), load)

    def encode(self, drafts: list[Draft]) -> list[Sample]:
        return [self._assemble(draft, draft.codes, None) for draft in drafts]


def load_dialogue_codes(line: Line, mimi_fingerprint: str | None) -> dict:
    """Load the file of codes of a line (see `load_codes`). Raises UserError if training cannot use it."""
    if not isinstance(line.fields.get("codes_path"), str):
        raise UserError(f"{line.path}: line {line.number} has no codes_path; run precompute_codes.py")
    path = resolve_path(line.manifest, line.fields["codes_path"])
    entry = load_codes(path)
    check_codes(entry, path, mimi_fingerprint, line.path)
    if entry["codes"].shape[0] != 2:
        raise UserError(f"{path}: holds {entry['codes'].shape[0]} channel(s); training needs agent and user")
    if (frames := entry["codes"].shape[2]) < to_frames(entry["duration"]) - 1:  # resampling may cost a frame
        raise UserError(
            f"{path}: holds {frames} frames of audio that lasts {entry['duration']:.2f} s, which has "
            f"{to_frames(entry['duration'])}; run precompute_codes.py again"
        )
    return entry
