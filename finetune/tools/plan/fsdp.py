"""The memory that FSDP needs during a step."""

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from finetune.model.training_lm import TrainingLM
from finetune.tools.plan.meter import Meter


def sharded_numel(parameter: Tensor, shards: int) -> int:
    """Return the elements of a parameter on rank 0: FSDP2 shards rows, and pads the last ranks to at least one row."""
    return -(-parameter.shape[0] // shards) * math.prod(parameter.shape[1:])


def fsdp_parameters(parameters: Iterable[nn.Parameter], shards: int) -> list[nn.Parameter]:
    """Return the parameters that FSDP manages (see distributed.shard)."""
    return [p for p in parameters if p.requires_grad or shards > 1]


class FsdpUnit:
    """Parameters that FSDP gathers and frees together: those of a layer, or all that are in no layer.

    Attributes:
        size: bytes when gathered, in the dtype of the computation.
        gradient: bytes of the unsharded gradients, in float32.
        uneven: trained parameters whose rows are not divisible by the number of shards.
    """

    def __init__(self, parameters: list[nn.Parameter], shards: int):
        self.trained = [p for p in parameters if p.requires_grad]
        self.size = sum(shards * sharded_numel(p, shards) * p.element_size() for p in parameters)
        self.gradient = 4 * sum(shards * sharded_numel(p, shards) for p in self.trained)
        self.uneven = [p for p in self.trained if p.shape[0] % shards]
        self.is_gathered = False

    def drop_gradients(self) -> None:
        for parameter in self.trained:
            parameter.grad = None


class FsdpMemory:
    """Adds the memory that `fully_shard` would need to the meter of a step on a model that is not sharded.

    The events and their order are those of torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py (2.9). Unless there
    is only one shard, gathering goes through a flat copy; the forward pass keeps it until the next layer is gathered,
    and the backward pass prefetches that of the next layer. The unit of the other parameters (embeddings, heads) stays
    gathered from start to end. torch's own FSDPMemTracker does not fit here: it needs a GPU to plan for one, and misses
    the copies of gloo and of uneven gradients (NOTES.md).

    Args:
        accumulated: earlier microbatches have left their gradients, in float32.
        reduced: as shards (reduce_every_microbatch); otherwise they stay unsharded until the last one.
        on_cpu: uneven gradients are copied for padding (torch._chunk_cat).
        over_gloo: gloo, unlike NCCL, works on a copy of what it gathers or reduces.
    """

    def __init__(
        self, lm: TrainingLM, shards: int, meter: Meter, accumulated: bool, reduced: bool, on_cpu: bool,
        over_gloo: bool,
    ):  # fmt: skip
        self.meter, self.shards, self.accumulated = meter, shards, accumulated and not reduced
        self.earlier_shards = accumulated and reduced
        self.on_cpu, self.over_gloo = on_cpu, over_gloo
        self.layers = [*lm.lm.transformer.layers, *lm.lm.depformer.layers]
        in_layers = {id(p) for layer in self.layers for p in layer.parameters()}
        others = [p for p in lm.parameters() if id(p) not in in_layers]
        groups = [*(layer.parameters() for layer in self.layers), others]
        self.units = [FsdpUnit(fsdp_parameters(group, shards), shards) for group in groups]
        self.flat = self.reducing = 0  # bytes of the flat copy, and of the gradients that are being reduced

    @contextlib.contextmanager
    def follow(self) -> Iterator[None]:
        """Follow one forward and backward pass."""
        handles = []
        for i, layer in enumerate(self.layers):
            handles.append(layer.register_forward_pre_hook(functools.partial(self._before_forward, i)))
            handles.append(layer.register_forward_hook(functools.partial(self._after_forward, i)))
        if self.accumulated or self.earlier_shards:
            shards = self.shards if self.earlier_shards else 1
            self.meter.hold("gradients", sum(unit.gradient // shards for unit in self.units))
        self._gather(self.units[-1])
        yield
        for handle in handles:
            handle.remove()
        for unit in [self.units[-1], *self.units]:  # last those layers whose inputs need no gradient
            self._reduce(unit)
        self.meter.hold("gathered", -self.reducing)

    def _gather(self, unit: FsdpUnit) -> None:
        flat = unit.size * (self.shards > 1)
        self.meter.hold("gathered", flat)
        self._hold_briefly(flat * self.over_gloo)
        self.meter.hold("gathered", unit.size - self.flat)
        self.flat, unit.is_gathered = flat, True

    def _hold_briefly(self, size: int) -> None:
        self.meter.hold("gathered", size)
        self.meter.hold("gathered", -size)

    def _before_forward(self, i: int, layer: nn.Module, args: tuple[Tensor]) -> None:
        self._gather(self.units[i])
        if args[0].requires_grad:
            args[0].register_hook(lambda _: self._reduce(self.units[i]))

    def _after_forward(self, i: int, layer: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        self._free(self.units[i])
        y.register_hook(lambda _: self._before_backward(i))

    def _before_backward(self, i: int) -> None:
        for later in self.units[i + 1 : -1]:  # its own hook, on the same tensor, runs after this one
            self._reduce(later)
        self.meter.hold("gathered", self.units[i].size)
        self.units[i].is_gathered = True
        flat = self.units[i - 1].size if i and self.shards > 1 else 0
        self.meter.hold("gathered", flat - self.flat)
        self.flat = flat

    def _free(self, unit: FsdpUnit) -> None:
        self.meter.hold("gathered", -unit.size * unit.is_gathered)
        unit.is_gathered = False

    def _reduce(self, unit: FsdpUnit) -> None:
        if not unit.is_gathered:
            return
        self._free(unit)
        if self.accumulated:  # they were added to the earlier ones
            unit.drop_gradients()
        self.meter.hold("gathered", unit.gradient - self.reducing)
        self.reducing = unit.gradient
        copied = sum(4 * p.numel() if self.accumulated else p.nbytes for p in unit.uneven)
        self._hold_briefly(copied * self.on_cpu)
        unit.drop_gradients()
        own = unit.gradient // self.shards
        self.meter.hold("gradients", own - unit.gradient * self.accumulated)
        self.meter.hold("gradients", -own * self.earlier_shards)  # added to those of earlier microbatches
        self._hold_briefly(unit.gradient * self.over_gloo)
