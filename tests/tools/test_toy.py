"""The tiny world: what its files promise, and that its codes carry words and voices."""

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyloudnorm
import pytest
import torch
from moshi.models.loaders import CheckpointInfo
from safetensors.torch import load_file

from benchmarks.toy_judges import detect_voice, detect_words, synthesise
from finetune.audio.codec import encode_audio
from finetune.audio.files import FRAME_RATE, FRAME_SIZE, SAMPLE_RATE, probe_audio, read_audio
from finetune.audio.words import sidecar
from finetune.cli import UserError
from finetune.data.manifest import read_manifest
from finetune.generate import decode_codes
from finetune.streams import SILENCE_TOKENS, SINE_TOKENS
from finetune.tools.toy.command import main
from finetune.tools.toy.corpus import make_corpus
from finetune.tools.toy.language import (
    AGENT_VOICES,
    NEUTRAL_WORDS,
    QUESTIONS,
    ROLES,
    WORDS,
    expected_reply,
    greeting,
    is_held_out,
)
from finetune.tools.toy.model import make_model


def checkpoint(folder: Path) -> CheckpointInfo:
    config = json.loads((folder / "config.json").read_text())
    return CheckpointInfo.from_hf_repo(
        "none/none",
        moshi_weights=folder / config["moshi_name"],
        mimi_weights=folder / config["mimi_name"],
        tokenizer=folder / config["tokenizer_name"],
        config_path=folder / "config.json",
        mimi_config_path=folder / config["mimi_config_name"],
    )


@pytest.fixture(scope="module")
def mimi(world):
    return checkpoint(world / "model").get_mimi()


class Side(NamedTuple):
    """One channel of one dialogue."""

    voice: str
    words: list[tuple[str, int, int]]  # word, first frame, frame after the last
    wav: np.ndarray
    codes: np.ndarray  # [8, frames]
    decoded: np.ndarray


@pytest.fixture(scope="module")
def sides(world, mimi) -> list[Side]:
    paths = [*(world / "data").glob("eval/*.wav"), *sorted((world / "data").glob("train/*.wav"))[:14]]
    wavs = [wav for path in paths for wav in read_audio(path)]
    codes = encode_audio(mimi, wavs, exact=False)
    spoken = []
    for path in paths:
        about = json.loads(sidecar(path).read_text())
        for voice, who in ((about["voice"], "SPEAKER_MAIN"), (about["user_voice"], "SPEAKER_USER")):
            times = [(word, *span) for word, span, speaker in about["alignments"] if speaker == who]
            spoken.append((voice, [(word, round(a * FRAME_RATE), round(b * FRAME_RATE)) for word, a, b in times]))
    return [
        Side(*own, wav, codes.numpy(), decoded)
        for own, wav, codes, decoded in zip(spoken, wavs, codes, decode_codes(mimi, codes))
    ]


def lines(folder: Path, *splits: str) -> list[tuple[dict, dict, Path]]:
    """(manifest line, its .json, its wav) of splits."""
    problems: list[str] = []
    found = [line for split in splits for line in read_manifest(folder / f"{split}.jsonl", problems)]
    assert not problems
    return [(line.fields, json.loads(sidecar(line.path).read_text()), line.path) for line in found]


# --- The model folder ---


def test_stock_loaders_read_the_model_folder(world):
    info = checkpoint(world / "model")
    lm = info.get_moshi("cpu", dtype=torch.float32)
    assert (lm.dep_q, lm.n_q, lm.card) == (8, 16, 2048)
    assert lm.delays == [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]
    assert 5e6 < sum(p.numel() for p in lm.parameters()) < 10e6
    with torch.no_grad():
        out = lm.eval()(torch.zeros(1, 17, 3, dtype=torch.int64))
    assert out.text_logits.isfinite().all() and out.logits[out.mask].isfinite().all()

    codec = info.get_mimi()
    assert (codec.frame_size, codec.frame_rate, codec.num_codebooks, codec.cardinality) == (1920, 12.5, 8, 2048)

    tokenizer = info.get_text_tokenizer()
    assert tokenizer.vocab_size() == lm.text_card
    ids = (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id())
    assert ids == (0, 1, 2, 3) and lm.existing_text_padding_id == 3
    pieces = {word: len(tokenizer.encode(word)) for word in WORDS}
    assert max(pieces.values()) <= 4 and np.mean([n <= 3 for n in pieces.values()]) > 0.9
    assert max(pieces.values()) > 1, "some words need several pieces, or interleaving is not tried"
    assert tokenizer.decode(tokenizer.encode("Zürich & 3")) == "Zürich & 3"  # by bytes


