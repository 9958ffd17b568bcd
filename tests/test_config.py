"""Settings: YAML and overrides arrive as typed values, and all problems are reported in one error."""

import json
import re

import pytest
import yaml
from pydantic import ValidationError

from finetune.args import CHANGEABLE, SETTINGS, DataArgs, LoraArgs, TrainArgs, closest_setting
from finetune.cli import UserError
from finetune.config import dump_args, flatten, load_args, parse_yaml

MOSHI_FINETUNE = """
# data
data:
  eval_data: ''
  shuffle: true
  train_data: '{data}'
# model
moshi_paths:
  hf_repo_id: "kyutai/moshiko-pytorch-bf16"
full_finetuning: false
lora:
  enable: true
  rank: 128
  scaling: 2.
  ft_embed: false
first_codebook_weight_multiplier: 100.
text_padding_weight: .5
duration_sec: 100
batch_size: 16
max_steps: 2000
gradient_checkpointing: true
optim:
  lr: 2e-6
  weight_decay: 0.1
  pct_start: 0.05
seed: 0
log_freq: 1
eval_freq: 100
do_eval: false
do_ckpt: true
ckpt_freq: 100
save_adapters: true
run_dir: "{run}"
#wandb:
"""
DEFAULTS = {
    "data.train_data": "", "data.eval_data": "", "data.shuffle": False, "data.num_workers": 2, "data.cache_mb": 256.0,
    "data.max_bad_samples": 100, "data.keep_and_shift": True, "data.speakers": ["SPEAKER_MAIN"], "run_dir": "r",
    "data.drop_tags": True, "data.skip": [],
    "moshi_paths.hf_repo_id": None, "moshi_paths.moshi_path": None, "moshi_paths.mimi_path": None,
    "moshi_paths.tokenizer_path": None, "moshi_paths.config_path": None, "lora.enable": False, "lora.rank": 64,
    "lora.scaling": 2.0, "lora.ft_embed": False, "lora.start_from": None, "full_finetuning": False, "optim.lr": 1e-4,
    "optim.depformer_lr": None,
    "optim.weight_decay": 0.1, "optim.pct_start": 0.05, "optim.betas": (0.9, 0.95), "optim.eps": 1e-8,
    "prompt.text": None, "prompt.voice": None, "prompt.voices_dir": None, "prompt.drop_text": 0.0,
    "prompt.drop_voice": 0.0, "prompt.max_sec": 30.0, "wandb.project": None, "wandb.offline": False, "wandb.key": None,
    "wandb.run_name": None, "tensorboard": False, "duration_sec": 10.0, "batch_size": 1, "num_microbatches": 1,
    "profile_step": None, "max_steps": 100, "max_norm": 1.0, "seed": 0,
    "first_codebook_weight_multiplier": 1.0, "text_padding_weight": 0.5,
    "user_audio_loss_weight": 1.0, "log_freq": 1, "do_eval": False, "eval_freq": 0, "eval_free_samples": 4,
    "eval_free_sec": 20.0, "eval_max_samples": None, "do_ckpt": True, "ckpt_freq": 0, "ckpt_every_minutes": None,
    "num_ckpt_keep": 3, "save_adapters": True, "gradient_checkpointing": True, "param_dtype": "bfloat16",
    "device": "auto", "sharding": "full", "overwrite_run_dir": False, "lora.depformer_rank": None,
    "lora.heads_rank": None, "lora.targets": ["temporal", "depformer", "heads"], "lora.drift_weight": 0.0,
    "optim.heads_lr": None, "optim.schedule": "cosine", "text_loss_weight": 1.0, "audio_loss_weight": 1.0,
    "max_bad_steps": 0, "early_stop": None, "guard.action": "warn", "guard.max_rollbacks": 2,
    "prompt.reserve_sec": 0.0, "prompt.allow_voiceless": False, "base_dtype": "bf16",
    "deterministic": False, "reduce_every_microbatch": False,
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"path": "a.wav", "duration": 1}\n')
    path = tmp_path / "config.yaml"
    path.write_text(MOSHI_FINETUNE.format(data=tmp_path / "train.jsonl", run=tmp_path / "run"))
    return path


def refusal(config, *overrides) -> str:
    with pytest.raises(UserError) as error:
        load_args(config, overrides)
    assert str(config) in str(error.value)
    return str(error.value).replace(str(config), "")


