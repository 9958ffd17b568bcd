"""The two model families as specs, and how their files are found, built, filled with weights and sharded."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import sentencepiece
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from moshi.models import LMModel, MimiModel, loaders
from torch import nn
from torch.distributed.tensor import DTensor

from finetune import lora
from finetune.cli import UserError
from finetune.personaplex import CODEBOOKS, DEP_Q, expansion_plan
from finetune.weights import WeightFile

# Keys of a config.json that are not arguments of LMModel (moshi/models/loaders.py, CheckpointInfo.from_hf_repo).
_NOT_LM = {
    "moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "lora_name", "model_type", "version",
    "lm_gen_config", "tts_config", "stt_config", "model_id", "lora", "lora_rank", "lora_scaling",
    "depformer_causal",  # in NVIDIA's kwargs; LMModel has no such argument
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """A model family: what the trainer has to know that the checkpoint's config does not say."""

    name: str
    default_repo: str
    dep_q: int | None  # depformer steps; None: as the config says
    prompts: bool  # windows begin with a hybrid system prompt


MOSHI = Spec("moshi", "kyutai/moshiko-pytorch-bf16", dep_q=None, prompts=False)
PERSONAPLEX = Spec("personaplex", "nvidia/personaplex-7b-v1", dep_q=DEP_Q, prompts=True)


class Unreachable(UserError):
    """A file of the hub that may well be there: without a network, or without leave, nobody can tell."""


