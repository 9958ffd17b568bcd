"""A trained or published model on disk: its weights, with adapters merged as they are read, and where it came from."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from moshi.models import loaders
from torch import Tensor

from finetune.cli import UserError
from finetune.config import flatten, read_settings
from finetune.lora import is_embedding, merge_adapter
from finetune.metrics import read_rows
from finetune.model.adapters import ADAPTERS_NAME, inference_folder
from finetune.model.build import StoredWeights, build_lm
from finetune.model.pretrained import MOSHI, PERSONAPLEX, Pretrained, lm_kwargs
from finetune.model.weights import WeightFile, attention_steps, split_names
from finetune.streams import CODEBOOKS, DEP_Q

INFERENCE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WEIGHTS_NAME = loaders.MOSHI_NAME


class TrainingRecord(NamedTuple):
    """What the folder of a run records about one of its checkpoints."""

    settings: dict[str, object]  # of args.yaml, keys as "section.key"
    step: int
    windows: int  # consumed
    held_out: list[dict]  # rows of metrics.eval.jsonl up to this step


@dataclass
class StoredModel:
    """A model on disk, with its adapters if it has any, read as one set of merged tensors under split names."""

    name: str  # as the user gave it
    checkpoint: Pretrained  # config.json, Mimi and tokenizer
    kwargs: dict  # arguments of LMModel
    shapes: dict[str, torch.Size]  # by split name
    weights: StoredWeights  # all weights; with adapters, those of their base
    adapters: WeightFile | None
    base: str | None  # address of the adapters' base, `hf://...` or `file://...`
    # What is known of its origin: "base" (a published model), and "method", "step" and "trained_tables" as an export
    # writes them (`model_id` in config.json, which stock moshi ignores).
    lineage: dict
    training: TrainingRecord | None  # None without the folder of its run
    choice: str = ""  # which checkpoint of a run this is, and why

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
        """Whether the embedding tables differ from those of `lineage["base"]`; None if unknown."""
        trained = self.settings.get("full_finetuning") or self.settings.get("lora.ft_embed")
        saved = self.adapters is not None and any(is_embedding(name) for name in self.adapters.slots)
        return True if trained or saved else self.lineage.get("trained_tables")

    @property
    def method(self) -> str | None:
        """How the model was trained, in words; None if it was not, or if that is unknown."""
        if self.adapters is None and not self.settings.get("lora.enable"):
            return "full fine-tuning" if self.settings else self.lineage.get("method")
        rank, scaling = self.rank, self.scaling
        if self.adapters is None:
            rank, scaling = self.settings["lora.rank"], self.settings["lora.scaling"]
        tables = " and embedding tables" if self.trained_tables else ""
        earlier = ", after another LoRA run" if self.settings.get("lora.start_from") else ""
        return f"LoRA (rank {rank}, scaling {scaling:g}){tables}{earlier}"

    def voices_archive(self) -> Path | None:
        """`voices.tgz` of the model or of its origin; None if neither has one or it cannot be reached."""
        sources = (self.checkpoint.source, self.settings.get("moshi_paths.hf_repo_id"), self.lineage.get("base"))
        archives = (Pretrained(source).voices_archive() for source in sources if source)
        return next(filter(None, archives), None)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a parameter by its split name; float32 if an adapter was merged, else as stored."""
        shape = self.shapes[name]
        stop = shape[0] if stop is None else stop
        if self.adapters is not None and name in self.adapters.slots:
            return self.adapters.read(name, start, stop)
        source = self.weights.sources[name]
        if source is None:  # new in an expanded model
            return torch.zeros(max(0, min(stop, shape[0]) - start), *shape[1:])
        values = self.weights.file.read(source, start, stop)
        prefix = name.removesuffix("weight")
        if self.adapters is None or f"{prefix}lora_A.weight" not in self.adapters.slots:
            return values
        a, b = self.adapters.read(f"{prefix}lora_A.weight"), self.adapters.read(f"{prefix}lora_B.weight", start, stop)
        return merge_adapter(values, a, b, self.scaling)

    def fused(self, layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> Iterator[tuple[str, Tensor]]:
        """(key, values) of a fused layout, in its order; a tensor of several steps is filled one step at a time."""
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
    """Open a run folder, a checkpoint, an exported or published folder, or a hub repository.

    Args:
        base: repository or folder of the weights that adapters belong to, in place of the recorded one.
        expand: from 8 codebooks to 16.
    Raises:
        UserError: the model does not exist, or its files do not fit together.
    """
    folder, choice = inference_folder(name)
    checkpoint = Pretrained(folder)
    kwargs = lm_kwargs(checkpoint, MOSHI)
    adapted = checkpoint.raw_config.get("lora", False)
    if expand and adapted:
        raise UserError(f"{name}: holds adapters, and only weights can be expanded; export it with --merge first")
    if expand and kwargs["dep_q"] != CODEBOOKS:
        raise UserError(f"{name}: has {kwargs['dep_q']} codebooks already")
    if base is not None and not adapted:
        raise UserError(f"{name}: holds all weights, so there is no --base to give")
    if expand:
        kwargs["dep_q"] = DEP_Q

    training = _training_record(Path(checkpoint.source))
    run_paths = _run_paths(training, kwargs["dep_q"]) if training else None
    adapters = address = None
    if adapted:
        address, path, lineage = _find_base(name, checkpoint, run_paths, base)
        adapters = WeightFile(checkpoint.file("lora_name", ADAPTERS_NAME))
    else:
        path = checkpoint.moshi_weights()
        lineage = _run_lineage(run_paths) if run_paths else _lineage(checkpoint.source)
    lineage = checkpoint.raw_config.get("model_id") or lineage
    weights = StoredWeights(path, kwargs["dep_q"])
    shapes = {key: parameter.shape for key, parameter in build_lm(kwargs, torch.bfloat16).named_parameters()}
    weights.check(shapes)
    model = StoredModel(name, checkpoint, kwargs, shapes, weights, adapters, address, lineage, training, choice)
    if adapters is not None:
        _check_adapters(model)
    return model


def _check_adapters(model: StoredModel) -> None:
    """Raise UserError unless the file holds both matrices of every linear layer, and beyond them only embeddings."""
    expected = {}
    for name, shape in model.shapes.items():
        if len(shape) == 2 and not is_embedding(name):
            prefix = name.removesuffix("weight")
            expected[f"{prefix}lora_A.weight"] = (model.rank, shape[1])
            expected[f"{prefix}lora_B.weight"] = (shape[0], model.rank)
        elif name in model.adapters.slots and is_embedding(name):
            expected[name] = tuple(shape)
    found = {name: slot.shape for name, slot in model.adapters.slots.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        what = f"holds {wrong[0]} of shape {list(found[wrong[0]])}" if wrong[0] in found else f"lacks {wrong[0]}"
        raise UserError(
            f"{model.adapters.path}: {what}, so these are not adapters of rank {model.rank} over "
            f"{model.kwargs['dep_q']} codebooks, as config.json says"
        )


def base_of(model: StoredModel) -> StoredModel | None:
    """The model that training began with; None if that is not known."""
    if model.adapters is not None:
        return replace(model, adapters=None)
    if model.training is None:
        return None
    checkpoint = Pretrained(**_run_paths(model.training, model.kwargs["dep_q"]))
    return replace(model, weights=StoredWeights(checkpoint.moshi_weights(), model.kwargs["dep_q"]))


def _training_record(folder: Path) -> TrainingRecord | None:
    """The record of the run that wrote `folder`; None if `folder` is not within a run."""
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


def _run_paths(training: TrainingRecord, dep_q: int) -> dict[str, str | None]:
    """The moshi_paths of a run, with the default repository of its script if it names none."""
    default = (PERSONAPLEX if dep_q == DEP_Q else MOSHI).default_repo
    keys = ("hf_repo_id", "moshi_path", "mimi_path", "tokenizer_path", "config_path")
    paths = {key: training.settings.get(f"moshi_paths.{key}") for key in keys}
    return paths | {"hf_repo_id": paths["hf_repo_id"] or default}


def _run_lineage(paths: dict[str, str | None]) -> dict:
    """The lineage of the weights that a run started from."""
    weights = paths["moshi_path"]
    if weights and not weights.startswith("hf://"):
        return {}
    return _lineage("/".join(weights.split("/")[2:4]) if weights else paths["hf_repo_id"])


def _lineage(name: str) -> dict:
    """The lineage of a repository, which is an origin itself, or of a folder, as its config.json records it."""
    if not Path(name).is_dir():
        return {"base": name, "trained_tables": False}
    return Pretrained(name).raw_config.get("model_id", {})


def _find_base(name: str, checkpoint: Pretrained, run_paths: dict | None, given: str | None) -> tuple[str, Path, dict]:
    """(address, file, lineage) of the base of adapters: as given, else by config.json, else by the run's settings."""
    if given is not None:
        base = Pretrained(inference_folder(given)[0])
        lineage = _lineage(base.source)
        if base.raw_config.get("lora"):
            raise UserError(f"{given}: holds adapters, and --base must hold all weights")
    elif "moshi_name" in checkpoint.raw_config:
        base, lineage = checkpoint, {}
    elif run_paths is not None:
        base, lineage = Pretrained(**run_paths), _run_lineage(run_paths)
    else:
        raise UserError(f"{name}: holds adapters without naming their base; give it as --base")
    try:
        path = base.moshi_weights()
    except UserError as error:
        raise UserError(f"the base of {name} is missing ({error}); give it as --base") from None
    return base.hub_address("moshi_name", path) or f"file://{path.absolute()}", path, lineage
