"""Building the LM without memory, and filling it from its weight file."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from moshi.models import LMModel
from torch import nn
from torch.distributed.tensor import DTensor

from finetune.cli import UserError
from finetune.lora import initial_adapter, is_adapter, is_embedding
from finetune.model.expansion import expansion_plan
from finetune.model.weights import WeightFile
from finetune.streams import CODEBOOKS, DEP_Q

READERS = 2  # one waits for the disk while the kernel clears the memory that the other reads into


@dataclass(frozen=True)
class Origin:
    """Where the weights of a model came from."""

    weights: Path
    stored_dep_q: int
    expanded: bool  # 8 -> 16 depformer steps on load

    def __str__(self) -> str:
        if self.expanded:
            return f"{self.weights}: Moshi weights ({self.stored_dep_q} codebooks), expanded to {DEP_Q}"
        family = "PersonaPlex" if self.stored_dep_q == DEP_Q else "Moshi"
        return f"{self.weights}: {family} weights ({self.stored_dep_q} codebooks), loaded as they are"


class StoredWeights:
    """The stored weights as the spec's model wants them: names split, steps expanded where the file has 8."""

    def __init__(self, path: Path, dep_q: int):
        self.file = WeightFile(path)
        stored = self.file.dep_q
        if stored == dep_q:
            self.sources: dict[str, str | None] = {name: name for name in self.file.slots}
        elif stored == CODEBOOKS and dep_q == DEP_Q:
            try:
                self.sources = expansion_plan(set(self.file.slots))
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
        else:
            raise UserError(f"{path}: holds {stored} depformer steps where this model has {dep_q}; check moshi_paths")
        self.origin = Origin(path, stored, expanded=stored != dep_q)

    def check(self, shapes: dict[str, torch.Size]) -> None:
        """Raises UserError unless the file holds exactly these parameters, in these shapes."""
        problems = [f"no {name}" for name in sorted(shapes.keys() - self.sources.keys())]
        problems += [f"an unknown {name}" for name in sorted(self.sources.keys() - shapes.keys())]
        for name, source in self.sources.items():
            if source is not None and name in shapes and tuple(shapes[name]) != self.file.slots[source].shape:
                problems.append(
                    f"{name} of shape {list(self.file.slots[source].shape)} instead of {list(shapes[name])}"
                )
        if problems:
            more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
            raise UserError(
                f"{self.file.path}: does not fit the model's config: it has {'; '.join(problems[:4])}{more}; weights "
                "and config.json have to be of one model"
            )

    def read(self, name: str, start: int, stop: int, shape: torch.Size) -> torch.Tensor:
        """Rows [start, stop) of a parameter of this shape."""
        source = self.sources[name]
        if source is None:
            return torch.zeros(max(0, min(stop, shape[0]) - start), *shape[1:])
        return self.file.read(source, start, stop)

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fills `out` with a parameter's rows from `start` on."""
        source = self.sources[name]
        if source is None:
            out.zero_()
        else:
            self.file.read_into(source, start, out)


def build_lm(kwargs: dict, dtype: torch.dtype) -> LMModel:
    """An LMModel without memory (meta device). Raises UserError if moshi refuses the arguments."""
    try:
        with torch.device("meta"):  # parts of moshi make tensors on the default device first: 1 GB at 7B
            return LMModel(device="meta", dtype=dtype, **{k: v for k, v in kwargs.items() if k != "device"})
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(f"the LM config does not fit moshi's LMModel: {error}") from None


def base_name(name: str) -> str:
    """The stock name of a parameter of a model with LoRA."""
    return name.replace(".frozen_W.", ".")


def set_trainable(lm: nn.Module, full: bool, ft_embed: bool) -> None:
    """Marks what is trained and gives it float32; the frozen rest keeps the dtype it was built in.

    Args:
        full: everything; else adapters only.
        ft_embed: the embedding tables too (moshi-finetune's `lora.ft_embed`).
    """
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_(full or is_adapter(name) or (ft_embed and is_embedding(name)))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def load_weights(lm: nn.Module, weights: StoredWeights, seed: int) -> None:
    """Gives a model that has memory (`to_empty`) its values: the base from the file, adapters fresh.

    Each rank reads only the rows that it keeps, one tensor at a time. Adapters depend on (seed, name) alone, so that
    any number of ranks starts from the same ones. Raises UserError if the file holds other parameters.
    """
    weights.check({base_name(n): p.shape for n, p in lm.named_parameters() if not is_adapter(n)})

    def fill_one(named: tuple[str, nn.Parameter]) -> None:
        name, parameter = named
        start, local = local_rows(parameter)
        if is_adapter(name):
            local.copy_(initial_adapter(name, parameter.shape, seed)[start : start + local.shape[0]])
        else:
            weights.read_into(base_name(name), start, local)

    with ThreadPoolExecutor(READERS) as readers:
        list(readers.map(torch.no_grad()(fill_one), lm.named_parameters()))


def local_rows(parameter: torch.Tensor) -> tuple[int, torch.Tensor]:
    """(first row, the rows) of a parameter that this rank holds; all of it unless it is sharded."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.data
    local = parameter.to_local()
    for dim, placement in enumerate(parameter.placements):
        if placement.is_shard():  # FSDP2 cuts rows like torch.chunk: equal pieces, the last ones shorter
            piece = -(-parameter.shape[0] // parameter.device_mesh.size(dim))
            start = min(piece * parameter.device_mesh.get_local_rank(dim), parameter.shape[0])
            return start, local.data
    return 0, local.data
