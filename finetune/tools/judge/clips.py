"""What is judged by which rule: the clips of Full-Duplex-Bench, or clips cut from a whole conversation.

A clip of the benchmark has one event, named by a file next to it: a pause of the user (pause.json), the end of their
turn (turn_taking.json), the end of their interruption (interrupt.json), or none: the agent should only listen.

In a conversation, who speaks in which frame gives the events. Turns and pauses are those of `finetune.dialogue`.

- *pause*: what the agent begins to say in a silence of 0.4 to 1 s within a turn of the user.
- *turn*: what it begins to say in the 5 s after a turn, or before the user goes on.
- *interruption*: the same for a turn that begins while the agent is speaking.
- *backchannel*: what it begins to say during a turn of at least 5 s, but for the last second, in which an early answer
  may begin.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetune.audio.files import FRAME_RATE
from finetune.audio.speech import find_spans
from finetune.cli import UserError
from finetune.dialogue import BACKCHANNEL, PAUSE, RESPONSE, TEXT_LEAD
from finetune.files import regular
from finetune.tools.judge.rules import (
    Segment,
    TimedWord,
    find_backchannels,
    response_latency,
    takes_over,
    timing_divergence,
)

RULES = ("pause", "turn", "interruption", "backchannel")
LISTENING = 5 * FRAME_RATE  # frames: the clips of the benchmark have 24 to 55 s; in a short turn there is no time
SAME_ANSWER_SEC = PAUSE[0] / FRAME_RATE  # an answer that begins in a clip goes on beyond it, up to a pause
# File of the benchmark -> rule, and which of the two times is the event.
ANNOTATIONS = {"pause.json": ("pause", 0), "turn_taking.json": ("turn", 0), "interrupt.json": ("interruption", 1)}


class Clip(NamedTuple):
    """A part of a recording, in seconds. What the agent begins to say in [start, end) is judged by `rule`."""

    rule: str
    start: float
    end: float
    event: float  # from which the latency is counted


def cut_conversation(agent: np.ndarray, user: np.ndarray) -> list[Clip]:
    """Return the clips of a conversation; `agent`, `user`: bool [T], who speaks in each frame of 80 ms."""
    clips = []
    turns = find_spans(user, gap=PAUSE[1] + 1)
    for turn, goes_on in zip(turns, [turn.first for turn in turns[1:]] + [len(user)]):
        interrupts = bool(agent[turn.first])
        if interrupts and turn.frames < BACKCHANNEL:
            continue
        gaps = find_spans(~user[turn.first : turn.last])
        clips += [("pause", turn.first + g.first, turn.first + g.last) for g in gaps if g.frames >= PAUSE[0]]
        if goes_on - turn.last > PAUSE[1]:
            rule = "interruption" if interrupts else "turn"
            clips.append((rule, turn.last, min(goes_on, turn.last + RESPONSE)))
        if turn.frames >= LISTENING:
            clips.append(("backchannel", turn.first, turn.last - BACKCHANNEL))
    return [Clip(rule, start / FRAME_RATE, end / FRAME_RATE, start / FRAME_RATE) for rule, start, end in clips]


def read_clip(folder: Path, seconds: float) -> Clip:
    """Return the clip of a folder of the benchmark, for a reply of `seconds` s. Raises UserError if it is damaged."""
    for name, (rule, which) in ANNOTATIONS.items():
        file = folder / name
        if not file.exists():
            continue
        try:
            event = float(json.loads(regular(file).read_bytes())[0]["timestamp"][which])
            if not 0 <= event < math.inf:
                raise ValueError(f"it is {event:g}")
        except (ValueError, LookupError, TypeError) as error:
            what = f'{file}: needs [{{"timestamp": [start, end]}}] in seconds ({error})'
            raise UserError(f"{what}; take it from the benchmark's data again") from None
        return Clip(rule, event if rule == "interruption" else 0.0, math.inf, event)  # words before do not count there
    return Clip("backchannel", 0.0, seconds, 0.0)


def judge_clip(
    clip: Clip, words: Sequence[TimedWord], segments: Sequence[Segment], human: Sequence[float] | None = None
) -> dict:
    """Return the result of a clip: rule, at (s), taken, and as the rule has them latency (s; None if not taken),
    frequency (backchannels per second) and divergence (None without the timing of people, `human`)."""
    result: dict = {"rule": clip.rule, "at": clip.event}
    if clip.rule == "backchannel":
        taken, found = find_backchannels([s for s in segments if clip.start <= s[0] < clip.end], words)
        seconds = clip.end - clip.start
        divergence = None if human is None else timing_divergence(found, seconds, human)
        return result | {"taken": taken, "frequency": len(found) / seconds, "divergence": divergence}
    said: list[TimedWord] = []
    for word in words:
        goes_on = said and said[-1][2] is not None and word[1] - said[-1][2] < SAME_ANSWER_SEC
        if clip.start <= word[1] and (word[1] < clip.end or goes_on):
            said.append(word)
    latency = {} if clip.rule == "pause" else {"latency": response_latency(said, clip.event)}
    return result | {"taken": takes_over(said)} | latency


def summarise_clips(results: Sequence[dict]) -> dict[str, dict]:
    """Return {rule: {items, take_over, and the means of latency, frequency and divergence}}; a mean of nothing is None.

    As in the benchmark, each clip counts the same, and only clips whose turn was taken have a latency.
    """
    table = {}
    for rule in RULES:
        own = [result for result in results if result["rule"] == rule]
        keys = [key for key in ("latency", "frequency", "divergence") if any(key in result for result in own)]
        values = {"take_over": [result["taken"] for result in own]}
        values |= {key: [result[key] for result in own if result[key] is not None] for key in keys}
        table[rule] = {"items": len(own)} | {k: float(np.mean(v)) if v else None for k, v in values.items()}
    return table


def end_with_sound(words: Sequence[TimedWord], agent: np.ndarray) -> list[TimedWord]:
    """Return words of a text stream, each with the end of its sound, and not of its last token.

    A word ends where the speech that it begins in ends, or where the next word begins. `agent`: bool [T], whether the
    agent speaks in each frame.
    """
    spans, timed = find_spans(agent), []
    for (text, start, end), (_, following, _) in zip(words, [*words[1:], ("", float("inf"), None)]):
        first = round(start * FRAME_RATE)
        stop = next((s.last / FRAME_RATE for s in spans if s.first <= first + TEXT_LEAD and s.last > first), end)
        timed.append((text, start, max(end, min(stop, following))))
    return timed
