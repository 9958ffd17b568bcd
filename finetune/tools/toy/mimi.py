"""A tiny Mimi: moshi's modules with weights set by hand.

A random encoder of this size carries little information, and training one takes minutes. But a filterbank can be
written down: the first strided convolution measures each band, ELU rectifies it, the next ones pool it, and the
codebooks hold what words, pitches and timbres look like there. The decoder is the inverse. ELU is a rectifier where its
input is large (_GAIN) and, to 0.2 %, the identity where it is small (_SMALL), so that a waveform passes. The codes of a
word are the same from -3 to +6 dB, with noise up to -30 dBFS, and for words that begin up to a quarter of a frame late.
"""

from functools import cache

import numpy as np
import torch
from moshi.models.compression import MimiModel
from moshi.models.loaders import get_mimi

from finetune.audio.files import FRAME_RATE, FRAME_SIZE, SAMPLE_RATE
from finetune.streams import CODEBOOKS, SILENCE_TOKENS, SINE_TOKENS
from finetune.tools.toy.language import BANDS, PITCHES, TIMBRES, VOICES, WORDS, ToyVoice
from finetune.tools.toy.sound import Utterance, speak, voice_sounds, word_parts

_CHANNELS = 20  # of the first layer; each of the three strided layers doubles them
_STRIDES = (40, 2, 12)  # encoder: 24 kHz -> 600 Hz -> 300 Hz -> 25 Hz; Mimi's own downsampling makes it 12.5 Hz
_BLOCK = 960  # samples of one step at 25 Hz
_LATENT = 32
_SMALL = 1e-2
_GAIN = 60.0  # lifts a band of speech to about 25
_UNUSED = -3.0  # features are never negative: an entry there is never chosen, and decodes to silence
MIMI_CONFIG = {
    "sample_rate": SAMPLE_RATE,
    "channels": 1,
    "frame_rate": FRAME_RATE,
    "seanet": {
        "channels": 1, "dimension": _LATENT, "causal": True, "n_filters": _CHANNELS, "n_residual_layers": 0,
        "activation": "ELU", "compress": 2, "dilation_base": 2, "disable_norm_outer_blocks": 0, "kernel_size": 1,
        "residual_kernel_size": 3, "last_kernel_size": 1, "norm": "none", "pad_mode": "constant",
        "ratios": list(reversed(_STRIDES)), "true_skip": True,
    },
    "quantizer": {
        "dimension": _LATENT, "n_q": CODEBOOKS, "bins": 2048, "input_dimension": _LATENT, "output_dimension": _LATENT,
    },
    "transformer": {
        "d_model": _LATENT, "num_heads": 4, "num_layers": 1, "causal": True, "layer_scale": 0.01, "context": 250,
        "conv_layout": True, "max_period": 10000, "gating": "none", "norm": "layer_norm",
        "positional_embedding": "rope", "dim_feedforward": 4 * _LATENT, "input_dimension": _LATENT,
        "output_dimensions": [_LATENT],
    },
}  # fmt: skip
# Rows of the latent, and which of them each of the 8 codebooks quantises.
BAND_ROWS = slice(0, len(BANDS))
TIMBRE_ROWS = slice(BAND_ROWS.stop, BAND_ROWS.stop + len(TIMBRES))
PITCH_ROWS = slice(TIMBRE_ROWS.stop, TIMBRE_ROWS.stop + len(PITCHES))
CODEBOOK_ROWS = [BAND_ROWS, PITCH_ROWS, TIMBRE_ROWS, *(slice(i, i + 2) for i in range(0, len(BANDS), 2))]


@cache
def _lexicon() -> tuple[list[Utterance], np.ndarray]:
    """All words in all voices, an utterance a voice, and the latents that an ideal encoder would give them: 1 for
    what sounds in a frame, else 0. [voices, rows, frames]"""
    utterances = [Utterance(WORDS, voice, 0) for voice in VOICES.values()]
    ideal = np.zeros((len(utterances), PITCH_ROWS.stop, utterances[0].stop + 1))
    for levels, utterance in zip(ideal, utterances):
        for word, first, stop in utterance.spans():
            levels[BAND_ROWS, first:stop] = word_parts()[word].T
            levels[TIMBRE_ROWS.start + utterance.voice.timbre, first:stop] = 1
            levels[PITCH_ROWS.start + utterance.voice.pitch, first:stop] = 1
    return utterances, ideal


