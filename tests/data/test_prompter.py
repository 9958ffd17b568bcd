"""Which prompt a window gets, how much of it fits, and what is refused before a run."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.args import PromptArgs, TrainArgs
from finetune.audio.codec import encode_audio
from finetune.audio.codes import fingerprint_mimi
from finetune.audio.files import AudioInfo
from finetune.cli import UserError
from finetune.data.manifest import Line, read_manifest, resolve_path
from finetune.data.prompter import Prompter, bullet_list, check_context, longest_prompt
from finetune.data.windows import open_windows
from finetune.prompts.hybrid import VoicePrompt
from finetune.prompts.recordings import load_recording
from finetune.prompts.same_speaker import SAME_SPEAKER, load_same_speaker, same_speaker_file, save_same_speaker
from finetune.streams import SINE_TOKENS
from tests.data.support import prompted
from tests.support import write_wav

SILENCES = 11  # frames of a prompt without voice and text: two silences of 6, less the first frame


class Letters:
    """A tokenizer with a token per letter."""

    def __init__(self):
        self.texts = []

    def encode(self, text, add_bos, add_eos):
        assert not add_bos and not add_eos
        self.texts.append(text)
        return [ord(letter) for letter in text.removeprefix("<system> ").removesuffix(" <system>")]


class Book:
    """A VoiceBook in which all voices exist whose name does not begin with "no"."""

    def find(self, name, folder):
        if name.startswith("no"):
            raise UserError(f"no voice {name!r}")
        return Path(folder) / name


def prompter(frames=100, **settings):
    return Prompter(PromptArgs(max_sec=(frames + 0.5) / 12.5, **settings), Letters(), Book())


def line(**fields):
    return Line(1, Path("/calls/a.wav"), fields, Path("/calls/m.jsonl"))


def choose(chooser, window=(0.0, 1.0), generator=None, stored=None, words=(), **fields):
    return chooser(line(**fields), {}, list(words), window, generator, stored)


# --- choosing ---------------------------------------------------------------------------------------------------


def test_a_line_comes_before_the_json_and_the_json_before_the_settings():
    chooser, extra = prompter(text="settings", voice="s.wav"), {"text_prompt": "json", "voice_prompt": "j.wav"}
    assert chooser.names(line(text_prompt="line", voice_prompt="l.wav"), extra) == ("line", "l.wav")
    assert chooser.names(line(text_prompt="line"), extra) == ("line", "j.wav")
    assert chooser.names(line(voice_prompt="l.wav"), {"text_prompt": "json"}) == ("json", "l.wav")
    assert chooser.names(line(text_prompt=None, voice_prompt=""), extra) == ("json", "j.wav"), "pandas writes null"
    assert chooser.names(line(), {"text_prompt": None}) == ("settings", "s.wav")
    assert prompter().names(line(), {}) == (None, None)


def test_a_text_is_wrapped_once_and_encoded_once(monkeypatch):
    chooser = prompter()
    assert chooser.encode("Hi.") == chooser.encode("Hi.") == [72, 105, 46]
    chooser.encode("<system> Ha. <system>")
    assert chooser.tokenizer.texts == ["<system> Hi. <system>", "<system> Ha. <system>"]
    monkeypatch.setattr("finetune.data.prompter._MAX_TEXTS", 3)
    assert [chooser.encode(str(i)) for i in range(5)] == [[48 + i] for i in range(5)] and len(chooser._texts) <= 3


@pytest.mark.parametrize("text_rate, voice_rate", [(0.9, 0.1), (0.1, 0.9), (0.0, 1.0), (1.0, 0.0)])
def test_text_and_voice_are_dropped_independently(text_rate, voice_rate):
    chooser = prompter(drop_text=text_rate, drop_voice=voice_rate)
    chooser.voices = {Path("/calls/v.wav"): VoicePrompt("v", torch.zeros(8, 20))}
    fields = {"text_prompt": "Hi.", "voice_prompt": "v.wav"}
    for seed in range(40):
        draws = np.random.default_rng(seed).random(2)
        parts = choose(chooser, generator=np.random.default_rng(seed), **fields)
        assert (parts.text_ids == []) == (draws[0] < text_rate) and (parts.voice is None) == (draws[1] < voice_rate)
        kept = choose(chooser, generator=None, **fields)
        assert kept.text_ids and kept.voice is not None, "an evaluation drops nothing"


def test_a_window_without_prompts_has_only_silences():
    assert choose(prompter()) == (None, None, [], False)


def test_a_voice_that_was_added_after_the_start_costs_a_window():
    with pytest.raises(UserError, match=r"a\.wav: .*'v\.wav'"):
        choose(prompter(), voice_prompt="v.wav")


# --- lengths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds, frames", [(0.56, 7), (4.0, 50), (4.07, 50), (4.08, 51), (0.07, 0)])
def test_the_longest_prompt_has_only_whole_frames(seconds, frames):
    assert longest_prompt(PromptArgs(max_sec=seconds)) == frames


@pytest.mark.parametrize("context, fits", [(None, True), (0, True), (75, True), (74, False)])
def test_window_and_prompt_fit_the_context(context, fits):
    args = TrainArgs.model_construct(duration_sec=1.96, prompt=PromptArgs(max_sec=4.0))  # 25 and 50 frames
    if fits:
        check_context(args, context)
    else:
        with pytest.raises(UserError, match=r"duration_sec 1\.96 and prompt\.max_sec 4 .*5\.92 s"):
            check_context(args, context)


@pytest.mark.parametrize("frames, kept", [(SILENCES + 3 + 20, 20), (SILENCES + 3 + 19, 19), (SILENCES + 3 + 1, 1),
                                          (SILENCES + 3, None)])  # fmt: skip
def test_a_recorded_voice_is_shortened_to_what_the_text_leaves(frames, kept):
    chooser, codes = prompter(frames), torch.arange(160).view(8, 20)
    chooser.voices = {Path("/calls/v.wav"): VoicePrompt("v", codes)}
    voice = choose(chooser, text_prompt="Hi.", voice_prompt="v.wav").voice
    assert voice is None if kept is None else torch.equal(voice.codes, codes[:, :kept]) and voice.name == "v"
    stored = lambda: [{"start": 5.0, "end": 6.6, "codes": codes.to(torch.int16)}]
    parts = choose(chooser, text_prompt="Hi.", voice_prompt=SAME_SPEAKER, stored=stored)
    assert parts.voiceless == (kept is None)
    if kept is not None:
        assert torch.equal(parts.voice.codes, codes[:, :kept]) and parts.voice.codes.dtype == torch.int64


@pytest.mark.parametrize("frames, fits", [(SILENCES + 3 + 21, True), (SILENCES + 3 + 20, False)])
def test_an_embedded_voice_is_not_shortened(frames, fits):
    chooser = prompter(frames)
    voice = VoicePrompt("v", embeddings=torch.zeros(20, 4), tail=torch.zeros(17, 3))  # 21 frames
    chooser.voices = {Path("/calls/v.pt"): voice}
    if fits:
        assert choose(chooser, text_prompt="Hi.", voice_prompt="v.pt").voice is voice
    else:
        with pytest.raises(UserError, match="v: 21 frames"):
            choose(chooser, text_prompt="Hi.", voice_prompt="v.pt")


def test_a_text_that_does_not_fit_costs_a_window():
    assert choose(prompter(SILENCES + 3), text_prompt="Hi.").text_ids == [72, 105, 46]
    with pytest.raises(UserError, match=r"a\.wav: .*3 tokens"):
        choose(prompter(SILENCES + 2), text_prompt="Hi.")


# --- same_speaker -----------------------------------------------------------------------------------------------


SEGMENTS = [((2.0, 4.0), True), ((2.0, 4.01), False), ((4.5, 5.0), False), ((4.0, 8.0), False), ((3.0, 9.0), False),
            ((7.99, 9.0), False), ((8.0, 9.0), True)]  # fmt: skip


@pytest.mark.parametrize("segment, outside", SEGMENTS)
def test_a_segment_outside_the_window_does_not_overlap_it(monkeypatch, segment, outside):
    stored = lambda: [{"start": segment[0], "end": segment[1], "codes": torch.zeros(8, 5)}]
    assert choose(prompter(), (4.0, 8.0), stored=stored, voice_prompt=SAME_SPEAKER).voiceless == (not outside)
    monkeypatch.setattr("finetune.data.prompter.probe_audio", lambda path: AudioInfo(2, 24_000, 10.0))
    monkeypatch.setattr("finetune.data.prompter.voice_segments", lambda words, duration: [segment])
    monkeypatch.setattr("finetune.data.prompter.segment_audio", lambda path, start, end: np.full(5, start))
    parts = choose(prompter(), (4.0, 8.0), voice_prompt=SAME_SPEAKER)
    assert parts.voiceless == (parts.pcm is None) == (not outside)


def test_the_first_stored_segment_outside_the_window_is_the_voice():
    spans = [(3.9, 5.9), (4.0, 4.5), (0.0, 2.0), (9.0, 10.0)]
    stored = lambda: [{"start": a, "end": b, "codes": torch.full((8, 25), i)} for i, (a, b) in enumerate(spans)]
    parts = choose(prompter(), window=(4.0, 8.0), stored=stored, voice_prompt=SAME_SPEAKER)
    assert (parts.voice.codes == 2).all() and parts.voice.name == SAME_SPEAKER and not parts.voiceless
    assert choose(prompter(), window=(0.0, 10.0), stored=stored, voice_prompt=SAME_SPEAKER) == (None, None, [], True)


def test_the_audio_of_a_segment_is_normalised_and_shortened(tmp_path):
    sound = np.random.default_rng(0).uniform(-0.1, 0.1, (2, 9 * 24_000))
    write_wav(tmp_path / "a.wav", sound, 24_000)
    words = [("so", 0.0, 1.9), ("and", 3.0, 4.5)]  # segments of 0 to 3 and 3 to 6 seconds
    recording = Line(1, tmp_path / "a.wav", {"voice_prompt": SAME_SPEAKER}, tmp_path / "m.jsonl")
    for window, start in (((3.0, 6.0), 0), ((1.0, 2.0), 3), ((2.0, 4.0), None)):
        voice, pcm, _, voiceless = prompter()(recording, {}, words, window, None, None)
        assert voice is None and voiceless == (start is None) == (pcm is None)
        if pcm is not None:
            assert pcm.dtype == np.float32 and len(pcm) == 3 * 24_000
            part = sound[0, start * 24_000 : (start + 3) * 24_000]
            assert np.corrcoef(pcm, part)[0, 1] > 0.999, "the agent's channel, from the start of the segment"
    assert len(prompter(SILENCES + 20)(recording, {}, words, (3.0, 6.0), None, None).pcm) == 20 * 1920
    assert prompter(SILENCES)(recording, {}, words, (3.0, 6.0), None, None) == (None, None, [], True)


@pytest.mark.parametrize("quiet", [3, 6], ids=["first", "all"])
def test_segments_in_which_the_agent_is_silent_are_passed_over(tmp_path, quiet):
    sound = np.random.default_rng(0).uniform(-0.1, 0.1, (2, 9 * 24_000))
    sound[0, : quiet * 24_000] = 0
    write_wav(tmp_path / "a.wav", sound, 24_000)
    words = [("so", 0.0, 1.9), ("and", 3.0, 4.5)]
    recording = Line(1, tmp_path / "a.wav", {"voice_prompt": SAME_SPEAKER}, tmp_path / "m.jsonl")
    parts = prompter()(recording, {}, words, (6.4, 9.0), None, None)
    assert parts.voiceless == (quiet == 6) == (parts.pcm is None)
    if quiet == 3:
        assert np.corrcoef(parts.pcm, sound[0, 3 * 24_000 : 6 * 24_000])[0, 1] > 0.999


# --- the check before a run -------------------------------------------------------------------------------------


def test_voices_are_found_from_the_folder_of_the_audio():
    files = [(line(voice_prompt="v.wav"), {}), (line(), {"voice_prompt": "w.wav"}), (line(voice_prompt="v.wav"), {}),
             (line(voice_prompt=SAME_SPEAKER), {}), (line(), {})]  # fmt: skip
    assert prompter().scan(files) == ([Path("/calls/v.wav"), Path("/calls/w.wav")], {})


def test_the_voices_of_all_scans_are_loaded_once():
    v, w = Path("v"), Path("w")
    assert Prompter.check([([v], {}), ([], {}), ([w, v], {})]) == [v, w]


@pytest.mark.parametrize("frames, fields, fits", [
    (SILENCES + 3, {"text_prompt": "Hi."}, True),
    (SILENCES + 2, {"text_prompt": "Hi."}, False),
    (SILENCES + 3 + 12, {"text_prompt": "Hi.", "voice_prompt": "v.wav"}, True),
    (SILENCES + 3 + 11, {"text_prompt": "Hi.", "voice_prompt": "v.wav"}, False),
    (SILENCES + 3 + 11, {"text_prompt": "Hi.", "voice_prompt": SAME_SPEAKER}, False),
    (SILENCES - 1, {}, True),
])  # fmt: skip
def test_a_text_leaves_room_for_a_second_of_voice(frames, fields, fits):
    without_voice = (line(text_prompt="Hi."), {}) if frames >= SILENCES + 3 else (line(), {})
    _, problems = prompter(frames).scan([without_voice, (line(**fields), {})])
    assert (problems == {}) == fits
    if not fits:
        (sentence,) = problems.values()
        room = max(0, frames - SILENCES - (12 if "voice_prompt" in fields else 0))
        assert sentence.startswith("/calls/a.wav: ") and "3 tokens" in sentence and f"room for {room}" in sentence


def test_all_prompts_that_cannot_be_used_are_listed_once():
    voices = [{"voice_prompt": voice} for voice in ("no1", "no2", "no1", ["v"])]
    fields = voices + [{"text_prompt": text} for text in (7, "7", "x" * 200, "x" * 200)]
    chooser = prompter()
    scans = [chooser.scan([(line(**each), {})]) for each in fields]
    with pytest.raises(UserError) as error:
        chooser.check(scans)
    _, *listed = str(error.value).split("\n  - ")
    assert len(listed) == 5 and all(sentence.startswith("/calls/a.wav: ") for sentence in listed)
    for words in ("'no1'", "'no2'", "text_prompt is 7", "voice_prompt is ['v']", "200 tokens"):
        assert sum(words in sentence for sentence in listed) == 1


def test_twenty_sentences_are_shown():
    assert bullet_list(["a", "b"]) == "\n  - a\n  - b"
    sentences = [f"sentence {i}." for i in range(23)]
    assert bullet_list(sentences[:20]).split("\n  - ")[1:] == sentences[:20]
    assert bullet_list(sentences).split("\n  - ")[1:] == [*sentences[:20], "and 3 more"]


# --- in samples -------------------------------------------------------------------------------------------------


def test_each_window_begins_with_its_own_prompt(parts, world, encoded):
    mimi, pieces = parts
    _, *both = prompted(parts, world, open_windows(str(encoded), 40))
    for recording in list(read_manifest(encoded, []))[:2]:
        about = json.loads(recording.path.with_suffix(".json").read_text())
        sound = load_recording(world / "data/voices" / about["voice_prompt"])
        codes = encode_audio(mimi, [torch.from_numpy(sound)])[0]
        ids = pieces.encode(about["text_prompt"])
        for index in (0, 1):
            for tokenizer in both:
                sample = tokenizer.encode([tokenizer.read(recording, index)])[0]
                dialogue = int(sample.loss_mask.sum())
                assert sample.codes.shape[1] - dialogue == codes.shape[1] - 1 + 6 + len(ids) + 6
                assert not sample.loss_mask[:-dialogue].any() and sample.loss_mask[-dialogue:].all()
                assert torch.equal(sample.codes[1:9, : codes.shape[1] - 1], codes[:, 1:])
                start = codes.shape[1] - 1 + 6
                assert sample.codes[0, start : start + len(ids)].tolist() == ids == sample.prompt_ids
                assert (torch.tensor(SINE_TOKENS) == sample.codes[9:, :-dialogue].T).all()
                assert sample.voice == about["voice_prompt"] and not sample.voiceless


def test_same_speaker_is_the_same_for_live_and_stored_codes(parts, world, encoded, tmp_path):
    mimi, _ = parts
    _, live, stored = prompted(parts, world, voice=SAME_SPEAKER)
    lines = list(read_manifest(encoded, []))[:2]
    for recording in lines:
        recording.fields["voice_prompt"] = SAME_SPEAKER
    with pytest.raises(UserError, match="--same-speaker"):
        stored.read(lines[0], 0)
    files = [(each.path, resolve_path(encoded, each.fields["codes_path"])) for each in lines]
    assert save_same_speaker(files, mimi, fingerprint_mimi(mimi)) == {}
    voiced = 0
    for recording, (_, codes) in zip(lines, files):
        spans = load_same_speaker(same_speaker_file(codes), None, ["SPEAKER_MAIN"])
        for index in range(math.ceil(recording.duration * 12.5 / 40)):
            a, b = (t.encode([t.read(recording, index)])[0] for t in (live, stored))
            assert torch.equal(a.codes[:, ~a.loss_mask], b.codes[:, ~b.loss_mask])
            start, end = index * 3.2, min(index * 3.2 + 3.2, recording.duration)
            outside = [span["codes"] for span in spans if span["end"] <= start or span["start"] >= end]
            assert a.voiceless == b.voiceless == (not outside) and a.voice == b.voice == (
                SAME_SPEAKER if outside else None
            )
            if outside:
                voiced += 1
                assert torch.equal(b.codes[1:9, : outside[0].shape[1] - 1], outside[0][:, 1:].long())
    assert voiced
    for _, codes in files:
        same_speaker_file(codes).unlink()
