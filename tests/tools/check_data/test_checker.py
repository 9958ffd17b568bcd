"""Each mistake in a file is found, with its line and a remedy."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

from finetune.audio.codes import audio_fingerprint, save_codes
from finetune.tools.check_data.checker import Checker
from finetune.tools.check_data.kinds import ERROR, KINDS, NOTE, UNREADABLE, WARNING
from finetune.tools.check_data.summary import describe_check
from tests.support import write_wav
from tests.tools.check_data.support import kinds_of, write_pcm

# Each function breaks line 2 of the training data and may return settings.


def missing(c):
    c.wav.unlink()


def random_bytes(c):
    c.wav.write_bytes(os.urandom(5000))


def empty_file(c):
    c.wav.write_bytes(b"")


def folder_as_audio(c):
    c.wav.unlink()
    c.wav.mkdir()


def not_finite(c):
    pcm = c.sound()
    pcm[0, 1000] = np.nan
    write_wav(c.wav, pcm, 24_000, float32=True)


def mono(c):
    write_pcm(c.wav, c.sound()[:1])


def three_channels(c):
    write_pcm(c.wav, np.concatenate([c.sound(), c.sound()[:1]]))


def doubled_mono(c):
    write_pcm(c.wav, np.repeat(c.sound().sum(axis=0, keepdims=True), 2, axis=0))


def swapped(c):
    write_pcm(c.wav, c.sound()[::-1])


def bleeding(c):
    agent, user = c.sound()
    write_pcm(c.wav, np.stack([agent + 0.7 * user, user + 0.7 * agent]))


def clipped(c):
    write_pcm(c.wav, c.sound() * [[20], [1]])


def silent_user(c):
    write_pcm(c.wav, c.sound() * [[1], [0]])


def silent_agent(c):
    write_pcm(c.wav, c.sound() * [[0], [1]])


def overstated(c):
    c.line["duration"] += 20


def understated(c):
    c.line["duration"] = 2.0


def inexact(c):
    c.line["duration"] -= 0.5
    return {"duration_sec": 30}


def truncated_file(c):
    data = c.wav.read_bytes()
    c.wav.write_bytes(data[: len(data) // 2])
    c.change(alignments=[word for word in c.words() if word[1][0] < c.line["duration"] / 2 - 0.2])


def no_json(c):
    c.json.unlink()


def half_json(c):
    c.json.write_text("{")


def binary_json(c):
    c.json.write_bytes(os.urandom(500))


def list_json(c):
    c.json.write_text("[]")


def nested_json(c):
    c.json.write_text("[" * 100_000)


def no_alignments(c):
    c.change(alignments=None)


def malformed(c):
    c.change(alignments=[["hello", 1.0, "SPEAKER_MAIN"]])


def nan_times(c):
    c.change(alignments=[["hello", [float("nan"), 1.0], "SPEAKER_MAIN"]])


def no_words(c):
    c.change(alignments=[])


def other_speakers(c):
    c.change(alignments=[word for word in c.words() if word[2] == "SPEAKER_USER"])


def unsorted(c):
    c.change(alignments=c.words()[::-1])


def past_the_end(c):
    c.change(alignments=[*c.words(), ["late", [100.0, 100.4], "SPEAKER_MAIN"]])


def odd_times(c):
    c.change(alignments=[["early", [-0.5, 0.1], "SPEAKER_MAIN"], *c.words()])


def crowded(c):
    words = [["antidisestablishmentarianism", [1.0 + i / 50, 1.0 + i / 50], "SPEAKER_MAIN"] for i in range(20)]
    c.change(alignments=words)


def late(c):
    c.change(alignments=[["hello", [1.0 + i / 50, 1.0 + i / 50], "SPEAKER_MAIN"] for i in range(45)])
    return {"duration_sec": 8}


def crowded_without_shift(c):
    crowded(c)
    return {"data.keep_and_shift": False}


def unknown_script(c):
    words = ["здравствуйте", "чем", "могу", "помочь"]
    c.change(alignments=[[w, [0.1 + 1.5 * i, 0.4 + 1.5 * i], "SPEAKER_MAIN"] for i, w in enumerate(words)])
    return {"duration_sec": 30}


def no_text(c):
    c.change(text_prompt=None)


def no_voice(c):
    c.change(voice_prompt="")


def long_text(c):
    c.change(text_prompt="You are Ada. " * 100)


def text_number(c):
    c.change(text_prompt=7)


def unwrapped(c):
    c.change(text_prompt="You are Ada from the harbour.")


def half_wrapped(c):
    c.change(text_prompt="<system> You are Ada.")


def closing_slash(c):
    c.change(text_prompt="<system> You are Ada. </system>")


def voice_missing(c):
    c.line["voice_prompt"] = "nobody.wav"


def voice_number(c):
    c.line["voice_prompt"] = 7


def voice_silent(c):
    write_pcm(c.wav.parent / "quiet.wav", np.zeros((1, 48_000)))
    c.change(voice_prompt="quiet.wav")


def voice_damaged(c):
    (c.wav.parent / "voice.pt").write_bytes(b"nothing")
    c.change(voice_prompt="voice.pt")


def save_voice(c, frames, dim):
    entry = {"embeddings": torch.zeros(frames - 1, 1, 1, dim), "cache": torch.zeros(1, 17, 4)}
    torch.save(entry, c.wav.parent / "voice.pt")
    c.change(voice_prompt="voice.pt")


def voice_of_another_model(c):
    save_voice(c, 10, 7)


def voice_too_long(c):
    save_voice(c, 400, 160)


def voice_before_training_embeddings(c):
    save_voice(c, 10, 160)
    return {"lora.ft_embed": True}


def own_voice(c):
    c.change(voice_prompt=c.wav.name)


def no_segment(c):
    c.change(voice_prompt="same_speaker")
    return {"duration_sec": 30}


def not_json(c):
    c.lines["train"][1] = "calls/1.wav 63.2"


def no_duration(c):
    del c.line["duration"]


def negative_duration(c):
    c.line["duration"] = -1


def endless_duration(c):
    c.line["duration"] = 1e300


def text_duration(c):
    c.line["duration"] = "a minute"


def leaves_the_folder(c):
    c.line["path"] = "../x.wav"


def null_byte(c):
    c.line["path"] = "train/\0.wav"


def half_character(c):
    c.line["path"] = "train/\ud800.wav"


def root(c):
    c.line["path"] = "/"


def long_name(c):
    c.line["path"] = "x" * 5000 + ".wav"


def no_codes(c):
    c.line["codes_path"] = "codes/1.pt"


def twice(c):
    c.lines["train"][1] = dict(c.lines["train"][0])


def copied(c):
    first = c.folder / c.lines["train"][0]["path"]
    shutil.copy(first, c.wav)
    shutil.copy(first.with_suffix(".json"), c.json)
    c.line["duration"] = c.lines["train"][0]["duration"]


MISTAKES = {
    "missing": [missing, long_name],
    "unreadable": [random_bytes, empty_file, folder_as_audio, not_finite],
    "channels": [mono, three_channels],
    "same channels": [doubled_mono],
    "swapped": [swapped],
    "bleeding": [bleeding],
    "clipping": [clipped],
    "silent user": [silent_user],
    "silent agent": [silent_agent],
    "duration": [overstated, understated, truncated_file],
    "off": [inexact],
    "no words file": [no_json],
    "bad words file": [half_json, binary_json, list_json, nested_json, no_alignments, malformed, nan_times],
    "no words": [no_words, other_speakers],
    "unsorted": [unsorted],
    "past the end": [past_the_end],
    "odd times": [odd_times],
    "crowded": [crowded],
    "late": [late],
    "truncated": [crowded_without_shift],
    "script": [unknown_script],
    "no text prompt": [no_text],
    "no voice prompt": [no_voice],
    "prompt": [long_text, text_number],
    "unwrapped": [unwrapped],
    "half wrapped": [half_wrapped, closing_slash],
    "voice": [
        voice_missing, voice_number, voice_silent, voice_damaged, voice_of_another_model, voice_too_long,
        voice_before_training_embeddings,
    ],
    "own voice": [own_voice],
    "no segment": [no_segment],
    "line": [
        not_json, no_duration, negative_duration, endless_duration, text_duration, leaves_the_folder, null_byte,
        half_character, root,
    ],
    "codes": [no_codes],
    "duplicate": [twice, copied],
}  # fmt: skip
CASES = [(make, kind) for kind, functions in MISTAKES.items() for make in functions]
# Problems that follow from another one.
FOLLOWING = {
    "missing": {"no words file", "bad words file", "no text prompt", "no voice prompt"},
    "unreadable": {"no text prompt"}, "no words file": {"no text prompt", "no voice prompt"},
    "bad words file": {"no text prompt", "no voice prompt"}, "prompt": {"unwrapped"}, "codes": {"mixed"},
    "crowded": {"past the end"},
}  # fmt: skip


@pytest.mark.parametrize(("make", "kind"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_each_mistake_is_found_with_its_line_and_a_remedy(corpus, make, kind):
    settings = make(corpus) or {}
    result = corpus.check(**settings)
    found = [problem for problem in result.problems if problem.kind == kind]
    assert [problem.place for problem in found] == [f"{corpus.folder / 'train.jsonl'}:2"], result.problems
    assert set(kinds_of(result)) <= {kind} | FOLLOWING.get(kind, set())
    if kind != "line":
        assert os.path.splitext(corpus.folder / corpus.line["path"])[0] in found[0].detail
    is_error = KINDS[kind].level == ERROR
    assert result.failed == is_error
    report = describe_check(result)
    assert KINDS[kind].title in report and KINDS[kind].remedy in report and ("Not ready" in report) == is_error
    own = [facts for facts in result.facts if not facts.held_out and facts.line.number == 2]
    if kind in UNREADABLE:
        assert not any(own[0].windows) and own[0].text.placed == 0


def test_every_kind_of_mistake_has_a_test():
    elsewhere = {"leak", "mixed", "shared json", "no agent", "codes only", "failed"}
    assert set(MISTAKES) | elsewhere == set(KINDS)
    assert all(kind.remedy and kind.level in (ERROR, WARNING, NOTE) for kind in KINDS.values())


class Panic(BaseException):
    """Like the exceptions of the decoder's Rust code, which derive from BaseException."""


