"""Free-running generation: the model sees what it saw in training, prompts are forced, and the user is heard."""

import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from moshi.models import LMGen
from moshi.utils.compile import no_compile

from finetune.generate import Sampling, decode_codes, generate, generation_mode
from finetune.model.training_lm import TrainingLM
from finetune.prompts.embedded import load_embedded
from finetune.prompts.hybrid import VoicePrompt, build_prompt
from finetune.streams import DEP_Q
from tests.engine import DELAYS, SINE_TOKENS, Runtime, embed, engine_frames, random_frames, tiny_lm


@pytest.fixture(autouse=True)
def not_compiled():
    """moshi would compile its norms and gatings on first use, which takes long."""
    with no_compile():
        yield


def conversation(rng, frames):
    voice = [f[1:9] for f in random_frames(rng, 7)]
    return voice, [11, 12, 13], torch.tensor(random_frames(rng, frames)).T[9:]


def greedy_by_runtime(lm, voice, text, user):
    """The reply of the independent runtime: greedy tokens where none is forced, computed column by column."""
    frames = engine_frames(voice, text, [])
    runtime = Runtime()
    for frame in frames:
        runtime.step(frame)
    columns = [torch.tensor(c) for c in runtime.inputs]  # columns 0..P-2
    ring = {c: [runtime.cache[s][c % 4] for s in range(17)] for c in (len(frames) - 1, len(frames))}
    column = torch.tensor(ring[len(frames) - 1])
    late = ring[len(frames)]  # acoustic tokens of the last prompt frame
    said = []
    with torch.no_grad(), lm.streaming(1):
        for c in columns:
            lm.forward_text(c.view(1, 17, 1))
        for t in range(user.shape[1] + 1):
            out, logits = lm.forward_text(column.view(1, 17, 1))
            following = torch.full((17,), -1)
            following[0] = logits[0, 0, 0].argmax()
            with lm.depformer.streaming(1):
                token = following[0]
                for k in range(8):
                    token = lm.forward_depformer(k, token.view(1, 1, 1), out)[0, 0, 0].argmax()
                    if t == 0 and DELAYS[k + 1]:
                        token = torch.tensor(late[k + 1])
                    following[k + 1] = token
            for k in range(8):
                if DELAYS[9 + k] == 0:
                    following[9 + k] = user[k, t] if t < user.shape[1] else -1
                else:
                    following[9 + k] = late[9 + k] if t == 0 else user[k, t - 1]
            said.append(following[:9].tolist())
            column = following
    said = torch.tensor(said).T
    return said[0, :-1], torch.stack([said[1 + k, DELAYS[k + 1] :][: user.shape[1]] for k in range(8)])


@pytest.mark.parametrize("embedded", [False, True])
def test_a_reply_equals_that_of_the_independent_runtime(embedded, tmp_path):
    lm = tiny_lm(DEP_Q)
    voice, text, user = conversation(random.Random(2), 15)
    source = VoicePrompt("v", codes=torch.tensor(voice).T)
    if embedded:
        torch.save(Runtime().run([[3, *codes, *SINE_TOKENS] for codes in voice]).save_voice(lm), tmp_path / "v.pt")
        source = load_embedded(tmp_path / "v.pt", DELAYS, lambda c: embed(lm, c.view(1, 17, 1))[0, 0])
    reply = generate(lm, [build_prompt(source, text)], [user], Sampling(greedy=True))[0]
    expected_text, expected_codes = greedy_by_runtime(lm, voice, text, user)
    assert reply.text.tolist() == expected_text.tolist()
    assert reply.codes.tolist() == expected_codes.tolist()
    assert lm.dep_q == DEP_Q


def test_a_reply_does_not_depend_on_others_in_the_batch():
    lm = tiny_lm(DEP_Q)
    rng = random.Random(4)
    conversations = [conversation(rng, frames) for frames in (12, 5, 9)]
    voice = lambda codes: VoicePrompt("v", codes=torch.tensor(codes).T)
    prompts = [build_prompt(voice(v), t + [14] * i) for i, (v, t, _) in enumerate(conversations)]
    prompts[1] = None
    users = [u for _, _, u in conversations]
    together = generate(lm, prompts, users, Sampling(greedy=True))
    assert lm.dep_q == DEP_Q and not torch.equal(together[0].codes[:, :5], together[1].codes)
    for prompt, user, reply in zip(prompts, users, together, strict=True):
        alone = generate(lm, [prompt], [user], Sampling(greedy=True))[0]
        assert reply.codes.shape == user.shape and torch.equal(alone.codes, reply.codes)
        assert reply.text.shape == user.shape[1:] and torch.equal(alone.text, reply.text)
        assert reply.codes.dtype == reply.text.dtype == torch.int64


def test_the_user_is_heard():
    lm = tiny_lm(DEP_Q)
    voice, text, user = conversation(random.Random(6), 12)
    prompt = build_prompt(VoicePrompt("v", codes=torch.tensor(voice).T), text)
    other = user.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 2048
    a, b = generate(lm, [prompt, prompt], [user, other], Sampling(greedy=True))
    assert torch.equal(a.codes[0, :5], b.codes[0, :5]) and not torch.equal(a.codes[:, 6:], b.codes[:, 6:])


