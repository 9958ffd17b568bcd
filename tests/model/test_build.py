"""Building models on the meta device, and filling whole and sharded ones from their files."""

import json
import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch._dynamo  # FSDP imports it; once here, for all forked processes
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.cli import UserError
from finetune.distributed import World, local_rows, make_mesh, shard
from finetune.lora import add_adapters, initial_adapter, is_adapter, stock_name
from finetune.model.build import StoredWeights, build_lm, load_weights, set_trainable
from finetune.model.expansion import expand_moshiko_to_personaplex
from finetune.model.pretrained import MOSHI, PERSONAPLEX, Pretrained, lm_kwargs
from finetune.model.training_lm import TrainingLM
from finetune.model.weights import write_safetensors
from tests.engine import TINY, fused, tiny_lm
from tests.support import PEAK, ROOT


def folder_with(path, lm):
    save_file({k: v.contiguous() for k, v in fused(lm).items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(TINY | {"dep_q": lm.dep_q}))
    return Pretrained(str(path))


def filled(checkpoint, spec, rank=None, seed=0):
    kwargs = lm_kwargs(checkpoint, spec)
    weights = StoredWeights(checkpoint.moshi_weights(), kwargs["dep_q"])
    lm = build_lm(kwargs, torch.float32)
    if rank:
        add_adapters(lm, rank, 2.0)
    set_trainable(lm, full=rank is None, ft_embed=False)
    lm.to_empty(device="cpu")
    load_weights(lm, weights, seed)
    return lm, weights


class CpuTensors(TorchDispatchMode):
    """Counts the elements of all tensors made on the CPU."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements += out.numel() if isinstance(out, torch.Tensor) and out.device.type == "cpu" else 0
        return out


def test_a_model_is_built_without_memory():
    """Not even for a moment: moshi makes some layers on the default device and moves them."""
    with CpuTensors() as made:
        lm = build_lm(TINY | {"device": "cpu"}, torch.bfloat16)
    assert made.elements == 0
    assert {(p.device.type, p.dtype) for p in lm.parameters()} == {("meta", torch.bfloat16)}
    assert {b.device.type for b in lm.buffers()} <= {"meta"}


@pytest.mark.parametrize("change", [{"unheard_of": 1}, {"delays": [0]}])
def test_a_config_that_moshi_refuses_is_a_sentence(change):
    with pytest.raises(UserError, match=r"LM config does not fit .*(unheard_of|delays)"):
        build_lm(TINY | change, torch.float32)


# --- what is trained --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full, ft_embed", [(True, False), (False, False), (False, True)])
def test_trained_parameters_are_float32_and_frozen_ones_are_not(full, ft_embed):
    lm = build_lm(TINY, torch.bfloat16)
    if not full:
        add_adapters(lm, 4, 2.0)
    set_trainable(lm, full, ft_embed)
    tables = {f"{name}.weight" for name, module in lm.named_modules() if isinstance(module, nn.Embedding)}
    for name, parameter in lm.named_parameters():
        trained = full or is_adapter(name) or (ft_embed and name in tables)
        assert parameter.requires_grad == trained, name
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16), name


# --- filling ----------------------------------------------------------------------------------------------------


def test_moshi_weights_load_unchanged(tmp_path):
    lm = tiny_lm(8)
    loaded, origin = filled(folder_with(tmp_path, lm), MOSHI)
    assert (origin.file.path, origin.file.dep_q, origin.expanded) == (tmp_path / "model.safetensors", 8, False)
    assert "Moshi weights (8 codebooks), loaded unchanged" in str(origin)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), lm.state_dict().values(), strict=True))


def test_personaplex_weights_are_never_expanded_and_moshi_ones_always_are(tmp_path):
    for dep_q in (8, 16):
        (tmp_path / str(dep_q)).mkdir()
    _, origin = filled(folder_with(tmp_path / "16", tiny_lm(16)), PERSONAPLEX)
    assert not origin.expanded and "PersonaPlex weights (16 codebooks), loaded unchanged" in str(origin)
    small = tiny_lm(8)
    grown, origin = filled(folder_with(tmp_path / "8", small), PERSONAPLEX)
    assert origin.expanded and "Moshi weights (8 codebooks), expanded to 16" in str(origin)
    expected = expand_moshiko_to_personaplex(small.state_dict())
    assert grown.state_dict().keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in grown.state_dict().items())


def test_rows_of_an_expanded_model(tmp_path):
    weights = StoredWeights(folder_with(tmp_path, tiny_lm(8)).moshi_weights(), 16)
    expected = expand_moshiko_to_personaplex(tiny_lm(8).state_dict())
    for name in ("linears.3.weight", "linears.11.weight", "depformer_emb.7.weight", "text_emb.weight"):
        shape = expected[name].shape
        out = torch.full((4, shape[1]), 7.0)
        weights.read_into(name, 3, out)
        assert torch.equal(out, expected[name][3:7])


def test_step_0_with_adapters_is_the_base_model(tmp_path):
    lm = tiny_lm(16)
    adapted, _ = filled(folder_with(tmp_path, lm), PERSONAPLEX, rank=4, seed=5)
    codes = torch.randint(4, 60, (1, 17, 12))
    mask = torch.ones(1, 12, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(TrainingLM(adapted, False)(codes, mask).ce, TrainingLM(lm, False)(codes, mask).ce)
    trainable = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert trainable and all(is_adapter(name) for name in trainable)
    for name, parameter in trainable.items():
        assert torch.equal(parameter.detach(), initial_adapter(name, parameter.shape, 5)), name


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda s: s.pop("text_linear.weight"), "no text_linear.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "an unknown extra"),
        (
            lambda s: s.update({"text_emb.weight": torch.zeros(3, 32)}),
            r"text_emb.weight of shape \[3, 32\] .*\[61, 32\]",
        ),
        (lambda s: s.pop("linears.15.weight"), "15 depformer steps"),
        (lambda s: [s.pop(f"emb.{k}.weight") for k in range(16)], "no emb.0.weight; .* and 12 more"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, sentence):
    checkpoint = folder_with(tmp_path, tiny_lm(16))
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"model\.safetensors: .*{sentence}"):
        filled(checkpoint, PERSONAPLEX)


def test_a_moshi_with_a_missing_step_is_named(tmp_path):
    checkpoint = folder_with(tmp_path, tiny_lm(8))
    state = load_file(tmp_path / "model.safetensors")
    del state["depformer_in.5.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: .*missing depformer_in\.5\.weight"):
        StoredWeights(checkpoint.moshi_weights(), 16)


# --- shards -----------------------------------------------------------------------------------------------------


def tiny_module() -> nn.Module:
    """Linears of 5, 1 and 7 rows with adapters of 3, and a table of 4 rows."""
    module = nn.Module()
    module.layers = nn.ModuleList(
        [nn.Linear(4, 5, bias=False), nn.Linear(5, 1, bias=False), nn.Linear(1, 7, bias=False)]
    )
    module.emb = nn.ModuleList([nn.Embedding(4, 2)])
    module = module.to("meta")
    add_adapters(module, 3, 2.0)
    set_trainable(module, full=False, ft_embed=True)
    return module


def filled_rank(path, rank: int, size: int, sharding: str, node: int) -> dict[str, tuple[int, np.ndarray]]:
    """{name: (first row, rows)} that one of `size` ranks holds after filling its shard; collectives move nothing."""
    torch.set_num_threads(1)  # torch makes its pool of threads again after a fork, which two threads cannot do at once
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        module = tiny_module()
        mesh = make_mesh(World(rank, size, rank % node, node, torch.device("cpu")), sharding)
        shard(module, [], mesh, torch.float32)
        module.to_empty(device="cpu")
        for parameter in module.parameters():
            local_rows(parameter)[1].fill_(torch.nan)
        load_weights(module, StoredWeights(path, 0), seed=1, gather=lambda own: [own, set()])
        held = {name: local_rows(parameter) for name, parameter in module.named_parameters()}
        return {name: (start, rows.numpy()) for name, (start, rows) in held.items()}
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("size, sharding, node", [(3, "full", 3), (4, "hybrid", 2), (2, "none", 2)])
def test_ranks_hold_consecutive_rows_of_the_same_model(tmp_path, size, sharding, node):
    """With 3 ranks, pieces are of 2, 2 and 1 of 5 rows; of 2, 2 and none of 4; of 1, none and none of 1."""
    names = {name: p for name, p in tiny_module().named_parameters() if not is_adapter(name)}
    base = {stock_name(name): torch.randn(p.shape) for name, p in names.items()}
    save_file(base, tmp_path / "w.safetensors")
    # A process for each rank: torch keeps meshes of process groups that are gone.
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        arguments = [(tmp_path / "w.safetensors", rank, size, sharding, node) for rank in range(size)]
        ranks = [task.get(timeout=60) for task in [pool.apply_async(filled_rank, a) for a in arguments]]
    shards = {"full": size, "hybrid": node, "none": 1}[sharding]
    for name, parameter in tiny_module().named_parameters():
        whole = initial_adapter(name, parameter.shape, 1) if is_adapter(name) else base[stock_name(name)]
        per_rank = -(-len(whole) // shards)
        for rank, held in enumerate(ranks):
            start, rows = held[name]
            first = min(rank % shards * per_rank, len(whole))
            assert start == first, (name, rank)
            assert np.array_equal(rows, whole[first : first + per_rank].numpy()), (name, rank)


def test_loading_holds_one_copy_and_a_tensor(tmp_path):
    """A 300 MB model: the growth of the process, compared with the size of the model."""
    code = (
        "import resource, sys, torch\n"
        "from finetune.model.build import *\nfrom finetune.model.pretrained import *\n"
        f"rss = lambda: {PEAK} * 1024\n"
        "c = Pretrained(sys.argv[1])\n"
        "kwargs = lm_kwargs(c, PERSONAPLEX)\n"
        "weights = StoredWeights(c.moshi_weights(), 16)\n"
        "lm = build_lm(kwargs, torch.bfloat16)\n"
        "before = rss()\n"
        "lm.to_empty(device='cpu'); load_weights(lm, weights, 0)\n"
        "sizes = [p.numel() * p.element_size() for p in lm.parameters()]\n"
        "print(rss() - before, sum(sizes), max(sizes))\n"
    )
    kwargs = TINY | {"dim": 1024, "num_heads": 8, "num_layers": 6, "hidden_scale": 4.125, "text_card": 8000}
    lm = build_lm(kwargs, torch.bfloat16)
    layout = {k: (torch.bfloat16, tuple(v.shape)) for k, v in fused(lm).items()}
    write_safetensors(
        tmp_path / "model.safetensors", layout, ((k, torch.ones(shape)) for k, (_, shape) in layout.items())
    )
    (tmp_path / "config.json").write_text(json.dumps(kwargs))
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    grown, size, largest = map(int, done.stdout.split())
    assert size > 250e6 and grown < size + 2 * largest + 20e6
