"""Judges a checkpoint on held-out data: losses, and free-running replies to its users.

    python -m finetune.tools.evaluate runs/personaplex

The same windows each time, on any number of processes, and the base model's values beside them. Teacher-forced loss is
no verdict: models have scored 98.8 % of the text and said nothing when left alone.
"""

import dataclasses
import json
from pathlib import Path

import torch

from finetune.cli import Parser, UserError, run
from finetune.config import load_args
from finetune.data.run_data import RunData
from finetune.distributed import session
from finetune.evaluate import evaluate, free_run, judge_replies, refuse_unreadable
from finetune.files import replacing
from finetune.loss import group_weights
from finetune.model.stored import load_merged, open_stored
from finetune.model.training_lm import TrainingLM
from finetune.streams import DEP_Q


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="run folder; its newest checkpoint is judged")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings in place of the run's")
    given = parser.parse_args()
    if not (given.run / "args.yaml").is_file():
        raise UserError(f"{given.run}: not a run folder (it has no args.yaml)")
    if not load_args(given.run / "args.yaml", ["do_eval=false", *given.overrides]).data.eval_data:
        raise UserError(f"{given.run}: the run has no held-out data; name some: data.eval_data=held_out.jsonl")
    args = load_args(given.run / "args.yaml", ["do_eval=true", *given.overrides])
    source = open_stored(str(given.run))
    with session(args.device) as world:
        prompts = source.kwargs["dep_q"] == DEP_Q
        data = RunData(
            args, prompts, source.checkpoint, source.kwargs, source.read, world, source.voices_archive
        )  # fmt: skip
        whole = load_merged(source, world.device, getattr(torch, args.param_dtype), source.kwargs["dep_q"])
        lm = TrainingLM(whole, gradient_checkpointing=False)
        weights = group_weights(args, whole.dep_q)
        row, unread = evaluate(lm, data.eval_batches(), weights, world)
        refuse_unreadable(row, unread)
        step = source.training.step if source.training else 0
        trouble = None
        if args.eval_free_samples and world.is_main:
            samples = data.eval_samples(args.eval_free_samples)
            said = free_run(lm, samples, args.eval_free_sec, args.seed)
            kept = given.run / "samples" / f"step_{step:06d}"
            free, trouble = judge_replies(said, samples, data.decoder(), data.text_tokenizer, kept)
            row |= free
        earlier = source.training.held_out if source.training and not given.overrides else []
        base = next((row for row in earlier if row["step"] == 0), None)
        if base is None and source.adapters is not None:
            bare = dataclasses.replace(source, adapters=None)
            with torch.no_grad():
                for name, parameter in whole.named_parameters():
                    parameter.copy_(bare.read(name))
            base, _ = evaluate(lm, data.eval_batches(), weights, world)
        if not world.is_main:
            return 0
    with replacing(given.run / f"evaluation_{step:06d}.json") as temporary:
        temporary.write_text(json.dumps({"step": step} | row | {"base": base}, indent=1))
    form = lambda value: f"{value:.4f}" if isinstance(value, float) else "-" if value is None else str(value)
    print(f"{'':<28}{f'step {step}':>12}" + f"{'base':>12}" * (base is not None))
    for key, value in row.items():
        print(f"{key:<28}{form(value):>12}" + (f"{form(base.get(key)):>12}" if base else ""))
    if trouble:
        print(f"the replies: {trouble}")
    return 0


if __name__ == "__main__":
    run(main)
