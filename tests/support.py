"""Helpers that several test files share."""

import hashlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import scipy.signal
import yaml

import train
from finetune.args import SETTINGS
from finetune.audio.files import FRAME_RATE, FRAME_SIZE, read_audio
from finetune.config import load_args
from finetune.distributed import session
from finetune.metrics import read_rows
from finetune.model.pretrained import MOSHI, ModelSpec

ROOT = Path(__file__).parents[1]


# A process's own peak in kB, as code; what getrusage tells of a child counts its parent's, from before it became one.
PEAK = "int(__import__('re').search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"


def live(world: Path) -> dict[str, str]:
    """Settings of a run in which Mimi makes the codes."""
    return {f"data.{split}_data": str(world / f"data/{split}.jsonl") for split in ("train", "eval")}


def script(*command: object, processes: int | None = None, timeout: float = 120, check: bool = True, **env: str):
    """Run `python command` (or torchrun with N `processes`) in the repository; return the finished process."""
    launcher = [sys.executable]
    if processes is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*launcher, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
        env=os.environ | env,
    )  # fmt: skip
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def settings_table() -> str:
    """All settings as a Markdown table, for README.md."""
    lines = ["| setting | default | |", "|---|---|---|"]
    for key, field in sorted(SETTINGS.items(), key=lambda item: "." in item[0]):  # sections last, in their order
        if not hasattr(field.annotation, "model_fields"):
            default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
            lines.append(f"| `{key}` | {default} | {field.description} |")
    return "\n".join(lines)


PERSONAPLEX_CODES = "codes_personaplex"


def write_config(folder: Path, world: Path, codes: str = "codes", **settings) -> Path:
    """A config.yaml for the tiny world and one of its folders of codes; keys with dots nest, as in overrides."""
    base = {
        "data.train_data": str(world / codes / "train_precomputed.jsonl"),
        "data.eval_data": str(world / codes / "eval_precomputed.jsonl"),
        "data.shuffle": True, "data.num_workers": 0, "moshi_paths.hf_repo_id": str(world / "model"),
        "prompt.voices_dir": str(world / "data/voices"), "lora.enable": True, "lora.rank": 4, "duration_sec": 3,
        "max_steps": 2, "param_dtype": "float32", "device": "cpu", "optim.lr": 1e-3, "eval_max_samples": 3,
        "eval_free_samples": 0,
        "run_dir": str(folder / "run"),
    }  # fmt: skip
    tree: dict = {}
    for key, value in (base | settings).items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def train_here(config: Path, spec: ModelSpec = MOSHI, overrides: tuple[str, ...] = ()) -> int:
    """A run in this process, as one rank; returns its exit code."""
    args = load_args(config, overrides)
    with session(args.device) as world:
        return train.run_training(args, spec, world)


def rows(run: Path, kind: str = "train") -> list[dict]:
    """The metrics of a run, without its events."""
    return [row for row in read_rows(run / f"metrics.{kind}.jsonl") if "loss" in row]


def hub_cache(home, repo, files, kind="models"):
    """A hub cache as huggingface_hub lays it out: files by their hash, and a snapshot of links to them.

    Args:
        files: their paths, or {name in the repository: path}.
    """
    base = home / "hub" / f"{kind}--{repo.replace('/', '--')}"
    (base / "refs").mkdir(parents=True)
    (base / "refs/main").write_text("abc")
    (base / "blobs").mkdir()
    for name, path in files.items() if isinstance(files, dict) else [(path.name, path) for path in files]:
        blob, link = base / f"blobs/{hashlib.sha256(path.read_bytes()).hexdigest()}", base / "snapshots/abc" / name
        shutil.copy(path, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return base / "snapshots/abc"


def dailytalk_cache(home, world):
    """kyutai/DailyTalkContiguous in a hub cache, as far as the tiny world has dialogues; returns the snapshot.

    Its layout: numbered 44.1 kHz recordings with the words of the agent next to them, and a manifest; no prompts.
    """
    files, lines = {}, []
    for number, path in enumerate(sorted((world / "data").glob("*/0*.wav"))):
        folder = home / "dailytalk"
        folder.mkdir(parents=True, exist_ok=True)
        pcm = scipy.signal.resample_poly(read_audio(path), 147, 80, axis=1)
        write_wav(folder / f"{number}.wav", np.clip(pcm, -1, 1), 44_100)
        words = json.loads(path.with_suffix(".json").read_text())["alignments"]
        main = [word for word in words if word[2] == "SPEAKER_MAIN"]
        (folder / f"{number}.json").write_text(json.dumps({"alignments": main}))
        files |= {f"data_stereo/{number}{suffix}": folder / f"{number}{suffix}" for suffix in (".wav", ".json")}
        lines.append({"path": f"data_stereo/{number}.wav", "duration": pcm.shape[1] / 44_100})
    manifest = home / "dailytalk/dailytalk.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return hub_cache(home, "kyutai/DailyTalkContiguous", files | {"dailytalk.jsonl": manifest}, kind="datasets")


def write_riff(path, form, data):
    """A wav file of a format and its data, header and all."""
    head = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data))
    path.write_bytes(b"RIFF" + struct.pack("<I", len(head) + len(data)) + head + data)


