"""Exports against stock moshi: what it computes with an exported folder is what the trained model computes."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
import yaml
from moshi.models import LMModel
from moshi.models.loaders import CheckpointInfo
from moshi.utils.compile import no_compile
from safetensors.torch import load_file

from finetune.cli import UserError
from finetune.guard import best_checkpoint
from finetune.lora import add_adapters, is_adapter
from finetune.model.build import build_lm
from finetune.model.expansion import expand_moshiko_to_personaplex
from finetune.model.inference import load_merged
from finetune.model.layout import fuse
from finetune.model.stored import open_stored
from finetune.model.weights import write_safetensors
from finetune.tools.export.command import main
from tests.engine import TINY, tiny_lm
from tests.support import script
from tests.tools.conftest import REVISION
from tests.tools.stored import adapted, expanded, save_checkpoint, save_run, write_base

CODES = torch.randint(0, 60, (2, 17, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def export(call):
    """Calls the command."""
    return lambda *arguments: call(main, *arguments)


@pytest.fixture
def base(tmp_path, companions) -> Path:
    """The folder of a Moshi of 8 codebooks."""
    return write_base(tmp_path / "base", tiny_lm(8), companions)


@pytest.fixture
def checkpoint(tmp_path, base) -> Path:
    """Adapters over `base`."""
    return save_checkpoint(tmp_path / "checkpoint", base, adapted(tiny_lm(8)), adapters=True)


@pytest.fixture
def stock(hub):
    """Loads a folder as stock moshi loads it from the hub."""

    def load(folder: Path) -> tuple[CheckpointInfo, LMModel]:
        name = f"me/{folder.name}"
        hub(folder, name)
        info = CheckpointInfo.from_hf_repo(name, revision=REVISION)
        return info, info.get_moshi(dtype=torch.float32, fuse_lora=False)

    return load


@torch.no_grad()
def logits(lm: LMModel) -> torch.Tensor:
    """Text and audio logits in one row, where they are valid."""
    with no_compile():
        out = lm.eval()(CODES)
    return torch.cat([out.text_logits[out.text_mask].flatten(), out.logits[out.mask].flatten()])


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * float(b.abs().max()))


def metadata(folder: Path) -> dict:
    """The YAML front matter of a model card."""
    _, front, _ = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front)


# --- round trips ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dep_q, form, tables", [(8, "moshi", False), (16, "moshi", True), (16, "personaplex", False)])
def test_separate_and_merged_adapters_give_the_trained_logits(dep_q, form, tables, tmp_path, companions, stock, export):
    lm = tiny_lm(dep_q)
    trained = adapted(lm, tables)
    base = write_base(tmp_path / "base", lm, companions)
    checkpoint = save_checkpoint(tmp_path / "checkpoint", base, trained, adapters=True)
    with pytest.raises(UserError, match=r"checkpoint: .*--base"):
        export(checkpoint, tmp_path / "x", "--format", form)
    export(checkpoint, tmp_path / "apart", "--format", "moshi", "--base", base, "--dtype", "fp32")
    export(checkpoint, tmp_path / "merged", "--format", form, "--merge", "--base", base, "--dtype", "fp32")

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

    # Bit for bit what a run with save_adapters: false writes.
    by_run = save_checkpoint(tmp_path / "by_run", base, trained, adapters=False)
    stored = fuse(load_file(by_run / "consolidated.safetensors"), dep_q)
    ours = load_file(tmp_path / "merged/model.safetensors")
    assert stored.keys() == ours.keys() and all(torch.equal(stored[key], ours[key]) for key in ours)


@pytest.mark.parametrize("dep_q, form", [(8, "moshi"), (16, "personaplex")])
def test_full_weights_keep_their_values_in_the_given_dtype(dep_q, form, tmp_path, companions, stock, export):
    """Under the fused names, which are the only ones that NVIDIA's loader knows."""
    lm = tiny_lm(dep_q, seed=3)
    base = write_base(tmp_path / "base", tiny_lm(dep_q), companions)
    checkpoint = save_checkpoint(tmp_path / "checkpoint", base, lm, adapters=False)
    export(checkpoint, tmp_path / "out", "--format", form, "--dtype", "fp32")
    same(logits(stock(tmp_path / "out")[1]), logits(lm))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert [config[key] for key in ("model_type", "dep_q", "moshi_name")] == [form, dep_q, "model.safetensors"]

    export(checkpoint, tmp_path / "half", "--format", form)
    halved, full = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "out"))
    expected = fuse(LMModel(device="cpu", **TINY | {"dep_q": dep_q}).state_dict(), dep_q)
    assert {key: values.shape for key, values in full.items()} == {key: v.shape for key, v in expected.items()}
    assert not any("in_projs" in key or "lora" in key for key in full) and halved.keys() == full.keys()
    for key, values in full.items():
        assert values.dtype == torch.float32
        assert halved[key].dtype == torch.bfloat16 and torch.equal(halved[key], values.bfloat16())


