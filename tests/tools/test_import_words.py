"""Transcripts of other programs: what each format gives, whose words are whose, and what is never overwritten."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import annotate
from finetune.audio.annotation import missing_speakers
from finetune.audio.words import read_words
from finetune.cli import UserError
from finetune.data.manifest import read_manifest
from finetune.tools.import_words import command
from finetune.tools.import_words.alignment import ALIGNED, align_sentences
from finetune.tools.import_words.formats import READERS, Passage, Token, read_passages
from finetune.tools.import_words.timing import FILLED, SPREAD, time_words
from tests import support

MAIN = "SPEAKER_MAIN"


def word(text: str, start: float | None = None, end: float | None = None, speaker: str | None = None) -> dict:
    """A word as WhisperX writes it."""
    found = {"word": text, "start": start, "end": end, "speaker": speaker}
    return {key: value for key, value in found.items() if value is not None}


def whisperx(*segments: list[dict], **fields: object) -> str:
    return json.dumps({"segments": [{"text": "", "words": words} | fields for words in segments], "word_segments": []})


HELLO = whisperx([word("hello", 1.0, 1.3, "A"), word("there", 1.4, 1.7, "A"), word("hi", 2.0, 2.2, "B")])


@pytest.fixture
def calls(tmp_path) -> Path:
    """A manifest of two recordings without sound, `a.wav` and `b.wav`."""
    lines = [{"path": f"{name}.wav", "duration": 9.0} for name in "ab"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def write(folder: Path, **files: str | bytes) -> None:
    """Write files; in their names __ stands for the dot."""
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def run(folder: Path, *flags: str) -> int:
    return command.main([str(folder / "train.jsonl"), "--strict", *map(str, flags)])


def rows(path: Path) -> list[list]:
    return json.loads(path.read_text())["alignments"]


def test_with_an_output_folder_transcripts_may_lie_where_words_would(calls, tmp_path):
    """As WhisperX writes them; nothing next to the recordings is touched, and a second run replaces the first one."""
    write(calls, a__json=HELLO, b__json=HELLO)
    out = tmp_path / "of words"
    before = {path: path.read_bytes() for path in calls.iterdir()}
    for speaker in ("A", "B"):
        assert run(calls, "--speaker", f"{speaker}={MAIN}", "--output-dir", out) == 0
        assert {path: path.read_bytes() for path in calls.iterdir() if path != out} == before
        lines = list(read_manifest(out / "train.jsonl", []))
        found = [[text for text, *_ in read_words(line.words_path)[0]] for line in lines]
        assert found == [["hello", "there"] if speaker == "A" else ["hi"]] * 2
        assert [line.path for line in lines] == [calls / "a.wav", calls / "b.wav"]


# --- Formats ----------------------------------------------------------------------------------------------------------

TEXTGRID = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 3
tiers? <exists>
size = 3
item []:
    item [1]:
        class = "IntervalTier"
        name = "A - words"
        xmin = 0
        xmax = 3
        intervals: size = 3
        intervals [1]:
            xmin = 0
            xmax = 0.5
            text = ""
        intervals [2]:
            xmin = 0.5
            xmax = 0.9
            text = "say ""x"" 1"
        intervals [3]:
            xmin = 1
            xmax = 1.5
            text = "two"
    item [2]:
        class = "TextTier"
        name = "A - notes"
        xmin = 0
        xmax = 3
        points: size = 1
        points [1]:
            number = 1
            mark = "clap"
    item [3]:
        class = "IntervalTier"
        name = "A - phones"
        xmin = 0
        xmax = 3
        intervals: size = 1
        intervals [1]:
            xmin = 0.5
            xmax = 0.9
            text = "s"
"""
SHORT = '"ooTextFile"\n"TextGrid"\n0\n3\n<exists>\n1\n"IntervalTier"\n"Ann"\n0\n3\n1\n0.5\n0.9\n"Grüße"\n'
SRT = """1
00:00:01,000 --> 00:00:02,500
[SPEAKER_00]: <i>hello
there</i>

2
00:01:00,5 --> 00:01:01,000
yes
""".replace("\n", "\r\n")
VTT = """WEBVTT - calls

NOTE by hand

00:01.000 --> 00:01.500 align:start
<v Ann Lee>hello

01:00:00.000 --> 01:00:00.500
Bob: yes
"""
FORMATS = [
    ("json", HELLO, [("A", "hello", 1.0, 1.3), ("A", "there", 1.4, 1.7), ("B", "hi", 2.0, 2.2)]),
    ("json", whisperx([word("42")], speaker="A", start=1.0, end=4.1), [("A", "42", None, None)]),
    ("json", json.dumps({"text": "hi you", "segments": [{"start": 1, "end": 2, "text": " hi you"}]}),
     [(None, "hi you", 1, 2)]),
    ("json", json.dumps({"segments": [{"words": [{"text": "hi", "start": 1, "end": 2, "confidence": 0.3}]}]}),
     [(None, "hi", 1, 2)]),
    ("json", json.dumps({"segments": [{"text": "hi you", "start": 0, "end": 9}], "words": [
        {"word": "hi", "start": 1, "end": 2}, {"word": "you", "start": 3, "end": 4}]}),
     [(None, "hi", 1, 2), (None, "you", 3, 4)]),
    ("json", json.dumps({"text": " hi", "chunks": [{"text": " hi", "timestamp": [1, None]}]}), [(None, "hi", 1, None)]),
    ("json", json.dumps({"transcription": [{"text": " hi", "offsets": {"from": 80, "to": 410}}]}),
     [(None, "hi", 0.08, 0.41)]),
    ("ctm", ";; comment\nx A 1.5 0.25 hello 0.9\nx A * * <ALT_BEGIN>\nx B 2 0.5 hi\n",
     [("A", "hello", 1.5, 1.75), ("B", "hi", 2.0, 2.5)]),
    ("TextGrid", TEXTGRID, [("A", 'say "x" 1', 0.5, 0.9), ("A", "two", 1.0, 1.5)]),
    ("TextGrid", SHORT.encode("utf-16"), [("Ann", "Grüße", 0.5, 0.9)]),
    ("srt", SRT, [("SPEAKER_00", "hello there", 1.0, 2.5), (None, "yes", 60.5, 61.0)]),
    ("vtt", "\ufeff" + VTT, [("Ann Lee", "hello", 1.0, 1.5), ("Bob", "yes", 3600.0, 3600.5)]),
    ("txt", "# fe_03_00001.sph\n\n1.50 2.10 A: and [laughter] so\n2.00 2.40 B: yeah\n",
     [("A", "and [laughter] so", 1.5, 2.1), ("B", "yeah", 2.0, 2.4)]),
]  # fmt: skip


