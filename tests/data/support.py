"""Helpers of the tests in this folder."""

import json

from finetune.args import PromptArgs
from finetune.audio.codes import fingerprint_mimi
from finetune.data.interleaver import InterleavedTokenizer, Interleaver, PrecomputedTokenizer
from finetune.data.prompter import Prompter
from finetune.prompts.voices import VoiceBook, load_voices

DELAYS = [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]


def write_lines(path, lines, opener=open):
    """Write a manifest of dictionaries and strings."""
    with opener(path, "wt") as file:
        file.writelines(json.dumps(line) + "\n" if isinstance(line, dict) else line + "\n" for line in lines)
    return path


def tokenizers(parts, window_frames=40, prompter=None):
    """Both tokenizers: of audio and of codes."""
    mimi, pieces = parts
    settings = (Interleaver(pieces), window_frames, ["SPEAKER_MAIN"], prompter)
    live = InterleavedTokenizer(*settings, mimi=mimi)
    return live, PrecomputedTokenizer(*settings, mimi_fingerprint=fingerprint_mimi(mimi))


def prompted(parts, world, windows=None, **settings):
    """A prompter, with the voices of `windows` loaded, and both tokenizers with it."""
    mimi, pieces = parts
    args = PromptArgs(voices_dir=str(world / "data/voices"), **settings)
    prompter = Prompter(args, pieces, VoiceBook(world / "data/voices", lambda: None))
    if windows is not None:
        wanted = prompter.check([prompter.scan(windows.prompts())])
        prompter.voices = load_voices(wanted, lambda: mimi, lambda: fingerprint_mimi(mimi), None, DELAYS, False)
    return prompter, *tokenizers(parts, prompter=prompter)
