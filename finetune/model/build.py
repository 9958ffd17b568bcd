"""Building a model on the meta device, and filling it from its weight file."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from moshi.models import LMModel
from torch import Tensor, nn

from finetune.args import TrainArgs
from finetune.cli import UserError
from finetune.distributed import local_rows
from finetune.lora import add_adapters, initial_adapter, is_adapter, is_embedding, part_of, stock_name
from finetune.model.expansion import NEW_EMBEDDING, expansion_sources
from finetune.model.quantised import QuantisedLinear, quantise_layers, quantised_linears
from finetune.model.weights import WeightFile
from finetune.optim import is_depth, peak_rate
from finetune.progress import tracked
from finetune.streams import CODEBOOKS, DEP_Q

_COPY_AGAIN = "download or copy the file again"
WORKER_BYTES = 8 << 20  # private memory of a process that reads data, at least (12 MB measured, Linux, torch 2.9)
READERS = 2  # one waits for the disk while the kernel clears the memory that the other reads into


class StoredWeights:
    """A weight file as a model with `dep_q` depformer steps needs it: split names, 8 steps `expanded` to 16."""

    def __init__(self, path: Path, dep_q: int):
        self.file = WeightFile(path)
        stored = self.file.dep_q
        if stored == dep_q:
            self.sources: dict[str, str | None] = {name: name for name in self.file.slots}
        elif stored == CODEBOOKS and dep_q == DEP_Q:
            try:
                self.sources = expansion_sources(set(self.file.slots))
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
        else:
            raise UserError(f"{path}: has {stored} depformer steps, but the model has {dep_q}; check moshi_paths")
        self.expanded = stored != dep_q

    def __str__(self) -> str:
        family = "PersonaPlex" if self.file.dep_q == DEP_Q else "Moshi"
        change = f"expanded to {DEP_Q}" if self.expanded else "loaded unchanged"
        return f"{self.file.path}: {family} weights ({self.file.dep_q} codebooks), {change}"

    def check(self, shapes: dict[str, torch.Size]) -> None:
        """Raise UserError unless the file holds exactly these parameters, in these shapes."""
        problems = [f"no {name}" for name in sorted(shapes.keys() - self.sources.keys())]
        problems += [f"an unknown {name}" for name in sorted(self.sources.keys() - shapes.keys())]
        for name, source in self.sources.items():
            if source is not None and name in shapes and shapes[name] != (stored := self.file.slots[source].shape):
                problems.append(f"{name} of shape {list(stored)} instead of {list(shapes[name])}")
        quantised = [name for name, slot in self.file.slots.items() if not slot.dtype.is_floating_point]
        problems += [f"{name} as {self.file.slots[name].dtype}, which is quantised" for name in quantised]
        if problems:
            more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
            raise UserError(
                f"{self.file.path}: does not fit the model's config: it has {'; '.join(problems[:4])}{more}; weights "
                "and config.json must come from the same model"
            )

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out` with the rows of a parameter from `start` on."""
        source = self.sources[name]
        if source is None:
            out.zero_()
        else:
            self.file.read_into(source, start, out)


def build_lm(kwargs: dict, dtype: torch.dtype) -> LMModel:
    """Build an LMModel on the meta device. Raises UserError if moshi refuses the arguments."""
    try:
        with torch.device("meta"):  # parts of moshi make tensors on the default device first: 1 GB at 7B
            return LMModel(device="meta", dtype=dtype, **{k: v for k, v in kwargs.items() if k != "device"})
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"the LM config does not fit moshi's LMModel: {error or type(error).__name__}") from None


def make_trainable(lm: nn.Module, args: TrainArgs) -> None:
    """Add the adapters of `lora` to a meta-device model, quantise what base_dtype says, and choose what is trained: not
    what has no rate or no loss, which weight decay alone would change. Raises UserError if that leaves nothing."""

    def learns(name: str) -> bool:
        weight = args.audio_loss_weight if is_depth(name) else args.text_loss_weight or name != "text_linear.weight"
        return peak_rate(name, args.optim) > 0 and weight > 0

    if args.lora.enable:
        rank = lambda name: args.lora.rank_of(part_of(name)) if learns(f"{name}.weight") else 0
        add_adapters(lm, rank, args.lora.scaling)
    if args.base_dtype != "bf16":
        quantise_layers(lm, args.base_dtype)
    set_trainable(lm, args.full_finetuning, args.lora.ft_embed, learns)
    if not any(parameter.requires_grad for parameter in lm.parameters()):
        found = "nothing is trained: what lora.targets names has no loss or no learning rate"
        raise UserError(f"{found} (text_loss_weight, audio_loss_weight, optim.depformer_lr, optim.heads_lr)")