@cache
def codebook_classes(codebook: int) -> tuple[np.ndarray, np.ndarray]:
    """What a codebook tells apart: patterns [classes, rows] of 0 and 1, silence first, and the code of each.

    The codes of silence are PersonaPlex's; those of its sine tone mean nothing here and are left out.
    """
    patterns = np.unique(np.concatenate(_lexicon()[1][:, CODEBOOK_ROWS[codebook]], axis=1), axis=1).T
    order = np.random.default_rng(3 + codebook).permutation(2048)
    order = order[~np.isin(order, (SILENCE_TOKENS[codebook], SINE_TOKENS[codebook]))]
    return patterns, np.concatenate([[SILENCE_TOKENS[codebook]], order[: len(patterns) - 1]])


def _write_encoder(mimi: MimiModel) -> None:
    first, bands, pool, pitch, last = (m.conv.conv for m in mimi.encoder.model if not isinstance(m, torch.nn.ELU))
    n = PITCH_ROWS.start  # bands and timbres
    first.weight[0, 0, 0] = _SMALL

    # 600 Hz: each band twice, a quarter of a period apart; and what is below the bands, as a waveform.
    width = 2 * _STRIDES[0]
    seconds, window = torch.arange(width) / SAMPLE_RATE, torch.hann_window(width)
    for i, frequency in enumerate((*BANDS, *TIMBRES)):
        for j, wave in enumerate((torch.cos, torch.sin)):
            bands.weight[2 * i + j, 0] = _GAIN / _SMALL * window * wave(2 * torch.pi * frequency * seconds)
    bands.weight[2 * n, 0] = window / window.sum()

    # 300 Hz: the rectified bands, pooled; the waveform, two samples side by side. The older half of each kernel
    # stays 0 from here on, so that a frame says little of the one before.
    stride = _STRIDES[1]
    for i in range(n):
        pool.weight[i, 2 * i : 2 * i + 2, stride:] = 1.0
    pool.weight[n : n + stride, 2 * n, stride:] = torch.eye(stride)

    # 25 Hz: the bands, pooled; the waveform against each pitch in four phases, which ELU then rectifies.
    steps = _STRIDES[2]
    pitch.weight[:n, :n, steps:] = torch.eye(n)[:, :, None]
    seconds = torch.arange(stride * steps) * _STRIDES[0] / SAMPLE_RATE
    for i, frequency in enumerate(PITCHES):
        for phase in range(4):
            tone = _GAIN / _SMALL * torch.cos(2 * torch.pi * (frequency * seconds + phase / 4))
            pitch.weight[n + 4 * i + phase, n : n + stride, steps:] = tone.view(steps, stride).T

    last.weight[:n, :n, 0] = torch.eye(n)
    for i in range(len(PITCHES)):
        last.weight[PITCH_ROWS.start + i, n + 4 * i : n + 4 * i + 4, 0] = 1.0
    mimi.downsample.conv.conv.conv.weight[:, :, 2:] = torch.eye(_LATENT)[:, :, None] / 2


