"""How an error ends a command, and the command line of the training scripts."""

import errno
import json
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import fire

from finetune.args import SETTINGS, closest_setting

_ROOT = Path(__file__).parents[1]


# Strings that no message may show; `finetune.config` adds those of the settings.
secrets: set[str] = set()
_SECRET = re.compile(r"wandb(?!\.(project|run_name)$)|(^|[._-])(key|token)$|api_?key|secret|password", re.IGNORECASE)


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
            fire.core.Display = lambda lines, out: print(*lines, "", *_list_settings(), sep="\n")
            return fire.Fire(command, ["--", "--help"])
        for word, next_word in zip(words, [*words[1:], "..."]):
            if word.startswith("-") and word.partition("=")[0] != "--config":
                raise UserError(unknown_flag(word, next_word))
        return fire.Fire(command, words, serialize=lambda code: None)

    run(main)


def _list_settings() -> Iterator[str]:
    """Yield a line for each setting: its default and what it is."""
    yield "SETTINGS [default]"
    for key, field in SETTINGS.items():
        if not hasattr(field.annotation, "model_fields"):  # of a section, its settings are listed
            default = "required" if field.is_required() else json.dumps(field.default)
            yield f"    {key} [{default}]: {field.description}"


def run(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with the code that it returns.

    A `UserError`, a file that cannot be read or written, and lack of memory end in one line on stderr and exit code 2;
    Ctrl-C in exit code 130; a reader of the output that has gone (`| head`) in 141, as of other Unix tools. Everything
    else is a defect: exit code 70 and one line that says where it is, with the traceback in a file. With --debug, which
    every command takes, the traceback is printed instead.
    """
    secrets.update(words for words in _given_secrets(sys.argv[1:]) if len(words) > 3)
    debug = "--debug" in sys.argv[1:]
    sys.argv = [word for word in sys.argv if word != "--debug"]
    for stream in (sys.stdout, sys.stderr):  # an ASCII terminal must not end a command that prints a name
        stream.reconfigure(errors="backslashreplace")
    try:
        code = main() or 0
        sys.stdout.flush()
        sys.exit(code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        if debug:
            raise
        sentence = _explain(error)
        if sentence is None:
            print(hide_secrets(_describe_defect(error)), file=sys.stderr)
            sys.exit(70)  # EX_SOFTWARE
        print(hide_secrets(f"error: {sentence}"), file=sys.stderr)
        sys.exit(2)


def is_secret(key: str) -> bool:
    """Return whether a setting of this name may hold a password or a key."""
    return _SECRET.search(key) is not None


def _given_secrets(words: list[str]) -> Iterator[str]:
    """Yield the values on a command line that may be secret, and the one in the environment."""
    yield os.environ.get("WANDB_API_KEY", "")
    for word, next_word in zip(words, [*words[1:], ""]):
        key, equals, value = word.partition("=")
        if is_secret(key.lstrip("-")):
            yield value.strip(" '\"[]{}") if equals and value else next_word


def hide_secrets(text: str) -> str:
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def _describe_defect(error: Exception) -> str:
    """Write the traceback to a file; return a line with the error, the line of ours that it comes from, and the file
    that was being worked on, which is the innermost path among our local variables."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if _is_ours(frame.f_code.co_filename)]
    place, file = "", ""
    if frames:
        place = f" in {Path(frames[-1].f_code.co_filename).relative_to(_ROOT)}, {frames[-1].f_code.co_name}"
        paths = (value for frame in reversed(frames) for value in frame.f_locals.values() if isinstance(value, Path))
        file = next((f", on {path}" for path in paths), "")
    with tempfile.NamedTemporaryFile("w", prefix="traceback_", suffix=".txt", delete=False) as out:
        out.write(hide_secrets("".join(traceback.format_exception(error))))
    what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return f"bug: {what}{place}{file}; please report it with {out.name} (--debug prints this traceback)"


def _is_ours(file: str) -> bool:
    return Path(file).parent == _ROOT or Path(file).is_relative_to(_ROOT / "finetune")


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
    if re.search(r"Connection (closed|reset) by peer|remote process exited|NCCL communicator was aborted", str(error)):
        return "another process of this run has ended; its own message says why"
    if str(error).startswith("DataLoader worker"):  # a RuntimeError, raised by a signal handler of torch
        return (
            f"{str(error).splitlines()[0].rstrip('.')}; it was probably killed for lack of memory: lower "
            "data.num_workers or data.cache_mb, or make /dev/shm larger (docker: --shm-size), and run the same command "
            "again"
        )
    return None
