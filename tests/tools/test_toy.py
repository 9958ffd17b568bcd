"""The tiny world: what its files promise, and that its codes carry words and voices."""

import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyloudnorm
import pytest
import torch
from moshi.models.loaders import CheckpointInfo
from safetensors.torch import load_file

from benchmarks.toy_judges import detect_voice, detect_words
from finetune.audio.files import FRAME_RATE, FRAME_SIZE, SAMPLE_RATE, probe_audio, read_audio
from finetune.audio.words import sidecar
from finetune.cli import UserError
from finetune.data.manifest import read_manifest
from finetune.model.weights import split_names
from finetune.streams import SILENCE_TOKENS, SINE_TOKENS
from finetune.tools.toy.command import main
from finetune.tools.toy.corpus import make_corpus
from finetune.tools.toy.language import (
    AGENT_VOICES,
    NEUTRAL_WORDS,
    QUESTIONS,
    ROLES,
    VOICES,
    WORDS,
    expected_reply,
    greeting,
    is_held_out,
)
from finetune.tools.toy.model import make_model
from finetune.tools.toy.sound import synthesise
from tests.support import ROOT


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


@torch.no_grad()
def encode(mimi, wavs: np.ndarray) -> np.ndarray:
    """[lanes, samples] -> [lanes, 8, frames], frame by frame from a fresh state."""
    x = torch.from_numpy(np.ascontiguousarray(wavs, dtype=np.float32))[:, None]
    with mimi.streaming(len(x)):
        return torch.cat([mimi.encode(frame) for frame in x.split(FRAME_SIZE, dim=-1)], dim=-1).numpy()


@torch.no_grad()
def decode(mimi, codes: np.ndarray) -> np.ndarray:
    """[lanes, 8, frames] -> [lanes, samples], frame by frame from a fresh state."""
    with mimi.streaming(len(codes)):
        return torch.cat([mimi.decode(c) for c in torch.from_numpy(codes).split(1, dim=-1)], dim=-1)[:, 0].numpy()


class Side:
    """One channel of one dialogue: what was spoken by whom, and its sound, codes and decoded sound."""

    def __init__(self, about: dict, who: str, wav: np.ndarray, codes: np.ndarray, decoded: np.ndarray):
        self.voice = about["voice" if who == "SPEAKER_MAIN" else "user_voice"]
        self.words = [
            (word, round(start * FRAME_RATE), round(end * FRAME_RATE))
            for word, (start, end), speaker in about["alignments"]
            if speaker == who
        ]
        frames = len(wav) // FRAME_SIZE
        self.wav, self.codes, self.decoded = wav, codes[:, :frames], decoded[: len(wav)]


@pytest.fixture(scope="module")
def sides(world, mimi) -> list[Side]:
    paths = sorted((world / "data").glob("eval/*.wav")) + sorted((world / "data").glob("train/*.wav"))[:14]
    wavs = [wav for path in paths for wav in read_audio(path)]
    padded = np.zeros((len(wavs), max(map(len, wavs))), dtype=np.float32)
    for row, wav in zip(padded, wavs):
        row[: len(wav)] = wav
    codes = encode(mimi, padded)
    decoded = decode(mimi, codes)
    abouts = [json.loads(sidecar(path).read_text()) for path in paths]
    whos = [(about, who) for about in abouts for who in ("SPEAKER_MAIN", "SPEAKER_USER")]
    return [Side(*who, *rest) for who, *rest in zip(whos, wavs, codes, decoded)]


def lines(folder: Path, name: str) -> list[tuple[dict, dict, Path]]:
    """(manifest line, its .json, its wav) of a split."""
    problems: list[str] = []
    found = list(read_manifest(folder / f"{name}.jsonl", problems))
    assert not problems
    return [(line.fields, json.loads(sidecar(line.path).read_text()), line.path) for line in found]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


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
    info = checkpoint(world / "model")
    state = load_file(info.moshi_weights)
    dim, dep = info.lm_config["dim"], info.lm_config["depformer_dim"]
    assert state["depformer.layers.0.self_attn.in_proj_weight"].shape == (8 * 3 * dep, dep)
    assert state["depformer.layers.0.self_attn.out_proj.weight"].shape == (8 * dep, dep)
    assert state["transformer.layers.0.self_attn.in_proj_weight"].shape == (3 * dim, dim)
    assert not any("_projs." in key for key in state)
    assert {t.dtype for t in state.values()} == {torch.bfloat16}
    loaded = info.get_moshi("cpu", dtype=torch.bfloat16).state_dict()
    key = "depformer.layers.1.self_attn.in_proj_weight"
    assert torch.equal(torch.cat([loaded[name] for name in split_names(key, 8)]), state[key])


