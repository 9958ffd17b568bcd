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


def tokenizers(parts, window_frames=40):
    """Both tokenizers, without prompts."""
    mimi, pieces = parts
    interleaver = Interleaver(pieces)
    return (
        InterleavedTokenizer(interleaver, window_frames, mimi=mimi),
        PrecomputedTokenizer(interleaver, window_frames, mimi_fingerprint=fingerprint_mimi(mimi)),
    )


def prompted(parts, world, windows=None, **settings):
    """A prompter, with the voices of `windows` loaded, and both tokenizers with it."""
    mimi, pieces = parts
    args = PromptArgs(voices_dir=str(world / "data/voices"), **settings)
    prompter = Prompter(args, pieces, VoiceBook(world / "data/voices", lambda: None))
    if windows is not None:
        wanted = prompter.check([prompter.scan(windows.prompts())])
        prompter.voices = load_voices(wanted, lambda: mimi, lambda: fingerprint_mimi(mimi), None, DELAYS, False)
    common = (Interleaver(pieces), 40, ["SPEAKER_MAIN"], prompter)
    live = InterleavedTokenizer(*common, mimi=mimi)
    return prompter, live, PrecomputedTokenizer(*common, mimi_fingerprint=fingerprint_mimi(mimi))
