"""Check the word times of a file, and place them on frames as training does."""

import itertools
import os
from collections import Counter

import sentencepiece

from finetune.args import DataArgs
from finetune.audio.annotation import RECORD, OutputRecord, origins
from finetune.audio.files import FRAME_RATE
from finetune.audio.words import MAIN_SPEAKER, Word, is_tag, parse_word, read_sidecar, read_words
from finetune.cli import UserError
from finetune.data.interleaver import Interleaver
from finetune.tools.check_data.findings import FileFacts

LOST_TOKENS, LOST_SHARE = 5, 0.01  # of a file; some late words at the ends of windows are normal
LATE_SEC = 1.0  # mean delay of the late words of a window
END_TOLERANCE_SEC = 0.5  # by which a word may outlast the audio
BROKEN_SHARE = 0.2  # byte or unknown pieces per letter
MIN_LETTERS = 20  # needed to judge the script of a file
LONGEST_SPOKEN_SEC = 3.0  # an entry that lasts longer is more than a word; those of Whisper include pauses of 1 to 2 s
SENTENCES, SENTENCE_SHARE = 3, 0.1  # entries of several words; a few ("New York") are normal
UNSURE, UNSURE_SHARE = 5, 0.2  # words dropped as unsure; of English speech, an English model drops next to none


