"""Check a data set before renting a GPU: what is wrong with it, what to do, and what training on it amounts to.

    python -m finetune.tools.check_data config.yaml [key=value ...]
    python -m finetune.tools.check_data config.yaml duration_sec=60 --workers 16 --report report.png

The config is that of the run. Only the config.json and the text tokenizer of the model are read. Every manifest line,
.json and prompt is checked, and every word is placed on its frames as in training. Of the audio, a corpus of up to 200
hours is decoded whole; of a larger one at least 30 seconds per file, from start to end.

Exit code 0: training would use everything (there may be warnings). 1: it would fail, silently lose data, or learn one
speaker's words on the other's voice. 2: the config cannot be used.

Prints its findings, and writes nothing but the picture of --report.
"""

import argparse
import contextlib
import sys
from pathlib import Path

from finetune.cli import UserError
from finetune.config import load_args
from finetune.parser import Parser
from finetune.tools.check_data.corpus import check_run, planned_memory
from finetune.tools.check_data.summary import describe_check, draw_check


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("config", help="YAML file of settings, the same as for training")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings in place of the file's")
    parser.add_argument(
        "--personaplex", action=argparse.BooleanOptionalAction,
        help="check prompts, as train_personaplex.py needs them; if absent: if the settings or the data have any",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, help="processes (one per core if absent); 0: only this one")
    parser.add_argument("--report", type=Path, metavar="PNG", help="picture to write")
    given = parser.parse_args(argv)
    if given.workers is not None and given.workers < 0:
        raise UserError(f"--workers {given.workers}: cannot be negative")
    if given.report is not None and (given.report.suffix != ".png" or not given.report.parent.is_dir()):
        raise UserError(f"--report {given.report}: must be a .png in a folder that exists")
    args = load_args(given.config, given.overrides)
    result, memory = check_run(args, given.personaplex, given.workers), None
    with contextlib.suppress(UserError):  # the model cannot be trained, but the report on the data is still useful
        memory = planned_memory(result)
    sys.stdout.reconfigure(errors="backslashreplace")  # the terminal may be unable to show the names of files
    print(describe_check(result, memory))
    if given.report is not None:
        draw_check(result, given.report)
        print(f"picture: {given.report}", file=sys.stderr)
    return int(result.failed)