def test_whatever_happens_becomes_a_problem_of_the_file(corpus, monkeypatch):
    check = Checker._check

    def fail(self, facts):
        check(self, facts)
        if facts.line.path == corpus.wav:
            raise Panic("index out of\nrange")

    monkeypatch.setattr(Checker, "_check", fail)
    result = corpus.check(duration_sec=2)
    (problem,) = result.problems
    assert (problem.kind, problem.place) == ("failed", f"{corpus.folder / 'train.jsonl'}:2")
    assert problem.detail == f"{corpus.wav}: Panic: index out of range"
    assert not any(result.facts[1].windows) and len(result.facts[1].windows) == result.train.skipped > 1


def test_ctrl_c_ends_the_check(corpus, monkeypatch):
    def interrupt(self, facts):
        raise KeyboardInterrupt

    monkeypatch.setattr(Checker, "_check", interrupt)
    with pytest.raises(KeyboardInterrupt):
        corpus.check()


@pytest.mark.parametrize(
    ("window", "added", "kind"),
    [
        (8, 0.05, None), (8, -0.05, None), (8, 0.15, "off"), (8, -0.15, "off"), (8, 1.5, "off"),
        (5.12, -0.9, "off"), (5.12, -1.1, "duration"), (2, 0.15, "duration"),
    ],
)  # fmt: skip
def test_a_wrong_duration_is_an_error_if_it_costs_data(corpus, window, added, kind):
    """The audio has 6 s, two windows of 5.12 s and three of 2 s; the manifest says `added` seconds more."""
    write_pcm(corpus.wav, np.random.default_rng(0).standard_normal((2, 144_000)) * 0.1)
    corpus.change(alignments=[["hello", [1.0, 1.4], "SPEAKER_MAIN"]])
    corpus.line["duration"] = 6 + added
    result = corpus.check(duration_sec=window)
    assert kinds_of(result) == ([kind] if kind else [])


