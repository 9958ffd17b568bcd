"""Finding the files of a model in folders and in the hub's cache, and the arguments of LMModel in its config."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, errors
from moshi.models import loaders
from requests import Response

from finetune.cli import UserError
from finetune.model import pretrained
from finetune.model.build import build_lm
from finetune.model.consolidated import inference_config
from finetune.model.pretrained import MOSHI, PERSONAPLEX, Pretrained, Unreachable, lm_kwargs
from tests.engine import TINY
from tests.support import hub_cache


def refusal(kind: type[Exception]) -> Exception:
    try:
        return kind("refused")
    except TypeError:
        return kind("refused", response=Response())


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub: the addresses that were asked for, and the contents of its files (or an error) by `owner/name/file`."""
    asked, files = [], {}

    def download(repo: str, name: str) -> str:
        asked.append(f"{repo}/{name}")
        found = files.get(f"{repo}/{name}", errors.EntryNotFoundError)
        if not isinstance(found, str):
            raise refusal(found)
        path = tmp_path / "hub" / repo / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found)
        return str(path)

    monkeypatch.setattr(pretrained, "hf_hub_download", download)
    return asked, files


def folder(path: Path, *names: str, **config) -> Path:
    """A model folder with files of these names, and a config.json if there is anything in it."""
    path.mkdir(exist_ok=True)
    for name in names:
        (path / name).write_text(name)
    if config:
        (path / "config.json").write_text(json.dumps(config))
    return path


# --- specs and configs ------------------------------------------------------------------------------------------


def test_the_two_families():
    assert (MOSHI.default_repo, MOSHI.dep_q, MOSHI.prompts) == ("kyutai/moshiko-pytorch-bf16", None, False)
    assert (PERSONAPLEX.default_repo, PERSONAPLEX.dep_q, PERSONAPLEX.prompts) == ("nvidia/personaplex-7b-v1", 16, True)


def test_personaplexs_config_on_the_hub_means_the_built_in_one_with_16_steps(tmp_path):
    checkpoint = Pretrained(str(folder(tmp_path, model_type="personaplex", version="7b-v1")))
    assert checkpoint.lm_config == dict(loaders._lm_kwargs) | {"dep_q": 16}
    build_lm(lm_kwargs(checkpoint, PERSONAPLEX), torch.bfloat16)


def test_a_repository_without_a_config_is_the_first_moshiko(hub):
    checkpoint = Pretrained("kyutai/moshiko-pytorch-bf16")
    assert checkpoint.raw_config == {} and checkpoint.lm_config == loaders._lm_kwargs
    assert lm_kwargs(checkpoint, MOSHI)["dep_q"] == 8 and lm_kwargs(checkpoint, PERSONAPLEX)["dep_q"] == 16
    assert lm_kwargs(checkpoint, MOSHI) is not checkpoint.lm_config


def test_keys_that_are_not_arguments_of_the_lm_are_dropped(tmp_path):
    others = {
        "moshi_name": "a", "mimi_name": "b", "mimi_config_name": "c", "tokenizer_name": "d", "lora_name": "e",
        "model_type": "moshi", "version": "1", "lm_gen_config": {}, "tts_config": {}, "stt_config": {}, "model_id": {},
        "lora": True, "lora_rank": 4, "lora_scaling": 2.0, "depformer_causal": True,
        "demux_second_stream": False, "conditioners": {}, "fuser": {},
    }  # fmt: skip
    kwargs = lm_kwargs(Pretrained(str(folder(tmp_path, **TINY, **others))), MOSHI)
    assert kwargs == TINY
    build_lm(kwargs, torch.float32)


@pytest.mark.parametrize(
    "change, word",
    [({"n_q": 32}, "n_q 32"), ({"n_q": 8}, "n_q 8"), ({"dep_q": 4}, "dep_q 4"), ({"dep_q": 32}, "dep_q 32"),
     ({"conditioners": {"speaker": 1}}, "conditioners"), ({"fuser": {"sum": 1}}, "fuser")],
)  # fmt: skip
def test_models_that_cannot_be_trained_are_refused(tmp_path, change, word):
    with pytest.raises(UserError, match=word):
        lm_kwargs(Pretrained(str(folder(tmp_path, **TINY | change))), MOSHI)


