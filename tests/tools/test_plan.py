"""Plans compared with what a step really allocates and multiplies; and the command."""

import contextlib
import itertools
import json
import math
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from moshi.models import loaders
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from finetune import progress
from finetune.args import TrainArgs
from finetune.cli import UserError, run
from finetune.config import load_args
from finetune.data.batch import Sample, TextStats
from finetune.distributed import World, local_rows, make_mesh, session, shard
from finetune.evaluate import free_run
from finetune.jobs import bars
from finetune.lora import add_adapters, is_adapter, is_embedding
from finetune.model.build import build_lm, make_trainable
from finetune.model.products import rms_norm
from finetune.model.quantised import quantised_linears
from finetune.model.targets import make_targets
from finetune.model.training_lm import TrainingLM
from finetune.optim import build_optimizer, clip_gradients
from finetune.profiling import PEAK_TFLOPS
from finetune.tools.plan.command import GIB, main, read_plan_settings
from finetune.tools.plan.fit import DRIVER_GIB, find_fit
from finetune.tools.plan.meter import GpuKernels, Meter
from finetune.tools.plan.sizes import RunSizes, open_sizes
from tests.support import PEAK, ROOT, script

CPU = torch.device("cpu")
CONFIG = dict(
    loaders._lm_kwargs, dim=64, num_heads=4, num_layers=2, text_card=400, context=1000, depformer_dim=48,
    depformer_dim_feedforward=192, depformer_num_heads=2, depformer_num_layers=2,
)  # fmt: skip
LORA = {"lora": {"enable": True, "rank": 8}}
FULL = {"full_finetuning": True}
EMBED = {"lora": {"enable": True, "rank": 8, "ft_embed": True}}


def settings(**values) -> TrainArgs:
    base = {"data": {"train_data": "unread"}, "run_dir": "unread", "device": "cpu", "batch_size": 2}
    return TrainArgs.model_validate(base | values)


