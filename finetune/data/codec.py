"""Mimi, as the servers run it, over many streams at once; and the files that keep its codes.

A server encodes frame by frame, 1,920 samples a call, from a fresh state. So does this module, with many streams as
lanes of one streaming batch: a lane whose stream ends is reset and takes the next one, so that all lanes stay busy
and memory does not depend on how long a stream is.

Floating-point sums depend on the shape of the matrices that they are part of. A batch therefore gives other last bits
than one stream alone, and once in a while another code where two are about equally near: in up to one code of a
thousand, as a server with another number of threads or another processor does (NOTES.md). A GPU's batch is in full
float32, because TF32 changes far more codes than that. `exact` avoids it: sums are made lane by lane, in the very calls
that one stream alone would make, and only the rest for all lanes at once. Every code then equals that of a server with
one stream on the same machine, whatever else is in the batch, in four times the time on a CPU; a GPU would spend its
time on launching the calls.
"""

import ctypes
import errno
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from moshi.models import MimiModel
from moshi.utils.compile import no_cuda_graph
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from finetune.cli import UserError
from finetune.data.audio import FRAME_RATE, FRAME_SIZE, SAMPLE_RATE
from finetune.jobs import replacing

CODEBOOKS = 8  # of Mimi's 32: what Moshi hears and says per channel (moshi/models/loaders.py: num_codebooks)

# --- 1. Encoding -----------------------------------------------------------------------------------------------

LANES = {"cpu": 32, "cuda": 64}
_TRAINING_LANES = 32  # on a GPU that also trains: 1.3 GB. Always as many, so that codes depend on the sound alone
_LANE_BYTES = 40 * 2**20  # of GPU memory, with the real Mimi: 16 MB are keys and values, the rest activations
_COLLECT_FRAMES = 32  # codes stay in batches for so long: fetching them makes the host of a GPU wait
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h
# How often free lanes are filled. On a GPU a reset is some 250 launches, as long as half a frame: lanes share one.
_REFILL_FRAMES = {"cpu": 1, "cuda": 8}


