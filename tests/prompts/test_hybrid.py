"""Conditioning and expansion: what is trained is what the runtime feeds.

`Runtime` is an independent model of the inference engine, written from its description: a ring of delayed columns,
one provided frame a step, the transformer reading the column before the one it predicts.
"""

import io
import itertools
import random
import tarfile

import pytest
import torch
from moshi.models import LMModel, loaders
from torch.nn import functional as F

from finetune.cli import UserError
from finetune.model.expansion import expand_moshiko_to_personaplex
from finetune.model.training_lm import TrainingLM
from finetune.prompts.embedded import load_embedded
from finetune.prompts.hybrid import VoicePrompt, build_prompt, prompt_length
from finetune.prompts.same_speaker import voice_segments
from finetune.prompts.text import wrap_system_prompt
from finetune.prompts.voices import VoiceBook, cache_folder, unpack_voices
from finetune.streams import DEP_Q, SINE_TOKENS, stack_streams
from tests.engine import DELAYS, TINY, Runtime, embed, engine_frames, fused, our_inputs, random_frames, tiny_lm

# --- the runtime ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_prompt_inputs_are_the_runtimes(seed):
    rng = random.Random(seed)
    voice = [f[1:9] for f in random_frames(rng, rng.choice([0, 1, 2, rng.randint(3, 200)]))]
    text = [rng.randrange(4, 60) for _ in range(rng.choice([0, 1, rng.randint(2, 200)]))]
    dialogue = random_frames(rng, rng.randint(2, 60))
    expected = Runtime().run(engine_frames(voice, text, dialogue)).inputs

    voice_codes = torch.tensor(voice, dtype=torch.long).reshape(len(voice), 8).T
    prompt = build_prompt(VoicePrompt("v", codes=voice_codes) if voice else None, text)
    frames = torch.tensor(dialogue).T
    sequence = torch.cat([prompt.frames, stack_streams(frames[0].tolist(), frames[1:9], frames[9:])], dim=1)
    assert prompt.embeddings is None
    assert our_inputs(sequence) == expected
    assert prompt.frames.shape[1] == prompt_length(len(voice), len(text))


def test_keeping_the_first_frame_would_be_wrong():
    rng = random.Random(1)
    dialogue = random_frames(rng, 5)
    frames = engine_frames([f[1:9] for f in random_frames(rng, 20)], [7, 8], dialogue)
    expected = Runtime().run(frames).inputs
    wrong = our_inputs(torch.tensor(frames).T)
    assert sum(a != b for a, b in zip(wrong, expected)) > 20


@pytest.mark.parametrize("length", [4, 5, 6, 7, 8, 60, 173])
def test_prompt_of_a_shipped_voice_is_the_runtimes(length, tmp_path):
    rng = random.Random(length)
    lm = tiny_lm(DEP_Q)
    voice = [f[1:9] for f in random_frames(rng, length)]
    dialogue, text = random_frames(rng, 9), [11, 12, 13]
    torch.save(Runtime().run([[3, *codes, *SINE_TOKENS] for codes in voice]).save_voice(lm), tmp_path / "v.pt")
    columns = torch.tensor(Runtime().run(engine_frames(voice, text, dialogue)).inputs).T[None]

    loaded = load_embedded(tmp_path / "v.pt", DELAYS, lambda c: embed(lm, c.view(1, 17, 1))[0, 0].detach())
    prompt = build_prompt(loaded, text)
    frames = torch.tensor(dialogue).T
    sequence = torch.cat([prompt.frames, frames], dim=1)
    assert loaded.frames == length and len(prompt.embeddings) == length - 1
    ours = torch.tensor(our_inputs(sequence))
    inputs = embed(lm, ours.T[None].clamp(min=-1))
    inputs[:, : length - 1] = prompt.embeddings
    assert torch.equal(inputs, embed(lm, columns))
    assert ours[length - 1 :].tolist() == columns[0].T[length - 1 :].tolist(), "tokens after the embeddings"