def _write_decoder(mimi: MimiModel) -> None:
    first, *ups, last = (m for m in mimi.decoder.model if not isinstance(m, torch.nn.ELU))
    mimi.upsample.convtr.convtr.convtr.weight[:, 0, :2] = 1.0

    # A unit for each band in each pitch, which opens when both are there; one for each pitch and each timbre alone.
    conv, floor = first.conv.conv, 0.3  # levels below the floor are silent
    units: list[tuple[np.ndarray, dict[int, int]]] = []  # a sound, and the weights of the rows that open it
    for pitch, row in enumerate(range(PITCH_ROWS.start, PITCH_ROWS.stop)):
        *bands, alone, _ = voice_sounds(ToyVoice(pitch, timbre=0))
        units.append((alone, {row: 1}))
        units += [(sound, {band: 1, row: 4}) for band, sound in enumerate(bands)]
    for timbre, row in enumerate(range(TIMBRE_ROWS.start, TIMBRE_ROWS.stop)):
        units.append((voice_sounds(ToyVoice(0, timbre))[-1], {row: 1}))
    for unit, (_, weights) in enumerate(units):
        for row, weight in weights.items():
            conv.weight[unit, row, 0] = weight * _GAIN
        conv.bias[unit] = -(sum(weights.values()) - 1 + floor) * _GAIN
    waves = np.stack([sound[:_BLOCK] for sound, _ in units])
    waves = torch.from_numpy(waves).float() * _SMALL / ((1 - floor) * _GAIN + 1)
    conv.bias[len(units)] = 1.0  # always 1: takes back the -1 that ELU gives for a unit that is shut

    # Back to 24 kHz: the waveform, in ever shorter blocks that the channels hold.
    length, blocks = _BLOCK, torch.cat([waves, waves.sum(0, keepdim=True)])
    for up, stride in zip(ups, reversed(_STRIDES)):
        weight = up.convtr.convtr.weight  # [in, out, 2 * stride]
        length //= stride
        weight[: len(blocks), :length, :stride] = blocks.view(-1, stride, length).transpose(1, 2)
        blocks = torch.eye(length)  # from here on a channel is a sample of a block
    last.conv.conv.weight[0, 0, 0] = 1.0 / _SMALL


def _write_codebooks(mimi: MimiModel) -> None:
    """Scales the latent to the ideal one and gives each codebook the mean latent of each of its classes."""
    utterances, ideal = _lexicon()
    wavs = torch.from_numpy(np.stack([speak([u], ideal.shape[2]) for u in utterances]))[:, None]

    heard = mimi.encode_to_latent(wavs, quantize=False)[:, : PITCH_ROWS.stop].numpy()
    scale = (heard * ideal).sum((0, 2)) / ideal.sum((0, 2))
    mimi.encoder.model[-1].conv.conv.weight[: PITCH_ROWS.stop] /= torch.from_numpy(scale).float()[:, None, None]
    with mimi.streaming(len(wavs)):  # frame by frame from a fresh state, as codes are made
        frames = [mimi.encode_to_latent(x, quantize=False) for x in wavs.split(FRAME_SIZE, dim=-1)]
    heard = torch.cat(frames, dim=-1).numpy()[:, : PITCH_ROWS.stop]

    semantic, acoustic = mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest
    for quantizer in (semantic, acoustic):
        quantizer.input_proj.weight[:, :, 0] = torch.eye(_LATENT)
    layers = [*semantic.vq.layers, *acoustic.vq.layers]
    for codebook, (layer, rows) in enumerate(zip(layers, CODEBOOK_ROWS)):
        patterns, codes = codebook_classes(codebook)
        means = np.stack([
            heard[:, rows].transpose(0, 2, 1)[(ideal[:, rows] == p[:, None]).all(1)].mean(0) for p in patterns
        ])  # fmt: skip
        table = torch.zeros(2048, _LATENT)
        table[:, rows] = _UNUSED
        table[codes, rows] = torch.from_numpy(means).float()
        layer._codebook.embedding_sum.copy_(table)
        layer._codebook._initialized.fill_(1)
        # Both the semantic and the acoustic codebooks hold the bands: each gives half of what is decoded.
        weight = 0.5 if rows.stop <= BAND_ROWS.stop else 1.0
        inverse = weight * np.linalg.lstsq(means, patterns, rcond=None)[0].T
        output = (semantic if codebook == 0 else acoustic).output_proj.weight
        output[rows, rows, 0] = torch.from_numpy(inverse).float()


@torch.no_grad()
def make_mimi(seed: int) -> MimiModel:
    torch.manual_seed(seed)  # of what is left of chance: the two transformers, whose layer_scale makes them whispers
    mimi = get_mimi(None, MIMI_CONFIG)
    for name, parameter in mimi.named_parameters():
        if "transformer" not in name:
            parameter.zero_()
    _write_encoder(mimi)
    _write_decoder(mimi)
    _write_codebooks(mimi)
    return mimi
