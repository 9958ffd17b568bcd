"""Which faults of word times and channels check_data finds, in data that this script makes and then spoils.

    python -m benchmarks.data_faults [--files 100] [--speech call.wav]

Clean data are dialogues of the tiny world, dialogues of espeak-ng if it is installed, and dialogues from --speech: a
wav with one speaker in its first channel and the words in the .json next to it, as annotate.py writes them. The latter
two have what real calls have: errors in the word times, words that were not transcribed, turns that overlap, noise, and
an echo of the other side (-30 dB at most; from -28 dB on it is reported as bleeding). A file that a fault leaves as it
was does not count. A fault is found if check_data gives it its own name.
"""

import itertools
import json
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from finetune.audio.files import read_audio, to_int16, write_wav
from finetune.audio.words import MAIN_SPEAKER, Word, read_words, sidecar
from finetune.cli import run
from finetune.config import load_args
from finetune.parser import Parser
from finetune.tools.check_data.corpus import check_run
from finetune.tools.toy.corpus import make_corpus
from finetune.tools.toy.model import make_model

RATE = 16_000
USER = "SPEAKER_USER"
SENTENCES = [
    "good morning this is the service desk how can i help you", "my order has not arrived yet",
    "i am sorry to hear that could you give me the number please", "yes of course it is four seven one nine",
    "thank you one moment please i am looking it up", "it was sent on monday and should be there by friday",
    "that is too late for me", "i understand we can send another one today with the fast delivery",
    "does that cost anything", "no it is free of charge because the first one was delayed", "all right then",
    "is there anything else that i can do for you", "what time do you close", "we are open until eight in the evening",
    "and on saturdays", "on saturdays from nine to two", "great thanks a lot", "you are welcome have a nice day",
    "wait i also wanted to ask about the invoice", "sure which invoice do you mean",
]  # fmt: skip
AGENTS, USERS = ("en-us", "en-gb+m3", "en-us+f2"), ("en-us+f4", "en-gb+m7", "en-gb+f5")


class Dialogue(NamedTuple):
    pcm: np.ndarray  # float32 [2, samples] at RATE
    agent: list[Word]
    user: list[Word]

    @property
    def seconds(self) -> float:
        return self.pcm.shape[1] / RATE


class Phrase(NamedTuple):
    pcm: np.ndarray  # float32 [samples] at RATE
    words: list[Word]  # from the start of the phrase on


# --- Clean data -------------------------------------------------------------------------------------------------------


def toy_dialogues(folder: Path, files: int) -> list[Dialogue]:
    make_corpus(folder, hours=files * 13 / 3600, seed=0)
    out = []
    for path in sorted((folder / "train").glob("*.wav"))[:files]:
        words, other = (read_words(sidecar(path), [speaker])[0] for speaker in (MAIN_SPEAKER, USER))
        out.append(Dialogue(read_audio(path, sample_rate=RATE), words, other))
    return out


