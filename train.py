"""Fine-tune Moshi.

    python train.py config.yaml [key=value ...]
    torchrun --nproc-per-node 8 train.py config.yaml optim.lr=2e-6

The same command continues a run that was stopped. Settings: README.md, example/moshi_7B.yaml.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
from pathlib import Path

import torch

from finetune import checkpointing, lora, model, optim
from finetune.args import TrainArgs, load_args
from finetune.cli import Parser, run
from finetune.data import codec, dataset
from finetune.data.audio import FRAME_RATE
from finetune.data.interleaver import Interleaver
from finetune.data.prompts import Prompter
from finetune.distributed import World, make_mesh, session, shard
from finetune.fast import TrainingLM
from finetune.loop import Progress, Stop, train
from finetune.metrics import Metrics
from finetune.voices import VoiceBook, load_voices

logger = logging.getLogger("train")


def main(spec: model.Spec = model.MOSHI, doc: str = __doc__) -> int:
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


def run_training(args: TrainArgs, spec: model.Spec, world: World) -> int:
    """Assembles a run and trains. What is cheap to check comes first; the run's folder is touched last."""
    torch._dynamo.config.disable = not args.compile
    torch.manual_seed(args.seed)

    # 1. The files of the model, and the windows of the data.
    paths = vars(args.moshi_paths) | {"hf_repo_id": args.moshi_paths.hf_repo_id or spec.default_repo}
    checkpoint = model.open_checkpoint(**paths)
    kwargs = model.lm_kwargs(checkpoint, spec)
    weights = model.Weights(checkpoint.moshi_weights(), kwargs["dep_q"])
    window_frames = math.ceil(round(args.duration_sec * FRAME_RATE, 6))
    windows = dataset.open_windows(args.data.train_data, window_frames)
    held_out = dataset.open_windows(args.data.eval_data, window_frames) if args.do_eval else None
    if world.is_main:
        describe(args, spec, weights.origin, windows, window_frames, world)

    # 2. Prompts: all of them are checked, and their voices encoded, before the model is loaded.
    tokenizer = checkpoint.tokenizer()
    mimi = functools.cache(lambda: checkpoint.mimi(world.device))
    prompter = None
    if spec.prompts:
        book = VoiceBook(Path(args.prompt.voices_dir) if args.prompt.voices_dir else None, checkpoint.voices_archive)
        embed = lambda column: model.embed_column(weights, column)
        load = lambda files: load_voices(files, mimi, embed, kwargs["delays"], args.trains_embeddings)
        prompter = Prompter(args.prompt, tokenizer, book)
        with world.main_first():
            prompter.prepare(itertools.chain(windows.prompts(), held_out.prompts() if held_out else ()), load)

    # 3. Tokenizers: codes are read where they are pre-computed, and Mimi is needed where they are not.
    def tokenizer_for(source: dataset.Windows) -> dataset.Tokenizer:
        interleaver = Interleaver(tokenizer, args.data.keep_and_shift)
        common = (interleaver, window_frames, args.data.speakers, prompter, args.data.cache_mb)
        if source.precomputed:
            fingerprint = codec.fingerprint_file(checkpoint.mimi_weights())
            return dataset.PrecomputedTokenizer(*common, mimi_fingerprint=fingerprint)
        return dataset.InterleavedTokenizer(*common, mimi=mimi())

    iterate = functools.partial(
        dataset.get_dataset_iterator, delays=kwargs["delays"], dep_q=kwargs["dep_q"], workers=args.data.num_workers
    )
    share = dataset.Share(args.batch_size, world.rank, world.size)
    train_tokenizer = tokenizer_for(windows)
    eval_tokenizer = tokenizer_for(held_out) if held_out else None
    batches = lambda position: iterate(
        windows, train_tokenizer, dataclasses.replace(share, position=position), seed=args.seed,
        shuffle=args.data.shuffle,
    )  # fmt: skip
    eval_batches = lambda: iterate(
        held_out, eval_tokenizer, share, evaluation=True, eval_samples=args.eval_max_samples
    )  # fmt: skip

    # 4. The model: built without memory, sharded, then filled row by row from its file.
    dtype = getattr(torch, args.param_dtype)
    lm = model.build_lm(kwargs, dtype)
    if args.lora.enable:
        lora.add_adapters(lm, args.lora.rank, args.lora.scaling)
    model.set_trainable(lm, args.full_finetuning, args.lora.ft_embed)
    training_lm = TrainingLM(lm, args.gradient_checkpointing)
    shard(training_lm, [*lm.transformer.layers, *lm.depformer.layers], make_mesh(world, args.sharding), dtype)
    training_lm.to_empty(device=world.device)
    model.fill(lm, weights, args.seed)
    optimizer = optim.build_optimizer(lm, args.optim, world.device)

    # 5. The run's folder, and where it stopped.
    folder = checkpointing.open_run(args, world)
    progress = Progress()
    newest = checkpointing.newest_complete(folder, world)
    if newest is not None:
        path, state = newest
        progress = Progress(**{field.name: state[field.name] for field in dataclasses.fields(Progress)})
        checkpointing.load(path, lm, optimizer, progress.step)
        logger.info("going on from %s", path)
    metrics = Metrics(folder, args, world.is_main, progress.step)
    adapters = (args.lora.rank, args.lora.scaling) if args.lora.enable and args.save_adapters else None
    artefact = checkpointing.Artefact(model.inference_config(checkpoint, kwargs), adapters, dtype)

    # 6. The loop.
    with Stop() as stop, contextlib.closing(metrics):
        return train(
            args, world, folder, training_lm, optimizer, batches, eval_batches if held_out else None, artefact,
            progress, metrics, stop,
        )  # fmt: skip


def describe(
    args: TrainArgs, spec: model.Spec, origin: model.Origin, windows: dataset.Windows, window_frames: int, world: World
) -> None:
    """What the run will do, as arithmetic that can be checked."""
    per_step = args.batch_size * args.num_microbatches * world.size
    trained = "all parameters" if args.full_finetuning else f"LoRA rank {args.lora.rank}"
    logger.info("%s: %s", spec.name, origin)
    logger.info("%s, %s, %d process(es) on %s", trained, args.param_dtype, world.size, world.device.type)
    logger.info(
        "%s windows of up to %g s (%d frames), codes %s", f"{len(windows):,}", args.duration_sec, window_frames,
        "pre-computed" if windows.precomputed else "made by Mimi in training",
    )  # fmt: skip
    logger.info(
        "%d x %d x %d = %d windows a step (batch x microbatches x processes), up to %s frames of dialogue",
        args.batch_size, args.num_microbatches, world.size, per_step, f"{per_step * window_frames:,}",
    )  # fmt: skip
    epochs = args.max_steps * per_step / len(windows)
    logger.info("%.1f steps an epoch; %d steps = %.2f epochs", len(windows) / per_step, args.max_steps, epochs)


if __name__ == "__main__":
    run(main)
