"""Free-running replies: the model hears a user and speaks, as it does in a server.

    python -m finetune.generate CHECKPOINT --user-wav in.wav --voice NATF2.pt --text-prompt "You are ..." --out out.wav

CHECKPOINT is a run's folder, one of its checkpoints, or base weights (a hub repository or a folder). The output has the
agent left and the user right. moshi's own `LMGen` does the stepping; prompts are forced through its hooks.

PersonaPlex is run with the first 8 of its 16 depformer steps: the user's codes are given, not guessed, and the
depformer is causal over codebooks, so the other 8 would change nothing.
"""

import json
import wave
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from moshi.models import LMGen, LMModel, MimiModel
from torch import Tensor

from finetune import dialogue, model
from finetune.cli import Parser, UserError, run
from finetune.data import audio, codec
from finetune.data.audio import FRAME_RATE, FRAME_SIZE, SAMPLE_RATE
from finetune.distributed import multiplies_bfloat16, pick_device
from finetune.export import DTYPES, Source, open_source
from finetune.jobs import replacing
from finetune.personaplex import CODEBOOKS, DEP_Q, N_STREAMS, Prompt, build_prompt
from finetune.prompt_text import wrap_system_prompt
from finetune.voices import VoiceBook, load_voices

FREE = -2  # a token that the model may choose (moshi's `ungenerated_token_id`)


@dataclass(frozen=True)
class Sampling:
    """Defaults are those of Kyutai's and NVIDIA's servers (moshi/models/lm.py, LMGen)."""

    greedy: bool = False
    temp: float = 0.8
    temp_text: float = 0.7
    top_k: int = 250
    top_k_text: int = 25


@dataclass
class Reply:
    """What the agent did while it heard T frames of the user.

    text: [T] int64 text tokens; codes: [8, T] int64 Mimi codes.
    """

    text: Tensor
    codes: Tensor


@contextmanager
def listening(lm: LMModel) -> Iterator[None]:
    """`lm` as an inference model with 8 depformer steps, for the length of the block; then as it was."""
    dep_q, training = lm.dep_q, lm.training
    lm.dep_q = CODEBOOKS
    lm.eval()
    try:
        yield
    finally:
        lm.dep_q = dep_q
        lm.train(training)


@torch.no_grad()
def generate(
    lm: LMModel,
    prompts: Sequence[Prompt | None],
    users: Sequence[Tensor],
    sampling: Sampling = Sampling(),
    seed: int | None = 0,
    each_second: Callable[[], None] = lambda: None,
) -> list[Reply]:
    """Replies to several users at once; each is what it would be alone, up to the random numbers it draws.

    Args:
        prompts: one a conversation; None: without. Prompts with embeddings have to be of one length.
        users: [8, T_i] int64 codes of what each user says.
        seed: of torch's generators; None leaves them as they are.
        each_second: called after each second of the dialogues; what it raises ends them.
    """
    if seed is not None:
        torch.manual_seed(seed)
    device, size = lm.device, len(users)
    heads = [torch.empty(N_STREAMS, 0, dtype=torch.int64) if p is None else p.frames for p in prompts]
    lengths = [head.shape[1] + user.shape[1] for head, user in zip(heads, users)]
    # Column c + 1 shows frame c of the semantic streams and frame c - 1 of the acoustic ones, as in training.
    columns = max(lengths) + max(lm.delays) + 1
    forced = torch.full((size, 1 + CODEBOOKS, columns), FREE, dtype=torch.int64)
    heard = torch.full((size, CODEBOOKS, columns), lm.initial_token_id, dtype=torch.int64)
    for i, (head, user) in enumerate(zip(heads, users)):
        for stream in range(1 + CODEBOOKS):
            start = 1 + lm.delays[stream]
            forced[i, stream, start : start + head.shape[1]] = head[stream]
        heard[i, :, 1 : 1 + head.shape[1]] = head[1 + CODEBOOKS :]
        heard[i, :, 1 + head.shape[1] : 1 + lengths[i]] = user
    forced, heard = forced.to(device), heard.to(device)
    said = torch.empty_like(forced)
    column = 0  # that is being predicted

    def force_text(token: Tensor) -> None:  # [B], changed in place
        given = forced[:, 0, column]
        token.copy_(torch.where(given == FREE, token, given))
        said[:, 0, column] = token

    def force_audio(tokens: Tensor) -> None:  # [B, 8], in delayed order, changed in place
        given = forced[:, 1:, column]
        tokens.copy_(torch.where(given == FREE, tokens, given))
        said[:, 1:, column] = tokens

    with listening(lm):
        stepper = LMGen(
            lm, use_sampling=not sampling.greedy, temp=sampling.temp, temp_text=sampling.temp_text,
            top_k=sampling.top_k, top_k_text=sampling.top_k_text, on_text_hook=force_text, on_audio_hook=force_audio,
        )  # fmt: skip
        with stepper.streaming(size):
            first = _replay_embeddings(stepper, prompts)
            for step in range(first, columns - 1):
                column = step + 1
                stepper.step(heard[:, :, step : step + 1])
                if step % int(FRAME_RATE) == 0:
                    each_second()
    said = said.cpu()
    replies = []
    for i, (head, length) in enumerate(zip(heads, lengths)):
        streams = [
            said[i, s, 1 + lm.delays[s] + head.shape[1] : 1 + lm.delays[s] + length] for s in range(1 + CODEBOOKS)
        ]
        replies.append(Reply(streams[0], torch.stack(streams[1:])))
    return replies


