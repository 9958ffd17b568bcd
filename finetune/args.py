"""The settings of a run as types. Key names are moshi-finetune's wherever it has the setting, so its files load
unchanged."""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what torch takes


def _expand(value: str | None) -> str | None:
    return str(Path(value).expanduser()) if value and value.startswith("~") else value


File = Annotated[str | None, AfterValidator(_expand)]


class Settings(BaseModel):
    # Strict: "1" is no number and 1 no boolean; YAML has types of its own.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DataArgs(Settings):
    train_data: str = Field(
        "", description="Manifests: `a.jsonl`, a folder of them, or a mixture `a.jsonl:0.7,b.jsonl:0.3`."
    )
    eval_data: str = Field("", description="The same for held-out data; needed when do_eval is on.")
    shuffle: bool = Field(False, description="A new order each epoch, from the seed.")
    num_workers: CountOrZero = Field(2, description="Processes that read ahead; 0 reads in the training process.")
    cache_mb: NonNegative = Field(256, description="Memory of each worker for codes and word times, in MB.")
    max_bad_samples: CountOrZero = Field(100, description="Windows that may be skipped in a pass over the data.")
    keep_and_shift: bool = Field(
        True, description="A word due too early waits; false cuts the one before (moshi-finetune)."
    )
    speakers: list[str] = Field(["SPEAKER_MAIN"], description="Whose words make the text stream.")


class PathsArgs(Settings):
    hf_repo_id: str | None = Field(
        None, description="Hub repository or local folder; the script's own model if absent."
    )
    moshi_path: File = Field(None, description="LM weights in place of the repository's.")
    mimi_path: File = Field(None, description="Mimi weights in place of the repository's.")
    tokenizer_path: File = Field(None, description="Text tokenizer in place of the repository's.")
    config_path: File = Field(None, description="config.json in place of the repository's.")


class LoraArgs(Settings):
    enable: bool = Field(False, description="Train low-rank adapters over a frozen base.")
    rank: Count = Field(64, description="Rank of the adapters.")
    scaling: Positive = Field(2.0, description="Factor of the adapters' output.")
    ft_embed: bool = Field(False, description="Train the embedding tables too.")


