"""Transcription, with a Whisper that always says the same: blocks, silence, repairs, and errors of the engine."""

import sys
import urllib.error
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
import sphn
import torch
import whisper
import whisper_timestamped

from finetune.audio import transcriber
from finetune.audio.aligners import download_whisper, glue, load_whisper
from finetune.audio.annotation import ALIGNERS
from finetune.audio.files import probe_audio, read_audio
from finetune.audio.transcriber import (
    Transcriber,
    Transcript,
    find_speech,
    read_blocks,
    repair_words,
    speech_segments,
)
from finetune.cli import UserError
from finetune.jobs.workers import WorkerBroken
from tests.audio.scripted_whisper import RATE, murmur, scripted_whisper, silence, write_stereo


@pytest.fixture(scope="module")
def scripted(tmp_path_factory) -> str:
    return scripted_whisper(tmp_path_factory.mktemp("whisper") / "scripted.pt")


# --- Models -----------------------------------------------------------------------------------------------------------


def test_a_file_gets_the_alignment_heads_of_the_model_in_its_name(tmp_path):
    model = whisper.model.Whisper(whisper.model.ModelDimensions(80, 1500, 24, 6, 1, 51864, 448, 24, 6, 4))
    content = {"dims": vars(model.dims), "model_state_dict": model.half().state_dict()}
    heads = {}
    for name in ("mine", "notiny.en", "tiny.en", "my-tiny.en", "my-large-v3"):  # of the size of none of them
        torch.save(content, tmp_path / f"{name}.pt")
        heads[name] = load_whisper(str(tmp_path / f"{name}.pt"), "cpu").alignment_heads.to_dense()
    generic = heads["mine"]
    model.set_alignment_heads(whisper._ALIGNMENT_HEADS["tiny.en"])
    for name in ("tiny.en", "my-tiny.en"):
        assert torch.equal(heads[name], model.alignment_heads.to_dense()) and not torch.equal(heads[name], generic)
    for name in ("notiny.en", "my-large-v3"):  # the heads of another size are not taken
        assert torch.equal(heads[name], generic)


def test_models_and_languages_that_cannot_be_used_are_refused(scripted, tmp_path):
    (tmp_path / "bad.pt").write_text("no weights")
    torch.save({"dims": {}}, tmp_path / "other.pt")
    for name, language, word in (
        (scripted, "French", "English only"),
        (scripted, "klingon", "klingon"),
        (str(tmp_path / "bad.pt"), None, "bad.pt"),
        (str(tmp_path / "other.pt"), None, "other.pt"),
    ):
        with pytest.raises(UserError, match=word) as error:
            Transcriber(name, "cpu", language)
        assert "\n" not in str(error.value)


