"The three transformation regularisers: exact for linear encoders, differentiable twice, and alike where the transformation is small."

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dainv.data import load_data
from dainv.models import evaluating
from dainv.penalties import PENALTIES, clamped, rademacher, ramped, transformation_penalty
from dainv.spirograph import parameter_bounds, spirograph_task
from dainv.views import ColourViews, SpirographViews, ViewDraws

double = torch.float64


def grid(mean, variance):
    "All pairs of points at one standard deviation from the mean: exact means and variances, and independent."
    ends = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=len(mean))), dtype=double)
    corners = mean + variance.sqrt() * ends
    return corners.repeat_interleave(len(corners), 0), corners.repeat(len(corners), 1)


def cnn(norm=nn.BatchNorm2d, smooth=False, width=6, seed=0):
    torch.manual_seed(seed)
    act = nn.Softplus if smooth else nn.ReLU
    layers = [nn.Conv2d(3, width, 3, 2, 1), norm(width), act(), nn.Conv2d(width, width, 3, 2, 1), norm(width), act()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.fixture(scope="module")
def views():
    return SpirographViews(spirograph_task(64, 4, size=16, bounds=parameter_bounds(b=(0.5, 1.1))))


@pytest.fixture(scope="module")
def photographs():
    return ColourViews(load_data("spirograph", train_size=40, test_size=10))


def on_drawings(encoder, views, ids, dtype=torch.float32):
    "The arguments of the penalty for these items, and its law."
    one, two = (views.draw("train", ids, 0, view, seed=0).alpha.to(dtype) for view in (0, 1))
    targets = views.targets("train")[ids].to(dtype)

    def encode(alpha):
        return encoder(views.source.images(targets, alpha))

    law = dict(mean=views.mean.to(dtype), variance=views.variance.to(dtype))
    return encode, one, two, law


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), d=st.integers(1, 4), k=st.integers(1, 3))
def test_all_kinds_are_exact_for_a_linear_encoder(seed, d, k):
    g = torch.Generator().manual_seed(seed)
    A, c, mean = (torch.randn(*shape, generator=g, dtype=double) for shape in ((d, k), (d,), (k,)))
    variance = torch.rand(k, generator=g, dtype=double) + 0.1
    exact = pytest.approx(2 * (A.square() * variance).sum().item(), rel=1e-9)
    first, second = grid(mean, variance)
    for kind in ("twin", "forward"):
        penalty = transformation_penalty(lambda a: a @ A.T + c, first, second, kind=kind, normalise=False)[1]
        assert penalty.mean().item() == exact
    # Every item has the same signs, and the encoder flips its features in all 2^d ways.
    flips = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=d)), dtype=double).repeat(len(first), 1)
    alpha = first.repeat_interleave(2**d, 0)
    law = dict(mean=mean, variance=variance, normalise=False, key=(seed, torch.zeros(len(alpha), dtype=torch.int64)))
    assert transformation_penalty(lambda a: (a @ A.T + c) * flips, alpha, **law)[1].mean().item() == exact


def test_the_closed_form_is_the_mean_of_the_draws():
    torch.manual_seed(0)
    A, mean, variance = torch.randn(4, 3).double(), torch.randn(3).double(), torch.rand(3).double()
    alpha = mean + (3 * variance).sqrt() * (2 * torch.rand(50, 3).double() - 1)
    how = dict(mean=mean, variance=variance, key=(3, 1))
    closed = transformation_penalty(lambda a: (a @ A.T).tanh(), alpha, **how)[1]
    many = transformation_penalty(lambda a: (a @ A.T).tanh(), alpha, **how, draws=20_000)[1]
    hundred = transformation_penalty(lambda a: (a @ A.T).tanh(), alpha, **how, draws=100)[1]
    torch.testing.assert_close(many, closed, rtol=0.05, atol=1e-4)
    assert hundred.mean().item() == pytest.approx(closed.mean().item(), rel=0.1)
    assert (hundred - closed).abs().mean() > 3 * (many - closed).abs().mean()


