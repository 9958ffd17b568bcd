"""Times for words that have none: from their neighbours, or from the time of their sentence."""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from finetune.audio.words import Word
from finetune.tools.import_words.formats import Passage, Token

SEC_PER_LETTER = 0.08  # 150 words a minute of five letters, where a transcript has no times to tell
DIGIT_LETTERS = 4  # the names of the ten digits have as many on average
CLOSING = set(".,;:!?…")  # belong to the word before, from which French and transcribers part them
MARKS = set("-–—()[]\"'«»“”*_♪#/\\")  # alone, they are no word
FILLED, SPREAD = "filled: words without times, from their neighbours", "spread: words over the time of their sentence"


def is_sentence(passage: Passage) -> bool:
    """Return whether several words have nothing but the time of them all."""
    return len(passage.words) > 1 and all(word.start is None for word in passage.words)


def time_words(passages: Iterable[Passage]) -> tuple[list[Word], Counter[str]]:
    """Return the words of one speaker, each with a time, and how many of them were filled and spread.

    Raises ValueError if a sentence has no time.
    """
    tokens: list[Token] = []
    passage_of: list[int] = []
    counts: Counter[str] = Counter()
    for number, passage in enumerate(passages):
        words = passage.words
        if is_sentence(passage):
            if passage.start is None or passage.end is None:
                raise ValueError(f"{' '.join(word.text for word in words)[:40]!r} has no times")
            counts[SPREAD] += len(words)
            words = _share(words, passage.start, passage.end)
        words = _join_marks(words)
        tokens += words
        passage_of += [number] * len(words)
    if tokens and all(word.start is None for word in tokens):
        raise ValueError("no word has a time")
    counts[FILLED] += sum(word.start is None for word in tokens)
    return _fill(tokens, passage_of), +counts


def _join_marks(words: Sequence[Token]) -> list[Token]:
    joined: list[Token] = []
    for word in words:
        if joined and set(word.text) <= CLOSING:
            joined[-1] = joined[-1]._replace(text=joined[-1].text + word.text)
        elif not set(word.text) <= CLOSING | MARKS:
            joined.append(word)
    return joined


def count_letters(word: Token) -> int:
    """Return the length of a word as it is said, in letters."""
    return sum(DIGIT_LETTERS if letter.isdigit() else 1 for letter in word.text)


def _share(words: Sequence[Token], start: float, end: float) -> list[Token]:
    """Return the words one after the other from `start` to `end`, each with a share by its letters."""
    if not words:
        return []
    letters = list(itertools.accumulate(map(count_letters, words), initial=0))
    times = [start + (end - start) * count / letters[-1] for count in letters]
    return [Token(word.text, *pair) for word, pair in zip(words, itertools.pairwise(times))]


def _fill(tokens: Sequence[Token], passage_of: Sequence[int]) -> list[Word]:
    """Give times to each run of words without: between its neighbours, at the pace of the other words.

    Those of the passage of the word after them, and not of the word before, end where that one begins. The others begin
    where the word before ends.
    """
    lengths = [(word.end - word.start) / count_letters(word) for word in tokens if None not in word]
    pace = statistics.median(lengths) if lengths else SEC_PER_LETTER
    known = [i for i, word in enumerate(tokens) if word.start is not None]
    filled: list[Word] = []
    for before, after in zip([None, *known], [*known, None]):
        lower, upper = 0.0, math.inf if after is None else tokens[after].start
        if before is not None:
            word = tokens[before]
            lower = word.end
            if lower is None:
                lower = max(word.start, min(word.start + count_letters(word) * pace, upper))
            filled.append((word.text, word.start, lower))
        begin = 0 if before is None else before + 1
        run = tokens[begin:after]
        late = 0  # words of the run that belong to the word after it
        if after is not None and (before is None or passage_of[before] != passage_of[after]):
            late = len(run) if before is None else passage_of[begin:after].count(passage_of[after])
        split = len(run) - late
        needs = [sum(map(count_letters, part)) * pace for part in (run[:split], run[split:])]
        upper = max(lower, upper)
        if sum(needs) >= upper - lower:
            filled += _share(run, lower, upper)
        else:
            filled += _share(run[:split], lower, lower + needs[0]) + _share(run[split:], upper - needs[1], upper)
    return filled
