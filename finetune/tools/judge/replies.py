"""Find replies of the agent, and read their words and sound.

A reply is a wav with the agent on the left and the user on the right, and the agent's words in the .json of the same
name: as `finetune.tools.generate --text`, evaluations and annotate.py write them. A folder of the benchmark holds
output.wav (or the same of two channels), output.json and input.wav, the user.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetune.audio.files import SAMPLE_RATE, read_audio
from finetune.audio.words import parse_word, read_alignments, sidecar
from finetune.cli import UserError
from finetune.data.manifest import read_manifest
from finetune.files import regular, why_missing
from finetune.tools.judge.rules import TimedWord


class SpokenReply(NamedTuple):
    name: str
    wav: Path
    words_file: Path
    voice: str | None = None  # of its manifest line


def find_replies(path: Path, problems: list[str]) -> list[SpokenReply]:
    """Return the replies of a run's newest evaluation, a folder, a manifest, or one wav.

    Bad lines of a manifest are added to `problems`. Raises UserError if there are no replies.
    """
    if path.is_dir():
        steps = sorted(path.glob("samples/step_*"))
        folder = steps[-1] if steps else path
        found = [SpokenReply(wav.stem, wav, sidecar(wav)) for wav in sorted(folder.glob("*.wav"))]
        found += [SpokenReply(wav.parent.name, wav, sidecar(wav)) for wav in sorted(folder.glob("*/output.wav"))]
        if not found:
            raise UserError(
                f"{folder}: holds no replies (*.wav, or */output.wav); make some with `python -m "
                "finetune.tools.generate ... --out FOLDER --text FOLDER`"
            )
        return found
    if path.suffix == ".wav":
        return [SpokenReply(path.stem, path, sidecar(path))]
    if path.suffix not in (".jsonl", ".gz"):
        raise UserError(f"{path}: {'neither a folder, a .jsonl nor a .wav' if path.exists() else why_missing(path)}")
    found = [
        SpokenReply(line.path.stem, line.path, line.words_path, line.fields.get("voice_prompt"))
        for line in read_manifest(path, problems)
    ]
    if not found:
        raise UserError(problems[0] if problems else f"{path}: lists no recordings")
    return found


def read_agent_words(file: Path) -> tuple[list[TimedWord], bool, dict]:
    """Return (words, whether they come from the text stream of a model, everything the file holds).

    A word of the text stream ends with its last token, and not with its sound. Raises UserError.
    """
    try:
        content = json.loads(regular(file).read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{file}: missing; it holds the agent's words: finetune.tools.generate writes it with --text, and "
            "annotate.py next to a recording"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON ({error})") from None
    kinds = ("alignments", "chunks", "words", "text")  # of annotate.py, the benchmark, generate, and evaluations
    kind = next((kind for kind in kinds if isinstance(content, dict) and kind in content), None)
    if kind is None:
        raise UserError(f"{file}: has none of {', '.join(kinds)}, which would hold the words of the agent")
    try:
        if kind == "alignments":
            return list(read_alignments(content[kind])), False, content
        if kind == "chunks":  # the end of the last word may be null
            times = [(chunk["text"], *chunk["timestamp"]) for chunk in content[kind]]
            words = [parse_word([text, [start, start if end is None else end]]) for text, start, end in times]
            return [(*word[:2], None if row[2] is None else word[2]) for word, row in zip(words, times)], False, content
        return [parse_word([text, [start, end]]) for text, start, end in content[kind]], True, content
    except (ValueError, LookupError, TypeError, UserError) as error:
        raise UserError(f'{file}: its "{kind}" are no words with their times ({error}); make the file again') from None


def read_sides(reply: SpokenReply) -> np.ndarray:
    """Return agent and user as float32 [2, samples] at 24 kHz. Raises UserError."""
    pcm = read_audio(reply.wav)
    if len(pcm) == 1:
        user = reply.wav.with_name("input.wav")
        if not user.exists():
            raise UserError(f"{reply.wav}: has one channel; the agent must be left and the user right")
        sides = [pcm[0], read_audio(user)[0]]
        pcm = np.stack([np.pad(side, (0, max(map(len, sides)) - len(side))) for side in sides])
    if pcm.shape[1] < SAMPLE_RATE // 2:
        raise UserError(f"{reply.wav}: has {pcm.shape[1] / SAMPLE_RATE:.2f} s, which is no conversation")
    return pcm[:2]
