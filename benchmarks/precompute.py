"""precompute_codes.py against the bare streaming encoder: speed, memory, and whether the codes are the same.

Mimi has its real size and random weights, with codebooks drawn around what its encoder gives, so that codes vary. Speed
is in seconds of one channel encoded per second. The bare encoder is `mimi.encode` on frames that exist already,
timed right before and right after what is compared with it, as machines drift. On a CPU all have malloc keep what is
freed, which precompute_codes.py does and which gives the bare encoder a quarter more. 64 short files fill all slots and
are compared with the bare encoder at its best slot count; one long file has two channels and is compared with the bare
encoder at two slots, as splitting a stream would change its codes. `--exact` takes four times as long on a CPU:
it is measured once, on a quarter of the files. Memory is the peak of a whole process that encodes one file.

At --scale 1 a CPU takes hours, nearly all of them for the memory of a 2-hour file.
"""

import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from moshi.models import MimiModel, loaders
from safetensors.torch import save_file

import precompute_codes
from benchmarks.real_size import process
from finetune.audio.codec import encode_streams
from finetune.audio.files import FRAME_RATE, FRAME_SIZE, SAMPLE_RATE, read_audio
from finetune.audio.memory import keep_freed_memory
from finetune.cli import UserError, run
from finetune.parser import Parser
from finetune.streams import CODEBOOKS
from finetune.tools.toy.model import make_model

ROOT = Path(__file__).parents[1]
FILES = 64
SHORT_SEC = 10.0  # on average: from half to one and a half times that
LONG_SEC = 150.0
MEMORY_SEC = (600.0, 7200.0)


