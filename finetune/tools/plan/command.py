"""Estimate the memory and compute of a run before renting a GPU, and the largest batch that fits.

    python -m finetune.tools.plan config.yaml --gpus 8 --gpu-memory 80
    python -m finetune.tools.plan config.yaml batch_size=4 sharding=none --gpus 2

Runs the forward and backward pass of a training step on tensors without memory and counts each from its allocation to
its release: on torch's meta device, with the chunk sizes and flash attention of a GPU, or for `device: cpu` on fake CPU
tensors. What FSDP gathers, frees and reduces is added. Only the config.json of the model is read (the built-in 7B
configuration if it is not in the hub cache), and the data may not exist yet.

Every window has its full length, duration_sec and for PersonaPlex also prompt.max_sec. --reserve covers what is not
counted: the CUDA context, NCCL and fragmentation.

Prints a table, and writes nothing. Exit code 0: the run fits. 1: it does not. 2: the config cannot be used.
"""

import argparse
import contextlib
import json
import math
from pathlib import Path

from finetune.args import TrainArgs
from finetune.audio.files import to_frames
from finetune.cli import UserError
from finetune.config import load_args, parse_yaml
from finetune.data.manifest import parse_sources, read_manifest
from finetune.data.windows import many_epochs, open_windows
from finetune.parser import Parser
from finetune.streams import N_STREAMS
from finetune.tools.plan.sizes import RunSizes, open_sizes

GIB = 2**30


def read_plan_settings(config: str, overrides: list[str]) -> tuple[TrainArgs, bool, list[str]]:
    """Return (settings, whether training encodes audio, notes). Missing manifests count as pre-computed.

    Raises UserError for all other problems.
    """
    notes, live, data = [], False, {}
    with contextlib.suppress(Exception):  # load_args reports what is wrong with the file
        data = dict(parse_yaml(Path(config).read_text())["data"])
    data |= {key.removeprefix("data."): value for key, _, value in (o.partition("=") for o in overrides)}
    for key in ("train_data", "eval_data"):
        try:
            sources = parse_sources(str(data.get(key) or ""))
        except UserError as error:
            if "no such manifest" in str(error):
                notes.append(f"data.{key}: {error}; it is assumed to be pre-computed")
                overrides = [*overrides, f"data.{key}={json.dumps(str(config))}"]  # any file that exists
            continue
        for path, _ in sources:
            first = next(read_manifest(path, []), None)
            live |= first is not None and "codes_path" not in first.fields
    return load_args(config, overrides), live, notes


