"""Measures of a free-running reply that need no judge model: silence, pace, repetition and turn-taking.

Turn-taking follows Full-Duplex-Bench (Lin et al. 2025, arXiv 2503.04721, section III, and its evaluation scripts),
extended from clips of one turn to whole conversations. It depends only on who speaks in each frame (80 ms) and on the
text of the agent:

- A *turn* of the user is their speech without a silence of more than 1 s; less than 1 s of speech that begins while the
  agent is speaking is not a turn. A *pause* is a silence of 0.4 to 1 s within a turn.
- A *backchannel* of the agent is less than 1 s of speech with fewer than two words.
- The *take-over rate* (TOR) is the share of turns and of pauses in which the agent says more than a backchannel: in the
  5 s after a turn, or less if the user goes on earlier (should be high), or during a pause (should be low).
- The *latency* of a turn that was taken is the time from its end to the agent's speech; 0 if the agent was speaking.

As in the benchmark, "Yes." alone does not take a turn, and a model that never stops speaking takes all of them with
latency 0, which the overlap shows. A silence of up to 1 s in which the *recorded* agent answered counts as a pause.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import sentencepiece
from torch import Tensor

from finetune.audio.files import FRAME_RATE, FRAME_SIZE, SAMPLE_RATE
from finetune.audio.speech import Span, find_spans, voice_activity
from finetune.streams import TEXT_EPAD, TEXT_PAD

PAUSE = (math.ceil(0.4 * FRAME_RATE), math.floor(1.0 * FRAME_RATE))  # frames: "between 0.4 and 1.0 seconds"
BACKCHANNEL = 1.0 * FRAME_RATE  # frames: "a short duration of less than 1 second"
BACKCHANNEL_WORDS = 2  # "fewer than two words"
RESPONSE = round(5.0 * FRAME_RATE)  # frames: "we append 5 seconds of silence"
TREBLE_HZ = 6000
TEXT_LEAD = 2  # frames by which the token of a word may precede its sound: word times are up to 0.2 s early
SHORTEST_PHRASE = 4  # tokens; shorter ones recur in any text ("I am", "it is a")
# Thresholds of a verdict.
MUTE_SILENCE = 0.95  # of the time: an agent that answers speaks 30 to 60 % of it, one that mostly listens still 5 %
WORDLESS_PACE = 5.0  # words per minute: a tenth of those of a slow speaker who speaks a third of the time
LOOP_REPETITION = 0.5  # of the text of a reply: in good replies a phrase of four tokens recurs in a tenth at most
LOOP_SHARE = 0.25  # of the replies: loops begin in a few, long before the mean shows it


def _is_text(token: int) -> bool:
    return token >= 0 and token not in (TEXT_EPAD, TEXT_PAD)


def spoken_words(text_ids: Sequence[int] | Tensor, tokenizer: sentencepiece.SentencePieceProcessor) -> list[list]:
    """Return [[word, start, end], ...] in seconds from one text token per frame; a word ends with its last token."""
    ids = np.asarray(text_ids).tolist()
    groups: list[list[int]] = []  # frames of each word
    for frame, token in enumerate(ids):
        if _is_text(token) and token < tokenizer.vocab_size():
            if not groups or tokenizer.id_to_piece(token).startswith("\u2581"):  # SentencePiece's start of a word
                groups.append([])
            groups[-1].append(frame)
    texts = [tokenizer.decode([ids[frame] for frame in frames]).strip() for frames in groups]
    spans = [(frames[0] / FRAME_RATE, (frames[-1] + 1) / FRAME_RATE) for frames in groups]
    return [[text, *span] for text, span in zip(texts, spans) if text]


def repetition(tokens: Sequence[int]) -> float:
    """Return the share of `tokens` that the longest repeated phrase covers, from 0 to about 1 for an endless loop.

    The phrase is the longest n-gram, n >= 4, that occurs twice or more without overlapping itself; each of these
    occurrences, counted from the left, covers n tokens.
    """
    tokens = list(tokens)

    def occurrences(n: int) -> int:
        """Return how often the most frequent n-gram occurs."""
        free_from, count = {}, Counter()
        for i in range(len(tokens) - n + 1):
            gram = tuple(tokens[i : i + n])
            if i >= free_from.get(gram, 0):
                free_from[gram] = i + n
                count[gram] += 1
        return max(count.values(), default=0)

    low, high = SHORTEST_PHRASE - 1, len(tokens) // 2  # if a phrase recurs, so does its beginning: bisect
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if occurrences(middle) >= 2 else (low, middle - 1)
    return low * occurrences(low) / len(tokens) if low >= SHORTEST_PHRASE else 0.0


def measure_reply(
    agent_pcm: np.ndarray | Tensor, user_pcm: np.ndarray | Tensor, text_ids: Sequence[int] | Tensor,
    tokenizer: sentencepiece.SentencePieceProcessor | None = None,
) -> dict[str, float | int | list | None]:  # fmt: skip
    """Return the measures of a reply; those that are undefined (no turns, no word count) are None.

    Args:
        agent_pcm, user_pcm: float32 [samples] at 24 kHz; the shorter one is continued with silence.
        text_ids: [T] text token of the agent in each frame.
        tokenizer: None: words are not counted, and a backchannel is recognised by its length alone.
    Returns:
        seconds; silence and overlap: share of the time in which the agent is silent, or both speak; words of the agent,
        words_per_minute, and words_per_minute_speaking of the time it speaks; padding: share of padding among its text
        tokens; treble: share of energy above 6 kHz, and flatness of the spectrum, where it speaks; repetition; turns,
        tor_turn, pauses and
        tor_pause: counts and take-over rates; latencies: seconds for each turn taken, and latency, their median;
        backchannels of the agent during turns of the user.
    """
    agent, user = voice_activity(np.asarray(agent_pcm)), voice_activity(np.asarray(user_pcm))
    frames = max(len(agent), len(user))
    agent, user = (np.pad(side, (0, frames - len(side))) for side in (agent, user))
    ids = np.asarray(text_ids).tolist()
    words = None if tokenizer is None else spoken_words(text_ids, tokenizer)
    word_frames = [round(start * FRAME_RATE) for _, start, _ in words or []]

    def is_backchannel(span: Span) -> bool:
        count = sum(span.first - TEXT_LEAD <= frame < span.last for frame in word_frames)
        return span.frames < BACKCHANNEL and count < BACKCHANNEL_WORDS

    utterances = find_spans(agent, gap=PAUSE[0])
    taking = [span for span in utterances if not is_backchannel(span)]
    taker = lambda window: next((s for s in taking if s.first < window.last and s.last > window.first), None)
    all_turns = find_spans(user, gap=PAUSE[1] + 1)
    turns = [turn for turn in all_turns if turn.frames >= BACKCHANNEL or not agent[turn.first]]
    pauses = [
        Span(turn.first + gap.first, turn.first + gap.last)
        for turn in turns
        for gap in find_spans(~user[turn.first : turn.last])
        if gap.frames >= PAUSE[0]
    ]
    beginnings = [turn.first for turn in all_turns] + [frames]
    ends = [Span(turn.last, min(b for b in beginnings if b >= turn.last)) for turn in turns]
    ends = [Span(end.first, min(end.last, end.first + RESPONSE)) for end in ends if end.frames > PAUSE[1]]
    latencies = [max(0, span.first - end.first) / FRAME_RATE for end in ends if (span := taker(end)) is not None]
    backchannels = [span for span in utterances if is_backchannel(span)]
    seconds, speaking = frames / FRAME_RATE, float(agent.sum()) / FRAME_RATE
    count = None if words is None else len(words)
    return {
        "seconds": seconds, "silence": _ratio(seconds - speaking, seconds),
        "overlap": _ratio(float((agent & user).sum()) / FRAME_RATE, seconds),
        "words": count, "words_per_minute": _pace(count, seconds), "words_per_minute_speaking": _pace(count, speaking),
        "padding": _ratio(sum(not _is_text(token) for token in ids), len(ids)),
        **_spectrum(np.asarray(agent_pcm), agent),
        "repetition": repetition([token for token in ids if _is_text(token)]),
        "turns": len(ends), "tor_turn": _ratio(len(latencies), len(ends)),
        "latency": _median(latencies), "latencies": latencies,
        "pauses": len(pauses), "tor_pause": _ratio(sum(taker(pause) is not None for pause in pauses), len(pauses)),
        "backchannels": sum(any(turn.first <= span.first < turn.last for turn in turns) for span in backchannels),
    }  # fmt: skip


def _spectrum(pcm: np.ndarray, speaks: np.ndarray) -> dict[str, float | None]:
    """Return what garbled codes change first: the share of energy above TREBLE_HZ, where voices have little, and the
    mean spectral flatness (geometric over arithmetic mean of the power; 1 for white noise) of frames that speak."""
    frames = np.pad(pcm, (0, -len(pcm) % FRAME_SIZE)).reshape(-1, FRAME_SIZE)
    frames = frames[speaks[: len(frames)]]
    if not len(frames):
        return {"treble": None, "flatness": None}
    power = np.abs(np.fft.rfft(frames * np.hanning(FRAME_SIZE), axis=1)) ** 2 + 1e-12
    treble = power[:, round(TREBLE_HZ * FRAME_SIZE / SAMPLE_RATE) :].sum() / power.sum()
    return {"treble": float(treble), "flatness": float(np.mean(np.exp(np.log(power).mean(1)) / power.mean(1)))}


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _pace(count: int | None, seconds: float) -> float | None:
    """Return the count per minute; None for less than a second."""
    return None if count is None or seconds < 1 else 60 * count / seconds


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if len(values) else None


def summarise_replies(replies: Sequence[dict]) -> dict[str, float | int | None]:
    """Return the measures of several replies together; undefined ones are None.

    Times, words, turns and pauses are pooled, so that long replies weigh more. `repetition` is the mean over replies,
    `latency` the median over all turns taken, `looping` the share of replies that loop.
    """
    replies = [reply | {"speaking": reply["seconds"] * (1 - (reply["silence"] or 0))} for reply in replies]
    seconds, speaking = (sum(reply[key] for reply in replies) for key in ("seconds", "speaking"))
    words = [reply["words"] for reply in replies]
    count = None if None in words or not replies else sum(words)
    total = lambda key: sum(reply[key] for reply in replies)
    weighted = lambda rate, weight: sum((reply[rate] or 0) * reply[weight] for reply in replies)
    return {
        "replies": len(replies), "seconds": seconds, "silence": _ratio(seconds - speaking, seconds),
        "overlap": _ratio(weighted("overlap", "seconds"), seconds),
        "words_per_minute": _pace(count, seconds), "words_per_minute_speaking": _pace(count, speaking),
        "padding": _ratio(weighted("padding", "seconds"), seconds),
        **{key: _ratio(weighted(key, "speaking"), speaking) for key in ("treble", "flatness")},
        "repetition": _ratio(total("repetition"), len(replies)),
        "looping": _ratio(sum(reply["repetition"] >= LOOP_REPETITION for reply in replies), len(replies)),
        "turns": total("turns"), "tor_turn": _ratio(weighted("tor_turn", "turns"), total("turns")),
        "latency": _median([latency for reply in replies for latency in reply["latencies"]]),
        "pauses": total("pauses"), "tor_pause": _ratio(weighted("tor_pause", "pauses"), total("pauses")),
        "backchannels_per_minute": _pace(total("backchannels"), seconds),
    }  # fmt: skip


def reply_verdict(summary: dict) -> str | None:
    """Return a phrase for what is wrong with the replies of a `summarise_replies` (keys may be missing), else None."""
    silence, pace, looping = (summary.get(key) for key in ("silence", "words_per_minute", "looping"))
    if silence is not None and silence >= MUTE_SILENCE:
        return f"mute: silent {silence:.0%} of the time"
    if pace is not None and pace < WORDLESS_PACE:
        return f"wordless: {pace:.1f} words a minute"
    if looping is not None and looping >= LOOP_SHARE:
        return f"loops: {looping:.0%} of the replies repeat one phrase for half of their text or more"
    return None
