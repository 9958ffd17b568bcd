"""YAML files and command-line overrides -> settings.

All problems of the file and the overrides are reported in one error, before a model is loaded or a folder touched.
"""

import functools
import importlib.util
import re
from itertools import takewhile
from pathlib import Path

import yaml
from pydantic import ValidationError

from finetune.args import SETTINGS, TrainArgs, closest_setting
from finetune.cli import UserError, is_secret, secrets
from finetune.data.manifest import parse_sources
from finetune.files import regular

# What a value must be, by the type of pydantic's error.
_EXPECTED = {
    "int_type": "a whole number", "float_type": "a number", "finite_number": "a finite number", "string_type": "text",
    "bool_type": "true or false", "list_type": "a list", "string_too_short": "the name of a folder",  # run_dir
    "tuple_type": "a list of two numbers", "too_long": "a list of two numbers", "missing": "a list of two numbers",
    "model_type": "a section of settings (key: value)", "literal_error": "{expected}",
    "greater_than": "greater than {gt:g}", "greater_than_equal": "at least {ge:g}", "less_than": "below {lt:.20g}",
    "less_than_equal": "at most {le:,}",
}  # fmt: skip


_MAX_BYTES = 10**6
_MAX_DEPTH, _MAX_ALIASES = 20, 10  # a few lines of aliases to aliases stand for more values than fit any memory


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that `2e-6` is a number, keys are strings and no key may come twice."""

    depth = aliases = 0

    def compose_node(self, parent, index):
        self.depth += 1
        self.aliases += self.check_event(yaml.AliasEvent)
        if self.depth > _MAX_DEPTH or self.aliases > _MAX_ALIASES:
            raise yaml.MarkedYAMLError(
                problem="nested too deeply, or too many aliases", problem_mark=self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                known = f" {key.value}" if closest_setting(key.value) else ""  # else it may be wandb.key
                raise yaml.MarkedYAMLError(problem=f"duplicate key{known}", problem_mark=key.start_mark)
            seen.add(key.value)
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> object:
    """Return the plain values of a YAML document."""
    return yaml.load(text, Loader=_Loader)


def read_settings(path: Path) -> dict:
    """Return the settings of a YAML file as plain values. Raises UserError if the file holds none."""
    try:
        if regular(path).stat().st_size > _MAX_BYTES:
            raise UserError(f"{path}: is too large for a file of settings ({path.stat().st_size:,} bytes)")
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); give a YAML file, saved as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a YAML file of settings") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-02-30
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", "a value that cannot be read")
        problem = re.sub("(alias|anchor|handle|tag) '.*'", r"\1", problem)  # quotes the value, which may be wandb.key
        hint = "; indent with spaces" if r"'\t'" in problem else ""
        raise UserError(f"{path}{f', line {mark.line + 1}' if mark else ''}: not YAML ({problem}{hint})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds no settings (key: value)")
    return raw


def load_args(config: str | Path, overrides: list[str] | tuple[str, ...] = (), raw: dict | None = None) -> TrainArgs:
    """Read the settings of a run; `overrides` are `key.subkey=value`, with the value in YAML.

    `raw` is the content of `config` if it has been read already; it is changed.

    Raises UserError, which lists every problem of the file and the overrides.
    """
    raw = read_settings(Path(config)) if raw is None else raw
    problems, faulty = _apply_overrides(raw, overrides)
    given = [(key, value) for key, value in flatten(raw).items() if isinstance(value, str)]
    secrets.update(value for key, value in given if is_secret(key) and len(value) > 3)
    for key in [key for key, value in given if "\0" in value]:
        problems.append(f"{key} holds a NUL character")
        faulty.add(key)
        *parents, last = key.split(".")
        functools.reduce(dict.__getitem__, parents, raw).pop(last)
    if isinstance(raw.get("data"), dict):
        raw.setdefault("do_eval", bool(raw["data"].get("eval_data")))
    try:
        args = TrainArgs.model_validate(raw)
    except ValidationError as error:
        for fault in error.errors():
            location = list(takewhile(lambda part: isinstance(part, str), fault["loc"]))  # up to an index into a list
            key = ".".join(location)
            problems.append(_sentence(key, fault))
            faulty.add(closest_setting(key) or key)
            *parents, last = location
            functools.reduce(dict.__getitem__, parents, raw).pop(last, None)
        # With each faulty setting at its default the others can be checked together.
        args = TrainArgs.model_validate({"run_dir": "unset", "data": {}} | raw)
    caused = lambda problem: any(re.search(rf"\b{re.escape(key)}\b", problem) for key in faulty)
    problems += [problem for problem in _combinations(args) if not caused(problem)]
    if len(problems) == 1:
        raise UserError(f"{config}: {problems[0]}")
    if problems:
        raise UserError("\n  - ".join([f"{config}: {len(problems)} problems", *problems]))
    return args


def _apply_overrides(raw: dict, overrides: list[str] | tuple[str, ...]) -> tuple[list[str], set[str]]:
    """Write the overrides into `raw`; return (problems, keys of the overrides that have one)."""
    problems, faulty = [], set()
    may_hold_secret = any(re.search("wandb|key", override.partition("=")[0]) for override in overrides)
    for number, override in enumerate(overrides, start=1):
        key, equals, text = override.partition("=")
        if not equals or not key:
            shown = f"number {number}" if may_hold_secret else repr(override)  # `wandb.key= SECRET` is two words
            problems.append(f"override {shown}: write it as key.subkey=value")
            continue
        try:
            value = parse_yaml(text)
        except (yaml.YAMLError, ValueError):
            problems.append(f"override {key}: the value is not YAML")
            faulty.add(key)
            continue
        *parents, last = key.split(".")
        node = raw
        for parent in parents:
            node[parent] = {} if node.get(parent) is None else node[parent]  # absent, or a section without content
            node = node[parent]
            if not isinstance(node, dict):
                problems.append(f"override {key}: {parent} holds a value, not settings")
                break
        else:
            node[last] = value
    return problems, faulty


def _sentence(key: str, fault: dict) -> str:
    """Describe one of pydantic's errors, about the setting `key`."""
    if fault["type"] == "missing" and key in ("data", "run_dir"):
        return f"{key} is missing; set it to the {'manifests' if key == 'data' else 'folder of the run'}"
    if fault["type"] == "extra_forbidden":
        section, meant = key.rpartition(".")[0], closest_setting(key)
        names = [name.rpartition(".")[2] for name in SETTINGS if name.rpartition(".")[0] == section]
        hint = f"{section} has {', '.join(names)}" if section else "--help lists all settings"
        shown = key.split()[0] if key.startswith("wandb") else key  # `wandb: {key SECRET}`
        return f"{shown} is not a setting; {f'did you mean {meant}?' if meant else hint}"
    found = "empty" if fault["input"] in (None, "") else repr(fault["input"])
    found = "of the wrong type" if key.startswith("wandb") else found  # never show wandb.key
    expected = _EXPECTED.get(fault["type"], fault["msg"]).format(**fault.get("ctx", {}))
    return f"{key} is {found}; it must be {expected}"


