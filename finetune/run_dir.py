"""The folder of a run.

run_dir/args.yaml                               settings, without secrets
run_dir/metrics.{train,eval}.jsonl              see finetune.metrics
run_dir/checkpoints/checkpoint_000100/          see finetune.checkpointing"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from finetune.args import CHANGEABLE, SETTINGS, TrainArgs
from finetune.claim import claimed, refuse_if_claimed
from finetune.cli import UserError
from finetune.config import dump_args, flatten, parse_yaml, read_settings
from finetune.distributed import World
from finetune.files import expand, replacing

logger = logging.getLogger(__name__)

CHECKPOINT_PREFIX = "checkpoint_"
MAY_MOVE = {
    "data.train_data",
    "moshi_paths",
    "prompt.voices_dir",
    "lora.start_from",
}  # settings whose files may be moved during a run
# In the order of removal: args.yaml marks a folder as one of a run, also when only half of the run has been removed.
RUN_FILES = (
    "checkpoints", "metrics.*.jsonl", "samples", "evaluation_*.json", "evaluation_on_*", "not_finite_step_*.json",
    "curves.png", "profile_*.json.gz", "memory_*.pickle", "report.html", "best.json",
    "tensorboard", "wandb", ".wandb_id", ".launch", "identity.json", "args.yaml",
)  # fmt: skip


@contextlib.contextmanager
def open_run(args: TrainArgs, world: World, identity: dict[str, str]) -> Iterator[Path]:
    """Create or open the folder of the run, and hold it for the block. Call this after everything else was checked.

    With `overwrite_run_dir` the main rank first removes the run that the folder holds, but only once per launch:
    processes that torchrun or SLURM restart must find their checkpoints. Raises UserError if the folder cannot be used,
    is in use by another process, or holds a run with other settings (lists old and new values).

    Args:
        identity: digest of what the paths lead to, for each of MAY_MOVE. A path may change if the digest does not; and
            a model under the same path must be the same.
    """
    folder = expand(args.run_dir)
    problem = None
    with contextlib.ExitStack() as held:
        if world.is_main:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(claimed(folder))
                _prepare(folder, args, world, identity)
            except UserError as error:
                problem = str(error)
            except OSError as error:
                reason = f"cannot be written ({error.strerror})"
                problem = f"run_dir: {folder} {reason}; name a folder on a disk that is there"
        if problem := world.broadcast(problem):
            raise UserError(problem)
        yield folder


def _prepare(folder: Path, args: TrainArgs, world: World, identity: dict[str, str]) -> None:
    if args.overwrite_run_dir and not _is_restart(folder / ".launch", world):
        if (folder / "args.yaml").is_file():
            remove_run(folder)
        (folder / ".launch").write_text(json.dumps(_launch(world)))
    stored = _read_identity(folder)
    moved = {key for key, digest in identity.items() if stored.get(key) == digest}
    for key, values in _changed_settings(folder, args, moved).items():
        logger.info("changed since this run began: %s %s -> %s", key, *values)
    if "moshi_paths" in stored and stored["moshi_paths"] != identity["moshi_paths"]:
        raise UserError(
            f"{folder} holds a run of another model: the files in moshi_paths have changed; put those of the run "
            "there, or use another run_dir"
        )
    for name, content in (("identity.json", json.dumps(identity | stored, indent=1)), ("args.yaml", dump_args(args))):
        with replacing(folder / name) as temporary:
            temporary.write_text(content)


def _read_identity(folder: Path) -> dict[str, str]:
    """Return the identity that the run in a folder began with; {} if there is none."""
    try:
        return dict(json.loads((folder / "identity.json").read_text()))
    except (OSError, TypeError, ValueError):
        return {}


def _launch(world: World) -> dict[str, str | None]:
    """Return what stays the same when torchrun restarts its processes and when SLURM requeues a job."""
    return {"process": world.launch, "slurm": os.environ.get("SLURM_JOB_ID")}


def _is_restart(stored: Path, world: World) -> bool:
    """Return whether this process was restarted by the launch that emptied the folder."""
    try:
        before = json.loads(stored.read_text())
    except (OSError, ValueError):
        return False
    now = _launch(world)
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0 and now["slurm"] == before["slurm"]
    return requeued or now["process"] == before.get("process")


def remove_run(folder: Path) -> None:
    """Remove the files that runs write into their folder, and no others."""
    for pattern in RUN_FILES:
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def check_run_dir(args: TrainArgs) -> None:
    """Raise UserError where `open_run` would refuse the folder, before time is spent on a model. Changes nothing."""
    folder = expand(args.run_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run_dir: {folder} is a file; name a folder")
    refuse_if_claimed(folder)
    if not args.overwrite_run_dir:
        _changed_settings(folder, args, MAY_MOVE)  # `open_run` compares what the paths lead to


def stored_settings(folder: Path) -> dict:
    """Return the settings of a run nested as in its args.yaml, without those that no longer exist."""

    def existing(values: dict, section: str = "") -> dict:
        return {
            key: existing(value, f"{section}{key}.") if isinstance(value, dict) else value
            for key, value in values.items() if section + key in SETTINGS
        }  # fmt: skip

    return existing(read_settings(folder / "args.yaml"))


def _changed_settings(folder: Path, args: TrainArgs, moved: set[str]) -> dict[str, tuple]:
    """Return {setting: (old, new)} where the run in `folder` has another value; settings that no longer exist are
    ignored. Raises UserError if a setting differs that must not change during a run and is not in `moved`."""
    if not (folder / "args.yaml").is_file():
        return {}
    old = flatten(stored_settings(folder))
    new = flatten(parse_yaml(dump_args(args)))
    # A setting that did not exist when the run began has its default.
    before = {key: old.get(key, SETTINGS[key].default) for key in new}
    changed = {key: (before[key], value) for key, value in sorted(new.items()) if before[key] != value}
    may_change = CHANGEABLE | moved
    fixed = [key for key in changed if key not in may_change and key.split(".")[0] not in may_change]
    if fixed:
        listed = "".join(f"\n  - {key}: was {changed[key][0]!r}, now {changed[key][1]!r}" for key in fixed)
        hint = "use another run_dir, or replace that run with overwrite_run_dir: true"
        raise UserError(f"{folder} holds a run with other settings; {hint}:{listed}")
    return changed


def run_of(path: Path) -> Path | None:
    """The folder of the run that a path is or belongs to; None if there is none."""
    return next((folder for folder in (path, *path.parents[:3]) if (folder / "args.yaml").is_file()), None)


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of the checkpoints of a run, oldest first, by their names alone."""
    folders = [path for path in (folder / "checkpoints").glob(f"{CHECKPOINT_PREFIX}*") if path.is_dir()]
    steps = [(path.name.removeprefix(CHECKPOINT_PREFIX), path) for path in folders]
    return sorted((int(step), path) for step, path in steps if step.isdigit())
