"""What a run needs, told before a GPU is rented: parameters, FLOPs, memory, and the largest batch that fits.

    python -m finetune.plan config.yaml --gpus 8 --gpu-memory 80
    python -m finetune.plan config.yaml batch_size=4 sharding=none --gpus 2

The training step itself runs, forward and backward, on tensors without memory, and each is counted from its making to
its freeing: on torch's meta device with a GPU's chunk sizes and flash attention, or, with `device: cpu`, on fake CPU
tensors. What FSDP keeps beside them is added where it would gather, free and reduce. Of the model only config.json is
read (the built-in 7B configuration where the hub's is not in the cache). The data need not be there yet.

Every window counts at its longest: duration_sec, and for PersonaPlex prompt.max_sec before it. --reserve stands for
what is not counted: the CUDA context, NCCL, fragmentation, `compile: true`.

Exit code 0: it fits. 1: it does not. 2: the config cannot be used.
"""

import argparse
import contextlib
import functools
import json
import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from moshi.models import LMGen, loaders
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from finetune import lora, model
from finetune.args import PromptArgs, TrainArgs, load_args, parse_sources, parse_yaml
from finetune.cli import Parser, UserError, run
from finetune.data.audio import FRAME_RATE, to_frames
from finetune.data.manifest import open_text
from finetune.fast import Plan, TrainingLM, _Linears
from finetune.generate import listening
from finetune.optim import is_depth
from finetune.personaplex import DEP_Q, N_STREAMS

GIB = 2**30
MOST = {"cpu": 64, "meta": 512}  # windows; larger batches are not tried
BUILT_IN = {"kyutai/moshika-pytorch-bf16", model.MOSHI.default_repo, model.PERSONAPLEX.default_repo}

# --- 1. Counting a step ------------------------------------------------------------------------------------------

_aten = torch.ops.aten
_FLASH_BACKWARD = _aten._scaled_dot_product_flash_attention_backward
_FLOPS = flop_registry | {
    _aten.baddbmm_: flop_registry[_aten.baddbmm],
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[_FLASH_BACKWARD],
}


