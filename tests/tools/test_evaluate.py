"""The command that evaluates a run: it finds what the run itself found, on one rank and on two."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from moshi.utils.compile import no_compile
from safetensors.torch import load_file, save_file

from finetune.data.batch import Sample, TextStats
from finetune.model.pretrained import PERSONAPLEX
from finetune.prompts.hybrid import VoicePrompt, build_prompt
from finetune.streams import stack_streams
from finetune.tools.evaluate.command import main
from finetune.tools.evaluate.windows import bootstrap, exchange_prompt, other_prompts
from tests.support import PERSONAPLEX_CODES, rows, script, train_here, write_config


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """Two steps of LoRA on PersonaPlex, evaluated at steps 0 and 2."""
    folder = tmp_path_factory.mktemp("trained")
    settings = {"eval_freq": 2, "eval_free_samples": 1, "eval_free_sec": 0.4, "optim.lr": 0.01}
    with no_compile():
        assert train_here(write_config(folder, world, PERSONAPLEX_CODES, **settings), PERSONAPLEX) == 0
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, without the replies of its last evaluation."""
    folder = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(folder / "samples/step_000002")
    return folder


@pytest.fixture
def evaluate(call):
    def evaluate_run(run, *overrides) -> dict:
        with no_compile():
            assert not call(main, run, *overrides)
        return json.loads((run / "evaluation_000002.json").read_text())

    return evaluate_run


def teacher_forced(row):
    keys = {key for key in row if key.endswith(("loss", "accuracy")) and not key.startswith("free")}
    assert {"loss", "text_loss", "user_loss", "text_word_accuracy"} <= keys
    return {key: row[key] for key in keys}


def test_the_evaluation_equals_the_runs_own(run, evaluate, capsys):
    """Also if the run was begun by a version with settings that no longer exist."""
    settings = yaml.safe_load((run / "args.yaml").read_text())
    settings["lora"]["alpha"] = settings["compile"] = 1
    (run / "args.yaml").write_text(yaml.safe_dump(settings))
    found, own = evaluate(run), rows(run, "eval")
    assert [row["step"] for row in own] == [0, 2] and found["step"] == 2
    assert teacher_forced(found) == pytest.approx(teacher_forced(own[1]), rel=1e-4)
    assert found["samples"] == own[1]["samples"] == 3 and found["skipped"] == 0
    assert found["base"] == own[0], "what the run measured before its first step"
    assert found["loss"] != pytest.approx(own[0]["loss"], rel=1e-3)
    assert found["free_silence"] == pytest.approx(own[1]["free_silence"])
    assert {path.name for path in (run / "samples/step_000002").iterdir()} == {"00.wav", "00.json"}
    chosen, head, *lines = capsys.readouterr().out.splitlines()
    assert "checkpoint_000002" in chosen and "step 2" in chosen
    assert head.split() == ["step", "2", "base"]
    [line] = [line for line in lines if line.startswith("loss ")]
    assert line.split() == ["loss", f"{found['loss']:.4f}", f"{own[0]['loss']:.4f}"]


def test_with_other_settings_the_base_is_evaluated_again(run, evaluate):
    """Without the adapters, over the same windows."""
    found, own = evaluate(run, "eval_free_samples=0"), rows(run, "eval")
    assert not any(key.startswith("free") for key in found) and not (run / "samples/step_000002").exists()
    assert teacher_forced(found) == pytest.approx(teacher_forced(own[1]), rel=1e-4)
    assert teacher_forced(found["base"]) == pytest.approx(teacher_forced(own[0]), rel=1e-4)
    fewer = evaluate(run, "eval_free_samples=0", "eval_max_samples=2")
    assert fewer["samples"] == fewer["base"]["samples"] == 2


def test_a_model_without_adapters_and_without_a_first_evaluation_has_no_base(run, evaluate, tmp_path, world, capsys):
    settings = {"lora.enable": False, "full_finetuning": True, "do_eval": False, "run_dir": f"{run}2"}
    config = write_config(tmp_path, world, PERSONAPLEX_CODES, **settings)
    with no_compile():
        assert train_here(config, PERSONAPLEX) == 0
    capsys.readouterr()
    found = evaluate(run.with_name("run2"), "eval_free_samples=0")
    assert found["base"] is None and found["samples"] == 3
    assert capsys.readouterr().out.splitlines()[1].split() == ["step", "2"]


def test_what_is_measured_on_other_data_is_kept_apart(run, evaluate, world, call):
    own = evaluate(run)
    replies = [(path.name, path.read_bytes()) for path in sorted((run / "samples/step_000002").iterdir())]
    with no_compile():
        assert not call(main, run, f"data.eval_data={world / PERSONAPLEX_CODES / 'train_precomputed.jsonl'}")
    assert json.loads((run / "evaluation_000002.json").read_text()) == own
    assert [(path.name, path.read_bytes()) for path in sorted((run / "samples/step_000002").iterdir())] == replies
    other = json.loads((run / "evaluation_on_train_precomputed/evaluation_000002.json").read_text())
    assert other["loss"] != own["loss"] and other["base"]["loss"]
    assert (run / "evaluation_on_train_precomputed/samples/step_000002/00.wav").is_file()


def test_two_ranks_find_the_same(run, evaluate):
    script("-m", "finetune.tools.evaluate", run, "eval_max_samples=3", processes=2)
    two = json.loads((run / "evaluation_000002.json").read_text())
    one = evaluate(run, "eval_max_samples=3")
    assert two["samples"] == one["samples"] == 3 and two["free_silence"] == pytest.approx(one["free_silence"])
    assert teacher_forced(two) == pytest.approx(teacher_forced(one), rel=1e-5)
    assert teacher_forced(two["base"]) == pytest.approx(teacher_forced(one["base"]), rel=1e-5)


