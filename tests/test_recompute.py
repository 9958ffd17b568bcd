"""gradient_checkpointing: auto. How many layers it keeps, against the plan; and that a run is the same without it."""

import mmap
from types import SimpleNamespace

import pytest
import torch
from moshi.models import loaders

from finetune import recompute
from finetune.args import TrainArgs
from finetune.loss import depformer_steps
from finetune.model.pretrained import PERSONAPLEX
from finetune.model.training_lm import TrainingLM
from finetune.tools.plan.sizes import RunSizes
from tests.support import PERSONAPLEX_CODES, rows, train_here, write_config

CONFIG = dict(
    loaders._lm_kwargs, dim=64, num_heads=4, num_layers=3, text_card=400, context=3000, depformer_dim=48,
    depformer_dim_feedforward=192, depformer_num_heads=2, depformer_num_layers=2, dep_q=16,
)  # fmt: skip
PROMPT_SEC, WINDOW_SEC = 4.0, 16.0


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("settings", [{}, {"user_audio_loss_weight": 0.0}], ids=str)
def test_layers_that_fit_do_by_the_plan(settings, device):
    args = TrainArgs.model_validate({
        "data": {"train_data": "t"}, "run_dir": "r", "lora": {"enable": True, "rank": 4}, "batch_size": 2,
        "duration_sec": WINDOW_SEC, "prompt": {"max_sec": PROMPT_SEC}, "gradient_checkpointing": "auto",
        "device": device, **settings,
    })  # fmt: skip
    sizes = RunSizes(args, CONFIG, True)
    peak = lambda layers: sizes.step(2, layers or True).peak
    rows, audio_rows = 2 * (sizes.frames + sizes.prompt_frames), 2 * sizes.frames
    steps = depformer_steps(args, 16)
    fit = lambda room: recompute.layers_that_fit(sizes.lm, room, torch.bfloat16, rows, audio_rows, steps)
    for room in torch.linspace(0, 1.5 * (peak(sizes.layers) - peak(0)), 20).long().tolist():
        assert peak(fit(room)) <= peak(0) + 1.01 * room + 2000
    assert fit(room) == sizes.layers, "no memory is left unused"
    layers = len(sizes.lm.lm.transformer.layers)
    assert fit(1.02 * (peak(layers) - peak(0))) >= layers - 1


@pytest.mark.parametrize("room_gb", [0.0, 0.01, 100.0])
def test_a_run_with_auto_equals_one_that_recomputes(world, tmp_path, monkeypatch, caplog, room_gb):
    """Whatever memory there is; the first two steps recompute everything."""
    monkeypatch.setattr(recompute, "memory_of", lambda *_: (10**9, 10**9, int((1 + room_gb) * 1e9)))
    kept, found = [], {}
    forward = TrainingLM.forward

    def watched(self, *args, **kwargs):
        kept.append(self.gradient_checkpointing)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(TrainingLM, "forward", watched)
    for value in ("true", "auto"):
        (tmp_path / value).mkdir()
        config = write_config(tmp_path / value, world, PERSONAPLEX_CODES, **{"do_eval": False, "max_steps": 4})
        kept.clear()
        assert train_here(config, PERSONAPLEX, (f"gradient_checkpointing={value}",)) == 0
        found[value] = [(r["loss"], r["grad_norm"], r.get("tflops")) for r in rows(tmp_path / value / "run")]
    assert [row[:2] for row in found["auto"]] == [row[:2] for row in found["true"]]
    first, second, *later = kept
    assert first is second is True and len(set(later)) == 1
    if room_gb:
        assert later[0] is not True and (room_gb < 1 or later[0] > 2), "all layers of both transformers"
    else:
        assert later[0] is True


def test_the_memory_of_this_process():
    used, peak, limit = recompute.memory_of(torch.device("cpu"), 1)
    block = mmap.mmap(-1, 2**28)  # new memory, also where the allocator has some to spare
    for page in range(0, 2**28, mmap.PAGESIZE):
        block[page] = 1
    more, higher, _ = recompute.memory_of(torch.device("cpu"), 1)
    assert 2**27 < used <= peak and more > used + 2**27 and higher >= more and limit > used
    assert recompute.memory_of(torch.device("cpu"), 4)[2] < limit
    block.close()


def test_what_was_chosen_stays():
    """Also when a rollback has set the steps of the run back: the peak would now include what is kept."""
    run = SimpleNamespace(
        args=SimpleNamespace(gradient_checkpointing="auto"), model=SimpleNamespace(gradient_checkpointing=3),
        world=SimpleNamespace(device=torch.device("cpu")),
    )  # fmt: skip
    for steps in (1, 2):
        recompute.choose_layers(run, steps, [])
    assert run.model.gradient_checkpointing == 3