@cache
def spoken_word(text: str, voice: str) -> np.ndarray:
    """float32 [samples]: a word by espeak-ng, without silence around it."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        subprocess.run(["espeak-ng", "-v", voice, "-s", "165", "-w", file.name, text], check=True)
        pcm = read_audio(file.name, sample_rate=RATE)[0]
    loud = np.flatnonzero(np.abs(pcm) > 0.01)
    return pcm[loud[0] : loud[-1] + 1]


def espeak_phrases(voices: Sequence[str]) -> dict[str, list[Phrase]]:
    """{voice: phrases}; between the words are up to 30 ms."""
    rng, out = np.random.default_rng(0), {}
    for voice in voices:
        out[voice] = []
        for sentence in SENTENCES:
            pieces, words, at = [], [], 0
            for text in sentence.split():
                pcm, gap = spoken_word(text, voice), int(rng.uniform(0, 0.03) * RATE)
                words.append((text, at / RATE, (at + len(pcm)) / RATE))
                pieces += [pcm, np.zeros(gap, np.float32)]
                at += len(pcm) + gap
            out[voice].append(Phrase(np.concatenate(pieces), words))
    return out


def recorded_phrases(path: Path) -> list[Phrase]:
    """Phrases of a recording: words with less than 0.3 s between them."""
    pcm, words = read_audio(path, sample_rate=RATE, channel=0)[0], read_words(sidecar(path))[0]
    groups: list[list[Word]] = []
    for word in words:
        if groups and word[1] - groups[-1][-1][2] < 0.3:
            groups[-1].append(word)
        else:
            groups.append([word])
    out = []
    for group in groups:
        start, end = max(0.0, group[0][1] - 0.1), group[-1][2] + 0.1
        own = [(text, s - start, e - start) for text, s, e in group]
        out.append(Phrase(pcm[int(start * RATE) : int(end * RATE)], own))
    return out


def make_dialogue(rng: np.random.Generator, agents: list[Phrase], users: list[Phrase]) -> Dialogue:
    """Turns of one to four phrases until 20 to 120 s are full; the other side begins up to 0.4 s early or 1 s late."""
    seconds = rng.uniform(20, 120)
    placed: list[list[tuple[float, Phrase]]] = [[], []]
    at, side = rng.uniform(0.3, 2.0), int(rng.integers(2))
    while at < seconds:
        for _ in range(rng.integers(1, 5)):
            phrase = (agents, users)[side][rng.integers(len((agents, users)[side]))]
            placed[side].append((at, phrase))
            at += len(phrase.pcm) / RATE + rng.uniform(0.15, 0.7)
        at += rng.uniform(-0.9, 0.5)
        side = 1 - side
    samples = int((at + 2) * RATE)
    pcm = np.zeros((2, samples), np.float32)
    words: list[list[Word]] = [[], []]
    for side in (0, 1):
        for at, phrase in placed[side]:
            first = int(at * RATE)
            pcm[side, first : first + len(phrase.pcm)] += phrase.pcm
            words[side] += [(text, at + s, at + e) for text, s, e in phrase.words]
        pcm[side] *= 10 ** (rng.uniform(-26, -16) / 20) / np.sqrt(np.square(pcm[side][pcm[side] != 0]).mean())
    if rng.random() < 0.5:  # an echo, 20 to 150 ms late
        lag, level = int(rng.uniform(0.02, 0.15) * RATE), 10 ** (rng.uniform(-45, -30) / 20)
        pcm[:, lag:] += level * pcm[::-1, : samples - lag].copy()
    pcm += rng.standard_normal(pcm.shape, dtype=np.float32) * np.float32(10 ** (rng.uniform(-75, -55) / 20))
    return Dialogue(pcm, *(transcribed(side, rng) for side in words))


def transcribed(words: list[Word], rng: np.random.Generator) -> list[Word]:
    """Words as a recogniser gives them: 3 % are missing, times are off by 0.06 s, ends reach up to the next word."""
    out = []
    for word, after in itertools.zip_longest(words, words[1:]):
        text, start, end = word
        if after is not None and 0 < after[1] - end < 0.3 and rng.random() < 0.4:
            end = after[1]
        start, end = start + rng.normal(0, 0.06), end + rng.normal(0, 0.06)
        if rng.random() >= 0.03:
            out.append((text, max(0.0, start), max(0.0, start + 0.02, end)))
    return out


# --- Faults -----------------------------------------------------------------------------------------------------------

Fault = Callable[[Dialogue, np.random.Generator], Dialogue | None]  # None: it does not change this dialogue


def shifted(seconds: float) -> Fault:
    """Words that are late or early by `seconds`. Words that would start before or after the file are lost."""

    def spoil(own: Dialogue, rng: np.random.Generator) -> Dialogue | None:
        by = seconds * rng.choice([-1, 1])
        moved = [(text, max(0.0, s + by), e + by) for text, s, e in own.agent if e + by > 0 and s + by < own.seconds]
        return own._replace(agent=moved) if 2 * len(moved) > len(own.agent) else None

    return spoil


def words_lost(share: float) -> Fault:
    def spoil(own: Dialogue, rng: np.random.Generator) -> Dialogue:
        kept = rng.permutation(len(own.agent))[: round(len(own.agent) * (1 - share))]
        return own._replace(agent=[own.agent[i] for i in sorted(kept)])

    return spoil


def turns_lost(share: float) -> Fault:
    """The last words are missing, as where the transcription broke off."""

    def spoil(own: Dialogue, rng: np.random.Generator) -> Dialogue:
        return own._replace(agent=own.agent[: round(len(own.agent) * (1 - share))])

    return spoil


def one_label(own: Dialogue, rng: np.random.Generator) -> Dialogue:
    return own._replace(agent=sorted(own.agent + own.user, key=lambda word: word[1]))


def sentences(own: Dialogue, rng: np.random.Generator) -> Dialogue:
    """Words with less than 0.3 s between them become one entry."""
    joined: list[Word] = []
    for word in own.agent:
        if joined and word[1] - joined[-1][2] < 0.3:
            joined[-1] = (f"{joined[-1][0]} {word[0]}", joined[-1][1], word[2])
        else:
            joined.append(word)
    return own._replace(agent=joined)


def swapped(share: float) -> Fault:
    """Channels swapped in a part of the call. Where that part has fewer than three of the agent's words: no fault."""

    def spoil(own: Dialogue, rng: np.random.Generator) -> Dialogue | None:
        length = share * own.seconds
        start = rng.uniform(0, own.seconds - length)
        if sum(start <= s and e <= start + length for _, s, e in own.agent) < 3:
            return None
        pcm, first, last = own.pcm.copy(), int(start * RATE), int((start + length) * RATE) + 1
        pcm[:, first:last] = pcm[::-1, first:last].copy()
        return own._replace(pcm=pcm)

    return spoil


