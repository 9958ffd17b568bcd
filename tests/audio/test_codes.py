import hashlib
import os
import pickle
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

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
from tests.audio.tiny_mimi import make_mimi
from tests.support import ROOT

# --- Fingerprints ---


@pytest.fixture(scope="module")
def mimi():
    return make_mimi()


def test_the_fingerprint_does_not_depend_on_the_kind_of_file(mimi, tmp_path):
    state = mimi.state_dict()
    name = fingerprint_mimi(mimi)
    assert len(name) == 16
    save_file(state, tmp_path / "mimi.safetensors")
    torch.save({"model": state}, tmp_path / "mimi.pt")
    assert fingerprint_file(tmp_path / "mimi.safetensors") == fingerprint_file(tmp_path / "mimi.pt") == name
    for names in (("in_proj_weight", "embed_avg"), ("in_proj.weight", "embed_sum")):
        renamed = {
            key.replace("in_projs.0.weight", names[0]).replace("out_projs.0.weight", "out_proj.weight")
            .replace("embedding_sum", names[1]).replace("cluster_usage", "cluster_size"): value
            for key, value in state.items()
        }  # fmt: skip
        save_file(renamed, tmp_path / "old.safetensors")
        assert fingerprint_file(tmp_path / "old.safetensors") == name
    mimi.set_num_codebooks(9)
    try:
        assert fingerprint_mimi(mimi) != name
    finally:
        mimi.set_num_codebooks(8)


@pytest.mark.parametrize("key, used", [
    ("encoder.model.0.conv.conv.bias", True),
    ("encoder_transformer.transformer.layers.1.self_attn.in_projs.0.weight", True),
    ("downsample.conv.conv.conv.weight", True),
    ("quantizer.rvq_first.vq.layers.0._codebook.embedding_sum", True),
    ("quantizer.rvq_rest.vq.layers.6._codebook.cluster_usage", True),
    ("quantizer.rvq_rest.input_proj.weight", True),
    ("decoder.model.0.conv.conv.weight", False),
    ("upsample.convtr.convtr.convtr.weight", False),
    ("quantizer.rvq_rest.vq.layers.7._codebook.embedding_sum", False),  # codes have 8 codebooks
    ("quantizer.rvq_rest.output_proj.weight", False),
])  # fmt: skip
def test_the_fingerprint_is_of_the_weights_that_codes_depend_on(mimi, tmp_path, key, used):
    state = mimi.state_dict()
    state[key] = state[key].clone()
    state[key].view(-1)[0] += 1e-4
    save_file(state, tmp_path / "other.safetensors")
    assert (fingerprint_file(tmp_path / "other.safetensors") != fingerprint_mimi(mimi)) == used


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fingerprint_in_existing_files_stays_valid(tmp_path, dtype):
    """Files of codes keep fingerprints: they must not change with the program."""
    weights = torch.arange(6.0).view(2, 3)
    save_file({"decoder.w": torch.ones(2), "encoder.w": weights.to(dtype)}, tmp_path / "mimi.safetensors")
    digest = hashlib.sha256(b"8" + b"encoder.w[2, 3]" + np.arange(6, dtype="<f4").tobytes())
    assert fingerprint_file(tmp_path / "mimi.safetensors") == digest.hexdigest()[:16]


