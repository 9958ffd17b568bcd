"""Checkpoints: complete or absent, verified before they are loaded, and independent of the number of ranks."""

import json
import logging
import os
import pickle
import random
import resource
import shutil
import zlib
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from finetune.checkpointing import load_checkpoint, newest_complete
from finetune.cli import UserError
from finetune.distributed import session
from finetune.run_dir import list_checkpoints
from finetune.saver import Saver
from tests.support import run_ranks

STATE = {"position": 24, "skipped": 1, "seed": 7}


class Inference:
    """Stands for the part that inference loads."""

    def gather(self, lm, is_main):
        return {"weights": b"weights"} if is_main else {}

    def write(self, tensors, folder):
        (folder / "config.json").write_text("{}")
        (folder / "lora.safetensors").write_bytes(tensors["weights"])


class Training:
    """A tiny model with a frozen parameter, some steps of AdamW, and its run folder."""

    def __init__(self, folder, world, seed=0, width=5):
        self.folder, self.world, self.step = folder, world, 0
        self.saver = Saver(folder, world, Inference(), None)
        torch.manual_seed(seed)
        self.lm = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 3))
        self.lm[0].bias.requires_grad_(False)
        trained = [p for p in self.lm.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.1, fused=True)

    def train(self, steps):
        for _ in range(steps):
            self.step += 1
            self.lm(torch.arange(8.0).view(2, 4) * self.step).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def begin(self):
        self.saver.begin(self.step, self.lm, self.optimizer, STATE)
        return self

    def save(self, keep=None):
        self.saver._keep = keep
        return self.begin().saver.finish().path

    def load(self):
        path, state = newest_complete(self.folder, self.world)
        load_checkpoint(path, self.lm, self.optimizer, state["step"])
        self.step = state["step"]
        return self

    def tensors(self):
        moments = [moments[key] for moments in self.optimizer.state.values() for key in sorted(moments)]
        return [tensor.clone() for tensor in (*self.lm.state_dict().values(), *moments)]


@pytest.fixture
def one_rank():
    with session("cpu") as world:
        yield world


@pytest.fixture
def training(tmp_path, one_rank):
    return Training(tmp_path / "run", one_rank)


def steps_saved(training):
    return [step for step, _ in list_checkpoints(training.folder)]


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "finetune.checkpointing"]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


# --- what is saved -------------------------------------------------------------------------------------------------


def test_a_loaded_model_continues_as_if_it_had_not_stopped(training, one_rank):
    training.train(3).save()
    resumed = Training(training.folder, one_rank, seed=1)
    resumed.lm[0].bias.data.copy_(training.lm[0].bias)  # the frozen parameter comes from the base model
    assert not same(resumed.lm.state_dict().values(), training.lm.state_dict().values())
    assert same(resumed.load().tensors(), training.tensors()) and resumed.step == 3
    assert same(resumed.train(2).tensors(), training.train(2).tensors())


def test_a_checkpoint_before_the_first_step_can_be_saved(training, one_rank):
    training.save()
    resumed = Training(training.folder, one_rank).load()
    assert same(resumed.train(2).tensors(), training.train(2).tensors())


def test_the_files_are_described(training):
    path = training.train(2).save()
    assert path == training.folder / "checkpoints/checkpoint_000002"
    state = json.loads((path / "train_state.json").read_text())
    assert state.pop("crc") == zlib.crc32(json.dumps(state, sort_keys=True).encode())
    files = state.pop("files")
    assert state == STATE | {"step": 2}
    present = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    assert files.keys() == present.keys() - {"train_state.json"}
    assert {"state/.metadata", "consolidated/config.json", "consolidated/lora.safetensors"} < files.keys()
    for name, (size, crc) in files.items():
        assert size == len(present[name])
        assert crc == (zlib.crc32(present[name]) if name.startswith("state/") else None), name


def test_only_trained_parameters_are_saved(training):
    metadata = dcp.FileSystemReader(training.train(1).save() / "state").read_metadata()
    names = [
        f"{kind}.{name}" for kind in ("param", "exp_avg", "exp_avg_sq") for name in ("0.weight", "1.weight", "1.bias")
    ]
    assert sorted(metadata.state_dict_metadata) == sorted(names)
    assert {entry.properties.dtype for entry in metadata.state_dict_metadata.values()} == {torch.float32}


