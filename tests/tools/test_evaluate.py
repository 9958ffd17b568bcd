"""The command that evaluates a run: it finds what the run itself found, on one rank and on two."""

import json
import shutil

import pytest
import yaml
from moshi.utils.compile import no_compile

from finetune.model.pretrained import PERSONAPLEX
from finetune.tools.evaluate import main
from tests.support import rows, script, train_here, write_config


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """Two steps of LoRA on PersonaPlex, evaluated at steps 0 and 2."""
    folder = tmp_path_factory.mktemp("trained")
    settings = {"eval_freq": 2, "eval_free_samples": 1, "eval_free_sec": 0.4, "optim.lr": 0.01}
    with no_compile():
        assert train_here(write_config(folder, world, **settings), PERSONAPLEX) == 0
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
    head, *lines = capsys.readouterr().out.splitlines()
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
    config = write_config(
        tmp_path, world, **{"lora.enable": False, "full_finetuning": True, "do_eval": False, "run_dir": f"{run}2"}
    )
    with no_compile():
        assert train_here(config, PERSONAPLEX) == 0
    capsys.readouterr()
    found = evaluate(run.with_name("run2"), "eval_free_samples=0")
    assert found["base"] is None and found["samples"] == 3
    assert capsys.readouterr().out.splitlines()[0].split() == ["step", "2"]


def test_two_ranks_find_the_same(run, evaluate):
    script("-m", "finetune.tools.evaluate", run, "eval_max_samples=3", processes=2)
    two = json.loads((run / "evaluation_000002.json").read_text())
    one = evaluate(run, "eval_max_samples=3")
    assert two["samples"] == one["samples"] == 3 and two["free_silence"] == pytest.approx(one["free_silence"])
    assert teacher_forced(two) == pytest.approx(teacher_forced(one), rel=1e-5)
    assert teacher_forced(two["base"]) == pytest.approx(teacher_forced(one["base"]), rel=1e-5)


def test_a_verdict_on_the_replies_is_printed(run, evaluate, monkeypatch, capsys):
    monkeypatch.setattr("finetune.tools.evaluate.judge_replies", lambda *_: ({"free_silence": 1.0}, "all are silent"))
    assert evaluate(run)["free_silence"] == 1.0
    assert capsys.readouterr().out.splitlines()[-1].endswith("all are silent")
