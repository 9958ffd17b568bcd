"""report.html of a real run, of runs with parts missing or broken, and of a long one."""

import itertools
import json
import math
import re
import sys

import numpy as np
import pytest

from finetune.audio.files import read_audio
from finetune.cli import UserError
from finetune.guard import best_checkpoint
from finetune.metrics import read_rows
from finetune.model.pretrained import PERSONAPLEX
from finetune.tools.report.charts import (
    MAX_POINTS,
    draw_chart,
    format_duration,
    format_number,
    make_curve,
    round_ticks,
)
from finetune.tools.report.listen import draw_conversation, encode_opus
from finetune.tools.report.page import main, write_report
from tests.support import PERSONAPLEX_CODES, train_here, write_config
from tests.tools.report_page import Page, check_nothing_is_fetched, row, write_rows, write_sample


@pytest.fixture(scope="module")
def real(world, tmp_path_factory):
    """The folder of a PersonaPlex run of two steps, with a reply before and after, and its page."""
    folder = tmp_path_factory.mktemp("report")
    settings = {"ckpt_freq": 1, "eval_free_samples": 1, "eval_free_sec": 1.5, "batch_size": 2, "eval_max_samples": 1}
    settings |= {"prompt.drop_voice": 0.5}
    config = write_config(folder, world, PERSONAPLEX_CODES, **settings)
    assert train_here(config, PERSONAPLEX) == 0
    return folder / "run", Page(write_report(folder / "run"))


# --- A real run ----------------------------------------------------------------------------------------------------


def test_a_real_run_is_one_page_that_fetches_nothing(real):
    run, page = real
    check_nothing_is_fetched(page)
    assert page.sections == ["replies", "listen", "curves", "codebooks", "evaluations", "arithmetic", "data",
                             "settings", "checkpoints"]  # fmt: skip
    assert [a["href"] for a in page.all("a")] == ["#" + name for name in page.sections]
    assert "PersonaPlex, 16 codebooks predicted · LoRA of rank 4 · float32 · 2 steps, complete" in page.text
    assert not [path for path in run.iterdir() if "tmp" in path.name]


def test_curves_are_the_metrics(real):
    run, page = real
    train = read_rows(run / "metrics.train.jsonl")
    held_out = read_rows(run / "metrics.eval.jsonl")
    charts = page.charts()
    for title, key in (("Objective", "loss"), ("Text: words", "text_word_loss"), ("User’s audio", "user_loss")):
        (style, trained), (other, held) = charts[title]
        assert (style, other) == ("train", "held")
        assert trained == [[row["step"], format_number(row[key])] for row in train if key in row]
        assert held == [[row["step"], format_number(row[key])] for row in held_out]
        assert f"base {format_number(held_out[0][key])}" in page.text
    # 8 small charts a side (the script knows the last one of each number, which is the user's).
    assert {str(k) for k in range(8)} < set(charts) and page.source.count('class="chart small"') == 16
    assert charts["7"][1][1] == [[row["step"], format_number(row["codebook_15_loss"])] for row in held_out]


def test_samples_play_and_are_what_was_saved(real):
    run, page = real
    saved = [path for step in (2, 0) for path in sorted((run / f"samples/step_{step:06d}").glob("*.wav"))]
    assert len(saved) == 2
    sounds = page.sounds()
    assert len(sounds) == 2
    for path, (pcm, rate) in zip(saved, sounds):
        original = read_audio(path, sample_rate=24_000)
        seconds = original.shape[1] / 24_000
        assert pcm.shape[0] == 2 and pcm.shape[1] / rate == pytest.approx(seconds, abs=0.08)
        loud = lambda x, rate: [np.sqrt((channel**2).mean()) for channel in x]
        assert loud(pcm, rate) == pytest.approx(loud(original, 24_000), rel=0.2, abs=2e-3)
    words = [entry for path in saved for entry in json.loads(path.with_suffix(".json").read_text())["text"]]
    shown = page.all("text", **{"class": "word"})
    assert [(float(t["data-start"]), float(t["data-end"])) for t in shown] == [
        (round(start, 2), round(end, 2)) for _, start, end in words
    ]


