"""Files of Mimi codes, with fingerprints of the codec and of the audio they were made from."""

import errno
import hashlib
import io
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
from finetune.files import regular, replacing, why_missing
from finetune.streams import CARD, CODEBOOKS

FORMAT = 1
_EARLIER_CONTEXT = 250  # moshi/models/loaders.py: _transformer_kwargs
_FIELDS = {"codes": Tensor, "frame_rate": float, "sample_rate": int, "duration": float, "mimi": str, "audio": str}
_BLOCK, _BLOCKS = 8192, 64  # size in bytes and number of the blocks in the fingerprint of a large audio file
# Older names in weight files -> names in MimiModel.state_dict (moshi/modules/transformer.py: _load_hook;
# moshi/quantization/core_vq.py: _load_from_state_dict).
_RENAMED = {
    ".in_proj_weight": ".in_projs.0.weight", ".in_proj.weight": ".in_projs.0.weight",
    ".out_proj.weight": ".out_projs.0.weight", "._codebook.cluster_size": "._codebook.cluster_usage",
    "._codebook.embed_avg": "._codebook.embedding_sum", "._codebook.embed_sum": "._codebook.embedding_sum",
}  # fmt: skip


def fingerprint_mimi(mimi: MimiModel) -> str:
    """Return a digest of the encoder's weights and the codebooks in use, and the context of its attention.

    The context is the number of keys that it sees, such as 250 or 249 (`Pretrained.mimi_context`).
    """
    context = mimi.encoder_transformer.transformer.layers[0].self_attn.context
    state = mimi.state_dict()
    return f"{_digest(state, state.__getitem__, mimi.num_codebooks)}-{context}"


def fingerprint_file(path: Path, context: int) -> str:
    """Return `fingerprint_mimi` of the weights in a file with this context.

    Raises UserError if the file does not hold a Mimi.
    """
    try:
        if Path(path).suffix in (".safetensors", ".sft", ".sfts"):
            with safe_open(path, framework="pt") as file:
                return f"{_digest(file.keys(), file.get_tensor, CODEBOOKS)}-{context}"
        state = torch.load(path, map_location="cpu", weights_only=True)["model"]
        return f"{_digest(state, state.__getitem__, CODEBOOKS)}-{context}"
    except Exception as error:  # torch.load raises almost any exception on a file that torch.save has not written
        reason = str(error).splitlines()[0] if isinstance(error, OSError | SafetensorError) else "damaged, or no Mimi"
        raise UserError(
            f"{path}: not readable as Mimi's weights ({reason}); give the model's own Mimi, downloaded whole"
        ) from None


def with_context(fingerprint: str) -> str:
    """Return a fingerprint from a file, with the context if it has none.

    Earlier versions of this program wrote none, and made all codes with that of the published Mimi.
    """
    return fingerprint if "-" in fingerprint else f"{fingerprint}-{_EARLIER_CONTEXT}"


def _digest(names: Iterable[str], get: Callable[[str], Tensor], codebooks: int) -> str:
    stored = {_current_name(name): name for name in names}
    used = sorted(name for name in stored if _affects_codes(name, codebooks))
    if not used:
        raise ValueError("no encoder in it")
    digest = hashlib.sha256(str(codebooks).encode())
    for name in used:
        tensor = get(stored[name]).detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.numpy())
    return digest.hexdigest()[:16]


def _current_name(name: str) -> str:
    for old, new in _RENAMED.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _affects_codes(name: str, codebooks: int) -> bool:
    part, _, rest = name.partition(".")
    if part != "quantizer":
        return part in ("encoder", "encoder_transformer", "downsample")
    if rest.endswith((".cluster_usage", ".embedding_sum")):
        group, layer = rest.split(".")[0], int(rest.split(".layers.")[1].split(".")[0])
        return layer < (1 if group == "rvq_first" else codebooks - 1)  # one semantic codebook, the rest acoustic
    return rest.endswith(".input_proj.weight")


