"""The folder of a run: what it may be, which settings may change in it, and when it is emptied."""

import json
import logging
import shutil

import pytest
import torch
import yaml

from finetune import run_dir
from finetune.args import TrainArgs
from finetune.cli import UserError
from finetune.distributed import World
from finetune.run_dir import check_run_dir, list_checkpoints, remove_run

# Everything that a run leaves in its folder.
OWN = (
    "args.yaml", "metrics.train.jsonl", "metrics.eval.jsonl", "curves.png", "report.html", ".wandb_id", ".launch",
    "identity.json",
    "evaluation_000004.json", "not_finite_step_000003.json", "checkpoints/checkpoint_000002/train_state.json",
    "checkpoints/.checkpoint_000003.tmp/state", "samples/step_000000/00.wav", "tensorboard/events", "wandb/log",
    "evaluation_on_train/evaluation_000004.json",
)  # fmt: skip
FOREIGN = ("mine.txt", "metrics.json", "evaluation.json", "notes/args.yaml")


class OneRank(World):
    """The main rank of a single process, without a process group."""

    def broadcast(self, value):
        return value


class SecondRank(World):
    """A rank to which the main rank sends `message`."""

    message = None

    def broadcast(self, value):
        assert value is None
        return self.message


def main_rank(launch="a"):
    return OneRank(0, 1, 0, 1, torch.device("cpu"), launch)


def settings(folder, **changes):
    values = {"data": {"train_data": "train.jsonl"}, "lora": {"enable": True, "rank": 4}, "run_dir": str(folder)}
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (values.setdefault(section, {}) if section else values)[name] = value
    return TrainArgs.model_validate(values)


IDENTITY = {"data.train_data": "a", "moshi_paths": "b", "prompt.voices_dir": ""}


def open_run(args, world, **changes):
    with run_dir.open_run(args, world, IDENTITY | {key.replace("__", "."): v for key, v in changes.items()}) as folder:
        return folder