def test_the_closed_form_has_no_other_terms_for_parameters_that_are_uncorrelated():
    "And would have for others: the mean of the squares is g' covariance g + (g (mean - alpha))^2."
    torch.manual_seed(0)
    g, alpha, root = torch.randn(1, 3).double(), torch.rand(1, 3).double(), torch.randn(3, 3).double()
    law = dict(mean=torch.randn(3).double(), variance=root.square().sum(1), normalise=False)
    closed = transformation_penalty(lambda a: a @ g.T, alpha, **law)[1].item()  # a sign alone does not matter
    ends = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=double)

    def average(root):
        return ((law["mean"] + ends @ root.T - alpha) @ g.T).square().mean().item()

    assert closed == pytest.approx(average(law["variance"].sqrt().diag()), rel=1e-12)
    covariance = root @ root.T
    off_diagonal = (g @ (covariance - covariance.diag().diag()) @ g.T).item()
    assert average(root) == pytest.approx(closed + off_diagonal, rel=1e-12) and abs(off_diagonal) > 0.1


def test_twin_is_unbiased_and_unit_length():
    torch.manual_seed(0)
    A = torch.randn(5, 2).double()
    alpha, other = torch.rand(2, 20_000, 2).double()

    def encode(a):
        return (a @ A.T).exp()

    unit = F.normalize(encode(torch.rand(20_000, 2).double()), dim=1)
    penalty = transformation_penalty(encode, alpha, other, kind="twin")[1]
    assert penalty.mean().item() == pytest.approx(2 * unit.var(0).sum().item(), rel=0.03)
    features = encode(other)
    given_other = transformation_penalty(encode, alpha, other_features=features, kind="twin")[1]
    assert torch.equal(given_other, penalty)


@pytest.mark.parametrize("normalise", [True, False])
def test_kinds_agree_where_parameters_move_little(views, normalise):
    encoder, ids = cnn(smooth=True).double(), torch.arange(64)
    encode, one, two, law = on_drawings(encoder, views, ids, double)
    near_one, near_two = (law["mean"] + 1e-4 * (a - law["mean"]) for a in (one, two))
    with evaluating(encoder), torch.no_grad():
        forward = transformation_penalty(encode, near_one, near_two, kind="forward", normalise=normalise)[1]
        twin = transformation_penalty(encode, near_one, near_two, kind="twin", normalise=normalise)[1]
        # the gradient, with all of its variance in the one direction that the others take
        alike = dict(mean=near_two[0], variance=torch.zeros(6, dtype=double), normalise=normalise)
        repeated = torch.zeros(4000, dtype=torch.int64)
        first_item, _, _, _ = on_drawings(encoder, views, repeated, double)
        gradient = transformation_penalty(first_item, near_one[repeated], **alike, key=(0, 0))[1]
    torch.testing.assert_close(twin, forward, rtol=1e-2, atol=0)
    assert gradient.mean().item() == pytest.approx(forward[0].item(), rel=0.1)


@pytest.mark.parametrize("kind", PENALTIES)
def test_nothing_to_penalise_where_alpha_is_ignored(kind):
    alpha, other = torch.rand(2, 7, 3)
    law = dict(mean=torch.zeros(3), variance=torch.ones(3), kind=kind)
    weight = torch.rand(7, 4, requires_grad=True)
    for encode in (lambda a: weight * 1, lambda a: weight.detach(), lambda a: weight + 0 * a.sum()):
        features, penalty = transformation_penalty(encode, alpha, other, **law)
        assert penalty.shape == (7,) and not penalty.any()
        assert torch.equal(features, weight)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("kind", PENALTIES)
