"""The folder of a run.

run_dir/args.yaml                               settings, without secrets
run_dir/metrics.{train,eval}.jsonl              see finetune.metrics
run_dir/checkpoints/checkpoint_000100/          see finetune.checkpointing"""

import json
import logging
import os
import shutil
from pathlib import Path

from finetune.args import CHANGEABLE, SETTINGS, TrainArgs
from finetune.cli import UserError
from finetune.config import dump_args, flatten, parse_yaml, read_settings
from finetune.distributed import World
from finetune.files import replacing

logger = logging.getLogger(__name__)

CHECKPOINT_PREFIX = "checkpoint_"
# In the order of removal: args.yaml marks a folder as one of a run, also when only half of the run has been removed.
RUN_FILES = (
    "checkpoints", "metrics.*.jsonl", "samples", "evaluation_*.json", "not_finite_step_*.json", "curves.png",
    "report.html", "tensorboard", "wandb", ".wandb_id", ".launch", "args.yaml",
)  # fmt: skip


def open_run(args: TrainArgs, world: World) -> Path:
    """Create or open the folder of the run. Call this after everything else has been checked.

    With `overwrite_run_dir` the main rank first removes the run that the folder holds, but only once per launch:
    processes that torchrun or SLURM restart must find their checkpoints. Raises UserError if the folder cannot be used
    or holds a run with other settings (lists old and new values).
    """
    folder = Path(args.run_dir).expanduser()
    problem = None
    if world.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if args.overwrite_run_dir and not _is_restart(folder / ".launch", world):
                if (folder / "args.yaml").is_file():
                    remove_run(folder)
                (folder / ".launch").write_text(json.dumps(_launch(world)))
            for key, values in _changed_settings(folder, args).items():
                logger.info("changed since this run began: %s %s -> %s", key, *values)
            with replacing(folder / "args.yaml") as temporary:
                temporary.write_text(dump_args(args))
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"run_dir: {folder} cannot be written ({error.strerror}); name a folder on a disk that is there"
    if problem := world.broadcast(problem):
        raise UserError(problem)
    return folder


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
    folder = Path(args.run_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run_dir: {folder} is a file; name a folder")
    if not args.overwrite_run_dir:
        _changed_settings(folder, args)


def stored_settings(folder: Path) -> dict:
    """Return the settings of a run as they are nested in its args.yaml, without those that no longer exist."""

    def existing(values: dict, section: str = "") -> dict:
        return {
            key: existing(value, f"{section}{key}.") if isinstance(value, dict) else value
            for key, value in values.items() if section + key in SETTINGS
        }  # fmt: skip

    return existing(read_settings(folder / "args.yaml"))


def _changed_settings(folder: Path, args: TrainArgs) -> dict[str, tuple]:
    """Return {setting: (old, new)} where the run in `folder` has another value; settings that no longer exist are
    ignored. Raises UserError if a setting differs that must not change during a run."""
    if not (folder / "args.yaml").is_file():
        return {}
    old = flatten(stored_settings(folder))
    new = flatten(parse_yaml(dump_args(args)))
    changed = {key: (old.get(key), value) for key, value in sorted(new.items()) if old.get(key) != value}
    fixed = [key for key in changed if key not in CHANGEABLE and key.split(".")[0] not in CHANGEABLE]
    if fixed:
        listed = "".join(f"\n  - {key}: was {changed[key][0]!r}, now {changed[key][1]!r}" for key in fixed)
        hint = "use another run_dir, or replace that run with overwrite_run_dir: true"
        raise UserError(f"{folder} holds a run with other settings; {hint}:{listed}")
    return changed


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of the checkpoints of a run, oldest first, by their names alone."""
    folders = [path for path in (folder / "checkpoints").glob(f"{CHECKPOINT_PREFIX}*") if path.is_dir()]
    steps = [(path.name.removeprefix(CHECKPOINT_PREFIX), path) for path in folders]
    return sorted((int(step), path) for step, path in steps if step.isdigit())