@contextlib.contextmanager
def ranks_of(size: int, node: int):
    """Rank 0 of `size` without the others: collectives move nothing, but everything allocates as in a real run."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield World(0, size, 0, node, CPU)
    finally:
        dist.destroy_process_group()


def build(args: TrainArgs, kwargs: dict, world: World) -> TrainingLM:
    """Build and shard a model as train.run_training does."""
    dtype = getattr(torch, args.param_dtype)
    lm = build_lm(kwargs, dtype)
    make_trainable(lm, args)
    training = TrainingLM(lm, args.recomputation)
    shard(training, [*lm.transformer.layers, *lm.depformer.layers], make_mesh(world, args.sharding), dtype)
    return training


def fill(training: TrainingLM) -> None:
    training.to_empty(device="cpu")
    for parameter in training.parameters():
        local_rows(parameter)[1].normal_(0, 0.02)
    for _, layer in quantised_linears(training):
        layer.fill(lambda _, out: out.normal_(0, 0.02))


@contextlib.contextmanager
def allocator():
    """Measure the peak of the bytes that are allocated in the block; it is appended to the list that this yields."""
    peak = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield peak

    def walk(events):
        for event in events:
            yield event
            yield from walk(event.children)

    made: dict[int, int] = {}  # by address; what was allocated before the block does not count when it is freed
    live = highest = 0
    tree = profiler.profiler.kineto_results.experimental_event_tree()
    for event in sorted(walk(tree), key=lambda e: e.start_time_ns):
        if event.tag == _EventType.Allocation:
            address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
            if size > 0:
                made[address] = size
            live += size if size > 0 else -made.pop(address, 0)
            highest = max(highest, live)
    peak.append(highest)


def measured_step(args: TrainArgs, kwargs: dict, group, prompt: int = 0) -> int:
    """The peak of the bytes that a model, its optimizer and two steps allocate."""
    frames = round(args.duration_sec * 12.5) + prompt
    codes = torch.randint(0, 2048, (args.batch_size, 17, frames))
    codes[:, 0] = torch.where(torch.arange(frames) % 3 == 0, 7, 3)
    mask = torch.ones(args.batch_size, frames, dtype=torch.bool)
    mask[:, :prompt] = False
    with group as world:
        training = build(args, kwargs, world)
        targets = make_targets(codes, mask, kwargs["delays"], kwargs["dep_q"])
        with allocator() as peak:
            fill(training)
            trained = [p for p in training.parameters() if p.requires_grad]
            optimizer = build_optimizer(training.lm, args.optim)
            for _ in range(2):
                for i in range(args.num_microbatches):
                    last = i == args.num_microbatches - 1
                    training.set_requires_gradient_sync(last or args.reduce_every_microbatch)
                    training(codes, mask, targets=targets).ce.sum().backward()
                clip_gradients(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return peak[0]


CASES = {
    "lora": (LORA, {"duration_sec": 6.0}, {}, 1),
    "lora of 16 steps without checkpointing, float32, prompt, over gloo": (
        LORA, {"duration_sec": 4.0, "gradient_checkpointing": False, "param_dtype": "float32"}, {"dep_q": 16}, 1,
    ),
    "lora over nf4": (LORA | {"base_dtype": "nf4"}, {"duration_sec": 6.0}, {}, 1),
    "lora over nf4, 3 layers keep products": (
        LORA | {"base_dtype": "nf4"}, {"duration_sec": 6.0, "gradient_checkpointing": 3}, {"dep_q": 16}, 1,
    ),
    "lora, the temporal layers keep products, float32": (
        LORA, {"duration_sec": 6.0, "gradient_checkpointing": 2, "param_dtype": "float32"}, {}, 1,
    ),
    "full on 2 ranks, one layer keeps products": (FULL, {"duration_sec": 6.0, "gradient_checkpointing": 1}, {}, 2),
    "full on 4 ranks, 3 microbatches, all layers keep products": (
        FULL, {"duration_sec": 6.0, "num_microbatches": 3, "gradient_checkpointing": 9}, {"dep_q": 16}, 4,
    ),
    "lora of a part over int8, on 2 ranks that share nothing": (
        {"lora": {"enable": True, "rank": 8, "targets": ["temporal"]}, "base_dtype": "int8"},
        {"duration_sec": 6.0, "sharding": "none"}, {"dep_q": 16}, 2,
    ),
    "full, few frames, over gloo": (FULL, {"duration_sec": 1.0}, {}, 1),
    "full without checkpointing, few frames, float32, over gloo": (
        FULL, {"duration_sec": 1.0, "gradient_checkpointing": False, "param_dtype": "float32"}, {}, 1,
    ),
    "full of few frames on 2 ranks": (FULL, {"duration_sec": 1.0}, {}, 2),
    "full of few frames on 4 ranks, 3 microbatches": (FULL, {"duration_sec": 1.0, "num_microbatches": 3}, {}, 4),
    "full without checkpointing": (FULL, {"duration_sec": 6.0, "gradient_checkpointing": False}, {}, 1),
    "full on 4 ranks, 3 microbatches": (FULL, {"duration_sec": 4.0, "num_microbatches": 3}, {"dep_q": 16}, 4),
    "full on 4 ranks, 3 microbatches, each reduced": (
        FULL, {"duration_sec": 4.0, "num_microbatches": 3, "reduce_every_microbatch": True}, {"dep_q": 16}, 4,
    ),
    "full on 2 nodes of 2, float32": (
        FULL, {"duration_sec": 8.0, "sharding": "hybrid", "param_dtype": "float32"}, {}, 4,
    ),
    "embeddings on 2 ranks that share nothing": (EMBED, {"duration_sec": 8.0, "sharding": "none"}, {}, 2),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_step_allocates_what_was_planned(case):
    method, values, config, ranks = CASES[case]
    args, kwargs, prompts = settings(**method, **values, prompt={"max_sec": 2.0}), CONFIG | config, "prompt" in case
    sizes = RunSizes(args, kwargs, prompts, ranks, 2)
    sizes.over_gloo = "gloo" in case
    planned = sizes.total(args.batch_size, args.gradient_checkpointing)
    few = "few frames" in case  # so that single tensors of the optimizer's kernels matter
    tolerance, measured = 0.05 if few else 0.01, math.inf
    for _ in range(5):  # a thread of gloo may free a copy late, which only adds
        group = session("cpu") if sizes.over_gloo else ranks_of(ranks, 2)
        measured = min(measured, measured_step(args, kwargs, group, 25 * prompts))
        if measured < (1 + tolerance) * planned or not sizes.over_gloo:
            break
    if sizes.over_gloo and measured < (1 - tolerance) * planned:  # torch 2.14 reduces over one rank without a copy
        sizes = RunSizes(args, kwargs, prompts, ranks, 2)
        sizes.over_gloo = False
        planned = sizes.total(args.batch_size, args.gradient_checkpointing)
    assert planned == pytest.approx(measured, rel=tolerance)
    step = sizes.step(args.batch_size, args.gradient_checkpointing)
    assert few or step.at_peak["activations"] > 0.3 * planned  # so that the comparison is not about weights alone


def test_the_state_is_that_of_a_rank():
    args = settings(**EMBED)
    with ranks_of(4, 4) as world:
        training = build(args, CONFIG, world)
        local = [(p.requires_grad, p.to_local().nbytes) for p in training.parameters()]
    state = RunSizes(args, CONFIG, False, 4).state
    assert state["frozen"] == sum(size for trained, size in local if not trained)
    assert state["adapters"] + state["trained weights"] == sum(size for trained, size in local if trained)
    assert state["moments"] == 2 * sum(size for trained, size in local if trained)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_weights_are_counted_as_stored(kind):
    args = settings(**LORA, base_dtype=kind, do_eval=True)
    sizes, lm = RunSizes(args, CONFIG, False), build_lm(CONFIG, torch.bfloat16)
    parameters = sum(p.numel() for p in lm.parameters())
    make_trainable(lm, args)
    assert sizes.state["quantised"] == sum(b.nbytes for _, layer in quantised_linears(lm) for b in layer.buffers())
    assert sizes.state["frozen"] == sum(p.nbytes for p in lm.parameters() if not p.requires_grad)
    assert sizes.parameters == parameters
    largest = max(2 * layer.numel() for name, layer in quantised_linears(lm) if "transformer.layers" in name)
    assert largest < sizes.evaluation["dequantised"] < 6 * largest
    with pytest.raises(UserError, match="sharding"):
        RunSizes(args, CONFIG, False, 2)


@pytest.mark.parametrize(("kind", "card"), [("nf4", 12), ("int8", 16)])
def test_personaplex_fits_small_cards(kind, card):
    """LoRA of rank 64 on the temporal transformer, windows of 100 s after prompts of 30 s, 3 GiB to spare."""
    lora = {"enable": True, "rank": 64, "targets": ["temporal"]}
    args = settings(lora=lora, base_dtype=kind, duration_sec=100.0, batch_size=1, num_microbatches=32, device="auto")
    kwargs = loaders._lm_kwargs | {"dep_q": 16}
    assert RunSizes(args, kwargs, True).total(1, True) + 3 * 2**30 < card * 2**30


def test_an_update_allocates_nothing_but_moments():
    """So that the gradients, which belong to the step, are all that exists next to the state."""
    args = settings(**FULL)
    with session("cpu") as world:
        training = build(args, CONFIG, world)
        fill(training)
        optimizer = build_optimizer(training.lm, args.optim)
        peaks = []
        for _ in range(2):
            for parameter in training.parameters():
                parameter.grad = torch.zeros_like(parameter)
            with allocator() as peak:
                clip_gradients(list(training.parameters()), 1.0)
                optimizer.step()
            peaks += peak
    assert peaks == pytest.approx([RunSizes(args, CONFIG, False).state["moments"], 0], abs=20_000)


def test_an_evaluation_allocates_what_was_planned():
    # Not in bfloat16, in which attention on a CPU repacks the keys and values of a layer.
    args = settings(**LORA, do_eval=True, eval_free_samples=2, param_dtype="float32", eval_free_sec=8.0)
    codes = torch.randint(0, 400, (17, 102))
    sample = Sample(codes, torch.arange(102) >= 2, None, "a", 4, TextStats())
    with session("cpu") as world:
        training = build(args, CONFIG, world)
        fill(training)
        training(codes[None, :, :6], torch.ones(1, 6, dtype=torch.bool)).ce.sum().backward()  # initialises FSDP
        training.zero_grad()
        with allocator() as peak:
            free_run(training, [sample, sample], 8.0, 0)
    assert RunSizes(args, CONFIG, False).evaluation.total() == pytest.approx(peak[0], rel=0.15)


def test_the_higher_of_both_peaks_counts():
    """That of a step, or of an evaluation with many conversations."""
    for samples in (1, 3000):
        args = settings(**LORA, do_eval=True, eval_free_samples=samples, duration_sec=2.0, device="auto")
        sizes = RunSizes(args, CONFIG, False)
        peaks = sizes.step(2, True).peak, sizes.evaluation.total()
        assert (peaks[0] > peaks[1]) == (samples == 1)
        assert sizes.total(2, True) == sizes.state.total() + max(peaks)
    for ranks, frozen in ((1, 0), (2, sizes.state["frozen"])):  # on one rank, frozen weights are not sharded
        gathered = RunSizes(args, CONFIG, False, ranks).evaluation["gathered"]
        assert gathered == frozen + sizes.state["adapters"] // 2  # in bfloat16
    assert not RunSizes(settings(**LORA, eval_free_samples=4), CONFIG, False).evaluation


def test_a_meter_counts_storages_from_their_allocation_to_their_release():
    with Meter() as meter:
        a = torch.zeros(1000)
        a.view(10, 100).t().add_(1)  # no new storage
        b = a + a
        meter.hold("more", 500)
        del b
        meter.hold("more", -500)
        c = a @ a
    assert meter.peak == 8000 + 500 and meter.live == 4004
    assert meter.at_peak == {"activations": 8000, "more": 500}
    assert meter.flops == 0 and meter.operations == 4  # zeros, add_, add, dot; torch counts no FLOPs of dot
    with Meter() as meter:
        torch.zeros(2, 3) @ torch.zeros(3, 5)
    assert meter.flops == 2 * 2 * 3 * 5
    del a, c


def test_flops_are_those_of_the_matrix_products():
    """By hand: 2 per weight and row, and the two products of attention."""
    args = settings(**LORA, duration_sec=8.0, num_microbatches=3, prompt={"max_sec": 2.0})
    lm = build_lm(CONFIG, torch.float32)
    add_adapters(lm, 8, 2.0)
    rows = {"transformer.": 125, "text_linear.": 100, "depformer": 100, "linears.": 100}  # per window
    products = 0
    for name, p in lm.named_parameters():
        if p.ndim == 2 and not is_embedding(name):
            products += 2 * p.numel() * next(n for start, n in rows.items() if name.startswith(start))
    attention = 2 * 4 * 125**2 * 64 + 2 * 4 * 8**2 * 48 * 100
    sizes = RunSizes(args, CONFIG, True, 4)
    assert sizes.parameters == sum(p.numel() for n, p in lm.named_parameters() if not is_adapter(n))
    assert sizes.trained == sum(p.numel() for n, p in lm.named_parameters() if is_adapter(n))
    flops = sizes.flops()
    assert flops["forward"] == (products + attention) * 2 * 3 * 4  # batch, microbatches, ranks
    assert flops["recompute"] < flops["forward"] < flops["backward"] < 2 * flops["forward"]


def test_on_a_gpu_no_pass_holds_a_whole_matrix_of_attention_scores():
    """Twice the frames take twice the memory; with whole matrices it would be nearly four times."""
    many_heads = CONFIG | {"num_heads": 32, "context": 3000}
    for checkpointing in (True, False):
        short, long = (
            RunSizes(settings(**LORA, duration_sec=sec, device="auto"), many_heads, False).step(1, checkpointing).peak
            for sec in (72.0, 144.0)
        )
        assert 1.9 < long / short < 2.01


def test_the_largest_batch_is_the_largest():
    for checkpointing in (True, False):
        sizes = RunSizes(settings(**LORA, duration_sec=8.0, device="auto"), CONFIG, True)
        room = 2**29
        largest = sizes.largest_batch(room, checkpointing)
        assert largest > 10
        assert sizes.total(largest, checkpointing) <= room < sizes.total(largest + 1, checkpointing)
    assert sizes.largest_batch(2**20, False) == 0


# --- The command -------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    """A config whose model has only a config.json, and whose data do not exist."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(CONFIG))
    values = LORA | {
        "data": {"train_data": str(tmp_path / "train.jsonl"), "eval_data": str(tmp_path / "eval.jsonl")},
        "moshi_paths": {"hf_repo_id": str(tmp_path / "model")}, "duration_sec": 8, "batch_size": 400,
        "run_dir": str(tmp_path / "run"),
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def plan(capsys, *arguments) -> tuple[int, str]:
    code = main([str(a) for a in arguments])
    return code, capsys.readouterr().out


def test_a_plan_that_does_not_fit_says_what_would_fit(config, capsys):
    room = ("--gpu-memory", 0.5, "--reserve", 0.1)
    code, text = plan(capsys, config, *room)
    assert code == 1
    would = int(re.search(r"batch_size 400 does not fit 0.5 GiB; (\d+) would\n$", text)[1])
    assert plan(capsys, config, *room, f"batch_size={would}")[0] == 0
    few = ("batch_size=2", "do_eval=false", "gradient_checkpointing=false", "--gpu-memory", 0.131, "--reserve", 0.1)
    code, text = plan(capsys, config, *few)
    assert code == 1 and text.endswith("; 1 with gradient_checkpointing: true would\n")
    code, text = plan(capsys, config, "eval_free_samples=20000", *room)
    assert code == 1 and "eval_free_samples: 0" in text
    code, text = plan(capsys, config, "batch_size=2", "--gpu-memory", 0.11, "--reserve", 0.1)
    assert code == 1 and ", nor does 1: " in text and "lora.rank" in text
    assert not (config.parent / "run").exists()


def test_the_settings_are_followed(config, capsys):
    run = (config, "batch_size=2", "--gpu-memory", 1)
    manifest = config.with_name("train.jsonl")
    manifest.write_text('\n{"path": "a.wav", "duration": 10}\n')  # needs Mimi next to the model
    ranks = ("sharding=hybrid", "--gpus", 4, "--gpus-per-node", 2)
    code, text = plan(capsys, *run, "--reserve", 0, "prompt.max_sec=2", "num_microbatches=3", *ranks)
    assert code == 0
    assert "8 codebooks, expanded to 16" in text and "parameters in 2 shards" in text
    assert re.search(r"^note: data.eval_data: .*eval\.jsonl: no such manifest", text, re.M)
    assert "2 x 3 x 4 windows" in text and "of 125 frames (25 of prompt) = 3,000 frames, 51,000 tokens" in text
    assert float(re.search(r"Mimi.* ([\d.]+)\n", text)[1]) == pytest.approx(0.36, abs=0.01)  # GiB, float32
    manifest.write_text('{"path": "a.wav", "duration": 10, "codes_path": "a.safetensors"}\n')
    text = plan(capsys, *run, "--reserve", 0.9, "prompt.max_sec=2", "--no-personaplex", "do_eval=false")[1]
    assert "expanded" not in text and "(0 of prompt)" in text and "free-running" not in text and "Mimi" not in text


@pytest.mark.parametrize(
    ("sharding", "ranks", "per_node", "shards"),
    [("full", 16, 8, 16), ("hybrid", 16, 8, 8), ("hybrid", 16, 4, 4), ("hybrid", 2, 8, 2), ("none", 4, 8, 1)],
)
def test_parameters_are_in_as_many_shards_as_fsdp_makes(sharding, ranks, per_node, shards):
    args = settings(**FULL, sharding=sharding)
    assert RunSizes(args, CONFIG, False, ranks, per_node).shards == shards
    with ranks_of(ranks, min(ranks, per_node)) as world:
        assert make_mesh(world, sharding).size(-1) == shards


def test_larger_batches_than_512_are_not_tried(config, capsys):
    text = plan(capsys, config, "batch_size=1", "--gpu-memory", 1000)[1]
    assert re.search(r"^largest batch_size that fits +512\+ +512\+$", text, re.M)


def test_16_codebooks_are_planned_if_anything_asks_for_them(config):
    model = config.parent / "model/config.json"

    def dep_q_and_prompts(personaplex, *overrides):
        args = load_args(config, [*overrides, f"data.train_data={config}", f"data.eval_data={config}"])
        sizes, _, notes = open_sizes(args, False, personaplex, 1, 8)
        dep_q = sizes.lm.lm.dep_q
        assert bool(notes) == (dep_q != json.loads(model.read_text())["dep_q"])  # says that it expands
        return dep_q, sizes.prompt_frames > 0

    assert dep_q_and_prompts(None) == (8, False)
    assert dep_q_and_prompts(True) == (16, True)
    assert dep_q_and_prompts(None, "prompt.text=Hi.") == (16, True)
    assert dep_q_and_prompts(False, "prompt.text=Hi.") == (8, False)
    model.write_text(json.dumps(CONFIG | {"dep_q": 16}))
    assert dep_q_and_prompts(None) == (16, True)
    assert dep_q_and_prompts(False) == (16, False)


WRONG = ["prompt.max_sec=100", "data.train_data=", "moshi_paths.hf_repo_id=nowhere", "--gpus=0", "--gpu-memory=2"]


@pytest.mark.parametrize("wrong", [*WRONG, "--gpu-memory=nan"])
def test_what_cannot_be_planned_is_one_sentence(config, capsys, wrong):
    with pytest.raises(SystemExit) as end:
        run(lambda: main([str(config), wrong]))
    shown = capsys.readouterr()
    assert end.value.code == 2 and not shown.out
    assert shown.err.startswith("error: ") and wrong.partition("=")[0] in shown.err and shown.err.count("\n") == 1


def test_the_7b_example_is_planned_without_its_weights():
    measure = "import runpy, sys; sys.argv = sys.argv[1:]\ntry: runpy.run_module(sys.argv[0], alter_sys=True, "
    measure += f"run_name='__main__')\nfinally: print({PEAK})"
    done = script("-c", measure, "finetune.tools.plan", "example/personaplex_config.yaml", "--gpu-memory", 80)
    assert "\n8,371,408,896 parameters, 141,770,752 trained" in done.stdout
    assert int(done.stdout.split()[-1]) < 1.5e6  # kB


CARDS = re.findall(r"^\| (\d+) GB.* \| `(.*)` \| ([\d.]+) \|$", (ROOT / "README.md").read_text(), re.M)
assert {int(card) for card, *_ in CARDS} == {12, 16, 24, 32, 40, 80}


@pytest.mark.parametrize(("card", "values", "need"), CARDS)
def test_the_settings_of_readme_for_a_card_fit_it(card, values, need):
    args, live, _ = read_plan_settings(ROOT / "example/personaplex_config.yaml", values.split())
    sizes, *_ = open_sizes(args, live, None, 1, 8)
    total = sizes.total(args.batch_size, args.gradient_checkpointing) / GIB + 3  # GiB of reserve
    assert f"{total:.2f}" == need and total <= int(card) - DRIVER_GIB
    assert args.batch_size * args.num_microbatches == 32


# --- Settings that fit -------------------------------------------------------------------------------------------


FITS = {  # MiB: what is expected
    550: "base_dtype=bf16 batch_size=4 num_microbatches=1 gradient_checkpointing=2",
    180: "base_dtype=bf16 batch_size=1 num_microbatches=4 gradient_checkpointing=[12]",
    100: r"base_dtype=nf4 lora.targets=\[temporal\] duration_sec=40.0 batch_size=1 num_microbatches=4 .*",
    15: None,
}


@pytest.mark.parametrize("room", FITS)
def test_found_settings_fit(config, capsys, room):
    run = (config, "do_eval=false", "duration_sec=80", "batch_size=2", "num_microbatches=2", "--reserve", 0.1)
    code, text = plan(capsys, *run, "--fit", DRIVER_GIB + 0.1 + room / 1024)
    if FITS[room] is None:
        assert code == 1 and len(text.splitlines()) == 1
        return
    *shown, _, found = text.splitlines()
    assert code == 0 and re.fullmatch(FITS[room], found)
    code, again = plan(capsys, *run, "--gpu-memory", 0.1 + room / 1024, *found.split())
    assert code == 0 and again.splitlines() == shown


def test_found_settings_are_the_fastest_that_fit():
    values = LORA | {"duration_sec": 80.0, "batch_size": 4, "device": "auto"}
    sizes, room = RunSizes(settings(**values), CONFIG, False), 400 * 2**20
    every = [(batch, value) for batch in (1, 2, 4) for value in (True, 1, 2, 3, 4, False)]
    fits = [each for each in every if sizes.total(*each, 4) <= room]
    batch, value = min(fits, key=lambda each: sizes.step_sec(*each, 4))
    found = find_fit(lambda more: sizes, room, PEAK_TFLOPS["H100"])
    split = [f"batch_size={batch}", f"num_microbatches={4 // batch}", f"gradient_checkpointing={str(value).lower()}"]
    assert len(fits) in range(2, 18) and found[-3:] == split


def test_a_quantised_base_is_only_found_where_it_can_be_used(config, capsys):
    """Not with shards, nor without LoRA."""
    run = (config, "do_eval=false", "duration_sec=80", "batch_size=1", "--reserve", 0.1, "--fit", DRIVER_GIB + 0.26)
    for more in (["--gpus", 2], ["lora.enable=false", "full_finetuning=true"]):
        code, text = plan(capsys, *run, *more)
        assert code == 1 or "duration_sec" in text.splitlines()[-1]
        assert "nf4" not in text and "int8" not in text


# --- What is counted ---------------------------------------------------------------------------------------------


def test_a_norm_is_one_kernel_on_a_gpu_and_moves_its_inputs_and_outputs():
    x = torch.empty(1, 1000, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    alpha = torch.empty(64, device="meta", dtype=torch.bfloat16)
    with GpuKernels(), Meter() as forward:
        y = rms_norm(x, alpha, 1e-8)
    with GpuKernels(), Meter() as backward:
        torch.autograd.grad(y, x, torch.empty_like(y))
    assert forward.operations == backward.operations == 1 and forward.flops == 0
    assert forward.traffic == pytest.approx(2 * x.nbytes, rel=0.1)
    assert backward.traffic == pytest.approx(3 * x.nbytes, rel=0.1)


def test_traffic_and_the_roofline():
    a, b, table, rows = torch.zeros(256, 512), torch.zeros(512, 128), torch.zeros(10**5, 8), torch.arange(7)
    with Meter() as meter:
        a + b[:, :1].T  # reads both, writes the sum
    assert meter.traffic == 2 * a.nbytes + 4 * 512
    with Meter() as meter:
        torch.empty_like(a).copy_(a)
    assert meter.traffic == 2 * a.nbytes and meter.operations == 1
    with Meter() as meter:
        F.embedding(rows, table)
    assert meter.traffic == 2 * 7 * 8 * 4  # not the table
    with Meter() as meter:
        a @ b
    assert meter.traffic == 0  # of other kernels than products
    moved = a.nbytes + b.nbytes + 4 * 256 * 128
    assert meter.roofline_sec == max(meter.flops / 989e12, moved / 3.35e12)


def test_keeping_more_takes_more_memory_and_less_time():
    sizes = RunSizes(settings(**LORA, duration_sec=80.0, device="auto"), CONFIG, False)
    meters = [sizes.step(2, value) for value in (True, 1, 2, 3, 4, False)]
    for less, more in itertools.pairwise(meters):
        assert less.peak < more.peak and less.roofline_sec > more.roofline_sec and less.operations > more.operations
    assert sizes.step(2, 1) is not sizes.step(2, True)  # although 1 == True
    assert sizes.most_kept(sizes.total(2, 3), 2) == 3 and sizes.most_kept(2**20, 2) == -1


def test_the_plan_says_how_many_layers_fit(config, capsys):
    run = (config, "batch_size=2", "duration_sec=80", "--reserve", 0.1, "--gpu-memory", 0.1 + 345 / 1024)
    code, text = plan(capsys, *run)
    kept = int(re.search(r"; so would gradient_checkpointing: (\d+), in \d\d% of the time$", text)[1])
    assert code == 0 and kept == 2
    assert plan(capsys, *run, "gradient_checkpointing=2")[0] == 0
    assert plan(capsys, *run, "gradient_checkpointing=3")[0] == 1
    code, text = plan(capsys, *run, "gradient_checkpointing=auto")
    assert code == 0 and "planned: 2\n" in text and re.search(r"checkpointing: +true +2 +false\n", text)
    code, text = plan(
        capsys, config, "batch_size=2", "--reserve", 0.01, "gradient_checkpointing=auto", "--gpu-memory", 0.02
    )
    assert code == 1 and "planned: 0\n" in text, "too small for any"
    # Of a quantised base, only what is allowed is shown.
    assert re.search(r"gradient_checkpointing: +true\n", plan(capsys, *run, "base_dtype=nf4")[1])


def test_counting_shows_that_it_lives(config, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SEC", 0.0)
    monkeypatch.setattr(bars, "SHOWN_AFTER_SEC", 0.0)
    main([str(config), "--gpu-memory", "1", "--reserve", "0.1"])
    shown = capsys.readouterr()
    assert shown.err.count("counting:") > 2 and "counting:" not in shown.out


def test_many_passes_over_the_data_are_noted(config, capsys, tmp_path):
    """The windows of all GPUs count: 16 passes over 40 windows on one, and 32 on two."""
    manifest = tmp_path / "calls.jsonl"
    manifest.write_text("".join(f'{{"path": "{i}.wav", "duration": 3, "codes_path": "{i}.pt"}}\n' for i in range(40)))
    run = [config, f"data.train_data={manifest}", "batch_size=1", "num_microbatches=1", "max_steps=640"]
    assert "the run passes" not in plan(capsys, *run, "duration_sec=3")[1]
    assert "the run passes 32 times" in plan(capsys, *run, "duration_sec=3", "--gpus", 2)[1]
