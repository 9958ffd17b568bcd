"""What a run needs, told before a GPU is rented: parameters, FLOPs, memory, and the largest batch that fits.

    python -m finetune.tools.plan config.yaml --gpus 8 --gpu-memory 80
    python -m finetune.tools.plan config.yaml batch_size=4 sharding=none --gpus 2

The training step itself runs, forward and backward, on tensors without memory, and each is counted from its making to
its freeing: on torch's meta device with a GPU's chunk sizes and flash attention, or, with `device: cpu`, on fake CPU
tensors. What FSDP keeps beside them is added where it would gather, free and reduce. Of the model only config.json is
read (the built-in 7B configuration where the hub's is not in the cache). The data need not be there yet.

Every window counts at its longest: duration_sec, and for PersonaPlex prompt.max_sec before it. --reserve stands for
what is not counted: the CUDA context, NCCL, fragmentation, `compile: true`.

Exit code 0: it fits. 1: it does not. 2: the config cannot be used.
"""

import argparse
import contextlib
import json
import math
from pathlib import Path

from finetune.args import TrainArgs
from finetune.cli import Parser, UserError
from finetune.config import load_args, parse_yaml
from finetune.data.manifest import open_manifest, parse_sources
from finetune.streams import N_STREAMS
from finetune.tools.plan.sizes import RunSizes, open_sizes

GIB = 2**30


def read_plan_settings(config: str, overrides: list[str]) -> tuple[TrainArgs, bool, list[str]]:
    """(settings, whether codes are made in training, notes). Manifests that are not there yet count as pre-computed.
    Raises UserError for all other problems."""
    notes, live, given = [], False, {}
    with contextlib.suppress(Exception):  # load_args tells what is wrong with the file
        given = dict(parse_yaml(Path(config).read_text())["data"])
    given |= {key.removeprefix("data."): value for key, _, value in (o.partition("=") for o in overrides)}
    for key in ("train_data", "eval_data"):
        try:
            for path, _ in parse_sources(str(given.get(key) or "")):
                with open_manifest(path) as lines:
                    live |= '"codes_path"' not in next(filter(str.strip, lines), '"codes_path"')
        except UserError as error:
            if "no such manifest" in str(error):
                notes.append(f"data.{key}: {error}; taken as pre-computed")
                overrides = [*overrides, f"data.{key}={json.dumps(str(config))}"]  # any file that is there
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"data.{key}: {path} cannot be read ({error})") from None
    return load_args(config, overrides), live, notes


