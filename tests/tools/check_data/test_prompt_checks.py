"""The prompts of a check are those of training."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from finetune.audio.codes import save_tensors
from finetune.config import load_args
from finetune.data.interleaver import InterleavedTokenizer, Interleaver, PrecomputedTokenizer
from finetune.data.prompter import Prompter
from finetune.data.windows import open_windows
from finetune.model.pretrained import Pretrained
from finetune.prompts.hybrid import build_prompt
from finetune.prompts.same_speaker import same_speaker_file
from finetune.prompts.segment_files import save_same_speaker
from finetune.prompts.voices import VoiceBook, load_voices
from finetune.tools.check_data import prompt_checks
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
        voice, pcm, ids, voiceless = tokenizer.read(index.line(file), part).prompt
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
    settings = {"duration_sec": 2, "prompt.max_sec": max_sec}
    result = corpus.check(**settings)
    prompts = prompts_of_training(corpus, **settings)
    files = [facts for facts in result.facts if not facts.held_out]
    assert [length for facts in files for length in facts.prompt_frames] == [length for length, _ in prompts]
    assert result.train["prompt_frames"] == sum(length for length, _ in prompts)
    assert (max(length for length, _ in prompts) == 35) == (max_sec == 2.8)
    missing = iter(missing for _, missing in prompts)
    for facts in files:
        count = sum(next(missing) for _ in facts.windows)
        found = [problem.detail for problem in facts.problems if problem.kind == "no segment"]
        assert len(found) == (count > 0) and all(f" {count} of its " in detail for detail in found)
    assert any(missing for _, missing in prompts) == (voice == "same_speaker")


def test_stored_segments_are_checked_as_in_training(corpus):
    corpus.encode()
    segment = {"start": 0.0, "end": 1.6, "codes": torch.zeros(8, 20, dtype=torch.int16)}
    for line in corpus.lines["train"]:
        line["voice_prompt"] = "same_speaker"
        path = same_speaker_file(corpus.folder / line["codes_path"])
        save_tensors(path, {"mimi": corpus.mimi, "speakers": ["SPEAKER_MAIN"], "stretches": [segment]})
    found = corpus.check(duration_sec=1.6).problems  # the segment is the first window
    assert [problem.kind for problem in found] == ["no segment"] * len(corpus.lines["train"])
    assert all(" 1 of its " in problem.detail for problem in found)
    assert kinds_of(corpus.check(**{"data.speakers": ["AGENT"]})).count("voice") == 4
    path.unlink()
    (problem,) = [problem for problem in corpus.check().problems if problem.kind == "voice"]
    assert path.name in problem.detail and "precompute_codes.py" in problem.detail


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
