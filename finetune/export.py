"""Makes a checkpoint a folder that servers load and the hub takes: weights, config.json, Mimi, tokenizer, model card.

    python -m finetune.export CHECKPOINT OUT --format moshi            adapters stay adapters, and name their base
    python -m finetune.export CHECKPOINT OUT --format moshi --merge    all weights, for Kyutai's server
    python -m finetune.export CHECKPOINT OUT --format personaplex      all weights, for NVIDIA's runtime
    python -m finetune.export --expand MOSHI OUT                       a Moshi with 16 codebooks instead of 8

CHECKPOINT is a run folder (its newest checkpoint counts), one of its checkpoints, an exported folder or a repository of
the hub. NVIDIA's runtime knows no adapters, so --format personaplex always merges them. Adapters that were trained on
Moshi weights with train_personaplex.py run on these only after --expand.

Weights are read, merged and written one tensor at a time, in the fused layout that both publishers use.
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from moshi.models import loaders
from torch import Tensor

from finetune import checkpointing, lora, metrics, model
from finetune.args import flatten, parse_sources, read_settings
from finetune.cli import Parser, UserError, run
from finetune.data import manifest
from finetune.personaplex import CODEBOOKS, DEP_Q, fuse
from finetune.weights import WeightFile, attention_steps, split_names, write_safetensors

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WEIGHTS, ADAPTERS = loaders.MOSHI_NAME, "lora.safetensors"

# --- 1. What is exported --------------------------------------------------------------------------------------------


class Training(NamedTuple):
    """What a run's folder tells of a checkpoint."""

    settings: dict[str, object]  # args.yaml, as "section.key"
    step: int
    windows: int  # consumed
    held_out: list[dict]  # rows of metrics.eval.jsonl up to this step


@dataclass
class Source:
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
    checkpoint: model.Checkpoint
    kwargs: dict
    shapes: dict[str, torch.Size]
    weights: model.Weights
    adapters: WeightFile | None
    base: str | None
    lineage: dict
    training: Training | None

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
            trained = any(lora.is_embedding(name) for name in self.adapters.slots)
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
            archive = model.open_checkpoint(str(name)).voices_archive()
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
        return lora.merged(values, a, b, self.scaling)

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


def open_source(name: str, base: str | None = None, expand: bool = False) -> Source:
    """What a run folder, a checkpoint, an exported or published folder, or a repository of the hub holds.

    Args:
        base: repository or folder of the weights that adapters belong to, in place of what is written of them.
        expand: from 8 codebooks to 16.
    Raises:
        UserError: no such thing, or its files do not fit each other.
    """
    folder = Path(name).expanduser()
    folder = _inference_folder(folder) if folder.is_dir() else None
    checkpoint = model.open_checkpoint(name if folder is None else str(folder))
    kwargs = model.lm_kwargs(checkpoint, model.MOSHI)
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
        adapters = WeightFile(checkpoint.file("lora_path", "lora_name", ADAPTERS))
    else:
        path = checkpoint.moshi_weights()
        lineage = lineage or (_run_lineage(_paths(training, kwargs["dep_q"])) if training else _lineage(name))
    weights = model.Weights(path, kwargs["dep_q"])
    lm = model.build_lm(kwargs, torch.bfloat16)
    shapes = {key: parameter.shape for key, parameter in lm.named_parameters()}
    weights.check(shapes)
    source = Source(name, checkpoint, kwargs, shapes, weights, adapters, where, lineage, training)
    if adapters is not None:
        _check_adapters(source)
    return source


def _check_adapters(source: Source) -> None:
    """Raises UserError unless the file holds both matrices for each linear layer, and embedding tables at most."""
    expected = {}
    for name, shape in source.shapes.items():
        if len(shape) == 2 and not lora.is_embedding(name):
            prefix = name.removesuffix("weight")
            expected[f"{prefix}lora_A.weight"] = (source.rank, shape[1])
            expected[f"{prefix}lora_B.weight"] = (shape[0], source.rank)
    found = {name: slot.shape for name, slot in source.adapters.slots.items()}
    tables = {name for name in found.keys() & source.shapes.keys() if lora.is_embedding(name)}
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
    steps = checkpointing.checkpoints(folder)
    if steps:
        return steps[-1][1] / "consolidated"
    if (folder / "args.yaml").is_file():
        raise UserError(f"{folder}: a run that has no checkpoint yet")
    return folder


def _training(folder: Path) -> Training | None:
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
    rows = metrics.read_rows(run_dir / "metrics.eval.jsonl")
    rows = [row for row in rows if row["step"] <= progress["step"] and row.get("loss") is not None]
    return Training(settings, progress["step"], progress["position"], rows)


