"""Expansion of a Moshi with 8 depformer steps to PersonaPlex's 16."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from finetune.cli import UserError
from finetune.model.weights import fuse, split_names, to_split
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
    """Map each PersonaPlex name to the Moshiko name that it copies, or to None for zeros.

    Args:
        names: split names of a model with 8 steps.
    Raises:
        UserError: names that an 8-step Moshi does not have, or missing ones.
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
        state_dict: with fused or split attention names (the result has the same).
    Raises:
        UserError: tensors that an 8-step Moshi does not have, or missing ones.
    """
    split = dict(to_split(state_dict, CODEBOOKS))
    sources = expansion_sources(set(split))
    out = {name: split[source].clone() for name, source in sources.items() if source is not None}
    out[NEW_EMBEDDING] = torch.zeros_like(split["depformer_emb.0.weight"], memory_format=torch.contiguous_format)
    return fuse(out, DEP_Q) if any(split_names(key, 1) for key in state_dict) else out
