"""The files of a pretrained model: finding them in a hub repository or a local folder, and reading the small ones."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import sentencepiece
import torch
from huggingface_hub import errors, hf_hub_download
from moshi.models import MimiModel, loaders
from moshi.modules.transformer import set_attention_context

from finetune.audio.codes import fingerprint_file
from finetune.cli import UserError
from finetune.files import why_missing
from finetune.streams import CODEBOOKS, DEP_Q

# Keys of a config.json that are not arguments of LMModel (moshi/models/loaders.py, CheckpointInfo.from_hf_repo).
_NOT_LM = {
    "moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "lora_name", "model_type", "version",
    "lm_gen_config", "tts_config", "stt_config", "model_id", "lora", "lora_rank", "lora_scaling",
    "depformer_causal",  # in NVIDIA's config; LMModel does not accept it
}  # fmt: skip


@dataclass(frozen=True)
class ModelSpec:
    """A model family: what training must know that the config of a checkpoint does not say."""

    name: str
    default_repo: str
    dep_q: int | None  # depformer steps; None: as in the config
    prompts: bool  # windows begin with a hybrid system prompt


MOSHI = ModelSpec("moshi", "kyutai/moshiko-pytorch-bf16", dep_q=None, prompts=False)
PERSONAPLEX = ModelSpec("personaplex", "nvidia/personaplex-7b-v1", dep_q=DEP_Q, prompts=True)


class Unreachable(UserError):
    """A file that the hub may have: without a network or permission, nobody knows whether it is there."""


class Pretrained:
    """The files of a pretrained model in a local folder or a hub repository (its local cache without a network).

    A file is fetched when it is first asked for, so that Mimi alone does not cost 16 GB; what does not exist raises
    UserError then. The arguments are moshi-finetune's `moshi_paths`: a repository or folder, and files in place of its
    own (a path or `hf://owner/repository/file`).

    Attributes:
        source: repository id or folder.
        raw_config: config.json as stored; empty for a repository without one.
        lm_config: arguments of LMModel, before `lm_kwargs` adapts them to a ModelSpec.
    """

    def __init__(
        self, hf_repo_id: str, moshi_path: str | None = None, mimi_path: str | None = None,
        tokenizer_path: str | None = None, config_path: str | None = None,
    ):  # fmt: skip
        self.source = hf_repo_id
        self._given = {"moshi_name": moshi_path, "mimi_name": mimi_path, "tokenizer_name": tokenizer_path}
        self._folder = Path(hf_repo_id) if Path(hf_repo_id).is_dir() else None
        self._config_path = config_path

    @cached_property
    def raw_config(self) -> dict:
        config = Path(self._config_path) if self._config_path else self._find("config.json", required=False)
        return {} if config is None else _read_json(config)

    @cached_property
    def lm_config(self) -> dict:
        lm_config = {k: v for k, v in self.raw_config.items() if k not in _NOT_LM}
        # PersonaPlex's config on the hub names only the model type; Moshiko's first release had no config at all.
        if "dim" not in lm_config:
            lm_config = dict(loaders._lm_kwargs) | lm_config
            if self.raw_config.get("model_type") == "personaplex":
                lm_config["dep_q"] = DEP_Q
        return lm_config

    def _find(self, name: str, required: bool = True) -> Path | None:
        if self._folder is None:
            return _from_hub(self.source, name, required)
        path = self._folder / name
        if path.is_file():
            return path
        if path.is_symlink():
            raise UserError(f"{path}: {why_missing(path)}; download or copy it again")
        if not required:
            return None
        present = ", ".join(sorted(p.name for p in self._folder.iterdir())[:12]) or "nothing"
        raise UserError(
            f"{self._folder}: holds no {name} (it holds {present}); give the folder of a whole model, such as "
            "`huggingface-cli download REPOSITORY --local-dir FOLDER` creates"
        )

    def file(self, key: str, default: str = "") -> Path:
        """The file that config.json names under `key` (else `default`), or the one given in its place."""
        name = self._given.get(key) or self.raw_config.get(key) or default
        if name.startswith("hf://"):
            *repo, file = name.removeprefix("hf://").split("/", 2)
            if len(repo) < 2:
                raise UserError(f"{name}: names no file; write hf://owner/repository/file")
            return _from_hub("/".join(repo), file)
        name = name.removeprefix("file://")
        if not (self._given.get(key) or Path(name).is_absolute()):
            return self._find(name)
        if not Path(name).is_file():
            raise UserError(f"{name}: {why_missing(Path(name))} (given as the {key.replace('_name', ' path')})")
        return Path(name)

    def hub_address(self, key: str, path: Path) -> str | None:
        """`hf://...` of `path`, which `file(key)` returned; None if it is only on this machine."""
        name = self._given.get(key) or str(self.raw_config.get(key) or path.name)
        if name.startswith("hf://"):
            return name
        local = self._folder or self._given.get(key) or Path(name.removeprefix("file://")).is_absolute()
        return None if local else f"hf://{self.source}/{name}"

    def moshi_weights(self) -> Path:
        return self.file("moshi_name", loaders.MOSHI_NAME)

    def mimi_weights(self) -> Path:
        return self.file("mimi_name", loaders.MIMI_NAME)

    def tokenizer_path(self) -> Path:
        return self.file("tokenizer_name", loaders.TEXT_TOKENIZER_NAME)

    def companions(self) -> dict[str, Path]:
        """{key of config.json: file} of Mimi and the text tokenizer."""
        files = {"mimi_name": self.mimi_weights(), "tokenizer_name": self.tokenizer_path()}
        if "mimi_config_name" in self.raw_config:
            files["mimi_config_name"] = self.file("mimi_config_name")
        return files

    def voices_archive(self) -> Path | None:
        """`voices.tgz`, the published voice prompts; None if there is none or it cannot be reached."""
        try:
            return self._find("voices.tgz", required=False)
        except UserError:
            return None

    def mimi_config(self) -> dict | None:
        """Arguments of a Mimi that is not the standard one; None for the standard one."""
        try:
            name = self.raw_config.get("mimi_config_name")
        except Unreachable:
            if self._given.get("mimi_name"):  # with --mimi-path nothing else is needed
                return None
            raise
        return None if name is None else _read_json(self.file("mimi_config_name"))

    def mimi_context(self, dep_q: int | None = None) -> int:
        """Return how many keys Mimi's attention sees in the runtime that serves a model of `dep_q` depformer steps.

        Kyutai's runtime uses all of its ring of keys: 250, 10 s, in the published Mimi. NVIDIA's gives the oldest key
        of a full ring a position in the future, which the mask then hides (NVIDIA/personaplex, modules/transformer.py:
        `delta <= 0` in RingKVCache.complete): 249.

        Args:
            dep_q: None: as in the config, which names 8 steps where weights will be expanded to 16.
        """
        transformer = (self.mimi_config() or loaders._mimi_config).get("transformer")
        keys = transformer.get("context") if isinstance(transformer, dict) else None
        if type(keys) is not int:
            raise UserError(f"{self.file('mimi_config_name')}: names no transformer.context; download or copy it again")
        if dep_q is None:
            try:
                dep_q = self.lm_config.get("dep_q")
            except Unreachable:
                if not self._given.get("mimi_name"):  # with --mimi-path nothing else is needed
                    raise
        return keys - 1 if dep_q == DEP_Q else keys

    def mimi_fingerprint(self, dep_q: int | None = None) -> str:
        """Return `fingerprint_mimi` of `mimi(dep_q=dep_q)`, without building it."""
        return fingerprint_file(self.mimi_weights(), self.mimi_context(dep_q))

    def mimi(self, device: torch.device | str = "cpu", dep_q: int | None = None) -> MimiModel:
        """Mimi as in the runtime of a model of `dep_q` depformer steps (see `mimi_context`).

        It has the 8 codebooks of one channel (`CheckpointInfo.get_mimi` would set 16 for PersonaPlex).
        """
        path, config, context = self.mimi_weights(), self.mimi_config(), self.mimi_context(dep_q)
        try:
            mimi = loaders.get_mimi(path, config, device=device, num_codebooks=CODEBOOKS)
        except Exception as error:  # torch raises nearly anything on a file that is not its own
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{path}: does not load as a Mimi of this configuration ({reason})") from None
        set_attention_context(mimi, context)
        return mimi

    def tokenizer(self) -> sentencepiece.SentencePieceProcessor:
        """The text tokenizer. Raises UserError if it has more tokens than the model's text table has rows."""
        path, rows = self.tokenizer_path(), self.lm_config["text_card"]
        try:
            tokenizer = sentencepiece.SentencePieceProcessor(str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path}: not a SentencePiece model ({error}); download or copy it again") from None
        if tokenizer.vocab_size() > rows:
            raise UserError(
                f"{path}: has {tokenizer.vocab_size()} pieces, but the model's text table has {rows} rows; check "
                "moshi_paths.tokenizer_path"
            )
        return tokenizer


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); download or copy it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no settings ({{...}}); download or copy it again")
    return values


