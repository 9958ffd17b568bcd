"""Claims on folders: one holder at a time, and a dead one does not hold."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from finetune import claim
from finetune.claim import claimed, refuse_if_claimed
from finetune.cli import UserError
from tests.support import ROOT, script, write_config

HOLD = """
import sys, time
from pathlib import Path
from finetune.claim import claimed
from finetune.cli import UserError
try:
    with claimed(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
except UserError as error:
    print("refused", error, flush=True)
"""


def holder(folder, seconds=60.0):
    command = [sys.executable, "-c", HOLD, str(folder), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def held(tmp_path):
    process = holder(tmp_path)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def elsewhere(folder, **changes):
    """Write the claim of a process on another machine."""
    content = {"machine": "other", "pid": 1, "start": "1", "host": "node7", "since": "noon", "command": "train.py"}
    (folder / ".claim").write_text(json.dumps(content | changes))


def test_a_folder_that_is_held_is_refused_by_name_until_its_holder_has_ended(tmp_path, held):
    for attempt in (lambda: refuse_if_claimed(tmp_path), lambda: claimed(tmp_path).__enter__()):
        with pytest.raises(UserError, match=rf"{tmp_path.name}: .*process {held.pid} on "):
            attempt()
    held.send_signal(signal.SIGKILL)
    held.wait()
    refuse_if_claimed(tmp_path)
    began = time.monotonic()
    with claimed(tmp_path):
        assert time.monotonic() - began < claim.SETTLE_SEC + 2, "a dead process of this machine is not waited for"
        with pytest.raises(UserError), claimed(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []
    with claimed(tmp_path):
        pass


def test_a_process_number_that_another_process_has_now_does_not_hold(tmp_path):
    elsewhere(tmp_path, machine=claim._machine(), pid=os.getpid(), start="1")
    with claimed(tmp_path):
        assert json.loads((tmp_path / ".claim").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_claim_of_another_machine_holds_while_it_is_touched(tmp_path, monkeypatch, content):
    monkeypatch.setattr(claim, "DEAD_SEC", 1.0)
    monkeypatch.setattr(claim, "SETTLE_SEC", 0.0)
    elsewhere(tmp_path)
    if content:
        (tmp_path / ".claim").write_text(content)
    touched = threading.Timer(0.5, lambda: os.utime(tmp_path / ".claim", ns=(5, 5)))
    touched.start()
    with pytest.raises(UserError, match="in use by"), claimed(tmp_path):
        pass
    with claimed(tmp_path):
        assert json.loads((tmp_path / ".claim").read_text())["pid"] == os.getpid()


def test_of_many_that_take_a_dead_claim_over_one_gets_it(tmp_path):
    elsewhere(tmp_path, machine=claim._machine(), pid=2**22 + 1)
    processes = [holder(tmp_path, 4) for _ in range(5)]
    answers = [process.communicate(timeout=60)[0].split()[0] for process in processes]
    assert sorted(answers) == ["held"] + ["refused"] * 4


def test_a_holder_touches_its_claim_and_ends_once_it_has_lost_it(tmp_path):
    program = HOLD.replace("try:", "import finetune.claim; finetune.claim.BEAT_SEC = 0.2\ntry:", 1)
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path), "60"], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    os.utime(tmp_path / ".claim", (5, 5))
    deadline = time.monotonic() + 20
    while (tmp_path / ".claim").stat().st_mtime < 10 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / ".claim").stat().st_mtime > 10
    elsewhere(tmp_path)
    assert process.wait(20) == 2 and "other" in (tmp_path / ".claim").read_text()


def test_a_second_run_in_one_folder_is_refused_before_it_loads_a_model(world, tmp_path):
    config = write_config(tmp_path, world)
    (tmp_path / "run").mkdir()
    with claimed(tmp_path / "run"):
        done = script("train_personaplex.py", config, check=False)
    assert done.returncode == 2 and f"process {os.getpid()}" in done.stderr and "Traceback" not in done.stderr
    assert list((tmp_path / "run").iterdir()) == []