@pytest.mark.parametrize("content", ["{", "[]", '"text"'])
def test_an_unreadable_config_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        Pretrained(str(tmp_path)).lm_config  # noqa: B018
    with pytest.raises(UserError, match=r"mine\.json"):
        Pretrained("kyutai/any", config_path=str(tmp_path / "mine.json")).raw_config  # noqa: B018


# --- files ------------------------------------------------------------------------------------------------------


def test_files_of_a_folder_by_default_and_by_config(tmp_path):
    one = Pretrained(str(folder(tmp_path / "one", loaders.MOSHI_NAME, loaders.MIMI_NAME, loaders.TEXT_TOKENIZER_NAME)))
    assert [one.moshi_weights().name, one.mimi_weights().name, one.tokenizer_path().name] == [
        "model.safetensors", "tokenizer-e351c8d8-checkpoint125.safetensors", "tokenizer_spm_32k_3.model",
    ]  # fmt: skip
    absolute = folder(tmp_path / "elsewhere", "t.model") / "t.model"
    two = Pretrained(str(folder(
        tmp_path / "two", "w", "m", "c", moshi_name="w", mimi_name="m", tokenizer_name=f"file://{absolute}",
        mimi_config_name="c",
    )))  # fmt: skip
    assert two.moshi_weights() == tmp_path / "two/w"
    assert two.companions() == {
        "mimi_name": tmp_path / "two/m", "tokenizer_name": absolute, "mimi_config_name": tmp_path / "two/c",
    }  # fmt: skip


def test_given_files_replace_those_of_the_source(tmp_path, hub):
    asked, files = hub
    files["other/repo/deep/mimi.safetensors"] = "mimi"
    mine = folder(tmp_path / "mine", "w.safetensors", "t.model", "config.json")
    (mine / "config.json").write_text(json.dumps({"moshi_name": "unused", "dim": 64}))
    checkpoint = Pretrained(
        "kyutai/any", moshi_path=str(mine / "w.safetensors"), mimi_path="hf://other/repo/deep/mimi.safetensors",
        tokenizer_path=f"file://{mine / 't.model'}", config_path=str(mine / "config.json"),
    )  # fmt: skip
    assert checkpoint.moshi_weights() == mine / "w.safetensors" and checkpoint.tokenizer_path() == mine / "t.model"
    assert checkpoint.mimi_weights().read_text() == "mimi" and checkpoint.lm_config == {"dim": 64}
    assert asked == ["other/repo/deep/mimi.safetensors"], "nothing is fetched before it is needed"
    gone = Pretrained("kyutai/any", mimi_path=str(tmp_path / "gone.safetensors"))
    with pytest.raises(UserError, match=r"gone\.safetensors.*mimi"):
        gone.mimi_weights()
    for address in ("hf://owner/repo", "hf://owner"):
        with pytest.raises(UserError, match=address):
            Pretrained("kyutai/any", mimi_path=address).mimi_weights()


def test_a_folder_lists_what_it_has_and_lacks(tmp_path):
    with pytest.raises(UserError, match=r"holds no model.safetensors \(it holds nothing\)"):
        Pretrained(str(tmp_path)).moshi_weights()
    with pytest.raises(UserError, match=r"holds no model.safetensors \(it holds a.txt, b.txt\)"):
        Pretrained(str(folder(tmp_path, "b.txt", "a.txt"))).moshi_weights()