def test_adapters_are_written_in_the_given_dtype(tmp_path, base, checkpoint, export):
    for arguments, dtype in (((), torch.bfloat16), (("--dtype", "fp32"), torch.float32)):
        export(checkpoint, tmp_path / str(dtype), "--format", "moshi", "--base", base, *arguments)
        tensors = load_file(tmp_path / str(dtype) / "lora.safetensors")
        assert {values.dtype for values in tensors.values()} == {dtype}


# --- a run that expanded its base, and the base as a file --------------------------------------------------------


def test_expand_writes_the_expansion(tmp_path, base, stock, export):
    export("--expand", base, tmp_path / "base16", "--dtype", "fp32")
    stored = load_file(tmp_path / "base16/model.safetensors")
    expected = expand_moshiko_to_personaplex(load_file(base / "model.safetensors"))
    assert stored.keys() == expected.keys() and all(torch.equal(stored[key], expected[key]) for key in stored)
    assert stock(tmp_path / "base16")[1].dep_q == 16
    with pytest.raises(UserError, match="base16: has 16 codebooks"):
        export("--expand", tmp_path / "base16", tmp_path / "again")


def test_adapters_over_an_expanded_moshi(tmp_path, base, stock, export, capsys):
    """The run folder names the base; merging expands it on the fly; separate adapters need the expanded file."""
    trained = adapted(expanded(base))
    run = save_run(tmp_path / "run", base, {2: adapted(tiny_lm(16)), 10: trained})
    export(run, tmp_path / "merged", "--format", "personaplex", "--dtype", "fp32")
    assert "NVIDIA's runtime has no LoRA" in capsys.readouterr().out
    same(logits(stock(tmp_path / "merged")[1]), logits(trained))

    with pytest.raises(UserError, match=r"need a base of 16 codebooks.*--expand.*--merge"):
        export(run, tmp_path / "apart", "--format", "moshi")
    assert not (tmp_path / "apart").exists()
    export("--expand", base, tmp_path / "base16", "--dtype", "fp32")
    checkpoint = run / "checkpoints/checkpoint_000010"
    export(checkpoint, tmp_path / "apart", "--format", "moshi", "--base", tmp_path / "base16", "--dtype", "fp32")
    same(logits(stock(tmp_path / "apart")[1]), logits(trained))
    # An adapter folder names its base: merging it needs no --base.
    export(tmp_path / "apart", tmp_path / "again", "--format", "personaplex", "--dtype", "fp32")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)


# --- the folder -------------------------------------------------------------------------------------------------


def test_an_export_can_be_moved_and_needs_no_base(tmp_path, base, checkpoint, export):
    export(checkpoint, tmp_path / "out", "--format", "moshi", "--merge", "--base", base, "--dtype", "fp32")
    shutil.rmtree(base)
    source = open_stored(str((tmp_path / "out").rename(tmp_path / "elsewhere")))
    same(logits(load_merged(source, torch.device("cpu"), torch.float32, dep_q=8)), logits(adapted(tiny_lm(8))))
    assert source.checkpoint.mimi().num_codebooks == 8
    assert source.checkpoint.tokenizer_path().parent.name == "elsewhere"


def test_generation_settings_are_kept(tmp_path, base, export):
    (tmp_path / "out").mkdir()  # an empty folder may be the target
    config = json.loads((base / "config.json").read_text()) | {"lm_gen_config": {"temp": 0.5}}
    (base / "config.json").write_text(json.dumps(config))
    export(base, tmp_path / "out", "--format", "moshi")
    assert json.loads((tmp_path / "out/config.json").read_text())["lm_gen_config"] == {"temp": 0.5}


def test_files_of_the_hub_are_referred_to(tmp_path, base, checkpoint, hub, stock, export, monkeypatch):
    """Nothing is copied of a repository that a run was based on, and the card names it."""
    hub(base, "kyutai/moshi-tiny")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    config = json.loads((checkpoint / "config.json").read_text())
    names = ("mimi_name", "mimi_config_name", "tokenizer_name")
    config |= {key: f"hf://kyutai/moshi-tiny/{Path(config[key]).name}" for key in names}
    (checkpoint / "config.json").write_text(json.dumps(config))
    export(checkpoint, tmp_path / "out", "--format", "moshi", "--base", "kyutai/moshi-tiny")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"README.md", "config.json", "lora.safetensors"}
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert {key: written[key] for key in names} == {key: config[key] for key in names}
    assert written["moshi_name"] == "hf://kyutai/moshi-tiny/model.safetensors"
    stock(tmp_path / "out")
    about = {"library_name": "moshi", "tags": ["speech-to-speech", "full-duplex"], "license": "cc-by-4.0"}
    about["base_model"] = "kyutai/moshi-tiny"
    assert metadata(tmp_path / "out") == about | {"base_model_relation": "adapter"}
    card = (tmp_path / "out/README.md").read_text()
    assert "[CC-BY 4.0](https://creativecommons.org/licenses/by/4.0/)" in card
    assert "--lora-weight lora.safetensors" not in card  # its Mimi configuration is found only on the hub

    # An export of the export has the same origin.
    export(tmp_path / "out", tmp_path / "merged", "--format", "moshi", "--merge")
    assert metadata(tmp_path / "merged") == about | {"base_model_relation": "finetune"}
    model_id = json.loads((tmp_path / "merged/config.json").read_text())["model_id"]
    assert model_id["base"] == "kyutai/moshi-tiny" and "LoRA" in model_id["method"]


