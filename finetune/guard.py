"""Whether free-running replies are still those of a conversation, and which checkpoint of a run is the best.

The first evaluation of a run (of the base) measures the replies of the base and the recorded agent alike. Later replies
may be like either, and as far outside of both as BOUNDS says: training moves them from one to the other. The
bounds are wide, because a few replies scatter: 20 sound runs stayed within them (benchmarks/guard.py; NOTES.md)."""

from pathlib import Path
from typing import NamedTuple

from finetune.args import TrainArgs
from finetune.metrics import read_rows
from finetune.run_dir import list_checkpoints

MIN_TURNS = 8  # fewer turns of the users say nothing about how many are taken


class Bound(NamedTuple):
    """A limit: `factor` times the reference, plus `offset`."""

    factor: float
    offset: float

    def of(self, reference: float) -> float:
        return self.factor * reference + self.offset


# How far a measure of finetune.dialogue may go (below the lower, above the higher of both references); None: any way.
BOUNDS: dict[str, tuple[Bound | None, Bound | None]] = {
    "silence": (Bound(1, -0.3), Bound(1, 0.3)),
    "words_per_minute": (Bound(0.4, 0), Bound(2, 10)),
    "padding": (Bound(1, -0.2), Bound(1, 0.2)),
    "repetition": (None, Bound(1, 0.25)),
    "looping": (None, Bound(1, 0.3)),
    "tor_turn": (Bound(1, -0.5), None),
    "overlap": (None, Bound(1, 0.3)),
    "treble": (None, Bound(3, 0.02)),
    "flatness": (None, Bound(2, 0.02)),
}
NAMES = {
    "silence": "share of silence", "words_per_minute": "words a minute", "padding": "share of padding in the text",
    "repetition": "share of text in one repeated phrase", "looping": "share of replies that loop",
    "tor_turn": "share of turns taken", "overlap": "share of time in which both speak",
    "treble": "share of energy above 6 kHz", "flatness": "spectral flatness",
}  # fmt: skip


class Violation(NamedTuple):
    measure: str
    value: float
    lowest: float | None  # allowed
    highest: float | None

    def __str__(self) -> str:
        allowed = " to ".join(f"{bound:.3g}" for bound in (self.lowest, self.highest) if bound is not None)
        limit = "" if None not in (self.lowest, self.highest) else "at least " if self.highest is None else "at most "
        return f"{NAMES[self.measure]} {self.value:.3g} (allowed {limit}{allowed})"


def find_violations(row: dict, reference: dict) -> list[Violation]:
    """Return the measures of an evaluation (`free_*`) that are out of bounds; `reference`: that of the base, with the
    measures of the recorded agents as `data_*`. Measures that are missing on any side are not judged."""
    out = []
    for measure, (below, above) in BOUNDS.items():
        value = row.get(f"free_{measure}")
        known = [v for v in (reference.get(f"free_{measure}"), reference.get(f"data_{measure}")) if v is not None]
        if value is None or not known or (measure == "tor_turn" and (row.get("free_turns") or 0) < MIN_TURNS):
            continue
        lowest, highest = below and below.of(min(known)), above and above.of(max(known))
        if (lowest is not None and value < lowest) or (highest is not None and value > highest):
            out.append(Violation(measure, value, lowest, highest))
    return out


class Score(NamedTuple):
    """How good an evaluation is; lower is better: replies out of bounds first, then the held-out loss."""

    violations: int
    loss: float

    @classmethod
    def of(cls, row: dict) -> "Score":
        return cls(len(row.get("violations", ())), row["loss"] if row.get("loss") is not None else float("inf"))


def best_checkpoint(folder: Path) -> tuple[int, Path, str] | None:
    """Return (step, folder, reason in words) of the checkpoint of a run with the best evaluation; None if no checkpoint
    was evaluated. Derived from the record alone, so that it holds after kills and copies too."""
    checkpoints = dict(list_checkpoints(folder))
    rows = [row for row in read_rows(folder / "metrics.eval.jsonl") if row["step"] in checkpoints and row["step"]]
    if not rows:
        return None
    best = min(rows, key=Score.of)
    score = Score.of(best)
    replies = f", {score.violations} measures of its replies out of bounds" if score.violations else ""
    what = f"held-out loss {score.loss:.4f}{replies}, the best of {len(rows)} evaluated checkpoints"
    return best["step"], checkpoints[best["step"]], what


def reference_row(folder: Path) -> dict | None:
    """The row of a run's first evaluation, which also measured the recorded agents; None if there is none yet."""
    rows = read_rows(folder / "metrics.eval.jsonl")
    return next((row for row in rows if any(key.startswith("data_") for key in row)), None)


class Decision(NamedTuple):
    """What should happen after an evaluation; by default the run goes on."""

    reason: str = ""
    is_failure: bool = False
    back_to: Path | None = None  # the checkpoint to go back to

    @property
    def ends(self) -> bool:
        return bool(self.reason) and self.back_to is None


def decide(folder: Path, step: int, args: TrainArgs, rollbacks: int) -> Decision:
    """Judge the evaluation of a step, if the record holds one.

    Replies are out of bounds for good if two measures are at once, or one in this evaluation and any in the one before.
    """
    rows = [row for row in read_rows(folder / "metrics.eval.jsonl") if row["step"] <= step]
    if not rows or rows[-1]["step"] != step or not step:
        return Decision()
    action, reference = args.guard.action, reference_row(folder) or {}
    found = find_violations(rows[-1], reference)
    before = len(rows) > 1 and bool(find_violations(rows[-2], reference))
    if action in ("stop", "rollback") and found and (len(found) > 1 or before):
        sound = [row["step"] for row in rows if not find_violations(row, reference)]
        good = [own for own in list_checkpoints(folder) if sound and own[0] <= sound[-1]]
        what = f"replies at step {step} have left the bounds: {'; '.join(map(str, found))}"
        kept = f"{good[-1][1]} is good" if good else "no checkpoint before it was kept"
        if action == "rollback" and good and rollbacks < args.guard.max_rollbacks:
            return Decision(what, back_to=good[-1][1])
        times = f" after {rollbacks} rollbacks" if rollbacks else ""
        hint = "look at samples/, lower optim.lr in another run_dir, or go on with guard.action=warn"
        return Decision(f"{what}{times}; {kept}; {hint}", is_failure=True)
    trained = [row for row in rows if row["step"]]
    best = min(range(len(trained)), key=lambda i: Score.of(trained[i]))
    if args.early_stop is not None and len(trained) - 1 - best >= args.early_stop:
        good = trained[best]["step"]
        return Decision(f"no better evaluation than that of step {good} in the last {args.early_stop} (early_stop)")
    return Decision()
