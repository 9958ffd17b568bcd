"""The prompts of a check are those of training."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from finetune.audio.codes import save_tensors
from finetune.cli import UserError
from finetune.config import load_args
from finetune.data.interleaver import InterleavedTokenizer, Interleaver, PrecomputedTokenizer
from finetune.data.prompter import Prompter
from finetune.data.run_data import RunData
from finetune.data.windows import open_windows
from finetune.distributed import session
from finetune.model.pretrained import PERSONAPLEX, Pretrained, lm_kwargs
from finetune.prompts.hybrid import build_prompt
from finetune.prompts.same_speaker import same_speaker_file
from finetune.prompts.segment_files import save_same_speaker
from finetune.prompts.voices import VoiceBook, load_voices
from finetune.tools.check_data import prompt_checks
from finetune.tools.check_data.summary import describe_check
from tests.tools.check_data.conftest import kinds_of


def prompts_of_training(corpus, **settings):
    """(frames of the prompt, whether a voice is missing) of each window of the training data."""
    args = load_args(corpus.config(**settings))
    checkpoint = Pretrained(str(corpus.world / "model"))
    mimi, spm = checkpoint.mimi("cpu"), checkpoint.tokenizer()
    windows = open_windows(args.data.train_data, 25)
    prompter = Prompter(args.prompt, spm, VoiceBook(Path(args.prompt.voices_dir), lambda: None))
    wanted = prompter.check([prompter.scan(windows.prompts())])
    prompter.voices = load_voices(wanted, lambda: mimi, lambda: corpus.mimi, None, [0] * 17, False)
    kind = PrecomputedTokenizer if windows.precomputed else InterleavedTokenizer
    tokenizer = kind(Interleaver(spm), 25, ["SPEAKER_MAIN"], prompter)
    (index,) = windows.indexes
    out = []
    for file, part in map(index.window, range(len(index))):
        voice, pcm, ids, voiceless, *_ = tokenizer.read(index.line(file), part).prompt
        voice_frames = 0 if pcm is None else math.ceil(len(pcm) / 1920)
        out.append((build_prompt(voice, ids).frames.shape[1] + voice_frames, voiceless))
    return out


@pytest.mark.parametrize("max_sec", [2.8, 30.0])
@pytest.mark.parametrize(("voice", "codes"), [("cedar", True), ("same_speaker", True), ("same_speaker", False)])
def test_prompts_are_as_long_as_those_of_training(corpus, voice, codes, max_sec):
    """With 2.8 s, 35 frames, voices are shortened; without a segment outside of the window they are missing."""
    if codes:
        corpus.encode()
        wavs = [corpus.folder / line["path"] for line in corpus.all_lines()]
        mimi = Pretrained(str(corpus.world / "model")).mimi("cpu")
        save_same_speaker([(wav, wav.with_suffix(".pt")) for wav in wavs], mimi, corpus.mimi)
    for line in corpus.all_lines():
        line |= {"voice_prompt": voice, "text_prompt": "Hi."}
    settings = {"duration_sec": 2, "prompt.max_sec": max_sec, "prompt.allow_voiceless": True}
    result = corpus.check(**settings)
    prompts = prompts_of_training(corpus, **settings)
    files = [facts for facts in result.facts if not facts.held_out]
    assert [length for facts in files for length in facts.prompt_frames] == [length for length, _ in prompts]
    assert result.train["prompt_frames"] == sum(length for length, _ in prompts)
    assert (max(length for length, _ in prompts) == 35) == (max_sec == 2.8)
    missing = iter(missing for _, missing in prompts)
    for facts in files:
        count = sum(next(missing) for _ in facts.windows)
        found = [each.detail for each in result.problems if (each.kind, each.place) == ("no segment", facts.place)]
        assert len(found) == (count > 0) and all(f" {count} of its " in detail for detail in found)
    assert any(missing for _, missing in prompts) == (voice == "same_speaker")


def test_stored_segments_are_checked_as_in_training(corpus):
    corpus.encode()
    segment = {"start": 0.0, "end": 1.6, "codes": torch.zeros(8, 20, dtype=torch.int16)}
    for line in corpus.lines["train"]:
        line["voice_prompt"] = "same_speaker"
        path = same_speaker_file(corpus.folder / line["codes_path"])
        save_tensors(path, {"mimi": corpus.mimi, "speakers": ["SPEAKER_MAIN"], "stretches": [segment]})
    settings = {"duration_sec": 1.6, "prompt.allow_voiceless": True}
    found = corpus.check(**settings).problems  # the segment is the first window
    assert [problem.kind for problem in found] == ["no segment"] * len(corpus.lines["train"])
    assert all(" 1 of its " in problem.detail for problem in found)
    assert kinds_of(corpus.check(**{"data.speakers": ["AGENT"]})).count("voice") == 4
    path.unlink()
    (problem,) = [problem for problem in corpus.check().problems if problem.kind == "voice"]
    assert path.name in problem.detail and "precompute_codes.py" in problem.detail


def test_windows_without_a_voice_are_the_error_that_training_gives(corpus):
    """Windows are as long as the files: a voice is in another call of the same speaker, in the window, or nowhere."""
    for line in corpus.lines["train"]:
        line["voice_prompt"] = "same_speaker"
    none = corpus.check(duration_sec=30)
    (problem,) = [problem for problem in none.problems if problem.kind == "no voice"]
    assert "4 of 4 windows" in problem.detail and problem.place == str(corpus.folder / "train.jsonl") and none.failed
    assert none.train["voiceless"] == 1 and "100.0%" in describe_check(none) and kinds_of(none).count("no segment") == 4
    args = load_args(corpus.config(duration_sec=30, do_eval=False))
    checkpoint = Pretrained(str(corpus.world / "model"))
    with pytest.raises(UserError) as error, session("cpu") as world:
        RunData(args, True, checkpoint, lm_kwargs(checkpoint, PERSONAPLEX), None, world)
    assert str(error.value) == f"data.train_data: {problem.detail}"

    for line, name in zip(corpus.lines["train"], "aabb"):
        line["speaker"] = name
    lent = corpus.check(duration_sec=30)
    assert "no segment" not in kinds_of(lent) and not lent.failed and lent.train["voiceless"] == 0
    assert lent.train["prompt_frames"] > none.train["prompt_frames"] + 4 * 12
    corpus.line["speaker"] = "c"
    assert corpus.check(duration_sec=30, **{"prompt.allow_voiceless": True}).train["voiceless"] == 0.5
    for line in corpus.lines["train"]:
        del line["speaker"]
    within = corpus.check(duration_sec=30, **{"prompt.reserve_sec": 5})
    assert within.train["voiceless"] == 0 and within.train["dialogue_frames"] < none.train["dialogue_frames"] - 4 * 12


def test_a_voice_is_loaded_once_and_an_archive_that_fails_is_asked_once(corpus, monkeypatch):
    loads, load = [], prompt_checks.load_recording
    monkeypatch.setattr(prompt_checks, "load_recording", lambda path: loads.append(path) or load(path))
    monkeypatch.setattr("finetune.model.pretrained.Pretrained.voices_archive", lambda self: loads.append("archive"))
    for i, line in enumerate(corpus.all_lines()):
        line["voice_prompt"] = ("cedar", "nobody")[i % 2]
    result = corpus.check()
    assert kinds_of(result) == ["voice"] * 3
    assert sorted(map(str, loads)) == sorted([str(corpus.world / "data/voices/cedar.wav"), "archive"])


@pytest.mark.parametrize(
    ("width", "frames", "ft_embed", "kinds"),
    [(0, 20, False, []), (1, 20, False, ["voice"]), (0, 400, False, ["voice"]), (0, 20, True, ["voice"])],
)
def test_a_pt_voice_is_checked_without_weights(corpus, tmp_path, width, frames, ft_embed, kinds):
    """Its width, `width` more than the model's, and its length are compared, but not its values."""
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(corpus.world / "model" / name, tmp_path / "model" / name)
    dim = json.loads((tmp_path / "model/config.json").read_text())["dim"]
    entry = {"embeddings": torch.randn(frames - 1, 1, 1, dim + width), "cache": torch.zeros(1, 17, 4)}
    torch.save(entry, tmp_path / "voice.pt")
    corpus.line.update(voice_prompt=str(tmp_path / "voice.pt"), text_prompt="Hi.")
    settings = {"moshi_paths.hf_repo_id": str(tmp_path / "model"), "lora.ft_embed": ft_embed, "duration_sec": 2}
    result = corpus.check(**settings)
    assert kinds_of(result) == ["unwrapped", *kinds]
    if not kinds:
        corpus.line.pop("voice_prompt")
        corpus.change(voice_prompt=None)
        lengths, bare = (found.facts[1].prompt_frames for found in (result, corpus.check(**settings)))
        assert set(lengths) == {bare[0] + 20} and len(lengths) > 1
