"""Evaluates a run's newest checkpoint on held-out data: losses, and free-running replies to held-out users.

    python -m finetune.tools.evaluate runs/personaplex

It evaluates the same windows each time, on any number of processes, and shows the base model's values for comparison.
Teacher-forced losses alone can mislead: models have predicted 98.8 % of the text and stayed silent when left alone.
"""

import dataclasses
import json
from pathlib import Path

import torch

from finetune.cli import UserError, run
from finetune.config import load_args
from finetune.data.run_data import RunData
from finetune.distributed import session
from finetune.evaluate import evaluate, free_run, judge_replies, refuse_unreadable
from finetune.files import replacing
from finetune.loss import group_weights
from finetune.model.stored import load_merged, open_stored
from finetune.model.training_lm import TrainingLM
from finetune.parser import Parser
from finetune.run_dir import stored_settings
from finetune.streams import DEP_Q


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the run's")
    given = parser.parse_args()
    if not (given.run / "args.yaml").is_file():
        raise UserError(f"{given.run}: not a run folder (it has no args.yaml)")
    load = lambda *changes: load_args(given.run / "args.yaml", [*changes, *given.overrides], stored_settings(given.run))
    if not load("do_eval=false").data.eval_data:
        raise UserError(f"{given.run}: the run has no held-out data; name some: data.eval_data=held_out.jsonl")
    args = load("do_eval=true")
    source = open_stored(str(given.run))
    kwargs, step = source.kwargs, source.training.step if source.training else 0
    with session(args.device) as world:
        prompts = kwargs["dep_q"] == DEP_Q
        data = RunData(args, prompts, source.checkpoint, kwargs, source.read, world, source.voices_archive)
        merged = load_merged(source, world.device, getattr(torch, args.param_dtype), kwargs["dep_q"])
        lm = TrainingLM(merged, gradient_checkpointing=False)
        weights = group_weights(args, merged.dep_q)
        row, problems = evaluate(lm, data.eval_batches(), weights, world)
        refuse_unreadable(row, problems)
        verdict = None
        if args.eval_free_samples and world.is_main:
            samples = data.eval_samples(args.eval_free_samples)
            replies = free_run(lm, samples, args.eval_free_sec, args.seed)
            folder = given.run / "samples" / f"step_{step:06d}"
            measures, verdict = judge_replies(replies, samples, data.decoder(), data.text_tokenizer, folder)
            row |= measures
        earlier = source.training.held_out if source.training and not given.overrides else []
        base = next((row for row in earlier if row["step"] == 0), None)
        if base is None and source.adapters is not None:
            bare = dataclasses.replace(source, adapters=None)
            with torch.no_grad():
                for name, parameter in merged.named_parameters():
                    parameter.copy_(bare.read(name))
            base, _ = evaluate(lm, data.eval_batches(), weights, world)
        if not world.is_main:
            return
    with replacing(given.run / f"evaluation_{step:06d}.json") as temporary:
        temporary.write_text(json.dumps({"step": step} | row | {"base": base}, indent=1))
    form = lambda value: f"{value:.4f}" if isinstance(value, float) else "-" if value is None else str(value)
    print(f"{'':<28}{f'step {step}':>12}" + f"{'base':>12}" * bool(base))
    for key, value in row.items():
        print(f"{key:<28}{form(value):>12}" + (f"{form(base.get(key)):>12}" if base else ""))
    if verdict:
        print(f"the replies: {verdict}")


if __name__ == "__main__":
    run(main)