def set_trainable(lm: nn.Module, full: bool, ft_embed: bool, learns: Callable[[str], bool] = lambda _: True) -> None:
    """Choose the parameters to train and make them float32: all if `full`, otherwise adapters, with `ft_embed` (of
    moshi-finetune) also embedding tables; of these only what `learns`, given its name. The others keep their dtype."""
    for name, parameter in lm.named_parameters():
        chosen = full or is_adapter(name) or (ft_embed and is_embedding(name))
        parameter.requires_grad_(chosen and learns(name))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def load_weights(
    lm: nn.Module, weights: StoredWeights, seed: int, gather: Callable[[set], list[set]] = lambda own: [own]
) -> None:
    """Fill a model that `to_empty` gave memory: the base from the file, adapters with their initial values. Quantised
    weights are quantised as they are read, a few rows at a time.

    Each rank reads only its own rows; `gather` collects a value of each rank. Raises UserError if the file holds other
    parameters, or values that no training has left: NaN, infinity, or a whole tensor of zeros.
    """
    zero: set[str] = set()
    quantised = dict(quantised_linears(lm))
    shapes = {stock_name(n): p.shape for n, p in lm.named_parameters() if not is_adapter(n)}
    shapes |= {stock_name(n): torch.Size((m.out_features, m.in_features)) for n, m in quantised.items()}
    weights.check(shapes)

    def read(name: str, start: int, out: Tensor) -> bool:
        """Fill `out` with rows; return whether all are zero."""
        weights.read_into(name, start, out)
        lowest, highest = torch.aminmax(out) if out.numel() else (out.sum(), out.sum())  # NaN if one is NaN
        if not (lowest.isfinite() and highest.isfinite()):
            raise UserError(f"{weights.file.path}: {name} holds values that are not finite; {_COPY_AGAIN}")
        return bool(lowest == highest == 0)

    def fill(named: tuple[str, nn.Parameter | QuantisedLinear]) -> None:
        name, parameter = named
        if isinstance(parameter, QuantisedLinear):
            zeros: list[bool] = []
            parameter.fill(lambda start, out: zeros.append(read(stock_name(name), start, out)))
            if all(zeros):
                zero.add(stock_name(name))
            return
        start, local = local_rows(parameter)
        if is_adapter(name):
            local.copy_(initial_adapter(name, parameter.shape, seed)[start : start + local.shape[0]])
            return
        if read(stock_name(name), start, local):
            zero.add(stock_name(name))

    every = [*lm.named_parameters(), *quantised.items()]
    size = lambda named: shapes.get(stock_name(named[0]), torch.Size()).numel()
    with ThreadPoolExecutor(READERS) as readers:
        filled = zip(every, readers.map(torch.no_grad()(fill), every))
        list(tracked(filled, "loading weights", sum(map(size, every)), lambda pair: size(pair[0])))
    if zero := sorted(set.intersection(*gather(zero)) - {NEW_EMBEDDING}):
        more = f" and {len(zero) - 1} more tensors" if len(zero) > 1 else ""
        raise UserError(f"{weights.file.path}: {zero[0]}{more} hold nothing but zeros; {_COPY_AGAIN}")


def check_memory(lm: LMModel, device: torch.device, ranks: int, frames: float = 0, workers: int = 0) -> None:
    """Raise UserError if a step certainly needs more memory than there is: less than `finetune.tools.plan` counts, but
    at no cost, so that absurd settings end before anything is allocated.

    Args:
        lm: sharded, still without memory.
        ranks: processes on this machine. On a CPU, all share its memory.
        frames: of a microbatch, at least. Each layer keeps its input for the backward pass.
        workers: that each rank starts to read data.
    """
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if (readers := workers * ranks * WORKER_BYTES) > host:
        raise UserError(
            f"data.num_workers: {workers * ranks:,} processes need at least {readers / 2**30:,.1f} GiB and there are "
            f"{host / 2**30:,.1f} GiB; lower it"
        )
    state = sum(buffer.nbytes for _, module in quantised_linears(lm) for buffer in module.buffers())
    for parameter in lm.parameters():
        local = local_rows(parameter)[1]
        state += local.numel() * (local.element_size() + 12 * parameter.requires_grad)  # float32: gradient, two moments
    inputs = int(frames * len(lm.transformer.layers) * lm.dim * torch.bfloat16.itemsize)
    if device.type == "cuda":
        have = torch.cuda.get_device_properties(device).total_memory
    else:
        have, state, inputs = host, state * ranks, inputs * ranks
    if state + inputs > have:
        raise UserError(
            f"parameters, gradients and optimizer need {state / 2**30:,.1f} GiB, what layers keep for the backward "
            f"pass at least {inputs / 2**30:,.1f} GiB, and there are {have / 2**30:,.1f} GiB; lower "
            f"{'lora.rank' if state > inputs else 'batch_size or duration_sec'}, or use more GPUs; "
            "`python -m finetune.tools.plan config.yaml` says what fits"
        )