def default_lanes(device: torch.device | str) -> int:
    """How many channels to encode at once where nothing else runs: as many as pay, on a GPU also as many as fit."""
    device = torch.device(device)
    if device.type != "cuda":
        return LANES["cpu"]
    # What torch keeps for later is not free to others, but it is to torch.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + kept
    return max(2, min(LANES["cuda"], free // _LANE_BYTES // 2 * 2))


def keep_freed_memory() -> None:
    """Makes malloc keep what this process frees. Frames ask for the same few large blocks again and again; returned
    to the system in between, they come back page by page, which on a CPU is a quarter of the time. Without glibc: as
    it was."""
    with suppress(TypeError, OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def encode(mimi: MimiModel, wavs: Sequence[Tensor | np.ndarray], exact: bool | None = None) -> list[Tensor]:
    """Codes of recordings in memory, as a server would make them.

    Args:
        mimi: not streaming; it streams meanwhile and is left as it was.
        wavs: float32 [samples] at 24 kHz, of any lengths; the last frame is filled up with silence.
        exact: see the module's docstring; None: on a CPU, so that codes depend on the sound alone, as on a GPU, where
            the batch is always as large.
    Returns:
        int64 [codebooks, ceil(samples / 1920)] each, on the CPU.
    Raises:
        UserError: one of them is empty.
    """
    if not len(wavs):
        return []
    order = sorted(range(len(wavs)), key=lambda i: -len(wavs[i]))  # so that lanes end together
    on_cuda = _device(mimi).type == "cuda"
    exact = not on_cuda if exact is None else exact
    lanes = _TRAINING_LANES if on_cuda and not exact else min(len(wavs), LANES["cpu"])
    codes = {}
    # Recording a CUDA graph, two for each call of this function, would hand all memory that torch keeps back first.
    with no_cuda_graph(), closing(encode_streams(mimi, ([wavs[i]] for i in order), lanes, exact)) as results:
        for place, result in results:
            if isinstance(result, UserError):
                raise result
            codes[order[place]] = result[0].long()
    return [codes[i] for i in range(len(wavs))]


def encode_streams(
    mimi: MimiModel, sources: Iterable[Iterable[Tensor | np.ndarray]], lanes: int, exact: bool = False
) -> Iterator[tuple[int, Tensor | UserError]]:
    """Codes of any number of recordings of any length, `lanes` channels at a time.

    Args:
        mimi: not streaming; it streams until the iterator ends or is closed, and is then left as it was.
        sources: one iterable per recording, over pieces of any lengths, float32 [samples] or [channels, samples] on
            the CPU, at 24 kHz. A channel takes a lane. The next recording is asked for one ahead of need and pieces
            when they are needed: whoever reads ahead in threads lets decoding overlap with encoding.
        exact: see the module's docstring.
    Yields:
        (index of the recording, int16 [channels, codebooks, frames] on the CPU) in the order in which they end, or in
        place of the codes a UserError: what its source raised, or that it is empty.
    Raises:
        UserError: a recording has more channels than there are lanes.
    """
    on_cuda = _device(mimi).type == "cuda"
    refill_frames = _REFILL_FRAMES["cuda" if on_cuda else "cpu"]
    recordings = (_Recording(index, source) for index, source in enumerate(sources))
    waiting = next(recordings, None)
    active: list[_Recording] = []
    ended: list[_Recording] = []  # and not given out yet
    free = list(range(lanes))
    made: list[Tensor] = []  # codes [lanes, codebooks] of the frames since the last collection, on the device

    with mimi.streaming(lanes):
        for step in itertools.count():
            for recording in active:
                recording.advance()
                if recording.frame is None:
                    recording.stop = len(made)
                    free += recording.lanes
                    ended.append(recording)
            active = [recording for recording in active if recording.frame is not None]

            fresh: list[int] = []
            while waiting is not None and (not active or step % refill_frames == 0):
                if waiting.channels > lanes:
                    raise UserError(f"{waiting.channels} channels need as many lanes, there are {lanes}")
                if waiting.channels > len(free):
                    break
                if waiting.frame is None:
                    ended.append(waiting)
                else:
                    waiting.lanes, free = free[: waiting.channels], free[waiting.channels :]
                    waiting.start = len(made)
                    fresh += waiting.lanes
                    active.append(waiting)
                waiting = next(recordings, None)

            due = not active or (ended and not on_cuda)  # where it costs nothing, codes are given out at once
            if len(made) == _COLLECT_FRAMES or (made and due):
                _collect(made, ended + active)
            if not made:
                yield from ((recording.index, recording.result()) for recording in ended)
                ended.clear()
            if not active:
                return
            if fresh and step:
                _reset(mimi, lanes, fresh)
            frame = np.zeros((lanes, 1, FRAME_SIZE), dtype=np.float32)
            for recording in active:
                frame[recording.lanes, 0] = recording.frame
            busy = None
            if exact and lanes > 1:  # CUDA graphs keep the calls that they were recorded with: there all lanes are
                busy = list(range(lanes)) if on_cuda else [lane for each in active for lane in each.lanes]
            made.append(_encode_frame(mimi, torch.from_numpy(frame), busy))


class _Recording:
    """One source on its way through the lanes.

    Attributes:
        frame: the current one, [channels, 1920]; None when there are no more.
        start, stop: where its codes lie among those not collected yet.
    """

    def __init__(self, index: int, source: Iterable[Tensor | np.ndarray]):
        self.index = index
        self.error: UserError | None = None
        self.lanes: list[int] = []
        self.start, self.stop = 0, None
        self.codes: list[Tensor] = []
        self._frames = _frames(source)
        self.advance()
        self.channels = 0 if self.frame is None else len(self.frame)

    def advance(self) -> None:
        try:
            self.frame = next(self._frames, None)
        except UserError as error:
            self.frame, self.error = None, error

    def result(self) -> Tensor | UserError:
        return torch.cat(self.codes, dim=2) if self.error is None else self.error


def _frames(pieces: Iterable[Tensor | np.ndarray]) -> Iterator[np.ndarray]:
    """[channels, 1920] each, the last one filled up with silence."""
    rest, empty = None, True
    for piece in pieces:
        pcm = np.asarray(piece, dtype=np.float32)
        pcm = pcm[None] if pcm.ndim == 1 else pcm
        if rest is not None:
            pcm = np.concatenate([rest, pcm], axis=1)
        whole = pcm.shape[1] // FRAME_SIZE * FRAME_SIZE
        for start in range(0, whole, FRAME_SIZE):
            yield pcm[:, start : start + FRAME_SIZE]
        rest = pcm[:, whole:] if pcm.shape[1] > whole else None
        empty = empty and pcm.shape[1] == 0
    if rest is not None:
        yield np.pad(rest, ((0, 0), (0, FRAME_SIZE - rest.shape[1])))
    if empty:
        raise UserError("holds no sound at all: 0 samples")


def _device(mimi: MimiModel) -> torch.device:
    return next(mimi.parameters()).device


@torch.inference_mode()
def _encode_frame(mimi: MimiModel, frame: Tensor, busy: list[int] | None) -> Tensor:
    """Codes int16 [lanes, codebooks] of a frame [lanes, 1, 1920]; exact for the lanes in `busy` if that is given."""
    device = _device(mimi)
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            # Pinned memory and moshi's CUDA graphs belong to the current GPU, which may be another than Mimi's.
            stack.enter_context(torch.cuda.device(device))
            stack.enter_context(_full_float32())
            frame = frame.pin_memory().to(device, non_blocking=True)
        if busy is not None:
            stack.enter_context(_LaneByLane(busy))
        return mimi.encode(frame)[:, :, 0].short()


@torch.inference_mode()
def _reset(mimi: MimiModel, lanes: int, fresh: list[int]) -> None:
    """Gives lanes a fresh state. Only what encodes has one to lose: the decoder is never run here."""
    mask = torch.zeros(lanes, dtype=torch.bool)
    mask[fresh] = True
    mask = mask.to(_device(mimi))
    for part in (mimi.encoder, mimi.encoder_transformer, mimi.downsample.conv):
        part.reset_streaming(mask)


@torch.inference_mode()
def _collect(made: list[Tensor], recordings: list[_Recording]) -> None:
    """Moves the codes made so far to the recordings that they belong to."""
    codes = torch.stack(made, dim=2).cpu()
    for recording in recordings:
        recording.codes.append(codes[recording.lanes, :, recording.start : recording.stop])
        recording.start = 0
    made.clear()


# Functions, and the dimension of the lanes in their first argument (a row of `cdist` is one lane's frame).
_SUMS = {F.linear: 0, F.conv1d: 0, F.scaled_dot_product_attention: 0, torch.cdist: 1}


class _LaneByLane(TorchFunctionMode):
    """Calls whatever sums over channels, positions or weights once per lane, with tensors of one stream's shape.

    Elementwise operations and norms are the same for a row whatever is beside it. Lanes that are not `busy` get the
    result of one that is.
    """

    def __init__(self, busy: list[int]):
        super().__init__()
        self.busy = busy

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        dim = _SUMS.get(function)
        if dim is None:
            return function(*args, **kwargs)
        split = len(args) if function is F.scaled_dot_product_attention else 1  # the rest are weights
        done = {
            lane: function(*(tensor.narrow(dim, lane, 1) for tensor in args[:split]), *args[split:], **kwargs)
            for lane in self.busy
        }
        idle = done[self.busy[0]]
        return torch.cat([done.get(lane, idle) for lane in range(args[0].shape[dim])], dim=dim)


@contextmanager
def _full_float32() -> Iterator[None]:
    """No TF32, in convolutions (where torch uses it unless told otherwise) nor in matrix products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


# --- 2. Fingerprints -------------------------------------------------------------------------------------------

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


def fingerprint(mimi: MimiModel) -> str:
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


# --- 3. Files of codes -----------------------------------------------------------------------------------------

FORMAT = 1
_FIELDS = {"codes": Tensor, "frame_rate": float, "sample_rate": int, "duration": float, "mimi": str, "audio": str}


def save_codes(
    path: Path, codes: Tensor, duration_sec: float, mimi_fingerprint: str, audio_fingerprint: str,
    stamp: dict[str, str | int] | None = None, exact: bool = False,
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
    save(path, entry)


def save(path: Path, entry: object) -> None:
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


def check(
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
