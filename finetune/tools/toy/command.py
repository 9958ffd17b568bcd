"""Make a tiny world to train in: a tiny Moshi in stock layout and synthetic stereo dialogues with word times.

    python -m finetune.tools.toy runs/world --hours 0.5
    python -m finetune.tools.toy runs/other --hours 0.1 --seed 1

Everything is real but small: moshi's LM, moshi's Mimi, a SentencePiece tokenizer, 24 kHz wavs. Each word is a sound of
its own, each voice has its pitch and timbre, and the role named in the text prompt decides what the agent says.

It reads nothing, and writes to the folder OUT that it is given:

OUT/model/  config.json, model.safetensors, mimi.safetensors, mimi_config.json, tokenizer.model
OUT/data/   train.jsonl, eval.jsonl, train/*.wav and eval/*.wav with a .json next to each, voices/*.wav
"""

from pathlib import Path

from finetune.cli import UserError
from finetune.jobs.bars import show_bars
from finetune.parser import Parser
from finetune.tools.toy.corpus import make_corpus
from finetune.tools.toy.model import make_model


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, made if needed")
    parser.add_argument("--hours", type=float, default=0.5, help="of training dialogues")
    parser.add_argument("--seed", type=int, default=0, help="of the LM's weights and of the dialogues")
    args = parser.parse_args()
    if not args.hours > 0:
        raise UserError(f"--hours {args.hours}: must be above 0")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out}: is a file; give a folder")
    show_bars()
    make_model(args.out / "model", args.seed)
    make_corpus(args.out / "data", args.hours, args.seed)
    print(f"wrote {args.out / 'model'} and {args.out / 'data'}")