def write_wav(path, pcm, sample_rate, float32=False):
    """[channels, samples] as 16-bit or float wav."""
    pcm = np.asarray(pcm)
    kind, width = (3, 4) if float32 else (1, 2)
    data = pcm.T.astype("<f4").tobytes() if float32 else (pcm.T * 32767).round().astype("<i2").tobytes()
    block = len(pcm) * width
    form = struct.pack("<HHIIHH", kind, len(pcm), sample_rate, sample_rate * block, block, 8 * width)
    write_riff(path, form, data)


def write_adpcm(path, sample_rate, blocks):
    """Noise as IMA ADPCM, [2, blocks * 505]: any half byte is a valid sample."""
    rng = np.random.default_rng(0)
    heads = np.zeros((blocks, 8), np.uint8)  # of both channels: a sample, the place in the table of steps
    heads[:, [2, 6]] = rng.integers(40, 60, (blocks, 2))
    data = np.concatenate([heads, rng.integers(0, 256, (blocks, 504), dtype=np.uint8)], axis=1).tobytes()
    form = struct.pack("<HHIIHHHH", 0x11, 2, sample_rate, sample_rate * 512 // 505, 512, 4, 2, 505)
    write_riff(path, form, data)


def write_media(path, pcm, rate, codec, container=None, options=None):
    """Write float [channels, samples] in any format that ffmpeg can encode."""
    pcm = np.ascontiguousarray(pcm, dtype=np.float32)
    layout = {1: "mono", 2: "stereo"}[len(pcm)]
    with av.open(str(path), "w", format=container, options=options or {}) as out:
        stream = out.add_stream(codec, rate=rate, layout=layout)
        if codec == "wmav2":
            stream.bit_rate = 64_000
        convert = av.AudioResampler(stream.codec_context.format, layout, rate, stream.codec_context.frame_size or 1024)
        frame = av.AudioFrame.from_ndarray(pcm, format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        for part in [*convert.resample(frame), *convert.resample(None), None]:
            out.mux(stream.encode(part))


def alive(pid: int) -> bool:
    """Running: not gone, and not a zombie that nobody has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, timeout_sec: float = 30.0) -> None:
    end = time.monotonic() + timeout_sec
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def run_ranks(*command: object, codes: tuple[int, ...] | None = (0, 0), timeout: float = 150, **env: str) -> list[str]:
    """Run `python command` in two processes that form a process group; return the output of each.

    Their exit codes must be `codes`, unless that is None.
    """
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | group | {"RANK": rank, "LOCAL_RANK": rank} | env,
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes is None or codes == tuple(process.returncode for process in processes), "\n".join(outputs)
    return outputs


def speech_like(seconds, spans, level_db=-25.0, noise_db=None):
    """float32 [samples] at 24 kHz: noise at `level_db` dBFS in the spans (seconds), over a background at `noise_db`."""
    rng = np.random.default_rng(0)
    pcm = np.zeros(round(seconds * FRAME_RATE) * FRAME_SIZE)
    if noise_db is not None:
        pcm += rng.normal(0, 10 ** (noise_db / 20), len(pcm))
    for start, end in spans:
        first, last = (round(t * FRAME_RATE) * FRAME_SIZE for t in (start, end))
        pcm[first:last] += rng.normal(0, 10 ** (level_db / 20), last - first)
    return pcm.astype(np.float32)