@pytest.mark.parametrize("with_embeddings", [False, True])
def test_teacher_forced_equals_streaming(with_embeddings, tmp_path):
    """Cross-entropy of each dialogue frame: our training forward against moshi's stack stepping column by column."""
    rng = random.Random(5)
    lm = tiny_lm(DEP_Q)
    voice = [f[1:9] for f in random_frames(rng, 12)]
    dialogue, text = random_frames(rng, 10), [11, 12, 13, 14]
    columns = torch.tensor(Runtime().run([*engine_frames(voice, text, dialogue), [0] * 17]).inputs)
    streamed = []
    with torch.no_grad(), lm.streaming(1):
        for column, following in itertools.pairwise(columns):
            out, text_logits = lm.forward_text(column.view(1, 17, 1))
            losses = [F.cross_entropy(text_logits[0, 0], following[:1])]
            with lm.depformer.streaming(1):
                for k in range(DEP_Q):
                    logits = lm.forward_depformer(k, following[k].view(1, 1, 1), out)
                    losses.append(F.cross_entropy(logits[0, 0], following[k + 1 : k + 2], ignore_index=2048))
            streamed.append(torch.stack(losses))
    streamed = torch.stack(streamed)  # [columns, 17], column t predicts column t + 1

    if with_embeddings:
        torch.save(Runtime().run([[3, *codes, *SINE_TOKENS] for codes in voice]).save_voice(lm), tmp_path / "v.pt")
        source = load_embedded(tmp_path / "v.pt", DELAYS, lambda c: embed(lm, c.view(1, 17, 1))[0, 0].detach())
    else:
        source = VoicePrompt("v", codes=torch.tensor(voice).T)
    prompt = build_prompt(source, text)
    sequence = torch.cat([prompt.frames, torch.tensor(dialogue).T], dim=1)[None]
    model = TrainingLM(lm, gradient_checkpointing=False)
    embeddings = None if prompt.embeddings is None else prompt.embeddings[None]
    lengths = None if prompt.embeddings is None else torch.tensor([len(prompt.embeddings)])
    start = prompt.frames.shape[1]
    for frame in range(start, sequence.shape[2] - 1):
        mask = torch.zeros(1, sequence.shape[2], dtype=torch.bool)
        mask[0, frame] = True
        with torch.no_grad():
            ce = model(sequence, mask, embeddings, lengths).ce
        expected = torch.stack([streamed[frame + DELAYS[k], k] for k in range(17)])
        assert torch.allclose(ce[0] + ce[1], expected[0], atol=1e-4)
        assert torch.allclose(ce[2:], expected[1:], atol=1e-4)


# --- voices -----------------------------------------------------------------------------------------------------


def saved_voice(tmp_path, lm, length=20, **changes):
    frames = [[3, *f[1:9], *SINE_TOKENS] for f in random_frames(random.Random(3), length)]
    path = tmp_path / "VOICE.pt"
    torch.save(Runtime().run(frames).save_voice(lm) | changes, path)
    return path


def test_voices_of_other_tables_are_refused(tmp_path):
    lm, other = tiny_lm(DEP_Q), tiny_lm(DEP_Q, seed=1)
    path = saved_voice(tmp_path, lm)
    table = lambda m: lambda c: embed(m, c.view(1, 17, 1))[0, 0].detach()
    load_embedded(path, DELAYS, table(lm))
    with pytest.raises(UserError, match="other embedding tables"):
        load_embedded(path, DELAYS, table(other))
    halved = lambda c: table(lm)(c).bfloat16()
    load_embedded(path, DELAYS, lambda c: halved(c).float())


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"cache": torch.zeros(1, 17, 3, dtype=torch.long)}, r"\[1, 17, 4\]"),
        ({"cache": None}, "needs the tensors"),
        ({"embeddings": torch.zeros(19, 1, 1, 8)}, "dimension 8"),
    ],
)
def test_malformed_voices_are_refused(tmp_path, changes, sentence):
    path = saved_voice(tmp_path, tiny_lm(DEP_Q), **changes)
    with pytest.raises(UserError, match=sentence):
        load_embedded(path, DELAYS, lambda c: torch.zeros(32))


def test_a_voice_file_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"embeddings": Evil(), "cache": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="not a voice file"):
        load_embedded(tmp_path / "evil.pt", DELAYS, lambda c: c)
    assert not (tmp_path / "written").exists()