def test_gradients_by_the_weights_are_finite_differences(views, kind, normalise):
    encoder, ids = cnn(smooth=True, width=3).double(), torch.arange(5)
    encode, one, two, law = on_drawings(encoder, views, ids, double)
    weight = encoder[3].weight

    def loss(scale):
        for part in (weight, encoder[0].weight, encoder[1].weight):
            part.grad = None
        features, penalty = transformation_penalty(encode, one, two, **law, kind=kind, normalise=normalise, key=(0, 0))
        return penalty.mean() + features.square().mean()

    parts = [p for name, p in encoder.named_parameters() if name in ("0.weight", "1.weight", "3.weight", "4.bias")]
    by_backward = torch.autograd.grad(loss(0), parts)
    torch.manual_seed(1)
    for part, gradient in zip(parts, by_backward, strict=True):
        direction, eps = torch.randn_like(part), 1e-5
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                part += sign * eps * direction
            values.append(loss(0).item())
            with torch.no_grad():
                part -= sign * eps * direction
        assert (values[0] - values[1]) / (2 * eps) == pytest.approx((gradient * direction).sum().item(), rel=1e-4)


@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.parametrize("half", [False, True])
def test_a_step_on_drawings(views, kind, half):
    encoder, ids = cnn().to(memory_format=torch.channels_last), torch.arange(32)
    encode, one, two, law = on_drawings(encoder, views, ids)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        features, penalty = transformation_penalty(encode, one, two, **law, kind=kind, key=(0, 0, ids))
    assert penalty.shape == (32,) and penalty.dtype == torch.float32 and (penalty >= 0).all() and penalty.any()
    clamped(penalty, math.inf).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder[0].parameters())
    assert not one.requires_grad and one.grad is None, "the caller's parameters stay as they are"
    assert encoder[1].num_batches_tracked == (2 if kind == "twin" else 1)
    plain = cnn().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        expected = on_drawings(plain, views, ids)[0](one)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", PENALTIES)
def test_without_grad_mode_there_is_no_graph(views, kind):
    encoder, ids = cnn(), torch.arange(8)
    encode, one, two, law = on_drawings(encoder, views, ids)
    how = dict(**law, kind=kind, key=(0, 0))
    with_graph = transformation_penalty(encode, one, two, **how)
    with torch.no_grad():
        without = transformation_penalty(encode, one, two, **how)
    for a, b in zip(with_graph, without, strict=True):
        assert a.requires_grad and not b.requires_grad
        torch.testing.assert_close(b, a.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", PENALTIES)
def test_frozen_gives_each_item_the_penalty_it_has_alone(views, kind):
    encoder, ids = cnn().double(), torch.arange(12)
    encode, one, two, law = on_drawings(encoder, views, ids, double)
    how = dict(**law, kind=kind)
    expected = cnn().double()
    features, together = transformation_penalty(encode, one, two, **how, key=(0, 5, ids), frozen=encoder)
    torch.testing.assert_close(features, on_drawings(expected, views, ids, double)[0](one), msg="of the training mode")
    assert all(torch.equal(a, b) for a, b in zip(encoder.buffers(), expected.buffers(), strict=True))
    assert all(module.training for module in encoder.modules())
    with evaluating(encoder):
        alone = []
        for i in ids.split(1):
            own = on_drawings(encoder, views, i, double)[0]
            alone.append(transformation_penalty(own, one[i], two[i], **how, key=(0, 5, i))[1])
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-9, atol=1e-12)
    gradients = torch.autograd.grad(together.sum(), encoder[0].weight)[0]
    by_item = torch.autograd.grad(sum(alone).sum(), encoder[0].weight)[0]
    torch.testing.assert_close(gradients, by_item, rtol=1e-8, atol=1e-10)
    in_training = transformation_penalty(encode, one, two, **how, key=(0, 5, ids))[1]
    assert not torch.allclose(in_training, together, rtol=1e-2)


def test_summed_gradient_holds_other_items_only_in_training_mode(views):
    encoder, ids = cnn().double(), torch.arange(6)
    encode, one, _, _ = on_drawings(encoder, views, ids, double)
    jacobian = torch.autograd.functional.jacobian(lambda a: F.normalize(encode(a), dim=1).sum(1), one)
    with evaluating(encoder):
        frozen = torch.autograd.functional.jacobian(lambda a: F.normalize(encode(a), dim=1).sum(1), one)
    others = ~torch.eye(6, dtype=torch.bool)
    assert jacobian[others].abs().max() > 1e-3 > 1e-12 > frozen[others].abs().max()