def _paths(training: Training, dep_q: int) -> dict[str, str | None]:
    """A run's moshi_paths, with the script's own repository where none was given."""
    default = (model.PERSONAPLEX if dep_q == DEP_Q else model.MOSHI).default_repo
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
    name: str, checkpoint: model.Checkpoint, dep_q: int, training: Training | None, given: str | None
) -> tuple[str, Path, dict]:
    """(address, file, lineage) of the weights that adapters belong to: as given, or as config.json says, or as
    the run's settings say."""
    if given is not None:
        folder = Path(given).expanduser()
        under = model.open_checkpoint(str(_inference_folder(folder)) if folder.is_dir() else given)
        if under.raw_config.get("lora"):
            raise UserError(f"{given}: holds adapters, and --base must hold all weights")
        path, lineage = under.moshi_weights(), _lineage(under.source)
        address = _address(under, "moshi_name", path)
    elif "moshi_name" in checkpoint.raw_config:
        path, lineage = checkpoint.moshi_weights(), {}
        address = _address(checkpoint, "moshi_name", path)
    elif training is not None:
        paths = _paths(training, dep_q)
        try:
            under = model.open_checkpoint(**paths)
            path, lineage = under.moshi_weights(), _run_lineage(paths)
        except UserError as error:
            raise UserError(f"the base of {name} is not where its run found it ({error}); give it as --base") from None
        address = _address(under, "moshi_name", path)
        if paths["moshi_path"]:
            address = paths["moshi_path"] if paths["moshi_path"].startswith("hf://") else None
    else:
        raise UserError(f"{name}: holds adapters, and nothing says of which weights; give them as --base")
    return address or f"file://{path.absolute()}", path, lineage


def _address(checkpoint: model.Checkpoint, key: str, path: Path) -> str | None:
    """`hf://...` of a file that a checkpoint's config names under `key`; None for one that is only on this machine."""
    address = checkpoint.locate(key, path)
    return address if address.startswith("hf://") else None


# --- 2. The folder --------------------------------------------------------------------------------------------------


