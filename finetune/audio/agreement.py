"""Agreement of the agent's words with the speech in both channels: shifts, swapped channels, missing words.

Words and sound can each look right and still not belong together: words that are all late, the words of both speakers
under one label, the words of a third of the turns. Only the times of the words are used, not their text.

Two activities over time are compared by their overlap: the time in which both are active, as a share of the time in
which at least one is. Words are compared with what the agent says; with what it says at other times (a shift); with
what the user says in some part of the call (swapped channels); and with what either of them says (one label for both).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from finetune.audio.speech import PAUSE_SEC, detect_speech, find_spans, speech_threshold
from finetune.audio.words import Word

NEAR_SEC = 0.1  # a word may begin and end this far from the speech: the usual error of Whisper's and aligners' times
ECHO_SEC = 0.25  # longest delay with which one speaker is heard in the channel of the other
ECHO_DB = 12.0  # a channel this far below the other, each relative to its own speech, holds the echo of the other
LONGEST_SHIFT_SEC = 30.0
KEPT_SHARE = 0.6  # of the words, that a shift leaves where there is sound
FAR_COST = 0.002  # of the overlap, for each second of a shift: a regular dialogue fits again one turn later
# A finding needs all that applies to it. benchmarks/data_faults.py measures both sides of each number.
FEWEST_WORDS = 2  # that are in the wrong place
LEAST_SHIFT_SEC = 0.2
LEAST_GAIN = 0.05  # of the overlap: how much better another explanation fits
LEAST_OVERLAP = 0.5  # with the shift
SWAP_COST = 0.05  # of the overlap: the part with swapped channels is chosen freely, so that it always fits a little
NOBODY_SHARE = 0.2  # of the words
COVERED_SHARE = 0.85  # of the agent's speech
WORDLESS_SEC = 0.35
AT_ONCE_SHARE = 0.5  # of the speech; in dialogues up to 0.2, if both channels hold both speakers 0.8 and more


class Agreement(NamedTuple):
    """How the words of the agent agree with the sound. Only what was decoded counts."""

    words: int
    speech_sec: float  # of the agent
    covered: float  # share of the agent's speech with words
    on_agent: float  # share of the words during which the agent speaks
    on_user: float  # share of the words during which only the user speaks
    on_nobody: float  # share of the words during which both are silent
    overlap: float  # of the words with the agent's speech
    shift_sec: float  # the shift with which they overlap most: how late the words are
    shifted_overlap: float  # the overlap if the words were that much earlier
    swapped_sec: tuple[float, float]  # the part in which the words agree better with the user's speech
    swapped_overlap: float  # with the user's speech in that part, with the agent's outside of it
    both_overlap: float  # with the speech of either
    at_once: float  # share of the speech during which both speak


def detect_speakers(levels: np.ndarray, level_sec: float) -> np.ndarray:
    """Return bool [2, n]: when agent and user speak; false where the levels are unknown.

    The thresholds are those of the whole recording. What is only the echo of the other speaker does not count.

    Args:
        levels: dBFS [2, n] of agent and user, one for each `level_sec` seconds; NaN where they are unknown.
    """
    speech = np.zeros(levels.shape, dtype=bool)
    known = ~np.isnan(levels[0])
    if not known.any():
        return speech
    thresholds = [speech_threshold(channel) for channel in levels[:, known]]
    for first, last in find_spans(known):
        for side in (0, 1):
            speech[side, first:last] = detect_speech(levels[side, first:last], level_sec, thresholds[side])
    if not speech.any(axis=1).all():
        return speech
    loudness = [np.percentile(levels[side, speech[side]], 98) for side in (0, 1)]
    relative = np.where(speech, levels - np.array(loudness)[:, None], -np.inf)
    loudest = relative.copy()  # within the last ECHO_SEC
    for lag in range(1, min(round(ECHO_SEC / level_sec) + 1, levels.shape[1])):
        np.maximum(loudest[:, lag:], relative[:, :-lag], out=loudest[:, lag:])
    return speech & (relative >= loudest[::-1] - ECHO_DB)


def match_words(speech: np.ndarray, level_sec: float, words: Sequence[Word]) -> tuple[np.ndarray, np.ndarray]:
    """Return (bool [words]: which words are on or near speech, bool [n]: which levels are in or near a word).

    Args:
        speech: bool [n], when a channel speaks.
    """
    near, first, last = round(NEAR_SEC / level_sec), *_word_levels(words, level_sec)
    first, last = ((first - near).clip(0, len(speech)), (last + near).clip(0, len(speech)))
    close = np.zeros(len(speech), dtype=bool)
    for start, stop in zip(first.tolist(), last.tolist()):
        close[start:stop] = True
    return _sums(speech, first, last) > 0, close


def measure_agreement(levels: np.ndarray, level_sec: float, words: Sequence[Word]) -> Agreement:
    """Compare the agent's words with the sound.

    Args:
        levels, level_sec: see `detect_speakers`.
        words: of the agent, with times from the first level on; they may lie outside of the levels.
    """
    known = ~np.isnan(levels[0])
    agent, user = detect_speakers(levels, level_sec)
    count = len(known)

    # 1. Whose speech each word falls on, and how much of the agent's speech has words.
    with_agent, close = match_words(agent, level_sec, words)
    first, last = _word_levels(words, level_sec)
    inside = (first >= 0) & (last <= count)
    inside[inside] &= _sums(known, first[inside], last[inside]) == (last - first)[inside]
    with_agent = with_agent[inside]
    with_user = ~with_agent & (2 * _sums(user, first[inside], last[inside]) >= (last - first)[inside])
    total = max(1, len(with_agent))

    # 2. What the words agree with best.
    reach = int(min(LONGEST_SHIFT_SEC, known.sum() * level_sec / 2) / level_sec)
    spoken = np.zeros(count + 2 * reach, dtype=bool)  # from `reach` levels before the sound to as many after it
    for start, stop in zip((first + reach).clip(0).tolist(), (last + reach).clip(0).tolist()):
        spoken[start:stop] = True
    for start, stop in find_spans(spoken, gap=int(PAUSE_SEC / level_sec) + 1):
        spoken[start:stop] = True  # a pause is part of speech, as it is for the detector
    overlaps, remaining = _overlaps(spoken, agent, known)
    overlaps[remaining < KEPT_SHARE * remaining[reach]] = 0.0
    shifts = np.arange(-reach, reach + 1)
    best = int(np.argmax(overlaps - FAR_COST * level_sec * np.abs(shifts)))
    spoken = spoken[reach : reach + count] & known
    start, stop = _most_like(spoken, user, agent)
    swapped = np.concatenate([agent[:start], user[start:stop], agent[stop:]])
    return Agreement(
        words=len(with_agent), speech_sec=float(agent.sum() * level_sec),
        covered=float((agent & close).sum() / max(1, agent.sum())),
        on_agent=float(with_agent.sum() / total), on_user=float(with_user.sum() / total),
        on_nobody=float((~with_agent & ~with_user).sum() / total),
        overlap=float(overlaps[reach]), shift_sec=float(shifts[best] * level_sec),
        shifted_overlap=float(overlaps[best]), swapped_sec=(start * level_sec, stop * level_sec),
        swapped_overlap=_overlap(spoken, swapped), both_overlap=_overlap(spoken, agent | user),
        at_once=_overlap(agent, user),
    )  # fmt: skip


def find_disagreements(own: Agreement) -> list[tuple[str, str]]:
    """Return the (kind, numbers in words) of what is wrong with the words of a file; [] if nothing is.

    Of several explanations the one that fits best is given. The kinds: "shifted", "swapped", "part swapped",
    "one label", "misplaced" (words where nobody speaks) and "few words" (speech without words).
    """
    if own.speech_sec == 0:
        return []
    on_user, on_nobody = round(own.on_user * own.words), round(own.on_nobody * own.words)
    others = {"shifted": own.shifted_overlap, "swapped": own.swapped_overlap, "one label": own.both_overlap}
    if own.words < FEWEST_WORDS or abs(own.shift_sec) <= LEAST_SHIFT_SEC or own.shifted_overlap < LEAST_OVERLAP:
        del others["shifted"]
    mixed = own.at_once > AT_ONCE_SHARE  # who of them speaks is not known
    if on_user < FEWEST_WORDS or mixed:
        del others["swapped"], others["one label"]
    kind = max(others, key=lambda kind: others[kind] - SWAP_COST * (kind == "swapped"), default=None)
    if kind is not None and others[kind] - own.overlap >= LEAST_GAIN:
        if kind == "shifted":
            found = f"the words are {abs(own.shift_sec):.1f} s {'late' if own.shift_sec > 0 else 'early'}"
            change = f"{own.overlap:.0%}, without the shift {others[kind]:.0%}"
            return [(kind, f"{found}: their overlap with the agent's speech is {change}")]
        found = f"{on_user} of {own.words} words are on the user's speech alone"
        if kind == "swapped":
            found += ", between {:.1f} and {:.1f} s".format(*own.swapped_sec)
            kind = "swapped" if own.on_user > 0.5 else "part swapped"
        return [(kind, f"{found}; the agent's speech has words in {own.covered:.0%}")]
    kinds: list[tuple[str, str]] = []
    if on_nobody >= FEWEST_WORDS and own.on_nobody >= NOBODY_SHARE:
        kinds.append(("misplaced", f"{on_nobody} of {own.words} words are where nobody speaks"))
    wordless = own.speech_sec * (1 - own.covered)
    if own.covered < COVERED_SHARE and wordless >= WORDLESS_SEC and not mixed:
        found = f"the agent speaks for {own.speech_sec:.1f} s, and {wordless:.1f} s of it have no words"
        kinds.append(("few words", found))
    return kinds


def _word_levels(words: Sequence[Word], level_sec: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the first level of each word and the level after its last, at least one."""
    times = np.array([word[1:] for word in words], dtype=float).reshape(-1, 2) / level_sec
    first = np.floor(times[:, 0]).clip(-1e9, 1e9).astype(np.int64)
    return first, np.maximum(first + 1, np.ceil(times[:, 1]).clip(-1e9, 1e9).astype(np.int64))


def _sums(active: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return the number of true values in active[first:last] for each pair of indices."""
    total = np.concatenate([[0], np.cumsum(active)])
    return total[last] - total[first]


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / max(1, (one | other).sum()))


def _overlaps(spoken: np.ndarray, speech: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each i (overlap of spoken[i : i + n] with `speech` [n], number of spoken levels that are known)."""
    size = max(1, len(spoken))
    transform = np.fft.rfft(spoken, size)
    slide = lambda other: np.fft.irfft(transform * np.fft.rfft(other, size).conj(), size)[: size - len(known) + 1]
    both, remaining = slide(speech), slide(known)
    return both / np.maximum(1, remaining + speech.sum() - both), remaining


def _most_like(spoken: np.ndarray, one: np.ndarray, other: np.ndarray) -> tuple[int, int]:
    """Return the range [start, stop) in which `spoken` agrees with `one` most, compared with `other`."""
    gain = np.concatenate([[0], np.cumsum((spoken == one).astype(np.int64) - (spoken == other))])
    rise = gain - np.minimum.accumulate(gain)
    stop = int(np.argmax(rise))
    return int(np.argmin(gain[: stop + 1])), stop
