"""What a free-running reply does, without a judge model: silence, pace, repetition and turn-taking.

Turn-taking is in the terms of Full-Duplex-Bench (Lin et al. 2025, arXiv 2503.04721, sections III and III-C, and the
scripts eval_pause_handling.py, eval_smooth_turn_taking.py and eval_backchannel.py), carried over from its clips of one
turn to whole conversations. All of it follows from who is heard in which frame (80 ms), and from the agent's text:

- A *turn* of the user is speech of theirs without a silence of more than 1 s. Less than 1 s of it that begins while the
  agent is speaking is a remark, no turn. A *pause* is a silence of 0.4 to 1 s within a turn.
- A *backchannel* of the agent is less than 1 s of speech with fewer than two words.
- The *take-over rate* (TOR) is the share of windows in which the agent is heard with more than a backchannel: for
  turns (high is good) the 5 s after the end, or less if the user goes on earlier; for pauses (low is good) the pause.
- The *latency* of a turn that was taken runs from its end to the start of what took it; 0 if the agent was speaking.

As in the benchmark, "Yes." alone does not take a turn, and a model that never stops takes all of them with latency 0
(so look at the overlap too). What the user's sound cannot tell: a silence of up to 1 s in which the *recorded* agent
answered counts as a pause.
"""

import math
from collections.abc import Sequence

import numpy as np
import sentencepiece
from torch import Tensor

from finetune.audio.files import FRAME_RATE
from finetune.audio.speech import Span, find_spans, voice_activity
from finetune.streams import TEXT_EPAD, TEXT_PAD

PAUSE = (math.ceil(0.4 * FRAME_RATE), math.floor(1.0 * FRAME_RATE))  # frames: "between 0.4 and 1.0 seconds"
BACKCHANNEL = 1.0 * FRAME_RATE  # frames: "a short duration of less than 1 second"
BACKCHANNEL_WORDS = 2  # "fewer than two words"
RESPONSE = round(5.0 * FRAME_RATE)  # frames: "we append 5 seconds of silence"
_TEXT_LEAD = 2  # frames by which a word's token may come before its sound (word times are up to 0.2 s early)


# --- 2. What is said ----------------------------------------------------------------------------------------------
def _is_text(token: int) -> bool:
    return token >= 0 and token not in (TEXT_EPAD, TEXT_PAD)


def spoken_words(text_ids: Sequence[int] | Tensor, tokenizer: sentencepiece.SentencePieceProcessor) -> list[list]:
    """[[word, start, end], ...] in seconds, out of one text token per frame; a word ends with its last token."""
    groups: list[tuple[list[int], int, int]] = []
    for frame, token in enumerate(np.asarray(text_ids).tolist()):
        if not _is_text(token) or token >= tokenizer.vocab_size():
            continue
        if groups and not tokenizer.id_to_piece(token).startswith("\u2581"):  # SentencePiece's start of a word
            ids, first, _ = groups.pop()
            groups.append(([*ids, token], first, frame))
        else:
            groups.append(([token], frame, frame))
    out = [[tokenizer.decode(ids).strip(), first / FRAME_RATE, (last + 1) / FRAME_RATE] for ids, first, last in groups]
    return [word for word in out if word[0]]


SHORTEST_PHRASE = 4  # tokens; shorter ones recur in any text ("I am", "it is a")


def repetition(tokens: Sequence[int]) -> float:
    """Share of `tokens` that is covered by the longest phrase they repeat.

    The phrase is the longest n-gram, n >= 4, that occurs twice or more without overlapping itself; what it covers are
    its occurrences from left to right that do not overlap, times n. 0 where nothing is repeated, as in any text of
    fewer than 8 tokens; about 1 for a text that is one loop.
    """
    tokens = list(tokens)

    def occurrences(n: int) -> int:
        """Of the n-gram that recurs most often without overlapping itself."""
        free_from: dict[tuple, int] = {}
        count: dict[tuple, int] = {}
        for i in range(len(tokens) - n + 1):
            gram = tuple(tokens[i : i + n])
            if i >= free_from.get(gram, 0):
                free_from[gram] = i + n
                count[gram] = count.get(gram, 0) + 1
        return max(count.values(), default=0)

    low, high = SHORTEST_PHRASE - 1, len(tokens) // 2  # if a phrase recurs, so does its beginning: bisect
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if occurrences(middle) >= 2 else (low, middle - 1)
    return low * occurrences(low) / len(tokens) if low >= SHORTEST_PHRASE else 0.0


