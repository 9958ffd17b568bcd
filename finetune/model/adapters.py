"""Adapters on disk: which folder of a run holds them, and how another run begins with them."""

import difflib
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune.cli import UserError
from finetune.distributed import local_rows
from finetune.files import expand
from finetune.guard import best_checkpoint
from finetune.lora import initial_adapter, is_adapter, is_embedding
from finetune.model.pretrained import Pretrained
from finetune.model.weights import WeightFile
from finetune.run_dir import list_checkpoints, run_of

ADAPTERS_NAME = "lora.safetensors"


class StoredAdapters:
    """The adapters of a run, a checkpoint or an exported folder, which another run goes on from (`lora.start_from`).

    Ranks and scaling may differ from the run that wrote them: what the adapters add to the base stays the same.
    """

    def __init__(self, name: str):
        self.name = name
        folder, self.choice = inference_folder(name)
        checkpoint = Pretrained(folder)
        if not checkpoint.raw_config.get("lora"):
            raise UserError(f"lora.start_from: {name} holds complete weights; give them as moshi_paths.moshi_path")
        self.file = WeightFile(checkpoint.file("lora_name", ADAPTERS_NAME))
        self.scaling = checkpoint.raw_config.get("lora_scaling", 2.0)  # default: moshi/models/loaders.py

    def __str__(self) -> str:
        return f"{self.file.path}{f', {self.choice}' if self.choice else ''}"

    def check_base(self, identity: str) -> None:
        """Raise UserError if the run that wrote the adapters trained them on other weights. Folders outside of a run do
        not tell.

        identity: of the weights of this run, as finetune.run_dir records it."""
        run = run_of(self.file.path.resolve().parent)
        try:
            stored = json.loads((run / "identity.json").read_text())["moshi_paths"] if run else identity
        except (OSError, ValueError, KeyError, TypeError):
            return
        if stored != identity:
            raise UserError(
                f"lora.start_from: the adapters of {self.name} belong to other weights than those of moshi_paths; give "
                "the weights that they were trained on"
            )

    def load(self, lm: nn.Module, seed: int) -> None:
        """Replace the initial values of the adapters, and embedding tables that were trained with them.

        Raises UserError if the model has no room for something that the adapters have learnt."""
        own = dict(lm.named_parameters())
        pairs = {name.removesuffix("lora_A.weight") for name in self.file.slots if name.endswith("lora_A.weight")}
        if missing := {name.rpartition("lora_")[0] for name in own if is_adapter(name)} - pairs:
            raise UserError(f"lora.start_from: {self.file.path} has no adapters of {sorted(missing)[0].rstrip('.')}")
        for prefix in sorted(pairs):
            name_a, name_b = f"{prefix}lora_A.weight", f"{prefix}lora_B.weight"
            a, b = self.file.read(name_a).float(), self.file.read(name_b).float()
            used = a.any(1) | b.any(0)  # files are padded with zeros up to one rank
            room = own[name_a].shape[0] if name_a in own else 0
            if used.sum() > room:
                raise UserError(
                    f"lora.start_from: {self.file.path} has rank {int(used.sum())} in {prefix.rstrip('.')}, and this "
                    f"run has rank {room} there; raise the rank, or add the part to lora.targets"
                )
            if not room:
                continue
            whole_a, whole_b = (initial_adapter(name, own[name].shape, seed) for name in (name_a, name_b))
            if (whole_a.shape[1], whole_b.shape[0]) != (a.shape[1], b.shape[0]):
                raise UserError(f"lora.start_from: {self.file.path} belongs to a model of other sizes")
            rank, scaling = int(used.sum()), lm.get_submodule(prefix.rstrip(".")).scaling
            whole_a[:rank], whole_b[:, :rank] = a[used], b[:, used] * (self.scaling / scaling)
            _copy_rows(whole_a, own[name_a])
            _copy_rows(whole_b, own[name_b])
        for name in filter(is_embedding, self.file.slots):
            if name not in own or own[name].shape != self.file.slots[name].shape:
                raise UserError(f"lora.start_from: {self.file.path} holds {name}, which does not fit this model")
            if not own[name].requires_grad:  # checkpoints hold what is trained
                raise UserError(f"lora.start_from: {self.file.path} holds trained embeddings; set lora.ft_embed: true")
            _copy_rows(self.file.read(name), own[name])


@torch.no_grad()
def _copy_rows(whole: Tensor, parameter: nn.Parameter) -> None:
    start, local = local_rows(parameter)
    local.copy_(whole[start : start + local.shape[0]])


def inference_folder(name: str) -> tuple[str, str]:
    """(folder with config.json, which one it is) of a checkpoint, or of the best checkpoint of a run, or the newest if
    none was evaluated; other names unchanged."""
    folder = expand(name)
    if not folder.is_dir():
        _check_repository(name, folder)
        return name, ""
    if (folder / "config.json").is_file():
        return str(folder), ""
    if (folder / "consolidated/config.json").is_file():
        return str(folder / "consolidated"), ""
    if best := best_checkpoint(folder):
        step, path, reason = best
        return str(path / "consolidated"), f"step {step} ({reason})"
    if steps := [(step, path) for step, path in list_checkpoints(folder) if (path / "consolidated").is_dir()]:
        step, path = steps[-1]
        return str(path / "consolidated"), f"step {step} (the newest; none was evaluated)"
    if (folder / "args.yaml").is_file():
        raise UserError(f"{folder}: a run that has no checkpoint yet")
    return str(folder), ""


def _check_repository(name: str, folder: Path) -> None:
    """Raise UserError if a name that is no folder is none of a hub repository either: it has not the form owner/name,
    or names something in a folder that is here and holds no models (`huggingface-cli download owner/name --local-dir
    owner/name` makes one that does)."""
    here = folder.parent
    if folder.exists():
        raise UserError(f"{name}: is a file; name a run folder, a checkpoint, or the folder of a model")
    may_be_one = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if may_be_one and (not here.is_dir() or any(here.glob("*/config.json"))):
        return
    there = sorted(path.name for path in here.iterdir() if path.is_dir()) if here.is_dir() else []
    meant = difflib.get_close_matches(folder.name, there, 1)
    hint = f"{here.resolve()} holds {', '.join(there[:8])}" if there else "check its path"
    raise UserError(f"{name}: no such folder; {f'did you mean {here / meant[0]}?' if meant else hint}")
