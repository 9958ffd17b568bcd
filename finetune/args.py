"""The YAML of a run as typed settings. Key names are moshi-finetune's where it has them, so its files load unchanged.

Every problem of a file is reported at once, before a model is loaded or a folder touched.
"""

import difflib
import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Annotated, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from finetune.cli import UserError

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


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that `2e-6` is a number and that a key may not stand twice."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> object:
    """A YAML document as plain values."""
    return yaml.load(text, Loader=_Loader)


def read_settings(path: Path) -> dict:
    """The settings of a YAML file as plain values. Raises UserError where there are none."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give a YAML file")
    if not path.is_file():
        raise UserError(f"{path}: no such config file")
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); give YAML, saved as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        at = f", line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", None) or str(error)
        hint = "; indent with spaces" if r"'\t'" in problem else ""
        raise UserError(f"{path}{at}: not YAML ({problem}{hint})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds no settings (key: value)")
    return raw


def load_args(config: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> TrainArgs:
    """Reads a run's settings.

    Args:
        overrides: `key.subkey=value`, the value in YAML.
    Raises:
        UserError: lists every problem of the file and the overrides.
    """
    path = Path(config)
    raw = read_settings(path)
    problems: list[str] = []
    faulty: set[str] = set()
    for override in overrides:
        _apply(raw, override, problems)
    plain = _plain(raw, TrainArgs)
    if isinstance(plain.get("data"), dict):
        plain.setdefault("do_eval", bool(plain["data"].get("eval_data")))
    try:
        args = TrainArgs.model_validate(plain)
    except ValidationError as error:
        problems += [_sentence(e) for e in error.errors()]
        faulty = {meant for e in error.errors() if (meant := _meant(e))}
        args = _without_faults(plain, error)
    if args is not None:  # what a fault has brought about is no problem of its own
        caused = lambda problem: any(re.search(rf"\b{re.escape(key)}\b", problem) for key in faulty)
        problems += [problem for problem in _combinations(args) if not caused(problem)]
    if problems:
        raise UserError(listing(f"{path}: {_plural(len(problems), 'problem')}", problems))
    return args


def listing(head: str, problems: list[str]) -> str:
    """One sentence, or a head and one line for each problem."""
    if len(problems) == 1:
        return f"{head.split(': ')[0]}: {problems[0]}"
    return head + "".join(f"\n  - {p}" for p in problems)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _apply(raw: dict, override: str, problems: list[str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        problems.append(f"override {override!r}: write it as key.subkey=value")
        return
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        problems.append(f"override {override!r}: its value is not YAML")
        return
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        if node.get(parent) is None:  # absent, or a section without anything in it
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            problems.append(f"override {override!r}: {parent} holds a value, not settings")
            return
    node[last] = value


def _plain(raw: dict, model: type[Settings]) -> dict:
    """The values as the strict settings want them: whole numbers for floats, lists for tuples, null sections gone."""
    out = {}
    for key, value in raw.items():
        key = str(key)  # `1: 2` is YAML, too
        field = model.model_fields.get(key)
        kind = field.annotation if field else None
        if isinstance(kind, type) and issubclass(kind, Settings):
            value = {} if value is None else value
            out[key] = _plain(value, kind) if isinstance(value, dict) else value
        elif isinstance(value, int) and not isinstance(value, bool) and _takes(kind, float) and not _takes(kind, int):
            out[key] = float(value)
        elif isinstance(value, list) and key == "betas":
            out[key] = tuple(float(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in value)
        else:
            out[key] = value
    return out


def _without_faults(plain: dict, error: ValidationError) -> TrainArgs | None:
    """The settings with each faulty one at its default, so that the rest can be checked too."""
    for fault in error.errors():
        node, loc = plain, [part for part in fault["loc"] if isinstance(part, str) and part != "float"]
        if not loc:  # a key that is no string: no other setting can be told from it
            return None
        for part in loc[:-1]:
            if not isinstance(node.get(part), dict):
                break
            node = node[part]
        else:
            node.pop(loc[-1], None)
            if loc == ["run_dir"]:
                plain["run_dir"] = "unset"
            elif loc == ["data"]:
                plain["data"] = {"train_data": str(Path.cwd()), "eval_data": str(Path.cwd())}
    try:
        return TrainArgs.model_validate(plain)
    except ValidationError:
        return None


def _takes(kind: object, wanted: type) -> bool:
    return kind is wanted or any(_takes(a, wanted) for a in get_args(kind))


def _sentence(error: dict) -> str:
    where = _name(error)
    if error["type"] == "extra_forbidden":
        if meant := _meant(error):
            return f"{where} is not a setting; did you mean {meant}?"
        section = ".".join(error["loc"][:-1])
        has = f"{section} has {', '.join(_section(error).model_fields)}" if section else "README.md lists all of them"
        return f"{where} is not a setting; {has}"
    if error["type"] == "missing":
        about = TrainArgs.model_fields[where].description or "a section of settings"
        return f"{where} is missing; name it ({about.rstrip('.').lower()})"
    message = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    message = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}.get(
        message.partition(",")[0], message
    )
    found = "of the wrong type" if where == "wandb.key" else repr(error["input"])  # never show a key
    return f"{where} is {found}; it must be {message}"


def _name(error: dict) -> str:
    return ".".join(str(p) for p in error["loc"] if p != "float")


def _section(error: dict) -> type[Settings]:
    """The settings among which an unknown one stands."""
    model = TrainArgs
    for parent in error["loc"][:-1]:
        model = model.model_fields[parent].annotation
    return model


def _meant(error: dict) -> str | None:
    """The setting that a fault is about; of an unknown key the one that was meant, if it can be told."""
    if error["type"] != "extra_forbidden":
        return _name(error)
    *parents, last = error["loc"]
    elsewhere = [f"{name}.{last}" for name, f in TrainArgs.model_fields.items()
                 if isinstance(f.annotation, type) and issubclass(f.annotation, Settings)
                 and last in f.annotation.model_fields]  # fmt: skip
    elsewhere += [last] if parents and last in TrainArgs.model_fields else []
    near = difflib.get_close_matches(last, _section(error).model_fields, n=1)
    return next(iter(elsewhere + [".".join([*parents, name]) for name in near]), None)


def _combinations(args: TrainArgs) -> list[str]:
    """What single values cannot show: settings that contradict each other, and files that are not there."""
    problems = []
    if args.full_finetuning and args.lora.enable:
        problems.append("full_finetuning and lora.enable are both on; choose one")
    if not args.full_finetuning and not args.lora.enable:
        problems.append("nothing is trained: set full_finetuning or lora.enable to true")
    if not args.data.train_data:
        problems.append("data.train_data is empty; name a manifest (.jsonl)")
    if args.do_eval and not args.data.eval_data:
        problems.append("do_eval is on but data.eval_data is empty; name held-out data or set do_eval to false")
    for key in ("train_data", "eval_data"):
        value = getattr(args.data, key)
        if value and (key == "train_data" or args.do_eval):
            try:
                parse_sources(value)
            except UserError as error:
                problems.append(f"data.{key}: {error}")
    for key in ("moshi_path", "mimi_path", "tokenizer_path", "config_path"):
        value = getattr(args.moshi_paths, key)
        if value and not value.startswith("hf://") and not Path(value).is_file():
            problems.append(f"moshi_paths.{key}: no file {value}")
    repo = args.moshi_paths.hf_repo_id
    if repo and not Path(repo).is_dir() and (repo.count("/") != 1 or repo.startswith((".", "/", "~"))):
        problems.append(f"moshi_paths.hf_repo_id: {repo} is neither a folder nor of the form owner/name")
    if args.prompt.voices_dir and not Path(args.prompt.voices_dir).is_dir():
        problems.append(f"prompt.voices_dir: no folder {args.prompt.voices_dir}")
    if args.wandb.project and importlib.util.find_spec("wandb") is None:
        problems.append("wandb.project is set but wandb is not installed; pip install '.[wandb]', or remove it")
    if args.duration_sec * 12.5 < 2:
        problems.append(f"duration_sec is {args.duration_sec}; a window needs at least 2 frames (0.16 s)")
    return problems


def parse_sources(value: str) -> list[tuple[Path, float]]:
    """`a.jsonl:0.7,folder:0.3` as [(manifest, weight)], folders opened, weights summing to 1.

    A weight is what follows the last colon if it is a number, so that `C:/data.jsonl` stays a path. Sources without
    one count 1, as in moshi-finetune; the manifests of a folder share its weight by their sizes.
    Raises UserError naming what is not there.
    """
    sources: list[tuple[Path, float]] = []
    for item in filter(None, (part.strip() for part in value.split(","))):
        path, colon, weight_text = item.rpartition(":")
        weight = 1.0
        if colon and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", weight_text):
            weight = float(weight_text)
        else:
            path = item
        if weight <= 0 or not math.isfinite(weight):
            raise UserError(f"{item}: the weight must be a positive number")
        if path.startswith("hf://"):
            raise UserError(f"{path}: data sets are read from disk; download it first (`hf download`)")
        source = Path(path).expanduser()
        if source.is_dir():
            manifests = sorted(p for p in source.rglob("*.jsonl*") if p.suffix in (".jsonl", ".gz"))
            if not manifests:
                raise UserError(f"{source}: the folder holds no .jsonl")
            sizes = [max(1, p.stat().st_size) for p in manifests]
            sources += [(p, weight * size / sum(sizes)) for p, size in zip(manifests, sizes)]
        elif source.is_file():
            sources.append((source, weight))
        else:
            made = "precompute_codes.py" if source.stem.endswith("_precomputed") else "python -m finetune.make_manifest"
            raise UserError(f"{source}: no such manifest; `{made}` makes it")
    if not sources:
        raise UserError("names no manifest")
    total = sum(weight for _, weight in sources)
    return [(path, weight / total) for path, weight in sources]


def dump_args(args: TrainArgs) -> str:
    """The settings as YAML, without secrets."""
    values = args.model_dump(mode="json")
    values["wandb"].pop("key", None)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def flatten(values: dict, prefix: str = "") -> dict[str, object]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    out: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


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
