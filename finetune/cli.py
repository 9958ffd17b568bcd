"""What every command shares: the parser's manners, and how a user's mistake ends a program."""

import argparse
import errno
import sys
from collections.abc import Callable
from typing import NoReturn

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class UserError(Exception):
    """A mistake in the input of a user: one sentence that says what was found, where, and what to do."""


def no_room(error: Exception) -> bool:
    """Whether the disk, or the user's share of it, is full: nothing else can be written either."""
    return isinstance(error, OSError) and error.errno in _NO_ROOM


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:  # the text says what happens then
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """`argparse` that reads `--text_prompt` as `--text-prompt`. `doc` (a docstring) is the text of --help."""

    def __init__(self, doc: str, **kwargs):
        super().__init__(description=doc, formatter_class=_Formatter, allow_abbrev=False, **kwargs)

    def parse_args(self, args=None, namespace=None):
        given = sys.argv[1:] if args is None else list(args)
        # Intermixed: `config.yaml --workers 4 key=value` has positional arguments on both sides of an option.
        return super().parse_intermixed_args([_dashed(a) for a in given], namespace)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized") and any(action.metavar == "key=value" for action in self._actions):
            message += "; settings are given as key=value, without dashes"
        super().error(message)


def _dashed(arg: str) -> str:
    if not arg.startswith("--") or arg == "--":
        return arg
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value


def run(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits with what it returns. A `UserError` becomes one line on stderr and exit code 2, and so does
    a file that cannot be read or written; Ctrl-C exit code 130."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        place = error.filename2 or error.filename
        if no_room(error):
            where = f" ({place})" if place else ""
            print(f"error: {error.strerror}{where}; free some space and run the same command", file=sys.stderr)
        elif place:
            print(f"error: {place}: {error.strerror}; is it the right place, and may it be used?", file=sys.stderr)
        else:
            raise
        sys.exit(2)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's; most commands need no torch to start
            told = (
                "the GPU's memory is full; lower batch_size (num_microbatches up) or duration_sec, in replies "
                "--batch-size; `python -m finetune.tools.plan config.yaml` tells what fits"
            )
        elif str(error).startswith("DataLoader worker"):  # raised by a signal handler of torch's, wherever one is
            told = (
                f"{str(error).splitlines()[0].rstrip('.')}; if nobody ended it, memory was short: lower "
                "data.num_workers or data.cache_mb, make /dev/shm larger (docker: --shm-size), and run the same "
                "command again"
            )
        else:
            raise
        print(f"error: {told}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