def test_the_card_describes_the_run(tmp_path, base, export):
    run = save_run(tmp_path / "run", base, {10: adapted(expanded(base))})
    export(run, tmp_path / "out", "--format", "personaplex")
    card = (tmp_path / "out/README.md").read_text()
    for part in (
        "# out", "expanded from 8 to 16 codebooks", "LoRA (rank 3, scaling 1.5)", "| steps | 10 |", "80 (8 per step)",
        "2.50 h in 2 files", "|  | base | step 10 |", "| objective | 9.5000 | 8.5000 |", best_checkpoint(run)[2],
        "Over 6 windows", "4 replies", "| free-running: time in silence | 25.0% | 25.0% |",
        "| learning rate | ", "make_voice", "do not fit",
        "--moshi-weight model.safetensors --mimi-weight mimi.safetensors --tokenizer tokenizer.model",
        "builds only models of the published size",
    ):  # fmt: skip
        assert part in card, part
    assert str(tmp_path) not in card and "latency" not in card
    assert metadata(tmp_path / "out").keys() == {"library_name", "tags"}  # a local base has no licence to state
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_id"] == {"method": "LoRA (rank 3, scaling 1.5)", "step": 10}
    (run / "train.jsonl").unlink()
    export(run, tmp_path / "later", "--format", "personaplex")
    assert "| training data | not available" in (tmp_path / "later/README.md").read_text()


def test_the_card_has_the_results_of_evaluate_for_the_exported_step(tmp_path, base, export):
    run = save_run(tmp_path / "run", base, {7: adapted(expanded(base)), 10: adapted(expanded(base))})
    sentences = {"role": "role matters: a lot", "forgetting": "what the base says is as likely as before: 0"}
    comparisons = {
        "conditioning": {"role": {"sentence": sentences["role"]}}, "forgetting": {"sentence": sentences["forgetting"]},
        "comparison": {"other": "/elsewhere"},
    }  # fmt: skip

    def card(step: int, evaluation: dict | None) -> str:
        path = run / f"evaluation_{step:06d}.json"
        path.write_text("[" if evaluation is None else json.dumps({"step": step} | evaluation))
        out = tmp_path / f"out_{len(list(tmp_path.iterdir()))}"
        export(run / f"checkpoints/checkpoint_{step:06d}", out, "--format", "personaplex")
        return (out / "README.md").read_text()

    # Comparisons alone leave the run's own row of the step.
    text = card(10, comparisons)
    assert "|  | base | step 10 |" in text and "| objective | 9.5000 | 8.5000 |" in text
    assert all(f"- {sentence}" in text for sentence in sentences.values()) and "/elsewhere" not in text
    # Measures are newer than the row; the base is that of the same data, where free replies may be missing.
    text = card(10, {"loss": 1.25, "samples": 3, "free_silence": 0.5, "base": {"loss": 1.75}})
    assert "| objective | 1.7500 | 1.2500 |" in text and "| free-running: time in silence | – | 50.0% |" in text
    assert "Over 3 windows" in text and sentences["role"] not in text
    text = card(10, {"loss": 1.25, "base": None})
    assert "|  | step 10 |" in text and "9.5000" not in text
    # A step that was not evaluated has no scores, and is not the best.
    text = card(7, None)
    assert "## Held-out data" not in text and "| checkpoint |" not in text
    assert "| objective | 9.5000 | 0.5000 |" in card(7, {"loss": 0.5})


