"""An independent model of PersonaPlex's inference engine, written from its description.

`Runtime` keeps a ring of delayed columns and takes one frame per step; the transformer reads the column before the one
that it predicts. Constants are literals here, not imports from the package under test.
"""

import torch
from moshi.models import LMModel, loaders
from moshi.utils.compile import no_compile

from finetune.model.layout import fuse

# NVIDIA/personaplex, moshi/models/lm.py: SILENCE_TOKENS, SINE_TOKENS and the delays of moshi's loaders.
SILENCE_TOKENS = [948, 243, 1178, 546, 1736, 1030, 1978, 2008]
SINE_TOKENS = [430, 1268, 381, 1611, 1095, 1495, 56, 472]
DELAYS = [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]
TINY = dict(
    loaders._lm_kwargs, dim=32, num_heads=2, num_layers=2, hidden_scale=2.0, text_card=60, depformer_dim=16,
    depformer_num_heads=2, depformer_num_layers=2, depformer_dim_feedforward=32, context=600,
)  # fmt: skip


def tiny_lm(dep_q: int, seed: int = 0, **changes) -> LMModel:
    torch.manual_seed(seed)
    lm = LMModel(device="cpu", dtype=torch.float32, **TINY | {"dep_q": dep_q} | changes)
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
        """Return what the engine writes as a .pt after a voice prompt."""
        columns = torch.tensor(self.inputs).T[None]
        return {"embeddings": embed(lm, columns)[0][:, None, None], "cache": torch.tensor(self.cache)[None]}


@torch.no_grad()
def embed(lm, columns):
    """[B, 17, T] delayed tokens -> [B, T, dim]."""
    return lm.text_emb(columns[:, 0]) + sum(e(columns[:, i + 1]) for i, e in enumerate(lm.emb))


def embedder(lm):
    """Return a function that embeds one delayed column [17] -> [dim]."""
    return lambda column: embed(lm, column.view(1, 17, 1))[0, 0]


def random_frames(rng, length):
    return [[rng.randrange(4, 60)] + [rng.randrange(2048) for _ in range(16)] for _ in range(length)]


def voice_frames(voice):
    """The frames of a voice prompt of agent codes [[8], ...]."""
    return [[3, *codes, *SINE_TOKENS] for codes in voice]


def random_voice(rng, length):
    """Agent codes [[8], ...]."""
    return [frame[1:9] for frame in random_frames(rng, length)]


def save_voice(path, lm, voice, **changes):
    """Write a .pt as the engine does after a voice prompt of agent codes [[8], ...], with some entries changed."""
    torch.save(Runtime().run(voice_frames(voice)).save_voice(lm) | changes, path)
    return path


@torch.no_grad()
def step_voice(lm, codes):
    """Return what the engine writes as a .pt, with moshi's own model stepping through agent codes [8, N]."""
    runtime, inputs = Runtime().run(voice_frames(codes.T.tolist())), []
    hook = lm.transformer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    with no_compile():  # only the transformer's inputs matter, and compiling it takes seconds
        for column in runtime.inputs:
            lm.forward_text(torch.tensor(column).view(1, 17, 1))
    hook.remove()
    return {"embeddings": torch.stack(inputs), "cache": torch.tensor(runtime.cache)[None]}


def engine_frames(voice, text, dialogue):
    """All frames of a session: voice, half a second of silence, one text token per frame, silence, dialogue."""
    quiet = [[3, *SILENCE_TOKENS, *SINE_TOKENS]] * int(0.5 * 12.5)
    return [
        *voice_frames(voice),
        *quiet,
        *([token, *SILENCE_TOKENS, *SINE_TOKENS] for token in text),
        *quiet,
        *dialogue,
    ]


def our_inputs(codes):
    """Return the columns that moshi's forward feeds the transformer for undelayed codes [17, T]."""
    columns = [[60] + [2048] * 16]
    for t in range(codes.shape[1] - 1):
        columns.append([codes[k, t - d].item() if t >= d else columns[0][k] for k, d in enumerate(DELAYS)])
    return columns


def fused(lm):
    return fuse(lm.state_dict(), lm.dep_q)
