"""The judge: rules equal to the scripts of Full-Duplex-Bench, clips of conversations, and what users feed it."""

import json
import shutil
import sys

import numpy as np
import pytest
import scipy.signal
import sentencepiece
from moshi.utils.compile import no_compile

from finetune.audio.files import read_audio, to_int16, write_conversation, write_wav
from finetune.audio.speech import voice_activity
from finetune.audio.words import read_alignments
from finetune.cli import UserError
from finetune.data.interleaver import Interleaver
from finetune.dialogue import spoken_words
from finetune.tools import generate
from finetune.tools.judge.clips import Clip, cut_conversation, end_with_sound, judge_clip, summarise_clips
from finetune.tools.judge.command import main
from finetune.tools.judge.rules import takes_over
from finetune.tools.judge.sound import PACKAGES, load_package, time_speech
from tests.engine import tiny_lm
from tests.support import speech_like
from tests.tools.stored import write_base

INF = float("inf")
HUMAN = [0.1, 0.2, 0.4, 0.2, 0.1]


@pytest.fixture
def extra():
    """The packages of the extra [judge]; skips the test if one is missing."""
    load_package.cache_clear()
    if missing := [name for name in PACKAGES if load_package(name) is None]:
        pytest.skip(f"needs the extra [judge]: {', '.join(missing)}")


@pytest.fixture(autouse=True)
def bare(request, monkeypatch):
    """All other tests run without them, as if they were not installed: noise is no speech to silero-vad."""
    if "extra" not in request.fixturenames:
        for package in PACKAGES.values():
            monkeypatch.setitem(sys.modules, package, None)
        load_package.cache_clear()
        request.addfinalizer(load_package.cache_clear)


# --- The rules --------------------------------------------------------------------------------------------------------

# The results are those of the scripts at d7336bd (benchmarks/judge_fuzz.py calls them); the lists are ours.
# (start, end) of the words, end of the user's turn, whether the turn is taken, latency.
TURNS = [
    ([], 0.5, False, None),
    ([(1.0, 1.3), (1.5, 1.9)], 0.5, False, None),
    ([(1.0, 1.2), (1.3, 1.5), (1.6, 1.99)], 0.5, False, None),
    ([(1.0, 1.2), (1.3, 1.5), (1.6, 2.0)], 0.5, True, 0.5),
    ([(1.0, 1.1), (1.1, 1.2), (1.2, 1.3), (1.3, 1.4)], 0.25, True, 0.75),
    ([(1.0, 2.5)], 0.5, True, 0.5),
    ([(1.0, 2.5)], 2.0, True, 0.0),
    ([(3.0, 3.2), (1.0, 1.2)], 0.5, False, None),
]
# Of pauses only, where the end of the last word may be unknown.
UNKNOWN_ENDS = [([(1.0, 1.1), (1.1, None)], False), ([(1.0, 1.1), (2.0, None)], True), ([(1.0, None)], False)]
# Words, segments of speech in a clip of 10 s, whether the agent takes over, backchannels, divergence from HUMAN.
LISTENING = [
    ([], [], False, 0, 1.0),
    ([(1.1, 1.3)], [(1.0, 1.5)], False, 1, 0.7809254142),
    ([(1.0, 1.2), (1.2, 1.3), (1.3, 1.5)], [(1.0, 1.5)], True, 1, 0.7809254142),
    ([(1.0, 1.9)], [(1.0, 2.0)], True, 1, 0.7381178454),
    ([(1.0, 4.0)], [(1.0, 4.0)], True, 1, 0.5853454862),
    ([(1.0, 1.2)], [(1.0, 4.1)], True, 0, 1.0),
    ([(1.0, 1.2), (4.0, 4.4)], [(1.0, 2.5), (4.0, 4.5)], False, 2, 0.6492124777),
    ([(1.0, 1.4), (3.0, 6.0)], [(1.0, 1.5), (3.0, 6.5), (8.0, 8.2)], True, 1, 0.7809254142),
    ([(1.5, 2.0), (2.0, 2.0), (2.5, 2.9), (1.0, 3.0)], [(2.0, 2.5)], True, 1, 0.7701535796),
    ([(1.5, 2.0), (2.0, 2.0), (2.6, 2.9), (1.0, 3.0)], [(2.0, 2.5)], False, 1, 0.7701535796),
    ([(2.0, 2.1), (2.1, 2.2), (2.2, None)], [(2.0, 2.5)], False, 1, 0.7701535796),
    ([(2.0, 2.1), (2.1, 2.2), (2.5, None)], [(2.0, 2.5)], True, 1, 0.7701535796),
    ([(9.5, 9.9)], [(0.0, 0.3), (5.1, 5.9), (9.5, 10.0)], False, 3, 0.6484651460),
]


