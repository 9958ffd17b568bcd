"""Synthetic stereo dialogues with word times and prompts."""

import json
from pathlib import Path

import numpy as np

from finetune.audio.files import FRAME_RATE, to_int16, write_wav
from finetune.audio.words import sidecar
from finetune.files import replacing
from finetune.progress import track
from finetune.tools.toy.language import (
    AGENT_VOICES,
    NEUTRAL_WORDS,
    QUESTIONS,
    ROLES,
    USER_VOICES,
    VOICES,
    expected_reply,
    greeting,
    is_held_out,
    text_prompt,
)
from finetune.tools.toy.sound import NOISE_RMS, Utterance, speak

_EVAL_SHARE = 0.1  # of the hours, on top of them
_VOICE_PROMPT_FRAMES = 42  # at least, 3.4 s


def _write_dialogue(path: Path, rng: np.random.Generator, role: str, voice: str) -> float:
    """One wav and its .json. The agent greets; the user asks one to four questions, each answered after 0.2 to 0.6 s.

    Returns seconds.
    """
    user_voice = str(rng.choice(list(USER_VOICES)))
    agent = [Utterance(greeting(role), VOICES[voice], int(rng.integers(2, 7)))]
    user, turns = [], []
    for question in rng.permutation(list(QUESTIONS))[: rng.integers(1, 5)]:
        user.append(Utterance(QUESTIONS[question], VOICES[user_voice], agent[-1].stop + int(rng.integers(5, 13))))
        asked, reply = user[-1].stop, expected_reply(role, question)
        turns.append({"question": str(question), "asked_sec": asked / FRAME_RATE, "reply": reply})
        agent.append(Utterance(reply, VOICES[voice], asked + int(rng.integers(3, 8))))
    frames = max(75, agent[-1].stop + int(rng.integers(6, 15)))

    wav = np.stack([speak(agent, frames), speak(user, frames)])
    wav += rng.standard_normal(wav.shape, dtype=np.float32) * np.float32(rng.uniform(*NOISE_RMS))
    write_wav(path, to_int16(wav))
    sides = (("SPEAKER_MAIN", agent), ("SPEAKER_USER", user))
    spans = sorted((first, stop, word, who) for who, side in sides for u in side for word, first, stop in u.spans())
    about = {
        "alignments": [[word, [first / FRAME_RATE, stop / FRAME_RATE], who] for first, stop, word, who in spans],
        "text_prompt": text_prompt(role),
        "voice_prompt": f"{voice}.wav",
        "role": role,
        "voice": voice,
        "user_voice": user_voice,
        "turns": turns,
    }
    sidecar(path).write_text(json.dumps(about) + "\n")
    return frames / FRAME_RATE


def _write_split(folder: Path, name: str, hours: float, pairs: list[tuple[str, str]], rng: np.random.Generator) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    lines: list[dict] = []
    total = 0.0
    with track(f"dialogues of {name}.jsonl", hours * 3600) as advance:
        while total < hours * 3600 or len(lines) < 2:
            role, voice = pairs[len(lines) % len(pairs)]
            path = f"{name}/{len(lines):05d}.wav"
            lines.append({"path": path, "duration": _write_dialogue(folder / path, rng, role, voice)})
            if name == "eval":
                lines[-1]["held_out"] = is_held_out(role, voice)
            total += lines[-1]["duration"]
            advance(lines[-1]["duration"])
    # The manifest last: where it is, the files are.
    with replacing(folder / f"{name}.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_corpus(folder: Path, hours: float = 0.5, seed: int = 0) -> None:
    """Writes `hours` of training dialogues, a tenth of that for evaluation and the voice prompts.

    train.jsonl has all pairs of role and voice except those held out, evenly; eval.jsonl has held-out pairs and seen
    pairs in turn, `is_held_out` says which. Left channel: agent; right: user.
    """
    rng = np.random.default_rng(seed)
    pairs = [(role, voice) for role in ROLES for voice in AGENT_VOICES]
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    seen = [pair for pair in pairs if not is_held_out(*pair)]
    unseen = [pair for pair in pairs if is_held_out(*pair)]
    _write_split(folder, "train", hours, seen, rng)
    in_turn = [pair for i in range(len(seen)) for pair in (unseen[i % len(unseen)], seen[i])]
    _write_split(folder, "eval", hours * _EVAL_SHARE, in_turn, rng)
    (folder / "voices").mkdir(exist_ok=True)
    for name, voice in AGENT_VOICES.items():
        utterance = Utterance((), voice, 1)
        while utterance.stop < _VOICE_PROMPT_FRAMES:
            utterance = utterance._replace(words=(*utterance.words, str(rng.choice(NEUTRAL_WORDS))))
        wav = speak([utterance], utterance.stop + 1)[None]
        wav += rng.standard_normal(wav.shape, dtype=np.float32) * np.float32(NOISE_RMS[0])
        write_wav(folder / "voices" / f"{name}.wav", to_int16(wav))
