import ctypes
import gc
import os
import pickle
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from moshi.models import loaders
from safetensors.torch import save_file

from finetune.audio.codec import _REFILL_FRAMES, default_lanes, encode_audio, encode_streams
from finetune.audio.codes import (
    audio_fingerprint,
    audio_stamp,
    check_codes,
    fingerprint_file,
    fingerprint_mimi,
    load_codes,
    save_codes,
)
from finetune.cli import UserError
from finetune.model.pretrained import open_pretrained
from tests.support import ROOT

FRAME = 1920
CONTEXT = 25  # steps of Mimi's attention, here 1 s instead of 10


def make_mimi(seed=0, twins=True):
    """A tiny Mimi with random weights, whose codebooks hold each entry twice, with other last bits: which of the two
    is nearer depends on the last bits of the input. Any change of the arithmetic shows in the codes."""
    torch.manual_seed(seed)
    seanet = loaders._seanet_kwargs | {"dimension": 32, "n_filters": 4}
    transformer = loaders._transformer_kwargs | {
        "d_model": 32, "num_heads": 2, "num_layers": 2, "context": CONTEXT, "dim_feedforward": 64,
        "input_dimension": 32, "output_dimensions": [32],
    }  # fmt: skip
    quantizer = {"dimension": 16, "n_q": 10, "bins": 2048, "input_dimension": 32, "output_dimension": 32}
    parts = {"seanet": seanet, "transformer": transformer, "quantizer": quantizer}
    mimi = loaders.get_mimi(None, loaders._mimi_config | parts)
    for parameter in mimi.parameters():
        if parameter.ndim == 3:  # convolutions: louder, so that codes follow the sound
            parameter.data *= 2
    for name, buffer in mimi.named_buffers():
        if name.endswith("embedding_sum"):
            entries = 0.05 * torch.randn(1024, 16)
            other = entries * (1 + 1e-7 * torch.randn_like(entries)) if twins else 0.05 * torch.randn(1024, 16)
            buffer.copy_(torch.stack([entries, other], dim=1).flatten(0, 1))
    return mimi


@pytest.fixture(scope="module")
def mimi():
    return make_mimi()


def by_hand(mimi, wav):
    """What a server computes for one stream: [8, frames]."""
    frames = torch.nn.functional.pad(torch.as_tensor(wav), (0, -len(wav) % FRAME)).split(FRAME)
    with torch.no_grad(), mimi.streaming(1):
        return torch.cat([mimi.encode(frame[None, None]) for frame in frames], dim=-1)[0]


def make_wavs(lengths, seed=0):
    """Noise whose loudness and colour change with every frame."""
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
    return [by_hand(mimi, wav) for wav in wavs]


# --- Encoding ---


