"""Finding, building, filling and sharding models."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from moshi.models import loaders
from safetensors.torch import load_file, save_file

from finetune.cli import UserError
from finetune.distributed import make_mesh, pick_device, session, shard
from finetune.lora import add_adapters, is_adapter
from finetune.model.build import StoredWeights, build_lm, load_weights, set_trainable
from finetune.model.expansion import expand_moshiko_to_personaplex
from finetune.model.pretrained import MOSHI, PERSONAPLEX, lm_kwargs, open_pretrained
from finetune.model.training_lm import TrainingLM
from finetune.model.weights import WeightFile, write_safetensors
from tests.engine import TINY, fused, tiny_lm
from tests.support import PEAK, ROOT, hub_cache


def folder_with(tmp_path, lm, config=None):
    save_file({k: v.contiguous() for k, v in fused(lm).items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"dep_q": lm.dep_q} if config is None else config))
    return open_pretrained(str(tmp_path))


def filled(checkpoint, spec, rank=None):
    kwargs = lm_kwargs(checkpoint, spec)
    source = StoredWeights(checkpoint.moshi_weights(), kwargs["dep_q"])
    lm = build_lm(kwargs, torch.float32)
    if rank:
        add_adapters(lm, rank, 2.0)
    set_trainable(lm, full=rank is None, ft_embed=False)
    lm.to_empty(device="cpu")
    load_weights(lm, source, seed=0)
    return lm, source.origin


def test_moshi_weights_load_as_they_are(tmp_path):
    lm = tiny_lm(8)
    loaded, origin = filled(folder_with(tmp_path, lm), MOSHI)
    assert not origin.expanded and "Moshi weights (8 codebooks), loaded as they are" in str(origin)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), lm.state_dict().values()))


def test_personaplex_weights_are_never_expanded_and_moshi_ones_always_are(tmp_path):

    for dep_q in (8, 16):
        (tmp_path / str(dep_q)).mkdir()
    _, origin = filled(folder_with(tmp_path / "16", tiny_lm(16)), PERSONAPLEX)
    assert not origin.expanded and "PersonaPlex weights (16 codebooks)" in str(origin)
    small = tiny_lm(8)
    grown, origin = filled(folder_with(tmp_path / "8", small), PERSONAPLEX)
    assert origin.expanded and "expanded to 16" in str(origin)
    expected = expand_moshiko_to_personaplex(small.state_dict())
    assert grown.state_dict().keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in grown.state_dict().items())


def test_step_0_with_adapters_is_the_base_model(tmp_path):
    lm = tiny_lm(16)
    adapted, _ = filled(folder_with(tmp_path, lm), PERSONAPLEX, rank=4)
    codes = torch.randint(4, 60, (1, 17, 12))
    mask = torch.ones(1, 12, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(TrainingLM(adapted, False)(codes, mask).ce, TrainingLM(lm, False)(codes, mask).ce)
    trainable = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert trainable and all(is_adapter(n) for n in trainable)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda s: s.pop("text_linear.weight"), "no text_linear.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "an unknown extra"),
        (lambda s: s.update({"text_emb.weight": torch.zeros(3, 32)}), r"text_emb.weight of shape \[3, 32\]"),
        (lambda s: s.pop("linears.15.weight"), "15 depformer steps"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_words(tmp_path, change, sentence):
    checkpoint = folder_with(tmp_path, tiny_lm(16))
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=sentence):
        filled(checkpoint, PERSONAPLEX)


def test_truncated_weights_are_named(tmp_path):
    checkpoint = folder_with(tmp_path, tiny_lm(8))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: not a whole safetensors file"):
        filled(checkpoint, MOSHI)


def test_a_file_that_becomes_shorter_while_it_is_read_is_named(tmp_path):
    save_file({"a.weight": torch.arange(12.0).view(4, 3), "s": torch.tensor(2.0)}, tmp_path / "w.safetensors")
    file = WeightFile(tmp_path / "w.safetensors")
    assert torch.equal(file.read("a.weight", 1, 3), torch.arange(3.0, 9.0).view(2, 3))
    assert file.read("a.weight", 3, 9).tolist() == [[9, 10, 11]] and file.read("s").tolist() == 2
    for out in (torch.empty(2, 3), torch.empty(2, 3, dtype=torch.float64), torch.empty(3, 2).t()):
        file.read_into("a.weight", 2, out)
        assert out.tolist() == [[6, 7, 8], [9, 10, 11]]
    os.truncate(tmp_path / "w.safetensors", (tmp_path / "w.safetensors").stat().st_size - 30)
    with pytest.raises(UserError, match=r"w\.safetensors: has become shorter"):
        file.read("a.weight")


def test_the_hubs_personaplex_config_is_enough(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "personaplex", "version": "7b-v1"}')
    kwargs = lm_kwargs(open_pretrained(str(tmp_path)), PERSONAPLEX)
    assert kwargs == dict(loaders._lm_kwargs) | {"dep_q": 16}
    build_lm(kwargs, torch.bfloat16)


def test_nvidias_depformer_causal_is_dropped(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"depformer_causal": True, "dep_q": 16}))
    build_lm(lm_kwargs(open_pretrained(str(tmp_path)), PERSONAPLEX), torch.float32)


@pytest.mark.parametrize("change", [{"n_q": 32}, {"dep_q": 4}])
def test_models_that_are_not_full_duplex_are_refused(tmp_path, change):
    (tmp_path / "config.json").write_text(json.dumps(TINY | change))
    with pytest.raises(UserError, match="full-duplex training needs"):
        lm_kwargs(open_pretrained(str(tmp_path)), MOSHI)


def test_mimi_has_eight_codebooks_for_personaplex(world, tmp_path):
    shutil.copytree(world / "model", tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text()) | {"dep_q": 16}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    assert open_pretrained(str(tmp_path / "m")).mimi().num_codebooks == 8


def test_a_warm_hub_cache_needs_no_network(world, tmp_path):
    hub_cache(tmp_path, "kyutai/tiny", list((world / "model").iterdir()))
    code = (
        "from finetune.model.pretrained import *\n"
        "c = open_pretrained('kyutai/tiny')\n"
        "print(c.moshi_weights().name, c.mimi().num_codebooks, c.tokenizer().vocab_size(), c.voices_archive())\n"
        "print(inference_config(c, lm_kwargs(c, MOSHI))['mimi_name'])\n"
    )
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    env.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "model.safetensors 8 400 None"
    assert done.stdout.splitlines()[1] == "hf://kyutai/tiny/mimi.safetensors"
    missing = code.replace("kyutai/tiny", "kyutai/other")
    done = subprocess.run([sys.executable, "-c", missing], cwd=ROOT, env=env, capture_output=True, text=True)
    assert "Unreachable: kyutai/other: config.json is not in the local hub cache" in done.stderr


def test_folders_say_what_they_lack(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"holds no model.safetensors \(it holds notes.txt\)"):
        open_pretrained(str(tmp_path)).moshi_weights()
    with pytest.raises(UserError, match="neither a local folder nor a repository"):
        open_pretrained("not a repo at all").moshi_weights()


def test_mimi_alone_needs_no_hub(tmp_path):
    """With a file given, an unreachable repository (tests run offline) means the standard Mimi."""
    weights = tmp_path / "mimi.safetensors"
    weights.write_bytes(b"")
    checkpoint = open_pretrained("kyutai/not-in-the-cache", mimi_path=str(weights))
    assert checkpoint.mimi_weights() == weights and checkpoint.mimi_config() is None
    with pytest.raises(UserError, match="cannot be reached"):
        open_pretrained("kyutai/not-in-the-cache").mimi_config()


def test_a_mimi_beside_a_broken_model_is_not_taken_for_the_standard_one(tmp_path):
    weights = tmp_path / "mimi.safetensors"
    weights.write_bytes(b"")
    config = tmp_path / "config.json"
    config.write_text('{"mimi_config_name": ')
    mimi = {"mimi_path": str(weights)}
    for checkpoint, words in (
        (open_pretrained(str(tmp_path), **mimi), r"config\.json: not readable as JSON"),
        (open_pretrained("kyutai/not-in-the-cache", config_path=str(config), **mimi), r"config\.json: not readable"),
        (open_pretrained(str(tmp_path / "mistyped"), **mimi), "mistyped: neither a local folder nor a repository"),
    ):
        for use in (checkpoint.mimi_config, checkpoint.mimi):
            with pytest.raises(UserError, match=words):
                use()


def test_loading_holds_one_copy_and_a_tensor(tmp_path):
    """A 300 MB model: what the process grows by, against the model's own size."""
    code = (
        "import resource, sys, torch\n"
        "from finetune.model.build import *\nfrom finetune.model.pretrained import *\n"
        f"rss = lambda: {PEAK} * 1024\n"
        "c = open_pretrained(sys.argv[1])\n"
        "kwargs = lm_kwargs(c, PERSONAPLEX)\n"
        "source = StoredWeights(c.moshi_weights(), 16)\n"
        "lm = build_lm(kwargs, torch.bfloat16)\n"
        "before = rss()\n"
        "lm.to_empty(device='cpu'); load_weights(lm, source, 0)\n"
        "sizes = [p.numel() * p.element_size() for p in lm.parameters()]\n"
        "print(rss() - before, sum(sizes), max(sizes))\n"
    )
    kwargs = TINY | {"dim": 1024, "num_heads": 8, "num_layers": 6, "hidden_scale": 4.125, "text_card": 8000}
    lm = build_lm(kwargs, torch.bfloat16)
    layout = {k: (torch.bfloat16, tuple(v.shape)) for k, v in fused(lm).items()}
    write_safetensors(
        tmp_path / "model.safetensors", layout, ((k, torch.zeros(shape)) for k, (_, shape) in layout.items())
    )
    (tmp_path / "config.json").write_text(json.dumps(kwargs))
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, size, largest = map(int, done.stdout.split())
    assert size > 250e6 and grown < size + 2 * largest + 20e6


