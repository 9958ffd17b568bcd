"""Real speech and a real Whisper: `make test-speech AUDIO=... WHISPER=...`.

AUDIO is input_assistant.wav of NVIDIA/personaplex (MIT): 40 s that say "How do I prevent rice from becoming sticky when
cooking on the stove?" and "By the way, what quick garnish could add color to the finished rice?", with "How" at 3.26 s,
"By" at 21.75 s and "what" at 22.87 s by their energy. WHISPER is a tiny.en model in openai-whisper's format.
"""

import difflib
import json
import os
import re
from itertools import pairwise

import numpy as np
import pytest
from scipy.signal import resample_poly

from finetune.audio.files import read_audio
from finetune.audio.speech import find_spans, voice_activity
from finetune.audio.transcriber import Transcriber, find_speech
from finetune.dialogue import measure_reply
from finetune.tools.check_data.talk import measure_stereo
from finetune.tools.import_words import command as import_words
from tests.audio.scripted_whisper import RATE, silence, write_stereo

pytestmark = [
    pytest.mark.speech,
    pytest.mark.skipif(not (os.environ.get("AUDIO") and os.environ.get("WHISPER")), reason="needs AUDIO and WHISPER"),
]
FIRST = "how do i prevent rice from becoming sticky when cooking on the stove"
SECOND = "by the way what quick garnish could add color to the finished rice"
WORDS = [*FIRST.split(), *SECOND.split()]


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    """The recording, float32 [samples] at 24 kHz."""
    return read_audio(os.environ["AUDIO"])[0]


@pytest.fixture(scope="module")
def transcriber() -> Transcriber:
    return Transcriber(os.environ["WHISPER"], "cpu")