class Checkpoint:
    """The files of a pretrained model: a hub repository (from the local cache without a network) or a folder.

    Nothing is fetched before it is asked for, so that Mimi alone does not cost 16 GB.

    Attributes:
        source: repository id or folder.
        raw_config: config.json as stored; empty for repositories without one.
        lm_config: arguments of LMModel; `dep_q` as the config says, not yet as a spec wants it.
    """

    def __init__(self, source: str, files: dict[str, str | None], config_path: str | None):
        self.source = source
        self._files = files
        self._folder = Path(source) if Path(source).is_dir() else None
        self._config_path = config_path

    @cached_property
    def raw_config(self) -> dict:
        config = Path(self._config_path) if self._config_path else self._find("config.json", required=False)
        if config is None:
            return {}
        return _read_json(config)

    @cached_property
    def lm_config(self) -> dict:
        lm_config = {k: v for k, v in self.raw_config.items() if k not in _NOT_LM}
        # The hub's PersonaPlex config names the type only; Moshiko's first release had no config at all.
        if "dim" not in lm_config:
            lm_config = dict(loaders._lm_kwargs) | lm_config
            if self.raw_config.get("model_type") == "personaplex":
                lm_config["dep_q"] = DEP_Q
        return lm_config

    def _find(self, name: str, required: bool = True) -> Path | None:
        if self._folder is not None:
            path = self._folder / name
            if path.is_file():
                return path
            if not required:
                return None
            have = ", ".join(sorted(p.name for p in self._folder.iterdir())[:12]) or "nothing"
            # It says what the other files are called.
            nor = "" if (self._folder / "config.json").is_file() else ", nor a config.json"
            raise UserError(
                f"{self._folder}: holds no {name} (it holds {have}){nor}; give the folder of a whole model, as "
                "`huggingface-cli download REPOSITORY --local-dir FOLDER` makes it"
            )
        return _from_hub(self.source, name, required)

    def file(self, what: str, config_key: str, default: str) -> Path:
        given = self._files.get(what)
        name = given or self.raw_config.get(config_key) or default
        if name.startswith("hf://"):
            owner, _, rest = name.removeprefix("hf://").partition("/")
            repo, _, rest = rest.partition("/")
            if not rest:
                raise UserError(f"{name}: names no file; write hf://owner/repository/file")
            return _from_hub(f"{owner}/{repo}", rest)
        name = name.removeprefix("file://")
        if given or Path(name).is_absolute():
            if not Path(name).is_file():
                raise UserError(f"{name}: no such file (given as the {what.replace('_', ' ')})")
            return Path(name)
        return self._find(name)

    def locate(self, key: str, path: Path) -> str:
        """A file of this checkpoint (named in its config under `key`) as moshi's `hf_get` finds it from anywhere:
        hf://... or file://..."""
        named = str(self.raw_config.get(key, ""))
        replaced = any(path == Path(given) for given in self._files.values() if given)
        if named.startswith("hf://") and not replaced:
            return named
        if self._folder is None and not replaced:
            return f"hf://{self.source}/{path.name}"
        return f"file://{path.resolve()}"

    def moshi_weights(self) -> Path:
        return self.file("moshi_path", "moshi_name", loaders.MOSHI_NAME)

    def mimi_weights(self) -> Path:
        return self.file("mimi_path", "mimi_name", loaders.MIMI_NAME)

    def tokenizer_path(self) -> Path:
        return self.file("tokenizer_path", "tokenizer_name", loaders.TEXT_TOKENIZER_NAME)

    def voices_archive(self) -> Path | None:
        """`voices.tgz`, the shipped voice prompts; None if the source has none, or it cannot be reached."""
        try:
            return self._find("voices.tgz", required=False)
        except UserError:
            return None

    def mimi_config(self) -> dict | None:
        """Arguments of a Mimi that is not the standard one; None for that, also where Mimi's file is given and the hub
        cannot be reached: with --mimi-path nothing else is needed."""
        try:
            name = self.raw_config.get("mimi_config_name")
        except Unreachable:
            if not self._files.get("mimi_path"):
                raise
            name = None
        if name is None:
            return None
        return _read_json(self.file("mimi_config", "mimi_config_name", name))

    def mimi(self, device: torch.device | str = "cpu") -> MimiModel:
        """Mimi with the 8 codebooks of one channel (`CheckpointInfo.get_mimi` would set 16 for PersonaPlex)."""
        path, config = self.mimi_weights(), self.mimi_config()
        try:
            return loaders.get_mimi(path, config, device=device, num_codebooks=CODEBOOKS)
        except Exception as error:  # torch raises nearly anything on what is no file of its own
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{path}: does not load as a Mimi of this configuration ({reason})") from None

    def tokenizer(self) -> sentencepiece.SentencePieceProcessor:
        """The text tokenizer. Raises UserError if it has tokens that the model's text table does not hold."""
        tokenizer, rows = load_tokenizer(self.tokenizer_path()), self.lm_config["text_card"]
        if tokenizer.vocab_size() > rows:
            raise UserError(
                f"{self.tokenizer_path()}: has {tokenizer.vocab_size()} pieces, and the model's text table {rows} "
                "rows: it is another model's; check moshi_paths.tokenizer_path"
            )
        return tokenizer


