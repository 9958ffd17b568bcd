"""Files of codes: fingerprints of codec and audio, the format, and what is refused."""

import hashlib
import os
import pickle
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from finetune.audio.codes import (
    audio_fingerprint,
    check_codes,
    fingerprint_file,
    fingerprint_mimi,
    load_codes,
    save_codes,
)
from finetune.cli import UserError
from finetune.model.pretrained import Pretrained
from tests.audio.tiny_mimi import CONTEXT, make_mimi
from tests.support import script

# --- fingerprints -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mimi():
    return make_mimi()


def test_the_fingerprint_does_not_depend_on_the_kind_of_file(mimi, tmp_path):
    state = mimi.state_dict()
    name = fingerprint_mimi(mimi)
    save_file(state, tmp_path / "mimi.safetensors")
    torch.save({"model": state}, tmp_path / "mimi.pt")
    assert all(fingerprint_file(tmp_path / f"mimi.{suffix}", CONTEXT) == name for suffix in ("safetensors", "pt"))
    assert fingerprint_file(tmp_path / "mimi.pt", CONTEXT - 1) != name
    for names in (("in_proj_weight", "embed_avg"), ("in_proj.weight", "embed_sum")):
        renamed = {
            key.replace("in_projs.0.weight", names[0]).replace("out_projs.0.weight", "out_proj.weight")
            .replace("embedding_sum", names[1]).replace("cluster_usage", "cluster_size"): value
            for key, value in state.items()
        }  # fmt: skip
        save_file(renamed, tmp_path / "old.safetensors")
        assert fingerprint_file(tmp_path / "old.safetensors", CONTEXT) == name
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
    ("quantizer.rvq_rest.vq.layers.7._codebook.embedding_sum", False),  # codes have 8 codebooks
    ("quantizer.rvq_rest.output_proj.weight", False),
])  # fmt: skip
def test_the_fingerprint_is_of_the_weights_that_codes_depend_on(mimi, tmp_path, key, used):
    state = mimi.state_dict()
    state[key] = state[key].clone()
    state[key].view(-1)[0] += 1e-4
    save_file(state, tmp_path / "other.safetensors")
    assert (fingerprint_file(tmp_path / "other.safetensors", CONTEXT) != fingerprint_mimi(mimi)) == used


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fingerprint_in_existing_files_stays_valid(tmp_path, dtype):
    """Files of codes keep fingerprints: they must not change with the program. Those without a context have 250."""
    weights = torch.arange(6.0).view(2, 3)
    save_file({"decoder.w": torch.ones(2), "encoder.w": weights.to(dtype)}, tmp_path / "mimi.safetensors")
    digest = hashlib.sha256(b"8" + b"encoder.w[2, 3]" + np.arange(6, dtype="<f4").tobytes())
    earlier = digest.hexdigest()[:16]
    assert fingerprint_file(tmp_path / "mimi.safetensors", 249) == f"{earlier}-249"
    save_codes(tmp_path / "call.pt", torch.zeros(2, 8, 9), 0.7, earlier, "audio")
    assert load_codes(tmp_path / "call.pt")["mimi"] == fingerprint_file(tmp_path / "mimi.safetensors", 250)


