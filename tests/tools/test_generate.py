"""The command that generates replies: its files, prompts and settings, and one reply from every form of a model."""

import json
import random
import shutil
import tarfile

import numpy as np
import pytest
import sphn
import torch
from moshi.utils.compile import no_compile

from finetune.audio.codec import encode_audio
from finetune.cli import UserError
from finetune.generate import Reply, Sampling, generate
from finetune.model.pretrained import Pretrained
from finetune.prompts.hybrid import VoicePrompt, build_prompt
from finetune.prompts.recordings import load_recording
from finetune.tools import generate as command
from finetune.tools.export.command import main as export
from tests.engine import Runtime, random_frames, tiny_lm, voice_frames
from tests.support import write_wav
from tests.tools.stored import adapted, expanded, save_checkpoint, save_run, write_base


@pytest.fixture(autouse=True)
def uncompiled():
    """Compiling takes longer than the tests."""
    with no_compile():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory, companions):
    """Two models of the tokenizer's 400 tokens, a Moshi and a PersonaPlex, by their codebooks."""
    folder = tmp_path_factory.mktemp("models")
    return {n: write_base(folder / str(n), tiny_lm(n, text_card=400), companions) for n in (8, 16)}


@pytest.fixture
def users(tmp_path):
    """Three users of 0.5 s, stereo at 24 kHz; each channel has a sound of its own."""
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        write_wav(tmp_path / f"{name}.wav", rng.uniform(-0.3, 0.3, (2, 12_000)), 24_000)
    return [tmp_path / f"{name}.wav" for name in ("a", "b", "c")]


@pytest.fixture
def replies(monkeypatch):
    """Replaces generation by silence; returns the arguments of each call."""
    calls = []

    def stay_silent(lm, prompts, users, sampling, seed):
        calls.append({"lm": lm, "prompts": prompts, "users": users, "sampling": sampling, "seed": seed})
        return [Reply(torch.full((user.shape[1],), 3), torch.ones_like(user)) for user in users]

    monkeypatch.setattr(command, "generate", stay_silent)
    return calls


# --- files -----------------------------------------------------------------------------------------------------


def test_the_reply_is_stereo_with_the_user_on_the_right_and_a_tail(models, users, replies, call, tmp_path):
    """Of 4 s, and with the settings of the servers, unless given otherwise."""
    call(command.main, models[8], "--user-wav", users[0], "--out", tmp_path / "new/out.wav")
    pcm, rate = sphn.read(str(tmp_path / "new/out.wav"))
    given, _ = sphn.read(str(users[0]))
    assert rate == 24_000 and pcm.shape == (2, 57 * 1920)
    np.testing.assert_allclose(pcm[1, :12_000], given[1], atol=1e-4)
    assert not pcm[1, 12_000:].any()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.wav"]
    assert [user.shape for user in replies[0]["users"]] == [(8, 57)]
    assert (replies[0]["sampling"], replies[0]["seed"]) == (Sampling(False, 0.8, 0.7, 250, 25), 0)


def test_settings_arrive_and_batches_differ_in_their_seeds(models, users, replies, call, tmp_path):
    call(
        command.main, models[8], "--user-wav", *users, "--out", tmp_path / "out", "--batch-size", 2, "--seed", 5,
        "--temp", 0.5, "--temp-text", 0.6, "--top-k", 7, "--top-k-text", 9, "--tail-sec", 0.3,
    )  # fmt: skip
    assert [(len(c["users"]), c["users"][0].shape[1], c["seed"]) for c in replies] == [(2, 10, 5), (1, 10, 7)]
    assert {c["sampling"] for c in replies} == {Sampling(False, 0.5, 0.6, 7, 9)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.wav", "b.wav", "c.wav"}
    for name in ("a", "b", "c"):
        right, given = (sphn.read(str(path))[0][1] for path in (tmp_path / f"out/{name}.wav", tmp_path / f"{name}.wav"))
        np.testing.assert_allclose(right[:12_000], given, atol=1e-4)
    call(command.main, models[8], "--user-wav", users[0], "--out", tmp_path / "out", "--greedy")
    assert replies[-1]["sampling"].greedy


@pytest.mark.parametrize("given, multiplies, dtype", [
    (None, True, torch.bfloat16), (None, False, torch.float32), ("bf16", False, torch.bfloat16),
])  # fmt: skip
def test_the_dtype_is_given_or_fits_the_device(
    given, multiplies, dtype, models, users, replies, call, tmp_path, monkeypatch
):
    monkeypatch.setattr(command, "multiplies_bfloat16", lambda device: multiplies)
    more = ("--dtype", given) if given else ()
    call(command.main, models[8], "--user-wav", users[0], "--out", tmp_path / "out.wav", *more)
    assert replies[0]["lm"].text_emb.weight.dtype == dtype


def test_words_are_written_as_json(models, users, call, tmp_path, monkeypatch, capsys):
    words = [("Grüezi", 0.08, 0.4), ("wohl", 0.4, 0.5)]
    monkeypatch.setattr(command, "spoken_words", lambda text, tokenizer: words)
    paths = (tmp_path / "out.wav", tmp_path / "new/out.json")
    call(command.main, models[8], "--user-wav", users[0], "--out", paths[0], "--text", paths[1], "--tail-sec", 0)
    written = paths[1].read_text()
    assert json.loads(written) == {"user": str(users[0]), "words": [list(word) for word in words]} and "ü" in written
    assert f"{paths[0]}: Grüezi wohl\n" in capsys.readouterr().out
    folders = "--out", tmp_path / "replies", "--text", tmp_path / "all"
    call(command.main, models[8], "--user-wav", *users, *folders, "--tail-sec", 0)
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"a.json", "b.json", "c.json"}