@pytest.mark.parametrize("visible", [None, "", "0,1", "GPU-8a3f2c1e-0000-0000-0000-000000000000"])
def test_visible_devices_of_any_form(visible):
    env = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    env |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    code = "from finetune.distributed import session\nwith session('auto') as w: print(w.device.type, w.size)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "1"


def test_a_missing_gpu_is_said():
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
    else:
        count = 0
    with pytest.raises(UserError, match="has no GPU"):
        pick_device("cuda", count)


def test_fully_shard_accepts_moshis_modules(tmp_path):
    """The remedy for "object layout differs" touches torch's own table of classes: this fails if a torch changes it."""
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.fsdp._fully_shard import _fully_shard as fsdp2

    with session("cpu") as world:
        plain = tiny_lm(8)
        with pytest.raises(TypeError, match="layout"):
            fully_shard(plain.transformer.layers[0], mesh=make_mesh(world, "full"))
        fsdp2.cls_to_fsdp_cls.clear()
        lm = TrainingLM(tiny_lm(8), False)
        reference = TrainingLM(tiny_lm(8), False)
        shard(lm, [*lm.lm.transformer.layers, *lm.lm.depformer.layers], make_mesh(world, "full"), torch.float32)
        assert all(isinstance(m, FSDPModule) for m in [lm, *lm.lm.transformer.layers, *lm.lm.depformer.layers])
        codes, mask = torch.randint(4, 60, (1, 17, 9)), torch.ones(1, 9, dtype=torch.bool)
        ours, theirs = lm(codes, mask), reference(codes, mask)
        ours.ce.sum().backward(), theirs.ce.sum().backward()
        torch.testing.assert_close(ours.ce, theirs.ce)
        for (name, a), b in zip(lm.named_parameters(), reference.parameters()):
            torch.testing.assert_close(a.grad.full_tensor(), b.grad, msg=name)
