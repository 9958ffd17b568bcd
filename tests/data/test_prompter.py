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
from finetune.cli import UserError
from finetune.data import prompter as prompter_module
from finetune.data.manifest import Line, read_manifest, resolve_path
from finetune.data.prompter import Prompter, bullet_list, check_context, longest_prompt
from finetune.data.voice_supply import VoiceSource, group_speakers
from finetune.data.windows import open_windows
from finetune.prompts.hybrid import VoicePrompt, build_prompt
from finetune.prompts.recordings import load_recording
from finetune.prompts.same_speaker import (
    SAME_SPEAKER,
    find_segments,
    load_same_speaker,
    same_speaker_file,
    segment_audio,
)
from finetune.prompts.segment_files import save_same_speaker
from tests.data.support import prompted
from tests.support import write_wav

SILENCES = 11  # frames of a prompt without voice and text: two silences of 6, less the first frame
HI = [72, 105, 46]  # the tokens of "Hi."


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

    def find(self, name, folder, *_):
        if name.startswith("no"):
            raise UserError(f"no voice {name!r}")
        return Path(folder) / name


def make_prompter(frames=100, voice=None, **settings):
    """A prompter of at most so many frames, with the voice "v" loaded."""
    prompter = Prompter(PromptArgs(max_sec=(frames + 0.5) / 12.5, **settings), Letters(), Book())
    prompter.voices = {Path("/calls/v"): voice}
    return prompter


def line(**fields):
    return Line(1, Path("/calls/a.wav"), fields, Path("/calls/m.jsonl"))


def choose(prompter, window=(0.0, 1.0), stored=(), **fields):
    """The prompt of a window of a file that has these `same_speaker` segments."""
    return prompter(line(**fields), {}, window, None, lambda _: list(stored))


# --- choosing ---------------------------------------------------------------------------------------------------


def test_a_line_comes_before_the_json_and_the_json_before_the_settings():
    prompter = make_prompter(text="settings")
    extra = {"text_prompt": "json", "voice_prompt": "j.wav"}
    assert prompter.names(line(text_prompt="line", voice_prompt="l.wav"), extra) == ("line", "l.wav")
    assert prompter.names(line(text_prompt="line"), extra) == ("line", "j.wav")
    assert prompter.names(line(text_prompt=None, voice_prompt=None), extra) == ("json", "j.wav"), "pandas writes null"
    assert prompter.names(line(voice_prompt="l.wav"), {"text_prompt": None}) == ("settings", "l.wav")
    assert make_prompter().names(line(), {}) == (None, None)
    assert choose(make_prompter()) == (None, None, [], True, 0, 0)
    assert Prompter(PromptArgs(voice="s.wav"), Letters(), Book()).names(line(), {}) == (None, "s.wav")


def test_an_empty_prompt_opts_out():
    prompter = make_prompter(text="settings", voice="v")
    extra = {"text_prompt": "json", "voice_prompt": "j.wav"}
    assert prompter.names(line(text_prompt="", voice_prompt=" "), extra) == (None, None)
    assert prompter.names(line(voice_prompt="l.wav"), {"text_prompt": "\n"}) == (None, "l.wav")
    assert choose(make_prompter(voice=VoicePrompt("v", torch.zeros(8, 20)), text="Hi."), voice_prompt="").voiceless
    assert prompter.scan([(line(text_prompt="", voice_prompt=""), {})]) == ([], {})


def test_a_text_is_wrapped_once_and_encoded_once(monkeypatch):
    prompter = make_prompter()
    assert prompter.encode("Hi.") == prompter.encode("Hi.") == HI
    prompter.encode("<system> Ha. <system>")
    assert prompter.tokenizer.texts == ["<system> Hi. <system>", "<system> Ha. <system>"]
    monkeypatch.setattr(prompter_module, "_MAX_TEXTS", 3)
    assert [prompter.encode(str(i)) for i in range(5)] == [[48 + i] for i in range(5)] and len(prompter._texts) <= 3


# --- lengths ----------------------------------------------------------------------------------------------------


def test_the_longest_prompt_has_only_whole_frames():
    seconds = (0.07, 0.56, 4.0, 4.07, 4.08)
    assert [longest_prompt(PromptArgs(max_sec=sec)) for sec in seconds] == [0, 7, 50, 50, 51]


def test_window_and_prompt_fit_the_context():
    args = TrainArgs.model_construct(duration_sec=1.96, prompt=PromptArgs(max_sec=4.0))  # 25 and 50 frames
    check_context(args, None)
    check_context(args, 75)
    with pytest.raises(UserError, match=r"duration_sec 1\.96 and prompt\.max_sec 4 .*5\.92 s"):
        check_context(args, 74)