def _combinations(args: TrainArgs) -> list[str]:
    """Return what single values cannot show: settings that contradict each other, and missing files."""
    data, paths, problems = args.data, args.moshi_paths, []
    if args.full_finetuning and args.lora.enable:
        problems.append("full_finetuning and lora.enable are both on; choose one")
    if not args.full_finetuning and not args.lora.enable:
        problems.append("nothing is trained: set full_finetuning or lora.enable to true")
    problems += _contradictions(args)
    if not data.train_data:
        problems.append("data.train_data is empty; name a manifest (.jsonl)")
    if args.do_eval and not data.eval_data:
        problems.append("do_eval is on but data.eval_data is empty; name held-out data or set do_eval to false")
    for key, value in (("train_data", data.train_data), ("eval_data", args.do_eval and data.eval_data)):
        try:
            if value:
                parse_sources(value)
        except UserError as error:
            problems.append(f"data.{key}: {error}")
    for key in ("moshi_path", "mimi_path", "tokenizer_path", "config_path"):
        value = getattr(paths, key)
        if value and not value.startswith("hf://") and not Path(value).is_file():
            problems.append(f"moshi_paths.{key}: no file {value}")
    repo = paths.hf_repo_id
    if repo and not Path(repo).is_dir() and (repo.count("/") != 1 or repo.startswith((".", "/", "~"))):
        problems.append(f"moshi_paths.hf_repo_id: {repo} is neither a folder nor of the form owner/name")
    if args.prompt.voices_dir and not Path(args.prompt.voices_dir).is_dir():
        problems.append(f"prompt.voices_dir: no folder {args.prompt.voices_dir}")
    if args.wandb.project and importlib.util.find_spec("wandb") is None:
        problems.append("wandb.project is set but wandb is not installed; pip install '.[wandb]', or unset it")
    if args.duration_sec * 12.5 < 2:
        problems.append(f"duration_sec is {args.duration_sec}; a window needs at least 2 frames (0.16 s)")
    return problems


