"""`consolidated/`: the part of a checkpoint that inference loads."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from moshi.modules.lora import LoRALinear
from torch import Tensor, nn

from finetune.distributed import whole
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
        scaling: of the adapters, to save only them, and embeddings if trained; None: save all weights.
        dtype: of the saved tensors.
    """

    def __init__(self, config: dict, scaling: float | None, dtype: torch.dtype):
        self.config, self.dtype, self.adapters_only = dict(config), dtype, scaling is not None
        if self.adapters_only:
            self.config |= {"lora": True, "lora_scaling": scaling}
        else:
            # Without `lora`: moshi would put random adapters on top of merged weights.
            self.config["moshi_name"] = "consolidated.safetensors"

    def gather(self, lm: nn.Module, is_main: bool) -> dict[str, Tensor]:
        """Return copies of the tensors to write, in file order and in the memory of the host, on the main rank. The
        others take part in gathering and return none."""
        if self.adapters_only:
            self.config["lora_rank"] = common_rank(lm)
            tensors = adapter_tensors(lm, self.config["lora_rank"])
        else:
            tensors = merged_tensors(lm)
        # Converted on the device: half as many bytes leave it.
        return {name: values.to(self.dtype, copy=True).cpu() for name, values in tensors if is_main}

    def write(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Write both files. Raises OSError."""
        file = "lora.safetensors" if self.adapters_only else "consolidated.safetensors"
        layout = {name: (self.dtype, tuple(values.shape)) for name, values in tensors.items()}
        write_safetensors(folder / file, layout, tensors.items())
        (folder / "config.json").write_text(json.dumps(self.config, indent=2))


def common_rank(lm: nn.Module) -> int:
    """The highest rank of the adapters of a model."""
    return max(module.rank for module in lm.modules() if isinstance(module, LoRALinear))


def adapter_shapes(lm: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
    """{stock name: shape} of a file of adapters, as moshi's `get_lora_moshi` reads it: it gives every linear layer
    adapters of one rank, and fails where the file has none. So smaller adapters, and absent ones, are padded with
    zeros."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in lm.named_modules():
        if isinstance(module, nn.Linear | LoRALinear) and not name.endswith((".lora_A", ".lora_B", ".frozen_W")):
            shapes[f"{name}.lora_A.weight"] = (rank, module.in_features)
            shapes[f"{name}.lora_B.weight"] = (module.out_features, rank)
    tables = {name: tuple(p.shape) for name, p in lm.named_parameters() if p.requires_grad and not is_adapter(name)}
    return shapes | tables


def adapter_tensors(lm: nn.Module, rank: int) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) in the order of `adapter_shapes`."""
    parameters = dict(lm.named_parameters())
    for name, shape in adapter_shapes(lm, rank).items():
        values = torch.zeros(shape) if name not in parameters else whole(parameters[name])
        yield name, F.pad(values, (0, shape[1] - values.shape[1], 0, shape[0] - values.shape[0]))


def merged_tensors(lm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(stock name, full tensor) of each parameter, one at a time; adapters are added to their base in float32."""
    modules = dict(lm.named_modules())
    for name, parameter in lm.named_parameters():
        if is_adapter(name):
            continue
        values = whole(parameter)
        if ".frozen_W." in name:
            linear = modules[name.split(".frozen_W.")[0]]
            values = merge_adapter(values, whole(linear.lora_A.weight), whole(linear.lora_B.weight), linear.scaling)
        yield stock_name(name), values
