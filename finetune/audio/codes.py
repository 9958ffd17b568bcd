"""Files of Mimi codes, and the fingerprints that tell which codec made them and of which audio."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from moshi.models import MimiModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finetune.audio.files import FRAME_RATE, SAMPLE_RATE
from finetune.cli import UserError
from finetune.files import replacing
from finetune.streams import CODEBOOKS

_BLOCK = 8192
_BLOCKS = 64
# Names that files use for what MimiModel.state_dict calls otherwise (moshi/modules/transformer.py: _load_hook;
# moshi/quantization/core_vq.py: _load_from_state_dict).
_RENAMED = {
    ".in_proj_weight": ".in_projs.0.weight",
    ".in_proj.weight": ".in_projs.0.weight",
    ".out_proj.weight": ".out_projs.0.weight",
    "._codebook.cluster_size": "._codebook.cluster_usage",
    "._codebook.embed_avg": "._codebook.embedding_sum",
    "._codebook.embed_sum": "._codebook.embedding_sum",
}


def fingerprint_mimi(mimi: MimiModel) -> str:
    """Names a codec by what its codes depend on: the weights of its encoder and the codebooks in use."""
    state = mimi.state_dict()
    return _fingerprint(state, state.__getitem__, mimi.num_codebooks)


def fingerprint_file(path: Path, codebooks: int = CODEBOOKS) -> str:
    """`fingerprint` of the Mimi that a weight file holds, without building it. Raises UserError if it holds none."""
    try:
        if Path(path).suffix in (".safetensors", ".sft", ".sfts"):
            with safe_open(path, framework="pt") as file:
                return _fingerprint(file.keys(), file.get_tensor, codebooks)
        state = torch.load(path, map_location="cpu", weights_only=True)["model"]
        return _fingerprint(state, state.__getitem__, codebooks)
    except Exception as error:  # torch raises nearly anything on what is no file of its own
        reason = str(error).splitlines()[0] if isinstance(error, OSError | SafetensorError) else "damaged, or no Mimi"
        raise UserError(
            f"{path}: not readable as Mimi's weights ({reason}); give the model's own Mimi, downloaded whole"
        ) from None


def _fingerprint(names: Iterable[str], get: Callable[[str], Tensor], codebooks: int) -> str:
    stored = {_canonical(name): name for name in names}
    used = [name for name in stored if _encodes(name, codebooks)]
    if not used:
        raise ValueError("no encoder in it")
    digest = hashlib.sha256(str(codebooks).encode())
    for name in sorted(used):
        tensor = get(stored[name]).detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.numpy())
    return digest.hexdigest()[:16]


def _canonical(name: str) -> str:
    for old, new in _RENAMED.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _encodes(name: str, codebooks: int) -> bool:
    part, _, rest = name.partition(".")
    if part != "quantizer":
        return part in ("encoder", "encoder_transformer", "downsample")
    if rest.endswith((".cluster_usage", ".embedding_sum")):
        which, layer = rest.split(".")[0], int(rest.split(".layers.")[1].split(".")[0])
        return layer < (1 if which == "rvq_first" else codebooks - 1)  # one semantic codebook, the rest acoustic
    return rest.endswith(".input_proj.weight")


def audio_fingerprint(path: Path) -> str:
    """Names the content of a file: its size and 64 blocks of 8 kB, evenly spread from its first byte to its last; of a
    file of no more than that, all of it.

    It costs the same for every length, so that training can check each file that it opens. A copy, a move or a new
    date do not change it; a file recorded, cut, resampled or made louder anew does. An edit that keeps the size and
    falls between the blocks is seen by `check(thorough=True)` only. Raises UserError if the file cannot be read.
    """
    with _reading(path) as file:
        size = file.seek(0, 2)
        starts = range(0, size, _BLOCK)
        if size > _BLOCKS * _BLOCK:
            starts = [(size - _BLOCK) * i // (_BLOCKS - 1) for i in range(_BLOCKS)]
        digest = hashlib.sha256(str(size).encode())
        for start in starts:
            file.seek(start)
            digest.update(file.read(_BLOCK))
        return digest.hexdigest()[:16]


def audio_stamp(path: Path) -> dict[str, str | int]:
    """What a file of codes says of its source beside the fingerprint: a digest of all of it, and its date in ns.

    Raises UserError if the file cannot be read.
    """
    with _reading(path) as file:
        date = os.fstat(file.fileno()).st_mtime_ns  # before it is read: what is written meanwhile makes it another
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
        return {"audio_mtime_ns": date, "audio_sha256": digest.hexdigest()}


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


FORMAT = 1
_FIELDS = {"codes": Tensor, "frame_rate": float, "sample_rate": int, "duration": float, "mimi": str, "audio": str}


def save_codes(
    path: Path,
    codes: Tensor,
    duration_sec: float,
    mimi_fingerprint: str,
    audio_fingerprint: str,
    stamp: dict[str, str | int] | None = None,
    exact: bool = False,
) -> None:
    """Writes codes [channels, 8, frames] to a file in an existing folder, atomically.

    The file is `torch.save` of a dictionary: the codes as int16, "frame_rate" and "sample_rate" (Hz), "duration" (of
    the audio, seconds), "mimi" and "audio" (fingerprints), "format", "exact" (see `encode`), and what `audio_stamp`
    gave.
    """  # fmt: skip
    entry = {
        "codes": codes.to(torch.int16).contiguous(),
        "frame_rate": FRAME_RATE,
        "sample_rate": SAMPLE_RATE,
        "duration": float(duration_sec),
        "mimi": mimi_fingerprint,
        "audio": audio_fingerprint,
        "format": FORMAT,
        "exact": exact,
        **(stamp or {}),
    }
    save_tensors(path, entry)


def save_tensors(path: Path, entry: object) -> None:
    """`torch.save`, atomically; OSError if the disk is full (given a name, not a file, torch raises RuntimeError)."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(entry, file)


