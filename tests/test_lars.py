"LARS against its rule by hand and against timm's, a resumed state, and the schedule."

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dainv.lars import LARS, ramp_cosine


def parameters(seed=0, dtype=torch.float32):
    "Tensors of several shapes, one of them zero."
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=g, dtype=dtype) for shape in ((4, 3), (5,), (2, 3, 3, 3), (1,))]
    return [nn.Parameter(t) for t in [*tensors, torch.zeros(6, dtype=dtype)]]


def give_gradients(params, seed):
    g = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=g, dtype=p.dtype)


def test_steps_are_those_of_the_rule():
    ours = parameters(dtype=torch.float64)
    by_hand, velocity = [p.detach().clone() for p in ours], [torch.zeros_like(p) for p in ours]
    optimizer = LARS(ours, lr=0.7, momentum=0.8, weight_decay=0.01, trust=0.02, eps=1e-3)
    for step in range(4):
        give_gradients(ours, step)
        ours[1].grad.zero_() if step == 2 else None
        for w, v, p in zip(by_hand, velocity, ours, strict=True):
            w_norm, g_norm = w.norm().item(), p.grad.norm().item()
            a = 0.02 * w_norm / (g_norm + 0.01 * w_norm + 1e-3) if w_norm > 0 and g_norm > 0 else 1.0
            v.mul_(0.8).add_(a * (p.grad + 0.01 * w))
            w.sub_(0.7 * v)
        optimizer.step()
        for w, p in zip(by_hand, ours, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("decay", [1e-6, 1e-2])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_is_that_of_timm(decay, momentum):
    timm_lars = pytest.importorskip("timm.optim.lars").Lars
    ours, theirs = parameters(), parameters()
    options = dict(lr=1.3, momentum=momentum, weight_decay=decay)
    optimizers = LARS(ours, **options), timm_lars(theirs, **options, trust_coeff=1e-3, eps=1e-8)
    for step in range(5):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            give_gradients(params, step)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_the_first_step_does_not_depend_on_the_size_of_the_gradient(scale, seed):
    moved = []
    for factor in (1.0, scale):
        params = parameters(seed, torch.float64)[:4]
        give_gradients(params, seed)
        for p in params:
            p.grad *= factor
        LARS(params, lr=1.0, weight_decay=0.0, eps=0.0).step()
        moved.append(params)
    for a, b in zip(*moved, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_excluded_tensors_take_plain_steps_without_decay():
    ours, plain = parameters(), parameters()
    optimizer = LARS(ours, lr=0.1, weight_decay=0.5, exclude_1d=True)
    sgd = torch.optim.SGD(plain, lr=0.1, momentum=0.9)
    for step in range(3):
        for params in (ours, plain):
            give_gradients(params, step)
        optimizer.step(), sgd.step()
    same = [torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, plain, strict=True)]
    assert same == [p.ndim <= 1 for p in ours]


@pytest.mark.parametrize("exclude", [False, True])
def test_the_learning_rate_stands_outside_of_the_momentum(exclude):
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = LARS([w], lr=1.0, momentum=0.5, weight_decay=0.0, exclude_1d=exclude)
    w.grad = torch.tensor([0.0, 2.0])
    optimizer.step()
    first, step = w.detach().clone(), (torch.tensor([3.0, 4.0]) - w.detach())
    optimizer.param_groups[0]["lr"] = 0.1
    w.grad = torch.zeros(2)  # the momentum alone
    optimizer.step()
    torch.testing.assert_close(first - w.detach(), 0.1 * 0.5 * step, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("exclude", [False, True])
def test_a_resumed_optimizer_goes_on_bit_for_bit(exclude):
    params = parameters()
    optimizer = LARS(params, lr=0.3, exclude_1d=exclude)
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = [nn.Parameter(p.detach().clone()) for p in params]
    later = LARS(resumed, lr=9.0)
    later.load_state_dict(torch.load(file, weights_only=True))
    for step in range(3, 6):
        for some, one in ((params, optimizer), (resumed, later)):
            give_gradients(some, step)
            one.step()
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))


def test_tensors_without_gradient_stay_and_groups_have_their_own_rate():
    still, slow, fast = (nn.Parameter(torch.ones(3, 2)) for _ in range(3))
    optimizer = LARS([dict(params=[still, slow]), dict(params=[fast], lr=2.0)], lr=1.0, weight_decay=0.0)
    for p in (slow, fast):
        p.grad = torch.ones(3, 2)
    optimizer.step()
    assert torch.equal(still, torch.ones(3, 2)) and still not in optimizer.state
    torch.testing.assert_close((1 - fast) / (1 - slow), torch.full((3, 2), 2.0), rtol=1e-3, atol=0)


def test_a_closure_is_called_with_gradients_and_a_scheduler_sets_the_rate():
    w = nn.Parameter(torch.ones(4, 2))
    optimizer = LARS([w], lr=3.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: ramp_cosine(epoch, 50))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3)

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 8
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.6)
    assert (w < 1).all()


def test_a_copy_is_independent():
    params = parameters()
    give_gradients(params, 0)
    optimizer = LARS(params, lr=0.3)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    assert not torch.equal(before["state"][0]["momentum_buffer"], optimizer.state_dict()["state"][0]["momentum_buffer"])


@pytest.mark.parametrize(
    "epoch, rate", [(0, 0.3), (1, 0.6), (4, 1.5), (8, 2.7), (9, 2.7665), (10, 2.7135), (25, 1.5), (49, 0.00296)]
)
def test_the_published_schedule(epoch, rate):
    assert 3.0 * ramp_cosine(epoch, 50) == pytest.approx(rate, abs=1e-4)


def test_without_ramp_it_is_a_cosine_that_ends_at_zero():
    assert [ramp_cosine(e, 4, ramp=0) for e in (0, 2, 4)] == pytest.approx([1.0, 0.5, 0.0], abs=1e-12)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(lr=-0.1), "lr=-0.1"),
        (dict(lr=math.nan), "lr=nan"),
        (dict(lr=math.inf), "lr=inf"),
        (dict(lr=1.0, momentum=1.0), "momentum=1.0"),
        (dict(lr=1.0, momentum=-0.1), "momentum=-0.1"),
        (dict(lr=1.0, weight_decay=-1), "weight_decay=-1"),
        (dict(lr=1.0, trust=-1), "trust=-1"),
        (dict(lr=1.0, eps=-1), "eps=-1"),
    ],
)
def test_an_impossible_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        LARS(parameters(), **options)


@pytest.mark.parametrize("arguments", [(-1, 10), (11, 10), (0, 0), (math.nan, 10), (0, 10, -1)])
def test_an_impossible_epoch_is_named(arguments):
    with pytest.raises(ValueError, match="epoch|ramp"):
        ramp_cosine(*arguments)
