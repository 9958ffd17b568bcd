"""The sizes of a run."""

import functools
from collections import Counter
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from moshi.models import LMGen, loaders
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from finetune.args import PromptArgs, TrainArgs
from finetune.audio.files import FRAME_RATE, to_frames
from finetune.cli import UserError
from finetune.generate import listening
from finetune.lora import add_adapters, is_adapter
from finetune.model.build import build_lm, set_trainable
from finetune.model.pretrained import MOSHI, PERSONAPLEX, lm_kwargs, open_pretrained
from finetune.model.products import Linears
from finetune.model.targets import Targets
from finetune.model.training_lm import TrainingLM
from finetune.optim import is_depth
from finetune.streams import DEP_Q, N_STREAMS
from finetune.tools.plan.fsdp import FsdpMemory, fsdp_parameters, rows_kept
from finetune.tools.plan.meter import GpuAttention, Meter

MOST = {"cpu": 64, "meta": 512}  # windows; larger batches are not tried
BUILT_IN = {"kyutai/moshika-pytorch-bf16", MOSHI.default_repo, PERSONAPLEX.default_repo}


class RunSizes:
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
            lm = build_lm(kwargs, dtype)
            if args.lora.enable:
                add_adapters(lm, args.lora.rank, args.lora.scaling)
        set_trainable(lm, args.full_finetuning, args.lora.ft_embed)
        self.parameters = sum(p.numel() for name, p in lm.named_parameters() if not is_adapter(name))
        self.trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
        self.state, groups = Counter(), Counter()
        for name, parameter in lm.named_parameters():
            size = rows_kept(parameter, self.shards) * parameter.element_size()
            kind = "adapters" if is_adapter(name) else "trained weights" if parameter.requires_grad else "frozen"
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
        plan = Targets(tokens(words), tokens(1, words), tokens(padding), tokens(1, padding), tokens(rows),
                    tokens(dep_q, rows))  # fmt: skip
        return self.lm(tokens(batch, N_STREAMS, frames), tokens(batch, frames).bool(), plan=plan).ce.sum()

    def step(self, batch: int, checkpointing: bool) -> Meter:
        """Forward and backward pass of the last microbatch of a step."""
        if (batch, checkpointing) not in self._steps:
            self.lm.gradient_checkpointing = checkpointing
            with (
                self._fake,
                Meter() as meter,
                FsdpMemory(
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
                head = Linears.of(modules, lm.text_emb.weight.dtype)
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
        return Counter(whole=sum(p.nbytes for p in fsdp_parameters(lm.parameters(), self.shards)), caches=meter.peak)

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


def open_sizes(
    args: TrainArgs, live: bool, personaplex: bool | None, ranks: int, node: int
) -> tuple[RunSizes, str, list[str]]:
    """(sizes, name of the model, notes). Nothing is fetched from the 7B repositories that are known."""
    wanted = args.prompt != PromptArgs() if personaplex is None else personaplex
    spec, notes = PERSONAPLEX if wanted else MOSHI, []
    paths = vars(args.moshi_paths) | {"hf_repo_id": args.moshi_paths.hf_repo_id or spec.default_repo}
    checkpoint, repo = open_pretrained(**paths), paths["hf_repo_id"]
    known = repo in BUILT_IN and not paths["config_path"] and not Path(repo).is_dir()
    if known and not isinstance(try_to_load_from_cache(repo, "config.json"), str):
        checkpoint.raw_config = {"model_type": "personaplex" if repo == PERSONAPLEX.default_repo else "moshi"}
        notes.append(f"{repo} has no config.json in the hub cache; taken as the built-in 7B configuration")
    stored = checkpoint.lm_config.get("dep_q")
    if personaplex is None and stored == DEP_Q:
        spec = PERSONAPLEX
    kwargs = lm_kwargs(checkpoint, spec)
    if stored != kwargs["dep_q"]:
        notes.append(f"{repo} has {stored} codebooks, expanded to {kwargs['dep_q']} on load")
    with torch.device("meta"):
        mimi = loaders.get_mimi(None, checkpoint.mimi_config(), device="meta") if live else None
    return RunSizes(args, kwargs, spec.prompts, ranks, node, mimi), f"{spec.name} ({repo})", notes
