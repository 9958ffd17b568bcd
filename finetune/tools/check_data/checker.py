"""Check one line of a manifest and the files behind it: codes, audio, duration, words and prompts."""

import functools
import hashlib
import math
import os
from collections.abc import Sequence

import numpy as np

from finetune.args import TrainArgs
from finetune.audio.agreement import find_disagreements, measure_agreement
from finetune.audio.files import probe_audio, to_frames
from finetune.audio.stream import HEADER_TOLERANCE_SEC, decodable_sec
from finetune.audio.words import Word
from finetune.cli import UserError
from finetune.data.interleaver import load_dialogue_codes
from finetune.files import why_missing
from finetune.model.pretrained import Pretrained
from finetune.tools.check_data.findings import FileFacts
from finetune.tools.check_data.prompt_checks import PromptChecker
from finetune.tools.check_data.talk import LEVEL_SEC, StereoSound, hear_stereo, response_gaps
from finetune.tools.check_data.text_checks import TextChecker

UNUSED_SEC = 1.0  # audio after the manifest's duration that may go unused
QUIET_DB = -60.0  # dBFS; a channel that is never louder is silent
CLIPPED_SHARE = 1e-4  # of the samples of a channel


class Checker:
    """Checks lines of manifests one at a time.

    Args:
        kwargs: of LMModel.
        prompts: whether windows begin with a system prompt.
        share_sec: how much of each file is decoded.
    """

    def __init__(self, args: TrainArgs, checkpoint: Pretrained, kwargs: dict, prompts: bool, share_sec: float):
        self.checkpoint, self.dep_q, self.share_sec = checkpoint, kwargs["dep_q"], share_sec
        self.window_frames = to_frames(args.duration_sec)
        data = args.data
        self.text = TextChecker(checkpoint.tokenizer(), data, self.window_frames)
        self.prompts = PromptChecker(args, checkpoint, kwargs, self.window_frames) if prompts else None

    @functools.cached_property
    def mimi(self) -> str | None:
        """Fingerprint of the codec; None where it cannot be loaded, which training will report."""
        try:
            return self.checkpoint.mimi_fingerprint(self.dep_q)
        except UserError:
            return None

    def __call__(self, facts: FileFacts) -> FileFacts:
        """Return the facts about a line, with all that the check finds out."""
        entry = self._load_codes(facts)
        sound = check_audio(facts, entry is not None, self.share_sec)
        words, extra = self.text.read(facts)
        if facts.real_sec is not None:
            frames = to_frames(facts.real_sec) if entry is None else entry["codes"].shape[2]
            self._check_duration(facts, frames)
            if words is not None:
                starts = (i * self.window_frames for i in range(len(facts.windows)))
                facts.windows = [max(0, min(self.window_frames, frames - start)) for start in starts]
                self.text.check(facts, words, frames)
        if sound is not None and words is not None:
            check_agreement(sound, words, facts)
        if self.prompts is not None:
            self.prompts.check(facts, extra, words or [], entry)
        return facts

    def _load_codes(self, facts: FileFacts) -> dict | None:
        """Return the pre-computed codes; None if the line names none or they cannot be used."""
        if "codes_path" not in facts.line.fields:
            return None
        try:
            entry = load_dialogue_codes(facts.line, self.mimi)
        except UserError as error:
            facts.add("codes", str(error))
            return None
        facts.real_sec, facts.mimi = entry["duration"], entry["mimi"]
        facts.digest = hashlib.sha256(entry["codes"].numpy().tobytes()).hexdigest()
        return entry

    def _check_duration(self, facts: FileFacts, frames: int) -> None:
        stated, duration = len(facts.windows), facts.line.duration
        real = math.ceil(frames / self.window_frames)
        tail = facts.real_sec - duration
        numbers = f"the manifest says {duration:.2f} s, it holds {facts.real_sec:.2f} s"
        if real < stated:
            facts.add("duration", f"{numbers}: {stated - real} of its {stated} windows do not exist and are skipped")
        elif real > stated and tail > UNUSED_SEC:
            facts.add("duration", f"{numbers}: the last {tail:.1f} s are never trained on")
        elif abs(tail) > HEADER_TOLERANCE_SEC:
            facts.add("off", numbers)


def check_audio(facts: FileFacts, has_codes: bool, share_sec: float) -> StereoSound | None:
    """Return up to `share_sec` of the audio, or None if it cannot be used; with codes it need not be there."""
    path = facts.line.path
    if not os.path.exists(path):
        facts.add("codes only" if has_codes else "missing", why_missing(path))
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
    if sound.samples:
        facts.decoded_sec = int(sound.decoded.sum()) * LEVEL_SEC
        _check_levels(sound, facts)
        speech = sound.speech()
        agent, user = np.concatenate(speech, axis=1)
        facts.talk_sec = tuple(int(active.sum()) * LEVEL_SEC for active in (agent, user, agent & user))
        facts.gaps = [gap for active in speech for gap in response_gaps(active)]
    return sound


def _check_levels(sound: StereoSound, facts: FileFacts) -> None:
    whole = facts.decoded_sec >= (facts.real_sec or 0) - 1
    scope = "" if whole else f" in the {facts.decoded_sec:.0f} s that were decoded"
    levels = sound.levels[:, sound.decoded]
    silent = levels.max(axis=1) < QUIET_DB
    for i, name in enumerate(("agent", "user")):
        if silent[i]:
            facts.add(f"silent {name}", f"nothing over {QUIET_DB:g} dB{scope}")
        elif sound.clipped[i] > CLIPPED_SHARE * sound.samples:
            facts.add("clipping", f"{sound.clipped[i] / sound.samples:.2%} of the {name}'s samples{scope}")
    if not silent.any() and sound.shared:
        facts.add("same channels" if sound.shared.is_one_recording else "bleeding", f"{sound.shared}{scope}")
    if not silent.all():
        facts.digest = hashlib.sha256(levels.tobytes()).hexdigest()


def check_agreement(sound: StereoSound, words: Sequence[Word], facts: FileFacts) -> None:
    """Find out whether the agent's words are where the agent speaks."""
    facts.agreement = measure_agreement(sound.levels, LEVEL_SEC, words)
    if words:
        for kind, detail in find_disagreements(facts.agreement):
            facts.add(kind, detail)