# --- Pre-computed codes -----------------------------------------------------------------------------------------------


def test_codes_replace_the_audio(corpus):
    corpus.encode()
    clean = corpus.check()
    assert not clean.problems
    assert clean.train.dialogue_frames == sum(round(row["duration"] * 12.5) for row in corpus.lines["train"])

    corpus.wav.unlink()
    without = corpus.check()
    assert kinds_of(without) == ["codes only"] and not without.failed
    assert without.train.dialogue_frames == clean.train.dialogue_frames


def test_codes_of_another_codec_of_changed_audio_or_of_one_side_are_refused(corpus):
    corpus.encode()
    write_pcm(corpus.wav, corpus.sound() * 0.5)
    for line, shape, mimi in ((2, (2, 8, 50), "other"), (3, (1, 8, 50), corpus.mimi)):
        path = corpus.folder / corpus.lines["train"][line]["codes_path"]
        audio = audio_fingerprint(path.with_suffix(".wav"))
        save_codes(path, torch.zeros(shape), corpus.lines["train"][line]["duration"], mimi, audio)
    found = {problem.place[-1]: problem.detail for problem in corpus.check().problems if problem.kind == "codes"}
    assert sorted(found) == ["2", "3", "4"]
    assert "changed" in found["2"] and "other" in found["3"] and "1 channel" in found["4"]


def test_prompts_of_the_settings_are_checked_for_every_file(corpus):
    for line in corpus.all_lines():
        path = (corpus.folder / line["path"]).with_suffix(".json")
        path.write_text(json.dumps({"alignments": json.loads(path.read_text())["alignments"]}))
    corpus.line["voice_prompt"] = "same_speaker"
    settings = {"prompt.voice": "cedar", "prompt.text": "You are Ada."}
    without_folder = kinds_of(corpus.check(**settings, **{"prompt.voices_dir": None}))
    assert without_folder.count("voice") == 5 and "no text prompt" not in without_folder
    result = corpus.check(**settings)
    assert kinds_of(result).count("unwrapped") == 6 and set(kinds_of(result)) == {"unwrapped", "no segment"}
    assert result.train.voices == 2 and result.train.prompts == 1