def _replay_embeddings(stepper: LMGen, prompts: Sequence[Prompt | None]) -> int:
    """Feeds the embeddings of a `.pt` voice to the temporal transformer; returns the step to go on from."""
    given = [p.embeddings for p in prompts if p is not None and p.embeddings is not None]
    if not given:
        return 0
    if len(given) != len(prompts) or len({len(e) for e in given}) != 1:
        raise ValueError("prompts with embeddings are generated together only if all have them, of one length")
    lm, state = stepper.lm_model, stepper._streaming_state
    embeddings = torch.stack(given).to(lm.device, lm.dtype)  # [B, E, dim]
    for position in range(embeddings.shape[1]):
        lm.transformer(embeddings[:, position : position + 1])
    # The column after the last embedding comes out of the ring, which the replay did not fill.
    step = embeddings.shape[1]
    for stream, delay in enumerate(lm.delays):
        tokens = torch.stack([p.frames[stream, step - 1 - delay] for p in prompts]).to(lm.device)
        state.cache[:, stream, step % state.cache.shape[2]] = tokens
    state.offsets += step
    state.offset_cpu += step
    return step


# --- Sound, words, and the command -------------------------------------------------------------------------------


def decode(mimi: MimiModel, codes: Sequence[Tensor]) -> list[np.ndarray]:
    """Sounds of codes [8, T_i]: float32 [1920 T_i] at 24 kHz, frame by frame as a server plays them."""
    device = next(mimi.parameters()).device
    lengths = [c.shape[1] for c in codes]
    lanes = torch.zeros(len(codes), CODEBOOKS, max(lengths), dtype=torch.int64)
    for lane, own in zip(lanes, codes):
        lane[:, : own.shape[1]] = own
    with torch.inference_mode(), mimi.streaming(len(codes)):
        pcm = torch.cat([mimi.decode(frame) for frame in lanes.to(device).split(1, dim=2)], dim=2)
    return [sound[0, : length * FRAME_SIZE].cpu().numpy() for sound, length in zip(pcm, lengths)]