@pytest.mark.parametrize("kind", PENALTIES)
def test_photographs_whose_colours_stay_have_no_penalty(photographs, kind):
    views, ids, encoder = photographs, torch.arange(32), cnn()
    one, two = (views.draw("train", ids, 0, view, seed=0) for view in (0, 1))
    law = dict(mean=views.mean, variance=views.variance, kind=kind, key=(0, ids))
    with evaluating(encoder):
        features, penalty = transformation_penalty(
            lambda alpha: encoder(views.images("train", ids, ViewDraws(alpha, one.base))), one.alpha, two.alpha, **law
        )
    assert 0 < one.base.jitter.sum() < 32
    assert torch.equal(penalty != 0, one.base.jitter)
    penalty.mean().backward()
    assert encoder[0].weight.grad.isfinite().all() and encoder[0].weight.grad.any()


def test_twin_sees_the_second_view_as_it_was_drawn(photographs):
    views, ids, encoder = photographs, torch.arange(32), cnn()
    one, two = (views.draw("train", ids, 0, view, seed=0) for view in (0, 1))
    first, second = (views.images("train", ids, draws) for draws in (one, two))

    def encode(alpha):
        return encoder(views.images("train", ids, ViewDraws(alpha, one.base)))

    def second_view():
        return encoder(second)

    how = dict(kind="twin", frozen=encoder)
    features, penalty = transformation_penalty(encode, one.alpha, two.alpha, second_view, **how)
    assert encoder.training and encoder[1].num_batches_tracked == 1, "of the first view in training mode alone"
    with evaluating(encoder):
        distance = (F.normalize(encoder(first), dim=1) - F.normalize(encoder(second), dim=1)).square().sum(1)
    torch.testing.assert_close(penalty, distance)
    on_first_crop = transformation_penalty(encode, one.alpha, two.alpha, **how)[1]
    still = ~one.base.jitter
    assert still.any() and not on_first_crop[still].any() and (penalty[still] > 0).all()
    penalty.mean().backward()
    assert encoder[0].weight.grad.isfinite().all() and encoder[0].weight.grad.any()
    with pytest.raises(ValueError, match="other_features: .* give a callable"):
        transformation_penalty(encode, one.alpha, two.alpha, features.detach(), **how)


def test_without_frozen_a_callable_is_called_as_it_is(photographs):
    views, ids, encoder, plain = photographs, torch.arange(16), cnn(), cnn()
    one, two = (views.images("train", ids, views.draw("train", ids, 0, view, seed=0)) for view in (0, 1))
    alpha = torch.zeros(16, 4)
    late = transformation_penalty(lambda _: encoder(one), alpha, other_features=lambda: encoder(two), kind="twin")[1]
    given_now = transformation_penalty(lambda _: plain(one), alpha, other_features=plain(two), kind="twin")[1]
    torch.testing.assert_close(late, given_now)
    assert encoder[1].num_batches_tracked == 2
    law = dict(mean=torch.zeros(4), variance=torch.ones(4))
    for kind in ("gradient", "forward"):  # which take no features, with frozen or without
        for other in (plain(two), lambda: pytest.fail("called")):
            transformation_penalty(lambda _: encoder(one), alpha, alpha, other, **law, kind=kind, frozen=encoder)


def dense(norm):
    "A small network on rows, with a normalisation in the middle."
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), norm, nn.Softplus(), nn.Linear(6, 4)).double()


class Instances(nn.InstanceNorm1d):
    def forward(self, x):
        return super().forward(x.view(len(x), 2, 3)).flatten(1)