def _contradictions(args: TrainArgs) -> list[str]:
    """Return what is wrong with the parts that learn, and with what follows from evaluations."""
    lora, action, problems = args.lora, args.guard.action, []
    if not (args.text_loss_weight or args.audio_loss_weight):
        problems.append("nothing is learnt: text_loss_weight and audio_loss_weight are both 0")
    parts = [f"{whole}.x" for whole in ("temporal", "depformer", "heads")] + lora.targets
    if lora.enable and not any(map(lora.rank_of, parts)) and not lora.ft_embed:
        problems.append("no part has adapters: lora.targets and the ranks leave none")
    if args.base_dtype != "bf16":
        problems += _of_quantised(args)
    if lora.start_from and not lora.enable:
        problems.append("lora.start_from goes on from adapters: it needs lora.enable")
    if lora.drift_weight and not lora.enable:
        problems.append("lora.drift_weight compares with the base without adapters: it needs lora.enable")
    if lora.drift_weight and lora.ft_embed:
        problems.append("lora.drift_weight needs the base as it was, and lora.ft_embed changes it; choose one")
    if action in ("stop", "rollback") and not (args.do_eval and args.eval_free_samples):
        problems.append(f"guard.action is {action} and judges replies: set data.eval_data and eval_free_samples")
    if action == "rollback" and not (args.do_ckpt and args.ckpt_freq):
        problems.append("guard.action is rollback: set do_ckpt and ckpt_freq, so that there is something to go back to")
    if args.early_stop and not args.do_eval:
        problems.append("early_stop counts evaluations: set data.eval_data")
    return problems


def _of_quantised(args: TrainArgs) -> list[str]:
    """Return what a quantised base does not go with."""
    problems, kind = [], f"base_dtype is {args.base_dtype}"
    if not args.lora.enable:
        problems.append(f"{kind}, which is for frozen weights: it needs lora.enable")
    if args.gradient_checkpointing is False:
        problems.append(f"{kind}: gradient_checkpointing must not be false: all weights would be kept dequantised")
    if not args.save_adapters:
        problems.append(
            f"{kind}, so there are no full weights to merge adapters into: leave save_adapters on, and merge them with "
            "`python -m finetune.tools.export --merge`"
        )
    return problems


def dump_args(args: TrainArgs) -> str:
    """Return the settings as YAML, without secrets."""
    values = args.model_dump(mode="json")
    values["wandb"].pop("key", None)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def flatten(values: dict, prefix: str = "") -> dict[str, object]:
    """Return {"a": {"b": 1}} as {"a.b": 1}."""
    out: dict[str, object] = {}
    for key, value in values.items():
        out |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out
