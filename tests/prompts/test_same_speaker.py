"""`same_speaker` voices: which segments are chosen, what is saved, and when it is still valid."""

import hashlib
import json

import numpy as np
import pyloudnorm
import pytest
import torch

from finetune.cli import UserError
from finetune.prompts import segment_files
from finetune.prompts.same_speaker import (
    find_segments,
    load_same_speaker,
    same_speaker_file,
    segment_audio,
    voice_segments,
)
from finetune.prompts.segment_files import has_same_speaker, save_same_speaker
from tests.support import write_wav

AGENT = ["SPEAKER_MAIN"]


def steady(end):
    """Words that fill three quarters of the time up to `end`."""
    return [("w", t, t + 0.375) for t in np.arange(0, end, 0.5).tolist()]


@pytest.mark.parametrize("words, duration, best", [
    (steady(50), 50.0, [(0.0, 10.0), (10.0, 20.0)]),  # at most 10 s each, and not overlapping
    (steady(12), 12.0, [(0.0, 4.0), (4.0, 8.0)]),  # at most a third of the recording
    (steady(3), 3.0, [(0.0, 1.0), (1.0, 2.0)]),
    (steady(2.9), 2.9, []),  # a third of it is shorter than a second
    ([("a", 20.0, 26.0), ("b", 30.0, 38.0)], 60.0, [(30.0, 40.0), (20.0, 30.0)]),  # the one with more speech first
    ([("a", 0.0, 8.0), ("b", 30.0, 38.0)], 60.0, [(0.0, 10.0), (30.0, 40.0)]),  # equal ones: the earlier first
    ([("a", 5.0, 10.0)], 50.0, [(5.0, 15.0)]),  # half of it is speech
    ([("a", 5.0, 9.9)], 50.0, [(5.0, 12.0)]),  # less than half of 10 s, more than half of 7 s
    ([("a", 5.0, 6.1)], 50.0, [(5.0, 7.0)]),
    ([("a", 5.0, 5.9)], 50.0, []),
    ([("a", 5.0, 11.0), ("b", 30.0, 31.6), ("c", 40.0, 42.0)], 60.0, [(5.0, 15.0), (40.0, 43.0)]),  # longer ones first
    ([("a", 28.0, 31.0)], 30.0, [(28.0, 30.0)]),  # ends with the recording, and so does the word
    ([("a", 0.0, 0.5), ("b", 9.0, 20.0)], 60.0, [(9.0, 19.0)]),  # of a word, what lies inside counts
    ([("a", 0.0, 6.0), ("b", 6.0, 1.0)], 60.0, [(0.0, 10.0)]),  # a word that ends before its start counts nothing
])  # fmt: skip
def test_the_best_segments_hold_most_speech(words, duration, best):
    """Silence where there are no words; the first and the last segment follow those two."""
    found = voice_segments(*speech_of(words, duration), duration)
    assert found[: len(best)] == best and bool(found) == bool(best)
    assert all(end - start <= 10 and end <= duration for start, end in found)


@pytest.mark.parametrize("words, duration, edges", [
    (steady(50), 50.0, [(0.0, 5.0), (45.0, 50.0)]),
    (steady(6), 6.0, [(0.0, 2.0), (4.0, 6.0)]),  # at most a third
    ([("a", 7.0, 30.0), ("b", 41.0, 43.0)], 50.0, [(7.0, 12.0), (41.0, 46.0)][:1]),  # 2 s of 5 s are too few
    ([("a", 7.0, 9.0), ("b", 41.0, 42.5)], 50.0, [(7.0, 10.0), (41.0, 44.0)]),  # shorter ones, if none of 5 s is there
])  # fmt: skip
def test_the_first_and_the_last_segment_are_offered_too(words, duration, edges):
    found = voice_segments(*speech_of(words, duration), duration)
    assert set(edges) <= set(found) and len(found) == len(set(found)) <= 4
    assert min(found)[0] == edges[0][0] and max(start for start, _ in found) >= edges[-1][0]


def speech_of(words, duration):
    """(speech, starts) of `voice_segments` if the agent speaks where it has words."""
    speech = np.zeros(round(duration * 50), dtype=bool)
    for _, start, end in words:
        speech[round(start * 50) : round(end * 50)] = True
    return speech, np.array([start for _, start, _ in words])


