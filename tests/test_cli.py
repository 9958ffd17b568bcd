"""How commands read their arguments, through argparse and through fire, and how errors end them."""

import errno
import os
import pty
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from moshi.modules import transformer
from moshi.utils.compile import torch_compile_lazy
from torch._dynamo.testing import CompileCounter

import train
import train_personaplex
from finetune import cli
from finetune.audio.words import read_words
from finetune.cli import UserError
from finetune.parser import Parser
from tests.support import ROOT, rows, script, train_here, write_config

# --- Errors ----------------------------------------------------------------------------------------------------------


def end_of(main, capsys) -> tuple[int, str]:
    """(exit code, stderr) of `cli.run(main)`."""
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    shown = capsys.readouterr()
    assert shown.out == ""
    return ended.value.code, shown.err


def raising(error: BaseException):
    def main():
        raise error

    return main


@pytest.mark.parametrize("returned, code", [(None, 0), (0, 0), (1, 1), (75, 75)])
def test_the_exit_code_is_what_main_returns(returned, code, capsys):
    assert end_of(lambda: returned, capsys) == (code, "")


@pytest.mark.parametrize("error, named", [
    (UserError("a.yaml: no"), ["a.yaml: no"]),
    (OSError(errno.ENOSPC, "No space left on device", "/disk/a"), ["No space", "/disk/a", "free"]),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), ["quota", "free"]),
    (OSError(errno.EFBIG, "File too large", "a", None, "b"), ["File too large", "(b)", "free"]),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "/gone/a"), ["/gone/a", "No such file"]),
    (PermissionError(errno.EACCES, "Permission denied", "a", None, "/locked/b"), ["/locked/b", "Permission"]),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.2 GiB"), [
        "batch_size", "num_microbatches", "duration_sec", "--batch-size", "finetune.tools.plan"]),
    (RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:3"), ["another process"]),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nmore"), [
        "pid 7", "data.num_workers", "data.cache_mb", "--shm-size"]),
], ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "")  # fmt: skip
def test_an_error_that_the_user_can_repair_is_one_line(error, named, capsys):
    code, err = end_of(raising(error), capsys)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert all(name in err for name in named) and "None" not in err and "more" not in err, err


def test_ctrl_c(capsys):
    assert end_of(raising(KeyboardInterrupt()), capsys) == (130, "interrupted\n")


@pytest.mark.parametrize("error", [RuntimeError("shape"), ValueError("x"), OSError("no file"), KeyError("k")])
def test_a_defect_is_one_line_that_names_the_place_the_file_and_the_traceback(error, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["train.py", "a"])
    monkeypatch.setattr("finetune.audio.words.read_alignments", lambda *_: raising(error)())
    words = tmp_path / "call.json"
    words.write_text('{"alignments": []}')
    code, err = end_of(lambda: read_words(words), capsys)
    (trace,) = tmp_path.glob("traceback_*")
    assert code == 70 and err.count("\n") == 1 and err.startswith(f"bug: {type(error).__name__}: ")
    assert all(word in err for word in ("finetune/audio/words.py", str(words), str(trace), "--debug")), err
    assert "Traceback" in trace.read_text() and type(error).__name__ in trace.read_text()


@pytest.mark.parametrize("error", [RuntimeError("shape"), UserError("a.yaml: no")])
def test_debug_keeps_the_traceback(error, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "a", "--debug"])
    with pytest.raises(type(error)) as raised:
        cli.run(raising(error))
    assert raised.value is error and sys.argv == ["train.py", "a"]


PRINTS = "from finetune.cli import run; run(lambda: [print(chr(228), i) for i in range(100_000)] and None)"