NORMS = dict(
    batch=lambda: nn.BatchNorm1d(6),
    plain=lambda: nn.BatchNorm1d(6, affine=False),
    cumulative=lambda: nn.BatchNorm1d(6, momentum=None),
    untracked=lambda: nn.BatchNorm1d(6, track_running_stats=False),
    layer=lambda: nn.LayerNorm(6),
    instance=lambda: Instances(2, affine=True),
    group=lambda: nn.GroupNorm(2, 6),
    rms=lambda: nn.RMSNorm(6),
)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_forward_is_right_behind_every_normalisation(norm, training):
    ours, plain = dense(NORMS[norm]()).train(training), dense(NORMS[norm]()).train(training)
    alpha, other = torch.rand(2, 9, 3, dtype=double)
    weight, direction = ours[0].weight, torch.randn(6, 3, dtype=double)

    def penalty():
        return transformation_penalty(ours, alpha, other, kind="forward", normalise=False)

    features, value = penalty()
    torch.testing.assert_close(features, plain(alpha))
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), plain.buffers(), strict=True)), "running statistics"
    jacobian = torch.autograd.functional.jacobian(plain, alpha)  # (n, d, i, k)
    torch.testing.assert_close(value, torch.einsum("ndik,ik->nd", jacobian, other - alpha).square().sum(1))
    gradient = (torch.autograd.grad(penalty()[1].sum(), weight)[0] * direction).sum().item()
    sides = []
    for eps in (1e-6, -1e-6):
        weight.data += eps * direction
        sides.append(penalty()[1].sum().item())
        weight.data -= eps * direction
    assert gradient == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-5)


def test_forward_refuses_what_it_cannot_do():
    tracked = dense(Instances(2, track_running_stats=True))
    with pytest.raises(ValueError, match="instance normalisation with running statistics"):
        transformation_penalty(tracked, *torch.rand(2, 9, 3, dtype=double), kind="forward")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        transformation_penalty(dense(nn.BatchNorm1d(6)), *torch.rand(2, 1, 3, dtype=double), kind="forward")


def test_signs_belong_to_their_key():
    ids = torch.tensor([5, 11, 2**40])
    zeros = torch.zeros(3, 64)
    signs = rademacher(zeros, (0, 7, ids))
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(rademacher(zeros[:2], (0, 7, ids[1:])), signs[1:])
    assert torch.equal(rademacher(zeros[:, :10], (0, 7, ids)), signs[:, :10])
    for other in ((1, 7, ids), (0, 8, ids), (0, 7)):
        assert not torch.equal(rademacher(zeros, other), signs)
    torch.manual_seed(3)
    first, second = rademacher(zeros), rademacher(zeros)
    torch.manual_seed(3)
    assert torch.equal(rademacher(zeros), first) and not torch.equal(first, second)


def test_signs_are_fair_and_independent():
    signs = torch.stack([rademacher(torch.zeros(50, 16), (0, step)) for step in range(200)]).view(-1, 16)
    assert signs.mean(0).abs().max() < 4 / math.sqrt(len(signs))
    correlations = signs.T @ signs / len(signs) - torch.eye(16)
    assert correlations.abs().max() < 5 / math.sqrt(len(signs))


def test_torch_compile_takes_twin_and_refuses_a_double_backward(views):
    encoder, ids = cnn(), torch.arange(8)
    compiled = torch.compile(encoder, backend="aot_eager")
    encode, one, two, law = on_drawings(compiled, views, ids)
    transformation_penalty(encode, one, two, kind="twin")[1].mean().backward()
    assert encoder[0].weight.grad.isfinite().all()
    with pytest.raises(RuntimeError, match="double backward"):
        transformation_penalty(encode, one, **law)[1].mean().backward()


