"""Products with hand-written gradients against autograd; what is computed in float32; chunk sizes."""

import pytest
import torch
import torch.nn.functional as F

from finetune.model.products import (
    GATED_PER_CHUNK,
    LOGITS_PER_CHUNK,
    Gate,
    Linears,
    accumulate,
    chunk_rows,
    join_chunks,
    rms_norm,
)
from finetune.tools.plan.meter import Meter

Q, N, IN, OUT, RANK = 3, 5, 4, 6, 2


def random_linears(adapters: bool, dtype: torch.dtype = torch.float64) -> Linears:
    torch.manual_seed(1)
    weight, a, b = torch.randn(Q, OUT, IN), torch.randn(Q, RANK, IN), torch.randn(Q, OUT, RANK)
    tensors = [t.to(dtype).requires_grad_() for t in ((weight, a, b) if adapters else (weight,))]
    return Linears(*tensors, scaling=1.5) if adapters else Linears(*tensors)


def reference(linears: Linears, x: torch.Tensor) -> torch.Tensor:
    """[Q, N, out] by einsum: W x + scaling B A x."""
    y = torch.einsum("qoi,qni->qno", linears.weight, x)
    if linears.a is None:
        return y
    return y + linears.scaling * torch.einsum("qor,qri,qni->qno", linears.b, linears.a, x)