FAULTS: dict[str, tuple[Fault, set[str]]] = {
    "none": (lambda own, rng: own, set()),
    **{f"words shifted by {s:g} s": (shifted(s), {"shifted"}) for s in (0.3, 0.5, 1.0, 2.0, 5.0)},
    "two thirds of the words missing": (words_lost(2 / 3), {"few words"}),
    "half of the words missing": (words_lost(0.5), {"few words"}),
    "a third of the words missing": (words_lost(1 / 3), {"few words"}),
    "no words in the second half": (turns_lost(0.5), {"few words"}),
    "no words in the last third": (turns_lost(1 / 3), {"few words"}),
    "one label for both speakers": (one_label, {"one label"}),
    "sentences as words": (sentences, {"sentences"}),
    "channels swapped for 20 % of the call": (swapped(0.2), {"part swapped", "swapped"}),
    "channels swapped for 50 % of the call": (swapped(0.5), {"part swapped", "swapped"}),
    "channels swapped": (swapped(1.0), {"swapped"}),
}


# --- Check ------------------------------------------------------------------------------------------------------------


def check(folder: Path, model: Path, dialogues: list[Dialogue]) -> list[list[str]]:
    """Return the kinds of findings in each dialogue."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    lines = []
    for i, own in enumerate(dialogues):
        path = folder / f"{i:04d}.wav"
        write_wav(path, to_int16(own.pcm), RATE)
        sides = ((MAIN_SPEAKER, own.agent), (USER, own.user))
        rows = [[text, [s, e], who] for who, side in sides for text, s, e in side]
        path.with_suffix(".json").write_text(json.dumps({"alignments": sorted(rows, key=lambda row: row[1][0])}))
        lines.append(json.dumps({"path": path.name, "duration": own.seconds}) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    settings = {"data": {"train_data": str(folder / "train.jsonl")}, "run_dir": str(folder / "run"),
                "moshi_paths": {"hf_repo_id": str(model)}, "duration_sec": 100, "lora": {"enable": True},
                "max_steps": 1}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    result = check_run(load_args(folder / "config.yaml", []), prompts=False, workers=0)
    return [[problem.kind for problem in own.problems] for own in result.facts]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--files", type=int, default=100, help="dialogues of each source")
    parser.add_argument("--speech", type=Path, help="wav of one speaker, with the .json of annotate.py next to it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = make_model(folder / "model", num_layers=1, depformer_num_layers=1)
        sources = {"tiny world": toy_dialogues(folder / "toy", args.files)}
        voices: list[tuple[str, list[Phrase], list[Phrase]]] = []
        if shutil.which("espeak-ng"):
            phrases = espeak_phrases(AGENTS + USERS)
            voices += [("espeak-ng", phrases[a], phrases[u]) for a in AGENTS for u in USERS]
        if args.speech:
            phrases = recorded_phrases(args.speech)
            voices += [("recording", phrases, phrases)]
        for name in dict.fromkeys(name for name, *_ in voices):
            pairs = [pair[1:] for pair in voices if pair[0] == name]
            rng = np.random.default_rng(1)
            sources[name] = [make_dialogue(rng, *pairs[i % len(pairs)]) for i in range(args.files)]
        print("| fault | " + " | ".join(sources) + " |\n|--" * 1 + "|--" * len(sources) + "|")
        for name, (spoil, expected) in FAULTS.items():
            cells = []
            for dialogues in sources.values():
                rng = np.random.default_rng(2)
                spoilt = [own for own in (spoil(own, rng) for own in dialogues) if own is not None]
                kinds = check(folder / "spoilt", model, spoilt)
                if not expected:
                    cells.append(f"{sum(map(bool, kinds))} of {len(kinds)} with a finding")
                else:
                    found = sum(bool(expected & set(own)) for own in kinds)
                    others = Counter(kind for own in kinds for kind in set(own) - expected).most_common()
                    noted = f" (also {', '.join(f'{n} x {kind}' for kind, n in others)})" if others else ""
                    cells.append(f"{found} of {len(kinds)} = {found / max(1, len(kinds)):.0%}{noted}")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run(main)
