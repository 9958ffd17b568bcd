"""Checks a data set before a GPU is rented: what is wrong with it, what to do, and what training on it amounts to.

    python -m finetune.tools.check_data config.yaml [key=value ...]
    python -m finetune.tools.check_data config.yaml duration_sec=60 --workers 16 --report report.png

The config is the run's own. Of the model only config.json and the text tokenizer are read. Every manifest line, every
.json and every prompt is checked, and every word is laid out as training would. Of the audio, the start, the end and
stretches between are heard: all of a corpus of up to 200 hours, at least 30 seconds a file of a larger one.

Exit code 0: training would use everything (there may be warnings). 1: it would fail, lose data without a word, or
learn one speaker's words on the other's voice. 2: the config cannot be used.
"""

import argparse
import contextlib
import sys
from pathlib import Path

from finetune.cli import Parser, UserError
from finetune.config import load_args
from finetune.tools.check_data.corpus import check_run, planned_memory
from finetune.tools.check_data.summary import describe_check, draw_check


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("config", help="YAML file of settings, the one that training gets")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings in place of the file's")
    parser.add_argument(
        "--personaplex", action=argparse.BooleanOptionalAction,
        help="check prompts, as train_personaplex.py needs them; if absent: where the settings or the data have any",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, help="processes (one per core if absent); 0: only this one")
    parser.add_argument("--report", type=Path, default=Path("data_report.png"), help="picture to write")
    given = parser.parse_args(argv)
    if given.workers is not None and given.workers < 0:
        raise UserError(f"--workers {given.workers}: cannot be negative")
    if given.report.suffix != ".png" or not given.report.parent.is_dir():
        raise UserError(f"--report {given.report}: must be a .png in a folder that exists")
    args = load_args(given.config, given.overrides)
    result = check_run(args, given.personaplex, given.workers)
    with contextlib.suppress(UserError):  # of a model that cannot be trained; the data's report is not lost by it
        result = result._replace(memory=planned_memory(result))
    encoding = sys.stdout.encoding or "utf-8"  # names of files may hold what the terminal cannot show
    print(describe_check(result).encode(encoding, "backslashreplace").decode(encoding))
    draw_check(result, given.report)
    print(f"picture: {given.report}", file=sys.stderr)
    return int(result.failed)