def talk(*agent, user=(), seconds=30.0, rate=8000, bleed=0.0):
    """Two channels, each a tone at some times and faint noise at the others; the user is heard by the agent too."""
    time = np.arange(round(seconds * rate)) / rate
    sides = [sum(((time >= a) & (time < b) for a, b in spans), np.zeros(len(time))) for spans in (agent, user)]
    agent, user = (0.2 * side * np.sin(2 * np.pi * 300 * time) for side in sides)
    noise = np.random.default_rng(0).normal(0, 1e-4, (2, len(time)))
    return np.stack([agent + bleed * user, user]) + noise


@pytest.mark.parametrize("agent, words, starts", [
    ([(4, 10), (20, 26)], [(4, 10), (20, 26)], {4.0, 20.0}),
    ([(4, 10)], [(4, 10), (20, 26)], {4.0}),  # words where the agent is silent
    ([(4, 10), (20, 26)], [(4, 10)], {4.0}),  # speech without words may be another's
    ([(4, 10), (20, 26)], [], {4.0, 20.0}),  # but with no word at all it is the best guess
    ([(4, 10), (20, 26)], [(11, 14)], {4.0, 20.0}),  # and also if all words are elsewhere
    ([], [(4, 10)], set()),
])  # fmt: skip
@pytest.mark.parametrize("rate", [8000, 11_025])
def test_speech_is_found_by_voice_where_there_are_words(tmp_path, agent, words, starts, rate):
    write_wav(tmp_path / "a.wav", talk(*agent, user=[(15, 19)], rate=rate, bleed=0.03), rate)
    found = find_segments(tmp_path / "a.wav", [("w", start, end) for start, end in words])
    assert {near for start, _ in found for near in (4.0, 20.0) if abs(start - near) < 2} == starts
    assert not [start for start, _ in found if 14 < start < 19], "the user is heard there"


@pytest.fixture
def encoded(monkeypatch):
    """A codec whose codes name the sound; returns what it was given: (sounds, exact) of each batch."""
    batches = []

    def encode(mimi, wavs, exact):
        batches.append((wavs, exact))
        return [torch.full((8, 3), round(float(np.abs(pcm).sum())) % 2048) for pcm in wavs]

    monkeypatch.setattr("finetune.prompts.segment_files.encode_audio", encode)
    return batches


def recording(folder, name, words, seconds=9.0, quiet=0.0, seed=0):
    """A stereo recording, the agent silent at first, with its words; returns (recording, file of codes)."""
    pcm = np.random.default_rng(seed).uniform(-0.1, 0.1, (2, round(seconds * 24_000))) * [[1], [0.1]]
    pcm[0, : round(quiet * 24_000)] = 0
    write_wav(folder / f"{name}.wav", pcm, 24_000)
    (folder / f"{name}.json").write_text(json.dumps({"alignments": words}))
    return folder / f"{name}.wav", folder / f"{name}.pt"


WORDS = [["so", [0.0, 1.9], "SPEAKER_MAIN"], ["and", [3.0, 4.5], "SPEAKER_MAIN"]]


def test_a_segment_is_the_agents_channel_at_minus_24_lufs(tmp_path):
    audio, _ = recording(tmp_path, "a", WORDS)
    pcm = segment_audio(audio, 3.0, 6.0)
    assert pcm.shape == (72_000,)
    assert pyloudnorm.Meter(24_000).integrated_loudness(pcm.astype(np.float64)) == pytest.approx(-24, abs=0.01)
    left = np.random.default_rng(0).uniform(-0.1, 0.1, (2, 9 * 24_000))[0, 72_000:144_000]
    assert np.corrcoef(pcm, left)[0, 1] > 0.999


@pytest.mark.parametrize("quiet, starts", [(3, [3.0]), (9, [])])
def test_segments_in_which_the_channel_is_silent_are_left_out(quiet, starts, encoded, tmp_path):
    files = [recording(tmp_path, "a", WORDS, quiet=quiet)]
    assert save_same_speaker(files, None, "codec") == {}
    kept = load_same_speaker(same_speaker_file(files[0][1]), "codec", AGENT)
    assert [(segment["start"], segment["end"]) for segment in kept] == [(start, start + 3) for start in starts]


