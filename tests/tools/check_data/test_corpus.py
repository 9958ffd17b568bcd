"""What all files together show, and totals that are those of training."""

import gzip
import itertools
import json
import math
import random
import shutil
import wave
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.audio.agreement import Agreement
from finetune.audio.files import to_frames
from finetune.config import load_args
from finetune.data.batch import TextStats
from finetune.data.interleaver import InterleavedTokenizer, Interleaver
from finetune.data.windows import WindowOrder, open_windows
from finetune.model.pretrained import Pretrained
from finetune.prompts.hybrid import build_prompt
from finetune.prompts.text import wrap_system_prompt
from finetune.tools.check_data import corpus as corpus_module
from finetune.tools.check_data.checker import Checker
from finetune.tools.check_data.corpus import add_up, check_run, planned_memory, read_lines
from finetune.tools.check_data.summary import describe_check, draw_check
from tests.support import PERSONAPLEX_CODES, write_config
from tests.tools.check_data.conftest import facts_of, kinds_of, write_pcm


@pytest.fixture(scope="module")
def config(world, tmp_path_factory):
    settings = {"batch_size": 4, "max_steps": 10, "num_microbatches": 2}
    return write_config(tmp_path_factory.mktemp("clean"), world, PERSONAPLEX_CODES, **settings)


# --- Several files ----------------------------------------------------------------------------------------------------


def test_held_out_audio_in_the_training_data_is_a_leak_in_any_container(corpus):
    source = corpus.folder / corpus.lines["eval"][1]["path"]
    corpus.wav.write_bytes(source.read_bytes() + b"LIST\x04\0\0\0INFO")  # the same samples, other bytes
    shutil.copy(source.with_suffix(".json"), corpus.json)
    corpus.line["duration"] = corpus.lines["eval"][1]["duration"]
    (leak,) = corpus.check().problems
    assert (leak.kind, leak.place) == ("leak", f"{corpus.folder / 'eval.jsonl'}:2")
    assert f"{corpus.folder / 'train.jsonl'}:2" in leak.detail


def test_silent_files_are_not_duplicates(corpus):
    """Nothing is known about their sound."""
    for line in corpus.lines["train"][:2]:
        write_pcm(corpus.folder / line["path"], np.zeros((2, 24_000)))
        line["duration"] = 1.0
    assert "duplicate" not in kinds_of(corpus.check())


def test_two_audio_files_with_one_json(corpus):
    write_pcm(corpus.wav.with_suffix(".wave"), corpus.sound() * 0.5)
    corpus.lines["train"].append(corpus.line | {"path": corpus.line["path"] + "e"})
    (problem,) = corpus.check().problems
    assert problem.kind == "shared json" and problem.place.endswith("train.jsonl:5")


def test_words_under_another_label_in_all_files_are_an_error(corpus):
    result = corpus.check(**{"data.speakers": ["AGENT"]})
    assert kinds_of(result).count("no words") == 6 and kinds_of(result).count("no agent") == 2 and result.failed
    places = [problem.place for problem in result.problems if problem.kind == "no agent"]
    assert places == [str(corpus.folder / f"{name}.jsonl") for name in ("train", "eval")]
    assert "SPEAKER_MAIN, SPEAKER_USER" in describe_check(result)


def test_lines_with_and_without_codes_are_refused(corpus):
    corpus.encode()
    del corpus.line["codes_path"]
    (problem,) = corpus.check().problems
    assert problem.kind == "mixed" and "3 of 4 lines" in problem.detail


def test_codes_of_another_model_are_refused(corpus):
    """Also where all files agree; without the codec of the model, the codes must agree with each other."""
    corpus.encode()
    other = corpus.folder / "other"
    shutil.copytree(corpus.world / "model", other)
    mimi = Pretrained(str(other)).mimi_weights()
    state = load_file(mimi)
    state["quantizer.rvq_first.vq.layers.0._codebook.embedding_sum"][0, 0] += 1
    save_file(state, mimi)
    found = corpus.check(**{"moshi_paths.hf_repo_id": str(other)})
    assert found.failed and kinds_of(found) == ["codes"] * 6
    mimi.unlink()
    assert not corpus.check(**{"moshi_paths.hf_repo_id": str(other)}).problems
    path = corpus.folder / corpus.line["codes_path"]
    torch.save(torch.load(path) | {"mimi": "another"}, path)
    (problem,) = corpus.check(**{"moshi_paths.hf_repo_id": str(other)}).problems
    assert problem.kind == "codes" and problem.place.endswith("train.jsonl:2") and "another" in problem.detail