def test_a_file_that_is_not_a_mimi_is_refused(world, tmp_path):
    save_file({"linear.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    torch.save({"model": {"linear.weight": torch.zeros(2)}}, tmp_path / "other.pt")
    torch.save({"model": [torch.zeros(2)]}, tmp_path / "list.pt")
    for name in ("page.pt", "page.safetensors"):
        (tmp_path / name).write_text("<!DOCTYPE html>")
    for path in [*sorted(tmp_path.iterdir()), tmp_path / "none.safetensors", tmp_path / "none.pt"]:
        with pytest.raises(UserError, match=rf"{path.name}: .*Mimi"):
            fingerprint_file(path, 250)
        with pytest.raises(UserError, match=path.name):
            Pretrained(str(world / "model"), mimi_path=str(path)).mimi()


@pytest.mark.parametrize("size", [0, 50_000, 524_288, 1_000_000])
def test_the_audio_fingerprint_depends_on_the_content_alone(tmp_path, size):
    content = np.random.default_rng(0).bytes(size)
    path = tmp_path / "a"
    path.write_bytes(content)
    blocks = [content[(size - 8192) * i // 63 :][:8192] for i in range(64)] if size > 2**19 else [content]
    name = hashlib.sha256(str(size).encode() + b"".join(blocks)).hexdigest()[:16]  # files of codes keep it
    assert audio_fingerprint(path) == name
    for other in [content + b"x", content[::-1], content[:-1] + b"!"][: 1 if size == 0 else None]:
        path.write_bytes(other)
        assert audio_fingerprint(path) != name


def test_audio_that_cannot_be_read_is_a_user_error(tmp_path):
    for path, words in ((tmp_path / "none", "none: no such file"), (tmp_path, "cannot be read")):
        with pytest.raises(UserError, match=words):
            audio_fingerprint(path)


# --- files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def entry(tmp_path):
    """(codes, their file, the audio they are made of)."""
    codes = torch.randint(0, 2048, (2, 8, 100), dtype=torch.int16)
    path, audio = tmp_path / "call.pt", tmp_path / "call.wav"
    audio.write_bytes(b"sound")
    save_codes(path, codes.long(), 7.95, "mimi-a", audio_fingerprint(audio))
    return codes, path, audio


def test_the_format_of_a_file_of_codes(entry):
    codes, path, audio = entry
    plain = torch.load(path, weights_only=True)
    assert torch.equal(plain.pop("codes"), codes)
    wanted = {
        "frame_rate": 12.5, "sample_rate": 24_000, "duration": 7.95, "mimi": "mimi-a",
        "audio": audio_fingerprint(audio), "format": 1, "exact": False,
    }  # fmt: skip
    assert plain == wanted
    mapped = load_codes(path)["codes"]
    assert torch.equal(mapped, codes) and mapped.dtype == torch.int16
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(path) in maps.read_text()  # mapped, not read

    stamp = {"audio_mtime_ns": 5, "audio_sha256": "abc"}
    save_codes(path, codes[..., ::2], np.float32(4), "mimi-b", "b", stamp, exact=True)
    plain = torch.load(path, weights_only=True)
    assert torch.equal(plain.pop("codes"), codes[..., ::2])
    assert plain == wanted | stamp | {"duration": 4.0, "mimi": "mimi-b", "audio": "b", "exact": True}


def test_a_save_that_fails_leaves_the_old_file(entry, monkeypatch):
    codes, path, _ = entry
    monkeypatch.setattr(torch, "save", lambda entry, file: (file.write(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        save_codes(path, codes, 1.0, "b", "c")
    assert load_codes(path)["mimi"] == "mimi-a"


def test_damaged_and_foreign_files_are_refused(entry, tmp_path):
    codes, path, _ = entry
    content, good = path.read_bytes(), torch.load(path, weights_only=True)

    def refused(words):
        with pytest.raises(UserError, match=rf"call\.pt: {words}"):
            load_codes(path)

    for damaged in (b"", b"hello", content[: len(content) // 2], content[:-10], pickle.dumps(print)):
        path.write_bytes(damaged)
        refused("damaged")
    missing = [{key: value for key, value in good.items() if key != each} for each in good.keys() - {"format", "exact"}]
    for foreign in ([1], {"embeddings": torch.zeros(3)}, good | {"mimi": None}, *missing):
        torch.save(foreign, path)
        refused("not a file of codes")
    for change in ({"format": 2}, {"codes": codes[:, :7]}, {"codes": codes.long()}, {"codes": codes[..., None]}):
        torch.save(good | change, path)
        refused("holds codes of format")
    path.unlink()
    refused("no such file")
    with pytest.raises(UserError, match="cannot be read"):
        load_codes(tmp_path)


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
    done = script("-c", code, entry[1], check=False)
    assert done.returncode and "UserError" in done.stderr and "data.cache_mb" in done.stderr


# --- check_codes ------------------------------------------------------------------------------------------------


def test_codes_of_another_codec_or_of_changed_audio_are_refused(entry, tmp_path):
    _, path, audio = entry
    loaded = load_codes(path)
    check_codes(loaded, path, None)
    check_codes(loaded, path, "mimi-a", audio)
    check_codes(loaded, path, "mimi-a", tmp_path / "gone.wav")
    with pytest.raises(UserError, match=r"call\.pt: .*mimi-a.*mimi-b"):
        check_codes(loaded, path, "mimi-b", audio)
    audio.write_bytes(b"other")
    check_codes(loaded, path, "mimi-a")
    with pytest.raises(UserError, match=rf"call\.pt: .*{loaded['audio']}.*call\.wav"):
        check_codes(loaded, path, None, audio)


@pytest.mark.parametrize("made, wanted, flag", [("250", "249", "with --"), ("249", "250", "without --")])
def test_codes_for_the_other_runtime_are_refused(entry, made, wanted, flag):
    codes, path, _ = entry
    save_codes(path, codes, 7.95, f"abc-{made}", "audio")
    check_codes(load_codes(path), path, f"abc-{made}")
    with pytest.raises(UserError, match=rf"call\.pt: .*{made}.*{wanted}.*{flag}personaplex.*--output-dir"):
        check_codes(load_codes(path), path, f"abc-{wanted}")


@pytest.mark.parametrize("nanoseconds, read", [(10**9 + 7, False), (10**9, True)])
def test_audio_of_the_same_date_is_not_read(entry, nanoseconds, read):
    """Unless the file system counts in whole seconds: then the date says little."""
    codes, path, audio = entry
    save_codes(path, codes, 7.95, "mimi-a", audio_fingerprint(audio), {"audio_mtime_ns": nanoseconds})
    audio.write_bytes(b"other")
    for date, is_read in ((nanoseconds, read), (nanoseconds + 9, True)):
        os.utime(audio, ns=(date, date))
        with pytest.raises(UserError, match="has changed") if is_read else nullcontext():
            check_codes(load_codes(path), path, "mimi-a", audio)