@pytest.mark.parametrize("room", [20, 19, 1, 0])
def test_a_recorded_voice_is_shortened_to_what_the_text_leaves(room):
    codes = torch.arange(160).view(8, 20)
    prompter = make_prompter(SILENCES + len(HI) + room, VoicePrompt("v", codes))
    stored = [{"start": 5.0, "end": 6.6, "codes": codes.to(torch.int16)}]
    named, own = (choose(prompter, text_prompt="Hi.", voice_prompt=v, stored=stored) for v in ("v", SAME_SPEAKER))
    assert named.text_ids == own.text_ids == HI and own.voiceless == named.voiceless == (room == 0)
    if room == 0:
        assert named.voice is None and own.voice is None
    else:
        assert torch.equal(named.voice.codes, codes[:, :room]) and torch.equal(own.voice.codes, codes[:, :room])


def test_an_embedded_voice_is_not_shortened():
    voice = VoicePrompt("v", embeddings=torch.zeros(20, 4), tail=torch.zeros(17, 3))  # 21 frames
    fields = {"text_prompt": "Hi.", "voice_prompt": "v"}
    assert choose(make_prompter(SILENCES + len(HI) + 21, voice), **fields).voice is voice
    with pytest.raises(UserError, match="v: 21 frames"):
        choose(make_prompter(SILENCES + len(HI) + 20, voice), **fields)


def test_a_prompt_that_cannot_be_used_costs_a_window():
    assert choose(make_prompter(SILENCES + len(HI)), text_prompt="Hi.").text_ids == HI
    with pytest.raises(UserError, match=r"a\.wav: .*3 tokens"):
        choose(make_prompter(SILENCES + len(HI) - 1), text_prompt="Hi.")
    with pytest.raises(UserError, match=r"a\.wav: .*'new\.wav'"):  # was added after the start of the run
        choose(make_prompter(), voice_prompt="new.wav")


# --- same_speaker -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window, chosen", [
    ((4.0, 8.0), 0), ((8.5, 8.6), 0), ((3.99, 8.0), 1), ((2.5, 3.0), 1), ((3.99, 8.01), None)
])  # fmt: skip
def test_the_first_stored_segment_outside_the_window_is_the_voice(window, chosen):
    spans = [(2.0, 4.0), (8.0, 9.0)]
    stored = [{"start": a, "end": b, "codes": torch.full((8, 25), i)} for i, (a, b) in enumerate(spans)]
    voice, pcm, ids, voiceless, *cut = choose(make_prompter(), window, stored, voice_prompt=SAME_SPEAKER)
    assert cut == [0, 0]
    assert voiceless == (voice is None) == (chosen is None) and pcm is None and ids == []
    if voice is not None:
        assert voice.name == SAME_SPEAKER and (voice.codes == chosen).all()


@pytest.mark.parametrize("quiet_sec, window, start", [
    (0, (3.0, 6.0), 0), (0, (1.0, 2.0), 3), (0, (2.0, 4.0), None),
    (3, (6.4, 9.0), 3), (9, (6.4, 9.0), None),  # segments in which the agent is silent are passed over
])  # fmt: skip
def test_the_first_segment_of_the_audio_outside_the_window_is_the_voice(tmp_path, quiet_sec, window, start):
    sound = np.random.default_rng(0).uniform(-0.1, 0.1, (2, 9 * 24_000)) * [[1], [0.1]]
    sound[0, : quiet_sec * 24_000] = 0
    write_wav(tmp_path / "a.wav", sound, 24_000)
    words = [("so", 0.0, 1.9), ("and", 3.0, 4.5)]  # segments of 0 to 3 and 3 to 6 seconds
    recording = Line(1, tmp_path / "a.wav", {"voice_prompt": SAME_SPEAKER}, tmp_path / "m.jsonl")
    segments = lambda each: [{"start": a, "end": b} for a, b in find_segments(each.path, words)]
    for room in (100, 20, 0):
        voice, pcm, _, voiceless, *_ = make_prompter(SILENCES + room)(recording, {}, window, None, segments)
        assert voice is None and voiceless == (pcm is None) == (start is None or room == 0)
        if pcm is not None:
            assert np.array_equal(pcm, segment_audio(tmp_path / "a.wav", start, start + 3)[: room * 1920])