def describe_plan(sizes: RunSizes, name: str, memory: int, reserve: int) -> tuple[str, bool]:
    """(the plan as text, whether the run fits `memory` bytes, of which `reserve` stay free)."""
    args, state, evaluation, flops = sizes.args, sizes.state, sizes.evaluation, sizes.flops()
    windows, frames = args.batch_size * args.num_microbatches * sizes.ranks, sizes.frames + sizes.prompt_frames
    steps = [sizes.step(args.batch_size, checkpointing) for checkpointing in (True, False)]
    totals = [sizes.total(args.batch_size, checkpointing) + reserve for checkpointing in (True, False)]
    largest = [sizes.largest_batch(memory - reserve, checkpointing) for checkpointing in (True, False)]
    rows = [
        (f"frozen weights, {args.param_dtype}", state["frozen"]),
        ("adapters, float32", state["adapters"]),
        ("trained weights, float32", state["trained weights"]),
        ("AdamW's moments, float32", state["moments"]),
        ("Mimi, which makes codes in training", state["mimi"]),
        ("a step at its fullest point", *(step.peak for step in steps)),
        ("    activations", *(step.fullest["activations"] for step in steps)),
        ("      logits and their gradients, when fullest", sizes.heads(args.batch_size)),
        ("    FSDP's whole layers and buffers", *(step.fullest["gathered"] for step in steps)),
        ("    gradients, float32", *(step.fullest["gradients"] for step in steps)),
        ("or AdamW's update", sizes.update),
        ("or a free-running evaluation", evaluation.total()),
        (f"    what it gathers of the model, {args.param_dtype}", evaluation["whole"]),
        (f"    caches of {args.eval_free_samples} conversations", evaluation["caches"]),
        ("reserve", reserve),
        ("sum: what stays, the fullest of the others, reserve", *totals),
    ]
    shown = lambda size: f"{size / GIB:.2f}" if size >= 0.1 * GIB else f"{size / GIB:.2g}"
    table = [(f"GiB on a rank, batch_size {args.batch_size}", "checkpointing", "without")]
    table += [(label, shown(sums[0]), shown(sums[-1])) for label, *sums in rows if any(sums)]
    table += [
        (f"fits {memory / GIB:g} GiB", *("yes" if total <= memory else "no" for total in totals)),
        (
            "largest batch_size that fits",
            *(f"{batch or 'none'}{' or more' * (batch == sizes.most)}" for batch in largest),
        ),
    ]
    chosen = 0 if args.gradient_checkpointing else 1
    verdict = f"batch_size {args.batch_size} does not fit {memory / GIB:g} GiB"
    if totals[chosen] <= memory:
        verdict = f"fits {memory / GIB:g} GiB"
    elif largest[chosen]:
        verdict += f"; {largest[chosen]} would"
    elif largest[0]:
        verdict += f"; {largest[0]} with gradient_checkpointing: true would"
    elif state.total() + max(sizes.step(1, args.gradient_checkpointing).peak, sizes.update) + reserve <= memory:
        verdict += ", nor does the free-running evaluation (eval_free_samples: 0 leaves it out)"
    else:
        less = "a smaller lora.rank" if args.lora.enable else "LoRA"
        verdict += ", nor does 1" * (args.batch_size > 1) + f": take more ranks, {less} or shorter windows"
    lines = [
        f"{name} on {sizes.ranks} {'CPU' if args.device == 'cpu' else 'GPU'} ranks, sharding {args.sharding}: "
        f"parameters cut in {sizes.shards}",
        f"{sizes.parameters:,} parameters, {sizes.trained:,} trained ({sizes.trained / sizes.parameters:.2%})",
        f"a step: {args.batch_size} x {args.num_microbatches} x {sizes.ranks} windows (batch x microbatches x ranks) "
        f"of {frames:,} frames ({sizes.prompt_frames} of prompt) = {windows * frames:,} frames, "
        f"{windows * frames * N_STREAMS:,} tokens",
        "PFLOP a step: " + ", ".join(f"{kind} {count / 1e15:.4g}" for kind, count in flops.items()),
        "",
        *(f"{label:<54}{on:>14}{off:>10}" for label, on, off in table),
        "",
        verdict,
    ]
    return "\n".join(lines), totals[chosen] <= memory


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("config", help="YAML file of settings, the one that training gets")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings in place of the file's")
    parser.add_argument("--gpus", type=int, default=1, help="ranks, of all nodes together")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="within which sharding: hybrid cuts parameters")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="of one GPU, in GiB")
    parser.add_argument("--reserve", type=float, default=3.0, help="GiB of it that stay free")
    parser.add_argument(
        "--personaplex", action=argparse.BooleanOptionalAction,
        help="for train_personaplex.py; if absent: where the settings speak of prompts or the model has 16 codebooks",
    )  # fmt: skip
    given = parser.parse_args(argv)
    if min(given.gpus, given.gpus_per_node) < 1:
        raise UserError(f"--gpus {given.gpus}, --gpus-per-node {given.gpus_per_node}: must be at least 1")
    if not 0 <= given.reserve < given.gpu_memory < math.inf:
        raise UserError(f"--gpu-memory {given.gpu_memory:g}: must be more than --reserve {given.reserve:g}")
    args, live, notes = read_plan_settings(given.config, given.overrides)
    sizes, name, more = open_sizes(args, live, given.personaplex, given.gpus, given.gpus_per_node)
    text, fits = describe_plan(sizes, name, int(given.gpu_memory * GIB), int(given.reserve * GIB))
    print("\n".join([*(f"note: {note}" for note in notes + more), text]))
    return int(not fits)