def describe_plan(sizes: RunSizes, name: str, memory: int, reserve: int) -> tuple[str, bool]:
    """Return (the plan as text, whether the run fits into `memory` bytes and leaves `reserve` of them free)."""
    args, state, evaluation, flops = sizes.args, sizes.state, sizes.evaluation, sizes.flops()
    windows, frames = args.batch_size * args.num_microbatches * sizes.ranks, sizes.frames + sizes.prompt_frames
    steps = [sizes.step(args.batch_size, checkpointing) for checkpointing in (True, False)]
    totals = [sizes.total(args.batch_size, checkpointing) + reserve for checkpointing in (True, False)]
    largest = [sizes.largest_batch(memory - reserve, checkpointing) for checkpointing in (True, False)]
    rows = [
        (f"frozen weights, {args.param_dtype}", state["frozen"]),
        (f"frozen weights, {args.base_dtype}", state["quantised"]),
        ("adapters, float32", state["adapters"]),
        ("trained weights, float32", state["trained weights"]),
        ("AdamW's moments, float32", state["moments"]),
        ("Mimi, which encodes audio in training", state["mimi"]),
        ("peak of a step", *(step.peak for step in steps)),
        ("    activations", *(step.at_peak["activations"] for step in steps)),
        ("      logits and their gradients, at their peak", sizes.logits(args.batch_size)),
        ("    layers gathered by FSDP, and its buffers", *(step.at_peak["gathered"] for step in steps)),
        ("    gradients, float32", *(step.at_peak["gradients"] for step in steps)),
        ("or peak of a free-running evaluation", evaluation.total()),
        (f"    parameters gathered, {args.param_dtype}", evaluation["gathered"]),
        ("    weights dequantised for a layer", evaluation["dequantised"]),
        (f"    caches of {args.eval_free_samples} conversations", evaluation["caches"]),
        ("reserve", reserve),
        ("sum: what stays, the higher peak, reserve", *totals),
    ]
    gib = lambda size: f"{size / GIB:.2f}" if size >= 0.1 * GIB else f"{size / GIB:.2g}"
    batches = (f"{batch or 'none'}{'+' * (batch == sizes.max_batch)}" for batch in largest)  # more was not tried
    table = [
        (f"GiB on a rank, batch_size {args.batch_size}", "checkpointing", "without"),
        *((label, gib(sums[0]), gib(sums[-1])) for label, *sums in rows if any(sums)),
        (f"fits {memory / GIB:g} GiB", *("yes" if total <= memory else "no" for total in totals)),
        ("largest batch_size that fits", *batches),
    ]
    chosen = 0 if args.gradient_checkpointing else 1
    verdict = f"batch_size {args.batch_size} does not fit {memory / GIB:g} GiB"
    if totals[chosen] <= memory:
        verdict = f"fits {memory / GIB:g} GiB"
    elif largest[chosen]:
        verdict += f"; {largest[chosen]} would"
    elif largest[0]:
        verdict += f"; {largest[0]} with gradient_checkpointing: true would"
    elif state.total() + sizes.step(1, args.gradient_checkpointing).peak + reserve <= memory:
        verdict += ", nor does the free-running evaluation (eval_free_samples: 0 leaves it out)"
    else:
        less = "a smaller lora.rank" if args.lora.enable else "LoRA"
        verdict += ", nor does 1" * (args.batch_size > 1) + f": use more ranks, {less} or shorter windows"
    lines = [
        f"{name} on {sizes.ranks} {'CPU' if args.device == 'cpu' else 'GPU'} ranks, sharding {args.sharding}: "
        f"parameters in {sizes.shards} shards",
        f"{sizes.parameters:,} parameters, {sizes.trained:,} trained ({sizes.trained / sizes.parameters:.2%})",
        f"a step: {args.batch_size} x {args.num_microbatches} x {sizes.ranks} windows (batch x microbatches x ranks) "
        f"of {frames:,} frames ({sizes.prompt_frames} of prompt) = {windows * frames:,} frames, "
        f"{windows * frames * N_STREAMS:,} tokens",
        "PFLOP per step: " + ", ".join(f"{kind} {count / 1e15:.4g}" for kind, count in flops.items()),
        "",
        *(f"{label:<54}{on:>14}{off:>10}" for label, on, off in table),
        "",
        verdict,
    ]
    return "\n".join(lines), totals[chosen] <= memory


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("config", help="YAML file of settings, the same as for training")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings in place of the file's")
    parser.add_argument("--gpus", type=int, default=1, help="ranks on all nodes together")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="sharding: hybrid shards within a node")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="memory of one GPU in GiB")
    parser.add_argument("--reserve", type=float, default=3.0, help="GiB of it to keep free")
    parser.add_argument(
        "--personaplex", action=argparse.BooleanOptionalAction,
        help="plan for train_personaplex.py; if absent: if there are prompt settings or the model has 16 codebooks",
    )  # fmt: skip
    given = parser.parse_args(argv)
    if min(given.gpus, given.gpus_per_node) < 1:
        raise UserError(f"--gpus {given.gpus}, --gpus-per-node {given.gpus_per_node}: must be at least 1")
    if not 0 <= given.reserve < given.gpu_memory < math.inf:
        raise UserError(f"--gpu-memory {given.gpu_memory:g}: must be more than --reserve {given.reserve:g}")
    args, live, notes = read_plan_settings(given.config, given.overrides)
    sizes, name, more_notes = open_sizes(args, live, given.personaplex, given.gpus, given.gpus_per_node)
    with contextlib.suppress(UserError):  # the data may not be there yet
        drawn = args.max_steps * args.batch_size * args.num_microbatches * given.gpus
        notes += filter(None, [many_epochs(open_windows(args.data.train_data, to_frames(args.duration_sec)), drawn)])
    text, fits = describe_plan(sizes, name, int(given.gpu_memory * GIB), int(given.reserve * GIB))
    print("\n".join([*(f"note: {note}" for note in notes + more_notes), text]))
    return int(not fits)