def export(source: Source, out: Path, runtime: str, merge: bool, dtype: torch.dtype) -> dict:
    """Writes the folder `out`, under a temporary name until it is complete; returns its config.json.

    Args:
        runtime: "moshi" (Kyutai's) or "personaplex" (NVIDIA's: 16 codebooks, adapters always merged).
        merge: adapters are added to the weights; else they are all that is written.
    Raises:
        UserError: `out` is in use, the disk is full, or the source does not fit the runtime.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; name a new folder")
    if runtime == "personaplex" and source.kwargs["dep_q"] != DEP_Q:
        raise UserError(
            f"{source.name}: has {source.kwargs['dep_q']} codebooks, and NVIDIA's runtime needs {DEP_Q}; use "
            "--format moshi, or train with train_personaplex.py"
        )
    if source.adapters is None or merge or runtime == "personaplex":
        state = {key: torch.empty(shape, device="meta") for key, shape in source.shapes.items()}
        layout = {key: (dtype, tuple(t.shape)) for key, t in fuse(state, source.kwargs["dep_q"]).items()}
        tensors, name = source.fused(layout), WEIGHTS
        adapters = {"moshi_name": WEIGHTS}
    elif source.weights.origin.expanded:
        raise UserError(
            f"{source.name}: its adapters need a base of {DEP_Q} codebooks, and {source.weights.file.path} has "
            f"{CODEBOOKS}; write one with --expand and give it as --base, or use --merge"
        )
    else:
        layout = {key: (dtype, slot.shape) for key, slot in source.adapters.slots.items()}
        tensors, name = ((key, source.adapters.read(key)) for key in layout), ADAPTERS
        adapters = {"moshi_name": source.base, "lora_name": ADAPTERS, "lora": True}
        adapters |= {"lora_rank": source.rank, "lora_scaling": source.scaling}

    copies, names = _companions(source.checkpoint)
    origin = {"method": source.method, "trained_tables": source.trained_tables}
    origin |= {"step": source.training.step} if source.training else {}
    origin = source.lineage | {key: value for key, value in origin.items() if value is not None}
    config = source.kwargs | names | adapters | {"model_type": runtime, "model_id": origin}
    if "lm_gen_config" in source.checkpoint.raw_config:
        config["lm_gen_config"] = source.checkpoint.raw_config["lm_gen_config"]

    out = out.absolute()
    partial = out.with_name(f".{out.name}.tmp")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        need = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in layout.values())
        need += sum(path.stat().st_size for path in copies.values())
        free = shutil.disk_usage(partial).free
        if need > free:
            raise UserError(f"{out}: needs {need / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB are free")
        for copy, path in copies.items():
            shutil.copyfile(path, partial / copy)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (partial / "README.md").write_text(card(source, config, out.name))
        write_safetensors(partial / name, layout, tensors)
        partial.replace(out)
    except OSError as error:
        raise UserError(f"{out}: could not be written ({error.strerror or error}); name a folder elsewhere") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return config


def _companions(checkpoint: model.Checkpoint) -> tuple[dict[str, Path], dict[str, str]]:
    """({name in the folder: file to copy}, entries of config.json) for Mimi and the tokenizer: what the hub has is
    referred to, what only this machine has is copied."""
    files = {
        "mimi_name": (checkpoint.mimi_weights(), "mimi", ".safetensors"),
        "tokenizer_name": (checkpoint.tokenizer_path(), "tokenizer", ".model"),
    }
    if "mimi_config_name" in checkpoint.raw_config:
        path = checkpoint.file("mimi_config", "mimi_config_name", checkpoint.raw_config["mimi_config_name"])
        files["mimi_config_name"] = (path, "mimi_config", ".json")
    copies, names = {}, {}
    for key, (path, stem, suffix) in files.items():
        names[key] = _address(checkpoint, key, path)
        if names[key] is None:
            names[key] = stem + (path.suffix or suffix)
            copies[names[key]] = path
    return copies, names


def push(folder: Path, repository: str) -> str:
    """Uploads a folder to the hub, into a repository that is made private if it is new; returns its address.

    Raises UserError saying what to do with the folder instead.
    """
    api = HfApi()
    try:
        name = api.create_repo(repository, private=True, exist_ok=True).repo_id
        api.upload_folder(folder_path=folder, repo_id=name)
        return f"https://huggingface.co/{name}"
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{folder} is written, but could not be uploaded ({reason}); run `huggingface-cli login`, then "
            f"`huggingface-cli upload {repository} {folder}`"
        ) from None


# --- 3. The model card ----------------------------------------------------------------------------------------------

# As the model cards of the publishers state them (huggingface.co, the repositories of these names).
_LICENCES = {
    "kyutai/moshi": ("cc-by-4.0", "CC-BY 4.0", "https://creativecommons.org/licenses/by/4.0/"),
    "nvidia/personaplex": (
        "other",
        "NVIDIA Open Model License",
        "https://www.nvidia.com/en-us/agreements/enterprise-software/nvidia-open-model-license/",
    ),
}
_MEASURES = {
    "loss": ("objective", "{:.4f}"),
    "text_loss": ("text, nats a token", "{:.4f}"),
    "text_perplexity": ("text, perplexity", "{:.2f}"),
    "text_word_accuracy": ("text, words right", "{:.1%}"),
    "agent_loss": ("agent's audio, nats a token", "{:.4f}"),
    "user_loss": ("user's audio, nats a token", "{:.4f}"),
    "semantic_loss": ("semantic codebooks, nats a token", "{:.4f}"),
    "acoustic_loss": ("acoustic codebooks, nats a token", "{:.4f}"),
    "free_silence": ("free-running: silence, of the time", "{:.1%}"),
    "free_words_per_minute": ("free-running: words a minute", "{:.0f}"),
    "free_repetition": ("free-running: one phrase, of the text", "{:.1%}"),
    "free_tor_turn": ("free-running: user's turns taken", "{:.1%}"),
    "free_tor_pause": ("free-running: user's pauses taken", "{:.1%}"),
    "free_latency": ("free-running: latency, s", "{:.2f}"),
    "free_overlap": ("free-running: both speak, of the time", "{:.1%}"),
}
_SETTINGS = {
    "duration_sec": "window of dialogue, s",
    "optim.lr": "learning rate",
    "optim.depformer_lr": "learning rate of the depformer",
    "first_codebook_weight_multiplier": "loss weight, semantic over acoustic",
    "text_padding_weight": "loss weight, padding over words",
    "user_audio_loss_weight": "loss weight, user's audio",
    "param_dtype": "dtype of computation",
    "seed": "seed",
}


def card(source: Source, config: dict, title: str) -> str:
    """README.md of an exported folder: what it is, how it was trained, what it scored, how to run it, licences."""
    root, expanded = source.lineage.get("base"), source.weights.origin.expanded
    licence = next((found for prefix, found in _LICENCES.items() if root and root.startswith(prefix)), None)
    front = ["library_name: moshi", "tags: [speech-to-speech, full-duplex]"]
    if licence:
        front.append(f"license: {licence[0]}")
    if licence and licence[0] == "other":
        front += [f"license_name: {licence[1].lower().replace(' ', '-')}", f"license_link: {licence[2]}"]
    if root:
        front += [f"base_model: {root}", f"base_model_relation: {'adapter' if config.get('lora') else 'finetune'}"]

    origin = f"[{root}](https://huggingface.co/{root})" if root else "a local model"
    grown = f", expanded from {CODEBOOKS} to {DEP_Q} codebooks" if expanded else ""
    holds = f"{config['dep_q']} codebooks, " + ("adapters without their base" if config.get("lora") else "all weights")
    trained = f", fine-tuned by {source.method}" if source.method else ""
    about = [f"{origin[0].upper()}{origin[1:]}{grown}{trained}. {holds[0].upper()}{holds[1:]}."]
    if expanded and not source.method:
        about.append(
            "The depformer's steps for the user's audio start as copies of those for the agent's. Text and the agent's "
            "audio are exactly the original's: this is a base to train and to put adapters on, not a better model."
        )
    if config.get("lora"):
        about.append(f"The adapters need this base: `{config['moshi_name']}`.")
    if config["moshi_name"].startswith("file://"):
        about.append("It is on one machine only; elsewhere, write into config.json as `moshi_name` where it is.")

    parts = ["\n".join(["---", *front, "---"]), f"# {title}", *about]
    if source.training:
        parts += ["## Training", _table([("", ""), *_facts(source.training)])]
        if source.training.held_out:
            parts += ["## Held-out data", *_scores(source.training.held_out)]
    parts += ["## Run", *_how_to_run(source, config), "## Licence"]
    terms = f"under the [{licence[1]}]({licence[2]})" if licence else "whose licence holds for them too"
    parts.append(
        f"The weights derive from {origin}, {terms}; they were changed as said above. Mimi and the text tokenizer are "
        "Kyutai's (CC-BY 4.0), unless the model was given others."
    )
    return "\n\n".join(parts) + "\n"


def _table(rows: list[tuple]) -> str:
    head, *rest = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *rest])


def _facts(training: Training) -> Iterator[tuple[str, object]]:
    settings = training.settings
    yield "steps", f"{training.step:,}"
    yield "windows seen", f"{training.windows:,} ({training.windows / max(training.step, 1):g} a step)"
    hours = _hours(str(settings.get("data.train_data", "")))
    yield "training data", f"{hours[0]:.2f} h in {hours[1]:,} files" if hours else "not at hand when this was exported"
    for key, label in _SETTINGS.items():
        if settings.get(key) is not None:
            yield label, settings[key]


def _hours(train_data: str) -> tuple[float, int] | None:
    """(hours, files) of a run's manifests; None if they are gone."""
    try:
        lines = [line for path, _ in parse_sources(train_data) for line in manifest.iterate(path, [])]
        return sum(float(line.fields["duration"]) for line in lines) / 3600, len(lines)
    except (UserError, OSError, KeyError, TypeError, ValueError):
        return None


