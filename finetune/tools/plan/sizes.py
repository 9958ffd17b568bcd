"""The memory, FLOPs and least time of a run, and the largest batch that fits."""

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from moshi.models import LMGen, loaders
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from finetune.args import PromptArgs, TrainArgs
from finetune.audio.files import to_frames
from finetune.data.prompter import check_context, longest_prompt
from finetune.generate import generation_mode, short_ring
from finetune.lora import is_adapter
from finetune.loss import depformer_steps
from finetune.model.build import build_lm, make_trainable
from finetune.model.pretrained import MOSHI, PERSONAPLEX, Pretrained, lm_kwargs
from finetune.model.products import Linears
from finetune.model.quantised import quantised_linears, refuse_shards
from finetune.model.targets import Targets
from finetune.model.training_lm import TrainingLM
from finetune.profiling import PEAK_TFLOPS
from finetune.streams import DEP_Q, N_STREAMS
from finetune.tools.plan.fsdp import FsdpMemory, fsdp_parameters, sharded_numel
from finetune.tools.plan.meter import GpuKernels, Meter

MAX_BATCH = {"cpu": 64, "meta": 512}  # larger batches are not tried
# Measured on an H100 (NOTES.md, 30): the share of the limits that its kernels reach with 14 to 59 windows in a
# microbatch; and, with one window, the time that Python, autograd and the driver take for each kernel counted here.
REACHED_SHARE = 0.72
LAUNCH_SEC = 70e-6
NVLINK_BYTES = 450e9  # per second and direction, between the H100s of a node (NVIDIA's data sheet)
BUILT_IN = {"kyutai/moshika-pytorch-bf16", MOSHI.default_repo, PERSONAPLEX.default_repo}  # config known to moshi


