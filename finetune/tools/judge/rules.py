"""The rules of Full-Duplex-Bench v1 (Lin et al. 2025, arXiv 2503.04721), as its scripts apply them.

They are functions of the agent's words and speech. The benchmark takes the words from speech recognition and the speech
from silero-vad. `python -m benchmarks.judge_fuzz` compares the functions with the scripts
(github.com/DanielLin94144/Full-Duplex-Bench, v1_v1.5/evaluation, commit d7336bd).
"""

from collections.abc import Sequence

import numpy as np
import scipy.spatial.distance

TimedWord = tuple[str, float, float | None]  # text, start and end in seconds; None: the end is unknown
Segment = tuple[float, float]  # start and end of speech, in seconds

TAKE_OVER_SEC, TAKE_OVER_WORDS = 1.0, 3  # eval_smooth_turn_taking.py; and so in pause handling and interruption
SPEAKING_SEC = 3.0  # eval_backchannel.py: longer speech is no backchannel, whatever is said
BACKCHANNEL_SEC, MOST_BACKCHANNEL_WORDS = 1.0, 2  # eval_backchannel.py
BIN_SEC, BIN_FLOOR = 0.2, 1e-10  # eval_backchannel.py: bins of the distribution over time


def takes_over(words: Sequence[TimedWord]) -> bool:
    """Return whether the agent takes the turn: with more than 3 words, or with words that span 1 s or more."""
    if not words:
        return False
    start, (_, last_start, last_end) = words[0][1], words[-1]
    end = last_start if last_end is None else last_end
    return end - start >= TAKE_OVER_SEC or len(words) > TAKE_OVER_WORDS


def response_latency(words: Sequence[TimedWord], event: float) -> float | None:
    """Return the seconds from `event` (the end of the user's turn or interruption) to the first word, at least 0.

    None if the agent does not take the turn.
    """
    return max(0.0, words[0][1] - event) if takes_over(words) else None


def is_within(word: TimedWord, segment: Segment) -> bool:
    """Return whether a word counts as part of a segment of speech: they overlap, or touch at the segment's end."""
    (_, first, last), (start, end) = word, segment
    if last is None:
        return first == end  # the script skips words of unknown end that begin earlier
    return (first >= start or last > start) and min(first, last) <= end


def find_backchannels(segments: Sequence[Segment], words: Sequence[TimedWord]) -> tuple[bool, list[Segment]]:
    """Return (whether the agent takes over while it should listen, its shorter segments of speech).

    As in the script, a segment of more than 3 s takes over and ends the search. Without one, the last segment decides:
    it takes over if it lasts 1 s or has more than two words. All segments before count as backchannels either way.
    """
    taken, found = False, []
    for start, end in segments:
        if end - start > SPEAKING_SEC:
            return True, found
        count = sum(is_within(word, (start, end)) for word in words)
        taken = end - start >= BACKCHANNEL_SEC or count > MOST_BACKCHANNEL_WORDS
        found.append((start, end))
    return taken, found


def timing_divergence(backchannels: Sequence[Segment], seconds: float, human: Sequence[float]) -> float:
    """Return the Jensen-Shannon distance (base e) of the backchannels' times from those of people, 1 without any.

    Args:
        seconds: length of the clip.
        human: probabilities over the clip, in bins of equal length (icc_gt_distribution.json of the benchmark).
    """
    if not backchannels:
        return 1.0
    counts = np.full(int(seconds / BIN_SEC) + 1, BIN_FLOOR)
    for start, end in backchannels:
        counts[int(start / BIN_SEC) : int(end / BIN_SEC) + 1] += 1
    people = np.interp(np.linspace(0, 1, len(counts)), np.linspace(0, 1, len(human)), human)
    return float(scipy.spatial.distance.jensenshannon(counts / counts.sum(), people))