def test_defaults():
    assert flatten(TrainArgs(data=DataArgs(), run_dir="r").model_dump()) == DEFAULTS


def test_a_moshi_finetune_file_loads_unchanged(config, tmp_path):
    assert flatten(load_args(config).model_dump()) == DEFAULTS | {
        "data.shuffle": True, "data.train_data": str(tmp_path / "train.jsonl"), "run_dir": str(tmp_path / "run"),
        "moshi_paths.hf_repo_id": "kyutai/moshiko-pytorch-bf16", "lora.enable": True, "lora.rank": 128,
        "first_codebook_weight_multiplier": 100.0, "duration_sec": 100.0, "batch_size": 16, "max_steps": 2000,
        "optim.lr": 2e-6, "eval_freq": 100, "ckpt_freq": 100,
    }  # fmt: skip


def test_each_setting_arrives_from_the_file_and_from_the_command_line(config, tmp_path):
    """Each at a value that is not its default."""
    (tmp_path / "voices").mkdir()
    manifest, file = str(tmp_path / "train.jsonl"), str(config)
    values = {
        "data.train_data": f"{manifest}:0.7,{manifest}:0.3", "data.eval_data": manifest, "data.shuffle": True,
        "data.num_workers": 0, "data.cache_mb": 0.5, "data.max_bad_samples": 0, "data.keep_and_shift": False,
        "data.drop_tags": False, "data.speakers": ["A", "B"], "run_dir": "elsewhere", "moshi_paths.hf_repo_id": "a/b",
        "moshi_paths.moshi_path": "hf://a/b/c.safetensors", "moshi_paths.mimi_path": file,
        "moshi_paths.tokenizer_path": file, "moshi_paths.config_path": file, "lora.enable": False, "lora.rank": 1,
        "lora.scaling": 0.5, "lora.ft_embed": True, "lora.start_from": None, "full_finetuning": True, "optim.lr": 3e-5,
        "optim.depformer_lr": 4e-6, "optim.weight_decay": 0.0, "optim.pct_start": 1.0, "optim.betas": [0.0, 0.99],
        "optim.eps": 1e-6, "prompt.text": "You are Ada.", "prompt.voice": "same_speaker",
        "prompt.voices_dir": str(tmp_path / "voices"), "prompt.drop_text": 0.25, "prompt.drop_voice": 1.0,
        "prompt.max_sec": 12.5, "wandb.project": None, "wandb.offline": True, "wandb.key": "k", "wandb.run_name": "n",
        "tensorboard": True, "duration_sec": 0.16, "batch_size": 2, "num_microbatches": 3, "max_steps": 0,
        "profile_step": 7,
        "max_norm": 0.1, "seed": 2**63 - 1, "first_codebook_weight_multiplier": 50.0, "text_padding_weight": 0.0,
        "user_audio_loss_weight": 0.0, "log_freq": 10, "do_eval": True, "eval_freq": 5, "eval_free_samples": 0,
        "eval_free_sec": 0.5, "eval_max_samples": 7, "do_ckpt": False, "ckpt_freq": 9, "ckpt_every_minutes": 0.5,
        "num_ckpt_keep": None, "save_adapters": False, "gradient_checkpointing": False, "param_dtype": "float32",
        "device": "cpu", "sharding": "hybrid", "overwrite_run_dir": True, "data.skip": ["a at 1.00 s"],
        "lora.depformer_rank": 0, "lora.heads_rank": 3, "lora.targets": ["heads.text"], "lora.drift_weight": 0.0,
        "optim.heads_lr": 1e-6, "optim.schedule": "wsd", "text_loss_weight": 0.5, "audio_loss_weight": 0.0,
        "max_bad_steps": 2, "early_stop": 3, "guard.action": "off", "guard.max_rollbacks": 1,
        "prompt.reserve_sec": 1.0, "prompt.allow_voiceless": True, "base_dtype": "bf16",
        "deterministic": True, "reduce_every_microbatch": True,
    }  # fmt: skip
    expected = values | {"optim.betas": (0.0, 0.99)}
    assert values.keys() == DEFAULTS.keys()
    # lora.enable excludes full_finetuning, wandb.project needs wandb, and the others need adapters.
    unchanged = ["lora.enable", "lora.start_from", "wandb.project", "lora.drift_weight", "base_dtype"]
    assert [key for key in values if expected[key] == DEFAULTS[key]] == unchanged
    from_overrides = load_args(config, [f"{key}={json.dumps(value)}" for key, value in values.items()])
    assert flatten(from_overrides.model_dump()) == expected
    tree: dict = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    config.write_text(yaml.safe_dump(tree))
    assert load_args(config) == from_overrides
    with pytest.raises(ValidationError):
        from_overrides.seed = 1