def sound(seconds: float, seed: int) -> np.ndarray:
    """Stereo noise [2, samples] whose loudness and colour change every 80 ms."""
    rng = np.random.default_rng(seed)
    frames = rng.standard_normal((2, int(seconds * FRAME_RATE) + 1, FRAME_SIZE), dtype=np.float32)
    spectrum = np.fft.rfft(frames)
    shape = rng.uniform(0, 1, (*spectrum.shape[:2], 16)).astype(np.float32) ** 4
    spectrum *= np.repeat(shape, -(-spectrum.shape[2] // 16), axis=2)[..., : spectrum.shape[2]]
    pcm = np.fft.irfft(spectrum, n=FRAME_SIZE).reshape(2, -1)[:, : int(seconds * SAMPLE_RATE)]
    return (0.2 * pcm).clip(-1, 1).astype(np.float32)


def make_files(folder: Path, name: str, lengths: list[float]) -> Path:
    """A manifest of 16-bit stereo files."""
    (folder / name).mkdir()
    lines = []
    for number, seconds in enumerate(lengths):
        path = folder / name / f"{number}.wav"
        with path.open("wb") as file:
            data = int(seconds * SAMPLE_RATE) * 4
            file.write(b"RIFF" + (36 + data).to_bytes(4, "little") + b"WAVEfmt \x10\0\0\0\x01\0\x02\0")
            file.write(SAMPLE_RATE.to_bytes(4, "little") + (4 * SAMPLE_RATE).to_bytes(4, "little") + b"\4\0\x10\0data")
            file.write(data.to_bytes(4, "little"))
            left = data
            while left:  # in pieces, as two hours are not held in memory here either
                pcm = sound(min(60.0, left / 4 / SAMPLE_RATE), seed=number + left)
                written = (pcm.T * 32767).round().astype("<i2").tobytes()[:left]
                file.write(written)
                left -= len(written)
        lines.append(f'{{"path": "{name}/{number}.wav", "duration": {seconds}}}\n')
    manifest = folder / f"{name}.jsonl"
    manifest.write_text("".join(lines))
    return manifest


@torch.no_grad()
def make_mimi() -> MimiModel:
    """The real size with random weights."""
    torch.manual_seed(0)
    mimi = loaders.get_mimi(None)
    heard = torch.from_numpy(np.concatenate([sound(4.0, seed)[:1] for seed in range(8)]))[:, None]
    with mimi.streaming(len(heard)):
        latents = [mimi.encode_to_latent(frame, quantize=False) for frame in heard.split(FRAME_SIZE, dim=-1)[:-1]]
    for quantizer, layers in ((mimi.quantizer.rvq_first, 1), (mimi.quantizer.rvq_rest, 7)):
        rest = quantizer.input_proj(torch.cat(latents, dim=-1)).transpose(1, 2).flatten(0, 1)
        for layer in quantizer.vq.layers[:layers]:
            book = layer._codebook
            entries = rest[torch.randint(len(rest), (book.codebook_size,))]
            book.embedding_sum.copy_(entries + 0.3 * rest.std(0) * torch.randn_like(entries))
            rest = rest - book.decode(book.encode(rest))
    return mimi


# --- Speed -----------------------------------------------------------------------------------------------------


def bare(mimi: MimiModel, slots: int, seconds: float) -> float:
    """Speed of the encoder itself, over about this many seconds."""
    frame = torch.randn(slots, 1, FRAME_SIZE) * 0.1
    device = next(mimi.parameters()).device
    frames = 0
    with torch.inference_mode(), mimi.streaming(slots):
        for _ in range(3):
            mimi.encode(frame.to(device))
        started = time.monotonic()
        while (passed := time.monotonic() - started) < seconds:
            codes = mimi.encode(frame.to(device))
            frames += 1
            if frames % 32 == 0 or device.type == "cpu":
                codes.cpu()
    return frames * slots / FRAME_RATE / passed


def ours(manifest: Path, model: Path, options: list[str]) -> float:
    """Speed of precompute_codes.py, from the moment its codec is loaded until the last file is written."""
    with tempfile.TemporaryDirectory() as out:
        command = [str(manifest), "--output-dir", out, "--hf-repo", str(model), *options]
        outcome = precompute_codes.encode_shard(precompute_codes.parse_args(command), None, 0, 1)
    if outcome.failed:
        raise UserError(next(iter(outcome.failed.values())))
    return 2 * outcome.encoded_sec / outcome.wall_sec


def measure_speed(mimi: MimiModel, model: Path, short: Path, few: Path, long: Path, device: str, repeats: int) -> None:
    on_cuda = device.startswith("cuda")
    if not on_cuda:
        keep_freed_memory()
    counts = [1, 2, 4, 8, 16, 32, 64] if on_cuda else [1, 2, 4, 8, 16, 32]
    speeds: dict[tuple, list[float]] = defaultdict(list)
    shares: dict[tuple, list[float]] = defaultdict(list)
    for turn in range(repeats):
        for slots in counts:
            speeds["bare", slots].append(bare(mimi, slots, 3.0))
        best = max(counts, key=lambda slots: statistics.median(speeds["bare", slots]))
        cases = [("64 short files", short, best, []), ("one long file", long, 2, [])]
        if turn == 0:
            cases.append((f"{FILES // 4} short files, exact", few, best, ["--exact"]))
        for name, manifest, slots, more in cases:
            before = bare(mimi, slots, 3.0)
            speed = ours(manifest, model, ["--device", device, "--slots", str(slots), *more])
            speeds[name, slots].append(speed)
            shares[name, slots].append(speed / statistics.mean([before, bare(mimi, slots, 3.0)]))
        print(f"turn {turn + 1} of {repeats} done, load average {os.getloadavg()[0]:.2f}", flush=True)
    print("\n| what | slots | x real time, per channel | of the bare encoder: median (turns) |\n|--|--|--|--|")
    for (name, slots), values in speeds.items():
        turns = shares[name, slots]
        share = f"{statistics.median(turns):.2f} ({', '.join(f'{turn:.2f}' for turn in turns)})" if turns else ""
        print(f"| {name} | {slots} | {statistics.median(values):.2f} | {share} |")


# --- The same codes --------------------------------------------------------------------------------------------


def measure_equality(mimi: MimiModel, manifest: Path) -> None:
    wavs = [read_audio(path) for path in sorted((manifest.parent / manifest.stem).glob("*.wav"))]
    device = next(mimi.parameters()).device
    by_hand = []
    for channel in (channel for wav in wavs for channel in wav):
        frames = torch.from_numpy(np.pad(channel, (0, -len(channel) % FRAME_SIZE))).to(device).split(FRAME_SIZE)
        with torch.inference_mode(), mimi.streaming(1):
            by_hand.append(torch.cat([mimi.encode(frame[None, None]) for frame in frames], dim=-1)[0].cpu())
    wanted = [torch.stack(pair).short() for pair in zip(by_hand[::2], by_hand[1::2])]
    total = sum(codes.numel() for codes in wanted)
    used = [len(torch.cat([codes[:, k].flatten() for codes in wanted]).unique()) for k in range(CODEBOOKS)]
    print(f"\n{len(wavs)} files, {total} codes; of 2048 entries the codebooks use {', '.join(map(str, used))}")

    def differing(slots: int, exact: bool, together: bool) -> int:
        groups = [range(len(wavs))] if together else [[i] for i in range(0, len(wavs), 4)]
        wrong = 0
        for group in groups:
            for place, codes in encode_streams(mimi, ([wavs[i]] for i in group), slots, exact):
                wrong += int((codes != wanted[group[place]]).sum())
        return wrong

    print("codes that differ from a loop of one stream, frame by frame:")
    print(f"  exact, {FILES} slots: {differing(FILES, True, True)}")
    print(f"  exact, each fourth file alone: {differing(2, True, False)}")
    print(f"  a batch, {FILES} slots: {differing(FILES, False, True)}")
    print(f"  a batch, each fourth file alone: {differing(2, False, False)}")


# --- Memory ----------------------------------------------------------------------------------------------------


def peak_memory(manifest: Path, model: Path, device: str) -> int:
    """Bytes of a process that encodes a manifest."""
    with tempfile.TemporaryDirectory() as out:
        _, _, peak = process(
            "precompute_codes.py", manifest, "--output-dir", out, "--hf-repo", model, "--device", device
        )
    return round(peak * 1e9)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="of the lengths of all files")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each speed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=["speed", "equality", "memory"], help="default: all")
    parser.add_argument("--tiny", action="store_true", help="memory with the tiny world's Mimi: 2 hours in minutes")
    args = parser.parse_args()
    parts = args.only or ["speed", "equality", "memory"]
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()}, load average {os.getloadavg()[0]:.2f}")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        mimi = make_mimi()
        save_file(mimi.state_dict(), folder / loaders.MIMI_NAME)
        mimi.to(args.device)
        spread = np.random.default_rng(0).uniform(0.5, 1.5, FILES) * SHORT_SEC * args.scale
        short = make_files(folder, "short", [round(float(seconds), 3) for seconds in spread])
        if "speed" in parts:
            long = make_files(folder, "long", [LONG_SEC * args.scale])
            few = folder / "few.jsonl"
            few.write_text("".join(short.read_text().splitlines(keepends=True)[: FILES // 4]))
            measure_speed(mimi, folder, short, few, long, args.device, args.repeats)
        if "equality" in parts:
            measure_equality(mimi, short)
        del mimi
        if "memory" in parts:
            print("\n| file | decoded audio | peak memory |\n|--|--|--|")
            peaks = []
            model = make_model(folder / "tiny") if args.tiny else folder
            for seconds in (length * args.scale for length in MEMORY_SEC):
                peaks.append(peak_memory(make_files(folder, f"{seconds:.0f}s", [seconds]), model, args.device))
                decoded = seconds * SAMPLE_RATE * 8 / 2**20
                print(f"| {seconds / 60:.1f} min | {decoded:.0f} MiB | {peaks[-1] / 2**20:.0f} MiB |", flush=True)
            print(f"ratio: {peaks[1] / peaks[0]:.3f}")
    print(f"load average {os.getloadavg()[0]:.2f} after (idle: under 0.3)")


if __name__ == "__main__":
    run(main)
