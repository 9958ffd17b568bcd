"""Evaluation: losses over all windows of all ranks, and replies to held-out users."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from moshi.models import LMGen
from moshi.utils.compile import no_compile
from torch.distributed.fsdp import FSDPModule

import finetune.evaluate
from finetune.cli import UserError
from finetune.data.batch import Sample, TextStats, collate
from finetune.distributed import World, make_mesh, session, shard
from finetune.evaluate import evaluate, free_run, judge_replies, refuse_unreadable
from finetune.generate import Reply
from finetune.model.training_lm import TrainingLM
from tests.engine import DELAYS, random_frames, tiny_lm


@pytest.fixture(autouse=True)
def not_compiled():
    """moshi would compile its norms and gatings on first use, which takes long."""
    with no_compile():
        yield


def sample(seed, frames=12, prompt=0, embeddings=None, **fields):
    rng = random.Random(seed)
    codes = torch.tensor(random_frames(rng, prompt + frames)).T
    codes[0, ::3] = 3  # padding
    mask = torch.arange(prompt + frames) >= prompt
    return Sample(codes, mask, embeddings, f"call{seed}.wav at 0.00 s", TextStats(), **fields)


class SeveralRanks(World):
    """The main rank, with the results of other ranks at hand."""

    def set(self, totals, windows, problems):
        self.__dict__["others"] = iter([totals, windows])
        self.__dict__["problems"] = problems
        return self

    def sum(self, tensor):
        return tensor + next(self.others)

    def gather(self, value):
        return [value, *self.problems]


def one_rank():
    none = torch.zeros(())
    return SeveralRanks(0, 1, 0, 1, torch.device("cpu")).set(none, none, [])


@pytest.fixture(scope="module")
def lm():
    return TrainingLM(tiny_lm(16), gradient_checkpointing=False)


WEIGHTS = torch.tensor([1.0, 0.5, *([3.0] + [1.0] * 7) * 2], dtype=torch.float64)


# --- losses --------------------------------------------------------------------------------------------------------


def test_losses_do_not_depend_on_the_batches(lm):
    samples = [sample(seed, frames) for seed, frames in enumerate((12, 7, 9, 5))]
    batches = lambda *sizes: [collate(group, [], DELAYS, 16) for group in sizes]
    whole, _ = evaluate(lm, batches(samples), WEIGHTS, one_rank())
    parts, problems = evaluate(lm, batches(samples[:1], samples[1:]), WEIGHTS, one_rank())
    assert whole.keys() == parts.keys() and problems == []
    assert parts == pytest.approx(whole, rel=1e-5) and whole["samples"] == 4 and whole["skipped"] == 0
    assert 0.3 < whole["text_loss"] < 20 and whole["loss"] == whole["text_loss"] + whole["audio_loss"]
    assert not any(parameter.grad is not None for parameter in lm.parameters())


def test_losses_are_those_of_all_ranks(lm):
    """As if the other rank's windows had been batches of this one, including what it has skipped."""
    samples = [sample(seed, frames) for seed, frames in enumerate((12, 7, 9))]
    with torch.no_grad():
        other = collate(samples[1:], [], DELAYS, 16)
        out = lm(other.codes, other.loss_mask)
    totals = torch.stack([out.ce.double(), out.correct.double(), other.counts.double()])
    world = one_rank().set(totals, torch.tensor([2.0, 3.0, 1.0]), [["b", "a"], ["c"]])
    samples[0].voiceless = True
    first = collate(samples[:1], ["a"], DELAYS, 16)
    row, problems = evaluate(lm, [first], WEIGHTS, world)
    expected, _ = evaluate(lm, [collate(samples, [], DELAYS, 16)], WEIGHTS, one_rank())
    assert row.pop("samples") == expected.pop("samples") == 3
    assert row.pop("skipped") == 4 and expected.pop("skipped") == 0 and problems == ["a", "b", "c"]
    assert row.pop("share_without_voice") == 2 / 3 and expected.pop("share_without_voice") == 1 / 3
    assert row == pytest.approx(expected, rel=1e-5)


