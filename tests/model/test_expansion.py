"""The expansion from 8 to 16 codebooks: shapes, unchanged logits, independent storage, refusals."""

import itertools

import pytest
import torch
from moshi.models import LMModel, loaders
from moshi.utils.compile import no_compile

from finetune.cli import UserError
from finetune.model.build import build_lm
from finetune.model.expansion import expand_moshiko_to_personaplex
from tests.engine import TINY, fused, tiny_lm


def test_shapes_of_the_7b_expansion():
    lm = build_lm(loaders._lm_kwargs, torch.bfloat16)
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
    full = build_lm(loaders._lm_kwargs | {"dep_q": 16}, torch.bfloat16)
    assert {k: v.shape for k, v in fused(full).items()} == {k: v.shape for k, v in big.items()}


@pytest.mark.parametrize("layout", ["fused", "split"])
def test_expansion_keeps_text_and_agent_logits(layout):
    """In float64: attention over 16 steps sums in another order than over 8, which changes the last bits of float32."""
    lm = tiny_lm(8).double()
    state = fused(lm) if layout == "fused" else lm.state_dict()
    big = LMModel(device="cpu", dtype=torch.float64, **TINY | {"dep_q": 16})
    expanded = expand_moshiko_to_personaplex(state)
    big.load_state_dict(expanded, strict=True)
    codes = torch.randint(0, 60, (2, 17, 30))
    with torch.no_grad(), no_compile():
        a, b = lm(codes), big(codes)
    assert torch.equal(a.text_logits, b.text_logits)
    torch.testing.assert_close(a.logits[a.mask], b.logits[:, :8][a.mask], rtol=0, atol=1e-13)
    assert torch.isfinite(b.logits[b.mask]).all()
    assert (expanded["depformer_emb.7.weight"] == 0).all()
    for i in range(8):
        assert torch.equal(expanded[f"linears.{i}.weight"], expanded[f"linears.{i + 8}.weight"])


@pytest.mark.parametrize("layout", ["fused", "split"])
def test_expansion_shares_no_memory(layout):
    lm = tiny_lm(8)
    state = fused(lm) if layout == "fused" else dict(lm.state_dict())
    tensors = [*expand_moshiko_to_personaplex(state).values(), *state.values()]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


@pytest.mark.parametrize(
    "change, key",
    [
        (lambda s: s.update({"depformer_emb.7.weight": s["depformer_emb.6.weight"]}), "unexpected depformer_emb.7"),
        (lambda s: s.pop("linears.3.weight"), "missing linears.3.weight"),
        (lambda s: s.pop("depformer_emb.6.weight"), "missing depformer_emb.6.weight"),
        (
            lambda s: s.pop("depformer.layers.1.gating.2.linear_in.weight"),
            "missing depformer.layers.1.gating.2.linear_in",
        ),
        (lambda s: s.update({"linears.8.weight": s["linears.0.weight"]}), "unexpected linears.8"),
        (lambda s: s.update({"depformer.extra": s["linears.0.weight"]}), "unexpected depformer.extra"),
        (lambda s: s.pop("text_emb.weight"), "missing text_emb.weight"),
        (lambda s: [s.pop(f"depformer_in.{i}.weight") for i in range(8)], "missing depformer_in.0.weight"),
    ],
)
def test_expansion_refuses_other_models(change, key):
    state = dict(tiny_lm(8).state_dict())
    change(state)
    with pytest.raises(UserError, match=key):
        expand_moshiko_to_personaplex(state)


def test_expansion_refuses_a_model_of_16_codebooks():
    with pytest.raises(UserError):
        expand_moshiko_to_personaplex(tiny_lm(16).state_dict())
