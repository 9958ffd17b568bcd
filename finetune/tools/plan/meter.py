"""Count the FLOPs, operations, bytes and time of a step on tensors without memory."""

import math
import weakref
from collections import Counter
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.profiling import FLOPS, PEAK_TFLOPS

_aten = torch.ops.aten
_FLASH_BACKWARD = _aten._scaled_dot_product_flash_attention_backward
# Nothing runs for these, but memory is allocated.
_ALLOCATIONS = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}
_OVERWRITE = {_aten.copy_, _aten.fill_, _aten.zero_}  # do not read what they change
_LOOKUPS = {_aten.embedding, _aten.gather, _aten.index, _aten.index_select}  # read as much as they write
# H100 SXM: dense bfloat16 products, and memory (NVIDIA's data sheet).
H100_FLOPS, H100_BYTES = PEAK_TFLOPS["H100"] * 1e12, 3.35e12  # per second


class Meter(TorchDispatchMode):
    """Counts what is executed under it.

    Attributes:
        flops: of matrix products and attention.
        operations: kernels, that is, operations other than views and allocations.
        traffic: bytes that the other kernels read and write.
        roofline_sec: time on an H100 if each kernel reached the limit of arithmetic or that of memory.
        live, peak: bytes of the tensors that exist, and the most at one time, together with what `hold` added.
        at_peak: the peak by kind.
    """

    def __init__(self):
        super().__init__()
        self.flops = self.operations = self.traffic = self.live = self.peak = 0
        self.roofline_sec = 0.0
        self.held: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self._storages: set[int] = set()  # ids of those that exist

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if not (func.is_view or packet in _ALLOCATIONS or packet is _aten._unsafe_view):
            self._count(packet, args, kwargs, out)
        if packet is _FLASH_BACKWARD:  # accumulates dq in float32 (pytorch, flash_attn/flash_api.cpp: dq_accum)
            self._update_peak(4 * args[1].numel())
        inputs = {id(t.untyped_storage()) for t in args if isinstance(t, Tensor)}
        for tensor in _tensors([out]):
            if not func.is_view:
                storage = tensor.untyped_storage()
                if id(storage) not in inputs and id(storage) not in self._storages:
                    weakref.finalize(storage, self._remove, id(storage), storage.nbytes())
                    self._storages.add(id(storage))
                    self.live += storage.nbytes()
                    self._update_peak()
        return out

    def _count(self, packet, args: tuple, kwargs: dict, out) -> None:
        self.operations += 1
        written = sum(map(_bytes, _tensors([out])))
        read = written if packet in _LOOKUPS else sum(map(_bytes, _tensors(args[packet in _OVERWRITE :])))
        flops = FLOPS[packet](*args, **kwargs, out_val=out) if packet in FLOPS else 0
        self.flops += flops
        self.traffic += 0 if flops else read + written
        self.roofline_sec += max(flops / H100_FLOPS, (read + written) / H100_BYTES)

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


def _tensors(values: Iterable) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _bytes(tensor: Tensor) -> int:
    """The bytes of the elements that differ in address: expanded ones count once."""
    return tensor.element_size() * math.prod(n for n, stride in zip(tensor.shape, tensor.stride()) if stride)


class GpuKernels:
    """In the block, attention and norms on the meta device are the kernels of a GPU: torch would run them there in
    parts, with whole matrices of attention scores and many float32 copies of what is normalised.

    A TorchFunctionMode would not last: torch leaves it for the duration of a backward pass, which recomputes layers.
    """

    def __enter__(self) -> None:
        self._before = F.rms_norm, F.scaled_dot_product_attention
        F.rms_norm, F.scaled_dot_product_attention = _norm, _attention

    def __exit__(self, *_: object) -> None:
        F.rms_norm, F.scaled_dot_product_attention = self._before


def _norm(x: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float) -> Tensor:
    # An RMS norm is one kernel on CUDA since torch 2.9. A layer norm moves the same bytes, in any version.
    return torch.native_layer_norm(x, shape, weight, None, eps)[0]


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False
) -> Tensor:
    if attn_mask is None:
        return _aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
    bias = torch.zeros_like(attn_mask, dtype=q.dtype).expand(*q.shape[:2], *attn_mask.shape)
    return _aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, dropout_p)[0]
