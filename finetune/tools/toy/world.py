"""Makes a tiny world to train in: a tiny Moshi in stock layout and synthetic stereo dialogues with word times.

Everything is real but small: moshi's LM, moshi's Mimi, a SentencePiece tokenizer, 24 kHz wavs. Each word is a sound
of its own, each voice has its pitch and timbre, and the role named in the text prompt decides what the agent says.

OUT/model/  config.json, model.safetensors, mimi.safetensors, mimi_config.json, tokenizer.model
OUT/data/   train.jsonl, eval.jsonl, train/*.wav and eval/*.wav with a .json beside each, voices/*.wav
"""

import io
import json
import wave
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from moshi.models.loaders import get_mimi
from safetensors.torch import save_file

from finetune.audio.files import FRAME_RATE, FRAME_SIZE, SAMPLE_RATE
from finetune.audio.words import sidecar
from finetune.cli import Parser, UserError
from finetune.files import replacing
from finetune.model.weights import fuse
from finetune.prompts.text import wrap_system_prompt
from finetune.streams import CODEBOOKS, SILENCE_TOKENS, SINE_TOKENS, TEXT_PAD


# --- 1. The world: words, voices, roles ------------------------------------------------------------------------
class Voice(NamedTuple):
    pitch: int  # index into PITCHES
    timbre: int  # index into TIMBRES


class Role(NamedTuple):
    place: str
    hour: str
    thing: str


# All frequencies are multiples of 25 Hz: whole periods in half a frame, so that a sound is alike in all its frames.
PITCHES = (100, 125, 150, 175, 200, 225, 250, 275)  # Hz
TIMBRES = (7350, 7950, 8550, 9150, 9750)  # Hz
BANDS = tuple(range(900, 6301, 600))  # Hz, centres of the bands of which two or three sound in a frame of a word
BAND_WIDTH = 220  # Hz; a band holds the harmonics of the pitch within it, at least the nearest one
AGENT_VOICES = {
    "basalt": Voice(0, 0), "cedar": Voice(2, 1), "flint": Voice(4, 2), "maple": Voice(6, 3), "willow": Voice(7, 4),
}  # fmt: skip
USER_VOICES = {"rain": Voice(1, 3), "snow": Voice(3, 0), "wind": Voice(5, 1)}
VOICES = AGENT_VOICES | USER_VOICES
ROLES = {
    "Ada": Role("harbour", "seven", "boats"),
    "Bruno": Role("bakery", "eight", "bread"),
    "Celia": Role("library", "nine", "books"),
    "Dario": Role("station", "ten", "trains"),
    "Emil": Role("garden", "eleven", "roses"),
}
QUESTIONS = {
    "who": ("who", "are", "you"),
    "where": ("where", "is", "it"),
    "when": ("when", "do", "you", "open"),
    "what": ("what", "is", "there"),
}
NEUTRAL_WORDS = ("la", "mi", "re", "so")  # only in voice prompts
WORDS = tuple(
    dict.fromkeys(
        [w for name, role in ROLES.items() for w in (name, *role)]
        + ["hello", "this", "is", "in", "the", "from", "we", "have", "i", "am"]
        + [w for question in QUESTIONS.values() for w in question]
        + list(NEUTRAL_WORDS)
    )
)


def text_prompt(role: str) -> str:
    """The text prompt that gives the agent its role, wrapped in `<system>` tags."""
    return wrap_system_prompt(f"You are {role} from the {ROLES[role].place}.")


def greeting(role: str) -> list[str]:
    """What the agent says first."""
    return ["hello", "this", "is", role, ROLES[role].place]


def expected_reply(role: str, question: str) -> list[str]:
    """What an agent in that role answers to one of QUESTIONS."""
    place, hour, thing = ROLES[role]
    replies = {"who": ["i", "am", role], "where": ["in", "the", place], "when": ["from", hour],
               "what": ["we", "have", thing]}  # fmt: skip
    return replies[question]


def held_out(role: str, voice: str) -> bool:
    """Whether this role never speaks in this (agent) voice in the training data: one voice of each role."""
    return list(ROLES).index(role) == list(AGENT_VOICES).index(voice)