def test_weights_are_stored_fused_as_published(world):
    state = load_file(checkpoint(world / "model").moshi_weights)
    assert state["depformer.layers.0.self_attn.in_proj_weight"].shape == (8 * 3 * 64, 64)
    assert state["depformer.layers.0.self_attn.out_proj.weight"].shape == (8 * 64, 64)
    assert not any("_projs." in key for key in state)
    assert {t.dtype for t in state.values()} == {torch.bfloat16}


def test_the_seed_decides_everything(tmp_path):
    def make(name: str, seed: int) -> dict[str, bytes]:
        make_model(tmp_path / name / "model", seed, num_layers=1)
        make_corpus(tmp_path / name / "data", hours=0.004, seed=seed)
        paths = filter(Path.is_file, (tmp_path / name).rglob("*"))
        return {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in paths}

    first, again, other = make("a", 0), make("b", 0), make("c", 1)
    assert first == again
    assert json.loads(first["model/config.json"])["num_layers"] == 1
    for name in ("model/model.safetensors", "data/train.jsonl", "data/train/00000.wav", "data/voices/flint.wav"):
        assert first[name] != other[name], name
    assert first["model/tokenizer.model"] == other["model/tokenizer.model"]


# --- The corpus ---


def test_pairs_of_role_and_voice_are_held_out_of_training(world):
    pairs = {name: [(j["role"], j["voice"]) for _, j, _ in lines(world / "data", name)] for name in ("train", "eval")}
    unseen = {(r, v) for r in ROLES for v in AGENT_VOICES if is_held_out(r, v)}
    assert len(unseen) == len(ROLES) == len({v for _, v in unseen})
    assert set(pairs["train"]) == {(r, v) for r in ROLES for v in AGENT_VOICES} - unseen
    flags = [fields["held_out"] for fields, _, _ in lines(world / "data", "eval")]
    assert flags == [pair in unseen for pair in pairs["eval"]]
    assert set(flags) == {True, False}


def test_dialogues_follow_the_role_and_the_questions(world):
    for _, about, _ in lines(world / "data", "train", "eval"):
        agent = [(word, start) for word, (start, _), who in about["alignments"] if who == "SPEAKER_MAIN"]
        user = [word for word, _, who in about["alignments"] if who == "SPEAKER_USER"]
        role, questions = about["role"], [turn["question"] for turn in about["turns"]]
        replies = [expected_reply(role, question) for question in questions]
        assert [word for word, _ in agent] == [word for said in (greeting(role), *replies) for word in said]
        assert user == [word for question in questions for word in QUESTIONS[question]]
        assert [turn["reply"] for turn in about["turns"]] == replies
        assert about["text_prompt"] == f"<system> You are {role} from the {ROLES[role].place}. <system>"
        for asked in (turn["asked_sec"] for turn in about["turns"]):
            assert 0.2 <= min(start for _, start in agent if start > asked) - asked <= 0.6
    assert len({tuple(expected_reply(r, q)) for r in ROLES for q in QUESTIONS}) == 20


