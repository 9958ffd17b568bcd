"""Codes of many streams at once: those of a single stream, of bounded memory, and on a GPU."""

import ctypes

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from finetune.audio import codec
from finetune.audio.codec import encode_audio, encode_streams
from finetune.audio.memory import default_slots
from finetune.cli import UserError
from tests.audio.tiny_mimi import encode_by_hand, make_mimi
from tests.support import script

FRAME = 1920


@pytest.fixture(scope="module")
def mimi():
    return make_mimi()


def make_wavs(lengths, seed=0):
    """Noise whose loudness and spectrum change with every frame."""
    rng = np.random.default_rng(seed)
    wavs = []
    for length in lengths:
        frames = rng.standard_normal((-(-length // FRAME), FRAME)) * rng.uniform(0, 0.5, (-(-length // FRAME), 1)) ** 2
        sums = [np.convolve(frame, rng.standard_normal(30))[:FRAME] for frame in frames]
        wavs.append(np.concatenate(sums)[:length].astype(np.float32))
    return wavs


LENGTHS = [1, FRAME, FRAME + 1, 40 * FRAME, 2 * FRAME - 1, 7 * FRAME + 500, 20 * FRAME, 3 * FRAME, 9 * FRAME + 7]


@pytest.fixture(scope="module")
def wavs():
    return make_wavs(LENGTHS)


@pytest.fixture(scope="module")
def alone(mimi, wavs):
    return [encode_by_hand(mimi, wav) for wav in wavs]


@pytest.mark.parametrize("slots, refill_frames", [(1, 1), (2, 1), (3, 1), (20, 1), (3, 8)])
def test_exact_codes_are_those_of_a_single_stream(mimi, wavs, alone, slots, refill_frames, monkeypatch):
    """However a stream is cut in pieces; also if free slots wait for others, as on a GPU."""
    monkeypatch.setitem(codec._REFILL_FRAMES, "cpu", refill_frames)
    assert min(len(codebook.unique()) for codebook in torch.cat(alone, dim=1)) > 20
    rng = np.random.default_rng(0)
    pieces = lambda wav: np.split(wav, np.sort(rng.integers(0, len(wav) + 1, 6)))
    for cut in (lambda wav: [wav], pieces):
        ended = dict(encode_streams(mimi, map(cut, wavs), slots, exact=True))
        for i, codes in enumerate(alone):
            assert ended[i].dtype == torch.int16 and ended[i].shape == (1, 8, -(-LENGTHS[i] // FRAME))
            assert torch.equal(ended[i][0].long(), codes), i


def test_batch_codes_do_not_depend_on_the_other_streams(mimi, wavs):
    together = dict(encode_streams(mimi, ([wav] for wav in wavs), slots=8))
    for i in (3, 5):
        [(_, codes)] = encode_streams(mimi, [[wavs[i]]], slots=8)
        assert torch.equal(codes, together[i])


@pytest.mark.parametrize("exact", [True, False])
def test_exact_sums_are_computed_slot_by_slot(mimi, wavs, exact):
    """Each function is called as for a single stream: some of them give a batch the same codes on some machines."""
    calls = []

    class Spy(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            calls.append((function, args))
            return function(*args, **(kwargs or {}))

    with Spy():
        list(encode_streams(mimi, ([wav] for wav in wavs[:3]), slots=3, exact=exact))
    for function, dim in ((F.linear, 0), (F.conv1d, 0), (F.scaled_dot_product_attention, 0), (torch.cdist, 1)):
        assert {args[0].shape[dim] for each, args in calls if each is function} == {1 if exact else 3}
    others = {torch.matmul, torch.bmm, torch.einsum, torch.addmm, torch.Tensor.matmul, torch.Tensor.__matmul__}
    assert not others & {function for function, _ in calls}


@pytest.mark.parametrize("slots", [2, 5])
def test_each_channel_of_a_recording_takes_a_slot(mimi, slots):
    stereo = [np.stack(make_wavs([n, n], seed=n)) for n in (5 * FRAME, 100, 12 * FRAME + 3)]
    for i, codes in list(encode_streams(mimi, ([pcm] for pcm in stereo), slots, exact=True)):
        assert torch.equal(codes.long(), torch.stack([encode_by_hand(mimi, channel) for channel in stereo[i]]))
    with pytest.raises(UserError, match=r"2 channels .* 1"):
        list(encode_streams(mimi, [[stereo[0]]], slots=1))
    assert not mimi.is_streaming


def test_a_broken_recording_does_not_disturb_the_others(mimi, wavs, alone):
    def broken(samples):
        yield np.ones(samples, dtype=np.float32)
        raise UserError("unreadable")

    sources = [[wavs[3]], broken(100), [wavs[5]], broken(9 * FRAME), [np.zeros(0, dtype=np.float32)], [wavs[8]], []]
    ended = dict(encode_streams(mimi, sources, slots=2, exact=True))
    assert str(ended[1]) == str(ended[3]) == "unreadable"
    assert "0 samples" in str(ended[4]) and "0 samples" in str(ended[6])
    for i, j in ((0, 3), (2, 5), (5, 8)):
        assert torch.equal(ended[i][0].long(), alone[j])


def test_recordings_and_pieces_are_requested_as_they_are_needed(mimi):
    opened, read = [], [0] * 6

    def source(i):
        opened.append(i)
        for _ in range(40):
            read[i] += 1
            yield np.zeros(FRAME, dtype=np.float32)

    ended = encode_streams(mimi, (source(i) for i in range(6)), slots=2)
    assert next(ended)[0] == 0
    assert opened == [0, 1, 2, 3, 4]  # two have ended, two have slots, one waits
    assert read[2] < 40 and read[4] == 1
    ended.close()
    assert not mimi.is_streaming


def test_encode_audio_is_exact_on_a_cpu_unless_told_otherwise(mimi, wavs, alone):
    """It keeps the order of recordings, and the state of Mimi."""
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            codes = encode_audio(mimi, [torch.from_numpy(wav) for wav in wavs])
        assert not mimi.is_streaming
        for made, wanted in zip(codes, alone, strict=True):
            assert made.dtype == torch.int64 and torch.equal(made, wanted)
    batch = dict(encode_streams(mimi, ([wav] for wav in wavs), len(wavs)))
    for i, made in enumerate(encode_audio(mimi, wavs, exact=False)):
        assert torch.equal(made, batch[i][0].long())
    # Inference tensors could not be embedded where gradients are needed.
    table = torch.nn.Embedding(2048, 2)
    table(codes[0]).sum().backward()
    assert encode_audio(mimi, []) == []
    with pytest.raises(UserError, match="0 samples"):
        encode_audio(mimi, [wavs[0], np.zeros(0, dtype=np.float32)])
    assert not mimi.is_streaming


# --- slots and memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "free, reserved, allocated, slots", [(9, 0, 0, 8), (9, 8, 3, 14), (1, 0, 0, 2), (1000, 5, 5, 64)]
)
def test_default_slots_fit_the_free_memory_of_a_gpu(monkeypatch, free, reserved, allocated, slots):
    slot = 40 * 2**20  # bytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * slot, 10**12))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved * slot)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated * slot)
    assert default_slots("cuda") == slots
    assert default_slots("cpu") == default_slots(torch.device("cpu")) == 32


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_not_requested_from_the_system_again():
    program = """
import resource, sys, torch
from finetune.audio.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
faults = []
for _ in range(24):  # the first ones arrange the blocks so that they can be used again
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""
    kept, returned = (int(script("-c", program, how).stdout) for how in ("kept", "returned"))
    assert kept < 10 < returned  # 16,384 pages, or 32 huge ones


# --- GPU --------------------------------------------------------------------------------------------------------

needs_gpus = lambda count: pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs {count} GPU(s)")


@pytest.mark.parametrize("gpu", [pytest.param(i, marks=needs_gpus(i + 1)) for i in range(2)])
def test_a_gpu_gives_the_codes_of_a_cpu_except_for_ties(wavs, gpu):
    """Also on a GPU that is not the current one, with and without CUDA graphs."""
    cpu, mimi = make_mimi(near_ties=False), make_mimi(near_ties=False).to(f"cuda:{gpu}")
    streamed = dict(encode_streams(mimi, ([wav] for wav in wavs), slots=4))
    same = []
    for i, (wav, codes) in enumerate(zip(wavs, encode_audio(mimi, wavs))):
        same += [(each == encode_by_hand(cpu, wav)).flatten() for each in (codes, streamed[i][0].long())]
    assert torch.cat(same).float().mean() > 0.99


@needs_gpus(1)
def test_codes_made_in_training_depend_on_the_sound_alone_and_torch_keeps_its_memory(wavs):
    mimi = make_mimi().to("cuda")
    [alone] = encode_audio(mimi, wavs[3:4])
    assert torch.equal(encode_audio(mimi, wavs)[3], alone)
    slots = default_slots("cuda")
    hold = torch.empty(int(0.9 * torch.cuda.mem_get_info()[0]), dtype=torch.uint8, device="cuda")
    held = hold.numel()
    del hold  # torch keeps it, as it keeps what a training step has used
    assert default_slots("cuda") == slots
    assert torch.equal(encode_audio(mimi, wavs)[3], alone) and torch.cuda.memory_reserved() >= held
    torch.cuda.empty_cache()
