"""Linear layers whose frozen weights are stored in 8 or 4 bits, and dequantised each time the layer runs.

Both kinds scale each block of 64 weights by its largest absolute value, as QLoRA does (arXiv 2305.14314). `int8` rounds
to 255 equal steps. `nf4` rounds to 16 levels that normally distributed weights use equally often. The paper quantises
the scales of nf4 too; here they are stored in the dtype of the base, in which a block's largest value is exact.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from finetune.cli import UserError

BLOCK = 64  # weights per scale
# arXiv 2305.14314, appendix E.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
INT8_STEPS = 127  # on either side of zero
QUANTISED_PER_CHUNK = 2**20  # elements that are read and quantised at a time
# Elements that are dequantised at a time: on a CPU, few enough for its caches; elsewhere, enough to hide the launches.
DEQUANTISED_PER_CHUNK = {"cpu": 2**17, "cuda": 2**24}


class QuantisedLinear(nn.Linear):
    """A frozen linear without bias. `weight` [out, in] is computed at each access, in the dtype of the scales.

    Its buffers are `codes` [blocks, bytes per block], int8 or two nf4 codes in each uint8, the first one in the higher
    bits; `scales` [blocks, 1]; and for nf4 `levels` [256, 2] float32, the two levels that a byte stands for.
    """

    def __init__(self, in_features: int, out_features: int, kind: str, dtype: torch.dtype, device: torch.device):
        nn.Module.__init__(self)  # nn.Linear would make a parameter
        self.in_features, self.out_features, self.bias, self.kind = in_features, out_features, None, kind
        blocks, packed = in_features * out_features // BLOCK, kind == "nf4"
        stored = torch.uint8 if packed else torch.int8
        self.register_buffer("codes", torch.empty(blocks, BLOCK // (1 + packed), dtype=stored, device=device))
        self.register_buffer("scales", torch.empty(blocks, 1, dtype=dtype, device=device))
        if packed:
            self.register_buffer("levels", torch.empty(256, 2, device=device))

    def numel(self) -> int:
        """Number of weights."""
        return self.in_features * self.out_features

    @property
    def weight(self) -> Tensor:
        return self.dequantise(self.scales.new_empty(self.out_features, self.in_features))

    @torch.no_grad()
    def dequantise(self, out: Tensor, part: int = 0) -> Tensor:
        """Write the weights, or a `part` of them, to `out` [rows, in], contiguous and of any float dtype; return it.
        Products are computed in float32 and rounded once."""
        blocks = out.view(-1, BLOCK)
        own = slice(part * len(blocks), (part + 1) * len(blocks))
        size = DEQUANTISED_PER_CHUNK["cpu" if out.device.type == "cpu" else "cuda"] // BLOCK
        for target, codes, scales in zip(blocks.split(size), self.codes[own].split(size), self.scales[own].split(size)):
            if self.kind == "nf4":
                # Both floats of a byte are looked up as one number of 64 bits.
                pairs = self.levels.view(torch.int64).flatten().index_select(0, codes.flatten().int())
                values = pairs.view(torch.float32).view(-1, BLOCK)
            else:
                values = codes.float()
            torch.mul(values, scales, out=target)
        return out

    @torch.no_grad()
    def fill(self, read: Callable[[int, Tensor], None]) -> None:
        """Quantise weights a few rows at a time. `read(start, out)` fills `out` with the rows from `start` on, on the
        CPU and in the dtype of the scales."""
        if self.kind == "nf4":
            level, device = torch.tensor(NF4_LEVELS), self.levels.device
            self.levels.copy_(torch.cartesian_prod(level, level).to(device))
        # Whole blocks at a time, whatever the length of a row.
        rows = max(1, QUANTISED_PER_CHUNK // self.in_features // BLOCK) * BLOCK
        for start in range(0, self.out_features, rows):
            values = torch.empty(
                min(rows, self.out_features - start), self.in_features, dtype=self.scales.dtype, device="cpu"
            )
            read(start, values)
            first = start * self.in_features // BLOCK
            last = first + values.numel() // BLOCK
            codes, scales = quantise(values.to(self.codes.device), self.kind)
            self.codes[first:last], self.scales[first:last] = codes, scales


def quantise(weights: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return (codes, scales) of weights whose number is a multiple of BLOCK, in the form of QuantisedLinear."""
    blocks = weights.reshape(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True)
    if kind == "int8":
        scales = scales / INT8_STEPS
    factors = scales.float().clamp(min=torch.finfo(torch.float32).tiny)  # a block may hold nothing but zeros
    relative = blocks / factors
    if kind == "int8":
        return relative.round_().clamp_(-INT8_STEPS, INT8_STEPS).to(torch.int8), scales
    levels = torch.tensor(NF4_LEVELS, device=weights.device)
    codes = torch.bucketize(relative, (levels[1:] + levels[:-1]) / 2, out_int32=True).view(-1, BLOCK // 2, 2)
    return (codes[..., 0] * 16 + codes[..., 1]).to(torch.uint8), scales


def quantise_layers(lm: nn.Module, kind: str) -> None:
    """Replace the linears in the layers of both transformers of a meta-device model, as adapters wrap them or not.

    Heads, inputs of the depformer and embedding tables, 7 % of the weights at 7B, keep their dtype: heads decide the
    probabilities directly, and the inputs would be kept dequantised for the backward pass.
    """
    for name, linear in list(lm.named_modules()):
        *path, child = name.split(".")
        frozen = isinstance(linear, nn.Linear) and is_in_layer(name) and child not in ("lora_A", "lora_B")
        halves = 1 + ("linear_in" in name)  # which are dequantised apart
        if frozen and linear.weight.numel() % (halves * BLOCK) == 0:
            made = QuantisedLinear(
                linear.in_features, linear.out_features, kind, linear.weight.dtype, torch.device("meta")
            )
            setattr(lm.get_submodule(".".join(path)), child, made)


def is_in_layer(name: str) -> bool:
    """Whether a linear belongs to a layer of the temporal transformer or the depformer."""
    return ".layers." in name


def quantised_linears(lm: nn.Module) -> Iterator[tuple[str, QuantisedLinear]]:
    """Yield (name of the weight, module) of each quantised linear."""
    for name, module in lm.named_modules():
        if isinstance(module, QuantisedLinear):
            yield f"{name}.weight", module


def refuse_shards(base_dtype: str, sharding: str, ranks: int) -> None:
    """Raise UserError if quantised weights would have to be sharded."""
    if base_dtype != "bf16" and sharding != "none" and ranks > 1:
        raise UserError(
            f"base_dtype is {base_dtype} and sharding is {sharding} over {ranks} processes, but quantised weights "
            "cannot be sharded; set sharding to none, which keeps all of them on each process"
        )
