"""Words in another folder than the recordings: which names they get, and that everything reads them there."""

import json
import shutil
from pathlib import Path

import pytest

from finetune.audio.words import read_words, sidecar
from finetune.cli import UserError
from finetune.config import load_args
from finetune.data.manifest import parse_line, read_manifest
from finetune.data.words_folder import redirect_words
from finetune.model.pretrained import PERSONAPLEX
from finetune.tools.check_data.corpus import check_run
from finetune.tools.report.record import read_manifests
from tests.support import rows, train_here, write_config

TEA = json.dumps({"alignments": [["tea", [0.1, 0.4], "SPEAKER_MAIN"]]})


def write_manifest(path: Path, *lines: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def words_of(manifest: Path) -> list[str]:
    return [line.words_path.relative_to(manifest.parent).as_posix() for line in read_manifest(manifest, [])]


def test_the_new_manifest_names_recordings_and_words(tmp_path):
    lines = {"path": "calls/1.wav", "duration": 3.0, "text_prompt": "Hi."}, {"path": str(tmp_path / "other/2.flac")}
    source = write_manifest(tmp_path / "data/train.jsonl", *lines)
    with source.open("a") as file:
        file.write("{broken\n")
    problems = []
    target = redirect_words(source, tmp_path / "words", problems)
    assert target == tmp_path / "words/train.jsonl" and len(problems) == 1 and "line 3" in problems[0]
    first, second = read_manifest(target, problems)
    assert first.path == tmp_path / "data/calls/1.wav" and first.words_path == tmp_path / "words/calls/1.json"
    assert first.duration == 3.0 and first.fields["text_prompt"] == "Hi."
    assert second.path == tmp_path / "other/2.flac" and second.words_path.is_relative_to(tmp_path / "words")
    assert sorted(path.name for path in (tmp_path / "data").rglob("*")) == ["train.jsonl"]


def test_an_earlier_manifest_keeps_its_names_and_fields(tmp_path):
    source = write_manifest(tmp_path / "data/train.jsonl", {"path": "1.wav", "duration": 3.0})
    target = redirect_words(source, tmp_path / "words", [])
    [line] = read_manifest(target, [])
    write_manifest(target, line.fields | {"words_path": "mine.json", "speaker": "Ann", "duration": 9.0})
    write_manifest(source, {"path": "1.wav", "duration": 4.0}, {"path": "2.wav"})
    first, second = read_manifest(redirect_words(source, tmp_path / "words", []), [])
    assert first.fields["speaker"] == "Ann" and first.duration == 4.0 and words_of(target) == ["mine.json", "2.json"]
    assert second.path == tmp_path / "data/2.wav"


def test_recordings_of_one_name_do_not_share_words(tmp_path):
    """Of two data sets, and of two recordings of one data set that differ in the ends of their names."""
    sets = [write_manifest(tmp_path / f"{name}/{name}.jsonl", {"path": "calls/1.wav"}) for name in "ab"]
    targets = [redirect_words(source, tmp_path / "words", []) for source in sets]
    assert words_of(targets[0]) == ["calls/1.json"] != words_of(targets[1])
    assert [redirect_words(source, tmp_path / "words", []) for source in sets] == targets
    assert words_of(targets[0]) == ["calls/1.json"] != words_of(targets[1]), "in a second run, too"
    both = write_manifest(tmp_path / "c/c.jsonl", {"path": "1.wav"}, {"path": "1.flac"})
    assert len(set(words_of(redirect_words(both, tmp_path / "words", [])))) == 2


def test_a_manifest_of_something_else_is_not_replaced(tmp_path):
    source = write_manifest(tmp_path / "data/train.jsonl", {"path": "1.wav"})
    for name, line in (("a", {"path": "x.wav", "words_path": "x.json"}), ("b", {"path": str(tmp_path / "data/1.wav")})):
        target = write_manifest(tmp_path / name / "train.jsonl", line)
        before = target.read_bytes()
        with pytest.raises(UserError, match=rf"{name}/train\.jsonl"):
            redirect_words(source, tmp_path / name, [])
        assert target.read_bytes() == before
    with pytest.raises(UserError, match="--output-dir"):
        redirect_words(source, tmp_path / "data", [])
    with pytest.raises(UserError, match="--output-dir /proc/words"):
        redirect_words(source, Path("/proc/words"), [])


def test_words_next_to_recordings_are_taken_over_and_transcripts_of_others_are_not(tmp_path):
    source = write_manifest(tmp_path / "data/train.jsonl", *({"path": f"{name}.wav"} for name in "abc"))
    (tmp_path / "data/a.json").write_text(TEA)
    (tmp_path / "data/b.json").write_text('{"segments": []}')
    target = redirect_words(source, tmp_path / "words", [])
    assert [path.name for path in sorted((tmp_path / "words").glob("?.json"))] == ["a.json"]
    (tmp_path / "words/a.json").write_text(TEA.replace("tea", "milk"))
    redirect_words(source, tmp_path / "words", [])
    assert read_words(next(read_manifest(target, [])).words_path)[0] == [("milk", 0.1, 0.4)], "they stay"


@pytest.mark.parametrize("value", [7, "", "../a.json", None, "a\0b.json"])
def test_a_bad_name_of_words_is_reported_with_its_line(value):
    with pytest.raises(UserError, match=r"m\.jsonl, line 3: "):
        parse_line(Path("m.jsonl"), 3, json.dumps({"path": "a.wav", "words_path": value}).encode())


@pytest.mark.slow
def test_training_and_tools_read_the_words_where_the_manifest_says(world, tmp_path):
    """A run, check_data and report find the same as with words next to the recordings."""
    near, far = tmp_path / "near", tmp_path / "far"
    shutil.copytree(world / "data", near / "data")
    manifest = near / "data/train.jsonl"
    lines = list(read_manifest(manifest, []))[:4]
    write_manifest(manifest, *(line.fields for line in lines))
    found = []
    for folder in (near, far):
        if folder == far:
            manifest = redirect_words(manifest, far / "words", [])
            for line in lines:
                sidecar(line.path).unlink()
        train = str(manifest)
        config = write_config(folder, world, **{"data.train_data": train, "data.eval_data": "", "do_eval": False})
        assert train_here(config, PERSONAPLEX) == 0
        checked = check_run(load_args(config), prompts=True, workers=0)
        shown = [manifest.sidecars for manifest in read_manifests(train, 38)]
        losses = [(row["loss"], row["text_loss"], row["audio_loss"]) for row in rows(folder / "run")]
        found.append((losses, checked.train, [problem.kind for problem in checked.problems], shown))
    assert found[0] == found[1] and found[0][1]["words"] > 0
