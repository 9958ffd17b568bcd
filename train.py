"""Fine-tune Moshi. `run_training` puts a run together, top to bottom, for this script and for train_personaplex.py."""

import finetune  # noqa: F401  # isort: skip  (first: from here on Ctrl-C ends in one line)

import contextlib
import logging
import os

import torch

from finetune import loop
from finetune.args import TrainArgs
from finetune.audio.codes import audio_fingerprint
from finetune.checkpointing import load_checkpoint, newest_complete
from finetune.cli import UserError, run_fire
from finetune.config import load_args
from finetune.data.run_data import RunData
from finetune.data.windows import many_epochs
from finetune.distributed import World, make_mesh, multiplies_bfloat16, session, shard
from finetune.metrics import Metrics
from finetune.model.adapters import StoredAdapters
from finetune.model.build import StoredWeights, build_lm, check_memory, load_weights, make_trainable
from finetune.model.consolidated import Artefact, inference_config
from finetune.model.pretrained import MOSHI, ModelSpec, Pretrained, lm_kwargs
from finetune.model.quantised import refuse_shards
from finetune.model.training_lm import TrainingLM
from finetune.optim import Schedule, build_optimizer
from finetune.run_dir import check_run_dir, open_run
from finetune.streams import N_STREAMS
from finetune.training_run import Progress, Stop, TrainingRun

logger = logging.getLogger("train")
CUBLAS_WORKSPACES = (":4096:8", ":16:8")  # docs.nvidia.com/cuda/cublas, "Results reproducibility"


def train(config: str, *overrides: str) -> int:
    """Fine-tune Moshi on recorded dialogues.

    python train.py config.yaml
    torchrun --nproc-per-node 8 train.py config.yaml optim.lr=2e-6 run_dir=runs/lower_rate

    A config needs at least data, a folder, and what is trained:

        data: {train_data: data/train.jsonl, eval_data: data/eval.jsonl}
        run_dir: runs/first
        lora: {enable: true}

    Reads the manifests data.train_data and data.eval_data, and a model from the hub or a folder (moshi_paths).
    Writes checkpoints, metrics and samples to run_dir. The same command continues a run that was stopped.

    Exit codes:
      0   the run is complete, or Ctrl-C stopped it after a step
      2   settings, data or model cannot be used; the last line says why
      3   the guard has ended it: guard.action is stop, or there were too many rollbacks
      75  a signal (SLURM's, say) stopped it after a saved step: run the same command again

    Args:
        config: YAML file of settings. All settings are listed below.
        overrides: Settings that replace those of the file, as key.subkey=value.
    """
    return launch(MOSHI, config, overrides)


def launch(spec: ModelSpec, config: str, overrides: tuple[str, ...]) -> int:
    """Read the settings, join the processes of the run, and train. Returns the exit code."""
    args = load_args(config, overrides)
    if args.deterministic:
        compute_deterministically()
    with session(args.device) as world:
        form = "%(asctime)s %(message)s" if world.is_main else f"[rank {world.rank}] %(message)s"
        level = logging.INFO if world.is_main else logging.WARNING
        logging.basicConfig(level=level, format=form, datefmt="%H:%M:%S", force=True)
        return run_training(args, spec, world)


