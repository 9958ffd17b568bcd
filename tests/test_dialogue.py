"""Measures of conversations in which every word and silence is known: made by hand, and of the tiny world."""

import json
import random

import numpy as np
import pytest
import sentencepiece
import torch

from finetune.audio.files import FRAME_RATE, read_audio
from finetune.audio.speech import voice_activity
from finetune.audio.words import read_alignments
from finetune.data.interleaver import Interleaver
from finetune.dialogue import measure_reply, repetition, reply_verdict, spoken_words, summarise_replies
from finetune.tools.toy.language import WORDS
from tests.support import speech_like


@pytest.fixture(scope="module")
def tokenizer(world):
    return sentencepiece.SentencePieceProcessor(str(world / "model/tokenizer.model"))


# --- Words ------------------------------------------------------------------------------------------------------------


def test_the_words_are_those_of_the_interleaver(tokenizer):
    interleaver = Interleaver(tokenizer)
    given = [("hello", 0.4, 0.5), ("harbour", 0.8, 1.2), ("seven", 1.04, 1.3), ("books", 4.0, 4.2)]
    frames, _ = interleaver(given, 0, 75)
    found = spoken_words(frames, tokenizer)
    assert [word for word, _, _ in found] == [word for word, _, _ in given]
    for (_, start, _), (_, said, end) in zip(given, found):
        assert said <= start + 0.24 and said > start - 0.08 and end > said
    assert spoken_words([3, 0, -1, 3], tokenizer) == []
    assert spoken_words(torch.tensor([3, 10**6, 3]), tokenizer) == [], "a token that the tokenizer does not have"


def test_a_word_ends_with_its_last_token(tokenizer):
    parts = next(ids for ids in map(tokenizer.encode, WORDS) if len(ids) > 1)
    first, *rest = parts
    word = tokenizer.decode(parts)
    assert spoken_words([3, 3, first, 0, *rest, 3], tokenizer) == [[word, 2 / 12.5, (4 + len(rest)) / 12.5]]
    assert spoken_words([first, *rest, first, *rest], tokenizer) == [
        [word, 0.0, len(parts) / 12.5], [word, len(parts) / 12.5, 2 * len(parts) / 12.5],
    ]  # fmt: skip
    (word,) = spoken_words([3, rest[0], 3], tokenizer)
    assert word[1:] == [1 / 12.5, 2 / 12.5], "a word whose first token is missing"