@pytest.mark.parametrize("trained, fits", [(False, True), (True, False)])
def test_the_card_says_whether_shipped_voices_fit(trained, fits, tmp_path, companions, hub, export, monkeypatch):
    lm = tiny_lm(16)
    base = write_base(tmp_path / "base", lm, companions)
    hub(base, "nvidia/personaplex-7b-v1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    checkpoint = save_checkpoint(tmp_path / "checkpoint", base, adapted(lm, tables=trained), adapters=True)
    export(checkpoint, tmp_path / "out", "--format", "personaplex", "--base", "nvidia/personaplex-7b-v1")
    card = (tmp_path / "out/README.md").read_text()
    assert ("(NATF2.pt, ...) fit." in card) == fits and ("do not fit" in card) != fits
    front = metadata(tmp_path / "out")
    assert (front["license"], front["license_name"]) == ("other", "nvidia-open-model-license")
    assert front["license_link"] in card and front["license_link"].startswith("https://www.nvidia.com/")


@pytest.mark.parametrize("dep_q, command", [(8, "python -m moshi.server --hf-repo"), (16, "finetune.tools.generate .")])
def test_the_card_of_a_moshi_says_how_to_run_it(dep_q, command, tmp_path, companions, export):
    base = write_base(tmp_path / "base", tiny_lm(dep_q), companions)
    export(base, tmp_path / "out", "--format", "moshi")
    assert command in (tmp_path / "out/README.md").read_text()


# --- the hub ----------------------------------------------------------------------------------------------------


def test_a_pushed_repository_is_private(tmp_path, base, export, monkeypatch, capsys):
    calls = []

    class Api:
        def create_repo(self, repository, **settings):
            calls.append((repository, settings))
            return SimpleNamespace(repo_id="owner/" + repository)

        def upload_folder(self, folder_path, repo_id):
            calls.append((Path(folder_path).name, repo_id, {path.name for path in Path(folder_path).iterdir()}))

    monkeypatch.setattr("finetune.tools.export.folder.HfApi", Api)
    export(base, tmp_path / "out", "--format", "moshi")
    assert calls == []
    shutil.rmtree(tmp_path / "out")
    export(base, tmp_path / "out", "--format", "moshi", "--push-to-hub", "model")
    files = {"README.md", "config.json", "model.safetensors", "mimi.safetensors", "mimi_config.json", "tokenizer.model"}
    assert calls == [("model", {"private": True, "exist_ok": True}), ("out", "owner/model", files)]
    assert "https://huggingface.co/owner/model" in capsys.readouterr().out


def test_a_failed_upload_keeps_the_folder(tmp_path, base, hub, export):
    with pytest.raises(UserError, match=r"out is written.* `huggingface-cli upload me/x .*out`"):
        export(base, tmp_path / "out", "--format", "moshi", "--push-to-hub", "me/x")
    assert (tmp_path / "out/model.safetensors").is_file()


# --- memory and disk --------------------------------------------------------------------------------------------

_MEASURE = """
import sys
from pathlib import Path
import torch
from finetune.model.stored import open_stored
from finetune.tools.export.folder import export_model

torch.set_num_threads(1)
checkpoint, base, out = sys.argv[1:]
source = open_stored(checkpoint, base)  # the first use of meta tensors alone imports 100 MB
Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
status = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1e3
before = status("VmRSS")
export_model(source, Path(out), "personaplex", True, torch.bfloat16)
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


def test_a_full_disk_is_noticed_before_writing(tmp_path, base, export, monkeypatch):
    size = sum(p.stat().st_size for p in base.iterdir() if p.name != "config.json")
    weights = (base / "model.safetensors").stat().st_size
    header = 8 + int.from_bytes((base / "model.safetensors").read_bytes()[:8], "little")
    needed = size - weights + (weights - header) // 2  # in bf16
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(UserError, match=r"out: needs 0\.\d GB"):
        export(base, tmp_path / "out", "--format", "moshi")
    assert {path.name for path in tmp_path.iterdir()} == {"base"}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    export(base, tmp_path / "out", "--format", "moshi")


# --- mistakes ---------------------------------------------------------------------------------------------------


def test_a_mistake_leaves_nothing(tmp_path, base, checkpoint, export):
    out, taken, truncated = tmp_path / "out", tmp_path / "taken.txt", tmp_path / "truncated"
    taken.write_text("mine")
    shutil.copytree(base, truncated)
    with (truncated / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)
    before = {path.name for path in tmp_path.iterdir()}
    for arguments, part in (
        ((base, out, "--expand", "--base", base), "--expand"),
        ((base, taken, "--format", "moshi"), "taken.txt: exists already"),
        ((checkpoint, out, "--format", "moshi", "--base", checkpoint), "checkpoint: .*--base"),
        ((checkpoint, out, "--expand"), "--merge"),
        ((truncated, out, "--format", "moshi"), r"truncated/model\.safetensors: "),
        ((checkpoint, out, "--format", "moshi", "--base", base, "--push-to-hub", "me/x"), "checkpoint: .*--merge"),
    ):
        with pytest.raises(UserError, match=part):
            export(*arguments)
        assert {path.name for path in tmp_path.iterdir()} == before and taken.read_text() == "mine", part
