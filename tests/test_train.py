"""Whole runs of both scripts on the tiny world, with the real moshi models, in one process and in two."""

import gc
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
import weakref

import pytest
import torch
from moshi.models.loaders import CheckpointInfo
from moshi.modules.lora import LoRALinear
from safetensors.torch import load_file, save_file

from finetune.args import OptimArgs
from finetune.checkpointing import load_checkpoint
from finetune.cli import UserError
from finetune.config import load_args
from finetune.lora import add_adapters
from finetune.model.build import StoredWeights, build_lm, load_weights, set_trainable
from finetune.model.consolidated import Artefact
from finetune.model.expansion import expand_moshiko_to_personaplex
from finetune.model.pretrained import MOSHI, PERSONAPLEX, Pretrained, lm_kwargs
from finetune.model.training_lm import TrainingLM
from finetune.optim import build_optimizer
from tests.support import PERSONAPLEX_CODES, ROOT, live, rows, run_ranks, script, train_here, write_config


def consolidated(run, step):
    return run / f"checkpoints/checkpoint_{step:06d}/consolidated"


def stock(world, config, weights=None, adapters=None):
    """The LM as moshi's own loaders return it."""
    base = world / "model"
    info = CheckpointInfo.from_hf_repo(
        "nobody/nothing", moshi_weights=weights or base / "model.safetensors", mimi_weights=base / "mimi.safetensors",
        tokenizer=base / "tokenizer.model", config_path=config, mimi_config_path=base / "mimi_config.json",
        lora_weights=adapters,
    )  # fmt: skip
    return info.get_moshi(dtype=torch.float32)


@pytest.fixture(scope="module")
def moshi_run(world, tmp_path_factory):
    """A full fine-tuning of the tiny Moshi."""
    folder = tmp_path_factory.mktemp("moshi")
    config = write_config(
        folder, world, **{"lora.enable": False, "full_finetuning": True, "batch_size": 2, "eval_freq": 1,
                            "eval_free_samples": 2, "eval_free_sec": 1.0},
    )  # fmt: skip
    assert train_here(config, MOSHI) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def personaplex_run(world, tmp_path_factory):
    """LoRA on PersonaPlex, from Moshi weights and from audio, by the script itself and torchrun with two processes."""
    folder = tmp_path_factory.mktemp("personaplex")
    config = write_config(folder, world, **{
        "batch_size": 1, "ckpt_freq": 1, "tensorboard": True, "eval_free_samples": 1, "eval_free_sec": 1.0,
    } | live(world))  # fmt: skip
    done = script("train_personaplex.py", config, processes=2, timeout=280)
    return folder / "run", done.stdout + done.stderr


def test_metrics_and_files_of_a_run(moshi_run):
    train_rows, held_out = rows(moshi_run), rows(moshi_run, "eval")
    assert [r["step"] for r in train_rows] == [1, 2] and [r["step"] for r in held_out] == [0, 1, 2]
    assert held_out[-1]["loss"] < held_out[0]["loss"]
    for key in (
        "text_loss", "audio_loss", "agent_loss", "semantic_loss", "acoustic_loss", "text_word_accuracy",
        "text_padding_accuracy", "lr", "grad_norm", "tokens_per_sec", "data_wait", "peak_memory_gb",
    ):  # fmt: skip
        assert key in train_rows[-1], key
    assert "user_loss" not in train_rows[-1]
    assert train_rows[0]["loss"] == pytest.approx(train_rows[0]["text_loss"] + train_rows[0]["audio_loss"])
    assert (moshi_run / "curves.png").stat().st_size > 10_000
    assert load_args(moshi_run / "args.yaml").full_finetuning
    assert not list(moshi_run.rglob("*.tmp*")) and not list(moshi_run.rglob(".*.tmp"))