def load_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model. Raises UserError if the file is none."""
    try:
        return sentencepiece.SentencePieceProcessor(str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: not a SentencePiece model ({error}); download or copy it again") from None


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); download or copy it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no settings ({{...}}); download or copy it again")
    return values


def _from_hub(repo: str, name: str, required: bool = True) -> Path | None:
    """A file of a hub repository, from the local cache if it is there; None if the repository has none by that name
    and it is not `required`."""
    try:
        return Path(hf_hub_download(repo, name))
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise Unreachable(
                f"{repo}: {name} is not in the local hub cache and the hub cannot be reached; "
                "connect once, or give a local folder in its place (moshi_paths.hf_repo_id, --hf-repo)"
            ) from None
        if not required:
            return None
        raise UserError(f"{repo}: the repository has no file {name}") from None
    except GatedRepoError:
        raise Unreachable(
            f"{repo}: access is gated; accept its licence on huggingface.co and run "
            "`huggingface-cli login` (or set HF_TOKEN)"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"{repo}: neither a local folder nor a repository of the hub") from None
    except OSError as error:
        raise Unreachable(f"{repo}: {name} could not be fetched ({error})") from None


def open_checkpoint(
    hf_repo_id: str,
    moshi_path: str | None = None,
    mimi_path: str | None = None,
    tokenizer_path: str | None = None,
    config_path: str | None = None,
) -> Checkpoint:
    """Finds a checkpoint by moshi-finetune's `moshi_paths`: a hub repository or a local folder, single files replaced
    by the given ones (a path, or `hf://owner/repo/file`). Raises UserError if there is no such thing."""
    files = {"moshi_path": moshi_path, "mimi_path": mimi_path, "tokenizer_path": tokenizer_path}
    return Checkpoint(hf_repo_id, files, config_path)


READERS = 2  # one waits for the disk while the kernel clears the memory that the other reads into

# --- Building and filling the LM --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """Where the weights of a model came from."""

    weights: Path
    stored_dep_q: int
    expanded: bool  # 8 -> 16 depformer steps on load

    def __str__(self) -> str:
        if self.expanded:
            return f"{self.weights}: Moshi weights ({self.stored_dep_q} codebooks), expanded to {DEP_Q}"
        family = "PersonaPlex" if self.stored_dep_q == DEP_Q else "Moshi"
        return f"{self.weights}: {family} weights ({self.stored_dep_q} codebooks), loaded as they are"


class Weights:
    """The stored weights as the spec's model wants them: names split, steps expanded where the file has 8."""

    def __init__(self, path: Path, dep_q: int):
        self.file = WeightFile(path)
        stored = self.file.dep_q
        if stored == dep_q:
            self.sources: dict[str, str | None] = {name: name for name in self.file.slots}
        elif stored == CODEBOOKS and dep_q == DEP_Q:
            try:
                self.sources = expansion_plan(set(self.file.slots))
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
        else:
            raise UserError(
                f"{path}: holds {stored} depformer steps where this model has {dep_q}; check moshi_paths"
            )
        self.origin = Origin(path, stored, expanded=stored != dep_q)

    def check(self, shapes: dict[str, torch.Size]) -> None:
        """Raises UserError unless the file holds exactly these parameters, in these shapes."""
        problems = [f"no {name}" for name in sorted(shapes.keys() - self.sources.keys())]
        problems += [f"an unknown {name}" for name in sorted(self.sources.keys() - shapes.keys())]
        for name, source in self.sources.items():
            if source is not None and name in shapes and tuple(shapes[name]) != self.file.slots[source].shape:
                problems.append(
                    f"{name} of shape {list(self.file.slots[source].shape)} instead of {list(shapes[name])}"
                )
        if problems:
            more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
            raise UserError(
                f"{self.file.path}: does not fit the model's config: it has {'; '.join(problems[:4])}{more}; weights "
                "and config.json have to be of one model"
            )

    def read(self, name: str, start: int, stop: int, shape: torch.Size) -> torch.Tensor:
        """Rows [start, stop) of a parameter of this shape."""
        source = self.sources[name]
        if source is None:
            return torch.zeros(max(0, min(stop, shape[0]) - start), *shape[1:])
        return self.file.read(source, start, stop)

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fills `out` with a parameter's rows from `start` on."""
        source = self.sources[name]
        if source is None:
            out.zero_()
        else:
            self.file.read_into(source, start, out)


