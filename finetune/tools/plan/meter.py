"""Count the FLOPs, operations and bytes of a step on tensors without memory."""

import weakref
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
_FLASH_BACKWARD = _aten._scaled_dot_product_flash_attention_backward
_FLOPS = flop_registry | {
    _aten.baddbmm_: flop_registry[_aten.baddbmm],
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[_FLASH_BACKWARD],
}


class Meter(TorchDispatchMode):
    """Counts FLOPs of matrix products, operations other than views, and the bytes of tensors created under it.

    `peak` is the most bytes that existed at one time, together with what `hold` added; `at_peak` splits it by kind.
    """

    def __init__(self):
        super().__init__()
        self.flops = self.operations = self.live = self.peak = 0
        self.held: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self._storages: set[int] = set()  # ids of those that exist

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        self.operations += not (func.is_view or packet is _aten._unsafe_view)
        if packet in _FLOPS:
            self.flops += _FLOPS[packet](*args, **kwargs, out_val=out)
        if packet is _FLASH_BACKWARD:  # accumulates dq in float32 (pytorch, flash_attn/flash_api.cpp: dq_accum)
            self._update_peak(4 * args[1].numel())
        inputs = {id(t.untyped_storage()) for t in args if isinstance(t, Tensor)}
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, Tensor) and not func.is_view:
                storage = tensor.untyped_storage()
                if id(storage) not in inputs and id(storage) not in self._storages:
                    weakref.finalize(storage, self._remove, id(storage), storage.nbytes())
                    self._storages.add(id(storage))
                    self.live += storage.nbytes()
                    self._update_peak()
        return out

    def hold(self, kind: str, size: int) -> None:
        """Add bytes that no tensor stands for; a negative size removes them."""
        self.held[kind] += size
        self._update_peak()

    def _remove(self, key: int, size: int) -> None:
        self._storages.remove(key)
        self.live -= size

    def _update_peak(self, extra: int = 0) -> None:
        total = self.live + extra + self.held.total()
        if total > self.peak:
            self.peak, self.at_peak = total, Counter(activations=self.live + extra) + self.held


class GpuAttention(TorchFunctionMode):
    """Runs attention with the kernels of a GPU; on the meta device torch would create whole score matrices."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v, mask = args
        if mask is None:
            return _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
        bias = torch.zeros_like(mask, dtype=q.dtype).expand(*q.shape[:2], *mask.shape)
        return _aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]
