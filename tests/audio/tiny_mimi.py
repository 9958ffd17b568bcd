"""A tiny Mimi, and what it gives a single stream."""

import torch
from moshi.models import loaders

CONTEXT = 25  # steps of Mimi's attention: 1 s here, 10 s in the real one


CONFIG = loaders._mimi_config | {
    "seanet": loaders._seanet_kwargs | {"dimension": 32, "n_filters": 4},
    "transformer": loaders._transformer_kwargs | {
        "d_model": 32, "num_heads": 2, "num_layers": 2, "context": CONTEXT, "dim_feedforward": 64,
        "input_dimension": 32, "output_dimensions": [32],
    },
    "quantizer": {"dimension": 16, "n_q": 10, "bins": 2048, "input_dimension": 32, "output_dimension": 32},
}  # fmt: skip


def make_mimi(seed=0, near_ties=True):
    """Random weights. With `near_ties` codebooks hold each entry twice, with other last bits: which of the two is
    nearer depends on the last bits of the input, so that any change of the arithmetic shows in the codes."""
    torch.manual_seed(seed)
    mimi = loaders.get_mimi(None, CONFIG)
    for parameter in mimi.parameters():
        if parameter.ndim == 3:  # convolutions: louder, so that codes follow the sound
            parameter.data *= 2
    for name, buffer in mimi.named_buffers():
        if name.endswith("embedding_sum"):
            entries = 0.05 * torch.randn(1024, 16)
            other = entries * (1 + 1e-7 * torch.randn_like(entries)) if near_ties else 0.05 * torch.randn(1024, 16)
            buffer.copy_(torch.stack([entries, other], dim=1).flatten(0, 1))
    return mimi


def encode_by_hand(mimi, wav):
    """Codes int64 [8, frames] that a server computes for one stream [samples], frame by frame."""
    wav = torch.as_tensor(wav)
    frames = torch.nn.functional.pad(wav, (0, -len(wav) % 1920)).split(1920)
    with torch.no_grad(), mimi.streaming(1):
        return torch.cat([mimi.encode(frame[None, None]) for frame in frames], dim=-1)[0]