def test_what_may_change_when_a_run_is_resumed():
    """Everything else decides what the weights become: duration_sec and seed change the order of the data, say."""
    changeable = {
        "batch_size", "ckpt_every_minutes", "ckpt_freq", "data.cache_mb", "data.drop_tags", "data.eval_data",
        "data.max_bad_samples", "data.num_workers", "deterministic", "profile_step", "device", "do_ckpt", "do_eval",
        "eval_free_samples", "eval_free_sec", "eval_freq", "eval_max_samples", "gradient_checkpointing", "log_freq",
        "max_steps", "num_ckpt_keep", "num_microbatches", "overwrite_run_dir", "run_dir", "save_adapters", "sharding",
        "tensorboard", "wandb", "prompt.allow_voiceless", "data.skip", "max_bad_steps", "guard", "optim", "early_stop",
        "reduce_every_microbatch",
    }  # fmt: skip
    assert changeable == CHANGEABLE


# Each value with the words of the error that it causes; a lone value is accepted.
VALUES = [
    ("batch_size", "1"), ("batch_size", "0", "0 least 1"), ("batch_size", "two", "'two' number"),
    ("batch_size", "'1'", "'1' number"), ("batch_size", "1.0", "1.0 number"), ("batch_size", "true", "True number"),
    ("num_microbatches", "0", "0 1"), ("lora.rank", "0", "0 1"), ("log_freq", "0", "0 1"),
    ("eval_max_samples", "0", "0 1"), ("num_ckpt_keep", "0", "0 1"), ("max_steps", "-1", "-1 0"),
    ("eval_freq", "-1", "-1 0"), ("ckpt_freq", "-1", "-1 0"), ("eval_free_samples", "-1", "-1 0"),
    ("data.num_workers", "-1", "-1 0"), ("data.max_bad_samples", "-1", "-1 0"), ("seed", "-1", "-1 0"),
    ("seed", str(2**63), f"{2**63} below"), ("optim.lr", "1"), ("optim.lr", "0", "0 greater"),
    ("optim.lr", ".nan", "nan finite"), ("optim.lr", ".inf", "inf finite"), ("optim.lr", "'1'", "'1' number"),
    ("optim.lr", "true", "True number"), ("optim.lr", "null", "empty number"), ("optim.eps", "0", "0 greater"),
    ("optim.depformer_lr", "0"), ("optim.depformer_lr", "-1", "-1 0"),
    ("guard.action", "off"), ("guard.action", "on", "True warn"),
    ("lora.scaling", "0", "0 greater"), ("max_norm", "0", "0 greater"),
    ("max_norm", ".inf", "inf finite"), ("first_codebook_weight_multiplier", "0", "0 greater"),
    ("eval_free_sec", "0", "0 greater"), ("prompt.max_sec", "0", "0 greater"),
    ("ckpt_every_minutes", "0", "0 greater"), ("duration_sec", "0", "0 greater"), ("duration_sec", "0.15", "0.15 2"),
    ("optim.weight_decay", "-0.1", "-0.1 0"), ("text_padding_weight", "-1", "-1 0"),
    ("user_audio_loss_weight", "-1", "-1 0"), ("user_audio_loss_weight", ".inf", "inf finite"),
    ("data.cache_mb", "-1", "-1 0"), ("optim.pct_start", "1.1", "1.1 most 1"), ("optim.pct_start", "-0.1", "-0.1 0"),
    ("prompt.drop_text", "1.1", "1.1 1"), ("prompt.drop_voice", "1.1", "1.1 1"), ("prompt.drop_voice", ".nan", "nan"),
    ("optim.betas", "[0, 0.5]"), ("optim.betas", "[0.9, 1]", "1 below"), ("optim.betas", "[-0.1, 0.9]", "-0.1 0"),
    ("optim.betas", "[0.9]", "list two"), ("optim.betas", "[0.9, 0.9, 0.9]", "list two"),
    ("optim.betas", "0.9", "0.9 list two"), ("optim.betas", "[0.9, '0.9']", "'0.9' number"),
    ("lora.enable", "1", "1 true false"), ("lora.enable", "'yes'", "'yes' true false"), ("tensorboard", "on"),
    ("do_eval", "null", "empty true false"), ("data.train_data", "", "empty text"), ("run_dir", "", "empty text"),
    ("run_dir", "''", "empty folder"), ("run_dir", "5", "5 text"), ("data.speakers", "A", "'A' list"),
    ("data.speakers", "[A, 1]", "1 text"), ("param_dtype", "fp8", "'fp8' 'bfloat16' 'float32'"),
    ("device", "tpu", "'tpu' 'auto' 'cpu' 'cuda'"), ("sharding", "half", "'half' 'full' 'hybrid' 'none'"),
    ("gradient_checkpointing", "5"), ("gradient_checkpointing", "-1", "-1 true false number layers"),
    ("gradient_checkpointing", "auto"), ("gradient_checkpointing", "most", "'most' true false auto"),
    ("gradient_checkpointing", "1.0", "1.0 true false"),
    ("optim", "3", "3 section"), ("optim", "[1]", "[1] section"), ("data", "x", "'x' section"),
]  # fmt: skip