@pytest.mark.parametrize("adapters", [False, True])
def test_products_and_their_gradients(adapters):
    linears = random_linears(adapters)
    leaves = [t for t in linears[:3] if t is not None]
    x = torch.randn(Q, N, IN, dtype=torch.float64, requires_grad=True)
    shared = torch.randn(N, IN, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(Q, N, OUT, dtype=torch.float64)
    torch.testing.assert_close(linears(x), reference(linears, x))
    torch.testing.assert_close(linears.fan_out(shared), reference(linears, shared.expand(Q, N, IN)))
    for ours, theirs, leaf in (
        (linears(x), reference(linears, x), x),
        (linears.backward_only(x), reference(linears, x), x),  # the values are undefined, the gradients are not
        (linears.fan_out(shared), reference(linears, shared.expand(Q, N, IN)), shared),
    ):
        expected = torch.autograd.grad(theirs, [leaf, *leaves], dy)
        for found, wanted in zip(torch.autograd.grad(ours, [leaf, *leaves], dy), expected, strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("first", [False, True])
def test_frozen_tensors_cost_no_gradient(first):
    """`first`: the input needs no gradient, as in the first layer."""
    linears = random_linears(adapters=True)
    linears.weight.requires_grad_(False)
    x = torch.randn(Q, N, IN, dtype=torch.float64, requires_grad=not first)
    y = linears(x)
    with Meter() as meter:
        y.sum().backward()
    assert linears.weight.grad is None and linears.a.grad.any() and linears.b.grad.any()
    assert (x.grad is None) == first
    products = 2 * OUT * RANK + RANK * IN + (0 if first else IN * OUT + RANK * IN)  # dlow, b, a; x by both ways
    assert meter.flops == 2 * Q * N * products


@pytest.mark.parametrize("adapters", [False, True])
def test_halves_give_the_channels_of_the_whole(adapters):
    linears = random_linears(adapters)
    leaves = [t for t in linears[:3] if t is not None]
    apart = lambda t: None if t is None else t.unflatten(1, (2, -1)).transpose(0, 1).contiguous()
    split = Linears(apart(linears.weight), linears.a, apart(linears.b), linears.scaling)
    x = torch.randn(Q, N, IN, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(Q, N, OUT, dtype=torch.float64)
    halves = split.halves(x)
    assert all(half.is_contiguous() for half in halves)
    torch.testing.assert_close(torch.cat(halves, -1), linears(x))
    known = tuple(half.detach() for half in halves)
    expected = torch.autograd.grad(linears(x), [x, *leaves], dy)
    for found in (halves, split.halves(x, known)):
        gradients = torch.autograd.grad(found, [x, *leaves], dy.chunk(2, -1), retain_graph=True)
        torch.testing.assert_close(gradients, expected)


def test_gate_is_silu_of_one_half_times_the_other():
    x, y = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    expected = F.silu(x) * y
    torch.testing.assert_close(Gate.apply(x, y), expected)
    d = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad(out, [x, y], d) for out in (Gate.apply(x, y), expected)))


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("rows_per_chunk", [2, N])
def test_head_loss_and_its_gradients(adapters, rows_per_chunk, monkeypatch):
    monkeypatch.setitem(LOGITS_PER_CHUNK, "cpu", Q * OUT * rows_per_chunk)
    linears = random_linears(adapters, torch.float32)
    leaves = [t for t in linears[:3] if t is not None]
    x = torch.randn(Q, N, IN, requires_grad=True)
    targets = torch.randint(0, OUT, (Q, N))
    targets[0, 1] = targets[2] = -1
    ce, hits = linears.loss(x, targets)
    logits = reference(linears, x)
    expected = torch.stack([F.cross_entropy(logits[q], targets[q], ignore_index=-1, reduction="sum") for q in range(Q)])
    torch.testing.assert_close(ce, expected, rtol=1e-5, atol=1e-6)
    assert hits.tolist() == (logits.argmax(-1) == targets).sum(1).tolist() and hits.dtype == torch.float32
    weights = torch.tensor([1.0, 0.5, 3.0])  # a different factor for each head
    expected_gradients = torch.autograd.grad((expected * weights).sum(), [x, *leaves])
    for found, wanted in zip(torch.autograd.grad((ce * weights).sum(), [x, *leaves]), expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_loss_of_an_impossible_target_is_finite():
    """Its probability underflows."""
    head = Linears(torch.eye(2)[None])
    ce, hits = head.loss(torch.tensor([[[500.0, 0.0]]]), torch.tensor([[1]]))
    assert ce.tolist() == [500.0] and hits.tolist() == [0.0]


def test_the_softmax_of_bfloat16_logits_is_float32():
    torch.manual_seed(0)
    head = Linears(torch.randn(1, 50, 8).bfloat16())
    x, targets = torch.randn(1, 200, 8).bfloat16(), torch.randint(0, 50, (1, 200))
    logits = torch.bmm(x, head.weight.mT).float()
    ce, _ = head.loss(x, targets)
    assert ce.dtype == torch.float32
    torch.testing.assert_close(ce[0], F.cross_entropy(logits[0], targets[0], reduction="sum"), rtol=1e-6, atol=0)


def test_gradients_of_many_chunks_are_summed_in_float32(monkeypatch):
    """In bfloat16 a sum stops growing at 256 times its parts."""
    part = torch.ones(3, dtype=torch.bfloat16)
    totals = [None, None]
    for _ in range(1000):
        totals = accumulate(totals, [part, None])
    assert totals[0].tolist() == [1000.0] * 3 and totals[1] is None

    head = Linears(torch.zeros(1, 2, 1, dtype=torch.bfloat16, requires_grad=True))
    x, targets = torch.ones(1, 1000, 1, dtype=torch.bfloat16), torch.zeros(1, 1000, dtype=torch.int64)
    monkeypatch.setitem(LOGITS_PER_CHUNK, "cpu", 2)  # one row at a time
    head.loss(x, targets)[0].sum().backward()
    assert head.weight.grad.flatten().tolist() == [-500.0, 500.0]


def test_rms_norm_computes_in_float32():
    x = (torch.randn(7, 64) * 3).bfloat16()
    alpha = torch.linspace(0.5, 1.5, 64).view(1, 1, 64)
    expected = x.float() * (x.float().pow(2).mean(-1, keepdim=True) + 1e-8).rsqrt() * alpha.flatten().bfloat16().float()
    found = rms_norm(x, alpha, 1e-8)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() <= 2**-8 * expected.abs().max()
    big = rms_norm(torch.full((1, 4), 0.1), torch.ones(4), 1.0)
    torch.testing.assert_close(big, torch.full((1, 4), 0.1 / 1.01**0.5))  # eps arrives


def test_chunks_are_equal_and_within_the_limit():
    x = torch.arange(20.0).view(1, 10, 2)
    assert [c.shape[1] for c in chunk_rows(x, 3, {"cpu": 3 * 4})] == [4, 4, 2]
    assert [c.shape[1] for c in chunk_rows(x, 3, {"cpu": 3 * 9})] == [5, 5]
    assert [c.shape[1] for c in chunk_rows(x, 3, {"cpu": 1})] == [1] * 10
    assert torch.equal(join_chunks(chunk_rows(x, 3, {"cpu": 12})), x)
    whole = chunk_rows(x, 3, {"cpu": 30})
    assert len(whole) == 1 and join_chunks(whole).data_ptr() == x.data_ptr(), "nothing is copied"
    # Elsewhere at most four, to launch few kernels.
    assert [len(c[0]) for c in chunk_rows(torch.empty(1, 10, device="meta"), 3, {"cuda": 1})] == [3, 3, 3, 1]


def test_a_cpu_holds_16_mib_of_logits_and_32_of_activations():
    """What its caches hold; float32 logits, and a GPU's limits are 8 times as large."""
    rows = lambda limits, device: len(chunk_rows(torch.empty(1, 10**5, device=device), 16 * 2048, limits)[0][0])
    assert rows(LOGITS_PER_CHUNK, "cpu") == 128 and rows(GATED_PER_CHUNK, "cpu") == 256
    assert LOGITS_PER_CHUNK["cuda"] == 8 * LOGITS_PER_CHUNK["cpu"] and GATED_PER_CHUNK["cuda"] == 8 * 2**23
