"""Codes are those of the runtime that serves the model: Kyutai's for Moshi, NVIDIA's for PersonaPlex.

The golden codes come from stock moshi, frame by frame, with one key fewer for NVIDIA's. That this is what NVIDIA's
attention sees is checked against its description: of a ring that is full, it hides the oldest key.
"""

import json
import shutil

import pytest
import torch
from moshi.models import loaders
from moshi.modules.transformer import KVCacheResult, RingKVCache

import precompute_codes
from finetune.audio.codes import fingerprint_mimi, load_codes
from finetune.audio.files import read_audio
from finetune.cli import UserError
from finetune.config import load_args
from finetune.data.run_data import RunData
from finetune.distributed import session
from finetune.model.pretrained import MOSHI, PERSONAPLEX, Pretrained, lm_kwargs
from finetune.prompts.recordings import load_recording
from tests.audio.tiny_mimi import CONFIG, CONTEXT, encode_by_hand
from tests.served_model import make_served_model, write_calls
from tests.support import write_config

FAMILIES = pytest.mark.parametrize("spec", [MOSHI, PERSONAPLEX], ids=lambda spec: spec.name)
LENGTH = 4 * 24_000 - 700  # the ring of CONTEXT keys is full after a second


@pytest.fixture(scope="module")
def model(world, tmp_path_factory):
    """A tiny Moshi, from which a PersonaPlex may be trained too."""
    return make_served_model(tmp_path_factory.mktemp("codec") / "model", world, dep_q=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A manifest of one call, with a voice."""
    return write_calls(tmp_path_factory.mktemp("data"), LENGTH, "voice.wav").parent


@pytest.fixture(scope="module")
def golden(model):
    """Returns a function: the codes of a stream of samples in the runtime of a family, by stock moshi."""
    contexts = {MOSHI: CONTEXT, PERSONAPLEX: CONTEXT - 1}
    configs = {spec: CONFIG | {"transformer": CONFIG["transformer"] | {"context": c}} for spec, c in contexts.items()}
    codecs = {spec: loaders.get_mimi(model / "mimi.safetensors", config) for spec, config in configs.items()}
    return lambda spec, pcm: encode_by_hand(codecs[spec], pcm)


def test_one_key_fewer_is_what_nvidias_runtime_sees(model, golden, data, monkeypatch):
    """Its sums have another order, so that a code which is as near as another may differ. Two keys come with a frame,
    so the ring is full after CONTEXT / 2 frames: from there on the other runtime differs."""
    mimi, complete = loaders.get_mimi(model / "mimi.safetensors", CONFIG), RingKVCache.complete

    def hide_oldest(ring, *args):
        keys, values, positions = complete(ring, *args)
        oldest = positions == ring.end_offset.view(-1, 1) - ring.capacity
        return KVCacheResult(keys, values, torch.where(oldest, -1, positions))

    streams = [load_recording(data / "voice.wav"), *read_audio(data / "call.wav")]
    kyutai, nvidia = (torch.cat([golden(spec, pcm) for pcm in streams], 1) for spec in (MOSHI, PERSONAPLEX))
    monkeypatch.setattr(RingKVCache, "complete", hide_oldest)
    described = torch.cat([encode_by_hand(mimi, pcm) for pcm in streams], 1)
    assert (nvidia != described).sum() <= 2 < 8 <= (kyutai != described).sum()
    assert all(torch.equal(golden(MOSHI, pcm)[:, : CONTEXT // 2], golden(PERSONAPLEX, pcm)[:, : CONTEXT // 2])
               for pcm in streams)  # fmt: skip


@FAMILIES
def test_precomputed_codes(model, data, golden, spec, tmp_path):
    flag = ["--personaplex"] if spec is PERSONAPLEX else []
    arguments = [str(data / "calls.jsonl"), "--output-dir", str(tmp_path), "--hf-repo", str(model), "--exact", *flag]
    assert precompute_codes.main([*arguments, "--device", "cpu"]) == 0
    entry = load_codes(tmp_path / "codes/call.wav.pt")
    for codes, pcm in zip(entry["codes"].long(), read_audio(data / "call.wav"), strict=True):
        assert torch.equal(codes, golden(spec, pcm))
    assert entry["mimi"].endswith(f"-{CONTEXT - 1 if spec is PERSONAPLEX else CONTEXT}")
    # The other family refuses them at its start.
    manifest = str(tmp_path / "calls_precomputed.jsonl")
    start_data(spec, model, tmp_path, manifest)
    with pytest.raises(UserError, match=r"call\.wav\.pt: .*--personaplex"):
        start_data(MOSHI if spec is PERSONAPLEX else PERSONAPLEX, model, tmp_path, manifest)


def start_data(spec, model, folder, manifest):
    """The data of a run on one manifest."""
    settings = {"moshi_paths.hf_repo_id": str(model), "data.train_data": manifest, "do_eval": False, "duration_sec": 4}
    settings |= {"prompt.voices_dir": None, "prompt.max_sec": 5}
    args = load_args(write_config(folder, model.parent, **settings))
    checkpoint = Pretrained(str(model))
    with session("cpu") as world:
        return RunData(args, spec.prompts, checkpoint, lm_kwargs(checkpoint, spec), None, world)


@FAMILIES
def test_codes_and_voices_made_in_training(model, data, golden, spec, tmp_path):
    run = start_data(spec, model, tmp_path, str(data / "calls.jsonl"))
    codes = next(run.batches(0)).codes[0]
    frames = -(-LENGTH // 1920)
    for first, pcm in zip((1, 9), read_audio(data / "call.wav"), strict=True):
        assert torch.equal(codes[first : first + 8, -frames:], golden(spec, pcm))
    if spec is PERSONAPLEX:
        (voice,) = run.prompter.voices.values()
        assert torch.equal(voice.codes, golden(spec, load_recording(data / "voice.wav")))


@FAMILIES
def test_a_stored_model_knows_its_runtime(model, data, golden, spec, tmp_path):
    """As `generate` and `evaluate` open it: its config names the steps of its depformer."""
    folder = shutil.copytree(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dep_q": spec.dep_q or 8}))
    mimi, pcm = Pretrained(str(folder)).mimi(), load_recording(data / "voice.wav")
    assert torch.equal(encode_by_hand(mimi, pcm), golden(spec, pcm))
    assert Pretrained(str(folder)).mimi_fingerprint() == fingerprint_mimi(mimi)


@pytest.mark.parametrize("transformer", [None, {}, {"context": None}])
def test_a_codec_without_a_context_is_refused(model, tmp_path, transformer):
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "mimi_config.json").write_text(json.dumps(CONFIG | {"transformer": transformer}))
    with pytest.raises(UserError, match=r"mimi_config\.json: .*context"):
        Pretrained(str(folder)).mimi()


def test_the_published_models(tmp_path):
    """PersonaPlex's config on the hub names only its type; Mimi is the standard one."""
    (tmp_path / "config.json").write_text('{"model_type": "personaplex", "version": "7b-v1"}')
    assert Pretrained(str(tmp_path)).mimi_context() == 249
    (tmp_path / "config.json").unlink()
    moshiko = Pretrained(str(tmp_path))
    assert (moshiko.mimi_context(), moshiko.mimi_context(16)) == (250, 249)
