"""The sizes of the check, and models with random weights."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from moshi.models import LMModel, loaders

from finetune.args import TrainArgs
from finetune.distributed import local_rows, multiplies_bfloat16
from finetune.model.quantised import NF4_LEVELS, quantised_linears
from finetune.streams import DEP_Q
from finetune.tools.toy.mimi import MIMI_CONFIG as TOY_MIMI

Values = dict[str, object]
GIB = 2**30
RESERVE = 3 * GIB  # of a card, as in finetune.tools.plan


class Scale(NamedTuple):
    """The sizes of the check."""

    config: dict  # of the LM
    settings: dict  # of the run
    mimi: dict
    slots: tuple[int, ...]
    sound_sec: float  # for each slot
    conversations: tuple[int, ...]
    reply_sec: float
    steps: int  # with windows of varying lengths
    measured_sec: float  # time after which no further step is measured


REAL = Scale(
    config=loaders._lm_kwargs | {"dep_q": DEP_Q},
    settings={"duration_sec": 100.0, "lora": {"enable": True, "rank": 64}},
    mimi=loaders._mimi_config, slots=(1, 64, 128), sound_sec=16.0, conversations=(1, 4), reply_sec=12.0, steps=16,
    measured_sec=6.0,
)  # fmt: skip
TINY = Scale(
    config=REAL.config | {
        "dim": 64, "num_heads": 2, "num_layers": 2, "text_card": 400, "depformer_dim": 32, "depformer_num_heads": 2,
        "depformer_dim_feedforward": 128, "depformer_num_layers": 1,
    },
    settings={"duration_sec": 2.0, "prompt": {"max_sec": 1.0}, "lora": {"enable": True, "rank": 4}},
    mimi=TOY_MIMI, slots=(1, 2), sound_sec=1.0, conversations=(1, 2), reply_sec=3.0, steps=3, measured_sec=0.1,
)  # fmt: skip


class Bench(NamedTuple):
    device: torch.device
    scale: Scale

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def finish(self) -> None:
        """Wait until the device has done its work."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        self.finish()
        began = time.perf_counter()
        work()
        self.finish()
        return time.perf_counter() - began

    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if multiplies_bfloat16(self.device) else torch.float32

    def args(self, base_dtype: str = "bf16") -> TrainArgs:
        dtype = str(self.dtype()).removeprefix("torch.")
        return TrainArgs(data={}, run_dir="unused", device=self.device.type, base_dtype=base_dtype, param_dtype=dtype,
                         **self.scale.settings)  # fmt: skip


@torch.no_grad()
def fill_at_random(lm: LMModel) -> None:
    """Fill a model that `to_empty` gave memory: weights of the usual size, gains of one."""
    for name, parameter in lm.named_parameters():
        local = local_rows(parameter)[1]
        local.fill_(1.0) if name.endswith("alpha") else local.normal_(0, 0.02)
    for _, layer in quantised_linears(lm):
        layer.codes.random_()
        layer.scales.fill_(0.05 if layer.kind == "nf4" else 0.02 / 64)
        if layer.kind == "nf4":
            levels = torch.tensor(NF4_LEVELS, device=layer.levels.device)
            layer.levels.copy_(torch.cartesian_prod(levels, levels))
