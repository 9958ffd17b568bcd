"""Judges a checkpoint on held-out data: losses, and free-running replies to its users.

    python -m finetune.tools.evaluate runs/personaplex

The same windows each time, on any number of processes, and the base model's values beside them. Teacher-forced loss is
no verdict: models have scored 98.8 % of the text and said nothing when left alone.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import sentencepiece
import torch
from moshi.models import MimiModel
from moshi.utils.compile import no_cuda_graph
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from finetune.audio.files import FRAME_RATE, write_conversation
from finetune.cli import UserError
from finetune.data.batch import Batch, Sample
from finetune.data.run_data import what_to_do
from finetune.dialogue import measure_reply, reply_verdict, spoken_words, summarise_replies
from finetune.distributed import World
from finetune.files import replacing
from finetune.generate import Reply, decode_codes, generate
from finetune.loss import loss_report
from finetune.model.training_lm import TrainingLM
from finetune.prompts.hybrid import SystemPrompt
from finetune.streams import CODEBOOKS


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
        out = lm(on_device.codes, on_device.loss_mask, on_device.embeddings, on_device.lengths, plan=on_device.plan)
        totals[0] += out.ce
        totals[1] += out.correct
        totals[2] += batch.counts.to(world.device)
        windows += torch.tensor([len(batch.names), len(batch.problems)])
        problems += batch.problems
    ce, correct, counts = world.sum(totals)
    samples, skipped = world.sum(windows).tolist()
    if skipped:
        problems = sorted(set().union(*world.gather(problems)))
    return loss_report(ce, correct, counts, weights) | {"samples": int(samples), "skipped": int(skipped)}, problems


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
        prompts.append(SystemPrompt(sample.codes[:, :start], sample.embeddings))
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


def judge_replies(
    conversations: list[tuple[Tensor, Reply]],
    samples: list[Sample],
    mimi: MimiModel,
    tokenizer: sentencepiece.SentencePieceProcessor,
    folder: Path,
) -> tuple[dict, str | None]:
    """Measures of replies (finetune.dialogue, keys prefixed `free_`) and a verdict if they went mute or loop.

    Each conversation is written to `folder`: a stereo wav, and as JSON its prompt, words and measures.
    """  # fmt: skip
    measures = []
    with no_cuda_graph():  # a data loader's thread may pin memory meanwhile, which would break a capture
        agents = decode_codes(mimi, [reply.codes for _, reply in conversations])
        users = decode_codes(mimi, [codes for codes, _ in conversations])
    for i, ((_, reply), sample, agent, user) in enumerate(zip(conversations, samples, agents, users)):
        measures.append(measure_reply(agent, user, reply.text, tokenizer))
        path = folder / f"{i:02d}.wav"
        write_conversation(path, agent, user)
        about = {
            "of": sample.name, "prompt": tokenizer.decode(sample.prompt_ids), "voice": sample.voice,
            "text": spoken_words(reply.text, tokenizer), "measures": measures[-1],
        }  # fmt: skip
        with replacing(path.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(about, ensure_ascii=False))
    summary = summarise_replies(measures)
    return {f"free_{key}": value for key, value in summary.items()}, reply_verdict(summary)
