"""Evaluate a run's best checkpoint on held-out data: losses, and free-running replies to held-out users.

    python -m finetune.tools.evaluate runs/personaplex                   losses and replies, next to the base model's
    python -m finetune.tools.evaluate runs/personaplex --conditioning    do role and voice prompts matter?
    python -m finetune.tools.evaluate runs/personaplex --forgetting      does the model still say what its base said?
    python -m finetune.tools.evaluate runs/a runs/b                      is b better than a?

Reads the run folder, or one of its checkpoints, and the held-out data of its settings; prints tables, and writes
evaluation_STEP.json and samples/ to the run folder, or, if data.eval_data=NAME.jsonl names other data, to its folder
evaluation_on_NAME. The windows are the same each time, on any number of processes.

Teacher-forced losses alone can mislead: models have predicted 98.8 % of the text and stayed silent when left alone.
Differences between models or prompts are paired by window, with 95 % intervals from a bootstrap over calls; where an
interval contains zero, there is no difference that these data can show.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from finetune.args import TrainArgs
from finetune.cli import UserError
from finetune.config import load_args
from finetune.data.manifest import parse_sources
from finetune.data.run_data import RunData
from finetune.distributed import World, session
from finetune.evaluate import evaluate, free_run, judge_replies, refuse_unreadable
from finetune.files import replacing
from finetune.jobs.bars import show_bars
from finetune.loss import group_weights, with_objective
from finetune.model.inference import fill, load_merged
from finetune.model.stored import StoredModel, base_of, open_stored
from finetune.model.training_lm import TrainingLM
from finetune.parser import Parser
from finetune.run_dir import run_of, stored_settings
from finetune.streams import DEP_Q
from finetune.tools.evaluate.compare import compare_models, measure_conditioning, measure_forgetting


def main() -> None:
    given, overrides = _parse()
    run = run_of(given.run)
    if not given.run.is_dir():
        open_stored(str(given.run))  # says what is there instead
    if run is None:
        raise UserError(f"{given.run}: not a run folder (it has no args.yaml)")
    load = lambda *changes: load_args(run / "args.yaml", [*changes, *overrides], stored_settings(run))
    unchecked = ("do_eval=false", "guard.action=off", "early_stop=null")
    own_data = load_args(run / "args.yaml", unchecked, stored_settings(run)).data.eval_data
    if not load(*unchecked).data.eval_data:
        raise UserError(f"{run}: the run has no held-out data; name some: data.eval_data=held_out.jsonl")
    args = load("do_eval=true")
    source = open_stored(str(given.run))
    step = source.training.step if source.training else 0
    folder = run  # the report and the model card read there what is known of the run's own data
    if args.data.eval_data != own_data:
        folder = run / f"evaluation_on_{'+'.join(path.stem for path, _ in parse_sources(args.data.eval_data))}"
    with session(args.device) as world:
        if world.is_main:
            show_bars()
            print(f"{source.checkpoint.source}{f': {source.choice}' if source.choice else ''}")
        prompts = source.kwargs["dep_q"] == DEP_Q
        data = RunData(args, prompts, source.checkpoint, source.kwargs, source.read, world, source.voices_archive)
        dtype, dep_q = getattr(torch, args.param_dtype), source.kwargs["dep_q"]
        merged = load_merged(source, world.device, dtype, dep_q, args.base_dtype)
        lm = TrainingLM(merged, gradient_checkpointing=False)
        if given.other or given.conditioning or given.forgetting:
            report = _compare(given, args, source, lm, data, world)
            if world.is_main:
                _update(folder / f"evaluation_{step:06d}.json", step, report)
            return
        row, base, verdict = _measure(args, folder, source, lm, data, world, given_data=bool(overrides))
        if not world.is_main:
            return
    _update(folder / f"evaluation_{step:06d}.json", step, row | {"base": base})
    form = lambda value: f"{value:.4f}" if isinstance(value, float) else "-" if value is None else str(value)
    print(f"{'':<28}{f'step {step}':>12}" + f"{'base':>12}" * bool(base))
    for key, value in row.items():
        print(f"{key:<28}{form(value):>12}" + (f"{form(base.get(key)):>12}" if base else ""))
    if verdict:
        print(f"the replies: {verdict}")


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="run folder, or one of its checkpoints")
    parser.add_argument("others", nargs="*", metavar="other | key=value",
                        help="a second run or checkpoint to compare; settings that replace the run's")  # fmt: skip
    parser.add_argument("--conditioning", action="store_true", help="exchange the prompts of held-out dialogues")
    parser.add_argument("--forgetting", action="store_true", help="judge the base model's own replies")
    given = parser.parse_args()
    overrides = [text for text in given.others if "=" in text]
    models = [text for text in given.others if "=" not in text]
    if len(models) > 1 or (models and (given.conditioning or given.forgetting)):
        raise UserError("give one run, or two to compare them; --conditioning and --forgetting take one")
    given.other = models[0] if models else None
    return given, overrides


def _measure(
    args: TrainArgs, folder: Path, source: StoredModel, lm: TrainingLM, data: RunData, world: World, given_data: bool
) -> tuple[dict, dict | None, str | None]:
    """Return the row of an evaluation, that of the base if it can be had, and what is wrong with the replies."""
    weights, step = group_weights(args, lm.lm.dep_q), source.training.step if source.training else 0
    row, problems = evaluate(lm, data.eval_batches(), weights, world)
    row = with_objective(row, args)
    refuse_unreadable(row, problems)
    verdict = None
    if args.eval_free_samples and world.is_main:
        samples = data.eval_samples(args.eval_free_samples)
        replies = free_run(lm, samples, args.eval_free_sec, args.seed)
        samples_dir = folder / "samples" / f"step_{step:06d}"
        measures, verdict = judge_replies(replies, samples, data.decoder(), data.text_tokenizer, samples_dir)
        row |= measures
    earlier = source.training.held_out if source.training and not given_data else []
    base = next((row for row in earlier if row["step"] == 0), None)
    if base is None and source.adapters is not None:
        fill(lm.lm, dataclasses.replace(source, adapters=None))
        base = with_objective(evaluate(lm, data.eval_batches(), weights, world)[0], args)
    return row, base, verdict


def _compare(
    given: argparse.Namespace, args: TrainArgs, source: StoredModel, lm: TrainingLM, data: RunData, world: World
) -> dict:
    """Run the comparisons that were asked for, print them, and return them as JSON."""
    weights = group_weights(args, lm.lm.dep_q)
    samples = data.eval_samples(args.eval_max_samples or len(data.held_out))
    if not samples:
        raise UserError("none of the held-out windows could be read; run check_data on data.eval_data")
    if given.other:
        other = open_stored(given.other)
        if other.shapes != source.shapes:
            raise UserError(f"{given.other}: a model of other sizes than {given.run}, so they cannot be compared")
        switch = lambda to_other: fill(lm.lm, other if to_other else source)
        free = data.eval_samples(args.eval_free_samples) if args.eval_free_samples else []
        return {"comparison": {"other": given.other} | compare_models(lm, switch, samples, free, args, data, world)}
    base = base_of(source)
    if base is None:
        raise UserError(f"{given.run}: its base is not known, so there is nothing to compare with; give a run folder")
    switch = lambda to_base: fill(lm.lm, base if to_base else source)
    report = {}
    if given.conditioning:
        if data.prompter is None:
            raise UserError(f"{given.run}: a Moshi of 8 codebooks has no prompts to exchange")
        report["conditioning"] = measure_conditioning(lm, switch, samples, weights, world)
    if given.forgetting:
        report["forgetting"] = measure_forgetting(lm, switch, samples, args, weights, world)
    return report


def _update(path: Path, step: int, found: dict) -> None:
    """Add what was found to the evaluation of a step."""
    try:
        earlier = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        earlier = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(earlier | {"step": step} | found, indent=1))
