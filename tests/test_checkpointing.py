"""Runs that survive: the same command goes on, and ends where an undisturbed run ends."""

import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib

import pytest
import sentencepiece
import torch
from moshi.models import LMGen
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from finetune.cli import UserError
from finetune.data.run_data import RunData
from finetune.loop import EXIT_PREEMPTED
from finetune.model.pretrained import MOSHI, PERSONAPLEX
from finetune.run_dir import list_checkpoints
from tests.support import ROOT, rows, script, train_here, write_config

STEPS = 6
SETTINGS = {
    "max_steps": STEPS, "ckpt_freq": 3, "batch_size": 2, "do_eval": False, "prompt.drop_text": 0.3,
    "prompt.drop_voice": 0.3, "num_ckpt_keep": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """A run of six steps that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    assert train_here(write_config(folder, world, **SETTINGS), PERSONAPLEX) == 0
    return folder


def copy_of(straight, tmp_path, world, upto=3, **settings):
    """The same run, as it stood at a step."""
    shutil.copytree(straight / "run", tmp_path / "run")
    for step, path in list_checkpoints(tmp_path / "run"):
        if step > upto:
            shutil.rmtree(path)
    config = write_config(tmp_path, world, **SETTINGS | settings)
    dumped = (tmp_path / "run/args.yaml").read_text()
    (tmp_path / "run/args.yaml").write_text(dumped.replace(str(straight), str(tmp_path)))
    return config


def curve(run):
    return [(r["step"], r["loss"], r["grad_norm"], r["text_word_loss"], r["codebook_15_loss"]) for r in rows(run)]


def adapters(run, step=STEPS):
    return load_file(run / f"checkpoints/checkpoint_{step:06d}/consolidated/lora.safetensors")


def assert_same_end(run, straight):
    assert curve(run) == curve(straight / "run")
    ours, theirs = adapters(run), adapters(straight / "run")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_resumed_is_straight_bit_for_bit(straight, world, tmp_path):
    config = copy_of(straight, tmp_path, world)
    assert train_here(config, PERSONAPLEX) == 0
    assert_same_end(tmp_path / "run", straight)


def test_two_ranks_go_on_as_one(straight, world, tmp_path):
    """Saved by one rank, continued by two, and saved by two, continued by one."""
    config = copy_of(straight, tmp_path, world, batch_size=1)
    script("train_personaplex.py", config, "max_steps=6", processes=2)
    torch.testing.assert_close(torch.tensor(curve(tmp_path / "run")), torch.tensor(curve(straight / "run")), rtol=1e-5,
                               atol=1e-5)  # fmt: skip
    shutil.rmtree(tmp_path / "run/checkpoints/checkpoint_000003")
    assert train_here(write_config(tmp_path, world, **SETTINGS | {"max_steps": 7}), PERSONAPLEX) == 0
    assert curve(tmp_path / "run")[-1][0] == 7


def test_a_checkpoint_that_is_not_whole_is_passed_over(straight, world, tmp_path, caplog):
    config = copy_of(straight, tmp_path, world, upto=STEPS)
    shard = next((tmp_path / "run/checkpoints/checkpoint_000006/state").glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    flipped = data[:5000] + b"!" + data[5001:]
    for damage, sentence in ((data[:-7], "bytes instead of"), (b"", "has 0 bytes"), (flipped, "have changed")):
        shard.write_bytes(damage)
        caplog.clear()
        assert train_here(config, PERSONAPLEX) == 0
        assert "checkpoint_000006 is not whole" in caplog.text and sentence in caplog.text
        assert_same_end(tmp_path / "run", straight)
        shard = next((tmp_path / "run/checkpoints/checkpoint_000006/state").glob("*.distcp"))


@pytest.mark.parametrize("name, content", [("train_state.json", b"{"), ("*.distcp", b""), ("*.distcp", b"short")])
def test_a_run_of_which_no_checkpoint_is_whole_is_not_begun_anew(straight, world, tmp_path, name, content):
    config = copy_of(straight, tmp_path, world)
    before = (tmp_path / "run/metrics.train.jsonl").read_bytes()
    for path in (tmp_path / "run/checkpoints").rglob(name):
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"none of its 1 checkpoints is whole .*overwrite_run_dir"):
        train_here(config, PERSONAPLEX)
    assert (tmp_path / "run/metrics.train.jsonl").read_bytes() == before


def test_a_manifest_that_has_grown_is_said(straight, world, tmp_path, caplog):
    config = copy_of(straight, tmp_path, world)
    path = tmp_path / "run/checkpoints/checkpoint_000003/train_state.json"
    state = json.loads(path.read_text())
    windows = state["windows"]
    path.write_text(json.dumps(state | {"windows": [windows[0] - 1]}))
    assert train_here(config, PERSONAPLEX) == 0
    assert f"the manifests had {[windows[0] - 1]} windows until now and have {windows}" in caplog.text


def test_what_inference_loads_is_its_owners(straight, world, tmp_path):
    """Resuming does not read it, so that an edited or removed one makes no checkpoint a broken one."""
    config = copy_of(straight, tmp_path, world)
    own = tmp_path / "run/checkpoints/checkpoint_000003/consolidated"
    (own / "config.json").write_text("mine")
    (own / "lora.safetensors").unlink()
    leftover = tmp_path / "run/checkpoints/.checkpoint_000002.tmp"  # of a process that was killed while saving
    leftover.mkdir()
    assert train_here(config, PERSONAPLEX) == 0
    assert_same_end(tmp_path / "run", straight)
    assert not leftover.exists()


class Crafted:
    def __reduce__(self):
        return os.system, ("touch crafted",)


@pytest.mark.parametrize("entry", [Crafted(), BytesStorageMetadata()])
def test_a_foreign_checkpoint_runs_no_code(straight, world, tmp_path, monkeypatch, entry):
    monkeypatch.chdir(tmp_path)
    config = copy_of(straight, tmp_path, world)
    folder = tmp_path / "run/checkpoints/checkpoint_000003"
    metadata = pickle.loads((folder / "state/.metadata").read_bytes())
    metadata.state_dict_metadata[next(iter(metadata.state_dict_metadata))] = entry
    data = pickle.dumps(metadata)
    (folder / "state/.metadata").write_bytes(data)
    state = json.loads((folder / "train_state.json").read_text())
    state["files"]["state/.metadata"] = [len(data), zlib.crc32(data)]
    (folder / "train_state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="cannot be loaded into this model"):
        train_here(config, PERSONAPLEX)
    assert not (tmp_path / "crafted").exists()


def test_a_checkpoint_beyond_the_one_gone_on_from_does_not_outlive_new_ones(straight, world, tmp_path):
    """With one to keep, the damaged newest one would be kept and each new one pruned."""
    config = copy_of(straight, tmp_path, world)
    later = tmp_path / "run/checkpoints/checkpoint_000100"
    shutil.copytree(tmp_path / "run/checkpoints/checkpoint_000003", later)
    (later / "train_state.json").write_text("{")
    assert train_here(config, PERSONAPLEX, ("num_ckpt_keep=1",)) == 0
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [STEPS]


def test_a_signal_does_not_wait_for_an_evaluation_to_end(world, tmp_path, monkeypatch):
    config = write_config(tmp_path, world, **SETTINGS | {"do_eval": True, "eval_freq": 2, "ckpt_freq": 0})
    evaluations, batches = [], RunData.eval_batches

    def eval_batches(data):
        evaluations.append(0)
        for batch in batches(data):
            evaluations[-1] += 1
            if len(evaluations) in (1, 3):  # at the start, and of the second run at step 2
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(RunData, "eval_batches", eval_batches)
    assert train_here(config, PERSONAPLEX) == EXIT_PREEMPTED
    assert train_here(config, PERSONAPLEX) == EXIT_PREEMPTED
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [2]
    assert train_here(config, PERSONAPLEX) == 0
    assert [row["step"] for row in rows(tmp_path / "run", "eval")] == [0, 2, 4, 6]
    whole = evaluations[-1]
    assert whole > 1 and evaluations == [1, whole, 1, whole, whole, whole]


def test_a_signal_does_not_wait_for_the_replies_to_end(world, tmp_path, monkeypatch, caplog):
    config = write_config(tmp_path, world, **SETTINGS | {"do_eval": True, "max_steps": 1, "eval_free_samples": 1,
                                                         "eval_free_sec": 4.0})  # fmt: skip
    samples, steps, step = RunData.eval_samples, [], LMGen.step

    def eval_samples(data, count):
        os.kill(os.getpid(), signal.SIGTERM)
        return samples(data, count)

    monkeypatch.setattr(LMGen, "step", lambda *args: (steps.append(args), step(*args))[1])
    with monkeypatch.context() as signalled, caplog.at_level("INFO"):
        signalled.setattr(RunData, "eval_samples", eval_samples)
        assert train_here(config, PERSONAPLEX) == EXIT_PREEMPTED
    assert 0 < len(steps) <= 13 and not list((tmp_path / "run").rglob("*.wav"))
    assert "SIGTERM: stopped before its first step; the same command begins anew" in caplog.text
    assert train_here(config, PERSONAPLEX) == 0
    assert len(steps) > 100 and [row["step"] for row in rows(tmp_path / "run", "eval")] == [0, 1]


def test_an_evaluation_that_a_signal_left_out_is_made_up_for(world, tmp_path):
    config = write_config(tmp_path, world, **SETTINGS | {"do_eval": True, "max_steps": 1})
    assert train_here(config, PERSONAPLEX) == 0
    path = tmp_path / "run/metrics.eval.jsonl"
    held_out = rows(tmp_path / "run", "eval")
    path.write_text("".join(json.dumps(row) + "\n" for row in held_out if row["step"] == 0))
    assert train_here(config, PERSONAPLEX) == 0
    again = rows(tmp_path / "run", "eval")
    assert [row["step"] for row in again] == [row["step"] for row in held_out]
    assert again[-1]["loss"] == held_out[-1]["loss"]


def test_settings_that_may_change_do_and_others_are_listed(straight, world, tmp_path):
    config = copy_of(straight, tmp_path, world)
    before = (tmp_path / "run/metrics.train.jsonl").read_bytes()
    with pytest.raises(UserError) as error:
        train_here(config, PERSONAPLEX, ("optim.lr=5e-4", "lora.rank=8", "max_steps=9"))
    assert "optim.lr: was 0.001, now 0.0005" in str(error.value) and "lora.rank: was 4, now 8" in str(error.value)
    assert "max_steps" not in str(error.value)
    assert (tmp_path / "run/metrics.train.jsonl").read_bytes() == before
    assert train_here(config, PERSONAPLEX, ("log_freq=2",)) == 0
    assert [r["step"] for r in rows(tmp_path / "run")] == [1, 2, 3, 4, 6]


def test_overwriting_starts_anew_only_after_everything_was_checked(straight, world, tmp_path):
    config = copy_of(straight, tmp_path, world)
    with pytest.raises(UserError):
        train_here(config, PERSONAPLEX, ("overwrite_run_dir=true", "prompt.voice=nobody", "optim.lr=5e-4",
                                         "prompt.max_sec=1"))  # fmt: skip
    assert len(rows(tmp_path / "run")) == STEPS, "nothing was deleted"
    assert train_here(config, PERSONAPLEX, ("overwrite_run_dir=true", "max_steps=1")) == 0
    assert [r["step"] for r in rows(tmp_path / "run")] == [1]


@pytest.mark.parametrize("launcher", ["SLURM", "torchrun"])
def test_what_comes_back_does_not_overwrite_itself(straight, world, tmp_path, monkeypatch, launcher):
    """And what is started anew, by a script that always says the same, does."""
    config = copy_of(straight, tmp_path, world)
    (tmp_path / "run/mine.txt").write_text("not of the run")
    overwrite = ("overwrite_run_dir=true", "ckpt_freq=1", "log_freq=1")
    agents = []

    def launch(number):
        if launcher == "SLURM":
            monkeypatch.setenv("SLURM_JOB_ID", number)
            monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
            return
        agents.append(torch.distributed.TCPStore("127.0.0.1", 0, is_master=True))  # as torchrun's agent has one
        for name, value in {
            "TORCHELASTIC_RUN_ID": "always", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(agents[-1].port), "RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "0",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)

    launch("17")
    assert train_here(config, PERSONAPLEX, (*overwrite, "max_steps=1")) == 0
    begun = (tmp_path / "run/checkpoints/checkpoint_000001/train_state.json").stat().st_mtime_ns
    monkeypatch.setenv("SLURM_RESTART_COUNT" if launcher == "SLURM" else "TORCHELASTIC_RESTART_COUNT", "1")
    assert train_here(config, PERSONAPLEX, (*overwrite, "max_steps=2")) == 0
    assert (tmp_path / "run/checkpoints/checkpoint_000001/train_state.json").stat().st_mtime_ns == begun
    launch("18")
    assert train_here(config, PERSONAPLEX, (*overwrite, "max_steps=1")) == 0
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [1]
    assert (tmp_path / "run/mine.txt").exists()


def test_a_run_that_was_removed_by_half_is_still_one(straight, world, tmp_path, monkeypatch):
    config = copy_of(straight, tmp_path, world)
    rmtree = shutil.rmtree

    def torn(path, *args, **kwargs):
        if path.name == "checkpoints":
            raise KeyboardInterrupt
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", torn)
    with pytest.raises(KeyboardInterrupt):
        train_here(config, PERSONAPLEX, ("overwrite_run_dir=true", "max_steps=1"))
    monkeypatch.undo()
    assert train_here(config, PERSONAPLEX, ("overwrite_run_dir=true", "max_steps=1")) == 0
    assert [r["step"] for r in rows(tmp_path / "run")] == [1]


def test_old_checkpoints_are_pruned_by_step(straight, world, tmp_path):
    config = copy_of(straight, tmp_path, world)
    assert train_here(config, PERSONAPLEX, ("ckpt_freq=1", "num_ckpt_keep=2")) == 0
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [5, 6]


def test_a_full_disk_keeps_the_checkpoint_before(straight, world, tmp_path):
    config = copy_of(straight, tmp_path, world)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    signal_safe = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "cwd": ROOT, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "train_personaplex.py", config], preexec_fn=limit, **signal_safe)
    assert done.returncode == 2 and "the last checkpoint could not be written" in done.stderr
    assert "could not be written" in done.stderr and "the one before is kept" in done.stderr
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [3]
    assert train_here(config, PERSONAPLEX) == 0
    assert_same_end(tmp_path / "run", straight)


# --- real processes -----------------------------------------------------------------------------------------------


def start(*command, processes=None, restarts=0):
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
                     f"--max-restarts={restarts}"]  # fmt: skip
    return subprocess.Popen(
        [*launcher, *map(str, command)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def wait_for_step(process, run, step, timeout=120):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        if any(r["step"] >= step for r in rows(run)):
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate()[0] if process.poll() is not None else "no step in time")


def workers_of(process):
    out = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout
    return sorted(int(m[1]) for m in re.finditer(rf"^\s*(\d+)\s+{process.pid}\s.*train_personaplex", out, re.M))


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, EXIT_PREEMPTED), (signal.SIGINT, 0)])
def test_a_signal_saves_and_the_same_command_goes_on(straight, world, tmp_path, number, code):
    config = write_config(tmp_path, world, **SETTINGS | {"ckpt_freq": 0, "data.num_workers": 1})
    process = start("train_personaplex.py", config)
    wait_for_step(process, tmp_path / "run", 1)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    if len(rows(tmp_path / "run")) < STEPS:  # else it had ended before the signal came
        assert process.returncode == code, output
        assert f"{number.name}: stopped after step" in output and "the same command goes on" in output
    assert train_here(config, PERSONAPLEX, ("data.num_workers=0",)) == 0
    assert_same_end(tmp_path / "run", straight)


def test_a_killed_rank_is_restarted_and_the_end_is_the_same(straight, world, tmp_path):
    config = write_config(tmp_path, world, **SETTINGS | {"batch_size": 1, "ckpt_freq": 1})
    process = start("train_personaplex.py", config, processes=2, restarts=2)
    wait_for_step(process, tmp_path / "run", 2)
    os.kill(workers_of(process)[-1], signal.SIGKILL)
    output = process.communicate(timeout=150)[0]
    assert process.returncode == 0, output
    torch.testing.assert_close(torch.tensor(curve(tmp_path / "run")), torch.tensor(curve(straight / "run")), rtol=1e-5,
                               atol=1e-5)  # fmt: skip


def test_a_dead_rank_ends_the_others(world, tmp_path):
    config = write_config(tmp_path, world, **SETTINGS | {"batch_size": 1, "max_steps": 1000, "do_ckpt": False})
    process = start("train_personaplex.py", config, processes=2)
    wait_for_step(process, tmp_path / "run", 1)
    os.kill(workers_of(process)[-1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0


def test_a_second_signal_ends_the_run_at_once(world, tmp_path):
    config = write_config(tmp_path, world, **SETTINGS | {"max_steps": 1000, "batch_size": 8, "num_microbatches": 40})
    process = start("train_personaplex.py", config)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run/args.yaml").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)  # in the first, long step
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)  # an echo of the same
    time.sleep(1.5)
    assert process.poll() is None, process.communicate()[0]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM


# --- before the update --------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_all_ranks_before_the_update(world, tmp_path):
    """One token's embedding is NaN, so only windows that hold it are; both ranks stop, and the samples are listed."""
    shutil.copytree(world / "model", tmp_path / "model")
    state = load_file(tmp_path / "model/model.safetensors")
    pieces = sentencepiece.SentencePieceProcessor(str(world / "model/tokenizer.model"))
    lines = [json.loads(line) for line in (world / "codes/train_precomputed.jsonl").read_text().splitlines()]
    sidecars = [json.loads((world / "codes" / line["path"]).with_suffix(".json").read_text()) for line in lines]
    spoken = [
        {token for word, _, who in own["alignments"] if who == "SPEAKER_MAIN" for token in pieces.encode(word)}
        for own in sidecars
    ]
    rare = min(set().union(*spoken), key=lambda token: (sum(token in own for own in spoken), token))
    state["text_emb.weight"][rare] = float("nan")
    save_file(state, tmp_path / "model/model.safetensors")
    config = write_config(tmp_path, world, **{
        "moshi_paths.hf_repo_id": str(tmp_path / "model"), "batch_size": 1, "max_steps": 50, "duration_sec": 30,
        "do_eval": False, "data.shuffle": False,
    })  # fmt: skip
    done = script("train.py", config, processes=2, check=False)
    assert done.returncode != 0
    found = re.search(r"error: the loss of step (\d+) is not finite \(rank (\d)", done.stderr)
    assert found, done.stderr
    step, rank = int(found[1]), int(found[2])
    ranks = json.loads((tmp_path / f"run/not_finite_step_{step:06d}.json").read_text())["ranks"]
    assert not ranks[rank]["loss_is_finite"]
    named = ranks[rank]["samples"][0].split(" at ")[0]
    holders = [line["path"] for line, own in zip(lines, spoken) if rare in own]
    assert any(named.endswith(os.path.basename(h)) for h in holders)
    assert len(rows(tmp_path / "run")) == step - 1


def test_a_bad_window_is_allowed_in_each_pass(world, tmp_path):
    lines = [json.loads(line) for line in (world / "codes/train_precomputed.jsonl").read_text().splitlines()[:4]]
    for line in lines:
        line |= {key: str(world / "codes" / line[key]) for key in ("path", "codes_path")}
    good = tmp_path / "good.jsonl"
    good.write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines[2]["codes_path"] = "gone.pt"
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = write_config(tmp_path, world, **{
        "data.train_data": str(tmp_path / "train.jsonl"), "duration_sec": 100, "batch_size": 1, "max_steps": 12,
        "data.max_bad_samples": 1, "do_eval": False, "do_ckpt": False,
    })  # fmt: skip
    assert train_here(config, MOSHI) == 0
    assert rows(tmp_path / "run")[-1]["skipped"] == 3

    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps(lines[2]) + "\n")
    config = write_config(tmp_path, world, **{
        "data.train_data": str(good), "data.eval_data": str(held_out), "run_dir": str(tmp_path / "second"),
    })  # fmt: skip
    with pytest.raises(UserError, match=r"none of the held-out windows could be read; (.|\n)*gone.pt"):
        train_here(config, MOSHI)


def test_too_many_bad_samples_stop_the_run_with_the_list(world, tmp_path):
    lines = (world / "codes/train_precomputed.jsonl").read_text().splitlines()
    gone = lambda i: {"codes_path": "gone.pt", "path": f"gone{i}.wav"}
    bad = [json.dumps(json.loads(line) | gone(i)) for i, line in enumerate(lines)]
    for name, mixed, limit, sentence in (
        ("some", [x for pair in zip(lines, bad) for x in pair], 2, "3 windows could not be read, more than data.max"),
        ("all", bad, 100, "none of the first 8 windows could be read"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for line in mixed:
            fields = json.loads(line)
            fields |= {k: str(world / "codes" / fields[k]) for k in ("path", "codes_path")}
            with (folder / "train.jsonl").open("a") as file:
                file.write(json.dumps(fields) + "\n")
        config = write_config(folder, world, **{
            "data.train_data": str(folder / "train.jsonl"), "batch_size": 1, "data.max_bad_samples": limit,
            "max_steps": 50, "do_eval": False,
        })  # fmt: skip
        with pytest.raises(UserError) as error:
            train_here(config, MOSHI)
        assert sentence in str(error.value) and "gone.pt" in str(error.value)
