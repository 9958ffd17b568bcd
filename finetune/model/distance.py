"""How far training has moved the weights."""

import torch
from moshi.modules.lora import LoRALinear
from torch import Tensor, nn

from finetune.distributed import World, local_rows, whole
from finetune.lora import is_adapter, part_of, stock_name
from finetune.model.build import StoredWeights


@torch.no_grad()
def weight_distances(lm: nn.Module, base: StoredWeights, world: World) -> dict[str, float]:
    """Return, for each part that is trained, |W - W_base| / |W_base| (Frobenius, over all matrices of the part).

    Of adapters, the difference is scaling * B A, computed from products of their own small size. Other trained
    parameters are compared with the file of the base, of which each rank reads its rows.
    """
    squares: dict[str, Tensor] = {}  # by part: of the difference, and of the base; those of this rank's rows

    def add(name: str, difference: Tensor, weight: Tensor) -> None:
        part = f"distance_{part_of(name).partition('.')[0]}"
        own = torch.stack([difference.double(), weight.float().square().sum().double()])
        squares[part] = squares.get(part, 0) + own

    for name, module in lm.named_modules():
        if isinstance(module, LoRALinear):
            a, (_, b) = whole(module.lora_A.weight), local_rows(module.lora_B.weight)
            product = ((b.T.float() @ b.float()) * (a.float() @ a.float().T)).sum()
            add(name, module.scaling**2 * product, local_rows(module.frozen_W.weight)[1])
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad and not is_adapter(name):
            start, local = local_rows(parameter)
            before = torch.empty(local.shape, dtype=torch.float32)
            base.read_into(stock_name(name), start, before)
            before = before.to(local.device)
            add(name, (local.float() - before).square().sum(), before)
    # Replicated rows count once per replica in both sums, which leaves their ratio as it is.
    sums = {part: world.sum(own) for part, own in sorted(squares.items())}
    return {part: float((own[0] / own[1].clamp(min=1e-30)).clamp(min=0).sqrt()) for part, own in sums.items()}
