"""Check one line of a manifest and the files behind it."""

import functools
import math

from finetune.args import TrainArgs
from finetune.audio.codes import fingerprint_file
from finetune.audio.files import HEADER_TOLERANCE_SEC, to_frames
from finetune.cli import UserError
from finetune.data.batch import TextStats
from finetune.model.pretrained import Pretrained
from finetune.tools.check_data.audio_checks import check_audio, check_codes_of, check_sides
from finetune.tools.check_data.facts import FileFacts
from finetune.tools.check_data.kinds import UNREADABLE
from finetune.tools.check_data.prompt_checks import PromptChecker
from finetune.tools.check_data.text_checks import TextChecker

UNUSED_SEC = 1.0  # audio after the manifest's duration that may go unused


class Checker:
    """Checks lines of manifests one at a time; whatever happens becomes a problem of the line.

    Args:
        kwargs: of LMModel.
        prompts: whether windows begin with a system prompt.
        share_sec: how much of each file is decoded.
    """

    def __init__(self, args: TrainArgs, checkpoint: Pretrained, kwargs: dict, prompts: bool, share_sec: float):
        self.checkpoint, self.share_sec = checkpoint, share_sec
        self.window_frames = to_frames(args.duration_sec)
        data = args.data
        self.text = TextChecker(checkpoint.tokenizer(), data.keep_and_shift, data.speakers, self.window_frames)
        self.prompts = PromptChecker(args, checkpoint, kwargs, self.window_frames) if prompts else None

    @functools.cached_property
    def mimi(self) -> str | None:
        """Fingerprint of the codec; None where it cannot be loaded, which training will report."""
        try:
            return fingerprint_file(self.checkpoint.mimi_weights())
        except UserError:
            return None

    def __call__(self, facts: FileFacts) -> FileFacts:
        """Return the facts about a line, with all that the check finds out."""
        try:
            self._check(facts)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic inside the decoder is not an Exception
            facts.add("failed", f"{type(error).__name__}: {error}")
        if facts.has(*UNREADABLE):
            facts.windows, facts.text = [0] * len(facts.windows), TextStats()
        return facts

    def _check(self, facts: FileFacts) -> None:
        entry = check_codes_of(facts, self.mimi if "codes_path" in facts.line.fields else None)
        sound = check_audio(facts, entry is not None, self.share_sec)
        words, extra = self.text.read(facts)
        if facts.real_sec is not None:
            frames = to_frames(facts.real_sec) if entry is None else entry["codes"].shape[2]
            self._check_duration(facts, frames)
            if words is not None:
                starts = (i * self.window_frames for i in range(len(facts.windows)))
                facts.windows = [max(0, min(self.window_frames, frames - start)) for start in starts]
                self.text.check(facts, words, frames)
        if sound is not None and words:
            check_sides(sound, words, facts)
        if self.prompts is not None:
            self.prompts.check(facts, extra, words or [], entry)

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
