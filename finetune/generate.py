"""Free-running replies: the model hears a user and speaks, as it does in a server.

moshi's own `LMGen` does the stepping; prompts are forced through its hooks. PersonaPlex is run with the first 8 of its
16 depformer steps: the user's codes are given, not guessed, and the depformer is causal over codebooks, so the other 8
would change nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from moshi.models import LMGen, LMModel, MimiModel
from torch import Tensor

from finetune.audio.files import FRAME_RATE, FRAME_SIZE
from finetune.prompts.hybrid import SystemPrompt
from finetune.streams import CODEBOOKS, N_STREAMS

FREE = -2  # a token that the model may choose (moshi's `ungenerated_token_id`)


@dataclass(frozen=True)
class Sampling:
    """Defaults are those of Kyutai's and NVIDIA's servers (moshi/models/lm.py, LMGen)."""

    greedy: bool = False
    temp: float = 0.8
    temp_text: float = 0.7
    top_k: int = 250
    top_k_text: int = 25


@dataclass
class Reply:
    """What the agent did while it heard T frames of the user.

    text: [T] int64 text tokens; codes: [8, T] int64 Mimi codes.
    """

    text: Tensor
    codes: Tensor


@contextmanager
def listening(lm: LMModel) -> Iterator[None]:
    """`lm` as an inference model with 8 depformer steps, for the length of the block; then as it was."""
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
    lm: LMModel,
    prompts: Sequence[SystemPrompt | None],
    users: Sequence[Tensor],
    sampling: Sampling = Sampling(),
    seed: int | None = 0,
    each_second: Callable[[], None] = lambda: None,
) -> list[Reply]:
    """Replies to several users at once; each is what it would be alone, up to the random numbers it draws.

    Args:
        prompts: one a conversation; None: without. Prompts with embeddings have to be of one length.
        users: [8, T_i] int64 codes of what each user says.
        seed: of torch's generators; None leaves them as they are.
        each_second: called after each second of the dialogues; what it raises ends them.
    """
    if seed is not None:
        torch.manual_seed(seed)
    device, size = lm.device, len(users)
    heads = [torch.empty(N_STREAMS, 0, dtype=torch.int64) if p is None else p.frames for p in prompts]
    lengths = [head.shape[1] + user.shape[1] for head, user in zip(heads, users)]
    # Column c + 1 shows frame c of the semantic streams and frame c - 1 of the acoustic ones, as in training.
    columns = max(lengths) + max(lm.delays) + 1
    forced = torch.full((size, 1 + CODEBOOKS, columns), FREE, dtype=torch.int64)
    heard = torch.full((size, CODEBOOKS, columns), lm.initial_token_id, dtype=torch.int64)
    for i, (head, user) in enumerate(zip(heads, users)):
        for stream in range(1 + CODEBOOKS):
            start = 1 + lm.delays[stream]
            forced[i, stream, start : start + head.shape[1]] = head[stream]
        heard[i, :, 1 : 1 + head.shape[1]] = head[1 + CODEBOOKS :]
        heard[i, :, 1 + head.shape[1] : 1 + lengths[i]] = user
    forced, heard = forced.to(device), heard.to(device)
    said = torch.empty_like(forced)
    column = 0  # that is being predicted

    def force_text(token: Tensor) -> None:  # [B], changed in place
        given = forced[:, 0, column]
        token.copy_(torch.where(given == FREE, token, given))
        said[:, 0, column] = token

    def force_audio(tokens: Tensor) -> None:  # [B, 8], in delayed order, changed in place
        given = forced[:, 1:, column]
        tokens.copy_(torch.where(given == FREE, tokens, given))
        said[:, 1:, column] = tokens

    with listening(lm):
        stepper = LMGen(
            lm, use_sampling=not sampling.greedy, temp=sampling.temp, temp_text=sampling.temp_text,
            top_k=sampling.top_k, top_k_text=sampling.top_k_text, on_text_hook=force_text, on_audio_hook=force_audio,
        )  # fmt: skip
        with stepper.streaming(size):
            first = _replay_embeddings(stepper, prompts)
            for step in range(first, columns - 1):
                column = step + 1
                stepper.step(heard[:, :, step : step + 1])
                if step % int(FRAME_RATE) == 0:
                    each_second()
    said = said.cpu()
    replies = []
    for i, (head, length) in enumerate(zip(heads, lengths)):
        streams = [
            said[i, s, 1 + lm.delays[s] + head.shape[1] : 1 + lm.delays[s] + length] for s in range(1 + CODEBOOKS)
        ]
        replies.append(Reply(streams[0], torch.stack(streams[1:])))
    return replies


def _replay_embeddings(stepper: LMGen, prompts: Sequence[SystemPrompt | None]) -> int:
    """Feeds the embeddings of a `.pt` voice to the temporal transformer; returns the step to go on from."""
    given = [p.embeddings for p in prompts if p is not None and p.embeddings is not None]
    if not given:
        return 0
    if len(given) != len(prompts) or len({len(e) for e in given}) != 1:
        raise ValueError("prompts with embeddings are generated together only if all have them, of one length")
    lm, state = stepper.lm_model, stepper._streaming_state
    embeddings = torch.stack(given).to(lm.device, lm.dtype)  # [B, E, dim]
    for position in range(embeddings.shape[1]):
        lm.transformer(embeddings[:, position : position + 1])
    # The column after the last embedding comes out of the ring, which the replay did not fill.
    step = embeddings.shape[1]
    for stream, delay in enumerate(lm.delays):
        tokens = torch.stack([p.frames[stream, step - 1 - delay] for p in prompts]).to(lm.device)
        state.cache[:, stream, step % state.cache.shape[2]] = tokens
    state.offsets += step
    state.offset_cpu += step
    return step


# --- Sound, words, and the command -------------------------------------------------------------------------------
def decode_codes(mimi: MimiModel, codes: Sequence[Tensor]) -> list[np.ndarray]:
    """Sounds of codes [8, T_i]: float32 [1920 T_i] at 24 kHz, frame by frame as a server plays them."""
    device = next(mimi.parameters()).device
    lengths = [c.shape[1] for c in codes]
    lanes = torch.zeros(len(codes), CODEBOOKS, max(lengths), dtype=torch.int64)
    for lane, own in zip(lanes, codes):
        lane[:, : own.shape[1]] = own
    with torch.inference_mode(), mimi.streaming(len(codes)):
        pcm = torch.cat([mimi.decode(frame) for frame in lanes.to(device).split(1, dim=2)], dim=2)
    return [sound[0, : length * FRAME_SIZE].cpu().numpy() for sound, length in zip(pcm, lengths)]