def test_sums_are_more_precise_than_float32():
    """2 ** 24 and 1 more: what a long held-out set adds up to."""
    counts = torch.full((18,), 2**24, dtype=torch.int64)
    moved = SimpleNamespace(codes=0, loss_mask=0, embeddings=0, lengths=0, targets=0)
    batch = SimpleNamespace(to=lambda device: moved, counts=counts, names=["a"], problems=[], voiceless=0)
    out = SimpleNamespace(ce=counts.float(), correct=counts.float())
    few = SimpleNamespace(ce=torch.ones(18), correct=torch.ones(18))
    outs = iter([out, few])
    batches = [batch, SimpleNamespace(**vars(batch) | {"counts": torch.ones(18, dtype=torch.int64)})]
    row, _ = evaluate(lambda *_, **__: next(outs), batches, torch.ones(18), one_rank())
    assert row["text_word_loss"] == row["text_word_accuracy"] == 1.0


def test_an_evaluation_without_windows_has_no_loss(lm):
    nothing = {"samples": 0, "skipped": 0, "share_without_voice": 0.0}
    assert evaluate(lm, [], WEIGHTS, one_rank()) == (nothing, [])


def test_an_exception_after_a_batch_ends_the_evaluation(lm):
    read = []

    def batches():
        for seed in range(3):
            read.append(seed)
            yield collate([sample(seed)], [], DELAYS, 16)

    def stop():
        if len(read) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        evaluate(lm, batches(), WEIGHTS, one_rank(), stop)
    assert read == [0, 1]


def test_held_out_data_that_cannot_be_read_are_refused():
    refuse_unreadable({"samples": 1}, ["a.pt: gone"])
    refuse_unreadable({"samples": 0}, [])
    with pytest.raises(UserError, match=r"held-out(.|\n)*a\.pt: gone"):
        refuse_unreadable({"samples": 0}, ["a.pt: gone"])


# --- replies -------------------------------------------------------------------------------------------------------


@pytest.fixture
def generated(monkeypatch):
    """What `generate` is asked for; its replies are numbered texts."""
    calls = []

    def generate(lm, prompts, users, **keywords):
        calls.append((prompts, users, keywords))
        return [
            Reply(torch.full(user.shape[1:], len(prompt.frames[0])), user + 1) for prompt, user in zip(prompts, users)
        ]

    monkeypatch.setattr(finetune.evaluate, "generate", generate)
    return calls


def test_the_users_of_the_samples_are_heard_after_their_prompts(lm, generated):
    samples = [sample(1, frames=30, prompt=9), sample(2, frames=10, prompt=6)]
    check = lambda: None
    conversations = free_run(lm, samples, max_sec=1.3, seed=5, each_second=check)
    [(prompts, users, keywords)] = generated
    assert keywords == {"seed": 5, "each_second": check}
    for given, prompt, user, (kept, reply), length in zip(samples, prompts, users, conversations, (9, 6), strict=True):
        assert torch.equal(prompt.frames, given.codes[:, :length]) and prompt.embeddings is None
        # The user's 8 streams, not the agent's: 1.3 s are 16 frames.
        assert torch.equal(user, given.codes[9:, length : length + 16]) and user.shape[1] == min(
            16, len(given.loss_mask) - length
        )
        assert torch.equal(kept, user) and torch.equal(reply.codes, user + 1)


def test_samples_are_grouped_by_the_length_of_their_embeddings(lm, generated):
    lengths = [None, 3, 5, 3, None]
    samples = [
        sample(i, prompt=6 + i, embeddings=None if length is None else torch.rand(length, 32))
        for i, length in enumerate(lengths)
    ]
    conversations = free_run(lm, samples, 9.0, seed=0)
    sizes = [[None if p.embeddings is None else len(p.embeddings) for p in prompts] for prompts, _, _ in generated]
    assert sorted(sizes, key=str) == [[3, 3], [5], [None, None]]
    for i, (given, (user, reply)) in enumerate(zip(samples, conversations, strict=True)):
        assert torch.equal(user, given.codes[9:, 6 + i :]) and reply.text[0] == 6 + i, "in the order of the samples"


