"""Compare annotate.py with two workers of one thread against one worker of one thread, over the same eight files.

    python -m benchmarks.annotate speech.wav whisper-tiny.en.pt

Whole runs are timed, with the start of the workers and the loading of the models, and they take turns. The files hold
one recording of speech in the left channel, shifted by a different time in each. Both runs must write the same words.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import sphn

from finetune.audio.files import SAMPLE_RATE, read_audio
from finetune.cli import UserError, run
from finetune.parser import Parser

ROOT = Path(__file__).parents[1]
FILES = 8


def make_files(folder: Path, speech: np.ndarray) -> Path:
    """A manifest of `FILES` stereo files."""
    lines = []
    for number in range(FILES):
        agent = np.roll(speech, number * SAMPLE_RATE)
        sphn.write_wav(str(folder / f"{number}.wav"), np.stack([agent, np.zeros_like(agent)]), SAMPLE_RATE)
        lines.append(f'{{"path": "{number}.wav", "duration": {len(speech) / SAMPLE_RATE}}}\n')
    manifest = folder / "egs.jsonl"
    manifest.write_text("".join(lines))
    return manifest


def annotate(manifest: Path, model: Path, workers: int) -> tuple[float, dict[str, str]]:
    """Seconds of a run that starts from nothing, and the files it wrote."""
    outputs = [manifest.parent / f"{number}.json" for number in range(FILES)]
    for output in outputs:
        output.unlink(missing_ok=True)
    command = [sys.executable, "annotate.py", manifest, "--whisper-model", model, "--device", "cpu"]
    started = time.monotonic()
    done = subprocess.run(
        [*command, "--num-workers", str(workers), "--strict"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    seconds = time.monotonic() - started
    if done.returncode:
        raise UserError(f"annotate.py failed: {done.stderr.splitlines()[-1]}")
    return seconds, {output.name: output.read_text() for output in outputs}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("speech", type=Path, metavar="SPEECH", help="recording with speech in its first channel")
    parser.add_argument("model", type=Path, metavar="WHISPER", help=".pt file of a Whisper model")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, taken in turns")
    args = parser.parse_args()
    speech = read_audio(args.speech, channel=0)[0]
    print(f"{len(os.sched_getaffinity(0))} cores, load average {os.getloadavg()[0]:.2f} before (idle: under 0.3)")
    times: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        manifest = make_files(Path(folder), speech)
        written = []
        for _ in range(args.repeats):
            for workers in times:
                seconds, files = annotate(manifest, args.model.resolve(), workers)
                times[workers].append(seconds)
                written.append(files)
    hours = FILES * len(speech) / SAMPLE_RATE / 3600
    print("| workers | seconds | x real time |\n|--|--|--|")
    for workers, seconds in times.items():
        middle = statistics.median(seconds)
        print(f"| {workers} | {', '.join(f'{s:.1f}' for s in seconds)} | {3600 * hours / middle:.1f} |")
    print(f"ratio of the medians: {statistics.median(times[1]) / statistics.median(times[2]):.2f}")
    print(f"the same files: {all(files == written[0] for files in written)}")


if __name__ == "__main__":
    run(main)
