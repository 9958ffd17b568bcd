"""Free-running replies: the model hears a user and speaks, as it does behind an inference server.

moshi's own `LMGen` runs the steps; its hooks force the prompts. Of the 16 depformer steps of PersonaPlex only the first
8 run: the user's codes are given, not predicted, and the depformer is causal over codebooks, so the other steps would
change nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from moshi.models import LMGen, LMModel, MimiModel
from torch import Tensor

from finetune.audio.files import FRAME_RATE, FRAME_SIZE
from finetune.model.targets import delay_streams
from finetune.model.training_lm import embed_columns
from finetune.progress import tracked
from finetune.prompts.hybrid import SystemPrompt
from finetune.streams import CODEBOOKS, N_STREAMS

FREE = -2  # marks a token that the model chooses itself (`ungenerated_token_id` in moshi)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The defaults are those of Kyutai's and NVIDIA's servers (moshi/models/lm.py, LMGen)."""

    greedy: bool = False
    temp: float = 0.8
    temp_text: float = 0.7
    top_k: int = 250
    top_k_text: int = 25


@dataclass
class Reply:
    """What the agent says during T frames of the user: text tokens [T] and Mimi codes [8, T], both int64."""

    text: Tensor
    codes: Tensor


@contextmanager
def generation_mode(lm: LMModel) -> Iterator[None]:
    """Put `lm` into evaluation mode with 8 depformer steps for the duration of the block."""
    dep_q, training = lm.dep_q, lm.training
    lm.dep_q = CODEBOOKS
    lm.eval()
    try:
        yield
    finally:
        lm.dep_q = dep_q
        lm.train(training)


@torch.no_grad()
def generate(
    lm: LMModel, prompts: Sequence[SystemPrompt | None], users: Sequence[Tensor], sampling: Sampling = Sampling(),
    seed: int = 0, each_second: Callable[[], None] = lambda: None,
) -> list[Reply]:  # fmt: skip
    """Generate the replies to several users at once. Apart from random draws, each is what it would be alone.

    Args:
        prompts: one per conversation, None for none. Either all have embeddings, of the same length, or none has.
        users: [8, T_i] int64, the codes of what each user says.
        seed: for the generators of torch.
        each_second: called once per second of dialogue; an exception that it raises ends the generation.
    """
    torch.manual_seed(seed)
    size = len(users)
    heads = [torch.empty(N_STREAMS, 0, dtype=torch.int64) if p is None else p.frames for p in prompts]
    lengths = [head.shape[1] + user.shape[1] for head, user in zip(heads, users)]
    # Column c + 1 holds frame c of the semantic streams and frame c - 1 of the acoustic ones, as in training.
    columns = max(lengths) + max(lm.delays) + 1
    forced = torch.full((size, 1 + CODEBOOKS, columns), FREE, dtype=torch.int64)
    inputs = torch.full((size, CODEBOOKS, columns), lm.initial_token_id, dtype=torch.int64)
    for i, (head, user) in enumerate(zip(heads, users)):
        for stream in range(1 + CODEBOOKS):
            start = 1 + lm.delays[stream]
            forced[i, stream, start : start + head.shape[1]] = head[stream]
        inputs[i, :, 1 : 1 + head.shape[1]] = head[1 + CODEBOOKS :]
        inputs[i, :, 1 + head.shape[1] : 1 + lengths[i]] = user
    forced, inputs = forced.to(lm.device), inputs.to(lm.device)
    output = torch.empty_like(forced)
    column = 0  # the one that is being predicted

    def force(tokens: Tensor, streams: int | slice) -> None:  # [B] or [B, 8], changed in place
        given = forced[:, streams, column]
        output[:, streams, column] = tokens.copy_(torch.where(given == FREE, tokens, given))

    with generation_mode(lm), short_ring(lm, columns):
        stepper = LMGen(
            lm, use_sampling=not sampling.greedy, temp=sampling.temp, temp_text=sampling.temp_text,
            top_k=sampling.top_k, top_k_text=sampling.top_k_text,
            on_text_hook=lambda token: force(token, 0), on_audio_hook=lambda tokens: force(tokens, slice(1, None)),
        )  # fmt: skip
        with stepper.streaming(size):
            steps = range(_prefill(stepper, prompts, heads), columns - 1)
            for step in tracked(steps, f"speaking ({size} at once)", len(steps)):
                column = step + 1
                stepper.step(inputs[:, :, step : step + 1])
                if step % int(FRAME_RATE) == 0:
                    each_second()
    output = output.cpu()
    replies = []
    for i, (head, length) in enumerate(zip(heads, lengths)):
        text, *codes = (
            output[i, s, 1 + lm.delays[s] + head.shape[1] : 1 + lm.delays[s] + length] for s in range(1 + CODEBOOKS)
        )
        replies.append(Reply(text, torch.stack(codes)))
    return replies


