"The metrics of invariance against their definitions, and the code that each of them wants."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dainv.invariance import METRICS, invariance_loss
from dainv.metrics import fisher, unit_ratio


def grouped(sizes, units, seed=0, spread=1.0, offset=0.0):
    "Features of groups of these sizes, shuffled, and their groups."
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    groups = groups[torch.randperm(len(groups), generator=generator)]
    means = torch.randn(len(sizes), units, generator=generator, dtype=torch.float64)
    return offset + means[groups] + spread * torch.randn(
        len(groups), units, generator=generator, dtype=torch.float64
    ), groups


def mean_over_units(x, groups, distinct, reference=None):
    "The mean over units of a loop over pairs."
    ratios = []
    for column in x.T:
        inside, everything = [], []
        for i in range(len(x)):
            for j in range(i + 1 if distinct else 0, len(x)):
                square = (column[i] - column[j]) ** 2
                if reference is None or reference[i] == reference[j]:
                    everything.append(square)
                if groups[i] == groups[j]:
                    inside.append(square)
        ratios.append(torch.stack(inside).mean() / torch.stack(everything).mean())
    return torch.stack(ratios).mean()


def one_minus_trace(x, groups, shrinkage):
    "Fisher's criterion, as it is defined."
    x = x - x.mean(0)
    total = x.T @ x / len(x)
    means = torch.stack([x[groups == g].mean(0) * (groups == g).double().mean().sqrt() for g in groups.unique()])
    ridge = shrinkage * total.trace() / x.shape[1] * torch.eye(x.shape[1], dtype=x.dtype)
    rank = min(len(groups.unique()) - 1, x.shape[1])
    return 1 - torch.linalg.solve(total + ridge, means.T @ means).trace() / rank


SIZES = st.lists(st.integers(1, 5), min_size=2, max_size=6).filter(lambda s: max(s) > 1)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 4), st.sampled_from(["distinct", "all"]), st.booleans(), st.integers(0, 99))
def test_per_unit_is_the_mean_over_units_of_a_loop_over_pairs(sizes, units, pairs, same_class, seed):
    x, groups = grouped(sizes, units, seed)
    labels = groups // 2 if same_class else None
    ours = invariance_loss(
        x, groups, metric="per_unit", pairs=pairs, reference="same_class" if same_class else "all", labels=labels
    )
    assert ours.item() == pytest.approx(mean_over_units(x, groups, int(pairs == "distinct"), labels).item(), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 40), st.sampled_from([1e-3, 1e-2, 1.0]), st.sampled_from([0.0, 1e3]), st.integers(0, 99))
def test_fisher_is_its_definition_with_more_rows_or_more_units(sizes, units, shrinkage, offset, seed):
    x, groups = grouped(sizes, units, seed, offset=offset)
    ours = fisher(x, groups, len(sizes), shrinkage=shrinkage)
    assert ours.item() == pytest.approx(one_minus_trace(x, groups, shrinkage).item(), rel=1e-6, abs=1e-8)
    assert -1e-9 <= ours <= 1


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("units", [3, 30])
def test_gradients(metric, units):
    x, groups = grouped([3, 2, 4, 1], units)
    assert torch.autograd.gradcheck(lambda x: invariance_loss(x, groups, metric=metric), x.requires_grad_())


@pytest.mark.parametrize("metric", METRICS)
def test_neither_order_nor_scale_nor_names_of_groups_matter(metric):
    x, groups = grouped([4, 4, 4, 4], 5)
    true = invariance_loss(x, groups, metric=metric)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(invariance_loss(x[order], groups[order], metric=metric), true)
    assert torch.allclose(invariance_loss(100 * x + 7, 10 - 3 * groups, metric=metric), true)
    assert torch.allclose(invariance_loss(x, groups, metric=metric, n_groups=9), true)  # ids without a row


@pytest.mark.parametrize("metric", METRICS)
def test_identical_views_give_nothing_and_a_nan_stays_visible(metric):
    x, groups = grouped([4] * 8, 2, spread=0.0)
    # shrinkage alone is left of the Fisher loss
    assert invariance_loss(x, groups, metric=metric) < (0.05 if metric == "fisher" else 1e-12)
    x[3, 1] = torch.nan
    assert invariance_loss(x, groups, metric=metric).isnan()


@pytest.mark.parametrize("metric", METRICS)
def test_a_dead_layer_has_a_finite_loss_and_no_gradient(metric):
    dead = torch.full((8, 6), 3.0, requires_grad=True)
    loss = invariance_loss(dead, torch.arange(8) // 2, metric=metric)
    loss.backward()
    assert loss.item() == (1.0 if metric == "fisher" else 0.0) and not dead.grad.any()


def test_a_unit_that_does_not_vary_is_left_out():
    x, groups = grouped([3, 3, 3], 4)
    silent = torch.cat([x, torch.ones(9, 2)], 1)
    assert unit_ratio(silent, groups, 3, None, 1, 1).item() == pytest.approx(
        unit_ratio(x, groups, 3, None, 1, 1).item()
    )


def test_half_types_are_computed_wider():
    x, groups = grouped([8, 8, 8], 5)
    for metric in METRICS:
        half = invariance_loss(x.bfloat16(), groups, metric=metric)
        assert half.dtype == torch.float32
        assert half.item() == pytest.approx(
            invariance_loss(x.bfloat16().double(), groups, metric=metric).item(), rel=1e-5
        )


def test_only_fisher_refuses_a_rank_one_code():
    x, labels = grouped([20] * 6, 5, spread=0.3)
    direction = torch.linalg.svd(x - x.mean(0))[2][0]
    line = torch.outer(x @ direction, torch.ones(5, dtype=x.dtype))
    for metric, better in (("msd", True), ("per_unit", True), ("fisher", False)):
        lower = invariance_loss(line, labels, metric=metric) < invariance_loss(x, labels, metric=metric)
        assert bool(lower) == better, metric


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan")])
def test_mistakes_are_named(wrong):
    x, groups = grouped([3, 3], 2)
    with pytest.raises(ValueError, match="shrinkage"):
        fisher(x, groups, 2, shrinkage=wrong)
    with pytest.raises(ValueError, match="no meaning"):
        fisher(x, groups, 2, groups, 2)
