"""The base's conversations as training data."""

import json

import pytest
import torch
from moshi.utils.compile import no_compile

from finetune.audio.codes import load_codes
from finetune.audio.files import probe_audio, read_audio
from finetune.cli import UserError
from finetune.data.manifest import read_manifest
from finetune.model.pretrained import PERSONAPLEX
from finetune.tools.make_replay import main
from tests.support import PERSONAPLEX_CODES, rows, train_here, write_config


@pytest.fixture(scope="module")
def config(world, tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("replay"), world, PERSONAPLEX_CODES)


@pytest.fixture
def replay(call, config, tmp_path):
    def make(*more):
        with no_compile():
            assert not call(main, config, tmp_path / "out", "--count", 3, *more)
        return tmp_path / "out"

    return make


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".line", ".jsonl")}


def test_conversations_can_be_trained_on_beside_other_data(replay, world, tmp_path):
    out = replay()
    lines = list(read_manifest(out / "replay.jsonl", []))
    assert len(lines) == 3 and all(line.path.is_file() for line in lines)
    for line in lines:
        assert load_codes(line.path.with_suffix(".pt"))["codes"].shape == (2, 8, round(line.duration * 12.5))
        content = json.loads(line.path.with_suffix(".json").read_text())
        assert content["text_prompt"].startswith("<system>") and content["voice_prompt"]
    mixture = f"{world / PERSONAPLEX_CODES / 'train_precomputed.jsonl'}:0.5,{out / 'replay.jsonl'}:0.5"
    config = write_config(tmp_path, world, PERSONAPLEX_CODES, **{"data.train_data": mixture, "do_eval": False})
    with no_compile():
        assert train_here(config, PERSONAPLEX) == 0
    assert rows(tmp_path / "run")[-1]["skipped"] == 0


def test_a_continued_run_says_the_same(replay, tmp_path):
    before = contents(replay())
    codes = load_codes(tmp_path / "out/00001.pt")["codes"].clone()
    for name in ("00001.line", "00001.pt", "00001.json", "replay.jsonl"):
        (tmp_path / "out" / name).unlink()
    assert contents(replay()) == before
    assert torch.equal(load_codes(tmp_path / "out/00001.pt")["codes"], codes)


def test_a_folder_with_other_files_is_left_alone(call, config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(UserError, match=str(tmp_path / "out")):
        call(main, config, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="--count 0"):
        call(main, config, tmp_path / "new", "--count", 0)
    assert not (tmp_path / "new").exists()


def test_the_voice_of_a_window_is_written_as_a_recording(call, world, tmp_path):
    """A `same_speaker` voice has no file, so the replay gets one: mono, at 24 kHz, as loud as it was read."""
    lines = [json.loads(line) for line in (world / "data/train.jsonl").read_text().splitlines()]
    own = {"voice_prompt": "same_speaker", "text_prompt": "You are Ada."}
    own_lines = [line | own | {"path": str(world / "data" / line["path"])} for line in lines]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in own_lines))
    settings = {"data.eval_data": str(tmp_path / "own.jsonl"), "duration_sec": 3, "prompt.allow_voiceless": True}
    with no_compile():
        assert not call(
            main, write_config(tmp_path, world, PERSONAPLEX_CODES, **settings), tmp_path / "out", "--count", 6
        )
    voices = sorted((tmp_path / "out").glob("voice_*.wav"))
    named = [json.loads(path.read_text())["voice_prompt"] for path in sorted((tmp_path / "out").glob("0*.json"))]
    assert voices and sorted(filter(None, named)) == [path.name for path in voices]
    for path in voices:
        info, pcm = probe_audio(path), read_audio(path)
        assert (info.channels, info.sample_rate) == (1, 24_000) and info.duration_sec >= 1
        assert 0.01 < abs(pcm).max() <= 1