def brute_force(tokens):
    """Repetition by the longest phrase of four or more that recurs without overlap, by trying all pairs."""
    for n in range(len(tokens) // 2, 3, -1):
        best = 0
        for i in range(len(tokens) - n + 1):
            at, count = i, 0
            while at <= len(tokens) - n:
                same = tokens[at : at + n] == tokens[i : i + n]
                count += same
                at += n if same else 1
            best = max(best, count)
        if best >= 2:
            return best * n / len(tokens)
    return 0.0


def test_repetition_is_the_share_of_the_longest_repeated_phrase():
    rng = random.Random(0)
    for _ in range(300):
        tokens = [rng.randrange(rng.choice((1, 2, 3, 6))) for _ in range(rng.randrange(40))]
        assert repetition(tokens) == pytest.approx(brute_force(tokens)), tokens


def test_repetition_of_loops_phrases_and_short_texts():
    fresh = list(range(100, 180))
    assert repetition(fresh) == 0
    assert repetition([7] * 200) == 1
    assert repetition([1, 2, 3, 4, 5] * 20) == 1
    assert repetition([*fresh[:40], *[1, 2] * 20]) == 0.5
    assert repetition([*fresh[:36], 1, 2, 3, 4, *fresh[36:72], 1, 2, 3, 4]) == pytest.approx(0.1)
    for short in ([], [1], [1, 1, 1], [1, 2, 1, 2, 1, 2, 1]):
        assert repetition(short) == 0


# --- Turn-taking ------------------------------------------------------------------------------------------------------


def scene(seconds, user, agent, tokenizer, **kwargs):
    """Measures of a conversation: spans of the user; (start, end, words) of the agent."""
    text = [3] * round(seconds * FRAME_RATE)
    token = next(ids[0] for ids in map(tokenizer.encode, WORDS) if len(ids) == 1)
    for start, _, count in agent:
        first = round(start * FRAME_RATE)
        text[first : first + count] = [token] * count
    agent_pcm = speech_like(seconds, [(start, end) for start, end, _ in agent], **kwargs)
    return measure_reply(agent_pcm, speech_like(seconds, user, **kwargs), torch.tensor(text), tokenizer)


# The user speaks 1-3 s and 3.6-5.2 s: one turn with one pause; it ends at 5.2 s. Word counts are the agent's.
@pytest.mark.parametrize(
    ("agent", "tor_turn", "latency", "tor_pause", "backchannels"),
    [
        ([], 0, None, 0, 0),  # mute
        ([(6, 8, 6)], 1, 0.8, 0, 0),  # takes the turn
        ([(6, 6.4, 1)], 0, None, 0, 0),  # "yes": short and one word
        ([(6, 6.8, 3)], 1, 0.8, 0, 0),  # short, but three words
        ([(6, 7.2, 1)], 1, 0.8, 0, 0),  # one word, but long
        ([(6, 6.4, 1), (6.64, 7.2, 1)], 1, 0.8, 0, 0),  # two of them without a pause are one utterance
        ([(6, 6.96, 1)], 0, None, 0, 0),  # 0.96 s is short
        ([(6, 7.04, 1)], 1, 0.8, 0, 0),  # and 1.04 s is long
        ([(6, 6.4, 2)], 1, 0.8, 0, 0),  # two words are enough
        ([(6, 6.4, 1), (6.72, 7.2, 1)], 1, 0.8, 0, 0),  # 0.32 s between them is no pause
        ([(6, 6.4, 1), (6.8, 7.2, 1)], 0, None, 0, 0),  # and 0.40 s is one
        ([(10.08, 12, 4)], 1, 4.88, 0, 0),  # just in time
        ([(10.16, 12, 4)], 0, None, 0, 0),  # too late: after the 62 frames in 5 s
        ([(4.8, 8, 8)], 1, 0, 0, 0),  # before the end
        ([(3.2, 4.4, 4)], 0, None, 1, 0),  # takes the pause, and falls silent again
        ([(3.2, 8, 10)], 1, 0, 1, 0),  # takes the pause and keeps the floor
        ([(3.2, 3.52, 1), (5.6, 8, 8)], 1, 0.4, 0, 1),  # "uh-huh" in the pause
        ([(2.0, 2.4, 1), (4.4, 4.8, 0)], 0, None, 0, 2),  # two backchannels, one without text
        ([(0, 16, 30)], 1, 0, 1, 0),  # never stops
    ],
)  # fmt: skip
def test_take_over_latency_and_backchannels(agent, tor_turn, latency, tor_pause, backchannels, tokenizer):
    for noise_db in (None, -60):
        found = scene(16, [(0.96, 3.04), (3.6, 5.2)], agent, tokenizer, noise_db=noise_db)
        assert (found["turns"], found["pauses"]) == (1, 1)
        assert (found["tor_turn"], found["tor_pause"], found["backchannels"]) == (tor_turn, tor_pause, backchannels)
        assert found["latency"] == (None if latency is None else pytest.approx(latency))


def test_a_word_may_come_a_little_before_its_sound(tokenizer):
    agent = speech_like(16, [(6, 6.8)])
    token = next(ids[0] for ids in map(tokenizer.encode, WORDS) if len(ids) == 1)
    for first, taken in ((73, 1), (72, 0)):  # 0.16 s before the sound, and 0.24 s
        text = [3] * 200
        text[first : first + 2] = [token] * 2
        assert measure_reply(agent, speech_like(16, [(1, 5)]), text, tokenizer)["tor_turn"] == taken


def test_pauses_are_longer_than_hesitations_and_shorter_than_ends(tokenizer):
    def counts(*user):
        found = scene(20, user, [], tokenizer)
        return found["turns"], found["pauses"]

    assert counts((1.04, 3.04), (3.36, 5.04)) == (1, 0)  # 0.32 s: no pause
    assert counts((1.04, 3.04), (3.44, 5.04)) == (1, 1)  # 0.40 s
    assert counts((1.04, 3.04), (4.0, 5.04)) == (1, 1)  # 0.96 s
    assert counts((1.04, 3.04), (4.08, 5.04)) == (2, 0)  # 1.04 s: two turns
    assert counts((1.04, 3.04), (17.04, 19.44)) == (1, 0)  # the last one ends too late to be answered
    assert counts() == (0, 0)


def test_a_remark_while_the_agent_speaks_is_not_a_turn(tokenizer):
    long = [(4.0, 12.0, 20)]
    assert scene(20, [(1.04, 3.04), (6.0, 6.4)], long, tokenizer)["turns"] == 1
    assert scene(20, [(1.04, 3.04), (6.0, 6.96)], long, tokenizer)["turns"] == 1
    assert scene(20, [(1.04, 3.04), (6.0, 7.04)], long, tokenizer)["turns"] == 2
    assert scene(20, [(1.04, 3.04), (6.0, 8.0)], long, tokenizer)["turns"] == 2  # an interruption
    assert scene(20, [(1.04, 3.04), (14.0, 14.4)], long, tokenizer)["turns"] == 2  # a short turn


def test_shares_and_paces(tokenizer):
    found = scene(20, [(0, 4), (8, 12)], [(4, 9.04, 10), (14, 16.48, 5)], tokenizer)
    assert found["silence"] == pytest.approx(1 - (5.04 + 2.48) / 20)
    assert found["overlap"] == pytest.approx(1.04 / 20)
    assert found["words"] == 15 and found["words_per_minute"] == pytest.approx(45)
    assert found["words_per_minute_speaking"] == pytest.approx(15 / 7.52 * 60)
    unread = measure_reply(speech_like(20, [(4, 9)]), speech_like(20, [(0, 4)]), [3] * 250)
    assert unread["words"] is None and unread["words_per_minute"] is None and unread["tor_turn"] == 1
    assert unread["repetition"] == 0, "padding does not count"
    shorter = measure_reply(speech_like(10, [(4, 9.04)]), speech_like(20, [(0, 4)]), [3] * 125)
    assert shorter["seconds"] == 20 and shorter["silence"] == pytest.approx(1 - 5.04 / 20)
    nothing = measure_reply(np.zeros(0), np.zeros(0), [], tokenizer)
    assert nothing["silence"] is None and nothing["words_per_minute"] is None
    assert scene(20, [(0, 4)], [(6, 6.8, 3)], tokenizer)["words_per_minute_speaking"] is None  # of less than a second
    json.dumps([found, unread, nothing], allow_nan=False)


def test_an_answer_is_awaited_until_the_user_goes_on(tokenizer):
    agent = [(6.96, 9.04, 6)]
    assert scene(20, [(1.04, 3.04), (6.0, 8.0)], agent, tokenizer)["tor_turn"] == 0.5  # only the second turn is taken
    assert scene(20, [(1.04, 3.04)], agent, tokenizer)["latency"] == pytest.approx(3.92)
    # A remark ends the wait, too, although it is not a turn.
    remark = [(1.04, 3.04), (5.04, 5.36)]
    answers = [(4.8, 5.2, 1), (6.0, 8.0, 6)]
    assert scene(20, remark, answers, tokenizer)["turns"] == 1
    assert scene(20, remark, answers, tokenizer)["tor_turn"] == 0
    assert scene(20, [(1.04, 3.04)], answers, tokenizer)["tor_turn"] == 1


def test_backchannels_are_those_during_turns_of_the_user(tokenizer):
    user = [(1.04, 5.04), (8.0, 8.4)]
    assert scene(20, user, [(0.32, 0.64, 1), (5.04, 5.36, 1), (6.0, 6.4, 1)], tokenizer)["backchannels"] == 0
    assert scene(20, user, [(1.04, 1.36, 1), (4.96, 5.28, 1)], tokenizer)["backchannels"] == 2
    assert scene(20, user, [(2.0, 2.4, 2), (3.2, 4.4, 1)], tokenizer)["backchannels"] == 0


def test_without_a_tokenizer_a_backchannel_is_recognised_by_its_length():
    user = speech_like(20, [(1.04, 5.04)])
    short, long = (measure_reply(speech_like(20, [(6, end)]), user, [5] * 250) for end in (6.8, 7.2))
    assert (short["tor_turn"], long["tor_turn"]) == (0, 1)


def test_the_dialogues_of_the_tiny_world_are_measured_as_they_were_made(world, tokenizer):
    interleaver = Interleaver(tokenizer)
    replies = []
    for path in sorted((world / "data/eval").glob("*.wav")):
        facts = json.loads(path.with_suffix(".json").read_text())
        words = read_alignments(facts["alignments"])
        pcm = read_audio(path)
        frames = len(voice_activity(pcm[0]))
        text, _ = interleaver(words, 0, frames)
        found = measure_reply(*pcm, text, tokenizer)
        assert found["turns"] == len(facts["turns"]) and found["tor_turn"] == 1
        assert found["words"] == len(words) and found["overlap"] == found["pauses"] == 0
        for turn, latency in zip(facts["turns"], found["latencies"]):
            answer = min(start for _, start, _ in words if start >= turn["asked_sec"])
            assert latency == pytest.approx(answer - turn["asked_sec"], abs=0.0801)
        replies.append(found)
    assert reply_verdict(summarise_replies(replies)) is None


# --- Several replies --------------------------------------------------------------------------------------------------


def test_a_summary_is_what_one_long_conversation_would_measure(tokenizer):
    parts = [
        (16, [(0.96, 3.04), (3.6, 5.2)], [(3.2, 3.52, 1), (5.6, 8, 8)]),
        (24, [(1.04, 2.96), (10, 12)], [(2.4, 4.8, 5), (13.04, 14.8, 7)]),
        (12, [(1.04, 3.04), (3.6, 5.04)], []),
    ]
    joined, shift = ([], []), 0
    for seconds, user, agent in parts:
        joined[0].extend((a + shift, b + shift) for a, b in user)
        joined[1].extend((a + shift, b + shift, n) for a, b, n in agent)
        shift += seconds
    summary = summarise_replies([scene(*part, tokenizer) for part in parts])
    whole = scene(shift, *joined, tokenizer)
    same = set(summary) & set(whole) - {"repetition", "treble", "flatness"}  # means over replies
    assert same >= {"seconds", "silence", "overlap", "words_per_minute", "turns", "tor_turn", "latency", "tor_pause"}
    for key in same:
        assert summary[key] == pytest.approx(whole[key]), key
    assert summary["backchannels_per_minute"] == pytest.approx(60 * whole["backchannels"] / shift)
    json.dumps(summary, allow_nan=False)


def test_the_spectrum_tells_a_voice_from_noise(tokenizer):
    """A tone of 200 Hz has no treble; white noise has half of its energy above 6 kHz, and a flat spectrum."""
    seconds = np.arange(3 * 24000) / 24000
    noise = np.random.default_rng(0).normal(0, 0.1, len(seconds)).astype(np.float32)
    voiced = (seconds > 1) & (seconds < 2)  # the rest is silent, and not measured
    tone = (0.3 * np.sin(2 * np.pi * 200 * seconds) * voiced).astype(np.float32)
    silent = np.zeros_like(tone)
    low, flat = (measure_reply(pcm, silent, [3] * 37, tokenizer) for pcm in (tone, (noise * voiced).astype(np.float32)))
    assert low["treble"] < 1e-3 and low["flatness"] < 1e-3
    assert flat["treble"] == pytest.approx(0.5, abs=0.02) and 0.5 < flat["flatness"] < 0.65  # exp(-0.577) = 0.56
    nothing = measure_reply(silent, silent, [3, 0, 7, 3], tokenizer)
    assert nothing["treble"] is nothing["flatness"] is None and nothing["padding"] == 0.75


def test_no_replies_make_an_empty_summary():
    assert summarise_replies([])["silence"] is None
    assert reply_verdict(summarise_replies([])) is None
    assert reply_verdict({}) is None


def test_rates_are_weighted_by_counts_and_times():
    reply = measure_reply(np.zeros(0, np.float32), np.zeros(0, np.float32), [])
    first = reply | {"seconds": 10.0, "silence": 0.5, "overlap": 0.1, "words": 4, "turns": 1, "tor_turn": 1.0,
                     "latencies": [0.4], "pauses": 0, "repetition": 0.5, "backchannels": 1, "padding": 0.9,
                     "treble": 0.1, "flatness": 0.2}  # fmt: skip
    second = reply | {"seconds": 30.0, "silence": 0.9, "overlap": 0.0, "words": 10, "turns": 3, "tor_turn": 1 / 3,
                      "latencies": [0.8], "pauses": 2, "tor_pause": 0.5, "repetition": 0.1, "padding": 0.7,
                      "treble": 0.5, "flatness": 0.4}  # fmt: skip
    summary = summarise_replies([first, second])
    expected = {
        "replies": 2, "seconds": 40.0, "silence": 0.8, "overlap": 0.025, "words_per_minute": 21.0,
        "words_per_minute_speaking": 105.0, "repetition": 0.3, "looping": 0.5, "turns": 4, "tor_turn": 0.5,
        "latency": 0.6, "pauses": 2, "tor_pause": 0.5, "backchannels_per_minute": 1.5, "padding": 0.75,
        "treble": (0.1 * 5 + 0.5 * 3) / 8, "flatness": (0.2 * 5 + 0.4 * 3) / 8,
    }  # fmt: skip
    assert summary == {key: pytest.approx(value) for key, value in expected.items()}
    assert summarise_replies([first, second | {"words": None}])["words_per_minute"] is None


@pytest.mark.parametrize(
    ("summary", "verdict"),
    [
        ({"silence": 0.949, "words_per_minute": 5.0, "looping": 0.249}, None),
        ({"silence": 0.95, "words_per_minute": 0.0, "looping": 1.0}, "mute"),
        ({"silence": 0.94, "words_per_minute": 4.99, "looping": 1.0}, "wordless"),
        ({"silence": None, "words_per_minute": None, "looping": 0.25}, "loops"),
        ({"silence": 0.5, "words_per_minute": 60.0, "looping": None}, None),
    ],
)
def test_thresholds_of_the_verdict(summary, verdict):
    found = reply_verdict(summary)
    assert (found and found.split(":")[0]) == verdict


def test_a_reply_loops_from_half_of_its_text_on():
    reply = measure_reply(np.zeros(0, np.float32), np.zeros(0, np.float32), [])
    looping = lambda share: summarise_replies([reply | {"repetition": share}])["looping"]
    assert (looping(0.49), looping(0.5)) == (0, 1)


def test_verdicts(tokenizer):
    user = [(1.04, 3.04), (12, 14)]
    sound_reply = scene(20, user, [(4, 8, 12), (15.04, 17.04, 6)], tokenizer)
    mute = scene(20, user, [(4, 4.4, 1)], tokenizer)
    babble = scene(20, user, [(4, 12, 0)], tokenizer)
    loop = sound_reply | {"repetition": 0.8}
    say = lambda *replies: reply_verdict(summarise_replies(replies))
    assert say(*[sound_reply | {"repetition": 0.1}] * 4) is None
    assert say(mute, mute) == "mute: silent 98% of the time"
    assert say(babble) == "wordless: 0.0 words a minute"
    assert say(loop, *[sound_reply | {"repetition": 0.0}] * 3).startswith("loops: 25% of the replies")
    assert say(loop, *[sound_reply | {"repetition": 0.0}] * 5) is None
