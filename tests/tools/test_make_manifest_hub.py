"""A data set on the hub as a folder of recordings, from a cache as huggingface_hub lays it out."""

import json

import pytest

from finetune.cli import UserError
from finetune.data.manifest import read_manifest
from finetune.tools.make_manifest import command
from tests.support import dailytalk_cache, script

ADDRESS = "hf://datasets/kyutai/DailyTalkContiguous"


@pytest.fixture(scope="module")
def dailytalk(world, tmp_path_factory):
    """(HF_HOME, the data set in it)."""
    home = tmp_path_factory.mktemp("home")
    return home, dailytalk_cache(home, world)


def make_manifest(hub, *arguments):
    return script("-m", "finetune.tools.make_manifest", *arguments, HF_HOME=str(hub), check=False)


def test_the_words_are_found_next_to_the_recordings(dailytalk, tmp_path):
    """And the codes: the snapshot is made of links to files whose names are hashes."""
    hub, snapshot = dailytalk
    done = make_manifest(hub, ADDRESS, tmp_path / "data/all.jsonl", "--split", 0.3)
    assert done.returncode == 0, done.stderr
    lines = [line for name in ("all", "all_eval") for line in read_manifest(tmp_path / f"data/{name}.jsonl", [])]
    assert {line.path for line in lines} == set((snapshot / "data_stereo").glob("*.wav"))
    assert all(line.path.is_symlink() and line.path.with_suffix(".json").exists() for line in lines)
    listed = [json.loads(line) for line in (snapshot / "dailytalk.jsonl").read_text().splitlines()]
    assert {line.path.name: line.duration for line in lines} == {
        line["path"].split("/")[1]: pytest.approx(line["duration"], abs=1e-3) for line in listed
    }
    again = make_manifest(hub, f"{ADDRESS}/data_stereo", tmp_path / "data/all.jsonl", "--split", 0.3)
    assert again.returncode == 0 and "Traceback" not in again.stderr


@pytest.mark.parametrize("address", ["kyutai/Other", "kyutai/DailyTalkContiguous/no", "kyutai", "a b/c", ""])
def test_what_is_not_there_is_one_sentence(dailytalk, tmp_path, address):
    done = make_manifest(dailytalk[0], f"hf://datasets/{address}", tmp_path / "all.jsonl")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and address in done.stderr
    assert not (tmp_path / "all.jsonl").exists()


def test_a_mistake_in_the_command_is_found_before_anything_is_fetched(tmp_path):
    with pytest.raises(UserError, match=r"\.jsonl"):
        command.main([ADDRESS, str(tmp_path / "all.json")])