# --- prompts ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def voices(models, tmp_path_factory):
    """A folder with a recording and a .pt; the model's own voices.tgz has another .pt of the same name."""
    folder, lm, rng = tmp_path_factory.mktemp("voices"), tiny_lm(16, text_card=400), random.Random(0)
    write_wav(folder / "me.wav", np.random.default_rng(0).uniform(-0.1, 0.1, (1, 24_000)), 24_000)
    for name, frames in ((folder / "NATF2.pt", 9), (folder / "archive/NATF2.pt", 7)):
        name.parent.mkdir(exist_ok=True)
        torch.save(Runtime().run(voice_frames(f[1:9] for f in random_frames(rng, frames))).save_voice(lm), name)
    with tarfile.open(models[16] / "voices.tgz", "w:gz") as archive:
        archive.add(folder / "archive", "voices")
    shutil.rmtree(folder / "archive")
    return folder


def equal(prompt, expected):
    assert (prompt.embeddings is None) == (expected.embeddings is None)
    same = prompt.embeddings is None or torch.equal(prompt.embeddings, expected.embeddings)
    return same and torch.equal(prompt.frames, expected.frames)


def test_each_user_gets_the_prompt_of_a_recording_and_a_wrapped_text(
    models, users, voices, replies, call, tmp_path, monkeypatch
):
    opened = Pretrained(str(models[16]))
    codes = encode_audio(opened.mimi(), [load_recording(voices / "me.wav")])[0]
    ids = opened.tokenizer().encode("<system> You are Ada. <system>")
    monkeypatch.chdir(voices)  # a relative path is one from here
    prompt = ("--voice", "me.wav", "--text-prompt", "You are Ada.")
    call(command.main, models[16], "--user-wav", *users[:2], "--out", tmp_path / "out", "--tail-sec", 0, *prompt)
    expected = build_prompt(VoicePrompt("me.wav", codes=codes), ids)
    assert codes.shape[1] == 13 and all(equal(prompt, expected) for prompt in replies[0]["prompts"])
    assert len(replies[0]["prompts"]) == 2


def test_embedded_voices_come_from_the_folder_or_the_archive(models, users, voices, replies, call, tmp_path):
    arguments = (models[16], "--user-wav", users[0], "--out", tmp_path / "out.wav", "--tail-sec", 0, "--voice", "NATF2")
    call(command.main, *arguments)
    call(command.main, *arguments, "--voices-dir", voices)
    assert [len(reply["prompts"][0].embeddings) for reply in replies] == [6, 8]
    assert replies[0]["prompts"][0].frames.shape[1] == 7 + 12 - 1  # the voice and two silences, no text


def test_without_voice_and_text_the_silences_remain(models, users, replies, call, tmp_path):
    call(command.main, models[16], "--user-wav", users[0], "--out", tmp_path / "out.wav", "--tail-sec", 0)
    assert equal(replies[0]["prompts"][0], build_prompt(None, []))
    call(command.main, models[8], "--user-wav", users[0], "--out", tmp_path / "out.wav", "--tail-sec", 0)
    assert replies[1]["prompts"] == [None]


# --- the model -------------------------------------------------------------------------------------------------


def test_every_form_of_a_model_gives_the_same_reply(models, users, voices, call, tmp_path, monkeypatch):
    """A run, its adapters over a given base, and exports for both runtimes."""
    codes = []

    def generate_and_keep(*arguments):
        said = generate(*arguments)
        codes.extend(reply.codes.tolist() for reply in said)
        return said

    monkeypatch.setattr(command, "generate", generate_and_keep)
    trained = adapted(expanded(models[8]))
    run = save_run(tmp_path / "run", models[8], {10: trained})
    base = write_base(tmp_path / "base", expanded(models[8]), models[8])
    adapters = save_checkpoint(tmp_path / "adapters", base, trained, adapters=True)
    for runtime in ("moshi", "personaplex"):
        call(export, run, tmp_path / runtime, "--format", runtime, "--merge", "--dtype", "fp32")

    def reply(*source):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        call(
            command.main, *source, "--user-wav", users[0], "--voice", voices / "me.wav", "--text-prompt", "Hello.",
            "--greedy", "--dtype", "fp32", "--tail-sec", 0, "--out", f"{out}.wav", "--text", f"{out}.json",
        )  # fmt: skip
        return codes.pop(), out.with_suffix(".wav").read_bytes(), out.with_suffix(".json").read_text()

    expected = reply(run)
    for source in ((adapters, "--base", base), (tmp_path / "moshi",), (tmp_path / "personaplex",)):
        assert reply(*source) == expected, source
    assert reply(base)[0] != expected[0]


def test_users_of_the_same_name_are_refused_before_anything_is_written(models, users, call, tmp_path):
    (tmp_path / "more").mkdir()
    same = shutil.copy(users[0], tmp_path / "more/a.wav")
    with pytest.raises(UserError, match=r"out/a\.wav; rename"):
        call(command.main, models[8], "--user-wav", users[0], same, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