@pytest.mark.parametrize("lanes", [1, 2, 3, 8, 20])
def test_every_code_is_that_of_one_stream_alone(mimi, wavs, alone, lanes):
    assert min(len(codebook.unique()) for codebook in torch.cat(alone, dim=1)) > 20
    ended = dict(encode_streams(mimi, ([wav] for wav in wavs), lanes, exact=True))
    for i, codes in enumerate(alone):
        assert ended[i].dtype == torch.int16 and ended[i].shape == (1, 8, -(-LENGTHS[i] // FRAME))
        assert torch.equal(ended[i][0].long(), codes), i


def test_the_plain_batch_gives_a_stream_the_same_codes_whatever_is_beside_it(mimi, wavs):
    together = dict(encode_streams(mimi, ([wav] for wav in wavs), lanes=8))
    for i in (3, 5):
        [(_, codes)] = encode_streams(mimi, [[wavs[i]]], lanes=8)
        assert torch.equal(codes, together[i])


def test_lanes_may_wait_for_each_other(mimi, wavs, alone, monkeypatch):
    monkeypatch.setitem(_REFILL_FRAMES, "cpu", 8)  # as on a GPU
    ended = dict(encode_streams(mimi, ([wav] for wav in wavs), lanes=3, exact=True))
    assert all(torch.equal(ended[i][0].long(), codes) for i, codes in enumerate(alone))


def test_the_cut_into_pieces_does_not_matter(mimi, wavs, alone):
    rng = np.random.default_rng(0)
    cut = lambda wav: np.split(wav, np.sort(rng.integers(0, len(wav) + 1, 6)))
    for i, codes in encode_streams(mimi, (cut(wav) for wav in wavs), lanes=4, exact=True):
        assert torch.equal(codes[0].long(), alone[i])


@pytest.mark.parametrize("lanes", [2, 3, 5])
def test_channels_of_a_recording_take_a_lane_each(mimi, lanes):
    stereo = [np.stack(make_wavs([n, n], seed=n)) for n in (5 * FRAME, 100, 12 * FRAME + 3)]
    for i, codes in list(encode_streams(mimi, ([pcm] for pcm in stereo), lanes, exact=True)):
        assert torch.equal(codes.long(), torch.stack([by_hand(mimi, channel) for channel in stereo[i]]))
    with pytest.raises(UserError, match="2 channels need as many lanes, there are 1"):
        list(encode_streams(mimi, [[stereo[0]]], lanes=1))
    assert not mimi.is_streaming


def test_a_broken_recording_costs_the_others_nothing(mimi, wavs, alone):
    def broken(samples):
        yield np.ones(samples, dtype=np.float32)
        raise UserError("lost it")

    sources = [[wavs[3]], broken(100), [wavs[5]], broken(9 * FRAME), [np.zeros(0, dtype=np.float32)], [wavs[8]]]
    ended = dict(encode_streams(mimi, sources, lanes=2, exact=True))
    assert str(ended[1]) == str(ended[3]) == "lost it" and "0 samples" in str(ended[4])
    for i, j in ((0, 3), (2, 5), (5, 8)):
        assert torch.equal(ended[i][0].long(), alone[j])


def test_recordings_are_opened_as_lanes_become_free_and_read_as_they_are_needed(mimi):
    opened, read = [], [0] * 6

    def source(i):
        opened.append(i)
        for _ in range(40):
            read[i] += 1
            yield np.zeros(FRAME, dtype=np.float32)

    ended = encode_streams(mimi, (source(i) for i in range(6)), lanes=2)
    assert next(ended)[0] == 0
    assert opened == [0, 1, 2, 3, 4]  # two done, two in the lanes, one waiting
    assert read[2] < 40 and read[4] == 1
    ended.close()
    assert not mimi.is_streaming


def test_the_codes_of_a_long_recording_take_little_more_than_themselves(mimi):
    """16 bytes a frame and channel are codes; a tensor a frame would be some hundred more."""
    tensors = lambda: sum(type(each) is torch.Tensor for each in gc.get_objects())
    counts = []

    def source():
        for frame in range(321):
            if frame in (160, 320):
                counts.append(tensors())
            yield np.zeros(FRAME, dtype=np.float32)

    [(_, codes)] = encode_streams(mimi, [source()], lanes=1)
    assert codes.shape == (1, 8, 321) and counts[1] - counts[0] <= 160 / 16


def test_encode_keeps_the_order_and_leaves_mimi_as_it_was(mimi, wavs, alone):
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            codes = encode_audio(mimi, [torch.from_numpy(wav) for wav in wavs])
        assert not mimi.is_streaming
        for made, wanted in zip(codes, alone):
            assert made.dtype == torch.int64 and torch.equal(made, wanted)
    # Not inference tensors: these cannot be embedded where gradients are wanted.
    table = torch.nn.Embedding(2048, 2)
    table(codes[0]).sum().backward()
    assert encode_audio(mimi, []) == []
    with pytest.raises(UserError, match="0 samples"):
        encode_audio(mimi, [wavs[0], np.zeros(0, dtype=np.float32)])
    assert not mimi.is_streaming


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_what_is_freed_is_not_asked_of_the_system_again():
    program = """
import resource, sys, torch
from finetune.data import codec
if sys.argv[1] == "kept":
    codec.keep_freed_memory()
faults = []
for _ in range(24):  # it takes some, until the blocks lie so that they can be used again
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""
    faults = {}
    for how in ("kept", "returned"):
        command = [sys.executable, "-c", program, how]
        faults[how] = int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert faults["kept"] < 10 < faults["returned"], faults  # 16,384 pages, or 32 huge ones


needs_gpus = lambda count: pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs {count} GPU(s)")


@pytest.mark.parametrize("gpu", [pytest.param(i, marks=needs_gpus(i + 1)) for i in range(2)])
def test_a_gpu_makes_the_codes_of_a_cpu(wavs, gpu):
    """But for ties: also one that is not the current GPU, through CUDA graphs and without."""
    cpu, mimi = make_mimi(twins=False), make_mimi(twins=False).to(f"cuda:{gpu}")
    streamed = dict(encode_streams(mimi, ([wav] for wav in wavs), lanes=4))
    same = []
    for i, (wav, codes) in enumerate(zip(wavs, encode_audio(mimi, wavs))):
        same += [(each == by_hand(cpu, wav)).flatten() for each in (codes, streamed[i][0].long())]
    assert torch.cat(same).float().mean() > 0.99


@needs_gpus(1)
def test_encoding_between_steps_depends_on_the_sound_alone_and_keeps_torchs_memory(wavs):
    mimi = make_mimi().to("cuda")
    [alone] = encode_audio(mimi, wavs[3:4])
    assert torch.equal(encode_audio(mimi, wavs)[3], alone)
    lanes = default_lanes("cuda")
    hold = torch.empty(int(0.9 * torch.cuda.mem_get_info()[0]), dtype=torch.uint8, device="cuda")
    held = hold.numel()
    del hold  # torch keeps it, as it keeps what a training step has used
    assert default_lanes("cuda") == lanes
    assert torch.equal(encode_audio(mimi, wavs)[3], alone) and torch.cuda.memory_reserved() >= held
    torch.cuda.empty_cache()


# --- Fingerprints ---


def test_the_fingerprint_is_that_of_the_encoder(mimi, tmp_path):
    name = fingerprint_mimi(mimi)
    state = mimi.state_dict()
    save_file(state, tmp_path / "mimi.safetensors")
    torch.save({"model": state}, tmp_path / "mimi.pt")
    renamed = {
        key.replace("in_projs.0.weight", "in_proj_weight").replace("out_projs.0.weight", "out_proj.weight")
        .replace("embedding_sum", "embed_avg").replace("cluster_usage", "cluster_size"): value
        for key, value in state.items()
    }  # fmt: skip
    save_file(renamed, tmp_path / "old.safetensors")
    assert {fingerprint_file(tmp_path / f) for f in ("mimi.safetensors", "mimi.pt", "old.safetensors")} == {name}
    assert fingerprint_file(tmp_path / "mimi.safetensors", codebooks=9) != name
    assert fingerprint_mimi(make_mimi()) == name  # also before anything was encoded

    def changed(key):
        other = {k: v.clone() for k, v in state.items()}
        other[key].view(-1)[0] += 1e-4
        save_file(other, tmp_path / "other.safetensors")
        return fingerprint_file(tmp_path / "other.safetensors") != name

    heard = [
        "encoder.model.0.conv.conv.bias", "encoder_transformer.transformer.layers.1.self_attn.in_projs.0.weight",
        "downsample.conv.conv.conv.weight", "quantizer.rvq_first.vq.layers.0._codebook.embedding_sum",
        "quantizer.rvq_rest.vq.layers.6._codebook.cluster_usage", "quantizer.rvq_rest.input_proj.weight",
    ]  # fmt: skip
    unheard = [
        "decoder.model.0.conv.conv.weight", "upsample.convtr.convtr.convtr.weight",
        "quantizer.rvq_rest.vq.layers.7._codebook.embedding_sum", "quantizer.rvq_rest.output_proj.weight",
    ]  # fmt: skip
    assert all(map(changed, heard)) and not any(map(changed, unheard))


def test_a_file_that_is_no_mimi_is_refused(world, tmp_path):
    save_file({"linear.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    torch.save({"model": {"linear.weight": torch.zeros(2)}}, tmp_path / "other.pt")
    torch.save({"model": [torch.zeros(2)]}, tmp_path / "list.pt")
    for name, content in (("text", "hello"), ("page", "<!DOCTYPE html>"), ("empty", "")):
        for suffix in ("pt", "safetensors"):
            (tmp_path / f"{name}.{suffix}").write_text(content)
    for path in [*sorted(tmp_path.iterdir()), tmp_path / "none.safetensors", tmp_path / "none.pt"]:
        with pytest.raises(UserError, match=rf"{path.name}: not readable as Mimi's weights \(.+\)"):
            fingerprint_file(path)
        with pytest.raises(UserError, match=rf"{path.name}: (does not load as a Mimi|no such file)"):
            open_pretrained(str(world / "model"), mimi_path=str(path)).mimi()


@pytest.mark.parametrize("size", [0, 10, 50_000, 1_000_000])
def test_the_audio_fingerprint_follows_the_content_not_the_date(tmp_path, size):
    content = np.random.default_rng(0).bytes(size)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(content)
    os.utime(tmp_path / "b", (0, 0))
    name = audio_fingerprint(tmp_path / "a")
    assert audio_fingerprint(tmp_path / "b") == name
    others = [content + b"x", bytes(reversed(content))[:size], content[:-1] + b"!"]
    if size > 200_000:  # silence at both ends, other sound between them
        others.append(content[:10_000] + np.random.default_rng(1).bytes(size - 20_000) + content[-10_000:])
    for other in others[: 1 if size == 0 else None]:
        (tmp_path / "b").write_bytes(other)
        assert audio_fingerprint(tmp_path / "b") != name
    with pytest.raises(UserError, match="no such file"):
        audio_fingerprint(tmp_path / "c")


# --- Files ---


@pytest.fixture
def entry(tmp_path):
    codes = torch.randint(0, 2048, (2, 8, 100))
    (tmp_path / "call.wav").write_bytes(b"sound")
    save_codes(tmp_path / "call.pt", codes, 7.95, "mimi-a", audio_fingerprint(tmp_path / "call.wav"))
    return codes, tmp_path / "call.pt"


def test_a_file_of_codes_is_what_it_says(entry):
    codes, path = entry
    plain = torch.load(path, weights_only=True)
    assert torch.equal(plain["codes"], codes.short()) and plain["codes"].dtype == torch.int16
    assert {k: v for k, v in plain.items() if k != "codes"} == {
        "frame_rate": 12.5, "sample_rate": 24_000, "duration": 7.95, "mimi": "mimi-a",
        "audio": audio_fingerprint(path.with_suffix(".wav")), "format": 1, "exact": False,
    }  # fmt: skip
    mapped = load_codes(path)
    assert torch.equal(mapped["codes"], codes.short())
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(path) in maps.read_text()  # mapped, not read
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


def test_a_save_that_fails_leaves_the_old_file(entry, monkeypatch):
    codes, path = entry
    monkeypatch.setattr(torch, "save", lambda entry, file: (file.write(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        save_codes(path, codes, 1.0, "b", "c")
    assert load_codes(path)["mimi"] == "mimi-a"


def test_damaged_and_foreign_files_are_refused(entry, tmp_path):
    content = entry[1].read_bytes()
    good = torch.load(entry[1], weights_only=True)
    bad = tmp_path / "bad.pt"
    for damaged in (b"", b"hello", content[: len(content) // 2], content[:-10], pickle.dumps(print)):
        bad.write_bytes(damaged)
        with pytest.raises(UserError, match=r"bad\.pt: damaged, or not a file of codes"):
            load_codes(bad)
    for foreign in ([1], {"embeddings": torch.zeros(3)}, {k: v for k, v in good.items() if k != "audio"}):
        torch.save(foreign, bad)
        with pytest.raises(UserError, match=r"bad\.pt: not a file of codes"):
            load_codes(bad)
    for change in ({"format": 2}, {"codes": good["codes"][:, :7]}, {"codes": good["codes"].long()}):
        torch.save(good | change, bad)
        with pytest.raises(UserError, match=r"bad\.pt: holds codes of format"):
            load_codes(bad)
    with pytest.raises(UserError, match=r"none\.pt: no such file"):
        load_codes(tmp_path / "none.pt")


def test_a_process_with_too_many_maps_is_told_so(entry):
    limit = Path("/proc/sys/vm/max_map_count")
    if not limit.exists() or int(limit.read_text()) > 300_000:
        pytest.skip("no such limit here")
    code = (
        "import ctypes, os, sys\nfrom pathlib import Path\nfrom finetune.audio.codes import load_codes\n"
        "mmap, file = ctypes.CDLL(None).mmap, os.open(sys.argv[1], os.O_RDONLY)\n"
        "mmap.restype, mmap.argtypes = ctypes.c_ssize_t, [ctypes.c_void_p, *[ctypes.c_size_t] * 5]\n"
        "while mmap(None, 4096, 1, 1, file, 0) != -1: pass\n"
        "load_codes(Path(sys.argv[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, entry[1]], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode and "UserError" in done.stderr and "too many files mapped already" in done.stderr


def test_codes_of_another_codec_or_of_changed_audio_are_refused_with_both_names(entry, tmp_path):
    path, wav = entry[1], tmp_path / "call.wav"
    loaded = load_codes(path)
    check_codes(loaded)
    check_codes(loaded, path, "mimi-a", wav)
    check_codes(loaded, path, "mimi-a", tmp_path / "gone.wav")
    with pytest.raises(UserError, match=r"call\.pt: made by Mimi mimi-a, and this model's is mimi-b"):
        check_codes(loaded, path, "mimi-b", wav)
    wav.write_bytes(b"other")
    with pytest.raises(UserError, match=rf"call\.pt: made of audio {loaded['audio']}, .*call\.wav is now "):
        check_codes(loaded, path, "mimi-a", wav)


def test_audio_of_the_same_date_is_not_read(entry):
    path, wav = entry[1], entry[1].with_suffix(".wav")
    for nanoseconds, read in ((10**9 + 7, False), (10**9, True)):  # a clock of whole seconds cannot tell
        wav.write_bytes(b"sound")
        os.utime(wav, ns=(nanoseconds, nanoseconds))
        save_codes(path, entry[0], 7.95, "mimi-a", audio_fingerprint(wav), audio_stamp(wav))
        loaded = load_codes(path)
        wav.write_bytes(b"other")
        os.utime(wav, ns=(nanoseconds, nanoseconds))
        with pytest.raises(UserError, match="has changed since") if read else nullcontext():
            check_codes(loaded, path, "mimi-a", wav)
        os.utime(wav, ns=(nanoseconds + 9, nanoseconds + 9))
        with pytest.raises(UserError, match="has changed since"):
            check_codes(loaded, path, "mimi-a", wav)