# --- 3. One reply, many replies, and what to say of them -----------------------------------------------------------
def measure_reply(
    agent_pcm: np.ndarray | Tensor,
    user_pcm: np.ndarray | Tensor,
    text_ids: Sequence[int] | Tensor,
    tokenizer: sentencepiece.SentencePieceProcessor | None = None,
) -> dict[str, float | int | list | None]:
    """The measures of one reply; what is not defined (no turn, no word count) is None.

    Args:
        agent_pcm, user_pcm: float32 [samples] at 24 kHz; the shorter one goes on in silence.
        text_ids: [T] the agent's text token of each frame.
        tokenizer: None leaves words uncounted; a backchannel is then one by its length alone.
    Returns:
        seconds: of the conversation.
        silence, overlap: shares of that time in which the agent is silent, and in which both speak.
        words: of the agent; words_per_minute of the whole time; words_per_minute_speaking of its speech.
        repetition: see `repetition`.
        turns, tor_turn; pauses, tor_pause: counts and take-over rates; latencies: sec of each turn taken; latency:
        their median.
        backchannels: of the agent, during the user's turns.
    """
    agent, user = voice_activity(np.asarray(agent_pcm)), voice_activity(np.asarray(user_pcm))
    frames = max(len(agent), len(user))
    agent, user = (np.pad(side, (0, frames - len(side))) for side in (agent, user))
    said = None if tokenizer is None else spoken_words(text_ids, tokenizer)
    starts = [round(start * FRAME_RATE) for _, start, _ in said or []]

    def is_backchannel(span: Span) -> bool:
        spoken = sum(span.first - _TEXT_LEAD <= start < span.last for start in starts)
        return span.frames < BACKCHANNEL and spoken < BACKCHANNEL_WORDS

    utterances = find_spans(agent, gap=PAUSE[0])
    taking = [span for span in utterances if not is_backchannel(span)]
    all_turns = find_spans(user, gap=PAUSE[1] + 1)
    turns = [turn for turn in all_turns if turn.frames >= BACKCHANNEL or not agent[turn.first]]

    def taker(window: Span) -> Span | None:
        return next((span for span in taking if span.first < window.last and span.last > window.first), None)

    pauses = [
        Span(turn.first + gap.first, turn.first + gap.last)
        for turn in turns
        for gap in find_spans(~user[turn.first : turn.last])
        if gap.frames >= PAUSE[0]
    ]
    beginnings = [turn.first for turn in all_turns] + [frames]
    ends = [Span(turn.last, min(b for b in beginnings if b >= turn.last)) for turn in turns]
    ends = [Span(end.first, min(end.last, end.first + RESPONSE)) for end in ends if end.frames > PAUSE[1]]
    takers = [taker(end) for end in ends]
    latencies = [max(0, span.first - end.first) / FRAME_RATE for span, end in zip(takers, ends) if span]
    in_turn = lambda frame: any(turn.first <= frame < turn.last for turn in turns)

    seconds, speaking = frames / FRAME_RATE, float(agent.sum()) / FRAME_RATE
    count = None if said is None else len(said)
    return {
        "seconds": seconds,
        "silence": _ratio(seconds - speaking, seconds),
        "overlap": _ratio(float((agent & user).sum()) / FRAME_RATE, seconds),
        "words": count,
        "words_per_minute": _pace(count, seconds),
        "words_per_minute_speaking": _pace(count, speaking),
        "repetition": repetition([token for token in np.asarray(text_ids).tolist() if _is_text(token)]),
        "turns": len(ends),
        "tor_turn": _ratio(len(latencies), len(ends)),
        "latency": _median(latencies),
        "latencies": latencies,
        "pauses": len(pauses),
        "tor_pause": _ratio(sum(taker(pause) is not None for pause in pauses), len(pauses)),
        "backchannels": sum(is_backchannel(span) and in_turn(span.first) for span in utterances),
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _pace(count: int | None, seconds: float) -> float | None:
    """A minute's words; not of less than a second."""
    return None if count is None or seconds < 1 else 60 * count / seconds


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if len(values) else None


def summarise_replies(replies: Sequence[dict]) -> dict[str, float | int | None]:
    """All replies as one: times, words, turns and pauses are pooled, so that a long reply weighs more than a short one;
    `repetition` is the mean over replies, `latency` the median over all turns taken, `looping` the share of replies
    that loop, `backchannels_per_minute` 60 times Full-Duplex-Bench's frequency. None where nothing defines it."""
    seconds = sum(reply["seconds"] for reply in replies)
    speaking = sum(reply["seconds"] * (1 - (reply["silence"] or 0)) for reply in replies)
    counted = all(reply["words"] is not None for reply in replies) and bool(replies)
    count = sum(reply["words"] for reply in replies) if counted else None
    total = lambda key: sum(reply[key] for reply in replies)
    taken = lambda rate, of: sum((reply[rate] or 0) * reply[of] for reply in replies)
    return {
        "replies": len(replies),
        "seconds": seconds,
        "silence": _ratio(seconds - speaking, seconds),
        "overlap": _ratio(taken("overlap", "seconds"), seconds),
        "words_per_minute": _pace(count, seconds),
        "words_per_minute_speaking": _pace(count, speaking),
        "repetition": _ratio(total("repetition"), len(replies)),
        "looping": _ratio(sum(reply["repetition"] >= LOOP_REPETITION for reply in replies), len(replies)),
        "turns": total("turns"),
        "tor_turn": _ratio(taken("tor_turn", "turns"), total("turns")),
        "latency": _median([latency for reply in replies for latency in reply["latencies"]]),
        "pauses": total("pauses"),
        "tor_pause": _ratio(taken("tor_pause", "pauses"), total("pauses")),
        "backchannels_per_minute": _pace(total("backchannels"), seconds),
    }


MUTE_SILENCE = 0.95  # of the time: an agent that answers at all speaks 30 to 60 % of it, a mere listener still 5 %
WORDLESS_PACE = 5.0  # words a minute: a tenth of a slow talker who speaks a third of the time
LOOP_REPETITION = 0.5  # of a reply's text: sound replies repeat a phrase of four tokens, a tenth of theirs at most
LOOP_SHARE = 0.25  # of the replies: loops begin in some of them, long before the mean shows it


def reply_verdict(summary: dict) -> str | None:
    """A phrase for what has gone wrong, by a result of `summarise` (keys may be missing); None if nothing has."""
    silence, pace, looping = (summary.get(key) for key in ("silence", "words_per_minute", "looping"))
    if silence is not None and silence >= MUTE_SILENCE:
        return f"mute: silent {silence:.0%} of the time"
    if pace is not None and pace < WORDLESS_PACE:
        return f"wordless: {pace:.1f} words a minute"
    if looping is not None and looping >= LOOP_SHARE:
        return f"loops: {looping:.0%} of the replies repeat one phrase for half of their text or more"
    return None
