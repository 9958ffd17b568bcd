"""gradient_checkpointing: auto. How many layers keep their products is decided from the memory that a step has taken.

What is kept changes neither losses nor gradients, so a run may begin by recomputing everything, and each of its starts
may come to another number.
"""

import logging
import os
import re
from pathlib import Path

import torch

from finetune.data.batch import Batch
from finetune.model.layer import TrainingLayer, gatings_of
from finetune.model.training_lm import TrainingLM
from finetune.training_run import TrainingRun

logger = logging.getLogger(__name__)
MARGIN = 0.06  # of the memory, not to be used: for fragmentation, and for what other libraries take later


def choose_layers(run: TrainingRun, steps: int, batches: list[Batch]) -> None:
    """Choose the layers after the second step that this process has taken; the first one allocates AdamW's moments.

    steps: how many it has taken. batches: those of this rank in the step.
    """
    args, model, device = run.args, run.model, run.world.device
    if args.gradient_checkpointing != "auto" or steps > 2 or model.gradient_checkpointing is not True:
        return  # chosen before; after a rollback steps are counted again
    if steps == 1:
        if device.type == "cuda":  # so that the peak is that of a step, not of an evaluation
            torch.cuda.reset_peak_memory_stats(device)
        return
    audio_rows = args.batch_size * run.data.window_frames
    rows = audio_rows + args.batch_size * (run.data.prompter.max_frames if run.data.prompter else 0)
    used, peak, limit = memory_of(device, run.world.local_size)
    longest = max(1.0, rows / max(batch.loss_mask.numel() for batch in batches))
    room = limit - used - int((peak - used) * longest)
    dtype = getattr(torch, args.param_dtype)
    layers = min(run.world.gather(layers_that_fit(model, room, dtype, rows, audio_rows, run.depformer_steps)))
    model.gradient_checkpointing = layers or True
    run.meter.flops_per_frame = None  # is counted again: less is computed from now on
    if run.world.is_main:
        count = len(model.lm.transformer.layers) + len(model.lm.depformer.layers)
        logger.info("gradient_checkpointing: auto: %d of %d layers keep their products; a step took %.1f of %.1f GB",
                    layers, count, peak / 1e9, limit / 1e9)  # fmt: skip


def memory_of(device: torch.device, processes: int) -> tuple[int, int, int]:
    """Return (bytes in use by this process, the most that were, the most that may be): of its GPU, or, on a CPU, of the
    memory that `processes` share."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        limit = free + torch.cuda.memory_reserved(device) - int(MARGIN * total)
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device), limit
    status = Path("/proc/self/status").read_text()
    resident, peak = (1024 * int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) for name in ("VmRSS", "VmHWM"))
    total, free = (os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    return resident, peak, resident + (free - int(MARGIN * total)) // processes


def layers_that_fit(
    model: TrainingLM, room: int, dtype: torch.dtype, rows: int, audio_rows: int, steps: int
) -> int:  # fmt: skip
    """Return how many layers can keep their products in `room` bytes.

    Args:
        dtype: of activations.
        rows: of the temporal transformer, that is frames of a microbatch, prompts included.
        audio_rows: frames that reach the depformer.
        steps: of the depformer.
    """
    count, lm = 0, model.lm
    for layers, own_rows, own_steps in ((lm.transformer.layers, rows, 1), (lm.depformer.layers, audio_rows, steps)):
        size = own_rows * own_steps * kept_bytes(layers[0], dtype, own_steps)
        fitting = min(len(layers), max(0, room) // size) if size else 0
        count, room = count + fitting, room - fitting * size
        if fitting < len(layers):
            break
    return count


def kept_bytes(layer: TrainingLayer, dtype: torch.dtype, steps: int) -> int:
    """Return the bytes of a layer's `Products` for one row and step: q, k and v, the results of attention and of its
    projection, the inputs of the gate, and what the gradient of attention needs: the log-sum-exp of each head, or in
    the depformer its weights, twice."""
    attention, gating, size = layer.self_attn, gatings_of(layer)[0], dtype.itemsize
    per_channel, per_head = 5 * size, 4 if steps == 1 else steps * (4 + size)
    if next(layer.parameters()).device.type == "cpu" and steps == 1 and size < 4:
        per_channel = 4 * 4 + 2 * size  # attention is in float32, and its result is kept twice
    return per_channel * attention.embed_dim + per_head * attention.num_heads + size * gating.linear_in.out_features