def word_list(times):
    return [("w", start, end) for start, end in times]


@pytest.mark.parametrize(("times", "event", "taken", "latency"), TURNS)
@pytest.mark.parametrize("rule", ["pause", "turn", "interruption"])
def test_a_turn_is_taken_as_in_the_scripts(rule, times, event, taken, latency):
    found = judge_clip(Clip(rule, 0.0, INF, event), word_list(times), [])
    assert found["taken"] == taken
    assert rule == "pause" or found["latency"] == (None if latency is None else pytest.approx(latency))


@pytest.mark.parametrize(("times", "taken"), UNKNOWN_ENDS)
def test_the_end_of_the_last_word_may_be_unknown(times, taken):
    assert takes_over(word_list(times)) == taken


@pytest.mark.parametrize(("times", "segments", "taken", "count", "divergence"), LISTENING)
def test_listening_is_judged_as_in_the_scripts(times, segments, taken, count, divergence):
    found = judge_clip(Clip("backchannel", 0.0, 10.0, 0.0), word_list(times), segments, HUMAN)
    assert (found["taken"], found["frequency"]) == (taken, count / 10)
    assert found["divergence"] == pytest.approx(divergence, abs=1e-9)


def test_a_summary_weighs_each_clip_the_same():
    """And only clips whose turn was taken have a latency, as in the scripts."""
    clip = Clip("turn", 0.0, INF, 1.0)
    answers = [[(1.5, 3.0)], [(2.0, 4.0)], [], [(1.0, 1.1)]]
    table = summarise_clips([judge_clip(clip, word_list(times), []) for times in answers])
    assert table["turn"] == {"items": 4, "take_over": 0.5, "latency": 0.75}
    assert table["pause"] == {"items": 0, "take_over": None}


# --- Conversations ----------------------------------------------------------------------------------------------------


def write_reply(folder, name, user, agent, seconds=16, **about):
    """A reply as finetune.tools.generate writes it. Spans of the user; (start, end, words) of the agent, each word with
    one token in every third frame, or more closely."""
    agent_pcm = speech_like(seconds, [(start, end) for start, end, _ in agent])
    write_conversation(folder / f"{name}.wav", agent_pcm, speech_like(seconds, user))
    words = []
    for start, end, count in agent:
        step = min(0.24, (end - start) / max(1, count))
        words += [["word", start + i * step, start + i * step + 0.08] for i in range(count)]
    (folder / f"{name}.json").write_text(json.dumps({"user": "u.wav", "words": words} | about))


@pytest.fixture
def judge(call, tmp_path):
    """Judges; returns (exit code, {rules, sound, replies, problems})."""

    def run(*arguments):
        code = call(main, *arguments, "--out", tmp_path / "results/judged.json")
        return code, json.loads((tmp_path / "results/judged.json").read_text())

    return run


