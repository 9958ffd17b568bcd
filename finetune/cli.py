"""What every command shares: how it reads its arguments, and how an error ends it."""

import argparse
import errno
import re
import sys
from collections.abc import Callable
from typing import NoReturn

import fire

from finetune.args import closest_setting


class UserError(Exception):
    """A mistake in the user's input: one sentence that says what was found, where, and what to do."""


def no_room(error: Exception) -> bool:
    """Return whether the disk or the user's quota is full, so that nothing else can be written either."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:  # the help text says what happens then
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """`argparse` that reads `--text_prompt` as `--text-prompt`. `doc` (a docstring) is the text of --help."""

    def __init__(self, doc: str, **kwargs):
        super().__init__(description=doc, formatter_class=_Formatter, allow_abbrev=False, **kwargs)

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else list(args)
        words = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in words]
        # Intermixed: `config.yaml --workers 4 key=value` has positional arguments on both sides of an option.
        return super().parse_intermixed_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        flag = message.removeprefix("unrecognized arguments: ")
        if flag != message and any(action.metavar == "key=value" for action in self._actions):
            message = _unknown_flag(flag.split()[0])
        super().error(message)


def _unknown_flag(flag: str, next_word: str = "...") -> str:
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
                raise UserError(_unknown_flag(word, next_word))
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
