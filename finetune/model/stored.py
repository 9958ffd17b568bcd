"""A trained or published model as it is stored: weights, adapters merged in on reading, and where it came from."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from moshi.models import LMModel, loaders
from torch import Tensor

from finetune.cli import UserError
from finetune.config import flatten, read_settings
from finetune.lora import is_embedding, merge_adapter
from finetune.metrics import read_rows
from finetune.model.build import StoredWeights, build_lm
from finetune.model.pretrained import MOSHI, PERSONAPLEX, Pretrained, lm_kwargs, open_pretrained
from finetune.model.weights import WeightFile, attention_steps, split_names
from finetune.run_dir import list_checkpoints
from finetune.streams import CODEBOOKS, DEP_Q

INFERENCE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WEIGHTS_NAME, ADAPTERS_NAME = loaders.MOSHI_NAME, "lora.safetensors"


class TrainingRecord(NamedTuple):
    """What a run's folder tells of a checkpoint."""

    settings: dict[str, object]  # args.yaml, as "section.key"
    step: int
    windows: int  # consumed
    held_out: list[dict]  # rows of metrics.eval.jsonl up to this step


@dataclass
class StoredModel:
    """Stored weights, with their adapters if they have any, read as one set of merged tensors under split names.

    Attributes:
        name: what the user called it.
        checkpoint: its config.json, Mimi and tokenizer.
        kwargs: of LMModel.
        shapes: {split name: shape} of the model.
        weights: all weights; those of the base where there are adapters.
        adapters, base: None, or the file of adapters and where their base is (`hf://...` or `file://...`).
        lineage: where all this began, as far as it is known: "base" (a published model), and of what an export wrote
            "method", "step" and "trained_tables". It becomes `model_id` of config.json, which stock moshi passes over.
        training: None without the run's folder.
    """

    name: str
    checkpoint: Pretrained
    kwargs: dict
    shapes: dict[str, torch.Size]
    weights: StoredWeights
    adapters: WeightFile | None
    base: str | None
    lineage: dict
    training: TrainingRecord | None

    @property
    def rank(self) -> int:
        return self.checkpoint.raw_config.get("lora_rank", 128)  # both defaults: moshi/models/loaders.py

    @property
    def scaling(self) -> float:
        return self.checkpoint.raw_config.get("lora_scaling", 2.0)

    @property
    def settings(self) -> dict[str, object]:
        return self.training.settings if self.training else {}

    @property
    def trained_tables(self) -> bool | None:
        """Whether the embedding tables differ from those of `lineage["base"]`; None if nothing tells."""
        if self.adapters is not None:
            trained = any(is_embedding(name) for name in self.adapters.slots)
        else:
            trained = self.settings.get("full_finetuning") or self.settings.get("lora.ft_embed")
        return True if trained else self.lineage.get("trained_tables")

    @property
    def method(self) -> str | None:
        """How it was trained, in words; None for a model that was not, or if nothing tells."""
        if self.adapters is None and not self.settings.get("lora.enable"):
            return "full fine-tuning" if self.settings else self.lineage.get("method")
        rank, scaling = self.rank, self.scaling
        if self.adapters is None:
            rank, scaling = self.settings["lora.rank"], self.settings["lora.scaling"]
        tables = " and embedding tables" if self.trained_tables else ""
        return f"LoRA (rank {rank}, scaling {scaling:g}){tables}"

    def voices_archive(self) -> Path | None:
        """`voices.tgz` of the model that all this began with; None if it has none, or cannot be reached."""
        began = (self.settings.get("moshi_paths.hf_repo_id"), self.lineage.get("base"))
        for name in (self.checkpoint.source, *filter(None, began)):
            archive = open_pretrained(str(name)).voices_archive()
            if archive is not None:
                return archive
        return None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a parameter, by its split name; float32 where an adapter was added, else as stored."""
        shape = self.shapes[name]
        stop = shape[0] if stop is None else stop
        if self.adapters is not None and name in self.adapters.slots:
            return self.adapters.read(name, start, stop)
        values = self.weights.read(name, start, stop, shape)
        prefix = name.removesuffix("weight")
        if self.adapters is None or f"{prefix}lora_A.weight" not in self.adapters.slots:
            return values
        a, b = self.adapters.read(f"{prefix}lora_A.weight"), self.adapters.read(f"{prefix}lora_B.weight", start, stop)
        return merge_adapter(values, a, b, self.scaling)

    def fused(self, layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> Iterator[tuple[str, Tensor]]:
        """(key, values) of a fused layout, in its order; a tensor of several steps is filled a step at a time."""
        for key, (dtype, shape) in layout.items():
            steps = split_names(key, attention_steps(key, self.kwargs["dep_q"])) or [key]
            if len(steps) == 1:
                yield key, self.read(steps[0])
                continue
            values = torch.empty(shape, dtype=dtype)
            for rows, name in zip(values.chunk(len(steps)), steps):
                rows.copy_(self.read(name))
            yield key, values


def open_stored(name: str, base: str | None = None, expand: bool = False) -> StoredModel:
    """What a run folder, a checkpoint, an exported or published folder, or a repository of the hub holds.

    Args:
        base: repository or folder of the weights that adapters belong to, in place of what is written of them.
        expand: from 8 codebooks to 16.
    Raises:
        UserError: no such thing, or its files do not fit each other.
    """
    folder = Path(name).expanduser()
    folder = _inference_folder(folder) if folder.is_dir() else None
    checkpoint = open_pretrained(name if folder is None else str(folder))
    kwargs = lm_kwargs(checkpoint, MOSHI)
    adapted = checkpoint.raw_config.get("lora", False)
    if expand and adapted:
        raise UserError(f"{name}: holds adapters; only weights can be expanded: export it with --merge first")
    if expand and kwargs["dep_q"] != CODEBOOKS:
        raise UserError(f"{name}: has {kwargs['dep_q']} codebooks already")
    if base is not None and not adapted:
        raise UserError(f"{name}: holds all weights, so there is no --base to give")
    if expand:
        kwargs["dep_q"] = DEP_Q

    training = _training(folder) if folder else None
    lineage = checkpoint.raw_config.get("model_id")
    adapters = where = None
    if adapted:
        where, path, below = _find_base(name, checkpoint, kwargs["dep_q"], training, base)
        lineage = lineage or below
        adapters = WeightFile(checkpoint.file("lora_path", "lora_name", ADAPTERS_NAME))
    else:
        path = checkpoint.moshi_weights()
        lineage = lineage or (_run_lineage(_paths(training, kwargs["dep_q"])) if training else _lineage(name))
    weights = StoredWeights(path, kwargs["dep_q"])
    lm = build_lm(kwargs, torch.bfloat16)
    shapes = {key: parameter.shape for key, parameter in lm.named_parameters()}
    weights.check(shapes)
    source = StoredModel(name, checkpoint, kwargs, shapes, weights, adapters, where, lineage, training)
    if adapters is not None:
        _check_adapters(source)
    return source


def _check_adapters(source: StoredModel) -> None:
    """Raises UserError unless the file holds both matrices for each linear layer, and embedding tables at most."""
    expected = {}
    for name, shape in source.shapes.items():
        if len(shape) == 2 and not is_embedding(name):
            prefix = name.removesuffix("weight")
            expected[f"{prefix}lora_A.weight"] = (source.rank, shape[1])
            expected[f"{prefix}lora_B.weight"] = (shape[0], source.rank)
    found = {name: slot.shape for name, slot in source.adapters.slots.items()}
    tables = {name for name in found.keys() & source.shapes.keys() if is_embedding(name)}
    expected |= {name: tuple(source.shapes[name]) for name in tables}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        what = f"holds {wrong[0]} of {list(found[wrong[0]])}" if wrong[0] in found else f"lacks {wrong[0]}"
        raise UserError(
            f"{source.adapters.path}: {what}, so these are not adapters of rank {source.rank} over "
            f"{source.kwargs['dep_q']} codebooks, as config.json says"
        )


def _inference_folder(folder: Path) -> Path:
    """The folder with config.json that a run folder, a checkpoint or such a folder itself leads to."""
    if (folder / "config.json").is_file():
        return folder
    if (folder / "consolidated/config.json").is_file():
        return folder / "consolidated"
    steps = list_checkpoints(folder)
    if steps:
        return steps[-1][1] / "consolidated"
    if (folder / "args.yaml").is_file():
        raise UserError(f"{folder}: a run that has no checkpoint yet")
    return folder


def _training(folder: Path) -> TrainingRecord | None:
    """What the run that wrote `folder` tells of it; None where there is none around it."""
    checkpoint = folder.resolve().parent
    state, run_dir = checkpoint / "train_state.json", checkpoint.parent.parent
    if not state.is_file() or not (run_dir / "args.yaml").is_file():
        return None
    settings = flatten(read_settings(run_dir / "args.yaml"))
    try:
        progress = dict(json.loads(state.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{state}: not readable as JSON ({error}); name another checkpoint of the run") from None
    rows = read_rows(run_dir / "metrics.eval.jsonl")
    rows = [row for row in rows if row["step"] <= progress["step"] and row.get("loss") is not None]
    return TrainingRecord(settings, progress["step"], progress["position"], rows)


def _paths(training: TrainingRecord, dep_q: int) -> dict[str, str | None]:
    """A run's moshi_paths, with the script's own repository where none was given."""
    default = (PERSONAPLEX if dep_q == DEP_Q else MOSHI).default_repo
    keys = ("hf_repo_id", "moshi_path", "mimi_path", "tokenizer_path", "config_path")
    paths = {key: training.settings.get(f"moshi_paths.{key}") for key in keys}
    return paths | {"hf_repo_id": paths["hf_repo_id"] or default}


def _run_lineage(paths: dict[str, str | None]) -> dict:
    """Where a run's moshi_paths lead to."""
    weights = paths["moshi_path"]
    if weights:
        return _lineage("/".join(weights.split("/")[2:4])) if weights.startswith("hf://") else {}
    return _lineage(paths["hf_repo_id"])


