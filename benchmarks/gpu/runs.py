"""A run that is resumed, encoding, and free-running replies."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from moshi.models import loaders

import precompute_codes
from benchmarks.gpu.bench import Bench, Values, fill_at_random
from finetune.args import TrainArgs
from finetune.audio.codec import encode_streams
from finetune.audio.files import FRAME_RATE, SAMPLE_RATE
from finetune.distributed import session
from finetune.generate import generate
from finetune.metrics import read_rows
from finetune.model.build import build_lm
from finetune.model.pretrained import PERSONAPLEX
from finetune.prompts.hybrid import build_prompt
from finetune.streams import CODEBOOKS
from finetune.tools.toy.corpus import make_corpus
from finetune.tools.toy.model import make_model
from train import compute_deterministically, run_training


def resume(bench: Bench) -> Iterator[tuple[str, Values]]:
    """A run of four steps, and one of two steps that continues to four."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        make_corpus(folder / "data", hours=0.01)
        given = [str(folder / "data/train.jsonl"), "--output-dir", str(folder / "codes"), "--personaplex"]
        precompute_codes.main([*given, "--hf-repo", str(folder / "model"), "--device", "cpu"])
        if bench.on_gpu:
            compute_deterministically()
        for run, steps in (("straight", 4), ("stopped", 2), ("stopped", 4)):
            args = TrainArgs(
                data={"train_data": str(folder / "codes/train_precomputed.jsonl"), "num_workers": 0, "shuffle": True},
                run_dir=str(folder / run), moshi_paths={"hf_repo_id": str(folder / "model")},
                prompt={"voices_dir": str(folder / "data/voices")}, device=bench.device.type, max_steps=steps,
                deterministic=bench.on_gpu, param_dtype=bench.args().param_dtype, duration_sec=4.0, batch_size=2,
                lora={"enable": True, "rank": 8}, optim={"schedule": "constant", "pct_start": 0.0, "lr": 1e-3},
            )  # fmt: skip
            with session(str(bench.device)) as world:
                if code := run_training(args, PERSONAPLEX, world):
                    raise RuntimeError(f"{run}: exit code {code}")
        runs = [folder / "straight", folder / "stopped"]
        losses = [[row["loss"] for row in read_rows(run / "metrics.train.jsonl") if "loss" in row] for run in runs]
        path = "checkpoints/checkpoint_000004/consolidated/lora.safetensors"
        adapters = [(run / path).read_bytes() for run in runs]
        equal = {"losses_equal": losses[0] == losses[1], "adapters_equal": adapters[0] == adapters[1]}
        yield "4 steps against 2 + 2", equal | {"last_loss": losses[1][-1]}


@torch.no_grad()
def encode(bench: Bench) -> Iterator[tuple[str, Values]]:
    """Mimi against real time."""
    torch.manual_seed(0)
    mimi = loaders.get_mimi(None, bench.scale.mimi, device=bench.device, num_codebooks=CODEBOOKS)
    for name, buffer in mimi.named_buffers():
        if name.endswith("embedding_sum"):
            buffer.normal_()
    for slots in bench.scale.slots:
        sounds = 0.1 * torch.randn(slots, int(bench.scale.sound_sec * SAMPLE_RATE))

        def work(slots: int = slots, sounds: torch.Tensor = sounds) -> None:
            for _ in encode_streams(mimi, ([sound] for sound in sounds), slots):
                pass

        seconds = bench.seconds(work)
        frames = bench.scale.sound_sec * FRAME_RATE
        yield f"{slots} slots", {
            "times_real_time": slots * bench.scale.sound_sec / seconds, "ms_per_frame": 1000 * seconds / frames,
        }  # fmt: skip


@torch.no_grad()
def reply(bench: Bench) -> Iterator[tuple[str, Values]]:
    """Free-running replies against real time."""
    lm = build_lm(bench.scale.config, bench.dtype()).to_empty(device=bench.device).eval()
    fill_at_random(lm)
    prompt = build_prompt(None, [5] * 100)
    for conversations in bench.scale.conversations:
        stamps: list[float] = []

        def stamp(stamps: list[float] = stamps) -> None:
            bench.finish()
            stamps.append(time.perf_counter())

        def speak(sec: float, conversations: int = conversations, each_second: Callable[[], None] = stamp) -> None:
            users = [torch.randint(0, 2048, (CODEBOOKS, round(sec * FRAME_RATE))) for _ in range(conversations)]
            generate(lm, [prompt] * conversations, users, each_second=each_second)

        speak(0.5)
        stamps.clear()
        seconds = bench.seconds(lambda speak=speak: speak(bench.scale.reply_sec))
        frames = int(FRAME_RATE) * (len(stamps) - 1)
        yield f"{conversations} at once", {
            "times_real_time": bench.scale.reply_sec / seconds,
            "ms_per_frame": 1000 * (stamps[-1] - stamps[0]) / frames,
        }  # fmt: skip
