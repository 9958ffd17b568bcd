"""The command line of the scripts and tools that take options."""

import argparse
import re
import sys
from typing import NoReturn

from finetune.cli import unknown_flag


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:  # the help text says what happens then
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """`argparse` that reads `--text_prompt` as `--text-prompt`. `doc` (a docstring) is the text of --help."""

    def __init__(self, doc: str, **kwargs):
        super().__init__(description=doc, formatter_class=_Formatter, allow_abbrev=False, **kwargs)
        self.add_argument("--debug", action="store_true", help="print the traceback of an error")  # see finetune.cli

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else list(args)
        words = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in words]
        # Intermixed: `config.yaml --workers 4 key=value` has positional arguments on both sides of an option.
        return super().parse_intermixed_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        flag = message.removeprefix("unrecognized arguments: ")
        if flag != message and any(action.metavar == "key=value" for action in self._actions):
            message = unknown_flag(flag.split()[0])
        super().error(message)