@contextmanager
def short_ring(lm: LMModel, columns: int) -> Iterator[None]:
    """Limit the attention caches that are made in the block to a conversation of `columns`: at 7B, the 3,000 of the
    config take 1.6 GB for each conversation."""
    attentions = [layer.self_attn for layer in lm.transformer.layers]
    contexts = [attention.context for attention in attentions]
    for attention, context in zip(attentions, contexts):
        attention.context = columns if context is None else min(context, columns)
    try:
        yield
    finally:
        for attention, context in zip(attentions, contexts):
            attention.context = context


def _prefill(stepper: LMGen, prompts: Sequence[SystemPrompt | None], heads: Sequence[Tensor]) -> int:
    """Feed the prompts to the temporal transformer in one call, as far as all of them reach, with the embeddings of
    `.pt` voices in place; return the number of steps that this replaces."""
    given = [p.embeddings for p in prompts if p is not None and p.embeddings is not None]
    if given and (len(given) != len(prompts) or len({len(e) for e in given}) != 1):
        raise ValueError("prompts with embeddings are generated together only if all have embeddings of one length")
    lm, state = stepper.lm_model, stepper._streaming_state
    steps = min(min(head.shape[1] for head in heads), lm.transformer.layers[0].self_attn.context)
    if not steps:
        return 0
    frames = torch.stack([head[:, :steps] for head in heads]).to(lm.device)
    initial = lm._get_initial_token()
    columns = torch.cat([initial.expand(len(heads), -1, -1), delay_streams(frames, lm.delays, initial)], 2)
    x = embed_columns(lm, columns[:, :, :steps])
    if given:
        embeddings = torch.stack(given).to(x)  # [B, E, dim]
        x = torch.cat([embeddings[:, :steps], x[:, embeddings.shape[1] :]], 1)
    lm.transformer(x)
    # The next step reads the column after these from LMGen's ring, which no step has filled.
    state.cache[:, :, steps % state.cache.shape[2]] = columns[:, :, steps]
    state.offsets += steps
    state.offset_cpu += steps
    return steps


def decode_codes(mimi: MimiModel, codes: Sequence[Tensor]) -> list[np.ndarray]:
    """Decode codes [8, T_i] to float32 [1920 T_i] at 24 kHz, frame by frame like a server."""
    padded = torch.zeros(len(codes), CODEBOOKS, max(own.shape[1] for own in codes), dtype=torch.int64)
    for row, own in zip(padded, codes):
        row[:, : own.shape[1]] = own
    frames = padded.to(next(mimi.parameters()).device).split(1, dim=2)
    with torch.inference_mode(), mimi.streaming(len(codes)):
        pcm = torch.cat([mimi.decode(frame) for frame in tracked(frames, "decoding", len(frames))], dim=2)
    return [sound[0, : own.shape[1] * FRAME_SIZE].cpu().numpy() for sound, own in zip(pcm, codes)]