class TextChecker:
    """Checks the words that training reads with the settings `data`.

    Args:
        window_frames: longest dialogue of a window.
    """

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor, data: DataArgs, window_frames: int):
        self.tokenizer, self.speakers, self.window_frames = tokenizer, data.speakers, window_frames
        self.drop_tags = data.drop_tags
        self.interleaver = Interleaver(tokenizer, data.keep_and_shift)

    def read(self, facts: FileFacts) -> tuple[list[Word] | None, dict]:
        """Return (words, prompt fields of the .json); the words are None if the .json is missing or broken."""
        path = facts.line.words_path
        try:
            words, extra = read_words(path, self.speakers, self.drop_tags)
        except UserError as error:
            facts.add("bad words file" if os.path.exists(path) else "no words file", str(error))
            return None, {}
        content = read_sidecar(path)
        rows = content["alignments"]
        facts.words, facts.labels = len(words), {str(row[2]) for row in rows if len(row) > 2}
        if not words:
            others = f", only of {', '.join(sorted(facts.labels))}" if facts.labels else ""
            spoken = f"; the agent speaks for {facts.talk_sec[0]:.0f} s" if facts.talk_sec[0] >= 1 else ""
            facts.add("no words", f"no words of {', '.join(self.speakers)}{others}{spoken}")
        own = [parse_word(row) for row in rows if len(row) < 3 or row[2] in self.speakers]
        tags = Counter(text.strip() for text, *_ in own if is_tag(text))
        if tags:
            examples = ", ".join(tag for tag, _ in tags.most_common(3))
            found = f"{tags.total()} of {len(own)} entries, such as {examples}"
            facts.add("dropped tags" if self.drop_tags else "tags", found)
        self._check_origin(facts, content)
        starts = [start for _, start, _ in own]
        backward = sum(b < a for a, b in itertools.pairwise(starts))
        if backward:
            facts.add("unsorted", f"{backward} of {len(words)} words start before the previous one")
        return words, extra

    def _check_origin(self, facts: FileFacts, content: dict) -> None:
        """Read what annotate.py recorded about its words, if they are its own."""
        try:
            OutputRecord.model_validate(content[RECORD], strict=True)
        except (KeyError, ValueError):
            return
        origin = origins(content).get(MAIN_SPEAKER, {})
        if isinstance(origin.get("language"), str):
            facts.language = origin["language"]
        unsure = origin.get("unsure", 0)
        if unsure >= UNSURE and unsure > UNSURE_SHARE * (facts.words + unsure):
            model = origin.get("whisper_model", "Whisper")
            found = f"{unsure} of {facts.words + unsure} words that {model} gave for the agent's speech were dropped"
            facts.add("unsure", found)

    def check(self, facts: FileFacts, words: list[Word], frames: int) -> None:
        """Check the words of a file whose audio has `frames` frames."""
        after = [start for _, start, _ in words if start * FRAME_RATE >= frames]
        if after:
            found = f"{len(after)} of {len(words)} words start after the audio's {facts.real_sec:.2f} s"
            facts.add("past the end", f"{found}, the last at {after[-1]:.2f} s")
        latest = facts.real_sec + END_TOLERANCE_SEC
        odd = sum(s < 0 or e < s or (s * FRAME_RATE < frames and e > latest) for _, s, e in words)
        if odd:
            facts.add("odd times", f"{odd} of {len(words)} words")
        tokens = [self.interleaver.encode(text) for text, _, _ in words]
        facts.tokens = sum(map(len, tokens))
        letters = sum(len("".join(text.split())) for text, _, _ in words)
        broken = sum(self.tokenizer.is_byte(i) or self.tokenizer.is_unknown(i) for ids in tokens for i in ids)
        if letters >= MIN_LETTERS and broken > BROKEN_SHARE * letters:
            (word, *_), ids = max(zip(words, tokens), key=lambda pair: len(pair[1]))
            found = f"{broken} byte or unknown pieces for {letters} letters"
            facts.add("script", f"{found}, such as {len(ids)} tokens for {word!r}")
        self._place(facts, words)
        several = [word for word in words if " " in word[0].strip() or word[2] - word[1] > LONGEST_SPOKEN_SEC]
        if len(several) > SENTENCE_SHARE * len(words) and len(several) >= min(SENTENCES, len(words)):
            text, start, end = max(several, key=lambda word: len(word[0]))
            found = f"{len(several)} of {len(words)} entries, such as {text[:60]!r} over {end - start:.1f} s"
            lost = facts.text.dropped / max(1, facts.text.placed + facts.text.dropped)
            facts.add("sentences", f"{found}; {lost:.0%} of the tokens find no frame")

    def _place(self, facts: FileFacts, words: list[Word]) -> None:
        """Place the words of each window on its frames, and find those that come too fast."""
        crowded: list[tuple[int, float]] = []  # (tokens lost, start of the window)
        late: list[tuple[float, float, int]] = []  # (mean delay in seconds, start of the window, late words)
        for i, frames in enumerate(facts.windows):
            if frames == 0:
                continue
            begin = i * self.window_frames / FRAME_RATE
            _, stats = self.interleaver(words, begin, frames)
            facts.text.add(stats)
            facts.densest = max(facts.densest, (stats.placed + stats.dropped) * FRAME_RATE / frames)
            if stats.late:
                late.append((stats.late_frames / stats.late / FRAME_RATE, begin, stats.late))
            if stats.dropped:
                crowded.append((self._lost_to_crowding(words, begin, frames), begin))
        lost = sum(count for count, _ in crowded)
        if lost >= LOST_TOKENS and lost > LOST_SHARE * facts.tokens:
            most, begin = max(crowded, key=lambda window: window[0])
            found = f"{lost} of {facts.tokens} tokens find no frame, {most} of them in the window at {begin:.1f} s"
            facts.add("crowded" if self.interleaver.keep_and_shift else "truncated", found)
        elif late and max(late)[0] > LATE_SEC:
            delay, begin, count = max(late, key=lambda window: window[0])
            facts.add("late", f"in the window at {begin:.1f} s {count} words come {delay:.1f} s late on average")

    def _lost_to_crowding(self, words: list[Word], begin: float, frames: int) -> int:
        """Return how many tokens of a window are dropped of words that would fit into it if they were alone.

        A word that the end of the window truncates does not count: that says nothing about the data.
        """
        dropped = lambda some: self.interleaver(some, begin, frames)[1].dropped
        inside = [word for word in words if begin <= word[1] < begin + frames / FRAME_RATE]
        return dropped([word for word in inside if not dropped([word])])