@pytest.mark.parametrize("limit", [0.5, 3.0, math.inf])
def test_limits(limit):
    penalty = torch.tensor([0.2, 0.4, 6.0], requires_grad=True)
    batch, item = clamped(penalty, limit), clamped(penalty, limit, per="item")
    assert batch.item() == pytest.approx(min(2.2, limit))
    assert item.item() == pytest.approx(sum(min(p, limit) for p in (0.2, 0.4, 6.0)) / 3)
    gradients = [torch.autograd.grad(value, penalty)[0].tolist() for value in (batch, item)]
    assert gradients[0] == pytest.approx([1 / 3 if limit > 2.2 else 0.0] * 3)
    assert gradients[1] == pytest.approx([1 / 3, 1 / 3, 1 / 3 if limit > 6 else 0.0])
    assert clamped(penalty * math.nan, limit).isnan(), "a limit does not hide what went wrong"


def test_ramp():
    assert [ramped(0.1, p, 0.5) for p in (0, 0.25, 0.5, 1)] == pytest.approx([0, 0.05, 0.1, 0.1])
    assert [ramped(0.1, p) for p in (0, 1)] == [0.1, 0.1]
    assert ramped(0.0, 0.3, 0.5) == 0


law = dict(mean=torch.zeros(3), variance=torch.ones(3))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda a: transformation_penalty(torch.sin, a, kind="jvp", **law), "known: gradient, twin, forward"),
        (lambda a: transformation_penalty(torch.sin, a[0], **law), r"alpha \(3,\)"),
        (lambda a: transformation_penalty(torch.sin, a.long(), **law), "expected floats"),
        (lambda a: transformation_penalty(torch.sin, a, a[:2], **law), r"other_alpha \(2, 3\)"),
        (lambda a: transformation_penalty(torch.sin, a, mean=law["mean"]), "mean and variance"),
        (lambda a: transformation_penalty(torch.sin, a, mean=a, variance=law["variance"]), "a value per parameter"),
        (lambda a: transformation_penalty(torch.sin, a, mean=law["mean"], variance=torch.ones(())), "variance"),
        (lambda a: transformation_penalty(torch.sin, a, kind="forward"), "forward: other_alpha"),
        (lambda a: transformation_penalty(torch.sin, a, kind="twin"), "twin: other_alpha"),
        (lambda a: transformation_penalty(torch.sin, a, None, a[:, :2], kind="twin"), "other_features"),
        (lambda a: transformation_penalty(torch.sin, a, None, lambda: a[:, :2], kind="twin"), "other_features"),
        (lambda a: transformation_penalty(torch.sin, a, draws=-1, **law), "draws=-1"),
        (lambda a: transformation_penalty(torch.sin, a, draws=1.5, **law), "draws=1.5"),
        (lambda a: transformation_penalty(lambda x: x.sum(1), a, **law), "features"),
        (lambda a: transformation_penalty(lambda x: x[:2], a, **law), "features"),
        (lambda a: clamped(a, 0.0), "limit=0.0"),
        (lambda a: clamped(a, -1.0), "limit=-1.0"),
        (lambda a: clamped(a, math.nan), "limit=nan"),
        (lambda a: clamped(a, 1.0, per="row"), "per='row'"),
        (lambda a: ramped(-1, 0.5), "weight=-1"),
        (lambda a: ramped(math.nan, 0.5), "weight=nan"),
        (lambda a: ramped(1, 1.5), "progress=1.5"),
        (lambda a: ramped(1, 0.5, -0.1), "ramp=-0.1"),
    ],
)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.rand(4, 3))


@pytest.mark.parametrize("kind", PENALTIES)
def test_features_of_zeros_do_not_blow_up_a_penalty(kind):
    torch.manual_seed(0)
    encoder, alpha = nn.Linear(2, 4), torch.randn(5, 2)
    nn.init.zeros_(encoder.bias)
    alpha[0] = 0
    moments = dict(mean=torch.zeros(2), variance=torch.ones(2)) if kind == "gradient" else {}
    penalty = transformation_penalty(encoder, alpha, torch.randn(5, 2), kind=kind, **moments)[1]
    penalty.mean().backward()
    assert encoder.bias.grad.isfinite().all() and encoder.bias.grad.abs().max() < 1e4