def test_a_model_is_downloaded_by_name_into_whispers_cache(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(whisper, "_download", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    download_whisper("tiny.en")
    assert calls == [((whisper._MODELS["tiny.en"], str(tmp_path / "whisper")), {"in_memory": False})]

    def fail(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(whisper, "_download", fail)
    with pytest.raises(UserError, match=r"'tiny.en'.*no network"):
        download_whisper("tiny.en")
    with pytest.raises(UserError, match="'gigantic'"):
        download_whisper("gigantic")


# --- Blocks of a file -------------------------------------------------------------------------------------------------


def test_blocks_of_a_long_file_end_in_silence_and_join_to_the_file(tmp_path):
    """Every block but the last is shorter than 10 minutes and ends in a pause, and nothing is lost or read twice."""
    rate, seconds = 16_000, 1300
    time = np.arange(seconds * rate) / rate
    pcm = (0.1 * np.random.default_rng(0).standard_normal(len(time)) * (time % 30 < 25)).astype(np.float32)
    sphn.write_wav(str(tmp_path / "long.wav"), pcm, rate)
    blocks = list(read_blocks(tmp_path / "long.wav", 0))
    ends = [start + len(block) / rate for start, block in blocks]
    assert [start for start, _ in blocks] == pytest.approx([0.0, *ends[:-1]]) and ends[-1] == pytest.approx(seconds)
    assert len(blocks) == 3 and all(480 * rate < len(block) < 600 * rate for _, block in blocks[:-1])
    assert all(25.2 < end % 30 < 29.8 for end in ends[:-1])
    whole = read_audio(tmp_path / "long.wav", sample_rate=rate)[0]
    assert np.array_equal(np.concatenate([block for _, block in blocks]), whole)


@pytest.fixture
def short_blocks(monkeypatch):
    """Blocks of 10 s that end in their last 4 s."""
    monkeypatch.setattr(transcriber, "BLOCK_SEC", 10.0)
    monkeypatch.setattr(transcriber, "TAIL_SEC", 4.0)


def test_a_block_ends_in_the_middle_of_the_quietest_second_of_its_end(tmp_path, short_blocks):
    pcm = (0.1 * np.random.default_rng(0).standard_normal(15 * RATE)).astype(np.float32)
    pcm[3 * RATE : 5 * RATE] = 0  # before the end of the block
    pcm[round(6.8 * RATE) : round(7.8 * RATE)] *= 0.1
    write_stereo(tmp_path / "a.wav", pcm)
    assert [start for start, _ in read_blocks(tmp_path / "a.wav", 0)] == [0.0, pytest.approx(7.3, abs=0.03)]


def test_words_of_later_blocks_have_the_times_of_the_file(tmp_path, scripted, short_blocks):
    """A file of three blocks gives the words of its parts, each at its place."""
    parts = [murmur(6.0, seed=1, lead=0.7), silence(3), murmur(5.0, seed=2, lead=0.3), silence(2), murmur(4.0, seed=3)]
    whole = np.concatenate(parts)
    write_stereo(tmp_path / "long.wav", whole)
    starts = [start for start, _ in read_blocks(tmp_path / "long.wav", 0)]
    assert len(starts) == 3
    expected, sound_sec, engine = [], 0.0, Transcriber(scripted, "cpu")
    for start, end in pairwise([*starts, len(whole) / RATE]):
        write_stereo(tmp_path / "part.wav", whole[round(start * RATE) : round(end * RATE)])
        part = engine(tmp_path / "part.wav", 0)
        assert part.words
        expected += [(text, first + start, last + start) for text, first, last in part.words]
        sound_sec += part.sound_sec
    done = engine(tmp_path / "long.wav", 0)
    assert [text for text, _, _ in done.words] == [text for text, _, _ in expected]
    assert np.allclose([times for _, *times in done.words], [times for _, *times in expected], atol=0.002)
    assert done.duration == len(whole) / RATE and done.sound_sec == pytest.approx(sound_sec, abs=0.1)
    assert all(round(1000 * time, 6) % 1 == 0 for _, *times in done.words for time in times), "whole milliseconds"


def test_one_language_is_detected_and_kept_for_all_blocks(tmp_path, short_blocks, monkeypatch):
    french = scripted_whisper(tmp_path / "fr.pt", " bonjour tout le monde", language="fr")
    given = []
    original = whisper_timestamped.transcribe

    def transcribe(*args, language, **options):
        given.append(language)
        return original(*args, language=language, **options)

    monkeypatch.setattr(whisper_timestamped, "transcribe", transcribe)
    write_stereo(tmp_path / "a.wav", np.concatenate([murmur(6), silence(2), murmur(4)]))
    done = Transcriber(french, "cpu")(tmp_path / "a.wav", 0)
    assert done.language == "fr" and "bonjour" in [text for text, _, _ in done.words]
    assert given == [None, "fr"]
    Transcriber(french, "cpu", "German")(tmp_path / "a.wav", 0)
    assert given[2:] == ["de", "de"]
    write_stereo(tmp_path / "b.wav", silence(1))
    assert Transcriber(french, "cpu")(tmp_path / "b.wav", 0) == Transcript([], None, 1.0, 0.0, {})


def mp3_frame(bitrate_index: int) -> bytes:
    """1152 silent samples: MPEG-1 layer III, stereo, 44.1 kHz, with empty side information."""
    kbps = [0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160][bitrate_index]
    return bytes([0xFF, 0xFB, bitrate_index << 4, 0]).ljust(144_000 * kbps // 44_100, b"\0")


def test_a_file_whose_header_is_wrong_is_read_to_its_end(tmp_path):
    """A truncated wav, one from a pipe, and an mp3 without a length."""
    path = tmp_path / "a.wav"
    write_stereo(path, murmur(3))
    raw = bytearray(path.read_bytes())
    path.write_bytes(raw[: -4 * round(0.19 * RATE)])
    assert [(start, len(pcm)) for start, pcm in islice(read_blocks(path, 0), 3)] == [(0.0, round(2.81 * 16_000))]
    raw[4:8] = raw[40:44] = b"\xff\xff\xff\xff"  # as ffmpeg writes into a pipe
    path.write_bytes(raw)
    assert probe_audio(path).duration_sec == 3
    assert [(start, len(pcm)) for start, pcm in islice(read_blocks(path, 0), 3)] == [(0.0, 3 * 16_000)]
    path = tmp_path / "a.mp3"  # the bitrate of its first frame is not that of all
    path.write_bytes(20 * mp3_frame(9) + 400 * mp3_frame(1))
    (block,) = read_blocks(path, 0)
    seconds = (420 * 1152 - 1105) / 44_100  # without the delay of the encoder
    assert probe_audio(path).duration_sec == pytest.approx(seconds)
    assert len(block[1]) == pytest.approx(seconds * 16_000, abs=1)


def test_a_file_that_ends_with_a_block_is_read_to_its_end(tmp_path, scripted, short_blocks):
    write_stereo(tmp_path / "a.wav", np.concatenate([silence(1), murmur(9)]))
    assert sum(len(pcm) for _, pcm in read_blocks(tmp_path / "a.wav", 0)) == 160_000
    assert Transcriber(scripted, "cpu")(tmp_path / "a.wav", 0).duration == 10.0
    write_stereo(tmp_path / "b.wav", silence(0))
    with pytest.raises(UserError, match=r"b\.wav"):
        next(read_blocks(tmp_path / "b.wav", 0))


# --- Where Whisper listens --------------------------------------------------------------------------------------------

SECOND = 50  # levels of 20 ms


def room(speech_db: float, noise_db: float) -> tuple[np.ndarray, np.ndarray]:
    """20 s at 16 kHz with steady speech from 4 to 6 s and from 14 to 16 s, and bool [1000]: where it is."""
    rng = np.random.default_rng(0)
    time = np.arange(20 * 16_000) / 16_000
    speech = np.where((time % 10 > 4) & (time % 10 < 6), rng.standard_normal(len(time)), 0.0)
    noise = rng.standard_normal(len(time))
    truth = (np.arange(1000) % 500 >= 200) & (np.arange(1000) % 500 < 300)
    return speech * 10 ** (speech_db / 20) + noise * 10 ** (noise_db / 20), truth


@pytest.mark.parametrize(("speech_db", "noise_db"), [(-20, -120), (-20, -45), (-40, -48.5), (-50, -58), (-12, -42)])
def test_speech_is_found_at_any_level_in_any_room(speech_db, noise_db):
    pcm, truth = room(speech_db, noise_db)
    assert (find_speech(pcm) == truth).mean() > 0.995


def test_a_soft_voice_over_loud_noise_is_found():
    """Speech has gaps and peaks, so that some of it is hardly louder than the noise."""
    rng = np.random.default_rng(0)
    time = np.arange(20 * 16_000) / 16_000
    truth = (np.arange(1000) >= 500) & (np.arange(1000) < 750)
    swell = np.sin(2 * np.pi * 2.5 * time) ** 2 * ((time >= 10) & (time < 15))
    voice = swell * rng.standard_normal(len(time)) / np.sqrt(0.375) * 10 ** (-40 / 20)
    pcm = voice + rng.standard_normal(len(time)) * 10 ** (-45 / 20)
    found = find_speech(pcm)
    assert found[truth].mean() > 0.95 and found[~truth].mean() < 0.1


def test_a_channel_without_a_voice_is_silent():
    for noise_db in (-120, -60, -42):
        assert not find_speech(room(-200, noise_db)[0]).any(), noise_db


def test_segments_have_margins_inside_the_file_and_are_joined_where_these_touch():
    speech = np.zeros(1000, dtype=bool)  # 20 s
    speech[5:30] = speech[79:90] = speech[141:150] = speech[200:210] = speech[990:] = True  # with 49, 51, 50 between
    expected = [(0.0, 2.3), (2.32, 4.7), (19.3, 20.0)]
    assert np.allclose(speech_segments(speech, 0.5, 20.0), expected)
    assert np.allclose(speech_segments(speech[:100], 0.0, 2.0), [(0.1, 0.6), (1.58, 1.8)])


@pytest.mark.parametrize(("keep_silence", "segment"), [(False, (3.5, 6.5)), (True, (2.5, 7.5))])
def test_whisper_gets_speech_with_some_silence_around_it(tmp_path, scripted, monkeypatch, keep_silence, segment):
    given = []

    def transcribe(model, pcm, vad, **options):
        given.append((len(pcm), vad, options))
        return {"segments": [], "language": "en"}

    monkeypatch.setattr(whisper_timestamped, "transcribe", transcribe)
    write_stereo(tmp_path / "a.wav", silence(10), np.concatenate([silence(4), murmur(2, lead=0.0), silence(4)]))
    engine = Transcriber(scripted, "cpu", keep_silence=keep_silence)
    assert engine(tmp_path / "a.wav", 0).words == [] and not given, "the agent says nothing"
    engine(tmp_path / "a.wav", 1)
    ((samples, segments, options),) = given
    assert samples == 160_000 and np.allclose(segments, [segment], atol=0.05)
    options.pop("verbose")
    decoding = {"beam_size": 5, "best_of": 5, "temperature": (0.0, 0.2, 0.4)}
    assert options == decoding | {"language": "en"}


# --- Repairs ----------------------------------------------------------------------------------------------------------


def raw_word(text, start, end, confidence=0.9, phrase=0.9):
    return {"text": text, "start": start, "end": end, "confidence": confidence, "phrase confidence": phrase}


def test_words_are_put_in_order_inside_the_file_and_out_of_silence():
    speech = np.zeros(500, dtype=bool)  # ten seconds
    speech[50:200] = speech[450:] = True  # 1 to 4 s, 9 to 10 s
    raw = [
        raw_word(" early", 0.8, 1.5), raw_word("two", 2.0, 2.0), raw_word("one", 1.5, 2.0), raw_word("...", 2.0, 2.2),
        raw_word("You", 6.0, 6.5), raw_word("Thanks", 3.0, 3.5, phrase=0.1), raw_word("mm", 3.0, 3.2, 0.001),
        raw_word("last", 9.9, 12.0), raw_word("beyond", 10.5, 11.0), raw_word("back", 3.6, 3.4),
        raw_word("gone", -3.0, 6.1, phrase=0.0),
    ]  # fmt: skip
    repairs = Counter()
    words = repair_words(raw, speech, 10.0, repairs)
    assert [text for text, _, _ in words] == ["early", "one", "two", "back", "last", "beyond"]
    assert all(a[1] <= b[1] for a, b in pairwise(words)) and all(0 <= start < end <= 10.0 for _, start, end in words)
    assert words[0][1] == pytest.approx(1.0)  # where the speech begins
    assert repairs == {
        "dropped: no letters": 1, "dropped: in silence": 1, "dropped: not sure": 3, "to the onset": 1,
        "moved: impossible times": 4, "moved: out of order": 1,
    }  # fmt: skip


def repaired(*words, speech=((1.0, 2.0),), duration=4.0) -> tuple[list, dict]:
    """Repairs of words in a file with speech at some seconds."""
    active = np.zeros(round(duration * SECOND), dtype=bool)
    for start, end in speech:
        active[round(start * SECOND) : round(end * SECOND)] = True
    repairs = Counter()
    return [(text, round(a, 6), round(b, 6)) for text, a, b in repair_words(words, active, duration, repairs)], repairs


# 0.2 s before and after the word may hold its sound.
@pytest.mark.parametrize(("start", "end", "kept"), [(0.4, 0.79, 0), (0.4, 0.81, 1), (2.19, 2.5, 1), (2.21, 2.5, 0)])
def test_a_word_near_speech_is_kept(start, end, kept):
    words, repairs = repaired(raw_word("a", start, end))
    assert len(words) == kept and repairs["dropped: in silence"] == 1 - kept


@pytest.mark.parametrize(("confidence", "phrase", "kept"), [(0.02, 0.2, True), (0.019, 1, False), (1, 0.199, False)])
def test_words_of_low_confidence_are_dropped(confidence, phrase, kept):
    assert len(repaired(raw_word("a", 1.0, 1.5, confidence, phrase))[0]) == kept


def test_a_word_after_silence_starts_with_the_speech():
    assert repaired(raw_word("a", 0.81, 1.4)) == ([("a", 1.0, 1.4)], {"to the onset": 1})
    assert repaired(raw_word("a", 0.81, 1.01)) == ([("a", 1.0, 1.02)], {"to the onset": 1}), "20 ms at the least"
    assert repaired(raw_word("a", 0.83, 0.99)) == ([("a", 0.83, 0.99)], {}), "the speech begins after the word"
    before = ((0.5, 0.66), (1.0, 2.0))
    assert repaired(raw_word("a", 0.81, 1.4), speech=before)[0] == [("a", 0.81, 1.4)], "speech 0.15 s before it"
    assert repaired(raw_word("a", 0.81, 1.4), speech=((0.5, 0.58), (1.0, 2.0)))[1] == {"to the onset": 1}


def test_impossible_times_are_moved_into_the_file():
    speech = ((0.0, 4.0),)
    for times, result, moved in (
        ((3.99, 4.019), (3.98, 4.0), False),  # a rounding error beyond the end is not a mistake
        ((3.99, 4.021), (3.98, 4.0), True),
        ((-0.019, 0.5), (0.0, 0.5), False),
        ((-0.021, 0.5), (0.0, 0.5), True),
        ((1.0, 1.0), (1.0, 1.02), True),
        ((2.0, 1.0), (2.0, 2.02), True),
        ((9.0, 9.5), (3.98, 4.0), True),
    ):
        words, repairs = repaired(raw_word("a", *times), speech=speech)
        assert words == [("a", *result)], times
        assert repairs == ({"moved: impossible times": 1} if moved else {}), times


def test_repairs_hold_for_any_times_and_account_for_every_word():
    rng = np.random.default_rng(0)
    for _ in range(300):
        duration = float(rng.uniform(0.03, 3.0))
        speech = rng.random(int(np.ceil(duration / 0.02))) < 0.2
        times = rng.uniform(-0.5, duration + 0.5, size=(12, 2))
        repairs = Counter()
        words = repair_words([raw_word("a", a, b) for a, b in times], speech, duration, repairs)
        assert len(words) + repairs["dropped: in silence"] == 12
        assert all(0 <= start < end <= duration for _, start, end in words)
        assert [word[1] for word in words] == sorted(word[1] for word in words)
        assert sum(n for what, n in repairs.items() if what != "to the onset") <= 12


# --- Errors of the engine ---------------------------------------------------------------------------------------------


def test_an_error_of_the_engine_costs_one_segment(tmp_path, scripted, monkeypatch):
    """whisper-timestamped raises for any segment that begins between 3 and 6 seconds."""
    original, error = whisper_timestamped.transcribe, [AssertionError("Inconsistent number of segments")]

    def transcribe(model, pcm, vad, **options):
        if any(3.0 < start < 6.0 for start, _ in vad):
            raise error[0]
        return original(model, pcm, vad=vad, **options)

    monkeypatch.setattr(whisper_timestamped, "transcribe", transcribe)
    write_stereo(tmp_path / "a.wav", np.concatenate([murmur(1.5), silence(2)] * 3))  # at 0.5, 4 and 7.5 s
    engine = Transcriber(scripted, "cpu")
    for kind in (AssertionError, IndexError, ValueError, RuntimeError):
        error[0] = kind("out of range")
        done = engine(tmp_path / "a.wav", 0)
        assert done.repairs["given up: segments"] == 1
        assert {int(start // 3.5) for _, start, _ in done.words} == {0, 2}
    write_stereo(tmp_path / "b.wav", np.concatenate([silence(3.5), murmur(1.5)]))
    with pytest.raises(RuntimeError, match="out of range"):  # nothing of it could be done: the file fails
        engine(tmp_path / "b.wav", 0)
    error[0] = RuntimeError("CUDA error: device-side assert triggered\nmore")
    with pytest.raises(WorkerBroken, match=r"device-side assert triggered$"):
        engine(tmp_path / "a.wav", 0)


def test_words_without_a_phrase_confidence_are_kept(tmp_path, scripted, monkeypatch):
    word = {"text": "tea", "start": 1.0, "end": 1.2, "confidence": 0.9}
    phrases = [{"words": [word]}, {"confidence": 0.1, "words": [word]}, {}]
    monkeypatch.setattr(whisper_timestamped, "transcribe", lambda *_, **__: {"segments": phrases, "language": "en"})
    write_stereo(tmp_path / "a.wav", murmur(2))
    done = Transcriber(scripted, "cpu")(tmp_path / "a.wav", 0)
    assert done.words == [("tea", 1.0, 1.2)] and done.repairs == {"dropped: not sure": 1}


def test_words_are_compared_with_the_speech_that_was_transcribed(tmp_path, scripted, monkeypatch):
    """Speech from 0.5 to 2.5 s: a word is kept, one is dropped as unsure, and one was heard in silence."""
    word = {"text": "tea", "start": 0.5, "end": 1.3, "confidence": 0.9}
    unsure = [word | {"start": start, "end": start + 0.2, "confidence": 0.001} for start in (1.9, 5.0)]
    phrases = [{"words": [word, *unsure]}]
    monkeypatch.setattr(whisper_timestamped, "transcribe", lambda *_, **__: {"segments": phrases, "language": "en"})
    write_stereo(tmp_path / "a.wav", np.concatenate([murmur(2.5), silence(4)]))
    done = Transcriber(scripted, "cpu")(tmp_path / "a.wav", 0)
    assert done.repairs == {"dropped: not sure": 2} and (done.on_speech, done.unsure) == (1, 1)
    assert done.sound_sec == pytest.approx(2.0, abs=0.15) and done.worded_sec == pytest.approx(0.9, abs=0.1)


# --- Other aligners ---------------------------------------------------------------------------------------------------


def test_glued_segments_map_back_to_where_they_were():
    pcm = np.arange(10 * 16_000, dtype=np.float32)
    sound, original = glue(pcm, [(1.0, 2.0), (4.5, 6.0), (9.0, 10.0)])
    assert len(sound) == 3.5 * 16_000
    for time in (0.0, 0.99, 1.0, 1.7, 2.5, 3.4):
        start, end = original(time, time + 0.01)
        assert pcm[round(start * 16_000)] == sound[round(time * 16_000)] and end == pytest.approx(start + 0.01)
    assert original(0.8, 1.3) == pytest.approx((1.8, 2.0)), "a word ends with the segment in which it starts"
    assert original(3.4, 4.2) == pytest.approx((9.9, 10.0))


def test_the_words_of_any_aligner_are_repaired(tmp_path, monkeypatch):
    """It hears what whisper-timestamped would, and needs no confidences."""
    (tmp_path / "my_aligner.py").write_text(
        "def make(model, device, language):\n"
        "    def align(pcm, segments, earlier):\n"
        "        words = [{'text': f'{model} {a:.1f}', 'start': a, 'end': a + 1} for a, _ in segments]\n"
        "        return [*words, {'text': '...', 'start': 1.0, 'end': 1.1}], language or earlier\n"
        "    return align\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    write_stereo(tmp_path / "a.wav", np.concatenate([murmur(1.5, lead=1.0), silence(4), murmur(1.5, lead=1.0)]))
    done = Transcriber("m", "cpu", "fr", aligner="my_aligner:make")(tmp_path / "a.wav", 0)
    assert [text for text, _, _ in done.words] == ["m 0.5", "m 6.0"] and done.language == "fr"
    assert [start for _, start, _ in done.words] == pytest.approx([1.0, 6.5], abs=0.03), "at the onset"
    assert done.repairs == {"to the onset": 2, "dropped: no letters": 1}
    for name in ("my_aligner:none", "no_such_module:make"):
        with pytest.raises(UserError, match=name):
            Transcriber("m", "cpu", aligner=name)


def test_without_its_package_stable_ts_says_how_to_install_it(scripted, monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_whisper", None)
    with pytest.raises(UserError, match="pip install"):
        Transcriber(scripted, "cpu", aligner=ALIGNERS["stable-ts"])


def test_stable_ts(tmp_path, scripted):
    pytest.importorskip("stable_whisper")
    write_stereo(tmp_path / "a.wav", np.concatenate([murmur(1.5), silence(4), murmur(1.5)]))
    done = Transcriber(scripted, "cpu", aligner=ALIGNERS["stable-ts"])(tmp_path / "a.wav", 0)
    assert done.words and {text for text, _, _ in done.words} <= {"one", "two", "three"} and done.language == "en"
