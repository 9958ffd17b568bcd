"""Word times -> the text stream (Moshi's inner monologue): one text token per frame, on the agent's words only."""

import bisect
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from finetune.cli import UserError
from finetune.data.audio import FRAME_RATE
from finetune.personaplex import TEXT_EPAD, TEXT_PAD

MAIN_SPEAKER = "SPEAKER_MAIN"  # moshi-finetune's label of the agent
Word = tuple[str, float, float]  # text, start and end in seconds from the start of the file
LONGEST_WORD_SEC = 60.0  # what claims to last longer is a mistake, and is not said again in later windows
_start = operator.itemgetter(1)
_ROUNDING = 5e-7  # of a frame: a word at 0.08 s is due in frame 1, whatever 0.08 is in binary


@dataclass
class TextStats:
    """What became of the tokens of a stretch of text."""

    words: int = 0
    placed: int = 0  # tokens
    dropped: int = 0  # tokens that found no frame
    late: int = 0  # words placed after their due frame
    late_frames: int = 0  # by how many frames, summed over the late words

    def add(self, other: "TextStats") -> None:
        for name in ("words", "placed", "dropped", "late", "late_frames"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def read_alignments(raw: object, speakers: Sequence[str] = (MAIN_SPEAKER,)) -> list[Word]:
    """The words of `speakers` out of a .json's `alignments`, in the order of their starts.

    Raises:
        UserError: not a list of [word, [start, end], speaker] with finite times.
    """
    if not isinstance(raw, list):
        raise UserError('"alignments" is not a list of [word, [start, end], speaker]')
    words: list[Word] = []
    for i, item in enumerate(raw):
        try:
            text, (start, end), *speaker = item
            start, end = float(start), float(end)
        except (TypeError, ValueError):
            raise UserError(f"alignment {i} is {item!r}, not [word, [start, end], speaker]") from None
        if not isinstance(text, str) or not math.isfinite(start) or not math.isfinite(end):
            raise UserError(f"alignment {i} is {item!r}, not [word, [start, end], speaker] with finite times")
        if not speaker or speaker[0] in speakers:
            words.append((text, start, end))
    words.sort(key=lambda word: word[1])
    return words


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
