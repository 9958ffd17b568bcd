"""What the check of one file finds out."""

import os
from dataclasses import InitVar, dataclass, field

from finetune.data.batch import TextStats
from finetune.data.manifest import Line
from finetune.data.windows import count_windows
from finetune.tools.check_data.kinds import Problem


@dataclass
class FileFacts:
    """What is known about one line of a manifest; times in seconds. "Words" and "tokens" are the agent's."""

    held_out: bool
    source: int  # index of the manifest within train_data or eval_data
    line: Line
    window_frames: InitVar[int]
    problems: list[Problem] = field(default_factory=list)
    real_sec: float | None = None  # can be decoded; None: nothing can
    windows: list[int] = field(init=False)  # frames of dialogue of each; 0: training would skip it
    prompt_frames: list[int] = field(init=False)  # of each window
    words: int = 0
    tokens: int = 0
    labels: set[str] = field(default_factory=set)  # of all speakers
    text: TextStats = field(default_factory=TextStats)  # over the windows
    densest: float = 0.0  # tokens per second in the window with most of them
    decoded_sec: float = 0.0  # of the audio that was checked
    talk_sec: tuple[float, float, float] = (0.0, 0.0, 0.0)  # agent, user, both at once
    gaps: list[float] = field(default_factory=list)  # see response_gaps
    digest: str | None = None  # of the checked audio: equal for equal sound in any container
    mimi: str | None = None  # fingerprint of the codec that made the codes
    prompt: str | None = None
    voice: str | None = None

    def __post_init__(self, window_frames: int):
        self.windows = [0] * count_windows(self.line.duration, window_frames)
        self.prompt_frames = list(self.windows)

    @property
    def place(self) -> str:
        return f"{self.line.manifest}:{self.line.number}"

    def add(self, kind: str, detail: str) -> None:
        """Add a problem, with the name of the file in front unless the sentence has it."""
        if os.path.splitext(self.line.path)[0] not in detail:
            detail = f"{self.line.path}: {detail}"
        self.problems.append(Problem(kind, self.place, " ".join(detail.split())))

    def has(self, *kinds: str) -> bool:
        return any(problem.kind in kinds for problem in self.problems)