# --- 2. Sound --------------------------------------------------------------------------------------------------
_LOUDNESS = 0.0247  # RMS of one band: speech then measures about -24 LUFS, the level of a PersonaPlex voice prompt
_NOISE = (2e-4, 8e-4)  # RMS of the background, the range over files
_RAMP = 120  # samples (5 ms) in which one frame's sound gives way to the next


@cache
def word_parts() -> dict[str, np.ndarray]:
    """{word: bool [frames 2-4, bands]}: which bands sound in each frame of a word. No two frames are alike."""
    rng = np.random.default_rng(1)
    patterns = [p for n in (2, 3) for p in combinations(range(len(BANDS)), n)]
    order = iter(rng.permutation(len(patterns)))
    parts = {}
    for word in WORDS:
        parts[word] = np.zeros((rng.integers(2, 5), len(BANDS)), dtype=bool)
        for row in parts[word]:
            row[list(patterns[next(order)])] = True
    return parts


@cache
def _sounds(voice: Voice) -> np.ndarray:
    """[bands + 2, FRAME_SIZE]: one frame of each band, of the pitch and of the timbre, with one phase for all time."""
    phase_of = np.random.default_rng(2).uniform(0, 2 * np.pi, SAMPLE_RATE // 2 // 25)
    pitch = PITCHES[voice.pitch]
    harmonics = pitch * np.arange(1, SAMPLE_RATE // 2 // pitch)
    rows = []
    for centre in BANDS:
        distance = np.abs(harmonics - centre)
        rows.append(harmonics[distance <= max(BAND_WIDTH / 2, distance.min())])
    rows += [np.array([pitch]), TIMBRES[voice.timbre] + np.array([-50, 0, 50])]
    seconds = np.arange(FRAME_SIZE) / SAMPLE_RATE
    sounds = []
    for frequencies in rows:
        phases = phase_of[frequencies // 25]
        sound = np.cos(2 * np.pi * frequencies[:, None] * seconds + phases[:, None]).sum(0)
        sounds.append(sound * _LOUDNESS / np.sqrt((sound**2).mean()))
    return np.stack(sounds)


class Utterance(NamedTuple):
    words: tuple[str, ...]
    voice: Voice
    start: int  # frame

    def times(self) -> list[tuple[str, float, float]]:
        """(word, start, end) in seconds."""
        frame, out = self.start, []
        for word in self.words:
            length = len(word_parts()[word])
            out.append((word, frame / FRAME_RATE, (frame + length) / FRAME_RATE))
            frame += length + 1
        return out

    @property
    def stop(self) -> int:
        """The frame after the last word."""
        return self.start + sum(len(word_parts()[w]) + 1 for w in self.words) - 1


def speak(utterances: list[Utterance], frames: int) -> np.ndarray:
    """float32 [frames * FRAME_SIZE]: the utterances and silence between them, one frame of silence between words."""
    wav = np.zeros((frames, FRAME_SIZE))
    ramp = np.minimum(1.0, np.arange(1, FRAME_SIZE + 1) / _RAMP)
    for utterance in utterances:
        levels = np.zeros((frames, len(BANDS) + 2))
        for word, start, _ in utterance.times():
            pattern = word_parts()[word]
            first = round(start * FRAME_RATE)
            levels[first : first + len(pattern), : len(BANDS)] = pattern
            levels[first : first + len(pattern), len(BANDS) :] = 1.0
        sounds = _sounds(utterance.voice)
        wav += (levels @ sounds) * ramp
        wav[1:] += (levels[:-1] @ sounds) * (1 - ramp)
    return wav.reshape(-1).astype(np.float32)


def synthesise(words: list[str], voice: str, lead_in: int = 0, tail: int = 1) -> np.ndarray:
    """float32 [samples] at 24 kHz: `words` in one of VOICES, without noise. `lead_in`, `tail`: frames of silence."""
    utterance = Utterance(tuple(words), VOICES[voice], lead_in)
    return speak([utterance], utterance.stop + tail)


# --- 3. Mimi: moshi's modules, weights set by hand ----------------------------------------------------------------
#
# A random encoder of this size tells little, and training one takes minutes. But a filterbank can be written down:
# the first strided convolution measures each band, ELU rectifies it, the next ones pool it, and the codebooks hold
# what words, pitches and timbres look like there. The decoder is the inverse. ELU is a rectifier where its input is
# large (_GAIN) and, to 0.2 %, the identity where it is small (_SMALL), so that a waveform passes. The codes of a word
# hold from -3 to +6 dB, up to noise of -30 dBFS, and for words that begin up to a quarter of a frame late.
_CHANNELS = 20  # of the first layer; each of the three strided layers doubles them
_STRIDES = (40, 2, 12)  # encoder: 24 kHz -> 600 Hz -> 300 Hz -> 25 Hz; Mimi's own downsampling makes it 12.5 Hz
_BLOCK = 960  # samples of one step at 25 Hz
_LATENT = 32
_SMALL = 1e-2
_GAIN = 60.0  # lifts a band of speech to about 25
_UNUSED = -3.0  # features are never negative: an entry there is never chosen, and decodes to silence
_MIMI_CONFIG = {
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
_BANDS = slice(0, len(BANDS))
_TIMBRE = slice(_BANDS.stop, _BANDS.stop + len(TIMBRES))
_PITCH = slice(_TIMBRE.stop, _TIMBRE.stop + len(PITCHES))
_ROWS = [_BANDS, _PITCH, _TIMBRE, *(slice(i, i + 2) for i in range(0, len(BANDS), 2))]


@cache
def _lexicon() -> tuple[list[Utterance], np.ndarray]:
    """All words in all voices, an utterance a voice, and the latents that an ideal encoder would give them: 1 for
    what sounds in a frame, else 0. [voices, rows, frames]"""
    utterances = [Utterance(WORDS, voice, 0) for voice in VOICES.values()]
    ideal = np.zeros((len(utterances), _PITCH.stop, utterances[0].stop + 1))
    for levels, utterance in zip(ideal, utterances):
        for word, start, end in utterance.times():
            frames = slice(round(start * FRAME_RATE), round(end * FRAME_RATE))
            levels[_BANDS, frames] = word_parts()[word].T
            levels[_TIMBRE.start + utterance.voice.timbre, frames] = 1
            levels[_PITCH.start + utterance.voice.pitch, frames] = 1
    return utterances, ideal


@cache
def _classes(codebook: int) -> tuple[np.ndarray, np.ndarray]:
    """What a codebook tells apart: patterns [classes, rows] of 0 and 1, silence first, and the code of each.

    The codes of silence are PersonaPlex's; those of its sine tone mean nothing here and are left out.
    """
    patterns = np.unique(np.concatenate(_lexicon()[1][:, _ROWS[codebook]], axis=1), axis=1).T
    order = np.random.default_rng(3 + codebook).permutation(2048)
    order = order[~np.isin(order, (SILENCE_TOKENS[codebook], SINE_TOKENS[codebook]))]
    return patterns, np.concatenate([[SILENCE_TOKENS[codebook]], order[: len(patterns) - 1]])


def _write_encoder(mimi: MimiModel) -> None:
    first, bands, pool, pitch, last = (m.conv.conv for m in mimi.encoder.model if not isinstance(m, torch.nn.ELU))
    filters = (*BANDS, *TIMBRES)
    n = len(filters)
    first.weight[0, 0, 0] = _SMALL

    # 600 Hz: each band twice, a quarter of a period apart; and what is below the bands, as a waveform.
    width = 2 * _STRIDES[0]
    seconds, window = torch.arange(width) / SAMPLE_RATE, torch.hann_window(width)
    for i, frequency in enumerate(filters):
        bands.weight[2 * i, 0] = _GAIN / _SMALL * window * torch.cos(2 * torch.pi * frequency * seconds)
        bands.weight[2 * i + 1, 0] = _GAIN / _SMALL * window * torch.sin(2 * torch.pi * frequency * seconds)
    bands.weight[2 * n, 0] = window / window.sum()

    # 300 Hz: the rectified bands, pooled; the waveform, two samples side by side. The older half of each kernel
    # stays 0 from here on, so that a frame says little of the one before.
    stride = _STRIDES[1]
    for i in range(n):
        pool.weight[i, [2 * i, 2 * i + 1], stride:] = 1.0
    for i in range(stride):
        pool.weight[n + i, 2 * n, stride + i] = 1.0

    # 25 Hz: the bands, pooled; the waveform against each pitch in four phases, which ELU then rectifies.
    steps = _STRIDES[2]
    for i in range(n):
        pitch.weight[i, i, steps:] = 1.0
    seconds = torch.arange(stride * steps) * _STRIDES[0] / SAMPLE_RATE
    for i, frequency in enumerate(PITCHES):
        for phase in range(4):
            tone = _GAIN / _SMALL * torch.cos(2 * torch.pi * (frequency * seconds + phase / 4))
            pitch.weight[n + 4 * i + phase, n : n + stride, steps:] = tone.view(steps, stride).T

    for i in range(n):
        last.weight[i, i, 0] = 1.0
    for i in range(len(PITCHES)):
        last.weight[_PITCH.start + i, n + 4 * i : n + 4 * i + 4, 0] = 1.0
    mimi.downsample.conv.conv.conv.weight[:, :, 2:] = torch.eye(_LATENT)[:, :, None] / 2


def _write_decoder(mimi: MimiModel) -> None:
    first, *ups, last = (m for m in mimi.decoder.model if not isinstance(m, torch.nn.ELU))
    mimi.upsample.convtr.convtr.convtr.weight[:, 0, :2] = 1.0

    # A unit for each band in each pitch, which opens when both are there; one for each pitch and each timbre alone.
    conv, floor, sounds = first.conv.conv, 0.3, []  # levels below the floor are silent

    def add_unit(sound: np.ndarray, row: int, band: int | None = None) -> None:
        unit = len(sounds)
        sounds.append(sound[:_BLOCK])
        if band is None:
            conv.weight[unit, row, 0] = _GAIN
            conv.bias[unit] = -floor * _GAIN
        else:
            conv.weight[unit, band, 0] = _GAIN
            conv.weight[unit, row, 0] = 4 * _GAIN
            conv.bias[unit] = -(4 + floor) * _GAIN

    for pitch in range(len(PITCHES)):
        *bands, alone, _ = _sounds(Voice(pitch, timbre=0))
        add_unit(alone, _PITCH.start + pitch)
        for band, sound in enumerate(bands):
            add_unit(sound, _PITCH.start + pitch, band)
    for timbre in range(len(TIMBRES)):
        add_unit(_sounds(Voice(0, timbre))[-1], _TIMBRE.start + timbre)
    waves = torch.from_numpy(np.stack(sounds)).float() * _SMALL / ((1 - floor) * _GAIN + 1)
    conv.bias[len(sounds)] = 1.0  # always 1: takes back the -1 that ELU gives for a unit that is shut
    waves = torch.cat([waves, waves.sum(0, keepdim=True)])

    # Back to 24 kHz: the waveform, in ever shorter blocks that the channels hold.
    length = _BLOCK
    for up, stride in zip(ups, reversed(_STRIDES)):
        weight = up.convtr.convtr.weight  # [in, out, 2 * stride]
        length //= stride
        if up is ups[0]:
            weight[: len(waves), :length, :stride] = waves.view(len(waves), stride, length).transpose(1, 2)
        else:
            for i in range(stride * length):
                weight[i, i % length, i // length] = 1.0
    last.conv.conv.weight[0, 0, 0] = 1.0 / _SMALL


def _write_codebooks(mimi: MimiModel) -> None:
    """Scales the latent to the ideal one and gives each codebook the mean latent of each of its classes."""
    utterances, ideal = _lexicon()
    wavs = torch.from_numpy(np.stack([speak([u], ideal.shape[2]) for u in utterances]))[:, None]

    heard = mimi.encode_to_latent(wavs, quantize=False)[:, : _PITCH.stop].numpy()
    scale = (heard * ideal).sum((0, 2)) / ideal.sum((0, 2))
    mimi.encoder.model[-1].conv.conv.weight[: _PITCH.stop] /= torch.from_numpy(scale).float()[:, None, None]
    with mimi.streaming(len(wavs)):  # frame by frame from a fresh state, as codes are made
        frames = [mimi.encode_to_latent(x, quantize=False) for x in wavs.split(FRAME_SIZE, dim=-1)]
    heard = torch.cat(frames, dim=-1).numpy()[:, : _PITCH.stop]

    semantic, acoustic = mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest
    for quantizer in (semantic, acoustic):
        quantizer.input_proj.weight[:, :, 0] = torch.eye(_LATENT)
    layers = [*semantic.vq.layers, *acoustic.vq.layers]
    for codebook, (layer, rows) in enumerate(zip(layers, _ROWS)):
        patterns, codes = _classes(codebook)
        means = np.stack([
            heard[:, rows].transpose(0, 2, 1)[(ideal[:, rows] == p[:, None]).all(1)].mean(0) for p in patterns
        ])  # fmt: skip
        table = torch.zeros(2048, _LATENT)
        table[:, rows] = _UNUSED
        table[codes, rows] = torch.from_numpy(means).float()
        layer._codebook.embedding_sum.copy_(table)
        layer._codebook._initialized.fill_(1)
        # Both the semantic and the acoustic codebooks hold the bands: each gives half of what is decoded.
        weight = 0.5 if rows.stop <= _BANDS.stop else 1.0
        inverse = weight * np.linalg.lstsq(means, patterns, rcond=None)[0].T
        output = (semantic if codebook == 0 else acoustic).output_proj.weight
        output[rows, rows, 0] = torch.from_numpy(inverse).float()


@torch.no_grad()
def _make_mimi(seed: int) -> MimiModel:
    torch.manual_seed(seed)  # of what is left of chance: the two transformers, whose layer_scale makes them whispers
    mimi = get_mimi(None, _MIMI_CONFIG)
    for name, parameter in mimi.named_parameters():
        if "transformer" not in name:
            parameter.zero_()
    _write_encoder(mimi)
    _write_decoder(mimi)
    _write_codebooks(mimi)
    return mimi


# --- 4. The model folder ---------------------------------------------------------------------------------------

# Moshi's settings (moshi/models/loaders.py, _lm_kwargs) with smaller numbers.
_LM_CONFIG = {
    "dim": 160, "n_q": 16, "dep_q": 8, "card": 2048, "existing_text_padding_id": TEXT_PAD, "num_heads": 5,
    "num_layers": 4, "hidden_scale": 4.125, "causal": True, "layer_scale": None, "context": 3000, "max_period": 10000,
    "gating": "silu", "norm": "rms_norm_f32", "positional_embedding": "rope", "depformer_dim": 64,
    "depformer_dim_feedforward": 264, "depformer_num_heads": 2, "depformer_num_layers": 2,
    "depformer_layer_scale": None, "depformer_multi_linear": True, "depformer_context": 8,
    "depformer_max_period": 10000, "depformer_gating": "silu", "depformer_pos_emb": "none",
    "depformer_weights_per_step": True, "delays": [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1],
}  # fmt: skip
_NAMES = {
    "moshi_name": "model.safetensors",
    "mimi_name": "mimi.safetensors",
    "mimi_config_name": "mimi_config.json",
    "tokenizer_name": "tokenizer.model",
}
_PIECES = 400  # of the tokenizer, 256 of them bytes: most words of the world are one to three pieces


def _make_tokenizer() -> bytes:
    sentences = [text_prompt(role) for role in ROLES] + [" ".join(greeting(role)) for role in ROLES]
    sentences += [" ".join(expected_reply(role, question)) for role in ROLES for question in QUESTIONS]
    sentences += [" ".join(words) for words in (*QUESTIONS.values(), NEUTRAL_WORDS)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, model_type="bpe", vocab_size=_PIECES,
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=TEXT_PAD, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def make_model(folder: str | Path, seed: int = 0, **overrides) -> Path:
    """Writes a tiny Moshi in stock layout to `folder` (made if needed) and returns it.

    The weights are bfloat16 in the fused layout of the published checkpoints; those of the LM are random by `seed`.

    Args:
        overrides: LM settings in place of those of _LM_CONFIG, e.g. `num_layers=1`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _make_tokenizer()
    (folder / _NAMES["tokenizer_name"]).write_bytes(tokenizer)
    save_file(_make_mimi(seed).state_dict(), folder / _NAMES["mimi_name"])
    (folder / _NAMES["mimi_config_name"]).write_text(json.dumps(_MIMI_CONFIG, indent=2) + "\n")

    text_card = sentencepiece.SentencePieceProcessor(model_proto=tokenizer).vocab_size()
    config = _LM_CONFIG | {"text_card": text_card} | overrides
    torch.manual_seed(seed)
    lm = LMModel(dtype=torch.bfloat16, **config)
    save_file(fuse(lm.state_dict(), config["dep_q"]), folder / _NAMES["moshi_name"])
    config |= {"model_type": "moshi", **_NAMES}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


# --- 5. The corpus ---------------------------------------------------------------------------------------------
_EVAL_SHARE = 0.1  # of the hours, on top of them
_VOICE_PROMPT_FRAMES = 42  # at least, 3.4 s


class _Dialogue(NamedTuple):
    agent: list[Utterance]
    user: list[Utterance]
    turns: list[dict]
    frames: int


def _make_dialogue(rng: np.random.Generator, role: str, voice: str, user_voice: str) -> _Dialogue:
    """The agent greets; the user asks one to four questions, each answered after 0.2 to 0.6 s."""
    agent, user, turns = [], [], []

    def say(words: list[str]) -> int:
        agent.append(Utterance(tuple(words), VOICES[voice], frame))
        return agent[-1].stop

    frame = int(rng.integers(2, 7))
    frame = say(greeting(role))
    for question in rng.permutation(list(QUESTIONS))[: rng.integers(1, 5)]:
        frame += int(rng.integers(5, 13))
        user.append(Utterance(QUESTIONS[question], VOICES[user_voice], frame))
        asked = user[-1].stop
        frame = asked + int(rng.integers(3, 8))
        reply = expected_reply(role, question)
        turns.append({"question": str(question), "asked_sec": asked / FRAME_RATE, "reply": reply})
        frame = say(reply)
    return _Dialogue(agent, user, turns, max(75, frame + int(rng.integers(6, 15))))


def _write_wav(path: Path, wav: np.ndarray) -> None:
    """16-bit, from float [channels, samples]."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(wav))
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((wav.T.clip(-1, 1) * 32767).round().astype("<i2").tobytes())


def _write_dialogue(path: Path, rng: np.random.Generator, role: str, voice: str) -> float:
    """One wav and its .json. Returns seconds."""
    user_voice = str(rng.choice(list(USER_VOICES)))
    dialogue = _make_dialogue(rng, role, voice, user_voice)
    wav = np.stack([speak(dialogue.agent, dialogue.frames), speak(dialogue.user, dialogue.frames)])
    wav += rng.standard_normal(wav.shape, dtype=np.float32) * np.float32(rng.uniform(*_NOISE))
    _write_wav(path, wav)
    sides = (("SPEAKER_MAIN", dialogue.agent), ("SPEAKER_USER", dialogue.user))
    times = [(word, start, end, who) for who, side in sides for u in side for word, start, end in u.times()]
    about = {
        "alignments": [[word, [start, end], who] for word, start, end, who in sorted(times, key=lambda t: t[1])],
        "text_prompt": text_prompt(role),
        "voice_prompt": f"{voice}.wav",
        "role": role,
        "voice": voice,
        "user_voice": user_voice,
        "turns": dialogue.turns,
    }
    sidecar(path).write_text(json.dumps(about) + "\n")
    return dialogue.frames / FRAME_RATE


def _write_split(folder: Path, name: str, hours: float, pairs: list[tuple[str, str]], rng: np.random.Generator) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    lines: list[dict] = []
    total = 0.0
    while total < hours * 3600 or len(lines) < 2:
        role, voice = pairs[len(lines) % len(pairs)]
        path = f"{name}/{len(lines):05d}.wav"
        lines.append({"path": path, "duration": _write_dialogue(folder / path, rng, role, voice)})
        if name == "eval":
            lines[-1]["held_out"] = held_out(role, voice)
        total += lines[-1]["duration"]
    # The manifest last: where it is, the files are.
    with replacing(folder / f"{name}.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_corpus(folder: str | Path, hours: float = 0.5, seed: int = 0) -> Path:
    """Writes `hours` of training dialogues, a tenth of that for evaluation and the voice prompts; returns `folder`.

    train.jsonl has all pairs of role and voice except those held out, evenly; eval.jsonl has held-out pairs and seen
    pairs in turn, `held_out` says which. Left channel: agent; right: user.
    """
    folder = Path(folder)
    rng = np.random.default_rng(seed)
    pairs = [(role, voice) for role in ROLES for voice in AGENT_VOICES]
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    seen = [pair for pair in pairs if not held_out(*pair)]
    unseen = [pair for pair in pairs if held_out(*pair)]
    _write_split(folder, "train", hours, seen, rng)
    in_turn = [pair for i in range(len(seen)) for pair in (unseen[i % len(unseen)], seen[i])]
    _write_split(folder, "eval", hours * _EVAL_SHARE, in_turn, rng)
    (folder / "voices").mkdir(exist_ok=True)
    for name, voice in AGENT_VOICES.items():
        utterance = Utterance((), voice, 1)
        while utterance.stop < _VOICE_PROMPT_FRAMES:
            utterance = utterance._replace(words=(*utterance.words, str(rng.choice(NEUTRAL_WORDS))))
        wav = speak([utterance], utterance.stop + 1)[None]
        wav += rng.standard_normal(wav.shape, dtype=np.float32) * np.float32(_NOISE[0])
        _write_wav(folder / "voices" / f"{name}.wav", wav)
    return folder


# --- 6. Judges: what was said, and by whom ---------------------------------------------------------------------
def _levels(audio: np.ndarray) -> np.ndarray:
    """[rows, frames]: the level of each band, timbre and pitch, about 1 where it sounds.

    From codes [8, frames] the entries that the codebooks stand for (an id that stands for nothing gives 0); from a wav
    [samples] its spectrum, a frame at a time.
    """
    audio = np.asarray(audio)
    if audio.ndim == 2:
        levels = np.zeros((_PITCH.stop, audio.shape[1]))
        for codebook in (1, 2, 0):
            patterns, codes = _classes(codebook)
            table = np.zeros((2048, patterns.shape[1]))
            table[codes] = patterns
            levels[_ROWS[codebook]] = table[audio[codebook]].T
        return levels
    frames = audio[: len(audio) // FRAME_SIZE * FRAME_SIZE].reshape(-1, FRAME_SIZE)
    energy = np.abs(np.fft.rfft(frames)) ** 2 * 2 / FRAME_SIZE**2
    spectrum = np.fft.rfftfreq(FRAME_SIZE, 1 / SAMPLE_RATE)
    centres = [(f, 140) for f in BANDS] + [(f, 60) for f in TIMBRES] + [(f, 6) for f in PITCHES]
    within = np.array([np.abs(spectrum - centre) <= width for centre, width in centres])
    return np.sqrt(within @ energy.T) / _LOUDNESS


def detect_words(audio: np.ndarray) -> list[tuple[str, int]]:
    """(word, frame of its start) of each word in a wav [samples] (24 kHz, frames as synthesised) or codes [8, frames].

    A word counts as said where more than half of its frames sound as they should.
    """
    places = [(word, i) for word, parts in word_parts().items() for i in range(len(parts))]
    patterns = np.concatenate([np.zeros((1, len(BANDS))), *word_parts().values()])
    levels = _levels(audio)[_BANDS].T
    nearest = ((levels[:, None] - patterns) ** 2).sum(-1).argmin(1) - 1  # -1: silence
    found, free = [], 0
    for frame, place in enumerate(nearest):
        if place < 0:
            continue
        word, i = places[place]
        start, length = frame - i, len(word_parts()[word])
        agree = sum(start + j < len(nearest) and nearest[start + j] == place - i + j for j in range(length))
        if start >= free and 2 * agree > length:
            found.append((word, start))
            free = start + length
    return found


def detect_voice(audio: np.ndarray) -> tuple[str | None, float]:
    """The one of VOICES that speaks in a wav [samples] or codes [8, frames], and a confidence: the share of what
    sounds that has its pitch and its timbre. (None, 0.0) if nothing sounds."""
    levels = _levels(audio)
    levels = np.where(levels > 0.5, levels, 0.0)
    pitch, timbre = levels[_PITCH].sum(1), levels[_TIMBRE].sum(1)
    if not pitch.any() or not timbre.any():
        return None, 0.0
    shares = {n: (pitch[v.pitch] / pitch.sum() + timbre[v.timbre] / timbre.sum()) / 2 for n, v in VOICES.items()}
    name = max(shares, key=shares.get)
    return name, float(shares[name])


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, made if needed")
    parser.add_argument("--hours", type=float, default=0.5, help="of training dialogues")
    parser.add_argument("--seed", type=int, default=0, help="of the LM's weights and of the dialogues")
    args = parser.parse_args()
    if not args.hours > 0:
        raise UserError(f"--hours {args.hours}: must be above 0")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out}: is a file; give a folder")
    make_model(args.out / "model", args.seed)
    make_corpus(args.out / "data", args.hours, args.seed)
    print(f"wrote {args.out / 'model'} and {args.out / 'data'}")