@pytest.mark.parametrize("key, value, words", [(*row, None)[:3] for row in VALUES])
def test_the_values_of_a_setting(config, key, value, words):
    if words is None:
        load_args(config, [f"{key}={value}"])
    else:
        said = refusal(config, f"{key}={value}")
        assert said.startswith(f": {key} is ") and "\n" not in said
        assert all(re.search(rf"(?<![\w.]){re.escape(word)}(?!\w)", said) for word in words.split()), said
        assert not re.search(r"(?i)input|valid|should|instance|tuple|dictionary", said), "pydantic's words"


def test_checkpointing_that_keeps_no_layer_is_checkpointing(config):
    value = lambda text: load_args(config, [f"gradient_checkpointing={text}", "base_dtype=nf4"]).gradient_checkpointing
    assert value("0") is value("true") is True and value("1") is not True


@pytest.mark.parametrize("overrides, named", [
    (["full_finetuning=true"], "full_finetuning lora.enable"), (["lora.enable=false"], "full_finetuning lora.enable"),
    (["do_eval=true"], "do_eval data.eval_data"), (["data.train_data=''"], "data.train_data"),
    (["data.train_data=gone.jsonl"], "data.train_data gone.jsonl"),
    (["data.eval_data=gone.jsonl", "do_eval=true"], "data.eval_data gone.jsonl"),
    (["moshi_paths.moshi_path=gone.safetensors"], "moshi_paths.moshi_path gone.safetensors"),
    (["moshi_paths.mimi_path=gone"], "moshi_paths.mimi_path gone"),
    (["moshi_paths.tokenizer_path=gone"], "moshi_paths.tokenizer_path gone"),
    (["moshi_paths.config_path=gone"], "moshi_paths.config_path gone"),
    (["moshi_paths.hf_repo_id=gone"], "moshi_paths.hf_repo_id gone owner/name"),
    (["moshi_paths.hf_repo_id=./gone"], "moshi_paths.hf_repo_id ./gone"),
    (["moshi_paths.hf_repo_id=a/b/c"], "moshi_paths.hf_repo_id a/b/c"),
    (["prompt.voices_dir=gone"], "prompt.voices_dir gone"),
    (["nonsense"], "'nonsense' key.subkey=value"), (["=3"], "'=3' key.subkey=value"), (["seed.deeper=1"], "seed"),
    (["batch_size=[1"], "batch_size YAML"), (["batch_size=2026-02-30"], "batch_size YAML"),
])  # fmt: skip
def test_settings_that_cannot_be_used(config, overrides, named):
    said = refusal(config, *overrides)
    assert all(name in said for name in named.split()) and "\n" not in said, said


