"""Clipping the gradients of LoRA on PersonaPlex: torch's own function for sharded gradients, and ours.

    python -m benchmarks.norms
    torchrun --standalone --nproc-per-node 2 -m benchmarks.norms

The model has the layers of PersonaPlex and tiny matrices, as the number of tensors is what costs. Takes 20 seconds.
"""

import time

import torch
from moshi.models import loaders

from finetune.args import TrainArgs
from finetune.cli import run
from finetune.distributed import local_rows, make_mesh, session, shard
from finetune.model.build import build_lm, make_trainable
from finetune.model.training_lm import TrainingLM
from finetune.optim import clip_gradients
from finetune.parser import Parser
from finetune.streams import DEP_Q

TINY = {
    "dim": 32, "num_heads": 2, "hidden_scale": 2.0, "text_card": 60, "context": 300, "dep_q": DEP_Q,
    "depformer_dim": 16, "depformer_num_heads": 2, "depformer_dim_feedforward": 32,
}  # fmt: skip
WAYS = {
    "ours": clip_gradients,
    "torch": lambda parameters, limit: torch.nn.utils.clip_grad_norm_(parameters, limit).full_tensor(),
}


def main() -> None:
    Parser(__doc__).parse_args()
    torch.set_num_threads(1)
    args = TrainArgs.model_validate({"data": {"train_data": "-"}, "run_dir": "-", "lora": {"enable": True, "rank": 4}})
    with session("cpu") as world:
        lm = build_lm(loaders._lm_kwargs | TINY, torch.float32)
        make_trainable(lm, args)
        model = TrainingLM(lm, gradient_checkpointing=True)
        shard(model, [*lm.transformer.layers, *lm.depformer.layers], make_mesh(world, "full"), torch.float32)
        model.to_empty(device="cpu")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            local_rows(parameter)[1].zero_()
        rows = [f"{len(trained)} gradients, {world.size} ranks", "| | first, ms | later, ms | norm |", "|--|--|--|--|"]
        for name, clip in WAYS.items():
            times = []
            for _ in range(6):
                for parameter in trained:
                    parameter.grad = torch.ones_like(parameter)
                began = time.perf_counter()
                norm = float(clip(trained, 1.0))
                times.append(1000 * (time.perf_counter() - began))
            rows.append(f"| {name} | {times[0]:.0f} | {min(times[1:]):.0f} | {norm:.6f} |")
        if world.is_main:
            print("\n".join(rows))


if __name__ == "__main__":
    run(main)