def compute_deterministically() -> None:
    """Make each computation on a GPU give the same bits every time. Call this before CUDA is used.

    Of the attention kernels, torch then leaves out cuDNN's, and runs the backward passes of the other two without
    atomic additions. Raises UserError if the environment has a setting of cuBLAS that prevents it.
    """
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES[0])
    if workspace not in CUBLAS_WORKSPACES:
        raise UserError(
            f"deterministic: the environment sets CUBLAS_WORKSPACE_CONFIG={workspace}, with which cuBLAS may add in "
            f"another order each time; set {' or '.join(CUBLAS_WORKSPACES)}, or unset it"
        )
    torch.use_deterministic_algorithms(True)  # an operation that has no deterministic form raises an error
    torch.utils.deterministic.fill_uninitialized_memory = False  # helps to debug only; FSDP allocates in every layer
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def run_training(args: TrainArgs, spec: ModelSpec, world: World) -> int:
    """Put a run together and train. Cheap checks come first, and the folder of the run is modified last."""
    # moshi passes its norms and gatings to torch.compile on first use. That starts inductor, which takes 40 s on a CPU,
    # and under FSDP on B200 it fails: "expected size 128==128, stride 1250==1280 at dim=0". So nothing is compiled.
    torch._dynamo.config.disable = True
    torch.manual_seed(args.seed)
    check_run_dir(args)
    refuse_shards(args.base_dtype, args.sharding, world.size)

    # 1. Find the files of the model. Step 3 reads their values; here only headers are read.
    paths = vars(args.moshi_paths) | {"hf_repo_id": args.moshi_paths.hf_repo_id or spec.default_repo}
    checkpoint = Pretrained(**paths)
    if checkpoint.raw_config.get("lora"):
        raise UserError(
            f"{checkpoint.source}: holds adapters, but training needs complete weights; merge them first with "
            "`python -m finetune.tools.export ... --merge`"
        )
    kwargs = lm_kwargs(checkpoint, spec)
    weights = StoredWeights(checkpoint.moshi_weights(), kwargs["dep_q"])
    adapters = StoredAdapters(args.lora.start_from) if args.lora.start_from else None
    files = (weights.file.path, checkpoint.mimi_weights(), checkpoint.tokenizer_path())
    identity = {"moshi_paths": ",".join(map(audio_fingerprint, files)), "lora.start_from": ""}
    if adapters is not None:
        adapters.check_base(identity["moshi_paths"])
        identity["lora.start_from"] = audio_fingerprint(adapters.file.path)

    # 2. Open the data. A bad manifest or prompt ends the run here, before 16 GB of weights are read.
    data = RunData(args, spec.prompts, checkpoint, kwargs, weights.file.read, world)
    if world.is_main:
        describe(args, spec, weights, data, world)

    # 3. Build the model without memory and shard it first, so that each rank allocates and reads only its shard.
    dtype = getattr(torch, args.param_dtype)
    lm = build_lm(kwargs, dtype)
    make_trainable(lm, args)
    training_lm = TrainingLM(lm, args.recomputation)
    shard(training_lm, [*lm.transformer.layers, *lm.depformer.layers], make_mesh(world, args.sharding), dtype)
    frames = args.batch_size * data.train.mean_frames
    check_memory(lm, world.device, world.local_size, frames, args.data.num_workers)
    training_lm.to_empty(device=world.device)
    load_weights(lm, weights, args.seed, world.gather)
    if adapters is not None:
        adapters.load(lm, args.seed)
        logger.info("starting from the adapters in %s", adapters)
    optimizer = build_optimizer(lm, args.optim)

    # 4. Open the folder of the run, and continue from its newest checkpoint if there is one.
    with open_run(args, world, identity | data.identity()) as folder, Stop() as stop, contextlib.closing(data):
        progress = Progress()
        if newest := newest_complete(folder, world):
            path, state = newest
            progress = Progress.of(state)
            load_checkpoint(path, lm, optimizer, progress.step)
            logger.info("continuing from %s", path)
            warn_of_changes(state, args, data, world)
            if progress.step < args.max_steps:
                progress.schedule = continue_schedule(progress, args)

        # 5. Decide what each checkpoint offers for inference: adapters, or complete (merged) weights.
        scaling = args.lora.scaling if args.lora.enable and args.save_adapters else None
        artefact = Artefact(inference_config(checkpoint, kwargs), scaling, dtype)

        # 6. Train.
        with contextlib.closing(Metrics(folder, args, world.is_main, progress.step)) as metrics:
            parts = training_lm, optimizer, data, artefact, progress, metrics, stop, weights
            return loop.train(TrainingRun(args, world, folder, *parts))