def test_a_run_of_personaplex_logs_what_it_found(personaplex_run):
    run, output = personaplex_run
    assert "Moshi weights (8 codebooks), expanded to 16" in output
    assert "1 x 1 x 2 = 2 windows a step (batch x microbatches x processes)" in output
    row = rows(run)[-1]
    assert "user_loss" in row and "codebook_15_loss" in row
    assert list((run / "tensorboard").glob("events*"))


@pytest.mark.parametrize("which", ["moshi_run", "personaplex_run"])
def test_evaluations_reply_to_held_out_users(which, request):
    """With one rank and all parameters trained, and with two ranks and adapters."""
    run = request.getfixturevalue(which)
    run = run if which == "moshi_run" else run[0]
    for row in rows(run, "eval"):
        assert 0 <= row["free_silence"] <= 1 and "free_words_per_minute" in row
        folder = run / f"samples/step_{row['step']:06d}"
        assert len(list(folder.iterdir())) == 2 * row["free_replies"] == (4 if which == "moshi_run" else 2)
        about = json.loads((folder / "00.json").read_text())
        assert about["of"].endswith("at 0.00 s")
        if which == "personaplex_run":
            assert about["prompt"].startswith("<system>") and about["voice"].endswith(".wav")
        # 1 s as 12 whole frames, in two channels of 16 bits
        assert (folder / "00.wav").stat().st_size == pytest.approx(12 * 1920 * 2 * 2, abs=100)


def test_training_on_codes_loads_mimi_only_to_decode_replies(world, tmp_path, monkeypatch):
    """And it does not stay in memory."""
    loaded = []
    load = Pretrained.mimi

    def noted(*args):
        mimi = load(*args)
        loaded.append(weakref.ref(mimi))
        return mimi

    monkeypatch.setattr(Pretrained, "mimi", noted)
    run = lambda name, **settings: train_here(
        write_config(tmp_path, world, **settings | {"run_dir": str(tmp_path / name)}), MOSHI
    )
    assert run("without", do_eval=True, max_steps=1) == 0 and not loaded
    gc.disable()
    try:
        assert run("with", max_steps=1, eval_free_samples=1, eval_free_sec=0.3) == 0
        assert len(loaded) == 2 and not any(mimi() for mimi in loaded)
    finally:
        gc.enable()


def test_full_finetuning_loads_in_stock_moshi(world, moshi_run):
    folder = consolidated(moshi_run, 2)
    config = json.loads((folder / "config.json").read_text())
    assert not config.get("lora")
    lm = stock(world, folder / "config.json", folder / "consolidated.safetensors")
    base = stock(world, world / "model/config.json")
    assert lm.dep_q == 8 and not torch.equal(lm.text_linear.weight, base.text_linear.weight)
    # The artefact alone, in any folder, finds Mimi and tokenizer.
    info = CheckpointInfo.from_hf_repo("a/b", moshi_weights=folder / "consolidated.safetensors",
                                       config_path=folder / "config.json")  # fmt: skip
    assert info.get_mimi().num_codebooks == 8 and info.get_text_tokenizer().vocab_size() == lm.text_card


