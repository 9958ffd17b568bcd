"""Comparisons of a model: its prompts against other prompts, its base's words, and another model."""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from finetune.args import TrainArgs
from finetune.data.batch import Sample
from finetune.data.run_data import RunData
from finetune.dialogue import measure_reply
from finetune.distributed import World
from finetune.evaluate import free_run
from finetune.generate import decode_codes
from finetune.loss import group_weights
from finetune.model.training_lm import TrainingLM
from finetune.streams import CODEBOOKS, SILENCE_FRAMES
from finetune.tools.evaluate.windows import (
    MeanRange,
    agent_losses,
    bootstrap,
    exchange_prompt,
    other_prompts,
    recording_of,
    with_reply,
)

Switch = Callable[[bool], None]  # gives the model the weights of the base or the other model, or its own again
REPLY_MEASURES = ("silence", "overlap", "words_per_minute", "padding", "repetition", "tor_turn", "treble", "flatness")


def measure_conditioning(
    lm: TrainingLM, switch: Switch, samples: Sequence[Sample], weights: Tensor, world: World
) -> dict:
    """Say whether the prompts matter: how much worse the model predicts what the agent says (nats per token of text
    plus of audio) with the role, or the voice, of another call, or without a prompt."""
    roles = other_prompts(samples, lambda sample: tuple(sample.prompt_ids))
    voices = other_prompts(samples, _voice_key)
    everyone = list(samples)
    exchanged = {  # (samples, the same with another prompt)
        "role": _pairs(everyone, roles, lambda sample, other: exchange_prompt(sample, other, sample)),
        "voice": _pairs(everyone, voices, lambda sample, other: exchange_prompt(sample, sample, other)),
        "prompt": (everyone, [exchange_prompt(sample, None, None) for sample in everyone]),
    }
    rises: dict[bool, dict[str, list[float]]] = {True: {}, False: {}}  # of the loss, by whether the model is the base
    for is_base, found in rises.items():
        switch(is_base)
        own = dict(zip(map(id, everyone), agent_losses(lm, everyone, weights, world)))
        for kind, (before, after) in exchanged.items():
            losses = agent_losses(lm, after, weights, world)
            found[kind] = [loss - own[id(sample)] for loss, sample in zip(losses, before)]
    out: dict = {}
    what = {"role": "another call's role", "voice": "another call's voice", "prompt": "no prompt"}
    for kind, (before, _) in exchanged.items():
        if not before:
            sentence = f"{kind}: cannot be judged, because all held-out calls have the same"
            out[kind] = {"matters": None, "sentence": sentence}
        else:
            calls = list(map(recording_of, before))
            tuned, base = (bootstrap(rises[is_base][kind], calls) for is_base in (False, True))
            gain = bootstrap(np.subtract(rises[False][kind], rises[True][kind]).tolist(), calls)
            verdict = "matters" if tuned.is_positive else "does NOT matter, as far as these data can show"
            change = "more" if gain.is_positive else "less" if gain.is_negative else "no more and no less"
            sentence = (
                f"{kind} {verdict}: with {what[kind]} the loss changes by {tuned} (base: {base}), {change} than for "
                "the base"
            )
            out[kind] = {
                "matters": tuned.is_positive, "tuned": tuned, "base": base, "gain": gain, "windows": len(calls),
                "sentence": sentence,
            }  # fmt: skip
        if world.is_main:
            print(out[kind]["sentence"])
    return out


def _pairs(
    samples: list[Sample], others: list[Sample | None], exchange: Callable[[Sample, Sample], Sample]
) -> tuple[list[Sample], list[Sample]]:
    """Return (the samples for which there is another prompt, the same with it)."""
    found = [(sample, exchange(sample, other)) for sample, other in zip(samples, others) if other is not None]
    return [sample for sample, _ in found], [changed for _, changed in found]


def _voice_key(sample: Sample) -> object:
    """Tells voice prompts apart by their codes too: `same_speaker` is one name for many."""
    frames = int((~sample.loss_mask).sum()) - len(sample.prompt_ids) - 2 * SILENCE_FRAMES
    return sample.voice, sample.codes[1 : 1 + CODEBOOKS, : max(0, frames)].numpy().tobytes()


def measure_forgetting(
    lm: TrainingLM, switch: Switch, samples: Sequence[Sample], args: TrainArgs, weights: Tensor, world: World
) -> dict:
    """Say how much less likely the base's own replies have become."""
    switch(True)
    said = free_run(lm, list(samples), args.eval_free_sec, args.seed)
    replies = [with_reply(sample, reply, user) for sample, (user, reply) in zip(samples, said)]
    before = agent_losses(lm, replies, weights, world)
    switch(False)
    after = agent_losses(lm, replies, weights, world)
    rise = bootstrap(np.subtract(after, before).tolist(), list(map(recording_of, samples)))
    verdict = "has become less likely" if rise.is_positive else "is as likely as before"
    sentence = (
        f"what the base says {verdict}: the loss of its replies was {np.mean(before):.4f} and is {np.mean(after):.4f} "
        f"({rise})"
    )
    if world.is_main:
        print(sentence)
    return {"before": float(np.mean(before)), "after": float(np.mean(after)), "rise": rise, "sentence": sentence}


def compare_models(
    lm: TrainingLM, switch: Switch, samples: Sequence[Sample], free: Sequence[Sample], args: TrainArgs, data: RunData,
    world: World,
) -> dict:  # fmt: skip
    """Compare the other model with this one: the loss on the same windows, and measures of replies to the same users
    with the same seed."""
    weights, calls = group_weights(args, lm.lm.dep_q), list(map(recording_of, samples))
    losses, measures = {}, {}
    for is_other in (False, True):
        switch(is_other)
        losses[is_other] = agent_losses(lm, samples, weights, world)
        if free and world.is_main:
            said = free_run(lm, list(free), args.eval_free_sec, args.seed)
            mimi = data.decoder()
            users = decode_codes(mimi, [user for user, _ in said])
            agents = decode_codes(mimi, [reply.codes for _, reply in said])
            measures[is_other] = [
                measure_reply(agent, user, reply.text, data.text_tokenizer)
                for agent, user, (_, reply) in zip(agents, users, said)
            ]
    out = {"loss of the agent": _difference(losses[False], losses[True], calls)}
    for key in REPLY_MEASURES if measures else ():
        pairs = [
            (a[key], b[key], recording_of(sample))
            for a, b, sample in zip(measures[False], measures[True], free) if None not in (a[key], b[key])
        ]  # fmt: skip
        if pairs:
            out[f"replies: {key}"] = _difference(*map(list, zip(*pairs)))
    if world.is_main:
        print(f"{'':<28}{'first':>10}{'second':>10}   second - first [95 % interval]")
        for name, row in out.items():
            note = "" if row["difference"].is_positive or row["difference"].is_negative else "   no difference"
            print(f"{name:<28}{row['first']:>10.4f}{row['second']:>10.4f}   {row['difference']}{note}")
    return out


def _difference(first: list[float], second: list[float], calls: list[str]) -> dict[str, float | MeanRange]:
    difference = bootstrap(np.subtract(second, first).tolist(), calls)
    return {"first": float(np.mean(first)), "second": float(np.mean(second)), "difference": difference}