def continue_schedule(progress: Progress, args: TrainArgs) -> Schedule | None:
    """Return the schedule of the learning rate of a run that continues: the stored one, or, if max_steps or the shape
    has changed, one that begins at the present rate."""
    stored = progress.schedule
    if stored is None or (stored.max_steps, stored.shape) == (args.max_steps, args.optim.schedule):
        return stored
    new = stored.continued(progress.step, args.optim, args.max_steps)
    logger.warning(
        "the learning rate goes on from %.2e, where it is now (%s to step %d, before: %s to step %d)",
        args.optim.lr * new.first, new.shape, new.max_steps, stored.shape, stored.max_steps,
    )  # fmt: skip
    if new.peak < 0.05:
        logger.warning(
            "that is %.1f %% of optim.lr, so little more will be learnt; a schedule of constant or wsd leaves the rate "
            "up for longer runs, and a higher optim.lr raises it", 100 * new.peak,
        )  # fmt: skip
    return new


def warn_of_changes(state: dict, args: TrainArgs, data: RunData, world: World) -> None:
    """Warn if the run continues with other batches or manifests, which is allowed, but changes what it learns."""
    old, new = state.get("windows_per_step"), args.batch_size * args.num_microbatches * world.size
    if old not in (None, new):
        logger.warning("a step had %d windows so far and has %d from now on, at the same learning rate", old, new)
    old, new = state.get("windows"), data.train.sizes
    if old not in (None, new):
        logger.warning("the manifests had %s windows until now and have %s: this epoch repeats or skips some", old, new)


def describe(args: TrainArgs, spec: ModelSpec, weights: StoredWeights, data: RunData, world: World) -> None:
    """Log what the run will do, with its arithmetic, so that a mistake shows before the first step."""
    log, frames, windows, steps = logger.info, data.window_frames, len(data.train), args.max_steps
    per_step = args.batch_size * args.num_microbatches * world.size
    what = "all parameters" if args.full_finetuning else f"LoRA rank {args.lora.rank}"
    log("%s: %s", spec.name, weights)
    log("training %s in %s, %d process(es) on %s", what, args.param_dtype, world.size, world.device.type)
    if args.param_dtype == "bfloat16" and not multiplies_bfloat16(world.device):
        logger.warning("this CPU has no bfloat16 products and emulates them slowly: set param_dtype: float32")
    log("%s windows of up to %g s (%d frames x %d streams), %s", f"{windows:,}", args.duration_sec, frames, N_STREAMS,
        "codes precomputed" if data.train.precomputed else "encoded by Mimi during training")  # fmt: skip
    log("%d x %d x %d = %d windows a step (batch x microbatches x processes), up to %s tokens", args.batch_size,
        args.num_microbatches, world.size, per_step, f"{per_step * frames * N_STREAMS:,}")  # fmt: skip
    if data.prompter is not None:
        prompt, longest = args.prompt, data.prompter.max_frames
        log("before each window a prompt of up to %g s (%d frames, at most %.0f %% of a sequence)", prompt.max_sec,
            longest, 100 * longest / (longest + frames))  # fmt: skip
        log("%d recorded or .pt voices; %.0f %% of the windows lose their text prompt, %.0f %% their voice prompt",
            len(data.prompter.voices), 100 * prompt.drop_text, 100 * prompt.drop_voice)  # fmt: skip
        without = 1 - (1 - data.voiceless_share) * (1 - prompt.drop_voice)
        log("%.1f %% of the windows are without a voice (%.1f %% before prompt.drop_voice)", 100 * without,
            100 * data.voiceless_share)  # fmt: skip
    log("%.1f steps per epoch; %d steps = %.2f epochs", windows / per_step, steps, steps * per_step / windows)
    if sentence := many_epochs(data.train, steps * per_step):
        logger.warning("WARNING: %s: lower max_steps, or add data", sentence)


if __name__ == "__main__":
    run_fire(train)