def test_stock_moshi_gives_the_trained_logits(world, personaplex_run, tmp_path):
    """The training state, restored; the same as base and adapters in stock moshi; and merged in stock moshi."""
    run, _ = personaplex_run
    folder = consolidated(run, 2)
    config = json.loads((folder / "config.json").read_text())
    assert (config["lora"], config["lora_rank"], config["dep_q"]) == (True, 4, 16)
    checkpoint = Pretrained(str(world / "model"))
    kwargs = lm_kwargs(checkpoint, PERSONAPLEX)
    trained = build_lm(kwargs, torch.float32)
    add_adapters(trained, 4, 2.0)
    set_trainable(trained, full=False, ft_embed=False)
    trained.to_empty(device="cpu")
    load_weights(trained, StoredWeights(checkpoint.moshi_weights(), 16), seed=0)
    optimizer = build_optimizer(trained, OptimArgs())
    codes, mask = torch.randint(4, 300, (2, 17, 20)), torch.ones(2, 20, dtype=torch.bool)
    losses = lambda lm: TrainingLM(lm, False)(codes, mask).ce
    with torch.no_grad():
        base = losses(trained)
        load_checkpoint(folder.parent, trained, optimizer, 2)
        expected = losses(trained)
        assert not torch.allclose(expected, base, rtol=1e-5)

        save_file(expand_moshiko_to_personaplex(load_file(checkpoint.moshi_weights())), tmp_path / "base.safetensors")
        adapted = stock(world, folder / "config.json", tmp_path / "base.safetensors", folder / "lora.safetensors")
        torch.testing.assert_close(losses(adapted), expected, rtol=1e-6, atol=1e-4)

        config = {k: v for k, v in config.items() if k != "lora"}
        artefact = Artefact(config, None, torch.float32)
        artefact.write(artefact.gather(trained, is_main=True), tmp_path)
        merged = stock(world, tmp_path / "config.json", tmp_path / "consolidated.safetensors")
        assert not any(isinstance(m, LoRALinear) for m in merged.modules())
        torch.testing.assert_close(losses(merged), expected, rtol=1e-5, atol=1e-3)


