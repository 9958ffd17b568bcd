"""Encoding with Mimi, frame by frame as the servers do, over many streams at once."""

import ctypes
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress

import numpy as np
import torch
from moshi.models import MimiModel
from moshi.utils.compile import no_cuda_graph
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from finetune.audio.files import FRAME_SIZE
from finetune.cli import UserError

SLOTS = {"cpu": 32, "cuda": 64}
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
        return SLOTS["cpu"]
    # What torch keeps for later is not free to others, but it is to torch.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + kept
    return max(2, min(SLOTS["cuda"], free // _LANE_BYTES // 2 * 2))


def keep_freed_memory() -> None:
    """Makes malloc keep what this process frees. Frames ask for the same few large blocks again and again; returned
    to the system in between, they come back page by page, which on a CPU is a quarter of the time. Without glibc: as
    it was."""
    with suppress(TypeError, OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def encode_audio(mimi: MimiModel, wavs: Sequence[Tensor | np.ndarray], exact: bool | None = None) -> list[Tensor]:
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
    lanes = _TRAINING_LANES if on_cuda and not exact else min(len(wavs), SLOTS["cpu"])
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
