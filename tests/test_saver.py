"""Checkpoints are written while training goes on."""

import logging
import threading
import weakref

import pytest
import torch
from torch.distributed.tensor import DTensor

from finetune import checkpointing, saver
from finetune.args import OptimArgs
from finetune.distributed import make_mesh, session, shard
from finetune.model.consolidated import Artefact
from finetune.optim import build_optimizer
from finetune.saver import Saver
from tests.accelerator import Accelerator
from tests.engine import tiny_lm
from tests.support import wait_for
from tests.test_checkpointing import Training, fail, same, steps_saved
from tests.tools.stored import SCALING, adapted


@pytest.fixture
def training(tmp_path):
    with session("cpu") as world:
        yield Training(tmp_path / "run", world)


@pytest.fixture
def disk(monkeypatch):
    """A disk that is ready when it is told to be."""
    ready, write = threading.Event(), checkpointing._SummedFile.write

    def wait_and_write(file, data):
        assert ready.wait(30)
        return write(file, data)

    monkeypatch.setattr(checkpointing._SummedFile, "write", wait_and_write)
    return ready


def test_a_checkpoint_holds_the_state_of_its_step_although_training_goes_on(training, disk):
    expected = training.train(2).begin().tensors()
    training.train(3)
    assert not same(training.tensors(), expected)
    assert not training.saver.is_complete and steps_saved(training) == []
    disk.set()
    saved = training.saver.finish()
    assert saved.step == 2 and saved.path.name == "checkpoint_000002" and steps_saved(training) == [2]
    assert same(training.load().tensors(), expected) and training.step == 2


def test_training_waits_only_if_it_must(training, disk):
    training.train(1).begin()
    disk.set()
    wait_for(lambda: training.saver.is_complete)
    beside = training.saver.finish()
    disk.clear()
    training.train(1).begin()
    threading.Timer(0.5, disk.set).start()
    waited = training.saver.finish()
    assert waited.seconds > 0.5 and waited.stopped > 0.5
    assert 0 < beside.stopped < beside.seconds
    assert training.saver.finish() is None and not training.saver.is_complete


def test_a_failure_while_training_goes_on_is_reported_at_once(training, disk, monkeypatch, caplog):
    training.begin()
    monkeypatch.setattr("os.replace", fail)
    with caplog.at_level(logging.ERROR):
        disk.set()
        wait_for(lambda: training.saver.is_complete)
        assert "the checkpoint of step 0 could not be written (the disk is full)" in caplog.text
    assert training.saver.finish().path is None and steps_saved(training) == []


def test_no_copy_stays_in_memory(tmp_path, monkeypatch):
    """When a checkpoint is complete, although torch's reference cycles still refer to it."""
    copies, gathered, write = [], [], saver.write_checkpoint

    def note_and_write(folder, state, tensors, *rest):
        copies.extend(t.to_local() if isinstance(t, DTensor) else t for t in state.values())
        gathered.extend(map(weakref.ref, tensors.values()))
        return write(folder, state, tensors, *rest)

    monkeypatch.setattr(saver, "write_checkpoint", note_and_write)
    with session("cpu") as world:
        lm = tiny_lm(8)
        shard(lm, [], make_mesh(world, "full"), torch.float32)
        own = Saver(tmp_path, world, Artefact({}, None, torch.float32), None)
        own.begin(1, lm, build_optimizer(lm, OptimArgs()), {})
        assert own.finish().path is not None
    assert len(copies) == 3 * len(gathered) == 3 * len(list(lm.parameters()))
    sizes = {copy.untyped_storage().nbytes() for copy in copies}
    alive = sum(copy() is not None for copy in gathered)
    assert sizes == {0} and not alive


def test_an_error_of_the_program_is_not_taken_for_one_of_the_disk(training, monkeypatch):
    monkeypatch.setattr("tests.test_checkpointing.Inference.write", lambda *_: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        training.begin().saver.finish()
    monkeypatch.undo()
    assert training.save() is not None


def test_what_is_saved_leaves_the_accelerator(training, monkeypatch):
    """The thread that writes has no part in its queue of work."""
    accelerator, written = Accelerator(monkeypatch), []
    note = lambda _, state, tensors, *rest: written.extend((dict(state), dict(tensors)))
    monkeypatch.setattr(saver, "write_checkpoint", note)
    lm = accelerator.move(adapted(tiny_lm(8)))
    with accelerator.on():
        optimizer = build_optimizer(lm, OptimArgs())
        own = Saver(training.folder, training.world, Artefact({}, SCALING, torch.bfloat16), None)
        own.begin(1, lm, optimizer, {})
    own.finish()
    state, tensors = written
    assert {tensor.device.type for tensor in (*state.values(), *tensors.values())} == {"cpu"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16} and len(state) > len(tensors)