# The user speaks 1-3 s and 3.6-5.2 s: one turn with one pause; it ends at 5.2 s. Word counts are the agent's.
@pytest.mark.parametrize(("agent", "turn", "latency", "pause"), [
    ([], 0, None, 0),
    ([(6.0, 8.0, 6)], 1, 0.8, 0),
    ([(6.0, 6.4, 1)], 0, None, 0),  # "yes"
    ([(6.0, 6.8, 3)], 0, None, 0),  # three words are still none
    ([(6.0, 6.8, 4)], 1, 0.8, 0),
    ([(6.0, 7.2, 1)], 1, 0.8, 0),  # the only token takes 0.08 s, its sound 1.2 s
    ([(3.2, 4.4, 4)], 0, None, 1),  # in the pause only
    ([(3.2, 3.5, 1), (5.6, 8.0, 8)], 1, 0.4, 0),
    ([(10.0, 12.0, 4)], 1, 4.8, 0),
    ([(10.4, 12.0, 4)], 0, None, 0),  # after 5 s
    ([(1.6, 2.4, 4)], 0, None, 0),  # said before the pause
])  # fmt: skip
def test_turns_and_pauses_of_a_conversation(agent, turn, latency, pause, judge, tmp_path):
    write_reply(tmp_path, "a", [(0.96, 3.04), (3.6, 5.2)], agent)
    code, found = judge(tmp_path)
    rules = found["rules"]
    assert (code, rules["turn"]["items"], rules["pause"]["items"], rules["interruption"]["items"]) == (0, 1, 1, 0)
    assert (rules["turn"]["take_over"], rules["pause"]["take_over"]) == (turn, pause)
    assert rules["turn"]["latency"] == (None if latency is None else pytest.approx(latency))


def cut(user, agent, seconds=16):
    """Rules and times of the clips; all spans in seconds."""
    clips = cut_conversation(*(voice_activity(speech_like(seconds, side)) for side in (agent, user)))
    return [(clip.rule, round(clip.start, 2), round(clip.end, 2)) for clip in clips]


def test_who_begins_while_the_agent_speaks_interrupts():
    assert cut([(2.0, 4.0)], [(0.4, 2.8)]) == [("interruption", 4.0, 8.96)]
    assert cut([(2.0, 4.0)], [(0.4, 1.6)]) == [("turn", 4.0, 8.96)]
    assert cut([(2.0, 2.8)], [(0.4, 6.0)]) == [], "less than 1 s is a remark"
    assert cut([(2.0, 2.8)], []) == [("turn", 2.8, 7.76)]


def test_answers_and_pauses_end_where_the_user_goes_on():
    turns = [("turn", 2.0, 4.0), ("turn", 6.0, 10.96)]
    assert cut([(0.4, 2.0), (4.0, 6.0)], []) == turns
    pauses = [("pause", 2.0, 2.48), ("pause", 3.28, 3.92), ("turn", 4.4, 9.36)]
    assert cut([(0.8, 2.0), (2.48, 3.28), (3.92, 4.4)], []) == pauses
    assert cut([(0.4, 15.9)], [])[0][0] == "backchannel", "nobody waits for an answer at the end"


@pytest.mark.parametrize(("agent", "taken", "count"), [
    ([], 0, 0),
    ([(3.2, 3.6, 1)], 0, 1),
    ([(2.0, 2.4, 1), (5.6, 6.0, 1)], 0, 2),
    ([(3.2, 5.0, 6)], 1, 1),
    ([(8.4, 9.6, 4)], 0, 0),  # the answer, which begins in the last second
    ([(0.0, 1.2, 3)], 0, 0),  # began before the user
])  # fmt: skip
def test_listening_in_a_conversation(agent, taken, count, judge, tmp_path):
    """The user speaks from 0.8 to 9.04 s, of which 7.28 s are judged."""
    write_reply(tmp_path, "a", [(0.8, 9.04)], agent)
    found = judge(tmp_path)[1]["rules"]["backchannel"]
    assert (found["items"], found["take_over"]) == (1, taken)
    assert found["frequency"] == pytest.approx(count / 7.28, rel=0.01)