def test_a_rare_language_is_noted_and_all_are_counted(corpus):
    for i, line in enumerate(corpus.lines["train"] * 3):
        shutil.copy(corpus.folder / line["path"], corpus.folder / f"{i}.wav")
        content = json.loads((corpus.folder / line["path"]).with_suffix(".json").read_text())
        origin = {"channel": 0, "duration": 9.0, "sound_sec": 5.0, "repairs": {}, "language": "es" if i == 5 else "en"}
        content["annotate.py"] = {"speakers": {"SPEAKER_MAIN": origin}}
        (corpus.folder / f"{i}.json").write_text(json.dumps(content))
    corpus.lines["train"] = [row | {"path": f"{i}.wav"} for i, row in enumerate(corpus.lines["train"] * 3)]
    result = corpus.check()
    (problem,) = [problem for problem in result.problems if problem.kind == "other language"]
    assert problem.place.endswith("train.jsonl:6") and not result.failed
    assert "en 11, es 1" in describe_check(result)


@pytest.mark.parametrize(("steps", "kinds"), [(16, []), (17, ["epochs"])])
def test_too_many_epochs_are_a_warning(corpus, steps, kinds):
    """Four windows, and four in each step."""
    result = corpus.check(max_steps=steps, batch_size=4, duration_sec=30)
    assert kinds_of(result) == kinds and not result.failed


# --- Manifests ----------------------------------------------------------------------------------------------------


def test_a_damaged_gz_manifest_keeps_the_lines_before_the_damage(corpus):
    corpus.config()
    damaged, problems = corpus.folder / "damaged.jsonl.gz", []
    damaged.write_bytes(gzip.compress((corpus.folder / "train.jsonl").read_bytes() * 200)[:-20])
    count = len(read_lines(damaged, problems))
    assert 0 < count <= 800
    assert [(problem.kind, problem.place) for problem in problems] == [("line", f"{damaged}:{count + 1}")]


def test_random_damage_never_ends_the_check(corpus, tmp_path):
    dice = random.Random(0)
    for line in corpus.lines["train"]:
        for path in (corpus.folder / line["path"], (corpus.folder / line["path"]).with_suffix(".json")):
            data = bytearray(path.read_bytes())
            for _ in range(40):
                data[dice.randrange(min(len(data), 2000))] = dice.randrange(256)
            path.write_bytes(data)
    config = corpus.config()
    manifest = corpus.folder / "train.jsonl"
    manifest.write_bytes(manifest.read_bytes() + b'\xff\xfe\n[]\n{"path": 3}\n\n{"path": "a", "duration": null}\n')
    result = check_run(load_args(config), workers=0)
    assert [p.place[-1] for p in result.problems if p.kind == "line"] == ["5", "6", "7", "9"] and result.failed
    describe_check(result)
    draw_check(result, tmp_path / "r.png")


def test_a_manifest_without_a_usable_line_still_gives_a_report(corpus, tmp_path):
    corpus.lines["train"] = ["nothing", "at all"]
    result = corpus.check()
    assert [problem.place[-1] for problem in result.problems] == ["1", "2", "1"]
    assert result.train["epoch"] == 0 and "nothing to train on" in describe_check(result)
    draw_check(result, tmp_path / "r.png")


def test_prompts_are_checked_if_the_settings_a_line_or_a_json_has_one(corpus):
    prompts = lambda **settings: corpus.check(**{"prompt.voices_dir": None} | settings).prompts
    assert prompts()
    assert corpus.check(prompts=False).train["prompt_frames"] == 0
    for line in corpus.all_lines():
        (corpus.folder / line["path"]).with_suffix(".json").write_text('{"alignments": []}')
    assert not prompts()
    assert prompts(**{"prompt.text": "You are Ada."})
    corpus.line["text_prompt"] = "You are Ada."
    assert prompts()


# --- Totals -----------------------------------------------------------------------------------------------------------


