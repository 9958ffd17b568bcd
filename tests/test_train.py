"""Whole runs of both scripts on the tiny world, with the real moshi models, in one process and in two."""

import gc
import itertools
import json
import sys
import weakref
from typing import ClassVar

import pytest
import torch
from moshi.models.loaders import CheckpointInfo
from moshi.modules.lora import LoRALinear
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from finetune.args import DataArgs, OptimArgs, TrainArgs
from finetune.checkpointing import load_checkpoint
from finetune.cli import UserError
from finetune.config import load_args
from finetune.data.dataset import get_dataset_iterator
from finetune.lora import add_adapters
from finetune.loss import group_weights, loss_report, loss_scales
from finetune.model.build import StoredWeights, build_lm, load_weights, set_trainable
from finetune.model.consolidated import Artefact
from finetune.model.expansion import expand_moshiko_to_personaplex
from finetune.model.pretrained import MOSHI, PERSONAPLEX, Pretrained, lm_kwargs, open_pretrained
from finetune.model.training_lm import TrainingLM
from finetune.optim import build_optimizer
from finetune.tools import generate as generate_command
from finetune.tools.evaluate import main
from finetune.tools.export import command as export_command
from tests.support import live, rows, script, train_here, write_config


def consolidated(run, step):
    return run / f"checkpoints/checkpoint_{step:06d}/consolidated"


def stock(world, config, weights=None, adapters=None):
    """The LM as stock moshi's loaders give it."""
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
    """LoRA on PersonaPlex, from Moshi weights, through the script itself, by torchrun with two processes."""
    folder = tmp_path_factory.mktemp("personaplex")
    config = write_config(folder, world, **{
        "batch_size": 1, "ckpt_freq": 1, "tensorboard": True, "eval_free_samples": 1, "eval_free_sec": 1.0,
    } | live(world))  # fmt: skip
    done = script("train_personaplex.py", config, processes=2)
    return folder / "run", done.stdout + done.stderr


def test_metrics_and_artefacts_of_moshi(moshi_run):
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
    assert not list(moshi_run.rglob("*.tmp*"))


@pytest.mark.parametrize("which", ["moshi_run", "personaplex_run"])
def test_evaluations_reply_to_held_out_users(which, request):
    """With one rank and all parameters trained, and with two ranks and adapters."""
    run = request.getfixturevalue(which)
    run = run if which == "moshi_run" else run[0]
    for row in rows(run, "eval"):
        assert 0 <= row["free_silence"] <= 1 and "free_words_per_minute" in row
        folder = run / f"samples/step_{row['step']:06d}"
        about = json.loads((folder / "00.json").read_text())
        assert about["of"].endswith("at 0.00 s")
        if which == "personaplex_run":
            assert about["prompt"].startswith("<system>") and about["voice"].endswith(".wav")
        assert (folder / "00.wav").stat().st_size > 24_000 * 2 * 2 * 0.9


def test_training_on_codes_has_no_mimi_but_to_listen_to_replies(world, tmp_path, monkeypatch):
    """And none of those stays, which moshi's modules would until Python looks for cycles."""
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
    assert run("mute", eval_freq=1) == 0 and not loaded
    gc.disable()
    try:
        assert run("heard", eval_freq=1, eval_free_samples=1, eval_free_sec=0.3) == 0
        assert len(loaded) == 3 and not any(mimi() for mimi in loaded)
    finally:
        gc.enable()


def test_evaluate_judges_a_run_as_the_run_did(personaplex_run, monkeypatch, capsys):
    run, _ = personaplex_run
    monkeypatch.setattr(sys, "argv", ["evaluate", str(run), "eval_free_samples=0"])
    assert main() == 0
    found = json.loads((run / "evaluation_000002.json").read_text())
    own = rows(run, "eval")
    assert found["loss"] == pytest.approx(own[-1]["loss"], rel=1e-4)
    assert found["base"]["loss"] == pytest.approx(own[0]["loss"], rel=1e-4) != found["loss"]  # adapters off
    printed = capsys.readouterr().out
    assert "text_perplexity" in printed and "base" in printed.splitlines()[0]


