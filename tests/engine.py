"""An independent model of PersonaPlex's inference engine, written from its description.

`Runtime` keeps a ring of delayed columns and takes one frame a step; the transformer reads the column before the one it
predicts.
"""

import torch
from moshi.models import LMModel, loaders

from finetune.model.weights import fuse
from finetune.streams import SILENCE_TOKENS, SINE_TOKENS

DELAYS = [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]


TINY = dict(
    loaders._lm_kwargs, dim=32, num_heads=2, num_layers=2, hidden_scale=2.0, text_card=60, depformer_dim=16,
    depformer_num_heads=2, depformer_num_layers=2, depformer_dim_feedforward=32, context=600,
)  # fmt: skip


def tiny_lm(dep_q: int, seed: int = 0) -> LMModel:
    torch.manual_seed(seed)
    lm = LMModel(device="cpu", dtype=torch.float32, **TINY | {"dep_q": dep_q})
    for parameter in lm.parameters():  # moshi leaves parts of the depformer at a tiny scale
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return lm.eval()


class Runtime:
    """Steps frames [17] through the engine's ring of four columns; records the columns that the transformer reads."""

    RING = 4

    def __init__(self):
        self.initial = [60] + [2048] * 16
        self.cache = [[-2] * self.RING for _ in range(17)]
        self.offset = 0
        self.inputs = []

    def step(self, frame):
        for stream, (token, delay) in enumerate(zip(frame, DELAYS)):
            self.cache[stream][(self.offset + delay) % self.RING] = int(token)
        for stream, delay in enumerate(DELAYS):
            if self.offset <= delay:  # no real token can be here yet
                self.cache[stream][self.offset % self.RING] = self.initial[stream]
        if self.offset > 0:
            self.inputs.append([ring[(self.offset - 1) % self.RING] for ring in self.cache])
        self.offset += 1

    def run(self, frames):
        for frame in frames:
            self.step(frame)
        return self

    def save_voice(self, lm):
        """What the engine writes as a .pt after a voice prompt."""
        columns = torch.tensor(self.inputs).T[None]
        return {"embeddings": embed(lm, columns)[0][:, None, None], "cache": torch.tensor(self.cache)[None]}


@torch.no_grad()
def embed(lm, columns):
    """[B, 17, T] delayed tokens -> [B, T, dim]."""
    return lm.text_emb(columns[:, 0]) + sum(e(columns[:, i + 1]) for i, e in enumerate(lm.emb))


def random_frames(rng, length):
    return [[rng.randrange(4, 60)] + [rng.randrange(2048) for _ in range(16)] for _ in range(length)]


def engine_frames(voice, text, dialogue):
    """All frames of a session: voice, half a second of silence, the text a token a frame, silence, dialogue."""
    quiet = [[3, *SILENCE_TOKENS, *SINE_TOKENS]] * int(0.5 * 12.5)
    spoken = [[3, *codes, *SINE_TOKENS] for codes in voice]
    return [*spoken, *quiet, *([token, *SILENCE_TOKENS, *SINE_TOKENS] for token in text), *quiet, *dialogue]


def our_inputs(codes):
    """The columns that moshi's forward feeds the transformer for undelayed codes [17, T]."""
    columns = [[60] + [2048] * 16]
    for t in range(codes.shape[1] - 1):
        columns.append([codes[k, t - d].item() if t >= d else columns[0][k] for k, d in enumerate(DELAYS)])
    return columns


def fused(lm):
    return fuse(lm.state_dict(), lm.dep_q)
