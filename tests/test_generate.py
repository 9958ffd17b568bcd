"""Free-running generation feeds the model what training fed it, forces prompts, and listens to the user."""

import random

import pytest
import torch

from finetune.generate import Sampling, generate
from finetune.model.training_lm import TrainingLM
from finetune.prompts.embedded import load_embedded
from finetune.prompts.hybrid import VoicePrompt, build_prompt
from finetune.streams import DEP_Q, SINE_TOKENS
from tests.engine import DELAYS, Runtime, embed, engine_frames, random_frames, tiny_lm


def conversation(rng, frames):
    voice = [f[1:9] for f in random_frames(rng, 7)]
    return voice, [11, 12, 13], torch.tensor(random_frames(rng, frames)).T[9:]


def greedy_by_runtime(lm, voice, text, user):
    """The reply of the independent runtime: greedy tokens in the free places, column by column, over moshi's stack."""
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
def test_replies_are_the_runtimes(embedded, tmp_path):
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


def test_a_batch_gives_each_its_own_reply():
    lm = tiny_lm(DEP_Q)
    rng = random.Random(4)
    conversations = [conversation(rng, frames) for frames in (12, 5, 9)]
    voice = lambda codes: VoicePrompt("v", codes=torch.tensor(codes).T)
    prompts = [build_prompt(voice(v), t + [14] * i) for i, (v, t, _) in enumerate(conversations)]
    prompts[1] = None
    users = [u for _, _, u in conversations]
    together = generate(lm, prompts, users, Sampling(greedy=True))
    for prompt, user, reply in zip(prompts, users, together):
        alone = generate(lm, [prompt], [user], Sampling(greedy=True))[0]
        assert reply.codes.shape == user.shape and torch.equal(alone.codes, reply.codes)
        assert torch.equal(alone.text, reply.text)


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


def test_sampling_follows_the_seed():
    lm = tiny_lm(8)
    user = conversation(random.Random(1), 10)[2]
    draw = lambda seed: generate(lm, [None], [user], seed=seed)[0].codes.tolist()
    assert draw(1) == draw(1) != draw(2)