def test_totals_are_those_of_the_samples_of_training(config, world):
    """Compared with the windows and tokenizers of training, and with sums made by hand."""
    args = load_args(config, ["data.shuffle=false"])
    result = check_run(args, workers=0)
    train, held_out = result.train, result.held_out

    rows = [json.loads(row) for row in (world / "data/train.jsonl").read_text().splitlines()]
    sidecars = [json.loads((world / "data" / row["path"]).with_suffix(".json").read_text()) for row in rows]
    assert train["files"] == len(rows)
    assert train["hours"] * 3600 == pytest.approx(sum(row["duration"] for row in rows))
    assert train["decoded_hours"] == pytest.approx(train["hours"])
    words = [word for content in sidecars for word, _, speaker in content["alignments"] if speaker == "SPEAKER_MAIN"]
    spm = Pretrained(str(world / "model")).tokenizer()
    assert train["words"] == len(words)
    assert train["tokens"] == sum(len(spm.encode(word)) for word in words)
    assert train["prompts"] == len({content["text_prompt"] for content in sidecars})
    assert train["voices"] == len({content["voice_prompt"] for content in sidecars})

    # Windows, frames and text as training reads them; the frames of a voice from its wav.
    frames = to_frames(args.duration_sec)
    windows = open_windows(args.data.train_data, frames)
    (index,) = windows.indexes
    assert (train["windows"], train["epoch"], train["skipped"]) == (len(windows), len(windows), 0)
    assert held_out["windows"] == len(open_windows(args.data.eval_data, frames))
    tokenizer = InterleavedTokenizer(Interleaver(spm), frames)
    lengths, text, words, late = [], torch.zeros(0, dtype=torch.int64), 0, 0
    for window in range(len(windows)):
        file, part = index.window(window)
        draft = tokenizer.read(index.line(file), part)
        text = torch.cat([text, draft.text])
        words, late = words + draft.stats.words, late + draft.stats.late
        with wave.open(str(world / "data/voices" / sidecars[file]["voice_prompt"])) as voice:
            voice_frames = math.ceil(voice.getnframes() / 1920)
        ids = spm.encode(wrap_system_prompt(sidecars[file]["text_prompt"]))
        lengths.append(len(draft.text) + voice_frames + build_prompt(None, ids).frames.shape[1])
    assert train["dialogue_frames"] == len(text)
    assert train["frames"] == sum(lengths)
    assert train["text_padding"] == pytest.approx(float(((text == 3) | (text == 0)).float().mean()))
    assert train["late"] == pytest.approx(late / words)
    batches = [lengths[i : i + 4] for i in range(0, len(lengths), 4)]
    filled = sum(max(batch) * len(batch) for batch in batches)
    assert train["batch_padding"] == pytest.approx(1 - sum(lengths) / filled)

    # What the report makes of it: 4 x 2 windows per step, 10 steps.
    report = describe_check(result)
    epochs = 80 / len(windows)
    assert "4 x 2 = 8 windows" in report
    assert f"{len(windows):,} windows = {len(windows) / 8:,.1f} steps; 10 steps = {epochs:.2f} epochs" in report
    assert f"= {17 * sum(lengths):,} tokens" in report
    assert f"the run: {epochs:.2f} epochs = {17 * sum(lengths) * epochs:,.0f} tokens" in report
    assert "an evaluation: 3 of {windows} windows".format(**held_out) in report


def test_an_incomplete_last_batch_counts_and_skipped_windows_do_not(config):
    """Batches of two: [10 + 5, 4 + 5], [skipped, 6 + 1], [7 + 1]; the second manifest comes last."""
    args = load_args(config, ["data.shuffle=false", "batch_size=2"])
    facts = [facts_of(), facts_of("b.wav"), facts_of("c.wav", source=1)]
    facts[0].windows, facts[0].prompt_frames, facts[0].voiceless = [10, 4, 0], [5, 5, 5], [False, True, False]
    facts[1].windows, facts[1].prompt_frames, facts[1].voiceless = [6, 7], [1, 1], [False, False]
    facts[2].windows, facts[2].prompt_frames, facts[2].voiceless = [], [], []
    totals = add_up(facts[:2], 1, None, args)
    assert (totals["windows"], totals["skipped"], totals["epoch"]) == (5, 1, 5)
    assert (totals["dialogue_frames"], totals["prompt_frames"], totals["frames"]) == (27, 12, 39)
    assert totals["batch_padding"] == pytest.approx(1 - 39 / (15 + 15 + 7 + 8)) and totals["voiceless"] == 0.2
    assert add_up(facts, 2, [0.5, 0.5], args)["epoch"] == 0  # a mixture without windows of one manifest cannot be read


def test_shares_are_of_the_decoded_time_and_of_readable_windows(config):
    facts = [facts_of("a.wav"), facts_of("b.wav")]
    for own, seconds, talk in ((facts[0], 30.0, (3.0, 6.0, 1.5)), (facts[1], 10.0, (1.0, 0.0, 0.0))):
        own.decoded_sec, own.talk_sec = seconds, talk
        own.words, own.tokens, own.prompt, own.voice = 4, 9, "Hi.", own.line.path.name
    facts[0].windows, facts[0].text = [100], TextStats(words=4, placed=6, dropped=2, late=1)
    totals = add_up(facts, 1, None, load_args(config))
    expected = {
        "agent": 4 / 40, "user": 6 / 40, "overlap": 1.5 / 40, "hours": 8 / 3600, "decoded_hours": 40 / 3600, "words": 4,
        "tokens": 9, "prompts": 1, "voices": 1, "dropped": 2 / 8, "late": 1 / 4, "text_padding": 0.94,
    }  # fmt: skip
    assert {key: totals[key] for key in expected} == pytest.approx(expected)


