"""A Whisper that always says the same, and recordings for it."""

import dataclasses
from pathlib import Path

import numpy as np
import sphn
import torch
import whisper
from whisper.tokenizer import get_tokenizer

RATE = 24_000  # Hz, of the recordings


def scripted_whisper(path: Path, text: str = " one two three", end: float = 2.0, language: str | None = None) -> str:
    """Write a model in openai-whisper's format that hears `text` in the first `end` seconds of any audio.

    With a `language` it is multilingual and detects that language. Returns the path.

    Its blocks add nothing to the residual stream, so the token at each position follows from the positional embedding
    alone, which holds the embedding of the next token.
    """
    tokenizer = get_tokenizer(language is not None, language=language, task=language and "transcribe")
    vocabulary = 51865 if language else 51864  # whisper recognises English-only models by this number
    dims = whisper.model.ModelDimensions(80, 1500, 64, 1, 1, vocabulary, 448, 64, 1, 1)
    torch.manual_seed(0)
    model = whisper.model.Whisper(dims)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.ones_(module.weight)
            torch.nn.init.zeros_(module.bias)
    (block,) = model.decoder.blocks
    for output in (block.attn.out, block.cross_attn.out, block.mlp[2]):
        torch.nn.init.zeros_(output.weight)
        torch.nn.init.zeros_(output.bias)
    head = [tokenizer.to_language_token(language), tokenizer.transcribe] if language else []
    start, stop = tokenizer.timestamp_begin, tokenizer.timestamp_begin + round(end / 0.02)
    script = [*head, start, *tokenizer.encode(text), stop, *[tokenizer.eot] * 448][:448]
    embedding = torch.nn.init.normal_(model.decoder.token_embedding.weight).detach()
    model.decoder.positional_embedding.data.copy_(100 * embedding[script])
    weights = {name: value.half() for name, value in model.state_dict().items()}
    torch.save({"dims": dataclasses.asdict(dims), "model_state_dict": weights}, path)
    return str(path)


def write_stereo(path: Path, agent: np.ndarray, user: np.ndarray | None = None) -> None:
    """Write two channels at 24 kHz; without a user the right one is silent."""
    sphn.write_wav(str(path), np.stack([agent, np.zeros_like(agent) if user is None else user]), RATE)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), dtype=np.float32)


def murmur(seconds: float, seed: int = 0, lead: float = 0.5) -> np.ndarray:
    """Return noise whose level rises and falls like that of speech, after `lead` seconds of silence."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    swell = np.abs(np.sin(2 * np.pi * 2 * (time - lead))) * (time >= lead)
    return (0.2 * swell * rng.standard_normal(len(time))).astype(np.float32)
