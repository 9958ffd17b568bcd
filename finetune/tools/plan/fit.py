"""The settings with which a run fits a card."""

from collections.abc import Callable, Iterator

from finetune.args import LoraArgs, TrainArgs
from finetune.profiling import PEAK_TFLOPS
from finetune.progress import track
from finetune.tools.plan.sizes import RunSizes

DRIVER_GIB = 0.5  # of a card's memory, taken by the driver and the screen
CARDS = {24: "RTX 4090", 32: "RTX 5090", 48: "A100"}  # up to so many GB, what a card computes; more: an H100
RANKS = (32, 16, 8)
SHORTER = (0.75, 0.5, 0.375, 0.25, 0.125)  # of duration_sec
MIN_SEC = 10.0


def usual_tflops(memory: float) -> float:
    """Return the peak of a card with so many GB, in bfloat16."""
    return PEAK_TFLOPS[next((card for size, card in CARDS.items() if memory <= size), "H100")]


def find_fit(open_with: Callable[[list[str]], RunSizes], room: int, tflops: float) -> list[str] | None:
    """Return the overrides, `key=value`, with which a run fits into `room` bytes; None if there are none.

    The windows of a step stay. The frozen base is stored as exactly as possible; with that, the split of the windows
    into microbatches and gradient_checkpointing are the fastest (`RunSizes.step_sec`). Only what does not fit in any
    such way gets fewer adapters, and then shorter windows.

    Args:
        open_with: the sizes of the run with other overrides.
        tflops: the peak of the card.
    """
    given = open_with([])
    windows = given.args.batch_size * given.args.num_microbatches
    batches = [batch for batch in range(1, windows + 1) if windows % batch == 0]
    stages = list(_stages(given.args, given.shards))
    with track("looking for settings", len(stages) + len(batches)) as advance:
        for changes in stages:
            overrides = [f"{key}={value}" for key, value in changes.items()]
            sizes = open_with(overrides)
            advance(1)
            if sizes.total(1, True, windows) <= room:
                break
        else:
            return None
        advance(len(stages) - 1 - stages.index(changes))
        found = []
        for batch in batches:
            value = _checkpointing(sizes, batch, windows, room)
            if value is not None:
                found.append((sizes.step_sec(batch, value, windows, tflops), batch, value))
            advance(1)
    _, batch, value = min(found, key=lambda each: each[0])
    split = [f"batch_size={batch}", f"num_microbatches={windows // batch}"]
    return [*overrides, *split, f"gradient_checkpointing={str(value).lower()}"]


def _checkpointing(sizes: RunSizes, batch: int, windows: int, room: int) -> bool | int | None:
    """Return the fastest gradient_checkpointing that fits; None if none does."""
    layers = sizes.most_kept(room, batch, windows)
    if layers == sizes.layers and sizes.args.base_dtype == "bf16" and sizes.total(batch, False, windows) <= room:
        return False
    return {-1: None, 0: True}.get(layers, layers)


def _stages(args: TrainArgs, shards: int) -> Iterator[dict[str, object]]:
    """Yield what may be changed besides batches and checkpointing: first what is best for learning."""
    changes: dict[str, object] = {}
    if not args.lora.enable:
        yield changes
    for kind in ["bf16", "int8", "nf4"][: 3 if shards == 1 else 1] if args.lora.enable else []:
        yield (changes := {"base_dtype": kind})
    for rank in RANKS:
        if args.lora.enable and rank < args.lora.rank:
            yield (changes := changes | {"lora.rank": rank})
    if args.lora.enable and _adapts_more_than_temporal(args.lora):
        yield (changes := changes | {"lora.targets": "[temporal]"})
    for share in SHORTER:
        if args.duration_sec * share >= MIN_SEC:
            yield changes | {"duration_sec": round(args.duration_sec * share, 2)}


def _adapts_more_than_temporal(lora: LoraArgs) -> bool:
    others = ("depformer.attention", "depformer.gating", "depformer.inputs", "heads.text", "heads.audio")
    return any(map(lora.rank_of, others)) and lora.rank_of("temporal.attention") + lora.rank_of("temporal.gating") > 0
