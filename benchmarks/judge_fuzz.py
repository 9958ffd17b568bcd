"""Compares finetune.tools.judge with the scripts of Full-Duplex-Bench v1, on their examples and on random word lists.

    git clone https://github.com/DanielLin94144/Full-Duplex-Bench && git -C Full-Duplex-Bench checkout d7336bd
    python -m benchmarks.judge_fuzz Full-Duplex-Bench [--lists 10000]

The scripts run unchanged, on one item at a time. Replaced are silero-vad, which returns random segments of speech, and
the language model that rates contents. The times of words and speech lie on grids, so that they meet the limits of the
rules exactly. Lists for which a script fails with an exception are left out and counted.
"""

import ast
import contextlib
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from finetune.cli import UserError, run
from finetune.files import expand
from finetune.parser import Parser
from finetune.tools.judge.clips import judge_clip, read_clip
from finetune.tools.judge.replies import read_agent_words

EXAMPLES = ("pause_handling_example", "smooth_turn_taking_example", "user_interruption_example")
ANSWER = "Analysis: none.\nI would rate the AI's response as 3"


def random_words(rng: random.Random, segments: list[list[float]]) -> list[dict]:
    """Return word chunks as in output.json, mostly in order, with ends that are rarely unknown or before the start."""
    step = rng.choice([0.01, 0.08, 0.1, 0.25])
    edges = [time for segment in segments for time in segment]
    time, chunks = rng.randrange(60) * step, []
    for _ in range(rng.choice([0, 1, 2, 3, 3, 4, 4, 5, 8])):
        start = rng.choice(edges) if edges and rng.random() < 0.3 else time
        end = rng.choice(edges) if edges and rng.random() < 0.3 else start + rng.randrange(1 if start else 0, 30) * step
        end = None if rng.random() < 0.05 else end if end >= start or rng.random() < 0.1 else start
        chunks.append({"text": " w", "timestamp": [start, end]})
        time += rng.randrange(8) * step
    if rng.random() < 0.1:
        rng.shuffle(chunks)
    return chunks


def random_segments(rng: random.Random) -> list[list[float]]:
    time, segments = 0.0, []
    for _ in range(rng.choice([0, 1, 1, 2, 3, 5])):
        start = round(time + rng.randrange(40) / 10, 1)
        length = rng.choice([rng.randrange(1, 12) / 10, 1.0, 3.0, rng.randrange(1, 45) / 10])
        time = round(start + length, 1)
        segments.append([start, time])
    return segments


class Scripts:
    """The scripts of a clone, each called on the folder of one item."""

    def __init__(self, clone: Path):
        folder = clone / "v1_v1.5/evaluation"
        if not (folder / "eval_backchannel.py").is_file():
            raise UserError(f"{clone}: no clone of Full-Duplex-Bench (it has no v1_v1.5/evaluation)")
        self.segments: list[list[float]] = []  # what the detector finds
        self.samples = 16_000
        sys.modules["silero_vad"] = types.SimpleNamespace(
            load_silero_vad=lambda: None,
            get_speech_timestamps=lambda *_, **__: [{"start": a, "end": b} for a, b in self.segments],
        )
        sys.modules["torchaudio"] = types.SimpleNamespace(load=lambda _: (np.zeros((1, self.samples)), 16_000))
        message = types.SimpleNamespace(message=types.SimpleNamespace(content=ANSWER))
        create = lambda **_: types.SimpleNamespace(choices=[message])
        completions = types.SimpleNamespace(completions=types.SimpleNamespace(create=create))
        self._client = types.SimpleNamespace(chat=completions)
        sys.path.insert(0, str(folder))
        os.chdir(folder)  # where eval_backchannel.py looks for the timing of people

    def call(self, script: str, root: Path, *more: object) -> str:
        """Return what a script prints. A division by zero is that of a mean over nothing, after all has been said."""
        out = io.StringIO()
        function = getattr(__import__(f"eval_{script}"), f"eval_{script}")
        silent = contextlib.redirect_stderr(io.StringIO())  # bars of progress
        with silent, contextlib.redirect_stdout(out), contextlib.suppress(ZeroDivisionError):
            function(str(root), *more)
        return out.getvalue()

    def pause(self, root: Path) -> dict:
        return {"taken": "turn:  1" in self.call("pause_handling", root)}

    def turn(self, root: Path) -> dict:
        said = self.call("smooth_turn_taking", root)
        latency = ast.literal_eval(re.search(r"the latency is (.*)", said)[1])
        return {"taken": "the TOR is 1" in said, "latency": None if latency is None else max(0, latency)}

    def interruption(self, root: Path) -> dict:
        """Of a mean over nothing the script prints nothing: an item with latency 0 is added for this one script."""
        item = next(root.iterdir())
        (root / "other").mkdir()
        event = json.loads((item / "interrupt.json").read_bytes())[0]["timestamp"][1]
        chunks = [{"text": "w", "timestamp": [event, event + 2]}]
        (root / "other/interrupt.json").write_bytes((item / "interrupt.json").read_bytes())
        (root / "other/output.json").write_text(json.dumps({"text": "w", "chunks": chunks}))
        said = self.call("user_interruption", root, self._client)
        taken = float(re.search(r"Average take turn:  (.*)", said)[1]) == 1.0
        return {"taken": taken, "latency": 2 * float(re.search(r"Average latency:  (.*)", said)[1]) if taken else None}

    def backchannel(self, root: Path) -> dict:
        said = self.call("backchannel", root)
        found = ast.literal_eval(re.search(r"backchannel prediction is (.*)", said)[1])
        seconds = self.samples / 16_000
        return {
            "taken": "TOR - Mean: 1" in said, "frequency": len(found) / seconds,
            "divergence": float(re.findall(r"JSD: (\S+)", said)[0]),
        }  # fmt: skip


