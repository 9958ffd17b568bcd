"""What FSDP keeps in memory during a step."""

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from finetune.model.training_lm import TrainingLM
from finetune.tools.plan.meter import Meter


def rows_kept(parameter: Tensor, shards: int) -> int:
    """Elements that rank 0 keeps of a parameter: FSDP2 cuts rows, and fills up the last ranks' (one row at least)."""
    return -(-parameter.shape[0] // shards) * math.prod(parameter.shape[1:])


def fsdp_parameters(parameters: Iterable[nn.Parameter], shards: int) -> list[nn.Parameter]:
    """Those that FSDP takes part in (see distributed.shard)."""
    return [p for p in parameters if p.requires_grad or shards > 1]


class FsdpUnit:
    """The parameters that FSDP gathers and frees together: a layer's, or all others'. `size`: bytes when whole, in the
    dtype of the computation; `gradient`: of the trained ones, whole and in float32; `uneven`: of gradients whose rows
    cannot be shared out evenly."""

    def __init__(self, parameters: list[nn.Parameter], shards: int):
        self.trained = [p for p in parameters if p.requires_grad]
        self.size = sum(shards * rows_kept(p, shards) * p.element_size() for p in parameters)
        self.gradient = 4 * sum(shards * rows_kept(p, shards) for p in self.trained)
        self.uneven = [p for p in self.trained if p.shape[0] % shards]
        self.is_whole = False

    def forget_gradients(self) -> None:
        for parameter in self.trained:
            parameter.grad = None


class FsdpMemory:
    """What `fully_shard` holds beside the tensors of a step, on a model that is not sharded: the same events in the
    same order as torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py (2.9). Gathering goes by way of a flat copy,
    unless a shard is the whole; in the forward pass it lives until the next one, in the backward pass the next layer's
    is there already. The other parameters (embeddings, heads) stay whole from start to end.

    Args:
        accumulated: microbatches before have left their gradients: whole ones, in float32, until the last is reduced.
        on_cpu: there uneven gradients are copied to be filled up (torch._chunk_cat).
        over_gloo: which works on a copy of what it gathers or reduces, unlike NCCL.
    """

    def __init__(self, lm: TrainingLM, shards: int, meter: Meter, accumulated: bool, on_cpu: bool, over_gloo: bool):
        self.meter, self.shards, self.accumulated = meter, shards, accumulated
        self.on_cpu, self.over_gloo = on_cpu, over_gloo
        self.layers = [*lm.lm.transformer.layers, *lm.lm.depformer.layers]
        inside = {id(p) for layer in self.layers for p in layer.parameters()}
        others = [p for p in lm.parameters() if id(p) not in inside]
        parts = [*(layer.parameters() for layer in self.layers), others]
        self.units = [FsdpUnit(fsdp_parameters(part, shards), shards) for part in parts]
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

    def _gather(self, unit: FsdpUnit) -> None:
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

    def _free(self, unit: FsdpUnit) -> None:
        self.meter.hold("gathered", -unit.size * unit.is_whole)
        unit.is_whole = False

    def _reduce(self, unit: FsdpUnit) -> None:
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