@pytest.mark.parametrize("window, reserve_sec, cut", [
    ((0.0, 8.0), 1.9, None),
    ((0.0, 8.0), 2.0, (1, 0, 25)),  # its last two seconds
    ((0.0, 8.96), 9.0, (1, 0, 37)),  # from the start of the last segment on
    ((0.0, 7.02), 3.0, (1, 0, 13)),
    ((0.5, 16.0), 9.0, (0, 32, 0)),  # up to 3 s
    ((2.0, 7.0), 1.0, (0, 13, 0)),  # a segment that begins before the window
    ((2.0, 7.0), 0.9, None),
])  # fmt: skip
def test_a_window_without_another_voice_gives_up_a_part_of_itself(window, reserve_sec, cut):
    spans = [(1.0, 3.0), (6.0, 8.0)]
    stored = [{"start": a, "end": b, "codes": torch.full((8, 25), i)} for i, (a, b) in enumerate(spans)]
    found = choose(make_prompter(reserve_sec=reserve_sec), window, stored, voice_prompt=SAME_SPEAKER)
    assert found.voiceless == (cut is None) and (found.head, found.tail) == (cut or (0, 0, 0))[1:]
    assert cut is None or (found.voice.codes == cut[0]).all()


def lenders(*calls, speaker="ann", manifest="/calls/m.jsonl"):
    """(speakers, line_of) of a prompter: files of these calls, one a line."""
    sources = [VoiceSource(Path(manifest), i, call, speaker, 9.0, [(0.0, 2.0)]) for i, call in enumerate(calls)]
    line_of = lambda source: Line(source.file + 1, Path(f"/calls/{source.call}"), {}, source.manifest)
    return group_speakers(sources), line_of


def test_a_window_without_a_voice_of_its_own_borrows_one_of_another_call():
    prompter = make_prompter(reserve_sec=9.0)
    prompter.speakers, prompter.line_of = lenders("a.wav", "b.wav", "c.wav", "c.wav")
    voices = {f"/calls/{name}.wav": torch.full((8, 25), i) for i, name in enumerate("abc")}
    segments = lambda each: [{"start": 0.0, "end": 2.0, "codes": voices[str(each.path)]}]

    def borrowed(seed, window=(0.0, 2.0), **fields):
        generator = None if seed is None else np.random.default_rng(seed)
        own = line(voice_prompt=SAME_SPEAKER, call="a.wav", **fields)
        parts = prompter(own, {}, window, generator, segments)
        assert (parts.head, parts.tail) == (0, 0)
        return None if parts.voice is None else int(parts.voice.codes[0, 0])

    chosen = [borrowed([0, 2, position], speaker="ann") for position in range(60)]
    assert set(chosen) == {1, 2}, "never of the same call"
    assert chosen == [borrowed([0, 2, position], speaker="ann") for position in range(60)]
    assert borrowed(None, speaker="ann") == borrowed(None, speaker="ann") in (1, 2)
    assert borrowed(0, window=(2.0, 4.0), speaker="ann") == 0, "its own comes first"
    assert borrowed(0, window=(0.0, 3.0), speaker="bob") is None and borrowed(0, window=(0.0, 3.0)) is None


def test_a_voice_is_not_borrowed_of_another_manifest():
    prompter = make_prompter()
    prompter.speakers, prompter.line_of = lenders("b.wav", manifest="/calls/other.jsonl")
    stored = [{"start": 0.0, "end": 2.0, "codes": torch.zeros(8, 25)}]
    assert choose(prompter, (0.0, 2.0), stored, voice_prompt=SAME_SPEAKER, speaker="ann").voiceless


# --- the check before a run -------------------------------------------------------------------------------------


def test_the_voices_of_all_scans_are_found_from_the_folder_of_the_audio():
    files = [(line(voice_prompt="v.wav"), {}), (line(), {"voice_prompt": "w.wav"}), (line(voice_prompt="v.wav"), {}),
             (line(voice_prompt=SAME_SPEAKER), {}), (line(), {})]  # fmt: skip
    scans = [make_prompter().scan(each) for each in (files, files[:1], [])]
    assert scans[0] == ([Path("/calls/v.wav"), Path("/calls/w.wav")], {})
    assert Prompter.check(scans) == [Path("/calls/v.wav"), Path("/calls/w.wav")]


