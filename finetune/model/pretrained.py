"""The files of a pretrained model: where they are and what they say."""

import json
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
from moshi.models import MimiModel, loaders

from finetune.cli import UserError
from finetune.streams import CODEBOOKS, DEP_Q

# Keys of a config.json that are not arguments of LMModel (moshi/models/loaders.py, CheckpointInfo.from_hf_repo).
_NOT_LM = {
    "moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "lora_name", "model_type", "version",
    "lm_gen_config", "tts_config", "stt_config", "model_id", "lora", "lora_rank", "lora_scaling",
    "depformer_causal",  # in NVIDIA's kwargs; LMModel has no such argument
}  # fmt: skip


@dataclass(frozen=True)
class ModelSpec:
    """A model family: what the trainer has to know that the checkpoint's config does not say."""

    name: str
    default_repo: str
    dep_q: int | None  # depformer steps; None: as the config says
    prompts: bool  # windows begin with a hybrid system prompt


MOSHI = ModelSpec("moshi", "kyutai/moshiko-pytorch-bf16", dep_q=None, prompts=False)
PERSONAPLEX = ModelSpec("personaplex", "nvidia/personaplex-7b-v1", dep_q=DEP_Q, prompts=True)


class Unreachable(UserError):
    """A file of the hub that may well be there: without a network, or without leave, nobody can tell."""


class Pretrained:
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


def open_pretrained(
    hf_repo_id: str,
    moshi_path: str | None = None,
    mimi_path: str | None = None,
    tokenizer_path: str | None = None,
    config_path: str | None = None,
) -> Pretrained:
    """Finds a checkpoint by moshi-finetune's `moshi_paths`: a hub repository or a local folder, single files replaced
    by the given ones (a path, or `hf://owner/repo/file`). Raises UserError if there is no such thing."""
    files = {"moshi_path": moshi_path, "mimi_path": mimi_path, "tokenizer_path": tokenizer_path}
    return Pretrained(hf_repo_id, files, config_path)


def lm_kwargs(checkpoint: Pretrained, spec: ModelSpec) -> dict:
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


def inference_config(checkpoint: Pretrained, kwargs: dict) -> dict:
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