def test_arithmetic_and_data_are_those_of_the_run(real, world):
    run, page = real
    lines = [json.loads(line) for line in (world / "data/train.jsonl").read_text().splitlines()]
    hours = sum(line["duration"] for line in lines) / 3600
    windows = sum(math.ceil(round(line["duration"] / 3, 6)) for line in lines)
    text = " ".join(page.text.split())
    assert "2 × 1 × 1 = 2 windows (batch × microbatches × processes)" in text
    assert f"4 windows up to the checkpoint of step 2 = {4 / windows:.2f} epochs of {windows:,}" in text
    assert f"{len(lines):,} {hours:.2f} {windows:,}" in text
    frames = sum(
        row["frames_per_sec"] * row["interval_sec"] for row in read_rows(run / "metrics.train.jsonl") if "lr" in row
    )
    assert f"{format_number(frames / 12.5 / 3600)} h of frames that carry loss" in text
    trained = [row for row in read_rows(run / "metrics.train.jsonl") if "lr" in row]
    voiceless = np.mean([row["share_without_voice"] for row in trained])
    assert f"{voiceless:.1%} of the windows had no voice prompt" in text
    (step, _, reason) = best_checkpoint(run)
    assert f"Best checkpoint step {step} {reason}" in text and f"that of step {step}: {reason}" in text
    assert "lora.safetensors" in text and "optim.lr 0.001 0.0001 Peak learning rate." in text


def test_the_command_writes_the_page_and_says_where(real, monkeypatch, capsys):
    run, page = real
    (run / "report.html").unlink()
    monkeypatch.setattr(sys, "argv", ["report", str(run)])
    main()
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").read_text() == page.source


# --- Parts missing, broken, hostile --------------------------------------------------------------------------------


def write_state(folder):
    state = folder / "checkpoints/checkpoint_000002/train_state.json"
    state.parent.mkdir(parents=True)
    state.write_text('{"step": 2}')


ARGS = "max_steps: 7\noptim:\n  lr: 2.0e-6\ndata:\n  train_data: gone.jsonl\n"
PARTS = {  # {sections of the page: how to write a part of a run that has these only}
    ("data", "settings"): lambda folder: (folder / "args.yaml").write_text(ARGS),
    ("curves", "codebooks"): lambda folder: write_rows(folder, "train", [row(1, lr=1e-3), row(2)]),
    ("arithmetic",): lambda folder: write_rows(folder, "train", [{"step": 2, "event": "saved", "seconds": 1.5}]),
    ("curves", "codebooks", "evaluations"): lambda folder: write_rows(folder, "eval", [row(0, 3.0), row(2)]),
    ("replies",): lambda folder: write_rows(
        folder, "eval", [{"step": 4, "free_silence": 0.4, "free_words_per_minute": None, "seconds": None}]
    ),
    ("listen",): lambda folder: write_sample(folder, 3, "only", {}),
    ("checkpoints",): write_state,
}


@pytest.mark.parametrize("sections", PARTS)
def test_any_part_alone_makes_a_page(sections, tmp_path):
    PARTS[sections](tmp_path)
    page = Page(write_report(tmp_path))
    check_nothing_is_fetched(page)
    assert page.sections == list(sections)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="does not hold a run"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_broken_files_are_named_and_cost_nothing_else(tmp_path):
    (tmp_path / "args.yaml").write_text("a: [1\n")
    (tmp_path / "metrics.train.jsonl").write_text(json.dumps(row(1) | {"grad_norm": None}) + '\n{"step": 2, "lo')
    write_rows(tmp_path, "eval", [row(0) | {"loss": None}, row(1)])
    (tmp_path / "checkpoints/checkpoint_000001").mkdir(parents=True)
    broken = write_sample(tmp_path, 1, "broken", {})
    broken.write_bytes(b"RIFF of nothing")
    write_sample(tmp_path, 1, "empty", {}, seconds=0.0)
    odd = write_sample(tmp_path, 1, "odd", {"text": [["no times"]], "measures": "none"})
    odd.with_suffix(".json").write_text("[")
    page = Page(write_report(tmp_path))
    for what in ("args.yaml cannot be read", "checkpoint_000001 has no readable train_state.json", "broken.wav: not",
                 "empty.wav"):  # fmt: skip
        assert what in page.text, what
    assert len(page.sounds()) == 1 and "curves" in page.sections


