"""Kyutai's runtime, stock, beside what a Moshi is trained on and what `generate` says."""

import sys
from types import SimpleNamespace

import pytest
import torch
from moshi.models import LMGen, loaders
from moshi.run_inference import InferenceState
from moshi.utils.compile import no_compile

from finetune.audio.files import read_audio
from finetune.config import load_args
from finetune.data.run_data import RunData
from finetune.distributed import session
from finetune.model.pretrained import MOSHI, Pretrained, lm_kwargs
from finetune.tools import generate
from tests.served_model import CONTEXT, USER_FRAMES, make_served_model, training_inputs, write_calls
from tests.support import write_config

FRAMES = 40  # of the call, 3.2 s; Mimi's attention of 1 s is full after 12


@pytest.fixture(scope="module")
def model(world, tmp_path_factory):
    return make_served_model(tmp_path_factory.mktemp("kyutai") / "model", world, dep_q=8)


@pytest.fixture(autouse=True)
def not_compiled():
    with no_compile():
        yield


def stock(model):
    """(LM, Mimi) as moshi itself loads them."""
    kwargs = lm_kwargs(Pretrained(str(model)), MOSHI)
    lm = loaders.get_moshi_lm(model / "model.safetensors", kwargs, device="cpu", dtype=torch.float32)
    mimi = loaders.get_mimi(model / "mimi.safetensors", Pretrained(str(model)).mimi_config(), num_codebooks=8)
    return lm, mimi


def test_a_window_is_what_the_runtime_reads(model, world, tmp_path, monkeypatch):
    """The runtime is forced to say the dialogue; its Mimi makes the codes."""
    manifest = write_calls(tmp_path, FRAMES * 1920, "voice.wav")
    settings = {"data.train_data": str(manifest), "duration_sec": FRAMES / 12.5, "do_eval": False}
    args = load_args(write_config(tmp_path, world, **settings))
    checkpoint = Pretrained(str(model))
    with session("cpu") as alone:
        batch = next(RunData(args, False, checkpoint, lm_kwargs(checkpoint, MOSHI), None, alone).batches(0))

    lm, mimi = stock(model)
    agent, user = (torch.from_numpy(pcm).split(1920) for pcm in read_audio(tmp_path / "call.wav"))
    columns, inputs = [], []
    lm.transformer.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0, 0].clone()))
    forward_text = lm.forward_text
    lm.forward_text = lambda tokens, *rest: columns.append(tokens[0, :, 0].clone()) or forward_text(tokens, *rest)
    column = 0
    said = torch.full((9, FRAMES + 2), lm.initial_token_id)  # of each column; the last one is not read
    said[0] = 0

    def force(tokens, streams):  # changed in place
        tokens[:] = said[streams, column]

    with torch.no_grad(), mimi.streaming(2):
        codes = [mimi.encode(torch.stack(pair)[:, None]) for pair in zip(agent, user)]
    codes = torch.cat(codes, dim=2)  # [2, 8, FRAMES]
    said[0, 1 : FRAMES + 1] = batch.codes[0, 0]  # the text is no matter of the runtime
    for k, delay in enumerate([0] + [1] * 7):
        said[1 + k, 1 + delay : FRAMES + 1 + delay] = codes[0, k]
    runtime = LMGen(
        lm, use_sampling=False, on_text_hook=lambda token: force(token, 0),
        on_audio_hook=lambda tokens: force(tokens, slice(1, None)),
    )  # fmt: skip
    with runtime.streaming(1):
        # The first frame twice, as in moshi/run_inference.py: the first step replaces it by initial tokens.
        for column, frame in enumerate([0, *range(FRAMES)], start=1):  # noqa: B007  (force reads column)
            runtime.step(codes[1:, :, frame : frame + 1])
    ours = training_inputs(loaders.get_moshi_lm(
        model / "model.safetensors", lm_kwargs(checkpoint, MOSHI), device="cpu", dtype=torch.float32
    ), batch, monkeypatch)  # fmt: skip
    assert torch.equal(ours[0], torch.stack(columns, dim=1)[:, :FRAMES])
    assert torch.equal(ours[1], torch.stack(inputs)[:FRAMES])


def test_a_greedy_reply_is_that_of_the_runtime(model, tmp_path, monkeypatch):
    write_calls(tmp_path, FRAMES * 1920, "voice.wav")
    replies, own = [], generate.generate
    monkeypatch.setattr(generate, "generate", lambda *args: replies.extend(own(*args)) or replies[-1:])
    monkeypatch.setattr(sys, "argv", [
        "generate", str(model), "--user-wav", str(tmp_path / "user.wav"), "--out", str(tmp_path / "reply.wav"),
        "--greedy", "--dtype", "fp32", "--tail-sec", "0", "--device", "cpu",
    ])  # fmt: skip
    generate.main()

    lm, mimi = stock(model)
    checkpoint = SimpleNamespace(model_type="moshi")
    state = InferenceState(checkpoint, mimi, Pretrained(str(model)).tokenizer(), lm, 1, 1.0, "cpu", use_sampling=False)
    said, step = [], state.lm_gen.step
    monkeypatch.setattr(state.lm_gen, "step", lambda tokens: said.append(step(tokens)) or said[-1])
    with torch.no_grad():
        [(text, _)] = state.run(torch.from_numpy(read_audio(tmp_path / "user.wav"))[None])
    said = torch.cat([tokens for tokens in said if tokens is not None], dim=2)[0]
    assert replies[0].text.tolist() == text.tolist() == said[0].tolist() and len(text) == USER_FRAMES > CONTEXT
    assert torch.equal(replies[0].codes, said[1:])
    assert len(replies[0].codes.unique()) > 100 and len(text.unique()) > 10
