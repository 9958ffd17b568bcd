"""Export a checkpoint as a folder for servers and the hub: weights, config.json, Mimi, tokenizer and model card.

    python -m finetune.tools.export CHECKPOINT OUT --format moshi            adapters stay adapters, and name their base
    python -m finetune.tools.export CHECKPOINT OUT --format moshi --merge    full weights, for Kyutai's server
    python -m finetune.tools.export CHECKPOINT OUT --format personaplex      full weights, for NVIDIA's runtime
    python -m finetune.tools.export --expand MOSHI OUT                       a Moshi with 16 codebooks instead of 8

CHECKPOINT is a run folder (its best checkpoint is exported), one of its checkpoints, an exported folder or a hub
repository. NVIDIA's runtime cannot load adapters, so --format personaplex always merges them. Adapters that were
trained on Moshi weights with train_personaplex.py need weights that --expand wrote.

Weights are read, merged and written one tensor at a time, in the fused layout that both publishers use.
"""

import time
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from finetune.cli import UserError
from finetune.jobs.bars import show_bars
from finetune.model.stored import INFERENCE_DTYPES, open_stored
from finetune.parser import Parser
from finetune.tools.export.folder import export_model, push_to_hub


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("source", metavar="CHECKPOINT", help="what to export")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; new or empty")
    parser.add_argument("--format", choices=("moshi", "personaplex"), help="Kyutai's (moshi) or NVIDIA's runtime")
    parser.add_argument("--merge", action="store_true", help="add adapters to the weights")
    parser.add_argument("--expand", action="store_true", help="make 16 codebooks of 8")
    parser.add_argument("--dtype", choices=INFERENCE_DTYPES, default="bf16", help="of the weights that are written")
    parser.add_argument("--base", metavar="REPO_OR_FOLDER", help="base weights of adapters, if not as stored with them")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="also upload OUT; a new repository is private")
    args = parser.parse_args()
    if args.expand and (args.format or args.merge or args.base):
        raise UserError("--expand stands alone, without --format, --merge and --base")
    if not args.expand and not args.format:
        raise UserError("name the runtime: --format moshi or --format personaplex (or --expand)")
    if args.push_to_hub:
        try:
            validate_repo_id(args.push_to_hub)
        except HFValidationError as error:
            raise UserError(f"--push-to-hub {args.push_to_hub}: {error}") from None

    source = open_stored(args.source, args.base, args.expand)
    runtime = "personaplex" if args.expand else args.format
    merge = args.merge or runtime == "personaplex"
    if source.choice:
        print(f"checkpoint: {source.choice}")
    print(f"weights: {source.weights}")
    if source.adapters is not None:
        reason = " (NVIDIA's runtime has no LoRA)" if runtime == "personaplex" else ""
        action = f"merged{reason}" if merge else "kept as adapters"
        print(f"adapters: {source.adapters.path}, rank {source.rank}, {action}")
    if args.push_to_hub and not merge and source.adapters is not None and source.base.startswith("file://"):
        raise UserError(
            f"{args.source}: its base is only on this machine ({source.base}), so the adapters are of no use on the "
            "hub; use --merge, or give the base's repository as --base"
        )
    show_bars()
    began = time.perf_counter()
    config = export_model(source, args.out, runtime, merge, INFERENCE_DTYPES[args.dtype])
    seconds = time.perf_counter() - began
    files = sorted(args.out.iterdir())
    size = sum(path.stat().st_size for path in files) / 1e9
    print(f"wrote {args.out} ({', '.join(path.name for path in files)}): {size:.2f} GB in {seconds:.1f} s")
    if config.get("lora"):
        print(f"the adapters need {config['moshi_name']}")
    if args.push_to_hub:
        print(f"uploaded to {push_to_hub(args.out, args.push_to_hub)}")
    print(f"how to run it: {args.out / 'README.md'}")