def onsets(pcm: np.ndarray, pause_sec: float = 0.1) -> list[float]:
    """Seconds at which sound begins after a pause: by peaks of pieces of 5 ms over -46 dBFS, unlike the detector."""
    piece = RATE // 200
    peak = np.abs(pcm[: len(pcm) // piece * piece]).reshape(-1, piece).max(axis=1)
    loud = np.flatnonzero(peak > 0.005)
    gaps = np.diff(loud, prepend=-1000)
    return [float(t) / 200 for t in loud[gaps > pause_sec * 200]]


def recognised(words: list) -> int:
    """Return how many of WORDS a transcript has, in their order."""
    found = [re.sub(r"\W", "", text.lower()) for text, _, _ in words]
    matcher = difflib.SequenceMatcher(None, WORDS, found, autojunk=False)
    return sum(block.size for block in matcher.get_matching_blocks())


def noise_like(kind: str, samples: int) -> np.ndarray:
    """Noise of unit power."""
    rng = np.random.default_rng(0)
    pcm = rng.standard_normal(samples)
    if kind == "music":  # plucked chords, four a second
        pcm = np.zeros(samples)
        time = np.arange(RATE // 2) / RATE
        for start in range(0, samples - RATE, RATE // 4):
            pitch = 220 * 2 ** (rng.integers(0, 24) / 12)
            tone = sum(np.sin(2 * np.pi * pitch * n * time) / n for n in (1, 2, 3, 4)) * np.exp(-4 * time)
            pcm[start : start + len(tone)] += tone
    return pcm / np.sqrt((pcm**2).mean())


def speech_db(pcm: np.ndarray) -> float:
    """Mean level of the speech in dBFS."""
    active = np.repeat(voice_activity(pcm), 1920)[: len(pcm)]
    return float(10 * np.log10((pcm[active] ** 2).mean()))


def test_words_start_where_they_are_heard(speech, transcriber, tmp_path):
    write_stereo(tmp_path / "a.wav", speech)
    done = transcriber(tmp_path / "a.wav", 0)
    assert recognised(done.words) == len(done.words) == 26
    starts = {text.lower().strip(",.?"): start for text, start, _ in reversed(done.words)}
    assert starts["how"] == pytest.approx(3.26, abs=0.03) and starts["by"] == pytest.approx(21.75, abs=0.03)
    assert starts["what"] == pytest.approx(22.87, abs=0.2)


def test_sentences_in_a_silent_channel_are_found_at_any_time(speech, transcriber, tmp_path):
    first, second = speech[round(3.0 * RATE) : round(8.0 * RATE)], speech[round(21.5 * RATE) : round(26.5 * RATE)]
    pcm = silence(25)
    for start, sentence in ((1.37, second), (10.5, first), (19.333, second)):
        pcm[round(start * RATE) : round(start * RATE) + len(sentence)] = sentence
    write_stereo(tmp_path / "a.wav", np.zeros_like(pcm), pcm)
    assert transcriber(tmp_path / "a.wav", 0).words == []
    done = transcriber(tmp_path / "a.wav", 1)

    text = " ".join(text for text, _, _ in done.words).lower()
    assert text.count(FIRST) == 1 and text.count(SECOND.removeprefix("by the way ")) == 2
    starts = [start for _, start, _ in done.words]
    assert starts == sorted(starts) and all(0 <= start < end <= done.duration for _, start, end in done.words)

    found = onsets(pcm)
    assert len(found) == 5  # By, what; How; By, what
    near = [min(abs(start - onset) for start in starts) <= 0.2 for onset in found]
    assert sum(near) >= 0.9 * len(near), [onset for onset, ok in zip(found, near) if not ok]
    # Conversely, no word starts before its sound.
    after_pause = [b[1] for a, b in pairwise(done.words) if b[1] - a[2] > 1.0] + starts[:1]
    assert all(min(abs(start - onset) for onset in found) <= 0.1 for start in after_pause)
    assert done.language == "en"


@pytest.mark.parametrize(("kind", "snr_db", "least"), [("white", 5, 24), ("music", 5, 25), (None, 0, 26)])
def test_soft_speech_over_noise_loses_no_words(speech, transcriber, tmp_path, kind, snr_db, least):
    """At -40 dBFS, where a threshold of 12 dB over the noise would lose most."""
    pcm = speech * 10 ** ((-40 - speech_db(speech)) / 20)
    if kind:
        pcm = pcm + noise_like(kind, len(pcm)) * 10 ** ((-40 - snr_db) / 20)
    write_stereo(tmp_path / "a.wav", pcm.astype(np.float32))
    done = transcriber(tmp_path / "a.wav", 0)
    assert recognised(done.words) >= least
    assert not done.repairs.get("dropped: in silence")


@pytest.mark.parametrize(("kind", "snr_db"), [("music", 20), ("white", 25)])
def test_whisper_does_not_listen_to_a_quiet_background(speech, kind, snr_db):
    pcm = speech * 10 ** ((-26 - speech_db(speech)) / 20) + noise_like(kind, len(speech)) * 10 ** ((-26 - snr_db) / 20)
    active = find_speech(resample_poly(pcm, 2, 3))
    assert 8.0 < active.sum() * 0.02 < 12.0, "8.7 s of the 40 are speech"


def test_the_detector_finds_speech_at_each_resolution(speech):
    expected = pytest.approx([3.26, 21.75], abs=0.08)  # "How", "By"
    assert [span.first * 0.08 for span in find_spans(voice_activity(speech))] == expected
    at_16k = read_audio(os.environ["AUDIO"], sample_rate=16_000)[0]
    assert [span.first * 0.02 for span in find_spans(find_speech(at_16k))] == pytest.approx([3.26, 21.75], abs=0.02)
    sound = measure_stereo([(0, np.stack([speech, 0.001 * speech[::-1]]))], RATE)
    ((agent, user),) = sound.speech()
    assert [span.first * 0.02 for span in find_spans(agent)] == pytest.approx([3.26, 21.75], abs=0.05)
    assert not user.any()


def test_a_reply_is_measured(speech):
    measures = measure_reply(np.zeros_like(speech), speech, [3] * 500)
    assert (measures["turns"], measures["pauses"]) == (2, 0) and measures["silence"] == 1


def test_forced_alignment_finds_the_words_of_sentences(speech, tmp_path):
    """Subtitles of both sentences, cut as subtitles are: words start within 0.15 s of their sound."""
    pytest.importorskip("stable_whisper")
    write_stereo(tmp_path / "call.wav", speech, silence(len(speech) / RATE))
    (tmp_path / "train.jsonl").write_text(json.dumps({"path": "call.wav", "duration": len(speech) / RATE}))
    cues = [("00:02.500 --> 00:08.000", FIRST), ("00:21.000 --> 00:26.500", SECOND)]
    (tmp_path / "call.vtt").write_text("WEBVTT\n\n" + "\n".join(f"{times}\n{text}\n" for times, text in cues))
    flags = ["--speaker", "*=SPEAKER_MAIN", "--aligner", "stable-ts", "--whisper-model", os.environ["WHISPER"]]
    assert import_words.main([str(tmp_path / "train.jsonl"), *flags]) == 0
    words = {text: start for text, (start, _), _ in json.loads((tmp_path / "call.json").read_text())["alignments"]}
    for text, start in (("how", 3.26), ("by", 21.75), ("what", 22.87)):
        assert abs(words[text] - start) < 0.15, (text, words[text])
