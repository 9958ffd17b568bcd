"""`consolidated/`: the part of a checkpoint that inference loads."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from moshi.modules.lora import LoRALinear
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from finetune.lora import is_adapter, merge_adapter
from finetune.model.weights import write_safetensors


class Artefact:
    """`consolidated/`: adapters, or all weights with adapters merged in, and the config.json that moshi reads.

    Args:
        config: arguments of LMModel and where Mimi and the tokenizer are.
        adapters: (rank, scaling), to save adapters; None: everything.
        dtype: of the saved weights.
    """

    def __init__(self, config: dict, adapters: tuple[int, float] | None, dtype: torch.dtype):
        self.config, self.adapters, self.dtype = dict(config), adapters, dtype
        if adapters is not None:
            self.config |= {"lora": True, "lora_rank": adapters[0], "lora_scaling": adapters[1]}
        else:
            # A merged checkpoint that still said `lora` would get random adapters on top when loaded.
            self.config["moshi_name"] = "consolidated.safetensors"

    def write(self, lm: nn.Module, folder: Path, is_main: bool) -> str | None:
        """Writes both files on the main rank; every rank takes part in gathering. Returns why it failed, or None."""
        tensors = adapter_tensors(lm) if self.adapters else merged_tensors(lm)
        name = "lora.safetensors" if self.adapters else "consolidated.safetensors"
        problem = None
        if is_main:
            layout = adapter_layout(lm) if self.adapters else merged_layout(lm)
            try:
                write_safetensors(folder / name, {k: (self.dtype, shape) for k, shape in layout.items()}, tensors)
                (folder / "config.json").write_text(json.dumps(self.config, indent=2))
            except OSError as error:
                problem = str(error)
        for _ in tensors:  # on the other ranks, and on the main one after a failure: gathering takes all
            pass
        return problem


def _full(parameter: Tensor) -> Tensor:
    return parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def adapter_layout(lm: nn.Module) -> dict[str, tuple[int, ...]]:
    """{name: shape} of what `adapter_tensors` gives."""
    return {n: tuple(p.shape) for n, p in lm.named_parameters() if p.requires_grad}


def adapter_tensors(lm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Trained tensors by their stock names: adapters, and embeddings where they are trained."""
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad:
            yield name, _full(parameter)


def merged_layout(lm: nn.Module) -> dict[str, tuple[int, ...]]:
    """{name: shape} of what `merged_tensors` gives."""
    return {n.replace(".frozen_W.", "."): tuple(p.shape) for n, p in lm.named_parameters() if not is_adapter(n)}


def merged_tensors(lm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All weights under stock names, adapters added to their base in float32; one full tensor at a time."""
    modules = dict(lm.named_modules())
    for name, parameter in lm.named_parameters():
        if is_adapter(name):
            continue
        module = modules[name.rsplit(".frozen_W.", 1)[0]] if ".frozen_W." in name else None
        values = _full(parameter)
        if isinstance(module, LoRALinear):
            values = merge_adapter(values, _full(module.lora_A.weight), _full(module.lora_B.weight), module.scaling)
        yield name.replace(".frozen_W.", "."), values
