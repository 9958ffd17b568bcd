"""Settings: moshi-finetune's files load unchanged, and every mistake is told at once, in words."""

import pytest
import yaml

from finetune.cli import UserError
from finetune.config import dump_args, flatten, load_args
from finetune.data.manifest import parse_sources

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


@pytest.fixture
def config(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"path": "a.wav", "duration": 1}\n')
    path = tmp_path / "config.yaml"
    path.write_text(MOSHI_FINETUNE.format(data=tmp_path / "train.jsonl", run=tmp_path / "run"))
    return path


def test_a_moshi_finetune_file_loads_unchanged(config):
    args = load_args(config)
    assert args.optim.lr == 2e-6 and args.duration_sec == 100.0 and args.lora.rank == 128
    assert args.first_codebook_weight_multiplier == 100 and args.data.shuffle


def test_overrides(config):
    args = load_args(config, ["optim.lr=3e-5", "batch_size=2", "prompt.text=You are Ada.", "optim.betas=[0.8, 0.99]"])
    assert (args.optim.lr, args.batch_size, args.prompt.text) == (3e-5, 2, "You are Ada.")
    assert args.optim.betas == (0.8, 0.99)


MISTAKES = [
    (["optim.lrr=1"], "optim.lrr is not a setting; did you mean optim.lr?"),
    (["lr=1e-4"], "did you mean optim.lr?"),
    (["batchsize=4"], "did you mean batch_size?"),
    (["data.eval_data="], "data.eval_data is None; it must be text"),
    (["batch_size=two"], "batch_size is 'two'; it must be a whole number"),
    (["batch_size=0"], "greater than or equal to 1"),
    (["lora.enable='yes'"], "must be true or false"),
    (["param_dtype=fp8"], "'bfloat16' or 'float32'"),
    (["optim.pct_start=1.5"], "optim.pct_start"),
    (["optim=3"], "optim is 3"),
    (["full_finetuning=true"], "full_finetuning and lora.enable are both on"),
    (["lora.enable=false"], "nothing is trained"),
    (["do_eval=true"], "data.eval_data is empty"),
    (["data.train_data="], "data.train_data"),
    (["data.train_data=missing.jsonl"], "missing.jsonl: no such manifest"),
    (["data.train_data=hf://someone/data"], "read from disk"),
    (["moshi_paths.moshi_path=nowhere.safetensors"], "moshi_paths.moshi_path: no file nowhere.safetensors"),
    (["moshi_paths.hf_repo_id=nowhere"], "neither a folder nor of the form owner/name"),
    (["prompt.voices_dir=nowhere"], "prompt.voices_dir: no folder nowhere"),
    (["prompt.drop_text=2"], "prompt.drop_text"),
    (["duration_sec=0.1"], "at least 2 frames"),
    (["optim.lr=-1"], "greater than 0"),
    (["optim.lr=.nan"], "finite"),
    (["max_steps=1.5"], "max_steps"),
    (["nonsense"], "write it as key.subkey=value"),
    (["seed.deeper=1"], "seed holds a value"),
    (["batch_size=[1"], "its value is not YAML"),
    (["wandb.project=mine"], "wandb is not installed"),
    (["wandb.key=4711"], "wandb.key is of the wrong type"),
]


@pytest.mark.parametrize("overrides, sentence", MISTAKES, ids=[m[0][0] for m in MISTAKES])
def test_each_mistake_is_named(config, overrides, sentence):
    with pytest.raises(UserError) as error:
        load_args(config, overrides)
    assert sentence in str(error.value) and str(config) in str(error.value)


def test_all_mistakes_are_told_at_once(config):
    with pytest.raises(UserError) as error:
        load_args(config, ["batch_size=two", "optm.lr=1", "do_eval=true", "data.train_data=gone.jsonl"])
    for part in ("batch_size", "optm", "eval_data", "gone.jsonl"):
        assert part in str(error.value)


@pytest.mark.parametrize("text, sentence", [("a: [1", "line"), ("- 1", "holds no settings"), ("", "holds no settings")])
def test_files_that_are_no_settings(tmp_path, text, sentence):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        load_args(path)


def test_saved_settings_hold_no_secret_and_load_again(config, tmp_path):
    args = load_args(config, ["wandb.key=s3cret"])
    text = dump_args(args)
    assert "s3cret" not in text
    saved = tmp_path / "args.yaml"
    saved.write_text(text)
    again = load_args(saved)
    assert flatten(again.model_dump()) == flatten(args.model_dump()) | {"wandb.key": None}
    assert yaml.safe_load(text)["optim"]["lr"] == 2e-6


def test_sources(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "folder/c.jsonl", "folder/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x" * 10)
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert parse_sources(f"{a}:0.7,{b}:0.3") == [(a, 0.7), (b, 0.3)]
    assert parse_sources(f"{a},{b}") == [(a, 0.5), (b, 0.5)]
    assert [w for _, w in parse_sources(f"{a}:2,{tmp_path / 'folder'}:2")] == [0.5, 0.25, 0.25]
    with pytest.raises(UserError, match=r"C:/data\.jsonl: no such manifest"):
        parse_sources("C:/data.jsonl")
    with pytest.raises(UserError, match="positive"):
        parse_sources(f"{a}:-1")
