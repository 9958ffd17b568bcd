"""`consolidated/`: the part of a checkpoint that inference loads."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from finetune.lora import is_adapter, merge_adapter, stock_name
from finetune.model.pretrained import Pretrained
from finetune.model.weights import write_safetensors


def inference_config(checkpoint: Pretrained, kwargs: dict) -> dict:
    """The config.json for weights trained from a checkpoint, with which moshi finds the same Mimi and tokenizer."""
    locate = lambda key, path: checkpoint.hub_address(key, path) or f"file://{path.absolute()}"
    companions = {key: locate(key, path) for key, path in checkpoint.companions().items()}
    return kwargs | {"model_type": checkpoint.raw_config.get("model_type", "moshi")} | companions


class Artefact:
    """`consolidated/`: adapters, or all weights with adapters merged in, and the config.json that moshi reads.

    Args:
        config: arguments of LMModel, and where to find Mimi and the tokenizer.
        adapters: (rank, scaling) to save the trained tensors only: adapters, and embeddings if trained; None: save all.
        dtype: of the saved tensors.
    """

    def __init__(self, config: dict, adapters: tuple[int, float] | None, dtype: torch.dtype):
        self.config, self.adapters, self.dtype = dict(config), adapters, dtype
        if adapters is not None:
            self.config |= {"lora": True, "lora_rank": adapters[0], "lora_scaling": adapters[1]}
        else:
            # Without `lora`: moshi would put random adapters on top of merged weights.
            self.config["moshi_name"] = "consolidated.safetensors"

    def write(self, lm: nn.Module, folder: Path, is_main: bool) -> str | None:
        """Write both files on the main rank, while every rank takes part in gathering. Returns an error, or None."""
        saved = {
            name: parameter
            for name, parameter in lm.named_parameters()
            if (parameter.requires_grad if self.adapters else not is_adapter(name))
        }
        tensors, error = merged_tensors(lm, saved), None
        if is_main:
            layout = {stock_name(name): (self.dtype, tuple(parameter.shape)) for name, parameter in saved.items()}
            file = "lora.safetensors" if self.adapters else "consolidated.safetensors"
            try:
                write_safetensors(folder / file, layout, tensors)
                (folder / "config.json").write_text(json.dumps(self.config, indent=2))
            except OSError as failure:
                error = str(failure)
        for _ in tensors:  # gathering is collective: on the other ranks, and on the main rank after an error
            pass
        return error


def merged_tensors(lm: nn.Module, parameters: dict[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """(stock name, full tensor) of each parameter, one at a time; adapters are added to their base in float32."""
    modules = dict(lm.named_modules())
    for name, parameter in parameters.items():
        values = _full(parameter)
        if ".frozen_W." in name:
            linear = modules[name.split(".frozen_W.")[0]]
            values = merge_adapter(values, _full(linear.lora_A.weight), _full(linear.lora_B.weight), linear.scaling)
        yield stock_name(name), values


def _full(parameter: Tensor) -> Tensor:
    return parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