def test_the_seed_decides_everything(tmp_path):
    def make(name: str, seed: int) -> dict[str, bytes]:
        make_model(tmp_path / name / "model", seed, num_layers=1)
        make_corpus(tmp_path / name / "data", hours=0.004, seed=seed)
        return contents(tmp_path / name)

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
    for _, about, _ in lines(world / "data", "train") + lines(world / "data", "eval"):
        words = {"SPEAKER_MAIN": [], "SPEAKER_USER": []}
        for word, _, who in about["alignments"]:
            words[who].append(word)
        role, questions = about["role"], [turn["question"] for turn in about["turns"]]
        replies = [expected_reply(role, question) for question in questions]
        assert words["SPEAKER_MAIN"] == [word for said in (greeting(role), *replies) for word in said]
        assert words["SPEAKER_USER"] == [word for question in questions for word in QUESTIONS[question]]
        assert [turn["reply"] for turn in about["turns"]] == replies
        assert about["text_prompt"] == f"<system> You are {role} from the {ROLES[role].place}. <system>"
        starts = {start: who for _, (start, _), who in about["alignments"]}
        for turn in about["turns"]:
            reply = min(start for start, who in starts.items() if who == "SPEAKER_MAIN" and start > turn["asked_sec"])
            assert 0.2 <= reply - turn["asked_sec"] <= 0.6
    assert len({tuple(expected_reply(r, q)) for r in ROLES for q in QUESTIONS}) == 20


def test_word_times_are_where_the_sound_is(world):
    for fields, about, path in lines(world / "data", "train") + lines(world / "data", "eval"):
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


def test_the_semantic_codebook_names_the_word(sides):
    heard = defaultdict(Counter)  # (word, frame of it) -> codes, over voices and files
    for side in sides:
        for word, start, end in side.words:
            for i in range(end - start):
                heard[word, i][side.codes[0, start + i]] += 1
    assert sum(c.most_common(1)[0][1] for c in heard.values()) > 0.98 * sum(c.total() for c in heard.values())
    names = [c.most_common(1)[0][0] for c in heard.values()]
    assert len(set(names)) == len(names), "two sounds share a code"


def test_the_acoustic_codebooks_name_the_voice(sides):
    for codebook in (1, 2):
        heard = defaultdict(Counter)
        for side in sides:
            for _, start, end in side.words:
                heard[side.voice].update(side.codes[codebook, start:end].tolist())
        shares = [c.most_common(1)[0][1] / c.total() for c in heard.values()]
        assert min(shares) > 0.98
        names = {voice: c.most_common(1)[0][0] for voice, c in heard.items()}
        if codebook == 1:
            assert len(set(names.values())) == len(VOICES)
        assert len({names[voice] for voice in AGENT_VOICES}) == len(AGENT_VOICES)


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


def test_few_ids_occur(sides):
    for codebook in range(8):
        occurring = {int(code) for side in sides for code in side.codes[codebook]}
        assert len(occurring) < 130
        assert SINE_TOKENS[codebook] not in occurring


def test_codes_survive_a_change_of_level(mimi):
    wav = synthesise([*QUESTIONS["when"], "Celia", "library"], "cedar", lead_in=2)
    plain, louder, softer = encode(mimi, np.stack([wav, wav * 1.4, wav * 0.75]))
    assert (plain == louder).mean() > 0.99 and (plain == softer).mean() > 0.99


def test_ids_that_stand_for_nothing_decode_to_silence(mimi, sides):
    unused = [next(i for i in range(2048) if all(i not in s.codes[k] for s in sides)) for k in range(8)]
    for codes in (unused, SINE_TOKENS):
        assert np.abs(decode(mimi, np.array(codes)[None, :, None])).max() < 1e-3


# --- Judges ---


def test_judges_are_right_on_clean_sound():
    rng = np.random.default_rng(0)
    said = heard = voices = total = 0
    for name in VOICES:
        for _ in range(4):
            words = [str(word) for word in rng.choice(WORDS, 12)]
            wav = synthesise(words, name, lead_in=2)
            found = [word for word, _ in detect_words(wav)]
            said += sum(a == b for a, b in zip(words, found))
            heard += max(len(words), len(found))
            voices += detect_voice(wav)[0] == name
            total += 1
    assert said >= 0.98 * heard and voices >= 0.98 * total


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


def test_the_command_writes_both_folders(tmp_path):
    call = [sys.executable, "-m", "finetune.tools.toy", str(tmp_path / "world"), "--hours", "0.002"]
    subprocess.run(call, check=True, cwd=ROOT)
    assert {p.name for p in (tmp_path / "world").iterdir()} == {"model", "data"}
    assert len(lines(tmp_path / "world/data", "train")) == 2


@pytest.mark.parametrize(("args", "words"), [(("file",), "is a file"), (("new", "--hours", "0"), "above 0")])
def test_the_command_explains_mistakes(tmp_path, monkeypatch, args, words):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["toy", *args])
    with pytest.raises(UserError, match=words):
        main()
