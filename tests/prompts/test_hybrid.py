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
from finetune.streams import stack_streams
from tests.engine import DELAYS, Runtime, embed, engine_frames, our_inputs, random_frames, tiny_lm, voice_frames


@pytest.mark.parametrize("seed", range(40))
def test_prompt_inputs_equal_the_runtimes(seed):
    rng = random.Random(seed)
    voice = [f[1:9] for f in random_frames(rng, rng.choice([0, 1, 2, rng.randint(3, 200)]))]
    text = [rng.randrange(4, 60) for _ in range(rng.choice([0, 1, rng.randint(2, 200)]))]
    dialogue = random_frames(rng, rng.randint(2, 60))
    expected = Runtime().run(engine_frames(voice, text, dialogue)).inputs

    voice_codes = torch.tensor(voice, dtype=torch.long).reshape(len(voice), 8).T
    prompt = build_prompt(VoicePrompt("v", codes=voice_codes) if voice else None, text)
    frames = torch.tensor(dialogue).T
    sequence = torch.cat([prompt.frames, stack_streams(frames[0].tolist(), frames[1:9], frames[9:])], dim=1)
    assert prompt.embeddings is None
    assert our_inputs(sequence) == expected
    assert prompt.frames.shape[1] == prompt_length(len(voice), len(text))


def test_keeping_the_first_frame_would_be_wrong():
    rng = random.Random(1)
    dialogue = random_frames(rng, 5)
    frames = engine_frames([f[1:9] for f in random_frames(rng, 20)], [7, 8], dialogue)
    expected = Runtime().run(frames).inputs
    wrong = our_inputs(torch.tensor(frames).T)
    assert sum(a != b for a, b in zip(wrong, expected)) > 20


def load_saved(path, lm, voice):
    """A voice that the runtime saved as a .pt, loaded."""
    torch.save(Runtime().run(voice_frames(voice)).save_voice(lm), path)
    return load_embedded(path, DELAYS, lambda column: embed(lm, column.view(1, 17, 1))[0, 0].detach())


@pytest.mark.parametrize("length", [4, 5, 6, 7, 8, 60, 173])
def test_prompt_inputs_of_an_embedded_voice_equal_the_runtimes(length, tmp_path):
    rng = random.Random(length)
    lm = tiny_lm(16)
    voice = [f[1:9] for f in random_frames(rng, length)]
    dialogue, text = random_frames(rng, 9), [11, 12, 13]
    columns = torch.tensor(Runtime().run(engine_frames(voice, text, dialogue)).inputs).T[None]

    loaded = load_saved(tmp_path / "v.pt", lm, voice)
    prompt = build_prompt(loaded, text)
    sequence = torch.cat([prompt.frames, torch.tensor(dialogue).T], dim=1)
    assert loaded.frames == length and len(prompt.embeddings) == length - 1
    assert prompt.frames.shape[1] == prompt_length(length, 3)
    assert (prompt.frames[:, : length - 4] == -1).all(), "frames that are unknown embed to nothing"
    ours = torch.tensor(our_inputs(sequence))
    inputs = embed(lm, ours.T[None].clamp(min=-1))
    inputs[:, : length - 1] = prompt.embeddings
    assert torch.equal(inputs, embed(lm, columns))
    assert ours[length - 1 :].tolist() == columns[0].T[length - 1 :].tolist(), "tokens after the embeddings"


@pytest.mark.parametrize("with_embeddings", [False, True])
def test_teacher_forcing_equals_streaming(with_embeddings, tmp_path):
    """Cross-entropy of each dialogue frame: our training forward against moshi's stack stepping column by column."""
    rng = random.Random(5)
    lm = tiny_lm(16)
    voice = [f[1:9] for f in random_frames(rng, 12)]
    dialogue, text = random_frames(rng, 10), [11, 12, 13, 14]
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

    source = VoicePrompt("v", codes=torch.tensor(voice).T)
    if with_embeddings:
        source = load_saved(tmp_path / "v.pt", lm, voice)
    prompt = build_prompt(source, text)
    sequence = torch.cat([prompt.frames, torch.tensor(dialogue).T], dim=1)[None]
    model = TrainingLM(lm, gradient_checkpointing=False)
    embeddings = None if prompt.embeddings is None else prompt.embeddings[None]
    lengths = None if prompt.embeddings is None else torch.tensor([len(prompt.embeddings)])
    start = prompt.frames.shape[1]
    for frame in range(start, sequence.shape[2] - 1):
        mask = torch.zeros(1, sequence.shape[2], dtype=torch.bool)
        mask[0, frame] = True
        with torch.no_grad():
            ce = model(sequence, mask, embeddings, lengths).ce
        expected = torch.stack([streamed[frame + DELAYS[k], k] for k in range(17)])
        assert torch.allclose(ce[0] + ce[1], expected[0], atol=1e-4)
        assert torch.allclose(ce[2:], expected[1:], atol=1e-4)
