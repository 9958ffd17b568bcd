"""Estimate the memory and compute of a run before renting a GPU, and the largest batch that fits.

    python -m finetune.tools.plan config.yaml --gpus 8 --gpu-memory 80
    python -m finetune.tools.plan config.yaml batch_size=4 sharding=none --gpus 2 --price 2.50
    python -m finetune.tools.plan config.yaml --fit 24

Runs the forward and backward pass of a training step on tensors without memory and counts each from its allocation to
its release: on torch's meta device, with the chunk sizes and kernels of a GPU, or for `device: cpu` on fake CPU
tensors. What FSDP gathers, frees and reduces is added. Only the config.json of the model is read (the built-in 7B
configuration if it is not in the hub cache), and the data may not exist yet.

Every window has its full length, duration_sec and for PersonaPlex also prompt.max_sec. --reserve covers what is not
counted: the CUDA context, NCCL and fragmentation.

--fit looks for the settings with which the run fits a card, and prints them as overrides, below their plan. The windows
per step stay; the frozen base is stored as exactly as possible (base_dtype); then what is fastest is taken.

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
from finetune.jobs.bars import show_bars
from finetune.parser import Parser
from finetune.progress import track
from finetune.streams import N_STREAMS
from finetune.tools.plan.fit import DRIVER_GIB, find_fit, usual_tflops
from finetune.tools.plan.sizes import RunSizes, open_sizes

GIB = 2**30
USUAL_PASSES = 15  # that a plan counts


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


def describe_plan(
    sizes: RunSizes, name: str, memory: int, reserve: int, tflops: float, price: float | None
) -> tuple[str, bool]:
    """Return (the plan as text, whether the run fits into `memory` bytes and leaves `reserve` of them free).

    `tflops` is the peak of a GPU, and `price` that of one for an hour (None: no cost is shown).
    """
    args, state, evaluation, flops = sizes.args, sizes.state, sizes.evaluation, sizes.flops()
    own, batch, room = args.recomputation, args.batch_size, memory - reserve
    windows, frames = batch * args.num_microbatches * sizes.ranks, sizes.frames + sizes.prompt_frames
    # false is refused for a quantised base.
    values = [True, *([] if isinstance(own, bool) else [own]), *([False] if args.base_dtype == "bf16" else [])]
    steps = [sizes.step(batch, value) for value in values]
    totals = [sizes.total(batch, value) + reserve for value in values]
    largest = [sizes.largest_batch(room, value) for value in values]
    rows = [
        (f"frozen weights, {args.param_dtype}", state["frozen"]),
        (f"frozen weights, {args.base_dtype}", state["quantised"]),
        ("adapters, float32", state["adapters"]),
        ("trained weights, float32", state["trained weights"]),
        ("AdamW's moments, float32", state["moments"]),
        ("Mimi, which encodes audio in training", state["mimi"]),
        ("peak of a step", *(step.peak for step in steps)),
        ("    activations", *(step.at_peak["activations"] for step in steps)),
        ("      logits and their gradients, at their peak", sizes.logits(batch)),
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
    batches = (f"{size or 'none'}{'+' * (size == sizes.max_batch)}" for size in largest)  # more was not tried
    table = [
        (f"GiB on a rank, batch_size {batch}, gradient_checkpointing:", *(str(value).lower() for value in values)),
        *((label, *map(gib, sums if len(sums) > 1 else sums * len(values))) for label, *sums in rows if any(sums)),
        (f"fits {memory / GIB:g} GiB", *("yes" if total <= memory else "no" for total in totals)),
        ("largest batch_size that fits", *batches),
    ]
    chosen = [repr(value) for value in values].index(repr(own))  # true is not 1 here
    verdict = f"batch_size {batch} does not fit {memory / GIB:g} GiB"
    if totals[chosen] <= memory:
        verdict = f"fits {memory / GIB:g} GiB"
        layers = 0 if own is False or args.device == "cpu" else sizes.most_kept(room, batch)
        if layers > own:
            share = sizes.step_sec(batch, layers, tflops=tflops) / sizes.step_sec(batch, own, tflops=tflops)
            verdict += f"; so would gradient_checkpointing: {layers}, in {share:.0%} of the time"
    elif largest[chosen]:
        verdict += f"; {largest[chosen]} would"
    elif largest[0]:
        verdict += f"; {largest[0]} with gradient_checkpointing: true would"
    elif state.total() + sizes.step(1, own).peak <= room:
        verdict += ", nor does the free-running evaluation (eval_free_samples: 0 leaves it out)"
    else:
        less = "a smaller lora.rank" if args.lora.enable else "LoRA"
        verdict += ", nor does 1" * (batch > 1) + f": use more ranks, {less} or shorter windows"
    lines = [
        f"{name} on {sizes.ranks} {'CPU' if args.device == 'cpu' else 'GPU'} ranks, sharding {args.sharding}: "
        f"parameters in {sizes.shards} shards",
        f"{sizes.parameters:,} parameters, {sizes.trained:,} trained ({sizes.trained / sizes.parameters:.2%})",
        f"a step: {batch} x {args.num_microbatches} x {sizes.ranks} windows (batch x microbatches x ranks) "
        f"of {frames:,} frames ({sizes.prompt_frames} of prompt) = {windows * frames:,} frames, "
        f"{windows * frames * N_STREAMS:,} tokens",
        "PFLOP per step: " + ", ".join(f"{kind} {count / 1e15:.4g}" for kind, count in flops.items()),
        *describe_hours(sizes.step_sec(batch, own, tflops=tflops), args.max_steps, sizes.ranks, price),
        "",
        *(f"{label:<58}" + "".join(f"{cell:>10}" for cell in cells) for label, *cells in table),
        "",
        verdict,
    ]
    return "\n".join(lines), totals[chosen] <= memory


def describe_hours(step_sec: float, steps: int, gpus: int, price: float | None) -> list[str]:
    """Return lines: the time of a step and of all, and what they cost (price of one GPU for an hour; None: no cost)."""
    hours = step_sec * steps / 3600
    cost = [] if price is None else [f"cost at {price:g} per GPU and hour: {hours * gpus * price:,.2f}"]
    return [
        f"hours of all steps: {hours:.1f}, {step_sec:.2f} s each", *cost,
        "    (by what an H100 was measured to reach, in proportion to --tflops; for windows of full length, without "
        "evaluations and checkpoints)",
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("config", help="YAML file of settings, the same as for training")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings in place of the file's")
    parser.add_argument("--gpus", type=int, default=1, help="ranks on all nodes together")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="sharding: hybrid shards within a node")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="memory of one GPU in GiB")
    parser.add_argument(
        "--fit", type=float, metavar="GB",
        help=f"find settings for GPUs of this size ({DRIVER_GIB} GiB are left to the driver); replaces --gpu-memory",
    )  # fmt: skip
    parser.add_argument("--reserve", type=float, default=3.0, help="GiB of it to keep free")
    parser.add_argument(
        "--tflops", type=float, help="peak of one GPU in bfloat16; if absent, that of a usual card of its memory"
    )
    parser.add_argument("--price", type=float, help="of one GPU for an hour: also say what the run costs")
    parser.add_argument(
        "--personaplex", action=argparse.BooleanOptionalAction,
        help="plan for train_personaplex.py; if absent: if there are prompt settings or the model has 16 codebooks",
    )  # fmt: skip
    given = parser.parse_args(argv)
    if given.tflops is None:
        given.tflops = usual_tflops(given.gpu_memory if given.fit is None else given.fit)
    if given.fit is not None:
        given.gpu_memory = given.fit - DRIVER_GIB
    if min(given.gpus, given.gpus_per_node) < 1:
        raise UserError(f"--gpus {given.gpus}, --gpus-per-node {given.gpus_per_node}: must be at least 1")
    if not 0 <= given.reserve < given.gpu_memory < math.inf:
        what = f"--gpu-memory {given.gpu_memory:g}" if given.fit is None else f"--fit {given.fit:g}"
        least = f"--reserve {given.reserve:g}" + f" and {DRIVER_GIB} for the driver" * (given.fit is not None)
        raise UserError(f"{what}: must be more than {least}")
    if not given.tflops > 0 or not (given.price is None or 0 <= given.price < math.inf):
        raise UserError(f"--tflops {given.tflops:g}, --price {given.price or 0:g}: must be above 0, and not negative")
    memory, reserve = int(given.gpu_memory * GIB), int(given.reserve * GIB)
    show_bars()

    def open_with(more: list[str]) -> tuple[RunSizes, str, list[str]]:
        args, live, notes = read_plan_settings(given.config, [*given.overrides, *more])
        sizes, name, more_notes = open_sizes(args, live, given.personaplex, given.gpus, given.gpus_per_node)
        return sizes, name, notes + more_notes

    room = memory - reserve
    found = [] if given.fit is None else find_fit(lambda more: open_with(more)[0], room, given.tflops)
    if found is None:
        print(f"{given.config}: fits a card of {given.fit:g} GB with none of the settings that were tried")
        return 1
    sizes, name, notes = open_with(found)
    if sizes.args.gradient_checkpointing == "auto":
        layers = sizes.most_kept(room, sizes.args.batch_size)
        notes.append(f"gradient_checkpointing is auto, with which a run measures what fits; planned: {max(layers, 0)}")
        sizes, name, _ = open_with([*found, f"gradient_checkpointing={max(layers, 0)}"])
    args = sizes.args
    with contextlib.suppress(UserError):  # the data may not be there yet
        drawn = args.max_steps * args.batch_size * args.num_microbatches * given.gpus
        notes += filter(None, [many_epochs(open_windows(args.data.train_data, to_frames(args.duration_sec)), drawn)])
    passes = [1] * USUAL_PASSES
    with track("counting", len(passes)) as advance:
        sizes.counted = lambda: advance(passes.pop() if passes else 0)
        text, fits = describe_plan(sizes, name, memory, reserve, given.tflops, given.price)
    print("\n".join([*(f"note: {note}" for note in notes), text, *(["", " ".join(found)] if found else [])]))
    return int(not fits)