def write_conversation(path: Path, agent: np.ndarray, user: np.ndarray) -> None:
    """A stereo wav of 16 bits, agent left and user right; the shorter one ends in silence."""
    length = max(len(agent), len(user))
    both = np.stack([np.pad(channel, (0, length - len(channel))) for channel in (agent, user)], axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((both.clip(-1, 1) * 32767).astype("<i2").tobytes())


def load_merged(source: Source, device: torch.device, dtype: torch.dtype, dep_q: int = CODEBOOKS) -> LMModel:
    """A model for inference with `dep_q` depformer steps, adapters merged into its weights, read tensor by tensor."""
    lm = model.build_lm(source.kwargs | {"dep_q": dep_q}, dtype)
    lm.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            parameter.copy_(source.read(name))
    return lm.eval()


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", help="run folder, checkpoint, exported folder or hub repository")
    parser.add_argument("--user-wav", nargs="+", required=True, help="users; of stereo files the right channel")
    parser.add_argument("--out", required=True, help="wav to write; a folder for several users")
    parser.add_argument("--text", help="JSON to write the agent's words to; a folder for several users")
    parser.add_argument("--voice", help="voice prompt: a recording, a .pt or a shipped name")
    parser.add_argument("--voices-dir", help="folder of voices; the repository's voices.tgz if absent")
    parser.add_argument("--text-prompt", default="", help="the role; wrapped in <system> tags")
    parser.add_argument("--tail-sec", type=float, default=4.0, help="silence after the user, for the answer")
    parser.add_argument("--base", help="repository or folder of the weights that adapters belong to")
    parser.add_argument("--greedy", action="store_true", help="the most likely token instead of a drawn one")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--temp", type=float, default=Sampling.temp, help="temperature of audio tokens")
    parser.add_argument("--temp-text", type=float, default=Sampling.temp_text, help="temperature of text tokens")
    parser.add_argument("--top-k", type=int, default=Sampling.top_k, help="audio tokens to draw from")
    parser.add_argument("--top-k-text", type=int, default=Sampling.top_k_text, help="text tokens to draw from")
    parser.add_argument("--batch-size", type=int, default=8, help="users at once; at 7B each takes 1.6 GB")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of weights and computation; default: bf16, on a CPU without bf16 products fp32"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    args = parser.parse_args()
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be at least 1")
    for name in ("tail_sec", "temp", "temp_text", "top_k", "top_k_text"):
        value = getattr(args, name)
        if not 0 <= value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {value:g}: must be at least 0, and finite")

    source = open_source(args.checkpoint, args.base)
    several = len(args.user_wav) > 1
    wavs = [_output(args.out, path, several, ".wav") for path in args.user_wav]
    if len(set(wavs)) < len(wavs):
        raise UserError(f"--user-wav: files of the same name would both become {max(wavs, key=wavs.count)}; rename one")
    if wavs[0].suffix != ".wav":
        raise UserError(f"--out {args.out}: a reply is a wav, so its name must end in .wav")
    for path, wav in zip(args.user_wav, wavs):  # before weights are read
        if audio.probe(path).duration_sec == 0:
            raise UserError(f"--user-wav {path}: holds no sound; record it again")
        wav.parent.mkdir(parents=True, exist_ok=True)
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # moshi captures CUDA graphs on the current one, whatever its tensors are on
    mimi = source.checkpoint.mimi(device)
    tokenizer = source.checkpoint.tokenizer()
    prompt = _prompt(args, source, mimi, tokenizer)
    lm = load_merged(source, device, DTYPES[args.dtype or ("bf16" if multiplies_bfloat16(device) else "fp32")])
    sampling = Sampling(args.greedy, args.temp, args.temp_text, args.top_k, args.top_k_text)
    tail = np.zeros(int(args.tail_sec * SAMPLE_RATE), np.float32)
    for start in range(0, len(wavs), args.batch_size):
        paths = args.user_wav[start : start + args.batch_size]
        heard = [np.concatenate([audio.read(path)[-1], tail]) for path in paths]
        users = codec.encode(mimi, heard)
        replies = generate(lm, [prompt] * len(users), users, sampling, args.seed + start)
        sounds = decode(mimi, [reply.codes for reply in replies])
        for path, wav, pcm, reply, sound in zip(paths, wavs[start:], heard, replies, sounds):
            write_conversation(wav, sound, pcm)
            words = dialogue.words(reply.text, tokenizer)
            print(f"{wav}: {' '.join(word for word, _, _ in words) or '(no words)'}", flush=True)
            if args.text:
                target = _output(args.text, path, several, ".json")
                target.parent.mkdir(parents=True, exist_ok=True)
                with replacing(target) as temporary:
                    temporary.write_text(json.dumps({"user": path, "words": words}, ensure_ascii=False))
    return 0


def _output(given: str, source: str, several: bool, suffix: str) -> Path:
    return Path(given) / (Path(source).stem + suffix) if several or Path(given).is_dir() else Path(given)


def _prompt(
    args, source: Source, mimi: MimiModel, tokenizer: sentencepiece.SentencePieceProcessor
) -> Prompt | None:
    text = wrap_system_prompt(args.text_prompt)
    if source.kwargs["dep_q"] != DEP_Q:
        if text or args.voice:
            raise UserError(f"{args.checkpoint}: a Moshi of 8 codebooks has no prompts; drop --voice and --text-prompt")
        return None
    voice = None
    if args.voice:
        folder = Path(args.voices_dir) if args.voices_dir else None
        book = VoiceBook(folder, source.voices_archive, setting="--voices-dir")
        path = book.find(args.voice, beside=Path.cwd())
        embed = lambda column: model.embed_column(source.read, column)
        voice = load_voices(
            [path], lambda: mimi, lambda: codec.fingerprint(mimi), embed, source.kwargs["delays"],
            trains_embeddings=False,
        )[path]  # fmt: skip
    return build_prompt(voice, tokenizer.encode(text, add_bos=False, add_eos=False))


if __name__ == "__main__":
    run(main)