def test_word_times_are_where_the_sound_is(world):
    for fields, about, path in lines(world / "data", "train", "eval"):
        info = probe_audio(path)
        assert (info.channels, info.sample_rate) == (2, SAMPLE_RATE)
        assert fields["duration"] == pytest.approx(info.duration_sec) and 5.9 <= info.duration_sec <= 16.5
        starts = [start for _, (start, _), _ in about["alignments"]]
        assert starts == sorted(starts)
        for channel, who in ((0, "SPEAKER_MAIN"), (1, "SPEAKER_USER")):
            wav = read_audio(path)[channel]
            hops = np.sqrt((wav[: len(wav) // 480 * 480].reshape(-1, 480) ** 2).mean(1))  # 20 ms
            speech = np.zeros(len(hops), dtype=bool)
            for _, (start, end), speaker in about["alignments"]:
                assert 0 <= start < end <= info.duration_sec
                if speaker == who:
                    speech[round(start * 50) : round(end * 50)] = True
            after = np.roll(speech, 1) & ~speech  # a sound takes 5 ms to end
            assert hops[speech].min() > 0.02 and hops[~speech & ~after].max() < 0.002


def test_voice_prompts_are_other_speech_at_the_loudness_of_a_prompt(world):
    spoken = {word for _, j, _ in lines(world / "data", "train") for word, _, _ in j["alignments"]}
    assert {j["voice_prompt"] for _, j, _ in lines(world / "data", "train")} == {f"{v}.wav" for v in AGENT_VOICES}
    for voice in AGENT_VOICES:
        wav = read_audio(world / "data/voices" / f"{voice}.wav")
        assert wav.shape[0] == 1 and 3.0 <= wav.shape[1] / SAMPLE_RATE <= 4.0
        words = [word for word, _ in detect_words(wav[0])]
        assert len(words) > 6 and set(words) <= set(NEUTRAL_WORDS)
        assert not spoken & set(words)
        assert detect_voice(wav[0])[0] == voice
        assert pyloudnorm.Meter(SAMPLE_RATE).integrated_loudness(wav[0]) == pytest.approx(-24, abs=0.6)


# --- Codes ---


def test_a_word_in_a_voice_has_the_same_codes_everywhere(sides):
    heard = defaultdict(Counter)
    for side in sides:
        for word, start, end in side.words:
            heard[word, side.voice][side.codes[:, start:end].tobytes()] += 1
    repeated = [c for c in heard.values() if c.total() > 1]
    assert len(repeated) > 30
    assert sum(c.most_common(1)[0][1] for c in repeated) > 0.97 * sum(c.total() for c in repeated)


def test_silence_has_the_silence_tokens_of_personaplex(sides):
    right = []
    for side in sides:
        quiet = np.ones(side.codes.shape[1], dtype=bool)
        for _, start, end in side.words:
            quiet[start:end] = False
        right.append((side.codes[:, quiet] == np.array(SILENCE_TOKENS)[:, None]).all(0))
    assert np.concatenate(right).mean() > 0.98


def test_codes_survive_a_change_of_level(mimi):
    wav = synthesise([*QUESTIONS["when"], "Celia", "library"], "cedar", lead_in=2)
    plain, *others = encode_audio(mimi, [wav, wav * 1.4, wav * 0.75], exact=False)
    assert all((plain == other).float().mean() > 0.99 for other in others)


def test_ids_that_stand_for_nothing_decode_to_silence(mimi, sides):
    unused = [next(i for i in range(2048) if all(i not in s.codes[k] for s in sides)) for k in range(8)]
    for codes in (unused, SINE_TOKENS):
        assert np.abs(decode_codes(mimi, [torch.tensor(codes)[:, None]])[0]).max() < 1e-3


# --- Judges ---


@pytest.mark.parametrize("kind", ["wav", "codes", "decoded"])
def test_judges_are_right_on_dialogues(sides, kind):
    right, said, voices = 0, 0, []
    for side in sides:
        sound = getattr(side, kind)
        words = [(word, start) for word, start, _ in side.words]
        found = detect_words(sound)
        right += len(set(words) & set(found))
        said += max(len(words), len(found))
        name, confidence = detect_voice(sound)
        voices.append(name == side.voice and confidence > 0.9)
    assert right >= 0.98 * said and np.mean(voices) >= 0.98


def test_judges_hear_nothing_in_silence():
    silence = np.random.default_rng(0).standard_normal(20 * FRAME_SIZE) * 1e-3
    codes = np.repeat(np.array(SILENCE_TOKENS)[:, None], 20, axis=1)
    for sound in (silence, codes):
        assert detect_words(sound) == [] and detect_voice(sound) == (None, 0.0)


def test_judges_tell_a_wrong_voice_and_a_missing_word(sides):
    side = sides[0]
    mixed = np.concatenate([synthesise(["hello"], "basalt"), synthesise(["this", "is"], "willow")])
    name, confidence = detect_voice(mixed)
    assert name == "willow" and confidence < 0.9
    codes = side.codes.copy()
    _, start, end = side.words[1]
    codes[:, start:end] = np.array(SILENCE_TOKENS)[:, None]
    expected = [(word, start) for word, start, _ in side.words]
    assert detect_words(codes) == expected[:1] + expected[2:]


# --- The command ---


def test_the_command_writes_both_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["toy", str(tmp_path / "world"), "--hours", "0.002"])
    main()
    assert {p.name for p in (tmp_path / "world").iterdir()} == {"model", "data"}
    assert len(lines(tmp_path / "world/data", "train")) == 2


@pytest.mark.parametrize(("args", "words"), [(("file",), "is a file"), (("new", "--hours", "0"), "above 0")])
def test_the_command_explains_mistakes(tmp_path, monkeypatch, args, words):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["toy", *args])
    with pytest.raises(UserError, match=words):
        main()
