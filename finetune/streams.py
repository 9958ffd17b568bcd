"""The 17 streams of Moshi and PersonaPlex: 0 text, 1-8 agent audio, 9-16 user audio. One frame is 80 ms.

Source of the constants: NVIDIA's `moshi/models/lm.py` (github.com/NVIDIA/personaplex)."""

from collections.abc import Sequence

import torch
from torch import Tensor

CODEBOOKS = 8  # Mimi codebooks per channel
CARD = 2048  # codes of a codebook: 0..2047
N_STREAMS = 1 + 2 * CODEBOOKS
DEP_Q = 16  # depformer steps of PersonaPlex: both channels; Moshi has 8
TEXT_EPAD, TEXT_PAD = 0, 3  # "end of padding" before a word, and padding
ZERO = -1  # embeds to exactly 0 and never carries loss
# One frame of silence and one of a 440 Hz sine: constants, not encoded audio (NVIDIA's SILENCE_TOKENS and SINE_TOKENS).
SILENCE_TOKENS = (948, 243, 1178, 546, 1736, 1030, 1978, 2008)
SINE_TOKENS = (430, 1268, 381, 1611, 1095, 1495, 56, 472)
SILENCE_FRAMES = 6  # after the voice and after the text: int(0.5 s * 12.5 Hz)


def stack_streams(text: Sequence[int] | Tensor, agent: Tensor, user: Tensor) -> Tensor:
    """Return [17, T] frames, from T text ids, agent codes [8, T or 1] and user codes [8, T or 1]."""
    length = len(text)
    row = torch.as_tensor(text, dtype=torch.int64).view(1, length)
    return torch.cat([row, agent.expand(CODEBOOKS, length), user.expand(CODEBOOKS, length)])