def write_item(root: Path, name: str, chunks: list[dict], annotation: str | None, times: list[float]) -> Path:
    item = root / name
    item.mkdir(parents=True)
    (item / "output.json").write_text(json.dumps({"text": "w", "chunks": chunks}))
    (item / "output.wav").touch()
    if annotation:
        content = [{"timestamp": times, "interrupt": "", "context": ""}]
        (item / annotation).write_text(json.dumps(content))
    return item


def differs(ours: dict, theirs: dict) -> bool:
    close = lambda a, b: a == b or (None not in (a, b) and abs(a - b) < 1e-9)
    return not all(close(ours[key], value) for key, value in theirs.items())


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("clone", type=expand, help="folder of Full-Duplex-Bench")
    parser.add_argument("--lists", type=int, default=10_000, help="random word lists for each rule")
    args = parser.parse_args()
    scripts = Scripts(args.clone.absolute())
    human = json.loads(Path("icc_gt_distribution.json").read_bytes())
    rng = random.Random(0)
    rules: dict[str, tuple[str | None, Callable]] = {
        "pause": ("pause.json", scripts.pause), "turn": ("turn_taking.json", scripts.turn),
        "interruption": ("interrupt.json", scripts.interruption), "backchannel": (None, scripts.backchannel),
    }  # fmt: skip
    different = 0
    for rule, (annotation, official) in rules.items():
        outcomes: Counter[str] = Counter()
        for _ in range(args.lists):
            segments = random_segments(rng) if rule == "backchannel" else []
            chunks = random_words(rng, segments)
            event = rng.choice([0.0, 1.0, rng.randrange(60) * 0.08])
            times = [event, event + 0.4]
            if rule == "interruption":  # its event is the end; speech is recognised from there on
                times = [event - 0.4, event]
                chunks = [chunk for chunk in chunks if chunk["timestamp"][0] >= event]
            ends = max((end for _, end in segments), default=0)
            scripts.segments = segments
            scripts.samples = max(int(ends * 16_000), rng.randrange(8, 60) * 8_000) + rng.choice([0, 37])
            with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
                name = rng.choice(sorted(human))
                item = write_item(Path(folder), name, chunks, annotation, times)
                try:
                    theirs = official(Path(folder))
                except TypeError:  # an unknown end, which only two of the scripts expect
                    outcomes["script failed"] += 1
                    continue
                clip = read_clip(item, scripts.samples / 16_000)
                words, _, _ = read_agent_words(item / "output.json")
                ours = judge_clip(clip, words, segments, human[name])
            outcomes["taken" if theirs["taken"] else "not taken"] += 1
            if differs(ours, theirs):
                different += 1
                print(f"{rule}: {chunks} {segments} event {event}: ours {ours}, theirs {theirs}")
        print(f"{rule}: {args.lists} lists, {dict(outcomes)}")
    for rule, example in zip(rules, EXAMPLES):
        with tempfile.TemporaryDirectory() as folder:
            item = Path(folder, "1")
            item.mkdir()
            for file in Path("example_data", example, "1").glob("*.json"):
                shutil.copy(file, item)
            theirs = rules[rule][1](Path(folder))
            words, _, _ = read_agent_words(item / "output.json")
            ours = judge_clip(read_clip(item, 30.0), words, [])
        different += differs(ours, theirs)
        print(f"{example}: ours {ours}, theirs {theirs}")
    print(f"different: {different}")
    return int(different > 0)


if __name__ == "__main__":
    run(main)