def test_wandb_must_be_installed(config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "wandb.project" in refusal(config, "wandb.project=mine")


def test_held_out_data_is_only_checked_if_it_is_used(config):
    assert load_args(config, ["data.eval_data=gone.jsonl", "do_eval=false"]).data.eval_data == "gone.jsonl"


def test_evaluation_is_on_where_there_is_held_out_data(config, tmp_path):
    config.write_text(config.read_text().replace("do_eval: false\n", ""))
    assert not load_args(config).do_eval
    assert load_args(config, [f"data.eval_data={tmp_path / 'train.jsonl'}"]).do_eval
    assert not load_args(config, [f"data.eval_data={tmp_path / 'train.jsonl'}", "do_eval=false"]).do_eval


def test_all_problems_are_reported_at_once(config):
    config.write_text(config.read_text().replace("seed: 0", "seed: x\nno_such_setting: 1"))
    overrides = ("batch_size=two", "optm.lr=1", "lora.enable=false", "data.train_data=gone.jsonl", "wandb")
    said = refusal(config, *overrides)
    head, *problems = said.split("\n  - ")
    assert head == ": 7 problems" and "\n" not in "".join(problems)
    for name in ("batch_size", "optim", "nothing is trained", "gone.jsonl", "seed", "no_such_setting", "number 5"):
        assert sum(name in problem for problem in problems) == 1, (name, said)


@pytest.mark.parametrize(("overrides", "named"), [
    (["text_loss_weight=0", "audio_loss_weight=0"], "nothing is learnt"),
    (["lora.targets=[]"], "no part has adapters"),
    (["lora.targets=[depformer]", "lora.depformer_rank=0"], "no part has adapters"),
    (["lora.drift_weight=1", "lora.enable=false", "full_finetuning=true"], "lora.drift_weight"),
    (["lora.drift_weight=1", "lora.ft_embed=true"], "lora.ft_embed"),
    (["lora.start_from=runs/a", "lora.enable=false", "full_finetuning=true"], "lora.start_from"),
    (["base_dtype=nf4", "lora.enable=false", "full_finetuning=true"], "lora.enable"),
    (["base_dtype=nf4", "gradient_checkpointing=false"], "gradient_checkpointing"),
    (["base_dtype=int8", "save_adapters=false"], "save_adapters"),
    (["guard.action=stop"], "guard.action is stop"), (["early_stop=3"], "early_stop"),
    (["guard.action=stop", "data.eval_data={data}", "do_eval=true", "eval_free_samples=0"], "eval_free_samples"),
    (["guard.action=rollback", "data.eval_data={data}", "do_eval=true", "ckpt_freq=0"], "ckpt_freq"),
])  # fmt: skip
def test_settings_that_contradict_each_other(config, overrides, named, tmp_path):
    overrides = [override.format(data=tmp_path / "train.jsonl") for override in overrides]
    said = refusal(config, *overrides)
    assert named in said and "\n" not in said


@pytest.mark.parametrize("overrides", [
    ["lora.enable=maybe"],  # not "nothing is trained" too
    ["lora=3"], ["lora.enabel=true", "lora.enable=false"],
    ["data.eval_data=3", "do_eval=true"], ["data=3"], ["data.train_data=3"],
])  # fmt: skip
def test_a_consequence_of_a_problem_is_not_reported_as_another(config, overrides):
    assert "\n" not in refusal(config, *overrides)


def test_what_an_unreadable_override_would_have_repaired_is_not_reported(config):
    config.write_text(config.read_text().replace("enable: true", "enable: false"))
    assert "\n" not in refusal(config, "lora.enable=[true")


@pytest.mark.parametrize("missing", ["data", "run_dir"])
def test_required_settings(config, missing):
    settings = yaml.safe_load(config.read_text())
    del settings[missing]
    config.write_text(yaml.safe_dump(settings))
    assert refusal(config).startswith(f": {missing} is missing")


@pytest.mark.parametrize("key, meant", [
    ("optim.lrr", "optim.lr"), ("lr", "optim.lr"), ("data.lr", "optim.lr"), ("batchsize", "batch_size"),
    ("optim.seed", "seed"), ("optm", "optim"), ("optm.lr", "optim.lr"), ("prompt.max_secs", "prompt.max_sec"),
    ("optim.zzz", None), ("zzz", None), ("seed.x", None),
])  # fmt: skip
def test_closest_setting(key, meant):
    assert closest_setting(key) == meant


def test_each_name_occurs_in_one_section_only():
    assert [key for key in SETTINGS if closest_setting(key) != key] == []


def test_an_unknown_setting_is_named_with_the_one_that_is_meant(config):
    assert "optim.lrr" in (said := refusal(config, "optim.lrr=1")) and "did you mean optim.lr?" in said
    assert "optim has lr, depformer_lr" in refusal(config, "optim.zzz=1")
    assert "--help" in refusal(config, "zzz=1")
    config.write_text(config.read_text() + "5: 6\n")
    assert ": 5 is not a setting" in refusal(config)


@pytest.mark.parametrize("text, named", [
    ("a: [1\nb: 2", ["line 2"]), ("data:\n\ta: 1", ["line 2", "spaces"]), ("- 1", ["key: value"]),
    ("", ["key: value"]), ("seed: 1\nlora:\n  rank: 2\n  rank: 3\n", ["line 4", "rank"]),
    ("seed: 1\nseed: 1\n", ["line 2", "seed"]), ("seed: 2026-02-30", ["YAML"]), ("seed: \x07", ["YAML"]),
])  # fmt: skip
def test_files_without_settings(tmp_path, text, named):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    said = refusal(path)
    assert all(name in said for name in named) and "\n" not in said, said


def test_yaml_values():
    text = "a: 2e-6\nb: 1E+3\nc: -.5e1\nd: 1_0e1\ne: e5\nf: '2e-6'\n1: 2\n"
    expected = {"a": 2e-6, "b": 1000.0, "c": -5.0, "d": 100.0, "e": "e5", "f": "2e-6", "1": 2}
    assert parse_yaml(text) == expected


def test_a_section_may_be_empty(config):
    config.write_text(config.read_text() + "prompt:\nwandb: null\n")
    assert load_args(config, ["optim="]).optim.lr == 1e-4
    assert load_args(config, ["prompt.text=hello"]).prompt.text == "hello"
    assert load_args(config).wandb == TrainArgs(data=DataArgs(), run_dir="r").wandb


def test_home_is_expanded(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ("moshi_path", "mimi_path", "tokenizer_path", "config_path")
    args = load_args(config, [*(f"moshi_paths.{key}=~/config.yaml" for key in keys), "prompt.voices_dir=~/"])
    assert [getattr(args.moshi_paths, key) for key in keys] == [str(config)] * 4
    assert args.prompt.voices_dir == f"{tmp_path}/"


@pytest.mark.parametrize("overrides", [
    ["wandb.key=5s3cret"], ["wandb.key=4711"], ["wandb.key=[s3cret]"], ["wandb.key={s3cret: 1}"], ["wandb=s3cret"],
    ["wandb.key=[s3cret"], ["wandb.key=*s3cret"], ["wandb.key=!s3cret x"], ["wandb.kye=s3cret"], ["wandb.key s3cret"],
    ["wandb.key", "s3cret"], ["wandb.key=", "s3cret"], ["wandb.kye=", "s3cret"], ["key=s3cret"],
    ["wandb={key s3cret}"], ["wandb.key=s3cret", "wandb.key.more=1"],
])  # fmt: skip
def test_an_error_never_shows_the_key(config, overrides):
    said = refusal(config, *overrides, "batch_size=0")
    assert "batch_size" in said and "s3cret" not in said and "4711" not in said


@pytest.mark.parametrize("value", ["*s3cret", "!s3cret x", "[s3cret]", "{s3cret: 1}", "'s3cret", "&s3cret *s3cret"])
def test_an_error_in_the_file_never_shows_the_key(config, value):
    config.write_text(config.read_text() + f"batch_siz: 1\nwandb:\n  key: {value}\n")
    assert "s3cret" not in refusal(config)


def test_saved_settings_hold_no_secret_and_load_again(config, tmp_path):
    args = load_args(config, ["wandb.key=s3cret", "prompt.text=Grüße", "optim.depformer_lr=null"])
    text = dump_args(args)
    assert "s3cret" not in text and "Grüße" in text
    saved = tmp_path / "args.yaml"
    saved.write_text(text)
    again = load_args(saved)
    assert flatten(again.model_dump()) == flatten(args.model_dump()) | {"wandb.key": None}
    assert yaml.safe_load(text)["optim"]["lr"] == 2e-6
    assert list(yaml.safe_load(text))[:2] == ["data", "run_dir"]


def test_flatten():
    assert flatten({"a": 1, "b": {"c": None, "d": {"e": [2], "f": {}}}}) == {"a": 1, "b.c": None, "b.d.e": [2]}


def test_which_settings_train_the_embedding_tables():
    trains = lambda full, lora: TrainArgs(data=DataArgs(), run_dir="r", full_finetuning=full, lora=lora)
    assert trains(True, LoraArgs()).trains_embeddings
    assert trains(False, LoraArgs(enable=True, ft_embed=True)).trains_embeddings
    assert not trains(False, LoraArgs(enable=True)).trains_embeddings