class Meter(TorchDispatchMode):
    """FLOPs of all matrix products, the number of operations that are no views, and the bytes of the tensors made
    under it, at their most.

    `held` are bytes that others hold at a time, by kind; `fullest` is what there was, by kind, at the fullest point.
    """

    def __init__(self):
        super().__init__()
        self.flops = self.operations = self.live = self.peak = 0
        self.held: Counter[str] = Counter()
        self.fullest: Counter[str] = Counter()
        self._storages: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        self.operations += not (func.is_view or packet is _aten._unsafe_view)
        if packet in _FLOPS:
            self.flops += _FLOPS[packet](*args, **kwargs, out_val=out)
        if packet is _FLASH_BACKWARD:  # sums dq in float32 (pytorch, flash_attn/flash_api.cpp: dq_accum)
            self._note(4 * args[1].numel())
        given = {id(t.untyped_storage()) for t in args if isinstance(t, Tensor)}
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, Tensor) and not func.is_view and id(tensor.untyped_storage()) not in given:
                self._add(tensor.untyped_storage())
        return out

    def hold(self, kind: str, size: int) -> None:
        """Adds bytes of a kind; negative: takes them away."""
        self.held[kind] += size
        self._note()

    def _add(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self._storages:
            key, size = id(storage), storage.nbytes()
            self._storages[key] = weakref.finalize(storage, self._remove, key, size)
            self.live += size
            self._note()

    def _remove(self, key: int, size: int) -> None:
        del self._storages[key]
        self.live -= size

    def _note(self, extra: int = 0) -> None:
        total = self.live + extra + self.held.total()
        if total > self.peak:
            self.peak, self.fullest = total, Counter(activations=self.live + extra) + self.held


class GpuAttention(TorchFunctionMode):
    """Attention by the kernels that a GPU takes; on the meta device torch would compute whole score matrices."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v, mask = args
        if mask is None:
            return _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
        bias = torch.zeros_like(mask, dtype=q.dtype).expand(*q.shape[:2], *mask.shape)
        return _aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]


def cut(parameter: Tensor, shards: int) -> int:
    """Elements that rank 0 keeps of a parameter: FSDP2 cuts rows, and fills up the last ranks' (one row at least)."""
    return -(-parameter.shape[0] // shards) * math.prod(parameter.shape[1:])


def gathered(parameters: Iterable[nn.Parameter], shards: int) -> list[nn.Parameter]:
    """Those that FSDP takes part in (see distributed.shard)."""
    return [p for p in parameters if p.requires_grad or shards > 1]


class Unit:
    """The parameters that FSDP gathers and frees together: a layer's, or all others'. `size`: bytes when whole, in the
    dtype of the computation; `gradient`: of the trained ones, whole and in float32; `uneven`: of gradients whose rows
    cannot be shared out evenly."""

    def __init__(self, parameters: list[nn.Parameter], shards: int):
        self.trained = [p for p in parameters if p.requires_grad]
        self.size = sum(shards * cut(p, shards) * p.element_size() for p in parameters)
        self.gradient = 4 * sum(shards * cut(p, shards) for p in self.trained)
        self.uneven = [p for p in self.trained if p.shape[0] % shards]
        self.is_whole = False

    def forget_gradients(self) -> None:
        for parameter in self.trained:
            parameter.grad = None


class Fsdp:
    """What `fully_shard` holds beside the tensors of a step, on a model that is not sharded: the same events in the
    same order as torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py (2.9). Gathering goes by way of a flat copy,
    unless a shard is the whole; in the forward pass it lives until the next one, in the backward pass the next layer's
    is there already. The other parameters (embeddings, heads) stay whole from start to end.

    Args:
        accumulated: microbatches before have left their gradients: whole ones, in float32, until the last is reduced.
        on_cpu: there uneven gradients are copied to be filled up (torch._chunk_cat).
        over_gloo: which works on a copy of what it gathers or reduces, unlike NCCL.
    """

    def __init__(
        self, lm: TrainingLM, shards: int, meter: Meter, accumulated: bool, on_cpu: bool, over_gloo: bool
    ):
        self.meter, self.shards, self.accumulated = meter, shards, accumulated
        self.on_cpu, self.over_gloo = on_cpu, over_gloo
        self.layers = [*lm.lm.transformer.layers, *lm.lm.depformer.layers]
        inside = {id(p) for layer in self.layers for p in layer.parameters()}
        others = [p for p in lm.parameters() if id(p) not in inside]
        parts = [*(layer.parameters() for layer in self.layers), others]
        self.units = [Unit(gathered(part, shards), shards) for part in parts]
        self.flat = self.reducing = 0

    @contextlib.contextmanager
    def follow(self) -> Iterator[None]:
        """Follows one forward and backward pass."""
        handles = []
        for i, layer in enumerate(self.layers):
            handles.append(layer.register_forward_pre_hook(functools.partial(self._enter, i)))
            handles.append(layer.register_forward_hook(functools.partial(self._leave, i)))
        if self.accumulated:
            self.meter.hold("gradients", sum(unit.gradient for unit in self.units))
        self._gather(self.units[-1])
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for unit in [self.units[-1], *self.units]:  # the layers whose inputs need no gradient last
            self._reduce(unit)
        self.meter.hold("gathered", -self.reducing)

    def _gather(self, unit: Unit) -> None:
        copy = unit.size * (self.shards > 1)
        self.meter.hold("gathered", copy)
        self._copy(copy * self.over_gloo)
        self.meter.hold("gathered", unit.size - self.flat)
        self.flat, unit.is_whole = copy, True

    def _copy(self, size: int) -> None:
        self.meter.hold("gathered", size)
        self.meter.hold("gathered", -size)

    def _enter(self, i: int, layer: nn.Module, args: tuple[Tensor]) -> None:
        self._gather(self.units[i])
        if args[0].requires_grad:
            args[0].register_hook(lambda _: self._reduce(self.units[i]))

    def _leave(self, i: int, layer: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        self._free(self.units[i])
        y.register_hook(lambda _: self._again(i))

    def _again(self, i: int) -> None:
        for later in self.units[i + 1 : -1]:  # its own hook, on the same tensor, comes after this one
            self._reduce(later)
        self.meter.hold("gathered", self.units[i].size)
        self.meter.hold("gathered", -self.flat)
        self.units[i].is_whole = True
        self.flat = self.units[i - 1].size if i and self.shards > 1 else 0
        self.meter.hold("gathered", self.flat)

    def _free(self, unit: Unit) -> None:
        self.meter.hold("gathered", -unit.size * unit.is_whole)
        unit.is_whole = False

    def _reduce(self, unit: Unit) -> None:
        if not unit.is_whole:
            return
        self._free(unit)
        if unit.trained:
            if self.accumulated:  # they were added to those before
                unit.forget_gradients()
            self.meter.hold("gathered", -self.reducing)
            self.reducing = unit.gradient
            self.meter.hold("gathered", self.reducing)
            self._copy(self.on_cpu * sum(4 * p.numel() if self.accumulated else p.nbytes for p in unit.uneven))
            unit.forget_gradients()
            self.meter.hold("gradients", unit.gradient // self.shards - unit.gradient * self.accumulated)
            self._copy(unit.gradient * self.over_gloo)


# --- 2. A run ----------------------------------------------------------------------------------------------------


class Run:
    """The sizes of a run. Memory is in bytes, of rank 0, which keeps the most.

    Args:
        kwargs: of LMModel.
        prompts: whether windows begin with a prompt.
        ranks, node: processes in all, and of one node (`sharding: hybrid` cuts parameters within it).
        mimi: makes codes in training; None: they are pre-computed.

    Attributes:
        parameters, trained: numbers of them, of the model without adapters, and of what is trained.
        state: what stays on a rank: its part of the weights and of AdamW's two moments, by kind.
        update: what AdamW's update has beside the state.
    """

    def __init__(
        self, args: TrainArgs, kwargs: dict, prompts: bool, ranks: int = 1, node: int = 8, mimi: nn.Module | None = None
    ):
        self.args, self.ranks = args, ranks
        self.shards = {"full": ranks, "hybrid": ranks // max(1, ranks // node), "none": 1}[args.sharding]
        self.frames = to_frames(args.duration_sec)
        self.prompt_frames = int(args.prompt.max_sec * FRAME_RATE) if prompts else 0
        context = kwargs.get("context")
        if prompts and context and self.frames + self.prompt_frames > context:
            raise UserError(
                f"duration_sec {args.duration_sec:g} and prompt.max_sec {args.prompt.max_sec:g} together exceed what "
                f"the model attends to ({context / FRAME_RATE:g} s); shorten one"
            )
        dtype, on_cpu = getattr(torch, args.param_dtype), args.device == "cpu"
        with torch.device("meta"):  # moshi makes some layers on the default device
            lm = model.build_lm(kwargs, dtype)
            if args.lora.enable:
                lora.add_adapters(lm, args.lora.rank, args.lora.scaling)
        model.set_trainable(lm, args.full_finetuning, args.lora.ft_embed)
        self.parameters = sum(p.numel() for name, p in lm.named_parameters() if not lora.is_adapter(name))
        self.trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
        self.state, groups = Counter(), Counter()
        for name, parameter in lm.named_parameters():
            size = cut(parameter, self.shards) * parameter.element_size()
            kind = "adapters" if lora.is_adapter(name) else "trained weights" if parameter.requires_grad else "frozen"
            self.state[kind] += size
            self.state["moments"] += 2 * size * parameter.requires_grad
            groups[is_depth(name), name.endswith("alpha")] += size * parameter.requires_grad  # as build_optimizer's
        self.state["mimi"] = sum(t.nbytes for t in (*mimi.parameters(), *mimi.buffers())) if mimi else 0
        # Beside the gradients: without a fused kernel the roots of a group's second moments exist at once.
        self.update = self.state["moments"] // 2 + max(groups.values()) * on_cpu

        self.on_cpu = self.over_gloo = on_cpu
        self._fake = FakeTensorMode() if on_cpu else GpuAttention()
        self._tensor = functools.partial(torch.empty, device="cpu" if on_cpu else "meta")
        self.most = MOST["cpu" if on_cpu else "meta"]
        with self._fake:  # FSDP casts what it gathers: the step sees one dtype
            for module in lm.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    values = self._tensor(parameter.shape, dtype=dtype)
                    setattr(module, name, nn.Parameter(values, parameter.requires_grad))
        self.lm = TrainingLM(lm, args.gradient_checkpointing)
        self._steps: dict[tuple[int, bool], Meter] = {}

    def _forward(self, batch: int) -> Tensor:
        """The summed losses of a microbatch in which all frames behind the prompts carry loss, a third of them words
        (how the two text heads share the frames hardly matters)."""
        tokens = functools.partial(self._tensor, dtype=torch.int64)
        frames, rows = self.prompt_frames + self.frames, batch * self.frames
        words, padding, dep_q = -(-rows // 3), rows - -(-rows // 3), self.lm.lm.dep_q
        plan = Plan(tokens(words), tokens(1, words), tokens(padding), tokens(1, padding), tokens(rows),
                    tokens(dep_q, rows))  # fmt: skip
        return self.lm(tokens(batch, N_STREAMS, frames), tokens(batch, frames).bool(), plan=plan).ce.sum()

    def step(self, batch: int, checkpointing: bool) -> Meter:
        """Forward and backward pass of the last microbatch of a step."""
        if (batch, checkpointing) not in self._steps:
            self.lm.gradient_checkpointing = checkpointing
            with (
                self._fake,
                Meter() as meter,
                Fsdp(
                    self.lm, self.shards, meter, self.args.num_microbatches > 1, self.on_cpu, self.over_gloo
                ).follow(),
            ):
                torch.autograd.backward(self._forward(batch))  # Tensor.backward would leave GpuAttention in it
            self._steps[batch, checkpointing] = meter
        return self._steps[batch, checkpointing]

    def flops(self) -> dict[str, int]:
        """Of a step over all ranks. The heads' gradients count as backward, causal attention as if all was attended."""
        with self._fake, torch.no_grad(), Meter() as forward:
            self._forward(1)
        plain, checkpointed = (self.step(1, checkpointing).flops for checkpointing in (False, True))
        each = {"forward": forward.flops, "backward": plain - forward.flops, "recompute": checkpointed - plain}
        windows = self.args.batch_size * self.args.num_microbatches * self.ranks
        return {name: windows * flops for name, flops in each.items()}

    def heads(self, batch: int) -> int:
        """Most bytes of logits, probabilities and gradients in a head: of a chunk at a time (see fast._HeadLoss)."""
        lm, rows = self.lm.lm, batch * self.frames
        peaks = []
        for modules in ([lm.text_linear], lm.linears):
            with self._fake:
                head = _Linears.of(modules, lm.text_emb.weight.dtype)
                x = self._tensor(len(modules), rows, head.weight.shape[2], dtype=head.weight.dtype, requires_grad=True)
                targets = self._tensor(len(modules), rows, dtype=torch.int64)
                with Meter() as meter:
                    head.loss(x, targets)
            peaks.append(meter.peak)
        return max(peaks)

    @functools.cached_property
    def evaluation(self) -> Counter[str]:
        """What a free-running evaluation has beside the state: all that is gathered at once on each rank
        (evaluate.free_run), and the attention caches of eval_free_samples conversations. Empty without one."""
        if not (self.args.do_eval and self.args.eval_free_samples):
            return Counter()
        lm, samples = self.lm.lm, self.args.eval_free_samples
        with self._fake, listening(lm), Meter() as meter, LMGen(lm).streaming(samples):
            pass  # a step would take seconds even without memory
        return Counter(whole=sum(p.nbytes for p in gathered(lm.parameters(), self.shards)), caches=meter.peak)

    def total(self, batch: int, checkpointing: bool) -> int:
        """Bytes at the fullest point of the run. Mimi's streams take what is free, so they are no part of it."""
        passing = self.step(batch, checkpointing).peak, self.update, self.evaluation.total()
        return self.state.total() + max(passing)

    def largest_batch(self, room: int, checkpointing: bool) -> int:
        """The largest batch_size that takes no more than `room` bytes, up to `most`; 0 if not even 1 does."""
        fits = lambda batch: self.total(batch, checkpointing) <= room
        peak = lambda batch: self.step(batch, checkpointing).peak
        if not fits(1):
            return 0
        # A window adds as much as the one before it, but for chunks: guesses are near, and each is tried.
        low, high, other = 1, self.most + 1, min(self.most, max(2, self.args.batch_size))
        slope = (peak(other) - peak(1)) // (other - 1)
        while high - low > 1:
            guess = low + (room - self.state.total() - peak(low)) // max(1, slope)
            guess = min(max(guess, low + 1), high - 1)
            low, high = (guess, high) if fits(guess) else (low, guess)
            slope = slope if high > self.most else (peak(high) - peak(low)) // (high - low)
        return low


# --- 3. The command ----------------------------------------------------------------------------------------------


def read_settings(config: str, overrides: list[str]) -> tuple[TrainArgs, bool, list[str]]:
    """(settings, whether codes are made in training, notes). Manifests that are not there yet count as pre-computed.
    Raises UserError for all other problems."""
    notes, live, given = [], False, {}
    with contextlib.suppress(Exception):  # load_args tells what is wrong with the file
        given = dict(parse_yaml(Path(config).read_text())["data"])
    given |= {key.removeprefix("data."): value for key, _, value in (o.partition("=") for o in overrides)}
    for key in ("train_data", "eval_data"):
        try:
            for path, _ in parse_sources(str(given.get(key) or "")):
                with open_text(path) as lines:
                    live |= '"codes_path"' not in next(filter(str.strip, lines), '"codes_path"')
        except UserError as error:
            if "no such manifest" in str(error):
                notes.append(f"data.{key}: {error}; taken as pre-computed")
                overrides = [*overrides, f"data.{key}={json.dumps(str(config))}"]  # any file that is there
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"data.{key}: {path} cannot be read ({error})") from None
    return load_args(config, overrides), live, notes


def open_run(
    args: TrainArgs, live: bool, personaplex: bool | None, ranks: int, node: int
) -> tuple[Run, str, list[str]]:
    """(sizes, name of the model, notes). Nothing is fetched from the 7B repositories that are known."""
    wanted = args.prompt != PromptArgs() if personaplex is None else personaplex
    spec, notes = model.PERSONAPLEX if wanted else model.MOSHI, []
    paths = vars(args.moshi_paths) | {"hf_repo_id": args.moshi_paths.hf_repo_id or spec.default_repo}
    checkpoint, repo = model.open_checkpoint(**paths), paths["hf_repo_id"]
    known = repo in BUILT_IN and not paths["config_path"] and not Path(repo).is_dir()
    if known and not isinstance(try_to_load_from_cache(repo, "config.json"), str):
        checkpoint.raw_config = {"model_type": "personaplex" if repo == model.PERSONAPLEX.default_repo else "moshi"}
        notes.append(f"{repo} has no config.json in the hub cache; taken as the built-in 7B configuration")
    stored = checkpoint.lm_config.get("dep_q")
    if personaplex is None and stored == DEP_Q:
        spec = model.PERSONAPLEX
    kwargs = model.lm_kwargs(checkpoint, spec)
    if stored != kwargs["dep_q"]:
        notes.append(f"{repo} has {stored} codebooks, expanded to {kwargs['dep_q']} on load")
    with torch.device("meta"):
        mimi = loaders.get_mimi(None, checkpoint.mimi_config(), device="meta") if live else None
    return Run(args, kwargs, spec.prompts, ranks, node, mimi), f"{spec.name} ({repo})", notes


def tell(sizes: Run, name: str, memory: int, reserve: int) -> tuple[str, bool]:
    """(the plan as text, whether the run fits `memory` bytes, of which `reserve` stay free)."""
    args, state, evaluation, flops = sizes.args, sizes.state, sizes.evaluation, sizes.flops()
    windows, frames = args.batch_size * args.num_microbatches * sizes.ranks, sizes.frames + sizes.prompt_frames
    steps = [sizes.step(args.batch_size, checkpointing) for checkpointing in (True, False)]
    totals = [sizes.total(args.batch_size, checkpointing) + reserve for checkpointing in (True, False)]
    largest = [sizes.largest_batch(memory - reserve, checkpointing) for checkpointing in (True, False)]
    rows = [
        (f"frozen weights, {args.param_dtype}", state["frozen"]),
        ("adapters, float32", state["adapters"]),
        ("trained weights, float32", state["trained weights"]),
        ("AdamW's moments, float32", state["moments"]),
        ("Mimi, which makes codes in training", state["mimi"]),
        ("a step at its fullest point", *(step.peak for step in steps)),
        ("    activations", *(step.fullest["activations"] for step in steps)),
        ("      logits and their gradients, when fullest", sizes.heads(args.batch_size)),
        ("    FSDP's whole layers and buffers", *(step.fullest["gathered"] for step in steps)),
        ("    gradients, float32", *(step.fullest["gradients"] for step in steps)),
        ("or AdamW's update", sizes.update),
        ("or a free-running evaluation", evaluation.total()),
        (f"    what it gathers of the model, {args.param_dtype}", evaluation["whole"]),
        (f"    caches of {args.eval_free_samples} conversations", evaluation["caches"]),
        ("reserve", reserve),
        ("sum: what stays, the fullest of the others, reserve", *totals),
    ]
    shown = lambda size: f"{size / GIB:.2f}" if size >= 0.1 * GIB else f"{size / GIB:.2g}"
    table = [(f"GiB on a rank, batch_size {args.batch_size}", "checkpointing", "without")]
    table += [(label, shown(sums[0]), shown(sums[-1])) for label, *sums in rows if any(sums)]
    table += [
        (f"fits {memory / GIB:g} GiB", *("yes" if total <= memory else "no" for total in totals)),
        (
            "largest batch_size that fits",
            *(f"{batch or 'none'}{' or more' * (batch == sizes.most)}" for batch in largest),
        ),
    ]
    chosen = 0 if args.gradient_checkpointing else 1
    verdict = f"batch_size {args.batch_size} does not fit {memory / GIB:g} GiB"
    if totals[chosen] <= memory:
        verdict = f"fits {memory / GIB:g} GiB"
    elif largest[chosen]:
        verdict += f"; {largest[chosen]} would"
    elif largest[0]:
        verdict += f"; {largest[0]} with gradient_checkpointing: true would"
    elif state.total() + max(sizes.step(1, args.gradient_checkpointing).peak, sizes.update) + reserve <= memory:
        verdict += ", nor does the free-running evaluation (eval_free_samples: 0 leaves it out)"
    else:
        less = "a smaller lora.rank" if args.lora.enable else "LoRA"
        verdict += ", nor does 1" * (args.batch_size > 1) + f": take more ranks, {less} or shorter windows"
    lines = [
        f"{name} on {sizes.ranks} {'CPU' if args.device == 'cpu' else 'GPU'} ranks, sharding {args.sharding}: "
        f"parameters cut in {sizes.shards}",
        f"{sizes.parameters:,} parameters, {sizes.trained:,} trained ({sizes.trained / sizes.parameters:.2%})",
        f"a step: {args.batch_size} x {args.num_microbatches} x {sizes.ranks} windows (batch x microbatches x ranks) "
        f"of {frames:,} frames ({sizes.prompt_frames} of prompt) = {windows * frames:,} frames, "
        f"{windows * frames * N_STREAMS:,} tokens",
        "PFLOP a step: " + ", ".join(f"{kind} {count / 1e15:.4g}" for kind, count in flops.items()),
        "",
        *(f"{label:<54}{on:>14}{off:>10}" for label, on, off in table),
        "",
        verdict,
    ]
    return "\n".join(lines), totals[chosen] <= memory


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("config", help="YAML file of settings, the one that training gets")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings in place of the file's")
    parser.add_argument("--gpus", type=int, default=1, help="ranks, of all nodes together")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="within which sharding: hybrid cuts parameters")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="of one GPU, in GiB")
    parser.add_argument("--reserve", type=float, default=3.0, help="GiB of it that stay free")
    parser.add_argument(
        "--personaplex", action=argparse.BooleanOptionalAction,
        help="for train_personaplex.py; if absent: where the settings speak of prompts or the model has 16 codebooks",
    )  # fmt: skip
    given = parser.parse_args(argv)
    if min(given.gpus, given.gpus_per_node) < 1:
        raise UserError(f"--gpus {given.gpus}, --gpus-per-node {given.gpus_per_node}: must be at least 1")
    if not 0 <= given.reserve < given.gpu_memory < math.inf:
        raise UserError(f"--gpu-memory {given.gpu_memory:g}: must be more than --reserve {given.reserve:g}")
    args, live, notes = read_settings(given.config, given.overrides)
    sizes, name, more = open_run(args, live, given.personaplex, given.gpus, given.gpus_per_node)
    text, fits = tell(sizes, name, int(given.gpu_memory * GIB), int(given.reserve * GIB))
    print("\n".join([*(f"note: {note}" for note in notes + more), text]))
    return int(not fits)


if __name__ == "__main__":
    run(main)
