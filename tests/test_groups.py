"Sums of squares inside groups and their gradient, compiled and by PyTorch, against float64."

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dainv import groups as module
from dainv.groups import Groups, group_gradient, group_moments, sums
from dainv.invariance import InvarianceObjective, invariance_loss

COMPILED = module._library() is not None
WAYS = [pytest.param(True, marks=pytest.mark.skipif(not COMPILED, reason="needs a C++ compiler")), False]


@pytest.fixture(params=WAYS, ids=lambda compiled: "compiled" if compiled else "by torch")
def way(request, monkeypatch):
    "Both ways in turn."
    if not request.param:
        monkeypatch.setattr(module, "_function", lambda *a: None)


def batch(ids, units, spread=0.1, offset=0.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    means = offset + torch.randn(int(ids.max()) + 1, units, generator=generator)
    return (means[ids] + spread * torch.randn(len(ids), units, generator=generator)).to(dtype)


def exact(x, ids, n):
    "Within, between, and the means of the groups, in float64."
    x = x.double()
    sizes = torch.bincount(ids, minlength=n).double()
    means = sums(x, ids, n) / sizes.clamp(min=1)[:, None]
    between = (means - x.mean(0)).square().sum(1)
    return sums((x - means[ids]).square().sum(1), ids, n), torch.where(sizes > 0, between, 0), means


SIZES = st.lists(st.integers(0, 6), min_size=1, max_size=7).filter(any)


def check(sizes, units, dtype, offset, shuffle, reference, incoming, seed):
    ids = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    generator = torch.Generator().manual_seed(seed)
    ids = ids[torch.randperm(len(ids), generator=generator)] if shuffle else ids
    n, x = len(sizes), batch(ids, units, offset=offset, dtype=dtype, seed=seed)
    rows = Groups.of(ids, n)
    assert rows.sizes.tolist() == sizes
    found, (within, between, means) = group_moments(x, rows), exact(x, ids, n)
    scale = x.double().sub(x[0].double()).square().sum() + 1e-30
    assert ((found.within - within).abs() <= 1e-6 * within + 1e-11 * scale).all()
    assert ((found.between - between).abs()[rows.sizes > 0] <= 1e-5 * between[rows.sizes > 0] + 1e-11 * scale).all()
    pull = torch.rand(n, generator=generator)
    classes = torch.randint(0, 3, ids.shape, generator=generator)
    others, delta_ref, push, middle = None, found.mean, torch.tensor([0.7]), x.double().mean(0)
    if reference:
        others, push, middle = (
            Groups.of(classes, 4),
            torch.rand(4, generator=generator),
            exact(x, classes, 4)[2][classes],
        )
        delta_ref = group_moments(x, others).delta
    grad, added = torch.empty_like(x), torch.randn(x.shape, generator=generator).to(dtype) if incoming else None
    group_gradient(x, rows, found.delta, others, delta_ref, pull, push, grad, added)
    pushed = push.double()[classes, None] if reference else push.double()
    true = pull.double()[ids, None] * (x.double() - means[ids]) - pushed * (x.double() - middle)
    true = true + (0 if added is None else added.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-6}.get(dtype, 1e-2)
    assert (grad.double() - true).abs().max() <= tolerance * (true.abs().max() + x.double().sub(x[0]).abs().max())


CASES = dict(
    sizes=SIZES,
    units=st.sampled_from([1, 7, 16, 40]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    offset=st.sampled_from([0.0, 50.0]),
    shuffle=st.booleans(),
    reference=st.booleans(),
    incoming=st.booleans(),
    seed=st.integers(0, 99),
)
# the mean of one group is nearly that of the batch: its distance is a difference of nearly equal numbers
NEARLY_THE_MEAN = dict(sizes=[2, 1, 0, 0, 1, 1, 2], units=1, dtype=torch.float32, offset=0.0)
NEARLY_THE_MEAN |= dict(shuffle=False, reference=False, incoming=False, seed=53)


@settings(max_examples=80, deadline=None)
@example(**NEARLY_THE_MEAN)
@given(**CASES)
def test_moments_and_gradient_compiled_where_that_is_possible(**case):
    check(**case)


@settings(max_examples=80, deadline=None)
@example(**NEARLY_THE_MEAN)
@given(**CASES)
def test_moments_and_gradient_by_torch(**case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_function", lambda *a: None)
        check(**case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tiles_leave_no_seam(way, dtype):
    units = 2 * module._TILE + 452  # the last tile ends within a vector
    check([8] * 16, units, dtype, 3.0, False, False, True, 0)
    check([5, 1, 30, 12], units, dtype, 3.0, True, True, False, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("spread", "offset"), [(0.3, 0.0), (1e-2, 5.0), (1e-3, 50.0), (1e-2, 1000.0)])
def test_the_loss_is_that_of_the_values_as_they_are_rounded(way, dtype, spread, offset):
    ids = torch.arange(16).repeat_interleave(8)[torch.randperm(128, generator=torch.Generator().manual_seed(1))]
    x = batch(ids, 3000, spread, offset, dtype)
    pairs, same = torch.pdist(x.double()).square(), torch.triu_indices(128, 128, 1)
    true = pairs[ids[same[0]] == ids[same[1]]].mean() / pairs.mean()
    assert abs(invariance_loss(x, ids).double() / true - 1) < 1e-6


def test_a_first_row_far_from_the_others_costs_no_digits(way):
    x = 1e-3 * torch.randn(64, 2000, generator=torch.Generator().manual_seed(0))
    x[0] += 1000.0
    ids = torch.arange(8).repeat_interleave(8)
    within, true = group_moments(x, Groups.of(ids, 8)).within, exact(x, ids, 8)[0]
    assert ((within / true - 1).abs() < 1e-6).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_visible(way, bad, dtype):
    ids = torch.arange(4).repeat_interleave(3)
    for row in (0, 5):
        x = batch(ids, 33, dtype=dtype)
        x[row, 17] = bad
        leaf = x.requires_grad_()
        loss = invariance_loss(leaf, ids)
        loss.backward()
        assert not loss.isfinite() and not leaf.grad.isfinite().all()


@pytest.mark.skipif(not COMPILED, reason="needs a C++ compiler")
def test_threads_change_no_bit_and_a_fork_none_either():
    ids = torch.arange(16).repeat_interleave(8)
    x = batch(ids, 40_000)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            loss = invariance_loss(leaf, ids)
            loss.backward()
            seen.append((loss.detach(), leaf.grad))
        torch.set_num_threads(2)
        child = os.fork()
        if child == 0:
            os._exit(
                0
                if torch.equal(group_moments(x, Groups.of(ids, 16)).within, group_moments(x, Groups.of(ids, 16)).within)
                else 1
            )
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


def test_the_gradient_of_what_follows_is_added_on_the_way(way):
    ids = torch.arange(6).repeat_interleave(4)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = batch(ids, 60).view(24, 3, 4, 5).to(memory_format=layout)
        objective = InvarianceObjective(["a", "b"], 0.5, exclude_last=False)
        grads = []
        for in_the_pass in (True, False):
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            shown, labels = objective.batch(ids % 4, ids), ids % 4
            a = shown.layer("a", leaf) if in_the_pass else leaf
            b = (2 * a).tanh()
            b = shown.layer("b", b) if in_the_pass else b
            logits = (b * b).mean((2, 3)).repeat(1, 2)
            if in_the_pass:
                total, parts = shown.total(logits, labels)
            else:
                total, parts = objective(dict(a=leaf, b=b), logits, labels, ids)
            total.backward()
            grads.append((total.detach(), leaf.grad, *parts["invariance"].values()))
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-8) for a, b in zip(*grads, strict=True))
        assert grads[0][1].stride() == x.stride()


def test_a_gradient_that_somebody_else_holds_is_not_changed(way):
    ids = torch.arange(4).repeat_interleave(2)
    leaf, other = batch(ids, 5).requires_grad_(), torch.zeros(8, 5, requires_grad=True)
    shown = InvarianceObjective(["a", "b"], 0.5, exclude_last=False).batch(ids % 2, ids)
    both = shown.layer("a", leaf) + other  # both get the same gradient
    (both.sum() + 100 * sum(shown.weighted)).backward()
    assert (other.grad == 1).all() and not torch.equal(leaf.grad, other.grad)


SWITCHED_OFF = """
import torch
from dainv import groups
from dainv.invariance import invariance_loss
print(groups._library(), invariance_loss(torch.arange(12.0).view(6, 2).sin(), torch.arange(6) // 2).item())
"""


def test_without_a_compiler_the_loss_is_the_same():
    shown = [
        subprocess.run(
            [sys.executable, "-c", SWITCHED_OFF],
            env={**os.environ, "DAINV_NATIVE": native},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for native in ("0", "1")
    ]
    assert shown[0][0] == "None" and float(shown[0][-1]) == pytest.approx(float(shown[1][-1]), rel=1e-6)
