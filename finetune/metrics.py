"""Where numbers go: `metrics.{train,eval}.jsonl` are the record; console, curves, TensorBoard and wandb are views."""

import json
import logging
import math
import os
import uuid
from pathlib import Path

import torch

from finetune.args import TrainArgs
from finetune.config import dump_args, parse_yaml
from finetune.distributed import World

logger = logging.getLogger(__name__)


class Metrics:
    """Writes on the main rank, does nothing on the others.

    Args:
        resumed_step: rows of later steps, written by a run that did not live to save them, are taken out.
    """

    def __init__(self, folder: Path, args: TrainArgs, is_main: bool, resumed_step: int):
        self.folder, self.is_main = folder, is_main
        self._board = self._wandb = None
        if not is_main:
            return
        for kind in ("train", "eval"):
            path = self.path(kind)
            rows = [row for row in read_rows(path) if row["step"] <= resumed_step] if resumed_step else []
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
            os.replace(temporary, path)
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)
        if args.wandb.project:
            import wandb

            if args.wandb.key:
                wandb.login(key=args.wandb.key)
            self._wandb = wandb.init(
                project=args.wandb.project, name=args.wandb.run_name, dir=str(folder), resume="allow",
                id=_wandb_id(folder), mode="offline" if args.wandb.offline else "online",
                config=parse_yaml(dump_args(args)),
            )  # fmt: skip

    def evaluated(self, step: int, world: World) -> bool:
        """Whether there is a held-out row of a step, as the main rank sees it."""
        return world.broadcast(any(row["step"] == step for row in read_rows(self.path("eval"))))

    def path(self, kind: str) -> Path:
        return self.folder / f"metrics.{kind}.jsonl"

    def write(self, kind: str, step: int, values: dict) -> None:
        """Appends one row. Values that are not finite become null: they are no JSON."""
        if not self.is_main:
            return
        row = {"step": step} | {k: _finite(v) for k, v in values.items()}
        with self.path(kind).open("a") as file:
            file.write(json.dumps(row) + "\n")
        numbers = {f"{kind}/{k}": v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def draw(self) -> None:
        """Draws `curves.png` from the rows written so far. A picture that cannot be written ends no run."""
        if self.is_main:
            try:
                draw_curves(self.folder)
            except OSError as error:
                logger.warning("curves.png could not be written (%s)", error)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_id(folder: Path) -> str:
    """The run's id at wandb, which knows all folders of a project by it."""
    path = folder / ".wandb_id"
    if not path.is_file():
        path.write_text(uuid.uuid4().hex)
    return path.read_text()


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics file; a last line that was cut short is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def console_line(step: int, max_steps: int, row: dict) -> str:
    """One line for a person."""
    parts = [f"step {step}/{max_steps}", f"loss {row['loss']:.4f}" if "loss" in row else "no targets"]
    parts += [f"{key} {row[f'{key}_loss']:.3f}" for key in ("text", "agent", "user") if f"{key}_loss" in row]
    parts += [f"words {row['text_word_accuracy']:.1%}"] if "text_word_accuracy" in row else []
    parts += [f"lr {row['lr']:.2e}", f"grad {row['grad_norm']:.3f}", f"{row['tokens_per_sec']:,.0f} tokens/s"]
    parts += [f"data wait {row['data_wait']:.0%}", f"{row['peak_memory_gb']:.2f} GB"]
    return " | ".join(parts)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GB: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def draw_curves(folder: Path) -> Path:
    """`curves.png` of a run folder: objective, streams, text accuracy, learning rate and gradient norm over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train, held_out = (read_rows(folder / f"metrics.{kind}.jsonl") for kind in ("train", "eval"))
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), constrained_layout=True)
    figure.suptitle(f"{folder.name}: training (thin) and held-out (dots)")
    panels = (
        ("objective", ("loss",), "nats"),
        ("text", ("text_word_loss", "text_padding_loss"), "nats / token"),
        ("audio", ("agent_loss", "user_loss", "semantic_loss", "acoustic_loss"), "nats / token"),
        ("text accuracy", ("text_word_accuracy", "text_padding_accuracy"), "share of tokens"),
        ("learning rate", ("lr", "depformer_lr"), ""),
        ("gradient norm before clipping", ("grad_norm",), ""),
    )
    for axis, (title, keys, unit) in zip(axes.flat, panels):
        for i, key in enumerate(keys):
            colour = f"C{i}"
            label = key.removesuffix("_loss").removesuffix("_accuracy").replace("_", " ")
            for rows, style in ((train, {"lw": 1}), (held_out, {"lw": 1.5, "marker": "o", "ms": 4, "ls": "--"})):
                points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
                if points:
                    axis.plot(*zip(*points), color=colour, label=label, **style)
                    label = None
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlabel("step")
        axis.set_ylabel(unit)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
    path = folder / "curves.png"
    temporary = folder / ".curves.tmp.png"
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    os.replace(temporary, path)
    return path
