"""The hybrid system prompt before each dialogue: voice, silence, role, silence (PersonaPlex, arXiv 2602.06053)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.streams import N_STREAMS, SILENCE_FRAMES, SILENCE_TOKENS, SINE_TOKENS, TEXT_PAD, ZERO, stack_streams


class VoicePrompt(NamedTuple):
    """A voice prompt of N frames, in one of two forms.

    A recording has `codes`: [8, N] int64.
    A `.pt` voice, as NVIDIA ships them, has `embeddings`: [N - 1, dim], the temporal transformer's inputs at positions
    0..N-2, and `tail`: [17, 3] int64, frames N-3..N-1 of all streams.
    """

    name: str
    codes: Tensor | None = None
    embeddings: Tensor | None = None
    tail: Tensor | None = None

    @property
    def frames(self) -> int:
        return self.codes.shape[1] if self.embeddings is None else self.embeddings.shape[0] + 1


class SystemPrompt(NamedTuple):
    """The frames before a dialogue.

    frames: [17, P] int64, undelayed, without the very first frame, as the runtime drops it.
    embeddings: [E, dim] or None; they replace the temporal transformer's inputs at positions 0..E-1.
    """

    frames: Tensor
    embeddings: Tensor | None


def build_prompt(voice: VoicePrompt | None, text_ids: Sequence[int]) -> SystemPrompt:
    """Return [voice | silence | text | silence], as the runtime steps through it.

    Without a voice or a text, the two silences remain. The first frame is dropped, because the runtime never shows it
    to the transformer: its column holds the initial tokens instead.
    """
    silence, sine = (torch.tensor(tokens).view(-1, 1) for tokens in (SILENCE_TOKENS, SINE_TOKENS))
    quiet = stack_streams([TEXT_PAD] * SILENCE_FRAMES, silence, sine)
    parts = [quiet, stack_streams(text_ids, silence, sine), quiet]
    embeddings = None
    if voice is not None and voice.embeddings is None:
        parts.insert(0, stack_streams([TEXT_PAD] * voice.frames, voice.codes, sine))
    elif voice is not None:
        # The frames before the tail are unknown. The model does not see them: the embeddings replace their columns.
        head = torch.full((N_STREAMS, voice.frames - voice.tail.shape[1]), ZERO, dtype=torch.int64)
        parts.insert(0, torch.cat([head, voice.tail], dim=1))
        embeddings = voice.embeddings
    return SystemPrompt(torch.cat(parts, dim=1)[:, 1:], embeddings)


def prompt_length(voice_frames: int, text_tokens: int) -> int:
    """Return how many frames a prompt adds to a window."""
    return voice_frames + text_tokens + 2 * SILENCE_FRAMES - 1