def test_a_verdict_on_the_replies_is_printed(run, evaluate, monkeypatch, capsys):
    monkeypatch.setattr(
        "finetune.tools.evaluate.command.judge_replies", lambda *_: ({"free_silence": 1.0}, "all are silent")
    )
    assert evaluate(run)["free_silence"] == 1.0
    assert capsys.readouterr().out.splitlines()[-1].endswith("all are silent")


# --- prompts exchanged ---------------------------------------------------------------------------------------------


def recording(seed: int, frames: int = 7) -> VoicePrompt:
    return VoicePrompt(f"voice {seed}", codes=torch.full((8, frames), seed))


def embedded(seed: int, frames: int = 9) -> VoicePrompt:
    return VoicePrompt(f"embedded {seed}", embeddings=torch.full((frames - 1, 4), seed), tail=torch.full((17, 3), seed))


def sample_of(voice: VoicePrompt | None, ids: list[int], name: str = "a.wav at 0.00 s") -> Sample:
    prompt, dialogue = (
        build_prompt(voice, ids),
        stack_streams([5, 6, 7], torch.full((8, 3), 11), torch.full((8, 3), 12)),
    )
    mask = torch.arange(prompt.frames.shape[1] + 3) >= prompt.frames.shape[1]
    codes = torch.cat([prompt.frames, dialogue], 1)
    return Sample(codes, mask, prompt.embeddings, name, TextStats(), ids, voice and voice.name)


VOICES = [None, recording(1), recording(2, 5), embedded(3)]


@pytest.mark.parametrize("voice", VOICES)
@pytest.mark.parametrize("other", VOICES)
@pytest.mark.parametrize("ids", [[], [40, 41]])
def test_an_exchanged_prompt_is_the_one_that_training_would_build(voice, other, ids):
    sample, donor = sample_of(voice, [20, 21, 22]), sample_of(other, ids)
    for role_of, voice_of, expected in (
        (donor, sample, sample_of(voice, ids)), (sample, donor, sample_of(other, [20, 21, 22])),
        (None, None, sample_of(None, [])), (sample, sample, sample),
    ):  # fmt: skip
        found = exchange_prompt(sample, role_of, voice_of)
        assert torch.equal(found.codes, expected.codes) and torch.equal(found.loss_mask, expected.loss_mask)
        assert (found.embeddings is None) == (expected.embeddings is None)
        assert found.embeddings is None or torch.equal(found.embeddings, expected.embeddings)


def test_the_other_prompt_is_the_next_that_differs():
    assert other_prompts("aabc", str) == ["b", "b", "c", "a"] and other_prompts("aaa", str) == [None] * 3


def test_an_interval_is_that_of_the_mean_over_calls():
    values = np.random.default_rng(1).normal(2.0, 1.0, 400)
    found = bootstrap(values, [f"call {i}" for i in range(400)])
    assert found.mean == values.mean()
    assert found.high - found.mean == pytest.approx(1.96 / 20, rel=0.15)  # standard error: 1 / sqrt(400)
    # Windows of a call that are all alike say no more than one of them.
    repeated = bootstrap(np.repeat(values[:40], 10), [f"call {i // 10}" for i in range(400)])
    assert repeated.high - repeated.low == pytest.approx(2 * 1.96 * values[:40].std() / 40**0.5, rel=0.15)
    assert not bootstrap([1.0, 1.0], ["a", "a"]).is_positive, "one call proves nothing"


def test_conditioning_and_forgetting_are_measured_against_the_base(run, evaluate):
    found = evaluate(run, "--conditioning", "--forgetting")
    for kind in ("role", "voice", "prompt"):
        entry = found["conditioning"][kind]
        assert entry["matters"] is None or entry["matters"] == (entry["tuned"][1] > 0)
    mean, low, high = found["forgetting"]["rise"]
    assert low <= mean <= high
    assert mean == pytest.approx(found["forgetting"]["after"] - found["forgetting"]["before"])
    assert not found.keys() & {"loss", "base"}, "only what was asked for"
    full = evaluate(run, "eval_free_samples=0")
    assert full["forgetting"] == found["forgetting"] and "loss" in full, "one file holds both"


def test_a_model_that_has_not_moved_has_forgotten_nothing(run, evaluate):
    path = run / "checkpoints/checkpoint_000002/consolidated/lora.safetensors"
    state = {name: values * (".lora_B." not in name) for name, values in load_file(path).items()}
    save_file(state, path)
    found = evaluate(run, "--forgetting", "--conditioning")
    assert found["forgetting"]["rise"] == [0, 0, 0]
    for entry in found["conditioning"].values():
        assert entry["matters"] is None or entry["gain"] == [0, 0, 0]


def test_two_runs_are_compared_window_by_window(run, evaluate, capsys):
    same = evaluate(run, run)["comparison"]
    rows = {name: row for name, row in same.items() if name != "other"}
    assert {"loss of the agent", "replies: silence"} <= rows.keys()
    assert all(row["difference"][0] == 0 and row["first"] == row["second"] for row in rows.values())
    assert rows["loss of the agent"]["difference"] == [0, 0, 0]
    assert "no difference" in capsys.readouterr().out
    other = shutil.copytree(run, run.with_name("other"))
    path = other / "checkpoints/checkpoint_000002/consolidated/lora.safetensors"
    save_file({name: values * 30 for name, values in load_file(path).items()}, path)
    row = evaluate(run, other)["comparison"]["loss of the agent"]
    assert row["second"] > row["first"] and row["difference"][0] == pytest.approx(row["second"] - row["first"])
