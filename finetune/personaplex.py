"""What PersonaPlex adds to Moshi: 16 depformer steps and the hybrid system prompt in front of each dialogue.

Streams K = 17: 0 text, 1-8 agent audio, 9-16 user audio. One frame is 80 ms. Sources of the constants: NVIDIA's
`moshi/models/lm.py` (github.com/NVIDIA/personaplex) and the PersonaPlex paper (arXiv 2602.06053).
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.cli import UserError
from finetune.weights import attention_steps, fused_name, split_names, to_split

CODEBOOKS = 8  # Mimi codebooks of one channel
N_STREAMS = 1 + 2 * CODEBOOKS
DEP_Q = 16  # depformer steps of PersonaPlex: both channels; Moshi has 8
TEXT_EPAD, TEXT_PAD = 0, 3  # "end of padding" before a word, and padding
ZERO = -1  # embeds to exactly 0, never carries loss

# One frame of each, constants rather than encoded audio: NVIDIA's SILENCE_TOKENS and SINE_TOKENS (440 Hz).
SILENCE_TOKENS = (948, 243, 1178, 546, 1736, 1030, 1978, 2008)
SINE_TOKENS = (430, 1268, 381, 1611, 1095, 1495, 56, 472)
SILENCE_FRAMES = 6  # after the voice and after the text: int(0.5 s * 12.5 Hz)


# --- 1. From 8 to 16 depformer steps -------------------------------------------------------------------------

_STEP_KEY = re.compile(
    r"^(?P<head>depformer\.layers\.\d+\.gating\.|linears\.|depformer_in\.|depformer_emb\."
    r"|depformer\.layers\.\d+\.self_attn\.(?:in|out)_projs\.)(?P<step>\d+)(?P<tail>\..*)?$"
)
# The embedding of the last agent codebook, the token input of the first user step. Moshiko has none, because its
# depformer ends there. Zero keeps the copied step 0 what it was trained to be, less its token: a copy of
# depformer_emb.6 would feed it vectors of a space it has never read.
NEW_EMBEDDING = f"depformer_emb.{CODEBOOKS - 1}.weight"


def expansion_plan(names: set[str]) -> dict[str, str | None]:
    """{PersonaPlex name: Moshiko name or None for zeros} for the split names of an 8-step model.

    Raises:
        UserError: a name that an 8-step Moshi does not have, or one that is missing.
    """
    unexpected, plan = [], {}
    for name in sorted(names):
        match = _STEP_KEY.match(name)
        steps = CODEBOOKS - 1 if name.startswith("depformer_emb.") else CODEBOOKS
        if match is None:
            if name.startswith(("depformer.", "linears.", "depformer_in.", "depformer_emb.")) and not re.match(
                r"^depformer\.layers\.\d+\.norm[12]\.alpha$", name
            ):
                unexpected.append(name)
            plan[name] = name
        elif int(match["step"]) >= steps:
            unexpected.append(name)
        else:
            plan[name] = name
            plan[f"{match['head']}{int(match['step']) + CODEBOOKS}{match['tail'] or ''}"] = name
    plan[NEW_EMBEDDING] = None
    missing = []
    for name, source in plan.items():
        match = _STEP_KEY.match(name)
        if source is not None and match is not None:
            steps = CODEBOOKS - 1 if name.startswith("depformer_emb.") else CODEBOOKS
            missing += [
                sibling
                for i in range(steps)
                if (sibling := f"{match['head']}{i}{match['tail'] or ''}") not in names
            ]
    for required in ("linears.0.weight", "depformer_in.0.weight", "depformer_emb.0.weight", "text_emb.weight"):
        if required not in names:
            missing.append(required)
    if unexpected or missing:
        found = [f"unexpected {', '.join(unexpected[:5])}"] if unexpected else []
        found += [f"missing {', '.join(sorted(set(missing))[:5])}"] if missing else []
        raise UserError(
            f"not an {CODEBOOKS}-codebook Moshi, so it cannot be expanded to {DEP_Q}: {'; '.join(found)}. "
            "PersonaPlex weights, which have all 16, load as they are"
        )
    return plan


def expand_moshiko_to_personaplex(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The 16-step weights that PersonaPlex starts from, out of an 8-step Moshi's.

    Step i + 8 (user codebook i) starts as step i, `depformer_emb.7` as zeros. Text logits and those of the 8 agent
    codebooks stay exactly what they were, because the depformer is causal over codebooks. Every tensor of the
    result has its own memory.

    Args:
        state_dict: 8 steps, fused or split attention names (the result has the same).
    Raises:
        UserError: a tensor that such a model does not have, or one that is missing.
    """
    fused = {key for key in state_dict if split_names(key, 1)}
    split = dict(to_split(state_dict, CODEBOOKS))
    out: dict[str, Tensor] = {}
    for name, source in expansion_plan(set(split)).items():
        if source is None:
            like = split["depformer_emb.0.weight"]
            out[name] = torch.zeros_like(like, memory_format=torch.contiguous_format)
        else:
            out[name] = split[source].clone()
    if not fused:
        return out
    return fuse(out, DEP_Q)