@pytest.fixture
def run(tmp_path):
    """The folder of a run that has begun with `settings`."""
    return open_run(settings(tmp_path / "run"), main_rank())


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fill(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(name)


def test_a_new_folder_gets_the_settings_without_secrets(tmp_path):
    args = settings(tmp_path / "deep/run", wandb__key="secret", wandb__project="p", optim__betas=(0.5, 0.75))
    assert open_run(args, main_rank()) == tmp_path / "deep/run"
    assert contents(tmp_path / "deep/run").keys() == {"args.yaml", "identity.json"}
    written = yaml.safe_load((tmp_path / "deep/run/args.yaml").read_text())
    assert written["wandb"]["project"] == "p" and "secret" not in str(written)
    assert written["optim"]["betas"] == [0.5, 0.75] and written["run_dir"] == str(tmp_path / "deep/run")


def test_a_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    check_run_dir(settings("~/run"))
    assert open_run(settings("~/run"), main_rank()) == tmp_path / "run"
    assert (tmp_path / "run/args.yaml").is_file()


def test_some_settings_may_change_during_a_run(run, caplog):
    changes = {"max_steps": 7, "data__num_workers": 0, "wandb__project": "p", "batch_size": 3, "run_dir": str(run)}
    with caplog.at_level(logging.INFO):
        open_run(settings(run, **changes), main_rank())
    assert yaml.safe_load((run / "args.yaml").read_text())["max_steps"] == 7
    changed = [record.getMessage() for record in caplog.records]
    assert [line.split()[-4] for line in changed] == ["batch_size", "data.num_workers", "max_steps", "wandb.project"]
    assert changed[2].endswith("max_steps 100 -> 7")
    caplog.clear()
    open_run(settings(run, **changes), main_rank())
    assert not caplog.records


@pytest.mark.parametrize("check", [check_run_dir, lambda args: open_run(args, main_rank())])
def test_other_settings_must_not_and_are_listed(run, check):
    before = contents(run)
    with pytest.raises(UserError) as error:
        check(settings(run, max_norm=5e-4, lora__rank=8, max_steps=9, data__shuffle=True, seed=1))
    head, *lines = str(error.value).splitlines()
    assert str(run) in head and "another run_dir" in head and "overwrite_run_dir" in head
    assert [line.split(":")[0] for line in lines] == ["  - data.shuffle", "  - lora.rank", "  - max_norm", "  - seed"]
    assert lines[1].split(": ")[1] == "was 4, now 8"
    assert contents(run) == before


def test_settings_that_no_longer_exist_are_ignored(run, caplog):
    """A run that an older version began continues, whatever value the setting had."""
    written = yaml.safe_load((run / "args.yaml").read_text())
    written |= {"compile": True, "removed": {"deep": 3}, "lora": written["lora"] | {"dropout": 0.1}}
    (run / "args.yaml").write_text(yaml.safe_dump(written))
    check_run_dir(settings(run))
    with caplog.at_level(logging.INFO):
        open_run(settings(run), main_rank())
    assert not caplog.records
    assert not {"compile", "removed"} & yaml.safe_load((run / "args.yaml").read_text()).keys()
    (run / "args.yaml").write_text(yaml.safe_dump(written))
    with pytest.raises(UserError, match=r"lora\.rank: was 4, now 8") as error:
        check_run_dir(settings(run, lora__rank=8))
    assert "compile" not in str(error.value) and "dropout" not in str(error.value)


def test_checking_changes_nothing(tmp_path, run):
    before = contents(run)
    check_run_dir(settings(tmp_path / "new"))
    check_run_dir(settings(run, max_steps=3))
    check_run_dir(settings(run, overwrite_run_dir=True, lora__rank=8))
    assert not (tmp_path / "new").exists() and contents(run) == before


def test_a_file_or_a_place_without_a_folder_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for call in (check_run_dir, lambda args: open_run(args, main_rank())):
        with pytest.raises(UserError, match=r"run_dir: .*file"):
            call(settings(file))
    with pytest.raises(UserError, match=r"run_dir: .*file/run .*; name a folder"):
        open_run(settings(file / "run"), main_rank())
    assert file.read_text() == "mine"


def test_other_ranks_follow_the_main_rank(tmp_path):
    rank = SecondRank(1, 2, 1, 2, torch.device("cpu"), "a")
    args = settings(tmp_path / "run", overwrite_run_dir=True)
    fill(tmp_path / "run", OWN)
    before = contents(tmp_path / "run")
    assert open_run(args, rank) == tmp_path / "run"
    SecondRank.message = "run_dir: the main rank has a problem"
    try:
        with pytest.raises(UserError, match="the main rank has a problem"):
            open_run(args, rank)
    finally:
        SecondRank.message = None
    assert contents(tmp_path / "run") == before


# --- overwriting ---------------------------------------------------------------------------------------------------


def test_overwriting_removes_what_runs_write_and_nothing_else(run, tmp_path):
    fill(run, (*OWN, *FOREIGN))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/old.jsonl").write_text("kept")
    shutil.rmtree(run / "samples")
    (run / "samples").symlink_to(tmp_path / "elsewhere")
    open_run(settings(run, overwrite_run_dir=True, lora__rank=8), main_rank("b"))
    assert contents(run).keys() == {"args.yaml", ".launch", "identity.json", *FOREIGN}
    assert yaml.safe_load((run / "args.yaml").read_text())["lora"]["rank"] == 8
    assert (tmp_path / "elsewhere/old.jsonl").read_text() == "kept" and not (run / "samples").exists()


def test_a_folder_that_holds_no_run_is_not_emptied(tmp_path):
    fill(tmp_path / "run", ["checkpoints/checkpoint_000002/model", "samples/00.wav"])
    open_run(settings(tmp_path / "run", overwrite_run_dir=True), main_rank())
    assert {"checkpoints/checkpoint_000002/model", "samples/00.wav"} <= contents(tmp_path / "run").keys()


@pytest.mark.parametrize("fails_at", range(len(OWN)))
def test_a_removal_that_was_interrupted_is_completed(run, monkeypatch, fails_at):
    """The folder still counts as one of a run, at whatever file the process was killed."""
    fill(run, OWN)
    removed = []

    def interrupted(remove):
        def remove_one(path, *args, **kwargs):
            removed.append(path)
            if len(removed) > fails_at:
                raise KeyboardInterrupt
            remove(path, *args, **kwargs)

        return remove_one

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted(shutil.rmtree))
        patch.setattr(type(run), "unlink", interrupted(type(run).unlink))
        try:
            remove_run(run)
        except KeyboardInterrupt:
            assert (run / "args.yaml").is_file()
    open_run(settings(run, overwrite_run_dir=True), main_rank())
    assert contents(run).keys() == {"args.yaml", ".launch", "identity.json"}