def test_each_recording_gets_the_codes_of_its_own_segments(encoded, tmp_path):
    """Over the end of a batch, and next to recordings that have one segment, none, or cannot be read."""
    files = [
        recording(tmp_path, str(i), WORDS[i % 3 :], seconds=8 + i % 2, quiet=9 * (i % 3 == 2), seed=i)
        for i in range(18)
    ]
    files[4][0].unlink()
    files[7][0].with_suffix(".json").write_text('{"alignments": [["a", "b"]]}')
    problems = save_same_speaker(files, None, "codec", exact=True)
    assert problems.keys() == {files[4][0], files[7][0]}
    assert all(sentence.startswith(str(audio.with_suffix(""))) for audio, sentence in problems.items())
    assert len(encoded) == 2 and all(exact is True for _, exact in encoded)
    for i, (audio, codes) in enumerate(files):
        assert same_speaker_file(codes) == tmp_path / f"{i}.pt.voices"
        assert same_speaker_file(codes).exists() == (audio not in problems)
        if audio not in problems:
            kept = load_same_speaker(same_speaker_file(codes), "codec", AGENT)
            assert len(kept) == (2, 1, 0)[i % 3]
            for segment in kept:
                sound = segment_audio(audio, segment["start"], segment["end"])
                assert segment["codes"].dtype == torch.int16 and segment["codes"].shape == (8, 3)
                assert int(segment["codes"][0, 0]) == round(float(np.abs(sound).sum())) % 2048


def test_the_format_of_saved_files_is_fixed(encoded, tmp_path):
    """Files that exist stay valid."""
    words = [["so", [0.0, 1.9], "A"], ["and", [3.0, 4.5], "B"], ["but", [6.0, 8.0], "C"]]
    save_same_speaker([recording(tmp_path, "a", words)], None, "codec", ["A", "B"])
    segments = (entry := torch.load(tmp_path / "a.pt.voices")).pop("stretches")
    assert [(segment.pop("start"), segment.pop("end")) for segment in segments] == [(0.0, 3.0), (3.0, 6.0)]
    assert [segment.keys() for segment in segments] == [{"codes"}] * 2
    digest = hashlib.sha256(b'[["so", 0.0, 1.9], ["and", 3.0, 4.5]]').hexdigest()[:16]
    assert entry.pop("version") == segment_files.VERSION, "others are used as they are, and made again"
    assert entry == {"mimi": "codec", "speakers": ["A", "B"], "words": digest, "exact": False}
    assert len(load_same_speaker(tmp_path / "a.pt.voices", "codec", ["B", "A"])) == 2


def test_files_that_cannot_be_used_are_refused(encoded, tmp_path):
    files = [recording(tmp_path, "a", WORDS)]
    save_same_speaker(files, None, "codec")
    path = same_speaker_file(files[0][1])
    assert load_same_speaker(path, "codec", AGENT) and load_same_speaker(path, None, AGENT)

    def refused(path, *words, fingerprint="codec", speakers=AGENT):
        with pytest.raises(UserError) as error:
            load_same_speaker(path, fingerprint, speakers)
        wanted = (f"{path}: ", "precompute_codes.py with --same-speaker", *words)
        assert all(word in str(error.value) for word in wanted)

    refused(path, "another Mimi", fingerprint="another codec")
    refused(path, "SPEAKER_MAIN", "--speakers A B", speakers=["A", "B"])
    refused(tmp_path / "none.voices", "missing")
    path.write_bytes(path.read_bytes()[:-200])
    refused(path, "damaged")
    torch.save({"mimi": "codec"}, path)
    refused(path, "damaged")


def test_segments_are_valid_until_words_codec_speakers_or_exactness_change(encoded, tmp_path, monkeypatch):
    files = recording(tmp_path, "a", WORDS)
    has = lambda fingerprint="codec", speakers=AGENT, exact=False: has_same_speaker(
        *files, fingerprint, speakers, exact
    )
    assert not has()
    save_same_speaker([files], None, "codec")
    assert has() and not has(exact=True)
    save_same_speaker([files], None, "codec", exact=True)
    assert has() and has(exact=True)
    with monkeypatch.context() as patch:
        patch.setattr(segment_files, "VERSION", 9)
        assert not has() and load_same_speaker(same_speaker_file(files[1]), "codec", AGENT)
    assert not has(fingerprint="another codec") and not has(speakers=["A"])
    sidecar = files[0].with_suffix(".json")
    sidecar.write_text(json.dumps({"alignments": [WORDS[0], ["and", [3.0, 4.6], "SPEAKER_MAIN"]]}))
    assert not has()
    sidecar.unlink()
    assert not has()