def test_what_was_trained_is_what_speaks_in_every_form(personaplex_run, world, tmp_path, monkeypatch, capsys):
    """train -> evaluate -> generate -> export in both layouts -> reload: one reply, whichever file it comes from."""
    run, _ = personaplex_run
    users = sorted((world / "data").rglob("*.wav"))[-2:]

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        assert not module.main()
        return capsys.readouterr().out

    def replies(source, out):
        """Of both users, one after the other: (wav, words) each."""
        call(
            generate_command, source, "--user-wav", *users, "--voice", sorted((world / "data/voices").glob("*.wav"))[0],
            "--text-prompt", "You are Ada.", "--greedy", "--dtype", "fp32", "--batch-size", 1, "--tail-sec", 0.5,
            "--out", out, "--text", out,
        )  # fmt: skip
        return [((out / f"{u.stem}.wav").read_bytes(), (out / f"{u.stem}.json").read_text()) for u in users]

    trained = replies(run, tmp_path / "run")
    assert trained[0] != trained[1]
    for runtime in ("moshi", "personaplex"):
        folder = tmp_path / runtime
        call(export_command, run, folder, "--format", runtime, "--merge", "--dtype", "fp32")
        assert "free-running: silence" in (folder / "README.md").read_text()
        assert replies(folder, tmp_path / f"{runtime}-said") == trained
    together = call(generate_command, tmp_path / "moshi", "--user-wav", *users, "--greedy", "--out", tmp_path / "both")
    assert together.count(".wav: ") == 2


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


def test_personaplex_says_what_it_saw_and_starts_from(personaplex_run):
    run, output = personaplex_run
    assert "Moshi weights (8 codebooks), expanded to 16" in output
    assert "1 x 1 x 2 = 2 windows a step (batch x microbatches x processes)" in output
    assert "a prompt of up to 30 s (375 frames, at most 91 % of a sequence)" in output
    row = rows(run)[-1]
    assert "user_loss" in row and "codebook_15_loss" in row
    assert list((run / "tensorboard").glob("events*"))


def test_stock_moshi_gives_the_trained_logits(world, personaplex_run, tmp_path):
    """The training state, restored; the same as base and adapters in stock moshi; and merged in stock moshi."""
    run, _ = personaplex_run
    folder = consolidated(run, 2)
    config = json.loads((folder / "config.json").read_text())
    assert (config["lora"], config["lora_rank"], config["dep_q"]) == (True, 4, 16)
    checkpoint = open_pretrained(str(world / "model"))
    kwargs = lm_kwargs(checkpoint, PERSONAPLEX)
    trained = build_lm(kwargs, torch.float32)
    add_adapters(trained, 4, 2.0)
    set_trainable(trained, full=False, ft_embed=False)
    trained.to_empty(device="cpu")
    load_weights(trained, StoredWeights(checkpoint.moshi_weights(), 16), seed=0)
    optimizer = build_optimizer(trained, OptimArgs(), torch.device("cpu"))
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
        assert artefact.write(trained, tmp_path, is_main=True) is None
        merged = stock(world, tmp_path / "config.json", tmp_path / "consolidated.safetensors")
        assert not any(isinstance(m, LoRALinear) for m in merged.modules())
        torch.testing.assert_close(losses(merged), expected, rtol=1e-5, atol=1e-3)