@pytest.mark.parametrize(("suffix", "content", "expected"), FORMATS, ids=lambda value: str(value)[:20])
def test_each_format_gives_speakers_words_and_times(tmp_path, suffix, content, expected):
    """A single word has its own times; several have those of the passage."""
    write(tmp_path, **{f"a__{suffix}": content})
    found = []
    for passage in read_passages(tmp_path / f"a.{suffix}"):
        if len(passage.words) > 1 and all(word.start is None for word in passage.words):
            found.append((passage.speaker, " ".join(word.text for word in passage.words), passage.start, passage.end))
        else:
            found += [(passage.speaker, *word) for word in passage.words]
    assert found == expected and {f".{suffix.lower()}"} <= READERS.keys()


BROKEN = [
    ("json", "{"), ("json", "[]"), ("json", '{"alignments": []}'), ("json", '{"segments": 5}'), ("json", "[" * 100_000),
    ("json", whisperx([word("hi", 2.0, 1.0)])), ("json", whisperx([word("hi", -1.0, 1.0)])),
    ("json", whisperx([word("hi", float("nan"), 1.0)])), ("json", '{"segments": [{"text": "a", "start": "1"}]}'),
    ("json", '{"segments": [{"text": 5}]}'), ("ctm", "x A 1 0.5 hi\nx A 1\n"), ("ctm", "x A 1 -0.5 hi\n"),
    ("ctm", "x A inf 0.5 hi\n"), ("txt", "1.0 2.0 A: hi\nhello\n"), ("txt", "1..0 2.0 A: hi\n"), ("srt", "hello there"),
    ("TextGrid", TEXTGRID[:300]), ("TextGrid", "hello"), ("txt", "1 2 A: caf\xe9".encode("latin-1")),
]  # fmt: skip