def fuse(state: Mapping[str, Tensor], dep_q: int) -> dict[str, Tensor]:
    """A state dict in NVIDIA's and Kyutai's stored layout, from split names."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        target = fused_name(name)
        if target is None:
            out[name] = tensor
        elif target[1] == 0:
            steps = attention_steps(name, dep_q)
            out[target[0]] = torch.cat([state[n] for n in split_names(target[0], steps)], dim=0)
    return out


# --- 2. The hybrid system prompt -----------------------------------------------------------------------------


class Voice(NamedTuple):
    """A voice prompt of N frames, in one of two forms.

    codes: [8, N] int64, of a recording; `embeddings` is None.
    Or, as NVIDIA ships voices, `embeddings`: [N - 1, dim], the temporal transformer's inputs at positions 0..N-2, and
    `tail`: [17, 3] int64, frames N-3..N-1 of all streams.
    """

    name: str
    codes: Tensor | None = None
    embeddings: Tensor | None = None
    tail: Tensor | None = None

    @property
    def frames(self) -> int:
        return self.codes.shape[1] if self.embeddings is None else self.embeddings.shape[0] + 1


class Prompt(NamedTuple):
    """What precedes a dialogue.

    frames: [17, P] int64, undelayed, with the first frame of all already dropped as the runtime does.
    embeddings: [E, dim] or None, which replace the temporal transformer's inputs at positions 0..E-1.
    """

    frames: Tensor
    embeddings: Tensor | None


def phase(text: Sequence[int] | Tensor, agent: Tensor, user: Tensor) -> Tensor:
    """[17, T] frames out of a text of T ids, agent codes [8, T or 1] and user codes [8, T or 1]."""
    length = len(text)
    row = torch.as_tensor(text, dtype=torch.int64).view(1, length)
    return torch.cat([row, agent.expand(CODEBOOKS, length), user.expand(CODEBOOKS, length)])


def build_prompt(voice: Voice | None, text_ids: Sequence[int]) -> Prompt:
    """[voice | silence | text | silence], as the runtime steps through it; without a voice or a text the two silences
    stay. The inference engine never shows the transformer the first frame: its column is the initial one."""
    silence = torch.tensor(SILENCE_TOKENS).view(CODEBOOKS, 1)
    sine = torch.tensor(SINE_TOKENS).view(CODEBOOKS, 1)
    quiet = phase([TEXT_PAD] * SILENCE_FRAMES, silence, sine)
    parts = [quiet, phase(text_ids, silence, sine), quiet]
    embeddings = None
    if voice is not None and voice.embeddings is None:
        parts.insert(0, phase([TEXT_PAD] * voice.frames, voice.codes, sine))
    elif voice is not None:
        # The frames before the tail are unknown, and unseen: their columns are replaced by the embeddings.
        head = torch.full((N_STREAMS, voice.frames - voice.tail.shape[1]), ZERO, dtype=torch.int64)
        parts.insert(0, torch.cat([head, voice.tail], dim=1))
        embeddings = voice.embeddings
    return Prompt(torch.cat(parts, dim=1)[:, 1:], embeddings)


def prompt_length(voice_frames: int, text_tokens: int) -> int:
    """Frames that a prompt adds to a window."""
    return voice_frames + text_tokens + 2 * SILENCE_FRAMES - 1
