"""The layout of the 17 streams, against constants copied from NVIDIA's runtime and moshi's model."""

import torch
from moshi.models import loaders

from finetune import streams
from finetune.streams import stack_streams


def test_constants_are_those_of_the_runtime():
    """NVIDIA/personaplex, moshi/models/lm.py; moshi's loaders for the rest."""
    assert streams.SILENCE_TOKENS == (948, 243, 1178, 546, 1736, 1030, 1978, 2008)
    assert streams.SINE_TOKENS == (430, 1268, 381, 1611, 1095, 1495, 56, 472)
    assert (streams.SILENCE_FRAMES, streams.DEP_Q, streams.ZERO) == (6, 16, -1)
    assert (streams.CODEBOOKS, streams.N_STREAMS, streams.TEXT_EPAD, streams.TEXT_PAD) == (8, 17, 0, 3)
    moshi = loaders._lm_kwargs
    assert (moshi["dep_q"], moshi["n_q"], moshi["existing_text_padding_id"]) == (8, 16, 3)


def test_streams_are_stacked_text_agent_user():
    agent, user = torch.arange(100, 108).view(8, 1), torch.arange(200, 224).view(8, 3)
    frames = stack_streams([7, 0, 3], agent, user)
    assert frames.dtype == torch.int64 and frames.shape == (17, 3)
    assert frames[:, 1].tolist() == [0, *range(100, 108), *range(201, 224, 3)]
    assert torch.equal(frames, stack_streams(torch.tensor([7, 0, 3]), agent.expand(8, 3), user))
    assert stack_streams([], agent[:, :0], user[:, :0]).shape == (17, 0)