def test_old_checkpoints_are_removed(training):
    for _ in range(4):
        training.train(1).save()
    assert steps_saved(training) == [1, 2, 3, 4]
    training.train(1).save(keep=3)
    assert steps_saved(training) == [3, 4, 5]
    training.train(1).save(keep=1)
    assert steps_saved(training) == [6]


# --- which one is loaded -------------------------------------------------------------------------------------------


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def state_without_files(path):
    path.write_text(json.dumps({"step": 2}))


def another_position(path):
    path.write_text(path.read_text().replace('"position": 24', '"position": 25'))


DAMAGE = {
    "truncated": ("state/*.distcp", lambda path: path.write_bytes(path.read_bytes()[:-7]), "bytes instead of"),
    "longer": ("state/*.distcp", lambda path: path.write_bytes(path.read_bytes() + b"!"), "bytes instead of"),
    "empty": ("state/*.distcp", lambda path: path.write_bytes(b""), "has 0 bytes"),
    "changed": ("state/*.distcp", flip, "have changed"),
    "missing": ("state/*.distcp", lambda path: path.unlink(), "No such file"),
    "metadata": ("state/.metadata", flip, "have changed"),
    "no state": ("train_state.json", lambda path: path.unlink(), "No such file"),
    "broken state": ("train_state.json", lambda path: path.write_text('{"step": 2'), "damaged"),
    "other state": ("train_state.json", lambda path: path.write_text("[1]"), "damaged"),
    "no list": ("train_state.json", state_without_files, "incomplete"),
    "a changed digit": ("train_state.json", another_position, "have changed"),
    "a list of lists": ("train_state.json", lambda path: path.write_text("[" * 100_000), "recursion"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(training, caplog, name):
    pattern, damage, words = DAMAGE[name]
    training.train(1).save()
    expected = training.tensors()
    damage(next(training.train(1).save().glob(pattern)))
    assert same(training.load().tensors(), expected) and training.step == 1
    [warning] = messages(caplog)
    assert "checkpoint_000002 is damaged" in warning and words in warning


@pytest.mark.parametrize("name", DAMAGE)
def test_a_run_is_not_begun_again_because_all_checkpoints_are_damaged(training, name):
    pattern, damage, words = DAMAGE[name]
    for count in (1, 2):
        damage(next(training.train(1).save().glob(pattern)))
        with pytest.raises(UserError) as error:
            newest_complete(training.folder, training.world)
        message = str(error.value)
        assert f"{training.folder}: all {count} checkpoints are damaged (checkpoint_00000{count}: " in message
        assert words in message and "copy them" in message and "another run_dir" in message
    assert steps_saved(training) == [1, 2]


def test_the_newest_checkpoint_is_loaded_and_none_is_needed(training, caplog):
    assert newest_complete(training.folder, training.world) is None
    for _ in range(2):
        training.train(5).save()
    path, state = newest_complete(training.folder, training.world)
    assert path.name == "checkpoint_000010" and state["step"] == 10 and state["position"] == 24
    assert not messages(caplog)


def test_files_for_inference_may_be_edited_and_removed(training):
    path = training.train(1).save()
    (path / "consolidated/config.json").write_text("edited by the user")
    (path / "consolidated/lora.safetensors").unlink()
    assert newest_complete(training.folder, training.world)[0] == path


def test_a_damaged_checkpoint_of_a_later_step_does_not_outlive_new_ones(training):
    """With one to keep, the damaged one would be kept as the newest, and each new one removed."""
    training.train(2).save()
    later = training.folder / "checkpoints/checkpoint_000100"
    shutil.copytree(training.folder / "checkpoints/checkpoint_000002", later)
    (later / "train_state.json").write_text("{")
    training.load().train(1).save(keep=1)
    assert steps_saved(training) == [3]
    assert training.load().step == 3


def test_a_damaged_checkpoint_is_replaced_by_the_same_step(training):
    training.train(1).save()
    flip(next(training.train(1).save().glob("state/*.distcp")))
    assert training.load().step == 1
    training.train(1).save()
    expected = training.tensors()
    assert same(training.load().tensors(), expected) and training.step == 2


def test_a_checkpoint_of_another_model_is_refused(training, one_rank):
    training.train(1).save()
    other = Training(training.folder, one_rank, width=6)
    with pytest.raises(UserError, match=r"checkpoint_000001/state: cannot be loaded into this model"):
        other.load()


class Crafted:
    def __reduce__(self):
        return os.system, ("touch crafted",)


@pytest.mark.parametrize("entry", [Crafted(), BytesStorageMetadata()])
def test_a_foreign_checkpoint_runs_no_code(training, tmp_path, monkeypatch, entry):
    monkeypatch.chdir(tmp_path)
    path = training.train(1).save()
    metadata = pickle.loads((path / "state/.metadata").read_bytes())
    metadata.state_dict_metadata[next(iter(metadata.state_dict_metadata))] = entry
    content = pickle.dumps(metadata)
    (path / "state/.metadata").write_bytes(content)
    state = json.loads((path / "train_state.json").read_text())
    state["files"]["state/.metadata"] = [len(content), zlib.crc32(content)]
    del state["crc"]
    (path / "train_state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="cannot be loaded into this model"):
        training.load()
    assert not (tmp_path / "crafted").exists()


# --- power failures ------------------------------------------------------------------------------------------------


class Disk:
    """What a power failure would leave of a folder: names and contents as they were last synced or, at random, as they
    are now, because a system may write at any time. Each change of a name and each sync is a point of failure."""

    POINTS = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")

    def __init__(self, root, images, monkeypatch):
        self.root, self.images, self.random, self.count, self.busy = root, images, random.Random(0), 0, False
        self.names, self.contents, self.kept = {}, {}, []
        for parent, _, files in os.walk(root):
            for path in (parent, *(os.path.join(parent, name) for name in files)):
                self.synced(path)
        for name in self.POINTS:
            monkeypatch.setattr(os, name, partial(self.point, name, getattr(os, name)))

    def point(self, name, function, first, *args, **kwargs):
        if not self.busy:
            self.busy = True
            self.fail()
            self.busy = False
        result = function(first, *args, **kwargs)
        if name == "fsync":
            self.synced(os.readlink(f"/proc/self/fd/{first}"))
        return result

    def synced(self, path):
        self.kept.append(os.open(path, os.O_RDONLY))  # so that no other file gets its number
        if os.path.isdir(path):
            self.names[os.stat(path).st_ino] = self.listed(path)
        else:
            with open(path, "rb") as file:
                self.contents[os.stat(path).st_ino] = file.read()

    @staticmethod
    def listed(path):
        return {entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(path)}

    def fail(self):
        now = {os.stat(self.root).st_ino: str(self.root)}
        for parent, folders, files in os.walk(self.root):
            now |= {os.stat(path := os.path.join(parent, name)).st_ino: path for name in folders + files}
        for chance in (0.0, 0.5, 0.5, 1.0):  # that the system has written something by itself
            self.build(os.stat(self.root).st_ino, True, self.images / f"{self.count:04d}/run", now, chance)
            self.count += 1

    def build(self, number, is_folder, target, now, chance):
        early = number in now and self.random.random() < chance
        if is_folder:
            target.mkdir(parents=True)
            names = self.listed(now[number]) if early else self.names.get(number, {})
            for name, inner in names.items():
                self.build(*inner, target / name, now, chance)
        elif early:
            shutil.copyfile(now[number], target)
        else:
            target.write_bytes(self.contents.get(number, b""))


def test_a_power_failure_at_any_point_leaves_a_checkpoint(training, tmp_path, monkeypatch, caplog):
    training.train(1).save()
    saved = {1: training.tensors(), 2: training.train(1).tensors()}
    with monkeypatch.context() as patch:
        disk = Disk(training.folder, tmp_path / "images", patch)
        training.save(keep=1)
    found = []
    for folder in sorted((tmp_path / "images").glob("*/run")):
        survivor = Training(folder, training.world).load()
        assert same(survivor.tensors(), saved[survivor.step]), folder
        found.append(survivor.step)
    assert disk.count == len(found) > 60 and set(found) == {1, 2} and found[-1] == 2


# --- what happens when it cannot be saved --------------------------------------------------------------------------


def test_a_kill_while_saving_does_not_prevent_the_next_attempt(training, monkeypatch):
    training.train(1).save()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        training.train(1).save()
    abandoned = training.folder / "checkpoints/.checkpoint_000002.tmp"
    shutil.copytree(abandoned, abandoned.with_name(".checkpoint_000001.tmp"))
    assert steps_saved(training) == [1] and newest_complete(training.folder, training.world)[1]["step"] == 1
    assert training.save() is not None
    assert {p.name for p in abandoned.parent.iterdir()} == {"checkpoint_000001", "checkpoint_000002"}


def fail(*_, **__):
    raise OSError("the disk is full")


def fail_in_torch(*_, **__):
    raise dcp.api.CheckpointException("failed", {0: (OSError("the disk is full\nand so on"), None)})


@pytest.mark.parametrize(
    "place, failure",
    [
        ("pathlib.Path.mkdir", fail),
        ("torch.distributed.checkpoint.save", fail),
        ("torch.distributed.checkpoint.save", fail_in_torch),
        ("tests.test_checkpointing.Inference.write", fail),
        ("finetune.checkpointing._SummedFile.write", fail),
        ("os.fsync", fail),
        ("os.replace", fail),
    ],
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_others_alone(training, monkeypatch, caplog, place, failure):
    training.train(1).save()
    expected = training.tensors()
    with monkeypatch.context() as patch:
        patch.setattr(place, failure)
        assert training.train(1).save(keep=1) is None
    [message] = messages(caplog)
    assert "step 2" in message and "(the disk is full)" in message
    assert ("finetune.checkpointing", logging.ERROR, message) in caplog.record_tuples
    assert [p.name for p in (training.folder / "checkpoints").iterdir()] == ["checkpoint_000001"]
    assert same(training.load().tensors(), expected)


def test_a_disk_that_is_really_full(tmp_path, one_rank, caplog):
    training = Training(tmp_path / "run", one_rank, width=20_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert training.train(1).save() is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not be written" in caplog.text and not list((training.folder / "checkpoints").iterdir())
    assert training.save() is not None


# --- two ranks -----------------------------------------------------------------------------------------------------

TWO_RANKS = """
import sys
from pathlib import Path
import finetune.checkpointing as checkpointing
from torch.distributed.fsdp import fully_shard
from finetune.distributed import make_mesh, session
from tests.test_checkpointing import Training, fail

crc, read = checkpointing._crc, []
def recorded_crc(path):
    read.append(path.name)
    return crc(path)

def shares(world):
    names = [name for share in world.gather(read) for name in share]
    read.clear()
    return sorted(names)

with session("cpu") as world:
    training = Training(Path(sys.argv[1]), world)
    fully_shard(training.lm, mesh=make_mesh(world, "full"))
    training.optimizer.param_groups.clear()
    training.optimizer.add_param_group({"params": [p for p in training.lm.parameters() if p.requires_grad]})
    checkpointing._crc = recorded_crc
    training.load().train(2)
    assert shares(world) == [".metadata", "__0_0.distcp"], "each file is read by one rank"
    assert training.save().name == "checkpoint_000005"
    assert shares(world) == [], "what is written is not read"
    assert training.load().step == 5
    training.train(1)
    write = checkpointing._SummedFile.write
    if world.rank == 1:
        checkpointing._SummedFile.write = fail
    assert training.save() is None, "a failure of one rank is one of all"
    checkpointing._SummedFile.write = write
    if world.rank == 1:
        checkpointing._crc = lambda path: 0 if "checkpoint_000005" in str(path) else crc(path)
    assert checkpointing.newest_complete(training.folder, world)[1]["step"] == 3, "damage that one rank finds"
"""


def test_two_ranks_continue_what_one_has_saved_and_the_reverse(training, one_rank, tmp_path):
    training.train(3).save()
    (tmp_path / "two_ranks.py").write_text(TWO_RANKS)
    outputs = run_ranks(tmp_path / "two_ranks.py", training.folder)
    assert "the checkpoint of step 6 could not be written (the disk is full)" in outputs[0]
    assert "could not be written" not in outputs[1], "only the main rank reports it"
    assert steps_saved(training) == [3, 5]
    state = json.loads((training.folder / "checkpoints/checkpoint_000005/train_state.json").read_text())
    assert {"state/__0_0.distcp", "state/__1_0.distcp"} < state["files"].keys()
    resumed = Training(training.folder, one_rank).load()
    assert resumed.step == 5
    for ours, theirs in zip(resumed.tensors(), training.train(2).tensors(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