def test_a_word_of_the_text_stream_lasts_as_long_as_its_sound():
    """Up to the next word, or the end of the speech. Words without sound keep their times."""
    agent = voice_activity(speech_like(8, [(1.04, 2.0), (4.0, 5.2)]))
    words = [("a", 0.96, 1.04), ("b", 1.36, 1.44), ("c", 4.0, 4.24), ("d", 6.4, 6.48)]
    expected = [("a", 0.96, 1.36), ("b", 1.36, 2.0), ("c", 4.0, 5.2), ("d", 6.4, 6.48)]
    for (text, start, end), own in zip(expected, end_with_sound(words, agent)):
        assert own[:2] == (text, start) and own[2] == pytest.approx(end)


def test_the_recorded_agents_of_a_manifest_are_judged(world, judge):
    """Those of the tiny world answer each turn: the scripts call it taken if they say enough."""
    code, found = judge(world / "data/eval.jsonl")
    assert code == 0 and len(found["replies"]) == len((world / "data/eval.jsonl").read_text().splitlines())
    tokenizer = sentencepiece.SentencePieceProcessor(str(world / "model/tokenizer.model"))
    for reply, line in zip(found["replies"], (world / "data/eval.jsonl").read_text().splitlines()):
        wav = world / "data" / json.loads(line)["path"]
        facts = json.loads(wav.with_suffix(".json").read_text())
        words = read_alignments(facts["alignments"])
        asked = [turn["asked_sec"] for turn in facts["turns"]]
        assert [clip["at"] for clip in reply["clips"]] == pytest.approx(asked, abs=0.0801)
        agent = voice_activity(read_audio(wav)[0])
        stream = end_with_sound(spoken_words(Interleaver(tokenizer)(words, 0, len(agent))[0], tokenizer), agent)
        assert [word for word, _, _ in stream] == [word for word, _, _ in words]
        for clip, start, end in zip(reply["clips"], asked, [*asked[1:], INF]):
            answer = [word for word in words if start <= word[1] < end]
            assert clip["taken"] == takes_over(answer)
            assert not clip["taken"] or clip["latency"] == pytest.approx(answer[0][1] - start, abs=0.0801)
            ends = [word for word in stream if start <= word[1] < end][-1][2], answer[-1][2]
            assert ends[0] == pytest.approx(ends[1], abs=0.17), "the stream alone is 0.2 s and more away"


def test_what_generate_writes_can_be_judged(companions, judge, call, tmp_path):
    model = write_base(tmp_path / "model", tiny_lm(8, text_card=400), companions)
    users = [tmp_path / f"{name}.wav" for name in "ab"]
    for user in users:
        write_wav(user, to_int16(speech_like(2, [(0.4, 1.6)])[None]))
    with no_compile():
        out = ("--out", tmp_path / "replies", "--text", tmp_path / "replies", "--tail-sec", 2)
        call(generate.main, model, "--user-wav", *users, *out)
    code, found = judge(tmp_path / "replies")
    assert code == 0 and len(found["replies"]) == 2
    assert [clip["rule"] for reply in found["replies"] for clip in reply["clips"]] != []


def test_of_a_run_the_newest_evaluation_is_judged(judge, tmp_path):
    for step, agent in ((0, []), (10, [(6.0, 8.0, 6)])):
        folder = tmp_path / f"run/samples/step_{step:06d}"
        folder.mkdir(parents=True)
        write_reply(folder, "00", [(0.96, 5.2)], agent)
        about = json.loads((folder / "00.json").read_text())
        (folder / "00.json").write_text(json.dumps({"of": "x", "prompt": "", "voice": None, "text": about["words"]}))
    assert judge(tmp_path / "run")[1]["rules"]["turn"] == {"items": 1, "take_over": 1, "latency": pytest.approx(0.8)}


def test_a_copy_of_the_user_is_measured(judge, tmp_path):
    user, agent = speech_like(16, [(1.0, 5.0)]), speech_like(16, [(6.0, 8.0)])
    write_reply(tmp_path, "clean", [(1.0, 5.0)], [(6.0, 8.0, 4)])
    copy = np.roll(user, 1200) * 10 ** (-12 / 20)
    write_conversation(tmp_path / "echo.wav", agent + copy, user)
    shutil.copy(tmp_path / "clean.json", tmp_path / "echo.json")
    levels = [reply["sound"]["echo_db"] for reply in judge(tmp_path)[1]["replies"]]
    assert levels == [None, pytest.approx(-12, abs=0.5)]