@pytest.mark.parametrize(
    "error, kind, word",
    [
        (errors.EntryNotFoundError, UserError, "no file model.safetensors"),
        (errors.LocalEntryNotFoundError, Unreachable, "cannot be reached"),
        (errors.GatedRepoError, Unreachable, "gated"),
        (errors.RepositoryNotFoundError, UserError, "neither a local folder nor a repository"),
        (errors.HFValidationError, UserError, "neither a local folder nor a repository"),
        (OSError, Unreachable, "could not be fetched"),
    ],
)
def test_what_the_hub_refuses_is_a_sentence(hub, error, kind, word):
    _, files = hub
    files["owner/name/model.safetensors"] = files["owner/name/config.json"] = error
    files["owner/name/voices.tgz"] = error
    checkpoint = Pretrained("owner/name")
    checkpoint.raw_config = {}
    with pytest.raises(UserError, match=f"^owner/name: .*{word}") as caught:
        checkpoint.moshi_weights()
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    assert checkpoint.voices_archive() is None


def test_an_absent_config_is_empty_but_an_unreachable_one_is_an_error(hub):
    _, files = hub
    assert Pretrained("owner/name").raw_config == {}
    files["owner/name/config.json"] = errors.LocalEntryNotFoundError
    with pytest.raises(Unreachable):
        Pretrained("owner/name").raw_config  # noqa: B018


def test_voices_archive_of_a_folder_and_of_the_hub(tmp_path, hub):
    _, files = hub
    assert Pretrained(str(tmp_path)).voices_archive() is None
    assert Pretrained(str(folder(tmp_path, "voices.tgz"))).voices_archive() == tmp_path / "voices.tgz"
    files["nvidia/voices/voices.tgz"] = "voices"
    assert Pretrained("nvidia/voices").voices_archive().read_text() == "voices"


# --- addresses for inference ------------------------------------------------------------------------------------


def test_files_of_a_local_folder_are_named_by_their_own_path(tmp_path):
    """moshi recognises weights by their suffix, so links, as in the hub's cache, must not be resolved."""
    blobs = folder(tmp_path / "blobs", "0123", "4567")
    snapshot = folder(
        tmp_path / "snapshot", **TINY, model_type="hibiki", mimi_name="m.safetensors", tokenizer_name="t.model"
    )
    (snapshot / "m.safetensors").symlink_to(blobs / "0123")
    (snapshot / "t.model").symlink_to(blobs / "4567")
    config = inference_config(Pretrained(str(snapshot)), {"dep_q": 16, "dim": 3})
    assert config == {
        "dep_q": 16, "dim": 3, "model_type": "hibiki", "mimi_name": f"file://{snapshot}/m.safetensors",
        "tokenizer_name": f"file://{snapshot}/t.model",
    }  # fmt: skip


def test_files_of_a_repository_are_named_by_their_address(tmp_path, hub, monkeypatch):
    _, files = hub
    config = {"mimi_name": "sub/mimi.safetensors", "mimi_config_name": "hf://other/repo/mimi.json", "dim": 1}
    files |= {
        "owner/name/config.json": json.dumps(config), "owner/name/sub/mimi.safetensors": "",
        "owner/name/tokenizer_spm_32k_3.model": "", "other/repo/mimi.json": "{}", "third/repo/t.model": "",
    }  # fmt: skip
    names = {
        "model_type": "moshi", "mimi_name": "hf://owner/name/sub/mimi.safetensors",
        "tokenizer_name": "hf://owner/name/tokenizer_spm_32k_3.model", "mimi_config_name": "hf://other/repo/mimi.json",
    }  # fmt: skip
    assert inference_config(Pretrained("owner/name"), {}) == names
    mine = folder(tmp_path / "mine", "m.safetensors") / "m.safetensors"
    given = Pretrained("owner/name", mimi_path=str(mine), tokenizer_path="hf://third/repo/t.model")
    replaced = {"mimi_name": f"file://{mine}", "tokenizer_name": "hf://third/repo/t.model"}
    assert inference_config(given, {}) == names | replaced
    monkeypatch.chdir(tmp_path / "mine")
    assert inference_config(Pretrained("owner/name", mimi_path="m.safetensors"), {}) == names | {
        "mimi_name": f"file://{mine}",
    }  # fmt: skip


