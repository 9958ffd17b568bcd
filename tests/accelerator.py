"""An accelerator without one: fake tensors that have shapes, dtypes and a device, but no values.

Mixing devices, and shapes that depend on values, raise as they would on a GPU; each wait of the host for the device is
recorded. torch calls the device "lazy"; nothing in the package knows the name.
"""

import contextlib
import sys
from dataclasses import fields, is_dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("lazy", 0)
_READ = torch.ops.aten._local_scalar_dense.default  # of item(), float(), bool()
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class _Watch(TorchDispatchMode):
    """Records waits: values that are read, and copies between host and device without `non_blocking`."""

    def __init__(self, waits: list[str]):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is _READ:
            self.waits += ["read"] * (args[0].device == DEVICE)
            return 1.0 if args[0].is_floating_point() else 1
        out = function(*args, **kwargs)
        if function in _COPIES:
            source = args[1] if function is _COPIES[1] else args[0]
            non_blocking = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            if {source.device, out.device} == {torch.device("cpu"), DEVICE} and not non_blocking:
                self.waits.append(f"copy to {out.device.type}")
        return out


class Accelerator:
    """`with accelerator.on():` makes every new tensor a fake one; `waits` lists what the host has waited for since."""

    def __init__(self, monkeypatch):
        self.mode = FakeTensorMode(allow_non_fake_inputs=False)
        self.waits: list[str] = []
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: None)  # a group of one
        mesh = SimpleNamespace(get_group=lambda dim: None)  # FSDP's, whose gradients these stand for
        monkeypatch.setattr(FakeTensor, "device_mesh", mesh, raising=False)
        monkeypatch.setattr(FakeTensor, "to_local", lambda tensor: tensor, raising=False)
        optimizer = sys.modules[torch.optim.Optimizer.__module__]  # torch.optim deletes the name of the module
        monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["lazy", "cpu"])

        def read_all(tensor: FakeTensor) -> list | float:  # FakeTensor would read each element
            if tensor.device == DEVICE:
                self.waits.append("read")
            return _ones(tensor)

        monkeypatch.setattr(FakeTensor, "tolist", read_all)

    @contextlib.contextmanager
    def on(self):
        with self.mode, _Watch(self.waits):
            yield

    def move(self, module: nn.Module) -> nn.Module:
        """The parameters and buffers of a module on the device."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(self._there(parameter), parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = self._there(buffer)
        return module

    def _there(self, tensor: Tensor) -> FakeTensor:
        return FakeTensor(self.mode, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), DEVICE)

    def host(self, value):
        """The tensors of a dataclass, list or tuple as fakes in the memory of the host."""
        if isinstance(value, Tensor):
            return self.mode.from_tensor(value)
        if is_dataclass(value):
            return replace(value, **{f.name: self.host(getattr(value, f.name)) for f in fields(value)})
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self.host, value))
        return type(value)(map(self.host, value)) if isinstance(value, list | tuple) else value


def _ones(tensor: Tensor):
    one = 1.0 if tensor.is_floating_point() else 1
    return [_ones(row) for row in tensor] if tensor.dim() > 1 else [one] * len(tensor) if tensor.dim() else one
