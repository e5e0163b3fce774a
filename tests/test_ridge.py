"Ridge regression against its own equations, scikit-learn and an iteration that runs to the minimum."

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge as Reference

from dainv.ridge import (
    RIDGE_STRENGTHS,
    RidgeMoments,
    component_errors,
    fit_ridge,
    fit_ridge_moments,
    held_out_parts,
    r_squared,
)


def problem(n, d, k=3, seed=0, noise=0.3):
    "Correlated features (n, d) off the origin and targets (n, k) that depend on some of them."
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(100)) * torch.logspace(0, -2, d)
    features = torch.randn(n, d, generator=generator) @ mixing + 2
    weight = torch.randn(d, k, generator=torch.Generator().manual_seed(101))
    return features, features @ weight + noise * torch.randn(n, k, generator=generator)


def equations(features, targets, strength):
    x, y = features.double(), targets.double()
    x_c, y_c, n, k = x - x.mean(0), y - y.mean(0), len(x), y.shape[1]
    return torch.linalg.solve(x_c.T @ x_c + strength * n * k * torch.eye(x.shape[1]).double(), x_c.T @ y_c)


@pytest.mark.parametrize("strength", [10.0, 1e-2, 1e-6])
@pytest.mark.parametrize("shape", [(200, 8), (12, 40), (20, 20), (21, 20)])
def test_it_solves_the_normal_equations(shape, strength):
    features, targets = problem(*shape)
    fit = fit_ridge(features, targets, strengths=[strength], held_out=0, standardise=False)
    literal = equations(features, targets, strength)
    torch.testing.assert_close(fit.weight, literal, rtol=1e-6, atol=1e-7 * literal.abs().max().item())
    torch.testing.assert_close(fit.predict(features).mean(0), targets.double().mean(0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("shape", [(100, 6), (15, 30)])
def test_it_is_that_of_scikit_learn(shape, standardise):
    features, targets = problem(*shape)
    x = features.double().numpy()
    deviation = x.std(0)
    deviation = np.maximum(deviation, 0.1 * np.sort(deviation)[(len(deviation) - 1) // 2])
    scaled = (x - x.mean(0)) / deviation if standardise else x
    reference = Reference(alpha=1e-2 * len(x) * 3, solver="svd").fit(scaled, targets.double().numpy())
    fit = fit_ridge(features, targets, strengths=[1e-2], held_out=0, standardise=standardise)
    np.testing.assert_allclose(fit.predict(features).numpy(), reference.predict(scaled), rtol=1e-7, atol=1e-8)


def test_an_iteration_on_the_published_loss_ends_there():
    features, targets = problem(150, 6)
    x, y, strength = features.double(), targets.double(), 1e-3
    weight, bias = torch.zeros(6, 3, dtype=x.dtype), torch.zeros(3, dtype=x.dtype)
    both = [weight.requires_grad_(), bias.requires_grad_()]
    optimiser = torch.optim.LBFGS(
        both, max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def loss():
        optimiser.zero_grad()
        value = (x @ weight + bias - y).square().mean() + strength * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    fit = fit_ridge(features, targets, strengths=[strength], held_out=0, standardise=False)
    torch.testing.assert_close(fit.weight, weight.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fit.bias, bias.detach(), rtol=1e-5, atol=1e-5)


def test_the_strength_is_the_best_on_held_out_training_items():
    features, targets = problem(60, 50, noise=3.0)
    parts, errors = held_out_parts(60, 0.2, seed=4), {}
    assert len(parts) == 5 and torch.stack(parts).sum(0).eq(1).all()
    for strength in RIDGE_STRENGTHS:
        fits = [fit_ridge(features[~m], targets[~m], strengths=[strength], held_out=0) for m in parts]
        found = [(f.predict(features[m]) - targets[m]).square().mean() for f, m in zip(fits, parts, strict=True)]
        errors[strength] = torch.stack(found).mean().item()
    chosen = fit_ridge(features, targets, seed=4)
    assert chosen.strength == min(errors, key=errors.get)
    assert chosen.held_out_error == pytest.approx(min(errors.values()), rel=1e-6)
    refitted = fit_ridge(features, targets, strengths=[chosen.strength], held_out=0)
    torch.testing.assert_close(chosen.weight, refitted.weight, rtol=1e-7, atol=1e-9)
    assert math.isnan(refitted.held_out_error)
    assert 1e-8 < chosen.strength < 10, "a choice at the end of the grid would show little"


def test_moments_choose_as_items_do():
    features, targets = problem(1200, 6, noise=5.0)
    by_items = fit_ridge(features, targets, seed=1)
    (mask,) = held_out_parts(1200, 0.2, seed=1)
    parts = [RidgeMoments(6, 3).add(features[m], targets[m]) for m in (~mask, mask)]
    by_moments = fit_ridge_moments(*parts)
    assert by_items.strength == by_moments.strength
    assert by_items.held_out_error == pytest.approx(by_moments.held_out_error, rel=1e-9)
    torch.testing.assert_close(by_items.weight, by_moments.weight, rtol=1e-8, atol=1e-9)


def test_few_items_choose_well_enough_on_average():
    "One part of six items would often choose a map that is worse than the mean of the targets."
    test = problem(2000, 64, k=4, noise=3.0)
    chance = test[1].var(0).mean()
    errors = []
    for seed in range(1, 21):
        fit = fit_ridge(*problem(30, 64, k=4, seed=seed, noise=3.0), seed=seed)
        errors.append(((fit.predict(test[0]) - test[1]).square().mean() / chance).item())
    assert max(errors) < 1.2


@given(st.integers(2, 3000), st.floats(0.01, 0.99), st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_held_out_parts_are_disjoint_and_never_all(n, fraction, seed):
    parts = torch.stack(held_out_parts(n, fraction, seed))
    sizes = parts.sum(1)
    assert parts.sum(0).max() == 1 and sizes.min() == sizes.max()
    assert 1 <= sizes[0] < n and abs(sizes[0] - fraction * n) <= 1
    assert sizes.sum() >= 200 or sizes.sum() > n - sizes[0]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.floats(-1e4, 1e4))
@settings(deadline=None, max_examples=30)
def test_moments_do_not_depend_on_how_the_rows_arrive(sizes, offset):
    n = sum(sizes)
    features, targets = problem(n, 4)
    features = features + offset
    whole, parts = RidgeMoments(4, 3).add(features, targets), RidgeMoments(4, 3)
    for x, y in zip(features.split(sizes), targets.split(sizes), strict=True):
        parts = parts.merged(RidgeMoments(4, 3).add(x, y, block=7))
    rows = torch.cat([features, targets], 1).double()
    centred = rows - rows.mean(0)
    for moments in (whole, parts):
        assert moments.n_items == n
        torch.testing.assert_close(moments.mean, rows.mean(0))
        torch.testing.assert_close(moments.scatter, centred.T @ centred, rtol=1e-8, atol=1e-8 * n)


@given(st.integers(-12, 12), st.booleans())
@settings(deadline=None, max_examples=20)
def test_the_scale_of_the_features_is_of_no_consequence(power, wide):
    features, targets = problem(*((20, 30) if wide else (80, 5)))
    plain, scaled = (fit_ridge(features * s, targets) for s in (1.0, 2.0**power))
    assert plain.strength == scaled.strength
    torch.testing.assert_close(plain.predict(features), scaled.predict(features * 2.0**power), rtol=1e-8, atol=1e-8)


def test_in_the_published_protocol_small_features_look_as_if_they_held_nothing():
    features, targets = problem(500, 6, k=1)
    published = dict(strengths=[1e-5], held_out=0, standardise=False)
    large, small = (
        r_squared(fit_ridge(features * s, targets, **published).predict(features * s), targets).item()
        for s in (1.0, 2.0**-12)
    )
    assert large > 0.9 and small < 0.2


def test_a_constant_feature_and_a_constant_target_do_no_harm():
    features, targets = problem(50, 4)
    more = torch.cat([features, torch.full((50, 1), 0.1)], 1)
    for standardise in (True, False):
        fit = fit_ridge(more, torch.cat([targets, torch.full((50, 1), 7.0)], 1), standardise=standardise)
        assert (fit.weight[-1] == 0).all() and fit.weight[:, -1].abs().max() < 1e-12
        torch.testing.assert_close(fit.predict(more)[:, -1], torch.full((50,), 7.0).double())
    flat = fit_ridge(torch.ones(50, 4), targets)
    torch.testing.assert_close(flat.predict(torch.ones(2, 4)), targets.double().mean(0).expand(2, 3))


def test_one_target_is_a_column():
    features, targets = problem(50, 4, k=1)
    fit = fit_ridge(features, targets)
    assert fit.predict(features).shape == (50, 1) and fit.weight.shape == (4, 1)
    with pytest.raises(ValueError, match=r"targets\[:, None\]"):
        fit_ridge(features, targets[:, 0])


def test_features_of_inference_mode_and_of_half_precision_are_taken():
    features, targets = problem(50, 4)
    with torch.inference_mode():
        inside = fit_ridge(features.clone(), targets)
    torch.testing.assert_close(inside.weight.clone(), fit_ridge(features, targets).weight)
    assert fit_ridge(features.half(), targets).weight.dtype == torch.float64


def test_errors_by_component_and_variance_explained():
    targets = torch.tensor([[0.0, 1.0, 5.0], [2.0, 3.0, 5.0]])
    prediction = torch.tensor([[0.0, 2.0, 5.0], [2.0, 2.0, 5.0]])
    errors = component_errors(prediction, targets, ("m", "b", "sigma"))
    assert errors == {"m": 0.0, "b": 1.0, "sigma": 0.0, "mean": pytest.approx(1 / 3)}
    explained = r_squared(prediction, targets)
    assert explained[:2].tolist() == [1.0, 0.0] and explained[2].isnan()
    for names in (("m",), ("m", "b", "mean")):
        with pytest.raises(ValueError, match="names="):
            component_errors(prediction, targets, names)
    with pytest.raises(ValueError, match="expected"):
        r_squared(prediction, targets[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(features=torch.ones(50, 4).index_fill(0, torch.tensor([9]), torch.inf)), "features: row 9 holds NaN"),
        (dict(targets=torch.ones(50, 3).index_fill(0, torch.tensor([3]), torch.nan)), "targets: row 3 holds NaN"),
        (dict(features=torch.ones(0, 4), targets=torch.ones(0, 3)), "at least one item"),
        (dict(features=torch.ones(50, 4, 2)), r"features of shape \(50, 4, 2\)"),
        (dict(targets=torch.ones(49, 3)), "50 features for 49 targets"),
        (dict(features=torch.ones(1, 4), targets=torch.ones(1, 3)), "1 item"),
        (dict(strengths=[]), "strengths"),
        (dict(strengths=[0.1, 0.0]), "positive numbers"),
        (dict(strengths=[-1.0]), "positive numbers"),
        (dict(strengths=[float("nan")]), "positive numbers"),
        (dict(held_out=0), "needed to choose"),
        (dict(held_out=1.0), "held_out=1.0"),
        (dict(held_out=-0.1, strengths=[0.1]), "held_out=-0.1"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    features, targets = problem(50, 4)
    with pytest.raises(ValueError, match=message):
        fit_ridge(**{"features": features, "targets": targets, **change})


def test_a_map_names_features_that_it_does_not_take():
    with pytest.raises(ValueError, match=r"this map takes \(N, 4\)"):
        fit_ridge(*problem(50, 4)).predict(torch.ones(2, 5))
    with pytest.raises(ValueError, match="features of shape"):
        RidgeMoments(4, 3).add(torch.ones(2, 5), torch.ones(2, 3))


def test_a_unit_that_almost_never_answers_does_not_decide_on_the_strength():
    generator = torch.Generator().manual_seed(3)
    features, targets = problem(300, 8, seed=3)
    rare = torch.zeros(300, 5)  # each answers to two items, to one of them faintly
    for size, items in ((1e-3, torch.arange(5)), (0.3, torch.arange(5) + 100)):
        rare[torch.randperm(300, generator=generator)[items], torch.arange(5)] = size
    both = fit_ridge(torch.cat([features, rare], 1), targets)
    alone = fit_ridge(features, targets)
    assert both.held_out_error < 1.5 * alone.held_out_error