def test_the_agreement_of_all_files_is_weighted_by_speech_and_by_words(config):
    facts = [facts_of("a.wav"), facts_of("b.wav"), facts_of("c.wav")]
    base = Agreement(30, 10.0, 0.9, 1.0, 0.0, 0.0, 0.9, 0.0, 0.9, (0.0, 0.0), 0.9, 0.9, 0.1)
    facts[0].agreement = base
    facts[1].agreement = base._replace(words=10, speech_sec=30.0, covered=0.5, on_agent=0.2, on_user=0.5, on_nobody=0.3)
    totals = add_up(facts, 1, None, load_args(config))
    expected = {"covered": 0.6, "on_agent": 0.8, "on_user": 0.125, "on_nobody": 0.075}
    assert {key: totals[key] for key in expected} == pytest.approx(expected)


def test_talk_and_gaps_are_those_from_which_the_dialogues_were_made(config):
    result = check_run(load_args(config), workers=0)
    spoken = {"SPEAKER_MAIN": 0.0, "SPEAKER_USER": 0.0}
    answers = []
    for own in (own for own in result.facts if not own.held_out):
        content = json.loads(own.line.path.with_suffix(".json").read_text())
        for speaker in spoken:
            times = [span for _, span, who in content["alignments"] if who == speaker]
            spoken[speaker] += sum(end - start for start, end in times)
            # The pause of one frame between words is part of speech.
            spoken[speaker] += sum(b[0] - a[1] for a, b in itertools.pairwise(times) if b[0] - a[1] < 0.1)
        starts = [span[0] for _, span, who in content["alignments"] if who == "SPEAKER_MAIN"]
        asked = [turn["asked_sec"] for turn in content["turns"]]
        expected = [min(start for start in starts if start >= end) - end for end in asked]
        assert own.gaps == pytest.approx(expected, abs=0.06), own.line.path
        answers += expected
    assert len(answers) > 20
    seconds = result.train["hours"] * 3600
    assert result.train["agent"] == pytest.approx(spoken["SPEAKER_MAIN"] / seconds, rel=0.03)
    assert result.train["user"] == pytest.approx(spoken["SPEAKER_USER"] / seconds, rel=0.05)
    assert result.train["overlap"] < 0.001


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_of_a_mixture_is_that_of_training(corpus, shuffle):
    mixture = f"{corpus.folder / 'train.jsonl'}:0.25,{corpus.folder / 'eval.jsonl'}:0.75"
    settings = {"data.train_data": mixture, "data.eval_data": "", "do_eval": False, "data.shuffle": shuffle, "seed": 3}
    args = load_args(corpus.config(**settings))
    train = check_run(args, workers=0).train
    window_frames = to_frames(args.duration_sec)
    windows = open_windows(mixture, window_frames)
    order = WindowOrder([len(index) for index in windows.indexes], windows.weights, 3, shuffle)
    expected = 0
    for source, window in map(order, range(order.epoch_size)):
        index = windows.indexes[source]
        file, part = index.window(window)
        expected += min(window_frames, round(index.line(file).duration * 12.5) - part * window_frames)
    assert (train["epoch"], train["dialogue_frames"]) == (order.epoch_size, expected)


def test_each_file_of_a_large_corpus_is_decoded_in_part(corpus, monkeypatch):
    """200 hours in all, but at least 30 s of each file; here as many seconds in all."""
    assert (corpus_module.MAX_DECODED_HOURS, corpus_module.MIN_DECODED_SEC) == (200, 30)
    monkeypatch.setattr(corpus_module, "MAX_DECODED_HOURS", 200 / 3600)
    shares = []
    monkeypatch.setattr(Checker, "__init__", lambda self, *args: shares.append(args[-1]))
    monkeypatch.setattr(Checker, "__call__", lambda self, task: facts_of())
    corpus.check()
    corpus.lines["eval"] = corpus.lines["eval"] * 10
    corpus.check()
    assert shares == [pytest.approx(200 / 6), 30]


@pytest.mark.parametrize("codes", [False, True])
def test_the_memory_is_that_of_the_plan_for_one_process(corpus, monkeypatch, codes):
    """With Mimi, unless there are codes."""
    if codes:
        corpus.encode()
    result = corpus.check(prompts=codes, batch_size=3, gradient_checkpointing=codes)
    calls = []

    def open_sizes(*args, **ranks):
        calls.append((*args, ranks))
        return SimpleNamespace(total=lambda *args: calls.append(args) or 5), "moshi", []

    monkeypatch.setattr(corpus_module, "open_sizes", open_sizes)
    assert planned_memory(result) == 5
    assert calls == [(result.args, not codes, codes, {"ranks": 1, "ranks_per_node": 1}), (3, codes)]
