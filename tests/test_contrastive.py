"NT-Xent against explicit loops, over several processes, at half precision, and what it keeps in memory."

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dainv.contrastive import ProjectionHead, nt_xent, nt_xent_parts


def by_loops(z1, z2, temperature):
    "The loss and who found whom, one pair after the other."
    z, n, loss, found = torch.cat([z1, z2]), len(z1), 0.0, []
    for i in range(2 * n):
        scores = {j: (z[i] @ z[j] / (z[i].norm() * z[j].norm()) / temperature).item() for j in range(2 * n) if j != i}
        partner = (i + n) % (2 * n)
        loss += math.log(sum(map(math.exp, scores.values()))) - scores[partner]
        found.append(max(scores, key=scores.get) == partner)
    return loss / (2 * n), found


def codes(n, d, seed=0, dtype=torch.float64):
    return torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(2, 7), d=st.integers(1, 6), seed=st.integers(0, 2**31), temperature=st.sampled_from([0.1, 0.5, 2.0])
)
def test_the_loss_is_that_of_loops(n, d, seed, temperature):
    z1, z2 = codes(n, d, seed)
    loss, found = by_loops(z1, z2, temperature)
    ours, right = nt_xent_parts(z1, z2, temperature)
    assert ours.item() == pytest.approx(loss, rel=1e-9)
    assert right.tolist() == found or d == 1, "in one dimension all cosines are 1 or -1 and many are tied"
    assert nt_xent(z2, z1, temperature).item() == pytest.approx(loss, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 6), seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3))
def test_neither_length_nor_order_of_the_codes_matters(n, seed, scale):
    z1, z2 = codes(n, 4, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    lengths = torch.rand(2, n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    assert nt_xent(*(torch.stack([z1, z2]) * lengths * scale)[:, order]).item() == pytest.approx(
        nt_xent(z1, z2).item(), rel=1e-9
    )


@pytest.mark.parametrize("n", [2, 5])
def test_known_values(n):
    alike, apart = torch.ones(n, 8, dtype=torch.float64), torch.eye(n, 8, dtype=torch.float64)
    assert nt_xent(alike, alike).item() == pytest.approx(math.log(2 * n - 1), rel=1e-12)
    assert nt_xent(apart, apart, 0.5).item() == pytest.approx(math.log1p((2 * n - 2) * math.exp(-2)), rel=1e-12)
    assert nt_xent_parts(apart, apart)[1].all()
    assert not nt_xent_parts(apart, -apart)[1].any()


def test_gradients_are_finite_differences():
    z1, z2 = codes(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.3), (z1, z2))
    assert torch.autograd.gradgradcheck(lambda a, b: nt_xent(a, b, 0.3), (z1, z2))


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_ranks_average_to_the_whole_batch(ranks):
    z = codes(6, 5).requires_grad_()
    n = 6 // ranks
    parts = [nt_xent_parts(*z[:, i : i + n], 0.4, others=(*z, i)) for i in range(0, 6, n)]
    loss, right = nt_xent_parts(*z, 0.4)
    torch.testing.assert_close(sum(p for p, _ in parts) / ranks, loss, rtol=1e-12, atol=0)
    whole, split = (torch.autograd.grad(x, z)[0] for x in (loss, sum(p for p, _ in parts) / ranks))
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-15)
    assert torch.equal(torch.cat([r.view(2, n) for _, r in parts], 1).flatten(), right)


class _Sizes(TorchDispatchMode):
    "The number of elements of the largest tensor that any operation returned."

    largest = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves(out)
        self.largest = max([self.largest, *(leaf.numel() for leaf in leaves if torch.is_tensor(leaf))])
        return out


def test_nothing_larger_than_the_matrix_of_all_pairs():
    n, d = 96, 128
    z = codes(n, d, dtype=torch.float32).requires_grad_()
    with _Sizes() as forward_and_backward:
        nt_xent(*z).backward()
    assert forward_and_backward.largest == (2 * n) ** 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype):
    z1, z2 = (z.to(dtype) for z in codes(32, 16))
    exact = nt_xent(z1.double(), z2.double(), 0.05).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(z1, z2, 0.05)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=1e-5)


def test_a_code_of_zeros_has_a_finite_gradient():
    z1, z2 = codes(4, 3)
    z1[0] = 0
    z1.requires_grad_()
    nt_xent(z1, z2).backward()
    assert z1.grad.isfinite().all()


def test_compiled_it_is_the_same():
    z1, z2 = codes(5, 4)
    compiled = torch.compile(nt_xent, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(z1, z2), nt_xent(z1, z2))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda z1, z2: nt_xent(z1[:1], z2[:1]), "a batch of 1 item"),
        (lambda z1, z2: nt_xent(z1[:0], z2[:0]), "a batch of 0 item"),
        (lambda z1, z2: nt_xent(z1, z2[:2]), "expected two views"),
        (lambda z1, z2: nt_xent(z1, z2[:, :2]), "expected two views"),
        (lambda z1, z2: nt_xent(z1[0], z2[0]), "expected two views"),
        (lambda z1, z2: nt_xent(z1, z2, 0), "temperature=0"),
        (lambda z1, z2: nt_xent(z1, z2, -0.5), "temperature=-0.5"),
        (lambda z1, z2: nt_xent(z1, z2, math.nan), "temperature=nan"),
        (lambda z1, z2: nt_xent(z1, z2, math.inf), "temperature=inf"),
        (lambda z1, z2: nt_xent(z1, z2 * math.inf), "not finite"),
        (lambda z1, z2: nt_xent(z1, z2, others=(z1, z2[:2], 0)), "others"),
        (lambda z1, z2: nt_xent(z1, z2, others=(z1[:, :2], z2[:, :2], 0)), "others"),
        (lambda z1, z2: nt_xent(z1, z2, others=(z1, z2, 1)), "not within 4"),
        (lambda z1, z2: nt_xent(z1, z2, others=(z1, z2, -1)), "not within 4"),
        (lambda z1, z2: ProjectionHead(0), "n_features=0"),
        (lambda z1, z2: ProjectionHead(4, 0), "n_out=0"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        change(*codes(4, 3))


def test_the_head_has_the_published_layers():
    head = ProjectionHead(16)
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters()}
    assert shapes == {"0.weight": (16, 16), "1.weight": (16,), "1.bias": (16,), "3.weight": (128, 16)}


def test_each_view_has_its_own_statistics():
    torch.manual_seed(0)
    head = ProjectionHead(6, 4).double()
    view, shifted = codes(8, 6)
    apart = head(view)
    together = head(torch.cat([view, shifted + 3]))[:8]
    torch.testing.assert_close(apart.mean(0), torch.zeros(4).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(apart.var(0, correction=0), torch.ones(4).double(), rtol=0, atol=1e-2)
    assert (together.mean(0).abs() > 0.1).any()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-14])
def test_an_item_without_direction_does_not_drown_the_gradient(size):
    torch.manual_seed(0)
    z1, z2 = torch.randn(6, 8), torch.randn(6, 8)
    z1[0] *= size
    z1.requires_grad_()
    nt_xent(z1, z2).backward()
    assert z1.grad.isfinite().all() and not z1.grad[0].any() and 0 < z1.grad.abs().max() < 1
