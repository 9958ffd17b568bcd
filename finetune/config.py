"""YAML files and command-line overrides -> settings.

Every problem is reported in one error, before a model is loaded or a folder touched.
"""

import difflib
import importlib.util
import re
from pathlib import Path
from typing import get_args

import yaml
from pydantic import ValidationError

from finetune.args import Settings, TrainArgs
from finetune.cli import UserError
from finetune.data.manifest import parse_sources


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
