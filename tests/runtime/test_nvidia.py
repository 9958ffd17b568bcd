"""NVIDIA's runtime beside ours: `make test-runtime PERSONAPLEX=folder`, a clone of github.com/NVIDIA/personaplex.

Its module is called `moshi` too, so it runs in processes of its own (nvidia.py); files are exchanged. The model is
tiny, has random weights, and was exported by finetune.tools.export. Both compute in float32 on one thread.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from moshi.utils.compile import no_compile

import precompute_codes
from finetune.audio.codes import load_codes
from finetune.config import load_args
from finetune.data.run_data import RunData
from finetune.distributed import session
from finetune.model.inference import load_merged
from finetune.model.pretrained import Pretrained
from finetune.model.stored import open_stored
from finetune.model.training_lm import TrainingLM
from finetune.prompts.recordings import encode_recordings, load_recording
from finetune.tools import generate, make_voice
from finetune.tools.export import command as export
from tests.model.stock import group_sums
from tests.served_model import CONTEXT, USER_FRAMES, make_served_model, noise, training_inputs, write_calls
from tests.support import write_config, write_media, write_wav

pytestmark = pytest.mark.skipif(not os.environ.get("PERSONAPLEX"), reason="needs PERSONAPLEX")
FRAMES = 50  # of the call, 4 s; Mimi's attention of 1 s is full after 12
TEXT = "<system> You are Ada from the harbour. <system>"
VOICES = pytest.mark.parametrize("voice", ["voice44.wav", "voice.pt"])


@pytest.fixture(autouse=True)
def not_compiled():
    with no_compile():
        yield


@pytest.fixture(scope="module")
def model(world, tmp_path_factory):
    """An exported PersonaPlex."""
    runtime = Path(os.environ["PERSONAPLEX"]) / "moshi/moshi/offline.py"
    assert runtime.is_file(), f"{runtime}: no such file; PERSONAPLEX must be a clone of github.com/NVIDIA/personaplex"
    folder = tmp_path_factory.mktemp("nvidia")
    source = make_served_model(folder / "source", world, dep_q=16)
    call(export, source, folder / "model", "--format", "personaplex", "--dtype", "fp32")
    return folder / "model"


@pytest.fixture(scope="module")
def data(model, tmp_path_factory):
    """A call, a user and voices; voice.pt is ours."""
    folder = tmp_path_factory.mktemp("data")
    write_calls(folder, FRAMES * 1920 - 500, "voice44.wav")
    call(make_voice, folder / "voice.wav", folder / "voice.pt", "--weights", model, "--dtype", "fp32")
    return folder


def call(module, *arguments):
    """Run a command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        assert not module.main()


