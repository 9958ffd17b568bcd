"""How exactly the aligners of annotate.py find where words start.

    python -m benchmarks.word_starts WHISPER.pt --speech input_assistant.wav

Speech is by espeak-ng's library, which reports the sample at which each word starts; sentences have up to 3 s of
silence between them. --speech is the recording of tests/speech, in which three words start after a pause, so that the
start can be seen in the signal. Aligners whose package is not installed are left out.
"""

import argparse
import ctypes
import ctypes.util
import difflib
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

from finetune.audio.annotation import ALIGNERS
from finetune.audio.files import to_int16, write_wav
from finetune.audio.transcriber import Transcriber
from finetune.audio.words import Word
from finetune.cli import UserError

RATE = 24_000
VOICES = ("en-us", "en-gb+f2")
SENTENCES = (
    "Good morning, you have reached the garden shop, how can I help you today?",
    "I ordered twelve red roses last Tuesday, and they have not arrived yet.",
    "Could you please tell me the number of your order?",
    "It should be in the letter that we sent to you.",
    "Of course, one moment, I am looking it up right now.",
    "The driver left our warehouse this morning at half past seven.",
    "That is very late, because the party starts at noon.",
    "I understand, and I am sorry about the trouble.",
    "We could send you another bouquet with a faster service.",
    "Yes, that would be great, thank you very much.",
    "Is there anything else that I can do for you?",
    "No, that was everything, have a wonderful day.",
)
HEARD = {"how": 3.26, "by": 21.75, "what": 22.87}  # seconds, in the recording (tests/speech)


class Event(ctypes.Structure):
    """espeak_EVENT of espeak-ng/speak_lib.h."""

    _fields_ = [
        ("type", ctypes.c_int), ("unique_identifier", ctypes.c_uint), ("text_position", ctypes.c_int),
        ("length", ctypes.c_int), ("audio_position", ctypes.c_int), ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p), ("id", ctypes.c_char * 8),
    ]  # fmt: skip


class Espeak:
    """Speech of espeak-ng with the start of each word."""

    WORD, END = 1, 0  # of espeak_EVENT_TYPE
    RETRIEVAL, CHARACTERS, UTF8 = 1, 1, 1  # AUDIO_OUTPUT_RETRIEVAL, POS_CHARACTER, espeakCHARS_UTF8

    def __init__(self):
        self._library = ctypes.CDLL(ctypes.util.find_library("espeak-ng"))
        self.rate = self._library.espeak_Initialize(self.RETRIEVAL, 0, None, 0)
        self._pcm, self._starts = [], []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event))
        self._callback = kind(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, wav, count, events) -> int:
        if wav and count:
            self._pcm.append(np.ctypeslib.as_array(wav, (count,)).copy())
        index = 0
        while events[index].type != self.END:
            if events[index].type == self.WORD:
                first = events[index].text_position - 1
                self._starts.append((first, first + events[index].length, events[index].audio_position / 1000))
            index += 1
        return 0

    def __call__(self, text: str, voice: str) -> tuple[np.ndarray, list[tuple[str, float]]]:
        """Return float32 [samples] at RATE and the (word, start in seconds)."""
        self._pcm, self._starts = [], []
        raw = text.encode() + b"\0"
        self._library.espeak_SetVoiceByName(voice.encode())
        self._library.espeak_Synth(raw, len(raw), 0, self.CHARACTERS, 0, self.UTF8, None, None)
        self._library.espeak_Synchronize()
        pcm = np.concatenate(self._pcm).astype(np.float32) / 32768
        return resample_poly(pcm, RATE, self.rate).astype(np.float32), [(text[a:b], t) for a, b, t in self._starts]


def plain(text: str) -> str:
    return re.sub(r"\W", "", text.lower())


def compare(words: Sequence[Word], truth: Sequence[tuple[str, float]]) -> np.ndarray:
    """Return start - true start, in seconds, of the words that were recognised."""
    a, b = [plain(text) for text, _ in truth], [plain(text) for text, *_ in words]
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    pairs = [(block.a + i, block.b + i) for block in blocks for i in range(block.size)]
    return np.array([words[j][1] - truth[i][1] for i, j in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("whisper", help="an English Whisper as .pt")
    parser.add_argument("--speech", type=Path, help="input_assistant.wav of NVIDIA/personaplex")
    args = parser.parse_args()
    say, rng = Espeak(), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        calls = []
        for voice in VOICES:
            pieces, truth, length = [], [], 0
            for sentence in SENTENCES:
                pieces.append(np.zeros(round(rng.uniform(0.3, 3.0) * RATE), np.float32))
                pcm, starts = say(sentence, voice)
                offset = (length + len(pieces[-1])) / RATE
                truth += [(text, offset + start) for text, start in starts]
                pieces.append(pcm)
                length += len(pieces[-2]) + len(pcm)
            path = Path(folder, f"{voice}.wav")
            write_wav(path, to_int16(np.stack([np.concatenate(pieces)] * 2)), RATE)
            calls.append((path, truth))
        for name, aligner in ALIGNERS.items():
            try:
                transcriber = Transcriber(args.whisper, "cpu", "en", aligner=aligner)
            except UserError as error:
                print(f"{name}: left out ({error})")
                continue
            late = np.concatenate([compare(transcriber(path, 0).words, truth) for path, truth in calls])
            size, total = np.abs(late), sum(len(truth) for _, truth in calls)
            print(
                f"{name}: {len(late)} of {total} words of espeak-ng recognised; late by "
                f"{np.median(late):+.3f} s in the median, off by {np.median(size):.3f} s in the median, "
                f"{np.quantile(size, 0.9):.3f} s at the 90th percentile; {np.mean(size > 0.2):.1%} by more than 0.2 s"
            )
            if args.speech:
                words = {plain(text): start for text, start, _ in reversed(transcriber(args.speech, 0).words)}
                found = ", ".join(f"{text} {words.get(text, float('nan')):.2f} ({at})" for text, at in HEARD.items())
                print(f"  the recording: {found}")


if __name__ == "__main__":
    main()