def embed_column(read: Callable[[str, int, int], torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """The temporal transformer's input for one delayed column, [17] -> [dim] float32, of a model that is not loaded.

    Args:
        read: rows [start, stop) of a parameter.
    """
    names = ["text_emb.weight", *(f"emb.{i}.weight" for i in range(len(tokens) - 1))]
    rows = [read(name, token, token + 1)[0].float() for name, token in zip(names, tokens.tolist()) if token >= 0]
    return torch.stack(rows).sum(0)


def lm_kwargs(checkpoint: Checkpoint, spec: Spec) -> dict:
    """The arguments of LMModel for a checkpoint under a spec. Raises UserError for models that cannot be trained."""
    kwargs = dict(checkpoint.lm_config)
    if spec.dep_q is not None:
        kwargs["dep_q"] = spec.dep_q
    for key in ("conditioners", "fuser"):
        if kwargs.pop(key, None):
            raise UserError(f"{checkpoint.source}: a model with {key} cannot be trained here")
    kwargs.pop("demux_second_stream", None)
    if kwargs["n_q"] != 2 * CODEBOOKS or kwargs["dep_q"] not in (CODEBOOKS, DEP_Q):
        raise UserError(
            f"{checkpoint.source}: has n_q {kwargs['n_q']} and dep_q {kwargs['dep_q']}; full-duplex training needs "
            f"n_q {2 * CODEBOOKS} (agent and user) and dep_q {CODEBOOKS} (Moshi) or {DEP_Q} (PersonaPlex)"
        )
    return kwargs


def build_lm(kwargs: dict, dtype: torch.dtype) -> LMModel:
    """An LMModel without memory (meta device). Raises UserError if moshi refuses the arguments."""
    try:
        with torch.device("meta"):  # parts of moshi make tensors on the default device first: 1 GB at 7B
            return LMModel(device="meta", dtype=dtype, **{k: v for k, v in kwargs.items() if k != "device"})
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(f"the LM config does not fit moshi's LMModel: {error}") from None


def inference_config(checkpoint: Checkpoint, kwargs: dict) -> dict:
    """The config.json that goes with weights trained from a checkpoint: moshi's loaders need nothing else to find the
    same Mimi and tokenizer."""
    config = dict(kwargs) | {"model_type": checkpoint.raw_config.get("model_type", "moshi")}
    names = {"mimi_name": checkpoint.mimi_weights, "tokenizer_name": checkpoint.tokenizer_path}
    for key, path in names.items():
        config[key] = checkpoint.locate(key, path())
    if "mimi_config_name" in checkpoint.raw_config:
        name = checkpoint.raw_config["mimi_config_name"]
        path = checkpoint.file("mimi_config", "mimi_config_name", name)
        config["mimi_config_name"] = checkpoint.locate("mimi_config_name", path)
    return config


def base_name(name: str) -> str:
    """The stock name of a parameter of a model with LoRA."""
    return name.replace(".frozen_W.", ".")


def set_trainable(lm: nn.Module, full: bool, ft_embed: bool) -> None:
    """Marks what is trained and gives it float32; the frozen rest keeps the dtype it was built in.

    Args:
        full: everything; else adapters only.
        ft_embed: the embedding tables too (moshi-finetune's `lora.ft_embed`).
    """
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_(full or lora.is_adapter(name) or (ft_embed and lora.is_embedding(name)))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def fill(lm: nn.Module, weights: Weights, seed: int) -> None:
    """Gives a model that has memory (`to_empty`) its values: the base from the file, adapters fresh.

    Each rank reads only the rows that it keeps, one tensor at a time. Adapters depend on (seed, name) alone, so that
    any number of ranks starts from the same ones. Raises UserError if the file holds other parameters.
    """
    weights.check({base_name(n): p.shape for n, p in lm.named_parameters() if not lora.is_adapter(n)})

    def fill_one(named: tuple[str, nn.Parameter]) -> None:
        name, parameter = named
        start, local = local_rows(parameter)
        if lora.is_adapter(name):
            local.copy_(lora.initial(name, parameter.shape, seed)[start : start + local.shape[0]])
        else:
            weights.read_into(base_name(name), start, local)

    with ThreadPoolExecutor(READERS) as readers:
        list(readers.map(torch.no_grad()(fill_one), lm.named_parameters()))


def local_rows(parameter: torch.Tensor) -> tuple[int, torch.Tensor]:
    """(first row, the rows) of a parameter that this rank holds; all of it unless it is sharded."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.data
    local = parameter.to_local()
    for dim, placement in enumerate(parameter.placements):
        if placement.is_shard():  # FSDP2 cuts rows like torch.chunk: equal pieces, the last ones shorter
            piece = -(-parameter.shape[0] // parameter.device_mesh.size(dim))
            start = min(piece * parameter.device_mesh.get_local_rank(dim), parameter.shape[0])
            return start, local.data
    return 0, local.data
