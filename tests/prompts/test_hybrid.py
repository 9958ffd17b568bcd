"""Hybrid system prompts: the model is trained on the inputs that the runtime feeds it."""

import itertools
import random

import pytest
import torch
from moshi.utils.compile import no_compile
from torch.nn import functional as F

from finetune.model.training_lm import TrainingLM
from finetune.prompts.embedded import load_embedded
from finetune.prompts.hybrid import VoicePrompt, build_prompt, prompt_length
from tests.engine import (
    DELAYS,
    Runtime,
    embed,
    embedder,
    engine_frames,
    our_inputs,
    random_frames,
    random_voice,
    save_voice,
    tiny_lm,
)


@pytest.mark.parametrize("seed", range(40))
def test_prompt_inputs_equal_the_runtimes(seed):
    rng = random.Random(seed)
    voice = random_voice(rng, rng.choice([0, 1, 2, rng.randint(3, 200)]))
    text = [rng.randrange(4, 60) for _ in range(rng.choice([0, 1, rng.randint(2, 200)]))]
    dialogue = random_frames(rng, rng.randint(2, 60))
    prompt = build_prompt(VoicePrompt("v", codes=torch.tensor(voice).T) if voice else None, text)
    sequence = torch.cat([prompt.frames, torch.tensor(dialogue).T], dim=1)
    assert our_inputs(sequence) == Runtime().run(engine_frames(voice, text, dialogue)).inputs
    assert prompt.embeddings is None and prompt.frames.shape[1] == prompt_length(len(voice), len(text))


@pytest.mark.parametrize("length", [4, 5, 6, 7, 60])
def test_prompt_inputs_of_an_embedded_voice_equal_the_runtimes(length, tmp_path):
    rng = random.Random(length)
    lm = tiny_lm(16)
    voice, dialogue, text = random_voice(rng, length), random_frames(rng, 9), [11, 12, 13]
    columns = torch.tensor(Runtime().run(engine_frames(voice, text, dialogue)).inputs).T[None]

    loaded = load_embedded(save_voice(tmp_path / "v.pt", lm, voice), DELAYS, embedder(lm))
    prompt = build_prompt(loaded, text)
    assert loaded.frames == length and len(prompt.embeddings) == length - 1
    assert prompt.frames.shape[1] == prompt_length(length, 3)
    assert (prompt.frames[:, : length - 4] == -1).all(), "frames that are unknown embed to nothing"
    ours = torch.tensor(our_inputs(torch.cat([prompt.frames, torch.tensor(dialogue).T], dim=1)))
    inputs = embed(lm, ours.T[None].clamp(min=-1))
    inputs[:, : length - 1] = prompt.embeddings
    assert torch.equal(inputs, embed(lm, columns))
    assert torch.equal(ours[length - 1 :], columns[0].T[length - 1 :]), "tokens after the embeddings"


@pytest.mark.parametrize("with_embeddings", [False, True])
def test_teacher_forcing_equals_streaming(with_embeddings, tmp_path):
    """Cross-entropy of each dialogue frame: our training forward against moshi's stack stepping column by column."""
    rng = random.Random(5)
    lm = tiny_lm(16)
    voice, dialogue, text = random_voice(rng, 12), random_frames(rng, 10), [11, 12, 13, 14]
    columns = torch.tensor(Runtime().run([*engine_frames(voice, text, dialogue), [0] * 17]).inputs)
    streamed = []
    with torch.no_grad(), lm.streaming(1), no_compile():
        for column, following in itertools.pairwise(columns):
            out, text_logits = lm.forward_text(column.view(1, 17, 1))
            losses = [F.cross_entropy(text_logits[0, 0], following[:1])]
            with lm.depformer.streaming(1):
                for k in range(16):
                    logits = lm.forward_depformer(k, following[k].view(1, 1, 1), out)
                    losses.append(F.cross_entropy(logits[0, 0], following[k + 1 : k + 2], ignore_index=2048))
            streamed.append(torch.stack(losses))
    streamed = torch.stack(streamed)  # [columns, 17], column t predicts column t + 1

    source, embedded = VoicePrompt("v", codes=torch.tensor(voice).T), ()
    if with_embeddings:
        source = load_embedded(save_voice(tmp_path / "v.pt", lm, voice), DELAYS, embedder(lm))
        embedded = (source.embeddings[None], torch.tensor([len(source.embeddings)]))
    prompt = build_prompt(source, text)
    sequence = torch.cat([prompt.frames, torch.tensor(dialogue).T], dim=1)[None]
    model = TrainingLM(lm, gradient_checkpointing=False)
    for frame in range(prompt.frames.shape[1], sequence.shape[2] - 1):
        mask = torch.zeros(1, sequence.shape[2], dtype=torch.bool)
        mask[0, frame] = True
        with torch.no_grad():
            ce = model(sequence, mask, *embedded).ce
        expected = torch.stack([streamed[frame + DELAYS[k], k] for k in range(17)])
        assert torch.allclose(ce[0] + ce[1], expected[0], atol=1e-4)
        assert torch.allclose(ce[2:], expected[1:], atol=1e-4)