# --- The benchmark ----------------------------------------------------------------------------------------------------


def test_clips_of_the_benchmark_are_judged_by_their_annotations(judge, tmp_path):
    """All words of a clip count, but for an interruption those after it; a clip without annotation is for listening."""
    agent = {
        "1": [(0.4, 1.6, 4)], "2": [(6.0, 8.0, 6)], "3": [(0.4, 4.0, 9)], "4": [(3.2, 3.6, 1), (9.6, 10.0, 1)],
    }  # fmt: skip
    notes = {
        "1": ("pause.json", [3.0, 3.5]),
        "2": ("turn_taking.json", [5.2, 6.0]),
        "3": ("interrupt.json", [2.0, 5.0]),
    }
    replies = tmp_path / "replies"
    replies.mkdir()
    for name, said in agent.items():
        write_reply(replies, name, [(0.96, 5.2)], said)
        (tmp_path / "bench" / name).mkdir(parents=True)
        if name in notes:
            file, times = notes[name]
            (tmp_path / "bench" / name / file).write_text(json.dumps([{"text": "", "timestamp": times}]))
    timing = tmp_path / "timing.json"
    timing.write_text(json.dumps(dict.fromkeys(agent, HUMAN)))
    code, found = judge(replies, "--benchmark", tmp_path / "bench", "--human-timing", timing)
    rules = found["rules"]
    assert code == 0 and rules["pause"] == {"items": 1, "take_over": 1}
    assert rules["turn"] == {"items": 1, "take_over": 1, "latency": pytest.approx(0.8)}
    assert rules["interruption"] == {"items": 1, "take_over": 0, "latency": None}
    listening = rules["backchannel"]
    assert (listening["items"], listening["take_over"], listening["frequency"]) == (1, 0, 2 / 16)
    assert 0 < listening["divergence"] < 1


def test_clips_that_hold_their_replies(judge, tmp_path):
    """As the benchmark lays them out: mono files at 16 kHz, words by speech recognition, whose last end may be null."""
    for name, words in (("7", [("Yes,", 3.4, 3.9), ("it", 4.5, None)]), ("8", [])):
        clip = tmp_path / name
        clip.mkdir()
        for side in ("input", "output"):
            write_wav(clip / f"{side}.wav", to_int16(speech_like(4, [(1.0, 2.0)])[None]), 16_000)
        chunks = [{"text": text, "timestamp": [start, end]} for text, start, end in words]
        (clip / "output.json").write_text(json.dumps({"text": "", "chunks": chunks}))
        (clip / "turn_taking.json").write_text(json.dumps([{"timestamp": [2.0, 2.4]}]))
    code, found = judge(tmp_path)
    expected = {"items": 2, "take_over": 0.5, "latency": pytest.approx(1.4)}
    assert (code, found["rules"]["turn"]) == (0, expected)


# --- Mistakes and the extra -------------------------------------------------------------------------------------------


def test_one_bad_reply_costs_no_other(judge, tmp_path, capsys):
    for name in ("a", "b"):
        write_reply(tmp_path, name, [(0.96, 5.2)], [])
    (tmp_path / "b.json").write_text('{"words": [["a", 1.0, "x"]]}')
    code, found = judge(tmp_path)
    assert code == 0 and len(found["replies"]) == 1
    assert judge(tmp_path, "--strict")[0] == 1
    assert len(found["problems"]) == 1 and "b.json" in found["problems"][0] and "b.json" in capsys.readouterr().out