@pytest.mark.parametrize(("suffix", "content"), BROKEN, ids=lambda value: str(value)[:20])
def test_a_broken_transcript_is_named_and_costs_only_its_recording(calls, suffix, content, capsys):
    write(calls, **{f"words/a__{suffix}": content}, words__b__json=HELLO)
    (calls / "words.b.json").rename(calls / "words/b.json")
    assert run(calls, "--transcripts", calls / "words", "--speaker", f"A={MAIN}") == 1
    shown = capsys.readouterr().out
    assert str(calls / f"words/a.{suffix}") in shown and "1 x refused" in shown
    assert not (calls / "a.json").exists() and len(rows(calls / "b.json")) == 2


# --- Forced alignment -------------------------------------------------------------------------------------------------


def bursts(pcm: np.ndarray, text: str) -> list[tuple[float, float]] | None:
    """Find each word as a burst of sound; None if there are not as many."""
    loud = np.abs(pcm) > 0.05
    edges = np.flatnonzero(np.diff(np.concatenate([[False], loud, [False]]).astype(int))).reshape(-1, 2) / 16_000
    return [tuple(pair) for pair in edges.tolist()] if len(edges) == len(text.split()) else None


def test_the_words_of_sentences_are_found_in_the_channel_of_their_speaker(calls):
    said = {MAIN: [(1.2, 1.5), (3.0, 3.4)], "SPEAKER_USER": [(5.1, 5.3), (6.0, 6.2)]}
    pcm = np.zeros((2, 24_000 * 9), np.float32)
    for channel, spans in enumerate(said.values()):
        for start, end in spans:
            pcm[channel, int(start * 24_000) : int(end * 24_000)] = 0.5
    support.write_wav(calls / "a.wav", pcm, 24_000)
    cues = [("A", 1.0, 3.6, "one two"), ("B", 4.9, 6.4, "three four"), ("A", 7.0, 8.0, "not there"), ("A", 8, 8.5, "x")]
    passages = {"A": [], "B": []}
    for name, start, end, text in cues:
        words = text.split()
        passages[name].append(
            Passage(name, start, end, [Token(w, *(() if words[1:] else (start, end))) for w in words])
        )
    for speaker, own in zip(said, passages.values()):
        found, counts = align_sentences(bursts, calls / "a.wav", speaker, own)
        assert counts == {ALIGNED: 2} and found[1:] == own[1:], "what is not found, or has a time, stays as it is"
        times = np.array([word[1:] for word in found[0].words])
        assert np.abs(times - said[speaker]).max() < 0.005


