"""Held-out data: losses on it, and free-running replies to its users; the same windows each time, on any number of
ranks. Teacher-forced loss is no verdict: models have scored 98.8 % of the text and said nothing when left alone."""

import json
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import torch
from moshi.models import MimiModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from finetune import dialogue, loss
from finetune.data.audio import FRAME_RATE
from finetune.data.dataset import Batch, Sample
from finetune.distributed import World
from finetune.fast import TrainingLM
from finetune.generate import Reply, decode, generate, write_conversation
from finetune.jobs import replacing
from finetune.personaplex import CODEBOOKS, Prompt


@torch.no_grad()
def evaluate(model: TrainingLM, batches: Iterable[Batch], weights: Tensor, world: World) -> dict[str, float]:
    """Teacher-forced losses and accuracies (see finetune.loss.report) over all batches of all ranks, divided by all of
    their tokens; `samples` and `skipped` count windows."""
    groups = len(weights)
    # Sums of cross-entropies over a whole held-out set outgrow float32's 24 bits.
    totals = torch.zeros(3, groups, dtype=torch.float64, device=world.device)
    windows = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        on_device = batch.to(world.device)
        out = model(
            on_device.codes, on_device.loss_mask, on_device.embeddings, on_device.lengths, plan=on_device.plan
        )
        totals[0] += out.ce
        totals[1] += out.correct
        totals[2] += batch.counts.to(world.device)
        windows += torch.tensor([len(batch.names), len(batch.problems)])
    ce, correct, counts = world.sum(totals)
    samples, skipped = world.sum(windows).tolist()
    return loss.report(ce, correct, counts, weights) | {"samples": int(samples), "skipped": int(skipped)}


def free_run(model: TrainingLM, samples: list[Sample], max_sec: float, seed: int) -> list[tuple[Tensor, Reply]]:
    """(user codes [8, T], reply) of held-out samples, each after its own prompt, of at most `max_sec` seconds.

    With a sharded model all ranks have to call this with the same samples, and each gets all replies. The model is
    gathered for the whole time, in the dtype that it computes in: some thousand steps would gather it as often.
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
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        for group in groups.values():
            said = generate(model.lm, [prompts[i] for i in group], [users[i] for i in group], seed=seed)
            replies |= dict(zip(group, said))
    finally:
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)
    return [(users[i], replies[i]) for i in range(len(samples))]


def judge(
    conversations: list[tuple[Tensor, Reply]], names: list[str], mimi: MimiModel,
    tokenizer: sentencepiece.SentencePieceProcessor, folder: Path,
) -> tuple[dict, str | None]:
    """Measures of replies (finetune.dialogue, keys prefixed `free_`) and a verdict if they went mute or loop.

    Each conversation is written to `folder`: a stereo wav, and its words and measures as JSON.
    """
    measures = []
    agents = decode(mimi, [reply.codes for _, reply in conversations])
    users = decode(mimi, [codes for codes, _ in conversations])
    for i, ((_, reply), name, agent, user) in enumerate(zip(conversations, names, agents, users)):
        measures.append(dialogue.measure(agent, user, reply.text, tokenizer))
        path = folder / f"{i:02d}.wav"
        write_conversation(path, agent, user)
        about = {"of": name, "text": dialogue.words(reply.text, tokenizer), "measures": measures[-1]}
        with replacing(path.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(about, ensure_ascii=False))
    summary = dialogue.summarise(measures)
    return {f"free_{key}": value for key, value in summary.items()}, dialogue.verdict(summary)
