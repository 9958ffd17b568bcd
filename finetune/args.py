"""The settings of a run as types. Keys are named as in moshi-finetune, whose config files load unchanged."""

import difflib
import os
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

T = TypeVar("T")
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]  # YAML has lists only
Count = Annotated[int, Field(ge=1, le=10**9)]
CountOrZero = Annotated[int, Field(ge=0, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # the range of torch.manual_seed
File = Annotated[str | None, AfterValidator(lambda path: path and os.path.expanduser(path))]
Section = Annotated[T, BeforeValidator(lambda value: {} if value is None else value)]  # `optim:` without content


def _checkpointing(value: object) -> bool | int | str:
    if value == "auto":
        return value
    if isinstance(value, int) and value >= 0:  # booleans are numbers
        return value if value or value is False else True  # 0 layers
    raise PydanticCustomError("checkpointing", "true, false, auto or a number of layers")


class Settings(BaseModel):
    # Strict: "1" is not a number and 1 is not a boolean, because YAML has types of its own.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DataArgs(Settings):
    train_data: str = Field("", description="Manifests: `a.jsonl`, a folder, or a mixture `a.jsonl:0.7,b.jsonl:0.3`.")
    eval_data: str = Field("", description="Held-out manifests, in the same form; required by do_eval.")
    shuffle: bool = Field(False, description="Shuffle the windows; the order of each epoch follows from the seed.")
    num_workers: CountOrZero = Field(2, description="Processes that read ahead; 0 reads in the training process.")
    cache_mb: NonNegative = Field(256, description="Cache of each worker for codes and word times, in MB.")
    max_bad_samples: CountOrZero = Field(100, description="Unreadable windows to skip per epoch before giving up.")
    keep_and_shift: bool = Field(
        True, description="Delay a word until the previous one is out; false truncates the previous one."
    )
    speakers: list[str] = Field(["SPEAKER_MAIN"], description="Speakers whose words become the text stream.")
    skip: list[str] = Field([], description="Windows not to train on, as messages name them: `a.wav at 8.00 s`.")
    drop_tags: bool = Field(True, description="Leave out tags of transcribers, such as `[laughter]`, `<unk>` or `%uh`.")


class PathsArgs(Settings):
    hf_repo_id: str | None = Field(None, description="Hub repository or folder; each script has its own default.")
    moshi_path: File = Field(None, description="LM weights, instead of the repository's.")
    mimi_path: File = Field(None, description="Mimi weights, instead of the repository's.")
    tokenizer_path: File = Field(None, description="Text tokenizer, instead of the repository's.")
    config_path: File = Field(None, description="config.json, instead of the repository's.")


AdapterTarget = Literal[
    "temporal", "temporal.attention", "temporal.gating",
    "depformer", "depformer.attention", "depformer.gating", "depformer.inputs",
    "heads", "heads.text", "heads.audio",
]  # fmt: skip


class LoraArgs(Settings):
    enable: bool = Field(False, description="Train low-rank adapters on a frozen base.")
    rank: Count = Field(64, description="Rank of the adapters.")
    depformer_rank: CountOrZero | None = Field(None, description="Their rank in the depformer, 0 for none; or rank.")
    heads_rank: CountOrZero | None = Field(None, description="Their rank in the output heads, 0 for none; or rank.")
    targets: list[AdapterTarget] = Field(
        ["temporal", "depformer", "heads"],
        description="Parts with adapters: `temporal` (or its `.attention`, `.gating`), `depformer` (or its "
        "`.attention`, `.gating`, `.inputs`), `heads` (or its `.text`, `.audio`).",
    )
    scaling: Positive = Field(2.0, description="Factor on the output of the adapters.")
    ft_embed: bool = Field(False, description="Train the embedding tables too.")
    start_from: File = Field(
        None, description="Run, checkpoint or exported folder whose adapters to go on from, with a new optimizer."
    )

    drift_weight: NonNegative = Field(
        0.0, description="Loss weight of the divergence from the base on an eighth of the frames; a third more time."
    )

    def rank_of(self, part: str) -> int:
        """The rank of the adapters in a part of the model (finetune.lora.part_of); 0 for none."""
        whole = part.partition(".")[0]
        if not {part, whole} & set(self.targets):
            return 0
        own = {"depformer": self.depformer_rank, "heads": self.heads_rank}.get(whole)
        return self.rank if own is None else own


class OptimArgs(Settings):
    lr: Positive = Field(1e-4, description="Peak learning rate.")
    depformer_lr: NonNegative | None = Field(
        None, description="Peak rate of depformer* and linears.*, 0 to freeze them; lr if absent."
    )
    heads_lr: NonNegative | None = Field(
        None, description="Peak rate of the output heads; if absent, lr for text and depformer_lr for audio."
    )
    weight_decay: NonNegative = Field(0.1, description="Weight decay of AdamW, on matrices only.")
    pct_start: Fraction = Field(0.05, description="Fraction of max_steps in which the rate rises to its peak.")
    schedule: Literal["cosine", "constant", "wsd"] = Field(
        "cosine", description="Then a cosine to zero, the peak rate, or the peak rate and in the last fifth a line to "
        "zero (`wsd`), after which runs may go on for longer.",
    )  # fmt: skip
    betas: Betas = Field((0.9, 0.95), description="Betas of AdamW.")
    eps: Positive = Field(1e-8, description="Epsilon of AdamW.")


class PromptArgs(Settings):
    text: str | None = Field(None, description="Role prompt of files without their own.")
    voice: str | None = Field(
        None, description="Voice of files without their own: `same_speaker`, a shipped name, or a file (wav or .pt)."
    )
    voices_dir: File = Field(None, description="Folder of voices; the repository's voices.tgz if absent.")
    drop_text: Fraction = Field(0.0, description="Probability that a window loses its text prompt.")
    drop_voice: Fraction = Field(0.0, description="Probability that a window loses its voice prompt.")
    max_sec: Positive = Field(30.0, description="Longest prompt, in seconds; the end of a longer recording is cut off.")
    reserve_sec: NonNegative = Field(
        0.0, description="Seconds of dialogue that a window gives up for a `same_speaker` voice if it finds no other."
    )
    allow_voiceless: bool = Field(
        False, description="Train windows for which `same_speaker` finds no voice, which are otherwise an error."
    )


_NO_IS_OFF = BeforeValidator(lambda value: "off" if value is False else value)  # `off` is a boolean in YAML


class GuardArgs(Settings):
    action: Annotated[Literal["off", "warn", "stop", "rollback"], _NO_IS_OFF] = Field(
        "warn",
        description="What to do when free-running replies leave the bounds around base and data: nothing, warn, end "
        "the run, or go back to the last good checkpoint and on at half the rate.",
    )
    max_rollbacks: Count = Field(2, description="Times to go back before the run ends.")


class WandbArgs(Settings):
    project: str | None = Field(None, description="Weights & Biases project; not used if absent.")
    offline: bool = Field(False, description="Log to local files only.")
    key: str | None = Field(None, description="API key, never written to disk; WANDB_API_KEY is the better place.")
    run_name: str | None = Field(None, description="Name of the run.")


class TrainArgs(Settings):
    data: Section[DataArgs]
    run_dir: str = Field(description="Folder of the run.", min_length=1)
    moshi_paths: Section[PathsArgs] = PathsArgs()
    lora: Section[LoraArgs] = LoraArgs()
    full_finetuning: bool = Field(False, description="Train every parameter.")
    optim: Section[OptimArgs] = OptimArgs()
    prompt: Section[PromptArgs] = PromptArgs()
    guard: Section[GuardArgs] = GuardArgs()
    wandb: Section[WandbArgs] = WandbArgs()
    tensorboard: bool = Field(False, description="Write the metrics as TensorBoard events too.")

    duration_sec: Positive = Field(10.0, description="Length of a window of dialogue.")
    batch_size: Count = Field(1, description="Windows per microbatch and rank.")
    num_microbatches: Count = Field(1, description="Microbatches per step.")
    max_steps: CountOrZero = Field(100, description="Steps of the run; 0 only checks, loads and evaluates.")
    max_norm: Positive = Field(1.0, description="Clip the global gradient norm to this.")
    max_bad_steps: CountOrZero = Field(
        0, description="Steps whose loss or gradient is not finite to leave out before the run ends."
    )
    seed: Seed = Field(0, description="Seed for data order, adapter initialisation and prompt dropout.")

    first_codebook_weight_multiplier: Positive = Field(1.0, description="Loss weight of semantic over acoustic codes.")
    text_padding_weight: NonNegative = Field(0.5, description="Loss weight of padding over words in the text stream.")
    user_audio_loss_weight: NonNegative = Field(
        1.0, description="Loss weight of the user's codebooks (dep_q 16); at 0 their depformer steps do not run."
    )
    text_loss_weight: NonNegative = Field(1.0, description="Loss weight of the text stream.")
    audio_loss_weight: NonNegative = Field(
        1.0, description="Loss weight of the audio streams; at 0 the depformer does not run and is not trained."
    )

    log_freq: Count = Field(1, description="Steps between metrics.")
    profile_step: Count | None = Field(None, description="Write a profile of this step to run_dir (trace and memory).")
    do_eval: bool = Field(False, description="Evaluate during training; by default on if there is eval_data.")
    eval_freq: CountOrZero = Field(0, description="Steps between evaluations; 0: only at the start and the end.")
    eval_free_samples: CountOrZero = Field(4, description="Held-out windows that each evaluation replies to.")
    eval_free_sec: Positive = Field(20.0, description="Longest such reply, in seconds.")
    eval_max_samples: Count | None = Field(None, description="Windows per evaluation; all if absent.")
    early_stop: Count | None = Field(
        None, description="End the run after this number of evaluations without a better one; never if absent."
    )
    do_ckpt: bool = Field(True, description="Save checkpoints; the last step is always saved.")
    ckpt_freq: CountOrZero = Field(0, description="Steps between checkpoints; 0: only the last.")
    ckpt_every_minutes: Positive | None = Field(None, description="Minutes between checkpoints, besides ckpt_freq.")
    num_ckpt_keep: Count | None = Field(3, description="Newest checkpoints to keep, besides the best; all if null.")
    save_adapters: bool = Field(True, description="LoRA: save the adapters; false saves merged weights.")

    gradient_checkpointing: Annotated[bool | int | Literal["auto"], PlainValidator(_checkpointing)] = Field(
        True, description="Recompute activations: less memory, a third more time. `false` keeps all of them; a number "
        "keeps the expensive ones of that many layers (7B has 38): `plan` says how many fit, and `auto` measures it in "
        "the first two steps.",
    )  # fmt: skip
    param_dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="For computation and frozen weights.")
    base_dtype: Literal["bf16", "int8", "nf4"] = Field(
        "bf16", description="LoRA: store the frozen weights of the layers in 8 (`int8`) or 4 bits (`nf4`), for less "
        "memory and more time; `bf16` stores them as param_dtype says.",
    )  # fmt: skip
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto uses the GPU if there is one.")
    deterministic: bool = Field(
        False,
        description="On a GPU: the same bits in each run on the same card, torch and number of processes; slower.",
    )
    sharding: Literal["full", "hybrid", "none"] = Field(
        "full",
        description="Shard parameters over all ranks (`full`), within a node (`hybrid`), or not at all (`none`; with "
        "LoRA, only adapter gradients are communicated).",
    )
    reduce_every_microbatch: bool = Field(
        False, description="Reduce the gradients of each microbatch, so that no rank holds whole ones between them: "
        "less memory for full fine-tuning in shards, more communication.",
    )  # fmt: skip
    overwrite_run_dir: bool = Field(False, description="Delete the run that run_dir holds and start again.")

    @property
    def recomputation(self) -> bool | int:
        """gradient_checkpointing as a run begins."""
        return True if self.gradient_checkpointing == "auto" else self.gradient_checkpointing

    @property
    def trains_embeddings(self) -> bool:
        return self.full_finetuning or self.lora.ft_embed


# Settings (or whole sections) that may change when a run is resumed; all others decide what the weights become.
# data.drop_tags is one of them, because runs that began without it go on.
CHANGEABLE = {
    "run_dir", "max_steps", "log_freq", "profile_step", "do_eval", "eval_freq", "eval_max_samples", "eval_free_samples",
    "eval_free_sec", "do_ckpt", "ckpt_freq", "ckpt_every_minutes", "num_ckpt_keep", "save_adapters",
    "gradient_checkpointing", "device", "deterministic", "sharding", "reduce_every_microbatch", "overwrite_run_dir",
    "wandb", "tensorboard",
    "data.num_workers", "data.cache_mb", "data.max_bad_samples", "data.skip", "data.drop_tags", "data.eval_data",
    "batch_size", "num_microbatches", "optim", "guard", "early_stop", "max_bad_steps", "prompt.allow_voiceless",
}  # fmt: skip


def _fields(kind: type[Settings], prefix: str = "") -> dict[str, FieldInfo]:
    out = {}
    for name, field in kind.model_fields.items():
        out[prefix + name] = field
        if hasattr(field.annotation, "model_fields"):
            out |= _fields(field.annotation, f"{prefix}{name}.")
    return out


SETTINGS = _fields(TrainArgs)  # by dotted key; sections (`optim`) are entries too


def closest_setting(key: str) -> str | None:
    """Return the setting that a dotted key probably means: one of the same name in any section, else a similar one."""
    section, dot, name = key.rpartition(".")
    same = [known for known in SETTINGS if known.rpartition(".")[2] == name]  # a name occurs in one section only
    siblings = [known.rpartition(".")[2] for known in SETTINGS if known.rpartition(".")[0] == section]
    similar = [section + dot + near for near in difflib.get_close_matches(name, siblings, n=1)]
    return next(iter(same + similar), None)