def test_one_batch_of_four_is_four_of_one_and_two_ranks_of_two(world, tmp_path):
    """Loss and gradient norm of each step do not depend on the division into batches, with padding and with windows
    that cannot be read. Rates are those of all ranks."""
    source = world / PERSONAPLEX_CODES / "train_precomputed.jsonl"
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    for line in lines:
        line |= {key: str(source.parent / line[key]) for key in ("path", "codes_path", "words_path")}
    for line in lines[::3]:
        line["codes_path"] = "gone.pt"
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, frames = {}, {}
    for name, batch, micro, processes in (("4x1", 4, 1, 1), ("1x4", 1, 4, 1), ("2 ranks", 1, 2, 2)):
        folder = tmp_path / name.replace(" ", "_")
        folder.mkdir()
        settings = {"batch_size": batch, "num_microbatches": micro, "do_eval": False, "do_ckpt": False, "max_steps": 3}
        settings |= {"duration_sec": 4.3, "data.train_data": str(tmp_path / "train.jsonl")}
        config = write_config(folder, world, **settings)
        if processes == 1:
            assert train_here(config, PERSONAPLEX) == 0
        else:
            run_ranks("train_personaplex.py", config)
        steps = rows(folder / "run")
        found[name] = torch.tensor([(r["loss"], r["grad_norm"], r["user_loss"], r["skipped"]) for r in steps])
        frames[name] = [r["frames_per_sec"] * r["interval_sec"] for r in steps[1:]]  # ranks begin the first step apart
        assert steps[-1]["skipped"] > 0
    torch.testing.assert_close(found["1x4"], found["4x1"], rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(found["2 ranks"], found["4x1"], rtol=2e-5, atol=1e-6)
    assert frames["1x4"] == pytest.approx(frames["4x1"]) and frames["2 ranks"] == pytest.approx(frames["4x1"], rel=0.4)


def test_deterministic_runs_equal_others_on_a_cpu(world, tmp_path):
    """Bit for bit, with evaluations, and when the setting changes between two steps."""
    found = []
    for name, values in (("without", ["false"]), ("with_in_the_first_step", ["true", "false"])):
        (tmp_path / name).mkdir()
        config = write_config(
            tmp_path / name, world, PERSONAPLEX_CODES, **{"ckpt_freq": 1, "eval_free_samples": 1, "eval_free_sec": 0.5}
        )
        for value in values:
            steps = 2 if value == values[-1] else 1
            overrides = (f"deterministic={value}", f"max_steps={steps}", "optim.schedule=constant")
            # In processes of their own: torch has it set from then on, and other tests leave other things set.
            script("train_personaplex.py", config, *overrides)
        run = tmp_path / name / "run"
        losses = {(kind, row["step"]): row["loss"] for kind in ("train", "eval") for row in rows(run, kind)}
        found.append((losses, load_file(consolidated(run, 2) / "lora.safetensors")))
    (losses, adapters), (own_losses, own_adapters) = found
    assert losses.items() <= own_losses.items()
    assert all(torch.equal(own_adapters.pop(key), value) for key, value in adapters.items()) and not own_adapters


def test_operations_that_cannot_repeat_their_results_are_an_error_in_deterministic_runs(world, tmp_path):
    """torch raises for such an operation, as `put_` is one on any device. A setting of cuBLAS that would make the
    promise untrue is refused."""
    config = write_config(tmp_path, world, **{"deterministic": True, "max_steps": 0, "do_eval": False})
    code = """
import sys, torch, train
train.RunData = lambda *a: torch.zeros(2).put_(torch.tensor([0]), torch.tensor([1.0]))
train.train(sys.argv[1])
"""
    done = script("-c", code, config, check=False)
    assert done.returncode and "put_ does not have a deterministic implementation" in done.stderr
    done = script("train.py", config, check=False, CUBLAS_WORKSPACE_CONFIG=":0:0")
    assert done.returncode == 2 and "CUBLAS_WORKSPACE_CONFIG" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("sharding", ["full", "none"])
def test_parts_that_do_not_learn_are_the_same_in_any_division(world, tmp_path, sharding):
    """Frozen layers, steps that do not run, and the drift, which is measured on other frames in each step. Resumed on
    two ranks after one step; adapters grow until they drift."""
    found = {}
    for name, batch, micro, processes in (("4x1", 4, 1, 1), ("1x2 on 2 ranks", 1, 2, 2)):
        folder = tmp_path / name.replace(" ", "_")
        folder.mkdir()
        settings = {
            "batch_size": batch, "num_microbatches": micro, "do_eval": False, "duration_sec": 4.3, "sharding": sharding,
            "lora.depformer_rank": 0, "lora.heads_rank": 2, "user_audio_loss_weight": 0.0, "lora.drift_weight": 0.5,
            "optim.heads_lr": 1e-2, "optim.pct_start": 0.0, "optim.schedule": "constant", "ckpt_freq": 1,
            "reduce_every_microbatch": processes > 1,
        }  # fmt: skip
        config = write_config(folder, world, PERSONAPLEX_CODES, **settings | {"max_steps": 4})
        if processes == 1:
            assert train_here(config, PERSONAPLEX) == 0
        else:
            assert train_here(config, PERSONAPLEX, ("max_steps=1", "batch_size=4", "num_microbatches=1")) == 0
            run_ranks("train_personaplex.py", config)
        found[name] = rows(folder / "run")
        state = load_file(folder / "run/checkpoints/checkpoint_000004/consolidated/lora.safetensors")
        depformer = [values for name, values in state.items() if name.startswith("depformer") and ".lora_" in name]
        assert depformer and not any(values.any() for values in depformer), "written for moshi, as zeros"
    one, two = found.values()
    assert [row["step"] for row in two] == [1, 2, 3, 4]
    assert abs(one[0]["drift"]) < 1e-4 < one[3]["drift"]
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "text_loss", "agent_loss", "drift", "grad_norm", "grad_norm_temporal", "grad_norm_heads"):
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-5), (a["step"], key)
        assert not any(key in row for row in (a, b) for key in ("user_loss", "codebook_8_loss", "grad_norm_depformer"))


def test_the_same_command_after_the_end_does_nothing_and_other_settings_are_refused(world, moshi_run):
    config = moshi_run.parent / "config.yaml"
    contents = lambda: {
        path: path.read_bytes() for path in moshi_run.rglob("*") if path.suffix in (".jsonl", ".distcp")
    }
    before = contents()
    assert len(before) == 3 and train_here(config, MOSHI) == 0
    assert contents() == before
    with pytest.raises(UserError) as error:
        train_here(config, MOSHI, ("text_padding_weight=0.7",))
    assert "text_padding_weight: was 0.5, now 0.7" in str(error.value) and contents() == before


