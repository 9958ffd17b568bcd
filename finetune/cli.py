"""How an error ends a command, and the command line of the training scripts."""

import errno
import re
import sys
from collections.abc import Callable

import fire

from finetune.args import closest_setting


class UserError(Exception):
    """A mistake in the user's input: one sentence that says what was found, where, and what to do."""


def no_room(error: Exception) -> bool:
    """Return whether the disk or the user's quota is full, so that nothing else can be written either."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def unknown_flag(flag: str, next_word: str = "...") -> str:
    name, equals, value = flag.partition("=")
    key = name.lstrip("-").replace("-", "_")
    setting = closest_setting(key) or "key"
    value = "..." if re.search("key|wandb", key + setting) else value if equals else next_word  # may be wandb.key
    return f"unknown option {name}; settings are given without dashes: {setting}={value}"


def run_fire(command: Callable[..., int]) -> None:
    """Call `command(config, *overrides)` with the words of the command line, through fire, and exit as `run` does.

    fire alone would read words as Python literals, page --help through `less`, print the exit code that the command
    returns, and refuse an unknown flag only after the command has run.
    """
    fire.parser.DefaultParseValue = str
    fire.core.Display = lambda lines, out: print(*lines, sep="\n")
    words = sys.argv[1:]

    def main() -> int:
        if "-h" in words or "--help" in words:
            return fire.Fire(command, ["--", "--help"])
        for word, next_word in zip(words, [*words[1:], "..."]):
            if word.startswith("-") and word.partition("=")[0] != "--config":
                raise UserError(unknown_flag(word, next_word))
        return fire.Fire(command, words, serialize=lambda code: None)

    run(main)


def run(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with the code that it returns.

    A `UserError`, a file that cannot be read or written, and lack of memory end in one line on stderr and exit code 2;
    Ctrl-C in exit code 130. Everything else is a defect and keeps its traceback.
    """
    try:
        sys.exit(main() or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sentence = _explain(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)


def _explain(error: Exception) -> str | None:
    """Return the sentence for the user; None for a defect."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        path = error.filename2 or error.filename
        if no_room(error):
            return f"{error.strerror}{f' ({path})' if path else ''}; free some space and run the same command again"
        return f"{path}: {error.strerror}; check that the path exists and is writable" if path else None
    if type(error).__name__ == "OutOfMemoryError":  # of torch, which most commands do not need to start
        return (
            "the GPU is out of memory; lower batch_size (and raise num_microbatches), duration_sec or, for replies, "
            "--batch-size; `python -m finetune.tools.plan config.yaml` estimates what fits"
        )
    if str(error).startswith("DataLoader worker"):  # a RuntimeError, raised by a signal handler of torch
        return (
            f"{str(error).splitlines()[0].rstrip('.')}; it was probably killed for lack of memory: lower "
            "data.num_workers or data.cache_mb, or make /dev/shm larger (docker: --shm-size), and run the same command "
            "again"
        )
    return None
