"""Check the codes and the audio of a file: can they be read, and are agent and user where they should be?"""

import hashlib
import os
from collections.abc import Sequence

import numpy as np

from finetune.audio.files import SAME_SOUND, decodable_sec, probe_audio
from finetune.audio.words import Word
from finetune.cli import UserError
from finetune.data.interleaver import load_dialogue_codes
from finetune.tools.check_data.facts import FileFacts
from finetune.tools.check_data.talk import LEVEL_SEC, StereoSound, hear_stereo, louder_side, response_gaps

QUIET_DB = -60.0  # dBFS; a channel that is never louder is silent
CLIPPED_SHARE = 1e-4  # of the samples of a channel
BLEEDING = 0.7  # correlation of the channels; separate microphones give about 0, a stereo microphone 0.8 and more
SWAPPED_WORDS = 3  # the least number of words that must be louder on the right; and they must be a majority


def check_codes_of(facts: FileFacts, mimi: str | None) -> dict | None:
    """Return the pre-computed codes, or None if the line names none or they cannot be used.

    Args:
        mimi: fingerprint of the codec of the model; None: not checked.
    """
    if "codes_path" not in facts.line.fields:
        return None
    try:
        entry = load_dialogue_codes(facts.line, mimi)
    except UserError as error:
        facts.add("codes", str(error))
        return None
    facts.real_sec, facts.mimi = entry["duration"], entry["mimi"]
    facts.digest = hashlib.sha256(entry["codes"].numpy().tobytes()).hexdigest()
    return entry


def check_audio(facts: FileFacts, has_codes: bool, share_sec: float) -> StereoSound | None:
    """Return up to `share_sec` of the audio, or None if it cannot be used; with codes it need not be there."""
    path = facts.line.path
    if not os.path.exists(path):
        facts.add("codes only" if has_codes else "missing", "no such file")
        return None
    try:
        if not os.path.isfile(path):
            raise UserError(f"{path}: is not a file")
        info = probe_audio(path)
        real_sec = decodable_sec(path, info)
        if info.channels != 2:
            facts.add("channels", f"has {info.channels} channel(s)")
            return None
        sound = hear_stereo(path, info, real_sec, share_sec)
    except UserError as error:
        facts.add("codes only" if has_codes else "unreadable", str(error))
        return None
    if not has_codes:
        facts.real_sec = real_sec
    if sound.seconds:
        _check_levels(sound, facts)
        _measure_talk(sound, facts)
    return sound


def _check_levels(sound: StereoSound, facts: FileFacts) -> None:
    scope = "" if sound.seconds >= (facts.real_sec or 0) - 1 else f" in the {sound.seconds:.0f} s that were decoded"
    silent = sound.levels.max(axis=1) < QUIET_DB
    for i, name in enumerate(("agent", "user")):
        if silent[i]:
            facts.add(f"silent {name}", f"nothing over {QUIET_DB:g} dB{scope}")
        elif sound.clipped[i] > CLIPPED_SHARE * sound.samples:
            facts.add("clipping", f"{sound.clipped[i] / sound.samples:.2%} of the {name}'s samples{scope}")
    if not silent.any() and abs(sound.correlation) > BLEEDING:
        kind = "same channels" if sound.correlation > SAME_SOUND else "bleeding"
        facts.add(kind, f"correlation {sound.correlation:.2f}{scope}")
    if not silent.all():
        facts.digest = hashlib.sha256(sound.levels.tobytes()).hexdigest()


def _measure_talk(sound: StereoSound, facts: FileFacts) -> None:
    speech = sound.speech()  # bool [2, n] each
    agent, user = (np.concatenate([active[side] for active in speech]) for side in (0, 1))
    facts.decoded_sec = sound.seconds
    facts.talk_sec = tuple(int(active.sum()) * LEVEL_SEC for active in (agent, user, agent & user))
    facts.gaps = [gap for active in speech for gap in response_gaps(active)]


def check_sides(sound: StereoSound, words: Sequence[Word], facts: FileFacts) -> None:
    """Find out whether the agent's words are on the right."""
    decoded, _, right = louder_side(sound.parts, words)
    if right >= SWAPPED_WORDS and right > decoded / 2:
        facts.add("swapped", f"{right} of {decoded} of the agent's words are louder on the right")
