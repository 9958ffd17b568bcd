"""Generate free-running replies: the model listens to a user and speaks, as it does in a server.

    python -m finetune.tools.generate runs/personaplex --user-wav in.wav --voice NATF2 \
        --text-prompt "You enjoy having a good conversation." --out out.wav
    python -m finetune.tools.generate runs/personaplex --user-wav users/*.wav --out replies --text replies

Reads the users, and a model: a run folder (its best checkpoint), one of its checkpoints, or full weights (a hub
repository or a folder). Writes a wav for each user, the agent on the left and the user on the right, and with --text a
JSON with the agent's words and their times.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from moshi.models import MimiModel

from finetune.audio.codec import encode_audio
from finetune.audio.codes import fingerprint_mimi
from finetune.audio.files import SAMPLE_RATE, probe_audio, read_audio, write_conversation
from finetune.cli import UserError, run
from finetune.dialogue import spoken_words
from finetune.distributed import multiplies_bfloat16, pick_device
from finetune.files import replacing
from finetune.generate import Sampling, decode_codes, generate
from finetune.jobs.bars import Bar, show_bars
from finetune.model.inference import load_merged
from finetune.model.stored import INFERENCE_DTYPES, StoredModel, open_stored
from finetune.parser import Parser
from finetune.progress import track, tracked
from finetune.prompts.embedded import embed_column
from finetune.prompts.hybrid import SystemPrompt, build_prompt
from finetune.prompts.recordings import warn_of_unserved
from finetune.prompts.text import wrap_system_prompt
from finetune.prompts.voices import VoiceBook, load_voices
from finetune.streams import DEP_Q


def main() -> None:
    args = _parse()
    source = open_stored(args.checkpoint, args.base)
    wavs = [_output_path(args.out, path, args, ".wav") for path in args.user_wav]
    if len(set(wavs)) < len(wavs):
        raise UserError(f"--user-wav: files of the same name would both become {max(wavs, key=wavs.count)}; rename one")
    if wavs[0].suffix != ".wav":
        raise UserError(f"--out {args.out}: a reply is a wav, so its name must end in .wav")
    texts = [_output_path(args.text, path, args, ".json") for path in args.user_wav] if args.text else []
    inputs = {Path(path).resolve() for path in (*args.user_wav, args.voice) if path}
    if lost := [str(path) for path in (*wavs, *texts) if path.resolve() in inputs]:
        raise UserError(f"--out {args.out}: would overwrite the recording {lost[0]}; name another file or folder")
    for path, wav in zip(args.user_wav, wavs):  # before the weights are read
        if probe_audio(path).duration_sec == 0:
            raise UserError(f"--user-wav {path}: holds no sound; record it again")
        wav.parent.mkdir(parents=True, exist_ok=True)
    show_bars()
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # moshi captures CUDA graphs on the current device, wherever its tensors are
    mimi = source.checkpoint.mimi(device)
    tokenizer = source.checkpoint.tokenizer()
    prompt = _build_prompt(args, source, mimi, tokenizer)
    dtype = INFERENCE_DTYPES[args.dtype or ("bf16" if multiplies_bfloat16(device) else "fp32")]
    lm = load_merged(source, device, dtype, base_dtype=args.base_dtype)
    sampling = Sampling(args.greedy, args.temp, args.temp_text, args.top_k, args.top_k_text)
    starts = range(0, len(wavs), args.batch_size)
    for start in tracked(starts, "groups of users", len(starts)):
        paths = args.user_wav[start : start + args.batch_size]
        users = [np.pad(read_audio(path)[-1], (0, int(args.tail_sec * SAMPLE_RATE))) for path in paths]
        with track("encoding users", sum(map(len, users))) as advance:
            heard = encode_audio(mimi, users, advance=advance)
        replies = generate(lm, [prompt] * len(users), heard, sampling, args.seed + start)
        agents = decode_codes(mimi, [reply.codes for reply in replies])
        for path, wav, user, agent, reply in zip(paths, wavs[start:], users, agents, replies):
            write_conversation(wav, agent, user)
            words = spoken_words(reply.text, tokenizer)
            Bar.write(f"{wav}: {' '.join(word for word, _, _ in words) or '(no words)'}")
            sys.stdout.flush()
            if args.text:
                target = _output_path(args.text, path, args, ".json")
                target.parent.mkdir(parents=True, exist_ok=True)
                with replacing(target) as temporary:
                    temporary.write_text(json.dumps({"user": path, "words": words}, ensure_ascii=False))


def _parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", help="run folder, checkpoint, exported folder or hub repository")
    parser.add_argument("--user-wav", nargs="+", required=True, help="users; of a stereo file, the right channel")
    parser.add_argument("--out", required=True, help="wav to write; a folder for several users")
    parser.add_argument("--text", help="JSON to write the agent's words to; a folder for several users")
    parser.add_argument("--voice", help="voice prompt: a mono recording, a .pt or a shipped name")
    parser.add_argument("--voices-dir", type=Path, help="folder of voices; without it, the repository's voices.tgz")
    parser.add_argument("--text-prompt", default="", help="the role; wrapped in <system> tags")
    parser.add_argument("--tail-sec", type=float, default=4.0, help="silence after the user, for the answer")
    parser.add_argument("--base", help="repository or folder of the weights that adapters belong to")
    parser.add_argument("--greedy", action="store_true", help="take the most likely token instead of sampling")
    parser.add_argument("--seed", type=int, default=0, help="for sampling")
    parser.add_argument("--temp", type=float, default=Sampling.temp, help="temperature of audio tokens")
    parser.add_argument("--temp-text", type=float, default=Sampling.temp_text, help="temperature of text tokens")
    parser.add_argument("--top-k", type=int, default=Sampling.top_k, help="sample audio from the k most likely tokens")
    parser.add_argument("--top-k-text", type=int, default=Sampling.top_k_text, help="the same for text")
    parser.add_argument("--batch-size", type=int, default=8, help="users at once; at 7B each takes 0.5 MB a frame")
    parser.add_argument("--dtype", choices=INFERENCE_DTYPES, help="default: bf16; fp32 on a CPU without bf16 products")
    parser.add_argument(
        "--base-dtype", choices=("bf16", "int8", "nf4"), default="bf16",
        help="int8 or nf4: quantise the weights as training with this base_dtype does; servers do not",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    args = parser.parse_args()
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be at least 1")
    for name in ("tail_sec", "temp", "temp_text", "top_k", "top_k_text"):
        value = getattr(args, name)
        if not 0 <= value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {value:g}: must be at least 0, and finite")
    return args


def _output_path(given: str, user: str, args: argparse.Namespace, suffix: str) -> Path:
    several = len(args.user_wav) > 1 or Path(given).is_dir()
    return Path(given) / (Path(user).stem + suffix) if several else Path(given)


def _build_prompt(
    args: argparse.Namespace, source: StoredModel, mimi: MimiModel, tokenizer: sentencepiece.SentencePieceProcessor
) -> SystemPrompt | None:
    text = wrap_system_prompt(args.text_prompt)
    if source.kwargs["dep_q"] != DEP_Q:
        if text or args.voice:
            raise UserError(f"{args.checkpoint}: a Moshi of 8 codebooks has no prompts; drop --voice and --text-prompt")
        return None
    voice = None
    if args.voice:
        path = VoiceBook(args.voices_dir, source.voices_archive, setting="--voices-dir").find(args.voice, Path.cwd())
        embed, delays = functools.partial(embed_column, source.read), source.kwargs["delays"]
        fingerprint = lambda: fingerprint_mimi(mimi)
        voice = load_voices([path], lambda: mimi, fingerprint, embed, delays, trains_embeddings=False)[path]
        warn_of_unserved([path])
    return build_prompt(voice, tokenizer.encode(text, add_bos=False, add_eos=False))


if __name__ == "__main__":
    run(main)