def ask(folder: Path, model: Path, *task) -> dict:
    """Return what a task of nvidia.py finds."""
    job, result = folder / "job.pt", folder / "result.pt"
    torch.save(task, job)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "nvidia.py"), str(model), str(job), str(result)],
        env=os.environ | {"PYTHONPATH": f"{os.environ['PERSONAPLEX']}/moshi", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return torch.load(result)


def first_batch(data, model, world, folder, voice):
    """What training reads of the call, whose codes it makes itself."""
    sidecar = data / "call.json"
    sidecar.write_text(sidecar.read_text().replace("voice44.wav", voice).replace("voice.pt", voice))
    settings = {"data.train_data": str(data / "calls.jsonl"), "duration_sec": FRAMES / 12.5, "do_eval": False}
    settings["prompt.max_sec"] = 5
    args = load_args(write_config(folder, world, **settings))
    source = open_stored(str(model))
    with session("cpu") as alone:
        run = RunData(args, True, source.checkpoint, source.kwargs, source.read, alone)
        return next(run.batches(0))


@VOICES
def test_a_window_is_what_the_runtime_reads(data, model, world, tmp_path, monkeypatch, voice):
    batch = first_batch(data, model, world, tmp_path, voice)
    text_ids = sentencepiece.SentencePieceProcessor(str(model / "tokenizer.model")).encode(TEXT)
    text = batch.codes[0, 0, -FRAMES:]
    theirs = ask(tmp_path, model, "window", str(data / "call.wav"), str(data / voice), text_ids, text)
    assert torch.equal(batch.codes[0, 1:, -FRAMES:], theirs["codes"])
    lm = load_merged(open_stored(str(model)), torch.device("cpu"), torch.float32, dep_q=16)
    columns, inputs = training_inputs(lm, batch, monkeypatch)
    assert inputs.shape == theirs["inputs"].shape and torch.equal(inputs, theirs["inputs"])
    known = 0 if batch.lengths is None else int(batch.lengths[0])  # a .pt holds inputs, no columns
    assert torch.equal(columns[:, known:], theirs["columns"][:, known:])


def test_precomputed_codes_are_those_of_the_runtime(data, model, tmp_path):
    code = precompute_codes.main([
        str(data / "calls.jsonl"), "--output-dir", str(tmp_path), "--hf-repo", str(model), "--exact", "--device", "cpu",
    ])  # fmt: skip
    assert code == 0
    ours = load_codes(tmp_path / "codes/call.wav.pt")["codes"].flatten(0, 1).long()
    text = torch.full((FRAMES,), 3)
    theirs = ask(tmp_path, model, "window", str(data / "call.wav"), str(data / "voice.wav"), [5], text)["codes"]
    assert torch.equal(ours, theirs) and len(ours.unique()) > 50


def test_voices_are_what_the_runtime_loads(model, tmp_path):
    paths = []
    for seed, rate in enumerate((8_000, 16_000, 22_050, 24_000, 44_100, 48_000)):
        paths.append(tmp_path / f"{rate}.wav")
        write_wav(paths[-1], noise(1, 3 * rate + seed, seed), rate)
    for name, codec in (("a.flac", "flac"), ("a.mp3", "mp3")):
        paths.append(tmp_path / name)
        write_media(paths[-1], noise(1, 3 * 24_000, 9), 24_000, codec)
    write_wav(tmp_path / "stereo.wav", noise(2, 72_000, 0), 24_000)
    theirs = ask(tmp_path, model, "voices", [str(path) for path in [*paths, tmp_path / "stereo.wav"]])
    checkpoint = Pretrained(str(model))
    codes, problems = encode_recordings(paths, checkpoint.mimi, checkpoint.mimi_fingerprint())
    assert not problems
    for path in paths:
        assert np.array_equal(load_recording(path), theirs[str(path)]["audio"].float().numpy()), path
        assert torch.equal(codes[path], theirs[str(path)]["codes"]), path
    assert "ValueError" in theirs[str(tmp_path / "stereo.wav")]


def test_a_voice_file_is_what_the_runtime_saves(data, model, tmp_path):
    (tmp_path / "voice.wav").write_bytes((data / "voice.wav").read_bytes())
    ask(tmp_path, model, "save_voice", str(tmp_path / "voice.wav"))
    ours, theirs = torch.load(data / "voice.pt"), torch.load(tmp_path / "voice.pt")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@VOICES
def test_a_greedy_reply_is_that_of_the_runtime(data, model, tmp_path, monkeypatch, voice):
    """moshi/offline.py, from the command line to the tokens that it decodes."""
    replies, own = [], generate.generate
    monkeypatch.setattr(generate, "generate", lambda *args: replies.extend(own(*args)) or replies[-1:])
    files = {"voice": data / voice, "user-wav": data / "user.wav", "out": tmp_path / "ours.wav"}
    call(generate, model, *(word for flag, path in files.items() for word in (f"--{flag}", path)), "--text-prompt",
         TEXT, "--greedy", "--dtype", "fp32", "--tail-sec", "0", "--device", "cpu")  # fmt: skip
    theirs = ask(tmp_path, model, "run_offline", [
        "--voice-prompt-dir", str(data), "--voice-prompt", voice, "--text-prompt", TEXT, "--input-wav",
        str(data / "user.wav"), "--output-wav", str(tmp_path / "theirs.wav"), "--output-text",
        str(tmp_path / "theirs.json"),
    ])["tokens"]  # fmt: skip
    # Its first frame is the last one of the prompt: a frame leaves the runtime one step after it was predicted.
    assert theirs.shape == (17, USER_FRAMES) and USER_FRAMES > CONTEXT
    assert torch.equal(replies[0].text[:-1], theirs[0, 1:])
    assert torch.equal(replies[0].codes[:, :-1], theirs[1:9, 1:])
    assert len(replies[0].text.unique()) > 10 and len(replies[0].codes.unique()) > 100


def test_losses_are_those_of_the_runtimes_own_training_forward(data, model, world, tmp_path):
    batch = first_batch(data, model, world, tmp_path, "voice44.wav")
    out = ask(tmp_path, model, "losses", batch.codes)
    mask = batch.loss_mask
    ce, hits = group_sums(
        out["logits"], out["text_logits"][:, 0], out["mask"] & mask[:, None], out["text_mask"][:, 0] & mask, batch.codes
    )
    lm = load_merged(open_stored(str(model)), torch.device("cpu"), torch.float32, dep_q=16)
    with torch.no_grad():
        ours = TrainingLM(lm, False)(batch.codes, mask)
    torch.testing.assert_close(ours.ce, ce, rtol=1e-5, atol=1e-4)
    assert torch.equal(ours.correct.long(), hits)
