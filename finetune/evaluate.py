"""Evaluation on held-out data: teacher-forced losses, and free-running replies to held-out users.

Losses alone do not suffice: models have predicted 98.8 % of the text under teacher forcing and been mute on their own.
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
    lm: TrainingLM, batches: Iterable[Batch], weights: Tensor, world: World, each_batch: Callable = lambda: None
) -> tuple[dict[str, float], list[str]]:
    """Return what `loss_report` computes of the batches of all ranks, with the numbers of windows read (`samples`) and
    `skipped`, and the share without a voice prompt; and the distinct reasons for skipping. An exception that
    `each_batch` raises ends it."""
    # The cross-entropies of a whole held-out set add up to more than the 24 bits of float32 can hold.
    totals = torch.zeros(3, len(weights), dtype=torch.float64, device=world.device)
    windows, problems = torch.zeros(3, dtype=torch.float64), []
    for batch in batches:
        moved = batch.to(world.device)
        out = lm(moved.codes, moved.loss_mask, moved.embeddings, moved.lengths, targets=moved.targets)
        totals[0] += out.ce
        totals[1] += out.correct
        totals[2] += batch.counts.to(world.device, non_blocking=True)
        windows += torch.tensor([len(batch.names), len(batch.problems), batch.voiceless])
        problems += batch.problems
        each_batch()
    ce, correct, counts = world.sum(totals)
    samples, skipped, voiceless = world.sum(windows).tolist()
    if skipped:
        problems = sorted(set().union(*world.gather(problems)))
    counted = {"share_without_voice": voiceless / max(samples, 1), "samples": int(samples), "skipped": int(skipped)}
    return loss_report(ce, correct, counts, weights) | counted, problems


def refuse_unreadable(row: dict[str, float], problems: list[str]) -> None:
    """Raise UserError if there are held-out windows and none of them could be read."""
    if problems and not row["samples"]:
        raise UserError(f"none of the held-out windows could be read; {what_to_do(problems)}")


def free_run(
    lm: TrainingLM, samples: list[Sample], max_sec: float, seed: int, each_second: Callable[[], None] = lambda: None
) -> list[tuple[Tensor, Reply]]:
    """Return (user codes [8, T], reply) of each sample, after its own prompt and for at most `max_sec` seconds.

    If the model is sharded, all ranks must call this with the same samples, and all get all replies. The model is
    gathered once, in the dtype of its computation, not in each of thousands of steps. See `generate` for `each_second`.
    """
    prompts, users = [], []
    groups: dict[int, list[int]] = {}  # samples by prompt embeddings, which must have one length in a batch
    for i, sample in enumerate(samples):
        start = int((~sample.loss_mask).sum())
        prompts.append(SystemPrompt(sample.codes[:, :start], sample.embeddings))
        users.append(sample.codes[1 + CODEBOOKS :, start : start + int(max_sec * FRAME_RATE)])
        groups.setdefault(0 if sample.embeddings is None else len(sample.embeddings), []).append(i)
    replies: dict[int, Reply] = {}
    sharded = [module for module in lm.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        for group in groups.values():
            with no_cuda_graph():  # a graph would capture FSDP's hooks together with the layers
                inputs = [prompts[i] for i in group], [users[i] for i in group]
                replies |= dict(zip(group, generate(lm.lm, *inputs, seed=seed, each_second=each_second)))
    finally:
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(module is not lm, recurse=False)
    return [(users[i], replies[i]) for i in range(len(samples))]


def judge_replies(
    conversations: list[tuple[Tensor, Reply]], samples: list[Sample], mimi: MimiModel,
    tokenizer: sentencepiece.SentencePieceProcessor, folder: Path, recorded: bool = False,
) -> tuple[dict, str | None]:  # fmt: skip
    """Return measures over all replies (finetune.dialogue; keys get the prefix `free_`), and a warning if they are mute
    or loop. Write each conversation to `folder`: a wav (agent left, user right) and JSON (prompt, words, measures).

    recorded: measure the recorded agents too (prefix `data_`), through the same Mimi."""
    with no_cuda_graph():  # a data loader's thread may pin memory in the meantime, which would break a capture
        agents = decode_codes(mimi, [reply.codes for _, reply in conversations])
        users = decode_codes(mimi, [codes for codes, _ in conversations])
        truth = [recorded_reply(sample, codes.shape[1]) for sample, (codes, _) in zip(samples, conversations)]
        originals = decode_codes(mimi, [reply.codes for reply in truth]) if recorded else []
    measures = []
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
    out = {f"free_{key}": value for key, value in summary.items()}
    own = [measure_reply(*sides, reply.text, tokenizer) for *sides, reply in zip(originals, users, truth)]
    out |= {f"data_{key}": value for key, value in summarise_replies(own).items()} if own else {}
    return out, reply_verdict(summary)


def recorded_reply(sample: Sample, frames: int) -> Reply:
    """What the recorded agent says in the first frames of the dialogue of a sample."""
    start = int((~sample.loss_mask).sum())
    codes = sample.codes[:, start : start + frames]
    return Reply(codes[0], codes[1 : 1 + CODEBOOKS])
