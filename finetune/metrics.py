"""Metrics: `metrics.{train,eval}.jsonl` are the record; console, curves, TensorBoard and wandb are views of it."""

import json
import logging
import math
import resource
import uuid
from pathlib import Path

import torch

from finetune.args import TrainArgs
from finetune.config import dump_args, parse_yaml
from finetune.distributed import World
from finetune.files import replacing

logger = logging.getLogger(__name__)


class Metrics:
    """Writes metrics on the main rank and does nothing on the others. Rows of steps after `resumed_step`, which a run
    wrote but did not live to save, are removed."""

    def __init__(self, folder: Path, args: TrainArgs, is_main: bool, resumed_step: int):
        self.folder, self.is_main = folder, is_main
        self._board = self._wandb = None
        if not is_main:
            return
        for kind in ("train", "eval"):
            rows = [row for row in read_rows(self.path(kind)) if row["step"] <= resumed_step] if resumed_step else []
            with replacing(self.path(kind)) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)
        if args.wandb.project:
            import wandb

            if args.wandb.key:
                wandb.login(key=args.wandb.key)
            stored_id = folder / ".wandb_id"  # drawn once per folder: a resumed run continues its curves
            if not stored_id.is_file():
                stored_id.write_text(uuid.uuid4().hex)
            self._wandb = wandb.init(
                project=args.wandb.project, name=args.wandb.run_name, dir=str(folder), resume="allow",
                id=stored_id.read_text(), mode="offline" if args.wandb.offline else "online",
                config=parse_yaml(dump_args(args)),
            )  # fmt: skip

    def evaluated(self, step: int, world: World) -> bool:
        """Return, on every rank, whether the record holds a held-out row of a step."""
        return world.broadcast(any(row["step"] == step for row in read_rows(self.path("eval"))))

    def path(self, kind: str) -> Path:
        return self.folder / f"metrics.{kind}.jsonl"

    def write(self, kind: str, step: int, values: dict) -> None:
        """Append one row. Values that are not finite become null, because JSON has none."""
        if not self.is_main:
            return
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        row = {"step": step} | values
        with self.path(kind).open("a") as file:
            file.write(json.dumps(row) + "\n")
        numbers = {f"{kind}/{k}": v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None and values.get("event") != "saved":  # it refuses a step that is not the latest
            self._wandb.log(numbers, step=step)

    def go_back(self, step: int) -> None:
        """Move the rows of steps after `step` to metrics.rolled_back.jsonl."""
        for kind in ("train", "eval") if self.is_main else ():
            rows = read_rows(self.path(kind))
            with self.path("rolled_back").open("a") as file:
                file.writelines(json.dumps({"kind": kind} | row) + "\n" for row in rows if row["step"] > step)
            with replacing(self.path(kind)) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))

    def draw(self) -> None:
        """Draw `curves.png` from the rows written so far. A failure to write it does not end the run."""
        try:
            if self.is_main:
                draw_curves(self.folder)
        except OSError as error:
            logger.warning("curves.png could not be written (%s)", error)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a metrics file up to the first that is none; a killed run leaves half of one at its end."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            break
        rows.append(row)
    return rows


def format_losses(row: dict) -> str:
    """Format the losses (nats per token) and the text accuracy of a row for the console."""
    parts = [f"loss {row['loss']:.4f}" if "loss" in row else "no targets"]
    parts += [f"{key} {row[f'{key}_loss']:.3f}" for key in ("text", "agent", "user") if f"{key}_loss" in row]
    parts += [f"words {row['text_word_accuracy']:.1%}"] if "text_word_accuracy" in row else []
    return " | ".join(parts)


def console_line(step: int, max_steps: int, row: dict) -> str:
    """Format a row of training metrics for the console."""
    parts = [f"step {step}/{max_steps}", format_losses(row), f"lr {row['lr']:.2e}", f"grad {row['grad_norm']:.3f}"]
    parts += [f"{row['tokens_per_sec']:,.0f} tokens/s", f"data wait {row['data_wait']:.0%}"]
    return " | ".join([*parts, f"{row['peak_memory_gb']:.2f} GB"])


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory of this process in GB (1e9 bytes): of its GPU, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def draw_curves(folder: Path) -> Path:
    """Draw losses, text accuracy, learning rate and gradient norm of a run folder over its steps into `curves.png`."""
    import matplotlib  # only here: most commands that use this module draw nothing

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = (
        ("objective, nats", ("loss",)),
        ("text, nats / token", ("text_word_loss", "text_padding_loss")),
        ("audio, nats / token", ("agent_loss", "user_loss", "semantic_loss", "acoustic_loss")),
        ("text accuracy, share of tokens", ("text_word_accuracy", "text_padding_accuracy")),
        ("learning rate", ("lr", "depformer_lr")),
        ("gradient norm before clipping", ("grad_norm",)),
    )
    train, held_out = (read_rows(folder / f"metrics.{kind}.jsonl") for kind in ("train", "eval"))
    styles = ((train, {"lw": 1}), (held_out, {"lw": 1.5, "marker": "o", "ms": 4, "ls": "--"}))
    figure, axes = plt.subplots(2, 3, figsize=(15, 8))
    figure.subplots_adjust(0.045, 0.04, 0.985, 0.91, 0.18, 0.22)  # a computed layout would draw everything twice
    figure.suptitle(f"{folder.name}: training (thin) and held-out (dots) over steps")
    for axis, (title, keys) in zip(axes.flat, panels):
        for i, key in enumerate(keys):
            label = key.removesuffix("_loss").removesuffix("_accuracy").replace("_", " ")
            for rows, style in styles:
                points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
                if points:
                    axis.plot(*zip(*points), color=f"C{i}", label=label, **style)
                    label = None  # one entry in the legend for both curves
        axis.set_title(title, loc="left", fontsize=11)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
    path = folder / "curves.png"
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    return path
