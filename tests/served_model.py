"""A tiny model with random weights, loud enough that its codes and its greedy tokens follow every input."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from moshi.models import LMModel
from safetensors.torch import save_file

from finetune.model import training_lm
from finetune.model.layout import fuse
from finetune.model.training_lm import TrainingLM
from tests.audio import tiny_mimi
from tests.support import write_wav

CONTEXT = 140
USER_FRAMES = 150
_OLDER_NAMES = {".in_projs.0.weight": ".in_proj_weight", ".out_projs.0.weight": ".out_proj.weight"}
_SMALL = {
    "dim": 64, "num_heads": 4, "num_layers": 2, "depformer_dim": 32, "depformer_num_heads": 2,
    "depformer_num_layers": 2, "depformer_dim_feedforward": 66,
}  # fmt: skip


def make_served_model(folder: Path, world: Path, dep_q: int) -> Path:
    """Write a model in the layout of the published ones, Mimi's names included.

    Its Mimi attends to 1 s, and its temporal transformer to CONTEXT frames.
    """
    folder.mkdir(parents=True)
    config = json.loads((world / "model/config.json").read_text()) | _SMALL | {"dep_q": dep_q, "context": CONTEXT}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mimi_config.json").write_text(json.dumps(tiny_mimi.CONFIG))
    shutil.copy(world / "model/tokenizer.model", folder)
    names = ("model_type", "moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name")
    torch.manual_seed(0)
    lm = LMModel(device="cpu", dtype=torch.float32, **{k: v for k, v in config.items() if k not in names})
    for parameter in lm.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    save_file(fuse(lm.state_dict(), dep_q), folder / "model.safetensors")
    mimi = tiny_mimi.make_mimi(near_ties=False)
    for name, parameter in mimi.named_parameters():
        if "layer_scale" in name:
            parameter.data.fill_(1)
    state = {}
    for name, tensor in mimi.state_dict().items():
        for new, old in _OLDER_NAMES.items():
            name = name.replace(new, old)
        state[name] = tensor
    save_file(state, folder / "mimi.safetensors")
    return folder


def noise(channels: int, length: int, seed: int) -> np.ndarray:
    """Noise [channels, length] whose spectrum and loudness change with every frame."""
    rng = np.random.default_rng(seed)
    frames = rng.standard_normal((channels, length // 1920 + 1, 1920))
    shaped = [[np.convolve(own, rng.standard_normal(30), "same") for own in channel] for channel in frames]
    shaped *= rng.uniform(0, 1, (*frames.shape[:2], 1)) ** 2
    return (shaped / np.abs(shaped).max()).reshape(channels, -1)[:, :length]


def write_calls(folder: Path, length: int, voice: str) -> Path:
    """Write a call of `length` samples, a user of USER_FRAMES, and a voice of 2 s at 24 and at 44.1 kHz.

    Returns the manifest of the call, whose voice prompt is `voice`.
    """
    write_wav(folder / "call.wav", noise(2, length, 0), 24_000)
    write_wav(folder / "user.wav", noise(1, USER_FRAMES * 1920, 1), 24_000)
    write_wav(folder / "voice.wav", noise(1, 2 * 24_000 + 100, 2), 24_000)
    write_wav(folder / "voice44.wav", noise(1, 2 * 44_100 + 100, 3), 44_100)
    words = random.Random(0).sample(["hello", "there", "harbour", "weather", "a", "b"], 5)
    alignments = [[word, [0.4 * i, 0.4 * i + 0.3], "SPEAKER_MAIN"] for i, word in enumerate(words)]
    about = {"alignments": alignments, "text_prompt": "You are Ada from the harbour.", "voice_prompt": voice}
    (folder / "call.json").write_text(json.dumps(about))
    (folder / "calls.jsonl").write_text(json.dumps({"path": "call.wav", "duration": length / 24_000}))
    return folder / "calls.jsonl"


def training_inputs(lm: LMModel, batch, monkeypatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the temporal transformer reads of the only window of a batch: columns [17, T], inputs [T, dim]."""
    columns, inputs = [], []
    embed = training_lm.embed_columns
    hook = lm.transformer.layers[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(training_lm, "embed_columns", lambda lm, tokens: columns.append(tokens) or embed(lm, tokens))
        TrainingLM(lm, False)(batch.codes, batch.loss_mask, batch.embeddings, batch.lengths)
    hook.remove()
    return columns[0][0], inputs[0][0]