def test_one_batch_of_four_is_four_of_one_and_two_ranks_of_two(world, tmp_path):
    """Loss and gradient norm of each step do not depend on how its windows are cut up, padding included, nor on which
    of them cannot be read."""
    lines = [json.loads(line) for line in (world / "codes/train_precomputed.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {key: str(world / "codes" / line[key]) for key in ("path", "codes_path")}
    for line in lines[::3]:
        line["codes_path"] = "gone.pt"
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {}
    for name, batch, micro, processes in (("4x1", 4, 1, None), ("1x4", 1, 4, None), ("2 ranks", 1, 2, 2)):
        folder = tmp_path / name.replace(" ", "_")
        folder.mkdir()
        settings = {"batch_size": batch, "num_microbatches": micro, "do_eval": False, "do_ckpt": False, "max_steps": 3}
        settings |= {"duration_sec": 4.3, "data.train_data": str(tmp_path / "train.jsonl")}
        config = write_config(folder, world, **settings)
        if processes is None:
            assert train_here(config, PERSONAPLEX) == 0
        else:
            script("train_personaplex.py", config, processes=processes)
        found[name] = [(r["loss"], r["grad_norm"], r["user_loss"], r["skipped"]) for r in rows(folder / "run")]
        assert found[name][-1][-1] > 0
    torch.testing.assert_close(torch.tensor(found["1x4"]), torch.tensor(found["4x1"]), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(found["2 ranks"]), torch.tensor(found["4x1"]), rtol=2e-5, atol=1e-6)


class HostReads(TorchFunctionMode):
    """Counts where the host asks for a tensor's values; on a GPU each waits for all that was queued."""

    READS: ClassVar = {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__, torch.Tensor.__float__,
             torch.Tensor.__int__, torch.Tensor.__index__, torch.Tensor.cpu, torch.Tensor.numpy,
             torch.Tensor.nonzero, torch.nonzero}  # fmt: skip

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function in self.READS
        return function(*args, **(kwargs or {}))


def test_a_step_reads_one_tensor_back(world, tmp_path, monkeypatch):
    """Losses, gradient norm and what the ranks wish for come to the host together, and nothing else does. Reading
    batches is the workers' work, so it is done before."""
    settings = {"do_eval": False, "do_ckpt": False, "log_freq": 100, "num_microbatches": 2, "batch_size": 1}
    batches = get_dataset_iterator

    def ahead(*args, **kwargs):
        read = list(itertools.islice(batches(*args, **kwargs), 20))
        return (batch for batch in read)

    monkeypatch.setattr("finetune.data.run_data.get_dataset_iterator", ahead)
    counts = []
    for steps in (1, 2, 5):  # the first also fills the cache of voices
        config = write_config(tmp_path, world, **settings | {"max_steps": steps, "run_dir": str(tmp_path / str(steps))})
        with HostReads() as reads:
            assert train_here(config, PERSONAPLEX) == 0
        counts.append(reads.count)
    assert counts[2] - counts[1] == 3


def test_losses_are_weighted_sums_over_global_weights():
    counts = torch.tensor([10, 90, *([50] * 16)])
    args = load_args_with(first_codebook_weight_multiplier=50.0, text_padding_weight=0.3, user_audio_loss_weight=0.5)
    weights = group_weights(args, 16)
    assert weights.tolist() == [1, 0.3, 50, *[1] * 7, 25, *[0.5] * 7]
    scale = loss_scales(counts, weights)
    assert float((scale[:2] * counts[:2]).sum()) == pytest.approx(1)
    assert float((scale[2:] * counts[2:]).sum()) == pytest.approx(1)
    assert loss_scales(torch.zeros(18), weights).tolist() == [0.0] * 18
    report = loss_report(counts * 2.0, counts * 0.5, counts, weights)
    assert report["text_loss"] == pytest.approx(2) and report["text_perplexity"] == pytest.approx(7.389, abs=1e-3)
    assert report["text_word_accuracy"] == 0.5
    assert loss_report(*torch.zeros(3, 18), weights) == {}, "of nothing there is no loss, least of all 0"


def load_args_with(**settings):
    return TrainArgs(data=DataArgs(), run_dir="x", **settings)


def test_same_command_after_the_end_does_nothing_and_other_settings_are_refused(world, moshi_run):
    config = moshi_run.parent / "config.yaml"
    before = (moshi_run / "metrics.train.jsonl").read_text()
    assert train_here(config, MOSHI) == 0
    assert (moshi_run / "metrics.train.jsonl").read_text() == before
    with pytest.raises(UserError, match=r"optim.lr: was 0.001, now 0.5(.|\n)*|holds a run with other settings"):
        train_here(config, MOSHI, ("optim.lr=0.5",))
    assert (moshi_run / "metrics.train.jsonl").read_text() == before


def test_evaluation_is_the_same_each_time_on_one_and_two_ranks(world, personaplex_run, tmp_path):
    run, _ = personaplex_run
    two_ranks = rows(run, "eval")[0]
    config = write_config(tmp_path, world, max_steps=0)
    assert train_here(config, PERSONAPLEX) == 0
    one_rank = rows(tmp_path / "run", "eval")[0]
    assert one_rank["samples"] == two_ranks["samples"] == 3
    assert one_rank["loss"] == pytest.approx(two_ranks["loss"], rel=1e-5)


@pytest.mark.parametrize("codes", ["stored", "live"])
def test_the_end_does_not_wait_for_workers(world, tmp_path, codes):
    """Nor for the garbage collector, which need not come: frames that an exception has kept refer to the stream."""
    sources = live(world) if codes == "live" else {}
    config = write_config(tmp_path, world, **sources, **{"max_steps": 1, "do_ckpt": False, "data.num_workers": 2})
    begin = "import gc; gc.disable(); import train; from finetune.cli import run; run(train.main)"
    script("-c", begin, config, timeout=60)
    assert len(rows(tmp_path / "run")) == 1
