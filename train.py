"""Fine-tune Moshi.

    python train.py config.yaml [key=value ...]
    torchrun --nproc-per-node 8 train.py config.yaml optim.lr=2e-6

The same command continues a run that was stopped. Settings: README.md, example/moshi_7B.yaml.
"""

import contextlib
import dataclasses
import logging

import torch

from finetune.args import TrainArgs
from finetune.checkpointing import load_checkpoint, newest_complete
from finetune.cli import Parser, UserError, run
from finetune.config import load_args
from finetune.data.run_data import RunData
from finetune.distributed import World, make_mesh, multiplies_bfloat16, session, shard
from finetune.loop import Progress, Stop, train
from finetune.lora import add_adapters
from finetune.metrics import Metrics
from finetune.model.build import Origin, StoredWeights, build_lm, load_weights, set_trainable
from finetune.model.consolidated import Artefact
from finetune.model.pretrained import MOSHI, ModelSpec, inference_config, lm_kwargs, open_pretrained
from finetune.model.training_lm import TrainingLM
from finetune.optim import build_optimizer
from finetune.run_dir import check_run_dir, open_run
from finetune.streams import N_STREAMS

logger = logging.getLogger("train")


def main(spec: ModelSpec = MOSHI, doc: str = __doc__) -> int:
    parser = Parser(doc)
    parser.add_argument("config", help="YAML file of settings")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings in place of the file's")
    given = parser.parse_args()
    args = load_args(given.config, given.overrides)
    with session(args.device) as world:
        logging.basicConfig(
            level=logging.INFO if world.is_main else logging.WARNING,
            format="%(asctime)s %(message)s" if world.is_main else f"[rank {world.rank}] %(message)s",
            datefmt="%H:%M:%S",
            force=True,
        )
        return run_training(args, spec, world)


def run_training(args: TrainArgs, spec: ModelSpec, world: World) -> int:
    """Assembles a run and trains. What is cheap to check comes first; the run's folder is touched last."""
    torch.manual_seed(args.seed)
    check_run_dir(args)

    # 1. The files of the model.
    paths = vars(args.moshi_paths) | {"hf_repo_id": args.moshi_paths.hf_repo_id or spec.default_repo}
    checkpoint = open_pretrained(**paths)
    if checkpoint.raw_config.get("lora"):
        raise UserError(
            f"{checkpoint.source}: holds adapters, and training starts from whole weights; merge them first with "
            "`python -m finetune.tools.export ... --merge`"
        )
    kwargs = lm_kwargs(checkpoint, spec)
    weights = StoredWeights(checkpoint.moshi_weights(), kwargs["dep_q"])

    # 2. The data: manifests, prompts, tokenizers.
    data = RunData(args, spec.prompts, checkpoint, kwargs, weights.file.read, world)
    if world.is_main:
        describe(args, spec, weights.origin, data, world)

    # 3. The model: built without memory, sharded, then filled row by row from its file.
    dtype = getattr(torch, args.param_dtype)
    lm = build_lm(kwargs, dtype)
    if args.lora.enable:
        add_adapters(lm, args.lora.rank, args.lora.scaling)
    set_trainable(lm, args.full_finetuning, args.lora.ft_embed)
    training_lm = TrainingLM(lm, args.gradient_checkpointing)
    if args.compile:
        for layer in (*lm.transformer.layers, *lm.depformer.layers):
            layer.compile(dynamic=True)
    shard(training_lm, [*lm.transformer.layers, *lm.depformer.layers], make_mesh(world, args.sharding), dtype)
    training_lm.to_empty(device=world.device)
    load_weights(lm, weights, args.seed)
    optimizer = build_optimizer(lm, args.optim, world.device)

    # 4. The run's folder, and where it stopped.
    folder = open_run(args, world)
    progress = Progress()
    newest = newest_complete(folder, world)
    if newest is not None:
        path, state = newest
        progress = Progress(**{field.name: state[field.name] for field in dataclasses.fields(Progress)})
        load_checkpoint(path, lm, optimizer, progress.step)
        logger.info("going on from %s", path)
        before, now = state["windows_per_step"], args.batch_size * args.num_microbatches * world.size
        if before != now:
            logger.warning("a step was %d windows until now and is %d from here, at the same rate", before, now)
        before, now = state.get("windows"), data.train.sizes
        if before not in (None, now):
            logger.warning(
                "the manifests had %s windows until now and have %s: of this epoch some will come twice, and some not",
                before, now,
            )  # fmt: skip
    metrics = Metrics(folder, args, world.is_main, progress.step)
    adapters = (args.lora.rank, args.lora.scaling) if args.lora.enable and args.save_adapters else None
    artefact = Artefact(inference_config(checkpoint, kwargs), adapters, dtype)

    # 5. The loop.
    with Stop() as stop, contextlib.closing(metrics), contextlib.closing(data):
        return train(
            args, world, folder, training_lm, optimizer, data, artefact, progress, metrics, stop
        )  # fmt: skip


def describe(args: TrainArgs, spec: ModelSpec, origin: Origin, data: RunData, world: World) -> None:
    """What the run will do, as arithmetic that can be checked."""
    windows, window_frames = data.train, data.window_frames
    per_step = args.batch_size * args.num_microbatches * world.size
    trained = "all parameters" if args.full_finetuning else f"LoRA rank {args.lora.rank}"
    logger.info("%s: %s", spec.name, origin)
    logger.info("%s, %s, %d process(es) on %s", trained, args.param_dtype, world.size, world.device.type)
    if args.param_dtype == "bfloat16" and not multiplies_bfloat16(world.device):
        logger.warning("this CPU has no bfloat16 products and imitates them slowly: set param_dtype: float32")
    logger.info(
        "%s windows of up to %g s (%d frames), codes %s", f"{len(windows):,}", args.duration_sec, window_frames,
        "pre-computed" if windows.precomputed else "made by Mimi in training",
    )  # fmt: skip
    logger.info(
        "%d x %d x %d = %d windows a step (batch x microbatches x processes), up to %s frames of dialogue x %d = %s "
        "tokens", args.batch_size, args.num_microbatches, world.size, per_step, f"{per_step * window_frames:,}",
        N_STREAMS, f"{per_step * window_frames * N_STREAMS:,}",
    )  # fmt: skip
    if data.prompter is not None:
        longest = data.prompter.max_frames
        logger.info(
            "before each a prompt of up to %g s (%d frames, at most %.0f %% of a sequence); %d recorded or .pt voices; "
            "without text in %.0f %% of the windows, without voice in %.0f %%", args.prompt.max_sec, longest,
            100 * longest / (longest + window_frames), len(data.prompter.voices), 100 * args.prompt.drop_text,
            100 * args.prompt.drop_voice,
        )  # fmt: skip
    epochs = args.max_steps * per_step / len(windows)
    logger.info("%.1f steps an epoch; %d steps = %.2f epochs", len(windows) / per_step, args.max_steps, epochs)


if __name__ == "__main__":
    run(main)