def _scores(held_out: list[dict]) -> list[str]:
    """The first and the last evaluation beside each other."""
    columns = [held_out[0], held_out[-1]][-len(held_out) :]
    about = f"Over {columns[-1].get('samples', 'all')} windows, teacher-forced"
    replies = columns[-1].get("free_replies")
    about += f"; free-running: {replies} replies to held-out users." if replies else "."
    about += " Step 0 is the base model." * (columns[0]["step"] == 0)
    rows = [("", *(f"step {row['step']}" for row in columns))]
    for key, (label, form) in _MEASURES.items():
        if all(isinstance(row.get(key), float) for row in columns):
            rows.append((label, *(form.format(row[key]) for row in columns)))
    return [about, _table(rows)]


def _how_to_run(source: Source, config: dict) -> list[str]:
    """Paragraphs; the commands have this folder as their working directory."""
    files = {"mimi_name": "--mimi-weight", "tokenizer_name": "--tokenizer"}
    local = "".join(f" {flag} {config[key]}" for key, flag in files.items() if not config[key].startswith("hf://"))
    command = lambda text: f"```\n{text}\n```"
    if config["model_type"] == "moshi" and config["dep_q"] == CODEBOOKS:
        weights = f"--lora-weight {ADAPTERS}" if config.get("lora") else f"--moshi-weight {WEIGHTS}"
        here = ["Or from this folder:", command(f"python -m moshi.server {weights} --config-path config.json{local}")]
        if "mimi_config_name" in config:
            here = ["Not from this folder: it takes a mimi_config.json from the hub alone."]
        return [
            "With Kyutai's server (`pip install moshi`), from the hub:",
            command("python -m moshi.server --hf-repo OWNER/NAME"),
            *here,
        ]
    if config["model_type"] == "moshi":
        return [
            f"Stock `moshi` loads these weights, but Kyutai's server cannot run {DEP_Q} codebooks: it would make up "
            "what the user says. With the toolkit that trained them:",
            command(
                "python -m finetune.generate . --user-wav in.wav --voice me.wav "
                "--text-prompt 'You are ...' --out out.wav"
            ),
        ]
    parts = [
        "With NVIDIA's runtime (github.com/NVIDIA/personaplex, `pip install moshi/.` in it):",
        command(
            f'SSL_DIR=$(mktemp -d); python -m moshi.server --ssl "$SSL_DIR" --moshi-weight {WEIGHTS}{local}\n'
            f"python -m moshi.offline --moshi-weight {WEIGHTS}{local} --voice-prompt-dir . --voice-prompt me.wav "
            "--text-prompt 'You are ...' --input-wav in.wav --output-wav out.wav --output-text out.json"
        ),
    ]
    if any(config.get(key, value) != value for key, value in (loaders._lm_kwargs | {"dep_q": DEP_Q}).items()):
        parts.append("It builds models of the published size alone, and this one is of another.")
    if source.lineage.get("base") == model.PERSONAPLEX.default_repo and source.trained_tables is False:
        parts.append("The embedding tables are PersonaPlex's own, so the voices shipped with it (NATF2.pt, ...) fit.")
        return parts
    return [
        *parts,
        "The voices shipped with PersonaPlex (NATF2.pt, ...) hold embeddings of its own tables, and this model has "
        "others: they do not fit. Recordings do, and so do voices made for this model:",
        command("python -m finetune.voice make me.wav me.pt --weights ."),
    ]