def test_a_file_that_is_not_a_mimi_is_refused(world, tmp_path):
    save_file({"linear.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    torch.save({"model": {"linear.weight": torch.zeros(2)}}, tmp_path / "other.pt")
    torch.save({"model": [torch.zeros(2)]}, tmp_path / "list.pt")
    for name, content in (("text", "hello"), ("page", "<!DOCTYPE html>"), ("empty", "")):
        for suffix in ("pt", "safetensors"):
            (tmp_path / f"{name}.{suffix}").write_text(content)
    for path in [*sorted(tmp_path.iterdir()), tmp_path / "none.safetensors", tmp_path / "none.pt"]:
        with pytest.raises(UserError, match=rf"{path.name}: .*Mimi"):
            fingerprint_file(path)
        with pytest.raises(UserError, match=path.name):
            open_pretrained(str(world / "model"), mimi_path=str(path)).mimi()


@pytest.mark.parametrize("size", [0, 10, 50_000, 400_000, 524_288, 1_000_000])
def test_the_audio_fingerprint_depends_on_the_content_alone(tmp_path, size):
    content = np.random.default_rng(0).bytes(size)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(content)
    os.utime(tmp_path / "b", (0, 0))
    name = audio_fingerprint(tmp_path / "a")
    assert audio_fingerprint(tmp_path / "b") == name
    blocks = [content[(size - 8192) * i // 63 :][:8192] for i in range(64)] if size > 2**19 else [content]
    assert name == hashlib.sha256(str(size).encode() + b"".join(blocks)).hexdigest()[:16]  # files of codes keep it
    others = [content + b"x", bytes(reversed(content))[:size], content[:-1] + b"!"]
    for other in others[: 1 if size == 0 else None]:
        (tmp_path / "b").write_bytes(other)
        assert audio_fingerprint(tmp_path / "b") != name


def test_the_audio_stamp_is_of_the_whole_file(tmp_path):
    content = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "a").write_bytes(content)
    os.utime(tmp_path / "a", ns=(0, 123))
    wanted = {"audio_mtime_ns": 123, "audio_sha256": hashlib.sha256(content).hexdigest()}
    assert audio_stamp(tmp_path / "a") == wanted


@pytest.mark.parametrize("function", [audio_fingerprint, audio_stamp])
def test_audio_that_cannot_be_read_is_a_user_error(tmp_path, function):
    for path, words in ((tmp_path / "none", "none: no such file"), (tmp_path, "cannot be read")):
        with pytest.raises(UserError, match=words):
            function(path)


# --- Files ---


@pytest.fixture
def entry(tmp_path):
    codes = torch.randint(0, 2048, (2, 8, 100))
    (tmp_path / "call.wav").write_bytes(b"sound")
    save_codes(tmp_path / "call.pt", codes, 7.95, "mimi-a", audio_fingerprint(tmp_path / "call.wav"))
    return codes, tmp_path / "call.pt"


def test_the_format_of_a_file_of_codes(entry):
    codes, path = entry
    plain = torch.load(path, weights_only=True)
    assert torch.equal(plain.pop("codes"), codes.short())
    wanted = {
        "frame_rate": 12.5, "sample_rate": 24_000, "duration": 7.95, "mimi": "mimi-a",
        "audio": audio_fingerprint(path.with_suffix(".wav")), "format": 1, "exact": False,
    }  # fmt: skip
    assert plain == wanted
    mapped = load_codes(path)["codes"]
    assert torch.equal(mapped, codes.short()) and mapped.dtype == torch.int16
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(path) in maps.read_text()  # mapped, not read
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []

    stamp = {"audio_mtime_ns": 5, "audio_sha256": "abc"}
    save_codes(path, codes[..., ::2], np.float32(4), "mimi-b", "b", stamp, exact=True)
    plain = torch.load(path, weights_only=True)
    assert torch.equal(plain.pop("codes"), codes[..., ::2].short())
    assert plain == wanted | stamp | {"duration": 4.0, "mimi": "mimi-b", "audio": "b", "exact": True}


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
        with pytest.raises(UserError, match=r"bad\.pt: damaged"):
            load_codes(bad)
    foreign = [{key: value for key, value in good.items() if key != missing} for missing in
               ("codes", "frame_rate", "sample_rate", "duration", "mimi", "audio")]  # fmt: skip
    for each in ([1], {"embeddings": torch.zeros(3)}, good | {"mimi": None}, *foreign):
        torch.save(each, bad)
        with pytest.raises(UserError, match=r"bad\.pt: not a file of codes"):
            load_codes(bad)
    codes = good["codes"]
    for change in ({"format": 2}, {"codes": codes[:, :7]}, {"codes": codes.long()}, {"codes": codes[..., None]}):
        torch.save(good | change, bad)
        with pytest.raises(UserError, match=r"bad\.pt: holds codes of format"):
            load_codes(bad)
    for path, words in ((tmp_path / "none.pt", r"none\.pt: no such file"), (tmp_path, "cannot be read")):
        with pytest.raises(UserError, match=words):
            load_codes(path)


def test_too_many_mapped_files_are_a_user_error(entry):
    limit = Path("/proc/sys/vm/max_map_count")
    if not limit.exists() or int(limit.read_text()) > 300_000:
        pytest.skip("there is no such limit here")
    code = (
        "import ctypes, os, sys\nfrom pathlib import Path\nfrom finetune.audio.codes import load_codes\n"
        "mmap, file = ctypes.CDLL(None).mmap, os.open(sys.argv[1], os.O_RDONLY)\n"
        "mmap.restype, mmap.argtypes = ctypes.c_ssize_t, [ctypes.c_void_p, *[ctypes.c_size_t] * 5]\n"
        "while mmap(None, 4096, 1, 1, file, 0) != -1: pass\n"
        "load_codes(Path(sys.argv[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, entry[1]], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode and "UserError" in done.stderr and "data.cache_mb" in done.stderr


# --- check_codes ---


def test_codes_of_another_codec_or_of_changed_audio_are_refused(entry, tmp_path):
    path, wav = entry[1], tmp_path / "call.wav"
    loaded = load_codes(path)
    check_codes(loaded, path, None)
    check_codes(loaded, path, "mimi-a", wav)
    check_codes(loaded, path, "mimi-a", tmp_path / "gone.wav")
    with pytest.raises(UserError, match=r"call\.pt: .*mimi-a.*mimi-b"):
        check_codes(loaded, path, "mimi-b", wav)
    wav.write_bytes(b"other")
    check_codes(loaded, path, "mimi-a")
    with pytest.raises(UserError, match=rf"call\.pt: .*{loaded['audio']}.*call\.wav"):
        check_codes(loaded, path, None, wav)


@pytest.mark.parametrize("nanoseconds, read", [(10**9 + 7, False), (10**9, True)])
def test_audio_of_the_same_date_is_not_read(entry, nanoseconds, read):
    """Unless the file system counts in whole seconds: then the date says little."""
    path, wav = entry[1], entry[1].with_suffix(".wav")
    os.utime(wav, ns=(nanoseconds, nanoseconds))
    save_codes(path, entry[0], 7.95, "mimi-a", audio_fingerprint(wav), audio_stamp(wav))
    loaded = load_codes(path)
    wav.write_bytes(b"other")
    os.utime(wav, ns=(nanoseconds, nanoseconds))
    with pytest.raises(UserError, match="has changed") if read else nullcontext():
        check_codes(loaded, path, "mimi-a", wav)
    os.utime(wav, ns=(nanoseconds + 9, nanoseconds + 9))
    with pytest.raises(UserError, match="has changed"):
        check_codes(loaded, path, "mimi-a", wav)


def test_an_edit_between_the_blocks_of_the_fingerprint_is_found_by_a_thorough_check(entry):
    path, wav = entry[1], entry[1].with_suffix(".wav")
    content = bytearray(np.random.default_rng(0).bytes(1_000_000))
    wav.write_bytes(content)
    for stamp in ({}, audio_stamp(wav)):
        save_codes(path, entry[0], 7.95, "mimi-a", audio_fingerprint(wav), stamp)
        loaded = load_codes(path)
        wav.write_bytes(content)
        os.utime(wav, (5, 5))
        check_codes(loaded, path, "mimi-a", wav, thorough=True)  # another date alone is no change
        content[9_000] ^= 1
        wav.write_bytes(content)
        os.utime(wav, (6, 6))
        check_codes(loaded, path, "mimi-a", wav)
        with pytest.raises(UserError, match="has changed") if stamp else nullcontext():
            check_codes(loaded, path, "mimi-a", wav, thorough=True)
        content[9_000] ^= 1
        wav.write_bytes(content)