class OptimArgs(Settings):
    lr: Positive = Field(1e-4, description="Peak learning rate.")
    depformer_lr: Positive | None = Field(None, description="Peak rate of depformer* and linears.*; lr if absent.")
    weight_decay: NonNegative = Field(0.1, description="AdamW's, on matrices.")
    pct_start: Share = Field(0.05, description="Share of max_steps that warms up; a cosine to zero follows.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="Adam's betas.")
    eps: Positive = Field(1e-8, description="Adam's epsilon.")


class PromptArgs(Settings):
    text: str | None = Field(None, description="Role prompt of files that bring none.")
    voice: str | None = Field(
        None,
        description="Voice of files that bring none: `same_speaker`, a shipped name, or a wav or .pt (an absolute "
        "path, or a name in voices_dir).",
    )
    voices_dir: File = Field(None, description="Folder of voices; the repository's voices.tgz if absent.")
    drop_text: Share = Field(0.0, description="Probability that a window goes without its text prompt.")
    drop_voice: Share = Field(0.0, description="Probability that a window goes without its voice prompt.")
    max_sec: Positive = Field(30.0, description="Longest prompt, in seconds; a longer recording is cut from its end.")


class WandbArgs(Settings):
    project: str | None = Field(None, description="Weights & Biases project; absent: not used.")
    offline: bool = Field(False, description="Keep the files local.")
    key: str | None = Field(None, description="API key; WANDB_API_KEY is the better place. Never written anywhere.")
    run_name: str | None = Field(None, description="Name of the run.")


class TrainArgs(Settings):
    data: DataArgs
    run_dir: str = Field(description="Folder of the run.", min_length=1)
    moshi_paths: PathsArgs = PathsArgs()
    lora: LoraArgs = LoraArgs()
    full_finetuning: bool = Field(False, description="Train every parameter.")
    optim: OptimArgs = OptimArgs()
    prompt: PromptArgs = PromptArgs()
    wandb: WandbArgs = WandbArgs()
    tensorboard: bool = Field(False, description="Write TensorBoard events beside the metrics.")

    duration_sec: Positive = Field(10.0, description="Length of a window of dialogue.")
    batch_size: Count = Field(1, description="Windows of one microbatch on one rank.")
    num_microbatches: Count = Field(1, description="Microbatches of one step.")
    max_steps: CountOrZero = Field(100, description="Steps of the run; 0 only checks, loads and evaluates.")
    max_norm: Positive = Field(1.0, description="Clips the global gradient norm.")
    seed: Seed = Field(0, description="Of order, adapters and prompt drop-out.")

    first_codebook_weight_multiplier: Positive = Field(
        1.0, description="Loss weight of semantic over acoustic codebooks."
    )
    text_padding_weight: NonNegative = Field(0.5, description="Loss weight of padding over words in the text stream.")
    user_audio_loss_weight: NonNegative = Field(1.0, description="Loss weight of the user's codebooks (dep_q 16).")

    log_freq: Count = Field(1, description="Steps between metrics.")
    do_eval: bool = Field(False, description="Evaluate during training; if not set: on where there is eval_data.")
    eval_freq: CountOrZero = Field(0, description="Steps between evaluations; 0: only at the start and the end.")
    eval_free_samples: CountOrZero = Field(4, description="Held-out users that an evaluation replies to, freely.")
    eval_free_sec: Positive = Field(20.0, description="Longest such reply, in seconds.")
    eval_max_samples: Count | None = Field(None, description="Windows of an evaluation; all if absent.")
    do_ckpt: bool = Field(True, description="Save checkpoints, the last step's always.")
    ckpt_freq: CountOrZero = Field(0, description="Steps between checkpoints; 0: only the last.")
    ckpt_every_minutes: Positive | None = Field(None, description="Minutes between checkpoints, besides ckpt_freq.")
    num_ckpt_keep: Count | None = Field(3, description="Checkpoints kept, the newest ones; all if null.")
    save_adapters: bool = Field(True, description="LoRA: save adapters; false saves merged weights.")

    gradient_checkpointing: bool = Field(True, description="Recompute activations: less memory, a third more time.")
    param_dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Of frozen weights and of computation.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes the GPU if there is one.")
    sharding: Literal["full", "hybrid", "none"] = Field(
        "full",
        description="`full`: parameters cut over all ranks; `hybrid`: within a node; `none`: not cut (with LoRA only "
        "adapters' gradients travel).",
    )
    compile: bool = Field(False, description="torch.compile on each layer of the training forward.")
    overwrite_run_dir: bool = Field(False, description="Start anew where run_dir holds a run.")

    @property
    def trains_embeddings(self) -> bool:
        return self.full_finetuning or self.lora.ft_embed


# Settings that a resumed run may bring anew; all others decide what the weights become.
CHANGEABLE = {
    "run_dir", "max_steps", "log_freq", "do_eval", "eval_freq", "eval_max_samples", "eval_free_samples",
    "eval_free_sec", "do_ckpt", "ckpt_freq",
    "ckpt_every_minutes", "num_ckpt_keep", "save_adapters", "gradient_checkpointing", "device", "sharding", "compile",
    "overwrite_run_dir", "wandb", "tensorboard", "data.num_workers", "data.cache_mb", "data.max_bad_samples",
    "data.eval_data", "batch_size", "num_microbatches",
}  # fmt: skip


def settings_table() -> str:
    """All settings as a Markdown table, for README.md."""
    lines = ["| setting | default | |", "|---|---|---|"]

    def add(kind: type[Settings], prefix: str) -> None:
        for name, field in kind.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
                continue
            default = "required"
            if not field.is_required():
                value = list(field.default) if isinstance(field.default, tuple) else field.default
                default = f"`{json.dumps(value)}`"
            lines.append(f"| `{prefix}{name}` | {default} | {field.description} |")

    add(TrainArgs, "")
    for name, field in TrainArgs.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            add(field.annotation, f"{name}.")
    return "\n".join(lines)
