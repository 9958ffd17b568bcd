"""Exports against stock moshi: what it computes with an exported folder is what the trained model computes."""

import copy
import json
import shutil
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from moshi.models import LMModel
from moshi.models.loaders import CheckpointInfo
from moshi.modules.lora import replace_all_linear_with_lora
from safetensors.torch import load_file, save_file

from finetune.args import DataArgs, LoraArgs, PathsArgs, TrainArgs
from finetune.cli import UserError
from finetune.config import dump_args
from finetune.lora import add_adapters, is_adapter
from finetune.model.build import StoredWeights, build_lm, load_weights, set_trainable
from finetune.model.consolidated import Artefact
from finetune.model.expansion import expand_moshiko_to_personaplex
from finetune.model.pretrained import MOSHI, PERSONAPLEX, inference_config, lm_kwargs, load_tokenizer, open_pretrained
from finetune.model.weights import fuse, write_safetensors
from finetune.tools.export.command import main
from finetune.tools.toy.world import make_model
from tests.engine import TINY, tiny_lm
from tests.support import script

RANK, SCALING = 3, 1.5
REVISION = "0" * 40
CODES = torch.randint(0, 60, (2, 17, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def companions(tmp_path_factory) -> Path:
    """A folder with the tiny world's Mimi and tokenizer."""
    folder = make_model(tmp_path_factory.mktemp("companions"), num_layers=1, depformer_num_layers=1)
    (folder / "model.safetensors").unlink()
    return folder


def write_base(folder: Path, lm: LMModel, companions: Path) -> Path:
    """A model folder in the publishers' layout, float32."""
    shutil.copytree(companions, folder)
    save_file(fuse(lm.state_dict(), lm.dep_q), folder / "model.safetensors")
    config = json.loads((companions / "config.json").read_text()) | TINY | {"dep_q": lm.dep_q}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def adapted(lm: LMModel, tables: bool = False) -> LMModel:
    """A copy with random adapters, as moshi puts them in; with `tables`, embeddings are trained too."""
    torch.manual_seed(7)
    lm = copy.deepcopy(lm)
    replace_all_linear_with_lora(lm, RANK, SCALING)
    set_trainable(lm, full=False, ft_embed=tables)
    if tables:
        with torch.no_grad():
            for name, parameter in lm.named_parameters():
                if parameter.requires_grad and "emb" in name:
                    parameter.add_(torch.randn_like(parameter))
    return lm


def save_checkpoint(folder: Path, base: Path, lm: LMModel, adapters: bool, spec=MOSHI) -> Path:
    """What a run leaves in `consolidated/`."""
    folder.mkdir(parents=True)
    checkpoint = open_pretrained(str(base))
    config = inference_config(checkpoint, lm_kwargs(checkpoint, spec))
    artefact = Artefact(config, (RANK, SCALING) if adapters else None, torch.float32)
    assert artefact.write(lm, folder, is_main=True) is None
    return folder


def save_run(folder: Path, base: Path, lm: LMModel) -> Path:
    """A run folder of train_personaplex.py: two checkpoints of adapters, metrics, settings, a manifest."""
    for step, weights in ((2, adapted(tiny_lm(16))), (10, lm)):
        checkpoint = folder / f"checkpoints/checkpoint_{step:06d}"
        save_checkpoint(checkpoint / "consolidated", base, weights, adapters=True, spec=PERSONAPLEX)
        (checkpoint / "train_state.json").write_text(json.dumps({"step": step, "position": 8 * step, "files": {}}))
    manifest = folder / "train.jsonl"
    manifest.write_text('{"path": "a.wav", "duration": 5400}\n{"path": "b.wav", "duration": 3600}\n')
    args = TrainArgs(
        data=DataArgs(train_data=str(manifest)), run_dir=str(folder), moshi_paths=PathsArgs(hf_repo_id=str(base)),
        lora=LoraArgs(enable=True, rank=RANK, scaling=SCALING),
    )  # fmt: skip
    (folder / "args.yaml").write_text(dump_args(args))
    rows = [{"step": step, "loss": 9.5 - step / 10, "text_loss": 2.0, "samples": 6} for step in (0, 5, 10, 15)]
    (folder / "metrics.eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    main()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local hub cache; the function it gives puts a folder there as a repository."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there

    def publish(folder: Path, name: str) -> None:
        repository = cache / f"models--{name.replace('/', '--')}"
        (repository / "snapshots").mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text(REVISION)
        (repository / "snapshots" / REVISION).symlink_to(folder.absolute(), target_is_directory=True)

    return publish


@pytest.fixture
def stock(hub):
    """A folder as stock moshi loads it from the hub."""

    def load(folder: Path) -> tuple[CheckpointInfo, LMModel]:
        name = f"me/{folder.name}"
        hub(folder, name)
        info = CheckpointInfo.from_hf_repo(name, revision=REVISION)
        return info, info.get_moshi(dtype=torch.float32, fuse_lora=False)

    return load


@torch.no_grad()
def logits(lm: LMModel) -> torch.Tensor:
    """Text and audio logits in one row, where they are valid."""
    out = lm.eval()(CODES)
    return torch.cat([out.text_logits[out.text_mask].flatten(), out.logits[out.mask].flatten()])


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * float(b.abs().max()))


# --- round trips ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dep_q, form, tables", [(8, "moshi", False), (16, "moshi", True), (16, "personaplex", False)])
def test_adapters_apart_and_merged_give_the_trained_logits(
    dep_q, form, tables, tmp_path, companions, stock, monkeypatch
):
    lm = tiny_lm(dep_q)
    trained = adapted(lm, tables)
    base = write_base(tmp_path / "base", lm, companions)
    checkpoint = save_checkpoint(tmp_path / "checkpoint", base, trained, adapters=True)
    with pytest.raises(UserError, match="nothing says of which weights; give them as --base"):
        command(monkeypatch, checkpoint, tmp_path / "x", "--format", form)
    command(monkeypatch, checkpoint, tmp_path / "apart", "--format", "moshi", "--base", base, "--dtype", "fp32")
    command(
        monkeypatch, checkpoint, tmp_path / "merged", "--format", form, "--merge", "--base", base, "--dtype", "fp32"
    )

    info, apart = stock(tmp_path / "apart")
    assert info.moshi_weights == base / "model.safetensors" and info.lora_weights.name == "lora.safetensors"
    info, merged = stock(tmp_path / "merged")
    assert info.lora_weights is None and not info.lm_config.get("lora")
    assert info.get_text_tokenizer().vocab_size() == 400
    assert {p.name for p in (tmp_path / "apart").iterdir()} == {
        "README.md", "config.json", "lora.safetensors", "mimi.safetensors", "mimi_config.json", "tokenizer.model",
    }  # fmt: skip
    expected = logits(trained)
    same(logits(apart), expected)
    same(logits(merged), expected)
    assert (logits(lm) - expected).abs().max() > 0.1

    # To the bit what a run with save_adapters: false writes.
    by_run = save_checkpoint(tmp_path / "by_run", base, trained, adapters=False)
    stored = fuse(load_file(by_run / "consolidated.safetensors"), dep_q)
    ours = load_file(tmp_path / "merged/model.safetensors")
    assert stored.keys() == ours.keys() and all(torch.equal(stored[key], ours[key]) for key in ours)


@pytest.mark.parametrize("dep_q, form", [(8, "moshi"), (16, "personaplex")])
def test_full_weights_keep_their_values(dep_q, form, tmp_path, companions, stock, monkeypatch):
    lm = tiny_lm(dep_q, seed=3)
    base = write_base(tmp_path / "base", tiny_lm(dep_q), companions)
    checkpoint = save_checkpoint(tmp_path / "checkpoint", base, lm, adapters=False)
    command(monkeypatch, checkpoint, tmp_path / "out", "--format", form, "--dtype", "fp32")
    same(logits(stock(tmp_path / "out")[1]), logits(lm))

    command(monkeypatch, checkpoint, tmp_path / "half", "--format", form)
    halved = load_file(tmp_path / "half/model.safetensors")
    for key, values in load_file(tmp_path / "out/model.safetensors").items():
        assert halved[key].dtype == torch.bfloat16 and torch.equal(halved[key], values.bfloat16())


def test_personaplex_keys_are_nvidias(tmp_path, companions, monkeypatch):
    """Its loader knows the fused names alone, all of them, in the shapes of 16 codebooks."""
    lm = tiny_lm(16)
    base = write_base(tmp_path / "base", lm, companions)
    checkpoint = save_checkpoint(tmp_path / "checkpoint", base, lm, adapters=False)
    command(monkeypatch, checkpoint, tmp_path / "out", "--format", "personaplex", "--dtype", "fp32")
    stored = load_file(tmp_path / "out/model.safetensors")
    expected = fuse(LMModel(device="cpu", **TINY | {"dep_q": 16}).state_dict(), 16)
    assert {k: v.shape for k, v in stored.items()} == {k: v.shape for k, v in expected.items()}
    assert not any("in_projs" in key or "lora" in key for key in stored)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "personaplex" and config["dep_q"] == 16


# --- a run that expanded its base, and the base as a file --------------------------------------------------------


def test_expand_is_the_expansion_and_a_base(tmp_path, companions, stock, monkeypatch):
    base = write_base(tmp_path / "base", tiny_lm(8), companions)
    command(monkeypatch, "--expand", base, tmp_path / "base16", "--dtype", "fp32")
    stored = load_file(tmp_path / "base16/model.safetensors")
    expected = expand_moshiko_to_personaplex(load_file(base / "model.safetensors"))
    assert stored.keys() == expected.keys() and all(torch.equal(stored[key], expected[key]) for key in stored)
    assert stock(tmp_path / "base16")[1].dep_q == 16

    opened = open_pretrained(str(tmp_path / "base16"))
    weights = StoredWeights(opened.moshi_weights(), lm_kwargs(opened, PERSONAPLEX)["dep_q"])
    assert not weights.origin.expanded
    with pytest.raises(UserError, match="has 16 codebooks already"):
        command(monkeypatch, "--expand", tmp_path / "base16", tmp_path / "again")


def test_adapters_over_an_expanded_moshi(tmp_path, companions, stock, monkeypatch, capsys):
    """The run folder names the base; merging expands it on the way; apart, adapters need the expanded file."""
    base = write_base(tmp_path / "base", tiny_lm(8), companions)
    lm = LMModel(device="cpu", dtype=torch.float32, **TINY | {"dep_q": 16})
    lm.load_state_dict(expand_moshiko_to_personaplex(load_file(base / "model.safetensors")))
    trained = adapted(lm)
    run = save_run(tmp_path / "run", base, trained)
    command(monkeypatch, run, tmp_path / "merged", "--format", "personaplex", "--dtype", "fp32")
    assert "they are merged (NVIDIA's runtime has no LoRA)" in capsys.readouterr().out
    same(logits(stock(tmp_path / "merged")[1]), logits(trained))

    with pytest.raises(UserError, match=r"need a base of 16 codebooks.*--expand.*--merge"):
        command(monkeypatch, run, tmp_path / "apart", "--format", "moshi")
    assert not (tmp_path / "apart").exists()
    command(monkeypatch, "--expand", base, tmp_path / "base16", "--dtype", "fp32")
    command(
        monkeypatch, run / "checkpoints/checkpoint_000010", tmp_path / "apart", "--format", "moshi", "--base",
        tmp_path / "base16", "--dtype", "fp32",
    )  # fmt: skip
    same(logits(stock(tmp_path / "apart")[1]), logits(trained))
    # An adapter folder knows its base: merging it needs no --base.
    command(monkeypatch, tmp_path / "apart", tmp_path / "again", "--format", "personaplex", "--dtype", "fp32")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)


# --- the folder -------------------------------------------------------------------------------------------------


def test_an_export_is_the_base_of_a_new_run(tmp_path, companions, monkeypatch):
    base = write_base(tmp_path / "base", tiny_lm(8), companions)
    trained = adapted(tiny_lm(8))
    checkpoint = save_checkpoint(tmp_path / "checkpoint", base, trained, adapters=True)
    out = tmp_path / "out"
    command(monkeypatch, checkpoint, out, "--format", "moshi", "--merge", "--base", base, "--dtype", "fp32")
    shutil.rmtree(base)
    moved = out.rename(tmp_path / "elsewhere")

    opened = open_pretrained(str(moved))
    kwargs = lm_kwargs(opened, MOSHI)
    lm = build_lm(kwargs, torch.float32).to_empty(device="cpu")
    weights = StoredWeights(opened.moshi_weights(), kwargs["dep_q"])
    weights.check({name: p.shape for name, p in lm.named_parameters()})
    load_weights(lm, weights, seed=0)
    same(logits(lm), logits(trained))
    assert opened.mimi().num_codebooks == 8
    assert load_tokenizer(opened.tokenizer_path()).vocab_size() == 400


def test_what_the_hub_has_is_referred_to(tmp_path, companions, hub, stock, monkeypatch):
    """A run on a repository of the hub: nothing of it is copied, and the card knows it."""
    base = write_base(tmp_path / "base", tiny_lm(8), companions)
    hub(base, "kyutai/moshi-tiny")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    checkpoint = save_checkpoint(tmp_path / "checkpoint", base, adapted(tiny_lm(8)), adapters=True)
    config = json.loads((checkpoint / "config.json").read_text())
    names = ("mimi_name", "mimi_config_name", "tokenizer_name")
    config |= {key: f"hf://kyutai/moshi-tiny/{Path(config[key]).name}" for key in names}
    (checkpoint / "config.json").write_text(json.dumps(config))
    command(monkeypatch, checkpoint, tmp_path / "out", "--format", "moshi", "--base", "kyutai/moshi-tiny")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"README.md", "config.json", "lora.safetensors"}
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert {key: written[key] for key in names} == {key: config[key] for key in names}
    assert written["moshi_name"] == "hf://kyutai/moshi-tiny/model.safetensors"
    stock(tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    for words in ("license: cc-by-4.0", "base_model: kyutai/moshi-tiny", "base_model_relation: adapter", "CC-BY 4.0"):
        assert words in card, words

    # The origin goes along when an export is exported again.
    command(monkeypatch, tmp_path / "out", tmp_path / "merged", "--format", "moshi", "--merge")
    assert "base_model: kyutai/moshi-tiny\nbase_model_relation: finetune" in (tmp_path / "merged/README.md").read_text()


def test_the_card_tells_of_the_run(tmp_path, companions, monkeypatch):
    base = write_base(tmp_path / "base", tiny_lm(8), companions)
    lm = LMModel(device="cpu", dtype=torch.float32, **TINY | {"dep_q": 16})
    lm.load_state_dict(expand_moshiko_to_personaplex(load_file(base / "model.safetensors")))
    run = save_run(tmp_path / "run", base, adapted(lm))
    command(monkeypatch, run, tmp_path / "out", "--format", "personaplex")
    card = (tmp_path / "out/README.md").read_text()
    for words in (
        "# out", "expanded from 8 to 16 codebooks", "LoRA (rank 3, scaling 1.5)", "| steps | 10 |", "80 (8 a step)",
        "2.50 h in 2 files", "|  | step 0 | step 10 |", "| objective | 9.5000 | 8.5000 |", "Step 0 is the base model",
        "--moshi-weight model.safetensors --mimi-weight mimi.safetensors", "do not fit", "finetune.tools.make_voice",
    ):  # fmt: skip
        assert words in card, words
    assert str(tmp_path) not in card
    (run / "train.jsonl").unlink()
    command(monkeypatch, run, tmp_path / "later", "--format", "personaplex")
    assert "not at hand" in (tmp_path / "later/README.md").read_text()


@pytest.mark.parametrize("trained, fits", [(False, True), (True, False)])
def test_the_card_says_whether_shipped_voices_fit(trained, fits, tmp_path, companions, hub, monkeypatch):
    lm = tiny_lm(16)
    base = write_base(tmp_path / "base", lm, companions)
    hub(base, "nvidia/personaplex-7b-v1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    checkpoint = save_checkpoint(tmp_path / "checkpoint", base, adapted(lm, tables=trained), adapters=True)
    command(monkeypatch, checkpoint, tmp_path / "out", "--format", "personaplex", "--base", "nvidia/personaplex-7b-v1")
    card = (tmp_path / "out/README.md").read_text()
    assert ("(NATF2.pt, ...) fit." in card) == fits and ("do not fit" in card) != fits
    assert "license_name: nvidia-open-model-license" in card


# --- memory -----------------------------------------------------------------------------------------------------

_MEASURE = """
import sys
from pathlib import Path
import torch
from finetune import export

torch.set_num_threads(1)
checkpoint, base, out = sys.argv[1:]
source = export.open_source(checkpoint, base)  # the first use of meta tensors alone imports 100 MB
Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
status = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1e3
before = status("VmRSS")
export.export(source, Path(out), "personaplex", True, torch.bfloat16)
print(f"{status('VmHWM') - before:.0f}")
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's memory counters")
def test_memory_does_not_grow_with_the_model(tmp_path, companions):
    """Expanding, merging and fusing 430 MB of weights takes the memory of a few of its tensors."""
    sizes = {"dim": 1024, "num_heads": 8, "num_layers": 12, "hidden_scale": 4.125, "depformer_dim": 256}
    kwargs = TINY | sizes | {"dep_q": 8}
    noise = torch.randn(8_000_000)
    lm = build_lm(kwargs, torch.bfloat16)
    layout = {key: (torch.bfloat16, tuple(v.shape)) for key, v in fuse(lm.state_dict(), 8).items()}
    base = tmp_path / "base"
    shutil.copytree(companions, base)
    config = json.loads((companions / "config.json").read_text()) | kwargs
    (base / "config.json").write_text(json.dumps(config))
    random = lambda layout: ((k, noise[: torch.Size(s).numel()].view(s)) for k, (_, s) in layout.items())
    write_safetensors(base / "model.safetensors", layout, random(layout))

    lm = build_lm(kwargs | {"dep_q": 16}, torch.bfloat16)
    add_adapters(lm, 16, 2.0)
    layout = {k: (torch.bfloat16, tuple(p.shape)) for k, p in lm.named_parameters() if is_adapter(k)}
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    config |= {"dep_q": 16, "lora": True, "lora_rank": 16, "lora_scaling": 2.0}
    config |= {key: f"file://{base / config[key]}" for key in ("mimi_name", "mimi_config_name", "tokenizer_name")}
    config.pop("moshi_name")
    (checkpoint / "config.json").write_text(json.dumps(config))
    write_safetensors(checkpoint / "lora.safetensors", layout, random(layout))

    done = script("-c", _MEASURE, checkpoint, base, tmp_path / "out")
    size = (tmp_path / "out/model.safetensors").stat().st_size / 1e6
    assert size > 400 and int(done.stdout) < size / 3, (size, done.stdout)
    shutil.rmtree(tmp_path / "out"), shutil.rmtree(base)


# --- mistakes ---------------------------------------------------------------------------------------------------


def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path, companions, hub, monkeypatch):
    lm = tiny_lm(8)
    base = write_base(tmp_path / "base", lm, companions)
    adapters = save_checkpoint(tmp_path / "adapters", base, adapted(lm), adapters=True)
    other = shutil.copytree(adapters, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"lora_rank": 4}))
    taken, empty_run, cut = tmp_path / "taken", tmp_path / "empty_run", tmp_path / "cut"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    empty_run.mkdir()
    (empty_run / "args.yaml").touch()
    shutil.copytree(base, cut)
    with (cut / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)
    before = {p.name for p in tmp_path.iterdir()}
    out = tmp_path / "out"
    for arguments, sentence in (
        ((base, out), "name the runtime: --format moshi or --format personaplex"),
        ((base, out, "--expand", "--merge"), "--expand stands alone"),
        ((base, taken, "--format", "moshi"), "exists already; name a new folder"),
        ((base, taken / "mine.txt", "--format", "moshi"), "exists already"),
        ((base, out, "--format", "personaplex"), "has 8 codebooks, and NVIDIA's runtime needs 16"),
        ((base, out, "--format", "moshi", "--base", base), "no --base to give"),
        ((adapters, out, "--format", "moshi", "--base", adapters), "--base must hold all weights"),
        ((adapters, out, "--expand"), "export it with --merge first"),
        ((other, out, "--format", "moshi", "--base", base), "not adapters of rank 4"),
        ((empty_run, out, "--format", "moshi"), "a run that has no checkpoint yet"),
        ((cut, out, "--format", "moshi"), "not a whole safetensors file"),
        ((tmp_path / "nowhere", out, "--format", "moshi"), "neither a local folder nor a repository"),
        ((adapters, out, "--format", "moshi", "--base", base, "--push-to-hub", "me/x"), "of no use on the hub"),
        ((base, out, "--format", "moshi", "--push-to-hub", "a/b/c"), "--push-to-hub a/b/c: "),
    ):
        with pytest.raises(UserError, match=sentence) as caught:
            command(monkeypatch, *arguments)
        assert "\n" not in str(caught.value)
        assert {p.name for p in tmp_path.iterdir()} == before, sentence
    assert (taken / "mine.txt").read_text() == "mine"

    with pytest.raises(UserError, match=r"out is written, but could not be uploaded .*huggingface-cli upload me/x"):
        command(monkeypatch, base, out, "--format", "moshi", "--push-to-hub", "me/x")
    assert (out / "model.safetensors").is_file()