def audio_fingerprint(path: Path) -> str:
    """Return a digest of a file's size and of 64 blocks of 8 kB spread evenly over it (of all of a smaller file).

    The cost does not grow with the file, so that training can check each file it opens. Only precompute_codes.py, which
    reads all of a file, notices an edit between the blocks. Raises UserError if the file cannot be read.
    """
    with open_audio(path) as file:
        size = file.seek(0, os.SEEK_END)
        starts = range(0, size, _BLOCK)
        if size > _BLOCKS * _BLOCK:
            starts = [(size - _BLOCK) * i // (_BLOCKS - 1) for i in range(_BLOCKS)]
        digest = hashlib.sha256(str(size).encode())
        for start in starts:
            file.seek(start)
            digest.update(file.read(_BLOCK))
        return digest.hexdigest()[:16]


def in_range(codes: Tensor) -> bool:
    """Return whether Mimi can make all of these codes."""
    return codes.numel() == 0 or 0 <= int(codes.min()) <= int(codes.max()) < CARD


@contextmanager
def open_audio(path: Path) -> Iterator[BinaryIO]:
    try:
        with open(regular(path), "rb") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: {why_missing(path)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def save_codes(
    path: Path, codes: Tensor, duration_sec: float, mimi_fingerprint: str, audio_fingerprint: str,
    stamp: dict[str, str | int] | None = None, exact: bool = False,
) -> None:  # fmt: skip
    """Write codes [channels, 8, frames] to a file in an existing folder, atomically.

    The file is `torch.save` of a dictionary: "codes" as int16, "frame_rate" and "sample_rate" (Hz), "duration" (of the
    audio, seconds), "mimi" and "audio" (fingerprints), "format", "exact" (see finetune.audio.codec), and the entries of
    `stamp`.
    """
    entry = {
        "codes": codes.to(torch.int16).contiguous(), "frame_rate": FRAME_RATE, "sample_rate": SAMPLE_RATE,
        "duration": float(duration_sec), "mimi": mimi_fingerprint, "audio": audio_fingerprint, "format": FORMAT,
        "exact": exact,
    }  # fmt: skip
    save_tensors(path, entry | (stamp or {}))


def save_tensors(path: Path, entry: object) -> None:
    """Call `torch.save`, atomically. Raises OSError if the disk is full, where torch itself raises RuntimeError."""
    content = io.BytesIO()
    torch.save(entry, content)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_codes(path: Path) -> dict:
    """Return what `save_codes` wrote, with the codes mapped from disk: only what is used of them is read.

    Raises UserError if the file is missing, damaged, not a file of codes, or cannot be mapped.
    """
    again = "run precompute_codes.py again"
    try:
        entry = torch.load(regular(path), map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: {why_missing(path)}; {again}") from None
    except Exception as error:  # torch.load raises almost any exception on a damaged file, OSError (EINVAL) included
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        if os.strerror(errno.ENOMEM) in str(error):
            raise UserError(f"{path}: this process has mapped too many files; lower data.cache_mb") from None
        raise UserError(f"{path}: damaged, or not a file of codes; {again}") from None
    if not isinstance(entry, dict) or any(not isinstance(entry.get(key), kind) for key, kind in _FIELDS.items()):
        raise UserError(f"{path}: not a file of codes; {again}")
    codes = entry["codes"]
    if entry.get("format") != FORMAT or codes.dtype != torch.int16 or codes.ndim != 3 or codes.shape[1] != CODEBOOKS:
        raise UserError(
            f"{path}: holds codes of format {entry.get('format')}, {codes.dtype} {list(codes.shape)}; expected format "
            f"{FORMAT}, int16 [channels, {CODEBOOKS}, frames]; {again}"
        )
    return entry | {"mimi": with_context(entry["mimi"])}


def check_codes(entry: dict, path: Path, mimi_fingerprint: str | None, audio_path: Path | None = None) -> None:
    """Raise UserError if the codes from `path` were made by another codec, or of audio that has changed since.

    Args:
        mimi_fingerprint: of the model's codec; None is not checked.
        audio_path: not checked if None or missing, as training on codes does not need the audio. Audio of the same
            date is unchanged, unless its file system counts in whole seconds.
    """
    if mimi_fingerprint is not None and entry["mimi"] != mimi_fingerprint:
        raise UserError(f"{path}: {describe_difference(entry['mimi'], mimi_fingerprint)}")
    try:
        date = None if audio_path is None else os.stat(audio_path).st_mtime_ns
    except OSError:
        return
    if date is None or (date == entry.get("audio_mtime_ns") and date % 10**9):
        return
    now = audio_fingerprint(audio_path)
    if entry["audio"] != now:
        raise UserError(
            f"{path}: made of audio {entry['audio']}, and {audio_path} is now {now}: it has changed since; "
            "run precompute_codes.py again"
        )


def describe_difference(found: str, wanted: str) -> str:
    """Return what is wrong with codes of the Mimi `found` for a model whose Mimi is `wanted`, and what to do."""
    (made, _, had), (digest, _, keys) = found.partition("-"), wanted.partition("-")
    if made != digest or not had.isdigit():
        return (
            f"made by Mimi {found}, and this model's is {wanted}; run precompute_codes.py again with this model's "
            "--hf-repo or --mimi-path"
        )
    flag = "with" if int(keys) < int(had) else "without"
    return (
        f"made for another runtime: Mimi's attention saw {had} steps, and it sees {keys} where this model is served; "
        f"run precompute_codes.py {flag} --personaplex and with another --output-dir"
    )
