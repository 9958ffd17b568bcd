"""Encode audio with Mimi as the servers do, many streams at once.

A server encodes one stream frame by frame, 1,920 samples a call, from a fresh state. Here each stream has a slot in a
streaming batch. A slot whose stream ends is reset and takes the next one, so that all slots stay busy and memory does
not depend on the length of a stream.

Floating-point sums depend on the shapes of their matrices. A batch therefore differs from a single stream in its last
bits and, where two codes are about equally near, in a code: up to one in a thousand, as on a server with another number
of threads (NOTES.md). On a GPU a batch is in full float32, because TF32 changes far more codes. `exact` avoids the
difference: sums are computed slot by slot, in the very calls that a single stream would make. This takes four times as
long on a CPU; a GPU would spend its time launching the calls.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

import numpy as np
import torch
from moshi.models import MimiModel
from moshi.utils.compile import no_cuda_graph
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from finetune.audio.files import FRAME_SIZE
from finetune.cli import UserError

SLOTS = {"cpu": 32, "cuda": 64}  # more do not make it faster
_TRAINING_SLOTS = 32  # on a GPU that also trains: 1.3 GB. A constant, so that codes depend on the audio alone
_PIECE = 12 * FRAME_SIZE  # samples; a second of sound
_COLLECT_FRAMES = 32  # codes stay on the device this long: fetching them makes the host wait for the GPU
# How often free slots are filled. On a GPU a reset takes some 250 launches, half the time of a frame: share them.
_REFILL_FRAMES = {"cpu": 1, "cuda": 8}


def encode_audio(
    mimi: MimiModel, wavs: Sequence[Tensor | np.ndarray], exact: bool | None = None,
    advance: Callable[[int], None] = lambda samples: None,
) -> list[Tensor]:  # fmt: skip
    """Encode recordings in memory.

    Args:
        mimi: not streaming; its state is left unchanged.
        wavs: float32 [samples] at 24 kHz, of any lengths; the last frame is padded with silence.
        exact: see above. None: exact on a CPU; on a GPU a batch of constant size. In both cases codes depend on the
            audio alone.
        advance: called with the number of samples of each piece, about a second, when it is taken.
    Returns:
        int64 [codebooks, ceil(samples / 1920)] for each recording, on the CPU.
    Raises:
        UserError: a recording is empty.
    """
    if not len(wavs):
        return []
    order = sorted(range(len(wavs)), key=lambda i: -len(wavs[i]))  # so that slots end together
    on_cuda = _device(mimi).type == "cuda"
    exact = not on_cuda if exact is None else exact
    slots = _TRAINING_SLOTS if on_cuda and not exact else min(len(wavs), SLOTS["cpu"])
    codes = {}
    # To record a CUDA graph, which each call would do twice, torch first gives back all memory that it keeps.
    sources = (_pieces(wavs[i], advance) for i in order)
    with no_cuda_graph(), closing(encode_streams(mimi, sources, slots, exact)) as results:
        for index, result in results:
            if isinstance(result, UserError):
                raise result
            codes[order[index]] = result[0].long()
    return [codes[i] for i in range(len(wavs))]


def _pieces(wav: Tensor | np.ndarray, advance: Callable[[int], None]) -> Iterator[Tensor | np.ndarray]:
    for start in range(0, len(wav), _PIECE):
        yield wav[start : start + _PIECE]
        advance(len(wav[start : start + _PIECE]))


def encode_streams(
    mimi: MimiModel, sources: Iterable[Iterable[Tensor | np.ndarray]], slots: int, exact: bool = False
) -> Iterator[tuple[int, Tensor | UserError]]:
    """Encode any number of recordings of any length, `slots` channels at a time.

    Args:
        mimi: not streaming; it streams until the iterator ends or is closed, and its state is then left unchanged.
        sources: for each recording an iterable of pieces of any lengths, float32 [samples] or [channels, samples] at
            24 kHz on the CPU. Each channel takes a slot. A recording is requested one ahead of need, and its pieces
            when they are needed: read ahead in threads to decode while encoding.
        exact: see above.
    Yields:
        (index of the recording, int16 [channels, codebooks, frames] on the CPU), in the order in which recordings end.
        Instead of codes a UserError if the source raised it or is empty.
    Raises:
        UserError: a recording has more channels than there are slots.
    """
    on_cuda = _device(mimi).type == "cuda"
    refill_frames = _REFILL_FRAMES["cuda" if on_cuda else "cpu"]
    recordings = (_Recording(index, source) for index, source in enumerate(sources))
    waiting = next(recordings, None)
    active: list[_Recording] = []
    ended: list[_Recording] = []  # and not yielded yet
    free = list(range(slots))
    made: list[Tensor] = []  # codes [slots, codebooks] of each frame since the last collection, on the device

    with mimi.streaming(slots):
        for step in itertools.count():
            # 1. Read the next frame of each recording. Free the slots of recordings that have ended.
            for recording in active:
                recording.advance()
                if recording.frame is None:
                    recording.stop = len(made)
                    free += recording.slots
                    ended.append(recording)
            active = [recording for recording in active if recording.frame is not None]

            # 2. Give free slots to the next recordings.
            fresh: list[int] = []
            while waiting is not None and (not active or step % refill_frames == 0):
                if waiting.channels > slots:
                    raise UserError(f"{waiting.channels} channels need as many slots; there are {slots}")
                if waiting.channels > len(free):
                    break
                if waiting.frame is None:
                    ended.append(waiting)
                else:
                    waiting.slots, free = free[: waiting.channels], free[waiting.channels :]
                    waiting.start = len(made)
                    fresh += waiting.slots
                    active.append(waiting)
                waiting = next(recordings, None)

            # 3. Fetch codes from the device and yield those of recordings that have ended: on a CPU at once.
            due = not active or (ended and refill_frames == 1)
            if len(made) == _COLLECT_FRAMES or (made and due):
                _collect(made, ended + active)
            if not made:
                yield from ((recording.index, recording.result()) for recording in ended)
                ended.clear()
            if not active:
                return

            # 4. Encode the frame of each slot.
            if fresh and step:
                _reset(mimi, slots, fresh)
            frame = np.zeros((slots, 1, FRAME_SIZE), dtype=np.float32)
            for recording in active:
                frame[recording.slots, 0] = recording.frame
            busy = None
            if exact and slots > 1:  # CUDA graphs repeat the calls they were recorded with: all slots are busy there
                busy = list(range(slots)) if on_cuda else [slot for each in active for slot in each.slots]
            made.append(_encode_frame(mimi, torch.from_numpy(frame), busy))


class _Recording:
    """A source while it is encoded: `frame` is the current one [channels, 1920], None after the last; its codes are
    those from `start` to `stop` among the ones that are not collected yet."""

    def __init__(self, index: int, source: Iterable[Tensor | np.ndarray]):
        self.index = index
        self.error: UserError | None = None
        self.slots: list[int] = []
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
    """Yield frames [channels, 1920], the last one padded with silence. Raises UserError if there are no samples."""
    pcm, empty = None, True
    for piece in pieces:
        piece = np.atleast_2d(np.asarray(piece, dtype=np.float32))
        pcm = piece if pcm is None else np.concatenate([pcm, piece], axis=1)
        empty = empty and pcm.shape[1] == 0
        while pcm.shape[1] >= FRAME_SIZE:
            yield pcm[:, :FRAME_SIZE]
            pcm = pcm[:, FRAME_SIZE:]
    if empty:
        raise UserError("holds no sound at all: 0 samples")
    if pcm.shape[1]:
        yield np.pad(pcm, ((0, 0), (0, FRAME_SIZE - pcm.shape[1])))


def _device(mimi: MimiModel) -> torch.device:
    return next(mimi.parameters()).device


@torch.inference_mode()
def _encode_frame(mimi: MimiModel, frame: Tensor, busy: list[int] | None) -> Tensor:
    """Return codes int16 [slots, codebooks] of a frame [slots, 1, 1920]; exact for the slots in `busy` if given."""
    device = _device(mimi)
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            # Pinned memory and moshi's CUDA graphs belong to the current GPU, which may not be Mimi's.
            stack.enter_context(torch.cuda.device(device))
            stack.enter_context(_full_float32())
            frame = frame.pin_memory().to(device, non_blocking=True)
        if busy is not None:
            stack.enter_context(_SlotBySlot(busy))
        return mimi.encode(frame)[:, :, 0].short()


@torch.inference_mode()
def _reset(mimi: MimiModel, slots: int, fresh: list[int]) -> None:
    """Reset the state of the encoder in the slots `fresh`. The decoder has none: it does not run here."""
    mask = torch.zeros(slots, dtype=torch.bool)
    mask[fresh] = True
    mask = mask.to(_device(mimi))
    for part in (mimi.encoder, mimi.encoder_transformer, mimi.downsample.conv):
        part.reset_streaming(mask)


def _collect(made: list[Tensor], recordings: list[_Recording]) -> None:
    """Move the codes in `made` to their recordings."""
    codes = torch.stack(made, dim=2).cpu()
    for recording in recordings:
        recording.codes.append(codes[recording.slots, :, recording.start : recording.stop])
        recording.start = 0
    made.clear()


# Functions that sum, and the dimension of the slots in their first argument (a row of `cdist` is the frame of a slot).
_SUMS = {F.linear: 0, F.conv1d: 0, F.scaled_dot_product_attention: 0, torch.cdist: 1}


class _SlotBySlot(TorchFunctionMode):
    """Call functions that sum over channels, positions or weights once per slot, with tensors of one stream's shape.

    Other operations do not depend on the other rows. Slots that are not `busy` get the result of one that is.
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
            slot: function(*(tensor.narrow(dim, slot, 1) for tensor in args[:split]), *args[split:], **kwargs)
            for slot in self.busy
        }
        idle = done[self.busy[0]]
        return torch.cat([done.get(slot, idle) for slot in range(args[0].shape[dim])], dim=dim)


@contextmanager
def _full_float32() -> Iterator[None]:
    """Disable TF32 in convolutions, where torch uses it by default, and in matrix products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
