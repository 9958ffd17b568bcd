"""Each mistake in a file is found, with its line and a remedy; levels and channels, near the thresholds."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

from finetune.audio.codes import audio_fingerprint, save_codes
from finetune.tools.check_data.checker import check_agreement, check_audio
from finetune.tools.check_data.findings import KINDS, UNREADABLE
from finetune.tools.check_data.summary import describe_check
from finetune.tools.check_data.talk import StereoSound
from tests.tools.check_data.conftest import facts_of, kinds_of, write_pcm


def said(text: str, start: float, end: float) -> list:
    return [text, [start, end], "SPEAKER_MAIN"]


def not_json(c):
    c.lines["train"][1] = "calls/1.wav 63.2"


def copy_first(c):
    first = c.folder / c.lines["train"][0]["path"]
    shutil.copy(first, c.wav)
    shutil.copy(first.with_suffix(".json"), c.json)
    c.line["duration"] = c.lines["train"][0]["duration"]


def moved(words: list, seconds: float) -> list:
    return [[text, [start + seconds, end + seconds], who] for text, (start, end), who in words]


def swap_from(c, seconds: float) -> None:
    """Swap the channels from a time on."""
    first = round(seconds * 24_000)
    c.record(np.concatenate([c.sound()[:, :first], c.sound()[::-1, first:]], axis=1))


def agents(c) -> list:
    return [word for word in c.words() if word[2] == "SPEAKER_MAIN"]


def joined(words: list) -> list:
    """One entry for words with less than 0.3 s between them."""
    out = []
    for text, (start, end), who in words:
        if out and start - out[-1][1][1] < 0.3:
            out[-1] = [f"{out[-1][0]} {text}", [out[-1][1][0], end], who]
        else:
            out.append([text, [start, end], who])
    return out


def add_tag(c, tag: str) -> None:
    c.change(alignments=sorted([*c.words(), said(tag, 1.0, 1.2)], key=lambda word: word[1]))


def recorded(**origin) -> dict:
    """What annotate.py records about its words."""
    main = {"channel": 0, "whisper_model": "tiny.en", "duration": 9.0, "sound_sec": 3.0, "repairs": {}}
    return {"annotate.py": {"speakers": {"SPEAKER_MAIN": main | origin}}}


CROWD = [said("antidisestablishmentarianism", 1.0 + i / 50, 1.0 + i / 50) for i in range(20)]
HELLOS = [said("hello", 1.0 + i / 50, 1.0 + i / 50) for i in range(45)]
CYRILLIC = [said(w, 0.1 + 1.5 * i, 0.4 + 1.5 * i) for i, w in enumerate(("здравствуйте", "чем", "могу", "помочь"))]
# (kind, what breaks line 2 of the training data, settings)
CASES = [
    ("missing", lambda c: c.wav.unlink(), {}),
    ("missing", lambda c: c.line.update(path="x" * 5000 + ".wav"), {}),
    ("unreadable", lambda c: c.wav.write_bytes(os.urandom(5000)), {}),
    ("unreadable", lambda c: c.wav.unlink() or c.wav.mkdir(), {}),
    ("channels", lambda c: c.record(c.sound()[:1]), {}),
    ("same channels", lambda c: c.record(np.tile(c.sound().sum(axis=0), (2, 1))), {}),
    ("swapped", lambda c: c.record(c.sound()[::-1]), {}),
    ("bleeding", lambda c: c.record([[1, 0.7], [0.7, 1]] @ c.sound()), {}),
    ("shifted", lambda c: c.change(alignments=moved(c.words(), 0.3)), {"duration_sec": 30}),
    ("part swapped", lambda c: swap_from(c, 3.1), {}),
    ("one label", lambda c: c.change(alignments=[word[:2] for word in c.words()]), {"duration_sec": 30}),
    (
        "misplaced",
        lambda c: c.change(alignments=agents(c) + [said("um", 5 + i / 5, 5.1 + i / 5) for i in range(4)]),
        {},
    ),
    ("few words", lambda c: c.change(alignments=agents(c)[::2]), {}),
    ("sentences", lambda c: c.change(alignments=joined(agents(c))), {"duration_sec": 30}),
    ("unsure", lambda c: c.change(**recorded(unsure=30)), {}),
    ("dropped tags", lambda c: add_tag(c, "[laughter]"), {}),
    ("tags", lambda c: add_tag(c, "<unk>"), {"data.drop_tags": False}),
    ("clipping", lambda c: c.record(c.sound() * [[20], [1]]), {}),
    ("silent user", lambda c: c.record(c.sound() * [[1], [0]]), {}),
    ("silent agent", lambda c: c.record(c.sound() * [[0], [1]]), {}),
    ("duration", lambda c: c.line.update(duration=c.line["duration"] + 20), {}),
    ("duration", lambda c: c.line.update(duration=2.0), {}),
    ("duration", lambda c: c.wav.write_bytes(c.wav.read_bytes()[: c.wav.stat().st_size // 2]), {}),
    ("off", lambda c: c.line.update(duration=c.line["duration"] - 0.5), {"duration_sec": 30}),
    ("no words file", lambda c: c.json.unlink(), {}),
    ("bad words file", lambda c: c.json.write_text("{"), {}),
    ("bad words file", lambda c: c.change(alignments=[["hello", 1.0, "SPEAKER_MAIN"]]), {}),
    ("no words", lambda c: c.change(alignments=[word for word in c.words() if word[2] == "SPEAKER_USER"]), {}),
    ("unsorted", lambda c: c.change(alignments=c.words()[::-1]), {}),
    ("past the end", lambda c: c.change(alignments=[*c.words(), said("late", 100, 100.4)]), {}),
    ("odd times", lambda c: c.change(alignments=[said("early", -0.5, 0.1), *c.words()]), {}),
    ("crowded", lambda c: c.change(alignments=CROWD), {}),
    ("late", lambda c: c.change(alignments=HELLOS), {"duration_sec": 8}),
    ("truncated", lambda c: c.change(alignments=CROWD), {"data.keep_and_shift": False}),
    ("script", lambda c: c.change(alignments=CYRILLIC), {"duration_sec": 30}),
    ("no text prompt", lambda c: c.change(text_prompt=None), {}),
    ("no text prompt", lambda c: c.change(text_prompt="  "), {}),
    ("no voice prompt", lambda c: c.change(voice_prompt=""), {}),
    ("prompt", lambda c: c.change(text_prompt="You are Ada. " * 100), {}),
    ("prompt", lambda c: c.change(text_prompt=7), {}),
    ("unwrapped", lambda c: c.change(text_prompt="You are Ada from the harbour."), {}),
    ("half wrapped", lambda c: c.change(text_prompt="<system> You are Ada."), {}),
    ("half wrapped", lambda c: c.change(text_prompt="<system> You are Ada. </system>"), {}),
    ("voice", lambda c: c.line.update(voice_prompt="nobody.wav"), {}),
    ("voice", lambda c: c.line.update(voice_prompt=7), {}),
    ("own voice", lambda c: c.change(voice_prompt=c.wav.name), {}),
    (
        "unserved voice",
        lambda c: (write_pcm(c.wav.with_name("voice.wav"), c.sound()), c.change(voice_prompt="voice.wav")),
        {},
    ),
    (
        "no segment",
        lambda c: c.change(voice_prompt="same_speaker"),
        {"duration_sec": 30, "prompt.allow_voiceless": True},
    ),
    ("line", not_json, {}),
    ("line", lambda c: c.line.update(duration=-1), {}),
    ("codes", lambda c: c.line.update(codes_path="codes/1.pt"), {}),
    ("duplicate", lambda c: c.line.update(c.lines["train"][0]), {}),
    ("duplicate", copy_first, {}),
]
# Problems that follow from another one.
FOLLOWING = {
    "missing": {"no words file", "bad words file", "no text prompt", "no voice prompt"}, "duration": {"past the end"},
    "unreadable": {"no text prompt"}, "no words file": {"no text prompt", "no voice prompt"},
    "bad words file": {"no text prompt", "no voice prompt"}, "prompt": {"unwrapped"}, "codes": {"mixed"},
    "crowded": {"past the end", "few words"}, "truncated": {"few words"}, "late": {"few words", "misplaced"},
    "script": {"few words", "misplaced"},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "make", "settings"), CASES, ids=[kind for kind, *_ in CASES])
def test_each_mistake_is_found_with_its_line_and_a_remedy(corpus, kind, make, settings):
    make(corpus)
    result = corpus.check(**settings)
    found = [problem for problem in result.problems if problem.kind == kind]
    assert [problem.place for problem in found] == [f"{corpus.folder / 'train.jsonl'}:2"], result.problems
    assert set(kinds_of(result)) <= {kind} | FOLLOWING.get(kind, set())
    if kind != "line":
        assert os.path.splitext(corpus.folder / corpus.line["path"])[0] in found[0].detail
    is_error = kind in KINDS["error"]
    assert result.failed == is_error
    report = describe_check(result)
    assert all(text in report for kinds in KINDS.values() for text in kinds.get(kind, ()))
    assert ("Not ready" in report) == is_error
    if kind in UNREADABLE:
        (own,) = (facts for facts in result.facts if not facts.held_out and facts.line.number == 2)
        assert not any(own.windows) and own.text.placed == 0


def test_every_kind_of_mistake_has_a_test():
    elsewhere = {"leak", "mixed", "shared json", "no agent", "codes only", "failed", "epochs", "other language"}
    elsewhere |= {"no voice"}
    assert {kind for kind, *_ in CASES} | elsewhere == set().union(*KINDS.values())


@pytest.mark.parametrize(
    ("window", "added", "kind"),
    [(8, 0.05, None), (8, 0.15, "off"), (8, -0.15, "off"), (5.12, -0.9, "off"), (5.12, -1.1, "duration"),
     (2, 0.15, "duration")],
)  # fmt: skip
def test_a_wrong_duration_is_an_error_if_it_costs_data(corpus, window, added, kind):
    """The audio has 6 s, two windows of 5.12 s and three of 2 s; the manifest says `added` seconds more."""
    corpus.record(np.random.default_rng(0).standard_normal((2, 144_000)) * 0.002)  # no speech
    corpus.change(alignments=[said("hello", 1.0, 1.4)])
    corpus.line["duration"] = 6 + added
    assert kinds_of(corpus.check(duration_sec=window)) == ([kind] if kind else [])


# --- Pre-computed codes -----------------------------------------------------------------------------------------------


def test_codes_replace_the_audio(corpus):
    corpus.encode()
    clean = corpus.check()
    assert not clean.problems
    assert clean.train["dialogue_frames"] == sum(round(row["duration"] * 12.5) for row in corpus.lines["train"])
    corpus.wav.unlink()
    without = corpus.check()
    assert kinds_of(without) == ["codes only"] and not without.failed
    assert without.train["dialogue_frames"] == clean.train["dialogue_frames"]


def test_codes_of_another_codec_of_changed_audio_or_of_one_side_are_refused(corpus):
    corpus.encode()
    corpus.record(corpus.sound() * 0.5)
    for line, shape, mimi in ((2, (2, 8, 50), "other"), (3, (1, 8, 50), corpus.mimi)):
        path = corpus.folder / corpus.lines["train"][line]["codes_path"]
        audio = audio_fingerprint(path.with_suffix(".wav"))
        save_codes(path, torch.zeros(shape), corpus.lines["train"][line]["duration"], mimi, audio)
    assert [p.place[-1] for p in corpus.check().problems if p.kind == "codes"] == ["2", "3", "4"]


def test_prompts_of_the_settings_are_checked_for_every_file(corpus):
    for line in corpus.all_lines():
        path = (corpus.folder / line["path"]).with_suffix(".json")
        path.write_text(json.dumps({"alignments": json.loads(path.read_text())["alignments"]}))
    corpus.line["voice_prompt"] = "same_speaker"
    settings = {"prompt.voice": "cedar", "prompt.text": "You are Ada.", "prompt.allow_voiceless": True}
    without_folder = kinds_of(corpus.check(**settings, **{"prompt.voices_dir": None}))
    assert without_folder.count("voice") == 5 and "no text prompt" not in without_folder
    result = corpus.check(**settings)
    assert kinds_of(result).count("unwrapped") == 6 and set(kinds_of(result)) == {"unwrapped", "no segment"}
    assert result.train["voices"] == 2 and result.train["prompts"] == 1


# --- Levels and channels ----------------------------------------------------------------------------------------------

RATE = 8_000
NOISE = np.linalg.qr(np.random.default_rng(0).standard_normal((4 * RATE, 2)))[0].T * np.sqrt(4 * RATE) * 0.05
assert np.allclose(NOISE @ NOISE.T, np.eye(2) * 4 * RATE * 0.05**2)  # uncorrelated, RMS 0.05


def checked(tmp_path, pcm, share_sec=1000.0):
    write_pcm(tmp_path / "a.wav", pcm, RATE)
    facts = facts_of(str(tmp_path / "a.wav"))
    check_audio(facts, False, share_sec)
    return facts


@pytest.mark.parametrize(("level", "kinds"), [(-59, []), (-61, ["silent user"])])
def test_a_channel_is_silent_below_60_db(tmp_path, level, kinds):
    assert kinds_of(checked(tmp_path, [NOISE[0], np.sign(NOISE[1]) * 10 ** (level / 20)])) == kinds


@pytest.mark.parametrize(("samples", "kinds"), [(3, []), (4, ["clipping"])])
def test_clipping_is_reported_above_one_sample_in_10_000(tmp_path, samples, kinds):
    """Of 32,000 samples; each run of two clipped samples counts as one."""
    agent = NOISE[0].copy()
    for i in range(samples):
        agent[1000 * i : 1000 * i + 2] = 1.0
    assert kinds_of(checked(tmp_path, [agent, NOISE[1]])) == kinds


@pytest.mark.parametrize(
    ("correlation", "kinds"),
    [(0.03, []), (0.1, ["bleeding"]), (-0.7, ["bleeding"]), (0.97, ["bleeding"]), (0.99, ["same channels"]),
     (-0.99, ["same channels"])],
)  # fmt: skip
def test_channels_that_contain_each_other(tmp_path, correlation, kinds):
    user = correlation * NOISE[0] + np.sqrt(1 - correlation**2) * NOISE[1]
    facts = checked(tmp_path, [NOISE[0], user])
    assert kinds_of(facts) == kinds


def heard(sides: str) -> StereoSound:
    """A second for each letter: the agent (a), the user (u), both (b) or nobody (.) speaks in all but its ends."""
    levels = np.full((2, 50 * len(sides)), -70.0)
    for i, side in enumerate(sides):
        for channel, names in enumerate(("ab", "ub")):
            if side in names:
                levels[channel, 50 * i + 5 : 50 * i + 45] = -20.0
    return StereoSound(levels, None, np.zeros(2), 0)


def agreement_of(sides: str, words: str) -> tuple:
    """Kinds of findings about a word of 0.8 s in each second that has one (w)."""
    facts = facts_of()
    said = [("word", i + 0.1, i + 0.9) for i, letter in enumerate(words) if letter == "w"]
    check_agreement(heard(sides), said, facts)
    return kinds_of(facts), facts.agreement


@pytest.mark.parametrize(
    ("sides", "words", "kinds"),
    [
        ("a.aa.u.u.a.uu.", "w.ww.....w....", []),
        ("a.aa.u.u.a.uu.", ".....w.w...ww.", ["swapped"]),
        ("a.aa.u.u.a.uu.", "w.ww.......ww.", ["part swapped"]),
        ("a.aa.u.u.a.uu.", "w.ww.w.w.w.ww.", ["one label"]),
        ("a.aa.u.u.a.uu.", "wwwww.w.www..w", ["misplaced"]),
        ("a.aa.u.u.a.uu.", "w.............", ["few words"]),
        ("aaaa.u.u.a.uu.", "wwww..........", ["few words"]),
        ("a.aa.u.u.a.uu.", "..............", []),  # "no words" is another finding
        ("..............", "w.ww.....w....", []),  # the agent is silent, which is another finding
    ],
)
def test_words_are_compared_with_the_speech_of_both_sides(sides, words, kinds):
    assert agreement_of(sides, words)[0] == kinds


def test_talk_is_measured_on_both_sides(tmp_path):
    """User 1 to 4 s, agent 3 to 6 s and 8 to 10 s of twelve seconds."""
    pcm = np.zeros((2, 12 * RATE))
    for side, start, end in ((1, 1, 4), (0, 3, 6), (0, 8, 10)):
        pcm[side, start * RATE : end * RATE] = np.resize(NOISE[side], (end - start) * RATE)
    facts = checked(tmp_path, pcm)
    assert facts.decoded_sec == pytest.approx(12) and facts.real_sec == 12
    assert facts.talk_sec == pytest.approx((5, 3, 1), abs=0.05)
    assert facts.gaps == pytest.approx([-1.0], abs=0.05)


def test_the_scope_of_a_check_is_named_if_only_a_share_was_decoded(tmp_path):
    pcm = np.zeros((2, 60 * RATE))
    pcm[0] = np.resize(NOISE[0], 60 * RATE)
    whole, part = checked(tmp_path, pcm), checked(tmp_path, pcm, share_sec=20)
    assert kinds_of(whole) == kinds_of(part) == ["silent user"]
    assert part.decoded_sec == pytest.approx(20) and "20 s" in part.problems[0].detail
    assert "decoded" not in whole.problems[0].detail and whole.digest != part.digest
