"""The folder of a run.

run_dir/args.yaml                               settings, without secrets
run_dir/metrics.{train,eval}.jsonl              see finetune.metrics
run_dir/checkpoints/checkpoint_000100/          see finetune.checkpointing"""

import json
import logging
import os
import shutil
from pathlib import Path

from finetune.args import CHANGEABLE, TrainArgs
from finetune.cli import UserError
from finetune.config import dump_args, flatten, parse_yaml, read_settings
from finetune.distributed import World

logger = logging.getLogger(__name__)

CHECKPOINT_PREFIX = "checkpoint_"
# In the order in which they are removed: by args.yaml a folder is known to hold a run, also half removed.
RUN_FILES = (
    "checkpoints", "metrics.*.jsonl", "samples", "evaluation_*.json", "not_finite_step_*.json", "curves.png",
    "report.html", "tensorboard", "wandb", ".wandb_id", ".launch", "args.yaml",
)  # fmt: skip


def open_run(args: TrainArgs, world: World) -> Path:
    """The run's folder, made or found; call it after everything else was checked.

    A folder that holds this run is continued. With `overwrite_run_dir` the main rank takes the old run out of it, once:
    what torchrun restarts or SLURM queues again must find its checkpoints.

    Raises:
        UserError: the folder holds a run with other settings (lists old and new).
    """
    folder = Path(args.run_dir).expanduser()
    problem = None
    if world.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if args.overwrite_run_dir and not _started_again(folder / ".launch", world):
                if (folder / "args.yaml").is_file():
                    remove_run(folder)
                (folder / ".launch").write_text(json.dumps(_launch(world)))
            for key, values in _changed(folder, args).items():
                logger.info("changed since this run began: %s %s -> %s", key, *values)
            temporary = folder / ".args.yaml.tmp"
            temporary.write_text(dump_args(args))
            os.replace(temporary, folder / "args.yaml")
        except (OSError, UserError) as error:
            problem = str(error)
            if isinstance(error, OSError):
                problem = f"run_dir: {folder} cannot be made ({error.strerror}); name a folder on a disk that is there"
    problem = world.broadcast(problem)
    if problem:
        raise UserError(problem)
    return folder


def _launch(world: World) -> dict[str, str | None]:
    """What stays the same when torchrun starts its processes again, and when SLURM queues a job again."""
    return {"process": world.launch, "slurm": os.environ.get("SLURM_JOB_ID")}


def _started_again(stored: Path, world: World) -> bool:
    """Whether the launch that emptied this folder is the present one, come back."""
    try:
        before = json.loads(stored.read_text())
    except (OSError, ValueError):
        return False
    now = _launch(world)
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0 and now["slurm"] == before["slurm"]
    return requeued or now["process"] == before.get("process")


def remove_run(folder: Path) -> None:
    """Removes what runs write into their folder, and nothing else that lies there."""
    for pattern in RUN_FILES:
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def check_run_dir(args: TrainArgs) -> None:
    """Raises UserError where `open_run` would refuse the folder, before minutes go into a model. Touches nothing."""
    folder = Path(args.run_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run_dir: {folder} is a file; name a folder")
    if not args.overwrite_run_dir:
        _changed(folder, args)


def _changed(folder: Path, args: TrainArgs) -> dict[str, tuple]:
    """{setting: (old, new)} of what differs from the run in a folder. Raises UserError where something may not."""
    if not (folder / "args.yaml").is_file():
        return {}
    old = flatten(read_settings(folder / "args.yaml"))
    new = flatten(parse_yaml(dump_args(args)))
    changed = {key: (old.get(key), new.get(key)) for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    free = {key for key in changed if key in CHANGEABLE or key.split(".")[0] in CHANGEABLE}
    fixed = sorted(changed.keys() - free)
    if fixed:
        listed = "".join(f"\n  - {key}: was {changed[key][0]!r}, now {changed[key][1]!r}" for key in fixed)
        raise UserError(
            f"{folder} holds a run with other settings; use another run_dir, or overwrite_run_dir: true to "
            f"start anew:{listed}"
        )
    return {key: changed[key] for key in sorted(free)}


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of a run's checkpoints, oldest first, by name alone."""
    found = []
    for path in (folder / "checkpoints").glob(f"{CHECKPOINT_PREFIX}*"):
        number = path.name.removeprefix(CHECKPOINT_PREFIX)
        if path.is_dir() and number.isdigit():
            found.append((int(number), path))
    return sorted(found)
