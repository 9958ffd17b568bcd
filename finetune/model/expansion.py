"""Expansion of a Moshi with 8 depformer steps to PersonaPlex's 16."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from finetune.cli import UserError
from finetune.model.weights import attention_steps, split_names
from finetune.streams import CODEBOOKS, DEP_Q

_STEP_KEY = re.compile(
    r"^(?P<head>depformer\.layers\.\d+\.gating\.|linears\.|depformer_in\.|depformer_emb\."
    r"|depformer\.layers\.\d+\.self_attn\.(?:in|out)_projs\.)(?P<step>\d+)(?P<tail>\..*)?$"
)
_NORM_KEY = re.compile(r"^depformer\.layers\.\d+\.norm[12]\.alpha$")
_DEPFORMER_PREFIXES = ("depformer.", "linears.", "depformer_in.", "depformer_emb.")
_REQUIRED = {"linears.0.weight", "depformer_in.0.weight", "depformer_emb.0.weight", "text_emb.weight"}
# The embedding of the last agent codebook, the token input of the first user step. Moshiko's depformer ends before it.
# Zeros keep the copied step 0 as it was trained, minus its token; a copy of depformer_emb.6 would feed it vectors from
# a space it has never read.
NEW_EMBEDDING = f"depformer_emb.{CODEBOOKS - 1}.weight"


def expansion_sources(names: set[str]) -> dict[str, str | None]:
    """Map each PersonaPlex name to the one of an 8-step Moshi (with split `names`) that it copies, or None for zeros.

    Raises UserError if `names` has some that an 8-step Moshi does not have, or lacks some.
    """
    sources: dict[str, str | None] = {}
    unexpected, missing = [], _REQUIRED - names
    for name in sorted(names):
        match = _STEP_KEY.match(name)
        if match is None:
            sources[name] = name
            if name.startswith(_DEPFORMER_PREFIXES) and not _NORM_KEY.match(name):
                unexpected.append(name)
            continue
        head, step, tail = match["head"], int(match["step"]), match["tail"] or ""
        steps = CODEBOOKS - 1 if head == "depformer_emb." else CODEBOOKS  # step 0 reads the text token
        if step >= steps:
            unexpected.append(name)
        else:
            sources |= {name: name, f"{head}{step + CODEBOOKS}{tail}": name}
            missing |= {f"{head}{i}{tail}" for i in range(steps)} - names
    sources[NEW_EMBEDDING] = None
    if unexpected or missing:
        found = [f"unexpected {', '.join(unexpected[:5])}"] if unexpected else []
        found += [f"missing {', '.join(sorted(missing)[:5])}"] if missing else []
        raise UserError(
            f"not an {CODEBOOKS}-codebook Moshi, so it cannot be expanded to {DEP_Q}: {'; '.join(found)}. "
            f"PersonaPlex weights, which have all {DEP_Q}, need no expansion"
        )
    return sources


def expand_moshiko_to_personaplex(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the 16-step weights that PersonaPlex starts from, given those of an 8-step Moshi.

    Step i + 8 (user codebook i) is a copy of step i; `depformer_emb.7` is zero. The logits of text and of the 8 agent
    codebooks stay exactly the same, because the depformer is causal over codebooks. No tensors share memory.

    Args:
        state_dict: with fused or split attention names (the result has the same, in NVIDIA's spelling).
    Raises:
        UserError: tensors that an 8-step Moshi does not have, or missing ones.
    """
    fused = {key: split_names(key, attention_steps(key, CODEBOOKS)) for key in state_dict}
    sources = expansion_sources({name for key, names in fused.items() for name in names or [key]})
    out = {name: state_dict[source].clone() for name, source in sources.items() if source in state_dict}
    for key in filter(fused.get, state_dict):  # the rows of all steps in turn
        copies = DEP_Q // CODEBOOKS if len(fused[key]) == CODEBOOKS else 1
        out[key.replace("in_proj.weight", "in_proj_weight")] = torch.cat([state_dict[key]] * copies)
    zero = torch.zeros_like(state_dict["depformer_emb.0.weight"], memory_format=torch.contiguous_format)
    return out | {NEW_EMBEDDING: zero}