def test_a_reader_that_has_gone_ends_the_command_quietly():
    process = subprocess.Popen([sys.executable, "-c", PRINTS], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 141 and process.stderr.read() == b""


def test_a_terminal_that_knows_ascii_only():
    done = script("-c", PRINTS.replace("100_000", "1"), LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.stdout == "\\xe4 0\n"


@pytest.mark.parametrize("command", ["train.py", "annotate.py", "-m finetune.tools.plan"])
def test_ctrl_c_while_modules_are_imported(command):
    """A module that takes long to import stands for all of them."""
    slow = "import sys, time; sys.modules['numpy'] = None; print('importing', flush=True); time.sleep(60)"
    folder = [sys.executable, *command.split(), "config.yaml"]
    with tempfile.TemporaryDirectory() as path:
        for module in ("torch", "numpy"):
            Path(path, f"{module}.py").write_text(slow)
        env = os.environ | {"PYTHONPATH": f"{path}:{ROOT}"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(folder, cwd=ROOT, env=env, **pipes)
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (-signal.SIGINT, 130) and process.stderr.read() == "interrupted\n"


def test_what_may_be_secret():
    """The name of a project is none: hiding `moshi` would spoil every message that holds the word."""
    assert all(map(cli.is_secret, ("wandb", "wandb.key", "wandb.kye", "key", "api_key", "hub.token", "password")))
    assert not any(map(cli.is_secret, ("wandb.project", "wandb.run_name", "moshi_paths.tokenizer_path", "run_dir")))


def test_no_room():
    assert all(cli.no_room(OSError(code, "x")) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
    assert not cli.no_room(OSError(errno.EACCES, "x")) and not cli.no_room(ValueError("x"))


# --- argparse --------------------------------------------------------------------------------------------------------


def parser() -> Parser:
    parser = Parser("What it does.\n\n  an example\n")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--num-workers", type=int, default=4, help="processes")
    parser.add_argument("--force", action="store_true", help="always")
    return parser


@pytest.mark.parametrize("words, workers", [
    ("c.yaml a=1", 4), ("c.yaml --num-workers 2 a=1", 2), ("--num_workers=2 c.yaml a=1", 2),
    ("c.yaml a=1 --num_workers 2", 2),
])  # fmt: skip
def test_options_may_come_anywhere_and_with_underscores(words, workers):
    given = parser().parse_args(words.split())
    assert (given.config, given.overrides, given.num_workers, given.force) == ("c.yaml", ["a=1"], workers, False)


def test_only_names_of_options_are_changed():
    assert parser().parse_args(["c_d.yaml", "a_b=--c_d", "--num_workers=2"]).overrides == ["a_b=--c_d"]


def test_help_shows_the_docstring_and_defaults(capsys):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "\n  an example\n" in shown and "processes (default: 4)" in shown
    assert "always (" not in shown


@pytest.mark.parametrize("words, named", [
    ("c.yaml --optim.lr=2e-6", ["--optim.lr", "optim.lr="]), ("c.yaml --max_steps 5", ["--max-steps", "max_steps="]),
    ("c.yaml --lr 5", ["--lr", "optim.lr="]), ("c.yaml --bogus", ["--bogus", "key="]),
    ("c.yaml --wandb.key=s3cret", ["--wandb.key", "wandb.key=..."]),
    ("c.yaml --wandb_key=s3cret", ["--wandb-key"]), ("c.yaml --num-work 3", ["--num-work"]),
])  # fmt: skip
def test_settings_given_with_dashes_are_refused(words, named, capsys):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(words.split())
    err = capsys.readouterr().err
    assert ended.value.code == 2 and all(name in err for name in named) and "s3cret" not in err, err


def test_a_command_without_settings_refuses_unknown_options_as_argparse_does(capsys):
    parser = Parser("doc")
    with pytest.raises(SystemExit):
        parser.parse_args(["--lr=3"])
    assert "unrecognized arguments: --lr=3" in capsys.readouterr().err


# --- fire ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command through fire; returns (exit code, arguments that the command got or None, stdout, stderr)."""

    def run(*words: str, returns: int = 0):
        got = []

        def command(config: str, *overrides: str) -> int:
            """Do something.

            python command.py a.yaml
            """
            got.append((config, *overrides))
            return returns

        monkeypatch.setattr(sys, "argv", ["/somewhere/command.py", *words])
        with pytest.raises(SystemExit) as ended:
            cli.run_fire(command)
        shown = capsys.readouterr()
        return ended.value.code, got[0] if got else None, shown.out, shown.err

    return run


def test_words_arrive_as_they_were_typed(call):
    literals = ["123", "1e5", "None", "(1,)", "[1, 'x']", "{a: b}", "'quoted'", '"quoted"', "two words", "-", ""]
    words = [f"a={word}" for word in literals]
    assert call("123", "optim.lr=2e-6", *words) == (0, ("123", "optim.lr=2e-6", *words), "", "")


@pytest.mark.parametrize("words", [["--config", "1.yaml", "a=1"], ["a=1", "--config=1.yaml"], ["1.yaml", "a=1"]])
def test_the_config_may_be_named(call, words):
    assert call(*words)[:2] == (0, ("1.yaml", "a=1"))


@pytest.mark.parametrize("code", [0, 1, 75])
def test_the_exit_code_is_returned_and_not_printed(call, code):
    assert call("a.yaml", returns=code) == (code, ("a.yaml",), "", "")


@pytest.mark.parametrize("words, named", [
    (["a.yaml", "--optim.lr=2e-6"], ["--optim.lr", "optim.lr=2e-6"]),
    (["a.yaml", "--lr", "2e-6"], ["--lr", "optim.lr=2e-6"]), (["--max-steps=5", "a.yaml"], ["max_steps=5"]),
    (["a.yaml", "-lr", "1"], ["-lr", "optim.lr=1"]), (["a.yaml", "--max_step"], ["max_steps=..."]),
    (["a.yaml", "--bogus=1"], ["--bogus"]), (["a.yaml", "--bogus"], ["--bogus"]), (["a.yaml", "-x"], ["-x"]),
    (["a.yaml", "--"], ["--"]), (["a.yaml", "-"], ["-"]), (["a.yaml", "--", "--interactive"], ["--"]),
    (["a.yaml", "--configs=b"], ["--configs"]), (["--noconfig"], ["--noconfig"]), (["-c", "a.yaml"], ["-c"]),
    (["a.yaml", "--wandb.key=s3cret"], ["wandb.key=..."]), (["a.yaml", "--key", "s3cret"], ["wandb.key=..."]),
    (["a.yaml", "--wandb-key", "s3cret"], ["--wandb-key"]), (["a.yaml", "--wandb.kye=s3cret"], ["wandb.key=..."]),
])  # fmt: skip
def test_unknown_flags_are_refused_before_the_command_starts(call, words, named):
    code, got, out, err = call(*words)
    assert (code, got, out) == (2, None, "") and err.startswith("error: ") and err.count("\n") == 1
    assert all(name in err for name in named) and "s3cret" not in err, err


def test_without_arguments_the_usage_is_shown(call):
    code, got, out, err = call()
    assert (code, got, out) == (2, None, "") and "Usage: command.py CONFIG [OVERRIDES]..." in err


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["a.yaml", "--help"], ["--", "--help"], ["--bogus", "-h"]])
def test_help(call, words):
    code, got, out, err = call(*words)
    assert (code, got, err) == (0, None, "") and "command.py CONFIG [OVERRIDES]..." in out
    assert "Do something." in out and "    python command.py a.yaml\n" in out


def test_an_error_of_the_command_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command.py", "a.yaml"])
    with pytest.raises(SystemExit) as ended:
        cli.run_fire(lambda config: raising(UserError(f"{config}: no"))())
    assert ended.value.code == 2 and capsys.readouterr().err == "error: a.yaml: no\n"


# --- The two training scripts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command, usage", [
    (train.train, "torchrun --nproc-per-node 8 train.py config.yaml optim.lr=2e-6"),
    (train_personaplex.train_personaplex, "torchrun train_personaplex.py config.yaml optim.lr=2e-6"),
])  # fmt: skip
def test_help_of_training(command, usage, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{command.__name__}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.run_fire(command)
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and usage in shown and f"{command.__name__}.py CONFIG [OVERRIDES]..." in shown
    for said in ("data.train_data", "run_dir", "text_padding_weight [0.5]", "key.subkey=value", "  75  "):
        assert said in shown


def test_help_in_a_terminal_is_printed_and_not_paged():
    """fire by itself would wait for a key in `less`."""
    terminal, end = pty.openpty()
    command = [sys.executable, "-c", "from finetune.cli import run_fire\nrun_fire(lambda config: 0)", "--help"]
    environment = os.environ | {"PAGER": "sleep 60; true", "TERM": "xterm", "HOME": "/"}
    done = subprocess.Popen(command, cwd=ROOT, stdin=end, stdout=end, stderr=end, env=environment)
    try:
        assert done.wait(timeout=30) == 0
        assert b"CONFIG" in os.read(terminal, 65536)
    finally:
        done.kill()
        os.close(terminal)
        os.close(end)


def test_a_flag_ends_a_process_before_training(world, tmp_path):
    config = write_config(tmp_path, world, max_steps=1)
    done = script("train_personaplex.py", config, "--bogus=1", check=False, timeout=60)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_training_never_compiles(world, tmp_path, monkeypatch):
    """Even where moshi was imported without the environment variable that keeps its hooks out."""
    monkeypatch.delenv("NO_TORCH_COMPILE")
    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend=counter))
    monkeypatch.setattr(torch._dynamo.config, "disable", False)
    hooked = torch_compile_lazy(transformer._rms_norm)
    monkeypatch.setattr(transformer, "_rms_norm", hooked)
    norms = torch.zeros(1, 1, 4), torch.ones(1, 1, 4), None, 1e-5
    hooked(*norms)
    assert counter.frame_count == 1  # the hook is in place
    settings = {"max_steps": 1, "eval_max_samples": 1, "eval_free_samples": 1, "eval_free_sec": 0.3, "do_ckpt": False}
    assert train_here(write_config(tmp_path, world, **settings)) == 0
    assert counter.frame_count == 1 and len(rows(tmp_path / "run")) == 1
    torch._dynamo.reset()