def test_results_never_replace_words(call, tmp_path):
    write_reply(tmp_path, "a", [(0.96, 5.2)], [])
    before = (tmp_path / "a.json").read_text()
    with pytest.raises(UserError, match=r"a\.json"):
        call(main, tmp_path, "--out", tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == before


def test_without_the_extra_the_rules_remain(judge, tmp_path, capsys):
    write_reply(tmp_path, "a", [(0.96, 5.2)], [(6.0, 8.0, 6)], voice="NATF2")
    code, found = judge(tmp_path)
    said = capsys.readouterr().out
    assert code == 0 and found["rules"]["turn"]["take_over"] == 1 and set(found["sound"]) == {"echo_db"}
    assert all(name in said for name in PACKAGES) and "[judge]" in said


def vowel(pitch, formants, seconds=5, seed=0):
    """float32 [samples] at 24 kHz: a voice of that pitch (Hz) that holds one vowel, in syllables."""
    t = np.arange(round(seconds * 24_000)) / 24_000
    pulses = np.diff(np.floor(np.cumsum(pitch * (1 + 0.1 * np.sin(4.4 * t + seed))) / 24_000), prepend=0)
    radius = np.exp(-np.pi * 90 / 24_000)
    for formant in formants:
        poles = [1, -2 * radius * np.cos(2 * np.pi * formant / 24_000), radius**2]
        pulses = scipy.signal.lfilter([1 - radius], poles, pulses)
    sound = pulses * np.sqrt(0.5 + 0.5 * np.sin(18.8 * t + seed))
    return (0.5 * sound / np.abs(sound).max()).astype(np.float32)


LOW, HIGH = (110, (650, 1100, 2500)), (220, (400, 2200, 3000))


def test_the_agent_is_compared_with_its_voice_prompt(extra, judge, tmp_path):
    """The one that a reply names, in --voices-dir, or that of --voice. A .pt holds no sound to compare."""
    (tmp_path / "voices").mkdir()
    for name, voice in (("low", LOW), ("high", HIGH)):
        write_wav(tmp_path / f"voices/{name}.wav", to_int16(vowel(*voice, seed=1)[None]))
    (tmp_path / "voices/shipped.pt").touch()
    replies = tmp_path / "replies"
    replies.mkdir()
    for name in ("low.wav", "high", "shipped.pt", None):
        write_reply(replies, f"{name}", [], [], voice=name)
        write_conversation(replies / f"{name}.wav", vowel(*LOW), np.zeros(24_000))
    found = judge(replies, "--voices-dir", tmp_path / "voices")[1]
    named = {reply["reply"].rsplit("/", 1)[1]: reply["sound"]["similarity"] for reply in found["replies"]}
    assert named["low.wav.wav"] > 0.9 and named["high.wav"] < 0.7
    assert (
        named["shipped.pt.wav"] is None and named["None.wav"] is None and found["sound"]["similarity"]["replies"] == 2
    )
    found = judge(replies, "--voice", tmp_path / "voices/high.wav")[1]
    assert found["sound"]["similarity"] == {"replies": 4, "mean": pytest.approx(named["high.wav"])}


def test_noise_costs_quality_and_silence_does_not(extra, judge, tmp_path):
    clean = vowel(*LOW)
    noise = 0.1 * np.random.default_rng(0).standard_normal(len(clean))
    silence = np.zeros(20 * 24_000)
    for name, agent in (("a", clean), ("b", clean + noise), ("c", np.concatenate([silence, clean])), ("d", silence)):
        write_reply(tmp_path, name, [], [])
        write_conversation(tmp_path / f"{name}.wav", agent, np.zeros(24_000))
    scores = [reply["sound"]["dnsmos_background"] for reply in judge(tmp_path)[1]["replies"]]
    assert scores[1] < scores[0] - 0.5 and scores[2] == pytest.approx(scores[0], abs=0.3) and scores[3] is None


def test_speech_is_found_by_silero_vad(extra):
    pcm = np.concatenate([np.zeros(24_000), vowel(*LOW)]).astype(np.float32)
    (start, _), *_ = time_speech(pcm, np.zeros(75, dtype=bool))
    assert start == pytest.approx(1.0, abs=0.15)