def test_without_the_aligner_nothing_is_written(calls, monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_whisper", None)
    write(calls, a__txt="1.0 3.0 A: one two")
    with pytest.raises(UserError, match=r"pip install .*stable-ts"):
        run(calls, "--speaker", f"A={MAIN}", "--aligner", "stable-ts")
    assert not (calls / "a.json").exists()


# --- Diarisations -----------------------------------------------------------------------------------------------------


def rttm(*turns: tuple[str, float, float], recording: str = "a") -> str:
    rows = [f"SPEAKER {recording} 1 {start} {end - start:.3f} <NA> <NA> {name} <NA> <NA>" for name, start, end in turns]
    return "\n".join(rows)


TURNS = rttm(("S0", 0.0, 2.0), ("S1", 2.0, 3.0), ("S0", 4.0, 5.0))


def test_words_without_speakers_are_of_whoever_has_a_turn(calls):
    """By overlap; in a gap the nearest turn; a word without a time goes with the one before."""
    words = [word("a", 1.6, 2.2), word("b", 1.9, 2.9), word("7"), word("c", 3.1, 3.2), word("d", 3.6, 3.8)]
    write(calls, a__json=whisperx(words), a__rttm=TURNS)
    assert run(calls, "--speaker", f"S1={MAIN}", "--set-aside", "--output-dir", calls / "out") == 1  # b has none
    assert [row[0] for row in rows(calls / "out/a.json")] == ["b", "7", "c"]


@pytest.mark.parametrize("text, expected", [
    ("S0: one two\nS1: three\nS0: four\n", [("one", 0.0), ("two", 1.0), ("four", 4.0)]),  # a line for each turn
    ("S0: one two six\nS1: three\n", [("one", 0.0), ("two", 1.0), ("six", 4.0)]),
    ("S0: one\nS0: two\nS0: six\n", [("one", 0.0), ("two", 1.0), ("six", 4.0)]),
])  # fmt: skip
def test_text_without_times_is_spread_over_the_turns_of_its_speaker(calls, text, expected, capsys):
    write(calls, a__txt=text, a__rttm=TURNS, b__json=HELLO)
    (calls / "b.json").rename(calls / "b.transcript.json")
    flags = ("--speaker", f"S0={MAIN}", "--speaker", f"A={MAIN}")
    assert run(calls, *flags) == 1 and "--spread" in capsys.readouterr().out and not (calls / "a.json").exists()
    assert run(calls, *flags, "--spread") == 0
    assert [(row[0], row[1][0]) for row in rows(calls / "a.json")] == expected
    assert f"2 {SPREAD}" in capsys.readouterr().out  # "six" or "four" has a turn of its own


@pytest.mark.parametrize("text, turns, problem", [
    ("one two\nthree\n", TURNS, "NAME"), ("Ann: one two\n", TURNS, "S0, S1"), ("S0: one two\n", None, "a.rttm"),
    ("S0: one two\n", "SPEAKER a 1 x", "line 1"), ("S0: one two\n", "", "turns of"),
])  # fmt: skip
def test_text_that_no_diarisation_explains_is_refused(calls, text, turns, problem, capsys):
    write(calls, a__txt=text, **({} if turns is None else {"a__rttm": turns}))
    assert run(calls, "--speaker", f"*={MAIN}", "--spread") == 1
    assert problem in capsys.readouterr().out and not (calls / "a.json").exists()


def test_text_of_a_single_speaker_needs_no_names(calls):
    write(calls, a__txt="one two\n", a__rttm=rttm(("S0", 1.0, 3.0)))
    run(calls, "--speaker", f"S0={MAIN}", "--spread")
    assert rows(calls / "a.json") == [["one", [1.0, 2.0], MAIN], ["two", [2.0, 3.0], MAIN]]


# --- Times ------------------------------------------------------------------------------------------------------------


def timed(*words: tuple, start: float | None = None, end: float | None = None) -> Passage:
    return Passage(None, start, end, [Token(*word) for word in words])


def test_words_without_times_lie_between_their_neighbours_at_the_pace_of_the_others():
    """0.1 s a letter; a digit counts four letters."""
    passages = [
        timed(("abc", 1.0, 1.3), ("de",), ("f",), ("ghi", 1.45, 1.75)),  # a narrow gap: shared by letters
        timed(("42",), ("xy", 4.0, 4.2)),  # a wide gap before a word of the same passage: close to that
        timed(("abcd", 5.0, 5.4), ("7",)),  # the last of its passage: follows the word before it
        timed(("ab", 9.0, 9.2)),
    ]
    words, counts = time_words(passages)
    assert counts == {FILLED: 4}
    found = {text: (round(start, 3), round(end, 3)) for text, start, end in words}
    assert [text for text, *_ in words] == ["abc", "de", "f", "ghi", "42", "xy", "abcd", "7", "ab"]
    assert found["de"] == (1.3, 1.4) and found["f"] == (1.4, 1.45)
    assert found["42"] == (3.2, 4.0) and found["7"] == (5.4, 5.8)
    assert found["abc"] == (1.0, 1.3) and found["ab"] == (9.0, 9.2)


def test_a_run_over_a_pause_between_sentences_is_not_drawn_over_it():
    words, _ = time_words([timed(("ab", 1.0, 1.2), ("cd",)), timed(("ef",), ("gh", 8.0, 8.2))])
    assert [word[1] for word in words] == pytest.approx([1.0, 1.2, 7.8, 8.0])


def test_words_at_the_ends_and_between_overlapping_neighbours_have_times_too():
    words, counts = time_words(
        [timed(("ab",), ("cd", 0.1, 0.3), ("ef",), ("gh", 0.2, 0.4), ("ij", 0.5, None), ("kl",))]
    )
    assert counts == {FILLED: 3}
    starts, ends = zip(*(word[1:] for word in words))
    assert all(0 <= start <= end for start, end in zip(starts, ends))
    assert words[0][1:] == pytest.approx((0.0, 0.1)) and words[2][1:] == pytest.approx((0.3, 0.3))
    assert words[4][1:] == pytest.approx((0.5, 0.7)) and words[5][1:] == pytest.approx((0.7, 0.9))


def test_the_words_of_a_sentence_share_its_time_by_their_letters():
    words, counts = time_words([timed(("ab",), ("cdef",), ("gh",), start=2.0, end=3.6)])
    assert counts == {SPREAD: 3}
    assert [(text, round(start, 3), round(end, 3)) for text, start, end in words] == [
        ("ab", 2.0, 2.4), ("cdef", 2.4, 3.2), ("gh", 3.2, 3.6)]  # fmt: skip


@pytest.mark.parametrize("passages", [[timed(("a",))], [timed(("a",), ("b",))], [timed(("a",), ("b",), start=1.0)]])
def test_words_without_any_time_are_refused(passages):
    with pytest.raises(ValueError, match="time"):
        time_words(passages)


def test_marks_are_no_words():
    words, _ = time_words(
        [timed(("«", 1.0, 1.0), ("ça", 1.0, 1.2), ("va", 1.3, 1.5), ("?",), ("((",), ("&", 2.0, 2.1))]
    )
    assert [text for text, *_ in words] == ["ça", "va?", "&"]


def test_a_sentence_in_a_script_without_spaces_is_no_word(tmp_path):
    write(
        tmp_path,
        a__srt="1\n00:00:01,000 --> 00:00:03,000\nこんにちは世界のみなさん\n\n2\n00:00:04,000 --> 00:00:04,500\nはい\n",
    )
    sentence, yes = read_passages(tmp_path / "a.srt")
    assert len(sentence.words) == 12 and yes.words == [Token("はい", 4.0, 4.5)]


# --- Whose words ------------------------------------------------------------------------------------------------------


def test_words_are_what_training_reads_and_annotate_leaves_them(calls, capsys):
    write(calls, words__a=HELLO, words__b=HELLO)
    for name in "ab":
        (calls / f"words.{name}").rename(calls / f"{name}.transcript.json")
    assert run(calls, "--speaker", f"A={MAIN}", "--speaker", "B=SPEAKER_USER") == 0
    words, _ = read_words(calls / "a.json")
    assert words == [("hello", 1.0, 1.3), ("there", 1.4, 1.7)]
    assert read_words(calls / "a.json", ["SPEAKER_USER"])[0] == [("hi", 2.0, 2.2)]
    content = json.loads((calls / "a.json").read_text())
    assert missing_speakers(content, annotate.CHANNELS["both"]) == {}
    assert "4 words of SPEAKER_MAIN" in capsys.readouterr().out


def test_the_words_of_others_are_left_out_and_counted(calls, capsys):
    write(calls, a__ctm="a A 1 0.5 hi\na B 2 0.5 you\na B 3 0.5 there\n", b__ctm="b A 1 0.5 hi\n")
    assert run(calls, "--speaker", f"A={MAIN}") == 0
    assert rows(calls / "a.json") == [["hi", [1.0, 1.5], MAIN]]
    assert "2 left out: of B" in capsys.readouterr().out
    assert run(calls, "--speaker", f"*={MAIN}") == 0
    assert [row[0] for row in rows(calls / "a.json")] == ["hi", "you", "there"], "a second run replaces the first one's"


@pytest.mark.parametrize("flags", [(), ("--speaker", f"C={MAIN}")])
def test_names_must_be_mapped_and_exist_before_anything_is_written(calls, flags):
    write(calls, a__ctm="a A 1 0.5 hi\n", b__ctm="b B 1 0.5 hi\n")
    with pytest.raises(UserError, match=r"A \(1\), B \(1\)"):
        run(calls, *flags)
    assert not list(calls.glob("*.json"))


def test_a_recording_of_unknown_speakers_or_without_a_transcript_is_reported(calls, capsys):
    write(calls, a__ctm="a A 1 0.5 hi\n")
    assert run(calls, "--speaker", f"A={MAIN}") == 1
    assert f"1 x no transcript:\n  {calls / 'b.wav'}" in capsys.readouterr().out
    write(calls, b__ctm="b B 1 0.5 hi\n")
    assert run(calls, "--speaker", f"A={MAIN}") == 1
    assert "b.ctm: has only words of B" in capsys.readouterr().out and not (calls / "b.json").exists()


def test_a_recording_without_words_of_the_agent_is_reported(calls, capsys):
    write(calls, a__ctm="a A 1 0.5 hi\n", b__ctm="b B 1 0.5 hi\n")
    assert run(calls, "--speaker", f"A={MAIN}", "--speaker", "B=SPEAKER_USER") == 0
    assert f"the agent:\n  {calls / 'b.wav'}" in capsys.readouterr().out


def speech(spans: list[tuple[float, float]], level: float = 0.1, seconds: float = 9.0) -> np.ndarray:
    """float32 [samples] at 8 kHz: noise in the spans."""
    pcm = np.zeros(round(seconds * 8000), np.float32)
    for start, end in spans:
        samples = slice(round(start * 8000), round(end * 8000))
        pcm[samples] = np.random.default_rng(0).standard_normal(samples.stop - samples.start) * level
    return pcm.clip(-1, 1)


def test_by_channel_the_speaker_on_the_left_is_the_agent_whatever_the_names(calls):
    """Quiet channels, and bleed at -12 dB, do not matter; a speaker heard in both is left out."""
    agent, user = speech([(1.0, 2.0), (6.0, 6.5)]), speech([(3.0, 4.0), (6.0, 6.5)])
    for name, quiet in (("a", 1.0), ("b", 0.05)):
        pcm = np.stack([agent + user / 4, (user + agent / 4) * quiet])
        support.write_wav(calls / f"{name}.wav", pcm if name == "a" else pcm[::-1], 8000)
        write(calls, **{f"{name}__ctm": f"{name} S0 1 1.0 hello\n{name} S1 3 1.0 hi\n{name} S2 6 0.5 both\n"})
    assert run(calls, "--by-channel") == 0
    assert rows(calls / "a.json") == [["hello", [1.0, 2.0], MAIN], ["hi", [3.0, 4.0], "SPEAKER_USER"]]
    assert rows(calls / "b.json") == [["hello", [1.0, 2.0], "SPEAKER_USER"], ["hi", [3.0, 4.0], MAIN]]


# --- Which transcript -------------------------------------------------------------------------------------------------


def test_a_corpus_may_be_one_file(calls):
    write(calls, all__ctm="b 1 1 0.5 bee\na.wav 1 2 0.5 ay\nc 1 1 0.5 sea\n")
    assert run(calls, "--transcripts", calls / "all.ctm", "--speaker", f"1={MAIN}") == 0
    assert rows(calls / "a.json")[0][0] == "ay" and rows(calls / "b.json")[0][0] == "bee"


def test_transcripts_are_found_in_folders_of_the_same_names_and_by_priority(tmp_path, capsys):
    lines = [{"path": f"calls/{day}/1.wav", "duration": 9.0} for day in ("mon", "tue")]
    write(tmp_path, train__jsonl="".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "calls/mon").mkdir(parents=True)
    (tmp_path / "calls/tue").mkdir()
    write(tmp_path / "words/mon", **{"1__ctm": "1 A 1 0.5 monday\n", "1__srt": "broken subtitles"})
    flags = ("--transcripts", tmp_path / "words", "--speaker", f"A={MAIN}")
    assert run(tmp_path, *flags) == 1, "the other day's has the same name and is not taken"
    assert not (tmp_path / "calls/tue/1.json").exists() and rows(tmp_path / "calls/mon/1.json")[0][0] == "monday"
    (tmp_path / "words/mon/1.ctm").rename(tmp_path / "words/1.ctm")
    (tmp_path / "words/mon/1.srt").unlink()
    capsys.readouterr()
    assert run(tmp_path, *flags) == 1
    assert "2 x refused" in capsys.readouterr().out, "one transcript for two recordings"


@pytest.mark.parametrize(
    ("left", "right"), [("x_agent", "x_user"), ("agent/1", "caller/1"), ("agent/x_a", "caller/x_b")]
)
def test_a_joined_recording_has_the_transcripts_of_its_sides(tmp_path, left, right):
    """make_manifest joins x_agent.wav and x_user.wav; their transcripts name nobody."""
    from finetune.tools.make_manifest import command as make_manifest

    for side, seed in ((left, 1), (right, 2)):
        path = tmp_path / f"calls/{side}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        support.write_wav(path, np.random.default_rng(seed).standard_normal((1, 16_000)).clip(-1, 1) / 9, 8000)
        path.with_suffix(".json").write_text(whisperx([word("we" if side == left else "you", 0.5, 0.7)]))
    flags = ("--split", "0", "--workers", "0")
    assert make_manifest.main([str(tmp_path / "calls"), str(tmp_path / "train.jsonl"), *flags]) == 0
    assert run(tmp_path, "--transcripts", tmp_path / "calls") == 0
    (output,) = (tmp_path / "train_pairs").rglob("*.json")
    assert rows(output) == [["we", [0.5, 0.7], MAIN], ["you", [0.5, 0.7], "SPEAKER_USER"]]


def test_nothing_found_is_an_error(calls):
    with pytest.raises(UserError, match=r"a\.json or a\.ctm"):
        run(calls, "--speaker", f"A={MAIN}")


# --- What is not overwritten ------------------------------------------------------------------------------------------


def test_a_transcript_in_the_place_of_the_words_is_kept_or_renamed(calls, capsys):
    write(calls, a__json=HELLO, b__ctm="b A 1 0.5 hi\n")
    flags = ("--speaker", f"A={MAIN}")
    assert run(calls, *flags) == 1
    assert (calls / "a.json").read_text() == HELLO and "--set-aside" in capsys.readouterr().out
    for _ in range(2):
        assert run(calls, *flags, "--set-aside") == 0
        assert (calls / "a.transcript.json").read_text() == HELLO
        assert [row[0] for row in rows(calls / "a.json")] == ["hello", "there"]
    write(calls, a__json=HELLO)
    (calls / "a.transcript.json").rename(calls / "kept")
    (calls / "a.transcript.json").mkdir()
    assert run(calls, *flags, "--set-aside") == 1
    assert (calls / "a.json").read_text() == HELLO


@pytest.mark.parametrize("content", ["torn", '{"note": 1}', '{"alignments": [["mine", [0, 1], "SPEAKER_MAIN"]]}',
                                     '{"alignments": []}'])  # fmt: skip
def test_a_json_that_is_not_ours_is_kept(calls, content, capsys):
    write(calls, a__json=content, **{"words/a__ctm": "a A 1 0.5 hi\n", "words/b__ctm": "b A 1 0.5 hi\n"})
    assert run(calls, "--transcripts", calls / "words", "--speaker", f"A={MAIN}") == 1
    assert (calls / "a.json").read_text() == content
    assert str(calls / "a.json") in capsys.readouterr().out and (calls / "b.json").exists()


def test_words_of_annotate_are_replaced_on_demand_and_prompts_are_kept(calls):
    origin = {"channel": 0, "whisper_model": "w", "duration": 9.0, "sound_sec": 1.0, "repairs": {}}
    content = {"alignments": [["old", [0, 1], MAIN], ["mine", [3, 4], "SPEAKER_USER"]], "text_prompt": "Hi.",
               "annotate.py": {"speakers": {MAIN: origin}}}  # fmt: skip
    write(calls, a__json="\ufeff" + json.dumps(content), a__ctm="a A 1 0.5 new\n", b__ctm="b A 1 0.5 hi\n")
    flags = ("--speaker", f"A={MAIN}")
    assert run(calls, *flags) == 1
    assert rows(calls / "b.json") and json.loads((calls / "a.json").read_text("utf-8-sig")) == content
    assert run(calls, *flags, "--replace") == 0
    made = json.loads((calls / "a.json").read_text())
    assert made["alignments"] == [["new", [1.0, 1.5], MAIN], ["mine", [3, 4], "SPEAKER_USER"]]
    assert made["text_prompt"] == "Hi."


def test_times_of_sentences_are_refused_unless_they_may_be_spread(calls, capsys):
    write(calls, a__txt="1.0 2.0 A: hello there\n3.0 4.0 A: yes\n", b__ctm="b A 1 0.5 hi\n")
    flags = ("--speaker", f"A={MAIN}")
    assert run(calls, *flags) == 1
    shown = capsys.readouterr().out
    assert "2 of 3 words" in shown and "--spread" in shown and not (calls / "a.json").exists()
    assert run(calls, *flags, "--spread") == 0
    assert rows(calls / "a.json") == [
        ["hello", [1.0, 1.5], MAIN],
        ["there", [1.5, 2.0], MAIN],
        ["yes", [3.0, 4.0], MAIN],
    ]
    assert f"2 {SPREAD}" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_to_costs_only_its_recordings(calls, capsys, monkeypatch):
    write(calls, a__ctm="a A 1 0.5 hi\n", b__ctm="b A 1 0.5 hi\n")
    real = command.import_recording

    def refuse(line, *arguments):
        if line.path.name == "a.wav":
            raise OSError(30, "Read-only file system", str(line.path))
        return real(line, *arguments)

    monkeypatch.setattr(command, "import_recording", refuse)
    assert run(calls, "--speaker", f"A={MAIN}") == 1
    assert "a.wav: Read-only" in capsys.readouterr().out and (calls / "b.json").exists()