@pytest.mark.parametrize("fails", [False, True])
def test_a_sharded_model_is_gathered_for_the_replies_and_sharded_again(monkeypatch, fails):
    with session("cpu") as world:
        model = TrainingLM(tiny_lm(16), gradient_checkpointing=False)
        shard(model, list(model.lm.transformer.layers), make_mesh(world, "full"), torch.float32)
        calls, kept = [], FSDPModule.set_reshard_after_forward
        layer, step = model.lm.transformer.layers[0], LMGen.step
        record = lambda module, value, recurse: (
            calls.append((module is model, value, recurse)),
            kept(module, value, recurse),
        )
        monkeypatch.setattr(FSDPModule, "set_reshard_after_forward", record)
        whole = []

        def recorded_step(stepper, codes):
            whole.append(not hasattr(layer.norm1.alpha, "full_tensor"))
            return step(stepper, codes)

        def stop():
            if fails:
                raise InterruptedError

        monkeypatch.setattr(LMGen, "step", recorded_step)
        try:
            reply = free_run(model, [sample(1, frames=4)], 9.0, 0, stop)[0][1]
            assert not fails and reply.codes.shape == (8, 4) and len(whole) > 4
        except InterruptedError:
            assert fails
        assert whole and all(whole), "no step gathers parameters"
        assert hasattr(layer.norm1.alpha, "full_tensor"), "sharded again"
        # Layers give their parameters back after the forward pass, the whole model does not.
        assert calls[:3] == [(True, False, False), (False, False, False), (False, False, False)]
        assert sorted(calls[3:]) == [(False, True, False), (False, True, False), (True, False, False)]


SECOND = 24_000


@pytest.fixture
def judged(monkeypatch, tmp_path):
    """Two conversations: a loud agent with a quiet user, and a silent agent with a loud user."""
    rng = np.random.default_rng(0)
    sounds = {0: np.zeros(SECOND), 1: 0.3 * rng.standard_normal(SECOND), 2: 0.05 * rng.standard_normal(SECOND)}
    decoded = []

    def decode(mimi, codes):
        decoded.append(mimi)
        return [sounds[int(own[0, 0])].astype(np.float32) for own in codes]

    monkeypatch.setattr(finetune.evaluate, "decode_codes", decode)
    constant = lambda value: torch.full((8, 12), value)
    text = torch.full((12,), 3)
    conversations = [(constant(2), Reply(text, constant(1))), (constant(1), Reply(text, constant(0)))]
    samples = [sample(1, prompt_ids=[5, 6], voice="ada.wav"), sample(2)]
    pieces = SimpleNamespace(decode=lambda ids: "+".join(map(str, ids)), vocab_size=lambda: 60)
    measures, warning = judge_replies(conversations, samples, "mimi", pieces, tmp_path / "samples/step_000004")
    assert decoded == ["mimi", "mimi"]
    return measures, warning, tmp_path / "samples/step_000004", sounds


def test_conversations_are_written_with_the_agent_on_the_left_and_the_user_on_the_right(judged):
    import sphn

    _, _, folder, sounds = judged
    assert {path.name for path in folder.iterdir()} == {"00.wav", "00.json", "01.wav", "01.json"}
    for name, agent, user in (("00.wav", 1, 2), ("01.wav", 0, 1)):
        pcm, rate = sphn.read(str(folder / name))
        assert rate == SECOND
        np.testing.assert_allclose(pcm, np.stack([sounds[agent], sounds[user]]).clip(-1, 1), atol=1e-4)


def test_measures_are_pooled_and_written_for_each_conversation(judged):
    measures, warning, folder, _ = judged
    first, second = (json.loads((folder / f"{i:02d}.json").read_text()) for i in (0, 1))
    assert (first["of"], first["prompt"], first["voice"]) == ("call1.wav at 0.00 s", "5+6", "ada.wav")
    assert (second["of"], second["prompt"], second["voice"]) == ("call2.wav at 0.00 s", "", None)
    assert first["text"] == [] and first["measures"]["silence"] < 0.2 and second["measures"]["silence"] == 1.0
    assert all(key.startswith("free_") for key in measures) and measures["free_replies"] == 2
    pooled = (first["measures"]["silence"] + second["measures"]["silence"]) / 2
    assert measures["free_silence"] == pytest.approx(pooled) and measures["free_words_per_minute"] == 0
    assert warning.startswith("wordless")
