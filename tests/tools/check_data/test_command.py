"""The command and its report, in this process and in worker processes."""

import io
import shutil

import numpy as np
import pytest
from matplotlib.figure import Figure

from finetune.cli import UserError
from finetune.config import load_args
from finetune.tools.check_data.command import main
from finetune.tools.check_data.corpus import check_run
from finetune.tools.check_data.findings import Problem
from finetune.tools.check_data.summary import describe_check, draw_check
from tests.support import PERSONAPLEX_CODES, script, write_config
from tests.tools.check_data.conftest import facts_of


@pytest.fixture(scope="module")
def config(world, tmp_path_factory):
    # The plan of a GPU is made faster than that of a CPU.
    folder = tmp_path_factory.mktemp("clean")
    return write_config(folder, world, PERSONAPLEX_CODES, duration_sec=1, device="auto", **{"prompt.max_sec": 4})


@pytest.fixture(scope="module")
def clean(config):
    return check_run(load_args(config), workers=0)


def test_a_clean_corpus_passes_without_any_weights(config, world, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(world / "model" / name, tmp_path / "model" / name)
    picture = tmp_path / "report.png"
    overrides = [f"moshi_paths.hf_repo_id={tmp_path / 'model'}"]
    assert main([str(config), *overrides, "--workers", "0", "--report", str(picture)]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith("0 errors, 0 warnings, 0 notes. Ready to train.")
    assert "GiB on one process at batch_size 1" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.png"]


@pytest.mark.slow
def test_worker_processes_find_the_same_and_the_exit_code_is_1(corpus):
    corpus.record(corpus.sound()[::-1])
    corpus.encode()
    config = corpus.config(duration_sec=1, device="auto", **{"prompt.max_sec": 4})
    command = ("-m", "finetune.tools.check_data", config, "--report", corpus.folder / "r.png")
    done = script(*command, "--workers", 1, check=False)
    assert done.returncode == 1, done.stderr
    alone = describe_check(check_run(load_args(config), workers=0))
    shown = [line for line in done.stdout.strip().split("\n") if not line.startswith("memory: ")]
    assert shown == alone.strip().split("\n")


def test_a_check_that_fails_costs_its_file_only(corpus, monkeypatch):
    """Because a worker died or for any other reason: the file is reported, and all of its windows are skipped."""

    def outcomes(start, tasks, workers):
        assert workers == 3
        checker = start(0)
        for i, task in reversed(list(enumerate(tasks))):  # workers finish in any order
            facts = checker(task)
            yield (task, None, "the worker died: killed by SIGKILL") if i == 1 else (task, facts, None)

    monkeypatch.setattr("finetune.tools.check_data.corpus.run_tasks", outcomes)
    result = check_run(load_args(corpus.config(duration_sec=2)), workers=3)
    (problem,) = result.problems
    assert (problem.kind, problem.place) == ("failed", f"{corpus.folder / 'train.jsonl'}:2") and result.failed
    assert "SIGKILL" in problem.detail and str(corpus.wav) in problem.detail
    assert [own.line.number for own in result.facts] == [1, 2, 3, 4, 1, 2]
    assert result.train["skipped"] == len(result.facts[1].windows) > 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["moshi_paths.hf_repo_id=/dev"], "/dev.*tokenizer"),
        (["--workers", "-1"], "--workers -1"),
        (["--report", "report.pdf"], r"--report report.pdf.*\.png"),
        (["--report", "nowhere/report.png"], "--report nowhere/report.png"),
        (["duration_sec=300"], "duration_sec 300 and prompt.max_sec 4"),
    ],
)
def test_a_config_that_cannot_be_used_is_one_sentence(config, arguments, words):
    with pytest.raises(UserError, match=words) as raised:
        main([str(config), *arguments])
    assert "\n" not in str(raised.value)


def test_without_prompts_the_context_limits_nothing(config, world):
    data = [f"data.{split}_data={world}/codes/{split}_precomputed.jsonl" for split in ("train", "eval")]
    assert not check_run(load_args(config, ["duration_sec=300", *data]), prompts=False, workers=0).problems


def test_problems_are_counted_by_level_with_five_examples(clean):
    problems = [Problem("missing", f"m.jsonl:{i}", f"{i}.wav: no such file") for i in range(7)]
    problems += [Problem("late", "m.jsonl:1", "1.wav: late")]
    report = describe_check(clean._replace(problems=problems))
    assert "7 x missing audio" in report and "... and 2 more" in report
    assert "m.jsonl:4  4.wav" in report and "m.jsonl:5 " not in report
    assert report.endswith("7 errors, 1 warning, 0 notes. Not ready: repair the errors first.")


def test_names_that_the_terminal_cannot_show_are_escaped(corpus, monkeypatch):
    corpus.line["path"] = "train/Gespräch.wav"
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    config = corpus.config(duration_sec=1, do_eval=False, device="auto")
    assert main([str(config), "--workers", "0", "--report", str(corpus.folder / "r.png")]) == 1
    terminal.flush()
    assert rb"Gespr\xe4ch.wav" in terminal.buffer.getvalue()


def test_nothing_is_written_unasked(corpus, monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = corpus.config(duration_sec=1, do_eval=False)
    assert main([str(config), "--workers", "0"]) == 0 and not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("seconds", [(10.0, 20.0), (1.0, 400.0)])
def test_the_picture_shows_all_files(clean, tmp_path, monkeypatch, seconds):
    """Lengths on a logarithmic axis if they differ by more than ten times."""
    facts = [facts_of(f"{i}.wav") for i in range(2)]
    for own, real_sec in zip(facts, seconds):
        own.real_sec = own.decoded_sec = real_sec
        own.talk_sec, own.gaps, own.words, own.densest = (0.5 * real_sec, 0.25 * real_sec, 0.0), [0.3, 9.0], 5, 20.0
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **settings: figures.append(self) or path.touch())
    draw_check(clean._replace(facts=facts), tmp_path / "r.png")
    lengths, talk, gaps, density = figures[0].axes
    assert lengths.get_xscale() == ("log" if seconds[1] > 10 * seconds[0] else "linear")
    bars = lambda axes: sum(patch.get_height() for patch in axes.patches if patch.get_width() > 0)
    assert [bars(axes) for axes in (lengths, gaps, density)] == [2, 4, 2]
    for text, side in zip(talk.get_legend().get_texts(), ("agent", "user"), strict=True):
        assert f": {clean.train[side]:.1%} " in text.get_text(), "the number of the table"
    assert "median 4.65 s of 4" in gaps.get_legend().get_texts()[0].get_text()
    assert np.isclose(max(patch.get_x() for patch in density.patches), 20, atol=0.5)
    assert (tmp_path / "r.png").exists()
