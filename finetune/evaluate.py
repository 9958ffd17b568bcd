"""Judges a checkpoint on held-out data: losses, and free-running replies to its users.

    python -m finetune.evaluate runs/personaplex

The same windows each time, on any number of processes, and the base model's values beside them. Teacher-forced loss is
no verdict: models have scored 98.8 % of the text and said nothing when left alone.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import sentencepiece
import torch
from moshi.models import MimiModel
from moshi.utils.compile import no_cuda_graph
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from finetune import dialogue, loss
from finetune.args import load_args
from finetune.cli import Parser, UserError, run
from finetune.data.audio import FRAME_RATE
from finetune.data.dataset import Batch, Sample
from finetune.data.setup import Data, what_to_do
from finetune.distributed import World, session
from finetune.export import open_source
from finetune.fast import TrainingLM
from finetune.generate import Reply, decode, generate, load_merged, write_conversation
from finetune.jobs import replacing
from finetune.personaplex import CODEBOOKS, DEP_Q, Prompt


@torch.no_grad()
def evaluate(
    lm: TrainingLM, batches: Iterable[Batch], weights: Tensor, world: World
) -> tuple[dict[str, float], list[str]]:
    """Teacher-forced losses and accuracies (see finetune.loss.report) over all batches of all ranks, divided by all of
    their tokens, where `samples` and `skipped` count windows; and why windows were skipped, each reason once."""
    groups = len(weights)
    # Sums of cross-entropies over a whole held-out set outgrow float32's 24 bits.
    totals = torch.zeros(3, groups, dtype=torch.float64, device=world.device)
    windows, problems = torch.zeros(2, dtype=torch.float64), []
    for batch in batches:
        on_device = batch.to(world.device)
        out = lm(
            on_device.codes, on_device.loss_mask, on_device.embeddings, on_device.lengths, plan=on_device.plan
        )
        totals[0] += out.ce
        totals[1] += out.correct
        totals[2] += batch.counts.to(world.device)
        windows += torch.tensor([len(batch.names), len(batch.problems)])
        problems += batch.problems
    ce, correct, counts = world.sum(totals)
    samples, skipped = world.sum(windows).tolist()
    if skipped:
        problems = sorted(set().union(*world.gather(problems)))
    return loss.report(ce, correct, counts, weights) | {"samples": int(samples), "skipped": int(skipped)}, problems


def refuse_unreadable(row: dict[str, float], problems: list[str]) -> None:
    """Raises UserError if there were windows to evaluate and not one could be read."""
    if problems and not row["samples"]:
        raise UserError(f"none of the held-out windows could be read; {what_to_do(problems)}")


def free_run(
    lm: TrainingLM, samples: list[Sample], max_sec: float, seed: int, each_second: Callable[[], None] = lambda: None
) -> list[tuple[Tensor, Reply]]:
    """(user codes [8, T], reply) of held-out samples, each after its own prompt, of at most `max_sec` seconds.

    With a sharded model all ranks have to call this with the same samples, and each gets all replies. The model is
    gathered for the whole time, in the dtype that it computes in: some thousand steps would gather it as often.
    What `each_second` of dialogue raises ends it.
    """
    frames = int(max_sec * FRAME_RATE)
    prompts, users = [], []
    for sample in samples:
        start = int((~sample.loss_mask).sum())
        prompts.append(Prompt(sample.codes[:, :start], sample.embeddings))
        users.append(sample.codes[1 + CODEBOOKS :, start : start + frames])
    # Prompts with embeddings go together only with those of the same length.
    groups: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(0 if prompt.embeddings is None else len(prompt.embeddings), []).append(i)
    replies: dict[int, Reply] = {}
    sharded = [module for module in lm.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        for group in groups.values():
            with no_cuda_graph():  # FSDP's hooks would be captured with the layers
                said = generate(lm.lm, [prompts[i] for i in group], [users[i] for i in group], seed=seed,
                                each_second=each_second)  # fmt: skip
            replies |= dict(zip(group, said))
    finally:
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(module is not lm, recurse=False)
    return [(users[i], replies[i]) for i in range(len(samples))]


def judge(
    conversations: list[tuple[Tensor, Reply]], samples: list[Sample], mimi: MimiModel,
    tokenizer: sentencepiece.SentencePieceProcessor, folder: Path,
) -> tuple[dict, str | None]:
    """Measures of replies (finetune.dialogue, keys prefixed `free_`) and a verdict if they went mute or loop.

    Each conversation is written to `folder`: a stereo wav, and as JSON its prompt, words and measures.
    """  # fmt: skip
    measures = []
    with no_cuda_graph():  # a data loader's thread may pin memory meanwhile, which would break a capture
        agents = decode(mimi, [reply.codes for _, reply in conversations])
        users = decode(mimi, [codes for codes, _ in conversations])
    for i, ((_, reply), sample, agent, user) in enumerate(zip(conversations, samples, agents, users)):
        measures.append(dialogue.measure(agent, user, reply.text, tokenizer))
        path = folder / f"{i:02d}.wav"
        write_conversation(path, agent, user)
        about = {
            "of": sample.name, "prompt": tokenizer.decode(sample.prompt_ids), "voice": sample.voice,
            "text": dialogue.words(reply.text, tokenizer), "measures": measures[-1],
        }  # fmt: skip
        with replacing(path.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(about, ensure_ascii=False))
    summary = dialogue.summarise(measures)
    return {f"free_{key}": value for key, value in summary.items()}, dialogue.verdict(summary)


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
    source = open_source(str(given.run))
    with session(args.device) as world:
        prompts = source.kwargs["dep_q"] == DEP_Q
        data = Data(
            args, prompts, source.checkpoint, source.kwargs, source.read, world, source.voices_archive
        )  # fmt: skip
        whole = load_merged(source, world.device, getattr(torch, args.param_dtype), source.kwargs["dep_q"])
        lm = TrainingLM(whole, gradient_checkpointing=False)
        weights = loss.group_weights(args, whole.dep_q)
        row, unread = evaluate(lm, data.eval_batches(), weights, world)
        refuse_unreadable(row, unread)
        step = source.training.step if source.training else 0
        trouble = None
        if args.eval_free_samples and world.is_main:
            samples = data.eval_samples(args.eval_free_samples)
            said = free_run(lm, samples, args.eval_free_sec, args.seed)
            kept = given.run / "samples" / f"step_{step:06d}"
            free, trouble = judge(said, samples, data.decoder(), data.text_tokenizer, kept)
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