@pytest.mark.parametrize(
    "job, restarts, launch, emptied",
    [
        (None, None, "a", False),  # torchrun has restarted its processes
        (None, None, "b", True),  # the user has started the command again
        ("17", "1", "b", False),  # SLURM has requeued the job
        ("17", None, "b", True),  # the same job has started the command a second time
        ("17", "0", "b", True),
        ("18", "1", "b", True),  # another job, which was requeued before it came to training
    ],
)
def test_a_restart_does_not_overwrite_its_own_run(tmp_path, monkeypatch, job, restarts, launch, emptied):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", "17")
    args = settings(tmp_path / "run", overwrite_run_dir=True)
    folder = open_run(args, main_rank("a"))
    fill(folder, OWN)
    for name, value in (("SLURM_JOB_ID", job), ("SLURM_RESTART_COUNT", restarts)):
        if value:
            monkeypatch.setenv(name, value)
    open_run(args, main_rank(launch))
    assert (not (folder / "checkpoints").exists()) == emptied
    fill(folder, OWN)
    open_run(args, main_rank(launch))
    assert (folder / "checkpoints").exists(), "once per launch"


@pytest.mark.parametrize("stored", ["", "{", json.dumps({"process": None, "slurm": None})])
def test_an_unknown_launch_is_not_taken_for_a_restart(run, stored, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    fill(run, OWN)
    (run / ".launch").write_text(stored)
    open_run(settings(run, overwrite_run_dir=True), main_rank())
    assert not (run / "checkpoints").exists()


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_checkpoints_are_listed_by_their_numbers(tmp_path):
    assert list_checkpoints(tmp_path) == []
    names = ["checkpoint_1000000", "checkpoint_999999", "checkpoint_000020"]
    for name in (*names, ".checkpoint_000030.tmp", "checkpoint_last", "other_000040"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints/checkpoint_000050").write_text("a file")
    found = list_checkpoints(tmp_path)
    assert found == [(n, tmp_path / f"checkpoints/checkpoint_{n:06d}") for n in (20, 999_999, 1_000_000)]


# --- Data and models that are moved ----------------------------------------------------------------------------------

MOVED = {
    "data__train_data": "elsewhere/train.jsonl",
    "moshi_paths__hf_repo_id": "/elsewhere",
    "prompt__voices_dir": "v",
}


@pytest.mark.parametrize("setting", MOVED)
def test_a_path_may_change_if_it_leads_to_the_same_files(run, setting):
    args = settings(run, **{setting: MOVED[setting]})
    check_run_dir(args)
    open_run(args, main_rank())
    assert MOVED[setting] in (run / "args.yaml").read_text()
    other = {key: "other" for key in IDENTITY if setting.replace("__", ".").startswith(key)}
    with pytest.raises(UserError, match=r"other settings|another model"):
        open_run(settings(run), main_rank(), **other)
    (run / "identity.json").unlink()  # a run of an earlier version: nothing is known
    with pytest.raises(UserError, match="other settings"):
        open_run(settings(run), main_rank())


def test_another_model_under_the_same_path_is_refused(run):
    with pytest.raises(UserError, match="another model"):
        open_run(settings(run), main_rank(), moshi_paths="c")
    open_run(settings(run), main_rank(), data__train_data="grown")  # of which a run warns