def test_text_from_outside_stays_text(tmp_path):
    hostile = '</script><script>alert(1)</script><img src="http://example.com/x.png" onerror="alert(2)"> & "quotes"'
    (tmp_path / "args.yaml").write_text(json.dumps({"prompt": {"text": hostile}, "data": {"train_data": "x.jsonl"}}))
    (tmp_path / "x").mkdir()
    write_sample(tmp_path, 0, "a", {"text": [[hostile, 0.5, 0.9]], "of": hostile, "prompt": hostile, "voice": hostile})
    page = Page(write_report(tmp_path))
    check_nothing_is_fetched(page)
    assert len(page.all("script")) == 1 and not page.all("img")
    assert page.text.count(hostile) == 5  # word, text, prompt, voice, setting


def test_a_run_that_went_mute_says_so(tmp_path):
    said = {"free_silence": 0.61, "free_words_per_minute": 80.0, "free_looping": 0.0, "free_replies": 4}
    write_rows(tmp_path, "eval", [row(0, **said), row(100, **said | {"free_silence": 0.99})])
    page = Page(write_report(tmp_path))
    assert "Step 100: mute: silent 99% of the time." in page.text
    assert page.all("div", **{"class": "tile bad"})
    (tmp_path / "evaluation_000100.json").write_text(json.dumps(row(100, **said)))  # replaces the row of that step
    (tmp_path / "evaluation_000200.json").write_text("[")
    page = Page(write_report(tmp_path))
    assert "evaluation_000200.json" in page.text
    assert "mute:" not in page.text and not page.all("div", **{"class": "tile bad"})


def test_a_card_holds_one_conversation_over_steps(tmp_path):
    for step in (0, 20, 100):
        for name in ("00", "01"):
            write_sample(tmp_path, step, name, {"of": f"calls/{name}.wav", "text": [[f"w{step}of{name}", 0.1, 0.4]]})
    page = Page(write_report(tmp_path))
    assert len(page.all("article")) == 2 and len(page.all("audio")) == 6
    order = [f"w{step}of{name}" for name in ("00", "01") for step in (100, 20, 0)]
    assert re.findall(r'data-end="0.40">(\w+)<', page.source) == order
    assert page.text.count("(base model)") == 2 and page.text.count("2 other steps") == 2


def test_the_best_checkpoint_is_heard_first_and_marked(tmp_path):
    write_rows(tmp_path, "eval", [row(0), row(20, 1.0), row(100)])
    for step in (20, 100):
        (tmp_path / f"checkpoints/checkpoint_{step:06d}").mkdir(parents=True)
    for step in (0, 20, 100):
        write_sample(tmp_path, step, "00", {"text": [[f"word{step}", 0.1, 0.4]]})
    page = Page(write_report(tmp_path))
    assert re.findall(r'data-end="0.40">(\w+)<', page.source) == ["word20", "word100", "word0"]
    assert "step 20 (best)" in page.text and page.text.count("(best)") == 1
    assert re.search(r"Evaluations .*? 20 \s*best", page.text, re.DOTALL)


def test_a_reply_without_a_voice_says_so(tmp_path):
    write_rows(tmp_path, "eval", [row(0)])
    about = {"prompt": "Be kind.", "voice": None}
    write_sample(tmp_path, 0, "00", about)
    assert re.search(r"prompt\s+Be kind\.\s+voice\s+none", Page(write_report(tmp_path)).text)
    write_sample(tmp_path, 0, "00", about | {"voice": "fir.wav"})
    assert re.search(r"voice\s+fir.wav", Page(write_report(tmp_path)).text)


