"""Shards as real jobs of this machine, failures on disk, files that are whole or absent."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from finetune.cli import UserError
from finetune.files import replacing
from finetune.jobs.failures import Failures, HoursBar, device_of, error_file, forget_error, take_shard
from finetune.jobs.slurm import SlurmQueue, _death_reason, run_shards
from tests.support import ROOT, alive, wait_for


def square_or_die(folder: str, index: int, count: int) -> int:
    if index == 1:
        raise ValueError("the disk is full")
    if index == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    Path(folder, f"{index}.done").touch()
    return 10 * index + count


def note_and_sleep(folder: str, index: int, count: int) -> None:
    Path(folder, f"{index}-{os.getpid()}.pid").touch()
    time.sleep(60)


def test_shards_partition_the_items_and_balance_sorted_lengths():
    lengths = sorted((7 * i % 101 for i in range(100)), reverse=True)
    shards = [take_shard(lengths, i, 8) for i in range(8)]
    assert sorted(x for s in shards for x in s) == sorted(lengths)
    totals = [sum(s) for s in shards]
    assert max(totals) - min(totals) <= max(lengths)
    assert take_shard([1, 2], 5, 8) == []


@pytest.mark.slow
def test_dead_shards_are_named_and_the_others_keep_their_results(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("submitit.Job._results_timeout_s", 1)  # seconds it waits for a slow network disk
    done = run_shards(partial(square_or_die, str(tmp_path)), 4, tmp_path / "jobs", "squares")
    assert done.results == {0: 4, 3: 34}
    assert len(done.dead) == 2
    assert "squares shard 2 of 4" in done.dead[0] and "ValueError: the disk is full" in done.dead[0]
    assert "squares shard 3 of 4" in done.dead[1] and "state" in done.dead[1]
    log = done.dead[0].split("its log is ")[1]
    assert "the disk is full" in Path(log).read_text()
    assert {p.name for p in tmp_path.glob("*.done")} == {"0.done", "3.done"}
    assert "4 of 4 shards ended, 2 dead" in capfd.readouterr().err


def what_is_told(index: int, count: int) -> tuple[str | None, float]:
    return os.environ.get("CUDA_VISIBLE_DEVICES"), int(os.environ["SUBMITIT_LOCAL_TIMEOUT_S"]) / 3600 / 24


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [None, "", "3,1", "GPU-5ebe9f43"])
def test_jobs_of_this_machine_see_its_gpus_and_have_time(tmp_path, monkeypatch, gpus):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if gpus is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    told = run_shards(what_is_told, 2, tmp_path / "jobs", "asking", gpus=1).results
    assert told == {0: (gpus, 365.0), 1: (gpus, 365.0)}


@pytest.mark.slow
def test_ctrl_c_ends_the_jobs_too(tmp_path):
    code = (
        "from functools import partial; from pathlib import Path; from tests.jobs.test_slurm import note_and_sleep\n"
        "from finetune.cli import run; from finetune.jobs.slurm import run_shards\n"
        f"folder = {str(tmp_path)!r}\n"
        "run(lambda: run_shards(partial(note_and_sleep, folder), 2, Path(folder, 'jobs'), 'nap'))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)
    wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    jobs = [int(path.stem.split("-")[1]) for path in tmp_path.glob("*.pid")]
    parent.send_signal(signal.SIGINT)
    assert b"interrupted" in parent.communicate(timeout=30)[1] and parent.returncode == 130
    wait_for(lambda: not any(map(alive, jobs)))


def test_without_slurm_a_partition_is_refused_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="partition 'gpu'"):
        run_shards(partial(square_or_die, str(tmp_path)), 2, tmp_path / "jobs", "squares", partition="gpu")


def test_a_job_is_over_when_its_state_is_final_or_the_queue_has_forgotten_it():
    queue = SlurmQueue()
    for job in ("7_0", "7_1", "7_2", "8"):
        queue.register_job(job)
    queue._info_dict = queue.read_info(b"7_0|OUT_OF_MEMORY|n1\n7_1|CONFIGURING|n2\n8|RUNNING|n3\n9|PENDING|\n")
    ended = {job: queue.is_done(job, mode="cache") for job in ("7_0", "7_1", "7_2", "8")}
    assert ended == {"7_0": True, "7_1": False, "7_2": True, "8": False}
    assert queue.get_state("7_2", mode="cache") == "no longer in the queue"


def test_why_a_job_died_is_its_exception_or_what_srun_says():
    head = "Job 7_0 has not produced any output (state: FAILED)\nError stream produced:\n----\n"
    assert _death_reason("FAILED", head + "srun: error: n1: task 0: Out Of Memory\n") == (
        "state FAILED: n1: task 0: Out Of Memory"
    )
    assert (
        _death_reason("FAILED", head + "Traceback (most recent call last):\nOSError: no space\n") == "OSError: no space"
    )
    assert _death_reason("NODE_FAIL", head) == "state NODE_FAIL"


def test_gpus_are_taken_in_turn_and_others_refused(monkeypatch):
    assert device_of("cpu", 3) == device_of("cpu:0", 3) == "cpu"
    for name in ("tpu", "meta", "mps"):
        with pytest.raises(UserError, match=f"--device {name}: is neither cpu, nor cuda"):
            device_of(name, 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert [device_of(None, rank) for rank in range(4)] == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    assert [device_of("cuda", 2), device_of("cuda:1", 2)] == ["cuda:2", "cuda:1"]
    with pytest.raises(UserError, match=r"cuda:3: this machine has 3 GPU"):
        device_of("cuda:3", 0)


def test_an_error_is_one_sentence_on_disk_until_it_is_forgotten(tmp_path):
    failures = Failures()
    failures.add(tmp_path / "a.json", "first line\n  second line")
    assert (tmp_path / "a.json.err").read_text() == "first line second line\n"
    later = Failures()
    assert later.add_earlier(tmp_path / "a.json") and not later.add_earlier(tmp_path / "b.json")
    assert later.sentences == failures.sentences
    forget_error(tmp_path / "a.json")
    forget_error(tmp_path / "a.json")
    assert not error_file(tmp_path / "a.json").exists()


def test_a_failure_in_a_folder_that_is_not_there_is_still_counted(tmp_path):
    failures = Failures()
    failures.add(tmp_path / "nowhere" / "a.json", "no such file")
    assert failures.sentences == {str(tmp_path / "nowhere" / "a.json"): "no such file"}


def test_an_interrupted_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_of_several_writers_of_one_file_each_puts_a_whole_one_there(tmp_path):
    path = tmp_path / f"{'é' * 120}.json"  # 245 bytes, near the most that a name may have
    with replacing(path) as first:
        first.write_text("first")
        with replacing(path) as second:
            second.write_text("second")
            assert first.read_text() == "first"
        assert path.read_text() == "second"
        with pytest.raises(KeyError), replacing(path) as third:
            third.write_text("thi")
            raise KeyError
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_removed_a_day_later(tmp_path):
    code = "import os, sys; from pathlib import Path; from finetune.files import replacing\n"
    code += "with replacing(Path(sys.argv[1])) as file: file.write_text('half'); os.kill(os.getpid(), 9)"
    for name in ("old", "new"):
        command = [sys.executable, "-c", code, tmp_path / f"{name}.json"]
        assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == -signal.SIGKILL
    (tmp_path / ".mine.tmp").touch()
    two_days_ago = time.time() - 2 * 24 * 3600
    for path in (*tmp_path.glob(".old*"), tmp_path / ".mine.tmp"):
        os.utime(path, (two_days_ago, two_days_ago))
    assert len(list(tmp_path.iterdir())) == 3
    with replacing(tmp_path / "a.json") as temporary:
        temporary.touch()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left[:1] + left[2:] == [".mine.tmp", "a.json"] and left[1].startswith(".new.json.")


def test_progress_counts_hours_and_multiples_of_real_time(capsys):
    with HoursBar([1800.0, 1800.0], "annotating") as bar:
        time.sleep(0.05)
        bar.update(1800)
        shown = str(bar)
    assert "annotating" in shown and "0.50/1.00 h" in shown and "x real time" in shown and "left" in shown
    speed = float(shown.split("h, ")[1].split("x")[0])
    assert speed == pytest.approx(1800 / bar.format_dict["elapsed"], rel=0.5)
    with HoursBar([1800.0, None], "annotating") as bar:
        assert "left" not in str(bar) and "0.00 h" in str(bar)