def test_greedy_tokens_are_the_most_likely_of_the_training_forward():
    """What is generated, fed back as a training sample: every free token is the argmax of the training forward."""
    lm = tiny_lm(DEP_Q)
    voice, text, user = conversation(random.Random(8), 14)
    prompt = build_prompt(VoicePrompt("v", codes=torch.tensor(voice).T), text)
    reply = generate(lm, [prompt], [user], Sampling(greedy=True))[0]
    dialogue = torch.cat([reply.text[None], reply.codes, user])
    sequence = torch.cat([prompt.frames, dialogue], dim=1)[None]
    mask = torch.ones(1, sequence.shape[2], dtype=torch.bool)
    mask[:, : prompt.frames.shape[1]] = False
    with torch.no_grad():
        hits = TrainingLM(lm, False)(sequence, mask).correct
    frames = user.shape[1]
    assert hits[0] + hits[1] == frames and hits[2] == frames and hits[3:10].tolist() == [frames - 1] * 7


def test_draws_follow_the_seed():
    lm = tiny_lm(8)
    user = conversation(random.Random(1), 10)[2]
    draw = lambda *seed: generate(lm, [None], [user], Sampling(), *seed)[0].codes.tolist()
    assert draw(1) == draw(1) != draw(2) and draw() == draw(0)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(True, 0.5, 0.6, 7, 9)])
def test_sampling_settings_reach_moshi(monkeypatch, sampling):
    given = []

    class Recorded(LMGen):
        def __init__(self, lm, **kwargs):
            given.append(kwargs)
            super().__init__(lm, **kwargs)

    monkeypatch.setattr("finetune.generate.LMGen", Recorded)
    generate(tiny_lm(8), [None], [torch.zeros(8, 1, dtype=torch.int64)], sampling)
    names = ("use_sampling", "temp", "temp_text", "top_k", "top_k_text")
    # The defaults of moshi and of NVIDIA's server; each value differs, so that none can take the place of another.
    expected = (False, 0.5, 0.6, 7, 9) if sampling.greedy else (True, 0.8, 0.7, 250, 25)
    assert tuple(given[0][name] for name in names) == expected


def test_an_exception_once_per_second_ends_the_generation():
    lm = tiny_lm(8)
    user = torch.zeros(8, 40, dtype=torch.int64)
    calls = []
    generate(lm, [None], [user], each_second=lambda: calls.append(lm.dep_q))
    assert len(calls) == 4  # 40 frames are 3.2 s; the first call comes with the first frame

    def stop():
        calls.append(None)
        if len(calls) == 6:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        generate(lm, [None], [user], each_second=stop)
    assert len(calls) == 6
    generate(lm, [None], [user])  # the model can be used again


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_as_before_afterwards(training):
    lm = tiny_lm(DEP_Q).train(training)
    with pytest.raises(InterruptedError), generation_mode(lm):
        assert lm.dep_q == 8 and not lm.training and not lm.depformer.training
        raise InterruptedError
    assert lm.dep_q == 16 and lm.training == lm.depformer.training == training


def test_prompts_with_embeddings_must_have_one_length(tmp_path):
    lm = tiny_lm(DEP_Q)
    prompts = [None]
    for frames in (7, 8):
        voice = [f[1:9] for f in random_frames(random.Random(2), frames)]
        torch.save(Runtime().run([[3, *codes, *SINE_TOKENS] for codes in voice]).save_voice(lm), tmp_path / "v.pt")
        embedded = load_embedded(tmp_path / "v.pt", DELAYS, lambda c: embed(lm, c.view(1, 17, 1))[0, 0])
        prompts.append(build_prompt(embedded, [11]))
    user = torch.zeros(8, 2, dtype=torch.int64)
    for pair in (prompts[:2], prompts[1:]):
        with pytest.raises(ValueError, match="one length"):
            generate(lm, pair, [user, user])
    assert len(generate(lm, [prompts[1]] * 2, [user, user])) == 2


class FrameMimi:
    """Decodes a frame to 1920 samples of the sum of its codes, and needs all frames of a stream one after the other."""

    def parameters(self):
        yield torch.zeros(1)

    @contextmanager
    def streaming(self, size):
        self.size, self.frames = size, 0
        yield

    def decode(self, codes):
        assert codes.shape == (self.size, 8, 1) and torch.is_inference_mode_enabled()
        self.frames += 1
        return (codes.sum(1, keepdim=True).float() + 1000 * self.frames).expand(-1, 1, 1920)


def test_codes_are_decoded_frame_by_frame():
    codes = [torch.randint(1, 100, (8, frames), generator=torch.Generator().manual_seed(0)) for frames in (2, 4, 3)]
    sounds = decode_codes(FrameMimi(), codes)
    for sound, own in zip(sounds, codes, strict=True):
        expected = own.sum(0).numpy() + 1000 * np.arange(1, own.shape[1] + 1)
        assert sound.dtype == np.float32 and np.array_equal(sound, expected.repeat(1920))