def test_names_lead_to_the_folder_then_the_archive(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/NATF2.pt").write_bytes(b"mine")
    archive = tmp_path / "voices.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("voices/NATF2.pt", "voices/NATM1.pt"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"own"))
    opened = []
    book = VoiceBook(tmp_path / "mine", lambda: opened.append(1) or archive)
    assert book.find("NATF2").read_bytes() == b"mine" and not opened
    assert book.find("NATM1.pt").read_bytes() == b"own" == book.find("NATM1").read_bytes()
    assert len(opened) == 1
    with pytest.raises(UserError, match="no voice 'NATX9'"):
        book.find("NATX9")


def test_an_archive_cannot_write_outside_its_folder(tmp_path):
    archive = tmp_path / "voices.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("../escaped.pt")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack_voices(archive)
    assert not (cache_folder() / "escaped.pt").exists()


def test_stretches_of_the_same_speaker_do_not_touch():
    words = [(f"w{i}", 0.5 * i, 0.5 * i + 0.45) for i in range(100)]
    first, second = voice_segments(words, 50.0)
    assert first[1] <= second[0] or second[1] <= first[0]
    assert voice_segments([("a", 0.0, 0.2)], 50.0) == []


@pytest.mark.parametrize(
    "text, wrapped",
    [
        (" You are Ada. ", "<system> You are Ada. <system>"),
        ("<system> You are Ada. <system>", "<system> You are Ada. <system>"),
        ("<system> half", "<system> <system> half <system>"),
        ("  ", ""),
    ],
)
def test_wrapping(text, wrapped):
    assert wrap_system_prompt(text) == wrapped
    assert wrap_system_prompt(wrapped) == wrapped


# --- expansion --------------------------------------------------------------------------------------------------


def test_shapes_of_the_7b_expansion():
    with torch.device("meta"):
        lm = LMModel(device="meta", dtype=torch.bfloat16, **loaders._lm_kwargs)
    small, big = fused(lm), expand_moshiko_to_personaplex(fused(lm))
    for layer in range(6):
        prefix = f"depformer.layers.{layer}."
        assert big[prefix + "self_attn.in_proj_weight"].shape == (49152, 1024)
        assert big[prefix + "self_attn.out_proj.weight"].shape == (16384, 1024)
        assert {f"{prefix}gating.{n}.linear_{d}.weight" for n in range(16) for d in ("in", "out")} <= big.keys()
    for head, count in (("linears", 16), ("depformer_in", 16), ("depformer_emb", 15)):
        assert {key for key in big if key.startswith(head + ".")} == {f"{head}.{n}.weight" for n in range(count)}
    assert big["depformer_text_emb.weight"].shape == (32001, 1024)
    assert len(big) - len(small) == 120  # 119 copies and depformer_emb.7
    assert len(big) == 475  # as many as NVIDIA's file holds
    full = LMModel(device="meta", dtype=torch.bfloat16, **loaders._lm_kwargs | {"dep_q": 16})
    assert {k: v.shape for k, v in fused(full).items()} == {k: v.shape for k, v in big.items()}


@pytest.mark.parametrize("layout", ["fused", "split"])
def test_expansion_keeps_text_and_agent_logits(layout):
    """In float64: attention over 16 steps sums in another order than over 8, which float32 shows in its last bits."""
    lm = tiny_lm(8).double()
    state = fused(lm) if layout == "fused" else lm.state_dict()
    big = LMModel(device="cpu", dtype=torch.float64, **TINY | {"dep_q": DEP_Q})
    expanded = expand_moshiko_to_personaplex(state)
    big.load_state_dict(expanded, strict=True)
    codes = torch.randint(0, 60, (2, 17, 30))
    with torch.no_grad():
        a, b = lm(codes), big(codes)
    assert torch.equal(a.text_logits, b.text_logits)
    valid = a.mask
    torch.testing.assert_close(a.logits[valid], b.logits[:, :8][valid], rtol=0, atol=1e-13)
    assert torch.isfinite(b.logits[b.mask]).all()
    assert (expanded["depformer_emb.7.weight"] == 0).all()
    for i in range(8):
        assert torch.equal(expanded[f"linears.{i}.weight"], expanded[f"linears.{i + 8}.weight"])


@pytest.mark.parametrize("layout", ["fused", "split"])
def test_expansion_aliases_nothing(layout):
    lm = tiny_lm(8)
    state = fused(lm) if layout == "fused" else dict(lm.state_dict())
    tensors = [*expand_moshiko_to_personaplex(state).values(), *state.values()]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda s: s.update({"depformer_emb.7.weight": s["depformer_emb.6.weight"]}), "unexpected depformer_emb.7"),
        (lambda s: s.pop("linears.3.weight"), "missing linears.3.weight"),
        (lambda s: s.update({"linears.8.weight": s["linears.0.weight"]}), "unexpected linears.8"),
        (lambda s: s.update({"depformer.extra": s["linears.0.weight"]}), "unexpected depformer.extra"),
    ],
)
def test_expansion_refuses_anything_else(change, sentence):
    state = dict(tiny_lm(8).state_dict())
    change(state)
    with pytest.raises(UserError, match=sentence):
        expand_moshiko_to_personaplex(state)
    with pytest.raises(UserError, match="cannot be expanded"):
        expand_moshiko_to_personaplex(tiny_lm(DEP_Q).state_dict())
