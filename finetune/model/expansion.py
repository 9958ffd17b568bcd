"""From Moshi's 8 depformer steps to PersonaPlex's 16."""

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
                sibling for i in range(steps) if (sibling := f"{match['head']}{i}{match['tail'] or ''}") not in names
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
