"""Take from a diarisation what a transcript lacks: who says its words, or when its sentences are said."""

from collections.abc import Sequence

from finetune.audio.rttm import Turn
from finetune.tools.import_words.formats import Passage, Token
from finetune.tools.import_words.timing import count_letters


def with_turns(passages: Sequence[Passage], turns: Sequence[Turn]) -> list[Passage]:
    """Return passages with the speakers and times of a diarisation, where they have none of their own.

    A word with a time is said in the turn that it overlaps most, else in the nearest one. Text without times is spread
    over the turns of its speaker in order: each line has a turn if there are as many, else all words share them by
    their letters. Raises ValueError if the text does not say who speaks, or names somebody who has no turn.
    """
    timeless = [passage for passage in passages if passage.words and _is_timeless(passage)]
    found = [part for passage in passages if not _is_timeless(passage) for part in _by_speaker(passage, turns)]
    names = dict.fromkeys(turn.speaker for turn in turns)
    for name in dict.fromkeys(passage.speaker for passage in timeless):
        speaker = next(iter(names)) if name is None and len(names) == 1 else name
        if speaker not in names:
            problem = (
                "text without times needs 'NAME: ' in front of each line" if name is None else f"{name} has no turn"
            )
            raise ValueError(f"{problem}; the diarisation has turns of {', '.join(names)}")
        own = sorted((turn for turn in turns if turn.speaker == speaker), key=lambda turn: turn.start)
        found += _spread_over(own, [passage.words for passage in timeless if passage.speaker == name])
    return sorted(found, key=lambda passage: passage.start or 0.0)


def _is_timeless(passage: Passage) -> bool:
    return passage.start is None and all(word.start is None for word in passage.words)


def _by_speaker(passage: Passage, turns: Sequence[Turn]) -> list[Passage]:
    """Return the passage in parts of one speaker each; unchanged if it names its speaker."""
    if passage.speaker is not None or not turns:
        return [passage]
    parts: list[Passage] = []
    speaker = None
    for word in passage.words:
        start, end = (time if time is not None else own for time, own in zip(word[1:], passage[1:3]))
        if start is not None:  # a word without a time has the speaker of the one before
            end = start if end is None else end
            speaker = min(turns, key=lambda turn: (-_overlap(turn, start, end), _distance(turn, start, end))).speaker
        if not parts or parts[-1].speaker != speaker:
            parts.append(Passage(speaker, passage.start, passage.end, []))
        parts[-1].words.append(word)
    return parts


def _overlap(turn: Turn, start: float, end: float) -> float:
    return max(0.0, min(turn.end, end) - max(turn.start, start))


def _distance(turn: Turn, start: float, end: float) -> float:
    return max(0.0, turn.start - end, start - turn.end)


def _spread_over(turns: Sequence[Turn], lines: Sequence[Sequence[Token]]) -> list[Passage]:
    """Return the words of one speaker as passages with the times of its turns."""
    if len(lines) == len(turns):
        shares = [list(words) for words in lines]
    else:
        words = [word for line in lines for word in line]
        letters = sum(map(count_letters, words)) or 1
        total_sec = sum(turn.end - turn.start for turn in turns)
        shares = [[] for _ in turns]
        said, turn, over_sec = 0, 0, turns[0].end - turns[0].start  # over_sec: of the turns up to this one
        for word in words:
            middle_sec = total_sec * (said + count_letters(word) / 2) / letters
            while middle_sec > over_sec and turn + 1 < len(turns):
                turn += 1
                over_sec += turns[turn].end - turns[turn].start
            shares[turn].append(word)
            said += count_letters(word)
    return [
        Passage(speaker, start, end, [Token(words[0].text, start, end)] if len(words) == 1 else words)
        for (speaker, start, end), words in zip(turns, shares) if words
    ]  # fmt: skip