class RunSizes:
    """The sizes of a run. Memory is in bytes, on rank 0, which has the largest shards.

    Args:
        kwargs: of LMModel.
        prompts: whether windows begin with a prompt.
        ranks_per_node: `sharding: hybrid` shards parameters within a node.
        mimi: encodes audio in training; None: codes are pre-computed.

    Attributes:
        parameters, trained: number of parameters of the model without adapters, and of those that are trained.
        state: what stays in memory, by kind: this rank's share of the weights and of AdamW's two moments. AdamW is
            fused, so that its update needs nothing but the gradients, which are part of the step.
        layers: number of layers of both transformers.
        counted: is called after each pass that was counted.

    In all methods, `checkpointing` is a value of gradient_checkpointing. If `windows` per step and rank are given, the
    microbatches are as many as they take; otherwise num_microbatches.
    """

    def __init__(
        self, args: TrainArgs, kwargs: dict, prompts: bool, ranks: int = 1, ranks_per_node: int = 8,
        mimi: nn.Module | None = None,
    ):  # fmt: skip
        self.args, self.ranks = args, ranks
        nodes = max(1, ranks // ranks_per_node)
        self.shards = {"full": ranks, "hybrid": ranks // nodes, "none": 1}[args.sharding]
        self.frames = to_frames(args.duration_sec)
        self.prompt_frames = longest_prompt(args.prompt) if prompts else 0
        if prompts:
            check_context(args, kwargs.get("context"))
        refuse_shards(args.base_dtype, args.sharding, ranks)
        dtype, on_cpu = getattr(torch, args.param_dtype), args.device == "cpu"
        with torch.device("meta"):  # moshi creates some layers on the default device
            lm = build_lm(kwargs, dtype)
            make_trainable(lm, args)
        quantised = [module for _, module in quantised_linears(lm)]
        self.parameters = sum(p.numel() for name, p in lm.named_parameters() if not is_adapter(name))
        self.parameters += sum(module.in_features * module.out_features for module in quantised)
        self.trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
        self.state = Counter()
        for name, parameter in lm.named_parameters():
            size = sharded_numel(parameter, self.shards) * parameter.element_size()
            kind = "adapters" if is_adapter(name) else "trained weights" if parameter.requires_grad else "frozen"
            self.state[kind] += size
            self.state["moments"] += 2 * size * parameter.requires_grad
        self.state["quantised"] = sum(buffer.nbytes for module in quantised for buffer in module.buffers())
        self.state["mimi"] = sum(t.nbytes for t in (*mimi.parameters(), *mimi.buffers())) if mimi else 0

        self.on_cpu = self.over_gloo = on_cpu
        device = "cpu" if on_cpu else "meta"
        self._fake = FakeTensorMode() if on_cpu else GpuKernels()
        self._tensor = functools.partial(torch.empty, device=device)
        self.max_batch = MAX_BATCH[device]
        with self._fake:  # FSDP casts what it gathers, so that the step sees a single dtype
            for module in lm.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    values = self._tensor(parameter.shape, dtype=dtype)
                    setattr(module, name, nn.Parameter(values, parameter.requires_grad))
            for module in quantised:
                for name, buffer in module.named_buffers():
                    setattr(module, name, self._tensor(buffer.shape, dtype=buffer.dtype))
        self.lm = TrainingLM(lm, args.recomputation)
        self.layers = len(lm.transformer.layers) + len(lm.depformer.layers)
        self.counted: Callable[[], object] = lambda: None
        self._step = functools.lru_cache(None, typed=True)(self._count_step)  # typed: true is not 1 here

    def _forward(self, batch: int) -> Tensor:
        """Return the summed losses of a microbatch in which every frame after the prompt carries loss.

        A third of the frames are words; the split between the two text heads hardly matters.
        """
        tokens = functools.partial(self._tensor, dtype=torch.int64)
        frames, rows = self.prompt_frames + self.frames, batch * self.frames
        words = -(-rows // 3)
        parts = ((1, words), (1, rows - words), (self.lm.lm.dep_q, rows))
        targets = Targets(*(tensor for heads, n in parts for tensor in (tokens(n), tokens(heads, n))))
        codes, mask = tokens(batch, N_STREAMS, frames), tokens(batch, frames).bool()
        return self.lm(codes, mask, targets=targets, steps=depformer_steps(self.args, self.lm.lm.dep_q)).ce.sum()

    def step(self, batch: int, checkpointing: bool | int, windows: int | None = None) -> Meter:
        """Meter the forward and backward pass of the last microbatch of a step."""
        accumulated = self.args.num_microbatches > 1 if windows is None else batch < windows
        return self._step(batch, checkpointing, accumulated)

    def _count_step(self, batch: int, checkpointing: bool | int, accumulated: bool) -> Meter:
        self.lm.gradient_checkpointing = checkpointing
        with self._fake, Meter() as meter:
            every = self.args.reduce_every_microbatch
            memory = FsdpMemory(self.lm, self.shards, meter, accumulated, every, self.on_cpu, self.over_gloo)
            with memory.follow():
                self._forward(batch).backward()
        self.gathered = sum(unit.size for unit in memory.units)
        self.counted()
        return meter

    def step_sec(
        self, batch: int, checkpointing: bool | int, windows: int | None = None, tflops: float = PEAK_TFLOPS["H100"]
    ) -> float:
        """Return the seconds that a step takes, without the optimizer: its kernels as long as on an H100, in proportion
        to the peak of the card, `tflops`; or their launches; and what is sharded is gathered in both passes."""
        meter = self.step(batch, checkpointing, windows)
        microbatches = self.args.num_microbatches if windows is None else windows // batch
        gathering = 2 * self.gathered / NVLINK_BYTES if self.shards > 1 else 0
        kernels = meter.roofline_sec / REACHED_SHARE * PEAK_TFLOPS["H100"] / tflops
        return microbatches * (max(kernels, LAUNCH_SEC * meter.operations) + gathering)

    def flops(self) -> dict[str, int]:
        """Return the FLOPs of a step over all ranks, by pass.

        The gradients of the heads count as backward, and causal attention as if every frame attended to all frames.
        """
        with self._fake, torch.no_grad(), Meter() as forward:
            self._forward(1)
        plain, own = (self.step(1, checkpointing).flops for checkpointing in (False, self.args.recomputation))
        each = {"forward": forward.flops, "backward": plain - forward.flops, "recompute": own - plain}
        windows = self.args.batch_size * self.args.num_microbatches * self.ranks
        return {name: windows * flops for name, flops in each.items()}

    def logits(self, batch: int) -> int:
        """Return the peak of logits, probabilities and gradients in an output head, which works in chunks of rows."""
        lm, rows = self.lm.lm, batch * self.frames
        peaks = []
        for modules in ([lm.text_linear], lm.linears):
            with self._fake:
                head = Linears.of(modules, lm.text_emb.weight.dtype)
                x = self._tensor(len(modules), rows, head.weight.shape[2], dtype=head.weight.dtype, requires_grad=True)
                targets = self._tensor(len(modules), rows, dtype=torch.int64)
                with Meter() as meter:
                    head.loss(x, targets)
            peaks.append(meter.peak)
        return max(peaks)

    @functools.cached_property
    def evaluation(self) -> Counter[str]:
        """What a free-running evaluation needs next to the state; empty without one.

        The parameters that FSDP manages are gathered at once on every rank (evaluate.free_run), and eval_free_samples
        conversations have attention caches.
        """
        if not (self.args.do_eval and self.args.eval_free_samples):
            return Counter()
        lm, samples = self.lm.lm, self.args.eval_free_samples
        columns = self.prompt_frames + to_frames(self.args.eval_free_sec) + 2
        with self._fake, generation_mode(lm), short_ring(lm, columns), Meter() as meter, LMGen(lm).streaming(samples):
            pass  # allocates the caches; a step would take seconds even without memory
        gathered = sum(p.nbytes for p in fsdp_parameters(lm.parameters(), self.shards))
        if self.args.base_dtype == "bf16":
            return Counter(gathered=gathered, caches=meter.peak)
        with self._fake, torch.no_grad(), Meter() as gating:  # which has the largest matrices
            lm.transformer.layers[0].gating(self._tensor(samples, 1, lm.dim, dtype=lm.text_emb.weight.dtype))
        return Counter(gathered=gathered, caches=meter.peak, dequantised=gating.peak)

    def total(self, batch: int, checkpointing: bool | int, windows: int | None = None) -> int:
        """Return the peak of the run, without the streams of Mimi, which adapt to the memory that is free."""
        return self.state.total() + max(self.step(batch, checkpointing, windows).peak, self.evaluation.total())

    def largest_batch(self, room: int, checkpointing: bool | int) -> int:
        """Return the largest batch_size, up to `max_batch`, whose total is at most `room` bytes; 0 if none is."""
        other = min(self.max_batch, max(2, self.args.batch_size))
        return _largest(lambda batch: self.total(batch, checkpointing), room, range(1, self.max_batch + 1), other)

    def most_kept(self, room: int, batch: int, windows: int | None = None) -> int:
        """Return the largest number of layers that can keep their products within `room` bytes; -1 if none fits."""
        total = lambda layers: self.total(batch, layers, windows)
        return _largest(total, room, range(self.layers + 1), self.layers)


def _largest(total: Callable[[int], int], room: int, numbers: range, other: int) -> int:
    """Return the largest of the numbers whose total is at most `room`, or the one before the first if there is none.

    Totals are nearly linear in the number, so that a guess is near; each guess is tried. `other` gives the first slope.
    """
    low, high = numbers.start, numbers.stop
    if total(low) > room:
        return low - 1
    slope = (total(other) - total(low)) // (other - low)
    while high - low > 1:
        guess = low + (room - total(low)) // max(1, slope)
        guess = min(max(guess, low + 1), high - 1)
        low, high = (guess, high) if total(guess) <= room else (low, guess)
        slope = slope if high == numbers.stop else (total(high) - total(low)) // (high - low)
    return low


def open_sizes(
    args: TrainArgs, live: bool, personaplex: bool | None, ranks: int, ranks_per_node: int
) -> tuple[RunSizes, str, list[str]]:
    """Return (sizes, name of the model, notes). Of the known 7B repositories nothing is downloaded.

    Args:
        live: whether training encodes audio.
        personaplex: which script trains; None: PersonaPlex if there are prompt settings or the model has 16 codebooks.
    """
    given = args.prompt != PromptArgs() if personaplex is None else personaplex
    spec, notes = PERSONAPLEX if given else MOSHI, []
    paths = vars(args.moshi_paths) | {"hf_repo_id": args.moshi_paths.hf_repo_id or spec.default_repo}
    checkpoint, repo = Pretrained(**paths), paths["hf_repo_id"]
    known = repo in BUILT_IN and not paths["config_path"] and not Path(repo).is_dir()
    if known and not isinstance(try_to_load_from_cache(repo, "config.json"), str):
        checkpoint.raw_config = {"model_type": "personaplex" if repo == PERSONAPLEX.default_repo else "moshi"}
        notes.append(f"{repo} has no config.json in the hub cache; the built-in 7B configuration is used")
    stored = checkpoint.lm_config.get("dep_q")
    if personaplex is None and stored == DEP_Q:
        spec = PERSONAPLEX
    kwargs = lm_kwargs(checkpoint, spec)
    if stored != kwargs["dep_q"]:
        notes.append(f"{repo} has {stored} codebooks, expanded to {kwargs['dep_q']} on load")
    with torch.device("meta"):
        mimi = loaders.get_mimi(None, checkpoint.mimi_config(), device="meta") if live else None
    return RunSizes(args, kwargs, spec.prompts, ranks, ranks_per_node, mimi), f"{spec.name} ({repo})", notes