def test_files_that_a_given_config_names_on_this_machine_keep_their_path(tmp_path, hub):
    """Such as the config.json of a checkpoint, given in place of the repository's."""
    _, files = hub
    files["owner/name/mimi.safetensors"] = ""
    tokenizer = folder(tmp_path / "mine", "t.model") / "t.model"
    config = tmp_path / "c.json"
    for name in (str(tokenizer), f"file://{tokenizer}"):
        config.write_text(json.dumps({"tokenizer_name": name, "mimi_name": "mimi.safetensors"}))
        found = inference_config(Pretrained("owner/name", config_path=str(config)), {})
        assert found["tokenizer_name"] == f"file://{tokenizer}"
        assert found["mimi_name"] == "hf://owner/name/mimi.safetensors"


# --- Mimi and the tokenizer -------------------------------------------------------------------------------------


def test_mimi_has_eight_codebooks_for_personaplex(world, tmp_path):
    shutil.copytree(world / "model", tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text()) | {"dep_q": 16}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    assert Pretrained(str(tmp_path / "m")).mimi().num_codebooks == 8


def test_mimi_alone_needs_no_hub(tmp_path, hub):
    """With its file given, an unreachable repository means the standard Mimi."""
    _, files = hub
    files["kyutai/any/config.json"] = errors.LocalEntryNotFoundError
    weights = folder(tmp_path, "mimi.safetensors") / "mimi.safetensors"
    checkpoint = Pretrained("kyutai/any", mimi_path=str(weights))
    assert checkpoint.mimi_weights() == weights and checkpoint.mimi_config() is None
    with pytest.raises(Unreachable):
        Pretrained("kyutai/any").mimi_config()


def test_a_mimi_with_a_broken_config_is_not_taken_for_the_standard_one(tmp_path, hub):
    _, files = hub
    files["kyutai/any/config.json"] = errors.LocalEntryNotFoundError
    mimi = {"mimi_path": str(folder(tmp_path, "mimi.safetensors") / "mimi.safetensors")}
    config = tmp_path / "config.json"
    config.write_text('{"mimi_config_name": ')
    files[f"{tmp_path}/mistyped/config.json"] = errors.HFValidationError
    for checkpoint, words in (
        (Pretrained(str(tmp_path), **mimi), r"config\.json"),
        (Pretrained("kyutai/any", config_path=str(config), **mimi), r"config\.json"),
        (Pretrained(f"{tmp_path}/mistyped", **mimi), "mistyped"),
    ):
        for use in (checkpoint.mimi_config, checkpoint.mimi):
            with pytest.raises(UserError, match=words):
                use()


def test_a_tokenizer_must_fit_the_text_table(world, tmp_path):
    shutil.copytree(world / "model", tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    pieces = Pretrained(str(tmp_path / "m")).tokenizer().vocab_size()
    for rows, fits in ((pieces, True), (pieces - 1, False)):
        (tmp_path / "m/config.json").write_text(json.dumps(config | {"text_card": rows}))
        checkpoint = Pretrained(str(tmp_path / "m"))
        if fits:
            assert checkpoint.tokenizer().vocab_size() == pieces
        else:
            with pytest.raises(UserError, match=rf"\.model.*{pieces} pieces.*{rows}"):
                checkpoint.tokenizer()
    checkpoint.tokenizer_path().write_text("hello")
    with pytest.raises(UserError, match=r"\.model"):
        checkpoint.tokenizer()


def test_a_warm_hub_cache_needs_no_network(world, tmp_path, monkeypatch):
    hub_cache(tmp_path, "kyutai/tiny", list((world / "model").iterdir()))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    checkpoint = Pretrained("kyutai/tiny")
    assert checkpoint.moshi_weights().name == "model.safetensors" and checkpoint.mimi().num_codebooks == 8
    assert checkpoint.tokenizer().vocab_size() == 400 and checkpoint.voices_archive() is None
    assert checkpoint.hub_address("mimi_name", checkpoint.mimi_weights()) == "hf://kyutai/tiny/mimi.safetensors"
    with pytest.raises(Unreachable, match=r"^kyutai/other: config\.json"):
        Pretrained("kyutai/other").raw_config  # noqa: B018