def _from_hub(repo: str, name: str, required: bool = True) -> Path | None:
    """Fetch a file of a hub repository, unless it is in the local cache; None if it is missing and not `required`."""
    try:
        return Path(hf_hub_download(repo, name))
    except errors.LocalEntryNotFoundError:
        raise Unreachable(
            f"{repo}: {name} is not in the local hub cache and the hub cannot be reached; connect once, or give a "
            "local folder instead (moshi_paths.hf_repo_id, --hf-repo)"
        ) from None
    except errors.EntryNotFoundError:
        if required:
            raise UserError(f"{repo}: the repository has no file {name}") from None
        return None
    except errors.GatedRepoError:
        raise Unreachable(
            f"{repo}: access is gated; accept its licence on huggingface.co, and run `huggingface-cli login`"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(f"{repo}: neither a local folder nor a repository of the hub") from None
    except OSError as error:
        raise Unreachable(f"{repo}: {name} could not be fetched ({error})") from None


def lm_kwargs(checkpoint: Pretrained, spec: ModelSpec) -> dict:
    """The arguments of LMModel for a checkpoint under a spec. Raises UserError for models that cannot be trained."""
    kwargs = dict(checkpoint.lm_config)
    if spec.dep_q is not None:
        kwargs["dep_q"] = spec.dep_q
    for key in ("conditioners", "fuser"):
        if kwargs.pop(key, None):
            raise UserError(f"{checkpoint.source}: a model with {key} cannot be trained here")
    kwargs.pop("demux_second_stream", None)
    _check_sizes(checkpoint.source, kwargs)
    if kwargs["n_q"] != 2 * CODEBOOKS or kwargs["dep_q"] not in (CODEBOOKS, DEP_Q):
        raise UserError(
            f"{checkpoint.source}: has n_q {kwargs['n_q']} and dep_q {kwargs['dep_q']}; full-duplex training needs "
            f"n_q {2 * CODEBOOKS} (agent and user) and dep_q {CODEBOOKS} (Moshi) or {DEP_Q} (PersonaPlex)"
        )
    delays = kwargs.get("delays")
    if not isinstance(delays, list) or len(delays) != kwargs["n_q"] + 1 or any(d not in range(100) for d in delays):
        raise UserError(f"{checkpoint.source}: in its config.json delays must be a list of {kwargs['n_q'] + 1} frames")
    return kwargs


def _check_sizes(source: str, kwargs: dict) -> None:
    """Raise UserError for a config that lacks a size of the model, or has one that nobody could build."""
    limits = {"dim": 10**6, "num_heads": 10**4, "num_layers": 1000, "n_q": 64, "dep_q": 64, "card": 10**6,
              "text_card": 10**7, "depformer_dim": 10**6, "depformer_num_layers": 1000}  # fmt: skip
    for key, limit in limits.items():
        if type(kwargs.get(key)) is not int or not 0 < kwargs[key] <= limit:
            found = repr(kwargs[key])[:40] if key in kwargs else "missing"
            raise UserError(f"{source}: in its config.json {key} is {found}; it must be a whole number up to {limit:,}")