def load_codes(path: Path) -> dict:
    """What `save_codes` wrote. The codes are mapped from disk: only what is used of them is read.

    Raises UserError if the file is missing, damaged, something else, or cannot be mapped.
    """
    again = "run precompute_codes.py again"
    try:
        entry = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {again}") from None
    except Exception as error:  # torch raises nearly anything on nearly a zip file, EINVAL too
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        if os.strerror(errno.ENOMEM) in str(error):
            raise UserError(
                f"{path}: cannot be mapped, as this process has too many files mapped already; lower data.cache_mb"
            ) from None
        raise UserError(f"{path}: damaged, or not a file of codes; {again}") from None
    if not isinstance(entry, dict) or any(not isinstance(entry.get(key), kind) for key, kind in _FIELDS.items()):
        raise UserError(f"{path}: not a file of codes; {again}")
    codes = entry["codes"]
    if entry.get("format") != FORMAT or codes.dtype != torch.int16 or codes.ndim != 3 or codes.shape[1] != CODEBOOKS:
        raise UserError(
            f"{path}: holds codes of format {entry.get('format')}, {codes.dtype} {list(codes.shape)}, where format "
            f"{FORMAT}, int16 [channels, {CODEBOOKS}, frames] is expected; {again}"
        )
    return entry


def check_codes(
    entry: dict,
    path: Path | None = None,
    mimi_fingerprint: str | None = None,
    audio_path: Path | None = None,
    thorough: bool = False,
) -> None:
    """Raises UserError if codes (from `path`) were made by another codec, or of audio that has changed since.

    What is None is not checked, nor is audio that is not there: training on codes does not need it. Audio of the same
    date is the same, unless its file system counts in whole seconds. `thorough` reads all of a file of another date: an
    edit in place may fall between the blocks of its fingerprint.
    """
    name = "codes" if path is None else str(path)
    if mimi_fingerprint is not None and entry["mimi"] != mimi_fingerprint:
        raise UserError(
            f"{name}: made by Mimi {entry['mimi']}, and this model's is {mimi_fingerprint}; run precompute_codes.py "
            "again with this model's --hf-repo or --mimi-path"
        )
    try:
        date = None if audio_path is None else os.stat(audio_path).st_mtime_ns
    except OSError:
        return
    then = entry.get("audio_mtime_ns")
    if date is None or (date == then and date % 10**9):
        return
    now = audio_fingerprint(audio_path)
    changed = entry["audio"] != now
    if thorough and not changed and then not in (None, date):
        changed = entry["audio_sha256"] != audio_stamp(audio_path)["audio_sha256"]
    if changed:
        raise UserError(
            f"{name}: made of audio {entry['audio']}, and {audio_path} is now {now}: it has changed since; "
            "run precompute_codes.py again"
        )