# --- 4. The command -------------------------------------------------------------------------------------------------


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("source", metavar="CHECKPOINT", help="what to export")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; new or empty")
    parser.add_argument("--format", choices=("moshi", "personaplex"), help="whose runtime it is for")
    parser.add_argument("--merge", action="store_true", help="add adapters to the weights")
    parser.add_argument("--expand", action="store_true", help="make 16 codebooks of 8")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights that are written")
    parser.add_argument("--base", metavar="REPO_OR_FOLDER", help="weights that adapters belong to, if not as written")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload OUT too; a new repository is private")
    args = parser.parse_args()
    if args.expand and (args.format or args.merge or args.base):
        raise UserError("--expand stands alone, without --format, --merge and --base")
    if not args.expand and not args.format:
        raise UserError("name the runtime: --format moshi or --format personaplex (or --expand)")
    if args.push_to_hub:
        try:
            validate_repo_id(args.push_to_hub)
        except HFValidationError as error:
            raise UserError(f"--push-to-hub {args.push_to_hub}: {error}") from None

    source = open_source(args.source, args.base, args.expand)
    runtime = "personaplex" if args.expand else args.format
    merge = args.merge or runtime == "personaplex"
    print(f"weights: {source.weights.origin}")
    if source.adapters is not None:
        fate = "are merged" if merge else "stay adapters"
        why = " (NVIDIA's runtime has no LoRA)" if runtime == "personaplex" else ""
        print(f"adapters: {source.adapters.path}, rank {source.rank}; they {fate}{why}")
    if args.push_to_hub and not merge and source.adapters is not None and source.base.startswith("file://"):
        raise UserError(
            f"{args.source}: its base is on this machine only ({source.base}), so the adapters are of no use on the "
            "hub; use --merge, or give the base's repository as --base"
        )
    began = time.perf_counter()
    config = export(source, args.out, runtime, merge, DTYPES[args.dtype])
    seconds = time.perf_counter() - began
    files = sorted(args.out.iterdir())
    size = sum(path.stat().st_size for path in files) / 1e9
    print(f"wrote {args.out} ({', '.join(path.name for path in files)}): {size:.2f} GB in {seconds:.1f} s")
    if config.get("lora"):
        print(f"the adapters need {config['moshi_name']}")
    if args.push_to_hub:
        print(f"uploaded to {push(args.out, args.push_to_hub)}")
    print(f"how to run it: {args.out / 'README.md'}")


if __name__ == "__main__":
    run(main)
