"""Training, evaluation and replies on a device that is not the CPU: no tensor is left behind, and the host waits for
the device once in a step."""

import contextlib
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from moshi.utils.compile import no_compile, no_cuda_graph
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from finetune import evaluate, loop, step
from finetune.args import TrainArgs
from finetune.audio import codec
from finetune.data.batch import Sample, TextStats, collate
from finetune.distributed import World
from finetune.generate import decode_codes, generate
from finetune.loss import depformer_steps, group_weights, loss_scales
from finetune.model import targets as targets_module
from finetune.model.build import make_trainable
from finetune.model.training_lm import TrainingLM
from finetune.optim import Schedule, build_optimizer
from finetune.prompts.hybrid import SystemPrompt
from finetune.tools.toy.mimi import make_mimi
from tests.accelerator import DEVICE, Accelerator
from tests.engine import DELAYS, random_frames, tiny_lm

PROMPT, FRAMES = 5, 4


@pytest.fixture
def accelerator(monkeypatch):
    return Accelerator(monkeypatch)


def sample(position, embeddings=False):
    codes = torch.tensor(random_frames(random.Random(position), PROMPT + FRAMES)).T
    codes[0, ::2] = 3
    mask = torch.arange(codes.shape[1]) >= PROMPT
    return Sample(codes, mask, torch.zeros(PROMPT - 1, 32) if embeddings else None, f"w{position}", TextStats())


def make_run(accelerator, **settings):
    """What a training step works on, with the model on the accelerator."""
    base = {
        "data": {"train_data": "t"}, "run_dir": "r", "batch_size": 2, "max_steps": 9, "log_freq": 2,
        "lora": {"enable": True, "rank": 4},
    }  # fmt: skip
    args = TrainArgs.model_validate(base | settings)
    lm = tiny_lm(16)
    if args.base_dtype != "bf16":
        lm = lm.to("meta")
    make_trainable(lm, args)
    model = accelerator.move(TrainingLM(lm, args.recomputation))
    model.set_requires_gradient_sync = lambda _: None  # of FSDP
    with accelerator.on():
        optimizer = build_optimizer(lm, args.optim)
    return SimpleNamespace(
        args=args, model=model, world=World(0, 1, 0, 1, DEVICE), optimizer=optimizer, problems=set(), saved_at=0.0,
        progress=SimpleNamespace(step=0, position=0, skipped=0, bad_steps=0), stop=SimpleNamespace(signal=None),
        weights=accelerator.host(group_weights(args, 16)), depformer_steps=depformer_steps(args, 16),
        windows_per_step=2, rate_factor=Schedule.of(args.optim, args.max_steps).at,
    )  # fmt: skip


def train_step(run, stream):
    """As in finetune.loop.train."""
    batches, _, counts, requests = step.read_step(run, stream)
    scale = loss_scales(counts, run.weights.to(run.world.device, non_blocking=True))
    own = step.compute_gradients(run, batches, scale, run.progress.step)
    return step.update(run, batches, own, scale, requests)


@pytest.mark.parametrize("settings", [
    {},
    {"gradient_checkpointing": False},
    {"gradient_checkpointing": 3},
    {"full_finetuning": True, "lora": {}, "user_audio_loss_weight": 0.0},
    {"lora": {"enable": True, "rank": 4, "depformer_rank": 0, "drift_weight": 0.5}},
    {"base_dtype": "nf4"},
    {"base_dtype": "int8"},
    {"audio_loss_weight": 0.0},
    {"param_dtype": "float32", "deterministic": True},
], ids=str)  # fmt: skip
def test_a_training_step_waits_once(accelerator, monkeypatch, settings):
    run = make_run(accelerator, **settings)
    # With and without the embeddings of a .pt voice.
    on_host = [collate([sample(2 * i, i == 1), sample(2 * i + 1)], [], DELAYS, 16) for i in range(2)]
    batches = accelerator.host(on_host)
    # Which frames measure the drift is decided on the host, from values that fakes do not have.
    real = {id(fake.targets): batch.targets for fake, batch in zip(batches, on_host)}

    def sample_rows(targets, *where):
        with unset_fake_temporarily():
            return accelerator.host(targets_module.sample_rows(real[id(targets)], *where))

    monkeypatch.setattr(step, "sample_rows", sample_rows)
    with accelerator.on():
        sums, norms, _ = train_step(run, iter(batches))
        assert accelerator.waits == ["read"], "of the loss, the norm and the requests together"
        assert sums.device == DEVICE and norms.keys() == {"grad_norm"}
        _, norms, _ = train_step(run, iter(batches[1:]))  # which is logged
        assert accelerator.waits == ["read"] * 2 and len(norms) > 1
    trained = [p for p in run.model.parameters() if p.requires_grad]
    state = run.optimizer.state
    assert trained and all(state[p]["exp_avg"].device == DEVICE for p in trained if p in state)