def test_a_run_is_overwritten_only_after_everything_was_checked(world, moshi_run, tmp_path):
    shutil.copytree(moshi_run, tmp_path / "run")
    overwrite = ("overwrite_run_dir=true", f"run_dir={tmp_path / 'run'}", "max_steps=1", "eval_free_samples=0")
    config = moshi_run.parent / "config.yaml"
    for problem in ("data.train_data=gone.jsonl", "moshi_paths.hf_repo_id=gone/gone", "lora.rank=0"):
        with pytest.raises(UserError):
            train_here(config, MOSHI, (*overwrite, problem))
        assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2], "nothing was removed"
    assert train_here(config, MOSHI, (*overwrite, "optim.lr=0.5")) == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [1]


def test_an_evaluation_is_the_same_on_one_and_on_two_ranks(world, personaplex_run, tmp_path):
    run, _ = personaplex_run
    two_ranks = rows(run, "eval")[0]
    config = write_config(tmp_path, world, PERSONAPLEX_CODES, max_steps=0)
    assert train_here(config, PERSONAPLEX) == 0
    one_rank = rows(tmp_path / "run", "eval")[0]
    assert one_rank["samples"] == two_ranks["samples"] == 3
    assert one_rank["loss"] == pytest.approx(two_ranks["loss"], rel=1e-5)


@pytest.mark.parametrize("signalled", ["all processes of the terminal", "the training processes"])
def test_ctrl_c_under_torchrun_saves_after_the_step(signalled, world, tmp_path):
    """At a terminal Ctrl-C reaches torchrun too, which ends with an error of its own. README's other way does not."""
    settings = {"max_steps": 10_000, "do_eval": False, "data.num_workers": 1}
    config = write_config(tmp_path, world, PERSONAPLEX_CODES, **settings)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launcher, terminal = pty.fork()  # the child leads the foreground processes of a terminal of its own
    if not launcher:
        os.chdir(ROOT)
        os.execv(sys.executable, [*command, "train_personaplex.py", str(config)])
    printed, interrupted, end = "", False, time.monotonic() + 120
    while True:
        assert time.monotonic() < end, printed[-3000:]
        try:
            printed += (
                os.read(terminal, 65536).decode(errors="replace") if select.select([terminal], [], [], 1)[0] else ""
            )
        except OSError:  # no process holds the terminal any more
            break
        if not interrupted and "step 2/" in printed:
            interrupted = True
            if signalled == "the training processes":
                subprocess.run(["pkill", "-INT", "-P", str(launcher)], check=True)
            else:
                os.write(terminal, b"\x03")
    code = os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1])
    step = rows(tmp_path / "run")[-1]["step"]
    assert 2 <= step < 10_000 and (consolidated(tmp_path / "run", step) / "lora.safetensors").is_file()
    if signalled == "the training processes":
        assert code == 0 and "Traceback" not in printed
    assert train_here(config, PERSONAPLEX, (f"max_steps={step + 1}",)) == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, step + 2))


@pytest.mark.parametrize("codes", ["stored", "live"])
def test_a_run_with_workers_ends_at_once(world, tmp_path, codes):
    """It waits neither for its workers nor for the garbage collector: an exception's frames may refer to the stream."""
    sources = live(world) if codes == "live" else {}
    config = write_config(tmp_path, world, **sources, **{"max_steps": 1, "do_ckpt": False, "data.num_workers": 2})
    begin = "import gc, runpy; gc.disable(); runpy.run_path('train.py', run_name='__main__')"
    script("-c", begin, config, timeout=60)
    assert len(rows(tmp_path / "run")) == 1
