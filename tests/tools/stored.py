"""Model folders, checkpoints and runs of tiny models, written without training."""

import copy
import json
import shutil
from pathlib import Path

import torch
from moshi.models import LMModel
from moshi.modules.lora import replace_all_linear_with_lora
from safetensors.torch import load_file, save_file

from finetune.args import DataArgs, LoraArgs, PathsArgs, TrainArgs
from finetune.config import dump_args
from finetune.model.build import set_trainable
from finetune.model.consolidated import Artefact, inference_config
from finetune.model.expansion import expand_moshiko_to_personaplex
from finetune.model.layout import fuse
from finetune.model.pretrained import MOSHI, PERSONAPLEX, Pretrained, lm_kwargs
from tests.engine import TINY

RANK, SCALING = 3, 1.5


def write_base(folder: Path, lm: LMModel, companions: Path) -> Path:
    """A model folder in the publishers' layout, float32, with the Mimi and tokenizer of `companions`."""
    shutil.copytree(companions, folder)
    save_file(fuse(lm.state_dict(), lm.dep_q), folder / "model.safetensors")
    config = json.loads((companions / "config.json").read_text()) | TINY
    (folder / "config.json").write_text(json.dumps(config | {"dep_q": lm.dep_q, "text_card": lm.text_card}))
    return folder


def expanded(base: Path) -> LMModel:
    """The tiny Moshi of a folder, with 16 codebooks."""
    text_card = json.loads((base / "config.json").read_text())["text_card"]
    lm = LMModel(device="cpu", dtype=torch.float32, **TINY | {"dep_q": 16, "text_card": text_card})
    lm.load_state_dict(expand_moshiko_to_personaplex(load_file(base / "model.safetensors")))
    return lm


def adapted(lm: LMModel, tables: bool = False) -> LMModel:
    """A copy with random adapters, as moshi inserts them; with `tables`, embeddings are trained too."""
    torch.manual_seed(7)
    lm = copy.deepcopy(lm)
    replace_all_linear_with_lora(lm, RANK, SCALING)
    set_trainable(lm, full=False, ft_embed=tables)
    if tables:
        with torch.no_grad():
            for name, parameter in lm.named_parameters():
                if parameter.requires_grad and "emb" in name:
                    parameter.add_(torch.randn_like(parameter))
    return lm


def save_checkpoint(folder: Path, base: Path, lm: LMModel, adapters: bool, spec=MOSHI) -> Path:
    """What a run leaves in `consolidated/`."""
    folder.mkdir(parents=True)
    checkpoint = Pretrained(str(base))
    config = inference_config(checkpoint, lm_kwargs(checkpoint, spec))
    artefact = Artefact(config, SCALING if adapters else None, torch.float32)
    artefact.write(artefact.gather(lm, is_main=True), folder)
    return folder


def save_run(folder: Path, base: Path, lms: dict[int, LMModel]) -> Path:
    """A run folder of train_personaplex.py: a checkpoint of adapters for each step, metrics, settings, a manifest."""
    for step, lm in lms.items():
        checkpoint = folder / f"checkpoints/checkpoint_{step:06d}"
        save_checkpoint(checkpoint / "consolidated", base, lm, adapters=True, spec=PERSONAPLEX)
        (checkpoint / "train_state.json").write_text(json.dumps({"step": step, "position": 8 * step, "files": {}}))
    manifest = folder / "train.jsonl"
    manifest.write_text('{"path": "a.wav", "duration": 5400}\n{"path": "b.wav", "duration": 3600}\n')
    args = TrainArgs(
        data=DataArgs(train_data=str(manifest)), run_dir=str(folder), moshi_paths=PathsArgs(hf_repo_id=str(base)),
        lora=LoraArgs(enable=True, rank=RANK, scaling=SCALING),
    )  # fmt: skip
    (folder / "args.yaml").write_text(dump_args(args))
    measures = {"text_loss": 2.0, "samples": 6, "free_replies": 4, "free_silence": 0.25, "free_latency": None}
    rows = [{"step": step, "loss": 9.5 - step / 10} | measures for step in (0, 5, 10, 15)]
    (folder / "metrics.eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
