"""How many windows find a `same_speaker` voice, and how much of it is speech, with right, missing and late words.

    python -m benchmarks.voices calls/train.jsonl --window 10 --files 60

Takes a second per hour of recordings.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np

from finetune.audio.files import read_audio, to_frames
from finetune.audio.speech import voice_activity
from finetune.audio.words import read_words
from finetune.data.manifest import read_manifest
from finetune.data.voice_supply import choose_all, voice_source
from finetune.prompts.same_speaker import find_segments

SPOILED = {  # {name: what becomes of the words}
    "words as they are": lambda words: words,
    "every second word": lambda words: words[::2],
    "every fifth word": lambda words: words[::5],
    "words 3 s late": lambda words: [(text, start + 3, end + 3) for text, start, end in words],
    "no words": lambda words: [],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--window", type=float, default=10.0, help="seconds")
    parser.add_argument("--reserve", type=float, default=0.0, help="prompt.reserve_sec")
    parser.add_argument("--files", type=int, help="the first N; all if absent")
    args = parser.parse_args()
    lines = list(itertools.islice(read_manifest(args.manifest, problems=[]), args.files))
    for name, spoil in SPOILED.items():
        without = windows = 0
        speech = []  # seconds of it in each voice
        for line in lines:
            spans = find_segments(line.path, spoil(read_words(line.words_path)[0]))
            choices = choose_all(voice_source(line, 0, spans), to_frames(args.window), args.reserve)
            windows, without = windows + len(choices), without + choices.count(None)
            for start, end in (spans[choice.segment] for choice in choices if choice):
                heard = voice_activity(read_audio(line.path, start, end - start, channel=0)[0])
                speech.append(heard.sum() / 12.5)
        found = f"mean {np.mean(speech):.1f} s, least {min(speech):.1f} s" if speech else "none"
        print(f"{name:<20}{without:>5} of {windows} windows without a voice; speech in the others: {found}")


if __name__ == "__main__":
    main()