def test_sound_beyond_the_budget_is_named(tmp_path, monkeypatch):
    for step in (0, 10, 20, 30):
        write_sample(tmp_path, step, "a", {"text": [[f"word{step}", 0.1, 0.4]]})
    one = len(encode_opus(read_audio(tmp_path / "samples/step_000030/a.wav")))
    monkeypatch.setattr("finetune.tools.report.listen.AUDIO_BUDGET", round(2.5 * one))
    page = Page(write_report(tmp_path))
    assert len(page.sounds()) == 2
    assert "word30" in page.text and "word0" in page.text  # the newest and the base
    assert "samples/step_000010/a.wav" in page.text and "samples/step_000020/a.wav" in page.text


def test_a_long_run_stays_a_small_page_with_true_means(tmp_path):
    rng = np.random.default_rng(0)
    first = row(1, lr=1e-5, tokens_per_sec=1e4, interval_sec=2.0)
    rows = [{k: v * rng.uniform(0.5, 1.5) for k, v in first.items()} | {"step": step} for step in range(1, 4001)]
    write_rows(tmp_path, "train", rows)
    path = write_report(tmp_path)
    assert path.stat().st_size < 1.5e6
    ((style, points),) = Page(path).charts()["Objective"]
    assert style == "train" and len(points) == MAX_POINTS
    mean = np.mean([float(value) for _, value in points])
    assert mean == pytest.approx(np.mean([r["loss"] for r in rows]), rel=1e-3)


# --- Pieces --------------------------------------------------------------------------------------------------------


def test_points_are_drawn_where_the_axis_says():
    values = {0: 4.0, 50: 3.0, 100: 1.5}
    rows = [{"step": step, "loss": value} for step, value in values.items()]
    drawn = draw_chart("Objective", [make_curve("held", rows, "loss")], 100, base=4.0).svg
    labels = re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', drawn)
    slope, offset = np.polyfit([float(y) - 3.5 for y, _ in labels], [float(label) for _, label in labels], 1)
    circles = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)
    assert [slope * float(y) + offset for _, y in circles] == pytest.approx(list(values.values()), abs=0.01)
    xs = [float(x) for x, _ in circles]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1])
    base = float(re.search(r'class="base" d="M[\d.]+,([\d.]+)H', drawn)[1])
    assert base == pytest.approx(float(circles[0][1]))
    assert draw_chart("Objective", [make_curve("held", [], "loss")], 100) is None
    assert draw_chart("Objective", [make_curve("held", rows[:1], "loss")], 100) is None


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.97, 0.972), (3e-6, 4e-5), (-2, 1e4), (0, 1e-9)])
def test_ticks_are_round_few_and_inside(low, high):
    for most in (2, 3, 5):
        found = round_ticks(low, high, most)
        assert 1 <= len(found) <= most + 1
        assert all(low - 1e-9 * abs(high) <= tick <= high * (1 + 1e-9) for tick in found)


def test_numbers_for_people():
    assert [format_number(v) for v in (0, 2.12345, 13.897, 428.32, 1234567, 1.5e-6)] == [
        "0", "2.123", "13.90", "428.3", "1,234,567", "1.50e-06"
    ]  # fmt: skip
    assert [format_duration(v) for v in (7, 300, 7200)] == ["7 s", "5 min", "2.0 h"]


def test_words_of_one_row_do_not_overlap():
    words = [("extraordinarily", 0.1 * i, 0.1 * i + 0.1) for i in range(3)] + [("yes", 1.9, 2.0)]
    drawn = draw_conversation(np.zeros((2, 48_000), np.float32), words)
    rows: dict[str, list[tuple[float, int]]] = {}
    for x, y, word in re.findall(r'class="word" x="([\d.]+)" y="([\d.]+)"[^>]*>(\w+)<', drawn):
        rows.setdefault(y, []).append((float(x), len(word)))
    assert sum(map(len, rows.values())) == 4
    for own in rows.values():
        for (x, letters), (after, _) in itertools.pairwise(own):
            assert after >= x + 6 * letters
    assert int(re.search(r'width="(\d+)"', drawn)[1]) >= max(x + 6 * n for own in rows.values() for x, n in own)