@pytest.mark.parametrize("room, fields, limit", [
    (3, {"text_prompt": "Hi."}, None),
    (2, {"text_prompt": "Hi."}, 2),
    (3 + 12, {"text_prompt": "Hi.", "voice_prompt": "v.wav"}, None),
    (3 + 11, {"text_prompt": "Hi.", "voice_prompt": "v.wav"}, 2),
    (3 + 11, {"text_prompt": "Hi.", "voice_prompt": SAME_SPEAKER}, 2),
    (3, {"text_prompt": "Hi.", "voice_prompt": "v.wav"}, 0),
    (-1, {}, None),
])  # fmt: skip
def test_a_text_leaves_room_for_a_second_of_voice(room, fields, limit):
    _, problems = make_prompter(SILENCES + room).scan([(line(**fields), {})])
    assert len(problems) == (limit is not None)
    for sentence in problems.values():
        assert sentence.startswith("/calls/a.wav: ") and "3 tokens" in sentence and f"room for {limit}" in sentence


def test_all_prompts_that_cannot_be_used_are_listed_once():
    voices = [{"voice_prompt": voice} for voice in ("no1", "no2", "no1", ["v"])]
    fields = voices + [{"text_prompt": text} for text in (7, "7", "x" * 200, "x" * 200)]
    prompter = make_prompter()
    with pytest.raises(UserError) as error:
        prompter.check([prompter.scan([(line(**each), {})]) for each in fields])
    _, *listed = str(error.value).split("\n  - ")
    assert len(listed) == 5 and all(sentence.startswith("/calls/a.wav: ") for sentence in listed)
    for words in ("'no1'", "'no2'", "text_prompt is 7", "voice_prompt is ['v']", "200 tokens"):
        assert sum(words in sentence for sentence in listed) == 1


def test_twenty_sentences_are_shown():
    sentences = [f"sentence {i}." for i in range(23)]
    assert bullet_list(sentences[:20]).split("\n  - ") == ["", *sentences[:20]]
    assert bullet_list(sentences).split("\n  - ") == ["", *sentences[:20], "and 3 more"]


# --- in samples -------------------------------------------------------------------------------------------------


def test_each_window_begins_with_its_own_prompt(parts, world, encoded):
    mimi, pieces = parts
    _, live, stored = prompted(parts, world, open_windows(str(encoded), 40))
    for recording in list(read_manifest(encoded, []))[:2]:
        about = json.loads(recording.path.with_suffix(".json").read_text())
        [codes] = encode_audio(mimi, [load_recording(world / "data/voices" / about["voice_prompt"])])
        ids = pieces.encode(about["text_prompt"])
        prompt, _ = build_prompt(VoicePrompt("v", codes), ids)
        for tokenizer, index in ((live, 0), (stored, 0), (stored, 1)):
            [sample] = tokenizer.encode([tokenizer.read(recording, index)])
            assert torch.equal(sample.codes[:, : prompt.shape[1]], prompt)
            assert not sample.loss_mask[: prompt.shape[1]].any() and sample.loss_mask[prompt.shape[1] :].all()
            assert sample.prompt_ids == ids and sample.voice == about["voice_prompt"] and not sample.voiceless


def test_same_speaker_is_the_same_for_live_and_stored_codes(parts, world, encoded):
    mimi, _ = parts
    _, live, stored = prompted(parts, world, voice=SAME_SPEAKER)
    lines = list(read_manifest(encoded, []))[:2]
    for recording in lines:
        recording.fields["voice_prompt"] = SAME_SPEAKER
    with pytest.raises(UserError, match="--same-speaker"):
        stored.read(lines[0], 0)
    files = [(each.path, resolve_path(encoded, each.fields["codes_path"])) for each in lines]
    assert save_same_speaker(files, mimi, fingerprint_mimi(mimi)) == {}
    voices = set()
    for recording, (_, codes) in zip(lines, files):
        spans = load_same_speaker(same_speaker_file(codes), None, ["SPEAKER_MAIN"])
        for index in range(math.ceil(recording.duration * 12.5 / 40)):
            a, b = (t.encode([t.read(recording, index)])[0] for t in (live, stored))
            assert torch.equal(a.codes[:, ~a.loss_mask], b.codes[:, ~b.loss_mask])
            start, end = index * 3.2, min(index * 3.2 + 3.2, recording.duration)
            outside = [span["codes"] for span in spans if span["end"] <= start or span["start"] >= end]
            assert a.voiceless == b.voiceless == (not outside)
            assert a.voice == b.voice == (SAME_SPEAKER if outside else None)
            if outside:
                assert torch.equal(b.codes[1:9, : outside[0].shape[1] - 1], outside[0][:, 1:].long())
            voices.add(b.voice)
    assert SAME_SPEAKER in voices
    for _, codes in files:
        same_speaker_file(codes).unlink()