def test_a_row_of_metrics_is_made_on_the_host(accelerator, monkeypatch):
    """Also of the drift."""
    run = make_run(accelerator, lora={"enable": True, "rank": 4, "drift_weight": 0.5})
    rows = []
    run.metrics = SimpleNamespace(write=lambda kind, step, row: rows.append(row))
    run.meter = SimpleNamespace(rates=lambda rate: {})
    run.clock = SimpleNamespace(add_row=lambda *_: None)
    monkeypatch.setattr(loop, "peak_memory_gb", lambda device: 0.0)
    monkeypatch.setattr(loop, "console_line", lambda *_: "")
    monkeypatch.setattr(loop, "report_totals", lambda *_: {"interval_sec": 1.0})
    with accelerator.on():
        sums, counts = torch.zeros(3, 18, device=DEVICE), torch.zeros(18, dtype=torch.int64, device=DEVICE)
        loop.log_step(run, sums, counts, {"grad_norm": 1.0}, torch.ones(10, dtype=torch.float64))
    (row,) = rows
    assert {"loss", "agent_loss", "text_loss", "drift"} <= row.keys()


def test_an_evaluation_waits_at_its_end(accelerator, monkeypatch):
    run = make_run(accelerator)
    monkeypatch.setattr(evaluate, "loss_report", lambda *tensors: {"loss": [tensor.cpu() for tensor in tensors]})
    monkeypatch.setattr(World, "gather", lambda _, value: [value])
    waits = []
    for count in (2, 5):
        batches = [accelerator.host(collate([sample(i)], [], DELAYS, 16)) for i in range(count)]
        accelerator.waits.clear()
        with accelerator.on():
            row, _ = evaluate.evaluate(run.model, batches, run.weights, run.world)
        assert row["samples"]
        waits.append(len(accelerator.waits))
    assert waits[0] == waits[1] <= 5


@pytest.mark.parametrize(("settings", "embeddings"), [({}, True), ({"base_dtype": "nf4"}, False)], ids=str)
def test_replies_wait_at_their_end(accelerator, settings, embeddings):
    run = make_run(accelerator, **settings)
    prompt = torch.tensor(random_frames(random.Random(0), PROMPT)).T
    prompts = [SystemPrompt(prompt, torch.zeros(PROMPT - 1, 32) if embeddings else None)] * 2
    users = [torch.zeros(8, FRAMES + i, dtype=torch.int64) for i in range(2)]
    prompts, users = accelerator.host(prompts), accelerator.host(users)
    with accelerator.on(), no_compile():
        replies = generate(run.model.lm, prompts, users)
    assert [reply.codes.shape for reply in replies] == [(8, FRAMES), (8, FRAMES + 1)]
    uploads = ["copy to lazy"] * (4 + embeddings)
    assert accelerator.waits == [*uploads, "copy to cpu"], "whatever the length of the replies"


def test_sound_is_encoded_and_decoded(accelerator, monkeypatch):
    """Frame by frame; codes and sound are fetched at the end."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it knows real devices only
    monkeypatch.setattr(FakeTensor, "numpy", lambda sound: np.zeros(sound.shape), raising=False)
    mimi = make_mimi(0)
    mimi.set_num_codebooks(8)
    accelerator.move(mimi)
    [codes] = accelerator.host([torch.zeros(8, 5, dtype=torch.int64)])
    with accelerator.on(), no_compile(), no_cuda_graph():
        frame = torch.zeros(2, 1, 1920, device=DEVICE)
        with mimi.streaming(2):
            made = [codec._encode_frame(mimi, frame, None) for _ in range(2)]
        [sound] = decode_codes(mimi, [codes])
    assert made[0].device == DEVICE and made[0].shape == (2, 8) and sound.shape == (5 * 1920,)
    assert accelerator.waits == ["copy to lazy"], "of all codes together"
