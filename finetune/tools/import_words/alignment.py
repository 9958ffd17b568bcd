"""Find the words of a sentence, whose time is known, in its sound."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.audio.files import probe_audio, read_audio
from finetune.audio.words import MAIN_SPEAKER
from finetune.tools.import_words.formats import Passage, Token
from finetune.tools.import_words.timing import is_sentence

if TYPE_CHECKING:
    from finetune.audio.aligners import AlignText  # takes seconds to import

RATE = 16_000  # of Whisper
MARGIN_SEC = 0.5  # of sound before and after a sentence: transcribers cut close, and times of subtitles are rounded
ALIGNED = "aligned: words found in the sound of their sentence"


def align_sentences(
    align: "AlignText", path: Path, speaker: str, passages: Sequence[Passage]
) -> tuple[list[Passage], Counter[str]]:
    """Return the passages of a speaker with times for the words of sentences, and how many were found.

    The agent is heard in the left channel, all others in the right one. Sentences in which `align` does not find all
    words are returned unchanged. Raises UserError if the recording cannot be read.
    """
    found, counts = [], Counter()
    channel = min(int(speaker != MAIN_SPEAKER), probe_audio(path).channels - 1)
    for passage in passages:
        times = None
        if is_sentence(passage):
            start = max(0.0, passage.start - MARGIN_SEC)
            pcm = read_audio(path, start, passage.end + MARGIN_SEC - start, RATE, channel=channel)[0]
            times = align(pcm, " ".join(word.text for word in passage.words)) if len(pcm) else None
        if times is not None:
            counts[ALIGNED] += len(times)
            words = [Token(word.text, start + s, start + e) for word, (s, e) in zip(passage.words, times)]
            passage = passage._replace(words=words)
        found.append(passage)
    return found, counts