def _lineage(name: str) -> dict:
    """A repository is a beginning; a folder says itself where it comes from, or nothing."""
    if not Path(name).is_dir():
        return {"base": name, "trained_tables": False}
    config = Path(name) / "config.json"
    return json.loads(config.read_text()).get("model_id", {}) if config.is_file() else {}


def _find_base(
    name: str, checkpoint: Pretrained, dep_q: int, training: TrainingRecord | None, given: str | None
) -> tuple[str, Path, dict]:
    """(address, file, lineage) of the weights that adapters belong to: as given, or as config.json says, or as
    the run's settings say."""
    if given is not None:
        folder = Path(given).expanduser()
        under = open_pretrained(str(_inference_folder(folder)) if folder.is_dir() else given)
        if under.raw_config.get("lora"):
            raise UserError(f"{given}: holds adapters, and --base must hold all weights")
        path, lineage = under.moshi_weights(), _lineage(under.source)
        address = hub_address(under, "moshi_name", path)
    elif "moshi_name" in checkpoint.raw_config:
        path, lineage = checkpoint.moshi_weights(), {}
        address = hub_address(checkpoint, "moshi_name", path)
    elif training is not None:
        paths = _paths(training, dep_q)
        try:
            under = open_pretrained(**paths)
            path, lineage = under.moshi_weights(), _run_lineage(paths)
        except UserError as error:
            raise UserError(f"the base of {name} is not where its run found it ({error}); give it as --base") from None
        address = hub_address(under, "moshi_name", path)
        if paths["moshi_path"]:
            address = paths["moshi_path"] if paths["moshi_path"].startswith("hf://") else None
    else:
        raise UserError(f"{name}: holds adapters, and nothing says of which weights; give them as --base")
    return address or f"file://{path.absolute()}", path, lineage


def hub_address(checkpoint: Pretrained, key: str, path: Path) -> str | None:
    """`hf://...` of a file that a checkpoint's config names under `key`; None for one that is only on this machine."""
    address = checkpoint.locate(key, path)
    return address if address.startswith("hf://") else None


def load_merged(source: StoredModel, device: torch.device, dtype: torch.dtype, dep_q: int = CODEBOOKS) -> LMModel:
    """A model for inference with `dep_q` depformer steps, adapters merged into its weights, read tensor by tensor."""
    lm = build_lm(source.kwargs | {"dep_q": dep_q}, dtype)
    lm.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            parameter.copy_(source.read(name))
    return lm.eval()
